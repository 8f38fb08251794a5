"""GPT-2's own size, 12 layers of width 768, 50,257 tokens, rows of 1,024, on a CPU: within 12 GiB, and said before if it is not.

    python -m pytest -q -s -m slow tests/test_memory.py         # prints the peak and the seconds of each; half an hour"""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import common
import data
from conftest import T, V
from model import GPT, GPTConfig
from test_common import fails

ROOT = Path(__file__).parent.parent
GIB = 2 ** 30


def test_what_evaluation_takes_is_said_before(target, capsys, monkeypatch):
    gpt, spec = GPT.load(target), str(target / "x.bin")
    assert data.load_for(gpt, spec, T)
    monkeypatch.setattr(common, "memory", lambda device: 32 * 2048 * V - 1)
    fails(capsys, lambda: data.load_for(gpt, spec, T), f"rows of {T} tokens", f"{V} words", "would need", "GiB")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    size = GPTConfig(50257, n_layer=12, n_embd=768, n_head=12, n_inner=3072, n_positions=1024)
    GPT(size, common.generator(0, "init")).save(folder, [f"w{i}" for i in range(50256)] + ["<|endoftext|>"], {})
    np.random.default_rng(0).integers(0, 50257, 300_000).astype(np.uint16).tofile(folder / "tokens.bin")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    "spd.py --C 1024 --B 2 --steps 3 --eval_tokens 2048 --pgd_rows 4", "spd.py --C 1024 --B 2 --T 1024 --steps 2 --eval_tokens 2048",
    "sae.py --steps 3 --eval_tokens 2048", "compare.py --quick --methods sae,neurons --tokens 8192 --eval_tokens 2048"])
def test_gpt2s_own_size_fits(gpt2, tmp_path, line):
    script, *flags = line.split()
    where = ["--runs", str(tmp_path / "runs")] if script == "compare.py" else []
    command = [sys.executable, str(ROOT / script), *flags, "--model", str(gpt2), "--data", str(gpt2 / "tokens.bin"), "--device",
               "cpu", "--out", str(tmp_path / "out"), *where]
    began = time.time()
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = started.stdout.read()
    _, status, used = os.wait4(started.pid, 0)
    peak = used.ru_maxrss * 1024
    print(f"\npython {line}: peak {peak / GIB:.1f} GiB, {time.time() - began:.0f} s")
    assert status == 0, said[-2000:]
    assert peak < 12 * GIB
