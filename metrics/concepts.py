"""What do the units of one decomposition mean? They are held against concepts with a known truth.

    coverage, concepts_from_precise_units   does a concept have a unit that is on where it is true?
    alive                                   how many units are there, by any rule?
    probes, probe_yardsticks                how well do a few units together tell a concept?
    splits, absorption                      is one concept shared out over several units?
    summary, measure                        all of these and metrics/atoms.py, for the table

All functions are pure. fit and test are recordings (metrics/recording.py); `summary` and
`probe_yardsticks` take (rows, labels). Everything that is chosen (thresholds, units, probes) is
chosen on fit and scored on test.

N tokens (position 0 of each row left out), E entries (one per token and unit that is on there),
F units, K concepts, D residual width, U some of the units, Q levels of activation, J probe inputs.
Costs are for two cores, 50,000 tokens, L0 16.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as nnf

from data import over_rows
from evals import ALIVE, f1_scores
from metrics import columns
from metrics.atoms import effective_rank, fragmentation, meta_dictionary, one_concept
from metrics.columns import Column
from metrics.recording import (Dense, contributions, record_by_sign, testable_concepts,
                               write_directions)
from tinytales.concepts import HIERARCHY

LEVELS = 10             # a unit is on at level l where it exceeds l / LEVELS of its largest value
PROBES_AT_ONCE = 16     # dense probes fitted together: bounds the memory
MAIN_COSINE = 0.025     # absorption: least cosine with the concept of the unit that says most
OTHER_COSINE = 0.1      # absorption: least cosine of a unit that may stand in for a concept's own
KNOWN_F1 = 0.6          # a concept that a probe finds less well says nothing about absorption
KNOWN_PARENTS = 5       # fewer concepts than this make no average of absorption


# ----------------------------------------------------------------------------- levels of activation
def largest_value(fit):
    """How large does each unit's value get on fit? (F), 0 for one that is never on."""
    zeros_F = torch.zeros(fit.F, device=fit.value_E.device)
    return zeros_F.scatter_reduce_(0, fit.unit_E, fit.value_E, "amax")


def highest_level(recording, top_F):
    """Up to which level is each entry on? The highest l with value > l / LEVELS * top, (E)."""
    share_E = recording.value_E * LEVELS / top_F[recording.unit_E]
    return (share_E.ceil().long() - 1).clamp(0, LEVELS - 1)


def sum_upwards(highest_FQ):
    """At how many tokens is each unit on at each level? What is on up to level 7 is on at levels 0
    to 7.

    highest_FQ (F, Q, ..): at how many tokens each level is the highest one. Returns (Q, F, ..).
    """
    return highest_FQ.flip(1).cumsum(1).flip(1).transpose(0, 1)


def level_counts(recording, top_F):
    """At how many tokens is each unit on at each level, and at how many is a concept true as well?

    Returns on (Q, F) and both (Q, F, K).
    """
    # Sort the entries by (unit, highest level), and treat each pair as a unit of its own.
    group_E = recording.unit_E * LEVELS + highest_level(recording, top_F)
    order_E = group_E.argsort(stable=True)
    by_level = replace(recording, unit_E=group_E[order_E], token_E=recording.token_E[order_E],
                       origin_F=torch.arange(recording.F * LEVELS))

    # Count the tokens of each, and add those of the higher levels.
    on_FQ = by_level.on().view(recording.F, LEVELS)
    both_FQK = by_level.sums(recording.label_NK.float()).view(recording.F, LEVELS, -1)
    return sum_upwards(on_FQ), sum_upwards(both_FQK)


