"""Sizes against brute force, closed forms and planted units: copied, split, merged, rotated, random, duplicated."""
import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import baselines
import common
import evals
import molt
import sae
import spd
import transcoder
from conftest import noisy_gpt
from metrics import concepts, matching, sizes, stability
from metrics.matching import Block
from metrics.recording import Active, record_by_sign
from test_planted import K, labelled, plant
from test_planted import T as PLANTED_T

D, M, T, V = 16, 24, 14, 30


def randn(name, *shape):
    return torch.randn(*shape, generator=common.generator(0, name))


def gen(name="gen"):
    return common.generator(0, name)


@pytest.fixture(scope="module")
def gpt():
    return noisy_gpt(3, D, M, T, V)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, V, (40, T), generator=common.generator(0, "rows"))


class Components(spd.SPD):
    """Components of random directions, with importances that follow from x, and biases of the MLP."""
    def __init__(self, gpt, C, name, graded=False):
        mlp = gpt.mlp(1)
        cfg = spd.Config(C=C, ci_hidden=1)
        super().__init__([mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias], cfg, gen(name), 1, mlp.act)
        self.requires_grad_(False)
        self.G, self.graded = randn(f"gates {name}", D, 2 * C), graded

    def encode(self, layer, x_BTD, mlp):
        z = x_BTD @ self.G / D**0.5 - 0.7
        return z.clamp(0, 1) if self.graded else (z > 0).float()


def make(kind, gpt, F, name, graded=False):
    """An untrained decomposition of layer 1."""
    if kind == "sae":
        return sae.SAE(sae.Config(F=F, k=4), D, gen(name), 1).requires_grad_(False)
    if kind == "transcoder":
        return transcoder.Transcoder(transcoder.Config(F=F, k=4), D, gen(name), 1).requires_grad_(False)
    if kind == "neurons":
        return baselines.Neurons(1, gpt.mlp(1), 4)
    if kind == "molt":
        return molt.MOLT(D, molt.Config(groups=f"{F - 3}@2,3@1", theta=0.1), gen(name), 1).requires_grad_(False)
    return Components(gpt, F, name, graded)


KINDS = ["sae", "transcoder", "neurons", "molt", "component"]


# ---------------------------------------------------------------------------------------- alive
class Fixed:
    """Units whose f at a token is a table's row, by the token's id."""
    layers, kind, matrices = [1], "dictionary", ()

    def __init__(self, f_VF, gpt):
        self.f_VF, self.ids = f_VF, None
        self.params_F, self.key_VD = torch.ones(f_VF.shape[1]), gpt.wte.weight

    def unit_directions(self):
        return [("a", torch.eye(D)[:3], torch.eye(D)[:3], None), ("b", torch.eye(D)[:2], torch.eye(D)[:2], None)]

    def encode(self, layer, x_BTD, mlp):
        return self.f_VF[self.ids[:len(x_BTD)]]


def test_alive_by_every_rule_counted_by_hand(gpt, rows):
    f_VF = torch.zeros(V, 5)
    f_VF[:, 0] = 0.5                                    # at every token
    f_VF[:, 1] = 1e-7                                   # at every token, too little for the mean and for 0.1
    f_VF[3, 2] = 0.2                                    # at one kind of token
    f_VF[4, 3] = 0.05                                   # and never above 0.1
    m = Fixed(f_VF, gpt)
    m.ids = rows
    m.raw = Fixed(f_VF, gpt)
    m.raw.ids, m.f_VF = rows, (f_VF > 0.01).float()     # m rounds
    one = rows[:16]                                     # one batch: ids are those of its rows
    m.ids = m.raw.ids = one
    got = sizes.alive_counts(m, gpt, one)
    often = [(one[:, 1:] == token).sum().item() >= evals.ALIVE for token in (3, 4)]
    assert got["tokens"] == 16 * (T - 1) and got["units"] == 5 and got["units_a"] == 3 and got["units_b"] == 2
    assert got["alive"] == 1 + sum(often)
    assert got["alive_mean"] == 3 and got["alive_rate"] == 4 and got["alive_once"] == 2
    assert got["alive_rate_a"] == 3 and got["alive_rate_b"] == 1 and got["alive_once_b"] == 0
    means = [0.5, 0.2 * (one[:, 1:] == 3).float().mean().item(), 0.05 * (one[:, 1:] == 4).float().mean().item(), 1e-6]
    logs = np.log10(sorted(means))
    assert got["cliff"] == pytest.approx(np.diff(logs).max(), abs=1e-4) and got["cliff_units"] == 3 - np.diff(logs).argmax()


def test_the_cliff_is_the_largest_gap_and_chance_has_a_low_one():
    means = 10 ** torch.tensor([-1., -1.2, -1.3, -4.0, -4.1, -9])
    assert sizes.cliff(means[torch.randperm(6, generator=gen())]) == (pytest.approx(2.7, abs=1e-5), 3)
    assert sizes.cliff(torch.tensor([1., 0.])) == (pytest.approx(6.), 1)             # below the least counts as the least
    smooth = 10 ** (0.5 * randn("log", 400) - 2)
    assert sizes.cliff(smooth).decades == pytest.approx(sizes.null_cliff(smooth), abs=0.3)
    two = torch.cat([10 ** (0.1 * randn("a", 200) - 1), 10 ** (0.1 * randn("b", 200) - 4)])
    assert sizes.cliff(two).units == 200 and sizes.cliff(two).decades > 1.5 * sizes.null_cliff(two)
    assert sizes.cliff(torch.ones(1)) == (0, 1) and sizes.null_cliff(torch.ones(1)) == 0


