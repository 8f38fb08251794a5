"""Metrics of one decomposition against known answers: identity, ablation, a planted unit."""
import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import common
import evals
import spd
from metrics import effects, faithful, masks, recording
from model import GPT, GPTConfig, split_rows

T, V = 16, 40


@pytest.fixture(scope="module")
def gpt():
    gpt = GPT(GPTConfig(V, n_layer=3, n_embd=16, n_head=2, n_inner=32, n_positions=T), common.generator(0, "init"))
    for p in gpt.parameters():
        p.data.mul_(8) if p.ndim == 2 else None
    return gpt.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, V, (12, T), generator=common.generator(0, "rows"))


class Whole:
    """The decomposition into one unit that is always on: the MLP itself, times `scale`."""
    layers, params_F, kind, matrices = [1], torch.tensor([1]), "dictionary", ()

    def __init__(self, gpt, scale=1.0):
        self.mlp, self.scale = gpt.h[1].mlp, scale

    def encode(self, layer, x_BTD, mlp):
        return x_BTD.new_ones(*x_BTD.shape[:2], 1)

    def decode(self, layer, f_BTF, x_BTD):
        return self.scale * f_BTF * self.mlp(x_BTD)


def test_identity_recovers_all_and_ablation_nothing(gpt, rows):
    floor = evals.ablations(gpt, 1, rows)
    whole, nothing = evals.splice(Whole(gpt)), evals.splice(Whole(gpt, 0.0))
    table = evals.scores(gpt, rows, floor | {"whole": whole, "nothing": nothing})
    table["mean ablation"]["ce"] = table["original"]["ce"] + 1.0         # a random MLP may be worth nothing: a price
    assert evals.recovered(table, "whole") == pytest.approx(1, abs=1e-6)
    assert table["whole"]["kl"] == pytest.approx(0, abs=1e-6)
    assert evals.recovered(table, "mean ablation") == 0
    assert table["nothing"] == table["zero ablation"]
    table["mean ablation"]["ce"] = table["original"]["ce"] + 0.01
    assert evals.recovered(table, "whole") is None                       # too little at stake to say


def test_scores_against_a_plain_loop(gpt, rows):
    half = evals.splice(Whole(gpt, 0.5))
    got = evals.scores(gpt, rows, {"half": half}, batch=5)["half"]
    ce = kl = 0.0
    for row in rows:
        p, q = gpt(row[None])[0].log_softmax(-1), gpt(row[None], half)[0].log_softmax(-1)
        for t in range(1, T - 1):
            ce -= q[t, row[t + 1]].item()
            kl += (p[t].exp() * (p[t] - q[t])).sum().item()
    n = len(rows) * (T - 2)
    assert got["ce"] == pytest.approx(ce / n, rel=1e-5) and got["kl"] == pytest.approx(kl / n, rel=1e-4)


def test_mean_output_by_hand(gpt, rows):
    y = torch.cat([gpt.h[1].mlp(gpt.prefix(r[None], 1)[0])[0, 1:] for r in rows])
    assert torch.allclose(evals.mean_output(gpt, 1, rows, batch=5), y.mean(0), atol=1e-5)


def counts(on, label):
    """The dict that evals.counts gives, by loops: on (tau, N, F) and label (N, K) are 0/1."""
    return dict(on=on.sum(1), label=label.sum(0), both=torch.einsum("anf,nk->afk", on, label), n=len(label))


