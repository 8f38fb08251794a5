"""bench.py: the arithmetic against a closed form, every variant against the others, its figures on a tiny model."""
import dataclasses
import functools
import re

import numpy as np
import pytest
import torch

import common
import spd
from model import GPT, GPTConfig
from studies import bench
from test_common import fails


@pytest.fixture
def small():
    shape = GPTConfig(50, n_layer=3, n_embd=16, n_head=2, n_inner=24, n_positions=12)
    gpt = GPT(shape, torch.Generator().manual_seed(0))
    for p in gpt.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return gpt.requires_grad_(False), spd.Config(layer=1, C=20, B=3, T=12, ci_hidden=8, lr=1e-4)


def closed_form(gpt, job):
    """Floating-point operations of the matrix products of one step with an adversary of one step, counted by hand."""
    N, D, M, V, C, H = job.B * job.T, gpt.cfg.n_embd, gpt.cfg.n_inner, gpt.cfg.vocab_size, job.C, job.ci_hidden
    after = gpt.cfg.n_layer - 1 - job.layer
    attention, scores, mlp = 2 * N * 4 * D * D, 2 * N * 2 * job.T * D, 2 * N * 2 * D * M
    forward = after * (attention + scores + mlp)                            # the suffix; its backward by inputs alone
    backward = after * (attention + 2 * scores + mlp)
    prefix = (job.layer + 1) * (attention + scores) + job.layer * mlp
    unembed = 2 * N * 2 * D * V                                             # logits, and softmax times W
    small, large, delta = 2 * N * C * D, 2 * N * C * M, 2 * N * D * M       # x V or h U at one end of a site, x W_out
    masked = 2 * small + 2 * large + delta + forward + unembed
    by_sources = backward + small + 2 * large + delta                       # both ds, W_out's dh V^T and do W^T
    by_weights = by_sources + 2 * small + 2 * large                         # and dV, dU of both sites
    sizes = [D + M, H, H, 2 * C]
    gamma = [2 * N * a * b for a, b in zip(sizes, sizes[1:])]
    faith = 3 * 2 * 2 * D * C * M                                           # V U of two sites, its dV and dU
    matrices = [(D, C), (C, M), (M, C), (C, D), *zip(sizes, sizes[1:])]     # Muon: three products, five times
    muon = sum(5 * 2 * (2 * min(s) ** 2 * max(s) + min(s) ** 3) for s in matrices)
    return muon * (job.optimizer == "muon") + (prefix + mlp + forward + unembed                                # clean
            + masked + by_sources + 2 * (masked + by_weights) + 3 * sum(gamma) - gamma[0] + faith)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_arithmetic_equals_the_closed_form(small, layer):
    gpt, job = small[0], dataclasses.replace(small[1], layer=layer)
    assert bench.arithmetic(bench.SpdStep(gpt, job, bench.losses)) == closed_form(gpt, job)


def test_arithmetic_of_the_default_job():
    gpt, job = bench.default_job(bench.Config(device="cpu"))
    assert bench.arithmetic(bench.SpdStep(gpt, job, bench.losses)) == closed_form(gpt, job)


def test_passes(small):
    gpt, job = small
    last, layers = bench.passes(bench.SpdStep(gpt, job, bench.losses), gpt, job.B)
    assert last == [4, 3]                               # clean, adversary, and two masked forwards batched in one call
    assert layers == pytest.approx([(2 + 4) / 3, 3 / 3])                    # layers 0 and 1 once, layer 2 four times
    full = bench.SpdStep(gpt, job, bench.Without(prefix=False))
    assert bench.passes(full, gpt, job.B)[1][0] == pytest.approx(4)


def same(steps, n=3):
    for _ in range(n):
        want, *others = [step() for step in steps]
        for got in others:
            for name in got:
                assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-6), name


def test_variants_compute_the_same_losses_step_after_step(small):
    same([bench.SpdStep(*small, *variant) for variant in bench.VARIANTS.values()])


def test_yardstick_compares_the_same_losses(small):
    gpt, job = bench.yardstick_job(bench.Config(device="cpu"))
    small_job = dataclasses.replace(small[1], adversary="none")
    for gpt, job in ((gpt, job), (small[0], small_job)):
        same([bench.SpdStep(gpt, job, losses) for losses in (bench.losses, bench.straightforward)], n=2)


