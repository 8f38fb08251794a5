"""What the units of one decomposition mean: true concepts, probes, splitting, absorption, atomicity. Pure functions.

Most of it needs only where the units are on, so that is recorded once per split, sparse, and shared by the metrics:
    fit, test = halve(record(m, gpt, *fit, tau), record(m, gpt, *test, tau))        fit, test: (rows, labels)
Everything that is chosen (thresholds, units, probes) is chosen on fit and scored on test.
N tokens (position 0 of each row left out), E entries (one per token and unit that is on there), F units, K concepts,
D residual width, U some of the units, L levels of activation, J probe inputs. Costs: two cores, 50,000 tokens, L0 16.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf

from activations import over_rows
from evals import ALIVE, DENSE, RARE, clean, concept_ablation, f1_scores, steering

LEVELS = 10             # a unit is on at level l where it exceeds l / LEVELS of its largest value on fit

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

def halve(fit, *others, share=0.1):
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

def usual(fit):
    """Concepts neither too rare nor too common to say something: their columns."""
    share_K = fit.label_NK.float().mean(0)
    return ((share_K >= RARE) & (share_K <= DENSE)).nonzero().squeeze(1)

# ------------------------------------------------------------------------------------- units against concepts
def top(fit):
    """Each unit's largest value on fit."""
    return torch.zeros(fit.F, device=fit.value_E.device).scatter_reduce_(0, fit.unit_E, fit.value_E, "amax")

def levels(a, top_F):
    """The highest level at which each entry is on: value > level / LEVELS * top."""
    return ((a.value_E * LEVELS / top_F[a.unit_E]).ceil().long() - 1).clamp(0, LEVELS - 1)

def level_counts(a, top_F):
    """Tokens where each unit is on at each level or a higher one: on (L, F), both (L, F, K) with each concept."""
    group_E = a.unit_E * LEVELS + levels(a, top_F)
    order = group_E.argsort(stable=True)
    split = replace(a, unit_E=group_E[order], token_E=a.token_E[order], origin_F=torch.arange(a.F * LEVELS))
    both = split.sums(a.label_NK.float()).view(a.F, LEVELS, -1)
    above = lambda t: t.flip(1).cumsum(1).flip(1).transpose(0, 1)
    return above(split.on().view(a.F, LEVELS)), above(both)

def coverage(fit, test):
    """How well the best unit for each concept detects it (Karvonen et al. 2024, arXiv:2408.00113): for each level F1 of
    the best unit, meaned over the usual concepts; level and units from fit. {"coverage", "f1_K", "unit_K", "level",
    "concepts"}, 0 to 1, higher is better. 3 s."""
    keep, top_F = usual(fit), top(fit)
    (on, both), (on2, both2) = level_counts(fit, top_F), level_counts(test, top_F)
    f1_LFK = f1_scores(on.unsqueeze(-1), fit.label_NK.sum(0), both)[..., keep]
    level = f1_LFK.amax(1).mean(1).argmax()
    unit_K = f1_LFK[level].argmax(0)
    f1_K = f1_scores(on2[level, unit_K], test.label_NK.sum(0)[keep], both2[level, unit_K, keep])
    return dict(coverage=f1_K.mean().item(), f1_K=f1_K, unit_K=unit_K, level=level.item(), concepts=keep)

def board(fit, test, precision=0.95):
    """Reconstruction of all concepts from units of high precision: on fit, at each level, the pairs (unit, concept)
    where the unit is on at ALIVE tokens or more, `precision` of them the concept's; a concept is predicted wherever one
    of its units is on. Micro-F1 on test at the level that is best on fit. 10 s."""
    keep, top_F = usual(fit), top(fit)
    on_LF, both_LFK = level_counts(fit, top_F)
    good_LFK = (both_LFK[..., keep] >= precision * on_LF.unsqueeze(-1)) & (on_LF >= ALIVE).unsqueeze(-1)

    def micro_f1(a, level):
        order = a.token_E.argsort(stable=True)
        start = torch.searchsorted(a.token_E[order], torch.arange(a.N, device=order.device))
        on_E = (levels(a, top_F)[order] >= level).float()
        said_NK = nnf.embedding_bag(a.unit_E[order], good_LFK[level].float(), start, mode="sum",
                                    per_sample_weights=on_E) > 0
        true_NK = a.label_NK[:, keep]
        return f1_scores(said_NK.sum(), true_NK.sum(), (said_NK & true_NK).sum()).item()
    level = max(range(LEVELS), key=lambda level: micro_f1(fit, level))
    return micro_f1(test, level)

