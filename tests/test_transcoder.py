"""Oracles of transcoder.py: known answers and a second way to each number, on tiny random models."""
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
import transcoder
from conftest import D, M, T, V, kill
from model import GPT
from test_common import fails
from transcoder import Config, Transcoder

ROOT = Path(transcoder.__file__).parent
VARIANTS = ["topk", "batchtopk", "jumprelu", "relu"]


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS", 8)
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", F=24, k=3,
                  N=40, T=T, steps=6, lr=1e-2, dead=72, log_every=1, save_every=2, eval_tokens=120)


def started(cfg, x, y, k=3, **change):
    """A transcoder of x to y, its biases stirred."""
    m = Transcoder(dataclasses.replace(cfg, k=k, **change), x.shape[1], torch.Generator().manual_seed(0), 1)
    m.start(x, y)
    for name, p in m.named_parameters():
        if name.startswith("b_"):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    m.threshold.fill_(0.4)
    return m


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(m, batches, steps):
    """The loop of transcoder.train without the model around it -> terms of the last step."""
    opts = transcoder.optimizers(m)
    for step in range(steps):
        x, y = batches(step)
        loss, terms, seen = transcoder.loss_fn(m, x, y, None, step / steps)
        transcoder.update(m, opts, loss, step / steps)
        transcoder.remember(m, step / steps, *seen)
    return terms


