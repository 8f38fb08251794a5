"""MOLT: which few of many linear maps add up to what an MLP does on each token?

A sparse mixture of linear transforms writes an MLP as a sum of linear maps of low rank. Each has a
gate that reads the input, and nearly all gates are shut on a token. A unit is a map: it says what
the MLP does to a whole subspace, where a unit of a transcoder writes along one direction.

    y_hat = sum_t g_t U_t V_t x + b         V_t (r_t, D) reads, U_t (D, r_t) writes
    g_t = phi(e_t . x - b_t)                --gate jumprelu: phi(z) = z 1[z > theta_t]
                                            --gate relu:     phi(z) = z 1[z > 0]
    loss = NMSE + lam mean over tokens of sum_t tanh(c g_t |U_t V_t|)       Frobenius norms
    NMSE = E|y - y_hat|^2 / E|y - E y|^2    --objective kl: KL of the model's predictions instead

In training x is standardised and y is centred and scaled by one number; at the end that goes into
the weights.

--sum_to_weights ties the maps to the MLP's weights. V_t reads [x; 1], phi(z) = clamp(z, 0, 1) and
b = b_out. The maps and a rest, whose gate is always shut, sum to the MLP without its nonlinearity:

    sum_t U_t V_t + rest = product, product = W_out [W_in, b_in]
    loss + beta |rest|^2 / |product|^2

An error of 0 is within reach: an MLP is a MOLT of maps of rank 1, one for each neuron, with gates
gelu(z) / z. It is the product of both matrices that is decomposed, not each of them; and if gates
had no bound, maps could be as small as they like, and the tie would say nothing.

Lindsey, Chen, Pearce, Hydrie, Conerly 2025, "Sparse mixtures of linear transforms"
(transformer-circuits.pub).

Differs from the post: sizes and rates are for a small model; x is centred, as an SAE's input is; a
theta for each transform, trained as in Rajamanoharan et al. 2024 (arXiv:2407.14435).

B sequences, T positions, N tokens, D residual width, F transforms, R sum of their ranks, G
transforms of a group, all of rank r

    python molt.py              # 83 s on one core: CE recovered 0.992, FVE 0.910 at L0 5.5
    python molt.py --sum_to_weights --lam 3e-3 --steps 1500
                                # |rest| / |product| 0.07, FVE 0.909 at L0 13.5; without the tie
                                # (--beta 0) 0.74, FVE 0.914 at L0 14.0
"""
import itertools
import json
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import torch
from torch import Tensor, nn

import common
import data
import evals
from metrics import faithful
from model import GPT, default_layer
from report import curve, gallery


@dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    out: str = "runs/molt"          # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, lam times 0.1 to 4: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation and the batches
    # transforms and their gates
    groups: str = "64@2,32@4,16@8,8@16,4@32"  # NUMBER@RANK; 80@8: FVE, L0 alike, fewer ranks on
    gate: Literal["jumprelu", "relu"] = "jumprelu"  # phi, unless --sum_to_weights
    theta: float = 0.3              # [0, 1e6] jumprelu: first threshold; 0.03: a higher L0
    bandwidth: float = 1.0          # (0, 1e6] jumprelu: window in which thresholds learn
    sum_to_weights: bool = False    # transforms and a rest sum to W_in W_out; gates in [0, 1]
    alpha: float = 0.01             # [0, 1] sum_to_weights: slope of gates outside [0, 1]
    # training
    objective: Literal["mse", "kl"] = "mse"  # rebuild the output, or the predictions
    steps: int = 4000               # [1, 1e8] training steps
    N: int = 1024                   # [2, 1e8] tokens per step (kl: N // T sequences)
    T: int = 128                    # [3, 1e6] positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all their directions
    lr: float = 2e-3                # (0, 100] up in 100 steps, to 0 in 20 %; 16e-3 suits L0 16
    lr_rest: float = 2e-3           # (0, 100] muon: of biases and thresholds; adam: all are at lr
    clip: float = 1.0               # (0, 1e9] gradient norm
    # loss
    lam: float = 1e-3               # [0, 1e9] sparsity: THE knob; more steps are sparser
    c: float = 4.0                  # [0, 1e6] of the tanh; large ones saturate and kill
    ramp: float = 0.5               # (0, 1] share of the training over which lam rises from 0
    beta: float = 0.3               # [0, 1e9] sum_to_weights: of the rest; 0: gates, no tie
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 1000          # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses


SWEEP = (0.1, 0.3, 1, 2, 4)         # times --lam
RENAMED = {"bw": "bandwidth"}      # flags by their old names
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "sweep", "page", "log_every",
                        "save_every", "eval_tokens"}


def parse(groups):
    """Read how many transforms of which rank there are: "64@2,32@4" -> [(64, 2), (32, 4)]."""
    if not re.fullmatch(r"[1-9]\d*@[1-9]\d*(,[1-9]\d*@[1-9]\d*)*", groups):
        common.fail(f"--groups {groups}: must be NUMBER@RANK, or several with commas between them")
    return [tuple(map(int, group.split("@"))) for group in groups.split(",")]


# ----------------------------------------------------------------------------------- the gates
class JumpReLU(torch.autograd.Function):
    """z 1[z > theta].

    It jumps at theta, and its slope by theta is a spike there, which no sample hits. The spike is
    smeared over a window of width bw: -theta / bw wherever z is in the window (Rajamanoharan et al.
    2024, section 4). The window is laid on z: laid on the result, which is 0 below theta, half
    would be lost."""
    @staticmethod
    def forward(ctx, z, theta, bw):
        ctx.save_for_backward(z, theta)
        ctx.bw = bw
        return z * (z > theta)

    @staticmethod
    def backward(ctx, dg):
        z, theta = ctx.saved_tensors
        is_near = (z - theta).abs() <= ctx.bw / 2
        from_window = (dg * is_near).flatten(0, -2).sum(0)
        return dg * (z > theta), -(theta / ctx.bw) * from_window, None