def alive(a, top_F, counts=(1, ALIVE, 100, 1000)):
    """{level: [units on at that many tokens or more at this level, for each of counts]}: no one threshold decides."""
    group_E = a.unit_E * LEVELS + levels(a, top_F)
    on_FL = torch.bincount(group_E, minlength=a.F * LEVELS).view(a.F, LEVELS).flip(1).cumsum(1).flip(1)
    return {level / LEVELS: [(on_FL[:, level] >= n).sum().item() for n in counts] for level in range(LEVELS)}

def like(fit, units_KU, gen, near=10):
    """For each of these units another that is on about as often, at random among the `near` nearest that are not in its
    row: their null (K, U)."""
    on_F, (K, U) = fit.on().double().log1p(), units_KU.shape
    far = (on_F[units_KU].unsqueeze(-1) - on_F).abs().scatter(-1, units_KU.unsqueeze(1).expand(K, U, U), torch.inf)
    choice = far.topk(min(near, fit.F - U), -1, largest=False).indices
    pick = torch.randint(choice.shape[-1], (K, U, 1), generator=gen).to(units_KU.device)
    return choice.gather(-1, pick).squeeze(-1)

def difference_of_means(v_ND, label_NK):
    """(K, D): mean of v where a concept is true less its mean elsewhere, the direction to beat in steering."""
    label_NK = label_NK.float()
    n_K = label_NK.sum(0).unsqueeze(1)
    true = label_NK.T @ v_ND
    return true / n_K.clamp(min=1) - (v_ND.sum(0) - true) / (len(v_ND) - n_K).clamp(min=1)

# ------------------------------------------------------------------------------------------------------ probes
def sample(label_NK, n, gen):
    """(K, 2 n) tokens: n at random where each concept is true, then n where it is not."""
    def draw(where):
        return where[torch.randint(len(where), (n,), generator=gen).to(where.device)]
    return torch.stack([torch.cat([draw(label_N.nonzero().squeeze(1)), draw((~label_N).nonzero().squeeze(1))])
                        for label_N in label_NK.T])

def d_prime(a):
    """(F, K): difference of a unit's means over tokens with and without the concept, in standard deviations."""
    true, false, true2, false2 = a.moments()
    return (true - false) / ((true2 - true**2 + false2 - false**2).clamp(min=0) / 2 + 1e-12).sqrt()

def logistic(X_KNJ, truth_N, l2=1., steps=12):
    """K logistic regressions by Newton's method: w_KJ1, bias last, for inputs as they are. The penalty
    l2 |w|^2 / 2 is on inputs of unit variance."""
    mean, std = X_KNJ.mean(1, keepdim=True), X_KNJ.std(1, keepdim=True).clamp(min=1e-6)
    X = torch.cat([(X_KNJ - mean) / std, torch.ones_like(X_KNJ[..., :1])], -1)
    w, ridge = X.new_zeros(len(X), X.shape[-1]), X.new_tensor([l2] * (X.shape[-1] - 1) + [1e-6])
    for _ in range(steps):
        p = torch.einsum("knj,kj->kn", X, w).sigmoid()
        slope = torch.einsum("kn,knj->kj", p - truth_N, X) + ridge * w
        curve = torch.einsum("kn,knj,kni->kji", p * (1 - p) + 1e-6, X, X) + torch.diag(ridge)
        w = w - torch.linalg.solve(curve, slope).clamp(-4, 4)
    w_KJ = w[:, :-1] / std.squeeze(1)
    return torch.cat([w_KJ, w[:, -1:] - (w_KJ * mean.squeeze(1)).sum(-1, keepdim=True)], -1)

def apply(w_KJ1, X_KNJ):
    return torch.einsum("knj,kj->kn", X_KNJ, w_KJ1[:, :-1]) + w_KJ1[:, -1:]

