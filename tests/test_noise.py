"""Intervals over seeds and differences beyond noise, against tables, closed forms and chance itself."""
import math

import numpy as np
import pytest

from report import noise


def test_means_and_intervals_over_seeds():
    by_hand = noise.over_seeds([1, 2, 3, None])
    assert by_hand == dict(mean=2, half=pytest.approx(4.303 / 3 ** 0.5), values=[1, 2, 3])
    assert noise.over_seeds([None]) is None and noise.over_seeds([5.])["half"] is None
    assert noise.over_seeds([5.], 0.5)["half"] == 0.5 and noise.over_seeds([5., 5.], 0.5)["half"] == 0
    known = noise.of_seeds(dict(a=1., a_se=0.1, b=2, text="x"), 3)
    assert known == dict(a=dict(mean=1., half=pytest.approx(0.4303), values=[]), b=dict(mean=2, half=None, values=[]))


def test_tails_of_students_t():
    for t in (0., 0.3, 2., 40.):
        assert noise.beyond(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t))                # Cauchy's
        assert noise.beyond(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert noise.beyond(1.959964, 1e4) == pytest.approx(0.05, rel=1e-3)                             # nearly a Gaussian's
    for nu, t in enumerate(noise.T975, 1):
        assert noise.beyond(t, nu) == pytest.approx(0.05, rel=1e-3)


def test_welch_by_hand_and_by_chance():
    a, b = noise.over_seeds([1., 2., 3.]), noise.over_seeds([5., 7., 9.])
    errors = 1 / 3, 4 / 3                                                       # s^2 of the means, 2 degrees each
    want = noise.beyond(5 / sum(errors) ** 0.5, sum(errors) ** 2 / (errors[0] ** 2 / 2 + errors[1] ** 2 / 2))
    assert noise.welch(a, b, 3) == noise.welch(b, a, 3) == pytest.approx(want, rel=1e-3)
    exact = noise.over_seeds([2., 2., 2.])                                      # then it is the test of one sample
    assert noise.welch(b, exact, 3) == pytest.approx(noise.beyond(5 / (4 / 3) ** 0.5, 2), rel=1e-3)
    assert noise.welch(exact, exact, 3) == 1 and noise.welch(exact, dict(mean=3., half=0.), 3) == 0
    gen = np.random.default_rng(0)
    ps = [noise.welch(*(noise.over_seeds(list(gen.normal(0, scale, 3))) for scale in (1, 1)), 3) for _ in range(2000)]
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.06                           # a little too careful with 3 seeds


def test_holm_by_hand():
    assert noise.holm(dict(a=0.01, b=0.04, c=0.03, d=0.005)) == pytest.approx(dict(d=0.02, a=0.03, c=0.06, b=0.06))
    assert noise.holm(dict(a=0.9, b=0.6)) == dict(b=1., a=1.) and noise.holm({}) == {}


def rows(**of):
    return [dict(name=name, floor=name == "floor", metrics={"x": noise.over_seeds(values)}) for name, values in of.items()]


def test_differences_are_asked_of_what_all_seeds_have():
    some = rows(base=[1., 1.1, 1.2], a=[3., 3.1, 3.3], near=[1., 1.2, 1.3], two=[1., 2.], floor=[0., 0.1, 0.2])
    found = noise.differences(some, "base", ("x", "y"), 3)
    assert list(found) == [("a", "x"), ("near", "x")]
    by, p = found["a", "x"]
    assert by == pytest.approx(9.4 / 3 - 1.1)
    assert p == pytest.approx(2 * noise.welch(some[1]["metrics"]["x"], some[0]["metrics"]["x"], 3)) and p < 0.01
    assert found["near", "x"][1] > 0.3
    assert noise.differences(some, "other", ("x",), 3) == {} == noise.differences(rows(base=[1.], a=[2.]), "base", "x", 1)
    some[1]["metrics"]["x"] = dict(mean=3., half=0.1, values=[])                # known of all seeds at once
    assert noise.differences(some, "base", ("x",), 3)["a", "x"][0] == pytest.approx(1.9)
