"""Command line, checkpoints, log and random streams of common.py."""
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import common

ROOT = Path(__file__).parent.parent

@dataclass
class Config:
    C: int = 256                            # number of components, 100% of them
    lr: float = 1e-3                        # peak learning rate
    penalty: Literal["lp", "l0"] = "lp"     # which penalty
    out: str = "runs/a b"                   # folder
    resume: bool = False                    # go on

def fails(capsys, f, *words, code=2):
    """f() must end in one line on stderr with every word in it, and nothing else there."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        f()
    err = capsys.readouterr().err
    assert e.value.code == code
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, (word, err)

def test_cli_parses_and_prints_the_full_command(capsys):
    cfg = common.cli(Config, ["--C", "3", "--resume", "--penalty", "l0"])
    assert cfg == Config(C=3, resume=True, penalty="l0")
    line = capsys.readouterr().out
    assert line == "$ python test_common.py --C 3 --lr 0.001 --penalty l0 --out 'runs/a b' --resume\n"
    assert common.cli(Config, ["--no-resume", "--C=3"]) == Config(C=3)

def test_printed_command_gives_the_same_config(capsys):
    import shlex
    cfg = common.cli(Config, ["--lr", "3e-5", "--out", "it's"])
    assert common.cli(Config, shlex.split(common.command(cfg))[2:]) == cfg

@pytest.mark.parametrize("argv, words", [
    (["--zzz", "1"], ["--zzz", "--help"]),                      # unknown
    (["--pen", "l0"], ["--pen"]),                               # abbreviated
    (["--C", "x"], ["--C", "int", "'x'"]),                      # wrong type
    (["--C", "1.5"], ["--C", "int", "'1.5'"]),
    (["--penalty", "l2"], ["--penalty", "'l2'", "lp", "l0"]),   # wrong choice, and what is allowed
    (["--lr", "nan"], ["--lr", "nan", "finite"]),
    (["--lr=-inf"], ["--lr", "-inf", "finite"]),
    (["--resume=1"], ["--resume", "'1'"]),
    (["--C"], ["--C", "argument"]),
    (["stray"], ["stray"]),
])
def test_cli_errors_are_one_line(capsys, argv, words):
    fails(capsys, lambda: common.cli(Config, argv), *words)

def test_help_shows_comments_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as e:
        common.cli(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    assert "number of components, 100% of them (default: 256)" in text and "{lp,l0}" in text and "--no-resume" in text
    assert "Command line, checkpoints, log and random streams" in text

def test_device_never_falls_back(capsys):
    assert common.device("cpu") == torch.device("cpu")
    assert common.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu7", "meta", *([] if torch.cuda.is_available() else ["cuda"])):
        fails(capsys, lambda: common.device(name), "--device", name, "auto, cpu, cuda")

def test_fast_matmul_is_exact_or_off():
    exact = common.fast_matmul()
    a_MK, b_KN = (torch.randn(300, 300, generator=common.generator(0, name)) for name in "ab")
    want = a_MK.double() @ b_KN.double()
    assert ((a_MK @ b_KN).double() - want).norm() < 1e-6 * want.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if exact else "none")

def test_generators_are_reproducible_and_independent():
    def draw(*a):
        return torch.rand(1000, generator=common.generator(*a))
    assert torch.equal(draw(0, "masks"), draw(0, "masks"))
    for other in (draw(1, "masks"), draw(0, "batches"), draw(0, "masks2")):
        assert (draw(0, "masks") == other).float().mean() < 0.01
    state = torch.get_rng_state()
    draw(0, "masks")
    assert torch.equal(state, torch.get_rng_state())

def test_save_and_load(tmp_path):
    x_23 = torch.arange(6.).view(2, 3)
    tensors = {"x": x_23, "view": x_23[:, 1:], "tied": x_23, "n": torch.tensor(3), "b": torch.ones(2).byte()}
    meta = dict(method="spd", step=7, config=dict(C=4, betas=(0.9, 0.99), out="ü"))
    common.save(tmp_path / "new" / "c.safetensors", tensors, meta)
    got, got_meta = common.load(tmp_path / "new" / "c.safetensors", method="spd", config=meta["config"])
    assert got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in tensors)
    assert got_meta == json.loads(json.dumps(meta))
    first = (tmp_path / "new" / "c.safetensors").read_bytes()
    common.save(tmp_path / "new" / "c.safetensors", tensors, meta)
    assert (tmp_path / "new" / "c.safetensors").read_bytes() == first
    assert os.listdir(tmp_path / "new") == ["c.safetensors"]

def test_load_refuses_bad_files(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    fails(capsys, lambda: common.load(path), path, "no such file")
    fails(capsys, lambda: common.load(tmp_path), tmp_path, "not a file")
    common.save(path, {"x": torch.ones(100)}, dict(method="spd", config=dict(C=4, k=2)))
    good = path.read_bytes()
    for bad in (b"", good[:5], good[:60], good[:-1], b"x" * 500, good + b"x"):
        path.write_bytes(bad)
        fails(capsys, lambda: common.load(path), path, "truncated or not a safetensors file")
    path.write_bytes(good)
    fails(capsys, lambda: common.load(path, method="sae"), path, "method='spd'", "'sae'")
    fails(capsys, lambda: common.load(path, target="abc"), "another target than --model names")
    fails(capsys, lambda: common.load(path, config=dict(C=8, k=2)), "C=4, not 8")
    fails(capsys, lambda: common.load(path, config=dict(C=4, k=2, new=1)), "new=None, not 1")

def test_write_is_all_or_nothing(tmp_path, capsys, monkeypatch):
    path = tmp_path / "f"
    common.write(path, b"old")
    def die(*_):
        raise KeyboardInterrupt                     # a kill between the temporary file and the rename
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        common.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    def full(*_):
        raise OSError(28, "No space left on device")
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, full)
        fails(capsys, lambda: common.write(path, b"new"), path, "cannot write: No space left on device")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    monkeypatch.undo()
    common.write(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]
    fails(capsys, lambda: common.write(path / "below a file", b""), "cannot write")

def test_two_writers_of_one_path_do_not_mix(tmp_path, monkeypatch):
    """While one has written its data but not yet taken the place of the file, another one begins and ends."""
    path = tmp_path / "f"
    fsync = os.fsync
    seen = []
    def other_comes_between(fd):
        fsync(fd)
        seen.append({p.name for p in tmp_path.iterdir()})
        if len(seen) == 1:
            common.write(path, b"other")
            assert path.read_bytes() == b"other"
    monkeypatch.setattr(os, "fsync", other_comes_between)
    common.write(path, b"first, which ends last")
    assert len(seen[0]) == 1 and len(seen[1]) == 2 and seen[0] < seen[1] and path.name not in seen[1]
    assert path.read_bytes() == b"first, which ends last" and os.listdir(tmp_path) == ["f"]

def run(steps, start=0, tensors=None):
    """A toy training run with dropout-like noise; returns its parts after `steps` updates."""
    m = nn.Linear(3, 2)
    for p in m.parameters():
        nn.init.normal_(p, generator=common.generator(0, "init"))
    noise = common.generator(0, "noise")
    parts = dict(m=m, opt=torch.optim.AdamW(m.parameters(), lr=0.1, fused=True), noise=noise)
    if tensors is not None:
        common.unflat(tensors, **parts)
    for step in range(start, steps):
        x_53 = torch.rand(5, 3, generator=common.generator(step, "x"))
        loss = (m(x_53) + torch.rand(5, 2, generator=noise)).square().sum()
        parts["opt"].zero_grad()
        loss.backward()
        parts["opt"].step()
    return parts

def test_resumed_run_is_bit_identical(tmp_path, capsys):
    whole = common.flat(**run(9))
    common.save(tmp_path / "c", common.flat(**run(4)), {})
    tensors, _ = common.load(tmp_path / "c")
    again = common.flat(**run(9, 4, tensors))
    assert whole.keys() == again.keys() and {"m.weight", "opt.0.exp_avg", "noise.state"} < whole.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    other_noise = tensors | common.flat(noise=common.generator(0, "noise"))
    other_moment = {k: v + 1 if k == "opt.0.exp_avg" else v for k, v in tensors.items()}
    for wrong in (other_moment, other_noise):       # each part matters
        assert not torch.equal(run(9, 4, wrong)["m"].weight, whole["m.weight"])
    fails(capsys, lambda: common.unflat(tensors, m=nn.Linear(4, 2)), "does not fit", "m:")
    fails(capsys, lambda: common.unflat({}, noise=common.generator(0, "x")), "does not fit", "noise")

def test_log_drops_what_a_resumed_run_redoes(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = common.Log(path)
    for step in range(5):
        log(step=step, loss=step / 2)
    with open(path, "a") as f:
        f.write('{"step": 1, "lo')                  # the kill came in the middle of a row
    common.Log(path, 3)(step=3, loss=9.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [dict(step=s, loss=s / 2) for s in range(3)] + [dict(step=3, loss=9.0)]
    common.Log(path)
    assert path.read_text() == ""                   # a new run begins a new log

def test_divergence_stops_the_run(tmp_path, capsys):
    common.finite(torch.tensor(1.0, requires_grad=True), 3)
    (tmp_path / "c").touch()
    for bad in (float("nan"), torch.tensor(float("inf"), requires_grad=True)):
        fails(capsys, lambda: common.finite(bad, 17, tmp_path / "c"), "step 17", tmp_path / "c", code=1)
    fails(capsys, lambda: common.finite(float("nan"), 17, tmp_path / "none"), "None", code=1)

def test_provenance(tmp_path):
    gpt = nn.Linear(2, 2)
    gpt.hash = "0123456789abcdef"
    p = common.provenance(Config(C=9), gpt)
    assert p["config"]["C"] == 9 and "--C 9" in p["command"] and p["target"] == gpt.hash and p["device"] == "cpu"
    assert p["torch"] == torch.__version__ and p["threads"] == torch.get_num_threads()
    import hashlib
    assert p["source"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (p["commit"] or "").removesuffix("-dirty") == head
    json.dumps(p)

SCRIPT = """
from dataclasses import dataclass
import common, torch
@dataclass
class Config:
    a: int = 1