def auroc(score_KN):
    """P(a score of the first half beats one of the second), ties count half."""
    true, false = score_KN.contiguous().chunk(2, -1)
    false = false.sort(-1).values.contiguous()
    below, upto = (torch.searchsorted(false, true.contiguous(), right=right) for right in (False, True))
    return (below + upto).double().mean(-1) / (2 * false.shape[-1])

def balanced_f1(score_KN):
    true, false = (score_KN > 0).chunk(2, -1)
    return f1_scores((true.sum(-1) + false.sum(-1)), true.shape[-1], true.sum(-1))

def probes(fit, test, concepts, gen, ks=(1, 2, 5), n=1000):
    """Sparse probing (Gurnee et al. 2023, arXiv:2305.01610): logistic regression on the k units of largest |d'|, chosen
    and fitted on n tokens with the concept and n without it. fit, test: Active or Dense. {"auroc": {k: (K)}, "units":
    (K, max k)}. The number to print is the difference from the same probe on neurons. 5 s."""
    units = d_prime(fit)[:, concepts].abs().topk(max(ks), 0).indices.T
    truth = torch.arange(2 * n, device=units.device) < n
    X, X2 = (a.at(units.unsqueeze(1), sample(a.label_NK[:, concepts], n, gen).unsqueeze(2)) for a in (fit, test))
    return dict(units=units, auroc={k: auroc(apply(logistic(X[..., :k], truth.float()), X2[..., :k])) for k in ks})

def dense_probes(y_ND, y2_ND, label_NK, label2_NK, concepts, gen, n=1000):
    """The ceiling: the same with all D dimensions. {"auroc": (K), "f1": (K), "w": (K, D + 1)}. 20 s, once per layer."""
    truth, out = (torch.arange(2 * n, device=y_ND.device) < n).float(), []
    for some in concepts.split(16):
        w = logistic(y_ND[sample(label_NK[:, some], n, gen)], truth)
        score = apply(w, y2_ND[sample(label2_NK[:, some], n, gen)])
        out.append((auroc(score), balanced_f1(score), w))
    return dict(zip(("auroc", "f1", "w"), map(torch.cat, zip(*out))))

@torch.no_grad()
def probe_yardsticks(gpt, layer, fit, test, gen, n=1000):
    """What probes on anybody's units are held against: null_probe_auroc_k, of plain neurons, act(z) at every token, and
    probe_dense, of all of y. fit, test: (rows, labels). The same for all decompositions of an MLP: 30 s."""
    def inside(rows_RT, labels_RTK):
        (x_ND,), (y_ND,) = over_rows(gpt, rows_RT, [layer])
        return Dense(nnf.gelu(gpt.h[layer].mlp.c_fc(x_ND), approximate="tanh"),
                     torch.as_tensor(labels_RTK)[:, 1:].flatten(0, 1).to(y_ND.device)), y_ND
    (a, y_ND), (b, y2_ND) = inside(*fit), inside(*test)
    if not len(keep := usual(a)):
        return {}
    dense = dense_probes(y_ND, y2_ND, a.label_NK, b.label_NK, keep, gen, n)["auroc"].mean().item()
    return dict(probe_dense=dense) | {f"null_probe_auroc_{k}": v.mean().item()
                                      for k, v in probes(a, b, keep, gen, n=n)["auroc"].items()}

def lasso(X_KNJ, truth_N, l1=0.01, steps=100):
    """Weights (K, J) of the mean log-loss + l1 |w|_1 on inputs of unit variance, by accelerated proximal steps."""
    X = (X_KNJ - X_KNJ.mean(1, keepdim=True)) / X_KNJ.std(1, keepdim=True).clamp(min=1e-6)
    rate = 4 / torch.linalg.matrix_norm(X.mT @ X / X.shape[1], 2).view(-1, 1)
    w = ahead = X.new_zeros(len(X), X.shape[-1])
    for step in range(steps):
        p = torch.einsum("knj,kj->kn", X, ahead).sigmoid()
        new = ahead - rate * torch.einsum("kn,knj->kj", p - truth_N, X) / X.shape[1]
        new = new.sign() * (new.abs() - rate * l1).clamp(min=0)
        w, ahead = new, new + step / (step + 3) * (new - w)
    return w

