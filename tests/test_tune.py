"""tune.py: what a gain is, which rate is used, and that every row gets the same trials."""
import json
import math
from pathlib import Path

import pytest

import common
import compare
import tune
from conftest import T
from model import GPT
from test_common import fails


def points(**trial):
    """A rate of 1 on the curve KL = 0.1 / L0, and one trial at a rate of 2."""
    own = [dict(lr=1, middle=l0 == 16, l0=l0, kl=0.1 / l0) for l0 in (32.0, 8.0, 16.0)]
    return own + [dict(lr=2, middle=True, **trial)] * bool(trial)


@pytest.mark.parametrize("l0, share, best", [(16, 1, 1), (11, 1, 1), (11, 0.95, 1), (11, 0.8, 2), (23, 1.2, 1)])
def test_gain_is_what_a_trial_has_beyond_the_curve_of_the_tables_rate(l0, share, best):
    """A trial that only moves along the curve gains nothing; one that has `share` of its KL there gains -ln share."""
    gained = pytest.approx(-math.log(share), abs=1e-9)
    assert tune.verdict(1, points(l0=l0, kl=share * 0.1 / l0)) == ({1: 0, 2: gained}, best)


@pytest.mark.parametrize("l0", [3, 10.6, 24.1, 70])
def test_trials_far_from_the_tables_l0_have_no_say(l0):
    assert tune.verdict(1, points(l0=l0, kl=0.01 / l0)) == ({1: 0}, 1)


def test_the_best_replaces_the_tables_rate_if_it_is_worth_it():
    trial = lambda lr, share: dict(lr=lr, middle=True, l0=16.0, kl=share * 0.1 / 16)
    assert tune.verdict(1, points() + [trial(0.5, 0.95), trial(2, 0.92)])[1] == 1
    assert tune.verdict(1, points() + [trial(0.5, 0.85), trial(2, 0.84)])[1] == 2


def test_beyond_the_curve_its_end_is_what_has_to_be_beaten():
    assert tune.gain(dict(l0=64, kl=0.1 / 64), points()) == pytest.approx(math.log(2))
    assert tune.gain(dict(l0=4, kl=0.1 / 8), points()) == pytest.approx(0)
    assert tune.verdict(1, points()) == ({1: 0}, 1)


def test_every_row_gets_the_same_trials():
    every = tune.trials(compare.Config(seeds=1))
    assert set(every) == {name for name in compare.METHODS if ":" not in name}
    for name, jobs in every.items():
        own = compare.METHODS[name].change.get("lr", compare.METHODS[name].module.Config.lr)
        assert {lr for lr, job in jobs if job.middle} == {own, *tune.RATES} and jobs[0][0] == own
        assert all(job.method.change["lr"] == lr and job.seed == 0 and (job.middle or lr == own) for lr, job in jobs)


@pytest.fixture
def small(target, tmp_path, monkeypatch):
    """A Config with one row to tune, a small transcoder's."""
    method = compare.METHODS["transcoder"]._replace(values=(1, 2, 4), change=dict(F=32, N=16, dead=100))
    monkeypatch.setattr(compare, "METHODS", {"transcoder": method}), monkeypatch.setattr(tune, "AT", 2)
    return tune.Config(model=str(target), data=str(target / "x.bin"), device="cpu", tokens=96, eval_tokens=5 * T,
                       runs=str(tmp_path / "runs"), out=str(tmp_path / "out"))


def test_trains_scores_and_writes(small, tmp_path, capsys):
    """Models at the table's rate are compare.py's own."""
    tune.main(small)
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())
    row, = found["rows"]
    assert row["lr"] == 4e-3 and {p["lr"] for p in row["points"] if p["middle"]} == set(tune.RATES)
    assert len(row["points"]) == 7 and set(row["gains"]) == {str(lr) for lr in tune.RATES}
    assert len({(p["kl"], p["l0"]) for p in row["points"]}) == 7 and found["provenance"]["target"]
    assert "| transcoder |" in (tmp_path / "out" / "tuning.md").read_text() and "gain" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("transcoder-k2-seed0-*"))) == 5
    cfg = compare.Config(model=small.model, data=small.data, tokens=96, eval_tokens=5 * T, runs=small.runs, seeds=1)
    gpt = GPT.load(small.model)
    assert all(Path(job.config(cfg, gpt, 1).out).exists() for job in compare.jobs(cfg) if job.method)


def test_a_rate_that_diverges_is_shown_and_never_used(small, tmp_path, monkeypatch, capsys):
    trained = compare.trained
    monkeypatch.setattr(compare, "trained", lambda job, *rest: trained(job, *rest)
                        if tune.rate(job) < 0.01 else common.fail("diverged (nan) at step 3", 1))
    tune.main(small)
    assert "diverged" in (tmp_path / "out" / "tuning.md").read_text()
    row, = json.loads((tmp_path / "out" / "tuning.json").read_text())["rows"]
    assert set(row["gains"]) == {"0.002", "0.004", "0.008"} and row["best"] != 0.016


def test_bad_input_ends_in_one_line(target, capsys, tmp_path):
    how = dict(model=str(target), data=str(target / "x.bin"), device="cpu", out=str(tmp_path))
    fails(capsys, lambda: tune.main(tune.Config(**how, methods="spdd")), "--methods spdd")
    fails(capsys, lambda: tune.main(tune.Config(**how, methods="pca")), "--methods pca")
    fails(capsys, lambda: tune.main(tune.Config(**how, tokens=0)), "--tokens 0")
    assert not list(tmp_path.iterdir())