gpt = torch.nn.Linear(1, 1)
gpt.hash = None
print(common.provenance(Config(), gpt)["commit"])
"""

def test_provenance_without_git(tmp_path):
    for name in ("common.py", "fused.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "s.py").write_text(SCRIPT)
    for path in (os.environ["PATH"], "/nonexistent"):           # no repository; no git
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PATH": path}
        out = subprocess.run([sys.executable, "s.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert out.stdout == "None\n" and out.stderr == "", out


@pytest.mark.parametrize("word", ["--bw", "--bw=0.5"])
@pytest.mark.parametrize("module", ["clt", "molt"])
def test_a_flag_by_its_old_name_is_refused_in_one_line_that_says_the_new_one(capsys, module, word):
    config = importlib.import_module(module).Config
    fails(capsys, lambda: common.cli(config, [word, "0.5"][:1 + ("=" not in word)]), "--bw", "--bandwidth")



def holder(folder, held, may_end):
    common.hold(folder)
    held.release()
    may_end.acquire()

def test_a_folder_is_held_by_one_process_until_that_dies(tmp_path, capsys):
    """Taken anew after a kill, as a file that was left behind is; and of many that come at once, one gets it."""
    fork = multiprocessing.get_context("fork")
    held, may_end = fork.Semaphore(0), fork.Semaphore(0)
    def start():
        process = fork.Process(target=holder, args=(tmp_path, held, may_end))
        process.start()
        return process
    (tmp_path / ".lock").write_text(f"{os.getppid()} on elsewhere\n")       # left behind: it locks nothing
    first = start()
    held.acquire()
    fails(capsys, lambda: common.hold(tmp_path), tmp_path, f"process {first.pid} on ", "--out")
    first.kill()
    first.join()
    rivals = [start() for _ in range(6)]
    held.acquire()
    while sum(rival.is_alive() for rival in rivals) > 1:
        time.sleep(.01)
    may_end.release()
    for rival in rivals:
        rival.join()
    assert sorted(rival.exitcode for rival in rivals) == [0, 2, 2, 2, 2, 2]
    common.hold(tmp_path)
    common.hold(tmp_path)                                                   # its own is no obstacle
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    common.HELD.pop(tmp_path / ".lock").close()
    (tmp_path / "file").touch()
    fails(capsys, lambda: common.hold(tmp_path / "file"), "file", "cannot write")
