"""What do one method's units look like in another method's terms, many to many?

Two methods A and B take the same MLP apart. Matching one to one (metrics/matching.py) cannot see
that three features of A are one component of B. Here each unit may have any number of partners:

    co-activation   are two units on at the same tokens? Counts, and what follows from them: lift,
                    Jaccard index, mutual information, uncertainty coefficient
    relations       is unit i of A equal to unit j of B, subsumed by it, a superset, an overlap?
    graph           which units hang together, one to one, one to many, many to many, or with none?
    reconstruction  do few units of A say together what a unit of B says? And the other way round?
    subspaces       do both methods say and write alike things, whatever their units?
    groups          do the units that one unit subsumes belong together: by what they read and
                    write, and by the true concepts?
    effects         does switching off unit i do to the predictions what switching off j does?
    clusters        which components of an SPD, of both matrices, are on together? A map can be
                    asked of such clusters as of units

a and b are recordings (metrics/recording.py) of A and B on the same tokens; `select` leaves units
out that are hardly ever on. Unit i is one of A's, j one of B's. A number without its null says
little:

    what is read from a and b       ask again with `by_chance(b, ..)` in place of b
    clusters of a                   ask again of `by_chance(a, ..)`
    groups                          each number comes with z, against matched random groups
    effects                         ask again of `control_units`
    principal_cosines               ask again of matching.redraw(rows, gen)

The ceiling is another seed of A in the place of B, floors are neurons and random directions.

F units of a, G units of b, N tokens (position 0 of each row left out), E entries of a recording, K
concepts, C clusters, Q groups, M memberships of units in groups, P pairs of units, U some units or
directions, S of a unit's sources, R rows of tokens, B rows of a batch, T positions, D residual
width, V vocabulary, X entries of all members of groups. FF, FG, GG: tables of units by units.

Costs are for one core, 2,048 units each, 50,000 tokens and an L0 of 16. Memory grows with tables of
units by units, 34 MB each, and with N BAND floats: 1.2 GB for all of `mapping`.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as nnf           # F is the number of units here

from evals import clean_with_stream, f1_scores
from metrics import matching
from metrics.atoms import best_concepts, name_clusters
from metrics.columns import Column
from metrics.effects import matched_in_frequency
from metrics.recording import testable_concepts
from metrics.stability import mean
from model import split_rows

COLUMNS = {                     # of compare.py's table, filled by studies/map.py
    "degree": Column(
        "partners", "", None, 2, table="studies",
        text="units of another method that a unit is linked with, correlation of 0.4 or more and "
             "more information than by chance: mean over the other methods"),
}
OFTEN = 50                      # a unit takes part if it is on at so many tokens or more
EDGE = 0.4                      # correlation from which on two units are linked ..
AROUND = (0.3, 0.5, 0.7)        # .. and other thresholds, to be shown
TAIL = 0.001                    # share of chance pairs whose mutual information is above an edge's
SOURCES = 5                     # most units that a unit is rebuilt from
RIDGE = 1e-4                    # of each unit's variance, so that copies of a unit do no harm
LIFT = 3                        # a unit that is on nearly everywhere subsumes nothing
ROUNDING = 1e-5                 # logits that move by less, root mean square, do not move
TOGETHER = 0.5                  # least share of a cluster's tokens at which each of its units is on
COHERENT = 2                    # z from which on a group is coherent
BAND = 128                      # units of b that are spread over all tokens at once
AT_ONCE = 2**24                 # numbers of random groups that are there at once


# ------------------------------------------------------------------------------------ recordings
def frequent(recording, least=OFTEN):
    """Which units are on often enough to be compared? Their numbers, ascending."""
    return (recording.on() >= least).nonzero().squeeze(1)


def select(recording, units):
    """Keep some units, ascending, of a recording. They are numbered anew; origin_F still says which
    of m's units each is."""
    new_F = torch.full_like(recording.origin_F, -1)
    new_F[units] = torch.arange(len(units), device=units.device)
    keep_E = new_F[recording.unit_E] >= 0
    return replace(recording, unit_E=new_F[recording.unit_E[keep_E]],
                   token_E=recording.token_E[keep_E], value_E=recording.value_E[keep_E],
                   f_E=recording.f_E[keep_E], origin_F=recording.origin_F[units])


def on_only(recording):
    """Say only that units are on, not how much: values of 1. A correlation of values may hang on a
    few large ones, that of these values does not."""
    return replace(recording, value_E=torch.ones_like(recording.value_E))


def by_chance(recording, row, gen):
    """Make the null of a recording: each unit says what it says some whole rows of text later.

    Each unit moves by a number of rows of its own, so that it is on as often as before and at the
    same positions of a row, but at the wrong text, and units are together by chance alone. row:
    tokens of one row in the recording, T - 1."""
    R = recording.N // row
    rows_later_F = torch.randint(1, R, (recording.F,), generator=gen).to(recording.unit_E.device)
    return matching.shifted(recording, rows_later_F[recording.unit_E] * row)


def unite(recording, unit_M, group_M, n_groups):
    """Make one unit of each group of units: a recording in which a group is on where one of its
    members is.

    What a group says is the sum of its members' |values|. unit_M is a member of group_M; a unit may
    be in several groups. A group is no unit of m (origin -1): it has no contributions of its own.
    0.1 s."""
    # The entries of all members: M runs of entries, put behind each other.
    on_F = recording.on()
    start_F = on_F.cumsum(0) - on_F
    n_M = on_F[unit_M]
    member_X = torch.arange(len(unit_M), device=unit_M.device).repeat_interleave(n_M)
    first_M = n_M.cumsum(0) - n_M
    place_X = torch.arange(len(member_X), device=unit_M.device) - first_M[member_X]
    entry_X = start_F[unit_M[member_X]] + place_X

    # A token counts once for a group, whatever the number of members that are on there.
    key_X = group_M[member_X] * recording.N + recording.token_E[entry_X]
    key_E, which_X = key_X.unique(return_inverse=True)
    zero_E = recording.value_E.new_zeros(len(key_E))
    return replace(recording, unit_E=key_E // recording.N, token_E=key_E % recording.N,
                   value_E=zero_E.index_add(0, which_X, recording.value_E[entry_X].abs()),
                   f_E=zero_E.index_add(0, which_X, recording.f_E[entry_X]),
                   origin_F=torch.full((n_groups,), -1, device=unit_M.device))


