"""How fast does each method train on this machine: against its matrix products, and plain code?

    arithmetic = floating-point operations in the matrix products of one step, counted by torch
    fraction   = arithmetic / (time of a step * rate of the fastest float32 product seen meanwhile)

Times are medians over rounds in which everything compared takes its turn, since a machine drifts by
30 % in minutes. Token ids are random, and so are the weights if there is no target/ yet: neither
changes what a step costs. Each variant leaves a saving out. It lives here, not as a flag of spd.py,
and the tests hold its losses equal.

B sequences, T positions, D residual width, M MLP hidden width, C components of a site,
V vocabulary, N = B T

    python -m studies.bench spd                 # spd.py's default job, and what each saving gives
    python -m studies.bench spd --yardstick     # a public implementation's shapes, and plain code
    python -m studies.bench spd --to_quality    # seconds to the authors' loss: 15 minutes in all
    python -m studies.bench sae                 # a step at two widths; also transcoder, clt, molt
    python -m studies.bench sae --peers         # beside public trainers (tests/peers.py: install)
"""
import functools
import itertools
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import clt
import common
import data
import fused
import molt
import sae
import spd
import stochastic
import transcoder
from model import GPT, GPTConfig, default_layer
from studies import length

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    model: str = "target"       # folder of the GPT-2 whose MLP is taken apart
    rounds: int = 9             # [1, 1e6] measurements of everything; the medians are printed
    yardstick: bool = False     # spd: the public implementation's shapes and losses
    to_quality: bool = False    # spd: how long until the authors' recipe's loss is reached
    peers: bool = False         # sae: public trainers beside ours
    device: str = "auto"        # auto, cpu, cuda


PUBLIC_MS = 755                 # a step of the public implementation on the yardstick, 2 threads
HALFWAY = 0.5                   # share of the training done at which the steps are taken
SQUARES = [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)]


# ------------------------------------------------------------------------------------------ clocks
def interleaved(rounds, functions):
    """Time each of the functions {name: f} in every round; returns {name: [seconds]}.

    In a round they take turns, and of each the second call counts: the first finds the caches and
    the heap as another function left them."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            f()
            synchronize()
            began = time.perf_counter()
            f()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize():
    """Wait until a GPU, if there is one, has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Product:
    """One float32 product (n, k) (k, m), as many times as take long enough to be timed."""

    def __init__(self, n, k, m, device):
        self.A = torch.randn(n, k, device=device)
        self.B = torch.randn(k, m, device=device)
        self.out = torch.randn(n, m, device=device)
        self.times = min(1000, 1 + int(2e9 / (n * k * m)))
        self.flops = self.times * 2 * n * k * m

    def __call__(self):
        for _ in range(self.times):
            torch.mm(self.A, self.B, out=self.out)


def measured(cfg, gpt, steps, shapes):
    """Time steps and float32 products, interleaved.

    Returns ({name: seconds of each round}, {(n, k, m): FLOP/s of that product})."""
    device = gpt.device
    products = {shape: Product(*shape, device) for shape in shapes}
    seconds = interleaved(cfg.rounds, steps | products)
    rates = {}
    for shape, product in products.items():
        rates[shape] = product.flops / median(seconds.pop(shape))
    return seconds, rates


def ratio(numerators, denominators):
    """Median over the rounds of how many times as long one took as the other."""
    return median(a / b for a, b in zip(numerators, denominators))


