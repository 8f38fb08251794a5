"""What every script must share: command line, device, seeds, checkpoints, log, provenance. Nothing mathematical.
How a script uses them to resume bit-identically after a kill: the loop of pretrain.py."""
import argparse, ctypes, dataclasses, hashlib, inspect, json, math, os, re, shlex, subprocess, sys, time, torch, typing
from pathlib import Path
from safetensors import SafetensorError, safe_open, torch as safetensors
from tqdm import tqdm

def fail(msg, code=2) -> typing.NoReturn:
    """Every bad input ends here: one line on stderr, exit code 2."""
    print("error:", " ".join(str(msg).split()), file=sys.stderr)
    raise SystemExit(code)

def script(Config) -> str:
    """What runs the file of a Config: python spd.py, or python -m studies.tune for a file of a package."""
    file = Path(inspect.getfile(Config))
    in_package = (file.parent / "__init__.py").exists()
    return f"python -m {file.parent.name}.{file.stem}" if in_package else f"python {file.name}"

def command(cfg) -> str:
    """The full command line that gives cfg, defaults written out."""
    flags = (f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k} {shlex.quote(str(v))}"
             for k, v in vars(cfg).items())
    return " ".join([script(type(cfg)), *flags])

def cli(Config, argv=None):
    """Dataclass -> argparse -> instance of it; prints the full command. A field's trailing comment is its help text,
    Literal gives choices, bool gives --x/--no-x, --a_b is --a-b too. An unknown or abbreviated flag or a
    wrong value goes to `fail`."""
    helps = dict(re.findall(r"^ +(\w+) *:[^#\n]*# *(.*)$", inspect.getsource(Config), re.M))
    p = argparse.ArgumentParser(prog=script(Config), allow_abbrev=False,
                                description=(sys.modules[Config.__module__].__doc__ or "").strip().split("\n")[0])
    p.error = lambda msg: fail(f"{msg} (see {p.prog} --help)")
    for f, kind in zip(dataclasses.fields(Config), typing.get_type_hints(Config).values()):
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
               if isinstance(kind, type) else dict(type=type(f.default), choices=typing.get_args(kind)))      # Literal
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))       # either way of writing it
        p.add_argument(*names, dest=f.name, default=f.default, **how,
                       help=f"{helps.get(f.name, '')} (default: {f.default})".replace("%", "%%"))
    cfg = Config(**vars(p.parse_args(argv)))
    if bad := [k for k, v in vars(cfg).items() if isinstance(v, float) and not math.isfinite(v)]:
        p.error(f"argument --{bad[0]}: invalid value: {vars(cfg)[bad[0]]}, must be finite")
    print("$", command(cfg), flush=True)
    return cfg

RATES = "lr", "lr_rest", "lr_ci", "adv_lr"
ALWAYS = {"seed": (0, math.inf)} | dict.fromkeys((*RATES, "gamma_end", "bandwidth"), (1e-9, 1e9))

def within(flags: dict, *counts, **limits):
    """Fails on a flag whose value lies outside its limits (low, high); counts must be 1 or more. ALWAYS holds too."""
    always = {name: some for name, some in ALWAYS.items() if name in flags}
    for name, (low, high) in (always | dict.fromkeys(counts, (1, math.inf)) | limits).items():
        if not low <= (value := flags[name]) <= high:
            fail(f"--{name} {value}: must be from {low} to {high}")

def device(name: str) -> torch.device:
    """"auto" (printed) is cuda if there, else cpu. A named device that can't be used is an error, never replaced."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: not usable here, allowed: auto, cpu, cuda, cuda:N ({str(e).splitlines()[0]})")
    print(f"device: {name}", flush=True)
    fast_matmul()
    keep_memory()
    return torch.device(name)

def fast_matmul() -> bool:
    """Let oneDNN do float32 matrix products: on AMD it is 2.5x as fast as MKL, PyTorch's default, and just as exact.
    The only switch for that also permits bf16, which Intel's AMX would use: if a product gets inexact, it goes back."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    exact = (torch.full((256, 256), 1 + 2 ** -12) @ torch.ones(256, 256) == 256 + 2 ** -4).all().item()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "none"
    return exact

