"""What goes wrong around a run: flags, sizes, damaged files, kills, full disks. One line and exit 2, or a right result."""
import ast
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors import torch as safetensors

import common
import pretrain
import sae
from model import GPT
from test_common import fails, holder

ROOT = Path(__file__).parent.parent
T = 12
METHODS = ("spd", "sae", "transcoder", "clt", "molt", "stochastic")
OTHERS = ("pretrain", "compare", "data", "model", "baselines", "studies.bench", "studies.tune", "studies.length",
          "report.gallery")
SIZES = dict(spd=dict(C=10, B=3, ci_hidden=8), molt=dict(groups="3@2"))


def config(name):
    return importlib.import_module(name).Config


def small(name, target, out, **change):
    """A run of a method that takes a fraction of a second."""
    sizes = SIZES.get(name, dict(F=24, k=3)) | ({} if name == "spd" else dict(N=24))
    how = dict(model=str(target), data=str(target / "x.bin"), out=str(out), device="cpu", T=T, steps=4, save_every=2,
               log_every=1, eval_tokens=5 * T)
    return config(name)(**(sizes | how | change))


def numeric(name):
    return [f for f in dataclasses.fields(config(name)) if f.type in (int, float)]


def text_of(path):
    return path.read_bytes() if path.is_file() else None


@pytest.fixture(scope="module")
def trained(target, tmp_path_factory):
    """A finished SAE."""
    cfg = small("sae", target, tmp_path_factory.mktemp("trained") / "run")
    sae.train(cfg)
    return cfg