class Clamp(torch.autograd.Function):
    """clamp(z, 0, 1). Outside, gradients that lead back inside pass, times alpha: no gate is
    stuck."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        is_inside = (z >= 0) & (z <= 1)
        # below 0 a gate may want to grow (dg < 0), above 1 to shrink
        leak = torch.where(z < 0, dg.clamp(max=0), dg.clamp(min=0)).mul_(ctx.alpha)
        return torch.where(is_inside, dg, leak), None


# ---------------------------------------------------------------------------------- the method
class MOLT(nn.Module):
    """E (D, F), b_gate, theta: the gates; V (D, R), U (R, D): all V_t and all U_t, side by side;
    product: what the transforms sum to, if they are tied. The other buffers are the scales, and
    what training remembers."""
    kind = "map"
    matrices = ()

    def __init__(self, D, cfg, gen, layer=0):
        super().__init__()
        self.cfg = cfg
        self.tied = cfg.sum_to_weights
        self.D = D
        self.layers = [layer]
        self.groups = parse(cfg.groups)
        ranks = []
        for number, rank in self.groups:
            ranks += [rank] * number
        F = len(ranks)
        R = sum(ranks)
        self.register_buffer("rank_F", torch.tensor(ranks), persistent=False)

        # gates: half of them are open at first
        learns_theta = cfg.gate == "jumprelu" and not self.tied
        theta_F = torch.full((F,), cfg.theta if learns_theta else 0.)
        E_DF = torch.randn(D, F, generator=gen)
        self.E = nn.Parameter(nn.functional.normalize(E_DF, dim=0))
        self.b_gate = nn.Parameter(torch.zeros(F))
        self.theta = nn.Parameter(theta_F, requires_grad=learns_theta)

        # maps: small at first, for a large one saturates the tanh
        d_read = D + 1 if self.tied else D
        self.V = nn.Parameter(torch.randn(d_read, R, generator=gen) / D ** 0.5)
        self.U = nn.Parameter(torch.randn(R, D, generator=gen) * 0.3 / R ** 0.5)
        self.b = nn.Parameter(torch.zeros(D), requires_grad=not self.tied)

        self.register_buffer("x_mean", torch.zeros(D))              # scales, until `fold`
        self.register_buffer("x_std", torch.ones(D))
        self.register_buffer("y_mean", torch.zeros(D))
        self.register_buffer("y_std", torch.ones(()))
        self.register_buffer("product", torch.zeros(D + 1, D))
        self.register_buffer("idle_F", torch.zeros(F, dtype=torch.long))    # tokens since it was on

    def read(self, x):
        """What the transforms read: standardised x, or [x; 1] if they are tied."""
        x = (x - self.x_mean) / self.x_std
        return nn.functional.pad(x, (0, 1), value=1.) if self.tied else x

    def gates(self, x, training=False):
        """How far is each gate open? x as `read` gives it; training: with gradients that learn."""
        z = x[..., :self.D] @ self.E - self.b_gate
        if self.tied:
            return Clamp.apply(z, self.cfg.alpha) if training else z.clamp(0, 1)
        if training:
            return JumpReLU.apply(z, self.theta, self.cfg.bandwidth)
        return z * (z > self.theta)

    def inner(self, g, x):
        """g_t V_t x of all transforms, side by side (.., R)."""
        return x @ self.V * self.for_each_rank(g)

    def write(self, g, x):
        """What do the transforms write under these gates? x as `read` gives it.

        One wide product each way. With one product per transform a step took 500 ms instead of 10,
        at N 1024 and R 640."""
        # y = sum_t g_t * (x @ V_t @ U_t) + b
        y = self.inner(g, x) @ self.U + self.b
        return self.y_mean + self.y_std * y

    def for_each_rank(self, a):
        """Give a transform's number to each of its ranks: (.., F) -> (.., R)."""
        return a.repeat_interleave(self.rank_F, -1, output_size=self.V.shape[1])

    def by_group(self, A_DR):
        """Cut a matrix like V into the transforms of each group, [A_DGr]."""
        sizes = [number * rank for number, rank in self.groups]
        return [A.unflatten(1, group) for A, group in zip(A_DR.split(sizes, 1), self.groups)]

    def norms(self):
        """How large is each transform? |U_t V_t|, Frobenius, (F).

        From products of r x r, the maps themselves (D, D) are never formed: |V U|^2 is the sum of
        (V^T V) * (U U^T)."""
        squares = []
        for V_DGr, U_DGr in zip(self.by_group(self.V), self.by_group(self.U.T)):
            squares.append((gram(V_DGr) * gram(U_DGr)).sum((1, 2)))
        return torch.cat(squares).clamp(min=1e-12).sqrt()

    def rest(self, on_F=None):
        """What do the transforms, or those of them that are on_F, leave of the product?"""
        V = self.V if on_F is None else self.V * self.for_each_rank(on_F.to(self.V))
        return self.product - V @ self.U

    @torch.no_grad()
    def standardise(self, x_ND, y_ND, mlp):
        """Take the scales from a first batch, and what they make of the MLP's weights."""
        # an input that hardly varies must not explode
        std_D = x_ND.std(0)
        self.x_mean.copy_(x_ND.mean(0))
        self.x_std.copy_(std_D.clamp(min=0.01 * std_D.mean()))
        # one scale for all of y: its errors count as they do unscaled
        self.y_mean.copy_(y_ND.mean(0))
        self.y_std.copy_((y_ND - self.y_mean).square().mean().sqrt())
        if self.tied:
            self.tie(mlp)

    def tie(self, mlp):
        """Set b and the product to the MLP's weights, for a standardised x and a scaled y."""
        # x W_in + b_in, by x = x_std x' + x_mean
        W_in = mlp.c_fc.weight
        W_DM = W_in * self.x_std.unsqueeze(1)
        b_M = self.x_mean @ W_in + mlp.c_fc.bias
        product = torch.cat([W_DM, b_M.unsqueeze(0)]) @ mlp.c_proj.weight
        self.product.copy_(product / self.y_std)
        self.b.copy_((mlp.c_proj.bias - self.y_mean) / self.y_std)

    @torch.no_grad()
    def fold(self):
        """Move the scales into the weights: the map stays, and reads raw x, less x_mean."""
        for W in (self.E, self.V, self.product):
            W[:self.D] /= self.x_std.unsqueeze(1)
        self.U.mul_(self.y_std)
        self.product.mul_(self.y_std)
        self.b.copy_(self.y_mean + self.y_std * self.b)
        self.x_std.fill_(1)
        self.y_mean.zero_()
        self.y_std.fill_(1)

    # The seam (evals.py): the units are the transforms, f is the gate.
    def unit_directions(self):
        V_DR = self.V[:self.D]                  # if tied, the last row is a bias
        return [("all", V_DR.T, self.U, self.rank_F)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [self.read(x_ND)[:, :self.D]]

    @property
    def params_F(self):
        """Parameters of each transform: V_t, U_t, e_t, b_t, and theta_t if it learns."""
        return self.rank_F * (len(self.V) + self.D) + self.D + 1 + self.theta.requires_grad

    def encode(self, layer, x_BTD, mlp):
        return self.gates(self.read(x_BTD))

    def decode(self, layer, f_BTF, x_BTD):
        return self.write(f_BTF, self.read(x_BTD))

    def contrib(self, layer, f_BTF, x_BTD, units):
        """g_t U_t V_t x of each named transform, (B, T, units, D)."""
        inner_BTR = self.inner(f_BTF, self.read(x_BTD))
        ends = self.rank_F.cumsum(0)[units].tolist()
        parts = []
        for end, rank in zip(ends, self.rank_F[units].tolist()):
            own = slice(end - rank, end)
            parts.append(inner_BTR[..., own] @ self.U[own])
        return self.y_std * torch.stack(parts, -2)


def gram(A_DGr):
    """A_t^T A_t of each transform of a group, (G, r, r)."""
    return torch.einsum("dgr,dgs->grs", A_DGr, A_DGr)


# ------------------------------------------------------------------------------------ the loss
@dataclass
class Nmse:
    """How much of y is missing, as a share of its variance? 0 = nothing, 1 = as bad as the mean."""
    y_ND: Tensor
    y_std: Tensor

    def __call__(self, y_hat_ND):
        return ((self.y_ND - y_hat_ND) / self.y_std).square().mean()


@dataclass
class Divergence:
    """KL(clean || with y_hat in place of y) in nats, mean over the tokens of some rows."""
    kl_BT: Callable
    y_BTD: Tensor

    def __call__(self, y_hat_ND):
        return self.kl_BT(y_hat_ND.view_as(self.y_BTD)).mean()


def rest_share(molt):
    """How far are the transforms from adding up to the weights? |rest|^2 / |product|^2; 0 = exact.

    In standardised coordinates a direction of the weights counts by how much x varies along it."""
    return molt.rest().square().sum() / molt.product.square().sum()


def loss_fn(molt, x_ND, distance, cfg, progress):
    """What one step minimises: (total, its terms, gates). distance(y_hat): what it costs to put
    y_hat in place of y. progress: share of training done, 0 to 1."""
    # What the open gates let through must be what the MLP writes.
    x = molt.read(x_ND)
    g_NF = molt.gates(x, training=True)
    fit = distance(molt.write(g_NF, x))

    # Few may be open. The tanh is taken at each token: that of a mean is another loss.
    sparse = (cfg.c * g_NF * molt.norms()).tanh().sum(-1).mean()
    lam = cfg.lam * min(1, progress / cfg.ramp)

    # If tied, the transforms must sum to the weights.
    rest = rest_share(molt) if molt.tied else torch.zeros(())
    total = fit + lam * sparse + cfg.beta * rest
    return total, dict(loss=total, fit=fit, sparse=sparse, rest=rest), g_NF


# ------------------------------------------------------------------------------------ training
def optimizers(molt):
    """Adam or Muon for the matrices E, V and U, Adam for biases and thresholds."""
    cfg = molt.cfg
    matrices = [molt.E, molt.V, molt.U]
    rest = [p for p in (molt.b_gate, molt.theta, molt.b) if p.requires_grad]
    lr_rest = cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, lr_rest, betas=(0.9, 0.99))