# ------------------------------------------------------------------------------------ insertion
def explicit_with_one_more(kind, small, large, unit, gpt, rows):
    """What the small one writes with one unit of the large one added, made as a decomposition of its own: (N, D)."""
    mlp, (x, f) = gpt.mlp(1), evals.clean(small, gpt, rows, 1)
    f_more = evals.clean(large, gpt, rows, 1)[1]
    if kind == "component":
        C, C_large, n = small.C, large.C, copy.deepcopy(small)
        which, c = int(unit >= C_large), unit % C_large
        V, U = [v.data for v in small.V], [u.data for u in small.U]
        masks = list(f.split(C, -1))
        for i in range(2):              # one more column for each matrix: the unit's own, or one that is masked
            V[i] = torch.cat([V[i], large.V[i][:, c:c + 1]], 1)
            U[i] = torch.cat([U[i], large.U[i][c:c + 1]])
            g = f_more[..., unit:unit + 1]
            masks[i] = torch.cat([masks[i], g if i == which else 0 * g], -1)
        W_in, W_out = (torch.einsum("btc,ic,co->btio", mask, v, u) for mask, v, u in zip(masks, V, U))
        h = mlp.act(torch.einsum("bti,btio->bto", x, W_in) + mlp.c_fc.bias)
        y = torch.einsum("bti,btio->bto", h, W_out) + mlp.c_proj.bias
    elif kind == "molt":
        ends = large.rank_F.cumsum(0).tolist()
        own = slice(ends[unit] - int(large.rank_F[unit]), ends[unit])
        product = large.V[:, own] @ large.U[own] * large.y_std
        y = small.decode(1, f, x) + f_more[..., unit:unit + 1] * (large.read(x) @ product)
    elif kind == "neurons":
        z = mlp.c_fc(x)[..., unit:unit + 1]
        y = small.decode(1, f, x) + mlp.act(z) * (f_more[..., unit:unit + 1] > 0) * mlp.c_proj.weight[unit]
    else:
        y = small.decode(1, f, x) + f_more[..., unit:unit + 1] * large.W_dec[unit] / large.scale
    return y[:, 1:].flatten(0, 1), mlp(x)[:, 1:].flatten(0, 1), small.decode(1, f, x)[:, 1:].flatten(0, 1)


@pytest.mark.parametrize("kind", [*KINDS, "graded"])
def test_insertion_is_what_another_pass_with_one_more_unit_measures(gpt, rows, kind, monkeypatch):
    monkeypatch.setattr(sizes, "TOKENS", 100)           # several chunks of everything
    monkeypatch.setattr(sizes, "ENTRIES", 37)
    monkeypatch.setattr(sizes, "GROUP", 3)
    kind, graded = ("component", True) if kind == "graded" else (kind, False)
    small, large = make(kind, gpt, 9, "small", graded), make(kind, gpt, 14, "large", graded)
    one, two = (sizes.look_at(m, gpt, rows, rows) for m in (small, large))
    effect_RL = sizes.insertion_effects(one, two, gpt.mlp(1), T)
    assert effect_RL.shape == (40, two.recording.F) and (effect_RL != 0).any(0).float().mean() > 0.5
    for unit in range(two.recording.F):
        y_more, y, y_small = explicit_with_one_more(kind, small, large, unit, gpt, rows)
        want = ((y - y_more).square().sum(1) - (y - y_small).square().sum(1)).view(40, T - 1).sum(1)
        assert torch.allclose(effect_RL[:, unit].float(), want, rtol=1e-3, atol=1e-3), unit
    averages = sizes.average_effects(effect_RL, two.recording.on(), T, gen())
    assert torch.allclose(averages.mean_L * 40 * (T - 1), effect_RL.sum(0))
    on_L = two.recording.on()
    assert torch.allclose((averages.where_on_L * on_L)[on_L > 0], effect_RL.sum(0)[on_L > 0])
    assert (averages.low_L <= averages.mean_L + 1e-12).all() and (averages.high_L >= averages.mean_L - 1e-12).all()


@pytest.mark.parametrize("kind", ["sae", "transcoder", "component"])
def test_units_by_chance_write_what_is_drawn_for_them(kind, gpt, rows):
    """With its own directions a stand-in adds what its decomposition does, and without any it adds nothing."""
    one, two = (sizes.look_at(make(kind, gpt, n, f"chance {n}"), gpt, rows, rows) for n in (9, 14))
    effect = lambda large: sizes.insertion_effects(one, large, gpt.mlp(1), T)
    own = two._replace(m=sizes.Drawn(two, two.blocks))
    assert torch.allclose(effect(own), effect(two), rtol=1e-4, atol=1e-4)
    silent = [dataclasses.replace(block, write=0 * block.write) for block in two.blocks]
    assert effect(two._replace(m=sizes.Drawn(two, silent))).abs().max() < 1e-4 * effect(two).abs().max()

    # by chance they write what similarity is told of them, as often, at the wrong text
    null = sizes.by_chance(two, 40, T, gen())
    assert null.m.blocks is null.blocks and not torch.equal(null.blocks[0].write, two.blocks[0].write)
    assert torch.equal(null.recording.on(), two.recording.on()) and torch.equal(null.is_alive_F, two.is_alive_F)


def test_the_interval_is_the_bootstraps():
    effect_RL = randn("effects", 60, 4).double() + torch.tensor([0., 0.5, -0.5, 0])
    effect_RL[:, 3] = 0
    effect_RL[7, 3] = -5                                # one row alone never makes a unit novel
    got = sizes.average_effects(effect_RL, torch.full((4,), 60), 2, gen())
    for unit in range(3):
        low, high = evals.interval(lambda mean: mean, effect_RL[:, unit])
        assert got.low_L[unit] == pytest.approx(low, abs=0.05) and got.high_L[unit] == pytest.approx(high, abs=0.05)
    assert (got.high_L < 0).tolist() == [False, False, True, False]
    assert (got.mean_L < 0).sum() >= 2 and sizes.incompleteness(got, torch.ones(4, dtype=torch.bool)) == 1 / 4
    assert sizes.incompleteness(got, torch.zeros(4, dtype=torch.bool)) is None


# ------------------------------------------------------------------------------------ similarity
def sized(read, write, kind="dictionary", on_NF=None, m=None):
    """A Sized of these units, all alive, which say on_NF."""
    n = len(read)
    at = torch.arange(n)
    on_NF = sparse(f"on {n}", 300, n) if on_NF is None else on_NF
    return sizes.Sized(m, [Block("all", kind, at, read, write, at)], recording(on_NF), torch.ones(n, dtype=torch.bool),
                       torch.zeros(len(on_NF), write.shape[1]))


def recording(value_NF, labels=None):
    unit, token = value_NF.T.nonzero(as_tuple=True)
    value = value_NF[token, unit]
    labels = torch.zeros(len(value_NF), 0, dtype=torch.bool) if labels is None else labels
    return Active(unit, token, value, value.abs(), torch.arange(value_NF.shape[1]), value_NF[:, :1], labels)


def sparse(name, N, F, share=0.1):
    return randn(name, N, F).abs() * (torch.rand(N, F, generator=common.generator(1, name)) < share)


def random_sized(name, n, width=64, kind="dictionary"):
    return sized(randn(f"r{name}", n, width), randn(f"w{name}", n, width), kind, sparse(name, 300, n))


def stay(one, two, by="both"):
    """All that is said about similar units."""
    sim_SL = sizes.similarities(one, two, by)
    found = sizes.split_fractions(sim_SL, one.is_alive_F, two.is_alive_F)
    return found | dict(canonicity=sizes.canonicity(one, two, sim_SL))


@pytest.mark.parametrize("kind", ["dictionary", "component"])
def test_a_dictionary_itself_permuted_and_grown_is_canonical(kind):
    one = random_sized("a", 30, kind=kind)
    more = random_sized("b", 20, kind=kind)
    order = torch.randperm(50, generator=gen("order"))
    x = one.recording.at(torch.arange(30), torch.arange(300).unsqueeze(1))
    y = more.recording.at(torch.arange(20), torch.arange(300).unsqueeze(1))
    block, extra = one.blocks[0], more.blocks[0]
    sign = -1 if kind == "component" else 1             # (v, u) and (-v, -u) are one component
    two = sized(sign * torch.cat([block.read, extra.read])[order], 3 * sign * torch.cat([block.write, extra.write])[order],
                kind, sign * torch.cat([x, y], 1)[:, order])
    for by in ("writes", "both", "values"):
        got = stay(one, two, by)
        assert got["canonicity"] == got["matched"] == got["one_to_one"] == 1 and got["new"] == 20 / 50
        assert got["split"] == got["split_if_matched"] == got["one_to_many"] == got["many_to_one"] == 0
    null = stay(one, stability.by_chance(two, 30, 11, gen()))
    assert null["matched"] == null["canonicity"] == 0 and null["new"] == 1 and null["split_if_matched"] is None
    # alike in weights, but on elsewhere: found, not canonical
    assert stay(one, two._replace(recording=matching.shifted(two.recording, 130)))["one_to_one"] == 1
    assert stay(one, two._replace(recording=matching.shifted(two.recording, 130)))["canonicity"] == 0
    assert stay(one, two._replace(recording=matching.shifted(two.recording, 130)), "values")["matched"] == 0
    # what is dead on either side is no counterpart
    dead = two._replace(is_alive_F=order >= 10)
    assert stay(one, dead)["canonicity"] == 20 / 30 and stay(one, dead)["new"] == 20 / 40
    few = one._replace(is_alive_F=torch.arange(30) < 15)
    assert stay(few, two)["canonicity"] == 1 and stay(few, two)["new"] == 35 / 50
    assert stay(few._replace(is_alive_F=torch.zeros(30, dtype=torch.bool)), two)["canonicity"] is None


def test_split_merged_rotated_and_random_units_are_told_apart():
    one = random_sized("a", 30)
    block, (x,) = one.blocks[0], [one.recording.at(torch.arange(30), torch.arange(300).unsqueeze(1))]
    half = (torch.arange(300) % 2 == 0).float().unsqueeze(1)
    split = sized(block.read.repeat(2, 1), block.write.repeat(2, 1), on_NF=torch.cat([x * half, x * (1 - half)], 1))
    got = stay(one, split)
    assert got["matched"] == got["split"] == got["split_if_matched"] == got["one_to_many"] == 1
    assert got["canonicity"] == got["one_to_one"] == got["new"] == 0
    back = stay(split, one)                             # and merged again
    assert back["many_to_one"] == back["matched"] == 1 and back["split"] == back["canonicity"] == 0

    # units that are merged two by two: a sum has a cosine of 0.71 with two parts at right angles
    Q = torch.linalg.qr(randn("q", 64, 64)).Q[:30]
    one = sized(Q, Q, on_NF=x)
    pairs = Q[0::2] + Q[1::2]
    got = stay(one, sized(pairs, pairs, on_NF=x[:, 0::2] + x[:, 1::2]))
    assert got["many_to_one"] == 1 and got["canonicity"] == 0 and got["new"] == 0

    # a third of the units split, a third gone, the last third left
    ten = [Q[:10], Q[:10], Q[20:]]
    got = stay(one, sized(torch.cat(ten), torch.cat(ten), on_NF=x[:, [*range(10), *range(10), *range(20, 30)]]))
    assert got["matched"] == pytest.approx(2 / 3) and got["split"] == pytest.approx(1 / 3)
    assert got["split_if_matched"] == 1 / 2 and got["canonicity"] == pytest.approx(1 / 3)

    R = torch.linalg.qr(randn("rotation", 64, 64)).Q
    for other in (sized(Q @ R, Q @ R, on_NF=x), sized(randn("other", 90, 64), randn("more", 90, 64))):
        got = stay(one, other)
        assert got["matched"] == got["canonicity"] == got["split"] == 0 and got["new"] == 1
    # writes as published say that units are there which read something else
    got = sized(Q @ R, Q, on_NF=x)
    assert stay(one, got, "writes")["one_to_one"] == 1 and stay(one, got)["matched"] == 0