def arithmetic(step):
    """Floating-point operations of the matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class PassCounter:
    """Counts the sequences that go through a module, forward and backward, in units of B."""

    def __init__(self, module, B):
        self.B = B
        self.forward = 0.
        self.backward = 0.
        self.handle = module.register_forward_hook(self.hook)

    def hook(self, module, args, out):
        self.forward += len(out) / self.B
        if out.requires_grad:
            out.register_hook(self.count_backward)

    def count_backward(self, d_out):
        self.backward += len(d_out) / self.B


def passes(step, gpt, B):
    """How often does a step send its B sequences through the model?

    Returns ([forward, backward] of the last LayerNorm, the same pair of a layer, on average)."""
    last = PassCounter(gpt.ln_f, B)
    layers = [PassCounter(block.attn, B) for block in gpt.h]
    step()
    for counter in (last, *layers):
        counter.handle.remove()
    forward = sum(layer.forward for layer in layers) / len(layers)
    backward = sum(layer.backward for layer in layers) / len(layers)
    return [last.forward, last.backward], [forward, backward]


@contextmanager
def as_installed(memory=True):
    """Without common.fast_matmul and common.keep_memory: MKL, and glibc's own highest thresholds.

    Memory that is kept by then still serves; where that matters, see `apart`."""
    switch = torch.backends.mkldnn.matmul
    was = switch.fp32_precision
    switch.fp32_precision = "none"
    if memory:
        common.keep_memory(2**25, 2**26)
    else:
        common.keep_memory()
    try:
        yield
    finally:
        switch.fp32_precision = was
        common.keep_memory()


def peak_gib(cfg, step="bench.SpdStep(*bench.default_job(cfg), bench.losses)"):
    """Peak memory, GiB, of a fresh process that takes four of these steps.

    To be asked before anything large is done here: Linux lets a process inherit its parent's peak.
    """
    code = f"""import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from studies import bench