def update(molt, opts, loss, step):
    """Take one step, and return the gradient's norm."""
    cfg = molt.cfg
    warm_up = (step + 1) / 100
    common.set_rates(opts, min(1, warm_up, (1 - step / cfg.steps) / 0.2))
    molt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(molt.parameters(), cfg.clip)
    for opt in opts.values():
        opt.step()
    return norm


@torch.no_grad()
def remember(molt, g_NF):
    """Keep thresholds above 0, and count how long each transform has been off."""
    molt.theta.clamp_(min=0)
    molt.idle_F.add_(len(g_NF)).masked_fill_((g_NF > 0).any(0), 0)


def dead_share(molt, n_tokens):
    """Which share of the transforms has been off for 5 % of the training? n_tokens: of a step."""
    return (molt.idle_F > 0.05 * molt.cfg.steps * n_tokens).float().mean()


def shuffled_tokens(gpt, molt, corpus, cfg, start):
    """Yield x_ND and the NMSE of an output, of tokens in random order."""
    for x_LND, y_LND in data.batches(gpt, corpus, molt.layers, cfg.T, cfg.N, cfg.seed, start):
        yield x_LND[0], Nmse(y_LND[0], molt.y_std)


def whole_rows(gpt, molt, corpus, cfg, start):
    """Yield x_ND and the KL that an output costs, of rows in their order: the rest of the model
    needs them whole."""
    layer, = molt.layers
    for step in itertools.count(start):
        idx_BT = corpus.batch(step, cfg.N // cfg.T, cfg.T, cfg.seed).to(molt.x_mean.device)
        x_BTD, y_BTD, _, kl_BT = data.clean_pass(gpt, layer, idx_BT)
        yield x_BTD.flatten(0, 1), Divergence(kl_BT, y_BTD)


def batches(gpt, molt, corpus, cfg, start):
    """Endless training batches (x_ND, distance) from step `start` on."""
    kind = shuffled_tokens if cfg.objective == "mse" else whole_rows
    return kind(gpt, molt, corpus, cfg, start)


def check_memory(cfg, gpt):
    """Fail if there is less memory than a training takes, weights and activations of a step. How
    many activations that are was measured."""
    common.check(cfg)
    groups = parse(cfg.groups)
    F = sum(number for number, _ in groups)
    R = sum(number * rank for number, rank in groups)
    common.need_for_training((F + 2 * R) * gpt.cfg.n_embd, cfg.N * (9 * R + F),
                             f"--groups {cfg.groups} --N {cfg.N}", gpt.device)


def build(cfg, gpt):
    """A fresh MOLT of the MLP that cfg names, after checking cfg against the target."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    D = gpt.cfg.n_embd
    common.check(replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 T=f"[3, {gpt.cfg.n_positions}]", eval_tokens=f"[{cfg.T}, inf]",
                 N=f"[{cfg.T}, {data.ROWS * (cfg.T - 1)}]")
    highest = max(rank for _, rank in parse(cfg.groups))
    if highest > D:
        common.fail(f"--groups {cfg.groups}: rank {highest} is over the width {D}")
    molt = MOLT(D, cfg, common.generator(cfg.seed, "init"), layer)
    return molt.to(gpt.device)


def load(path, gpt):
    tensors, cfg = common.load_trained(path, Config, gpt)
    molt = build(cfg, gpt)
    common.unflat(tensors, molt=molt)
    return molt.requires_grad_(False)


def begin(molt, gpt, corpus):
    """Take the scales from 64 rows."""
    layer, = molt.layers
    cfg = molt.cfg
    idx_BT = corpus.batch(0, 64, cfg.T, cfg.seed).to(molt.x_mean.device)
    (x_ND,), (y_ND,) = data.at_mlps(gpt, idx_BT, molt.layers)
    molt.standardise(x_ND, y_ND, gpt.mlp(layer))


def train(cfg):
    device = common.device(cfg.device)
    gpt = GPT.load(cfg.model, device)
    check_memory(cfg, gpt)
    molt = build(cfg, gpt)
    corpus = data.load_for(gpt, cfg.data, cfg.T)
    opts = optimizers(molt)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), molt=molt, **opts)
    if run.is_fresh:
        begin(molt, gpt, corpus["train"])

    stream = batches(gpt, molt, corpus["train"], cfg, run.first_step)
    for step, (x_ND, distance) in zip(run.steps(), stream):
        loss, terms, g_NF = loss_fn(molt, x_ND, distance, cfg, step / cfg.steps)
        norm = update(molt, opts, loss, step)
        remember(molt, g_NF)
        if run.is_logged:
            l0 = (g_NF > 0).sum(-1).float().mean()
            run.record(terms, norm, l0=l0, dead=dead_share(molt, len(x_ND)))
        if run.is_last:
            molt.fold()
    return molt, summarise(cfg, gpt, molt, corpus, run.seconds)


# ------------------------------------------------------------------------------------- summary
def own_numbers(cfg, gpt, molt, test):
    """What is asked of a MOLT alone.

    active_rank           ranks of the transforms that are on, per token
    parameters            all that it has
    top1_benefit          the best transform's share of what all of them improve
    effective_transforms  (sum of benefits)^2 / sum of their squares: how many share the work
    jacobian_cosine, ..   does it change with x as the MLP does? (metrics/faithful.py)
    rest, rest_alive      |rest| / |product| if tied; what is left by transforms on at over 1 % of
                          the tokens: one that is never on could hold the rest unpunished"""
    layer, = molt.layers
    rows_RT = test[0]
    n_tokens = len(rows_RT) * (cfg.T - 1)
    rate_F = evals.counts(molt, gpt, *test, (0,))["on"][0] / n_tokens
    benefit_F = faithful.benefits(molt, gpt, layer, rows_RT[:64]).clamp(min=1e-12)
    out = dict(active_rank=(rate_F @ molt.rank_F.to(rate_F)).item())
    out["parameters"] = int(molt.params_F.sum()) + len(molt.b)
    out["top1_benefit"] = (benefit_F.max() / benefit_F.sum()).item()
    out["effective_transforms"] = (benefit_F.sum() ** 2 / benefit_F.square().sum()).item()
    out |= faithful.jacobian_cosine(molt, gpt, layer, rows_RT[:4])
    if molt.tied:
        size = molt.product.norm()
        out["rest"] = (molt.rest().norm() / size).item()
        out["rest_alive"] = (molt.rest(on_F=rate_F > 0.01).norm() / size).item()
    return out


def summarise(cfg, gpt, molt, corpus, seconds):
    """Print what was found, write summary.json. Means and the choice of concepts come from fit,
    figures from test."""
    layer, = molt.layers
    device = molt.x_mean.device
    n_rows = cfg.eval_tokens // cfg.T
    fit, test = (corpus[split].labelled(cfg.T, n_rows, device) for split in ("fit", "test"))
    names = corpus["test"].names
    lines, out = evals.replacement(molt, gpt, layer, fit, test, names, "transforms")
    own = own_numbers(cfg, gpt, molt, test)
    out |= own
    out["seconds"] = seconds
    head = f"\nlayer {layer}, {cfg.groups}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s"
    own_text = ", ".join(f"{name} {value:,.4g}" for name, value in own.items())
    print(head, *lines, "", *textwrap.wrap(own_text, evals.WIDTH), sep="\n")
    found = out | common.provenance(cfg, gpt)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return out


def main(cfg):
    if cfg.sweep:
        values = [cfg.lam * share for share in SWEEP]
        return curve.sweep(train, cfg, "lam", values, ("l0", "active_rank"))
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