def test_similarities_stay_within_blocks_and_see_through_the_inputs(gpt, rows):
    one, two = (sizes.look_at(make("component", gpt, C, f"size {C}"), gpt, rows, rows) for C in (9, 12))
    sim_SL = sizes.similarities(one, two, "writes")
    assert (sim_SL[:9, 12:] == -1).all() and (sim_SL[9:, :12] == -1).all()
    for i, (a, b) in enumerate(zip(one.blocks, two.blocks)):
        want = matching.cosines(a.write, b.write).abs()
        assert torch.allclose(sim_SL[9 * i:9 * i + 9, 12 * i:12 * i + 12], want, atol=1e-5)
    # in both: the lower of two absolute cosines, as one would write it down
    for by in ("both", "inputs"):
        both_SL = sizes.similarities(one, two, by)
        for i, (a, b) in enumerate(zip(one.blocks, two.blocks)):
            assert torch.allclose(a.root, b.root)       # each side sees its own inputs, here the same
            see = a.root if by == "inputs" else torch.eye(len(a.root))
            read, write = matching.cosines(a.read @ see, b.read @ see), matching.cosines(a.write, b.write)
            least = torch.minimum(read.abs(), write.abs())
            want = torch.where(read * write > 0, least, -least)
            assert torch.allclose(both_SL[9 * i:9 * i + 9, 12 * i:12 * i + 12], want, atol=1e-5)
    # in values: numpy's r of all tokens, without its sign
    said = [sizes_of.recording.at(torch.arange(sizes_of.recording.F), torch.arange(sizes_of.recording.N).unsqueeze(1))
            for sizes_of in (one, two)]
    with np.errstate(invalid="ignore"):                 # units that are never on
        r = np.abs(np.nan_to_num(np.corrcoef(*(values.T.numpy() for values in said))[:18, 18:]))
    got = sizes.similarities(one, two, "values")
    assert np.allclose(got[:9, :12], r[:9, :12], atol=1e-4) and np.allclose(got[9:, 12:], r[9:, 12:], atol=1e-4)
    assert (got[:9, 12:] == -1).all()
    assert one.within("in").is_alive_F.sum() + one.within("out").is_alive_F.sum() == one.is_alive_F.sum()
    assert not one.within("out").is_alive_F[:9].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_against_itself_is_canonical(gpt, rows, kind):
    """A random decomposition has random units: none is like another."""
    one = sizes.look_at(make(kind, gpt, 12, "self"), gpt, rows, rows)
    sim_SL = sizes.similarities(one, one)
    alone = ((sizes.among_alive(sim_SL, one.is_alive_F, one.is_alive_F) >= 0.7).sum(0) == 1)[one.is_alive_F]
    assert sizes.canonicity(one, one, sim_SL) == pytest.approx(alone.double().mean().item()) and alone.any()


def test_groups_are_the_connected_components():
    sim_SL = torch.rand(40, 60, generator=gen("graph")) * 0.72
    alive_S, alive_L = torch.arange(40) % 7 > 0, torch.arange(60) % 5 > 0
    got = sizes.connect(sim_SL, alive_S, alive_L)
    edges = (sim_SL >= 0.7) & alive_S.unsqueeze(1) & alive_L
    parent = list(range(100))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i
    for i, j in edges.nonzero().tolist():
        parent[root(40 + j)] = root(i)
    for i in range(40):
        members = [k for k in range(100) if root(k) == root(i)]
        n_small = sum(k < 40 for k in members)
        assert got.n_small_S[i] == n_small and got.n_large_S[i] == len(members) - n_small
        assert got.of_S[i] == min(members) and got.degree_S[i] == edges[i].sum()
    for j in range(60):
        assert (got.of_L[j] < 0) == (edges[:, j].sum() == 0) and got.degree_L[j] == edges[:, j].sum()
        assert got.of_L[j] < 0 or root(40 + j) == root(got.of_L[j].item())


def test_the_mean_of_the_inputs_is_in_the_bias_of_a_dictionary_and_in_the_reads_of_components(gpt, rows):
    """Reads that differ along it alone are the same to a unit with a bias."""
    m = make("transcoder", gpt, 8, "biased")
    for block, x_ND in zip(sizes.look_at(m, gpt, rows, rows).blocks, m.unit_inputs(gpt, rows)):
        assert torch.allclose(block.root @ block.root, torch.cov(x_ND.T, correction=0), atol=1e-4)
    m = make("component", gpt, 8, "unbiased")
    for block, x_ND in zip(sizes.look_at(m, gpt, rows, rows).blocks, m.unit_inputs(gpt, rows)):
        assert torch.allclose(block.root @ block.root, x_ND.T @ x_ND / len(x_ND), atol=1e-4)


# --------------------------------------------------------------------------------------- novelty
def test_novelty_counts_and_its_cut_are_those_of_brute_force():
    most = torch.rand(80, generator=gen("most")).mul(20).round() / 20           # with ties
    mean = 0.6 * (most - 0.5) + 0.2 * randn("effect", 80)
    alive_S, alive_L = torch.tensor([True, False]), torch.arange(80) % 4 > 0
    sim_SL = torch.stack([most, torch.ones(80)])                                # the second small unit is dead
    effects = sizes.Effects(mean, mean, mean - 1, mean + 1)
    got = sizes.novelty(sim_SL, effects, alive_S, alive_L)
    most, helps = most[alive_L], mean[alive_L] < 0
    assert got["units"] == 60 and got["novel"] == pytest.approx((most < 0.7).float().mean().item())
    assert got["helps"] == pytest.approx(helps.float().mean().item())
    assert got["helps_novel"] == pytest.approx(helps[most < 0.7].float().mean().item())
    assert got["helps_reconstruction"] == pytest.approx(helps[most >= 0.7].float().mean().item())
    wins = (most[helps].unsqueeze(1) < most[~helps]).float() + 0.5 * (most[helps].unsqueeze(1) == most[~helps])
    assert got["auroc"] == pytest.approx(wins.mean().item())
    gains = [((most[helps] <= c).float().mean() - (most[~helps] <= c).float().mean()).item() for c in most]
    assert got["cut_gain"] == pytest.approx(max(gains))
    assert got["cut"] in [c.item() for c, gain in zip(most, gains) if gain > max(gains) - 1e-6]
    none = sizes.novelty(sim_SL, effects._replace(mean_L=mean.abs()), alive_S, alive_L)
    assert none["helps"] == 0 and none["auroc"] is none["cut"] is None
    few = mean.abs() * torch.where(torch.arange(80) < 12, -1, 1)               # 9 of them alive
    assert sizes.novelty(sim_SL, effects._replace(mean_L=few), alive_S, alive_L)["auroc"] is None
    assert sizes.novelty(sim_SL, effects, alive_S, ~alive_L & alive_L)["novel"] is None


