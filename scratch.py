"""From scratch: what if an MLP is made of components from its first step of training?

spd.py takes a trained MLP apart. Here one MLP of the target is trained anew, and its two weight
matrices are sums of rank-one components from the start. A small net says how important each
component is at each token; what it calls unimportant may be ablated by any amount while the model
learns to predict the next token. In the end the components add up to ordinary weights: a model of
its own, which spd.py can take apart as if nothing were known about it.

    y = x W + b,  W = V U               what a matrix makes of x: W_in (D, M), then W_out (M, D)
    g = clamp(ImportanceNet(what both matrices read with all components on), 0, 1)
    mask = g + (1 - g) source           source: a number in [0, 1], random or chosen by an attack
    y = ((x V) * mask) U + b
    loss = c_stoch  CE(masked), random sources; at each position one matrix or both masked
         + c_adv    CE(masked), sources that an attack finds; both masked
         + c_dense  CE(all masks 1)     the model that is left when the components are added up
         + c_imp    (1/N) sum_c s_c (1 + w_freq log2(1 + freq_a s_c / N))   as in spd.py
    CE = mean over positions of -log p(next token)

There is nothing to be faithful to, so no faithfulness: components, masks and penalty are spd.py's
own functions, with V U in the place of the weights, so that the rest, W - V U, is 0.

SPD, stochastic parameter decomposition: Bushnaq, Braun, Sharkey 2025 (arXiv:2506.20790).

Differs from the paper: it has a trained model and keeps its predictions, here the text is to be
predicted. The biases are trained and belong to no component. Nothing learns through what the
importance net reads. All other weights are the target's and stay as they are; with --all they
begin as pretrain.py's and are trained too.

B sequences, T positions, N = B T, D residual width, M MLP hidden width, C components of a matrix

What the defaults are from (400 of 1,000 steps, CE of a training batch: stochastic, attacked, dense;
L0 of both matrices):
    c_dense 0: .766, .829, .862; 61. .5: .753, .830, .755; 62. Without it the model that is left is
            .1 worse than its own masked versions, and no fair target for spd.py

    python scratch.py           # 18 minutes on one core. Validation CE .7059, the target's .6892;
                                # with masks rounded at g = 0.1 .7572, at L0 13.8 of both matrices
    python spd.py --C 512 --model runs/scratch/target       # what it made, taken apart
"""
import copy
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
import pretrain
import spd
from model import GPT, cross_entropy
from report import gallery


