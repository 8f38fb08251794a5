"""What do a concept's units do to predictions?

    concept_ablation    what does switching them off cost, where the concept is true and elsewhere?
    steering            can predictions be pushed with what they write?
    effects, measure    both for concepts of the kind "the next token is a noun", for the table
    pushes              steering without any decomposition, to hold it against

R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual width, F units,
K concepts, U some of the units or directions, P prompts, V vocabulary, N tokens (position 0 of each
row left out), A sizes of a push. Costs are for two cores.
"""
import torch
import torch.nn.functional as nnf

from data import lexicon, over_rows
from evals import clean, scores_at
from metrics import columns
from metrics.columns import Column
from metrics.concepts import average_ranks, d_prime
from metrics.recording import contributions, record, split_by_sign, write_directions
from model import split_rows
from tinytales.concepts import NEXT, PATTERNS, WORDS

AT_ONCE = 256, 32           # rows of one pass while steering, of up to so many tokens
FEWEST_TOKENS = 20          # a set of fewer tokens is no kind of word to push towards
SIZES = (.02, .05, .1, .2, .4, .8)      # of pushes, as shares of the length of the stream


# ---------------------------------------------------------------------------------------- ablation
def matched_in_frequency(fit, units_KU, gen, near=10):
    """Pick a control for each unit: another unit that is on about as often.

    It is drawn from the `near` units of most similar log frequency, leaving out the units of the
    same row. Returns (K, U), like units_KU.
    """
    K, U = units_KU.shape
    log_on_F = fit.on().double().log1p()
    distance_KUF = (log_on_F[units_KU].unsqueeze(-1) - log_on_F).abs()
    distance_KUF.scatter_(-1, units_KU.unsqueeze(1).expand(K, U, U), torch.inf)
    nearest = distance_KUF.topk(min(near, fit.F - U), -1, largest=False).indices
    pick_KU1 = torch.randint(nearest.shape[-1], (K, U, 1), generator=gen).to(units_KU.device)
    return nearest.gather(-1, pick_KU1).squeeze(-1)


@torch.no_grad()
def concept_ablation(m, gpt, rows_RT, labels_RTK, units_KU):
    """What does switching off U units cost, for each concept?

    The cross-entropy with f = 0 for these units and m's error kept, less that of the unchanged
    model, in nats: "on" (K), the mean over the tokens where the concept is true, and "off" (K), the
    mean over those where it is not. on - off says how selective the units are; hold it against
    units that are on as often (`matched_in_frequency`). 1 s per concept on 32 rows.
    """
    layer, = m.layers

    def outputs(idx, x_BTD):
        """The MLP's output with each concept's units off, by concept."""
        _, f_BTF = clean(m, gpt, idx, layer)
        error_BTD = gpt.mlp(layer)(x_BTD) - m.decode(layer, f_BTF, x_BTD)
        y_of_concept = {}
        for k, units in enumerate(units_KU):
            without_BTF = f_BTF.index_fill(-1, units, 0)
            y_of_concept[k] = error_BTD + m.decode(layer, without_BTF, x_BTD)
        return y_of_concept

    # Column 0 of the scores is the cross-entropy at each scored position.
    scores = scores_at(gpt, layer, rows_RT, outputs)
    ce_RS = scores["original"][..., 0]
    cost_KRS = torch.stack([scores[k][..., 0] - ce_RS for k in range(len(units_KU))])

    # A scored position t predicts the token at t + 1: neither the first nor the last is scored.
    label_RSK = torch.as_tensor(labels_RTK)[:, 1:-1].to(rows_RT.device)
    is_true_KRS = label_RSK.permute(2, 0, 1).float()
    return dict(on=mean_where(cost_KRS, is_true_KRS), off=mean_where(cost_KRS, 1 - is_true_KRS))


def mean_where(value_KRS, weight_KRS):
    """Average over the tokens of weight 1: (K), NaN where there are none."""
    return (value_KRS * weight_KRS).sum((1, 2)) / weight_KRS.sum((1, 2))