# ---------------------------------------------------------------------------------------- curves
@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_leads_from_the_small_one_to_the_large_one(gpt, rows, kind):
    small, large = make(kind, gpt, 9, "small"), make(kind, gpt, 14, "large")
    if kind in ("sae", "transcoder"):
        large.b_dec.data += 1
    one, two = (sizes.look_at(m, gpt, rows, rows) for m in (small, large))
    mlp, effect_RL = gpt.mlp(1), sizes.insertion_effects(one, two, gpt.mlp(1), T)
    leave_S, enter_L = sizes.growth(sizes.similarities(one, two), effect_RL.sum(0), one.is_alive_F, two.is_alive_F)
    got = sizes.curve(one, two, mlp, leave_S, enter_L)
    assert list(got) == list(sizes.POINTS)
    y = mlp(gpt.prefix(rows, 1)[0])[:, 1:].flatten(0, 1)
    spread = (y - y.mean(0)).square().sum(1).mean()
    for point, m, its_sized in ((0, small, one), (2, large, two)):
        error = its_sized.error_ND - its_sized.error_ND.mean(0)
        mse = error.square().sum(1).mean().item()
        assert got[point]["mse"] == pytest.approx(mse, rel=1e-4) and got[point]["fve"] == pytest.approx(1 - mse / spread.item(), abs=1e-4)
        assert got[point]["l0"] == pytest.approx(evals.usage(m, gpt, 1, rows)["l0"])
    # without a unit of the large one, what it writes always is left out too
    x, f = evals.clean(small, gpt, rows, 1)
    off = torch.zeros(*f.shape[:2], len(enter_L))
    assert torch.allclose(sizes.write_together(small, large, mlp, f, off, x), small.decode(1, f, x), atol=1e-4)
    # in the model: the mean is the MLP's own, at each point
    for point in (0, 0.5, 1, 1.5, 2):
        x = gpt.prefix(rows, 1)[0]
        error = (mlp(x) - got[point]["stitched"](1, x, mlp))[:, 1:].flatten(0, 1)
        assert error.mean(0).abs().max() < 1e-4 and got[point]["mse"] == pytest.approx(error.square().sum(1).mean().item(), rel=1e-4)
    ce = evals.scores(gpt, rows, {"small": evals.splice(small), "stitched": got[0]["stitched"]})
    assert all(math.isfinite(v["ce"]) for v in ce.values())


def test_growth_adds_what_helps_most_first_and_swaps_what_is_most_alike_first():
    """Small units 0 to 4, the last one dead; large 0 to 6, the last one dead."""
    sim_SL = torch.full((5, 7), 0.1)
    sim_SL[0, 0], sim_SL[0, 1] = 0.95, 0.75             # split: group 0
    sim_SL[1, 2], sim_SL[2, 2] = 0.8, 0.85              # merged: group 1
    sim_SL[4, 5], sim_SL[3, 6] = 0.99, 0.99             # with a dead one
    alive_S, alive_L = torch.arange(5) < 4, torch.arange(7) < 6
    effect = torch.tensor([0., 0, 0, 3, -1, -2, -9])
    leave_S, enter_L = sizes.growth(sim_SL, effect, alive_S, alive_L)
    assert torch.allclose(enter_L, torch.tensor([4 / 3, 4 / 3, 5 / 3, 1, 2 / 3, 1 / 3, 2]))
    assert torch.allclose(leave_S, torch.tensor([4 / 3, 5 / 3, 5 / 3, 2, 2]))


def test_adding_novel_units_lowers_the_error_and_swapping_keeps_it(monkeypatch):
    """The MLP's output is 12 planted units' writing; the small one has 8, the large one has those 8 and the other 4."""
    write, read = normalize(randn("write", 12, D), dim=1), normalize(randn("read", 12, D), dim=1)
    f_NF = sparse("f", 360, 12, 0.2)
    mlp = lambda x: x                                   # x is y, so that x_ND holds the truth
    y = f_NF @ write

    class Planted:
        kind, layers, matrices = "dictionary", [0], ()

        def __init__(self, order):
            self.order, self.params_F = torch.as_tensor(order), torch.ones(len(order))

        def decode(self, layer, f_BTF, x_BTD):
            return f_BTF @ write[self.order]

        def contrib(self, layer, f_BTF, x_BTD, units):
            return f_BTF[..., units, None] * write[self.order][units]

    def planted(order):
        m, kept = Planted(order), f_NF[:, order]
        out = sized(read[order], write[order], on_NF=kept, m=m)
        return out._replace(recording=dataclasses.replace(out.recording, x_ND=y), error_ND=y - kept @ write[order])
    one, two = planted([*range(8)]), planted([11, 3, 4, 5, 10, 0, 1, 2, 9, 6, 7, 8])
    sim_SL = sizes.similarities(one, two)
    effect_RL = sizes.insertion_effects(one, two, mlp, 13)
    effects = sizes.average_effects(effect_RL, two.recording.on(), 13, gen())
    novel = torch.tensor([k >= 8 for k in two.m.order.tolist()])
    assert torch.equal(effects.high_L < 0, novel) and sizes.incompleteness(effects, two.is_alive_F) == 4 / 12
    monkeypatch.setattr(sizes, "FEWEST", 1)
    got = sizes.novelty(sim_SL, effects, one.is_alive_F, two.is_alive_F)
    assert got["novel"] == got["helps"] == 4 / 12 and got["auroc"] == got["helps_novel"] == got["cut_gain"] == 1
    assert got["helps_reconstruction"] == 0 and got["cut"] < 0.9
    assert sizes.canonicity(one, two, sim_SL) == 1
    leave_S, enter_L = sizes.growth(sim_SL, effects.mean_L, one.is_alive_F, two.is_alive_F)
    curve = sizes.curve(one, two, mlp, leave_S, enter_L)
    mse = [row["mse"] for row in curve.values()]
    assert all(b < a for a, b in zip(mse[:5], mse[1:5])) and max(mse[4:]) < 1e-6
    # by chance: the large one at the wrong text neither helps nor is alike
    null = sizes.by_chance(two, 30, 13, gen())
    effects = sizes.average_effects(sizes.insertion_effects(one, null, mlp, 13), two.recording.on(), 13, gen())
    assert sizes.incompleteness(effects, two.is_alive_F) < 0.2
    assert sizes.novelty(sizes.similarities(one, null), effects, one.is_alive_F, two.is_alive_F)["novel"] > 0.9