def test_match_finds_the_planted_concept_and_scores_it_on_other_tokens():
    g = common.generator(0, "planted")
    label = (torch.rand(5000, 6, generator=g) < torch.tensor([.1, .2, .05, .29, .6, .001])).float()
    on = torch.stack([torch.rand(5000, 3, generator=g).round(), label[:, [2, 0, 4]]])
    fit, test = counts(on[:, :4000], label[:4000]), counts(on[:, 4000:], label[4000:])
    concept, f1 = evals.match(fit, test, at=1)
    assert concept[:2].tolist() == [2, 0] and torch.allclose(f1[:2], torch.ones(2))
    assert (evals.match(fit, test).f1_F < 0.5).all()         # above the first threshold units are on at random
    assert concept[2] not in (4, 5) and f1[2] < 0.5          # what holds at 60 % or 0.1 % of the tokens names nothing
    precision, recall = 0.5, 0.8                             # F1 by its other definition
    a, b = torch.zeros(1000), torch.zeros(1000)
    b[:100], a[:80], a[500:580] = 1, 1, 1
    _, f1 = evals.match(*[counts(a.view(1, -1, 1), b.view(-1, 1))] * 2)
    assert f1.item() == pytest.approx(2 * precision * recall / (precision + recall))
    assert evals.match(*[counts(on, label[:, :0])] * 2) is None
    assert evals.match(*[counts(on, label[:, [4, 5]])] * 2) is None     # nor do these name a unit if there are no others


def test_usage_and_replacement_of_known_reconstructions(gpt, rows):
    """y_hat = s y has FVE = 1 - (1 - s)^2 E|y|^2 / E|y - E y|^2; one unit, always on, of 7 parameters."""
    m = Whole(gpt, 0.5)
    m.params_F = torch.tensor([7])
    y = gpt.h[1].mlp(gpt.prefix(rows, 1)[0])[:, 1:].flatten(0, 1)
    used = evals.usage(m, gpt, 1, rows, batch=5)
    assert used["fve"] == pytest.approx(1 - 0.25 * (y.square().sum() / (y - y.mean(0)).square().sum()).item(), abs=1e-5)
    assert used["l0"] == 1 and used["active_params"] == 7
    m.always_params = 5
    assert evals.usage(m, gpt, 1, rows)["active_params"] == 12
    assert evals.usage(Whole(gpt), gpt, 1, rows)["fve"] == pytest.approx(1, abs=1e-9)


class Sum:
    """A CLT in miniature: unit 0 is layer 0's output, unit 1 layer 1's; at layer 1 it writes their sum."""
    layers, reads, params_F, kind, matrices = [1], [0, 1], torch.tensor([1, 1]), "dictionary", ()

    def encode(self, layer, x_BTD, mlp):
        one = x_BTD.new_ones(*x_BTD.shape[:2], 1)
        self.y, f_BTF = (mlp(x_BTD), one) if layer == 0 else (self.y + mlp(x_BTD), torch.cat([one, one], -1))
        return f_BTF

    def decode(self, layer, f_BTF, x_BTD):
        return self.y


def test_a_method_that_reads_earlier_layers(gpt, rows):
    x, f = evals.clean(Sum(), gpt, rows, 1)
    assert torch.equal(x, gpt.prefix(rows, 1)[0]) and f.shape == (*rows.shape, 2)
    y = [gpt.h[layer].mlp(gpt.prefix(rows, layer)[0]) for layer in (0, 1)]
    want = gpt(rows, lambda layer, x, mlp: y[0] + y[1] if layer == 1 else mlp(x))
    assert torch.allclose(gpt(rows, evals.splice(Sum())), want, atol=1e-6)


def test_three_ways_to_score_agree(gpt, rows):
    half = evals.splice(Whole(gpt, 0.5))
    mean, by_row = (f(gpt, rows, {"half": half}, batch=5) for f in (evals.scores, evals.scores_by_row))
    at = evals.scores_at(gpt, 1, rows, lambda idx, x: {"half": 0.5 * gpt.h[1].mlp(x)}, batch=5)
    assert at["half"].shape == (len(rows), T - 2, 2) and by_row["half"].shape == (len(rows), 2)
    for name in mean:
        assert torch.allclose(at[name].double().mean(1), by_row[name], atol=1e-6)
        assert by_row[name].mean(0).tolist() == pytest.approx(list(mean[name].values()), abs=1e-6)


def test_keeping_the_error_leaves_only_the_edit(gpt, rows):
    half, off = Whole(gpt, 0.5), lambda layer, f: 0 * f
    assert torch.allclose(gpt(rows, evals.splice(half, keep_error=True)), gpt(rows), atol=1e-5)
    assert torch.allclose(gpt(rows, evals.splice(half, off, keep_error=True)), gpt(rows, evals.splice(half)), atol=1e-5)


def test_interval_of_a_mean_and_of_a_ratio():
    x = torch.randn(400, generator=common.generator(0, "x"), dtype=torch.float64)
    low, high = evals.interval(lambda m: m, x)
    assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 * x.std().item() / 20, rel=0.15)
    assert evals.interval(lambda a, b: a / b, 3 * x.abs(), x.abs()) == pytest.approx([3, 3])    # paired, row by row


def test_intervals_within_one_model():
    """CE 1 where whole, 2 where ablated, on all stories; the spliced model's is a fair coin's."""
    coin = torch.randint(2, (400,), generator=common.generator(0, "coin")).double()
    flat = torch.ones(400).double()
    by_row = {"original": torch.stack([flat, 0 * flat], 1), "mean ablation": torch.stack([2 * flat, 3 * flat], 1),
              "model": torch.stack([1 + coin, 2 * coin], 1)}
    half = evals.interval_over_stories(by_row, "model")
    se = 1.96 * 0.5 / 20
    assert half == pytest.approx(dict(ce_recovered_within=se, kl_within=2 * se, kl_recovered_within=2 / 3 * se), rel=0.15)
    assert evals.interval_over_stories(by_row, "original")["ce_recovered_within"] == 0


class Off(Whole):
    """The MLP with an error added: noise, or along one direction."""
    def __init__(self, gpt, error):
        self.mlp, self.error = gpt.h[1].mlp, error

    def decode(self, layer, f_BTF, x_BTD):
        return self.mlp(x_BTD) + self.error(x_BTD)


def test_error_pathology_of_noise_of_a_harmless_direction_and_of_none(gpt, rows):
    gen = common.generator(0, "noise")
    noise, many = lambda x: 8 * torch.randn(x.shape, generator=gen), rows.repeat(6, 1)
    assert faithful.error_pathology(Off(gpt, noise), gpt, many, gen, draws=10) == pytest.approx(1, abs=0.1)
    ones = Off(gpt, lambda x: 2 * torch.ones_like(x))           # LayerNorm takes this direction away
    assert faithful.error_pathology(ones, gpt, rows, gen) == pytest.approx(0, abs=1e-4)
    assert faithful.error_pathology(Whole(gpt), gpt, rows, gen) is None


def components(gpt, C, g):
    """An SPD of layer 1 with V U = W where C allows it, and the causal importance g everywhere."""
    mlp = gpt.h[1].mlp
    m = spd.SPD([mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias],
                spd.Config(C=C, ci_hidden=4), common.generator(0, "components"), 1).requires_grad_(False)
    for V, U, W in zip(m.V, m.U, m.Ws):
        left, s, right = torch.linalg.svd(W)
        V[:, :len(s)], U[:len(s)] = (left[:, :len(s)] * s)[:, :C], right[:len(s)][:C]
    m.encode = lambda layer, x, mlp: x.new_full((*x.shape[:2], 2 * C), g)
    return m


def test_the_attack_nears_the_worst_corner_and_grows_with_its_budget(gpt, rows):
    m, few = components(gpt, 2, 0.3), rows[:4]
    corner = lambda bits: masks.replacing(m, lambda gs: masks.masks_from(gs, [t.float() for t in bits.split([2, 2, 1, 1])]))
    worst = max(evals.scores(gpt, few, {"r": corner(torch.tensor(bits))})["r"]["kl"]
                for bits in itertools.product([0, 1], repeat=6))
    found = masks.attack(m, gpt, few, common.generator(0, "attack"), budgets=(0, 2, 15))
    assert found[0] < found[2] <= found[15] <= worst + 1e-6 and found[15] > 0.95 * worst
    each = masks.attack(m, gpt, few, common.generator(0, "attack"), budgets=(15,), shared=False)
    assert each[15] > found[15]                             # a source of its own for each position can do more
    ladder, sources = masks.worst_sources(m, gpt, few, common.generator(0, "attack"), budgets=(15,))
    under = masks.replacing(m, lambda gs: masks.masks_from(gs, sources))
    assert ladder[15] == found[15] == pytest.approx(evals.scores(gpt, few, {"r": under})["r"]["kl"], rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_the_attack_is_the_same_in_one_batch_and_in_many(gpt, rows, monkeypatch, shared):
    m, few = components(gpt, 3, 0.3), rows[:7]
    attack = lambda: masks.worst_sources(m, gpt, few, common.generator(0, "attack"), (0, 8), shared=shared)
    ladder, sources = attack()
    monkeypatch.setattr(masks, "split_rows", lambda rows_RT: rows_RT.split(3))
    in_many, sources_of_many = attack()
    assert in_many == pytest.approx(ladder, rel=1e-5) and ladder[8] > ladder[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(sources, sources_of_many))


def test_aggregation_of_a_joint_and_of_a_needless_importance(gpt, rows):
    m, gen = components(gpt, 16, 0.3), common.generator(0, "union")
    low = evals.scores(gpt, rows, {"ci": masks.replacing(m, lambda gs: masks.masks_from(gs, [0 * g for g in gs] + [0 * gs[0][
        ..., :1]] * 2))})["ci"]["kl"]
    rise = masks.aggregation(m, gpt, rows, gen, ks=(1, 3))  # all are on elsewhere: forced, the sum is W again
    assert rise[1] == pytest.approx(-low, rel=1e-3) and rise[3] == rise[1] and low > 0.01
    assert masks.aggregation(components(gpt, 16, 0.05), gpt, rows, gen, ks=(3,))[3] == 0


def test_index_bits():
    assert evals.index_bits(10, 3) == pytest.approx(math.log2(120)) and evals.index_bits(7, 7) == pytest.approx(0)


@pytest.fixture(scope="module")
def loud(gpt):
    """The same model with 30 times the MLP at layer 1, so that it is worth enough to ask for shares, and its tokens."""
    big = copy.deepcopy(gpt)
    big.h[1].mlp.c_proj.weight.mul_(30)
    idx = torch.randint(0, V, (24, 2), generator=common.generator(0, "first"))
    while idx.shape[1] < T:                                 # its own most likely tokens: it is good at them
        idx = torch.cat([idx, big(idx)[:, -1:].argmax(-1)], 1)
    return big, idx[:12], idx[12:]


class Parts(Whole):
    """The MLP's output in a basis of D directions and their opposites, `keep` of them; f >= 0."""
    def __init__(self, gpt, keep=16):
        self.params_F = torch.ones(32)
        Q, _ = torch.linalg.qr(torch.randn(16, 16, generator=common.generator(0, "basis")))
        self.mlp, self.W = gpt.h[1].mlp, torch.cat([Q, -Q])
        self.on = (torch.arange(32) % 16 < keep).float()

    def encode(self, layer, x_BTD, mlp):
        return (mlp(x_BTD) @ self.W.T).relu() * self.on

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W


def test_completeness_of_identity_constant_and_half(loud):
    gpt, fit, test = loud
    assert faithful.completeness(Parts(gpt), gpt, fit, test) == pytest.approx(1, abs=1e-5)
    assert faithful.completeness(Parts(gpt, 0), gpt, fit, test) == pytest.approx(0, abs=1e-5)
    half = faithful.completeness(Parts(gpt, 8), gpt, fit, test)
    assert 0 < half < 0.99                                  # by hand: the errors are the other directions
    m, rest = Parts(gpt, 8), Parts(gpt)
    rest.on = 1 - m.on
    y = torch.cat([m.decode(1, m.encode(1, gpt.prefix(r[None], 1)[0], m.mlp), None)[0, 1:] for r in fit]).mean(0)
    other = lambda l, x, mlp: rest.decode(1, rest.encode(1, x, mlp), x) + y if l == 1 else mlp(x)
    table = evals.scores(gpt, test, evals.ablations(gpt, 1, fit) | {"by hand": other})
    assert half == pytest.approx(1 - evals.recovered(table, "by hand"), abs=1e-4)


def test_attribution_is_the_slope_of_the_loss(loud):
    gpt, _, test = loud
    m, idx = Parts(gpt), test[:1]
    x, f, a = faithful.attribution(m, gpt, idx, 1)
    ce = lambda f: evals.divergence(gpt, idx, *[gpt.suffix(gpt.prefix(idx, 1)[1], m.decode(1, f, x), 1)[:, 1:-1].log_softmax(
        -1)] * 2)[..., 0].sum()
    t, u = 5, f[0, 5].argmax()
    up, down = f.clone(), f.clone()
    up[0, t, u] *= 1.001
    down[0, t, u] *= 0.999
    assert a[0, t, u].item() == pytest.approx((ce(up) - ce(down)).item() / 0.002, rel=0.05)
    assert (a[f == 0] == 0).all()


def test_the_ladder_climbs_to_the_whole_and_down_to_the_error(loud):
    gpt, fit, test = loud
    out = faithful.top_k_faithfulness(Parts(gpt), gpt, fit, test, ks=(1, 4, 32))
    assert out["faith"][32] == pytest.approx(1, abs=1e-4) and out["comp"][32] == pytest.approx(0, abs=1e-4)
    assert out["faith"][1] < out["faith"][4] < 1 and out["comp"][1] > out["comp"][4] > 0
    (first, second), whole = list(out["faith"].values())[:2], math.log(32)
    area = ((first + second) / 2 * math.log(4) + (second + 1) / 2 * math.log(8)) / whole
    assert 0 < out["comp_auc"] < 1 and out["faith_auc"] == pytest.approx(area, abs=1e-4)
    whole = faithful.top_k_faithfulness(Parts(gpt, 0), gpt, fit, test, ks=(1, 2))      # nothing explained: C is empty
    assert whole["faith"][2] == pytest.approx(0, abs=1e-4) and whole["comp"][2] == pytest.approx(1, abs=1e-4)


def test_the_ladder_keeps_as_many_components_of_each_matrix(loud):
    """Two copies of the same units, as matrices with half a say each: k of both are k of one."""
    gpt, fit, test = loud

    class Twice(Parts):
        kind, matrices = "component", ("in", "out")

        def encode(self, layer, x_BTD, mlp):
            f = super().encode(layer, x_BTD, mlp)
            return torch.cat([f, f], -1)

        def decode(self, layer, f_BTF, x_BTD):
            return sum(super(Twice, self).decode(layer, f, x_BTD) for f in f_BTF.chunk(2, -1)) / 2
    one, two = (faithful.top_k_faithfulness(m(gpt), gpt, fit, test, ks=(1, 4)) for m in (Parts, Twice))
    assert two["faith"] == pytest.approx(one["faith"], abs=1e-4) and two["comp"] == pytest.approx(one["comp"], abs=1e-4)


def test_ablating_a_concepts_unit_costs_on_the_concepts_tokens(loud):
    """Unit 0 writes the MLP's output where the previous token is even, unit 1 elsewhere."""
    gpt, _, rows = loud

    class Halves(Whole):
        def encode(self, layer, x_BTD, mlp):
            return torch.stack([even.float(), 1 - even.float()], -1)[:len(x_BTD)]

        def decode(self, layer, f_BTF, x_BTD):
            return f_BTF.sum(-1, keepdim=True) * self.mlp(x_BTD)
    even = rows % 2 == 0
    labels, units = torch.stack([even, ~even, even], -1), torch.tensor([[0], [1], [1]])
    got = effects.concept_ablation(Halves(gpt), gpt, rows, labels, units)
    at = evals.scores_at(gpt, 1, rows, lambda idx, x: {"off": gpt.h[1].mlp(x) * ~even[..., None]})
    cost = (at["off"] - at["original"])[..., 0]
    assert got["on"][0].item() == pytest.approx(cost[even[:, 1:-1]].mean().item(), rel=1e-3)
    assert got["off"][0].item() == pytest.approx(cost[~even[:, 1:-1]].mean().item(), rel=1e-3, abs=1e-5)
    assert got["on"][0] > got["off"][0] and got["on"][1] > got["off"][1] and got["on"][2] < got["off"][2]


def test_steering_along_a_tokens_direction_works_and_a_push_of_nothing_does_nothing(loud):
    gpt, _, rows = loud
    prompts, target = rows[:6, :5], torch.zeros(2, V, dtype=torch.bool)
    target[0, 7] = target[1, 9] = True
    y = torch.zeros(1, 1, 16, requires_grad=True)
    x, r = gpt.prefix(prompts, 1)
    good = torch.autograd.grad(gpt.suffix(r, gpt.h[1].mlp(x) + y, 1)[:, -1].log_softmax(-1)[:, 7].sum(), y)[0][0, 0]
    directions = torch.stack([good, good])                      # right for token 7, wrong for token 9
    nothing = effects.steer(gpt, 1, prompts, 0 * directions, target, new=4)
    assert nothing["c"].max() < 1e-6 and nothing["S"].max() < 1e-5
    assert torch.allclose(nothing["f"], torch.ones(2)) and torch.allclose(nothing["q"], torch.ones(2), atol=1e-5)
    found = effects.steering(gpt, 1, prompts, rows[6:, :5], directions, target, sizes=(0., .1, .4), new=4)
    assert found["S"][0] > 0.05 > found["S"][1] and found["M2"][0] > found["M"][0]
    assert found["spearman"][0] > 0.9 and found["size"][0] > 0
    harmonic = 3 / sum(1 / found[k][0] for k in "cfq")
    assert found["S"][0] == pytest.approx(harmonic)


def test_a_direction_of_zeros_has_no_rank_correlation(loud):
    gpt, _, rows = loud
    directions, target = torch.zeros(2, 16), torch.zeros(2, V, dtype=torch.bool)
    directions[1, 3] = 1
    target[:, 7] = True
    spearman = effects.steering(gpt, 1, rows[:6, :5], rows[6:, :5], directions, target, sizes=(.1, .4, .8), new=2)["spearman"]
    assert math.isnan(spearman[0]) and abs(spearman[1]) <= 1 + 1e-6


def test_steering_samples_with_the_models_probabilities(loud, monkeypatch):
    """Without a push, after 6,000 copies of a prompt."""
    gpt, _, rows = loud
    logp = gpt(rows[:1, :5])[0, -1].log_softmax(-1)
    many, target = rows[:1, :5].repeat(6000, 1), torch.zeros(1, V, dtype=torch.bool)
    kept, real = [], effects.nnf.cross_entropy
    monkeypatch.setattr(effects.nnf, "cross_entropy", lambda z, t, **k: kept.append(t) or real(z, t, **k))
    effects.steer(gpt, 1, many, torch.zeros(1, 16), target, new=1)
    share = torch.bincount(torch.cat(kept).flatten()[:6000], minlength=V) / 6000
    assert (share - logp.exp()).abs().max() < 0.03


def test_effects_of_planted_units(loud):
    """Units 0 to 2 write the MLP's output before the tokens of one residue mod 3, with 1e-4 of `good`; 12 others write
    nothing."""
    gpt, _, rows = loud
    after = rows.roll(-1, 1) % 3
    kinds = torch.stack([after == i for i in range(3)], -1)
    others = torch.rand(*rows.shape, 12, generator=common.generator(0, "others")) < 1 / 3
    f, good = torch.cat([kinds, others], -1).float(), torch.randn(3, 16, generator=common.generator(0, "good"))

    class Planted(Whole):
        params_F = torch.ones(15)

        def encode(self, layer, x_BTD, mlp):
            return f[:len(x_BTD)]

        def decode(self, layer, f_BTF, x_BTD):
            return f_BTF[..., :3].sum(-1, keepdim=True) * self.mlp(x_BTD)

        def contrib(self, layer, f_BTF, x_BTD, some):
            return f_BTF[..., some, None] * torch.cat([good, torch.zeros(12, 16)])[some]
    m, target, split = Planted(gpt), torch.arange(V) % 3 == torch.arange(3).view(-1, 1), (rows, kinds)
    gen = lambda: common.generator(0, "effects")
    out = effects.effects(m, gpt, split, split, torch.arange(3), target, gen(), units=1)
    cost = effects.concept_ablation(m, gpt, rows, kinds, own := torch.arange(3).view(-1, 1))
    dice, whole = gen(), recording.record(m, gpt, *split)
    null = [effects.concept_ablation(m, gpt, rows, kinds, effects.matched_in_frequency(whole, own, dice)) for _ in range(3)]
    chance = sum((some["on"] - some["off"]).mean().item() for some in null) / 3
    assert out["ablation"] == pytest.approx((cost["on"] - cost["off"]).mean().item() - chance, rel=1e-4)
    assert abs(chance) < 0.2 * out["ablation"]
    assert out["ablation_at"] == pytest.approx(cost["on"].mean().item(), rel=1e-4)
    assert out["ablation_at"] > 100 * abs(out["ablation_elsewhere"])
    S = lambda push: effects.steering(gpt, 1, rows[:, :T // 8], rows[:, :T // 8], push, target)["S"].mean().item()
    assert out["steering"] == pytest.approx(S(good), abs=1e-6) and out["steering"] > 0
    yardstick = effects.pushes(gpt, 1, split, split, torch.arange(3), target, gen())
    y = torch.cat([gpt.h[1].mlp(gpt.prefix(row[None], 1)[0])[0, 1:] for row in rows])
    means = [y[k].mean(0) - y[~k].mean(0) for k in kinds[:, 1:].flatten(0, 1).T]
    assert yardstick["steering_means"] == pytest.approx(S(torch.stack(means)), abs=1e-5)
    assert yardstick["steering_random"] not in (0, yardstick["steering_means"])
    none = torch.zeros(0, dtype=torch.long)
    assert effects.effects(m, gpt, split, split, none, target[:0], gen()) == {}


class OfTokens:
    """Units that are on at all tokens, at token 5, and at token 6 and one in two others; none can be told by the MLP."""
    layers, params_F, kind, matrices = [1], torch.ones(3), "dictionary", ()

    def encode(self, layer, x_BTD, mlp):
        token_BT = self.rows[self.at:self.at + len(x_BTD)]
        self.at = (self.at + len(x_BTD)) % len(self.rows)
        return torch.stack([torch.ones_like(token_BT), token_BT == 5, (token_BT == 6) | (token_BT % 2 == 0)], -1).float()

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF.sum(-1, keepdim=True).expand_as(x_BTD)

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None].expand(*f_BTF.shape[:2], len(units), x_BTD.shape[-1])


def test_the_report_begins_with_the_units_that_fit_their_concepts_best(gpt):
    m, gpt.vocab = OfTokens(), [f"w{i}" for i in range(V)]
    m.rows, m.at = torch.randint(0, 10, (64, T), generator=common.generator(0, "few tokens")), 0
    split = m.rows, (m.rows == 5).unsqueeze(-1)
    told = lambda lines: [int(line[1:line.index(":")]) for line in lines if line.startswith("#")]
    lines, out = evals.report(m, gpt, split, split, ["five"], {"all": torch.arange(3)}, (0,), 0, k=2)
    assert told(lines)[0] == 1 and "five (F1 1.00)" in "\n".join(lines) and out["alive_all"] == 3
    none = m.rows, split[1][..., :0]
    lines, _ = evals.report(m, gpt, none, none, [], {"all": torch.arange(3)}, (0,), 0, k=2)
    assert told(lines) == [0, 2, 1]             # without concepts, what is on most


class Many(OfTokens):
    """Unit u is on at the token u: and at all tokens from 36 on are the last four."""
    params_F = torch.ones(40)

    def encode(self, layer, x_BTD, mlp):
        token_BT = self.rows[self.at:self.at + len(x_BTD)]
        self.at = (self.at + len(x_BTD)) % len(self.rows)
        on = token_BT.unsqueeze(-1) == torch.arange(40)
        on[..., 36:] = True
        return on.float()


def test_the_report_has_the_best_some_at_random_and_the_densest_in_40_lines_of_100_columns(gpt):
    gpt.vocab = ["<|endoftext|>", *(f"a-rather-long-word-{i}" * (1 + i % 4) for i in range(1, V))]
    m = Many()
    m.rows, m.at = torch.randint(0, V, (64, T), generator=common.generator(0, "many")), 0
    split = m.rows, m.rows.unsqueeze(-1) == torch.arange(12)
    names, groups = [f"token {i}" for i in range(12)], {"one": torch.arange(20), "two": torch.arange(20, 40)}
    lines, _ = evals.report(m, gpt, split, split, names, groups, (0,), 0)
    assert len(lines) == 40 and max(map(len, lines)) <= evals.WIDTH == 100 and not any("\n" in line for line in lines)
    told = [int(line[1:line.index(":")]) for line in lines if line.startswith("#")]
    assert len({*told}) == 23 and {*told[:10]} <= {*range(12)} and {*told[20:]} <= {*range(36, 40)}
    assert sum("[[" in line for line in lines) == 12 and lines[36].startswith("the densest")
    assert "dense" in lines[-4] and all("token" in line for line in lines if line.startswith("#"))


def test_the_places_of_a_unit_stand_in_different_text(gpt):
    m = Many()
    one, other = torch.randint(1, V, (2, T), generator=common.generator(0, "places")).split(1)
    m.rows, m.at = torch.cat([one, one, one, other, other]), 0
    lines = evals.describe(m, gpt, m.rows, torch.tensor([36]), torch.ones(40), None, [], [3])
    assert len({*lines[1:]}) == len(lines[1:]) >= 2


@pytest.mark.parametrize("text, width, clipped", [
    ("abc", 3, "abc"), ("abcdef", 4, "abc…"), ("0123456789[[x]]0123456789", 9, "…789[[x]…"), ("012345678[[x]]", 8, "…678[[x…")])
def test_a_line_is_cut_around_its_token(text, width, clipped):
    assert evals.clipped(text, width) == clipped


def arena(gpt, rows):
    """What a model is measured on; one concept, true at random."""
    labels = torch.rand(*rows.shape, 1, generator=common.generator(0, "labels")) < 0.2
    return SimpleNamespace(gpt=gpt, layer=1, fit=(rows, labels), test=(rows, labels), names=["a"])


@pytest.mark.parametrize("module", [evals, faithful, masks], ids=lambda module: module.__name__)
def test_what_is_measured_has_its_columns(gpt, rows, module):
    m = components(gpt, 4, 0.3)
    numbers, details = module.measure(m, arena(gpt, rows), common.generator(0, "measure"))
    assert numbers.keys() == module.COLUMNS.keys() and not numbers.keys() & details.keys()
    assert any(number is not None for number in numbers.values())


def test_only_components_have_masks(gpt, rows):
    numbers, details = masks.measure(Whole(gpt), arena(gpt, rows), common.generator(0, "measure"))
    assert numbers == dict.fromkeys(masks.COLUMNS) and details == {}


@pytest.mark.parametrize("T, sizes", [(12, [16, 16, 8]), (128, [16, 16, 8]), (129, [15, 15, 10]), (1024, [2] * 20), (5000, [1] * 40)])
def test_batches_of_long_rows_are_of_fewer(T, sizes):
    rows_RT = torch.arange(40 * T).view(40, T)
    parts = split_rows(rows_RT, 16)
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), rows_RT)
