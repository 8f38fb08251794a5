"""How well does a decomposition do an MLP's work, and with how much? CE recovered, KL, FVE, L0,
alive units, concepts: what every paper prints, for every method by one piece of code.

All functions are pure: they train nothing and change nothing. Position 0 of a row counts in none.


THE SEAM: what a decomposition m offers
=======================================
There is no base class. Any object with these names is evaluated, spliced into the model, matched
with its other seeds and described. x is the input of an MLP after LayerNorm and y is its output;
mlp is the module that makes y of x.

Attributes
    name          type            meaning
    m.kind        str             what a unit is:
                                  "dictionary"  reads along one vector, writes along one vector
                                  "component"   a rank-one part of one weight matrix of the MLP
                                  "map"         a linear map of any rank, behind a gate
    m.matrices    tuple of str    matrices whose parts the units are: of the first the first units,
                                  of each as many; () where units are of the MLP as a whole
    m.layers      list of int     MLPs that m stands in for; most metrics want exactly one
    m.params_F    int tensor (F)  parameters of each unit

Methods
    m.encode(layer, x_BTD, mlp) -> f_BTF
        How much is each unit on? f >= 0, and exactly 0 = off at this token. Deterministic. Which
        units are on is read from f alone: L0, alive units, every comparison of methods.
    m.decode(layer, f_BTF, x_BTD) -> y_BTD
        What do units that are on that much write in all? Biases and what is always on included. f
        may have been edited. Differentiable by f. Many methods ignore x.
    m.contrib(layer, f_BTF, x_BTD, units) -> c_BTUD
        What is each named unit's own share of y? units: their numbers, (U). B may be 1, and the
        tokens may come from anywhere.
    m.unit_directions() -> list of (name, read, write, ranks)
        What do units read and write? A block holds units that could be each other's equals in
        another seed; the blocks name all units, in the order of f. read (units, d_in), write
        (units, d_out), ranks None. Where a unit is a map, ranks (units) says how many rows of read
        and write are its own.
    m.unit_inputs(gpt, rows_RT) -> list of a_ND
        What do the reads of each block multiply, on some rows of tokens? (R (T - 1), d_in) each.

Optional
    m.reads: list of int                layers whose encode m needs, ascending; without it m.layers.
                                        encode is called at each of them, lowest first. A method
                                        that crosses layers keeps what it saw below, and returns the
                                        units of all layers so far
    m.strength(layer, f_BTF, x_BTD)     -> a_BTF, what a unit says, signed, where it is on; without
                                        it f. A unit whose two signs say two things is counted as
                                        two (metrics/recording.py)
    m.always_params: int                parameters in use at every token, such as those of a skip;
                                        without it 0

Only where m.kind is "component": f is the causal importance, 0 to 1 (metrics/masks.py)
    m.C: int                            units of each matrix
    m.site(masks, rest_masks)           the MLP under masks: (.., C) of the units of each matrix,
                                        (.., 1) of what the units leave of each. An object with a
                                        method mlp(x_BTD) -> y_BTD
    m.thresholds: tuple of float        importances above which the table rounds masks to 1
    m.raw                               where encode is rounded to 0 and 1: the decomposition with
                                        importances in between; without it m

The module of a method (compare.py)
    Config, MAY_CHANGE_ON_RESUME, train(cfg), build(cfg, gpt) -> a fresh m
    load(path, gpt) -> m as it is evaluated; spd's has importances rounded at 0.1

The smallest one, an MLP's output in D directions W_DD and their opposites:
    class Basis:
        kind = "dictionary"
        matrices = ()
        layers = [1]
        params_F = torch.full((2 * D,), D)

        def encode(self, layer, x_BTD, mlp):
            a_BTD = mlp(x_BTD) @ W_DD.T
            return torch.cat([a_BTD, -a_BTD], -1).relu()

        def decode(self, layer, f_BTF, x_BTD):
            plus_BTD, minus_BTD = f_BTF.chunk(2, -1)
            return (plus_BTD - minus_BTD) @ W_DD

        def contrib(self, layer, f_BTF, x_BTD, units):
            W_FD = torch.cat([W_DD, -W_DD])
            return f_BTF[..., units, None] * W_FD[units]


R rows, B rows of a batch, T positions, S = T - 2 scored positions, N tokens, D residual width,
F units, U some of the units, A thresholds, J examples of a unit, K concepts, V vocabulary. rows_RT
holds token ids. Costs are for the bundled target on two cores: one replace over 50,000 tokens takes
about 4 s.
"""
import math
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import torch

import data
from metrics import columns
from metrics.columns import Column
from model import Constant, split_rows

RARE = 0.002            # a concept says something where it is true at this share of the tokens ..
DENSE = 0.3             # .. or more, up to this share
ALIVE = 10              # a unit is alive when it is on at this many tokens or more
WIDTH = 100             # columns of what is told of units
DENSEST = 3             # units that are told of because they are on most
LEAST_COST = 0.05       # nats: an MLP whose ablation costs less is worth too little to share out


# ---------------------------------------------------------------- a decomposition in the model
def unedited(layer, f_BTF):
    return f_BTF


@dataclass
class Splice:
    """A decomposition in the place of its MLPs, as GPT.forward takes it; made by `splice`."""
    m: Any
    edit: Callable
    keep_error: bool

    def __call__(self, layer, x_BTD, mlp):
        """y_BTD of one MLP. The model calls this at every layer, lowest first."""
        # A cross-layer method has to see layers that it does not stand in for.
        f_BTF = self.m.encode(layer, x_BTD, mlp) if layer in reads(self.m) else None
        if layer not in self.m.layers:
            return mlp(x_BTD)
        y_BTD = self.m.decode(layer, self.edit(layer, f_BTF), x_BTD)
        if self.keep_error:
            return y_BTD + mlp(x_BTD) - self.m.decode(layer, f_BTF, x_BTD)
        return y_BTD


def splice(m, edit=unedited, keep_error=False):
    """Put a decomposition into the model: gpt(idx_BT, splice(m)). No other way leads in.

    edit(layer, f_BTF) -> f_BTF: ablation and steering change what the units say.
    keep_error: what m does not explain stays, y - decode(f) + decode(edit(f)), as in Marks et al.
    2024 (arXiv:2403.19647)."""
    return Splice(m, edit, keep_error)


def reads(m):
    """Layers whose encode m needs."""
    return getattr(m, "reads", m.layers)


def clean(m, gpt, idx_BT, layer):
    """What does one of m's MLPs read, and what do m's units say, while the model runs as it is?

    Returns x_BTD and f_BTF. The model above `layer` is not run."""
    x_BTD, _, f_BTF = clean_with_stream(m, gpt, idx_BT, layer)
    return x_BTD, f_BTF


@torch.no_grad()
def clean_with_stream(m, gpt, idx_BT, layer):
    """`clean`, and the stream that the MLP's output is added to: x_BTD, stream_BTD, f_BTF."""
    first = min([layer, *reads(m)])
    x_BTD, stream_BTD = gpt.prefix(idx_BT, first)
    for below in range(first, layer):
        # m keeps for itself what it reads below
        if below in reads(m):
            m.encode(below, x_BTD, gpt.mlp(below))
        x_BTD, stream_BTD = gpt.next_mlp(stream_BTD, gpt.mlp(below)(x_BTD), below)
    return x_BTD, stream_BTD, m.encode(layer, x_BTD, gpt.mlp(layer))


# ------------------------------------------------------------------------------------ the floor
@torch.no_grad()
def mean_output(gpt, layer, rows_RT, batch=16):
    """What does one MLP write on average? (D)."""
    parts = []
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, _ = gpt.prefix(idx_BT, layer)
        y_BTD = gpt.mlp(layer)(x_BTD)
        mean_D = y_BTD[:, 1:].flatten(0, 1).mean(0)
        parts.append(mean_D * len(idx_BT))
    return torch.stack(parts).sum(0) / len(rows_RT)


def ablations(gpt, layer, rows_fit_RT):
    """Replace one MLP's output by its mean over rows_fit, and by zero: the floor of every table."""
    y_D = mean_output(gpt, layer, rows_fit_RT)
    return {"mean ablation": Constant(layer, y_D),
            "zero ablation": Constant(layer, torch.zeros_like(y_D))}


# --------------------------------------------------------------------------- cross-entropy and KL
def divergence(gpt, idx_BT, logp_BSV, logq_BSV):
    """How bad are the predictions q, and how far from the predictions p? (B, S, 2), in nats: the
    cross-entropy of the next token under q, and KL(p || q)."""
    next_BS1 = idx_BT[:, 2:].unsqueeze(-1)
    ce_BS = -logq_BSV.gather(-1, next_BS1).squeeze(-1)
    if logp_BSV is logq_BSV:
        kl_BS = torch.zeros_like(ce_BS)
    else:
        kl_BS = gpt.distance(logp_BSV, logq_BSV)
    return torch.stack([ce_BS, kl_BS], -1)


@torch.no_grad()
def scores_by_row(gpt, rows_RT, replaces, batch=16):
    """How well does the model predict with each replace(layer, x_BTD, mlp) -> y_BTD in it?

    Returns {name: (R, 2)}: means over the scored positions of each row of the next token's
    cross-entropy and of KL(original || spliced), in nats. "original", the model as it is, comes
    first. One pass each."""
    replaces = {"original": None, **replaces}
    parts = {name: [] for name in replaces}
    for idx_BT in split_rows(rows_RT, batch):
        for name, replace in replaces.items():
            logq_BSV = gpt.predictions(gpt(idx_BT, replace))
            if name == "original":
                logp_BSV = logq_BSV
            by_position = divergence(gpt, idx_BT, logp_BSV, logq_BSV)
            parts[name].append(by_position.double().mean(1).cpu())
    return {name: torch.cat(part) for name, part in parts.items()}


def per_token(by_row):
    """Average scores_by_row over rows: {name: {"ce": nats, "kl": nats}}."""
    table = {}
    for name, row in by_row.items():
        ce, kl = row.mean(0).tolist()
        table[name] = dict(ce=ce, kl=kl)
    return table


def scores(gpt, rows_RT, replaces, batch=16):
    """How well does the model predict with each replace in it? scores_by_row, averaged over rows:
    {name: {"ce": nats, "kl": nats}}."""
    return per_token(scores_by_row(gpt, rows_RT, replaces, batch))


@torch.no_grad()
def scores_at(gpt, layer, rows_RT, outputs, batch=16):
    """What do many edits of one MLP's output do to the predictions, position by position?

    outputs(idx_BT, x_BTD) -> {name: y_BTD}. Returns {name: (R, S, 2)}, CE and KL as `divergence`
    has them, "original" among the names. The model below the MLP runs once for all edits."""
    parts = {}
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, stream_BTD = gpt.prefix(idx_BT, layer)
        logp_BSV = gpt.predictions(gpt.suffix(stream_BTD, gpt.mlp(layer)(x_BTD), layer))
        parts.setdefault("original", []).append(divergence(gpt, idx_BT, logp_BSV, logp_BSV))
        for name, y_BTD in outputs(idx_BT, x_BTD).items():
            logq_BSV = gpt.predictions(gpt.suffix(stream_BTD, y_BTD, layer))
            parts.setdefault(name, []).append(divergence(gpt, idx_BT, logp_BSV, logq_BSV))
    return {name: torch.cat(part) for name, part in parts.items()}


def recovered(table, name, ablation="mean ablation", of="ce"):
    """Which share of what the MLP is worth does a replacement keep?

    CE recovered = (CE_ablated - CE) / (CE_ablated - CE_original): 1 = all, 0 = no better than the
    ablation, below 0 = worse; with zero ablation, the "loss recovered" of Rajamanoharan et al. 2024
    (arXiv:2404.16014). of="kl": 1 - KL / KL_ablated. None where ablating the MLP costs less than
    LEAST_COST. table: of `scores`."""
    ablated = table[ablation]
    original = table["original"]
    cost_ce = ablated["ce"] - original["ce"]
    if not cost_ce >= LEAST_COST:
        return None
    return (ablated[of] - table[name][of]) / (ablated[of] - original[of])


# ---------------------------------------------------------------------------------- error bars
def interval(statistic, *rows, draws=1000, level=0.95, seed=0):
    """How far could statistic(*means) be off, had other rows been drawn? A bootstrap: [low, high].

    rows: tensors (R, ...) over shared rows, which are drawn whole and with replacement. The
    statistic, often a ratio, is taken anew of each draw's means. Milliseconds."""
    R = len(rows[0])
    gen = torch.Generator().manual_seed(seed)
    pick = torch.randint(R, (draws, R), generator=gen)

    # a draw's mean is a weighted mean: how often each row was drawn, over R
    drawn = torch.zeros(draws, R, dtype=torch.float64)
    drawn.scatter_add_(1, pick, torch.ones_like(drawn))
    means = [torch.tensordot(drawn / R, row.double(), 1) for row in rows]

    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(statistic(*means), ends).tolist()


# What interval_over_stories takes of the means of a model, its ablation and the original, each with
# the columns CE and KL.
def ce_recovered_of(model, ablated, original):
    return ((ablated - model) / (ablated - original))[:, 0]


def kl_of(model, ablated, original):
    return model[:, 1]


def kl_recovered_of(model, ablated, original):
    return 1 - model[:, 1] / ablated[:, 1]


def interval_over_stories(by_row, name, ablation="mean ablation"):
    """How much does the choice of the test stories leave open about one model?

    Half the widths of the 95 % intervals over rows of its CE recovered, its KL and its KL
    recovered, as a flat dict. by_row: of `scores_by_row`."""
    rows = [by_row[name], by_row[ablation], by_row["original"]]
    statistics = dict(ce_recovered_within=ce_recovered_of, kl_within=kl_of,
                      kl_recovered_within=kl_recovered_of)
    out = {}
    for key, statistic in statistics.items():
        low, high = interval(statistic, *rows)
        out[key] = (high - low) / 2
    return out


# ------------------------------------------------------------------------------- scores as text
def share_text(value):
    return "      n/a" if value is None else f"{value:9.3f}"


def score_lines(table, names):
    """Write the rows `names` of a table of `scores` as lines of text, with a head if "original" is
    one of them."""
    lines = []
    if "original" in names:
        lines.append(f"{'':20}{'KL':>9}{'CE':>9}   CE recovered (mean, zero ablation = 0)")
    for name in names:
        row = table[name]
        of_mean = share_text(recovered(table, name))
        of_zero = share_text(recovered(table, name, "zero ablation"))
        lines.append(f"{name:20}{row['kl']:9.4f}{row['ce']:9.4f}{of_mean}{of_zero}")
    return lines


def score_keys(table):
    """Flatten a table of `scores`: ce_NAME, kl_NAME, ce_recovered_NAME, kl_recovered_NAME, and
    ce_recovered_zero_NAME, whose floor is zero ablation."""
    out = {}
    for name, row in table.items():
        numbers = dict(row)
        numbers["ce_recovered"] = recovered(table, name)
        numbers["kl_recovered"] = recovered(table, name, of="kl")
        numbers["ce_recovered_zero"] = recovered(table, name, "zero ablation")
        for key, number in numbers.items():
            out[f"{key}_{name.replace(' ', '_')}"] = number
    return out


# --------------------------------------------------------- what is rebuilt, and with how much
@torch.no_grad()
def usage(m, gpt, layer, rows_RT, batch=16):
    """How much of an MLP's output does m rebuild on clean inputs, and how much of m does it take?

    fve            1 - E|y - y_hat|^2 / E|y - E y|^2: 1 = exact, 0 = no better than the mean
    shrinkage      mean |y_hat| / |y|: below 1 = m writes too little
    l0             units that are on (f > 0), per token
    active_params  parameters of those units, and m.always_params, per token"""
    ys = []
    wrong = 0
    size = 0
    on = 0
    params = 0
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        y_BTD = gpt.mlp(layer)(x_BTD)
        y_hat_BTD = m.decode(layer, f_BTF, x_BTD)

        # errors and lengths, added up in double precision
        error_BTD = (y_BTD - y_hat_BTD)[:, 1:]
        wrong += error_BTD.double().square().sum().item()
        ratio_BT = (y_hat_BTD.norm(dim=-1) / y_BTD.norm(dim=-1))[:, 1:]
        size += ratio_BT.double().sum().item()
        ys.append(y_BTD[:, 1:].flatten(0, 1))

        # what was in use
        on_BTF = f_BTF[:, 1:] > 0
        on += on_BTF.sum().item()
        params += (on_BTF * m.params_F.to(on_BTF.device)).sum().item()

    y_ND = torch.cat(ys).double()
    n = len(y_ND)
    spread = (y_ND - y_ND.mean(0)).square().sum().item()
    always = getattr(m, "always_params", 0)
    return dict(fve=1 - wrong / spread, shrinkage=size / n, l0=on / n,
                active_params=params / n + always)


@torch.no_grad()
def explained(pairs):
    """Which share of the variance of activations is rebuilt? 1 = all, 0 = no better than the mean.

    FVE = 1 - E|a - a_hat|^2 / E|a - E a|^2 over pairs, batches (a, a_hat) of shape (.., D)."""
    parts = []
    wrong = 0
    for a, a_hat in pairs:
        parts.append(a.flatten(0, -2).double())
        wrong = wrong + (a - a_hat).double().square().sum()
    a_ND = torch.cat(parts)
    return 1 - (wrong / (a_ND - a_ND.mean(0)).square().sum()).item()


def relative_error(W_hat, W):
    """How far is a matrix from what it should be? |W_hat - W| / |W|, Frobenius: 0 = exact."""
    return ((W_hat - W).norm() / W.norm()).item()


def index_bits(n, l0):
    """How many bits name a token's units among the n alive ones? log2 of n choose l0.

    That is log2 of n! / (l0! (n - l0)!), by the gamma function, since l0 may be a mean."""
    factorials = torch.tensor([n + 1., l0 + 1, n - l0 + 1], dtype=torch.float64)
    log_all, log_on, log_off = factorials.lgamma()
    return (log_all - (log_on + log_off)).item() / math.log(2)


# ------------------------------------------------------------------------------ units and concepts
@torch.no_grad()
def counts(m, gpt, rows_RT, labels_RTK, thresholds, batch=16):
    """At how many tokens is each unit on, each concept true, and both? On is f > threshold, for
    each of the thresholds.

    Returns on (A, F), label (K), both (A, F, K) and n, the number of tokens. These suffice for L0,
    alive units and the F1 of every unit with every concept; memory is that of one batch."""
    layer, = m.layers
    out = dict(on=0, label=0, both=0, n=0)
    labels = torch.as_tensor(labels_RTK)
    for idx_BT, label_BTK in zip(split_rows(rows_RT, batch), split_rows(labels, batch)):
        _, f_BTF = clean(m, gpt, idx_BT, layer)
        f_NF = f_BTF[:, 1:].flatten(0, 1)
        label_NK = label_BTK[:, 1:].flatten(0, 1).to(f_NF)
        on_ANF = torch.stack([(f_NF > threshold).float() for threshold in thresholds])
        out["on"] += on_ANF.sum(1)
        out["label"] += label_NK.sum(0)
        out["both"] += on_ANF.transpose(1, 2) @ label_NK
        out["n"] += len(f_NF)
    return out


def f1_scores(on, label, both):
    """How well does "on" tell where a label is true? F1 of precision and recall, from counts of
    tokens: 1 = on exactly there, 0 = never there."""
    return 2 * both / (on + label).clamp(min=1)


def f1_of_counts(counted):
    """F1 (A, F, K) of each unit with each concept, at each threshold."""
    return f1_scores(counted["on"].unsqueeze(-1), counted["label"], counted["both"])


class Matched(NamedTuple):
    """The best concept of each unit."""
    concept_F: torch.Tensor         # number of the concept
    f1_F: torch.Tensor              # on test


