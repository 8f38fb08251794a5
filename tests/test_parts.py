"""Parts against closed forms: units that stay, split evenly or not, lose a piece, merge, or lie inside by chance."""
import pytest
import torch

import common
from metrics import mapping, parts
from metrics.matching import Block
from test_sizes import sized

N, S, ON = 6000, 8, 300             # unit i of the small one is on at tokens 300 i to 300 (i + 1) - 1


def units(*runs):
    """A Sized of units that are on from one token to another each: [start, end)."""
    on_NF = torch.zeros(N, len(runs))
    for unit, (start, end) in enumerate(runs):
        on_NF[start:end, unit] = 1.
    return sized(torch.eye(len(runs)), torch.eye(len(runs)), on_NF=on_NF)


def small():
    return units(*[(ON * i, ON * (i + 1)) for i in range(S)])


def cut(*shares):
    """Each unit of small() cut into runs of these shares of its tokens, which need not add up to 1."""
    runs = []
    for i in range(S):
        start = ON * i
        for share in shares:
            runs.append((start, start + round(share * ON)))
            start += round(share * ON)
    return units(*runs)


def test_a_unit_stays_as_itself_and_has_no_parts():
    assert parts.parts(small(), small()) == dict(parts=0, covered=None, stays=1, inside=0)


@pytest.mark.parametrize("shares, found", [
    ((.5, .5), dict(parts=1, covered=1, stays=0, inside=1)),
    ((.6, .4), dict(parts=1, covered=1, stays=0, inside=1)),
    ((.79, .21), dict(parts=1, covered=1, stays=0, inside=1)),
    ((.8, .2), dict(parts=0, covered=None, stays=1, inside=.5)),        # it stays, and a piece has come off
    ((.5,), dict(parts=0, covered=None, stays=0, inside=1)),            # one part is no split
    ((.25, .25, .25), dict(parts=1, covered=.75, stays=0, inside=1)),
    ((.2,) * 5, dict(parts=1, covered=1, stays=0, inside=1)),
    ((.1, .1), dict(parts=0, covered=None, stays=0, inside=None))])     # on at fewer tokens than OFTEN
def test_split_units_have_parts_however_uneven(shares, found):
    expected = dict.fromkeys(found) if found["inside"] is None else pytest.approx(found)
    assert parts.parts(small(), cut(*shares)) == expected


def test_merged_units_have_no_parts_and_parts_see_growth_alone():
    whole = cut(.5, .5)
    assert parts.parts(whole, small()) == dict(parts=0, covered=None, stays=0, inside=0)


def test_one_that_is_on_at_more_than_a_third_of_the_tokens_has_no_parts():
    runs = (0, 100), (100, 200)
    assert parts.parts(units((0, 1990)), units(*runs))["parts"] == 1
    assert parts.parts(units((0, 2010)), units(*runs))["parts"] == 0


def test_a_part_may_be_on_elsewhere_at_a_tenth_of_its_tokens():
    whole = units((0, 300))
    assert parts.parts(whole, units((0, 100), (210, 310)))["inside"] == 1           # 10 of 100
    assert parts.parts(whole, units((0, 100), (211, 311)))["inside"] == .5


def test_components_have_parts_in_their_own_matrix():
    def in_matrices(one, n_in):
        n = one.recording.F
        blocks = [Block(name, "component", at, torch.eye(n)[at], torch.eye(n)[at], torch.arange(len(at)))
                  for name, at in (("in", torch.arange(n_in)), ("out", torch.arange(n_in, n)))]
        return one._replace(blocks=blocks)

    one = in_matrices(units((0, 300), (300, 600)), 1)
    assert parts.parts(one, in_matrices(units((0, 150), (150, 300), (300, 450), (450, 600)), 2))["parts"] == 1
    other = in_matrices(units((0, 150), (300, 450), (150, 300), (450, 600)), 2)     # one part in each
    assert parts.parts(one, other) == dict(parts=0, covered=None, stays=0, inside=.5)


def test_dead_units_do_not_count():
    large = cut(.5, .5)
    dead = large._replace(is_alive_F=torch.arange(2 * S) % 2 == 0)
    assert parts.parts(small(), dead) == dict(parts=0, covered=None, stays=0, inside=1)
    none = large._replace(is_alive_F=torch.zeros(2 * S, dtype=torch.bool))
    assert set(parts.parts(small(), none).values()) == set(parts.parts(none, small()).values()) == {None}


def test_the_wrong_text_has_no_parts():
    null = parts.by_chance(cut(.5, .5), 60, common.generator(0, "null"))
    assert (null.recording.on() == ON // 2).all()
    found = parts.parts(small(), null)
    assert found["parts"] <= 1 / S and found["inside"] <= .3


def test_tokens_count_by_the_square_of_what_is_said():
    """A unit that is weakly on where nothing of the other is, at as many tokens: 300 for .1^2 * 300."""
    def weak(one, start):
        value_NF = torch.zeros(N, one.recording.F)
        value_NF[one.recording.token_E, one.recording.unit_E] = -2.         # what components say has a sign
        value_NF[start:start + 300] += .2
        return sized(torch.eye(one.recording.F), torch.eye(one.recording.F), on_NF=value_NF)

    assert parts.parts(weak(small(), 5000), weak(small(), 5500))["stays"] == 1
    halves = parts.parts(weak(small(), 5000), weak(cut(.5, .5), 5500))
    assert halves["parts"] == 1 and halves["covered"] == pytest.approx(1 / 1.01, rel=1e-3)


def test_it_is_brute_force_on_random_units():
    torch.manual_seed(0)
    one_NF, other_NF = (torch.rand(2000, n) < .05 for n in (6, 20))
    for k in range(12):                             # parts of unit k // 2, not quite inside
        inside = one_NF[:, k // 2] & (torch.rand(2000) < .7)
        other_NF[:, k] = inside | (torch.rand(2000) < .0015 * (k % 4))
    one, other = (sized(torch.eye(x.shape[1]), torch.eye(x.shape[1]), on_NF=x.float()) for x in (one_NF, other_NF))
    n_parts, stays, is_inside, covered = [], [], set(), []
    for i in range(6):
        n_i, own, same = one_NF[:, i].sum(), [], []
        for j in range(20):
            n_j, both = other_NF[:, j].sum(), (one_NF[:, i] & other_NF[:, j]).sum()
            same.append(both >= .8 * max(n_i, n_j))
            if n_j >= mapping.OFTEN and both >= .9 * n_j and both < .8 * n_i and both * 2000 >= 3 * n_i * n_j:
                own.append(j)
        n_parts.append(len(own)), is_inside.update(own), stays.append(any(same))
        if len(own) >= 2:
            covered.append(((one_NF[:, i] & other_NF[:, own].any(1)).sum() / one_NF[:, i].sum()).item())
    often = (other_NF.sum(0) >= mapping.OFTEN).sum().item()
    assert 0 < sum(n >= 2 for n in n_parts) < 6 and (one_NF.sum(0) >= mapping.OFTEN).all()
    assert parts.parts(one, other) == pytest.approx(dict(
        parts=sum(n >= 2 for n in n_parts) / 6, covered=sum(covered) / len(covered), stays=sum(stays) / 6,
        inside=len(is_inside) / often))
