"""What did the methods find? One page to browse the units of decompositions of one MLP.

    python -m report.gallery runs/spd runs/sae      # writes units.html, of any number of runs
    python spd.py --C 256                           # writes runs/spd/units.html in the end

The page is one file without a network: it opens from the disk, and each of its states has an
address (#spd/7, #concept/animal). For each unit it says where it is on, in the words of the text;
how well the best true concept and a rule in words tell that, and where they are wrong; which tokens
it makes more and less likely; which neurons are like it; and which units of the other methods.

All methods are looked at on the same tokens. Whatever is chosen is chosen on fit: which units are
alive, each unit's concept, each concept's units, rules. What is shown is of test. On is f > 0, as
everywhere (SPD: importance above 0.1). The cards of all units may take CARDS bytes; where that is
too little for all, a part is shown, and the page says which.

The README's picture is of this page, of full runs of spd, transcoder, sae and molt:

    chromium --headless --hide-scrollbars --window-size=1100,640 --screenshot=report/gallery.png \\
        "file://$PWD/units.html#spd/7?q=nonsense"

N tokens (position 0 of each row left out), R rows, T positions, F units, U units with a card, J of
a unit's tokens, W tokens of a context, K concepts, D residual width, M neurons, V vocabulary, E
entries of a recording (metrics/recording.py). 4 s for 1,024 units and 12,800 tokens, 1 s for each
pair of methods.
"""
import copy
import importlib
import itertools
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import data
import evals
from common import PAGE
from metrics import mapping, matching, words
from metrics.recording import Active, record, testable_concepts
from model import GPT

TEMPLATE = Path(__file__).with_name("gallery.html")
ROOT = Path(__file__).parent.parent
CARDS = 4_000_000       # bytes of all cards, so that the page stays below 5 MB
MOST = 4_000            # units of a method that are looked at
CARDED = 6_000          # of all methods, for which a card is made
TOKENS = 12_800         # of fit and of test, for the page at the end of a run
RULES = 100             # units of each method that get a rule in words
STRONG = 5              # contexts where a unit says most, of a row one at most
WEAK = (0.5, 0.25, 0.05)        # and at which shares of its tokens, sorted by what it says there
WRONG = 3               # tokens at which a concept is wrong about a unit, of each kind
BEFORE = 12             # tokens of a context before ..
AFTER = 6               # .. and after the token that it is about
PUSHED = 6              # tokens that a unit makes more and less likely
LIKE = 3                # neurons that are like a unit
MATES = 2               # units of another method that are like a unit
BEST = 5                # units of a method that a concept names
BINS = 20               # of histograms
LEVELS = 255            # of activation
LEAST = 20              # tokens of fit at which a unit is on, if a rule is looked for
RESERVED = ("", "main", "concept", "concepts")      # addresses that are no method's


@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 that was taken apart
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    out: str = PAGE                 # the file to write, an .html
    eval_tokens: int = TOKENS       # [1, 1e9] tokens of fit (choices) and of test (what is shown)
    rules: int = RULES              # [0, 1e6] units of each method that get a rule in words
    device: str = "auto"            # auto, cpu, cuda


# ----------------------------------------------------------------------- what all are looked at on
@dataclass
class Scene:
    """The target, and the text on which all decompositions of a page are looked at."""
    gpt: GPT
    layer: int
    fit: tuple                      # (rows, labels)
    test: tuple
    names: list                     # of the concepts
    rules: int                      # units of each method that get a rule in words

    @property
    def T(self):
        return self.test[0].shape[1]

    @cached_property
    def literals(self):
        """The facts of which rules are made, and where they hold in fit and in test."""
        literals = words.Literals(self.fit[0], self.gpt.vocab)
        return literals, literals(self.fit[0]), literals(self.test[0])

    @cached_property
    def token_N(self):
        """The tokens of test that are looked at."""
        return self.test[0][:, 1:].flatten()


