"""Metrics of one decomposition of a model's MLPs: pure functions, the same for every method.

The seam that a decomposition m offers (duck-typed):
    m.layers: list[int]                           MLPs that it stands in for
    m.params_F                                    parameters of each unit
    m.encode(layer, x_BTD, mlp) -> f_BTF          >= 0, exactly 0 = off for this token
    m.decode(layer, f_BTF, x_BTD) -> y_BTD        what those units write
    m.contrib(layer, f_BTF, x_BTD, units) -> (B, T, units, D)      each named unit's own share of y
    m.reads: list[int]                            MLPs whose encode it needs, in order; without it, m.layers (a CLT's
                                                  encode returns the units of all layers so far: they write here)
    m.strength(layer, f_BTF, x_BTD) -> a_BTF      what a unit says, signed, where it is on (units.py); without it, f
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

def within(by_row, name, ablation="mean ablation"):
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

def error_pathology(m, gpt, rows_RT, gen, draws=5):
    """KL of the spliced model over its KL when the errors point at random with the same size at each token (Gurnee
    2024): 1 = as harmless as noise, higher is worse; None without an error. Costs draws + 1 passes."""
    def random_error(layer, x_BTD, mlp):
        y_BTD = mlp(x_BTD)
        error, noise = splice(m)(layer, x_BTD, mlp) - y_BTD, torch.randn(y_BTD.shape, generator=gen).to(y_BTD)
        return y_BTD + noise * error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    table = scores(gpt, rows_RT, {"spliced": splice(m)} | {f"random {i}": random_error for i in range(draws)})
    noise = sum(row["kl"] for name, row in table.items() if name.startswith("random")) / draws
    return table["spliced"]["kl"] / noise if noise > 1e-9 else None

def completeness(m, gpt, rows_fit_RT, rows_RT):
    """1 - R_err, R_err = CE recovered by the errors alone, y_err = E_fit[y_hat] + (y - y_hat): 1 = what m leaves out
    is worth no more than the mean, 0 = m need not be there. Errors that do harm score 1 too: read it beside CE
    recovered. None where the MLP is worth too little. Three passes."""
    layer, = m.layers
    mean_D, n = 0, rows_fit_RT.shape[0] * (rows_fit_RT.shape[1] - 1)
    with torch.no_grad():
        for idx in rows_fit_RT.split(16):
            x_BTD, f_BTF = clean(m, gpt, idx, layer)
            mean_D = mean_D + m.decode(layer, f_BTF, x_BTD)[:, 1:].sum((0, 1)) / n
    def error_alone(l, x_BTD, mlp):
        y_hat_BTD = splice(m)(l, x_BTD, mlp)
        return mean_D + mlp(x_BTD) - y_hat_BTD if l == layer else y_hat_BTD
    r_err = recovered(scores(gpt, rows_RT, ablations(gpt, layer, rows_fit_RT) | {"err": error_alone}), "err")
    return None if r_err is None else 1 - min(1, max(0, r_err))

def attribution(m, gpt, idx_BT, layer):
    """x_BTD, f_BTF and a_BTF = f d(CE of the row) / d f through m.decode: to first order, what each unit is worth."""
    x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
    with torch.enable_grad():
        y_BTD, r_BTD = gpt.h[layer].mlp(x_BTD).requires_grad_(), gpt.prefix(idx_BT, layer)[1]
        logits = gpt.suffix(r_BTD, y_BTD, layer)[:, 1:-1]
        dy_BTD, = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), idx_BT[:, 2:].flatten(), reduction="sum"),
                                      y_BTD)
        f_BTF = f_BTF.detach().requires_grad_()
        df_BTF, = torch.autograd.grad((m.decode(layer, f_BTF, x_BTD) * dy_BTD).sum(), f_BTF)
    return x_BTD, f_BTF.detach(), (f_BTF * df_BTF).detach()

@torch.no_grad()
def ladder(m, gpt, rows_fit_RT, rows_RT, ks=(1, 2, 5, 10, 20)):
    """With C = the k units of each token that |attribution| puts first, of each matrix where units are components of
    two, since one matrix alone writes a constant (Marks et al. 2024, arXiv:2403.19647, mean ablation): faith(k) = CE
    recovered by C alone, without error; comp(k) = CE recovered by all but C, error kept: LOW means that C mattered.
    Means are restored from fit. {"faith": {k: ..}, "comp": {k: ..}, "faith_auc", "comp_auc"}, areas over log k.
    4 s + 1 s per k on 64 + 64 rows."""
    layer, = m.layers
    mlp, matrices = gpt.h[layer].mlp, 2 if hasattr(m, "site") else 1
    def parts(idx):         # {name: what is written}, means not yet restored
        x_BTD, f_BTF, a_BTF = attribution(m, gpt, idx, layer)
        y_BTD, out, worth = mlp(x_BTD), {}, a_BTF.abs().unflatten(-1, (matrices, -1))
        for k in ks:
            kept = torch.zeros_like(worth).scatter_(-1, worth.topk(min(k, worth.shape[-1])).indices, 1.).flatten(-2)
            out["faith", k] = m.decode(layer, f_BTF * kept, x_BTD)
            out["comp", k] = y_BTD - m.decode(layer, f_BTF, x_BTD) + m.decode(layer, f_BTF * (1 - kept), x_BTD)
        return y_BTD, out
    shift, R = dict.fromkeys([(name, k) for name in ("faith", "comp") for k in ks], 0), len(rows_fit_RT)
    for idx in rows_fit_RT.split(8):
        y_BTD, out = parts(idx)
        shift = {key: v + (y_BTD - out[key])[:, 1:].mean((0, 1)) * len(idx) / R for key, v in shift.items()}
    empty_D = mean_output(gpt, layer, rows_fit_RT)
    found = scores_at(gpt, layer, rows_RT, lambda idx, x: {"none": empty_D.expand_as(x)} | {
        key: y + shift[key] for key, y in parts(idx)[1].items()}, batch=8)
    ce = {key: v[..., 0].mean().item() for key, v in found.items()}
    if ce["none"] - ce["original"] < 0.05:
        return None
    share = lambda key: (ce["none"] - ce[key]) / (ce["none"] - ce["original"])
    out = {name: {k: share((name, k)) for k in ks} for name in ("faith", "comp")}
    log_k = torch.tensor(ks, dtype=torch.float64).log()
    area = lambda curve: (torch.trapezoid(torch.tensor(list(curve.values())).double(), log_k)
                          / (log_k[-1] - log_k[0])).item()
    return out | {f"{name}_auc": area(curve) for name, curve in out.items()}

@torch.no_grad()
def concept_ablation(m, gpt, rows_RT, labels_RTK, units_KU):
    """Switches off U units of m for each concept, errors kept, and takes what that adds to the CE. {"on": (K) nats at
    the concept's tokens, "off": (K) at all others}; selectivity = on - off. Its null: other units that are on as often
    (units.like). 1 s per concept on 32 rows."""
    layer, = m.layers
    def outputs(idx, x_BTD):
        f_BTF = clean(m, gpt, idx, layer)[1]
        rest_BTD = gpt.h[layer].mlp(x_BTD) - m.decode(layer, f_BTF, x_BTD)
        return {k: rest_BTD + m.decode(layer, f_BTF.index_fill(-1, off, 0), x_BTD) for k, off in enumerate(units_KU)}
    found, label_RSK = scores_at(gpt, layer, rows_RT, outputs), torch.as_tensor(labels_RTK)[:, 1:-1].to(rows_RT.device)
    cost_KRS = torch.stack([found[k][..., 0] - found["original"][..., 0] for k in range(len(units_KU))])
    where = label_RSK.permute(2, 0, 1).float()
    mean = lambda w: (cost_KRS * w).sum((1, 2)) / w.sum((1, 2))
    return dict(on=mean(where), off=mean(1 - where))

def steered(gpt, layer, idx_BT, push_BD):
    """Logits when every position's stream after one MLP is moved by push, a share of its own length."""
    x_BTD, r_BTD = gpt.prefix(idx_BT, layer)
    y_BTD = gpt.h[layer].mlp(x_BTD)
    return gpt.suffix(r_BTD, y_BTD + (r_BTD + y_BTD).norm(dim=-1, keepdim=True) * push_BD.unsqueeze(1), layer)

@torch.no_grad()
def steer(gpt, layer, prompts_PT, push_UD, target_UV, new, seed=0):
    """Pushes of the stream towards sets of tokens, P prompts each, unpushed ones as the yardstick. p = distribution
    after the prompt, M = probability of the set in it. (U) each:
      c = (M' - M) / (1 - M), at least 0        success
      f = exp(-max(0, NLL' - NLL))              fluency: unpushed NLL of `new` tokens sampled with and without the push
      q = exp(-KL(p || p') off the set)         side effects, both renormalised without the set
    and S = their harmonic mean (the shape of AxBench, arXiv:2501.17148), M and M'. Both samples use the same dice."""
    (P, T), U = prompts_PT.shape, len(push_UD)
    push_BD = torch.cat([torch.zeros_like(push_UD[:1]), push_UD]).repeat_interleave(P, 0)
    idx = prompts_PT.repeat(U + 1, 1)
    dice = torch.rand(P, new, generator=torch.Generator().manual_seed(seed)).repeat(U + 1, 1).to(idx.device)
    for i in range(new):
        p_BV = torch.cat([steered(gpt, layer, some, push)[:, -1].softmax(-1)
                          for some, push in zip(idx.split(256), push_BD.split(256))])
        first = p_BV.view(U + 1, P, -1) if i == 0 else first
        word = (p_BV.cumsum(-1) < dice[:, i:i + 1]).sum(-1).clamp(max=p_BV.shape[-1] - 1)
        idx = torch.cat([idx, word.unsqueeze(1)], 1)
    nll = torch.cat([F.cross_entropy(gpt(some)[:, T - 1:-1].transpose(1, 2), some[:, T:], reduction="none").mean(1)
                     for some in idx.split(256)]).view(U + 1, P).mean(1)
    inside = target_UV.unsqueeze(1).to(push_UD)
    M, M2 = ((p * inside).sum(-1).mean(1) for p in (first[:1], first[1:]))
    off, off2 = (F.normalize(p * (1 - inside), p=1, dim=-1).clamp(min=1e-12) for p in (first[:1], first[1:]))
    c, f = ((M2 - M) / (1 - M)).clamp(0, 1), (nll[0] - nll[1:]).clamp(max=0).exp()
    q = (-(off * (off / off2).log()).sum(-1).mean(1)).exp()
    return dict(S=3 / (1 / c + 1 / f + 1 / q), c=c, f=f, q=q, M=M, M2=M2)

def steering(gpt, layer, dev_PT, test_PT, direction_UD, target_UV, sizes=(.02, .05, .1, .2, .4, .8), new=8):
    """`steer` along unit directions, at each share of the stream's length on the dev prompts, and on the test prompts
    at the best of them for each direction: all directions are compared at the same norms. Adds size (U) and spearman
    (U), the rank correlation of M' with the size. 30 directions, 16 + 16 prompts: 50 s."""
    unit_UD = F.normalize(direction_UD, dim=-1)
    tried = [steer(gpt, layer, dev_PT, size * unit_UD, target_UV, new) for size in sizes]
    best = torch.stack([t["S"] for t in tried]).argmax(0)
    size = torch.tensor(sizes, device=unit_UD.device)[best]
    rank = lambda v: v.argsort(0).argsort(0).float()
    ranks_AU = rank(torch.stack([t["M2"] for t in tried]))
    spearman = torch.corrcoef(torch.cat([ranks_AU, rank(torch.arange(len(sizes))).to(size)[:, None]], 1).T)[-1, :-1]
    return steer(gpt, layer, test_PT, size.unsqueeze(1) * unit_UD, target_UV, new, seed=1) | dict(size=size,
                                                                                               spearman=spearman)

# Masks of a parameter decomposition (spd.py), whose m.site(masks, delta masks) computes the MLP's matrices under them.
def through(site, x_BTD):
    """The MLP's output by its two matrices."""
    return site(1, F.gelu(site(0, x_BTD), approximate="tanh"))

def replacing(m, masks):
    """replace(layer, x, mlp) for the masks that masks(gs) makes of the causal importances of the matrices."""
    def replace(layer, x_BTD, mlp):
        if layer not in m.layers:
            return mlp(x_BTD)
        return through(m.site(*masks(m.encode(layer, x_BTD, mlp).split(m.C, -1))), x_BTD)
    return replace

def mix(gs, source):
    """m = g + (1 - g) r of each matrix, and the delta's masks; source = [r of each, r_delta of each]."""
    return [g + (1 - g) * r for g, r in zip(gs, source)], source[len(gs):]

def mask_table(m, taus, gen):
    """The masks it is judged by, as replace functions. The delta is off, but for the stochastic ones."""
    rand = lambda like: torch.rand(like.shape, generator=gen, device=like.device)
    drop = lambda masks: replacing(m, lambda gs: ([masks(g) for g in gs], gs[0].new_zeros(len(gs), 1)))
    return {"unmasked": drop(torch.ones_like), "causal importance": drop(lambda g: g),
            **{f"rounded {tau}": drop(lambda g, tau=tau: (g > tau).float()) for tau in taus},
            "stochastic": replacing(m, lambda gs: mix(gs, [*map(rand, gs), *(rand(g[..., :1]) for g in gs)])),
            "random": drop(rand)}

def attack(m, gpt, rows_RT, gen, budgets=(0, 5, 20, 40, 80, 160), size=0.1, shared=True):
    """{steps: KL}: the worst sources r found within so many sign steps from a random start (0 steps: its null), the
    delta's among them. shared: one source per component for all positions of all rows; else one at each position.
    "size" x steps and the scope are part of the number. One step on 32 rows takes 0.5 s."""
    layer, = m.layers
    with torch.no_grad():
        (x_BTD, r_BTD), mlp = gpt.prefix(rows_RT, layer), gpt.h[layer].mlp
        logp = F.log_softmax(gpt.suffix(r_BTD, mlp(x_BTD), layer)[:, 1:-1], -1)
        gs = m.encode(layer, x_BTD, mlp).split(m.C, -1)
    lead = () if shared else x_BTD.shape[:2]
    source = [torch.rand(*lead, g.shape[-1] if i < len(gs) else 1, generator=gen, device=g.device)
              for i, g in enumerate([*gs, *gs])]
    worst, out = -torch.inf, {}
    for step in range(max(budgets) + 1):
        source = [s.requires_grad_() for s in source]
        y_BTD = through(m.site(*mix(gs, source)), x_BTD)
        logq = F.log_softmax(gpt.suffix(r_BTD, y_BTD, layer)[:, 1:-1], -1)
        kl = (logp.exp() * (logp - logq)).sum(-1).mean()
        worst = max(worst, kl.item())
        if step in budgets:
            out[step] = worst
        grads = torch.autograd.grad(kl, source)
        source = [(s.detach() + size * grad.sign()).clamp_(0, 1) for s, grad in zip(source, grads)]
    return out

def aggregation(m, gpt, rows_RT, gen, ks=(1, 8, 64), tau=0.1):
    """{k: KL with the components that are on (g > tau) at k random other tokens of the batch forced on, less the KL of
    the causal importances}. Such masks are permitted: the rise is 0 if importances hold jointly. len(ks) + 1 passes."""
    def forced(k):
        def masks(gs):
            n = gs[0][..., 0].numel()
            pick = torch.randint(n, (n, k), generator=gen, device=gs[0].device)
            on = [(g.flatten(0, -2) > tau)[pick].any(1).view_as(g).float() for g in gs]
            return mix(gs, on + [gs[0].new_zeros(1)] * len(gs))
        return replacing(m, masks)
    table = scores(gpt, rows_RT, {k: forced(k) for k in (0, *ks)}, batch=4)
    return {k: table[k]["kl"] - table[0]["kl"] for k in ks}

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

@torch.no_grad()
def spectrum(m, gpt, layer, rows_RT, batch=16):
    """Mean of each unit's f over the tokens, (F)."""
    total = sum(clean(m, gpt, idx, layer)[1][:, 1:].sum((0, 1)) for idx in rows_RT.split(batch))
    return total / (len(rows_RT) * (rows_RT.shape[1] - 1))

def index_bits(n, l0):
    """log2 of n choose l0: what naming a token's units among the n alive ones costs, for a mean l0 as well."""
    a, b = torch.tensor([n + 1., l0 + 1, n - l0 + 1], dtype=torch.float64).lgamma().split([1, 2])
    return (a - b.sum()).item() / math.log(2)

@torch.no_grad()
def benefits(m, gpt, layer, rows_RT, batch=4, chunk=16):
    """What each unit is worth at one layer on the clean inputs, (F): how much more squared error per token there is
    without it, E[|c|^2 + 2 c . (y - y_hat)] for its contribution c. Memory: chunk D floats a token of the batch."""
    total, every = 0, torch.arange(len(m.params_F), device=rows_RT.device)
    for idx in rows_RT.split(batch):
        x_BTD, f_BTF = clean(m, gpt, idx, layer)
        wrong_BTD = (gpt.h[layer].mlp(x_BTD) - m.decode(layer, f_BTF, x_BTD)).unsqueeze(-2)
        shares = (m.contrib(layer, f_BTF, x_BTD, units) for units in every.split(chunk))
        total = total + torch.cat([(c * (c + 2 * wrong_BTD))[:, 1:].sum((0, 1, 3)) for c in shares])
    return total / (len(rows_RT) * (rows_RT.shape[1] - 1))

def jacobian_cosine(m, gpt, layer, rows_RT):
    """How alike the Jacobians dy / dx of m and of the MLP are on the clean inputs: the mean over tokens of the cosine
    of the two as vectors, without the share jacobian_zero of the tokens where m's is zero; and the cosine over all
    tokens at once. Only for what reads x alone. Costs D backward passes; memory does not grow with them."""
    mlp, x_BTD = gpt.h[layer].mlp, clean(m, gpt, rows_RT, layer)[0]
    with torch.enable_grad():
        x_BTD.requires_grad_()
        ys = [y_BTD[:, 1:].unbind(-1) for y_BTD in (mlp(x_BTD), m.decode(layer, m.encode(layer, x_BTD, mlp), x_BTD))]
        dot = own = hat = 0         # per token: of the two Jacobians, of each with itself
        for y, y_hat in zip(*ys):
            J, J_hat = (torch.autograd.grad(v.sum(), x_BTD, retain_graph=True)[0][:, 1:] for v in (y, y_hat))
            dot, own, hat = dot + (J * J_hat).sum(-1), own + (J * J).sum(-1), hat + (J_hat * J_hat).sum(-1)
    some = hat > 0
    return dict(jacobian_cosine=(dot / (own * hat).sqrt())[some].mean().item(),
                jacobian_cosine_pooled=(dot.sum() / (own.sum() * hat.sum()).sqrt()).item(),
                jacobian_zero=1 - some.float().mean().item())

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
    out |= score_keys(table) | within(by_row, "replaced") | used
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
