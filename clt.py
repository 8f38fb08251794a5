"""CLT, cross-layer transcoder: features read at one MLP's input and written to the outputs of that MLP and all after it.
    z^l = W_enc^l x^l + b_enc^l,   f^l = z^l 1[z^l > theta^l]                        x, y of layer l: what its MLP
    y_hat^l = sum_{l' <= l} W_dec^{l'->l} f^l' + b_dec^l                             reads after LayerNorm, and writes
    |W_i^l| = sqrt(sum_{l' >= l} |W_dec,i^{l->l'}|^2)                                all that feature i of layer l writes
    jumprelu:   loss = sum_l NMSE(y_hat^l, y^l) + lambda_s sum_{l, i} tanh(c |W_i^l| f_i^l)
                     + lambda_p sum_{l, dead i} relu(theta_i^l - z_i^l) |W_i^l|
    batchtopk:  per layer and batch of N tokens the k N largest |W_i^l| relu(z_i^l) are on; for inference theta_i^l =
                tau^l / |W_i^l|, tau^l the running mean of the smallest of them;  loss = sum_l NMSE(y_hat^l, y^l)
                     + c_aux sum_l NMSE(what the k_aux best dead features write, y^l - y_hat^l)
  Ameisen et al. 2025, "Circuit Tracing" (methods); JumpReLU's pseudo-gradient: Rajamanoharan et al. 2024
  (arXiv:2407.14435); BatchTopK: Bussmann et al. 2024 (arXiv:2412.06410), norms in its order: Minder et al. 2025
  (arXiv:2504.02922); features for the error: Gao et al. 2024 (arXiv:2406.04093).
Differs from the papers: lambda_p concerns dead features only. No KL objective: one suffix serves one layer of several.
N tokens, L layers, D residual width, F features of a layer; those that write into layer l count (l + 1) F

    python clt.py
"""
import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

import activations
import common
import data
import evals
from model import GPT, default_layer

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # MLP the figures are about; -1: the target's config.json names it, or the middle one
    replace: Literal["this", "all"] = "this"  # MLPs it stands in for: --layer's, or all of them at once
    out: str = "runs/clt"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # instead of one run, five: k or lambda_s times 1/4 to 4; sweep.json and sweep.png
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation and the batches
    variant: Literal["jumprelu", "batchtopk"] = "batchtopk"  # what makes the features sparse
    F: int = 512                    # features per layer: 8 D of them write into layer 1 of the bundled target
    off_diagonal: bool = True       # off: per-layer transcoders, with as many parameters at F times (L + 3) / 4
    k: int = 16                     # batchtopk: features on per token and layer, averaged over the batch
    tau_rate: float = 0.01          # batchtopk: weight of the newest batch in tau's running mean
    k_aux: int = 64                 # batchtopk: dead features that may explain a token's error
    c_aux: float = 1 / 32           # batchtopk: weight of that explanation
    lambda_s: float = 1e-3          # jumprelu: sparsity: THE knob
    ramp: float = 1.0               # jumprelu: share of the steps over which lambda_s grows from 0
    c: float = 4.0                  # jumprelu: steepness of the tanh
    lambda_p: float = 1e-4          # jumprelu: pull of the dead features towards their thresholds
    theta: float = 0.03             # jumprelu: first thresholds
    bw: float = 1.0                 # jumprelu: width of the window around theta whose z give theta a gradient
    dead_after: float = 0.05        # share of all training tokens without firing after which a feature is dead
    steps: int = 4000               # training steps
    N: int = 1024                   # tokens per step
    T: int = 128                    # positions per sequence
    lr: float = 2e-3                # Adam's learning rate, falling to 0 over the last fifth
    warmup: float = 0.025           # share of the steps over which it grows from 0
    clip: float = 1.0               # gradient norm
    log_every: int = 50             # steps between lines of log.jsonl
    eval_every: int = 1000          # steps between small evaluations, which never change the training; 0: none
    save_every: int = 1000          # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses

FREE = {"model", "layer", "replace", "out", "resume", "sweep", "device", "log_every", "eval_every", "save_every",
        "eval_tokens"}

