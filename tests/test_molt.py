"""Oracles of molt.py, and of the metrics that came with it: a second way to each number, on tiny random models."""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import evals
import molt
from conftest import D, M, T, V, kill
from metrics import faithful
from model import GPT
from molt import MOLT, Config
from report import curve
from test_common import fails

ROOT = Path(molt.__file__).parent
KINDS = [dict(), dict(objective="kl"), dict(sum_to_weights=True), dict(gate="relu")]
NAMES = ["jumprelu", "kl", "sum_to_weights", "relu"]


@pytest.fixture
def cfg(target, tmp_path):
    return Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu",
                  groups="3@1,2@2,1@4", N=36, T=T, steps=6, lr=1e-2, log_every=1, save_every=2, eval_tokens=120)


@pytest.fixture(params=KINDS, ids=NAMES)
def built(cfg, request):
    """A MOLT of each kind on real activations, with gates, maps and bias that are not those it starts from."""
    gpt, gen = GPT.load(cfg.model), torch.Generator().manual_seed(1)
    m = molt.build(dataclasses.replace(cfg, **request.param), gpt)
    x_ND, y_ND = (a[0] for a in data.at_mlps(gpt, torch.randint(0, V, (8, T), generator=gen), [1]))
    m.standardise(x_ND, y_ND, gpt.h[1].mlp)
    for p in (m.b_gate, m.U, *([] if m.tied else [m.b])):
        p.data += 0.3 * torch.randn(p.shape, generator=gen)
    return gpt, m, x_ND, y_ND


def parts(m):
    """The transforms one by one: gate column, V_t, U_t."""
    ends = m.rank_F.cumsum(0).tolist()
    return [(t, m.V[:, e - r:e], m.U[e - r:e]) for t, (e, r) in enumerate(zip(ends, m.rank_F.tolist()))]


def test_wide_product_equals_the_sum_over_transforms(built):
    gpt, m, x_ND, y_ND = built
    assert m.rank_F.tolist() == [1, 1, 1, 2, 2, 4]
    x, g = m.read(x_ND), m.encode(1, x_ND, None)
    y = m.b + sum(g[:, t, None] * (x @ (V_t @ U_t)) for t, V_t, U_t in parts(m))
    assert torch.allclose(m.decode(1, g, x_ND), m.y_mean + m.y_std * y, atol=1e-5)
    assert 0 < (g > 0).float().mean() < 1


def test_contributions_sum_to_the_output_less_its_bias(built):
    gpt, m, x_ND, y_ND = built
    x, g = x_ND.unflatten(0, (8, -1)), m.encode(1, x_ND, None).unflatten(0, (8, -1))
    every = torch.arange(6)
    c = m.contrib(1, g, x, every)
    bias = m.decode(1, torch.zeros_like(g), x)
    assert c.shape == (8, T - 1, 6, D) and torch.allclose(c.sum(2), m.decode(1, g, x) - bias, atol=1e-5)
    assert torch.equal(m.contrib(1, g, x, torch.tensor([4, 0])), c[:, :, [4, 0]])


def test_gates_of_training_and_evaluation_agree_and_know_no_batch_mates(built):
    gpt, m, x_ND, y_ND = built
    x = m.read(x_ND)
    assert torch.equal(m.gates(x, training=True), m.gates(x)) and m.gates(x).min() == 0
    alone = torch.cat([m.encode(1, x_1D, None) for x_1D in x_ND.split(1)])
    assert torch.allclose(alone, m.encode(1, x_ND, None), atol=1e-5)


def test_parameters_per_transform(built):
    m = built[1]
    gate = D + 1 + m.theta.requires_grad
    reads = D + m.tied
    assert m.params_F.tolist() == [V_t.numel() + U_t.numel() + gate for _, V_t, U_t in parts(m)]
    assert len(m.V) == reads


