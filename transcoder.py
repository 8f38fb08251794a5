"""Transcoder: one MLP, from its input x to its output y, as a sparse sum of F directions, in five variants.
    pre = W_enc x + b_enc        y_hat = f W_dec + b_dec (+ x W_skip)       rows of W_dec have norm 1, E|y| = sqrt(D)
    topk        f = the k largest of relu(pre) of each token                         (Gao et al. 2024, arXiv:2406.04093)
    batchtopk   f = the k N largest of the batch; later: relu(pre) above a threshold (Bussmann et al. 2024, 2412.06410)
    jumprelu    f = pre 1[pre > theta],  penalty (L0 / k - 1)^2, L0 = E sum_f 1[pre > theta]  (Rajamanoharan 2407.14435)
    relu        f = relu(pre),           penalty E sum_f f                           (Dunefsky et al. 2024, 2406.11944)
    stochastic  f = relu(pre) m, m = g + (1 - g) r, r ~ U(0, 1), g = clamp(W_gate x + b_gate, 0, 1); later:
                f = relu(pre) g 1[g > tau]; penalty sum_f s_f (1 + w_freq log2(1 + freq_a s_f)), s_f = E phi(g_f),
                phi(g) = g^2 / (g^2 + gamma^2): SPD's masks and penalty (spd.py) on a transcoder; --no-noise has r = 0
                half of the tokens share one r among all units, or the many that it leaves half open average out
    loss = NMSE + c_aux AuxK + lambda penalty (+ c_faith NMSE at m = 1: stochastic), --objective kl: KL for the first
    NMSE = E|y - y_hat|^2 / E|y - E y|^2
    AuxK = |e - e_hat|^2 / |e - E e|^2, e = y - y_hat, e_hat from the D / 2 largest pre of dead units: it revives them
--skip adds the affine map W_skip, from 0 on (Paulo, Shabalin, Belrose 2025, arXiv:2501.18823).
Differs from the papers: theta is raw and clamped, its kernel wide; in relu and stochastic lambda follows L0, whose
  goal falls from F to k: every variant ends at an L0 of about k; unit-norm rows and AuxK in every variant.
N tokens of a batch, D width, F units; H hits: the (token, unit) pairs that a top-k keeps

    python transcoder.py --F 1024 --k 32       # 66 s on one core: CE recovered 0.998, FVE 0.970 at L0 32, no unit dead
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
    out: str = "runs/transcoder"    # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # of the initialisation, the batches and the noise
    variant: Literal["topk", "batchtopk", "jumprelu", "stochastic", "relu"] = "topk"  # what makes f sparse
    objective: Literal["mse", "kl"] = "mse"  # reconstruct the output, or the logits through the rest of the model
    F: int = 1024                   # units
    k: int = 32                     # units on per token
    skip: bool = False              # add the affine map x W_skip
    sweep: bool = False             # train at k / 4, k / 2, k, 2 k and 4 k: the curve, in sweep.json and sweep.png
    steps: int = 2000               # training steps
    N: int = 2048                   # tokens per step
    T: int = 128                    # positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all directions of a matrix at once
    lr: float = 4e-3                # warmed up over 5 % of the steps, to 0 over the last 20 %; stochastic, adam: 16e-3
    lr_rest: float = 4e-3           # muon: of biases and thresholds, which Adam trains; adam: ignored, all are at lr
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

class Transcoder(nn.Module):
    kind, matrices = "dictionary", ()

    def __init__(self, cfg, D, gen, layer=0):
        super().__init__()
        self.cfg, self.layers = cfg, [layer]
        self.params_F = torch.full((cfg.F,), (3 if cfg.variant == "stochastic" else 2) * D)
        W_FD, W_dec_FD = (F.normalize(torch.randn(cfg.F, D, generator=gen), dim=-1) for _ in range(2))
        self.W_enc, self.b_enc = nn.Parameter(cfg.enc * W_FD), nn.Parameter(torch.zeros(cfg.F))
        self.W_dec, self.b_dec = nn.Parameter(W_dec_FD), nn.Parameter(torch.zeros(D))
        self.W_skip, self.always_params = nn.Parameter(torch.zeros(D, D)) if cfg.skip else None, D * D * cfg.skip
        self.theta = nn.Parameter(torch.full((cfg.F,), cfg.theta)) if cfg.variant == "jumprelu" else 0
        if cfg.variant == "stochastic":
            self.W_gate, self.b_gate = nn.Parameter(W_FD / 4), nn.Parameter(torch.full((cfg.F,), 0.5))
        state = dict(scale_in=1., scale=1., variance=1., threshold=0., lam=cfg.c_first)
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("idle", torch.zeros(cfg.F, dtype=torch.long))  # tokens since a unit was last on

    @torch.no_grad()
    def start(self, x_ND, y_ND):
        """Scales, variance and biases from a first batch: pre and y_hat are centred."""
        self.scale_in.copy_(x_ND.shape[-1] ** 0.5 / x_ND.norm(dim=-1).mean())
        self.scale.copy_(y_ND.shape[-1] ** 0.5 / y_ND.norm(dim=-1).mean())
        mean_D = (x_ND * self.scale_in).mean(0)
        self.b_dec.copy_((y_ND * self.scale).mean(0))
        self.variance.copy_((y_ND * self.scale - self.b_dec).square().sum(-1).mean())
        self.b_enc.sub_(self.W_enc @ mean_D)
        if self.cfg.variant == "stochastic":
            self.b_gate.sub_(self.W_gate @ mean_D)

    @torch.no_grad()
    def fold(self):
        """From now on raw activations: f and all that is measured in its unit, which is y's, shrinks by y's scale."""
        ratio = self.scale_in / self.scale
        for t in (self.b_enc, self.b_dec, self.threshold, *[self.theta] * (self.cfg.variant == "jumprelu")):
            t.div_(self.scale)
        for W in (self.W_enc, *[self.W_skip] * self.cfg.skip):
            W.mul_(ratio)
        if self.cfg.variant == "stochastic":            # gates have no unit: the same from a smaller input
            self.W_gate.mul_(self.scale_in)
        self.variance.div_(self.scale.square()), self.scale.fill_(1), self.scale_in.fill_(1)

    def codes(self, x):
        """f once trained: what a token gets does not depend on the others."""
        cfg, x = self.cfg, x * self.scale_in
        f = F.linear(x, self.W_enc, self.b_enc).relu()
        if cfg.variant == "topk":
            top = f.topk(cfg.k)
            return torch.zeros_like(f).scatter(-1, top.indices, top.values)
        if cfg.variant == "stochastic":
            g = F.linear(x, self.W_gate, self.b_gate).clamp(0, 1)
            return f * g * (g > cfg.tau)
        return f * (f > {"batchtopk": self.threshold, "jumprelu": self.theta, "relu": 0}[cfg.variant])

    def affine(self, x):
        """What y_hat has beside the units."""
        return self.b_dec if self.W_skip is None else self.b_dec + x @ self.W_skip

    # The seam (evals.py)
    def unit_directions(self):
        return [("all", self.W_enc, self.W_dec, None)]

    def unit_inputs(self, gpt, rows_RT):
        (x_ND,), _ = data.over_rows(gpt, rows_RT, self.layers)
        return [x_ND]

    def encode(self, layer, x_BTD, mlp):
        return self.codes(x_BTD)

    def decode(self, layer, f_BTF, x_BTD):
        return (f_BTF @ self.W_dec + self.affine(x_BTD * self.scale_in)) / self.scale

    def contrib(self, layer, f_BTF, x_BTD, units):
        return f_BTF[..., units, None] * self.W_dec[units] / self.scale

def stochastic(z_NF, cfg, t, gen):
    """(g, masks m, importance penalty) of the gate logits z; t in [0, 1]: share of the training done."""
    g, gamma = LowerLeaky.apply(z_NF, cfg.alpha), 1 + (cfg.gamma_end - 1) * min(1, t / 0.9)
    r = torch.rand(g.shape, generator=gen, device=g.device) if cfg.noise else torch.zeros_like(g)
    r[::2] = r[::2, :1]     # one r for all units: independent ones never switch many off together
    g2 = UpperLeaky.apply(z_NF, cfg.alpha).square()
    s_F = (g2 / (g2 + gamma**2)).mean(0)
    return g, torch.lerp(g, g.new_ones(()), r), (s_F * (1 + cfg.w_freq * torch.log2(1 + cfg.freq_a * s_F))).sum()

def loss_fn(tc, x_ND, y_ND, kl, t, gen):
    """(total, its terms, what `remember` wants to know) on one batch. kl(y_hat_ND): what that output costs the
    model, or None for the NMSE; t in [0, 1]: share of the training done."""
    cfg, x_ND, y_ND, W_dec = tc.cfg, x_ND * tc.scale_in, y_ND * tc.scale, tc.W_dec
    nmse = lambda y_hat_ND: (y_ND - y_hat_ND).square().sum(-1).mean() / tc.variance
    lam, penalty, faith, aux, lowest = 0, y_ND.new_zeros(()), y_ND.new_zeros(()), y_ND.new_zeros(()), tc.threshold
    if cfg.variant in ("topk", "batchtopk"):
        y_hat, _, unit_H, f_H = fused.topk(x_ND, tc.W_enc, tc.b_enc, W_dec, cfg.k, cfg.variant == "batchtopk")
        unit_H, f_H = unit_H[f_H > 0], f_H[f_H > 0]
        l0, fired_F, lowest = x_ND.new_tensor(len(f_H) / len(x_ND)), torch.bincount(unit_H, minlength=cfg.F) > 0, f_H
    else:
        pre = F.linear(x_ND, tc.W_enc, tc.b_enc)
        if cfg.variant == "jumprelu":
            f, rate_F = JumpReLU.apply(pre, tc.theta, cfg.bandwidth)
            lam, penalty = cfg.c_l0 * min(1, 2 * t), (rate_F.sum() / cfg.k - 1).square()
        elif cfg.variant == "relu":
            f = pre.relu()
            rate_F, lam, penalty = fused.count(f > 0) / len(f), tc.lam, f.sum(-1).mean()
        else:
            v = pre.relu()
            g, m, penalty = stochastic(F.linear(x_ND, tc.W_gate, tc.b_gate), cfg, t, gen)
            rate_F = fused.count((g > cfg.tau) & (v > 0)) / len(v)
            f, lam, faith = v * m, tc.lam, nmse(v @ W_dec + tc.affine(x_ND))
        y_hat, l0, fired_F = f @ W_dec, rate_F.detach().sum(), rate_F > 0
    y_hat = y_hat + tc.affine(x_ND)
    rec = kl(y_hat / tc.scale) if kl else nmse(y_hat)
    dead = (tc.idle >= cfg.dead).nonzero().squeeze(1)
    if len(dead):
        e_ND, k_aux = (y_ND - y_hat).detach(), min(y_ND.shape[1] // 2, len(dead))
        e_hat = fused.topk(x_ND, tc.W_enc[dead], tc.b_enc[dead], W_dec[dead], k_aux, relu=False)[0]
        aux = (e_ND - e_hat).square().sum() / (e_ND - e_ND.mean(0)).square().sum()
    total = rec + cfg.c_aux * aux + cfg.c_faith * faith + lam * penalty
    terms = dict(loss=total, rec=rec, aux=aux, faith=faith, penalty=lam * penalty, l0=l0, dead=torch.tensor(len(dead)))
    return total, {k: v.detach() for k, v in terms.items()}, (fired_F, l0, lowest)

def optimizers(tc):
    """Adam or Muon for the matrices W_enc, W_dec, W_gate and W_skip, Adam for biases and thresholds."""
    cfg, params = tc.cfg, [p for p in tc.parameters() if p.requires_grad]
    matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() < 2]
    return common.optimizers(cfg.optimizer, matrices, rest, cfg.lr, cfg.lr_rest if cfg.optimizer == "muon" else cfg.lr)

def update(tc, opts, loss, t):
    """One step; the rows of W_dec keep norm 1: no gradient along them, and norm 1 again after the step."""
    cfg, W = tc.cfg, tc.W_dec
    common.set_rates(opts, min(1, (t + 1 / cfg.steps) / 0.05, (1 - t) / 0.2))
    tc.zero_grad()
    loss.backward()
    with torch.no_grad():
        W.grad -= (W.grad * W).sum(-1, keepdim=True) * W
        norm = nn.utils.clip_grad_norm_(tc.parameters(), cfg.clip)
        for opt in opts.values():
            opt.step()
        W.div_(W.norm(dim=-1, keepdim=True))
        if cfg.variant == "jumprelu":
            tc.theta.clamp_(min=0)
    return norm

@torch.no_grad()
def remember(tc, t, fired_F, l0, lowest):
    """The state beside the weights: silence of each unit, threshold of batchtopk, lambda of relu and stochastic."""
    cfg = tc.cfg
    tc.idle.add_(cfg.N).masked_fill_(fired_F, 0)
    if cfg.variant == "batchtopk" and lowest.numel():
        tc.threshold.copy_(torch.lerp(lowest.min(), tc.threshold, cfg.beta if tc.threshold > 0 else 0))
    goal = cfg.k * (cfg.F / cfg.k) ** max(0, 1 - 2 * t)         # from all units to k in the first half of the steps
    tc.lam.mul_((cfg.follow * (l0 / goal - 1).clamp(-1, 1)).exp())

def examples(cfg, gpt, tc, corpus, start):
    """Training batches from step `start` on: shuffled x_ND, y_ND, None, or all tokens but the first of some rows and
    kl(y_hat_ND): what replacing the MLP there costs, through the rest of the model alone."""
    layer, = tc.layers
    if cfg.objective == "mse":
        for x, y in data.batches(gpt, corpus, [layer], cfg.T, cfg.N, cfg.seed, start):
            yield x[0], y[0], None
    for step in range(start, cfg.steps):
        idx_BT = corpus.batch(step, max(1, cfg.N // (cfg.T - 1)), cfg.T, cfg.seed).to(tc.b_dec.device)
        x, y, _, kl_BT = data.clean_pass(gpt, layer, idx_BT)
        def kl(y_hat_ND):
            y_hat = torch.cat([y[:, :1], y_hat_ND.view_as(y[:, 1:])], 1)
            return kl_BT(y_hat)[:, 1:].mean()
        yield x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1), kl

def build(cfg, gpt):
    """A fresh transcoder of the MLP that cfg names, after checking cfg against the target."""
    layer, D = default_layer(gpt) if cfg.layer == -1 else cfg.layer, gpt.cfg.n_embd
    common.within(vars(cfg) | {"layer": layer}, "F", "steps", "log_every", "save_every",
                  layer=(0, gpt.cfg.n_layer - 1), T=(3, gpt.cfg.n_positions),
                  eval_tokens=(cfg.T, math.inf), k=(1, cfg.F), N=(2, data.ROWS * (cfg.T - 1)))
    return Transcoder(cfg, D, common.generator(cfg.seed, "init"), layer).to(gpt.wte.weight.device)

def load(path, gpt):
    tensors, meta = common.load(path, method=Path(__file__).stem, target=gpt.hash)
    tc = build(Config(**meta["config"]), gpt)
    common.unflat(tensors, tc=tc)
    return tc.requires_grad_(False)

def train(cfg):
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    tc = build(cfg, gpt)
    corpus = data.load_all(cfg.data, gpt.vocab, cfg.T)
    gen, opts = common.generator(cfg.seed, "noise", dev), optimizers(tc)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), tc=tc, gen=gen, **opts)
    for step, (x_ND, y_ND, kl) in zip(run.steps(), examples(cfg, gpt, tc, corpus["train"], run.first_step)):
        t = step / cfg.steps
        if not step:
            tc.start(x_ND, y_ND)
        loss, terms, seen = loss_fn(tc, x_ND, y_ND, kl, t, gen)
        norm = update(tc, opts, loss, t)
        remember(tc, t, *seen)
        if run.is_logged:
            run.record(terms, norm)
        if run.is_last:
            tc.fold()
    return tc, summarise(cfg, gpt, tc, corpus, run.seconds)

def summarise(cfg, gpt, tc, corpus, seconds):
    """Prints what was found, writes summary.json. Means and the choice of concepts come from fit, figures from test."""
    fit, test = (corpus[s].labelled(cfg.T, cfg.eval_tokens // cfg.T, tc.b_dec.device) for s in ("fit", "test"))
    lines, out = evals.replacement(tc, gpt, tc.layers[0], fit, test, corpus["test"].names, "latents")
    out |= dict(seconds=seconds)
    print(f"\nlayer {tc.layers[0]}, {cfg.variant}, {cfg.steps * cfg.N:,} tokens, {seconds:.0f} s", *lines, sep="\n")
    common.write(Path(cfg.out) / "summary.json", json.dumps(out | common.provenance(cfg, gpt), indent=1).encode())
    return out

def main(cfg):
    if cfg.sweep and not 4 <= cfg.k <= cfg.F / 4:
        common.fail(f"--sweep --k {cfg.k}: must be from 4 to a quarter of --F {cfg.F}")
    return curve.sweep(train, cfg, "k", [int(cfg.k * share) for share in curve.SHARES]) if cfg.sweep else train(cfg)

if __name__ == "__main__":
    main(common.cli(Config))
