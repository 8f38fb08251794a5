"""SAE, sparse autoencoder: activations a at one MLP as a sparse sum of F directions, in five variants.
    pre = W_enc (a - b_dec) + b_enc        a_hat = f W_dec + b_dec        rows of W_dec have norm 1, E|a| = sqrt(D)
    topk        f = the k largest of relu(pre) of each token                         (Gao et al. 2024, arXiv:2406.04093)
    batchtopk   f = the k N largest of the batch; later: relu(pre) above a threshold (Bussmann et al. 2024, 2412.06410)
    jumprelu    f = pre 1[pre > theta],  penalty (L0 / k - 1)^2, L0 = E sum_f 1[pre > theta]  (Rajamanoharan 2407.14435)
    relu        f = relu(pre),           penalty E sum_f f                           (Bricken et al. 2023)
    stochastic  f = relu(pre) m, m = g + (1 - g) r, r ~ U(0, 1), g = clamp(W_gate (a - b_dec) + b_gate, 0, 1); later:
                f = relu(pre) g 1[g > tau]; penalty sum_f s_f (1 + w_freq log2(1 + freq_a s_f)), s_f = E phi(g_f),
                phi(g) = g^2 / (g^2 + gamma^2): SPD's masks and penalty (spd.py) on an SAE; --no-noise has r = 0
    loss = NMSE + c_aux AuxK + lambda penalty,  NMSE = E|a - a_hat|^2 / E|a - E a|^2     (--objective kl: KL of the logits)
    AuxK = |e - e_hat|^2 / |e - E e|^2, e = a - a_hat, e_hat from the D / 2 largest dead units, which it so revives
Differs from the papers: theta is raw and clamped, its kernel wide; in relu and stochastic lambda follows L0, so that
  every variant ends at an L0 of about k; unit-norm rows and AuxK in every variant.
--site mlp_in: a is the MLP's input, and what enters the model is the MLP of a_hat; resid: a is the residual stream after
  the MLP, which a_hat replaces.
N tokens of a batch, D width, F units; H hits: the (token, unit) pairs that a top-k keeps

    python sae.py --F 1024 --k 16
"""
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import activations
import common
import data
import evals
import fused
from model import GPT, default_layer
from spd import LowerLeaky, UpperLeaky
from sweep import sweep

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    site: Literal["mlp_out", "mlp_in", "resid"] = "mlp_out"  # the activations
    out: str = "runs/sae"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation, the batches and the noise
    variant: Literal["topk", "batchtopk", "jumprelu", "stochastic", "relu"] = "topk"  # what makes f sparse
    objective: Literal["mse", "kl"] = "mse"  # reconstruct the activations, or the logits through the rest of the model
    F: int = 1024                   # units
    k: int = 16                     # units on per token
    sweep: bool = False             # train at k / 4, k / 2, k, 2 k and 4 k: the curve, in sweep.json and sweep.png
    steps: int = 4000               # training steps
    N: int = 2048                   # tokens per step
    T: int = 128                    # positions per sequence
    lr: float = 2e-3                # warmed up over the first 5 % of the steps, falling to 0 over the last 20 %
    clip: float = 1.0               # gradient norm
    c_aux: float = 1 / 32           # AuxK
    dead: float = 0.05              # a unit is dead when silent for this share of the run's tokens
    beta: float = 0.99              # batchtopk: of the running mean of the smallest activation kept, the threshold
    theta: float = 0.1              # jumprelu: first threshold
    bandwidth: float = 0.5          # jumprelu: width of the kernel that lets thresholds learn
    c_l0: float = 1.0               # jumprelu: lambda, reached after half of the steps
    c_first: float = 1e-3           # relu, stochastic: first lambda
    follow: float = 0.01            # relu, stochastic: a step multiplies lambda by exp(follow (L0 / k - 1))
    noise: bool = True              # stochastic: r ~ U(0, 1); without, r = 0
    alpha: float = 0.01             # stochastic: slope of the leaky hard sigmoids
    gamma_end: float = 0.1          # stochastic: gamma falls from 1 to this over the first 90 % of the steps
    w_freq: float = 0.5             # stochastic: frequency term relative to importance
    freq_a: float = 1024            # stochastic: a of the frequency term
    tau: float = 0.1                # stochastic: a unit is on where g > tau, once trained
    log_every: int = 50             # steps between lines of log.jsonl
    save_every: int = 500           # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses

FREE = {"model", "out", "resume", "device", "sweep", "log_every", "save_every", "eval_tokens"}

