"""Which unit of one decomposition is which unit of another?

Units of A and of B, dead ones left out, are matched one to one such that the sum of their
similarities S is largest (`hungarian`). What S is depends on what is compared:

    weights         do two units read and write alike? A unit reads along a vector v and writes
                    along a vector u. With the cosines c_read of the two v and c_write of the two u:
                        SAE, transcoder, CLT    S = (c_read + c_write) / 2
                        SPD                     S = c_read c_write, the cosine of the matrices
                                                v u^T, so that (v, u) and (-v, -u), which are one
                                                component, are alike
                        MOLT                    S = the cosine of the matrices U_t V_t, t a unit
    inputs          do they write alike, and get alike numbers from the inputs? S of weights, but
                    with what two units read compared over the inputs x of their block: v . v'
                    becomes v^T <x x^T> v', also in the lengths that a cosine divides by, < > being
                    the mean over tokens. Directions that the inputs never take count for nothing.
                    Units of SAEs, transcoders and CLTs have a bias, which stands in for what the
                    mean of x adds: <x x^T> is that of x - <x> for them
    activations     do they say alike things? S = Pearson's r of their values over tokens, or |r| if
                    a value of either decomposition is below 0

Units are never matched across SPD's two matrices, nor across the layers that a CLT reads: such a
group of units that may be matched is a Block.

A pair is shared where `least` is 0.7 or more. In weights and inputs that is the smaller of c_read
and c_write (SPD: of |c_read| and |c_write|, with the sign of c_read c_write; MOLT: S), in
activations S. Above this threshold, matching by c_read alone and by c_write alone mostly make the
same pairs; below the threshold they do not (Paulo and Belrose 2025, arXiv:2501.16615).

The cosine of two matrices is their Frobenius product, the sum of the products of their entries,
over the product of their Frobenius norms. What one may conclude from matched pairs, and what not,
is in metrics/stability.py.

A and B are two decompositions, As and Bs lists of their Blocks, a and b two of these Blocks or two
recordings (metrics/recording.py). F units of a decomposition, n of them in one block (n' in the
other), P matched pairs, E entries of a recording, N tokens (position 0 of each row left out), R
rows of tokens, T positions, D width of what a block's units read. S has no suffix: it is (n, n')
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf       # F is the number of units here

SHARED = 0.7                    # a pair is shared from here on
AROUND = (0.5, 0.7, 0.9)        # and these thresholds are shown


# -------------------------------------------------------------------------------- the best matching
def hungarian(S):
    """Which column does each row get, if the sum of S over these places is to be largest?

    No column is given twice. -1 for rows that go without, where there are more rows than columns.
    Shortest augmenting paths (Jonker and Volgenant 1987): O(rows^2 columns), 0.4 s for 1,024 x
    1,024. Raises ValueError where S has NaN, of which there is no best sum.
    """
    cost = -np.asarray(S, dtype=np.float64)
    if np.isnan(cost).any():
        raise ValueError("a similarity is NaN: there is no best matching")
    rows, columns = cost.shape
    if not rows:
        return np.zeros(0, int)
    if rows > columns:
        column_of = np.full(rows, -1)
        column_of[hungarian(-cost.T)] = np.arange(columns)
        return column_of

    # Prices u of rows, v of columns: u_i + v_j <= cost_ij, with equality where i and j are matched.
    # As long as this holds, the matching is the cheapest one for its rows.
    u = cost.min(1)
    v = np.zeros(columns)

    # Each row gets its cheapest column, if no row before it has.
    row_of = np.full(columns, -1)
    column_of = np.full(rows, -1)
    for i, j in enumerate(cost.argmin(1)):
        if row_of[j] < 0:
            row_of[j] = i
            column_of[i] = j

    for start in np.flatnonzero(column_of < 0):
        reached, distance, via = nearest_free_column(cost, u, v, row_of, start)
        # Raise and lower prices by as much as keeps the condition along the path.
        slack = distance[reached[-1]] - distance[reached]
        v[reached] -= slack
        u[row_of[reached[:-1]]] += slack[:-1]
        u[start] += distance[reached[-1]]
        # Walk back along the path: each column goes to the row that it was reached from, and the
        # column that this row gives up is the next.
        j = reached[-1]
        while j >= 0:
            i = via[j]
            given_up = column_of[i]
            row_of[j] = i
            column_of[i] = j
            j = given_up
    return column_of


def nearest_free_column(cost, u, v, row_of, start):
    """How does a row without a column get to a free one most cheaply? Dijkstra's search.

    A step goes from a row to any column, for cost - u - v, and for nothing on to the row that has
    this column. Returns (columns in the order in which they were reached, the last one free;
    distance of each column; the row from which each is reached).
    """
    columns = cost.shape[1]
    distance = np.full(columns, math.inf)
    via = np.full(columns, start)
    is_open = np.ones(columns, bool)
    reached = []
    i = start
    so_far = 0.
    while i >= 0:
        # Which columns are nearer by way of row i?
        through = so_far + cost[i] - u[i] - v
        via = np.where(is_open & (through < distance), i, via)
        distance = np.where(is_open, np.minimum(distance, through), distance)
        # On to the nearest column that has not been reached; -1: no row has it.
        j = np.where(is_open, distance, math.inf).argmin()
        is_open[j] = False
        reached.append(j)
        so_far = distance[j]
        i = row_of[j]
    return reached, distance, via


@dataclass
class Matches:
    """P pairs of a unit of A and a unit of B; no unit is in two pairs."""
    one_P: torch.Tensor         # the unit of A
    other_P: torch.Tensor       # the unit of B, its mate
    value_P: torch.Tensor       # S: what the matching adds up
    least_P: torch.Tensor       # what has to reach 0.7 for the pair to be shared

    def back(self):
        """The pairs as B sees them."""
        return Matches(self.other_P, self.one_P, self.value_P, self.least_P)

    def pairs(self, least=-math.inf):
        """Which pairs reach a threshold? The set of (unit of A, unit of B)."""
        reach_P = self.least_P >= least
        return set(zip(self.one_P[reach_P].tolist(), self.other_P[reach_P].tolist()))

    def within(self, unit_n):
        """Keep the pairs of some of A's units."""
        keep_P = torch.isin(self.one_P, unit_n)
        return Matches(self.one_P[keep_P], self.other_P[keep_P], self.value_P[keep_P],
                       self.least_P[keep_P])

    def mate(self, F):
        """Which unit of B is the mate of each of A's F units? -1: none."""
        none_F = torch.full((F,), -1, device=self.one_P.device)
        return none_F.index_put((self.one_P,), self.other_P)