def splits(fit, test, concepts, gen, n=1000, most=10, jump=0.03):
    """Units that a concept is split into (Chanin et al. 2024, arXiv:2409.14507): probes on the k units with the largest
    positive L1 weights; k* is the last k whose F1 beats the best so far by `jump`, stopping at the first that doesn't.
    {"n": (K), "f1": (K) of the k = 1 probe, without which n says nothing, "units": (K, most)}. Lower is
    better. 20 s."""
    candidates = d_prime(fit)[:, concepts].topk(min(32, fit.F), 0).indices.T
    truth = (torch.arange(2 * n, device=candidates.device) < n).float()
    at, at2 = (sample(a.label_NK[:, concepts], n, gen).unsqueeze(2) for a in (fit, test))
    w = lasso(fit.at(candidates.unsqueeze(1), at), truth)
    units = candidates.gather(1, w.topk(min(most, w.shape[1]), 1).indices)
    X, X2 = fit.at(units.unsqueeze(1), at), test.at(units.unsqueeze(1), at2)
    f1_PK = torch.stack([balanced_f1(apply(logistic(X[..., :k], truth), X2[..., :k]))
                         for k in range(1, units.shape[1] + 1)])
    best, count, going = f1_PK[0], torch.ones_like(units[:, 0]), torch.ones_like(units[:, 0], dtype=torch.bool)
    for k in range(2, len(f1_PK) + 1):
        going = going & (f1_PK[k - 1] > best + jump)
        count, best = torch.where(going, k, count), torch.where(going, f1_PK[k - 1], best)
    return dict(n=count, f1=f1_PK[0], units=units)

# -------------------------------------------------------------------------------- absorption and what units write
@torch.no_grad()
def shares(m, a, units=None, each=64, group=16):
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

def writes(c_FJD):
    """(F, D) unit vectors: the direction of each unit's mean contribution, 0 for one that is never on."""
    return nnf.normalize(c_FJD.nanmean(1).nan_to_num(), dim=1)

def effective_rank(c_FJD):
    """(tr C)^2 / tr C^2 of each unit's uncentred covariance C of contributions, estimated from pairs of tokens: 1 for
    one direction, r for r equal ones; NaN where a unit is on at fewer than two tokens."""
    c = c_FJD.nan_to_num()
    square = c.square().sum(-1)
    pairs = square.sum(1)**2 - square.square().sum(1)           # over i != j: |c_i|^2 |c_j|^2 and (c_i . c_j)^2
    return pairs / ((c @ c.mT).square().sum((1, 2)) - square.square().sum(1))

@torch.no_grad()
def absorption(m, test, y_ND, w_KD, write_FD, split, concepts, gen, n=100, share=0.4):
    """Whether units other than a concept's own stand in for it (Chanin et al. 2024, arXiv:2409.14507, with each unit's
    exact contribution in place of activation times cosine). w_KD: dense probes on y, bias last, w_hat their direction;
    split: `splits` of the same concepts, whose first n units are the concept's own, "main". At up to n tokens that are
    truly the concept's and that the probe finds, pi_u = contrib_u . w_hat, pi = y . w_hat > 0:
      full      all main units off, and the unit of the largest pi_u has cosine 0.025 or more and pi_u >= share pi
      fraction  A / (A + main pi), A = the 3 largest pi_u > 0 of others of cosine 0.1 or more, at most pi - main pi;
                0 if their sum is under share pi or main pi >= pi; 1 if main pi <= 0
    {"full": (K), "fraction": (K)}, NaN without such a token. Random units score low: print the k = 1 probe's F1 beside
    them, n/a where that is under 0.6. 0.3 s per concept."""
    (layer,), out = m.layers, []
    for k, (concept, w) in enumerate(zip(concepts.tolist(), w_KD)):
        direction = nnf.normalize(w[:-1], dim=0)
        found = test.label_NK[:, concept] & (y_ND @ w[:-1] + w[-1] > 0) & (y_ND @ direction > 0)
        tokens = found.nonzero().squeeze(1)
        tokens = tokens[torch.randperm(len(tokens), generator=gen)[:n].to(tokens.device)]
        if not len(tokens):
            out.append((math.nan, math.nan))
            continue
        pi_NF = (m.contrib(layer, test.f_at(tokens), test.x_ND[tokens].unsqueeze(0), test.origin_F)[0] @ direction)
        every = torch.arange(test.F, device=tokens.device)
        on_NF = test.at(every, tokens.unsqueeze(1)) > 0
        pi_NF, pi_N = pi_NF * on_NF, y_ND[tokens] @ direction
        is_main = torch.isin(every, split["units"][k, :split["n"][k]])
        cos_F, main_N = write_FD @ direction, (pi_NF * is_main).sum(1)
        best = pi_NF.max(1)
        full = ~on_NF[:, is_main].any(1) & (cos_F[best.indices] >= 0.025) & (best.values >= share * pi_N)
        others = torch.where(~is_main & (cos_F >= 0.1), pi_NF, 0).clamp(min=0).topk(min(3, test.F), 1).values.sum(1)
        A = torch.minimum(others, pi_N - main_N)
        fraction = torch.where((others < share * pi_N) | (main_N >= pi_N), 0,
                               torch.where(main_N <= 0, 1, A / (A + main_N)))
        out.append((full.float().mean().item(), fraction.mean().item()))
    return dict(zip(("full", "fraction"), torch.tensor(out, device=y_ND.device).T))

