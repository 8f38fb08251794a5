"""Are features of a later SAE explained by what SPD's components make of earlier SAE features?

An MLP's part of a later feature's pre-activation, q, is a sum over the components of either matrix,
and so it is over the pieces of any other complete decomposition (metrics/attribution.py). A sum of
all pieces says nothing. This asks how few of them do, over which earlier features they run, and
whether the later feature moves as its shares say when a piece is removed:

    R^2 of n pieces     for SPD, and at as many pieces for transcoder features, MOLT's transforms,
                        neurons, singular vectors, random pieces of the weights, and earlier
                        features themselves, without anything between; chosen by four rules, and
                        for random directions in the place of the later features too
    as they are         the same of the sum of these shares, to which no weights are fitted
    under three masks   none; the causal importances; these rounded. SPD is trained on predictions,
                        not to keep hidden activations: what masks cost here is a finding

Earlier SAE: of the MLP's input. Later SAE: of the stream right after the MLP. Both are sae.py's, as
in the table, trained here, one pair for each seed; the decompositions are compare.py's own models,
at the middle of their sparsities. All of a seed goes together, and seeds are the unit of
replication. A later feature counts where it is on often enough, more than half of it comes from the
MLP, and no earlier feature is its copy. Features and pieces are chosen on fit, every number is from
test.

    python -m studies.across    # half an hour on one core, and compare.py's models if they are not
                                # there; goes on after a kill
    python -m studies.across --methods spd,transcoder --tokens 200000 --seeds 1 --out results-quick
"""
import dataclasses
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

import baselines
import common
import compare
import data
import evals
import sae
import spd
from metrics import attribution, masks, matching, recording, stability
from model import GPT
from report import curve, noise, pictures
from report.table import markdown_table
from studies.kept import SPD_ROWS, Found, apart, column

METHODS = "spd-former,spd-long,transcoder,molt"


@dataclass
class Config:
    # what is asked, on what
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    methods: str = METHODS          # rows of compare.py; the first: of components
    # how much of it
    seeds: int = 3                  # [1, 10] pairs of SAEs, and models of each method
    tokens: int = compare.Config.tokens     # [1, 1e11] that each model is trained on
    eval_tokens: int = 50_000       # [1, 1e9] of fit (choices) and of test (scores)
    each: int = 200                 # [10, 1e6] tokens of a later feature that are looked at
    # models that were trained by other code than their files now hold stop the run; instead:
    retrain: bool = False           # train those models anew
    keep: bool = False              # use those models as they are
    # where it is kept
    out: str = "results"            # folder for across.json, .md and .png; a part: results-part
    runs: str = "runs/across"       # folder for the SAEs
    table: str = "runs/compare"     # folder for the models of the methods
    device: str = "auto"            # auto, cpu, cuda


SAES = {
    "earlier": compare.Method(
        sae, "k", (sae.Config.k,), dict(compare.MUON, site="mlp_in"), {},
        "an SAE of the MLP's input"),
    "later": compare.Method(
        sae, "k", (sae.Config.k,), dict(compare.MUON, site="resid"), {},
        "an SAE of the stream after the MLP"),
}
MASKS = {
    "off": attribution.nothing_masked,
    "importances": masks.without_rest,
    "rounded": partial(masks.rounded, threshold=spd.ON_ABOVE),
}
COUNTS = (1, 2, 3, 5, 10, 20, 40)   # numbers of pieces that q is rebuilt from
BY = attribution.BY
CHAINS = 10                         # later features whose strongest paths are written out
PATHS = 2                           # paths of each
CLIFF = 0.1                         # of R^2: masks that surely cost more are a cliff
TABLES = ("features", "rows", "chains")         # of across.json
# what answers depend on beside the models
CODE = (attribution, masks, recording, matching, stability, evals, baselines, spd)


# ------------------------------------------------------------------------------------- the models
def table_of(cfg):
    """The configuration of compare.py whose models are asked."""
    return compare.Config(
        cfg.model, cfg.data, cfg.layer, cfg.methods, seeds=cfg.seeds, tokens=cfg.tokens,
        eval_tokens=cfg.eval_tokens, retrain=cfg.retrain, keep=cfg.keep, runs=cfg.table,
        device=cfg.device)


def check(cfg, gpt):
    """Fail on what can't be asked; otherwise the layer."""
    # of all rows: those that are trained, on this target, and read this layer alone
    allowed = [name for name, method in compare.METHODS.items()
               if ":" not in name and method.module is not compare.clt]
    names = cfg.methods.split(",")
    for name in names:
        if name not in allowed:
            common.fail(f"--methods {name}: allowed are {', '.join(allowed)}")
    if len({*names}) < len(names):
        common.fail(f"--methods {cfg.methods}: names a row twice")
    if first_of(cfg) not in SPD_ROWS:
        common.fail(f"--methods {cfg.methods}: the first has to be of components, as spd is")
    if cfg.each > cfg.eval_tokens:
        common.fail(f"--each {cfg.each}: of --eval_tokens {cfg.eval_tokens}, that many at most")
    layer, _ = compare.check(table_of(cfg), gpt)
    return layer