def spread(recording, start, end):
    """What do the units from start to end - 1 say at each token? (N, units), 0 where they are
    off."""
    ends = torch.tensor([start, end], device=recording.unit_E.device)
    first, last = torch.searchsorted(recording.unit_E, ends).tolist()
    value_NU = recording.value_E.new_zeros(recording.N, end - start)
    place = (recording.token_E[first:last], recording.unit_E[first:last] - start)
    return value_NU.index_put(place, recording.value_E[first:last])


def products(a, b):
    """Sum over tokens what unit i says times what unit j says: (F, G).

    Counts are exact, sums of values are off by up to 1e-4 of themselves: where a unit's mean is
    many times its standard deviation, covariances suffer. E G steps, 0.5 s."""
    bands = []
    for start in range(0, b.F, BAND):
        value_NU = spread(b, start, min(start + BAND, b.F))
        bands.append(a.sums(value_NU, a.value_E).double())
    return torch.cat(bands, 1)


# ------------------------------------------------------------------------- on at the same tokens
class Counts(NamedTuple):
    """At how many of N tokens are units on, alone and together? What is read from these counts is a
    table (F, G)."""
    N: int
    on_F: torch.Tensor
    on_G: torch.Tensor
    both_FG: torch.Tensor

    def back(self):
        """The counts as B sees them."""
        return Counts(self.N, self.on_G, self.on_F, self.both_FG.T)

    def given_one(self):
        """At which share of the tokens of i is j on? P(j | i)."""
        return self.both_FG / self.on_F.clamp(min=1).unsqueeze(1)

    def given_other(self):
        """At which share of the tokens of j is i on? P(i | j)."""
        return self.both_FG / self.on_G.clamp(min=1)

    def lift(self):
        """How many times as often is j on where i is on as anywhere? P(j | i) / P(j): 1 = they do
        not know of each other."""
        return self.given_one() * (self.N / self.on_G.clamp(min=1))

    def jaccard(self):
        """Tokens of both over tokens of either: 1 = always together, 0 = never."""
        either_FG = self.on_F.unsqueeze(1) + self.on_G - self.both_FG
        return self.both_FG / either_FG.clamp(min=1)

    def information(self):
        """How many bits does "i is on" tell about "j is on"? I = H(i) + H(j) - H(i, j), at least 0;
        0 = nothing, H(j) = all."""
        only_FG = self.on_F.unsqueeze(1) - self.both_FG
        joint_FG = (entropy_term(self.both_FG / self.N)
                    + entropy_term(only_FG / self.N)
                    + entropy_term((self.on_G - self.both_FG) / self.N)
                    + entropy_term((self.N - self.on_G - only_FG) / self.N))
        alone_FG = entropy(self.on_F / self.N).unsqueeze(1) + entropy(self.on_G / self.N)
        return (alone_FG - joint_FG).clamp(min=0)

    def uncertainty(self):
        """Which share of what there is to know about "j is on" does i tell? The uncertainty
        coefficient U(j | i) = I / H(j) (Theil 1970), 0 to 1; 0 where j is always or never on."""
        return self.information() / entropy(self.on_G / self.N).clamp(min=1e-12)


def entropy_term(p):
    """-p log2 p, 0 where p is 0."""
    return torch.special.entr(p) / math.log(2)


def entropy(p):
    """Entropy in bits of what happens with probability p."""
    return entropy_term(p) + entropy_term(1 - p)


def coactivation(a, b):
    """At how many tokens are unit i and unit j both on? Counts. 0.5 s."""
    both_FG = products(on_only(a), on_only(b))
    return Counts(a.N, a.on().double(), b.on().double(), both_FG)


def explained_information(counts):
    """How much of what there is to know about B's units does the best unit of A tell of each?

        sum_j max_i I(i; j) / sum_j H(j)    = the mean of max_i U(j | i), weighted by H(j)

    0 = nothing, 1 = all. By single units: what several tell together is in `reconstruct`."""
    known = counts.information().amax(0).sum()
    return (known / entropy(counts.on_G / counts.N).sum()).item()


# ------------------------------------------------------------------------------------- relations
RELATIONS = ("none", "equal", "subsumed", "superset", "overlap")


def relations(counts, lift=LIFT):
    """How do the tokens of unit i lie to those of unit j? Places in RELATIONS, (F, G); the first
    that holds:

        equal       P(j | i) >= 0.8 and P(i | j) >= 0.8
        subsumed    P(j | i) >= 0.9, P(i | j) < 0.5 and lift >= 3: i is a part of j
        superset    the other way round: j is a part of i
        overlap     Jaccard index >= 0.2
        none

    The lift keeps out units that are on nearly everywhere, in which anything would lie. Equal and
    overlap have no such guard: two units that are both on nearly everywhere are equal, so read them
    beside the null."""
    of_one_FG = counts.given_one()
    of_other_FG = counts.given_other()
    is_lifted_FG = counts.lift() >= lift
    holds = {
        "overlap": counts.jaccard() >= 0.2,
        "superset": (of_other_FG >= 0.9) & (of_one_FG < 0.5) & is_lifted_FG,
        "subsumed": (of_one_FG >= 0.9) & (of_other_FG < 0.5) & is_lifted_FG,
        "equal": (of_one_FG >= 0.8) & (of_other_FG >= 0.8),
    }
    relation_FG = torch.zeros_like(counts.both_FG, dtype=torch.int8)
    for name, holds_FG in holds.items():            # what comes later wins
        relation_FG[holds_FG] = RELATIONS.index(name)
    return relation_FG


def relation_shares(relation_FG):
    """How many units have a partner in each relation? Shares of all units: subsumed_a, of A's units
    that are a part of some unit of B; subsumed_b, of B's units that some unit of A is a part of."""
    shares = {}
    for place, name in enumerate(RELATIONS[1:], 1):
        holds_FG = relation_FG == place
        shares[f"{name}_a"] = holds_FG.any(1).double().mean().item()
        shares[f"{name}_b"] = holds_FG.any(0).double().mean().item()
    return shares


