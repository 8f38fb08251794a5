"""What all scripts share: command line, device, random streams, checkpoints, log, provenance.

Nothing here is mathematics. `Run` shows how these parts let a killed run go on and end bit for bit
as if it had never been interrupted; the loop around it stands in each method's `train`.
"""
import argparse
import ast
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import numbers
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import typing
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from tqdm import tqdm

import fused

try:
    import fcntl
    import resource
except ImportError:         # Windows has no such file locks and limits
    fcntl = None
    resource = None

PAGE = "units.html"         # beside a run's checkpoint: report/gallery.py


def fail(msg, code=2) -> typing.NoReturn:
    """End the script with one line on stderr. Every bad input ends here; exit code 2."""
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()         # the message gets a line of its own, below the bar
    line = " ".join(shortened(word, 500) for word in str(msg).split())
    print("error:", shortened(line, 2000), file=sys.stderr)
    raise SystemExit(code)


def shortened(text, longest):
    """Leave out the middle of a text that is longer."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}..{text[-half:]}"


def end_in_one_line(kind, e, trace):
    """Say in one line why a script ends where that is no fault of its code: Ctrl-C, no memory, a
    file or an output that can't be used. A fault of the code has its traceback (sys.excepthook)."""
    if issubclass(kind, BrokenPipeError):
        raise SystemExit(1)         # as of `| head`: whoever reads has read enough
    if issubclass(kind, OSError):
        fail(f"{e.filename or 'output'}: {e.strerror or e}")
    if issubclass(kind, KeyboardInterrupt):
        fail("interrupted: a training goes on with --resume, compare.py and the studies when they "
             "are started again", 130)
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(e):
        fail(f"out of memory: {e}")
    sys.__excepthook__(kind, e, trace)


# ------------------------------------------------------------------------------ command line
def script(Config) -> str:
    """How is the file of a Config run? python spd.py; python -m studies.tune in a package."""
    file = Path(inspect.getfile(Config))
    in_package = (file.parent / "__init__.py").exists()
    return f"python -m {file.parent.name}.{file.stem}" if in_package else f"python {file.name}"


def flag(name, value) -> str:
    """Write one field of a Config as it is typed: --C 256, --resume, --no-resume."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def command(cfg) -> str:
    """Write the full command line that gives cfg, defaults too."""
    return " ".join([script(type(cfg)), *(flag(k, v) for k, v in vars(cfg).items())])


class Parser(argparse.ArgumentParser):
    """argparse, whose errors end like all others."""
    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


def cli(Config, argv=None):
    """Read a dataclass from the command line, and print the full command.

    A field's trailing comment is its help text. Literal gives choices, bool gives --x and --no-x,
    --a_b may be written --a-b, an int 1e3 or 1_000. An unknown or abbreviated flag, a wrong value
    and a flag that another one makes idle go to `fail`."""
    # what a terminal or a file can't show must not end a run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a notebook's has none
            stream.reconfigure(errors="replace", line_buffering=True)
    sys.excepthook = end_in_one_line

    # the first line of the file's docstring, and the comments behind the fields
    about = (sys.modules[Config.__module__].__doc__ or "").strip().split("\n")[0]
    parser = Parser(prog=script(Config), allow_abbrev=False, description=about)

    # one flag per field
    kinds = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = kinds[f.name]
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(kind, type):
            how = dict(type=integer if kind is int else kind)
        else:               # Literal
            how = dict(type=type(f.default), choices=typing.get_args(kind))
        text = f"{comments(Config).get(f.name, '')} (default: {f.default})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=f.name, default=f.default, help=text, **how)

    refuse_renamed(Config, sys.argv[1:] if argv is None else argv)
    cfg = Config(**vars(parser.parse_args(argv)))
    check(cfg)
    refuse_idle(cfg)
    print("$", command(cfg), flush=True)
    return cfg


def integer(text) -> int:
    """Read an int as people type it: 1000, 1_000 or 1e3."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


@functools.cache
def comments(Config) -> dict:
    """Read the comments behind the fields of a Config, and of those that it extends."""
    texts = {}
    for part in reversed(Config.__mro__[:-1]):
        source = inspect.getsource(part)
        texts.update(re.findall(r"^ +(\w+) *:[^#\n]*# *(.*)$", source, re.M))
    return texts


