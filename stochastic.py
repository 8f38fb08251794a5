"""Stochastic masks: what do SPD's masks and penalty make of an SAE or a transcoder?

The worked example of a fork. An SAE (sae.py) or a transcoder (transcoder.py) gets a gate for each
unit. The gate says how important the unit is at each token, as SPD's importance net says it of a
component (spd.py), and training shrinks the unit by any amount that the gate leaves open. So units
get sparse because ablating them must not matter, not because k of them are kept.

    v = relu(pre)                           what the unit would write: as in sae.py, transcoder.py
    g = clamp(z, 0, 1)                      the gate: z = W_gate x + b_gate, of what pre reads
    f = v mask,  mask = g + (1 - g) source  source in [0, 1] at random: g = 1 pins the mask
    once trained: f = v g where g > tau, else 0
    loss = NMSE + c_aux AuxK                as in sae.py
         + c_faith  NMSE at f = v           all units whole add up to the activations
         + lambda   sum_i s_i (1 + w_freq log2(1 + freq_a s_i))         lambda follows L0 to k
    s_i = E phi(g_i),  phi(g) = g^2 / (g^2 + width^2), width falling from 1 to gamma_end

What was forked: this file has its own Config, module, loss, training loop and command, all of which
say what is new. What is as it was is imported: the SAE and the transcoder themselves, AuxK, a step
of training, lambda, the summary. The seam (evals.py) asks for codes, everything else is the base's.

Differs from SPD: half of the tokens share one source among all units, for independent ones never
switch many units off together; gates read one vector; there is no adversary.

N tokens of a batch, D width, F units

    python stochastic.py                    # transcoder: CE recovered 0.998, FVE 0.964 at L0 32
    python stochastic.py --base sae --k 16  # SAE: CE recovered 0.991, FVE 0.869 at L0 16
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import common
import data
import fused
import sae
import transcoder
from model import GPT
from report import curve, gallery
from sae import Seen, aux_k, curve_of_k, nmse, optimizers, remember, update
from spd import LowerLeaky, UpperLeaky


@dataclass
class Config:
    # what to take apart, where to write
    model: str = "target"           # folder of the GPT-2 to take apart (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    out: str = "runs/stochastic"    # folder for the checkpoint, log.jsonl and summary.json
    resume: bool = False            # go on from the checkpoint in --out
    sweep: bool = False             # five runs, k / 4 to 4 k: sweep.json and sweep.png
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation, the batches and the noise
    # what gets gates
    base: Literal["sae", "transcoder"] = "transcoder"   # an SAE or a transcoder
    site: Literal["mlp_out", "mlp_in", "resid"] = "mlp_out"  # base sae: the activations
    frozen: bool = False            # base sae: W_dec stays random
    skip: bool = False              # base transcoder: add the affine map x W_skip
    F: int = 1024                   # [1, 1e7] units
    k: int = 32                     # [1, 1e7] units on per token, in the end
    # training
    objective: Literal["mse", "kl"] = "mse"  # rebuild activations, or the predictions
    steps: int = 2000               # [1, 1e8] training steps
    N: int = 2048                   # [2, 1e8] tokens per step
    T: int = 128                    # [3, 1e6] positions per sequence
    optimizer: Literal["adam", "muon"] = "adam"  # of the matrices; Muon turns all their directions
    lr: float = 16e-3               # (0, 100] up in 5 % of the steps, to 0 in the last 20 %
    lr_rest: float = 4e-3           # (0, 100] muon: of biases, by Adam; adam: all are at lr
    enc: float = 0.5                # (0, 1e6] first norm of W_enc's rows; at 1 they turn too slowly
    clip: float = 1.0               # (0, 1e9] gradient norm
    # loss
    c_aux: float = 1 / 32           # [0, 1e9] AuxK
    dead: int = 20_000              # [1, 1e12] tokens of silence after which a unit is dead
    c_wake: float = 0.2             # [0, 1e9] base sae: push on dead gates; 0: a quarter stay dead
    c_faith: float = 1.0            # [0, 1e9] NMSE with every mask at 1, as SPD's faithfulness
    c_first: float = 1e-3           # [0, 1e9] first lambda
    follow: float = 0.03            # [0, 10] lambda times exp(follow (L0 / goal - 1)) a step
    w_freq: float = 0.5             # [0, 1e9] frequency term relative to importance
    freq_a: float = 1024            # [0, 1e9] a of the frequency term
    # gates and masks
    noise: bool = True              # random sources; without, they are 0
    alpha: float = 0.1              # [0, 1] slope of the leaky hard sigmoids
    gamma_end: float = 0.1          # (0, 1] last width of phi, reached after 90 % of the steps
    tau: float = 0.1                # [0, 1) a unit is on where g > tau
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 500           # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses


MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "sweep", "page", "log_every",
                        "save_every", "eval_tokens"}
FILES = {"sae": sae, "transcoder": transcoder}
OWN_FLAGS = {"sae": ("site", "frozen", "c_wake"), "transcoder": ("skip",)}


def base_config(cfg):
    """The Config of the SAE or transcoder that gets the gates: every flag that it has too, and the
    variant relu, whose f = relu(pre) the gates multiply and whose lambda follows L0."""
    passed_on = ["model", "data", "layer", "seed", "F", "k", "objective", "steps", "N", "T",
                 "optimizer", "lr", "lr_rest", "enc", "clip", "c_aux", "dead", "c_first", "follow",
                 "log_every", "save_every", "eval_tokens"]
    if cfg.base == "sae":
        passed_on += ["site", "frozen"]
    else:
        passed_on += ["skip"]
    flags = {name: getattr(cfg, name) for name in passed_on}
    return FILES[cfg.base].Config(variant="relu", **flags)


# ------------------------------------------------------------------------------------- module
class Stochastic(nn.Module):
    """An SAE or a transcoder, base, whose units pass through gates.

    W (F, D) and b of `gate`: what each gate reads, a direction near its unit's own at first. All
    that is not said here is the base's: W_enc, decode, contrib, idle, .."""
    def __init__(self, cfg, base):
        super().__init__()
        self.cfg = cfg
        self.base = base
        W_FD = base.W_enc.detach() / (4 * cfg.enc)
        b_F = torch.full_like(base.b_enc, 0.5)          # every gate starts half open
        self.gate = nn.ParameterDict(dict(W=W_FD, b=b_F))
        self.params_F = torch.full((cfg.F,), 3 * W_FD.shape[1])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def scale_in(self):
        """The scale of what is read; an SAE has one scale, for it reads what it rebuilds."""
        return self.base.scale if self.cfg.base == "sae" else self.base.scale_in

    @torch.no_grad()
    def start(self, *activations):
        """Let the base take its scales from a first batch. A transcoder's biases centre what is
        read, and so must its gates'; an SAE subtracts b_dec."""
        self.base.start(*activations)
        if self.cfg.base == "transcoder":
            mean_D = (activations[0] * self.scale_in).mean(0)
            self.gate.b.sub_(self.gate.W @ mean_D)

    @torch.no_grad()
    def fold(self):
        """Move the scales into the weights. A gate has no unit: its bias stays as it is."""
        self.gate.W.mul_(self.scale_in)
        self.base.fold()

    def gate_logits(self, x):
        return self.pre(x, self.gate.W, self.gate.b).full()

    def codes(self, x):
        """f once trained: v g where g > tau, else 0."""
        x = x * self.scale_in
        v = self.pre(x, self.W_enc, self.b_enc).full().relu()
        g = self.gate_logits(x).clamp(0, 1)
        return v * g * (g > self.cfg.tau)

    def encode(self, layer, x_BTD, mlp):
        return self.codes(self.encoder_input(x_BTD, mlp))