# ----------------------------------------------------------------------------------- correlations
@dataclass
class Covariances:
    """How do the values of all units vary together, over the tokens of one split?"""
    mean_F: torch.Tensor
    mean_G: torch.Tensor
    aa_FF: torch.Tensor
    ab_FG: torch.Tensor
    bb_GG: torch.Tensor

    def back(self):
        """The covariances as B sees them."""
        return Covariances(self.mean_G, self.mean_F, self.bb_GG, self.ab_FG.T, self.aa_FF)

    def scales(self):
        """1 / std of each unit, (F) and (G); 0 for a unit that never varies."""
        return inverse_std(self.aa_FF, self.mean_F), inverse_std(self.bb_GG, self.mean_G)

    def correlation(self):
        """Pearson's r of unit i and unit j, (F, G); 0 for a unit that never varies."""
        scale_F, scale_G = self.scales()
        return scale_F.unsqueeze(1) * self.ab_FG * scale_G

    def about(self, mean_F, mean_G):
        """The mean products of differences from given means, such as those of another split."""
        off_F = self.mean_F - mean_F
        off_G = self.mean_G - mean_G
        return Covariances(mean_F, mean_G, self.aa_FF + torch.outer(off_F, off_F),
                           self.ab_FG + torch.outer(off_F, off_G),
                           self.bb_GG + torch.outer(off_G, off_G))


def inverse_std(covariance_FF, mean_F):
    """1 / std of each unit, 0 for one whose variance is lost in rounding."""
    variance_F = covariance_FF.diagonal()
    varies_F = variance_F > 1e-4 * (variance_F + mean_F**2)
    return torch.where(varies_F, variance_F, math.inf).rsqrt()


def covariances(a, b):
    """How do what units of a and of b say vary together? Covariances. 2 s."""
    mean_F = mean_value(a)
    mean_G = mean_value(b)
    return Covariances(mean_F, mean_G,
                       products(a, a) / a.N - torch.outer(mean_F, mean_F),
                       products(a, b) / a.N - torch.outer(mean_F, mean_G),
                       products(b, b) / a.N - torch.outer(mean_G, mean_G))


def mean_value(recording):
    """Average what each unit says over all tokens, 0 where it is off: (F)."""
    zero_F = recording.value_E.new_zeros(recording.F, dtype=torch.double)
    return zero_F.index_add(0, recording.unit_E, recording.value_E.double()) / recording.N


def likeness(covariance, a, b):
    """How alike are what unit i and unit j say? r, or |r| if a value of either has a sign: (F,
    G)."""
    return matching.unsigned(covariance.correlation(), a, b)


def uniqueness(r_FG):
    """Do A's units have best matches of their own? The number of B's units that are the best match
    of one of A's, over F: 1 = each has its own; it cannot be above G / F (Chanin and Garriga-Alonso
    2026, arXiv:2602.14687)."""
    return len(r_FG.argmax(1).unique()) / len(r_FG)


# ----------------------------------------------------------------------------------------- graph
def information_floor(null_counts, share=TAIL):
    """Above how many bits is mutual information more than chance? The value that only `share` of
    all pairs of units exceed. null_counts: coactivation with `by_chance`."""
    information = null_counts.information().flatten()
    place = math.ceil((1 - share) * len(information))
    return information.kthvalue(place).values.item()


def edges(r_FG, information_FG, floor, least=EDGE):
    """Which units of A and B are linked? Those with r >= least whose mutual information is above
    the floor: (F, G), bool. By the floor alone 0.1 % of chance pairs are linked."""
    return (r_FG >= least) & (information_FG > floor)


class Components(NamedTuple):
    """What hangs together by edges: for each unit the number of its component, and how many units
    of A and of B are in it."""
    name_F: torch.Tensor
    name_G: torch.Tensor
    a_F: torch.Tensor
    b_F: torch.Tensor
    a_G: torch.Tensor
    b_G: torch.Tensor


def components(is_edge_FG):
    """Which units hang together, directly or by way of others? Components, each named after its
    first unit of A; F + j where it is unit j of B alone. 1 s, and F^2 numbers of 8 bytes."""
    F, G = is_edge_FG.shape
    # units of A are linked where they have a partner in common
    shared_FF = is_edge_FG.float() @ is_edge_FG.float().T
    is_linked_FF = (shared_FF > 0) | torch.eye(F, dtype=torch.bool, device=is_edge_FG.device)
    name_F = name_clusters(is_linked_FF)
    first_G = is_edge_FG.byte().argmax(0)       # of the units of A that it is linked with
    alone_G = F + torch.arange(G, device=is_edge_FG.device)
    name_G = torch.where(is_edge_FG.any(0), name_F[first_G], alone_G)
    a_C = torch.bincount(name_F, minlength=F + G)
    b_C = torch.bincount(name_G, minlength=F + G)
    return Components(name_F, name_G, a_C[name_F], b_C[name_F], a_C[name_G], b_C[name_G])


def kinds(n_a, n_b):
    """What kind is a component with so many units of A and of B? {kind: bool}, read from A to B:
    one_to_many is one unit of A and several of B."""
    is_orphan = (n_a == 0) | (n_b == 0)
    is_one_a = n_a == 1
    is_one_b = n_b == 1
    return dict(orphan=is_orphan,
                one_to_one=~is_orphan & is_one_a & is_one_b,
                one_to_many=~is_orphan & is_one_a & ~is_one_b,
                many_to_one=~is_orphan & ~is_one_a & is_one_b,
                many_to_many=~is_orphan & ~is_one_a & ~is_one_b)


def graph_numbers(is_edge_FG):
    """How many partners do units have? Of A's units (.._a) and of B's (.._b): degree, the mean
    number of partners, and the share of the units in each of the `kinds` of components."""
    found = components(is_edge_FG)
    sides = {"a": (is_edge_FG.sum(1), found.a_F, found.b_F),
             "b": (is_edge_FG.sum(0), found.a_G, found.b_G)}
    numbers = {}
    for side, (degree, n_a, n_b) in sides.items():
        numbers[f"degree_{side}"] = degree.double().mean().item()
        for kind, is_kind in kinds(n_a, n_b).items():
            numbers[f"{kind}_{side}"] = is_kind.double().mean().item()
    return numbers


class Case(NamedTuple):
    """Some units of A and of B that show one kind of component, and how clearly they do."""
    one: list           # units of a
    other: list         # units of b
    score: float


