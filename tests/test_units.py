"""Metrics of the units against plain loops and planted answers: identity, constant, shuffled, split, absorbed."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baselines
import common
from evals import ALIVE
from metrics import concepts, effects, recording
from metrics.atoms import effective_rank, fragmentation, meta_dictionary, one_concept
from metrics.recording import Active, Dense
from model import GPT, GPTConfig
from tinytales import concepts as truth
from tinytales.story import VOCAB, tell

N = 6000


def active(value_NF, label_NK, x_ND=None):
    """The recording of a dense matrix of values."""
    unit, token = value_NF.T.nonzero(as_tuple=True)
    value = value_NF[token, unit]
    return Active(unit, token, value, value.abs(), torch.arange(value_NF.shape[1]),
                  torch.zeros(len(value_NF), 1) if x_ND is None else x_ND, label_NK)


def random(seed, *shape):
    return torch.rand(*shape, generator=common.generator(seed, "test"))


@pytest.fixture(scope="module")
def world():
    """Labels of 12 concepts on fit and test tokens, independent, true at 2 to 24 %."""
    share = torch.linspace(0.02, 0.24, 12)
    return random(0, N, 12) < share, random(1, N, 12) < share


def noisy(label_NK, seed, hit=0.97, false=0.002):
    """Values of one unit per concept: on (0.2 to 1.2) at nearly all of its tokens, rarely elsewhere."""
    u = random(seed, *label_NK.shape)
    return torch.where(label_NK, u < hit, u < false) * (0.2 + random(seed + 1, *label_NK.shape))


@pytest.fixture(scope="module")
def planted(world):
    return [active(noisy(label, 10 * i + 2), label) for i, label in enumerate(world)]


@pytest.fixture(scope="module")
def shuffled(world):
    return [active(noisy(label, 10 * i + 2)[torch.randperm(N, generator=common.generator(i, "shuffle"))], label)
            for i, label in enumerate(world)]


def test_a_recording_answers_like_the_dense_matrix():
    value, label = (random(3, 50, 7) - 0.6).clamp(min=0), random(4, 50, 5) < 0.3
    value[:, 2] = 0
    a, d = active(value, label), Dense(value, label)
    assert torch.equal(a.on(), (value > 0).sum(0))
    units_, tokens = torch.arange(7).view(-1, 1), torch.arange(50)
    assert torch.equal(a.at(units_, tokens), value.T) and torch.equal(d.at(units_, tokens), value.T)
    assert torch.allclose(a.sums(label.float()), (value > 0).float().T @ label.float())
    for got, other in zip(a.moments(), d.moments()):
        assert torch.allclose(got, other, atol=1e-5)
    true, false, true2, false2 = a.moments()
    v, k = value[:, 3], label[:, 1]
    assert torch.allclose(torch.stack([true[3, 1], false[3, 1], true2[3, 1], false2[3, 1]]),
                          torch.stack([v[k].mean(), v[~k].mean(), v[k].square().mean(), v[~k].square().mean()]))
    assert torch.equal(a.f_at(torch.tensor([4, 40, 8]))[0], value[[4, 40, 8]])


def test_units_that_say_two_things_become_two():
    value = torch.zeros(100, 3)
    value[:50, 0], value[50:80, 0] = 1, -2
    value[:50, 1], value[50:52, 1] = 1, -2                      # 4 % of its tokens: one thing
    value[:30, 2] = -3
    a, = recording.split_by_sign(active(value, torch.zeros(100, 1).bool()))
    assert a.origin_F.tolist() == [0, 1, 2, 0] and a.on().tolist() == [50, 52, 30, 30]
    assert (a.value_E > 0).all() and a.at(torch.tensor(3), torch.arange(100)).sum() == 60
    tokens = torch.tensor([60, 10])
    assert torch.equal(a.f_at(tokens)[0], value.abs()[tokens])  # m's own units again


def test_level_counts_by_hand(planted):
    fit, test = planted
    top = concepts.largest_value(fit)
    on, both = concepts.level_counts(test, top)
    value = torch.stack([test.at(torch.tensor(f), torch.arange(N)) for f in range(test.F)], 1)
    for level in (0, 4, 9):
        want = (value * 10 > level * top) & (value > 0)
        assert (on[level] - want.sum(0)).abs().max() <= 1       # an exact tie may round either way
        assert (both[level] - want.float().T @ test.label_NK.float()).abs().max() <= 1
    assert concepts.alive(test, top)[0.4][:2] == [12, 12] and concepts.alive(test, top, counts=(10**6,))[0][0] == 0


def test_coverage_and_board_of_planted_and_of_shuffled_units(planted, shuffled):
    good, bad = concepts.coverage(*planted), concepts.coverage(*shuffled)
    assert good["coverage"] > 0.95 and good["unit_K"].tolist() == list(range(12)) and good["level"] == 0
    assert bad["coverage"] < 0.25                               # a unit on everywhere has F1 = 2 p / (1 + p), mean 0.22
    assert concepts.concepts_from_precise_units(*planted) > 0.9 and concepts.concepts_from_precise_units(*shuffled) < 0.05
    test = planted[1]                                           # chosen on fit, scored on test: by hand
    on, label = test.at(torch.arange(12).view(-1, 1), torch.arange(N)) > 0, test.label_NK.T
    assert torch.allclose(good["f1_K"], 2 * (on & label).sum(1) / (on.sum(1) + label.sum(1)))
    assert concepts.concepts_from_precise_units(planted[0], shuffled[1]) < 0.25 < 0.9 < concepts.concepts_from_precise_units(planted[0], planted[1])


def test_what_is_chosen_on_fit_is_scored_on_test(world):
    """One unit per token value, so that the best of many fits noise: on other tokens it is worth nothing."""
    fit, test = (active((random(5 + i, N, 400) < 0.1).float(), label) for i, label in enumerate(world))
    assert concepts.coverage(fit, fit)["coverage"] > concepts.coverage(fit, test)["coverage"]


def test_auroc_counts_pairs_and_ties():
    gen = common.generator(0, "auroc")
    score_KN = torch.randint(0, 4, (3, 40), generator=gen).float()
    is_true_KN = torch.rand(3, 40, generator=gen) < 0.3
    got_K = concepts.auroc(score_KN, is_true_KN)
    for k in range(3):
        true, false = score_KN[k, is_true_KN[k]], score_KN[k, ~is_true_KN[k]]
        wins = (true[:, None] > false).double() + 0.5 * (true[:, None] == false).double()
        assert got_K[k].item() == pytest.approx(wins.mean().item(), rel=1e-12)
    halves_N = torch.arange(40) < 20                            # one truth for all rows
    assert torch.equal(concepts.auroc(score_KN, halves_N), concepts.auroc(score_KN, halves_N.expand(3, 40)))
    assert concepts.auroc(score_KN, torch.ones(40)).isnan().all()


def test_logistic_is_a_minimum_and_survives_separable_data():
    X, truth = torch.randn(2, 300, 3, generator=common.generator(0, "X")) * 5 + 2, (torch.arange(300) < 150).float()
    X[0, :150, 1] += 4
    w, std = concepts.logistic(X, truth).requires_grad_(), X.std(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(concepts.apply(w, X), truth.expand(2, -1), reduction="sum")
    loss = loss + (w[:, :-1] * std).square().sum() / 2
    assert torch.autograd.grad(loss, w)[0].abs().max() < 0.02 and w[0, 1] > 0.1      # 1,500 at w = 0
    apart = torch.where(truth.bool(), 1., -1.).view(1, -1, 1)
    assert concepts.balanced_f1(concepts.apply(concepts.logistic(apart, truth), apart)) == 1


def test_lasso_meets_its_optimality_conditions():
    X, truth = torch.randn(1, 400, 5, generator=common.generator(1, "X")), (torch.arange(400) < 200).float()
    X[0, :200, 2] += 1.5
    w = concepts.lasso(X, truth, l1=0.05, steps=500)
    Z = (X - X.mean(1, keepdim=True)) / X.std(1, keepdim=True)
    slope = torch.einsum("kn,knj->kj", (Z @ w.unsqueeze(-1)).squeeze(-1).sigmoid() - truth, Z) / 400
    assert w[0, 2] > 0 and slope[0, 2].item() == pytest.approx(-0.05, abs=1e-3) and (slope.abs() < 0.0505).all()


def test_probes_find_planted_units_and_nothing_in_shuffled_ones(planted, shuffled):
    gen, every = common.generator(0, "probes"), torch.arange(12)
    good, bad = (concepts.probes(*pair, every, gen, n=300) for pair in (planted, shuffled))
    assert good["units"][:, 0].tolist() == list(range(12)) and good["auroc"][1].min() > 0.95
    assert bad["auroc"][5].mean().item() == pytest.approx(0.5, abs=0.03)
    two = [a.label_NK.float()[:, :1] + 0.3 * torch.randn(N, 4, generator=common.generator(i, "y")) * torch.tensor(
        [1., 1, 9, 9]) for i, a in enumerate(planted)]
    dense = concepts.dense_probes(*two, planted[0].label_NK, planted[1].label_NK, every[:2], gen, n=300)
    assert dense["auroc"][0] > 0.98 and dense["auroc"][1].item() == pytest.approx(0.5, abs=0.06)
    w = dense["w"][0]
    assert min(w[0], w[1]) > 10 * w[2:4].abs().max()


def test_splits_counts_the_parts_of_a_concept(world):
    def parts(label, seed, n):
        """Unit j is on at the concept's tokens of kind j."""
        kind = (random(seed, N) * n).long()
        return active(torch.stack([(label[:, 11] & (kind == j)).float() for j in range(n)]
                                  + list(noisy(label, seed)[:, :4].T), 1), label)
    gen, last = common.generator(0, "splits"), torch.tensor([11])
    for n in (1, 3):
        found = concepts.splits(*(parts(label, 30 + i, n) for i, label in enumerate(world)), last, gen, n=500)
        assert found["n"].item() == n and set(found["units"][0, :n].tolist()) == set(range(n))
    assert found["f1"].item() < 0.8                             # one of three parts detects a third


