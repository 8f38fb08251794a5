"""APD: which few parameter components, each across all matrices, does a network use on each input?

The weights are written as a sum of components. A component is a matrix beside each weight matrix,
of low rank. On each input the components that a gradient says the output depends on most, k of them
on average, must give the output alone, and those that do should have as little rank as possible.

    W = sum_c P_c           P_c: component c, a matrix for each W: P_c = V_c U_c, V_c (d_in, R) and
                            U_c (R, d_out)
    A_c(x) = (1/N) sum_o (sum_ij dy_o/dW_ij P_c,ij)^2       attribution: the sum is over all weights
                            of all matrices, the gradients are the network's own
    mask = 1 for the k B largest A_c(x) of a batch of B inputs, else 0           (batch top-k)
    loss = c_faith  |W - sum_c P_c|^2                   components add up to the weights
         + beta     |y - y(mask)|^2                     those with mask 1 do the work alone
         + alpha    sum_c mask_c sum_r (|V_c[:, r]| |U_c[r]|)^p     .. and are simple: the Schatten
                                                        p-norm of P_c, by its rank-one pieces
         + c_hidden |h - h(mask)|^2                     of what W_out reads (ResidMLP)
The first and third are means over the weights, all but the first over inputs.

APD, attribution-based parameter decomposition: Braun, Bushnaq, Heimersheim, Mendel, Sharkey 2025
(arXiv:2501.14926), which came before SPD: k, a number that has to be known, became a penalty; the
attribution, a linear guess, became a trained importance; and a component one matrix of rank 1.

No gradient flows through A: it only chooses. So it is computed forwards, without one backward pass
for each output: the inner sum is how fast y_o moves as the weights move along P_c (`attributions`).

What limits it: two features that share a component, while another one is left over. Which do is
settled early, and k and C have to be right. What was measured stands above SETTINGS.

Differs from the paper: only rows with a feature on, as on the others all attributions are 0, with k
and the losses scaled to mean the same; 128 or 512 of them in a step; fewer steps; a cosine to 0;
on ResidMLP components of rank 1, whose V is not held at norm 1. Its settings stand above SETTINGS.

B rows, N features, D width of the embedding, M hidden width, C components, R rank of a component

    python apd.py           # the toys of toys.py, beside SPD, 132 runs: 70 minutes on one core.
                            # Found by APD, by SPD: TMS 5-2 8 and 9 of 10 seeds, 40-10 0 and 7,
                            # ResidMLP 4 and 8; with a knob at half or twice 1 of 36 and 11 of 18
    python apd.py --toys 5-2 --seeds 1 --around 0 --out runs/apd        # a look: a minute
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

import common
import compare
import evals
import spd
import toys
from model import GPT, default_layer
from report.table import markdown_table, mean_text
from studies.kept import Found, apart


@dataclass
class Config:
    # what to decompose, where to write
    toys: str = "5-2,40-10,resid"   # which of the toys, comma-separated
    seeds: int = 10                 # [1, 1e6] seeds of each toy, of APD and of SPD
    around: int = 3                 # [0, 1e6] of them at half and twice k, alpha, SPD's c_imp
    model: str = "target"           # folder of the GPT-2 for which a step's cost is measured
    out: str = "results"            # folder for apd.json and apd.md; a part: results-part
    # APD's components; no flag from here on changes SPD's runs
    C: int = -1                     # [-1, 1e6] APD's components. -1, here and below: the toy's own
    R: int = -1                     # [-1, 1e6] rank of a component
    # loss
    k: float = -1.                  # [-1, 1e6] components on for an input, on average
    alpha: float = -1.              # [-1, 1e9] simplicity
    beta: float = -1.               # [-1, 1e9] minimality: the output by the chosen ones alone
    p: float = -1.                  # [-1, 2] exponent of the Schatten norm
    c_faith: float = 1.             # [0, 1e9] faithfulness
    c_hidden: float = -1.           # [-1, 1e9] what W_out reads, by the chosen ones alone
    # training
    steps: int = -1                 # [-1, 1e8] training steps
    B: int = -1                     # [-1, 1e6] rows per step, each with a feature on
    optimizer: Literal["adam", "muon"] = "adam"     # of V and U
    lr: float = -1.                 # [-1, 100] rate, after 5 % of the steps
    hold: float = -1.               # [-1, 1) share of the steps at that rate; then a cosine to 0


# Public configurations, of the authors' code or forks of it, rows with no feature on included: 5-2
# has 2,048 rows and holds a rate of .03; 40-10 R 10, alpha 15, beta 10, p .9, 2,048 rows, 20,000
# steps, 1e-3 along a cosine (and, in a later study by others with that code, C 50 and k 1, half of
# the features that are on); ResidMLP C 130, R 50, k 1.28, alpha 10, p .9, c_hidden 1, V at norm 1,
# 256 rows, 10,000 steps, 1e-3 along a cosine.
# TMS 5-2. A start at the truth, each component one feature's weights, ends at a loss of .0162 with
# MMCS .998 and ML2R .896: that the norms are too small is the objective's doing, which saves by it,
# and not the optimizer's. From random starts, with a cosine from the first step on (B 512, 3,000 or
# 4,000 steps), 1 of 6 seeds finds the features; in the others two share a component. With the rate
# held for 70 % of 6,000 steps 5 of 5 do, with B 512 and with 128, all at a loss of .0162: the noise
# of a high rate shakes two features out of one component.
# With more components than features these are split: C 10 and C 20, 2,000 steps, no seed of 5, 5 to
# 9 alive; by Muon the same, 7 to 10. So C has to be known.
TMS_5_2 = dict(
    C=5, R=2, k=0.211, alpha=0.7, beta=1., p=1., c_hidden=0., steps=6000, B=128,
    lr=0.03, hold=0.7)
# TMS 40-10, seed 0. A start at the truth stays there, at a loss of .083, with ML2R .922; from
# random starts the loss is .090 to .104 and some features share a component. Errors: 6 with B 512,
# R 10, 3e-3 and a cosine over 4,000 steps; with the rate held for 70 % of 6,000 steps 14; with R 4,
# held, 4,000 steps, 17. B 128, 3,000 steps, held: R 4 at 3e-3 18, at .01 11, by Muon at .02 15;
# R 10 at 3e-3 12, at .01 13, by Muon at .03 13; R 10, 1e-3, a cosine over 5,000 steps 25. Noise
# does not help here: which features share a component is settled after 1,500 steps.
# R 1, C 40, B 512, k 2: 20 errors at 3e-3, 18 at .01 (held or not); R 2 at .01, held: 8, 38 alive.
# k below 2 leaves features to share: R 10, k 1.25, C 40 18 errors, 29 alive; C 50 11, 34; k 1, C 50
# 10, 32 alive, MMCS .895. More components help little: C 50, k 2 10 errors, 43 alive, MMCS .964.
# R 4 at .01, held, 8,000 steps: 11 errors, 37 alive, MMCS .948, ML2R .834.
# C 80: .076, below the truth's loss, with 54 alive: the objective itself wants features split.
TMS_40_10 = dict(
    C=40, R=10, k=2., alpha=15., beta=10., p=0.9, c_hidden=0., steps=4000, B=512,
    lr=3e-3, hold=0.)
# ResidMLP, seed 0, C 130. k decides: only features above 0, half of those that are on, move the
# output, and with a larger k a second component is on beside a feature's own. k 1.28: 221 errors,
# MMCS .988, ML2R .81; 1: 138, .994, .89; .9: 107, .996, .92; .6: 21, .998, .974 with 119 alive; .5:
# 13, .994, .970 with 107. With C 100 features share components: k .9 137 errors, MMCS .973. The
# rate settles it: k .5 at .01 has 0 and 4 errors in two seeds, 101 and 99 alive, after 5,000 steps
# 0 and 0, 101 and 100, MMCS .999, ML2R .98. At .02 4 errors; C 110 1 with all alive; k .6 13, .75
# 57.
RESID = dict(
    C=130, R=1, k=0.5, alpha=10., beta=1., p=0.9, c_hidden=1., steps=5000, B=128,
    lr=0.01, hold=0.7)
SETTINGS = {"5-2": TMS_5_2, "40-10": TMS_40_10, "resid": RESID}
# no part of what a decomposition depends on
RUN_ONLY = dict.fromkeys(("toys", "seeds", "around", "model", "out"))
WARM = 0.05                         # share of the steps in which the rate rises
PAPER = {                           # (MMCS, ML2R) of APD and SPD in their papers
    ("5-2", "apd"): (0.998, 0.893), ("40-10", "apd"): (0.996, 0.935),
    ("5-2", "spd"): (1.000, 0.993), ("40-10", "spd"): (1.000, 1.010),
}


# ---------------------------------------------------------------------------------- the method
class APD(nn.Module):
    """V (d_in, C R) and U (C R, d_out) of each weight matrix. Component c has R columns of V and
    rows of U, from c R on. Where W_out is W_in^T, so is each component's piece of it."""
    def __init__(self, toy, cfg, gen):
        super().__init__()
        self.toy = toy
        self.C = cfg.C
        self.R = cfg.R
        width = cfg.C * cfg.R
        own = toy.Ws[:1] if toy.tied else toy.Ws
        self.V = nn.ParameterList(
            torch.randn(len(W), width, generator=gen) / len(W)**0.5 for W in own)
        self.U = nn.ParameterList(
            torch.randn(width, W.shape[1], generator=gen) / width**0.5 for W in own)

    def factors(self):
        """[(V, U)] of W_in and W_out."""
        pairs = list(zip(self.V, self.U))
        if self.toy.tied:
            V, U = pairs[0]
            pairs.append((U.T, V.T))
        return pairs

    def components(self):
        """[(V (d_in, C, R), U (C, R, d_out))] of W_in and W_out."""
        sizes = (self.C, self.R)
        return [(V.unflatten(1, sizes), U.unflatten(0, sizes)) for V, U in self.factors()]

    def site(self, mask_BC):
        """The matrices as Toy.out takes them, with only some components on."""
        return Masked(self, mask_BC)


