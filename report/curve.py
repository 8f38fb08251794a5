"""One method at several sparsities: what it recovers against what it uses, as data and as a picture.

    curve.sweep(train, cfg, "lam", (3e-4, 1e-3, 3e-3), ("l0", "active_rank"))      # what a script's --sweep calls
"""
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import common

SHARES = (0.25, 0.5, 1, 2, 4)       # times the knob: where a script's --sweep trains, unless it says otherwise
SCORES = dict(ce_recovered="CE recovered (mean ablation = 0)", fve="fraction of variance explained")
BESIDE = ("active_params", "dead_fraction", "concept_matched_fraction", "seconds")
NAMES = dict(l0="units on per token (L0)", active_rank="sum of the ranks of the units on per token",
             active_params="parameters of the units on per token")


def sweep(train, cfg, knob, values, axes=("l0",)):
    """train(cfg) -> (.., summary) at each value of a knob, in folders KNOBVALUE of cfg.out, which gets sweep.json (a
    row per value, by L0, and whether each score rises with L0) and sweep.png. With cfg.resume it goes on."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        common.fail("--sweep needs matplotlib: pip install matplotlib")
    rows = []
    for value in values:
        out = Path(cfg.out) / f"{knob}{value:g}"
        one = {knob: value, "out": str(out), "sweep": False, "resume": cfg.resume and any(out.glob("*.safetensors"))}
        found = train(replace(cfg, **one))[1]
        rows.append({knob: value} | {k: found[k] for k in (*axes, *SCORES, *BESIDE)})
    rows.sort(key=lambda row: row["l0"])
    rises = {k: all(a[k] <= b[k] for a, b in itertools.pairwise(rows)) for k in SCORES if rows[0][k] is not None}
    common.write(Path(cfg.out) / "sweep.json", json.dumps(dict(rows=rows, rises_with_l0=rises), indent=1).encode())

    figure = Figure((4.5 * len(axes), 3.6), layout="constrained")
    for ax, axis in zip(figure.subplots(1, len(axes), sharey=True, squeeze=False)[0], axes):
        for score, style in zip(rises, ("ko-", "s--")):
            ax.plot([row[axis] for row in rows], [row[score] for row in rows], style, mfc="w", label=SCORES[score])
        ax.set_xscale("log", base=2), ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel=NAMES[axis], ylabel="share" if axis == axes[0] else None)
        ax.grid(alpha=0.3)
    ax.legend()
    figure.suptitle(f"{Path(cfg.out).name}: {knob} from {min(values):g} to {max(values):g}")
    save_picture(figure, Path(cfg.out) / "sweep.png")
    print(*(" ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None) for row in rows),
          f"rises with L0: {rises}", f"-> {cfg.out}/sweep.json, sweep.png", sep="\n")
    return rows


def save_picture(figure, path):
    """As PNG, all or nothing."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    common.write(path, picture.getvalue())
