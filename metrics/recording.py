"""Where the units of one decomposition are on, recorded once per split, sparse, and shared by the metrics.

    fit, test = halve(record(m, gpt, *fit, tau), record(m, gpt, *test, tau))        fit, test: (rows, labels)
N tokens (position 0 of each row left out), E entries (one per token and unit that is on there), F units, K concepts,
D residual width, U some of the units. Costs: two cores, 50,000 tokens, L0 16.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf

from evals import DENSE, RARE, clean

@dataclass
class Active:
    """Where F units are on among N tokens: sorted by unit, then token. value_E > 0 once halved."""
    unit_E: torch.Tensor
    token_E: torch.Tensor
    value_E: torch.Tensor       # strength, signed until `halve`
    f_E: torch.Tensor           # what m.encode says
    origin_F: torch.Tensor      # which of m's units each is; two of these may be the halves of one
    x_ND: torch.Tensor          # the MLP's input
    label_NK: torch.Tensor      # bool

    @property
    def F(self):
        return len(self.origin_F)

    @property
    def N(self):
        return len(self.x_ND)

    def on(self):
        """Tokens where each is on (F)."""
        return torch.bincount(self.unit_E, minlength=self.F)

    def at(self, units, tokens):
        """Values of units at tokens (broadcast), 0 where off."""
        key_E, key = self.unit_E * self.N + self.token_E, units * self.N + tokens
        at = torch.searchsorted(key_E, key).clamp(max=len(key_E) - 1)
        return torch.where(key_E[at] == key, self.value_E[at], 0)

    def sums(self, table_NJ, weight_E=None):
        """(F, J): rows of the table summed over each unit's entries, times weight."""
        start = torch.searchsorted(self.unit_E, torch.arange(self.F, device=self.unit_E.device))
        return nnf.embedding_bag(self.token_E, table_NJ, start, mode="sum", per_sample_weights=weight_E)

    def moments(self):
        """Means of each unit's value and of its square where each concept is true, and where it is not: 4 x (F, K)."""
        label_NK = self.label_NK.float()
        n_K, out = label_NK.sum(0), []
        for power in (1, 2):
            v_E = self.value_E ** power
            true, total = self.sums(label_NK, v_E), self.sums(torch.ones_like(label_NK[:, :1]), v_E)
            out += [true / n_K.clamp(min=1), (total - true) / (self.N - n_K).clamp(min=1)]
        return out

    def f_at(self, tokens):
        """(1, tokens, units of m): what m.encode said there, for m.contrib."""
        row_N = torch.full((self.N,), -1, device=tokens.device)
        row_N[tokens] = torch.arange(len(tokens), device=tokens.device)
        here = row_N[self.token_E] >= 0
        f = self.f_E.new_zeros(1, len(tokens), int(self.origin_F.max()) + 1)
        f[0, row_N[self.token_E[here]], self.origin_F[self.unit_E[here]]] = self.f_E[here]
        return f

@dataclass
class Dense:
    """Numbers that are there at every token, such as neurons or the MLP's output, as probes read them."""
    value_NF: torch.Tensor
    label_NK: torch.Tensor

    def at(self, units, tokens):
        return self.value_NF[tokens, units]

    def moments(self):
        label_NK, out = self.label_NK.float(), []
        for power in (1, 2):
            v_NF = self.value_NF ** power
            true = v_NF.T @ label_NK
            out += [true / label_NK.sum(0).clamp(min=1),
                    (v_NF.sum(0).unsqueeze(1) - true) / (1 - label_NK).sum(0).clamp(min=1)]
        return out

@torch.no_grad()
def record(m, gpt, rows_RT, labels_RTK, tau=0., batch=16):
    """m's units on some rows. On means f > tau, here and in the contributions. One pass."""
    layer, = m.layers
    strength, n, parts = getattr(m, "strength", lambda layer, f, x: f), 0, []
    for idx in rows_RT.split(batch):
        x_BTD, f_BTF = clean(m, gpt, idx, layer)
        a_NF, f_NF, x_ND = (v[:, 1:].flatten(0, 1) for v in (strength(layer, f_BTF, x_BTD), f_BTF, x_BTD))
        token, unit = ((f_NF > tau) & (a_NF != 0)).nonzero(as_tuple=True)
        parts.append((unit, token + n, a_NF[token, unit], f_NF[token, unit], x_ND))
        n += len(x_ND)
    unit, token, value, f, x_ND = (torch.cat(p) for p in zip(*parts))
    order = unit.argsort(stable=True)
    return Active(unit[order], token[order], value[order], f[order], torch.arange(f_NF.shape[1], device=unit.device),
                  x_ND, torch.as_tensor(labels_RTK)[:, 1:].flatten(0, 1).to(unit.device))

def split_by_sign(fit, *others, share=0.1):
    """The same recordings with values >= 0: a unit whose rarer sign holds at more than `share` of its tokens in fit
    says two things, and becomes two units, the negative ones last."""
    minus_F = torch.bincount(fit.unit_E[fit.value_E < 0], minlength=fit.F) / fit.on().clamp(min=1)
    two = (torch.minimum(minus_F, 1 - minus_F) > share).nonzero().squeeze(1)
    new_F = torch.arange(fit.F, device=two.device).index_put((two,), fit.F + torch.arange(len(two), device=two.device))
    out = []
    for a in (fit, *others):
        unit_E = torch.where(a.value_E < 0, new_F[a.unit_E], a.unit_E)
        order = unit_E.argsort(stable=True)
        out.append(replace(a, unit_E=unit_E[order], token_E=a.token_E[order], value_E=a.value_E.abs()[order],
                           f_E=a.f_E[order], origin_F=torch.cat([a.origin_F, two])))
    return out

def testable_concepts(fit):
    """Concepts neither too rare nor too common to say something: their columns."""
    share_K = fit.label_NK.float().mean(0)
    return ((share_K >= RARE) & (share_K <= DENSE)).nonzero().squeeze(1)

@torch.no_grad()
def contributions(m, a, units=None, each=64, group=16):
    """(U, each, D): what each unit (default: all) contributes to y at up to `each` of its tokens, evenly spread; NaN
    where it has fewer. 20 s for 1,024."""
    (layer,), on_F = m.layers, a.on()
    start_F, j = on_F.cumsum(0) - on_F, torch.arange(each, device=on_F.device)
    spread = torch.where(on_F.unsqueeze(1) > each, j * on_F.unsqueeze(1) // each, j)
    entry_FJ = torch.where(j < on_F.unsqueeze(1), start_F.unsqueeze(1) + spread, 0)
    some, out = torch.arange(a.F, device=on_F.device) if units is None else units, []
    for units in some.split(group):
        tokens, row = a.token_E[entry_FJ[units]].unique(return_inverse=True)
        c_NUD = m.contrib(layer, a.f_at(tokens), a.x_ND[tokens].unsqueeze(0), a.origin_F[units])[0]
        out.append(c_NUD[row, torch.arange(len(units), device=row.device).unsqueeze(1)])
    return torch.where((j < on_F[some].unsqueeze(1)).unsqueeze(-1), torch.cat(out), torch.nan)

def write_directions(c_FJD):
    """(F, D) unit vectors: the direction of each unit's mean contribution, 0 for one that is never on."""
    return nnf.normalize(c_FJD.nanmean(1).nan_to_num(), dim=1)
