"""The comparison with a method that trains in milliseconds: kill and continue, FAILED rows, nulls, tables, README."""
import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import common
import compare
import evals
import metrics.answers
from baselines import Dictionary
from compare import Config, Floor, Job, Method
from conftest import D, T, V
from model import GPT
from report import narrative, noise, table
from test_common import fails

ROOT = Path(compare.__file__).parent


@pytest.fixture(scope="module")
def n_layer():
    return 2


@dataclasses.dataclass
class StubConfig:
    model: str = ""
    data: str = ""
    layer: int = -1
    out: str = ""
    resume: bool = False
    device: str = "cpu"
    seed: int = 0
    steps: int = 0
    N: int = 8
    T: int = 128
    k: int = 1
    eval_tokens: int = 0


class Stub(Dictionary, nn.Module):
    """Random directions, of which each training step changes one."""
    def __init__(self, cfg):
        nn.Module.__init__(self)
        self.R = nn.Parameter(torch.randn(10, D, generator=common.generator(cfg.seed, "stub")))
        self.W, self.mean, self.b, self.k, self.layers = self.R, torch.zeros(D), 0., cfg.k, [cfg.layer]
        self.params_F = torch.full((10,), 2 * D)


def group(measure):
    """A module of metrics with this one function."""
    return types.SimpleNamespace(measure=measure, COLUMNS={}, __file__=__file__)


@pytest.fixture
def stub(monkeypatch):
    """The method, its log of steps, and `stop`: what to raise before step 3 of a (k, seed)."""
    log, stop = [], {}

    def build(cfg, gpt):
        return Stub(cfg)

    def train(cfg):
        gpt, path, start = GPT.load(cfg.model), Path(cfg.out) / "stub.safetensors", 0
        m = build(cfg, gpt)
        if cfg.resume:
            tensors, meta = common.load(path, method="stub")
            common.unflat(tensors, m=m)
            start = meta["step"]
        for step in range(start, cfg.steps):
            if step == 3 and (cfg.k, cfg.seed) in stop:
                raise stop[cfg.k, cfg.seed]
            m.R.data[step % 10] = 0.5 * m.R.data[step % 10] + step / 10
            log.append((cfg.k, cfg.seed, step))
            common.save(path, common.flat(m=m), dict(
                method="stub", target=gpt.hash, step=step + 1, seconds=1.5, config=vars(cfg),
                code=common.training_code(__file__)))

    def load(path, gpt):
        tensors, meta = common.load(path, method="stub", target=gpt.hash)
        m = build(StubConfig(**meta["config"]), gpt)
        common.unflat(tensors, m=m)
        return m.requires_grad_(False)

    may_change = {"model", "out", "resume", "device", "eval_tokens"}
    module = types.SimpleNamespace(Config=StubConfig, MAY_CHANGE_ON_RESUME=may_change, train=train, load=load,
                                   __name__="stub",
                                   __file__=__file__)
    monkeypatch.setattr(compare, "METHODS", {"stub": Method(module, "k", (1, 2, 4), {}, {}, "a stub")})
    floors = {"random": Floor((2, 3, 4), "", has_seeds=True), "pca": Floor((2, 3, 4), "")}
    monkeypatch.setattr(compare, "FLOORS", floors)
    monkeypatch.setattr(table.pictures, "draw", lambda results, out: None)
    asked = []

    def parts(m, arena, gen):
        asked.append(m)
        return dict(effective_rank=torch.rand(1, generator=gen).item(), fragmentation=float("nan")), {}

    def stability(ms, arena, gen):
        asked.append(ms)
        return dict(function_fve=len({m.W.sum().item() for m in ms})), dict(function_fve_se=0.5)

    monkeypatch.setattr(compare, "GROUPS", dict(faithfulness=evals, parts=group(parts), stability=group(stability)))
    return types.SimpleNamespace(log=log, stop=stop, asked=asked, module=module)


@pytest.fixture
def cfg(target, tmp_path):
    return Config(model=str(target), data=str(target / "x.bin"), device="cpu", seeds=2, tokens=50, eval_tokens=240,
                  out=str(tmp_path / "results"), runs=str(tmp_path / "runs"))


def results(cfg):
    found = json.loads((Path(cfg.out) / "results.json").read_text())
    return {k: v for k, v in found.items() if k != "provenance"}


@pytest.mark.parametrize("name", list(compare.METHODS))
def test_a_model_is_loaded_as_it_was_trained(target, tmp_path, name):
    """The checkpoint holds all that evaluation needs, whatever the method does at the end of its training."""
    method, gpt, seen = compare.METHODS[name], GPT.load(target), []
    small = dict(F=32, N=16, C=6, B=2, ci_hidden=8, groups="3@2,2@4", dead=100)
    fields = {f.name for f in dataclasses.fields(method.module.Config)}
    small = {k: v for k, v in small.items() if k in fields}
    module = types.SimpleNamespace(**vars(method.module))
    module.train, train = lambda run: seen.append(train(run)[0]), module.train
    method = method._replace(module=module, change=method.change | small, times=1)
    job = Job(name, method.knob, method.values[0], 0, True, method)
    cfg = Config(model=str(target), data=str(target / "x.bin"), device="cpu", tokens=96, eval_tokens=48,
                 runs=str(tmp_path))
    run = job.config(cfg, gpt, 1)
    which = compare.identity(run, module)                   # known before it is trained
    m, _, cost = compare.trained(job, run, gpt)
    idx = torch.randint(0, V, (4, T), generator=common.generator(0, "idx"))
    for (a, b) in zip(evals.clean(getattr(m, "raw", m), gpt, idx, 1), evals.clean(seen[0], gpt, idx, 1)):
        assert torch.equal(a, b)
    f_BTF = evals.clean(m, gpt, idx, 1)[1]
    assert (f_BTF > 0).any() and torch.equal(m.decode(1, f_BTF, a.new_ones(4, T, D)),
                                             seen[0].decode(1, f_BTF, a.new_ones(4, T, D)))
    assert cost["tokens"] == 96 and which == compare.identity(run, module)
    compare.trained(job, run, gpt)
    assert len(seen) == 1


