"""Are the components that an MLP was trained as those that a decomposition finds in it afterwards?

scratch.py trains an MLP that is made of components from its first step, its native components, and
writes the model that they add up to. Here spd.py takes that model apart as if nothing were known
about it, from several seeds, none of them the native one's: with one seed both would start at the
same random components. Native and post-hoc components are two decompositions of the same weights,
and all that is asked of one is asked of the other:

    each alone          what compare.py's tables show of it, and SPD's own loss at the end of its
                        schedules (studies/length.py). Native components were trained on
                        cross-entropy under masks, so it is the stochastic and the adversarial
                        masks that compare
    in pairs            what is shared by native and post-hoc components (metrics/stability.py), and
                        how well units of the one are rebuilt from those of the other
                        (metrics/mapping.py), beside the same of two post-hoc seeds: the ceiling

If native components are lower in SPD's loss than post-hoc ones, then these have not found the best
parts there are. If two post-hoc seeds share more with each other than with the native components,
then what they find is not what the MLP was made of.

Found (results/native.md): post-hoc components are lower in SPD's loss, .026, than the native ones,
.038, and share no more with each other (.24 in values) than with these (.22). So SPD does not find
what an MLP was made of; nor is that what its loss likes best.

    python -m studies.native    # 80 minutes on one core; goes on after a kill
    python -m studies.native --steps 100 --seeds 2 --out results-quick      # a look
"""
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import compare
import data
import scratch
import spd
from metrics import groups, mapping, recording
from model import GPT
from report import table
from report.table import COLUMNS, markdown_table, mean_text
from studies import length
from studies.kept import Found, apart


@dataclass
class Config:
    run: str = "runs/scratch"       # folder of a run of scratch.py
    seeds: int = 3                  # [2, 10] post-hoc decompositions of what it made
    steps: int = 1000               # [1, 1e8] of each of them
    c_imp: float = 0.               # [0, 1e9] importance in them; 0: as in the run of scratch.py
    eval_tokens: int = 50_000       # [1, 1e9] of fit (means, choices) and of test (scores)
    out: str = "results"            # folder for native.json and .md; a part: results-part
    runs: str = "runs/native"       # folder for the models
    device: str = "auto"            # auto, cpu, cuda


NATIVE = "native"
# groups of metrics whose headlines are asked too
GROUPS = ("completeness", "parts", "words", "effects")
# of metrics/mapping.py: {key: head}; each is the mean of what is said of the two sides
MAPPED = {"best": "best r", "explained": "explained", "r2_1": "R² of 1", "r2_5": "R² of 5"}


# ---------------------------------------------------------------------------------- the models
def native_run(cfg):
    """The Config of the run of scratch.py, and what its summary says. Fails unless it has ended."""
    meta = common.read_meta(Path(cfg.run) / "scratch.safetensors")
    if not meta.get("step"):
        common.fail(f"--run {cfg.run}: holds no run of scratch.py: python scratch.py --out "
                    f"{cfg.run}")
    run = scratch.Config(**meta["config"])
    summary = common.read_json(Path(cfg.run) / "summary.json", {})
    if meta["step"] < run.steps or "ce_made" not in summary:
        common.fail(f"--run {cfg.run}: has not ended: python scratch.py --resume --out {cfg.run} "
                    "and its other flags go on with it")
    return run, summary


def configured(cfg, native, gpt, seed):
    """The spd.Config of one post-hoc decomposition: sizes are those of the native one."""
    sizes = {name: getattr(native, name) for name in ("C", "ci_fn", "ci_hidden", "B", "T")}
    run = spd.Config(
        **sizes, **spd.FORMER, c_imp=cfg.c_imp or native.c_imp, model=str(gpt.folder),
        data=native.data, layer=native.layer, device=cfg.device, seed=seed, steps=cfg.steps,
        eval_every=0)
    run.eval_tokens = min(cfg.eval_tokens, 6_400)
    run.out = str(Path(cfg.runs) / f"{gpt.hash}-{run.c_imp:g}-{cfg.steps}-seed{seed}")
    return run


