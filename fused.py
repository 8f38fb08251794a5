"""Speed by algebra: autograd functions in plain PyTorch that compute a plain equation with less.

Each has its equation in its docstring and a naive twin in tests/test_fused.py. A reader of the
methods may ignore this file and take each function by its equation.

N positions (any leading shape), C components, D width of the residual stream, V vocabulary, F units
k units kept, H hits: the (position, unit) pairs that a top-k keeps
"""
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def _rows(t):
    """Any leading shape -> rows of one matrix."""
    return t.reshape(-1, t.shape[-1])


# ---------------------------------------------------------------------- masked rank-one components
def masked_lowrank(x, V, U, m, d, o, b) -> Tensor:
    """What does a matrix W make of x when its components V[:, c] U[c], and the rest W - V U, are
    masked?

        y = ((x V) * m) U + d * (x (W - V U)) + b,      o = x W
          = ((x V) * (m - d)) U + d * o + b

    x (.., d_in), V (d_in, C), U (C, d_out), m (.., C) or broadcast to it, d (.., 1), o (.., d_out),
    b (d_out). The rest costs no product of its own, and W - V U is never formed. m = d = 1 gives
    o + b exactly."""
    return _MaskedLowRank.apply(x, V, U, m, d, o, b)


class _MaskedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, V, U, m, d, o, b):
        h = x @ V                                           # (.., C) inner activations
        a = m - d
        y = ((h * a) @ U).addcmul_(d, o).add_(b)
        ctx.save_for_backward(x, V, U, h, a, d, o)          # h * a is cheaper to redo than to keep
        ctx.m_shape = m.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        """Each gradient that is asked for, and no product for one that is not."""
        x, V, U, h, a, d, o = ctx.saved_tensors
        need_x, need_V, need_U, need_m, need_d, need_o, need_b = ctx.needs_input_grad
        dx = dV = dU = dm = dd = None
        if need_U:
            dU = _rows(h * a).T @ _rows(dy)
        if need_x or need_V or need_m or need_d:
            ds = dy @ U.T                                   # of s = h * a
            # the masks: a = m - d, and d * o
            if need_m or need_d:
                dm = ds * h
            if need_d:
                dd = (dy * o).sum(-1, keepdim=True) - dm.sum(-1, keepdim=True)
                dd = dd.sum_to_size(d.shape)
            dm = dm.sum_to_size(ctx.m_shape) if need_m else None
            # h = x V; ds is not needed after this, so its memory is used again
            if need_x or need_V:
                dh = ds.mul_(a)
                dV = _rows(x).T @ _rows(dh) if need_V else None
                dx = dh @ V.T if need_x else None
        do = dy * d if need_o else None
        db = _rows(dy).sum(0) if need_b else None
        return dx, dV, dU, dm, dd, do, db


# ----------------------------------------------------------------------- KL without any logits
def log_partition(h, W, rows=512) -> tuple[Tensor, Tensor]:
    """How large is the normaliser of softmax(h W^T)? W (V, D) is frozen.

        lse = logsumexp(h W^T)                  one value per position
        mean = softmax(h W^T) W                 (.., D), which is also the gradient of lse by h

    Forward and backward at once in chunks of `rows`: the (N, V) logits are never stored. 512, as
    each product packs W anew; chunks of 128, which fit a core's cache, took 1.3 times as long."""
    return _LogPartition.apply(h, W, rows)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, rows):
        flat = _rows(h)
        lse = flat.new_empty(len(flat))
        mean = torch.empty_like(flat)
        for h_i, lse_i, mean_i in zip(flat.split(rows), lse.split(rows), mean.split(rows)):
            z = h_i @ W.T
            p = z.softmax(-1)
            # lse = z - log p, read off where p is largest
            torch.sub(z.amax(-1), p.amax(-1).log_(), out=lse_i)
            torch.mm(p, W, out=mean_i)
        mean = mean.view(h.shape)
        ctx.mean = mean
        ctx.mark_non_differentiable(mean)
        return lse.view(h.shape[:-1]), mean

    @staticmethod
    def backward(ctx, dlse, _):
        return ctx.mean * dlse.unsqueeze(-1), None, None


def kl_unembed(clean, h, W) -> Tensor:
    """How far are the predictions from h from those of a clean pass? One value per position, in
    nats:

        KL(p || q) = sum_v p_v (log p_v - log q_v),  p = softmax(h_clean W^T), q = softmax(h W^T)

    clean = (h_clean, lse, mean), where lse, mean = log_partition(h_clean, W) is computed once per
    batch. The KL is the Bregman divergence of logsumexp:

        KL = lse(h) - lse(h_clean) - (h - h_clean) . (W^T p)

    so the clean side costs (N, D), not (N, V), and the backward is softmax(h W^T) W - W^T p."""
    h_clean, lse_clean, mean_clean = clean
    lse, _ = log_partition(h, W)
    return lse - lse_clean - ((h - h_clean) * mean_clean).sum(-1)


