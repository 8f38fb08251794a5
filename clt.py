"""CLT, cross-layer transcoder: features read at one MLP's input and written to the outputs of it and of all later ones.
    z^l = W_enc^l x^l + b_enc^l,   f^l = z^l 1[z^l > theta^l]                        x, y: what the MLP of layer l
    y_hat^l = sum_{l' <= l} W_dec^{l'->l} f^l' + b_dec^l                             reads after LayerNorm, and writes
    |W_i^l| = sqrt(sum_{l' >= l} |W_dec,i^{l->l'}|^2)                                all that feature i at l writes
    jumprelu:   loss = sum_l NMSE(y_hat^l, y^l) + lam sum_{l, i} tanh(c |W_i^l| f_i^l)
                     + lam_p sum_{l, dead i} relu(theta_i^l - z_i^l) |W_i^l|      (its gradient goes to z alone)
    batchtopk:  loss = sum_l NMSE(y_hat^l, y^l) + c_aux sum_l NMSE(what dead features would write, y^l - y_hat^l)
                the k N largest |W_i^l| z_i^l of a layer's N tokens are on (dead ones: k_aux N); theta_i^l, which counts
                at inference, is tau^l / |W_i^l|, tau^l the running mean of the smallest of them
  Ameisen et al. 2025, "Circuit Tracing" (methods). JumpReLU: Rajamanoharan et al. 2024 (arXiv:2407.14435). BatchTopK:
  Bussmann et al. 2024 (arXiv:2412.06410), ordered by what a feature writes: Minder et al. 2025 (arXiv:2504.02922).
  Dead features write the error: Gao et al. 2024 (arXiv:2406.04093).
Differs from the papers: lam_p is for dead features only. No KL objective: a suffix begins at one MLP, a CLT serves all.
N tokens, L layers, D residual width, F features of a layer; those that write into layer l count (l + 1) F

    python clt.py --k 16        # 4 minutes on one core: CE recovered 0.996, FVE 0.940 at L0 32; all MLPs at once 0.986
"""
import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import common
import data
import evals
from model import GPT, default_layer
from report import curve

@dataclasses.dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # the MLP reported on; -1: the one the target's config.json names, or the middle one
    replace: Literal["this", "all"] = "this"  # what it stands in for: the MLP of --layer, or all MLPs at once
    out: str = "runs/clt"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, k or lam times 1/4 to 4; the curve in sweep.json and sweep.png
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation and the batches
    variant: Literal["batchtopk", "jumprelu"] = "batchtopk"  # what makes the features sparse
    F: int = 512                    # features per layer: 8 D in all write into layer 1 of the bundled target
    off_diagonal: bool = True       # off: per-layer transcoders, the control; equal parameters at F (L + 3) / 4
    k: int = 16                     # batchtopk: features on per token and layer on average, THE knob
    lam: float = 1e-3               # jumprelu: sparsity, THE knob; L0 falls all through the run, so --steps counts too
    ramp: float = 1.0               # jumprelu: share of the steps over which lam rises from 0
    c: float = 4.0                  # jumprelu: steepness of the tanh
    theta: float = 0.03             # jumprelu: first thresholds
    bw: float = 1.0                 # jumprelu: width of the window around theta in which z gives theta a gradient
    lam_p: float = 1e-4             # jumprelu: pull of the dead features towards their thresholds
    k_aux: int = 64                 # batchtopk: dead features per token that may write the error
    c_aux: float = 1 / 32           # batchtopk: weight of how well they do
    dead_after: float = 0.05        # a feature is dead after this share of the run's tokens without being on
    steps: int = 3000               # training steps
    N: int = 1024                   # tokens per step
    T: int = 128                    # positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all directions of a matrix at once
    lr: float = 2e-3                # rising over the first 2.5 % of the steps, falling to 0 over the last fifth
    lr_rest: float = 2e-3           # muon: of biases and thresholds, which Adam trains; adam: ignored, all are at lr
    clip: float = 1.0               # gradient norm
    log_every: int = 50             # steps between lines of log.jsonl
    save_every: int = 1000          # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses

MAY_CHANGE_ON_RESUME = {"model", "layer", "replace", "out", "resume", "sweep", "device",
                        "log_every", "save_every", "eval_tokens"}

def jumprelu(z_LNF, theta_LF, bw):
    """z 1[z > theta]. No slope leads across the jump, so theta gets the one that the mean over z has, from a rectangle
    of width bw around theta. The rectangle lies on z: on f, its half below theta would be missing."""
    theta_L1F = theta_LF.detach().unsqueeze(1)
    slope_LNF = -theta_L1F / bw * ((z_LNF.detach() - theta_L1F).abs() <= bw / 2)
    return z_LNF * (z_LNF > theta_L1F) + slope_LNF * (theta_LF.unsqueeze(1) - theta_L1F)    # plus 0 that has a slope

def batchtopk(z_LNF, norm_LF, k):
    """(f_LNF, least_L): z of the k N features per layer that write most, and the least that one of them writes."""
    size_LNF = z_LNF.detach().relu() * norm_LF.detach().unsqueeze(1)
    least_L = size_LNF.flatten(1).topk(k * z_LNF.shape[1], sorted=False).values.amin(1)
    return z_LNF * ((size_LNF >= least_L[:, None, None]) & (size_LNF > 0)), least_L

class CLT(nn.Module):
    """W_dec[l] (l + 1, F, D): what the features of layers 0 to l write at l. layers: the MLPs that it stands in for."""
    kind, matrices = "dictionary", ()

    def __init__(self, L, D, cfg, gen, layers):
        super().__init__()
        uniform = lambda bound, *shape: nn.Parameter((2 * torch.rand(shape, generator=gen) - 1) * bound)
        self.layers, self.off_diagonal, self.seen = layers, cfg.off_diagonal, {}
        self.W_enc_LDF = uniform(cfg.F**-0.5, L, D, cfg.F)
        self.b_enc_LF = nn.Parameter(torch.zeros(L, cfg.F))
        self.theta_LF = nn.Parameter(torch.full((L, cfg.F), cfg.theta), cfg.variant == "jumprelu")
        self.W_dec = nn.ParameterList(uniform((L * D)**-0.5, len(self.writers(l)), cfg.F, D) for l in range(L))
        self.b_dec_LD = nn.Parameter(torch.zeros(L, D))
        self.register_buffer("tau_L", torch.zeros(L))               # batchtopk: running threshold, 0 before the first
        self.register_buffer("idle_LF", torch.zeros(L, cfg.F))      # tokens since a feature was on

    def writers(self, l):
        """Layers whose features write at layer l."""
        return list(range(l + 1)) if self.off_diagonal else [l]

    def preactivations(self, x_LND):
        return torch.baddbmm(self.b_enc_LF.unsqueeze(1), x_LND, self.W_enc_LDF)

    def write(self, f_LNF, some=slice(None)):
        """y_hat_LND, by one product per layer; f is that of the features `some` of each layer."""
        fs = [torch.cat([f_LNF[i] for i in self.writers(l)], 1) for l in range(len(f_LNF))]
        return torch.stack([torch.addmm(b_D, f_NF, W_lFD[:, some].flatten(0, 1))
                            for b_D, f_NF, W_lFD in zip(self.b_dec_LD, fs, self.W_dec)])

    def norms(self):
        """|W_i^l|, (L, F)."""
        square = [dict(zip(self.writers(l), W.square().sum(-1))) for l, W in enumerate(self.W_dec)]
        return torch.stack([sum(s_F[l] for s_F in square if l in s_F) for l in range(len(square))]).add(1e-12).sqrt()

    def standing_in(self, layers):
        """The same CLT for other MLPs."""
        other = copy.copy(self)
        other.layers = layers
        return other

    # The seam (evals.py). Units at layer l: the features of its writers in order, F each.
    def unit_directions(self):
        """Of the features that write at its one layer, a block for each layer where they are read. All that a feature
        writes counts, there and later."""
        (layer,), L = self.layers, len(self.W_dec)
        written = lambda i: [self.W_dec[l][self.writers(l).index(i)] for l in range(L) if i in self.writers(l)]
        return [(f"layer{i}", self.W_enc_LDF[i].T, torch.cat(written(i), 1), None) for i in self.writers(layer)]

    def unit_inputs(self, gpt, rows_RT):
        (layer,) = self.layers
        return list(data.over_rows(gpt, rows_RT, self.writers(layer))[0])

    @property
    def reads(self):
        return sorted({i for l in self.layers for i in self.writers(l)})

    @property
    def params_F(self):
        """A unit's encoder, and its decoders into the replaced MLPs."""
        _, F, D = self.W_dec[0].shape
        return torch.cat([torch.full((F,), D * (1 + sum(i in self.writers(l) for l in self.layers)))
                          for i in self.writers(self.layers[-1])])

    def encode(self, layer, x_BTD, mlp):
        """Keeps the features, for the layers after: the model calls layers in order."""
        z_BTF = x_BTD @ self.W_enc_LDF[layer] + self.b_enc_LF[layer]
        self.seen[layer] = z_BTF * (z_BTF > self.theta_LF[layer])
        return torch.cat([self.seen[i] for i in self.writers(layer)], -1)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W_dec[layer].flatten(0, 1) + self.b_dec_LD[layer]

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[layer].flatten(0, 1)[units]

