"""Floors through the seam: parts that sum to the whole, exactness where nothing is left out, bad input."""
import dataclasses

import pytest
import torch

import baselines
import common
import evals
from conftest import noisy_gpt
from metrics import concepts
from model import GPT, GPTConfig
from test_common import fails

D, M, T, V = 16, 24, 12, 30


@pytest.fixture(scope="module")
def gpt():
    return noisy_gpt(2, D, M, T, V)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, V, (20, T), generator=common.generator(0, "rows"))


@pytest.fixture(scope="module")
def few(gpt, rows):
    return baselines.baselines(gpt, 1, rows, k=3, F=40, seed=0)


@pytest.mark.parametrize("name", ["neurons", "pca", "random", "svd"])
def test_the_seam(gpt, rows, few, name):
    m, mlp = few[name], gpt.h[1].mlp
    x, f = evals.clean(m, gpt, rows, 1)
    L0 = (f > 0).sum(-1)
    assert (f >= 0).all() and f.shape[-1] == len(m.params_F)
    assert (L0 <= 3 * (1 + (name == "svd"))).all() and L0.float().mean() > 2
    assert torch.allclose(m.encode(1, x[:1, 3:4], mlp)[0, 0], f[0, 3], atol=1e-5)          # alone as in a batch
    parts, every = m.contrib(1, f, x, torch.arange(f.shape[-1])), torch.arange(f.shape[-1])
    if name == "svd":                                                        # W_out's sum to y less the bias
        assert torch.allclose(parts[:, :, m.C:].sum(2) + m.bs[1], m.decode(1, f, x), atol=1e-4)
    else:
        assert torch.allclose(parts.sum(2) + m.b, m.decode(1, f, x), atol=1e-4)
    assert (parts[f == 0] == 0).all() and torch.equal(m.contrib(1, f, x, every[[2, 0]]), parts[:, :, [2, 0]])


def test_nothing_left_out_is_exact(gpt, rows):
    everything = baselines.baselines(gpt, 1, rows, k=100, F=40, seed=0)
    for name in ("neurons", "pca", "svd"):
        used = evals.usage(everything[name], gpt, 1, rows)
        assert used["fve"] == pytest.approx(1, abs=1e-5), name
        assert torch.allclose(gpt(rows, evals.splice(everything[name])), gpt(rows), atol=1e-3), name
    assert evals.usage(everything["random"], gpt, 1, rows)["fve"] < 0.999


def test_what_is_kept_is_what_writes_most(gpt, rows, few):
    x, f = evals.clean(few["neurons"], gpt, rows, 1)
    all_ = baselines.Neurons(1, gpt.h[1].mlp, M)
    size = all_.contrib(1, all_.encode(1, x, gpt.h[1].mlp), x, torch.arange(M)).norm(dim=-1)
    assert torch.equal(size.topk(3, -1).indices.sort(-1).values, f.topk(3, -1).indices.sort(-1).values)
    fve = [evals.usage(baselines.baselines(gpt, 1, rows, k, 40, 0)["pca"], gpt, 1, rows)["fve"] for k in (1, 4)]
    assert 0 < fve[0] < fve[1] < 1


def test_fit_is_least_squares(gpt, rows, few):
    m = few["random"]
    x, f = evals.clean(m, gpt, rows, 1)
    e = (gpt.h[1].mlp(x) - m.decode(1, f, x))[:, 1:].flatten(0, 1)
    assert e.mean(0).abs().max() < 1e-4
    assert (e * (m.decode(1, f, x)[:, 1:].flatten(0, 1))).sum().abs() < 1e-3 * e.square().sum()


def test_random_target_loads_and_differs(gpt, tmp_path):
    baselines.random_target(gpt, tmp_path / "a", 0), baselines.random_target(gpt, tmp_path / "b", 0)
    a, b = (GPT.load(tmp_path / name) for name in "ab")
    assert a.hash == b.hash and a.cfg == gpt.cfg and a.vocab == gpt.vocab
    assert not torch.allclose(a.h[1].mlp.c_fc.weight, gpt.h[1].mlp.c_fc.weight)


def test_bad_input_ends_in_one_line(gpt, tmp_path, capsys):
    gpt.save(tmp_path, gpt.vocab, {"layer": 1})
    cfg = baselines.Config(model=str(tmp_path), data=str(tmp_path / "no.bin"), device="cpu")
    for change in (dict(layer=2), dict(k=0), dict(k=2000), dict(eval_tokens=5), dict()):
        fails(capsys, lambda: baselines.main(dataclasses.replace(cfg, **change)), *(f"--{name}" for name in change))


def test_planted_mlp_every_metric_puts_its_own_detectors_above_the_floors():
    """An MLP of 40 sparse detectors, whose truth is the concept list: its neurons must win, by a lot."""
    gen, K = common.generator(0, "planted"), 40
    gpt = GPT(GPTConfig(V, n_layer=1, n_embd=D, n_head=2, n_inner=K, n_positions=24), gen).eval().requires_grad_(False)
    gpt.h[0].mlp.c_fc.weight.mul_(4), gpt.h[0].mlp.c_fc.bias.fill_(-6)
    split = [torch.randint(0, V, (150, 24), generator=gen) for _ in range(2)]
    truth = lambda rows: gpt.h[0].mlp.c_fc(gpt.prefix(rows, 0)[0]) > 0
    fit, test = ((rows, truth(rows)) for rows in split)
    few = baselines.baselines(gpt, 0, fit[0], k=8, F=64, seed=0)
    few["neurons"].encode = lambda layer, x, mlp: mlp.c_fc(x).relu()    # those that are on, gelu's small minus off
    few["neurons"].strength = lambda layer, f, x: f
    out = {name: concepts.summary(m, gpt, fit, test, torch.arange(K), common.generator(0, "summary"), n=300)
           for name, m in few.items() if name != "svd"}
    best = out.pop("neurons")
    for floor in out.values():
        for name, gap in dict(coverage=0.3, board=0.3, units_atomic=0.5, units_f1=0.3, parent_f1=0.1).items():
            assert best[name] > floor[name] + gap, name
        assert best["probe_auroc_1"] > floor["probe_auroc_1"] + 0.1 and best["splits"] < floor["splits"] - 0.3
    assert best["effective_rank"] == pytest.approx(1, abs=1e-3) and best["fragmentation"] < 1.2
    assert best["coverage"] > 0.85 and best["splits"] < 1.1
    assert best["absorption_fraction"] < 0.1                    # 40 writes share 16 dimensions: not quite 0
    kinds = [best[f"units_{k}"] for k in ("atomic", "polysemantic", "composite", "unexplained")]
    assert sum(kinds) == pytest.approx(1)
    nothing = concepts.summary(few["pca"], gpt, (fit[0], fit[1][..., :0]), (test[0], test[1][..., :0]),
                            torch.arange(0), gen)               # a text without concepts
    assert "coverage" not in nothing and nothing["effective_rank"] == pytest.approx(1, abs=1e-3)
