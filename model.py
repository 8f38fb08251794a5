"""GPT-2 (Radford et al. 2019) in Hugging Face's checkpoint layout, with a seam at each MLP; run it for the target's card.

    r_0 = wte[idx] + wpe[t];  r' = r + Attn(LN_1 r);  x = LN_2 r';  r_next = r' + mlp(x);  logits = LN_f(r_last) wte^T
    mlp(x) = gelu_new(x W_in + b_in) W_out + b_out       W_in (D, M) = mlp.c_fc.weight, W_out (M, D) = mlp.c_proj.weight
Differs from transformers: no dropout, and torch's fused attention (logits agree to 1e-5, not bit for bit).
B sequences, T positions, D residual width, M MLP hidden width, H heads, K head width, V vocabulary

    python model.py --model DIR         # any GPT-2 folder: config.json, model.safetensors, vocab.json
"""
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import nn

import common
import fused

EOT = "<|endoftext|>"                   # starts each document
FIXED = dict(model_type="gpt2", activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True,
             scale_attn_by_inverse_layer_idx=False)          # what a config.json must say, or leave out, to be GPT-2

@dataclass
class GPTConfig:
    """Names as in Hugging Face's config.json; the defaults are the bundled target's."""
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
        return fused.linear(x, self.weight, self.bias)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)

    def forward(self, x_BTD):
        qkv_BTHK = (z.unflatten(-1, (self.n_head, -1)) for z in self.c_attn(x_BTD).chunk(3, dim=-1))
        z_BHTK = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in qkv_BTHK), is_causal=True)
        return self.c_proj(z_BHTK.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, cfg.n_inner)
        self.c_proj = Conv1D(cfg.n_inner, cfg.n_embd)

    def forward(self, x_BTD):
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)

    def to_mlp(self, r_BTD):
        """(x_BTD, r_BTD): what the MLP reads, and the residual stream that its output is added to."""
        r_BTD = r_BTD + self.attn(self.ln_1(r_BTD))
        return self.ln_2(r_BTD), r_BTD

    def forward(self, r_BTD):
        x_BTD, r_BTD = self.to_mlp(r_BTD)
        return r_BTD + self.mlp(x_BTD)

class GPT(nn.Module):
    """Initialised as GPT-2: weights N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0."""
    def __init__(self, cfg: GPTConfig, generator=None):
        super().__init__()
        self.cfg, self.vocab = cfg, [f"<{i}>" for i in range(cfg.vocab_size)]       # until a vocab.json says otherwise
        self.folder, self.hash, self.meta = None, None, {}
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.n_positions, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = (2 * cfg.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 * scale, generator=generator)

    def prefix(self, idx_BT, layer: int):
        """Tokens -> (x_BTD, r_BTD) at one MLP: its input after LayerNorm, and the stream its output is added to."""
        if idx_BT.shape[1] > self.cfg.n_positions:
            common.fail(f"{idx_BT.shape[1]} tokens in a row, but the model has {self.cfg.n_positions} positions")
        r_BTD = self.wte(idx_BT) + self.wpe.weight[:idx_BT.shape[1]]
        for block in self.h[:layer]:
            r_BTD = block(r_BTD)
        return self.h[layer].to_mlp(r_BTD)

    def hidden(self, r_BTD, y_BTD, layer: int):
        """From one MLP's output y to what the unembedding reads, LN_f(r_last)_BTD."""
        r_BTD = r_BTD + y_BTD
        for block in self.h[layer + 1:]:
            r_BTD = block(r_BTD)
        return self.ln_f(r_BTD)

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
        for k, v in FIXED.items():
            if conf.get(k, v) != v:
                common.fail(f"{folder / 'config.json'}: {k} is {conf[k]!r}, only GPT-2's {v!r} is supported")
        conf["n_inner"] = conf["n_inner"] or 4 * (conf.get("n_embd") or 0)      # Hugging Face writes null for 4 D
        with torch.device("meta"):              # no memory, no random numbers: the weights come from the file
            gpt = cls(GPTConfig(**{f.name: conf.get(f.name) for f in fields(GPTConfig)}))

        path = folder / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in common.load(path)[0].items()
                   if not k.endswith((".attn.bias", ".attn.masked_bias"))}      # causal masks in old checkpoints
        head = tensors.pop("lm_head.weight", None)
        have, want = ({k: tuple(v.shape) for k, v in d.items()} for d in (tensors, gpt.state_dict()))
        if bad := [k for k in want | have if have.get(k) != want.get(k)]:
            common.fail(f"{path}: {bad[0]} has shape {have.get(bad[0])}, config.json wants {want.get(bad[0])}")
        if head is not None and not torch.equal(head, tensors["wte.weight"]):
            common.fail(f"{path}: lm_head.weight differs from wte.weight, GPT-2 ties them")
        gpt.load_state_dict({k: v.to(device, torch.float32, copy=True) for k, v in tensors.items()}, assign=True)
        gpt.folder, gpt.hash = folder, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        gpt.meta = conf.get("nanodecomp", {})

        ids = read_json(folder / "vocab.json") if (folder / "vocab.json").exists() else {}
        if [i for i in ids.values() if i not in range(gpt.cfg.vocab_size)] or len(set(ids.values())) < len(ids):
            common.fail(f"{folder / 'vocab.json'}: ids must be distinct and from 0 to {gpt.cfg.vocab_size - 1}")
        for token, i in ids.items():
            gpt.vocab[i] = token
        return gpt.eval().requires_grad_(False)

    def save(self, folder, vocab: list[str], meta: dict):
        """A folder for `load` and for transformers.GPT2LMHeadModel.from_pretrained, which ignores `meta`."""
        eot = vocab.index(EOT) if EOT in vocab else None
        conf = dict(architectures=["GPT2LMHeadModel"], **FIXED, **asdict(self.cfg), bos_token_id=eot, eos_token_id=eot,
                    torch_dtype="float32", nanodecomp=meta)
        tensors = {f"transformer.{k}": v.detach().float().cpu() for k, v in self.state_dict().items()}
        common.write(Path(folder) / "vocab.json", json.dumps({w: i for i, w in enumerate(vocab)}, indent=0).encode())
        common.write(Path(folder) / "config.json", json.dumps(conf, indent=2).encode())
        common.write(Path(folder) / "model.safetensors", to_bytes(tensors, {"format": "pt"}))

def read_json(path) -> dict:
    """A JSON object from a file; fails if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        common.fail(f"{path}: {'not a JSON object' if path.exists() else 'no such file'} ({e})")