cfg = bench.{cfg}
step = {step}
[step() for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    if out.returncode:
        raise SystemExit(out.returncode)        # it has said why
    peak = int(out.stdout.split()[-1])
    per_gib = 2**30 if sys.platform == "darwin" else 2**20      # bytes on a Mac, else KiB
    return peak / per_gib


# --------------------------------------------------------------------------------------------- SPD
def random_gpt(vocab_size, device):
    gpt = GPT(GPTConfig(vocab_size), common.generator(0, "bench"))
    return gpt.requires_grad_(False).to(device)


def default_job(cfg):
    """(the target, or random weights of its shapes if it is not there, spd.py's default job)."""
    device = common.device(cfg.device)
    if cfg.model == Config.model and not Path(cfg.model).exists():
        gpt = random_gpt(len(data.VOCAB), device)
    else:
        gpt = GPT.load(cfg.model, device)
    T = min(spd.Config.T, gpt.cfg.n_positions)
    return gpt, spd.Config(model=cfg.model, layer=default_layer(gpt), T=T)


class SpdStep:
    """One training step of a fresh SPD on random tokens; calling it returns the loss's terms."""

    def __init__(self, gpt, job, losses, context=nullcontext):
        self.gpt = gpt
        self.job = job
        self.losses = losses        # as `losses` below, or a variant of it
        self.context = context
        self.gen = common.generator(job.seed, "masks", gpt.device)
        self.m = spd.build(job, gpt)
        self.idx_BT = torch.randint(gpt.cfg.vocab_size, (job.B, job.T), generator=self.gen,
                                    device=self.gen.device)
        self.opts = spd.optimizers(self.m, job)
        self.pgd = spd.PersistentPGD(self.m, job, self.gen) if job.adversary == "pgd" else None

    def __call__(self):
        with self.context():
            total, terms = self.losses(self.gpt, self.m, self.job, self.idx_BT, self.gen, self.pgd)
            spd.update(self.m, self.opts, total, self.job, HALFWAY)
            if self.pgd:
                self.pgd.step()
        return {name: term.detach() for name, term in terms.items()}


def losses(gpt, m, job, idx_BT, gen, pgd):
    """What spd.train does on a batch: (total, its terms)."""
    batch = spd.CleanPass(gpt, m, idx_BT)
    total, terms, _ = spd.loss_fn(m, batch, job, HALFWAY, gen, pgd)
    return total, terms


@dataclass
class Without:
    """`losses` without some savings: what spd.CleanPass, MaskedMatrices and fused.py do, at length.

    prefix: the model up to the MLP runs once a batch. batched: the masked forwards of a step run in
    one call. lowrank, kl: fused.masked_lowrank and fused.kl_unembed."""
    prefix: bool = True
    batched: bool = True
    lowrank: bool = True
    kl: bool = True

    def __call__(self, gpt, m, job, idx_BT, gen, pgd):
        if not self.lowrank:
            m.site = functools.partial(ExplicitMatrices, m)
        layer = m.layers[0]
        W_VD = gpt.unembedding

        # the clean pass: what the two matrices read, and the predictions to preserve
        with torch.no_grad():
            x, r = gpt.prefix(idx_BT, layer)
            o = x @ m.Ws[0]
            h = m.act(o + m.bs[0])
            final = gpt.hidden(r, h @ m.Ws[1] + m.bs[1], layer)
            if self.kl:
                clean = (final, *fused.log_partition(final, W_VD))
            else:
                clean = (final @ W_VD.T).log_softmax(-1)

        def kl_under(*sites):
            """The divergence under each of the masked sites, (number of sites)."""
            if len(sites) > 1 and not self.batched:
                return torch.cat([kl_under(site) for site in sites])
            starts = [(x, r, o)] * len(sites)
            if not self.prefix:
                starts = [(*gpt.prefix(idx_BT, layer), None) for _ in sites]
            y = torch.cat([site.mlp(x, o) for site, (x, _, o) in zip(sites, starts)])
            rest = torch.cat([r for _, r, _ in starts])
            final = gpt.hidden(rest, y, layer).unflatten(0, (len(sites), -1))
            if self.kl:
                kl = fused.kl_unembed(clean, final, W_VD)
            else:
                kl = kl_logits(clean, final @ W_VD.T)
            return kl.flatten(1).mean(1)

        batch = spd.Batch([x, h], kl_under)
        total, terms, _ = spd.loss_fn(m, batch, job, HALFWAY, gen, pgd)
        return total, terms


class ExplicitMatrices(spd.MaskedMatrices):
    """The masked matrices with W - V U formed and autograd left to it."""

    def __call__(self, i, x, frozen=None):
        V = self.V[i]
        U = self.U[i]
        rest = self.spd.Ws[i] - V @ U
        of_components = ((x @ V) * self.masks[i]) @ U
        return of_components + self.rest_masks[i] * (x @ rest) + self.spd.bs[i]


def kl_logits(logp, logits):
    logq = logits.log_softmax(-1)
    kl = F.kl_div(logq, logp.expand_as(logq), reduction="none", log_target=True)
    return kl.sum(-1)


class Straightforward:
    """`losses` without any of this repository's ideas: full forwards, hooks and autograd only."""

    def __call__(self, gpt, m, job, idx_BT, gen, pgd):
        mlp = gpt.mlp(m.layers[0])
        linears = (mlp.c_fc, mlp.c_proj)

        # the clean pass; hooks keep what the two matrices read
        xs = []
        with torch.no_grad():
            keep = functools.partial(self.keep_input, xs)
            logits = self.forward(gpt, idx_BT, linears, keep)
        clean = logits.log_softmax(-1)

        # importances and stochastic masks
        zs = m.importance_net(xs, m.V)
        gs = [spd.LowerLeaky.apply(z, job.alpha) for z in zs]
        *rs, d_in, d_out = spd.stochastic(gs, gen)
        masks = [g + (1 - g) * r for g, r in zip(gs, rs)]
        deltas = (d_in, d_out)

        def masked(i, linear, args, out):
            """What matrix i gives under its mask: x V m U + delta x (W - V U) + b."""
            x = args[0]
            V = m.V[i]
            U = m.U[i]
            rest = linear.weight - V @ U
            return (x @ V * masks[i]) @ U + deltas[i] * (x @ rest) + linear.bias

        # the four terms
        stoch = kl_logits(clean, self.forward(gpt, idx_BT, linears, masked)).mean()
        imp, freq = spd.penalties([spd.UpperLeaky.apply(z, job.alpha) for z in zs], job, HALFWAY)
        faith = 0
        for W, V, U in zip(m.Ws, m.V, m.U):
            faith = faith + (W - V @ U).square().sum() / W.square().sum() / 2
        total = job.c_faith * faith + job.c_stoch * stoch + job.c_imp * (imp + job.w_freq * freq)
        return total, dict(loss=total, faith=faith, stoch=stoch, imp=imp, freq=freq)

    def keep_input(self, xs, i, linear, args, out):
        xs.append(args[0])

    def forward(self, gpt, idx_BT, linears, hook):
        """Logits of a full forward pass, with hook(i, linear, args, out) at the two matrices."""
        handles = []
        for i, linear in enumerate(linears):
            handles.append(linear.register_forward_hook(functools.partial(hook, i)))
        logits = gpt(idx_BT)
        for handle in handles:
            handle.remove()
        return logits


straightforward = Straightforward()
VARIANTS = {                    # what is left out: arguments of SpdStep
    "nothing": (losses,),
    "prefix and suffix: every masked forward is a full one": (Without(prefix=False),),
    "batching: one call of the suffix per masked forward": (Without(batched=False),),
    "fused.masked_lowrank: W - V U formed, autograd": (Without(lowrank=False),),
    "fused.kl_unembed: log_softmax of all logits": (Without(kl=False),),
    "all four of these": (Without(False, False, False, False),),
    "common.fast_matmul: products by MKL": (losses, functools.partial(as_installed, memory=False)),
}


def show(seconds):
    """A line per name: ms a step, and how many times the first one's, medians over the rounds."""
    first = next(iter(seconds.values()))
    for name, own in seconds.items():
        print(f"  {name:66} {1e3 * median(own):8.1f} ms {ratio(own, first):7.2f} x")


def bench_spd(cfg):
    """A step of the default job: its time, its arithmetic, and what each saving is worth."""
    memory = peak_gib(cfg)
    gpt, job = default_job(cfg)
    steps = {name: SpdStep(gpt, job, *variant) for name, variant in VARIANTS.items()}
    steps["Muon: Adam on all matrices"] = SpdStep(gpt, replace(job, optimizer="adam"), losses)
    (forwards, backwards), (before, after) = passes(steps["nothing"], gpt, job.B)
    flops = arithmetic(steps["nothing"])

    # its own shapes beside the squares: whichever this machine multiplies fastest
    D = gpt.cfg.n_embd
    M = gpt.cfg.n_inner
    N = job.B * job.T
    shapes = SQUARES + [(N, D, M), (N, M, D), (N, M, job.C), (N, D, gpt.cfg.vocab_size)]
    seconds, rates = measured(cfg, gpt, steps, shapes)
    all_ms = [1e3 * t for t in seconds["nothing"]]
    step = median(seconds["nothing"])
    best = max(rates.values())
    square = max(rates[shape] for shape in SQUARES)
    products = ", ".join(f"{n} {k} {m}: {rate / 1e9:.0f}" for (n, k, m), rate in rates.items())
    last = gpt.cfg.n_layer - 1
    print(f"""
spd, the default job: {job.B} x {job.T} tokens a step, C {job.C}, layer {job.layer} of 0 to {last}
weights of {gpt.folder or "random numbers"}, {torch.get_num_threads()} threads
medians of {cfg.rounds} rounds""")
    print(f"""\
  a step             {1e3 * step:.1f} ms ({min(all_ms):.1f} to {max(all_ms):.1f})
  speed              {N / step:,.0f} tokens/s""")
    print(f"""\
  passes a step      {forwards:g} forward (1 clean, {forwards - 1:g} masked), {backwards:g} backward
                     prefix and suffix: the work of {before:.2f} and {after:.2f} through all layers
  arithmetic a step  {flops / 1e9:.2f} GFLOP: {flops / step / 1e9:.0f} GFLOP/s
  float32 products   {best / 1e9:.0f} GFLOP/s, the fastest of these shapes:
                     {products}""")
    print(f"""\
  fraction           {flops / step / best:.1%} of that (goal: at least 50 % on 2 cores)
                     {flops / step / square:.1%} of the fastest square product
  peak memory        {memory:.2f} GiB (goal: under 1.5 GiB)
a step without""")
    show(seconds)


def yardstick_job(cfg):
    """4-layer GPT-2, vocabulary 4096; 32 x 64 tokens, C 256, layer 1, one masked forward."""
    gpt = random_gpt(4096, common.device(cfg.device))
    return gpt, spd.Config(layer=1, C=256, B=32, T=64, adversary="none")


def bench_yardstick(cfg):
    """Our step and plain code's on a public implementation's shapes, which compute equal losses."""
    gpt, job = yardstick_job(cfg)
    per_component = replace(job, ci_fn="mlp", ci_hidden=16)
    ours = "spd.py"
    plain = "plain code, PyTorch and glibc as installed"
    steps = {
        ours: SpdStep(gpt, job, losses),
        plain: SpdStep(gpt, job, straightforward, as_installed),
        "plain code with common.fast_matmul and common.keep_memory":
            SpdStep(gpt, job, straightforward),
        "spd.py without common.fast_matmul and common.keep_memory":
            SpdStep(gpt, job, losses, as_installed),
        "plain code as installed, Gamma a net of 16 units per component":
            SpdStep(gpt, per_component, straightforward, as_installed),
    }

    # do they compute the same?
    mine, theirs, *_ = [step() for step in steps.values()]
    off = max(abs(mine[name] / theirs[name] - 1).item() for name in theirs)

    flops = arithmetic(steps[ours])
    seconds, rates = measured(cfg, gpt, steps, SQUARES)
    best = max(rates.values())
    print(f"\nyardstick: {yardstick_job.__doc__}")
    print(f"{torch.get_num_threads()} threads, medians of {cfg.rounds} rounds; plain code computes "
          f"the same losses (relative difference {off:.0e})")
    public = "the public implementation with 2 threads, timed elsewhere"
    products = f"the products of spd.py alone: {flops / 1e9:.1f} GFLOP at {best / 1e9:.0f} GFLOP/s"
    seconds[public] = [PUBLIC_MS / 1e3] * cfg.rounds
    seconds[products] = [flops / best] * cfg.rounds
    show(seconds)


# The authors' recipe for a language model, with the cheapest of their adversaries.
AUTHORS = spd.FORMER | dict(
    optimizer="adam", lr=1e-3, lr_ci=1e-3, adversary="step", c_faith=1e3, project=False)
SHARES = [2 ** (-i / 2) for i in range(14, -1, -1)]     # of the authors' steps, until as good ..
HALVINGS = 2                    # .. and how often what lies between is halved


def quality(gpt, corpus, job):
    """(seconds, loss at the end) of a training of spd.py, nothing written.

    The loss is studies/length.py's settled_loss."""
    device = gpt.device
    gen = common.generator(job.seed, "masks", device)
    m = spd.build(job, gpt)

    began = time.perf_counter()
    spd.begin(m, job)
    opts = spd.optimizers(m, job)
    pgd = spd.PersistentPGD(m, job, gen) if job.adversary == "pgd" else None
    for step in range(job.steps):
        progress = step / job.steps
        idx_BT = corpus["train"].batch(step, job.B, job.T, job.seed).to(device)
        batch = spd.CleanPass(gpt, m, idx_BT)
        loss, _, _ = spd.loss_fn(m, batch, job, progress, gen, pgd)
        spd.update(m, opts, loss, job, progress)
        if pgd:
            pgd.step()
    if job.project:
        spd.project(m)
    seconds = time.perf_counter() - began

    gen = common.generator(0, "settled", device)
    loss, _ = length.settled_loss(m, gpt, corpus["fit"], job, gen)
    return seconds, loss


def quality_jobs(cfg, folder):
    """{name: (target, its text, our job on it, how many times less time it should take)}."""
    from tests import test_planted
    device = common.device(cfg.device)
    planted = test_planted.plant(folder)[0].to(device)
    gpt = GPT.load(cfg.model, device)
    job = spd.Config(model=cfg.model, T=min(spd.Config.T, gpt.cfg.n_positions))
    name = f"layer {default_layer(gpt)} of {cfg.model}"
    return {
        "the planted MLP": (planted, str(folder / "x.bin"), test_planted.job(folder), 10),
        name: (gpt, job.data, job, 3),
    }


def bench_quality(cfg):
    """How much sooner do our defaults reach the loss that the authors' recipe ends at?

    The authors' recipe runs once, then our defaults for several lengths (`soonest`). Schedules end
    with each run, so that only ends are compared."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (gpt, text, job, goal) in quality_jobs(cfg, Path(folder)).items():
            corpus = data.load_for(gpt, text, job.T)
            theirs, aim = quality(gpt, corpus, replace(job, **AUTHORS))
            print(f"\n{name}: the authors' recipe, {job.steps} steps: loss {aim:.4f} "
                  f"after {theirs:.1f} s", flush=True)
            ours = soonest(gpt, corpus, job, aim)
            if ours:
                print(f"  {theirs / ours:.1f} times less (goal: {goal})", flush=True)


def soonest(gpt, corpus, job, aim):
    """Seconds that the shortest run takes whose loss is `aim` or less; None if none is.

    Runs grow up to job.steps until one is as good, then halve the ratio of its length to that of
    the longest that is not."""
    def attempt(steps):
        seconds, loss = quality(gpt, corpus, replace(job, steps=steps))
        print(f"  spd.py's defaults, {steps} steps: loss {loss:.4f} after {seconds:.1f} s",
              flush=True)
        return seconds if loss <= aim else None

    too_short = 0
    for steps in dict.fromkeys(max(1, int(job.steps * share)) for share in SHARES):
        best = attempt(steps)
        if best:
            break
        too_short = steps
    else:
        return None
    for _ in range(HALVINGS):
        between = round((too_short * steps) ** 0.5)
        if too_short < between < steps:
            seconds = attempt(between)
            if seconds:
                best = seconds
                steps = between
            else:
                too_short = between
    return best


# -------------------------------------------------------------------- the activation-space methods
# STEPS names for each a function that builds step(), one training step on random activations of
# width D with the given fields of its Config, and its variants.
def sae_step(device, D=128, **fields):
    cfg = sae.Config(**fields)
    m = sae.SAE(cfg, D, common.generator(0, "init")).to(device)
    a_ND = torch.randn(cfg.N, D, device=device)
    m.start(a_ND)
    return act_step(sae, m, [a_ND])


def transcoder_step(device, D=128, **fields):
    cfg = transcoder.Config(**fields)
    m = transcoder.Transcoder(cfg, D, common.generator(0, "init")).to(device)
    x_ND = torch.randn(cfg.N, D, device=device)
    y_ND = torch.randn(cfg.N, D, device=device)
    m.start(x_ND, y_ND)
    return act_step(transcoder, m, [x_ND, y_ND])


def stochastic_step(device, D=128, variant="sae", **fields):
    """variant: what gets the gates."""
    cfg = stochastic.Config(base=variant, **fields)
    Base = sae.SAE if variant == "sae" else transcoder.Transcoder
    base = Base(stochastic.base_config(cfg), D, common.generator(0, "init"))
    m = stochastic.Stochastic(cfg, base).to(device)
    gen = common.generator(0, "noise", device)
    x_ND, y_ND = torch.randn(2, cfg.N, D, device=device)
    if variant == "sae":
        m.start(x_ND)
        return act_step(stochastic, m, [x_ND, x_ND], gen)
    m.start(x_ND, y_ND)
    return act_step(stochastic, m, [x_ND, y_ND], gen)


def act_step(method, m, batch, *noise):
    opts = method.optimizers(m)

    def step():
        loss, terms, seen = method.loss_fn(m, *batch, None, HALFWAY, *noise)
        method.update(m, opts, loss, HALFWAY)
        method.remember(m, HALFWAY, *seen)
        return terms
    return step


def clt_step(device, D=128, F=1024, L=4, **fields):
    """F features in all, an L-th of them at each of L layers."""
    cfg = clt.Config(F=F // L, **fields)
    m = clt.CLT(L, D, cfg, common.generator(0, "init"), [L - 1]).to(device)
    opts = clt.optimizers(m, cfg)
    x_LND, y_LND = torch.randn(2, L, cfg.N, D, device=device)

    def step():
        loss, terms, f_LNF, least_L = clt.loss_fn(m, x_LND, y_LND, cfg, HALFWAY)
        clt.update(m, opts, loss, f_LNF, least_L, cfg, HALFWAY)
        return terms
    return step


def molt_step(device, D=128, F=1024, variant="jumprelu", **fields):
    """Transforms of rank 8 whose ranks sum to F; variant: the gate."""
    cfg = molt.Config(groups=f"{F // 8}@8", gate=variant, **fields)
    m = molt.MOLT(D, cfg, common.generator(0, "init")).to(device)
    opt = torch.optim.Adam(m.parameters(), fused=True)
    x_ND, y_ND = torch.randn(2, cfg.N, D, device=device)
    distance = functools.partial(torch.nn.functional.mse_loss, y_ND)

    def step():
        loss, terms, _ = molt.loss_fn(m, x_ND, distance, cfg, HALFWAY)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), cfg.clip)
        opt.step()
        return terms
    return step


VARIANTS_ACT = ("topk", "batchtopk", "jumprelu", "relu")
STEPS = {
    "sae": (sae_step, VARIANTS_ACT),
    "transcoder": (transcoder_step, VARIANTS_ACT),
    "stochastic": (stochastic_step, ("sae", "transcoder")),
    "clt": (clt_step, ("batchtopk", "jumprelu")),
    "molt": (molt_step, ("jumprelu", "relu")),
}
WIDTHS = (1024, 16384)


def bench_act(name, cfg):
    """A step of each variant of one method at each width; memory of the first."""
    if cfg.peers:
        return bench_peers(cfg)
    build, variants = STEPS[name]
    device = common.device(cfg.device)
    memory = {}
    for F in WIDTHS:
        memory[F] = peak_gib(cfg, f"bench.{build.__name__}({str(device)!r}, F={F})")
    steps = {}
    for F in WIDTHS:
        for variant in variants:
            steps[variant, F] = build(device, F=F, variant=variant)
    flops = {key: arithmetic(step) for key, step in steps.items()}
    seconds, rates = measured(cfg, random_gpt(64, device), steps, SQUARES)

    best = max(rates.values())
    print(f"\n{name}: a step of the default Config on random activations, "
          f"{torch.get_num_threads()} threads, medians of {cfg.rounds} rounds")
    print(f"float32 products of this machine: {best / 1e9:.0f} GFLOP/s")
    for (variant, F), own in seconds.items():
        gflop = flops[variant, F] / 1e9
        share = flops[variant, F] / median(own) / best
        ms = 1e3 * median(own)
        print(f"  {variant:12} F {F:6} {ms:9.1f} ms   {gflop:7.2f} GFLOP of products, {share:5.1%} "
              "of that rate")
    for F, gib in memory.items():
        print(f"  peak memory of {variants[0]} at F {F}: {gib:.2f} GiB")


# ------------------------------------------------------------------------------- public trainers
GOALS = {                           # (our variant, peer): times ours, at each of these widths
    ("topk", "dictionary_learning_topk"): (4, 7),
    ("topk", "sparsify_topk"): (2.5, 2.5),
    ("jumprelu", "dictionary_learning_jumprelu"): (2, 2),
}
PEER_WIDTHS = (2048, 16384)
PEER_JOB = dict(k=32, N=4096, steps=1000)
PEERS = ROOT / "tests"
KINDS = {"as installed": False, "with our switches": True}      # of a peer: with our switches?
PEER = """import sys
sys.path[:0] = {paths!r}
import torch, common, peers
{switches}
torch.manual_seed(0)
a_ND = torch.randn({N}, 128)
try:
    update, *_ = peers.{name}(a_ND, {F}, {k}, {steps}, 1e-3, 0)
except ImportError as e:
    sys.exit(print("missing:", e, flush=True))
for step, _ in enumerate(sys.stdin):
    update(step, a_ND)
    print("done", flush=True)"""


@contextmanager
def apart(name, F, ours):
    """step() of a peer in a process of its own.

    In this one it would find the memory that our steps keep, which spares it up to half of its
    time. There it has PyTorch and glibc as installed or, for `ours`, with the switches of ours."""
    switches = "common.fast_matmul(), common.keep_memory()" if ours else ""
    code = PEER.format(paths=[str(ROOT), str(PEERS)], switches=switches, name=name, F=F, **PEER_JOB)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        def step():
            print(file=process.stdin, flush=True)
            answer = answer_of(process)
            if answer != "done\n":
                process.kill()
                common.fail(f"bench sae --peers: {answer or name}; "
                            "tests/peers.py says how to install the peers")
        yield step


def answer_of(process):
    """The next line that a peer's process means for us; empty if it has ended."""
    for line in process.stdout:
        if line.startswith(("done", "missing")):
            return line
    return ""


def bench_peers(cfg):
    """Our steps and those of public trainers on one set of activations."""
    device = common.device("cpu")
    steps = {}
    with ExitStack() as stack:
        for F in PEER_WIDTHS:
            for variant in ("topk", "jumprelu"):
                torch.manual_seed(0)                    # as in `apart`
                steps[variant, F, "sae.py"] = sae_step(device, F=F, variant=variant, **PEER_JOB)
            for (_, name), (kind, ours) in itertools.product(GOALS, KINDS.items()):
                steps[name, F, kind] = stack.enter_context(apart(name, F, ours))
                steps[name, F, kind]()                  # fails at once if it is missing
        seconds = interleaved(cfg.rounds, steps)

    print(f"\npeers: {PEER_JOB['N']} activations a step, D 128, k {PEER_JOB['k']}, "
          f"{torch.get_num_threads()} threads, medians of {cfg.rounds} rounds;")
    print("theirs with PyTorch and glibc as installed, and with our switches, common.fast_matmul "
          "and common.keep_memory")
    for (name, F, kind), own in seconds.items():
        print(f"  {name:28} F {F:6} {kind:18} {1e3 * median(own):9.1f} ms")
    for (variant, name), goals in GOALS.items():
        for F, goal in zip(PEER_WIDTHS, goals):
            ours = seconds[variant, F, "sae.py"]
            times, switched = [ratio(seconds[name, F, kind], ours) for kind in KINDS]
            print(f"  {name} takes {times:.1f} x our {variant} at F {F} (goal: {goal} x), "
                  f"with our switches {switched:.1f} x")
    narrow, wide = PEER_WIDTHS
    grows = ratio(seconds["topk", wide, "sae.py"], seconds["topk", narrow, "sae.py"])
    print(f"  our topk takes {grows:.1f} x as long at F {wide} as at {narrow} (goal: at most 5 x)")


# ------------------------------------------------------------------------------------------- main
def bench_spd_job(cfg):
    """`spd` with its flags."""
    if cfg.yardstick:
        bench_yardstick(cfg)
    elif cfg.to_quality:
        bench_quality(cfg)
    else:
        bench_spd(cfg)


JOBS = {"spd": bench_spd_job} | {name: functools.partial(bench_act, name) for name in STEPS}


def main(job=None, *argv):
    if job not in JOBS:
        common.fail(f"bench: the first argument must be a job, one of: {', '.join(JOBS)}")
    cfg = common.cli(Config, argv)
    for name, text in common.comments(Config).items():
        owner = text.partition(": ")[0]
        if owner in JOBS and owner != job and getattr(cfg, name):
            common.fail(f"bench {job} --{name}: goes with {owner} alone")
    JOBS[job](cfg)


if __name__ == "__main__":
    main(*sys.argv[1:])