class Masked:
    """Both matrices of an APD under one mask: site(i, x) = sum_c mask_c x P_c + b."""
    def __init__(self, apd, mask_BC):
        self.factors = apd.factors()
        self.bs = apd.toy.bs
        self.mask = mask_BC.repeat_interleave(apd.R, 1)

    def __call__(self, i, x):
        V, U = self.factors[i]
        return ((x @ V) * self.mask) @ U + self.bs[i]


@torch.no_grad()
def attributions(apd, x_BN):
    """How much does the output depend on each component? A (B, C), at least 0.

    A_c = (1/N) sum_o (d y_o / d e)^2, where the weights are W + e P_c and e = 0. Each matrix moves
    its own output by x P_c; toy.tangent carries that on to y."""
    toy = apd.toy
    x_BD, h_BM = toy.inputs(x_BN)
    (V_in, U_in), (V_out, U_out) = apd.components()
    first_BCM = moves(x_BD, V_in, U_in)
    second_BCN = moves(h_BM, V_out, toy.unembed(U_out))
    return toy.tangent(x_BN, first_BCM, second_BCN).square().mean(-1)


def moves(x, V, U):
    """x P_c of each component: (B, C, d_out)."""
    inner_BCR = torch.einsum("bi,icr->bcr", x, V)
    return torch.einsum("bcr,cro->bco", inner_BCR, U)