def test_folding_leaves_the_map_on_raw_activations_as_it_was(built):
    gpt, m, x_ND, y_ND = built
    assert torch.allclose(m.read(x_ND)[:, :D].std(0), torch.ones(D), atol=1e-5)
    before = m.encode(1, x_ND, None), m.decode(1, m.encode(1, x_ND, None), x_ND)
    m.fold()
    after = m.encode(1, x_ND, None), m.decode(1, m.encode(1, x_ND, None), x_ND)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after))
    assert torch.equal(m.x_std, torch.ones(D)) and m.y_std == 1 and not m.y_mean.any()
    x = x_ND - m.x_mean
    if not m.tied:              # what remains is the equation of the docstring, on centred x
        z = x @ m.E - m.b_gate
        y = sum((z[:, t] * (z[:, t] > m.theta[t]))[:, None] * (x @ (V_t @ U_t)) for t, V_t, U_t in parts(m)) + m.b
        assert torch.allclose(after[1], y, atol=1e-5)


def test_a_dead_input_dimension_does_not_explode(cfg):
    m = MOLT(D, cfg, torch.Generator())
    x_ND = torch.randn(500, D) * torch.tensor([0.] + [1.] * (D - 1))
    m.standardise(x_ND, torch.randn(500, D), None)
    assert m.read(x_ND + 0.01).abs().max() < 10


def test_one_full_rank_transform_that_is_always_on_fits_a_linear_map(cfg):
    gen = torch.Generator().manual_seed(0)
    m = MOLT(D, dataclasses.replace(cfg, groups=f"1@{D}", lam=0.), gen)
    m.E.data.zero_(), m.b_gate.data.fill_(-1)                           # g = 1 at each token
    x_ND, A = torch.randn(256, D, generator=gen), torch.randn(D, D, generator=gen)
    assert fit(m, x_ND, x_ND @ A + 1, 400) < 1e-3
    assert torch.allclose(m.encode(1, x_ND, None).std(), torch.zeros(()), atol=0.1)


def fit(m, x_ND, y_ND, steps, lr=1e-2):
    """Trains on one batch with m.cfg; the last share of the variance that is unexplained."""
    m.standardise(x_ND, y_ND, None)
    m.cfg = dataclasses.replace(m.cfg, lr=lr)
    opts = molt.optimizers(m)
    for step in range(steps):
        common.set_rates(opts, min(1, 4 * (1 - step / steps)))
        distance = lambda y_hat: ((y_ND - y_hat) / m.y_std).square().mean()
        loss, terms, _ = molt.loss_fn(m, x_ND, distance, m.cfg, step / steps)
        m.zero_grad()
        loss.backward()
        for opt in opts.values():
            opt.step()
        m.theta.data.clamp_(min=0)
    return terms["fit"].item()


def test_overfits_one_batch(cfg):
    gen = torch.Generator().manual_seed(0)
    m = MOLT(D, dataclasses.replace(cfg, groups="16@4", lam=0.), gen)
    x_ND, y_ND = torch.randn(2, 40, D, generator=gen)
    assert fit(m, x_ND, y_ND, 500) < 0.02


@pytest.mark.parametrize("kind, rest", [(dict(), "b_gate theta b"), (dict(gate="relu"), "b_gate b"),
                                        (dict(sum_to_weights=True), "b_gate")])
def test_muon_trains_the_matrices_and_adam_the_rest(cfg, kind, rest):
    m, _ = molt.train(dataclasses.replace(cfg, optimizer="muon", lr=2e-2, lr_rest=3e-3, lam=0., steps=200, **kind))
    opts, name = molt.optimizers(m), {id(p): name for name, p in m.named_parameters()}
    given = {key: {name[id(p)] for p in opt.param_groups[0]["params"]} for key, opt in opts.items()}
    assert given == dict(opt={"E", "V", "U"}, opt_rest=set(rest.split()))
    assert isinstance(opts["opt"], torch.optim.Muon) and isinstance(opts["opt_rest"], torch.optim.Adam)
    assert [opt.defaults["lr"] for opt in opts.values()] == [2e-2, 3e-3]
    rows = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    assert sum(r["loss"] for r in rows[-20:]) < 0.9 * sum(r["loss"] for r in rows[:20])


