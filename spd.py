"""SPD, stochastic parameter decomposition of one MLP, and its adversarial successor VPD (--adversary).
    W = V U + D     sites W_in (D, M), W_out (M, D), each into C rank-one V[:, c] U[c] and a rest D; biases stay whole
    y = ((x V) * m) U + d * (x D) + b  =  ((x V) * (m - d)) U + d * (x W) + b             masks m (C) and d in [0, 1]
    g = clamp(Gamma(clean inputs of the sites), 0, 1)                             causal importance of each component
    m = g + (1 - g) r,  d = r_delta                               sources r in [0, 1]: g = 1 pins a component's mask
    loss = c_faith mean_sites |D|^2 / |W|^2
         + c_stoch KL(clean || masked), r ~ U(0, 1), at each position a random subset of the sites masked
         + c_adv   KL(clean || masked), r ascending that KL, all sites masked
         + c_imp   (1/N) sum_c s_c (1 + w_freq log2(1 + freq_a s_c / N)),   s_c = sum over N positions of phi(g_c)
    phi(g) = g^2 / (g^2 + gamma^2), gamma falling to gamma_end (smooth_l0), or g^p, p falling to p_end (lp)
  Bushnaq, Braun, Sharkey 2025 (arXiv:2506.20790); Goodfire 2026, "Interpreting Language Model Parameters" (VPD).
What limits training is the optimizer: many components have to turn while their sum stays W. A strong faithfulness term
  pins them, so it is weak here: D has masks of its own, which punish a wrong sum already, V U starts as W exactly and
  is moved onto W once more at the end (`project`). Adam moves each weight by itself; Muon, which replaces a matrix's
  momentum by the nearest orthogonal matrix, turns all components at once. results/spd-recipe.md has the measurements.
Differs from the papers: Muon for Adam, an exact start for a faithfulness warm-up, faithfulness weak and relative to
  |W|^2; Gamma is one small MLP on the RMS-normed inputs of all sites (--ci_fn has theirs); the default adversary takes
  one step; the KL goes through the suffix only (same value).
B sequences, T positions, N = B T, D residual width, M MLP hidden width, C components of a site, V vocabulary

    python spd.py --C 256       # 6 minutes on 2 cores: CE recovered 0.97 with masks rounded at 0.1, at L0 13 and 11
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import evals
import fused
from metrics import masks
from model import GPT, default_layer
from report import curve

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    out: str = "runs/spd"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, c_imp times 1/4 to 4; the curve in sweep.json and sweep.png
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation, the batches and the masks
    C: int = 256                    # components per matrix; with fewer than min(D, M) V U can't reach W
    ci_fn: Literal["global", "mlp", "shared", "vector"] = "global"  # what Gamma sees, see class Gamma
    ci_hidden: int = 256            # Gamma's hidden width (global: two hidden layers, the others one)
    alpha: float = 0.01             # slope of the leaky hard sigmoids
    steps: int = 1000               # training steps
    B: int = 16                     # sequences per step
    T: int = 128                    # positions per sequence
    start: Literal["random", "neurons"] = "random"  # V and U: random, or each neuron's own weights; the sum exact
    optimizer: Literal["muon", "adam"] = "muon"     # of all matrices: Muon turns all components at once
    lr: float = 0.03                # of V and U, falling along a cosine; 8e-3 suits adam
    lr_ci: float = 0.02             # of Gamma's matrices, falling alike; 8e-3 suits adam
    lr_rest: float = 8e-3           # of Gamma's biases, by Adam, falling alike
    lr_end: float = 0.1             # last learning rates as a share of the first
    clip_vu: float = 0.01           # gradient norm of V, U; fires at almost every step, as in VPD
    clip_ci: float = 1.0            # gradient norm of Gamma
    faith: Literal["relative", "absolute"] = "relative"  # mean |D|^2 / |W|^2, or sum |D|^2 / number of weights
    c_faith: float = 10.            # faithfulness, in units of the loss: weak, or components can't turn; .1 for MSE
    project: bool = True            # at the end, move V U onto W exactly
    c_stoch: float = 0.5            # KL under stochastic masks
    c_adv: float = 0.5              # KL under adversarial masks
    c_imp: float = 1e-4             # importance: THE knob, sweep it in log steps first
    w_freq: float = 0.5             # frequency term relative to importance; splits components that serve two circuits
    freq_a: float = 32768           # a of the frequency term; 0: N, as the papers have it with lp
    penalty: Literal["smooth_l0", "lp"] = "smooth_l0"  # phi
    gamma_end: float = 0.01         # smooth_l0: gamma falls from 1 to this over the first 90 % of the steps
    p_start: float = 2.0            # lp: first exponent
    p_end: float = 0.4              # lp: last exponent
    adversary: Literal["none", "step", "pgd"] = "step"  # one shared sign step, persistent PGD; none: rounded masks fail
    adv_lr: float = 0.01            # pgd: Adam's learning rate (betas 0.5, 0.99), warmed up over 2.5 % of the steps
    adv_ascents: int = 2            # pgd: ascents on each batch before the training forward, which adds one
    log_every: int = 50             # steps between lines of log.jsonl
    eval_every: int = 500           # steps between small evaluations, which never change the training; 0: none
    save_every: int = 500           # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses
    pgd_rows: int = 32              # test sequences that the evaluation's PGD attacks with one source for all

SITES = ("in", "out")
TAUS, MAIN = (0, 0.1, 0.5), 1       # a component is on where g > tau; the main threshold is 0.1
SMALL = 0.02                        # --start neurons: size of the other components beside a random start
PGD = dict(steps=20, size=0.1)      # the evaluation's attack
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "sweep", "device",
                        "log_every", "eval_every", "save_every", "eval_tokens", "pgd_rows"}

class LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1), for masks and L0. At z <= 0 only a gradient that wants g up passes, times alpha: with a true
    slope below 0 masks would go negative, which diverges late and splits components."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        return torch.where(z > 0, dg, ctx.alpha * dg.clamp(max=0)).masked_fill_(z > 1, 0), None

class UpperLeaky(torch.autograd.Function):
    """clamp(z, 0, 1) with slope alpha above 1, for the importance penalty: it can still pull back a z far above 1."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1).add_((z - 1).clamp_(min=0), alpha=alpha)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        return torch.where(z > 1, ctx.alpha * dg, dg).masked_fill_(z <= 0, 0), None