def batch_top_k(A_BC, n):
    """1 for the n largest of a batch, else 0."""
    mask = torch.zeros(A_BC.numel())
    mask[A_BC.flatten().topk(n).indices] = 1.
    return mask.view_as(A_BC)


# --------------------------------------------------------------------------------------- losses
def faithfulness(apd):
    """How far are the components from adding up to the weights? Mean over these; 0 = exact."""
    Ws = apd.toy.Ws
    wrong = [(W - V @ U).square().sum() for W, (V, U) in zip(Ws, apd.factors())]
    return sum(wrong) / sum(W.numel() for W in Ws)


def complexities(apd, p):
    """How complex is each component? (C,): sum over matrices and r of (|V_c[:, r]| |U_c[r]|)^p.

    Where these rank-one pieces are orthogonal, their norms are the singular values of P_c. With p
    of at most 1 one piece costs less than two that share its norm."""
    total_C = torch.zeros(apd.C)
    for V, U in apd.components():
        size2_CR = V.square().sum(0) * U.square().sum(2)
        total_C = total_C + (size2_CR + 1e-16).pow(p / 2).sum(1)
    return total_C


def simplicity(apd, mask_BC, p):
    """How complex are the components that are on? Mean over inputs and weights."""
    n_weights = sum(W.numel() for W in apd.toy.Ws)
    return (mask_BC.mean(0) * complexities(apd, p)).sum() / n_weights


def minimality(apd, mask_BC, x_BN):
    """What do the components that are on get wrong alone? Mean squared errors of (the output, what
    W_out reads)."""
    toy = apd.toy
    site = apd.site(mask_BC)
    h = toy.act(site(0, toy.embed(x_BN)))
    y = toy.read_off(site(1, h))
    _, clean_h = toy.inputs(x_BN)
    return (y - toy.clean(x_BN)).square().mean(), (h - clean_h).square().mean()


