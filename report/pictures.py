"""The pictures of what compare.py found: each is a function of some rows of results.json.

    pictures.draw(results, "results")   # curves, words, stability, alive, spectrum, attack: .png

Methods are told apart by their markers as well as their colours, so that grey is enough; floors
are grey and dotted. Bars and bands are half intervals unless a picture says otherwise.
"""
import statistics
from pathlib import Path

from report.curve import save_picture

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C8", "C9", "C6", "k")     # C7 is grey, as floors are
LINES = ("-", "--", "-.")
MARKERS = "osD^v<>PX*pd12x+"
SHARED = {"weights_shared_0.7": "read and write alike",
          "activations_shared_0.7": "say alike over tokens"}


def draw(results, out):
    """Draw every picture that has a row with numbers for it, into the folder `out`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no pictures: they need matplotlib, pip install matplotlib")
        return
    rows = [row for row in results["rows"] if not row["failed"]]
    middle = [row for row in rows if row["middle"]]
    shown = {
        curves: with_metrics(rows, "ce_recovered"),
        words: with_metrics(middle, "rule_det_hard"),
        stability: with_metrics(middle, *SHARED),
        alive: with_curve(middle, "alive_curve"),
        spectrum: with_curve(middle, "spectrum"),
        attack: with_curve(middle, "attack"),
    }
    style = styles(rows)
    for picture, its_rows in shown.items():
        if its_rows:
            figure = picture(its_rows, style, results["columns"])
            save_picture(figure, Path(out) / f"{picture.__name__}.png")


def with_metrics(rows, *keys):
    return [row for row in rows if row["metrics"].keys() >= {*keys}]


def with_curve(rows, key):
    return [row for row in rows if row[key]]


# --------------------------------------------------------------------------------- what all share
def styles(rows):
    """Give each method a look of its own: {name: what Axes.plot takes}."""
    floors = {row["name"] for row in rows if row["floor"]}
    names = dict.fromkeys(row["name"] for row in rows)
    looks = {}
    for i, name in enumerate(names):
        look = dict(color=COLORS[i % len(COLORS)], ls=LINES[i % len(LINES)])
        if name in floors:
            look = dict(color="0.6", ls=":")
        looks[name] = look | dict(marker=MARKERS[i % len(MARKERS)], mfc="w", label=name)
    return looks


def blank(width, height):
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def means_of(rows, key):
    return [row["metrics"][key]["mean"] for row in rows]


def halves_of(rows, key):
    return [row["metrics"][key]["half"] or 0 for row in rows]


def nulls_of(rows, key):
    return [row["metrics"][key]["null"] for row in rows]


def names_of(rows):
    return [row["name"] for row in rows]


def over_x(curves):
    """Turn curves {x: y}, one for each seed, into (xs, [the ys of all seeds at one x]).

    The xs are texts in JSON; here they are numbers."""
    xs = []
    ys = []
    for x in curves[0]:
        xs.append(float(x))
        ys.append([curve[x] for curve in curves])
    return xs, ys


def legend_beside(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)


# ------------------------------------------------------------------------------------ the pictures
def curves(rows, style, columns):
    """CE recovered against L0 and against active parameters, on a scale of what is lost."""
    from matplotlib.ticker import LogLocator, NullFormatter
    figure = blank(10, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, axis in zip(panels, ("l0", "active_params")):
        for name, look in style.items():
            draw_curve(ax, [row for row in rows if row["name"] == name], axis, look)
        ax.set_xlabel(columns[axis]["text"], fontsize=9)
        ax.set(xscale="log", yscale="log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)

    # both panels share the y axis, so it is turned over once
    ax.invert_yaxis()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda lost, _: f"{1 - lost:.6g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="CE recovered (mean ablation = 0)")
    legend_beside(figure, panels[0])
    return figure


def draw_curve(ax, rows, axis, look):
    """Draw what one method loses at its sparsities, with its band."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["metrics"][axis]["mean"])
    x = means_of(rows, axis)
    recovered = list(zip(means_of(rows, "ce_recovered"), halves_of(rows, "ce_recovered")))
    ax.plot(x, [share_lost(mean) for mean, _ in recovered], **look)
    upper = [share_lost(mean - half) for mean, half in recovered]
    lower = [share_lost(mean + half) for mean, half in recovered]
    ax.fill_between(x, upper, lower, alpha=0.2, color=look["color"], lw=0)


