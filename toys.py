"""Toys: does a method find the mechanisms of a network whose mechanisms are known?

A toy is a trained network of two matrices and one relu. Its inputs are N features, nearly all of
them 0 in a row, and in each matrix one mechanism serves one feature.

    z = x E W_in + b_in             E: an embedding of the features
    TMS        y = relu(z W_out + b_out)        E = 1, W_out = W_in^T, b_in = 0: toy model of
                                                superposition, trained to give back x
    ResidMLP   y = relu(z) W_out E^T            trained to give relu(x)

TMS 5-2 and 40-10 hold more features than hidden numbers: 5 in 2, 40 in 10. x_i ~ U(0, 1) with
probability 0.05. (Elhage et al. 2022, "Toy models of superposition".)
ResidMLP computes 100 functions with 50 neurons: x_i ~ U(-1, 1) with probability 0.01, E 100 random
unit vectors of 1000 numbers. Training gives each feature about 8 neurons and each neuron about 17
features. The true mechanisms of W_in are one per feature: it reads that feature and nothing else,
and writes E_i W_in into all neurons at once. What those of W_out are is less clear, as many neurons
are in use at a time: they are not judged. Only the span of E matters, 100 of the 1000 dimensions:
the others are left out, which changes no output and saves most of the time. (Bushnaq, Braun,
Sharkey 2025, arXiv:2506.20790.)

B rows, N features, D width of the embedding, M hidden width, C components of a matrix, R rank of a
component, I matrices that are judged
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

import evals
import spd

ROWS = 20_000       # on which components are counted as alive
OFF = 0.2           # an importance under OFF is off, one over 1 - OFF is on

# ------------------------------------------------------------------------------- SPD's settings
# TMS: as it is below, 9 of 10 seeds of 5-2, all 10 of 40-10; in each seed that fails two features
# share a component. What tuning showed (1 to 8 seeds a setting, mostly one change at a time): the
# failure to avoid is that two features share a component, keyed by the sign of its activation,
# because no other component read them before the features had sorted themselves out. That is
# settled in the first 1,000 steps, and more steps don't mend it.
SHARED = spd.FORMER | dict(
    # global, shared: what W_out's components read is tilted (cos .95 to .98)
    ci_fn="mlp", ci_hidden=16, T=1,
    # busy rows: 512 of them hold as many as 2,270 plain rows of 5-2; 256 do as well
    steps=2000, B=256,
    # of V and U, by Muon. 5-2 with C 40: .06 does as well. With lr_scaled and decay .2, .04 solves
    # 5-2 in 19 of 20 seeds, but 40-10 in 2 of 10. With the smallest start 5-2 in 3 of 10: V that
    # make up W_in are then sums of its columns, 2 directions of the 5 that have to be read
    lr=0.02,
    # slow to push small importances to 0, so nothing dies early. smooth_l0 with an adversary, which
    # solve ResidMLP, for 1,500 steps: 5-2 in none of 3 seeds
    penalty="lp", p_start=2., p_end=0.9,
    # half the rows have both sites masked, half one: the paper's 1 of each kind
    c_stoch=2.,
    # in the units of the loss, as everywhere; .1 changes nothing here
    c_faith=1.,
    # see below
    w_freq=20., freq_a=1.,
    lr_end=0., adversary="none", clip_vu=1e9, clip_ci=1e9)
# C decides: with more components more of them read each feature at the start. 5-2 by Adam, c_imp
# 1.5e-3, w_freq 4, C 20: 4 of 8 seeds (Muon: 3 of 8). The 4 that failed, with w_freq 20: none with
# C 20, 3 with C 40. Muon, C 40: 6 of 8 seeds; C 80: 3 of 3 that are hard with less. 40-10, Muon:
# with C 120 and 2,500 steps two features share, with C 160 they do in 3 of 26 runs. (Adam needed
# 4,000 steps of 512 rows of 40-10, with C 120, for 4 of 5 seeds.)
# freq_a times a feature's s / N (.22 and .06 of the busy rows) is about .22, where log2(1 + a s /
# N) is still nearly linear: with w_freq 20 a shared component costs 1.7 times two single ones, with
# w_freq 4 1.4 times, and with freq_a 32768 1.1 times.
# c_imp: too small leaves one component too many, too large bends the norms, as W_in makes up for g
# < 1 at small x (5-2: norm ratio 1.01 to 1.03 with 4e-4, 1.02 to 1.04 with 5e-4). 40-10, 2,000
# steps with 5e-5: the norms of W_out's components are .968 to .971 of the true ones, so that 4 of
# 10 seeds pass, 9 if not for them; seed 1 has .968, with c_faith 3 .970, with 3,000 steps .973,
# with c_faith 3, 2,500 steps and c_imp 4e-5 .976.
LARGER = SHARED | dict(steps=2500, c_faith=3., freq_a=4.)
# ResidMLP (seed 0 and C 130 unless stated):
# c_faith is in the units of the loss, here .0005 instead of a language model's .05. The default 10
# pins V U = W while the components still have to turn: MMCS .70, 95 alive, 508 importance errors;
# .1: .99, 100 alive, no error.
# penalty lp without an adversary, c_faith 10: .50, 125 alive (1,500 steps); with smooth_l0 and the
# one-step adversary: .66 (2,000 steps of 512 rows). ci_fn global instead of mlp, c_faith 10: .67,
# 122 alive.
# lr .03 and lr_rest 8e-3 with c_faith .1: MMCS .998 and a lower loss, but norms 10 % too large and
# 81 alive in W_out.
# With C 130 a few features share a component: seeds 0, 1, 2 with c_faith .3 have 97, 99, 93 alive
# and 28, 15, 64 errors, seed 2 with .1 has 99 and 6; with C 200 it has 100 and none.
RESID = spd.FORMER | dict(
    C=200, T=1, B=256, steps=3000, ci_fn="mlp", ci_hidden=16, lr=0.05, lr_rest=3e-3, lr_end=0.,
    c_faith=0.1, c_stoch=1., adversary="step", c_adv=1., c_imp=1e-5, clip_vu=1e9, clip_ci=1e9)
SPD = {
    "5-2": spd.Config(C=80, c_imp=4e-4, lr_rest=3e-3, **SHARED),
    "40-10": spd.Config(C=160, c_imp=4e-5, lr_rest=6e-3, **LARGER),
    "resid": spd.Config(**RESID),
}


# ----------------------------------------------------------------------------------- the networks
class Toy:
    """A network and its inputs. Its kinds say what lies between the matrices (`act`), what follows
    on them (`read_off`), and how a change of what they make moves the output (`tangent`)."""
    E_ND = None         # TMS has none
    least_cos = 0.99    # a decomposition is right with an MMCS of at least that ..
    most_off = 0.03     # .. and norms that are that near to the true ones

    def embed(self, x_BN):
        return x_BN if self.E_ND is None else x_BN @ self.E_ND

    def unembed(self, y):
        """What W_out writes, in outputs."""
        return y if self.E_ND is None else y @ self.E_ND.T

    def inputs(self, x_BN):
        """What W_in and W_out read."""
        x_BD = self.embed(x_BN)
        return [x_BD, self.act(x_BD @ self.Ws[0] + self.bs[0])]

    def out(self, site, x_BN):
        """The output, with site(i, what matrix i reads) in the place of matrix i and its bias."""
        return self.read_off(site(1, self.act(site(0, self.embed(x_BN)))))

    def plain(self, i, x):
        """The site of the network as it is."""
        return x @ self.Ws[i] + self.bs[i]

    def clean(self, x_BN):
        return self.out(self.plain, x_BN)

    def busy_rows(self, B, gen):
        """B rows of a larger batch, all with a feature on.

        At x = 0, 77 % of the rows of TMS 5-2, every mask gives the same output, and only SPD's
        penalty acts, on g(0), which rows with other features on push down as well."""
        x_BN = self.rows(self.enough(B), gen)
        return x_BN[x_BN.any(1)][:B]

    @property
    def busy(self):
        """The share of rows that have a feature on."""
        return 1 - (1 - self.chance) ** self.N

    def generator(self):
        """A random stream that goes on where the training of the network ended."""
        gen = torch.Generator()
        gen.set_state(self.state)
        return gen


class TMS(Toy):
    """relu(W^T W x + b), trained to give back x. W is (M, N) there, W_out here."""
    chance = 0.05
    tied = True
    judged = (0, 1)

    def __init__(self, N, M, seed, steps=5000):
        self.N = N
        self.name = f"{N}-{M}"
        gen = torch.Generator().manual_seed(seed)
        W_MN = torch.randn(M, N, generator=gen) / M**0.5
        b_N = torch.zeros(N)                # with another b some features go missing
        self.train(W_MN.requires_grad_(), b_N.requires_grad_(), gen, steps)
        W_MN = W_MN.detach()
        self.Ws = [W_MN.T.contiguous(), W_MN]
        self.bs = [torch.zeros(M), b_N.detach()]
        x_BN = self.rows(100_000, gen)
        self.loss = (self.clean(x_BN) - x_BN).square().mean().item()
        self.state = gen.get_state()

    def train(self, W_MN, b_N, gen, steps, B=2048, lr=5e-3):
        opt = torch.optim.AdamW([W_MN, b_N], weight_decay=0, fused=True)
        for step in range(steps):
            opt.param_groups[0]["lr"] = lr * math.cos(math.pi / 2 * step / steps)
            x_BN = self.rows(B, gen)
            y_BN = F.relu(x_BN @ W_MN.T @ W_MN + b_N)
            opt.zero_grad()
            (y_BN - x_BN).square().mean().backward()
            opt.step()

    def rows(self, B, gen):
        """x_i ~ U(0, 1) with probability 0.05, else 0."""
        x_BN = torch.rand(B, self.N, generator=gen)
        return x_BN * (torch.rand(B, self.N, generator=gen) < self.chance)

    def enough(self, B):
        return int(1.3 * B / self.busy)

    def act(self, z):
        return z

    def read_off(self, y):
        return F.relu(y)

    def tangent(self, x_BN, first_BCM, second_BCN):
        """How fast does the output move, (B, C, N), if the output of W_in moves at a rate of
        first, and that of W_out (unembedded), for reasons of its own, at second? For C pairs of
        rates."""
        is_on_B1N = (self.clean(x_BN) > 0).unsqueeze(1)
        return (first_BCM @ self.Ws[1] + second_BCN) * is_on_B1N

    def pieces(self, i, V, U):
        """What components V (d_in, C, R), U (C, R, d_out) of matrix i write or read for each
        feature: (N, C, M). Their sum should be the rows of W_in."""
        if i == 0:
            return torch.einsum("ncr,crm->ncm", V, U)
        return torch.einsum("mcr,crn->ncm", V, U)

    def rows_of_W(self):
        """What W_in writes for each feature, which is what W_out reads for it: (N, M)."""
        return self.Ws[0]


class ResidMLP(Toy):
    """x E, then + relu(x E W_in) W_out, read off by E^T, trained to give x + relu(x). What it
    passes on unchanged, x E E^T, is left out: no mask changes it."""
    N = 100
    D = 1000
    M = 50
    chance = 0.01
    tied = False
    judged = (0,)
    name = "resid"
    least_cos = 0.98
    most_off = 0.05

    def __init__(self, seed, steps=2000):
        gen = torch.Generator().manual_seed(seed)
        # N random unit vectors of D numbers, in an orthonormal basis of their span
        E = F.normalize(torch.randn(self.N, self.D, generator=gen), dim=1)
        self.E_ND = torch.linalg.qr(E.T).R.T.contiguous()
        W_in = torch.randn(self.N, self.M, generator=gen) / self.N**0.5
        W_out = torch.randn(self.M, self.N, generator=gen) / self.M**0.5
        self.loss = self.train(W_in.requires_grad_(), W_out.requires_grad_(), gen, steps)
        self.Ws = [W_in.detach(), W_out.detach()]
        self.bs = [torch.zeros(self.M), torch.zeros(self.N)]
        x_BN = self.rows(50_000, gen)
        self.without = F.relu(x_BN).square().mean().item()      # its loss without the MLP
        self.state = gen.get_state()

    def train(self, W_in, W_out, gen, steps, B=2048, lr=3e-3):
        opt = torch.optim.AdamW([W_in, W_out], lr, fused=True)
        for step in range(steps):
            opt.param_groups[0]["lr"] = lr * math.cos(math.pi / 2 * step / steps)
            x_BN = self.rows(B, gen)
            x_BD = x_BN @ self.E_ND
            opt.zero_grad()
            y_BN = (x_BD + F.relu(x_BD @ W_in) @ W_out) @ self.E_ND.T
            loss = (y_BN - x_BN - F.relu(x_BN)).square().mean()
            loss.backward()
            opt.step()
        return loss.item()

    def rows(self, B, gen):
        """x_i ~ U(-1, 1) with probability 0.01, else 0."""
        x_BN = 2 * torch.rand(B, self.N, generator=gen) - 1
        return x_BN * (torch.rand(B, self.N, generator=gen) < self.chance)

    def enough(self, B):
        return 2 * B

    def act(self, z):
        return F.relu(z)

    def read_off(self, y):
        return self.unembed(y)

    def tangent(self, x_BN, first_BCM, second_BCN):
        """As TMS.tangent says."""
        is_on_B1M = (self.inputs(x_BN)[1] > 0).unsqueeze(1)
        return (first_BCM * is_on_B1M) @ self.unembed(self.Ws[1]) + second_BCN

    def pieces(self, i, V, U):
        """What components V (D, C, R), U (C, R, M) of W_in write for each feature: (N, C, M)."""
        reads_NCR = torch.einsum("nd,dcr->ncr", self.E_ND, V)
        return torch.einsum("ncr,crm->ncm", reads_NCR, U)

    def rows_of_W(self):
        """What W_in writes for each feature: (N, M)."""
        return self.E_ND @ self.Ws[0]


@lru_cache(maxsize=2)
def make(name, seed):
    """Train one of the toys: "5-2", "40-10" or "resid"."""
    if name == "resid":
        return ResidMLP(seed)
    N, M = name.split("-")
    return TMS(int(N), int(M), seed)


# ----------------------------------------------------------------------------------------- judging
def errors(on_NC):
    """How many components are wrongly on or off, if row f (only feature f is on) should have one
    component on, its own, and all others off? 0 is right.

    on_NC: importances, 0 to 1. Features choose their component greedily, the largest first."""
    own_NC = torch.zeros_like(on_NC, dtype=torch.bool)
    left_NC = on_NC.clone()
    for _ in range(len(on_NC)):
        f, c = divmod(left_NC.argmax().item(), on_NC.shape[1])
        own_NC[f, c] = True
        left_NC[f] = -1
        left_NC[:, c] = -1
    missing = (on_NC < 1 - OFF) & own_NC
    extra = (on_NC > OFF) & ~own_NC
    return (missing.sum() + extra.sum()).item()


def matched(pieces_NCM, rows_NM):
    """How well do components hold what a matrix writes for each feature? (cos_N, own_N, ratio_N).

    A feature's own component is the one whose piece has the largest cosine with the feature's row.
    MMCS is the mean of these cosines, ML2R the mean ratio of the norms; 1 is best in both."""
    if not pieces_NCM.shape[1]:
        zeros_N = rows_NM.new_zeros(len(rows_NM))
        return zeros_N, zeros_N.long(), zeros_N
    cos_N, own_N = F.cosine_similarity(pieces_NCM, rows_NM[:, None], dim=-1).max(1)
    features = torch.arange(len(rows_NM))
    ratio_N = pieces_NCM[features, own_N].norm(dim=-1) / rows_NM.norm(dim=-1)
    return cos_N, own_N, ratio_N


def verdict(toy, i, V, U, on_NC, alive_C):
    """What is found of the mechanisms of matrix i, by components V (d_in, C, R), U (C, R, d_out)?

    on_NC: is a component on, where one feature is? alive_C: which components are ever on. Only
    these are matched: in 2 dimensions one of many dead, tiny components matches better."""
    pieces_NCM = toy.pieces(i, V, U)[:, alive_C]
    cos_N, _, ratio_N = matched(pieces_NCM, toy.rows_of_W())
    return dict(error=errors(on_NC), alive=alive_C.sum().item(), mmcs=cos_N.mean().item(),
                ml2r=ratio_N.mean().item())


def found(toy, verdicts):
    """Is there one component for each feature and no other, of the right direction? Whatever its
    norm."""
    return all(v["error"] == 0 and v["alive"] == toy.N and v["mmcs"] >= toy.least_cos
               for v in verdicts)


def solved(toy, verdicts):
    """Is there one component for each feature and no other, of the right direction and norm?"""
    return found(toy, verdicts) and all(abs(v["ml2r"] - 1) <= toy.most_off for v in verdicts)


def one_by_one(toy):
    """N rows, each with one feature on."""
    return 0.75 * torch.eye(toy.N)


# --------------------------------------------------------------------------------------------- SPD
class Clean:
    """What spd.loss_fn asks of a batch: inputs of both matrices, and how far masked matrices move
    the output, as a mean squared error."""
    def __init__(self, toy, x_BN):
        self.toy = toy
        self.x_BN = x_BN
        self.inputs = toy.inputs(x_BN)
        self.clean_BN = toy.clean(x_BN)

    def divergence(self, *masked):
        moved = [self.toy.out(site, self.x_BN) - self.clean_BN for site in masked]
        return torch.stack([change.square().mean() for change in moved])


def decompose(toy, cfg, gen):
    """Train an SPD of a toy, as `spd.train` trains that of a language model."""
    m = spd.SPD(toy.Ws, toy.bs, cfg, gen)
    opts = spd.optimizers(m, cfg)
    spd.begin(m, cfg)
    for step in range(cfg.steps):
        progress = step / cfg.steps
        batch = Clean(toy, toy.busy_rows(cfg.B, gen))
        loss, _, _ = spd.loss_fn(m, batch, cfg, progress, gen)
        spd.update(m, opts, loss, cfg, progress)
    if toy.name == "resid":
        spd.project(m)
    return m


@torch.no_grad()
def judge(m, toy, gen):
    """The verdicts on an SPD, one for each matrix of toy.judged. A component is alive where its
    importance is above 0.1 in evals.ALIVE of the rows."""
    single = importances(m, toy, one_by_one(toy))
    typical = importances(m, toy, toy.rows(ROWS, gen))
    verdicts = []
    for i in toy.judged:
        alive_C = (typical[i] > 0.1).sum(0) >= evals.ALIVE
        verdicts.append(verdict(toy, i, m.V[i].unsqueeze(-1), m.U[i].unsqueeze(1), single[i],
                                alive_C))
    return verdicts


def importances(m, toy, x_BN):
    return [z.clamp(0, 1) for z in m.importance_net(toy.inputs(x_BN), m.V)]
