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
from metrics import attribution, groups, mapping, sizes
from metrics.columns import Column
from report import noise, pictures

# ------------------------------------------------------------------------------------ the columns
AT = 16                             # an L0 that all rows of the full table reach
AT_L0 = f"at L0 {AT}"
READ_OFF = ("ce_recovered", "kl_recovered", "fve", "active_params", "index_bits")   # each KEY_at
TABLES = ("faithful", AT_L0, "sparse", "concepts", "probes", "atoms", "words", "by LLM", "effects",
          "stability", "studies", "masks")      # the headings of columns, in the order of the page

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
STUDIES = ("sizes", "map", "across")    # each of them has columns of its own in its NAME.json
OF_STUDIES = sizes.COLUMNS | mapping.COLUMNS | attribution.COLUMNS
COLUMNS = groups.COLUMNS | OWN | OF_STUDIES

BASE = "spd"                # the row that all methods are held against, in one number of each kind:
HEADLINES = (("ce_recovered_at", "error_pathology", "completeness", "coverage", "probe_auroc_1"),
             ("rule_det_hard", "ablation", "steering", "units_atomic", "activations_shared_0.7"))
ARROWS = {"up": "↑", "down": "↓", "": ""}               # which way is better
DRAWN = ("attack", "alive_curve", "spectrum")           # curves of each seed, for the pictures
OF_TARGET = ("ce_original", "ce_mean_ablation", "ce_zero_ablation", "kl_mean_ablation")


def keys_under(heading):
    return [key for key, column in COLUMNS.items() if column.table == heading]


# ------------------------------------------------------------------------------ from jobs to rows
def of_studies(out, target):
    """What do the studies whose results are in a folder say of each row? {row: {key: metric}}.

    target: its hash; studies of another one are passed over."""
    rows = {}
    for study in STUDIES:
        found = common.read_json(Path(out) / f"{study}.json", {})
        if found.get("provenance", {}).get("target") == target:
            for name, metrics in found.get("columns", {}).items():
                rows.setdefault(name, {}).update(metrics)
    return rows


def assemble(outcomes, provenance, studied=None):
    """Collect what the jobs found into what results.json holds.

    outcomes: [(job, its numbers, error text or None)]. A job is a method at one sparsity and one
    seed, or at all seeds at once (seed None); a row is a method at one sparsity. studied: what
    `of_studies` says of rows at their middle sparsity."""
    n_seeds = provenance["config"]["seeds"]
    rows = collect_rows(outcomes, n_seeds)
    for row in rows:
        if row["middle"]:
            row["metrics"] |= (studied or {}).get(row["name"], {})
    for row in rows:
        for key in COLUMNS:
            if key in row["metrics"]:
                found = null(row, rows, key) or dict(mean=None, half=None)
                row["metrics"][key] |= dict(null=found["mean"], null_half=found["half"])

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
               own_target=first.has_own_target, middle=first.middle, seeds=[], failed=[])

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
    that ran on it; rows that take apart another one are passed over."""
    for job, numbers, _ in outcomes:
        if "ce_original" in numbers and not job.has_own_target:
            return {key: numbers.get(key) for key in OF_TARGET}
    return dict.fromkeys(OF_TARGET)


# --------------------------------------------------------------------------------------- the nulls
def null(row, rows, key):
    """What does one number of a row have to be held against? {mean, half}, or None for nothing.

    The first that there is: the null measured beside it (null_KEY); what its column says has to be
    beaten: a constant, the target's mean ablation, or a floor at its nearest sparsity, which only
    rows of one target have."""
    measured = row["metrics"].get(f"null_{key}")
    if measured:
        return measured
    beat = COLUMNS[key].beat
    if not isinstance(beat, str):
        return None if beat is None else dict(mean=beat, half=None)
    if beat == "mean ablation":
        return row["metrics"].get("kl_mean_ablation")

    floors = [floor for floor in rows if floor["name"] == beat and key in floor["metrics"]]
    if not floors or row["own_target"]:
        return None
    here = log_density(row, key)
    nearest = min(floors, key=lambda floor: abs(log_density(floor, key) - here))
    return nearest["metrics"][key]


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
    """Is a number better than its null by more than the intervals of both, which are taken for
    independent? True where nothing is to beat."""
    metric = row["metrics"][key]
    better = COLUMNS[key].better
    if row["floor"] or not better or metric.get("null") is None:
        return True
    gain = metric["mean"] - metric["null"]
    if better == "down":
        gain = -gain
    return gain > math.hypot(metric["half"] or 0, metric.get("null_half") or 0)


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
        mark = "°" if difference["p"] > noise.SURE else ""
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


def rounded(value, digits):
    """A number as text, 0 without a sign."""
    return f"{round(value, digits) + 0.:.{digits}f}"


def mean_text(values, digits):
    """Write the mean of a number over seeds, ± half of its 95 % interval where there are several;
    n/a if no seed has it."""
    metric = noise.over_seeds(values)
    if metric is None:
        return "n/a"
    mean = rounded(metric["mean"], digits)
    half = metric["half"]
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


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
    is_tinytales = config.get("data", "tinytales") == "tinytales"
    pieces = "stories" if is_tinytales else "rows"
    lines = [
        f"MLP of layer {results['provenance']['layer']}: cross-entropy {nats['ce_original']} nats, "
        f"mean-ablated {nats['ce_mean_ablation']}, zero-ablated {nats['ce_zero_ablation']}.",
        f"Middle sparsity, on {config['eval_tokens']:,} tokens; mean ± half of the 95 % interval "
        f"over {config['seeds']} seed(s), or over {pieces}; * not of all seeds.",
        "↑ higher is better, ↓ lower; null: what has to be beaten, and ° is not by more than the "
        "intervals of both.",
        "`compare.py --explain` says what it all means.",
        f"Floors, and other targets': {', '.join(floors) or 'none'}.",
        "Rows differ in L0, and most numbers move with it: see also those at one L0 and the curves "
        "(curves.png)."]
    if results["differences"]:
        lines.append(f"Minus {BASE}: ° where that may be noise, p > 0.05 (Welch's t over seeds; "
                     "Holm over both tables).")
    if not is_tinytales:
        lines.append("Concepts are lexical and structural: what the tokens alone determine.")
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
to be true at a token (of another text: what its tokens alone determine, lexical and structural); a
parent concept has other concepts below it (animal > cow).
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
