"""SAE, sparse autoencoder: activations a at one MLP as a sparse sum of F directions, in five variants.
    pre = W_enc (a - b_dec) + b_enc        a_hat = f W_dec + b_dec        rows of W_dec have norm 1, E|a| = sqrt(D)
    topk        f = the k largest of relu(pre) of each token                         (Gao et al. 2024, arXiv:2406.04093)
    batchtopk   f = the k N largest of the batch; later: relu(pre) above a threshold (Bussmann et al. 2024, 2412.06410)
    jumprelu    f = pre 1[pre > theta],  penalty (L0 / k - 1)^2, L0 = E sum_f 1[pre > theta]  (Rajamanoharan 2407.14435)
    relu        f = relu(pre),           penalty E sum_f f                           (Bricken et al. 2023)
    stochastic  f = relu(pre) m, m = g + (1 - g) r, r ~ U(0, 1), g = clamp(W_gate (a - b_dec) + b_gate, 0, 1); later:
                f = relu(pre) g 1[g > tau]; penalty sum_f s_f (1 + w_freq log2(1 + freq_a s_f)), s_f = E phi(g_f),
                phi(g) = g^2 / (g^2 + gamma^2): SPD's masks and penalty (spd.py) on an SAE; --no-noise has r = 0
                half of the tokens share one r among all units, or the many that it leaves half open average out
    loss = NMSE + c_aux AuxK + lambda penalty (+ c_faith NMSE at m = 1: stochastic), --objective kl: KL for the first
    NMSE = E|a - a_hat|^2 / E|a - E a|^2
    AuxK = |e - e_hat|^2 / |e - E e|^2, e = a - a_hat, e_hat from the D / 2 largest pre of dead units: it revives them
         (+ c_wake sum of E max(0, tau - gate) of dead units: stochastic, or AuxK would train what no gate lets through)
Differs from the papers: theta is raw and clamped, its kernel wide; in relu and stochastic lambda follows L0, whose
  goal falls from F to k: every variant ends at an L0 of about k; unit-norm rows and AuxK in every variant.
--site mlp_in: a is the MLP's input, and what enters the model is the MLP of a_hat; resid: a is the residual stream
  after the MLP, which a_hat replaces.
N tokens of a batch, D width, F units; H hits: the (token, unit) pairs that a top-k keeps

    python sae.py --F 1024 --k 16       # 55 s on one core: CE recovered 0.997, FVE 0.943 at L0 16, no unit dead
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import evals
import fused
from model import GPT, default_layer
from report import curve
from spd import LowerLeaky, UpperLeaky

@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # whose MLP; -1: the one that the target's config.json names, or the middle one
    site: Literal["mlp_out", "mlp_in", "resid"] = "mlp_out"  # the activations
    out: str = "runs/sae"           # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation, the batches and the noise
    variant: Literal["topk", "batchtopk", "jumprelu", "stochastic", "relu"] = "topk"  # what makes f sparse
    objective: Literal["mse", "kl"] = "mse"  # reconstruct the activations, or the logits through the rest of the model
    F: int = 1024                   # units
    k: int = 16                     # units on per token
    sweep: bool = False             # train at k / 4, k / 2, k, 2 k and 4 k: the curve, in sweep.json and sweep.png
    steps: int = 2000               # training steps
    N: int = 2048                   # tokens per step
    T: int = 128                    # positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all directions of a matrix at once
    lr: float = 4e-3                # warmed up over 5 % of the steps, to 0 over the last 20 %; stochastic, adam: 16e-3
    lr_rest: float = 4e-3           # muon: of biases and thresholds, which Adam trains; adam: ignored, all are at lr
    frozen: bool = False            # W_dec stays random: a floor for what learned directions are worth
    enc: float = 0.5                # norm of the rows of W_enc at the start; at 1 they turn too slowly
    clip: float = 1.0               # gradient norm
    c_aux: float = 1 / 32           # AuxK
    dead: int = 20_000              # a unit silent for this many tokens is dead (evals.py: on at 2 of 10,000 is alive)
    beta: float = 0.99              # batchtopk: of the running mean of the smallest activation kept, the threshold
    theta: float = 0.5              # jumprelu: first threshold
    bandwidth: float = 0.2          # jumprelu: width of the kernel that lets thresholds learn
    c_l0: float = 1.0               # jumprelu: lambda, reached after half of the steps
    c_first: float = 1e-3           # relu, stochastic: first lambda
    follow: float = 0.03            # relu, stochastic: a step multiplies lambda by exp(follow (L0 / goal - 1))
    c_wake: float = 0.2             # stochastic: push on dead gates, in AuxK; 0: a quarter stay dead, 1 disturbs
    c_faith: float = 1.0            # stochastic: NMSE with every mask at 1, as SPD's faithfulness
    noise: bool = True              # stochastic: r ~ U(0, 1); without, r = 0
    alpha: float = 0.1              # stochastic: slope of the leaky hard sigmoids
    gamma_end: float = 0.1          # stochastic: gamma falls from 1 to this over the first 90 % of the steps
    w_freq: float = 0.5             # stochastic: frequency term relative to importance
    freq_a: float = 1024            # stochastic: a of the frequency term
    tau: float = 0.1                # stochastic: a unit is on where g > tau, once trained
    log_every: int = 50             # steps between lines of log.jsonl
    save_every: int = 500           # steps between checkpoints
    eval_tokens: int = 50_000       # tokens of fit (means, choice of concepts) and of test that the summary uses

MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "sweep", "log_every", "save_every", "eval_tokens"}

class JumpReLU(torch.autograd.Function):
    """pre 1[pre > theta] (N, F) and its rate E 1[pre > theta] (F). Their slopes by theta, a delta at pre = theta, are
    smeared over a window of width bw around it. The window is laid on pre: on f, 0 below theta, half would be lost."""
    @staticmethod
    def forward(ctx, pre, theta, bw):
        on = pre > theta
        ctx.save_for_backward(pre, theta, on)
        ctx.bw = bw
        return pre.where(on, 0), fused.count(on) / len(pre)

    @staticmethod
    def backward(ctx, df, drate):
        pre, theta, on = ctx.saved_tensors
        near = (pre > theta - ctx.bw / 2) & (pre < theta + ctx.bw / 2)
        dtheta = -(theta * df.where(near, 0).sum(0) + drate * fused.count(near) / len(pre)) / ctx.bw
        return df.where(on, 0), dtheta, None

class SAE(nn.Module):
    kind, matrices = "dictionary", ()

    def __init__(self, cfg, D, gen, layer=0):
        super().__init__()
        self.cfg, self.layers = cfg, [layer]
        self.params_F = torch.full((cfg.F,), (3 if cfg.variant == "stochastic" else 2) * D)
        W_FD = F.normalize(torch.randn(cfg.F, D, generator=gen), dim=-1)
        self.W_enc, self.b_enc = nn.Parameter(cfg.enc * W_FD), nn.Parameter(torch.zeros(cfg.F))
        self.W_dec, self.b_dec = nn.Parameter(W_FD, not cfg.frozen), nn.Parameter(torch.zeros(D))
        self.theta = nn.Parameter(torch.full((cfg.F,), cfg.theta)) if cfg.variant == "jumprelu" else 0
        if cfg.variant == "stochastic":
            self.W_gate, self.b_gate = nn.Parameter(W_FD / 4), nn.Parameter(torch.full((cfg.F,), 0.5))
        state = dict(scale=1., variance=1., threshold=0., lam=cfg.c_first)
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("idle", torch.zeros(cfg.F, dtype=torch.long))  # tokens since a unit was last on
        self.stream = 0             # --site resid: the residual stream at the MLP in the current forward pass

    # A site: what is read off the model, from the MLP's input x, its output y and the stream r that y is added to (it
    # may be in y already); and the y that a reconstruction of it amounts to.
    def read(self, x, y, r=0):
        return x if self.cfg.site == "mlp_in" else r + y if self.cfg.site == "resid" else y

    def write(self, a_hat, mlp, r):
        return mlp(a_hat) if self.cfg.site == "mlp_in" else a_hat - r if self.cfg.site == "resid" else a_hat

    @torch.no_grad()
    def start(self, a_ND):
        """Scale, variance and b_dec from a first batch."""
        self.scale.copy_(a_ND.shape[-1] ** 0.5 / a_ND.norm(dim=-1).mean())
        self.b_dec.copy_((a_ND * self.scale).mean(0))
        self.variance.copy_((a_ND * self.scale - self.b_dec).square().sum(-1).mean())

    @torch.no_grad()
    def fold(self):
        """From now on raw activations: pre, and so f and all that is measured in its unit, shrinks by the scale."""
        for t in (self.b_enc, self.b_dec, self.threshold, *[self.theta] * (self.cfg.variant == "jumprelu")):
            t.div_(self.scale)
        if self.cfg.variant == "stochastic":            # gates have no unit: the same from a smaller input
            self.W_gate.mul_(self.scale)
        self.variance.div_(self.scale.square()), self.scale.fill_(1)

    def biases(self):
        """Of pre and of the gates when they read a itself: W (a - b_dec) + b = W a + (b - W b_dec)."""
        gated = self.cfg.variant == "stochastic"
        return self.b_enc - self.W_enc @ self.b_dec, self.b_gate - self.W_gate @ self.b_dec if gated else None

    def codes(self, a):
        """f once trained: what a token gets does not depend on the others."""
        cfg, a, (b_pre, b_gate) = self.cfg, a * self.scale, self.biases()
        f = F.linear(a, self.W_enc, b_pre).relu()
        if cfg.variant == "topk":
            top = f.topk(cfg.k)
            return torch.zeros_like(f).scatter(-1, top.indices, top.values)
        if cfg.variant == "stochastic":
            g = F.linear(a, self.W_gate, b_gate).clamp(0, 1)
            return f * g * (g > cfg.tau)
        return f * (f > {"batchtopk": self.threshold, "jumprelu": self.theta, "relu": 0}[cfg.variant])

    def rebuild(self, f):
        return (f @ self.W_dec + self.b_dec) / self.scale

    # The seam (evals.py)
    def unit_directions(self):
        return [("all", self.W_enc, self.W_dec, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), (y_ND,) = data.over_rows(gpt, rows_RT, self.layers, self.cfg.site == "resid")
        return [self.read(x_ND, y_ND) - self.b_dec]

    def encode(self, layer, x_BTD, mlp):
        self.mlp = (mlp,)           # for decode; in a tuple, or its weights would become the SAE's
        return self.codes(self.read(x_BTD, mlp(x_BTD), self.stream))

    def decode(self, layer, f_BTF, x_BTD):
        return self.write(self.rebuild(f_BTF), self.mlp[0], self.stream)

    def contrib(self, layer, f_BTF, x_BTD, units):
        own = f_BTF[..., units, None] * self.W_dec[units] / self.scale
        if self.cfg.site != "mlp_in":
            return own
        a_hat = self.rebuild(f_BTF).unsqueeze(-2)
        return self.mlp[0](a_hat) - self.mlp[0](a_hat - own)

def stochastic(z_NF, cfg, t, gen):
    """(g, masks m, importance penalty) of the gate logits z; t in [0, 1]: share of the training done."""
    g, gamma = LowerLeaky.apply(z_NF, cfg.alpha), 1 + (cfg.gamma_end - 1) * min(1, t / 0.9)
    r = torch.rand(g.shape, generator=gen, device=g.device) if cfg.noise else torch.zeros_like(g)
    r[::2] = r[::2, :1]     # one r for all units: independent ones never switch many off together
    g2 = UpperLeaky.apply(z_NF, cfg.alpha).square()
    s_F = (g2 / (g2 + gamma**2)).mean(0)
    return g, torch.lerp(g, g.new_ones(()), r), (s_F * (1 + cfg.w_freq * torch.log2(1 + cfg.freq_a * s_F))).sum()

def loss_fn(sae, a_ND, kl, t, gen):
    """(total, its terms, what `remember` wants to know) on one batch. kl(a_hat_ND): what that reconstruction costs the
    model, or None for the NMSE; t in [0, 1]: share of the training done."""
    cfg, a_ND, (b_pre, b_gate), W_dec = sae.cfg, a_ND * sae.scale, sae.biases(), sae.W_dec
    nmse = lambda a_hat_ND: (a_ND - a_hat_ND).square().sum(-1).mean() / sae.variance
    lam, penalty, faith, aux, lowest = 0, a_ND.new_zeros(()), a_ND.new_zeros(()), a_ND.new_zeros(()), sae.threshold
    if cfg.variant in ("topk", "batchtopk"):
        y_ND, _, unit_H, f_H = fused.topk(a_ND, sae.W_enc, b_pre, W_dec, cfg.k, cfg.variant == "batchtopk")
        unit_H, f_H = unit_H[f_H > 0], f_H[f_H > 0]
        l0, fired_F, lowest = a_ND.new_tensor(len(f_H) / len(a_ND)), torch.bincount(unit_H, minlength=cfg.F) > 0, f_H
    else:
        pre = F.linear(a_ND, sae.W_enc, b_pre)
        if cfg.variant == "jumprelu":
            f, rate_F = JumpReLU.apply(pre, sae.theta, cfg.bandwidth)
            lam, penalty = cfg.c_l0 * min(1, 2 * t), (rate_F.sum() / cfg.k - 1).square()
        elif cfg.variant == "relu":
            f = pre.relu()
            rate_F, lam, penalty = fused.count(f > 0) / len(f), sae.lam, f.sum(-1).mean()
        else:
            v, z = pre.relu(), F.linear(a_ND, sae.W_gate, b_gate)
            g, m, penalty = stochastic(z, cfg, t, gen)
            rate_F = fused.count((g > cfg.tau) & (v > 0)) / len(v)
            f, lam, faith = v * m, sae.lam, nmse(v @ W_dec + sae.b_dec)
        y_ND, l0, fired_F = f @ W_dec, rate_F.detach().sum(), rate_F > 0
    a_hat = y_ND + sae.b_dec
    rec = kl(a_hat / sae.scale) if kl else nmse(a_hat)
    dead = (sae.idle >= cfg.dead).nonzero().squeeze(1)
    if len(dead):
        e_ND, k_aux = (a_ND - a_hat).detach(), min(a_ND.shape[1] // 2, len(dead))
        e_hat = fused.topk(a_ND, sae.W_enc[dead], b_pre[dead], W_dec[dead], k_aux, relu=False)[0]
        aux = (e_ND - e_hat).square().sum() / (e_ND - e_ND.mean(0)).square().sum()
        if cfg.variant == "stochastic":
            aux = aux + cfg.c_wake * (cfg.tau - z[:, dead]).clamp(min=0).mean(0).sum()
    total = rec + cfg.c_aux * aux + cfg.c_faith * faith + lam * penalty
    terms = dict(loss=total, rec=rec, aux=aux, faith=faith, penalty=lam * penalty, l0=l0, dead=torch.tensor(len(dead)))
    return total, {k: v.detach() for k, v in terms.items()}, (fired_F, l0, lowest)

def optimizers(sae):
    """Adam or Muon for the matrices W_enc, W_dec (not if frozen) and W_gate, Adam for biases and thresholds."""
    cfg, params = sae.cfg, [p for p in sae.parameters() if p.requires_grad]
    matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() < 2]
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr)

def update(sae, opts, loss, t):
    """One step; the rows of W_dec keep norm 1: no gradient along them, and norm 1 again after the step."""
    cfg, W = sae.cfg, sae.W_dec
    common.set_rates(opts, min(1, (t + 1 / cfg.steps) / 0.05, (1 - t) / 0.2))
    sae.zero_grad()
    loss.backward()
    with torch.no_grad():
        if not cfg.frozen:
            W.grad -= (W.grad * W).sum(-1, keepdim=True) * W
        norm = nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        for opt in opts.values():
            opt.step()
        if not cfg.frozen:
            W.div_(W.norm(dim=-1, keepdim=True))
        if cfg.variant == "jumprelu":
            sae.theta.clamp_(min=0)
    return norm

@torch.no_grad()
def remember(sae, t, fired_F, l0, lowest):
    """The state beside the weights: silence of each unit, threshold of batchtopk, lambda of relu and stochastic."""
    cfg = sae.cfg
    sae.idle.add_(cfg.N).masked_fill_(fired_F, 0)
    if cfg.variant == "batchtopk" and lowest.numel():
        sae.threshold.copy_(torch.lerp(lowest.min(), sae.threshold, cfg.beta if sae.threshold > 0 else 0))
    goal = cfg.k * (cfg.F / cfg.k) ** max(0, 1 - 2 * t)         # from all units to k in the first half of the steps
    sae.lam.mul_((cfg.follow * (l0 / goal - 1).clamp(-1, 1)).exp())

def examples(cfg, gpt, sae, corpus, start):
    """Training batches from step `start` on: shuffled a_ND and None, or all tokens but the first of some rows, and
    kl(a_hat_ND): what replacing them costs, through the rest of the model alone."""
    layer, = sae.layers
    if cfg.objective == "mse":
        for x, y in data.batches(gpt, corpus, [layer], cfg.T, cfg.N, cfg.seed, start, cfg.site == "resid"):
            yield sae.read(x[0], y[0]), None
    for step in range(start, cfg.steps):
        idx_BT = corpus.batch(step, max(1, cfg.N // (cfg.T - 1)), cfg.T, cfg.seed).to(sae.b_dec.device)
        x, y, r, kl_BT = data.clean_pass(gpt, layer, idx_BT)
        a = sae.read(x, y, r)
        def kl(a_hat_ND):
            a_hat = torch.cat([a[:, :1], a_hat_ND.view_as(a[:, 1:])], 1)
            return kl_BT(sae.write(a_hat, gpt.h[layer].mlp, r))[:, 1:].mean()
        yield a[:, 1:].flatten(0, 1), kl

def build(cfg, gpt):
    """A fresh SAE at the MLP that cfg names, after checking cfg against the target."""
    layer, D = default_layer(gpt) if cfg.layer == -1 else cfg.layer, gpt.cfg.n_embd
    common.within(vars(cfg) | {"layer": layer}, "F", "steps", "log_every", "save_every",
                  layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions),
                  eval_tokens=(cfg.T, math.inf), k=(1, cfg.F), N=(2, data.ROWS * (cfg.T - 1)))
    sae = SAE(cfg, D, common.generator(cfg.seed, "init"), layer).to(gpt.wte.weight.device)
    if cfg.site == "resid":         # the seam hands over x, y alone: the stream is noted on its way into LayerNorm
        gpt.h[layer].ln_2.register_forward_pre_hook(lambda module, args: setattr(sae, "stream", args[0]))
    return sae

def load(path, gpt):
    tensors, meta = common.load(path, method=Path(__file__).stem, target=gpt.hash)
    sae = build(Config(**meta["config"]), gpt)
    common.unflat(tensors, sae=sae)
    return sae.requires_grad_(False)

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    sae = build(cfg, gpt)
    corpus = data.load_all(cfg.data, gpt.vocab, cfg.T)
    gen, opts = common.generator(cfg.seed, "noise", dev), optimizers(sae)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), sae=sae, gen=gen, **opts)
    for step, (a_ND, kl) in zip(run.steps(), examples(cfg, gpt, sae, corpus["train"], run.first_step)):
        t = step / cfg.steps
        if not step:
            sae.start(a_ND)
        loss, terms, seen = loss_fn(sae, a_ND, kl, t, gen)
        norm = update(sae, opts, loss, t)
        remember(sae, t, *seen)
        if run.is_logged:
            run.record(terms, norm)
        if run.is_last:
            sae.fold()
    return sae, summarise(cfg, gpt, sae, corpus, run.seconds)

def summarise(cfg, gpt, sae, corpus, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    fit, test = (corpus[s].labelled(cfg.T, cfg.eval_tokens // cfg.T, sae.b_dec.device) for s in ("fit", "test"))
    lines, out = evals.replacement(sae, gpt, sae.layers[0], fit, test, corpus["test"].names, "latents")
    mlp, ends = gpt.h[sae.layers[0]].mlp, (gpt.prefix(idx_BT, sae.layers[0]) for idx_BT in test[0].split(16))
    a_BTD = (sae.read(x, mlp(x), r)[:, 1:] for x, r in ends)
    out |= dict(fve_site=evals.explained((a, sae.rebuild(sae.codes(a))) for a in a_BTD), seconds=seconds)
    print(f"\nlayer {sae.layers[0]}, {cfg.variant}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s; FVE of {cfg.site} "
          f"itself {out['fve_site']:.3f}", *lines, sep="\n")
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

def main(cfg):
    if cfg.sweep and not 4 <= cfg.k <= cfg.F / 4:
        common.fail(f"--sweep --k {cfg.k}: must be from 4 to a quarter of --F {cfg.F}")
    return curve.sweep(train, cfg, "k", [int(cfg.k * share) for share in curve.SHARES]) if cfg.sweep else train(cfg)

if __name__ == "__main__":
    main(common.cli(Config))
