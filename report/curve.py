"""What does one method recover at several sparsities, against what it uses? As data and as a
picture.

    # what a script's --sweep calls
    curve.sweep(train, cfg, "lam", (3e-4, 1e-3, 3e-3), axes=("l0", "active_rank"))
"""
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import common

SHARES = (0.25, 0.5, 1, 2, 4)       # times the knob: where a script's --sweep trains
SCORES = {                          # what is recovered
    "ce_recovered": "CE recovered (mean ablation = 0)",
    "fve": "fraction of variance explained",
}
NAMES = {                           # what is used
    "l0": "units on per token (L0)",
    "active_rank": "sum of the ranks of the units on per token",
    "active_params": "parameters of the units on per token",
}
BESIDE = ("active_params", "dead_fraction", "concept_matched_fraction", "seconds")


def sweep(train, cfg, knob, values, axes=("l0",)):
    """Train a method at each value of a knob, and draw what it recovers against what it uses.

    train(cfg) -> (.., summary); it trains in the folders KNOBVALUE of cfg.out, and with cfg.resume
    it goes on there. cfg.out gets sweep.json, a row for each value, by L0, with whether each score
    rises with L0, and sweep.png, one panel for each of the axes. Returns the rows."""
    # a missing library is to be known before hours of training
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        common.fail("--sweep needs matplotlib: pip install matplotlib")

    runs = [config_at(cfg, knob, value) for value in values]
    if cfg.resume and not any(Path(run.out).exists() for run in runs):
        common.fail(f"--resume --sweep: no run of a sweep in {cfg.out}")
    for name in ("sweep.json", "sweep.png"):
        common.must_be_file(Path(cfg.out) / name)
    rows = []
    for value, run in zip(values, runs):
        summary = train(run)[1]
        rows.append({knob: value} | {key: summary[key] for key in (*axes, *SCORES, *BESIDE)})
    rows.sort(key=lambda row: row["l0"])
    rises = rises_with_l0(rows)
    saved = json.dumps(dict(rows=rows, rises_with_l0=rises), indent=1)
    common.write(Path(cfg.out) / "sweep.json", saved.encode())

    figure = draw(rows, scores=list(rises), axes=axes)
    figure.suptitle(f"{Path(cfg.out).name}: {knob} from {min(values):g} to {max(values):g}")
    save_picture(figure, Path(cfg.out) / "sweep.png")

    for row in rows:
        print(*(f"{key} {value:.4g}" for key, value in row.items() if value is not None))
    print(f"rises with L0: {rises}")
    print(f"-> {cfg.out}/sweep.json, sweep.png")
    return rows


def config_at(cfg, knob, value):
    """The configuration of one training of a sweep: a folder of its own, resumed if it is there."""
    out = Path(cfg.out) / f"{knob}{value:g}"
    is_begun = any(out.glob("*.safetensors"))
    changes = {knob: value, "out": str(out), "sweep": False, "resume": cfg.resume and is_begun}
    return replace(cfg, **changes)


def rises_with_l0(rows):
    """Does each score never fall from one row to the next? {score: bool}; without scores that are
    None, as CE recovered is where the MLP matters too little."""
    rises = {}
    for score in SCORES:
        if rows[0][score] is not None:
            pairs = itertools.pairwise(row[score] for row in rows)
            rises[score] = all(a <= b for a, b in pairs)
    return rises


def draw(rows, scores, axes):
    """Draw the scores over each axis, one panel an axis."""
    from matplotlib.figure import Figure
    figure = Figure((4.5 * len(axes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes):
        for score, style in zip(scores, ("ko-", "s--")):
            x = [row[axis] for row in rows]
            y = [row[score] for row in rows]
            panel.plot(x, y, style, mfc="w", label=SCORES[score])
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(NAMES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share")
    panels[-1].legend()
    return figure


def save_picture(figure, path):
    """Save a figure as PNG: the whole file or, if that fails, none of it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    common.write(path, picture.getvalue())
