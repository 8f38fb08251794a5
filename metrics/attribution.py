"""Are features of a later SAE explained by what an MLP's units make of earlier SAE features?

A later feature reads the stream, and the stream holds what the MLP wrote. So the MLP's part of the
feature's pre-activation is a sum over units, exactly. Any complete decomposition has such a sum.
What tells decompositions apart is how few of its terms suffice, and whether removing a unit really
moves the feature as its term says.

    p = scale w . (other + y) + b       pre-activation of a later feature
    q = scale w . y                     the MLP's part of it; y is the MLP's output
    q = sum of shares + rest + bias + error

    one of few directions or maps       share = w . (what the unit writes)
    component c of W_in                 share = mask (V_c . x) (back s) . U_c
    component c of W_out                share = mask (V_c . h) w . U_c
    z = x W_in + b_in,  h = act(z),  s = act(z) / z,  back = W_out w        all under the masks

s is the slope of the chord from 0 to z, the secant. With it the nonlinearity is a product, h = s z,
and no gradient: shares add up. Each matrix of an SPD adds up to q by itself, so that W_in's and
W_out's components are two answers, never to be added. A component's share splits once more, over
the earlier features that it reads:

    V_c . x = sum_i f_i (V_c . d_i) + V_c . (x - x_hat) + V_c . b_dec           W_in's components
    path i -> c -> k = f_i (V_c . d_i) mask (back s) . U_c

The order of a study:

    fit, test = (read_later(later, gpt, layer, rows_RT) for rows_RT in (fit_RT, test_RT))
    units = frequent(fit, test)                         later features with enough tokens
    computed_share, largest_cosine, is_computed         which of them the MLP computes
    attribute                                           R^2 of few pieces, active share, n90
    directly                                            R^2 of earlier features, with no transform
    path_completeness, strongest_paths                  over which earlier features
    causal                                              does removing a unit do what its share says?
    compare                                             SPD less its best competitor
    rotated                                             the null: W by random rank-one pieces

Where a later SAE reads (sae.py --site), for the MLP of layer l:
    resid at layer l        the stream after the MLP, no LayerNorm between: p is exact as it stands
    resid above l           y is in it by the direct path; what later blocks make of y is in other
    mlp_in above l          through a LayerNorm, whose scale is that of the clean run, frozen
    mlp_out at layer l      y alone: other is 0
Elsewhere a feature does not read y, or not linearly.

D residual width, M MLP hidden width, N tokens, F pieces: units of a decomposition or components of
one matrix, or later features; C components of a matrix, U some of the later features, J tokens of
each, P pairs of a piece and a token, I earlier features, R rows of tokens, n chosen pieces. Costs
are for one core, 500 later features, 200 tokens of each and 1,024 components of each matrix; memory
is that of `group` features: 16 of them take 200 MB.
"""
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf

import common
from evals import reads
from metrics.columns import Column
from metrics.matching import cosines
from metrics.recording import Active
from metrics.stability import record_units
from model import split_rows

EACH = 200              # tokens of a later feature that are looked at; it is on at as many or more
COUNTS = 1, 5, 10       # numbers of pieces that q is rebuilt from
TAU = 0.1               # a component is active where its importance is above it
GROUP = 16              # later features at a time
PAIRS = 64              # of a piece and a token that the causal check removes, for each feature
OF_ALL = 20             # they are the largest of so many times as many: the top 5 %
FEW = 5                 # what is on at fewer tokens of fit has no weight that could be fitted
# {how pieces are chosen: the end of a key}
BY = {"size": "", "spread": "_by_spread", "correlation": "_by_r", "forward": "_forward"}
EQUAL = 0.7             # a later feature with an earlier one at this cosine is a copy
COLUMNS = {             # of compare.py's table, filled by studies/across.py
    "r2_5_forward": Column(
        "R² of 5", "up", None, 3, table="studies",
        text="R² of what the MLP gives the features of an SAE after it by five of its units, "
             "chosen one after the other; components: of W_in, null: random pieces of the same "
             "sum"),
}
TINY = 1e-30            # below it act(z) / z is no number


# -------------------------------------------------------------------- what later features read
class Rows(NamedTuple):
    """Tokens of some later features, those of a feature in a row: N = U J."""
    x_ND: torch.Tensor          # what the MLP reads
    y_ND: torch.Tensor          # what it writes
    other_ND: torch.Tensor      # what else the later SAE reads
    w_ND: torch.Tensor          # along which direction the row's own feature reads y, scale w


@dataclass
class Reading:
    """What the features of a later SAE read at N tokens, as linear functions of an MLP's output.

        p = scale w . (other + y) + b
    """
    later: Any
    norm: Any                   # the LayerNorm between, or None
    w_FD: torch.Tensor
    b_F: torch.Tensor
    x_ND: torch.Tensor
    y_ND: torch.Tensor
    other_ND: torch.Tensor
    on: Active                  # where each feature is on

    def scale(self, stream_ND):
        """The LayerNorm's scale in the clean run, 1 / std: (N, 1)."""
        if self.norm is None:
            return torch.ones_like(stream_ND[:, :1])
        variance_N1 = stream_ND.var(1, correction=0, keepdim=True)
        return (variance_N1 + self.norm.eps).rsqrt()

    def values(self, other_ND, y_ND):
        """What do the later features say if the MLP writes y? f (N, F). The LayerNorm is not
        frozen."""
        stream_ND = other_ND + y_ND
        if self.norm is not None:
            stream_ND = self.norm(stream_ND)
        return self.later.codes(stream_ND)

    def tokens(self, units, each):
        """J = `each` tokens of some features, evenly spread over those where each is on: (U, J)."""
        on_F = self.on.on()
        start_F = on_F.cumsum(0) - on_F
        j_J = torch.arange(each, device=units.device)
        offset_UJ = j_J * on_F[units].unsqueeze(1) // each
        return self.on.token_E[start_F[units].unsqueeze(1) + offset_UJ]

    def rows(self, units, each):
        """The Rows of some features."""
        token_N = self.tokens(units, each).flatten()
        y_ND = self.y_ND[token_N]
        other_ND = self.other_ND[token_N]
        w_ND = self.w_FD[units].repeat_interleave(each, 0)
        return Rows(self.x_ND[token_N], y_ND, other_ND, w_ND * self.scale(other_ND + y_ND))


