"""Explanations of units that people can read, found offline, and how well they hold.

A rule is up to CLAUSES clauses joined by "or". A clause is one literal, or a set of up to TOKENS tokens at one place,
and at most one more of either kind. Literals are facts about the text up to the token: which token is 0, 1 or 2 places
back, of which class of words; which word is among the last 16; where in its sentence or story it stands. Rules are
built greedily for the best F1 over the tokens of fit, all units at once, and scored on test against nulls. A rule score
is no LLM score (llm.py): each result names its judge, and they are never averaged. (Detection and fuzzing: Paulo et
al. 2024, arXiv:2410.13928; here over all windows of test, in balanced accuracy.)
N tokens (position 0 of each row left out), U units, J literals, V vocabulary, W windows
"""
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from evals import ALIVE, f1_scores
from metrics import columns
from metrics.columns import Column
from metrics.concepts import auroc
from metrics.recording import record, split_by_sign
from tinytales import concepts

CLAUSES, TOKENS, RARE = 3, 8, 20        # most clauses, most tokens in a set, fewest occurrences of a literal in fit
GAIN = dict(clause=0.02, both=0.01, token=0.005)    # what each adds to F1 at least
WINDOW, NEAR = 32, 10                   # tokens of a window, neighbours for hard negatives
BACK, RECENT = 3, 16                    # places back, including this one; tokens that count as recent

# ------------------------------------------------------------------------------------------------ the rules
class Literals:
    """The facts that rules are made of; which words are frequent enough comes from rows of fit."""
    def __init__(self, rows_RT, vocab):
        self.vocab, V = vocab, len(vocab)
        self.table = torch.from_numpy(concepts.lexical(vocab))
        count_V = torch.bincount(rows_RT.flatten().cpu(), minlength=V)
        self.words, self.common = (count_V >= RARE).nonzero().squeeze(1), count_V.topk(min(400, V)).indices
        say, classes = [repr(w)[1:-1] for w in vocab], [*concepts.WORDS, *concepts.PATTERNS]
        place = lambda o: ("", "after ", "two after ")[o]
        self.names = [f"{place(o)}'{say[w]}'" for o in range(BACK) for w in self.words.tolist()]
        self.n_tokens = len(self.words)                                     # the first BACK * n_tokens are tokens
        self.names += [f"{place(o)}[{c}]" for o in range(BACK) for c in classes]
        self.names += [f"'{say[w]}' among the last {RECENT}" for w in self.common.tolist()] + concepts.STRUCTURE

    def __call__(self, rows_RT):
        """Truth (N, J), bool: about 2 kB a token."""
        idx, parts = rows_RT.cpu(), []
        back = lambda o: torch.cat([idx.new_full((len(idx), o), -1), idx[:, :idx.shape[1] - o]], 1).unsqueeze(-1)
        parts += [back(o) == self.words for o in range(BACK)]
        parts += [self.table[back(o).squeeze(-1)] & (back(o) >= 0) for o in range(BACK)]
        seen = (idx.unsqueeze(-1) == self.common).short().cumsum(1, dtype=torch.int16)
        parts.append(seen > torch.cat([torch.zeros_like(seen[:, :RECENT]), seen[:, :-RECENT]], 1)[:, :idx.shape[1]])
        parts.append(torch.from_numpy(np.stack([concepts.structural(row.numpy(), self.vocab, self.table.numpy())
                                                for row in idx])))
        return torch.cat(parts, -1)[:, 1:].flatten(0, 1).to(rows_RT.device)