def coverage(fit, test):
    """How well does the best unit for each concept detect it? The coverage of Karvonen et al. 2024,
    arXiv:2408.00113.

    A unit that is on at some level detects a concept with some F1. On fit, each concept takes its
    best unit, and all concepts take the one level at which the mean F1 is largest. The number is
    the mean F1 of these units over the testable concepts of test: 0 to 1, higher is better.
    Returns {"coverage", "f1_K", "unit_K", "level", "concepts"}. 3 s.
    """
    concepts = testable_concepts(fit)
    top_F = largest_value(fit)

    # Choose the level, and one unit for each concept, on fit.
    on_QF, both_QFK = level_counts(fit, top_F)
    f1_QFK = f1_scores(on_QF.unsqueeze(-1), fit.label_NK.sum(0), both_QFK)[..., concepts]
    level = f1_QFK.amax(1).mean(1).argmax()
    unit_K = f1_QFK[level].argmax(0)

    # Score them on test.
    on_QF, both_QFK = level_counts(test, top_F)
    label_K = test.label_NK.sum(0)[concepts]
    f1_K = f1_scores(on_QF[level, unit_K], label_K, both_QFK[level, unit_K, concepts])
    return dict(coverage=f1_K.mean().item(), f1_K=f1_K, unit_K=unit_K, level=level.item(),
                concepts=concepts)


def concepts_from_precise_units(fit, test, precision=0.95):
    """How well do units that are nearly always right when they are on tell all the concepts? The
    board reconstruction of Karvonen et al. 2024, arXiv:2408.00113.

    A unit is precise for a concept at a level if it is on at that level at ALIVE tokens of fit or
    more, and if the concept is true at a share `precision` of these tokens. A concept is predicted
    at a token if one of its precise units is on. The number is the F1 over all pairs (token,
    concept) of test, at the level that is best on fit: 0 to 1, higher is better. 10 s.
    """
    concepts = testable_concepts(fit)
    top_F = largest_value(fit)

    # Which units are precise for which concepts?
    on_QF, both_QFK = level_counts(fit, top_F)
    is_precise_QFK = both_QFK[..., concepts] >= precision * on_QF.unsqueeze(-1)
    is_precise_QFK &= (on_QF >= ALIVE).unsqueeze(-1)

    # Choose the level on fit, score it on test.
    f1_on_fit = [micro_f1(fit, top_F, level, is_precise_QFK[level], concepts)
                 for level in range(LEVELS)]
    level = f1_on_fit.index(max(f1_on_fit))
    return micro_f1(test, top_F, level, is_precise_QFK[level], concepts)


def micro_f1(recording, top_F, level, is_precise_FK, concepts):
    """How well do precise units predict the concepts? F1 over all pairs (token, concept).

    is_precise_FK: which units predict which of `concepts` when they are on at `level`.
    """
    # votes_NK = is_on_NF @ is_precise_FK, from the entries sorted by token.
    order_E = recording.token_E.argsort(stable=True)
    token_E = recording.token_E[order_E]
    start_N = torch.searchsorted(token_E, torch.arange(recording.N, device=token_E.device))
    is_on_E = highest_level(recording, top_F)[order_E] >= level
    votes_NK = nnf.embedding_bag(recording.unit_E[order_E], is_precise_FK.float(), start_N,
                                 mode="sum", per_sample_weights=is_on_E.float())

    predicted_NK = votes_NK > 0
    true_NK = recording.label_NK[:, concepts]
    hits = (predicted_NK & true_NK).sum()
    return f1_scores(predicted_NK.sum(), true_NK.sum(), hits).item()


def alive(recording, top_F, counts=(1, ALIVE, 100, 1000)):
    """How many units are alive, under each of many rules? No single threshold decides.

    Returns {level as a share of the largest value: [units that are on at that level at that many
    tokens or more, for each of counts]}.
    """
    group_E = recording.unit_E * LEVELS + highest_level(recording, top_F)
    n_tokens = torch.bincount(group_E, minlength=recording.F * LEVELS)
    on_QF = sum_upwards(n_tokens.view(recording.F, LEVELS))
    curve = {}
    for level, on_F in enumerate(on_QF):
        curve[level / LEVELS] = [(on_F >= count).sum().item() for count in counts]
    return curve


# ------------------------------------------------------------------------------------------- probes
def draw_tokens(label_NK, n, gen):
    """Draw the tokens that each concept's probe is fitted or scored on: (K, 2 n), with repetition.

    n at which the concept is true, then n at which it is not: truth_of_draw has their labels.
    """
    halves = []
    for label_N in label_NK.T:
        for is_candidate_N in (label_N, ~label_N):
            candidates = is_candidate_N.nonzero().squeeze(1)
            picks = torch.randint(len(candidates), (n,), generator=gen)
            halves.append(candidates[picks.to(candidates.device)])
    return torch.stack(halves).view(-1, 2 * n)


