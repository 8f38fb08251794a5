"""The curve of a method: one training per sparsity, what it recovers against how many units it uses."""
import json
from dataclasses import replace
from pathlib import Path

import common

SHARES = (0.25, 0.5, 1, 2, 4)


def sweep(train, cfg, name):
    """Trains at 1/4 to 4 times the sparsity cfg.NAME; the summaries go to sweep.json, the curve to sweep.png in cfg.out.
    A run that cfg.resume finds finished is not trained again."""
    runs = []
    for value in (type(getattr(cfg, name))(share * getattr(cfg, name)) for share in SHARES):
        out = Path(cfg.out) / f"{name}-{value:g}"
        found = cfg.resume and any(out.glob("*.safetensors"))
        runs.append(train(replace(cfg, sweep=False, out=str(out), resume=found, **{name: value}))[1])
    runs.sort(key=lambda run: run["l0"])
    common.write(Path(cfg.out) / "sweep.json", json.dumps(runs, indent=1).encode())
    plot(runs, Path(cfg.out) / "sweep.png")
    for run in runs:
        print(f"L0 {run['l0']:6.1f}   CE recovered {run['ce_recovered']:.3f}   FVE {run['fve']:.3f}   "
              f"dead {run['dead_fraction']:.1%}")
    return runs


def plot(runs, path):
    try:
        import matplotlib
    except ImportError:
        return print(f"{path}: no picture without matplotlib (pip install matplotlib)")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label, style in (("ce_recovered", "CE recovered (0: mean ablation)", "ko-"), ("fve", "FVE", "k^--")):
        ax.plot([run["l0"] for run in runs], [run[key] for run in runs], style, label=label)
    ax.set(xscale="log", xlabel="L0: units on per token", ylabel="share of the MLP recovered")
    ax.legend(), ax.grid(alpha=.3)
    fig.savefig(path, dpi=120), plt.close(fig)
