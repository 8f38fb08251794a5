"""What did studies/map.py find? As tables, cases to be read, and the map as a picture.

Each pair of rows is measured once and shown twice, as either of the two sees it. Every number is
mean +- half of the 95 % t interval over seeds, with its null in brackets.

A, B: two rows; F, G units of theirs
"""
import re
from typing import NamedTuple

import torch

from metrics import mapping
from report import noise
from report.table import markdown_table, mean_text, rounded

DRAWN = 0.3                     # least r that the picture shows

# ------------------------------------------------------------------------------ heads and texts
MAP = {                             # key: (head, digits)
    "units": ("units", 0),
    "degree": ("degree", 2),
    "orphan": ("orphan", 2),
    "one_to_one": ("1:1", 2),
    "one_to_many": ("1:n", 2),
    "many_to_one": ("n:1", 2),
    "many_to_many": ("n:m", 2),
    "best": ("best r", 2),
    "explained": ("explained", 2),
    "r2_1": ("R²₁", 2),
    "r2_5": ("R²₅", 2),
    "r2_all": ("R² of all", 2),
    "back_r2_5": ("R²₅ back", 2),
    "subsumed": ("is a part", 2),
    "superset": ("has parts", 2),
}
PARTS = {
    "groups": ("groups", 0),
    "members": ("members", 0),
    "z_write": ("z write", 1),
    "z_read": ("z read", 1),
    "z_f1": ("z concept", 1),
    "z_entropy": ("z shared concept", 1),
    "coherent": ("coherent", 2),
    "whole_f1": ("F1 of whole", 2),
    "part_f1": ("F1 of parts", 2),
    "gain": ("whole - parts", 2),
}
EVIDENCE = {
    "pairs": ("pairs", 0),
    "r": ("r", 2),
    "write": ("write", 2),
    "read": ("read", 2),
    "effect": ("effect", 2),
    "against_write": ("write < 0", 2),
    "against_read": ("read < 0", 2),
    "against_effect": ("effect < 0", 2),
    "against": ("any < 0", 2),
    "next_r": ("second r", 2),
    "next_write": ("second write", 2),
    "next_read": ("second read", 2),
    "next_effect": ("second effect", 2),
}
NEURONS = {
    "units": ("units", 0),
    "write": ("write", 2),
    "write_0.7": ("write 0.7", 2),
    "write_0.9": ("write 0.9", 2),
    "both_0.7": ("both 0.7", 2),
    "both_0.9": ("both 0.9", 2),
    "found_0.9": ("neurons found", 2),
}
CLUSTERS = {
    "units": ("components", 0),
    "clusters": ("clusters", 0),
    "together": ("together", 2),
    "across": ("across", 2),
    "saved": ("bits saved", 3),
}
QUESTIONS = {
    "z_write": ("do they write more alike?", 1),
    "z_read": ("read more alike?", 1),
    "z_f1": ("mean one concept more?", 1),
    "gain": ("has the whole a better one?", 2),
}
HELD_AGAINST = "neurons"        # wholes without any training
KINDS = {                           # of clearest cases: their heading
    "one_to_one": "One to one: {one} and {other}",
    "one_to_many": "One to many: one unit of {one}, several of {other}",
    "many_to_one": "Many to one: several units of {one}, one of {other}",
    "orphan_a": "Orphans: units of {one} without a partner in {other}",
    "orphan_b": "Orphans: units of {other} without a partner in {one}",
}
ABOUT = """\
# What does one method's unit look like in the other methods' terms?
`{command}` wrote this.

Means over the seeds that have a number ± half of their 95 % t interval; in brackets the null, a
mean over seeds too. The rows are compare.py's, at the middle of their sparsities, on {tokens:,}
tokens of training (spd-long: three times as many): they differ in L0, and sizes.md says how far
from settled such models are."""
ABOUT_MAPS = """\
r: Pearson's correlation of what two units say, over tokens. Two units are linked where r, or |r|
where one has a sign, is 0.4 or more and one tells more of when the other is on than 99.9 % of
chance pairs. degree: partners of a unit. orphan: share of the units without one. 1:1 to n:m: share
of the units in such a component of the graph, own side first; best r: with the most alike unit.
explained: share of what there is to know about when units are on that the other row's best unit
tells. R²₁, R²₅, R² of all: of a unit rebuilt from one, from five, from all units of the other row;
back: the other row's, rebuilt from these. is a part: share of the units of which 90 % of the tokens
are one unit's of the other row, fewer than half of whose tokens are this one's, and which is on
three times as often there as anywhere; has parts: the other way round.
Null: the other row's units moved to the wrong text: it says what chance links, not what the weights
alone do. That the floors say, last: neurons, and random directions. Ceiling: another seed; read
each line beside both. The more units a row has, the better the best of them fits. Where there are
several seeds, two rows are compared at unlike ones: transcoders of one seed start alike.
The three pairs of seeds of a ceiling share seeds: its intervals are too narrow."""
ABOUT_PARTS = """\
Groups of two parts or more of one whole; two rows without any are left out. seeds: that have
groups. members: units that are parts of a whole, each counted once, though groups may share it.
z: how far the parts are more alike than random units that are on as often, in standard deviations,
mean over groups: in what they write and read (components of two matrices count as 0), in the
concept that says best where one of them is on, and in sharing their best concepts, which comes with
lying in one whole. coherent: share of the parts (of each group anew) in groups with z > 2 in
writing and in the concept, in the concept alone where what they write is n/a. Null: of random
groups. F1: of the concept that is best for the whole, and of those that are best for its parts. A
whole is on more often, and that alone makes its F1 higher: hold it against other wholes, not
against 0."""
ABOUT_ANSWERS = """\
Parts of one whole share tokens, whatever the whole is. So each number is held against that of the
same row's parts in neurons, as a / b: more, less: surely (Welch's test over seeds, Holm's
correction over this table, p < 0.05); not shown: p above that; without a word: some seed has no
groups. Another seed's lines are of pairs of seeds that share seeds: their p is too low."""
ABOUT_EVIDENCE = """\
Partners are each other's best and linked, on fit; of all such pairs, pairs are drawn. read, write:
cosines. effect: correlation of the changes of logits when the one or the other is switched off.
Null: another unit that is on about as often in the partner's place, so mostly elsewhere. second:
the unit of the other row that is most like the first after its partner, often linked with it too:
what the partner has beyond that is more than to be on together. < 0: share of the pairs with that
evidence in which it contradicts the activations; any: by what they have. Weights of clusters, of
two matrices and of what reads different things are n/a. Of a cross-layer feature, what it writes at
this one MLP is switched off."""
ABOUT_NEURONS = """\
Each unit beside the neuron that writes most alike. write: mean cosine; write 0.7, 0.9: share of the
units in which it is so high, both 0.7, 0.9: and that of what they read as well; neurons found:
share of the neurons that some unit writes like at 0.9. Null: with what units write drawn anew,
alike in mean and covariance. Units that do not read what neurons do are left out of both, n/a if
none is left."""
ABOUT_CLUSTERS = """\
Clusters as a minimum-description-length merge finds them. together: share of the components that
are in one with others; across: share of these clusters that have components of both matrices; bits
saved: share of what it takes to say where all are on. Null: components moved to the wrong text."""
ABOUT_CASES = """\
Seeds {seed} and {other_seed}, the clearest on fit first. r: of the weakest link; of an orphan the
largest that it has. Each unit: at which share of the tokens it is on, its rule in words and its
best true concept with their F1, and where it says most, the token in [[ ]]."""