def truth_of_draw(n, device):
    """Is the concept true at each of draw_tokens' 2 n tokens? The first n: 1, the last n: 0."""
    return (torch.arange(2 * n, device=device) < n).float()


def values_of(recording, units_KU, tokens_KN):
    """What are the values of each concept's units at each concept's tokens? (K, N, U)"""
    return recording.at(units_KU.unsqueeze(1), tokens_KN.unsqueeze(2))


def d_prime(recording):
    """How far apart are a unit's values where a concept is true and where it is not? (F, K)

    d' = (mean where true - mean where false) / sqrt((variance where true + where false) / 2).
    """
    true_FK, false_FK, true2_FK, false2_FK = recording.moments()
    spread_FK = (true2_FK - true_FK**2 + false2_FK - false_FK**2).clamp(min=0) / 2
    return (true_FK - false_FK) / (spread_FK + 1e-12).sqrt()


def standardise(X_KNJ):
    """Shift and scale each input to mean 0 and variance 1 over the tokens: (X, mean, std)."""
    mean_K1J = X_KNJ.mean(1, keepdim=True)
    std_K1J = X_KNJ.std(1, keepdim=True).clamp(min=1e-6)
    return (X_KNJ - mean_K1J) / std_K1J, mean_K1J, std_K1J


def logistic(X_KNJ, truth_N, l2=1., steps=12):
    """Fit K logistic regressions by Newton's method: (K, J + 1), weights and then the bias.

    Each minimises  sum over tokens of the log-loss + l2 |w|^2 / 2  with w on standardised inputs.
    The weights that are returned are for the inputs as they are: logit = X w + bias (`apply`).
    """
    standard_KNJ, mean_K1J, std_K1J = standardise(X_KNJ)
    X_KNJ1 = torch.cat([standard_KNJ, torch.ones_like(X_KNJ[..., :1])], -1)

    # The bias is not penalised, but for a trace that keeps the Hessian invertible.
    ridge_J1 = X_KNJ1.new_tensor([l2] * X_KNJ.shape[-1] + [1e-6])
    w_KJ1 = X_KNJ1.new_zeros(len(X_KNJ1), X_KNJ1.shape[-1])
    for _ in range(steps):
        p_KN = torch.einsum("knj,kj->kn", X_KNJ1, w_KJ1).sigmoid()
        slope_KJ1 = torch.einsum("kn,knj->kj", p_KN - truth_N, X_KNJ1) + ridge_J1 * w_KJ1
        curvature_KN = p_KN * (1 - p_KN) + 1e-6
        hessian = torch.einsum("kn,knj,kni->kji", curvature_KN, X_KNJ1, X_KNJ1)
        hessian = hessian + torch.diag(ridge_J1)
        # Where classes are separable a full Newton step leaps too far: no weight moves by over 4.
        w_KJ1 = w_KJ1 - torch.linalg.solve(hessian, slope_KJ1).clamp(-4, 4)

    # w (x - mean) / std + bias = (w / std) x + (bias - (w / std) mean)
    w_KJ = w_KJ1[:, :-1] / std_K1J.squeeze(1)
    shift_K1 = (w_KJ * mean_K1J.squeeze(1)).sum(-1, keepdim=True)
    return torch.cat([w_KJ, w_KJ1[:, -1:] - shift_K1], -1)


def apply(w_KJ1, X_KNJ):
    """What logit does each regression give each token? (K, N)"""
    return torch.einsum("knj,kj->kn", X_KNJ, w_KJ1[:, :-1]) + w_KJ1[:, -1:]


def average_ranks(score_KN):
    """Which place does each score take in its row, from 1, the lowest? (K, N), double; equal scores
    share the mean of their ranks."""
    score_KN = score_KN.contiguous()
    sorted_KN = score_KN.sort(-1).values.contiguous()
    n_lower_KN = torch.searchsorted(sorted_KN, score_KN)
    n_upto_KN = torch.searchsorted(sorted_KN, score_KN, right=True)
    return (n_lower_KN + n_upto_KN + 1).double() / 2


