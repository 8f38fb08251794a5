"""How atomic the units of one decomposition are: one concept or several, one direction or several, one piece or many.

N tokens (position 0 of each row left out), F units, K concepts, D residual width. Costs: two cores, 50,000 tokens.
"""
import math

import torch
import torch.nn.functional as nnf

from evals import ALIVE, f1_scores
from metrics.recording import testable_concepts

def effective_rank(c_FJD):
    """(tr C)^2 / tr C^2 of each unit's uncentred covariance C of contributions, estimated from pairs of tokens: 1 for
    one direction, r for r equal ones; NaN where a unit is on at fewer than two tokens."""
    c = c_FJD.nan_to_num()
    square = c.square().sum(-1)
    pairs = square.sum(1)**2 - square.square().sum(1)           # over i != j: |c_i|^2 |c_j|^2 and (c_i . c_j)^2
    return pairs / ((c @ c.mT).square().sum((1, 2)) - square.square().sum(1))

def one_concept(fit, test, gain=0.03, enough=0.5, first=15):
    """Shares of the alive units that are
      atomic       one concept explains them: F1 >= enough, and neither of the next two gains `gain` over it
      polysemantic "c or c'" does better: they fire for two things
      composite    "c and c'" does better (if both do, the larger gain decides)
      unexplained  F1 of the best concept below enough
    Pairs among each unit's `first` best concepts; chosen on fit, scored on test. They sum to 1. 10 s."""
    keep, alive_F = testable_concepts(fit), fit.on() >= ALIVE

    def counts(a, best=None):       # of single concepts, and of "c and c'" for each unit's best: on, label, both
        label_NK = a.label_NK[:, keep].float()
        on_F, label_K, both_FK = a.on().float(), label_NK.sum(0), a.sums(label_NK)
        if best is None:
            best = f1_scores(on_F.unsqueeze(1), label_K, both_FK).topk(min(first, len(keep)), 1).indices
        pair_KK = label_NK.T @ label_NK
        mine_EB = label_NK[a.token_E.unsqueeze(1), best[a.unit_E]]
        group = torch.zeros(a.F, best.shape[1], best.shape[1], device=on_F.device)
        for b in range(best.shape[1]):
            group[:, b].index_add_(0, a.unit_E, mine_EB * mine_EB[:, b:b + 1])
        both_FBB, label_FBB = group, pair_KK[best.unsqueeze(2), best.unsqueeze(1)]
        single = group.diagonal(dim1=1, dim2=2)
        sizes = label_FBB.diagonal(dim1=1, dim2=2)
        on = on_F.view(-1, 1, 1)
        either = f1_scores(on, sizes.unsqueeze(1) + sizes.unsqueeze(2) - label_FBB,
                           single.unsqueeze(1) + single.unsqueeze(2) - both_FBB)
        return best, f1_scores(on.squeeze(1), sizes, single), either.flatten(1), f1_scores(on, label_FBB,
                                                                                           both_FBB).flatten(1)
    best, *on_fit = counts(fit)
    _, *on_test = counts(test, best)
    f1, either, both = (t.gather(1, v.argmax(1, keepdim=True)).squeeze(1)[alive_F] for v, t in zip(on_fit, on_test))
    P, K, known = either - f1, both - f1, f1 >= enough
    kinds = dict(atomic=known & (P < gain) & (K < gain), polysemantic=known & (P >= gain) & (P >= K),
                 composite=known & (K >= gain) & (K > P), unexplained=~known)
    return {name: is_.float().mean().item() for name, is_ in kinds.items()} | dict(f1=f1.mean().item())

def fragmentation(a, jaccard=0.8):
    """Size-weighted mean size of the clusters of alive units that are on at the same tokens (edges: Jaccard >= 0.8): 1
    is best, 50 says that mechanisms come in 50 pieces. 10 s."""
    on_F = a.on()
    n = (on_F >= ALIVE).sum().item()
    if not n:
        return math.nan
    new_F = (on_F >= ALIVE).cumsum(0) - 1
    here = on_F[a.unit_E] >= ALIVE
    both = torch.zeros(n, n, device=on_F.device)
    for tokens in range(0, a.N, 8192):
        some = here & (a.token_E >= tokens) & (a.token_E < tokens + 8192)
        on_NU = torch.zeros(8192, n, device=on_F.device)
        on_NU[a.token_E[some] - tokens, new_F[a.unit_E[some]]] = 1
        both += on_NU.T @ on_NU
    size = both.diagonal()
    near = both >= jaccard * (size.unsqueeze(0) + size.unsqueeze(1) - both)
    cluster, old = torch.arange(n, device=on_F.device), None
    while old is None or not torch.equal(cluster, old):         # each takes its neighbours' smallest name
        old, cluster = cluster, torch.where(near, cluster, n).amin(1)
    return torch.bincount(cluster).square().sum().item() / n

def meta_dictionary(write_FD, gen, width, k=4, steps=1000, lr=3e-3, seeds=3):
    """How far the units' write directions are sums of few common atoms (Leask et al. 2025, arXiv:2502.04878): VE of a
    BatchTopK SAE of `width` atoms, k a row, trained on these rows, in excess of the same on Gaussian rows of the same
    mean and covariance: (VE - VE_null) / (1 - VE_null), since at this size chance alone explains a third to a half.
    {"ve", "ve_null", "excess"}, lower excess is more atomic. `seeds` of both are one batch: 60 s for 1,024 rows."""
    rows, (n, D) = nnf.normalize(write_FD.double(), dim=1).float(), write_FD.shape
    root = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    draw = torch.randn(seeds, n, len(root.S), generator=gen).to(rows)
    draw = torch.linalg.qr(draw - draw.mean(1, keepdim=True)).Q * root.S @ root.Vh + rows.mean(0)     # same moments
    X = torch.cat([rows.expand(seeds, -1, -1), nnf.normalize(draw, dim=-1)])
    W_dec = nnf.normalize(torch.randn(2 * seeds, width, D, generator=gen).to(rows), dim=-1)
    params = [W_dec.mT.clone(), W_dec, X.mean(1, keepdim=True).clone(), torch.zeros(2 * seeds, 1, width).to(rows)]
    params = [p.requires_grad_() for p in params]
    opt = torch.optim.Adam(params, lr)

    def decode(W_enc, W_dec, b_dec, b_enc):
        f = ((X - b_dec) @ W_enc + b_enc).relu()
        least = f.detach().flatten(1).kthvalue(n * (width - k) + 1, 1).values
        return f * (f >= least.view(-1, 1, 1)) @ W_dec + b_dec
    with torch.enable_grad():
        for step in range(steps):
            opt.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / steps))
            opt.zero_grad()
            (X - decode(*params)).square().sum().div(n).backward()
            opt.step()
            with torch.no_grad():
                W_dec.div_(W_dec.norm(dim=-1, keepdim=True))
    with torch.no_grad():
        ve = 1 - (X - decode(*params)).square().sum((1, 2)) / (X - X.mean(1, keepdim=True)).square().sum((1, 2))
    ve, null = ve.view(2, seeds).mean(1).tolist()
    return dict(ve=ve, ve_null=null, excess=(ve - null) / (1 - null))
