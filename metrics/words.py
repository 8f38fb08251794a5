"""Can a short rule in words say where a unit is on? Explanations that people can read, found
offline, and how well they hold.

A rule is up to CLAUSES clauses joined by "or". A clause is one literal, or a set of up to TOKENS
tokens at one place, and at most one more of either kind. Literals are facts about the text up to
the token: which token is 0, 1 or 2 places back, of which class of words; which word is among the
last 16; where in its sentence or story it stands.

Rules are built greedily for the best F1 over the tokens of fit, all units at once, and scored on
test against nulls. A rule's score is no LLM's score (llm.py): each result names its judge, and they
are never averaged. Detection and fuzzing: Paulo et al. 2024, arXiv:2410.13928; here over all
windows of test, in balanced accuracy.

N tokens (position 0 of each row left out), R rows, T positions, U units, F all units, J literals,
K nearest units, V vocabulary, W windows, S tokens of a window
"""
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

import data
from evals import ALIVE, f1_scores
from metrics import columns
from metrics.columns import Column
from metrics.concepts import auroc
from metrics.recording import record_by_sign
from tinytales import concepts

CLAUSES = 3             # most clauses of a rule
TOKENS = 8              # most tokens in a set
RARE = 20               # fewest occurrences of a literal in fit
GAIN = dict(clause=0.02, both=0.01, token=0.005)    # what each adds to F1 at least
WINDOW = 32             # tokens of a window
NEAR = 10               # neighbours of a unit, for hard negatives
BACK = 3                # places that a literal looks at: this token, and the two before it
RECENT = 16             # tokens that count as recent
PLACES = ("", "after ", "two after ")               # how a rule says each place
PIECE = 8192            # tokens that are counted at a time, so that truth tables stay boolean


# ----------------------------------------------------------------------------------- the rules
class Literals:
    """The facts that rules are made of. Which words are frequent enough comes from rows of fit."""

    def __init__(self, rows_RT, vocab):
        V = len(vocab)
        self.spelled, table = data.lexicon(tuple(vocab))
        self.table = torch.from_numpy(table)
        count_V = torch.bincount(rows_RT.flatten().cpu(), minlength=V)
        self.words = (count_V >= RARE).nonzero().squeeze(1)
        self.common = count_V.topk(min(400, V)).indices

        # their names, in the order of the columns that __call__ fills
        classes = [*concepts.WORDS, *concepts.PATTERNS]
        self.n_tokens = len(self.words)             # the first BACK * n_tokens literals are tokens
        self.names = []
        for place in PLACES:
            self.names += [f"{place}'{self.spelled[word]}'" for word in self.words.tolist()]
        for place in PLACES:
            self.names += [f"{place}[{name}]" for name in classes]
        for word in self.common.tolist():
            self.names.append(f"'{self.spelled[word]}' among the last {RECENT}")
        self.names += concepts.STRUCTURE

    def __call__(self, rows_RT):
        """Which literals hold at each token? (N, J), bool: about 2 kB a token."""
        idx_RT = rows_RT.cpu()
        back = [shifted(idx_RT, places) for places in range(BACK)]
        parts = [token_RT.unsqueeze(-1) == self.words for token_RT in back]
        for token_RT in back:
            # no class of words holds before the row begins
            parts.append(self.table[token_RT] & (token_RT >= 0).unsqueeze(-1))

        # was a word seen more often by now than RECENT tokens ago?
        is_word = idx_RT.unsqueeze(-1) == self.common
        seen = is_word.short().cumsum(1, dtype=torch.int16)
        earlier = torch.cat([torch.zeros_like(seen[:, :RECENT]), seen[:, :-RECENT]], 1)
        parts.append(seen > earlier[:, :idx_RT.shape[1]])

        classes = self.table.numpy()
        rows = [concepts.structural(row.numpy(), self.spelled, classes) for row in idx_RT]
        parts.append(torch.from_numpy(np.stack(rows)))
        return torch.cat(parts, -1)[:, 1:].flatten(0, 1).to(rows_RT.device)


def shifted(idx_RT, places):
    """The token so many places back; -1 before the row begins."""
    missing = idx_RT.new_full((len(idx_RT), places), -1)
    return torch.cat([missing, idx_RT[:, :idx_RT.shape[1] - places]], 1)


