"""The fused core: a few autograd functions in plain PyTorch, fused by algebra rather than by custom kernels. Each has a
naive twin in tests/test_fused.py; a reader of the methods may ignore this file and take each function by its equation.

N positions (any leading shape), C components, D width of the residual stream, V vocabulary, F units, H hits: the
(position, unit) pairs that a top-k keeps
"""
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

def _flat(t):
    return t.reshape(-1, t.shape[-1])

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
        x, V, U, h, a, d, o = ctx.saved_tensors
        need_x, need_V, need_U, need_m, need_d, need_o, need_b = ctx.needs_input_grad
        dx = dV = dU = dm = dd = do = db = None
        if need_U:
            dU = _flat(h * a).T @ _flat(dy)
        if need_x or need_V or need_m or need_d:
            ds = dy @ U.T
            if need_m or need_d:
                dm = ds * h
            if need_d:
                dd = ((dy * o).sum(-1, keepdim=True) - dm.sum(-1, keepdim=True)).sum_to_size(d.shape)
            dm = dm.sum_to_size(ctx.m_shape) if need_m else None
            if need_x or need_V:
                dh = ds.mul_(a)
                dV = _flat(x).T @ _flat(dh) if need_V else None
                dx = dh @ V.T if need_x else None
        if need_o:
            do = dy * d
        if need_b:
            db = _flat(dy).sum(0)
        return dx, dV, dU, dm, dd, do, db

def masked_lowrank(x, V, U, m, d, o, b) -> Tensor:
    """y = ((x V) * (m - d)) U + d * o + b, which is ((x V) * m) U + d * (x (W - V U)) + b when o = x W.

    x (.., d_in), V (d_in, C), U (C, d_out), m (.., C) or broadcast to it, d (.., 1), o (.., d_out), b (d_out).
    The delta component costs no product of its own and W - V U is never formed. m = d = 1 gives o + b exactly."""
    return _MaskedLowRank.apply(x, V, U, m, d, o, b)

class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, rows):
        flat = _flat(h)
        lse, mean = flat.new_empty(len(flat)), torch.empty_like(flat)
        for h_i, lse_i, mean_i in zip(flat.split(rows), lse.split(rows), mean.split(rows)):
            z = h_i @ W.T
            p = z.softmax(-1)
            torch.sub(z.amax(-1), p.amax(-1).log_(), out=lse_i)         # log of the largest p: its z - lse
            torch.mm(p, W, out=mean_i)
        ctx.mean = mean = mean.view(h.shape)
        ctx.mark_non_differentiable(mean)
        return lse.view(h.shape[:-1]), mean

    @staticmethod
    def backward(ctx, dlse, _):
        return ctx.mean * dlse.unsqueeze(-1), None, None

def log_partition(h, W, rows=512) -> tuple[Tensor, Tensor]:
    """lse = logsumexp(h W^T) and mean = softmax(h W^T) W, which is also the gradient of lse by h. W (V, D) is frozen.

    Forward and backward at once in chunks of `rows`: the (N, V) logits are never stored. 512, as each product packs W
    anew; chunks of 128, which fit a core's cache, took 1.3 times as long."""
    return _LogPartition.apply(h, W, rows)

def kl_unembed(clean, h, W) -> Tensor:
    """KL(softmax(h_clean W^T) || softmax(h W^T)) in nats, one value per position. clean = (h_clean, lse, mean), where
    lse, mean = log_partition(h_clean, W) is computed once per batch.

    With p = softmax(h_clean W^T) the KL is the Bregman divergence of logsumexp:
        sum_v p_v (log p_v - log q_v) = lse(h) - lse(h_clean) - (h - h_clean) . (W^T p),
    so the clean side costs (N, D) instead of (N, V) and the backward is softmax(h W^T) W - W^T p."""
    h_clean, lse_clean, mean_clean = clean
    return log_partition(h, W)[0] - lse_clean - ((h - h_clean) * mean_clean).sum(-1)

