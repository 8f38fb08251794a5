"""Each fused function against its naive twin: values and gradients, in float64."""
import pytest, torch
import torch.nn.functional as F
import fused

def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=rand.gen).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    rand.gen = torch.Generator().manual_seed(0)


def naive_masked_lowrank(x, V, U, m, d, o, b):
    y = d * o + b - d * (x @ V @ U)
    for c in range(V.shape[1]):
        y = y + m.expand(*x.shape[:-1], V.shape[1])[..., c, None] * (x @ torch.outer(V[:, c], U[c]))
    return y


def same(f, naive, *inputs):
    """Values and gradients of f and its twin agree, for a random cotangent."""
    out, twin = f(*inputs), naive(*inputs)
    assert torch.allclose(out, twin, atol=1e-5, rtol=0)
    cot = rand(*out.shape).detach()
    for got, want in zip(torch.autograd.grad(out, inputs, cot), torch.autograd.grad(twin, inputs, cot)):
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("m, d", [((2, 3, 6), (2, 3, 1)), ((6,), (1,)), ((1, 3, 6), (2, 1, 1))])
def test_masked_lowrank(m, d):
    inputs = rand(2, 3, 4), rand(4, 6), rand(6, 5), rand(*m), rand(*d), rand(2, 3, 5), rand(5)
    same(fused.masked_lowrank, naive_masked_lowrank, *inputs)
    assert torch.autograd.gradcheck(fused.masked_lowrank, inputs)


def test_masked_lowrank_computes_only_the_gradients_asked_for():
    full = [rand(2, 3, 4), rand(4, 6), rand(6, 5), rand(2, 3, 6), rand(2, 3, 1), rand(2, 3, 5), rand(5)]
    want = torch.autograd.grad(fused.masked_lowrank(*full).square().sum(), full)
    for i in range(len(full)):
        only = [t if j == i else t.detach() for j, t in enumerate(full)]
        got, = torch.autograd.grad(fused.masked_lowrank(*only).square().sum(), [only[i]])
        assert torch.allclose(got, want[i], atol=1e-10)


def test_masked_lowrank_with_every_mask_one_is_the_original_bitwise():
    x, V, U, W, b = (rand(*s).detach().float() for s in [(9, 4), (4, 6), (6, 5), (4, 5), (5,)])
    one, o = torch.ones(9, 6), x @ W
    assert torch.equal(fused.masked_lowrank(x, V, U, one, one[:, :1], o, b), o + b)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_log_partition(rows):
    h, W = rand(2, 5, 3), 3 * rand(11, 3).detach()
    same(lambda h: fused.log_partition(h, W, rows)[0], lambda h: (h @ W.T).logsumexp(-1), h)
    assert torch.allclose(fused.log_partition(h, W, rows)[1], (h @ W.T).softmax(-1) @ W)
    assert torch.autograd.gradcheck(lambda h: fused.log_partition(h, W, rows)[0], (h,))


def test_log_partition_of_huge_logits_is_finite():
    h = torch.tensor([[1e4, 0.]])
    assert fused.log_partition(h, torch.eye(2))[0].item() == 1e4


