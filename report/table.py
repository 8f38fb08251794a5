"""What compare.py found: the meaning of each column, means and intervals over seeds, text, Markdown, CSV.

A column's null is what its number has to be held against: a constant, or the same number of a floor (baselines.py), at
the floor's sparsity that is nearest: in L0 for what is written, in the share of units on for what units mean.
"""
import csv
import io
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import common
from report import noise, pictures

class Column(NamedTuple):
    head: str
    better: str                     # "up", "down", "" neither
    null: Any                       # a number, the floor that has to be beaten, or None
    digits: int
    text: str

ROWS = {
    "spd": "parameter components of both matrices, masks rounded at 0.1: what is not on is not written",
    "transcoder": "from the MLP's input to its output, TopK",
    "transcoder-skip": "the same beside an affine map, which is always on",
    "transcoder-kl": "trained on the KL through the rest of the model, as SPD is, instead of on the output",
    "transcoder-stochastic": "with SPD's stochastic masks and penalty instead of TopK",
    "transcoder-noiseless": "its control: the same penalty, no noise in its masks",
    "transcoder-nofreq": "no noise, and of the penalty only how often each unit is on",
    "transcoder-freq": "no noise, and of the penalty only its frequency term",
    "clt": "cross-layer transcoder, BatchTopK: its features of this layer and of all before",
    "molt": "mixture of linear transforms, JumpReLU gates",
    "molt-sum": "the same, the transforms' sum tied to the weights",
    "sae": "reads the output that it explains: it can't replace the MLP", "sae-stochastic": "with SPD's masks",
    "sae:frozen": "floor: directions that it writes stay random, only what reads is trained",
    "sae:untrained": "floor: an SAE of a target with random weights",
    "neurons": "floor: the neurons that write most", "pca": "floor: principal components of the output",
    "random": "floor: random directions", "svd": "floor: singular vectors of both matrices, those that write most"}

AT = 16                             # an L0 that all rows of the full table reach