# ------------------------------------------------------------------------- as each side sees it
FLIPPED = {"one_to_many": "many_to_one", "many_to_one": "one_to_many",
           "subsumed": "superset", "superset": "subsumed"}


def seen_from(row, side):
    """The numbers of one pair as its side a or b sees them: KEY and null_KEY are its own units',
    back_KEY the other side's, whatever has no side stays."""
    seen = {}
    for key, value in row.items():
        # null_orphan_a_0.3: null_, orphan, a, _0.3
        split = re.fullmatch(r"(null_)?(\w+?)_([ab])(_[\d.]+)?", key)
        if not split:
            seen[key] = value
            continue
        null, name, of, threshold = split.groups(default="")
        if side == "b":
            name = FLIPPED.get(name, name)
        back = "" if of == side else "back_"
        seen[f"{null}{back}{name}{threshold}"] = value
    return seen


def views(rows, one, other):
    """The rows of all seeds of two methods, as the first sees them."""
    seen = [seen_from(row, "a") for row in rows if (row["one"], row["other"]) == (one, other)]
    if one != other:
        seen += [seen_from(row, "b") for row in rows if (row["one"], row["other"]) == (other, one)]
    return seen


def over_seeds(rows, key):
    return noise.over_seeds([row.get(key) for row in rows])


