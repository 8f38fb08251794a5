"""GPT-2 (Radford et al. 2019) in Hugging Face's checkpoint layout, with a seam at each MLP. Run it for a target's card.

    r_0 = wte[idx] + wpe[t];  r' = r + Attn(LN_1 r);  x = LN_2 r';  r_next = r' + mlp(x);  logits = LN_f(r_last) wte^T
    mlp(x) = gelu_new(x W_in + b_in) W_out + b_out       W_in (D, M) = mlp.c_fc.weight, W_out (M, D) = mlp.c_proj.weight
Differs from transformers: no dropout; logits agree to 1e-5, not bit for bit.
B sequences, T positions, D residual width, M MLP hidden width, H heads, K head width, V vocabulary, N rows
    python model.py --model DIR         # any GPT-2 folder: config.json, model.safetensors, vocab.json
"""
import common, hashlib, json, torch, torch.nn as nn, torch.nn.functional as F
from dataclasses import asdict, dataclass, fields
from pathlib import Path

EOT = "<|endoftext|>"                   # starts each document
FIXED = dict(model_type="gpt2", activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True,
             scale_attn_by_inverse_layer_idx=False)          # what a config.json must say, or leave out, to be GPT-2

@dataclass
class GPTConfig:                        # names as in Hugging Face's config.json; defaults of the bundled target
    vocab_size: int                     # V
    n_layer: int = 4
    n_embd: int = 128                   # D
    n_head: int = 4                     # H
    n_inner: int = 512                  # M
    n_positions: int = 128              # longest T
    layer_norm_epsilon: float = 1e-5
    def __post_init__(self):
        for f in fields(self):
            if type(v := getattr(self, f.name)) is not f.type or v <= 0:
                common.fail(f"GPT-2 config: {f.name} is {v!r}, must be a positive {f.type.__name__}")
        if self.n_embd % self.n_head:
            common.fail(f"GPT-2 config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

class Conv1D(nn.Module):
    """x_..I -> x W_IO + b_O: a linear layer that keeps its weight the other way round, as GPT-2's checkpoints do."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)
    def forward(self, x_BTD):
        qkv_BHTK = (z.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for z in self.c_attn(x_BTD).chunk(3, dim=-1))
        if x_BTD.is_cuda:
            z_BHTK = F.scaled_dot_product_attention(*qkv_BHTK, is_causal=True)
        else:       # on a CPU the plain products are as fast, and with common.fast_matmul they alone gain
            q, k, v = (z.flatten(0, 1) for z in qkv_BHTK)
            mask_TT = x_BTD.new_full((x_BTD.shape[1], x_BTD.shape[1]), -torch.inf).triu(1)
            a = torch.baddbmm(mask_TT, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
            z_BHTK = (a @ v).unflatten(0, (-1, self.n_head))
        return self.c_proj(z_BHTK.transpose(1, 2).flatten(2))

def gelu(z):
    """GPT-2's nonlinearity, gelu_new: z Phi(z), Phi the normal distribution function, in the tanh
    approximation (Hendrycks, Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(z, approximate="tanh")

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, cfg.n_inner)
        self.c_proj = Conv1D(cfg.n_inner, cfg.n_embd)
    def forward(self, x_BTD):
        return self.c_proj(gelu(self.c_fc(x_BTD)))

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)
    def to_mlp(self, r_BTD):            # -> x_BTD, which the MLP reads, and r_BTD, which its output is added to
        r_BTD = r_BTD + self.attn(self.ln_1(r_BTD))
        return self.ln_2(r_BTD), r_BTD
    def forward(self, r_BTD):
        x_BTD, r_BTD = self.to_mlp(r_BTD)
        return r_BTD + self.mlp(x_BTD)

