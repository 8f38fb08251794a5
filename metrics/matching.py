"""Which units of one decomposition are which units of another, by their weights and by their activations.

Units of A and of B, dead ones left out, are matched one to one such that their similarities add up to most:
    weights       SAE, transcoder, CLT    S = (E + D) / 2     E, D: cosine of what two units read, of what they write
                  SPD                     S = E D, the Frobenius cosine of v u^T: alike for (V, U) and (-V, -U)
                  MOLT                    S = Frobenius cosine of U_t V_t
    activations   any method              S = Pearson's r over tokens, |r| if units speak with a sign
    inputs        as weights, but with the cosine of what two units read taken over the inputs: v . v' = v^T E[x x^T] v'
                  over the tokens, x what the block's units are multiplied with. It asks whether they get the same from
                  every token; directions that the inputs never take count for nothing
  and never across SPD's two matrices or across a CLT's layers. A pair is shared where E and D are both 0.7 or more
  (SPD: in size; MOLT, activations: S is), which separates the pairs on which matchings by E and by D agree from the
  others (Paulo and Belrose 2025, arXiv:2501.16615).
Read with care: a high similarity of matched pairs says nothing of units without a mate, a match in weights does not
  make two units say the same, and seeds can agree on y_hat with other units. So a share has all alive units below the
  line and stands beside what holds among matched or shared units alone, and y_hat is compared too. A matching is the
  best of very many, chance scores well over 0: every number comes with its null, as many units drawn at random.
  The seed of our methods changes the initialisation and the order of the data.
S seeds, F units of a decomposition, P matched pairs, n and n' units of two blocks, R rows of tokens, D residual width
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as nnf

SHARED, AROUND = 0.7, (0.5, 0.7, 0.9)       # a pair is shared from here on, and the thresholds shown beside it

def hungarian(S):
    """Column of each row such that the sum of S over them is largest, no column twice; -1 for rows that go without,
    where there are more rows than columns. Shortest augmenting paths: O(rows^2 columns), 0.4 s for 1,024 x 1,024."""
    C = -np.asarray(S, dtype=np.float64)
    rows, columns = C.shape
    if not rows:
        return np.zeros(0, int)
    if rows > columns:
        column_of = np.full(rows, -1)
        column_of[hungarian(-C.T)] = np.arange(columns)
        return column_of
    u, v = C.min(1), np.zeros(columns)      # prices: u_i + v_j <= C_ij, with equality where i and j are matched
    row_of, column_of = np.full(columns, -1), np.full(rows, -1)
    for i, j in enumerate(C.argmin(1)):
        if row_of[j] < 0:
            row_of[j], column_of[i] = i, j
    for start in np.flatnonzero(column_of < 0):
        cost, via, open_ = np.full(columns, math.inf), np.full(columns, start), np.ones(columns, bool)
        i, so_far, seen = start, 0., []
        while i >= 0:                       # the nearest open column, until one is free
            through = so_far + C[i] - u[i] - v
            via = np.where(open_ & (through < cost), i, via)
            cost = np.where(open_, np.minimum(cost, through), cost)
            j = np.where(open_, cost, math.inf).argmin()
            open_[j], so_far, i = False, cost[j], row_of[j]
            seen.append(j)
        slack = so_far - cost[seen]
        v[seen] -= slack
        u[row_of[seen[:-1]]] += slack[:-1]
        u[start] += so_far
        while j >= 0:                       # back along the path: each row moves to the column it was reached by
            i = via[j]
            row_of[j], column_of[i], j = i, j, column_of[i]
    return column_of

# -------------------------------------------------------------------------------------------------- weight space
@dataclass
class Block:
    """Units of a decomposition that could be each other's equals, by what they read and write."""
    name: str
    kind: str                   # "dictionary", "component", or "map", which has several rows
    unit_n: torch.Tensor        # which of m's units
    read: torch.Tensor          # a row (or owner's rows) each
    write: torch.Tensor
    owner: torch.Tensor         # 0 to n - 1: which unit each row belongs to
    root: torch.Tensor | None = None    # E[x x^T]^(1/2) of what its units are multiplied with, once it is known

    def where(self, keep_n):
        """The same without some units."""
        row = keep_n[self.owner]
        return replace(self, unit_n=self.unit_n[keep_n], read=self.read[row], write=self.write[row],
                       owner=(keep_n.cumsum(0) - 1)[self.owner[row]])

    def over_inputs(self):
        """The block whose plain cosines of what units read are those over the inputs."""
        return replace(self, read=self.read @ self.root)

