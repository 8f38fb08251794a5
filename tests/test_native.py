"""native.py: what it runs, that it finds nothing twice, and what it shows."""
import dataclasses
import functools
import importlib
import json
from pathlib import Path

import pytest

import scratch
import spd
from conftest import T
from metrics import masks
from studies import kept, length, native
from studies.native import Config
from test_common import fails


@pytest.fixture(scope="module")
def run(target, tmp_path_factory):
    """A run of scratch.py."""
    cfg = scratch.Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path_factory.mktemp("run")),
                         device="cpu", C=10, B=2, T=T, ci_hidden=8, steps=3, eval_tokens=120, pgd_rows=2, page=False)
    scratch.train(cfg)
    return cfg


@pytest.fixture
def cfg(run, tmp_path, monkeypatch):
    monkeypatch.setattr(length, "BATCHES", 2)
    monkeypatch.setattr(masks, "attack", functools.partial(masks.attack, budgets=(0, 20)))
    return Config(run=run.out, seeds=2, steps=2, eval_tokens=1200, device="cpu", out=str(tmp_path / "results"),
                  runs=str(tmp_path / "runs"))


def test_native_and_post_hoc_components_of_the_same_weights(cfg, run, capsys, monkeypatch):
    native.main(cfg)
    out = capsys.readouterr().out
    found = json.loads((Path(cfg.out) / "native.json").read_text())
    assert [(row["kind"], row["seeds"]) for row in found["rows"]] == [
        ("native", [0]), ("post-hoc", [1]), ("post-hoc", [2])]         # no post-hoc one has the native one's start
    assert [(pair["kind"], pair["seeds"]) for pair in found["pairs"]] == [
        ("native", [1]), ("native", [2]), ("post-hoc", [1, 2])]
    # all of them add up to the weights that were made
    assert all(row["weight_error_in"] < 1e-5 and row["weight_error_out"] < 1e-5 for row in found["rows"])
    summary = json.loads((Path(run.out) / "summary.json").read_text())
    assert found["ce"]["ce_made"] == summary["ce_made"]
    assert all(row["loss"] > 0 and row["attack"]["20"] == row["kl_attack"] for row in found["rows"])
    assert all(row.keys() >= {"completeness", "coverage", "steering", "units_atomic"} for row in found["rows"])
    assert all(pair["activations_shared_0.7"] is not None for pair in found["pairs"])
    assert (Path(cfg.out) / "native.md").read_text() in out and "two post-hoc seeds (1)" in out

    # a second run trains and measures nothing
    for module, name in ((spd, "train"), (length, "measured"), (native, "pair_numbers")):
        monkeypatch.setattr(module, name, lambda *args: 1 / 0)
    native.main(cfg)
    again = json.loads((Path(cfg.out) / "native.json").read_text())
    assert again["rows"] == found["rows"] and again["pairs"] == found["pairs"]
    with pytest.raises(ZeroDivisionError):              # another size is another measurement
        native.main(dataclasses.replace(cfg, eval_tokens=1000))


def test_what_is_compared_has_the_sizes_of_the_native_one(cfg, run):
    gpt = native.GPT.load(f"{run.out}/target")
    post_hoc = native.configured(cfg, run, gpt, 5)
    assert (post_hoc.C, post_hoc.B, post_hoc.T, post_hoc.c_imp) == (run.C, run.B, run.T, run.c_imp) and post_hoc.seed == 5
    assert native.configured(dataclasses.replace(cfg, c_imp=3.), run, gpt, 5).c_imp == 3


@pytest.mark.parametrize("change, words", [
    (dict(run="nowhere"), "--run nowhere"), (dict(seeds=1), "--seeds 1"), (dict(steps=0), "--steps 0"),
    (dict(eval_tokens=1), "--eval_tokens 1"), (dict(device="tpu"), "--device tpu")])
def test_bad_input_is_one_line(cfg, capsys, change, words):
    fails(capsys, lambda: native.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists() and not Path(cfg.runs).exists()


def test_a_run_that_has_not_ended_is_named(cfg, run, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    for name in ("scratch.safetensors",):
        (tmp_path / "half" / name).write_bytes((Path(run.out) / name).read_bytes())
    fails(capsys, lambda: native.main(dataclasses.replace(cfg, run=str(tmp_path / "half"))), "has not ended", "--resume")


@pytest.mark.parametrize("module, part", [
    ("apd", dict(toys="5-2")), ("digits", dict(seeds=1)), ("studies.across", dict(methods="spd")),
    ("studies.length", dict(steps="10")), ("studies.map", dict(seeds=1)), ("studies.native", dict(steps=5)),
    ("studies.sizes", dict(arms="l0"))])
def test_a_part_of_a_study_leaves_the_whole_one_alone(module, part, monkeypatch):
    """It writes to a folder of its own, unless one was named; what is asked of it is not moved by that."""
    class Stop(Exception):
        pass
    def stop(found, folder="out"):
        raise Stop(kept.apart(found, folder), folder)
    module = importlib.import_module(module)
    monkeypatch.setattr(module, "apart", stop)
    for change, named, wanted in (({}, {}, "results"), ({}, dict(device="cpu"), "results"), (part, {}, "results-part"),
                                  (part, dict(out="mine", results="mine"), "mine")):
        named = {name: value for name, value in named.items() if hasattr(module.Config, name)}
        with pytest.raises(Stop) as stopped:
            module.main(module.Config(**change, **named))
        cfg, folder = stopped.value.args
        expected = module.Config(**change, **named)
        assert getattr(cfg, folder) == wanted
        assert dataclasses.replace(cfg, **{folder: getattr(expected, folder)}) == expected