class JumpReLU(torch.autograd.Function):
    """z 1[z > theta]. Where the jump is, no slope says so: theta gets that of the mean over z, as a rectangle of width
    bw around theta estimates it. The window is on z, so that features which just stay off count."""
    @staticmethod
    def forward(ctx, z_LNF, theta_LF, bw):
        ctx.save_for_backward(z_LNF, theta_LF)
        ctx.bw = bw
        return z_LNF * (z_LNF > theta_LF.unsqueeze(1))

    @staticmethod
    def backward(ctx, df_LNF):
        z_LNF, theta_LF = ctx.saved_tensors
        over_LNF = z_LNF - theta_LF.unsqueeze(1)
        near_LF = (df_LNF * (over_LNF.abs() <= ctx.bw / 2)).sum(1)
        return df_LNF * (over_LNF > 0), -theta_LF / ctx.bw * near_LF, None

class CLT(nn.Module):
    """W_dec[l] (l + 1, F, D): what the features of layers 0 to l write at l. layers: the MLPs that it stands in for."""
    def __init__(self, L, D, cfg, gen, layers):
        super().__init__()
        uniform = lambda bound, *shape: nn.Parameter((2 * torch.rand(shape, generator=gen) - 1) * bound)
        self.layers, self.off_diagonal, self.seen = layers, cfg.off_diagonal, []
        self.W_enc_LDF = uniform(cfg.F**-0.5, L, D, cfg.F)
        self.b_enc_LF = nn.Parameter(torch.zeros(L, cfg.F))
        self.theta_LF = nn.Parameter(torch.full((L, cfg.F), cfg.theta))
        self.W_dec = nn.ParameterList(uniform((L * D)**-0.5, len(self.writers(l)), cfg.F, D) for l in range(L))
        self.b_dec_LD = nn.Parameter(torch.zeros(L, D))
        self.register_buffer("tau_L", torch.zeros(L))               # batchtopk: running threshold
        self.register_buffer("idle_LF", torch.zeros(L, cfg.F))      # tokens since a feature was on

    def writers(self, l):
        """Layers whose features write at layer l."""
        return range(l + 1) if self.off_diagonal else [l]

    def preactivations(self, x_LND):
        return torch.baddbmm(self.b_enc_LF.unsqueeze(1), x_LND, self.W_enc_LDF)

    def write(self, f_LNF):
        """y_hat_LND, by one product per layer."""
        return torch.stack([torch.addmm(b_D, torch.cat([f_LNF[i] for i in self.writers(l)], 1), W.flatten(0, 1))
                            for l, (W, b_D) in enumerate(zip(self.W_dec, self.b_dec_LD))])

    def norms(self):
        """|W_i^l|, (L, F)."""
        square = [dict(zip(self.writers(l), W.square().sum(-1))) for l, W in enumerate(self.W_dec)]
        return torch.stack([sum(s_F[l] for s_F in square if l in s_F) for l in range(len(square))]).add(1e-12).sqrt()

    def standing_in(self, layers):
        """The same CLT for other MLPs."""
        other = copy.copy(self)
        other.layers = layers
        return other

    # The seam (evals.py). Units at layer l: the features of its writers in order, F each.
    @property
    def reads(self):
        return sorted({i for l in self.layers for i in self.writers(l)})

    @property
    def params_F(self):
        """A unit's encoder, and its decoders into the replaced MLPs."""
        F, D = self.W_dec[0].shape[1:]
        return torch.cat([torch.full((F,), D * (1 + sum(i in self.writers(l) for l in self.layers)))
                          for i in self.writers(self.layers[-1])])

    def encode(self, layer, x_BTD, mlp):
        """Keeps the features of the layers before, which the model calls first."""
        z_BTF = x_BTD @ self.W_enc_LDF[layer] + self.b_enc_LF[layer]
        self.seen = self.seen[:layer] + [None] * (layer - len(self.seen)) + [z_BTF * (z_BTF > self.theta_LF[layer])]
        return torch.cat([self.seen[i] for i in self.writers(layer)], -1)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W_dec[layer].flatten(0, 1) + self.b_dec_LD[layer]

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[layer].flatten(0, 1)[units]

class Scale(nn.Module):
    """Training sees (x - mean_x) / s_x and (y - mean_y) / s_y, one s per layer such that E |.|^2 = D. `fold` gives the
    CLT that does the same to raw activations."""
    def __init__(self, x_LND, y_LND):
        super().__init__()
        for name, a_LND in (("x", x_LND), ("y", y_LND)):
            self.register_buffer(f"mean_{name}", a_LND.mean(1, keepdim=True))
            self.register_buffer(f"s_{name}", a_LND.sub(a_LND.mean(1, keepdim=True)).square().mean((1, 2), True).sqrt())

    def forward(self, x_LND, y_LND):
        return (x_LND - self.mean_x) / self.s_x, (y_LND - self.mean_y) / self.s_y

    @torch.no_grad()
    def fold(self, clt, variant):
        raw = copy.deepcopy(clt)
        if variant == "batchtopk":
            raw.theta_LF.copy_(clt.tau_L.unsqueeze(1) / clt.norms())
        raw.W_enc_LDF.div_(self.s_x)
        raw.b_enc_LF.sub_((self.mean_x @ raw.W_enc_LDF).squeeze(1))
        raw.b_dec_LD.mul_(self.s_y.squeeze(1)).add_(self.mean_y.squeeze(1))
        for W, s in zip(raw.W_dec, self.s_y):
            W.mul_(s)
        return raw

