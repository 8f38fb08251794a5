"""Do a parameter decomposition's importances hold under every ablation that they permit?

A decomposition of kind "component" (spd.py) says how important each component of a matrix is at
each token, g between 0 and 1. A component may be ablated by any amount that its importance leaves
open, mask = g + (1 - g) source with a source between 0 and 1. The predictions have to survive each
choice: the importances alone, random sources, the sources that an attack finds, and components
forced on.

    mask = g + (1 - g) source           g = 1 pins the mask, g = 0 leaves it open
    y = m.site(masks, rest_masks).mlp(x)

What a matrix's components leave of its weights, the rest, has a mask too, and no importance.

Importances, masks and sources come in lists, one tensor (.., C) for each matrix of m; those of the
rests are (.., 1). R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual
width, V vocabulary, F units, C units of one matrix, N tokens
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, NamedTuple

import torch

from evals import ablations, clean, score_keys, scores
from metrics import columns
from metrics.columns import Column
from model import split_rows

STEPS = 20              # sign steps of the attack that is reported, of this size each:
SIZE = 0.1


# ------------------------------------------------------------------------------ an MLP under masks
@dataclass
class Masked:
    """The MLP of a decomposition under masks, as GPT.forward takes it; made by `replacing`."""
    m: Any
    choose_masks: Callable

    def __call__(self, layer, x_BTD, mlp):
        """y_BTD of one MLP. The model calls this at every layer, lowest first."""
        if layer not in self.m.layers:
            return mlp(x_BTD)
        importance = self.m.encode(layer, x_BTD, mlp).split(self.m.C, -1)
        masks, rest_masks = self.choose_masks(importance)
        return self.m.site(masks, rest_masks).mlp(x_BTD)


def replacing(m, choose_masks):
    """Put an MLP under masks into the model: gpt(idx_BT, replacing(m, choose_masks)).

    choose_masks(importance) -> (masks, rest_masks), called once for each batch."""
    return Masked(m, choose_masks)


def masks_from(importance, sources):
    """Ablate what is unimportant by the amounts of the sources: (masks, rest_masks).

    sources: one for the components of each matrix, then one for the rest of each matrix."""
    masks = [g + (1 - g) * source for g, source in zip(importance, sources)]
    return masks, sources[len(importance):]


# --------------------------------------------------------------------- the masks that are compared
def without_rest(masks):
    """Switch off what the components leave of the weights: (masks, rest_masks)."""
    return masks, masks[0].new_zeros(len(masks), 1)


def random_like(tensors, gen):
    """Uniform numbers between 0 and 1 in the shape of each tensor."""
    return [torch.rand(t.shape, generator=gen, device=t.device) for t in tensors]


def all_on(importance):
    return without_rest([torch.ones_like(g) for g in importance])


def rounded(importance, threshold):
    return without_rest([(g > threshold).float() for g in importance])


def at_random(importance, gen):
    return without_rest(random_like(importance, gen))


def stochastic(importance, gen):
    sources = random_like(importance, gen)
    rest_sources = random_like([g[..., :1] for g in importance], gen)
    return masks_from(importance, sources + rest_sources)


def mask_table(m, thresholds, gen):
    """Which masks is m judged by? {name: replace}, in the order of the table.

    unmasked              every component on: how far their sum is from the weights
    causal importance     g as the mask
    rounded THRESHOLD     1 where g > threshold, else 0
    stochastic            random sources, also for the rest, which is off in all other masks
    random                random masks, whatever the importance: the floor"""
    choices = {"unmasked": all_on, "causal importance": without_rest}
    for threshold in thresholds:
        choices[f"rounded {threshold}"] = partial(rounded, threshold=threshold)
    choices["stochastic"] = partial(stochastic, gen=gen)
    choices["random"] = partial(at_random, gen=gen)
    return {name: replacing(m, choose_masks) for name, choose_masks in choices.items()}


# --------------------------------------------------------------------------------- the worst masks
class Attacked(NamedTuple):
    """A batch of rows that an attack is made on: its clean pass, and what may be ablated in it."""
    x_BTD: torch.Tensor
    importance: list            # of each matrix
    distance: Callable          # of the predictions from the clean ones, by the MLP's output


@torch.no_grad()
def attacked(m, gpt, idx_BT):
    layer, = m.layers
    mlp = gpt.mlp(layer)
    x_BTD, stream_BTD = gpt.prefix(idx_BT, layer)
    importance = m.encode(layer, x_BTD, mlp).split(m.C, -1)
    return Attacked(x_BTD, importance, gpt.distance_from(stream_BTD, mlp(x_BTD), layer))


def ascent(m, batches, sources):
    """How far off do some sources put the predictions, and which way is worse? (mean KL in nats at
    the scored positions, its gradient by each source).

    sources: for all tokens at once, (n), or of each, (R, T, n). Memory is that of one batch."""
    sources = [source.requires_grad_() for source in sources]
    R = sum(len(batch.x_BTD) for batch in batches)
    total = 0.
    grads = [torch.zeros_like(source) for source in sources]
    row = 0
    for batch in batches:
        B = len(batch.x_BTD)
        own = [source if source.ndim == 1 else source[row:row + B] for source in sources]
        row += B
        y_BTD = m.site(*masks_from(batch.importance, own)).mlp(batch.x_BTD)
        kl = batch.distance(y_BTD)[:, 1:-1].mean() * (B / R)
        total += kl.item()
        for grad, more in zip(grads, torch.autograd.grad(kl, sources)):
            grad += more
    return total, grads


def worst_sources(m, gpt, rows_RT, gen, budgets=(STEPS,), size=SIZE, shared=True):
    """Which sources put the predictions furthest off? ({steps: KL in nats}, sources).

    Sign-gradient ascent on the KL at the scored positions, from a random start, the sources of the
    rests among what it moves. The KL is the worst met within so many steps, for each of the
    budgets; the sources are the worst met at all. "Steps x size" and the scope are part of the
    number.

    shared: one source for each component at all positions of all rows; else one at each position.
    The evaluation attack of VPD (Goodfire 2026). One step on 32 rows takes 0.5 s."""
    batches = [attacked(m, gpt, idx_BT) for idx_BT in split_rows(rows_RT)]

    # a random start
    lead = () if shared else rows_RT.shape
    n_matrices = len(m.matrices)
    n_sources = [m.C] * n_matrices + [1] * n_matrices
    sources = [torch.rand(*lead, n, generator=gen, device=rows_RT.device) for n in n_sources]

    worst = -math.inf
    worst_met = sources
    ladder = {}
    for step in range(max(budgets) + 1):
        kl, grads = ascent(m, batches, sources)
        sources = [source.detach() for source in sources]
        if kl > worst:                          # a step of fixed size can lead down again
            worst = kl
            worst_met = sources
        if step in budgets:
            ladder[step] = worst
        # one step up
        moved = [source + size * grad.sign() for source, grad in zip(sources, grads)]
        sources = [source.clamp_(0, 1) for source in moved]
    return ladder, worst_met


def attack(m, gpt, rows_RT, gen, budgets=(0, 5, STEPS, 40, 80, 160), size=SIZE, shared=True):
    """How far off do the predictions get when an attacker picks the sources? {steps: KL in nats},
    from worst_sources. 0 steps, the random start, is the attack's null."""
    ladder, _ = worst_sources(m, gpt, rows_RT, gen, budgets, size, shared)
    return ladder