def clearest_cases(r_FG, is_edge_FG, first=20):
    """Which components show best what one to one, one to many and many to one look like, and which
    units have no partner at all? {kind: [Case]}, the clearest first.

    A component is as clear as its weakest edge, the smallest r. orphan_a, orphan_b: units without
    an edge, those first whose largest r with any unit is smallest; that r is their score."""
    found = components(is_edge_FG)
    i, j = is_edge_FG.nonzero(as_tuple=True)
    none_C = r_FG.new_full((sum(r_FG.shape),), math.inf)
    weakest_C = none_C.scatter_reduce(0, found.name_F[i], r_FG[i, j], "amin")

    cases = {}
    for kind, is_kind_F in kinds(found.a_F, found.b_F).items():
        if kind in ("one_to_one", "one_to_many", "many_to_one"):
            name = found.name_F[is_kind_F].unique()
            order = weakest_C[name].argsort(descending=True, stable=True)[:first]
            cases[kind] = [case(found, c, weakest_C) for c in name[order].tolist()]

    best_F = r_FG.amax(1)
    best_G = r_FG.amax(0)
    orphan_F = (~is_edge_FG.any(1)).nonzero().squeeze(1)
    orphan_G = (~is_edge_FG.any(0)).nonzero().squeeze(1)
    loneliest_F = orphan_F[best_F[orphan_F].argsort(stable=True)[:first]].tolist()
    loneliest_G = orphan_G[best_G[orphan_G].argsort(stable=True)[:first]].tolist()
    cases["orphan_a"] = [Case([i], [], best_F[i].item()) for i in loneliest_F]
    cases["orphan_b"] = [Case([], [j], best_G[j].item()) for j in loneliest_G]
    return cases


def case(found, name, weakest_C):
    """One component as a Case."""
    one = (found.name_F == name).nonzero().squeeze(1).tolist()
    other = (found.name_G == name).nonzero().squeeze(1).tolist()
    return Case(one, other, weakest_C[name].item())


# --------------------------------------------------------------------------------- reconstruction
class Reconstruction(NamedTuple):
    """How well are B's units rebuilt from few of A's?"""
    source_GS: torch.Tensor     # A's units, in the order in which they are chosen
    r2_GS: torch.Tensor         # R^2 on test from the first one, the first two, ..
    r2_all_G: torch.Tensor      # R^2 on test from all of A's units
    needed_G: torch.Tensor      # how many sources reach 90 % of r2_all; S + 1: more than S


def reconstruct(fit, test, most=SOURCES):
    """Do few units of A say together what a unit of B says? Reconstruction.

        a_j ~ sum over S units i of w_ij a_i + constant

    S <= 5 sources are chosen one after the other, each the one that correlates most with what is
    left over, and all weights are fitted anew after each choice: orthogonal matching pursuit (Pati
    et al. 1993). Chosen and fitted on fit, R^2 = 1 - error / variance on test: 1 = all, 0 = no more
    than the mean, below 0 = worse. Weights may be below 0. NaN for a unit that never varies.

    High for B from A, and low for A from B (`back` of both): B's units are sums of A's. fit, test:
    `covariances` of the two splits. 2 s."""
    # All values over their standard deviations in fit, and less their means in fit.
    scale_F, scale_G = fit.scales()
    test_from_fit = test.about(fit.mean_F, fit.mean_G)
    both_F = torch.outer(scale_F, scale_F)
    both_GF = torch.outer(scale_G, scale_F)
    C_FF = fit.aa_FF * both_F + RIDGE * torch.eye(len(scale_F)).to(both_F)
    C_test_FF = test_from_fit.aa_FF * both_F
    c_GF = fit.ab_FG.T * both_GF
    c_test_GF = test_from_fit.ab_FG.T * both_GF
    square_G = test_from_fit.bb_GG.diagonal() * scale_G**2
    variance_G = test.bb_GG.diagonal() * scale_G**2
    variance_G = torch.where(variance_G > 0, variance_G, math.nan)

    # From few sources, a band of targets at a time.
    sources = []
    r2s = []
    for band in torch.arange(len(scale_G), device=scale_G.device).split(BAND):
        found = pursuit(C_FF, c_GF[band], most)
        errors = [squared_error(*step, C_test_FF, c_test_GF[band]) for step in found]
        error_GS = torch.stack(errors, 1) + square_G[band].unsqueeze(1)
        r2s.append(1 - error_GS / variance_G[band].unsqueeze(1))
        sources.append(found[-1][0])
    source_GS = torch.cat(sources)
    r2_GS = torch.cat(r2s)

    # From all sources.
    W_FG = torch.linalg.solve(C_FF, c_GF.T)
    error_G = square_G - 2 * (W_FG * c_test_GF.T).sum(0) + (W_FG * (C_test_FF @ W_FG)).sum(0)
    r2_all_G = 1 - error_G / variance_G
    is_short_GS = r2_GS.cummax(1).values < 0.9 * r2_all_G.unsqueeze(1)
    needed_G = (1 + is_short_GS.sum(1)).double().where(r2_all_G > 0, math.nan)
    return Reconstruction(source_GS, r2_GS, r2_all_G, needed_G)


def pursuit(C_FF, c_GF, most):
    """Choose sources one after the other: [(sources (G, s), weights (G, s))] for s = 1 .. most.

    C_FF: correlations of the sources with each other, c_GF: of each target with the sources."""
    steps = []
    chosen_GS = torch.zeros(len(c_GF), 0, dtype=torch.long, device=c_GF.device)
    left_GF = c_GF
    for _ in range(min(most, len(C_FF))):
        # What is left over correlates most with which source that is not chosen yet?
        score_GF = left_GF.abs().scatter(1, chosen_GS, -1.)
        chosen_GS = torch.cat([chosen_GS, score_GF.argmax(1, keepdim=True)], 1)
        # Least squares: C_SS w_S = c_S.
        C_GSS = C_FF[chosen_GS.unsqueeze(2), chosen_GS.unsqueeze(1)]
        w_GS = torch.linalg.solve(C_GSS, c_GF.gather(1, chosen_GS))
        steps.append((chosen_GS, w_GS))
        left_GF = c_GF - (w_GS.unsqueeze(1) @ C_FF[chosen_GS]).squeeze(1)
    return steps


def squared_error(source_GS, w_GS, C_FF, c_GF):
    """The mean squared error of sum_s w_s a_s, less the target's mean square: -2 w c + w C w."""
    C_GSS = C_FF[source_GS.unsqueeze(2), source_GS.unsqueeze(1)]
    squares_G = torch.einsum("gs,gst,gt->g", w_GS, C_GSS, w_GS)
    return squares_G - 2 * (w_GS * c_GF.gather(1, source_GS)).sum(1)


