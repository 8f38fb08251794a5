"""How fast the methods train on this machine: against its own matrix products, and against plain code.
    arithmetic = floating-point operations in the matrix products of one step, counted by torch while it runs
    fraction   = arithmetic / (time of a step * rate of the fastest float32 product that this machine showed meanwhile)
Times are medians over rounds in which everything compared takes its turn, since a machine drifts by 30 % in minutes.
Token ids are random, and so are the weights if there is no target/ yet: neither changes what a step costs.
Each variant leaves a saving out; it lives here, not as a flag of spd.py, and the tests hold its losses equal.
B sequences, T positions, D residual width, M MLP hidden width, C components of a site, V vocabulary, N = B T

    python -m studies.bench spd                 # the default job of spd.py, and what each of its savings is worth
    python -m studies.bench spd --yardstick     # the shapes of a public implementation, beside plain code
    python -m studies.bench spd --to_quality    # seconds until the loss of the authors' recipe is reached: 15 minutes
    python -m studies.bench sae                 # a step at two widths; transcoder, clt and molt likewise
    python -m studies.bench sae --peers         # beside dictionary-learning's and eai-sparsify's (tests/peers.py says
                                                # how to install them), on the same activations
"""
import functools, itertools, subprocess, sys, tempfile, time, torch, torch.nn.functional as F
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from torch.utils.flop_counter import FlopCounterMode
import clt, common, data, fused, molt, sae, spd, transcoder
from model import GPT, GPTConfig, default_layer, gelu
from studies import length

ROOT = Path(__file__).parent.parent

@dataclass
class Config:
    model: str = "target"       # folder of the GPT-2 whose MLP is taken apart
    rounds: int = 9             # measurements of everything; the medians are printed
    yardstick: bool = False     # the public implementation's shapes and losses, instead of the default job
    to_quality: bool = False    # spd: how long until the final loss of the authors' recipe is reached
    peers: bool = False         # sae: public trainers beside ours
    device: str = "auto"        # auto, cpu, cuda

PUBLIC_MS = 755                 # a step of the public implementation in the yardstick's job, with 2 threads
HALFWAY = 0.5                   # share of the training done at which the steps are taken
SQUARES = [(n, n, n) for n in (512, 1024, 2048)]

def interleaved(rounds, fs) -> dict[str, list[float]]:
    """Seconds of each of the functions {name: f} in every round. In a round they take turns, and of each the second
    call counts: the first finds the caches and the heap as another function left them."""
    sync, seconds = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, {name: [] for name in fs}
    for _ in range(rounds):
        for name, f in fs.items():
            f(), sync()
            began = time.perf_counter()
            f(), sync()
            seconds[name].append(time.perf_counter() - began)
    return seconds

def measured(cfg, gpt, steps, shapes):
    """(seconds of each step in every round, FLOP/s of each float32 product (n, k) (k, m)), taken interleaved."""
    def product(n, k, m):           # as many times as take long enough to be timed
        A, B, out = (torch.randn(*s, device=gpt.wte.weight.device) for s in ((n, k), (k, m), (n, m)))
        return lambda: [torch.mm(A, B, out=out) for _ in range(times(n, k, m))]
    times = lambda n, k, m: min(1000, 1 + int(2e9 / (n * k * m)))
    seconds = interleaved(cfg.rounds, steps | {shape: product(*shape) for shape in shapes})
    return seconds, {(n, k, m): 2 * n * k * m * times(n, k, m) / median(seconds.pop((n, k, m))) for n, k, m in shapes}

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
def as_installed(memory=True):
    """Without common.fast_matmul and common.keep_memory: MKL, and the highest thresholds that glibc sets by itself.
    Memory that is kept by then still serves; where that matters, see `apart`."""
    switch, was = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    switch.fp32_precision = "none"
    common.keep_memory(*[2**25, 2**26] * memory)
    try:
        yield
    finally:
        switch.fp32_precision = was
        common.keep_memory()