@dataclass
class Rules:
    """U rules of up to CLAUSES clauses: base (J, U), also (J, U): the literals of which one must hold, and of which one
    must hold too, if any are named; used (U); weight (U): mean value of the unit where the clause holds."""
    names: list
    clauses: list = field(default_factory=list)

    def holds(self, clause, truth_NJ):
        """(N, U): where a clause does."""
        base, also, used, _ = clause
        return (counts(truth_NJ, base) > 0) & ((counts(truth_NJ, also) > 0) | (also.sum(0) == 0)) & used

    def guess(self, truth_NJ):
        """(N, U): the largest weight of a clause that holds, 0 for none."""
        return torch.stack([self.holds(clause, truth_NJ) * clause[3] for clause in self.clauses]).amax(0)

    def text(self, u):
        """One sentence."""
        def say(which_JU):
            names = [self.names[j] for j in which_JU[:, u].nonzero().squeeze(1)]
            place = re.match("(two )?(after )?", names[0])[0] if names else ""
            return place + " / ".join(name.removeprefix(place) for name in names)
        parts = [say(base) + f", and {say(also)}" * bool(also[:, u].any())
                 for base, also, used, _ in self.clauses if used[u]]
        return "; or ".join(parts) or "nothing in common"

def counts(truth_NJ, x_JU):
    """truth_NJ @ x_JU in pieces: the truth table stays boolean."""
    return torch.cat([part.float() @ x_JU.float() for part in truth_NJ.split(8192)])

def tally(truth_NJ, *masks_NU):
    """For each mask (J, U): at how many of its tokens each literal holds."""
    out = [0] * len(masks_NU)
    for rows, *masks in zip(truth_NJ.split(8192), *(m.split(8192) for m in masks_NU)):
        out = [total + rows.float().T @ mask.float() for total, mask in zip(out, masks)]
    return out

def choose(hits_JU, said_JU, hit_U, size_U, n_tokens):
    """The literal, or the set of up to TOKENS tokens at one place, that would raise F1 = 2 (hit + hits) / (size + said)
    most: (J, U) marks, and that F1. Tokens at one place exclude each other, so their counts add up, and the best set is
    that of the largest gains 2 hits - F1 said, at the F1 that it reaches."""
    score = lambda hits, said: f1_scores(size_U, said, hit_U + hits)
    f1_JU = score(hits_JU, said_JU) * (said_JU >= RARE)
    best_U, which_JU = f1_JU.max(0).values, torch.zeros_like(f1_JU).scatter_(0, f1_JU.argmax(0)[None], 1)
    for place in range(BACK):
        rows = slice(place * n_tokens, (place + 1) * n_tokens)
        hits, said, f1_U = hits_JU[rows], said_JU[rows], best_U
        for _ in range(4):
            gain = ((2 * hits - f1_U * said) / size_U).topk(min(TOKENS, n_tokens), 0)
            kept = torch.zeros_like(hits).scatter_(0, gain.indices, (gain.values >= GAIN["token"]).float())
            f1_U = score((hits * kept).sum(0), (said * kept).sum(0))
        better = f1_U > best_U + 1e-6
        best_U = torch.where(better, f1_U, best_U)
        which_JU[:, better] = 0
        which_JU[rows, better] = kept[:, better]
    return which_JU, best_U

def find_rules(literals, truth_NJ, value_NU):
    """Rules for U units from their values (0: off) at N tokens. 20 s for 100 units and 50,000 tokens on two cores."""
    on_NU, rules = value_NU > 0, Rules(literals.names)
    said_NU = torch.zeros_like(on_NU)
    for _ in range(CLAUSES):
        hit_U, size_U, W = (on_NU & said_NU).sum(0), (said_NU.sum(0) + on_NU.sum(0)).clamp(min=1), literals.n_tokens
        base, f1_U = choose(*tally(truth_NJ, on_NU & ~said_NU, ~said_NU), hit_U, size_U, W)
        here_NU = (counts(truth_NJ, base) > 0) & ~said_NU
        also, both_U = choose(*tally(truth_NJ, on_NU & here_NU, here_NU), hit_U, size_U, W)
        also = also * (both_U >= f1_U + GAIN["both"])
        used_U = torch.maximum(f1_U, both_U * also.any(0)) >= 2 * hit_U / size_U + GAIN["clause"]
        holds_NU = rules.holds((base, also, used_U, None), truth_NJ)
        rules.clauses.append((base, also, used_U, (value_NU * holds_NU).sum(0) / holds_NU.sum(0).clamp(min=1)))
        said_NU = said_NU | holds_NU
    return rules

