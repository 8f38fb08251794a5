"""How do all methods compare, on one MLP and the same tokens, over sparsities and seeds?

A run trains the models that are missing, evaluates what is not evaluated yet, and prints the table;
units.html beside it is a page to browse the units of the first seed of each row. A run that was
killed goes on; a second one only prints. A training or an evaluation that fails leaves a FAILED
row, and exit code 1. torchrun's processes share the jobs; on several machines they need a folder
that all of them see.

    a model         runs/compare/NAME-KNOB-SEED-KEY; KEY = hash of method, target, text, and of the
                    flags that are not at their defaults
    its evaluation  beside it, GROUP-KEY.json; KEY = hash of how the model is trained, the settings,
                    the text and what the code does that it depends on (without comments and
                    docstrings); a model that has answered everything is not needed any more
    all of them     results/answers.jsonl comes with the repository. Where nothing that an answer
                    depends on has changed, its model is neither trained nor asked again: a new row
                    costs its own time

A model that was trained by other code than its files now hold stops the run before anything is
done. It is for you to choose: --retrain trains such models anew, --keep uses them as they are.

Seeds are the unit of replication: mean +- half of the 95 % t interval over them. One rule for all:
a unit is on where f > 0 (SPD: masks rounded at 0.1, so that what counts as on is what is written),
and alive when it is on at 10 tokens of fit. Whatever is chosen is chosen on fit, every number is
from test. Stability is of all seeds of a row at once.

    python compare.py --quick       # one seed, one sparsity, small
    python compare.py --explain     # what each column means and which direction is better
    torchrun --nproc_per_node=2 compare.py      # two processes, each with half of the jobs
"""
import contextlib
import dataclasses
import datetime
import inspect
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

import baselines
import clt
import common
import data
import evals
import fused
import metrics.answers
import metrics.atoms
import metrics.concepts
import metrics.effects
import metrics.faithful
import metrics.llm
import metrics.masks
import metrics.matching
import metrics.recording
import metrics.words
import molt
import sae
import scratch
import spd
import stochastic
import transcoder
from metrics.answers import digest
from metrics.chat import ChatClient
from metrics.groups import BY_RATE, CURVES, GROUPS, TOGETHER
from model import GPT, default_layer
from report import gallery, headline, narrative, table
from tinytales import cache, concepts


@dataclass
class Config:
    # what is compared, on what
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    methods: str = "all"            # some of the rows that --explain names, comma-separated
    metrics: str = "all"            # some of faithfulness, completeness, parts, words, effects, ..
    # how much of it
    seeds: int = 3                  # [1, 10] models per method and sparsity, seeds 0, 1, ..
    tokens: int = 2_048_000         # [1, 1e11] that each model is trained on
    eval_tokens: int = 50_000       # [1, 1e9] of fit (means, choices) and of test (scores)
    explained: int = 100            # [10, 1e6] units per model that are explained in words
    quick: bool = False             # one seed, the middle sparsity, a tenth of the tokens, small
    judge_url: str = ""             # an LLM that judges too, OpenAI's protocol; $OPENAI_API_KEY
    judge_model: str = ""           # which LLM
    judge_timeout: float = 120      # [1, 3600] seconds until its reply has to be there
    judge_temperature: float = 0    # [0, 2] of its replies; the server's own if it refuses that
    judge_tokens: int = 200         # [1, 1e6] most tokens of a reply; 4, then 16 times as many
    # models that were trained by other code than their files now hold stop the run; instead:
    retrain: bool = False           # train those models anew
    keep: bool = False              # use those models as they are
    # what is shown, where it is kept
    explain: bool = False           # say what each row and each column means, and stop
    out: str = "results"            # for what is found; results-quick, results-part if not all
    page: bool = True               # units.html in --out: a page to browse one seed of each row
    readme: bool = False            # put it into README.md too, its numbers into results/README.md
    runs: str = "runs/compare"      # folder for the models and their evaluations
    answers: str = "results/answers.jsonl"      # of models trained elsewhere; none: train all
    device: str = "auto"            # auto, cpu, cuda


WHOLE = ("model", "data", "layer", "methods", "metrics", "seeds", "tokens", "eval_tokens",
         "explained")               # flags without which it is the whole table
QUICK = dict(seeds=1, tokens=409_600, eval_tokens=6_400, explained=20)
SMALL = 256                         # units of a dictionary with --quick


# ------------------------------------------------------------------------------------- the rows
class Method(NamedTuple):
    """A row of the table that is trained: one file, at several sparsities."""
    module: Any                     # Config, MAY_CHANGE_ON_RESUME, train(cfg), load(path, gpt)
    knob: str                       # the flag that sets how sparse it is
    values: tuple                   # of the knob, for the curves; values[len // 2] is in the table
    change: dict                    # flags that are not at the defaults of module.Config
    quick: dict                     # more of them with --quick
    text: str                       # what --explain says of the row
    times: int = 1                  # the tokens of the other rows that it is trained on


