"""Oracles of spd.py: a second way to each number, on tiny random models."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import evals
import spd
from conftest import D, M, T, V, kill
from metrics import masks
from model import GPT
from spd import Config
from test_common import fails

ROOT = Path(spd.__file__).parent


@pytest.fixture
def cfg(target, tmp_path):
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", C=10, B=3,
                  T=T, ci_hidden=8, steps=6, lr=1e-2, log_every=1, eval_every=0, save_every=2,
                  eval_tokens=120, pgd_rows=2)


@pytest.fixture
def built(cfg):
    gpt = GPT.load(cfg.model)
    m = spd.build(cfg, gpt)
    idx = torch.randint(0, V, (cfg.B, T), generator=torch.Generator().manual_seed(1))
    batch = spd.CleanPass(gpt, m, idx)
    gs = [z.clamp(0, 1) for z in m.importance_net(batch.inputs, m.V)]
    return gpt, m, idx, batch, gs


def test_every_mask_one_and_the_delta_give_the_original_logits(built):
    gpt, m, idx, batch, gs = built
    ones = [torch.ones(m.C)] * 2, torch.ones(2, 1)
    logits = gpt(idx, masks.replacing(m, lambda gs: ones))
    assert torch.allclose(logits, gpt(idx), atol=1e-5)
    assert batch.divergence(m.site(*ones)).abs().max() < 1e-5


def test_importance_one_pins_the_masks_whatever_the_source(built):
    gpt, m, idx, batch, gs = built
    source = spd.stochastic(gs, torch.Generator())
    pinned = batch.divergence(m.masked([torch.ones_like(g) for g in gs], source[:2] + [torch.ones(1)] * 2))
    assert pinned.abs().max() < 1e-5


def test_sites_equal_the_sum_of_materialised_rank_one_matrices(built):
    gpt, m, idx, batch, gs = built
    source = spd.stochastic(gs, torch.Generator().manual_seed(2))
    for i, x in enumerate(batch.inputs):
        V_i, U_i, W = m.V[i], m.U[i], m.Ws[i]
        delta = W - sum(torch.outer(V_i[:, c], U_i[c]) for c in range(m.C))
        mask = gs[i] + (1 - gs[i]) * source[i]
        y = sum(mask[..., c, None] * (x @ torch.outer(V_i[:, c], U_i[c])) for c in range(m.C))
        y = y + source[2 + i] * (x @ delta) + m.bs[i]
        assert torch.allclose(m.masked(gs, source)(i, x), y, atol=1e-5)


def test_strength_is_the_size_of_the_contribution_signed_by_the_inner_activation(built):
    gpt, m, idx, batch, gs = built
    f = torch.cat(gs, -1)
    a, c = m.strength(1, f, batch.inputs[0]), m.contrib(1, f, batch.inputs[0], torch.arange(2 * m.C))
    assert torch.allclose(a[..., m.C:].abs(), c[..., m.C:, :].norm(dim=-1), atol=1e-5)
    assert torch.allclose(a[..., :m.C], gs[0] * (batch.inputs[0] @ m.V[0]) * m.U[0].norm(dim=1), atol=1e-5) and (a < 0).any()
    sign = (c[..., m.C:, :] * m.U[1]).sum(-1).sign()
    assert torch.equal(a[..., m.C:].sign(), sign) and (sign < 0).any()


def test_kl_through_the_suffix_equals_kl_of_full_forwards(built):
    gpt, m, idx, batch, gs = built
    sources = [spd.stochastic(gs, torch.Generator().manual_seed(s)) for s in (3, 4)]
    got = batch.divergence(*[m.masked(gs, s) for s in sources])
    logp = F.log_softmax(gpt(idx), -1)
    for kl, s in zip(got, sources):
        masked = masks.replacing(m, lambda gs: masks.masks_from(gs, s))
        logq = F.log_softmax(gpt(idx, masked), -1)
        assert torch.allclose(kl, (logp.exp() * (logp - logq)).sum(-1).mean(), atol=1e-5)


def test_leaky_sigmoids_against_a_table_by_hand():
    z = torch.tensor([-2.0, -2.0, 0.0, 0.0, 0.3, 0.3, 1.0, 1.0, 1.5, 1.5])
    dg = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])     # -1: the loss wants g up
    for f, value, slope in (
            (spd.LowerLeaky, [0, 0, 0, 0, .3, .3, 1, 1, 1, 1], [0, .01, 0, .01, 1, 1, 1, 1, 0, 0]),
            (spd.UpperLeaky, [0, 0, 0, 0, .3, .3, 1, 1, 1.005, 1.005], [0, 0, 0, 0, 1, 1, 1, 1, .01, .01])):
        x = z.clone().requires_grad_()
        g = f.apply(x, 0.01)
        g.backward(dg)
        assert torch.allclose(g, torch.tensor(value)) and torch.allclose(x.grad, dg * torch.tensor(slope))


def test_penalties_on_a_batch_by_hand():
    g = torch.tensor([[1.0, 0.5], [0.0, 0.5]])                 # 2 positions; at gamma = 1, phi(1) = 1/2, phi(1/2) = 1/5
    imp, freq = spd.penalties([g], Config(freq_a=10), 0)        # s = (1/2, 2/5)
    assert imp == pytest.approx(0.45)
    assert freq.item() == pytest.approx((0.5 * np.log2(3.5) + 0.4 * np.log2(3)) / 2)
    for t in (0.9, 1):                                         # gamma has reached 0.01
        assert spd.penalties([g], Config(), t)[0] == pytest.approx((1 / 1.0001 + 2 * 0.25 / 0.2501) / 2)
    imp, freq = spd.penalties([g], Config(penalty="lp", freq_a=0, p_end=1.0), 1)     # s = (1, 1), a = N = 2
    assert imp == pytest.approx(1) and freq.item() == pytest.approx(1)
    two = [g[:, :1].unsqueeze(0), g[:, 1:].unsqueeze(0)]        # the same as two sites of one sequence
    assert torch.allclose(torch.stack(spd.penalties(two, Config(), .3)), torch.stack(spd.penalties([g], Config(), .3)))


def test_routing_masks_a_uniform_number_of_sites_and_freezes_the_rest():
    gs = [torch.zeros(1, 30_000, 4)] * 3
    source = spd.stochastic(gs, torch.Generator().manual_seed(0))
    masked = torch.stack([(r < 1).all(-1) for r in source[:3]])
    assert torch.equal(masked, torch.stack([(d < 1)[..., 0] for d in source[3:]]))
    share = torch.bincount(masked.sum(0).flatten(), minlength=4) / 30_000
    assert torch.allclose(share, torch.tensor([0, 1, 1, 1]) / 3, atol=.01)
    assert torch.allclose(masked.float().mean((1, 2)), torch.full((3,), 2 / 3), atol=.01)


def test_a_sign_step_goes_to_the_corner_that_its_start_slopes_up_to(built):
    gpt, m, idx, batch, gs = built
    loss = lambda sources: batch.divergence(m.masked(gs, sources)).item()
    for seed in range(5):
        gen = torch.Generator().manual_seed(seed)
        start = [torch.rand(n, generator=gen) for n in spd.source_sizes(m)]
        corner = spd.sign_step(m, gs, batch, gen.manual_seed(seed))
        assert all(((r == 0) | (r == 1)).all() for r in corner)
        on_the_way = [r + 0.01 * (end - r) for r, end in zip(start, corner)]
        assert loss(on_the_way) > loss(start)


def test_adversaries_leave_no_gradient_on_the_decomposition(built, cfg):
    gpt, m, idx, batch, gs = built
    spd.sign_step(m, gs, batch, torch.Generator())
    pgd = spd.PersistentPGD(m, cfg, torch.Generator())
    before = [s.clone() for s in pgd.sources]
    source = pgd.ascend(m, gs, batch, progress=1)
    assert all(p.grad is None for p in m.parameters())
    assert all((a != b).any() and a.min() >= 0 and a.max() <= 1 for a, b in zip(source, before))
    loss = lambda source: batch.divergence(m.masked(gs, source, detach=True))[0].item()
    assert loss(source) > loss(before)          # persistent PGD climbs too


@pytest.mark.parametrize("kind", ["global", "mlp", "shared", "vector"])
def test_importance_functions_train(cfg, built, kind):
    gpt, m, idx, batch, gs = built
    m = spd.SPD(m.Ws, m.bs, dataclasses.replace(cfg, ci_fn=kind), torch.Generator(), 1)
    zs = m.importance_net(batch.inputs, m.V)
    assert [z.shape for z in zs] == [(cfg.B, T, cfg.C)] * 2
    sum(z.square().mean() for z in zs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.importance_net.parameters())


def test_mlp_importance_is_a_net_of_its_own_per_component(cfg, built):
    gpt, m, idx, batch, gs = built
    m = spd.SPD(m.Ws, m.bs, dataclasses.replace(cfg, ci_fn="mlp"), torch.Generator(), 1)
    W1, b1, W2, b2 = m.importance_net.nets[0]
    for c in range(cfg.C):
        h = batch.inputs[0] @ m.V[0][:, c]
        z = F.gelu(h[..., None] * W1[c, 0] + b1[c]) @ W2[c, :, 0] + b2[c, 0]
        assert torch.allclose(m.importance_net(batch.inputs, m.V)[0][..., c], z, atol=1e-5)


@pytest.mark.parametrize("start", ["smallest", "random"])
@pytest.mark.parametrize("C", [10, 30])
def test_training_starts_with_the_sum_exact_and_ends_with_it(cfg, built, C, start):
    """10 components are enough for both matrices, D = 8 by M = 16: neither is of a higher rank."""
    cfg = dataclasses.replace(cfg, C=C, start=start)
    m = spd.SPD(built[1].Ws, built[1].bs, cfg, torch.Generator().manual_seed(0), 1)
    before = [p.clone() for p in (*m.V, *m.U)]
    spd.begin(m, cfg)
    assert all(torch.allclose(V @ U, W, atol=1e-5) for W, V, U in zip(m.Ws, m.V, m.U))
    moved = [not torch.equal(p, was) for p, was in zip((*m.V, *m.U), before)]
    if start == "random":
        assert moved == [False, True, True, False]      # U of W_in, which is wide, V of W_out, which is tall
    for key in ("weight_error_in", "weight_error_out"):
        assert spd.train(cfg)[1][key] < 1e-5 < spd.train(dataclasses.replace(cfg, project=False))[1][key]


def test_the_smallest_start_is_the_smallest(cfg, built):
    """Any other factor that makes the sum W differs from the chosen one by what the random one maps to nothing."""
    cfg = dataclasses.replace(cfg, C=30, start="smallest")
    new = lambda: spd.SPD(built[1].Ws, built[1].bs, cfg, torch.Generator().manual_seed(0), 1)
    m, first, random = new(), new(), new()
    spd.begin(m, cfg)
    spd.begin(random, dataclasses.replace(cfg, start="random"))
    gen = torch.Generator().manual_seed(1)
    # of W_in V is random, of W_out U: both as columns, and what stands beside them
    for i, given, made in ((0, first.V[0], m.U[0]), (1, first.U[1].T, m.V[1].T)):
        V, U = m.V[i], m.U[i]
        assert torch.allclose(V.norm(dim=0), U.norm(dim=1), rtol=1e-4)
        assert (torch.cosine_similarity(given, V if i == 0 else U.T, dim=0) > 0.9999).all()
        made = made * ((V if i == 0 else U.T).norm(dim=0) / given.norm(dim=0)).unsqueeze(1)      # before it was scaled
        target = m.Ws[i] if i == 0 else m.Ws[i].T
        assert torch.allclose(given @ made, target, atol=1e-4)
        null_CC = torch.eye(30) - torch.linalg.pinv(given) @ given
        other = made + null_CC @ torch.randn(made.shape, generator=gen)
        assert torch.allclose(given @ other, target, atol=1e-4) and made.norm() < other.norm()
        assert torch.allclose(null_CC @ made, torch.zeros(()), atol=1e-4)
        # so that less of it cancels
        size = lambda m: (m.V[i].norm(dim=0) * m.U[i].norm(dim=1)).sum()
        assert size(m) < 0.8 * size(random)
    # nothing of it has a scale of its own
    for W in m.Ws:
        W.data *= 9
    larger = new()
    spd.begin(larger, cfg)
    assert all(torch.allclose(9**.5 * p, q, rtol=1e-4) for p, q in zip((*m.V, *m.U), (*larger.V, *larger.U)))


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_step_is_as_long_for_all_C_and_as_large_as_the_weights_ask(cfg, built, optimizer):
    Ws = [W.clone() for W in built[1].Ws]
    Ws[0] += 9 * torch.outer(Ws[0][:, 0], Ws[0][0])         # one singular value far above the others
    s = torch.stack([torch.linalg.svdvals(W).square().mean().sqrt() for W in Ws]).repeat(2)

    def moved(C, **change):
        """By how much a step on random gradients moves each V, each U: Muon's largest singular value, Adam's weights.
        Beside them the rates."""
        flags = dataclasses.replace(cfg, C=C, optimizer=optimizer, decay=0., **change)
        m = spd.SPD(Ws, built[1].bs, flags, torch.Generator().manual_seed(0), 1)
        spd.begin(m, flags)
        before, gen = [p.detach().clone() for p in (*m.V, *m.U)], torch.Generator().manual_seed(1)
        loss = sum((p * torch.randn(p.shape, generator=gen)).sum() for p in (*m.V, *m.U))
        spd.update(m, spd.optimizers(m, flags), loss, flags, 0.)
        steps = [p.detach() - was for p, was in zip((*m.V, *m.U), before)]
        sizes = [torch.linalg.matrix_norm(step, 2) if optimizer == "muon" else step.abs().mean() for step in steps]
        return torch.stack(sizes), torch.tensor(spd.rates(m, flags))

    for C in (10, 32, 512):                                 # of 10 V is tall too, (M, C)
        shapes = [(D, C), (M, C), (C, M), (C, D)]           # of W_in's V, W_out's, then U
        ratio = torch.tensor([max(1, rows / columns) if optimizer == "muon" else 1 for rows, columns in shapes])
        step, rate = moved(C)
        assert torch.allclose(rate, cfg.lr * (s / ratio).sqrt(), rtol=1e-4)
        assert (step / (cfg.lr * s.sqrt()) - 1).abs().max() < 0.25
        step, rate = moved(C, lr_scaled=False)              # as torch has it
        assert torch.allclose(rate, torch.tensor(cfg.lr)) and (step / (cfg.lr * ratio.sqrt()) - 1).abs().max() < 0.25


def test_the_former_recipe_is_what_it_was(cfg, built):
    """Both factors random, then one moved onto W; one rate for all; nothing shrinks."""
    flags = dataclasses.replace(cfg, **spd.FORMER)
    m, wanted = (spd.SPD(built[1].Ws, built[1].bs, flags, torch.Generator().manual_seed(0), 1) for _ in range(2))
    spd.begin(m, flags)
    spd.project(wanted)
    assert all(map(torch.equal, (*m.V, *m.U), (*wanted.V, *wanted.U))) and spd.rates(m, flags) == [0.03] * 4
    spd.update(m, spd.optimizers(m, flags), 0 * sum(p.sum() for p in m.parameters()), flags, 0.)
    assert all(map(torch.equal, (*m.V, *m.U), (*wanted.V, *wanted.U)))


def test_V_and_U_shrink_by_a_share_of_the_rate(cfg, built):
    m = built[1]
    flags = dataclasses.replace(cfg, lr=.1, decay=.5, lr_end=.2)
    before = [p.clone() for p in (*m.V, *m.U)]
    nets = [p.clone() for p in m.importance_net.parameters()]
    for progress, share in ((0., 1.), (1., .2)):
        loss = 0 * sum(p.sum() for p in m.parameters())
        spd.update(m, spd.optimizers(m, flags), loss, flags, progress)
        before = [p * (1 - .05 * share) for p in before]
        assert all(torch.allclose(p, was, rtol=1e-5) for p, was in zip((*m.V, *m.U), before))
    assert all(torch.equal(p, was) for p, was in zip(m.importance_net.parameters(), nets))


def test_the_projection_is_the_smallest_change(built):
    """Any other change of the same factor that makes the sum exact is larger: it differs by what V maps to nothing."""
    m = built[1]
    U, V = m.U[0].clone(), m.V[0]
    spd.project(m)
    change = m.U[0] - U
    null_CC = torch.eye(m.C) - torch.linalg.pinv(V) @ V
    other = change + null_CC @ torch.randn(m.C, M, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(V @ (U + other), m.Ws[0], atol=1e-4) and change.norm() < other.norm()
    assert torch.allclose(null_CC @ change, torch.zeros(()), atol=1e-4)


def test_muon_turns_matrices_and_adam_has_the_rest(cfg, built):
    m = built[1]
    of = lambda opt: [(tuple(p.shape), group["lr"]) for group in opt.param_groups for p in group["params"]]
    flags = dataclasses.replace(cfg, lr=.1, lr_scaled=False, lr_ci=.2, lr_rest=.3)
    opts = spd.optimizers(m, flags)
    assert isinstance(opts["opt"], torch.optim.Muon) and isinstance(opts["opt_rest"], torch.optim.Adam)
    C, H = cfg.C, cfg.ci_hidden
    assert of(opts["opt"]) == [((D, C), .1), ((M, C), .1), ((C, M), .1), ((C, D), .1),
                               ((D + M, H), .2), ((H, H), .2), ((H, 2 * C), .2)]
    assert of(opts["opt_rest"]) == [((H,), .3), ((H,), .3), ((2 * C,), .3)]
    for share in (.5, .25):                     # of the first rates, not of the last ones
        common.set_rates(opts, share)
        assert of(opts["opt"])[0][1] == .1 * share and of(opts["opt_rest"])[0][1] == .3 * share
    per_component = spd.SPD(m.Ws, m.bs, dataclasses.replace(cfg, ci_fn="mlp"), torch.Generator(), 1)
    assert len(of(spd.optimizers(per_component, cfg)["opt"])) == 4             # its weights are C matrices, not one
    adam = spd.optimizers(m, dataclasses.replace(flags, optimizer="adam"))
    assert adam.keys() == {"opt"} and {lr for _, lr in of(adam["opt"])} == {.1, .2}


def test_a_start_at_the_neurons_needs_a_component_for_each(cfg, capsys):
    fails(capsys, lambda: spd.train(dataclasses.replace(cfg, start="neurons", C=M - 1)), f"--C {M - 1}")
    _, out = spd.train(dataclasses.replace(cfg, start="neurons", C=M + 2))
    assert out["weight_error_in"] < 1e-5


def test_seam(built):
    gpt, m, idx, batch, gs = built
    f = m.encode(1, batch.inputs[0], gpt.h[1].mlp)
    y = m.decode(1, f, batch.inputs[0])
    assert torch.allclose(f, torch.cat(gs, -1), atol=1e-6) and m.params_F.tolist() == [D + M] * 2 * m.C
    units = torch.tensor([12, 3, 19, 0])
    for k, u in enumerate(units):
        off = f.clone()
        off[..., u] = 0
        assert torch.allclose(m.contrib(1, f, batch.inputs[0], units)[..., k, :], y - m.decode(1, off, batch.inputs[0]), atol=1e-5)
    ci = masks.mask_table(m, (0,), torch.Generator())["causal importance"]
    assert torch.allclose(gpt(idx, evals.splice(m)), gpt(idx, ci), atol=1e-5)


def losses(cfg):
    spd.train(cfg)
    rows = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_same_seed_same_losses_with_evaluation_every_step_and_never(cfg, tmp_path):
    never = losses(cfg)
    every = losses(dataclasses.replace(cfg, eval_every=1, out=str(tmp_path / "every")))
    other = losses(dataclasses.replace(cfg, seed=1, out=str(tmp_path / "other")))
    assert never == every and never != other and len(never) == cfg.steps


def test_overfits(cfg):
    got = losses(dataclasses.replace(cfg, steps=150, c_imp=0., c_faith=1., save_every=150))
    assert got[-1] < 0.1 * got[0]


@pytest.mark.parametrize("adversary, optimizer", [("none", "muon"), ("step", "adam"), ("pgd", "muon")])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, adversary, optimizer):
    cfg = dataclasses.replace(cfg, adversary=adversary, optimizer=optimizer)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    spd.train(whole)
    kill(cfg)
    spd.train(dataclasses.replace(cfg, resume=True))
    (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "spd.safetensors") for c in (whole, cfg))
    assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()


def test_a_run_is_not_resumed_on_other_data_under_the_same_name(cfg, capsys):
    spd.train(dataclasses.replace(cfg, steps=4, save_every=2))
    path = Path(cfg.data)
    ids = np.fromfile(path, np.uint16)
    np.random.default_rng(1).permutation(ids).tofile(path)      # as long, and of the same tokens
    data.fingerprint.cache_clear()
    try:
        fails(capsys, lambda: spd.train(dataclasses.replace(cfg, steps=4, save_every=2, resume=True)), "another text")
    finally:
        ids.tofile(path)
        data.fingerprint.cache_clear()


def test_summary_has_the_promised_keys(cfg):
    _, out = spd.train(cfg)
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"weight_error_in", "weight_error_out", "ce_recovered_stochastic", "ce_recovered_rounded_0.1",
                "kl_pgd20", "l0_in", "l0_out", "concept_matched_fraction", "seconds", "config"}
    assert promised <= on_disk.keys() and on_disk["config"]["C"] == cfg.C
    assert abs(on_disk["kl_original"]) < 1e-6


def test_the_summary_and_the_table_attack_alike(cfg):
    m, out = spd.train(cfg)
    gpt, gen = GPT.load(cfg.model), common.generator(cfg.seed, "summary")
    rows, _ = data.load_all(cfg.data, gpt.vocab, cfg.T)["test"].labelled(cfg.T, cfg.eval_tokens // cfg.T, "cpu")
    assert masks.attack(m, gpt, rows[:cfg.pgd_rows], gen)[20] == out["kl_pgd20"] > 0


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = spd.loss_fn
    def sick(spd_, batch, cfg, t, *rest):
        total, terms, gs = real(spd_, batch, cfg, t, *rest)
        return (total * float("nan") if t > .5 else total), terms, gs
    monkeypatch.setattr(spd, "loss_fn", sick)
    with pytest.raises(SystemExit) as stop:
        spd.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "spd.safetensors")[1]["step"] == 4       # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(layer=-2), "--layer -2"), (dict(C=0), "--C 0"), (dict(T=T + 1), f"--T {T + 1}"),
    (dict(B=0), "--B 0"), (dict(steps=0), "--steps 0"), (dict(model="nowhere"), "nowhere"),
    (dict(data="nowhere.bin"), "nowhere.bin"), (dict(data="x.csv"), "x.csv"), (dict(resume=True), "no such file"),
    (dict(device="tpu"), "--device tpu"),
    (dict(seed=-1), "--seed -1"), (dict(lr=-1.), "--lr -1"), (dict(gamma_end=0.), "--gamma_end 0")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: spd.train(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    spd.train(cfg)
    path = Path(cfg.out) / "spd.safetensors"
    kept = path.read_bytes()
    for change in (dict(C=11), dict(seed=5), dict(adversary="pgd")):
        fails(capsys, lambda: spd.train(dataclasses.replace(cfg, resume=True, **change)), "does not fit this run")
    assert path.read_bytes() == kept
    path.write_bytes(kept[:len(kept) // 2])
    fails(capsys, lambda: spd.train(dataclasses.replace(cfg, resume=True)), "truncated")
