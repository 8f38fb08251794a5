"""What several seeds say of a number: its mean and interval, and whether two rows differ by more than noise.
A seed's number has the noise of its training and of its measurement, whose random choices it draws as well: the spread
over seeds holds both.

    t = (a - b) / sqrt(s_a^2 + s_b^2),   nu = (s_a^2 + s_b^2)^2 / (s_a^4 / nu_a + s_b^4 / nu_b)
s: standard error of a mean over S seeds, nu_a = nu_b = S - 1; p = P(|t_nu| > |t|), multiplied as Holm says.
Welch 1947, Biometrika 34; Holm 1979, Scandinavian Journal of Statistics 6.
"""
import math
import statistics

import numpy as np

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t at 0.975, 1 to 9 degrees

def over_seeds(values, within=None):
    """Mean and half of the 95 % t interval, which one seed has not: of it, `within`. None if no seed has a number."""
    values = [v for v in values if isinstance(v, (int, float))]
    if not values:
        return None
    half = T975[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else within
    return dict(mean=statistics.mean(values), half=half, values=values)

def of_seeds(known, S):
    """The same of numbers that are of all S seeds at once, with the jackknife's standard error beside them (KEY_se)."""
    return {key: dict(mean=v, half=T975[S - 2] * known[f"{key}_se"] if f"{key}_se" in known else None, values=[])
            for key, v in known.items() if isinstance(v, (int, float)) and not key.endswith("_se")}

def beyond(t, nu):
    """P(|t_nu| > |t|) of Student's t. With x = sqrt(nu) tan(angle) its density is that of cos(angle)^(nu - 1): midpoint
    rule."""
    def area(first, n=4096):
        step = (math.pi / 2 - first) / n
        return step * (np.cos(first + (np.arange(n) + 0.5) * step) ** (nu - 1)).sum()
    return float(area(math.atan(abs(t) / nu ** 0.5)) / area(0.))

def welch(a, b, S):
    """p of no difference between two numbers {mean, half} over S seeds each."""
    difference, errors = abs(a["mean"] - b["mean"]), [found["half"] / T975[S - 2] for found in (a, b)]
    if not any(errors):
        return float(not difference)
    nu = (S - 1) * sum(s ** 2 for s in errors) ** 2 / sum(s ** 4 for s in errors)
    return beyond(difference / math.hypot(*errors), nu)

def holm(ps):
    """{what: p} -> {what: p adjusted for having asked them all}: times the number of those not smaller, in order."""
    out, least = {}, 0.
    for i, what in enumerate(sorted(ps, key=ps.get)):
        out[what] = least = max(least, min(1., (len(ps) - i) * ps[what]))
    return out

def differences(rows, base, keys, S):
    """{(name, key): (by how much a row's number is above that of the row `base`, Holm's p)} of the methods, not the
    floors, and of numbers that both have from all seeds."""
    by_name = {row["name"]: row["metrics"] for row in rows if not row["floor"]}
    def known(found):           # from all seeds: one by one, or at once
        return found and found["half"] is not None and len(found["values"]) in (0, S)
    own = by_name.pop(base, {})
    asked = {(name, key): (found[key], own[key]) for name, found in by_name.items() for key in keys
             if S > 1 and known(found.get(key)) and known(own.get(key))}
    ps = holm({what: welch(*pair, S) for what, pair in asked.items()})
    return {what: (a["mean"] - b["mean"], ps[what]) for what, (a, b) in asked.items()}
