"""tune.py: what a gain is, which setting is used, that every row gets the same trials, and what is kept of them."""
import dataclasses
import json
import math
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest

import common
import compare
from conftest import T
from model import GPT
from test_common import fails
from studies import tune
from studies.tune import Setting

ADAM, MUON = Setting("adam", 1), Setting("muon", 2)
EVERY = {Setting(optimizer, lr) for optimizer, rates in tune.RATES.items() for lr in rates}


def point(setting, **found):
    return setting._asdict() | dict(tried=True) | found


def points(**trial):
    """Adam at 1 on the curve KL = 0.1 / L0, and one trial of Muon at 2."""
    own = [point(ADAM, tried=l0 == 16, l0=l0, kl=0.1 / l0) for l0 in (32.0, 8.0, 16.0)]
    return own + [point(MUON, **trial)] * bool(trial)


@pytest.mark.parametrize("l0, share, best", [(16, 1, ADAM), (11, 1, ADAM), (11, 0.95, ADAM), (11, 0.8, MUON),
                                             (23, 1.2, ADAM)])
def test_gain_is_what_a_trial_has_beyond_the_curve_of_the_tables_setting(l0, share, best):
    """A trial that only moves along the curve gains nothing; one that has `share` of its KL there gains -ln share."""
    gained = pytest.approx(-math.log(share), abs=1e-9)
    assert tune.verdict(ADAM, points(l0=l0, kl=share * 0.1 / l0)) == ({ADAM: 0, MUON: gained}, best)


@pytest.mark.parametrize("l0", [3, 10.6, 24.1, 70])
def test_trials_far_from_the_tables_l0_have_no_say(l0):
    assert tune.verdict(ADAM, points(l0=l0, kl=0.01 / l0)) == ({ADAM: 0}, ADAM)


def test_the_best_replaces_the_tables_setting_if_it_is_worth_it():
    trial = lambda optimizer, share: point(Setting(optimizer, 2), l0=16.0, kl=share * 0.1 / 16)
    assert tune.verdict(ADAM, points() + [trial("adam", 0.95), trial("muon", 0.92)])[1] == ADAM
    assert tune.verdict(ADAM, points() + [trial("adam", 0.85), trial("muon", 0.84)])[1] == MUON
    assert tune.verdict(ADAM, points() + [trial("adam", 0.83), trial("muon", 0.84)])[1] == Setting("adam", 2)


def test_beyond_the_curve_its_end_is_what_has_to_be_beaten():
    assert tune.gain(dict(l0=64, kl=0.1 / 64), points()) == pytest.approx(math.log(2))
    assert tune.gain(dict(l0=4, kl=0.1 / 8), points()) == pytest.approx(0)
    assert tune.verdict(ADAM, points()) == ({ADAM: 0}, ADAM)


def test_what_diverged_has_no_say():
    assert tune.verdict(ADAM, points() + [point(MUON, kl=None)]) == ({ADAM: 0}, ADAM)
    assert tune.verdict(ADAM, [point(ADAM, kl=None), point(MUON, l0=16., kl=1.)]) == ({ADAM: 0}, ADAM)


def test_every_row_gets_the_same_trials():
    every = tune.trials(compare.Config(seeds=1))
    assert set(every) == {name for name in compare.METHODS if ":" not in name and name != "spd-long"}
    assert {len(rates) for rates in tune.RATES.values()} == {5} and len(EVERY) == 10
    for name, tried in every.items():
        own = tune.own(compare.Job(name, "", 0, 0, True, compare.METHODS[name]))
        at = {job.value for setting, job in tried if setting != own}
        assert at == {tune.SPARSITY.get(name, compare.METHODS[name].values[1 if len(compare.METHODS[name].values) == 3 else 0])}
        assert {setting for setting, job in tried if job.value in at} == {own} | EVERY and tried[0][0] == own
        for setting, job in tried:
            change = job.method.change
            assert Setting(change["optimizer"], change["lr"]) == setting and job.seed == 0
            assert job.value in at or setting == own
            assert change.keys() <= {f.name for f in dataclasses.fields(job.method.module.Config)}


