"""Trains a target: a small GPT-2, on TinyTales (from seed 0 the bundled one, target/) or any text.

    loss = mean_t -log p(idx_t+1 | idx_0..t)
AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decay on matrices only, linear warm-up, cosine
to 0, clipping. The model starts with heads that can copy (`start_induction`), and its first steps
are on random words that repeat themselves (`copying`).

B sequences, T positions, D residual width, H heads, K head width, V vocabulary
N rows of the validation text, M hidden units of an MLP

    python pretrain.py      # 24 minutes on one core, 0.686 nats; after a kill --resume
    python pretrain.py --data X.txt --out DIR       # then every script takes --model DIR

The first writes target/, at the very end; the second takes the words of your own text.
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
from model import GPT, GPTConfig, ablation_costs, cross_entropy


@dataclass
class Config:
    # text and model
    data: str = "tinytales"     # tinytales, or a text file X.txt
    out: str = "target"         # folder for the model; checkpoint and log go to runs/pretrain-OUT
    vocab: int = 2000           # [3, 65536] words kept of a text file; TinyTales brings its own
    tokens: int = 20_000_000    # [1, 1e10] of TinyTales for training; longer runs see them again
    n_layer: int = 4            # [1, 1e3] layers
    n_embd: int = 128           # [1, 1e5] residual width
    n_head: int = 4             # [1, 1e4] attention heads
    n_inner: int = 512          # [1, 1e6] hidden units per MLP
    mlp0: int = 512             # [0, 1e6] units of layer 0's MLP that live; the others are 0
    T: int = 128                # [2, 1e6] context
    # training
    B: int = 16                 # [1, 1e6] sequences per step
    steps: int = 12_000         # [1, 1e8] steps of B * T tokens
    copy: float = 0.025         # [0, 1] share of the steps, the first, on repeated words
    lr: float = 1.5e-3          # (0, 100] peak learning rate
    warmup: int = 200           # [0, 1e8] steps of linear warm-up
    beta2: float = 0.99         # [0, 1) of AdamW; beta1 is 0.9
    wd: float = 0.1             # [0, 1e3] weight decay of the matrices
    clip: float = 1.0           # (0, 1e9] largest gradient norm
    # the run
    seed: int = 0               # [0, 1e18] of the initial weights and of the order of the rows
    every: int = 500            # [1, 1e9] steps between lines of the curve, and checkpoints
    resume: bool = False        # go on from the checkpoint
    device: str = "auto"        # auto, cpu, cuda, cuda:1, ...


def check(cfg):
    """Fail on a number that cannot be meant, or a folder that must not be written to."""
    common.check(cfg)
    if cfg.data != "tinytales" and cfg.out == Config.out:
        common.fail(f"--data {cfg.data}: needs an --out of its own, "
                    f"{Config.out}/ is the bundled model's")
    if Path(cfg.out).is_file():
        common.fail(f"--out {cfg.out}: is a file, must be a folder or new")


def vocabulary(cfg) -> list[str]:
    """Choose the words: TinyTales', or the most frequent ones of a text file. Fails if there is no
    such text."""
    if cfg.data == "tinytales":
        return data.VOCAB
    if not cfg.data.endswith(".txt"):
        common.fail(f"--data {cfg.data}: allowed are tinytales, or a .txt whose words become the "
                    "vocabulary")
    path, _ = data.file_of(cfg.data)
    return data.build_vocab(data.read_text(path), cfg.vocab)


def lr_at(step: int, cfg) -> float:
    """The learning rate: linear from 0 to lr over the warm-up, then half a cosine down to 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    angle = math.pi * (step - cfg.warmup) / (cfg.steps - cfg.warmup)
    return cfg.lr * (1 + math.cos(angle)) / 2


