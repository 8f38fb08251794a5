"""What the units of one decomposition mean: true concepts, probes, splitting, absorption. Pure functions.

fit, test: recordings (recording.py), or (rows, labels).
Everything that is chosen (thresholds, units, probes) is chosen on fit and scored on test.
N tokens (position 0 of each row left out), E entries (one per token and unit that is on there), F units, K concepts,
D residual width, U some of the units, L levels of activation, J probe inputs. Costs: two cores, 50,000 tokens, L0 16.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as nnf

from data import over_rows
from evals import ALIVE, f1_scores
from metrics.atoms import effective_rank, fragmentation, meta_dictionary, one_concept
from metrics.recording import Dense, split_by_sign, record, contributions, testable_concepts, write_directions
from model import gelu

LEVELS = 10             # a unit is on at level l where it exceeds l / LEVELS of its largest value on fit

def largest_value(fit):
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
    keep, top_F = testable_concepts(fit), largest_value(fit)
    (on, both), (on2, both2) = level_counts(fit, top_F), level_counts(test, top_F)
    f1_LFK = f1_scores(on.unsqueeze(-1), fit.label_NK.sum(0), both)[..., keep]
    level = f1_LFK.amax(1).mean(1).argmax()
    unit_K = f1_LFK[level].argmax(0)
    f1_K = f1_scores(on2[level, unit_K], test.label_NK.sum(0)[keep], both2[level, unit_K, keep])
    return dict(coverage=f1_K.mean().item(), f1_K=f1_K, unit_K=unit_K, level=level.item(), concepts=keep)

def concepts_from_precise_units(fit, test, precision=0.95):
    """Reconstruction of all concepts from units of high precision: on fit, at each level, the pairs (unit, concept)
    where the unit is on at ALIVE tokens or more, `precision` of them the concept's; a concept is predicted wherever one
    of its units is on. Micro-F1 on test at the level that is best on fit. 10 s."""
    keep, top_F = testable_concepts(fit), largest_value(fit)
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
        return Dense(gelu(gpt.h[layer].mlp.c_fc(x_ND)),
                     torch.as_tensor(labels_RTK)[:, 1:].flatten(0, 1).to(y_ND.device)), y_ND
    (a, y_ND), (b, y2_ND) = inside(*fit), inside(*test)
    if not len(keep := testable_concepts(a)):
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

# ---------------------------------------------------------------------------------------------------- all of it
def summary(m, gpt, fit, test, parents, gen, tau=0., n=1000):
    """A flat dict of all of the above. fit, test: (rows, labels); parents: columns of the concepts that have others
    below them, for splitting and absorption. The same of baselines.py are these numbers' nulls; a key that is
    missing or None would mean nothing here: so does absorption where all of y is written twice, by each matrix of
    components. Two minutes on two cores."""
    (layer,), (a, b) = m.layers, split_by_sign(record(m, gpt, *fit, tau), record(m, gpt, *test, tau))
    keep, top_F, alive_F = testable_concepts(a), largest_value(a), a.on() >= ALIVE
    if not alive_F.any():
        return dict(units=a.F, halved=0, alive_curve=alive(a, top_F))
    c_FJD = contributions(m, a)
    write_FD, n_alive = write_directions(c_FJD), int(alive_F.sum())
    out = dict(units=a.F, halved=a.F - len(m.params_F), alive_curve=alive(a, top_F), fragmentation=fragmentation(a),
               effective_rank=effective_rank(c_FJD)[alive_F].nanmean().item(),
               meta_excess=meta_dictionary(write_FD[alive_F], gen, n_alive // 16)["excess"] if n_alive > 64 else None)
    if len(keep):
        out |= dict(coverage=coverage(a, b)["coverage"], board=concepts_from_precise_units(a, b))
        out |= {f"units_{kind}": share for kind, share in one_concept(a, b).items()}
        out |= {f"probe_auroc_{k}": v.mean().item() for k, v in probes(a, b, keep, gen, n=n)["auroc"].items()}
    if len(parents := parents[torch.isin(parents, keep)]):
        y_ND, y2_ND = (gpt.h[layer].mlp(v.x_ND) for v in (a, b))
        known = dense_probes(y_ND, y2_ND, a.label_NK, b.label_NK, parents, gen, n)
        split = splits(a, b, parents, gen, n)
        absorbed = absorption(m, b, y2_ND, known["w"], write_FD, split, parents, gen)
        sure = known["f1"] > 0.6                                # what y does not know can't be absorbed
        out |= dict(splits=split["n"].float().mean().item(), parent_f1=split["f1"].mean().item())
        enough = out["parent_f1"] >= 0.6 and sure.sum() >= 5 and m.kind != "component"
        out |= {f"absorption_{k}": v[sure].nanmean().item() if enough else None for k, v in absorbed.items()}
    return out