def check_site(later, layer):
    """Fail on a later SAE that does not read this MLP's output linearly."""
    site = later.cfg.site
    above, = later.layers
    reads_y = {"resid": above >= layer, "mlp_in": above > layer, "mlp_out": above == layer}
    if not reads_y[site]:
        common.fail(f"an SAE of --site {site} at layer {above} does not read what the MLP of layer "
                    f"{layer} writes as a sum")


def streams(later, gpt, layer, idx_BT):
    """What does the MLP of a layer read and write, and what does a later SAE read? x_BTD, y_BTD and
    the SAE's site, which is taken before the LayerNorm if there is one between."""
    above, = later.layers
    x_BTD, stream_BTD = gpt.prefix(idx_BT, layer)
    y_BTD = gpt.mlp(layer)(x_BTD)
    written_BTD = y_BTD
    for below in range(layer, above):
        x_above_BTD, stream_BTD = gpt.next_mlp(stream_BTD, written_BTD, below)
        written_BTD = gpt.mlp(below + 1)(x_above_BTD)
    sites = {"mlp_out": y_BTD, "mlp_in": stream_BTD, "resid": stream_BTD + written_BTD}
    return x_BTD, y_BTD, sites[later.cfg.site]


@torch.no_grad()
def read_later(later, gpt, layer, rows_RT, batch=16):
    """What do the features of a later SAE read of the output of a layer's MLP? A Reading.

    later: an SAE of sae.py, its site one of those in the header. Two passes, 3 s for 50,000 tokens,
    and 3 N D floats."""
    check_site(later, layer)
    parts = []
    for idx_BT in split_rows(rows_RT, batch):
        found = streams(later, gpt, layer, idx_BT)
        parts.append([a_BTD[:, 1:].flatten(0, 1) for a_BTD in found])
    x_ND, y_ND, site_ND = (torch.cat(part) for part in zip(*parts))

    # what the encoder reads: p = a W^T + b
    pre = later.pre(None, later.W_enc, later.b_enc)
    w_FD = pre.W_FD * later.scale
    b_F = pre.b_F

    # with a LayerNorm between, a = gain (r - mean r) / std + shift: gain and mean go into w
    norm = None
    if later.cfg.site == "mlp_in":
        norm = gpt.h[later.layers[0]].ln_2
        b_F = b_F + w_FD @ norm.bias
        w_FD = w_FD * norm.weight
        w_FD = w_FD - w_FD.mean(1, keepdim=True)
    on = record_units(later, gpt, rows_RT, 0.)
    return Reading(later, norm, w_FD, b_F, x_ND, y_ND, site_ND - y_ND, on)


def frequent(fit, test, each=EACH):
    """Which later features are on at `each` tokens or more of both splits? Their numbers (U)."""
    is_enough_F = (fit.on.on() >= each) & (test.on.on() >= each)
    return is_enough_F.nonzero().squeeze(1)


# --------------------------------------------------------- which of them does the MLP compute?
def computed_share(reading, units, each=EACH):
    """How much of later features comes from the MLP, and how much by its side? (U)

    E|q| / (E|q| + E|scale w . other|) where a feature is on: 0 = the MLP does nothing for it, 1 =
    nothing else does. Null: of `replace(reading, w_FD=redraw(reading.w_FD, gen))`, directions that
    nothing reads (metrics/matching.py)."""
    rows = reading.rows(units, each)
    by_mlp_N = (rows.w_ND * rows.y_ND).sum(1)
    by_others_N = (rows.w_ND * rows.other_ND).sum(1)
    q_U = by_mlp_N.view(-1, each).abs().mean(1)
    other_U = by_others_N.view(-1, each).abs().mean(1)
    return q_U / (q_U + other_U).clamp(min=TINY)


def stream_directions(sae, gpt):
    """Which way do the features of an SAE point in the stream? (F, D). Behind a LayerNorm its gain
    is divided out, where it is not 0."""
    layer, = sae.layers
    W_FD = sae.W_dec
    if sae.cfg.site == "mlp_in":
        gain_D = gpt.h[layer].ln_2.weight
        W_FD = torch.where(gain_D != 0, W_FD / gain_D, 0)
    return W_FD


def largest_cosine(write_FD, earlier, gpt):
    """Is a later feature a copy of an earlier one? The largest cosine with any of them (F).

    write_FD: of `stream_directions`. earlier reads the MLP's input, so that directions of the
    stream are compared as its LayerNorm shows them: less their mean, times its gain. Null:
    `redraw(write_FD, gen)` in place of write_FD (metrics/matching.py)."""
    layer, = earlier.layers
    seen_FD = write_FD - write_FD.mean(1, keepdim=True)
    if earlier.cfg.site == "mlp_in":
        seen_FD = seen_FD * gpt.h[layer].ln_2.weight
    return cosines(seen_FD, earlier.W_dec).amax(1)


def is_computed(share_U, cosine_U):
    """Which later features are the MLP's work? More than half comes from it, and none is a copy of
    an earlier one: bool (U)."""
    return (share_U > 0.5) & (cosine_U < EQUAL)