# ------------------------------------------------------------------------------------- subspaces
def cka(covariance):
    """Do A's units together say what B's units together say? Linear CKA of their values,

        |cov_ab|^2 / (|cov_aa| |cov_bb|)        Frobenius norms

    1 = the values are rotations of each other, 0 = unrelated (Kornblith et al. 2019,
    arXiv:1905.00414). It does not ask whether single units agree."""
    size = covariance.aa_FF.norm() * covariance.bb_GG.norm()
    return (covariance.ab_FG.square().sum() / size).item()


def principal_cosines(one_UD, other_UD):
    """Do two sets of directions span the same space? The cosines of the principal angles, largest
    first; as many as the smaller space has dimensions. Their mean is the number to read: 1 = the
    smaller lies in the larger, 0 = orthogonal.

    Random spaces of n and n' dimensions of D have a mean square cosine of max(n, n') / D. Give it
    the directions of the 20 units, say, that write most (stability.total_written)."""
    cosines = torch.linalg.svdvals(basis(one_UD) @ basis(other_UD).T)
    return cosines.clamp(max=1)


def basis(rows_UD):
    """Orthonormal rows that span what these rows span."""
    _, size, rows = torch.linalg.svd(rows_UD.double(), full_matrices=False)
    return rows[size > 1e-6 * size[0]]


# ------------------------------------------------------------------------- all that recordings say
def mapping(fit, test, row, gen):
    """How do the units of two methods lie to each other? A flat dict of what can be read from their
    recordings. .._a is said of A's units, .._b of B's:

        best_a, unique_a        mean over A's units of their largest r; `uniqueness`
        explained_a             `explained_information` about A's units by B's
        equal_a, subsumed_a, .. `relation_shares`
        degree_a, orphan_a, ..  `graph_numbers` at r >= 0.4
        degree_a_0.3, ..        degree and orphan at other thresholds
        r2_1_a, r2_5_a, r2_all_a, needed_a      means over A's units of `reconstruct`, from B's
        cka

    and null_KEY for each, with B's units moved to the wrong text (`by_chance`), and
    information_floor. All on test, but for choosing and fitting sources. fit, test: recordings
    (a, b) each, of the same units. 20 s."""
    null_fit = (fit[0], by_chance(fit[1], row, gen))
    null_test = (test[0], by_chance(test[1], row, gen))
    floor = information_floor(coactivation(*null_test))
    numbers = map_numbers(fit, test, floor)
    for key, value in map_numbers(null_fit, null_test, floor).items():
        numbers[f"null_{key}"] = value
    return numbers | {"information_floor": floor}


def map_numbers(fit, test, floor):
    """The numbers of `mapping` without their null."""
    counts = coactivation(*test)
    on_fit = covariances(*fit)
    on_test = covariances(*test)
    r_FG = likeness(on_test, *test)
    numbers = relation_shares(relations(counts)) | {"cka": cka(on_test)}

    # Each side as the other sees it.
    sides = {"a": (r_FG, counts.back(), on_fit.back(), on_test.back()),
             "b": (r_FG.T, counts, on_fit, on_test)}
    for side, (r, seen, of_fit, of_test) in sides.items():
        numbers[f"best_{side}"] = r.amax(1).mean().item()
        numbers[f"unique_{side}"] = uniqueness(r)
        numbers[f"explained_{side}"] = explained_information(seen)
        rebuilt = reconstruct(of_fit, of_test)
        for k in (1, SOURCES):
            numbers[f"r2_{k}_{side}"] = mean(rebuilt.r2_GS[:, :k][:, -1].tolist())
        numbers[f"r2_all_{side}"] = mean(rebuilt.r2_all_G.tolist())
        numbers[f"needed_{side}"] = mean(rebuilt.needed_G.tolist())

    # The graph, at the threshold that counts and at others.
    information_FG = counts.information()
    numbers |= graph_numbers(edges(r_FG, information_FG, floor))
    for least in AROUND:
        found = graph_numbers(edges(r_FG, information_FG, floor, least))
        for key in ("degree_a", "degree_b", "orphan_a", "orphan_b"):
            numbers[f"{key}_{least}"] = found[key]
    return numbers


# ----------------------------------------------------------------------------------------- groups
class Groups(NamedTuple):
    """Groups of A's units, each of the units that one unit of B subsumes. A unit may be in several.
    Memberships come by group."""
    unit_M: torch.Tensor        # a member
    group_M: torch.Tensor       # its group, 0 to Q - 1
    whole_Q: torch.Tensor       # the unit of B

    def sizes(self):
        return torch.bincount(self.group_M, minlength=len(self.whole_Q))


def subsumed_groups(relation_FG, least=2):
    """Which units of B subsume several of A's, and which ones? Groups."""
    is_part_FG = relation_FG == RELATIONS.index("subsumed")
    whole_Q = (is_part_FG.sum(0) >= least).nonzero().squeeze(1)
    group_M, unit_M = is_part_FG[:, whole_Q].T.nonzero(as_tuple=True)
    return Groups(unit_M, group_M, whole_Q)