def loss_fn(clt, x_LND, y_LND, cfg, t):
    """(total, its terms, f_LNF, least_L) on one batch; t in [0, 1]: share of training done; least: see batchtopk."""
    z_LNF, norm_LF = clt.preactivations(x_LND), clt.norms()
    dead_LF, least_L, terms = clt.idle_LF > cfg.dead_after * cfg.steps * cfg.N, None, {}
    if cfg.variant == "jumprelu":
        f_LNF = JumpReLU.apply(z_LNF, clt.theta_LF, cfg.bw)
        terms["sparsity"] = torch.tanh(cfg.c * norm_LF.unsqueeze(1) * f_LNF).sum((0, 2)).mean()
        terms["dead_pull"] = ((clt.theta_LF.unsqueeze(1) - z_LNF).relu().mean(1) * norm_LF * dead_LF).sum()
        weight = dict(sparsity=cfg.lambda_s * min(1, t / cfg.ramp), dead_pull=cfg.lambda_p)
    else:
        f_LNF, least_L = batchtopk(z_LNF, norm_LF, cfg.k)
        weight = dict(aux=cfg.c_aux)
    e_LND = y_LND - clt.write(f_LNF)
    nmse_L = e_LND.square().mean((1, 2)) / y_LND.square().mean((1, 2))
    if cfg.variant == "batchtopk":
        terms["aux"] = auxiliary(clt, z_LNF, dead_LF, e_LND.detach(), cfg.k_aux)
    total = nmse_L.sum() + sum(weight[name] * term for name, term in terms.items())
    return total, dict(loss=total, nmse=nmse_L.mean(), **terms, dead=dead_LF.float().mean()), f_LNF, least_L

def batchtopk(z_LNF, norm_LF, k):
    """(f_LNF, least_L): the k N features per layer that write most are on; the least that an on one writes."""
    with torch.no_grad():
        size_LNF = z_LNF.relu() * norm_LF.unsqueeze(1)
        least_L = size_LNF.flatten(1).topk(k * z_LNF.shape[1], sorted=False).values.amin(1)
        on_LNF = (size_LNF >= least_L[:, None, None]) & (size_LNF > 0)
    return z_LNF * on_LNF, least_L

def auxiliary(clt, z_LNF, dead_LF, e_LND, k_aux):
    """How badly each token's k_aux best dead features write the error e: what brings them back."""
    if not dead_LF.any():
        return e_LND.new_zeros(())
    z_LNF = z_LNF.relu() * dead_LF.unsqueeze(1)
    least_LN1 = z_LNF.detach().topk(min(k_aux, z_LNF.shape[-1]), -1).values[..., -1:]
    e_hat_LND = clt.write(z_LNF * (z_LNF >= least_LN1)) - clt.b_dec_LD.unsqueeze(1)
    return ((e_hat_LND - e_LND).square().mean((1, 2)) / e_LND.var(1).mean(1)).sum()

@torch.no_grad()
def update(clt, opt, loss, f_LNF, least_L, cfg, t):
    """One step of the optimizer and of what else evolves. Returns the gradient's norm."""
    opt.param_groups[0]["lr"] = cfg.lr * min(1, (t + 1 / cfg.steps) / cfg.warmup, (1 - t) / 0.2)
    opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(clt.parameters(), cfg.clip)
    opt.step()
    clt.theta_LF.clamp_(min=0)
    clt.idle_LF.add_(f_LNF.shape[1]).masked_fill_((f_LNF > 0).any(1), 0)
    if least_L is not None:
        clt.tau_L.copy_(torch.where(clt.tau_L > 0, clt.tau_L.lerp(least_L, cfg.tau_rate), least_L))
    return norm

