"""length.py: what it runs, that it finds nothing twice, and its arithmetic."""
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import compare
import data
import spd
from conftest import D, M
from metrics import masks
from model import GPT
from studies import length
from studies.length import Config
from test_common import fails


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    monkeypatch.setattr(length, "TABLE", length.TABLE._replace(change=dict(C=M, B=2, ci_hidden=8)))
    monkeypatch.setattr(length, "BATCHES", 2)
    monkeypatch.setattr(masks, "attack", functools.partial(masks.attack, budgets=(0, 20)))
    return Config(model=str(target), data=str(target / "x.bin"), device="cpu", steps="2,4", seeds="2,1", neurons="8",
                  eval_tokens=240, out=str(tmp_path / "results"), runs=str(tmp_path / "runs"))


def test_runs_and_their_order():
    assert length.jobs(Config(steps="9,3", seeds="1,2", neurons="12")) == [
        ("random", 3, 0), ("random", 3, 1), ("random", 9, 0), ("neurons", 12, 0)]
    assert length.jobs(Config(steps="5,6", seeds="2", neurons="")) == [
        ("random", 5, 0), ("random", 5, 1), ("random", 6, 0), ("random", 6, 1)]


def test_a_second_run_finds_all_and_says_the_same(cfg, capsys, monkeypatch):
    length.main(cfg)
    first, out = (Path(cfg.out) / "spd-length.json").read_text(), capsys.readouterr().out
    found = json.loads(first)
    assert [(row["start"], row["steps"], row["seed"]) for row in found["rows"]] == [
        ("random", 2, 0), ("random", 2, 1), ("random", 4, 0), ("neurons", 8, 0)]
    assert [(pair["start"], pair["steps"]) for pair in found["pairs"]] == [
        ("random", 2), ("neurons", 2), ("neurons", 4)]
    assert "settled(2) = " in out and (Path(cfg.out) / "spd-length.png").stat().st_size > 10_000
    for module, name in ((spd, "train"), (length, "measured")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(length.curve, "save_picture", lambda *args: None)
    length.main(cfg)
    again = json.loads((Path(cfg.out) / "spd-length.json").read_text())
    assert again["rows"] == found["rows"] and again["pairs"] == found["pairs"]
    with pytest.raises(TypeError):              # another size is another run
        length.main(dataclasses.replace(cfg, eval_tokens=280))


def test_settled_compares_means_with_the_neurons_start_at_four_times_the_length():
    rows = [dict(start=s, steps=n, loss=v) for s, n, v in (
        ("random", 10, 3.), ("random", 10, 1.), ("neurons", 40, .5), ("random", 40, 7.), ("neurons", 10, 9.))]
    assert length.settled(rows) == [(10, 2., .5, 4.)]


def test_the_loss_is_that_of_the_end_without_faithfulness(cfg):
    gpt = GPT.load(cfg.model)
    run = length.configured(cfg, gpt, 1, "random", 5, 0)
    m, corpus = spd.build(run, gpt), length.data.load_all(cfg.data, gpt.vocab, run.T)["fit"]
    gen = lambda: common.generator(0, "settled")
    loss, terms = length.settled_loss(m, gpt, corpus, run, gen())
    want = (run.c_stoch * terms["loss_stoch"] + run.c_adv * terms["loss_adv"]
            + run.c_imp * (terms["loss_imp"] + run.w_freq * terms["loss_freq"]))
    assert loss == pytest.approx(want) and terms["loss_faith"] > 0
    m.U[0].data *= 100                          # weights far off: the loss moves by what the masks see alone
    again = length.settled_loss(m, gpt, corpus, dataclasses.replace(run, c_faith=1e9), gen())[0]
    assert again < 1e6


def test_the_start_at_the_neurons_is_exact_and_theirs(cfg):
    gpt = GPT.load(cfg.model)
    run = length.configured(cfg, gpt, 1, "neurons", 5, 0)
    m = spd.build(run, gpt)
    spd.begin(m, run)
    W_in, W_out = m.Ws
    assert all(torch.allclose(V @ U, W, atol=1e-5) for W, V, U in zip(m.Ws, m.V, m.U))
    for k in range(M):
        assert torch.allclose(torch.outer(m.V[1][:, k], m.U[1][k])[k], W_out[k], atol=0.3 * W_out[k].norm())
        assert torch.cosine_similarity(m.V[0][:, k], W_in[:, k], 0).abs() > 0.9


@pytest.mark.parametrize("change, words", [
    (dict(steps="5,x"), "--steps 5,x"), (dict(seeds="1,2,3"), "--seeds 1,2,3"), (dict(neurons="0"), "--neurons 0"),
    (dict(layer=9), "--layer 9"), (dict(eval_tokens=1), "--eval_tokens 1")])
def test_bad_input_is_one_line(cfg, capsys, change, words):
    fails(capsys, lambda: length.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists() and not Path(cfg.runs).exists()


def test_another_text_under_the_same_name_is_not_taken_for_the_one_that_was(cfg, tmp_path, capsys, monkeypatch):
    """Neither its models nor its rows."""
    monkeypatch.setattr(length.curve, "save_picture", lambda *args: None)
    path = tmp_path / "y.bin"
    path.write_bytes(Path(cfg.data).read_bytes())
    cfg = dataclasses.replace(cfg, data=str(path), steps="2", seeds="1", neurons="")
    length.main(cfg)
    path.write_bytes(np.fromfile(path, np.uint16)[::-1].tobytes())
    data.fingerprint.cache_clear()              # as of another process
    fails(capsys, lambda: length.main(cfg), "data were others")
    length.main(dataclasses.replace(cfg, runs=cfg.runs + "2"))
    assert len({row["loss"] for row in json.loads((Path(cfg.out) / "spd-length.json").read_text())["rows"]}) == 1
    assert len(list((tmp_path / "runs2").iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"7", b"{}", b"<<<<<<< HEAD\n", b"\xff", b"[" * 100_000])
def test_damaged_results_are_one_line(damage, cfg, capsys):
    common.write(Path(cfg.out) / "spd-length.json", damage)
    fails(capsys, lambda: length.main(cfg), "spd-length.json", "damaged")
    assert not Path(cfg.runs).exists()


def test_a_place_that_cannot_be_written_to_is_found_before_training(cfg, tmp_path, capsys):
    for place in (tmp_path / "file" / "x", tmp_path / ("x" * 300), "/proc/x", "\x00"):
        (tmp_path / "file").write_bytes(b"")
        for flag in ("out", "runs"):
            fails(capsys, lambda: length.main(dataclasses.replace(cfg, **{flag: str(place)})), "cannot write")
    assert not Path(cfg.runs).exists()


@pytest.mark.parametrize("flag, value", [("seeds", "100000000"), ("steps", "9" * 30), ("neurons", "9" * 50), ("steps", "1e3"), ("seeds", "0")])
def test_numbers_that_no_run_comes_to_are_refused(flag, value, cfg, capsys):
    fails(capsys, lambda: length.main(dataclasses.replace(cfg, **{flag: value})), f"--{flag} ", "whole numbers from 1 to")