def blocks(m):
    """All units of m, in its order."""
    out, first = [], 0
    for name, read, write, ranks in m.unit_directions():
        n = len(read) if ranks is None else len(ranks)
        unit_n = torch.arange(n, device=read.device)
        owner = unit_n if ranks is None else unit_n.repeat_interleave(ranks.to(unit_n))
        out.append(Block(name, m.kind, first + unit_n, read.detach(), write.detach(), owner))
        first += n
    return out

@torch.no_grad()
def with_inputs(Bs, m, gpt, rows_RT):
    """The blocks of m with the metric of their inputs, told on some rows. 2 s for 50,000 tokens."""
    return [replace(b, root=root(x_ND)) for b, x_ND in zip(Bs, m.unit_inputs(gpt, rows_RT), strict=True)]

def root(x_ND):
    """E[x x^T]^(1/2), (D, D), symmetric."""
    s, Q = torch.linalg.eigh((x_ND.T.double() @ x_ND.double()) / len(x_ND))
    return ((Q * s.clamp(min=0).sqrt()) @ Q.T).to(x_ND)

def cosines(A, B):
    return nnf.normalize(A, dim=1) @ nnf.normalize(B, dim=1).T

def inner(a, b):
    """<U_t V_t, U_s V_s> of each pair of maps, by the products of their rows alone."""
    rows = (a.read @ b.read.T) * (a.write @ b.write.T)
    half = rows.new_zeros(len(a.unit_n), rows.shape[1]).index_add_(0, a.owner, rows)
    return half.new_zeros(len(half), len(b.unit_n)).index_add_(1, b.owner, half)

def similarity(a, b):
    """(S, least), n x n': what a matching adds up, and what must reach 0.7 for a pair to be shared."""
    if a.kind == "map":
        size = [inner(c, c).diagonal().clamp(min=1e-12).sqrt() for c in (a, b)]
        S = inner(a, b) / (size[0].unsqueeze(1) * size[1])
        return S, S
    E, D = cosines(a.read, b.read), cosines(a.write, b.write)
    if a.kind == "component":
        return E * D, (E * D).sign() * torch.minimum(E.abs(), D.abs())
    return (E + D) / 2, torch.minimum(E, D)

def redraw(rows, gen):
    """Random rows of the same lengths whose directions have the mean and covariance of these. Random in the whole space
    would be too easy a null: SPD's components must read and write what W does, and all of a dictionary may lie in few
    directions. 1,024 isotropic rows in 128 dimensions have a matched cosine of 0.27 by chance, and no pair at 0.7. It
    needs many rows: a single one comes out as itself."""
    unit = nnf.normalize(rows, dim=1)
    _, s, Vh = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    draw = torch.randn(len(rows), len(s), generator=gen).to(rows) * s / len(rows)**0.5 @ Vh + unit.mean(0)
    return nnf.normalize(draw, dim=1) * rows.norm(dim=1, keepdim=True)

@dataclass
class Matches:
    """P pairs of units, no unit in two pairs."""
    one_P: torch.Tensor         # of A
    other_P: torch.Tensor       # of B
    value_P: torch.Tensor       # S
    least_P: torch.Tensor       # what must reach 0.7

    def back(self):
        return Matches(self.other_P, self.one_P, self.value_P, self.least_P)

    def pairs(self, least=-math.inf):
        """The set of (unit of A, unit of B) that reach it."""
        keep = self.least_P >= least
        return set(zip(self.one_P[keep].tolist(), self.other_P[keep].tolist()))

    def within(self, unit_n):
        """The pairs of some of A's units."""
        keep = torch.isin(self.one_P, unit_n)
        return Matches(self.one_P[keep], self.other_P[keep], self.value_P[keep], self.least_P[keep])

    def mate(self, F):
        """The mate of each of A's F units, -1 if it has none."""
        return torch.full((F,), -1, device=self.one_P.device).index_put((self.one_P,), self.other_P)

def match(scored):
    """The Matches of [(A's units, B's units, S, least)]: one to one within each entry."""
    out = []
    for one_n, other_n, S, least in scored:
        j = torch.as_tensor(hungarian(S.cpu().numpy()), device=S.device)
        i = (j >= 0).nonzero().squeeze(1)
        out.append((one_n[i], other_n[j[i]], S[i, j[i]], least[i, j[i]]))
    return Matches(*map(torch.cat, zip(*out)))

def weight_matches(As, Bs):
    """Matches of the blocks of A with those of B. 1 s for 1,024 units."""
    return match([(a.unit_n, b.unit_n, *similarity(a, b)) for a, b in zip(As, Bs)])

