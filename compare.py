"""The table: every method on the same MLP and the same tokens, several sparsities and seeds, with floors beside them.

    trains what is missing (runs/compare/NAME-KEY, KEY = hash of the full configuration and of the target), evaluates
    what is not evaluated yet, prints the table; a killed run goes on, a second one only prints. A training or an
    evaluation that fails leaves a FAILED row and exit code 1.
Seeds are the unit of replication: mean +- half the 95 % t interval over them. One rule for all: a unit is on where
f > 0 (SPD: masks rounded at 0.1, so that what counts as on is what is written), alive when on at 10 tokens of fit;
whatever is chosen is chosen on fit, every number is from test. Stability is of all seeds of a row at once.

    python compare.py --quick       # one seed, one sparsity, small
    python compare.py --explain     # what each column means and which direction is better
"""
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import baselines
import clt
import common
import data
import evals
import fused
import metrics.atoms
import metrics.concepts
import metrics.effects
import metrics.faithful
import metrics.llm
import metrics.masks
import metrics.matching
import metrics.recording
import metrics.stability
import metrics.words
import molt
import sae
import spd
import stochastic
import transcoder
from model import GPT, default_layer
from report import headline, table
from tinytales import cache, concepts

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    methods: str = "all"            # some of the rows that --explain names, comma-separated
    metrics: str = "all"            # some of faithfulness, completeness, parts, words, judged, effects, robustness, ..
    seeds: int = 3                  # models per method and sparsity, seeds 0, 1, ..
    tokens: int = 4_096_000         # that each model is trained on
    eval_tokens: int = 50_000       # of fit (means, choices) and of test (scores)
    explained: int = 100            # units per model that are explained in words
    judge_url: str = ""             # also by an LLM at this OpenAI-compatible endpoint; its key: $OPENAI_API_KEY
    judge_model: str = ""           # which LLM
    quick: bool = False             # one seed, the middle sparsity, a tenth of the tokens, small dictionaries
    explain: bool = False           # say what each row and each column means, and stop
    out: str = "results"            # folder for what is found; results-quick, results-part for less than everything
    readme: bool = False            # put the table into README.md too, between its markers
    runs: str = "runs/compare"      # folder for the models and their evaluations
    device: str = "auto"            # auto, cpu, cuda

WHOLE = ("model", "data", "layer", "methods", "metrics", "seeds", "tokens", "eval_tokens", "explained")
QUICK = dict(seeds=1, tokens=409_600, eval_tokens=6_400, explained=20)
SMALL = 256                         # units of a dictionary with --quick

class Method(NamedTuple):
    module: Any                     # Config, MAY_CHANGE_ON_RESUME, train(cfg), load(path, gpt)
    knob: str                       # of sparsity
    values: tuple                   # that the curves go through; the middle one is in the table
    change: dict                    # of the defaults of module.Config
    quick: dict                     # of those again, with --quick

NOISELESS = dict(base="transcoder", noise=False)
# Two controls have one term of its penalty each, sum_f s_f or sum_f s_f log2(1 + freq_a s_f). Since lambda follows L0
# whatever multiplies the penalty, only the ratio of the terms counts: a w_freq of 1,000 leaves the second. lambda would
# need ln(1,000) / follow = 230 steps to come down by as much, and kill units until then: c_first is 1,000 times lower.
METHODS = {                         # learning rates: the best of those that studies/tune.py tries
    "spd": Method(spd, "c_imp", (2e-5, 5e-5, 1.5e-4), dict(C=512), dict(C=128)),
    "transcoder": Method(transcoder, "k", (8, 16, 32), {}, dict(F=SMALL)),
    "transcoder-skip": Method(transcoder, "k", (8, 16, 32), dict(skip=True), dict(F=SMALL)),
    "transcoder-kl": Method(transcoder, "k", (16,), dict(objective="kl"), dict(F=SMALL)),
    "transcoder-stochastic": Method(stochastic, "k", (8, 16, 32), dict(base="transcoder"), dict(F=SMALL)),
    "transcoder-noiseless": Method(stochastic, "k", (16,), NOISELESS, dict(F=SMALL)),
    "transcoder-nofreq": Method(stochastic, "k", (16,), dict(NOISELESS, w_freq=0.), dict(F=SMALL)),
    "transcoder-freq": Method(stochastic, "k", (16,), dict(NOISELESS, w_freq=1e3, c_first=1e-6), dict(F=SMALL)),
    "clt": Method(clt, "k", (4, 8, 16), {}, dict(F=128)),        # k per layer, and it is read at each so far
    "molt": Method(molt, "lam", (3e-3, 1e-3, 3e-4), dict(lr=16e-3), {}),
    "molt-sum": Method(molt, "lam", (3e-3, 1e-3, 3e-4), dict(lr=16e-3, sum_to_weights=True), {}),
    "sae": Method(sae, "k", (8, 16, 32), {}, dict(F=SMALL)),       # reads y: explains, does not replace
    "sae-stochastic": Method(stochastic, "k", (8, 16, 32), dict(base="sae"), dict(F=SMALL)),
}
METHODS |= {"sae:frozen": METHODS["sae"]._replace(values=(16,), change=dict(frozen=True)),
            "sae:untrained": METHODS["sae"]._replace(values=(16,))}
