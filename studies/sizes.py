"""What happens to a method's units when its dictionary grows?

If units are parts of the model, a larger decomposition has the units of a smaller one, and some
that the smaller one had no room for. If they are not, its units are cut otherwise. Each method is
trained at several sizes. Sparsity is tuned anew at each size, on fit and the first seed, in arms:

    l0      units on per token are held
    ce      CE recovered is held, at a level that all methods reach

At each size: how many units are alive by each published rule, and in how many units does a true
concept live? Each two neighbouring sizes, and the smallest and the largest, are held against each
other (metrics/sizes.py, metrics/parts.py). Two random starts differ even at one size, so what
growth does is

    number(S of seed s, L of seed s + 1) - number(S of seed s, S of seed s + 1)

with its mean and interval over s; the second is the floor. It is never one seed on both sides: its
first units would start at the same numbers, and see the same batches in the same order. (--seeds 1
does that, and has no floor.) Beside each number stands its null too, random units in the place of
the larger one's. The size of --twice is also trained on twice the tokens, and held against itself:
what longer training changes by itself.

A model whose loss may still fall, or that is made of components without a cliff in their mean
importances, is not known to be settled, and what is said of it is marked ~. Optimizers and their
rates are those of the table at every size. What fails is named on the page, and left out.

    python -m studies.sizes     # 6 methods, 4 sizes, 2 arms: some 25 core hours; goes on
    python -m studies.sizes --methods sae,transcoder --arms l0 --sizes 256,512 --twice 256
                                # a look; with --seeds 2 --tokens 4e5 --eval_tokens 12800 --out ..

S units of a small decomposition, L of a large one, R rows, T positions, as in metrics/sizes.py.
"""
import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

import common
import compare
import data
import evals
import molt
from metrics import atoms, concepts, mapping, matching, parts, recording, sizes, stability
from metrics.matching import SHARED
from model import GPT
from report import curve, noise, pictures
from report.table import markdown_table
from studies.kept import SPD_ROWS, Found, apart, column, numbers

METHODS = "spd,transcoder,transcoder-kl,transcoder-stochastic,sae,molt"


@dataclass
class Config:
    # what grows, on what
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    methods: str = METHODS          # rows of compare.py, comma-separated
    sizes: str = "256,512,1024,2048"    # units; spd: of each matrix; molt: 512 is its default
    twice: str = "256"              # sizes also trained on twice the tokens; empty: none
    # what is held while it grows
    arms: str = "l0,ce"             # l0, ce
    l0: float = 16                  # [1, 1e6] units on per token in the arm l0
    ce: float = 0.985               # (0, 1) CE recovered in the arm ce
    # how much of it
    seeds: int = 3                  # [1, 10] models of each method, arm and size
    tokens: int = compare.Config.tokens     # [1, 1e11] that each model is trained on
    eval_tokens: int = 50_000       # [1, 1e9] of fit (choices) and of test (numbers)
    # models that were trained by other code than their files now hold stop the run; instead:
    retrain: bool = False           # train those models anew
    keep: bool = False              # use those models as they are
    # where it is kept
    out: str = "results"            # folder for sizes.json, .md and .png; a part: results-part
    runs: str = "runs/sizes"        # folder for the models, whose loss is logged at each step
    device: str = "auto"            # auto, cpu, cuda


# All methods reach a CE of 0.985: SPD at an L0 of 17 or more, the others below 16 (sizes.md).
ARMS = ("l0", "ce")
MOLT_SIZE = 512                 # the size that a MOLT's own 124 transforms are: times 1/2, 1, 2, 4
TRIALS = 5                      # most of a search
NEAR_L0 = 0.05                  # of the L0 asked for: a trial this near ends the search
NEAR_CE = 0.002                 # .. and of CE recovered
FACTOR = 4.                     # by which a knob goes beyond all that was tried
LATE = 0.2                      # share of the training, its last part, that `falling` looks at
HELD = 8                        # recordings of models in memory, 100 MB each for 50,000 tokens
SPLICED = (0, 1, 2)             # points on the way from small to large whose CE is taken ..
SPLICED_ROWS = 100              # .. on so many rows of test
SIMILARITIES = {
    "writes": "what units write alone, as is published",
    "both": "the lower of the cosines of what they write and of what they read",
    "inputs": "the lower of these cosines, that of what they read over the inputs that occur (of "
              "dictionaries, whose units have biases, over how these vary)",
    "values": "the correlation of what they say, for all kinds alike",
}
MAIN = "inputs"                 # the similarity that the headline and the table go by
AROUND = (0.5, 0.9)             # the thresholds of similarity whose canonicity is also told ..
AROUND_BY = (MAIN, "values")    # .. by these
SETTLED = 0.05                  # most that a loss may fall over the last part, for sure
LOG_EVERY = 1                   # steps between the losses that `falling` looks at
RULES = {"alive": "10 tokens", "alive_mean": "mean > 1e-6", "alive_rate": "rate > 1e-6",
         "alive_once": "once > 0.1"}
CODE = (evals, sizes, matching, stability, mapping, recording, concepts, atoms)    # of all numbers


# ---------------------------------------------------------------------------- what is to be trained
class Cell(NamedTuple):
    """A method at one size, whose sparsity is tuned for one arm."""
    method: str
    arm: str
    size: int
    times: int                  # its tokens, over those of --tokens

    def __str__(self):
        return f"{self.method} {self.arm} {size_text(self)}"


class Setting(NamedTuple):
    """A method at one size and sparsity. Two arms that end at one share its models and numbers."""
    method: str
    size: int
    times: int
    value: float                # of the method's knob

    def __str__(self):
        knob = compare.METHODS[self.method].knob
        return f"{size_text(self)} {knob}={self.value:g}"


def size_text(which):
    """Write the size of a cell or setting: 512, or 512x2 on twice the tokens."""
    return f"{which.size}" if which.times == 1 else f"{which.size}x{which.times}"


def methods_of(cfg):
    """The rows of compare.py that grow: all of one MLP alone, without their controls."""
    # a skip has no counterpart on the way from a small to a large one
    allowed = [name for name, method in compare.METHODS.items()
               if ":" not in name and name != "clt" and not method.change.get("skip")]
    compare.check_names("methods", cfg.methods, allowed)
    return allowed if cfg.methods == "all" else list(dict.fromkeys(cfg.methods.split(",")))


def sizes_in(cfg, flag):
    """Read a flag that holds sizes, smallest first."""
    return sorted(set(numbers(cfg, flag, 10**7)))


def cells(cfg):
    """List all cells. Those of one method and arm stand together, smallest first."""
    grown = sizes_in(cfg, "sizes")
    longer = sizes_in(cfg, "twice")
    arms = list(dict.fromkeys(cfg.arms.split(",")))
    if not grown or not {*longer} <= {*grown}:
        common.fail(f"--sizes {cfg.sizes} --twice {cfg.twice}: needs a size, and those of --twice "
                    "among --sizes")
    if not {*arms} <= {*ARMS}:
        common.fail(f"--arms {cfg.arms}: allowed are {', '.join(ARMS)}")
    listed = []
    for method in methods_of(cfg):
        for arm in arms:
            listed += [Cell(method, arm, size, 1) for size in grown]
            listed += [Cell(method, arm, size, 2) for size in longer]
    return listed