def match(scored):
    """Match one to one within each block: Matches. scored: [(A's units, B's units, S, least)]."""
    parts = []
    for one_n, other_n, S, least in scored:
        column_n = torch.as_tensor(hungarian(S.cpu().numpy()), device=S.device)
        i = (column_n >= 0).nonzero().squeeze(1)
        j = column_n[i]
        parts.append((one_n[i], other_n[j], S[i, j], least[i, j]))
    return Matches(*(torch.cat(part) for part in zip(*parts)))


# --------------------------------------------------------------------------------- by their weights
@dataclass
class Block:
    """Units of a decomposition that could be each other's equals, by what they read and write.

    A unit has one row of read and one of write; a unit of a map, U_t V_t, has as many as its rank.
    """
    name: str
    kind: str                   # "dictionary", "component" or "map", as m.kind
    unit_n: torch.Tensor        # which of m's units
    read: torch.Tensor          # (rows, D)
    write: torch.Tensor         # (rows, what they write)
    owner: torch.Tensor         # which of the n units each row belongs to, 0 to n - 1
    root: torch.Tensor | None = None    # <x x^T>^(1/2) of the block's inputs, once known

    def where(self, keep_n):
        """The block without those units that are not to be kept."""
        keep_row = keep_n[self.owner]
        new_n = keep_n.cumsum(0) - 1        # the number of each unit among those that are kept
        return replace(self, unit_n=self.unit_n[keep_n], read=self.read[keep_row],
                       write=self.write[keep_row], owner=new_n[self.owner[keep_row]])

    def over_inputs(self):
        """The block as its inputs see it: plain cosines of what its units read are then those over
        the inputs, (v root) . (v' root) = v^T <x x^T> v'."""
        return replace(self, read=self.read @ self.root)