class JumpReLU(torch.autograd.Function):
    """pre 1[pre > theta] and 1[pre > theta]. Their slopes by theta, a delta at pre = theta, are smeared over a window
    of width bw around it. The window is laid on pre: on f, which is 0 below theta, half of it would be lost."""
    @staticmethod
    def forward(ctx, pre, theta, bw):
        on = (pre > theta).to(pre.dtype)
        ctx.save_for_backward(pre, theta, on)
        ctx.bw = bw
        return pre * on, on

    @staticmethod
    def backward(ctx, df, don):
        pre, theta, on = ctx.saved_tensors
        near = (pre - theta).abs() < ctx.bw / 2
        dtheta = -((theta * df + don) * near).flatten(0, -2).sum(0) / ctx.bw
        return df * on, dtheta, None

class SAE(nn.Module):
    def __init__(self, cfg, D, gen, layer=0):
        super().__init__()
        self.cfg, self.layers, self.params_F = cfg, [layer], torch.full((cfg.F,), D * (2 + (cfg.variant == "stochastic")))
        W_FD = F.normalize(torch.randn(cfg.F, D, generator=gen), dim=-1)
        self.W_enc, self.b_enc = nn.Parameter(W_FD.clone()), nn.Parameter(torch.zeros(cfg.F))
        self.W_dec, self.b_dec = nn.Parameter(W_FD), nn.Parameter(torch.zeros(D))
        if cfg.variant == "jumprelu":
            self.theta = nn.Parameter(torch.full((cfg.F,), cfg.theta))
        if cfg.variant == "stochastic":
            self.W_gate, self.b_gate = nn.Parameter(W_FD / 4), nn.Parameter(torch.full((cfg.F,), 0.5))
        state = dict(scale=1., variance=1., threshold=0., lam=cfg.c_first)
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("idle", torch.zeros(cfg.F))            # tokens since a unit was last on

    # A site: what is read off the model, from the MLP's input x, its output y and the stream r that y is added to; and
    # the y that a reconstruction of it amounts to.
    def read(self, x, y, r):
        return {"mlp_in": x, "mlp_out": y, "resid": y if r is None else r + y}[self.cfg.site]

    def write(self, a_hat, mlp, r):
        return {"mlp_in": mlp, "mlp_out": lambda a_hat: a_hat, "resid": lambda a_hat: a_hat - r}[self.cfg.site](a_hat)

    @torch.no_grad()
    def start(self, a_ND):
        """Scale, variance and b_dec from a first batch."""
        self.scale.copy_(a_ND.shape[-1] ** 0.5 / a_ND.norm(dim=-1).mean())
        self.b_dec.copy_((a_ND * self.scale).mean(0))
        self.variance.copy_((a_ND * self.scale - self.b_dec).square().sum(-1).mean())

    @torch.no_grad()
    def fold(self):
        """From now on raw activations: pre, and so f and all that is measured in its unit, shrinks by the scale."""
        for t in (self.b_enc, self.b_dec, self.threshold, getattr(self, "theta", self.scale.clone())):
            t.div_(self.scale)
        if self.cfg.variant == "stochastic":            # gates have no unit: the same from a smaller input
            self.W_gate.mul_(self.scale)
        self.variance.div_(self.scale.square()), self.scale.fill_(1)

    def biases(self):
        """Of pre and of the gates, when both read a itself: W (a - b_dec) + b = W a + (b - W b_dec)."""
        return self.b_enc - self.W_enc @ self.b_dec, self.cfg.variant == "stochastic" and self.b_gate - self.W_gate @ self.b_dec

    # The seam (evals.py)
    def encode(self, layer, x_BTD, mlp):
        cfg, self.mlp = self.cfg, (mlp,)
        a = self.read(x_BTD, mlp(x_BTD), getattr(self, "stream", None)) * self.scale
        b_pre, b_gate = self.biases()
        pre = F.linear(a, self.W_enc, b_pre)
        if cfg.variant == "topk":
            top = pre.relu().topk(cfg.k)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        if cfg.variant == "stochastic":
            g = F.linear(a, self.W_gate, b_gate).clamp(0, 1)
            return pre.relu() * g * (g > cfg.tau)
        return pre.relu() * (pre > {"batchtopk": self.threshold, "jumprelu": getattr(self, "theta", 0), "relu": 0}[cfg.variant])

    def decode(self, layer, f_BTF, x_BTD):
        a_hat = (f_BTF @ self.W_dec + self.b_dec) / self.scale
        return self.write(a_hat, self.mlp[0], getattr(self, "stream", None))

    def contrib(self, layer, f_BTF, x_BTD, units):
        own = f_BTF[..., units, None] * self.W_dec[units] / self.scale
        if self.cfg.site != "mlp_in":
            return own
        a_hat = ((f_BTF @ self.W_dec + self.b_dec) / self.scale).unsqueeze(-2)
        return self.mlp[0](a_hat) - self.mlp[0](a_hat - own)

