"""Does a unit fall into parts when a decomposition is given more units?

A unit that splits is on where some units of the larger decomposition are, each at some of its
tokens and nearly nowhere else. The correlation of what they say does not show it: two units that
share one's tokens evenly correlate with it by .7 at best, and where one has more of them, the other
by less. So this asks where units are on. A token counts by the square of what the unit says there:
E(j | i) is the share of what j says at the tokens where i is on, that is, of the sum of its squared
values. (By tokens alone two seeds of a transcoder agree on .30 of their units, which are weakly on
at other tokens each, by this on .72.)

    i stays as j        E(i | j) >= 0.8 and E(j | i) >= 0.8
    j is a part of i    E(j | i) >= 0.9 and E(i | j) < 0.8, and i and j are on together at least
                        three times as often as by chance

So 4 : 1 is no split: the larger one stays. A component has its parts in its own matrix. The null is
`by_chance` in the place of the larger decomposition. Two seeds of one size are a floor, but their
units are on as often as each other, while those of a larger decomposition are rarer, and lie inside
others more easily.

S units of the small decomposition, L of the large one, F or G of either, M memberships of parts
"""
from dataclasses import replace

import torch

from metrics import mapping

SAME = 0.8          # least share of what each of two units says where the other is on, if they are
                    # the same ..
INSIDE = 0.9        # .. and of what a part says where the whole is on


def parts(small, large):
    """How many units fall into parts? Of two `sizes.Sized`, a flat dict.

        parts       share of the small one's units that have two parts or more
        covered     share of what these units say where one of their parts is on, mean over them;
                    None if there are none
        stays       share of the small one's units that stay as one of the large one's
        inside      share of the large one's units that are a part

    Units count that are alive and on at mapping.OFTEN tokens; None where there are none."""
    one_S = often(small)
    other_L = often(large)
    if not len(one_S) or not len(other_L):
        return dict.fromkeys(("parts", "covered", "stays", "inside"))
    one = mapping.select(small.recording, one_S)
    other = mapping.select(large.recording, other_L)
    of_one_SL = said_where(one, other)
    of_other_SL = said_where(other, one).T
    is_comparable_SL = matrices(small)[one_S].unsqueeze(1) == matrices(large)[other_L]
    is_lifted_SL = mapping.coactivation(one, other).lift() >= mapping.LIFT
    stays_SL = is_comparable_SL & (of_one_SL >= SAME) & (of_other_SL >= SAME)
    is_part_SL = is_comparable_SL & is_lifted_SL & (of_one_SL < SAME) & (of_other_SL >= INSIDE)

    has_parts_S = is_part_SL.sum(1) >= 2
    return dict(parts=has_parts_S.double().mean().item(),
                covered=covered(one, other, is_part_SL, has_parts_S.nonzero().squeeze(1)),
                stays=stays_SL.any(1).double().mean().item(),
                inside=is_part_SL.any(0).double().mean().item())


def said_where(a, b):
    """Which share of what unit i of a says does it say where unit j of b is on? E(i | j), (F, G)
    for F units of a and G of b."""
    squared = replace(a, value_E=a.value_E ** 2)
    total_F = squared.sums(torch.ones_like(a.x_ND[:, :1]), squared.value_E)
    return mapping.products(squared, mapping.on_only(b)) / total_F.clamp(min=1e-12)


def covered(one, other, is_part_SL, whole_Q):
    """Which share of what a unit says does it say where one of its parts is on? The mean over Q
    units."""
    if not len(whole_Q):
        return None
    group_M, unit_M = is_part_SL[whole_Q].nonzero(as_tuple=True)
    united = mapping.unite(other, unit_M, group_M, len(whole_Q))
    return said_where(mapping.select(one, whole_Q), united).diagonal().mean().item()


def often(sized):
    """Which units are alive, and on often enough to have parts, or to be one?"""
    often_Q = mapping.frequent(sized.recording)
    return often_Q[sized.is_alive_F[often_Q]]


def matrices(sized):
    """Which of the blocks is each unit in? (F): of components, that of their matrix."""
    block_F = torch.zeros_like(sized.is_alive_F, dtype=torch.long)
    for number, block in enumerate(sized.blocks):
        block_F[block.unit_n] = number
    return block_F


def by_chance(large, row, gen):
    """Make the null of a large one: its units at the wrong text. row: tokens of one, T - 1."""
    return large._replace(recording=mapping.by_chance(large.recording, row, gen))
