"""Which optimizer and learning rate should each row of the table use?

Every row gets the same trials: two optimizers at five learning rates each, at one sparsity and
seed 0, on half of the table's tokens. Trials are scored on fit, which no number of the table comes
from. A row that differs from another in its tokens alone has that one's setting.

    gain = ln KL(what the table uses, at the trial's L0) - ln KL(trial)

The KL of what the table uses is read off its curve over the table's sparsities, linear in log KL
over log L0, so that a rate which only trades sparsity for KL gains nothing. (A row of one sparsity
has no curve: its gains are of KL as it is.) Once one gains more than WORTH, the best is to be used:
the best near the L0 at which the table reads all rows. Curves can cross, so a trial that lands
elsewhere has no gain.

Muon is for matrices. Where the table trains a row by Adam, a trial with Muon trains biases and
thresholds (lr_rest) at the rate of that Adam: it is what they are known to need. The rates that are
tried for spd are of V and U; its importance net keeps its own, beside Adam that of its biases.

    python -m studies.tune                      # trains what is missing, beside compare.py's models
    python -m studies.tune --methods sae,molt   # these rows alone

Runs that are started with one --runs and one --out share the work: each takes the trials of a row
that no other is training, then waits for the rest.
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
import evals
from model import GPT
from report.table import AT, markdown_table


@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    methods: str = "all"            # some of the rows of compare.py, comma-separated
    tokens: int = compare.Config.tokens // 2    # [1, 1e11] that each model is trained on
    eval_tokens: int = 12_800       # [1, 1e9] of fit
    out: str = "results"            # folder for tuning.json and tuning.md
    runs: str = "runs/compare"      # folder for the models, shared with compare.py
    device: str = "auto"            # auto, cpu, cuda


RATES = {
    "adam": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3),
    "muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
}
WORTH = 0.1                         # in ln KL; less is chance, with one seed and 3 points a curve
NEAR = 1.5                          # times or over table.AT: the L0 of trials that have a gain
# Trials are at a row's middle sparsity, but on half of the tokens that of spd is far from table.AT.
SPARSITY = {"spd": 1.5e-4, "spd-former": 1.5e-4}


# ----------------------------------------------------------------------------------- the trials
class Setting(NamedTuple):
    optimizer: str
    lr: float

    def __str__(self):
        return f"{self.optimizer} {self.lr:g}"


def setting_of(point):
    """The setting of one trial, as tuning.json has it."""
    return Setting(point["optimizer"], point["lr"])


def own(job):
    """The setting that the table uses for the row of this job."""
    change = job.method.change
    default = job.method.module.Config
    optimizer = change.get("optimizer", default.optimizer)
    return Setting(optimizer, change.get("lr", default.lr))


def at(job, setting):
    """The job at another setting. At the table's own it is compare.py's job, with its model."""
    used = own(job)
    change = job.method.change | setting._asdict()
    if (used.optimizer, setting.optimizer) == ("adam", "muon"):
        if hasattr(job.method.module.Config, "lr_rest"):
            change["lr_rest"] = used.lr
    elif (used.optimizer, setting.optimizer) == ("muon", "adam"):
        # Adam ignores it: without it, all such trials have one name, and one model
        change.pop("lr_rest", None)
        # Adam trains a whole importance net at lr_ci, Muon its biases by Adam at lr_rest
        if hasattr(job.method.module.Config, "lr_ci"):
            change["lr_ci"] = job.method.module.Config.lr_rest
    return dataclasses.replace(job, method=job.method._replace(change=change))


def is_tried(job):
    """Is it at the sparsity at which its row is tried at all settings?"""
    return job.value == SPARSITY[job.name] if job.name in SPARSITY else job.middle


def trials(cfg):
    """{row: [(setting, job)]} of the rows that are trained.

    One sparsity is tried at all settings, the others at the table's alone."""
    tried = [Setting("adam", lr) for lr in RATES["adam"]]
    tried += [Setting("muon", lr) for lr in RATES["muon"]]
    out = {}
    for job in compare.jobs(cfg):
        if job.method and not job.floor and job.method.times == 1:
            settings = [own(job)]
            if is_tried(job):
                settings += [setting for setting in tried if setting != own(job)]
            row = out.setdefault(job.name, [])
            row += [(setting, at(job, setting)) for setting in settings]
    return out


