"""SAE: which few of F directions add up to the activations of an MLP on each token?

A sparse autoencoder turns the activations a of a token into F numbers f, nearly all of them zero,
and rebuilds a as the sum of the directions W_dec[i], each times its f_i. Unit i, a latent, reads
along W_enc[i] and writes along W_dec[i]. What differs between SAEs is how f is made sparse.

    pre = (a - b_dec) W_enc^T + b_enc
    a_hat = f W_dec + b_dec                 rows of W_dec have norm 1; a is scaled: E|a| = sqrt(D)
    loss = NMSE + c_aux AuxK + lambda penalty           topk and batchtopk have no penalty
    NMSE = E|a - a_hat|^2 / E|a - E a|^2    --objective kl: KL of the model's predictions instead
    AuxK = |e - e_hat|^2 / |e - E e|^2      what is missing, e = a - a_hat, rebuilt by dead units:
                                            e_hat from their D / 2 largest pre, negative ones
                                            too. Only dead units learn from it: it revives them

The sparsities (--variant), a function each:
    topk        f = the k largest of relu(pre) of each token
                Gao et al. 2024, arXiv:2406.04093, which has AuxK too
    batchtopk   f = the k N largest of the batch; once trained relu(pre) above a threshold
                Bussmann et al. 2024, arXiv:2412.06410
    jumprelu    f = pre 1[pre > theta]; penalty (L0 / k - 1)^2, L0 = E sum_i 1[pre_i > theta_i]
                Rajamanoharan et al. 2024, arXiv:2407.14435
    relu        f = relu(pre); penalty E sum_i f_i, the L1 norm
                Bricken et al. 2023, "Towards monosemanticity"
How to fork this file for a sparsity with parameters of its own: stochastic.py.

--site says what a is, and so what the model gets: the MLP's output (mlp_out), and a_hat stands in
for it; its input (mlp_in), and the MLP reads a_hat; or the residual stream after the MLP (resid),
and a_hat is the stream.

Differs from the papers: theta itself is trained, not its logarithm, clamped at 0, in a wide window;
relu's lambda follows L0, whose goal falls from F to k, so that every variant ends at an L0 of about
k; unit-norm rows of W_dec and AuxK in every variant.

N tokens of a batch, B sequences, T positions, D residual width, F units, L layers (here 1), R rows
of tokens; H hits: the (token, unit) pairs that a top-k keeps
CE recovered: 0 with the MLP's mean output, 1 with the MLP; FVE: 1 - NMSE of the MLP's output

    python sae.py --F 1024 --k 16   # 55 s on one core: CE recovered 0.997, FVE 0.943 at L0 16
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
import evals
import fused
from model import GPT, default_layer, split_rows
from report import curve, gallery


@dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    site: Literal["mlp_out", "mlp_in", "resid"] = "mlp_out"  # the activations
    out: str = "runs/sae"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, k / 4 to 4 k: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation and the batches
    # units
    F: int = 1024                   # [1, 1e7] units
    k: int = 16                     # [1, 1e7] units on per token
    # stochastic is refused: it has a file of its own, stochastic.py
    variant: Literal["topk", "batchtopk", "jumprelu", "relu", "stochastic"] = "topk"  # sparsity
    frozen: bool = False            # W_dec stays random: a floor for what learning it is worth
    # training
    objective: Literal["mse", "kl"] = "mse"  # rebuild the activations, or the predictions
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


# ------------------------------------------------------------------------------ the sparsities
class PreActivations(NamedTuple):
    """pre = x W^T + b, not multiplied out yet: the fused top-k never forms all of it."""
    x_ND: Tensor
    W_FD: Tensor
    b_F: Tensor

    def full(self):
        return F.linear(self.x_ND, self.W_FD, self.b_F)

    def of(self, units):
        """The pre-activations of some units alone."""
        return PreActivations(self.x_ND, self.W_FD[units], self.b_F[units])


class Seen(NamedTuple):
    """What `remember` wants to know of a batch."""
    fired_F: Tensor                 # which units were on at some token
    l0: Tensor                      # units on per token
    smallest: Tensor | None = None  # batchtopk: the smallest activation that was kept


class JumpReLU(torch.autograd.Function):
    """f = pre 1[pre > theta] (N, F), and its rate E 1[pre > theta] (F).

    Both jump at pre = theta: their slope by theta is a spike there, which no sample hits. It is
    smeared over a window of width bw around theta (Rajamanoharan et al. 2024, section 4). The
    window is laid on pre: laid on f, which is 0 below theta, half of it would be lost."""
    @staticmethod
    def forward(ctx, pre, theta, bw):
        on = pre > theta
        ctx.save_for_backward(pre, theta, on)
        ctx.bw = bw
        return pre.where(on, 0), fused.count(on) / len(pre)

    @staticmethod
    def backward(ctx, df, drate):
        pre, theta, on = ctx.saved_tensors
        # a step's slope by theta: -1 / bw within the window, in place of the spike
        near = (pre > theta - ctx.bw / 2) & (pre < theta + ctx.bw / 2)
        from_f = theta * df.where(near, 0).sum(0)
        from_rate = drate * fused.count(near) / len(pre)
        return df.where(on, 0), -(from_f + from_rate) / ctx.bw, None


def write_largest(m, pre, batch):
    """What do the units with the largest pre write, when all other units are off?

    Keeps k units of each token, or with `batch` the k N largest of the whole batch. Returns f W_dec
    (N, D) and what was seen. Costs the encoder's product: f itself, (N, F), is never formed."""
    # f = relu(pre.full()) where it is among the largest, else 0;  y = f @ W_dec
    y_ND, _, unit_H, f_H = fused.topk(*pre, m.W_dec, m.cfg.k, batch)
    # a unit that was kept is off all the same where its pre is not positive
    is_on_H = f_H > 0
    unit_H = unit_H[is_on_H]
    f_H = f_H[is_on_H]
    fired_F = torch.bincount(unit_H, minlength=m.cfg.F) > 0
    l0 = y_ND.new_tensor(len(f_H) / len(y_ND))
    return y_ND, Seen(fired_F, l0, f_H.min() if len(f_H) else None)