COLUMNS = {
    "faithful": dict(
        ce_recovered=Column("CE rec", "up", 0, 3, "share of the cross-entropy that mean-ablating the MLP costs which "
                            "the units on win back alone; 1 is all, n/a where it costs under 0.05 nats"),
        kl_recovered=Column("KL rec", "up", 0, 3, "the same of the divergence from the original predictions"),
        kl=Column("KL", "down", "mean ablation", 4, "divergence from the original predictions, nats per token"),
        fve=Column("FVE", "up", "pca", 3, "1 - E|y - y_hat|^2 / E|y - E y|^2 of the MLP's output y"),
        completeness=Column("complete", "up", 0, 3, "1 - CE recovered by what is left out alone; read beside CE rec"),
        error_pathology=Column("err path", "down", 1, 2, "KL over the KL of random errors of the same size"),
        faith_auc=Column("faith k", "up", "random", 3, "CE recovered by the 1 to 20 units (spd, svd: of each matrix) "
                         "that matter most at each token, area over log k"),
        comp_auc=Column("all but k", "down", "random", 3, "CE recovered by all but those units, errors kept")),
    f"at L0 {AT}": dict(
        ce_recovered_at=Column(f"CE @{AT}", "up", 0, 3, f"CE rec at L0 {AT}, read off each seed's curve: linear in log "
                               "L0 between its sparsities"),
        kl_recovered_at=Column(f"KL @{AT}", "up", 0, 3, "KL rec, read likewise"),
        fve_at=Column(f"FVE @{AT}", "up", "pca", 3, "FVE, likewise"),
        active_params_at=Column(f"params @{AT}", "down", None, 0, "params, likewise"),
        index_bits_at=Column(f"bits @{AT}", "down", None, 1, "bits, likewise")),
    "sparse": dict(
        l0=Column("L0", "down", None, 1, "units on per token (SPD: of both matrices)"),
        active_params=Column("params", "down", None, 0, "parameters of the units on, per token, and of a skip"),
        index_bits=Column("bits", "down", None, 1, "log2(alive choose L0): what naming the units on costs, per token"),
        alive_units=Column("alive", "", None, 0, "units on at 10 tokens of fit or more"),
        dead_fraction=Column("dead", "down", None, 3, "share of the units that are not alive"),
        tokens=Column("tokens", "", None, 0, "that the model was trained on"),
        steps=Column("steps", "", None, 0, "of training"),
        seconds=Column("seconds", "", None, 0, "of training, on a machine that did other things too; clt: all MLPs")),
    "concepts": dict(
        coverage=Column("coverage", "up", "neurons", 3, "F1 of the best unit for each true concept, mean"),
        board=Column("board", "up", "neurons", 3, "F1 of all concepts said by units of precision 0.95"),
        concept_matched_fraction=Column("matched", "up", "random", 3, "share of the alive units that match a "
                                        "concept, F1 0.5 or more"),
        splits=Column("splits", "down", "random", 2, "units that a parent concept is split into; see parent F1"),
        parent_f1=Column("parent F1", "up", "random", 3, "F1 of the best unit for the parent concepts"),
        absorption_fraction=Column("absorb", "down", "random", 3, "share of a parent concept's effect taken over by "
                                   "other units; n/a where it means nothing: parent F1 under 0.6, spd, svd")),
    "probes": dict(
        probe_auroc_1=Column("probe 1", "up", "plain neurons", 3, "AUROC of a probe on the best unit for each concept"),
        probe_auroc_2=Column("probe 2", "up", "plain neurons", 3, "the same on two units"),
        probe_auroc_5=Column("probe 5", "up", "plain neurons", 3, "the same on five units"),
        probe_dense=Column("dense", "", None, 3, "the same on all of y: the ceiling")),
    "atoms": dict(
        units_atomic=Column("atomic", "up", "neurons", 3, "share of the alive units that one concept explains"),
        units_polysemantic=Column("either", "", None, 3, "share that 'a or b' explains better"),
        units_composite=Column("both", "", None, 3, "share that 'a and b' explains better"),
        units_unexplained=Column("neither", "down", "neurons", 3, "share whose best concept has F1 under 0.5"),
        effective_rank=Column("rank", "", None, 2, "directions that a unit writes; 1 by construction for dictionaries"),
        fragmentation=Column("pieces", "down", None, 2, "units that are on at the same tokens as one; 1 is best"),
        meta_excess=Column("meta", "down", 0, 3, "how far writes are sums of few atoms, in excess of Gaussian writes")),
    "words": dict(
        rule_det_hard=Column("det hard", "up", "random", 3, "does a rule in words tell where its unit is on from where "
                             "the units most like it are; balanced accuracy, 0.5 is chance and for rare units; no LLM"),
        rule_det=Column("detect", "up", "random", 3, "the same against any other windows"),
        rule_fuzz=Column("fuzz", "up", "random", 3, "AUROC of marked tokens that satisfy the rule"),
        rule_sim=Column("simulate", "up", "random", 3, "correlation of the rule's guess with the unit's value"),
        rule_discr=Column("discrim", "up", 0.5, 3, "how often its own rule beats that of a neighbour"),
        rule_f1=Column("token F1", "up", "random", 3, "F1 of the rule over tokens as they come"),
        rule_lookup_f1=Column("lookup F1", "", None, 3, "the same of the best table of tokens, of any size"),
        rule_scorable=Column("scorable", "up", None, 3, "share of the alive units on often enough to be explained")),
    "by LLM": dict(
        judge_det=Column("LLM det", "up", "random", 3, "balanced accuracy of an LLM that tells windows where the unit "
                         "is on from others by its own explanation; never mixed with the rules'"),
        judge_fuzz=Column("LLM fuzz", "up", "random", 3, "the same of right and wrong marks in a window"),
        judge_failures=Column("no answer", "down", None, 3, "share of its answers that could not be used")),
    "effects": dict(
        ablation=Column("ablate", "up", 0, 3, "nats that switching off the five units of 'the next token is a noun, a "
                        "verb, ..' costs there, less elsewhere, less the same of fifteen units on as often"),
        ablation_at=Column("there", "", None, 3, "nats that it costs there"),
        ablation_elsewhere=Column("elsewhere", "", None, 3, "nats that it costs elsewhere"),
        steering=Column("steer", "up", "random", 3, "harmonic mean of success, fluency and harmlessness when the best "
                        "unit's writes push towards a set of next tokens"),
        steering_means=Column("s. means", "", None, 3, "the same of the difference of means of y: what to beat"),
        steering_random=Column("s. random", "", None, 3, "the same of random directions")),
    "stability": {
        "weights_similarity_corrected": Column("weights", "up", 0, 3, "similarity in weights of units of two seeds, "
                                               "matched one to one, in excess of random units: mean of two cosines, "
                                               "spd and molt their product, which is lower"),
        "weights_shared_0.7": Column("same w", "up", None, 3, "share of the alive units with a mate in another seed "
                                     "that reads and writes the same, cosines of 0.7 or more (molt: their product)"),
        "inputs_shared_0.7": Column("same i", "up", None, 3, "as same w, but with the cosine of what two units read "
                                    "taken over the inputs: do they get the same from each token"),
        "activations_similarity_corrected": Column("values", "up", 0, 3, "similarity of their values over tokens, in "
                                                   "excess of shifted tokens"),
        "activations_shared_0.7": Column("same v", "up", None, 3, "share with a mate of correlation 0.7 or more"),
        "activations_survival": Column("in all", "up", None, 3, "share with such a mate in every other seed"),
        "function_fve": Column("output", "up", None, 3, "FVE of one seed's output by another's"),
        "function_fve_independent": Column("by chance", "", None, 3, "the same if seeds erred independently")},
    "masks": dict(
        ce_recovered_causal_importance=Column("CE soft", "up", 0, 3, "CE rec under the causal importances as masks"),
        ce_recovered_stochastic=Column("CE stoch", "up", 0, 3, "CE rec when the rest is ablated at random"),
        kl_attack=Column("KL attack", "down", None, 4, "KL when the rest is ablated by attack: 20 sign steps of 0.1, "
                         "one source for all positions of 32 rows"),
        attack_ratio=Column("x soft", "", None, 2, "the same over the KL of the causal importances; small also where "
                            "those are bad"),
        kl_joint=Column("KL joint", "", None, 4, "KL added by forcing on what is on at 8 random other tokens; 0 if "
                        "importances hold jointly, below 0 where they are bad")),
}
BASE = "spd"                        # that the others are held against, in one number of each axis:
HEADLINES = (("ce_recovered_at", "error_pathology", "completeness", "coverage", "probe_auroc_1"),
             ("rule_det_hard", "ablation", "steering", "units_atomic", "activations_shared_0.7"))