def folder(job, cfg, arena):
    """The folder of a trial's model.

    Its name holds a hash of configuration, target and text."""
    return Path(job.config(cfg, arena.gpt, arena.layer).out)


def score(job, cfg, arena):
    """What one trial reaches on fit, as a flat dict. Its KL is None if its training diverged."""
    run = job.config(cfg, arena.gpt, arena.layer)
    try:
        found = compare.trained(job, run, arena.gpt)
    except SystemExit as e:
        if e.code == 1:
            return dict(kl=None)
        raise
    on_fit = arena._replace(test=arena.fit)
    numbers, _ = evals.measure(found.model, on_fit, common.generator(0, "tune"))
    return {key: numbers[key] for key in ("l0", "kl", "ce_recovered", "fve")} | found.cost


# ---------------------------------------------------------------------------------- the verdict
def gain(trial, curve):
    """By how much does the trial's ln KL lie below the curve, at its L0?

    Beyond the ends of the curve: below the end's. trial, points of the curve: {"l0", "kl"}."""
    curve = sorted(curve, key=lambda point: point["l0"])
    log_l0 = [math.log(point["l0"]) for point in curve]
    log_kl = [math.log(point["kl"]) for point in curve]
    expected = float(np.interp(math.log(trial["l0"]), log_l0, log_kl))
    return expected - math.log(trial["kl"])


def verdict(own, points):
    """({setting: gain} of the trials near table.AT, the setting to use).

    own: the table's setting, whose gain is 0. points: trials, at all sparsities."""
    points = [point for point in points if point["kl"] is not None]
    curve = [point for point in points if setting_of(point) == own]
    gains = {own: 0.}
    if curve:
        for point in points:
            is_near = 1 / NEAR <= point["l0"] / AT <= NEAR
            if is_near and setting_of(point) != own:
                gains[setting_of(point)] = gain(point, curve)
    best = max(gains, key=gains.get)
    return gains, best if gains[best] > WORTH else own


# ---------------------------------------------------------------------- what is kept, and shown
def stored(path, of):
    """The rows in tuning.json, each of which says what it is of. Fails unless that is `of`.

    Rows of another target, for one, can't be in one table with this run's."""
    rows = common.read_json(path, dict(rows=[]))["rows"]
    for row in rows:
        if row.get("of") != of:
            common.fail(f"{path}: its row {row['name']} is of {row.get('of', 'an earlier form')}, "
                        f"not of {of}: give another --out, or remove that file")
    return rows