def scene_of(gpt, layer, spec, T, eval_tokens, rules):
    """The text that --data names, in rows of T tokens."""
    corpora = data.load_for(gpt, spec, T, ("fit", "test"))
    n_rows = max(2, eval_tokens // T)
    fit, test = [corpus.labelled(T, n_rows, gpt.device) for corpus in corpora.values()]
    return Scene(gpt, layer, fit, test, corpora["test"].names, rules)


# --------------------------------------------------------------------- the units of one method
@dataclass
class Look:
    """What was seen of one decomposition."""
    name: str                       # how the page calls it
    m: Any
    ce: float | None                # CE recovered
    fit: Active
    test: Active
    on_fit: dict                    # of tokens of fit: evals.counts, from the recording
    on_test: dict
    matched: Any                    # evals.Matched, or None without concepts
    alive: torch.Tensor             # numbers of the units that are on often enough
    units: torch.Tensor             # numbers of those that are to be shown, best first
    shown: Active                   # test, of these units

    def first(self, n):
        """The first units of a look."""
        units = self.units[:n]
        return replace(self, units=units, shown=turned(in_order(self.test, units)))

    def share(self, other):
        """Keep what is alike for all methods, inputs and labels, once."""
        pairs_of = ((self.fit, other.fit), (self.test, other.test), (self.shown, other.test))
        for own, others in pairs_of:
            own.x_ND = others.x_ND
            own.label_NK = others.label_NK


def look_at(name, m, ce, scene):
    """See where the units of one decomposition are on, and which of them are to be shown."""
    fit = record(m, scene.gpt, *scene.fit)
    test = record(m, scene.gpt, *scene.test)
    on_fit = counted(fit)
    on_test = counted(test)
    matched = evals.match(on_fit, on_test)
    alive = (fit.on() >= evals.ALIVE).nonzero().squeeze(1)
    there = alive[test.on()[alive] > 0]
    units = there[order(on_fit, matched, there)]
    look = Look(name, m, ce, fit, test, on_fit, on_test, matched, alive, units, test)
    return look.first(MOST)


def counted(a):
    """Count tokens as evals.counts does, from a recording, at the threshold 0."""
    both_FK = torch.zeros(a.F, 0, device=a.unit_E.device)
    if a.label_NK.shape[1] and len(a.unit_E):
        both_FK = a.sums(a.label_NK.float())
    return dict(on=a.on().unsqueeze(0), label=a.label_NK.sum(0), both=both_FK.unsqueeze(0), n=a.N)


def order(on_fit, matched, units):
    """In which order are units to be kept if there is room for some? Their places: first the best
    of each concept, then by turns one of the best and one at random."""
    first = []
    if matched and len(units):
        first = evals.f1_of_counts(on_fit)[0, units].argmax(0).tolist()
    places = dict.fromkeys([*first, *by_turns(on_fit, matched, units)])
    return torch.tensor([*places], dtype=torch.long, device=units.device)


def by_turns(on_fit, matched, units):
    """The places of units: by turns the one that fits its concept best, or without concepts is on
    most, and one at random."""
    rank_U = on_fit["on"][0, units]
    if matched:
        rank_U = matched.f1_F[units]
    best = rank_U.argsort(descending=True, stable=True).tolist()
    at_random = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).tolist()
    return [*dict.fromkeys(itertools.chain.from_iterable(zip(best, at_random)))]


def in_order(a, units):
    """Keep some units of a recording, numbered in this order."""
    ascending, place = units.sort()
    kept = mapping.select(a, ascending)
    unit_E = place[kept.unit_E]
    order_E = unit_E.argsort(stable=True)
    return Active(unit_E[order_E], kept.token_E[order_E], kept.value_E[order_E],
                  kept.f_E[order_E], units, a.x_ND, a.label_NK)


def turned(a):
    """Turn each unit such that what it says most is above 0: which sign an SPD's component has is
    arbitrary."""
    ends_U2 = ends(a)
    sign_U = torch.where(ends_U2.sum(1) < 0, -1, 1)
    return replace(a, value_E=a.value_E * sign_U[a.unit_E])


def ends(a):
    """The least and the largest that each unit says, or 0 where it never says less, or more: (U,
    2)."""
    zero_U = a.value_E.new_zeros(a.F)
    low_U = zero_U.scatter_reduce(0, a.unit_E, a.value_E, "amin")
    high_U = zero_U.scatter_reduce(0, a.unit_E, a.value_E, "amax")
    return torch.stack([low_U, high_U], 1)


