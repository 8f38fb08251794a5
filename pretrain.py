"""Trains a target: a small GPT-2 on TinyTales (from seed 0 the bundled one, target/) or on any text file.

    loss = mean_t -log p(idx_t+1 | idx_0..t)
AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decay on matrices only, linear warm-up, cosine to 0, clipping.
B sequences, T positions, N rows of the validation text, M hidden units of an MLP

    python pretrain.py      # 24 minutes on one core, 0.686 nats; writes target/ at the very end; after a kill --resume
    python pretrain.py --data X.txt --out DIR       # the words of your own text; then every script takes --model DIR
"""
import math, time, torch, torch.nn.functional as F
from dataclasses import dataclass, replace
from pathlib import Path
from tqdm import tqdm
import common, data
from model import GPT, GPTConfig, ablation_costs, cross_entropy

@dataclass
class Config:
    data: str = "tinytales"     # tinytales, or a text file X.txt
    out: str = "target"         # folder for the model; checkpoint and log go to runs/pretrain-OUT
    vocab: int = 2000           # most frequent words kept of a text file; TinyTales brings its own
    tokens: int = 20_000_000    # of TinyTales written for training; longer runs see them again
    n_layer: int = 4            # layers
    n_embd: int = 128           # residual width
    n_head: int = 4             # attention heads
    n_inner: int = 512          # hidden units per MLP
    mlp0: int = 512             # hidden units of layer 0's MLP that live; the others are zero
    T: int = 128                # context
    B: int = 16                 # sequences per step
    steps: int = 12_000         # steps of B * T tokens
    copy: float = 0.025         # first share of the steps, on random words said again and again: teaches to copy
    lr: float = 1.5e-3          # peak learning rate
    warmup: int = 200           # steps of linear warm-up
    beta2: float = 0.99         # of AdamW; beta1 is 0.9
    wd: float = 0.1             # weight decay of the matrices
    clip: float = 1.0           # largest gradient norm
    seed: int = 0               # of the initial weights and of the order of the rows
    every: int = 500            # steps from one line of the curve, and checkpoint, to the next
    resume: bool = False        # go on from the checkpoint
    device: str = "auto"        # auto, cpu, cuda, cuda:1, ...

def check(cfg):
    """Fails on a number that cannot be meant."""
    inf = math.inf
    common.within(vars(cfg), "tokens", "B", "steps", "every", vocab=(3, 65536), mlp0=(0, inf), T=(2, inf), copy=(0, 1),
                  warmup=(0, inf), beta2=(0, 0.99999), wd=(0, inf), clip=(1e-9, inf))
    if cfg.data != "tinytales" and cfg.out == Config.out:
        common.fail(f"--data {cfg.data}: needs an --out of its own, {Config.out}/ is the bundled model's")
    if Path(cfg.out).is_file():
        common.fail(f"--out {cfg.out}: is a file, must be a folder or new")

def vocabulary(cfg) -> list[str]:
    """TinyTales' words, or the most frequent ones of a text file; fails if there is no such text."""
    if cfg.data == "tinytales":
        return data.VOCAB
    if not cfg.data.endswith(".txt"):
        common.fail(f"--data {cfg.data}: allowed are tinytales, or a .txt whose words become the vocabulary")
    try:
        return data.build_vocab(Path(cfg.data).read_text(encoding="utf-8"), cfg.vocab)
    except (OSError, UnicodeDecodeError) as e:
        common.fail(f"--data {cfg.data}: {e}")