def test_finds_a_planted_mixture(cfg):
    """Tokens that are one of 4 noisy directions each, at each of which another rank-2 map acts on the rest."""
    D, gen = 16, torch.Generator().manual_seed(0)
    A = torch.einsum("kdr,kre->kde", torch.randn(4, D, 2, generator=gen), torch.randn(4, 2, D, generator=gen)) / D**0.5
    which = torch.randint(0, 4, (1500,), generator=gen)
    x_ND = torch.randn(1500, D, generator=gen)
    x_ND[:, :4] = 3 * F.one_hot(which, 4) + 0.2 * torch.randn(1500, 4, generator=gen)
    A[:, :4] = 0                                                        # the maps read what does not choose them
    m = MOLT(D, dataclasses.replace(cfg, groups="12@2", lam=3e-3), gen)
    assert fit(m, x_ND, torch.einsum("nd,nde->ne", x_ND, A[which]), 600) < 0.05
    m.fold()
    g = m.encode(1, x_ND, None)
    for k in range(4):                      # the linear map that acts at the tokens of direction k
        A_hat = torch.einsum("t,tde->de", g[which == k].mean(0), torch.stack([V_t @ U_t for _, V_t, U_t in parts(m)]))
        assert F.cosine_similarity(A_hat[4:].flatten(), A[k, 4:].flatten(), 0) > 0.95
    assert (g > 0).sum(-1).float().mean() < 4


@pytest.mark.parametrize("built", [dict(sum_to_weights=True)], indirect=True, ids=[""])
def test_an_mlp_is_a_molt_that_sums_to_its_weights(built, cfg):
    gpt, _, x_ND, y_ND = built
    mlp = gpt.h[1].mlp
    m = molt.build(dataclasses.replace(cfg, groups=f"{M}@1", sum_to_weights=True), gpt)
    m.standardise(x_ND, y_ND, mlp)
    m.fold()
    m.V.data = torch.cat([mlp.c_fc.weight, (m.x_mean @ mlp.c_fc.weight + mlp.c_fc.bias).unsqueeze(0)])
    m.U.data = mlp.c_proj.weight.clone()
    z = mlp.c_fc(x_ND)
    s = F.gelu(z, approximate="tanh") / z
    assert torch.allclose(m.decode(1, s, x_ND), mlp(x_ND), atol=1e-4)
    assert m.rest().abs().max() < 1e-5 and -0.2 < s.min() and s.max() <= 1


def test_sum_to_weights_holds_after_training(cfg):
    gpt = GPT.load(cfg.model)
    m, out = molt.train(dataclasses.replace(cfg, sum_to_weights=True, steps=40))
    mlp, W_in = gpt.h[1].mlp, gpt.h[1].mlp.c_fc.weight
    whole = torch.cat([W_in, (m.x_mean @ W_in + mlp.c_fc.bias).unsqueeze(0)]) @ mlp.c_proj.weight
    total = sum(V_t @ U_t for _, V_t, U_t in parts(m))
    assert evals.relative_error(total + m.rest(), whole) < 1e-5
    assert out["rest"] == pytest.approx(evals.relative_error(total, whole), abs=1e-4) and 0 < out["rest"] < 1
    assert torch.allclose(m.b, mlp.c_proj.bias, atol=1e-5)
    on = torch.tensor([True, False] * 3)
    some = sum(V_t @ U_t for t, V_t, U_t in parts(m) if on[t])
    assert torch.allclose(m.rest(on), m.product - some, atol=1e-5)
    free = molt.train(dataclasses.replace(cfg, sum_to_weights=True, steps=40, beta=0.))[1]
    assert out["rest"] < free["rest"]


