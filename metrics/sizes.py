"""What happens to the units of a decomposition when it is given more of them?

If units are parts of the model, a larger decomposition of the same MLP finds the same ones and some
that the smaller one had no room for. If they are not, the larger one cuts the same thing otherwise:
units split, merge, or have no counterpart. Each function asks one question of a small and a large
decomposition of one method, or of one of them alone:

    alive_counts, cliff     how many units are there, by each published rule?
    insertion_effects       does the small one get better with a unit of the large one added?
    novelty                 are those the units that the small one has nothing similar to?
    growth, curve           what is written on the way from the small one to the large one?
    split_fractions         has a unit of the small one one counterpart, or several?
    canonicity, incompleteness      how many units stay as they are; how many were missing?
    explained_by_few        are the large one's writes sums of a few of the small one's?
    meta                    .. or of a few common atoms?
    true_splits             in how many units does each true concept live?
    mean_max_cosine         how near is the nearest unit, as papers print it?

Two units are similar by how much? `similarities` has five answers: by what they write alone, as is
published; by what they write and read, in the form of each kind of unit, in one form for all kinds,
and from the inputs that occur; and by what they say. Its null is `by_chance(large, R, T, gen)` in
the place of the large one: random directions of equal mean and covariance, and values at the wrong
text. Seeds differ too, without any growth, so that a number says something about size only where it
differs from that of two seeds of equal size: the floor is the same function of two such seeds.

What a unit writes has to be linear in f, apart from an MLP of components: SAEs of an MLP's input
or of the stream are left out. Stitching: Leask et al. 2025, arXiv:2502.04878.

S units of the small decomposition, L of the large one, F of either; U some of them, P pairs; R
rows, T positions, N tokens (position 0 of each row left out), E entries of a recording
(metrics/recording.py), K concepts, D residual width, M MLP hidden, C components of a matrix, k
atoms. Costs are for one core, 1,024 and 2,048 units, 50,000 tokens, an L0 of 16.
"""
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf       # F is the number of units here

from evals import ALIVE, clean, f1_scores, reads
from metrics import atoms, mapping, matching, stability
from metrics.columns import Column
from metrics.concepts import auroc
from metrics.matching import SHARED, cosines, largest
from metrics.recording import Active, testable_concepts
from model import split_rows

COLUMNS = {                 # of compare.py's table, filled by studies/sizes.py
    "canonicity": Column(
        "canonical", "up", None, 3, table="studies",
        text="share of the alive units of the smallest dictionary of the study that are in the "
             "largest one as they are, one to one, by what they read and write; null: in another "
             "seed of the smallest"),
}
DEAD = 1e-6             # published: alive from this mean, or this share of tokens, on ..
EDGE = 0.05             # `cliff`: share of the units that has to be on either side
ONCE = 0.1              # .. or where it exceeds this at one token
FEWEST = 10             # units of either kind that similarity has to tell apart, for `novelty`
TOKENS = 1024           # at once: bounds the memory, to 300 MB beside what is given
ENTRIES = 4096          # at once
GROUP = 16              # units at once
ATOM = 16               # units for each atom of `meta` ..
ATOMS = 5               # .. of which there have to be so many, since 4 make a unit
BAND = 256              # vectors at once
POINTS = (0, .25, .5, .75, 1, 1.25, 1.5, 1.75, 2)       # of `curve`


# ------------------------------------------------------------------------- how many units are there
class Use(NamedTuple):
    """How much are units used on N tokens? f is what m.encode says, before any rounding."""
    mean_F: torch.Tensor        # mean of f
    rate_F: torch.Tensor        # share of the tokens with f > 0
    most_F: torch.Tensor        # largest f
    on_F: torch.Tensor          # tokens at which the unit is on, after rounding
    N: int

    def within(self, unit_n):
        """Of some units alone."""
        return Use(*(value_F[unit_n] for value_F in self[:-1]), self.N)


@torch.no_grad()
def use(m, gpt, rows_RT, batch=16):
    """How much is each unit of m used on some rows? A Use. One pass, two if m rounds."""
    raw = getattr(m, "raw", m)
    layer, = m.layers
    total_F = 0
    fired_F = 0
    on_F = 0
    tops = []
    for idx_BT in split_rows(rows_RT, batch):
        _, f_BTF = clean(raw, gpt, idx_BT, layer)
        f_NF = f_BTF[:, 1:].flatten(0, 1)
        total_F = total_F + f_NF.sum(0).double()
        fired_F = fired_F + (f_NF > 0).sum(0)
        tops.append(f_NF.amax(0))
        if raw is not m:
            _, f_BTF = clean(m, gpt, idx_BT, layer)
        on_F = on_F + (f_BTF[:, 1:] > 0).sum((0, 1))
    R, T = rows_RT.shape
    N = R * (T - 1)
    return Use(total_F / N, fired_F.double() / N, torch.stack(tops).amax(0), on_F, N)


def alive_counts(m, gpt, rows_RT):
    """How many units are alive, by each rule that is in use? A flat dict of counts.

        alive           on at ALIVE = 10 tokens or more: the rule of this project
        alive_mean      mean of f above 1e-6: published for causal importances
        alive_rate      f > 0 at a share of the tokens above 1e-6: published for SAEs. On fewer than
                        a million tokens that is f > 0 at one token
        alive_once      f > 0.1 at one token or more: also published for causal importances
        units, tokens   how many units there are, on how many tokens they were counted
        cliff, cliff_units, null_cliff      of `cliff`, in the spectrum of mean f, and by chance

    f as it is before rounding, but for `alive`. Where units are in several blocks KEY_BLOCK is the
    number of one block. The rules agree where units are dead or alive and nothing in between. The
    null of a count is that of an untrained decomposition. One or two passes, 4 s each.
    """
    used = use(m, gpt, rows_RT)
    counts = count_alive(used) | dict(tokens=used.N)
    blocks = matching.blocks(m)
    if len(blocks) > 1:
        for block in blocks:
            inside = count_alive(used.within(block.unit_n))
            counts |= {f"{key}_{block.name}": value for key, value in inside.items()}
    return counts


