"""How faithfully a decomposition stands in for the MLPs: its errors, its completeness, its best units, its Jacobian.

R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual width, F units
"""
import torch
import torch.nn.functional as F

from evals import ablations, clean, mean_output, recovered, scores, scores_at, splice

def error_pathology(m, gpt, rows_RT, gen, draws=5):
    """KL of the spliced model over its KL when the errors point at random with the same size at each token (Gurnee
    2024): 1 = as harmless as noise, higher is worse; None without an error. Costs draws + 1 passes."""
    def random_error(layer, x_BTD, mlp):
        y_BTD = mlp(x_BTD)
        error, noise = splice(m)(layer, x_BTD, mlp) - y_BTD, torch.randn(y_BTD.shape, generator=gen).to(y_BTD)
        return y_BTD + noise * error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    table = scores(gpt, rows_RT, {"spliced": splice(m)} | {f"random {i}": random_error for i in range(draws)})
    noise = sum(row["kl"] for name, row in table.items() if name.startswith("random")) / draws
    return table["spliced"]["kl"] / noise if noise > 1e-9 else None

def completeness(m, gpt, rows_fit_RT, rows_RT):
    """1 - R_err, R_err = CE recovered by the errors alone, y_err = E_fit[y_hat] + (y - y_hat): 1 = what m leaves out
    is worth no more than the mean, 0 = m need not be there. Errors that do harm score 1 too: read it beside CE
    recovered. None where the MLP is worth too little. Three passes."""
    layer, = m.layers
    mean_D, n = 0, rows_fit_RT.shape[0] * (rows_fit_RT.shape[1] - 1)
    with torch.no_grad():
        for idx in rows_fit_RT.split(16):
            x_BTD, f_BTF = clean(m, gpt, idx, layer)
            mean_D = mean_D + m.decode(layer, f_BTF, x_BTD)[:, 1:].sum((0, 1)) / n
    def error_alone(l, x_BTD, mlp):
        y_hat_BTD = splice(m)(l, x_BTD, mlp)
        return mean_D + mlp(x_BTD) - y_hat_BTD if l == layer else y_hat_BTD
    r_err = recovered(scores(gpt, rows_RT, ablations(gpt, layer, rows_fit_RT) | {"err": error_alone}), "err")
    return None if r_err is None else 1 - min(1, max(0, r_err))

def attribution(m, gpt, idx_BT, layer):
    """x_BTD, f_BTF and a_BTF = f d(CE of the row) / d f through m.decode: to first order, what each unit is worth."""
    x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
    with torch.enable_grad():
        y_BTD, r_BTD = gpt.h[layer].mlp(x_BTD).requires_grad_(), gpt.prefix(idx_BT, layer)[1]
        logits = gpt.suffix(r_BTD, y_BTD, layer)[:, 1:-1]
        dy_BTD, = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), idx_BT[:, 2:].flatten(), reduction="sum"),
                                      y_BTD)
        f_BTF = f_BTF.detach().requires_grad_()
        df_BTF, = torch.autograd.grad((m.decode(layer, f_BTF, x_BTD) * dy_BTD).sum(), f_BTF)
    return x_BTD, f_BTF.detach(), (f_BTF * df_BTF).detach()