class Scale(nn.Module):
    """Training sees (x - mean_x) / s_x and (y - mean_y) / s_y with one s per layer, such that E |.|^2 = D."""
    def __init__(self, x_LND, y_LND):
        super().__init__()
        for name, a_LND in (("x", x_LND), ("y", y_LND)):
            self.register_buffer(f"mean_{name}", a_LND.mean(1, keepdim=True))
            self.register_buffer(f"s_{name}", (a_LND - a_LND.mean(1, keepdim=True)).square().mean((1, 2), True).sqrt())

    def forward(self, x_LND, y_LND):
        return (x_LND - self.mean_x) / self.s_x, (y_LND - self.mean_y) / self.s_y

    @torch.no_grad()
    def fold(self, clt):
        """The CLT that reads and writes raw activations."""
        raw = copy.deepcopy(clt)
        raw.W_enc_LDF.div_(self.s_x)
        raw.b_enc_LF.sub_((self.mean_x @ raw.W_enc_LDF).squeeze(1))
        raw.b_dec_LD.mul_(self.s_y.squeeze(1)).add_(self.mean_y.squeeze(1))
        for W, s in zip(raw.W_dec, self.s_y):
            W.mul_(s)
        return raw

def loss_fn(clt, x_LND, y_LND, cfg, t):
    """(total, its terms, f_LNF, least_L) on one batch; t in [0, 1]: share of training done; least_L: see batchtopk."""
    z_LNF, norm_LF, dead_LF = clt.preactivations(x_LND), clt.norms(), clt.idle_LF > cfg.dead_after * cfg.steps * cfg.N
    nmse_L = lambda y_hat_LND, y_LND: (y_hat_LND - y_LND).square().mean((1, 2)) / y_LND.var(1).mean(1)
    if cfg.variant == "jumprelu":
        f_LNF, least_L = jumprelu(z_LNF, clt.theta_LF, cfg.bw), None
        y_hat_LND = clt.write(f_LNF)
        sparsity = cfg.lam * min(1, t / cfg.ramp) * torch.tanh(cfg.c * norm_LF.unsqueeze(1) * f_LNF).sum((0, 2)).mean()
        under_LNF = (clt.theta_LF.detach().unsqueeze(1) - z_LNF).relu()
        rescue = cfg.lam_p * (under_LNF.mean(1) * norm_LF.detach() * dead_LF).sum()
    else:
        f_LNF, least_L = batchtopk(z_LNF, norm_LF, cfg.k)
        y_hat_LND = clt.write(f_LNF)
        sparsity = rescue = x_LND.new_zeros(())
        some = dead_LF.any(0).nonzero().squeeze(1)          # those that are dead at any layer: the rest costs nothing
        if len(some):
            z_dead_LNF = z_LNF[..., some] * dead_LF[:, some].unsqueeze(1)
            f_dead_LNF, _ = batchtopk(z_dead_LNF, norm_LF[:, some], min(cfg.k_aux, len(some)))
            e_hat_LND = clt.write(f_dead_LNF, some) - clt.b_dec_LD.unsqueeze(1)
            rescue = cfg.c_aux * nmse_L(e_hat_LND, (y_LND - y_hat_LND).detach()).sum()
    nmse = nmse_L(y_hat_LND, y_LND)
    total = nmse.sum() + sparsity + rescue
    terms = dict(loss=total, nmse=nmse.mean(), sparsity=sparsity, rescue=rescue, dead=dead_LF.float().mean())
    return total, terms, f_LNF, least_L

