"""How atomic are the units of one decomposition?

    effective_rank      does a unit write one direction or several?
    one_concept         does one concept explain where a unit is on, or do two?
    fragmentation       is a mechanism one unit, or many that are on at the same tokens?
    meta_dictionary     are write directions themselves sums of a few common directions?

All functions are pure. fit, test and recording are recordings (metrics/recording.py).

N tokens (position 0 of each row left out), E entries (one per token and unit that is on there),
F units, K concepts, D residual width, J tokens of a unit, C best concepts of a unit, P pairs of
these, U alive units, G sets of rows, A atoms. Costs are for two cores, 50,000 tokens.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as nnf

from evals import ALIVE, f1_scores
from metrics.recording import testable_concepts

TOKENS_AT_ONCE = 8192       # of a matrix of tokens and units: bounds the memory


def effective_rank(c_FJD):
    """How many directions does each unit write? (F)

    (tr M)^2 / tr M^2, where M = E[c c^T] over the tokens of a unit, uncentred: 1 for one direction,
    r for r equally strong ones. Over pairs i != j of tokens, which makes it free of bias,

        sum |c_i|^2 |c_j|^2 / sum (c_i . c_j)^2

    c_FJD: contributions of each unit, NaN where it has fewer than J tokens. A unit that is on at
    fewer than two tokens gets NaN.
    """
    c_FJD = c_FJD.nan_to_num()
    square_FJ = c_FJD.square().sum(-1)
    # Sums over all pairs, less those of a token with itself.
    itself_F = square_FJ.square().sum(1)
    norms_F = square_FJ.sum(1)**2 - itself_F
    products_F = (c_FJD @ c_FJD.mT).square().sum((1, 2)) - itself_F
    return norms_F / products_F


# ------------------------------------------------------------------------------ one concept or two
class Explanations(NamedTuple):
    """How well do a unit's best concepts, and pairs of them, say where it is on? F1s."""
    single_FC: torch.Tensor         # "c"
    either_FP: torch.Tensor         # "c or c'"
    both_FP: torch.Tensor           # "c and c'"


def one_concept(fit, test, gain=0.03, enough=0.5, first=15):
    """Does one concept explain where a unit is on? The shares of the alive units that are

    atomic       one concept explains them: F1 >= enough, and neither two gain `gain` over that
    polysemantic "c or c'" gains `gain`: they are on for two things
    composite    "c and c'" gains `gain` (where both gain, the larger gain decides)
    unexplained  the best concept's F1 is below enough

    These sum to 1; "f1" is the mean F1 of the best single concept. Pairs are among the `first` best
    concepts of a unit. They are chosen on fit and scored on test. 10 s.
    """
    # Choose the concepts of each unit on fit, and score all explanations on both.
    concepts = testable_concepts(fit)
    best_FC = best_concepts(fit, concepts, first)
    on_fit = score_explanations(fit, concepts, best_FC)
    on_test = score_explanations(test, concepts, best_FC)

    # Of each kind of explanation, the one that is best on fit, scored on test: (U).
    is_alive_F = fit.on() >= ALIVE
    f1_U, either_U, both_U = (score_of_best(scores_fit, scores_test)[is_alive_F]
                              for scores_fit, scores_test in zip(on_fit, on_test))
    gain_either_U = either_U - f1_U
    gain_both_U = both_U - f1_U

    # Each unit is of one kind.
    is_explained_U = f1_U >= enough
    or_helps_U = is_explained_U & (gain_either_U >= gain) & (gain_either_U >= gain_both_U)
    and_helps_U = is_explained_U & (gain_both_U >= gain) & (gain_both_U > gain_either_U)
    kinds = dict(atomic=is_explained_U & ~or_helps_U & ~and_helps_U, polysemantic=or_helps_U,
                 composite=and_helps_U, unexplained=~is_explained_U)
    shares = {kind: is_kind_U.float().mean().item() for kind, is_kind_U in kinds.items()}
    return shares | dict(f1=f1_U.mean().item())


def best_concepts(fit, concepts, first):
    """Which concepts say best, each alone, where a unit is on? (F, C), as places in `concepts`."""
    label_NK = fit.label_NK[:, concepts].float()
    on_F1 = fit.on().float().unsqueeze(1)
    f1_FK = f1_scores(on_F1, label_NK.sum(0), fit.sums(label_NK))
    return f1_FK.topk(min(first, len(concepts)), 1).indices


