"""The same tuning for every row of the table: two optimizers at five learning rates each, at the middle sparsity and
seed 0. On as many tokens as in the table; scored on fit, which no number of the table comes from.

    gain = ln KL(what the table uses, at the trial's L0) - ln KL(trial)
The KL of what the table uses is read off its curve over the table's sparsities, linear in log KL over log L0, so that a
rate which only trades sparsity for KL gains nothing. Once one gains more than WORTH, the best is to be used: the best
near the L0 at which the table reads all rows. Curves can cross, so a trial that lands elsewhere has no gain.
Muon is for matrices. Where the table trains a row by Adam, a trial with Muon trains biases and thresholds (lr_rest) at
the rate of that Adam: on them, Adam at that rate is what the row is known to need.

    python -m studies.tune                      # trains what is missing, beside compare.py's models
    python -m studies.tune --methods sae,molt   # these rows alone; two runs can share the work
"""
import dataclasses
import fcntl
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import compare
import data
from model import GPT
from report.table import AT

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

RATES = {"adam": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)}
WORTH = 0.1                         # in ln KL; less can't be told from chance with one seed and a curve of three points
NEAR = 1.5                          # times or over table.AT: the L0 of trials that have a gain

class Setting(NamedTuple):
    optimizer: str
    lr: float

    def __str__(self):
        return f"{self.optimizer} {self.lr:g}"

def own(job):
    """The setting that the table uses for the row of this job."""
    change, default = job.method.change, job.method.module.Config
    return Setting(change.get("optimizer", default.optimizer), change.get("lr", default.lr))

def at(job, setting):
    """The job at another setting; at the table's own it is compare.py's job, and its model."""
    change, used = job.method.change | setting._asdict(), own(job)
    if (used.optimizer, setting.optimizer) == ("adam", "muon") and hasattr(job.method.module.Config, "lr_rest"):
        change["lr_rest"] = used.lr
    elif (used.optimizer, setting.optimizer) == ("muon", "adam"):
        change.pop("lr_rest", None)             # which Adam ignores: one model, whatever it is
    return dataclasses.replace(job, method=job.method._replace(change=change))

def trials(cfg):
    """{row: [(setting, job)]} of the trained rows: each sparsity at the table's setting, the middle one at all."""
    every = [Setting(optimizer, lr) for optimizer, rates in RATES.items() for lr in rates]
    out = {}
    for job in compare.jobs(cfg):
        if job.method and not job.floor:
            settings = dict.fromkeys((own(job), *every)) if job.middle else [own(job)]
            out.setdefault(job.name, []).extend((setting, at(job, setting)) for setting in settings)
    return out

def folder(job, cfg, bench):
    """Of the trial's model. A hash of configuration, target and text is in its name, by which the trial is known."""
    return Path(job.config(cfg, bench.gpt, bench.layer).out)

def score(job, cfg, bench, dev):
    """What one trial has on fit, a flat dict; its KL is None if its training diverged."""
    try:
        m, cost, _ = compare.trained(job, job.config(cfg, bench.gpt, bench.layer), bench.gpt, dev)
    except SystemExit as e:
        if e.code == 1:
            return dict(kl=None)
        raise
    found = compare.faithfulness(m, bench._replace(test=bench.fit), common.generator(0, "tune"))
    return {key: found[key] for key in ("l0", "kl", "ce_recovered", "fve")} | cost

def gain(trial, curve):
    """By how much the trial's ln KL lies below the curve at its L0; beyond the ends of the curve, below the end's.
    trial, points of the curve: {"l0", "kl"}."""
    curve = sorted(curve, key=lambda point: point["l0"])
    l0, kl = ([math.log(point[key]) for point in curve] for key in ("l0", "kl"))
    return float(np.interp(math.log(trial["l0"]), l0, kl)) - math.log(trial["kl"])

def verdict(own, points):
    """({setting: gain} of the trials near table.AT, the setting to use); own: the table's, whose gain is 0."""
    points = [(Setting(p["optimizer"], p["lr"]), p) for p in points if p["kl"] is not None]
    curve = [p for setting, p in points if setting == own]
    near = [(setting, p) for setting, p in points if setting != own and curve and 1 / NEAR <= p["l0"] / AT <= NEAR]
    gains = {own: 0.} | {setting: gain(p, curve) for setting, p in near}
    best = max(gains, key=gains.get)
    return gains, best if gains[best] > WORTH else own