def number(rows, key, digits=2):
    """The mean of a number over seeds, and half of its 95 % interval."""
    return mean_text([row.get(key) for row in rows], digits)


def cell(rows, key, digits=2):
    """A number beside its null, if it has one."""
    text = number(rows, key, digits)
    null = over_seeds(rows, f"null_{key}")
    return text if null is None else f"{text} ({rounded(null['mean'], digits)})"


def orphans_around(rows):
    """The share of orphans at other thresholds, means over seeds."""
    means = [over_seeds(rows, f"orphan_{least}")["mean"] for least in mapping.AROUND]
    return " / ".join(f"{value:.2f}" for value in means)


def table(first, columns, rows_by_name, *more):
    """A table of numbers as lines of Markdown: a line for each name with rows. more: a head, and
    what its cells say of the rows."""
    heads = [first, *(head for head, _ in columns.values()), *(head for head, _ in more)]
    lines = []
    for name, rows in rows_by_name.items():
        if rows:
            cells = [cell(rows, key, digits) for key, (_, digits) in columns.items()]
            lines.append([name, *cells, *(say(rows) for _, say in more)])
    return [*markdown_table(heads, lines), ""]


class Names(NamedTuple):
    """The rows that something is known of, in the order of the tables."""
    all: list
    floors: tuple
    components: tuple               # rows of parameter components, or of clusters of them

    def label(self, one, other):
        """What is B called where A is in its terms?"""
        if one == other:
            return "another seed of it"
        return f"floor: {other}" if other in self.floors else other


def partners(found, names):
    """The units of each row in the terms of all rows, a table a row."""
    around = "orphan at r " + " / ".join(map(str, mapping.AROUND))
    lines = ["## Whose units have which partners", "", ABOUT_MAPS, ""]
    for one in names.all:
        seen = {names.label(one, other): views(found["maps"], one, other) for other in names.all}
        lines += table(f"{one}, in the terms of", MAP, seen, (around, orphans_around))
    return lines


def parts(found, names):
    """Which units are parts of one unit of another row, and whether they belong together."""
    by_name = {}
    for whole in names.all:
        for part in names.all:
            rows = views(found["groups"], part, whole)
            if any(row["groups"] for row in rows):
                by_name[f"{part} in {names.label(part, whole)}"] = rows
    return ["## Units that are parts of one unit", "", ABOUT_PARTS, "",
            *table("parts in wholes", PARTS, by_name, ("seeds", seeds_with_groups))]


def seeds_with_groups(rows):
    return str(sum(row["groups"] > 0 for row in rows))


def answer(pair, p, digits):
    """Say how two numbers compare, {mean, half, ..} each or None; p: of their difference, or
    None."""
    text = " / ".join(rounded(one["mean"], digits) if one else "n/a" for one in pair)
    if p is None:
        return text
    one, other = pair
    surely = "more" if one["mean"] > other["mean"] else "less"
    return f"{'not shown' if p > noise.SURE else surely}: {text}"