def auroc(score_KN, is_true):
    """How likely does a token where a concept is true score higher than one where it is not? (K)

    The area under the ROC curve; ties count half. 0.5 = chance, 1 = each true token scores higher
    than each false one; NaN without tokens of both kinds. is_true: (N), or (K, N), one per score.
    """
    rank_KN = average_ranks(score_KN)

    # Pairs (true, false) that the true token wins: its ranks' sum, less what n_true tokens would
    # have among themselves (Mann and Whitney 1947). In float64, sums of ranks are exact.
    is_true_KN = is_true.expand_as(score_KN).double()
    n_true_K = is_true_KN.sum(-1)
    n_false_K = (1 - is_true_KN).sum(-1)
    n_won_K = (rank_KN * is_true_KN).sum(-1) - n_true_K * (n_true_K + 1) / 2
    return n_won_K / n_true_K / n_false_K


def balanced_f1(score_KN):
    """How well does "score > 0" tell the first half of the tokens from the second? F1, (K)."""
    true, false = (score_KN > 0).chunk(2, -1)
    hits = true.sum(-1)
    return f1_scores(hits + false.sum(-1), true.shape[-1], hits)


def fit_and_score(X_fit, X_test, truth_N):
    """What scores does a probe that is fitted on X_fit give X_test? Both (K, N, J) -> (K, N)."""
    return apply(logistic(X_fit, truth_N), X_test)


def probes(fit, test, concepts, gen, ks=(1, 2, 5), n=1000):
    """How well do k units together tell a concept? Sparse probing, Gurnee et al. 2023,
    arXiv:2305.01610.

    A logistic regression on the k units of largest |d'|, chosen and fitted on n tokens with the
    concept and n without it, scored by AUROC: 0.5 = chance, 1 = perfect. The number to print is its
    difference from a probe on as many neurons (`probe_yardsticks`). fit, test: Active or Dense.
    Returns {"auroc": {k: (K)}, "units": (K, max k)}. 5 s.
    """
    units_KU = d_prime(fit)[:, concepts].abs().topk(max(ks), 0).indices.T
    truth_N = truth_of_draw(n, units_KU.device)
    X_fit = values_of(fit, units_KU, draw_tokens(fit.label_NK[:, concepts], n, gen))
    X_test = values_of(test, units_KU, draw_tokens(test.label_NK[:, concepts], n, gen))

    auroc_of_k = {}
    for k in ks:
        score_KN = fit_and_score(X_fit[..., :k], X_test[..., :k], truth_N)
        auroc_of_k[k] = auroc(score_KN, truth_N)
    return dict(units=units_KU, auroc=auroc_of_k)


def dense_probes(y_fit_ND, y_test_ND, label_fit_NK, label_test_NK, concepts, gen, n=1000):
    """How well do all D dimensions of y tell a concept? The ceiling of `probes`.

    Returns {"auroc": (K), "f1": (K), "w": (K, D + 1), the bias last}. 20 s, once per layer.
    """
    truth_N = truth_of_draw(n, y_fit_ND.device)
    parts = {"auroc": [], "f1": [], "w": []}
    for chunk in concepts.split(PROBES_AT_ONCE):
        w_KD1 = logistic(y_fit_ND[draw_tokens(label_fit_NK[:, chunk], n, gen)], truth_N)
        score_KN = apply(w_KD1, y_test_ND[draw_tokens(label_test_NK[:, chunk], n, gen)])
        parts["auroc"].append(auroc(score_KN, truth_N))
        parts["f1"].append(balanced_f1(score_KN))
        parts["w"].append(w_KD1)
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def neurons_and_output(gpt, layer, rows_RT, labels_RTK):
    """What do an MLP's neurons and its output say at each token? (Dense of act(z), y_ND)"""
    (x_ND,), (y_ND,) = over_rows(gpt, rows_RT, [layer])
    label_NK = torch.as_tensor(labels_RTK)[:, 1:].flatten(0, 1).to(y_ND.device)
    mlp = gpt.mlp(layer)
    act_NM = mlp.act(mlp.c_fc(x_ND))
    return Dense(act_NM, label_NK), y_ND


