"""What did compare.py find? Numbers of jobs become rows with intervals and nulls, then text,
Markdown and CSV.

    results = table.assemble(found, provenance)     # what results.json holds
    table.write(results, "results")                 # results.json, table.md, table.csv, pictures

A null is what a number has to be held against: a constant, or what a floor (baselines.py) has, at
the floor's sparsity that is nearest to the row's. Nearest in L0 where units are judged by what
they write, in the share of units on where they are judged by what they mean.
"""
import csv
import io
import itertools
import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np

import common
from metrics.columns import Column
from report import noise, pictures

# ------------------------------------------------------------------------------------ the columns
AT = 16                             # an L0 that all rows of the full table reach
AT_L0 = f"at L0 {AT}"
READ_OFF = ("ce_recovered", "kl_recovered", "fve", "active_params", "index_bits")   # each KEY_at
TABLES = ("faithful", AT_L0, "sparse", "concepts", "probes", "atoms", "words", "by LLM", "effects",
          "stability", "masks")         # the headings of columns, in the order of the page

MEASURED = {
    "ce_recovered": Column(
        "CE rec", "up", beat=0, digits=3, table="faithful",
        text="share of the cross-entropy that mean-ablating the MLP costs which the units on win "
             "back alone; 1 is all, n/a where it costs under 0.05 nats"),
    "kl_recovered": Column(
        "KL rec", "up", beat=0, digits=3, table="faithful",
        text="the same of the divergence from the original predictions"),
    "kl": Column(
        "KL", "down", beat="mean ablation", digits=4, table="faithful",
        text="divergence from the original predictions, nats per token"),
    "fve": Column(
        "FVE", "up", beat="pca", digits=3, table="faithful",
        text="1 - E|y - y_hat|^2 / E|y - E y|^2 of the MLP's output y"),
    "completeness": Column(
        "complete", "up", beat=0, digits=3, table="faithful",
        text="1 - CE recovered by what is left out alone; read beside CE rec"),
    "error_pathology": Column(
        "err path", "down", beat=1, digits=2, table="faithful",
        text="KL over the KL of random errors of the same size"),
    "faith_auc": Column(
        "faith k", "up", beat="random", digits=3, table="faithful",
        text="CE recovered by the 1 to 20 units (spd, svd: of each matrix) that matter most at "
             "each token, area over log k"),
    "comp_auc": Column(
        "all but k", "down", beat="random", digits=3, table="faithful",
        text="CE recovered by all but those units, errors kept"),
    "l0": Column(
        "L0", "down", beat=None, digits=1, table="sparse",
        text="units on per token (SPD: of both matrices)"),
    "active_params": Column(
        "params", "down", beat=None, digits=0, table="sparse",
        text="parameters of the units on, per token, and of a skip"),
    "index_bits": Column(
        "bits", "down", beat=None, digits=1, table="sparse",
        text="log2(alive choose L0): what naming the units on costs, per token"),
    "alive_units": Column(
        "alive", "", beat=None, digits=0, table="sparse",
        text="units on at 10 tokens of fit or more"),
    "dead_fraction": Column(
        "dead", "down", beat=None, digits=3, table="sparse",
        text="share of the units that are not alive"),
    "coverage": Column(
        "coverage", "up", beat="neurons", digits=3, table="concepts",
        text="F1 of the best unit for each true concept, mean"),
    "board": Column(
        "board", "up", beat="neurons", digits=3, table="concepts",
        text="F1 of all concepts said by units of precision 0.95"),
    "concept_matched_fraction": Column(
        "matched", "up", beat="random", digits=3, table="concepts",
        text="share of the alive units that match a concept, F1 0.5 or more"),
    "splits": Column(
        "splits", "down", beat="random", digits=2, table="concepts",
        text="units that a parent concept is split into; see parent F1"),
    "parent_f1": Column(
        "parent F1", "up", beat="random", digits=3, table="concepts",
        text="F1 of the best unit for the parent concepts"),
    "absorption_fraction": Column(
        "absorb", "down", beat="random", digits=3, table="concepts",
        text="share of a parent concept's effect taken over by other units; n/a where it means "
             "nothing: parent F1 under 0.6, spd, svd"),
    "probe_auroc_1": Column(
        "probe 1", "up", beat="plain neurons", digits=3, table="probes",
        text="AUROC of a probe on the best unit for each concept"),
    "probe_auroc_2": Column(
        "probe 2", "up", beat="plain neurons", digits=3, table="probes",
        text="the same on two units"),
    "probe_auroc_5": Column(
        "probe 5", "up", beat="plain neurons", digits=3, table="probes",
        text="the same on five units"),
    "probe_dense": Column(
        "dense", "", beat=None, digits=3, table="probes",
        text="the same on all of y: the ceiling"),
    "units_atomic": Column(
        "atomic", "up", beat="neurons", digits=3, table="atoms",
        text="share of the alive units that one concept explains"),
    "units_polysemantic": Column(
        "either", "", beat=None, digits=3, table="atoms",
        text="share that 'a or b' explains better"),
    "units_composite": Column(
        "both", "", beat=None, digits=3, table="atoms",
        text="share that 'a and b' explains better"),
    "units_unexplained": Column(
        "neither", "down", beat="neurons", digits=3, table="atoms",
        text="share whose best concept has F1 under 0.5"),
    "effective_rank": Column(
        "rank", "", beat=None, digits=2, table="atoms",
        text="directions that a unit writes; 1 by construction for dictionaries"),
    "fragmentation": Column(
        "pieces", "down", beat=None, digits=2, table="atoms",
        text="units that are on at the same tokens as one; 1 is best"),
    "meta_excess": Column(
        "meta", "down", beat=0, digits=3, table="atoms",
        text="how far writes are sums of few atoms, in excess of Gaussian writes"),
    "rule_det_hard": Column(
        "det hard", "up", beat="random", digits=3, table="words",
        text="does a rule in words tell where its unit is on from where the units most like it "
             "are; balanced accuracy, 0.5 is chance and for rare units; no LLM"),
    "rule_det": Column(
        "detect", "up", beat="random", digits=3, table="words",
        text="the same against any other windows"),
    "rule_fuzz": Column(
        "fuzz", "up", beat="random", digits=3, table="words",
        text="AUROC of marked tokens that satisfy the rule"),
    "rule_sim": Column(
        "simulate", "up", beat="random", digits=3, table="words",
        text="correlation of the rule's guess with the unit's value"),
    "rule_discr": Column(
        "discrim", "up", beat=0.5, digits=3, table="words",
        text="how often its own rule beats that of a neighbour"),
    "rule_f1": Column(
        "token F1", "up", beat="random", digits=3, table="words",
        text="F1 of the rule over tokens as they come"),
    "rule_lookup_f1": Column(
        "lookup F1", "", beat=None, digits=3, table="words",
        text="the same of the best table of tokens, of any size"),
    "rule_scorable": Column(
        "scorable", "up", beat=None, digits=3, table="words",
        text="share of the alive units on often enough to be explained"),
    "judge_det": Column(
        "LLM det", "up", beat="random", digits=3, table="by LLM",
        text="balanced accuracy of an LLM that tells windows where the unit is on from others by "
             "its own explanation; never mixed with the rules'"),
    "judge_fuzz": Column(
        "LLM fuzz", "up", beat="random", digits=3, table="by LLM",
        text="the same of right and wrong marks in a window"),
    "judge_failures": Column(
        "no answer", "down", beat=None, digits=3, table="by LLM",
        text="share of its answers that could not be used"),
    "ablation": Column(
        "ablate", "up", beat=0, digits=3, table="effects",
        text="nats that switching off the five units of 'the next token is a noun, a verb, ..' "
             "costs there, less elsewhere, less the same of fifteen units on as often"),
    "ablation_at": Column(
        "there", "", beat=None, digits=3, table="effects",
        text="nats that it costs there"),
    "ablation_elsewhere": Column(
        "elsewhere", "", beat=None, digits=3, table="effects",
        text="nats that it costs elsewhere"),
    "steering": Column(
        "steer", "up", beat="random", digits=3, table="effects",
        text="harmonic mean of success, fluency and harmlessness when the best unit's writes "
             "push towards a set of next tokens"),
    "steering_means": Column(
        "s. means", "", beat=None, digits=3, table="effects",
        text="the same of the difference of means of y: what to beat"),
    "steering_random": Column(
        "s. random", "", beat=None, digits=3, table="effects",
        text="the same of random directions"),
    "weights_similarity_corrected": Column(
        "weights", "up", beat=0, digits=3, table="stability",
        text="similarity in weights of units of two seeds, matched one to one, in excess of "
             "random units: mean of two cosines, spd and molt their product, which is lower"),
    "weights_shared_0.7": Column(
        "same w", "up", beat=None, digits=3, table="stability",
        text="share of the alive units with a mate in another seed that reads and writes the "
             "same, cosines of 0.7 or more (molt: their product)"),
    "inputs_shared_0.7": Column(
        "same i", "up", beat=None, digits=3, table="stability",
        text="as same w, but with the cosine of what two units read taken over the inputs: do "
             "they get the same from each token"),
    "activations_similarity_corrected": Column(
        "values", "up", beat=0, digits=3, table="stability",
        text="similarity of their values over tokens, in excess of shifted tokens"),
    "activations_shared_0.7": Column(
        "same v", "up", beat=None, digits=3, table="stability",
        text="share with a mate of correlation 0.7 or more"),
    "activations_survival": Column(
        "in all", "up", beat=None, digits=3, table="stability",
        text="share with such a mate in every other seed"),
    "function_fve": Column(
        "output", "up", beat=None, digits=3, table="stability",
        text="FVE of one seed's output by another's"),
    "function_fve_independent": Column(
        "by chance", "", beat=None, digits=3, table="stability",
        text="the same if seeds erred independently"),
    "ce_recovered_causal_importance": Column(
        "CE soft", "up", beat=0, digits=3, table="masks",
        text="CE rec under the causal importances as masks"),
    "ce_recovered_stochastic": Column(
        "CE stoch", "up", beat=0, digits=3, table="masks",
        text="CE rec when the rest is ablated at random"),
    "kl_attack": Column(
        "KL attack", "down", beat=None, digits=4, table="masks",
        text="KL when the rest is ablated by attack: 20 sign steps of 0.1, one source for all "
             "positions of 32 rows"),
    "attack_ratio": Column(
        "x soft", "", beat=None, digits=2, table="masks",
        text="the same over the KL of the causal importances; small also where those are bad"),
    "kl_joint": Column(
        "KL joint", "", beat=None, digits=4, table="masks",
        text="KL added by forcing on what is on at 8 random other tokens; 0 if importances hold "
             "jointly, below 0 where they are bad"),
}
READ = f"{AT_L0}, read off each seed's curve: linear in log L0 between its sparsities"
OWN = {
    "ce_recovered_at": Column(
        f"CE @{AT}", "up", beat=0, digits=3, table=AT_L0, text=f"CE rec {READ}"),
    "kl_recovered_at": Column(
        f"KL @{AT}", "up", beat=0, digits=3, table=AT_L0, text=f"KL rec {READ}"),
    "fve_at": Column(
        f"FVE @{AT}", "up", beat="pca", digits=3, table=AT_L0, text=f"FVE {READ}"),
    "active_params_at": Column(
        f"params @{AT}", "down", beat=None, digits=0, table=AT_L0, text=f"params {READ}"),
    "index_bits_at": Column(
        f"bits @{AT}", "down", beat=None, digits=1, table=AT_L0, text=f"bits {READ}"),
    "tokens": Column(
        "tokens", "", beat=None, digits=0, table="sparse", text="that the model was trained on"),
    "steps": Column("steps", "", beat=None, digits=0, table="sparse", text="of training"),
    "seconds": Column(
        "seconds", "", beat=None, digits=0, table="sparse",
        text="of training, on a machine that did other things too; clt: all MLPs"),
}
COLUMNS = MEASURED | OWN