# -------------------------------------------------------------------------- where it starts
@torch.no_grad()
def start_induction(gpt, gen):
    """Give a fresh model heads that say again what followed a word (induction, Olsson et al. 2022,
    arXiv:2209.11895).

    Head 0 of layer 0 looks one position back and writes a projection of the word that it finds. All
    heads of layer 1 but one look where that head wrote the present word, and copy the word that
    stands there. Positions are sinusoids, which makes looking back a rotation. Nothing else writes
    to the stream yet, or its noise would drown the words.

    Untrained, the model gets 40 % of random words right when they are said again; after 100 steps
    of `copying`, all. From a usual start, neither thousands of steps on stories nor on random words
    taught order: rare words' embeddings became parallel. Models that are too small for this (one
    layer, odd widths) start as usual."""
    T, D = gpt.wpe.weight.shape
    H = gpt.cfg.n_head
    K = D // H
    if gpt.cfg.n_layer < 2 or D % 2 or K % 2:
        return

    # nothing writes to the stream
    for block in gpt.h:
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()

    # positions: D / 2 pairs (sin, cos) of frequencies between 0 and pi
    frequency = math.pi * (torch.arange(D // 2) + 0.5) / (D // 2)
    angle = torch.arange(T).unsqueeze(1) * frequency
    gpt.wte.weight.mul_(0.12 / 0.02)
    waves_TD = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    gpt.wpe.weight.copy_(0.12 * 2**0.5 * waves_TD)

    # which turn to the position before by a rotation of each pair; K of the D columns are enough
    pairs = zip(frequency.cos().tolist(), frequency.sin().tolist())
    back_DD = torch.block_diag(*(torch.tensor([[c, s], [-s, c]]) for c, s in pairs))
    chosen = torch.randperm(D // 2, generator=gen)[:K // 2]
    columns = (2 * chosen.unsqueeze(1) + torch.arange(2)).flatten()

    # P: K directions by which a word is known; Q: where heads write it
    P_DD = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    Q_DD = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    word_DK = P_DD[:, :K]
    before_DK = Q_DD[:, :K]

    # layer 0, head 0: query "one back", key "here", value the word; it writes the word before
    first = gpt.h[0].attn
    query_DK = 3 * back_DD[:, columns]
    key_DK = 3 * torch.eye(D)[:, columns]
    set_head(first, 0, query_DK, key_DK, word_DK)
    first.c_proj.weight[:K] = 0.2 * before_DK.T

    # layer 1: query this word, key the word before, value K directions of the word there
    second = gpt.h[1].attn
    for h in range(H - 1):
        copied_DK = Q_DD[:, (h + 1) * K:(h + 2) * K]
        set_head(second, h, 1.5 * word_DK, 1.5 * before_DK, copied_DK)
        second.c_proj.weight[h * K:(h + 1) * K] = copied_DK.T


def set_head(attn, h, query_DK, key_DK, value_DK):
    """Write the matrices of head h into c_attn, whose columns are all queries, all keys, all
    values."""
    D, K = query_DK.shape
    for i, part_DK in enumerate((query_DK, key_DK, value_DK)):
        first = i * D + h * K
        attn.c_attn.weight[:, first:first + K] = part_DK


def copying(cfg, V: int, step: int):
    """Draw random words that repeat themselves to the end of the row: (B, T + 1)."""
    gen = common.generator(cfg.seed, f"copy {step}")
    shortest = max(1, cfg.T // 32)
    longest = max(2, cfg.T // 3)
    period = int(torch.randint(shortest, longest, (), generator=gen))
    words = torch.randint(2, V, (cfg.B, period), generator=gen)
    return words.repeat(1, cfg.T // period + 2)[:, :cfg.T + 1]


def build(cfg, V: int) -> GPT:
    """Make the model that training begins with, if there is memory for its training."""
    D = cfg.n_embd
    block = 4 * D**2 + 2 * D * cfg.n_inner
    seen = 8 * D + 3 * cfg.n_inner + 2 * cfg.n_head * cfg.T         # by a block, of each token
    n_weights = cfg.n_layer * block + (V + cfg.T) * D
    n_activations = cfg.B * cfg.T * (2 * V + cfg.n_layer * seen)
    sizes = [common.flag(name, getattr(cfg, name)) for name in ("n_layer", "n_embd", "B", "T")]
    common.need_for_training(n_weights, n_activations, " ".join(sizes))
    conf = GPTConfig(V, cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_inner, n_positions=cfg.T)
    gpt = GPT(conf, common.generator(cfg.seed, "init"))
    start_induction(gpt, common.generator(cfg.seed, "induction"))
    # a unit whose weights are all zero gets no gradient: it stays zero, and the model a GPT-2
    mlp = gpt.h[0].mlp
    mlp.c_fc.weight.data[:, cfg.mlp0:] = 0
    mlp.c_fc.bias.data[cfg.mlp0:] = 0
    mlp.c_proj.weight.data[cfg.mlp0:] = 0
    return gpt


# --------------------------------------------------------------------------------- training
def optimizer(gpt, cfg):
    """AdamW, with weight decay for matrices only."""
    matrices = [p for p in gpt.parameters() if p.ndim == 2]
    vectors = [p for p in gpt.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=cfg.wd), dict(params=vectors, weight_decay=0)]
    return torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)


def train(cfg) -> GPT:
    """Train, write the folder cfg.out, return the model. Checkpoint and log.jsonl lie in
    runs/pretrain-OUT."""
    # model, text, optimizer
    check(cfg)
    vocab = vocabulary(cfg)
    device = common.device(cfg.device)
    gpt = build(cfg, len(vocab)).to(device)
    corpus = data.load(cfg.data, "train", vocab, cfg.tokens)
    dev = data.load(cfg.data, "dev", vocab)
    idx_NT = dev.rows(cfg.T)
    fresh_NT = dev.fresh(cfg.T)
    opt = optimizer(gpt, cfg)

    # what the checkpoint says of the run, and where that begins
    resume = cfg.resume
    cfg = replace(cfg, resume=False)
    fixed = dict(method="pretrain", text=data.fingerprint(cfg.data), config=vars(cfg))
    start, ckpt, log = begin(cfg, resume, fixed, gpt=gpt, opt=opt)
    bar = tqdm(total=cfg.steps, initial=start, unit="step", mininterval=1)

    clock = time.time()
    seen = 0                                # tokens since the clock was set
    for step in range(start, cfg.steps):
        idx_BT1 = rows_of(step, cfg, corpus).to(device)
        loss, norm = update(gpt, opt, idx_BT1, lr_at(step, cfg), cfg.clip)
        bar.update()
        seen += cfg.B * cfg.T
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")

        # a line of the curve, and a checkpoint
        if (step + 1) % cfg.every == 0 or step + 1 == cfg.steps:
            common.finite(loss + norm, step, ckpt)
            ce = cross_entropy(gpt, idx_NT[:64], fresh_NT[:64])
            speed = seen / (time.time() - clock)
            bar.write(f"step {step + 1:6d}  train {loss.item():.3f}  validation {ce:.3f}  "
                      f"{speed:7,.0f} tokens/s  " + "#" * round(10 * ce))
            log(step=step, loss=loss.item(), validation=ce, lr=lr_at(step, cfg), norm=norm.item(),
                speed=speed)
            common.save(ckpt, common.flat(gpt=gpt, opt=opt), fixed | dict(step=step + 1))
            clock = time.time()
            seen = 0
    bar.close()
    finish(cfg, gpt, vocab, dev)
    return gpt


def begin(cfg, resume, fixed, **parts):
    """Where does the run begin, and where does it write? (first step, checkpoint, log).

    fixed: what a checkpoint must say to go on from it; parts: what it restores."""
    run = Path("runs") / f"pretrain-{'-'.join(Path(cfg.out).parts).strip('/-')}"
    ckpt = run / "checkpoint.safetensors"
    made = [Path(cfg.out) / name for name in ("vocab.json", "config.json", "model.safetensors")]
    for path in (ckpt, run / "log.jsonl", *made):
        common.must_be_file(path)
    start = 0
    if resume and common.has_checkpoint(ckpt):
        tensors, meta = common.load(ckpt, **fixed)
        common.unflat(tensors, **parts)
        start = common.steps_done(ckpt, meta, cfg.steps)
    common.must_be_writable(run, cfg.out)
    common.hold(run)
    return start, ckpt, common.Log(run / "log.jsonl", start)


def rows_of(step, cfg, corpus):
    """Draw the rows of one step, with T inputs and T targets each: words to copy at first, then
    text. (B, T + 1)."""
    if step < cfg.copy * cfg.steps:
        return copying(cfg, len(corpus.vocab), step)
    return corpus.batch(step, cfg.B, cfg.T + 1, cfg.seed)


def update(gpt, opt, idx_BT1, lr, clip):
    """Take one step; returns the loss and the gradient's norm before clipping."""
    for group in opt.param_groups:
        group["lr"] = lr
    logits = gpt(idx_BT1[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), idx_BT1[:, 1:].flatten())
    opt.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip)
    opt.step()
    return loss, norm


def finish(cfg, gpt, vocab, dev):
    """Measure the model, choose the layer to take apart, write the folder."""
    idx_NT = dev.rows(cfg.T)
    fresh_NT = dev.fresh(cfg.T)
    ce = cross_entropy(gpt, idx_NT, fresh_NT)
    entropy = dev.entropy(cfg.T)
    costs = ablation_costs(gpt, idx_NT, fresh_NT)
    mean_costs = [mean for mean, _ in costs]

    # the MLP that is worth most; neither layer 0's, which is a look-up of words, nor the last
    inner = range(1, cfg.n_layer - 1) or [0]
    layer = max(inner, key=mean_costs.__getitem__)

    meta = dict(layer=layer, data=cfg.data, validation=ce, derivation_entropy=entropy,
                mean_ablation=mean_costs, made=common.provenance(cfg, gpt))
    gpt.save(cfg.out, vocab, meta)
    bound = f", derivation entropy {entropy:.4f}" if entropy else ""
    print(f"{cfg.out}: validation cross-entropy {ce:.4f} nats{bound}")
    print(f"layer {layer}: mean-ablating its MLP costs {mean_costs[layer]:.3f} nats; "
          f"python model.py --model {cfg.out}")


if __name__ == "__main__":
    train(common.cli(Config))
