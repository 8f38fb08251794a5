"""Metrics of one decomposition of a model's MLPs: pure functions, the same for every method.

The seam that a decomposition m offers (duck-typed):
    m.kind                                        "dictionary", "component" (of a weight matrix) or "map"
    m.matrices                                    the matrices whose parts its units are, as many of each; else ()
    m.layers: list[int]                           MLPs that it stands in for
    m.params_F                                    parameters of each unit
    m.encode(layer, x_BTD, mlp) -> f_BTF          >= 0, exactly 0 = off for this token
    m.decode(layer, f_BTF, x_BTD) -> y_BTD        what those units write
    m.contrib(layer, f_BTF, x_BTD, units) -> (B, T, units, D)      each named unit's own share of y
    m.unit_directions() -> [(name, read, write, ranks)]     blocks of units that could be each other's equals, in order:
                                                  what they read and write, a row each, or ranks[i] rows for unit i
    m.unit_inputs(gpt, rows_RT) -> [x_ND]         of each block, what its units' reads are multiplied with on some rows
    module.load(path, gpt) -> m                   from a checkpoint, as it is evaluated
    m.reads: list[int]                            MLPs whose encode it needs, in order; without it, m.layers (a CLT's
                                                  encode returns the units of all layers so far: they write here)
    m.strength(layer, f_BTF, x_BTD) -> a_BTF      what a unit says, signed, where it is on (recording.py); without it, f
x = the MLP's input after LayerNorm, y = its output. Position 0 of a row counts in no metric.
Costs are for the bundled target on two cores: a pass of one replace over 50,000 tokens takes about 4 s.
R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual width, F units, K concepts, V vocabulary
"""
import math

import torch
import torch.nn.functional as F

RARE, DENSE = 0.002, 0.3    # shares of the tokens between which a concept says something
ALIVE = 10              # a unit is alive when it is on at this many tokens or more

def splice(m, edit=lambda layer, f_BTF: f_BTF, keep_error=False):
    """The one way a decomposition enters the model: replace for GPT.forward. Ablation and steering are edits of f.
    keep_error: what m does not explain stays, y - decode(f) + decode(edit(f))."""
    def replace(layer, x_BTD, mlp):
        f_BTF = m.encode(layer, x_BTD, mlp) if layer in reads(m) else None
        if layer not in m.layers:
            return mlp(x_BTD)
        y_BTD = m.decode(layer, edit(layer, f_BTF), x_BTD)
        return y_BTD + mlp(x_BTD) - m.decode(layer, f_BTF, x_BTD) if keep_error else y_BTD
    return replace

def reads(m):
    return getattr(m, "reads", m.layers)

@torch.no_grad()
def clean(m, gpt, idx_BT, layer):
    """(x_BTD, f_BTF) at one of m's layers when the model runs unspliced."""
    first = min([layer, *reads(m)])
    x_BTD, r_BTD = gpt.prefix(idx_BT, first)
    for l in range(first, layer):
        if l in reads(m):
            m.encode(l, x_BTD, gpt.h[l].mlp)
        x_BTD, r_BTD = gpt.h[l + 1].to_mlp(r_BTD + gpt.h[l].mlp(x_BTD))
    return x_BTD, m.encode(layer, x_BTD, gpt.h[layer].mlp)

@torch.no_grad()
def mean_output(gpt, layer, rows_RT, batch=16):
    """E[y] of one MLP, (D)."""
    return torch.cat([gpt.h[layer].mlp(gpt.prefix(idx, layer)[0])[:, 1:].flatten(0, 1).mean(0, keepdim=True) * len(idx)
                      for idx in rows_RT.split(batch)]).sum(0) / len(rows_RT)