@dataclass
class Config:
    # what is trained anew, where to write
    model: str = "target"           # folder of the GPT-2 whose MLP it is (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    all: bool = False               # train all other weights anew too: give it 12,000 steps
    out: str = "runs/scratch"       # folder for the checkpoint, log.jsonl, summary.json, target/
    resume: bool = False            # go on from the checkpoint in --out
    page: bool = True               # units.html beside the checkpoint: a page to browse the units
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the initialisation, the batches and the masks
    # components and their importance
    C: int = 512                    # [1, 1e7] components per matrix
    ci_fn: Literal["global", "mlp", "shared", "vector"] = "global"  # kind of ImportanceNet
    ci_hidden: int = 256            # [1, 1e6] hidden width of the importance net
    alpha: float = 0.01             # [0, 1] slope of LowerLeaky below 0, of UpperLeaky above 1
    # training
    steps: int = 1000               # [1, 1e8] training steps
    B: int = 16                     # [1, 1e6] sequences per step
    T: int = 128                    # [3, 1e6] positions per sequence
    # V and U: random, or the target's own MLP: in random components, or in its neurons
    start: Literal["random", "target", "neurons"] = "random"  # where V, U and the biases begin
    optimizer: Literal["muon", "adam"] = "muon"     # of V, U and the importance net's matrices
    lr: float = 0.03                # (0, 100] of V and U, falling along a cosine
    lr_scaled: bool = False         # V and U: lr by the target's W, as spd.rates says
    decay: float = 0.               # [0, 1] V and U shrink by decay lr a step, W by twice that
    lr_ci: float = 0.02             # (0, 100] of the importance net's matrices
    lr_rest: float = 8e-3           # (0, 100] of biases, the MLP's and the net's, by Adam
    lr_all: float = 1.5e-3          # (0, 100] all: of all other weights, by AdamW
    lr_end: float = 0.1             # [0, 1] last learning rates as a share of the first
    clip_vu: float = 0.01           # (0, 1e9] of the gradient of V and U
    clip_ci: float = 1.0            # (0, 1e9] gradient norm of the importance net
    copy: float = 0.025             # [0, 1] all: share of the steps, the first, on repeated words
    # loss
    c_stoch: float = 0.5            # [0, 1e9] CE under random masks
    c_adv: float = 0.5              # [0, 1e9] CE under the attack's masks
    c_dense: float = 0.5            # [0, 1e9] CE with all masks 1
    sources: Literal["uniform", "bernoulli"] = "uniform"    # random ones: in [0, 1], or 0 or 1
    c_imp: float = 1e-4             # [0, 1e9] importance: THE knob
    w_freq: float = 0.5             # [0, 1e9] frequency term
    freq_a: float = 32768           # [0, 1e9] a of the frequency term; 0: N
    penalty: Literal["smooth_l0", "lp"] = "smooth_l0"  # phi
    gamma_end: float = 0.01         # (0, 1] smooth_l0: last width, reached after 90 % of the steps
    p_start: float = 2.0            # (0, 100] lp: first exponent
    p_end: float = 0.4              # (0, 100] lp: last exponent
    # looking and saving
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 500           # [1, 1e9] steps between checkpoints
    eval_tokens: int = 50_000       # [1, 1e9] tokens of fit and of test that the summary uses
    pgd_rows: int = 32              # [1, 1e6] test rows of the summary's attack, on one source


# flags that a resumed run may give other values (common.Run)
MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "page", "device", "log_every", "save_every",
                        "eval_tokens", "pgd_rows"}
TARGET = "target"       # the folder in --out of the model that is made
ADDS_UP = 1e-4          # |W - V U| / |W| above which weights are not what components add up to


# ---------------------------------------------------------------------------------- the method
def build(cfg, gpt):
    """A fresh SPD whose biases are its own, to be trained too, after checking cfg against the
    target."""
    m = spd.build(cfg, gpt)
    m.bs = nn.ParameterList(torch.zeros_like(b) for b in m.bs)
    return m


def add_up(m):
    """Make m's weights what its components add up to, with gradients: W = V U."""
    m.Ws = [V @ U for V, U in zip(m.V, m.U)]


@torch.no_grad()
def begin(m, cfg, gpt):
    """Put V, U and the biases where training starts: at random, or at the target's own MLP, cut
    into random components or into its neurons."""
    if cfg.start == "random":
        # W_out as in GPT-2: so that the stream's variance doesn't grow with depth
        m.U[1].mul_((2 * gpt.cfg.n_layer) ** -0.5)
        return
    spd.begin(m, cfg)
    mlp = gpt.mlp(m.layers[0])
    m.bs[0].copy_(mlp.c_fc.bias)
    m.bs[1].copy_(mlp.c_proj.bias)


class Reading:
    """One batch of text: what the matrices read with all components on, and what each choice of
    masks costs the predictions. It stands in for spd.CleanPass."""
    def __init__(self, gpt, m, idx_BT1):
        self.gpt = gpt
        self.layer, = m.layers
        self.next_BT = idx_BT1[:, 1:]
        # without gradients, unless the other weights are trained too
        self.x_BTD, self.stream_BTD = gpt.prefix(idx_BT1[:, :-1], self.layer)
        add_up(m)
        self.whole_BTM = self.x_BTD @ m.Ws[0]               # once for all masks
        h_BTM = m.act(self.whole_BTM + m.bs[0])
        self.inputs = [self.x_BTD.detach(), h_BTM.detach()]

    def divergence(self, *masked):
        """Cross-entropy of the next token in nats, mean over positions: one number for each of the
        masked matrices. All of them go through the model above the MLP as one batch."""
        n = len(masked)
        y = torch.cat([matrices.mlp(self.x_BTD, self.whole_BTM) for matrices in masked])
        logits = self.gpt.suffix(self.stream_BTD.repeat(n, 1, 1), y, self.layer)
        ce = F.cross_entropy(logits.flatten(0, 1), self.next_BT.repeat(n, 1).flatten(),
                             reduction="none")
        return ce.view(n, -1).mean(1)


