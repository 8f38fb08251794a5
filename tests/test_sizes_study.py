"""studies/sizes.py: what it trains, how it tunes, that it finds nothing twice, and its arithmetic."""
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import compare
import molt
import spd
import transcoder
from studies import sizes
from studies.sizes import Cell, Config, Setting, Task
from test_common import fails

SMALL = {"transcoder": dict(N=60, steps=1), "spd": dict(B=2, ci_hidden=8), "molt": dict(groups="8@1,4@2", N=60)}


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    for name, change in SMALL.items():
        monkeypatch.setitem(compare.METHODS, name, compare.METHODS[name]._replace(change=change))
    monkeypatch.setattr(sizes, "MOLT_SIZE", 16)
    monkeypatch.setattr(sizes, "TRIALS", 2)
    return Config(model=str(target), data=str(target / "x.bin"), device="cpu", methods="transcoder", sizes="24,16", twice="16",
                  l0=4, seeds=2, tokens=240, eval_tokens=600, out=str(tmp_path / "results"), runs=str(tmp_path / "runs"))


def read(cfg):
    return json.loads((Path(cfg.out) / "sizes.json").read_text())


def test_all_of_it_and_a_second_run_finds_all(cfg, capsys, monkeypatch):
    cfg = dataclasses.replace(cfg, methods="transcoder,molt", sizes="16,24,32")
    sizes.main(cfg)
    found, out = read(cfg), capsys.readouterr().out
    assert "canonicity - floor" in out and (Path(cfg.out) / "sizes.png").stat().st_size > 20_000
    print(out[-9000:])