def ablations(gpt, layer, rows_fit_RT):
    """The floor of every table: one MLP's output replaced by zero, and by its mean over rows_fit."""
    y_D = mean_output(gpt, layer, rows_fit_RT)
    put = lambda value: lambda l, x_BTD, mlp: value.expand_as(x_BTD) if l == layer else mlp(x_BTD)
    return {"mean ablation": put(y_D), "zero ablation": put(torch.zeros_like(y_D))}

@torch.no_grad()
def scores_by_row(gpt, rows_RT, replaces, batch=16):
    """{name: (R, 2)}: mean next-token CE and KL(original || spliced) in nats of each row, for the original model and
    each replace(layer, x, mlp) -> y. All at the same positions, 1 to T - 2, which have a next token in the row."""
    out = {name: [] for name in ("original", *replaces)}
    for idx in rows_RT.split(batch):
        logp = None
        for name, replace in {"original": None, **replaces}.items():
            logq = F.log_softmax(gpt(idx, replace)[:, 1:-1].float(), -1)
            logp = logq if name == "original" else logp
            out[name].append(divergence(idx, logp, logq).double().mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in out.items()}

def divergence(idx_BT, logp_BSV, logq_BSV):
    """(B, S, 2): CE of the next token under q, KL(p || q)."""
    ce_BS = -logq_BSV.gather(-1, idx_BT[:, 2:].unsqueeze(-1)).squeeze(-1)
    same = logp_BSV is logq_BSV
    return torch.stack([ce_BS, 0 * ce_BS if same else (logp_BSV.exp() * (logp_BSV - logq_BSV)).sum(-1)], -1)

def per_token(by_row):
    """{name: {"ce", "kl"}}: the means of scores_by_row."""
    return {name: dict(zip(("ce", "kl"), row.mean(0).tolist())) for name, row in by_row.items()}

def scores(gpt, rows_RT, replaces, batch=16):
    return per_token(scores_by_row(gpt, rows_RT, replaces, batch))

@torch.no_grad()
def scores_at(gpt, layer, rows_RT, outputs, batch=16):
    """{name: (R, S, 2)}: CE and KL at each position for outputs(idx_BT, x_BTD) -> {name: y_BTD}, outputs of one MLP.
    For many edits of one layer: the prefix runs once for all of them."""
    out = {}
    for idx in rows_RT.split(batch):
        x_BTD, r_BTD = gpt.prefix(idx, layer)
        logp = F.log_softmax(gpt.suffix(r_BTD, gpt.h[layer].mlp(x_BTD), layer)[:, 1:-1].float(), -1)
        out.setdefault("original", []).append(divergence(idx, logp, logp))
        for name, y_BTD in outputs(idx, x_BTD).items():
            logq = F.log_softmax(gpt.suffix(r_BTD, y_BTD, layer)[:, 1:-1].float(), -1)
            out.setdefault(name, []).append(divergence(idx, logp, logq))
    return {name: torch.cat(parts) for name, parts in out.items()}

def recovered(table, name, ablation="mean ablation", of="ce"):
    """CE recovered = (CE_ablated - CE) / (CE_ablated - CE_original), or None where the MLP carries under 0.05 nats.
    of="kl": 1 - KL / KL_ablated."""
    cost = {k: table[ablation][k] - table["original"][k] for k in ("ce", "kl")}
    return (table[ablation][of] - table[name][of]) / cost[of] if cost["ce"] >= 0.05 else None

def interval(statistic, *rows, draws=1000, level=0.95, seed=0):
    """Percentile interval of statistic(*means) when whole rows (sequences) are drawn with replacement: the statistic,
    often a ratio, is taken anew of each draw's means. rows: tensors (R, ...) over the same rows; milliseconds."""
    R, gen = len(rows[0]), torch.Generator().manual_seed(seed)
    pick = torch.randint(R, (draws, R), generator=gen)
    weight = torch.zeros(draws, R, dtype=torch.float64).scatter_add_(1, pick, torch.ones(draws, R).double())
    values = statistic(*(torch.tensordot(weight / R, row.double(), 1) for row in rows))
    return torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()