# ---------------------------------------------------------------------------------------- steering
def difference_of_means(v_ND, label_NK):
    """In which direction does v differ where a concept is true? (K, D)

    Its mean there less its mean elsewhere: the direction to beat in steering.
    """
    label_NK = label_NK.float()
    n_K1 = label_NK.sum(0).unsqueeze(1)
    sum_KD = label_NK.T @ v_ND
    rest_KD = v_ND.sum(0) - sum_KD
    return sum_KD / n_K1.clamp(min=1) - rest_KD / (len(v_ND) - n_K1).clamp(min=1)


def steered(gpt, layer, idx_BT, push_BD):
    """Which logits follow when the stream after one MLP is pushed at every position? (B, T, V)

    push_BD is a share of the stream's own length at each position.
    """
    x_BTD, r_BTD = gpt.prefix(idx_BT, layer)
    y_BTD = gpt.mlp(layer)(x_BTD)
    length_BT1 = (r_BTD + y_BTD).norm(dim=-1, keepdim=True)
    return gpt.suffix(r_BTD, y_BTD + length_BT1 * push_BD.unsqueeze(1), layer)


def next_distribution(gpt, layer, idx_BT, push_BD):
    """How likely is each token next, when the stream is pushed? (B, V)"""
    chunks = []
    parts = split_rows(idx_BT, *AT_ONCE)
    for idx, push in zip(parts, push_BD.split(len(parts[0]))):
        chunks.append(steered(gpt, layer, idx, push)[:, -1].softmax(-1))
    return torch.cat(chunks)


def surprise_of_end(gpt, idx_BT, start):
    """How unlikely does the model that is not pushed find the tokens from `start` on? NLL, (B)."""
    chunks = []
    for idx in split_rows(idx_BT, *AT_ONCE):
        logits_BVT = gpt(idx)[:, start - 1:-1].transpose(1, 2)
        nll_BT = nnf.cross_entropy(logits_BVT, idx[:, start:], reduction="none")
        chunks.append(nll_BT.mean(1))
    return torch.cat(chunks)


def renormalise_outside(p_UPV, inside_U1V):
    """What is the distribution over the tokens outside a set?"""
    return nnf.normalize(p_UPV * (1 - inside_U1V), p=1, dim=-1).clamp(min=1e-12)


@torch.no_grad()
def steer(gpt, layer, prompts_PT, push_UD, target_UV, new, seed=0):
    """How well do pushes of the stream make a set of tokens likely, and at what price?

    Each push is held against no push, on P prompts. With p the distribution after the prompt, M the
    probability of the set in it, and ' for what is pushed, (U) each:

        c = (M' - M) / (1 - M), at least 0      success
        f = exp(-max(0, NLL' - NLL))            fluency: NLL, without a push, of `new` tokens that
                                                were sampled with and without it
        q = exp(-KL(p || p'))                   harmlessness, both renormalised without the set
        S = 3 / (1 / c + 1 / f + 1 / q)         their harmonic mean, 0 to 1, higher is better

    (the shape of AxBench, Wu et al. 2025, arXiv:2501.17148). Returns S, c, f, q, M and M2 = M'.
    """
    # One batch: the prompts without a push, then with each; one set of dice for all of them.
    P, T = prompts_PT.shape
    U = len(push_UD)
    no_push_1D = torch.zeros_like(push_UD[:1])
    push_BD = torch.cat([no_push_1D, push_UD]).repeat_interleave(P, 0)
    idx_BT = prompts_PT.repeat(U + 1, 1)
    dice = torch.rand(P, new, generator=torch.Generator().manual_seed(seed))
    dice = dice.repeat(U + 1, 1).to(idx_BT.device)

    # Sample `new` tokens; the first distribution is the one that counts for c and q.
    for i in range(new):
        p_BV = next_distribution(gpt, layer, idx_BT, push_BD)
        if i == 0:
            p_UPV = p_BV.view(U + 1, P, -1)
        # the first word whose cumulative probability reaches the dice
        word_B = (p_BV.cumsum(-1) < dice[:, i:i + 1]).sum(-1).clamp(max=p_BV.shape[-1] - 1)
        idx_BT = torch.cat([idx_BT, word_B.unsqueeze(1)], 1)

    # Row 0 is without a push.
    inside_U1V = target_UV.unsqueeze(1).to(push_UD)
    M = (p_UPV[:1] * inside_U1V).sum(-1).mean(1)
    M2 = (p_UPV[1:] * inside_U1V).sum(-1).mean(1)
    c = ((M2 - M) / (1 - M)).clamp(0, 1)
    nll = surprise_of_end(gpt, idx_BT, T).view(U + 1, P).mean(1)
    f = (nll[0] - nll[1:]).clamp(max=0).exp()
    before_UPV = renormalise_outside(p_UPV[:1], inside_U1V)
    after_UPV = renormalise_outside(p_UPV[1:], inside_U1V)
    kl_UP = (before_UPV * (before_UPV / after_UPV).log()).sum(-1)
    q = (-kl_UP.mean(1)).exp()
    return dict(S=3 / (1 / c + 1 / f + 1 / q), c=c, f=f, q=q, M=M, M2=M2)