def refuse_renamed(Config, argv):
    """Fail on a flag by its old name, and say its new one, which RENAMED of Config's file has."""
    renamed = getattr(sys.modules[Config.__module__], "RENAMED", {})
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in renamed:
            fail(f"--{name}: is called --{renamed[name]} now")


def refuse_idle(cfg):
    """Fail on a flag that would be ignored. Its comment begins with what it belongs to: "relu: .."
    with a choice, "skip: .." with a switch."""
    kinds = typing.get_type_hints(type(cfg))
    owners = {}                     # {choice or switch: (how it is typed, is it chosen?)}
    for name, kind in kinds.items():
        if kind is bool:
            owners[name] = (f"--{name}", getattr(cfg, name))
        for choice in typing.get_args(kind):
            owners[choice] = (f"--{name} {choice}", getattr(cfg, name) == choice)
    for name, text in comments(type(cfg)).items():
        owner = RANGE.sub("", text).partition(": ")[0]
        typed, is_chosen = owners.get(owner, ("", True))
        if not is_chosen and getattr(cfg, name) != getattr(type(cfg), name):
            fail(f"--{name}: goes with {typed} alone")


# ------------------------------------------------------------------------------------ ranges
RANGE = re.compile(r"^([\[(])(\S+), (\S+)([\])]) *")
NUMBERS = {int: numbers.Integral, float: numbers.Real}


def check(cfg, **ranges):
    """Fail on a value that a field of a Config can't have: of another type, not among its choices,
    outside its range, or an empty name.

    The range of a number stands where its comment begins, "[1, 1e8] training steps", and nowhere
    else. ranges: more of them, which depend on other values, {name of the field: "[0, 3]"}."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        text = comments(type(cfg)).get(name, "")
        own = RANGE.match(text)
        intervals = [own[0].strip()] if own else []
        if name in ranges:
            intervals.append(ranges[name])
        may_be_empty = "empty: " in text or getattr(type(cfg), name) == ""
        value = getattr(cfg, name)
        needed = what_it_must_be(value, kind, intervals, may_be_empty)
        if needed:
            fail(f"--{name} {value!r}: must be {needed}")


def what_it_must_be(value, kind, intervals, may_be_empty) -> str:
    """What would a value have to be for a field of this kind? "" if it is that."""
    choices = typing.get_args(kind)
    if choices:
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    is_mistaken = isinstance(value, bool) and kind is not bool      # bools are ints in Python
    if is_mistaken or not isinstance(value, NUMBERS.get(kind, kind)):
        return f"of type {kind.__name__}"
    if kind is str and not value.strip() and not may_be_empty:
        return "more than nothing"
    if kind in NUMBERS:
        for interval in intervals:
            if not is_in(value, interval):
                return f"in {interval}"
        if not -math.inf < value < math.inf:
            return "finite"
    return ""


def is_in(value, interval) -> bool:
    """Does a number lie in an interval like "[1, 1e9]" or "(0, 1]"? NaN lies in none."""
    opening, low, high, closing = RANGE.match(interval).groups()
    is_end = (opening == "[" and value == float(low)) or (closing == "]" and value == float(high))
    return is_end or float(low) < value < float(high)


# ------------------------------------------------------------------------------------ device
def device(name: str) -> torch.device:
    """Choose where to compute. "auto" (printed) is cuda if there, else cpu.

    A named device that can't be used is an error: another never takes its place."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.startswith("cpu:"):
            raise RuntimeError("a cpu has no number")       # torch takes any
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).splitlines()[0]
        fail(f"--device {name}: not usable here, allowed: auto, cpu, cuda, cuda:N ({reason})")
    print(f"device: {name}", flush=True)
    fast_matmul()
    keep_memory()
    return torch.device(name)


def fast_matmul() -> bool:
    """Let oneDNN compute float32 matrix products: on AMD 2.5x as fast as MKL, PyTorch's default,
    and just as exact.

    The only switch for that also permits bf16, which Intel's AMX would use. So a product is tried,
    and if it is inexact the switch goes back. Returns whether it stayed."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    # 1 + 2^-12 needs more digits than bf16 has
    product = torch.full((256, 256), 1 + 2 ** -12) @ torch.ones(256, 256)
    exact = (product == 256 + 2 ** -4).all().item()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "none"
    return exact


def keep_memory(mmap=2**26, trim=2**31 - 1):
    """Let glibc reuse the memory of tensors. It would give that back to the kernel, and clearing it
    anew costs 8 %.

    Not of tensors above 64 MB, such as GPT-2's logits: a heap of such blocks breaks up, to 15 GiB
    where 3 are in use."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-3, mmap)           # M_MMAP_THRESHOLD
        mallopt(-1, trim)           # M_TRIM_THRESHOLD