def count_alive(used):
    """Count the units that each rule calls alive, and find the cliff: a flat dict."""
    rules = dict(alive=used.on_F >= ALIVE, alive_mean=used.mean_F > DEAD,
                 alive_rate=used.rate_F > DEAD, alive_once=used.most_F > ONCE)
    counts = {rule: is_alive_F.sum().item() for rule, is_alive_F in rules.items()}
    steepest = cliff(used.mean_F)
    return counts | dict(units=len(used.on_F), cliff=steepest.decades, cliff_units=steepest.units,
                         null_cliff=null_cliff(used.mean_F))


class Cliff(NamedTuple):
    """The largest gap in a spectrum of mean activations."""
    decades: float      # its height
    units: int          # how many units are above it


def cliff(mean_F, least=DEAD):
    """Do units fall into those in use and those that are not? The largest gap between neighbours in
    the sorted log10 of the mean activations, a Cliff.

    Means below `least` count as `least`. Both sides have to hold a share EDGE = 0.05 of the units:
    the gaps between the few largest and the few smallest are large in any spectrum. With a high
    cliff all rules of being alive agree, and the decomposition had more units than it needed;
    without one, their number is the rule's. Hold it against `null_cliff`. Milliseconds.
    """
    if len(mean_F) < 2:
        return Cliff(0., len(mean_F))
    gaps, first = inner_gaps(mean_F.clamp(min=least).log10())
    return Cliff(gaps.max().item(), gaps.argmax().item() + first)


def inner_gaps(log_F):
    """What are the gaps between neighbours, from the largest number down, with a share EDGE of the
    numbers on either side? (gaps, how many numbers are above the first)."""
    first = math.ceil(EDGE * log_F.shape[-1])
    falling = log_F.sort(descending=True).values
    gaps = falling[..., :-1] - falling[..., 1:]
    return gaps[..., first - 1:gaps.shape[-1] + 1 - first], first


def null_cliff(mean_F, least=DEAD, draws=100, seed=0):
    """How high is the cliff among as many means without any order? In decades.

    That of 95 of 100 draws of normal log10 means, with the mean and the standard deviation of
    these, is not higher. A spectrum with a cliff is wide, and so is its null: it errs upwards.
    """
    if len(mean_F) < 2:
        return 0.
    log_F = mean_F.clamp(min=least).log10()
    gen = torch.Generator().manual_seed(seed)
    normal = torch.randn(draws, len(log_F), generator=gen, dtype=torch.float64).to(log_F)
    drawn = (log_F.mean() + log_F.std() * normal).clamp(min=math.log10(least))
    return inner_gaps(drawn)[0].amax(1).quantile(0.95).item()


# ---------------------------------------------------------------------- a decomposition of one size
class Sized(NamedTuple):
    """A decomposition m of one MLP, and what has to be known to hold it against another size."""
    m: Any
    blocks: list                # what units read and write: the Blocks of metrics/matching.py
    recording: Active           # where they are on in rows_RT, on which sizes are compared
    is_alive_F: torch.Tensor    # on at ALIVE tokens of fit_RT or more
    error_ND: torch.Tensor      # in rows_RT, the MLP's output less what m writes

    def alive_blocks(self):
        """Leave out dead units."""
        return [block.where(self.is_alive_F[block.unit_n]) for block in self.blocks]

    def within(self, name):
        """Let the units of one block pass for all there are: those of other blocks for dead."""
        block, = [block for block in self.blocks if block.name == name]
        is_inside_F = torch.zeros_like(self.is_alive_F).index_fill(0, block.unit_n, True)
        return self._replace(is_alive_F=self.is_alive_F & is_inside_F)

    def over_inputs(self):
        """Make what units read what they get from the inputs (metrics/matching.py, inputs)."""
        return self._replace(blocks=[block.over_inputs() for block in self.blocks])


def look_at(m, gpt, fit_RT, rows_RT, tau=0.):
    """Collect what has to be known of one trained decomposition m: a Sized. Four passes, 15 s."""
    blocks = matching.with_inputs(matching.blocks(m), m, gpt, fit_RT)
    is_alive_F = stability.record_units(m, gpt, fit_RT, tau).on() >= ALIVE
    recording = stability.record_units(m, gpt, rows_RT, tau)
    return Sized(m, blocks, recording, is_alive_F, errors(m, gpt, rows_RT))


@torch.no_grad()
def errors(m, gpt, rows_RT, batch=16):
    """What does m leave out of the MLP's output? y - y_hat on clean inputs, (N, D)."""
    layer, = m.layers
    parts = []
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        error_BTD = gpt.mlp(layer)(x_BTD) - m.decode(layer, f_BTF, x_BTD)
        parts.append(error_BTD[:, 1:].flatten(0, 1))
    return torch.cat(parts)


# ----------------------------------------------------------------------------- units by chance
def by_chance(large, R, T, gen):
    """Make the null of a Sized: `stability.by_chance`, whose random units write what they are said
    to write too, when they are added to a small one (`insertion_effects`). Maps keep their own."""
    null = stability.by_chance(large, R, T, gen)
    return null if large.m.kind == "map" else null._replace(m=Drawn(large, null.blocks))


