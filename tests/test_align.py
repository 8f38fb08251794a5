"""Stability against brute force, explicit matrices and planted answers: permuted, random, half shared, shuffled."""
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, normalize

import baselines
import clt
import common
import evals
import molt
import sae
import transcoder
from conftest import noisy_gpt
from metrics import matching, stability
from metrics.matching import Block, Matches
from metrics.recording import Active, record

D, M, T, V = 16, 24, 14, 30


def randn(name, *shape):
    return torch.randn(*shape, generator=common.generator(0, name))


@pytest.fixture(scope="module")
def gpt():
    return noisy_gpt(3, D, M, T, V)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, V, (60, T), generator=common.generator(0, "rows"))


def make(name, gpt, seed=0):
    """A decomposition of layer 1, untrained."""
    gen = common.generator(seed, "init")
    if name == "sae":
        return sae.SAE(sae.Config(F=40, k=6), D, gen, 1).requires_grad_(False)
    if name == "transcoder":
        return transcoder.Transcoder(transcoder.Config(F=40, k=6), D, gen, 1).requires_grad_(False)
    if name == "clt":
        return clt.CLT(3, D, clt.Config(F=24, variant="jumprelu", theta=0.2), gen, [1]).requires_grad_(False)
    if name in ("molt", "tied"):
        cfg = molt.Config(groups="9@2,7@3,8@1", theta=0.1, sum_to_weights=name == "tied")
        return molt.MOLT(D, cfg, gen, 1).requires_grad_(False)
    return baselines.SVD(1, gpt.h[1].mlp, 6)           # an SPD whose causal importances follow its components


def permuted(m, seed=5):
    """(the same units in another order, written in another way if the method has several; where each of them went)"""
    n, gen = copy.deepcopy(m), common.generator(seed, "order")
    if isinstance(m, clt.CLT):
        order = torch.randperm(m.theta_LF.shape[1], generator=gen)
        n.W_enc_LDF.data, n.theta_LF.data, n.b_enc_LF.data = (
            t[..., order] for t in (m.W_enc_LDF, m.theta_LF, m.b_enc_LF))
        for old, new in zip(m.W_dec, n.W_dec):
            new.data = old[:, order]
        order = torch.cat([order + i * len(order) for i in m.writers(1)])
    elif isinstance(m, molt.MOLT):
        ends, parts = m.rank_F.cumsum(0).tolist(), []
        order = torch.cat([torch.randperm(9, generator=gen), 9 + torch.randperm(7, generator=gen),
                           16 + torch.randperm(8, generator=gen)])
        for t in order.tolist():                        # U_t Q Q^T V_t is the same map
            s, r = slice(ends[t] - int(m.rank_F[t]), ends[t]), int(m.rank_F[t])
            Q = torch.linalg.qr(torch.randn(r, r, generator=gen)).Q
            parts.append((m.V[:, s] @ Q, Q.T @ m.U[s]))
        n.V.data, n.U.data = torch.cat([v for v, _ in parts], 1), torch.cat([u for _, u in parts])
        n.E.data, n.b_gate.data, n.theta.data = m.E[:, order], m.b_gate[order], m.theta[order]
    elif isinstance(m, baselines.SVD):
        orders = [torch.randperm(m.C, generator=gen) for _ in range(2)]
        for i, order in enumerate(orders):
            c = torch.randn(m.C, generator=gen)         # (c V, U / c), c of either sign, is the same component
            n.V[i].data, n.U[i].data = m.V[i][:, order] * c, m.U[i][order] / c.unsqueeze(1)
        order = torch.cat([orders[0], m.C + orders[1]])
    else:
        order = torch.randperm(len(m.W_enc), generator=gen)
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(n, name).data = getattr(m, name)[order]
    return n, order.argsort()


METHODS = ["sae", "transcoder", "clt", "molt", "svd"]