FLOORS = {"neurons": (8, 16, 32), "pca": (8, 16, 32), "random": (8, 16, 32), "svd": (4, 8, 16)}    # svd: of each matrix
SEEDED = {"random"}                 # floors in which there is chance

# ------------------------------------------------------------------------------------------ what a model is asked
class Arena(NamedTuple):
    """What all are evaluated on. fit, test: (rows, labels)."""
    gpt: GPT
    layer: int
    fit: tuple
    test: tuple
    names: list
    explained: int
    judge: Any                      # the LLM, if there is one
    once: dict                      # what holds for all decompositions of a target

    def shared(self, function, name, **how):
        """Such a thing, found once: function(gpt, layer, fit, test, gen)."""
        if (key := (name, self.gpt.hash)) not in self.once:
            gen = common.generator(0, name)
            self.once[key] = function(self.gpt, self.layer, fit=self.fit, test=self.test, gen=gen, **how)
        return self.once[key]

def faithfulness(m, bench, gen):
    _, out = evals.replacement(m, bench.gpt, bench.layer, bench.fit, bench.test, bench.names)
    return out | dict(kl=out["kl_replaced"], kl_recovered=out["kl_recovered_replaced"])

def completeness(m, bench, gen):
    steps = metrics.faithful.top_k_faithfulness(m, bench.gpt, bench.fit[0][:64], bench.test[0][:64]) or {}
    return dict(completeness=metrics.faithful.completeness(m, bench.gpt, bench.fit[0], bench.test[0]),
                error_pathology=metrics.faithful.error_pathology(m, bench.gpt, bench.test[0], gen)) | steps

def parts(m, bench, gen):
    parents = sorted({bench.names.index(parent) for parent, _ in concepts.HIERARCHY if parent in bench.names})
    parents = torch.tensor(parents, dtype=torch.long, device=bench.fit[0].device)
    yardsticks = bench.shared(metrics.concepts.probe_yardsticks, "probes")
    return metrics.concepts.summary(m, bench.gpt, bench.fit, bench.test, parents, gen) | yardsticks