# ------------------------------------------------------------------- do importances hold together?
def forced(importance, k, threshold, gen):
    """Force on, at each token, the components that are on at k random tokens of the batch: (masks,
    rest_masks)."""
    device = importance[0].device
    N = importance[0][..., 0].numel()
    pick_NK = torch.randint(N, (N, k), generator=gen, device=device)
    sources = []
    for g in importance:
        on_NC = g.flatten(0, -2) > threshold
        sources.append(on_NC[pick_NK].any(1).view_as(g).float())
    rest_sources = [importance[0].new_zeros(1)] * len(importance)
    return masks_from(importance, sources + rest_sources)


def aggregation(m, gpt, rows_RT, gen, ks=(1, 8, 64), tau=0.1):
    """What do components that other tokens need do to the predictions of a token?

    At each token, the components that are on (g > tau) at k random tokens of the batch are forced
    on. Importances permit that, so the KL must not rise. Returns {k: KL less the KL under the
    importances as masks}: 0 = importances hold jointly. Costs len(ks) + 1 passes."""
    replaces = {}
    for k in (0, *ks):
        replaces[k] = replacing(m, partial(forced, k=k, threshold=tau, gen=gen))
    table = scores(gpt, rows_RT, replaces, batch=4)
    return {k: table[k]["kl"] - table[0]["kl"] for k in ks}