BASE = "spd"                # the row that all methods are held against, in one number of each kind:
HEADLINES = (("ce_recovered_at", "error_pathology", "completeness", "coverage", "probe_auroc_1"),
             ("rule_det_hard", "ablation", "steering", "units_atomic", "activations_shared_0.7"))
ARROWS = {"up": "↑", "down": "↓", "": ""}               # which way is better
DRAWN = ("attack", "alive_curve", "spectrum")           # curves of each seed, for the pictures
OF_TARGET = ("ce_original", "ce_mean_ablation", "ce_zero_ablation", "kl_mean_ablation")


def keys_under(heading):
    return [key for key, column in COLUMNS.items() if column.table == heading]


# ------------------------------------------------------------------------------ from jobs to rows
def assemble(outcomes, provenance):
    """Collect what the jobs found into what results.json holds.

    outcomes: [(job, its numbers, error text or None)]. A job is a method at one sparsity and one
    seed, or at all seeds at once (seed None); a row is a method at one sparsity."""
    n_seeds = provenance["config"]["seeds"]
    rows = collect_rows(outcomes, n_seeds)
    for row in rows:
        for key in COLUMNS:
            if key in row["metrics"]:
                row["metrics"][key]["null"] = null(row, rows, key)

    middle = [row for row in rows if row["middle"]]
    apart = noise.differences(middle, BASE, sum(HEADLINES, ()), n_seeds)
    differences = [dict(name=name, metric=key, by=by, p=p)
                   for (name, key), (by, p) in apart.items()]
    columns = {key: column._asdict() for key, column in COLUMNS.items()}
    return dict(provenance=provenance, rows=rows, differences=differences,
                target=target_of(outcomes), columns=columns)