class ImportanceNet(nn.Module):
    """Clean inputs xs of the sites -> logits z of the causal importances, one (.., C) per site.
    global: one net on the RMS-normed inputs of all sites; shared: one net per site on its input x;
    vector: one net per component on x; mlp: one net per component on the number x V[:, c]."""
    def __init__(self, kind, d_ins, C, hidden, gen):
        super().__init__()
        self.kind, self.C = kind, C
        self.each = (C,) if kind in ("mlp", "vector") else ()           # a net per component: weights (C, in, out)
        self.nets = nn.ModuleList(nn.ParameterList(p for n_in, n_out in zip(sizes, sizes[1:]) for p in (
            torch.randn(*self.each, n_in, n_out, generator=gen) / n_in**0.5, torch.zeros(*self.each, n_out)))
            for sizes in ([[sum(d_ins), hidden, hidden, C * len(d_ins)]] if kind == "global" else
                          [[1 if kind == "mlp" else d, hidden, 1 if self.each else C] for d in d_ins]))
        for net in self.nets:
            nn.init.constant_(net[-1], 0.5)     # every component starts half on, on no flat side of a clamp

    def forward(self, xs, Vs):
        lead = xs[0].shape[:-1]
        if self.kind == "global":
            xs = [torch.cat([F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in xs], -1)]
        elif self.each:     # (C, in, N): positions last, or gelu and products crawl over tiny strided rows
            xs = [(x @ V).flatten(0, -2).T.unsqueeze(1) if self.kind == "mlp" else
                  x.flatten(0, -2).T.expand(self.C, -1, -1) for x, V in zip(xs, Vs)]
        zs = []
        for net, x in zip(self.nets, xs):
            for W, b in zip(net[::2], net[1::2]):
                x = F.gelu(x) if W is not net[0] else x
                x = torch.baddbmm(b.unsqueeze(-1), W.mT, x) if self.each else F.linear(x, W.T, b)
            zs += [x.squeeze(1).T.unflatten(0, lead)] if self.each else x.split(self.C, -1)
        return zs