# ------------------------------------------------------------------------------ meta-dictionaries
def test_pursuit_is_that_of_plain_least_squares():
    X, A = normalize(randn("x", 20, 12), dim=1), normalize(randn("a", 30, 12), dim=1)
    A[5] = A[4]                                         # a copy, so that the Gram matrix is singular
    X[3], X[4] = A[4], normalize(A[7] + A[8] - A[9], dim=0)
    got = sizes.pursuit(X @ A.T, A @ A.T, 4)
    for x, value in zip(X.double().numpy(), got.tolist()):
        chosen, left = [], x
        for _ in range(4):
            score = np.abs(A.double().numpy() @ left)
            score[chosen] = -1
            chosen.append(score.argmax())
            basis = A[chosen].double().numpy().T
            left = x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
        assert value == pytest.approx(1 - left @ left, abs=1e-4)
    assert got[3] == pytest.approx(1, abs=1e-5)
    assert sizes.pursuit(X @ A.T, A @ A.T, 1) == pytest.approx((X @ A.T).abs().amax(1) ** 2, abs=1e-4)
    assert sizes.pursuit(X @ A[:0].T, A[:0] @ A[:0].T, 4).tolist() == [0] * 20


@pytest.mark.parametrize("kind", ["dictionary", "component", "map"])
def test_sums_of_small_units_are_explained_and_random_ones_are_chance(kind):
    """Each large write is a sum of two small ones; of components the matrix is, of maps too."""
    S, n, width = 24, 200, 32
    read, write = randn("read", S, width), normalize(randn("write", S, width), dim=1)
    pair = torch.stack([torch.randperm(S, generator=common.generator(i, "pair"))[:2] for i in range(n)])
    if kind == "map":                                   # two rows a map: the sum of two small maps of one row
        at, owner = torch.arange(S), torch.arange(n).repeat_interleave(2)
        one = sized(read, write, "map")
        two = sized(torch.zeros(n, width), torch.zeros(n, width))
        block = Block("all", "map", torch.arange(n), read[pair.flatten()], write[pair.flatten()], owner)
        two = two._replace(blocks=[block])
    elif kind == "component":                           # one read, a sum of writes of small components of that read
        one = sized(read[:1].expand(S, -1), write, kind)
        two = sized(read[:1].expand(n, -1), write[pair].sum(1), kind)
    else:
        one, two = sized(read, write), sized(randn("more", n, width), write[pair].sum(1))
    got = sizes.explained_by_few(one, two, gen(), k=2, draws=2)
    # chance of greedy pursuit: it takes a wrong pair at times
    assert got["ve"] > 0.93 and got["ve_null"] < 0.8 and got["excess"] > 0.7, got
    assert got["excess"] == pytest.approx((got["ve"] - got["ve_null"]) / (1 - got["ve_null"]))
    assert sizes.explained_by_few(one, one, gen(), k=1) == dict(
        copies=1, copies_null=0, ve=None, ve_null=None, excess=None)
    if kind != "map":
        noise = sized(randn("r", n, width), randn("w", n, width), kind)
        chance = sizes.explained_by_few(one, noise, gen())
        assert abs(chance["excess"]) < 0.05 and chance["copies"] == 0
    half = one._replace(is_alive_F=torch.arange(S) < S // 2)
    assert sizes.explained_by_few(half, one, gen())["copies"] == 0.5
    assert torch.equal(sizes.without_copies(half, one).is_alive_F, torch.arange(S) >= S // 2)
    empty = two._replace(is_alive_F=torch.zeros(n, dtype=torch.bool))
    assert sizes.explained_by_few(one, empty, gen())["excess"] is None


def test_too_few_units_have_no_common_atoms():
    """Of 62, as a small MOLT has, n / 16 atoms are fewer than a unit takes."""
    for n, width in ((62, None), (80, 5)):
        found = sizes.meta(sized(randn("r", n, 6), randn("w", n, 6)).blocks, gen(), seeds=1)
        assert (found["ve"] is None) == (width is None)


def test_variance_explained_is_that_of_the_matrices():
    S, n = 10, 15
    one, two = random_sized("vs", S, 6, "component"), random_sized("vl", n, 6, "component")
    flat = lambda b: normalize(torch.einsum("ni,no->nio", b.read, b.write).flatten(1), dim=1)
    A, X = (flat(side.blocks[0]) for side in (one, two))
    want = 1 - (n - sizes.pursuit(X @ A.T, A @ A.T, 3).sum()) / (X - X.mean(0)).square().sum()
    assert sizes.variance_explained(one.blocks, two.blocks, 3) == pytest.approx(want.item(), abs=1e-4)
    rows_of = sizes.write_rows(two.blocks[0], 36)
    assert torch.allclose(rows_of @ rows_of.T, X @ X.T, atol=1e-4)
    assert sizes.write_rows(two.blocks[0], 8).shape == (n, 8)
    plain = random_sized("vl", n, 6)
    assert torch.allclose(sizes.write_rows(plain.blocks[0]), normalize(plain.blocks[0].write, dim=1))


# ---------------------------------------------------------------------------------- true concepts
def test_true_splits_by_hand():
    """Four concepts of 100 tokens each in 1,000: one unit; two that share it; a copy of each; none."""
    label = torch.zeros(1000, 4, dtype=torch.bool)
    for k in range(4):
        label[100 * k:100 * k + 100, k] = True
    x = torch.zeros(1000, 8)
    x[:100, 0] = 1                                      # concept 0: one unit
    x[100:150, 1] = x[150:200, 2] = 1                   # concept 1: halves
    x[200:280, 3] = x[200:280, 4] = 1                   # concept 2: copies, 20 tokens missed
    x[200:211, 5] = 1                                   # and a little one
    x[600:604, 3] = x[604:608, 4] = 1                   # which are not quite precise
    x[300:400, 6] = x[500:600, 6] = 1                   # concept 3: on for it, and for something else
    x[300:305, 7] = 1                                   # dead
    a = recording(x, label)
    got = sizes.true_splits(a, a)
    assert got["units_K"].tolist() == [1, 2, 3, 0] and got["concepts"].tolist() == [0, 1, 2, 3]
    assert got["units"] == 2 and got["held"] == 3 / 4 and got["split"] == pytest.approx(2 / 3)
    assert got["recall"] == pytest.approx((1 + 1 + 0.8) / 3)
    assert got["effective"] == pytest.approx((1 + 2 + (80 + 80 + 11)**2 / (80**2 + 80**2 + 11**2)) / 3)
    null = sizes.true_splits(*[matching.shifted(a, 450)] * 2)
    assert null["held"] == 0 and null["units"] is None and null["split"] is None
    wide = recording(x, torch.cat([label, label[:, :2].any(1, keepdim=True)], 1))
    assert sizes.true_splits(wide, wide)["units_K"].tolist() == [1, 2, 3, 0, 0]          # the least wide concept is the home
    none = sizes.true_splits(recording(x), recording(x))
    assert none["units"] is None and none["units_K"].tolist() == []


# -------------------------------------------------------------------------- as papers print them
@pytest.mark.parametrize("kind", ["dictionary", "component", "map"])
def test_mean_max_cosine_is_that_of_the_explicit_matrices(gpt, rows, kind):
    name = dict(dictionary="transcoder", component="component", map="molt")[kind]
    one, two = (sizes.look_at(make(name, gpt, F, f"mmcs {F}"), gpt, rows, rows) for F in (9, 14))
    one = one._replace(is_alive_F=torch.arange(len(one.is_alive_F)) % 3 > 0)     # the filter is on one side only
    two = two._replace(is_alive_F=torch.zeros_like(two.is_alive_F))

    def matrices(block, see):
        parts = torch.einsum("ri,ro->rio", block.read @ see, block.write).flatten(1)
        return torch.zeros(len(block.unit_n), parts.shape[1]).index_add(0, block.owner, parts)
    for inputs in (False, True):
        got = sizes.mean_max_cosine(*((s.over_inputs() if inputs else s) for s in (one, two)))
        best = dict(rank_one=[], read=[], write=[])
        for a, b in zip(one.blocks, two.blocks):
            see, alive = (a.root if inputs else torch.eye(len(a.root))), one.is_alive_F[a.unit_n]
            best["rank_one"].append(matching.cosines(matrices(a, see), matrices(b, see)).abs().amax(1)[alive])
            if kind != "map":
                sign = torch.abs if kind == "component" else lambda t: t
                best["read"].append(sign(matching.cosines(a.read @ see, b.read @ see)).amax(1)[alive])
                best["write"].append(sign(matching.cosines(a.write, b.write)).amax(1)[alive])
        for key, parts in best.items():
            want = torch.cat(parts).mean().item() if parts else None
            assert got[key] == (want if want is None else pytest.approx(want, abs=1e-4)), key
    none = one._replace(is_alive_F=torch.zeros_like(one.is_alive_F))
    assert sizes.mean_max_cosine(none, two)["rank_one"] is None


def test_random_units_are_the_null_of_the_nearest_and_inputs_decide():
    one, two = random_sized("mm1", 200), random_sized("mm2", 200)
    got, null = sizes.mean_max_cosine(one, two), sizes.null_mean_max_cosine(one, two, gen())
    for key in got:
        assert got[key] == pytest.approx(null[key], abs=0.02), key
    assert sizes.mean_max_cosine(one, one) == dict(rank_one=pytest.approx(1), read=pytest.approx(1), write=pytest.approx(1))
    # reads that differ only in directions which no input takes
    root = torch.zeros(64, 64)
    root[:8, :8] = torch.eye(8)
    seen = lambda side, read: side._replace(blocks=[dataclasses.replace(side.blocks[0], read=read, root=root)])
    read = one.blocks[0].read
    one, two = seen(one, read), seen(one, torch.cat([read[:, :8], randn("else", 200, 56)], 1))
    assert sizes.mean_max_cosine(one, two)["read"] < 0.6
    assert sizes.mean_max_cosine(one.over_inputs(), two.over_inputs())["read"] == pytest.approx(1)
    raw = sizes.null_mean_max_cosine(one, two, gen())["read"]
    assert raw < sizes.null_mean_max_cosine(one, two, gen(), over_inputs=True)["read"] < 0.97


# -------------------------------------------------------------------------------- the planted MLP
class Detectors:
    """The planted MLP's own detectors, on where their input is above the threshold, some of them in several units.

    copies_K: in how many units each detector is; shared: its units are on at tokens of their own, not at the same."""
    kind, layers, matrices = "dictionary", [0], ()

    def __init__(self, gpt, copies_K, shared=False, dead=0):
        mlp = gpt.mlp(0)
        self.copies_F = copies_K.repeat_interleave(copies_K)
        self.of_F = torch.arange(K).repeat_interleave(copies_K)
        self.turn_F = torch.cat([torch.arange(n) for n in copies_K.tolist()])
        self.shared, self.dead, self.mlp = shared, dead, mlp
        pad = randn(f"dead {dead}", dead, D_PLANTED)
        self.read = torch.cat([mlp.c_fc.weight.T[self.of_F], pad])
        size_F1 = 1. if shared else self.copies_F.unsqueeze(1)
        self.write = torch.cat([mlp.c_proj.weight[self.of_F] / size_F1, pad])
        self.params_F = torch.full((len(self.read),), 2 * D_PLANTED)

    def unit_directions(self):
        return [("all", self.read, self.write, None)]

    def unit_inputs(self, gpt, rows_RT):
        return [gpt.prefix(rows_RT, 0)[0][:, 1:].flatten(0, 1)]

    def encode(self, layer, x_BTD, mlp):
        z = mlp.c_fc(x_BTD)[..., self.of_F]
        f = mlp.act(z) * (z > 0)
        if self.shared:                                 # whose turn it is depends on the token
            turn = (x_BTD[..., :1] * 1000).long().abs() % self.copies_F
            f = f * (turn == self.turn_F)
        return torch.cat([f, f.new_zeros(*f.shape[:-1], self.dead)], -1)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.write + self.mlp.c_proj.bias

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.write[units]


D_PLANTED = 32


class TrueComponents(spd.SPD):
    """SPD's own form of the truth: each neuron's piece of each matrix, on where the neuron is, and `dead` that never
    are."""
    def __init__(self, gpt, dead):
        mlp = gpt.mlp(0)
        cfg = spd.Config(C=K + dead, ci_hidden=1)
        super().__init__([mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias], cfg, gen(), 0, mlp.act)
        self.requires_grad_(False)
        self.V[0][:, :K], self.U[0][:K] = mlp.c_fc.weight, torch.eye(K)
        self.V[1][:, :K], self.U[1][:K] = torch.eye(K), mlp.c_proj.weight
        self.pad = dead

    def encode(self, layer, x_BTD, mlp):
        on = (mlp.c_fc(x_BTD) > 0).float()
        on = torch.cat([on, on.new_zeros(*on.shape[:-1], self.pad)], -1)
        return torch.cat([on, on], -1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    gpt, read, _ = plant(tmp_path_factory.mktemp("sizes"))
    rows = torch.randint(0, 60, (200, PLANTED_T), generator=gen("planted"))
    fit, test = (labelled(gpt, read, {"x": SimpleNamespace(rows=lambda T, n: part)}, "x") for part in rows.split(100))
    return gpt, fit, test


def test_the_true_units_of_a_planted_mlp_are_canonical_at_two_sizes(planted):
    gpt, fit, test = planted
    pairs = {"dictionary": [Detectors(gpt, torch.ones(K, dtype=torch.long), dead=dead) for dead in (0, K)],
             "component": [TrueComponents(gpt, dead) for dead in (0, K)]}
    for kind, ms in pairs.items():
        one, two = (sizes.look_at(m, gpt, fit[0], test[0]) for m in ms)
        n = K if kind == "dictionary" else 2 * K
        assert one.is_alive_F.sum() == two.is_alive_F.sum() == n
        for by in ("writes", "both", "inputs", "values"):
            assert sizes.canonicity(one, two, sizes.similarities(one, two, by)) == 1, (kind, by)
        effects = sizes.average_effects(sizes.insertion_effects(one, two, gpt.mlp(0), PLANTED_T), two.recording.on(),
                                        PLANTED_T, gen())
        assert sizes.incompleteness(effects, two.is_alive_F) == 0
        counts = sizes.alive_counts(ms[1], gpt, fit[0])
        assert counts["alive"] == counts["alive_mean"] == counts["alive_rate"] == counts["alive_once"] == n
        assert counts["cliff_units"] == n and counts["cliff"] > 2 * counts["null_cliff"]
        null = sizes.by_chance(two, 100, PLANTED_T, gen())
        assert sizes.canonicity(one, null, sizes.similarities(one, null)) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_the_true_split_count_of_duplicated_detectors(planted, shared):
    gpt, fit, test = planted
    copies_K = 1 + torch.arange(K) % 3                  # 1, 2 or 3 units a detector
    ones = torch.ones(K, dtype=torch.long)
    small, large = Detectors(gpt, ones), Detectors(gpt, copies_K, shared)
    one, two = (sizes.look_at(m, gpt, fit[0], test[0]) for m in (small, large))
    got = sizes.split_fractions(sizes.similarities(one, two), one.is_alive_F, two.is_alive_F)
    assert got["matched"] == 1 and got["one_to_many"] == got["split"] == pytest.approx(2 / 3) and got["new"] == 0
    assert sizes.canonicity(one, two, sizes.similarities(one, two)) == pytest.approx(1 / 3)
    for m, want in ((small, ones), (large, copies_K)):
        found = sizes.true_splits(*record_by_sign(m, gpt, fit, test))
        assert torch.equal(found["units_K"], want[found["concepts"]]) and found["held"] == 1 and len(found["concepts"]) > 40
        assert found["units"] == pytest.approx(want[found["concepts"]].double().mean().item())
        assert found["recall"] == pytest.approx(1) and abs(found["effective"] - found["units"]) < (0.3 if shared else 1e-4)
        probe = concepts.splits(*record_by_sign(m, gpt, fit, test), found["concepts"], gen(), n=200)
        assert shared or probe["n"].double().mean() < 1.2                       # copies do not help a probe


def test_looking_changes_nothing_and_repeats(gpt, rows):
    m, n = make("component", gpt, 9, "small"), make("component", gpt, 14, "large")
    before, state = copy.deepcopy(m.state_dict()), torch.get_rng_state()

    def look():
        one, two = (sizes.look_at(k, gpt, rows, rows) for k in (m, n))
        effects = sizes.average_effects(sizes.insertion_effects(one, two, gpt.mlp(1), T), two.recording.on(), T, gen())
        return (sizes.novelty(sizes.similarities(one, two), effects, one.is_alive_F, two.is_alive_F),
                sizes.explained_by_few(one, two, gen()), sizes.alive_counts(m, gpt, rows))
    assert look() == look() and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