def interval_over_stories(by_row, name, ablation="mean ablation"):
    """Half the 95 % intervals, over rows, of name's CE recovered, KL and KL recovered in scores_by_row: what the choice
    of the stories leaves open for one model. A flat dict."""
    rows = [by_row[n] for n in (name, ablation, "original")]
    of = dict(ce_recovered=lambda m, a, o: ((a - m) / (a - o))[:, 0], kl=lambda m, a, o: m[:, 1],
              kl_recovered=lambda m, a, o: 1 - m[:, 1] / a[:, 1])
    ends = {key: interval(statistic, *rows) for key, statistic in of.items()}
    return {f"{key}_within": (high - low) / 2 for key, (low, high) in ends.items()}

def score_lines(table, names):
    """The rows `names` of a table of scores as text."""
    share = lambda v: f"{v:9.3f}" if v is not None else "      n/a"
    head = [f"{'':20}{'KL':>9}{'CE':>9}   CE recovered (mean, zero ablation = 0)"] * ("original" in names)
    return head + [f"{n:20}{table[n]['kl']:9.4f}{table[n]['ce']:9.4f}{share(recovered(table, n))}"
                   f"{share(recovered(table, n, 'zero ablation'))}" for n in names]

def score_keys(table):
    """As a flat dict: kl_NAME, ce_NAME, ce_recovered_NAME, kl_recovered_NAME, and CE on the zero-ablation scale."""
    return {f"{k}_{n.replace(' ', '_')}": v for n in table for k, v in dict(
        table[n], ce_recovered=recovered(table, n), kl_recovered=recovered(table, n, of="kl"),
        ce_recovered_zero=recovered(table, n, "zero ablation")).items()}

@torch.no_grad()
def usage(m, gpt, layer, rows_RT, batch=16):
    """What m writes at one layer and with how much, on the clean inputs: fve = 1 - E|y - y_hat|^2 / E|y - E y|^2;
    shrinkage = mean |y_hat| / |y|; l0 and active_params, per token the units that are on (f > 0) and their parameters,
    m.always_params included, those of what is always on, such as a skip."""
    ys, wrong, l0, params, size = [], 0, 0, 0, 0
    for idx in rows_RT.split(batch):
        x_BTD, f_BTF = clean(m, gpt, idx, layer)
        y_BTD, y_hat_BTD, on_BTF = gpt.h[layer].mlp(x_BTD), m.decode(layer, f_BTF, x_BTD), f_BTF[:, 1:] > 0
        ys.append(y_BTD[:, 1:].flatten(0, 1))
        wrong += (y_BTD - y_hat_BTD)[:, 1:].double().square().sum().item()
        size += (y_hat_BTD.norm(dim=-1) / y_BTD.norm(dim=-1))[:, 1:].double().sum().item()
        l0, params = l0 + on_BTF.sum().item(), params + (on_BTF * m.params_F.to(on_BTF.device)).sum().item()
    y_ND = torch.cat(ys).double()
    n = len(y_ND)
    return dict(fve=1 - wrong / (y_ND - y_ND.mean(0)).square().sum().item(), shrinkage=size / n, l0=l0 / n,
                active_params=params / n + getattr(m, "always_params", 0))

def index_bits(n, l0):
    """log2 of n choose l0: what naming a token's units among the n alive ones costs, for a mean l0 as well."""
    a, b = torch.tensor([n + 1., l0 + 1, n - l0 + 1], dtype=torch.float64).lgamma().split([1, 2])
    return (a - b.sum()).item() / math.log(2)

@torch.no_grad()
def explained(pairs):
    """FVE over batches (a, a_hat) of any activations: 1 - E|a - a_hat|^2 / E|a - E a|^2."""
    a, wrong = zip(*((a.flatten(0, -2).double(), (a - a_hat).double().square().sum()) for a, a_hat in pairs))
    a_ND = torch.cat(a)
    return 1 - (sum(wrong) / (a_ND - a_ND.mean(0)).square().sum()).item()