def share_lost(recovered):
    """1 - recovered, kept within what a log scale can show."""
    return min(max(1 - recovered, 5e-4), 1.5)


def words(rows, style, columns):
    """How well rules in words tell where a unit is on, against chance and random directions."""
    figure = blank(8, 0.35 * len(rows) + 1.2)
    ax = figure.subplots()
    above_chance = [mean - 0.5 for mean in means_of(rows, "rule_det_hard")]
    ax.barh(names_of(rows), above_chance, left=0.5, xerr=halves_of(rows, "rule_det_hard"),
            color="0.75", edgecolor="k", capsize=3)

    trained = [row for row in rows if not row["floor"]]
    trained = [row for row in trained if row["metrics"]["rule_det_hard"]["null"] is not None]
    if trained:
        ax.plot(nulls_of(trained, "rule_det_hard"), names_of(trained), "k|", ms=14, mew=2,
                label="random directions that are on as often")
        figure.legend(loc="outside upper center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="balanced accuracy of rules in words against hard negatives (chance 0.5)")
    return figure


def stability(rows, style, columns):
    """The share of units that another seed finds again, and what chance finds."""
    figure = blank(8, 0.5 * len(rows) + 1.2)
    ax = figure.subplots()
    places = range(len(rows))
    for side, (key, label), color in zip((-0.18, 0.18), SHARED.items(), ("0.85", "0.55")):
        at = [place + side for place in places]
        ax.barh(at, means_of(rows, key), 0.36, xerr=halves_of(rows, key), color=color,
                edgecolor="k", capsize=3, label=label)
        chance = [null or 0 for null in nulls_of(rows, key)]
        ax.plot(chance, at, "k|", ms=9, mew=2, label="chance" if side > 0 else None)
    ax.set(yticks=places, yticklabels=names_of(rows), xlim=(0, 1),
           xlabel="share of the alive units that another seed finds again (0.7 or more)")
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def alive(rows, style, columns):
    """Alive units over the threshold that counts as on."""
    figure = blank(8, 4.2)
    ax = figure.subplots()
    for row in rows:
        counts = [alive_counts(curve) for curve in row["alive_curve"]]
        levels, per_level = over_x(counts)
        means = [statistics.mean(seeds) for seeds in per_level]
        ax.plot(levels, means, **style[row["name"]])
    ax.set(xlabel="threshold, as a share of the unit's largest value",
           ylabel="units above it at 10 tokens or more", yscale="log")
    ax.grid(alpha=0.3)
    legend_beside(figure, ax)
    return figure


def alive_counts(curve):
    """Take from a curve {level: [units above it at 1 token or more, at 10, at 100, at 1,000]} those
    at 10: {level: units}."""
    return {level: counts[1] for level, counts in curve.items()}


def spectrum(rows, style, columns):
    """Mean causal importance of the components of each matrix, largest first."""
    figure = blank(8, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, site in zip(panels, rows[0]["spectrum"][0]):
        for row in rows:
            per_component = zip(*(seed[site] for seed in row["spectrum"]))
            means = [max(statistics.mean(values), 1e-5) for values in per_component]
            ax.plot(range(1, len(means) + 1), means, markevery=16, **style[row["name"]])
        ax.set(xlabel=f"component of W_{site}, by its mean", yscale="log", ylim=(1e-5, 1.2))
        ax.grid(alpha=0.3)
    panels[0].set(ylabel="mean causal importance")
    ax.legend(fontsize=8)
    return figure


def attack(rows, style, columns):
    """KL under attacks on the masks, by their budget: mean over seeds, and a band from the least to
    the most."""
    figure = blank(6, 4)
    ax = figure.subplots()
    for row in rows:
        look = style[row["name"]]
        budget, per_budget = over_x(row["attack"])
        ax.plot(budget, [statistics.mean(kls) for kls in per_budget], **look)
        least = [min(kls) for kls in per_budget]
        most = [max(kls) for kls in per_budget]
        ax.fill_between(budget, least, most, alpha=0.2, lw=0, color=look["color"])
    ax.set_xscale("symlog", base=2, linthresh=5)
    ax.set(xlabel="sign steps of 0.1 of the attack on the masks (0: random masks)",
           ylabel="KL, nats per token", yscale="log",
           xticks=budget, xticklabels=[f"{b:g}" for b in budget])
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure
