"""MOLT, a sparse mixture of linear transforms: one MLP as low-rank linear maps of which few are on at a token.
    y_hat = sum_t g_t U_t V_t x + b,    g_t = phi(e_t . x - b_t)        V_t (r_t, D) reads, U_t (D, r_t) writes
    phi(z) = z 1[z > theta_t] (jumprelu; relu: theta = 0)
    loss = NMSE or KL(clean || spliced) + lam mean_tokens sum_t tanh(c g_t |U_t V_t|_F)
  Lindsey, Chen, Pearce, Hydrie, Conerly 2025, "Sparse mixtures of linear transforms" (transformer-circuits.pub).
  In training x is standardised and y centred and scaled by one number; at the end the scales go into the weights.
--sum_to_weights: V_t reads [x; 1], phi(z) = clamp(z, 0, 1), b = b_out, and the transforms and a rest Delta, whose gate
  is 0, sum to the MLP without its nonlinearity,    sum_t U_t V_t + Delta = W_out [W_in, b_in] = product,
    loss + beta |Delta|^2 / |product|^2
  Feasible at no error: an MLP is a MOLT of rank-one transforms, a neuron each, with gates sigma(z) / z. It is the
  product of the two matrices that is decomposed, not each of them; gates without a bound would make the tie empty.
Differs from the post: sizes and rates are for a small model; x is centred, as an SAE's input is; a theta per transform,
  trained by the pseudo-gradient of Rajamanoharan et al. 2024 (arXiv:2407.14435).
B sequences, T positions, N tokens, D residual width, F transforms, R sum of their ranks

    python molt.py                                  # 83 s on one core: CE recovered 0.992, FVE 0.910 at L0 5.5
    python molt.py --sum_to_weights --lam 3e-3 --steps 1500     # |Delta| / |product| 0.07, FVE 0.909 at L0 13.5; without the
                                                    # tie (--beta 0) 0.74, FVE 0.914 at L0 14.0
"""
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import common
import data
import evals
from metrics import faithful
from model import GPT, default_layer
from report import curve

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    out: str = "runs/molt"          # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation and the batches
    groups: str = "64@2,32@4,16@8,8@16,4@32"    # NUMBER@RANK of the transforms; 80@8: FVE, L0 alike, fewer ranks on
    gate: Literal["jumprelu", "relu"] = "jumprelu"  # phi, unless --sum_to_weights
    theta: float = 0.3              # jumprelu: first threshold; 0.03 ends at the same FVE and a higher L0
    bw: float = 1.0                 # jumprelu: width of the window in which the threshold feels a gradient
    objective: Literal["mse", "kl"] = "mse"     # reconstruct y, or keep the model's predictions, through the suffix
    sum_to_weights: bool = False    # the transforms and a rest sum to W_in W_out; gates are clamped to [0, 1]
    beta: float = 0.3               # of the rest, with --sum_to_weights; 0: clamped gates and no tie
    alpha: float = 0.01             # slope of a clamped gate outside [0, 1], for gradients that lead back inside
    lam: float = 1e-3               # sparsity: THE knob, sweep it in log steps first; more steps are sparser
    c: float = 4.0                  # of the tanh; large ones saturate and kill
    ramp: float = 0.5               # share of the training over which lam rises from 0
    steps: int = 4000               # training steps
    N: int = 1024                   # tokens per step (kl: N // T sequences)
    T: int = 128                    # positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all directions of a matrix at once
    lr: float = 2e-3                # warmed up over 100 steps, to 0 over the last fifth; adam: 16e-3 suits L0 16, not 7
    lr_rest: float = 2e-3           # muon: of biases and thresholds, which Adam trains; adam: ignored, all are at lr
    clip: float = 1.0               # gradient norm
    sweep: bool = False             # train at 5 values of lam around --lam; sweep.json and sweep.png
    log_every: int = 50             # steps between lines of log.jsonl
    save_every: int = 1000          # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses

SWEEP = (0.1, 0.3, 1, 2, 4)         # times --lam
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "sweep", "log_every", "save_every", "eval_tokens"}

class JumpReLU(torch.autograd.Function):
    """z 1[z > theta]. theta gets -(theta / bw) K((z - theta) / bw), K the rectangle on [-1/2, 1/2], of z and not of the
    result, which lacks the half below theta."""
    @staticmethod
    def forward(ctx, z, theta, bw):
        ctx.save_for_backward(z, theta)
        ctx.bw = bw
        return z * (z > theta)

    @staticmethod
    def backward(ctx, dg):
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() <= ctx.bw / 2
        return dg * (z > theta), -(theta / ctx.bw) * (dg * near).flatten(0, -2).sum(0), None