# -------------------------------------------------------------------------------------------------- atomicity
def one_concept(fit, test, gain=0.03, enough=0.5, first=15):
    """Shares of the alive units that are
      atomic       one concept explains them: F1 >= enough, and neither of the next two gains `gain` over it
      polysemantic "c or c'" does better: they fire for two things
      composite    "c and c'" does better (if both do, the larger gain decides)
      unexplained  F1 of the best concept below enough
    Pairs among each unit's `first` best concepts; chosen on fit, scored on test. They sum to 1. 10 s."""
    keep, alive_F = usual(fit), fit.on() >= ALIVE

    def counts(a, best=None):       # of single concepts, and of "c and c'" for each unit's best: on, label, both
        label_NK = a.label_NK[:, keep].float()
        on_F, label_K, both_FK = a.on().float(), label_NK.sum(0), a.sums(label_NK)
        if best is None:
            best = f1_scores(on_F.unsqueeze(1), label_K, both_FK).topk(min(first, len(keep)), 1).indices
        pair_KK = label_NK.T @ label_NK
        mine_EB = label_NK[a.token_E.unsqueeze(1), best[a.unit_E]]
        group = torch.zeros(a.F, best.shape[1], best.shape[1], device=on_F.device)
        for b in range(best.shape[1]):
            group[:, b].index_add_(0, a.unit_E, mine_EB * mine_EB[:, b:b + 1])
        both_FBB, label_FBB = group, pair_KK[best.unsqueeze(2), best.unsqueeze(1)]
        single = group.diagonal(dim1=1, dim2=2)
        sizes = label_FBB.diagonal(dim1=1, dim2=2)
        on = on_F.view(-1, 1, 1)
        either = f1_scores(on, sizes.unsqueeze(1) + sizes.unsqueeze(2) - label_FBB,
                           single.unsqueeze(1) + single.unsqueeze(2) - both_FBB)
        return best, f1_scores(on.squeeze(1), sizes, single), either.flatten(1), f1_scores(on, label_FBB,
                                                                                           both_FBB).flatten(1)
    best, *on_fit = counts(fit)
    _, *on_test = counts(test, best)
    f1, either, both = (t.gather(1, v.argmax(1, keepdim=True)).squeeze(1)[alive_F] for v, t in zip(on_fit, on_test))
    P, K, known = either - f1, both - f1, f1 >= enough
    kinds = dict(atomic=known & (P < gain) & (K < gain), polysemantic=known & (P >= gain) & (P >= K),
                 composite=known & (K >= gain) & (K > P), unexplained=~known)
    return {name: is_.float().mean().item() for name, is_ in kinds.items()} | dict(f1=f1.mean().item())

