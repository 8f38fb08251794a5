"""Has SPD's training come to its end, and do its random starts end at the same components?

    settled(n) = loss of random starts after n steps / loss of the neurons' start after 4 n steps

is 1 where neither longer training nor a start at a known good solution has anything left to give.
The loss is SPD's own at the end of its schedules, on text that it was not trained on, under the
one-step adversary. Faithfulness is left out: the final projection makes it exact. Stability is the
table's (metrics/stability.py), of all seeds of one length, and of the first random start with the
run from the neurons.

    python -m studies.length    # 1,000 to 9,000 steps: 8 core hours; goes on after a kill
    python -m studies.length --steps 300 --seeds 2 --neurons 1200 --out results-quick    # a look
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import common
import compare
import data
import evals
import spd
from metrics import concepts, groups, recording, stability
from model import GPT
from report import curve
from report.table import markdown_table
from studies.kept import Found, apart, numbers


@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    steps: str = "1000,3000,9000"   # lengths of the runs from random starts, comma-separated
    seeds: str = "3,3,2"            # how many of each length; one number holds for all
    neurons: str = "4000,12000"     # lengths of the runs from the neurons' start; empty: none
    eval_tokens: int = 50_000       # [1, 1e9] of fit (means, choices) and of test (scores)
    out: str = "results"            # folder for spd-length.json, .md and .png; a part: results-part
    runs: str = "runs/length"       # folder for the models
    device: str = "auto"            # auto, cpu, cuda


TABLE = compare.METHODS["spd-former"]   # the row that is varied in length
MOST = 10**8                        # steps of a run
BATCHES = 24                        # of fit, whose mean the loss is
PAIRS = {
    "activations_shared_0.7": "same v",
    "inputs_shared_0.7": "same i",
    "weights_shared_0.7": "same w",
    "function_fve": "output",
    "weights_most": "rank-one cos",
    "inputs_most": "over inputs",
}
ROWS = {                            # key: (head, digits)
    "loss": ("loss", 4),
    "l0": ("L0", 1),
    "ce_recovered": ("CE rec", 3),
    "ce_stochastic": ("stochastic", 3),
    "kl_attack": ("KL attack", 3),
    "alive_in": ("alive in", 0),
    "alive_out": ("alive out", 0),
    "coverage": ("coverage", 3),
    "board": ("board", 3),
    "concept_matched_fraction": ("matched", 3),
}
KEPT = ("l0", "ce_recovered", "kl", "fve", "concept_matched_fraction", "kl_attack", "attack",
        "spectrum", "kl_joint")     # of what compare.py's evaluations say


# ------------------------------------------------------------------------------------- the runs
class Job(NamedTuple):
    """One training."""
    start: str                      # "random" or "neurons"
    steps: int
    seed: int


def jobs(cfg):
    """List the trainings, shortest first."""
    lengths = numbers(cfg, "steps", MOST)
    seeds = numbers(cfg, "seeds", 100)
    if len(seeds) not in (1, len(lengths)):
        common.fail(f"--seeds {cfg.seeds}: one number, or one for each of --steps {cfg.steps}")
    if len(seeds) == 1:
        seeds = seeds * len(lengths)
    todo = []
    for steps, n in zip(lengths, seeds):
        todo += [Job("random", steps, seed) for seed in range(n)]
    todo += [Job("neurons", steps, 0) for steps in numbers(cfg, "neurons", MOST)]
    return sorted(todo, key=lambda job: job.steps)


def configured(cfg, gpt, layer, start, steps, seed):
    """The spd.Config of one training."""
    flags = dict(TABLE.change, start="neurons") if start == "neurons" else TABLE.change
    run = spd.Config(
        **flags, model=cfg.model, data=cfg.data, layer=layer, device=cfg.device, seed=seed,
        steps=steps, eval_tokens=min(cfg.eval_tokens, 6_400), eval_every=0)
    run.T = min(run.T, gpt.cfg.n_positions)
    run.out = str(Path(cfg.runs) / f"{start}-{steps}-seed{seed}")
    return run


def model(run, gpt):
    """The trained model. Trains it, or goes on training it, if it is not there yet."""
    job = compare.Job("spd", "steps", run.steps, run.seed, True, TABLE)
    return compare.trained(job, run, gpt).model


# ------------------------------------------------------------------------- what is asked of them
def settled_loss(m, gpt, corpus, run, gen):
    """How large is an SPD's loss at the end of its schedules, without faithfulness?

    Returns (the loss, {its terms}), means over BATCHES batches of the corpus."""
    run = dataclasses.replace(run, adversary="step", c_faith=0.)
    values = []
    for step in range(BATCHES):
        idx_BT = corpus.batch(step, run.B, run.T, seed=0).to(m.bs[0].device)
        loss, terms, _ = spd.loss_fn(m, spd.CleanPass(gpt, m, idx_BT), run, 1., gen)
        values.append(torch.stack([loss, *terms.values()]).detach())
    total, *parts = torch.stack(values).mean(0).tolist()
    return total, {f"loss_{name}": value for name, value in zip(terms, parts)}


def measured(m, run, arena, corpus):
    """What is known of one training, as a flat dict."""
    device = m.bs[0].device

    # its loss
    gen = common.generator(0, "settled", device)
    loss, terms = settled_loss(m.raw, arena.gpt, corpus, run, gen)
    row = dict(loss=loss, **terms)

    # how many components of each matrix are alive, and how well they add up to it
    counts = evals.counts(m, arena.gpt, *arena.fit, (0,))
    alive_F = counts["on"][0] >= evals.ALIVE
    row["alive_in"], row["alive_out"] = alive_F.view(2, -1).sum(1).tolist()
    for site, V, U, W in zip(spd.SITES, m.raw.V, m.raw.U, m.raw.Ws):
        row[f"weight_error_{site}"] = evals.relative_error(V @ U, W)

    # the table's own evaluations
    answers = {}
    for group in ("faithfulness", "robustness"):
        gen = common.generator(run.seed, group)
        numbers, details = groups.GROUPS[group].measure(m, arena, gen)
        answers |= numbers | details
    row |= {key: answers[key] for key in KEPT}
    row["ce_stochastic"] = answers["ce_recovered_stochastic"]

    # what the components mean
    fit, test = recording.record_by_sign(m, arena.gpt, arena.fit, arena.test)
    row["coverage"] = concepts.coverage(fit, test)["coverage"]
    row["board"] = concepts.concepts_from_precise_units(fit, test)
    return row


def together(ms, arena):
    """What several models share: of metrics/stability.py what PAIRS names, nulls and errors."""
    gen = common.generator(0, "stability")
    answers = stability.stability(ms, arena.gpt, arena.fit[0], arena.test[0], gen)

    def is_wanted(key):
        return key.removeprefix("null_").removesuffix("_se") in PAIRS

    return {key: value for key, value in answers.items() if is_wanted(key)}


def mean_by(rows, names, key):
    """{values of names: mean of key} over rows."""
    values = {}
    for row in rows:
        group = tuple(row[name] for name in names)
        values.setdefault(group, []).append(row[key])
    return {group: sum(some) / len(some) for group, some in values.items()}


def settled(rows):
    """[(n, loss of random starts after n steps, of the neurons' start after 4 n, their ratio)]."""
    loss = mean_by(rows, ("start", "steps"), "loss")
    out = []
    for start, steps in sorted(loss):
        if start == "random" and ("neurons", 4 * steps) in loss:
            reached = loss["random", steps]
            reachable = loss["neurons", 4 * steps]
            out.append((steps, reached, reachable, reached / reachable))
    return out


# ---------------------------------------------------------------------------------- what it shows
def cell(value, digits):
    return "n/a" if value is None else f"{value:.{digits}f}"


TEXT = """# SPD over the length of its training
`{command}` wrote this.
C {C}, c_imp {c_imp:g}, {tokens:,} tokens a step, the recipe spd.FORMER. *loss*: SPD's own at the
end of its schedules, without faithfulness, on other text; *L0*, *CE rec*: of both matrices, masks
rounded at 0.1; *stochastic*: CE recovered under random masks; *KL attack*: importances as they are,
what they leave open set by 20 sign steps; *alive*: components of W_in and of W_out on at 10 tokens
or more; *same v, i, w*: share of the components in pairs that reach 0.7 in the correlation of
values, in the cosine of weights over the inputs, in that of the weights; *settled(n)*: loss of
random starts after n steps over that of the neurons' start after 4 n. The other columns are
compare.py's (`compare.py --explain`).
"""


def pair_cell(pair, key):
    """One number of several models together: ± its error where it has one, (what chance gives)."""
    error = pair.get(f"{key}_se")
    written = cell(pair.get(key), 3) + (f" ± {error:.3f}" if error else "")
    return f"{written} ({cell(pair.get(f'null_{key}'), 3)})"


def render(found):
    """The trainings, what they share, and how settled they are, as Markdown."""
    trainings = []
    for row in found["rows"]:
        cells = [row["start"], f"{row['steps']:,}", str(row["seed"])]
        cells += [cell(row[key], digits) for key, (_, digits) in ROWS.items()]
        trainings.append(cells)
    heads = ["start", "steps", "seed", *(head for head, _ in ROWS.values())]
    run = spd.Config(**TABLE.change)
    text = TEXT.format(command=found["provenance"]["command"], C=run.C, c_imp=run.c_imp,
                       tokens=run.B * run.T)
    lines = [text, *markdown_table(heads, trainings), ""]

    pairs = []
    for pair in found["pairs"]:
        pairs.append([pair["name"], *(pair_cell(pair, key) for key in PAIRS)])
    lines += markdown_table(["runs", *PAIRS.values()], pairs)
    if found["pairs"]:
        lines += ["", "± the standard error over seeds (jackknife); in brackets what as many "
                      "random units give.", ""]

    for steps, reached, reachable, ratio in settled(found["rows"]):
        lines.append(f"settled({steps:,}) = {reached:.4f} / {reachable:.4f} = {ratio:.2f}")
    return "\n".join(lines + [""])


PANELS = {                          # label: the numbers that are drawn over the length
    "loss": ("loss",),
    "units on per token (L0)": ("l0",),
    "KL under attack, 20 steps": ("kl_attack",),
    "alive components of a matrix": ("alive_in", "alive_out"),
    "CE recovered": ("ce_recovered",),
    "units that match a concept": ("concept_matched_fraction",),
    "shared by seeds": ("activations_shared_0.7", "inputs_shared_0.7", "weights_shared_0.7"),
}


def picture(found):
    """Draw everything over the length of training, and the spectra of importance beside it."""
    from matplotlib.figure import Figure
    figure = Figure((13, 9.6), layout="constrained")
    axes = figure.subplots(3, 3).flat
    for ax, (label, keys) in zip(axes, PANELS.items()):
        for i, key in enumerate(keys):
            rows = found["pairs"] if key in PAIRS else found["rows"]
            name = PAIRS.get(key, "")
            if key.startswith("alive_"):
                name = key.removeprefix("alive_")
            draw_over_length(ax, rows, key, name, f"C{i}")
        ax.set(xlabel="steps of 2,048 tokens", ylabel=label, xscale="log")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    for ax, site in zip(axes[len(PANELS):], spd.SITES):
        draw_spectra(ax, found["rows"], site)
    return figure


def draw_over_length(ax, rows, key, name, color):
    """A line through the means of each start, and a dot for each run."""
    for start, style in (("random", "o-"), ("neurons", "s:")):
        some = [row for row in rows if row["start"] == start and row.get(key) is not None]
        if some:
            mean = mean_by(some, ("steps",), key)
            lengths = sorted(steps for (steps,) in mean)
            ax.plot(lengths, [mean[(steps,)] for steps in lengths], style, color=color, mfc="w",
                    label=f"{start} {name}".strip())
            ax.plot([row["steps"] for row in some], [row[key] for row in some], ".", color=color)


def draw_spectra(ax, rows, site):
    """Mean importance of the sorted components, one seed a length: a cliff where C is enough."""
    for row in rows:
        if row["seed"] == 0:
            mean = sorted(row["spectrum"][site], reverse=True)
            ax.plot(range(1, len(mean) + 1), [max(v, 1e-6) for v in mean],
                    ls=":" if row["start"] == "neurons" else "-",
                    label=f"{row['start']} {row['steps']:,}")
    ax.set(xlabel=f"component of W_{site}, sorted", ylabel="mean causal importance", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


# ------------------------------------------------------------------------------------------- main
def in_order(row):
    """What rows are sorted by."""
    return row["start"] != "random", row["steps"], row.get("seed", 0)


class Models:
    """Models by their job, each trained or loaded at most once."""

    def __init__(self, cfg, gpt, layer):
        self.how = (cfg, gpt, layer)
        self.gpt = gpt
        self.known = {}

    def __getitem__(self, job):
        if job not in self.known:
            self.known[job] = model(configured(*self.how, *job), self.gpt)
        return self.known[job]


def held_together(todo):
    """[(start, steps, name, jobs)] of the runs that are held against each other."""
    out = []
    lengths = {job.steps for job in todo if job.start == "random"}
    longest = max((job.steps for job in todo if job.start == "neurons"), default=0)
    for steps in sorted(lengths):
        seeds = [job for job in todo if job[:2] == ("random", steps)]
        if len(seeds) > 1:
            out.append(("random", steps, f"{len(seeds)} random starts, {steps:,} steps", seeds))
        # the longest ones too: do they end at one place?
        lasting = {4 * steps, longest} if steps == max(lengths) else {4 * steps}
        for job in todo:
            if job.start == "neurons" and job.steps in lasting:
                name = f"random start, {steps:,} steps, and neurons' start, {job.steps:,}"
                out.append(("neurons", steps, name, [seeds[0], job]))
    return out


def main(cfg):
    cfg = apart(cfg)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    base = compare.Config(cfg.model, cfg.data, cfg.layer, "spd", eval_tokens=cfg.eval_tokens,
                          device=cfg.device)
    layer, _ = compare.check(base, gpt)
    todo = jobs(cfg)
    arena = compare.prepared(base, gpt, layer, dev)
    corpus = data.load_for(gpt, cfg.data, gpt.cfg.n_positions)["fit"]
    known = Found(Path(cfg.out) / "spd-length.json", ("rows", "pairs"), in_order)
    common.must_be_writable(cfg.out, cfg.runs)
    models = Models(cfg, gpt, layer)
    # a file may hold another text under the name that it had
    text = [] if cfg.data == "tinytales" else [data.fingerprint(cfg.data)]

    # each run by itself
    for i, job in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {job.start}, {job.steps} steps, seed {job.seed}", flush=True)
        run = configured(cfg, gpt, layer, *job)
        how = {k: v for k, v in vars(run).items() if k not in spd.MAY_CHANGE_ON_RESUME}
        known.row("rows", [gpt.hash, how, cfg.eval_tokens, *text], job._asdict(),
                  lambda: measured(models[job], run, arena, corpus))

    # runs against each other
    for start, steps, name, group in held_together(todo):
        print(name, flush=True)
        how = vars(configured(cfg, gpt, layer, *group[0])) | {"out": ""}
        names = dict(start=start, steps=steps, name=name)
        known.row("pairs", [gpt.hash, group, how, cfg.eval_tokens, *text], names,
                  lambda: together([models[job] for job in group], arena))

    known.write(provenance=common.provenance(cfg, gpt))
    found = known.found
    text = render(found)
    common.write(Path(cfg.out) / "spd-length.md", text.encode())
    curve.save_picture(picture(found), Path(cfg.out) / "spd-length.png")
    print("", text, f"-> {cfg.out}/spd-length.json, .md, .png", sep="\n")


if __name__ == "__main__":
    main(common.cli(Config))