def keep_memory(mmap=2**30, trim=2**31 - 1):
    """Let glibc reuse the memory of large tensors: it gives it back to the kernel, and clearing it anew costs 8 %."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-3, mmap), mallopt(-1, trim)            # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

def generator(seed: int, name: str, device="cpu") -> torch.Generator:
    """A random stream of its own per (seed, name): adding a stream, or evaluating more often, never shifts another."""
    return torch.Generator(device).manual_seed(int(hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:15], 16))

def optimizers(kind: str, matrices, rest, lr: float, lr_rest: float, betas=(0.9, 0.999)) -> dict:
    """The optimizers of one model, by their names in its checkpoint: of its matrices Adam or Muon at rate lr, of the
    rest, if there is any, Adam at lr_rest. Some of the matrices may be a group with a rate of its own.

    Muon (Jordan 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that a step turns all of its
    directions alike. torch computes that in bfloat16, which takes half of the time of float32 here."""
    if kind == "muon":
        opt = torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="original")
    else:
        opt = torch.optim.Adam(matrices, lr, betas, fused=True)
    opts = dict(opt=opt) | (dict(opt_rest=torch.optim.Adam(rest, lr_rest, betas, fused=True)) if rest else {})
    for group in (group for opt in opts.values() for group in opt.param_groups):
        group["initial_lr"] = group["lr"]
    return opts

def set_rates(opts: dict, share: float):
    """Everything at this share of the rate that it began with."""
    for group in (group for opt in opts.values() for group in opt.param_groups):
        group["lr"] = group["initial_lr"] * share

def write(path, data: bytes):
    """All or nothing: whenever the process dies, `path` holds the old content or the new."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as f:
            f.write(data), f.flush(), os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        fail(f"{path}: cannot write: {e.strerror}")

def save(path, tensors: dict, meta: dict):
    """One safetensors file, meta as JSON in its header (one key: safetensors writes several in random order)."""
    write(path, safetensors.save({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()},
                                 {"meta": json.dumps(meta)}))

def load(path, **expect) -> tuple[dict, dict]:
    """(tensors on the CPU, meta) from `save`. Fails if missing or damaged, or where meta[k] differs from expect[k]."""
    try:
        with safe_open(path, "pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        fail(f"{path}: {'no such file' if not os.path.exists(path) else 'truncated or not a safetensors file'} ({e})")
    for k, want in json.loads(json.dumps(expect)).items():              # through JSON, as meta went: tuple -> list
        was, want = (v if isinstance(v, dict) else {k: v} for v in (meta.get(k), want))
        if diff := [f"{i}={was.get(i)!r}, not {want.get(i)!r}" for i in {**was, **want} if was.get(i) != want.get(i)]:
            fail(f"{path}: does not fit this run: it has {'; '.join(diff)}")
    return tensors, meta

def flat(**parts) -> dict:
    """Named modules, optimizers and generators -> one dict of tensors "name.key", for `save`."""
    def state(p):
        if isinstance(p, torch.optim.Optimizer):
            return {f"{i}.{k}": v for i, s in p.state_dict()["state"].items() for k, v in s.items()}
        return {"state": p.get_state()} if isinstance(p, torch.Generator) else p.state_dict()
    return {f"{name}.{k}": v for name, p in parts.items() for k, v in state(p).items()}

def unflat(tensors: dict, **parts):
    """Inverse of `flat`, in place. Names not asked for are ignored: unflat(tensors, m=m) loads only the weights."""
    for name, p in parts.items():
        state, nested = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(f"{name}.")}, {}
        try:
            if isinstance(p, torch.optim.Optimizer):                    # lr and the like stay as the script set them
                for k, v in state.items():
                    nested.setdefault(int(k.split(".")[0]), {})[k.split(".")[1]] = v
                p.load_state_dict(p.state_dict() | {"state": nested})
            else:
                p.set_state(state["state"]) if isinstance(p, torch.Generator) else p.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError) as e:
            fail(f"the checkpoint does not fit this run: {name}: {e}")

class Log:
    """log(step=.., loss=..) appends a JSON line. Rows at or past `step`, which a resumed run redoes, are dropped."""
    def __init__(self, path, step=0):
        old = Path(path).read_text().splitlines(True) if step and os.path.exists(path) else []
        write(path, "".join(s for s in old if s.endswith("}\n") and json.loads(s)["step"] < step).encode())
        self.file = open(path, "a")          # endswith: the row that a kill cut in half goes too
    def __call__(self, **row):
        print(json.dumps(row), file=self.file, flush=True)