def match(fit, test, at=0):
    """Which concept does each unit stand for? The one of highest F1 in the counts of fit, and its
    F1 in the counts of test, as Matched. None without concepts.

    at: number of the threshold above which a unit counts as on. Concepts true at a share of tokens
    below RARE or above DENSE do not count."""
    share_K = fit["label"] / fit["n"]
    testable_K = (share_K >= RARE) & (share_K <= DENSE)
    if not testable_K.any():
        return None
    concept_F = (f1_of_counts(fit)[at] * testable_K).argmax(1)
    units = torch.arange(len(concept_F), device=concept_F.device)
    return Matched(concept_F, f1_of_counts(test)[at, units, concept_F])


@torch.no_grad()
def examples(m, gpt, rows_RT, units, k=3, batch=4):
    """Where do these units write most, and what do they write on average?

    Returns the k = J tokens of largest |contrib| of each unit, at most one of a row, as (row,
    position): (U, J, 2); and each unit's mean contribution to y where it is on: (U, D)."""
    layer, = m.layers
    sizes = []
    places = []
    total_UD = 0
    n_U = 0
    for idx_BT in split_rows(rows_RT, batch):
        x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
        c_BTUD = m.contrib(layer, f_BTF, x_BTD, units)[:, 1:]
        on_BTU = f_BTF[:, 1:, units] > 0
        total_UD = total_UD + torch.einsum("btud,btu->ud", c_BTUD, on_BTU.float())
        n_U = n_U + on_BTU.sum((0, 1))
        largest = c_BTUD.norm(dim=-1).max(1)                # of each row
        sizes.append(largest.values)
        places.append(largest.indices + 1)                  # position 0 was cut off

    size_RU = torch.cat(sizes)
    place_RU = torch.cat(places)
    row_JU = size_RU.topk(min(k, len(rows_RT)), 0).indices
    spot_JU2 = torch.stack([row_JU, place_RU.gather(0, row_JU)], -1)
    mean_UD = total_UD / n_U.clamp(min=1).unsqueeze(-1)
    return spot_JU2.transpose(0, 1), mean_UD


def pushed(gpt, write_UD, k=5):
    """Which tokens do directions in the stream make more and less likely? Ids of the k logits that
    each direction raises most and lowers most, two of shape (U, k), by the direct path alone."""
    # to the logits past all layers above: the gain of the last LayerNorm, then the unembedding
    logits_UV = (write_UD * gpt.ln_f.weight) @ gpt.unembedding.T
    return logits_UV.topk(k).indices, (-logits_UV).topk(k).indices


def as_list(gpt, ids):
    """Write tokens one by one, those that hold spaces in quotes."""
    return " ".join(f"'{token}'" if " " in token else token for token in data.spell(ids, gpt.vocab))


def in_context(gpt, row, t):
    """Write the token at position t of a row in [[ ]], among its neighbours, on one line."""
    parts = [row[max(0, t - 8):t], row[t:t + 1], row[t + 1:t + 5]]
    if data.has_spaces(gpt.vocab):           # these tokens have spaces of their own
        before, here, after = [data.printable(data.decode(ids, gpt.vocab)) for ids in parts]
        return f"{before}[[{here}]]{after}"
    before, here, after = [" ".join(data.spell(ids, gpt.vocab)) for ids in parts]
    return f"{before} [[{here}]] {after}"


def passage(ids, t):
    """What stands at position t, and just around it: rows overlap, so that a sentence may be there
    twice."""
    return tuple(ids[max(0, t - 3):t + 2])