def contrasts(all_cells):
    """Which cells are held against each other? (small, large) within a method and arm: neighbouring
    sizes, smallest and largest, and once against twice the tokens. Cells that failed are not among
    all_cells, and their neighbours stand next to each other."""
    pairs = []
    for method, arm in dict.fromkeys(cell[:2] for cell in all_cells):
        own = [cell for cell in all_cells if cell[:2] == (method, arm)]
        grown = [cell for cell in own if cell.times == 1]
        pairs += pairwise(grown)
        if len(grown) > 2:
            pairs.append((grown[0], grown[-1]))
        for longer in own:
            once = longer._replace(times=1)
            if longer.times > 1 and once in own:
                pairs.append((once, longer))
    return pairs


def resized(method, size):
    """A row of compare.py at another size. It is the row itself where the size is its own."""
    Flags = method.module.Config
    if hasattr(Flags, "groups"):
        groups = method.change.get("groups", Flags.groups)
        flag = dict(groups=scaled(groups, size / MOLT_SIZE))
    elif hasattr(Flags, "C"):
        flag = dict(C=size)
    else:
        flag = dict(F=size)
    return method._replace(change=method.change | flag, quick={})


def scaled(groups, by):
    """Multiply the number of transforms of each rank: "64@2,4@32" by 2 is "128@2,8@32"."""
    return ",".join(f"{max(1, round(number * by))}@{rank}" for number, rank in molt.parse(groups))


class Models:
    """The models of all settings and seeds, and what is known of those that were asked for last."""

    def __init__(self, base, arena):
        self.base = base
        self.arena = arena
        self.held = {}              # {(setting, seed): Sized}, the last HELD
        self.failed = {}            # {(setting, seed): why its training failed}

    def job(self, setting, seed):
        """The job that compare.py would do, and the configuration of its training."""
        method = resized(compare.METHODS[setting.method], setting.size)
        job = compare.Job(setting.method, method.knob, setting.value, seed, False, method)
        base = dataclasses.replace(self.base, tokens=self.base.tokens * setting.times)
        run = job.config(base, self.arena.gpt, self.arena.layer)
        return job, dataclasses.replace(run, log_every=LOG_EVERY)

    def model(self, setting, seed):
        """A model, trained or loaded, and the folder of its training. A training that failed is not
        begun again: one that diverges would do so again."""
        if (setting, seed) in self.failed:
            raise RuntimeError(f"training {setting} seed {seed}: {self.failed[setting, seed]}")
        job, run = self.job(setting, seed)
        try:
            found = compare.trained(job, run, self.arena.gpt, self.base.retrain, self.base.keep)
        except (Exception, SystemExit) as e:
            self.failed[setting, seed] = compare.error_text(e)
            raise
        return found.model, run.out

    def which(self, setting, seed):
        """What tells a model from others, before it is there. Fails on one of other code unless it
        was said what to do with it."""
        job, run = self.job(setting, seed)
        module = job.method.module
        compare.is_trained(run, module, self.base.retrain, self.base.keep)
        return compare.identity(run, module, self.base.retrain)

    def sized(self, setting, seed):
        """What has to be known of a model to hold it against another size: a Sized."""
        key = setting, seed
        if key not in self.held:
            m, _ = self.model(setting, seed)
            rows_RT = self.arena.test[0]
            self.held[key] = sizes.look_at(m, self.arena.gpt, self.arena.fit[0], rows_RT)
        self.held[key] = self.held.pop(key)         # the newest stands last
        while len(self.held) > HELD:
            del self.held[next(iter(self.held))]
        return self.held[key]


# -------------------------------------------------------------------------------- tuning a sparsity
def reached(m, arena, split):
    """How sparse and how faithful is m on a split, fit or test? {l0, ce}; ce is None where the MLP
    matters too little."""
    rows_RT = getattr(arena, split)[0]
    counted = evals.counts(m, arena.gpt, rows_RT, rows_RT.new_zeros(*rows_RT.shape, 0), (0,))
    table = arena.shared(worth, f"worth in {split}", split=split)
    table = table | evals.scores(arena.gpt, rows_RT, dict(m=evals.splice(m)))
    return dict(l0=counted["on"].sum().item() / counted["n"], ce=evals.recovered(table, "m"))


def worth(gpt, layer, fit, test, gen, split):
    """How well does the model predict a split with the MLP ablated? The mean is that of fit."""
    rows_RT = dict(fit=fit, test=test)[split][0]
    return evals.scores(gpt, rows_RT, evals.ablations(gpt, layer, fit[0]))


def miss(arm, aim, trial):
    """How far is a trial from what its arm holds? 0 = there, above 0 = too dense. ln(L0 / aim), or
    logit(CE recovered) - logit(aim)."""
    if arm == "l0":
        return math.log(max(trial["l0"], 1e-3) / aim)
    return logit(trial["ce"] or 0) - logit(aim)


def logit(share):
    share = min(max(share, 1e-3), 1 - 1e-5)
    return math.log(share / (1 - share))


def is_near(arm, aim, trial):
    """Is a trial near enough to what its arm holds?"""
    if arm == "l0":
        return abs(trial["l0"] / aim - 1) <= NEAR_L0
    return trial["ce"] is not None and abs(trial["ce"] - aim) <= NEAR_CE


def next_value(knob, missed, most):
    """Which value of a knob is to be tried next? missed: {value: how far it missed}, all that were
    tried. None where that was tried already, as of neighbours among whole numbers.

    Between a value that is too sparse and one that is too dense: where the line through them is 0,
    over the log of the knob. Otherwise beyond all values, along the line through the nearest two;
    of one value, along a line of slope 1: L0 follows k, and falls as a penalty grows."""
    slope = 1. if knob == "k" else -1.
    nearest = sorted(missed, key=lambda value: abs(missed[value]))
    first = nearest[0]
    others = [value for value in nearest if missed[value] * missed[first] < 0]
    if others or len(nearest) > 1:
        second = others[0] if others else nearest[1]
        rise = (missed[second] - missed[first]) / math.log(second / first)
        # noise may turn a line over, or lay it flat
        slope = rise if rise * slope > 0.2 else slope
    step = -missed[first] / slope
    if not others:
        step = min(max(step, -math.log(FACTOR)), math.log(FACTOR))
    value = first * math.exp(step)
    if knob == "k":
        # a whole number, next to the first one at least
        value = max(round(value), first + 1) if step > 0 else min(round(value), first - 1)
        value = min(max(value, 1), most)
    else:
        value = float(f"{value:.3g}")
    return None if value in missed else value


def heading(smaller, size):
    """What would a knob be at a size, along the line through the last two smaller ones' values over
    their sizes, both as logs? Settings; of one alone, its value."""
    first = smaller[-2:][0]
    last = smaller[-1]
    if first == last:
        return last.value
    slope = math.log(last.value / first.value) / math.log(last.size / first.size)
    return last.value * (size / last.size) ** slope