def collect_rows(outcomes, n_seeds):
    """Sort the jobs by row, and turn each row's jobs into one dict."""
    by_row = {}
    curves = {}                     # of each method and seed: the numbers at all sparsities
    for job, numbers, error in outcomes:
        by_row.setdefault((job.name, job.value), []).append((job, numbers, error))
        curves.setdefault((job.name, job.seed), []).append(numbers)
    return [make_row(jobs, curves, n_seeds) for jobs in by_row.values()]


def make_row(jobs, curves, n_seeds):
    """Summarise a method at one sparsity: its metrics over seeds, and what failed."""
    first = jobs[0][0]
    row = dict(name=first.name, knob=first.knob, value=first.value, floor=first.floor,
               middle=first.middle, seeds=[], failed=[])

    # numbers of single seeds, and those that are found from all seeds at once
    per_seed = []
    at_once = {}
    for job, numbers, error in jobs:
        if job.seed is None:
            at_once = numbers
        else:
            row["seeds"].append(job.seed)
            at_one = at_one_l0(curves[job.name, job.seed]) if job.middle else {}
            per_seed.append(numbers | at_one)
        if error:
            who = "all seeds" if job.seed is None else f"seed {job.seed}"
            row["failed"].append(f"{who}: {error}")

    # where something failed, a mean over the seeds that are left would hide it
    metrics = average_over_seeds(per_seed, complete=bool(row["failed"]))
    row["metrics"] = metrics | noise.of_seeds(at_once, n_seeds)
    for key in DRAWN:
        row[key] = [numbers[key] for numbers in per_seed if key in numbers]
    return row