@pytest.mark.parametrize("name, rate", [("transcoder", 4e-3), ("transcoder-stochastic", 16e-3), ("clt", 2e-3)])
def test_beside_muon_biases_are_trained_at_the_rate_of_the_tables_adam(name, rate, target, monkeypatch):
    """And a row that then takes the best setting over has that trial's models, by their folders; so have all others."""
    gpt, method = GPT.load(target), compare.METHODS[name]._replace(change=dict(compare.METHODS[name].change, lr=rate))
    cfg = compare.Config(model=str(target), data=str(target / "x.bin"), methods=name, seeds=1)
    def trials(**change):
        monkeypatch.setitem(compare.METHODS, name, method._replace(change=method.change | change))
        return {(setting, job.value): job.config(cfg, gpt, 1) for setting, job in tune.trials(cfg)[name]}
    before, after = trials(), trials(optimizer="muon", lr=2e-2, lr_rest=rate)
    assert {run.lr_rest for (setting, _), run in before.items() if setting.optimizer == "muon"} == {rate}
    both = before.keys() & after.keys()
    assert all(before[k].out == after[k].out for k in both) and {setting for setting, _ in both} == EVERY


def test_spd_is_tried_near_the_l0_of_the_others_and_its_importance_net_at_a_rate_that_suits(target):
    gpt, cfg = GPT.load(target), compare.Config(model=str(target), data=str(target / "x.bin"), methods="spd", seeds=1)
    runs = [(setting, job.value, job.config(cfg, gpt, 1)) for setting, job in tune.trials(cfg)["spd"]]
    assert {(value, setting) for setting, value, _ in runs} == {
        (2e-5, Setting("muon", 0.04)), (5e-5, Setting("muon", 0.04)), *((1.5e-4, s) for s in EVERY)}
    assert {(run.optimizer, run.lr_ci, run.lr_rest) for *_, run in runs} == {("adam", 8e-3, 8e-3), ("muon", 0.02, 8e-3)}
    assert len({run.out for *_, run in runs}) == len(runs) == 12


@pytest.fixture
def small(target, tmp_path, monkeypatch):
    """A Config with two rows to tune, small transcoders."""
    method = compare.METHODS["transcoder"]._replace(values=(1, 2, 4), change=dict(F=32, N=16, dead=100))
    other = method._replace(values=(2,), change=dict(method.change, skip=True, optimizer="muon", lr=0.03))
    monkeypatch.setattr(compare, "METHODS", {"transcoder": method, "transcoder-skip": other})
    monkeypatch.setattr(tune, "AT", 2)
    return tune.Config(model=str(target), data=str(target / "x.bin"), device="cpu", tokens=96, eval_tokens=5 * T,
                       methods="transcoder", runs=str(tmp_path / "runs"), out=str(tmp_path / "out"))


def rows(cfg):
    return {row["name"]: row for row in json.loads((Path(cfg.out) / "tuning.json").read_text())["rows"]}


def test_trains_scores_and_writes(small, tmp_path, capsys):
    """Models at the table's setting are compare.py's own."""
    tune.main(small)
    row, shown = rows(small)["transcoder"], capsys.readouterr().out
    assert row["own"] == dict(optimizer="adam", lr=4e-3) and len(row["points"]) == 12 and row["provenance"]["target"]
    tried = {Setting(p["optimizer"], p["lr"]): p for p in row["points"] if p["tried"]}
    assert tried.keys() == EVERY and [p["value"] for p in row["points"] if not p["tried"]] == [1, 4]
    assert all(p["gain"] is not None and p["seconds"] > 0 and p["steps"] == 6 for p in tried.values())
    assert len({(p["kl"], p["l0"]) for p in row["points"]}) == len({p["key"] for p in row["points"]}) == 12
    assert "[2/12] transcoder k=2 seed 0, adam 0.004; about " in shown and "min left" in shown
    assert len(list((tmp_path / "runs").glob("transcoder-k2-seed0-*"))) == 10
    cfg = compare.Config(model=small.model, data=small.data, tokens=96, eval_tokens=5 * T, runs=small.runs, seeds=1,
                         methods="transcoder")
    gpt = GPT.load(small.model)
    assert all(Path(job.config(cfg, gpt, 1).out).exists() for job in compare.jobs(cfg) if job.method)


