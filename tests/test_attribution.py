"""Attribution across layers: identities on random decompositions, loops on tiny nets, planted features, a linear case."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baselines
import clt
import common
import model
import molt
import sae
import spd
import transcoder
from conftest import D, M, T, V, noisy_gpt
from metrics import attribution, masks, matching
from metrics.attribution import TAU, attribute, causal, nothing_masked, rotated
from test_common import fails

LAYER, F, EACH = 1, 24, 20


def in_part(importance):
    """Masks of the components and of the rest that are neither 0 nor 1, nor the same."""
    return list(importance), importance[0].new_full((len(importance), 1), 0.3)


MASKS = {"off": nothing_masked, "all on": masks.all_on, "ci": masks.without_rest, "in part": in_part,
         "rounded": partial(masks.rounded, threshold=0.5)}


def normal(seed, *shape):
    return torch.randn(*shape, generator=common.generator(seed, "test"))


def shaken(m, seed, size=0.3):
    """m with parameters that are not those it starts from."""
    for i, p in enumerate(m.parameters()):
        p.data += size * normal(seed + i, *p.shape)
    return m.requires_grad_(False)


@torch.no_grad()
def shares(m, mlp, x_ND, w_ND, choose_masks=nothing_masked, tau=TAU):
    return attribution.at_tokens(m, mlp, x_ND, choose_masks, tau).shares(w_ND)


@pytest.fixture(scope="module")
def gpt():
    return noisy_gpt(3, D, M, T, V)


@pytest.fixture(scope="module")
def rows():
    gen = common.generator(0, "rows")
    return [torch.randint(V, (40, T), generator=gen) for _ in range(2)]


@pytest.fixture(scope="module")
def tokens(gpt, rows):
    """The MLP's inputs at some tokens, and a direction for each."""
    x_ND = gpt.prefix(rows[0][:4], LAYER)[0][:, 1:].flatten(0, 1)
    return x_ND, normal(1, *x_ND.shape)


def make_sae(gpt, site, layer, F=F, k=6, seed=0, **more):
    m = sae.build(sae.Config(F=F, k=k, site=site, layer=layer, T=T, seed=seed, N=36, device="cpu", **more), gpt)
    m.scale.fill_(1.7)
    return shaken(m, seed)


def make_spd(mlp, C, seed=0):
    """Components that do not add up to the weights, with importances of all sizes."""
    Ws, bs = [mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias]
    return shaken(spd.SPD(Ws, bs, spd.Config(C=C, ci_hidden=8), common.generator(seed, "spd"), LAYER, mlp.act), seed)


def decompositions(gpt):
    """Every kind of decomposition that a share is asked of: C below and above the rank of W."""
    mlp, small = gpt.mlp(LAYER), dict(layer=LAYER, T=T, N=36, device="cpu")
    folded = molt.build(molt.Config(groups="3@1,2@2,1@4", **small), gpt)
    return {"spd 5": make_spd(mlp, 5), "spd 24": make_spd(mlp, 24), "svd": baselines.SVD(LAYER, mlp, 3),
            "rotated": rotated(make_spd(mlp, 24), common.generator(0, "Q")),
            "rounded": spd.Rounded(make_spd(mlp, 24), 0.5),
            "neurons": baselines.Neurons(LAYER, mlp, M), "few neurons": baselines.Neurons(LAYER, mlp, 5),
            "random": baselines.Dictionary(LAYER, baselines.random_directions(20, D, 0), normal(3, D), 4),
            "transcoder": shaken(transcoder.build(transcoder.Config(F=F, k=6, **small), gpt), 0),
            "skip": shaken(transcoder.build(transcoder.Config(F=F, k=6, skip=True, **small), gpt), 1),
            "sae": make_sae(gpt, "mlp_out", LAYER), "molt": shaken(folded, 2)}


NAMES = ["spd 5", "spd 24", "svd", "rotated", "rounded", "neurons", "few neurons", "random", "transcoder", "skip", "sae",
         "molt"]


@pytest.fixture(scope="module")
def every(gpt):
    return decompositions(gpt)


@pytest.fixture(scope="module")
def readings(gpt, rows):
    """A later SAE on the stream after the MLP, and what it reads on fit and on test."""
    later = make_sae(gpt, "resid", LAYER)
    return [attribution.read_later(later, gpt, LAYER, r) for r in rows]


def close(a, b, tol=1e-5):
    """Equal to `tol` of the largest number."""
    return (a - b).abs().max() <= tol * b.abs().max()


# ---------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("site, above", [("resid", LAYER), ("resid", LAYER + 1), ("mlp_in", LAYER + 1), ("mlp_in", LAYER),
                                         ("mlp_out", LAYER)])
def test_reading_is_the_saes_own_preactivation(gpt, rows, site, above):
    layer = LAYER if above > LAYER or site != "mlp_in" else 0
    later = make_sae(gpt, site, above)
    reading = attribution.read_later(later, gpt, layer, rows[0], batch=7)

    # what it reads, by the seam of the model and of the SAE alone
    x_BTD, stream_BTD = gpt.prefix(rows[0], above)
    a_ND = later.read(x_BTD, gpt.mlp(above)(x_BTD), stream_BTD)[:, 1:].flatten(0, 1)
    pre_NF = later.pre(a_ND * later.scale, later.W_enc, later.b_enc).full()

    stream_ND = reading.other_ND + reading.y_ND
    p_NF = reading.scale(stream_ND) * (stream_ND @ reading.w_FD.T) + reading.b_F
    assert close(p_NF, pre_NF)
    assert close(reading.x_ND, gpt.prefix(rows[0], layer)[0][:, 1:].flatten(0, 1))      # batches of other sizes
    assert close(reading.y_ND, gpt.mlp(layer)(reading.x_ND.view(40, T - 1, D)).flatten(0, 1))

    # its features, and where they are on
    f_NF = later.codes(a_ND)
    assert close(reading.values(reading.other_ND, reading.y_ND), f_NF, 1e-4)
    assert torch.equal(reading.on.on(), (f_NF > 0).sum(0))


