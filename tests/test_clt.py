"""Oracles of clt.py: a second way to each number, on tiny random models."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clt
import common
import data
import evals
from clt import CLT, Config
from conftest import D, M, T, V, kill
from model import GPT
from test_common import fails

ROOT = Path(clt.__file__).parent
L, N = 3, 40
SETTINGS = [("batchtopk", True), ("batchtopk", False), ("jumprelu", True), ("jumprelu", False)]


def config(target, out, **change):
    return Config(model=str(target), data=str(target / "x.bin"), out=str(out / "run"), device="cpu", steps=6, N=N, T=T,
                  lr=1e-2, log_every=1, save_every=2, eval_tokens=240, **dict(F=10, k=2) | change)


@pytest.fixture
def cfg(target, tmp_path):
    return config(target, tmp_path)


def fresh(cfg, **change):
    """A CLT with thresholds and biases that are not all alike, and a batch for it."""
    gen = torch.Generator().manual_seed(0)
    m = CLT(L, D, dataclasses.replace(cfg, **change), gen, [1])
    for p in (m.b_enc_LF, m.b_dec_LD):
        p.data = 0.2 * torch.randn(p.shape, generator=gen)
    m.theta_LF.data = 0.3 * torch.rand(m.theta_LF.shape, generator=gen)
    return m, torch.randn(L, N, D, generator=gen), torch.randn(L, N, D, generator=gen)


def zero_off_diagonal(m):
    for W in m.W_dec:
        W.data[:-1] = 0


@pytest.mark.parametrize("off_diagonal", [True, False])
def test_the_fast_forward_equals_the_loop_over_tokens_layers_and_features(cfg, off_diagonal):
    m, x, _ = fresh(cfg, off_diagonal=off_diagonal)
    f = clt.jumprelu(m.preactivations(x), m.theta_LF, 1.)
    y = m.write(f)
    for n in range(0, N, 13):
        for l in range(L):
            want = m.b_dec_LD[l].clone()
            for j, source in enumerate(range(l + 1) if off_diagonal else [l]):
                for i in range(cfg.F):
                    z = m.W_enc_LDF[source, :, i] @ x[source, n] + m.b_enc_LF[source, i]
                    if z > m.theta_LF[source, i]:
                        want += z * m.W_dec[l][j, i]
            assert torch.allclose(y[l, n], want, atol=1e-5)
    assert 0 < (f > 0).float().mean() < 1


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_without_what_is_off_the_diagonal_it_is_a_transcoder_per_layer(cfg, variant):
    """Values, losses and gradients; and the control's module holds nothing else."""
    whole, x, y = fresh(cfg, variant=variant)
    zero_off_diagonal(whole)
    alone = fresh(cfg, variant=variant, off_diagonal=False)[0]
    alone.load_state_dict({k: v[-1:] if k.startswith("W_dec") else v for k, v in whole.state_dict().items()})
    results = []
    for m in (whole, alone):
        loss, _, f, _ = clt.loss_fn(m, x, y, dataclasses.replace(cfg, variant=variant), 0.5)
        loss.backward()
        results.append([loss, m.write(f), m.W_enc_LDF.grad, *(W.grad[-1] for W in m.W_dec)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))
    for l in range(L):                      # a transcoder of its own
        z = x[l] @ alone.W_enc_LDF[l] + alone.b_enc_LF[l]
        f = z * (z > alone.theta_LF[l])
        y = f @ alone.W_dec[l][0] + alone.b_dec_LD[l]
        assert torch.allclose(alone.decode(l, alone.encode(l, x[l], None), x[l]), y, atol=1e-6)


def test_one_made_of_relu_mlps_weights_is_exact():
    gen, cfg = torch.Generator().manual_seed(0), Config(F=M, theta=0.)
    m = CLT(L, D, cfg, gen, [0, 1, 2])
    zero_off_diagonal(m)
    mlps = [(torch.randn(D, M, generator=gen), torch.randn(M, generator=gen), torch.randn(M, D, generator=gen),
             torch.randn(D, generator=gen)) for _ in range(L)]
    for l, (W_in, b_in, W_out, b_out) in enumerate(mlps):
        m.W_enc_LDF.data[l], m.b_enc_LF.data[l], m.W_dec[l].data[-1], m.b_dec_LD.data[l] = W_in, b_in, W_out, b_out
    x = torch.randn(L, N, D, generator=gen)
    y = torch.stack([(x_ND @ W_in + b_in).relu() @ W_out + b_out for x_ND, (W_in, b_in, W_out, b_out) in zip(x, mlps)])
    m.theta_LF.data.zero_()
    assert torch.allclose(m.write(clt.jumprelu(m.preactivations(x), m.theta_LF, 1.)), y, atol=1e-4)
    for l in range(L):
        assert torch.allclose(m.decode(l, m.encode(l, x[l], None), x[l]), y[l], atol=1e-4)


def test_jumprelu_gives_theta_the_slope_of_the_mean():
    """z uniform around theta: the pseudo-gradient of a loss linear in f is that of its mean by differences; for one z
    it is -theta / bw in the window, both halves of it, and the rest is plain."""
    z, theta, bw = torch.linspace(-1, 3, 400_001, dtype=torch.float64), torch.tensor([[.8]], dtype=torch.float64), .1
    w = torch.cos(z)                       # dloss / df
    mean = lambda theta: (w * z * (z > theta)).mean()
    theta.requires_grad_(), z.requires_grad_()
    f = clt.jumprelu(z.view(1, -1, 1), theta, bw)
    (w.detach().view(1, -1, 1) * f).mean().backward()
    slope = (mean(theta.detach() + bw / 2) - mean(theta.detach() - bw / 2)) / bw       # smoothed over the same window
    assert theta.grad.item() == pytest.approx(slope.item(), rel=.02) and theta.grad.item() != 0
    assert torch.equal(f.flatten() > 0, z > .8) and torch.allclose(f.flatten(), z * (z > .8))
    assert torch.allclose(z.grad * len(z), w * (z > .8))
    z = torch.tensor([.1, .56, .79, .81, 1.04, 1.06]).view(1, -1, 1)
    each = [torch.autograd.grad(clt.jumprelu(z, (t := torch.tensor([[.8]]).requires_grad_()), .5)[0, i, 0], t)[0].item()
            for i in range(6)]
    assert each == pytest.approx([0, -1.6, -1.6, -1.6, -1.6, 0])


def test_batchtopk_against_sorted(cfg):
    m, x, _ = fresh(cfg)
    z, norm = m.preactivations(x), m.norms()
    f, least = clt.batchtopk(z, norm, cfg.k)
    for l in range(L):
        size = sorted((z[l].relu() * norm[l]).flatten().tolist(), reverse=True)[:cfg.k * N]
        assert (f[l] > 0).sum() == cfg.k * N and least[l].item() == pytest.approx(size[-1])
        assert sorted((f[l] * norm[l])[f[l] > 0].tolist(), reverse=True) == pytest.approx(size)
    f, _ = clt.batchtopk(-z.abs(), norm, cfg.k)
    assert not f.any()                     # nothing above zero, nothing on


def test_norms_by_hand(cfg):
    m = fresh(cfg)[0]
    for l in range(L):
        for i in range(cfg.F):
            assert m.norms()[l, i].item() == pytest.approx(sum(
                m.W_dec[k][l, i].square().sum().item() for k in range(l, L)) ** 0.5, rel=1e-5)


def test_the_penaltys_gradient_reaches_every_decoder_by_hand(cfg):
    """d tanh(c |W| f) / dW = c f (1 - tanh^2) W / |W| for each of a feature's decoders."""
    cfg = dataclasses.replace(cfg, variant="jumprelu", lam=.7, ramp=1., lam_p=0.)
    m, x, y = fresh(cfg)
    _, terms, f, _ = clt.loss_fn(m, x, y, cfg, 1.)
    grads, norm = torch.autograd.grad(terms["sparsity"], list(m.W_dec)), m.norms()
    value = torch.tanh(cfg.c * norm[:, None] * f)
    assert terms["sparsity"].item() == pytest.approx((.7 * value.sum() / N).item(), rel=1e-5)
    weight = .7 * (cfg.c * f * (1 - value**2)).mean(1) / norm                # (L, F)
    for l, (grad, W) in enumerate(zip(grads, m.W_dec)):
        assert torch.allclose(grad, weight[:l + 1, :, None] * W, atol=1e-6) and grad.abs().max() > 1e-4