def test_all_but_spd_long_are_trained_on_the_same_number_of_tokens():
    gpt = GPT.load(ROOT / "target")
    assert [(name, m.times) for name, m in compare.METHODS.items() if m.times != 1] == [("spd-long", 3)]
    for cfg in (Config(), Config(**compare.QUICK, quick=True)):
        jobs = [job for job in compare.jobs(cfg) if job.method and job.seed is not None]
        runs = [job.config(cfg, gpt, 1) for job in jobs]
        models = {name: len(m.values) for name, m in compare.METHODS.items() if name != "sae:untrained"}      # as sae
        assert len({(run.model, run.out) for run in runs}) == (len(models) if cfg.quick else 3 * sum(models.values()))
        for job, run in zip(jobs, runs):
            tokens = cfg.tokens * job.method.times
            assert run.steps * (run.B * run.T if hasattr(run, "B") else run.N) == tokens, run


def test_spd_is_on_where_its_rounded_mask_is():
    class Soft:
        C = 2
        def encode(self, layer, x, mlp):
            return torch.tensor([[0.05, 0.1, 0.3, 1.]])
    m = compare.spd.Rounded(Soft(), 0.1)
    assert m.encode(0, None, None).tolist() == [[0, 0, 1, 1]] and m.C == 2


def test_a_second_run_only_reads(cfg, stub):
    compare.main(cfg)
    trained, asked, first = len(stub.log), len(stub.asked), results(cfg)
    assert trained == 3 * 2 * 6 and asked == 2 + 2 + 1 + 1      # stub, random, pca, which has one seed; stub's at once
    rows = {(row["name"], row["value"]): row["metrics"] for row in first["rows"]}
    assert rows["stub", 2]["function_fve"] == dict(mean=2, half=pytest.approx(12.706 / 2), values=[], null=None,
                                                    null_half=None)
    assert "function_fve" not in rows["stub", 1] | rows["random", 3]
    compare.main(cfg)
    assert (len(stub.log), len(stub.asked)) == (trained, asked) and results(cfg) == first
    away = {path: path.rename(path.with_suffix(".away")) for path in [*Path(cfg.runs).rglob("*.safetensors")]}
    compare.main(cfg)                                           # models that have answered everything are not needed
    assert len(away) == 6 and (len(stub.log), len(stub.asked)) == (trained, asked) and results(cfg) == first
    for path, there in away.items():
        there.rename(path)
    compare.main(dataclasses.replace(cfg, eval_tokens=360))
    assert len(stub.log) == trained and len(stub.asked) == 2 * asked
    compare.main(dataclasses.replace(cfg, tokens=60, methods="stub"))
    assert len(stub.log) == trained + 3 * 2 * 7


def test_a_page_of_the_first_seeds_is_written_once_and_its_failure_is_said(cfg, stub, monkeypatch, capsys):
    compare.main(cfg)
    page = Path(cfg.out) / "units.html"
    text = page.read_text()
    assert [text.count(f'"name":"{name}"') for name in ("stub", "random", "pca")] == [1, 1, 1] and "units.html: " in capsys.readouterr().out
    write = compare.gallery.write
    monkeypatch.setattr(compare.gallery, "write", lambda *args: 1 / 0)
    compare.main(cfg)                                                       # of the same models: it is kept
    assert page.read_text() == text
    page.write_text("damaged")
    fails(capsys, lambda: compare.main(cfg), "units.html: ZeroDivisionError", code=1)
    monkeypatch.setattr(compare.gallery, "write", write)
    compare.main(cfg)
    assert page.read_text() == text
    steps = len(stub.log)
    for path in Path(cfg.runs).rglob("*.safetensors"):
        path.unlink()
    compare.main(cfg)
    assert page.read_text() == text
    page.unlink(), capsys.readouterr()
    compare.main(cfg)                                                       # nothing is trained for a page
    assert not page.exists() and len(stub.log) == steps and "there is no model any more of stub" in capsys.readouterr().out