def generator(seed: int, name: str, device="cpu") -> torch.Generator:
    """Start a random stream of its own per (seed, name): adding a stream, or evaluating more often,
    never shifts another."""
    digits = hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:15]
    return torch.Generator(device).manual_seed(int(digits, 16))


def need(n_bytes, what, device="cpu"):
    """Fail if something would take more memory than there is, before it is made.

    what: the flags that decide how much that is."""
    there = memory(torch.device(device))
    if n_bytes > there:
        fail(f"{what}: would need {n_bytes / 2**30:,.1f} GiB, there are {there / 2**30:,.1f} GiB")


def need_for_training(n_weights, n_activations, what, device="cpu"):
    """Fail if a training would take more memory than there is: weights, gradients and two moments
    each, and the activations of one step."""
    need(4 * (4 * n_weights + n_activations), what, device)


def memory(device) -> float:
    """How many bytes may a process use on a device? On a CPU that is the machine's memory, or less
    where its container, its job or its shell sets a limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not resource:
        return math.inf
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            limits.append(limit)
    groups = Path("/sys/fs/cgroup")
    for path in (groups / "memory.max", groups / "memory/memory.limit_in_bytes"):
        try:
            limits.append(int(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):       # not there, or "max"
            pass
    return min(limits)


# -------------------------------------------------------------------------------- optimizers
def optimizers(kind: str, matrices, rest, lr: float, lr_rest: float, betas=(0.9, 0.999)) -> dict:
    """Make the optimizers of one model, {its name in the checkpoint: optimizer}: of the matrices
    Adam or Muon at rate lr, of the rest, if there is any, Adam at lr_rest. Some of the matrices may
    be a group with a rate of its own."""
    if kind == "muon":
        opt = fused.Muon(matrices, lr, weight_decay=0)
    else:
        opt = torch.optim.Adam(matrices, lr, betas, fused=True)
    opts = dict(opt=opt)
    if rest:
        opts["opt_rest"] = torch.optim.Adam(rest, lr_rest, betas, fused=True)
    for group in param_groups(opts):
        group["initial_lr"] = group["lr"]
    return opts


def param_groups(opts: dict) -> list:
    groups = []
    for opt in opts.values():
        groups += opt.param_groups
    return groups


def set_rates(opts: dict, share: float):
    """Set every learning rate to this share of the rate that it began with."""
    for group in param_groups(opts):
        group["lr"] = group["initial_lr"] * share


# --------------------------------------------------------------------------------------- files
def write(path, data: bytes):
    """Write a file, all or nothing: whenever the process dies, `path` holds the old content or the
    new.

    The data go to a temporary file, which then takes the place of `path`. Its name is its own, so
    that two processes which write one path don't mix: the last to end wins. Only a process that is
    killed leaves it behind."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        fail(f"{path}: cannot write: {e.strerror}")


HELD = {}                           # {path: open file} of the locks that this process has


def hold(folder, wait=False):
    """Keep a folder for this process until it ends, or until `let_go`. If another process has it,
    fails and names the holder, or waits for it.

    The lock is the system's, on the open file folder/.lock: it ends with its process, however that
    ends, and counts on all machines that share the folder. So a file that was left behind locks
    nothing. What stands in it says who holds it."""
    path = Path(folder).resolve() / ".lock"
    if path in HELD:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
        if fcntl:
            lock(file, folder, wait)
        file.truncate(0)
        print(os.getpid(), "on", socket.gethostname(), file=file, flush=True)
    except OSError as e:
        fail(f"{path}: cannot write: {e.strerror}")
    HELD[path] = file