def made_up(name, of=None, **best):
    """A row of tuning.json as wide as one gets."""
    own = Setting("adam", 16e-3)
    found = [point(setting, key=f"{name} {setting}", kl=0.00312, l0=16.04, gain=0 if setting == own else -0.67)
             for setting in sorted(EVERY)]
    return dict(name=name, of=of or dict(tokens=4_096_000), own=own._asdict(), best=dict(optimizer="muon", lr=2e-2) | best, points=found)


def test_all_trials_are_shown_the_best_in_bold(capsys):
    text = tune.render([made_up("transcoder-stochastic"), made_up("spd", optimizer="adam", lr=16e-3)])
    lines = text.splitlines()
    assert "after 4,096,000 tokens" in lines[1] and max(map(len, lines)) <= 120 and text.count("3.12@16.0 -0.67") == 1 + 9 + 9
    assert "| spd | adam 0.016 | **3.12@16.0 table** | adam 0.016 | **3.12@16.0 table** |" in lines
    stochastic = [line for line in lines if line.startswith("| transcoder-stochastic")]
    assert "muon 0.02 | **3.12@16.0 -0.67** |" in stochastic[0]
    assert ["**" in line for line in stochastic] == [True, False, True] and "3.12@16.0 table" in stochastic[1]


def test_a_rate_that_diverges_is_shown_and_never_used(small, monkeypatch, capsys):
    trained, calls = compare.trained, []
    def sick(job, *rest):
        calls.append(tune.own(job))
        return trained(job, *rest) if tune.own(job).lr < 0.01 else common.fail("diverged (nan) at step 3", 1)
    monkeypatch.setattr(compare, "trained", sick)
    tune.main(small)
    row, text = rows(small)["transcoder"], (Path(small.out) / "tuning.md").read_text()
    assert text.count("diverged") == 6 and row["best"]["lr"] < 0.01
    assert {p["lr"] for p in row["points"] if p["tried"] and p["gain"] is not None} == {2e-3, 4e-3, 8e-3, 5e-3}
    tune.main(small)
    assert len(calls) == 12                         # not even what diverged is tried again


def test_what_is_scored_is_read_back_without_its_model(small, monkeypatch):
    tune.main(small)
    first, trained = rows(small), compare.trained
    monkeypatch.setattr(compare, "trained", None)
    tune.main(dataclasses.replace(small, runs=small.runs + " that are gone"))
    assert {k: v for k, v in rows(small)["transcoder"].items() if k != "provenance"} == {
        k: v for k, v in first["transcoder"].items() if k != "provenance"}
    calls = []
    monkeypatch.setattr(compare, "trained", lambda job, *rest: calls.append(job) or trained(job, *rest))
    method = compare.METHODS["transcoder"]
    monkeypatch.setitem(compare.METHODS, "transcoder", method._replace(values=(1, 2, 3)))
    tune.main(small)
    assert [job.value for job in calls] == [3]
    monkeypatch.setitem(compare.METHODS, "transcoder", method._replace(change=dict(method.change, F=31)))
    tune.main(small)
    assert len(calls) == 1 + 12


