"""CLT: which few features, each read at one MLP, add up to what all MLPs of a model write?

A cross-layer transcoder reads the input of every MLP. A feature is read at one of them and writes
to the output of that MLP and of all later ones. So what a model carries on over several layers can
be one feature, where a transcoder of each MLP (transcoder.py) would find it again at each layer.

    z^l = W_enc^l x^l + b_enc^l             x^l: what the MLP of layer l reads, after LayerNorm
    f^l = z^l 1[z^l > theta^l]              the features read at layer l, nearly all of them 0
    y_hat^l = sum_{l' <= l} W_dec^{l'->l} f^l' + b_dec^l            y^l: what the MLP writes
    |W_i^l| = sqrt(sum_{l' >= l} |W_dec,i^{l->l'}|^2)               all that feature i of l writes

What makes f sparse (--variant), a function each:
    batchtopk   on are the k N largest |W_i^l| z_i^l of a layer, over the N tokens of a batch;
                once trained theta_i^l = tau^l / |W_i^l|, tau^l the running mean of the smallest one
                loss = sum_l NMSE(y_hat^l, y^l) + c_aux sum_l NMSE(e_hat^l, y^l - y_hat^l)
                e_hat^l: what k_aux N dead features would write; learning it revives them
                Bussmann et al. 2024, arXiv:2412.06410; ordered by what a feature writes: Minder et
                al. 2025, arXiv:2504.02922; e_hat: Gao et al. 2024, arXiv:2406.04093
    jumprelu    theta is trained
                loss = sum_l NMSE(y_hat^l, y^l) + lam sum_{l, i} tanh(c |W_i^l| f_i^l)
                       + lam_p sum_{l, dead i} relu(theta_i^l - z_i^l) |W_i^l|
                the last term moves z alone, up to its threshold
                Rajamanoharan et al. 2024, arXiv:2407.14435; Ameisen et al. 2025

Ameisen et al. 2025, "Circuit Tracing" (methods): the CLT, and both penalties of jumprelu.

--no-off_diagonal is the control: features write at their own layer alone.

Differs from the papers: lam_p is for dead features only. No KL objective: the rest of a model
begins behind one MLP, and a CLT stands in for all.

N tokens, L layers, D residual width, F features of a layer; l leads what has one row for each layer
that writes, so (l + 1) F features write at layer l

    python clt.py --k 16    # 4 minutes on one core: CE recovered 0.996, FVE 0.940 at L0 32; all
                            # MLPs at once 0.986
"""
import copy
import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import common
import data
import evals
from model import GPT, default_layer
from report import curve, gallery


@dataclasses.dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] MLP to report on; -1: config.json's, or the middle
    replace: Literal["this", "all"] = "this"  # stands in for the MLP of --layer, or for all at once
    out: str = "runs/clt"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, k or lam times 1/4 to 4: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation and the batches
    # features
    variant: Literal["batchtopk", "jumprelu"] = "batchtopk"  # what makes the features sparse
    F: int = 512                    # [1, 1e7] features per layer: 8 D write into layer 1
    off_diagonal: bool = True       # off: the control; equal parameters at F (L + 3) / 4
    k: int = 16                     # [1, 1e7] batchtopk: features on per token and layer; THE knob
    # training
    steps: int = 3000               # [1, 1e8] training steps
    N: int = 1024                   # [2, 1e8] tokens per step
    T: int = 128                    # [3, 1e6] positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all their directions
    lr: float = 2e-3                # (0, 100] up in 2.5 % of the steps, to 0 in the last 20 %
    lr_rest: float = 2e-3           # (0, 100] muon: of biases and thresholds; adam: all are at lr
    clip: float = 1.0               # (0, 1e9] gradient norm
    # loss
    lam: float = 1e-3               # [0, 1e9] jumprelu: sparsity, THE knob; more steps are sparser
    ramp: float = 1.0               # (0, 1] jumprelu: share of the steps in which lam rises
    c: float = 4.0                  # [0, 1e6] jumprelu: steepness of the tanh
    theta: float = 0.03             # [0, 1e6] jumprelu: first thresholds
    bandwidth: float = 1.0          # (0, 1e6] jumprelu: window in which thresholds learn
    lam_p: float = 1e-4             # [0, 1e9] jumprelu: pull of dead features to thresholds
    k_aux: int = 64                 # [1, 1e7] batchtopk: dead features a token may use
    c_aux: float = 1 / 32           # [0, 1e9] batchtopk: that dead features write the error
    dead_after: float = 0.05        # (0, 1] share of all tokens after which a feature is dead
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 1000          # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses


RENAMED = {"bw": "bandwidth"}      # flags by their old names
MAY_CHANGE_ON_RESUME = {"model", "layer", "replace", "out", "resume", "sweep", "page", "device",
                        "log_every", "save_every", "eval_tokens"}


# ----------------------------------------------------------------------------- which are on
def jumprelu(z_LNF, theta_LF, bw):
    """Keep what is above its feature's threshold: f = z 1[z > theta].

    f jumps at theta, and its slope by theta is a spike there, which no sample hits. It is smeared
    over a window of width bw: -theta / bw wherever z is in the window (Rajamanoharan et al. 2024,
    section 4). The window is laid on z: laid on f, which is 0 below theta, half would be lost."""
    theta_L1F = theta_LF.detach().unsqueeze(1)
    is_near_LNF = (z_LNF.detach() - theta_L1F).abs() <= bw / 2
    slope_LNF = -theta_L1F / bw * is_near_LNF
    # a 0 that has this slope by theta
    zero_LNF = slope_LNF * (theta_LF.unsqueeze(1) - theta_L1F)
    return z_LNF * (z_LNF > theta_L1F) + zero_LNF


def batchtopk(z_LNF, norm_LF, k):
    """Keep the k N features of each layer that write most on the batch: (f_LNF, least_L).

    A feature writes |W| relu(z) at a token. least_L: the least that one that is kept writes. The
    choice itself has no gradient."""
    size_LNF = z_LNF.detach().relu() * norm_LF.detach().unsqueeze(1)
    n_kept = k * z_LNF.shape[1]
    least_L = size_LNF.flatten(1).topk(n_kept, sorted=False).values.amin(1)
    # where fewer than k N write anything, least is 0, and what writes nothing stays off
    is_on_LNF = (size_LNF >= least_L[:, None, None]) & (size_LNF > 0)
    return z_LNF * is_on_LNF, least_L


# ---------------------------------------------------------------------------------- the method
def uniform(bound, shape, gen):
    """A parameter drawn evenly from -bound to bound."""
    return nn.Parameter((2 * torch.rand(shape, generator=gen) - 1) * bound)