def lock(file, folder, wait):
    """Lock the open file of a folder, as `hold` says."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"{folder}: process {file.read().strip()} is writing there"
        if not wait:
            fail(f"{holder}: wait for it, or choose another folder with --out")
        print(f"{holder}: waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def is_held(folder) -> bool:
    """Does another process hold a folder at this moment?"""
    path = Path(folder).resolve() / ".lock"
    if path in HELD or not fcntl or not path.is_file():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def let_go(folder):
    """Let another process hold a folder that this one holds."""
    file = HELD.pop(Path(folder).resolve() / ".lock", None)
    if file:
        file.close()


def save(path, tensors: dict, meta: dict):
    """Write tensors and what is known about them to one safetensors file.

    meta is JSON under one key of the header, since safetensors writes several in random order. It
    gets the checksum of all that the file says."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta | dict(checksum=checksum(copies, meta)))
    write(path, safetensors.save(copies, {"meta": text}))


def checksum(tensors: dict, meta: dict) -> int:
    """CRC-32 of tensors and meta: a single bit that the disk has turned changes it."""
    crc = zlib.crc32(json.dumps(meta).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


# how to say that hashes in a checkpoint's meta differ, which tell people nothing
HASHED = dict(text="another text than --data names now, or the file has changed",
              target="another target than --model names now, or its files have changed")
# what reading a file that is no checkpoint may raise
UNREADABLE = (SafetensorError, OSError, ValueError, RecursionError)


def load(path, **expect) -> tuple[dict, dict]:
    """Read (tensors on the CPU, meta), as `save` wrote them. Fails if the file is missing or
    damaged, or where meta[k] differs from expect[k]."""
    must_be_file(path)
    try:
        with safe_open(path, "pt") as file:
            # copies, since what is read lies in the file itself, wherever the header ends
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            meta = meta_of(file)
    except UNREADABLE as e:
        is_there = os.path.exists(path)
        reason = "truncated or not a safetensors file" if is_there else "no such file"
        fail(f"{path}: {reason} ({e})")
    # files of before there were checksums have none, and nor have those of others
    written = meta.pop("checksum", None)
    if written is not None and written != checksum(tensors, meta):
        fail(f"{path}: damaged: its checksum is not that of what it holds; take another copy of "
             "it, or train anew")
    # through JSON, as meta went: tuples become lists
    for name, wanted in json.loads(json.dumps(expect)).items():
        wrong = differences(name, meta.get(name), wanted)
        if wrong and name in HASHED:
            wrong = [HASHED[name]]
        if wrong:
            fail(f"{path}: does not fit this run: it has {'; '.join(wrong)}")
    return tensors, meta


def load_trained(path, Config, gpt) -> tuple[dict, typing.Any]:
    """Read the checkpoint of a method that was trained on a target: (tensors, its Config)."""
    tensors, meta = load(path, method=Path(inspect.getfile(Config)).stem, target=gpt.hash)
    try:
        cfg = Config(**meta["config"])
    except (KeyError, TypeError) as e:
        fail(f"{path}: its configuration is none of {script(Config)} ({e})")
    return tensors, cfg


def read_meta(path) -> dict:
    """Read what is known about the tensors of a file, without reading them.

    {} where the file is missing or damaged: `load` says which, once it is needed."""
    if not os.path.isfile(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return meta_of(file)
    except UNREADABLE:
        return {}


def meta_of(file) -> dict:
    meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    if not isinstance(meta, dict):
        raise ValueError("its meta is no JSON object")
    return meta


def must_be_file(path):
    """Fail if there is something else in the place of a file: a folder, a pipe."""
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"{path}: is not a file but in the place of one: move it away")


def must_be_writable(*folders):
    """Make folders, and fail if one of them takes no file: before hours of work, whose results
    would go there."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, ValueError) as e:      # ValueError: of a name that no file has
            fail(f"{folder}: cannot write: {getattr(e, 'strerror', None) or e}")


def read_json(path, default) -> dict:
    """Read the dict that a study keeps in a file, or the default where there is no file yet."""
    try:
        if not os.path.exists(path):
            return default
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if default.keys() <= found.keys():
            return found
        reason = f"it has no {', '.join(default)}"
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        reason = str(e)
    fail(f"{path}: damaged ({reason}): restore it, or remove it and lose what was found")


def differences(name, was, wanted) -> list[str]:
    """In what do two values of meta[name] differ? A line each; of dicts, one per key."""
    was = was if isinstance(was, dict) else {name: was}
    wanted = wanted if isinstance(wanted, dict) else {name: wanted}
    return [f"{key}={was.get(key)!r}, not {wanted.get(key)!r}"
            for key in was | wanted if was.get(key) != wanted.get(key)]


def flat(**parts) -> dict:
    """Collect the state of named modules, optimizers and generators in one dict of tensors,
    "name.key", for `save`."""
    tensors = {}
    for name, part in parts.items():
        for key, value in state_of(part).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def state_of(part) -> dict:
    """{key: tensor} of one module, optimizer ("3.exp_avg" of its parameter 3) or generator."""
    if isinstance(part, torch.Generator):
        return {"state": part.get_state()}
    if not isinstance(part, torch.optim.Optimizer):
        return part.state_dict()
    state = {}
    for i, values in part.state_dict()["state"].items():
        for key, value in values.items():
            state[f"{i}.{key}"] = value
    return state


def unflat(tensors: dict, **parts):
    """Put back, in place, what `flat` collected. Names not asked for are ignored, so that
    unflat(tensors, m=m) loads the weights alone. Fails if something is missing or misshapen."""
    for name, part in parts.items():
        state = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()
                 if key.startswith(f"{name}.")}
        try:
            set_state(part, state)
        except (RuntimeError, KeyError, TypeError, ValueError) as e:
            fail(f"the checkpoint does not fit this run: {name}: {e}")


def set_state(part, state: dict):
    """Give one module, optimizer or generator the state that state_of read."""
    if isinstance(part, torch.Generator):
        part.set_state(state["state"])
    elif isinstance(part, torch.optim.Optimizer):
        set_moments(part, state)
    else:
        for key, tensor in part.state_dict().items():
            check_tensor(key, state.get(key), tensor)
        part.load_state_dict(state)


MOMENTS = {                         # what an optimizer keeps of each parameter
    "Adam": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
}


def set_moments(opt, state: dict):
    """Give an optimizer the moments that state_of read, after checking that they are all there."""
    by_parameter = {}
    for key, value in state.items():
        i, what = key.split(".")
        by_parameter.setdefault(int(i), {})[what] = value
    params = []
    for group in opt.param_groups:
        params += group["params"]
    for i, p in enumerate(params):
        moments = by_parameter.get(i, {})
        for what in MOMENTS.get(type(opt).__name__, ()):
            like = torch.zeros(()) if what == "step" else p
            check_tensor(f"{i}.{what}", moments.get(what), like)
    # param_groups, rates and the like, stay as the script set them
    opt.load_state_dict(opt.state_dict() | {"state": by_parameter})


def check_tensor(name, tensor, like):
    """Raise ValueError unless a tensor has the shape and type of another one, and is finite."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, must be {like.dtype} "
                         f"{list(like.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")