def how_many_on(cfg, rows, share=1.):
    """How many components are on in so many rows, if they are this share of all rows, and none is
    on in the rest? k per row of all; at least one."""
    return min(max(1, round(cfg.k * rows / share)), cfg.C * rows)


def loss_fn(apd, x_BN, cfg):
    """What one step minimises: (total, its terms). x_BN: rows that have a feature on."""
    # Which components does the output depend on? They have to give it alone ..
    A_BC = attributions(apd, x_BN)
    mask_BC = batch_top_k(A_BC, how_many_on(cfg, len(x_BN), apd.toy.busy))
    minimal, hidden = minimality(apd, mask_BC, x_BN)
    # .. and to be simple, and all together have to be the weights.
    simple = simplicity(apd, mask_BC, cfg.p)
    faith = faithfulness(apd)

    # the means over all rows: rows without a feature have 0 there
    per_row = cfg.beta * minimal + cfg.alpha * simple + cfg.c_hidden * hidden
    total = cfg.c_faith * faith + apd.toy.busy * per_row
    return total, dict(loss=total, faith=faith, minimal=minimal, simple=simple, hidden=hidden)


# ------------------------------------------------------------------------------------- training
def suited(cfg, name):
    """The Config with a toy's own values where cfg leaves them open, after checking it."""
    own = {key: value for key, value in SETTINGS[name].items() if getattr(cfg, key) == -1}
    cfg = replace(cfg, **own)
    at_least_1 = dict.fromkeys(("C", "R", "B"), "[1, inf]")
    at_least_0 = dict.fromkeys(("alpha", "beta", "c_hidden", "steps", "hold"), "[0, inf]")
    common.check(cfg, k=f"(0, {cfg.C}]", p="(0, 2]", lr="(0, 100]", **at_least_1, **at_least_0)
    return cfg


def rate(cfg, step):
    """The learning rate's share of --lr: up, held, then along a cosine to 0."""
    progress = step / cfg.steps
    falling = max(0., progress - cfg.hold) / (1 - cfg.hold)
    return min(1., progress / WARM, 0.5 * (1 + math.cos(math.pi * falling)))


def train(toy, cfg, gen):
    """Decompose a toy: the APD, after cfg.steps steps."""
    apd = APD(toy, cfg, gen)
    opts = common.optimizers(cfg.optimizer, list(apd.parameters()), [], cfg.lr, cfg.lr)
    for step in range(cfg.steps):
        loss, _ = loss_fn(apd, toy.busy_rows(cfg.B, gen), cfg)
        common.set_rates(opts, rate(cfg, step))
        for opt in opts.values():
            opt.zero_grad()
        loss.backward()
        for opt in opts.values():
            opt.step()
    return apd


@torch.no_grad()
def judge(apd, toy, cfg, gen):
    """The verdicts on an APD, as toys.judge gives them for an SPD.

    A component is on above the threshold that lets k on per row, and alive where it is on in
    evals.ALIVE of the rows."""
    parts = [attributions(apd, x_BN) for x_BN in toy.rows(toys.ROWS, gen).split(2000)]
    A_BC = torch.cat(parts)
    threshold = A_BC.flatten().topk(how_many_on(cfg, toys.ROWS)).values[-1]
    alive_C = (A_BC >= threshold).sum(0) >= evals.ALIVE
    single_NC = (attributions(apd, toys.one_by_one(toy)) >= threshold).float()
    return [toys.verdict(toy, i, *apd.components()[i], single_NC, alive_C) for i in toy.judged]