# The sparsities. Each takes the model m, its pre-activations and the share of training done, 0 to
# 1, and returns what the units write (N, D), lambda times the penalty, and what was Seen.
def topk(m, pre, progress):
    """Keep the k largest of relu(pre) at each token."""
    y_ND, seen = write_largest(m, pre, batch=False)
    # smallest is for the threshold of batchtopk: topk has none
    return y_ND, y_ND.new_zeros(()), seen._replace(smallest=None)


def batchtopk(m, pre, progress):
    """Keep the k N largest of relu(pre) in the batch: a token may have more than k, or fewer."""
    y_ND, seen = write_largest(m, pre, batch=True)
    return y_ND, y_ND.new_zeros(()), seen


def jumprelu(m, pre, progress):
    """Keep what is above its unit's own threshold, and pull L0 to k by moving the thresholds."""
    f_NF, rate_F = JumpReLU.apply(pre.full(), m.theta, m.cfg.bandwidth)
    lam = m.cfg.c_l0 * min(1, 2 * progress)
    penalty = (rate_F.sum() / m.cfg.k - 1).square()
    return f_NF @ m.W_dec, lam * penalty, Seen(rate_F > 0, rate_F.detach().sum())


def relu(m, pre, progress):
    """Keep what is positive, at a price of lambda per unit of f. `remember` moves lambda."""
    f_NF = pre.full().relu()
    rate_F = fused.count(f_NF > 0) / len(f_NF)
    penalty = f_NF.sum(-1).mean()
    return f_NF @ m.W_dec, m.lam * penalty, Seen(rate_F > 0, rate_F.sum())


SPARSITIES = {"topk": topk, "batchtopk": batchtopk, "jumprelu": jumprelu, "relu": relu}


def keep_once_trained(m, pre):
    """f of a trained model. What a token gets does not depend on the rest of its batch."""
    f = pre.full().relu()
    if m.cfg.variant == "topk":
        largest = f.topk(m.cfg.k)
        return torch.zeros_like(f).scatter(-1, largest.indices, largest.values)
    on_above = {"batchtopk": m.threshold, "jumprelu": m.theta, "relu": 0}[m.cfg.variant]
    return f * (f > on_above)


def check_variant(cfg):
    """Fail on the variant that has a file of its own now, and say which file."""
    if cfg.variant == "stochastic":
        common.fail("--variant stochastic: is a file now, python stochastic.py; see its --base")


# ------------------------------------------------------------------- other terms of the loss
def nmse(m, target_ND, rebuilt_ND):
    """How much is missing, as a share of the variance? 0 = nothing, 1 = as bad as the mean."""
    return (target_ND - rebuilt_ND).square().sum(-1).mean() / m.variance