def nmse(y_hat, y):
    return sum(((a - b)**2).sum() / N / ((b - b.mean(0))**2).sum() * (N - 1) for a, b in zip(y_hat, y))


def test_jumprelus_loss_is_the_sum_of_its_terms_and_lam_rises(cfg):
    cfg = dataclasses.replace(cfg, variant="jumprelu", lam=.3, ramp=.5, lam_p=.2)
    m, x, y = fresh(cfg)
    m.idle_LF[1, :4] = 1e9                  # of which the pull moves nothing but z
    z, norm = m.preactivations(x), m.norms()
    pull = .2 * ((m.theta_LF[1, :4] - z[1, :, :4]).relu().mean(0) * norm[1, :4]).sum()
    for t, share in ((0, 0), (.25, .5), (.5, 1), (.9, 1)):
        loss, terms, f, _ = clt.loss_fn(m, x, y, cfg, t)
        sparsity = .3 * share * torch.tanh(4 * norm[:, None] * f).sum() / N
        assert torch.allclose(loss, nmse(m.write(f), y) + sparsity + pull, atol=1e-5)
        assert terms["dead"].item() == pytest.approx(4 / (L * cfg.F)) and torch.allclose(terms["rescue"], pull)
    grad = torch.autograd.grad(terms["rescue"], [m.b_enc_LF, m.theta_LF, *m.W_dec], allow_unused=True)
    assert (grad[0] != 0).nonzero().tolist() == [[1, i] for i in range(4)] and grad[0].max() <= 0
    assert grad[1:] == (None,) * 4


def test_batchtopks_loss_is_the_sum_of_its_terms(cfg):
    cfg = dataclasses.replace(cfg, c_aux=.3, k_aux=2)
    m, x, y = fresh(cfg)
    loss, terms, f, _ = clt.loss_fn(m, x, y, cfg, .5)
    assert torch.allclose(loss, nmse(m.write(f), y)) and not terms["rescue"]
    m.idle_LF[1, 2:7] = m.idle_LF[2, 5:] = 1e9
    loss, terms, f, _ = clt.loss_fn(m, x, y, cfg, .5)
    z = m.preactivations(x) * (m.idle_LF > 0)[:, None]
    size = z.relu() * m.norms()[:, None]
    dead = z * (size >= size.flatten(1).sort().values[:, -2 * N, None, None].clamp(min=1e-9))
    aux = .3 * nmse(m.write(dead) - m.b_dec_LD[:, None], (y - m.write(f)).detach())
    assert torch.allclose(terms["rescue"], aux) and torch.allclose(loss, nmse(m.write(f), y) + aux)
    grads = torch.autograd.grad(terms["rescue"], [m.W_enc_LDF, *m.W_dec])
    where = [[l, i] for l in range(L) for i in range(cfg.F) if m.idle_LF[l, i]]
    assert (grads[0].abs().sum(1) > 0).nonzero().tolist() == (grads[3].abs().sum(-1) > 0).nonzero().tolist() == where
    assert (grads[2].abs().sum(-1) > 0).nonzero().tolist() == where[:5]


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_dead_features_are_counted(cfg, variant):
    cfg = dataclasses.replace(cfg, variant=variant, k=1)
    m, x, y = fresh(cfg)
    m.b_enc_LF.data[0, 3] = -100                                 # never on
    opts = clt.optimizers(m, cfg)
    for step in range(3):
        loss, terms, f, least = clt.loss_fn(m, x, y, cfg, 0.5)
        before, off = m.idle_LF.clone(), ~(f > 0).any(1)
        dead = before > cfg.dead_after * cfg.steps * N           # 12 tokens
        assert terms["dead"] == dead.float().mean() and dead[0, 3] == (step > 0)
        clt.update(m, opts, loss, f, least, cfg, 0.5)
        assert torch.equal(m.idle_LF, torch.where(off, before + N, 0)) and not off.all()


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_dead_features_come_back(cfg, variant):
    """Half start with thresholds that they don't reach: with the rescue they are on in the end, without it off."""
    dead = []
    for rescue in (1, 0):
        change = dict(lam_p=rescue * cfg.lam_p, c_aux=rescue * cfg.c_aux, lam=.01)
        cfg_ = dataclasses.replace(cfg, variant=variant, steps=200, dead_after=.01, lr=2e-2, **change)
        m, x, y = fresh(cfg_)
        m.W_enc_LDF.data[..., :5] *= .1 if variant == "batchtopk" else .5
        m.b_enc_LF.data[:, :5] = 0 if variant == "batchtopk" else -2        # its rescue needs z > 0 on some tokens
        m, _, _ = fit(m, lambda _: (x, y), cfg_)
        dead.append((m.idle_LF > 2 * N).float().mean().item())
    assert dead[0] < .15 and dead[1] > .3, dead