class Clause(NamedTuple):
    """One clause of each of U rules."""
    base_JU: torch.Tensor           # the literals of which one must hold
    also_JU: torch.Tensor           # those of which one must hold too, if any are named
    used_U: torch.Tensor            # has the rule this clause?
    weight_U: torch.Tensor          # mean value of the unit where the clause holds

    def holds(self, truth_NJ):
        """Where does the clause of each rule hold? (N, U)."""
        base = counts(truth_NJ, self.base_JU) > 0
        also = counts(truth_NJ, self.also_JU) > 0
        return base & (also | (self.also_JU.sum(0) == 0)) & self.used_U


@dataclass
class Rules:
    """U rules of up to CLAUSES clauses."""
    names: list                     # of the literals
    clauses: list = field(default_factory=list)

    def guess(self, truth_NJ):
        """What value does each rule expect? (N, U): the largest weight of a clause that holds, 0
        for none."""
        guesses = [clause.holds(truth_NJ) * clause.weight_U for clause in self.clauses]
        return torch.stack(guesses).amax(0)

    def text(self, u):
        """One rule as one sentence."""
        parts = []
        for clause in self.clauses:
            if clause.used_U[u]:
                part = self.spell(clause.base_JU[:, u])
                if clause.also_JU[:, u].any():
                    part += f", and {self.spell(clause.also_JU[:, u])}"
                parts.append(part)
        return "; or ".join(parts) or "nothing in common"

    def spell(self, is_named_J):
        """Literals at one place: the place once, then what can stand there."""
        names = [self.names[j] for j in is_named_J.nonzero().squeeze(1)]
        place = re.match("(two )?(after )?", names[0])[0] if names else ""
        return place + " / ".join(name.removeprefix(place) for name in names)


def counts(truth_NJ, x_JU):
    """truth_NJ @ x_JU, in pieces."""
    pieces = [part.float() @ x_JU.float() for part in truth_NJ.split(PIECE)]
    return torch.cat(pieces)


def tally(truth_NJ, *masks_NU):
    """At how many of each mask's tokens does each literal hold? (J, U) for each mask."""
    totals = [0] * len(masks_NU)
    pieces = [mask.split(PIECE) for mask in masks_NU]
    for truth, *masks in zip(truth_NJ.split(PIECE), *pieces):
        for i, mask in enumerate(masks):
            totals[i] = totals[i] + truth.float().T @ mask.float()
    return totals


def choose(hits_JU, said_JU, hit_U, size_U, n_tokens):
    """Which literal, or set of up to TOKENS tokens at one place, would raise a rule's F1 most?

        F1 = 2 (hit + hits) / (size + said)

    hit: tokens that the rule is right about so far; size: tokens that it names plus those where the
    unit is on; hits, said: what each literal would add. Returns marks (J, U) and that F1 (U).
    Tokens at one place exclude each other, so their counts add up, and the best set is that of the
    largest gains 2 hits - F1 said, at the F1 that it reaches: four rounds find it."""
    # the best single literal
    f1_JU = f1_scores(size_U, said_JU, hit_U + hits_JU) * (said_JU >= RARE)
    best_U = f1_JU.max(0).values
    which_JU = torch.zeros_like(f1_JU).scatter_(0, f1_JU.argmax(0)[None], 1)

    # a set of tokens at one place, where that is better
    for place in range(BACK):
        rows = slice(place * n_tokens, (place + 1) * n_tokens)
        hits = hits_JU[rows]
        said = said_JU[rows]
        f1_U = best_U
        for _ in range(4):
            gain = ((2 * hits - f1_U * said) / size_U).topk(min(TOKENS, n_tokens), 0)
            is_kept = (gain.values >= GAIN["token"]).float()
            kept = torch.zeros_like(hits).scatter_(0, gain.indices, is_kept)
            f1_U = f1_scores(size_U, (said * kept).sum(0), hit_U + (hits * kept).sum(0))
        better = f1_U > best_U + 1e-6
        best_U = torch.where(better, f1_U, best_U)
        which_JU[:, better] = 0
        which_JU[rows, better] = kept[:, better]
    return which_JU, best_U