def at_one_l0(points):
    """What would one seed of a method have at an L0 of AT? {KEY_at: number}, for KEY in READ_OFF.

    points: its numbers at each sparsity, one dict each. Linear in log L0 between them. Empty where
    AT lies outside of them by more than 5 %; without a KEY that one of them has no number for."""
    points = sorted((point for point in points if point.get("l0")), key=lambda point: point["l0"])
    if not points or not points[0]["l0"] / 1.05 <= AT <= points[-1]["l0"] * 1.05:
        return {}
    log_l0s = [math.log(point["l0"]) for point in points]
    read = {}
    for key in READ_OFF:
        values = [point.get(key) for point in points]
        if all(isinstance(value, (int, float)) for value in values):
            read[f"{key}_at"] = float(np.interp(math.log(AT), log_l0s, values))
    return read


def average_over_seeds(per_seed, complete):
    """Average each number of a row over its seeds: {key: {mean, half, values}}.

    per_seed: one flat dict for each seed. KEY_within is not averaged: it is the interval over
    stories that belongs to KEY. complete: leave out a key that is missing in one of the dicts."""
    metrics = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(per_seed)):
        is_missing = complete and not all(key in numbers for numbers in per_seed)
        if is_missing or key.endswith("_within"):
            continue
        values = [numbers.get(key) for numbers in per_seed]
        metric = noise.over_seeds(values, per_seed[0].get(f"{key}_within"))
        if metric:
            metrics[key] = metric
    return metrics