class Drawn:
    """Units of other directions in the place of a decomposition's: what adding them needs."""

    def __init__(self, large, blocks):
        self.kind = large.m.kind
        self.layers = large.m.layers
        self.blocks = blocks
        if self.kind == "component":
            self.C = large.m.C
        else:
            # a unit of a dictionary with f = 1 adds its write over one scale for all
            layer, = self.layers
            old_FD = large.blocks[0].write
            all_units = torch.arange(len(old_FD), device=old_FD.device)
            f_11F = old_FD.new_ones(1, 1, len(old_FD))
            own_FD = large.m.contrib(layer, f_11F, large.recording.x_ND[:1].unsqueeze(0), all_units)
            self.write_FD = blocks[0].write * (own_FD.norm() / old_FD.norm())

    def unit_directions(self):
        return [(block.name, block.read, block.write, None) for block in self.blocks]

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.write_FD[units]


# ----------------------------------------------------------------------- how similar are units
def similarities(small, large, by="both"):
    """How similar is each unit of the small one to each of the large one? (S, L), cosines or r.

        writes      cosine of what they write, as published. Components: its absolute value, since
                    their signs are arbitrary. Maps, which write no one vector: that of both
        both        min(c_read, c_write), of components of their absolute values where their product
                    is above 0: one rule for these two kinds. Maps: the cosine of their matrices
        inputs      that of both, with reads compared over the inputs (`matching.with_inputs`)
        values      Pearson's r of what they say over tokens, |r| where a value is below 0: one rule
                    for all kinds

    -1 where two units could not be each other's, such as those of two matrices. Memory: S L
    numbers. Null: the large one `by_chance`. 0.2 s; values: 2 s.
    """
    n_units = (small.recording.F, large.recording.F)
    sim_SL = small.blocks[0].write.new_full(n_units, -1.)
    if by == "inputs":
        small = small.over_inputs()
        large = large.over_inputs()
    for a, b in zip(small.blocks, large.blocks, strict=True):
        if by == "values":
            r = matching.correlation(small.recording, large.recording, a.unit_n, b.unit_n)
            cosine = matching.unsigned(r, small.recording, large.recording).to(sim_SL)
        elif by == "writes" and a.kind != "map":
            cosine = cosines(a.write, b.write)
            cosine = cosine.abs() if a.kind == "component" else cosine
        else:
            _, cosine = matching.similarity(a, b)
        sim_SL[a.unit_n.unsqueeze(1), b.unit_n] = cosine
    return sim_SL


def among_alive(sim_SL, is_alive_S, is_alive_L):
    """Similarities where both units are alive, -1 elsewhere: a dead unit is no counterpart."""
    return torch.where(is_alive_S.unsqueeze(1) & is_alive_L, sim_SL, -1)


# ---------------------------------------------------------------------------- adding one unit
@torch.no_grad()
def insertion_effects(small, large, mlp, T):
    """Does the small decomposition get better when one unit of the large one is added to it? The
    change of the squared error of what is written, summed over each row's tokens: (R, L).

        |y - (y_S + c)|^2 - |y - y_S|^2 = |c|^2 - 2 c . (y - y_S)

    with c what the unit adds to the small one's output y_S. It is on where it is in the large one,
    as much. Below 0 = the small one lacked it (novel); above 0 = it says what others say already.
    Components: c is through the small one's own MLP under its own masks, without the rest; one of
    W_in through the nonlinearity, one of W_out from what the small one's W_in leaves to be read.
    Exact. Effects of units that say the same do not add up. Null: the large one
    `by_chance`. 12 s.
    """
    if large.m.kind == "component":
        return effects_of_components(small, large, mlp, T)
    return effects_of_contributions(small, large, T)