class CLT(nn.Module):
    """W_enc_LDF: what features read; W_dec[l] (l + 1, F, D): what those of layers 0 to l write at
    layer l. layers: the MLPs that it stands in for. The buffers are what training remembers."""
    kind = "dictionary"
    matrices = ()

    def __init__(self, L, D, cfg, gen, layers):
        super().__init__()
        self.layers = layers
        self.off_diagonal = cfg.off_diagonal
        self.seen = {}                  # f_BTF of each layer, in the present forward pass
        self.W_enc_LDF = uniform(cfg.F ** -0.5, (L, D, cfg.F), gen)
        self.b_enc_LF = nn.Parameter(torch.zeros(L, cfg.F))
        # batchtopk's thresholds have no gradient: `remember` sets them
        theta_LF = torch.full((L, cfg.F), cfg.theta)
        self.theta_LF = nn.Parameter(theta_LF, requires_grad=cfg.variant == "jumprelu")
        self.W_dec = nn.ParameterList()
        for l in range(L):
            W_lFD = uniform((L * D) ** -0.5, (len(self.writers(l)), cfg.F, D), gen)
            self.W_dec.append(W_lFD)
        self.b_dec_LD = nn.Parameter(torch.zeros(L, D))
        self.register_buffer("tau_L", torch.zeros(L))               # batchtopk: mean of least_L
        self.register_buffer("idle_LF", torch.zeros(L, cfg.F))      # tokens since it was on

    def writers(self, l):
        """Layers whose features write at layer l."""
        return list(range(l + 1)) if self.off_diagonal else [l]

    def preactivations(self, x_LND):
        return torch.baddbmm(self.b_enc_LF.unsqueeze(1), x_LND, self.W_enc_LDF)

    def write(self, f_LNF, some=slice(None)):
        """y_hat_LND: what features that are on that much write at each MLP.

        some: f_LNF holds these features of each layer alone."""
        y_hat = []
        for l, (b_D, W_lFD) in enumerate(zip(self.b_dec_LD, self.W_dec)):
            # y_hat^l = sum_l' f^l' @ W_dec^{l'->l} + b_dec^l, with all l' side by side
            f_NF = torch.cat([f_LNF[i] for i in self.writers(l)], 1)
            y_hat.append(torch.addmm(b_D, f_NF, W_lFD[:, some].flatten(0, 1)))
        return torch.stack(y_hat)

    def norms(self):
        """How much does each feature write in all? |W_i^l|, (L, F)."""
        square_LF = [0] * len(self.W_dec)
        for l, W_lFD in enumerate(self.W_dec):
            for i, square_F in zip(self.writers(l), W_lFD.square().sum(-1)):
                square_LF[i] = square_LF[i] + square_F
        return torch.stack(square_LF).add(1e-12).sqrt()

    def standing_in(self, layers):
        """The CLT, weights and all, for other MLPs."""
        other = copy.copy(self)
        other.layers = layers
        return other

    # The seam (evals.py). Units at layer l: the features of its writers in order, F each.
    def unit_directions(self):
        """A block for each layer whose features write at the one MLP that this CLT stands in for.

        What a feature writes counts wherever it writes: the vectors of all layers, end to end."""
        layer, = self.layers
        blocks = []
        for i in self.writers(layer):
            written = [W_lFD[self.writers(l).index(i)] for l, W_lFD in enumerate(self.W_dec)
                       if i in self.writers(l)]
            blocks.append((f"layer{i}", self.W_enc_LDF[i].T, torch.cat(written, 1), None))
        return blocks

    def unit_inputs(self, gpt, rows_RT):
        layer, = self.layers
        x_LND, _ = data.over_rows(gpt, rows_RT, self.writers(layer))
        return list(x_LND)

    @property
    def reads(self):
        """Layers whose features write at some MLP that this CLT stands in for."""
        layers = set()
        for l in self.layers:
            layers.update(self.writers(l))
        return sorted(layers)

    @property
    def params_F(self):
        """Parameters of a unit: its encoder, and its decoders into the MLPs that are replaced."""
        _, F, D = self.W_dec[0].shape
        sizes = []
        for i in self.writers(self.layers[-1]):
            n_decoders = sum(i in self.writers(l) for l in self.layers)
            sizes.append(torch.full((F,), D * (1 + n_decoders)))
        return torch.cat(sizes)

    def encode(self, layer, x_BTD, mlp):
        """f of all features that write at `layer`. The model calls layers in order, so those of the
        layers below were seen before; they are kept for the layers above."""
        z_BTF = x_BTD @ self.W_enc_LDF[layer] + self.b_enc_LF[layer]
        self.seen[layer] = z_BTF * (z_BTF > self.theta_LF[layer])
        return torch.cat([self.seen[i] for i in self.writers(layer)], -1)

    def decode(self, layer, f_BTF, x_BTD):
        return f_BTF @ self.W_dec[layer].flatten(0, 1) + self.b_dec_LD[layer]

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[layer].flatten(0, 1)[units]