@torch.no_grad()
def probe_yardsticks(gpt, layer, fit, test, gen, n=1000):
    """How well do probes do without any decomposition? What a method's `probes` are held against.

    null_probe_auroc_k: on k plain neurons, act(z) at every token; probe_dense: on all of y. They
    depend on the MLP alone, not on the decomposition. fit, test: (rows, labels). 30 s.
    """
    neurons_fit, y_fit_ND = neurons_and_output(gpt, layer, *fit)
    neurons_test, y_test_ND = neurons_and_output(gpt, layer, *test)
    concepts = testable_concepts(neurons_fit)
    if not len(concepts):
        return {}
    dense = dense_probes(y_fit_ND, y_test_ND, neurons_fit.label_NK, neurons_test.label_NK, concepts,
                         gen, n)
    sparse = probes(neurons_fit, neurons_test, concepts, gen, n=n)
    out = dict(probe_dense=dense["auroc"].mean().item())
    for k, auroc_K in sparse["auroc"].items():
        out[f"null_probe_auroc_{k}"] = auroc_K.mean().item()
    return out


# ------------------------------------------------------------------------- splitting and absorption
def lasso(X_KNJ, truth_N, l1=0.01, steps=100):
    """Which inputs does a sparse probe use? Weights (K, J) of K logistic regressions with an L1
    penalty, which leaves most weights at 0.

    Each minimises  mean log-loss + l1 |w|_1  on standardised inputs, without a bias, by accelerated
    proximal steps (FISTA, Beck and Teboulle 2009).
    """
    X, _, _ = standardise(X_KNJ)
    N = X.shape[1]
    # Step size: 1 / the largest curvature, which for a log-loss is at most |X^T X / N| / 4.
    rate_K1 = 4 / torch.linalg.matrix_norm(X.mT @ X / N, 2).view(-1, 1)
    w_KJ = X.new_zeros(len(X), X.shape[-1])
    ahead_KJ = w_KJ
    for step in range(steps):
        # Step down the log-loss, from a point ahead of w ...
        p_KN = torch.einsum("knj,kj->kn", X, ahead_KJ).sigmoid()
        new_KJ = ahead_KJ - rate_K1 * torch.einsum("kn,knj->kj", p_KN - truth_N, X) / N
        # ... then shrink towards 0, which is the L1 penalty's exact step.
        new_KJ = new_KJ.sign() * (new_KJ.abs() - rate_K1 * l1).clamp(min=0)
        ahead_KJ = new_KJ + step / (step + 3) * (new_KJ - w_KJ)
        w_KJ = new_KJ
    return w_KJ


def splits(fit, test, concepts, gen, n=1000, most=10, jump=0.03):
    """Over how many units is a concept split? Chanin et al. 2024, arXiv:2409.14507.

    Probes read the k = 1, 2, .. units of largest positive weight in an L1 probe. A concept's number
    is the last k whose F1 beats the F1 of k - 1 units by `jump`; counting stops at the first k that
    does not. 1 = one unit does it all; lower is better.
    Returns {"n": (K), "f1": (K) of the probe on one unit, without which n says nothing, "units":
    (K, most), best first}. 20 s.
    """
    # Candidates: the units that are most larger where the concept is true.
    candidates_KU = d_prime(fit)[:, concepts].topk(min(32, fit.F), 0).indices.T
    truth_N = truth_of_draw(n, candidates_KU.device)
    tokens_fit_KN = draw_tokens(fit.label_NK[:, concepts], n, gen)
    tokens_test_KN = draw_tokens(test.label_NK[:, concepts], n, gen)

    # The L1 probe puts them in order.
    w_KU = lasso(values_of(fit, candidates_KU, tokens_fit_KN), truth_N)
    order_KU = w_KU.topk(min(most, w_KU.shape[1]), 1).indices
    units_KU = candidates_KU.gather(1, order_KU)

    # F1 of a probe on the first k, for every k.
    X_fit = values_of(fit, units_KU, tokens_fit_KN)
    X_test = values_of(test, units_KU, tokens_test_KN)
    f1_of_k = [balanced_f1(fit_and_score(X_fit[..., :k], X_test[..., :k], truth_N))
               for k in range(1, units_KU.shape[1] + 1)]

    # Go on while one more unit helps.
    best_K = f1_of_k[0]
    n_K = torch.ones_like(units_KU[:, 0])
    is_going_K = torch.ones_like(n_K, dtype=torch.bool)
    for k, f1_K in enumerate(f1_of_k[1:], 2):
        is_going_K = is_going_K & (f1_K > best_K + jump)
        n_K = torch.where(is_going_K, k, n_K)
        best_K = torch.where(is_going_K, f1_K, best_K)
    return dict(n=n_K, f1=f1_of_k[0], units=units_KU)