# ----------------------------------------------------------------------------------------- what is kept, and shown
def stored(path, of):
    """The rows in tuning.json, each of which says what it is of. Fails unless that is `of`: rows of another target, for
    one, can't be in one table with this run's."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in rows:
        if row.get("of") != of:
            common.fail(f"{path}: its row {row['name']} is of {row.get('of', 'an earlier form')}, not of {of}: "
                        "give another --out, or remove that file")
    return rows

def keep(row, path):
    """Puts a row into tuning.json and tuning.md, in place of the row of that name; returns all rows. It holds a lock
    while it reads and writes: another run may be about to put its own rows there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)        # held until it is closed, or this process is dead
        rows = {other["name"]: other for other in stored(path, row["of"])} | {row["name"]: row}
        rows = [rows[name] for name in compare.METHODS if name in rows]
        common.write(path, json.dumps(dict(rows=rows, worth=WORTH), indent=1).encode())
        common.write(path.with_suffix(".md"), render(rows).encode())
    finally:
        os.close(lock)
    return rows

def cell(row, setting):
    """One trial of the middle sparsity as text; bold if it is what should be used."""
    point, = [p for p in row["points"] if p["middle"] and Setting(p["optimizer"], p["lr"]) == setting]
    text = "diverged" if point["kl"] is None else f"{1e3 * point['kl']:.3g}@{point['l0']:.1f}"
    if setting == Setting(**row["own"]):
        text += " table"
    elif point["gain"] is not None:
        text += f" {point['gain']:+.2f}"
    return f"**{text}**" if setting == Setting(**row["best"]) else text

def render(rows):
    """As Markdown: for each row what the table uses and what is best, and all trials, a table per optimizer."""
    lines = ["KL@L0 on fit, at the middle sparsity, KL in thousandths of a nat; near L0 "
             f"{AT} also the gain in ln KL over what", "the table uses (table). Bold: what should be used, another "
             f"setting where one gains more than {WORTH}.", "",
             "| row | the table uses | KL@L0 | best | KL@L0, gain |", "|---|---|---|---|---|"]
    for row in rows:
        used, best = Setting(**row["own"]), Setting(**row["best"])
        lines.append(f"| {row['name']} | {used} | {cell(row, used)} | {best} | {cell(row, best)} |")
    for optimizer, rates in RATES.items():
        lines += ["", f"| {optimizer} | " + " | ".join(map("{:g}".format, rates)) + " |", "|---" * 6 + "|"]
        for row in rows:
            lines.append(f"| {row['name']} | " + " | ".join(cell(row, Setting(optimizer, lr)) for lr in rates) + " |")
    return "\n".join(lines + [""])

def main(cfg):
    base = compare.Config(cfg.model, cfg.data, cfg.layer, cfg.methods, seeds=1, tokens=cfg.tokens,
                          eval_tokens=cfg.eval_tokens, runs=cfg.runs, device=cfg.device)
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    layer, _ = compare.check(base, gpt)
    if not (every := trials(base)):
        common.fail(f"--methods {cfg.methods}: names no row that is trained")
    path, of = Path(cfg.out) / "tuning.json", dict(target=gpt.hash, text=data.fingerprint(cfg.data), layer=layer,
                                                   tokens=cfg.tokens, eval_tokens=cfg.eval_tokens)
    # trials that are scored already are read back: they need no model any more
    known = {point["key"]: point for row in stored(path, of) for point in row["points"]}
    bench = compare.prepared(base, gpt, layer, dev)
    todo = [job for tried in every.values() for _, job in tried if folder(job, base, bench).name not in known]
    count, seconds = len(todo), {}
    for name, tried in every.items():
        points = []
        for setting, job in tried:
            where = folder(job, base, bench)
            if where.name not in known:
                print(f"[{count - len(todo) + 1}/{count}] {job}, {setting}; {compare.left(seconds, todo)}", flush=True)
                began, fresh = time.time(), not where.exists()
                known[where.name] = score(job, base, bench, dev)
                if fresh:                       # what was trained before says nothing about how long training takes
                    seconds.setdefault(name, []).append(time.time() - began)
                todo.pop(0)
            about = dict(key=where.name, **setting._asdict(), value=job.value, middle=job.middle)
            points.append(known[where.name] | about)
        used = tried[0][0]
        gains, best = verdict(used, points)
        for point in points:
            point["gain"] = gains.get(Setting(point["optimizer"], point["lr"])) if point["middle"] else None
        rows = keep(dict(name=name, of=of, own=used._asdict(), best=best._asdict(), points=points,
                         provenance=common.provenance(cfg, gpt)), path)
    print("", render(rows), *(f"{row['name']}: {Setting(**row['best'])} should replace {Setting(**row['own'])}"
                              for row in rows if row["best"] != row["own"]),
          f"-> {path}, tuning.md", sep="\n")

if __name__ == "__main__":
    main(common.cli(Config))
