"""The same tuning for every row of the table: its learning rate halved, as it is and doubled, at the middle sparsity,
seed 0, on as many tokens as in the table. Scored on fit, which no number of the table comes from.

    gain = ln KL(default at the trial's L0) - ln KL(trial)
The default's KL at any L0 is read off its own curve over the sparsities of the table, linear in log KL over log L0, so
that a rate which only trades sparsity for KL gains nothing. A default gives way to what gains more than WORTH.

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

FACTORS = (0.5, 1, 2)               # of the default learning rate
WORTH = 0.1                         # in ln KL, whose standard deviation over seeds is about 0.03

def trials(cfg):
    """{name: [(factor, job)]} of the trained rows: the middle sparsity at each rate, the others at the default."""
    out = {}
    for job in compare.jobs(cfg):
        if job.method and not job.floor:
            rates = FACTORS if job.middle else (1,)
            out.setdefault(job.name, []).extend((factor, at_rate(job, factor)) for factor in rates)
    return out

def at_rate(job, factor):
    """The job with its method's default learning rate times a factor, whatever the table uses."""
    m = job.method
    change = {k: v for k, v in m.change.items() if k != "lr"}
    change |= {"lr": m.module.Config.lr * factor} if factor != 1 else {}
    return dataclasses.replace(job, method=m._replace(change=change))

def score(factor, job, cfg, bench, dev):
    """What one trial has on fit, a flat dict."""
    m, cost, _ = compare.trained(job, job.config(cfg, bench.gpt, bench.layer), bench.gpt, dev)
    found = compare.faithfulness(m, bench._replace(test=bench.fit), common.generator(0, "tune"))
    return dict(factor=factor, lr=job.method.module.Config.lr * factor, middle=job.middle,
                **{key: found[key] for key in ("l0", "kl", "ce_recovered", "fve")}, **cost)

def gain(trial, curve):
    """By how much the trial's ln KL lies below the default's at its L0; beyond the ends of the curve, below the end's.
    trial, points of the curve: {"l0", "kl"}."""
    curve = sorted(curve, key=lambda point: point["l0"])
    l0, kl = ([math.log(point[key]) for point in curve] for key in ("l0", "kl"))
    return float(np.interp(math.log(trial["l0"]), l0, kl)) - math.log(trial["kl"])

def verdict(points):
    """{factor: gain} of the rates tried on a row, and the factor to use."""
    curve = [p for p in points if p["factor"] == 1]
    gains = {p["factor"]: gain(p, curve) for p in points if p["factor"] != 1}
    best = max(gains, key=gains.get)
    return gains, best if gains[best] > WORTH else 1

def render(rows):
    """As Markdown: a line per row, of the middle sparsity."""
    lines = ["| row | " + " | ".join(f"lr x {factor:g}: KL at L0" for factor in FACTORS) + " | use |",
             "|---" * (2 + len(FACTORS)) + "|"]
    for row in rows:
        cells = [f"{p['kl']:.4f} at {p['l0']:.1f}" + (
            f" (lr {p['lr']:g})" if p["factor"] == 1 else f", gain {row['gains'][p['factor']]:+.2f}")
            for p in row["points"] if p["middle"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | x {row['use']:g} |")
    return "\n".join(lines + [""])

def main(cfg):
    base = compare.Config(cfg.model, cfg.data, cfg.layer, cfg.methods, seeds=1, tokens=cfg.tokens,
                          eval_tokens=cfg.eval_tokens, runs=cfg.runs, device=cfg.device)
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    layer, _ = compare.check(base, gpt)
    bench, rows, every = compare.prepared(base, gpt, layer, dev), [], trials(base)
    for n, (name, jobs) in enumerate(every.items()):
        points = []
        for i, (factor, job) in enumerate(jobs):
            print(f"[{n + 1}/{len(every)}] {job}, learning rate x {factor:g} ({i + 1}/{len(jobs)})", flush=True)
            points.append(score(factor, job, base, bench, dev))
        gains, use = verdict(points)
        rows.append(dict(name=name, points=points, gains=gains, use=use))
    text = render(rows)
    common.write(Path(cfg.out) / "tuning.json", json.dumps(
        dict(rows=rows, worth=WORTH, provenance=common.provenance(cfg, gpt)), indent=1).encode())
    common.write(Path(cfg.out) / "tuning.md", text.encode())
    print("", text, f"gain: ln KL below the default's own curve, on fit; above {WORTH} it is worth it",
          f"-> {cfg.out}/tuning.json, tuning.md", sep="\n")

if __name__ == "__main__":
    main(common.cli(Config))