class SPD(nn.Module):
    """V, U of each site and Gamma. Ws, bs: the frozen weights (d_in, d_out) and biases of the sites, in order."""
    kind, matrices, thresholds = "component", SITES, TAUS

    def __init__(self, Ws, bs, cfg, gen, layer=0):
        super().__init__()
        self.Ws, self.bs, self.C, self.layers = Ws, bs, cfg.C, [layer]
        self.V = nn.ParameterList(torch.randn(len(W), cfg.C, generator=gen) / len(W)**0.5 for W in Ws)
        self.U = nn.ParameterList(torch.randn(cfg.C, W.shape[1], generator=gen) / cfg.C**0.5 for W in Ws)
        self.gamma = ImportanceNet(cfg.ci_fn, [len(W) for W in Ws], cfg.C, cfg.ci_hidden, gen)
        self.to(Ws[0].device)

    def site(self, ms, ds, detach=False):
        """The function site(i, x) -> y of site i under masks ms[i] (.., C) and ds[i] (.., 1); o = x W if known."""
        V, U = ([p.detach() if detach else p for p in ps] for ps in (self.V, self.U))
        def site(i, x, o=None):
            return fused.masked_lowrank(x, V[i], U[i], ms[i], ds[i], x @ self.Ws[i] if o is None else o, self.bs[i])
        return site

    def masked(self, gs, source, detach=False):
        """The sites under m = g + (1 - g) r and d = r_delta; source = [r of each site, r_delta of each site]."""
        return self.site([torch.lerp(g, g.new_ones(()), r) for g, r in zip(gs, source)], source[len(gs):], detach)

    # The seam (evals.py): the units are W_in's components, then W_out's; f is the causal importance.
    @property
    def params_F(self):
        return torch.cat([torch.full((self.C,), sum(W.shape)) for W in self.Ws])

    def unit_directions(self):
        return [(name, V.T, U, None) for name, V, U in zip(self.matrices, self.V, self.U)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [x_ND, act(gpt.h[self.layers[0]].mlp.c_fc(x_ND))]

    def encode(self, layer, x_BTD, mlp):
        return torch.cat(self.gamma([x_BTD, act(mlp.c_fc(x_BTD))], self.V), -1).clamp(0, 1)

    def decode(self, layer, f_BTF, x_BTD):
        return mlp_under(self.site(f_BTF.split(self.C, -1), x_BTD.new_zeros(2, 1)), x_BTD)

    def strength(self, layer, f_BTF, x_BTD):
        """m h_c |U[c]|, signed: what a component passes on, alike for (V, U) and (-V, -U)."""
        gs = f_BTF.split(self.C, -1)
        hs = x_BTD @ self.V[0], act(self.site(gs, x_BTD.new_zeros(2, 1))(0, x_BTD)) @ self.V[1]
        return torch.cat([g * h * U.norm(dim=1) for g, h, U in zip(gs, hs, self.U)], -1)

    def contrib(self, layer, f_BTF, x_BTD, units):
        """(B, T, units, D). W_out's: m h_c U[c]. W_in's: y less y without it, through the nonlinearity and W_out."""
        (V, V2), (U, U2), (f, f2) = self.V, self.U, f_BTF.split(self.C, -1)
        first, out = units < self.C, f_BTF.new_empty(*x_BTD.shape[:2], len(units), x_BTD.shape[-1])
        i, j = units[first], units[~first] - self.C
        z = self.site([f, f2], x_BTD.new_zeros(2, 1))(0, x_BTD).unsqueeze(-2)
        z_without = z - (f * (x_BTD @ V))[..., i, None] * U[i]
        out[..., first, :] = (((act(z) - act(z_without)) @ V2) * f2.unsqueeze(-2)) @ U2
        out[..., ~first, :] = (f2.unsqueeze(-2) * (act(z) @ V2)).squeeze(-2)[..., j, None] * U2[j]
        return out

class Rounded:
    """An SPD under masks of 0 and 1: its units are on where g > tau, and nothing else is written."""
    def __init__(self, raw, tau):
        self.raw, self.tau = raw, tau

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def encode(self, layer, x_BTD, mlp):
        return (self.raw.encode(layer, x_BTD, mlp) > self.tau).float()

def act(z):
    return F.gelu(z, approximate="tanh")

def mlp_under(site, x, o=None):
    """The MLP's output y, computed by its two sites; o = x W_in if known."""
    return site(1, act(site(0, x, o)))

def faithfulness(spd, form):
    square = [(W - V @ U).square().sum() for W, V, U in zip(spd.Ws, spd.V, spd.U)]
    if form == "absolute":
        return sum(square) / sum(W.numel() for W in spd.Ws)
    return sum(s / W.square().sum() for s, W in zip(square, spd.Ws)) / len(square)

def penalties(gs, cfg, t):
    """imp = (1/N) sum_c s_c and freq = (1/N) sum_c s_c log2(1 + a s_c / N); t in [0, 1]: share of training done."""
    g_NC = torch.cat(gs, -1).flatten(0, -2)
    N = len(g_NC)
    if cfg.penalty == "smooth_l0":
        gamma, g2_NC = 1 + (cfg.gamma_end - 1) * min(1, t / 0.9), g_NC.square()
        s_C = (g2_NC / (g2_NC + gamma**2)).sum(0)
    else:
        s_C = ((g_NC + 1e-12) ** (cfg.p_start + (cfg.p_end - cfg.p_start) * t)).sum(0)
    return s_C.sum() / N, (s_C * torch.log2(1 + (cfg.freq_a or N) * s_C / N)).sum() / N     # the whole batch in the log

def stochastic(gs, gen, route=True):
    """Sources r ~ U(0, 1) per position and component, r_delta per position. route: at each position a random k-subset
    of the sites is masked, k uniform in 1..sites; the others get r = r_delta = 1, which is the frozen path exactly."""
    lead, rand = gs[0].shape[:-1], lambda *s: torch.rand(s, generator=gen, device=gs[0].device)
    rs, ds = [rand(*g.shape) for g in gs], [rand(*lead, 1) for _ in gs]
    if route:
        k = torch.randint(1, len(gs) + 1, (*lead, 1), generator=gen, device=gs[0].device)
        frozen = rand(*lead, len(gs)).argsort(-1).argsort(-1) >= k
        for r, d, off in zip(rs, ds, frozen.split(1, -1)):
            r.masked_fill_(off, 1.), d.masked_fill_(off, 1.)
    return rs + ds

def sign_pgd(spd, gs, run, gen, steps, size, keep_best=False):
    """Sources that raise run's loss: one per component and delta, shared by all positions, from a random start by
    `steps` sign steps, clamped to [0, 1]; V, U, Gamma are constant. keep_best: the best visited, for one run more."""
    gs, top, best = [g.detach() for g in gs], -math.inf, None
    source = [torch.rand(n, generator=gen, device=gs[0].device) for n in [spd.C] * len(gs) + [1] * len(gs)]
    for _ in range(steps + keep_best):
        source = [s.requires_grad_() for s in source]
        loss = run(spd.masked(gs, source, detach=True))[0]
        if keep_best and loss > top:
            top, best = loss.item(), [s.detach() for s in source]
        grads = torch.autograd.grad(loss, source)
        source = [(s.detach() + size * grad.sign()).clamp_(0, 1) for s, grad in zip(source, grads)]
    return best if keep_best else source

class PersistentPGD(nn.Module):
    """Sources per sequence, position and component that live through training and ascend by Adam: `adv_ascents` times
    on each batch with V, U and Gamma constant, then once with the gradient that the training forward leaves."""
    def __init__(self, spd, cfg, gen):
        super().__init__()
        self.cfg, sizes = cfg, [spd.C] * len(spd.Ws) + [1] * len(spd.Ws)
        self.source = nn.ParameterList(torch.rand(cfg.B, cfg.T, n, generator=gen, device=gen.device) for n in sizes)
        self.opt = torch.optim.Adam(self.parameters(), betas=(0.5, 0.99), maximize=True)

    def ascend(self, spd, gs, run, t):
        gs, self.opt.param_groups[0]["lr"] = [g.detach() for g in gs], self.cfg.adv_lr * min(1, t / 0.025)
        for _ in range(self.cfg.adv_ascents):
            run(spd.masked(gs, list(self.source), detach=True))[0].backward()
            self.step()
        return list(self.source)

    @torch.no_grad()
    def step(self):
        self.opt.step()
        self.opt.zero_grad()
        for s in self.source:
            s.clamp_(0, 1)

def loss_fn(spd, xs, run, cfg, t, gen, pgd=None):
    """(total, its terms, gs) on one batch. xs: clean inputs of the sites; run(*sites) -> the divergence from the clean
    output under each of these sites; t in [0, 1]: share of training done; pgd: the PersistentPGD if there is one."""
    zs = spd.gamma(xs, spd.V)
    gs = [LowerLeaky.apply(z, cfg.alpha) for z in zs]
    sources = [stochastic(gs, gen)]
    if cfg.adversary != "none":
        sources += [pgd.ascend(spd, gs, run, t) if pgd else sign_pgd(spd, gs, run, gen, steps=1, size=1.)]
    stoch, adv = (*run(*[spd.masked(gs, source) for source in sources]), torch.zeros(()))[:2]
    imp, freq = penalties([UpperLeaky.apply(z, cfg.alpha) for z in zs], cfg, t)
    faith = faithfulness(spd, cfg.faith)
    total = (cfg.c_faith * faith + cfg.c_stoch * stoch + cfg.c_adv * adv + cfg.c_imp * (imp + cfg.w_freq * freq))
    return total, dict(loss=total, faith=faith, stoch=stoch, adv=adv, imp=imp, freq=freq), gs

@torch.no_grad()
def project(spd):
    """Move V U onto W by the smallest change of one factor: V + D U^+ where W is taller than wide, else U + V^+ D, with
    the pseudo-inverse ^+. That is exact if C >= min(D, M), else the nearest sum that this factor can make."""
    for W, V, U in zip(spd.Ws, spd.V, spd.U):
        rest = (W - V @ U).double()
        if len(W) > W.shape[1]:
            V += (rest @ torch.linalg.pinv(U.double())).to(V)
        else:
            U += (torch.linalg.pinv(V.double()) @ rest).to(U)

@torch.no_grad()
def start_at_neurons(spd):
    """Neuron k's own weights as component k of both matrices, W_in[:, k] e_k and e_k W_out[k], V and U of equal norm;
    the components beyond stay random, but small."""
    for W, V, U in zip(spd.Ws, spd.V, spd.U):
        reads = len(W) > W.shape[1]                     # W_out reads the neurons, W_in writes them
        size_M = W.norm(dim=1 if reads else 0).sqrt()
        M = len(size_M)
        V.mul_(SMALL), U.mul_(SMALL)
        V[:, :M] = size_M.diag() if reads else W / size_M
        U[:M] = W / size_M.unsqueeze(1) if reads else size_M.diag()

def begin(spd, cfg):
    """Where training starts: the sum exact."""
    if cfg.start == "neurons":
        start_at_neurons(spd)
    project(spd)

def optimizers(spd, cfg):
    """Of V and U at --lr, of Gamma's matrices at --lr_ci. Muon leaves Gamma's biases and nets per component to Adam."""
    turned, rest = [], []
    for W, b in (pair for net in spd.gamma.nets for pair in zip(net[::2], net[1::2])):
        (turned if cfg.optimizer == "adam" or W.ndim == 2 else rest).append(W)
        (turned if cfg.optimizer == "adam" else rest).append(b)
    groups = [dict(params=[*spd.V, *spd.U]), *[dict(params=turned, lr=cfg.lr_ci)] * bool(turned)]
    return common.optimizers(cfg.optimizer, groups, rest, cfg.lr, cfg.lr_rest)

def update(spd, opts, loss, cfg, t):
    """One step: cosine learning rates, V, U and Gamma clipped apart. Returns the sum of both norms."""
    common.set_rates(opts, cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * t)))
    for opt in opts.values():
        opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([*spd.V, *spd.U], cfg.clip_vu)
    norm = norm + nn.utils.clip_grad_norm_(spd.gamma.parameters(), cfg.clip_ci)
    for opt in opts.values():
        opt.step()
    return norm

