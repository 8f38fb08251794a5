"""The map between two methods against brute force and closed forms: itself, split in two, merged, rotated, random, shifted."""
import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

import common
import evals
import sae
import transcoder
from baselines import SVD
from conftest import noisy_gpt
from metrics import mapping, matching
from metrics.mapping import Counts, Groups
from metrics.recording import Active, record

N, ROW, F = 4000, 40, 30


def gen(name):
    return common.generator(0, name)


def active(value_NF, label_NK=None):
    """The recording of a dense matrix of values."""
    unit, token = value_NF.T.nonzero(as_tuple=True)
    value = value_NF[token, unit]
    n = len(value_NF)
    label_NK = torch.zeros(n, 0, dtype=torch.bool) if label_NK is None else label_NK
    return Active(unit, token, value, value.abs(), torch.arange(value_NF.shape[1]), torch.zeros(n, 1), label_NK)


def sparse(name, n=N, units=F, rate=(0.02, 0.2)):
    """Values of units that are on at random tokens, each at its own rate."""
    is_on = torch.rand(n, units, generator=gen(name)) < torch.linspace(*rate, units)
    return is_on * (0.5 + torch.rand(n, units, generator=gen(name + "value")))


def entropy_of(p):
    return -sum(s * math.log2(s) for s in (p, 1 - p) if s)


@pytest.fixture(scope="module")
def whole():
    return sparse("fit"), sparse("test")


@pytest.fixture(scope="module")
def halves():
    """Each unit in two: where it is on, a coin says which of the two is on instead. The halves of unit i are 2 i, 2 i + 1."""
    def split(value_NF, name):
        coin_NF = torch.rand(value_NF.shape, generator=gen(name)) < 0.4
        return torch.stack([value_NF * coin_NF, value_NF * ~coin_NF], -1).flatten(1)
    return [split(sparse(name), "coin" + name) for name in ("fit", "test")]


def graph(a, b, least=mapping.EDGE):
    floor = mapping.information_floor(mapping.coactivation(a, mapping.by_chance(b, ROW, gen("floor"))))
    r = mapping.covariances(a, b).correlation()
    return r, mapping.edges(r, mapping.coactivation(a, b).information(), floor, least)


# ------------------------------------------------------------------------------------ recordings
def test_recordings_are_selected_united_and_spread(whole):
    value = whole[0].clone()
    value[:, 3] = 0
    value[:, 5] *= -1
    a = active(value)
    assert torch.equal(mapping.frequent(a, 100), ((value != 0).sum(0) >= 100).nonzero().squeeze(1))
    units = torch.tensor([1, 3, 5, 20])
    some = mapping.select(mapping.select(a, torch.arange(1, F)), units - 1)
    assert some.origin_F.tolist() == units.tolist() and some.F == 4
    assert torch.equal(mapping.spread(some, 0, 4), value[:, units]) and torch.equal(mapping.spread(a, 3, 9), value[:, 3:9])
    # group 0 has three members, one of which is in group 2 too; group 1 has none
    unit_M, group_M = torch.tensor([2, 5, 7, 5]), torch.tensor([0, 0, 0, 2])
    united = mapping.unite(a, unit_M, group_M, 3)
    expected = torch.stack([value[:, [2, 5, 7]].abs().sum(1), torch.zeros(N), value[:, 5].abs()], 1)
    assert torch.allclose(mapping.spread(united, 0, 3), expected) and united.F == 3
    assert torch.equal(united.at(torch.tensor(0), torch.arange(N)) != 0, expected[:, 0] != 0)