def steering(gpt, layer, dev_PT, test_PT, direction_UD, target_UV, sizes=SIZES, new=8):
    """How well does each direction steer, at the size of push that suits it?

    The size is the best of `sizes` on the dev prompts, and the scores of `steer` are from the test
    prompts: all directions are compared over equal lengths. Adds size (U) and spearman (U), which
    is the rank correlation of M' with the size, NaN where M' does not change. 30 directions,
    16 + 16 prompts: 50 s.
    """
    # Try each size on the dev prompts.
    unit_UD = nnf.normalize(direction_UD, dim=-1)
    tried = [steer(gpt, layer, dev_PT, size * unit_UD, target_UV, new) for size in sizes]
    best_U = torch.stack([scores["S"] for scores in tried]).argmax(0)
    size_U = torch.tensor(sizes, device=unit_UD.device)[best_U]

    # Does a larger push make the set likelier?
    rank_UA = average_ranks(torch.stack([scores["M2"] for scores in tried], 1))
    rank_of_size_1A = torch.arange(len(sizes)).to(rank_UA).unsqueeze(0)
    spearman_U = torch.corrcoef(torch.cat([rank_UA, rank_of_size_1A]))[-1, :-1]

    scores = steer(gpt, layer, test_PT, size_U.unsqueeze(1) * unit_UD, target_UV, new, seed=1)
    return scores | dict(size=size_U, spearman=spearman_U)