def select(x_ND, W_FD, b_F, k, rows=256) -> tuple[Tensor, Tensor]:
    """Units and values, (N, k) each in no order, of the k largest of x W^T + b at each position, without gradients.

    `rows` positions at a time in one buffer that stays in the cache: the (N, F) matrix is never in memory as a whole.
    Two stages: cut F into groups of S units; the k largest lie in the k groups of largest maxima, because a unit of any
    other group is no larger than k maxima. So a selection among F / S and one among k S do for one among F."""
    F = len(W_FD)
    S = max(s for s in range(1, math.isqrt(F // k) + 1) if F % s == 0)
    units, values, buffer = [], [], x_ND.new_empty(min(rows, len(x_ND)), F)
    first_S1 = torch.arange(0, F, F // S).view(-1, 1)
    for x in x_ND.split(rows):
        pre = torch.mm(x, W_FD.T, out=buffer[:len(x)]).add_(b_F)        # addmm copies the bias first: slower
        if S > 1:
            group = _largest(pre.view(-1, S, F // S).amax(1), k)
            among = (group.unsqueeze(1) + first_S1).flatten(1)
            pre = pre.gather(1, among)
        best = _largest(pre, k)
        values.append(pre.gather(1, best)), units.append(among.gather(1, best) if S > 1 else best)
    return torch.cat(units), torch.cat(values)

def _largest(z, k):
    """Columns of the k largest of each row. numpy's partition and a comparison take a third of the time of its
    argpartition, which is left for ties, and a sixth of torch.topk's."""
    z, n = z.numpy(), z.shape[1]
    hits = np.flatnonzero(z >= np.partition(z, n - k, 1)[:, n - k:n - k + 1])
    if len(hits) != len(z) * k:
        return torch.from_numpy(np.argpartition(z, n - k, 1)[:, n - k:])
    return torch.from_numpy(hits % n).view(len(z), k)

def select_batch(x_ND, W_FD, b_F, k) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, units and values (H) of the H = N k largest of x W^T + b in the whole batch. Candidates are the 4 k
    largest of each position; a position that has all of its own kept then enters with every unit. Nothing is missed."""
    N, F, c = len(x_ND), len(W_FD), min(4 * k, len(W_FD))
    unit, pre = (t.flatten() for t in select(x_ND, W_FD, b_F, c))
    token = torch.arange(N).repeat_interleave(c)
    best = pre.topk(N * k, sorted=False).indices
    full = torch.bincount(token[best], minlength=N) == c
    if c < F and full.any():
        part, rows = ~full[token], full.nonzero()
        token = torch.cat([token[part], rows.repeat_interleave(F)])
        unit = torch.cat([unit[part], torch.arange(F).repeat(len(rows))])
        pre = torch.cat([pre[part], (x_ND[full] @ W_FD.T + b_F).flatten()])
        best = pre.topk(N * k, sorted=False).indices
    best = best[token[best].argsort(stable=True)]
    return token[best], unit[best], pre[best]

class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, k, batch, relu):
        if batch:
            token, unit, f = select_batch(x, W_enc, b_enc, k)
        else:
            unit, f = (t.flatten() for t in select(x, W_enc, b_enc, k))
            token = torch.arange(len(x)).repeat_interleave(k)
        f = f.relu_() if relu else f
        ctx.relu, ctx.start = relu, _starts(token, len(x))
        ctx.save_for_backward(x, W_enc, W_dec, token, unit, f)
        ctx.mark_non_differentiable(token, unit)
        return _bags(unit, W_dec, ctx.start, f), token, unit, f

    @staticmethod
    def backward(ctx, dy, _, __, df):
        x, W_enc, W_dec, token, unit, f = ctx.saved_tensors
        with torch.enable_grad():           # each hit's share of df is dy[token] . W_dec[unit]: embedding_bag's own
            weight = torch.ones_like(f).requires_grad_()
            dots, = torch.autograd.grad(_bags(unit, W_dec, ctx.start, weight), weight, dy)
        dpre = (dots + df) * (f > 0) if ctx.relu else dots + df
        order = unit.argsort(stable=True)   # sorted once, the hits of a unit are a bag: both gradients cost H, not N F
        start, token_s = _starts(unit, len(W_enc)), token[order]
        dW_enc, dW_dec = _bags(token_s, x, start, dpre[order]), _bags(token_s, dy, start, f[order])
        dx = _bags(unit, W_enc, ctx.start, dpre) if ctx.needs_input_grad[0] else None
        return dx, dW_enc, dpre.new_zeros(len(W_enc)).index_add_(0, unit, dpre), dW_dec, None, None, None

def _starts(bag, n):    # where each of n bags begins among hits sorted by bag
    count = torch.bincount(bag, minlength=n)
    return count.cumsum(0) - count

def _bags(row_H, W, start, weight_H):   # (bags, D): the weighted sum of the rows of W in each bag
    return embedding_bag(row_H, W, start, mode="sum", per_sample_weights=weight_H)

def topk(x, W_enc, b_enc, W_dec, k, batch=False, relu=True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = f W_dec (N, D_out), and f as its H = N k hits, in the order of the positions: position, unit, value (H) each.

    f keeps the k largest of relu(x W_enc^T + b_enc) at each position (so f.view(N, k)); batch: the N k largest of the
    whole batch. x (N, D), W_enc (F, D), W_dec (F, D_out). What is not kept costs no product but the encoder's. Without
    relu values stay as they are, negative ones too."""
    if x.is_cuda:                           # there dense products and torch.topk beat bags and sorting
        return _dense_topk(x, W_enc, b_enc, W_dec, k, batch, relu)
    return _TopK.apply(x, W_enc, b_enc, W_dec, k, batch, relu)

def _dense_topk(x, W_enc, b_enc, W_dec, k, batch, relu=True):
    pre = x @ W_enc.T + b_enc
    hits = (pre.flatten() if batch else pre).topk(len(x) * k if batch else k, sorted=False).indices
    hits = hits if batch else hits + torch.arange(len(x), device=x.device).unsqueeze(1) * len(W_enc)
    hits = hits.flatten().sort().values
    token, unit = hits // len(W_enc), hits % len(W_enc)
    f = pre[token, unit].relu() if relu else pre[token, unit]
    return torch.zeros_like(pre).index_put((token, unit), f) @ W_dec, token, unit, f

def count(on_NF) -> Tensor:
    """At how many positions each column of a boolean is true (F). In bytes, 255 rows at a time: torch adds those twenty
    times as fast as it adds up booleans."""
    return sum(part.view(torch.uint8).sum(0, dtype=torch.uint8).int() for part in on_NF.split(255))