def blocks(m):
    """Sort the units of m into Blocks, in m's order."""
    parts = []
    first = 0
    for name, read, write, ranks in m.unit_directions():
        n = len(read) if ranks is None else len(ranks)
        unit_n = torch.arange(n, device=read.device)
        owner = unit_n if ranks is None else unit_n.repeat_interleave(ranks.to(unit_n))
        parts.append(Block(name, m.kind, first + unit_n, read.detach(), write.detach(), owner))
        first += n
    return parts


@torch.no_grad()
def with_inputs(Bs, m, gpt, rows_RT):
    """Give the blocks of m the root of their inputs on some rows, of dictionaries of how these
    vary: units that differ by a bias alone are the same, and units that share it alone need not be.
    2 s for 50,000 tokens."""
    found = []
    for block, x_ND in zip(Bs, m.unit_inputs(gpt, rows_RT), strict=True):
        if block.kind == "dictionary":
            x_ND = x_ND - x_ND.mean(0)
        found.append(replace(block, root=root_of(x_ND)))
    return found


def root_of(x_ND):
    """<x x^T>^(1/2), symmetric: (D, D)."""
    x_ND64 = x_ND.double()
    eigenvalues, Q = torch.linalg.eigh((x_ND64.T @ x_ND64) / len(x_ND))
    # Q diag(sqrt(eigenvalues)) Q^T; rounding may have left some a little below 0
    return ((Q * eigenvalues.clamp(min=0).sqrt()) @ Q.T).to(x_ND)


def cosines(A, B):
    """The cosine of each row of A with each row of B."""
    return nnf.normalize(A, dim=1) @ nnf.normalize(B, dim=1).T


def inner(a, b):
    """Frobenius product <U_s V_s, U_t V_t> of each map s of a with each map t of b: (n, n').

    A map is the sum of the outer products of its rows, and <v u^T, v' u'^T> = (v . v') (u . u'), so
    that no map has to be multiplied out.
    """
    of_rows = (a.read @ b.read.T) * (a.write @ b.write.T)
    # sum over the rows of each map of a, then over those of each map of b
    half = of_rows.new_zeros(len(a.unit_n), of_rows.shape[1]).index_add_(0, a.owner, of_rows)
    return half.new_zeros(len(half), len(b.unit_n)).index_add_(1, b.owner, half)


def similarity(a, b):
    """How similar is each unit of a to each of b? (S, least), (n, n') each, as the header says."""
    if a.kind == "map":
        size_a, size_b = (inner(c, c).diagonal().clamp(min=1e-12).sqrt() for c in (a, b))
        S = inner(a, b) / (size_a.unsqueeze(1) * size_b)
        return S, S
    c_read = cosines(a.read, b.read)
    c_write = cosines(a.write, b.write)
    if a.kind == "component":
        smaller = torch.minimum(c_read.abs(), c_write.abs())
        return c_read * c_write, (c_read * c_write).sign() * smaller
    return (c_read + c_write) / 2, torch.minimum(c_read, c_write)


def weight_matches(As, Bs):
    """Which units of A and B read and write alike? Matches of their blocks. 1 s for 1,024 units."""
    return match([(a.unit_n, b.unit_n, *similarity(a, b)) for a, b in zip(As, Bs)])