def test_by_chance_each_unit_moves_by_rows_of_its_own(whole):
    a = active(whole[0])
    moved = mapping.spread(mapping.by_chance(a, ROW, gen("chance")), 0, F)
    rows = [next(k for k in range(N // ROW) if torch.equal(moved[:, i], whole[0][:, i].roll(k * ROW))) for i in range(F)]
    assert 0 not in rows and len(set(rows)) > F // 2


# ------------------------------------------------------------------------------- pairs of units
def test_counts_are_those_of_the_tokens(whole):
    one, other = whole[0][:, :6].clone(), whole[1][:, :5].clone()
    other[:, 0], other[:, 1], other[:, 2], one[:, 5] = one[:, 0], 0, 1, 0           # a copy, never, always, never
    counts = mapping.coactivation(active(one), active(other))
    tables = {name: getattr(counts, name)() for name in
              ("given_one", "given_other", "lift", "jaccard", "information", "uncertainty")}
    for i, j in itertools.product(range(6), range(5)):
        x, y = (one[:, i] != 0).double(), (other[:, j] != 0).double()
        both, p, q = (x * y).mean().item(), x.mean().item(), y.mean().item()
        assert counts.both_FG[i, j] == (x * y).sum()
        expected = dict(given_one=both / p if p else 0, given_other=both / q if q else 0,
                        lift=both / (p * q) if p and q else 0, jaccard=both / (p + q - both) if p + q else 0)
        information = 0
        for u, v in itertools.product((0, 1), (0, 1)):
            cell = ((x == u) & (y == v)).double().mean().item()
            information += cell * math.log2(cell / ((p if u else 1 - p) * (q if v else 1 - q))) if cell else 0
        entropy = entropy_of(q)
        expected |= dict(information=information, uncertainty=information / entropy if entropy else 0)
        for name, value in expected.items():
            assert tables[name][i, j].item() == pytest.approx(value, abs=1e-9), name
    assert tables["uncertainty"][0, 0] == pytest.approx(1)
    back = counts.back()
    assert torch.equal(back.given_one(), tables["given_other"].T) and torch.allclose(back.information(), tables["information"].T)
    known = sum(tables["information"][:, j].max().item() for j in range(5))
    total = sum(entropy_of((other[:, j] != 0).double().mean().item()) for j in range(5))
    assert mapping.explained_information(counts) == pytest.approx(known / total)


def test_covariances_and_correlation_are_those_of_the_dense_values(whole):
    one, other = whole[0].clone(), whole[1][:, :20] + 0.5 * whole[0][:, :20]
    other[:, 4], other[:, 5], other[:, 6] = 3.7, 0, other[:, 6] + 5                 # constant, never, far from 0
    one[:, 7] *= torch.randn(N, generator=gen("sign")).sign()
    a, b = active(one), active(other)
    found = mapping.covariances(a, b)
    x, y = one.double() - one.double().mean(0), other.double() - other.double().mean(0)
    for table, expected in ((found.aa_FF, x.T @ x), (found.ab_FG, x.T @ y), (found.bb_GG, y.T @ y)):
        assert torch.allclose(table, expected / N, atol=1e-3)
        assert torch.allclose(table[:4, :4], expected[:4, :4] / N, atol=1e-6)
    r = found.correlation()
    error = (r - matching.correlation(a, b, torch.arange(F), torch.arange(20))).abs()
    assert error[:, torch.arange(20) != 4].max() < 2e-5         # of the constant, matching.py has r by rounding
    assert (r[:, 4:6] == 0).all() and torch.equal(mapping.likeness(found, a, b), r.abs())
    mean = torch.linspace(0, 1, F).double(), torch.linspace(0, 1, 20).double()
    about = found.about(*mean)
    assert torch.allclose(about.ab_FG, (one.double() - mean[0]).T @ (other.double() - mean[1]) / N, atol=1e-4)
    assert torch.allclose(found.back().correlation(), r.T)


def test_relations_of_planted_units():
    """b has one unit on at tokens 0 to 399 of 4,000, and one that is on nearly everywhere."""
    token = torch.arange(N)
    b = torch.stack([token < 400, token >= 100], 1)
    a = torch.stack([token < 390,                                   # equal to the first
                     (token >= 200) & (token < 300),                # a part of it, and of the dense one
                     token < 1200,                                  # a superset
                     (token >= 200) & (token < 600),                # an overlap
                     token >= 3900,                                 # apart from it; inside the dense one
                     token >= 120,                                  # dense itself
                     token < 600], 1)                               # holds the first, but is little more
    counts = mapping.coactivation(active(a.float()), active(b.float()))
    names = [[mapping.RELATIONS[place] for place in row] for row in mapping.relations(counts).tolist()]
    assert [row[0] for row in names] == ["equal", "subsumed", "superset", "overlap", "none", "none", "overlap"]
    # what lies in a unit that is on nearly everywhere is no part of it, unless the guard is taken away
    assert [row[1] for row in names] == ["none", "none", "overlap", "none", "none", "equal", "none"]
    unguarded = mapping.relations(counts, lift=0)
    assert mapping.RELATIONS[unguarded[1, 1]] == mapping.RELATIONS[unguarded[4, 1]] == "subsumed"
    back = mapping.relations(counts.back())
    assert [mapping.RELATIONS[place] for place in back[0].tolist()] == [
        "equal", "superset", "subsumed", "overlap", "none", "none", "overlap"]
    shares = mapping.relation_shares(mapping.relations(counts))
    assert shares["subsumed_a"] == pytest.approx(1 / 7) and shares["subsumed_b"] == 1 / 2 and shares["equal_b"] == 1


# ----------------------------------------------------------------------------------------- graph
def test_components_are_those_of_a_walk():
    for trial in range(20):
        is_edge = torch.rand(9, 7, generator=gen(f"edges {trial}")) < 0.12
        found = mapping.components(is_edge)
        for i in range(9):
            ones, others = {i}, set()
            for _ in range(9):
                others |= {j for j in range(7) if any(is_edge[k, j] for k in ones)}
                ones |= {k for k in range(9) if any(is_edge[k, j] for j in others)}
            assert {k for k in range(9) if found.name_F[k] == found.name_F[i]} == ones
            assert {j for j in range(7) if found.name_G[j] == found.name_F[i]} == others
            assert (found.a_F[i], found.b_F[i]) == (len(ones), len(others))
            for j in others:
                assert (found.a_G[j], found.b_G[j]) == (len(ones), len(others))
        numbers = mapping.graph_numbers(is_edge)
        for side in "ab":
            assert sum(v for k, v in numbers.items() if k.endswith(f"_{side}") and "degree" not in k) == pytest.approx(1)


def test_kinds_and_the_clearest_cases():
    """Units of A: 0 - 0; 1 - 1, 2; 2, 3 - 3; 4, 5 - 4, 5; 6 - none; 7 - 7. Unit 6 of B has none either."""
    r = torch.full((8, 8), 0.1)
    pairs = {(0, 0): 0.8, (7, 7): 0.9, (1, 1): 0.7, (1, 2): 0.6, (2, 3): 0.5, (3, 3): 0.6,
             (4, 4): 0.5, (4, 5): 0.5, (5, 5): 0.5}
    for (i, j), value in pairs.items():
        r[i, j] = value
    numbers = mapping.graph_numbers(r >= 0.4)
    assert numbers == dict(degree_a=9 / 8, orphan_a=1 / 8, one_to_one_a=2 / 8, one_to_many_a=1 / 8, many_to_one_a=2 / 8,
                           many_to_many_a=2 / 8, degree_b=9 / 8, orphan_b=1 / 8, one_to_one_b=2 / 8, one_to_many_b=2 / 8,
                           many_to_one_b=1 / 8, many_to_many_b=2 / 8)
    cases = mapping.clearest_cases(r, r >= 0.4)
    rounded = {kind: [(c.one, c.other, round(c.score, 3)) for c in some] for kind, some in cases.items()}
    assert rounded == dict(one_to_one=[([7], [7], 0.9), ([0], [0], 0.8)], one_to_many=[([1], [1, 2], 0.6)],
                           many_to_one=[([2, 3], [3], 0.5)], orphan_a=[([6], [], 0.1)], orphan_b=[([], [6], 0.1)])
    assert len(mapping.clearest_cases(r, r >= 0.4, first=1)["one_to_one"]) == 1


def test_the_floor_lets_one_chance_pair_in_a_thousand_through():
    a, b = active(sparse("a", units=120)), active(sparse("b", units=100))
    floor = mapping.information_floor(mapping.coactivation(a, b))
    chance = mapping.coactivation(a, mapping.by_chance(b, ROW, gen("other")))
    share = (chance.information() > floor).double().mean().item()
    assert 0.0003 < share < 0.003
    assert (mapping.coactivation(a, b).information() > floor).sum() == 12          # of 12,000
    assert not graph(a, b)[1].any()


# ------------------------------------------------------------- a dictionary beside what it is made into
def test_beside_itself_all_is_one_to_one(whole):
    a, fit = active(whole[1]), active(whole[0])
    numbers = mapping.mapping((fit, fit), (a, a), ROW, gen("itself"))
    ones = ["best", "unique", "explained", "equal", "degree", "one_to_one", "r2_1", "r2_5", "r2_all", "needed", "degree_0.7"]
    for side in "ab":
        for key in ones:
            key, _, least = key.partition("_0")
            key = f"{key}_{side}" + (f"_0{least}" if least else "")
            assert numbers[key] == pytest.approx(1, abs=1e-3), key
        for key in ("orphan", "one_to_many", "many_to_many", "subsumed", "superset", "overlap"):
            assert numbers[f"{key}_{side}"] == 0, key
        # by chance nothing of this is left
        assert numbers[f"null_orphan_{side}"] == 1 and numbers[f"null_best_{side}"] < 0.1
        assert abs(numbers[f"null_r2_5_{side}"]) < 0.02 and numbers[f"null_explained_{side}"] < 0.02
        assert numbers[f"null_equal_{side}"] == numbers[f"null_subsumed_{side}"] == 0
    assert numbers["cka"] == pytest.approx(1, abs=1e-4) and numbers["null_cka"] < 0.02
    assert {key for key in numbers if not key.startswith("null_")} - {"information_floor"} == {
        key.removeprefix("null_") for key in numbers if key.startswith("null_")}


def test_with_every_unit_split_in_two(whole, halves):
    fit, test = [(active(one), active(two)) for one, two in zip(whole, halves)]
    r, is_edge = graph(*test, least=0.3)
    assert torch.equal(is_edge, torch.eye(F).bool().repeat_interleave(2, 1))
    numbers = mapping.graph_numbers(is_edge)
    assert numbers["one_to_many_a"] == numbers["one_to_many_b"] == 1 and numbers["degree_a"] == 2 == 2 * numbers["degree_b"]
    merged = mapping.graph_numbers(is_edge.T)                   # the other way round, two are merged in one
    assert merged["many_to_one_a"] == 1 and merged["degree_b"] == 2
    relation = mapping.relations(mapping.coactivation(*test))
    assert torch.equal(relation == mapping.RELATIONS.index("superset"), is_edge & (relation != 4))
    # the smaller half has 40 % of the tokens, the larger 60 %, too many for a part by P(i | j) < 0.5
    assert (relation[torch.arange(F), 2 * torch.arange(F)] == mapping.RELATIONS.index("superset")).double().mean() > 0.9
    groups = mapping.subsumed_groups(mapping.relations(mapping.coactivation(*test).back()), least=1)
    assert torch.equal(groups.unit_M // 2, groups.whole_Q[groups.group_M])
    # two halves make the whole, one does not; a half cannot be told from the whole
    onto = [mapping.covariances(*pair) for pair in (fit, test)]
    back = [c.back() for c in onto]
    wholes, parts = mapping.reconstruct(*back), mapping.reconstruct(*onto)
    assert (wholes.r2_GS[:, 1:] > 0.999).all() and (wholes.r2_GS[:, 0] < 0.75).all() and (wholes.needed_G == 2).all()
    assert torch.equal(wholes.source_GS[:, :2].sort(1).values, torch.arange(2 * F).view(F, 2))
    assert (parts.r2_GS[:, -1] < 0.75).all() and torch.equal(parts.source_GS[:, 0], torch.arange(2 * F) // 2)
    assert mapping.uniqueness(r) == 1 and mapping.uniqueness(r.T) == 0.5
    found = mapping.map_numbers(fit, test, 0.001)
    assert found["unique_a"] == 1 and found["unique_b"] == 0.5 and found["degree_a_0.3"] == 2
    assert found["r2_5_a"] == pytest.approx(wholes.r2_GS[:, -1].mean().item())
    assert found["r2_1_b"] == pytest.approx(parts.r2_GS[:, 0].mean().item())
    counts = mapping.coactivation(*test)
    assert found["explained_b"] == mapping.explained_information(counts) != found["explained_a"]
    assert found["superset_a"] == 1 and found["subsumed_a"] == 0


def test_rotated_values_are_one_space_and_no_units(whole):
    Q = torch.linalg.qr(torch.randn(F, F, generator=gen("rotation"))).Q
    fit, test = [(active(one), active(one @ Q)) for one in whole]
    on_fit, on_test = mapping.covariances(*fit), mapping.covariances(*test)
    assert mapping.cka(on_test) == pytest.approx(1, abs=1e-4)
    for found in (mapping.reconstruct(on_fit, on_test), mapping.reconstruct(on_fit.back(), on_test.back())):
        assert (found.r2_all_G > 0.999).all() and (found.r2_GS[:, -1] < 0.95).all() and found.needed_G.mean() > 5
        assert (found.r2_GS.diff(dim=1) > -0.01).all()
    assert mapping.map_numbers(fit, test, 0)["equal_a"] < 0.1


def test_pursuit_is_the_one_that_fits_on_the_data(whole):
    """Sources with shared parts and one copy; targets are sums of three and noise."""
    mix = torch.eye(F) + 0.4 * (torch.rand(F, F, generator=gen("mix")) < 0.1)
    weights = torch.randn(F, 6, generator=gen("w")) * (torch.rand(F, 6, generator=gen("which")) < 0.15)
    data = []
    for i, value in enumerate(whole):
        x = value @ mix
        x[:, 9] = 2 * x[:, 8]
        y = value @ weights + 0.3 * torch.randn(N, 6, generator=gen(f"noise {i}")) + i           # test has another mean
        data.append((x, y))
    (x, y), (x2, y2) = [(x.double(), y.double()) for x, y in data]
    x2[:, 4] += 0.1
    found = mapping.reconstruct(mapping.covariances(active(x.float()), active(y.float())),
                                mapping.covariances(active(x2.float()), active(y2.float())))
    for j in range(6):
        chosen, left = [], y[:, j] - y[:, j].mean()
        for s in range(5):
            scores = [0 if i in chosen else abs(torch.corrcoef(torch.stack([x[:, i], left]))[0, 1].item()) for i in range(F)]
            chosen.append(max(range(F), key=lambda i: scores[i]))
            X = torch.cat([x[:, chosen], torch.ones(N, 1)], 1)
            w = torch.linalg.lstsq(X, y[:, j:j + 1]).solution
            left = y[:, j] - (X @ w)[:, 0]
            error = (y2[:, j] - (torch.cat([x2[:, chosen], torch.ones(N, 1)], 1) @ w)[:, 0]).square().mean()
            r2 = 1 - error / y2[:, j].var(correction=0)
            assert found.source_GS[j, s] == chosen[s]
            assert found.r2_GS[j, s].item() == pytest.approx(r2.item(), abs=2e-3)
        X = torch.cat([x, torch.ones(N, 1)], 1)
        w = torch.linalg.lstsq(X, y[:, j:j + 1], driver="gelsd").solution
        error = (y2[:, j] - (torch.cat([x2, torch.ones(N, 1)], 1) @ w)[:, 0]).square().mean()
        assert found.r2_all_G[j].item() == pytest.approx(1 - (error / y2[:, j].var(correction=0)).item(), abs=2e-3)


# ------------------------------------------------------------------------------------- subspaces
def test_cka_and_principal_cosines(whole):
    x, y = whole[0].double(), (whole[0] + whole[1])[:, :20].double()
    dx, dy = x - x.mean(0), y - y.mean(0)
    K, L = dx @ dx.T, dy @ dy.T
    expected = (K * L).sum() / (K.norm() * L.norm())
    assert mapping.cka(mapping.covariances(active(whole[0]), active(y.float()))) == pytest.approx(expected.item(), abs=1e-4)
    rows = torch.randn(5, 40, generator=gen("rows"))
    mixed = torch.randn(7, 5, generator=gen("mixed")) @ rows                        # seven directions of one space of five
    for one in (rows, mixed[:6]):
        assert torch.allclose(mapping.principal_cosines(one, mixed), torch.ones(5).double(), atol=1e-5)
    e = torch.eye(4)
    tilted = torch.stack([e[0], math.cos(0.3) * e[1] + math.sin(0.3) * e[2]])
    assert torch.allclose(mapping.principal_cosines(e[:2], tilted), torch.tensor([1, math.cos(0.3)]).double(), atol=1e-6)
    assert mapping.principal_cosines(e[:2], e[2:]).abs().max() < 1e-6
    random = [torch.randn(20, 128, generator=gen(f"random {i}")) for i in range(40)]
    square = torch.stack([mapping.principal_cosines(*pair).square().mean() for pair in itertools.pairwise(random)])
    assert square.mean().item() == pytest.approx(20 / 128, abs=0.01)


# ----------------------------------------------------------------------------------------- groups
@pytest.fixture(scope="module")
def family():
    """96 units of A, four for each of 24 of B, on at a quarter of its tokens each. The groups of the first 12 units of B
    stand for one concept each and write alike; those of the rest are four unrelated units. (a, b, groups, S_FF)"""
    token = torch.arange(N)
    b = torch.stack([(token % 48) == j for j in range(24)], 1)
    quarter = (token // 48) % 4
    a = torch.stack([b[:, j] & (quarter == k) for j in range(24) for k in range(4)], 1)
    # 24 concepts: of a coherent unit of B, and else of one quarter of each of the others, in turn
    place = torch.arange(96)
    concept_F = torch.where(place < 48, place // 4, 12 + (place * 7) % 12)
    label = torch.stack([a[:, concept_F == k].any(1) for k in range(24)], 1)
    write = torch.randn(96, 64, generator=gen("write"))
    write[:48] += 2 * torch.randn(12, 64, generator=gen("shared")).repeat_interleave(4, 0)
    a, b = active(a.float(), label), active(b.float(), label)
    groups = mapping.subsumed_groups(mapping.relations(mapping.coactivation(a, b)))
    return a, b, groups, matching.cosines(write, write), concept_F, write


def test_groups_are_the_planted_ones_and_only_coherent_ones_score(family):
    a, b, groups, S, _, _ = family
    assert torch.equal(groups.unit_M, torch.arange(96)) and torch.equal(groups.group_M, torch.arange(96) // 4)
    assert torch.equal(groups.whole_Q, torch.arange(24)) and (groups.sizes() == 4).all()
    scores = mapping.coherence(a, b, groups, {"write": S}, gen("coherence"), draws=400, union_draws=60)
    for name in ("write", "entropy", "f1"):
        assert (scores[name].z_Q[:12] > 3).all() and (scores[name].z_Q[12:] < 2).all(), name
    assert (scores["cover"].value_Q > 0.99).all() and (scores["spill"].value_Q < 0.01).all()
    assert (scores["cover"].z_Q > 2).all() and (scores["spill"].z_Q > 2).all()
    assert (scores["entropy"].value_Q[:12] == 0).all() and (scores["f1"].value_Q[:12] > 0.99).all()
    assert mapping.share_coherent(scores, groups) == 0.5
    none = Groups(groups.unit_M[:0], groups.group_M[:0], groups.whole_Q[:0])
    assert mapping.coherence(a, b, none, {"write": S}, gen("none")) == {} and math.isnan(mapping.share_coherent({}, none))


def test_numbers_of_groups_against_brute_force(family):
    a, b, _, S, concept_F, _ = family
    groups = Groups(torch.tensor([3, 50, 51, 2, 3, 70, 71]), torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 12]))
    members = [[3, 50, 51], [2, 3, 70, 71]]
    draws = mapping.alike_units(a.on(), 3, gen("draws"))
    found = mapping.mean_similarity(S, groups, draws)
    entropy = mapping.concept_entropy(concept_F, 24, groups, draws)
    for u, (q, group) in itertools.product(range(3), enumerate(members)):
        stand_in = draws[u, group].tolist()
        expected = [S[i, k].item() for i, k in itertools.combinations(stand_in, 2)]
        assert found[u, q].item() == pytest.approx(sum(expected) / len(expected), abs=1e-6)
        p = torch.bincount(concept_F[stand_in]).double() / len(group)
        assert entropy[u, q].item() == pytest.approx(-(p * p.clamp(min=1e-12).log2()).sum().item(), abs=1e-9)
    label_NK = a.label_NK.float()
    numbers = mapping.union_numbers(a, b, groups, groups.unit_M, label_NK, label_NK.sum(0))
    on, whole = mapping.spread(a, 0, 96) > 0, mapping.spread(b, 0, 24) > 0
    for q, group in enumerate(members):
        union, of = on[:, group].any(1), whole[:, groups.whole_Q[q]]
        assert numbers["cover"][q].item() == pytest.approx((union & of).sum().item() / of.sum().item())
        assert numbers["spill"][q].item() == pytest.approx((union & ~of).sum().item() / union.sum().item())
        f1 = max((2 * (union & label).sum() / (union.sum() + label.sum())).item() for label in a.label_NK.T)
        assert numbers["f1"][q].item() == pytest.approx(f1)


def test_stand_ins_are_others_of_alike_frequency():
    on_F = torch.randint(10, 5000, (100,), generator=gen("on"))
    draws = mapping.alike_units(on_F, 300, gen("stand in"), near=20)
    assert (draws.sort(1).values == torch.arange(100)).all()                        # no unit twice
    rank = on_F.argsort(stable=True).argsort()
    assert ((rank[draws] // 20) == (rank // 20)).all()
    own = (draws == torch.arange(100)).double().mean().item()
    assert own == pytest.approx(1 / 20, abs=0.01)
    assert (mapping.alike_units(on_F[:5], 4, gen("few")).sort(1).values == torch.arange(5)).all()
    # random groups are not coherent: z has mean 0 and spread 1
    S = torch.randn(100, 100, generator=gen("S"))
    S = S + S.T
    unit_M = torch.cat([torch.randperm(100, generator=gen(f"group {q}"))[:3 + q % 4] for q in range(60)])
    group_M = torch.arange(60).repeat_interleave(torch.tensor([3 + q % 4 for q in range(60)]))
    groups = Groups(unit_M, group_M, torch.arange(60))
    z = mapping.score("write", mapping.mean_similarity(S, groups, torch.arange(100)[None])[0],
                      mapping.mean_similarity(S, groups, draws)).z_Q
    assert abs(z.mean()) < 0.4 and 0.7 < z.std() < 1.3


# ---------------------------------------------------------------------------------------- effects
D, M, T, V = 16, 24, 14, 30


@pytest.fixture(scope="module")
def gpt():
    return noisy_gpt(3, D, M, T, V)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, V, (10, T), generator=gen("rows"))


def two(gpt):
    A = sae.SAE(sae.Config(F=20, k=6), D, gen("A"), 1).requires_grad_(False)
    return A, SVD(1, gpt.h[1].mlp, 6)


def test_effects_are_those_of_the_spliced_model(gpt, rows):
    A, B = two(gpt)
    off_A = torch.zeros(6, 20, dtype=torch.bool)
    off_B = torch.zeros(6, len(B.params_F), dtype=torch.bool)
    off_A[torch.arange(5), torch.tensor([1, 3, 3, 2, 1])] = True
    off_B[torch.arange(6), torch.tensor([0, 2, 5, B.C, B.C + 1, 1])] = True
    off_B[2, :4] = True                                         # a cluster of both
    off_A[5] = False                                            # nothing: no effect
    others = torch.stack([off_B, off_B.roll(1, 0)])
    found, rolled = mapping.effect_match(A, B, gpt, rows, off_A, others, top=8)
    again, = mapping.effect_match(A, B, gpt, rows, off_A, others[1:], top=8)
    assert torch.equal(rolled.isnan(), again.isnan()) and torch.allclose(rolled[:5], again[:5])
    for p in range(6):
        changes = []
        for m, off in ((A, off_A[p]), (B, off_B[p])):
            logits = gpt(rows, evals.splice(m, lambda layer, f: f.masked_fill(off, 0), keep_error=True))
            change = (logits - gpt(rows))[:, 1:-1].flatten(0, 1).double()
            changes.append(change - change.mean(1, keepdim=True))
        var = [c.var(0, correction=0) for c in changes]
        words = sum(v / v.sum().clamp(min=1e-12) for v in var).topk(8).indices
        x, y = [(c - c.mean(0))[:, words].flatten() for c in changes]
        if p == 5:
            assert torch.isnan(found[p])
        else:
            assert found[p].item() == pytest.approx(((x @ y) / (x.norm() * y.norm())).item(), abs=1e-4)
    whole, = mapping.effect_match(A, B, gpt, rows, off_A, off_B[None], top=10**6, batch=3, at_once=1)
    assert whole.shape == (6,) and not torch.allclose(whole[:5], found[:5], atol=1e-3)


def test_an_equal_unit_has_an_equal_effect(gpt, rows):
    A, _ = two(gpt)
    other = transcoder.Transcoder(transcoder.Config(F=20, k=6), D, gen("A"), 1).requires_grad_(False)
    labels = rows.new_zeros(*rows.shape, 0)
    a = record(A, gpt, rows, labels)
    units = mapping.frequent(a, 20)
    few = mapping.select(a, units)
    off = mapping.switched(few, torch.arange(few.F), 20)
    assert torch.equal(off.nonzero()[:, 1], units)
    clustered = mapping.switched_clusters(few, torch.arange(few.F) // 2, 20)
    assert torch.equal(clustered, torch.stack([off[i:i + 2].any(0) for i in range(0, few.F, 2)]))
    assert torch.allclose(mapping.effect_match(A, A, gpt, rows, off, off[None]), torch.ones(1, len(off)).double(), atol=1e-5)
    control = mapping.control_units(few, torch.arange(few.F), gen("control"))
    assert (control != torch.arange(few.F)).all() and control.max() < few.F
    null = mapping.effect_match(A, A, gpt, rows, off, mapping.switched(few, control, 20)[None])
    assert null.abs().mean() < 0.8
    assert mapping.effect_match(A, other, gpt, rows, off, off[None]).shape == (1, few.F)


def test_units_read_alike_within_their_block(gpt, rows):
    A, B = two(gpt)
    B.V[0].data += torch.randn(B.V[0].shape, generator=gen("not orthogonal"))
    labels = rows.new_zeros(*rows.shape, 0)
    a, b = record(A, gpt, rows, labels), record(B, gpt, rows, labels)
    reads = normalize(A.unit_directions()[0][1], dim=1)
    assert torch.allclose(mapping.read_similarity(A, a), reads @ reads.T, atol=1e-6)
    S = mapping.read_similarity(B, b)
    V_in = normalize(B.V[0], dim=0)
    assert torch.allclose(S[:B.C, :B.C], (V_in.T @ V_in).abs(), atol=1e-6) and (S[:B.C, B.C:] == 0).all()
    some = mapping.select(b, torch.tensor([0, 2, B.C + 1]))
    assert torch.equal(mapping.read_similarity(B, some), S[[0, 2, B.C + 1]][:, [0, 2, B.C + 1]])


# --------------------------------------------------------------------------------------- clusters
def together(n=3000, sizes=(1, 2, 3, 5, 8, 1, 4), keep=0.95):
    """Groups of units that are on together, nearly always; each unit now and then by itself too."""
    parts, group_F = [], []
    for q, size in enumerate(sizes):
        event = torch.rand(n, 1, generator=gen(f"event {q}")) < 0.03
        joins = torch.rand(n, size, generator=gen(f"joins {q}")) < (keep if size > 1 else 1.1)
        alone = torch.rand(n, size, generator=gen(f"alone {q}")) < 0.001
        parts.append((event & joins) | alone)
        group_F += [q] * size
    order = torch.randperm(len(group_F), generator=gen("order"))
    return torch.cat(parts, 1)[:, order].float(), torch.tensor(group_F)[order]


def same_partition(one, other):
    return torch.equal(one[:, None] == one, other[:, None] == other)


def test_clusters_are_the_planted_ones():
    value, group_F = together()
    a = active(value)
    found = mapping.clusters(a)
    assert same_partition(found, group_F) and found.max() + 1 == len(found.unique())
    assert mapping.code_length(a, found) < mapping.code_length(a, torch.arange(a.F))
    # units of the same tokens, which are all as good as each other, become one; independent ones stay alone
    copies = active(value[:, [0] * 16 + [1]])
    assert same_partition(mapping.clusters(copies), torch.tensor([0] * 16 + [1 if group_F[0] != group_F[1] else 0]))
    chance = mapping.by_chance(a, 30, gen("alone"))
    assert mapping.clusters(chance).unique().numel() == a.F
    # units that are on nearly everywhere, or half of the time, are not together for that
    dense = active(sparse("dense", units=12, rate=(0.3, 0.95)))
    assert mapping.clusters(dense).unique().numel() == 12
    # nor is a unit with its parts
    parts = torch.cat([value[:, :1], value[:, :1] * (torch.arange(3000) % 5 == torch.arange(5)[:, None]).T], 1)
    assert mapping.clusters(active(parts)).unique().numel() == 6
    united = mapping.clustered(a, found)
    assert united.F == len(found.unique())
    for c in range(united.F):
        assert torch.equal(mapping.spread(united, c, c + 1)[:, 0], value[:, found == c].sum(1))


def test_clusters_merge_pairs_that_are_each_others_best_choice():
    """Units that overlap in a chain, so that what is best depends on what has merged already."""
    token = torch.arange(600)
    starts = torch.tensor([4, 39, 47, 79, 81, 82, 95, 113, 217, 220, 246, 264])
    a = active(((token[:, None] >= starts) & (token[:, None] < starts + 50)).float())
    names = list(range(12))
    n_merged = []
    while True:
        now = torch.tensor(names).unique(return_inverse=True)[1]
        before, C, change = mapping.code_length(a, now), int(now.max()) + 1, {}
        for c, d in itertools.combinations(range(C), 2):
            merged = torch.where(now == d, c, now).unique(return_inverse=True)[1]
            union = mapping.clustered(a, merged).on()[merged[now == c][0]]
            change[c, d] = mapping.code_length(a, merged) - before if union <= 100 else math.inf
        best = [min((d for d in range(C) if d != c), key=lambda d: change[min(c, d), max(c, d)]) for c in range(C)]
        pairs = [(c, best[c]) for c in range(C) if c < best[c] and best[best[c]] == c and change[c, best[c]] < 0]
        if not pairs:
            break
        n_merged.append(len(pairs))
        names = [dict((d, c) for c, d in pairs).get(name, name) for name in now.tolist()]
    assert len(n_merged) > 1 and max(n_merged) > 1
    assert same_partition(mapping.clusters(a), torch.tensor(names))
    assert (mapping.change_by_merging(a, now) >= 0).all()


def test_code_length_is_that_of_each_token_told_in_turn():
    value, group_F = together(n=400, sizes=(2, 3, 1))
    value = torch.cat([value, torch.zeros(400, 1)], 1)          # and a unit that is never on
    a = active(value)

    def told(happens):
        p = happens.double().mean().item()
        return -sum(math.log2(p if x else 1 - p) for x in happens.tolist())
    for cluster in ([0, 0, 1, 1, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 0, 1, 1]):
        bits, cluster_F = 0, torch.tensor(cluster)
        for c in set(cluster):
            member = value[:, cluster_F == c] > 0
            on = member.any(1)
            bits += told(on) + 0.5 * math.log2(400)
            if member.shape[1] > 1:
                bits += sum(told(column[on]) + 0.5 * math.log2(400) for column in member.T)
        bits += (7 - len(set(cluster))) * math.log2(7 * 6 / 2)
        assert mapping.code_length(a, cluster_F) == pytest.approx(bits)
    # of the three units that are on together two are one cluster, all other units are alone
    cluster_F = torch.arange(7)
    cluster_F[:6][group_F == 1] = torch.tensor([7, 7, 8])
    cluster_F = cluster_F.unique(return_inverse=True)[1]
    change = mapping.change_by_merging(a, cluster_F)
    before = mapping.code_length(a, cluster_F)
    for c, d in itertools.combinations(range(6), 2):
        merged = torch.where(cluster_F == d, c, cluster_F).unique(return_inverse=True)[1]
        on = value[:, merged == merged[cluster_F == c][0]] > 0
        if on.double().mean(0).min() < 0.5 * on.any(1).double().mean():
            assert torch.isinf(change[c, d]) and torch.isinf(change[d, c])
        else:
            assert change[c, d].item() == pytest.approx(mapping.code_length(a, merged) - before) == change[d, c].item()
    assert torch.isinf(change.diagonal()).all() and torch.isfinite(change).sum() >= 4