@pytest.fixture
def whole(trained, tmp_path, capsys):
    """A copy of it that a test may damage."""
    capsys.readouterr()
    shutil.copytree(trained.out, tmp_path / "run")
    return dataclasses.replace(trained, out=str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("name", METHODS + OTHERS)
def test_no_number_outside_its_range_is_taken(name, capsys):
    """-1, 0, too much, what is no number, as they are typed and in a Config made by hand."""
    tried = 0
    for f in numeric(name):
        interval = common.RANGE.match(common.comments(config(name))[f.name])[0]
        for word in ("-1", "0", "-0.0", "1e300", str(10**30), "-1e-9", "nan", "inf", "-inf", "1e400", "0x10", "x", ""):
            try:
                value = f.type(float(word))
            except (ValueError, OverflowError):
                value = None
            is_whole = f.type is float or (value is not None and value == float(word))
            if value is not None and is_whole and common.is_in(value, interval):
                continue
            fails(capsys, lambda: common.cli(config(name), [f"--{f.name}={word}"]), f"--{f.name}")
            if value is not None:
                fails(capsys, lambda: common.check(config(name)(**{f.name: value if is_whole else float(word)})), f.name)
            tried += 1
    assert tried >= 5 * len(numeric(name))


@pytest.mark.parametrize("module, flag, value", [
    ("spd", "clip_vu", -1), ("sae", "clip", 0), ("spd", "c_imp", -1), ("spd", "c_faith", -1), ("molt", "alpha", -5),
    ("spd", "lr_end", 50), ("stochastic", "tau", 2), ("sae", "beta", 2), ("spd", "freq_a", -1), ("sae", "enc", -1),
    ("sae", "dead", -1), ("pretrain", "warmup", -5), ("spd", "steps", 10**30), ("spd", "eval_tokens", 10**30),
    ("pretrain", "n_layer", 10_000_000), ("sae", "F", 10**30), ("pretrain", "n_embd", 1_000_000)])
def test_known_bad_numbers(module, flag, value, capsys):
    fails(capsys, lambda: common.cli(config(module), [f"--{flag}", str(value)]), f"--{flag} {value}", "must be in")


def test_numbers_are_read_as_they_are_typed():
    def steps(word):
        return common.cli(sae.Config, ["--steps", word]).steps
    assert [steps(word) for word in ("1000", "1e3", "1_000", "1000.0", "+1000")] == [1000] * 5
    assert common.cli(sae.Config, ["--lr", "1"]).lr == 1.0


def test_what_makes_no_sense_is_refused(capsys, tmp_path, target):
    def refused(name, argv, *words):
        fails(capsys, lambda: common.cli(config(name), argv), *words)
    for name in METHODS:
        refused(name, ["--out", ""], "--out ''")
        refused(name, ["--model= "], "--model ' '")
    refused("compare", ["--runs="], "--runs")
    refused("sae", ["--theta", ".2"], "--theta", "--variant jumprelu")             # ignored by topk
    refused("sae", ["--variant", "relu", "--beta", ".5"], "--beta", "--variant batchtopk")
    refused("spd", ["--p_end", "1"], "--p_end", "--penalty lp")
    refused("molt", ["--beta", "1"], "--beta", "--sum_to_weights")
    assert common.cli(sae.Config, ["--variant", "jumprelu", "--theta", ".2"]).theta == .2
    for name in ("cpu:99", "cpu:0", "cpu:-1", "", "cuda:-1", "cuda:99999999999999", "cpu cuda", "xla", "vulkan"):
        fails(capsys, lambda: common.device(name), f"--device {name}")
    for name, change in (("spd", dict(C=4.0)), ("sae", dict(F="24")), ("sae", dict(frozen=1)), ("sae", dict(k=True)),
                         ("sae", dict(variant="l1")), ("sae", dict(seed=None))):
        field, = change
        run = importlib.import_module(name)
        fails(capsys, lambda: run.train(small(name, target, tmp_path / "run", **change)), f"--{field}")
    assert not (tmp_path / "run").exists()


FORK = '''
import dataclasses, common, sae
@dataclasses.dataclass
class Config(sae.Config):
    mine: float = 0.5       # [0, 1] a share
    free: float = 0.5       # anything
'''


def test_a_fork_and_a_subclass_have_ranges_without_registering_anything(tmp_path, capsys, monkeypatch):
    (tmp_path / "forked.py").write_text(FORK, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    Config = importlib.import_module("forked").Config
    assert common.cli(Config, ["--mine", "1", "--free=-7", "--k", "3"]).free == -7
    fails(capsys, lambda: common.cli(Config, ["--mine", "1.1"]), "--mine 1.1", "[0, 1]")
    fails(capsys, lambda: common.cli(Config, ["--clip", "0"]), "--clip 0")
    fails(capsys, lambda: common.cli(Config, ["--free", "nan"]), "--free nan", "finite")


# ------------------------------------------------------------------------------------------------------------- kills
@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_before_its_first_checkpoint_begins_anew(name, target, tmp_path, capsys, monkeypatch):
    run = importlib.import_module(name)
    cfg = small(name, target, tmp_path / "run")
    fails(capsys, lambda: run.train(dataclasses.replace(cfg, resume=True)), "no such file", "--resume")
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(common, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train(cfg)
    capsys.readouterr()
    run.train(dataclasses.replace(cfg, resume=True))
    assert "begins anew" in capsys.readouterr().out
    run.train(small(name, target, tmp_path / "other"))
    a, b = (common.load(tmp_path / folder / f"{name}.safetensors")[0] for folder in ("run", "other"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_target_killed_before_its_first_checkpoint_begins_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("the cat sat on a mat . " * 500, encoding="utf-8")
    cfg = pretrain.Config(data="x.txt", out="m", n_layer=1, n_embd=8, n_head=2, n_inner=16, T=T, B=3, steps=4, every=2,
                          warmup=1, device="cpu")
    fails(capsys, lambda: pretrain.train(dataclasses.replace(cfg, resume=True)), "no such file", "--resume")
    assert os.listdir() == ["x.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain.train(cfg)
    again = pretrain.train(dataclasses.replace(cfg, resume=True))
    assert "begins anew" in capsys.readouterr().out
    other = pretrain.train(dataclasses.replace(cfg, out="n"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters()))
    path = Path("runs/pretrain-m/checkpoint.safetensors")
    rewritten(path, lambda tensors, meta: meta | dict(step=-1))
    fails(capsys, lambda: pretrain.train(dataclasses.replace(cfg, resume=True)), path, "step -1")
    Path("n/config.json").unlink()
    Path("n/config.json").mkdir()
    fails(capsys, lambda: pretrain.train(dataclasses.replace(cfg, out="n")), "n/config.json", "not a file")


def test_a_sweep_that_never_was_is_not_resumed(target, tmp_path, capsys):
    cfg = small("sae", target, tmp_path / "run", F=32, k=4, sweep=True, resume=True)
    fails(capsys, lambda: sae.main(cfg), "--resume", "--sweep")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- files
def resumed(cfg):
    return sae.train(dataclasses.replace(cfg, resume=True))


def rewritten(path, change):
    """Change a checkpoint's tensors and meta, and write it with a checksum that fits."""
    tensors, meta = common.load(path)
    meta = change(tensors, meta)
    common.save(path, tensors, meta) if isinstance(meta, dict) else path.write_bytes(
        safetensors.save(tensors, {"meta": meta if isinstance(meta, str) else json.dumps(meta)}))


METAS = {
    "list": lambda meta: [meta], "number": lambda meta: 7, "null": lambda meta: None, "text": lambda meta: "{",
    "nested": lambda meta: "[" * 100_000, "no step": lambda meta: {k: v for k, v in meta.items() if k != "step"},
    "negative": lambda meta: meta | dict(step=-1), "words": lambda meta: meta | dict(step="4"),
    "float": lambda meta: meta | dict(step=2.0), "bool": lambda meta: meta | dict(step=True),
    "too far": lambda meta: meta | dict(step=10**12), "no time": lambda meta: meta | dict(seconds="x"),
    "nan time": lambda meta: meta | dict(seconds=float("nan")), "run": lambda meta: meta | dict(run=[1]),
    "no run": lambda meta: meta | dict(run=None), "method": lambda meta: meta | dict(method=["sae"])}


@pytest.mark.parametrize("kind", METAS)
def test_a_meta_that_says_nonsense_is_refused(kind, whole, capsys):
    path = Path(whole.out) / "sae.safetensors"
    rewritten(path, lambda tensors, meta: METAS[kind](meta))
    before = {p.name: text_of(p) for p in path.parent.iterdir()}
    fails(capsys, lambda: resumed(whole), path)
    assert {p.name: text_of(p) for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("config", [None, [1], "x", {}, dict(F="x"), dict(zzz=1), dict(F=-1), dict(lr=None), dict(k=10**30)])
def test_a_configuration_that_says_nonsense_is_refused(config, whole, capsys):
    path = Path(whole.out) / "sae.safetensors"
    gpt = GPT.load(whole.model)
    rewritten(path, lambda tensors, meta: meta | dict(config=config))
    fails(capsys, lambda: sae.load(path, gpt))


TENSORS = {
    "no moment": ("opt.0.exp_avg", None), "no step": ("opt.1.step", None), "no weight": ("m.W_enc", None),
    "moment": ("opt.0.exp_avg_sq", torch.zeros(3)), "moment type": ("opt.0.exp_avg", torch.zeros(24, 8, dtype=torch.int8)),
    "NaN": ("m.W_dec", torch.full((24, 8), torch.nan)), "inf": ("opt.0.exp_avg", torch.full((24, 8), torch.inf)),
    "int8": ("m.W_dec", torch.zeros(24, 8, dtype=torch.int8)), "double": ("m.W_enc", torch.zeros(24, 8).double()),
    "step": ("opt.0.step", torch.ones(2)), "transposed": ("m.W_enc", torch.zeros(8, 24))}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_are_refused(kind, whole, capsys):
    name, tensor = TENSORS[kind]
    def change(tensors, meta):
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
        return meta
    rewritten(Path(whole.out) / "sae.safetensors", change)
    fails(capsys, lambda: resumed(whole), name.partition(".")[2], "does not fit")


def test_a_generator_that_does_not_fit_is_refused(capsys):
    state = common.generator(0, "x").get_state()
    for wrong in (state.float(), state[:-1], state.to(torch.int64), torch.zeros(0, dtype=torch.uint8)):
        fails(capsys, lambda: common.unflat({"gen.state": wrong}, gen=common.generator(0, "y")), "gen")


def test_each_flipped_bit_is_seen(whole, capsys):
    """In tensors and in what is known about them."""
    path = Path(whole.out) / "sae.safetensors"
    good, gen, gpt = path.read_bytes(), random.Random(0), GPT.load(whole.model)
    for i in range(60):
        bad = bytearray(good)
        bad[gen.randrange(len(bad))] ^= 1 << gen.randrange(8)
        path.write_bytes(bad)
        fails(capsys, lambda: sae.load(path, gpt) if i % 2 else resumed(whole))
    path.write_bytes(good)
    resumed(whole)


def test_a_checkpoint_of_before_there_were_checksums_loads(whole):
    path = Path(whole.out) / "sae.safetensors"
    tensors, meta = common.load(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}        # no longer in the file that is overwritten
    path.write_bytes(safetensors.save(tensors, {"meta": json.dumps(meta)}))
    with safe_open(path, "pt") as file:
        assert "checksum" not in common.meta_of(file)
    resumed(whole)
    again = common.load(path)[0]
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("line", [b"\xff\xfe\x00\n", b"[1, 2]\n", b'{"step": 1, "lo\n', b'{"loss": 1}\n', b"7\n", b"\n",
                                  b'{"step": "1"}\n', b"[" * 100_000 + b"\n", b'{"step": null}\n', b"\x00" * 99 + b"\n"])
def test_a_damaged_line_of_a_log_is_dropped(line, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    rows = [json.dumps(dict(step=step)).encode() + b"\n" for step in range(4)]
    path.write_bytes(b"".join([*rows[:2], line, *rows[2:]]))
    common.Log(path, 3)(step=3)
    assert path.read_bytes() == b"".join(rows)
    err = capsys.readouterr().err
    assert "1 damaged line" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["sae.safetensors", "log.jsonl", "summary.json"])
def test_something_else_in_the_place_of_a_file_is_found_before_training(name, target, tmp_path, capsys, monkeypatch):
    cfg = small("sae", target, tmp_path / "run")
    monkeypatch.setattr(sae, "loss_fn", lambda *_: 1 / 0)                 # is not reached
    for make in (Path.mkdir, os.mkfifo):
        (tmp_path / "run").mkdir(exist_ok=True)
        make(tmp_path / "run" / name)
        for resume in (False, True):
            fails(capsys, lambda: sae.train(dataclasses.replace(cfg, resume=resume)), name, "not a file")
        assert os.listdir(tmp_path / "run") == [name]
        (tmp_path / "run" / name).rmdir() if make is Path.mkdir else (tmp_path / "run" / name).unlink()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(whole, tmp_path, capsys):
    log = common.Log(tmp_path / "log.jsonl")
    log.file = open("/dev/full", "ab", buffering=0)
    fails(capsys, lambda: log(step=1), "/dev/full: cannot write: No space left on device")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(target, tmp_path, capsys, monkeypatch):
    """One line of its own, below the progress bar; the checkpoint before is as it was."""
    path = tmp_path / "run" / "sae.safetensors"
    save, limits = common.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    def save_on_a_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if path.exists() else limits[0], limits[1]))
        save(*args)
    monkeypatch.setattr(common, "save", save_on_a_full_disk)
    try:
        with pytest.raises(SystemExit) as end:
            sae.train(small("sae", target, tmp_path / "run", F=200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = capsys.readouterr().err.split("\n")
    assert end.value.code == 2 and lines[-2:] == [f"error: {path}: cannot write: File too large", ""]
    assert common.load(path)[1]["step"] == 2
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "log.jsonl", "sae.safetensors"]


def test_two_runs_with_one_out(target, tmp_path, capsys):
    """The second is refused, and nothing of the first is touched."""
    fork = multiprocessing.get_context("fork")
    held, may_end = fork.Semaphore(0), fork.Semaphore(0)
    first = fork.Process(target=holder, args=(tmp_path / "run", held, may_end))
    first.start()
    held.acquire()
    fails(capsys, lambda: sae.train(small("sae", target, tmp_path / "run")), f"process {first.pid} on", "--out")
    assert os.listdir(tmp_path / "run") == [".lock"]
    may_end.release()
    first.join()
    sae.train(small("sae", target, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("name, change, words", [
    ("spd", dict(C=10**7), "--C 10000000"), ("spd", dict(ci_hidden=10**6), "--ci_hidden 1000000"),
    ("spd", dict(B=10**6, C=4096), "--B 1000000"), ("spd", dict(C=10**6, ci_fn="vector", ci_hidden=4096), "--C"),
    ("sae", dict(F=10**7, k=3, variant="relu", N=5000), "--F 10000000"), ("transcoder", dict(F=10**7, N=5000, variant="jumprelu"), "--F"),
    ("clt", dict(F=10**7, N=5000), "--F"), ("stochastic", dict(F=10**7, N=5000), "--F"),
    ("molt", dict(groups="99999999999@2"), "--groups"), ("molt", dict(groups="1@1,99999999999999999999999@8"), "--groups")])
def test_what_no_machine_holds_is_refused_before_anything_is_made(name, change, words, target, tmp_path, capsys):
    run = importlib.import_module(name)
    fails(capsys, lambda: run.train(small(name, target, tmp_path / "run", **change)), words, "would need", "GiB, there are")
    assert not (tmp_path / "run").exists()


def test_a_target_that_no_machine_holds_is_refused(capsys):
    for change in (dict(n_embd=10**5, n_layer=1000), dict(n_inner=10**6, n_embd=65536), dict(B=10**6), dict(T=10**6)):
        fails(capsys, lambda: pretrain.build(pretrain.Config(**change), 1000), "would need", "GiB")


def test_memory_is_the_least_of_all_limits(monkeypatch, capsys):
    there = common.memory(torch.device("cpu"))
    assert 2**28 < there <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**30, -1))
    assert common.memory(torch.device("cpu")) == 2**30
    common.need(2**30, "--C 3")
    fails(capsys, lambda: common.need(3 * 2**30, "--C 3"), "--C 3: would need 3.0 GiB, there are 1.0 GiB")
    fails(capsys, lambda: common.need(10**40, "--C 3"), "would need")


# ----------------------------------------------------------------------------------------------------------- locales
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp932"])
def test_output_that_cannot_be_encoded_falls_back(encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    common.cli(sae.Config, ["--out", "\u0141\udcff"])
    for stream in (sys.stdout, sys.stderr):
        print("\u2192 \U0001f600 ok", file=stream, flush=True)
        assert stream.buffer.getvalue().endswith(b" ok\n")


def test_every_read_and_write_says_utf_8():
    """No text is read, written or decoded as the locale would have it."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[mrst]*/*.py")]:
        if path.parent.name in ("tests", "runs", "results", "target"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                said = ast.unparse(node)
                owner, _, name = ast.unparse(node.func).rpartition(".")
                is_text = owner not in ("", "data") and name in ("read_text", "write_text", "getoutput") or "text=True" in said
                is_text |= ast.unparse(node.func) == "open" and '"b' not in said and not any(
                    mode in said for mode in ("'rb'", "'wb'", "'xb'", "'ab'", "'r+b'"))
                assert not is_text or "utf-8" in said, f"{path.name}:{node.lineno}: {said}"


# ---------------------------------------------------------------------------------------------- how a script ends
ENDS = """
import dataclasses, time
import common
@dataclasses.dataclass
class Config:
    a: int = 1
common.cli(Config, [])
print("ready", flush=True)
%s
"""


def ends(tmp_path, code, out=subprocess.PIPE, then=lambda process: None):
    """(exit code, stderr) of a script that runs some code once its command line is read."""
    (tmp_path / "script.py").write_text(ENDS % code, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stdout=out, stderr=subprocess.PIPE,
                               env=os.environ | dict(PYTHONPATH=str(ROOT)),
                               # a shell's background jobs ignore Ctrl-C, and so would what they start
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    then(process)
    return process.wait(60), process.stderr.read().decode()


def test_ctrl_c_is_one_line(tmp_path):
    def interrupt(process):
        while process.stdout.readline() != b"ready\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
    code, err = ends(tmp_path, "time.sleep(60)", then=interrupt)
    assert code == 130 and err.startswith("error: interrupted") and "--resume" in err and err.count("\n") == 1


def test_what_reads_the_output_may_leave(tmp_path):
    def leave(process):
        process.stdout.readline()
        process.stdout.close()
    assert ends(tmp_path, "time.sleep(1); print('x' * 99)", then=leave) == (1, "")


@pytest.mark.parametrize("code, words", [
    ("", "output: No space left on device"), ("bytearray(1 << 60)", "out of memory"), ("common.torch.zeros(1 << 50)", "out of memory"),
    ("open('/nowhere/x')", "/nowhere/x: No such file or directory")])
def test_what_is_no_fault_of_the_code_is_one_line(tmp_path, code, words):
    with open("/dev/null" if code else "/dev/full", "w") as out:
        end, err = ends(tmp_path, code, out)
    assert end == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_a_fault_of_the_code_has_its_traceback(tmp_path):
    code, err = ends(tmp_path, "1 / 0")
    assert code == 1 and "Traceback" in err and err.endswith("ZeroDivisionError: division by zero\n")


def test_a_folder_in_which_another_method_lives_is_left_alone(whole, capsys):
    """Neither begun in nor resumed in: log.jsonl and summary.json are the other's."""
    before = {p.name: text_of(p) for p in Path(whole.out).iterdir()}
    for resume in (False, True):
        cfg = small("spd", Path(whole.model), whole.out, resume=resume)
        fails(capsys, lambda: importlib.import_module("spd").train(cfg), "--out", "holds sae.safetensors", "another folder")
    assert {p.name: text_of(p) for p in Path(whole.out).iterdir()} == before