class GPT(nn.Module):
    """Initialised as GPT-2, but matrices have std 1 / sqrt(D): GPT-2's 0.02 is too small for a narrow model."""
    def __init__(self, cfg: GPTConfig, generator=None):
        super().__init__()
        self.cfg, self.folder, self.hash, self.meta = cfg, None, None, {}               # load() fills these in
        self.vocab = [f"<{i}>" for i in range(cfg.vocab_size)]
        self.wte, self.wpe = (nn.Embedding(n, cfg.n_embd) for n in (cfg.vocab_size, cfg.n_positions))
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if name in ("wte.weight", "wpe.weight") else cfg.n_embd ** -0.5
                std *= (2 * cfg.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=std, generator=generator)
    def prefix(self, idx_BT, layer: int):
        """Tokens -> (x_BTD, r_BTD) at one MLP: its input after LayerNorm, and the stream its output is added to."""
        if idx_BT.shape[1] > self.cfg.n_positions:
            common.fail(f"{idx_BT.shape[1]} tokens in a row, but the model has {self.cfg.n_positions} positions")
        r_BTD = self.wte(idx_BT) + self.wpe.weight[:idx_BT.shape[1]]
        for block in self.h[:layer]:
            r_BTD = block(r_BTD)
        return self.h[layer].to_mlp(r_BTD)
    def hidden(self, r_BTD, y_BTD, layer: int):
        """From one MLP's output y on, to LN_f(r_last)_BTD, which the unembedding reads."""
        return self.ln_f(nn.Sequential(*self.h[layer + 1:])(r_BTD + y_BTD))
    def suffix(self, r_BTD, y_BTD, layer: int):
        """From one MLP's output y on: logits_BTV. Bit for bit, suffix(r, h[layer].mlp(x), layer) is forward(idx)."""
        return F.linear(self.hidden(r_BTD, y_BTD, layer), self.wte.weight)
    def forward(self, idx_BT, replace=None):
        """logits_BTV. If given, replace(layer, x_BTD, mlp) -> y_BTD stands in for every MLP, called in layer order."""
        replace, last = replace or (lambda layer, x_BTD, mlp: mlp(x_BTD)), self.cfg.n_layer - 1
        x_BTD, r_BTD = self.prefix(idx_BT, 0)
        for layer in range(last):
            x_BTD, r_BTD = self.h[layer + 1].to_mlp(r_BTD + replace(layer, x_BTD, self.h[layer].mlp))
        return self.suffix(r_BTD, replace(last, x_BTD, self.h[last].mlp), last)
    @classmethod
    def load(cls, folder, device="cpu"):
        """A frozen GPT-2 from a Hugging Face folder: `vocab` lists its token strings, `hash` identifies its weights.
        Fails if a file is missing or damaged, or if config, weights and vocabulary do not fit together."""
        folder = Path(folder)
        conf = {"layer_norm_epsilon": 1e-5, "n_inner": None} | read_json(folder / "config.json")
        if bad := [k for k, v in FIXED.items() if conf.get(k, v) != v]:
            common.fail(f"{folder / 'config.json'}: {bad[0]} is {conf[bad[0]]!r}, only {FIXED[bad[0]]!r} is supported")
        conf["n_inner"] = conf["n_inner"] or 4 * (conf.get("n_embd") or 0)      # Hugging Face writes null for 4 D
        with torch.device("meta"):              # no memory, no random numbers: the weights come from the file
            gpt = cls(GPTConfig(**{f.name: conf.get(f.name) for f in fields(GPTConfig)}))
        path = folder / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in common.load(path)[0].items()
                   if not k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}    # masks, tied head
        have, want = ({k: tuple(v.shape) for k, v in d.items()} for d in (tensors, gpt.state_dict()))
        if bad := [k for k in want | have if have.get(k) != want.get(k)]:
            common.fail(f"{path}: {bad[0]} has shape {have.get(bad[0])}, config.json wants {want.get(bad[0])}")
        gpt.load_state_dict({k: v.to(device, torch.float32, copy=True) for k, v in tensors.items()}, assign=True)
        gpt.folder, gpt.meta = folder, conf.get("nanodecomp", {})
        gpt.hash = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        ids = read_json(folder / "vocab.json") if (folder / "vocab.json").exists() else {}
        tokens = {i: token for token, i in ids.items() if type(i) is int and 0 <= i < gpt.cfg.vocab_size}
        if len(tokens) < len(ids):
            common.fail(f"{folder / 'vocab.json'}: ids must be distinct and from 0 to {gpt.cfg.vocab_size - 1}")
        gpt.vocab = [tokens.get(i, name) for i, name in enumerate(gpt.vocab)]
        return gpt.eval().requires_grad_(False)
    def save(self, folder, vocab: list[str], meta: dict):
        """A folder for `load` and for transformers.GPT2LMHeadModel.from_pretrained, which ignores `meta`."""
        eot = vocab.index(EOT) if EOT in vocab else None
        conf = dict(architectures=["GPT2LMHeadModel"], **FIXED, **asdict(self.cfg), bos_token_id=eot, eos_token_id=eot,
                    torch_dtype="float32", nanodecomp=meta)
        tensors = {f"transformer.{k}": v.detach().float().cpu() for k, v in self.state_dict().items()}
        for name, content in (("vocab.json", {w: i for i, w in enumerate(vocab)}), ("config.json", conf)):
            common.write(Path(folder) / name, json.dumps(content, indent=1).encode())
        common.write(Path(folder) / "model.safetensors", common.safetensors.save(tensors, {"format": "pt"}))

def read_json(path) -> dict:            # fails if the file holds no JSON object
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        common.fail(f"{path}: {'not a JSON object' if path.exists() else 'no such file'} ({e})")