class Clamp(torch.autograd.Function):
    """clamp(z, 0, 1). Outside, gradients that lead back inside pass, times alpha: no gate is stuck."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        leak = torch.where(z < 0, dg.clamp(max=0), dg.clamp(min=0)).mul_(ctx.alpha)
        return torch.where((z >= 0) & (z <= 1), dg, leak), None

class MOLT(nn.Module):
    """E, b_gate, theta: the gates; V (D, R), U (R, D): all V_t, U_t side by side; product: what they sum to if tied."""
    kind, matrices = "map", ()

    def __init__(self, D, cfg, gen, layer=0):
        super().__init__()
        self.cfg, self.tied, self.D, self.layers = cfg, cfg.sum_to_weights, D, [layer]
        self.groups = parse(cfg.groups)
        self.register_buffer("rank_F", torch.tensor([r for n, r in self.groups for _ in range(n)]), persistent=False)
        F, R = len(self.rank_F), int(self.rank_F.sum())
        jump = cfg.gate == "jumprelu" and not self.tied
        self.E = nn.Parameter(nn.functional.normalize(torch.randn(D, F, generator=gen), dim=0))   # half of them open
        self.b_gate = nn.Parameter(torch.zeros(F))
        self.theta = nn.Parameter(torch.full((F,), cfg.theta if jump else 0.), requires_grad=jump)
        self.V = nn.Parameter(torch.randn(D + self.tied, R, generator=gen) / D**0.5)
        self.U = nn.Parameter(torch.randn(R, D, generator=gen) * 0.3 / R**0.5)     # a large map saturates tanh
        self.b = nn.Parameter(torch.zeros(D), requires_grad=not self.tied)
        for name, value in dict(x_mean=torch.zeros(D), x_std=torch.ones(D), y_mean=torch.zeros(D), y_std=torch.ones(()),
                                product=torch.zeros(D + 1, D), idle_F=torch.zeros(F, dtype=torch.long)).items():
            self.register_buffer(name, value)       # idle_F: tokens since the transform was last on

    def read(self, x):
        """What the transforms read: standardised x, or [x; 1] if they sum to the weights."""
        x = (x - self.x_mean) / self.x_std
        return nn.functional.pad(x, (0, 1), value=1.) if self.tied else x

    def gates(self, x, training=False):
        z = x[..., :self.D] @ self.E - self.b_gate
        if self.tied:
            return Clamp.apply(z, self.cfg.alpha) if training else z.clamp(0, 1)
        return JumpReLU.apply(z, self.theta, self.cfg.bw) if training else z * (z > self.theta)

    def write(self, g, x):
        """sum_t g_t U_t V_t x + b as one wide product each way. An autograd function of its own is no faster: 10 ms at
        N 1024 and R 640, of which the two products alone take 8, one product per transform 500."""
        y = (x @ self.V * self.wide(g)) @ self.U + self.b
        return self.y_mean + self.y_std * y

    def wide(self, g):
        return g.repeat_interleave(self.rank_F, -1, output_size=self.V.shape[1])

    def norms(self):
        """|U_t V_t|_F of each transform by r x r Grams: |U V|^2 = sum (U^T U) * (V V^T)."""
        sizes = [n * r for n, r in self.groups]
        gram = lambda A_DR: [torch.einsum("dnr,dns->nrs", A, A) for A in
                             (p.unflatten(1, group) for p, group in zip(A_DR.split(sizes, 1), self.groups))]
        square = torch.cat([(v * u).sum((1, 2)) for v, u in zip(gram(self.V), gram(self.U.T))])
        return square.clamp(min=1e-12).sqrt()

    def rest(self, on_F=None):
        """Delta: what the transforms, or those of them that are on_F, leave of the product."""
        return self.product - (self.V if on_F is None else self.V * self.wide(on_F.to(self.V))) @ self.U

    @torch.no_grad()
    def standardise(self, x_ND, y_ND, mlp):
        """Sets the scales, and the product in these coordinates. One scale for y: its errors count as they do unscaled."""
        std = x_ND.std(0)
        self.x_mean.copy_(x_ND.mean(0)), self.x_std.copy_(std.clamp(min=0.01 * std.mean()))     # no dead input explodes
        self.y_mean.copy_(y_ND.mean(0)), self.y_std.copy_((y_ND - self.y_mean).square().mean().sqrt())
        if self.tied:
            W, b = mlp.c_fc.weight, mlp.c_fc.bias
            product = torch.cat([W * self.x_std.unsqueeze(1), (self.x_mean @ W + b).unsqueeze(0)]) @ mlp.c_proj.weight
            self.product.copy_(product / self.y_std), self.b.copy_((mlp.c_proj.bias - self.y_mean) / self.y_std)

    @torch.no_grad()
    def fold(self):
        """Moves the scales into the weights: the same map, on raw activations (centred by x_mean)."""
        for W in (self.E, self.V, self.product):
            W[:self.D] /= self.x_std.unsqueeze(1)
        self.U *= self.y_std
        self.product *= self.y_std
        self.b.copy_(self.y_mean + self.y_std * self.b)
        self.x_std.fill_(1), self.y_mean.zero_(), self.y_std.fill_(1)

    # The seam (evals.py): the units are the transforms, f is the gate.
    def unit_directions(self):
        return [("all", self.V[:self.D].T, self.U, self.rank_F)]        # V's last row, if tied, is a bias

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [self.read(x_ND)[:, :self.D]]

    @property
    def params_F(self):
        return self.rank_F * (len(self.V) + self.D) + self.D + 1 + self.theta.requires_grad

    def encode(self, layer, x_BTD, mlp):
        return self.gates(self.read(x_BTD))

    def decode(self, layer, f_BTF, x_BTD):
        return self.write(f_BTF, self.read(x_BTD))

    def contrib(self, layer, f_BTF, x_BTD, units):
        """g_t U_t V_t x of each named transform, (B, T, units, D)."""
        h, ends = self.read(x_BTD) @ self.V * self.wide(f_BTF), self.rank_F.cumsum(0)
        rows = [slice(e - r, e) for e, r in zip(ends[units].tolist(), self.rank_F[units].tolist())]
        return self.y_std * torch.stack([h[..., s] @ self.U[s] for s in rows], -2)

def parse(groups):
    """"64@2,32@4" -> [(64, 2), (32, 4)]"""
    if not re.fullmatch(r"[1-9]\d*@[1-9]\d*(,[1-9]\d*@[1-9]\d*)*", groups):
        common.fail(f"--groups {groups}: must be NUMBER@RANK, or several with commas between them")
    return [tuple(map(int, group.split("@"))) for group in groups.split(",")]

def loss_fn(molt, x_ND, distance, cfg, t):
    """(total, its terms, gates). distance(y_hat): what it costs to put y_hat for y; t in [0, 1]: training done."""
    x = molt.read(x_ND)
    g_NF = molt.gates(x, training=True)
    fit = distance(molt.write(g_NF, x))
    sparse = (cfg.c * g_NF * molt.norms()).tanh().sum(-1).mean()       # tanh per token: that of a mean is another loss
    # in standardised coordinates: a direction of the weights counts by how much x varies along it
    rest = molt.rest().square().sum() / molt.product.square().sum() if molt.tied else torch.zeros(())
    total = fit + cfg.lam * min(1, t / cfg.ramp) * sparse + cfg.beta * rest
    return total, dict(loss=total, fit=fit, sparse=sparse, rest=rest), g_NF

def optimizers(molt):
    """Adam or Muon for the matrices E, V and U, Adam for biases and thresholds."""
    cfg, rest = molt.cfg, [p for p in (molt.b_gate, molt.theta, molt.b) if p.requires_grad]
    lr_rest = cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr
    return common.optimizers(cfg.optimizer, [molt.E, molt.V, molt.U], rest, cfg.lr, lr_rest, betas=(0.9, 0.99))

def batches(gpt, molt, corpus, cfg, start):
    """Endless (x_ND, distance) from step `start` on. kl: rows in their order, for the suffix needs them whole."""
    layer, = molt.layers
    if cfg.objective == "mse":
        for (x_ND,), (y_ND,) in data.batches(gpt, corpus, [layer], cfg.T, cfg.N, cfg.seed, start):
            yield x_ND, lambda y_hat: ((y_ND - y_hat) / molt.y_std).square().mean()
    for step in itertools.count(start):
        idx_BT = corpus.batch(step, cfg.N // cfg.T, cfg.T, cfg.seed).to(molt.x_mean.device)
        x_BTD, y_BTD, _, kl = data.clean_pass(gpt, layer, idx_BT)
        yield x_BTD.flatten(0, 1), lambda y_hat: kl(y_hat.view_as(y_BTD)).mean()

def build(cfg, gpt):
    """A fresh MOLT of the MLP that cfg names, after checking cfg against the target."""
    layer, D = default_layer(gpt) if cfg.layer == -1 else cfg.layer, gpt.cfg.n_embd
    common.within(vars(cfg) | {"layer": layer}, "steps", "log_every", "save_every",
                  layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions), eval_tokens=(cfg.T, math.inf),
                  N=(cfg.T, data.ROWS * (cfg.T - 1)), theta=(0, math.inf), bw=(1e-9, math.inf), ramp=(1e-9, 1),
                  lam=(0, math.inf), beta=(0, math.inf))
    if (top := max(r for n, r in parse(cfg.groups))) > D:
        common.fail(f"--groups {cfg.groups}: rank {top} is over the width {D}")
    return MOLT(D, cfg, common.generator(cfg.seed, "init"), layer).to(gpt.wte.weight.device)

def load(path, gpt):
    tensors, meta = common.load(path, method=Path(__file__).stem, target=gpt.hash)
    molt = build(Config(**meta["config"]), gpt)
    common.unflat(tensors, molt=molt)
    return molt.requires_grad_(False)

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    molt = build(cfg, gpt)
    corpus = data.load_all(cfg.data, gpt.vocab, cfg.T)
    opts = optimizers(molt)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), molt=molt, **opts)
    if run.is_fresh:
        (x_ND,), (y_ND,) = data.at_mlps(gpt, corpus["train"].batch(0, 64, cfg.T, cfg.seed).to(dev), molt.layers)
        molt.standardise(x_ND, y_ND, gpt.h[molt.layers[0]].mlp)
    stream = batches(gpt, molt, corpus["train"], cfg, run.first_step)
    for step in run.steps():
        t = step / cfg.steps
        common.set_rates(opts, min(1, (step + 1) / 100, (1 - t) / 0.2))
        x_ND, distance = next(stream)
        loss, terms, g_NF = loss_fn(molt, x_ND, distance, cfg, t)
        molt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(molt.parameters(), cfg.clip)
        for opt in opts.values():
            opt.step()
        with torch.no_grad():
            molt.theta.clamp_(min=0)
            on_NF = g_NF > 0
            molt.idle_F.add_(len(x_ND)).masked_fill_(on_NF.any(0), 0)
        if run.is_logged:
            dead = (molt.idle_F > 0.05 * cfg.steps * len(x_ND)).float().mean()
            run.record(terms, norm, l0=on_NF.sum(-1).float().mean(), dead=dead)
        if run.is_last:
            molt.fold()
    return molt, summarise(cfg, gpt, molt, corpus, run.seconds)

def summarise(cfg, gpt, molt, corpus, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    layer, dev = molt.layers[0], molt.x_mean.device
    fit, test = (corpus[s].labelled(cfg.T, cfg.eval_tokens // cfg.T, dev) for s in ("fit", "test"))
    lines, out = evals.replacement(molt, gpt, layer, fit, test, corpus["test"].names, "transforms")
    rate_F = evals.counts(molt, gpt, *test, (0,))["on"][0] / (len(test[0]) * (cfg.T - 1))
    benefit_F = faithful.benefits(molt, gpt, layer, test[0][:64]).clamp(min=1e-12)
    own = dict(active_rank=(rate_F @ molt.rank_F.to(rate_F)).item(), parameters=int(molt.params_F.sum()) + len(molt.b),
               top1_benefit=(benefit_F.max() / benefit_F.sum()).item(),
               effective_transforms=(benefit_F.sum()**2 / benefit_F.square().sum()).item())
    own |= faithful.jacobian_cosine(molt, gpt, layer, test[0][:4])
    if molt.tied:       # a transform that is never on could hold the rest unpunished
        own |= {name: (molt.rest(on_F).norm() / molt.product.norm()).item() for name, on_F in
                dict(rest=rate_F >= 0, rest_alive=rate_F > 0.01).items()}
    print(f"\nlayer {layer}, {cfg.groups}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s", *lines,
          "", ", ".join(f"{k} {v:,.4g}" for k, v in own.items()), sep="\n")
    out |= own | dict(seconds=seconds)
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

def main(cfg):
    if cfg.sweep:
        return curve.sweep(train, cfg, "lam", [cfg.lam * k for k in SWEEP], ("l0", "active_rank"))
    return train(cfg)

if __name__ == "__main__":
    main(common.cli(Config))