@torch.no_grad()
def top_k_faithfulness(m, gpt, rows_fit_RT, rows_RT, ks=(1, 2, 5, 10, 20)):
    """With C = the k units of each token that |attribution| puts first, of each matrix where units are components of
    two, since one matrix alone writes a constant (Marks et al. 2024, arXiv:2403.19647, mean ablation): faith(k) = CE
    recovered by C alone, without error; comp(k) = CE recovered by all but C, error kept: LOW means that C mattered.
    Means are restored from fit. {"faith": {k: ..}, "comp": {k: ..}, "faith_auc", "comp_auc"}, areas over log k.
    4 s + 1 s per k on 64 + 64 rows."""
    layer, = m.layers
    mlp, matrices = gpt.h[layer].mlp, max(1, len(m.matrices))
    def parts(idx):         # {name: what is written}, means not yet restored
        x_BTD, f_BTF, a_BTF = attribution(m, gpt, idx, layer)
        y_BTD, out, worth = mlp(x_BTD), {}, a_BTF.abs().unflatten(-1, (matrices, -1))
        for k in ks:
            kept = torch.zeros_like(worth).scatter_(-1, worth.topk(min(k, worth.shape[-1])).indices, 1.).flatten(-2)
            out["faith", k] = m.decode(layer, f_BTF * kept, x_BTD)
            out["comp", k] = y_BTD - m.decode(layer, f_BTF, x_BTD) + m.decode(layer, f_BTF * (1 - kept), x_BTD)
        return y_BTD, out
    shift, R = dict.fromkeys([(name, k) for name in ("faith", "comp") for k in ks], 0), len(rows_fit_RT)
    for idx in rows_fit_RT.split(8):
        y_BTD, out = parts(idx)
        shift = {key: v + (y_BTD - out[key])[:, 1:].mean((0, 1)) * len(idx) / R for key, v in shift.items()}
    empty_D = mean_output(gpt, layer, rows_fit_RT)
    found = scores_at(gpt, layer, rows_RT, lambda idx, x: {"none": empty_D.expand_as(x)} | {
        key: y + shift[key] for key, y in parts(idx)[1].items()}, batch=8)
    ce = {key: v[..., 0].mean().item() for key, v in found.items()}
    if ce["none"] - ce["original"] < 0.05:
        return None
    share = lambda key: (ce["none"] - ce[key]) / (ce["none"] - ce["original"])
    out = {name: {k: share((name, k)) for k in ks} for name in ("faith", "comp")}
    log_k = torch.tensor(ks, dtype=torch.float64).log()
    area = lambda curve: (torch.trapezoid(torch.tensor(list(curve.values())).double(), log_k)
                          / (log_k[-1] - log_k[0])).item()
    return out | {f"{name}_auc": area(curve) for name, curve in out.items()}

@torch.no_grad()
def benefits(m, gpt, layer, rows_RT, batch=4, chunk=16):
    """What each unit is worth at one layer on the clean inputs, (F): how much more squared error per token there is
    without it, E[|c|^2 + 2 c . (y - y_hat)] for its contribution c. Memory: chunk D floats a token of the batch."""
    total, every = 0, torch.arange(len(m.params_F), device=rows_RT.device)
    for idx in rows_RT.split(batch):
        x_BTD, f_BTF = clean(m, gpt, idx, layer)
        wrong_BTD = (gpt.h[layer].mlp(x_BTD) - m.decode(layer, f_BTF, x_BTD)).unsqueeze(-2)
        shares = (m.contrib(layer, f_BTF, x_BTD, units) for units in every.split(chunk))
        total = total + torch.cat([(c * (c + 2 * wrong_BTD))[:, 1:].sum((0, 1, 3)) for c in shares])
    return total / (len(rows_RT) * (rows_RT.shape[1] - 1))

def jacobian_cosine(m, gpt, layer, rows_RT):
    """How alike the Jacobians dy / dx of m and of the MLP are on the clean inputs: the mean over tokens of the cosine
    of the two as vectors, without the share jacobian_zero of the tokens where m's is zero; and the cosine over all
    tokens at once. Only for what reads x alone. Costs D backward passes; memory does not grow with them."""
    mlp, x_BTD = gpt.h[layer].mlp, clean(m, gpt, rows_RT, layer)[0]
    with torch.enable_grad():
        x_BTD.requires_grad_()
        ys = [y_BTD[:, 1:].unbind(-1) for y_BTD in (mlp(x_BTD), m.decode(layer, m.encode(layer, x_BTD, mlp), x_BTD))]
        dot = own = hat = 0         # per token: of the two Jacobians, of each with itself
        for y, y_hat in zip(*ys):
            J, J_hat = (torch.autograd.grad(v.sum(), x_BTD, retain_graph=True)[0][:, 1:] for v in (y, y_hat))
            dot, own, hat = dot + (J * J_hat).sum(-1), own + (J * J).sum(-1), hat + (J_hat * J_hat).sum(-1)
    some = hat > 0
    return dict(jacobian_cosine=(dot / (own * hat).sqrt())[some].mean().item(),
                jacobian_cosine_pooled=(dot.sum() / (own.sum() * hat.sum()).sqrt()).item(),
                jacobian_zero=1 - some.float().mean().item())