def find_rules(literals, truth_NJ, value_NU):
    """Find a rule for each of U units from their values (0: off) at N tokens. 20 s for 100 units
    and 50,000 tokens on two cores."""
    on_NU = value_NU > 0
    said_NU = torch.zeros_like(on_NU)               # what the clauses so far name
    rules = Rules(literals.names)
    for _ in range(CLAUSES):
        hit_U = (on_NU & said_NU).sum(0)
        size_U = (said_NU.sum(0) + on_NU.sum(0)).clamp(min=1)
        so_far = (hit_U, size_U, literals.n_tokens)

        # the clause's first part, among tokens that no clause names yet
        base_JU, f1_U = choose(*tally(truth_NJ, on_NU & ~said_NU, ~said_NU), *so_far)

        # its second part, among tokens where the first holds, if it pays
        here_NU = (counts(truth_NJ, base_JU) > 0) & ~said_NU
        also_JU, both_U = choose(*tally(truth_NJ, on_NU & here_NU, here_NU), *so_far)
        also_JU = also_JU * (both_U >= f1_U + GAIN["both"])

        # the clause, if it pays
        reached_U = torch.maximum(f1_U, both_U * also_JU.any(0))
        used_U = reached_U >= 2 * hit_U / size_U + GAIN["clause"]
        clause = Clause(base_JU, also_JU, used_U, None)
        holds_NU = clause.holds(truth_NJ)
        weight_U = (value_NU * holds_NU).sum(0) / holds_NU.sum(0).clamp(min=1)
        rules.clauses.append(clause._replace(weight_U=weight_U))
        said_NU = said_NU | holds_NU
    return rules