def recorded(m, bench):
    """Recordings of fit and test, and in how many windows of fit a unit must be on to be explained: 200 of 200,000."""
    both = (metrics.recording.record(m, bench.gpt, *split) for split in (bench.fit, bench.test))
    return *metrics.recording.split_by_sign(*both), max(10, bench.fit[0].numel() // 1000)

def words(m, bench, gen):
    fit, test, least = recorded(m, bench)
    found = metrics.words.explain(fit, test, bench.fit[0], bench.test[0], bench.gpt.vocab, gen, bench.explained, least)
    share = found["scorable"] / max(1, (fit.on() >= evals.ALIVE).sum().item())     # alive units too rare for a rule:
    chance = lambda k: 0.5 if k in ("det", "det_hard", "fuzz", "discr") else 0     # they are at chance
    mean = {f"rule_{k}": share * v.float().nanmean().item() + (1 - share) * chance(k)
            for k, v in found.items() if torch.is_tensor(v) and k != "units"}
    return mean | dict(rule_scorable=share, rule_units=len(found["units"]), texts=found["texts"])

def judged(m, bench, gen):
    fit, test, least = recorded(m, bench)
    some = metrics.words.scorable(metrics.words.active_windows(fit, bench.fit[0].shape[1]), bench.explained, least, gen)
    found = metrics.llm.llm_explain(bench.judge, fit, test, bench.fit[0], bench.test[0], bench.gpt.vocab, some, gen)
    mean = {f"judge_{k}": torch.tensor(found[k]).nanmean().item() for k in ("det", "fuzz")}
    return mean | dict(judge=found["judge"], judge_failures=found["failures"], judge_texts=found["texts"])

def effects(m, bench, gen):
    words, is_VW = [*concepts.WORDS, *concepts.PATTERNS], torch.from_numpy(concepts.lexical(bench.gpt.vocab))
    sets = [c for c in concepts.NEXT if f"next: {c}" in bench.names and is_VW[:, words.index(c)].sum() >= 20]
    after = torch.tensor([bench.names.index(f"next: {c}") for c in sets], dtype=torch.long)
    few = max(1, len(bench.fit[0]) // 8)
    how = dict(after=after, target_UV=is_VW.T[[words.index(c) for c in sets]], prompts=min(16, few))
    found = metrics.effects.effects(m, bench.gpt, bench.fit, bench.test, **how, gen=gen, rows=min(32, few))
    return found | bench.shared(metrics.effects.pushes, "pushes", **how)

def robustness(m, bench, gen):
    """Only of what has masks. The attack: 20 sign steps of 0.1, one source for all positions of 32 rows."""
    if m.kind != "component":
        return {}
    raw, few = getattr(m, "raw", m), bench.test[0][:32]
    gen = torch.Generator(few.device).manual_seed(gen.initial_seed())       # masks are drawn where they are used
    table = evals.scores(bench.gpt, bench.test[0], evals.ablations(bench.gpt, bench.layer, bench.fit[0])
                         | metrics.masks.mask_table(raw, m.thresholds, gen))
    ladder = metrics.masks.attack(raw, bench.gpt, few, gen)
    clean = evals.scores(bench.gpt, few, {"importance": metrics.masks.mask_table(raw, (), gen)["causal importance"]})
    joint = metrics.masks.aggregation(raw, bench.gpt, few, gen)
    mean_F = metrics.masks.spectrum(raw, bench.gpt, bench.layer, bench.test[0])
    spectrum = {site: mean.sort(descending=True).values.tolist() for site, mean in zip(m.matrices, mean_F.split(raw.C))}
    return evals.score_keys(table) | dict(
        spectrum=spectrum, attack=ladder, kl_attack=ladder[20],
        attack_ratio=ladder[20] / max(1e-9, clean["importance"]["kl"]),
        joint=joint, kl_joint=joint[8])

def stability(ms, bench, gen):
    found = metrics.stability.stability(ms, bench.gpt, bench.fit[0], bench.test[0], gen)
    last = f"activations_survival_{len(ms) - 1}"
    return found | {f"{null}activations_survival": found[f"{null}{last}"] for null in ("", "null_")}

GROUPS = dict(faithfulness=faithfulness, completeness=completeness, parts=parts, words=words, judged=judged,
              effects=effects, robustness=robustness, stability=stability)
CURVES = {"faithfulness"}           # asked of every sparsity, the others of the middle one
BY_RATE = {"words", "judged"}       # asked of random directions at every sparsity: what their density alone gives
TOGETHER = {"stability"}            # asked of all seeds at once

EVALUATION = (evals, metrics.faithful, metrics.masks, metrics.recording, metrics.concepts, metrics.atoms,
              metrics.effects, metrics.words, concepts, baselines, data, cache, fused, sys.modules["model"])

# ------------------------------------------------------------------------------------------------------- the runs
def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

@dataclass
class Job:
    """One model to be had and asked: a method at one value of its knob and one seed, or a floor."""
    name: str
    knob: str
    value: float
    seed: int | None                # None: all of them
    middle: bool
    method: Method | None = None

    def groups(self, some):
        """Those of some groups of metrics that it is asked."""
        curve = CURVES | BY_RATE if self.name == "random" else CURVES
        return [g for g in some if (g in TOGETHER) == (self.seed is None) and (self.middle or g in curve)]

    @property
    def floor(self):
        return not self.method or ":" in self.name

    def __str__(self):
        return f"{self.name} {self.knob}={self.value:g} {'all seeds' if self.seed is None else f'seed {self.seed}'}"

    def config(self, cfg, gpt, layer):
        """The configuration of the training, all of its tokens spent in whole steps, and its folder, which the controls
        of a method share with it."""
        m, name = self.method, self.name.split(":")[0]
        run = m.module.Config(**{**m.change, **(m.quick if cfg.quick else {})}, model=str(gpt.folder), data=cfg.data,
                              layer=layer, device=cfg.device, seed=self.seed, eval_tokens=min(cfg.eval_tokens, 6_400))
        setattr(run, self.knob, self.value)
        run.T = min(run.T, gpt.cfg.n_positions)
        run.steps = max(1, cfg.tokens // per_step(run))
        fixed = dict(method=m.module.__name__, target=gpt.hash, text=data.fingerprint(cfg.data),
                     run={k: v for k, v in vars(run).items() if k not in m.module.MAY_CHANGE_ON_RESUME})
        run.out = str(Path(cfg.runs) / f"{name}-{self.knob}{self.value:g}-seed{self.seed}-{digest(fixed)}")
        return run

def source(code):
    """The text of a module, class or function."""
    return Path(code.__file__).read_text() if hasattr(code, "__file__") else inspect.getsource(code)

def per_step(run):
    return run.N if hasattr(run, "N") else run.B * run.T

def jobs(cfg):
    """Seeds outermost: whatever is there after a while compares all methods."""
    pick = list(METHODS) + list(FLOORS) if cfg.methods == "all" else dict.fromkeys(cfg.methods.split(","))
    out = []
    for seed in range(cfg.seeds):
        for name in pick:
            method = METHODS.get(name)
            knob, values = (method.knob, method.values) if method else ("k", FLOORS[name])
            mid = values[len(values) // 2]
            out += [Job(name, knob, v, seed, v == mid, method) for v in ([mid] if cfg.quick else values)
                    if method or name in SEEDED or not seed]
    trained = [job for job in out if not job.floor and job.middle and not job.seed]
    return out + [dataclasses.replace(job, seed=None) for job in trained if cfg.seeds > 1]

def trained(job, run, gpt, dev):
    """(model, its training's cost, hash of its checkpoint), trained or loaded."""
    module = job.method.module
    path = Path(run.out) / f"{module.__name__}.safetensors"
    expect = dict(method=module.__name__, target=gpt.hash)
    run.resume = path.exists()
    tensors, meta = common.load(path, **expect) if run.resume else ({}, {})
    if meta.get("step") != run.steps:
        Path(run.out).mkdir(parents=True, exist_ok=True)
        with open(Path(run.out) / "train.txt", "a") as log, contextlib.redirect_stdout(log):
            module.train(run)
        tensors, meta = common.load(path, **expect)
    m = module.load(path, gpt)
    cost = dict(tokens=run.steps * per_step(run), steps=run.steps, seconds=meta["seconds"])
    return m, cost, hashlib.sha256(path.read_bytes()).hexdigest()

def evaluate(job, cfg, bench, groups, dev):
    """What is known of one model, a flat dict, and None or what failed. Evaluations are kept beside the model, by the
    settings, the model, the text and the code that they depend on."""
    if job.name.endswith(":untrained"):
        folder = Path(cfg.runs) / f"untrained-{bench.gpt.hash}"
        baselines.random_target(bench.gpt, folder, 0)
        bench = bench._replace(gpt=GPT.load(folder, dev))
    gpt, layer, rows_RT = bench.gpt, bench.layer, bench.fit[0]
    if job.seed is None:
        every = [dataclasses.replace(job, seed=s).config(cfg, gpt, layer) for s in range(cfg.seeds)]
        ms, _, which = zip(*(trained(job, run, gpt, dev) for run in every))
        out, folder, make = {}, Path(cfg.runs) / f"{job.name}-{job.knob}{job.value:g}-seeds", lambda: ms
    elif job.method:
        run = job.config(cfg, gpt, layer)
        m, out, which = trained(job, run, gpt, dev)
        folder = Path(run.out)
        make = lambda: m
    else:
        F = SMALL if cfg.quick else sae.Config.F
        out, which, folder = {}, F, Path(cfg.runs) / f"{job.name}-k{job.value:g}-seed{job.seed}"
        make = lambda: baselines.baselines(gpt, layer, rows_RT, job.value, F, job.seed)[job.name]
    asked, failed = None, []
    for name in groups:
        code = [*EVALUATION, job.method.module if job.method else spd, GROUPS[name]]
        code += [metrics.matching, metrics.stability] * (name in TOGETHER)
        how = [*map(source, code), data.fingerprint(cfg.data), cfg.eval_tokens, cfg.explained if name in BY_RATE else 0]
        how += [source(metrics.llm), cfg.judge_url, cfg.judge_model] * (name == "judged")
        path = folder / f"{name}-{digest([name, str(job), which, gpt.hash, layer, how])}.json"
        try:
            if not path.exists():
                asked = asked or make()
                found = GROUPS[name](asked, bench, common.generator(job.seed or 0, name))
                common.write(path, json.dumps(finite(found)).encode())
            out |= json.loads(path.read_text())
        except (Exception, SystemExit) as e:        # one metric's trouble is no reason to lose the others
            failed.append(f"{name}: {error_text(e)}")
    return out, "; ".join(failed) or None

def error_text(e):
    return "stopped, as its error line says" if isinstance(e, SystemExit) else f"{type(e).__name__}: {e}"

def finite(value):
    """The same with None for what JSON can't say."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

def left(seconds, todo):
    """About how long the jobs `todo` take, as text; seconds: {name: [of jobs that were done]}."""
    every = [s for some in seconds.values() for s in some]
    if not every:
        return "time left unknown"
    total = sum(statistics.mean(seconds.get(job.name) or every) for job in todo)
    return f"about {total / 60:.0f} min left" if total < 5400 else f"about {total / 3600:.1f} h left"

def collect(cfg, bench, groups, dev):
    """[(job, what is known of it, None or how it failed)], with progress."""
    todo, seconds, out = [job for job in jobs(cfg) if job.groups(groups)], {}, []
    for i, job in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {job}; {left(seconds, todo[i:])}", flush=True)
        began, found, failed = time.time(), {}, None
        try:
            found, failed = evaluate(job, cfg, bench, job.groups(groups), dev)
        except (Exception, SystemExit) as e:        # nor one method's
            failed = error_text(e)
        if failed:
            print(f"FAILED {job}: {failed}", flush=True)
        if (spent := time.time() - began) > 1:      # what was there already says nothing about what is not
            seconds.setdefault(job.name, []).append(spent)
        out.append((job, found, failed))
    return out

def check(cfg, gpt):
    """Fails on what could not be run; (layer, names of the groups)."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    for flag, value, allowed in (("methods", cfg.methods, [*METHODS, *FLOORS]), ("metrics", cfg.metrics, [*GROUPS])):
        if bad := [v for v in value.split(",") if value != "all" and v not in allowed]:
            common.fail(f"--{flag} {bad[0]}: allowed are all, {', '.join(allowed)}")
    if cfg.readme and cfg.out != Config.out:
        common.fail(f"--readme: takes what is in {Config.out}/, a full run's, not --out {cfg.out}")
    common.within(vars(cfg) | {"layer": layer}, "tokens",
                  layer=(0, gpt.cfg.n_layer - 1), seeds=(1, 10), explained=(10, math.inf),
                  eval_tokens=(2 * gpt.cfg.n_positions, math.inf))
    groups = [g for g in GROUPS if (g in cfg.metrics.split(",") or cfg.metrics == "all") and (
        g != "judged" or cfg.judge_url)]
    if bool(cfg.judge_url) != bool(cfg.judge_model) or "judged" in cfg.metrics and not cfg.judge_url:
        common.fail(f"--judge_url {cfg.judge_url or None}: must come with --judge_model, and judged with both")
    if not any(job.groups(groups) for job in jobs(cfg)):
        common.fail(f"--metrics {cfg.metrics}: needs a method, not a floor, and --seeds of 2 or more")
    return layer, groups

def prepared(cfg, gpt, layer, dev):
    """The Bench that cfg asks for, with the concepts that are true at enough tokens of it."""
    T, corpora = gpt.cfg.n_positions, data.load_all(cfg.data, gpt.vocab, gpt.cfg.n_positions, ("fit", "test"))
    both, names = [c.labelled(T, cfg.eval_tokens // T, dev) for c in corpora.values()], corpora["test"].names
    enough = [k for k in range(len(names)) if min(label[:, 1:, k].sum() for _, label in both) >= evals.ALIVE]
    fit, test = ((rows, label[..., enough]) for rows, label in both)
    return Arena(gpt, layer, fit, test, [names[k] for k in enough], cfg.explained,
                 metrics.llm.ChatClient(cfg.judge_url, cfg.judge_model), {})

def main(cfg):
    if cfg.explain:
        print(table.describe())
        return
    asked = {k for k in WHOLE if getattr(cfg, k) != getattr(Config, k)}
    part = "-part" * (bool(asked) and cfg.out == Config.out)                # the whole table stays what it is
    if cfg.quick:
        cfg = dataclasses.replace(cfg, **{k: v for k, v in QUICK.items() if k not in asked}, out=f"{cfg.out}-quick")
    cfg.out += part
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    layer, groups = check(cfg, gpt)
    found = collect(cfg, prepared(cfg, gpt, layer, dev), groups, dev)
    results = table.assemble(found, common.provenance(cfg, gpt) | dict(layer=layer))
    table.write(results, cfg.out)
    if cfg.readme:
        table.embed(headline.render(results), Path(__file__).parent / "README.md")
    print("", table.render(results), f"-> {cfg.out}/results.json, table.md, table.csv, pictures", sep="\n")
    if failed := [f"{row['name']} {f}" for row in results["rows"] for f in row["failed"]]:
        common.fail(f"FAILED: {'; '.join(failed)}", 1)

if __name__ == "__main__":
    main(common.cli(Config))