def null_blocks(Bs, gen):
    """The null of weight space: B with random units. From all units, before the dead ones are left out."""
    return [replace(b, read=redraw(b.read, gen), write=redraw(b.write, gen)) for b in Bs]

def matched_by_one_side(As, Bs):
    """Without a matching of both: {"most": the mean over A's units of the largest |S| with any of B's, many to one;
    matched by what they write alone, "writes": their mean cosine (PW-MCC, Song et al. 2025, arXiv:2505.20254),
    "same_mate": share of pairs that what they read alone makes too; it needs no threshold}. Cosines in size for SPD,
    whose signs are arbitrary. The last two are None for MOLTs, whose units are not directions. 1 s for 1,024 units."""
    most = torch.cat([S.abs().amax(1) if S.numel() else S.new_zeros(len(S))
                      for S in (similarity(a, b)[0] for a, b in zip(As, Bs))])
    most = most.mean().item() if len(most) else None
    if As[0].kind == "map":
        return dict(most=most, writes=None, same_mate=None)
    size = torch.abs if As[0].kind == "component" else torch.Tensor.clone
    by_read, by_write = (match([(a.unit_n, b.unit_n, S, S) for a, b in zip(As, Bs) for S in
                                [size(cosines(getattr(a, part), getattr(b, part)))]]) for part in ("read", "write"))
    same = by_read.pairs() & by_write.pairs()
    return dict(most=most, writes=by_write.value_P.mean().item(), same_mate=len(same) / max(len(by_write.one_P), 1))

# ---------------------------------------------------------------------------------------------- activation space
def shifted(a, tokens):
    """A recording (recording.py) as if each unit had said the same so many tokens later, the last ones at the start."""
    token_E = (a.token_E + tokens) % a.N
    order = (a.unit_E * a.N + token_E).argsort()
    return replace(a, unit_E=a.unit_E[order], token_E=token_E[order], value_E=a.value_E[order], f_E=a.f_E[order])

def correlation(a, b, i_n, j_n, chunk=8192):
    """Pearson's r, n x n', of units i of one recording with units j of another of the same tokens. A unit that never
    varies correlates with nothing. 2 s for 1,024 units and 50,000 tokens."""
    def columns(a, i_n):
        new_F = torch.full((a.F,), -1, device=i_n.device).index_put((i_n,), torch.arange(len(i_n), device=i_n.device))
        keep = new_F[a.unit_E] >= 0
        unit, value = new_F[a.unit_E[keep]], a.value_E[keep].double()
        mean, square = (torch.zeros_like(i_n, dtype=torch.double).index_add_(0, unit, v) / a.N
                        for v in (value, value**2))
        std = (square - mean**2).clamp(min=0).sqrt()
        std = torch.where(std > 1e-6 * square.sqrt(), std, math.inf)
        return mean / std, (unit, a.token_E[keep], (value / std[unit]).float(), len(i_n))

    def dense(start, unit, token, value, n):
        here = (token >= start) & (token < start + chunk)
        return value.new_zeros(chunk, n).index_put((token[here] - start, unit[here]), value[here])

    (mean, one), (mean2, other) = columns(a, i_n), columns(b, j_n)
    product = sum((dense(start, *one).T @ dense(start, *other)).double() for start in range(0, a.N, chunk))
    return product / a.N - mean.unsqueeze(1) * mean2

def activation_matches(a, b, i_ns, j_ns):
    """Matches by r of two recordings, within each entry of i_ns and j_ns. Its null: b `shifted` by whole rows, after
    which two units are still on as often and at the same places of a row. 3 s as above."""
    size = torch.abs if (a.value_E < 0).any() or (b.value_E < 0).any() else torch.Tensor.clone
    rs = [size(correlation(a, b, i_n, j_n)) for i_n, j_n in zip(i_ns, j_ns)]
    return match([(i_n, j_n, r, r) for i_n, j_n, r in zip(i_ns, j_ns, rs)])

def jaccard(a, b, matches):
    """Tokens at which both units of a pair are on, over those at which one is, (P). Same null."""
    mate_E = matches.mate(a.F)[a.unit_E]
    unit, token, mate = (t[mate_E >= 0] for t in (a.unit_E, a.token_E, mate_E))
    both_F = torch.bincount(unit[b.at(mate, token) != 0], minlength=a.F)
    both_P = both_F[matches.one_P]
    return both_P / (a.on()[matches.one_P] + b.on()[matches.other_P] - both_P)
