"""The curve of a method: one training per sparsity, what it recovers against how many units it uses."""
import json
import math
from dataclasses import replace
from pathlib import Path

import common

SHARES = (0.25, 0.5, 1, 2, 4)


def sweep(train, cfg, name, high=math.inf):
    """Trains at 1/4 to 4 times the sparsity cfg.NAME; sweep.json gets the summaries, sweep.png the curve, in cfg.out.
    With cfg.resume a run goes on from its checkpoint, if it has one."""
    middle, runs = getattr(cfg, name), []
    values = [type(middle)(share * middle) for share in SHARES]
    if not values[0] or values[-1] > high:
        common.fail(f"--sweep --{name} {middle}: the sparsities {values} must be from 1 to {high}")
    for value in values:
        out = Path(cfg.out) / f"{name}-{value:g}"
        begun = cfg.resume and any(out.glob("*.safetensors"))
        job = replace(cfg, sweep=False, out=str(out), resume=begun, **{name: value})
        runs.append({name: value} | train(job)[1])
    runs.sort(key=lambda run: run["l0"])
    common.write(Path(cfg.out) / "sweep.json", json.dumps(runs, indent=1).encode())
    plot(runs, Path(cfg.out) / "sweep.png")
    for run in runs:
        ce = run["ce_recovered"]            # None where the MLP carries too little
        print(f"L0 {run['l0']:6.1f}   CE recovered {ce if ce is None else round(ce, 3)}   FVE {run['fve']:.3f}   "
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
        ax.plot(*zip(*((run["l0"], math.nan if run[key] is None else run[key]) for run in runs)), style, label=label)
    ax.set_xscale("log", base=2), ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="L0: units on per token", ylabel="share of the MLP recovered")
    ax.legend(), ax.grid(alpha=.3)
    fig.savefig(path, dpi=120), plt.close(fig)
