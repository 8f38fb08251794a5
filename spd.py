"""SPD: which few parts of its weight matrices does an MLP use on each token?

Both weight matrices are written as sums of rank-one components. A small net says how important
each component is at each token. Everything is trained such that ablating what the net calls
unimportant, by any amount, leaves the model's predictions as they were, while as little as
possible is called important.

    y = x W + b                 what a matrix makes of x: W_in (D, M), then W_out (M, D)
    W = V U + rest              component c is V[:, c] U[c]: it reads along V[:, c], writes U[c]
    g = clamp(ImportanceNet(what both matrices read), 0, 1)     causal importance: a number for
                                                                each token and component
    mask = g + (1 - g) source       source: a number in [0, 1], drawn at random or chosen by an
                                    attack. g = 1 pins the mask to 1, g = 0 leaves it to the source
    y = ((x V) * mask) U + rest_mask * (x rest) + b     the rest has g = 0, so its mask is a source
    loss = c_faith  mean over matrices of |rest|^2 / |W|^2      components add up to the weights
         + c_stoch  KL(clean || masked), random sources; at each position one matrix or both masked
         + c_adv    KL(clean || masked), sources that an attack finds; both masked          (VPD)
         + c_imp    (1/N) sum_c s_c (1 + w_freq log2(1 + freq_a s_c / N))   c of both matrices
    s_c = sum over the N positions of phi(g_c)      the log: a component that matters twice as often
                                                    costs more than twice
    phi(g) = g^2 / (g^2 + width^2), width falling from 1 to gamma_end               (smooth_l0)
             or g^p, p falling to p_end                                             (lp)

SPD, stochastic parameter decomposition: Bushnaq, Braun, Sharkey 2025 (arXiv:2506.20790).
VPD, adversarial parameter decomposition: Goodfire 2026, "Interpreting Language Model Parameters".

What limits training is the optimizer: many components have to turn while their sum stays W. A
strong faithfulness term pins them, so it is weak here (1 % of |W| missing costs 0.001). A wrong sum
is punished by the KL already, as the rest is masked too; V U starts as W exactly, and is moved onto
W once more at the end (`project`). Adam moves each weight by itself. Muon replaces the momentum of
a matrix by the nearest orthogonal matrix, which turns all components at once. Two components that
cancel each other are in the way: a mask takes one of them away and leaves the other. More
components have more such pairs. So training starts with few (`start_at_smallest`), V and U shrink
at each step (`decay`), so that what no loss needs gets small, and Muon's step does not grow with C
beside what it moves (`rates`). Two components that share two mechanisms are taken apart by the
penalty alone, and smooth_l0 is flat at g = 1: lp with p = 1 throughout leaves hardly such a pair on
planted detectors, but is no better on the target. results/spd-recipe.md has the measurements.

Differs from the papers: Muon for Adam; V and U shrink; an exact start for a faithfulness warm-up;
faithfulness weak, and relative to |W|^2; the importance net is one small MLP on the RMS-normed
inputs of both matrices (--ci_fn has the papers'); the default adversary takes one step; masked
passes begin at the MLP, since nothing below it depends on the masks.

B sequences, T positions, N = B T, D residual width, M MLP hidden width, C components of a matrix,
F = 2 C units: W_in's components, then W_out's; I some of W_in's; R rows of tokens; d_in and d_out
are D and M for W_in, M and D for W_out. CE recovered: 0 with the MLP's mean output, 1 with the MLP

    python spd.py --C 256       # 6 minutes on 2 cores: with masks rounded to 0 and 1 at g = 0.1,
                                # CE recovered 0.98 at L0 7 in W_in + 6 in W_out
"""
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import evals
import fused
from metrics import masks
from model import GPT, default_layer, gelu
from report import curve, gallery


@dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    out: str = "runs/spd"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, c_imp times 1/4 to 4: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation, the batches and the masks
    # components and their importance
    C: int = 256                    # [1, 1e7] components per matrix: min(D, M) or more; better 2 D
    ci_fn: Literal["global", "mlp", "shared", "vector"] = "global"  # kind of ImportanceNet
    ci_hidden: int = 256            # [1, 1e6] hidden width of the importance net
    alpha: float = 0.01             # [0, 1] slope of LowerLeaky below 0, of UpperLeaky above 1
    # training
    steps: int = 1000               # [1, 1e8] training steps
    B: int = 16                     # [1, 1e6] sequences per step
    T: int = 128                    # [3, 1e6] positions per sequence
    start: Literal["smallest", "random", "neurons"] = "smallest"    # of V and U, see `begin`
    optimizer: Literal["muon", "adam"] = "muon"     # of all matrices
    lr: float = 0.02                # (0, 100] of V and U, falling along a cosine; adam: try 4e-3
    lr_scaled: bool = True          # V and U: lr by W's size, without muon's factor (`rates`)
    decay: float = 0.2              # [0, 1] V and U shrink by decay lr a step, lr unscaled
    lr_ci: float = 0.02             # (0, 100] of the importance net's matrices; 8e-3 suits adam
    lr_rest: float = 8e-3           # (0, 100] muon: of the net's biases, by Adam; adam: at lr_ci
    lr_end: float = 0.1             # [0, 1] last learning rates as a share of the first
    clip_vu: float = 0.01           # (0, 1e9] of the gradient of V, U; nearly always, as in VPD
    clip_ci: float = 1.0            # (0, 1e9] gradient norm of the importance net
    # loss
    faith: Literal["relative", "absolute"] = "relative"  # error over |W|^2, or per weight
    c_faith: float = 10.            # [0, 1e9] faithfulness; 0.1 where the distance is an MSE
    project: bool = True            # at the end, move V U onto W exactly
    c_stoch: float = 0.5            # [0, 1e9] KL under random masks
    c_adv: float = 0.5              # [0, 1e9] KL under the attack's masks
    c_imp: float = 1e-4             # [0, 1e9] importance: THE knob, sweep it in log steps first
    w_freq: float = 0.5             # [0, 1e9] frequency term; splits what serves two circuits
    freq_a: float = 32768           # [0, 1e9] a of the frequency term; 0: N, as in the papers
    penalty: Literal["smooth_l0", "lp"] = "smooth_l0"  # phi
    gamma_end: float = 0.01         # (0, 1] smooth_l0: last width, reached after 90 % of the steps
    p_start: float = 2.0            # (0, 100] lp: first exponent
    p_end: float = 0.4              # (0, 100] lp: last exponent
    # adversary
    adversary: Literal["none", "step", "pgd"] = "step"  # sign_step or PersistentPGD
    adv_lr: float = 0.01            # (0, 100] pgd: Adam's rate (betas 0.5, 0.99), up in 2.5 %
    adv_ascents: int = 2            # [0, 1e4] pgd: ascents on a batch, before that of training
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    eval_every: int = 500           # [0, 1e9] steps between small evaluations; 0: none
    save_every: int = 500           # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses
    pgd_rows: int = 32              # [1, 1e6] test rows of the summary's attack, on one source


# flags that a resumed run may give other values (common.Run)
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "sweep", "page", "device", "log_every",
                        "eval_every", "save_every", "eval_tokens", "pgd_rows"}
SITES = ("in", "out")               # the two matrices
TAUS = (0, 0.1, 0.5)                # a component is on where g > tau ..
ON_ABOVE = 0.1                      # .. and this tau is the log's, the summary's and load's
SMALL = 0.02                        # --start neurons: factor on V and U of all other components
FORMER = dict(lr=0.03, lr_scaled=False, decay=0., start="random")    # results/spd-recipe.md


# ------------------------------------------------------------------------------- importance
class LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1), for the masks. Below 0 only a gradient that wants g up passes, times alpha.

    So a component that is off everywhere can wake. If the value had that slope too, alpha z below
    0, masks would be negative: training diverges late, and components split."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        upwards = ctx.alpha * dg.clamp(max=0)
        return torch.where(z > 0, dg, upwards).masked_fill_(z > 1, 0), None


class UpperLeaky(torch.autograd.Function):
    """clamp(z, 0, 1), for the penalty, but above 1 the value is 1 + alpha (z - 1): the penalty can
    still pull back a z far above 1."""
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        above = (z - 1).clamp_(min=0)
        return z.clamp(0, 1).add_(above, alpha=alpha)

    @staticmethod
    def backward(ctx, dg):
        z, = ctx.saved_tensors
        return torch.where(z > 1, ctx.alpha * dg, dg).masked_fill_(z <= 0, 0), None


class ImportanceNet(nn.Module):
    """How important is each component at each token?

    Clean inputs of both matrices -> logits z, (.., C) per matrix; the caller clamps z to get g. Its
    own nonlinearity is the exact GELU, not the target's.

    global  one net on the RMS-normed inputs of both matrices, two hidden layers
    shared  one net per matrix on its input, one hidden layer
    vector  one net per component on the input of its matrix, one hidden layer
    mlp     one net per component on the number x V[:, c], one hidden layer, as in SPD
    """
    def __init__(self, kind, d_ins, C, hidden, gen):
        super().__init__()
        self.kind = kind
        self.C = C
        self.is_per_component = kind in ("mlp", "vector")
        self.nets = nn.ModuleList()
        for sizes in self.layer_sizes(d_ins, hidden):
            net = nn.ParameterList()                    # W, b, W, b, ..
            for n_in, n_out in zip(sizes, sizes[1:]):
                net.extend(self.layer(n_in, n_out, gen))
            self.nets.append(net)
        # logits start around 0.5, so that at most tokens the clamp is not flat
        for net in self.nets:
            nn.init.constant_(net[-1], 0.5)

    def layer_sizes(self, d_ins, hidden):
        """Widths from input to output of each net."""
        if self.kind == "global":
            return [[sum(d_ins), hidden, hidden, self.C * len(d_ins)]]
        n_out = 1 if self.is_per_component else self.C
        return [[1 if self.kind == "mlp" else d_in, hidden, n_out] for d_in in d_ins]

    def layer(self, n_in, n_out, gen):
        """A random matrix (n_in, n_out) and a zero bias, or C of each where every component has its
        own net."""
        many = (self.C,) if self.is_per_component else ()
        return torch.randn(*many, n_in, n_out, generator=gen) / n_in**0.5, torch.zeros(*many, n_out)

    def forward(self, inputs, Vs):
        lead = inputs[0].shape[:-1]                     # (B, T)
        if self.is_per_component:
            logits = [self.per_component(net, x, V) for net, x, V in zip(self.nets, inputs, Vs)]
            return [z_CN.T.unflatten(0, lead) for z_CN in logits]
        if self.kind == "global":
            normed = [F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in inputs]
            inputs = [torch.cat(normed, -1)]
        logits = []
        for net, x in zip(self.nets, inputs):
            for i, (W, b) in enumerate(zip(net[::2], net[1::2])):
                x = F.linear(F.gelu(x) if i else x, W.T, b)
            logits += x.split(self.C, -1)
        return logits

    def per_component(self, net, x, V):
        """Logits (C, N) of one matrix's components. Positions come last: gelu and products would
        crawl over rows of one or a few numbers."""
        if self.kind == "mlp":
            z = (x @ V).flatten(0, -2).T.unsqueeze(1)                       # (C, 1, N)
        else:
            z = x.flatten(0, -2).T.expand(self.C, -1, -1)                   # (C, d_in, N)
        for i, (W, b) in enumerate(zip(net[::2], net[1::2])):
            z = torch.baddbmm(b.unsqueeze(-1), W.mT, F.gelu(z) if i else z)
        return z.squeeze(1)


# --------------------------------------------------------------------------- the decomposition
class SPD(nn.Module):
    """V (d_in, C) and U (C, d_out) of each matrix, and the importance net.

    Ws (d_in, d_out), bs (d_out): the frozen weights and biases of W_in and W_out. They are plain
    lists, so they are neither trained nor saved. act: the nonlinearity between the matrices."""
    # for evals.py, as is what follows "The seam" below
    kind = "component"
    matrices = SITES
    thresholds = TAUS

    def __init__(self, Ws, bs, cfg, gen, layer=0, act=gelu):
        super().__init__()
        self.Ws = Ws
        self.bs = bs
        self.C = cfg.C
        self.layers = [layer]
        self.act = act
        self.V = nn.ParameterList(
            torch.randn(len(W), cfg.C, generator=gen) / len(W)**0.5 for W in Ws)
        self.U = nn.ParameterList(
            torch.randn(cfg.C, W.shape[1], generator=gen) / cfg.C**0.5 for W in Ws)
        d_ins = [len(W) for W in Ws]
        self.importance_net = ImportanceNet(cfg.ci_fn, d_ins, cfg.C, cfg.ci_hidden, gen)
        self.to(Ws[0].device)

    def site(self, masks, rest_masks, detach=False):
        """The matrices under given masks."""
        return MaskedMatrices(self, masks, rest_masks, detach)

    def masked(self, importance, sources, detach=False):
        """The matrices under mask = g + (1 - g) source. sources: one tensor per matrix, then one
        per rest, where g = 0 makes the source the mask."""
        n = len(importance)
        # lerp(g, 1, source) = g + (1 - g) source; zip leaves the sources of the rests out
        masks = [torch.lerp(g, g.new_ones(()), r) for g, r in zip(importance, sources)]
        return self.site(masks, sources[n:], detach)

    # The seam: what evals.py asks of every method. Units are W_in's components, then W_out's; f is
    # the causal importance g.
    @property
    def params_F(self):
        return torch.cat([torch.full((self.C,), sum(W.shape)) for W in self.Ws])

    def unit_directions(self):
        return [(name, V.T, U, None) for name, V, U in zip(self.matrices, self.V, self.U)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [x_ND, self.act(gpt.mlp(self.layers[0]).c_fc(x_ND))]

    def encode(self, layer, x_BTD, mlp):
        inputs = [x_BTD, self.act(mlp.c_fc(x_BTD))]
        return torch.cat(self.importance_net(inputs, self.V), -1).clamp(0, 1)

    def without_rest(self, f_BTF):
        """The matrices with importances as masks and the rest masked to 0: only components and
        biases write."""
        return self.site(f_BTF.split(self.C, -1), f_BTF.new_zeros(2, 1))

    def decode(self, layer, f_BTF, x_BTD):
        return self.without_rest(f_BTF).mlp(x_BTD)

    def strength(self, layer, f_BTF, x_BTD):
        """How much does each component pass on? mask (x . V[:, c]) |U[c]|, signed: how far it
        writes along U[c], or against it. (-V, -U), an equal component, has the opposite sign."""
        h_BTM = self.act(self.without_rest(f_BTF)(0, x_BTD))
        inner = [x_BTD @ self.V[0], h_BTM @ self.V[1]]
        sizes = [U.norm(dim=1) for U in self.U]
        masks = f_BTF.split(self.C, -1)
        return torch.cat([m * h * size for m, h, size in zip(masks, inner, sizes)], -1)

    def contrib(self, layer, f_BTF, x_BTD, units):
        """What does each named unit add to the output? (B, T, units, D), without the rest.

        W_out's component: its own term, mask (h . V[:, c]) U[c]. W_in's component acts through the
        nonlinearity: the output less the output without it, an exact rank-one change of what enters
        the nonlinearity."""
        V_in, V_out = self.V
        U_in, U_out = self.U
        mask_in, mask_out = f_BTF.split(self.C, -1)
        is_in = units < self.C
        i = units[is_in]                    # numbers within W_in
        j = units[~is_in] - self.C          # numbers within W_out
        out = f_BTF.new_empty(*x_BTD.shape[:2], len(units), x_BTD.shape[-1])

        # what enters the nonlinearity, with all components and without each named one of W_in
        z_BT1M = self.without_rest(f_BTF)(0, x_BTD).unsqueeze(-2)
        own_BTC = mask_in * (x_BTD @ V_in)
        z_without_BTIM = z_BT1M - own_BTC[..., i, None] * U_in[i]
        lost_BTIM = self.act(z_BT1M) - self.act(z_without_BTIM)
        out[..., is_in, :] = ((lost_BTIM @ V_out) * mask_out.unsqueeze(-2)) @ U_out

        # each component of W_out: mask (h . V[:, c]), then times U[c]
        passed_BTC = (mask_out.unsqueeze(-2) * (self.act(z_BT1M) @ V_out)).squeeze(-2)
        out[..., ~is_in, :] = passed_BTC[..., j, None] * U_out[j]
        return out


class MaskedMatrices:
    """Both matrices of an SPD under masks (.., C) and masks of the rest (.., 1), one of each per
    matrix.

    detach: V and U are constants, for an attack that climbs on the masks alone."""
    def __init__(self, spd, masks, rest_masks, detach=False):
        self.spd = spd
        self.masks = masks
        self.rest_masks = rest_masks
        self.V = [V.detach() for V in spd.V] if detach else spd.V
        self.U = [U.detach() for U in spd.U] if detach else spd.U

    def __call__(self, i, x, frozen=None):
        """What does matrix i make of x? frozen: x W, if it is known.

        y = ((x V) * mask) U + rest_mask * (x (W - V U)) + b
          = ((x V) * (mask - rest_mask)) U + rest_mask * (x W) + b      never forms W - V U"""
        if frozen is None:
            frozen = x @ self.spd.Ws[i]
        return fused.masked_lowrank(x, self.V[i], self.U[i], self.masks[i], self.rest_masks[i],
                                    frozen, self.spd.bs[i])

    def mlp(self, x, frozen=None):
        """The MLP's output; frozen: x W_in, if it is known."""
        return self(1, self.spd.act(self(0, x, frozen)))


class Rounded:
    """An SPD whose importances are rounded: f is 1 where g > tau, else 0. All other attributes are
    those of the SPD, `raw`."""
    def __init__(self, raw, tau):
        self.raw = raw
        self.tau = tau

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def encode(self, layer, x_BTD, mlp):
        return (self.raw.encode(layer, x_BTD, mlp) > self.tau).float()


# ------------------------------------------------------------------------------- loss terms
def faithfulness(spd, form):
    """How far are the components from adding up to the weights? 0 = exact.

    form "relative": |rest|^2 / |W|^2, mean over matrices; "absolute": |rest|^2 of both matrices,
    per weight."""
    wrong = [(W - V @ U).square().sum() for W, V, U in zip(spd.Ws, spd.V, spd.U)]
    if form == "absolute":
        return sum(wrong) / sum(W.numel() for W in spd.Ws)
    return sum(s / W.square().sum() for s, W in zip(wrong, spd.Ws)) / len(wrong)


def penalties(importance, cfg, progress):
    """How much is called important? (imp, freq): imp = (1/N) sum_c s_c, freq = (1/N) sum_c s_c
    log2(1 + a s_c / N).

    importance: z clamped by UpperLeaky, so that phi is of a g that can exceed 1. The frequency term
    makes one component that is on at two kinds of tokens dearer than two, one for each kind."""
    g_NC = torch.cat(importance, -1).flatten(0, -2)
    N = len(g_NC)
    if cfg.penalty == "smooth_l0":
        width = 1 + (cfg.gamma_end - 1) * min(1, progress / 0.9)
        g2_NC = g_NC.square()
        s_C = (g2_NC / (g2_NC + width**2)).sum(0)
    else:
        p = cfg.p_start + (cfg.p_end - cfg.p_start) * progress
        s_C = ((g_NC + 1e-12) ** p).sum(0)
    # s_C / N: at which share of the whole batch's positions a component is important
    a = cfg.freq_a or N
    return s_C.sum() / N, (s_C * torch.log2(1 + a * s_C / N)).sum() / N


def stochastic(importance, gen):
    """Random sources: one per position and component, then one per position for the rest of each
    matrix.

    At each position a random number of the matrices is masked, at least one. Each matrix that is
    not gets sources of 1: all of its masks are 1, so it makes exactly x W + b."""
    device = importance[0].device
    lead = importance[0].shape[:-1]
    n = len(importance)
    sources = [torch.rand(g.shape, generator=gen, device=device) for g in importance]
    rest_sources = [torch.rand(*lead, 1, generator=gen, device=device) for _ in importance]

    k = torch.randint(1, n + 1, (*lead, 1), generator=gen, device=device)
    # a random rank of each matrix, 0 to n - 1: those of rank k and more stay frozen
    order = torch.rand(*lead, n, generator=gen, device=device).argsort(-1).argsort(-1)
    is_frozen = (order >= k).split(1, -1)
    for source, rest_source, frozen in zip(sources, rest_sources, is_frozen):
        source.masked_fill_(frozen, 1.)
        rest_source.masked_fill_(frozen, 1.)
    return sources + rest_sources


def source_sizes(spd):
    """How many sources does a position have? C for each matrix, then one for the rest of each."""
    return [spd.C] * len(spd.Ws) + [1] * len(spd.Ws)


def sign_step(spd, importance, batch, gen):
    """Sources that make the KL worse: from a random start, one step of size 1 along the sign of its
    gradient, clamped to [0, 1]. So each source ends at 0 or at 1.

    One source per component is shared by all positions. V, U and the importance net are constants.
    The attack by which an SPD is judged takes many small steps (metrics/masks.py)."""
    importance = [g.detach() for g in importance]
    device = importance[0].device
    sources = [torch.rand(n, generator=gen, device=device) for n in source_sizes(spd)]
    sources = [source.requires_grad_() for source in sources]
    loss = batch.divergence(spd.masked(importance, sources, detach=True))[0]
    grads = torch.autograd.grad(loss, sources)
    moved = [source.detach() + grad.sign() for source, grad in zip(sources, grads)]
    return [source.clamp_(0, 1) for source in moved]


class PersistentPGD(nn.Module):
    """An attack that lives through training (VPD): a source for each sequence, position and
    component, moved by Adam.

    On each batch it takes `adv_ascents` steps up the KL with everything else constant (`ascend`).
    Then the loss is taken at these sources, and its backward leaves a gradient on them too: `train`
    lets that make one more step up (`step`)."""
    def __init__(self, spd, cfg, gen):
        super().__init__()
        self.cfg = cfg
        shapes = [(cfg.B, cfg.T, n) for n in source_sizes(spd)]
        self.sources = nn.ParameterList(
            torch.rand(shape, generator=gen, device=gen.device) for shape in shapes)
        self.opt = torch.optim.Adam(self.parameters(), betas=(0.5, 0.99), maximize=True)

    def ascend(self, spd, importance, batch, progress):
        importance = [g.detach() for g in importance]
        self.opt.param_groups[0]["lr"] = self.cfg.adv_lr * min(1, progress / 0.025)
        for _ in range(self.cfg.adv_ascents):
            batch.divergence(spd.masked(importance, list(self.sources), detach=True))[0].backward()
            self.step()
        return list(self.sources)

    @torch.no_grad()
    def step(self):
        self.opt.step()
        self.opt.zero_grad()
        for source in self.sources:
            source.clamp_(0, 1)


def loss_fn(spd, batch, cfg, progress, gen, pgd=None):
    """What one step minimises: (total, its terms, importances). progress: share of training done, 0
    to 1.

    batch: a CleanPass, or any Batch. pgd: the PersistentPGD, if there is one."""
    # How important is each component at each token? Clamped twice: the two have other gradients
    # outside [0, 1], and above 1 the second has a larger value.
    logits = spd.importance_net(batch.inputs, spd.V)
    importance = [LowerLeaky.apply(z, cfg.alpha) for z in logits]       # for the masks: can wake
    penalised = [UpperLeaky.apply(z, cfg.alpha) for z in logits]        # for the penalty

    # Ablating what is unimportant must not change the predictions: by random amounts ..
    sources = [stochastic(importance, gen)]
    # .. nor by the amounts that an attack finds.
    if pgd:
        sources.append(pgd.ascend(spd, importance, batch, progress))
    elif cfg.adversary != "none":
        sources.append(sign_step(spd, importance, batch, gen))
    # one KL for each list of sources
    found = batch.divergence(*[spd.masked(importance, source) for source in sources])
    stoch = found[0]
    adv = found[1] if len(found) > 1 else torch.zeros(())

    # Little may be important, and the components must add up to the weights.
    imp, freq = penalties(penalised, cfg, progress)
    faith = faithfulness(spd, cfg.faith)
    total = (cfg.c_faith * faith + cfg.c_stoch * stoch + cfg.c_adv * adv
             + cfg.c_imp * (imp + cfg.w_freq * freq))
    terms = dict(loss=total, faith=faith, stoch=stoch, adv=adv, imp=imp, freq=freq)
    return total, terms, importance


class Batch(NamedTuple):
    """What loss_fn asks of a batch. CleanPass offers it for a language model; tests make others."""
    inputs: list                    # what each matrix reads in a clean pass
    divergence: Callable            # (*masked matrices) -> how far is the output from the clean one
                                    # with each of these in the MLP's place? One number for each


class CleanPass:
    """One pass of a batch through the model as it is, without gradients: what the matrices read,
    and the predictions to preserve."""
    def __init__(self, gpt, spd, idx_BT):
        with torch.no_grad():
            self.x_BTD, stream_BTD = gpt.prefix(idx_BT, spd.layers[0])
            self.frozen_BTM = self.x_BTD @ spd.Ws[0]            # once for all masks
            h_BTM = spd.act(self.frozen_BTM + spd.bs[0])
            y_BTD = h_BTM @ spd.Ws[1] + spd.bs[1]
            # y_hat_BTD -> KL at each position, of the model with y_hat in the place of y
            self.distance = gpt.distance_from(stream_BTD, y_BTD, spd.layers[0])
        self.inputs = [self.x_BTD, h_BTM]

    def divergence(self, *masked):
        """KL(clean || masked) in nats, mean over positions: one number for each of the masked
        matrices. All of them go through the model above the MLP as one batch."""
        y = torch.cat([matrices.mlp(self.x_BTD, self.frozen_BTM) for matrices in masked])
        return self.distance(y).view(len(masked), -1).mean(1)


# ---------------------------------------------------------------------------------- training
@torch.no_grad()
def project(spd):
    """Move V U onto W by the smallest change of one factor.

    V + rest U^+ where W is taller than wide, as W_out is, else U + V^+ rest; rest = W - V U, ^+ is
    the pseudo-inverse. That is exact where C is at least min(D, M), else the nearest sum that this
    factor can make."""
    for W, V, U in zip(spd.Ws, spd.V, spd.U):
        rest = (W - V @ U).double()
        if len(W) > W.shape[1]:
            V += (rest @ torch.linalg.pinv(U.double())).to(V)
        else:
            U += (torch.linalg.pinv(V.double()) @ rest).to(U)


def balanced(V, U):
    """The same components, scaled so that |V[:, c]| = |U[c]|. One that is 0 stays 0."""
    ratio_C = U.norm(dim=1) / V.norm(dim=0).clamp(min=1e-9)
    scale_C = ratio_C.sqrt().clamp(min=1e-9)
    return V * scale_C, U / scale_C.unsqueeze(1)


@torch.no_grad()
def start_at_smallest(spd):
    """Keep V at random and choose the smallest U whose sum is W, U = V^+ W (W_out, which is taller
    than wide: keep U, V = W U^+), then scale each component such that |V[:, c]| = |U[c]|.

    More components than ranks have many U for one V. They differ by parts that cancel each
    other."""
    for W, V, U in zip(spd.Ws, spd.V, spd.U):
        if len(W) > W.shape[1]:
            V.copy_(W.double() @ torch.linalg.pinv(U.double()))
        else:
            U.copy_(torch.linalg.pinv(V.double()) @ W.double())
        V[:], U[:] = balanced(V, U)


@torch.no_grad()
def start_at_neurons(spd):
    """Make neuron k's own weights component k of both matrices.

    It is W_in[:, k] times the k-th unit vector, and the k-th unit vector times W_out[k], scaled so
    that |V[:, k]| = |U[k]|. The components beyond the neurons stay random, but small."""
    for W, V, U in zip(spd.Ws, spd.V, spd.U):
        reads_neurons = len(W) > W.shape[1]                 # W_out does, W_in writes them
        # root of each neuron's weight norm
        size_M = W.norm(dim=1 if reads_neurons else 0).sqrt()
        M = len(size_M)
        V.mul_(SMALL)
        U.mul_(SMALL)
        V[:, :M] = size_M.diag() if reads_neurons else W / size_M
        U[:M] = W / size_M.unsqueeze(1) if reads_neurons else size_M.diag()


def begin(spd, cfg):
    """Put V and U where training starts. Their product is W, exactly where C is at least min(D, M).

    smallest  one of them is random, the other the smallest that makes the sum W
    random    both are random, then one is moved onto W (`project`)
    neurons   each neuron's own weights"""
    if cfg.start == "smallest":
        return start_at_smallest(spd)
    if cfg.start == "neurons":
        start_at_neurons(spd)
    project(spd)


def rates(spd, cfg):
    """The learning rate of each V, then of each U: lr, with lr_scaled lr root(s / ratio).

    s: root mean square of the singular values of W. Where W is s times as large, V and U are
    root(s) times as large. ratio: rows / columns of a V or U that is tall, else 1, as torch's Muon
    makes the steps of tall matrices longer by root(ratio): each U[c] would move as far for all C,
    while it gets shorter as 1 / root(C). Adam: 1; it moves each weight as far for all C."""
    scaled = []
    for W, weight in [*zip(spd.Ws, spd.V), *zip(spd.Ws, spd.U)]:
        s = W.norm().item() / min(W.shape) ** 0.5
        rows, columns = weight.shape
        ratio = max(1, rows / columns) if cfg.optimizer == "muon" else 1
        scaled.append(cfg.lr * (s / ratio) ** 0.5)
    return scaled if cfg.lr_scaled else [cfg.lr] * len(scaled)


def optimizers(spd, cfg):
    """Which optimizer has which weights, at which rate?

    V and U: Muon or Adam at their `rates`. The importance net's matrices: Muon or Adam at --lr_ci.
    What is no matrix, its biases and the (C, n_in, n_out) weights of nets per component: Adam, at
    --lr_rest beside Muon, else at --lr_ci."""
    takes_all = cfg.optimizer == "adam"
    turned = []         # of the importance net, at --lr_ci
    rest = []           # and at --lr_rest; not W - V U
    for net in spd.importance_net.nets:
        for W, b in zip(net[::2], net[1::2]):
            (turned if takes_all or W.ndim == 2 else rest).append(W)
            (turned if takes_all else rest).append(b)
    groups = [dict(params=[weight], lr=lr)
              for weight, lr in zip([*spd.V, *spd.U], rates(spd, cfg))]
    if turned:
        groups.append(dict(params=turned, lr=cfg.lr_ci))
    return common.optimizers(cfg.optimizer, groups, rest, cfg.lr, cfg.lr_rest)


def update(spd, opts, loss, cfg, progress):
    """Take one step: set cosine learning rates, clip the gradient of V and U and that of the
    importance net, each to a norm of its own, shrink V and U. Returns the sum of both norms before
    clipping.

    Shrinking bounds what Muon can reach: singular values of V and U settle below root(s) / decay,
    those of V U below s / decay^2, 25 s at 0.2; s: see `rates`."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    share = cfg.lr_end + (1 - cfg.lr_end) * cosine
    common.set_rates(opts, share)
    for opt in opts.values():
        opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([*spd.V, *spd.U], cfg.clip_vu)
    norm = norm + nn.utils.clip_grad_norm_(spd.importance_net.parameters(), cfg.clip_ci)
    with torch.no_grad():
        for weight in (*spd.V, *spd.U):
            weight.mul_(1 - cfg.decay * cfg.lr * share)
    for opt in opts.values():
        opt.step()
    return norm


def check_memory(cfg, gpt):
    """Fail if there is less memory than a training takes, weights and activations of a step. How
    many activations that are was measured."""
    common.check(cfg)
    D = gpt.cfg.n_embd
    M = gpt.cfg.n_inner
    # V, U; the importance net, whose last layer has a row for each component
    n_weights = 2 * cfg.C * (D + M) + (D + M + 2 * cfg.C) * cfg.ci_hidden
    if cfg.ci_fn == "vector":
        n_weights += cfg.C * (D + M) * cfg.ci_hidden
    if cfg.ci_fn == "global":
        n_weights += cfg.ci_hidden ** 2
    common.need_for_training(n_weights, cfg.B * cfg.T * 40 * cfg.C, f"--C {cfg.C} --ci_hidden "
                             f"{cfg.ci_hidden} --B {cfg.B} --T {cfg.T}", gpt.device)


def build(cfg, gpt):
    """A fresh SPD of the MLP that cfg names, after checking cfg against the target."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    common.check(replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 T=f"[3, {gpt.cfg.n_positions}]", eval_tokens=f"[{cfg.T}, inf]")
    mlp = gpt.mlp(layer)
    rank = min(mlp.c_fc.weight.shape)
    if cfg.C < rank:
        print(f"--C {cfg.C}: fewer components than the weights have ranks, {rank}; "
              "they can't add up to them")
    if cfg.start == "neurons" and cfg.C < gpt.cfg.n_inner:
        common.fail(f"--start neurons --C {cfg.C}: must be at least the number of neurons, "
                    f"{gpt.cfg.n_inner}")
    Ws = [mlp.c_fc.weight, mlp.c_proj.weight]
    bs = [mlp.c_fc.bias, mlp.c_proj.bias]
    return SPD(Ws, bs, cfg, common.generator(cfg.seed, "init"), layer, mlp.act)


def load(path, gpt):
    """Load the decomposition as it is evaluated: with masks rounded at ON_ABOVE."""
    tensors, cfg = common.load_trained(path, Config, gpt)
    spd = build(cfg, gpt)
    common.unflat(tensors, spd=spd)
    return Rounded(spd.requires_grad_(False), ON_ABOVE)


def train(cfg):
    device = common.device(cfg.device)
    gpt = GPT.load(cfg.model, device)
    check_memory(cfg, gpt)
    spd = build(cfg, gpt)
    corpus = data.load_for(gpt, cfg.data, cfg.T)
    gen = common.generator(cfg.seed, "masks", device)
    opts = optimizers(spd, cfg)
    pgd = PersistentPGD(spd, cfg, gen) if cfg.adversary == "pgd" else None
    adversary = dict(pgd=pgd, pgd_opt=pgd.opt) if pgd else {}
    text = data.fingerprint(cfg.data)
    run = common.Run(cfg, gpt, text, spd=spd, gen=gen, **opts, **adversary)
    if run.is_fresh:
        begin(spd, cfg)

    for step in run.steps():
        progress = step / cfg.steps
        # one clean pass: what the matrices read, and the predictions to preserve
        idx_BT = corpus["train"].batch(step, cfg.B, cfg.T, cfg.seed).to(device)
        batch = CleanPass(gpt, spd, idx_BT)
        loss, terms, importance = loss_fn(spd, batch, cfg, progress, gen, pgd)
        norm = update(spd, opts, loss, cfg, progress)
        if pgd:
            pgd.step()              # by the gradient that the loss left on the sources
        if run.is_logged:
            on_per_token = [(g > ON_ABOVE).sum(-1).float().mean() for g in importance]
            run.record(terms, norm, l0_in=on_per_token[0], l0_out=on_per_token[1])
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            run.log(step=step, **small_evaluation(cfg, gpt, spd, corpus))
        # before run.steps() saves the last checkpoint
        if run.is_last and cfg.project:
            project(spd)
    return spd, summarise(cfg, gpt, spd, corpus, run.seconds)


def small_evaluation(cfg, gpt, spd, corpus):
    """KL under each of the masks on eight sequences of fit, for the log. It draws from a generator
    of its own, so that how often one looks changes no training."""
    device = spd.bs[0].device
    gen = common.generator(cfg.seed, "eval", device)
    rows = corpus["fit"].rows(cfg.T, 8).to(device)
    found = evals.scores(gpt, rows, masks.mask_table(spd, TAUS, gen))
    return {f"kl {name}": row["kl"] for name, row in found.items()}


# ----------------------------------------------------------------------------------- summary
def summarise(cfg, gpt, spd, corpus, seconds):
    """Print what was found, write summary.json.

    fit and test are two splits of the text that training does not see: the mean outputs of
    ablations and each unit's concept are chosen on fit, all figures are measured on test."""
    layer, = spd.layers
    device = spd.bs[0].device
    gen = common.generator(cfg.seed, "summary", device)
    n_rows = cfg.eval_tokens // cfg.T
    fit, test = (corpus[split].labelled(cfg.T, n_rows, device) for split in ("fit", "test"))
    few = test[0][:cfg.pgd_rows]

    # cross-entropy and KL under each of the masks, and under the attack
    floor = evals.ablations(gpt, layer, fit[0])
    ladder, worst = masks.worst_sources(spd, gpt, few, gen)
    attacked = masks.replacing(spd, partial(masks.masks_from, sources=worst))
    attack = evals.scores(gpt, few, floor | {"pgd20": attacked})
    table = evals.scores(gpt, test[0], floor | masks.mask_table(spd, TAUS, gen))

    # the components of each matrix: how many are on, alive, and what they mean
    first = {name: i * spd.C for i, name in enumerate(SITES)}
    groups = {name: torch.arange(spd.C, device=device) + at for name, at in first.items()}
    main = TAUS.index(ON_ABOVE)
    lines, out = evals.report(spd, gpt, fit, test, corpus["test"].names, groups, TAUS, main)
    l0 = sum(out[f"l0_{name}"] for name in SITES)
    alive = sum(out[f"alive_{name}"] for name in SITES)
    errors = {name: evals.relative_error(V @ U, W)
              for name, V, U, W in zip(SITES, spd.V, spd.U, spd.Ws)}

    out |= evals.score_keys(table)
    out |= dict(kl_pgd20=ladder[masks.STEPS], seconds=seconds, l0=l0)
    out["active_params"] = l0 * sum(spd.Ws[0].shape)
    out["dead_fraction"] = 1 - alive / len(spd.params_F)
    out["ce_recovered"] = out[f"ce_recovered_rounded_{ON_ABOVE}"]
    # with importances as masks, not rounded
    out["fve"] = evals.usage(spd, gpt, layer, test[0])["fve"]
    out |= {f"weight_error_{name}": error for name, error in errors.items()}

    tokens = cfg.steps * cfg.B * cfg.T
    head = f"\nlayer {layer}, {spd.C} components per matrix, {tokens:,} tokens, {seconds:.0f} s"
    how = (f"pgd20: {masks.STEPS} sign steps of {masks.SIZE}, "
           f"one source for all positions of {len(few)} sequences")
    scores = [*evals.score_lines(table, table), *evals.score_lines(attack, ["pgd20"])]
    sums = [f"|W - VU| / |W| of W_{name}: {error:.3%}" for name, error in errors.items()]
    print(head, *scores, how, *sums, *lines, sep="\n")
    found = out | common.provenance(cfg, gpt)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return out


def main(cfg):
    if cfg.sweep:
        values = [cfg.c_imp * share for share in curve.SHARES]
        return curve.sweep(train, cfg, "c_imp", values)
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