def test_topk_keeps_the_k_largest_by_sorting(cfg):
    x = 3 + rand(20, D)
    m = started(cfg, x, x)
    pre = x * m.scale_in @ m.W_enc.T + m.b_enc
    for f, row in zip(m.codes(x), pre):
        assert torch.allclose(f[f > 0].sort().values, torch.tensor(sorted(row.tolist())[-3:]))
        assert torch.equal(f > 0, row >= sorted(row)[-3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_alone_equals_the_token_in_a_batch(cfg, variant):
    a = rand(50, D)
    m = started(cfg, a, rand(50, D, seed=1), variant=variant)
    assert torch.allclose(torch.cat([m.codes(row) for row in a.split(1)]), m.codes(a), atol=1e-6)
    assert (m.codes(a) > 0).any(1).float().mean() > .5


def relu_mlp(seed=0):
    """Weights and the function of an MLP with ReLUs: W_in (D, M), b_in, W_out (M, D), b_out."""
    ws = rand(D, M, seed=seed), rand(M, seed=seed + 1), rand(M, D, seed=seed + 2), rand(D, seed=seed + 3)
    return ws, lambda x: (x @ ws[0] + ws[1]).relu() @ ws[2] + ws[3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_built_from_the_weights_of_a_relu_mlp_it_is_exact(cfg, variant):
    (W_in, b_in, W_out, b_out), mlp = relu_mlp()
    m = Transcoder(dataclasses.replace(cfg, variant=variant, F=M, k=M, theta=0.), D, torch.Generator())
    m.W_enc.data, m.b_enc.data, m.W_dec.data, m.b_dec.data = W_in.T.clone(), b_in.clone(), W_out.clone(), b_out.clone()
    x = rand(4, 7, D, seed=9)
    f = m.encode(1, x, mlp)
    assert torch.allclose(m.decode(1, f, x), mlp(x), atol=1e-4)
    flat = x.flatten(0, 1)
    assert transcoder.loss_fn(m, flat, mlp(flat), None, 0)[1]["rec"] < 1e-9
    shares = m.contrib(1, f, x, torch.arange(M)).sum(-2) + m.b_dec
    assert torch.allclose(shares, mlp(x), atol=1e-4)


def test_skip_alone_fits_a_linear_map(cfg):
    A, b = rand(D, D), rand(D, seed=1)
    m = started(cfg, rand(60, D, seed=2), rand(60, D, seed=2) @ A + b, skip=True, steps=800, lr=2e-2)
    with torch.no_grad():
        m.W_enc.zero_(), m.b_enc.fill_(-1)                      # no unit is ever on
    batches = lambda step: (rand(60, D, seed=step), rand(60, D, seed=step) @ A + b)
    fit(m, batches, 800)
    m.fold()
    x = rand(3, 5, D, seed=77)
    y = m.decode(1, m.encode(1, x, None), x)
    assert (y - (x @ A + b)).norm() < 0.05 * (x @ A + b).norm()


def test_pre_and_output_start_centred(cfg):
    x, y = 3 + rand(100, D), 5 + rand(100, D, seed=1)
    m = Transcoder(cfg, D, torch.Generator())
    m.start(x, y)
    assert torch.allclose(F.linear(x * m.scale_in, m.W_enc, m.b_enc).mean(0), torch.zeros(cfg.F), atol=1e-5)
    assert torch.allclose(m.b_dec / m.scale, y.mean(0), atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_it_reads_raw_activations_and_does_the_same(cfg, variant, skip):
    x, y = 3 * rand(100, D), 5 + rand(100, D, seed=1)
    m = started(cfg, x, y, variant=variant, skip=skip, theta=.1)
    if skip:
        m.W_skip.data += rand(D, D, seed=2)
    x_BTD = x.view(4, 25, D)
    before = m.encode(1, x_BTD, None)
    out, scale = m.decode(1, before, x_BTD), m.scale.item()
    m.fold()
    after = m.encode(1, x_BTD, None)
    assert m.scale == m.scale_in == 1 and scale != 1 and (before > 0).any()
    assert torch.allclose(after * scale, before, atol=1e-4)
    assert torch.allclose(m.decode(1, after, x_BTD), out, atol=1e-4)


def test_kl_through_the_suffix_equals_kl_of_full_forwards(cfg, target):
    cfg, gpt = dataclasses.replace(cfg, objective="kl", N=2 * (T - 1)), GPT.load(target)
    m, corpus = transcoder.build(cfg, gpt), transcoder.data.load(cfg.data, "train", gpt.vocab)
    x, y, kl = next(transcoder.examples(cfg, gpt, m, corpus, 0))
    idx = corpus.batch(0, 2, T, cfg.seed)
    noise = rand(2, T, D)
    noise[:, 0] = 0                                             # the first token of a row is left alone
    replace = lambda layer, x, mlp: mlp(x) + noise if layer == 1 else mlp(x)
    logp, logq = F.log_softmax(gpt(idx), -1), F.log_softmax(gpt(idx, replace), -1)
    want = (logp.exp() * (logp - logq)).sum(-1)[:, 1:].mean()
    assert x.shape == y.shape == (2 * (T - 1), D) and want > 1e-3 and torch.equal(gpt.h[1].mlp(x), y)
    assert torch.allclose(kl(y + noise[:, 1:].flatten(0, 1)), want, atol=1e-5) and kl(y).abs() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_rows_have_norm_one_after_each_step(cfg, variant):
    m = started(cfg, rand(60, D), rand(60, D, seed=1), variant=variant)
    first = m.W_dec.detach().clone()
    for steps in (1, 5):
        fit(m, lambda step: (rand(60, D, seed=step), rand(60, D, seed=step + 1)), steps)
        assert torch.allclose(m.W_dec.norm(dim=1), torch.ones(m.cfg.F), atol=1e-6)
    assert not torch.allclose(m.W_dec, first, atol=1e-3)


def test_a_silent_unit_is_counted_and_revived(cfg):
    a = rand(100, D)
    m = started(cfg, a, a.roll(1, 1), steps=10, N=100, dead=200, F=12, k=2)
    m.b_enc.data[5] = -20                                       # negative everywhere, and revived all the same
    for step in range(2):
        loss, terms, seen = transcoder.loss_fn(m, a, a.roll(1, 1), None, 0)
        assert not seen[0][5] and terms["dead"] == 0 and m.idle[5] == 100 * step
        transcoder.remember(m, 0, *seen)
    loss, terms, seen = transcoder.loss_fn(m, a, a.roll(1, 1), None, 0)
    loss.backward()
    assert terms["dead"] == (m.idle >= 200).sum() > 0 and terms["aux"] > 0
    assert m.W_enc.grad[5].norm() > 0 and m.W_dec.grad[5].norm() > 0 and "idle" in m.state_dict()


@pytest.mark.parametrize("change, matrices", [
    (dict(), "W_enc W_dec"), (dict(skip=True), "W_enc W_dec W_skip"), (dict(variant="jumprelu"), "W_enc W_dec")])
def test_muon_trains_the_matrices_and_adam_the_rest(cfg, change, matrices):
    a = rand(60, D)
    m = started(cfg, a, a.roll(1, 1), steps=200, optimizer="muon", lr=2e-2, lr_rest=3e-3, **change)
    opts, name = transcoder.optimizers(m), {id(p): name for name, p in m.named_parameters()}
    given = {key: {name[id(p)] for p in opt.param_groups[0]["params"]} for key, opt in opts.items()}
    trained = {name for name, p in m.named_parameters() if p.requires_grad}
    assert given == dict(opt=set(matrices.split()), opt_rest=trained - set(matrices.split()))
    assert isinstance(opts["opt"], torch.optim.Muon) and isinstance(opts["opt_rest"], torch.optim.Adam)
    for t, share in ((0, 0.1), (0.5, 1), (0.9, 0.5)):           # both follow the schedule
        transcoder.update(m, opts, transcoder.loss_fn(m, a, a.roll(1, 1), None, t)[0], t)
        assert [opt.param_groups[0]["lr"] for opt in opts.values()] == pytest.approx([2e-2 * share, 3e-3 * share])
    first = transcoder.loss_fn(m, a, a.roll(1, 1), None, 0)[1]["rec"]
    assert fit(m, lambda step: (a, a.roll(1, 1)), 200)["rec"] < 0.7 * first


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(cfg, variant):
    x, y = rand(12, D), rand(12, D, seed=1)
    m = started(cfg, x, y, variant=variant, F=48, k=6, steps=400, N=12, theta=.1, c_l0=0., follow=0.,
                c_first=0.)
    first = transcoder.loss_fn(m, x, y, None, 0)[1]["rec"]
    assert fit(m, lambda step: (x, y), 400)["rec"] < 0.02 * first


def losses(cfg):
    transcoder.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_losses(cfg, tmp_path):
    first, *others = [losses(dataclasses.replace(cfg, variant="jumprelu", seed=seed, out=str(tmp_path / f"{i}")))
                      for i, seed in enumerate((0, 0, 1))]
    assert first == others[0] != others[1] and len(first) == cfg.steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_touches_neither_state_nor_random_numbers(cfg, target, variant):
    gpt = GPT.load(target)
    m = transcoder.build(dataclasses.replace(cfg, variant=variant), gpt)
    before, rng = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    gpt(idx, evals.splice(m))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("optimizer, change", [
    ("adam", dict(variant="batchtopk", dead=40)), ("muon", dict(variant="relu", skip=True)),
    ("muon", dict(variant="jumprelu", objective="kl"))])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, optimizer, change):
    cfg = dataclasses.replace(cfg, optimizer=optimizer, **change)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    transcoder.train(whole)
    kill(cfg)
    for _ in range(2):                                          # the second finds it finished, and folded once
        transcoder.train(dataclasses.replace(cfg, resume=True))
        (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "transcoder.safetensors") for c in (whole, cfg))
        assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
        state = dict(adam="exp_avg", muon="momentum_buffer")[optimizer]
        assert {f"opt.0.{state}", "opt_rest.0.exp_avg"} <= a.keys()
        assert all(torch.equal(a[k], b[k]) for k in a) and a["m.scale"] == 1      # saved folded
        assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()


def test_summary_has_the_promised_keys(cfg):
    transcoder.train(cfg)
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_recovered", "fve", "l0", "active_params", "dead_fraction", "seconds", "config"}
    assert promised <= on_disk.keys() and on_disk["config"]["k"] == 3 and on_disk["l0"] <= 3
    assert on_disk["active_params"] == pytest.approx(on_disk["l0"] * 2 * D)


def test_sweep_saves_data_and_picture(cfg):
    runs = transcoder.main(dataclasses.replace(cfg, sweep=True, k=4, steps=2))
    assert [run["k"] for run in runs] == [1, 2, 4, 8, 16]
    assert json.loads((Path(cfg.out) / "sweep.json").read_text())["rows"] == json.loads(json.dumps(runs))
    assert (Path(cfg.out) / "sweep.png").stat().st_size > 1000


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = transcoder.loss_fn
    sick = lambda m, x, y, kl, t: real(m, x, y * (math.nan if t > .5 else 1), kl, t)
    monkeypatch.setattr(transcoder, "loss_fn", sick)
    with pytest.raises(SystemExit) as stop:
        transcoder.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "transcoder.safetensors")[1]["step"] == 4       # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(layer=-2), "--layer -2"), (dict(F=0), "--F 0"), (dict(T=T + 1), f"--T {T + 1}"),
    (dict(k=25), "--k 25"), (dict(k=0), "--k 0"), (dict(N=0), "--N 0"), (dict(N=89), "--N 89"),
    (dict(steps=0), "--steps 0"), (dict(model="nowhere"), "nowhere"), (dict(data="nowhere.bin"), "nowhere.bin"),
    (dict(sweep=True, k=3), "--sweep"), (dict(resume=True), "no such file"), (dict(device="tpu"), "--device tpu"),
    (dict(lr_rest=-1.), "--lr_rest -1"), (dict(variant="stochastic"), "python stochastic.py")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: transcoder.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    transcoder.train(cfg)
    path = Path(cfg.out) / "transcoder.safetensors"
    kept = path.read_bytes()
    for change in (dict(k=4), dict(seed=5), dict(variant="relu")):
        wrong = dataclasses.replace(cfg, resume=True, **change)
        fails(capsys, lambda: transcoder.train(wrong), "does not fit this run")
    assert path.read_bytes() == kept