def aux_k(m, pre, e_ND, dead):
    """How much of what is missing, e, can the dead units not rebuild? Of all units it trains
    these alone.

    dead: indices of units. AuxK of Gao et al. 2024, appendix A.2; 0 if no unit is dead."""
    if not len(dead):
        return e_ND.new_zeros(())
    k = min(e_ND.shape[1] // 2, len(dead))
    # z = pre.full()[:, dead] where it is among the k largest, else 0;  e_hat = z @ W_dec[dead]
    e_hat_ND = fused.topk(*pre.of(dead), m.W_dec[dead], k, relu=False)[0]
    return (e_ND - e_hat_ND).square().sum() / (e_ND - e_ND.mean(0)).square().sum()


# ------------------------------------------------------------------------ a step of training
def optimizers(m):
    """Adam or Muon for the matrices (not for a frozen W_dec), Adam for biases and thresholds."""
    cfg = m.cfg
    params = [p for p in m.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim < 2]
    lr_rest = cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, lr_rest)


def update(m, opts, loss, progress):
    """Take one step, and return the gradient's norm. The rows of W_dec keep norm 1."""
    cfg = m.cfg
    warm_up = (progress + 1 / cfg.steps) / 0.05
    common.set_rates(opts, min(1, warm_up, (1 - progress) / 0.2))
    m.zero_grad()
    loss.backward()
    with torch.no_grad():
        # no gradient along a row ..
        W = m.W_dec
        if W.requires_grad:
            W.grad -= (W.grad * W).sum(-1, keepdim=True) * W
        norm = nn.utils.clip_grad_norm_(m.parameters(), cfg.clip)
        for opt in opts.values():
            opt.step()
        # .. and norm 1 again, after the step: normed before it, what is saved would not be
        if W.requires_grad:
            W.div_(W.norm(dim=-1, keepdim=True))
        if m.theta is not None:
            m.theta.clamp_(min=0)
    return norm


@torch.no_grad()
def remember(m, progress, fired_F, l0, smallest=None):
    """Update the state beside the weights: how long each unit has been silent, the threshold of
    batchtopk, and the lambda that follows L0 (relu, stochastic.py)."""
    cfg = m.cfg
    m.idle.add_(cfg.N).masked_fill_(fired_F, 0)
    # batchtopk: the threshold is a running mean of smallest, which other sparsities leave None
    if smallest is not None:
        m.threshold.copy_(torch.lerp(smallest, m.threshold, cfg.beta if m.threshold > 0 else 0))
    # the goal of L0 falls from all units to k in the first half of the steps
    # lambda rises where L0 is above it; of this file's sparsities only relu reads lambda
    goal = cfg.k * (cfg.F / cfg.k) ** max(0, 1 - 2 * progress)
    too_many = (l0 / goal - 1).clamp(-1, 1)
    m.lam.mul_((cfg.follow * too_many).exp())