def post_hoc(run, gpt):
    """One post-hoc decomposition. Trains it, or goes on training it, if it is not there yet."""
    job = compare.Job("spd", "c_imp", run.c_imp, run.seed, True, compare.METHODS["spd-former"])
    return compare.trained(job, run, gpt).model


# ------------------------------------------------------------------ what is asked of one, of pairs
def own_numbers(m, run, arena, corpus):
    """What is known of one decomposition? A flat dict: what studies/length.py says of it, and the
    headlines that GROUPS say."""
    numbers = length.measured(m, run, arena, corpus)
    for group in GROUPS:
        gen = common.generator(run.seed, group)
        found, _ = groups.GROUPS[group].measure(m, arena, gen)
        numbers |= {key: found[key] for key in headlines(group)}
    return numbers


def headlines(group):
    """The keys of a group of metrics that are headlines of compare.py's tables."""
    shown = sum(table.HEADLINES, ())
    return [key for key in groups.GROUPS[group].COLUMNS if key in shown]


def pair_numbers(ms, arena):
    """What do two decompositions of the same weights share? A flat dict: of metrics/stability.py
    what studies/length.py shows, and MAPPED, each with its null."""
    numbers = length.together(ms, arena)
    recorded = [recording.record_by_sign(m, arena.gpt, arena.fit, arena.test) for m in ms]
    kept = []
    for fit, test in recorded:
        often = mapping.frequent(fit)
        kept.append([mapping.select(a, often) for a in (fit, test)])
    row = arena.test[0].shape[1] - 1
    if min(fit.F for fit, _ in kept):
        gen = common.generator(0, "mapping")
        found = mapping.mapping(*zip(*kept), row, gen)
        for key, prefix in itertools.product(MAPPED, ("", "null_")):
            sides = [found[f"{prefix}{key}_{side}"] for side in ("a", "b")]
            numbers[f"{prefix}{key}"] = None if None in sides else sum(sides) / 2
    return numbers


# ---------------------------------------------------------------------------------- what it shows
def cell(rows, key, digits):
    """A number of some rows as text: its mean, and the interval where there are several."""
    return mean_text([row.get(key) for row in rows], digits)


def alone(rows, shown):
    """Some numbers of the native decomposition, and their means over the post-hoc ones. shown:
    {key: (head, digits)}. Lines of Markdown."""
    lines = []
    for kind in (NATIVE, "post-hoc"):
        its = [row for row in rows if row["kind"] == kind]
        cells = [cell(its, key, digits) for key, (_, digits) in shown.items()]
        lines.append([f"{kind} ({len(its)})", *cells])
    return markdown_table(["components", *(head for head, _ in shown.values())], lines)


def attacks(rows):
    """How far off do attacks of more and more steps put the predictions? Lines of Markdown."""
    budgets = [*rows[0]["attack"]]
    lines = []
    for kind in (NATIVE, "post-hoc"):
        ladders = [row["attack"] for row in rows if row["kind"] == kind]
        lines.append([kind, *(cell(ladders, budget, 4) for budget in budgets)])
    return markdown_table(["KL under attack of so many steps", *budgets], lines)


TEXT = """# Native and post-hoc components of the same weights
`{command}` wrote this.
*Native*: what an MLP was made of from its first step of training (scratch.py). *Post-hoc*: what
spd.py finds, by its recipe FORMER, in the weights that they add up to, from random starts; means
over seeds ± half of the 95 % interval. *loss*: SPD's own, without faithfulness; *stochastic*: CE
recovered under random masks; *alive*: components of W_in and of W_out on at 10 tokens or more;
*same v, i, w*: share of the components in pairs that reach 0.7 in the correlation of values, in the
cosine of weights over the inputs, in that of the weights; *R² of 5*: of what a component says, from
the best five of the other decomposition. The other columns are compare.py's (`compare.py
--explain`).
"""