class Floor(NamedTuple):
    """A row of the table that needs no training (baselines.py)."""
    values: tuple                   # of k, the units on at each token (svd: of each matrix)
    text: str                       # what --explain says of the row
    has_seeds: bool = False         # is there chance in it?


# Optimizers and rates are, of those that studies/tune.py tries, the best or within 0.11 of it in
# ln KL (results/tuning.md).
MUON = dict(optimizer="muon", lr=0.04)
STOCHASTIC = dict(MUON, lr_rest=16e-3, base="transcoder")
NOISELESS = dict(STOCHASTIC, noise=False)
# nofreq and freq have one term of the penalty each, sum_f s_f or sum_f s_f log2(1 + freq_a s_f).
# lambda follows L0, whatever multiplies the penalty: only the ratio of the terms counts, and with
# a w_freq of 1,000 the second is all that is left. lambda would need ln(1,000) / follow = 230 steps
# to come down by as much, and kill units until then: so c_first is 1,000 times lower.
FREQUENCY = dict(NOISELESS, w_freq=1e3, c_first=1e-6)
METHODS = {
    "spd": Method(
        # quick: with C = D, V is square, and V U = W has huge pieces that cancel: CE recovered is
        # .80 at L0 250 there, .97 at 69 with 2 D (by spd-former's recipe)
        spd, "c_imp", (2e-5, 5e-5, 1.5e-4), dict(C=512, lr=0.04), dict(C=256),
        "parameter components of both matrices, masks rounded at 0.1: what is not on is not "
        "written"),
    "spd-former": Method(
        spd, "c_imp", (2e-5, 5e-5, 1.5e-4), dict(spd.FORMER, C=512), dict(C=256),
        "spd by an earlier recipe (results/spd-recipe.md), on which the studies beside the table "
        "are"),
    "spd-long": Method(
        # only the length is not spd-former's: a thousand steps are too few (results/spd-length.md)
        spd, "c_imp", (1e-4, 5e-5), dict(spd.FORMER, C=512), dict(C=256),
        "spd-former on three times the tokens that all other rows are trained on", times=3),
    "transcoder": Method(
        transcoder, "k", (8, 16, 32), MUON, dict(F=SMALL),
        "from the MLP's input to its output, TopK"),
    "transcoder-skip": Method(
        transcoder, "k", (8, 16, 32), dict(MUON, skip=True), dict(F=SMALL),
        "a TopK transcoder beside an affine map, which is always on"),
    "transcoder-kl": Method(
        transcoder, "k", (16,), dict(MUON, lr=0.01, objective="kl"), dict(F=SMALL),
        "a TopK transcoder trained on the KL through the rest of the model, as SPD is, instead of "
        "on the output"),
    "transcoder-stochastic": Method(
        stochastic, "k", (8, 16, 32), STOCHASTIC, dict(F=SMALL),
        "a transcoder with SPD's stochastic masks and penalty instead of TopK"),
    "transcoder-noiseless": Method(
        stochastic, "k", (16,), NOISELESS, dict(F=SMALL),
        "control of transcoder-stochastic: its penalty, but no noise in its masks"),
    "transcoder-nofreq": Method(
        stochastic, "k", (16,), dict(NOISELESS, w_freq=0.), dict(F=SMALL),
        "control of transcoder-stochastic: no noise, and of the penalty only how often each unit "
        "is on"),
    "transcoder-freq": Method(
        stochastic, "k", (16,), FREQUENCY, dict(F=SMALL),
        "control of transcoder-stochastic: no noise, and of the penalty only its frequency term"),
    "clt": Method(
        # k per layer; it is read at each so far
        clt, "k", (4, 8, 16), dict(MUON, lr=0.02), dict(F=128),
        "cross-layer transcoder, BatchTopK: its features of this layer and of all before"),
    "molt": Method(
        molt, "lam", (3e-3, 1e-3, 3e-4), dict(lr=16e-3), {},
        "mixture of linear transforms, JumpReLU gates"),
    "molt-sum": Method(
        molt, "lam", (3e-3, 1e-3, 3e-4), dict(lr=16e-3, sum_to_weights=True), {},
        "a mixture of linear transforms whose sum is tied to the weights"),
    "sae": Method(
        sae, "k", (8, 16, 32), MUON, dict(F=SMALL),
        "reads the output that it explains: it can't replace the MLP"),
    "sae-stochastic": Method(
        stochastic, "k", (8, 16, 32), dict(STOCHASTIC, base="sae"), dict(F=SMALL),
        "an SAE with SPD's stochastic masks and penalty instead of TopK"),
    # controls, and what is of another target: a colon stands before what is not as in the others
    "spd:scratch": Method(
        scratch, "c_imp", (1e-4,), {}, dict(C=128),
        "what an MLP was made of from its first step of training: of the model that it made, not "
        "of the target"),
    "sae:frozen": Method(
        sae, "k", (16,), dict(MUON, frozen=True), dict(F=SMALL),
        "floor: an SAE whose directions that it writes stay random, only what reads is trained"),
    "sae:untrained": Method(
        sae, "k", (16,), MUON, dict(F=SMALL),
        "floor: an SAE of a target with random weights"),
}
FLOORS = {
    "neurons": Floor((8, 16, 32), "floor: the neurons that write most"),
    "pca": Floor((8, 16, 32), "floor: principal components of the output"),
    "random": Floor((8, 16, 32), "floor: random directions", has_seeds=True),
    "svd": Floor((4, 8, 16), "floor: singular vectors of both matrices, those that write most"),
}


# ----------------------------------------------------------------------- what a model is asked
class Arena(NamedTuple):
    """What every model is evaluated on."""
    gpt: GPT
    layer: int
    fit: tuple                      # (rows, labels), for means and choices
    test: tuple                     # (rows, labels), for scores
    names: list                     # of the concepts that are labelled
    explained: int                  # units per model that are explained in words
    judge: Any                      # the LLM, if there is one
    once: dict                      # what `shared` has found, and the untrained target
    elsewhere: dict                 # {name: answers} of models that were trained elsewhere

    def shared(self, function, name, **how):
        """Find what holds for all decompositions of a target, once for all of them:
        function(gpt, layer, fit, test, gen, **how)."""
        key = (name, self.gpt.hash)
        if key not in self.once:
            gen = common.generator(0, name)
            self.once[key] = function(
                self.gpt, self.layer, fit=self.fit, test=self.test, gen=gen, **how)
        return self.once[key]


# the code that every evaluation depends on, beside its group's own and its method's
EVALUATION = (evals, metrics.faithful, metrics.masks, metrics.recording, metrics.concepts,
              metrics.atoms, metrics.effects, metrics.words, concepts, baselines, data, cache,
              fused, sys.modules["model"])


# ---------------------------------------------------------------------------------- the jobs
@dataclass
class Job:
    """One model to be had and asked: a method at one value of its knob and one seed, or a floor."""
    name: str
    knob: str
    value: float
    seed: int | None                # None: all of them at once
    middle: bool
    method: Method | None = None    # None: a floor that needs no training

    @property
    def floor(self):
        return not self.method or ":" in self.name

    @property
    def has_own_target(self):
        """Does it take apart another target: of random weights, or one that it makes?"""
        makes_one = self.method and hasattr(self.method.module, "TARGET")
        return bool(makes_one) or self.name.endswith(":untrained")

    def __str__(self):
        who = "all seeds" if self.seed is None else f"seed {self.seed}"
        return f"{self.name} {self.knob}={self.value:g} {who}"

    def groups(self, wanted):
        """Which of the wanted groups of metrics is it asked?"""
        at_every_value = CURVES | BY_RATE if self.name == "random" else CURVES
        asked = []
        for group in wanted:
            is_at_once = group in TOGETHER
            if is_at_once == (self.seed is None) and (self.middle or group in at_every_value):
                asked.append(group)
        return asked

    def config(self, cfg, gpt, layer):
        """Configure the training, all of its tokens spent in whole steps. Its folder tells methods,
        targets, texts and flags apart; the controls of a method share it where nothing differs."""
        module = self.method.module
        flags = self.method.change | (self.method.quick if cfg.quick else {})
        run = module.Config(
            **flags, model=str(gpt.folder), data=cfg.data, layer=layer, device=cfg.device,
            seed=self.seed, eval_tokens=min(cfg.eval_tokens, 6_400))
        setattr(run, self.knob, self.value)
        run.T = min(run.T, gpt.cfg.n_positions)
        run.steps = max(1, self.method.times * cfg.tokens // tokens_per_step(run))

        # A flag at its default is not in the key, so that one that is new moves no model. A
        # default that changes is found by `out_of_date`.
        key = digest(dict(method=module.__name__, target=gpt.hash,
                          text=data.fingerprint(cfg.data), run=changed_flags(run, module)))
        name = self.name.split(":")[0]
        folder = f"{name}-{self.knob}{self.value:g}-seed{self.seed}-{key}"
        run.out = str(Path(cfg.runs) / folder)
        return run

    def trainings(self, cfg, gpt, layer):
        """The configuration of each model that it needs: one, all seeds', or none for a floor."""
        if not self.method:
            return []
        seeds = range(cfg.seeds) if self.seed is None else [self.seed]
        return [dataclasses.replace(self, seed=seed).config(cfg, gpt, layer) for seed in seeds]


def tokens_per_step(run):
    return run.N if hasattr(run, "N") else run.B * run.T


def changed_flags(run, module):
    """The flags that decide what is trained and are not at their defaults."""
    return {name: value for name, value in vars(run).items()
            if name not in module.MAY_CHANGE_ON_RESUME and value != getattr(module.Config, name)}


def jobs(cfg):
    """All that is to be had and asked. Seeds outermost: whatever is there after a while compares
    all methods."""
    names = [*METHODS, *FLOORS]
    if cfg.methods != "all":
        names = dict.fromkeys(cfg.methods.split(","))
    todo = []
    for seed in range(cfg.seeds):
        for name in names:
            todo += jobs_of_row(name, seed, cfg.quick)
    if cfg.seeds == 1:
        return todo
    middles = [job for job in todo if job.middle and not job.floor and job.seed == 0]
    return todo + [dataclasses.replace(job, seed=None) for job in middles]


def jobs_of_row(name, seed, is_quick):
    """One seed of a method or floor at each of its sparsities; --quick: at the middle one."""
    method = METHODS.get(name)
    if not method and seed > 0 and not FLOORS[name].has_seeds:
        return []
    knob = method.knob if method else "k"
    values = method.values if method else FLOORS[name].values
    middle = values[len(values) // 2]
    tried = [middle] if is_quick else values
    return [Job(name, knob, value, seed, value == middle, method) for value in tried]


# -------------------------------------------------------------------------------- the models
def checkpoint(run, module):
    return Path(run.out) / f"{module.__name__}.safetensors"


def out_of_date(run, module):
    """In what was a model trained differently from how it would be trained now? A list of texts,
    empty where nothing differs or there is no model yet."""
    meta = common.read_meta(checkpoint(run, module))
    if not meta:
        return []
    had = meta.get("code", {})
    has = common.training_code(module.__file__)
    wrong = [name for name in had | has if had.get(name) != has.get(name)]

    # flags whose defaults have changed; one that is new is at its default
    had_flags = meta.get("config", {})
    flags = {name: value for name, value in vars(run).items()
             if name in had_flags and name not in module.MAY_CHANGE_ON_RESUME}
    flags = json.loads(json.dumps(flags))           # as meta went: tuples become lists
    had_flags = {name: had_flags[name] for name in flags}
    text = data.fingerprint(run.data)
    if meta.get("text", text) != text:
        wrong.append("its data were others")
    return wrong + common.differences("flags", had_flags, flags)


def check_models(cfg, arena, todo):
    """Fail if a model that would be used was trained by other code than its files now hold, unless
    it was said what to do with it. Before anything is done: a run takes hours."""
    if cfg.retrain or cfg.keep:
        return
    wrong = {}                      # {row: in what its models differ}
    for job in todo:
        target = target_of(job, cfg, arena)
        for run in job.trainings(cfg, target.gpt, target.layer):
            differs = out_of_date(run, job.method.module)
            if differs:
                wrong.setdefault(job.name, {}).update(dict.fromkeys(differs))
    if wrong:
        rows = "; ".join(f"{name} ({', '.join(differs)})" for name, differs in wrong.items())
        common.fail(f"trained by other code than there is now: {rows}: give --retrain to train "
                    "these models anew, or --keep to use them as they are")


def is_trained(run, module, retrain, keep) -> bool:
    """Is a model there, and whole? Otherwise run.resume says whether its training goes on from
    where it was left. Fails on a model of other code unless it was said what to do with it."""
    path = checkpoint(run, module)
    differs = out_of_date(run, module)
    if differs and not (retrain or keep):
        common.fail(f"{path}: trained by other code than there is now ({', '.join(differs)}): "
                    "remove it to train that model anew, or see compare.py --keep")
    run.resume = path.exists() and not (differs and retrain)
    is_at_end = run.resume and common.read_meta(path).get("step") == run.steps
    made = made_target(run, module)                         # it is written after that
    return is_at_end and (not made or (made / "model.safetensors").exists())


def made_target(run, module):
    """The folder of the model that a training makes, and takes apart instead of its target; None
    where it makes none."""
    return Path(run.out) / module.TARGET if hasattr(module, "TARGET") else None


class Trained(NamedTuple):
    """A model that is there."""
    model: Any                      # a decomposition
    gpt: GPT                        # what it takes apart
    cost: dict                      # of its training


def identity(run, module, retrain=False):
    """Hash what makes the model of a run what it is: method, target and text, flags and seed, and
    the code, those that it was trained with or would be. They give one model, but for the rounding
    of another machine (a GPU's random draws are others too), so that what is known of it holds
    before it is trained, and once it is gone."""
    meta = {} if retrain else common.read_meta(checkpoint(run, module))
    flags = meta.get("config", {}) if meta else json.loads(json.dumps(vars(run)))
    flags = {name: flags[name] for name in flags if name not in module.MAY_CHANGE_ON_RESUME}
    code = meta.get("code", {}) if meta else common.training_code(module.__file__)
    return digest([Path(run.out).name, flags, code])


def trained(job, run, gpt, retrain=False, keep=False):
    """The Trained of a run, trained now or loaded.

    Of two runs with one folder for models, the second waits until the first has trained it.
    retrain, keep: what to do with a model that other code has trained; neither: fail."""
    module = job.method.module
    path = checkpoint(run, module)
    if not is_trained(run, module, retrain, keep):
        common.hold(run.out, wait=True)
        try:
            # whoever had that folder may have trained it meanwhile
            if not is_trained(run, module, retrain, keep):
                if made_target(run, module) and not run.resume:
                    (made_target(run, module) / "model.safetensors").unlink(missing_ok=True)
                log = open(Path(run.out) / "train.txt", "a", encoding="utf-8")
                with log, contextlib.redirect_stdout(log):
                    module.train(run)
        finally:
            common.let_go(run.out)

    made = made_target(run, module)
    if made:
        gpt = GPT.load(made, gpt.device)
    m = module.load(path, gpt)
    tokens = run.steps * tokens_per_step(run)
    cost = dict(tokens=tokens, steps=run.steps, seconds=common.read_meta(path)["seconds"])
    return Trained(m, gpt, cost)


def subject_of(job, cfg, arena):
    """Have what a job asks, trained or loaded or made: a Trained; of all seeds at once, its model
    is the tuple of theirs."""
    if not job.method:
        made = baselines.baselines(
            arena.gpt, arena.layer, arena.fit[0], job.value, floor_units(cfg), job.seed)
        return Trained(made[job.name], arena.gpt, {})
    runs = job.trainings(cfg, arena.gpt, arena.layer)
    found = [trained(job, run, arena.gpt, cfg.retrain, cfg.keep) for run in runs]
    if job.seed is None:
        return Trained(tuple(one.model for one in found), arena.gpt, {})
    return found[0]


def which_of(job, cfg, arena):
    """What tells the models that a job asks from others, before they are there."""
    if not job.method:
        return floor_units(cfg)
    runs = job.trainings(cfg, arena.gpt, arena.layer)
    return [identity(run, job.method.module, cfg.retrain) for run in runs]


def folder_of(job, cfg, arena):
    """The folder for what a job's model answers: its own, if it is one that is trained."""
    if job.method and job.seed is not None:
        return Path(job.config(cfg, arena.gpt, arena.layer).out)
    seed = "s" if job.seed is None else job.seed
    return Path(cfg.runs) / f"{job.name}-{job.knob}{job.value:g}-seed{seed}"


def is_there(job, cfg, arena) -> bool:
    """Are the models that a job asks there? A floor can always be made."""
    runs = job.trainings(cfg, arena.gpt, arena.layer)
    return all(checkpoint(run, job.method.module).exists() for run in runs)


def floor_units(cfg):
    """How many random directions the floor `random` has: as many as an SAE has units."""
    return SMALL if cfg.quick else sae.Config.F


def target_of(job, cfg, arena):
    """The arena of a job's training: with random weights for the control of that name."""
    if not job.name.endswith(":untrained"):
        return arena
    if "untrained" not in arena.once:
        folder = Path(cfg.runs) / f"untrained-{arena.gpt.hash}"
        baselines.random_target(arena.gpt, folder, 0)
        arena.once["untrained"] = GPT.load(folder, arena.fit[0].device)
    return arena._replace(gpt=arena.once["untrained"])


# --------------------------------------------------------------------------- the evaluations
def code_of(part):
    """Hash what a module, class or function does."""
    if hasattr(part, "__file__"):
        text = Path(part.__file__).read_text(encoding="utf-8")
    else:
        text = inspect.getsource(part)
    return common.read_source(text).hash


def evaluation_key(group, job, which, cfg, arena):
    """Hash all that the answers of one group of metrics depend on. which: `which_of` the job."""
    # what the code does: what all groups share, the method's files, and the group's own
    parts = [*EVALUATION, GROUPS[group]]
    if group in TOGETHER:
        parts.append(metrics.matching)
    module = job.method.module if job.method else spd           # svd is an SPD
    depends_on = [code_of(part) for part in parts]
    depends_on.append(common.training_code(module.__file__))

    # the text, and the settings
    depends_on += [data.fingerprint(cfg.data), cfg.eval_tokens]
    depends_on.append(cfg.explained if group in BY_RATE else 0)
    if group == "judged":
        depends_on += [cfg.judge_url, cfg.judge_model, cfg.judge_temperature, cfg.judge_tokens]
    return digest([group, str(job), which, arena.gpt.hash, arena.layer, depends_on])


def evaluate(job, cfg, arena, groups):
    """Ask one model: (what is known of it, a flat dict; what failed, or None).

    Answers, and what the training took, are kept in the folder of the model, by the key of all that
    they depend on. A model that has answered everything is not needed any more."""
    arena = target_of(job, cfg, arena)
    paths = answer_paths(job, cfg, arena, groups)
    found = {group: read_answers(path, arena) for group, path in paths.items()}
    failed = []
    if None in found.values() or is_to_be_retrained(job, cfg, arena):
        subject = subject_of(job, cfg, arena)
        # another run may have put another model there meanwhile
        paths = answer_paths(job, cfg, arena, groups)
        arena = arena._replace(gpt=subject.gpt)
    for group in groups:
        try:
            if found[group] is None:
                gen = common.generator(job.seed or 0, group)
                numbers, details = GROUPS[group].measure(subject.model, arena, gen)
                found[group] = metrics.answers.keep(paths[group], subject.cost | numbers | details)
        except (Exception, SystemExit) as e:        # the other groups still have their say
            failed.append(f"{group}: {error_text(e)}")
    answers = {}
    for group in groups:
        answers |= found[group] or {}
    return answers, "; ".join(failed) or None


def answer_paths(job, cfg, arena, groups) -> dict:
    """Where are the answers of a job to groups of metrics kept? {group: path}."""
    folder = folder_of(job, cfg, arena)
    which = which_of(job, cfg, arena)
    keys = {group: evaluation_key(group, job, which, cfg, arena) for group in groups}
    return {group: folder / f"{group}-{key}.json" for group, key in keys.items()}


def is_to_be_retrained(job, cfg, arena) -> bool:
    """Is a model there that other code has trained, and is to be trained anew?"""
    runs = job.trainings(cfg, arena.gpt, arena.layer) if cfg.retrain else []
    return any(out_of_date(run, job.method.module) for run in runs)


def read_answers(path, arena):
    """Read the answers that a model has given here, or else elsewhere (--answers); None if neither.

    path: where they are kept here."""
    here = metrics.answers.kept(path)
    return arena.elsewhere.get(metrics.answers.name_of(path)) if here is None else here


def all_paths(cfg, arena, groups, todo) -> list:
    """Where are the answers of all jobs kept?"""
    paths = []
    for job in todo:
        arena_of_job = target_of(job, cfg, arena)
        paths += answer_paths(job, cfg, arena_of_job, job.groups(groups)).values()
    return paths


def print_reused(cfg, arena, paths):
    """Say how many of the answers that are asked for were given elsewhere."""
    reused = [path for path in paths if metrics.answers.name_of(path) in arena.elsewhere]
    if reused:
        print(f"{len(reused)} of {len(paths)} answers are in {cfg.answers}; --answers none trains "
              "all models here")


def error_text(e):
    if isinstance(e, SystemExit):
        return "stopped, as its error line says"
    return f"{type(e).__name__}: {e}"


class Team:
    """The processes that share the jobs of one run: this one alone, or all that torchrun started.

    They agree over a store of torchrun's that counts, and meet only where one needs what another
    has made. torchrun stops all of them when one dies; what they have done is kept, and the next
    start does the rest."""
    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = 0
        if self.size == 1:
            return
        self.store, self.rank, _ = next(distributed.rendezvous("env://"))
        # one may train for days while the others wait for it
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=100),
                                       store=self.store, rank=self.rank, world_size=self.size)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    def take(self, what, tasks):
        """Yield the tasks that fall to this process, in order, each when the one before is done.
        what: a name that no other list of tasks has."""
        if self.size == 1:
            yield from tasks
            return
        for _ in tasks:
            # the store counts how many are taken, by whomever
            i = self.store.add(what, 1) - 1
            if i >= len(tasks):
                return
            yield tasks[i]

    def gather(self, found: dict) -> dict:
        """Wait for all processes, and join the dicts that they have found."""
        everyones = [found]
        if self.size > 1:
            everyones = [None] * self.size
            distributed.all_gather_object(everyones, found)
        joined = {}
        for part in everyones:
            joined |= part
        return joined

    def leave(self):
        """Let go of the others. A process that ends without it can be aborted by what they do."""
        if self.size > 1:
            distributed.destroy_process_group()