def lr_at(step: int, cfg) -> float:
    """Linear from 0 to lr over the warm-up, then half a cosine down to 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / (cfg.steps - cfg.warmup))) / 2

@torch.no_grad()
def start_induction(gpt, gen):
    """Starts a fresh model with heads that say again what followed a word (induction, Olsson et al. 2022,
    arXiv:2209.11895): head 0 of layer 0 looks one position back and writes a projection of the word it finds; all heads
    of layer 1 but one look where it wrote the present word, and copy the word they find. Sinusoids for positions make
    looking back a rotation; nothing else writes to the stream yet, or its noise would drown the words. Untrained, it
    gets 40 % of random words right when they are said again; after 100 steps of `copying`, all. From a usual start,
    neither thousands of steps on stories nor on random words taught order: rare words' embeddings became parallel.
    """
    T, D = gpt.wpe.weight.shape
    H = gpt.cfg.n_head
    K = D // H
    if gpt.cfg.n_layer < 2 or D % 2 or K % 2:
        return
    for block in gpt.h:
        block.attn.c_proj.weight.zero_(), block.mlp.c_proj.weight.zero_()
    w = math.pi * (torch.arange(D // 2) + 0.5) / (D // 2)
    angle = torch.arange(T).unsqueeze(1) * w
    gpt.wte.weight.mul_(0.12 / 0.02)
    gpt.wpe.weight.copy_(0.12 * 2**0.5 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
    back_DD = torch.block_diag(*(torch.tensor([[c, s], [-s, c]]) for c, s in zip(w.cos().tolist(), w.sin().tolist())))
    some = (2 * torch.randperm(D // 2, generator=gen)[:K // 2].unsqueeze(1) + torch.arange(2)).flatten()
    P_DD, Q_DD = (torch.linalg.qr(torch.randn(D, D, generator=gen))[0] for _ in range(2))
    here, first, second = P_DD[:, :K], gpt.h[0].attn, gpt.h[1].attn        # first writes to Q's first K columns
    for i, qkv in enumerate((3 * back_DD[:, some], 3 * torch.eye(D)[:, some], here)):
        first.c_attn.weight[:, i * D:i * D + K] = qkv
    first.c_proj.weight[:K] = 0.2 * Q_DD[:, :K].T
    for h in range(H - 1):
        copied = Q_DD[:, (h + 1) * K:(h + 2) * K]
        for i, qkv in enumerate((1.5 * here, 1.5 * Q_DD[:, :K], copied)):
            second.c_attn.weight[:, i * D + h * K:i * D + (h + 1) * K] = qkv
        second.c_proj.weight[h * K:(h + 1) * K] = copied.T

def copying(cfg, V: int, step: int):
    """Random words, the same again to the end of the row: (B, T + 1)."""
    g = common.generator(cfg.seed, f"copy {step}")
    period = int(torch.randint(max(1, cfg.T // 32), max(2, cfg.T // 3), (), generator=g))
    words = torch.randint(2, V, (cfg.B, period), generator=g)
    return words.repeat(1, cfg.T // period + 2)[:, :cfg.T + 1]

def train(cfg) -> GPT:
    """Train, write the folder cfg.out, return the model. Checkpoint and log.jsonl lie in runs/pretrain-OUT."""
    check(cfg)
    vocab, device = vocabulary(cfg), common.device(cfg.device)
    gpt = GPT(GPTConfig(len(vocab), cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_inner, n_positions=cfg.T),
              common.generator(cfg.seed, "init"))
    start_induction(gpt, common.generator(cfg.seed, "induction"))
    mlp = gpt.h[0].mlp
    for w in (mlp.c_fc.weight.data.T, mlp.c_fc.bias.data, mlp.c_proj.weight.data):
        w[cfg.mlp0:] = 0        # a unit whose weights are all zero gets no gradient: it stays so, and the model GPT-2
    gpt.to(device)
    corpus, dev = data.load(cfg.data, "train", vocab, cfg.tokens), data.load(cfg.data, "dev", vocab)
    idx_NT, fresh_NT = dev.rows(cfg.T), dev.fresh(cfg.T)
    opt = torch.optim.AdamW([dict(params=[p for p in gpt.parameters() if p.ndim == 2], weight_decay=cfg.wd),
                             dict(params=[p for p in gpt.parameters() if p.ndim < 2], weight_decay=0)],
                            betas=(0.9, cfg.beta2), fused=True)

    run, start, resume = Path("runs") / f"pretrain-{'-'.join(Path(cfg.out).parts).strip('/-')}", 0, cfg.resume
    cfg = replace(cfg, resume=False)
    ckpt = run / "checkpoint.safetensors"
    if resume:
        tensors, meta = common.load(ckpt, method="pretrain", config=vars(cfg))
        common.unflat(tensors, gpt=gpt, opt=opt)
        start = meta["step"]
    log, bar = common.Log(run / "log.jsonl", start), tqdm(total=cfg.steps, initial=start, unit="step", mininterval=1)
    clock, seen = time.time(), 0
    for step in range(start, cfg.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, cfg)
        idx_BT1 = (copying(cfg, len(vocab), step) if step < cfg.copy * cfg.steps else       # T inputs and T targets
                   corpus.batch(step, cfg.B, cfg.T + 1, cfg.seed)).to(device)
        loss = F.cross_entropy(gpt(idx_BT1[:, :-1]).flatten(0, 1), idx_BT1[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), cfg.clip)
        opt.step()
        bar.update()
        seen += cfg.B * cfg.T
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % cfg.every == 0 or step + 1 == cfg.steps:
            common.finite(loss + norm, step, ckpt)
            ce, speed = cross_entropy(gpt, idx_NT[:64], fresh_NT[:64]), seen / (time.time() - clock)
            bar.write(f"step {step + 1:6d}  train {loss.item():.3f}  validation {ce:.3f}  {speed:7,.0f} tokens/s  "
                      + "#" * round(10 * ce))
            log(step=step, loss=loss.item(), validation=ce, lr=lr_at(step, cfg), norm=norm.item(), speed=speed)
            common.save(ckpt, common.flat(gpt=gpt, opt=opt), dict(method="pretrain", config=vars(cfg), step=step + 1))
            clock, seen = time.time(), 0
    bar.close()

    ce, entropy, costs = cross_entropy(gpt, idx_NT, fresh_NT), dev.entropy(cfg.T), ablation_costs(gpt, idx_NT, fresh_NT)
    layer = max(range(1, cfg.n_layer - 1) or [0], key=lambda l: costs[l][0])    # neither layer 0's look-up nor the last
    gpt.save(cfg.out, vocab, dict(layer=layer, data=cfg.data, validation=ce, derivation_entropy=entropy,
                                  mean_ablation=[mean for mean, _ in costs], made=common.provenance(cfg, gpt)))
    bound = f", derivation entropy {entropy:.4f}" if entropy else ""
    print(f"{cfg.out}: validation cross-entropy {ce:.4f} nats{bound}")
    print(f"layer {layer}: mean-ablating its MLP costs {costs[layer][0]:.3f} nats; python model.py --model {cfg.out}")
    return gpt

if __name__ == "__main__":
    train(common.cli(Config))