@torch.no_grad()
def absorption(m, test, y_ND, w_KD1, write_FD, split, concepts, gen, n=100, share=0.4):
    """Do other units stand in for a concept's own? Absorption, Chanin et al. 2024,
    arXiv:2409.14507, but with each unit's exact contribution in place of its activation times a
    cosine.

    w_KD1: dense probes on y; split: `splits` of these concepts, whose first n units are a concept's
    own, its main units. It is measured at up to n tokens where the concept is true and its probe
    finds it. With w_hat the probe's direction, pi_u = contrib_u . w_hat, pi = y . w_hat > 0:

    full      the share of tokens where no main unit is on and the unit of the largest pi_u has a
              cosine of MAIN_COSINE or more with w_hat, and pi_u >= share pi
    fraction  the mean of A / (A + main pi), A = the sum of the 3 largest pi_u > 0 of units that are
              not main and have a cosine of OTHER_COSINE or more, at most pi - main pi;
              0 if that sum is under share pi or main pi >= pi; 1 if main pi <= 0

    Returns {"full": (K), "fraction": (K)}, 0 to 1, lower is better; NaN without such a token.
    Random units score low: print the F1 of the probe on one unit beside these numbers, and none of
    them where that F1 is under KNOWN_F1. 0.3 s per concept.
    """
    full = []
    fraction = []
    for k, concept in enumerate(concepts.tolist()):
        w_D1 = w_KD1[k]
        direction_D = nnf.normalize(w_D1[:-1], dim=0)

        # Tokens where the concept is true and the probe finds it.
        is_found_N = test.label_NK[:, concept] & (y_ND @ w_D1[:-1] + w_D1[-1] > 0)
        is_found_N &= y_ND @ direction_D > 0
        tokens = is_found_N.nonzero().squeeze(1)
        picks = torch.randperm(len(tokens), generator=gen)[:n]
        tokens = tokens[picks.to(tokens.device)]
        if not len(tokens):
            full.append(math.nan)
            fraction.append(math.nan)
            continue

        own = split["units"][k, :split["n"][k]]
        is_main_F = torch.isin(torch.arange(test.F, device=tokens.device), own)
        pi_N = y_ND[tokens] @ direction_D
        pi_NF, is_on_NF = projections(m, test, tokens, direction_D)
        main_N = (pi_NF * is_main_F).sum(1)
        cosine_F = write_FD @ direction_D
        full_N = is_absorbed(pi_NF, pi_N, is_on_NF, is_main_F, cosine_F, share)
        others_N = sum_of_others(pi_NF, is_main_F, cosine_F)
        full.append(full_N.float().mean().item())
        fraction.append(absorbed_fraction(others_N, main_N, pi_N, share).mean().item())
    return dict(full=torch.tensor(full, device=y_ND.device),
                fraction=torch.tensor(fraction, device=y_ND.device))


def projections(m, recording, tokens, direction_D):
    """How far does each unit push y along a direction at some tokens? (pi_NF, is_on_NF)"""
    f_1NF = recording.f_at(tokens)
    x_1ND = recording.x_ND[tokens].unsqueeze(0)
    contrib_NFD = m.contrib(m.layers[0], f_1NF, x_1ND, recording.origin_F)[0]
    units_F = torch.arange(recording.F, device=tokens.device)
    # The two halves of a unit that was split by sign share a contribution: it belongs to the half
    # that is on.
    is_on_NF = recording.at(units_F, tokens.unsqueeze(1)) > 0
    return (contrib_NFD @ direction_D) * is_on_NF, is_on_NF


