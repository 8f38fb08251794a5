"""Oracles of scratch.py: a second way to each number, on tiny random models."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import data
import scratch
import spd
from conftest import D, M, T, V, kill
from metrics import masks
from model import GPT, cross_entropy
from scratch import Config
from test_common import fails


@pytest.fixture
def cfg(target, tmp_path):
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", C=10, B=3,
                  T=T, ci_hidden=8, steps=6, lr=1e-2, log_every=1, save_every=2, eval_tokens=120, pgd_rows=2, page=False)


@pytest.fixture
def built(cfg):
    gpt = GPT.load(cfg.model)
    m = scratch.build(cfg, gpt)
    for b in m.bs:
        b.data += torch.randn(b.shape, generator=torch.Generator().manual_seed(len(b)))
    idx = torch.randint(0, V, (cfg.B, T + 1), generator=torch.Generator().manual_seed(1))
    return gpt, m, idx, scratch.Reading(gpt, m, idx)


def dense_model(gpt, m):
    """The model whose MLP has the weights V U."""
    made = GPT.load(gpt.folder)
    mlp = made.mlp(1)
    for linear, V, U, b in zip((mlp.c_fc, mlp.c_proj), m.V, m.U, m.bs):
        linear.weight.data, linear.bias.data = (V @ U).detach(), b.detach()
    return made


def ce_by_hand(logits, idx):
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())


def test_with_all_masks_one_it_is_the_dense_model_of_v_u(built):
    """Whatever the mask of the rest is: there is none."""
    gpt, m, idx, batch = built
    want = ce_by_hand(dense_model(gpt, m)(idx[:, :-1]), idx)
    ones = [torch.ones(m.C)] * 2
    for rest in (0., 0.3, 1.):
        got = batch.divergence(m.site(ones, [torch.full((1,), rest)] * 2))
        assert torch.allclose(got, want, atol=1e-5) and len(got) == 1
    g = [torch.ones(*idx[:, 1:].shape, m.C)] * 2
    pinned = batch.divergence(m.masked(g, spd.stochastic(g, torch.Generator())))
    assert torch.allclose(pinned, want, atol=1e-5)


def test_each_loss_under_masks_is_that_of_rank_one_matrices_added_up(built):
    gpt, m, idx, batch = built
    gs = [z.clamp(0, 1).detach() for z in m.importance_net(batch.inputs, m.V)]
    sources = [spd.stochastic(gs, torch.Generator().manual_seed(s)) for s in (3, 4)]
    got = batch.divergence(*[m.masked(gs, source) for source in sources])

    def through(x, i, source):
        mask = gs[i] + (1 - gs[i]) * source[i]
        return sum(mask[..., c, None] * (x @ torch.outer(m.V[i][:, c], m.U[i][c])) for c in range(m.C)) + m.bs[i]

    for ce, source in zip(got, sources):
        replace = lambda layer, x, mlp: (through(m.act(through(x, 0, source)), 1, source) if layer == 1 else mlp(x))
        assert torch.allclose(ce, ce_by_hand(gpt(idx[:, :-1], replace), idx), atol=1e-5)


def test_the_importance_net_reads_what_the_dense_model_does(built):
    gpt, m, idx, batch = built
    made = dense_model(gpt, m)
    x, _ = made.prefix(idx[:, :-1], 1)
    assert torch.allclose(batch.inputs[0], x, atol=1e-6)
    assert torch.allclose(batch.inputs[1], m.act(made.mlp(1).c_fc(x)), atol=1e-5)
    assert not any(x.requires_grad for x in batch.inputs)
    f = m.encode(1, x, made.mlp(1))
    assert torch.allclose(f, torch.cat(m.importance_net(batch.inputs, m.V), -1).clamp(0, 1), atol=1e-5)


def test_gradients_are_those_of_the_plain_forward(built, cfg):
    """With the rest in it, masked at random, V, U and biases get what they would get without one."""
    gpt, m, idx, batch = built
    gs = [z.clamp(0, 1).detach() for z in m.importance_net(batch.inputs, m.V)]
    source = spd.stochastic(gs, torch.Generator().manual_seed(3))
    wanted = (*m.V, *m.U, *m.bs)
    got = torch.autograd.grad(batch.divergence(m.masked(gs, source))[0], wanted)
    mask = [g + (1 - g) * s for g, s in zip(gs, source)]
    plain = lambda x, i: ((x @ m.V[i]) * mask[i]) @ m.U[i] + m.bs[i]
    replace = lambda layer, x, mlp: plain(m.act(plain(x, 0)), 1) if layer == 1 else mlp(x)
    want = torch.autograd.grad(ce_by_hand(gpt(idx[:, :-1], replace), idx), wanted)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_the_loss_is_the_sum_of_its_terms(built, cfg):
    gpt, m, idx, batch = built
    cfg = dataclasses.replace(cfg, c_stoch=.3, c_adv=.2, c_dense=.7, c_imp=.01, w_freq=.6)
    total, terms, gs = scratch.loss_fn(m, batch, cfg, .5, torch.Generator().manual_seed(0))
    assert torch.allclose(total, .3 * terms["stoch"] + .2 * terms["adv"] + .7 * terms["dense"]
                          + .01 * (terms["imp"] + .6 * terms["freq"]))
    assert torch.allclose(terms["dense"], ce_by_hand(dense_model(gpt, m)(idx[:, :-1]), idx), atol=1e-5)
    total.backward()
    assert all(p.grad.abs().sum() > 0 for p in m.parameters())
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("start", ["target", "neurons"])
def test_a_start_at_the_target_is_the_target(cfg, start):
    cfg = dataclasses.replace(cfg, start=start, C=M + 2)
    gpt = GPT.load(cfg.model)
    m = scratch.build(cfg, gpt)
    scratch.begin(m, cfg, gpt)
    idx = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(1))
    one = torch.ones(1)
    got = scratch.Reading(gpt, m, idx).divergence(m.site([one] * 2, [one] * 2))
    assert torch.allclose(got, ce_by_hand(gpt(idx[:, :-1]), idx), atol=1e-5)


def test_bernoulli_sources_are_corners(built, cfg, monkeypatch):
    gpt, m, idx, batch = built
    seen = []
    real = m.masked
    monkeypatch.setattr(m, "masked", lambda gs, sources, **how: seen.append(sources) or real(gs, sources, **how))
    scratch.loss_fn(m, batch, dataclasses.replace(cfg, sources="bernoulli"), .5, torch.Generator().manual_seed(0))
    assert all(((source == 0) | (source == 1)).all() for source in seen[1])


@pytest.mark.parametrize("all_weights", [False, True])
def test_it_writes_a_model_of_its_components(cfg, all_weights):
    cfg = dataclasses.replace(cfg, all=all_weights)
    m, out = scratch.train(cfg)
    made = GPT.load(Path(cfg.out) / "target")
    given = GPT.load(cfg.model)
    other = [name for name, p in made.state_dict().items() if ".1.mlp" not in name and not torch.equal(p, given.state_dict()[name])]
    assert bool(other) == all_weights
    loaded = scratch.load(Path(cfg.out) / "scratch.safetensors", made)
    for W, b, V, U, own in zip(loaded.Ws, loaded.bs, loaded.V, loaded.U, (made.mlp(1).c_fc, made.mlp(1).c_proj)):
        assert torch.allclose(V @ U, W, atol=1e-6) and torch.equal(W, own.weight) and torch.equal(b, own.bias)
    idx = torch.randint(0, V.shape[0], (2, T), generator=torch.Generator().manual_seed(0))
    ones = [torch.ones(m.C)] * 2, torch.zeros(2, 1)
    assert torch.allclose(made(idx, masks.replacing(loaded, lambda gs: ones)), made(idx), atol=1e-5)
    dev = data.load(cfg.data, "dev", made.vocab)
    assert out["ce_made"] == pytest.approx(cross_entropy(made, dev.rows(T, 10), dev.fresh(T, 10)))
    assert spd.train(spd.Config(model=cfg.out + "/target", data=cfg.data, out=cfg.out + "/spd", C=10, B=3, T=T, ci_hidden=8,
                                steps=2, eval_tokens=120, pgd_rows=2, device="cpu"))[1]["weight_error_in"] < 1e-5


def test_components_in_another_model_are_refused(cfg, capsys):
    scratch.train(cfg)
    path = Path(cfg.out) / "scratch.safetensors"
    fails(capsys, lambda: scratch.load(path, GPT.load(cfg.model)), "don't add up", f"{cfg.out}/target")


def test_it_learns(cfg, tmp_path):
    """Words that follow each other in a circle."""
    (torch.arange(20_000) * 7 % V).to(torch.uint16).numpy().tofile(tmp_path / "circle.bin")
    got = losses(dataclasses.replace(cfg, data=str(tmp_path / "circle.bin"), all=True, copy=0.,
                                     lr_all=2e-2, steps=100, save_every=100, c_imp=0.))
    assert got[-1] < 0.5 * got[0]


def losses(cfg):
    scratch.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_losses(cfg, tmp_path):
    first = losses(cfg)
    again = losses(dataclasses.replace(cfg, out=str(tmp_path / "again"), eval_tokens=60))
    other = losses(dataclasses.replace(cfg, seed=1, out=str(tmp_path / "other")))
    assert first == again and first != other and len(first) == cfg.steps


@pytest.mark.parametrize("change", [dict(), dict(all=True), dict(optimizer="adam", sources="bernoulli", start="target")])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, change):
    cfg = dataclasses.replace(cfg, **change)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    scratch.train(whole)
    kill(cfg)
    scratch.train(dataclasses.replace(cfg, resume=True))
    (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "scratch.safetensors") for c in (whole, cfg))
    assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()
    assert GPT.load(Path(whole.out) / "target").hash == GPT.load(Path(cfg.out) / "target").hash


def test_summary_and_page(cfg):
    _, out = scratch.main(dataclasses.replace(cfg, page=True))
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_given", "ce_made", "ce_rounded", "ce_recovered", "ce_recovered_stochastic", "kl_pgd20", "l0_in", "l0_out",
                "alive_in", "seconds", "config"}
    assert promised <= on_disk.keys() and on_disk["config"]["C"] == cfg.C and abs(on_disk["kl_original"]) < 1e-6
    assert '"scratch"' in (Path(cfg.out) / "units.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(C=0), "--C 0"), (dict(T=T + 1), f"--T {T + 1}"), (dict(steps=0), "--steps 0"),
    (dict(model="nowhere"), "nowhere"), (dict(data="nowhere.bin"), "nowhere.bin"), (dict(resume=True), "no such file"),
    (dict(device="tpu"), "--device tpu"), (dict(start="neurons", C=M - 1), f"--C {M - 1}"), (dict(sources="x"), "--sources"),
    (dict(c_dense=-1.), "--c_dense -1"), (dict(C=10**7), "--C 10000000")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: scratch.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_flags_of_training_everything_go_with_it_alone(capsys):
    fails(capsys, lambda: common.cli(Config, ["--lr_all", "1"]), "--lr_all", "--all")