# ---------------------------------------------------------------------- the MLP as a sum of pieces
class Shares(NamedTuple):
    """Of what is q the sum at N tokens? q = sum of piece_NF + rest_N + bias_N + error_N."""
    piece_NF: torch.Tensor
    active_NF: torch.Tensor     # bool: is the unit on, or a component's importance above tau?
    rest_N: torch.Tensor        # by what the components leave of the weights; 0 if there are none
    bias_N: torch.Tensor        # by what is always on
    error_N: torch.Tensor       # by what the pieces do not write

    @property
    def q(self):
        return self.piece_NF.sum(-1) + self.rest_N + self.bias_N + self.error_N

    @property
    def by_active(self):
        """What the active pieces add up to."""
        return (self.piece_NF * self.active_NF).sum(-1)

    def by_feature(self, U):
        """Sort the tokens by feature: (U, J) and (U, J, F) in the place of (N) and (N, F)."""
        return Shares(*(value.unflatten(0, (U, -1)) for value in self))


@dataclass
class Matrix:
    """A weight matrix W = V U + rest under masks, at N tokens.

        output = ((x V) * mask) U + rest_mask * (x rest) + b
               = ((x V) * (mask - rest_mask)) U + rest_mask * (x W) + b
    """
    x_ND: torch.Tensor          # what it reads
    V_DC: torch.Tensor
    U_CD: torch.Tensor
    W: torch.Tensor
    b_D: torch.Tensor
    mask_NC: torch.Tensor
    rest_mask_N1: torch.Tensor
    active_NC: torch.Tensor

    @cached_property
    def inner_NC(self):
        return self.x_ND @ self.V_DC

    @cached_property
    def has_own_masks(self):
        """Is there a mask other than the rest's? Without one the components need no product."""
        return bool((self.mask_NC != self.rest_mask_N1).any())

    def output(self):
        y_ND = self.rest_mask_N1 * (self.x_ND @ self.W) + self.b_D
        if self.has_own_masks:
            y_ND += (self.inner_NC * (self.mask_NC - self.rest_mask_N1)) @ self.U_CD
        return y_ND

    def back(self, w_ND):
        """Along which direction of its input does the matrix read what w reads of its output? The
        transpose of `output`, without the bias."""
        x_ND = self.rest_mask_N1 * (w_ND @ self.W.T)
        if self.has_own_masks:
            x_ND += ((w_ND @ self.U_CD.T) * (self.mask_NC - self.rest_mask_N1)) @ self.V_DC.T
        return x_ND

    def slopes(self, w_ND):
        """How does w . output grow with V_c . x? mask (w . U_c), (N, C)."""
        return self.mask_NC * (w_ND @ self.U_CD.T)

    def shares(self, w_ND):
        """The shares of w . output: the components' (N, C), the rest's (N) and the bias's (N)."""
        share_NC = self.inner_NC * (w_ND @ self.U_CD.T)
        rest_N = ((self.x_ND @ self.W) * w_ND).sum(1) - share_NC.sum(1)
        return self.mask_NC * share_NC, self.rest_mask_N1[:, 0] * rest_N, w_ND @ self.b_D

    def written(self, row_P, piece_P):
        """What do some components write at some tokens? (P, d_out)."""
        inner_P = (self.x_ND[row_P] * self.V_DC.T[piece_P]).sum(1)
        return (self.mask_NC[row_P, piece_P] * inner_P).unsqueeze(1) * self.U_CD[piece_P]

    def at(self, row_P, x_PD):
        """The matrix at some of the tokens, where it reads something else."""
        return replace(self, x_ND=x_PD, mask_NC=self.mask_NC[row_P],
                       rest_mask_N1=self.rest_mask_N1[row_P], active_NC=self.active_NC[row_P])


def secant(act, z):
    """The slope of the chord from 0 to z, act(z) / z; 0.5 at 0."""
    return torch.where(z.abs() > TINY, act(z) / z, 0.5)


class Components:
    """An MLP whose matrices are sums of components, under masks, at N tokens."""
    def __init__(self, m, mlp, x_ND, choose_masks, tau):
        self.m = m
        self.act = mlp.act
        # importances, and the masks that are chosen by them
        g_NF = m.encode(m.layers[0], x_ND.unsqueeze(0), mlp)[0]
        importance = g_NF.split(m.C, -1)
        masks, rest_masks = choose_masks(importance)
        rest_masks = [rest_mask.expand(len(x_ND), 1) for rest_mask in rest_masks]
        active = [g_NC > tau for g_NC in importance]

        # the MLP under these masks
        (_, read_in, write_in, _), (_, read_out, write_out, _) = m.unit_directions()
        self.W_in = Matrix(x_ND, read_in.T, write_in, mlp.c_fc.weight, mlp.c_fc.bias, masks[0],
                           rest_masks[0], active[0])
        self.z_NM = self.W_in.output()
        self.W_out = Matrix(self.act(self.z_NM), read_out.T, write_out, mlp.c_proj.weight,
                            mlp.c_proj.bias, masks[1], rest_masks[1], active[1])
        self.y_ND = self.W_out.output()
        self.error_ND = mlp(x_ND) - self.y_ND

    @property
    def rebuilt_ND(self):
        """What the components write together."""
        return self.y_ND

    def back_to_z(self, w_ND):
        """Along which direction is z read, through the secant of the nonlinearity? (N, M)."""
        return self.W_out.back(w_ND) * secant(self.act, self.z_NM)

    def shares_of_in(self, w_ND, back_NM):
        """The Shares of W_in's components; back_NM: of `back_to_z`."""
        piece_NC, rest_N, bias_N = self.W_in.shares(back_NM)
        # the bias of the other matrix is on the way too
        bias_N = bias_N + w_ND @ self.W_out.b_D
        return Shares(piece_NC, self.W_in.active_NC, rest_N, bias_N, self.error(w_ND))

    def shares(self, w_ND):
        """{matrix: Shares}, each of which adds up to q alone."""
        of_in = self.shares_of_in(w_ND, self.back_to_z(w_ND))
        piece_NC, rest_N, bias_N = self.W_out.shares(w_ND)
        of_out = Shares(piece_NC, self.W_out.active_NC, rest_N, bias_N, self.error(w_ND))
        return dict(zip(self.m.matrices, (of_in, of_out)))

    def error(self, w_ND):
        return (self.error_ND * w_ND).sum(1)

    def without(self, matrix, row_P, piece_P):
        """The MLP's output at some tokens, each without a component of one matrix, whose mask is 0:
        (P, D)."""
        if matrix == self.m.matrices[0]:
            z_PM = self.z_NM[row_P] - self.W_in.written(row_P, piece_P)
            return self.W_out.at(row_P, self.act(z_PM)).output()
        return self.y_ND[row_P] - self.W_out.written(row_P, piece_P)


