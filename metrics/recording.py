"""Where is each unit of a decomposition on? Recorded once for each split and shared by the metrics.

A recording is sparse: of all tokens and units it keeps the entries, the pairs at which the unit is
on. At an L0 of 16 that is 16 numbers a token, whatever the number of units.

    fit, test = record_by_sign(m, gpt, fit, test)       # of two pairs (rows, labels)

N tokens, position 0 of each row left out; E entries; F units; U some of the units; J of a unit's
tokens; K concepts; B rows of a batch, T positions; D residual width. Costs are for two cores,
50,000 tokens and an L0 of 16.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as nnf           # F is the number of units here

from evals import DENSE, RARE, clean
from model import split_rows


class Moments(NamedTuple):
    """Means of each unit's value and of its square, where each concept is true and where it is not:
    (F, K) each."""
    true: torch.Tensor
    false: torch.Tensor
    true_square: torch.Tensor
    false_square: torch.Tensor


@dataclass
class Active:
    """Where F units are on among N tokens. Entries are sorted by unit, then by token."""
    unit_E: torch.Tensor        # number of the unit
    token_E: torch.Tensor       # number of the token
    value_E: torch.Tensor       # what the unit says there; signed, above 0 after split_by_sign
    f_E: torch.Tensor           # what m.encode says there
    origin_F: torch.Tensor      # which of m's units each is; two of these may be halves of one
    x_ND: torch.Tensor          # the MLP's input
    label_NK: torch.Tensor      # bool: is the concept true?

    @property
    def F(self):
        return len(self.origin_F)

    @property
    def N(self):
        return len(self.x_ND)

    def on(self):
        """At how many tokens is each unit on? (F)."""
        return torch.bincount(self.unit_E, minlength=self.F)

    def at(self, units, tokens):
        """What do units say at tokens? 0 where they are off. The two are broadcast."""
        # one number for each pair of unit and token, in the order of the entries
        key_E = self.unit_E * self.N + self.token_E
        key = units * self.N + tokens
        place = torch.searchsorted(key_E, key).clamp(max=len(key_E) - 1)
        return torch.where(key_E[place] == key, self.value_E[place], 0)

    def sums(self, table_NJ, weight_E=None):
        """Sum the rows of a table over the tokens at which each unit is on, times a weight for each
        entry: (F, J)."""
        all_units = torch.arange(self.F, device=self.unit_E.device)
        start_F = torch.searchsorted(self.unit_E, all_units)
        return nnf.embedding_bag(self.token_E, table_NJ, start_F, mode="sum",
                                 per_sample_weights=weight_E)

    def power_sums(self, power, label_NK):
        """Sum value^power of each unit over the tokens where each concept is true (F, K), and over
        all tokens (F, 1)."""
        value_E = self.value_E ** power
        one_N1 = torch.ones_like(label_NK[:, :1])
        return self.sums(label_NK, value_E), self.sums(one_N1, value_E)

    def moments(self):
        return moments(self)

    def f_at(self, tokens):
        """What did m.encode say at some tokens? (1, tokens, units of m), as m.contrib asks for
        it."""
        # which of the tokens asked for each of the N tokens is; -1: none
        place_N = torch.full((self.N,), -1, device=tokens.device)
        place_N[tokens] = torch.arange(len(tokens), device=tokens.device)
        is_asked_E = place_N[self.token_E] >= 0

        n_units = int(self.origin_F.max()) + 1
        f_1NF = self.f_E.new_zeros(1, len(tokens), n_units)
        place = place_N[self.token_E[is_asked_E]]
        unit = self.origin_F[self.unit_E[is_asked_E]]
        f_1NF[0, place, unit] = self.f_E[is_asked_E]
        return f_1NF


@dataclass
class Dense:
    """Numbers that are there at every token, such as neurons or the MLP's output, read as Active is
    read."""
    value_NF: torch.Tensor
    label_NK: torch.Tensor

    def at(self, units, tokens):
        return self.value_NF[tokens, units]

    def power_sums(self, power, label_NK):
        value_NF = self.value_NF ** power
        return value_NF.T @ label_NK, value_NF.sum(0).unsqueeze(1)

    def moments(self):
        return moments(self)


def moments(recording):
    """What does each unit say on average where a concept is true, and where not? Moments of an
    Active or a Dense."""
    label_NK = recording.label_NK.float()
    n_true_K = label_NK.sum(0)
    n_false_K = len(label_NK) - n_true_K
    found = []
    for power in (1, 2):
        sum_true_FK, sum_F1 = recording.power_sums(power, label_NK)
        found.append(sum_true_FK / n_true_K.clamp(min=1))
        found.append((sum_F1 - sum_true_FK) / n_false_K.clamp(min=1))
    return Moments(*found)


# ------------------------------------------------------------------------------------ to record
def f_itself(layer, f_BTF, x_BTD):
    return f_BTF


@torch.no_grad()
def record(m, gpt, rows_RT, labels_RTK, tau=0., batch=16):
    """Where are m's units on, on some rows, and what do they say there? An Active.

    On means f > tau, here and in the contributions. What a unit says is m.strength, signed, or f
    where m has none. One pass on clean inputs."""
    layer, = m.layers
    strength = getattr(m, "strength", f_itself)
    n = 0
    parts = []
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        a_BTF = strength(layer, f_BTF, x_BTD)

        # tokens of this batch, position 0 left out
        a_NF = a_BTF[:, 1:].flatten(0, 1)
        f_NF = f_BTF[:, 1:].flatten(0, 1)
        x_ND = x_BTD[:, 1:].flatten(0, 1)
        is_on_NF = (f_NF > tau) & (a_NF != 0)
        token, unit = is_on_NF.nonzero(as_tuple=True)
        parts.append((unit, token + n, a_NF[token, unit], f_NF[token, unit], x_ND))
        n += len(x_ND)

    # entries come by token; a stable sort by unit keeps tokens in order within each
    unit_E, token_E, value_E, f_E, x_ND = (torch.cat(part) for part in zip(*parts))
    order_E = unit_E.argsort(stable=True)
    all_units = torch.arange(f_NF.shape[1], device=unit_E.device)
    label_NK = torch.as_tensor(labels_RTK)[:, 1:].flatten(0, 1).to(unit_E.device)
    return Active(unit_E[order_E], token_E[order_E], value_E[order_E], f_E[order_E], all_units,
                  x_ND, label_NK)


def split_by_sign(fit, *others, share=0.1):
    """Make two units of each whose two signs say two things: recordings with values above 0, a list
    of fit's and the others'.

    A unit is split where its rarer sign holds at more than `share` of its tokens in fit. The
    negative halves come last."""
    # which units are split, and which number each one's negative half gets
    n_negative_F = torch.bincount(fit.unit_E[fit.value_E < 0], minlength=fit.F)
    negative_F = n_negative_F / fit.on().clamp(min=1)
    rarer_F = torch.minimum(negative_F, 1 - negative_F)
    two = (rarer_F > share).nonzero().squeeze(1)
    negative_half_F = torch.arange(fit.F, device=two.device)
    negative_half_F[two] = fit.F + torch.arange(len(two), device=two.device)

    halved = []
    for a in (fit, *others):
        unit_E = torch.where(a.value_E < 0, negative_half_F[a.unit_E], a.unit_E)
        order_E = unit_E.argsort(stable=True)
        halved.append(replace(a, unit_E=unit_E[order_E],
                              token_E=a.token_E[order_E],
                              value_E=a.value_E.abs()[order_E],
                              f_E=a.f_E[order_E],
                              origin_F=torch.cat([a.origin_F, two])))
    return halved


def record_by_sign(m, gpt, fit, test, tau=0.):
    """Record the units on two splits, (rows, labels) each, and split them by sign: [fit, test]."""
    return split_by_sign(record(m, gpt, *fit, tau), record(m, gpt, *test, tau))


def testable_concepts(fit):
    """Which concepts are neither too rare nor too common to say something? Their columns in
    label_NK."""
    share_K = fit.label_NK.float().mean(0)
    return ((share_K >= RARE) & (share_K <= DENSE)).nonzero().squeeze(1)


# ------------------------------------------------------------------------- what units contribute
@torch.no_grad()
def contributions(m, a, units=None, each=64, group=16):
    """What do units (default: all) add to the MLP's output, at J = `each` of their own tokens?
    (U, J, D); NaN where a unit is on at fewer.

    A unit's tokens are evenly spread over those at which it is on. 20 s for 1,024 units."""
    layer, = m.layers
    device = a.unit_E.device
    if units is None:
        units = torch.arange(a.F, device=device)

    # entries of each unit: the first J, or J evenly spread ones where it has more
    on_F1 = a.on().unsqueeze(1)
    start_F1 = on_F1.cumsum(0) - on_F1
    j_J = torch.arange(each, device=device)
    offset_FJ = torch.where(on_F1 > each, j_J * on_F1 // each, j_J)
    is_there_FJ = j_J < on_F1
    entry_FJ = torch.where(is_there_FJ, start_F1 + offset_FJ, 0)

    # contributions of a group of units at once, at all tokens that one of them asks for
    parts = []
    for some in units.split(group):
        tokens, place_UJ = a.token_E[entry_FJ[some]].unique(return_inverse=True)
        x_1ND = a.x_ND[tokens].unsqueeze(0)
        c_1NUD = m.contrib(layer, a.f_at(tokens), x_1ND, a.origin_F[some])
        column_U1 = torch.arange(len(some), device=device).unsqueeze(1)
        parts.append(c_1NUD[0][place_UJ, column_U1])
    return torch.where(is_there_FJ[units].unsqueeze(-1), torch.cat(parts), torch.nan)


def write_directions(c_FJD):
    """Which way does each unit write? (F, D) unit vectors along its mean contribution; 0 for a unit
    that is never on."""
    return nnf.normalize(c_FJD.nanmean(1).nan_to_num(), dim=1)
