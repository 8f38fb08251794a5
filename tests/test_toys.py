"""Ground truth for spd.py: toy models of superposition, out = ReLU(W^T W x + b), whose mechanisms are known: one per
input feature in each matrix. Slow: python -m pytest -m slow -s tests/test_toys.py"""
import math
import time
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F

import evals
import spd
from spd import Config

TOL = 0.2           # an importance under TOL is off, one over 1 - TOL is on
SEEDS = range(10)
# As it is below: 9 of 10 seeds of 5-2, 8 of 10 of 40-10; in each seed that fails two features share a component.
# What tuning showed (1 to 8 seeds a setting, mostly one change at a time). The failure to avoid: two features share a
# component, keyed by the sign of its activation, because no other component read them before the features had sorted
# themselves out. That is settled in the first 1,000 steps, and more steps don't mend it.
SHARED = dict(
    ci_fn="mlp", ci_hidden=16, T=1,     # global, shared: what W_out's components read is tilted (cos .95 to .98)
    steps=2000, B=256,  # busy rows (below): 512 of them hold as many as 2,270 plain rows of 5-2; 256 do as well
    lr=0.02,            # of V and U, by Muon. 5-2 with C 40: .06 does as well
    penalty="lp", p_start=2., p_end=0.9,    # slow to push small importances to 0, so nothing dies early. smooth_l0 with
                        # an adversary, which solve test_residmlp.py, for 1,500 steps: 5-2 in none of 3 seeds
    c_stoch=2.,         # half the rows have both sites masked, half one: the paper's 1 of each kind
    c_faith=1.,         # in the units of the loss, as everywhere; .1 changes nothing here
    w_freq=20., freq_a=1.,                  # see below
    lr_end=0., adversary="none", clip_vu=1e9, clip_ci=1e9)
# C decides: with more components more of them read each feature at the start. 5-2 by Adam, c_imp 1.5e-3, w_freq 4, C
# 20: 4 of 8 seeds (Muon: 3 of 8). The 4 that failed, with w_freq 20: none with C 20, 3 with C 40. Muon, C 40: 6 of 8
# seeds; C 80: 3 of 3 that are hard with less. 40-10, Muon: with C 120 and 2,500 steps two features share, with C 160
# they do in 3 of 26 runs. (Adam needed 4,000 steps of 512 rows of 40-10, with C 120, for 4 of 5 seeds.)
# freq_a times a feature's s / N (.22 and .06 of the busy rows) is about .22, where log2(1 + a s / N) is still nearly
# linear: with w_freq 20 a shared component costs 1.7 times two single ones, with w_freq 4 1.4 times, and with freq_a
# 32768 1.1 times.
# c_imp: too small leaves one component too many, too large bends the norms, as W_in makes up for g < 1 at small x (5-2:
# norm ratio 1.01 to 1.03 with 4e-4, 1.02 to 1.04 with 5e-4). 40-10, 2,000 steps with 5e-5: the norms of W_out's
# components are .968 to .971 of the true ones, so that 4 of 10 seeds pass, 9 if not for them; seed 1 has .968, with
# c_faith 3 .970, with 3,000 steps .973, with c_faith 3, 2,500 steps and c_imp 4e-5 .976.
TOYS = {"5-2": (5, 2, Config(C=80, c_imp=4e-4, lr_rest=3e-3, **SHARED)),
        "40-10": (40, 10, Config(C=160, c_imp=4e-5, lr_rest=6e-3,
                                 **SHARED | dict(steps=2500, c_faith=3., freq_a=4.)))}


def batch(B, n, gen):
    """x_i ~ U(0, 1) with probability 0.05, else 0."""
    return torch.rand(B, n, generator=gen) * (torch.rand(B, n, generator=gen) < 0.05)


def busy_batch(B, n, gen):
    """The rows of a larger batch with a feature on. At x = 0, 77 % of the rows of 5-2, every mask gives the same output
    and only the penalty on g(0) acts, which rows with other features on push down as well."""
    x = batch(int(1.3 * B / (1 - 0.95**n)), n, gen)
    return x[x.any(1)][:B]


def out(x, W_hn, b):
    return F.relu(x @ W_hn.T @ W_hn + b)


def train_target(n, h, gen, steps=5000, B=2048, lr=5e-3):
    W, b = torch.randn(h, n, generator=gen) / h**0.5, torch.zeros(n)      # with another b some features go missing
    opt = torch.optim.AdamW([W.requires_grad_(), b.requires_grad_()], weight_decay=0, fused=True)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * math.cos(math.pi / 2 * step / steps)
        x = batch(B, n, gen)
        opt.zero_grad()
        (out(x, W, b) - x).square().mean().backward()
        opt.step()
    return W.detach(), b.detach()


