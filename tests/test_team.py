"""Several processes share the jobs of one comparison: the same table, and what one leaves undone when it dies."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASKED = ("--methods", "sae,random", "--metrics", "faithfulness,stability", "--seeds", "2", "--eval_tokens", "600",
         "--explained", "10", "--device", "cpu")


@pytest.fixture(scope="module")
def n_layer():
    return 2


def command(target, folder, n_processes, tokens):
    """A comparison on the tiny target, and the environment of it."""
    alone = [sys.executable, "-u"]
    shared = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n_processes}", "--standalone"]
    line = [*(shared if n_processes > 1 else alone), str(ROOT / "compare.py"), *ASKED, "--tokens", str(tokens),
            "--model", str(target), "--data", str(target / "x.bin"), "--runs", str(folder / "runs"),
            "--out", str(folder / "out")]
    return line, os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


def table(folder):
    """What was found, but for when and in how many seconds."""
    found = json.loads((folder / "out" / "results.json").read_text())
    for row in found["rows"]:
        row["metrics"].pop("seconds", None)
    return {key: value for key, value in found.items() if key != "provenance"}


def run(target, folder, n_processes, tokens=4096):
    line, env = command(target, folder, n_processes, tokens)
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_two_processes_find_what_one_does(target, tmp_path):
    run(target, tmp_path / "one", 1)
    shown = run(target, tmp_path / "two", 2)
    assert table(tmp_path / "one") == table(tmp_path / "two")
    jobs = re.findall(r"\[\d+/\d+(?=\])", shown)             # lines of two processes can run into each other
    n = int(jobs[0].split("/")[1])
    assert sorted(jobs) == sorted(f"[{i + 1}/{n}" for i in range(n))        # each once, whoever did it
    assert shown.count("results.json") == 1


@pytest.mark.slow
def test_the_next_start_does_what_a_dead_process_left(target, tmp_path):
    """One of two is killed in the middle of a training; torchrun ends the other; then both begin again."""
    run(target, tmp_path / "whole", 1, 400_000)
    line, env = command(target, tmp_path / "killed", 2, 400_000)
    with open(tmp_path / "log.txt", "w") as log:
        started = subprocess.Popen(line, stdout=log, stderr=log, env=env)
        made = tmp_path / "killed" / "runs"
        deadline = time.time() + 120
        while not list(made.glob("*/log.jsonl")):
            assert started.poll() is None and time.time() < deadline, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(0.05)
        workers = subprocess.check_output(["pgrep", "-P", str(started.pid)], text=True).split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert started.wait(60) != 0
    assert not (tmp_path / "killed" / "out" / "results.json").exists()
    run(target, tmp_path / "killed", 2, 400_000)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