# ------------------------------------------------------------------------------------ source
class Source(typing.NamedTuple):
    """What a piece of Python does."""
    hash: str                       # of its syntax tree
    imports: list                   # names of the modules that it imports


@functools.cache
def read_source(text) -> Source:
    """Parse Python code into what it does.

    What it does not depend on is left out of its hash: comments, line breaks, docstrings, and class
    Config, for a flag's value is kept beside whatever it made. So none of these makes a result out
    of date, and nor does a new flag."""
    tree = ast.parse(textwrap.dedent(text))
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append(node.module or "")
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not is_free(statement)]
    return Source(hashlib.sha256(tree_text(tree).encode()).hexdigest()[:12], imports)


def tree_text(tree) -> str:
    """Write a syntax tree as Python 3.11 does, whichever runs: 3.12 adds a field for the parameters
    of types, 3.13 leaves out what is empty."""
    whole = dict(show_empty=True) if sys.version_info >= (3, 13) else {}
    return ast.dump(tree, **whole).replace(", type_params=[]", "")


def is_free(statement) -> bool:
    """Is a statement a docstring, or class Config?"""
    if isinstance(statement, ast.ClassDef):
        return statement.name == "Config"
    if not isinstance(statement, ast.Expr):
        return False
    return isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


LOOKS_ON = {"evals.py"}             # methods import it, but only to look at what they have trained