def effects_of_contributions(small, large, T):
    """`insertion_effects` of units whose contributions are what they add anywhere."""
    a = large.recording
    layer, = large.m.layers
    row_N = torch.arange(a.N, device=a.unit_E.device) // (T - 1)
    effect_LR = torch.zeros(a.F, a.N // (T - 1), dtype=torch.double, device=row_N.device)
    all_units = torch.arange(a.F, device=row_N.device)
    for units in all_units.split(GROUP):
        # all tokens at which one of the group is on: the others add 0 there
        is_own_E = (a.unit_E >= units[0]) & (a.unit_E <= units[-1])
        for tokens in a.token_E[is_own_E].unique().split(4 * TOKENS):
            x_1ND = a.x_ND[tokens].unsqueeze(0)
            c_1NUD = large.m.contrib(layer, a.f_at(tokens), x_1ND, units)
            error_N1D = small.error_ND[tokens].unsqueeze(1)
            effect_NU = (c_1NUD[0] * (c_1NUD[0] - 2 * error_N1D)).sum(-1)
            own_UR = effect_LR[units[0]:units[-1] + 1]
            own_UR.index_add_(1, row_N[tokens], effect_NU.T.double())
    return effect_LR.T


def effects_of_components(small, large, mlp, T):
    """`insertion_effects` of components, entry by entry: a component changes what the others of the
    small one read."""
    a = large.recording
    effect_RL = torch.zeros(a.N // (T - 1), a.F, dtype=torch.double, device=a.unit_E.device)
    for start in range(0, a.N, TOKENS):
        tokens = torch.arange(start, min(start + TOKENS, a.N), device=a.unit_E.device)
        masked = MaskedMLP(small.m, mlp, small.recording.f_at(tokens)[0], a.x_ND[tokens])
        is_here_E = (a.token_E >= start) & (a.token_E < start + TOKENS)
        for entries in is_here_E.nonzero().squeeze(1).split(ENTRIES):
            unit_E = a.unit_E[entries]
            token_E = a.token_E[entries]
            c_ED = masked.added(large.m, unit_E, token_E - start, a.f_E[entries])
            effect_E = (c_ED * (c_ED - 2 * small.error_ND[token_E])).sum(1)
            row_E = token_E // (T - 1)
            effect_RL.index_put_((row_E, unit_E), effect_E.double(), accumulate=True)
    return effect_RL


def through(side, f_NC, x_N):
    """What do the components of one matrix write under masks? side: of m.unit_directions()."""
    _, read_C, write_C, _ = side
    is_on_C = (f_NC != 0).flatten(0, -2).any(0)         # the others cost time, and write nothing
    return ((x_N @ read_C[is_on_C].T) * f_NC[..., is_on_C]) @ write_C[is_on_C]


class MaskedMLP:
    """The MLP of a small decomposition into components at N tokens, to which others are added."""
    def __init__(self, m, mlp, f_NF, x_ND):
        self.act = mlp.act
        self.x_ND = x_ND
        in_, self.out = m.unit_directions()
        f_in_NC, self.f_out_NC = f_NF.split(m.C, -1)
        self.z_NM = through(in_, f_in_NC, x_ND) + mlp.c_fc.bias
        self.h_NM = self.act(self.z_NM)

    def added(self, other, unit_E, place_E, f_E):
        """What does a component of another decomposition add to the output? (E, D)

        unit_E of other's units, at the token place_E, with the mask f_E: one for each entry."""
        in_, out = other.unit_directions()
        is_in_E = unit_E < other.C
        c_ED = self.x_ND.new_zeros(len(unit_E), self.x_ND.shape[1])

        # W_in: z gets f (x . v) u, and the small one's W_out reads act(z + f (x . v) u) - act(z)
        i = unit_E[is_in_E]
        place = place_E[is_in_E]
        _, read_in, write_in, _ = in_
        inner_E = (self.x_ND[place] * read_in[i]).sum(1) * f_E[is_in_E]
        more_EM = self.act(self.z_NM[place] + inner_E.unsqueeze(1) * write_in[i])
        more_EM = more_EM - self.h_NM[place]
        c_ED[is_in_E] = through(self.out, self.f_out_NC[place], more_EM)

        # W_out: f (h . v) u, with the h of the small one
        j = unit_E[~is_in_E] - other.C
        place = place_E[~is_in_E]
        _, read_out, write_out, _ = out
        inner_E = (self.h_NM[place] * read_out[j]).sum(1) * f_E[~is_in_E]
        c_ED[~is_in_E] = inner_E.unsqueeze(1) * write_out[j]
        return c_ED


class Effects(NamedTuple):
    """The mean change of the squared error by adding each unit: below 0 = it helps."""
    mean_L: torch.Tensor        # per token
    where_on_L: torch.Tensor    # per token at which the unit is on
    low_L: torch.Tensor         # 95 % interval of mean_L
    high_L: torch.Tensor


def average_effects(effect_RL, on_L, T, gen, draws=1000):
    """How large is each unit's effect, and how sure is it? Effects.

    The interval is a bootstrap over rows, which are drawn whole. on_L: at how many of the tokens
    each unit is on. 1 s.
    """
    R = len(effect_RL)
    mean_L = effect_RL.mean(0) / (T - 1)
    where_on_L = effect_RL.sum(0) / on_L.clamp(min=1)

    # a draw's mean is a weighted mean: how often each row was drawn, over R
    pick = torch.randint(R, (draws, R), generator=gen).to(effect_RL.device)
    weight = torch.zeros(draws, R, dtype=torch.double, device=effect_RL.device)
    weight.scatter_add_(1, pick, torch.ones_like(weight))
    drawn = weight @ effect_RL / R / (T - 1)
    sorted_means = drawn.sort(0).values
    low_L = sorted_means[int(0.025 * draws)]
    high_L = sorted_means[math.ceil(0.975 * draws) - 1]
    return Effects(mean_L, where_on_L, low_L, high_L)


def novelty(sim_SL, effects, is_alive_S, is_alive_L, at=SHARED):
    """Are the units that the small one has nothing similar to the ones that it lacks? A flat dict
    about the alive units of the large one.

        novel           share whose largest similarity to an alive small unit is below `at`; all
                        others are called reconstruction units
        helps           share whose effect is below 0
        helps_novel, helps_reconstruction   that share among the novel, among the others
        auroc           how likely a unit that helps is less similar than one that does not: 0.5 =
                        similarity says nothing about it (the null), 1 = it says all
        cut             Youden's: the similarity up to which to call units novel, if most of those
                        that help shall be, and few others
        cut_gain        share of those that help less share of the others that are then novel

    None where there is nothing to count, or less than FEWEST of either kind to tell apart.
    Published: at 0.7, for GPT-2's SAEs. That similarity to
    0.7 tells novel units is not given at other widths: read auroc first. Milliseconds.
    """
    most_L = largest(among_alive(sim_SL, is_alive_S, is_alive_L).T)[is_alive_L]
    helps_L = effects.mean_L[is_alive_L] < 0
    is_novel_L = most_L < at
    n = len(most_L)
    found = dict(units=n,
                 novel=share_of(is_novel_L),
                 helps=share_of(helps_L),
                 helps_novel=share_of(helps_L[is_novel_L]),
                 helps_reconstruction=share_of(helps_L[~is_novel_L]),
                 auroc=None, cut=None, cut_gain=None)
    if min(helps_L.sum(), n - helps_L.sum()) < FEWEST:
        return found

    # Of each similarity as the cut: how many of either kind are up to it?
    found["auroc"] = auroc(-most_L.unsqueeze(0), helps_L).item()
    cuts = most_L.sort().values
    upto_helping = torch.searchsorted(most_L[helps_L].sort().values, cuts, right=True)
    upto_others = torch.searchsorted(most_L[~helps_L].sort().values, cuts, right=True)
    gain = upto_helping / helps_L.sum() - upto_others / (~helps_L).sum()
    found["cut"] = cuts[gain.argmax()].item()
    found["cut_gain"] = gain.max().item()
    return found


def share_of(is_it):
    """Which share is true? None of nothing."""
    return is_it.double().mean().item() if len(is_it) else None


# ------------------------------------------------------------------ from the small to the large one
class Groups(NamedTuple):
    """Units that similarity connects: an edge from a small unit to a large one where both are alive
    and their similarity reaches a threshold."""
    of_S: torch.Tensor          # group of each small unit: the number of its first small unit
    of_L: torch.Tensor          # group of each large unit; -1: no edge
    degree_S: torch.Tensor      # edges of each unit
    degree_L: torch.Tensor
    n_small_S: torch.Tensor     # small units of the group of each small unit
    n_large_S: torch.Tensor     # large units of it


def connect(sim_SL, is_alive_S, is_alive_L, at=SHARED):
    """Which units of the small one do which of the large one stand for? Groups. 1 s."""
    edge_SL = among_alive(sim_SL, is_alive_S, is_alive_L) >= at
    found = mapping.components(edge_SL)
    degree_L = edge_SL.sum(0)
    of_L = torch.where(degree_L > 0, found.name_G, -1)
    return Groups(found.name_F, of_L, edge_SL.sum(1), degree_L, found.a_F, found.b_F)


def growth(sim_SL, effect_L, is_alive_S, is_alive_L, at=SHARED):
    """In which order does the small decomposition become the large one? When each small unit leaves
    and each large one enters: (leave_S, enter_L), 0 to 2.

    Add, 0 to 1: large units without an edge enter, those of the lowest effect first. Swap, 1 to 2:
    groups trade their small units for their large ones, those of the largest similarity first.
    Small units without an edge are groups of their own. Dead units leave or enter at 2, so that the
    small one whole is at 0 and the large one whole at 2.
    """
    groups = connect(sim_SL, is_alive_S, is_alive_L, at)
    leave_S = torch.full((len(sim_SL),), 2., device=sim_SL.device)
    enter_L = torch.full((sim_SL.shape[1],), 2., device=sim_SL.device)

    novel = (is_alive_L & (groups.of_L < 0)).nonzero().squeeze(1)
    order = novel[effect_L[novel].argsort(stable=True)]
    enter_L[order] = torch.arange(1., len(order) + 1, device=order.device) / max(1, len(order))

    # the largest similarity of each group, on its first unit
    most_S = largest(among_alive(sim_SL, is_alive_S, is_alive_L))
    top_S = torch.full_like(most_S, -2).scatter_reduce(0, groups.of_S, most_S, "amax")
    names = groups.of_S[is_alive_S].unique()
    order = names[top_S[names].argsort(descending=True, stable=True)]
    swap_S = torch.full_like(leave_S, 2.)
    swap_S[order] = 1 + torch.arange(1., len(order) + 1, device=order.device) / max(1, len(order))
    leave_S[is_alive_S] = swap_S[groups.of_S[is_alive_S]]
    has_edge_L = groups.of_L >= 0
    enter_L[has_edge_L] = swap_S[groups.of_L[has_edge_L]]
    return leave_S, enter_L


def write_together(small, large, mlp, f_S, f_L, x_BTD):
    """What do units of two decompositions write together? y_BTD.

    small, large: decompositions; f_S, f_L: (B, T, S) and (B, T, L), 0 for units left out. Biases
    and what is always on are those of the small one. Components: the MLP whose matrices are the
    sums of both ones' components under their masks.
    """
    layer, = small.layers
    if small.kind != "component":
        always_BTD = large.decode(layer, torch.zeros_like(f_L), x_BTD)
        return small.decode(layer, f_S, x_BTD) + large.decode(layer, f_L, x_BTD) - always_BTD
    y = x_BTD
    f_S = f_S.split(small.C, -1)
    f_L = f_L.split(large.C, -1)
    sides = zip(small.unit_directions(), large.unit_directions(), f_S, f_L, (mlp.c_fc, mlp.c_proj))
    for i, (small_side, large_side, f_small, f_large, matrix) in enumerate(sides):
        x = mlp.act(y) if i else y
        y = through(small_side, f_small, x) + through(large_side, f_large, x) + matrix.bias
    return y


@dataclass
class Stitched:
    """Some units of a small decomposition and some of a large one in the place of their MLP, as
    GPT.forward takes it: gpt(idx_BT, Stitched(..))."""
    small: Any
    large: Any
    keep_S: torch.Tensor        # 1 for those that write, 0 for others
    keep_L: torch.Tensor
    shift_D: torch.Tensor       # added to what they write

    def __call__(self, layer, x_BTD, mlp):
        f = [m.encode(layer, x_BTD, mlp) if layer in reads(m) else None
             for m in (self.small, self.large)]
        if layer not in self.small.layers:
            return mlp(x_BTD)
        f_S = f[0] * self.keep_S
        f_L = f[1] * self.keep_L
        return write_together(self.small, self.large, mlp, f_S, f_L, x_BTD) + self.shift_D


@torch.no_grad()
def curve(small, large, mlp, leave_S, enter_L, points=POINTS):
    """What is written on the way from the small decomposition to the large one? {point: dict}, the
    points of `growth`: 0 the small one, 1 with all its novel units added, 2 the large one.

        mse         E |y - y_hat - shift|^2 of the MLP's output y: lower is better
        fve         1 - mse / E |y - E y|^2
        l0          units on per token
        stitched    the units in the model's place, a Stitched; evals.scores has their CE

    The shift, the mean of y - y_hat, is fitted anew at each point. If the large one only adds and
    refines, mse falls all the way. If what it adds is what the small one says already in other
    units, it is written twice, and mse rises up to 1: components of either one add up to the
    weights. Null: the large one `by_chance`. 1 s a point, components 3 s. Memory: TOKENS
    (S + L + M) floats.
    """
    a = small.recording
    b = large.recording
    sums = {point: Sums() for point in points}
    plain = Sums()              # of y itself
    for tokens in torch.arange(a.N, device=a.unit_E.device).split(TOKENS):
        x_1ND = a.x_ND[tokens].unsqueeze(0)
        y_1ND = mlp(x_1ND)
        plain.add(y_1ND[0])
        f_S = a.f_at(tokens)
        f_L = b.f_at(tokens)
        for point in points:
            f_stay = f_S * (leave_S > point)
            f_new = f_L * (enter_L <= point)
            y_hat_1ND = write_together(small.m, large.m, mlp, f_stay, f_new, x_1ND)
            n_on = (f_stay > 0).sum() + (f_new > 0).sum()
            sums[point].add((y_1ND - y_hat_1ND)[0], n_on)

    found = {}
    for point, total in sums.items():
        stitched = Stitched(small.m, large.m, (leave_S > point).float(), (enter_L <= point).float(),
                            total.mean().to(a.x_ND))
        mse = total.variance()
        found[point] = dict(mse=mse, fve=1 - mse / plain.variance(), l0=total.on / a.N,
                            stitched=stitched)
    return found


class Sums:
    """Sums over tokens of vectors, of their squares, and of how many units are on."""
    def __init__(self):
        self.n = 0
        self.on = 0
        self.total_D = 0
        self.square = 0

    def add(self, v_ND, n_on=0):
        self.n += len(v_ND)
        self.on += int(n_on)
        self.total_D = self.total_D + v_ND.double().sum(0)
        self.square += v_ND.double().square().sum().item()

    def mean(self):
        return self.total_D / self.n

    def variance(self):
        """E |v - E v|^2"""
        return self.square / self.n - self.mean().square().sum().item()


# --------------------------------------------------------------------------- do units split or stay
def split_fractions(sim_SL, is_alive_S, is_alive_L, at=SHARED):
    """Does a unit of the small decomposition have one counterpart in the large one, or several? A
    flat dict: shares of the alive small units.

        matched             with one or more counterparts: large units of a similarity of `at`
        split_if_matched    with two or more, of those that are matched
        split               with two or more, of all: a unit that is not found again has not split,
                            and a low share may mean no more than that little is found
        one_to_one, one_to_many, many_to_one, many_to_many      by the sizes of their groups
        new                 share of the alive LARGE units without any counterpart

    One to one is what stays. Two copies of a unit count as a split. By writes alone it is the
    number that is published. Null: the large one `by_chance`. 1 s.
    """
    groups = connect(sim_SL, is_alive_S, is_alive_L, at)
    degree = groups.degree_S[is_alive_S]
    found = dict(matched=share_of(degree > 0),
                 split_if_matched=share_of(degree[degree > 0] > 1),
                 split=share_of(degree > 1),
                 new=share_of(groups.degree_L[is_alive_L] == 0))
    kinds = mapping.kinds(groups.n_small_S[is_alive_S], groups.n_large_S[is_alive_S])
    kinds.pop("orphan")                 # what is not matched
    return found | {kind: share_of(is_kind) for kind, is_kind in kinds.items()}


def canonicity(small, large, sim_SL, at=SHARED):
    """Which share of the alive units of the small one are in the large one as they are? 0 to 1,
    higher is better.

    A unit is, if it and one large unit have each other as their only counterpart (a group of one to
    one at the similarity `at`), and the correlation of their values over tokens is `at` or more;
    |r| where a value is below 0. 1 = the small one is part of the large one. Null: the large one
    `by_chance`; floor: canonicity of two seeds of the small one's size, to be subtracted.
    None without alive units. 3 s.
    """
    groups = connect(sim_SL, small.is_alive_F, large.is_alive_F, at)
    is_alone_S = (groups.n_small_S == 1) & (groups.n_large_S == 1)
    one = is_alone_S.nonzero().squeeze(1)
    # the large unit of each such group; its name is its only small unit
    has_edge = (groups.of_L >= 0).nonzero().squeeze(1)
    mate_S = torch.full_like(groups.of_S, -1).index_put((groups.of_L[has_edge],), has_edge)
    r_P = matching.correlation(small.recording, large.recording, one, mate_S[one]).diagonal()
    r_P = matching.unsigned(r_P, small.recording, large.recording)
    n_alive = small.is_alive_F.sum().item()
    return (r_P >= at).sum().item() / n_alive if n_alive else None


def incompleteness(effects, is_alive_L):
    """Which share of the alive units of the large one did the small one lack? 0 to 1, lower is
    better.

    A unit was lacking if adding it to the small one lowers the squared error for sure: the 95 %
    interval of its effect is below 0. 0 = the small one was complete. Null: effects of the large
    one `by_chance`; floor: two seeds of the small one's size. None without alive units.
    """
    return share_of(effects.high_L[is_alive_L] < 0)


# ------------------------------------------------------------------------------- meta-dictionaries
def write_cosines(a, b):
    """How alike are the writes of two blocks' units? (n, n'): cosines of what they write; for
    components and maps, which write what depends on what they read, of their matrices."""
    if a.kind == "dictionary":
        return cosines(a.write, b.write)
    return matching.similarity(a, b)[0]


def pursuit(cross_LS, gram_SS, k):
    """How much of each vector, of length 1, do its k best atoms explain? |projection|^2, (L).

    By `mapping.pursuit`. cross_LS: products of vectors and atoms of length 1, gram_SS: of atoms.
    All by products, so that matrices need not be formed.
    """
    if not cross_LS.shape[1]:
        return cross_LS.new_zeros(len(cross_LS))
    gram_SS = gram_SS.double()
    ridge_SS = 1e-6 * torch.eye(len(gram_SS)).to(gram_SS)       # copies of an atom do no harm
    explained = []
    for some_LS in cross_LS.double().split(BAND):
        chosen = mapping.pursuit(gram_SS + ridge_SS, some_LS, k)[-1]
        # 1 - |x - A w|^2, which the ridge changes by its square only
        explained.append(-mapping.squared_error(*chosen, gram_SS, some_LS))
    return torch.cat(explained)


def variance_explained(smalls, rows, k):
    """Which share of the variance of the rows' writes do k small units a row explain? Lists of
    Blocks.

    VE = 1 - sum |d - d_hat|^2 / sum |d - mean d|^2, of all blocks, writes d scaled to length 1."""
    missed = 0
    spread = 0
    for a, b in zip(smalls, rows, strict=True):
        explained_L = pursuit(write_cosines(b, a), write_cosines(a, a), k)
        missed += (1 - explained_L).sum().item()
        # sum |d - mean|^2 = n - |sum d|^2 / n
        n = len(explained_L)
        spread += n - write_cosines(b, b).double().sum().item() / max(1, n)
    return 1 - missed / spread if spread > 1e-9 else None


def explained_by_few(small, large, gen, k=4, draws=3):
    """Are the writes of the large one's units sums of a few of the small one's? A flat dict.

        copies      share of the large units that are copies of a small one (`without_copies`); they
                    are not composed, and are left out of what follows
        copies_null     that share for random units in the place of the large ones
        ve          share of the variance of the others' writes that k small writes a unit explain,
                    by orthogonal matching pursuit
        ve_null     that share for random units in the place of the large ones, redrawn with equal
                    mean and covariance: at this width chance explains much
        excess      (ve - ve_null) / (1 - ve_null): 0 = no more than chance, 1 = all

    Alive units. Of components and maps, the matrices are explained; their null draws reads and
    writes apart. The small one is a dictionary of the large one's writes here: meta-SAEs fit one
    (`meta`), Leask et al. 2025, arXiv:2502.04878. 2 s.
    """
    random = large._replace(blocks=matching.null_blocks(large.blocks, gen))
    found = dict(copies=copied(small, large), copies_null=copied(small, random),
                 ve=None, ve_null=None, excess=None)
    smalls = small.alive_blocks()
    rows = without_copies(small, large).alive_blocks()
    ve = variance_explained(smalls, rows, k)
    if ve is None:
        return found
    nulls = []
    for _ in range(draws):
        nulls.append(variance_explained(smalls, matching.null_blocks(rows, gen), k))
    ve_null = sum(nulls) / draws
    return found | dict(ve=ve, ve_null=ve_null, excess=(ve - ve_null) / (1 - ve_null))


def copied(small, large):
    """Which share of the large one's alive units are copies of a small one? None without any."""
    n_alive = large.is_alive_F.sum()
    others = without_copies(small, large)
    return (1 - others.is_alive_F.sum() / n_alive).item() if n_alive else None


def without_copies(small, large, at=0.9):
    """Leave out the large units that write what one alive small unit writes, |cosine| `at` or more:
    the large Sized with these dead. They are not composed, but found again."""
    is_copy_L = torch.zeros_like(large.is_alive_F)
    for a, b in zip(small.alive_blocks(), large.blocks, strict=True):
        is_copy_L[b.unit_n] = largest(write_cosines(b, a).abs()) >= at
    return large._replace(is_alive_F=large.is_alive_F & ~is_copy_L)


def meta(blocks, gen, seeds=2):
    """Are the writes of a decomposition's alive units, Blocks, sums of a few common atoms?
    `atoms.meta_dictionary` of n / 16 atoms: {ve, ve_null, excess}, means over the blocks, which are
    weighted by their units. None where no block has 80 units. 45 s for 1,024."""
    blocks = [block for block in blocks if len(block.unit_n) >= ATOM * ATOMS]
    n = sum(len(block.unit_n) for block in blocks)
    if not blocks:
        return dict(ve=None, ve_null=None, excess=None)
    found = dict(ve=0., ve_null=0., excess=0.)
    for block in blocks:
        width = len(block.unit_n) // ATOM
        for key, value in atoms.meta_dictionary(write_rows(block), gen, width, seeds=seeds).items():
            found[key] += value * len(block.unit_n) / n
    return found


def write_rows(block, dims=128):
    """What does each unit of a block write, as one row of length 1? For `atoms.meta_dictionary`.

    Dictionaries: the write vector. Components and maps: the matrix, in the `dims` directions in
    which the matrices of the block are largest, from their products alone: with Gram matrix Q
    diag(s) Q^T the rows are Q sqrt(s). 3 s for 2,048 components.
    """
    if block.kind == "dictionary":
        return nnf.normalize(block.write, dim=1)
    gram = write_cosines(block, block).double()
    s, Q = torch.linalg.eigh(gram)          # ascending
    rows = Q[:, -dims:] * s[-dims:].clamp(min=0).sqrt()
    return nnf.normalize(rows, dim=1).to(block.write)


# ---------------------------------------------------------------------------- against true concepts
def true_splits(fit, test, precision=0.9):
    """In how many units does each true concept live? Over the testable concepts, a flat dict.

        units       mean number of units of a concept that has any: 1 = one concept, one unit; more
                    = it is split, or there are copies
        effective   the number of units that count: (sum r)^2 / sum r^2, r the recall of each
        recall      share of a concept's tokens at which one of its units is on, mean over those
                    that have any: of little, a low number of units says little
        held        share of the concepts that have any unit
        split       share of those with two or more
        units_K, concepts       the number of each testable concept, and which these are

    A unit lives in a concept that is true at a share `precision` of the tokens at which the unit is
    on; of several such, in the one of the largest F1, which is the least wide. Testable concepts
    are true at 30 % of the tokens at most, so that by chance none is. Alive units; chosen on fit,
    scored on test, two recordings with labels. Hold it against `concepts.splits`, which asks how
    many units a probe needs: copies do not count there. Null: both recordings `matching.shifted` by
    whole rows. 1 s.
    """
    concepts = testable_concepts(fit)
    K = len(concepts)
    if not K:
        return dict(units=None, effective=None, recall=None, held=None, split=None,
                    units_K=concepts, concepts=concepts)
    label_NK = fit.label_NK[:, concepts].float()
    on_F1 = fit.on().float().unsqueeze(1)
    both_FK = fit.sums(label_NK)
    is_precise_FK = (both_FK >= precision * on_F1) & (on_F1 >= ALIVE)
    f1_FK = f1_scores(on_F1, label_NK.sum(0), both_FK).masked_fill(~is_precise_FK, -1)
    best_F = f1_FK.max(1)
    home_F = torch.where(best_F.values >= 0, best_F.indices, K)       # K: in none
    n_K = torch.bincount(home_F, minlength=K + 1)[:K]

    # On test: the recall of each unit, and of a concept's units together.
    true_NK = test.label_NK[:, concepts]
    true_K = true_NK.sum(0).clamp(min=1)
    both_FK = test.sums(true_NK.float())
    own_FK = nnf.one_hot(home_F, K + 1)[:, :K] * both_FK / true_K
    effective_K = own_FK.sum(0)**2 / own_FK.square().sum(0).clamp(min=1e-12)
    is_said_NK = torch.zeros(test.N, K + 1, dtype=torch.bool, device=true_K.device)
    is_said_NK[test.token_E, home_F[test.unit_E]] = True
    recall_K = (is_said_NK[:, :K] & true_NK).sum(0) / true_K

    held_K = n_K > 0
    return dict(units=stability.mean(n_K[held_K].tolist()),
                effective=stability.mean(effective_K[held_K].tolist()),
                recall=stability.mean(recall_K[held_K].tolist()),
                held=share_of(held_K), split=share_of(n_K[held_K] > 1), units_K=n_K,
                concepts=concepts)


# --------------------------------------------------------------------------- as papers print them
def mean_max_cosine(one, other):
    """How near is the nearest unit of another decomposition? The mean over the ALIVE units of `one`
    of the largest cosine with ANY unit of `other`, dead or not, which may be the nearest of many.

        rank_one    |cosine| of the matrices that reads and writes make, |c_read c_write|; maps: of
                    theirs
        read, write     of what they read, of what they write; None for maps. Components: |cosine|

    1 = each unit is there. That is the form in which it is printed for parameter decompositions; it
    counts no unit of `other` that nothing is near to, and grows with the number of its units: hold
    it against `null_mean_max_cosine` and an untrained `other`. With one and other over_inputs(),
    reads count as the inputs see them: directions that no input takes say nothing. 0.5 s.
    """
    parts = dict(rank_one=[], read=[], write=[])
    for a, b in zip(one.alive_blocks(), other.blocks, strict=True):
        if a.kind == "map":
            parts["rank_one"].append(largest(matching.similarity(a, b)[0].abs()))
            continue
        c_read = cosines(a.read, b.read)
        c_write = cosines(a.write, b.write)
        parts["rank_one"].append(largest((c_read * c_write).abs()))
        if a.kind == "component":
            c_read = c_read.abs()
            c_write = c_write.abs()
        parts["read"].append(largest(c_read))
        parts["write"].append(largest(c_write))
    found = {}
    for key, most in parts.items():
        found[key] = stability.mean(torch.cat(most).tolist()) if most else None
    return found


def null_mean_max_cosine(one, other, gen, over_inputs=False):
    """How near is the nearest of as many random units? `mean_max_cosine` with reads and writes of
    `other` that point anywhere, independently, as those of most random starts do (sae.py begins
    with reads along writes). over_inputs: as the inputs see them; `one` as `look_at` has it.
    """
    drawn = []
    for block in other.blocks:
        rows = []
        for old in (block.read, block.write):
            new = torch.randn(old.shape, generator=gen).to(old)
            rows.append(nnf.normalize(new, dim=1) * old.norm(dim=1, keepdim=True))
        drawn.append(replace(block, read=rows[0], write=rows[1]))
    other = other._replace(blocks=drawn)
    if over_inputs:
        return mean_max_cosine(one.over_inputs(), other.over_inputs())
    return mean_max_cosine(one, other)