# --------------------------------------------------------------------------------- loss terms
def draw_sources(g_NF, cfg, gen):
    """How much of what each gate leaves open is passed? (N, F), each from 0 to 1; all 0 without
    noise."""
    if not cfg.noise:
        return torch.zeros_like(g_NF)
    sources_NF = torch.rand(g_NF.shape, generator=gen, device=g_NF.device)
    # On every second token all units share one number. With independent numbers the many
    # half-open units average out, and never are many switched off together.
    sources_NF[::2] = sources_NF[::2, :1]
    return sources_NF


def penalty_of(g_NF, cfg, progress):
    """How much is called important? sum_i s_i (1 + w_freq log2(1 + freq_a s_i)), s_i = E phi(g_i):
    about how often unit i matters, from 0 to 1."""
    width = 1 + (cfg.gamma_end - 1) * min(1, progress / 0.9)
    g2_NF = g_NF.square()
    s_F = (g2_NF / (g2_NF + width**2)).mean(0)
    return (s_F * (1 + cfg.w_freq * torch.log2(1 + cfg.freq_a * s_F))).sum()


def wake(z_NF, dead, tau):
    """How far are the gates of dead units below tau? E max(0, tau - z), summed over units. AuxK
    would else train what no gate lets through."""
    return (tau - z_NF[:, dead]).clamp(min=0).mean(0).sum()