def training_code(file) -> dict:
    """By what code is a model trained, if this file trains it? {part of the code: its hash}.

    The parts are the file itself, the files that it imports, and those that these import: the
    method that it is forked from (sae.py for transcoder.py), batches (data.py), the target's
    forward pass (model.py), the losses' gradients (fused.py). Of this file, which most runs touch
    in ways that change no number, what does change numbers: optimizers and random streams. No part
    are evals.py and the packages: metrics and report look at a model when it is trained, and the
    text of tinytales is known by its own hash (data.fingerprint)."""
    numbers = "\n".join(inspect.getsource(part) for part in (optimizers, set_rates, generator))
    code = {"optimizers": read_source(numbers).hash}
    here = Path(__file__).resolve()
    todo = [Path(file).resolve()]
    while todo:
        path = todo.pop()
        if path.name in code or path.name in LOOKS_ON or path == here:
            continue
        source = read_source(path.read_text(encoding="utf-8"))
        code[path.name] = source.hash
        # as Python looks for it: beside the file, then among this repository's
        for name in source.imports:
            places = [path.with_name(f"{name}.py"), here.with_name(f"{name}.py")]
            todo += [place for place in places if place.exists()][:1]
    return code


# ---------------------------------------------------------------------------------------- runs
class Log:
    """log(step=.., loss=..) appends a line of JSON.

    Rows at or past `step`, which a resumed run does again, are dropped, and so are lines that are
    no rows: a kill may have cut one in half."""
    def __init__(self, path, step=0):
        write(path, b"".join(rows_before(path, step)))
        self.file = open(path, "ab", buffering=0)

    def __call__(self, **row):
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
        except OSError as e:
            fail(f"{self.file.name}: cannot write: {e.strerror}")


def rows_before(path, step) -> list:
    """Read the rows of a log that lie before a step, as they are; says how many lines are none."""
    if not step or not os.path.exists(path):
        return []
    kept = []
    damaged = 0
    for line in Path(path).read_bytes().splitlines(True):
        try:
            at = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            at = None
        if type(at) is not int or not line.endswith(b"}\n"):
            damaged += 1
        elif at < step:
            kept.append(line)
    if damaged:
        print(f"{path}: {damaged} damaged lines dropped", file=sys.stderr)
    return kept


def finite(x, step: int, ckpt=None):
    """Stop (exit code 1) if x, a loss or a gradient norm, is NaN or inf. Called before each save,
    that keeps the last checkpoint good."""
    value = torch.as_tensor(x).item()
    if not math.isfinite(value):
        good = ckpt if os.path.exists(str(ckpt)) else None
        fail(f"diverged ({value}) at step {step}; last good checkpoint: {good}", 1)