# ---------------------------------------------------------------------------------- the method
class SAE(nn.Module):
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
        self.W_enc = nn.Parameter(cfg.enc * W_FD)
        self.b_enc = nn.Parameter(torch.zeros(cfg.F))
        self.W_dec = nn.Parameter(W_FD, not cfg.frozen)
        self.b_dec = nn.Parameter(torch.zeros(D))
        if cfg.variant == "jumprelu":
            self.theta = nn.Parameter(torch.full((cfg.F,), cfg.theta))
        else:
            self.theta = None
        self.register_buffer("scale", torch.tensor(1.))         # of a, until `fold`
        self.register_buffer("variance", torch.tensor(1.))      # E|a - E a|^2
        self.register_buffer("threshold", torch.tensor(0.))     # batchtopk: on above it
        self.register_buffer("lam", torch.tensor(cfg.c_first))  # relu: lambda
        self.register_buffer("idle", torch.zeros(cfg.F, dtype=torch.long))  # tokens of silence
        self.stream = 0             # --site resid: the stream at the MLP in this forward pass

    def read(self, x, y, stream=0):
        """The activations at the site, given the MLP's input x, its output y, and the stream that
        y is added to (0 where y holds it already)."""
        if self.cfg.site == "mlp_in":
            return x
        return stream + y if self.cfg.site == "resid" else y

    def write(self, a_hat, mlp, stream):
        """What must the MLP write for the model to go on as if the site held a_hat?"""
        if self.cfg.site == "mlp_in":
            return mlp(a_hat)
        return a_hat - stream if self.cfg.site == "resid" else a_hat

    def note_stream(self, module, args):
        """Keep the stream that the LayerNorm before the MLP reads: encode, decode get x alone."""
        self.stream = args[0]

    @torch.no_grad()
    def start(self, a_ND):
        """Take scale, variance and b_dec from a first batch."""
        self.scale.copy_(a_ND.shape[-1] ** 0.5 / a_ND.norm(dim=-1).mean())
        self.b_dec.copy_((a_ND * self.scale).mean(0))
        self.variance.copy_((a_ND * self.scale - self.b_dec).square().sum(-1).mean())

    @torch.no_grad()
    def fold(self):
        """Move the scale into the weights, so that from now on raw activations are read.

        pre and f are divided by the scale, and so are biases, thetas and the threshold."""
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            tensor.div_(self.scale)
        if self.theta is not None:
            self.theta.div_(self.scale)
        self.variance.div_(self.scale.square())
        self.scale.fill_(1)

    def pre(self, a_ND, W_FD, b_F):
        """(a - b_dec) W^T + b, as a W^T + (b - W b_dec): the fused top-k takes a as it is."""
        return PreActivations(a_ND, W_FD, b_F - W_FD @ self.b_dec)

    def codes(self, a):
        """f once trained."""
        pre = self.pre(a * self.scale, self.W_enc, self.b_enc)
        return keep_once_trained(self, pre)

    def affine(self, a):
        """What a_hat has beside the units."""
        return self.b_dec

    def rebuild(self, f):
        return (f @ self.W_dec + self.b_dec) / self.scale

    # The seam: what evals.py asks of every method
    def unit_directions(self):
        return [("all", self.W_enc, self.W_dec, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), (y_ND,) = data.over_rows(gpt, rows_RT, self.layers, self.cfg.site == "resid")
        return [self.read(x_ND, y_ND) - self.b_dec]

    def encoder_input(self, x_BTD, mlp):
        self.mlp = (mlp,)           # for decode; in a tuple, or its weights would become the SAE's
        return self.read(x_BTD, mlp(x_BTD), self.stream)

    def encode(self, layer, x_BTD, mlp):
        return self.codes(self.encoder_input(x_BTD, mlp))

    def decode(self, layer, f_BTF, x_BTD):
        return self.write(self.rebuild(f_BTF), self.mlp[0], self.stream)

    def contrib(self, layer, f_BTF, x_BTD, units):
        own = f_BTF[..., units, None] * self.W_dec[units] / self.scale
        if self.cfg.site != "mlp_in":
            return own
        # through the MLP a unit's share is what would be missing without it
        a_hat = self.rebuild(f_BTF).unsqueeze(-2)
        return self.mlp[0](a_hat) - self.mlp[0](a_hat - own)


def loss_fn(m, a_ND, kl, progress):
    """What one step minimises: (total, its terms, what `remember` wants to know).

    kl(a_hat_ND): what a reconstruction costs the model's predictions, or None for the NMSE.
    progress: share of training done, 0 to 1."""
    # What do the units write, being as sparse as they have to be?
    a_ND = a_ND * m.scale
    pre = m.pre(a_ND, m.W_enc, m.b_enc)
    written_ND, penalty, seen = SPARSITIES[m.cfg.variant](m, pre, progress)

    # It must rebuild the activations, or keep the model's predictions.
    a_hat_ND = written_ND + m.affine(a_ND)
    rec = kl(a_hat_ND / m.scale) if kl else nmse(m, a_ND, a_hat_ND)

    # Dead units get no gradient from that. They learn what it misses.
    dead = (m.idle >= m.cfg.dead).nonzero().squeeze(1)
    aux = aux_k(m, pre, (a_ND - a_hat_ND).detach(), dead)

    total = rec + m.cfg.c_aux * aux + penalty
    terms = dict(loss=total, rec=rec, aux=aux, penalty=penalty, l0=seen.l0)
    terms = {name: term.detach() for name, term in terms.items()}
    return total, terms | dict(dead=len(dead)), seen


# ------------------------------------------------------------------------------------ training
class CleanRows:
    """The activations of some rows, and what a reconstruction costs the rest of the model. The
    first token of a row is left as it is."""
    def __init__(self, gpt, m, idx_BT):
        layer, = m.layers
        self.m = m
        self.mlp = gpt.mlp(layer)
        x_BTD, y_BTD, self.stream_BTD, self.kl_BT = data.clean_pass(gpt, layer, idx_BT)
        self.a_BTD = m.read(x_BTD, y_BTD, self.stream_BTD)

    def tokens(self):
        return self.a_BTD[:, 1:].flatten(0, 1)

    def kl(self, a_hat_ND):
        """KL(clean || with a_hat in place of a) in nats, mean over the tokens."""
        a_hat_BTD = a_hat_ND.view_as(self.a_BTD[:, 1:])
        a_hat_BTD = torch.cat([self.a_BTD[:, :1], a_hat_BTD], 1)
        y_hat_BTD = self.m.write(a_hat_BTD, self.mlp, self.stream_BTD)
        return self.kl_BT(y_hat_BTD)[:, 1:].mean()


def examples(cfg, gpt, m, corpus, start):
    """Yield training batches from step `start` on: shuffled tokens a_ND, and None; or those of
    some rows, and the KL that a reconstruction of them costs."""
    if cfg.objective == "mse":
        in_stream = cfg.site == "resid"
        shuffled = data.batches(gpt, corpus, m.layers, cfg.T, cfg.N, cfg.seed, start, in_stream)
        for x_LND, y_LND in shuffled:
            yield m.read(x_LND[0], y_LND[0]), None
    # data.batches never ends: this is for --objective kl alone
    rows_per_step = max(1, cfg.N // (cfg.T - 1))
    for step in range(start, cfg.steps):
        idx_BT = corpus.batch(step, rows_per_step, cfg.T, cfg.seed).to(m.b_dec.device)
        rows = CleanRows(gpt, m, idx_BT)
        yield rows.tokens(), rows.kl


def check_memory(cfg, gpt):
    """Fail if there is less memory than a training takes, weights and activations of a step. How
    many activations that are was measured."""
    common.check(cfg)
    # the fused top-k never forms all of f, the others do
    per_unit = 1 if cfg.variant in ("topk", "batchtopk") else 5
    common.need_for_training(2 * cfg.F * gpt.cfg.n_embd, per_unit * cfg.N * cfg.F,
                             f"--F {cfg.F} --N {cfg.N}", gpt.device)


def build(cfg, gpt):
    """A fresh SAE at the MLP that cfg names, after checking cfg against the target."""
    check_variant(cfg)
    layer = default_layer(gpt) if cfg.layer == -1 else cfg.layer
    common.check(replace(cfg, layer=layer), layer=f"[0, {gpt.cfg.n_layer - 1}]",
                 T=f"[3, {gpt.cfg.n_positions}]", eval_tokens=f"[{cfg.T}, inf]",
                 k=f"[1, {cfg.F}]", N=f"[2, {data.ROWS * (cfg.T - 1)}]")
    m = SAE(cfg, gpt.cfg.n_embd, common.generator(cfg.seed, "init"), layer)
    if cfg.site == "resid":
        gpt.h[layer].ln_2.register_forward_pre_hook(m.note_stream)
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
    for step, (a_ND, kl) in zip(run.steps(), batches):
        progress = step / cfg.steps
        if step == 0:
            m.start(a_ND)
        loss, terms, seen = loss_fn(m, a_ND, kl, progress)
        norm = update(m, opts, loss, progress)
        remember(m, progress, *seen)
        if run.is_logged:
            run.record(terms, norm)
        if run.is_last:
            m.fold()
    return m, summarise(cfg, gpt, m, corpus, run.seconds)


# ------------------------------------------------------------------------------------- summary
def rebuilt(m, gpt, idx_NT):
    """Yield (a, a_hat) of 16 rows at a time, without the first token of each. idx_NT: N rows."""
    layer, = m.layers
    for idx_BT in split_rows(idx_NT, 16):
        x_BTD, stream_BTD = gpt.prefix(idx_BT, layer)
        y_BTD = gpt.mlp(layer)(x_BTD)
        a = m.read(x_BTD, y_BTD, stream_BTD)[:, 1:]
        yield a, m.rebuild(m.codes(a))


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
    out["fve_site"] = evals.explained(rebuilt(m, gpt, test[0]))
    out["seconds"] = seconds
    print(f"\nlayer {layer}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s; "
          f"FVE of {cfg.site} itself {out['fve_site']:.3f}", *lines, sep="\n")
    found = out | common.provenance(cfg, gpt)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return out


def curve_of_k(cfg):
    """The values of k at which --sweep trains."""
    if not 4 <= cfg.k <= cfg.F / 4:
        common.fail(f"--sweep --k {cfg.k}: must be from 4 to a quarter of --F {cfg.F}")
    return [int(cfg.k * share) for share in curve.SHARES]


def main(cfg):
    if cfg.sweep:
        return curve.sweep(train, cfg, "k", curve_of_k(cfg))
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