EVERY = {key: column for group in COLUMNS.values() for key, column in group.items()}
ARROWS = dict(up="↑", down="↓") | {"": ""}

def at_one_l0(points):
    """{KEY_at: number at L0 = AT} of one seed of a row, from what is known of it at each sparsity: linear in log L0 in
    between; what lies outside by more than 5 % has none."""
    points, out = sorted((p for p in points if p.get("l0")), key=lambda p: p["l0"]), {}
    if points and points[0]["l0"] / 1.05 <= AT <= points[-1]["l0"] * 1.05:
        logs = [math.log(p["l0"]) for p in points]
        for key in ("ce_recovered", "kl_recovered", "fve", "active_params", "index_bits"):
            if all(isinstance(p.get(key), (int, float)) for p in points):
                out[f"{key}_at"] = float(np.interp(math.log(AT), logs, [p[key] for p in points]))
    return out

def assemble(found, provenance):
    """What results.json holds. A row is a method at one sparsity. What one of its seeds failed to give, it has not."""
    rows, curves, S = {}, {}, provenance["config"]["seeds"]
    for job, known, failed in found:
        curves.setdefault((job.name, job.seed), []).append(known)
        row = rows.setdefault((job.name, job.value), dict(
            name=job.name, knob=job.knob, value=job.value, floor=job.floor, middle=job.middle, seeds=[], known=[],
            together={}, failed=[]))
        if job.seed is None:
            row["together"] = known
        else:
            row["seeds"].append(job.seed), row["known"].append(known)
        row["failed"] += [f"{'all seeds' if job.seed is None else f'seed {job.seed}'}: {failed}"] if failed else []
    for row in rows.values():
        known, together = row.pop("known"), row.pop("together")
        if row["middle"]:
            known = [k | at_one_l0(curves[row["name"], seed]) for k, seed in zip(known, row["seeds"])]
        whole = lambda key: not row["failed"] or all(key in k for k in known)
        keys = dict.fromkeys(key for k in known for key in k if not key.endswith("_within"))
        number = {key: noise.over_seeds([k.get(key) for k in known], known[0].get(f"{key}_within")) for key in keys}
        row["metrics"] = {key: v for key, v in number.items() if v and whole(key)} | noise.of_seeds(together, S)
        row |= {key: [k[key] for k in known if key in k] for key in ("attack", "alive_curve", "spectrum")}  # pictures
    target = next((k for job, k, _ in found if "ce_original" in k and not job.name.endswith(":untrained")), {})
    for group, columns in COLUMNS.items():          # each number gets its null
        for key, column in columns.items():
            for row in rows.values():
                if key in row["metrics"]:
                    row["metrics"][key]["null"] = null(row, rows.values(), group, key, column)
    apart = noise.differences([row for row in rows.values() if row["middle"]], BASE, sum(HEADLINES, ()), S)
    return dict(provenance=provenance, rows=list(rows.values()),
                differences=[dict(name=name, metric=key, by=by, p=p) for (name, key), (by, p) in apart.items()],
                target={k: target.get(k) for k in ("ce_original", "ce_mean_ablation", "ce_zero_ablation",
                                                   "kl_mean_ablation")},
                columns={key: column._asdict() for key, column in EVERY.items()})