def opening(fit, test, prompts):
    """Take the first tokens of some rows of fit and of test, as prompts: [dev_PT, test_PT]."""
    return [rows_RT[:prompts, :rows_RT.shape[1] // 8] for rows_RT, _ in (fit, test)]


# ----------------------------------------------------------------------------------- for the table
@torch.no_grad()
def effects(m, gpt, fit, test, after, target_UV, gen, units=5, draws=3, rows=32, prompts=16):
    """Do the units that know the next token's kind decide it? Means over kinds, as a flat dict.

    after: the columns of the labels "the next token is one of a set"; target_UV: these sets. fit,
    test: (rows, labels). Empty without columns, or if nothing is on. A minute on two cores.

    ablation            nats that switching off the `units` units of largest |d'| costs where the
                        column is true, less what it costs elsewhere (`concept_ablation`), less this
                        difference for as many units that are on as often, mean of `draws` draws
    ablation_at         nats that it costs where the column is true
    ablation_elsewhere  nats that it costs elsewhere
    steering            S of `steering` towards the set, with what the unit of largest d' writes: to
                        be held against `pushes`
    """
    layer, = m.layers
    recording = record(m, gpt, *fit)
    if not len(after) or not len(recording.unit_E):
        return {}

    # Each column's units, and below them `draws` times as many controls.
    d_KF = d_prime(recording)[:, after].abs()
    best_KU = d_KF.topk(min(units, recording.F // 2), 0).indices.T
    controls = [matched_in_frequency(recording, best_KU, gen) for _ in range(draws)]
    labels_RTK = torch.as_tensor(test[1])[:rows, :, after.cpu()].repeat(1, 1, 1 + draws)
    cost = concept_ablation(m, gpt, test[0][:rows], labels_RTK, torch.cat([best_KU, *controls]))

    # Selectivity in excess of the controls'.
    at_K, *control_at = cost["on"].view(1 + draws, -1)
    elsewhere_K, *control_elsewhere = cost["off"].view(1 + draws, -1)
    control_K = sum(control_at) / draws - sum(control_elsewhere) / draws
    excess_K = at_K - elsewhere_K - control_K

    # A unit with two signs writes two directions: it is split before one is chosen.
    by_sign, = split_by_sign(recording)
    best_K = d_prime(by_sign)[:, after].argmax(0)
    push_KD = write_directions(contributions(m, by_sign, best_K))
    S_K = steering(gpt, layer, *opening(fit, test, prompts), push_KD, target_UV)["S"]
    # What is rare may be missing from these rows, and has no cost there: NaN.
    means = dict(ablation=excess_K, ablation_at=at_K, ablation_elsewhere=elsewhere_K, steering=S_K)
    return {name: value_K.nanmean().item() for name, value_K in means.items()}


@torch.no_grad()
def pushes(gpt, layer, fit, test, after, target_UV, gen, prompts=16):
    """How well can predictions be steered without any decomposition?

    S of `steering`, with pushes of the sizes that units' writes get: steering_means, along the
    difference of means of y; steering_random, along random directions. They depend on the MLP, not
    on its decomposition.
    """
    if not len(after):
        return {}
    _, (y_ND,) = over_rows(gpt, fit[0], [layer])
    label_NK = torch.as_tensor(fit[1])[:, 1:, after.cpu()].flatten(0, 1).to(y_ND.device)
    means_KD = difference_of_means(y_ND, label_NK)
    random_KD = torch.randn(means_KD.shape, generator=gen).to(means_KD)

    # Both in one batch.
    push_UD = torch.cat([means_KD, random_KD])
    prompts_PT = opening(fit, test, prompts)
    S_U = steering(gpt, layer, *prompts_PT, push_UD, target_UV.repeat(2, 1))["S"]
    S_means, S_random = S_U.view(2, -1).mean(1).tolist()
    return dict(steering_means=S_means, steering_random=S_random)


def kinds_of_next_token(arena):
    """Which kinds of next token can predictions be pushed towards?

    Those that are among the labels and have FEWEST_TOKENS tokens or more. Returns their columns of
    the labels (U), and the tokens of each (U, V).
    """
    kinds = [*WORDS, *PATTERNS]
    _, table = lexicon(tuple(arena.gpt.vocab))
    is_of_kind_VW = torch.from_numpy(table)
    after = []
    places = []
    for kind in NEXT:
        name = f"next: {kind}"
        if name in arena.names and is_of_kind_VW[:, kinds.index(kind)].sum() >= FEWEST_TOKENS:
            after.append(arena.names.index(name))
            places.append(kinds.index(kind))
    return torch.tensor(after, dtype=torch.long), is_of_kind_VW.T[places]


COLUMNS = {
    "ablation": Column("ablate", "up", 0, 3, table="effects",
                       text="nats that switching off the five units of 'the next token is a noun, "
                            "a verb, ..' costs there, less what it costs elsewhere, less this "
                            "difference for fifteen units that are on as often"),
    "ablation_at": Column("there", "", None, 3, table="effects",
                          text="nats that switching off the five units of 'the next token is a "
                               "noun, a verb, ..' costs there"),
    "ablation_elsewhere": Column("elsewhere", "", None, 3, table="effects",
                                 text="nats that switching off the five units of 'the next token "
                                      "is a noun, a verb, ..' costs elsewhere"),
    "steering": Column("steer", "up", "random", 3, table="effects",
                       text="harmonic mean of success, fluency and harmlessness when the best "
                            "unit's writes push towards a set of next tokens"),
    "steering_means": Column("s. means", "", None, 3, table="effects",
                             text="harmonic mean of success, fluency and harmlessness when the "
                                  "difference of means of y pushes: what to beat"),
    "steering_random": Column("s. random", "", None, 3, table="effects",
                              text="harmonic mean of success, fluency and harmlessness when "
                                   "random directions push"),
}


def measure(m, arena, gen):
    """What do m's units do to predictions? The numbers of the table effects.

    Returns (numbers, details) as metrics/columns.py has them. A minute on two cores, and one more
    for the pushes of the first model.
    """
    after, target_UV = kinds_of_next_token(arena)
    few = max(1, len(arena.fit[0]) // 8)
    how = dict(after=after, target_UV=target_UV, prompts=min(16, few))
    numbers = effects(m, arena.gpt, arena.fit, arena.test, gen=gen, rows=min(32, few), **how)
    return columns.split(COLUMNS, numbers | arena.shared(pushes, "pushes", **how))