def decompose(W_hn, b, cfg, gen):
    h, n = W_hn.shape
    m = spd.SPD([W_hn.T.contiguous(), W_hn], [torch.zeros(h), b], cfg, gen)
    opts = spd.optimizers(m, cfg)
    spd.begin(m, cfg)
    for step in range(cfg.steps):
        x = busy_batch(cfg.B, n, gen)
        clean = out(x, W_hn, b)
        run = lambda *sites: torch.stack([(F.relu(site(1, site(0, x))) - clean).square().mean() for site in sites])
        loss, _, _ = spd.loss_fn(m, spd.Batch([x, x @ W_hn.T], run), cfg, step / cfg.steps, gen)
        spd.update(m, opts, loss, cfg, step / cfg.steps)
    return m


def importance_errors(g_nC):
    """How many causal importances are wrong, if row f (only feature f is on) should have one component on, its own, and
    all others off. Features choose their component greedily, the largest importance first. 0 is right."""
    own_nC, left_nC = torch.zeros_like(g_nC, dtype=torch.bool), g_nC.clone()
    for _ in range(len(g_nC)):
        f, c = divmod(left_nC.argmax().item(), g_nC.shape[1])
        own_nC[f, c] = True
        left_nC[f], left_nC[:, c] = -1, -1
    return ((g_nC < 1 - TOL) & own_nC).sum().item() + ((g_nC > TOL) & ~own_nC).sum().item()


@torch.no_grad()
def judge(m, W_hn, gen):
    """Per matrix: importance errors on the inputs 0.75 e_i, components alive by the repo's rule (evals.ALIVE) on 20,000
    rows, MMCS and ML2R over these: in 2 dimensions one of many dead, tiny components matches a direction better."""
    n, importance = W_hn.shape[1], lambda x: [z.clamp(0, 1) for z in m.importance_net([x, x @ W_hn.T], m.V)]
    verdict = []
    for i, (g_nC, g_BC) in enumerate(zip(importance(0.75 * torch.eye(n)), importance(batch(20_000, n, gen)))):
        alive = (g_BC > 0.1).sum(0) >= evals.ALIVE
        V, U = (m.V[0], m.U[0]) if i == 0 else (m.U[1].T, m.V[1].T)         # feature side (n, C), hidden side (C, h)
        columns = (V[:, :, None] * U)[:, alive]                             # (n, alive, h)
        cos, best = F.cosine_similarity(columns, W_hn.T[:, None], dim=-1).max(1)
        ratio = columns[torch.arange(n), best].norm(dim=-1) / W_hn.norm(dim=0)
        verdict.append(dict(error=importance_errors(g_nC), alive=alive.sum().item(), mmcs=cos.mean().item(),
                            ml2r=ratio.mean().item()))
    return verdict


def solved(verdict, n):
    return all(v["error"] == 0 and v["alive"] == n and v["mmcs"] >= 0.99 and abs(v["ml2r"] - 1) <= 0.03
               for v in verdict)


def job(args):
    toy, seed = args
    torch.set_num_threads(1)
    (n, h, cfg), gen = TOYS[toy], torch.Generator().manual_seed(seed)
    W_hn, b = train_target(n, h, gen)
    x = batch(100_000, n, gen)
    loss, norms = (out(x, W_hn, b) - x).square().mean().item(), W_hn.norm(dim=0)
    start = time.time()
    m = decompose(W_hn, b, cfg, gen)
    return norms.tolist(), loss, time.time() - start, judge(m, W_hn, gen)


@pytest.mark.slow
@pytest.mark.parametrize("toy", TOYS)
def test_one_component_per_feature_and_matrix(toy, capsys):
    n, good = TOYS[toy][0], 0
    with get_context("spawn").Pool(torch.get_num_threads()) as pool:        # one thread each: the toys are tiny
        for seed, (norms, loss, seconds, verdict) in enumerate(pool.imap(job, [(toy, seed) for seed in SEEDS])):
            print(f"\nTMS {toy} seed {seed}: target loss {loss:.4f}, norms {min(norms):.2f} to {max(norms):.2f}; "
                  f"{'solved' if solved(verdict, n) else 'NOT solved'} in {seconds:.0f} s {verdict}", flush=True)
            if toy == "5-2":
                assert loss == pytest.approx(0.0018, abs=1e-4) and all(abs(v - 1.13) < 0.02 for v in norms)
            good += solved(verdict, n)
    with capsys.disabled():
        print(f"\nTMS {toy}: {good} of {len(SEEDS)} seeds solved")
    assert good >= 8        # 4 of 5 seeds, the lower rate of the two toys under Adam after a warm-up