def left(seconds, todo, n_processes=1):
    """Say how long the jobs `todo` may take. seconds: {name: [of jobs that are done]}; a name
    without any gets the mean over all jobs."""
    spent = list(itertools.chain.from_iterable(seconds.values()))
    if not spent:
        return "time left unknown"
    total = sum(statistics.mean(seconds.get(job.name) or spent) for job in todo) / n_processes
    if total < 5400:
        return f"about {total / 60:.0f} min left"
    return f"about {total / 3600:.1f} h left"


def note_time(seconds, task, began):
    """Note how long a task took; what was there already says nothing about how long the rest
    takes."""
    spent = time.time() - began
    if spent > 1:
        seconds.setdefault(task.name, []).append(spent)


def in_turn(todo, what=""):
    """Yield one task after another, and print each with the time that is left, by how long tasks of
    its name took. what: the word before it."""
    seconds = {}
    for i, task in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {what}{task}; {left(seconds, todo[i:])}", flush=True)
        began = time.time()
        yield task
        note_time(seconds, task, began)


def by_model(cfg, arena, todo, some):
    """Put the jobs that ask one model into one piece of work, since two processes can't train it at
    once: lists of numbers of todo."""
    pieces = {}
    for i in some:
        target = target_of(todo[i], cfg, arena)
        runs = todo[i].trainings(cfg, target.gpt, target.layer)
        folders = tuple(run.out for run in runs) or i
        pieces.setdefault(folders, []).append(i)
    return list(pieces.values())