def replacement(m, gpt, layer, fit, test, names, units="units"):
    """(lines of text, flat dict) about a method that replaces one MLP: CE recovered, FVE, L0, active parameters, dead
    units (on at fewer than ALIVE tokens of fit) and the report on its units. fit, test: (rows, labels)."""
    by_row = scores_by_row(gpt, test[0], ablations(gpt, layer, fit[0]) | {"replaced": splice(m)})
    table = per_token(by_row)
    used = usage(m, gpt, layer, test[0])
    every = torch.arange(len(m.params_F), device=test[0].device)
    lines, out = report(m, gpt, fit, test, names, {units: every}, (0,), 0)
    out |= score_keys(table) | interval_over_stories(by_row, "replaced") | used
    out["ce_recovered"] = out.pop("ce_recovered_replaced")
    out["dead_fraction"] = 1 - out[f"alive_{units}"] / len(m.params_F)
    out["index_bits"] = index_bits(max(out[f"alive_{units}"], used["l0"]), used["l0"])
    head = (f"FVE {used['fve']:.3f}, L0 {used['l0']:.1f}, {used['active_params']:,.0f} active parameters per token, "
            f"{out['dead_fraction']:.1%} of {len(m.params_F)} {units} dead")
    return [*score_lines(table, table), head, *lines], out

def relative_error(W_hat, W):
    """|W_hat - W| / |W|, Frobenius."""
    return ((W_hat - W).norm() / W.norm()).item()

@torch.no_grad()
def counts(m, gpt, rows_RT, labels_RTK, thresholds, batch=16):
    """Token counts, for each threshold tau with "on" meaning f > tau: on (tau, F), label (K), both (tau, F, K), and n.
    They suffice for L0, alive units and all F1 between units and concepts; memory is that of one batch."""
    layer, = m.layers
    out = dict(on=0, label=0, both=0, n=0)
    for idx, labels in zip(rows_RT.split(batch), torch.as_tensor(labels_RTK).split(batch)):
        f_NF = clean(m, gpt, idx, layer)[1][:, 1:].flatten(0, 1)
        label_NK = labels[:, 1:].flatten(0, 1).to(f_NF)
        on_ANF = torch.stack([(f_NF > tau).float() for tau in thresholds])
        out["on"] += on_ANF.sum(1)
        out["label"] += label_NK.sum(0)
        out["both"] += on_ANF.transpose(1, 2) @ label_NK
        out["n"] += len(f_NF)
    return out

def f1_scores(on, label, both):
    return 2 * both / (on + label).clamp(min=1)

def match(fit, test):
    """Each unit's best concept: the (threshold, concept) pair of highest F1 in the counts `fit`, and its F1 in `test`.
    Concepts true at under 0.2 % or over 30 % of the tokens of fit do not count.
    Returns tau index (F), concept (F), f1 (F); None without concepts."""
    f1 = lambda c: f1_scores(c["on"].unsqueeze(-1), c["label"], c["both"])
    if not fit["both"].shape[-1]:
        return None
    share_K = fit["label"] / fit["n"]
    usual_K = (share_K >= RARE) & (share_K <= DENSE)
    best_F = (f1(fit) * usual_K).permute(1, 0, 2).flatten(1).argmax(1)
    tau, concept = best_F // fit["both"].shape[-1], best_F % fit["both"].shape[-1]
    return tau, concept, f1(test)[tau, torch.arange(len(best_F), device=best_F.device), concept]