def null(row, rows, group, key, column):
    """What one number has to be held against: its own null, a constant, the target's, or a floor's nearest."""
    if (own := row["metrics"].get(f"null_{key}")) or not isinstance(column.null, str):
        return own["mean"] if own else column.null
    if column.null == "mean ablation":
        return row["metrics"].get("kl_mean_ablation", dict(mean=None))["mean"]
    def size(row):
        of = lambda key: max(row["metrics"].get(key, {}).get("mean", 0), 1e-9)
        return math.log(of("l0") / (1 if group == "faithful" else of("alive_units")))
    some = [other for other in rows if other["name"] == column.null and key in other["metrics"]]
    return min(some, key=lambda other: abs(size(other) - size(row)))["metrics"][key]["mean"] if some else None

def beaten(row, key):
    """Whether a number is better than its null by more than its interval; True where there is nothing to beat."""
    found, sign = row["metrics"][key], dict(up=1, down=-1).get(EVERY[key].better)
    if row["floor"] or found.get("null") is None or not sign:
        return True
    return sign * (found["mean"] - found["null"]) > (found["half"] or 0)

def cell(row, key):
    """A number as the table shows it."""
    if not (found := row["metrics"].get(key)):
        return "FAILED" if row["failed"] else "n/a"
    half = f"±{short(found['half'], key)}".replace("±0.", "±.") if found["half"] else ""
    marks = "*" * (0 < len(found["values"]) < len(row["seeds"])) + "°" * (not beaten(row, key))
    return short(found["mean"], key) + half + marks

def short(v, key):
    return (f"{v / 1e6:.2g}M" if abs(v) >= 1e6 else f"{v / 1e3:.3g}k" if abs(v) >= 1e4 else
            f"{v:.{EVERY[key].digits}f}")

def to_beat(rows, key):
    """The null of a column as the table shows it: from the least to the largest that rows have."""
    nulls = [found["null"] for row in rows if ":" not in row["name"] and (found := row["metrics"].get(key))]
    nulls = sorted(v for v in nulls if v is not None)
    return "-".join(dict.fromkeys(short(v, key) for v in nulls[:1] + nulls[-1:]))

def tables(results):
    """[(group, heads, [cells of a row])] of the middle sparsities: groups and columns with a number in them; then what
    the methods have more than BASE."""
    rows, out = [row for row in results["rows"] if row["middle"]], []
    for group, columns in COLUMNS.items():
        some = [key for key in columns if any(key in row["metrics"] for row in rows)]
        shown = [row for row in rows if row["failed"] or any(key in row["metrics"] for key in some)]
        if some:
            cells = [[row["name"], *(cell(row, key) for key in some)] for row in shown]
            out.append((group, heads_of(some), [*cells, ["null", *(to_beat(rows, key) for key in some)]]))
    by = {(d["name"], d["metric"]): f"{'+' * (d['by'] > 0)}{short(d['by'], d['metric'])}{'°' * (d['p'] > 0.05)}"
          for d in results["differences"]}
    names = dict.fromkeys(name for name, _ in by)
    return out + [(f"minus {BASE}", heads_of(keys), [[name, *(by.get((name, key), "n/a") for key in keys)]
                                                     for name in names]) for keys in HEADLINES if by]

def markdown_line(cells):
    return "| " + " | ".join(cells) + " |"

def heads_of(keys):
    return [f"{EVERY[key].head} {ARROWS[EVERY[key].better]}".strip() for key in keys]