def target_of(outcomes):
    """What are the losses of the intact and of the ablated target? As measured by the first job
    that ran on it; controls on an untrained target are passed over."""
    for job, numbers, _ in outcomes:
        if "ce_original" in numbers and not job.name.endswith(":untrained"):
            return {key: numbers.get(key) for key in OF_TARGET}
    return dict.fromkeys(OF_TARGET)


# --------------------------------------------------------------------------------------- the nulls
def null(row, rows, key):
    """What does one number of a row have to be held against? A number, or None for nothing.

    The first that there is: the null measured beside it (null_KEY); what its column says has to be
    beaten: a constant, the target's mean ablation, or a floor at its nearest sparsity."""
    measured = row["metrics"].get(f"null_{key}")
    if measured:
        return measured["mean"]
    beat = COLUMNS[key].beat
    if not isinstance(beat, str):
        return beat
    if beat == "mean ablation":
        ablated = row["metrics"].get("kl_mean_ablation")
        return ablated["mean"] if ablated else None

    floors = [floor for floor in rows if floor["name"] == beat and key in floor["metrics"]]
    if not floors:
        return None
    here = log_density(row, key)
    nearest = min(floors, key=lambda floor: abs(log_density(floor, key) - here))
    return nearest["metrics"][key]["mean"]


def log_density(row, key):
    """How dense is a row? A floor is fair where it is as dense.

    For columns of the table `faithful` the log of L0, for all others the log of the share of the
    alive units that are on at a token."""
    l0 = mean_or_tiny(row, "l0")
    if COLUMNS[key].table == "faithful":
        return math.log(l0)
    return math.log(l0 / mean_or_tiny(row, "alive_units"))


def mean_or_tiny(row, key):
    return max(row["metrics"].get(key, {}).get("mean", 0), 1e-9)


def beaten(row, key):
    """Is a number better than its null by more than its interval? True where nothing is to beat."""
    metric = row["metrics"][key]
    better = COLUMNS[key].better
    if row["floor"] or not better or metric.get("null") is None:
        return True
    gain = metric["mean"] - metric["null"]
    if better == "down":
        gain = -gain
    return gain > (metric["half"] or 0)


