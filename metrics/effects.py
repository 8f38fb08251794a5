"""What a concept's units do to predictions: ablating them, and steering with what they write.

R rows, B rows of a batch, T positions, S = T - 2 scored positions, D residual width, K concepts, U some of the units,
P prompts, V vocabulary, N tokens (position 0 of each row left out)
"""
import torch
import torch.nn.functional as F

from data import over_rows
from evals import clean, scores_at
from metrics.concepts import d_prime
from metrics.recording import split_by_sign, record, contributions, write_directions

def matched_in_frequency(fit, units_KU, gen, near=10):
    """For each of these units another that is on about as often, at random among the `near` nearest that are not in its
    row: their null (K, U)."""
    on_F, (K, U) = fit.on().double().log1p(), units_KU.shape
    far = (on_F[units_KU].unsqueeze(-1) - on_F).abs().scatter(-1, units_KU.unsqueeze(1).expand(K, U, U), torch.inf)
    choice = far.topk(min(near, fit.F - U), -1, largest=False).indices
    pick = torch.randint(choice.shape[-1], (K, U, 1), generator=gen).to(units_KU.device)
    return choice.gather(-1, pick).squeeze(-1)

def difference_of_means(v_ND, label_NK):
    """(K, D): mean of v where a concept is true less its mean elsewhere, the direction to beat in steering."""
    label_NK = label_NK.float()
    n_K = label_NK.sum(0).unsqueeze(1)
    true = label_NK.T @ v_ND
    return true / n_K.clamp(min=1) - (v_ND.sum(0) - true) / (len(v_ND) - n_K).clamp(min=1)

@torch.no_grad()
def concept_ablation(m, gpt, rows_RT, labels_RTK, units_KU):
    """Switches off U units of m for each concept, errors kept, and takes what that adds to the CE. {"on": (K) nats at
    the concept's tokens, "off": (K) at all others}; selectivity = on - off. Its null: other units that are on as often
    (`like`). 1 s per concept on 32 rows."""
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

@torch.no_grad()
def effects(m, gpt, fit, test, after, target_UV, gen, units=5, draws=3, rows=32, prompts=16):
    """For the columns `after` of labels, each "the next token is one of a set", target_UV. fit, test: (rows, labels).
      ablation  nats that switching off the `units` units of largest |d'| costs where the column is true, errors kept,
                less what it costs elsewhere (`concept_ablation`), less the same of `draws` times as many others
                that are on as often. ablation_at, ablation_elsewhere: the two costs themselves
      steering  S (`steering`) of the writes of the unit of largest d', towards the set: held against `pushes`
    Means over columns, as a flat dict; empty without columns, or if nothing is on. A minute on two cores."""
    (layer,), whole = m.layers, record(m, gpt, *fit)
    if not len(after) or not len(whole.unit_E):
        return {}
    best_Uu = d_prime(whole)[:, after].abs().topk(min(units, whole.F // 2), 0).indices.T
    every = torch.cat([best_Uu, *(matched_in_frequency(whole, best_Uu, gen) for _ in range(draws))])
    label = torch.as_tensor(test[1])[:rows, :, after.cpu()].repeat(1, 1, 1 + draws)
    cost = concept_ablation(m, gpt, test[0][:rows], label, every)
    (at, *at_null), (off, *off_null) = (cost[where].view(1 + draws, -1) for where in ("on", "off"))
    null = sum(at_null) / draws - sum(off_null) / draws
    mean = lambda v: v.nanmean().item()             # what is rare may be missing from these rows
    a, = split_by_sign(whole)
    push_UD = write_directions(contributions(m, a, d_prime(a)[:, after].argmax(0)))
    S = steering(gpt, layer, *opening(fit, test, prompts), push_UD, target_UV)["S"]
    return dict(ablation=mean(at - off - null), ablation_at=mean(at), ablation_elsewhere=mean(off),
                steering=mean(S))

def opening(fit, test, prompts):
    """First tokens of rows of fit and of test, to be gone on with."""
    return [rows_RT[:prompts, :rows_RT.shape[1] // 8] for rows_RT, _ in (fit, test)]

@torch.no_grad()
def pushes(gpt, layer, fit, test, after, target_UV, gen, prompts=16):
    """What `steering` of anybody's units is held against, at the same norms: steering_means, of the difference of means
    of y, and steering_random, of random directions. The same for all decompositions of an MLP."""
    if not len(after):
        return {}
    _, (y_ND,) = over_rows(gpt, fit[0], [layer])
    means = difference_of_means(y_ND, torch.as_tensor(fit[1])[:, 1:, after.cpu()].flatten(0, 1).to(y_ND.device))
    random = torch.randn(means.shape, generator=gen).to(means)
    S = steering(gpt, layer, *opening(fit, test, prompts), torch.cat([means, random]), target_UV.repeat(2, 1))["S"]
    return dict(zip(("steering_means", "steering_random"), S.view(2, -1).mean(1).tolist()))