def collect(cfg, arena, groups, todo, team):
    """Do all jobs, with progress: [(job, what is known of it, None or how it failed)]."""
    # what is asked of all seeds at once comes after them, once every process is done
    of_a_seed = [i for i, job in enumerate(todo) if job.seed is not None]
    of_all_seeds = [i for i, job in enumerate(todo) if job.seed is None]
    seconds = {}
    done = {}                       # {which of todo: (what is known of it, how it failed)}
    for what, some in (("of a seed", of_a_seed), ("of all seeds", of_all_seeds)):
        pieces = by_model(cfg, arena, todo, some)
        for i in itertools.chain.from_iterable(team.take(what, pieces)):
            job = todo[i]
            time_left = left(seconds, todo[i:], team.size)
            print(f"[{i + 1}/{len(todo)}] {job}; {time_left}", flush=True)
            began = time.time()
            answers = {}
            try:
                answers, failed = evaluate(job, cfg, arena, job.groups(groups))
            except (Exception, SystemExit) as e:        # the other methods still have their rows
                failed = error_text(e)
            if failed:
                print(f"FAILED {job}: {failed}", flush=True)
            note_time(seconds, job, began)
            done[i] = answers, failed
        done = team.gather(done)
    return [(job, *done[i]) for i, job in enumerate(todo)]


