"""Masks of a parameter decomposition (spd.py), whose m.site(masks, delta masks) computes the MLP's matrices under them.

R rows, B rows of a batch, T positions, D residual width, F units
"""
import torch
import torch.nn.functional as F

from evals import clean, scores

def mlp_under(site, x_BTD):
    """The MLP's output by its two matrices."""
    return site(1, F.gelu(site(0, x_BTD), approximate="tanh"))

def replacing(m, masks):
    """replace(layer, x, mlp) for the masks that masks(gs) makes of the causal importances of the matrices."""
    def replace(layer, x_BTD, mlp):
        if layer not in m.layers:
            return mlp(x_BTD)
        return mlp_under(m.site(*masks(m.encode(layer, x_BTD, mlp).split(m.C, -1))), x_BTD)
    return replace

def masks_from(gs, source):
    """m = g + (1 - g) r of each matrix, and the delta's masks; source = [r of each, r_delta of each]."""
    return [g + (1 - g) * r for g, r in zip(gs, source)], source[len(gs):]

def mask_table(m, taus, gen):
    """The masks it is judged by, as replace functions. The delta is off, but for the stochastic ones."""
    rand = lambda like: torch.rand(like.shape, generator=gen, device=like.device)
    drop = lambda masks: replacing(m, lambda gs: ([masks(g) for g in gs], gs[0].new_zeros(len(gs), 1)))
    return {"unmasked": drop(torch.ones_like), "causal importance": drop(lambda g: g),
            **{f"rounded {tau}": drop(lambda g, tau=tau: (g > tau).float()) for tau in taus},
            "stochastic": replacing(m, lambda gs: masks_from(gs, [*map(rand, gs), *(rand(g[..., :1]) for g in gs)])),
            "random": drop(rand)}

def attack(m, gpt, rows_RT, gen, budgets=(0, 5, 20, 40, 80, 160), size=0.1, shared=True):
    """{steps: KL}: the worst sources r found within so many sign steps from a random start (0 steps: its null), the
    delta's among them. shared: one source per component for all positions of all rows; else one at each position.
    "size" x steps and the scope are part of the number. One step on 32 rows takes 0.5 s."""
    layer, = m.layers
    with torch.no_grad():
        (x_BTD, r_BTD), mlp = gpt.prefix(rows_RT, layer), gpt.h[layer].mlp
        logp = F.log_softmax(gpt.suffix(r_BTD, mlp(x_BTD), layer)[:, 1:-1], -1)
        gs = m.encode(layer, x_BTD, mlp).split(m.C, -1)
    lead = () if shared else x_BTD.shape[:2]
    source = [torch.rand(*lead, g.shape[-1] if i < len(gs) else 1, generator=gen, device=g.device)
              for i, g in enumerate([*gs, *gs])]
    worst, out = -torch.inf, {}
    for step in range(max(budgets) + 1):
        source = [s.requires_grad_() for s in source]
        y_BTD = mlp_under(m.site(*masks_from(gs, source)), x_BTD)
        logq = F.log_softmax(gpt.suffix(r_BTD, y_BTD, layer)[:, 1:-1], -1)
        kl = (logp.exp() * (logp - logq)).sum(-1).mean()
        worst = max(worst, kl.item())
        if step in budgets:
            out[step] = worst
        grads = torch.autograd.grad(kl, source)
        source = [(s.detach() + size * grad.sign()).clamp_(0, 1) for s, grad in zip(source, grads)]
    return out

def aggregation(m, gpt, rows_RT, gen, ks=(1, 8, 64), tau=0.1):
    """{k: KL with the components that are on (g > tau) at k random other tokens of the batch forced on, less the KL of
    the causal importances}. Such masks are permitted: the rise is 0 if importances hold jointly. len(ks) + 1 passes."""
    def forced(k):
        def masks(gs):
            n = gs[0][..., 0].numel()
            pick = torch.randint(n, (n, k), generator=gen, device=gs[0].device)
            on = [(g.flatten(0, -2) > tau)[pick].any(1).view_as(g).float() for g in gs]
            return masks_from(gs, on + [gs[0].new_zeros(1)] * len(gs))
        return replacing(m, masks)
    table = scores(gpt, rows_RT, {k: forced(k) for k in (0, *ks)}, batch=4)
    return {k: table[k]["kl"] - table[0]["kl"] for k in ks}

@torch.no_grad()
def spectrum(m, gpt, layer, rows_RT, batch=16):
    """Mean of each unit's f over the tokens, (F)."""
    total = sum(clean(m, gpt, idx, layer)[1][:, 1:].sum((0, 1)) for idx in rows_RT.split(batch))
    return total / (len(rows_RT) * (rows_RT.shape[1] - 1))