def fragmentation(a, jaccard=0.8):
    """Size-weighted mean size of the clusters of alive units that are on at the same tokens (edges: Jaccard >= 0.8): 1
    is best, 50 says that mechanisms come in 50 pieces. 10 s."""
    on_F = a.on()
    n = (on_F >= ALIVE).sum().item()
    if not n:
        return math.nan
    new_F = (on_F >= ALIVE).cumsum(0) - 1
    here = on_F[a.unit_E] >= ALIVE
    both = torch.zeros(n, n, device=on_F.device)
    for tokens in range(0, a.N, 8192):
        some = here & (a.token_E >= tokens) & (a.token_E < tokens + 8192)
        on_NU = torch.zeros(8192, n, device=on_F.device)
        on_NU[a.token_E[some] - tokens, new_F[a.unit_E[some]]] = 1
        both += on_NU.T @ on_NU
    size = both.diagonal()
    near = both >= jaccard * (size.unsqueeze(0) + size.unsqueeze(1) - both)
    cluster, old = torch.arange(n, device=on_F.device), None
    while old is None or not torch.equal(cluster, old):         # each takes its neighbours' smallest name
        old, cluster = cluster, torch.where(near, cluster, n).amin(1)
    return torch.bincount(cluster).square().sum().item() / n

def meta_dictionary(write_FD, gen, width, k=4, steps=1000, lr=3e-3, seeds=3):
    """How far the units' write directions are sums of few common atoms (Leask et al. 2025, arXiv:2502.04878): VE of a
    BatchTopK SAE of `width` atoms, k a row, trained on these rows, in excess of the same on Gaussian rows of the same
    mean and covariance: (VE - VE_null) / (1 - VE_null), since at this size chance alone explains a third to a half.
    {"ve", "ve_null", "excess"}, lower excess is more atomic. `seeds` of both are one batch: 60 s for 1,024 rows."""
    rows, (n, D) = nnf.normalize(write_FD.double(), dim=1).float(), write_FD.shape
    root = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    draw = torch.randn(seeds, n, len(root.S), generator=gen).to(rows)
    draw = torch.linalg.qr(draw - draw.mean(1, keepdim=True)).Q * root.S @ root.Vh + rows.mean(0)     # same moments
    X = torch.cat([rows.expand(seeds, -1, -1), nnf.normalize(draw, dim=-1)])
    W_dec = nnf.normalize(torch.randn(2 * seeds, width, D, generator=gen).to(rows), dim=-1)
    params = [W_dec.mT.clone(), W_dec, X.mean(1, keepdim=True).clone(), torch.zeros(2 * seeds, 1, width).to(rows)]
    params = [p.requires_grad_() for p in params]
    opt = torch.optim.Adam(params, lr)

    def decode(W_enc, W_dec, b_dec, b_enc):
        f = ((X - b_dec) @ W_enc + b_enc).relu()
        least = f.detach().flatten(1).kthvalue(n * (width - k) + 1, 1).values
        return f * (f >= least.view(-1, 1, 1)) @ W_dec + b_dec
    with torch.enable_grad():
        for step in range(steps):
            opt.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / steps))
            opt.zero_grad()
            (X - decode(*params)).square().sum().div(n).backward()
            opt.step()
            with torch.no_grad():
                W_dec.div_(W_dec.norm(dim=-1, keepdim=True))
    with torch.no_grad():
        ve = 1 - (X - decode(*params)).square().sum((1, 2)) / (X - X.mean(1, keepdim=True)).square().sum((1, 2))
    ve, null = ve.view(2, seeds).mean(1).tolist()
    return dict(ve=ve, ve_null=null, excess=(ve - null) / (1 - null))