class Units:
    """An MLP whose output a dictionary or maps rebuild, at N tokens. What they leave out stays."""
    def __init__(self, m, mlp, x_ND):
        self.m = m
        self.x_ND = x_ND
        self.f_NF = m.encode(m.layers[0], x_ND.unsqueeze(0), mlp)[0]
        self.y_ND = mlp(x_ND)

    def decode(self, f_NF, x_ND):
        return self.m.decode(self.m.layers[0], f_NF.unsqueeze(0), x_ND.unsqueeze(0))[0]

    @property
    def rebuilt_ND(self):
        """What the units write together."""
        return self.decode(self.f_NF, self.x_ND)

    def shares(self, w_ND):
        """{"all": Shares}. decode is linear in f, so that f times its slope is a unit's share."""
        with torch.enable_grad():
            f_NF = self.f_NF.detach().requires_grad_()
            total = (self.decode(f_NF, self.x_ND) * w_ND).sum()
            slope_NF, = torch.autograd.grad(total, f_NF)
        piece_NF = self.f_NF * slope_NF
        bias_N = (self.decode(torch.zeros_like(self.f_NF), self.x_ND) * w_ND).sum(1)
        error_N = (self.y_ND * w_ND).sum(1) - piece_NF.sum(1) - bias_N
        return {"all": Shares(piece_NF, self.f_NF > 0, torch.zeros_like(bias_N), bias_N, error_N)}

    def without(self, matrix, row_P, piece_P):
        """The MLP's output at some tokens, less what one unit writes at each: (P, D)."""
        f_PF = self.f_NF[row_P]
        x_PD = self.x_ND[row_P]
        y_hat_PD = self.decode(f_PF, x_PD)
        f_PF[torch.arange(len(f_PF), device=f_PF.device), piece_P] = 0
        return self.y_ND[row_P] - y_hat_PD + self.decode(f_PF, x_PD)


def nothing_masked(importance):
    """Masks off: all components on, and the rest too. It is the MLP itself: (masks, rest_masks).

    The CI masks are masks.without_rest, the rounded ones partial(masks.rounded, threshold=0.1)."""
    masks = [torch.ones_like(g) for g in importance]
    return masks, masks[0].new_ones(len(masks), 1)


def at_tokens(m, mlp, x_ND, choose_masks=nothing_masked, tau=TAU):
    """Take an MLP apart at N tokens, by a decomposition whose encode reads that MLP alone and whose
    decode is linear in f, or that is of components.

    choose_masks(importance) -> (masks, rest_masks) is for components (metrics/masks.py)."""
    if reads(m) != m.layers:
        common.fail(f"shares of a method that reads layers {reads(m)} at once are not known")
    if m.kind == "component":
        return Components(m, mlp, x_ND, choose_masks, tau)
    return Units(m, mlp, x_ND)


@dataclass
class Factors:
    """Other rank-one pieces with the importances of m's components: m but for V and U."""
    m: Any
    V: list                     # (d_in, C) of each matrix
    U: list                     # (C, d_out)

    def __getattr__(self, name):
        return getattr(self.m, name)

    def unit_directions(self):
        return [(name, V.T, U, None) for name, V, U in zip(self.matrices, self.V, self.U)]


@torch.no_grad()
def rotated(m, gen):
    """Write the matrices of a decomposition as sums of as many random pieces: the null of all that
    is asked of components here.

        V U = (V Q) (Q^T U)         Q a random orthogonal matrix (C, C)

    V_c and U_c are scaled to one length first, so that it does not matter how m shares the length
    of a piece between them. The sum is the same, and so is the rest; which directions are a piece
    is chance. Each has the importance of one of m's components, so that as many are active at a
    token. Of baselines.SVD it is a random factorisation at the rank of W. 0.3 s for C = 1,024."""
    Vs = []
    Us = []
    for _, read_CD, write_CD, _ in m.unit_directions():
        C = len(read_CD)
        normal_CC = torch.randn(C, C, generator=gen, dtype=torch.float64).to(read_CD.device)
        Q_CC, R_CC = torch.linalg.qr(normal_CC)
        # the signs make Q uniform: qr alone prefers some rotations (Mezzadri 2007)
        Q_CC = (Q_CC * R_CC.diagonal().sign()).to(read_CD.dtype)
        length_C1 = (read_CD.norm(dim=1) * write_CD.norm(dim=1)).sqrt().unsqueeze(1)
        Vs.append((nnf.normalize(read_CD, dim=1) * length_C1).T @ Q_CC)
        Us.append(Q_CC.T @ (nnf.normalize(write_CD, dim=1) * length_C1))
    return Factors(m, Vs, Us)


# ----------------------------------------------------------------------------- do few pieces do?
def correlate(a, b, weight=None):
    """Pearson's r of a and b along the last dimension but one, and the slope of b on a. 0 where
    either is constant. weight: 1 where an entry counts, else 0."""
    weight = torch.ones_like(b) if weight is None else weight
    n = weight.sum(-2, keepdim=True).clamp(min=1)
    da = (a - (a * weight).sum(-2, keepdim=True) / n) * weight
    db = (b - (b * weight).sum(-2, keepdim=True) / n) * weight
    both = (da * db).sum(-2)
    square_a = da.square().sum(-2)
    square_b = db.square().sum(-2)
    r = both / (square_a.sqrt() * square_b.sqrt()).clamp(min=TINY)
    return r, both / square_a.clamp(min=TINY)