def test_hungarian_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    for trial in range(300):
        rows, columns = rng.integers(1, 6, 2)
        S = rng.integers(0, 3, (rows, columns)) if trial % 2 else rng.standard_normal((rows, columns))
        found = matching.hungarian(S)
        chosen = [(i, j) for i, j in enumerate(found) if j >= 0]
        assert len({j for _, j in chosen}) == len(chosen) == min(rows, columns)
        tall = S if rows <= columns else S.T
        best = max(sum(tall[i, j] for i, j in enumerate(p))
                   for p in itertools.permutations(range(max(S.shape)), len(tall)))
        assert sum(S[i, j] for i, j in chosen) == pytest.approx(best, abs=1e-9)
    order = rng.permutation(200)
    assert (matching.hungarian(np.eye(200)[order] + 0.1 * rng.random((200, 200))) == order).all()
    assert matching.hungarian(np.zeros((0, 3))).tolist() == [] and matching.hungarian(np.zeros((2, 0))).tolist() == [-1, -1]


@pytest.mark.parametrize("name", METHODS + ["tied"])
def test_similarity_is_that_of_the_explicit_matrices(gpt, name):
    m, n = make(name, gpt), make(name, gpt, seed=1) if name != "svd" else permuted(make(name, gpt))[0]

    def explicit(m):
        """What each unit reads and writes, or its map, flat; a list per block."""
        if name == "clt":
            return [(m.W_enc_LDF[i].T, torch.cat([m.W_dec[l][i] for l in range(i, 3)], 1)) for i in (0, 1)]
        if name in ("molt", "tied"):                    # a tied one's V also reads a constant 1
            ends = m.rank_F.cumsum(0).tolist()
            return [torch.stack([(m.V[:D, e - r:e] @ m.U[e - r:e]).flatten() for e, r in zip(ends, m.rank_F.tolist())])]
        if name == "svd":
            return [torch.einsum("ic,co->cio", V, U).flatten(1) for V, U in zip(m.V, m.U)]
        return [(m.W_enc, m.W_dec)]
    every = lambda a, b: cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1)
    for a, b, one, other in zip(matching.blocks(m), matching.blocks(n), explicit(m), explicit(n), strict=True):
        S, least = matching.similarity(a, b)
        if name in ("molt", "tied", "svd"):
            assert torch.allclose(S, every(one, other), atol=1e-5)
            assert name == "svd" or torch.equal(S, least)
            assert (least.abs() >= S.abs() - 1e-5).all() and (least.sign() == S.sign()).all()
        else:
            E, W = (every(x, y) for x, y in zip(one, other))
            assert torch.allclose(S, (E + W) / 2, atol=1e-5) and torch.allclose(least, torch.minimum(E, W), atol=1e-5)
    assert torch.cat([b.unit_n for b in matching.blocks(m)]).tolist() == list(range(len(m.params_F)))


