"""Oracles of stochastic.py: known answers and a second way to each number, on tiny random models."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import data
import evals
import stochastic
from conftest import D, M, T, V, kill
from model import GPT
from sae import SAE
from stochastic import Config, Stochastic
from test_common import fails
from test_sae import planted, rand
from test_transcoder import relu_mlp
from transcoder import Transcoder

ROOT = Path(stochastic.__file__).parent
BASES = {"sae": SAE, "transcoder": Transcoder}
KINDS = [dict(base="sae"), dict(base="sae", site="mlp_in"), dict(base="sae", site="resid"),
         dict(base="transcoder"), dict(base="transcoder", skip=True)]


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS", 8)
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", F=24, k=3,
                  N=40, T=T, steps=6, lr=1e-2, dead=72, log_every=1, save_every=2, eval_tokens=120)


def made(cfg, width, gen):
    return Stochastic(cfg, BASES[cfg.base](stochastic.base_config(cfg), width, gen, 1))


def batch(cfg, seed=0, n=60):
    """What one batch of this base is: activations, or input and output."""
    return [rand(n, D, seed=seed)] if cfg.base == "sae" else [rand(n, D, seed=seed), rand(n, D, seed=seed + 1)]


def loss_of(m, activations, progress=0., seed=0):
    gen = torch.Generator().manual_seed(seed)
    return stochastic.loss_fn(m, activations[0], activations[-1], None, progress, gen)


def started(cfg, activations, **change):
    """One on these activations, its biases and gates stirred."""
    m = made(dataclasses.replace(cfg, **change), D, torch.Generator().manual_seed(0))
    m.start(*activations)
    for p in (m.b_enc, m.b_dec, m.gate.b):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return m


def fit(m, batches, steps):
    """The loop of stochastic.train without the model around it -> terms of the last step."""
    opts, gen = stochastic.optimizers(m), torch.Generator().manual_seed(0)
    for step in range(steps):
        activations = batches(step)
        activations = activations if isinstance(activations, list) else [activations]
        if not step:
            m.start(*activations)
        loss, terms, seen = stochastic.loss_fn(m, activations[0], activations[-1], None, step / steps, gen)
        stochastic.update(m, opts, loss, step / steps)
        stochastic.remember(m, step / steps, *seen)
    return terms


def test_with_open_gates_an_identity_dictionary_has_zero_loss(cfg):
    a = rand(30, D)
    m = made(dataclasses.replace(cfg, base="sae", F=2 * D, k=D), D, torch.Generator())
    m.start(a)
    I = torch.cat([torch.eye(D), -torch.eye(D)])
    m.W_enc.data, m.W_dec.data = I.clone(), I.clone()
    m.gate.b.data += 100                                        # no noise, nothing rounded
    _, terms, seen = loss_of(m, [a])
    assert terms["rec"] < 1e-10 and terms["l0"] == D and seen.fired_F.all()
    assert torch.allclose(m.rebuild(m.codes(a)), a, atol=1e-5)
    m.fold()
    assert torch.allclose(m.rebuild(m.codes(a)), a, atol=1e-5)


def test_with_open_gates_the_weights_of_a_relu_mlp_are_exact(cfg):
    (W_in, b_in, W_out, b_out), mlp = relu_mlp()
    m = made(dataclasses.replace(cfg, F=M, k=M), D, torch.Generator())
    m.W_enc.data, m.b_enc.data, m.W_dec.data, m.b_dec.data = W_in.T.clone(), b_in.clone(), W_out.clone(), b_out.clone()
    m.gate.b.data += 100
    x = rand(4, 7, D, seed=9)
    f = m.encode(1, x, mlp)
    assert torch.allclose(m.decode(1, f, x), mlp(x), atol=1e-4)
    flat = x.flatten(0, 1)
    assert loss_of(m, [flat, mlp(flat)])[1]["rec"] < 1e-9
    assert torch.allclose(m.contrib(1, f, x, torch.arange(M)).sum(-2) + m.b_dec, mlp(x), atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_a_token_alone_equals_the_token_in_a_batch(cfg, base):
    m = started(cfg, batch(dataclasses.replace(cfg, base=base)), base=base)
    a = rand(50, D)
    assert torch.allclose(torch.cat([m.codes(row) for row in a.split(1)]), m.codes(a), atol=1e-6)
    assert (m.codes(a) > 0).any(1).float().mean() > .5


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_folded_it_reads_raw_activations_and_does_the_same(cfg, target, kind):
    gpt, cfg = GPT.load(target), dataclasses.replace(cfg, **kind)
    m = stochastic.build(cfg, gpt)
    m.start(*[5 * a for a in batch(cfg)])
    m.b_enc.data += 0.1 * rand(cfg.F)
    m.gate.b.data += 0.1 * rand(cfg.F, seed=1)
    if cfg.skip:
        m.W_skip.data += rand(D, D, seed=2)
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    x, before = evals.clean(m, gpt, idx, 1)
    y, scale = m.decode(1, before, x), m.scale.item()
    m.fold()
    after = m.encode(1, x, gpt.h[1].mlp)
    assert m.scale == m.scale_in == 1 and scale != 1 and (before > 0).any()
    assert torch.allclose(after * scale, before, atol=1e-4) and torch.allclose(m.decode(1, after, x), y, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_gates_start_centred_and_half_open(cfg, base):
    cfg = dataclasses.replace(cfg, base=base)
    x, *rest = batch(cfg, n=100)
    m = made(cfg, D, torch.Generator())
    m.start(3 + x, *rest)
    assert torch.allclose(m.gate_logits((3 + x) * m.scale_in).mean(0), torch.full((cfg.F,), .5), atol=1e-5)
    assert torch.allclose(m.gate.W / m.gate.W.norm(dim=1, keepdim=True), 2 * m.W_enc, atol=1e-6)


@pytest.mark.parametrize("kind", [dict(base="sae"), dict(base="sae", frozen=True), dict(base="transcoder")], ids=str)
def test_decoder_rows_have_norm_one_after_each_step(cfg, kind):
    cfg = dataclasses.replace(cfg, **kind)
    m = started(cfg, batch(cfg))
    first = m.W_dec.detach().clone()
    for steps in (1, 5):
        fit(m, lambda step: batch(cfg, seed=step), steps)
        assert torch.allclose(m.W_dec.norm(dim=1), torch.ones(cfg.F), atol=1e-6)
    assert torch.equal(m.W_dec, first) == cfg.frozen


def test_the_gate_of_a_dead_unit_is_pushed_open(cfg):
    a = rand(100, D)
    m = started(cfg, [a], base="sae", N=100, dead=200, F=12, k=2)
    m.gate.b.data[5], m.idle[5] = -3, 200
    slopes = []
    for c_wake in (0, 0.2):
        m.cfg = dataclasses.replace(m.cfg, c_wake=c_wake)
        m.zero_grad()
        loss_of(m, [a], 1)[0].backward()
        slopes.append(m.gate.b.grad.clone())
    pushed = slopes[1] - slopes[0]
    assert pushed[5].item() == pytest.approx(-0.2 / 32, abs=1e-7) and pushed[m.idle < 200].abs().max() < 1e-7


@pytest.mark.parametrize("base", BASES)
def test_noise_fills_what_the_gate_leaves_open_and_only_that(cfg, base):
    cfg = dataclasses.replace(cfg, base=base)
    activations = batch(cfg, n=4000)
    quiet, noisy = (started(cfg, activations, noise=noise) for noise in (False, True))
    rec = lambda m, seed: loss_of(m, activations, 1, seed)[1]["rec"].item()
    assert rec(quiet, 0) == rec(quiet, 1) and rec(noisy, 0) != rec(noisy, 1)
    for m in (quiet, noisy):
        m.gate.b.data += 100
    assert rec(quiet, 0) == pytest.approx(rec(noisy, 0))        # g = 1 pins the mask
    m.gate.b.data -= 200                                        # g = 0: the mask is the source, half open on average
    with torch.no_grad():
        v = m.pre(activations[0] * m.scale_in, m.W_enc, m.b_enc).full().relu()
        mean = activations[-1] * m.scale - m.b_dec - v @ m.W_dec / 2
        spread = v.square().sum(-1) / 12                        # of source times v, rows of norm 1: a source each,
        spread[::2] = (v @ m.W_dec)[::2].square().sum(-1) / 12  # or one for all
    want = (mean.square().sum(-1) + spread).mean() / m.variance
    assert rec(noisy, 0) == pytest.approx(want.item(), rel=.02)


@pytest.mark.parametrize("change, matrices", [
    (dict(base="sae"), "base.W_enc base.W_dec gate.W"), (dict(base="sae", frozen=True), "base.W_enc gate.W"),
    (dict(skip=True), "base.W_enc base.W_dec base.W_skip gate.W")])
def test_muon_trains_the_matrices_and_adam_the_rest(cfg, change, matrices):
    cfg = dataclasses.replace(cfg, steps=200, optimizer="muon", lr=2e-2, lr_rest=3e-3, **change)
    activations = batch(cfg)
    m = started(cfg, activations)
    opts, name = stochastic.optimizers(m), {id(p): name for name, p in m.named_parameters()}
    given = {key: {name[id(p)] for p in opt.param_groups[0]["params"]} for key, opt in opts.items()}
    trained = {name for name, p in m.named_parameters() if p.requires_grad}
    assert given == dict(opt=set(matrices.split()), opt_rest=trained - set(matrices.split()))
    for t, share in ((0, 0.1), (0.5, 1), (0.9, 0.5)):           # both follow the schedule
        stochastic.update(m, opts, loss_of(m, activations, t)[0], t)
        assert [opt.param_groups[0]["lr"] for opt in opts.values()] == pytest.approx([2e-2 * share, 3e-3 * share])


@pytest.mark.parametrize("base", BASES)
def test_overfits_one_batch(cfg, base):
    cfg = dataclasses.replace(cfg, base=base, F=48, k=6, steps=400, N=12, follow=0., c_first=0.)
    activations = batch(cfg, n=12)
    m = started(cfg, activations)
    first = loss_of(m, activations)[1]["rec"]
    assert fit(m, lambda step: activations, 400)["rec"] < 0.02 * first


def test_recovers_a_planted_dictionary():
    gen = torch.Generator().manual_seed(0)
    true = F.normalize(torch.randn(64, 64, generator=gen), dim=-1)
    m = made(Config(base="sae", F=96, k=3, N=128, steps=1200, lr=5e-3, c_first=1e-2), 64, gen)
    fit(m, lambda step: planted(128, true, gen), 1200)
    assert (true @ m.W_dec.detach().T).max(1).values.mean() >= 0.95


def test_the_two_terms_of_the_penalty_alone(cfg):
    """lambda follows L0: what multiplies the penalty is no matter if it divides the first lambda, and a large frequency
    term leaves nothing of the importance."""
    activations, g, how = batch(cfg), rand(60, cfg.F).sigmoid(), dict(noise=False, steps=30, follow=0.1)
    penalty = lambda **change: stochastic.penalty_of(g, dataclasses.replace(cfg, **change), 0.5).item()
    width = 1 - 0.9 * 0.5 / 0.9
    s = (g**2 / (g**2 + width**2)).mean(0)
    assert penalty(w_freq=0.) == pytest.approx(s.sum().item())
    assert penalty(w_freq=1e3) == pytest.approx(1e3 * (s * torch.log2(1 + 1024 * s)).sum().item(), rel=1e-3)
    runs = [fit(started(cfg, activations, w_freq=w, c_first=c, **how), lambda step: activations, 30)
            for w, c in ((1e3, 1e-6), (1e5, 1e-8), (0., 1e-3))]
    for key in ("rec", "penalty"):
        assert runs[0][key].item() == pytest.approx(runs[1][key].item(), rel=0.01) != runs[2][key].item()


def losses(cfg):
    stochastic.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("base", BASES)
def test_same_seed_same_losses(cfg, tmp_path, base):
    first, *others = [losses(dataclasses.replace(cfg, base=base, seed=seed, out=str(tmp_path / f"{i}")))
                      for i, seed in enumerate((0, 0, 1))]
    assert first == others[0] != others[1] and len(first) == cfg.steps


@pytest.mark.parametrize("base", BASES)
def test_evaluation_touches_neither_state_nor_random_numbers(cfg, target, base):
    gpt = GPT.load(target)
    m = stochastic.build(dataclasses.replace(cfg, base=base), gpt)
    before, rng = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    gpt(idx, evals.splice(m))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("change", [dict(base="sae", site="resid"), dict(skip=True, objective="kl", optimizer="muon")])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, target, change):
    cfg = dataclasses.replace(cfg, **change)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    stochastic.train(whole)
    kill(cfg)
    for _ in range(2):                                          # the second finds it finished, and folded once
        stochastic.train(dataclasses.replace(cfg, resume=True))
        (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "stochastic.safetensors") for c in (whole, cfg))
        assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a) and a["m.base.scale"] == 1           # saved folded
        assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()
    m = stochastic.load(Path(cfg.out) / "stochastic.safetensors", GPT.load(target))
    assert torch.equal(m.gate.W, a["m.gate.W"]) and not m.gate.W.requires_grad


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_summary_has_the_promised_keys(cfg, kind):
    stochastic.train(dataclasses.replace(cfg, **kind))
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_recovered", "fve", "l0", "active_params", "dead_fraction", "seconds", "config"}
    assert promised <= on_disk.keys() and on_disk["config"]["base"] == kind["base"]
    assert on_disk["active_params"] == pytest.approx(on_disk["l0"] * 3 * D + (D * D if kind.get("skip") else 0))
    assert ("fve_site" in on_disk) == (kind["base"] == "sae")


def test_sweep_saves_data_and_picture(cfg):
    runs = stochastic.main(dataclasses.replace(cfg, sweep=True, k=4, steps=2))
    assert [run["k"] for run in runs] == [1, 2, 4, 8, 16]
    assert (Path(cfg.out) / "sweep.png").stat().st_size > 1000


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = stochastic.loss_fn
    sick = lambda m, x, y, kl, t, gen: real(m, x, y * (math.nan if t > .5 else 1), kl, t, gen)
    monkeypatch.setattr(stochastic, "loss_fn", sick)
    with pytest.raises(SystemExit) as stop:
        stochastic.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "stochastic.safetensors")[1]["step"] == 4        # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(k=25), "--k 25"), (dict(N=89), "--N 89"), (dict(seed=-1), "--seed -1"),
    (dict(lr=-1.), "--lr -1"), (dict(gamma_end=0.), "--gamma_end 0"), (dict(sweep=True, k=3), "--sweep"),
    (dict(site="resid"), "--site resid: goes with --base sae"), (dict(frozen=True), "--frozen True: goes with"),
    (dict(base="sae", skip=True), "--skip True: goes with --base transcoder"), (dict(c_wake=1.), "--c_wake 1")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: stochastic.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    stochastic.train(cfg)
    path = Path(cfg.out) / "stochastic.safetensors"
    kept = path.read_bytes()
    for change in (dict(k=4), dict(base="sae"), dict(noise=False)):
        wrong = dataclasses.replace(cfg, resume=True, **change)
        fails(capsys, lambda: stochastic.train(wrong), "does not fit this run")
    assert path.read_bytes() == kept