class Scale(nn.Module):
    """What training sees: (x - mean_x) / s_x and (y - mean_y) / s_y.

    A layer has one number s_x, not one per dimension, such that E |.|^2 = D; and so for y."""
    def __init__(self, x_LND, y_LND):
        super().__init__()
        for name, a_LND in (("x", x_LND), ("y", y_LND)):
            mean_L1D = a_LND.mean(1, keepdim=True)
            s_L11 = (a_LND - mean_L1D).square().mean((1, 2), True).sqrt()
            self.register_buffer(f"mean_{name}", mean_L1D)
            self.register_buffer(f"s_{name}", s_L11)

    def forward(self, x_LND, y_LND):
        return (x_LND - self.mean_x) / self.s_x, (y_LND - self.mean_y) / self.s_y

    @torch.no_grad()
    def fold(self, clt):
        """A copy of the CLT with the scales in its weights: it reads and writes raw activations."""
        raw = copy.deepcopy(clt)
        # W (x - mean) / s + b = (W / s) x + (b - (W / s) mean)
        raw.W_enc_LDF.div_(self.s_x)
        raw.b_enc_LF.sub_((self.mean_x @ raw.W_enc_LDF).squeeze(1))
        # y = s y_hat + mean
        raw.b_dec_LD.mul_(self.s_y.squeeze(1)).add_(self.mean_y.squeeze(1))
        for W_lFD, s in zip(raw.W_dec, self.s_y):
            W_lFD.mul_(s)
        return raw


# ------------------------------------------------------------------------------------ the loss
class Features(NamedTuple):
    """What both variants start from."""
    z_LNF: Tensor                   # preactivations
    norm_LF: Tensor                 # |W_i^l|
    is_dead_LF: Tensor              # was off for a share dead_after of the run, and still is


class Written(NamedTuple):
    """What features that are sparse made of a batch."""
    f_LNF: Tensor
    y_hat_LND: Tensor
    sparsity: Tensor                # lam times the penalty
    rescue: Tensor                  # what revives dead features, times its weight
    least_L: Tensor | None = None   # batchtopk: the least that a feature that is on writes


def nmse(y_hat_LND, y_LND):
    """How much of each layer's output is missing, as a share of its variance? (L); 0 = nothing,
    1 = as bad as the mean."""
    return (y_hat_LND - y_LND).square().mean((1, 2)) / y_LND.var(1).mean(1)


# Each takes the CLT, its Features, the outputs y_LND, the Config and the share of training done,
# 0 to 1, and returns what is Written.
def write_above_thresholds(clt, features, y_LND, cfg, progress):
    """jumprelu: on is what is above its feature's own threshold, at a price for being on."""
    z_LNF, norm_LF, is_dead_LF = features
    f_LNF = jumprelu(z_LNF, clt.theta_LF, cfg.bandwidth)
    y_hat_LND = clt.write(f_LNF)

    # the price: tanh counts a feature that writes much as about 1, however much it writes
    lam = cfg.lam * min(1, progress / cfg.ramp)
    saturated_LNF = torch.tanh(cfg.c * norm_LF.unsqueeze(1) * f_LNF)
    sparsity = lam * saturated_LNF.sum((0, 2)).mean()

    # dead features get no gradient from that: they are pulled up to their thresholds
    under_LNF = (clt.theta_LF.detach().unsqueeze(1) - z_LNF).relu()
    rescue = cfg.lam_p * (under_LNF.mean(1) * norm_LF.detach() * is_dead_LF).sum()
    return Written(f_LNF, y_hat_LND, sparsity, rescue)


def write_largest(clt, features, y_LND, cfg, progress):
    """batchtopk: on are the k N features of a layer that write most, at no price."""
    f_LNF, least_L = batchtopk(features.z_LNF, features.norm_LF, cfg.k)
    y_hat_LND = clt.write(f_LNF)
    error_LND = (y_LND - y_hat_LND).detach()
    rescue = cfg.c_aux * missed_by_dead(clt, features, error_LND, cfg.k_aux)
    return Written(f_LNF, y_hat_LND, y_LND.new_zeros(()), rescue, least_L)