@torch.no_grad()
def cross_entropy(gpt, idx_NT, fresh_NT=None, replace=None) -> float:
    """Mean next-token cross-entropy in nats over each row's tokens but its first, or over those marked in fresh_NT."""
    y_NT = (idx_NT if fresh_NT is None else idx_NT.masked_fill(~fresh_NT, -100))[:, 1:].to(gpt.wte.weight.device)
    loss = sum(F.cross_entropy(gpt(idx_BT, replace)[:, :-1].flatten(0, 1), y_BT.flatten(), reduction="sum")
               for idx_BT, y_BT in zip(idx_NT.to(y_NT.device).split(32), y_NT.split(32)))
    return loss.item() / (y_NT >= 0).sum().item()

@torch.no_grad()
def ablation_costs(gpt, idx_NT, fresh_NT=None) -> list[list[float]]:
    """Per layer, what replacing the MLP's output by its mean over the rows, and by zero, adds to the cross-entropy."""
    idx_NT, clean, costs = idx_NT.to(gpt.wte.weight.device), cross_entropy(gpt, idx_NT, fresh_NT), []
    for l, block in enumerate(gpt.h):
        y_D = sum(block.mlp(gpt.prefix(idx_BT, l)[0]).sum((0, 1)) for idx_BT in idx_NT.split(32)) / idx_NT.numel()
        splices = [lambda layer, x, mlp, y=y: y.expand_as(x) if layer == l else mlp(x) for y in (y_D, 0 * y_D)]
        costs.append([cross_entropy(gpt, idx_NT, fresh_NT, replace) - clean for replace in splices])
    return costs

def default_layer(gpt) -> int:
    """The layer to decompose: the one that pretrain.py chose, or the middle one of somebody else's model."""
    return gpt.meta.get("layer", gpt.cfg.n_layer // 2)

@torch.no_grad()
def accuracy(gpt, prompts) -> float:
    """Share of data.Prompts whose best right token gets a higher logit than the best wrong one."""
    last = [(p, gpt(torch.tensor([p.ids], device=gpt.wte.weight.device))[0, -1]) for p in prompts]
    return sum((z_V[p.right].max() > z_V[p.wrong].max()).item() for p, z_V in last) / len(prompts)

@torch.no_grad()
def generate(gpt, ids: list[int], n: int, stop: int, generator) -> list[int]:
    """Up to n tokens drawn from the model after `ids`, one by one; the token `stop` is the last, if it is drawn."""
    new = []
    while len(new) < n and new[-1:] != [stop]:
        idx_1T = torch.tensor([(ids + new)[-gpt.cfg.n_positions:]], device=gpt.wte.weight.device)
        new += torch.multinomial(gpt(idx_1T)[0, -1].softmax(-1).cpu(), 1, generator=generator).tolist()
    return new

@dataclass
class Config:
    model: str = "target"               # folder of the GPT-2
    data: str = ""                      # tinytales, X.bin or X.txt; empty: what the model was trained on
    device: str = "auto"                # auto, cpu, cuda, cuda:1, ...

def card(cfg):
    """Print what the target is, what it knows and what each of its MLPs is worth."""
    import data                         # here, because only the card needs text
    gpt = GPT.load(cfg.model, common.device(cfg.device))
    dev = data.load(cfg.data or gpt.meta.get("data", "tinytales"), "dev", gpt.vocab)
    idx_NT, fresh_NT, entropy = (f(gpt.cfg.n_positions) for f in (dev.rows, dev.fresh, dev.entropy))
    print(f"{cfg.model}: weights {gpt.hash}, {sum(p.numel() for p in gpt.parameters()):,} parameters, {gpt.cfg}")
    print(f"validation cross-entropy {cross_entropy(gpt, idx_NT, fresh_NT):.4f} nats on {fresh_NT.sum():,} tokens"
          + (f", derivation entropy {entropy:.4f}" if entropy else ""))
    for name, prompts in data.prompts().items() if gpt.vocab == data.VOCAB else ():
        print(f"prompts: {name:24} {accuracy(gpt, prompts):6.1%} of {len(prompts)} right")
    for layer, (mean, zero) in enumerate(ablation_costs(gpt, idx_NT, fresh_NT)):
        print(f"MLP of layer {layer}: mean-ablation costs {mean:.3f} nats, zero-ablation {zero:.3f}"
              + "  <- the default --layer" * (layer == default_layer(gpt)))
    eot = gpt.vocab.index(EOT) if EOT in gpt.vocab else 0
    for i in range(3):
        print("\n" + data.decode(generate(gpt, [eot], 250, eot, common.generator(i, "story")), gpt.vocab))

if __name__ == "__main__":
    card(common.cli(Config))