def clipped(text, width=WIDTH):
    """Cut a text to a width, around the [[ in it if there is one."""
    if len(text) <= width:
        return text
    start = max(0, min(text.find("[[") - width // 2, len(text) - width))
    cut = text[start:start + width]
    if start:
        cut = "…" + cut[1:]
    return cut if start + width >= len(text) else cut[:-1] + "…"


def unit_line(gpt, head, up, down):
    """One line about a unit: a head, and as many of the tokens that it pushes as there is room
    for."""
    for n in range(len(up), 0, -1):
        line = f"{head}   up: {as_list(gpt, up[:n])}   down: {as_list(gpt, down[:n])}"
        if len(line) <= WIDTH:
            return line
    return clipped(line)


def describe(m, gpt, rows_RT, units, frequency_F, matched, names, n_contexts):
    """Say in lines of text what some units do: how often each is on, its best concept, the tokens
    that its mean contribution pushes up and down, and its strongest tokens in context, in [[ ]].

    matched: of `match`, or None; names: of the concepts; n_contexts: how many tokens of each."""
    if not len(units):
        return []
    # twice as many as are shown, since some may be of one text
    spots_UJ2, write_UD = examples(m, gpt, rows_RT, units, 2 * max(1, *n_contexts))
    up_UJ, down_UJ = pushed(gpt, write_UD)
    lines = []
    for i, u in enumerate(units.tolist()):
        head = f"#{u}: on at {frequency_F[u]:.2%}"
        if matched:
            head += f", {names[matched.concept_F[u]]} (F1 {matched.f1_F[u]:.2f})"
        lines.append(unit_line(gpt, head, up_UJ[i].tolist(), down_UJ[i].tolist()))
        told = {}
        for r, t in spots_UJ2[i].tolist():
            row = rows_RT[r].tolist()
            told.setdefault(passage(row, t), in_context(gpt, row, t))
        for text in [*told.values()][:n_contexts[i]]:
            lines.append("    " + clipped(text, WIDTH - 4))
    return lines


def some_of(alive, rank_U, frequency_F, k):
    """Which units are told of? Of the alive ones the k of highest rank, k others drawn at random,
    and of all others the DENSEST that are on most."""
    best = alive[rank_U.topk(min(k, len(alive))).indices]
    rest = alive[~torch.isin(alive, best)]
    by_density = rest[frequency_F[rest].argsort(descending=True, stable=True)]
    densest = by_density[:DENSEST]
    others = rest[~torch.isin(rest, densest)]
    picks = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:k]
    return best, others[picks.to(others.device)], densest


def tell(m, gpt, rows_RT, alive, frequency_F, matched, names, k):
    """Say what units are like: the k best with where they are strongest, k others at random, and
    the densest; for k = 10 in 38 lines or fewer. Without concepts the best are the most used."""
    head = f"of {len(alive)} alive units, the most used:"
    rank_U = frequency_F[alive]
    if matched:
        rank_U = matched.f1_F[alive]
        n_matched = rank_U.ge(0.5).sum().item()
        head = f"{n_matched} of {len(alive)} alive units match a concept at F1 >= 0.5; the best:"
    best, others, densest = some_of(alive, rank_U, frequency_F, k)

    # where they are on: three times of the first, once of the other best
    n_contexts = [0] * (len(best) + len(others) + len(densest))
    n_contexts[:len(best)] = [1] * len(best)
    n_contexts[:1] = [3] * len(best[:1])
    units = torch.cat([best, others, densest])
    told = describe(m, gpt, rows_RT, units, frequency_F, matched, names, n_contexts)
    end = len(told) - len(others) - len(densest)
    lines = [head, *told[:end], "at random:", *told[end:end + len(others)]]
    return [*lines, "the densest, which tell least:", *told[end + len(others):]]


# ------------------------------------------------------------------------------------- reports
def report(m, gpt, fit, test, names, groups, thresholds, main, k=10):
    """What are the units like? (lines of text, flat dict) about groups, {name: numbers of units}.

    l0_NAME       units on per token of test, at thresholds[main]; l0s_NAME, at each threshold
    alive_NAME    units on at ALIVE tokens of fit or more, at thresholds[main]; alives_NAME, at each
    concept_matched_fraction    share of the alive units of all groups that have a concept at F1 >=
                                0.5, chosen on fit and scored on test; None without concepts

    The text is that of `tell`, on the alive units of all groups. fit, test: (rows_RT, labels_RTK);
    names: of the concepts."""
    on_fit = counts(m, gpt, *fit, thresholds)
    on_test = counts(m, gpt, *test, thresholds)
    matched = match(on_fit, on_test, main)
    frequency_F = on_test["on"][main] / on_test["n"]

    lines = []
    out = {}
    parts = []                      # the alive units of each group
    for name, units in groups.items():
        # how many are on, and how many ever
        alive_AU = on_fit["on"][:, units] >= ALIVE
        parts.append(units[alive_AU[main]])
        n_alive = alive_AU.sum(1).tolist()
        l0 = (on_test["on"][:, units].sum(1) / on_test["n"]).tolist()
        out |= {f"l0_{name}": l0[main], f"alive_{name}": n_alive[main]}
        out |= {f"l0s_{name}": l0, f"alives_{name}": n_alive}
        rounded = [round(value, 2) for value in l0]
        lines.append(f"{name}: at thresholds {thresholds} L0 {rounded}, alive {n_alive}")

    # what they mean
    alive = torch.cat(parts)
    out["concept_matched_fraction"] = None
    if matched:
        is_named = matched.f1_F[alive] >= 0.5
        out["concept_matched_fraction"] = is_named.sum().item() / max(1, len(alive))
    return lines + tell(m, gpt, test[0], alive, frequency_F, matched, names, k), out


def replacement(m, gpt, layer, fit, test, names, units="units"):
    """How well does a method that replaces one MLP do? (lines of text, flat dict): `scores` with
    `interval_over_stories`, `usage`, `report`, index_bits, and dead_fraction, the share of units
    that are not alive on fit.

    fit, test: (rows_RT, labels_RTK); units: what the method calls them."""
    # in the model, beside the ablations
    replaces = ablations(gpt, layer, fit[0]) | {"replaced": splice(m)}
    by_row = scores_by_row(gpt, test[0], replaces)
    table = per_token(by_row)

    # on clean inputs
    used = usage(m, gpt, layer, test[0])
    n_units = len(m.params_F)
    groups = {units: torch.arange(n_units, device=test[0].device)}
    lines, out = report(m, gpt, fit, test, names, groups, thresholds=(0,), main=0)

    out |= score_keys(table) | interval_over_stories(by_row, "replaced") | used
    out["ce_recovered"] = out.pop("ce_recovered_replaced")
    n_alive = out[f"alive_{units}"]
    out["dead_fraction"] = 1 - n_alive / n_units
    # more units can be on at a token of test than are alive on fit
    out["index_bits"] = index_bits(max(n_alive, used["l0"]), used["l0"])
    head = (f"FVE {used['fve']:.3f}, L0 {used['l0']:.1f}, "
            f"{used['active_params']:,.0f} active parameters per token, "
            f"{out['dead_fraction']:.1%} of {n_units} {units} dead")
    return [*score_lines(table, table), head, *lines], out


# --------------------------------------------------------------------------------- in the table
COLUMNS = {
    "ce_recovered": Column(
        "CE rec", "up", beat=0, digits=3, table="faithful",
        text="share of the cross-entropy that mean-ablating the MLP costs which the units on win "
             "back alone; 1 is all, n/a where it costs under 0.05 nats"),
    "kl_recovered": Column(
        "KL rec", "up", beat=0, digits=3, table="faithful",
        text="share of the divergence from the original predictions that mean-ablating the MLP "
             "brings which the units on take away alone; 1 is all, n/a where CE rec is"),
    "kl": Column(
        "KL", "down", beat="mean ablation", digits=4, table="faithful",
        text="divergence from the original predictions, nats per token"),
    "fve": Column(
        "FVE", "up", beat="pca", digits=3, table="faithful",
        text="1 - E|y - y_hat|^2 / E|y - E y|^2 of the MLP's output y"),
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
    "concept_matched_fraction": Column(
        "matched", "up", beat="random", digits=3, table="concepts",
        text="share of the alive units that match a concept, F1 0.5 or more"),
}


def measure(m, arena, gen):
    """How well does m do the work of its MLP, and with how much? (numbers, details), as
    metrics/columns.py says. Draws nothing from gen. Four passes through the model, three through m
    on clean inputs."""
    _, found = replacement(m, arena.gpt, arena.layer, arena.fit, arena.test, arena.names)
    found["kl"] = found["kl_replaced"]
    found["kl_recovered"] = found["kl_recovered_replaced"]
    return columns.split(COLUMNS, found)