def render(results, markdown=False):
    """The tables as text, 120 columns wide, or as Markdown."""
    target, p = results["target"], results["provenance"]
    floors = dict.fromkeys(row["name"] for row in results["rows"] if row["floor"])
    show = lambda v: "n/a" if v is None else f"{v:.4f}"
    lines = [f"MLP of layer {p['layer']}: cross-entropy {show(target['ce_original'])} nats, mean-ablated "
             f"{show(target['ce_mean_ablation'])}, zero-ablated {show(target['ce_zero_ablation'])}.",
             f"Middle sparsity, on {p['config']['eval_tokens']:,} tokens; mean ± half of the 95 % interval over "
             f"{p['config']['seeds']} seed(s), or over stories; * not of all seeds.",
             "↑ higher is better, ↓ lower; null: what has to be beaten, and ° is not by more than its interval.",
             "`compare.py --explain` says what it all means.",
             f"Floors: {', '.join(floors)}.",
             "Rows differ in L0, and most numbers move with it: see also those at one L0 and the curves (curves.png)."]
    if results["differences"]:
        lines += [f"Minus {BASE}: ° where that may be noise, p > 0.05 (Welch's t over seeds; Holm over both tables)."]
    if p["config"]["quick"]:
        lines += ["A quick run: all are under-trained, SPD most. It shows what is measured, not how they compare."]
    for group, heads, rows in tables(results):
        if markdown:
            lines += ["", markdown_line([group, *heads]), "|---" * (1 + len(heads)) + "|",
                      *map(markdown_line, rows)]
        else:
            line = lambda first, rest: f"{first:<22}" + "".join(f" {c:>11}" for c in rest)
            lines += ["", line(group, heads), *(line(row[0], row[1:]) for row in rows)]
    return "\n".join(lines + [""])

def describe():
    lines = ["Each row is one way to take an MLP apart into units, trained with several seeds and asked at its middle",
             "sparsity: mean ± half of the 95 % interval over seeds or, of one seed, over stories where it is known. A",
             "unit is on at a token where what it says is above 0, alive when on at 10 tokens or more. What is chosen",
             "is chosen on some stories, every number is from others. A concept is something that the generator of the",
             "stories knows to be true at a token; a parent concept has others below it (animal > cow). ↑ higher is",
             "better, ↓ lower is better, no arrow: neither. Null: what chance or nothing gives; to beat: the floor",
             "whose number it is. Last come differences, what a row has more than spd, with ° where that may be noise:",
             "p > 0.05, of Welch's t over seeds, after Holm's correction for having asked all of them.",
             "", "rows", *(f"  {name:<23}{text}" for name, text in ROWS.items())]
    for group, columns in COLUMNS.items():
        lines += ["", group]
        for c in columns.values():
            null = "" if c.null is None else f"; to beat: {c.null}" if isinstance(c.null, str) else f"; null: {c.null}"
            line = f"  {c.head + ' ' + ARROWS[c.better]:<13}{c.text}{null}"
            lines += textwrap.wrap(line, 118, subsequent_indent=" " * 15)
    return "\n".join(lines)

def files(results):
    """{name: text} of the files that hold them."""
    sheet = io.StringIO(newline="")
    lines = csv.writer(sheet, lineterminator="\n")
    lines.writerow(["name", "knob", "value", "seeds", "metric", "better", "mean", "half_interval", "null", "status"])
    for row in results["rows"]:
        head = [row["name"], row["knob"], row["value"], len(row["seeds"]) or results["provenance"]["config"]["seeds"]]
        for key, found in row["metrics"].items():
            better = EVERY[key].better if key in EVERY else ""
            lines.writerow([*head, key, better, found["mean"], found["half"], found.get("null"), "ok"])
        if row["failed"]:
            lines.writerow([*head, "", "", "", "", "", "FAILED"])
    return {"results.json": json.dumps(results, indent=1), "table.md": render(results, markdown=True),
            "table.csv": sheet.getvalue()}

def write(results, out):
    for name, text in files(results).items():
        common.write(Path(out) / name, text.encode())
    pictures.draw(results, out)

MARKERS = "<!-- results: compare.py --readme -->", "<!-- end of results -->"

def embed(markdown, path):
    """Puts a Markdown text between the markers of a README."""
    first, last = map(re.escape, MARKERS)
    old = Path(path).read_text(encoding="utf-8")
    if not re.search(f"{first}.*{last}", old, re.S):
        common.fail(f"{path}: has no markers {' .. '.join(MARKERS)}")
    text = re.sub(f"{first}.*{last}", lambda _: f"{MARKERS[0]}\n{markdown}{MARKERS[1]}", old, flags=re.S)
    common.write(path, text.encode())