def test_penalty_is_per_token_and_blind_to_the_scale_between_gate_and_map(cfg):
    m = MOLT(D, dataclasses.replace(cfg, gate="relu"), torch.Generator().manual_seed(0))
    x_ND = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    norms = torch.stack([(V_t @ U_t).norm() for _, V_t, U_t in parts(m)])
    assert torch.allclose(m.norms(), norms, atol=1e-6)
    sparse = lambda: molt.loss_fn(m, x_ND, lambda y_hat: y_hat.sum(), m.cfg, 1)[1]["sparse"]
    by_hand = sum(sum(np.tanh(m.cfg.c * (g * n).item()) for g, n in zip(g_F, norms)) for g_F in m.gates(x_ND)) / 50
    before = sparse().item()
    assert before == pytest.approx(by_hand, rel=1e-5)
    m.E.data *= 3                                           # with b_gate = 0 all gates times 3
    m.V.data /= 3
    assert sparse().item() == pytest.approx(before, rel=1e-5)


def test_lam_rises_with_training(cfg):
    m = MOLT(D, cfg, torch.Generator().manual_seed(0))
    x_ND = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    total, terms, _ = zip(*(molt.loss_fn(m, x_ND, lambda y_hat: torch.zeros(()), cfg, t) for t in (0, .25, .5, 1)))
    share = torch.stack(total) / (cfg.lam * terms[0]["sparse"])
    assert torch.allclose(share, torch.tensor([0, .5, 1, 1]))


def test_pseudo_gradient_of_theta_is_that_of_the_smoothed_loss():
    """The slope of E[w g] over an even density of z, taken with steps of half the window."""
    bw, theta = 0.5, torch.tensor([0.4, 1.0]).requires_grad_()
    z = torch.linspace(-2, 3, 500_001, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss = lambda at: (z * (z > at) * weights).mean(0)
    numerical = (loss(theta.detach() + bw / 2) - loss(theta.detach() - bw / 2)) / bw
    z_in = z.float().requires_grad_()
    (molt.JumpReLU.apply(z_in, theta, bw) * weights.float()).mean(0).sum().backward()
    assert torch.allclose(theta.grad, numerical.float(), rtol=1e-3)
    assert torch.equal(z_in.grad != 0, z_in > theta)


def test_clamp_against_a_table_by_hand():
    z = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0]).requires_grad_()
    dg = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])               # -1: the loss wants g up
    g = molt.Clamp.apply(z, 0.01)
    g.backward(dg)
    assert torch.equal(g.detach(), torch.tensor([0, 0, .5, .5, 1, 1]))
    assert torch.allclose(z.grad, torch.tensor([0, -.01, 1, -1, .01, 0]))


def test_kl_objective_equals_the_kl_of_full_forwards(cfg):
    cfg = dataclasses.replace(cfg, objective="kl", N=40)                # 3 rows of 12
    gpt = GPT.load(cfg.model)
    m, corpus = molt.build(cfg, gpt), data.load(cfg.data, "train", gpt.vocab)
    x_ND, distance = next(molt.batches(gpt, m, corpus, cfg, 5))
    idx_BT = corpus.batch(5, 3, T, cfg.seed)
    logp, logq = (F.log_softmax(gpt(idx_BT, r), -1) for r in (None, evals.splice(m)))
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    assert distance(m.decode(1, m.encode(1, x_ND, None), x_ND)).item() == pytest.approx(kl.item(), rel=1e-4)


def test_benefit_is_what_ablation_costs(built):
    gpt, m, x_ND, y_ND = built
    rows = torch.randint(0, V, (6, T), generator=torch.Generator().manual_seed(2))
    mlp, (x_BTD, f_BTF) = gpt.h[1].mlp, evals.clean(m, gpt, rows, 1)
    wrong = lambda f: (mlp(x_BTD) - m.decode(1, f, x_BTD))[:, 1:].square().sum(-1).mean()
    without = [f_BTF * (torch.arange(6) != t) for t in range(6)]
    cost = torch.stack([wrong(f) - wrong(f_BTF) for f in without])
    assert torch.allclose(faithful.benefits(m, gpt, 1, rows), cost, atol=1e-4, rtol=1e-4)


