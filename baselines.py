"""Floors of the table, through the seam of evals.py: what anybody gets from an MLP without training anything.

    neurons   the k neurons with the largest |gelu(z)| |W_out row| at each token, as they are
    pca       y = mean + sum_k f d, the k largest of the two halves of each principal component of y
    random    the same with F random directions; one gain for all and the bias by least squares (matched density)
    svd       W_in and W_out by their singular vectors, k at each token: the rank-one parts that SPD is held against
  and random_target, an untrained model for a method to take apart
D residual width, M MLP hidden width, F units, N tokens

    python baselines.py --k 16          # CE recovered and FVE of each, one minute on 2 cores
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf

import common
import data
import evals
import spd
from data import over_rows
from model import GPT, default_layer, gelu

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2
    data: str = "tinytales"         # tinytales, X.bin or X.txt
    layer: int = -1                 # whose MLP; -1: the default one
    k: int = 16                     # units on at each token (svd: of each matrix)
    F: int = 1024                   # random directions
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the random directions
    eval_tokens: int = 50_000       # tokens of fit and of test

def keep(value, score, k):
    """value at the k largest scores, else 0."""
    top = score.topk(min(k, score.shape[-1]), -1).indices
    return torch.zeros_like(value).scatter_(-1, top, value.gather(-1, top))

class Dictionary:
    """f = TopK(relu((y - mean) R^T)), y_hat = f W + b, W = R at first: F directions; reads y, as an SAE does."""
    kind, matrices = "dictionary", ()

    def __init__(self, layer, R_FD, mean_D, k):
        self.layers, self.R, self.W, self.mean, self.b, self.k = [layer], R_FD, R_FD, mean_D, mean_D, k
        self.params_F = torch.full((len(R_FD),), 2 * R_FD.shape[1])

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
    """f = |gelu(z)| of the k neurons that write most; b is what the others write on average."""
    kind, matrices = "dictionary", ()

    def __init__(self, layer, mlp, k):
        self.layers, self.mlp, self.k, self.W, self.b = [layer], mlp, k, mlp.c_proj.weight, mlp.c_proj.bias
        self.params_F = torch.full((len(self.W),), 2 * self.W.shape[1] + 1)

    def unit_directions(self):
        return [("all", self.mlp.c_fc.weight.T, self.W, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = over_rows(gpt, rows_RT, self.layers)
        return [x_ND]

    def encode(self, layer, x_BTD, mlp):
        f_BTM = gelu(mlp.c_fc(x_BTD)).abs()
        return keep(f_BTM, f_BTM * self.W.norm(dim=1), self.k)

    def strength(self, layer, f_BTF, x_BTD):
        return f_BTF * self.mlp.c_fc(x_BTD).sign()          # gelu has the sign of its input

    def decode(self, layer, f_BTF, x_BTD):
        return self.strength(layer, f_BTF, x_BTD) @ self.W + self.b

    def contrib(self, layer, f_BTF, x_BTD, units):
        return self.strength(layer, f_BTF, x_BTD)[..., units, None] * self.W[units]

class SVD(spd.SPD):
    """An SPD whose components are singular vectors, W = (left s) right exactly, and whose importances are 1 for the k
    of each matrix that write most at a token and 0 for the others."""
    def __init__(self, layer, mlp, k):
        Ws, bs = [mlp.c_fc.weight, mlp.c_proj.weight], [mlp.c_fc.bias, mlp.c_proj.bias]
        super().__init__(Ws, bs, spd.Config(C=min(Ws[0].shape), ci_hidden=1), torch.Generator(), layer)
        self.requires_grad_(False).k = k
        for V, U, W in zip(self.V, self.U, Ws):
            left, s, right = torch.linalg.svd(W, full_matrices=False)
            V[:], U[:] = left * s, right

    def encode(self, layer, x_BTD, mlp):
        top = lambda h, U: keep(torch.ones_like(h), h.abs() * U.norm(dim=1), self.k)
        h = x_BTD @ self.V[0]
        f = top(h, self.U[0])
        return torch.cat([f, top(gelu((h * f) @ self.U[0] + self.bs[0]) @ self.V[1], self.U[1])], -1)

def directions(F, D, seed):
    return nnf.normalize(torch.randn(F, D, generator=common.generator(seed, "directions")), dim=1)

@torch.no_grad()
def fit(m, gpt, layer, rows_RT, gain=False):
    """Gives m the bias, and with `gain` one factor for all that it writes, of least squared error on some rows."""
    pairs = [(gpt.h[layer].mlp(x_BTD), m.decode(layer, f_BTF, x_BTD))
             for x_BTD, f_BTF in (evals.clean(m, gpt, idx, layer) for idx in rows_RT.split(16))]
    y_ND, y_hat_ND = (torch.cat(part)[:, 1:].flatten(0, 1) for part in zip(*pairs))
    dy_ND, dy_hat_ND = y_ND - y_ND.mean(0), y_hat_ND - y_hat_ND.mean(0)
    s = (dy_ND * dy_hat_ND).sum() / dy_hat_ND.square().sum() if gain else 1.
    m.W, m.b = s * m.W, y_ND.mean(0) - s * (y_hat_ND - m.b).mean(0)
    return m

@torch.no_grad()
def baselines(gpt, layer, rows_RT, k, F, seed):
    """{name: decomposition}, fitted on some rows. 20 s for 50,000 tokens."""
    mlp, (_, (y_ND,)) = gpt.h[layer].mlp, over_rows(gpt, rows_RT, [layer])
    mean_D, P_DD = y_ND.mean(0), torch.linalg.eigh(torch.cov(y_ND.T)).eigenvectors.T
    pca, random = (Dictionary(layer, R, mean_D, k) for R in (
        torch.cat([P_DD, -P_DD]), directions(F, len(mean_D), seed).to(mean_D.device)))
    return dict(neurons=fit(Neurons(layer, mlp, k), gpt, layer, rows_RT), pca=pca,
                random=fit(random, gpt, layer, rows_RT, gain=True), svd=SVD(layer, mlp, k))

def random_target(gpt, folder, seed):
    """Writes a folder for --model: gpt's architecture and vocabulary, fresh weights."""
    GPT(gpt.cfg, common.generator(seed, "random target")).save(folder, gpt.vocab, gpt.meta | {"random": seed})

def main(cfg):
    gpt = GPT.load(cfg.model, dev := common.device(cfg.device))
    layer, T = default_layer(gpt) if cfg.layer == -1 else cfg.layer, gpt.cfg.n_positions
    common.within(vars(cfg) | {"layer": layer},
                  layer=(0, gpt.cfg.n_layer - 1), k=(1, cfg.F), eval_tokens=(T, 10**9))
    corpora = data.load_all(cfg.data, gpt.vocab, T, ("fit", "test"))
    rows, test = (corpora[split].rows(T, cfg.eval_tokens // T).to(dev) for split in ("fit", "test"))
    found = baselines(gpt, layer, rows, cfg.k, cfg.F, cfg.seed)
    replaces = evals.ablations(gpt, layer, rows) | {name: evals.splice(m) for name, m in found.items()}
    table = evals.scores(gpt, test, replaces)
    print(*evals.score_lines(table, table), sep="\n")
    for name, used in {name: evals.usage(m, gpt, layer, test) for name, m in found.items()}.items():
        print(f"{name:12}FVE {used['fve']:.3f}, L0 {used['l0']:.1f}, {used['active_params']:,.0f} active parameters")

if __name__ == "__main__":
    main(common.cli(Config))