@torch.no_grad()
def spectrum(m, gpt, layer, rows_RT, batch=16):
    """How important is each unit on average? Mean of f over the tokens, (F)."""
    total_F = 0
    for idx_BT in split_rows(rows_RT, batch):
        _, f_BTF = clean(m, gpt, idx_BT, layer)
        total_F = total_F + f_BTF[:, 1:].sum((0, 1))
    R, T = rows_RT.shape
    return total_F / (R * (T - 1))


# --------------------------------------------------------------------------------- in the table
COLUMNS = {
    "ce_recovered_causal_importance": Column(
        "CE soft", "up", beat=0, digits=3, table="masks",
        text="CE rec under the causal importances as masks"),
    "ce_recovered_stochastic": Column(
        "CE stoch", "up", beat=0, digits=3, table="masks",
        text="CE rec when what is unimportant is ablated at random"),
    "kl_attack": Column(
        "KL attack", "down", beat=None, digits=4, table="masks",
        text="KL when what is unimportant is ablated by attack: 20 sign steps of 0.1, one source "
             "for all positions of 32 rows"),
    "attack_ratio": Column(
        "x soft", "", beat=None, digits=2, table="masks",
        text="KL attack over the KL of the causal importances as masks; small also where these "
             "importances are bad"),
    "kl_joint": Column(
        "KL joint", "", beat=None, digits=4, table="masks",
        text="KL added by forcing on what is on at 8 random other tokens; 0 if importances hold "
             "jointly, below 0 where they are bad"),
}


def measure(m, arena, gen):
    """Do m's importances hold under the ablations that they permit? (numbers, details), as
    metrics/columns.py says. Asked of components alone: for another kind of unit all is None."""
    if m.kind != "component":
        return columns.split(COLUMNS, {})
    raw = getattr(m, "raw", m)                  # importances between 0 and 1, where m rounds them
    gpt = arena.gpt
    rows_RT, _ = arena.test
    few_RT = rows_RT[:32]
    # masks are drawn on the device that uses them
    gen = torch.Generator(rows_RT.device).manual_seed(gen.initial_seed())

    # under each of the masks
    floor = ablations(gpt, arena.layer, arena.fit[0])
    table = scores(gpt, rows_RT, floor | mask_table(raw, m.thresholds, gen))
    found = score_keys(table)

    # under attack, beside the importances as masks on the rows that are attacked
    ladder = attack(raw, gpt, few_RT, gen)
    soft = replacing(raw, without_rest)
    kl_soft = scores(gpt, few_RT, {"soft": soft})["soft"]["kl"]
    found |= dict(attack=ladder, kl_attack=ladder[STEPS])
    found["attack_ratio"] = ladder[STEPS] / max(1e-9, kl_soft)

    # with more forced on
    joint = aggregation(raw, gpt, few_RT, gen)
    found |= dict(joint=joint, kl_joint=joint[8])

    # for the pictures: the mean importances of each matrix, largest first
    mean_F = spectrum(raw, gpt, arena.layer, rows_RT)
    found["spectrum"] = {}
    for name, mean_C in zip(m.matrices, mean_F.split(raw.C)):
        found["spectrum"][name] = mean_C.sort(descending=True).values.tolist()
    return columns.split(COLUMNS, found)
