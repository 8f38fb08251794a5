"""Baselines: what does anybody get from an MLP without training anything?

Four decompositions through the seam of evals.py. They are the floors of the table: a method that
learns has to be better. Each keeps the k units that write most at a token.

    neurons     units are the MLP's own neurons, f = |act(z)|
    pca         y_hat = mean + sum_i f_i d_i over both halves, d and -d, of each principal component
                of the outputs y
    random      y_hat = b + gain sum_i f_i d_i over F random directions; b and one gain for all by
                least squares
    svd         W_in and W_out by their singular vectors, k of each matrix: the rank-one parts that
                SPD is held against

And random_target: a model that was never trained, for a method to take apart.

D residual width, M MLP hidden width, F units, N tokens

    python baselines.py --k 16          # CE recovered and FVE of each, one minute on 2 cores
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf

import common
import data
import evals
import spd
from data import over_rows
from model import GPT, default_layer, split_rows


@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2
    data: str = "tinytales"         # tinytales, X.bin or X.txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: the default one
    k: int = 16                     # [1, 1e7] units on at each token (svd: of each matrix)
    F: int = 1024                   # [1, 1e7] random directions
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the random directions
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test


def keep(value, score, k):
    """Keep each token's values where the score is among the k largest; 0 elsewhere."""
    largest = score.topk(min(k, score.shape[-1]), -1).indices
    return torch.zeros_like(value).scatter_(-1, largest, value.gather(-1, largest))


# -------------------------------------------------------------------------- the decompositions
class Dictionary:
    """F directions that read the MLP's output and write it, as an SAE's do.

    f = TopK(relu((y - mean) R^T)), y_hat = f W + b. W is R and b is the mean, until `fit`."""
    kind = "dictionary"
    matrices = ()

    def __init__(self, layer, R_FD, mean_D, k):
        self.layers = [layer]
        self.R = R_FD
        self.W = R_FD
        self.mean = mean_D
        self.b = mean_D
        self.k = k
        self.params_F = torch.full((len(R_FD),), 2 * R_FD.shape[1])

    # The seam (evals.py)
    def unit_directions(self):
        return [("all", self.R, self.W, None)]

    def unit_inputs(self, gpt, rows_RT):
        _, (y_ND,) = over_rows(gpt, rows_RT, self.layers)
        return [y_ND - self.mean]

    def encode(self, layer, x_BTD, mlp):
        f_BTF = ((mlp(x_BTD) - self.mean) @ self.R.T).relu()
        return keep(f_BTF, f_BTF, self.k)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W + self.b

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W[units]