def jobs(cfg):
    """List what has to be trained: [(compare.py's configuration, a job)]."""
    table = table_of(cfg)
    of_saes = dataclasses.replace(table, runs=cfg.runs)
    todo = []
    for seed in range(cfg.seeds):
        for name, method in SAES.items():
            job = compare.Job(name, method.knob, method.values[0], seed, True, method)
            todo.append((of_saes, job))
    for job in compare.jobs(table):
        if job.middle and job.seed is not None:
            todo.append((table, job))
    return todo


def seeds_of(cfg, arena):
    """Have the models of all seeds, trained or loaded: [Seed]."""
    todo = jobs(cfg)
    for base, job in todo:
        compare.check_models(base, arena, [job])
    seeds = [Seed(number, {}, {}, arena, cfg.each) for number in range(cfg.seeds)]
    bases, all_jobs = zip(*todo)
    for base, job in zip(bases, compare.in_turn(all_jobs, "model: ")):
        run = job.config(base, arena.gpt, arena.layer)
        m = compare.trained(job, run, arena.gpt, cfg.retrain, cfg.keep).model
        seeds[job.seed].models[job.name] = m
        seeds[job.seed].which[job.name] = compare.identity(run, job.method.module)
    return seeds


def first_of(cfg):
    """The name of the method that is asked about."""
    return cfg.methods.split(",")[0]


