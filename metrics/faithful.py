"""Is what a decomposition leaves out harmless, and do few of its units do the MLP's work?

Recovering the cross-entropy is not enough: errors can do more harm than noise, what is left out can
hold a second copy of what is explained, and the work can be spread over all units. Each function
here asks one of these questions.

    y = y_hat + error           y the MLP's output, y_hat = m.decode(f) what the units write

R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual width, F units, U
some of the units
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from evals import (LEAST_COST, ablations, clean, clean_with_stream, mean_output, recovered, scores,
                   scores_at, splice)
from metrics import columns
from metrics.columns import Column
from model import split_rows


# ----------------------------------------------------------------------------- what is left out
@dataclass
class RandomError:
    """The MLP with errors as large as m's at each token, but pointing anywhere, as GPT.forward
    takes it."""
    m: Any
    gen: torch.Generator

    def __call__(self, layer, x_BTD, mlp):
        y_BTD = mlp(x_BTD)
        error_BTD = splice(self.m)(layer, x_BTD, mlp) - y_BTD
        # drawn at every layer; where m does not stand in, the error is 0 and so is its noise
        noise_BTD = torch.randn(y_BTD.shape, generator=self.gen).to(y_BTD)
        size_BT1 = error_BTD.norm(dim=-1, keepdim=True)
        return y_BTD + noise_BTD * size_BT1 / noise_BTD.norm(dim=-1, keepdim=True)


def error_pathology(m, gpt, rows_RT, gen, draws=5):
    """Do m's errors do more harm than noise of their size?

    KL(original || spliced) over KL(original || MLP with errors that point at random, of equal size
    at each token): 1 = as harmless as noise, higher is worse (Gurnee 2024, "SAE reconstruction
    errors are (empirically) pathological"). None without an error. Costs draws + 1 passes."""
    replaces = {"spliced": splice(m)}
    for i in range(draws):
        replaces[f"random {i}"] = RandomError(m, gen)
    table = scores(gpt, rows_RT, replaces)
    noise = sum(table[f"random {i}"]["kl"] for i in range(draws)) / draws
    return table["spliced"]["kl"] / noise if noise > 1e-9 else None


@torch.no_grad()
def mean_of_decode(m, gpt, layer, rows_RT, batch=16):
    """What do m's units write on average? E[y_hat] on clean inputs, (D)."""
    R, T = rows_RT.shape
    n = R * (T - 1)
    mean_D = 0
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        y_hat_BTD = m.decode(layer, f_BTF, x_BTD)
        mean_D = mean_D + y_hat_BTD[:, 1:].sum((0, 1)) / n
    return mean_D


@dataclass
class ErrorAlone:
    """What m leaves out in the place of its MLP, and a constant for what m explains: y_err =
    E[y_hat] + (y - y_hat)."""
    m: Any
    layer: int
    mean_D: torch.Tensor

    def __call__(self, layer, x_BTD, mlp):
        y_hat_BTD = splice(self.m)(layer, x_BTD, mlp)
        if layer != self.layer:
            return y_hat_BTD
        return self.mean_D + mlp(x_BTD) - y_hat_BTD


def completeness(m, gpt, rows_fit_RT, rows_RT):
    """Is what m leaves out worth nothing?

    1 - R, R = CE recovered by the errors alone, clamped to [0, 1]: 1 = what m leaves out is worth
    no more than the mean, 0 = m need not be there. Errors that do harm score 1 too: read it beside
    CE recovered. The complement of all units in the sense of Marks et al. 2024 (arXiv:2403.19647),
    whose completeness is good when low. None where the MLP is worth too little. Three passes."""
    layer, = m.layers
    mean_D = mean_of_decode(m, gpt, layer, rows_fit_RT)
    replaces = ablations(gpt, layer, rows_fit_RT) | {"error": ErrorAlone(m, layer, mean_D)}
    by_error = recovered(scores(gpt, rows_RT, replaces), "error")
    return None if by_error is None else 1 - min(1, max(0, by_error))


# ---------------------------------------------------------------- the units that matter at a token
def attribution(m, gpt, idx_BT, layer):
    """What is each unit worth at each token, to first order?

    a = f d(CE summed over the row) / d f, through m.decode alone. Returns x_BTD, f_BTF and
    a_BTF."""
    x_BTD, stream_BTD, f_BTF = clean_with_stream(m, gpt, idx_BT, layer)
    with torch.enable_grad():
        # how the cross-entropy changes with the MLP's own output ..
        y_BTD = gpt.mlp(layer)(x_BTD).requires_grad_()
        logits_BSV = gpt.suffix(stream_BTD, y_BTD, layer)[:, 1:-1]
        next_BS = idx_BT[:, 2:]
        ce = F.cross_entropy(logits_BSV.flatten(0, 1), next_BS.flatten(), reduction="sum")
        dy_BTD, = torch.autograd.grad(ce, y_BTD)

        # .. and what is written with each unit
        f_BTF = f_BTF.detach().requires_grad_()
        slope = (m.decode(layer, f_BTF, x_BTD) * dy_BTD).sum()
        df_BTF, = torch.autograd.grad(slope, f_BTF)
    return x_BTD, f_BTF.detach(), (f_BTF * df_BTF).detach()


@dataclass
class TopUnits:
    """What the k units that matter most at each token write, and what is written without them."""
    m: Any
    gpt: Any
    ks: tuple
    shift: dict             # (name, k) -> (D), added to what is written; see means_missing

    def unshifted(self, idx_BT):
        """The MLP's output y_BTD, and {(name, k): y_BTD} without the shift."""
        layer, = self.m.layers
        x_BTD, f_BTF, a_BTF = attribution(self.m, self.gpt, idx_BT, layer)
        y_BTD = self.gpt.mlp(layer)(x_BTD)
        error_BTD = y_BTD - self.m.decode(layer, f_BTF, x_BTD)

        # k units of each matrix, where units are components of two: one matrix alone writes a
        # constant
        n_groups = max(1, len(self.m.matrices))
        worth_BTGU = a_BTF.abs().unflatten(-1, (n_groups, -1))
        written = {}
        for k in self.ks:
            top_BTGk = worth_BTGU.topk(min(k, worth_BTGU.shape[-1])).indices
            is_top_BTF = torch.zeros_like(worth_BTGU).scatter_(-1, top_BTGk, 1.).flatten(-2)
            without_BTD = self.m.decode(layer, f_BTF * (1 - is_top_BTF), x_BTD)
            written["faith", k] = self.m.decode(layer, f_BTF * is_top_BTF, x_BTD)
            written["comp", k] = error_BTD + without_BTD
        return y_BTD, written

    def __call__(self, idx_BT, x_BTD):
        """{(name, k): y_BTD}, as scores_at asks for it."""
        _, written = self.unshifted(idx_BT)
        return {key: y_BTD + self.shift[key] for key, y_BTD in written.items()}


def means_missing(top, rows_RT, batch=8):
    """How far is the mean of what TopUnits writes from the mean of the MLP's output? {(name, k):
    (D)}."""
    shift = {}
    for idx_BT in split_rows(rows_RT, batch):
        y_BTD, written = top.unshifted(idx_BT)
        for key, y_hat_BTD in written.items():
            mean_D = (y_BTD - y_hat_BTD)[:, 1:].mean((0, 1))
            shift[key] = shift.get(key, 0) + mean_D * len(idx_BT) / len(rows_RT)
    return shift


def area_over_log(curve):
    """Average a curve {k: value} over log k, by trapezoids."""
    log_k = torch.tensor(list(curve), dtype=torch.float64).log()
    values = torch.tensor(list(curve.values())).double()
    return (torch.trapezoid(values, log_k) / (log_k[-1] - log_k[0])).item()


@torch.no_grad()
def top_k_faithfulness(m, gpt, rows_fit_RT, rows_RT, ks=(1, 2, 5, 10, 20)):
    """Do few units do the work at each token, and does it fail without them?

    The circuit of a token: the k units that |attribution| puts first, of each matrix where units
    are components of two (Marks et al. 2024, arXiv:2403.19647, with mean ablation).
    faith(k) = CE recovered by the circuit alone, without error: 1 = it does all, higher is better
    comp(k) = CE recovered by all but the circuit, error kept: LOW means that the circuit mattered
    The mean of what is written is restored to the MLP's own mean on fit in both.

    Returns {"faith": {k: ..}, "comp": {k: ..}, "faith_auc", "comp_auc"}, areas over log k; None
    where the MLP is worth too little. 4 s + 1 s per k on 64 + 64 rows."""
    layer, = m.layers
    top = TopUnits(m, gpt, ks, shift={})
    top.shift = means_missing(top, rows_fit_RT)

    # the floor, an empty circuit: the mean of the MLP's output
    empty_D = mean_output(gpt, layer, rows_fit_RT)

    def outputs(idx_BT, x_BTD):
        return {"none": empty_D.expand_as(x_BTD)} | top(idx_BT, x_BTD)
    by_position = scores_at(gpt, layer, rows_RT, outputs, batch=8)
    ce = {key: both[..., 0].mean().item() for key, both in by_position.items()}
    cost = ce["none"] - ce["original"]
    if cost < LEAST_COST:
        return None

    found = {}
    for name in ("faith", "comp"):
        curve = {k: (ce["none"] - ce[name, k]) / cost for k in ks}
        found[name] = curve
        found[f"{name}_auc"] = area_over_log(curve)
    return found


# --------------------------------------------------------------------- what m does on clean inputs
@torch.no_grad()
def benefits(m, gpt, layer, rows_RT, batch=4, chunk=16):
    """How much worse would m rebuild the MLP's output without each unit? (F)

    E[|y - y_hat + c|^2 - |y - y_hat|^2] = E[|c|^2 + 2 c . (y - y_hat)] for its contribution c, per
    token on clean inputs: below 0 = the unit does harm. Memory: chunk D floats a token of the
    batch."""
    total_F = 0
    all_units = torch.arange(len(m.params_F), device=rows_RT.device)
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        error_BTD = gpt.mlp(layer)(x_BTD) - m.decode(layer, f_BTF, x_BTD)
        error_BT1D = error_BTD.unsqueeze(-2)
        parts = []
        for units in all_units.split(chunk):
            c_BTUD = m.contrib(layer, f_BTF, x_BTD, units)
            more_BTUD = c_BTUD * (c_BTUD + 2 * error_BT1D)
            parts.append(more_BTUD[:, 1:].sum((0, 1, 3)))
        total_F = total_F + torch.cat(parts)
    R, T = rows_RT.shape
    return total_F / (R * (T - 1))


def jacobian_cosine(m, gpt, layer, rows_RT):
    """Does m respond to small changes of its input as the MLP does?

    jacobian_cosine         mean over tokens of the cosine of dy/dx of m and of the MLP, as vectors;
                            tokens where m's is zero are left out: 1 = alike, higher is better
    jacobian_cosine_pooled  the cosine over all tokens at once
    jacobian_zero           share of the tokens that were left out

    Clean inputs, only for what reads x alone (Lindsey et al. 2025, "Sparse mixtures of linear
    transforms"). Costs D backward passes; memory does not grow with them."""
    mlp = gpt.mlp(layer)
    x_BTD, _ = clean(m, gpt, rows_RT, layer)
    with torch.enable_grad():
        x_BTD.requires_grad_()
        y_BTD = mlp(x_BTD)
        y_hat_BTD = m.decode(layer, m.encode(layer, x_BTD, mlp), x_BTD)

        # added up over the rows of the Jacobians, for each token: their product, and their squares
        dot_BT = 0
        square_BT = 0
        square_hat_BT = 0
        for y_BT, y_hat_BT in zip(y_BTD[:, 1:].unbind(-1), y_hat_BTD[:, 1:].unbind(-1)):
            J_BTD = jacobian_row(y_BT, x_BTD)
            J_hat_BTD = jacobian_row(y_hat_BT, x_BTD)
            dot_BT = dot_BT + (J_BTD * J_hat_BTD).sum(-1)
            square_BT = square_BT + (J_BTD * J_BTD).sum(-1)
            square_hat_BT = square_hat_BT + (J_hat_BTD * J_hat_BTD).sum(-1)

    is_there_BT = square_hat_BT > 0
    cosine_BT = dot_BT / (square_BT * square_hat_BT).sqrt()
    pooled = dot_BT.sum() / (square_BT.sum() * square_hat_BT.sum()).sqrt()
    return dict(jacobian_cosine=cosine_BT[is_there_BT].mean().item(),
                jacobian_cosine_pooled=pooled.item(),
                jacobian_zero=1 - is_there_BT.float().mean().item())


def jacobian_row(y_BT, x_BTD):
    """d y / d x of one coordinate of the output at each token but the first of a row. Tokens do not
    mix, so that one backward pass of the sum gives all of them."""
    grad_BTD, = torch.autograd.grad(y_BT.sum(), x_BTD, retain_graph=True)
    return grad_BTD[:, 1:]


# --------------------------------------------------------------------------------- in the table
COLUMNS = {
    "completeness": Column(
        "complete", "up", beat=0, digits=3, table="faithful",
        text="1 - CE recovered by what is left out alone; read beside CE rec"),
    "error_pathology": Column(
        "err path", "down", beat=1, digits=2, table="faithful",
        text="KL over the KL of random errors of equal size at each token"),
    "faith_auc": Column(
        "faith k", "up", beat="random", digits=3, table="faithful",
        text="CE recovered by the 1 to 20 units (spd, svd: of each matrix) that matter most at "
             "each token, area over log k"),
    "comp_auc": Column(
        "all but k", "down", beat="random", digits=3, table="faithful",
        text="CE recovered by all but the 1 to 20 units that matter most at each token, errors "
             "kept, area over log k"),
}


def measure(m, arena, gen):
    """Is what m leaves out harmless, and do few units do the work? (numbers, details), as
    metrics/columns.py says."""
    fit_RT, _ = arena.fit
    test_RT, _ = arena.test
    # 64 rows are enough for the circuits, which take many passes
    found = top_k_faithfulness(m, arena.gpt, fit_RT[:64], test_RT[:64]) or {}
    found["completeness"] = completeness(m, arena.gpt, fit_RT, test_RT)
    found["error_pathology"] = error_pathology(m, arena.gpt, test_RT, gen)
    return columns.split(COLUMNS, found)