def alike_units(on_F, draws, gen, near=32):
    """Put another unit that is on about as often in the place of each unit, at random: (draws, F).

    Units are sorted by how often they are on and cut into strata of `near` units, and a draw
    shuffles each stratum: no two units get the same one, so that random groups are as large as the
    true ones."""
    F = len(on_F)
    order_F = on_F.argsort(stable=True).cpu()
    # the last stratum takes what is left over
    stratum_F = (torch.arange(F) // near).clamp(max=max(F // near - 1, 0))
    shuffled_UF = (stratum_F + torch.rand(draws, F, generator=gen, dtype=torch.double)).argsort(1)
    return torch.empty_like(shuffled_UF).index_copy_(1, order_F, order_F[shuffled_UF]).to(on_F)


def pairs_within(groups):
    """Which two memberships are of one group? Their places (P) and (P), and the group (P)."""
    size_M = groups.sizes()[groups.group_M]
    place_M = torch.arange(len(size_M), device=size_M.device)
    end_M = groups.sizes().cumsum(0)[groups.group_M]
    after_M = end_M - 1 - place_M           # members of the group behind this one
    one_P = place_M.repeat_interleave(after_M)
    first_M = after_M.cumsum(0) - after_M
    other_P = one_P + 1 + torch.arange(len(one_P), device=one_P.device) - first_M[one_P]
    return one_P, other_P, groups.group_M[one_P]


def mean_similarity(S_FF, groups, stand_in_UF):
    """How similar are the members of each group to each other? The mean of S over its pairs, (U,
    Q), with other units in the place of all units in each of U draws."""
    one_P, other_P, group_P = pairs_within(groups)
    one_P = groups.unit_M[one_P]
    other_P = groups.unit_M[other_P]
    n_Q = torch.bincount(group_P, minlength=len(groups.whole_Q))
    parts = []
    for unit_UF in stand_in_UF.split(max(1, AT_ONCE // len(one_P))):
        S_UP = S_FF[unit_UF[:, one_P], unit_UF[:, other_P]].double()
        parts.append(S_UP.new_zeros(len(unit_UF), len(n_Q)).index_add_(1, group_P, S_UP) / n_Q)
    return torch.cat(parts)


def concept_entropy(concept_F, K, groups, stand_in_UF):
    """Do the members of a group share their best concept? The entropy in bits of which of K
    concepts is a member's best, (U, Q), with other units in the place of all units in each of U
    draws: 0 = all share one."""
    Q = len(groups.whole_Q)
    parts = []
    for unit_UF in stand_in_UF.split(max(1, AT_ONCE // max(Q * K, len(groups.unit_M)))):
        U = len(unit_UF)
        draw_U1 = torch.arange(U, device=unit_UF.device).unsqueeze(1)
        concept_UM = concept_F[unit_UF[:, groups.unit_M]]
        place_UM = (draw_U1 * Q + groups.group_M) * K + concept_UM
        n_UQK = torch.bincount(place_UM.flatten(), minlength=U * Q * K).view(U, Q, K)
        p_UQK = n_UQK.double() / groups.sizes().unsqueeze(1)
        parts.append(entropy_term(p_UQK).sum(-1))
    return torch.cat(parts)


def union_numbers(a, b, groups, unit_M, label_NK, true_K):
    """Do the members of a group make up their whole, and one concept? (Q) each:

        cover   share of the tokens of the whole, the unit of b, at which a member is on
        spill   share of the tokens at which a member is on and the whole is not
        f1      F1 of the true concept that says best where a member is on; not without concepts

    for these members in the place of the groups' own. label_NK: concepts, as floats; true_K: at how
    many tokens each is true. 0.03 s."""
    union = unite(a, unit_M, groups.group_M, len(groups.whole_Q))
    is_whole_on_E = b.at(groups.whole_Q[union.unit_E], union.token_E) != 0
    both_Q = torch.bincount(union.unit_E[is_whole_on_E], minlength=union.F)
    on_Q = union.on()
    numbers = dict(cover=both_Q / b.on()[groups.whole_Q], spill=1 - both_Q / on_Q)
    if label_NK.shape[1]:
        f1_QK = f1_scores(on_Q.unsqueeze(1), true_K, union.sums(label_NK))
        numbers["f1"] = f1_QK.amax(1)
    return {key: value_Q.double() for key, value_Q in numbers.items()}


class Score(NamedTuple):
    """A number of each group, and how far it is above that of random groups."""
    value_Q: torch.Tensor
    z_Q: torch.Tensor           # in standard deviations; NaN where random groups do not vary


LOW = {"entropy", "spill"}      # are low where a group is coherent: their z is turned round


def score(name, value_Q, null_UQ):
    """Hold a number of each group against that of U random groups: a Score."""
    std_Q = null_UQ.std(0)
    z_Q = (value_Q - null_UQ.mean(0)) / torch.where(std_Q > 1e-9, std_Q, math.nan)
    return Score(value_Q, -z_Q if name in LOW else z_Q)


def coherence(a, b, groups, similarities, gen, draws=1000, union_draws=100):
    """Do the units of A that one unit of B subsumes belong together? {name: Score}, groups (Q):

        cover, spill, f1    `union_numbers`
        entropy             `concept_entropy`
        NAME                `mean_similarity` of each of the similarities {NAME: S_FF}, such as
                            cosines of what units write, and of what they read

    z is above 0 where a group is more coherent than random groups of as many units, each on about
    as often as the member that it stands for. Members are chosen for lying in their whole, so that
    z of cover and spill is large by construction; f1, entropy and the similarities are the
    evidence. f1 and entropy need concepts that are neither too rare nor too common
    (recording.testable_concepts), and are left out without any.

    2 s for similarities and entropy, 0.03 s for each of the union_draws random unions."""
    if not len(groups.whole_Q):
        return {}
    concepts = testable_concepts(a)
    stand_in_UF = alike_units(a.on(), draws, gen)
    itself_1F = torch.arange(a.F, device=stand_in_UF.device).unsqueeze(0)

    # What is read off a table of units, for the true members and for random ones.
    scores = {}
    for name, S_FF in similarities.items():
        own_1Q = mean_similarity(S_FF, groups, itself_1F)
        scores[name] = score(name, own_1Q[0], mean_similarity(S_FF, groups, stand_in_UF))
    if len(concepts):
        about = (best_concepts(a, concepts, 1).squeeze(1), len(concepts), groups)
        own_1Q = concept_entropy(*about, itself_1F)
        scores["entropy"] = score("entropy", own_1Q[0], concept_entropy(*about, stand_in_UF))

    # What needs the tokens of all members together: fewer draws.
    label_NK = a.label_NK[:, concepts].float()
    labels = label_NK, label_NK.sum(0)
    own = union_numbers(a, b, groups, groups.unit_M, *labels)
    random = [union_numbers(a, b, groups, unit_F[groups.unit_M], *labels)
              for unit_F in stand_in_UF[:union_draws]]
    for name, value_Q in own.items():
        scores[name] = score(name, value_Q, torch.stack([numbers[name] for numbers in random]))
    return scores


def share_coherent(scores, groups, names=("write", "f1")):
    """Which share of the units in groups is in a coherent one, z > 2 in all these scores? By
    chance alone about 0.05 % where two scores are independent. NaN without groups."""
    if not scores:
        return math.nan
    is_coherent_Q = torch.stack([scores[name].z_Q > COHERENT for name in names]).all(0)
    return is_coherent_Q[groups.group_M].double().mean().item()


def read_similarity(m, recording):
    """Do units read alike? Cosines of what m's units read, (F, F), for the units of a recording.

    0 for units of different blocks, such as SPD's two matrices, which read different things.
    Components have no sign: |cosine|. Maps read more than one direction: the cosine of their
    matrices (metrics/matching.py)."""
    blocks = matching.blocks(m)
    n_units = sum(len(block.unit_n) for block in blocks)
    S = blocks[0].read.new_zeros(n_units, n_units)
    for block in blocks:
        if block.kind == "map":
            own, _ = matching.similarity(block, block)
        else:
            own = matching.cosines(block.read, block.read)
        own = own.abs() if block.kind == "component" else own
        S[block.unit_n.unsqueeze(1), block.unit_n] = own
    return S[recording.origin_F.unsqueeze(1), recording.origin_F]


# ---------------------------------------------------------------------------------------- effects
# here K alternatives in B for each of P ablations of A, M tables of moments, E = D + 1
def switched(recording, units_P, n_units):
    """Which of m's n_units units does each of P ablations switch off? (P, n_units), bool: the unit
    that units_P is, or is a half of."""
    return nnf.one_hot(recording.origin_F[units_P], n_units).bool()


def switched_clusters(recording, cluster_F, n_units):
    """Which of m's units does each cluster of a recording's units switch off? (C, n_units), bool:
    for effect_match."""
    C = int(cluster_F.max()) + 1
    is_off = torch.zeros(C, n_units, dtype=torch.bool, device=cluster_F.device)
    is_off[cluster_F, recording.origin_F] = True
    return is_off


def control_units(b, units_P, gen):
    """Pick other units of B, on about as often as these: the null of `effect_match`. (P)."""
    return matched_in_frequency(b, units_P.unsqueeze(1), gen).squeeze(1)


@dataclass
class Ablations:
    """One decomposition on one batch of rows, and what changes when units are switched off."""
    m: object
    gpt: object
    idx_BT: torch.Tensor

    def __post_init__(self):
        self.layer, = self.m.layers
        self.x_BTD, self.stream_BTD, self.f_BTF = clean_with_stream(
            self.m, self.gpt, self.idx_BT, self.layer)
        y_BTD = self.gpt.mlp(self.layer)(self.x_BTD)
        self.error_BTD = y_BTD - self.m.decode(self.layer, self.f_BTF, self.x_BTD)
        self.final_BTD = self.gpt.hidden(self.stream_BTD, y_BTD, self.layer)

    def changes(self, off_PF):
        """How does what the unembedding reads change, at each scored position, when units are
        switched off and m's error is kept? Its D numbers and a 1: (P, N, D + 1)."""
        P = len(off_PF)
        on_P11F = ~off_PF[:, None, None]
        without = (self.f_BTF * on_P11F).flatten(0, 1)
        y = self.m.decode(self.layer, without, self.x_BTD.repeat(P, 1, 1))
        y = y + self.error_BTD.repeat(P, 1, 1)
        final = self.gpt.hidden(self.stream_BTD.repeat(P, 1, 1), y, self.layer)
        change_PBTD = final.unflatten(0, (P, -1)) - self.final_BTD
        change_PND = change_PBTD[:, :, 1:-1].flatten(1, 2).double()
        return nnf.pad(change_PND, (0, 1), value=1)


@torch.no_grad()
def effect_match(A, B, gpt, rows_RT, off_PF, off_KPG, top=50, batch=4, at_once=4):
    """Does switching off units of A do to the predictions what switching off units of B does?
    Pearson's r of each of P ablations of A with K of B, (K, P): 1 = the same effect, 0 = unrelated,
    -1 = opposite. NaN where an ablation has no effect on these rows.

    The effect of an ablation is the change of the logits, less their mean over the vocabulary,
    which no prediction depends on, at each scored position. r is taken over positions and over the
    `top` words whose logits vary most under the two ablations, each counted in shares of its own
    total variance; each word's mean change is taken off. f = 0 for a unit that is off, with what
    the decomposition leaves out kept, as evals.splice has it: for an SPD the other components keep
    their importances as masks.

    off_PF, off_KPG: the units of A and of B to switch off, bool: one unit (`switched`), or a
    cluster. Of a cross-layer feature, what it writes at this MLP.

    Logits are linear in what the unembedding reads: with C the covariance of its D numbers, or of
    theirs under two ablations, and w the word's row of W_U less the mean row, w' C w is that of the
    word's logit. So no logits are needed: (1 + K) P passes of what lies between the MLP and the
    unembedding, 0.15 s each for 32 rows of 128 tokens. Memory: (1 + 2 K) P tables of D x D, in
    double."""
    K = len(off_KPG)
    P = len(off_PF)
    E = gpt.cfg.n_embd + 1          # and a 1
    means_MPEE = torch.zeros(1 + 2 * K, P, E, E, dtype=torch.double, device=gpt.device)
    for idx_BT in split_rows(rows_RT, batch):
        a = Ablations(A, gpt, idx_BT)
        b = Ablations(B, gpt, idx_BT)
        for pairs in torch.arange(P).split(at_once):
            of_A = a.changes(off_PF[pairs])
            of_B = torch.stack([b.changes(off_PG[pairs]) for off_PG in off_KPG])
            means_MPEE[0, pairs] += of_A.mT @ of_A
            means_MPEE[1:, pairs] += torch.cat([of_A.mT @ of_B, of_B.mT @ of_B])
    R, T = rows_RT.shape
    means_MPEE /= R * (T - 2)
    of_words = covariances_of_words(means_MPEE, gpt.unembedding)
    one_1PV, product_KPV, other_KPV = of_words.split([1, K, K])
    return correlation_of_top(product_KPV, one_1PV.expand_as(product_KPV), other_KPV, top)


def covariances_of_words(means_MPEE, unembedding_VD):
    """From means of products of `changes`, how do the logits of each word covary? (M, P, V)."""
    word_VD = (unembedding_VD - unembedding_VD.mean(0)).double()
    tables = []
    for mean_PEE in means_MPEE:
        one_PD = mean_PEE[:, :-1, -1]
        other_PD = mean_PEE[:, -1, :-1]
        covariance_PDD = mean_PEE[:, :-1, :-1] - one_PD.unsqueeze(2) * other_PD.unsqueeze(1)
        tables.append(torch.stack([(word_VD @ c_DD * word_VD).sum(1) for c_DD in covariance_PDD]))
    return torch.stack(tables)


def correlation_of_top(covariance_KPV, variance_KPV, other_KPV, top):
    """Correlate two changes over tokens and the words that vary most: (K, P)."""
    share_KPV = nnf.normalize(variance_KPV, p=1, dim=2) + nnf.normalize(other_KPV, p=1, dim=2)
    words_KPV = share_KPV.topk(min(top, share_KPV.shape[2]), 2).indices
    of_words = [table.gather(2, words_KPV).sum(2)
                for table in (covariance_KPV, variance_KPV, other_KPV)]
    covariance_KP, variance_KP, other_KP = of_words
    # Where nothing is switched off, numbers move by rounding alone.
    is_felt_KP = torch.minimum(variance_KP, other_KP) > ROUNDING**2 * words_KPV.shape[2]
    r_KP = covariance_KP / (variance_KP * other_KP).sqrt()
    return torch.where(is_felt_KP, r_KP, math.nan)


# --------------------------------------------------------------------------------------- clusters
def code_bits(n, N):
    """How many bits say at which n of N tokens something happens, if n is known? N H(n / N)."""
    entropy_of = torch.special.xlogy(N, N) - torch.special.xlogy(n, n)
    return (entropy_of - torch.special.xlogy(N - n, N - n)) / math.log(2)


def cluster_bits(on_F, cluster_F, on_C, N):
    """How many bits does each cluster take in the code of `code_length`? (C)"""
    size_C = torch.bincount(cluster_F, minlength=len(on_C))
    zero_C = torch.zeros_like(on_C)
    members_C = zero_C.index_add(0, cluster_F, code_bits(on_F, on_C[cluster_F]))
    return code_bits(on_C, on_C.new_tensor(N)) + members_C + parameter_bits(size_C, N)


def parameter_bits(size, N):
    """How many bits do a cluster's frequencies take? log2(N) / 2 each: its own, and if it has
    several units those of its units."""
    n_frequencies = torch.where(size > 1, size + 1, size)
    return n_frequencies * math.log2(N) / 2


def merger_bits(F):
    """How many bits does it take to name two of F units?"""
    return math.log2(max(1, F * (F - 1) / 2))


def code_length(recording, cluster_F):
    """How many bits say where all units are on, if clusters of units are told together?

        sum over clusters c of    N H(n_c / N)                          where is c on?
                                + sum over its units of n_c H(n_i / n_c)    which units, there?
                                + log2(N) / 2 for each frequency n / N that has to be told

        + log2(F (F - 1) / 2) for each of the F - C mergers that make the clusters: which pair?

    A cluster is on where one of its units is, at n_c tokens; H(p) is the entropy of p. Units that
    are on together are told in fewer bits as one cluster, independent ones in more (minimum
    description length, Rissanen 1978). Lower is better; each unit alone is the yardstick."""
    union = clustered(recording, cluster_F)
    bits_C = cluster_bits(recording.on().double(), cluster_F, union.on().double(), recording.N)
    n_mergers = recording.F - union.F
    return bits_C.sum().item() + n_mergers * merger_bits(recording.F)


def clustered(recording, cluster_F):
    """The recording of clusters, numbered from 0, in the place of units."""
    units = torch.arange(recording.F, device=cluster_F.device)
    return unite(recording, units, cluster_F, int(cluster_F.max()) + 1)


def change_by_merging(recording, cluster_F):
    """By how much does the code grow when two clusters become one? (C, C); infinite where a unit
    would be on at less than half of the tokens of its cluster, and on the diagonal."""
    N = recording.N
    on_F = recording.on().double()
    counts = coactivation(*[clustered(recording, cluster_F)] * 2)
    on_C = counts.on_F
    either_CC = on_C.unsqueeze(1) + on_C - counts.both_FG

    # Each unit within the union of its cluster and another; then the other's units likewise.
    bits_FC = code_bits(on_F.unsqueeze(1), either_CC[cluster_F])
    own_CC = torch.zeros_like(either_CC).index_add_(0, cluster_F, bits_FC)
    size_C = torch.bincount(cluster_F)
    merged_CC = code_bits(either_CC, either_CC.new_tensor(N)) + own_CC + own_CC.T
    merged_CC += parameter_bits(size_C.unsqueeze(1) + size_C, N)
    before_C = cluster_bits(on_F, cluster_F, on_C, N)
    change_CC = merged_CC - before_C.unsqueeze(1) - before_C + merger_bits(recording.F)

    # In a cluster that is on nearly everywhere any unit is told as cheaply as alone.
    rarest_C = torch.full_like(on_C, math.inf).scatter_reduce(0, cluster_F, on_F, "amin")
    is_apart_CC = torch.minimum(rarest_C.unsqueeze(1), rarest_C) < TOGETHER * either_CC
    return change_CC.masked_fill(is_apart_CC, math.inf).fill_diagonal_(math.inf)


def clusters(recording, seed=0):
    """Which units are on together? The cluster of each, (F), numbered from 0.

    Starts with each unit alone and merges while the code that says where all units are on
    (`code_length`) gets shorter. In each round any two clusters merge that are each other's best
    choice; the code is a sum over clusters, so that what they save adds up. Ties are broken at
    random.

    Each unit is on at half of the tokens of its cluster or more: a cluster is no list of units that
    are rarely on together, nor a unit and its parts (`relations` has those). A unit that is on with
    no other stays alone. 1 s a round, five to ten rounds."""
    gen = torch.Generator().manual_seed(seed)
    cluster_F = torch.arange(recording.F, device=recording.unit_E.device)
    while True:
        change_CC = change_by_merging(recording, cluster_F)
        C = len(change_CC)
        tie_CC = torch.rand(C, C, generator=gen, dtype=torch.double).to(change_CC)
        change_CC = change_CC * (1 + 1e-9 * (tie_CC + tie_CC.T))

        # Merge pairs that are each other's best.
        least_C, best_C = change_CC.min(1)
        all_C = torch.arange(C, device=best_C.device)
        is_merged_C = (least_C < 0) & (best_C[best_C] == all_C)
        if not is_merged_C.any():
            return cluster_F
        new_C = torch.where(is_merged_C, torch.minimum(all_C, best_C), all_C)
        cluster_F = new_C[cluster_F].unique(return_inverse=True)[1]