def test_as_installed_goes_back():
    common.fast_matmul()
    was = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), bench.as_installed():
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == was


def test_times_are_taken_in_turns():
    calls = []
    seconds = bench.interleaved(3, {name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "aabb" * 3 and {k: len(v) for k, v in seconds.items()} == dict(a=3, b=3)


@pytest.mark.parametrize("flags", [[], ["--yardstick"]])
def test_prints_every_figure(small, flags, monkeypatch, capsys):
    monkeypatch.setattr(bench, "default_job", lambda cfg: small)
    monkeypatch.setattr(bench, "yardstick_job", lambda cfg: (small[0], dataclasses.replace(small[1], adversary="none")))
    monkeypatch.setattr(bench, "peak_gib", lambda cfg: 0.5)
    monkeypatch.setattr(bench, "SQUARES", [(64, 64, 64)])
    bench.main("spd", "--rounds", "1", "--device", "cpu", *flags)
    out = capsys.readouterr().out
    for name in ("spd.py", "plain code", "public implementation") if flags else (
            "a step", "tokens/s", "4 forward", "3 backward", "GFLOP", "fraction", "0.50 GiB", *bench.VARIANTS,
            "Adam on all matrices"):
        assert name in out
    assert not re.search(r"\bnan\b|\binf\b", out)


def test_time_to_the_authors_quality_is_that_of_the_shortest_run_that_is_as_good(small, tmp_path, monkeypatch, capsys):
    gpt, job = small
    np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint16).tofile(tmp_path / "x.bin")
    gpt.vocab = [f"w{i}" for i in range(50)]
    jobs = {"a target": (gpt, str(tmp_path / "x.bin"), dataclasses.replace(job, steps=8), 3)}
    monkeypatch.setattr(bench, "quality_jobs", lambda cfg, folder: jobs)
    asked = []

    def quality(gpt, corpus, job):
        asked.append((job.optimizer, job.steps))
        recipe = dict(lr_scaled=job.lr_scaled, decay=job.decay, start=job.start)
        assert (recipe.items() <= spd.FORMER.items()) == (job.optimizer == "adam")
        return 9. / (1 + len(asked)), {"adam": .3}.get(job.optimizer, 1. / job.steps)
    monkeypatch.setattr(bench, "quality", quality)
    bench.main("spd", "--to-quality")
    # 4 steps are as good; of what lies between 2 and 4, 3 are not
    assert asked == [("adam", 8), *[("muon", n) for n in (1, 2, 4, 3)]]
    assert f"{9 / 2 / (9 / 5):.1f} times less (goal: 3)" in capsys.readouterr().out

    # of 64 the first as good is 45, then between 32 and 45: 38 is, 35 is not
    jobs["a target"] = gpt, str(tmp_path / "x.bin"), dataclasses.replace(job, steps=64), 3
    monkeypatch.setattr(bench, "quality", lambda gpt, corpus, job: (job.steps, float(job.steps < 37)
                        if job.optimizer == "muon" else .3))
    bench.main("spd", "--to-quality")
    out = capsys.readouterr().out
    assert re.findall(r"defaults, (\d+) steps", out)[-4:] == ["32", "45", "38", "35"]
    assert f"{64 / 38:.1f} times less" in out
    monkeypatch.setattr(bench, "quality", lambda gpt, corpus, job: (1., float(job.optimizer == "muon")))
    bench.main("spd", "--to-quality")                           # nothing is as good
    assert "times less" not in capsys.readouterr().out


def test_quality_is_the_loss_of_a_whole_run(small, tmp_path):
    gpt, job = small
    np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint16).tofile(tmp_path / "x.bin")
    corpus = bench.data.load_all(str(tmp_path / "x.bin"), [f"w{i}" for i in range(50)], job.T)
    for adversary in ("step", "pgd"):
        found = [bench.quality(gpt, corpus, dataclasses.replace(job, steps=n, lr=.03, adversary=adversary))
                 for n in (1, 1, 60)]
        assert found[0][1] == found[1][1] > found[2][1] and all(seconds > 0 for seconds, _ in found)