@torch.no_grad()
def examples(m, gpt, rows_RT, units, k=3, batch=4):
    """For each of `units`: its k strongest tokens by |contrib|, at most one a row, as (row, position) of shape
    (units, k), and its mean contribution to y where it is on (units, D)."""
    layer, = m.layers
    size, where, total, n = [], [], 0, 0
    for idx in rows_RT.split(batch):
        x_BTD, f_BTF = clean(m, gpt, idx, layer)
        c_BTUD = m.contrib(layer, f_BTF, x_BTD, units)[:, 1:]
        on_BTU = f_BTF[:, 1:, units] > 0
        total, n = total + torch.einsum("btud,btu->ud", c_BTUD, on_BTU.float()), n + on_BTU.sum((0, 1))
        top = c_BTUD.norm(dim=-1).max(1)
        size.append(top.values), where.append(top.indices + 1)
    row_KU = torch.cat(size).topk(min(k, len(rows_RT)), 0).indices
    spots = torch.stack([row_KU, torch.cat(where).gather(0, row_KU)], -1).transpose(0, 1)
    return spots, total / n.clamp(min=1).unsqueeze(-1)

def pushed(gpt, write_UD, k=5):
    """Token ids whose logits the directions write_UD raise and lower most, two of shape (U, k), by the direct path
    (write * gain of LN_f) wte^T."""
    logits_UV = (write_UD * gpt.ln_f.weight) @ gpt.wte.weight.T
    return logits_UV.topk(k).indices, (-logits_UV).topk(k).indices

def describe(m, gpt, rows_RT, units, frequency, matches, names, k=3):
    """Lines of text per unit: how often it is on, its best concept, the tokens that its mean contribution pushes up and
    down, and its strongest tokens in context, marked."""
    if not len(units):
        return []
    where, write_UD = examples(m, gpt, rows_RT, units, k)
    say = lambda ids: " ".join(repr(gpt.vocab[i])[1:-1] for i in ids)        # newlines stay on their line
    lines = []
    for u, spots, up, down in zip(units.tolist(), where.tolist(), *(t.tolist() for t in pushed(gpt, write_UD))):
        concept = f", {names[matches[1][u]]} (F1 {matches[2][u]:.2f})" if matches else ""
        lines.append(f"#{u}: on at {frequency[u]:.2%}{concept}   up: {say(up)}   down: {say(down)}")
        for r, t in spots:
            row = rows_RT[r].tolist()
            lines.append(f"    {say(row[max(0, t - 8):t])} [[{say(row[t:t + 1])}]] {say(row[t + 1:t + 5])}")
    return lines

def report(m, gpt, fit, test, names, groups, thresholds, main, k=10):
    """(lines of text, flat dict) about each named group of units: L0 (test) and alive units (fit) at each threshold,
    how many alive ones have a concept at F1 >= 0.5 (chosen on fit, scored on test), and the k alive ones that fit their
    concepts best, described; without concepts, the k most used.
    fit, test: (rows, labels); main: index of the threshold that counts."""
    found, seen = counts(m, gpt, *fit, thresholds), counts(m, gpt, *test, thresholds)
    matches, lines, out, good = match(found, seen), [], {}, []
    for name, units in groups.items():
        alive = found["on"][:, units] >= ALIVE
        l0, n = (seen["on"][:, units].sum(1) / seen["n"]).tolist(), alive.sum(1).tolist()
        good += matches[2][units][alive[main]].ge(0.5).tolist() if matches else []
        out |= {f"l0_{name}": l0[main], f"alive_{name}": n[main], f"l0s_{name}": l0, f"alives_{name}": n}
        lines.append(f"\n{name}: at thresholds {thresholds} L0 {[round(v, 2) for v in l0]}, alive {n}; "
                     f"{'best concepts' if matches else 'most used'}:")
        rank = matches[2][units] if matches else found["on"][main, units]
        top = units[rank.masked_fill(~alive[main], -1).topk(min(k, n[main])).indices]
        lines += describe(m, gpt, test[0], top, seen["on"][main] / seen["n"], matches, names)
    out["concept_matched_fraction"] = sum(good) / max(1, len(good)) if matches else None
    if matches:
        lines.append(f"\n{sum(good)} of {len(good)} alive units match a concept at F1 >= 0.5")
    return lines, out