# --------------------------------------------------------------------------- from rows to the page
def shorten(value, key):
    """Write a number as its column has it; large ones with k or M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.{COLUMNS[key].digits}f}"


def cell(row, key):
    """Write a row's number with its interval. * if not all seeds have it, ° if its null may be as
    good."""
    metric = row["metrics"].get(key)
    if not metric:
        return "FAILED" if row["failed"] else "n/a"
    written = shorten(metric["mean"], key)
    if metric["half"]:
        written += f"±{shorten(metric['half'], key)}".replace("±0.", "±.")
    if 0 < len(metric["values"]) < len(row["seeds"]):       # none: from all seeds at once
        written += "*"
    if not beaten(row, key):
        written += "°"
    return written


def null_cell(rows, key):
    """Write the nulls of a column: the least and the largest that rows have, but controls' (with a
    colon in their names) are left out."""
    metrics = [row["metrics"].get(key) for row in rows if ":" not in row["name"]]
    nulls = sorted(metric["null"] for metric in metrics if metric and metric["null"] is not None)
    ends = [shorten(value, key) for value in nulls[:1] + nulls[-1:]]
    return "-".join(dict.fromkeys(ends))                    # one if they are written alike


def heads_of(keys):
    return [f"{COLUMNS[key].head} {ARROWS[COLUMNS[key].better]}".strip() for key in keys]


def tables(results):
    """[(heading, heads of columns, lines of cells)] of all that is shown: the middle sparsities
    under each heading that has a number, then how far the methods are from BASE.

    The first cell of a line is the row's name; the last line of a heading holds the nulls."""
    rows = [row for row in results["rows"] if row["middle"]]
    filled = set().union(*(row["metrics"] for row in rows))
    shown = []
    for heading in TABLES:
        keys = [key for key in keys_under(heading) if key in filled]
        lines = []
        for row in rows:
            if row["failed"] or not row["metrics"].keys().isdisjoint(keys):
                lines.append([row["name"], *(cell(row, key) for key in keys)])
        if keys:
            lines.append(["null", *(null_cell(rows, key) for key in keys)])
            shown.append((heading, heads_of(keys), lines))
    return shown + difference_tables(results["differences"])


def difference_tables(differences):
    """How much more than BASE does each method have? One table for each of HEADLINES, in the form
    that `tables` returns; ° where a difference may be noise."""
    cells = {}
    for difference in differences:
        key = difference["metric"]
        sign = "+" if difference["by"] > 0 else ""
        mark = "°" if difference["p"] > 0.05 else ""
        cells[difference["name"], key] = f"{sign}{shorten(difference['by'], key)}{mark}"
    if not cells:
        return []

    shown = []
    for keys in HEADLINES:
        lines = []
        for name in dict.fromkeys(name for name, _ in cells):
            lines.append([name, *(cells.get((name, key), "n/a") for key in keys)])
        shown.append((f"minus {BASE}", heads_of(keys), lines))
    return shown


def markdown_table(heads, lines):
    """Write cells as the lines of a Markdown table."""
    written = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
    return [written[0], "|---" * len(heads) + "|", *written[1:]]


def text_line(cells):
    return f"{cells[0]:<22}" + "".join(f" {cell:>11}" for cell in cells[1:])


def render(results, markdown=False):
    """Write what is to be known before reading, and all tables: as text of 120 columns, or as
    Markdown."""
    page = preface(results)
    for heading, heads, lines in tables(results):
        page.append("")
        if markdown:
            page += markdown_table([heading, *heads], lines)
        else:
            page += map(text_line, [[heading, *heads], *lines])
    return "\n".join([*page, ""])


def preface(results):
    """What a reader has to know before the tables, as lines."""
    config = results["provenance"]["config"]
    nats = {key: "n/a" if value is None else f"{value:.4f}"
            for key, value in results["target"].items()}
    floors = dict.fromkeys(row["name"] for row in results["rows"] if row["floor"])
    lines = [
        f"MLP of layer {results['provenance']['layer']}: cross-entropy {nats['ce_original']} nats, "
        f"mean-ablated {nats['ce_mean_ablation']}, zero-ablated {nats['ce_zero_ablation']}.",
        f"Middle sparsity, on {config['eval_tokens']:,} tokens; mean ± half of the 95 % interval "
        f"over {config['seeds']} seed(s), or over stories; * not of all seeds.",
        "↑ higher is better, ↓ lower; null: what has to be beaten, and ° is not by more than its "
        "interval.",
        "`compare.py --explain` says what it all means.",
        f"Floors: {', '.join(floors)}.",
        "Rows differ in L0, and most numbers move with it: see also those at one L0 and the curves "
        "(curves.png)."]
    if results["differences"]:
        lines.append(f"Minus {BASE}: ° where that may be noise, p > 0.05 (Welch's t over seeds; "
                     "Holm over both tables).")
    if config["quick"]:
        lines.append("A quick run: all are under-trained, SPD most. It shows what is measured, not "
                     "how they compare.")
    return lines