class Run:
    """One training run of a method: where it begins, what it logs, when it saves. The loop itself
    is the method's:

        run = common.Run(cfg, gpt, data.fingerprint(cfg.data), spd=spd, **opts, gen=gen)
        for step in run.steps():
            ...                                     # one step of training
            if run.is_logged:
                run.record(terms, norm, l0=l0)      # every cfg.log_every steps, before each save

    parts: the modules, optimizers and generators that make up the state of the run. All of them go
    into the checkpoint, cfg.out/METHOD.safetensors, every cfg.save_every steps and at the end.
    METHOD is the name of the script's own file. text: hash of the training data. While it trains,
    no other process may write to cfg.out (`hold`).

    With cfg.resume the run goes on from its checkpoint and ends, on a CPU, bit for bit as if it had
    not been interrupted. One that was killed before its first checkpoint begins anew. It fails
    (exit code 2) where there is no run, or its checkpoint is damaged, or of another method, target,
    data or configuration; only what the script names in MAY_CHANGE_ON_RESUME may differ. A flag
    that is new since then has to be at its default."""
    def __init__(self, cfg, gpt, text, **parts):
        self.cfg = cfg
        self.gpt = gpt
        self.parts = parts
        self.method = Path(inspect.getfile(type(cfg))).stem
        self.path = Path(cfg.out) / f"{self.method}.safetensors"
        self.code = training_code(inspect.getfile(type(cfg)))
        for name in (self.path.name, "log.jsonl", "summary.json", PAGE):
            must_be_file(Path(cfg.out) / name)
        for path in Path(cfg.out).glob("*.safetensors"):
            if path.name != self.path.name:
                fail(f"--out {cfg.out}: holds {path.name}, of which log.jsonl and summary.json "
                     "would be lost: choose another folder")

        # what a resumed run must share with the one that was interrupted
        may_change = sys.modules[type(cfg).__module__].MAY_CHANGE_ON_RESUME
        flags = {name: value for name, value in vars(cfg).items() if name not in may_change}
        self.fixed = dict(method=self.method, target=gpt.hash, text=text, run=flags)

        # where it begins
        self.is_fresh = not (cfg.resume and has_checkpoint(self.path))
        self.first_step = 0
        self.seconds = 0.0
        self.beside = {}            # more modules for the next checkpoint: results, never resumed
        if not self.is_fresh:
            had = read_meta(self.path).get("run") or {}
            wanted = {name: value for name, value in flags.items()
                      if name in had or value != getattr(type(cfg), name, None)}
            tensors, meta = load(self.path, **self.fixed | dict(run=wanted))
            unflat(tensors, **parts)
            self.first_step = steps_done(self.path, meta, cfg.steps)
            self.seconds = meta.get("seconds", 0)
            self.code = meta.get("code", {})        # that it began with, whatever goes on with it

    def steps(self):
        """Yield the number of each step that is left to do; save after those where it is time."""
        cfg = self.cfg
        hold(cfg.out)
        began = time.time() - self.seconds
        self.log = Log(Path(cfg.out) / "log.jsonl", self.first_step)
        left = range(self.first_step, cfg.steps)
        self.bar = tqdm(left, self.method, cfg.steps, initial=self.first_step)
        for self.step in self.bar:
            self.is_last = self.step + 1 == cfg.steps
            self.is_saved = self.is_last or (self.step + 1) % cfg.save_every == 0
            self.is_logged = self.is_saved or self.step % cfg.log_every == 0
            yield self.step
            if self.is_saved:
                self.seconds = time.time() - began
                self.save()

    def save(self):
        """Write the checkpoint: the state after this step. A page of units that are no more
        goes."""
        made = provenance(self.cfg, self.gpt) | dict(code=self.code)
        meta = self.fixed | dict(step=self.step + 1, seconds=self.seconds) | made
        save(self.path, flat(**self.beside, **self.parts), meta)
        self.path.with_name(PAGE).unlink(missing_ok=True)

    def record(self, terms, norm, **more):
        """Log the terms of the loss, the gradient's norm and whatever else is named, all single
        numbers. Stops the run (exit code 1) where the loss or the norm is not finite, before that
        gets into a checkpoint."""
        row = {name: torch.as_tensor(value).item() for name, value in (terms | more).items()}
        finite(row["loss"] + norm.item(), self.step, self.path)
        self.log(step=self.step, **row, norm=norm.item())
        self.bar.set_postfix({name: f"{value:.2g}" for name, value in row.items()})


def has_checkpoint(path) -> bool:
    """Is there a checkpoint to go on from? A run that was killed before its first one has none and
    begins anew. Fails where no run was begun."""
    if path.exists():
        return True
    if not any((path.parent / trace).exists() for trace in ("log.jsonl", ".lock")):
        fail(f"{path}: no such file, nor any trace of a run to --resume")
    print(f"{path}: not there yet: the run begins anew", flush=True)
    return False


def steps_done(path, meta, steps) -> int:
    """How many steps lie behind a checkpoint? Fails unless it says that, and what they took."""
    step = meta.get("step")
    seconds = meta.get("seconds", 0)
    is_count = type(step) is int and 0 <= step <= steps
    if not is_count or type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        fail(f"{path}: damaged: step {step!r} after {seconds!r} seconds, of {steps} steps")
    return step


def provenance(cfg, gpt) -> dict:
    """What does it take to repeat a run? Goes into each checkpoint's meta and each summary.json."""
    file = Path(inspect.getfile(type(cfg))).resolve()
    folder = shlex.quote(str(file.parent))
    # --exclude: no tag's name, but the commit's
    describe = "describe --always --dirty --abbrev=40 --exclude='*'"
    git = f"git -C {folder} {describe} 2>/dev/null"
    commit = subprocess.getoutput(git, encoding="utf-8") or None
    return dict(config=vars(cfg), command=command(cfg), commit=commit,
                source=hashlib.sha256(file.read_bytes()).hexdigest(), target=gpt.hash,
                torch=torch.__version__, threads=torch.get_num_threads(),
                device=str(next(gpt.parameters()).device))