# ---------------------------------------------------------------------------- what a concept's units do to predictions
@torch.no_grad()
def effects(m, gpt, fit, test, after, target_UV, gen, units=5, draws=3, rows=32, prompts=16):
    """For the columns `after` of labels, each "the next token is one of a set", target_UV. fit, test: (rows, labels).
      ablation  nats that switching off the `units` units of largest |d'| costs where the column is true, errors kept,
                less what it costs elsewhere (evals.concept_ablation), less the same of `draws` times as many others
                that are on as often. ablation_at, ablation_elsewhere: the two costs themselves
      steering  S (evals.steering) of the writes of the unit of largest d', towards the set: held against `pushes`
    Means over columns, as a flat dict; empty without columns, or if nothing is on. A minute on two cores."""
    (layer,), whole = m.layers, record(m, gpt, *fit)
    if not len(after) or not len(whole.unit_E):
        return {}
    best_Uu = d_prime(whole)[:, after].abs().topk(min(units, whole.F // 2), 0).indices.T
    every = torch.cat([best_Uu, *(like(whole, best_Uu, gen) for _ in range(draws))])
    label = torch.as_tensor(test[1])[:rows, :, after.cpu()].repeat(1, 1, 1 + draws)
    cost = concept_ablation(m, gpt, test[0][:rows], label, every)
    (at, *at_null), (off, *off_null) = (cost[where].view(1 + draws, -1) for where in ("on", "off"))
    null = sum(at_null) / draws - sum(off_null) / draws
    mean = lambda v: v.nanmean().item()             # what is rare may be missing from these rows
    a, = halve(whole)
    push_UD = writes(shares(m, a, d_prime(a)[:, after].argmax(0)))
    S = steering(gpt, layer, *opening(fit, test, prompts), push_UD, target_UV)["S"]
    return dict(ablation=mean(at - off - null), ablation_at=mean(at), ablation_elsewhere=mean(off),
                steering=mean(S))

def opening(fit, test, prompts):
    """First tokens of rows of fit and of test, to be gone on with."""
    return [rows_RT[:prompts, :rows_RT.shape[1] // 8] for rows_RT, _ in (fit, test)]

@torch.no_grad()
def pushes(gpt, layer, fit, test, after, target_UV, gen, prompts=16):
    """What `steering` of anybody's units is held against, at the same norms: steering_means, of the difference of means
    of y, and steering_random, of random directions. The same for all decompositions of an MLP."""
    if not len(after):
        return {}
    _, (y_ND,) = over_rows(gpt, fit[0], [layer])
    means = difference_of_means(y_ND, torch.as_tensor(fit[1])[:, 1:, after.cpu()].flatten(0, 1).to(y_ND.device))
    random = torch.randn(means.shape, generator=gen).to(means)
    S = steering(gpt, layer, *opening(fit, test, prompts), torch.cat([means, random]), target_UV.repeat(2, 1))["S"]
    return dict(zip(("steering_means", "steering_random"), S.view(2, -1).mean(1).tolist()))

# ---------------------------------------------------------------------------------------------------- all of it
def summary(m, gpt, fit, test, parents, gen, tau=0., n=1000):
    """A flat dict of all of the above. fit, test: (rows, labels); parents: columns of the concepts that have others
    below them, for splitting and absorption. The same of baselines.py are these numbers' nulls; a key that is
    missing or None would mean nothing here: so does absorption where all of y is written twice, by each matrix of
    components. Two minutes on two cores."""
    (layer,), (a, b) = m.layers, halve(record(m, gpt, *fit, tau), record(m, gpt, *test, tau))
    keep, top_F, alive_F = usual(a), top(a), a.on() >= ALIVE
    if not alive_F.any():
        return dict(units=a.F, halved=0, alive_curve=alive(a, top_F))
    c_FJD = shares(m, a)
    write_FD, n_alive = writes(c_FJD), int(alive_F.sum())
    out = dict(units=a.F, halved=a.F - len(m.params_F), alive_curve=alive(a, top_F), fragmentation=fragmentation(a),
               effective_rank=effective_rank(c_FJD)[alive_F].nanmean().item(),
               meta_excess=meta_dictionary(write_FD[alive_F], gen, n_alive // 16)["excess"] if n_alive > 64 else None)
    if len(keep):
        out |= dict(coverage=coverage(a, b)["coverage"], board=board(a, b))
        out |= {f"units_{kind}": share for kind, share in one_concept(a, b).items()}
        out |= {f"probe_auroc_{k}": v.mean().item() for k, v in probes(a, b, keep, gen, n=n)["auroc"].items()}
    if len(parents := parents[torch.isin(parents, keep)]):
        y_ND, y2_ND = (gpt.h[layer].mlp(v.x_ND) for v in (a, b))
        known = dense_probes(y_ND, y2_ND, a.label_NK, b.label_NK, parents, gen, n)
        split = splits(a, b, parents, gen, n)
        absorbed = absorption(m, b, y2_ND, known["w"], write_FD, split, parents, gen)
        sure = known["f1"] > 0.6                                # what y does not know can't be absorbed
        out |= dict(splits=split["n"].float().mean().item(), parent_f1=split["f1"].mean().item())
        enough = out["parent_f1"] >= 0.6 and sure.sum() >= 5 and not hasattr(m, "site")
        out |= {f"absorption_{k}": v[sure].nanmean().item() if enough else None for k, v in absorbed.items()}
    return out
