"""Stability: whether training again with another seed finds the same units, matched as matching.py does it.

S seeds, F units of a decomposition, P matched pairs, R rows of tokens, D residual width
"""
import itertools
import math

import torch

from evals import ALIVE, clean
from metrics import recording
from metrics.matching import (AROUND, SHARED, activation_matches, matched_by_one_side, blocks, jaccard, null_blocks, shifted,
                              weight_matches, with_inputs)

def mean(values):
    """Of those that are numbers; None if none is."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return sum(values) / len(values) if values else None

def total_written(m, a):
    """How much each unit of a recording writes in all: its mean |contribution| where it is on, times how often."""
    if not len(a.unit_E):
        return torch.zeros(a.F, device=a.x_ND.device)
    return recording.contributions(m, a).norm(dim=-1).nanmean(1).nan_to_num() * a.on()

def agreement(pairs, on_SF, weight_SF):
    """What Matches say. pairs: {(s, t): Matches of s's units with t's}, all s != t; on_SF: tokens at which each unit of
    each seed is on; weight_SF: how much it writes. Means over seeds and their others; every share is of a seed's alive
    units, so that a unit without a mate counts as not found:
      similarity         mean S of matched pairs               similarity_alive   of alive units, 0 without a mate
      similarity_shared  of the shared pairs alone             shared_0.5, 0.7, 0.9  share of units in shared pairs
      shared_rate1 .. 4  of the quarters of the units by how often they are on, rarest first
      shared_written     of units weighted by what they write  survival_j         shared with j or more of the others"""
    seeds, rows, hits = range(len(on_SF)), {}, [torch.zeros_like(on_F) for on_F in on_SF]
    for (s, t), found in pairs.items():
        alive = on_SF[s] >= ALIVE
        n, order = int(alive.sum()), on_SF[s].masked_fill(~alive, -1).argsort(descending=True, stable=True)
        shared = {least: torch.zeros_like(alive).index_fill(0, found.one_P[found.least_P >= least], True)
                  for least in AROUND}
        is_, value_P = shared[SHARED], found.value_P.double()
        hits[s] += is_
        row = dict(similarity=value_P.mean().item(), similarity_alive=value_P.sum().item() / n if n else None,
                   similarity_shared=value_P[found.least_P >= SHARED].mean().item())
        row |= {f"shared_{least}": v[alive].double().mean().item() for least, v in shared.items()}
        row |= {f"shared_rate{4 - q}": is_[quarter].double().mean().item()
                for q, quarter in enumerate(order[:n].tensor_split(4))}
        row["shared_written"] = (weight_SF[s] * is_).sum().item() / max(weight_SF[s][alive].sum().item(), 1e-12)
        rows[s, t] = row
    out = {key: mean(row[key] for row in rows.values()) for key in rows[0, 1]}
    for j in range(1, len(seeds)):
        out[f"survival_{j}"] = mean((hits[s] >= j)[on_SF[s] >= ALIVE].double().mean().item() for s in seeds)
    return out

def over_seeds(measure, S):
    """measure(seeds) -> {key: number} for all S seeds; from three on also KEY_se, the jackknife's standard error, which
    leaves out one seed at a time, since pairs with a seed in common are not independent. (None of nulls, nor of
    survival_j, which means something else with fewer seeds.)"""
    out = measure(range(S))
    if S > 2:
        without = [measure([t for t in range(S) if t != s]) for s in range(S)]
        for key in [k for k in out if not k.startswith(("survival", "null"))]:
            values = [row.get(key) for row in without]
            if None not in values:
                out[f"{key}_se"] = ((S - 1) / S * sum((v - sum(values) / S)**2 for v in values))**0.5
    return out

def with_null(pairs, nulls, on_SF, weight_SF):
    """`told` of pairs; of null pairs, as null_KEY; and similarity_corrected = (similarity - null) / (1 - null)."""
    def measure(seeds):
        new = {s: i for i, s in enumerate(seeds)}
        real, null = (agreement({(new[s], new[t]): v for (s, t), v in some.items() if s in new and t in new},
                           [on_SF[s] for s in seeds], [weight_SF[s] for s in seeds]) for some in (pairs, nulls))
        if real["similarity"] is not None and null["similarity"] < 1:
            real["similarity_corrected"] = (real["similarity"] - null["similarity"]) / (1 - null["similarity"])
        return real | {f"null_{key}": v for key, v in null.items()}
    return over_seeds(measure, len(on_SF))

def over_pairs(table, S):
    """{key: {(s, t): number}} meaned over pairs of seeds."""
    return over_seeds(lambda seeds: {key: mean(v for pair, v in row.items() if {*pair} <= {*seeds})
                                     for key, row in table.items()}, S)

@torch.no_grad()
def function_agreement(ms, gpt, rows_RT, batch=16):
    """Seeds can agree on y_hat and differ in units. One pass per seed:
      fve              1 - E|y_hat_A - y_hat_B|^2 / E|y_hat_A - E y_hat_A|^2
      fve_independent  the same if both had made their own errors independently: what being good at y alone gives
      error_cosine     E e_A . e_B / (|e_A| |e_B|), e = y - y_hat: null 0; 1 where seeds fail alike"""
    (layer,), S, n, gram, total = ms[0].layers, len(ms), 0, 0, 0
    for idx in rows_RT.split(batch):
        pairs = [clean(m, gpt, idx, layer) for m in ms]
        y = [m.decode(layer, f_BTF, x_BTD) for m, (x_BTD, f_BTF) in zip(ms, pairs)] + [gpt.mlp(layer)(pairs[0][0])]
        y_SND = torch.stack(y)[:, :, 1:].flatten(1, 2).double()
        gram, total = gram + torch.einsum("snd,tnd->st", y_SND, y_SND), total + y_SND.sum(1)
        n += y_SND.shape[1]
    apart = gram.diagonal().unsqueeze(1) + gram.diagonal() - 2 * gram           # |a - b|^2, the last one is y
    spread, error = gram.diagonal() - total.square().sum(1) / n, apart[:S, S]
    spread = torch.where(spread > 1e-9 * gram.diagonal(), spread, math.nan)     # nothing is said of a constant
    dot = (error.unsqueeze(1) + error - apart[:S, :S]) / 2
    tables = dict(fve=1 - apart[:S, :S] / spread[:S].unsqueeze(1),
                  fve_independent=1 - (error.unsqueeze(1) + error) / spread[:S].unsqueeze(1),
                  error_cosine=dot / (error.unsqueeze(1) * error).sqrt().clamp(min=1e-12))
    return over_pairs({key: {(s, t): table[s, t].item() for s, t in itertools.permutations(range(S), 2)}
                       for key, table in tables.items()}, S)

@torch.no_grad()
def stability(ms, gpt, fit_RT, rows_RT, gen, tau=0.):
    """A flat dict of all of the above for two or more seeds of one method at one MLP; a unit is on where f > tau. Which
    units are alive, and how often they are on, is told on fit_RT, all else on rows_RT.
      weights_.., inputs_.., activations_..   `with_null`; of one of several blocks alone: weights_in_..
      weights_most, .._writes, .._same_mate   `alone`; likewise inputs_..
      activations_jaccard_0.5         share of alive units with a mate that is on at the same tokens, Jaccard >= 0.5
      activations_shared_if_weights   of the units shared in weights, those shared in activations with the same mate: to
                                      be read beside activations_shared_0.7, which is of all alive units
      function_..                     `function_agreement`
    and null_KEY, from three seeds on KEY_se. 1,024 units, 50,000 tokens: 20 s for two seeds, 42 s for three."""
    (R, T), found, extra = rows_RT.shape, {}, {}
    record = lambda m, rows_RT: recording.record(m, gpt, rows_RT, rows_RT.new_zeros(*rows_RT.shape, 0), tau)
    seen, every = [record(m, rows_RT) for m in ms], [with_inputs(blocks(m), m, gpt, fit_RT) for m in ms]
    on_SF = [record(m, fit_RT).on() for m in ms]
    weight_SF = [total_written(m, a) for m, a in zip(ms, seen)]
    alive_only = lambda Bs, on_F: [b.where((on_F >= ALIVE)[b.unit_n]) for b in Bs]

    for s, t in itertools.combinations(range(len(ms)), 2):
        As, a, n_alive = alive_only(every[s], on_SF[s]), seen[s], [(on_SF[k] >= ALIVE).sum().item() for k in (s, t)]
        later = shifted(seen[t], int(torch.randint(1, R, (1,), generator=gen)) * (T - 1))
        shared_w = weight_matches(As, alive_only(every[t], on_SF[t])).pairs(SHARED)
        for null, Bs, b in (("", every[t], seen[t]), ("null_", null_blocks(every[t], gen), later)):
            Bs = alive_only(Bs, on_SF[t])
            by_a = activation_matches(a, b, *([c.unit_n for c in Cs] for Cs in (As, Bs)))
            spaces = dict(weights=(As, Bs), inputs=[[c.over_inputs() for c in Cs] for Cs in (As, Bs)])
            by = {space: weight_matches(*both) for space, both in spaces.items()} | dict(activations=by_a)
            for space, matches in by.items():
                found.setdefault(null + space, {}).update({(s, t): matches, (t, s): matches.back()})
            alike = (jaccard(a, b, by_a) >= 0.5).sum().item()
            again = len(shared_w & by_a.pairs(SHARED))
            row = {f"{space}_{key}": v for space, both in spaces.items() for key, v in matched_by_one_side(*both).items()} | {
                "activations_jaccard_0.5": mean(alike / n if n else None for n in n_alive),
                "activations_shared_if_weights": again / len(shared_w) if shared_w else None}
            for key, v in row.items():
                extra.setdefault(null + key, {})[s, t] = v
    out = over_pairs(extra, len(ms))
    parts = [None] + every[0] * (len(every[0]) > 1)
    for space, block in itertools.product(("weights", "inputs", "activations"), parts):
        unit_n = torch.arange(seen[0].F, device=rows_RT.device) if block is None else block.unit_n
        some = [{key: v.within(unit_n) for key, v in found[null + space].items()} for null in ("", "null_")]
        ons = [torch.zeros_like(on_F).index_put((unit_n,), on_F[unit_n]) for on_F in on_SF]
        name = space if block is None else f"{space}_{block.name}"
        for key, v in with_null(*some, ons, weight_SF).items():
            plain = key.removeprefix("null_")
            out[f"null_{name}_{plain}" if plain != key else f"{name}_{key}"] = v
    return out | {f"function_{key}": v for key, v in function_agreement(ms, gpt, rows_RT).items()}
