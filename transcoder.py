"""Transcoder: which few of F directions add up to what an MLP does on each token?

A transcoder reads the input x of an MLP, turns it into F numbers f, nearly all of them zero, and
writes the MLP's output y as the sum of the directions W_dec[i], each times its f_i. It can stand in
for the MLP, while an SAE reads the output that it explains.

    pre = x W_enc^T + b_enc
    y_hat = f W_dec + b_dec (+ x W_skip)    rows of W_dec have norm 1; y is scaled: E|y| = sqrt(D)
    loss = NMSE + c_aux AuxK + lambda penalty           topk and batchtopk have no penalty
    NMSE = E|y - y_hat|^2 / E|y - E y|^2    --objective kl: KL of the model's predictions instead
    AuxK = |e - e_hat|^2 / |e - E e|^2      what is missing, e = y - y_hat, rebuilt by dead units:
                                            e_hat from their D / 2 largest pre, negative ones
                                            too. Only dead units learn from it: it revives them

The sparsities (--variant) are the SAE's, a function each in sae.py; so is a step of training:
    topk        f = the k largest of relu(pre) of each token
                Gao et al. 2024, arXiv:2406.04093, which has AuxK too
    batchtopk   f = the k N largest of the batch; once trained relu(pre) above a threshold
                Bussmann et al. 2024, arXiv:2412.06410
    jumprelu    f = pre 1[pre > theta]; penalty (L0 / k - 1)^2, L0 = E sum_i 1[pre_i > theta_i]
                Rajamanoharan et al. 2024, arXiv:2407.14435
    relu        f = relu(pre); penalty E sum_i f_i, the L1 norm
                Dunefsky et al. 2024, arXiv:2406.11944, "Transcoders find interpretable circuits"
How to fork this file for a sparsity with parameters of its own: stochastic.py.

--skip adds the affine map x W_skip, from 0 on (Paulo, Shabalin, Belrose 2025, arXiv:2501.18823).

Differs from the papers: theta itself is trained, not its logarithm, clamped at 0, in a wide window;
relu's lambda follows L0, whose goal falls from F to k, so that every variant ends at an L0 of about
k; unit-norm rows of W_dec and AuxK in every variant.

N tokens of a batch, B sequences, T positions, D residual width, F units, L layers (here 1), R rows
of tokens
CE recovered: 0 with the MLP's mean output, 1 with the MLP; FVE: 1 - NMSE of the MLP's output

    python transcoder.py --F 1024 --k 32    # 66 s on one core: CE recovered 0.998, FVE 0.970
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import evals
from model import GPT, default_layer
from report import curve, gallery
from sae import (SPARSITIES, PreActivations, aux_k, check_memory, check_variant, curve_of_k,
                 keep_once_trained, nmse, optimizers, remember, update)


@dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    out: str = "runs/transcoder"    # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, k / 4 to 4 k: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation and the batches
    # units
    F: int = 1024                   # [1, 1e7] units
    k: int = 32                     # [1, 1e7] units on per token
    # stochastic is refused: it has a file of its own, stochastic.py
    variant: Literal["topk", "batchtopk", "jumprelu", "relu", "stochastic"] = "topk"  # sparsity
    skip: bool = False              # add the affine map x W_skip
    # training
    objective: Literal["mse", "kl"] = "mse"  # rebuild the output, or the predictions
    steps: int = 2000               # [1, 1e8] training steps
    N: int = 2048                   # [2, 1e8] tokens per step
    T: int = 128                    # [3, 1e6] positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all their directions
    lr: float = 4e-3                # (0, 100] up in 5 % of the steps, to 0 in the last 20 %
    lr_rest: float = 4e-3           # (0, 100] muon: of biases and thresholds; adam: all are at lr
    enc: float = 0.5                # (0, 1e6] first norm of W_enc's rows; at 1 they turn too slowly
    clip: float = 1.0               # (0, 1e9] gradient norm
    # loss
    c_aux: float = 1 / 32           # [0, 1e9] AuxK
    dead: int = 20_000              # [1, 1e12] tokens of silence after which a unit is dead
    beta: float = 0.99              # [0, 1) batchtopk: of the running mean that is the threshold
    theta: float = 0.5              # [0, 1e6] jumprelu: first threshold
    bandwidth: float = 0.2          # (0, 1e6] jumprelu: window in which thresholds learn
    c_l0: float = 1.0               # [0, 1e9] jumprelu: lambda, reached after half of the steps
    c_first: float = 1e-3           # [0, 1e9] relu: first lambda
    follow: float = 0.03            # [0, 10] relu: a step multiplies lambda by at most exp(follow)
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 500           # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses


# flags that a resumed run may give other values (common.Run)
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "sweep", "page", "log_every",
                        "save_every", "eval_tokens"}


# ---------------------------------------------------------------------------------- the method
class Transcoder(nn.Module):
    """W_enc (F, D) and b_enc: what units read; W_dec (F, D): what they write. The buffers are
    what training remembers and evaluation needs."""
    # for evals.py, as is what follows "The seam" below
    kind = "dictionary"
    matrices = ()

    def __init__(self, cfg, D, gen, layer=0):
        super().__init__()
        self.cfg = cfg
        self.layers = [layer]
        self.params_F = torch.full((cfg.F,), 2 * D)
        W_FD = F.normalize(torch.randn(cfg.F, D, generator=gen), dim=-1)
        W_dec_FD = F.normalize(torch.randn(cfg.F, D, generator=gen), dim=-1)
        self.W_enc = nn.Parameter(cfg.enc * W_FD)
        self.b_enc = nn.Parameter(torch.zeros(cfg.F))
        self.W_dec = nn.Parameter(W_dec_FD)
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.W_skip = nn.Parameter(torch.zeros(D, D)) if cfg.skip else None
        self.always_params = D * D if cfg.skip else 0
        if cfg.variant == "jumprelu":
            self.theta = nn.Parameter(torch.full((cfg.F,), cfg.theta))
        else:
            self.theta = None
        self.register_buffer("scale_in", torch.tensor(1.))      # of x, until `fold`
        self.register_buffer("scale", torch.tensor(1.))         # of y, until `fold`
        self.register_buffer("variance", torch.tensor(1.))      # E|y - E y|^2
        self.register_buffer("threshold", torch.tensor(0.))     # batchtopk: on above it
        self.register_buffer("lam", torch.tensor(cfg.c_first))  # relu: lambda
        self.register_buffer("idle", torch.zeros(cfg.F, dtype=torch.long))  # tokens of silence

    @torch.no_grad()
    def start(self, x_ND, y_ND):
        """Take scales, variance and biases from a first batch: pre and y_hat are centred."""
        self.scale_in.copy_(x_ND.shape[-1] ** 0.5 / x_ND.norm(dim=-1).mean())
        self.b_enc.sub_(self.W_enc @ (x_ND * self.scale_in).mean(0))
        self.scale.copy_(y_ND.shape[-1] ** 0.5 / y_ND.norm(dim=-1).mean())
        self.b_dec.copy_((y_ND * self.scale).mean(0))
        self.variance.copy_((y_ND * self.scale - self.b_dec).square().sum(-1).mean())

    @torch.no_grad()
    def fold(self):
        """Move the scales into the weights, so that from now on raw activations are read.

        pre and f are divided by the scale of y, and so are biases, thetas and the threshold."""
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            tensor.div_(self.scale)
        if self.theta is not None:
            self.theta.div_(self.scale)
        self.W_enc.mul_(self.scale_in / self.scale)
        if self.W_skip is not None:
            self.W_skip.mul_(self.scale_in / self.scale)
        self.variance.div_(self.scale.square())
        self.scale.fill_(1)
        self.scale_in.fill_(1)

    def pre(self, x_ND, W_FD, b_F):
        """x W^T + b, with nothing subtracted from x: b_dec is the mean of y."""
        return PreActivations(x_ND, W_FD, b_F)

    def codes(self, x):
        """f once trained."""
        pre = self.pre(x * self.scale_in, self.W_enc, self.b_enc)
        return keep_once_trained(self, pre)

    def affine(self, x):
        """What y_hat has beside the units."""
        return self.b_dec if self.W_skip is None else self.b_dec + x @ self.W_skip

    # The seam: what evals.py asks of every method
    def unit_directions(self):
        return [("all", self.W_enc, self.W_dec, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [x_ND]

    def encoder_input(self, x_BTD, mlp):
        return x_BTD

    def encode(self, layer, x_BTD, mlp):
        return self.codes(self.encoder_input(x_BTD, mlp))

    def decode(self, layer, f_BTF, x_BTD):
        return (f_BTF @ self.W_dec + self.affine(x_BTD * self.scale_in)) / self.scale

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[units] / self.scale


def loss_fn(m, x_ND, y_ND, kl, progress):
    """What one step minimises: (total, its terms, what `remember` wants to know).

    kl(y_hat_ND): what an output costs the model's predictions, or None for the NMSE.
    progress: share of training done, 0 to 1."""
    # What do the units write, being as sparse as they have to be?
    x_ND = x_ND * m.scale_in
    y_ND = y_ND * m.scale
    pre = m.pre(x_ND, m.W_enc, m.b_enc)
    written_ND, penalty, seen = SPARSITIES[m.cfg.variant](m, pre, progress)

    # It must be the MLP's output, or keep the model's predictions.
    y_hat_ND = written_ND + m.affine(x_ND)
    rec = kl(y_hat_ND / m.scale) if kl else nmse(m, y_ND, y_hat_ND)

    # Dead units get no gradient from that. They learn what it misses.
    dead = (m.idle >= m.cfg.dead).nonzero().squeeze(1)
    aux = aux_k(m, pre, (y_ND - y_hat_ND).detach(), dead)

    total = rec + m.cfg.c_aux * aux + penalty
    terms = dict(loss=total, rec=rec, aux=aux, penalty=penalty, l0=seen.l0)
    terms = {name: term.detach() for name, term in terms.items()}
    return total, terms | dict(dead=len(dead)), seen


# ------------------------------------------------------------------------------------ training
class CleanRows:
    """Input and output of the MLP on some rows, and what another output costs the rest of the
    model. The first token of a row is left as it is."""
    def __init__(self, gpt, m, idx_BT):
        layer, = m.layers
        self.x_BTD, self.y_BTD, _, self.kl_BT = data.clean_pass(gpt, layer, idx_BT)

    def tokens(self):
        return self.x_BTD[:, 1:].flatten(0, 1), self.y_BTD[:, 1:].flatten(0, 1)

    def kl(self, y_hat_ND):
        """KL(clean || with y_hat in place of y) in nats, mean over the tokens."""
        y_hat_BTD = y_hat_ND.view_as(self.y_BTD[:, 1:])
        y_hat_BTD = torch.cat([self.y_BTD[:, :1], y_hat_BTD], 1)
        return self.kl_BT(y_hat_BTD)[:, 1:].mean()


def examples(cfg, gpt, m, corpus, start):
    """Yield training batches from step `start` on: shuffled tokens x_ND and y_ND, and None; or
    those of some rows, and the KL that another output costs there."""
    if cfg.objective == "mse":
        shuffled = data.batches(gpt, corpus, m.layers, cfg.T, cfg.N, cfg.seed, start)
        for x_LND, y_LND in shuffled:
            yield x_LND[0], y_LND[0], None
    # data.batches never ends: this is for --objective kl alone
    rows_per_step = max(1, cfg.N // (cfg.T - 1))
    for step in range(start, cfg.steps):
        idx_BT = corpus.batch(step, rows_per_step, cfg.T, cfg.seed).to(m.b_dec.device)
        rows = CleanRows(gpt, m, idx_BT)
        yield *rows.tokens(), rows.kl


def build(cfg, gpt):
    """A fresh transcoder of the MLP that cfg names, after checking cfg against the target."""
    check_variant(cfg)
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    common.check(replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 T=f"[3, {gpt.cfg.n_positions}]", eval_tokens=f"[{cfg.T}, inf]",
                 k=f"[1, {cfg.F}]", N=f"[2, {data.ROWS * (cfg.T - 1)}]")
    m = Transcoder(cfg, gpt.cfg.n_embd, common.generator(cfg.seed, "init"), layer)
    return m.to(gpt.device)


def load(path, gpt):
    tensors, cfg = common.load_trained(path, Config, gpt)
    m = build(cfg, gpt)
    common.unflat(tensors, m=m)
    return m.requires_grad_(False)


def train(cfg):
    device = common.device(cfg.device)
    gpt = GPT.load(cfg.model, device)
    check_memory(cfg, gpt)
    m = build(cfg, gpt)
    corpus = data.load_for(gpt, cfg.data, cfg.T)
    opts = optimizers(m)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), m=m, **opts)

    batches = examples(cfg, gpt, m, corpus["train"], run.first_step)
    for step, (x_ND, y_ND, kl) in zip(run.steps(), batches):
        progress = step / cfg.steps
        if step == 0:
            m.start(x_ND, y_ND)
        loss, terms, seen = loss_fn(m, x_ND, y_ND, kl, progress)
        norm = update(m, opts, loss, progress)
        remember(m, progress, *seen)
        if run.is_logged:
            run.record(terms, norm)
        if run.is_last:
            m.fold()
    return m, summarise(cfg, gpt, m, corpus, run.seconds)


# ------------------------------------------------------------------------------------- summary
def summarise(cfg, gpt, m, corpus, seconds):
    """Print what was found, write summary.json.

    fit and test are two splits of the text that training does not see: the mean outputs of
    ablations and each unit's concept are chosen on fit, all figures are measured on test."""
    layer, = m.layers
    device = m.b_dec.device
    n_rows = cfg.eval_tokens // cfg.T
    fit, test = (corpus[split].labelled(cfg.T, n_rows, device) for split in ("fit", "test"))
    names = corpus["test"].names
    lines, out = evals.replacement(m, gpt, layer, fit, test, names, "latents")
    out["seconds"] = seconds
    print(f"\nlayer {layer}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s", *lines, sep="\n")
    found = out | common.provenance(cfg, gpt)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return out


def main(cfg):
    if cfg.sweep:
        return curve.sweep(train, cfg, "k", curve_of_k(cfg))
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