class Neurons:
    """The k neurons that write most at a token, as they are: f = |act(z)|.

    b is the MLP's own bias; `fit` adds what the neurons that are left out write on average."""
    kind = "dictionary"
    matrices = ()

    def __init__(self, layer, mlp, k):
        self.layers = [layer]
        self.mlp = mlp
        self.k = k
        self.W = mlp.c_proj.weight
        self.b = mlp.c_proj.bias
        self.params_F = torch.full((len(self.W),), 2 * self.W.shape[1] + 1)

    # The seam (evals.py)
    def unit_directions(self):
        return [("all", self.mlp.c_fc.weight.T, self.W, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = over_rows(gpt, rows_RT, self.layers)
        return [x_ND]

    def encode(self, layer, x_BTD, mlp):
        f_BTM = mlp.act(mlp.c_fc(x_BTD)).abs()
        size_BTM = f_BTM * self.W.norm(dim=1)
        return keep(f_BTM, size_BTM, self.k)

    def strength(self, layer, f_BTF, x_BTD):
        """act(z): f with the sign that it lost, which gelu and relu have of z."""
        return f_BTF * self.mlp.c_fc(x_BTD).sign()

    def decode(self, layer, f_BTF, x_BTD):
        return self.strength(layer, f_BTF, x_BTD) @ self.W + self.b

    def contrib(self, layer, f_BTF, x_BTD, units):
        return self.strength(layer, f_BTF, x_BTD)[..., units, None] * self.W[units]


class SVD(spd.SPD):
    """An SPD whose components are singular vectors, W = (left s) right exactly.

    The importances at a token are 1 for the k components of each matrix that write most, and 0 for
    the rest; no net says them."""
    def __init__(self, layer, mlp, k):
        Ws = [mlp.c_fc.weight, mlp.c_proj.weight]
        bs = [mlp.c_fc.bias, mlp.c_proj.bias]
        cfg = spd.Config(C=min(Ws[0].shape), ci_hidden=1)
        super().__init__(Ws, bs, cfg, torch.Generator(), layer, mlp.act)
        self.requires_grad_(False)
        self.k = k
        for V, U, W in zip(self.V, self.U, Ws):
            left, s, right = torch.linalg.svd(W, full_matrices=False)
            V[:] = left * s
            U[:] = right

    def largest(self, inner_BTC, U_CD):
        """1 where inner U is among the k largest of its token, 0 elsewhere."""
        size_BTC = inner_BTC.abs() * U_CD.norm(dim=1)
        return keep(torch.ones_like(inner_BTC), size_BTC, self.k)

    def encode(self, layer, x_BTD, mlp):
        inner_BTC = x_BTD @ self.V[0]
        f_in_BTC = self.largest(inner_BTC, self.U[0])
        # W_out reads what W_in's k components write
        h_BTM = self.act((inner_BTC * f_in_BTC) @ self.U[0] + self.bs[0])
        f_out_BTC = self.largest(h_BTM @ self.V[1], self.U[1])
        return torch.cat([f_in_BTC, f_out_BTC], -1)


# --------------------------------------------------------------------------- how they are made
def random_directions(F, D, seed):
    """Draw F directions of norm 1, (F, D)."""
    gen = common.generator(seed, "directions")
    return nnf.normalize(torch.randn(F, D, generator=gen), dim=1)


@torch.no_grad()
def fit(m, gpt, layer, rows_RT, gain=False):
    """Give m the bias of least squared error on some rows, and with `gain` also one factor for all
    that m writes. Returns m."""
    ys = []
    y_hats = []
    for idx_BT in split_rows(rows_RT, 16):
        x_BTD, f_BTF = evals.clean(m, gpt, idx_BT, layer)
        ys.append(gpt.mlp(layer)(x_BTD))
        y_hats.append(m.decode(layer, f_BTF, x_BTD))
    y_ND = torch.cat(ys)[:, 1:].flatten(0, 1)
    y_hat_ND = torch.cat(y_hats)[:, 1:].flatten(0, 1)

    # the slope of a line through all points (y_hat, y), then its intercept
    slope = 1.
    if gain:
        dy_ND = y_ND - y_ND.mean(0)
        dy_hat_ND = y_hat_ND - y_hat_ND.mean(0)
        slope = (dy_ND * dy_hat_ND).sum() / dy_hat_ND.square().sum()
    m.W = slope * m.W
    m.b = y_ND.mean(0) - slope * (y_hat_ND - m.b).mean(0)
    return m


@torch.no_grad()
def baselines(gpt, layer, rows_RT, k, F, seed):
    """Make all four, fitted on some rows: {name: decomposition}. 20 s for 50,000 tokens."""
    mlp = gpt.mlp(layer)
    _, (y_ND,) = over_rows(gpt, rows_RT, [layer])
    mean_D = y_ND.mean(0)
    neurons = fit(Neurons(layer, mlp, k), gpt, layer, rows_RT)

    # f is never negative, so each principal component is two units
    P_DD = torch.linalg.eigh(torch.cov(y_ND.T)).eigenvectors.T
    pca = Dictionary(layer, torch.cat([P_DD, -P_DD]), mean_D, k)

    R_FD = random_directions(F, len(mean_D), seed).to(mean_D.device)
    random = fit(Dictionary(layer, R_FD, mean_D, k), gpt, layer, rows_RT, gain=True)
    return dict(neurons=neurons, pca=pca, random=random, svd=SVD(layer, mlp, k))


def random_target(gpt, folder, seed):
    """Write a folder for --model with gpt's architecture and vocabulary, but fresh weights."""
    fresh = GPT(gpt.cfg, common.generator(seed, "random target"))
    fresh.save(folder, gpt.vocab, gpt.meta | {"random": seed})


def main(cfg):
    device = common.device(cfg.device)
    gpt = GPT.load(cfg.model, device)
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    T = gpt.cfg.n_positions
    common.check(replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 k=f"[1, {cfg.F}]", eval_tokens=f"[{T}, inf]")
    common.need(4 * cfg.F * (gpt.cfg.n_embd + 16 * T), f"--F {cfg.F}", device)
    corpora = data.load_for(gpt, cfg.data, T, ("fit", "test"))
    n_rows = cfg.eval_tokens // T
    rows, test = (corpora[split].rows(T, n_rows).to(device) for split in ("fit", "test"))
    found = baselines(gpt, layer, rows, cfg.k, cfg.F, cfg.seed)

    # each in the place of the MLP, beside its mean and zero
    replaces = evals.ablations(gpt, layer, rows)
    for name, m in found.items():
        replaces[name] = evals.splice(m)
    table = evals.scores(gpt, test, replaces)
    print(*evals.score_lines(table, table), sep="\n")
    for name, m in found.items():
        used = evals.usage(m, gpt, layer, test)
        print(f"{name:12}FVE {used['fve']:.3f}, L0 {used['l0']:.1f}, "
              f"{used['active_params']:,.0f} active parameters")


if __name__ == "__main__":
    main(common.cli(Config))