class Linear:
    """contrib_u = f_u W_u."""
    layers, kind, matrices = [0], "dictionary", ()

    def __init__(self, W):
        self.W = W

    def contrib(self, layer, f, x, units):
        return f[..., units, None] * self.W[units]


def test_shares_are_the_contributions_at_a_units_own_tokens():
    value, W = (random(3, 200, 5) - 0.7).clamp(min=0), torch.randn(5, 4, generator=common.generator(0, "W"))
    value[3:, 4] = 0
    a = active(value, torch.zeros(200, 1).bool())
    c = recording.contributions(Linear(W), a, each=20, group=2)
    for u in range(5):
        assert c[u].isfinite().all(1).sum() == min(20, (value[:, u] > 0).sum())
        want = value[value[:, u] > 0, u, None] * W[u]
        assert all(((want - row).abs().sum(1) < 1e-5).any() for row in c[u] if row.isfinite().all())
        if len(want) > 20:                                      # spread over all of them
            assert torch.allclose(c[u][-1], want[19 * len(want) // 20])
    cos = (recording.write_directions(c) * W).sum(1) / W.norm(dim=1)
    assert torch.allclose(cos[:4], torch.ones(4))


def test_effective_rank_of_one_and_of_equal_directions():
    gen = common.generator(0, "rank")
    line = torch.randn(300, 1, generator=gen) * torch.randn(8, generator=gen)
    four = torch.randn(300, 4, generator=gen) @ torch.linalg.qr(torch.randn(8, 8, generator=gen))[0][:4]
    short = torch.cat([line[:1], torch.full((299, 8), torch.nan)])
    one, r, none = effective_rank(torch.stack([line, four, short])).tolist()
    assert one == pytest.approx(1, abs=1e-4) and r == pytest.approx(4, rel=0.1) and none != none


def test_absorption_of_a_planted_absorber_and_of_none(world):
    """The concept is e_0. Unit 0 is its own, but leaves 30 % of its tokens to unit 1, which writes e_0 + e_1."""
    def recorded(label, kind, absorbed):
        own = label[:, 11] & ~((kind < absorbed) & (kind < 0.3))
        value = torch.stack([own, label[:, 11] & ~own, label[:, 0]], 1).float()
        return active(value, label), value @ W
    W = torch.eye(4)[[0, 0, 2]]
    W[1, 1] = 1
    gen, concept = common.generator(0, "absorption"), torch.tensor([11])
    for absorbed in (1., 0.):
        (fit, y), (test, y2) = (recorded(label, random(40 + i, N), absorbed) for i, label in enumerate(world))
        probe = concepts.dense_probes(y + 0.05 * random(50, N, 4), y2, fit.label_NK, test.label_NK, concept, gen, n=500)
        split = dict(n=torch.tensor([1]), units=torch.tensor([[0, 1, 2]]))
        probe["w"][0, :4] = torch.tensor([1., 0, 0, 0])
        probe["w"][0, 4] = -0.5
        write = recording.write_directions(recording.contributions(Linear(W), fit))
        got = concepts.absorption(Linear(W), test, y2, probe["w"], write, split, concept, gen, n=400)
        assert got["full"].item() == pytest.approx(0.3 * absorbed, abs=0.07)
        assert got["fraction"].item() == pytest.approx(0.3 * absorbed, abs=0.07)
    both = dict(n=torch.tensor([2]), units=torch.tensor([[0, 1, 2]]))           # split, not absorbed
    (test, y2) = recorded(world[1], random(41, N), 1.)
    assert concepts.absorption(Linear(W), test, y2, probe["w"], write, both, concept, gen)["full"].item() == 0
    W = torch.tensor([[1.], [1.], [-1.]]) * torch.eye(4)[0]     # all three write e_0 at its tokens, in these shares
    for size, want in (((.8, .2, 0), 0.), ((.5, .5, 0), 0.5), ((.5, .7, .2), 0.5)):     # under 0.4 it is no absorber
        value = world[1][:, [11] * 3].float() * torch.tensor(size)
        found = concepts.absorption(Linear(W), active(value, world[1]), value @ W, probe["w"], W, split, concept, gen)
        assert found["fraction"].item() == pytest.approx(want, abs=1e-5) and found["full"].item() == 0
    split["units"] = torch.tensor([[2, 0, 1]])                  # its own unit speaks against it: all is absorbed
    found = concepts.absorption(Linear(W), active(value, world[1]), value @ W, probe["w"], W, split, concept, gen)
    assert found["fraction"].item() == 1


def test_each_kind_of_unit_is_told_from_the_others(world):
    def four(label, i):
        noise = random(60 + i, N) < 0.1
        return active(torch.stack([label[:, 8], label[:, 9] | label[:, 10], label[:, 10] & label[:, 11], noise],
                                  1).float(), label)
    fit, test = (four(label, i) for i, label in enumerate(world))
    for u, kind in enumerate(["atomic", "polysemantic", "composite", "unexplained"]):
        one = [recording.replace(a, unit_E=0 * a.unit_E[a.unit_E == u], token_E=a.token_E[a.unit_E == u],
                             origin_F=a.origin_F[:1]) for a in (fit, test)]
        found = one_concept(*one, enough=0.3)
        assert found[kind] == 1, (kind, found)
        if kind == "polysemantic":              # F1 of "c or c'" is 1, of c 0.74: the overlap counts once
            assert one_concept(*one, enough=0.3, gain=0.23)[kind] == 1
    found = one_concept(fit, test, enough=0.3)
    assert [found[k] for k in ("atomic", "polysemantic", "composite", "unexplained")] == [0.25] * 4


def test_fragmentation_is_the_mean_size_of_clusters():
    on = [random(70 + i, N) < 0.05 for i in range(3)]
    value = torch.stack([on[0]] * 3 + [on[1]] * 2 + [on[2], torch.arange(N) < ALIVE - 1], 1).float()
    assert fragmentation(active(value, torch.zeros(N, 1).bool())) == pytest.approx((9 + 4 + 1) / 6)
    assert fragmentation(active(value[:, 6:], torch.zeros(N, 1).bool())) != 0


def test_meta_dictionary_finds_common_atoms_and_nothing_in_random_rows():
    gen = common.generator(0, "meta")
    atoms = torch.nn.functional.normalize(torch.randn(8, 32, generator=gen), dim=1)
    sums = torch.stack([atoms[torch.randperm(8, generator=gen)[:3]].sum(0) for _ in range(128)])
    planted = meta_dictionary(sums, gen, width=8, k=3, steps=300, lr=1e-2, seeds=2)
    chance = meta_dictionary(torch.randn(128, 32, generator=gen), gen, width=8, k=3, steps=300, lr=1e-2, seeds=2)
    assert planted["excess"] > 0.5 and chance["excess"] == pytest.approx(0, abs=0.05)
    assert chance["ve"] > 0.3                                  # which is why the plain number says nothing


def test_like_and_difference_of_means(world):
    value = torch.stack([random(80 + i, N) < 0.02 * (1 + i // 4) for i in range(40)], 1).float()
    a, chosen = active(value, world[0]), torch.tensor([[0, 1], [38, 20]])
    other, on = effects.matched_in_frequency(a, chosen, common.generator(0, "like"), near=5), a.on().float()
    assert (other != chosen).all() and (on[other] / on[chosen] - 1).abs().max() < 0.9
    assert (on[other][1] / on[chosen][1] - 1).abs().max() < 0.2
    v = random(90, N, 3)
    label = world[0]
    got = effects.difference_of_means(v, label)
    assert torch.allclose(got[4], v[label[:, 4]].mean(0) - v[~label[:, 4]].mean(0), atol=1e-5)


@pytest.fixture(scope="module")
def arena():
    """What compare.py hands to measure: a tiny random GPT, and stories with their concepts."""
    gen, rows, T = common.generator(0, "arena"), 60, 40
    gpt = GPT(GPTConfig(len(VOCAB), n_layer=1, n_embd=16, n_head=2, n_inner=32, n_positions=T), gen)
    gpt.vocab = list(VOCAB)
    ids = np.concatenate([tell(i).ids for i in range(50)])[:2 * rows * T]
    label = truth.labels(ids, VOCAB, truth.lexical(VOCAB))
    ids, label = torch.from_numpy(ids).view(2, rows, T), torch.from_numpy(label).view(2, rows, T, -1)
    enough = label[:, :, 1:].sum((1, 2)).amin(0) >= ALIVE
    names = [name for name, keep in zip(truth.concept_names(False), enough) if keep]
    fit, test = ((idx, lab[..., enough]) for idx, lab in zip(ids, label))
    shared = lambda function, name, **how: function(gpt, 0, fit=fit, test=test, gen=common.generator(0, name), **how)
    return SimpleNamespace(gpt=gpt.eval().requires_grad_(False), layer=0, fit=fit, test=test, names=names, shared=shared)


@pytest.mark.parametrize("module, details", [
    (concepts, ["alive_curve", "null_probe_auroc_1"]), (effects, [])])
def test_numbers_have_exactly_the_keys_of_the_columns(arena, module, details):
    m = baselines.baselines(arena.gpt, 0, arena.fit[0], 8, 32, 0)["neurons"]
    numbers, rest = module.measure(m, arena, common.generator(0, "measure"))
    assert list(numbers) == list(module.COLUMNS) and {*details} <= {*rest}
    n_a = [key for key, value in numbers.items() if value is None]
    assert set(n_a) <= {"absorption_fraction", "meta_excess"}