def score_explanations(recording, concepts, best_FC):
    """How well do each unit's concepts, alone and in pairs, say where it is on? Explanations."""
    label_NK = recording.label_NK[:, concepts].float()

    # At how many tokens are c and c' true: of all tokens, and of those where the unit is on?
    label_KK = label_NK.T @ label_NK
    label_FCC = label_KK[best_FC.unsqueeze(2), best_FC.unsqueeze(1)]
    label_EC = label_NK[recording.token_E.unsqueeze(1), best_FC[recording.unit_E]]
    hits_FCC = torch.zeros_like(label_FCC)
    for c in range(best_FC.shape[1]):
        hits_FCC[:, c].index_add_(0, recording.unit_E, label_EC * label_EC[:, c:c + 1])

    # The diagonals count single concepts; "c or c'" counts c + c' - both.
    label_FC = label_FCC.diagonal(dim1=1, dim2=2)
    hits_FC = hits_FCC.diagonal(dim1=1, dim2=2)
    label_either_FCC = label_FC.unsqueeze(1) + label_FC.unsqueeze(2) - label_FCC
    hits_either_FCC = hits_FC.unsqueeze(1) + hits_FC.unsqueeze(2) - hits_FCC

    on_F11 = recording.on().float().view(-1, 1, 1)
    single_FC = f1_scores(on_F11.squeeze(1), label_FC, hits_FC)
    either_FCC = f1_scores(on_F11, label_either_FCC, hits_either_FCC)
    both_FCC = f1_scores(on_F11, label_FCC, hits_FCC)
    return Explanations(single_FC, either_FCC.flatten(1), both_FCC.flatten(1))


def score_of_best(fit_FC, test_FC):
    """What does the explanation that is best on fit score on test? (F)"""
    best_F1 = fit_FC.argmax(1, keepdim=True)
    return test_FC.gather(1, best_F1).squeeze(1)


# ------------------------------------------------------------------------------- one piece or many
def fragmentation(recording, jaccard=0.8):
    """In how many pieces does a mechanism come? The mean size of the clusters of alive units that
    are on at the same tokens, each cluster weighted by its size.

    Two units are linked if |tokens of both| >= jaccard |tokens of either|; a cluster is what links
    connect. 1 is best; 50 says that mechanisms come in 50 pieces. 10 s.
    """
    is_alive_F = recording.on() >= ALIVE
    n_alive = is_alive_F.sum().item()
    if not n_alive:
        return math.nan

    # At how many tokens are two alive units both on? A slice of the tokens at a time.
    place_F = is_alive_F.cumsum(0) - 1
    is_of_alive_E = is_alive_F[recording.unit_E]
    both_UU = torch.zeros(n_alive, n_alive, device=place_F.device)
    for start in range(0, recording.N, TOKENS_AT_ONCE):
        end = start + TOKENS_AT_ONCE
        is_here_E = is_of_alive_E & (recording.token_E >= start) & (recording.token_E < end)
        on_NU = torch.zeros(TOKENS_AT_ONCE, n_alive, device=place_F.device)
        on_NU[recording.token_E[is_here_E] - start, place_F[recording.unit_E[is_here_E]]] = 1
        both_UU += on_NU.T @ on_NU

    # Link those that overlap enough, and average: sum over clusters of size / n * size.
    on_U = both_UU.diagonal()
    either_UU = on_U.unsqueeze(0) + on_U.unsqueeze(1) - both_UU
    size = torch.bincount(name_clusters(both_UU >= jaccard * either_UU))
    return size.square().sum().item() / n_alive


def name_clusters(is_linked_UU):
    """Which cluster is each unit in? (U): the place of the first unit that links lead to."""
    n = len(is_linked_UU)
    name_U = torch.arange(n, device=is_linked_UU.device)
    while True:
        # Each unit takes the smallest name among its neighbours and itself, until none changes.
        new_U = torch.where(is_linked_UU, name_U, n).amin(1)
        if torch.equal(new_U, name_U):
            return name_U
        name_U = new_U