def peak_gib(cfg, step="bench.stepper(*bench.default_job(cfg), bench.losses)") -> float:
    """Peak memory of a fresh process that takes four of these steps. To be asked before anything large is done here:
    Linux lets a process inherit its parent's peak."""
    code = f"""import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from studies import bench
cfg = bench.{cfg}
step = {step}
[step() for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    return int(out.stdout.split()[-1]) / 2 ** (30 if sys.platform == "darwin" else 20)      # bytes on a Mac, else KiB

def random_gpt(vocab_size, device):
    return GPT(GPTConfig(vocab_size), common.generator(0, "bench")).requires_grad_(False).to(device)

def default_job(cfg):
    """The target, or random weights of its shapes if there is none yet, and the default Config of spd.py on it."""
    device, missing = common.device(cfg.device), cfg.model == Config.model and not Path(cfg.model).exists()
    gpt = random_gpt(len(data.VOCAB), device) if missing else GPT.load(cfg.model, device)
    return gpt, spd.Config(model=cfg.model, layer=default_layer(gpt), T=min(spd.Config.T, gpt.cfg.n_positions))

def stepper(gpt, job, losses, context=nullcontext):
    """step() -> the terms of one training step of a fresh SPD on random tokens; losses as below, or a variant of it."""
    gen, m = common.generator(job.seed, "masks", gpt.wte.weight.device), spd.build(job, gpt)
    idx_BT = torch.randint(gpt.cfg.vocab_size, (job.B, job.T), generator=gen, device=gen.device)
    opts, pgd = spd.optimizers(m, job), spd.PersistentPGD(m, job, gen) if job.adversary == "pgd" else None
    def step():
        with context():
            total, terms = losses(gpt, m, job, idx_BT, gen, pgd)
            spd.update(m, opts, total, job, HALFWAY)
            if pgd:
                pgd.step()
        return {name: term.detach() for name, term in terms.items()}
    return step

def losses(gpt, m, job, idx_BT, gen, pgd):
    """What spd.train does on a batch: (total, its terms)."""
    return spd.loss_fn(m, spd.CleanPass(gpt, m, idx_BT), job, HALFWAY, gen, pgd)[:2]

def without(prefix=True, batched=True, lowrank=True, kl=True):
    """`losses` without one of the savings: what spd.CleanPass, MaskedMatrices and fused.py do, done the long way."""
    def long_losses(gpt, m, job, idx_BT, gen, pgd):
        layer, W_VD = m.layers[0], gpt.wte.weight
        if not lowrank:
            m.site = functools.partial(ExplicitMatrices, m)
        with torch.no_grad():
            x, r = gpt.prefix(idx_BT, layer)
            o = x @ m.Ws[0]
            h = gelu(o + m.bs[0])
            final = gpt.hidden(r, h @ m.Ws[1] + m.bs[1], layer)
            clean = (final, *fused.log_partition(final, W_VD)) if kl else (final @ W_VD.T).log_softmax(-1)
        def run(*sites):
            if len(sites) > 1 and not batched:
                return torch.cat([run(site) for site in sites])
            starts = [(x, r, o) if prefix else (*gpt.prefix(idx_BT, layer), None) for _ in sites]
            y = torch.cat([site.mlp(x, o) for site, (x, _, o) in zip(sites, starts)])
            final = gpt.hidden(torch.cat([r for _, r, _ in starts]), y, layer).unflatten(0, (len(sites), -1))
            return (fused.kl_unembed(clean, final, W_VD) if kl else kl_logits(clean, final @ W_VD.T)).flatten(1).mean(1)
        return spd.loss_fn(m, spd.Batch([x, h], run), job, HALFWAY, gen, pgd)[:2]
    return long_losses

class ExplicitMatrices(spd.MaskedMatrices):
    """The masked matrices with W - V U formed and autograd left to it."""
    def __call__(self, i, x, frozen=None):
        V, U = self.V[i], self.U[i]
        rest = self.spd.Ws[i] - V @ U
        return ((x @ V) * self.masks[i]) @ U + self.rest_masks[i] * (x @ rest) + self.spd.bs[i]

def kl_logits(logp, logits):
    logq = logits.log_softmax(-1)
    return F.kl_div(logq, logp.expand_as(logq), reduction="none", log_target=True).sum(-1)

def straightforward(gpt, m, job, idx_BT, gen, pgd):
    """The same losses written without any of this repository's ideas: full forwards, hooks and autograd only."""
    linears, xs = (gpt.h[m.layers[0]].mlp.c_fc, gpt.h[m.layers[0]].mlp.c_proj), []
    def forward(hook):
        handles = [linear.register_forward_hook(functools.partial(hook, i)) for i, linear in enumerate(linears)]
        logits = gpt(idx_BT)
        [handle.remove() for handle in handles]
        return logits
    with torch.no_grad():
        clean = forward(lambda i, linear, args, out: xs.append(args[0]))
    zs = m.importance_net(xs, m.V)
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

VARIANTS = {                    # what is left out -> arguments of `stepper`
    "nothing": (losses,),
    "prefix and suffix: every masked forward is a full one": (without(prefix=False),),
    "batching: one call of the suffix per masked forward": (without(batched=False),),
    "fused.masked_lowrank: W - V U formed, autograd": (without(lowrank=False),),
    "fused.kl_unembed: log_softmax of all logits": (without(kl=False),),
    "all four of these": (without(False, False, False, False),),
    "common.fast_matmul: products by MKL": (losses, functools.partial(as_installed, memory=False))}

def show(seconds):
    """A line per name: ms/step, and the median over the rounds of how many times the first one's."""
    base = next(iter(seconds.values()))
    for name, own in seconds.items():
        print(f"  {name:66} {1e3 * median(own):8.1f} ms {median(s / b for s, b in zip(own, base)):7.2f} x")

def bench_spd(cfg):
    memory = peak_gib(cfg)
    gpt, job = default_job(cfg)
    D, M, V, N = gpt.cfg.n_embd, gpt.cfg.n_inner, gpt.cfg.vocab_size, job.B * job.T
    steps = {name: stepper(gpt, job, *variant) for name, variant in VARIANTS.items()}
    (forwards, backwards), layers = passes(steps["nothing"], gpt, job.B)
    flops = arithmetic(steps["nothing"])
    seconds, rates = measured(cfg, gpt, steps, SQUARES + [(N, D, M), (N, M, D), (N, M, job.C), (N, D, V)])
    all_ms, step = [1e3 * t for t in seconds["nothing"]], median(seconds["nothing"])
    best, square = max(rates.values()), max(rates[shape] for shape in SQUARES)
    print(f"""
spd, the default job: {job.B} x {job.T} tokens a step, C {job.C}, layer {job.layer} of 0 to {gpt.cfg.n_layer - 1}
weights of {gpt.folder or "random numbers"}, {torch.get_num_threads()} threads, medians of {cfg.rounds} rounds
  a step             {1e3 * step:.1f} ms ({min(all_ms):.1f} to {max(all_ms):.1f})
  speed              {N / step:,.0f} tokens/s
  passes a step      {forwards:g} forward (1 clean, {forwards - 1:g} masked), {backwards:g} backward
                     prefix and suffix: the work of {layers[0]:.2f} and {layers[1]:.2f} through all layers
  arithmetic a step  {flops / 1e9:.2f} GFLOP: {flops / step / 1e9:.0f} GFLOP/s
  float32 products   {best / 1e9:.0f} GFLOP/s, the fastest of these shapes:
                     {", ".join(f"{n} {k} {m}: {rate / 1e9:.0f}" for (n, k, m), rate in rates.items())}
  fraction           {flops / step / best:.1%} of that (goal: at least 50 % on 2 cores)
                     {flops / step / square:.1%} of the fastest square product
  peak memory        {memory:.2f} GiB (goal: under 1.5 GiB)
a step without""")
    show(seconds)

def yardstick_job(cfg):
    """4-layer GPT-2 of vocabulary 4096, 32 x 64 tokens, C 256 for both matrices of layer 1, one masked forward."""
    return random_gpt(4096, common.device(cfg.device)), spd.Config(layer=1, C=256, B=32, T=64, adversary="none")

def bench_yardstick(cfg):
    gpt, job = yardstick_job(cfg)
    steps = {name: stepper(gpt, *run) for name, run in {
        "spd.py": (job, losses),
        "plain code, PyTorch and glibc as installed (goal: 6 x)": (job, straightforward, as_installed),
        "plain code with common.fast_matmul and common.keep_memory": (job, straightforward),
        "spd.py without common.fast_matmul and common.keep_memory": (job, losses, as_installed),
        "plain code as installed, Gamma a net of 16 units per component": (
            replace(job, ci_fn="mlp", ci_hidden=16), straightforward, as_installed)}.items()}
    ours, theirs, *_ = (step() for step in steps.values())
    off, flops = max(abs(ours[k] / theirs[k] - 1).item() for k in theirs), arithmetic(steps["spd.py"])
    seconds, rates = measured(cfg, gpt, steps, SQUARES)
    print(f"\nyardstick: {yardstick_job.__doc__}\n{torch.get_num_threads()} threads, medians of {cfg.rounds} rounds;"
          f" plain code computes the same losses (relative difference {off:.0e})")
    fixed, best = {"the public implementation with 2 threads, timed elsewhere": PUBLIC_MS / 1e3}, max(rates.values())
    fixed[f"the products of spd.py alone: {flops / 1e9:.1f} GFLOP at {best / 1e9:.0f} GFLOP/s"] = flops / best
    show(seconds | {name: [s] * cfg.rounds for name, s in fixed.items()})

# The authors' recipe for a language model, with the adversary of theirs that is cheapest.
AUTHORS = dict(optimizer="adam", lr=1e-3, lr_ci=1e-3, adversary="step", c_faith=1e3, project=False)
SHARES = [2 ** (-i / 2) for i in range(14, -1, -1)]     # of the steps of the authors' run, until one of ours is as good

def quality(gpt, corpus, job):
    """(seconds, loss at the end) of a training run of spd.py, nothing written; the loss as studies/length.py has it."""
    m, device = spd.build(job, gpt), gpt.wte.weight.device
    gen, began = common.generator(job.seed, "masks", device), time.perf_counter()
    spd.begin(m, job)
    opts = spd.optimizers(m, job)
    pgd = spd.PersistentPGD(m, job, gen) if job.adversary == "pgd" else None
    for step in range(job.steps):
        idx_BT = corpus["train"].batch(step, job.B, job.T, job.seed).to(device)
        loss, _, _ = spd.loss_fn(m, spd.CleanPass(gpt, m, idx_BT), job, step / job.steps, gen, pgd)
        spd.update(m, opts, loss, job, step / job.steps)
        if pgd:
            pgd.step()
    if job.project:
        spd.project(m)
    seconds = time.perf_counter() - began
    return seconds, length.settled_loss(m, gpt, corpus["fit"], job, common.generator(0, "settled", device))[0]

def quality_jobs(cfg, folder):
    """{name: (target, its text, our job on it, how many times less time it should take)}."""
    from tests import test_planted
    device = common.device(cfg.device)
    planted, gpt = test_planted.plant(folder)[0].to(device), GPT.load(cfg.model, device)
    ours = spd.Config(model=cfg.model, T=min(spd.Config.T, gpt.cfg.n_positions))
    return {"the planted MLP": (planted, str(folder / "x.bin"), test_planted.job(folder), 10),
            f"layer {default_layer(gpt)} of {cfg.model}": (gpt, ours.data, ours, 3)}

def bench_quality(cfg):
    """On the planted MLP of the tests and on the target: the authors' recipe for a whole run, then our defaults for
    longer and longer ones until the loss is no higher. Schedules end with each run, so that only ends are compared."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (gpt, text, job, goal) in quality_jobs(cfg, Path(folder)).items():
            corpus = data.load_all(text, gpt.vocab, job.T)
            theirs, aim = quality(gpt, corpus, replace(job, **AUTHORS))
            print(f"\n{name}: the authors' recipe, {job.steps} steps: loss {aim:.4f} after {theirs:.1f} s", flush=True)
            for steps in dict.fromkeys(max(1, int(job.steps * share)) for share in SHARES):
                ours, loss = quality(gpt, corpus, replace(job, steps=steps))
                print(f"  spd.py's defaults, {steps} steps: loss {loss:.4f} after {ours:.1f} s", flush=True)
                if loss <= aim:
                    print(f"  {theirs / ours:.1f} times less (goal: {goal})", flush=True)
                    break

# The activation-space methods. STEPS names for each a function that builds step(), one training step on random
# activations of width D with the given fields of its Config, and its variants.
def sae_step(device, D=128, **fields):
    m = sae.SAE(sae.Config(**fields), D, common.generator(0, "init")).to(device)
    m.start(a_ND := torch.randn(m.cfg.N, D, device=device))
    return act_step(sae, m, [a_ND])

def transcoder_step(device, D=128, **fields):
    m = transcoder.Transcoder(transcoder.Config(**fields), D, common.generator(0, "init")).to(device)
    m.start(x_ND := torch.randn(m.cfg.N, D, device=device), y_ND := torch.randn(m.cfg.N, D, device=device))
    return act_step(transcoder, m, [x_ND, y_ND])

def act_step(method, m, batch):
    opts, gen = method.optimizers(m), common.generator(0, "noise", batch[0].device)
    def step():
        loss, terms, seen = method.loss_fn(m, *batch, None, HALFWAY, gen)
        method.update(m, opts, loss, HALFWAY)
        method.remember(m, HALFWAY, *seen)
        return terms
    return step

def clt_step(device, D=128, F=1024, L=4, **fields):
    """F features in all, an L-th of them at each of L layers."""
    cfg = clt.Config(F=F // L, **fields)
    m = clt.CLT(L, D, cfg, common.generator(0, "init"), [L - 1]).to(device)
    opts, batch = clt.optimizers(m, cfg), torch.randn(2, L, cfg.N, D, device=device)
    def step():
        loss, terms, f_LNF, least_L = clt.loss_fn(m, *batch, cfg, HALFWAY)
        clt.update(m, opts, loss, f_LNF, least_L, cfg, HALFWAY)
        return terms
    return step

def molt_step(device, D=128, F=1024, variant="jumprelu", **fields):
    """Transforms of rank 8 whose ranks sum to F; variant: the gate."""
    m = molt.MOLT(D, molt.Config(groups=f"{F // 8}@8", gate=variant, **fields), common.generator(0, "init")).to(device)
    opt, (x_ND, y_ND) = torch.optim.Adam(m.parameters(), fused=True), torch.randn(2, m.cfg.N, D, device=device)
    def step():
        loss, terms, _ = molt.loss_fn(m, x_ND, lambda y_hat: (y_ND - y_hat).square().mean(), m.cfg, HALFWAY)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), m.cfg.clip)
        opt.step()
        return terms
    return step

VARIANTS_ACT = ("topk", "batchtopk", "jumprelu", "relu", "stochastic")
STEPS = {"sae": (sae_step, VARIANTS_ACT), "transcoder": (transcoder_step, VARIANTS_ACT),
         "clt": (clt_step, ("batchtopk", "jumprelu")), "molt": (molt_step, ("jumprelu", "relu"))}
WIDTHS = (1024, 16384)

def bench_act(name, cfg):
    """A step of each variant of one method at each width; memory of the first."""
    if cfg.peers:
        return bench_peers(cfg) if name == "sae" else common.fail(f"bench {name} --peers: only sae has peers")
    (build, variants), device = STEPS[name], common.device(cfg.device)
    memory = [peak_gib(cfg, f"bench.{build.__name__}({str(device)!r}, F={F})") for F in WIDTHS]
    steps = {(v, F): build(device, F=F, variant=v) for F in WIDTHS for v in variants}
    flops = {key: arithmetic(step) for key, step in steps.items()}
    seconds, rates = measured(cfg, random_gpt(64, device), steps, SQUARES)
    best = max(rates.values())
    print(f"\n{name}: a step of the default Config on random activations, {torch.get_num_threads()} threads, medians of"
          f" {cfg.rounds} rounds\nfloat32 products of this machine: {best / 1e9:.0f} GFLOP/s")
    for (v, F), own in seconds.items():
        print(f"  {v:12} F {F:6} {1e3 * median(own):9.1f} ms   {flops[v, F] / 1e9:7.2f} GFLOP of products, "
              f"{flops[v, F] / median(own) / best:5.1%} of that rate")
    print(*(f"  peak memory of {variants[0]} at F {F}: {gib:.2f} GiB" for gib, F in zip(memory, WIDTHS)), sep="\n")

GOALS = {("topk", "dictionary_learning_topk"): (4, 7), ("topk", "sparsify_topk"): (2.5, 2.5),
         ("jumprelu", "dictionary_learning_jumprelu"): (2, 2)}          # times ours, at each of these widths:
PEER_WIDTHS, PEER_JOB, PEERS = (2048, 16384), dict(k=32, N=4096, steps=1000), ROOT / "tests"

@contextmanager
def apart(name, F, ours):
    """step() of a peer in a process of its own: in this one it would find the memory that our steps keep, which spares
    it up to half of its time. There it has PyTorch and glibc as installed or, for `ours`, with the switches of ours."""
    code = f"""import sys