def test_thresholds_follow_the_batches_and_stay_above_zero(cfg):
    m, x, y = fresh(cfg)
    seen = []
    for step in range(4):
        loss, _, f, least = clt.loss_fn(m, x * (1 + step), y, cfg, 0.5)
        clt.update(m, clt.optimizers(m, cfg), loss, f, least, cfg, 0.5)
        seen.append(least)
    tau = seen[0]
    for least in seen[1:]:
        tau = .99 * tau + .01 * least
    assert torch.allclose(m.tau_L, tau) and torch.allclose(m.theta_LF, tau[:, None] / m.norms())
    cfg = dataclasses.replace(cfg, variant="jumprelu")
    m.theta_LF.data -= 1
    clt.update(m, clt.optimizers(m, cfg), clt.loss_fn(m, x, y, cfg, 0.5)[0], f, None, cfg, 0.5)
    assert m.theta_LF.min() == 0


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: f"{s[0]}-{'clt' if s[1] else 'per_layer'}")
def trained(request, target, tmp_path_factory):
    variant, off_diagonal = request.param
    cfg = config(target, tmp_path_factory.mktemp("out"), variant=variant, off_diagonal=off_diagonal, lam=.01)
    m, out = clt.train(cfg)
    return cfg, GPT.load(cfg.model), m, torch.randint(0, V, (4, T), generator=torch.Generator().manual_seed(1)), out


def test_folding(trained):
    """The saved module gives on raw activations what the trained one gives on scaled ones."""
    cfg, gpt, _, idx, _ = trained
    x, y = data.at_mlps(gpt, idx, range(L))
    x, y = x * 3 + 1, y * torch.tensor([.1, 1., 10.])[:, None, None] - 2
    scale, (m, *_) = clt.Scale(x, y), fresh(cfg)
    x_scaled, y_scaled = scale(x, y)
    for a in (x_scaled, y_scaled):
        assert torch.allclose(a.mean(1), torch.zeros(L, D), atol=1e-4)
        assert torch.allclose(a.square().sum(-1).mean(1), torch.full((L,), float(D)), atol=1e-3)
    raw, f = scale.fold(m), clt.jumprelu(m.preactivations(x_scaled), m.theta_LF, 1.)
    f_raw = clt.jumprelu(raw.preactivations(x), raw.theta_LF, 1.)
    assert torch.allclose(f_raw, f, atol=1e-4) and 0 < (f > 0).float().mean() < 1
    assert torch.allclose(scale(x, raw.write(f_raw))[1], m.write(f), atol=1e-4)
    assert torch.equal(m.b_enc_LF, fresh(cfg)[0].b_enc_LF)      # the trained one stays


def test_a_token_alone_is_encoded_as_in_its_batch(trained):
    cfg, gpt, m, idx, _ = trained
    for l in range(L):
        x = gpt.prefix(idx, l)[0]
        m.seen = {i: torch.zeros(4, T, cfg.F) for i in range(L)}
        whole = m.encode(l, x, None)
        m.seen = {i: torch.zeros(1, 1, cfg.F) for i in range(L)}
        assert torch.allclose(m.encode(l, x[2:3, 5:6], None), whole[2:3, 5:6], atol=1e-6)
        assert whole.min() >= 0 and whole.any()