# ----------------------------------------------------------------------------- beside SPD, on toys
class Job(NamedTuple):
    """One decomposition of one toy."""
    toy: str
    method: str                     # "apd" or "spd"
    setting: str                    # its own, untrained, or a knob and what it is multiplied by
    seed: int

    def config(self, cfg):
        """By which Config of its method?"""
        own = suited(cfg, self.toy) if self.method == "apd" else toys.SPD[self.toy]
        if self.setting == UNTRAINED:
            own = replace(own, steps=0)
        elif self.setting != OWN:
            knob, _, factor = self.setting.split()
            own = replace(own, **{knob: getattr(own, knob) * float(factor)})
        return own

    def depends_on(self, cfg):
        """What is its row found by? Itself, its Config, and code."""
        parts = CODE if self.method == "apd" else (spd,)
        code = [compare.code_of(part) for part in (*parts, toys)]
        return [self, vars(self.config(cfg)) | RUN_ONLY, code]

    def measure(self, cfg):
        """What does it find? A flat dict; means over the matrices that are judged."""
        toy = toys.make(self.toy, self.seed)
        own = self.config(cfg)
        gen = toy.generator()
        began = time.process_time()     # on one core, whatever else runs there
        if self.method == "apd":
            m = train(toy, own, gen)
        else:
            m = toys.decompose(toy, own, gen)
        row = dict(seconds=time.process_time() - began)
        if not all(p.isfinite().all() for p in m.parameters()):
            return row | dict.fromkeys(("found", "solved"), False) | dict.fromkeys(VERDICT)

        if self.method == "apd":
            verdicts = judge(m, toy, own, gen)
            row["loss"] = loss_fn(m, toy.busy_rows(toys.ROWS, gen), own)[0].item()
        else:
            verdicts = toys.judge(m, toy, gen)
        row |= dict(found=toys.found(toy, verdicts), solved=toys.solved(toy, verdicts))
        for key in VERDICT:
            row[key] = sum(v[key] for v in verdicts) / len(verdicts)
        return row


# by what code an APD is found
CODE = (APD, Masked, attributions, moves, batch_top_k, faithfulness, complexities, simplicity,
        minimality, how_many_on, loss_fn, rate, train, judge)
VERDICT = ("error", "alive", "mmcs", "ml2r")        # what toys.verdict tells
OWN = "its own"
UNTRAINED = "untrained"
MOVED = {                           # a knob, at half and at twice what it is
    "apd": ("k x 0.5", "k x 2", "alpha x 0.5", "alpha x 2"),
    "spd": ("c_imp x 0.5", "c_imp x 2"),
}


def jobs(cfg):
    """List all decompositions, one network after the other."""
    names = [name.strip() for name in cfg.toys.split(",")]
    for name in names:
        if name not in SETTINGS:
            common.fail(f"--toys {cfg.toys}: {name!r} is none of {', '.join(SETTINGS)}")
    todo = []
    for name in dict.fromkeys(names):
        for seed in range(cfg.seeds):
            for method, moved in MOVED.items():
                todo.append(Job(name, method, OWN, seed))
                more = (UNTRAINED, *moved) if seed < cfg.around else ()
                todo += [Job(name, method, setting, seed) for setting in more]
    return todo


def in_order(row):
    """What rows are sorted by."""
    places = [OWN, UNTRAINED, *MOVED[row["method"]]]
    return [*SETTINGS].index(row["toy"]), row["method"], places.index(row["setting"]), row["seed"]


# --------------------------------------------------------------------------- on a language model
@torch.no_grad()
def step_cost(cfg, C=256, B=16, T=128):
    """What would a step cost on a language model's MLP? {seconds of one attribution, ..}.

    The output of a language model is its logits at all positions. Timed: one component's
    attribution on B sequences of T tokens. A step needs C of them, of components that have no
    structure to share, before its own forward and backward pass."""
    gpt = GPT.load(cfg.model)
    layer = default_layer(gpt)
    mlp = gpt.mlp(layer)
    T = min(T, gpt.cfg.n_positions)
    gen = common.generator(0, "cost")
    idx_BT = torch.randint(0, gpt.cfg.vocab_size, (B, T), generator=gen)
    x_BTD, r_BTD = gpt.prefix(idx_BT, layer)
    y_BTD = mlp(x_BTD)
    moved_BTD = torch.randn(y_BTD.shape, generator=gen)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(y_BTD, moved_BTD)
            tangent = forward_ad.unpack_dual(gpt.suffix(r_BTD, dual, layer)).tangent
            tangent.square().mean(-1)
        seconds.append(time.process_time() - began)
    return dict(model=cfg.model, C=C, tokens=B * T, attribution=min(seconds),
                step=C * min(seconds))


def cost_line(cost):
    """Say what a step would cost."""
    minutes = cost["step"] / 60
    hours = 1000 * minutes / 60
    return (f"On the MLP of a language model ({cost['model']}) one component's attribution takes "
            f"{cost['attribution']:.2f} s for {cost['tokens']:,} tokens. With {cost['C']} "
            f"components that is {minutes:.1f} minutes a step, {hours:,.0f} hours for 1,000 steps.")


# --------------------------------------------------------------------------------- what it shows
def count(rows, key):
    """How many of the rows have it?"""
    return f"{sum(row[key] for row in rows)} of {len(rows)}"