def loss_fn(m, batch, cfg, progress, gen):
    """What one step minimises: (total, its terms, importances). progress: share of training done, 0
    to 1."""
    # How important is each component at each token? Clamped twice: the two have other gradients
    # outside [0, 1].
    logits = m.importance_net(batch.inputs, m.V)
    importance = [spd.LowerLeaky.apply(z, cfg.alpha) for z in logits]   # for the masks: can wake
    penalised = [spd.UpperLeaky.apply(z, cfg.alpha) for z in logits]    # for the penalty

    # The text must be predicted whatever happens to the unimportant: by random amounts, by those
    # that an attack finds, and with nothing ablated.
    sources = spd.stochastic(importance, gen)
    if cfg.sources == "bernoulli":
        sources = [source.round() for source in sources]
    worst = spd.sign_step(m, importance, batch, gen)
    one = importance[0].new_ones(1)
    stoch, adv, dense = batch.divergence(
        m.masked(importance, sources), m.masked(importance, worst), m.site([one] * 2, [one] * 2))

    # Little may be important.
    imp, freq = spd.penalties(penalised, cfg, progress)
    total = (cfg.c_stoch * stoch + cfg.c_adv * adv + cfg.c_dense * dense
             + cfg.c_imp * (imp + cfg.w_freq * freq))
    terms = dict(loss=total, stoch=stoch, adv=adv, dense=dense, imp=imp, freq=freq)
    return total, terms, importance


# ----------------------------------------------------------------------------------- training
def fresh(cfg, given):
    """A model of the target's size and words, all of whose weights are to be trained: it starts as
    pretrain.py's."""
    gpt = GPT(given.cfg, common.generator(cfg.seed, "init"))
    pretrain.start_induction(gpt, common.generator(cfg.seed, "induction"))
    gpt.vocab = given.vocab
    gpt.meta = given.meta
    return gpt.to(given.device)


def optimizers(m, gpt, cfg):
    """spd.py's for V, U and the importance net; Adam for the MLP's biases; with --all pretrain.py's
    AdamW for what is not the MLP."""
    opts = spd.optimizers(m, cfg)
    opts["opt_bias"] = common.optimizers("adam", [*m.bs], [], cfg.lr_rest, 0)["opt"]
    if cfg.all:
        gpt.mlp(m.layers[0]).requires_grad_(False)          # V U stands in for it
        others = [p for p in gpt.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in others if p.ndim == 2], weight_decay=0.1),
                  dict(params=[p for p in others if p.ndim < 2], weight_decay=0)]
        opts["opt_all"] = torch.optim.AdamW(groups, cfg.lr_all, betas=(0.9, 0.99), fused=True)
        for group in opts["opt_all"].param_groups:
            group["initial_lr"] = cfg.lr_all
    return opts


def rows_of(step, cfg, gpt, corpus):
    """The rows of one step, T inputs and T targets each, (B, T + 1): text, or with --all at first
    words to copy."""
    if cfg.all and step < cfg.copy * cfg.steps:
        return pretrain.copying(cfg, len(gpt.vocab), step)
    return corpus.batch(step, cfg.B, cfg.T + 1, cfg.seed)


def load(path, gpt):
    """Load the components as they are evaluated, in the model that they add up to: with masks
    rounded at spd.ON_ABOVE."""
    tensors, meta = common.load(path, method="scratch")
    try:
        cfg = Config(**meta["config"])
    except (KeyError, TypeError) as e:
        common.fail(f"{path}: its configuration is none of scratch.py ({e})")
    m = build(cfg, gpt)
    common.unflat(tensors, spd=m)
    m.requires_grad_(False)
    for V, U, W in zip(m.V, m.U, m.Ws):
        if not evals.relative_error(V @ U, W) < ADDS_UP:
            common.fail(f"{path}: its components don't add up to the weights of {gpt.folder}: the "
                        f"model that they make is {Path(path).parent}/{TARGET}")
    return spd.Rounded(m, spd.ON_ABOVE)