# --------------------------------------------------------------------------- how well they hold
def cut(x_RT):
    """Cut rows into windows, (W, S): the tokens that are left at a row's end, fewer than a window,
    are in none. More axes, behind these two, stay."""
    T = x_RT.shape[1]
    size = min(WINDOW, T)
    return x_RT[:, :T // size * size].reshape(-1, size, *x_RT.shape[2:])


def windows(x_NU, T):
    """Cut what units say at rows of T tokens into windows: (W, S, U). At position 0 of a row, which
    N leaves out, they say nothing."""
    x_RTU = x_NU.view(-1, T - 1, x_NU.shape[1])
    return cut(torch.cat([torch.zeros_like(x_RTU[:, :1]), x_RTU], 1))


def random_order(n_windows, T, gen):
    """In what order are the tokens of each window marked at random? Ranks from 0, (W, S). The
    position 0 of a row comes last: no unit can be on there, so a mark there would give itself
    away."""
    size = min(WINDOW, T)
    dice_WS = torch.rand(n_windows, size, generator=gen)
    dice_WS[::T // size, 0] = 1                     # all others are below 1
    return dice_WS.argsort(1).argsort(1)


def balanced(said_WR, active_WU):
    """How well do each rule's windows tell each unit's? Balanced accuracy (R, U)."""
    said = said_WR.float()
    active = active_WU.float()
    hit_rate = (said.T @ active) / active.sum(0)
    reject_rate = ((1 - said).T @ (1 - active)) / (1 - active).sum(0)
    return (hit_rate + reject_rate) / 2


def active_windows(a, T):
    """In which windows is each unit of a recording (recording.py) on? (W, F), as `windows` cuts."""
    row_E = a.token_E // (T - 1)
    position_E = a.token_E % (T - 1) + 1
    per_row = T // WINDOW or 1
    size = min(WINDOW, T)
    n_windows = a.N // (T - 1) * per_row
    active_WF = torch.zeros(n_windows, a.F, dtype=torch.bool, device=row_E.device)
    fits_E = position_E < per_row * size
    window_E = row_E * per_row + position_E // size
    active_WF[window_E[fits_E], a.unit_E[fits_E]] = True
    return active_WF


def neighbours(active_WF, units, k=NEAR):
    """Which units are active in the windows of these, most often? By Jaccard index, (U, k)."""
    active = active_WF.float()
    own = active[:, units]
    both_UF = own.T @ active
    either_UF = own.sum(0).unsqueeze(1) + active.sum(0) - both_UF
    jaccard_UF = both_UF / either_UF.clamp(min=1)
    jaccard_UF = jaccard_UF.scatter(1, units.unsqueeze(1), -1)         # nobody is its own neighbour
    return jaccard_UF.topk(min(k, active.shape[1] - 1), 1).indices


def scorable(active_WF, n, least, gen):
    """Draw up to n units that are active in `least` windows or more, as many from each tenth of
    the densities."""
    n_active_F = active_WF.sum(0)
    n_rare = (n_active_F < least).sum()
    per_tenth = -(-n // 10)                         # rounded up
    drawn = []
    for tenth in n_active_F.argsort()[n_rare:].tensor_split(10):
        drawn.append(tenth[torch.randperm(len(tenth), generator=gen)[:per_tenth]])
    return torch.cat(drawn)[:n].sort().values


def hard_negatives(active_WF, active_WU, near_UK, gen):
    """In which windows is a unit off while many of its neighbours are on? (W, U), bool: the most
    crowded ones, at most as many as it is active in."""
    crowd_WU = torch.stack([active_WF[:, near].sum(1) for near in near_UK], 1)
    crowd_WU = crowd_WU.masked_fill(active_WU, 0)
    dice = torch.rand(crowd_WU.shape, generator=gen).to(crowd_WU.device)       # ties at random
    rank = (crowd_WU + dice).argsort(0, descending=True).argsort(0)
    return (rank < active_WU.sum(0)) & (crowd_WU > 0)


def rate_in(where_WU, is_true_WU):
    """At what share of some windows is something true? (U)."""
    return (is_true_WU & where_WU).sum(0) / where_WU.sum(0)


def rule_scores(said_NU, guess_NU, value_NU, active_WF, units, near_UK, T, gen):
    """How well do rules hold, that say said_NU and guess the values guess_NU of `units`?

    Each (U). Chance is .5 for
      det, det_hard   balanced accuracy over windows; det_hard against hard_negatives alone
      fuzz            AUROC of the share of marked tokens that satisfy the rule, marks at random in
                      inactive windows
      discr           how often its own rule has a better det for it than the rule of a near unit
                      among `units`
    and 0 for
      sim             Pearson's r of guess and value
      f1, precision, recall       over tokens, at their natural rate"""
    on_NU = value_NU > 0
    on = windows(on_NU, T)
    said = windows(said_NU, T)
    active = active_WF[:, units]
    claims = said.any(1)                            # of a window: does the rule hold in it?
    out = {}

    # detection: against all other windows, and against the hardest
    table_RU = balanced(claims, active)
    out["det"] = own = table_RU.diagonal()
    hard = hard_negatives(active_WF, active, near_UK, gen)
    out["det_hard"] = (rate_in(active, claims) + 1 - rate_in(hard, claims)) / 2

    # fuzzing: in inactive windows as many tokens are marked as a unit's active ones have, at random
    n_marks_U = (on.sum((0, 1)) / active.sum(0).clamp(min=1)).ceil()
    rank_WS = random_order(len(on), T, gen).to(on.device)
    marks = torch.where(active.unsqueeze(1), on, rank_WS.unsqueeze(-1) < n_marks_U)
    share_WU = (marks & said).sum(1) / marks.sum(1).clamp(min=1)
    out["fuzz"] = auroc(share_WU.T, active.T)

    # discrimination: a tie with a near unit's rule is half a win
    is_near_RU = (near_UK.unsqueeze(-1) == units).any(1).T
    wins_RU = (own > table_RU) + (own == table_RU) / 2
    out["discr"] = (wins_RU * is_near_RU).sum(0) / is_near_RU.sum(0)

    # over tokens: values, then on and off
    guess = guess_NU.float() - guess_NU.float().mean(0)
    value = value_NU.float() - value_NU.float().mean(0)
    norms_U = guess.norm(dim=0) * value.norm(dim=0)
    out["sim"] = (guess * value).sum(0) / norms_U.clamp(min=1e-9)
    right_U = (said_NU & on_NU).sum(0)
    out["precision"] = right_U / said_NU.sum(0).clamp(min=1)
    out["recall"] = right_U / on_NU.sum(0)
    out["f1"] = f1_scores(said_NU.sum(0), on_NU.sum(0), right_U)
    return out


def lookup_f1(fit, test, units, rows_RT, rows2_RT, V):
    """How much needs no context? F1 on test (U) of the best table "on at these tokens", of any
    size, made on fit."""
    at_N = rows_RT[:, 1:].flatten()
    at2_N = rows2_RT[:, 1:].flatten()
    on_NU = (dense(fit, units) > 0).float()
    total_V = torch.bincount(at_N, minlength=V)
    hit_VU = torch.zeros(V, len(units)).to(on_NU).index_add_(0, at_N, on_NU)

    # a token belongs in the table if the unit is on at more than half the F1 reached
    f1_U = torch.zeros(len(units)).to(on_NU)
    for _ in range(8):
        kept_VU = 2 * hit_VU > f1_U * total_V.unsqueeze(1)
        said_U = (total_V.unsqueeze(1) * kept_VU).sum(0)
        f1_U = f1_scores(said_U, on_NU.sum(0), (hit_VU * kept_VU).sum(0))
    return f1_of_guesses(kept_VU[at2_N], dense(test, units) > 0)


def f1_of_guesses(said_NU, on_NU):
    """How well do guesses say where each unit is on? F1 (U), of bools."""
    return f1_scores(said_NU.sum(0), on_NU.sum(0), (said_NU & on_NU).sum(0))


def dense(a, units):
    """Values (N, U) of some units of a recording."""
    tokens = torch.arange(a.N, device=units.device)
    return torch.stack([a.at(u, tokens) for u in units], 1)


def explain(fit, test, rows_RT, rows2_RT, vocab, gen, n=100, least=200):
    """Find and score the rule of each of up to n units of fit and test, recordings (recording.py)
    of rows_RT and rows2_RT.

    Returns {"judge": "rule", "units", "texts", scores of rule_scores, "lookup_f1", "scorable"}. A
    minute for 100 units and 50,000 tokens."""
    T = rows_RT.shape[1]
    active_WF = active_windows(fit, T)
    active2_WF = active_windows(test, T)
    units = scorable(active_WF, n, least, gen)
    if not len(units):
        return dict(judge="rule", units=units, texts=[], scorable=0)

    # rules from fit
    literals = Literals(rows_RT, vocab)
    rules = find_rules(literals, literals(rows_RT), dense(fit, units))

    # their scores on test
    guess_NU = rules.guess(literals(rows2_RT))
    near_UK = neighbours(active_WF, units)
    scores = rule_scores(guess_NU > 0, guess_NU, dense(test, units), active2_WF, units, near_UK, T,
                         gen)
    texts = [rules.text(u) for u in range(len(units))]
    table_f1_U = lookup_f1(fit, test, units, rows_RT, rows2_RT, len(vocab))
    n_scorable = (active_WF.sum(0) >= least).sum().item()
    return dict(judge="rule", units=units, texts=texts, **scores, lookup_f1=table_f1_U,
                scorable=n_scorable)


# -------------------------------------------------------------------------------- for the table
CHANCE = dict(det=0.5, det_hard=0.5, fuzz=0.5, discr=0.5)       # of a rule in words; else 0
COLUMNS = {
    "rule_det_hard": Column(
        "det hard", "up", beat="random", digits=3, table="words",
        text="does a rule in words tell where its unit is on from where the units most like it "
             "are; balanced accuracy, 0.5 is chance and for rare units; no LLM"),
    "rule_det": Column(
        "detect", "up", beat="random", digits=3, table="words",
        text="does a rule in words tell where its unit is on from any other windows; balanced "
             "accuracy"),
    "rule_fuzz": Column(
        "fuzz", "up", beat="random", digits=3, table="words",
        text="AUROC of marked tokens that satisfy the rule"),
    "rule_sim": Column(
        "simulate", "up", beat="random", digits=3, table="words",
        text="correlation of the rule's guess with the unit's value"),
    "rule_discr": Column(
        "discrim", "up", beat=0.5, digits=3, table="words",
        text="how often a unit's own rule beats that of a neighbour"),
    "rule_f1": Column(
        "token F1", "up", beat="random", digits=3, table="words",
        text="F1 of the rule over tokens as they come"),
    "rule_lookup_f1": Column(
        "lookup F1", "", beat=None, digits=3, table="words",
        text="F1 of the best table of tokens, of any size, over tokens as they come"),
    "rule_scorable": Column(
        "scorable", "up", beat=None, digits=3, table="words",
        text="share of the alive units on often enough to be explained"),
}


def recorded(m, arena):
    """Recordings of fit and test, and in how many windows of fit a unit has to be on to be
    explained: 200 of 200,000."""
    fit, test = record_by_sign(m, arena.gpt, arena.fit, arena.test)
    return fit, test, max(10, arena.fit[0].numel() // 1000)


def measure(m, arena, gen):
    """How well do rules in words explain m's units? (numbers, details), as metrics/columns.py
    says."""
    fit, test, least = recorded(m, arena)
    found = explain(fit, test, arena.fit[0], arena.test[0], arena.gpt.vocab, gen, arena.explained,
                    least)
    # alive units that are too rare for a rule are at chance
    n_alive = (fit.on() >= ALIVE).sum().item()
    share = found["scorable"] / max(1, n_alive)
    answers = dict(rule_scorable=share, rule_units=len(found["units"]), texts=found["texts"])
    for key, value in found.items():
        if torch.is_tensor(value) and key != "units":
            mean = value.float().nanmean().item()
            answers[f"rule_{key}"] = share * mean + (1 - share) * CHANCE.get(key, 0)
    return columns.split(COLUMNS, answers)