# ------------------------------------------------------------------------- where a unit is on
def strongest(a, T, most):
    """At which tokens does each unit say most, of each row one at most? (U, J), -1 where there are
    no more."""
    R = a.N // (T - 1)
    size_E = a.value_E.abs()
    place_E = a.unit_E * R + a.token_E // (T - 1)
    largest = size_E.new_zeros(a.F * R).scatter_reduce(0, place_E, size_E, "amax")

    # the first token that reaches the largest value of its row
    token_E = torch.where(size_E == largest[place_E], a.token_E, a.N)
    token = torch.full_like(largest, a.N, dtype=torch.long)
    token = token.scatter_reduce(0, place_E, token_E, "amin").view(a.F, R)
    top = largest.view(a.F, R).topk(min(most, R), 1)
    return torch.where(top.values > 0, token.gather(1, top.indices), -1)


def distinct(token_UJ, text_N, most):
    """Keep the first tokens of each unit that stand in different text, (U, most), -1 where there
    are no more: rows overlap, so that a sentence may be there twice."""
    ids = text_N.tolist()
    kept = []
    for tokens in token_UJ.tolist():
        first = {}
        for token in tokens:
            if token >= 0:
                first.setdefault(evals.passage(ids, token), token)
        chosen = [*first.values(), *[-1] * most]
        kept.append(chosen[:most])
    return torch.tensor(kept, device=token_UJ.device)


def weaker(a, shares=WEAK):
    """At which tokens does each unit say as much as at the median of its tokens, and less? (U, J),
    one for each of the shares of its tokens that say less."""
    by_size = a.value_E.abs().argsort(stable=True)
    order_E = by_size[a.unit_E[by_size].argsort(stable=True)]
    on_U = a.on()
    start_U = on_U.cumsum(0) - on_U
    places = [start_U + (share * on_U).long() for share in shares]
    return a.token_E[order_E[torch.stack(places, 1)]]