@pytest.mark.parametrize("name", METHODS + ["tied"])
def test_over_the_inputs_the_cosine_is_that_of_what_two_units_get_at_each_token(gpt, rows, name):
    m, n = make(name, gpt), make(name, gpt, seed=1) if name != "svd" else permuted(make(name, gpt))[0]
    x0, x, h = gpt.prefix(rows, 0)[0], gpt.prefix(rows, 1)[0], gpt.h[1].mlp.c_fc(gpt.prefix(rows, 1)[0])
    inputs = {"sae": [gpt.h[1].mlp(x) - m.b_dec] if name == "sae" else 0, "clt": [x0, x], "transcoder": [x],
              "svd": [x, gelu(h, approximate="tanh")], "molt": [(x - m.x_mean) / m.x_std] if name == "molt" else 0,
              "tied": [x]}[name]
    As, Bs = (matching.with_inputs(matching.blocks(k), k, gpt, rows) for k in (m, n))
    for a, b, seen in zip(As, Bs, inputs, strict=True):
        seen = seen[:, 1:].flatten(0, 1)
        seen = seen - seen.mean(0) if m.kind == "dictionary" else seen       # the rest is in a unit's bias
        got, (one, other) = matching.cosines(a.over_inputs().read, b.over_inputs().read), (seen @ k.read.T for k in (a, b))
        assert torch.allclose(got, cosine_similarity(one.T.unsqueeze(1), other.T.unsqueeze(0), dim=-1), atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_permuted_copy_is_found_again(gpt, rows, name):
    """Whole, by permutation and, where a unit can be written in several ways, with other signs, sizes and bases."""
    m = make(name, gpt)
    n, went = permuted(m)
    found = stability.stability([m, n, m], gpt, rows, rows, common.generator(0, "align"))
    for space in ("weights", "inputs", "activations"):
        for key in ("similarity", "similarity_alive", "shared_0.7", "shared_0.9", "survival_2", "shared_written",
                    "similarity_corrected", "shared_rate1"):
            assert found[f"{space}_{key}"] == pytest.approx(1, abs=1e-4), (space, key)
        assert found[f"null_{space}_similarity"] < 0.8 and found[f"{space}_similarity_se"] == pytest.approx(0, abs=1e-4)
    assert found["activations_jaccard_0.5"] == found["activations_shared_if_weights"] == 1
    assert found["null_activations_shared_if_weights"] < 0.3
    assert found["weights_same_mate"] == (None if name == "molt" else 1)
    assert name == "molt" or found["weights_writes"] == pytest.approx(1, abs=1e-5)
    assert found["weights_most"] == pytest.approx(1, abs=1e-5) and found["null_weights_most"] < 0.9
    for key in ("fve", "error_cosine"):
        assert found[f"function_{key}"] == pytest.approx(1, abs=1e-5)
        assert found[f"function_{key}_se"] == pytest.approx(0, abs=1e-5) == found["activations_jaccard_0.5_se"]
    assert found["function_fve_independent"] < 0.9999
    by_w = matching.weight_matches(matching.blocks(m), matching.blocks(n))
    assert torch.equal(by_w.mate(len(went)), went)
    for block in matching.blocks(m) * (len(matching.blocks(m)) > 1):
        assert found[f"weights_{block.name}_shared_0.7"] == 1 and found[f"activations_{block.name}_shared_0.7"] == 1


def test_each_matrix_of_its_own_is_told(gpt, rows):
    m = make("svd", gpt)
    n = copy.deepcopy(m)
    n.V[1].data, n.U[1].data = randn("V", M, m.C), randn("U", m.C, D)
    found = stability.stability([m, n], gpt, rows, rows, common.generator(0, "align"))
    assert found["weights_in_shared_0.7"] == 1 and found["weights_out_shared_0.7"] == 0
    assert found["weights_shared_0.7"] == 0.5 and found["weights_out_similarity"] < 0.5 < found["weights_similarity"]
    m.requires_grad_(True)                              # as it is after training
    assert not matching.weight_matches(matching.blocks(m), matching.blocks(n)).value_P.requires_grad


def test_written_is_the_sum_of_all_contributions(gpt, rows):
    m = make("sae", gpt)
    a = record(m, gpt, rows, rows.new_zeros(*rows.shape, 0))
    x, f = evals.clean(m, gpt, rows, 1)
    want = m.contrib(1, f, x, torch.arange(40))[:, 1:].norm(dim=-1).sum((0, 1))
    got, few = stability.total_written(m, a), a.on() <= 64        # of more tokens, 64 are looked at
    assert few.any() and torch.allclose(got[few], want[few], rtol=1e-4) and torch.allclose(got, want, rtol=0.3)


def block(read, write, kind="dictionary"):
    at = torch.arange(len(read))
    return Block("all", kind, at, read, write, at)


def tell(As, Bs, on=(1000, 1000), gen=None, weight=None):
    """`with_null` of two blocks, all of whose units are alike."""
    n = [len(As.unit_n), len(Bs.unit_n)]
    on_SF = [torch.full((k,), o) if isinstance(o, int) else o for k, o in zip(n, on)]
    alive = [B.where(o >= evals.ALIVE) for B, o in zip((As, Bs), on_SF)]
    null, = matching.null_blocks([Bs], gen or common.generator(0, "null"))
    real, chance = (matching.weight_matches([alive[0]], [B]) for B in (alive[1], null.where(on_SF[1] >= evals.ALIVE)))
    both = lambda m: {(0, 1): m, (1, 0): m.back()}
    return stability.with_null(both(real), both(chance), on_SF, weight or [torch.ones(k) for k in n])


@pytest.mark.parametrize("kind", ["dictionary", "component"])
def test_random_units_are_the_null(kind):
    A, B = (block(randn(f"r{i}", 300, 24), randn(f"w{i}", 300, 24), kind) for i in range(2))
    found = tell(A, B)
    assert found["similarity"] > 0.15 and abs(found["similarity_corrected"]) < 0.02
    assert found["shared_0.7"] == found["null_shared_0.7"] == found["survival_1"] == 0
    few = torch.linalg.qr(randn("few", 24, 6)).Q.T      # and if all lie in 6 of the 24 dimensions
    A, B = (block(randn(f"r{i}", 300, 6) @ few, randn(f"w{i}", 300, 6) @ few, kind) for i in range(2))
    near = tell(A, B)
    assert near["similarity"] > found["similarity"] + 0.2 and abs(near["similarity_corrected"]) < 0.05


def test_redrawn_rows_have_the_same_lengths_and_moments():
    rows = randn("x", 4000, 5) @ randn("mix", 5, 8) + 2 * randn("mean", 8)
    new = matching.redraw(rows, common.generator(0, "redraw"))
    assert torch.allclose(new.norm(dim=1), rows.norm(dim=1), rtol=1e-4)
    a, b = normalize(rows, dim=1), normalize(new, dim=1)
    assert (a.mean(0) - b.mean(0)).abs().max() < 0.04 and (a.T @ a - b.T @ b).abs().max() / 4000 < 0.04
    assert torch.linalg.svdvals(new)[6:].max() < 1e-2   # 5 directions and the mean
    assert (new - rows).norm() > rows.norm() / 2


def test_a_planted_overlap_is_recovered_and_every_alive_unit_counts():
    """30 of 80 units are shared; A has 20 dead ones, of which 10 would have been."""
    A, B = (block(randn(f"r{i}", 80, 40), randn(f"w{i}", 80, 40)) for i in range(2))
    order = torch.randperm(80, generator=common.generator(0, "order"))
    B.read[order[:30]], B.write[order[:30]] = A.read[:30], A.write[:30] + 0.1 * randn("noise", 30, 40)
    found = tell(A, B)
    assert found["shared_0.7"] == 30 / 80 == found["survival_1"] and found["null_shared_0.7"] == 0
    assert found["similarity_shared"] > 0.95 > 0.75 > found["similarity"] == found["similarity_alive"]
    on = torch.full((80,), 500)
    on[20:40] = evals.ALIVE - 1
    found = tell(A, B, on=(on, 500))
    assert found["shared_0.7"] == pytest.approx((20 / 60 + 20 / 80) / 2)
    assert found["similarity_alive"] == pytest.approx(found["similarity"] * (1 + 60 / 80) / 2)
    B.write[order[:5]] *= -1                            # read alike, write the opposite: not the same unit
    assert tell(A, B)["shared_0.7"] == 25 / 80
    assert matching.matched_by_one_side([A], [B])["same_mate"] < matching.matched_by_one_side([A], [A])["same_mate"] == 1
    A, B = (block(x.read, x.write, "component") for x in (A, B))
    assert tell(A, B)["shared_0.7"] == 25 / 80          # (v, u) and (v, -u) are opposites
    B.read[order[:5]] *= -1
    assert tell(A, B)["shared_0.7"] == 30 / 80          # (v, u) and (-v, -u) are not


def test_units_of_different_blocks_are_never_matched():
    parts = [block(randn(f"r{i}", 10, 8), randn(f"w{i}", 10, 8), "component") for i in range(2)]
    parts[1].unit_n = parts[1].unit_n + 10
    crossed = [matching.replace(b, unit_n=a.unit_n) for a, b in zip(parts, parts[::-1])]
    found = matching.weight_matches(parts, crossed)
    assert ((found.one_P < 10) == (found.other_P < 10)).all() and (found.value_P < 0.99).all()


def test_told_by_hand():
    """Two seeds, 8 and 4 units; pairs (0, 1) and (2, 3) are shared, (4, 0) is matched, (5, 2) is below."""
    pairs = Matches(*map(torch.tensor, ([0, 2, 4, 5], [1, 3, 0, 2], [0.9, 0.8, 0.6, 0.4], [0.95, 0.75, 0.55, 0.1])))
    on = [torch.tensor([800, 1, 600, 500, 400, 300, 200, 100]), torch.tensor([10, 40, 30, 20])]
    weight = [torch.arange(8.), torch.ones(4)]
    got = stability.agreement({(0, 1): pairs, (1, 0): pairs.back()}, on, weight)
    assert got["similarity"] == pytest.approx(0.675) and got["similarity_shared"] == pytest.approx(0.85)
    assert got["similarity_alive"] == pytest.approx((2.7 / 7 + 2.7 / 4) / 2)
    for least, n in ((0.5, 3), (0.7, 2), (0.9, 1)):
        assert got[f"shared_{least}"] == pytest.approx((n / 7 + n / 4) / 2)
    assert got["survival_1"] == pytest.approx((2 / 7 + 2 / 4) / 2)
    assert got["shared_written"] == pytest.approx((2 / (0 + 2 + 3 + 4 + 5 + 6 + 7) + 2 / 4) / 2)
    quarters = [got[f"shared_rate{q}"] for q in (4, 3, 2, 1)]                   # 0, 2 | 3, 4 | 5, 6 | 7; 1 | 2 | 3 | 0
    assert quarters == [1, 0, 1 / 2, 0]


def test_survival_and_jackknife():
    """Unit u of 4 is shared by all pairs of seeds in sharing[u]."""
    sharing, on = [{0, 1, 2}, {0, 1}, {1, 2}, set()], [torch.full((4,), 99)] * 3
    pairs = {}
    for s, t in itertools.permutations(range(3), 2):
        least = torch.tensor([0.8 if {s, t} <= seeds else 0.1 for seeds in sharing])
        pairs[s, t] = Matches(torch.arange(4), torch.arange(4), least, least)
    found = stability.with_null(pairs, pairs, on, [torch.ones(4)] * 3)
    shared = {(0, 1): 2 / 4, (1, 2): 2 / 4, (0, 2): 1 / 4}
    assert found["shared_0.7"] == pytest.approx(sum(shared.values()) / 3)
    assert found["survival_1"] == pytest.approx((2 + 3 + 2) / 12) and found["survival_2"] == pytest.approx(1 / 4)
    left, whole = np.array(list(shared.values())), sum(shared.values()) / 3         # without one seed: one pair
    assert found["shared_0.7_se"] == pytest.approx(math.sqrt(2 / 3 * ((left - whole)**2).sum()))
    assert found["similarity_corrected"] == 0 and "survival_1_se" not in found


def test_over_pairs_leaves_out_seeds():
    got = stability.over_pairs(dict(a={(0, 1): 1., (0, 2): 2., (1, 2): 6.}, b={(0, 1): 1., (0, 2): None, (1, 2): 3.}), 3)
    assert got["a"] == 3 and got["a_se"] == pytest.approx(math.sqrt(2 / 3 * (4 + 1 + 9)))
    assert got["b"] == 2 and "b_se" not in got


def recording(value_NF):
    unit, token = value_NF.T.nonzero(as_tuple=True)
    value = value_NF[token, unit]
    return Active(unit, token, value, value.abs(), torch.arange(value_NF.shape[1]), value_NF[:, :1],
                        torch.zeros(len(value_NF), 0, dtype=torch.bool))


def sparse(name, N, F, share=0.1):
    return randn(name, N, F).abs() * (torch.rand(N, F, generator=common.generator(1, name)) < share)


def test_correlation_jaccard_and_shift_are_those_of_the_dense_matrices():
    x, y = sparse("x", 500, 6), sparse("y", 500, 7)
    y[:, 3] = x[:, 4] * 2 + 0.3 * y[:, 3]
    x[:, 1], y[:, 2] = 5., 0.                           # constants
    a, b, i, j = recording(x), recording(y), torch.tensor([0, 1, 4, 5]), torch.tensor([6, 2, 3])
    got = matching.correlation(a, b, i, j, chunk=64)
    for (n, p), (k, q) in itertools.product(enumerate(i.tolist()), enumerate(j.tolist())):
        want = 0 if p == 1 or q == 2 else np.corrcoef(x[:, p], y[:, q])[0, 1]
        assert got[n, k].item() == pytest.approx(want, abs=1e-5)
    found = matching.activation_matches(a, b, [i], [j])
    J = matching.jaccard(a, b, found)
    for p, q, value in zip(found.one_P, found.other_P, J.tolist()):
        on = x[:, p] > 0, y[:, q] > 0
        assert value == pytest.approx(((on[0] & on[1]).sum() / (on[0] | on[1]).sum()).item())
    assert (4, 3) in found.pairs(0.7)
    later = matching.shifted(a, 130)
    assert torch.equal(later.at(torch.arange(6), torch.arange(500).unsqueeze(1)), x.roll(130, 0))


def test_activations_found_again_shuffled_and_signed():
    x = sparse("x", 3000, 50)
    order, every = torch.randperm(50, generator=common.generator(0, "order")), [torch.arange(50)]
    a, b = recording(x), recording(3 * x[:, order])
    same = matching.activation_matches(a, b, every, every)
    assert torch.equal(same.mate(50), order.argsort()) and same.least_P.min() > 0.9999
    assert matching.jaccard(a, b, same).min() == 1
    for other in (matching.shifted(b, 700), recording(x[torch.randperm(3000, generator=common.generator(0, "t"))])):
        chance = matching.activation_matches(a, other, every, every)
        assert chance.value_P.max() < 0.2 and matching.jaccard(a, other, chance).max() < 0.3
    signed = x * randn("sign", 3000, 1).sign()
    flipped = matching.activation_matches(recording(signed), recording(-signed[:, order]), every, every)
    assert torch.equal(flipped.mate(50), order.argsort()) and flipped.least_P.min() > 0.9999
    half = x.clone()
    half[:, 25:] = sparse("other", 3000, 25)
    assert matching.activation_matches(a, recording(half), every, every).pairs(0.7) == {(i, i) for i in range(25)}


class Fake:
    """y_hat = y + size * e + its own noise, whatever f."""
    layers, kind, matrices = [1], "dictionary", ()

    def __init__(self, gpt, name, common_size=0., own=0.3):
        self.mlp, self.name, self.common, self.own = gpt.h[1].mlp, name, common_size, own

    def encode(self, layer, x_BTD, mlp):
        return x_BTD.new_ones(*x_BTD.shape[:2], 1)

    def decode(self, layer, f_BTF, x_BTD):
        noise = lambda name: randn(name, *x_BTD.shape)
        return self.mlp(x_BTD) + self.common * noise("both") + self.own * noise(self.name)


def test_function_agreement_against_plain_arithmetic(gpt, rows):
    apart = [Fake(gpt, "one"), Fake(gpt, "two")]
    got = stability.function_agreement(apart, gpt, rows, batch=60)
    x = gpt.prefix(rows, 1)[0]
    y, (p, q) = gpt.h[1].mlp(x)[:, 1:], (m.decode(1, None, x)[:, 1:] for m in apart)
    centred = lambda y_hat: (y_hat - y_hat.mean((0, 1))).square().sum()
    fve = [1 - (p - q).square().sum() / centred(y_hat) for y_hat in (p, q)]
    assert got["fve"] == pytest.approx((sum(fve) / 2).item(), abs=1e-5)
    want = cosine_similarity((y - p).flatten(), (y - q).flatten(), 0).item()
    assert got["error_cosine"] == pytest.approx(want, abs=1e-5)
    assert abs(got["error_cosine"]) < 0.03 and got["fve"] == pytest.approx(got["fve_independent"], abs=0.01)
    alike = stability.function_agreement([Fake(gpt, n, 0.3) for n in ("one", "two")], gpt, rows, batch=60)
    assert alike["error_cosine"] == pytest.approx(0.5, abs=0.05) and alike["fve"] > alike["fve_independent"] + 0.01


class Positions:
    """Units that are on at one place of a row each, 2, 5 and 6."""
    layers, kind, matrices, W_dec = [1], "dictionary", (), torch.eye(T, D)

    def unit_directions(self):
        return [("all", torch.eye(T, D), self.W_dec, None)]

    def unit_inputs(self, gpt, rows_RT):
        return [gpt.prefix(rows_RT, 1)[0].flatten(0, 1)]

    def encode(self, layer, x_BTD, mlp):
        return torch.eye(T)[[0, 0, 2, 0, 0, 5, 6] + [0] * (T - 7)].expand(len(x_BTD), T, T) * (torch.arange(T) > 0)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W_dec

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[units]


def test_the_null_of_activations_keeps_positions(gpt, rows):
    found = stability.stability([Positions()] * 2, gpt, rows, rows, common.generator(0, "align"))
    assert found["activations_shared_0.7"] == found["null_activations_shared_0.7"] == 1
    assert found["null_activations_similarity"] == pytest.approx(1, abs=1e-5) and found["null_weights_shared_0.7"] == 0


def test_alive_is_what_is_on_in_fit(gpt, rows):
    """Units that go silent elsewhere still count, as not found; those that are rarely on in fit do not."""
    m = make("sae", gpt)
    on_F = lambda idx: (evals.clean(m, gpt, idx, 1)[1][:, 1:] > 0).sum((0, 1))
    few = next(idx for idx in rows.split(2) if (on_F(idx) == 0).any())
    for fit, other in ((rows, few), (few, rows)):
        alive, seen = on_F(fit) >= evals.ALIVE, on_F(other) > 0
        found = stability.stability([m, m], gpt, fit, other, common.generator(0, "align"))
        assert found["weights_shared_0.7"] == 1
        assert found["activations_shared_0.7"] == pytest.approx((alive & seen).sum().item() / alive.sum().item())
    assert alive.sum() < (on_F(rows) >= evals.ALIVE).sum()
    alive, seen = on_F(rows) >= evals.ALIVE, on_F(few) > 0
    assert (alive & ~seen).any()


def test_nothing_alive_is_no_number(gpt, rows):
    m, n = make("sae", gpt), make("sae", gpt, 1)
    n.b_enc.data.fill_(-1e9), n.b_dec.data.fill_(0.7)
    y_hat = m.decode(1, *evals.clean(m, gpt, rows, 1)[::-1])[:, 1:].double()
    fve = 1 - (y_hat - 0.7).square().sum() / (y_hat - y_hat.mean((0, 1))).square().sum()
    found = stability.stability([m, n], gpt, rows, rows, common.generator(0, "align"))
    assert found["weights_similarity"] is None and found["activations_similarity"] is None
    assert found["weights_shared_0.7"] == 0 and found["activations_shared_if_weights"] is None
    assert all(v is None or math.isfinite(v) for v in found.values())
    assert found["function_fve"] == pytest.approx(fve.item(), rel=1e-4)         # of a constant nothing is explained


def test_looking_changes_nothing_and_repeats(gpt, rows):
    ms = [make("clt", gpt, seed) for seed in range(2)]
    before, state = [copy.deepcopy(m.state_dict()) for m in ms], torch.get_rng_state()
    found = [stability.stability(ms, gpt, rows, rows, common.generator(0, "align")) for _ in range(2)]
    assert found[0] == found[1] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, b[k]) for m, b in zip(ms, before) for k, v in m.state_dict().items())
    assert all(v is None or isinstance(v, (int, float)) and math.isfinite(v) for v in found[0].values())
    plain = {key for key in found[0] if not key.startswith(("null", "function")) and not key.endswith("corrected")}
    assert {key for key in plain if f"null_{key}" not in found[0]} == set()        # a number without its null


def test_what_is_measured_has_its_columns(gpt, rows):
    ms, arena = [make("sae", gpt, seed) for seed in range(3)], SimpleNamespace(gpt=gpt, fit=(rows, None), test=(rows, None))
    numbers, details = stability.measure(ms, arena, common.generator(0, "measure"))
    assert list(numbers) == list(stability.COLUMNS) and not numbers.keys() & details.keys()
    assert all(number is not None for number in numbers.values())
    found = stability.stability(ms, gpt, rows, rows, common.generator(0, "measure"))
    assert found.items() <= (numbers | details).items()
    assert numbers["activations_survival"] == found["activations_survival_2"]
    assert details["null_activations_survival"] == found["null_activations_survival_2"]


def test_no_matching_of_similarities_that_are_no_numbers():
    with pytest.raises(ValueError, match="NaN"):
        matching.hungarian([[1., 2.], [math.nan, 0.]])