# ----------------------------------------------------------------------- sums of common directions
class MetaSAEs:
    """One BatchTopK SAE for each of G sets of N rows, trained side by side.

        f = relu((x - b_dec) W_enc + b_enc), of which the N k largest of a set are kept
        x_hat = f W_dec + b_dec, rows of W_dec of length 1
    """
    def __init__(self, X_GND, width, k, gen):
        G, _, D = X_GND.shape
        W_dec = nnf.normalize(torch.randn(G, width, D, generator=gen).to(X_GND), dim=-1)
        self.k = k
        self.W_enc_GDA = W_dec.mT.clone().requires_grad_()
        self.W_dec_GAD = W_dec.requires_grad_()
        self.b_dec_G1D = X_GND.mean(1, keepdim=True).clone().requires_grad_()
        self.b_enc_G1A = torch.zeros(G, 1, width).to(X_GND).requires_grad_()

    def parameters(self):
        return [self.W_enc_GDA, self.W_dec_GAD, self.b_dec_G1D, self.b_enc_G1A]

    def reconstruct(self, X_GND):
        f_GNA = ((X_GND - self.b_dec_G1D) @ self.W_enc_GDA + self.b_enc_G1A).relu()
        _, N, A = f_GNA.shape
        # The smallest value kept: N k of N A are as large, or N (A - k) are smaller.
        least_G = f_GNA.detach().flatten(1).kthvalue(N * (A - self.k) + 1, 1).values
        kept_GNA = f_GNA * (f_GNA >= least_G.view(-1, 1, 1))
        return kept_GNA @ self.W_dec_GAD + self.b_dec_G1D

    def fit(self, X_GND, steps, lr):
        """Minimise the squared error; the learning rate falls to 0 over the last fifth."""
        opt = torch.optim.Adam(self.parameters(), lr)
        for step in range(steps):
            opt.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / steps))
            opt.zero_grad()
            error_GND = X_GND - self.reconstruct(X_GND)
            error_GND.square().sum().div(X_GND.shape[1]).backward()
            opt.step()
            with torch.no_grad():
                self.W_dec_GAD.div_(self.W_dec_GAD.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def variance_explained(self, X_GND):
        """1 - |X - X_hat|^2 / |X - mean|^2 of each set, (G)."""
        error_G = (X_GND - self.reconstruct(X_GND)).square().sum((1, 2))
        spread_G = (X_GND - X_GND.mean(1, keepdim=True)).square().sum((1, 2))
        return 1 - error_G / spread_G


def gaussian_rows(rows_ND, n_sets, gen):
    """Draw sets of Gaussian rows with exactly the mean and covariance of these rows: (G, N, D)."""
    mean_D = rows_ND.mean(0)
    root = torch.linalg.svd(rows_ND - mean_D, full_matrices=False)
    draw = torch.randn(n_sets, len(rows_ND), len(root.S), generator=gen).to(rows_ND)
    # Q has orthonormal columns of mean 0, so (Q S Vh)^T (Q S Vh) = Vh^T S^2 Vh, as for the rows.
    Q = torch.linalg.qr(draw - draw.mean(1, keepdim=True)).Q
    return Q * root.S @ root.Vh + mean_D


def meta_dictionary(write_FD, gen, width, k=4, steps=1000, lr=3e-3, seeds=3):
    """How far are the units' write directions sums of a few common atoms? Meta-SAEs, Leask et al.
    2025, arXiv:2502.04878.

    A BatchTopK SAE of `width` atoms, k a row, is trained on the write directions and explains a
    share "ve" of their variance. At this size chance alone explains a third to a half: "ve_null" is
    the share for Gaussian rows of equal mean and covariance, scaled to length 1. The number is
    "excess" = (ve - ve_null) / (1 - ve_null): 0 = no more than chance, 1 = all; lower is more
    atomic. Both are means over `seeds` trainings, which run as one batch: 60 s for 1,024 rows.
    """
    # The sets: the rows, `seeds` times, and as many draws of the null.
    rows_FD = nnf.normalize(write_FD.double(), dim=1).float()
    null_GFD = nnf.normalize(gaussian_rows(rows_FD, seeds, gen), dim=-1)
    X_GFD = torch.cat([rows_FD.expand(seeds, -1, -1), null_GFD])

    # Callers measure without gradients; this training needs them.
    with torch.enable_grad():
        saes = MetaSAEs(X_GFD, width, k, gen)
        saes.fit(X_GFD, steps, lr)
    ve, ve_null = saes.variance_explained(X_GFD).view(2, seeds).mean(1).tolist()
    return dict(ve=ve, ve_null=ve_null, excess=(ve - ve_null) / (1 - ve_null))