WRITE = {"jumprelu": write_above_thresholds, "batchtopk": write_largest}


def missed_by_dead(clt, features, error_LND, k_aux):
    """How much of what is missing can the dead features not write? It trains these alone.

    NMSE, summed over layers; 0 if no feature is dead. Gao et al. 2024, appendix A.2."""
    z_LNF, norm_LF, is_dead_LF = features
    # features that are dead at some layer; those that are alive at every layer cost nothing
    some = is_dead_LF.any(0).nonzero().squeeze(1)
    if not len(some):
        return error_LND.new_zeros(())
    z_dead_LNF = z_LNF[..., some] * is_dead_LF[:, some].unsqueeze(1)
    f_dead_LNF, _ = batchtopk(z_dead_LNF, norm_LF[:, some], min(k_aux, len(some)))
    e_hat_LND = clt.write(f_dead_LNF, some) - clt.b_dec_LD.unsqueeze(1)
    return nmse(e_hat_LND, error_LND).sum()


def loss_fn(clt, x_LND, y_LND, cfg, progress):
    """What one step minimises: (total, its terms, f_LNF, least_L). progress: share of training
    done, 0 to 1; least_L: see batchtopk, None with jumprelu."""
    # How much is each feature on, before it has to be sparse? And which have been off for long?
    n_silent = cfg.dead_after * cfg.steps * cfg.N
    features = Features(clt.preactivations(x_LND), clt.norms(), clt.idle_LF > n_silent)

    # What few of them write must be what the MLPs write.
    written = WRITE[cfg.variant](clt, features, y_LND, cfg, progress)
    nmse_L = nmse(written.y_hat_LND, y_LND)

    total = nmse_L.sum() + written.sparsity + written.rescue
    terms = dict(loss=total, nmse=nmse_L.mean(), sparsity=written.sparsity,
                 rescue=written.rescue, dead=features.is_dead_LF.float().mean())
    return total, terms, written.f_LNF, written.least_L


# ------------------------------------------------------------------------------------ training
def as_matrices(W_enc_LDF, W_dec):
    """What Muon turns: the encoder of each layer (D, F), and all decoders into each layer as one
    matrix ((l + 1) F, D), as a forward pass multiplies by it. Views, so that a step which moves
    them moves the weights."""
    return [*W_enc_LDF, *(W_lFD.view(-1, W_lFD.shape[-1]) for W_lFD in W_dec)]


def optimizers(clt, cfg):
    """Adam or Muon for the matrices, Adam for biases and thresholds."""
    matrices = as_matrices(clt.W_enc_LDF.detach(), [W_lFD.detach() for W_lFD in clt.W_dec])
    rest = [p for p in (clt.b_enc_LF, clt.theta_LF, clt.b_dec_LD) if p.requires_grad]
    lr_rest = cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, lr_rest)


@torch.no_grad()
def update(clt, opts, loss, f_LNF, least_L, cfg, progress):
    """Take one step, and return the gradient's norm."""
    warm_up = (progress + 1 / cfg.steps) / 0.025
    common.set_rates(opts, min(1, warm_up, (1 - progress) / 0.2))
    clt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(clt.parameters(), cfg.clip)

    # the optimizer holds views of the matrices: they get views of the gradients
    grads = as_matrices(clt.W_enc_LDF.grad, [W_lFD.grad for W_lFD in clt.W_dec])
    for W, grad in zip(opts["opt"].param_groups[0]["params"], grads):
        W.grad = grad
    for opt in opts.values():
        opt.step()
        opt.zero_grad()             # or views would keep these gradients beside the next step's
    remember(clt, f_LNF, least_L, cfg)
    return norm


@torch.no_grad()
def remember(clt, f_LNF, least_L, cfg):
    """Update the state beside the weights: how long each feature has been off, and thresholds."""
    was_on_LF = (f_LNF > 0).any(1)
    clt.idle_LF.add_(f_LNF.shape[1]).masked_fill_(was_on_LF, 0)
    if cfg.variant == "jumprelu":
        clt.theta_LF.clamp_(min=0)
        return
    # batchtopk: tau is a running mean, from its first value on, and theta = tau / |W|
    tau_L = torch.where(clt.tau_L > 0, clt.tau_L.lerp(least_L, 0.01), least_L)
    clt.tau_L.copy_(tau_L)
    clt.theta_LF.copy_(tau_L.unsqueeze(1) / clt.norms())


def check_memory(cfg, gpt):
    """Fail if there is less memory than a training takes, weights and activations of a step. How
    many activations that are was measured."""
    common.check(cfg)
    L = gpt.cfg.n_layer
    n_decoders = L * (L + 1) // 2 if cfg.off_diagonal else L
    common.need_for_training((L + n_decoders) * cfg.F * gpt.cfg.n_embd, 17 * L * cfg.N * cfg.F,
                             f"--F {cfg.F} --N {cfg.N}", gpt.device)


def build(cfg, gpt):
    """(a fresh CLT of the target's MLPs, the layer to report on), after checking cfg against the
    target."""
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    common.check(dataclasses.replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 T=f"[3, {gpt.cfg.n_positions}]", eval_tokens=f"[{cfg.T}, inf]",
                 k=f"[1, {cfg.F}]", N=f"[2, {data.ROWS * (cfg.T - 1)}]")
    L = gpt.cfg.n_layer
    layers = [layer] if cfg.replace == "this" else list(range(L))
    return CLT(L, gpt.cfg.n_embd, cfg, common.generator(cfg.seed, "init"), layers), layer


def load(path, gpt):
    """Load the CLT that reads and writes raw activations: a checkpoint has it beside the one that
    is trained."""
    tensors, cfg = common.load_trained(path, Config, gpt)
    clt, _ = build(cfg, gpt)
    common.unflat(tensors, clt=clt)
    return clt.to(gpt.device).requires_grad_(False)


def train(cfg):
    device = common.device(cfg.device)
    gpt = GPT.load(cfg.model, device)
    check_memory(cfg, gpt)
    clt, layer = build(cfg, gpt)
    clt.to(device)
    corpus = data.load_for(gpt, cfg.data, cfg.T)
    layers = range(gpt.cfg.n_layer)
    # 64 rows are enough for means and scales
    scale = Scale(*data.at_mlps(gpt, corpus["fit"].rows(cfg.T, 64).to(device), layers))
    opts = optimizers(clt, cfg)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), train=clt, scale=scale, **opts)

    batches = data.batches(gpt, corpus["train"], layers, cfg.T, cfg.N, cfg.seed, run.first_step)
    for step, raw in zip(run.steps(), batches):
        progress = step / cfg.steps
        x_LND, y_LND = scale(*raw)
        loss, terms, f_LNF, least_L = loss_fn(clt, x_LND, y_LND, cfg, progress)
        norm = update(clt, opts, loss, f_LNF, least_L, cfg, progress)
        if run.is_logged:
            run.record(terms, norm, l0=(f_LNF > 0).sum().item() / cfg.N / len(layers))
        if run.is_saved:
            # what is evaluated, beside what is trained
            run.beside = dict(clt=scale.fold(clt))
    clt = scale.fold(clt)
    return clt, summarise(cfg, gpt, clt, corpus, layer, run.seconds)


# ------------------------------------------------------------------------------------- summary
class ConstantAtAll:
    """A vector for each MLP in the place of its output, as GPT.forward takes them."""
    def __init__(self, y_LD):
        self.y_LD = y_LD

    def __call__(self, layer, x_BTD, mlp):
        return self.y_LD[layer].expand_as(x_BTD)