def answers(found, names):
    """Does a component that has several parts stand for a less split, more coherent concept, more
    than a neuron that has several does?"""
    asked = {}
    for whole in names.components:
        for part in names.all:
            of_whole = views(found["groups"], part, whole)
            of_floor = views(found["groups"], part, HELD_AGAINST)
            if any(row["groups"] for row in of_whole) and of_floor:
                label = f"{part} in {names.label(part, whole)}"
                for key in QUESTIONS:
                    asked[label, key] = over_seeds(of_whole, key), over_seeds(of_floor, key)
    if not asked:
        return []

    # what all seeds answer
    ps = noise.surprise(asked, len({row["seed"] for row in found["groups"]}))
    lines = []
    for label in dict.fromkeys(label for label, _ in asked):
        cells = [answer(asked[label, key], ps.get((label, key)), digits)
                 for key, (_, digits) in QUESTIONS.items()]
        lines.append([label, *cells])
    heads = ["parts in wholes", *(head for head, _ in QUESTIONS.values())]
    return ["## Is a component with several parts a less split, more coherent concept?", "",
            ABOUT_ANSWERS, "", *markdown_table(heads, lines), ""]


def evidence(found, names):
    """Activation, weight and effect side by side."""
    by_name = {}
    for one in names.all:
        for other in names.all:
            rows = [row for row in found["evidence"] if (row["one"], row["other"]) == (one, other)]
            by_name[f"{one} and {names.label(one, other)}"] = rows
    return ["## Do partners by activation read, write and act alike?", "", ABOUT_EVIDENCE, "",
            *table("partners", EVIDENCE, by_name)]


def neurons(found, names):
    """How far a row finds the neurons again."""
    by_name = of_single(found["neurons"], names)
    return ["## Units that are neurons", "", ABOUT_NEURONS, "",
            *table("units of", NEURONS, by_name)]


def clusters(found, names):
    """How far components hang together."""
    by_name = of_single(found["clusters"], names)
    if not by_name:
        return []
    return ["## Components that are on together", "", ABOUT_CLUSTERS, "",
            *table("clusters", CLUSTERS, by_name)]


def of_single(rows, names):
    """What is said of a row alone: {name: its rows of all seeds}."""
    by_name = {}
    for name in names.all:
        of_name = [row for row in rows if row["one"] == name]
        if of_name:
            by_name[name] = of_name
    return by_name


def unit_line(row, unit):
    """One unit as a line of a list."""
    concept = ""
    if "concept" in unit:
        concept = f"; concept **{unit['concept']}**, F1 {unit['concept_f1']:.2f}"
    said = f"{unit['rule']} (F1 {unit['rule_f1']:.2f}){concept}"
    return (f"    - {row} `{unit['label']}`, on at {unit['on']:.2%}: {said}  \n"
            f"      {unit['example']}")


def cases(found):
    """The clearest cases of each kind, to be read."""
    lines = []
    for row in found["cases"]:
        lines += [f"## The clearest cases, {row['one']} and {row['other']}", "",
                  ABOUT_CASES.format(**row), ""]
        for kind, heading in KINDS.items():
            some = row["kinds"][kind]
            lines += ["### " + heading.format(**row), "", *([] if some else ["None.", ""])]
            for i, case in enumerate(some, 1):
                lines.append(f"{i}. r {case['r']:.2f}")
                for side in ("one", "other"):
                    lines += [unit_line(row[side], unit) for unit in case[side]]
                    more = case[f"n_{side}"] - len(case[side])
                    if more:
                        lines.append(f"    - and {more} more of {row[side]}")
            lines.append("")
    return lines


