"""What do several seeds say of a number? Its mean and interval, and whether two rows differ by more
than noise.

A seed's number holds the noise of its training and of its measurement, since the measurement's
random choices are drawn anew with each seed: the spread over seeds holds both.

    t = (a - b) / sqrt(s_a^2 + s_b^2)
    nu = (s_a^2 + s_b^2)^2 / (s_a^4 / (S - 1) + s_b^4 / (S - 1))
    p = P(|t_nu| > |t|)

S seeds; s: standard error of a row's mean over them; nu: degrees of freedom. Each p is multiplied
by how many differences are asked about, as Holm says.
Welch 1947, Biometrika 34; Holm 1979, Scandinavian Journal of Statistics 6.
"""
import math
import statistics

import numpy as np

# Student's t at 0.975 for 1 to 9 degrees of freedom; S seeds have S - 1, so theirs is T975[S - 2]
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SURE = 0.05         # the largest p, after Holm, of a difference that is no noise


# ------------------------------------------------------------------------------ a mean, an interval
def over_seeds(values, within=None):
    """Average a number over seeds, with half the width of its 95 % t interval: {mean, half,
    values}.

    One seed has no spread over seeds; its interval over test stories, `within`, is used instead.
    Returns None if no seed has a number."""
    values = [value for value in values if isinstance(value, (int, float))]
    if not values:
        return None
    half = within
    if len(values) > 1:
        t = T975[min(len(values), 10) - 2]
        half = t * statistics.stdev(values) / len(values) ** 0.5
    return dict(mean=statistics.mean(values), half=half, values=values)


def of_seeds(numbers, S):
    """Give numbers that are found from all S seeds at once the form of `over_seeds`.

    numbers: {KEY: number, KEY_se: its jackknife's standard error, if it has one}. No seed has a
    value of its own: values are empty."""
    metrics = {}
    for key, number in numbers.items():
        if isinstance(number, (int, float)) and not key.endswith("_se"):
            error = numbers.get(f"{key}_se")
            half = None if error is None else T975[S - 2] * error
            metrics[key] = dict(mean=number, half=half, values=[])
    return metrics


# ----------------------------------------------------------------------------------- a difference
def beyond(t, nu):
    """How often does chance give more than |t|? P(|t_nu| > |t|) of Student's t.

    With x = sqrt(nu) tan(angle) the density of t_nu is that of cos(angle)^(nu - 1): a ratio of two
    areas, from the angle of |t| and from 0, both to pi / 2."""
    tail = area_of_cosine(math.atan(abs(t) / nu ** 0.5), nu - 1)
    return float(tail / area_of_cosine(0., nu - 1))


def area_of_cosine(first, power, n=4096):
    """Integrate cos(angle)^power from `first` to pi / 2, with the midpoints of n steps."""
    step = (math.pi / 2 - first) / n
    midpoints = first + (np.arange(n) + 0.5) * step
    return step * (np.cos(midpoints) ** power).sum()


def welch(a, b, S):
    """How surprising is the difference of two means if there is none? p, between 0 and 1.

    a, b: {mean, half} over S seeds each. Without any spread p is 1 if they are equal, else 0."""
    difference = abs(a["mean"] - b["mean"])
    error_a = a["half"] / T975[S - 2]
    error_b = b["half"] / T975[S - 2]
    if error_a == 0 and error_b == 0:
        return float(difference == 0)
    nu = (S - 1) * (error_a ** 2 + error_b ** 2) ** 2 / (error_a ** 4 + error_b ** 4)
    return beyond(difference / math.hypot(error_a, error_b), nu)


def holm(ps):
    """Adjust each p for having asked about all of them: {what: p} -> {what: adjusted p}.

    The smallest of n is multiplied by n, the next by n - 1, and so on; none may end below one that
    was smaller than it, and none above 1."""
    adjusted = {}
    least = 0.
    for i, what in enumerate(sorted(ps, key=ps.get)):
        least = max(least, min(1., (len(ps) - i) * ps[what]))
        adjusted[what] = least
    return adjusted


def differences(rows, base, keys, S):
    """By how much is each method above the row `base`, and how surprising is that?
    {(name, key): (difference of means, Holm's p)}.

    Floors are left out, and numbers that one of the two does not have from all S seeds."""
    if S < 2:
        return {}
    by_name = {row["name"]: row["metrics"] for row in rows if not row["floor"]}
    base_metrics = by_name.pop(base, {})
    pairs = {}
    for name, metrics in by_name.items():
        for key in keys:
            pairs[name, key] = metrics.get(key), base_metrics.get(key)
    found = {}
    for what, p in surprise(pairs, S).items():
        a, b = pairs[what]
        found[what] = a["mean"] - b["mean"], p
    return found


def surprise(pairs, S):
    """How surprising is the difference of each two numbers, {what: (a, b)}, for having asked about
    all of them? {what: Holm's p}, without those that one of the two does not have from all S
    seeds."""
    ps = {what: welch(a, b, S) for what, (a, b) in pairs.items()
          if is_of_all_seeds(a, S) and is_of_all_seeds(b, S)}
    return holm(ps)


def is_of_all_seeds(metric, S):
    """Has it an interval over all S seeds: a value of each, or none where all were asked at
    once?"""
    return metric is not None and metric["half"] is not None and len(metric["values"]) in (0, S)