def scores_of_all(gpt, whole, rows_fit_RT, rows_RT):
    """How well does the model do when the CLT stands in for all MLPs at once? Scores, beside those
    of all outputs at their means and at zero."""
    y_LD = torch.stack([evals.mean_output(gpt, l, rows_fit_RT) for l in whole.layers])
    replaces = {"mean ablation": ConstantAtAll(y_LD),
                "zero ablation": ConstantAtAll(torch.zeros_like(y_LD)),
                "all replaced": evals.splice(whole)}
    return evals.scores(gpt, rows_RT, replaces)


def dead_share(m, gpt, fit, F):
    """Which share of the F features that are read at m's layer is dead on fit?"""
    on_F = evals.counts(m, gpt, *fit, (0,))["on"][0, -F:]       # the last block: read there
    return (on_F < evals.ALIVE).float().mean().item()


def used_by_all(gpt, whole, rows_RT):
    """How many features are on, and with how many parameters, when all MLPs are replaced at once?

    All features write at a CLT's last layer. In the control each layer has features of its own."""
    layers = whole.layers[-1:] if whole.off_diagonal else whole.layers
    used = [evals.usage(whole, gpt, l, rows_RT) for l in layers]
    return dict(l0=sum(u["l0"] for u in used), active_params=sum(u["active_params"] for u in used))


def summarise(cfg, gpt, clt, corpus, layer, seconds):
    """Print what was found, write summary.json. Means and the choice of concepts come from fit,
    figures from test."""
    device = gpt.device
    L = gpt.cfg.n_layer
    n_rows = cfg.eval_tokens // cfg.T
    fit, test = (corpus[split].labelled(cfg.T, n_rows, device) for split in ("fit", "test"))
    names = corpus["test"].names
    each = [clt.standing_in([l]) for l in range(L)]
    whole = clt.standing_in(list(range(L)))

    # one MLP replaced, and what each of them takes
    lines, out = evals.replacement(each[layer], gpt, layer, fit, test, names, "features")
    used = [evals.usage(m, gpt, l, test[0]) for l, m in enumerate(each)]
    out["fve_layers"] = [u["fve"] for u in used]
    out["l0_layers"] = [u["l0"] for u in used]
    out["dead_layers"] = [dead_share(m, gpt, fit, cfg.F) for m in each]
    out["seconds"] = seconds

    # all MLPs replaced at once
    table = scores_of_all(gpt, whole, fit[0], test[0])
    out["ce_recovered_all"] = evals.recovered(table, "all replaced")
    out["kl_all"] = table["all replaced"]["kl"]
    if cfg.replace == "all":
        out["ce_recovered"] = out["ce_recovered_all"]
        out["fve"] = sum(out["fve_layers"]) / L
        out["dead_fraction"] = sum(out["dead_layers"]) / L
        out |= used_by_all(gpt, whole, test[0])

    head = (f"\n{cfg.variant}, {cfg.F} features per layer, {cfg.steps * cfg.N:,} tokens, "
            f"{seconds:.0f} s")
    layers = [f"layer {l}: FVE {used[l]['fve']:.3f} at L0 {used[l]['l0']:.1f}, "
              f"{out['dead_layers'][l]:.1%} of the {cfg.F} features read there dead"
              for l in range(L)]
    print(head, *layers, "\nall MLPs at once", *evals.score_lines(table, table),
          f"\nlayer {layer}", *lines, sep="\n")
    found = out | common.provenance(cfg, gpt)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return out


def sweep(cfg):
    """Train at five values of the variant's knob. A bad one ends it before the first training."""
    knob = "k" if cfg.variant == "batchtopk" else "lam"
    middle = getattr(cfg, knob)
    values = [type(middle)(share * middle) for share in curve.SHARES]
    gpt = GPT.load(cfg.model)
    for value in values:
        build(dataclasses.replace(cfg, **{knob: value}), gpt)
    return curve.sweep(train, cfg, knob, values)


def main(cfg):
    if cfg.sweep:
        return sweep(cfg)
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