def test_jacobian_cosine(built):
    gpt, m, x_ND, y_ND = built
    rows, mlp = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(2)), gpt.h[1].mlp
    x_ND = evals.clean(m, gpt, rows, 1)[0][:, 1:].flatten(0, 1)
    J = torch.func.vmap(torch.func.jacrev(mlp))(x_ND)
    jump = m.theta if not m.tied else None                  # by hand: U diag(G) V + sum_t g'_t (A_t x) e_t^T
    x = m.read(x_ND)
    z = x[:, :D] @ m.E - m.b_gate
    slope = ((z > 0) & (z < 1)) if m.tied else z > jump
    J_hat = sum(m.gates(x)[:, t, None, None] * (V_t[:D] @ U_t).T
                + slope[:, t, None, None] * (x @ V_t @ U_t).unsqueeze(-1) * m.E[:, t] for t, V_t, U_t in parts(m))
    J_hat = m.y_std * J_hat / m.x_std
    found = faithful.jacobian_cosine(m, gpt, 1, rows)
    J, J_hat = J.flatten(1), J_hat.flatten(1)
    some = J_hat.any(1)
    assert found["jacobian_cosine"] == pytest.approx(F.cosine_similarity(J, J_hat)[some].mean().item(), abs=1e-4)
    assert found["jacobian_cosine_pooled"] == pytest.approx(
        ((J * J_hat).sum() / J.norm() / J_hat.norm()).item(), abs=1e-4)
    assert found["jacobian_zero"] == pytest.approx(1 - some.float().mean().item())


def losses(cfg):
    molt.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_losses(cfg, tmp_path):
    one, same, other = (losses(dataclasses.replace(cfg, seed=s, out=str(tmp_path / str(i))))
                        for i, s in enumerate((0, 0, 1)))
    assert one == same and one != other and len(one) == cfg.steps


def test_evaluation_leaves_the_molt_and_the_random_state_alone(cfg):
    m, _ = molt.train(cfg)
    m.idle_F += 5
    gpt, before, rng = GPT.load(cfg.model), {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    corpus = {split: data.load(cfg.data, split, gpt.vocab) for split in ("fit", "test")}
    molt.summarise(cfg, gpt, m, corpus, 0.)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("kind, optimizer", list(zip(KINDS[:3], ("adam", "muon", "muon"))), ids=NAMES[:3])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, kind, optimizer):
    cfg = dataclasses.replace(cfg, optimizer=optimizer, **kind)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    molt.train(whole)
    kill(cfg)
    molt.train(dataclasses.replace(cfg, resume=True))
    (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "molt.safetensors") for c in (whole, cfg))
    assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a) and "molt.idle_F" in a
    assert {f"opt.0.{dict(adam='exp_avg', muon='momentum_buffer')[optimizer]}", "opt_rest.0.exp_avg"} <= a.keys()
    assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()
    _, again = molt.train(dataclasses.replace(cfg, resume=True))        # a finished run gives its summary again
    assert {k: v for k, v in again.items() if k != "seconds"}.items() <= json.loads(
        (Path(whole.out) / "summary.json").read_text()).items()


def test_a_dead_transform_is_counted(cfg, monkeypatch):
    real = molt.build
    def stillborn(cfg, gpt):
        m = real(cfg, gpt)
        m.b_gate.data[:3] = 1e3
        return m
    monkeypatch.setattr(molt, "build", stillborn)
    m, out = molt.train(cfg)
    rows = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    assert m.idle_F[:3].tolist() == [cfg.steps * cfg.N] * 3 and m.idle_F[3:].max() < cfg.N * cfg.steps
    assert rows[-1]["dead"] == pytest.approx(0.5) and out["dead_fraction"] >= 0.5


def test_theta_moves_and_stays_above_zero(cfg):
    m, _ = molt.train(dataclasses.replace(cfg, theta=0.01, lr=0.1, lam=0.))
    assert m.theta.min() == 0 and (m.theta != 0.01).all()
    m, _ = molt.train(dataclasses.replace(cfg, gate="relu", out=cfg.out + "relu"))
    assert not m.theta.any()