def loss_fn(sae, a_ND, kl, t, gen):
    """(total, its terms, which units fired) on one batch. kl(a_hat_ND): the KL that it costs the model, or None for the
    NMSE; t in [0, 1]: share of the training done."""
    cfg, a_ND, N = sae.cfg, a_ND * sae.scale, len(a_ND)
    (b_pre, b_gate), W_dec = sae.biases(), sae.W_dec
    terms, lam, penalty = {}, 0, 0
    if cfg.variant in ("topk", "batchtopk"):
        a_hat, _, unit_H, f_H = fused.topk(a_ND, sae.W_enc, b_pre, W_dec, cfg.k, cfg.variant == "batchtopk")
        on_H = f_H > 0
        l0, fired, terms["lowest"] = on_H.sum() / N, torch.bincount(unit_H[on_H], minlength=cfg.F) > 0, f_H[on_H].min()
    else:
        pre = F.linear(a_ND, sae.W_enc, b_pre)
        if cfg.variant == "jumprelu":
            f, on = JumpReLU.apply(pre, sae.theta, cfg.bandwidth)
            lam, penalty = cfg.c_l0 * min(1, 2 * t), (on.sum(-1).mean() / cfg.k - 1).square()
        elif cfg.variant == "relu":
            f = pre.relu()
            on, lam, penalty = f > 0, sae.lam, f.sum(-1).mean()
        else:
            z = F.linear(a_ND, sae.W_gate, b_gate)
            g, gamma = LowerLeaky.apply(z, cfg.alpha), 1 + (cfg.gamma_end - 1) * min(1, t / 0.9)
            r = torch.rand(g.shape, generator=gen, device=g.device) if cfg.noise else 0
            f = pre.relu() * (g + (1 - g) * r)
            g2 = UpperLeaky.apply(z, cfg.alpha).square()
            s_F = (g2 / (g2 + gamma**2)).mean(0)
            on, lam, penalty = (g > cfg.tau) & (pre > 0), sae.lam, (s_F * (1 + cfg.w_freq * torch.log2(1 + cfg.freq_a * s_F))).sum()
        l0, fired, a_hat = on.sum(-1, dtype=a_ND.dtype).mean(), on.any(0), f @ W_dec
    a_hat = a_hat + sae.b_dec
    e_ND = a_ND - a_hat.detach()
    rec = kl(a_hat / sae.scale) if kl else (a_ND - a_hat).square().sum(-1).mean() / sae.variance
    aux, dead = a_ND.new_zeros(()), (sae.idle >= cfg.dead * cfg.steps * cfg.N).nonzero().squeeze(1)
    if cfg.c_aux and len(dead):
        k_aux = min(e_ND.shape[1] // 2, len(dead))
        e_hat = fused.topk(a_ND, sae.W_enc[dead], b_pre[dead], W_dec[dead], k_aux)[0]
        aux = (e_ND - e_hat).square().sum() / (e_ND - e_ND.mean(0)).square().sum()
    total = rec + cfg.c_aux * aux + lam * penalty
    return total, terms | dict(loss=total, rec=rec, aux=aux, penalty=lam * penalty, l0=l0, dead=len(dead)), fired

def update(sae, opt, loss, t):
    """One step of Adam; the rows of W_dec keep norm 1: no gradient along them, and norm 1 again after the step."""
    cfg, W = sae.cfg, sae.W_dec
    opt.param_groups[0]["lr"] = cfg.lr * min(1, (t + 1 / cfg.steps) / 0.05, (1 - t) / 0.2)
    opt.zero_grad()
    loss.backward()
    with torch.no_grad():
        W.grad -= (W.grad * W).sum(-1, keepdim=True) * W
        norm = nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        opt.step()
        W.div_(W.norm(dim=-1, keepdim=True))
        if cfg.variant == "jumprelu":
            sae.theta.clamp_(min=0)
    return norm

@torch.no_grad()
def remember(sae, terms, fired, N):
    """The state beside the weights: silence of each unit, the threshold of batchtopk, the lambda that follows L0."""
    cfg = sae.cfg
    sae.idle.add_(N).masked_fill_(fired, 0)
    if "lowest" in terms:
        low = terms.pop("lowest")
        sae.threshold.copy_(torch.lerp(low, sae.threshold, cfg.beta) if sae.threshold > 0 else low)
    sae.lam.mul_((cfg.follow * (terms["l0"] / cfg.k - 1).clamp(-1, 1)).exp())

def examples(cfg, gpt, sae, corpus, start):
    """Training batches from step `start` on: shuffled a_ND and None, or all tokens but the first of some rows, and
    kl(a_hat_ND): what replacing them costs, through the rest of the model alone."""
    layer, W_VD = sae.layers[0], gpt.wte.weight
    mlp = gpt.h[layer].mlp
    if cfg.objective == "mse":
        for x, y in activations.batches(gpt, corpus, [layer], cfg.T, cfg.N, cfg.seed, start, cfg.site == "resid"):
            yield sae.read(x[0], y[0], None), None
    for step in range(start, cfg.steps):
        with torch.no_grad():
            x, r = gpt.prefix(corpus.batch(step, max(1, cfg.N // (cfg.T - 1)), cfg.T, cfg.seed).to(W_VD.device), layer)
            y = mlp(x)
            final = gpt.hidden(r, y, layer)
            clean, a = (final, *fused.log_partition(final, W_VD)), sae.read(x, y, r)
        def kl(a_hat_ND):
            a_hat = torch.cat([a[:, :1], a_hat_ND.view_as(a[:, 1:])], 1)
            return fused.kl_unembed(clean, gpt.hidden(r, sae.write(a_hat, mlp, r), layer), W_VD)[:, 1:].mean()
        yield a[:, 1:].flatten(0, 1), kl

def build(cfg, gpt):
    """A fresh SAE at the MLP that cfg names, after checking cfg against the target."""
    layer, D = default_layer(gpt) if cfg.layer == -1 else cfg.layer, gpt.cfg.n_embd
    limits = dict(layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions), eval_tokens=(cfg.T, math.inf), k=(1, cfg.F),
                  N=(1, activations.ROWS * (cfg.T - 1)))
    for name in ("F", "steps", "log_every", "save_every", *limits):
        low, high = limits.get(name, (1, math.inf))
        if not low <= (value := layer if name == "layer" else getattr(cfg, name)) <= high:
            common.fail(f"--{name} {value}: must be from {low} to {high}")
    sae = SAE(cfg, D, common.generator(cfg.seed, "init"), layer).to(gpt.wte.weight.device)
    if cfg.site == "resid":         # the seam hands over x, y alone: the stream is noted on its way into LayerNorm
        gpt.h[layer].ln_2.register_forward_pre_hook(lambda module, args: setattr(sae, "stream", args[0]))
    return sae

def train(cfg):
    if cfg.sweep:
        return sweep(train, cfg, "k")
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    sae = build(cfg, gpt)
    corpus = {split: data.load(cfg.data, split, gpt.vocab) for split in ("train", "fit", "test")}
    gen, opt = common.generator(cfg.seed, "noise", dev), torch.optim.Adam(sae.parameters(), cfg.lr, fused=True)
    parts, path, start, seconds = dict(sae=sae, opt=opt, gen=gen), Path(cfg.out) / "sae.safetensors", 0, 0.0
    fixed = dict(method="sae", target=gpt.hash, run={k: v for k, v in vars(cfg).items() if k not in FREE})
    if cfg.resume:
        tensors, meta = common.load(path, **fixed)
        common.unflat(tensors, **parts)
        start, seconds = meta["step"], meta["seconds"]
    log, began = common.Log(Path(cfg.out) / "log.jsonl", start), time.time() - seconds
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="sae")
    for step, (a_ND, kl) in zip(bar, examples(cfg, gpt, sae, corpus["train"], start)):
        t, last = step / cfg.steps, step + 1 == cfg.steps
        if not step:
            sae.start(a_ND)
        loss, terms, fired = loss_fn(sae, a_ND, kl, t, gen)
        norm = update(sae, opt, loss, t)
        remember(sae, terms, fired, len(a_ND))
        save = last or (step + 1) % cfg.save_every == 0
        if save or step % cfg.log_every == 0:
            row = {k: float(v) for k, v in terms.items()}
            common.finite(row["loss"] + norm.item(), step, path)
            log(step=step, **row, norm=norm.item())
            bar.set_postfix({k: f"{v:.2g}" for k, v in row.items()})
        if last:
            sae.fold()
        if save:
            seconds = time.time() - began
            common.save(path, common.flat(**parts),
                        fixed | dict(step=step + 1, seconds=seconds, **common.provenance(cfg, gpt)))
    return sae, summarise(cfg, gpt, sae, corpus, seconds)

def summarise(cfg, gpt, sae, corpus, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    fit, test = ((corpus[s].rows(cfg.T)[:R].to(sae.b_dec.device), corpus[s].labels(cfg.T)[:R])
                 for R in [cfg.eval_tokens // cfg.T] for s in ("fit", "test"))
    lines, out = evals.replacement(sae, gpt, sae.layers[0], fit, test, corpus["test"].names, "latents")
    out |= dict(seconds=seconds, variant=cfg.variant)
    print(f"\nlayer {sae.layers[0]}, {cfg.site}, {cfg.variant}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s", *lines, sep="\n")
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

if __name__ == "__main__":
    train(common.cli(Config))