def test_a_narrowed_run_leaves_the_whole_table_alone(cfg, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare.main(dataclasses.replace(cfg, out=Config.out, metrics="faithfulness"))
    assert [p.name for p in tmp_path.glob("results*")] == ["results-part"]
    compare.main(dataclasses.replace(cfg, metrics="parts"))                 # an --out that was asked for is kept
    assert {row["value"] for row in results(cfg)["rows"]} == {2, 3}         # what would be asked nothing is not trained


def test_a_killed_run_goes_on_where_it_was(cfg, stub, tmp_path):
    stub.stop[2, 1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare.main(cfg)
    assert stub.log[-1] == (2, 1, 2) and [p.name for p in Path(cfg.out).iterdir()] == [".lock"]
    stub.stop.clear()
    compare.main(cfg)
    assert len(stub.log) == len(set(stub.log)) == 3 * 2 * 6                 # no step twice
    went_on = results(cfg)
    cfg.runs, cfg.out = str(tmp_path / "other runs"), str(tmp_path / "other")
    compare.main(cfg)
    assert results(cfg) == went_on


DAMAGES = {
    "truncated": lambda text: text[:len(text) // 2],
    "empty": lambda text: "",
    "no answers": lambda text: "{}",
    "a list": lambda text: "[1, 2]",
    "NaN": lambda text: re.sub(r'": -?[0-9.e-]+', '": NaN', text, count=1),
    "a number as a string": lambda text: re.sub(r'": (-?[0-9.e-]+)', r'": "\1"', text, count=1),
    "one digit": lambda text: re.sub(r"\d", lambda found: str((int(found[0]) + 1) % 10), text, count=1),
    "nested without end": lambda text: "[" * 100_000,
    "binary": lambda text: "\0\1\2",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_answers_whose_file_is_damaged_are_asked_for_anew(cfg, stub, damage):
    cfg.methods, cfg.seeds = "stub", 1
    compare.main(cfg)
    first, asked = results(cfg), len(stub.asked)
    kept = [*Path(cfg.runs).rglob("*-????????????.json")]
    assert len(kept) == 4
    for path in kept:
        path.write_text(damage(path.read_text()))
    compare.main(cfg)
    assert results(cfg) == first and len(stub.asked) == 2 * asked
    compare.main(cfg)
    assert len(stub.asked) == 2 * asked


def test_what_others_have_answered_is_neither_trained_nor_asked_again(cfg, stub, tmp_path, capsys):
    compare.main(cfg)
    first, steps, asked = results(cfg), len(stub.log), len(stub.asked)
    file = tmp_path / "answers.jsonl"
    file.write_bytes((Path(cfg.out) / "answers.jsonl").read_bytes())
    lines = file.read_text().splitlines(True)
    assert len(lines) == len({line.split()[0] for line in lines}) == 21     # 6 models, 9 floors; 2 and 3 on parts; all seeds
    def elsewhere(name, **change):
        capsys.readouterr()
        there = dataclasses.replace(cfg, answers=str(file), runs=str(tmp_path / name / "runs"), out=str(tmp_path / name), **change)
        compare.main(there)
        return results(there), (tmp_path / name / "answers.jsonl").read_text(), capsys.readouterr().out
    again, text, said = elsewhere("a")
    assert again == first and text == "".join(lines) and "21 of 21 answers are in" in said
    assert (len(stub.log), len(stub.asked)) == (steps, asked) and not [*(tmp_path / "a").rglob("*.safetensors")]
    assert "there is no model any more of stub" in said
    file.write_text("".join(lines[:-1]) + re.sub(r"\d", "7", lines[-1]))
    again, text, said = elsewhere("b")                              # a damaged line: its models are trained, and asked that
    assert again == first and text == "".join(lines) and "1 of 21 lines are damaged" in said and "20 of 21 answers" in said
    assert lines[-1].startswith("stub-k4-seed1") and len(stub.log) == steps + 6 and len(stub.asked) == asked
    file.write_text("".join(lines))
    _, _, said = elsewhere("c", tokens=60)                          # other models: only floors' answers are theirs
    assert len(stub.log) == steps + 6 + 3 * 2 * 7 and "12 of 21 answers" in said
    cfg.answers = "none"
    elsewhere_steps = len(stub.log)
    compare.main(dataclasses.replace(cfg, runs=str(tmp_path / "new")))
    assert len(stub.log) == elsewhere_steps + steps


@pytest.mark.parametrize("text, words", (
    (None, "No such file"), ("", "no answers of models"), ("{}\n", "no answers of models"), ("a {} b\n\0\1\xff", "no answers of models")))
def test_answers_that_are_none_are_refused(cfg, stub, tmp_path, capsys, text, words):
    cfg.answers = str(tmp_path / "x.jsonl")
    if text is not None:
        Path(cfg.answers).write_text(text, encoding="latin-1")
    fails(capsys, lambda: compare.main(cfg), f"{cfg.answers}: ", words)
    assert not stub.log


def test_a_second_run_into_one_folder_names_the_first_and_takes_over_from_a_dead_one(cfg, stub, capsys):
    holder = subprocess.Popen([sys.executable, "-c", f"import common; common.hold({cfg.out!r}); print(1, flush=True); input()"],
                              cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    fails(capsys, lambda: compare.main(cfg), cfg.out, str(holder.pid))
    assert not stub.log and [p.name for p in Path(cfg.out).iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    compare.main(cfg)
    assert stub.log and results(cfg)


def test_what_fails_is_a_row_and_the_exit_code(cfg, stub, capsys):
    stub.stop |= {(2, 1): ValueError("no luck"), (4, 0): SystemExit(1)}
    with pytest.raises(SystemExit) as e:
        compare.main(cfg)
    shown = capsys.readouterr()
    assert e.value.code == 1 and "no luck" in shown.err
    rows = {(row["name"], row["value"]): row for row in results(cfg)["rows"]}
    assert [bool(rows["stub", k]["failed"]) for k in (1, 2, 4)] == [False, True, True]
    assert not rows["stub", 2]["metrics"] and rows["stub", 1]["metrics"] and rows["pca", 3]["metrics"]
    line, = {s[:22].strip(): s for s in shown.out.splitlines() if s.startswith("stub ") and "0." not in s}.values()
    assert set(line.split()[1:]) == {"FAILED"}
    assert "FAILED" in (Path(cfg.out) / "table.csv").read_text()
    stub.stop.clear()
    compare.main(cfg)                               # the next run mends it
    assert not any(row["failed"] for row in results(cfg)["rows"])


def test_what_one_metric_fails_to_give_leaves_the_others(cfg, stub, monkeypatch):
    def moody(m, arena, gen):
        assert getattr(m, "R", None) is None or m.k != 2 or moody.calls, "first"
        return dict(coverage=1.), {}
    moody.calls = 0
    monkeypatch.setitem(compare.GROUPS, "parts", group(moody))
    cfg.methods = "stub"
    with pytest.raises(SystemExit):
        compare.main(cfg)
    row, = [row for row in results(cfg)["rows"] if row["value"] == 2]
    assert len(row["failed"]) == 2 and "parts: AssertionError: first" in row["failed"][0]
    assert row["metrics"]["fve"] and row["metrics"]["function_fve"] and "coverage" not in row["metrics"]
    assert table.cell(row, "coverage") == "FAILED" and table.cell(row, "fve") != "FAILED"
    assert table.cell(dict(row, metrics=dict(fve=noise.over_seeds([None, 0.5]))), "fve") == "0.500*"


def test_all_seeds_at_once_have_their_own_interval(cfg, stub, capsys):
    compare.main(dataclasses.replace(cfg, metrics="stability"))
    row, = results(cfg)["rows"]
    assert row["metrics"]["function_fve"]["half"] == pytest.approx(12.706 / 2)
    fails(capsys, lambda: compare.main(dataclasses.replace(cfg, metrics="stability", seeds=1)), "--metrics stability",
          "--seeds")


def test_controls_share_the_training_or_the_method(cfg, stub, monkeypatch):
    method = compare.METHODS["stub"]._replace(values=(2,))
    other = method._replace(change=dict(N=4))
    monkeypatch.setattr(compare, "METHODS", {"stub": method, "stub:other": other, "stub:untrained": method})
    compare.main(dataclasses.replace(cfg, seeds=1))
    assert len(stub.log) == 6 + 12 + 6                          # the stub, with a change, and on the untrained target
    rows = {row["name"]: row for row in results(cfg)["rows"]}
    of = lambda name, key: rows[name]["metrics"][key]["mean"]
    assert [rows[name]["floor"] for name in ("stub", "stub:other", "stub:untrained")] == [False, True, True]
    assert of("stub:other", "fve") != of("stub", "fve")
    assert of("stub:untrained", "ce_original") != of("stub", "ce_original") == of("pca", "ce_original")


def test_a_row_can_take_apart_the_model_that_it_makes(cfg, stub, monkeypatch):
    """As scratch.py does: its numbers are of that model, there are none of its seeds together, and a kill before it
    was written is made good."""
    plain, module = compare.METHODS["stub"]._replace(values=(2,)), types.SimpleNamespace(**vars(stub.module))
    module.TARGET, module.__name__, killed = "made", "stub", []
    def train(run):
        stub.module.train(run)
        if run.seed == 1 and not killed:
            killed.append(1)
            raise KeyboardInterrupt
        gpt = GPT.load(run.model)
        gpt.wte.weight.data.mul_(1 + run.seed)
        gpt.save(Path(run.out) / "made", gpt.vocab, gpt.meta)
    def load(path, gpt):
        assert gpt.folder == path.parent / "made"
        tensors, meta = common.load(path, method="stub")
        return stub.module.load(path, GPT.load(cfg.model))
    module.train, module.load = train, load
    rows = {"stub": plain, "stub:scratch": plain._replace(module=module, change=dict(N=4))}
    monkeypatch.setattr(compare, "METHODS", rows)
    with pytest.raises(KeyboardInterrupt):
        compare.main(cfg)
    compare.main(cfg)
    rows = {row["name"]: row for row in results(cfg)["rows"]}
    of = lambda name: rows[name]["metrics"]["ce_original"]["values"]
    made = [GPT.load(path).hash for path in sorted(Path(cfg.runs).glob("stub-k2-seed*/made"))]
    assert len(made) == 2 and of("stub")[0] == of("stub")[1] == of("stub:scratch")[0] != of("stub:scratch")[1]
    assert "function_fve" in rows["stub"]["metrics"] and "function_fve" not in rows["stub:scratch"]["metrics"]
    assert rows["stub:scratch"]["floor"] and rows["stub:scratch"]["own_target"]
    assert not [path for path in Path(cfg.runs).glob("*seeds*") if "scratch" in path.name]
    assert rows["stub:scratch"]["metrics"]["fve"]["null"] is None != rows["stub"]["metrics"]["fve"]["null"]


def test_keys_know_what_matters_and_nothing_else(cfg, stub, target, tmp_path):
    gpt, method = GPT.load(target), compare.METHODS["stub"]
    def folder(cfg=cfg, k=2, seed=0, **change):
        return Job("stub", "k", k, seed, True, method._replace(change=change)).config(cfg, gpt, 1).out
    same = folder()
    assert len({same, folder(k=4), folder(seed=1), folder(N=5)}) == 4
    assert folder(dataclasses.replace(cfg, eval_tokens=360, seeds=5, device="auto", out="elsewhere")) == same
    assert folder(dataclasses.replace(cfg, tokens=500)) != same
    own = tmp_path / "own.bin"
    own.write_bytes(Path(cfg.data).read_bytes()[:-2])
    assert folder(dataclasses.replace(cfg, data=str(own))) != same
    gpt.hash = "another"
    assert folder() != same


# ------------------------------------------------------------- methods that stand in files of their own
@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """own_file(name, text): the module that a file of this name and text is; called again, the edited one."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)       # two edits can be of one second

    def load(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(name)
    return load


SPD, PENALTY = (ROOT / "spd.py").read_text(), "return s_C.sum() / N,"
NEW_FLAG = "class Config:\n    bonus: float = 0.0              # nothing yet\n"
TINY_SPD = dict(C=8, B=2, ci_hidden=8, eval_every=0)


@pytest.fixture
def edited(cfg, own_file, monkeypatch):
    """A row for a copy of spd.py: edited.run(text) has the table made of it, with the file as it is now."""
    cfg = dataclasses.replace(cfg, seeds=1, tokens=96, methods="edited", metrics="faithfulness")
    monkeypatch.setattr(table.pictures, "draw", lambda results, out: None)

    def run(text=SPD, **change):
        method = compare.METHODS["spd"]._replace(module=own_file("edited", text), values=(1e-3,), change=TINY_SPD)
        monkeypatch.setitem(compare.METHODS, "edited", method)
        compare.main(dataclasses.replace(cfg, **change))
        return results(cfg)

    def files():
        return {path: path.read_bytes() for path in Path(cfg.runs).rglob("*") if path.is_file()}
    return types.SimpleNamespace(run=run, files=files, cfg=cfg)


def kl(found):
    return found["rows"][0]["metrics"]["kl"]


def test_a_model_of_other_code_is_never_silently_old_nor_trained_anew(edited, capsys):
    assert PENALTY in SPD
    first, files = edited.run(), edited.files()
    other = SPD.replace(PENALTY, "return 2 * s_C.sum() / N,")
    fails(capsys, lambda: edited.run(other), "edited", "edited.py", "--retrain", "--keep")
    assert edited.files() == files and results(edited.cfg) == first
    fails(capsys, lambda: edited.run(other, keep=True, retrain=True), "--retrain", "--keep")
    kept = edited.run(other, keep=True)
    models = {path: data for path, data in files.items() if path.suffix == ".safetensors"}
    assert models.items() <= edited.files().items() and kl(kept) == kl(first)
    anew = edited.run(other, retrain=True)
    assert kl(anew) != kl(first)
    files = edited.files()
    assert edited.run(other) == anew == edited.run(other, retrain=True) and edited.files() == files


def test_what_changes_no_number_costs_nothing(edited):
    """Comments, docstrings, line breaks, and a flag that is new."""
    first, files = edited.run(), edited.files()
    told = SPD.replace(PENALTY, "# a comment\n    " + PENALTY)
    told = told.replace('"""How much is called important?', '"""Of importance:')
    assert told.count("a comment") == told.count("Of importance:") == 1
    flag = told.replace("class Config:\n", NEW_FLAG)
    for text in (told, flag):
        assert text != SPD and edited.run(text) == first and edited.files() == files


@pytest.fixture
def half_trained(edited, monkeypatch):
    """`edited`, with a model whose training was killed after its first step; whole: the results of one that was not."""
    def killed(run):
        if run.step == 1:
            raise KeyboardInterrupt
        save(run)
    save, edited.whole = common.Run.save, edited.run(runs=edited.cfg.runs + "-whole")
    monkeypatch.setitem(TINY_SPD, "save_every", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", killed)
        edited.run()
    return edited


def test_a_half_trained_model_goes_on_with_a_new_flag(half_trained):
    assert kl(half_trained.run(SPD.replace("class Config:\n", NEW_FLAG))) == kl(half_trained.whole)


def test_what_other_code_began_stays_of_other_code(half_trained, capsys):
    """Whoever keeps half a model is told again, and one that is trained anew has nothing of the old."""
    other = SPD.replace(PENALTY, "return 2 * s_C.sum() / N,")
    stops = lambda: fails(capsys, lambda: half_trained.run(other), "edited.py", "--retrain", "--keep")
    stops()
    kept = half_trained.run(other, keep=True)
    stops()
    assert half_trained.run(other, keep=True) == kept
    anew = half_trained.run(other, retrain=True)
    assert len({json.dumps(kl(found)) for found in (half_trained.whole, kept, anew)}) == 3
    assert kl(anew) == kl(half_trained.run(other, runs=half_trained.cfg.runs + "-fresh"))


def test_another_default_is_other_training(edited, capsys):
    first, other = edited.run(), SPD.replace("lr: float = 0.02 ", "lr: float = 0.03 ")
    assert "lr: float = 0.02 " in SPD
    fails(capsys, lambda: edited.run(other), "lr=0.02, not 0.03")
    anew = edited.run(other, retrain=True)
    assert kl(anew) != kl(first)
    for path in Path(edited.cfg.runs).rglob("edited.safetensors"):
        path.unlink()                                           # what is known of both goes on without them
    assert edited.run() == first and edited.run(other) == anew
    edited.run(other, metrics="faithfulness,parts")             # .. and what is not is asked of the right one
    fails(capsys, lambda: edited.run(), "lr=0.03, not 0.02")
    assert edited.run(retrain=True) == first and edited.run() == first      # there is no old model any more


def test_code_has_one_hash_in_every_python():
    """Of 3.11 to 3.13, whose trees differ in what they write of what isn't there."""
    tree = ast.parse("def f(x: int):\n    'a docstring stays in a tree'\n    return [x, ()]")
    assert common.tree_text(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(posonlyargs=[], args=[arg(arg='x', annotation=Name(id='int', "
        "ctx=Load()))], kwonlyargs=[], kw_defaults=[], defaults=[]), body=[Expr(value=Constant(value='a docstring stays in "
        "a tree')), Return(value=List(elts=[Name(id='x', ctx=Load()), Tuple(elts=[], ctx=Load())], ctx=Load()))], "
        "decorator_list=[])], type_ignores=[])")


def test_what_training_imports_counts_and_what_looks_at_models_does_not(tmp_path):
    names = {"spd.py", "fused.py", "data.py", "model.py", "folders.py", "optimizers"}
    assert names == {*common.training_code(ROOT / "spd.py")}
    assert {"sae.py", "transcoder.py", "spd.py"} < {*common.training_code(ROOT / "stochastic.py")}
    (tmp_path / "helper.py").write_text("x = 1")
    (tmp_path / "fork.py").write_text("import helper\nimport evals\nfrom spd import loss_fn")
    assert {*common.training_code(tmp_path / "fork.py")} == names | {"fork.py", "helper.py"}
    assert common.training_code(tmp_path / "fork.py")["spd.py"] == common.training_code(ROOT / "spd.py")["spd.py"]


def test_a_fork_is_judged_as_what_it_is_a_copy_of(cfg, own_file, monkeypatch):
    monkeypatch.setattr(table.pictures, "draw", lambda results, out: None)
    method = compare.METHODS["spd"]._replace(values=(1e-3,), change=TINY_SPD)
    fork = own_file("spd_fork", SPD)
    monkeypatch.setattr(compare, "METHODS", {"spd": method, "spd-fork": method._replace(module=fork)})
    compare.main(dataclasses.replace(cfg, tokens=96, methods="spd,spd-fork", metrics="faithfulness,parts,stability"))
    spd, other = results(cfg)["rows"]
    assert other["name"] == "spd-fork" and spd["metrics"]["l0"]["mean"] % 1 != 0 != spd["metrics"]["kl"]["mean"]
    for row in (spd, other):
        assert not row["failed"] and row["metrics"].pop("seconds")
    assert spd["metrics"] == other["metrics"]
    gpt = GPT.load(cfg.model)
    m = fork.load(next(Path(cfg.runs).glob("spd-fork*seed0*/spd_fork.safetensors")), gpt)
    assert set(m.encode(1, torch.randn(2, 5, D), gpt.h[1].mlp).unique().tolist()) <= {0., 1.}


def test_a_comment_in_what_evaluates_costs_nothing(cfg, stub, tmp_path, monkeypatch):
    compare.main(cfg)
    asked, first, text = len(stub.asked), results(cfg), Path(evals.__file__).read_text()
    copy = tmp_path / "evals.py"
    copy.write_text('"""Something else."""\n# a comment\n' + text.split('"""', 2)[2])
    monkeypatch.setattr(evals, "__file__", str(copy))
    compare.main(cfg)
    assert len(stub.asked) == asked and results(cfg) == first
    copy.write_text(text + "\nSOMETHING = 1\n")
    compare.main(cfg)
    assert len(stub.asked) == 2 * asked and results(cfg)["rows"]


TOY = '''"""One random dictionary, which nothing trains."""
from dataclasses import dataclass
from pathlib import Path

import torch

import baselines
import common
import data
from model import GPT


@dataclass
class Config:
    model: str = "target"
    data: str = "tinytales"
    layer: int = -1
    out: str = "runs/toy"
    resume: bool = False
    device: str = "auto"
    seed: int = 0
    steps: int = 1
    N: int = 64
    T: int = 128
    F: int = 96
    k: int = 16
    eval_tokens: int = 0
    save_every: int = 1
    log_every: int = 1


MAY_CHANGE_ON_RESUME = {"model", "out", "resume", "device", "eval_tokens"}


def build(cfg, R_FD):
    return baselines.Dictionary(cfg.layer, R_FD, torch.zeros(R_FD.shape[1]), cfg.k)


def load(path, gpt):
    tensors, meta = common.load(path, method="toy", target=gpt.hash)
    return build(Config(**meta["config"]), tensors["m.R"])


def train(cfg):
    gpt = GPT.load(cfg.model)
    m = torch.nn.ParameterDict({"R": baselines.random_directions(cfg.F, gpt.cfg.n_embd, cfg.seed)})
    for step in common.Run(cfg, gpt, data.fingerprint(cfg.data), m=m).steps():
        pass
'''


@pytest.fixture
def of_the_bundled_target(monkeypatch):
    """What holds for it whatever takes it apart is found once for all tests; the budget of attacks is small."""
    real = compare.prepared
    monkeypatch.setattr(compare, "prepared", lambda *args: real(*args)._replace(once=of_the_bundled_target.once))
    masks = compare.GROUPS["robustness"]
    monkeypatch.setattr(masks, "attack", functools.partial(masks.attack, budgets=(0, 20)))


of_the_bundled_target.once = {}


def test_a_method_is_one_file_and_one_row(own_file, tmp_path, monkeypatch, capsys, of_the_bundled_target):
    """Its row has every number that a dictionary can have, in each table, and --explain says what it is."""
    monkeypatch.setattr(table.pictures, "draw", lambda results, out: None)
    monkeypatch.setitem(compare.METHODS, "toy", Method(own_file("toy", TOY), "k", (16,), {}, {}, "a toy of two words"))
    monkeypatch.chdir(tmp_path)
    cfg = Config(model=str(ROOT / "target"), methods="toy", seeds=2, tokens=64, eval_tokens=2560, explained=10,
                 device="cpu")
    compare.main(cfg)
    assert all(" toy " in part for part in (tmp_path / "results-part/table.md").read_text().split("| null")[:-1])
    row, = json.loads((tmp_path / "results-part/results.json").read_text())["rows"]
    assert not row["failed"]
    of_others = {key for key, column in table.COLUMNS.items() if column.table in ("masks", "by LLM", "studies")}
    assert {*table.COLUMNS} - of_others - {*row["metrics"]} == NOT_OF_THE_TOY
    assert row["metrics"]["tokens"]["mean"] == 64 and row["metrics"]["l0"]["mean"] <= 16
    capsys.readouterr()
    compare.main(Config(explain=True))
    assert re.search(r"^  toy +a toy of two words$", capsys.readouterr().out, re.M)


# numbers that mean nothing for random directions, or that two seeds on 20 stories don't give
NOT_OF_THE_TOY = {"absorption_fraction"}


def test_quick_and_narrowed(cfg, stub, monkeypatch):
    monkeypatch.setattr(compare, "QUICK", dict(compare.QUICK, tokens=50, eval_tokens=240))
    compare.main(dataclasses.replace(cfg, quick=True, methods="stub,pca", metrics="faithfulness", seeds=Config.seeds))
    found = json.loads(Path(cfg.out + "-quick/results.json").read_text())
    assert [(row["name"], row["value"]) for row in found["rows"]] == [("stub", 2), ("pca", 3)]
    assert not stub.asked and not Path(cfg.out).exists()
    assert max(map(len, table.render(found).splitlines())) <= 120
    known = found["rows"][0]["metrics"]
    assert known["l0"]["half"] is None and 0 < known["kl"]["half"] < 1       # over stories
    assert not any(key.endswith("_within") for key in known)


def test_values_of_seeds_and_their_nulls(cfg, stub):
    compare.main(cfg)
    rows = {(row["name"], row["value"]): row["metrics"] for row in results(cfg)["rows"]}
    values = rows["random", 3]["fve"]["values"]
    assert len(values) == 2 and values[0] != values[1] and len(rows["pca", 3]["fve"]["values"]) == 1
    assert rows["stub", 1]["fve"]["null"] == rows["pca", 2]["fve"]["mean"]          # the floor's nearest L0
    assert rows["stub", 4]["fve"]["null"] == rows["pca", 4]["fve"]["mean"]
    assert rows["stub", 4]["fve"]["null_half"] == rows["pca", 4]["fve"]["half"]
    ablated = results(cfg)["target"]["kl_mean_ablation"]
    assert rows["pca", 2]["kl"]["null"] == ablated > 0
    assert rows["stub", 1]["dead_fraction"]["null"] is None and rows["stub", 1]["l0"]["null"] is None
    assert "effective_rank" not in rows["stub", 1] and "fragmentation" not in rows["stub", 2]      # NaN: n/a


def row(name, l0, units, floor=False, **metrics):
    metrics = {key: dict(mean=mean, half=half, values=[mean]) for key, (mean, half) in metrics.items()}
    return dict(name=name, floor=floor, own_target=False, failed=[], seeds=[0], metrics=metrics | dict(
        l0=dict(mean=l0), alive_units=dict(mean=units)))


def test_nulls_are_of_floors_that_are_as_dense():
    some = [row("random", 8, 1000, True, rule_f1=(0.1, 0)), row("random", 64, 1000, True, rule_f1=(0.4, 0)),
            row("random", 32, 1000, True), row("spd", 10, 200, rule_f1=(0.5, 0.2), kl=(1, None),
                                               kl_mean_ablation=(3, None))]
    spd, of = some[-1], lambda row, key: (table.null(row, some, key) or {}).get("mean")
    assert of(spd, "rule_f1") == 0.4               # of 0.05 of the units, not of 10
    assert of(spd | dict(own_target=True), "rule_f1") is None       # these floors are of another target
    assert of(spd, "kl") == 3 and of(spd, "ce_recovered") == 0
    assert of(row("a", 10, 1000), "fve") is None
    own = row("a", 10, 1000, null_rule_f1=(0.3, None))
    assert of(own, "rule_f1") == 0.3
    for key, null, better in (("rule_f1", 0.2, True), ("rule_f1", 0.4, False), ("kl", 3, True), ("kl", 0.5, False)):
        spd["metrics"][key]["null"] = null
        assert table.beaten(spd, key) == better and ("°" in table.cell(spd, key)) == (not better)
    assert table.beaten(spd | dict(floor=True), "kl")
    # a null has an interval, too, whether it was measured or is a floor's
    spd["metrics"] |= dict(rule_f1=dict(mean=.5, half=.06, null=.4, null_half=.07, values=[]))
    assert table.beaten(spd, "rule_f1")
    spd["metrics"]["rule_f1"]["null_half"] = .09
    assert not table.beaten(spd, "rule_f1")
    some[1]["metrics"]["rule_f1"]["half"] = .3
    assert table.null(spd, some, "rule_f1")["half"] == .3
    assert table.null(row("a", 10, 1000, null_rule_f1=(0.3, .05)), some, "rule_f1")["half"] == .05


def test_nulls_are_floors_or_numbers_and_every_column_is_explained(capsys):
    compare.main(Config(explain=True))
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    for column in table.COLUMNS.values():
        assert f" {column.head} " in flat and column.text in flat and column.better in ("up", "down", "")
        assert isinstance(column.beat, (int, float)) or column.beat in (None, "mean ablation", "plain neurons",
                                                                            *compare.FLOORS)
    rows = compare.METHODS | compare.FLOORS
    assert all(f"  {name:<22} {row.text}\n" in shown and len(row.text) > 20 for name, row in rows.items())
    assert {column.table for column in table.COLUMNS.values()} == {*table.TABLES}
    assert all(len(table.keys_under(heading)) <= 8 for heading in table.TABLES)     # 120 columns of text
    assert len(table.COLUMNS) == len(table.OWN) + len(table.OF_STUDIES) + sum(len(module.COLUMNS) for module in compare.GROUPS.values())


@pytest.mark.parametrize("module", list(compare.GROUPS.values()), ids=list(compare.GROUPS))
def test_each_number_is_found_by_searching_for_its_key_in_the_file_that_computes_it(module):
    text = Path(module.__file__).read_text()
    assert all(f'"{key}"' in text for key in module.COLUMNS)


@pytest.mark.parametrize("l0s, where", [
    ((8, 32), 0.5), ((8, 16, 32), 1), ((16.5,), 0), ((2, 15.5), 1), ((15.3, 64), math.log(16 / 15.3, 64 / 15.3))])
def test_numbers_at_one_l0_are_read_off_the_curve(l0s, where):
    """16 is half-way between 8 and 32 in log L0; what ends within 5 % of it counts as there."""
    curve = [dict(l0=l0, ce_recovered=i, fve=2 * i, kl_recovered=None) for i, l0 in enumerate(l0s)]
    want = dict(ce_recovered_at=where, fve_at=2 * where)
    assert table.at_one_l0(curve[::-1]) == pytest.approx(want)


@pytest.mark.parametrize("l0s", [(), (2, 15), (17, 30), (None,)])
def test_a_curve_that_does_not_reach_that_l0_has_no_number_there(l0s):
    assert table.at_one_l0([dict(l0=l0, ce_recovered=1.0) for l0 in l0s]) == {}


def test_studies_of_the_target_have_columns(cfg, stub):
    metric = dict(mean=.5, half=.1, values=[.4, .6])
    for name, column, of in (("sizes", "canonicity", GPT.load(cfg.model).hash), ("map", "degree", "another target")):
        study = dict(columns={"stub": {column: metric, f"null_{column}": metric | dict(mean=.1)}}, provenance=dict(target=of))
        common.write(Path(cfg.out) / f"{name}.json", json.dumps(study).encode())
    compare.main(cfg)
    by_value = {row["value"]: row["metrics"] for row in results(cfg)["rows"] if row["name"] == "stub"}
    assert by_value[2]["canonicity"] == metric | dict(null=.1, null_half=.1)
    assert "degree" not in by_value[2] and "canonicity" not in by_value[1]
    assert "| stub | 0.500±.100 |" in (Path(cfg.out) / "table.md").read_text()


def test_each_column_has_a_metric_that_finds_it(of_the_bundled_target):
    """All groups of metrics, of small untrained models of the bundled target."""
    gpt, ms = GPT.load(ROOT / "target"), []
    for seed in range(3):
        run = compare.spd.Config(C=8, ci_hidden=8, seed=seed)
        ms.append(compare.spd.Rounded(compare.spd.build(run, gpt), 0.1))
    cfg, found = Config(eval_tokens=2560, explained=10), {}
    arena = compare.prepared(cfg, gpt, 1, torch.device("cpu"))
    for group, module in compare.GROUPS.items():
        if group != "judged":
            subject = ms if group in compare.TOGETHER else ms[0]
            numbers, details = module.measure(subject, arena, common.generator(0, group))
            assert numbers.keys() == module.COLUMNS.keys() and not numbers.keys() & details.keys()
            found |= numbers | details
    assert json.dumps(metrics.answers.finite(found))
    found |= table.at_one_l0([found | dict(l0=table.AT)])
    wanted = {key for key, column in table.COLUMNS.items() if column.table not in ("by LLM", "studies")}
    assert wanted - set(found) == {"tokens", "steps", "seconds"}


@pytest.mark.parametrize("change, words", [
    (dict(methods="spd,sea"), ["--methods sea", "transcoder"]), (dict(metrics="beauty"), ["--metrics beauty", "parts"]),
    (dict(layer=2), ["--layer 2", "in [0, 1]"]), (dict(seeds=0), ["--seeds 0"]), (dict(tokens=0), ["--tokens 0"]),
    (dict(eval_tokens=5), ["--eval_tokens 5", "24"]), (dict(explained=0), ["--explained 0"]),
    (dict(judge_url="http://x"), ["--judge_model"]),
    (dict(judge_url="http://x", judge_model="y", metrics="parts"), ["--judge_url", "judged among --metrics"]), (dict(metrics="judged"), ["--judge_url"]),
    (dict(readme=True), ["--readme", "results/"]), (dict(data="nothing.bin"), ["nothing.bin"]),
    (dict(model="nowhere"), ["nowhere"])])
def test_bad_input_is_one_line_and_exit_code_2(cfg, capsys, change, words):
    fails(capsys, lambda: compare.main(dataclasses.replace(cfg, **change)), *words)
    assert not Path(cfg.out).exists() and not Path(cfg.runs).exists()


def made_up(first="a"):
    """Results of two methods and a floor, with intervals and pictures' data."""
    some = types.SimpleNamespace(module=None)
    known = lambda x: dict(ce_original=1., ce_mean_ablation=2., ce_zero_ablation=3., kl_mean_ablation=1., l0=20 * x,
                           ce_recovered=x, active_params=1e4 * x, rule_det_hard=x, attack={"0": x, "20": 2 * x},
                           alive_curve={"0.0": [9, 8], "0.1": [7, 6]}, spectrum={"in": [x, 0.1], "out": [0.3, 0.]})
    found = [(Job(name, "k", k, seed, k == 2, method), known(x + 0.1 * seed + k / 20), None) for seed in (0, 1)
             for name, method, x in ((first, some, 0.5), ("b", some, 0.6), ("random", None, 0.3)) for k in (1, 2)]
    together = {f"{space}_shared_0.7{part}": x for space, x in (("weights", 0.42), ("activations", 0.62))
                for part, x in (("", x), ("_se", 0.01))} | {"null_weights_shared_0.7": 0.1}
    found += [(Job(name, "k", 2, None, True, some), together, None) for name in (first, "b")]
    return table.assemble(found, dict(layer=1, config=dict(seeds=2, eval_tokens=100, quick=False)))


def test_differences_from_spd_come_last():
    """b is 0.1 above spd in both seeds, whose spread is as large: that may be noise."""
    found = made_up("spd")
    differences = {(d["name"], d["metric"]): d["by"] for d in found["differences"]}
    assert differences == pytest.approx({("b", "rule_det_hard"): 0.1, ("b", "activations_shared_0.7"): 0.})
    (group, *_), (last, heads, rows) = table.tables(found)[-2:]
    assert group == last == "minus spd" and rows == [["b", "+0.100°", "n/a", "n/a", "n/a", "0.000°"]]
    assert heads[0] == "det hard ↑" and "Holm" in table.render(found) and "Holm" not in table.render(made_up())


def test_pictures_and_files(tmp_path):
    table.write(made_up(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alive.png", "attack.png", "curves.png", "results.json", "spectrum.png", "stability.png", "table.csv",
        "table.md", "words.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text, sheet = (tmp_path / "table.md").read_text(), (tmp_path / "table.csv").read_text().splitlines()
    row, = [line for line in sheet if line.startswith("a,k,2,2,ce_recovered")]
    mean, half, null = map(float, row.split(",")[6:9])
    assert mean == pytest.approx(0.65) and half == pytest.approx(12.706 * 0.05) and null == 0
    assert "0.650±.635" in text and "0.600" not in text                 # the middle sparsity alone
    row, = [line for line in sheet if line.startswith("a,k,2,2,weights_shared_0.7")]
    mean, half, null = map(float, row.split(",")[6:9])                  # of all seeds at once: its own error and null
    assert (mean, null) == (0.42, 0.1) and half == pytest.approx(12.706 * 0.01)


def test_the_table_replaces_what_is_between_the_markers(tmp_path, capsys):
    readme, markdown = tmp_path / "README.md", "| a |\n|---|\n| \\1 |\n"
    first, last = table.MARKERS
    readme.write_text(f"before\n{first}\nold\\1\n{last}\nafter\n")
    table.embed(markdown, readme)
    once = readme.read_text()
    assert once == f"before\n{first}\n{markdown}{last}\nafter\n"
    table.embed(markdown, readme)
    assert readme.read_text() == once
    readme.write_text("no markers")
    fails(capsys, lambda: table.embed(markdown, readme), "markers")
    assert readme.read_text() == "no markers"


@pytest.mark.skipif(not (ROOT / "results/results.json").exists(), reason="no results are committed")
def test_the_committed_tables_are_what_the_committed_results_say():
    """Byte for byte: results.json is written in its own words, and the tables are rendered from it."""
    found = json.loads((ROOT / "results/results.json").read_bytes())
    for name, text in table.files(found).items():
        assert (ROOT / "results" / name).read_bytes() == text.encode(), name


def test_the_committed_table_is_what_the_committed_answers_say(tmp_path, monkeypatch):
    """Without a model: the default command finds all of its answers, unless code has changed since that they depend on."""
    committed = json.loads((ROOT / "results/results.json").read_bytes())
    for study in table.STUDIES:
        (tmp_path / f"{study}.json").write_bytes((ROOT / f"results/{study}.json").read_bytes())
    cfg = Config(model=str(ROOT / "target"), answers=str(ROOT / Config.answers), out=str(tmp_path), runs=str(tmp_path / "runs"), page=False)
    unanswered = []
    monkeypatch.setattr(compare, "subject_of", lambda job, *_: unanswered.append(job) or common.fail(f"no answers of {job}"))
    with contextlib.suppress(SystemExit):
        compare.main(cfg)
    if unanswered:
        pytest.skip(f"the code has changed since: {len(unanswered)} jobs have no answers")
    assert json.loads((tmp_path / "results.json").read_bytes())["rows"] == committed["rows"]
    assert (tmp_path / "answers.jsonl").read_bytes() == (ROOT / Config.answers).read_bytes()


@pytest.mark.parametrize("name", ["spd-length", "native", "sizes", "map", "across", "tuning"])
def test_the_committed_page_of_a_study_is_what_its_numbers_say(name):
    """Line for line: a page goes with the code that writes it. (The file of across has its rows in another order.)"""
    study = importlib.import_module(f"studies.{'tune' if name == 'tuning' else name.removeprefix('spd-')}")
    found = json.loads((ROOT / "results" / f"{name}.json").read_bytes())
    found = found["rows"] if name == "tuning" else found
    text = study.maps.render(found, study.names_in(found)) if name == "map" else study.render(found)
    lines = [page.splitlines() for page in ((ROOT / "results" / f"{name}.md").read_text(), text)]
    assert lines[0] == lines[1] or name == "across" and sorted(lines[0]) == sorted(lines[1])


@pytest.mark.parametrize("page", ["sizes.md", "map.md", "across.md", "native.md", "digits.md", "apd.md"])
def test_what_is_said_of_a_study_is_on_its_page(page):
    """Each number of two digits or more that the narrative has of a study."""
    said, = re.findall(rf"^- \[{page}\].*?(?=\n- |\n\n)", (ROOT / "results/README.md").read_text(), re.M | re.S)
    shown = set(re.findall(r"\d+(?:\.\d+)?", (ROOT / "results" / page).read_text()))
    numbers = re.findall(r"\d+\.\d+|\d{2,}", said)
    assert len(numbers) > 3 and not {*numbers} - shown


@pytest.mark.skipif(not (ROOT / "results/README.md").exists(), reason="nothing is said about results")
def test_the_narrative_says_what_the_results_say():
    """Each "mean ± half" and each "null" in it is that of the **column** and the `row` named last."""
    text, found = (ROOT / "results/README.md").read_text(), json.loads((ROOT / "results/results.json").read_text())
    assert narrative.fill(text, found) == text
    numbers = [kind for kind in narrative.TOKEN.finditer(text) if kind["mean"] or kind["null"]]
    assert len(numbers) > 40 and len(text.splitlines()) <= 90


def test_a_text_gets_the_numbers_of_what_it_names_last(capsys):
    def row(name, middle=True, **metrics):
        return dict(name=name, middle=middle, metrics=metrics)
    found = dict(columns=dict(ce=dict(head="CE @16"), kl=dict(head="KL")), rows=[
        row("spd", False, ce=dict(mean=7, half=7, null=7)),
        row("spd", ce=dict(mean=0.9549, half=0.0126, null=0.0004), kl=dict(mean=11074.2, half=82, null=None)),
        row("sae", ce=dict(mean=-1.5, half=0., null=0))])
    said = "**CE\n@16** and `spd.py`: of `spd` {} ±\n{} (null {}), **bold** `sae` {} ± {}, by **KL** `spd` {} ± {}, 3 of 4."
    old, new = [said.format(*numbers) for numbers in (
        ("0.1", "0.234", "5.5", "2", "1.25", "-3", "0"), ("1.0", "0.013", "0.0", "-2", "0.00", "11074", "82"))]
    assert narrative.fill(old, found) == new == narrative.fill(new, found)
    for text, words in (("**KL** `spd` null 3", "no null of **KL** of `spd`"), ("**KL** `sae` 1 ± 2", "no mean of **KL** of `sae`"),
                        ("1 ± 2", "1"), ("`spd` null 3", "of `spd`")):
        fails(capsys, lambda: narrative.fill(text, found), words)
