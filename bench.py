"""How fast the methods train on this machine: against its own matrix products, and against plain code.
    arithmetic = floating-point operations in the matrix products of one step, counted by torch while it runs
    fraction   = arithmetic / (time of a step * rate of the fastest float32 product that this machine showed meanwhile)
Times are medians over rounds in which everything compared takes its turn, since a machine drifts by 30 % in minutes.
Token ids are random, and so are the weights if there is no target/ yet: neither changes what a step costs.
Variants leave out one saving each, written here and not as flags of spd.py; tests/test_bench.py holds their losses equal.
B sequences, T positions, D residual width, M MLP hidden width, C components of a site, V vocabulary, L layers

    python bench.py spd                 # the default job of spd.py, and what each of its savings is worth
    python bench.py spd --yardstick     # the shapes on which a public implementation was timed, beside plain code
"""
import functools
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import fused
import spd
from model import GPT, GPTConfig, default_layer

@dataclass
class Config:
    model: str = "target"       # folder of the GPT-2 whose MLP is taken apart
    rounds: int = 15            # measurements of everything; the medians are printed
    yardstick: bool = False     # the public implementation's shapes and losses, instead of the default job
    device: str = "auto"        # auto, cpu, cuda

PUBLIC_MS = 755                 # of the public implementation on 2 cores: the yardstick's job, a net per component as Gamma
HALFWAY = 0.5                   # the share of training done at which the steps are taken

# ---- measuring ------------------------------------------------------------------------------------------------------

def interleaved(rounds, fs) -> dict[str, list[float]]:
    """Seconds of each of the functions {name: f} in every round; in a round they take turns."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in fs}
    for i in range(1 + rounds):
        for name, f in fs.items():
            sync()
            began = time.perf_counter()
            f()
            sync()
            if i:               # round 0 warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds

def products(shapes, device) -> dict[tuple, tuple]:
    """{(n, k, m): (f, flops)}: f repeats one product (n, k) (k, m) until it is long enough to be timed."""
    def product(n, k, m):
        A, B, out = (torch.randn(*s, device=device) for s in ((n, k), (k, m), (n, m)))
        flops = 2 * n * k * m
        times = max(1, round(4e9 / flops))
        return lambda: [torch.mm(A, B, out=out) for _ in range(times)], times * flops
    return {shape: product(*shape) for shape in shapes}

def arithmetic(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()

def passes(step, gpt, B) -> tuple[list, list]:
    """[forward, backward] passes of B sequences in one step: through the last LayerNorm, and per layer on average."""
    counts = {module: [0, 0] for module in (gpt.ln_f, *(block.attn for block in gpt.h))}
    def count(module, i, out):
        counts[module][i] += len(out) / B
    def forward(module, args, out):
        count(module, 0, out)
        if out.requires_grad:
            out.register_hook(lambda dout: count(module, 1, dout))
    hooks = [module.register_forward_hook(forward) for module in counts]
    step()
    [hook.remove() for hook in hooks]
    last, *layers = counts.values()
    return last, [sum(c) / len(layers) for c in zip(*layers)]

@contextmanager
def plain_products():
    """Matrix products by PyTorch's default, MKL, instead of common.fast_matmul's oneDNN."""
    switch = torch.backends.mkldnn.matmul
    was, switch.fp32_precision = switch.fp32_precision, "none"
    yield
    switch.fp32_precision = was

def peak_gib(cfg, steps=4) -> float:
    """Peak memory of a fresh process that takes a few steps of the default job. To be asked before anything large is
    done here: Linux lets a process inherit its parent's peak."""
    code = f"import bench; bench.report_peak(bench.Config(model={cfg.model!r}, device={cfg.device!r}), {steps})"
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    return int(out.stdout.split()[-1]) / 2 ** (30 if sys.platform == "darwin" else 20)

def report_peak(cfg, steps):
    gpt, job = default_job(cfg)
    step = stepper(gpt, job, losses)
    [step() for _ in range(steps)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)           # bytes on a Mac, KiB elsewhere

# ---- spd ------------------------------------------------------------------------------------------------------------

def default_job(cfg):
    """The target, or its like with random weights, and the default Config of spd.py on it."""
    device = common.device(cfg.device)
    if cfg.model == Config.model and not Path(cfg.model).exists():
        print(f"no folder {cfg.model}: random weights of the same shapes")
        gpt = GPT(GPTConfig(len(data.VOCAB)), common.generator(0, "bench")).to(device)
    else:
        gpt = GPT.load(cfg.model, device)
    job = spd.Config(model=cfg.model, layer=default_layer(gpt))
    return gpt.requires_grad_(False), replace(job, T=min(job.T, gpt.cfg.n_positions))

def stepper(gpt, job, losses):
    """step() -> the terms of one training step of a fresh SPD on random tokens; losses as below, or a variant of it."""
    gen, m = common.generator(job.seed, "masks", gpt.wte.weight.device), spd.build(job, gpt)
    idx_BT = torch.randint(gpt.cfg.vocab_size, (job.B, job.T), generator=gen, device=gen.device)
    opt = spd.optimizer(m.parameters(), job.lr)
    def step():
        total, terms = losses(gpt, m, job, idx_BT, gen)
        spd.update(m, opt, total, job, HALFWAY)
        return {name: term.detach() for name, term in terms.items()}
    return step

def losses(gpt, m, job, idx_BT, gen):
    """What spd.train does on a batch: (total, its terms)."""
    return spd.loss_fn(m, *spd.clean_pass(gpt, m, idx_BT), job, HALFWAY, gen)[:2]

def without(prefix=True, batched=True, lowrank=True, kl=True):
    """`losses` without one of the savings: what spd.clean_pass, SPD.site and fused.py do, done the long way."""
    def long_losses(gpt, m, job, idx_BT, gen):
        layer, W_VD = m.layers[0], gpt.wte.weight
        if not lowrank:
            m.site = functools.partial(explicit_site, m)
        with torch.no_grad():
            x, r = gpt.prefix(idx_BT, layer)
            o = x @ m.Ws[0]
            h = spd.act(o + m.bs[0])
            final = gpt.hidden(r, h @ m.Ws[1] + m.bs[1], layer)
            clean = (final, *fused.log_partition(final, W_VD)) if kl else (final @ W_VD.T).log_softmax(-1)

        def run(*sites):
            if len(sites) > 1 and not batched:
                return torch.cat([run(site) for site in sites])
            starts = [(x, r, o) if prefix else (*gpt.prefix(idx_BT, layer), None) for _ in sites]
            y = torch.cat([spd.through(site, x, o) for site, (x, _, o) in zip(sites, starts)])
            final = gpt.hidden(torch.cat([r for _, r, _ in starts]), y, layer).unflatten(0, (len(sites), -1))
            return (fused.kl_unembed(clean, final, W_VD) if kl else kl_logits(clean, final @ W_VD.T)).flatten(1).mean(1)
        return spd.loss_fn(m, [x, h], run, job, HALFWAY, gen)[:2]
    return long_losses

def explicit_site(m, ms, ds, detach=False):
    """SPD.site with W - V U formed and autograd left to it."""
    def site(i, x, o=None):
        V, U = (p.detach() if detach else p for p in (m.V[i], m.U[i]))
        return ((x @ V) * ms[i]) @ U + ds[i] * (x @ (m.Ws[i] - V @ U)) + m.bs[i]
    return site

def kl_logits(logp, logits):
    logq = logits.log_softmax(-1)
    return F.kl_div(logq, logp.expand_as(logq), reduction="none", log_target=True).sum(-1)

def plainly(losses):
    return plain_products()(losses)

def straightforward(gpt, m, job, idx_BT, gen):
    """The same losses written without any of this repository's ideas: full forwards, hooks and autograd only."""
    linears, xs = (gpt.h[m.layers[0]].mlp.c_fc, gpt.h[m.layers[0]].mlp.c_proj), []

    def forward(hook):
        handles = [linear.register_forward_hook(functools.partial(hook, i)) for i, linear in enumerate(linears)]
        logits = gpt(idx_BT)
        [handle.remove() for handle in handles]
        return logits

    with torch.no_grad():
        clean = forward(lambda i, linear, args, out: xs.append(args[0]))
    zs = m.gamma(xs, m.V)
    gs = [spd.LowerLeaky.apply(z, job.alpha) for z in zs]
    r_in, r_out, d_in, d_out = spd.stochastic(gs, gen)
    masks, deltas = [g + (1 - g) * r for g, r in zip(gs, (r_in, r_out))], (d_in, d_out)

    def masked(i, linear, args, out):
        x, W, V, U = args[0], linear.weight, m.V[i], m.U[i]
        return (x @ V * masks[i]) @ U + deltas[i] * (x @ (W - V @ U)) + linear.bias

    stoch = kl_logits(clean.log_softmax(-1), forward(masked)).mean()
    imp, freq = spd.penalties([spd.UpperLeaky.apply(z, job.alpha) for z in zs], job, HALFWAY)
    faith = sum((W - V @ U).square().sum() / W.square().sum() for W, V, U in zip(m.Ws, m.V, m.U)) / 2
    total = job.c_faith * faith + job.c_stoch * stoch + job.c_imp * (imp + job.w_freq * freq)
    return total, dict(loss=total, faith=faith, stoch=stoch, imp=imp, freq=freq)

VARIANTS = {"": losses,
            "full forwards instead of prefix and suffix": without(prefix=False),
            "each masked forward by itself": without(batched=False),
            "W - V U formed, autograd": without(lowrank=False),
            "KL from the logits of both sides": without(kl=False),
            "all four of these": without(False, False, False, False),
            "PyTorch's default products (MKL)": plainly(losses)}

def show(seconds, names, base, flops=None):
    """One line per name: ms/step, and times the base's, as the median of the rounds' ratios."""
    for label, name in names.items():
        times = [s / b for s, b in zip(seconds[name], seconds[base])]
        print(f"  {label:60} {1e3 * median(seconds[name]):8.1f} ms/step {median(times):8.2f} x")

def bench_spd(cfg):
    memory = peak_gib(cfg)
    gpt, job = default_job(cfg)
    D, M, V, N = gpt.cfg.n_embd, gpt.cfg.n_inner, gpt.cfg.vocab_size, job.B * job.T
    steps = {name: stepper(gpt, job, variant) for name, variant in VARIANTS.items()}
    (forwards, backwards), layers = passes(steps[""], gpt, job.B)
    flops = arithmetic(steps[""])
    squares, own = [(n, n, n) for n in (512, 1024, 2048)], [(N, D, M), (N, M, D), (N, M, job.C), (N, D, V)]
    rated = products(squares + own, gpt.wte.weight.device)
    seconds = interleaved(cfg.rounds, steps | {shape: f for shape, (f, _) in rated.items()})
    rates = {shape: n / median(seconds[shape]) for shape, (_, n) in rated.items()}
    best, step = max(rates, key=rates.get), median(seconds[""])
    print(f"""
spd, default job: {job.B} x {job.T} tokens a step, C {job.C} of both matrices of layer {job.layer} of {gpt.cfg.n_layer},\
 {torch.get_num_threads()} threads, median of {cfg.rounds} rounds
  ms/step            {1e3 * step:.1f}  (from {1e3 * min(seconds['']):.1f} to {1e3 * max(seconds['']):.1f})
  tokens/s           {N / step:,.0f}
  passes of a step   {forwards:g} forward (1 clean, {forwards - 1:g} masked) and {backwards:g} backward, of which prefix\
 and suffix do the work of {layers[0]:.2f} and {layers[1]:.2f} through every layer
  arithmetic         {flops / 1e9:.1f} GFLOP a step, {flops / step / 1e9:.0f} GFLOP/s
  float32 products   {rates[best] / 1e9:.0f} GFLOP/s, the fastest of\
 {', '.join(f"{'x'.join(map(str, s))} {r / 1e9:.0f}" for s, r in rates.items())}
  fraction           {flops / step / rates[best]:.1%}  (goal: 50 % on 2 cores)
  peak memory        {memory:.2f} GiB  (goal: 1.5 GiB)
without""")
    show(seconds, {name or "(the default)": name for name in VARIANTS}, "")

def yardstick_job(cfg):
    """4-layer GPT-2, V 4096, 32 x 64 tokens, both matrices of layer 1, one stochastic subset reconstruction."""
    gpt = GPT(GPTConfig(4096), common.generator(0, "bench")).requires_grad_(False).to(common.device(cfg.device))
    return gpt, spd.Config(layer=1, C=256, B=32, T=64, adversary="none")

def bench_yardstick(cfg):
    gpt, job = yardstick_job(cfg)
    per_component = replace(job, ci_fn="mlp", ci_hidden=16)
    runs = {"spd.py": (job, losses), "plain": (job, plainly(straightforward)), "plain, fast": (job, straightforward),
            "spd.py, MKL": (job, plainly(losses)), "plain, per component": (per_component, plainly(straightforward))}
    steps = {name: stepper(gpt, *run) for name, run in runs.items()}
    ours, theirs = steps["spd.py"](), steps["plain"]()
    off = max(abs(ours[k] / theirs[k] - 1).item() for k in theirs)
    seconds = interleaved(cfg.rounds, steps)
    print(f"\nyardstick: {yardstick_job.__doc__} {torch.get_num_threads()} threads, median of {cfg.rounds} rounds"
          f"\nplain code: full forwards, hooks, autograd, KL of full logits; the same losses (to {off:.0e})")
    show(seconds, {"spd.py": "spd.py", "plain code, the same Gamma, PyTorch's default products (goal: 6 x)": "plain",
                   "plain code with common.fast_matmul": "plain, fast", "spd.py without common.fast_matmul": "spd.py, MKL",
                   "plain code, a net of 16 per component as Gamma": "plain, per component"}, "spd.py")
    print(f"  {'the public implementation, when it was timed on 2 cores':60} {PUBLIC_MS:8.1f} ms/step")

JOBS = {"spd": lambda cfg: (bench_yardstick if cfg.yardstick else bench_spd)(cfg)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        common.fail(f"bench.py: the first argument must be a job, one of: {', '.join(JOBS)}")
    JOBS[sys.argv[1]](common.cli(Config, sys.argv[2:]))
