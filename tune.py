"""The same tuning for every row of the table: the same learning rates for all, at the middle sparsity and seed 0.
On as many tokens as in the table; scored on fit, which no number of the table comes from.

    gain = ln KL(the table's rate at the trial's L0) - ln KL(trial)
The KL of the table's rate at any L0 is read off its curve over the table's sparsities, linear in log KL over log L0, so
that a rate which only trades sparsity for KL gains nothing. Once one gains more than WORTH, the best is to be used: the
best near the L0 at which the table reads all rows. Curves can cross, so a trial that lands elsewhere has no gain.

    python tune.py              # trains what is missing, beside compare.py's models; results/tuning.json and .md
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import compare
from model import GPT
from table import AT

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    methods: str = "all"            # some of the rows of compare.py, comma-separated
    tokens: int = 4_096_000         # that each model is trained on
    eval_tokens: int = 12_800       # of fit
    out: str = "results"            # folder for tuning.json and tuning.md
    runs: str = "runs/compare"      # folder for the models, shared with compare.py
    device: str = "auto"            # auto, cpu, cuda

RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
WORTH = 0.1                         # in ln KL; less can't be told from chance with one seed and a curve of three points
NEAR = 1.5                          # times or over table.AT: the L0 of trials that have a gain

def trials(cfg):
    """{name: [(learning rate, job)]} of the trained rows: each sparsity at the table's rate, the middle one at all."""
    out = {}
    for job in compare.jobs(cfg):
        if job.method and not job.floor:
            rates = dict.fromkeys((rate(job), *RATES)) if job.middle else [rate(job)]
            out.setdefault(job.name, []).extend((lr, at_rate(job, lr)) for lr in rates)
    return out

def rate(job):
    """What the table uses."""
    return job.method.change.get("lr", job.method.module.Config.lr)

def at_rate(job, lr):
    return dataclasses.replace(job, method=job.method._replace(change=job.method.change | dict(lr=lr)))

def score(lr, job, cfg, bench, dev):
    """What one trial has on fit, a flat dict; None if its training diverged."""
    try:
        m, cost, _ = compare.trained(job, job.config(cfg, bench.gpt, bench.layer), bench.gpt, dev)
    except SystemExit as e:
        if e.code == 1:
            return None
        raise
    found = compare.faithfulness(m, bench._replace(test=bench.fit), common.generator(0, "tune"))
    return dict(lr=lr, middle=job.middle, **{key: found[key] for key in ("l0", "kl", "ce_recovered", "fve")}, **cost)

def gain(trial, curve):
    """By how much the trial's ln KL lies below the curve at its L0; beyond the ends of the curve, below the end's.
    trial, points of the curve: {"l0", "kl"}."""
    curve = sorted(curve, key=lambda point: point["l0"])
    l0, kl = ([math.log(point[key]) for point in curve] for key in ("l0", "kl"))
    return float(np.interp(math.log(trial["l0"]), l0, kl)) - math.log(trial["kl"])

def verdict(own, points):
    """{learning rate: gain} of the rates near table.AT, and the one to use; own: the table's, whose gain is 0."""
    curve = [p for p in points if p["lr"] == own]
    near = [p for p in points if p["lr"] != own and 1 / NEAR <= p["l0"] / AT <= NEAR]
    gains = {own: 0.} | {p["lr"]: gain(p, curve) for p in near}
    best = max(gains, key=gains.get)
    return gains, best if gains[best] > WORTH else own

def render(rows):
    """As Markdown: a line per row, of the middle sparsity: KL at L0, and the gain over the rate that the table uses."""
    lines = ["| row | in the table | " + " | ".join(f"{lr:g}" for lr in RATES) + " |", "|---" * (2 + len(RATES)) + "|"]
    for row in rows:
        gained = {lr: f" ({gain:+.2f})" for lr, gain in row["gains"].items() if lr != row["lr"]}
        found = {p["lr"]: f"{p['kl']:.4f} at {p['l0']:.1f}{gained.get(p['lr'], '')}"
                 for p in row["points"] if p["middle"]}
        cells = [found.get(lr, "diverged") for lr in RATES]
        lines.append(f"| {row['name']} | {row['lr']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines + [""])

def main(cfg):
    base = compare.Config(cfg.model, cfg.data, cfg.layer, cfg.methods, seeds=1, tokens=cfg.tokens,
                          eval_tokens=cfg.eval_tokens, runs=cfg.runs, device=cfg.device)
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    layer, _ = compare.check(base, gpt)
    if not (every := trials(base)):
        common.fail(f"--methods {cfg.methods}: names no row that is trained")
    bench, rows = compare.prepared(base, gpt, layer, dev), []
    for n, (name, jobs) in enumerate(every.items()):
        points = []
        for i, (lr, job) in enumerate(jobs):
            print(f"[{n + 1}/{len(every)}] {job}, learning rate {lr:g} ({i + 1}/{len(jobs)})", flush=True)
            points.append(score(lr, job, base, bench, dev))
        own, points = jobs[0][0], [p for p in points if p]
        gains, best = verdict(own, points)
        rows.append(dict(name=name, lr=own, best=best, gains=gains, points=points))
    common.write(Path(cfg.out) / "tuning.json", json.dumps(
        dict(rows=rows, worth=WORTH, provenance=common.provenance(cfg, gpt)), indent=1).encode())
    common.write(Path(cfg.out) / "tuning.md", render(rows).encode())
    print("", render(rows), *(f"{row['name']}: {row['best']:g} should replace {row['lr']:g}, which the table uses"
                              for row in rows if row["best"] != row["lr"]),
          f"(gain): ln KL, on fit, below the curve of the table's rate, near L0 {AT}; above {WORTH} worth a change",
          f"-> {cfg.out}/tuning.json, tuning.md", sep="\n")

if __name__ == "__main__":
    main(common.cli(Config))
