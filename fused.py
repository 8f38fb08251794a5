"""The fused core: a few autograd functions in plain PyTorch, fused by algebra rather than by custom kernels. Each has a
naive twin in tests/test_fused.py; a reader of the methods may ignore this file and take each function by its equation.

N positions (any leading shape), C components, D width of the residual stream, V vocabulary.
"""
import torch
from torch import Tensor

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

def log_partition(h, W, rows=128) -> tuple[Tensor, Tensor]:
    """lse = logsumexp(h W^T) and mean = softmax(h W^T) W, which is also the gradient of lse by h. W (V, D) is frozen.

    Forward and backward at once in chunks of `rows` that stay in the cache: the (N, V) logits are never stored."""
    return _LogPartition.apply(h, W, rows)

def kl_unembed(clean, h, W) -> Tensor:
    """KL(softmax(h_clean W^T) || softmax(h W^T)) in nats, one value per position. clean = (h_clean, lse, mean), where
    lse, mean = log_partition(h_clean, W) is computed once per batch.

    With p = softmax(h_clean W^T) the KL is the Bregman divergence of logsumexp:
        sum_v p_v (log p_v - log q_v) = lse(h) - lse(h_clean) - (h - h_clean) . (W^T p),
    so the clean side costs (N, D) instead of (N, V) and the backward is softmax(h W^T) W - W^T p."""
    h_clean, lse_clean, mean_clean = clean
    return log_partition(h, W)[0] - lse_clean - ((h - h_clean) * mean_clean).sum(-1)