def finite(x, step: int, ckpt=None):
    """Stops (exit code 1) if x, a loss or a gradient norm, is NaN or inf. Called before each save, keeps that good."""
    if not math.isfinite(x := torch.as_tensor(x).item()):
        fail(f"diverged ({x}) at step {step}; last good checkpoint: {ckpt if os.path.exists(str(ckpt)) else None}", 1)

class Run:
    """One training run of a method: where it begins, what it logs, when it saves. The loop itself is the method's:

        run = common.Run(cfg, gpt, data.fingerprint(cfg.data), spd=spd, **opts, gen=gen)
        for step in run.steps():
            ...                                     # one step of training
            if run.is_logged:
                run.record(terms, norm, l0=l0)      # every cfg.log_every steps, and before each checkpoint

    parts: the modules, optimizers and generators that make up the state of the run; all of them go into the checkpoint,
    cfg.out/METHOD.safetensors, every cfg.save_every steps and at the end. METHOD is the name of the script's own file.
    text: hash of the training data. With cfg.resume the run goes on from its checkpoint and ends, on a CPU, bit for bit
    as if it had not been interrupted. Fails (exit code 2) where the checkpoint is missing, damaged, or of another
    method, target, data or configuration; only what the script names in MAY_CHANGE_ON_RESUME may differ.
    """
    def __init__(self, cfg, gpt, text, **parts):
        self.cfg, self.gpt, self.parts = cfg, gpt, parts
        self.method = Path(inspect.getfile(type(cfg))).stem
        self.path = Path(cfg.out) / f"{self.method}.safetensors"
        may_change = sys.modules[type(cfg).__module__].MAY_CHANGE_ON_RESUME
        flags = {name: value for name, value in vars(cfg).items() if name not in may_change}
        self.fixed = dict(method=self.method, target=gpt.hash, text=text, run=flags)
        self.is_fresh = not cfg.resume
        self.first_step, self.seconds = 0, 0.0
        self.beside = {}            # more modules for the next checkpoint: results, which no resumed run reads
        if cfg.resume:
            tensors, meta = load(self.path, **self.fixed)
            unflat(tensors, **parts)
            self.first_step, self.seconds = meta["step"], meta["seconds"]

    def steps(self):
        """Yields the number of each step that is left to do, and saves after those where it is time to."""
        cfg, began = self.cfg, time.time() - self.seconds
        self.log = Log(Path(cfg.out) / "log.jsonl", self.first_step)
        self.bar = tqdm(range(self.first_step, cfg.steps), self.method, cfg.steps, initial=self.first_step)
        for self.step in self.bar:
            self.is_last = self.step + 1 == cfg.steps
            self.is_saved = self.is_last or (self.step + 1) % cfg.save_every == 0
            self.is_logged = self.is_saved or self.step % cfg.log_every == 0
            yield self.step
            if self.is_saved:
                self.seconds = time.time() - began
                meta = dict(step=self.step + 1, seconds=self.seconds, **provenance(cfg, self.gpt))
                save(self.path, flat(**self.beside, **self.parts), self.fixed | meta)

    def record(self, terms, norm, **more):
        """Logs the terms of the loss, the gradient's norm and whatever else is named, all single numbers. Stops the run
        (exit code 1) where the loss or the norm is not finite, before that gets into a checkpoint."""
        row = {name: torch.as_tensor(value).item() for name, value in (terms | more).items()}
        finite(row["loss"] + norm.item(), self.step, self.path)
        self.log(step=self.step, **row, norm=norm.item())
        self.bar.set_postfix({name: f"{value:.2g}" for name, value in row.items()})

def provenance(cfg, gpt) -> dict:
    """What it takes to repeat a run; goes into each checkpoint's meta and each summary.json."""
    script = Path(inspect.getfile(type(cfg))).resolve()
    git = f"git -C {shlex.quote(str(script.parent))} describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null"
    return dict(config=vars(cfg), command=command(cfg), commit=subprocess.getoutput(git) or None,
                source=hashlib.sha256(script.read_bytes()).hexdigest(), target=gpt.hash, torch=torch.__version__,
                threads=torch.get_num_threads(), device=str(next(gpt.parameters()).device))