class Tuning:
    """The search for a cell's sparsity."""

    def __init__(self, cfg, models, row):
        """row: Study.row, or what does as it does."""
        self.aims = dict(l0=cfg.l0, ce=cfg.ce)
        self.models = models
        self.row = row

    def first_value(self, cell, smaller, trials):
        """Where a search begins: where those of smaller sizes, Settings, were heading; after other
        arms' trials, or in the middle of the table's values. A k is the L0 that it gives."""
        method = compare.METHODS[cell.method]
        is_k = method.knob == "k"
        if is_k and cell.arm == "l0":
            value = max(1, round(self.aims["l0"]))
        elif smaller:
            value = heading(smaller, cell.size)
            value = max(1, round(value)) if is_k else float(f"{value:.3g}")
        elif trials:
            return self.next_value(cell, trials)
        else:
            value = method.values[len(method.values) // 2]
        return min(value, cell.size) if is_k else value

    def next_value(self, cell, trials):
        missed = {value: self.missed(cell, trial) for value, trial in trials.items()}
        return next_value(compare.METHODS[cell.method].knob, missed, cell.size)

    def missed(self, cell, trial):
        return miss(cell.arm, self.aims[cell.arm], trial)

    def trial(self, cell, value):
        """Train the first seed at one value: what it reached on fit, {l0, ce}."""
        setting = Setting(cell.method, cell.size, cell.times, value)

        def find():
            m, _ = self.models.model(setting, 0)
            return reached(m, self.models.arena, "fit")

        trial = self.row("trials", [(setting, 0)], setting._asdict(), find)
        ce = number_text(trial["ce"], 4)
        print(f"    {setting}: L0 {trial['l0']:.2f}, CE recovered {ce}", flush=True)
        return trial

    def search(self, cell, smaller, tried_before):
        """Find the value of the knob that holds what the arm holds: a dict of what is kept of the
        search. tried_before: the values that were tried for this cell's other arms."""
        trials = {value: self.trial(cell, value) for value in tried_before}
        value = self.first_value(cell, smaller, trials)
        tried = []
        while not self.is_found(cell, trials) and len(tried) < TRIALS:
            if value in trials:             # for another arm
                value = self.next_value(cell, trials)
            if value is None:
                break
            trials[value] = self.trial(cell, value)
            tried.append(value)
            value = self.next_value(cell, trials)
        best = self.nearest(cell, trials)
        return cell._asdict() | dict(value=best, tried=tried, is_found=self.is_found(cell, trials))

    def nearest(self, cell, trials):
        return min(trials, key=lambda value: abs(self.missed(cell, trials[value])), default=None)

    def is_found(self, cell, trials):
        """Is one of the trials near enough?"""
        best = self.nearest(cell, trials)
        return best is not None and is_near(cell.arm, self.aims[cell.arm], trials[best])


# ---------------------------------------------------------------------------- what a model is asked
class Fall(NamedTuple):
    """How the loss goes over the last part of a training."""
    share: float | None         # by how much it falls there, over its mean; None: too few losses
    half: float | None          # half of the 95 % interval


def falling(folder, late=LATE):
    """Does a training's loss still fall at its end? A Fall.

    A line through the losses that log.jsonl has of the last fifth of the steps: of dictionaries,
    whose loss also has what revives dead units, of what they are to rebuild ("rec"). The learning
    rate goes down over these steps, which lowers the loss by itself, so that a training with
    nothing left to learn may fall, too; of SPD the width of the penalty falls until 90 % of the
    steps, and of a gated method lambda moves. See what twice the tokens change."""
    path = Path(folder) / "log.jsonl"
    rows = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    rows = [row for row in rows if row["step"] >= (1 - late) * rows[-1]["step"]]
    if len(rows) < 3:
        return Fall(None, None)
    steps = [row["step"] for row in rows]
    losses = [row.get("rec", row["loss"]) for row in rows]
    slope, at_zero = statistics.linear_regression(steps, losses)

    # the standard error of a slope: of the residuals over the spread of the steps
    residuals = [loss - at_zero - slope * step for step, loss in zip(steps, losses)]
    freedom = len(rows) - 2
    error = math.hypot(*residuals) / freedom ** 0.5
    half = noise.T975[min(freedom, 9) - 1] * error / (statistics.pstdev(steps) * len(rows) ** 0.5)
    over = (steps[-1] - steps[0]) / abs(statistics.mean(losses))
    return Fall(-slope * over, half * over)


def has_cliff(counts):
    """Do the mean importances have a cliff, of each matrix where there are two: higher than as many
    means without any order have?"""
    cliffs = [key for key in counts if key.startswith("cliff") and "units" not in key]
    blocks = [key for key in cliffs if key != "cliff"] or cliffs
    return all(counts[key] > counts[f"null_{key}"] for key in blocks)


def asked_alone(m, folder, arena, gen):
    """What is known of one model, as a flat dict."""
    row = reached(m, arena, "test")
    used = evals.usage(m, arena.gpt, arena.layer, arena.test[0])
    row |= dict(fve=used["fve"], active_params=used["active_params"])
    counts = sizes.alive_counts(m, arena.gpt, arena.fit[0])
    row["index_bits"] = evals.index_bits(max(counts["alive"], row["l0"]), row["l0"])
    fall = falling(folder)
    row |= counts | dict(fall=fall.share, fall_half=fall.half,
                         has_cliff=has_cliff(counts) if m.kind == "component" else None)
    is_alive_F = stability.record_units(m, arena.gpt, arena.fit[0], 0.).on() >= evals.ALIVE
    blocks = [block.where(is_alive_F[block.unit_n]) for block in matching.blocks(m)]
    row |= {f"meta_{key}": value for key, value in sizes.meta(blocks, gen).items()}

    # in how many units does a true concept live? Null: units at the wrong text
    recordings = recording.record_by_sign(m, arena.gpt, arena.fit, arena.test)
    row |= split_concepts("concept", recordings)
    R, T = arena.fit[0].shape
    n_rows = int(torch.randint(1, R, (1,), generator=gen))
    shifted = [matching.shifted(one, n_rows * (T - 1)) for one in recordings]
    return row | split_concepts("null_concept", shifted)


def split_concepts(name, recordings):
    """`sizes.true_splits` of recordings of fit and test: its single numbers, each as NAME_KEY."""
    found = sizes.true_splits(*recordings)
    return {f"{name}_{key}": found[key] for key in ("units", "held")}


# --------------------------------------------------------------------- what two sizes are asked
def asked_together(small, large, arena, gen):
    """What happens to units from a small to a large one? Numbers and nulls, as a flat dict."""
    rows_RT = arena.test[0]
    R, T = rows_RT.shape
    effects = effects_of(small, large, arena, gen)
    row = counterparts(small, large, effects)
    few = sizes.explained_by_few(small, large, gen)
    row |= {f"few_{key}": value for key, value in few.items()}
    for key in ("copies", "ve"):
        row[f"null_few_{key}"] = row.pop(f"few_{key}_null")
    row |= nearest(small, large, gen)
    if small.recording.F != large.recording.F:
        row["path"] = path(small, large, effects, arena)
        row |= {f"path_kl_{point}": row["path"][point]["kl"] for point in SPLICED}

    random = sizes.by_chance(large, R, T, gen)
    random_effects = effects_of(small, random, arena, gen)
    null = counterparts(small, random, random_effects)

    # matrix by matrix, where there are two
    names = [block.name for block in small.blocks]
    for name in names if len(names) > 1 else []:
        own = small.within(name)
        for found, other, of in ((row, large, effects), (null, random, random_effects)):
            numbers = counterparts(own, other.within(name), of, (MAIN, "writes", "values"))
            found |= {f"{key}_{name}": value for key, value in numbers.items()}
    return row | {f"null_{key}": value for key, value in null.items()}


def effects_of(small, large, arena, gen):
    """What does adding each unit of the large one to the small one do to its error? Effects."""
    T = arena.test[0].shape[1]
    mlp = arena.gpt.mlp(arena.layer)
    effect_RL = sizes.insertion_effects(small, large, mlp, T)
    return sizes.average_effects(effect_RL, large.recording.on(), T, gen)


def counterparts(small, large, effects, kinds=SIMILARITIES):
    """Which units are novel, split or stay, by each kind of similarity? A flat dict: KIND_KEY, and
    what does not depend on similarity."""
    row = dict(incompleteness=sizes.incompleteness(effects, large.is_alive_F))
    alive = small.is_alive_F, large.is_alive_F
    for by in kinds:
        sim_SL = sizes.similarities(small, large, by)
        found = sizes.novelty(sim_SL, effects, *alive) | sizes.split_fractions(sim_SL, *alive)
        found["canonicity"] = sizes.canonicity(small, large, sim_SL)
        for at in AROUND if by in AROUND_BY else ():
            found[f"canonicity_{at}"] = sizes.canonicity(small, large, sim_SL, at)
        matched = found["matched"]
        found["one_to_one_if_matched"] = found["one_to_one"] / matched if matched else None
        row |= {f"{by}_{key}": value for key, value in found.items()}
    return row


def nearest(small, large, gen):
    """How near is the nearest unit, as papers print it? `sizes.mean_max_cosine` with its null, raw
    and over the inputs: cosine_KEY and cosine_inputs_KEY."""
    found = sizes.mean_max_cosine(small, large)
    null = sizes.null_mean_max_cosine(small, large, gen)
    row = with_null("cosine", found, null)
    found = sizes.mean_max_cosine(small.over_inputs(), large.over_inputs())
    null = sizes.null_mean_max_cosine(small, large, gen, over_inputs=True)
    return row | with_null("cosine_inputs", found, null)


def with_null(name, found, null):
    """Numbers as NAME_KEY, their nulls as null_NAME_KEY."""
    row = {f"{name}_{key}": value for key, value in found.items()}
    return row | {f"null_{name}_{key}": value for key, value in null.items()}


def asked_of_parts(small, large, arena, gen):
    """How many units fall into parts? `parts.parts`, and its null as null_KEY."""
    found = parts.parts(small, large)
    null = parts.parts(small, parts.by_chance(large, arena.test[0].shape[1] - 1, gen))
    return found | {f"null_{key}": value for key, value in null.items()}


def path(small, large, effects, arena):
    """What is written on the way from the small to the large one? {point: {mse, fve, l0}}, and at
    SPLICED the kl of the model with that in the place of its MLP, nats per token."""
    sim_SL = sizes.similarities(small, large, MAIN)
    order = sizes.growth(sim_SL, effects.mean_L, small.is_alive_F, large.is_alive_F)
    points = sizes.curve(small, large, arena.gpt.mlp(arena.layer), *order)
    stitched = {point: numbers.pop("stitched") for point, numbers in points.items()}
    spliced = {point: stitched[point] for point in SPLICED}
    table = evals.scores(arena.gpt, arena.test[0][:SPLICED_ROWS], spliced)
    for point in SPLICED:
        points[point]["kl"] = table[point]["kl"]
    return points


# ------------------------------------------------------------------------------------- the study
class Task(NamedTuple):
    """A piece of the study: tune a cell, ask a model of it, or hold it against another cell's."""
    what: str                       # tune, ask or compare
    cell: Cell
    seed: int = 0
    other: Cell | None = None
    other_seed: int = 0

    @property
    def name(self):
        """Of all tasks that take about as long, for the time left."""
        return f"{self.what} {self.cell.method}"

    def __str__(self):
        if self.what == "tune":
            return f"tune {self.cell}"
        text = f"{self.what} {self.cell} seed {self.seed}"
        if self.other:
            text += f" and {size_text(self.other)} seed {self.other_seed}"
        return text


def questions(all_cells, n_seeds):
    """List what is asked of cells once they are tuned: of each model, then of pairs, one method and
    arm after another."""
    seeds = range(n_seeds)
    todo = []
    for cell in all_cells:
        todo += [Task("ask", cell, seed) for seed in seeds]
    pairs = contrasts(all_cells)
    for method, arm in dict.fromkeys(cell[:2] for cell in all_cells):
        own = [pair for pair in pairs if pair[0][:2] == (method, arm)]
        # floors: two seeds of one cell
        if n_seeds > 1:
            own += [(cell, cell) for cell in all_cells if cell[:2] == (method, arm)]
        for seed in seeds:
            other_seed = (seed + 1) % n_seeds
            todo += [Task("compare", small, seed, large, other_seed) for small, large in own]
    return todo


HERE = {                                # the code that each table depends on alone
    "trials": (reached, worth),
    "models": (reached, worth, asked_alone, falling, has_cliff, split_concepts, LATE, LOG_EVERY),
    "pairs": (asked_together, effects_of, counterparts, nearest, with_null, path, MAIN, AROUND,
              AROUND_BY, [*SIMILARITIES], SPLICED, SPLICED_ROWS),
    "parts": (asked_of_parts, parts.parts, parts.said_where, parts.covered, parts.often,
              parts.matrices, parts.by_chance, parts.SAME, parts.INSIDE),
}


TABLES = [*HERE]


class Failed(Exception):
    """A row that could not be found, and why."""


class Study:
    """The study, which goes from task to task."""

    def __init__(self, cfg, base, arena, known):
        self.arena = arena
        self.models = Models(base, arena)
        self.known = known
        code = [compare.code_of(part) for part in CODE]
        text = data.fingerprint(cfg.data)
        shared = [arena.gpt.hash, arena.layer, text, cfg.eval_tokens, code]
        self.shared = {}                # {table: what its rows depend on beside their models}
        for table, needed in HERE.items():
            own = [compare.code_of(part) if callable(part) else str(part) for part in needed]
            self.shared[table] = shared + own
        self.tuning = Tuning(cfg, self.models, self.row)
        self.tuned = {}                 # {cell: what its search found}
        self.failed = {}                # {task: why}

    def setting(self, cell):
        return Setting(cell.method, cell.size, cell.times, self.tuned[cell]["value"])

    def do(self, task):
        """Do a task. What fails is noted, but for models of other code, which end the run."""
        try:
            if task.what == "tune":
                self.tune(task.cell)
            elif task.what == "ask":
                self.ask(self.setting(task.cell), task.seed)
            else:
                one = self.setting(task.cell), task.seed
                self.compare(one, (self.setting(task.other), task.other_seed))
        except Failed as failed:
            self.failed[str(task)] = str(failed)
            print(f"    FAILED: {failed}", flush=True)

    def row(self, table, models, names, find):
        """`Found.row` of some models, (setting, seed) each. Raises Failed where find() fails."""
        which = [self.models.which(*model) for model in models]
        try:
            return self.known.row(table, [*self.shared[table], *which], names, find)
        except (Exception, SystemExit) as e:
            raise Failed(compare.error_text(e)) from e

    def tune(self, cell):
        """Tune a cell, from where the smaller ones ended."""
        before = [tuned for tuned in self.tuned if tuned[:2] == cell[:2]]
        is_own = [tuned for tuned in before if tuned.size <= cell.size and tuned.times == 1]
        smaller = [self.setting(own) for own in is_own]
        tried = []
        for other, found in self.tuned.items():
            if other._replace(arm=cell.arm) == cell:
                tried += found["tried"]
        self.tuned[cell] = self.tuning.search(cell, smaller, list(dict.fromkeys(tried)))

    def ask(self, setting, seed):
        def find():
            m, folder = self.models.model(setting, seed)
            gen = common.generator(seed, f"ask {setting}")
            return asked_alone(m, folder, self.arena, gen)

        self.row("models", [(setting, seed)], setting._asdict() | dict(seed=seed), find)

    def compare(self, one, other):
        def find(ask):
            gen = common.generator(one[1], f"compare {one[0]} {other[0]}")
            small = self.models.sized(*one)
            large = self.models.sized(*other)
            return ask(small, large, self.arena, gen)

        for table, ask in (("pairs", asked_together), ("parts", asked_of_parts)):
            self.row(table, [one, other], names_of_pair(one, other), partial(find, ask))


def names_of_pair(one, other):
    """What tells a pair of models, (setting, seed) each, from other pairs."""
    return dict(method=one[0].method, small=str(one[0]), large=str(other[0]), seed=one[1],
                other_seed=other[1])


def in_order(row):
    """What rows are sorted by."""
    if "small" in row:
        return row["method"], row["small"], row["large"], row["seed"], row["other_seed"]
    return row["method"], row["size"], row["times"], row["value"], row.get("seed", 0)


# ---------------------------------------------------------------------------------- what it shows
def setting_of(row):
    return Setting(*(row[key] for key in Setting._fields))


class Results:
    """What sizes.json holds, looked up by cell."""

    def __init__(self, found):
        self.n = found["provenance"]["config"]["seeds"]
        self.aims = {arm: found["provenance"]["config"][arm] for arm in ARMS}
        words = found["provenance"]["config"]["sizes"].split(",")
        self.sizes = [int(word) for word in words if word.strip()]
        self.tuned = {}
        for row in found["settings"]:
            self.tuned[Cell(*(row[key] for key in Cell._fields))] = row
        self.models = {}
        for row in found["models"]:
            self.models[setting_of(row), row["seed"]] = row
        self.pairs = {}
        for row in [*found["pairs"], *found.get("parts", [])]:
            key = tuple(row[name] for name in ("method", "small", "large", "seed", "other_seed"))
            self.pairs[key] = self.pairs.get(key, {}) | row

    def groups(self):
        """Cells by method and arm, smallest first: {(method, arm): cells}."""
        grouped = {}
        for cell in self.tuned:
            grouped.setdefault(cell[:2], []).append(cell)
        return grouped

    def setting(self, cell):
        return Setting(cell.method, cell.size, cell.times, self.tuned[cell]["value"])

    def of(self, cell, key):
        """A number of each seed's model; None where there is none."""
        setting = self.setting(cell)
        return [self.models.get((setting, seed), {}).get(key) for seed in range(self.n)]

    def is_settled(self, cell):
        """Has the training of a cell's models come to its end? Over its last part their losses
        fall, in the mean, surely by no more than SETTLED, and all have a cliff if they need one.
        Models of whose losses too little is known have not."""
        falls = self.of(cell, "fall")
        if None in falls or False in self.of(cell, "has_cliff"):
            return False
        # of a mean of independent slopes
        half = math.hypot(*self.of(cell, "fall_half")) / len(falls)
        return statistics.mean(falls) + half <= SETTLED

    def is_held(self, cell):
        """Is a cell's sparsity what its arm holds, where it was tuned, and in the mean over seeds
        on test?"""
        arm = cell.arm
        metric = noise.over_seeds(self.of(cell, arm))
        on_test = metric is None or is_near(arm, self.aims[arm], {arm: metric["mean"]})
        return on_test and self.tuned[cell]["is_found"]

    def known(self, columns):
        """Those of some columns, {key: head}, that pairs have."""
        keys = set().union(*self.pairs.values())
        return {key: head for key, head in columns.items() if key in keys}

    def between(self, small, large, key):
        """A number of each seed, of a small and a large cell."""
        one = self.setting(small)
        other = self.setting(large)
        values = []
        for seed in range(self.n):
            names = names_of_pair((one, seed), (other, (seed + 1) % self.n))
            values.append(self.pairs.get(tuple(names.values()), {}).get(key))
        return values

    def floor(self, small, key):
        """That number of two seeds of the small cell; None for each seed if there is but one."""
        return self.between(small, small, key)


def minus(values, floors):
    """Subtract, seed by seed; None where either is None."""
    return [None if a is None or b is None else a - b for a, b in zip(values, floors)]


def number_text(value, digits):
    """Write a number; a share without the 0 before its point."""
    if value is None:
        return "n/a"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def mean_text(values, digits=2):
    """Write the mean over seeds, and half of its interval if there are several."""
    metric = noise.over_seeds(values)
    if metric is None:
        return "n/a"
    text = number_text(metric["mean"], digits)
    if metric["half"] is not None:
        text += f"±{number_text(metric['half'], digits)}"
    n = len(metric["values"])
    return text if n == len(values) else f"{text}, n {n}"


def plain_mean(values, digits=2):
    """Write the mean over seeds alone."""
    metric = noise.over_seeds(values)
    return number_text(metric and metric["mean"], digits)


def canonicity_key(by, at):
    """The number that canonicity is kept as, by one kind of similarity at a threshold."""
    return f"{by}_canonicity" if at == SHARED else f"{by}_canonicity_{at}"


def pair_text(results, small, large, key, digits=2):
    """number±half [floor] (null)"""
    text = mean_text(results.between(small, large, key), digits)
    floor = plain_mean(results.floor(small, key), digits)
    null = plain_mean(results.between(small, large, f"null_{key}"), digits)
    return f"{text} [{floor}] ({null})"


def mark(results, *some):
    """! before what is said of models of another sparsity than they should have, ~ of models that
    are not settled."""
    is_held = all(results.is_held(cell) for cell in some)
    is_settled = all(results.is_settled(cell) for cell in some)
    return ("" if is_held else "!") + ("" if is_settled else "~")


PREFACE = """
# What happens to units when the dictionary grows
`{command}` wrote this.

{arms}. That is on fit and of the first seed: the second table has what all reach.
{sizes}

number±half [floor] (null): mean over {seeds} seed(s), half of the 95 % interval over them; n: how
many seeds have a number, if not all; floor: that number for two seeds of the smaller size. A size
and itself: two seeds of it. Pairs share seeds, so that intervals of number - floor are somewhat too
narrow; no interval is corrected for how many there are. Null: random units in the place of the
larger one's; of values, and of maps that are added, its own units at the wrong text. !: what an arm
holds is missed, where it was tuned (last table) or by the mean over seeds (second table). ~: a
model is not known to be settled, so that more training may change what is said of it: over the last
fifth of training its loss may fall by more than 5 %, in the mean over seeds, or its components have
no cliff.

First, from the smallest to the largest size, and from once to twice the tokens: number - floor (of
the number; that of two seeds of the larger one, which differ by seed as well). Units are alike
where the lower of the cosines of what they write and of what they read, over the inputs, is 0.7 or
more (maps: the cosine of their matrices). Canonicity: share of the small one's units that are in
the large one as they are: one to one, and the correlation of what they say is 0.7 or more; in
values: by that correlation alone. Split: share of the small one's units with several counterparts;
none can have them where hardly any has one. In parts, stays: by where units are on, lacked: share
of the large one's units that the small one lacked, all three see below.
"""
COUNTS = """
Each size by itself. Params: of the units that are on, per token; bits: to name these among the
alive ones. Alive on {tokens:,} tokens of fit: on at 10 tokens or more; mean of f above 1e-6; f > 0
at a share of the tokens above 1e-6 (of fewer than a million: once); f > 0.1 once. Cliff: largest
gap in the sorted log10 of mean f (null: 95 % of as many means without any order have a lower one);
here of all units, while components need one in each matrix. Fall: of the loss (dictionaries: of
what is to be rebuilt) over the last fifth of training, over its mean. Meta: n / 16 atoms, 4 a unit,
rebuild the writes (components and maps: the matrices) of n alive units, 80 or more; 0 = no better
than random ones, 1 = exactly. Concepts held: share of the true concepts that have a unit, of
components by the sign of what it says; units a concept: their mean number, of those that have any,
other ones at each size (nulls: units at the wrong text).
"""
COUNTERPARTS = """
Counterparts, by four kinds of similarity, 0.7 or more. Shares of the small one's alive units: in
the large one as they are; with a counterpart; with two or more, of all and of those with one; and
in groups that similarity connects of one to one (of all and of those with a counterpart), one to
many, many to one and many to many. Of maps all but values are the cosine of their matrices, raw or
over the inputs. What the gates of transcoder-stochastic read is in none of the first three. Raw
reads of units with biases may differ in what a bias undoes, as those of saes do by seed.
"""
THRESHOLDS = """
Canonicity at thresholds of similarity and of correlation. A lower one is not easier: units that get
a second counterpart are not one to one any more.
"""
PARTS = """
Parts, by where units are on; a token counts by the square of what the unit says there. Stays: share
of the small one's units of whose sayings 80 % are where a unit of the large one is on, and 80 % of
that one's where it is on. A unit of the large one is a part of one of the small one if 90 % of what
it says is where that is on, and less than 80 % the other way round, and both are on together three
times as often as by chance. In parts: share of the small one's units with two parts or more, which
may stay as well; covered: the share of what they say where one of these is on. Inside: share of the
large one's units that are a part. A large one's units are rarer, so that they lie inside others
more easily than those of another seed do. Units on at {often} tokens or more; of components, within
a matrix.
"""
ADDED = """
Units of the large one, added to the small one. Error: squared, of the MLP's output, which
components and transcoder-kl are not trained on. Shares of the large one's alive units: that the
small one lacked (its error falls, with all of the 95 % interval); that help (it falls); that are
novel (similar below 0.7 as in the first table, or by what they write). What leaves little of the
output out is helped by little: hold lacked against its floor, never against another method's. Where
each of S small units has one counterpart, 1 - S / L of the L large ones are novel. AUROC: how well
similarity tells which help, 0.5 = not at all; n/a where fewer than 10 do, or do not. Cut: Youden's,
up to which most of those that help are; it says nothing where AUROC is not above its null. Of
components, read both by matrix: in one table similarity also tells the units of two matrices apart.
"""
PATHS = """
KL to the model's own predictions, nats per token of 100 rows of test, with the small one in the
place of the MLP, with the large one's novel units added to it, and with the large one; to each its
mean error is added. Where nearly all are novel, the second writes most things twice.
"""
COSINES = """
Copies: share of the large one's units whose writes are one of the small one's, at a |cosine| of 0.9
or more: S / L where each of S has one copy. By 4 writes: of the variance of the other units'
writes, the share that 4 of the small one's explain (null: of random writes). What components and
maps write depends on what they read: their matrices are asked, which are nearly orthogonal by
chance, so hold these two columns against their own floors and nulls, not against dictionaries'. As
papers print them: E, D: mean over the small one's alive units of the largest cosine of what they
read, write, with any unit of the large one; rank one: of their products (maps: of the matrices,
which have no E and D); over inputs: reads count as the inputs see them. The null of cosines is
independent random directions.
"""
TUNED = """
How sparsity was tuned, on fit and the first seed. A ! stands where no trial came near enough; what
was tried for one arm counts for the other one too.
"""


HEADLINE = {f"{MAIN}_canonicity": "canonicity", f"{MAIN}_split": "split",
            "values_canonicity": "canonicity in values", "parts": "in parts",
            "stays": "stays, where on", "incompleteness": "lacked"}


def headline(results):
    """From the smallest to the largest size, then to twice the tokens, a line for each method and
    arm."""
    heads = results.known(HEADLINE)
    longer = [pair for pair in contrasts(list(results.tuned)) if pair[1].times > 1]
    lines = []
    for ends in [*ends_of(results), *longer]:
        small, large = ends
        line = [small.method, small.arm, f"{size_text(small)} → {size_text(large)}"]
        for key in heads:
            over_floor = minus(results.between(*ends, key), results.floor(ends[0], key))
            number = plain_mean(results.between(*ends, key))
            of_large = plain_mean(results.floor(ends[1], key))
            text = f"{mark(results, *ends)}{mean_text(over_floor)}"
            line.append(f"{text} (of {number}; {of_large})")
        lines.append(line)
    return markdown_table(["method", "arm", "sizes", *heads.values()], lines)


def counts_table(results):
    """Each cell by itself: how sparse and faithful, alive by each rule, cliff, true concepts."""
    lines = []
    for cell in results.tuned:
        texts = {key: mean_text(results.of(cell, key), digits) for key, digits in COUNTED.items()}
        for key in ("cliff", "concept_units", "concept_held"):
            null = plain_mean(results.of(cell, f"null_{key}"), COUNTED[key])
            texts[key] = f"{texts[key]} ({null})"
        for key in RULES:
            texts[key] = mark(results, cell) + texts[key]
        lines.append([cell.method, cell.arm, size_text(cell), *texts.values()])
    heads = ["method", "arm", "size", "L0", "CE rec", "FVE", "params", "bits", "units",
             *RULES.values(), "cliff", "fall", "meta", "units a concept", "concepts held"]
    return markdown_table(heads, lines)


COUNTED = {"l0": 1, "ce": 4, "fve": 3, "active_params": 0, "index_bits": 0, "units": 0,
           **dict.fromkeys(RULES, 0), "cliff": 2, "fall": 3, "meta_excess": 3, "concept_units": 2,
           "concept_held": 3}


def tuning_table(found, results):
    """What the searches ended with, on fit and the first seed."""
    trials = {setting_of(row): row for row in found["trials"]}
    lines = []
    for cell, tuned in results.tuned.items():
        trial = trials[results.setting(cell)]
        knob = compare.METHODS[cell.method].knob
        tried = ", ".join(f"{value:g}" for value in tuned["tried"])
        ends = f"{tuned['value']:g}" if tuned["is_found"] else f"{tuned['value']:g}!"
        lines.append([cell.method, cell.arm, size_text(cell), f"{knob} {ends}",
                      f"{trial['l0']:.2f}", number_text(trial["ce"], 4), tried])
    heads = ["method", "arm", "size", "knob", "L0", "CE rec", "tried for it, in order"]
    return markdown_table(heads, lines)


def pairs_shown(results):
    """Which pairs have a line? The `contrasts`, and two seeds of the largest and of what is trained
    longer."""
    pairs = []
    for group in results.groups().values():
        pairs += contrasts(group)
        grown = [cell for cell in group if cell.times == 1]
        if results.n > 1:
            pairs += [(cell, cell) for cell in group if cell.times > 1 or cell in grown[-1:]]
    return pairs


def pair_names(results, small, large):
    """Write what the line of a pair begins with: method, arm and sizes."""
    sizes_of_pair = f"{mark(results, small, large)}{size_text(small)} → {size_text(large)}"
    return [small.method, small.arm, sizes_of_pair]


def pair_table(results, columns, own=None):
    """Each pair of cells, a line each. columns: {key: head}; own: the pairs, if not all."""
    lines = []
    for small, large in pairs_shown(results):
        if own is not None and (small, large) not in own:
            continue
        texts = [pair_text(results, small, large, key) for key in columns]
        lines.append([*pair_names(results, small, large), *texts])
    return markdown_table(["method", "arm", "sizes", *columns.values()], lines)


NOVEL = {"incompleteness": "lacked", f"{MAIN}_helps": "helps", f"{MAIN}_novel": "novel",
         f"{MAIN}_helps_novel": "helps, of the novel", f"{MAIN}_auroc": "AUROC",
         f"{MAIN}_cut": "cut", "writes_novel": "novel by writes", "writes_auroc": "AUROC by writes",
         "values_auroc": "AUROC by values"}
MATRICES = {"incompleteness": "lacked", f"{MAIN}_canonicity": "canonicity",
            "values_canonicity": "canonicity in values", "values_split": "split in values",
            "values_split_if_matched": "of the matched", "writes_novel": "novel by writes",
            "writes_auroc": "AUROC by writes"}
SPLITS = {"canonicity": "canonicity", "matched": "matched", "split": "split",
          "split_if_matched": "of the matched", "one_to_one": "1:1",
          "one_to_one_if_matched": "of the matched", "one_to_many": "1:n", "many_to_one": "n:1",
          "many_to_many": "n:m"}
IN_PARTS = {"parts": "in parts", "covered": "covered", "stays": "stays", "inside": "inside"}
NEAREST = {"few_copies": "copies", "few_ve": "by 4 writes", "cosine_read": "E", "cosine_write": "D",
           "cosine_rank_one": "rank one", "cosine_inputs_read": "E, inputs",
           "cosine_inputs_rank_one": "rank one, inputs"}


def path_table(results):
    """What the model loses on the way from a small to a large one, a line for each pair."""
    lines = []
    for small, large in contrasts(list(results.tuned)):
        if small.size == large.size:        # there is nothing to add
            continue
        kls = [mean_text(results.between(small, large, f"path_kl_{p}"), 4) for p in SPLICED]
        lines.append([*pair_names(results, small, large), *kls])
    return markdown_table(["method", "arm", "sizes", "small", "novel added", "large"], lines)


def about_sizes(results):
    """Say what a size is, of the methods that there are, where it is not the number of units."""
    methods = {cell.method for cell in results.tuned}
    texts = []
    of_components = [name for name in SPD_ROWS if name in methods]
    if of_components:
        texts.append(f"A size of {', '.join(of_components)} is that of each matrix: it has twice "
                     "as many components, and its L0 is of both matrices together.")
    if "molt" in methods:
        groups = compare.METHODS["molt"].change.get("groups", molt.Config.groups)
        n = sum(number for number, _ in molt.parse(groups))
        texts.append(f"Size {MOLT_SIZE} of molt is {n} transforms, of ranks {groups}, twice the "
                     "size twice as many of each rank.")
    return "\n".join(texts)


def about_arms(results):
    """Say what is held, in the arms that there are."""
    held = dict(l0=f"Arm l0: L0 is held, within {100 * NEAR_L0:g} % of {results.aims['l0']:g}",
                ce=f"Arm ce: CE recovered is held, within {NEAR_CE:g} of {results.aims['ce']:g}")
    arms = dict.fromkeys(arm for _, arm in results.groups())
    texts = [held[arm] for arm in arms]
    longer = next((cell for cell in results.tuned if cell.times > 1), None)
    if longer:
        texts.append(f"{size_text(longer)}: size {longer.size} on twice the tokens")
    return ". ".join(texts)


def render(found):
    """All that was found, as Markdown."""
    results = Results(found)
    n_tokens = next(iter(results.models.values()))["tokens"]
    preface = PREFACE.format(command=found["provenance"]["command"], seeds=results.n,
                             arms=about_arms(results), sizes=about_sizes(results))
    lines = [preface.strip(), "", *headline(results)]
    for task, why in found["failed"].items():
        lines += ["", f"FAILED: {task}: {why}"]
    lines += ["", COUNTS.format(tokens=n_tokens).strip(), "", *counts_table(results)]
    lines += ["", COUNTERPARTS.strip()]
    for by, name in SIMILARITIES.items():
        columns = {f"{by}_{key}": head for key, head in SPLITS.items()}
        lines += ["", f"By {name}:", "", *pair_table(results, columns)]
    columns = {}
    for by in AROUND_BY:
        columns |= {canonicity_key(by, at): f"{by}, {at}" for at in sorted((*AROUND, SHARED))}
    lines += ["", THRESHOLDS.strip(), "", *pair_table(results, columns)]
    if found.get("parts"):
        lines += ["", PARTS.format(often=mapping.OFTEN).strip()]
        lines += ["", *pair_table(results, IN_PARTS)]
    lines += ["", ADDED.strip(), "", *pair_table(results, NOVEL), *by_matrix(results)]
    lines += ["", PATHS.strip(), "", *path_table(results)]
    lines += ["", COSINES.strip(), "", *pair_table(results, NEAREST)]
    lines += ["", TUNED.strip(), "", *tuning_table(found, results)]
    return "\n".join([*lines, ""])


def by_matrix(results):
    """Some numbers of each matrix of components by itself, a table for each."""
    lines = []
    for name in ("in", "out"):
        columns_of = {f"{key}_{name}": head for key, head in MATRICES.items()}
        own = []
        for pair in contrasts(list(results.tuned)):
            if results.between(*pair, f"incompleteness_{name}")[0] is not None:
                own.append(pair)
        if own:
            lines += ["", f"By matrix, W_{name}:", "", *pair_table(results, columns_of, own)]
    return lines


def columns(found):
    """What compare.py's table takes from here: {row: {key: metric}}. In the place of a null: two
    seeds of the smallest size."""
    results = Results(found)
    rows = {}
    whole = min(results.sizes), max(results.sizes)
    for small, large in ends_of(results):
        if small.arm == "l0" and (small.size, large.size) == whole:
            key = f"{MAIN}_canonicity"
            values = results.between(small, large, key)
            rows[small.method] = column("canonicity", values, results.floor(small, key))
    return rows


# ----------------------------------------------------------------------------------------- pictures
STYLES = dict(l0="-", ce="--")
BARS = {f"{MAIN}_canonicity": "share of the small one's that stay",
        f"{MAIN}_split": "share of the small one's that split",
        "parts": "share of the small one's in parts",
        f"{MAIN}_novel": "share of the large one's that are novel"}


def picture(found):
    """Draw alive counts over size, a panel for each method; below, units that stay, split and are
    novel from the smallest to the largest size, and the error on the way."""
    from matplotlib.figure import Figure
    results = Results(found)
    methods = list(dict.fromkeys(cell.method for cell in results.tuned))
    figure = Figure((max(16, 2.7 * len(methods)), 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    panels = above.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for ax, method in zip(panels, methods):
        draw_alive(ax, results, method)
    panels[0].set_ylabel("alive units")
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside right center", fontsize=8)

    bars = results.known(BARS) or BARS
    *axes, last = below.subplots(1, len(bars) + 1, width_ratios=[*[1] * len(bars), 1.5])
    for ax, (key, label) in zip(axes, bars.items()):
        draw_bars(ax, results, key)
        ax.set_xlabel(label)
    for ax in axes[1:]:
        ax.set_yticklabels([])
    draw_paths(last, results)
    handles, labels = axes[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower left", ncols=len(handles), fontsize=8)
    return figure


def draw_alive(ax, results, method):
    """Alive units over size, by each rule and in each arm: means over seeds."""
    for (name, arm), group in results.groups().items():
        grown = [cell for cell in group if cell.times == 1]
        if name != method:
            continue
        x = [cell.size for cell in grown]
        for i, (rule, label) in enumerate(RULES.items()):
            y = [mean_or_nan(results.of(cell, rule)) for cell in grown]
            # larger ones below, since they often coincide
            ax.plot(x, y, STYLES[arm], color=f"C{i}", marker=pictures.MARKERS[i], mfc="none",
                    ms=12 - 3 * i, label=label + shown_arm(results, arm))
        units = [mean_or_nan(results.of(cell, "units")) for cell in grown]
    ax.plot(x, units, ":", color="0.6", label="all units")
    ax.set(title=method, xlabel="size")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)


def shown_arm(results, arm):
    """What is said of an arm beside a method: nothing where it is the only one."""
    arms = {arm for _, arm in results.groups()}
    return f" {arm}" if len(arms) > 1 else ""


def ends_of(results):
    """The smallest and the largest cell of each method and arm that has several sizes."""
    ends = []
    for group in results.groups().values():
        grown = [cell for cell in group if cell.times == 1]
        if len(grown) > 1:
            ends.append((grown[0], grown[-1]))
    return ends


def draw_bars(ax, results, key):
    """One number from the smallest to the largest size, with its null and its floor."""
    pairs = ends_of(results)
    names = [small.method + shown_arm(results, small.arm) for small, _ in pairs]
    values = [results.between(*pair, key) for pair in pairs]
    metrics = [noise.over_seeds(some) for some in values]
    means = [mean_or_nan(some) for some in values]
    halves = [metric["half"] or 0 if metric else 0 for metric in metrics]
    ax.barh(names, means, xerr=halves, color="0.8", edgecolor="k", capsize=3)
    nulls = [results.between(*pair, f"null_{key}") for pair in pairs]
    floors = [results.floor(small, key) for small, _ in pairs]
    of_large = [results.floor(large, key) for _, large in pairs]
    draw_marks(ax, nulls, names, marker="|", color="k", ms=22, label="null: random units")
    draw_marks(ax, floors, names, marker="D", color="C3", ms=5,
               label="floor: two seeds of the smallest size")
    draw_marks(ax, of_large, names, marker="s", color="C0", ms=4,
               label="two seeds of the largest size")
    ax.set(xlim=(-0.02, 1.02))
    ax.invert_yaxis()


def mean_or_nan(values):
    """The mean over seeds; NaN, which is not drawn, where no seed has a number."""
    metric = noise.over_seeds(values)
    return metric["mean"] if metric else math.nan


def draw_marks(ax, values_of_bars, names, **look):
    """A mark on each bar at a mean over seeds."""
    means = [mean_or_nan(values) for values in values_of_bars]
    ax.plot(means, names, ls="", mfc="w", mew=1.6, **look)


def draw_paths(ax, results):
    """The error on the way from the smallest to the largest size, over that of the smallest."""
    methods = dict.fromkeys(cell.method for cell in results.tuned)
    colors = dict(zip(methods, pictures.COLORS))
    for small, large in ends_of(results):
        paths = [path for path in results.between(small, large, "path") if path]
        if not paths:
            continue
        means = {point: mean_on_path(paths, point) for point in paths[0]}
        ax.plot([float(point) for point in means], means.values(), STYLES[small.arm],
                color=colors[small.method], label=small.method + shown_arm(results, small.arm))
    ax.set(xlabel="0: small, 1: novel units added, 2: large",
           ylabel="squared error / that of the small one")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize=7)


def mean_on_path(paths, point):
    """The squared error at a point, over that of the small one: mean over seeds."""
    return statistics.mean(path[point]["mse"] / path["0"]["mse"] for path in paths)


# ------------------------------------------------------------------------------------------- main
def check_models(models, all_cells, tuning):
    """Fail on what can't be trained, and on models that other code has trained, before anything
    else: of each cell, the first seed where its search begins."""
    for cell in all_cells:
        value = tuning.first_value(cell, [], {})
        job, run = models.job(Setting(cell.method, cell.size, cell.times, value), 0)
        job.method.module.check_memory(run, models.arena.gpt)
        job.method.module.build(run, models.arena.gpt)
        if not (models.base.retrain or models.base.keep):
            compare.is_trained(run, job.method.module, False, False)


def main(cfg):
    cfg = apart(cfg)
    # what is asked, of what
    common.check(cfg)
    all_cells = cells(cfg)
    base = compare.Config(
        cfg.model, cfg.data, cfg.layer, ",".join(methods_of(cfg)), seeds=cfg.seeds,
        tokens=cfg.tokens, eval_tokens=cfg.eval_tokens, retrain=cfg.retrain, keep=cfg.keep,
        runs=cfg.runs, device=cfg.device)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    layer, _ = compare.check(base, gpt)
    arena = compare.prepared(base, gpt, layer, dev)
    # "parts" came later: a file without it is not damaged
    known = Found(Path(cfg.out) / "sizes.json", ("trials", "models", "pairs"), in_order)
    study = Study(cfg, base, arena, known)
    check_models(study.models, all_cells, study.tuning)
    common.must_be_writable(cfg.out, cfg.runs)
    common.hold(cfg.out)

    # do it
    for task in compare.in_turn([Task("tune", cell) for cell in all_cells]):
        study.do(task)
    for task in compare.in_turn(questions(list(study.tuned), cfg.seeds)):
        study.do(task)
    known.keep_asked(*TABLES)
    if not known.found["models"]:
        common.fail(f"nothing to tell: {'; '.join(study.failed.values())}", 1)

    # tell
    known.write(settings=list(study.tuned.values()), failed=study.failed,
                provenance=common.provenance(cfg, gpt))
    found = json.loads(known.path.read_text(encoding="utf-8"))
    known.write(columns=columns(found))
    common.write(Path(cfg.out) / "sizes.md", render(found).encode())
    curve.save_picture(picture(found), Path(cfg.out) / "sizes.png")
    print("", render(found), f"-> {cfg.out}/sizes.json, .md, .png", sep="\n")
    if study.failed:
        common.fail(f"{len(study.failed)} tasks failed; {cfg.out}/sizes.md names them", 1)


if __name__ == "__main__":
    main(common.cli(Config))