def is_absorbed(pi_NF, pi_N, is_on_NF, is_main_F, cosine_F, share):
    """At which tokens is a concept said by another unit alone? (N), "full" of `absorption`."""
    largest = pi_NF.max(1)
    no_main_N = ~is_on_NF[:, is_main_F].any(1)
    is_along_N = cosine_F[largest.indices] >= MAIN_COSINE
    return no_main_N & is_along_N & (largest.values >= share * pi_N)


def sum_of_others(pi_NF, is_main_F, cosine_F):
    """How much of a concept do the 3 strongest units that are not its own say? (N)"""
    may_stand_in_F = ~is_main_F & (cosine_F >= OTHER_COSINE)
    other_NF = torch.where(may_stand_in_F, pi_NF, 0).clamp(min=0)
    return other_NF.topk(min(3, len(cosine_F)), 1).values.sum(1)


def absorbed_fraction(others_N, main_N, pi_N, share):
    """What share of a concept do other units say at each token? (N), "fraction" of `absorption`."""
    absorbed_N = torch.minimum(others_N, pi_N - main_N)
    fraction_N = torch.where(main_N <= 0, 1, absorbed_N / (absorbed_N + main_N))
    is_none_N = (others_N < share * pi_N) | (main_N >= pi_N)
    return torch.where(is_none_N, 0, fraction_N)


# -------------------------------------------------------------------------------------- all of them
def summary(m, gpt, fit, test, parents, gen, tau=0., n=1000):
    """What do the units of one decomposition mean? The numbers of this file and of metrics/atoms.py
    as a flat dict.

    fit, test: (rows, labels); parents: columns of the concepts that have others below them, for
    splitting and absorption. A number is held against that of the floors in baselines.py. A key is
    missing or None where its number would mean nothing. Two minutes on two cores.
    """
    # Where is each unit on? A unit with two signs says two things, and counts as two units.
    fit, test = record_by_sign(m, gpt, fit, test, tau)
    concepts = testable_concepts(fit)
    alive_curve = alive(fit, largest_value(fit))
    is_alive_F = fit.on() >= ALIVE
    if not is_alive_F.any():
        return dict(units=fit.F, halved=0, alive_curve=alive_curve)

    # What do they write, and what do they say about the concepts?
    c_FJD = contributions(m, fit)
    write_FD = write_directions(c_FJD)
    out = dict(units=fit.F, halved=fit.F - len(m.params_F), alive_curve=alive_curve)
    out |= shape_numbers(fit, c_FJD, write_FD, is_alive_F, gen)
    if len(concepts):
        out |= concept_numbers(fit, test, concepts, gen, n)
    parents = parents[torch.isin(parents, concepts)]
    if len(parents):
        out |= parent_numbers(m, gpt, fit, test, write_FD, parents, gen, n)
    return out


