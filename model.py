"""GPT-2, in Hugging Face's checkpoint layout, cut open at each MLP. Run it for a target's card.

    r_0 = wte[idx] + wpe[t]                 the residual stream begins
    r'  = r + Attn(LN_1 r)                  each block: attention,
    x   = LN_2 r'                           what the MLP reads,
    r   = r' + mlp(x)                       and what it adds
    logits = LN_f(r) W_U^T                  W_U = wte.weight, or a head of its own: lm_head.weight
    mlp(x) = act(x W_in + b_in) W_out + b_out           W_in (D, M) = mlp.c_fc.weight
                                                        W_out (M, D) = mlp.c_proj.weight

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Differs from
transformers' implementation: no dropout; logits agree to 1e-5, not bit for bit.

The seam. This is all that methods and evaluation ask of a target, so a target that is no GPT-2 can
be taken apart by the same files if it has:

    model(inputs, replace=None, linear=None)    predictions, with MLPs or matrices exchanged
    model.prefix(inputs, layer) -> x, r         up to one MLP: what it reads; what suffix needs
    model.mlp(layer) -> mlp                     mlp(x) -> y; its matrices mlp.c_fc, mlp.c_proj;
                                                mlp.act, the nonlinearity between them
    model.next_mlp(r, y, layer) -> x, r         from one MLP's output y to the MLP after it
    model.suffix(r, y, layer) -> logits         from one MLP's output y to the end
    model.predictions(logits)                   as probabilities, where they are scored
    model.distance(clean, other)                how far apart predictions are, at each position
    model.distance_from(r, y, layer)            d(y_hat): the same distance for training, cheap
    model.hidden, .unembedding                  suffix in two steps, for what is cheaper than logits
    model.device                                where its weights lie
    model.cfg.n_layer, .n_embd, .n_positions    number of MLPs, width of x and y, longest row

B sequences, T positions, D residual width, M MLP hidden width, H heads, K head width,
V vocabulary, N rows of text, S = T - 2 positions that are scored

    python model.py --model DIR     # any GPT-2 folder: config.json, model.safetensors and
                                    # vocab.json or tokenizer.json
"""
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import folders
import fused

EOT = "<|endoftext|>"       # starts each document
BATCH = 32                  # rows of text that go through the model at a time, of ..
ROW = 128                   # .. so many tokens; of longer rows fewer
COPIES = 8                  # of a batch's logits that evaluation holds at once, measured


def gelu(z):
    """Apply the usual nonlinearity, gelu_new: z Phi(z) with the normal distribution function Phi,
    in the tanh approximation (Hendrycks, Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(z, approximate="tanh")


NOT_IN_WEIGHTS = ("n_head", "layer_norm_epsilon", "activation_function")
# an MLP's nonlinearity by the name that config.json has for it; gelu is z Phi(z) itself
ACTIVATIONS = {"gelu_new": gelu, "gelu": F.gelu, "relu": F.relu}


@dataclass
class GPTConfig:                    # names as in Hugging Face's config.json
    vocab_size: int                 # V
    n_layer: int = 4
    n_embd: int = 128               # D
    n_head: int = 4                 # H
    n_inner: int = 512              # M
    n_positions: int = 128          # longest T
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True    # the head is wte
    activation_function: str = "gelu_new"   # one of ACTIVATIONS

    def __post_init__(self):
        if self.activation_function not in [*ACTIVATIONS]:
            common.fail(f"GPT-2 config: activation_function is "
                        f"{repr(self.activation_function)[:60]}, "
                        f"must be one of {', '.join(ACTIVATIONS)}")
        for f in fields(self):
            if f.type is str:
                continue
            value = getattr(self, f.name)
            highest = 1 if f.type is float else math.inf
            if type(value) is not f.type or not (f.type is bool or 0 < value < highest):
                wanted = {int: "a positive int", float: "a positive float below 1", bool: "a bool"}
                common.fail(f"GPT-2 config: {f.name} is {repr(value)[:60]}, "
                            f"must be {wanted[f.type]}")
        if self.n_embd % self.n_head:
            common.fail(f"GPT-2 config: n_embd {self.n_embd} is not a multiple of "
                        f"n_head {self.n_head}")


# --------------------------------------------------------------------------------- the model
class Conv1D(nn.Module):
    """x_..I -> x W_IO + b_O: a linear layer whose weight lies the other way round, as in GPT-2's
    checkpoints."""
    name = ""               # in the model's state dict: "h.1.attn.c_attn"; GPT fills it in

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x, linear=None):
        """x W + b, or what linear(name, x, self) puts in its place."""
        if linear is not None:
            return linear(self.name, x, self)
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Causal self-attention with H heads."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)        # queries, keys and values
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)

    def forward(self, x_BTD, linear=None):
        qkv = self.c_attn(x_BTD, linear).chunk(3, dim=-1)
        q, k, v = [part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in qkv]   # BHTK
        if x_BTD.is_cuda:
            z_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            z_BHTK = self.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        return self.c_proj(z_BHTK.transpose(1, 2).flatten(2), linear)

    def attend(self, q, k, v):
        """softmax(q k^T / sqrt(K)) v with all heads as rows of one batch: (B H, T, K) -> BHTK.

        On a CPU that is as fast as PyTorch's own, and it alone gains from common.fast_matmul."""
        T = q.shape[1]
        mask_TT = q.new_full((T, T), -torch.inf).triu(1)
        # mask + q k^T / sqrt(K)
        scores = torch.baddbmm(mask_TT, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ v).unflatten(0, (-1, self.n_head))