def test_seam(trained):
    cfg, gpt, m, idx, _ = trained
    m = m.standing_in([1])
    assert m.reads == ([0, 1] if cfg.off_diagonal else [1]) and m.params_F.tolist() == [2 * D] * cfg.F * len(m.reads)
    x, f = evals.clean(m, gpt, idx, 1)
    xs, _ = data.at_mlps(gpt, idx, range(L))
    f_LNF = clt.jumprelu(m.preactivations(xs), m.theta_LF, 1.)
    assert torch.allclose(f[:, 1:].flatten(0, 1), torch.cat([f_LNF[l] for l in m.reads], -1), atol=1e-5)
    y = m.decode(1, f, x)
    assert torch.allclose(y[:, 1:].flatten(0, 1), m.write(f_LNF)[1], atol=1e-5)
    c = m.contrib(1, f, x, torch.arange(f.shape[-1]))
    assert torch.allclose(c.sum(-2), y - m.b_dec_LD[1], atol=1e-5)
    for u in (0, 7, f.shape[-1] - 1):
        off = f.clone()
        off[..., u] = 0
        assert torch.allclose(c[..., u, :], y - m.decode(1, off, x), atol=1e-5)
    assert m.standing_in([0, 1, 2]).params_F.tolist() == [
        p for n in ((4, 3, 2) if cfg.off_diagonal else (2,)) for p in [n * D] * cfg.F]


def test_splice_replaces_one_mlp_or_all(trained):
    cfg, gpt, m, idx, _ = trained
    x, f = evals.clean(m.standing_in([1]), gpt, idx, 1)
    one = gpt.suffix(gpt.prefix(idx, 1)[1], m.decode(1, f, x), 1)
    assert torch.allclose(gpt(idx, evals.splice(m.standing_in([1]))), one, atol=1e-5)
    r, fs = gpt.wte(idx) + gpt.wpe.weight[:T], []
    for l, block in enumerate(gpt.h):
        x, r = block.to_mlp(r)
        z = x @ m.W_enc_LDF[l] + m.b_enc_LF[l]
        fs.append(z * (z > m.theta_LF[l]))
        r = r + m.b_dec_LD[l] + sum(f @ W for f, W in zip(fs if cfg.off_diagonal else fs[l:], m.W_dec[l]))
    want = F.linear(gpt.ln_f(r), gpt.wte.weight)
    got = gpt(idx, evals.splice(m.standing_in([0, 1, 2])))
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, one, atol=1e-2)


def test_summary_has_the_promised_keys(trained):
    cfg, gpt, m, idx, out = trained
    on_disk = json.loads((Path(cfg.out) / "summary.json").read_text())
    promised = {"ce_recovered", "fve", "l0", "active_params", "dead_fraction", "seconds", "fve_layers", "l0_layers",
                "dead_layers", "ce_recovered_all", "config", "commit"}
    assert promised <= on_disk.keys() and on_disk["config"]["F"] == cfg.F and m.layers == [1]
    assert on_disk["fve"] == on_disk["fve_layers"][1] and on_disk["l0"] == on_disk["l0_layers"][1]
    assert on_disk["active_params"] == pytest.approx(on_disk["l0"] * 2 * D)
    tensors, _ = common.load(Path(cfg.out) / "clt.safetensors")
    loaded = clt.build(cfg, gpt)[0]
    common.unflat(tensors, clt=loaded)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), m.state_dict().values()))
    m, out = clt.train(dataclasses.replace(cfg, replace="all", resume=True))
    assert m.layers == [0, 1, 2] and out["ce_recovered"] == out["ce_recovered_all"]
    l0s = out["l0_layers"]
    assert out["l0"] == pytest.approx(l0s[-1] if cfg.off_diagonal else sum(l0s))
    own = np.diff([0, *l0s]) if cfg.off_diagonal else l0s
    params = (4, 3, 2) if cfg.off_diagonal else (2, 2, 2)
    assert out["active_params"] == pytest.approx(sum(D * n * p for n, p in zip(own, params)))


def fit(m, batch, cfg):
    """m after cfg.steps steps on batch(step), the NMSEs, and the last f."""
    opts, nmses = clt.optimizers(m, cfg), []
    for step in range(cfg.steps):
        loss, terms, f, least = clt.loss_fn(m, *batch(step), cfg, step / cfg.steps)
        clt.update(m, opts, loss, f, least, cfg, step / cfg.steps)
        nmses.append(terms["nmse"].item())
    return m, nmses, f


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_one_batch_overfits(cfg, variant):
    cfg = dataclasses.replace(cfg, variant=variant, F=64, k=16, lam=0., lr=2e-2, steps=150)
    m, x, y = fresh(cfg)
    _, nmses, _ = fit(m, lambda _: (x, y), cfg)
    assert nmses[-1] < 0.02 < 0.5 < nmses[0]