@pytest.mark.parametrize("name", list(bench.STEPS))
def test_activation_methods_print_every_variant_at_every_width(name, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WIDTHS", (32, 64))
    monkeypatch.setattr(bench, "peak_gib", lambda cfg, step: 0.5 if "'auto'" not in step else 1 / 0)
    monkeypatch.setattr(bench, "SQUARES", [(64, 64, 64)])
    build, variants = bench.STEPS[name]
    small = functools.partial(build, D=16, N=64, **({} if name == "molt" else dict(k=4)))
    small.__name__ = build.__name__
    monkeypatch.setitem(bench.STEPS, name, (small, variants))
    bench.main(name, "--rounds", "1")
    out = capsys.readouterr().out
    assert all(re.search(rf"{v} +F +{F} .* ms", out) for v in variants for F in (32, 64))
    assert out.count("0.50 GiB") == 2 and not re.search(r"\bnan\b|\binf\b", out)


def test_arithmetic_of_a_sparse_step_and_of_a_dense_one():
    """topk: the encoder's product alone, what it keeps is gathered; relu: encoder, decoder and three gradients."""
    N, D, F = 64, 16, 96
    count = lambda variant: bench.arithmetic(bench.sae_step("cpu", D=D, N=N, F=F, k=4, variant=variant))
    assert count("topk") == 2 * N * D * F and count("relu") == 5 * 2 * N * D * F


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Small shapes, and a function that writes the body of every peer's trainer."""
    monkeypatch.setattr(bench, "PEER_WIDTHS", (32, 64))
    monkeypatch.setattr(bench, "PEER_JOB", dict(k=4, N=64, steps=10))
    monkeypatch.setattr(bench, "PEERS", tmp_path)
    (first, goal), *_, (last, other) = bench.GOALS.items()
    monkeypatch.setattr(bench, "GOALS", {first: goal, last: other})
    return lambda body: (tmp_path / "peers.py").write_text("import time\nimport torch\n" + "".join(
        f"def {name}(a, F, k, steps, lr, seed):\n    {body}\n" for _, name in bench.GOALS))


def test_peers_that_are_not_installed_are_named(stand_ins, capfd):
    stand_ins("import a_package_that_is_missing")
    fails(capfd, lambda: bench.main("sae", "--peers", "--rounds", "1"), "a_package_that_is_missing", "tests/peers.py")


def test_a_peer_that_stops_ends_in_one_line(stand_ins, capfd):
    stand_ins("raise SystemExit(3)")
    fails(capfd, lambda: bench.main("sae", "--peers", "--rounds", "1"), "tests/peers.py")


@pytest.mark.slow
def test_peers_are_timed_as_installed_and_with_our_switches(stand_ins, capfd):
    """With stand-ins that say how they run, and sleep: each row and each ratio is printed, and their time is theirs."""
    stand_ins("print('is', torch.backends.mkldnn.matmul.fp32_precision, file=__import__('sys').stderr)\n"
              "    return lambda step, a: time.sleep(F / 200), None, None")
    bench.main("sae", "--peers", "--rounds", "1")
    out, err = capfd.readouterr()
    assert out.count(" x our ") == 4 and out.count(" ms") == 12 and "as long at F 64 as at 32" in out
    ms = [float(t) for t in re.findall(r"_topk +F +64 .* ([0-9.]+) ms", out)]
    assert len(ms) == 2 and all(320 <= t < 1000 for t in ms)
    said = [line for line in err.splitlines() if line.startswith("is")]
    assert sorted(said) == 4 * [f"is {'bf16' if common.fast_matmul() else 'none'}"] + 4 * ["is none"]


def test_a_target_that_is_missing_is_one_line(capfd):
    fails(capfd, lambda: bench.main("spd", "--model", "/nowhere"), "/nowhere/config.json: no such file")


@pytest.mark.slow
def test_peak_memory_of_the_default_job():
    assert 0.1 < bench.peak_gib(bench.Config(device="cpu")) < 1.5


@pytest.mark.parametrize("argv, says", [
    ([], "one of: spd, sae"), (["sdp"], "one of: spd, sae"), (["--rounds", "3"], "one of: spd, sae"),
    (["spd", "--rounds", "0"], "--rounds 0"), (["spd", "--round", "3"], "--round"),
    (["transcoder", "--peers"], "--peers: goes with sae"), (["sae", "--to_quality"], "--to_quality: goes with spd"),
    (["molt", "--yardstick"], "--yardstick: goes with spd")])
def test_bad_input_ends_in_one_line(argv, says, capsys):
    fails(capsys, lambda: bench.main(*argv), says)