# ----------------------------------------------------------------------------------------- how well they hold
def windows(x_NU, T):
    """(W, WINDOW, U): the tokens of rows of T in windows; position 0 of a row, which N leaves out, is empty."""
    rows, size = x_NU.view(-1, T - 1, x_NU.shape[1]), min(WINDOW, T)
    rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)[:, :T // size * size]
    return rows.reshape(-1, size, x_NU.shape[1])

def balanced(said_WR, active_WU):
    """(R, U): balanced accuracy of each rule's windows for each unit."""
    said, active = said_WR.float(), active_WU.float()
    rate = lambda a, b: (a.T @ b) / b.sum(0)
    return (rate(said, active) + rate(1 - said, 1 - active)) / 2

def active_windows(a, T):
    """(W, F): where each unit of a recording (recording.py) is on, as `windows` cuts rows of T."""
    row, position = a.token_E // (T - 1), a.token_E % (T - 1) + 1
    per_row, size = T // WINDOW or 1, min(WINDOW, T)
    out = torch.zeros(a.N // (T - 1) * per_row, a.F, dtype=torch.bool, device=row.device)
    fits = position < per_row * size
    out[(row * per_row + position // size)[fits], a.unit_E[fits]] = True
    return out

def neighbours(active_WF, units, k=NEAR):
    """(U, k): the units most often active in the same windows (Jaccard)."""
    a = active_WF.float()
    both = a[:, units].T @ a
    jaccard = both / (a[:, units].sum(0).unsqueeze(1) + a.sum(0) - both).clamp(min=1)
    return jaccard.scatter(1, units.unsqueeze(1), -1).topk(min(k, a.shape[1] - 1), 1).indices

def scorable(active_WF, n, least, gen):
    """Up to n units that are active in `least` windows or more, an equal number from each tenth of the densities."""
    n_F = active_WF.sum(0)
    parts = n_F.argsort()[(n_F < least).sum():].tensor_split(10)
    return torch.cat([part[torch.randperm(len(part), generator=gen)[:-(-n // 10)]] for part in parts])[:n].sort().values

def rule_scores(said_NU, guess_NU, value_NU, active_WF, units, near_UK, T, gen):
    """Each (U): of rules, that say said_NU and guess the values guess_NU of `units`. Chance is .5 for
      det, det_hard   balanced accuracy over windows; hard negatives: of the windows where this one is not active, those
                      where most near units are, as many as it is active in at most
      fuzz            AUROC of the share of marked tokens that satisfy the rule, marks at random in inactive windows
      discr           how often its own rule has a better det for it than the rule of a near unit among `units`
    and 0 for
      sim             Pearson of guess and value       f1, precision, recall       over tokens, at their natural rate"""
    on_NU, out = value_NU > 0, {}
    on, said, active = windows(on_NU, T), windows(said_NU, T), active_WF[:, units]
    claims = said.any(1)
    table_RU = balanced(claims, active)
    out["det"] = own = table_RU.diagonal()
    crowd = torch.stack([active_WF[:, near].sum(1) for near in near_UK], 1).masked_fill(active, 0)
    order = crowd + torch.rand(crowd.shape, generator=gen).to(crowd.device)                         # ties at random
    hard = (order.argsort(0, descending=True).argsort(0) < active.sum(0)) & (crowd > 0)
    hit, false = ((claims & where).sum(0) / where.sum(0) for where in (active, hard))
    out["det_hard"] = (hit + 1 - false) / 2
    n_marks = (on.sum((0, 1)) / active.sum(0).clamp(min=1)).ceil()
    dice = torch.rand(on.shape[:2], generator=gen).argsort(1).argsort(1).to(on.device)
    marks = torch.where(active.unsqueeze(1), on, dice.unsqueeze(-1) < n_marks)
    share_WU = (marks & said).sum(1) / marks.sum(1).clamp(min=1)
    out["fuzz"] = auroc(share_WU.T, active.T)
    near_RU = (near_UK.unsqueeze(-1) == units).any(1).T
    out["discr"] = (((own > table_RU) + 0.5 * (own == table_RU)) * near_RU).sum(0) / near_RU.sum(0)
    g, v = (v.float() - v.float().mean(0) for v in (guess_NU, value_NU))
    out["sim"] = (g * v).sum(0) / (g.norm(dim=0) * v.norm(dim=0)).clamp(min=1e-9)
    tp = (said_NU & on_NU).sum(0)
    out["precision"], out["recall"] = tp / said_NU.sum(0).clamp(min=1), tp / on_NU.sum(0)
    return out | dict(f1=f1_scores(said_NU.sum(0), on_NU.sum(0), tp))

def lookup_f1(fit, test, units, rows_RT, rows2_RT, V):
    """(U): F1 on test of the best table "on at these tokens", of any size: what needs no context."""
    at, at2 = (rows[:, 1:].flatten() for rows in (rows_RT, rows2_RT))
    (on_NU, on2_NU), total_V = [(dense(a, units) > 0).float() for a in (fit, test)], torch.bincount(at, minlength=V)
    hit_VU = torch.zeros(V, len(units)).to(on_NU).index_add_(0, at, on_NU)
    f1_U = torch.zeros(len(units)).to(on_NU)
    for _ in range(8):          # a token belongs in it if it is on at more than half the F1 reached
        kept_VU = 2 * hit_VU > f1_U * total_V.unsqueeze(1)
        f1_U = f1_scores((total_V.unsqueeze(1) * kept_VU).sum(0), on_NU.sum(0), (hit_VU * kept_VU).sum(0))
    return f1_scores(kept_VU[at2].sum(0), on2_NU.sum(0), (kept_VU[at2] * on2_NU).sum(0))

def dense(a, units):
    """(N, U) values of some units of a recording."""
    return torch.stack([a.at(u, torch.arange(a.N, device=units.device)) for u in units], 1)

def explain(fit, test, rows_RT, rows2_RT, vocab, gen, n=100, least=200):
    """The rule of each of up to n units of fit and test (recording.py) of these rows: {"judge": "rule", "units",
    "texts", scores of rule_scores, "lookup_f1", "scorable"}. A minute for 100 units and 50,000 tokens."""
    T, active_WF, active2_WF = rows_RT.shape[1], *(active_windows(a, rows_RT.shape[1]) for a in (fit, test))
    units = scorable(active_WF, n, least, gen)
    if not len(units):
        return dict(judge="rule", units=units, texts=[], scorable=0)
    literals = Literals(rows_RT, vocab)
    rules = find_rules(literals, literals(rows_RT), dense(fit, units))
    guess_NU = rules.guess(literals(rows2_RT))
    near_UK = neighbours(active_WF, units)
    scores = rule_scores(guess_NU > 0, guess_NU, dense(test, units), active2_WF, units, near_UK, T, gen)
    return dict(judge="rule", units=units, texts=[rules.text(u) for u in range(len(units))], **scores,
                lookup_f1=lookup_f1(fit, test, units, rows_RT, rows2_RT, len(vocab)),
                scorable=(active_WF.sum(0) >= least).sum().item())


# ------------------------------------------------------------------------------------ for the table
CHANCE = dict(det=0.5, det_hard=0.5, fuzz=0.5, discr=0.5)       # of a rule in words; else 0
COLUMNS = {
    "rule_det_hard": Column(
        "det hard", "up", beat="random", digits=3, table="words",
        text="does a rule in words tell where its unit is on from where the units most like it "
             "are; balanced accuracy, 0.5 is chance and for rare units; no LLM"),
    "rule_det": Column(
        "detect", "up", beat="random", digits=3, table="words",
        text="does a rule in words tell where its unit is on from any other windows; balanced accuracy"),
    "rule_fuzz": Column(
        "fuzz", "up", beat="random", digits=3, table="words",
        text="AUROC of marked tokens that satisfy the rule"),
    "rule_sim": Column(
        "simulate", "up", beat="random", digits=3, table="words",
        text="correlation of the rule's guess with the unit's value"),
    "rule_discr": Column(
        "discrim", "up", beat=0.5, digits=3, table="words",
        text="how often its own rule beats that of a neighbour"),
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
    fit = record(m, arena.gpt, *arena.fit)
    test = record(m, arena.gpt, *arena.test)
    fit, test = split_by_sign(fit, test)
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