@pytest.mark.parametrize("variant, off_diagonal", SETTINGS)
def test_muon_trains_each_layers_matrices_and_adam_the_rest(cfg, variant, off_diagonal):
    change = dict(variant=variant, off_diagonal=off_diagonal, steps=100, optimizer="muon", lr=2e-2, lr_rest=3e-3)
    cfg = dataclasses.replace(cfg, lam=0., **change)
    m, x, y = fresh(cfg)
    opts = clt.optimizers(m, cfg)
    matrices, rest = (opt.param_groups[0]["params"] for opt in opts.values())
    writers = [l + 1 if off_diagonal else 1 for l in range(L)]
    assert [W.shape for W in matrices] == [(D, cfg.F)] * L + [(n * cfg.F, D) for n in writers]
    assert {id(p) for p in rest} == {id(m.b_enc_LF), id(m.b_dec_LD)} | ({id(m.theta_LF)} if variant == "jumprelu" else set())
    assert isinstance(opts["opt"], torch.optim.Muon) and isinstance(opts["opt_rest"], torch.optim.Adam)
    before = {k: v.clone() for k, v in m.named_parameters()}
    for t, share in ((0, 0.4), (0.5, 1), (0.9, 0.5)):           # both follow the schedule
        loss, _, f, least = clt.loss_fn(m, x, y, cfg, t)
        clt.update(m, opts, loss, f, least, cfg, t)
        assert [opt.param_groups[0]["lr"] for opt in opts.values()] == pytest.approx([2e-2 * share, 3e-3 * share])
        if not t:                                               # a step turns all directions of each alike
            moved = m.W_dec[2].flatten(0, 1) - before["W_dec.2"].flatten(0, 1)
            turned = torch.linalg.svdvals(moved) / (0.4 * 2e-2 * (len(moved) / D)**0.5)
            assert 0.6 < turned.min() and turned.max() < 1.3
    assert all(not torch.equal(v, before[k]) for k, v in m.named_parameters())
    _, nmses, _ = fit(m, lambda _: (x, y), cfg)
    assert nmses[-1] < 0.8 * nmses[0]


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_a_planted_cross_layer_dictionary_is_found(cfg, variant):
    """12 sparse features read at layer 0 and written, each in a direction of its own, at layers 0, 1 and 2."""
    gen, K, n = torch.Generator().manual_seed(0), 12, 16
    read, write = (F.normalize(torch.randn(*s, generator=gen), dim=-1) for s in ((K, n), (3, K, n)))
    def batch(step):
        g = torch.Generator().manual_seed(step)
        a = (torch.rand(128, K, generator=g) < .1) * (.5 + torch.rand(128, K, generator=g))
        x = torch.stack([a @ read, *torch.randn(2, 128, n, generator=g)])       # nothing to read but at layer 0
        return x * n**.5, torch.einsum("nk,lkd->lnd", a, write) * n**.5
    cfg = dataclasses.replace(cfg, variant=variant, F=24, k=1, lam=.5, lr=1e-2, N=128, steps=300)
    m, _, f = fit(CLT(L, n, cfg, torch.Generator().manual_seed(0), [1]), batch, cfg)
    for l in range(L):
        cos = F.normalize(m.W_dec[l][0], dim=-1) @ write[l].T
        assert cos.max(0).values.mean() > .95
    l0 = (f > 0).sum(2).float().mean(1)
    assert abs(l0[0] - .1 * K) < .25 and (variant == "batchtopk" or not l0[1:].any())