sys.path[:0] = {[str(ROOT), str(PEERS)]!r}
import torch, common, peers
{"common.fast_matmul(), common.keep_memory()" if ours else ""}
torch.manual_seed(0)
a_ND, F, k, steps = torch.randn({PEER_JOB["N"]}, 128), {F}, {PEER_JOB["k"]}, {PEER_JOB["steps"]}
try:
    update, *_ = peers.{name}(a_ND, F, k, steps, 1e-3, 0)
except ImportError as e:
    sys.exit(print("missing:", e, flush=True))
for step, _ in enumerate(sys.stdin):
    update(step, a_ND)
    print("done", flush=True)"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        def step():
            print(file=p.stdin, flush=True)
            if (answer := next((line for line in p.stdout if line.startswith(("done", "missing"))), "")) != "done\n":
                p.kill()
                common.fail(f"bench sae --peers: {answer or name}; tests/peers.py says how to install the peers")
        yield step

def bench_peers(cfg):
    """Our steps and those of public trainers on the same activations."""
    steps, kinds, device = {}, {"as installed": False, "with our switches": True}, common.device("cpu")
    with ExitStack() as stack:
        for F in PEER_WIDTHS:
            for variant in ("topk", "jumprelu"):
                torch.manual_seed(0)                    # as in `apart`
                steps[variant, F, "sae.py"] = sae_step(device, F=F, variant=variant, **PEER_JOB)
            for (_, name), (kind, ours) in itertools.product(GOALS, kinds.items()):
                steps[name, F, kind] = stack.enter_context(apart(name, F, ours))
                steps[name, F, kind]()                  # fails at once if it is missing
        seconds = interleaved(cfg.rounds, steps)
    print(f"\npeers: {PEER_JOB['N']} activations a step, D 128, k {PEER_JOB['k']}, {torch.get_num_threads()} threads, "
          f"medians of {cfg.rounds} rounds;\ntheirs with PyTorch and glibc as installed, and with our switches, "
          f"common.fast_matmul and common.keep_memory")
    for (name, F, kind), own in seconds.items():
        print(f"  {name:28} F {F:6} {kind:18} {1e3 * median(own):9.1f} ms")
    for (variant, name), goals in GOALS.items():
        for F, goal in zip(PEER_WIDTHS, goals):
            times, switched = (median(b / a for a, b in zip(seconds[variant, F, "sae.py"], seconds[name, F, kind]))
                               for kind in kinds)
            print(f"  {name} takes {times:.1f} x our {variant} at F {F} (goal: {goal} x), with our switches "
                  f"{switched:.1f} x")
    grows = median(b / a for a, b in zip(*(seconds["topk", F, "sae.py"] for F in PEER_WIDTHS)))
    print(f"  our topk takes {grows:.1f} x as long at F {PEER_WIDTHS[1]} as at {PEER_WIDTHS[0]} (goal: at most 5 x)")

JOBS = {"spd": lambda cfg: (bench_yardstick if cfg.yardstick else bench_quality if cfg.to_quality else bench_spd)(cfg),
        **{name: functools.partial(bench_act, name) for name in STEPS}}

def main(job=None, *argv):
    if job not in JOBS:
        common.fail(f"bench: the first argument must be a job, one of: {', '.join(JOBS)}")
    if (cfg := common.cli(Config, argv)).rounds < 1:
        common.fail(f"--rounds {cfg.rounds}: must be at least 1")
    JOBS[job](cfg)

if __name__ == "__main__":
    main(*sys.argv[1:])