def shape_numbers(fit, c_FJD, write_FD, is_alive_F, gen):
    """How atomic are the alive units, apart from any concept? (metrics/atoms.py)"""
    out = dict(fragmentation=fragmentation(fit))
    out["effective_rank"] = effective_rank(c_FJD)[is_alive_F].nanmean().item()
    out["meta_excess"] = None
    n_alive = int(is_alive_F.sum())
    if n_alive > 64:            # of its n_alive / 16 atoms a row takes 4: there have to be more
        meta = meta_dictionary(write_FD[is_alive_F], gen, n_alive // 16)
        out["meta_excess"] = meta["excess"]
    return out


def concept_numbers(fit, test, concepts, gen, n):
    """How well do the units tell the concepts, alone and a few together?"""
    out = dict(coverage=coverage(fit, test)["coverage"],
               board=concepts_from_precise_units(fit, test))
    for kind, share in one_concept(fit, test).items():
        out[f"units_{kind}"] = share
    for k, auroc_K in probes(fit, test, concepts, gen, n=n)["auroc"].items():
        out[f"probe_auroc_{k}"] = auroc_K.mean().item()
    return out


def parent_numbers(m, gpt, fit, test, write_FD, parents, gen, n):
    """Are concepts that have others below them split over units, or absorbed by other units?"""
    mlp = gpt.mlp(m.layers[0])
    y_fit_ND = mlp(fit.x_ND)
    y_test_ND = mlp(test.x_ND)
    dense = dense_probes(y_fit_ND, y_test_ND, fit.label_NK, test.label_NK, parents, gen, n)
    split = splits(fit, test, parents, gen, n)
    absorbed = absorption(m, test, y_test_ND, dense["w"], write_FD, split, parents, gen)
    out = dict(splits=split["n"].float().mean().item(), parent_f1=split["f1"].mean().item())

    # What y does not know cannot be absorbed; what no unit finds says nothing on absorption; and
    # components write all of y twice, once by each matrix.
    is_known_K = dense["f1"] > KNOWN_F1
    means_something = (out["parent_f1"] >= KNOWN_F1 and is_known_K.sum() >= KNOWN_PARENTS
                       and m.kind != "component")
    for name, value_K in absorbed.items():
        mean = value_K[is_known_K].nanmean().item()
        out[f"absorption_{name}"] = mean if means_something else None
    return out


COLUMNS = {
    "coverage": Column("coverage", "up", "neurons", 3, table="concepts",
                       text="F1 of the best unit for each true concept, mean"),
    "board": Column("board", "up", "neurons", 3, table="concepts",
                    text="F1 of all concepts said by units of precision 0.95"),
    "splits": Column("splits", "down", "random", 2, table="concepts",
                     text="units that a parent concept is split into; see parent F1"),
    "parent_f1": Column("parent F1", "up", "random", 3, table="concepts",
                        text="F1 of the best unit for the parent concepts"),
    "absorption_fraction": Column("absorb", "down", "random", 3, table="concepts",
                                  text="share of a parent concept's effect taken over by other "
                                       "units; n/a where it means nothing: parent F1 under 0.6, "
                                       "spd, svd"),
    "probe_auroc_1": Column("probe 1", "up", "plain neurons", 3, table="probes",
                            text="AUROC of a probe on the best unit for each concept"),
    "probe_auroc_2": Column("probe 2", "up", "plain neurons", 3, table="probes",
                            text="AUROC of a probe on the best two units for each concept"),
    "probe_auroc_5": Column("probe 5", "up", "plain neurons", 3, table="probes",
                            text="AUROC of a probe on the best five units for each concept"),
    "probe_dense": Column("dense", "", None, 3, table="probes",
                          text="AUROC of a probe on all of y for each concept: the ceiling"),
    "units_atomic": Column("atomic", "up", "neurons", 3, table="atoms",
                           text="share of the alive units that one concept explains"),
    "units_polysemantic": Column("either", "", None, 3, table="atoms",
                                 text="share of the alive units that 'a or b' explains better"),
    "units_composite": Column("both", "", None, 3, table="atoms",
                              text="share of the alive units that 'a and b' explains better"),
    "units_unexplained": Column("neither", "down", "neurons", 3, table="atoms",
                                text="share of the alive units whose best concept has F1 under "
                                     "0.5"),
    "effective_rank": Column("rank", "", None, 2, table="atoms",
                             text="directions that a unit writes; 1 by construction for "
                                  "dictionaries"),
    "fragmentation": Column("pieces", "down", None, 2, table="atoms",
                            text="units that are on at the same tokens as one; 1 is best"),
    "meta_excess": Column("meta", "down", 0, 3, table="atoms",
                          text="how far writes are sums of few atoms, in excess of Gaussian "
                               "writes"),
}


def measure(m, arena, gen):
    """What do m's units mean? The numbers of the tables concepts, probes and atoms.

    Returns (numbers, details) as metrics/columns.py has them. Two minutes on two cores.
    """
    parents = {arena.names.index(parent) for parent, _ in HIERARCHY if parent in arena.names}
    parents = torch.tensor(sorted(parents), dtype=torch.long, device=arena.fit[0].device)
    yardsticks = arena.shared(probe_yardsticks, "probes")
    numbers = summary(m, arena.gpt, arena.fit, arena.test, parents, gen)
    return columns.split(COLUMNS, numbers | yardsticks)