class MLP(nn.Module):
    """What this project takes apart: act(x W_in + b_in) W_out + b_out."""
    def __init__(self, cfg):
        super().__init__()
        self.act = ACTIVATIONS[cfg.activation_function]
        self.c_fc = Conv1D(cfg.n_embd, cfg.n_inner)
        self.c_proj = Conv1D(cfg.n_inner, cfg.n_embd)

    def forward(self, x_BTD, linear=None):
        h_BTM = self.act(self.c_fc(x_BTD, linear))
        return self.c_proj(h_BTM, linear)


class Block(nn.Module):
    """One layer: attention, then the MLP; both add to the residual stream."""
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)

    def to_mlp(self, r_BTD, linear=None):
        """The block up to its MLP: x_BTD, which the MLP reads, and r_BTD, which it adds to."""
        r_BTD = r_BTD + self.attn(self.ln_1(r_BTD), linear)
        return self.ln_2(r_BTD), r_BTD

    def forward(self, r_BTD, linear=None):
        x_BTD, r_BTD = self.to_mlp(r_BTD, linear)
        return r_BTD + self.mlp(x_BTD, linear)


class GPT(nn.Module):
    """Initialised as GPT-2, but matrices have std 1 / sqrt(D): GPT-2's 0.02 is too small for a
    narrow model."""
    def __init__(self, cfg: GPTConfig, generator=None):
        super().__init__()
        self.cfg = cfg
        # load() fills these in
        self.folder = None
        self.hash = None
        self.meta = {}
        self.vocab = [f"<{i}>" for i in range(cfg.vocab_size)]
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.n_positions, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, Conv1D):
                module.name = name
        self.initialise(generator)

    def initialise(self, generator):
        """Draw the matrices; biases stay 0 and the gains of LayerNorms 1."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            is_for_tokens = name in ("wte.weight", "wpe.weight", "lm_head.weight")
            std = 0.02 if is_for_tokens else self.cfg.n_embd ** -0.5
            # so that the stream's variance doesn't grow with depth: 2 L matrices write to it
            if name.endswith("c_proj.weight"):
                std *= (2 * self.cfg.n_layer) ** -0.5
            nn.init.normal_(p, std=std, generator=generator)

    # ---- the seam
    @property
    def device(self):
        return self.wte.weight.device

    @property
    def unembedding(self):
        """W_U (V, D), which turns the stream into logits."""
        return self.wte.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def mlp(self, layer: int):
        return self.h[layer].mlp

    def prefix(self, idx_BT, layer: int, linear=None):
        """Run the tokens up to one MLP: (x_BTD, r_BTD), its input after LayerNorm, and the stream
        that its output is added to."""
        T = idx_BT.shape[1]
        if T > self.cfg.n_positions:
            common.fail(f"{T} tokens in a row, but the model has {self.cfg.n_positions} positions")
        r_BTD = self.wte(idx_BT) + self.wpe.weight[:T]
        for block in self.h[:layer]:
            r_BTD = block(r_BTD, linear)
        return self.h[layer].to_mlp(r_BTD, linear)

    def next_mlp(self, r_BTD, y_BTD, layer: int, linear=None):
        """Run on from the output y of layer's MLP to the MLP after it: its (x_BTD, r_BTD)."""
        return self.h[layer + 1].to_mlp(r_BTD + y_BTD, linear)

    def hidden(self, r_BTD, y_BTD, layer: int):
        """Run on from one MLP's output y to LN_f(r)_BTD, which the unembedding reads."""
        r_BTD = r_BTD + y_BTD
        for block in self.h[layer + 1:]:
            r_BTD = block(r_BTD)
        return self.ln_f(r_BTD)

    def suffix(self, r_BTD, y_BTD, layer: int):
        """Run on from one MLP's output y to the end: logits_BTV.

        Bit for bit, suffix(r, mlp(layer)(x), layer) is forward(idx)."""
        return F.linear(self.hidden(r_BTD, y_BTD, layer), self.unembedding)

    def predictions(self, logits_BTV):
        """Log-probabilities at the scored positions, 1 to T - 2, after which the row goes on:
        (B, S, V)."""
        return F.log_softmax(logits_BTV[:, 1:-1].float(), -1)

    def distance(self, clean_BSV, other_BSV):
        """How far did the predictions move? KL(clean || other) in nats at each position, (B, S),
        of two `predictions`. 0 = not at all."""
        return (clean_BSV.exp() * (clean_BSV - other_BSV)).sum(-1)

    def distance_from(self, r_BTD, y_BTD, layer: int):
        """`distance` from what follows on one MLP's output y, for training: see Distance."""
        return Distance(self, r_BTD, y_BTD, layer)

    def forward(self, idx_BT, replace=None, linear=None):
        """Predict each next token: logits_BTV.

        replace(layer, x_BTD, mlp) -> y_BTD, if given, stands in for every MLP, in layer order.
        linear(name, x, module) -> y, if given, stands in for every weight matrix as the model
        comes to it: h.0.attn.c_attn, h.0.attn.c_proj, h.0.mlp.c_fc, h.0.mlp.c_proj, h.1.attn.. .
        It gets module(x) = x module.weight + module.bias, the plain one. With both, MLPs are
        replace's alone and linear gets the attention's matrices."""
        x_BTD, r_BTD = self.prefix(idx_BT, 0, linear)
        last = self.cfg.n_layer - 1
        for layer in range(self.cfg.n_layer):
            mlp = self.mlp(layer)
            y_BTD = replace(layer, x_BTD, mlp) if replace else mlp(x_BTD, linear)
            if layer < last:
                x_BTD, r_BTD = self.next_mlp(r_BTD, y_BTD, layer, linear)
        return self.suffix(r_BTD, y_BTD, last)

    # ---- folders
    @classmethod
    def load(cls, folder, device="cpu"):
        """Read a frozen GPT-2 from a Hugging Face folder: `vocab` lists its token strings, `hash`
        identifies its weights.

        Fails if a file is missing or damaged, or if config, weights and vocabulary do not fit
        together."""
        folder = Path(folder)
        conf = folders.read_config(folder)
        paths, file_of = folders.weight_files(folder)
        tensors = folders.usual_layout(folders.read_weights(paths, file_of))
        conf["tie_word_embeddings"] = folders.tie(paths[0], conf, tensors)
        cfg = GPTConfig(**{f.name: conf.get(f.name) for f in fields(GPTConfig)})
        folders.check_sizes(paths[0], cfg, tensors)
        # an empty model takes no memory and draws no random numbers: its weights are in the file
        with torch.device("meta"):
            gpt = cls(cfg)
        folders.check_shapes(paths[0], tensors, gpt.state_dict())
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        gpt.load_state_dict(on_device, assign=True)
        gpt.folder = folder
        gpt.meta = conf["nanodecomp"]
        # what the weights don't tell, where it is not as in the bundled target
        more = {name: getattr(cfg, name) for name in NOT_IN_WEIGHTS
                if getattr(cfg, name) != getattr(GPTConfig, name)}
        gpt.hash = folders.hash_files(paths, more)
        gpt.vocab = folders.read_vocab(folder, gpt.vocab)
        folders.mark_documents(gpt.vocab, conf.get("eos_token_id"), EOT)
        return gpt.eval().requires_grad_(False)

    def save(self, folder, vocab: list[str], meta: dict):
        """Write a folder for `load` and for transformers.GPT2LMHeadModel.from_pretrained, which
        ignores `meta`."""
        folder = Path(folder)
        eot = vocab.index(EOT) if EOT in vocab else None
        conf = dict(architectures=["GPT2LMHeadModel"], **folders.NEEDED, **asdict(self.cfg),
                    bos_token_id=eot, eos_token_id=eot, torch_dtype="float32", nanodecomp=meta)
        ids = {token: i for i, token in enumerate(vocab)}
        tensors = {f"transformer.{name}".replace("transformer.lm_head", "lm_head"): tensor
                   for name, tensor in self.state_dict().items()}
        tensors = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
        weights = common.safetensors.save(tensors, {"format": "pt"})
        common.write(folder / "vocab.json", json.dumps(ids, indent=1).encode())
        common.write(folder / "config.json", json.dumps(conf, indent=1).encode())
        common.write(folder / "model.safetensors", weights)