def losses(cfg):
    clt.train(cfg)
    return [json.loads(line)["loss"] for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_losses_whether_saved_and_folded_or_not(cfg, tmp_path):
    never = losses(dataclasses.replace(cfg, save_every=100))
    every = losses(dataclasses.replace(cfg, save_every=1, out=str(tmp_path / "every")))
    other = losses(dataclasses.replace(cfg, seed=1, out=str(tmp_path / "other")))
    assert never == every and never != other and len(never) == cfg.steps


def test_evaluation_changes_nothing(trained):
    cfg, gpt, m, idx, _ = trained
    before, state = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    evals.clean(m.standing_in([1]), gpt, idx, 1), gpt(idx, evals.splice(m.standing_in([0, 1, 2])))
    assert all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant, optimizer", [("batchtopk", "adam"), ("jumprelu", "muon")])
def test_killed_and_resumed_ends_bit_identical(cfg, tmp_path, variant, optimizer):
    cfg = dataclasses.replace(cfg, variant=variant, optimizer=optimizer)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    clt.train(whole)
    kill(cfg)
    clt.train(dataclasses.replace(cfg, resume=True))
    (a, meta_a), (b, meta_b) = (common.load(Path(c.out) / "clt.safetensors") for c in (whole, cfg))
    assert meta_a["step"] == meta_b["step"] == cfg.steps and a.keys() == b.keys()
    assert {"train.tau_L", "train.idle_LF", "train.theta_LF", "clt.theta_LF", "scale.s_x"} <= a.keys()
    assert {f"opt.0.{dict(adam='exp_avg', muon='momentum_buffer')[optimizer]}", "opt_rest.0.exp_avg"} <= a.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (Path(whole.out) / "log.jsonl").read_text() == (Path(cfg.out) / "log.jsonl").read_text()


def test_nan_stops_with_the_step_and_the_checkpoint(cfg, capsys, monkeypatch):
    real = clt.loss_fn
    def sick(m, x, y, cfg, t):
        total, *rest = real(m, x, y, cfg, t)
        rest[0]["loss"] = total = total * float("nan") if t > .5 else total
        return total, *rest
    monkeypatch.setattr(clt, "loss_fn", sick)
    with pytest.raises(SystemExit) as stop:
        clt.train(cfg)
    assert stop.value.code == 1 and "step 4" in capsys.readouterr().err
    assert common.load(Path(cfg.out) / "clt.safetensors")[1]["step"] == 4       # the last good one


@pytest.mark.parametrize("change, words", [
    (dict(layer=7), "--layer 7"), (dict(layer=-2), "--layer -2"), (dict(F=0), "--F 0"), (dict(k=11), "--k 11"),
    (dict(k=0), "--k 0"), (dict(N=0), "--N 0"), (dict(N=10**6), "--N 1000000"), (dict(T=T + 1), f"--T {T + 1}"),
    (dict(steps=0), "--steps 0"), (dict(bandwidth=0.), "--bandwidth 0"), (dict(ramp=0.), "--ramp 0"), (dict(theta=-1.), "--theta -1"),
    (dict(model="nowhere"), "nowhere"), (dict(data="nowhere.bin"), "nowhere.bin"), (dict(resume=True), "no such file"),
    (dict(device="tpu"), "--device tpu"),
    (dict(lr_rest=-1.), "--lr_rest -1")])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: clt.train(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(cfg, capsys):
    clt.train(cfg)
    path = Path(cfg.out) / "clt.safetensors"
    kept = path.read_bytes()
    for change in (dict(F=11), dict(seed=5), dict(variant="jumprelu"), dict(off_diagonal=False)):
        fails(capsys, lambda: clt.train(dataclasses.replace(cfg, resume=True, **change)), "does not fit this run")
    assert path.read_bytes() == kept
    path.write_bytes(kept[:len(kept) // 2])
    fails(capsys, lambda: clt.train(dataclasses.replace(cfg, resume=True)), "truncated")


def test_sweep_saves_its_curve_and_a_bad_one_saves_nothing(cfg, capsys):
    pytest.importorskip("matplotlib")
    for k in (2, 4):                        # a quarter of 2 is 0, four times 4 over F
        fails(capsys, lambda: clt.main(dataclasses.replace(cfg, k=k, sweep=True)),
              f"--k {4 * k if k == 4 else 0}: must")
        assert not Path(cfg.out).exists()
    rows = clt.main(dataclasses.replace(cfg, variant="jumprelu", lam=.1, steps=2, sweep=True))
    assert json.loads((Path(cfg.out) / "sweep.json").read_text())["rows"] == rows
    assert sorted(row["lam"] for row in rows) == pytest.approx([.025, .05, .1, .2, .4])
    assert (Path(cfg.out) / "sweep.png").read_bytes()[:4] == b"\x89PNG"
