"""Oracles of sae.py: known answers and a second way to each number, on tiny random models and planted features."""
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
import sae
from conftest import D, T, V, kill
from model import GPT
from sae import SAE, Config
from test_common import fails

ROOT = Path(sae.__file__).parent
VARIANTS, SITES = ["topk", "batchtopk", "jumprelu", "relu"], ["mlp_out", "mlp_in", "resid"]


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS", 8)
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", F=24, k=3,
                  N=40, T=T, steps=6, lr=1e-2, dead=72, log_every=1, save_every=2, eval_tokens=120)


def started(cfg, a, k=3, **change):
    """An SAE on the activations a, its biases stirred."""
    m = SAE(dataclasses.replace(cfg, k=k, **change), a.shape[1], torch.Generator().manual_seed(0), 1)
    m.start(a)
    for name, p in m.named_parameters():
        if name.startswith("b_"):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    m.threshold.fill_(0.4)
    return m


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(m, batches, steps):
    """The loop of sae.train without the model around it -> terms of the last step."""
    opts = sae.optimizers(m)
    for step in range(steps):
        a = batches(step)
        if not step:
            m.start(a)
        loss, terms, seen = sae.loss_fn(m, a, None, step / steps)
        sae.update(m, opts, loss, step / steps)
        sae.remember(m, step / steps, *seen)
    return terms