INTRODUCTION = """
Each row is one way to take an MLP apart into units, trained with several seeds. Its numbers are
those of its middle sparsity: the mean over seeds ± half of the 95 % interval; the interval of a
single seed is over stories, where it is known. A unit is on at a token where its value is above 0,
and alive when it is on at 10 tokens or more. Whatever is chosen is chosen on some stories, and
every number is from other stories. A concept is something that the generator of the stories knows
to be true at a token; a parent concept has other concepts below it (animal > cow).
↑ higher is better, ↓ lower is better, no arrow: neither. Null: what chance or nothing gives; to
beat: the floor that has to be beaten. The last two tables hold differences: what a row has more
than spd, with ° where that may be noise, p > 0.05, of Welch's t over seeds, after Holm's correction
for having asked about all of them.
"""


def describe(rows):
    """Say what each row and each column means: the text of compare.py --explain.

    rows: {name of a row: what it is}."""
    lines = [INTRODUCTION.strip(), "", "rows"]
    lines += [f"  {name:<23}{text}" for name, text in rows.items()]
    for heading in TABLES:
        lines += ["", heading]
        for key in keys_under(heading):
            head, = heads_of([key])
            line = f"  {head:<13}{COLUMNS[key].text}{describe_null(COLUMNS[key].beat)}"
            lines += textwrap.wrap(line, 118, subsequent_indent=" " * 15)
    return "\n".join(lines)


def describe_null(beat):
    if beat is None:
        return ""
    return f"; to beat: {beat}" if isinstance(beat, str) else f"; null: {beat}"


# ---------------------------------------------------------------------------------------- the files
def files(results):
    """The files that hold the results, {name: text}."""
    return {"results.json": json.dumps(results, indent=1),
            "table.md": render(results, markdown=True),
            "table.csv": write_csv(results)}


def write_csv(results):
    """All numbers of all rows as CSV, one number a line; a line of its own for what failed."""
    text = io.StringIO(newline="")
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow(["name", "knob", "value", "seeds", "metric", "better", "mean", "half_interval",
                    "null", "status"])
    for row in results["rows"]:
        # a row without a seed of its own was asked of all seeds at once
        n_seeds = len(row["seeds"]) or results["provenance"]["config"]["seeds"]
        first = [row["name"], row["knob"], row["value"], n_seeds]
        for key, metric in row["metrics"].items():
            better = COLUMNS[key].better if key in COLUMNS else ""
            sheet.writerow([*first, key, better, metric["mean"], metric["half"],
                            metric.get("null"), "ok"])
        if row["failed"]:
            sheet.writerow([*first, "", "", "", "", "", "FAILED"])
    return text.getvalue()


def write(results, out):
    """Write results.json, table.md, table.csv and the pictures into the folder `out`."""
    for name, text in files(results).items():
        common.write(Path(out) / name, text.encode())
    pictures.draw(results, out)


MARKERS = ("<!-- results: compare.py --readme -->", "<!-- end of results -->")


def embed(markdown, path):
    """Put a Markdown text between the markers of a README, in place of what stands there."""
    first, last = MARKERS
    old = Path(path).read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(first)}.*{re.escape(last)}", re.DOTALL)
    if not between.search(old):
        common.fail(f"{path}: has no markers {' .. '.join(MARKERS)}")
    block = f"{first}\n{markdown}{last}"
    text = between.sub(lambda _: block, old)            # a function, so that \1 in it stays \1
    common.write(path, text.encode())