def clean_pass(gpt, spd, idx_BT):
    """One clean forward, without gradients -> the sites' clean inputs, and run(*sites): the KL from it under each of
    these sites, all in one call of the suffix. Prefix and clean side are computed once per batch."""
    layer, W_VD = spd.layers[0], gpt.wte.weight
    with torch.no_grad():
        x, r = gpt.prefix(idx_BT, layer)
        o = x @ spd.Ws[0]
        h = act(o + spd.bs[0])
        final = gpt.hidden(r, h @ spd.Ws[1] + spd.bs[1], layer)
        clean = final, *fused.log_partition(final, W_VD)

    def run(*sites):
        y = torch.cat([mlp_under(site, x, o) for site in sites])
        final = gpt.hidden(r.repeat(len(sites), 1, 1), y, layer).unflatten(0, (len(sites), -1))
        return fused.kl_unembed(clean, final, W_VD).flatten(1).mean(1)
    return [x, h], run

def build(cfg, gpt):
    """A fresh SPD of the MLP that cfg names, after checking cfg against the target."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    common.within(vars(cfg) | {"layer": layer}, "C", "ci_hidden", "B", "steps", "log_every", "save_every", "pgd_rows",
                  layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions), eval_tokens=(cfg.T, math.inf))
    if cfg.C < (rank := min(gpt.h[layer].mlp.c_fc.weight.shape)):
        print(f"--C {cfg.C}: fewer components than the weights have ranks, {rank}; they can't add up to them")
    if cfg.start == "neurons" and cfg.C < gpt.cfg.n_inner:
        common.fail(f"--start neurons --C {cfg.C}: must be at least the number of neurons, {gpt.cfg.n_inner}")
    mlp = gpt.h[layer].mlp
    return SPD([mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias], cfg,
               common.generator(cfg.seed, "init"), layer)

def load(path, gpt):
    """The decomposition as it is evaluated: masks rounded at the main threshold."""
    tensors, meta = common.load(path, method=Path(__file__).stem, target=gpt.hash)
    spd = build(Config(**meta["config"]), gpt)
    common.unflat(tensors, spd=spd)
    return Rounded(spd.requires_grad_(False), TAUS[MAIN])

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    spd = build(cfg, gpt)
    corpus = data.load_all(cfg.data, gpt.vocab, cfg.T)
    gen, opts = common.generator(cfg.seed, "masks", dev), optimizers(spd, cfg)
    pgd = PersistentPGD(spd, cfg, gen) if cfg.adversary == "pgd" else None
    adversary = dict(pgd=pgd, pgd_opt=pgd.opt) if pgd else {}
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), spd=spd, gen=gen, **opts, **adversary)
    if run.is_fresh:
        begin(spd, cfg)
    some = corpus["fit"].rows(cfg.T, 8).to(dev)
    for step in run.steps():
        t = step / cfg.steps
        xs, kl = clean_pass(gpt, spd, corpus["train"].batch(step, cfg.B, cfg.T, cfg.seed).to(dev))
        loss, terms, gs = loss_fn(spd, xs, kl, cfg, t, gen, pgd)
        norm = update(spd, opts, loss, cfg, t)
        if pgd:
            pgd.step()
        if run.is_logged:
            run.record(terms, norm, **{f"l0_{name}": (g > 0.1).sum(-1).float().mean() for name, g in zip(SITES, gs)})
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            found = evals.scores(gpt, some, masks.mask_table(spd, TAUS, common.generator(cfg.seed, "eval", dev)))
            run.log(step=step, **{f"kl {name}": row["kl"] for name, row in found.items()})
        if run.is_last and cfg.project:
            project(spd)
    return spd, summarise(cfg, gpt, spd, corpus, run.seconds)

def summarise(cfg, gpt, spd, corpus, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    layer, dev = spd.layers[0], spd.bs[0].device
    fit, test = (corpus[s].labelled(cfg.T, cfg.eval_tokens // cfg.T, dev) for s in ("fit", "test"))
    gen, floor = common.generator(cfg.seed, "summary", dev), evals.ablations(gpt, layer, fit[0])
    few = test[0][:cfg.pgd_rows]
    xs, run = clean_pass(gpt, spd, few)
    with torch.no_grad():
        gs = [z.clamp(0, 1) for z in spd.gamma(xs, spd.V)]
    source = sign_pgd(spd, gs, run, gen, **PGD, keep_best=True)
    attacked = evals.scores(gpt, few, floor | {"pgd20": masks.replacing(spd, lambda gs: masks.masks_from(gs, source))})
    table = evals.scores(gpt, test[0], floor | masks.mask_table(spd, TAUS, gen))
    groups = {name: torch.arange(spd.C, device=dev) + i * spd.C for i, name in enumerate(SITES)}
    lines, out = evals.report(spd, gpt, fit, test, corpus["test"].names, groups, TAUS, MAIN)
    out |= evals.score_keys(table) | dict(kl_pgd20=attacked["pgd20"]["kl"], seconds=seconds)
    l0, alive = (sum(out[f"{key}_{n}"] for n in SITES) for key in ("l0", "alive"))
    out |= dict(l0=l0, active_params=l0 * sum(spd.Ws[0].shape), dead_fraction=1 - alive / len(spd.params_F))
    out |= dict(ce_recovered=out[f"ce_recovered_rounded_{TAUS[MAIN]}"],
                fve=evals.usage(spd, gpt, layer, test[0])["fve"])           # of causal-importance masks
    out |= {f"weight_error_{n}": evals.relative_error(V @ U, W) for n, V, U, W in zip(SITES, spd.V, spd.U, spd.Ws)}
    print(f"\nlayer {layer}, {spd.C} components per matrix, {cfg.steps * cfg.B * cfg.T:,} tokens, {seconds:.0f} s",
          *evals.score_lines(table, table), *evals.score_lines(attacked, ["pgd20"]),
          f"pgd20: {PGD['steps']} sign steps of {PGD['size']}, one source for all positions of {len(few)} sequences",
          *[f"|W - VU| / |W| of W_{name}: {out[f'weight_error_{name}']:.3%}" for name in SITES], *lines, sep="\n")
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

def main(cfg):
    return curve.sweep(train, cfg, "c_imp", [cfg.c_imp * share for share in curve.SHARES]) if cfg.sweep else train(cfg)

if __name__ == "__main__":
    main(common.cli(Config))