# ------------------------------------------------------------------------- what is asked of them
@dataclass
class Seed:
    """All that belongs to one seed: its models, which later features count, and its decompositions.

    Whatever takes time is made when it is first asked for."""
    number: int
    models: dict                    # {name: those that are trained}
    which: dict                     # {name: what tells its model from others}
    arena: compare.Arena
    each: int

    @property
    def earlier(self):
        return self.models["earlier"]

    @cached_property
    def readings(self):
        """What the later features read, on fit and on test."""
        later = self.models["later"]
        found = []
        for rows_RT, _ in (self.arena.fit, self.arena.test):
            found.append(attribution.read_later(later, self.arena.gpt, self.arena.layer, rows_RT))
        return found

    @cached_property
    def write_FD(self):
        """Which way the later features point in the stream."""
        return attribution.stream_directions(self.models["later"], self.arena.gpt)

    def fve(self, name):
        """How well does one of the two SAEs rebuild what it reads, on test?"""
        m = self.models[name]
        _, test = self.readings
        a_ND = test.x_ND if name == "earlier" else test.other_ND + test.y_ND
        wrong_ND = a_ND - m.rebuild(m.codes(a_ND))
        return 1 - (wrong_ND.square().sum() / (a_ND - a_ND.mean(0)).square().sum()).item()

    @cached_property
    def drawn(self):
        """The readings of random directions, of equal mean and covariance, in the place of the
        later features, at the tokens of these."""
        gen = common.generator(self.number, "directions in the place of features")
        w_FD = matching.redraw(self.readings[0].w_FD, gen)
        return [dataclasses.replace(reading, w_FD=w_FD) for reading in self.readings]

    @cached_property
    def frequent(self):
        """The later features that are on often enough."""
        return attribution.frequent(*self.readings, self.each)

    def labels(self, reading, write_FD):
        """How much of each frequent later feature comes from the MLP, and how alike is the earlier
        feature that is most alike? (U) each."""
        share_U = attribution.computed_share(reading, self.frequent, self.each)
        cosine_F = attribution.largest_cosine(write_FD, self.earlier, self.arena.gpt)
        return share_U, cosine_F[self.frequent]

    @cached_property
    def computed(self):
        """The later features that count: those that the MLP computes, by the labels of fit."""
        is_computed_U = attribution.is_computed(*self.labels(self.readings[0], self.write_FD))
        if not is_computed_U.any():
            common.fail(f"seed {self.number}: of {len(self.frequent)} later features that are on "
                        f"at --each {self.each} tokens or more the MLP computes none: give more "
                        "--eval_tokens, or --tokens to train on")
        return self.frequent[is_computed_U]

    @cached_property
    def drawn_units(self):
        """Of which of these is the random direction, too, more than half the MLP's?"""
        share_U = attribution.computed_share(self.drawn[0], self.computed, self.each)
        return self.computed[share_U > 0.5]

    @cached_property
    def decompositions(self):
        """{name: decomposition}: those that were trained, earlier features, floors, and of all that
        are components random pieces of the same sums."""
        layer = self.arena.layer
        mlp = self.arena.gpt.mlp(layer)
        found = {}
        for name, m in self.models.items():
            if name not in SAES:
                # importances as they are where a model rounds them: MASKS has its own rounding
                found[name] = getattr(m, "raw", m)
        found["earlier"] = self.earlier
        values = compare.FLOORS["svd"].values
        found["svd"] = baselines.SVD(layer, mlp, values[len(values) // 2])
        found["neurons"] = baselines.Neurons(layer, mlp, len(mlp.c_proj.weight))
        for name, m in [*found.items()]:
            if m.kind == "component":
                gen = common.generator(self.number, f"rotated {name}")
                found[f"{name}:rotated"] = attribution.rotated(m, gen)
        return found

    def masks_of(self, name):
        """Under which masks is a decomposition asked? All, if its importances were trained."""
        is_trained = name.split(":")[0] in self.models
        is_masked = is_trained and self.decompositions[name].kind == "component"
        return [*MASKS] if is_masked else ["off"]


def label_features(seed):
    """How many later features are copies of earlier ones, and how many does the MLP compute? Beside
    what random directions are called at the tokens of these features."""
    _, test = seed.readings
    gen = common.generator(seed.number, "directions that nothing reads")
    nothing = dataclasses.replace(test, w_FD=matching.redraw(test.w_FD, gen))
    null_write_FD = matching.redraw(seed.write_FD, gen)
    counted = dict(layer=seed.arena.layer, frequent=len(seed.frequent), computed=len(seed.computed))
    for null, reading, write_FD in (("", test, seed.write_FD), ("null_", nothing, null_write_FD)):
        share_U, cosine_U = seed.labels(reading, write_FD)
        is_computed_U = attribution.is_computed(share_U, cosine_U)
        counted[f"{null}share"] = average(share_U)
        counted[f"{null}share_passthrough"] = average(cosine_U >= attribution.EQUAL)
        counted[f"{null}share_computed"] = average(is_computed_U)
    for name in SAES:
        counted[f"fve_{name}"] = seed.fve(name)
    return counted


def average(value_U):
    return value_U.float().mean().item()


def listed(value_U):
    return [round(value, 4) for value in value_U.tolist()]


def few_pieces(found, kinds):
    """R^2 of few pieces, below 0 as 0: means over the features, and of 5 pieces each feature's."""
    numbers = {}
    for end in BY.values():
        for kind in kinds:
            for n in COUNTS:
                key = f"{kind}_{n}{end}"
                if key in found:
                    numbers[key] = average(found[key].clamp(min=0))
        if f"r2_5{end}" in found:
            numbers[f"r2_5_each{end}"] = listed(found[f"r2_5{end}"].clamp(min=0))
    return numbers


def of_drawn(found):
    """R^2 of 5 pieces for random directions."""
    return {f"drawn_r2_5{end}": average(found[f"r2_5{end}"].clamp(min=0))
            for end in BY.values() if f"r2_5{end}" in found}


def ask(seed, name, mask):
    """How well does one decomposition, under one kind of masks, explain the computed features?
    {matrix, or "all": flat dict}."""
    gpt = seed.arena.gpt
    _, test = seed.readings
    m = seed.decompositions[name]
    choose_masks = MASKS[mask]

    # how few pieces do, for features and for random directions
    few, for_drawn = [
        attribution.attribute(m, gpt, *readings, units, choose_masks, counts=COUNTS, each=seed.each,
                              by=BY) if len(units) else {}
        for readings, units in ((seed.readings, seed.computed), (seed.drawn, seed.drawn_units))]
    found = {}
    for matrix, of_matrix in few.items():
        numbers = few_pieces(of_matrix, ("r2", "sum")) | of_drawn(for_drawn.get(matrix, {}))
        # both matrices' pieces have as many parameters
        params_F = m.params_F.to(of_matrix["chosen"].device)
        numbers["params"] = average(params_F[of_matrix["chosen"][:, :5]].sum(1))
        numbers["pieces"] = m.C if m.kind == "component" else len(m.params_F)
        for key in ("r2_all", "still_on", "still_f", "active_share", "rest_share", "n90"):
            numbers[key] = average(of_matrix[key])
        found[matrix] = numbers

    # does a feature do as its shares say?
    gen = common.generator(seed.number, "pairs")
    checked = attribution.causal(m, gpt, test, seed.computed, gen, choose_masks, each=seed.each)
    for matrix, of_matrix in checked.items():
        found[matrix] |= {key: average(value_U) for key, value_U in of_matrix.items()}
        for key in ("pre_pearson", "pearson"):
            found[matrix][f"{key}_each"] = listed(of_matrix[key])

    # over which earlier features; W_out's components read none
    if m.kind == "component":
        complete_U = attribution.path_completeness(m, gpt, seed.earlier, test, seed.computed,
                                                   choose_masks, each=seed.each)
        found[m.matrices[0]]["path_completeness"] = average(complete_U)
    return found


def ask_earlier(seed):
    """How well do earlier features explain the computed ones without anything between? In the form
    of `ask`. They have no shares: none is chosen by its size, and none is removed."""
    found, for_drawn = [
        attribution.directly(seed.earlier, seed.arena.gpt, *readings, units, COUNTS, seed.each)
        if len(units) else {}
        for readings, units in ((seed.readings, seed.computed), (seed.drawn, seed.drawn_units))]
    params_F = seed.earlier.params_F
    numbers = dict(params=5. * params_F[0].item(), pieces=len(params_F))
    return {"all": numbers | few_pieces(found, ("r2",)) | of_drawn(for_drawn)}


# ------------------------------------------------------------------------------------- the chains
class Worded:
    """Units of one model, in words."""

    def __init__(self, m, arena):
        self.m = m
        self.arena = arena
        splits = (arena.fit, arena.test)
        self.fit, self.test = [evals.counts(m, arena.gpt, *split, (0,)) for split in splits]
        self.matched = evals.match(self.fit, self.test)

    def clearest(self, units, n):
        """Which of some units fit a concept best, on fit? Without concepts: which are on most?"""
        worth_F = self.fit["on"][0]
        if self.matched:
            f1_FK = evals.f1_of_counts(self.fit)[0]
            worth_F = f1_FK.gather(1, self.matched.concept_F.unsqueeze(1)).squeeze(1)
        return units[worth_F[units].topk(min(n, len(units))).indices]

    def describe(self, units, examples, what):
        """Say what some units do, {unit: lines of text}; what: the words before its number."""
        units = units.unique()
        frequency_F = self.test["on"][0] / self.test["n"]
        lines = evals.describe(self.m, self.arena.gpt, self.arena.test[0], units, frequency_F,
                               self.matched, self.arena.names, [examples] * len(units))
        n = len(lines) // len(units)
        texts = {}
        for i, unit in enumerate(units.tolist()):
            first, *rest = lines[i * n:(i + 1) * n]
            texts[unit] = [f"{what} {first}", *rest]
        return texts


def indented(lines, by):
    return [" " * by + line for line in lines]


def chains(seed, name):
    """Where do later features come from? The strongest paths to those with the clearest concepts,
    in words, a text for each: no masks, components of the first matrix."""
    arena = seed.arena
    gpt = arena.gpt
    m = seed.decompositions[name]
    matrix = m.matrices[0]
    fit, test = seed.readings
    later = Worded(seed.models["later"], arena)
    units = later.clearest(seed.computed, CHAINS)
    found = attribution.strongest_paths(m, gpt, seed.earlier, test, units, PATHS, each=seed.each)

    # how much there is to explain, and how well few components do
    few = attribution.attribute(m, gpt, fit, test, units, counts=(5,), each=seed.each)[matrix]
    rows = test.rows(units, seed.each)
    q_U = (rows.w_ND * rows.y_ND).sum(1).view(-1, seed.each).abs().mean(1)
    share_Un = found.mean_Un / q_U.unsqueeze(1)
    cosine_CI = matching.cosines(m.unit_directions()[0][1], seed.earlier.W_dec)

    # all in words; components as they are evaluated, off below a threshold
    component = Worded(seed.models[name], arena)
    earlier = Worded(seed.earlier, arena)
    of_later = later.describe(units, 2, "later feature")
    of_component = component.describe(found.component_Un, 1, f"<- component of W_{matrix}")
    of_earlier = earlier.describe(found.earlier_Un, 1, "<- earlier feature")
    texts = []
    for u, unit in enumerate(units.tolist()):
        lines = [*of_later[unit], f"    R² of 5 components of W_{matrix}: {few['r2_5'][u]:.2f}"]
        paths = zip(found.component_Un[u].tolist(), found.earlier_Un[u].tolist(), share_Un[u])
        for c, i, share in paths:
            lines.append(f"  path of {share:+.0%} of E|q|, cosine of reading {cosine_CI[c, i]:.2f}")
            lines += indented(of_component[c], 4) + indented(of_earlier[i], 8)
        texts.append("\n".join(lines))
    return texts


# ------------------------------------------------------------------------------ what is made of it
class Entry(NamedTuple):
    """A line of the tables: the components of one matrix, or all pieces of another kind."""
    name: str                       # of the decomposition
    matrix: str
    masks: str

    @property
    def label(self):
        return self.name if self.matrix == "all" else f"{self.name} {self.matrix}"

    @property
    def null(self):
        """The entry that has as many random pieces of the same sum."""
        return self._replace(name=f"{self.name}:rotated")


def collect(rows):
    """{entry: {seed: its numbers}}, with how it compares to the other decompositions of the seed:
    delta and wins at 5 pieces, and the share of the features that are explained."""
    entries = {}
    for row in rows:
        for matrix, numbers in row["matrices"].items():
            entry = Entry(row["name"], matrix, row["masks"])
            entries.setdefault(entry, {})[row["seed"]] = dict(numbers)
    for entry, by_seed in entries.items():
        others = [other for other in entries if other.name != entry.name and other.masks == "off"]
        for seed, numbers in by_seed.items():
            of_others = {other.label: entries[other][seed] for other in others}
            numbers |= held_against(numbers, of_others)
    return entries


def held_against(numbers, others):
    """How does one entry compare to others of its seed? Flat dict, of `attribution.compare`."""
    found = {}
    for end in BY.values():
        key = f"r2_5_each{end}"
        r2s = {label: torch.tensor(other[key]) for label, other in others.items() if key in other}
        # earlier features aren't chosen by all rules
        if key not in numbers or not r2s:
            continue
        r2_U = torch.tensor(numbers[key])
        compared = attribution.compare(r2_U, r2s)
        found |= {f"{key}{end}": compared[key] for key in ("delta", "best", "wins")}
        for key in ("pre_pearson", "pearson"):
            # earlier features have no r: nothing can be removed
            if f"{key}_each" in numbers:
                pearson_U = torch.tensor(numbers[f"{key}_each"])
                explained = attribution.compare(r2_U, r2s, pearson_U)["explained"]
                found[f"explained_{key}{end}"] = explained
    return found


def masked(entries):
    """The entries that are asked under masks, and whose null is: matrix by matrix."""
    some = [entry for entry in entries if entry.null._replace(masks="rounded") in entries]
    return sorted(some, key=lambda entry: entry.label)


def asked(entries):
    """The entries of the components that are asked about, without masks."""
    return [entry for entry in masked(entries) if entry.masks == "off"]


def difference(entries, one, other, key):
    """By how much is a number higher in one entry than in another, seed by seed? {mean, half, ..}.
    None without seeds that have both."""
    differences = []
    for seed, numbers in entries[one].items():
        value = entries[other][seed].get(key)
        if value is not None and key in numbers:
            differences.append(numbers[key] - value)
    return noise.over_seeds(differences)


def verdict(lost):
    """Is a loss, {mean, half, ..}, a cliff?"""
    if lost["half"] is None:
        return "one seed can't tell"
    if lost["mean"] - lost["half"] > CLIFF:
        return "a cliff"
    return "no cliff" if lost["mean"] + lost["half"] < CLIFF else "too noisy to tell"


def cliffs(entries):
    """What masks cost, and whether it is a cliff: a table."""
    lines = []
    for entry in masked(entries):
        if entry.masks != "off":
            off = entry._replace(masks="off")
            lost = [difference(entries, off, entry, key) for key in FALLS]
            cells = [f"{written(one, 3)}: {verdict(one)}" if one else "n/a" for one in lost]
            lines.append([entry.label, entry.masks, *cells])
    return markdown_table(["pieces", "masks", *FALLS.values()], lines)


# ---------------------------------------------------------------------------------- what it shows
HEADLINE = {                        # key: (head, digits, key of what stands in brackets)
    "r2_1_forward": ("R² of 1 ↑", 3, None),
    "r2_5_forward": ("of 5 ↑", 3, "drawn_r2_5_forward"),
    "r2_10_forward": ("of 10 ↑", 3, None),
    "r2_5": ("of 5 by size ↑", 3, "drawn_r2_5"),
    "r2_5_by_spread": ("by spread ↑", 3, "drawn_r2_5_by_spread"),
    "r2_5_by_r": ("by r ↑", 3, "drawn_r2_5_by_r"),
    "sum_5_by_spread": ("as they are ↑", 3, None),
    "r2_all": ("all as they are ↑", 3, None),
    "explained_pearson_forward": ("explained ↑", 3, None),
    "path_completeness": ("paths ↑", 3, None),
    "pre_pearson": ("causal r", 3, "null_pre_pearson"),
    "pearson": ("by f", 3, "null_pearson"),
    "pieces": ("in all", 0, None),
    "params": ("parameters of 5", 0, None),
}
CHOSEN = {"size": "by size", "spread": "by spread", "correlation": "by r", "forward": "forward"}
LESS = {                            # key: of what is said which decomposition has more
    "r2_5_forward": "R² of 5, forward",
    "r2_20_forward": "R² of 20, forward",
    "r2_5_by_spread": "R² of 5 by spread",
    "sum_5_by_spread": "the same as they are",
    "r2_5_by_r": "R² of 5 by r"}
FALLS = {                           # key: head
    "r2_all": "of all", "r2_5_forward": "of 5", "r2_10_forward": "of 10", "r2_5": "of 5 by size",
    "r2_5_by_r": "of 5 by r"}
MASKED = {                          # key: (head, digits); in brackets what random pieces have
    "r2_all": ("R² of all, as they are ↑", 3),
    "still_on": ("still on ↑", 2),
    "still_f": ("of f ↑", 2),
    "r2_1_forward": ("R² of 1 ↑", 3),
    "r2_5_forward": ("of 5 ↑", 3),
    "r2_10_forward": ("of 10 ↑", 3),
    "delta_forward": ("Δ of 5 ↑", 3),
    "active_share": ("active ↑", 2),
    "rest_share": ("rest ↓", 3),
    "n90": ("n90 ↓", 0),
    "path_completeness": ("paths ↑", 3),
    "pre_pearson": ("causal r", 3),
    "pearson": ("by f", 3),
    "pre_slope": ("slope", 2),
    "pre_sign_agreement": ("sign ↑", 2),
    "explained_pearson_forward": ("explained ↑", 3),
}
ABOUT = """
q: what the MLP's output y, of layer {layer}, adds to a later feature's pre-activation, w . y. Share
of a piece: what it adds to q. Later features are of an SAE of the stream right after the MLP,
earlier ones of an SAE of its input; often enough: on at {each} tokens of fit and at {each} of test,
and all numbers are over {each} tokens at which they are on. The pieces are compare.py's rows at the
middle of their sparsities, on {tokens:,} tokens of training (spd-long: three times as many):
spd-length.md says how far from settled SPD is then.
""".strip()
LEGEND = """
Numbers are means over the computed features, then over seeds ± half of the 95 % t interval; neurons
and singular vectors are the same in all seeds, and only the SAEs differ.
R² of n: of q on n pieces, chosen and fitted on fit, scored on test; below 0 counts as 0. Forward,
where nothing else is said: pieces one after the other, each the one that with those before it
leaves least. By size: of largest E|share|; by spread: of largest standard deviation of the share;
by r: of largest |r| with q. A share that is large but constant says nothing of how q varies, and
the rule by size chooses it; all but forward are blind to what pieces say together. In brackets: for
random directions in the place of the later features, at their tokens, those of which more than half
is the MLP's.
As they are: the sum of the five shares of largest spread, to which no weights are fitted, only a
constant; a weight can make up for much that a piece writes elsewhere. All as they are: of all
pieces, 1 where nothing is left out; below 0 stays below.
Weights are fitted to {each} tokens: where pieces are on at few of them, more can tell less.
Explained: R² of 5 of .8 or more, and a causal r by f of .7 or more. Causal r: of what the
pre-activation loses when a piece is removed, and the piece's share, over the largest 5 % of the
shares; in brackets over random pairs. It says that shares are right, not that pieces are good:
random pieces have it too. For W_out and for what writes y directly it is 1 by construction: only
W_in's components act through the nonlinearity. By f: of what the feature itself loses, in
competition with all others of a TopK. Paths: completeness, of W_in's components alone: the size of
all paths from earlier features through what is on is added up, and what else there is, component by
component. In all: how many pieces there are. Parameters: of 5 by size; those of molt are maps of
many ranks.
:rotated is the null, as many random pieces of the same sum; `earlier` has nothing between.
W_in's components and W_out's each add up to q: they are two answers, each with the other matrix and
the gates of all neurons as they are at each token, which other pieces don't have.
""".strip()
LESS_LEGEND = """
The components less the others, seed by seed. What is within ± is a tie; nothing is corrected for
how many were asked.
""".strip()
MASKS_LEGEND = """
In brackets: random pieces of the same sum (:rotated) under the same masks, which are the
importances of other pieces: chance, not a competitor. Still on: at which share of its tokens a
feature is on if the MLP writes what its masks leave, and its mean there over what it was. Δ: less
the best other decomposition, without masks. Active: 1 - what all but the active components
(importance over 0.1) add, in units of q: of what is left out by masks, and of what is not active
without; rest: E|rest| / E|q|; n90: how many components make up 90 % of all shares. Under masks q
stays that of the MLP itself.

By how much R² falls from masks off; a cliff: surely by more than 0.1. Weights are fitted anew under
masks, except to all pieces, which are as they are.
""".strip()


def written(summary, digits):
    """Write a mean with its half interval, as noise.over_seeds has them."""
    if not summary:
        return "n/a"
    text = f"{summary['mean']:.{digits}f}"
    if summary["half"]:
        text += f"±{summary['half']:.{digits}f}".replace("±0.", "±.")
    return text


def over_seeds(by_seed, key):
    """{mean, half, ..} of one number; None where no seed has it."""
    return noise.over_seeds([numbers.get(key) for numbers in by_seed.values()])


def cell(by_seed, key, digits, null_by_seed, null_key):
    """Write one number over seeds, and in brackets the mean of its null if there is one."""
    text = written(over_seeds(by_seed, key), digits)
    null = over_seeds(null_by_seed, null_key)
    return f"{text} ({null['mean']:.{digits}f})" if null else text


def headline_lines(entries):
    """Say how the components that are asked about compare to the best of the others."""
    lines = []
    for entry in asked(entries):
        by_seed = entries[entry]
        texts = []
        for by, end in BY.items():
            best = ", ".join(sorted({numbers[f"best{end}"] for numbers in by_seed.values()}))
            delta = over_seeds(by_seed, f"delta{end}")
            texts.append(f"{written(delta, 3)} {CHOSEN[by]} ({best})")
        lines.append(f"- {entry.label}: R² of 5 pieces less that of the best other decomposition: "
                     f"{', '.join(texts)}.")
    return lines


def headline_table(entries):
    """All decompositions without masks."""
    lines = []
    for entry, by_seed in entries.items():
        if entry.masks == "off":
            cells = [cell(by_seed, key, digits, by_seed, null_key)
                     for key, (_, digits, null_key) in HEADLINE.items()]
            lines.append([entry.label, *cells])
    return markdown_table(["pieces", *(head for head, _, _ in HEADLINE.values())], lines)


def less_tables(entries):
    """The components that are asked about against each other decomposition, in pairs of seeds: a
    table for each of LESS."""
    ours = asked(entries)
    lines = []
    for key, head in LESS.items():
        cells = []
        for other in entries:
            if other.masks == "off" and other not in ours:
                less = [written(difference(entries, entry, other, key), 3) for entry in ours]
                cells.append([other.label, *less])
        heads = [f"{head}, less", *(entry.label for entry in ours)]
        lines += ["", *markdown_table(heads, cells)]
    return lines


def masks_table(entries):
    """Trained components under each kind of masks, beside random ones."""
    lines = []
    for entry in masked(entries):
        cells = [cell(entries[entry], key, digits, entries[entry.null], key)
                 for key, (_, digits) in MASKED.items()]
        lines.append([entry.label, entry.masks, *cells])
    return markdown_table(["pieces", "masks", *(head for head, _ in MASKED.values())], lines)


def count_lines(rows):
    """Say how many later features there are, and of which kind."""
    by_seed = {row["seed"]: row for row in rows}

    def number(key, digits=2):
        return cell(by_seed, key, digits, by_seed, f"null_{key}")

    return [
        f"{number('frequent', 0)} later features are on often enough. In brackets: random "
        "directions at the same tokens.",
        f"The MLP computes {number('share_computed')} of them, {number('computed', 0)} features, "
        "the *computed* ones: more than half is the MLP's, and no earlier feature is a copy (cosine"
        f" of {attribution.EQUAL}; {number('share_passthrough')} of all are copies).",
        f"Computed share, E|q| / (E|q| + E|what else is read|), of all: {number('share')}.",
        f"Both SAEs have {sae.Config.F:,} features, {sae.Config.k} on at a token; FVE of the "
        f"earlier {number('fve_earlier', 3)}, of the later {number('fve_later', 3)}."]


def render(found):
    """What was found, as Markdown."""
    entries = collect(found["rows"])
    provenance = found["provenance"]
    config = provenance["config"]
    lines = ["# Later SAE features from the pieces of an MLP", f"`{provenance['command']}` wrote "
             "this.", "",
             ABOUT.format(layer=found["features"][0]["layer"], each=config["each"],
                          tokens=config["tokens"]), "",
             *count_lines(found["features"])]
    lines += ["", *headline_lines(entries), "", *headline_table(entries), "",
              LEGEND.format(each=config["each"])]
    lines += ["", LESS_LEGEND, *less_tables(entries)]
    lines += ["", "## Under masks", "", *masks_table(entries), "", MASKS_LEGEND]
    lines += ["", *cliffs(entries)]
    for row in found["chains"]:
        lines += ["", "## Strongest paths", ""]
        lines.append(f"To the computed later features with the clearest concepts, seed "
                     f"{row['seed']}, through {row['name']}'s components, without masks. A path is "
                     "a mean over tokens; paths may cancel.")
        for text in row["texts"]:
            lines += ["```", text, "```"]
    return "\n".join([*lines, ""])


def picture(found):
    """Draw R^2 over the number of pieces: all decompositions, chosen in four ways, and masks."""
    entries = collect(found["rows"])
    figure = pictures.blank(25, 6)
    panels = figure.subplots(1, len(BY) + 1, sharey=True)
    by_mask = panels[-1]
    off = {entry: by_seed for entry, by_seed in entries.items() if entry.masks == "off"}
    style = pictures.styles([dict(name=entry.label, floor=is_floor(entry)) for entry in off])
    for entry, by_seed in off.items():
        for ax, end in zip(panels, BY.values()):
            draw_r2(ax, by_seed, end, style[entry.label], not is_floor(entry))
    for entry in masked(entries):
        if entry.name != asked(entries)[0].name:
            continue
        color = f"C{[*MASKS].index(entry.masks)}"
        marker = "o" if entry.matrix == "in" else "s"
        look = dict(color=color, marker=marker, mfc="w")
        label = f"{entry.label}, {entry.masks}"
        draw_r2(by_mask, entries[entry], BY["forward"], look | dict(ls="-", label=label))
        null_look = look | dict(ls=":", label=f"{label}, random")
        draw_r2(by_mask, entries[entry.null], BY["forward"], null_look, has_band=False)
    titles = ("pieces of largest E|share|", "of largest spread of the share",
              "of largest |r| with q", "one after the other", "one after the other, under masks")
    for ax, title in zip(panels, titles):
        ax.set(xlabel="number of pieces", xscale="log", title=title, ylim=(-0.02, 1.02))
        ax.set_xticks(COUNTS, COUNTS)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("R² of q, mean over computed features")
    # one legend for all rules: earlier features have no place in the first two
    of_rules = panels[-2].get_legend_handles_labels()
    figure.legend(*of_rules, loc="outside lower left", ncols=8, fontsize=9)
    figure.legend(*by_mask.get_legend_handles_labels(), loc="outside lower right", ncols=3,
                  fontsize=9)
    return figure


def is_floor(entry):
    return ":" in entry.name or entry.name in compare.FLOORS


def draw_r2(ax, by_seed, end, look, has_band=True):
    """A line through the means over seeds, with the band of their interval."""
    means = []
    halves = []
    if not over_seeds(by_seed, f"r2_1{end}"):
        return                      # earlier features aren't chosen by all rules
    for n in COUNTS:
        summary = over_seeds(by_seed, f"r2_{n}{end}")
        means.append(summary["mean"])
        halves.append(summary["half"] or 0)
    ax.plot(COUNTS, means, **look)
    if has_band:
        lower = [mean - half for mean, half in zip(means, halves)]
        upper = [mean + half for mean, half in zip(means, halves)]
        ax.fill_between(COUNTS, lower, upper, color=look["color"], alpha=0.15, lw=0)


# ------------------------------------------------------------------------------------------- main
@cache
def code():
    """Hashes of what the code does that answers depend on, beside the models' own."""
    here = (Seed, label_features, few_pieces, ask, ask_earlier, Worded, chains)
    return [compare.code_of(part) for part in (*CODE, *here)]


class Question(NamedTuple):
    """One thing that is asked of one seed."""
    table: str                      # where its answer goes
    seed: Seed
    name: str                       # of the decomposition, or what else is asked
    masks: str = ""

    def __str__(self):
        masks = f" masks {self.masks}" if self.masks else ""
        return f"{self.name}{masks} seed {self.seed.number}"

    @property
    def names(self):
        return dict(seed=self.seed.number, name=self.name, masks=self.masks)

    def answer(self):
        if self.table == "features":
            return label_features(self.seed)
        if self.table == "chains":
            return dict(texts=chains(self.seed, self.name))
        if self.name == "earlier":
            return dict(matrices=ask_earlier(self.seed))
        return dict(matrices=ask(self.seed, self.name, self.masks))

    def row(self, found):
        """The row of its table that has the answer."""
        for row in found[self.table]:
            if self.names.items() <= row.items():
                return row

    def depends_on(self, cfg):
        """All that the answer depends on: models, text, sizes, and what the code does."""
        which = self.seed.which
        used = [*SAES, self.name.split(":")[0]]
        hashes = [which[name] for name in used if name in which]
        arena = self.seed.arena
        return [str(self), self.table, arena.gpt.hash, arena.layer, hashes, code(),
                data.fingerprint(cfg.data), cfg.eval_tokens, cfg.each, COUNTS]


def in_order(row):
    """What rows are sorted by."""
    return row["seed"], row["name"], row["masks"]


def columns(found):
    """What compare.py's table takes from here, without masks: {row: {key: metric}}."""
    values = {}
    for row in found["rows"]:
        if row["masks"] == "off":
            first = next(iter(row["matrices"].values()))        # components: of W_in
            values.setdefault(row["name"], []).append(first["r2_5_forward"])
    rows = {}
    for name, of_seeds in values.items():
        if ":" not in name:
            rows[name] = column("r2_5_forward", of_seeds, values.get(f"{name}:rotated", []))
    return rows


def questions(seeds, first):
    """All that is asked, a seed at a time; first: the method that chains run through."""
    todo = []
    for seed in seeds:
        todo.append(Question("features", seed, "features"))
        for name in seed.decompositions:
            todo += [Question("rows", seed, name, mask) for mask in seed.masks_of(name)]
    return [*todo, Question("chains", seeds[0], first)]


def main(cfg):
    cfg = apart(cfg)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    layer = check(cfg, gpt)
    path = Path(cfg.out) / "across.json"
    known = Found(path, TABLES, in_order)
    arena = compare.prepared(table_of(cfg), gpt, layer, dev)
    common.must_be_writable(cfg.out, cfg.runs, cfg.table)
    common.hold(cfg.out)

    # all models first, then one question after another
    seeds = seeds_of(cfg, arena)
    todo = questions(seeds, first_of(cfg))
    for question in compare.in_turn(todo):
        known.row(question.table, question.depends_on(cfg), question.names, question.answer)

    # the file may hold answers of other runs
    found = {table: [] for table in TABLES}
    for question in todo:
        found[question.table].append(question.row(known.found))
    known.write(columns=columns(found), provenance=common.provenance(cfg, gpt))
    text = render(found | dict(provenance=known.found["provenance"]))
    common.write(path.with_suffix(".md"), text.encode())
    curve.save_picture(picture(found), path.with_suffix(".png"))
    print("", text, f"-> {cfg.out}/across.json, .md, .png", sep="\n")


if __name__ == "__main__":
    main(common.cli(Config))