def render(found):
    """The cross-entropies, each decomposition alone, and what they share, as Markdown."""
    ce = found["ce"]
    lines = [TEXT.format(command=found["provenance"]["command"]),
             f"Validation cross-entropy: {ce['ce_given']:.4f} of the target that it began as, "
             f"{ce['ce_made']:.4f} of what was made.", ""]

    # each alone: the native one, and the mean over post-hoc seeds
    lines += [*alone(found["rows"], length.ROWS), ""]
    keys = itertools.chain.from_iterable(map(headlines, GROUPS))
    heads = {key: (f"{COLUMNS[key].head} {table.ARROWS[COLUMNS[key].better]}", 3) for key in keys}
    lines += [*alone(found["rows"], heads), ""]
    lines += [*attacks(found["rows"]), ""]

    # in pairs, and by chance
    keys = length.PAIRS | MAPPED
    shared = []
    for kind in (NATIVE, "post-hoc"):
        rows = [row for row in found["pairs"] if row["kind"] == kind]
        name = "native and post-hoc" if kind == NATIVE else "two post-hoc seeds"
        for prefix, text in (("", f"{name} ({len(rows)})"), ("null_", "by chance")):
            cells = [cell(rows, f"{prefix}{key}", 3) for key in keys]
            shared.append([text, *cells])
    lines += markdown_table(["pairs", *keys.values()], shared)
    return "\n".join([*lines, "", "Pairs with a seed in common are not independent.", ""])


# ------------------------------------------------------------------------------------------- main
def in_order(row):
    """What rows are sorted by."""
    return row["kind"] != NATIVE, row["seeds"]


def main(cfg):
    cfg = apart(cfg)
    # what was made, and its native components
    common.check(cfg)
    native, summary = native_run(cfg)
    dev = common.device(cfg.device)
    gpt = GPT.load(Path(cfg.run) / scratch.TARGET, dev)
    base = compare.Config(str(gpt.folder), native.data, native.layer, "spd",
                          eval_tokens=cfg.eval_tokens, device=cfg.device)
    layer, _ = compare.check(base, gpt)
    models = {NATIVE: scratch.load(Path(cfg.run) / "scratch.safetensors", gpt)}
    arena = compare.prepared(base, gpt, layer, dev)
    corpus = data.load_for(gpt, native.data, native.T)["fit"]
    known = Found(Path(cfg.out) / "native.json", ("rows", "pairs"), in_order)
    common.must_be_writable(cfg.out, cfg.runs)
    depends_on = [gpt.hash, data.fingerprint(native.data), cfg.eval_tokens]

    # each alone
    runs = {NATIVE: configured(cfg, native, gpt, native.seed)}
    # from no random start that the native components had
    for seed in range(native.seed + 1, native.seed + 1 + cfg.seeds):
        runs[seed] = configured(cfg, native, gpt, seed)
    ce = {key: summary[key] for key in ("ce_given", "ce_made")}
    found = dict(ce=ce, provenance=common.provenance(cfg, gpt), rows=[], pairs=[])
    for which, run in runs.items():
        kind = NATIVE if which == NATIVE else "post-hoc"
        print(f"{kind} components, seed {run.seed}", flush=True)
        if kind != NATIVE:
            models[which] = post_hoc(run, gpt)
        names = dict(kind=kind, seeds=[run.seed])
        how = compare.changed_flags(run, spd)
        find = partial(own_numbers, models[which], run, arena, corpus)
        found["rows"].append(known.row("rows", [*depends_on, kind, how], names, find))

    # in pairs
    for one, other in itertools.combinations(models, 2):
        kind = NATIVE if one == NATIVE else "post-hoc"
        seeds = [other] if kind == NATIVE else [one, other]
        print(f"{kind} and post-hoc components, seeds {seeds}", flush=True)
        how = compare.changed_flags(runs[other], spd)
        find = partial(pair_numbers, [models[one], models[other]], arena)
        names = dict(kind=kind, seeds=seeds)
        found["pairs"].append(known.row("pairs", [*depends_on, how, kind, seeds], names, find))

    known.write(ce=ce, provenance=found["provenance"])
    text = render(found)
    common.write(Path(cfg.out) / "native.md", text.encode())
    print("", text, f"-> {cfg.out}/native.json, .md", sep="\n")


if __name__ == "__main__":
    main(common.cli(Config))