def loss_fn(m, x_ND, target_ND, kl, progress, gen):
    """What one step minimises: (total, its terms, what `remember` wants to know).

    x_ND: what is read; target_ND: what is to be rebuilt, an SAE's x again. kl(rebuilt_ND): what a
    reconstruction costs the model's predictions, or None for the NMSE. progress: share of training
    done, 0 to 1."""
    # What would each unit write, and how important is it at each token? One importance, with two
    # gradients outside [0, 1].
    cfg = m.cfg
    x_ND = x_ND * m.scale_in
    target_ND = target_ND * m.scale
    pre = m.pre(x_ND, m.W_enc, m.b_enc)
    z_NF = m.gate_logits(x_ND)
    v_NF = pre.full().relu()
    g_NF = LowerLeaky.apply(z_NF, cfg.alpha)                        # for the masks: can wake
    penalty = penalty_of(UpperLeaky.apply(z_NF, cfg.alpha), cfg, progress)

    # mask = g + (1 - g) source
    mask_NF = torch.lerp(g_NF, g_NF.new_ones(()), draw_sources(g_NF, cfg, gen))
    f_NF = v_NF * mask_NF

    # Whole units must add up to the target; masked ones too, or save the model's predictions.
    faith = nmse(m, target_ND, v_NF @ m.W_dec + m.affine(x_ND))
    rebuilt_ND = f_NF @ m.W_dec + m.affine(x_ND)
    rec = kl(rebuilt_ND / m.scale) if kl else nmse(m, target_ND, rebuilt_ND)

    # Dead units learn what is missing; an SAE's gates are pushed open for it.
    dead = (m.idle >= cfg.dead).nonzero().squeeze(1)
    aux = aux_k(m, pre, (target_ND - rebuilt_ND).detach(), dead)
    if cfg.base == "sae" and len(dead):
        aux = aux + cfg.c_wake * wake(z_NF, dead, cfg.tau)

    total = rec + cfg.c_aux * aux + cfg.c_faith * faith + m.lam * penalty
    rate_F = fused.count((g_NF > cfg.tau) & (v_NF > 0)) / len(v_NF)
    seen = Seen(rate_F > 0, rate_F.sum())
    terms = dict(loss=total, rec=rec, aux=aux, faith=faith, penalty=m.lam * penalty, l0=seen.l0)
    terms = {name: term.detach() for name, term in terms.items()}
    return total, terms | dict(dead=len(dead)), seen


# ------------------------------------------------------------------------------------ training
def check_memory(cfg, gpt):
    """Fail if there is less memory than a training takes, weights and activations of a step. How
    many activations that are was measured."""
    common.check(cfg)
    common.need_for_training(3 * cfg.F * gpt.cfg.n_embd, 18 * cfg.N * cfg.F,
                             f"--F {cfg.F} --N {cfg.N}", gpt.device)


def build(cfg, gpt):
    """A fresh SAE or transcoder with gates, after checking cfg against the target."""
    common.check(cfg)
    for base, flags in OWN_FLAGS.items():
        for flag in flags:
            value = getattr(cfg, flag)
            if base != cfg.base and value != getattr(Config, flag):
                common.fail(f"--{flag} {value}: goes with --base {base} alone")
    base = FILES[cfg.base].build(base_config(cfg), gpt)
    return Stochastic(cfg, base)


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
    gen = common.generator(cfg.seed, "noise", device)
    opts = optimizers(m)
    run = common.Run(cfg, gpt, data.fingerprint(cfg.data), m=m, gen=gen, **opts)

    file = FILES[cfg.base]
    batches = file.examples(cfg, gpt, m, corpus["train"], run.first_step)
    for step, (*activations, kl) in zip(run.steps(), batches):
        progress = step / cfg.steps
        if step == 0:
            m.start(*activations)
        # an SAE's batch has one kind of activations, read and rebuilt; a transcoder's has x and y
        x_ND = activations[0]
        target_ND = activations[-1]
        loss, terms, seen = loss_fn(m, x_ND, target_ND, kl, progress, gen)
        norm = update(m, opts, loss, progress)
        remember(m, progress, *seen)
        if run.is_logged:
            run.record(terms, norm)
        if run.is_last:
            m.fold()
    return m, file.summarise(cfg, gpt, m, corpus, run.seconds)


def main(cfg):
    if cfg.sweep:
        return curve.sweep(train, cfg, "k", curve_of_k(cfg))
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(cfg, m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