def test_a_killed_run_keeps_the_rows_that_it_finished(small, monkeypatch):
    trained, calls = compare.trained, []
    def killed(job, *rest):
        calls.append(job.name)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return trained(job, *rest)
    monkeypatch.setattr(compare, "trained", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.main(dataclasses.replace(small, methods="all"))
    assert list(rows(small)) == ["transcoder"]
    tune.main(dataclasses.replace(small, methods="all"))
    assert list(rows(small)) == ["transcoder", "transcoder-skip"] and calls.count("transcoder") == 12
    assert len(rows(small)["transcoder-skip"]["points"]) == 11          # its own setting is not among the rates


def test_runs_of_some_rows_share_a_table(small):
    tune.main(dataclasses.replace(small, methods="transcoder-skip"))
    once = rows(small)
    tune.main(small)
    both = rows(small)
    assert list(both) == ["transcoder", "transcoder-skip"] and both["transcoder-skip"] == once["transcoder-skip"]
    text = (Path(small.out) / "tuning.md").read_text()
    assert text.count("| transcoder |") == text.count("| transcoder-skip |") == 3


def test_rows_that_are_put_at_once_are_all_kept(tmp_path):
    path, names = tmp_path / "out" / "tuning.json", [name for name in compare.METHODS if ":" not in name]
    puts = [threading.Thread(target=tune.keep, args=(made_up(name), path)) for name in names]
    for put in puts:
        put.start()
    for put in puts:
        put.join()
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == names
    assert [p.name for p in path.parent.iterdir() if p.suffix not in (".json", ".md")] == []


def test_rows_of_other_settings_are_refused_and_kept(small, capsys):
    path = Path(small.out) / "tuning.json"
    for old in (made_up("transcoder", of=dict(tokens=5)), dict(name="transcoder", lr=4e-3, points=[])):
        common.write(path, json.dumps(dict(rows=[old])).encode())
        before = path.read_bytes()
        fails(capsys, lambda: tune.main(small), "tuning.json", "its row transcoder", "--out")
        assert path.read_bytes() == before and not Path(small.runs).exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"<<<<<<< HEAD\n", b"[" * 100_000])
def test_a_damaged_table_is_refused_and_kept(damage, small, capsys):
    path = Path(small.out) / "tuning.json"
    common.write(path, damage)
    fails(capsys, lambda: tune.main(small), "tuning.json", "damaged")
    assert path.read_bytes() == damage and not Path(small.runs).exists()


def test_bad_input_ends_in_one_line(target, small, capsys, tmp_path):
    fails(capsys, lambda: tune.main(dataclasses.replace(small, out="/proc/x")), "/proc/x: cannot write")
    how = dict(model=str(target), data=str(target / "x.bin"), device="cpu", out=str(tmp_path))
    fails(capsys, lambda: tune.main(tune.Config(**how, methods="spdd")), "--methods spdd")
    fails(capsys, lambda: tune.main(tune.Config(**how, methods="pca")), "--methods pca")
    fails(capsys, lambda: tune.main(tune.Config(**how, tokens=0)), "--tokens 0")
    assert not list(tmp_path.iterdir())


def busy(folder, held, may_end, finish):
    """Hold a folder until it may end; then copy a finished model there, if one is given."""
    common.hold(folder)
    held.release()
    may_end.acquire()
    if finish:
        shutil.copytree(finish, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))


def test_what_another_run_is_training_comes_last_and_is_waited_for(small, tmp_path, monkeypatch, capsys):
    """Not trained twice, and no failure."""
    alone = dataclasses.replace(small, runs=str(tmp_path / "other"), out=str(tmp_path / "alone"))
    tune.main(alone)
    scores = rows(alone)
    finished = next((tmp_path / "other").glob("transcoder-k2-*"))
    fork = multiprocessing.get_context("fork")
    held, may_end = fork.Semaphore(0), fork.Semaphore(0)
    trains = fork.Process(target=busy, args=(tmp_path / "runs" / finished.name, held, may_end, finished),
                          daemon=True)
    trains.start()
    held.acquire()
    begun, hold = [], common.hold
    train = compare.METHODS["transcoder"].module.train
    def recorded(run):
        begun.append(Path(run.out).name)
        return train(run)
    monkeypatch.setattr(compare.METHODS["transcoder"].module, "train", recorded)
    def held_by_now(folder, wait=False):
        if Path(folder).name == finished.name:
            assert wait and len(begun) == 11
            may_end.release()
        hold(folder, wait)
    monkeypatch.setattr(common, "hold", held_by_now)
    capsys.readouterr()
    tune.main(small)
    trains.join()
    assert finished.name not in begun and len(begun) == 11 and f"process {trains.pid} on" in capsys.readouterr().err
    found = rows(small)["transcoder"]
    assert [(p["key"], p["kl"]) for p in found["points"]] == [(p["key"], p["kl"]) for p in scores["transcoder"]["points"]]
    assert not common.HELD.keys() & {Path(path).resolve() / ".lock" for path in (tmp_path / "runs").iterdir()}