class Distance:
    """How far do the predictions move when y_hat stands in for one MLP's output y?

        kl = gpt.distance_from(r_BTD, y_BTD, layer)
        kl(y_hat_BTD)               (B, T): KL(clean || spliced) in nats, with gradients

    GPT.distance at every position, computed without storing logits. y_hat may stack n stand-ins,
    (n B, T, D): they share one pass, and (n B, T) comes back."""
    @torch.no_grad()
    def __init__(self, gpt, r_BTD, y_BTD, layer):
        self.gpt = gpt
        self.r_BTD = r_BTD
        self.layer = layer
        final_BTD = gpt.hidden(r_BTD, y_BTD, layer)
        self.clean = final_BTD, *fused.log_partition(final_BTD, gpt.unembedding)

    def __call__(self, y_hat):
        n = len(y_hat) // len(self.r_BTD)
        final = self.gpt.hidden(self.r_BTD.repeat(n, 1, 1), y_hat, self.layer)
        final = final.unflatten(0, (n, -1))
        # sum_v p_v (log p_v - log q_v), p = softmax(clean W_U^T), q = softmax(final W_U^T)
        return fused.kl_unembed(self.clean, final, self.gpt.unembedding).flatten(0, 1)


@dataclass
class Constant:
    """One vector in the place of one MLP's output, as GPT.forward takes it."""
    layer: int
    y_D: torch.Tensor

    def __call__(self, layer, x_BTD, mlp):
        return self.y_D.expand_as(x_BTD) if layer == self.layer else mlp(x_BTD)