# ------------------------------------------------------------------------------------- top-k
def topk(x, W_enc, b_enc, W_dec, k, batch=False, relu=True) -> tuple[Tensor, ...]:
    """What does a sparse autoencoder write when only its k largest units are on?

        f = the k largest of relu(x W_enc^T + b_enc) at each position, elsewhere 0
        y = f W_dec                                                 (N, D_out)

    Returns y, and f as its H = N k hits in the order of the positions: position, unit, value (H)
    each, so f.view(N, k). x (N, D), W_enc (F, D), W_dec (F, D_out).

    batch: the N k largest of the whole batch. Without relu values stay as they are, negative ones
    too. What is not kept costs no product but the encoder's, and the backward costs H, not N F."""
    if x.is_cuda:           # there dense products and torch.topk beat bags and sorting
        return _dense_topk(x, W_enc, b_enc, W_dec, k, batch, relu)
    return _TopK.apply(x, W_enc, b_enc, W_dec, k, batch, relu)


def _dense_topk(x, W_enc, b_enc, W_dec, k, batch, relu=True):
    """topk by dense products."""
    N = len(x)
    F = len(W_enc)
    pre = x @ W_enc.T + b_enc
    # hits as places in the flattened (N, F) matrix
    if batch:
        hits = pre.flatten().topk(N * k, sorted=False).indices
    else:
        first = torch.arange(N, device=x.device).unsqueeze(1) * F
        hits = pre.topk(k, sorted=False).indices + first
    hits = hits.flatten().sort().values
    token = hits // F
    unit = hits % F
    f = pre[token, unit]
    if relu:
        f = f.relu()
    f_NF = torch.zeros_like(pre).index_put((token, unit), f)
    return f_NF @ W_dec, token, unit, f


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, k, batch, relu):
        # the hits, in the order of the positions
        if batch:
            token, unit, f = select_batch(x, W_enc, b_enc, k)
        else:
            unit_Nk, f_Nk = select(x, W_enc, b_enc, k)
            unit = unit_Nk.flatten()
            f = f_Nk.flatten()
            token = torch.arange(len(x)).repeat_interleave(k)
        if relu:
            f = f.relu_()
        # the hits of a position are a bag of rows of W_dec
        ctx.relu = relu
        ctx.start = _starts(token, len(x))
        ctx.save_for_backward(x, W_enc, W_dec, token, unit, f)
        ctx.mark_non_differentiable(token, unit)
        return _bags(unit, W_dec, ctx.start, f), token, unit, f

    @staticmethod
    def backward(ctx, dy, _, __, df):
        x, W_enc, W_dec, token, unit, f = ctx.saved_tensors
        # each hit's share of df is dy[token] . W_dec[unit]: embedding_bag's own backward
        with torch.enable_grad():
            weight = torch.ones_like(f).requires_grad_()
            dots, = torch.autograd.grad(_bags(unit, W_dec, ctx.start, weight), weight, dy)
        dpre = dots + df
        if ctx.relu:
            dpre = dpre * (f > 0)
        # sorted once by unit, the hits of a unit are a bag: both gradients cost H, not N F
        order = unit.argsort(stable=True)
        start = _starts(unit, len(W_enc))
        dW_enc = _bags(token[order], x, start, dpre[order])
        dW_dec = _bags(token[order], dy, start, f[order])
        db_enc = dpre.new_zeros(len(W_enc)).index_add_(0, unit, dpre)
        dx = _bags(unit, W_enc, ctx.start, dpre) if ctx.needs_input_grad[0] else None
        return dx, dW_enc, db_enc, dW_dec, None, None, None


def _starts(bag, n):
    """Where does each of n bags begin among hits that are sorted by bag?"""
    count = torch.bincount(bag, minlength=n)
    return count.cumsum(0) - count


def _bags(row_H, W, start, weight_H):
    """The weighted sum of the rows of W in each bag, (bags, D)."""
    return embedding_bag(row_H, W, start, mode="sum", per_sample_weights=weight_H)


def select(x_ND, W_FD, b_F, k, rows=256) -> tuple[Tensor, Tensor]:
    """Which k units have the largest x W^T + b at each position? Units and values, (N, k) each in
    no order, without gradients.

    `rows` positions at a time share one buffer that stays in the cache: the (N, F) matrix is never
    in memory as a whole. F is cut into groups of S units. The k largest lie in the k groups of
    largest maxima, because a unit of any other group is no larger than k maxima. So a selection
    among F / S and one among k S do for one among F."""
    F = len(W_FD)
    S = max(s for s in range(1, math.isqrt(F // k) + 1) if F % s == 0)
    n_groups = F // S
    # group g holds the units g, g + F / S, g + 2 F / S, ..
    member_S1 = torch.arange(0, F, n_groups).view(-1, 1)
    buffer = x_ND.new_empty(min(rows, len(x_ND)), F)
    units = []
    values = []
    for x in x_ND.split(rows):
        # x W^T + b; addmm copies the bias first: slower
        pre = torch.mm(x, W_FD.T, out=buffer[:len(x)]).add_(b_F)
        if S == 1:
            unit = _largest(pre, k)
            value = pre.gather(1, unit)
        else:
            # stage 1: the k groups of largest maxima; stage 2: the k largest of their members
            group = _largest(pre.view(-1, S, n_groups).amax(1), k)
            candidate = (group.unsqueeze(1) + member_S1).flatten(1)
            pre = pre.gather(1, candidate)
            best = _largest(pre, k)
            unit = candidate.gather(1, best)
            value = pre.gather(1, best)
        units.append(unit)
        values.append(value)
    return torch.cat(units), torch.cat(values)


def _largest(z, k):
    """In which columns are the k largest of each row? (rows, k), in no order.

    numpy's partition and a comparison take a third of the time of its argpartition, which is left
    for ties, and a sixth of torch.topk's."""
    z = z.numpy()
    n = z.shape[1]
    smallest_kept = np.partition(z, n - k, 1)[:, n - k:n - k + 1]
    hits = np.flatnonzero(z >= smallest_kept)
    if len(hits) != len(z) * k:
        return torch.from_numpy(np.argpartition(z, n - k, 1)[:, n - k:])
    return torch.from_numpy(hits % n).view(len(z), k)


def select_batch(x_ND, W_FD, b_F, k) -> tuple[Tensor, Tensor, Tensor]:
    """Which N k of all (position, unit) pairs have the largest x W^T + b? Positions, units and
    values, (H) each, in the order of the positions.

    Candidates are the 4 k largest of each position. A position that has all of these kept may have
    more, so it then enters with every unit: nothing is missed."""
    N = len(x_ND)
    F = len(W_FD)
    c = min(4 * k, F)           # candidates of a position
    unit_Nc, pre_Nc = select(x_ND, W_FD, b_F, c)
    unit = unit_Nc.flatten()
    pre = pre_Nc.flatten()
    token = torch.arange(N).repeat_interleave(c)
    best = pre.topk(N * k, sorted=False).indices

    # positions that may have more
    full = torch.bincount(token[best], minlength=N) == c
    if c < F and full.any():
        part = ~full[token]
        rows = full.nonzero()
        token = torch.cat([token[part], rows.repeat_interleave(F)])
        unit = torch.cat([unit[part], torch.arange(F).repeat(len(rows))])
        pre = torch.cat([pre[part], (x_ND[full] @ W_FD.T + b_F).flatten()])
        best = pre.topk(N * k, sorted=False).indices

    best = best[token[best].argsort(stable=True)]
    return token[best], unit[best], pre[best]


# ---------------------------------------------------------------------------------- counting
def count(on_NF) -> Tensor:
    """At how many positions is each column of a boolean true? (F).

    on.sum(0), in bytes, 255 rows at a time: torch adds those twenty times as fast as it adds up
    booleans."""
    return sum(part.view(torch.uint8).sum(0, dtype=torch.uint8).int() for part in on_NF.split(255))


# --------------------------------------------------------------------------------- optimization
def orthogonalized(G, coefficients, steps, eps) -> Tensor:
    """Which orthogonal matrix is nearest to G = U S V^T? About U p(S / |S|) V^T, of the same shape,
    whose singular values are 0.7 to 1.2 where G's were not near 0. p is Newton and Schulz's step,

        x <- a x + b x^3 + c x^5,       (a, b, c) the coefficients,

    so many times, which takes products alone. torch computes it in bfloat16, for which CPUs with
    AVX-512 need half of float32's time, and those without, as in most laptops, 40 times as much:
    there a step of spd.py would take six times as long as with G's own precision, which it is
    here."""
    a, b, c = coefficients
    is_tall = len(G) > G.shape[1]
    X = G.T if is_tall else G                           # X X^T is the smaller product
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        # X <- a X + (b A + c A A) X,  A = X X^T
        A = X @ X.T
        P = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, P, X, beta=a)
    return X.T if is_tall else X


class Muon(torch.optim.Muon):
    """torch.optim.Muon without weight decay, by `orthogonalized`: it replaces the momentum of a
    matrix by the nearest orthogonal matrix, so that a step turns all directions alike
    (Jordan 2024)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.turn(p, group)

    def turn(self, p, group):
        """One step of one matrix."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = self.state[p]["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(momentum, group["momentum"])       # Nesterov's
        update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = p.shape
        p.add_(update, alpha=-group["lr"] * max(1, rows / columns)**0.5)