def test_summary_has_the_promised_keys(cfg):
    _, out = molt.train(cfg)
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_recovered", "fve", "l0", "active_params", "dead_fraction", "seconds", "active_rank", "parameters",
                "top1_benefit", "effective_transforms", "jacobian_cosine", "jacobian_cosine_pooled", "config"}
    assert promised <= on_disk.keys() and on_disk["config"]["groups"] == cfg.groups
    assert out["l0"] <= out["active_rank"] <= 11 and 1 <= out["effective_transforms"] <= 6
    assert out["parameters"] == sum(p.numel() for p in molt.build(cfg, GPT.load(cfg.model)).parameters())


def test_sweep_draws_the_curve_and_goes_on_after_a_kill(cfg, capsys, monkeypatch):
    cfg = dataclasses.replace(cfg, sweep=True)
    rows = molt.main(cfg)
    kept = json.loads((Path(cfg.out) / "sweep.json").read_text())
    assert kept["rows"] == rows and [r["l0"] for r in rows] == sorted(r["l0"] for r in rows)
    assert sorted(r["lam"] for r in rows) == pytest.approx([cfg.lam * k for k in molt.SWEEP])
    assert len(molt.SWEEP) >= 5 and {"ce_recovered", "fve", "active_rank", "active_params"} <= rows[0].keys()
    assert (Path(cfg.out) / "sweep.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(molt, "loss_fn", None)                          # nothing is trained again
    (Path(cfg.out) / "sweep.json").unlink()
    assert [r["l0"] for r in molt.main(dataclasses.replace(cfg, resume=True))] == [r["l0"] for r in rows]


def test_a_curve_that_falls_is_called_so(cfg):
    @dataclasses.dataclass
    class Fake:
        out: str = cfg.out
        lam: float = 0.
        sweep: bool = True
        resume: bool = False
    found = lambda c: (None, dict(l0=1 / c.lam, ce_recovered=None, fve=c.lam, **dict.fromkeys(curve.BESIDE, 1)))
    curve.sweep(found, Fake(), "lam", (1., 2.))
    assert json.loads((Path(cfg.out) / "sweep.json").read_text())["rises_with_l0"] == {"fve": False}


def test_without_matplotlib_a_sweep_ends_before_it_trains(cfg, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(capsys, lambda: molt.main(dataclasses.replace(cfg, sweep=True)), "matplotlib")
    assert not Path(cfg.out).exists()


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = molt.loss_fn
    def sick(m, x, distance, cfg, t):
        total, terms, g = real(m, x, distance, cfg, t)
        terms["loss"] = total * float("nan") if t > .5 else total
        return terms["loss"], terms, g
    monkeypatch.setattr(molt, "loss_fn", sick)
    with pytest.raises(SystemExit) as stop:
        molt.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "molt.safetensors")[1]["step"] == 4      # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(layer=-2), "--layer -2"), (dict(T=T + 1), f"--T {T + 1}"),
    (dict(N=T - 1), f"--N {T - 1}"), (dict(N=512 * (T - 1) + 1), "--N"), (dict(steps=0), "--steps 0"),
    (dict(groups="4x2"), "--groups 4x2"), (dict(groups="0@2"), "--groups 0@2"), (dict(groups="4@9"), "rank 9"),
    (dict(groups=""), "--groups"), (dict(theta=-1.), "--theta -1.0"), (dict(bandwidth=0.), "--bandwidth 0.0"),
    (dict(lam=-1.), "--lam -1.0"), (dict(ramp=0.), "--ramp 0.0"), (dict(model="nowhere"), "nowhere"),
    (dict(data="nowhere.bin"), "nowhere.bin"), (dict(resume=True), "no such file"),
    (dict(device="tpu"), "--device tpu"), (dict(lr_rest=-1.), "--lr_rest -1")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: molt.train(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    molt.train(cfg)
    path = Path(cfg.out) / "molt.safetensors"
    kept = path.read_bytes()
    for change in (dict(groups="5@1"), dict(seed=5), dict(sum_to_weights=True)):
        fails(capsys, lambda: molt.train(dataclasses.replace(cfg, resume=True, **change)), "does not fit this run")
    assert path.read_bytes() == kept
    path.write_bytes(kept[:len(kept) // 2])
    fails(capsys, lambda: molt.train(dataclasses.replace(cfg, resume=True)), "truncated")