def as_matrices(W_enc_LDF, W_dec):
    """What Muon turns: the encoder of each layer (D, F), and all decoders into each layer as one matrix ((l + 1) F, D),
    as a forward pass multiplies by it. Views: a step that moves them moves the weights."""
    return [*W_enc_LDF, *(W_lFD.view(-1, W_lFD.shape[-1]) for W_lFD in W_dec)]

def optimizers(clt, cfg):
    """Adam or Muon for the matrices, Adam for biases and thresholds."""
    matrices = as_matrices(clt.W_enc_LDF.detach(), [W.detach() for W in clt.W_dec])
    rest = [p for p in (clt.b_enc_LF, clt.theta_LF, clt.b_dec_LD) if p.requires_grad]
    lr_rest = cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, lr_rest)

@torch.no_grad()
def update(clt, opts, loss, f_LNF, least_L, cfg, t):
    """One step of the optimizers, then thresholds and counters. Returns the gradient's norm."""
    common.set_rates(opts, min(1, (t + 1 / cfg.steps) / 0.025, (1 - t) / 0.2))
    clt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(clt.parameters(), cfg.clip)
    grads = as_matrices(clt.W_enc_LDF.grad, [W.grad for W in clt.W_dec])
    for W, grad in zip(opts["opt"].param_groups[0]["params"], grads):
        W.grad = grad
    for opt in opts.values():
        opt.step()
        opt.zero_grad()             # or the views would hold this step's gradients beside the next one's
    clt.idle_LF.add_(f_LNF.shape[1]).masked_fill_((f_LNF > 0).any(1), 0)
    if cfg.variant == "jumprelu":
        clt.theta_LF.clamp_(min=0)
    else:
        clt.tau_L.copy_(torch.where(clt.tau_L > 0, clt.tau_L.lerp(least_L, 0.01), least_L))
        clt.theta_LF.copy_(clt.tau_L.unsqueeze(1) / clt.norms())
    return norm

def build(cfg, gpt):
    """(a fresh CLT of the target's MLPs, the layer to report on), after checking cfg against the target."""
    layer, every = default_layer(gpt) if cfg.layer == -1 else cfg.layer, list(range(gpt.cfg.n_layer))
    common.within(vars(cfg) | {"layer": layer}, "F", "steps", "log_every", "save_every",
                  layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions),
                  eval_tokens=(cfg.T, math.inf), k=(1, cfg.F), N=(2, data.ROWS * (cfg.T - 1)),
                  theta=(0, math.inf), bw=(1e-6, math.inf), ramp=(1e-6, 1))
    gen = common.generator(cfg.seed, "init")
    return CLT(len(every), gpt.cfg.n_embd, cfg, gen, [layer] if cfg.replace == "this" else every), layer