def contexts(a, token_UJ, T, peak_U):
    """Describe tokens, and what the unit says at each token around: for each unit a list of
    [place in the rows, offset, level, offset, level, ..]; offsets where the unit is on, levels from
    -LEVELS to LEVELS, which is the unit's largest value. Tokens below 0 are left out."""
    offset_W = torch.arange(-BEFORE, AFTER + 1, device=token_UJ.device)
    near_UJW = token_UJ.unsqueeze(-1) + offset_W
    row_UJ1 = (token_UJ // (T - 1)).unsqueeze(-1)
    unit_U11 = torch.arange(a.F, device=token_UJ.device)[:, None, None]
    value_UJW = a.at(unit_U11, near_UJW.clamp(0, a.N - 1))
    value_UJW = value_UJW * (near_UJW.div(T - 1, rounding_mode="floor") == row_UJ1)

    # what is on is never rounded to 0
    share_UJW = value_UJW / peak_U[:, None, None]
    level_UJW = (share_UJW * LEVELS).round()
    level_UJW = torch.where(level_UJW == 0, value_UJW.sign(), level_UJW).long()
    found = []
    for tokens, levels_JW in zip(token_UJ.tolist(), level_UJW.tolist()):
        found.append([context(token, levels_W, T) for token, levels_W in zip(tokens, levels_JW)
                      if token >= 0])
    return found


def context(token, levels_W, T):
    """One token with what is on around it."""
    row, position = divmod(token, T - 1)
    flat = [row * T + position + 1]
    for place, level in enumerate(levels_W):
        if level:
            flat += [place - BEFORE, level]
    return flat


def wrong_tokens(look, most):
    """Where is each unit's concept wrong about it? Tokens where the concept is true and the unit is
    off, and tokens where the unit is on and the concept is not true, the strongest first. Two (U,
    J), -1 where there are no more."""
    a = look.shown
    missed_UJ = np.full((a.F, most), -1)
    false_UJ = np.full((a.F, most), -1)
    ends = a.on().cumsum(0).tolist()
    token_E = a.token_E.cpu().numpy()
    size_E = a.value_E.abs().cpu().numpy()
    concept_U = look.matched.concept_F[look.units].tolist()
    label_NK = a.label_NK.cpu().numpy()
    for u, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        is_true_N = label_NK[:, concept_U[u]]
        on = token_E[start:end]
        missed = np.setdiff1d(is_true_N.nonzero()[0], on, assume_unique=True)
        if len(missed):
            # spread evenly over the text
            picks = np.unique(np.linspace(0, len(missed) - 1, most).astype(int))
            missed_UJ[u, :len(picks)] = missed[picks]
        by_size = on[np.argsort(-size_E[start:end], kind="stable")]
        false = by_size[~is_true_N[by_size]][:most]
        false_UJ[u, :len(false)] = false
    return [torch.from_numpy(tokens).to(a.unit_E.device) for tokens in (missed_UJ, false_UJ)]


def histograms(a):
    """How often does each unit say how much, where it is on? Counts between its `ends`, (U,
    BINS)."""
    low_E, high_E = ends(a)[a.unit_E].unbind(1)
    bin_E = ((a.value_E - low_E) / (high_E - low_E) * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(a.unit_E * BINS + bin_E, minlength=a.F * BINS).view(a.F, BINS)


def usual_tokens(a, token_N):
    """At which tokens of the vocabulary is each unit on most often? (ids (U, J), shares of the
    tokens at which it is on)."""
    kinds, kind_N = token_N.unique(return_inverse=True)
    place_E = a.unit_E * len(kinds) + kind_N[a.token_E]
    count_UV = torch.bincount(place_E, minlength=a.F * len(kinds)).view(a.F, -1)
    top = count_UV.topk(min(PUSHED, len(kinds)), 1)
    return kinds[top.indices], top.values / a.on().unsqueeze(1)


# ------------------------------------------------------------------------- what a unit does
@torch.no_grad()
def written(look, token_UJ, group=16):
    """What does each unit add to the MLP's output, on average over these tokens of its own? (U, D).
    Where a unit says less than 0, what it adds counts the other way round: it is what the unit does
    where it says most."""
    layer, = look.m.layers
    a = look.shown
    parts = []
    for some in torch.arange(a.F, device=token_UJ.device).split(group):
        tokens, place_UJ = token_UJ[some].clamp(min=0).unique(return_inverse=True)
        x_1ND = a.x_ND[tokens].unsqueeze(0)
        c_1NUD = look.m.contrib(layer, look.test.f_at(tokens), x_1ND, a.origin_F[some])
        column_U1 = torch.arange(len(some), device=tokens.device).unsqueeze(1)
        sign_UJ = a.at(some.unsqueeze(1), token_UJ[some]).sign() * (token_UJ[some] >= 0)
        total_UD = (c_1NUD[0][place_UJ, column_U1] * sign_UJ.unsqueeze(-1)).sum(1)
        parts.append(total_UD / sign_UJ.abs().sum(1, keepdim=True).clamp(min=1))
    return torch.cat(parts)


def neurons_like(a, mlp, write_UD):
    """Which neurons say alike things, and which write alike? ((neurons, r), (neurons, cosine)), (U,
    LIKE) each: Pearson's r over tokens of what the unit says and act(z), and the cosine of what the
    two write."""
    h_NM = mlp.act(mlp.c_fc(a.x_ND))
    value_E = a.value_E.to(h_NM)
    sum_U = a.value_E.new_zeros(a.F).index_add(0, a.unit_E, value_E)
    square_U = a.value_E.new_zeros(a.F).index_add(0, a.unit_E, value_E**2)
    mean_U1 = (sum_U / a.N).unsqueeze(1)
    std_U1 = (square_U / a.N).unsqueeze(1).sub(mean_U1**2).clamp(min=1e-12).sqrt()
    product_UM = a.sums(h_NM, value_E) / a.N
    r_UM = (product_UM - mean_U1 * h_NM.mean(0)) / (std_U1 * h_NM.std(0).clamp(min=1e-6))
    cosine_UM = matching.cosines(write_UD, mlp.c_proj.weight)
    return largest(r_UM), largest(cosine_UM)


def largest(table_UM):
    """The columns of the LIKE entries of each row that are farthest from 0, and these entries."""
    columns = table_UM.abs().topk(min(LIKE, table_UM.shape[1]), 1).indices
    return columns, table_UM.gather(1, columns)


def rules_of(look, scene):
    """A rule in words for units that are on often enough, by turns one of the best and one at
    random: {place: [text, its F1 on test]}."""
    turns = by_turns(look.on_fit, look.matched, look.units)
    places = torch.tensor(turns, dtype=torch.long, device=look.units.device)
    often = look.fit.on()[look.units[places]] >= LEAST
    places = places[often][:scene.rules]
    if not len(places):
        return {}
    literals, truth_fit, truth_test = scene.literals
    units = look.units[places]
    rules = words.find_rules(literals, truth_fit, words.dense(look.fit, units).abs())
    f1_U = words.f1_of_guesses(rules.guess(truth_test) > 0, words.dense(look.test, units) != 0)
    return {place: [rules.text(u), share(f1)]
            for u, (place, f1) in enumerate(zip(places.tolist(), f1_U.tolist()))}


# --------------------------------------------------------------------------------- its mates
class Pair:
    """How the units of two methods that are shown lie to each other, by what they say over test:
    r, the relation of the tokens at which they are on (metrics/mapping.py), and r with the other's
    units moved to the wrong text."""
    def __init__(self, one, other, T):
        self.units = (one.units, other.units)
        self.is_empty = not len(one.units) or not len(other.units)
        if self.is_empty:
            return
        self.r = alike(one.shown, other.shown)
        self.counts = mapping.coactivation(one.shown, other.shown)
        gen = torch.Generator().manual_seed(0)
        self.null_r = alike(one.shown, mapping.by_chance(other.shown, T - 1, gen))

    def back(self):
        """The pair as the other method sees it."""
        pair = copy.copy(self)
        pair.units = self.units[::-1]
        if not self.is_empty:
            pair.r = self.r.T
            pair.counts = self.counts.back()
            pair.null_r = self.null_r.T
        return pair

    def chance(self):
        """The r that the best mate of 95 % of the units is below by chance, in thousandths."""
        return None if self.is_empty else share(self.null_r.amax(1).quantile(0.95).item())

    def mates(self, b):
        """Each unit's mates in the other method, which is the page's number b: [b, its number, r,
        relation] of the MATES of largest r, and of the likest unit that contains this one, where
        there is any."""
        own, others = self.units
        if self.is_empty:
            return [[] for _ in own]
        relation = mapping.relations(self.counts)
        top = self.r.topk(min(MATES, len(others)), 1).indices
        is_part = relation == mapping.RELATIONS.index("subsumed")
        whole = torch.where(is_part, self.r, -1).max(1)
        found = []
        for u, columns in enumerate(top.tolist()):
            if whole.values[u] >= 0:
                columns = dict.fromkeys([*columns, whole.indices[u].item()])
            found.append([[b, others[j].item(), share(self.r[u, j].item()), relation[u, j].item()]
                          for j in columns])
        return found


def alike(a, b):
    """Pearson's r of the units of two recordings, |r| where a unit of either has a sign."""
    units = [torch.arange(recording.F, device=recording.unit_E.device) for recording in (a, b)]
    return matching.unsigned(matching.correlation(a, b, *units), a, b)


# ------------------------------------------------------------------------------ as JSON
def share(value):
    """A share in thousandths, as an integer: 3 digits are all that is read."""
    return round(1000 * value) if math.isfinite(value) else 0


def cards(look, scene):
    """What does the page say of each unit that is shown? A dict for each, in the order of
    look.units; tokens are ids of the vocabulary."""
    a = look.shown
    if not a.F:
        return []
    ends_U2 = ends(a)
    peak_U = ends_U2[:, 1]
    # twice as many as are shown, since some may be of one text
    token_UJ = distinct(strongest(a, scene.T, 2 * STRONG), scene.token_N, STRONG)
    write_UD = written(look, token_UJ)
    # some units at a time: each has a logit for each word
    pushed = [evals.pushed(scene.gpt, some, PUSHED) for some in write_UD.split(256)]
    up_UJ, down_UJ = map(torch.cat, zip(*pushed))
    usual_UJ, often_UJ = usual_tokens(a, scene.token_N)
    like, writes = neurons_like(a, scene.gpt.mlp(scene.layer), write_UD)
    parts = part_of(look)
    columns = {}
    # its number, at how many tokens it is on, how much it says there
    columns["u"] = look.units.tolist()
    columns["n"] = a.on().tolist()
    columns["rank"] = rank(look)
    columns["part"] = [parts[u] for u in look.units.tolist()]
    columns["ends"] = [[short(low), short(high)] for low, high in ends_U2.tolist()]
    columns["bins"] = histograms(a).tolist()
    # where that is, and what it does there
    columns["strong"] = contexts(a, token_UJ, scene.T, peak_U)
    columns["weak"] = contexts(a, weaker(a), scene.T, peak_U)
    columns["at"] = pairs(usual_UJ, often_UJ)
    columns["up"] = up_UJ.tolist()
    columns["down"] = down_UJ.tolist()
    columns["like"] = pairs(*like)
    columns["writes"] = pairs(*writes)
    # its concept and its rule
    if look.matched:
        for kind, wrong_UJ in zip(("missed", "false"), wrong_tokens(look, 2 * WRONG)):
            wrong_UJ = distinct(wrong_UJ, scene.token_N, WRONG)
            columns[kind] = contexts(a, wrong_UJ, scene.T, peak_U)
        columns["said"] = said(look, look.units, look.matched.concept_F[look.units])
    found = [dict(zip(columns, values)) for values in zip(*columns.values())]
    for place, rule in rules_of(look, scene).items():
        found[place]["rule"] = rule
    return found


def short(value):
    """Three digits of a number."""
    return float(f"{value:.3g}")


def rank(look):
    """Which share of the alive units is on at fewer tokens than each one?"""
    on_F = look.on_test["on"][0]
    sorted_F = on_F[look.alive].sort().values
    below_U = torch.searchsorted(sorted_F, on_F[look.units])
    return [share(place / len(look.alive)) for place in below_U.tolist()]


def pairs(numbers_UJ, shares_UJ):
    """[[number, share], ..] of each unit, without those whose share is 0."""
    found = []
    for numbers, values in zip(numbers_UJ.tolist(), shares_UJ.tolist()):
        found.append([[i, share(value)] for i, value in zip(numbers, values) if value])
    return found


def said(look, units, concepts):
    """How well does a concept tell where a unit is on, on test? [concept, F1, precision, recall] of
    each pair: precision is the share of the unit's tokens where the concept is true, recall that of
    the concept's tokens where the unit is on."""
    both = look.on_test["both"][0, units, concepts]
    on = look.on_test["on"][0, units]
    true = look.on_test["label"][concepts]
    f1 = evals.f1_scores(on, true, both).tolist()
    precision = (both / on.clamp(min=1)).tolist()
    recall = (both / true.clamp(min=1)).tolist()
    return [[k, share(f), share(p), share(r)]
            for k, f, p, r in zip(concepts.tolist(), f1, precision, recall)]


def part_of(look):
    """Which part does each of m's units belong to, such as a matrix of an SPD? A name for each;
    "" where there is one part alone."""
    blocks = look.m.unit_directions()
    names = []
    for name, read, _, ranks in blocks:
        n = len(read) if ranks is None else len(ranks)
        names += [name if len(blocks) > 1 else ""] * n
    return names


def best_units(look):
    """Which units say each concept best? {concept: [[unit, F1, precision, recall], ..]}, for each
    concept that is neither too rare nor too common: the BEST of highest F1 on fit, scored on
    test."""
    found = {}
    if not look.matched or not len(look.units):
        return found
    f1_FK = evals.f1_of_counts(look.on_fit)[0]
    for k in testable_concepts(look.fit).tolist():
        top = f1_FK[look.units, k].topk(min(BEST, len(look.units)))
        units = look.units[top.indices]
        scored = said(look, units, torch.full_like(units, k))
        found[k] = [[u, *numbers[1:]] for u, numbers in zip(units.tolist(), scored)]
    return found


def method(look, found):
    """What the page says of a method as a whole; found: the cards that it shows."""
    alive = look.alive
    on = look.on_test["on"][0, alive]
    frequency = on[on > 0].double() / look.test.N
    low = math.log10(1 / look.test.N)
    bins = ((1 - frequency.log10() / low) * BINS).long().clamp(0, BINS - 1)
    named = None
    if look.matched:
        named = share(look.matched.f1_F[alive].ge(0.5).double().mean().item())
    numbers = dict(units=len(look.m.params_F), alive=len(alive), named=named, ce=look.ce)
    numbers["l0"] = short(len(look.test.unit_E) / look.test.N)
    numbers["spectrum"] = torch.bincount(bins, minlength=BINS).tolist()
    return dict(name=look.name, **numbers, best=best_units(look), cards=found)


def kept(all_cards, room):
    """Which cards fit? A list of lists, of each method as many as fit into an even share of the
    room, in their order; what one method does not need goes to the others."""
    sizes = []
    for found in all_cards:
        sizes.append([len(as_json(card)) for card in found])
    fits = {}
    by_need = sorted(range(len(sizes)), key=lambda i: sum(sizes[i]))
    for i in by_need:
        own = room / (len(sizes) - len(fits))
        n = sum(total <= own for total in itertools.accumulate(sizes[i]))
        fits[i] = all_cards[i][:n]
        room -= sum(sizes[i][:n])
    return [fits[i] for i in range(len(sizes))]


def page_data(looks, scene, key=""):
    """All that the page knows, as JSON can say it. Tokens are numbers in a list of texts that holds
    those alone that occur."""
    all_cards = [cards(look.first(CARDED // len(looks)), scene) for look in looks]
    chances = [[None] * len(looks) for _ in looks]
    for a, b in itertools.combinations(range(len(looks)), 2):
        pair = Pair(looks[a], looks[b], scene.T)
        for i, j, seen in ((a, b, pair), (b, a, pair.back())):
            chances[i][j] = seen.chance()
            for card, mates in zip(all_cards[i], seen.mates(j)):
                card.setdefault("mates", []).extend(mates)
    methods = []
    for look, found, chance in zip(looks, kept(all_cards, CARDS), chances):
        methods.append(method(look, found) | dict(chance=chance))

    # the tokens of the text and of the cards
    texts = Texts(scene.gpt.vocab)
    rows = texts(scene.test[0].flatten().tolist())
    for shown in methods:
        for card in shown["cards"]:
            card["up"] = texts(card["up"])
            card["down"] = texts(card["down"])
            card["at"] = [[texts([token])[0], often] for token, often in card["at"]]
    rates = scene.test[1][:, 1:].mean((0, 1)).tolist()
    concepts = [[name, share(rate)] for name, rate in zip(scene.names, rates)]
    about = dict(target=Path(scene.gpt.folder).name, layer=scene.layer, n=len(scene.token_N))
    shape = dict(T=scene.T, before=BEFORE, after=AFTER, levels=LEVELS)
    return dict(key=key, **about, **shape, spaced=data.has_spaces(scene.gpt.vocab),
                relations=mapping.RELATIONS, concepts=concepts, methods=methods, rows=rows,
                texts=texts.spelled())


class Texts:
    """Tokens by their number among those that occur."""
    def __init__(self, vocab):
        self.vocab = vocab
        self.number = {}

    def __call__(self, ids):
        return [self.number.setdefault(i, len(self.number)) for i in ids]

    def spelled(self):
        return data.spell(self.number, self.vocab)


# ------------------------------------------------------------------------------ the page
def html(found):
    """The page as text."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("@DATA@")
    return before + as_json(found) + after


def as_json(value):
    """JSON that can stand in HTML: "<" is written as an escape, so that no token ends it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def write(path, named, scene, key=""):
    """Write the page of some decompositions, [(name, m, CE recovered)]. Returns a line that says
    so."""
    looks = []
    for name, m, ce in named:
        look = look_at(name, m, ce, scene)
        look.share(looks[0] if looks else look)
        looks.append(look)
    found = page_data(looks, scene, key)
    text = html(found)
    common.write(path, text.encode())
    n = sum(len(shown["cards"]) for shown in found["methods"])
    return f"-> {path}: {n:,} units to browse, {len(text) / 1e6:.1f} MB"


def is_of(path, key):
    """Was a page written with this key?"""
    try:
        return f'"key":{json.dumps(key)}' in Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def checkpoint(folder):
    """The one checkpoint of a run's folder, or the file that is named itself."""
    paths = [Path(folder)]
    if paths[0].is_dir():
        paths = sorted(paths[0].glob("*.safetensors"))
    if len(paths) != 1 or not paths[0].is_file():
        common.fail(f"{folder}: must be the folder of a run, or its checkpoint, METHOD.safetensors")
    path = paths[0]
    is_method = (ROOT / f"{path.stem}.py").exists()
    if not is_method or common.read_meta(path).get("method") != path.stem:
        common.fail(f"{path}: is no checkpoint of a method: there is no {path.stem}.py, or it was "
                    "written by another file")
    return path


def load(path, gpt):
    """Load a decomposition of one MLP as it is evaluated, by the file that its checkpoint is named
    after."""
    m = importlib.import_module(path.stem).load(path, gpt)
    if len(m.layers) != 1:
        common.fail(f"{path}: stands in for several MLPs, and a page is of one: clt.py "
                    "--replace this")
    return m


def of_run(cfg, m, summary):
    """Write the page of a run that has just ended, beside its checkpoint."""
    path = Path(cfg.out) / PAGE
    if len(m.layers) != 1:
        print(f"no {PAGE}: a page is of one MLP, and this stands in for {len(m.layers)}")
        return
    gpt = GPT.load(cfg.model, next(m.parameters()).device)
    trained = checkpoint(cfg.out)
    m = load(trained, gpt)
    scene = scene_of(gpt, m.layers[0], cfg.data, cfg.T, min(cfg.eval_tokens, TOKENS), RULES)
    print(write(path, [(trained.stem, m, summary["ce_recovered"])], scene))


def names_of(paths):
    """What is each checkpoint called? By its method, or, where that is not enough, its folder."""
    names = [*RESERVED]
    for path in paths:
        is_alone = sum(other.stem == path.stem for other in paths) == 1
        name = path.stem if is_alone else path.resolve().parent.name
        tried = name
        n = 1
        while tried in names:
            n += 1
            tried = f"{name}-{n}"
        names.append(tried)
    return names[len(RESERVED):]


def ce_recovered(m, scene):
    """Which share of the MLP's worth does m keep on test? None where that is too little to say."""
    replaces = evals.ablations(scene.gpt, scene.layer, scene.fit[0]) | {"m": evals.splice(m)}
    return evals.recovered(evals.scores(scene.gpt, scene.test[0], replaces), "m")


def main(*argv):
    """Folders first, then flags."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg = common.cli(Config, argv[len(folders):])
    if not folders:
        common.fail("gallery: name the folders of some runs first: python -m report.gallery "
                    "runs/spd runs/sae")
    if not cfg.out.endswith(".html"):
        common.fail(f"--out {cfg.out}: must end in .html")
    paths = [checkpoint(folder) for folder in folders]
    common.must_be_file(cfg.out)
    for path in paths:
        meta = common.read_meta(path)
        if meta["step"] < meta["run"]["steps"]:
            print(f"{path}: has not ended: step {meta['step']:,} of {meta['run']['steps']:,}")
    gpt = GPT.load(cfg.model, common.device(cfg.device))
    models = [load(path, gpt) for path in paths]
    layers = {m.layers[0] for m in models}
    if len(layers) > 1:
        common.fail(f"{' '.join(folders)}: of different layers, {sorted(layers)}: a page is of one")

    T = gpt.cfg.n_positions
    scene = scene_of(gpt, layers.pop(), cfg.data, T, cfg.eval_tokens, cfg.rules)
    named = []
    for name, m in zip(names_of(paths), models):
        named.append((name, m, ce_recovered(m, scene)))
    print(write(cfg.out, named, scene))


if __name__ == "__main__":
    main(*sys.argv[1:])