def redraw(rows, gen):
    """Draw random rows as long as these, in directions of the same mean and covariance as theirs.

    Random in the whole space would be too easy a null: SPD's components must read and write what W
    does, and all of a dictionary may lie in few directions. 1,024 isotropic rows in 128 dimensions
    have a matched cosine of 0.27 by chance, and no pair at 0.7. It needs many rows: a single one
    comes out as itself.
    """
    # With unit - mean = Q diag(s) Vh, the covariance is Vh^T diag(s^2) Vh / rows.
    unit = nnf.normalize(rows, dim=1)
    mean = unit.mean(0)
    _, s, Vh = torch.linalg.svd(unit - mean, full_matrices=False)
    normal = torch.randn(len(rows), len(s), generator=gen).to(rows)
    drawn = normal * s / len(rows)**0.5 @ Vh + mean
    return nnf.normalize(drawn, dim=1) * rows.norm(dim=1, keepdim=True)


def null_blocks(Bs, gen):
    """Draw random units in place of B's: the null of weights and of inputs.

    Give it all units, and leave out the dead ones afterwards: the more rows, the better the null.
    """
    return [replace(b, read=redraw(b.read, gen), write=redraw(b.write, gen)) for b in Bs]


# ---------------------------------------------------------------------------- by one side of a unit
def matched_by_one_side(As, Bs):
    """What comes out without matching by what units read and write together? Three numbers.

        most        mean over A's units of the largest |S| with any unit of B, many to one
        writes      mean cosine of the pairs that are matched by what units write alone (PW-MCC,
                    Song et al. 2025, arXiv:2505.20254)
        same_mate   share of these pairs that matching by what units read alone makes too: it needs
                    no threshold

    SPD's signs are arbitrary: |cosine|. writes and same_mate are None for MOLTs, whose units are
    not directions. 1 s for 1,024 units.
    """
    most = torch.cat([largest(similarity(a, b)[0].abs()) for a, b in zip(As, Bs)])
    most = most.mean().item() if len(most) else None
    if As[0].kind == "map":
        return dict(most=most, writes=None, same_mate=None)

    by_read = match([scored_by(a, b, a.read, b.read) for a, b in zip(As, Bs)])
    by_write = match([scored_by(a, b, a.write, b.write) for a, b in zip(As, Bs)])
    n_same = len(by_read.pairs() & by_write.pairs())
    return dict(most=most, writes=by_write.value_P.mean().item(),
                same_mate=n_same / max(len(by_write.one_P), 1))


def largest(S):
    """The largest entry of each row, 0 where there are no columns."""
    return S.amax(1) if S.numel() else S.new_zeros(len(S))


def scored_by(a, b, rows_a, rows_b):
    """What `match` needs to match the units of two blocks by one vector of each."""
    cosine = cosines(rows_a, rows_b)
    if a.kind == "component":
        cosine = cosine.abs()
    return a.unit_n, b.unit_n, cosine, cosine


# ----------------------------------------------------------------------------- by their activations
def shifted(recording, tokens):
    """Let each unit say everything so many tokens later, and what falls off the end at the start.

    A recording (metrics/recording.py). Shifted by whole rows it is the null of activations: units
    are on as often, and at the same positions of a row, but at the wrong text.
    """
    token_E = (recording.token_E + tokens) % recording.N
    order_E = (recording.unit_E * recording.N + token_E).argsort()      # by unit, then by token
    return replace(recording, unit_E=recording.unit_E[order_E], token_E=token_E[order_E],
                   value_E=recording.value_E[order_E], f_E=recording.f_E[order_E])