def write_page(cfg, arena, found):
    """Write a page to browse the units of the first seed of each row, at its middle sparsity.
    Returns a line that says so. A page of the same models is kept."""
    shown = []
    depends_on = [code_of(gallery), gallery.TEMPLATE.read_text(encoding="utf-8")]
    for job, numbers, failed in found:
        # units of another target say nothing of this one
        if job.seed == 0 and job.middle and not job.has_own_target and not failed:
            shown.append((job, numbers.get("ce_recovered")))
            depends_on += [job.name, job.value, which_of(job, cfg, arena)]
    if not shown:
        return f"no {gallery.PAGE}: every row failed"

    n_rows = max(2, gallery.TOKENS // arena.gpt.cfg.n_positions)
    fit, test = [(rows[:n_rows], labels[:n_rows]) for rows, labels in (arena.fit, arena.test)]
    scene = gallery.Scene(arena.gpt, arena.layer, fit, test, arena.names, gallery.RULES)
    key = digest([depends_on, arena.gpt.hash, data.fingerprint(cfg.data), test[0].shape])
    path = Path(cfg.out) / gallery.PAGE
    if gallery.is_of(path, key):
        return f"-> {path}"
    gone = [job.name for job, _ in shown if not is_there(job, cfg, arena)]
    if gone:
        return f"no {path}: there is no model any more of {', '.join(gone)}"
    named = [(job.name, subject_of(job, cfg, arena).model, ce) for job, ce in shown]
    return gallery.write(path, named, scene, key)


# ------------------------------------------------------------------------------------ the run
def check(cfg, gpt):
    """Fail on what can't be run; otherwise (layer, names of the groups of metrics)."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    check_names("methods", cfg.methods, [*METHODS, *FLOORS])
    check_names("metrics", cfg.metrics, [*GROUPS])
    if cfg.readme and cfg.out != Config.out:
        common.fail(f"--readme: takes what is in {Config.out}/, a full run's, not --out {cfg.out}")
    if cfg.retrain and cfg.keep:
        common.fail("--retrain --keep: one of them, for models that other code has trained")
    T = gpt.cfg.n_positions
    common.check(dataclasses.replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 eval_tokens=f"[{2 * T}, inf]")

    # the judge needs an endpoint and a model; without them "all" is all other groups
    wanted = [*GROUPS] if cfg.metrics == "all" else cfg.metrics.split(",")
    is_half_named = bool(cfg.judge_url) != bool(cfg.judge_model)
    is_unnamed = "judged" in cfg.metrics and not cfg.judge_url
    if is_half_named or is_unnamed:
        common.fail(f"--judge_url {cfg.judge_url or None}: must come with --judge_model, and "
                    "judged with both")
    for name in ("judge_timeout", "judge_temperature", "judge_tokens"):
        if not cfg.judge_url and getattr(cfg, name) != getattr(Config, name):
            common.fail(f"--{name}: goes with --judge_url")
    groups = [group for group in GROUPS
              if group in wanted and (group != "judged" or cfg.judge_url)]
    if cfg.judge_url and "judged" not in groups:
        common.fail("--judge_url: goes with judged among --metrics")
    if not any(job.groups(groups) for job in jobs(cfg)):
        common.fail(f"--metrics {cfg.metrics}: needs a method, not a floor, and --seeds of 2 or "
                    "more")
    return layer, groups


def check_names(flag, value, allowed):
    """Fail if a comma-separated flag has a name that is not allowed."""
    for name in value.split(","):
        if value != "all" and name not in allowed:
            common.fail(f"--{flag} {name}: allowed are all, {', '.join(allowed)}")


def prepared(cfg, gpt, layer, dev):
    """The Arena that cfg asks for, with the concepts that are true at enough tokens of fit and of
    test."""
    T = gpt.cfg.n_positions
    corpora = data.load_for(gpt, cfg.data, T, ("fit", "test"))
    names = corpora["test"].names
    splits = [corpus.labelled(T, cfg.eval_tokens // T, dev) for corpus in corpora.values()]
    enough = []
    for k in range(len(names)):
        n_true = min(labels[:, 1:, k].sum() for _, labels in splits)
        if n_true >= evals.ALIVE:
            enough.append(k)
    fit, test = [(rows, labels[..., enough]) for rows, labels in splits]
    judge = None
    if cfg.judge_url:
        judge = ChatClient(cfg.judge_url, cfg.judge_model, cfg.judge_timeout,
                           cfg.judge_temperature, cfg.judge_tokens)
        judge.check()               # before hours of training
    elsewhere = {}
    is_default_missing = cfg.answers == Config.answers and not Path(cfg.answers).exists()
    if cfg.answers != "none" and not is_default_missing:
        elsewhere = metrics.answers.read_all(cfg.answers)
    return Arena(gpt, layer, fit, test, [names[k] for k in enough], cfg.explained, judge, {},
                 elsewhere)


def narrowed(cfg):
    """Apply --quick, and give a run that is not the whole table a folder of its own, so that the
    whole table stays what it is."""
    asked = {name for name in WHOLE if getattr(cfg, name) != getattr(Config, name)}
    is_part = asked and cfg.out == Config.out
    if cfg.quick:
        quick = {name: value for name, value in QUICK.items() if name not in asked}
        cfg = dataclasses.replace(cfg, **quick, out=f"{cfg.out}-quick")
    if is_part:
        cfg.out += "-part"
    return cfg


def main(cfg):
    if cfg.explain:
        rows = METHODS | FLOORS
        print(table.describe({name: row.text for name, row in rows.items()}))
        return

    # what is to be done, on what
    cfg = narrowed(cfg)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    layer, groups = check(cfg, gpt)
    arena = prepared(cfg, gpt, layer, dev)
    todo = [job for job in jobs(cfg) if job.groups(groups)]
    check_models(cfg, arena, todo)
    paths = all_paths(cfg, arena, groups, todo)

    # do it, and tell; of many processes the first one tells
    team = Team()
    common.must_be_writable(cfg.out, cfg.runs)
    if team.rank == 0:
        common.hold(cfg.out)
        print_reused(cfg, arena, paths)
    found = collect(cfg, arena, groups, todo, team)
    team.leave()
    if team.rank:
        return
    answers = {metrics.answers.name_of(path): read_answers(path, arena) for path in paths}
    metrics.answers.write_all(Path(cfg.out) / Path(Config.answers).name, answers)
    results = table.assemble(found, common.provenance(cfg, gpt) | dict(layer=layer),
                             table.of_studies(cfg.out, gpt.hash))
    table.write(results, cfg.out)
    print("", table.render(results), sep="\n")
    print(f"-> {cfg.out}/results.json, table.md, table.csv, pictures")
    if cfg.readme:
        table.embed(headline.render(results), Path(__file__).parent / "README.md")
        narrative.update(Path(__file__).parent / Config.out / "README.md", results)
    failed = []
    for row in results["rows"]:
        failed += [f"{row['name']} {text}" for text in row["failed"]]
    if cfg.page:
        try:
            print(write_page(cfg, arena, found))
        except (Exception, SystemExit) as e:        # the table is there
            failed.append(f"{gallery.PAGE}: {error_text(e)}")
    if failed:
        common.fail(f"FAILED: {'; '.join(failed)}", 1)


if __name__ == "__main__":
    main(common.cli(Config))