def render(found, names):
    """All that was found, as Markdown."""
    provenance = found["provenance"]
    about = ABOUT.format(command=provenance["command"], tokens=provenance["config"]["tokens"])
    lines = [about, "", *partners(found, names), *answers(found, names), *parts(found, names),
             *evidence(found, names), *neurons(found, names), *clusters(found, names),
             *cases(found)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the picture
class Panel(NamedTuple):
    """One map that is drawn: two rows, what their units have in common, and which are linked."""
    one: str
    other: str
    r_FG: torch.Tensor
    is_edge_FG: torch.Tensor


def in_order(panel):
    """In which order should units stand, so that what hangs together stands together? Numbers of
    A's units and of B's: small components first, B's units by their best partner in A; orphans
    last."""
    # A's units: orphans, then the size of the component, the component, fewer partners
    found = mapping.components(panel.is_edge_FG)
    degree_F = panel.is_edge_FG.sum(1)
    order_F = sort_by(degree_F == 0, found.a_F + found.b_F, found.name_F, -degree_F)

    # B's units: orphans, then the place of the partner that is most like them
    place_F = order_F.argsort()
    is_orphan_G = ~panel.is_edge_FG.any(0)
    may_be_best_FG = panel.is_edge_FG | is_orphan_G
    best_G = panel.r_FG.masked_fill(~may_be_best_FG, -1).argmax(0)
    return order_F, sort_by(is_orphan_G, place_F[best_G])


def sort_by(*keys):
    """In which order do things stand that are sorted by the first key, ties by the second, ..?"""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].int().argsort(stable=True)]
    return order


def picture(drawn):
    """Each map as an ordered heat map of r, with the degrees of all units beside it."""
    from matplotlib.figure import Figure
    figure = Figure((7.5 * len(drawn), 7.5), layout="constrained")
    columns = figure.subfigures(1, len(drawn), squeeze=False)[0]
    for subfigure, panel in zip(columns, drawn):
        draw_map(subfigure, panel)
    return figure


def draw_map(figure, panel):
    """One map with its marginals."""
    axes = figure.subplots(2, 2, sharex="col", sharey="row", width_ratios=(6, 1),
                           height_ratios=(1, 6))
    (top, corner), (ax, right) = axes
    corner.set_axis_off()
    order_F, order_G = in_order(panel)
    r_FG = panel.r_FG[order_F][:, order_G].cpu()
    is_edge_FG = panel.is_edge_FG[order_F][:, order_G].cpu()

    # A unit is less than a pixel wide: squares that can be seen, the largest r on top.
    i, j = (r_FG >= DRAWN).nonzero(as_tuple=True)
    top_last = r_FG[i, j].argsort()
    i = i[top_last]
    j = j[top_last]
    size = max(2., 200 / max(r_FG.shape))
    points = ax.scatter(j, i, c=r_FG[i, j], s=size**2, marker="s", lw=0, cmap="viridis_r",
                        vmin=DRAWN, vmax=1)
    figure.colorbar(points, ax=axes, label=f"r, from {DRAWN} on", shrink=0.6)
    n_linked = [int(is_edge_FG.any(1).sum()), int(is_edge_FG.any(0).sum())]
    ax.axhline(n_linked[0] - 0.5, color="0.5", lw=0.8, ls=":")
    ax.axvline(n_linked[1] - 0.5, color="0.5", lw=0.8, ls=":")
    top.fill_between(range(len(order_G)), is_edge_FG.sum(0), step="mid", color="0.4")
    right.fill_betweenx(range(len(order_F)), is_edge_FG.sum(1), step="mid", color="0.4")
    top.set(ylabel="partners", title=f"{panel.one} and {panel.other}")
    right.set(xlabel="partners")
    ax.set(xlabel=f"units of {panel.other}, those without a partner right of the line",
           ylabel=f"units of {panel.one}, those without below it",
           xlim=(-0.5, len(order_G) - 0.5), ylim=(len(order_F) - 0.5, -0.5))