class Scaled(NamedTuple):
    """The values of n units over their standard deviations, where they are on."""
    mean_n: torch.Tensor        # mean / std of each unit, over all tokens
    unit_E: torch.Tensor        # 0 to n - 1
    token_E: torch.Tensor
    value_E: torch.Tensor       # value / std

    def dense(self, start, tokens):
        """The values at `tokens` tokens from start on, zeros included: (tokens, n)."""
        is_here_E = (self.token_E >= start) & (self.token_E < start + tokens)
        place = (self.token_E[is_here_E] - start, self.unit_E[is_here_E])
        zeros = self.value_E.new_zeros(tokens, len(self.mean_n))
        return zeros.index_put(place, self.value_E[is_here_E])


def divide_by_std(recording, unit_n):
    """Divide the values of some units by their standard deviations over all tokens: a Scaled."""
    # Keep the entries of these units, numbered from 0.
    new_F = torch.full((recording.F,), -1, device=unit_n.device)
    new_F = new_F.index_put((unit_n,), torch.arange(len(unit_n), device=unit_n.device))
    is_kept_E = new_F[recording.unit_E] >= 0
    unit_E = new_F[recording.unit_E[is_kept_E]]
    value_E = recording.value_E[is_kept_E].double()

    # Moments over all tokens: where a unit is off, its value is 0.
    zero_n = torch.zeros_like(unit_n, dtype=torch.double)
    mean_n = zero_n.index_add(0, unit_E, value_E) / recording.N
    square_n = zero_n.index_add(0, unit_E, value_E**2) / recording.N
    std_n = (square_n - mean_n**2).clamp(min=0).sqrt()
    # A unit that never varies correlates with nothing: over infinity, its values are 0.
    std_n = torch.where(std_n > 1e-6 * square_n.sqrt(), std_n, math.inf)
    return Scaled(mean_n / std_n, unit_E, recording.token_E[is_kept_E],
                  (value_E / std_n[unit_E]).float())


def correlation(a, b, i_n, j_n, chunk=8192):
    """How alike are the values of units i of recording a and units j of recording b? Pearson's r.

        r = <x y> - <x> <y>     of x and y over their standard deviations; (n, n')

    over the tokens, which both have recorded; 0 for a unit that never varies. 2 s for 1,024 units
    and 50,000 tokens.
    """
    x = divide_by_std(a, i_n)
    y = divide_by_std(b, j_n)
    # a chunk of tokens at a time, which bounds the memory
    product = 0
    for start in range(0, a.N, chunk):
        product = product + (x.dense(start, chunk).T @ y.dense(start, chunk)).double()
    return product / a.N - x.mean_n.unsqueeze(1) * y.mean_n


def unsigned(r, a, b):
    """r of what units of two recordings say, or |r| if a value of either is below 0: the sign of a
    component is arbitrary."""
    is_signed = (a.value_E < 0).any() or (b.value_E < 0).any()
    return r.abs() if is_signed else r


def activation_matches(a, b, i_ns, j_ns):
    """Which units of two recordings say alike things? Matches by r, or by |r| if a unit has a sign.

    i_ns, j_ns: the units of each block of a and of b; a unit is matched within its block. Null: b
    `shifted` by whole rows. 3 s for 1,024 units and 50,000 tokens.
    """
    scored = []
    for i_n, j_n in zip(i_ns, j_ns):
        r = unsigned(correlation(a, b, i_n, j_n), a, b)
        scored.append((i_n, j_n, r, r))
    return match(scored)


def jaccard(a, b, matches):
    """Are the two units of each pair on at the same tokens of two recordings? (P)

    The number of tokens at which both are on over that at which one is: 0 = never together, 1 =
    always. Null: b `shifted` by whole rows.
    """
    mate_E = matches.mate(a.F)[a.unit_E]
    has_mate_E = mate_E >= 0
    unit_E = a.unit_E[has_mate_E]
    is_mate_on_E = b.at(mate_E[has_mate_E], a.token_E[has_mate_E]) != 0

    both_F = torch.bincount(unit_E[is_mate_on_E], minlength=a.F)
    both_P = both_F[matches.one_P]
    return both_P / (a.on()[matches.one_P] + b.on()[matches.other_P] - both_P)