def can_be_fitted(X_UJn):
    """Which numbers vary, and at enough tokens for a weight to be fitted to them? Bool (U, n)."""
    varies_Un = X_UJn.std(1) > 1e-6 * X_UJn.abs().amax(1)
    return varies_Un & ((X_UJn != 0).sum(1) >= FEW)


def explained_variance(q_hat_UJ, q_UJ):
    """R^2 (U): 1 = q_hat is q, 0 = it is no better than q's mean."""
    wrong_U = (q_UJ - q_hat_UJ).square().sum(1)
    spread_U = (q_UJ - q_UJ.mean(1, keepdim=True)).square().sum(1)
    return (1 - wrong_U / spread_U.clamp(min=TINY)).float()


def r2(X_fit_UJn, q_fit_UJ, X_test_UJn, q_test_UJ):
    """How well do n numbers predict q on test, by the least squares of fit? R^2 (U)."""
    # standardised on fit; in double precision, since pieces can be nearly the same
    X_fit = X_fit_UJn.double()
    q_fit = q_fit_UJ.double().unsqueeze(-1)
    mean_X = X_fit.mean(1, keepdim=True)
    mean_q = q_fit.mean(1, keepdim=True)
    std_X = torch.where(can_be_fitted(X_fit), X_fit.std(1), torch.inf).unsqueeze(1)

    # the smallest of the solutions, where pieces are dependent
    slope_Un1 = torch.linalg.pinv((X_fit - mean_X) / std_X, rtol=1e-6) @ (q_fit - mean_q)
    q_hat = ((X_test_UJn.double() - mean_X) / std_X) @ slope_Un1 + mean_q
    return explained_variance(q_hat.squeeze(-1), q_test_UJ.double())


def r2_as_they_are(X_fit_UJn, q_fit_UJ, X_test_UJn, q_test_UJ):
    """How well does the sum of n shares predict q on test? R^2 (U): no weights, but the mean of
    what they lack on fit is added."""
    lacking_U1 = (q_fit_UJ - X_fit_UJn.sum(2)).mean(1, keepdim=True)
    return explained_variance(X_test_UJn.sum(2) + lacking_U1, q_test_UJ)


def choose(piece_UJF, q_UJ, most, by):
    """Choose pieces for each later feature, the best first: (U, most).

    by "size": of largest E|share|; by "spread": of largest standard deviation of the share; by
    "correlation": of largest |Pearson's r| with q; "forward": one after the other."""
    most = min(most, piece_UJF.shape[2])
    if by == "forward":
        return forward(piece_UJF, q_UJ, most)
    if by == "size":
        worth_UF = piece_UJF.abs().mean(1)
    elif by == "spread":
        worth_UF = piece_UJF.std(1)
    else:
        worth_UF, _ = correlate(piece_UJF, q_UJ.unsqueeze(-1).expand_as(piece_UJF))
    return (worth_UF.abs() * can_be_fitted(piece_UJF)).topk(most).indices


def forward(piece_UJF, q_UJ, most):
    """Choose pieces one after the other, each the one that with those before it leaves the least of
    q, by least squares: (U, most). Orthogonal least squares (Chen, Billings and Luo 1989).

    A pivoted Cholesky decomposition of the pieces' correlations: a column of it for each choice."""
    X_UJF = nnf.normalize(piece_UJF - piece_UJF.mean(1, keepdim=True), dim=1)
    X_UJF = X_UJF * can_be_fitted(piece_UJF).unsqueeze(1)
    left_UF = torch.einsum("ujf,uj->uf", X_UJF, q_UJ - q_UJ.mean(1, keepdim=True))
    square_UF = X_UJF.square().sum(1)       # of each piece, what those chosen don't have
    chosen_Un = torch.zeros(len(q_UJ), 0, dtype=torch.long, device=q_UJ.device)
    columns = []
    for _ in range(most):
        gain_UF = torch.where(square_UF > 1e-4, left_UF.square() / square_UF, 0.)
        best_U1 = gain_UF.scatter(1, chosen_Un, -1.).argmax(1, keepdim=True)
        chosen_Un = torch.cat([chosen_Un, best_U1], 1)
        x_UJ = X_UJF.gather(2, best_U1.unsqueeze(1).expand(-1, X_UJF.shape[1], -1)).squeeze(2)
        column_UF = torch.einsum("ujf,uj->uf", X_UJF, x_UJ)
        for earlier_UF in columns:
            column_UF = column_UF - earlier_UF * earlier_UF.gather(1, best_U1)
        length_U1 = square_UF.gather(1, best_U1).clamp(min=1e-4).sqrt()
        column_UF = column_UF / length_U1
        columns.append(column_UF)
        left_UF = left_UF - column_UF * left_UF.gather(1, best_U1) / length_U1
        square_UF = square_UF - column_UF.square()
    return chosen_Un


def r2_of_best(fit_UJF, q_fit_UJ, test_UJF, q_test_UJ, counts, by):
    """How well do the n best pieces predict q? Chosen and fitted on fit, scored on test: {"r2_n":
    (U), "sum_n"}, with weights and as they are, and the pieces chosen, "chosen" (U, most)."""
    chosen_Un = choose(fit_UJF, q_fit_UJ, max(counts), by)
    place_UJn = chosen_Un.unsqueeze(1).expand(-1, fit_UJF.shape[1], -1)
    X_fit = fit_UJF.gather(2, place_UJn)
    X_test = test_UJF.gather(2, place_UJn)
    found = dict(chosen=chosen_Un)
    for n in counts:
        some = X_fit[..., :n], q_fit_UJ, X_test[..., :n], q_test_UJ
        found[f"r2_{n}"] = r2(*some)
        found[f"sum_{n}"] = r2_as_they_are(*some)
    return {f"{key}{BY[by]}": value for key, value in found.items()}


def how_many(size_UF, share=0.9):
    """How many of the largest sizes make up 90 % of their sum? (U)."""
    sum_UF = size_UF.sort(1, descending=True).values.cumsum(1)
    return (sum_UF < share * sum_UF[:, -1:]).sum(1) + 1