def keep(row, path):
    """Put a row into tuning.json and tuning.md, in place of the row of its name; returns all rows.

    It holds a lock while it reads and writes: another run may be about to put its rows there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)        # held until it is closed, or this process is dead
        by_name = {known["name"]: known for known in stored(path, row["of"])}
        by_name[row["name"]] = row
        rows = [by_name[name] for name in compare.METHODS if name in by_name]
        common.write(path, json.dumps(dict(rows=rows, worth=WORTH), indent=1).encode())
        common.write(path.with_suffix(".md"), render(rows).encode())
    finally:
        os.close(lock)
    return rows


def cell(row, setting):
    """One trial as text; bold if it is what should be used."""
    point, = [p for p in row["points"] if p["tried"] and setting_of(p) == setting]
    text = "diverged"
    if point["kl"] is not None:
        text = f"{1e3 * point['kl']:.3g}@{point['l0']:.1f}"
    if setting == Setting(**row["own"]):
        text += " table"
    elif point["gain"] is not None:
        text += f" {point['gain']:+.2f}"
    return f"**{text}**" if setting == Setting(**row["best"]) else text


HEADER = f"""\
# Optimizers and rates
KL@L0 on text that training does not see, after {{tokens:,}} tokens, at one sparsity of each row and
one seed, KL in thousandths of a nat; near L0 {AT} also the gain in ln KL over what the table uses
(table), at the trial's L0 where the table has several sparsities of the row. Bold: what should be
used, another setting where one gains more than {WORTH}.
"""


def render(rows):
    """As Markdown: what each row uses and what is best; then all trials, a table an optimizer."""
    verdicts = []
    for row in rows:
        used = Setting(**row["own"])
        best = Setting(**row["best"])
        verdicts.append([row["name"], str(used), cell(row, used), str(best), cell(row, best)])
    heads = ["row", "the table uses", "KL@L0", "best", "KL@L0, gain"]
    lines = [HEADER.format(**rows[0]["of"]), *markdown_table(heads, verdicts)]
    for optimizer, rates in RATES.items():
        trials = []
        for row in rows:
            trials.append([row["name"], *(cell(row, Setting(optimizer, lr)) for lr in rates)])
        heads = [optimizer, *(f"{lr:g}" for lr in rates)]
        lines += ["", *markdown_table(heads, trials)]
    return "\n".join(lines + [""])


# ------------------------------------------------------------------------------------------ main
class Trials:
    """The scores of trials. Those in tuning.json are read back: they need no model any more."""

    def __init__(self, cfg, arena, rows, jobs):
        self.how = (cfg, arena)
        self.scores = {}
        for row in rows:
            self.scores |= {point["key"]: point for point in row["points"]}
        self.todo = [job for job in jobs if self.key(job) not in self.scores]
        self.count = len(self.todo)
        self.seconds = {}           # {row: [of trials that were trained]}

    def key(self, job):
        """By what is a trial known? Its model's folder, and all flags: a default that changes moves
        no folder, but it is another trial."""
        cfg, arena = self.how
        run = job.config(cfg, arena.gpt, arena.layer)
        flags = {name: value for name, value in vars(run).items()
                 if name not in job.method.module.MAY_CHANGE_ON_RESUME}
        return f"{Path(run.out).name}-{compare.digest(flags)}"

    def score(self, job, setting):
        """A trial's score, with its key; trains the model and evaluates it if it is not known."""
        key = self.key(job)
        if key not in self.scores:
            i = self.count - len(self.todo) + 1
            left = compare.left(self.seconds, self.todo)
            print(f"[{i}/{self.count}] {job}, {setting}; {left}", flush=True)
            is_fresh = not folder(job, *self.how).exists()
            began = time.time()
            self.scores[key] = score(job, *self.how)
            # a model that was there already says nothing about how long training takes
            if is_fresh:
                self.seconds.setdefault(job.name, []).append(time.time() - began)
            self.todo.pop(0)
        return self.scores[key] | dict(key=key)


def main(cfg):
    # what is to be tried, and on what
    base = compare.Config(cfg.model, cfg.data, cfg.layer, cfg.methods, seeds=1, tokens=cfg.tokens,
                          eval_tokens=cfg.eval_tokens, runs=cfg.runs, device=cfg.device)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    layer, _ = compare.check(base, gpt)
    tried = trials(base)
    if not tried:
        common.fail(f"--methods {cfg.methods}: no row of these has a setting of its own")

    # what is known already: rows of the same target, text and sizes
    path = Path(cfg.out) / "tuning.json"
    of = dict(target=gpt.hash, text=data.fingerprint(cfg.data), layer=layer, tokens=cfg.tokens,
              eval_tokens=cfg.eval_tokens)
    rows = stored(path, of)
    common.must_be_writable(cfg.out, cfg.runs)
    arena = compare.prepared(base, gpt, layer, dev)
    jobs = []
    for row in tried.values():
        jobs += [job for _, job in row]
    known = Trials(base, arena, rows, jobs)

    # row by row: all its trials, then the verdict
    for name, row in tried.items():
        # what another run is training comes last: then it may be there
        for setting, job in row:
            if not common.is_held(folder(job, base, arena)):
                known.score(job, setting)
        points = []
        for setting, job in row:
            about = dict(**setting._asdict(), value=job.value, tried=is_tried(job))
            points.append(known.score(job, setting) | about)
        used, _ = row[0]
        gains, best = verdict(used, points)
        for point in points:
            point["gain"] = gains.get(setting_of(point)) if point["tried"] else None
        rows = keep(dict(name=name, of=of, own=used._asdict(), best=best._asdict(), points=points,
                         provenance=common.provenance(cfg, gpt)), path)

    print("", render(rows), sep="\n")
    for row in rows:
        if row["best"] != row["own"]:
            best = Setting(**row["best"])
            print(f"{row['name']}: {best} should replace {Setting(**row['own'])}")
    print(f"-> {path}, tuning.md")


if __name__ == "__main__":
    main(common.cli(Config))