def train(cfg):
    device = common.device(cfg.device)
    given = GPT.load(cfg.model, device)
    spd.check_memory(cfg, given)
    gpt = fresh(cfg, given) if cfg.all else given
    m = build(cfg, gpt)
    corpus = data.load_for(given, cfg.data, cfg.T, ("train", "fit", "dev", "test"))
    gen = common.generator(cfg.seed, "masks", device)
    opts = optimizers(m, gpt, cfg)
    others = dict(others=gpt) if cfg.all else {}
    run = common.Run(cfg, given, data.fingerprint(cfg.data), spd=m, gen=gen, **opts, **others)
    if run.is_fresh:
        begin(m, cfg, gpt)

    for step in run.steps():
        progress = step / cfg.steps
        batch = Reading(gpt, m, rows_of(step, cfg, gpt, corpus["train"]).to(device))
        loss, terms, importance = loss_fn(m, batch, cfg, progress, gen)
        norm = spd.update(m, opts, loss, cfg, progress)
        if run.is_logged:
            on_per_token = [(g > spd.ON_ABOVE).sum(-1).float().mean() for g in importance]
            run.record(terms, norm, l0_in=on_per_token[0], l0_out=on_per_token[1])
    return summarise(cfg, given, gpt, m, corpus, run.seconds)


# ----------------------------------------------------------------------------------- summary
@torch.no_grad()
def write_target(cfg, gpt, m):
    """Write the model that the components add up to, a GPT-2 folder in --out, and read it back."""
    layer, = m.layers
    made = copy.deepcopy(gpt)
    mlp = made.mlp(layer)
    for linear, V, U, b in zip((mlp.c_fc, mlp.c_proj), m.V, m.U, m.bs):
        linear.weight.copy_(V @ U)
        linear.bias.copy_(b)
    folder = Path(cfg.out) / TARGET
    meta = dict(layer=layer, data=cfg.data, made=common.provenance(cfg, gpt))
    made.save(folder, gpt.vocab, meta)
    return GPT.load(folder, gpt.device)


def summarise(cfg, given, gpt, m, corpus, seconds):
    """Write the model that was made, print how well it and its components do, write summary.json.
    Returns the components as they are in that model, and a flat dict."""
    made = write_target(cfg, gpt, m)
    m.requires_grad_(False)
    mlp = made.mlp(m.layers[0])
    m.Ws = [mlp.c_fc.weight, mlp.c_proj.weight]
    out = spd.summarise(cfg, made, m, corpus, seconds)

    # How well does it predict, beside the target that it began as?
    idx_NT = corpus["dev"].rows(cfg.T, cfg.eval_tokens // cfg.T)
    fresh_NT = corpus["dev"].fresh(cfg.T, cfg.eval_tokens // cfg.T)
    rounded = evals.splice(spd.Rounded(m, spd.ON_ABOVE))
    out["ce_given"] = cross_entropy(given, idx_NT, fresh_NT)
    out["ce_made"] = cross_entropy(made, idx_NT, fresh_NT)
    out["ce_rounded"] = cross_entropy(made, idx_NT, fresh_NT, rounded)
    print(f"validation cross-entropy: {cfg.model} {out['ce_given']:.4f}, {cfg.out}/{TARGET} "
          f"{out['ce_made']:.4f}, with masks rounded at {spd.ON_ABOVE} {out['ce_rounded']:.4f}")
    found = out | common.provenance(cfg, given)
    common.write(Path(cfg.out) / "summary.json", json.dumps(found, indent=1).encode())
    return m, out


def main(cfg):
    m, found = train(cfg)
    if cfg.page:
        gallery.of_run(replace(cfg, model=f"{cfg.out}/{TARGET}"), m, found)
    return m, found


if __name__ == "__main__":
    main(common.cli(Config))