def sizes(shares_UJ):
    """How much of q do all pieces explain, and active ones, how much is the rest, and how many
    pieces are 90 % of all?"""
    varying_UJ = shares_UJ.q - shares_UJ.bias_N
    missing_U = (varying_UJ - shares_UJ.by_active).abs().mean(1)
    active_U = 1 - missing_U / varying_UJ.abs().mean(1).clamp(min=TINY)
    rest_U = shares_UJ.rest_N.abs().mean(1) / shares_UJ.q.abs().mean(1).clamp(min=TINY)
    error_UJ = shares_UJ.error_N - shares_UJ.error_N.mean(1, keepdim=True)
    return dict(active_share=active_U, rest_share=rest_U,
                r2_all=explained_variance(shares_UJ.q - error_UJ, shares_UJ.q),
                n90=how_many(shares_UJ.piece_NF.abs().mean(1)))


def still_on(reading, rows, units, rebuilt_ND):
    """Is a later feature on where it was, if the MLP writes what its pieces add up to? still_on:
    at which share of these tokens; still_f: its mean value there, over what it was. (U) each."""
    own_N1 = units.repeat_interleave(len(rows.x_ND) // len(units)).unsqueeze(1)
    before_UJ, after_UJ = [
        reading.values(rows.other_ND, y_ND).gather(1, own_N1).view(len(units), -1)
        for y_ND in (rows.y_ND, rebuilt_ND)]
    was_UJ = before_UJ > 0
    n_U = was_UJ.sum(1).clamp(min=1)
    return dict(still_on=((after_UJ > 0) & was_UJ).sum(1) / n_U,
                still_f=(after_UJ * was_UJ).sum(1) / before_UJ.sum(1).clamp(min=TINY))


def join(parts):
    """Join dicts of tensors, or dicts of such dicts, along the first dimension."""
    if torch.is_tensor(parts[0]):
        return torch.cat(parts)
    joined = {}
    for key in parts[0]:
        joined[key] = join([part[key] for part in parts])
    return joined


@torch.no_grad()
def attribute(m, gpt, fit, test, units, choose_masks=nothing_masked, tau=TAU, counts=COUNTS,
              each=EACH, by=("size",), group=GROUP):
    """How few of m's pieces explain what the MLP does for each later feature?

    For each matrix, or "all", a dict of (U):
        r2_n            R^2 of q on its n pieces of largest E|share|, chosen and fitted on fit,
                        scored on test; higher is better. Also chosen (U, n), their numbers
        sum_n           R^2 of the sum of these shares: no weights are fitted
        r2_n_by_r, ..   the same of pieces that are chosen otherwise: BY has the ends of keys
        r2_all          R^2 of the sum of all pieces: 1 where nothing is left out
        still_on        at which share of its tokens the feature is on if the MLP writes that sum;
        still_f         and its mean value there over what it was
        active_share    1 - E|q - bias - shares of active units| / E|q - bias|: 1 = what is off adds
                        nothing
        rest_share      E|rest| / E|q|; lower is better
        n90             the number of pieces that make up 90 % of sum_c E|share_c|; lower is better
    over the `each` tokens of each feature. Under masks q stays that of the MLP itself, so that R^2
    also says whether masks keep what later features read.

    Null: the same of `rotated(m, gen)`. A large but constant share says nothing of q's variance, so
    that "size" may choose what is of no use; "spread" chooses by what varies; "correlation" by |r|
    with q, as `directly` does, which is blind to what pieces say together; "forward" sees that.
    fit, test: Readings. 20 s."""
    layer, = m.layers
    mlp = gpt.mlp(layer)
    parts = []
    for some in units.split(group):
        found = []
        for reading in (fit, test):
            rows = reading.rows(some, each)
            at = at_tokens(m, mlp, rows.x_ND, choose_masks, tau)
            found.append(at.shares(rows.w_ND))
        kept = still_on(test, rows, some, at.rebuilt_ND)
        numbers = {}
        for matrix in found[0]:
            a, b = [of_matrix[matrix].by_feature(len(some)) for of_matrix in found]
            numbers[matrix] = kept | sizes(b)
            for rule in by:
                numbers[matrix] |= r2_of_best(a.piece_NF, a.q, b.piece_NF, b.q, counts, rule)
        parts.append(numbers)
    return join(parts)


@torch.no_grad()
def directly(earlier, gpt, fit, test, units, counts=COUNTS, each=EACH,
             by=("correlation", "forward"), group=GROUP):
    """How well do few earlier features predict q, with no transform between?

    As `attribute`, of the earlier features' values: they have no share, and so they can't be chosen
    by its size, and their sum, sum_n, says nothing. earlier: an SAE that reads the MLP's input."""
    layer, = earlier.layers
    mlp = gpt.mlp(layer)
    parts = []
    for some in units.split(group):
        values = []
        for reading in (fit, test):
            rows = reading.rows(some, each)
            f_NI = earlier.encode(layer, rows.x_ND.unsqueeze(0), mlp)[0]
            q_N = (rows.w_ND * rows.y_ND).sum(1)
            values += [f_NI.view(len(some), each, -1), q_N.view(len(some), each)]
        numbers = {}
        for rule in by:
            numbers |= r2_of_best(*values, counts, rule)
        parts.append(numbers)
    return join(parts)


# ----------------------------------------------------------------- over which earlier features?
class EarlierReads(NamedTuple):
    """What do W_in's components read of earlier features at N tokens? V_c . x is the sum of f_i
    (V_c . d_i) over the features, of error and of bias."""
    f_NI: torch.Tensor
    dot_IC: torch.Tensor        # V_c . d_i
    error_NC: torch.Tensor      # V_c . (x - x_hat)
    bias_C: torch.Tensor        # V_c . b_dec


def split_input(earlier, mlp, x_ND, V_DC):
    """Split what the components V read into an earlier SAE's features: EarlierReads."""
    layer, = earlier.layers
    if earlier.cfg.site != "mlp_in":
        common.fail(f"paths begin at an SAE of --site mlp_in, not {earlier.cfg.site}")
    f_NI = earlier.encode(layer, x_ND.unsqueeze(0), mlp)[0]
    bias_D = earlier.rebuild(torch.zeros_like(f_NI[:1]))[0]
    dot_IC = (earlier.W_dec / earlier.scale) @ V_DC
    return EarlierReads(f_NI, dot_IC, (x_ND - earlier.rebuild(f_NI)) @ V_DC, bias_D @ V_DC)


@torch.no_grad()
def paths(m, mlp, earlier, x_ND, w_ND, components, choose_masks=nothing_masked):
    """How much of q runs from each earlier feature through some components of W_in? (N, I, n).

    f_i (V_c . d_i) mask (back s) . U_c. With the paths of error and bias they add up to the
    components' shares. N I n floats."""
    at = at_tokens(m, mlp, x_ND, choose_masks)
    slope_NC = at.W_in.slopes(at.back_to_z(w_ND))
    parts_of_x = split_input(earlier, mlp, x_ND, at.W_in.V_DC[:, components])
    through_NIn = parts_of_x.f_NI.unsqueeze(-1) * parts_of_x.dot_IC
    return through_NIn * slope_NC[:, components].unsqueeze(1)


@torch.no_grad()
def path_completeness(m, gpt, earlier, test, units, choose_masks=nothing_masked, tau=TAU,
                      each=EACH, group=GROUP):
    """Which part of what runs to later features runs from earlier features through active
    components of W_in? (U): 1 = all; higher is better.

        sum |path i -> c -> k| / (that + sum |error paths| + sum |bias paths| + remainder)

    over active c. Error paths and bias paths: what each active component reads of x - x_hat and of
    b_dec, and the MLP's biases. The remainder is what is not from active components: |rest|,
    |error|, and of each inactive component |share|. A mean over tokens, weighted by |q|. Sizes are
    added, so that paths that cancel count. Null: `rotated(m, gen)`. 13 s."""
    layer, = m.layers
    mlp = gpt.mlp(layer)
    parts = []
    for some in units.split(group):
        rows = test.rows(some, each)
        at = at_tokens(m, mlp, rows.x_ND, choose_masks, tau)
        back_NM = at.back_to_z(rows.w_ND)
        of_in = at.shares_of_in(rows.w_ND, back_NM)
        slope_NC = at.W_in.slopes(back_NM).abs() * of_in.active_NF
        parts_of_x = split_input(earlier, mlp, rows.x_ND, at.W_in.V_DC)

        # f is never negative, so that |f_i (V_c . d_i)| = f_i |V_c . d_i|; few features are on
        reach_NC = parts_of_x.f_NI.to_sparse() @ parts_of_x.dot_IC.abs()
        good_N = (slope_NC * reach_NC).sum(1)
        by_error_N = (slope_NC * parts_of_x.error_NC.abs()).sum(1)
        by_bias_N = slope_NC @ parts_of_x.bias_C.abs() + of_in.bias_N.abs()
        by_inactive_N = (of_in.piece_NF.abs() * ~of_in.active_NF).sum(1)
        remainder_N = by_inactive_N + of_in.rest_N.abs() + of_in.error_N.abs()

        all_N = good_N + by_error_N + by_bias_N + remainder_N
        weight_UJ = of_in.q.abs().view(len(some), -1)
        share_UJ = (good_N / all_N.clamp(min=TINY)).view(len(some), -1)
        parts.append((weight_UJ * share_UJ).sum(1) / weight_UJ.sum(1).clamp(min=TINY))
    return torch.cat(parts)


class Paths(NamedTuple):
    """The strongest paths to each later feature, the strongest first: (U, n) each."""
    earlier_Un: torch.Tensor    # number of the earlier feature
    component_Un: torch.Tensor  # number of the component of W_in
    mean_Un: torch.Tensor       # E of the path, signed


@torch.no_grad()
def strongest_paths(m, gpt, earlier, test, units, n=10, choose_masks=nothing_masked, each=EACH):
    """From which earlier features through which components of W_in does most run to each of a few
    later features? Paths, those of largest E|path|.

    J I C multiplications and 2 I C floats for each feature: 0.1 s."""
    layer, = m.layers
    mlp = gpt.mlp(layer)
    parts = []
    for some in units.split(1):
        rows = test.rows(some, each)
        at = at_tokens(m, mlp, rows.x_ND, choose_masks)
        slope_JC = at.W_in.slopes(at.back_to_z(rows.w_ND))
        parts_of_x = split_input(earlier, mlp, rows.x_ND, at.W_in.V_DC)
        # E|path| = E[f_i |slope_c|] |V_c . d_i|
        size_IC = parts_of_x.f_NI.T @ slope_JC.abs() * parts_of_x.dot_IC.abs()
        mean_IC = parts_of_x.f_NI.T @ slope_JC * parts_of_x.dot_IC / each
        best_n = size_IC.flatten().topk(min(n, size_IC.numel())).indices
        C = size_IC.shape[1]
        parts.append(Paths(best_n // C, best_n % C, mean_IC.flatten()[best_n]))
    return Paths(*map(torch.stack, zip(*parts)))


# ---------------------------------------------------------------------------- is it causal?
def agreement(change_UP, share_UP):
    """Do changes follow shares? Pearson's r and the slope of the change on -share, and how often
    the two have one sign: (U) each. Pairs without a share do not count."""
    counts_UP = (share_UP != 0).to(share_UP)
    r_U1, slope_U1 = correlate(-share_UP.unsqueeze(-1), change_UP.unsqueeze(-1),
                               counts_UP.unsqueeze(-1))
    agree_UP = (change_UP.sign() == -share_UP.sign()) * counts_UP
    sign_U = agree_UP.sum(1) / counts_UP.sum(1).clamp(min=1)
    return dict(pearson=r_U1[:, 0], slope=slope_U1[:, 0], sign_agreement=sign_U)


def draw_pairs(piece_UJF, gen, pairs):
    """Draw pairs of a token and a piece whose share is not 0, for each later feature: those of the
    largest |share| of OF_ALL times as many, and random ones. Places in (J, F), (U, P) each."""
    size_UQ = piece_UJF.flatten(1).abs()
    key_UQ = torch.rand(size_UQ.shape, generator=gen).to(size_UQ)
    key_UQ = torch.where(size_UQ > 0, key_UQ, -1.)
    drawn_Un = key_UQ.topk(min(OF_ALL * pairs, key_UQ.shape[1])).indices
    largest_UP = size_UQ.gather(1, drawn_Un).topk(min(pairs, drawn_Un.shape[1])).indices
    # the keys are random, and so are the first of them
    return drawn_Un.gather(1, largest_UP), drawn_Un[:, :pairs]


def changes(at, matrix, test, rows, feature_U, place_UP, F):
    """How much do later features change when a piece is removed at a token, and how much their
    pre-activations, the LayerNorm's scale frozen? (U, P) each.

    place_UP: of the token and the piece, in (J, F)."""
    U, P = place_UP.shape
    J = len(rows.x_ND) // U
    row_UP = place_UP // F + J * torch.arange(U, device=place_UP.device).unsqueeze(1)
    row_P = row_UP.flatten()
    y_PD = at.without(matrix, row_P, (place_UP % F).flatten())
    # f with and without the piece
    other_PD = rows.other_ND[row_P]
    own_P1 = feature_U.repeat_interleave(P).unsqueeze(1)
    before_P1 = test.values(other_PD, at.y_ND[row_P]).gather(1, own_P1)
    after_P1 = test.values(other_PD, y_PD).gather(1, own_P1)
    # p is linear in y
    change_p_P = ((y_PD - at.y_ND[row_P]) * rows.w_ND[row_P]).sum(1)
    return (after_P1 - before_P1).view(U, P), change_p_P.view(U, P)


@torch.no_grad()
def causal(m, gpt, test, units, gen, choose_masks=nothing_masked, tau=TAU, each=EACH, pairs=PAIRS,
           group=GROUP):
    """Does a later feature fall by a unit's share when the unit is removed?

    Removed: a component's mask is 0, all else stays; of other kinds what the unit writes is taken
    out of y, and their error stays. The feature's value f is computed anew, nonlinearity, other
    features' competition and LayerNorm included; what blocks between do with y stays as it was. Of
    (piece, token) pairs where the feature is on, for each matrix, or "all", a dict of (U):
        pearson             r of the change of f and -share, over the pairs whose |share| is in the
                            top 5 %: `pairs` of OF_ALL times as many that are drawn
        slope               of the change on -share: 1 = as large as the share says
        sign_agreement      share of the pairs with one sign; no change is none
        null_..             the same over random pairs
        pre_..              of the change of the pre-activation p instead of f: what it lacks in 1
                            is the secant's doing, what f lacks beyond that the SAE's. 1 for W_out
                            and dictionaries, whose shares are exact
        null_pre_..         the same over random pairs
    Shares that say nothing have r = 0, up to 1 / sqrt(pairs). Only pairs with a share count: where
    masks leave a feature few, more than the top 5 % of them are taken. A second null is
    `rotated(m, gen)`. 15 s."""
    layer, = m.layers
    mlp = gpt.mlp(layer)
    parts = []
    for some in units.split(group):
        rows = test.rows(some, each)
        at = at_tokens(m, mlp, rows.x_ND, choose_masks, tau)
        numbers = {}
        for matrix, of_matrix in at.shares(rows.w_ND).items():
            piece_UJF = of_matrix.by_feature(len(some)).piece_NF
            largest_UP, random_UP = draw_pairs(piece_UJF, gen, pairs)
            F = piece_UJF.shape[2]
            found = {}
            for null, place_UP in (("", largest_UP), ("null_", random_UP)):
                share_UP = piece_UJF.flatten(1).gather(1, place_UP)
                change_UP, change_p_UP = changes(at, matrix, test, rows, some, place_UP, F)
                found[null] = agreement(change_UP, share_UP)
                found[f"{null}pre_"] = agreement(change_p_UP, share_UP)
            numbers[matrix] = flatten(found)
        parts.append(numbers)
    return join(parts)


def flatten(found):
    """Put each dict's prefix before its keys: {prefix: {key: ..}} -> {prefix + key: ..}."""
    flat = {}
    for prefix, numbers in found.items():
        flat |= {prefix + key: value for key, value in numbers.items()}
    return flat


# ------------------------------------------------------------------------------- the headline
def compare(r2_U, competitors, pearson_U=None):
    """Is a later feature explained by fewer pieces of one decomposition than of any other?

    r2_U: R^2 of the decomposition at some number of pieces; competitors: {name: (U)} at the same
    number. In means, R^2 below 0 counts as 0, no better than the mean of q.
        r2          mean R^2
        best        the competitor of highest mean R^2
        delta       r2 less the best competitor's: above 0 = fewer pieces do
        wins        share of the features at which no competitor does as well
        explained   share of the features with R^2 >= 0.8 and, if pearson_U is given (`causal`), a
                    Pearson's r >= 0.7
    U: the computed features (`is_computed`)."""
    floored_U = r2_U.clamp(min=0)
    means = {name: other_U.clamp(min=0).mean().item() for name, other_U in competitors.items()}
    best = max(means, key=means.get)
    most_U = torch.stack([*competitors.values()]).amax(0)
    is_explained_U = r2_U >= 0.8
    if pearson_U is not None:
        is_explained_U = is_explained_U & (pearson_U >= 0.7)
    r2_mean = floored_U.mean().item()
    return dict(r2=r2_mean, best=best, delta=r2_mean - means[best],
                wins=(r2_U > most_U).float().mean().item(),
                explained=is_explained_U.float().mean().item())