def mean(rows, key, digits):
    """A mean over seeds, with half of its 95 % interval; FAILED where no seed has it."""
    text = mean_text([row[key] for row in rows], digits)
    return "FAILED" if text == "n/a" else text


def said(row):
    """What a run found, in one line."""
    if row["mmcs"] is None:
        return "FAILED"
    return (f"{row['error']:g} errors, {row['alive']:g} alive, MMCS {row['mmcs']:.3f}, "
            f"ML2R {row['ml2r']:.3f}, {row['seconds']:.0f} s")


HEADS = ("toy", "method", "setting", "found", "and its norm", "MMCS", "ML2R", "errors", "alive",
         "seconds")


def line(name, rows):
    """The cells of one setting of one method on one toy."""
    first = rows[0]
    return [name, first["method"].upper(), first["setting"], count(rows, "found"),
            count(rows, "solved"), mean(rows, "mmcs", 3), mean(rows, "ml2r", 3),
            mean(rows, "error", 1), mean(rows, "alive", 1), mean(rows, "seconds", 0)]


def table(rows):
    """Lines of cells: each toy, method and setting, and what the papers have."""
    groups = {}
    for row in rows:
        groups.setdefault((row["toy"], row["method"], row["setting"]), []).append(row)
    lines = []
    for (toy, method, setting), group in groups.items():
        lines.append(line(toy, group))
        if setting == OWN and (toy, method) in PAPER:
            numbers = [f"{value:.3f}" for value in PAPER[toy, method]]
            lines.append([toy, method.upper(), "the paper's", "", "", *numbers, "", "", ""])
    return lines


def robustness(rows):
    """Which of the two is the more robust? How often each finds the features at its own setting,
    and with a knob at half or twice of it, over the same seeds."""
    lines = []
    for method, names in MOVED.items():
        moved = [row for row in rows if row["method"] == method and row["setting"] in names]
        seeds = {(row["toy"], row["seed"]) for row in moved}
        own = [row for row in rows if row["method"] == method and row["setting"] == OWN
               and (row["toy"], row["seed"]) in seeds]
        if moved:
            knobs = dict.fromkeys(name.split()[0] for name in names)
            lines.append(f"{method.upper()} finds the features in {count(own, 'found')} runs at "
                         f"its own setting, in {count(moved, 'found')} at half or twice its "
                         f"{' or '.join(knobs)}.")
    return lines


TEXT = """# APD beside SPD, on toys
`{command}` makes this page. A run finds a toy's features where exactly one component is on when
one feature is, as many components are alive as there are features, and each holds what the matrix
writes for its feature (MMCS of at least 0.99; ResidMLP, W_in alone, 0.98); .. *and its norm*: ML2R
within 0.03 of 1 (ResidMLP 0.05). MMCS: mean cosine of the best alive component with a feature's own
row of the weights, ML2R: the ratio of their norms; *errors*: components wrongly on or off when one
feature is on; *untrained*: the start of training, the null. Means over seeds ± half of their 95 %
interval; SPD's over both matrices.

APD is told k, how many components are on, and on TMS C, the true number of features; SPD is not.
*its own* setting: of APD what SETTINGS in apd.py has, unless a flag above replaces it; of SPD what
toys.py has, always."""


def render(cfg, rows, cost):
    """The page, as Markdown."""
    rows = sorted(rows, key=in_order)
    text = TEXT.format(command=common.command(cfg))
    parts = [text, "", *markdown_table(HEADS, table(rows)), "", *robustness(rows), ""]
    return "\n".join([*parts, cost_line(cost), ""])


def main(cfg):
    cfg = apart(cfg)
    todo = jobs(cfg)
    for name in {job.toy for job in todo}:
        suited(cfg, name)
    common.must_be_writable(cfg.out)
    common.hold(cfg.out)
    known = Found(Path(cfg.out) / "apd.json", ("rows",), in_order)
    torch.set_num_threads(1)        # the toys are tiny
    cost = step_cost(cfg)
    known.write(cost=cost)
    rows = []
    for i, job in enumerate(todo):
        row = known.row("rows", job.depends_on(cfg), job._asdict(), lambda: job.measure(cfg))
        rows.append(row)
        print(f"[{i + 1}/{len(todo)}] {', '.join(map(str, job))}: {said(row)}", flush=True)
        # the page so far, for hours may be left
        page = render(cfg, rows, cost)
        common.write(Path(cfg.out) / "apd.md", page.encode())
    print("", page, f"-> {cfg.out}/apd.json, apd.md", sep="\n")


if __name__ == "__main__":
    main(common.cli(Config))