# --------------------------------------------------------------------- what a target can do
def split_rows(rows_RT, n=BATCH, usual=ROW):
    """Split rows into batches that take no more memory where rows are long: n rows of up to
    `usual` tokens, of longer ones fewer, at least one. A batch's logits take n usual V floats or
    less, or T V where one row takes more: GPT-2's 0.4 GB for n = 16."""
    T = rows_RT.shape[1]
    return rows_RT.split(max(1, n * min(usual, T) // T))


def check_rows(gpt, T, n=16):
    """Fail if there is less memory than evaluation takes: a batch of `split_rows`, of whose logits
    COPIES are there at once where the KL of two predictions is taken."""
    tokens = max(T, n * ROW)
    common.need(4 * COPIES * tokens * gpt.cfg.vocab_size,
                f"rows of {T} tokens, {gpt.cfg.vocab_size:,} words", gpt.device)


@torch.no_grad()
def cross_entropy(gpt, idx_NT, fresh_NT=None, replace=None) -> float:
    """How well does the model predict text? Mean cross-entropy of the next token, in nats.

    It counts each row's tokens but the first, or those that are marked in fresh_NT."""
    idx_NT = idx_NT.to(gpt.device)
    # -100: not counted
    target_NT = idx_NT if fresh_NT is None else idx_NT.masked_fill(~fresh_NT.to(gpt.device), -100)
    target_NT = target_NT[:, 1:]
    loss = 0
    for idx_BT, target_BT in zip(split_rows(idx_NT), split_rows(target_NT)):
        logits = gpt(idx_BT, replace)[:, :-1].flatten(0, 1)
        loss = loss + F.cross_entropy(logits, target_BT.flatten(), reduction="sum")
    return loss.item() / (target_NT >= 0).sum().item()


@torch.no_grad()
def ablation_costs(gpt, idx_NT, fresh_NT=None) -> list[list[float]]:
    """What is each MLP worth? Per layer, what the cross-entropy gains when the MLP's output is
    replaced by its mean over the rows, and by zero."""
    idx_NT = idx_NT.to(gpt.device)
    clean = cross_entropy(gpt, idx_NT, fresh_NT)
    costs = []
    for layer in range(gpt.cfg.n_layer):
        total_D = 0
        for idx_BT in split_rows(idx_NT):
            x_BTD, _ = gpt.prefix(idx_BT, layer)
            total_D = total_D + gpt.mlp(layer)(x_BTD).sum((0, 1))
        mean_D = total_D / idx_NT.numel()
        costs.append([cross_entropy(gpt, idx_NT, fresh_NT, Constant(layer, value_D)) - clean
                      for value_D in (mean_D, 0 * mean_D)])
    return costs


def default_layer(gpt) -> int:
    """Which layer is to be decomposed? The one that pretrain.py chose, or the middle one of
    somebody else's model."""
    return gpt.meta.get("layer", gpt.cfg.n_layer // 2)


@torch.no_grad()
def accuracy(gpt, prompts) -> float:
    """On what share of data.Prompts does the best right token get a higher logit than the best
    wrong one?"""
    wins = 0
    for prompt in prompts:
        logits_V = gpt(torch.tensor([prompt.ids], device=gpt.device))[0, -1]
        wins += (logits_V[prompt.right].max() > logits_V[prompt.wrong].max()).item()
    return wins / len(prompts)


@torch.no_grad()
def generate(gpt, ids: list[int], n: int, stop: int, generator) -> list[int]:
    """Draw up to n tokens from the model after `ids`, one by one. The token `stop` is the last, if
    it is drawn."""
    new = []
    while len(new) < n and new[-1:] != [stop]:
        recent = (ids + new)[-gpt.cfg.n_positions:]
        p_V = gpt(torch.tensor([recent], device=gpt.device))[0, -1].softmax(-1)
        new += torch.multinomial(p_V.cpu(), 1, generator=generator).tolist()
    return new


@dataclass
class Config:
    model: str = "target"       # folder of the GPT-2
    data: str = ""              # tinytales, X.bin or X.txt; empty: what the model was trained on
    device: str = "auto"        # auto, cpu, cuda, cuda:1, ...


def card(cfg):
    """Print what the target is, what it knows and what each of its MLPs is worth."""
    import data                 # here, because only the card needs text
    gpt = GPT.load(cfg.model, common.device(cfg.device))
    T = gpt.cfg.n_positions
    text = cfg.data or gpt.meta.get("data", "tinytales")
    dev = data.load_for(gpt, text, T, ["dev"])["dev"]
    idx_NT = dev.rows(T)
    fresh_NT = dev.fresh(T)
    entropy = dev.entropy(T)

    # what it is, and how well it predicts
    size = sum(p.numel() for p in gpt.parameters())
    print(f"{cfg.model}: weights {gpt.hash}, {size:,} parameters, {gpt.cfg}")
    bound = f", derivation entropy {entropy:.4f}" if entropy else ""
    print(f"validation cross-entropy {cross_entropy(gpt, idx_NT, fresh_NT):.4f} nats "
          f"on {fresh_NT.sum():,} tokens{bound}")

    # what it knows
    if gpt.vocab == data.VOCAB:
        for name, prompts in data.prompts().items():
            print(f"prompts: {name:24} {accuracy(gpt, prompts):6.1%} of {len(prompts)} right")

    # what its MLPs are worth
    for layer, (mean, zero) in enumerate(ablation_costs(gpt, idx_NT, fresh_NT)):
        mark = "  <- the default --layer" if layer == default_layer(gpt) else ""
        print(f"MLP of layer {layer}: mean-ablation costs {mean:.3f} nats, "
              f"zero-ablation {zero:.3f}{mark}")

    # what it writes
    eot = gpt.vocab.index(EOT) if EOT in gpt.vocab else 0
    for i in range(3):
        story = generate(gpt, [eot], 250, eot, common.generator(i, "story"))
        lines = data.decode(story, gpt.vocab).split("\n")
        print("", *map(data.printable, lines), sep="\n")


if __name__ == "__main__":
    card(common.cli(Config))
