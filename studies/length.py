"""How far SPD has come: its loss, masks and components as training grows longer, and whether random starts end alike.

    settled(n) = loss of random starts after n steps / loss of a run that starts at the neurons, after 4 n steps
is 1 where longer training, or a start at a solution that is known to be good, has nothing left to give. The loss is
SPD's own, at the end of its schedules, on text that it was not trained on, under the one-step adversary, without
faithfulness, which the final projection makes exact. Stability is that of the table (stability.py): of all seeds of one
length, and of the first random start with the run from the neurons.

    python -m studies.length    # 1,000 to 9,000 steps: 8 core hours; goes on after a kill, a second run only prints
    python -m studies.length --steps 300 --seeds 2 --neurons 1200 --out results-quick       # one length, for a look
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import compare
import data
import evals
import spd
from metrics import concepts, recording, stability
from model import GPT
from report import curve

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    steps: str = "1000,3000,9000"   # lengths of the runs from random starts, comma-separated
    seeds: str = "3,3,2"            # how many of each length; one number holds for all
    neurons: str = "4000,12000"     # lengths of the runs from the neurons' start; empty: none
    eval_tokens: int = 50_000       # of fit (means, choices) and of test (scores)
    out: str = "results"            # folder for spd-length.json, .md and .png
    runs: str = "runs/length"       # folder for the models
    device: str = "auto"            # auto, cpu, cuda

TABLE = compare.METHODS["spd"]      # what is varied in length is the table's SPD
BATCHES = 24                        # of fit, whose mean the loss is
PAIRS = {"activations_shared_0.7": "same v", "inputs_shared_0.7": "same i", "weights_shared_0.7": "same w",
         "function_fve": "output", "weights_most": "rank-one cos", "inputs_most": "over inputs"}
ROWS = {"loss": ("loss", 4), "l0": ("L0", 1), "ce_recovered": ("CE rec", 3), "ce_stochastic": ("stochastic", 3),
        "kl_attack": ("KL attack", 3), "alive_in": ("alive in", 0), "alive_out": ("alive out", 0),
        "coverage": ("coverage", 3), "board": ("board", 3), "concept_matched_fraction": ("matched", 3)}

def jobs(cfg):
    """The runs, shortest first: (start, steps, seed)."""
    lengths, seeds = numbers(cfg, "steps"), numbers(cfg, "seeds")
    if len(seeds) not in (1, len(lengths)):
        common.fail(f"--seeds {cfg.seeds}: one number, or one for each of --steps {cfg.steps}")
    seeds = seeds * (len(lengths) if len(seeds) == 1 else 1)
    random = [("random", steps, seed) for steps, n in zip(lengths, seeds) for seed in range(n)]
    return sorted(random + [("neurons", steps, 0) for steps in numbers(cfg, "neurons")], key=lambda job: job[1])

def numbers(cfg, flag):
    text = getattr(cfg, flag)
    try:
        values = [int(v) for v in text.split(",") if v]
    except ValueError:
        values = [0]
    if min(values, default=1) < 1:
        common.fail(f"--{flag} {text}: whole numbers from 1 on, separated by commas")
    return values

def configured(cfg, gpt, layer, start, steps, seed):
    """The spd.Config of one run."""
    run = spd.Config(**TABLE.change, model=cfg.model, data=cfg.data, layer=layer, device=cfg.device, seed=seed,
                     start=start, steps=steps, eval_tokens=min(cfg.eval_tokens, 6_400), eval_every=0)
    run.T = min(run.T, gpt.cfg.n_positions)
    run.out = str(Path(cfg.runs) / f"{start}-{steps}-seed{seed}")
    return run

def model(run, gpt, dev):
    """The trained model; trains it, or goes on training it, if it is not there yet."""
    job = compare.Job("spd", "steps", run.steps, run.seed, True, TABLE)
    return compare.trained(job, run, gpt, dev)[0]

def settled_loss(m, gpt, corpus, run, gen):
    """The loss of an SPD at the end of its schedules, without faithfulness: (the loss, its terms), over BATCHES."""
    run, found = dataclasses.replace(run, adversary="step", c_faith=0.), []
    for step in range(BATCHES):
        idx_BT = corpus.batch(step, run.B, run.T, seed=0).to(m.bs[0].device)
        loss, terms, _ = spd.loss_fn(m, spd.CleanPass(gpt, m, idx_BT), run, 1., gen)
        found.append(torch.stack([loss, *terms.values()]).detach())
    mean = torch.stack(found).mean(0).tolist()
    return mean[0], {f"loss_{name}": v for name, v in zip(terms, mean[1:])}

def measured(m, run, bench, corpus):
    """What is known of one run, a flat dict."""
    device = m.bs[0].device
    gen = lambda name: common.generator(run.seed, name)
    loss, terms = settled_loss(m.raw, bench.gpt, corpus, run, common.generator(0, "settled", device))
    found = compare.faithfulness(m, bench, gen("faithfulness")) | compare.robustness(m, bench, gen("robustness"))
    fit, test = recording.split_by_sign(*(recording.record(m, bench.gpt, *split) for split in (bench.fit, bench.test)))
    alive_F = evals.counts(m, bench.gpt, *bench.fit, (0,))["on"][0] >= evals.ALIVE
    alive = dict(zip(("alive_in", "alive_out"), alive_F.view(2, -1).sum(1).tolist()))
    weights = {f"weight_error_{n}": evals.relative_error(V @ U, W)
               for n, V, U, W in zip(spd.SITES, m.raw.V, m.raw.U, m.raw.Ws)}
    keys = ("l0", "ce_recovered", "kl", "fve", "concept_matched_fraction", "kl_attack", "attack", "spectrum",
            "kl_joint")
    return dict(loss=loss, **terms, **alive, **weights, **{key: found[key] for key in keys},
                ce_stochastic=found["ce_recovered_stochastic"],
                coverage=concepts.coverage(fit, test)["coverage"], board=concepts.concepts_from_precise_units(fit, test))

def together(ms, bench):
    """What metrics/stability.py says of several runs."""
    found = stability.stability(ms, bench.gpt, bench.fit[0], bench.test[0], common.generator(0, "stability"))
    return {key: found[key] for key in found if key.removeprefix("null_").removesuffix("_se") in PAIRS}

def settled(rows):
    """[(n, loss of random starts after n steps, loss from the neurons' start after 4 n, their ratio)]."""
    loss = {}
    for row in rows:
        loss.setdefault((row["start"], row["steps"]), []).append(row["loss"])
    mean = {key: sum(values) / len(values) for key, values in loss.items()}
    return [(n, mean["random", n], mean["neurons", 4 * n], mean["random", n] / mean["neurons", 4 * n])
            for start, n in sorted(mean) if start == "random" and ("neurons", 4 * n) in mean]

def render(found):
    """The runs, what they have in common, and how settled they are, as Markdown."""
    def cell(v, digits):
        return "n/a" if v is None else f"{v:.{digits}f}"
    lines = ["| start | steps | seed | " + " | ".join(head for head, _ in ROWS.values()) + " |",
             "|---" * (3 + len(ROWS)) + "|"]
    for row in found["rows"]:
        cells = [cell(row[key], digits) for key, (_, digits) in ROWS.items()]
        lines.append("| " + " | ".join([row["start"], f"{row['steps']:,}", str(row["seed"]), *cells]) + " |")
    lines += ["", "| runs | " + " | ".join(PAIRS.values()) + " |", "|---" * (1 + len(PAIRS)) + "|"]
    for pair in found["pairs"]:
        cells = [f"{cell(pair.get(key), 3)} ({cell(pair.get(f'null_{key}'), 3)})" for key in PAIRS]
        lines.append(f"| {pair['name']} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets what as many random units give."] if found["pairs"] else []
    lines += [f"settled({n:,}) = {a:.4f} / {b:.4f} = {ratio:.2f}" for n, a, b, ratio in settled(found["rows"])]
    return "\n".join(lines + [""])

def picture(found):
    """Over the length: loss, L0, attack, alive, CE recovered, what runs share; and the spectra of importance."""
    from matplotlib.figure import Figure
    figure = Figure((15, 6.4), layout="constrained")
    panels = {"loss": ("loss",), "units on per token (L0)": ("l0",), "KL under attack, 20 steps": ("kl_attack",),
              "alive components of a matrix": ("alive_in", "alive_out"), "CE recovered": ("ce_recovered",),
              "shared by seeds": ("activations_shared_0.7", "inputs_shared_0.7", "weights_shared_0.7")}
    axes = figure.subplots(2, 4)
    for ax, (label, keys) in zip(axes[:, :3].flat, panels.items()):
        for i, key in enumerate(keys):
            for start, style in (("random", "o-"), ("neurons", "s:")):
                rows = found["pairs"] if key in PAIRS else found["rows"]
                rows = [row for row in rows if row["start"] == start and row.get(key) is not None]
                steps = sorted({row["steps"] for row in rows})
                mean = [sum(values) / len(values) for values in (
                    [row[key] for row in rows if row["steps"] == n] for n in steps)]
                name = PAIRS.get(key, key.removeprefix("alive_") if len(keys) > 1 else "")
                if steps:
                    line, = ax.plot(steps, mean, style, color=f"C{i}", mfc="w", label=" ".join((start, name)).strip())
                    ax.plot([row["steps"] for row in rows], [row[key] for row in rows], ".", color=line.get_color())
        ax.set(xlabel="steps of 2,048 tokens", ylabel=label, xscale="log")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    for ax, site in zip(axes[:, 3], spd.SITES):             # of each length the first seed: a cliff where C is enough
        for row in (row for row in found["rows"] if row["seed"] == 0):
            mean = sorted(row["spectrum"][site], reverse=True)
            ax.plot(range(1, len(mean) + 1), [max(v, 1e-6) for v in mean], ls=":" if row["start"] == "neurons" else "-",
                    label=f"{row['start']} {row['steps']:,}")
        ax.set(xlabel=f"component of W_{site}, sorted", ylabel="mean causal importance", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure

def main(cfg):
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    base = compare.Config(cfg.model, cfg.data, cfg.layer, "spd", eval_tokens=cfg.eval_tokens, device=cfg.device)
    layer, _ = compare.check(base, gpt)
    todo = jobs(cfg)
    bench, corpus = compare.prepared(base, gpt, layer, dev), data.load_all(cfg.data, gpt.vocab, gpt.cfg.n_positions)
    known, ms = Found(Path(cfg.out) / "spd-length.json"), {}

    def get(job):
        """The model of a job, at most once."""
        if job not in ms:
            ms[job] = model(configured(cfg, gpt, layer, *job), gpt, dev)
        return ms[job]

    for i, (start, steps, seed) in enumerate(todo):
        run = configured(cfg, gpt, layer, start, steps, seed)
        fixed = [gpt.hash, {k: v for k, v in vars(run).items() if k not in spd.MAY_CHANGE_ON_RESUME}, cfg.eval_tokens]
        print(f"[{i + 1}/{len(todo)}] {start}, {steps} steps, seed {seed}", flush=True)
        known.row("rows", fixed, dict(start=start, steps=steps, seed=seed),
                  lambda: measured(get((start, steps, seed)), run, bench, corpus["fit"]))
    for steps in sorted({job[1] for job in todo if job[0] == "random"}):
        seeds = [job for job in todo if job[:2] == ("random", steps)]
        neurons = [job for job in todo if job[:2] == ("neurons", 4 * steps)]
        groups = dict(random=seeds if len(seeds) > 1 else [], neurons=(seeds[:1] + neurons) if neurons else [])
        for start, group in groups.items():
            if group:
                fixed = [gpt.hash, group, vars(configured(cfg, gpt, layer, *group[0])) | {"out": ""}, cfg.eval_tokens]
                name = (f"{len(group)} random starts, {steps:,} steps" if start == "random" else
                        f"random start, {steps:,} steps, and neurons' start, {4 * steps:,}")
                print(name, flush=True)
                known.row("pairs", fixed, dict(start=start, steps=steps, name=name),
                          lambda: together([get(job) for job in group], bench))
    found = known.found | dict(provenance=common.provenance(cfg, gpt))
    common.write(known.path, json.dumps(found, indent=1).encode())
    common.write(Path(cfg.out) / "spd-length.md", render(found).encode())
    curve.save_picture(picture(found), Path(cfg.out) / "spd-length.png")
    print("", render(found), f"-> {cfg.out}/spd-length.json, .md, .png", sep="\n")

class Found:
    """What is known already, kept in one file: a row is not found again while what it depends on stays the same."""
    def __init__(self, path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else dict(rows=[], pairs=[])

    def row(self, table, fixed, names, find):
        key, rows = compare.digest(fixed), self.found[table]
        if all(row["key"] != key for row in rows):
            rows[:] = [row for row in rows if any(row[k] != v for k, v in names.items())]
            rows.append(names | dict(key=key) | compare.finite(find()))
            rows.sort(key=lambda row: (row["start"] != "random", row["steps"], row.get("seed", 0)))
            common.write(self.path, json.dumps(self.found, indent=1).encode())

if __name__ == "__main__":
    main(common.cli(Config))