def naive_kl(h_clean, h, W):
    log_p, log_q = F.log_softmax(h_clean @ W.T, -1), F.log_softmax(h @ W.T, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_kl_unembed():
    h_clean, W = rand(2, 5, 3).detach(), rand(11, 3).detach()
    clean = h_clean, *fused.log_partition(h_clean, W)
    same(lambda h: fused.kl_unembed(clean, h, W), lambda h: naive_kl(h_clean, h, W), rand(2, 5, 3))
    many = rand(4, 2, 5, 3)             # four masks at once against the same clean side
    same(lambda h: fused.kl_unembed(clean, h, W), lambda h: naive_kl(h_clean, h, W), many)
    assert torch.autograd.gradcheck(lambda h: fused.kl_unembed(clean, h, W), (rand(2, 5, 3),))
    assert fused.kl_unembed(clean, h_clean, W).abs().max() < 1e-12


def naive_topk(x, W_enc, b_enc, W_dec, k, batch, relu):
    """Dense, with python's sorted as the selector: y, and f (N, F)."""
    pre = (x @ W_enc.T + b_enc).relu() if relu else x @ W_enc.T + b_enc
    rows = [pre.flatten()] if batch else pre
    largest = lambda row, n: sorted(range(len(row)), key=lambda i: -row[i].item())[:n]
    kept = torch.stack([torch.zeros_like(row).index_fill(0, torch.tensor(largest(row, k * len(x) // len(rows))), 1)
                        for row in rows])
    f = pre * kept.view_as(pre)
    return f @ W_dec, f


def put(shape, token, unit, f):
    """f (N, F) from its hits, each of which is there once."""
    assert len(set(zip(token.tolist(), unit.tolist()))) == len(f) and (token.diff() >= 0).all()
    return torch.zeros(shape, dtype=f.dtype).index_put((token, unit), f)


@pytest.mark.parametrize("batch, relu", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("N, F, k", [(5, 12, 1), (7, 24, 3), (300, 32, 2), (3, 13, 4), (4, 6, 6), (6, 64, 2)])
def test_topk_equals_sorted_values_and_gradients(N, F, k, batch, relu):
    inputs = rand(N, 4), rand(F, 4), rand(F), rand(F, 5)
    y, *hits = fused.topk(*inputs, k, batch, relu)
    twin, f_twin = naive_topk(*inputs, k, batch, relu)
    assert [len(t) for t in hits] == [N * k] * 3
    f_NF = put((N, F), *hits)
    assert torch.allclose(f_NF, f_twin) and torch.allclose(y, twin)
    cot, cot_f = rand(*y.shape).detach(), rand(N, F).detach()       # the codes take part in losses too
    got = torch.autograd.grad((y * cot).sum() + (f_NF * cot_f).sum(), inputs)
    want = torch.autograd.grad((twin * cot).sum() + (f_twin * cot_f).sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(got, want))
    y_dense, *hits = fused._dense_topk(*inputs, k, batch, relu)           # what a GPU gets
    assert torch.allclose(y_dense, y) and torch.allclose(put((N, F), *hits), f_NF)


def test_topk_of_ties_negatives_and_zeros():
    """Integers: many equal values, at the border too; whichever is kept, the values are those of torch.topk."""
    x = torch.randint(-2, 3, (200, 3), generator=rand.gen).double()
    W, b = torch.randint(-2, 3, (48, 3), generator=rand.gen).double(), torch.full((48,), -3.0).double()
    for k in (1, 5, 48):
        unit, value = fused.select(x, W, b, k)
        pre = x @ W.T + b
        assert torch.equal(value.sort(descending=True).values, pre.topk(k).values)
        assert torch.equal(pre.gather(1, unit), value) and (unit.sort().values.diff(dim=1) > 0).all()
        f = fused.topk(x, W, b, W, k)[3]
        assert f.min() == 0 and torch.equal(f.view(200, k).sum(1), pre.topk(k).values.relu().sum(1))


def test_batch_topk_where_one_position_takes_nearly_all():
    x, W, b = torch.ones(20, 1), torch.linspace(1, 2, 64).unsqueeze(1), torch.zeros(64)
    x[3] = 100                                              # its 64 units beat all others, more than 4 k candidates
    f = fused.topk(x, W, b, W, 3, batch=True)[3]
    assert torch.equal(f.sort().values, (x @ W.T).flatten().sort().values[-60:])


def test_topk_computes_only_the_gradients_asked_for():
    inputs = [rand(6, 4), rand(12, 4), rand(12), rand(12, 4)]
    want = torch.autograd.grad(fused.topk(*inputs, 3)[0].square().sum(), inputs)
    got = torch.autograd.grad(fused.topk(inputs[0].detach(), *inputs[1:], 3)[0].square().sum(), inputs[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, want[1:]))


def test_count_is_the_sum_of_booleans():
    for n in (1, 255, 256, 1000):
        on = torch.rand(n, 7, generator=torch.Generator().manual_seed(n)) < torch.tensor([0, .1, .3, .5, .9, 1, 1])
        assert torch.equal(fused.count(on), on.sum(0))


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (9, 4), (4, 9)])
def test_orthogonalized_takes_the_singular_values_near_one_and_keeps_the_vectors(shape):
    how = torch.optim.Muon([torch.zeros(1, 1)]).defaults
    a, b, c = how["ns_coefficients"]
    G = rand(*shape).detach()
    U, x, Vt = torch.linalg.svd(G, full_matrices=False)
    x = x / x.norm()
    for _ in range(how["ns_steps"]):
        x = a * x + b * x**3 + c * x**5
    got = fused.orthogonalized(G, (a, b, c), how["ns_steps"], how["eps"])
    assert torch.allclose(got, U * x @ Vt, atol=1e-9, rtol=0)
    assert (x > 0.6).all() and (x < 1.25).all()


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_muon_is_torchs_but_for_its_bfloat16(shape):
    start, target = rand(*shape).detach().float(), rand(*shape).detach().float()
    twins = []
    for kind in (fused.Muon, torch.optim.Muon):
        W = start.clone().requires_grad_()
        unused = torch.zeros(2, 2, requires_grad=True)          # has no gradient
        opt = kind([W, unused], lr=0.02, weight_decay=0)
        for _ in range(20):
            opt.zero_grad()
            (W - target).square().sum().backward()
            opt.step()
        twins.append((W.detach() - start, opt.state[W]["momentum_buffer"]))
        assert opt.state_dict().keys() == {"state", "param_groups"} and not unused.any()
    for ours, torchs in zip(*twins):
        assert (ours - torchs).norm() < 0.03 * torchs.norm()