def test_rows_are_evenly_spread_tokens_of_each_feature(readings):
    reading = readings[0]
    units = attribution.frequent(*readings, EACH)
    assert len(units) > 3 and (reading.on.on()[units] >= EACH).all()
    assert set(units.tolist()) == {u for u in range(F) if min(r.on.on()[u] for r in readings) >= EACH}
    token_UJ = reading.tokens(units, EACH)
    for u, token_J in zip(units.tolist(), token_UJ):
        own = reading.on.token_E[reading.on.unit_E == u]
        assert torch.equal(token_J, own[torch.arange(EACH) * len(own) // EACH])
    rows = reading.rows(units, EACH)
    assert torch.equal(rows.w_ND[EACH], reading.w_FD[units[1]]) and torch.equal(rows.y_ND[3], reading.y_ND[token_UJ[0, 3]])


@pytest.mark.parametrize("site, above", [("resid", 0), ("mlp_in", LAYER), ("mlp_out", 2), ("mlp_out", 0)])
def test_what_does_not_read_y_as_a_sum_is_refused(gpt, rows, site, above, capsys):
    later = make_sae(gpt, site, above)
    fails(capsys, partial(attribution.read_later, later, gpt, LAYER, rows[0]), f"--site {site} at layer {above}",
          "does not read what the MLP of layer 1 writes")


def test_a_method_across_layers_is_refused(gpt, tokens, capsys):
    m, _ = clt.build(clt.Config(F=8, k=4, T=T, layer=LAYER, device="cpu"), gpt)
    fails(capsys, partial(shares, m, gpt.mlp(LAYER), *tokens), "reads layers [0, 1] at once")


def test_paths_begin_at_the_mlps_input(gpt, tokens, every, capsys):
    later = make_sae(gpt, "resid", LAYER)
    fails(capsys, partial(attribution.paths, every["spd 5"], gpt.mlp(LAYER), later, *tokens, torch.arange(5)),
          "site mlp_in, not resid")


# ------------------------------------------------------------------------------------- the identity
@pytest.mark.parametrize("name, mask", [*[(name, "off") for name in NAMES],
                                        *[(name, mask) for name in NAMES[:5] for mask in list(MASKS)[1:]]])
def test_shares_add_up_to_q(gpt, tokens, every, name, mask):
    m, (x_ND, w_ND), mlp = every[name], tokens, gpt.mlp(LAYER)
    q_N = (mlp(x_ND) * w_ND).sum(1)
    found = shares(m, mlp, x_ND, w_ND, MASKS[mask])
    assert list(found) == (["in", "out"] if m.kind == "component" else ["all"])
    for s in found.values():
        assert close(s.q, q_N) and s.piece_NF.shape == s.active_NF.shape
        # without masks components and rest are the MLP; with them the rest is off; SVD and neurons have none
        if m.kind == "component":
            assert mask != "off" or s.error_N.abs().max() < 1e-5 * q_N.abs().max()
            assert (mask in ("off", "in part")) == bool(s.rest_N.any())
        if name in ("svd", "neurons") and mask == "off":
            assert (s.rest_N + s.error_N).abs().max() < 1e-5 * q_N.abs().max()


@pytest.mark.parametrize("name", ["spd 5", "spd 24", "svd", "rounded"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_components_add_up_to_the_masked_mlp_and_each_is_its_own(gpt, tokens, every, name, mask):
    """Against m.site, and against each component's matrix multiplied out."""
    m, (x_ND, w_ND), mlp = every[name], tokens, gpt.mlp(LAYER)
    g = m.encode(LAYER, x_ND.unsqueeze(0), mlp)[0].split(m.C, -1)
    chosen, rests = MASKS[mask](list(g))
    site = m.site(chosen, rests)
    z_NM = site(0, x_ND)
    h_NM = m.act(z_NM)
    found = shares(m, mlp, x_ND, w_ND, MASKS[mask])
    for s in found.values():
        total_N = s.piece_NF.sum(1) + s.rest_N + s.bias_N
        assert close(total_N, (site(1, h_NM) * w_ND).sum(1))

    # the masked W_out of each token, and z as a product
    pieces_out = [m.V[1][:, c, None] * m.U[1][c] for c in range(m.C)]
    for n in range(0, len(x_ND), 9):
        W_out = sum(chosen[1][n, c] * pieces_out[c] for c in range(m.C))
        W_out = W_out + float(rests[1].flatten()[0]) * (m.Ws[1] - m.V[1] @ m.U[1])
        gate_M = h_NM[n] / z_NM[n]
        for c in range(m.C):
            z_c = chosen[0][n, c] * (x_ND[n] @ (m.V[0][:, c, None] * m.U[0][c]))
            assert torch.isclose(found["in"].piece_NF[n, c], ((z_c * gate_M) @ W_out) @ w_ND[n], atol=1e-4, rtol=1e-4)
            y_c = chosen[1][n, c] * (h_NM[n] @ pieces_out[c])
            assert torch.isclose(found["out"].piece_NF[n, c], y_c @ w_ND[n], atol=1e-4, rtol=1e-4)
    assert torch.equal(found["out"].active_NF, g[1] > 0.1)


@pytest.mark.parametrize("name", NAMES[5:])
def test_shares_are_what_units_write(gpt, tokens, every, name):
    m, (x_ND, w_ND) = every[name], tokens
    f_1NF = m.encode(LAYER, x_ND.unsqueeze(0), gpt.mlp(LAYER))
    c_NFD = m.contrib(LAYER, f_1NF, x_ND.unsqueeze(0), torch.arange(f_1NF.shape[-1]))[0]
    found = shares(m, gpt.mlp(LAYER), x_ND, w_ND)["all"]
    assert close(found.piece_NF, (c_NFD * w_ND.unsqueeze(1)).sum(-1))
    assert torch.equal(found.active_NF, f_1NF[0] > 0)
    assert close(found.bias_N + found.piece_NF.sum(1), (m.decode(LAYER, f_1NF, x_ND.unsqueeze(0))[0] * w_ND).sum(1))


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new"])
def test_secant(name):
    act = model.ACTIVATIONS[name]
    z = torch.tensor([0., -0., 1e-38, -3., 2., -40., 50., 1e-8])
    s = attribution.secant(act, z)
    assert s[:3].tolist() == [0.5] * 3 and torch.equal(s[3:6], act(z[3:6]) / z[3:6]) and s.isfinite().all()
    assert torch.allclose(s * z, act(z), atol=1e-8)


@pytest.mark.parametrize("name", ["spd 5", "spd 24", "svd"])
def test_rotated_pieces_are_others_of_the_same_sum(every, name):
    m, gen = every[name], common.generator(1, "Q")
    r = rotated(m, gen)
    for i in range(2):
        assert close(r.V[i] @ r.U[i], m.V[i] @ m.U[i])
        assert matching.cosines(r.V[i].T, m.V[i].T).abs().max() < 0.999
    assert r.C == m.C and r.encode == m.encode and r.kind == "component"
    # as likely to turn one way as the other
    eye = SimpleNamespace(unit_directions=lambda: [("in", torch.eye(3), torch.eye(3), None)])
    diagonals = [rotated(eye, gen).V[0].diagonal() for _ in range(300)]
    assert torch.stack(diagonals).mean().abs() < 0.1


# ------------------------------------------------------------------------------ which are computed
def test_computed_share(readings):
    reading, units = readings[0], torch.tensor([0, 2, 5])
    units = attribution.frequent(*readings, EACH)[:3]
    shares_U = attribution.computed_share(reading, units, EACH)
    for u, share in zip(units, shares_U):
        own = reading.tokens(u.view(1), EACH)[0]
        q = np.mean([abs(reading.w_FD[u] @ reading.y_ND[t]) for t in own])
        other = np.mean([abs(reading.w_FD[u] @ reading.other_ND[t]) for t in own])
        assert share.item() == pytest.approx(q / (q + other), rel=1e-5)
    nothing = replace(reading, other_ND=0 * reading.other_ND)
    assert torch.equal(attribution.computed_share(nothing, units, EACH), torch.ones(3))


def test_copies_are_found_through_the_layernorm(gpt):
    """Features that go on in the stream, or through a second LayerNorm, are copies; random ones are none."""
    earlier = make_sae(gpt, "mlp_in", LAYER)
    gain_D, mean = gpt.h[LAYER].ln_2.weight, torch.full((D,), 1 / D)
    # directions of the stream that the MLP's LayerNorm shows as earlier features
    stream_FD = earlier.W_dec / gain_D + 5 * mean
    seen_FD = (stream_FD - stream_FD.mean(1, keepdim=True)) * gain_D
    later = make_sae(gpt, "resid", LAYER)
    later.W_dec.data = stream_FD
    earlier.W_dec.data = seen_FD
    write_FD = attribution.stream_directions(later, gpt)
    assert close(attribution.largest_cosine(write_FD, earlier, gpt), torch.ones(F))
    above = make_sae(gpt, "mlp_in", 2)
    above.W_dec.data = stream_FD * gpt.h[2].ln_2.weight
    assert close(attribution.stream_directions(above, gpt), stream_FD)
    null_F = attribution.largest_cosine(matching.redraw(normal(9, 200, D), common.generator(0, "null")), earlier, gpt)
    assert null_F.max() < 0.999 and null_F.mean() < 0.9
    share_U, cosine_U = torch.tensor([.9, .9, .4]), torch.tensor([.6, .8, .1])
    assert attribution.is_computed(share_U, cosine_U).tolist() == [True, False, False]


# -------------------------------------------------------------------------------- few pieces, R^2
def test_correlate_and_r2_against_numpy():
    X, q = normal(0, 3, 50, 4), normal(1, 3, 50)
    X_test, q_test = normal(2, 3, 50, 4), normal(3, 3, 50)
    q_test += X_test[..., 1]
    q += X[..., 1]
    r_UF, slope_UF = attribution.correlate(X, q.unsqueeze(-1).expand_as(X))
    found = attribution.r2(X, q, X_test, q_test)
    for u in range(3):
        assert [np.corrcoef(x, q[u])[0, 1] for x in X[u].T] == pytest.approx(r_UF[u].tolist(), abs=1e-5)
        assert [np.polyfit(x, q[u], 1)[0] for x in X[u].T] == pytest.approx(slope_UF[u].tolist(), abs=1e-5)
        A, B = (np.c_[a[u].double().numpy(), np.ones(50)] for a in (X, X_test))
        wrong = q_test[u].double().numpy() - B @ np.linalg.lstsq(A, q[u].double().numpy(), rcond=None)[0]
        assert found[u].item() == pytest.approx(1 - (wrong**2).sum() / (49 * q_test[u].var().item()), abs=1e-5)
    # constants, and pieces that are the same
    double = torch.cat([X[..., :1], X[..., :1], torch.ones(3, 50, 1)], -1)
    double_test = torch.cat([X_test[..., :1], X_test[..., :1], torch.ones(3, 50, 1)], -1)
    assert torch.allclose(attribution.r2(double, q, double_test, q_test),
                          attribution.r2(X[..., :1], q, X_test[..., :1], q_test), atol=1e-5)
    assert attribution.correlate(torch.ones(1, 9, 1), normal(4, 1, 9, 1))[0].item() == 0
    # of some of the entries
    weight = (normal(5, 1, 50, 1) > 0).float()
    r, _ = attribution.correlate(X[:1, :, :1], q[:1, :, None], weight)
    some = weight[0, :, 0] > 0
    assert r.item() == pytest.approx(np.corrcoef(X[0, some, 0], q[0, some])[0, 1], abs=1e-5)


def test_what_is_chosen():
    q_UJ = normal(0, 1, 50)
    piece_UJF = torch.stack([9 + 0.01 * normal(1, 1, 50), q_UJ + 0.1 * normal(2, 1, 50), -0.1 * q_UJ], -1)
    assert attribution.choose(piece_UJF, q_UJ, 2, "size").tolist() == [[0, 1]]
    assert attribution.choose(piece_UJF, q_UJ, 3, "spread").tolist() == [[1, 2, 0]]
    assert attribution.choose(piece_UJF, q_UJ, 2, "correlation").tolist() == [[2, 1]]


def test_pieces_one_after_the_other_are_those_of_least_squares():
    """Greedily, each choice by trying all: of pieces that are correlated, and cancel."""
    X, q = normal(0, 2, 60, 8), normal(1, 2, 60)
    X[..., 1] = X[..., 0] + 0.1 * normal(2, 2, 60)
    X[..., 2] = 3 + 0.2 * X[..., 5] + 0.02 * normal(3, 2, 60)
    q = q + 5 * (X[..., 0] - X[..., 1]) + X[..., 3]
    X[..., 7] = 0
    X[:, :attribution.FEW - 1, 7] = q[:, :attribution.FEW - 1] * 100        # on at too few tokens
    found = attribution.forward(X, q, 5)
    for u in range(2):
        chosen = []
        for _ in range(5):
            wrong = {}
            for f in {*range(7)} - {*chosen}:
                A = np.c_[X[u][:, [*chosen, f]].double().numpy(), np.ones(60)]
                wrong[f] = np.square(q[u].double().numpy() - A @ np.linalg.lstsq(A, q[u].double().numpy(), rcond=None)[0]).sum()
            chosen.append(min(wrong, key=wrong.get))
        assert found[u].tolist() == chosen
    for by in attribution.BY:
        assert 7 not in attribution.choose(X, q, 6, by)[0].tolist()


def test_shares_as_they_are_have_no_weights():
    X, q = normal(0, 2, 60, 3), normal(1, 2, 60)
    whole = X.sum(2)
    assert torch.allclose(attribution.r2_as_they_are(X, whole + 3, X, whole + 3), torch.ones(2), atol=1e-5)
    expected = 1 - ((q - whole - (q - whole).mean(1, keepdim=True))**2).sum(1) / (59 * q.var(1))
    assert torch.allclose(attribution.r2_as_they_are(X, q, X, q), expected, atol=1e-5)
    # twice as large as they should be, fitted they would be exact
    assert torch.allclose(attribution.r2_as_they_are(2 * X, whole, 2 * X, whole), torch.zeros(2), atol=1e-5)
    assert torch.allclose(attribution.r2(2 * X, whole, 2 * X, whole), torch.ones(2), atol=1e-5)


def test_how_many():
    size_UF = torch.tensor([[0., 10, 0, 0], [5, 1, 4, 0], [1, 1, 1, 1], [8.9, 0.2, 0.9, 0]])
    assert attribution.how_many(size_UF).tolist() == [1, 2, 4, 2]


def planted_spd(gpt, matrix, C=6):
    """A decomposition with the weights of an MLP of its own, and directions w of which component 0 of one matrix alone
    has a share: (gpt, spd, w (C, D)). Row c of w is component c's."""
    own = noisy_gpt(3, D, M, T, V)
    mlp = own.mlp(LAYER)
    m = make_spd(mlp, C)
    mlp.c_fc.bias.zero_(), mlp.c_proj.bias.zero_()
    Q_DD = torch.linalg.qr(normal(0, D, D))[0]
    for p in (*m.V, *m.U):
        p.data = normal(p.numel(), *p.shape)
    if matrix == "out":
        m.U[1].data = Q_DD[:C]
    else:
        # component c writes to neuron c alone, which writes along w_c alone
        m.U[0].data = torch.eye(C, M)
        m.V[1].data = torch.eye(M, C)
        m.U[1].data = Q_DD[:C]
    for conv, W in ((mlp.c_fc, m.V[0] @ m.U[0]), (mlp.c_proj, m.V[1] @ m.U[1])):
        conv.weight.copy_(W)
    return own, m, Q_DD[:C]


@pytest.fixture(scope="module", params=["in", "out"])
def planted(request, gpt, rows):
    """Later features that read what one component each writes, on at every token."""
    own, m, w_CD = planted_spd(gpt, request.param)
    later = make_sae(own, "resid", LAYER, F=len(w_CD), k=len(w_CD), variant="relu")
    later.scale.fill_(1)
    later.W_enc.data, later.b_enc.data = w_CD, torch.full((len(w_CD),), 300.)
    return request.param, own, m, [attribution.read_later(later, own, LAYER, r) for r in rows]


def test_a_feature_of_one_component_takes_one(planted):
    matrix, gpt, m, readings = planted
    units = attribution.frequent(*readings)
    assert units.tolist() == list(range(6))
    found = attribute(m, gpt, *readings, units, counts=(1, 2, 5), group=4)[matrix]
    assert (found["r2_1"] > 1 - 1e-5).all() and (found["n90"] == 1).all()
    assert found["chosen"][:, 0].tolist() == list(range(6))
    assert (found["rest_share"] < 1e-4).all()
    for rule, end in attribution.BY.items():
        by = attribute(m, gpt, *readings, units, counts=(1,), by=(rule,))[matrix]
        assert by[f"chosen{end}"][:, 0].tolist() == list(range(6)) and (by[f"r2_1{end}"] > 1 - 1e-5).all()
        assert (by[f"sum_1{end}"] > 1 - 1e-4).all() and (by["r2_all"] > 1 - 1e-5).all() and (by["still_on"] == 1).all()

    # random pieces of the same matrices need more
    null = attribute(rotated(m, common.generator(0, "Q")), gpt, *readings, units, counts=(1, 6))[matrix]
    assert null["r2_1"].mean() < 0.8 and null["r2_1"].max() < 0.99 and null["n90"].float().mean() > 2
    assert (null["r2_6"] > 0.99).all()                              # all of them are complete
    # features that read what another component writes
    wrong = [replace(r, w_FD=r.w_FD.roll(1, 0)) for r in readings]
    found = attribute(m, gpt, *wrong, units, counts=(1,))[matrix]
    assert found["chosen"][:, 0].tolist() == [5, 0, 1, 2, 3, 4]


def rebuilt(m, mlp, x_ND, choose_masks):
    """What the MLP writes by a decomposition, by the method's own forward."""
    g = m.encode(LAYER, x_ND[None], mlp)[0]
    if m.kind == "component":
        return m.site(*choose_masks(g.split(m.C, -1))).mlp(x_ND)
    return m.decode(LAYER, g[None], x_ND[None])[0]


def test_attribute_against_a_loop_over_features(gpt, readings, every):
    units, (fit, test) = attribution.frequent(*readings, EACH), readings
    for name, choose_masks in (("spd 24", masks.without_rest), ("spd 5", nothing_masked), ("transcoder", nothing_masked)):
        m = every[name]
        found = attribute(m, gpt, fit, test, units, choose_masks, counts=(1, 3), each=EACH, group=3)
        for matrix, numbers in found.items():
            for i in range(0, len(units), 4):
                own = [r.rows(units[i:i + 1], EACH) for r in readings]
                a, b = (shares(m, gpt.mlp(LAYER), r.x_ND, r.w_ND, choose_masks)[matrix] for r in own)
                best = a.piece_NF.abs().sum(0).argsort(descending=True)[:3]
                assert numbers["chosen"][i].tolist() == best.tolist()
                q = [(r.w_ND * r.y_ND).sum(1).double().numpy() for r in own]
                A, B = (np.c_[s.piece_NF[:, best].double().numpy(), np.ones(EACH)] for s in (a, b))
                wrong = q[1] - B @ np.linalg.lstsq(A, q[0], rcond=1e-8)[0]
                expected = 1 - (wrong**2).sum() / ((q[1] - q[1].mean())**2).sum()
                assert numbers["r2_3"][i].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
                active = (b.piece_NF * b.active_NF).sum(1).numpy()
                varying = q[1] - b.bias_N.numpy()
                expected = 1 - abs(varying - active).mean() / abs(varying).mean()
                assert numbers["active_share"][i].item() == pytest.approx(expected, abs=1e-4)
                assert numbers["rest_share"][i].item() == pytest.approx(
                    b.rest_N.abs().mean().item() / abs(q[1]).mean(), abs=1e-4)
                # what all pieces add up to, and what the feature says if the MLP writes that
                expected = 1 - b.error_N.var() / torch.tensor(q[1]).var()
                assert numbers["r2_all"][i].item() == pytest.approx(expected.item(), abs=1e-4)
                y_ND = rebuilt(m, gpt.mlp(LAYER), own[1].x_ND, choose_masks)
                before, after = (test.values(own[1].other_ND, y)[:, units[i]] for y in (own[1].y_ND, y_ND))
                assert numbers["still_on"][i].item() == pytest.approx((after > 0)[before > 0].float().mean().item())
                assert numbers["still_f"][i].item() == pytest.approx((after[before > 0].sum() / before.sum()).item(), abs=1e-4)


def test_masks_of_one_are_no_masks_and_looking_changes_nothing(gpt, readings, every):
    units = attribution.frequent(*readings, EACH)
    state = torch.get_rng_state()
    m = every["rotated"]
    off = attribute(m, gpt, *readings, units, each=EACH)["in"]
    on = attribute(m, gpt, *readings, units, masks.all_on, each=EACH)["in"]
    assert torch.equal(torch.get_rng_state(), state)
    assert off["chosen"].shape == (len(units), 10) and on["rest_share"].abs().max() == 0
    assert off["rest_share"].min() > 0.01 and torch.equal(off["r2_10"].isfinite(), torch.ones(len(units), dtype=bool))


def test_earlier_features_directly(gpt, readings):
    earlier = make_sae(gpt, "mlp_in", LAYER, F=F, k=8, seed=3)
    units = attribution.frequent(*readings, EACH)[:4]
    # y that is a sum of a few earlier features: one for each direction of the stream
    planted = []
    for r in readings:
        f_NF = earlier.encode(LAYER, r.x_ND.unsqueeze(0), gpt.mlp(LAYER))[0]
        planted.append(replace(r, y_ND=f_NF[:, :D]))
    planted = [replace(r, w_FD=torch.eye(F, D)) for r in planted]
    on_at = [r.rows(units, EACH) for r in planted]
    values = [(r.w_ND * r.y_ND).sum(1).view(4, -1) for r in on_at]
    live = [u for u in range(4) if all((q[u] != 0).sum() >= attribution.FEW and q[u].std() > 0 for q in values)]
    found = attribution.directly(earlier, gpt, *planted, units, counts=(1, 2), each=EACH)
    assert live
    for end in ("_by_r", "_forward"):
        assert (found[f"r2_1{end}"][live] > 1 - 1e-5).all() and found[f"chosen{end}"][live, 0].tolist() == units[live].tolist()


# --------------------------------------------------------------------------------------------- paths
@pytest.mark.parametrize("name, mask", [("spd 5", "off"), ("spd 5", "ci"), ("svd", "rounded"), ("rotated", "off")])
def test_paths_against_loops(gpt, tokens, every, name, mask):
    """Each path by itself, and with those of the error and of the bias their sum: the component's share."""
    m, (x_ND, w_ND), mlp = every[name], tokens, gpt.mlp(LAYER)
    x_ND, w_ND = x_ND[:5], w_ND[:5]
    earlier = make_sae(gpt, "mlp_in", LAYER, seed=5)
    f_NI = earlier.codes(x_ND)
    C = min(m.C, 6)
    found = attribution.paths(m, mlp, earlier, x_ND, w_ND, torch.arange(C), MASKS[mask])
    s = shares(m, mlp, x_ND, w_ND, MASKS[mask])["in"]
    V_DC = m.unit_directions()[0][1].T
    for n in range(5):
        for c in range(C):
            # what is worth a unit of the component's reading, by its share
            inner = x_ND[n] @ V_DC[:, c]
            slope = s.piece_NF[n, c] / inner
            for i in range(F):
                expected = f_NI[n, i] * (V_DC[:, c] @ earlier.W_dec[i] / earlier.scale) * slope
                assert torch.isclose(found[n, i, c], expected, rtol=1e-3, atol=1e-4)
            x_hat = earlier.rebuild(f_NI)[n]
            beside = (V_DC[:, c] @ (x_ND[n] - x_hat) + V_DC[:, c] @ earlier.b_dec / earlier.scale) * slope
            assert torch.isclose(found[n, :, c].sum() + beside, s.piece_NF[n, c], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, mask, tau", [("spd 5", "off", 0.3), ("spd 24", "ci", 0.3), ("spd 5", "rounded", 0.5)])
def test_path_completeness_against_a_loop(gpt, readings, every, name, mask, tau):
    m, mlp, test = every[name], gpt.mlp(LAYER), readings[1]
    earlier = make_sae(gpt, "mlp_in", LAYER, seed=5)
    units = attribution.frequent(*readings, EACH)[:3]
    found = attribution.path_completeness(m, gpt, earlier, test, units, MASKS[mask], tau, EACH, group=2)
    V_DC = m.V[0]
    for i, u in enumerate(units):
        rows = test.rows(u.view(1), EACH)
        P_NIC = attribution.paths(m, mlp, earlier, rows.x_ND, rows.w_ND, torch.arange(m.C), MASKS[mask])
        s = shares(m, mlp, rows.x_ND, rows.w_ND, MASKS[mask], tau)["in"]
        slope_NC = s.piece_NF / (rows.x_ND @ V_DC)
        x_hat_ND = earlier.rebuild(earlier.codes(rows.x_ND))
        top = bottom = 0
        for n in range(EACH):
            good = bad = remainder = 0
            for c in range(m.C):
                if s.active_NF[n, c]:
                    good += P_NIC[n, :, c].abs().sum().item()
                    bad += abs(slope_NC[n, c] * (V_DC[:, c] @ (rows.x_ND[n] - x_hat_ND[n]))).item()
                    bad += abs(slope_NC[n, c] * (V_DC[:, c] @ earlier.b_dec / earlier.scale)).item()
                else:
                    remainder += abs(s.piece_NF[n, c].item())
            bad += abs(s.bias_N[n].item()) + remainder + abs(s.rest_N[n].item()) + abs(s.error_N[n].item())
            q = abs(rows.w_ND[n] @ rows.y_ND[n]).item()
            top += q * good / (good + bad)
            bottom += q
        assert found[i].item() == pytest.approx(top / bottom, rel=1e-3)
        assert 0 < found[i] < 1


def test_complete_paths():
    """An earlier SAE that rebuilds x from features and a decomposition without biases: everything runs over paths."""
    gpt = noisy_gpt(3, D, M, T, V)
    mlp = gpt.mlp(LAYER)
    mlp.c_fc.bias.zero_(), mlp.c_proj.bias.zero_()
    earlier = make_sae(gpt, "mlp_in", LAYER, F=2 * D, k=D)
    earlier.W_enc.data = earlier.W_dec.data = torch.cat([torch.eye(D), -torch.eye(D)])
    for a in (earlier.b_enc, earlier.b_dec):
        a.data.zero_()
    rows = [torch.randint(V, (40, T), generator=common.generator(i, "rows")) for i in range(2)]
    fit, test = (attribution.read_later(make_sae(gpt, "resid", LAYER), gpt, LAYER, r) for r in rows)
    units = attribution.frequent(fit, test, EACH)
    found = attribution.path_completeness(baselines.SVD(LAYER, mlp, D), gpt, earlier, test, units, each=EACH)
    assert torch.allclose(found, torch.ones(len(units)), atol=1e-4)


def test_strongest_paths(gpt, readings, every):
    m, mlp, test = every["spd 24"], gpt.mlp(LAYER), readings[1]
    earlier = make_sae(gpt, "mlp_in", LAYER, seed=5)
    units = attribution.frequent(*readings, EACH)[:2]
    found = attribution.strongest_paths(m, gpt, earlier, test, units, 7, each=EACH)
    for i, u in enumerate(units):
        rows = test.rows(u.view(1), EACH)
        P_NIC = attribution.paths(m, mlp, earlier, rows.x_ND, rows.w_ND, torch.arange(m.C))
        size_IC = P_NIC.abs().mean(0)
        order = size_IC.flatten().argsort(descending=True)[:7]
        assert found.earlier_Un[i].tolist() == (order // m.C).tolist()
        assert found.component_Un[i].tolist() == (order % m.C).tolist()
        assert close(found.mean_Un[i], P_NIC.mean(0).flatten()[order], 1e-4)


# -------------------------------------------------------------------------------------------- causal
@pytest.mark.parametrize("name", ["spd 5", "spd 24", "svd", "rounded"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_without_a_component_is_its_mask_at_zero(gpt, tokens, every, name, mask):
    m, (x_ND, w_ND), mlp = every[name], tokens, gpt.mlp(LAYER)
    at = attribution.at_tokens(m, mlp, x_ND, MASKS[mask])
    row_P = torch.arange(0, len(x_ND), 3)
    piece_P = torch.arange(len(row_P)) % m.C
    g = [part[row_P] for part in m.encode(LAYER, x_ND.unsqueeze(0), mlp)[0].split(m.C, -1)]
    for i, matrix in enumerate(m.matrices):
        chosen, rests = MASKS[mask](g)
        chosen = [mask_PC.clone() for mask_PC in chosen]
        chosen[i][torch.arange(len(row_P)), piece_P] = 0
        assert close(at.without(matrix, row_P, piece_P), m.site(chosen, rests).mlp(x_ND[row_P]))


@pytest.mark.parametrize("name", NAMES[5:])
def test_without_a_unit_is_y_less_what_it_writes(gpt, tokens, every, name):
    m, (x_ND, _), mlp = every[name], tokens, gpt.mlp(LAYER)
    at = attribution.at_tokens(m, mlp, x_ND)
    f_1NF = m.encode(LAYER, x_ND.unsqueeze(0), mlp)
    row_P = torch.arange(0, len(x_ND), 3)
    piece_P = torch.arange(len(row_P)) % f_1NF.shape[-1]
    c_NFD = m.contrib(LAYER, f_1NF, x_ND.unsqueeze(0), torch.arange(f_1NF.shape[-1]))[0]
    assert close(at.without("all", row_P, piece_P), mlp(x_ND)[row_P] - c_NFD[row_P, piece_P])
    assert torch.equal(at.f_NF, f_1NF[0])


@pytest.mark.parametrize("mask", list(MASKS))
def test_a_linear_mlp_is_causal_exactly(rows, mask):
    """Without a nonlinearity, and with features that are always on, the change is -share."""
    gpt = noisy_gpt(3, D, M, T, V).double()
    mlp = gpt.mlp(LAYER)
    mlp.act = torch.clone
    later = make_sae(gpt, "resid", LAYER, F=6, k=6, variant="relu").double()
    later.scale.fill_(1), later.b_enc.data.fill_(500)
    fit, test = (attribution.read_later(later, gpt, LAYER, r) for r in rows)
    units = attribution.frequent(fit, test, EACH)
    assert len(units) == 6
    for m in (make_spd(mlp, 5).double(), make_spd(mlp, 24).double()):
        found = causal(m, gpt, test, units, common.generator(0, "pairs"), MASKS[mask], each=EACH, group=4)
        for numbers in found.values():
            for key, value_U in numbers.items():
                assert torch.allclose(value_U, torch.ones_like(value_U), atol=1e-6), key


@pytest.mark.parametrize("site", ["resid", "mlp_in"])
def test_causal_against_a_loop(gpt, rows, every, site):
    """A later SAE that competes and a real nonlinearity: each pair removed by itself, through m.site and, before the next
    MLP, through a LayerNorm that is not frozen."""
    m, mlp = every["spd 24"], gpt.mlp(LAYER)
    later = make_sae(gpt, site, LAYER + (site == "mlp_in"))
    norm = gpt.h[LAYER + 1].ln_2 if site == "mlp_in" else torch.clone
    readings = [attribution.read_later(later, gpt, LAYER, r) for r in rows]
    units = attribution.frequent(*readings, EACH)[:2]
    test = readings[1]
    found = causal(m, gpt, test, units, common.generator(0, "pairs"), masks.without_rest, each=EACH, pairs=8)
    gen = common.generator(0, "pairs")
    part = test.rows(units, EACH)
    of = shares(m, mlp, part.x_ND, part.w_ND, masks.without_rest)
    for i, matrix in enumerate(m.matrices):
        piece_UJF = of[matrix].piece_NF.view(2, EACH, -1)
        for places, prefix in zip(attribution.draw_pairs(piece_UJF, gen, 8), ("", "null_")):
            for u in range(2):
                change, share, change_p = [], [], []
                for place in places[u].tolist():
                    j, c = divmod(place, m.C)
                    x_1D, other_1D = part.x_ND[u * EACH + j][None], part.other_ND[u * EACH + j][None]
                    g = list(m.encode(LAYER, x_1D[None], mlp)[0].split(m.C, -1))
                    y_1D = m.site(*masks.without_rest(g)).mlp(x_1D)
                    g[i] = g[i].clone()
                    g[i][0, c] = 0
                    y_without_1D = m.site(*masks.without_rest(g)).mlp(x_1D)
                    before, after = (later.codes(norm(other_1D + y)) for y in (y_1D, y_without_1D))
                    change.append((after - before)[0, units[u]].item())
                    change_p.append((part.w_ND[u * EACH + j] @ (y_without_1D - y_1D)[0]).item())
                    share.append(piece_UJF[u, j, c].item())
                change, share = np.array(change), np.array(share)
                numbers = {key: value[u].item() for key, value in found[matrix].items()}
                if change.std():
                    assert numbers[prefix + "pearson"] == pytest.approx(np.corrcoef(change, -share)[0, 1], abs=1e-3)
                    assert numbers[prefix + "slope"] == pytest.approx(np.polyfit(-share, change, 1)[0], abs=1e-3)
                expected = np.corrcoef(change_p, -share)[0, 1]
                assert numbers[prefix + "pre_pearson"] == pytest.approx(expected, abs=1e-3)
                assert matrix == "in" or expected > 1 - 1e-5
                agree = (np.sign(change) == np.sign(-share)).mean()
                assert numbers[prefix + "sign_agreement"] == pytest.approx(agree, abs=1e-6)


def test_causal_of_other_kinds(gpt, rows, every):
    later = make_sae(gpt, "mlp_in", LAYER + 1)
    fit, test = (attribution.read_later(later, gpt, LAYER, r) for r in rows)
    units = attribution.frequent(fit, test, EACH)
    state = torch.get_rng_state()
    for name in ("neurons", "molt", "svd"):
        found = causal(every[name], gpt, test, units, common.generator(0, "pairs"), each=EACH)
        for matrix, numbers in found.items():
            assert 0 < numbers["sign_agreement"].min() and numbers["sign_agreement"].max() <= 1
            assert matrix == "in" or torch.allclose(numbers["pre_pearson"], torch.ones(len(units)), atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_pairs():
    piece_UJF = normal(0, 2, 30, 40)
    piece_UJF[0, :, 3:] = 0                                         # 90 pairs are there
    largest_UP, random_UP = attribution.draw_pairs(piece_UJF, common.generator(0, "pairs"), 8)
    size_UQ = piece_UJF.flatten(1).abs()
    assert len(set(random_UP[1].tolist())) == 8 and (size_UQ[0][random_UP[0]] > 0).all()
    # of feature 0 all pairs are drawn; of feature 1 160 are, and the largest are of the top 5 % more or less
    assert largest_UP[0].sort().values.tolist() == size_UQ[0].topk(8).indices.sort().values.tolist()
    top = size_UQ[1].quantile(0.88)
    assert (size_UQ[1][largest_UP[1]] > top).all() and size_UQ[1][random_UP[1]].min() < top
    # fewer pairs than asked for: what is missing does not count
    few_UJF = torch.zeros(1, 4, 5)
    few_UJF[0, 0, :3] = torch.tensor([1., 2., -1.])
    place_UP, _ = attribution.draw_pairs(few_UJF, common.generator(0, "pairs"), 6)
    share_UP = few_UJF.flatten(1).gather(1, place_UP)
    found = attribution.agreement(-2 * share_UP, share_UP)
    assert [found[key].item() for key in ("pearson", "slope", "sign_agreement")] == pytest.approx([1, 2, 1])
    assert attribution.agreement(0 * share_UP, share_UP)["sign_agreement"].item() == 0


# ------------------------------------------------------------------------------------------ headline
def test_compare():
    r2_U = torch.tensor([.9, .85, -3., .5])
    others = {"a": torch.tensor([.95, 0., 0., 0.]), "b": torch.tensor([.5, .5, .5, -9.])}
    found = attribution.compare(r2_U, others, torch.tensor([.9, .6, .9, .9]))
    assert found["r2"] == pytest.approx(2.25 / 4) and found["best"] == "b"
    assert found["delta"] == pytest.approx(2.25 / 4 - 1.5 / 4)
    assert found["wins"] == 0.5 and found["explained"] == 0.25
    assert attribution.compare(r2_U, others)["explained"] == 0.5