def build(cfg, gpt):
    """A fresh CLT of the target's MLPs, after checking cfg against it."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    limits = dict(layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions), eval_tokens=(cfg.T, math.inf),
                  N=(1, activations.ROWS * (cfg.T - 1)), k=(1, cfg.F))
    for name in ("F", "k_aux", "steps", "log_every", "save_every", *limits):
        low, high = limits.get(name, (1, math.inf))
        if not low <= (value := layer if name == "layer" else getattr(cfg, name)) <= high:
            common.fail(f"--{name} {value}: must be from {low} to {high}")
    every = list(range(gpt.cfg.n_layer))
    return CLT(len(every), gpt.cfg.n_embd, cfg, common.generator(cfg.seed, "init"),
               [layer] if cfg.replace == "this" else every).to(gpt.wte.weight.device), layer

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    clt, layer = build(cfg, gpt)
    corpus = {split: data.load(cfg.data, split, gpt.vocab) for split in ("train", "fit", "test")}
    some, every = corpus["fit"].rows(cfg.T)[:64].to(dev), list(range(gpt.cfg.n_layer))
    scale = Scale(*activations.at_mlps(gpt, some, every))
    opt = torch.optim.Adam(clt.parameters(), cfg.lr, fused=True)
    path, start, seconds = Path(cfg.out) / "clt.safetensors", 0, 0.0
    fixed = dict(method="clt", target=gpt.hash, run={k: v for k, v in vars(cfg).items() if k not in FREE})
    parts = dict(train=clt, scale=scale, opt=opt)
    if cfg.resume:
        tensors, meta = common.load(path, **fixed)
        common.unflat(tensors, **parts)
        start, seconds = meta["step"], meta["seconds"]
    log, began = common.Log(Path(cfg.out) / "log.jsonl", start), time.time() - seconds
    batches = activations.batches(gpt, corpus["train"], every, cfg.T, cfg.N, cfg.seed, start)
    for step in (bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="clt")):
        t, last = step / cfg.steps, step + 1 == cfg.steps
        loss, terms, f_LNF, least_L = loss_fn(clt, *scale(*next(batches)), cfg, t)
        norm = update(clt, opt, loss, f_LNF, least_L, cfg, t)
        save = last or (step + 1) % cfg.save_every == 0
        if save or step % cfg.log_every == 0:
            terms |= {"l0": (f_LNF > 0).sum((0, 2)).float().mean() / len(every)}
            row = {k: v.item() for k, v in terms.items()}
            common.finite(row["loss"] + norm.item(), step, path)
            log(step=step, **row, norm=norm.item())
            bar.set_postfix({k: f"{v:.2g}" for k, v in row.items()})
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            found = evals.scores(gpt, some[:8], {"spliced": evals.splice(scale.fold(clt, cfg.variant))})
            log(step=step, kl=found["spliced"]["kl"], ce=found["spliced"]["ce"])
        if save:
            seconds = time.time() - began
            meta = dict(step=step + 1, seconds=seconds, **common.provenance(cfg, gpt))
            common.save(path, common.flat(clt=scale.fold(clt, cfg.variant), **parts), fixed | meta)
    clt = scale.fold(clt, cfg.variant)
    return clt, summarise(cfg, gpt, clt, corpus, layer, seconds)

def summarise(cfg, gpt, clt, corpus, layer, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    dev, R, every = gpt.wte.weight.device, cfg.eval_tokens // cfg.T, list(range(gpt.cfg.n_layer))
    fit, test = ((corpus[s].rows(cfg.T)[:R].to(dev), corpus[s].labels(cfg.T)[:R]) for s in ("fit", "test"))
    each = [clt.standing_in([l]) for l in every]
    lines, out = evals.replacement(each[layer], gpt, layer, fit, test, corpus["test"].names, "features")
    used = [evals.usage(m, gpt, l, test[0]) for l, m in enumerate(each)]
    means = [evals.mean_output(gpt, l, fit[0]) for l in every]
    table = evals.scores(gpt, test[0], {"mean ablation": lambda l, x_BTD, mlp: means[l].expand_as(x_BTD),
                                        "replaced": evals.splice(clt.standing_in(every))})
    out |= dict(fve_layers=[u["fve"] for u in used], l0_layers=[u["l0"] for u in used],
                ce_recovered_all=evals.recovered(table, "replaced"), kl_all=table["replaced"]["kl"], seconds=seconds)
    print(json.dumps({k: v for k, v in out.items() if not isinstance(v, list) or len(v) < 9}, indent=1), *lines[:8], sep="\n")
    return out

if __name__ == "__main__":
    train(common.cli(Config))