def test_topk_keeps_the_k_largest_by_sorting(cfg):
    a = 3 + rand(20, D)
    m = started(cfg, a)
    pre = (a * m.scale - m.b_dec) @ m.W_enc.T + m.b_enc
    for f, row in zip(m.codes(a), pre):
        assert torch.allclose(f[f > 0].sort().values, torch.tensor(sorted(row.tolist())[-3:]))
        assert torch.equal(f > 0, row >= sorted(row)[-3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_dictionary_has_zero_loss(cfg, variant):
    a = rand(30, D)
    m = SAE(dataclasses.replace(cfg, variant=variant, F=2 * D, k=D, theta=0.), D, torch.Generator())
    m.start(a)
    I = torch.cat([torch.eye(D), -torch.eye(D)])
    m.W_enc.data, m.W_dec.data = I.clone(), I.clone()
    loss, terms, seen = sae.loss_fn(m, a, None, 0)
    assert terms["rec"] < 1e-10 and terms["l0"] == D and seen[0].all()
    a_hat = m.rebuild(m.codes(a))
    assert torch.allclose(a_hat, a, atol=1e-5)
    m.fold()
    assert torch.allclose(m.rebuild(m.codes(a)), a, atol=1e-5)


def test_jumprelu_pseudo_gradients_are_the_numerical_ones_of_the_smoothed_loss():
    """Averaged over many pre-activations, the loss is smooth in theta; its difference quotient over the window is the
    pseudo-gradient. The weights of the loss differ from unit to unit."""
    bw, n = 0.4, 40_001
    pre = torch.linspace(-1, 3, n).double().unsqueeze(1).expand(n, 3)
    theta, w_f, w_on = (torch.tensor(v).double() for v in ([0.3, 1.0, 2.0], [2.0, -1.0, 0.5], [0.0, 3.0, 1.0]))

    def loss(pre, theta):
        f, rate = sae.JumpReLU.apply(pre, theta, bw)
        return (w_f * f).sum() + n * (w_on * rate).sum()
    theta.requires_grad_(), pre.requires_grad_()
    got, dpre = torch.autograd.grad(loss(pre, theta), (theta, pre))
    for i, h in enumerate(torch.eye(3).double() * bw / 2):
        numerical = (loss(pre, theta + h) - loss(pre, theta - h)) / bw
        assert got[i].item() == pytest.approx(numerical.item(), rel=1e-3)
    assert torch.equal(dpre, w_f * (pre > theta))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_alone_equals_the_token_in_a_batch(cfg, variant):
    a = rand(50, D)
    m = started(cfg, a, variant=variant)
    assert torch.allclose(torch.cat([m.codes(row) for row in a.split(1)]), m.codes(a), atol=1e-6)
    assert (m.codes(a) > 0).any(1).float().mean() > .5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("site", SITES)
def test_folded_it_reads_raw_activations_and_does_the_same(cfg, target, variant, site):
    gpt = GPT.load(target)
    m = sae.build(dataclasses.replace(cfg, variant=variant, site=site, theta=.1), gpt)
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    m.start(5 * rand(100, D))
    m.threshold.fill_(0.2)
    m.b_enc.data += 0.1 * rand(m.cfg.F)
    x, before = evals.clean(m, gpt, idx, 1)
    y, scale = m.decode(1, before, x), m.scale.item()
    m.fold()
    after = m.encode(1, x, gpt.h[1].mlp)
    assert m.scale == 1 and scale != 1 and (before > 0).any()
    assert torch.allclose(after * scale, before, atol=1e-4) and torch.allclose(m.decode(1, after, x), y, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_a_perfect_reconstruction_leaves_the_model_as_it_is(cfg, target, site):
    gpt = GPT.load(target)
    m = sae.build(dataclasses.replace(cfg, variant="relu", site=site, F=2 * D), gpt)
    I = torch.cat([torch.eye(D), -torch.eye(D)])
    m.W_enc.data, m.W_dec.data = I.clone(), I.clone()
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gpt(idx, evals.splice(m)), gpt(idx), atol=1e-4)
    x, f = evals.clean(m, gpt, idx, 1)
    units, y = torch.tensor([3, 0, 9]), m.decode(1, f, x)
    for i, u in enumerate(units):                               # a unit's share of y: y less y without it
        off = f.clone()
        off[..., u] = 0
        assert torch.allclose(m.contrib(1, f, x, units)[..., i, :], y - m.decode(1, off, x), atol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_kl_through_the_suffix_equals_kl_of_full_forwards(cfg, target, site):
    cfg, gpt = dataclasses.replace(cfg, objective="kl", site=site, N=2 * (T - 1)), GPT.load(target)
    m, corpus = sae.build(cfg, gpt), sae.data.load(cfg.data, "train", gpt.vocab)
    a, kl = next(sae.examples(cfg, gpt, m, corpus, 0))
    idx = corpus.batch(0, 2, T, cfg.seed)
    noise = rand(2, T, D)
    noise[:, 0] = 0                                             # the first token of a row is left alone

    def replace(layer, x, mlp):
        stream = getattr(m, "stream", None)
        return m.write(m.read(x, mlp(x), stream) + noise, mlp, stream) if layer == 1 else mlp(x)
    logp, logq = F.log_softmax(gpt(idx), -1), F.log_softmax(gpt(idx, replace), -1)
    want = (logp.exp() * (logp - logq)).sum(-1)[:, 1:].mean()
    assert a.shape == (2 * (T - 1), D) and want > 1e-3
    assert torch.allclose(kl(a + noise[:, 1:].flatten(0, 1)), want, atol=1e-5) and kl(a).abs() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_rows_have_norm_one_after_each_step(cfg, variant):
    m = started(cfg, rand(60, D), variant=variant)
    first = m.W_dec.detach().clone()
    for steps in (1, 5):
        fit(m, lambda step: rand(60, D, seed=step), steps)
        assert torch.allclose(m.W_dec.norm(dim=1), torch.ones(m.cfg.F), atol=1e-6)
    assert not torch.allclose(m.W_dec, first, atol=1e-3)
    m = started(cfg, rand(60, D), variant=variant, frozen=True)
    first, W_enc = m.W_dec.clone(), m.W_enc.clone()
    fit(m, lambda step: rand(60, D, seed=step), 5)
    assert torch.equal(m.W_dec, first) and not torch.allclose(m.W_enc, W_enc, atol=1e-3)


def test_a_silent_unit_is_counted_and_revived(cfg):
    a = rand(100, D)
    m = started(cfg, a, steps=10, N=100, dead=200, F=12, k=2)
    m.b_enc.data[5] = -20                                       # negative everywhere, and revived all the same
    for step in range(2):
        loss, terms, seen = sae.loss_fn(m, a, None, 0)
        assert not seen[0][5] and terms["dead"] == 0 and m.idle[5] == 100 * step
        sae.remember(m, 0, *seen)
    loss, terms, seen = sae.loss_fn(m, a, None, 0)
    loss.backward()
    assert terms["dead"] == (m.idle >= 200).sum() > 0 and terms["aux"] > 0
    assert m.W_enc.grad[5].norm() > 0 and m.W_dec.grad[5].norm() > 0 and "idle" in m.state_dict()


@pytest.mark.parametrize("change, matrices", [
    (dict(), "W_enc W_dec"), (dict(frozen=True), "W_enc"), (dict(variant="jumprelu"), "W_enc W_dec")])
def test_muon_trains_the_matrices_and_adam_the_rest(cfg, change, matrices):
    a = rand(60, D)
    m = started(cfg, a, steps=200, optimizer="muon", lr=2e-2, lr_rest=3e-3, **change)
    opts, name = sae.optimizers(m), {id(p): name for name, p in m.named_parameters()}
    given = {key: {name[id(p)] for p in opt.param_groups[0]["params"]} for key, opt in opts.items()}
    trained = {name for name, p in m.named_parameters() if p.requires_grad}
    assert given == dict(opt=set(matrices.split()), opt_rest=trained - set(matrices.split()))
    assert isinstance(opts["opt"], torch.optim.Muon) and isinstance(opts["opt_rest"], torch.optim.Adam)
    for t, share in ((0, 0.1), (0.5, 1), (0.9, 0.5)):           # both follow the schedule
        sae.update(m, opts, sae.loss_fn(m, a, None, t)[0], t)
        assert [opt.param_groups[0]["lr"] for opt in opts.values()] == pytest.approx([2e-2 * share, 3e-3 * share])
    first = sae.loss_fn(m, a, None, 0)[1]["rec"]
    assert fit(m, lambda step: a, 200)["rec"] < 0.7 * first


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(cfg, variant):
    a = rand(12, D)
    m = started(cfg, a, variant=variant, F=48, k=6, steps=400, N=12, theta=.1, c_l0=0., follow=0.,
                c_first=0.)
    first = sae.loss_fn(m, a, None, 0)[1]["rec"]
    assert fit(m, lambda step: a, 400)["rec"] < 0.02 * first


def planted(n, true, gen):
    """n tokens, each a sum of about three of the planted directions with strengths from 0.5 to 1.5."""
    on = torch.rand(n, len(true), generator=gen) < 3 / len(true)
    return (on * (0.5 + torch.rand(on.shape, generator=gen))) @ true


@pytest.mark.parametrize("variant, steps", [("topk", 400), ("batchtopk", 400), ("jumprelu", 400), ("relu", 600)])
def test_recovers_a_planted_dictionary(variant, steps):
    gen = torch.Generator().manual_seed(0)
    true = F.normalize(torch.randn(64, 64, generator=gen), dim=-1)
    m = SAE(Config(variant=variant, F=96, k=3, N=128, steps=steps, lr=5e-3, c_first=1e-2), 64, gen)
    fit(m, lambda step: planted(128, true, gen), steps)
    assert (true @ m.W_dec.detach().T).max(1).values.mean() >= 0.95


def losses(cfg):
    sae.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_losses(cfg, tmp_path):
    first, *others = [losses(dataclasses.replace(cfg, variant="jumprelu", seed=seed, out=str(tmp_path / f"{i}")))
                      for i, seed in enumerate((0, 0, 1))]
    assert first == others[0] != others[1] and len(first) == cfg.steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_touches_neither_state_nor_random_numbers(cfg, target, variant):
    gpt = GPT.load(target)
    m = sae.build(dataclasses.replace(cfg, variant=variant), gpt)
    before, rng = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    idx = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    gpt(idx, evals.splice(m))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("optimizer, change", [
    ("adam", dict(variant="batchtopk", dead=40)), ("muon", dict(variant="relu", site="resid")),
    ("adam", dict(variant="jumprelu", objective="kl", site="mlp_in")), ("muon", dict(frozen=True))])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, optimizer, change):
    cfg = dataclasses.replace(cfg, optimizer=optimizer, **change)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    sae.train(whole)
    kill(cfg)
    for _ in range(2):                                          # the second finds it finished, and folded once
        sae.train(dataclasses.replace(cfg, resume=True))
        (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "sae.safetensors") for c in (whole, cfg))
        assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
        state = dict(adam="exp_avg", muon="momentum_buffer")[optimizer]
        assert {f"opt.0.{state}", "opt_rest.0.exp_avg"} <= a.keys()
        assert all(torch.equal(a[k], b[k]) for k in a) and a["m.scale"] == 1      # saved folded
        assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()


@pytest.mark.parametrize("site", SITES)
def test_summary_has_the_promised_keys(cfg, site):
    sae.train(dataclasses.replace(cfg, site=site))
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_recovered", "fve", "l0", "active_params", "dead_fraction", "seconds", "config", "fve_site"}
    assert promised <= on_disk.keys() and on_disk["config"]["k"] == 3 and on_disk["l0"] <= 3
    assert on_disk["active_params"] == pytest.approx(on_disk["l0"] * 2 * D)
    assert (on_disk["fve_site"] == pytest.approx(on_disk["fve"])) == (site == "mlp_out")


def test_sweep_saves_data_and_picture(cfg):
    runs = sae.main(dataclasses.replace(cfg, sweep=True, k=4, steps=2))
    assert [run["k"] for run in runs] == [1, 2, 4, 8, 16]
    assert json.loads((Path(cfg.out) / "sweep.json").read_text())["rows"] == json.loads(json.dumps(runs))
    assert (Path(cfg.out) / "sweep.png").stat().st_size > 1000


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = sae.loss_fn
    monkeypatch.setattr(sae, "loss_fn", lambda m, a, kl, t: real(m, a * (math.nan if t > .5 else 1), kl, t))
    with pytest.raises(SystemExit) as stop:
        sae.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "sae.safetensors")[1]["step"] == 4       # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(layer=-2), "--layer -2"), (dict(F=0), "--F 0"), (dict(T=T + 1), f"--T {T + 1}"),
    (dict(k=25), "--k 25"), (dict(k=0), "--k 0"), (dict(N=0), "--N 0"), (dict(N=89), "--N 89"),
    (dict(steps=0), "--steps 0"), (dict(model="nowhere"), "nowhere"), (dict(data="nowhere.bin"), "nowhere.bin"),
    (dict(sweep=True, k=3), "--sweep"), (dict(resume=True), "no such file"), (dict(device="tpu"), "--device tpu"),
    (dict(seed=-1), "--seed -1"), (dict(lr=-1.), "--lr -1"), (dict(lr_rest=0.), "--lr_rest 0"),
    (dict(bandwidth=0.), "--bandwidth 0"), (dict(variant="stochastic"), "python stochastic.py")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: sae.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    sae.train(cfg)
    path = Path(cfg.out) / "sae.safetensors"
    kept = path.read_bytes()
    for change in (dict(k=4), dict(seed=5), dict(variant="relu")):
        fails(capsys, lambda: sae.train(dataclasses.replace(cfg, resume=True, **change)), "does not fit this run")
    assert path.read_bytes() == kept
