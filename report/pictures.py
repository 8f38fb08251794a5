"""The pictures of what compare.py found: each a function of results.json's content, none where it has no numbers.

    pictures.draw(results, "results")       # curves, words, stability, alive, spectrum, attack: .png
Methods are told apart by their markers as well, so that grey is enough; floors are grey and dotted.
"""
import statistics
from pathlib import Path

from report.curve import save_picture

COLORS = "C0", "C1", "C2", "C3", "C4", "C5", "C8", "C9", "C6", "k"       # C7 is grey, as floors are
SHARED = {"weights_shared_0.7": "read and write alike", "activations_shared_0.7": "say alike over tokens"}


def draw(results, out):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no pictures: they need matplotlib, pip install matplotlib")
        return
    ok = [row for row in results["rows"] if not row["failed"]]
    middle, style = [row for row in ok if row["middle"]], styles(ok)
    for picture, rows, has in (
            (curves, ok, lambda row: "ce_recovered" in row["metrics"]),
            (words, middle, lambda row: "rule_det_hard" in row["metrics"]),
            (stability, middle, lambda row: all(key in row["metrics"] for key in SHARED)),
            (alive, middle, lambda row: row["alive_curve"]),
            (spectrum, middle, lambda row: row["spectrum"]),
            (attack, middle, lambda row: row["attack"])):
        if some := [row for row in rows if has(row)]:
            save_picture(picture(some, style, results["columns"]), Path(out) / f"{picture.__name__}.png")


def styles(rows):
    """{name: how its line looks}."""
    floors = {row["name"] for row in rows if row["floor"]}
    how = lambda i, name: (dict(color="0.6", ls=":") if name in floors else
                           dict(color=COLORS[i % len(COLORS)], ls=("-", "--", "-.")[i % 3]))
    return {name: how(i, name) | dict(marker="osD^v<>PX*pd12x+"[i % 16], mfc="w", label=name)
            for i, name in enumerate(dict.fromkeys(row["name"] for row in rows))}


def blank(width, height):
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def of(row, key):
    """Mean and half interval."""
    found = row["metrics"][key]
    return found["mean"], found["half"] or 0


def mean_of(dicts):
    """The mean of {x: y} over seeds as xs, ys."""
    return [float(x) for x in dicts[0]], [statistics.mean(d[x] for d in dicts) for x in dicts[0]]


def legend(figure, ax):
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)


def curves(rows, style, columns):
    """CE recovered against L0 and against active parameters, on a scale of what is lost."""
    from matplotlib.ticker import LogLocator, NullFormatter
    figure = blank(10, 4.2)
    lost = lambda v: min(max(1 - v, 5e-4), 1.5)
    for ax, axis in zip(figure.subplots(1, 2, sharey=True), ("l0", "active_params")):
        for name, how in style.items():
            points = sorted((of(row, axis)[0], *of(row, "ce_recovered")) for row in rows if row["name"] == name)
            if points:
                x, y, half = zip(*points)
                ax.plot(x, [*map(lost, y)], **how)
                ax.fill_between(x, [lost(a - h) for a, h in zip(y, half)], [lost(a + h) for a, h in zip(y, half)],
                                alpha=0.2, color=how["color"], lw=0)
        ax.set_xlabel(columns[axis]["text"], fontsize=9)
        ax.set(xscale="log", yscale="log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    ax.invert_yaxis()                   # shared by both
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda v, _: f"{1 - v:.6g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set(ylabel="CE recovered (mean ablation = 0)")
    legend(figure, figure.axes[0])
    return figure


def words(rows, style, columns):
    """How well rules in words tell where a unit is on, against chance and random directions."""
    figure = blank(8, 0.35 * len(rows) + 1.2)
    ax, (mean, half) = figure.subplots(), zip(*(of(row, "rule_det_hard") for row in rows))
    ax.barh([row["name"] for row in rows], [m - 0.5 for m in mean], left=0.5, xerr=half, color="0.75", edgecolor="k",
            capsize=3)
    nulls = [(row["metrics"]["rule_det_hard"]["null"], row["name"]) for row in rows if not row["floor"]]
    if nulls := [pair for pair in nulls if pair[0] is not None]:
        ax.plot(*zip(*nulls), "k|", ms=14, mew=2, label="random directions that are on as often")
        figure.legend(loc="outside upper center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="balanced accuracy of rules in words against hard negatives (chance 0.5)")
    return figure


def stability(rows, style, columns):
    """The share of units that another seed finds again, and what chance finds."""
    figure = blank(8, 0.5 * len(rows) + 1.2)
    ax, y = figure.subplots(), range(len(rows))
    for side, (key, label), color in zip((-0.18, 0.18), SHARED.items(), ("0.85", "0.55")):
        at, (mean, half) = [v + side for v in y], zip(*(of(row, key) for row in rows))
        ax.barh(at, mean, 0.36, xerr=half, color=color, edgecolor="k", capsize=3, label=label)
        ax.plot([row["metrics"][key]["null"] or 0 for row in rows], at, "k|", ms=9, mew=2,
                label="chance" if side > 0 else None)
    ax.set(yticks=y, yticklabels=[row["name"] for row in rows], xlim=(0, 1),
           xlabel="share of the alive units that another seed finds again (0.7 or more)")
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def alive(rows, style, columns):
    """Alive units over the threshold that counts as on."""
    figure = blank(8, 4.2)
    ax = figure.subplots()
    for row in rows:
        ax.plot(*mean_of([{level: counts[1] for level, counts in curve.items()} for curve in row["alive_curve"]]),
                **style[row["name"]])
    ax.set(xlabel="threshold, as a share of the unit's largest value", ylabel="units above it at 10 tokens or more",
           yscale="log")
    ax.grid(alpha=0.3)
    legend(figure, ax)
    return figure


def spectrum(rows, style, columns):
    """Mean causal importance of the components of each matrix, largest first."""
    figure = blank(8, 3.6)
    for ax, site in zip(figure.subplots(1, 2, sharey=True), rows[0]["spectrum"][0]):
        for row in rows:
            mean = [statistics.mean(values) for values in zip(*(seed[site] for seed in row["spectrum"]))]
            ax.plot(range(1, len(mean) + 1), [max(v, 1e-5) for v in mean], markevery=16, **style[row["name"]])
        ax.set(xlabel=f"component of W_{site}, by its mean", yscale="log", ylim=(1e-5, 1.2))
        ax.grid(alpha=0.3)
    figure.axes[0].set(ylabel="mean causal importance")
    ax.legend(fontsize=8)
    return figure


def attack(rows, style, columns):
    """KL under attacks on the masks, by their budget: mean over seeds, and a band from the least to the most."""
    figure = blank(6, 4)
    ax = figure.subplots()
    for row in rows:
        budget, mean = mean_of(row["attack"])
        per_seed = [list(seed.values()) for seed in row["attack"]]
        ax.plot(budget, mean, **style[row["name"]])
        ax.fill_between(budget, [*map(min, zip(*per_seed))], [*map(max, zip(*per_seed))], alpha=0.2, lw=0,
                        color=style[row["name"]]["color"])
    ax.set_xscale("symlog", base=2, linthresh=5)
    ax.set(xlabel="sign steps of 0.1 of the attack on the masks (0: random masks)", ylabel="KL, nats per token",
           xticks=budget, xticklabels=[f"{b:g}" for b in budget], yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure
