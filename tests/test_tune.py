"""tune.py: what a gain is, which rate is used, and that every row gets the same trials."""
import json
import math

import pytest

import compare
import tune
from conftest import T
from test_common import fails


def points(trial):
    """A default on the curve KL = 0.1 / L0, and one trial at twice its rate."""
    default = [dict(factor=1, middle=l0 == 16, l0=l0, kl=0.1 / l0) for l0 in (32.0, 8.0, 16.0)]
    return default + [dict(factor=2, middle=True, **trial)]


@pytest.mark.parametrize("l0, share, use", [(16, 1, 1), (11, 1, 1), (11, 0.95, 1), (11, 0.8, 2), (30, 1.2, 1)])
def test_gain_is_what_a_trial_has_beyond_the_defaults_curve(l0, share, use):
    """A trial that only moves along the curve gains nothing; one that has `share` of its KL there gains -ln share."""
    gains, best = tune.verdict(points(dict(l0=l0, kl=share * 0.1 / l0)))
    assert gains == {2: pytest.approx(-math.log(share), abs=1e-9)} and best == use


def test_beyond_the_curve_its_end_is_what_has_to_be_beaten():
    assert tune.gain(dict(l0=64, kl=0.1 / 64), points({})[:3]) == pytest.approx(math.log(2))
    assert tune.gain(dict(l0=4, kl=0.1 / 8), points({})[:3]) == pytest.approx(0)


def test_every_row_gets_the_same_trials():
    every = tune.trials(compare.Config(seeds=1))
    assert set(every) == {name for name in compare.METHODS if ":" not in name}
    for name, jobs in every.items():
        lr = compare.METHODS[name].module.Config.lr
        assert sorted(f for f, job in jobs if job.middle) == [0.5, 1, 2]
        for factor, job in jobs:
            assert job.method.change.get("lr", lr) == lr * factor and job.seed == 0


def test_trains_scores_and_writes(target, tmp_path, monkeypatch, capsys):
    """Models of the default rate are compare.py's own."""
    method = compare.METHODS["transcoder"]
    method = method._replace(values=(1, 2, 4), change=dict(F=32, N=16, dead=100))
    monkeypatch.setattr(compare, "METHODS", {"transcoder": method})
    monkeypatch.setattr(compare, "QUICK", {})
    how = dict(model=str(target), data=str(target / "x.bin"), device="cpu", tokens=96, eval_tokens=5 * T,
               runs=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    tune.main(tune.Config(**how))
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())
    row, = found["rows"]
    lr = method.module.Config.lr
    assert [p["lr"] for p in row["points"] if p["middle"]] == [lr / 2, lr, 2 * lr]
    assert len(row["points"]) == 5 and set(row["gains"]) == {"0.5", "2"} and row["use"] in (0.5, 1, 2)
    assert len({(p["kl"], p["l0"]) for p in row["points"]}) > 1 and found["provenance"]["target"]
    assert "| transcoder |" in (tmp_path / "out" / "tuning.md").read_text() and "gain" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("transcoder-k2-seed0-*"))) == 3
    cfg = compare.Config(**how, seeds=1)
    gpt = compare.GPT.load(target)
    assert all(compare.Path(job.config(cfg, gpt, 1).out).exists() for job in compare.jobs(cfg) if job.method)


def test_bad_input_ends_in_one_line(target, capsys, tmp_path):
    how = dict(model=str(target), data=str(target / "x.bin"), device="cpu", out=str(tmp_path))
    fails(capsys, lambda: tune.main(tune.Config(**how, methods="spdd")), "--methods spdd")
    fails(capsys, lambda: tune.main(tune.Config(**how, tokens=0)), "--tokens 0")
    assert not list(tmp_path.iterdir())