def load(path, gpt):
    """The CLT with its scales folded in, which a checkpoint has beside the one that is trained."""
    tensors, meta = common.load(path, method=Path(__file__).stem, target=gpt.hash)
    clt, _ = build(Config(**meta["config"]), gpt)
    common.unflat(tensors, clt=clt)
    return clt.to(gpt.wte.weight.device).requires_grad_(False)

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    clt, layer = build(cfg, gpt)
    corpus, every = data.load_all(cfg.data, gpt.vocab, cfg.T), range(gpt.cfg.n_layer)
    scale = Scale(*data.at_mlps(gpt, corpus["fit"].rows(cfg.T, 64).to(dev), every))     # 64 rows are enough
    opts = optimizers(clt.to(dev), cfg)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), train=clt, scale=scale, **opts)
    batches = data.batches(gpt, corpus["train"], every, cfg.T, cfg.N, cfg.seed, run.first_step)
    for step in run.steps():
        t = step / cfg.steps
        loss, terms, f_LNF, least_L = loss_fn(clt, *scale(*next(batches)), cfg, t)
        norm = update(clt, opts, loss, f_LNF, least_L, cfg, t)
        if run.is_logged:
            run.record(terms, norm, l0=(f_LNF > 0).sum().item() / cfg.N / len(every))
        if run.is_saved:            # what is evaluated, beside what is trained
            run.beside = dict(clt=scale.fold(clt))
    clt = scale.fold(clt)
    return clt, summarise(cfg, gpt, clt, corpus, layer, run.seconds)

def summarise(cfg, gpt, clt, corpus, layer, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    dev, every = gpt.wte.weight.device, list(range(gpt.cfg.n_layer))
    fit, test = (corpus[s].labelled(cfg.T, cfg.eval_tokens // cfg.T, dev) for s in ("fit", "test"))
    each, whole = [clt.standing_in([l]) for l in every], clt.standing_in(every)
    lines, out = evals.replacement(each[layer], gpt, layer, fit, test, corpus["test"].names, "features")
    used = [evals.usage(m, gpt, l, test[0]) for l, m in enumerate(each)]
    own = [evals.counts(m, gpt, *fit, (0,))["on"][0, -cfg.F:] for m in each]       # of the features read at a layer
    means = [evals.mean_output(gpt, l, fit[0]) for l in every]
    table = evals.scores(gpt, test[0], {"mean ablation": lambda l, x_BTD, mlp: means[l].expand_as(x_BTD),
                                        "zero ablation": lambda l, x_BTD, mlp: torch.zeros_like(x_BTD),
                                        "all replaced": evals.splice(whole)})
    out |= dict(fve_layers=[u["fve"] for u in used], l0_layers=[u["l0"] for u in used], seconds=seconds,
                dead_layers=[(on_F < evals.ALIVE).float().mean().item() for on_F in own],
                ce_recovered_all=evals.recovered(table, "all replaced"), kl_all=table["all replaced"]["kl"])
    if cfg.replace == "all":        # a CLT's last layer is written by all features, that of a control by its own
        ends = [evals.usage(whole, gpt, l, test[0]) for l in (every[-1:] if cfg.off_diagonal else every)]
        mean = lambda name: sum(out[name]) / len(every)
        out |= dict(ce_recovered=out["ce_recovered_all"], fve=mean("fve_layers"), dead_fraction=mean("dead_layers"),
                    **{name: sum(u[name] for u in ends) for name in ("l0", "active_params")})
    head = [f"layer {l}: FVE {u['fve']:.3f} at L0 {u['l0']:.1f}, {dead:.1%} of the {cfg.F} features read there dead"
            for l, (u, dead) in enumerate(zip(used, out["dead_layers"]))]
    print(f"\n{cfg.variant}, {cfg.F} features per layer, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s", *head,
          "\nall MLPs at once", *evals.score_lines(table, table), f"\nlayer {layer}", *lines, sep="\n")
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

def main(cfg):
    if not cfg.sweep:
        return train(cfg)
    knob, gpt = "k" if cfg.variant == "batchtopk" else "lam", GPT.load(cfg.model)
    values = [type(getattr(cfg, knob))(share * getattr(cfg, knob)) for share in curve.SHARES]
    for value in values:            # a bad one ends it before the first training
        build(dataclasses.replace(cfg, **{knob: value}), gpt)
    return curve.sweep(train, cfg, knob, values)

if __name__ == "__main__":
    main(common.cli(Config))
