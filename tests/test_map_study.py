"""map.py: what it holds against what, that it finds nothing twice, its evidence on models whose answer is known, what it shows."""
import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch

import common
import compare
import spd
from baselines import SVD, Neurons
from compare import Floor
from conftest import M
from metrics import mapping
from model import GPT
from report import maps
from studies import map as study
from studies.map import Config, Pair, Units
from test_common import fails

ROWS = dict(
    spd=compare.METHODS["spd"]._replace(change=dict(C=M, B=2, ci_hidden=8)),
    transcoder=compare.METHODS["transcoder"]._replace(change=dict(F=24, N=24), values=(2, 4, 6)))


@pytest.fixture
def cfg(target, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "METHODS", ROWS)
    monkeypatch.setattr(compare, "FLOORS", {"neurons": Floor((2, 4, 6), ""), "random": Floor((2, 4, 6), "", has_seeds=True)})
    monkeypatch.setattr(compare, "floor_units", lambda cfg: 20)
    monkeypatch.setattr(mapping, "coherence", functools.partial(mapping.coherence, draws=20, union_draws=5))
    monkeypatch.setattr(study, "CASES", 3)
    monkeypatch.setattr(study, "FLOORS", ("random",))
    return Config(model=str(target), data=str(target / "x.bin"), device="cpu", methods="spd,transcoder", seeds=2, tokens=48,
                  eval_tokens=1200, pairs=4, rows=4, out=str(tmp_path / "results"), runs=str(tmp_path / "runs"))


def arena_of(cfg):
    gpt = GPT.load(cfg.model)
    return compare.prepared(compare.Config(cfg.model, cfg.data, eval_tokens=cfg.eval_tokens), gpt, 1, torch.device("cpu"))


def units(m, arena):
    return Units(m, arena, *[study.recording.record(m, arena.gpt, *split) for split in (arena.fit, arena.test)])


# ----------------------------------------------------------------------------------------- the runs
def test_each_two_rows_each_row_and_a_floor_and_each_row_and_its_next_seed_are_held_against_each_other():
    names = ["spd", "sae", "spd clusters", *study.FLOORS]
    assert study.rows_asked(Config(methods="spd,sae")) == names
    todo = study.pairs(names, 3)
    assert [pair[:2] for pair in todo if pair.seed == 1 and pair.one != pair.other] == [
        ("spd", "sae"), ("spd", "neurons"), ("spd", "random"), ("sae", "spd clusters"), ("sae", "neurons"), ("sae", "random"),
        ("spd clusters", "neurons"), ("spd clusters", "random")]
    ceilings = [pair for pair in todo if pair.one == pair.other]
    assert [pair[2:] for pair in ceilings if pair.one == "sae"] == [(0, 1), (1, 2), (2, 0)] and len(ceilings) == 9
    assert [pair[2:] for pair in study.pairs(["sae"], 2)] == [(0, 1)] and study.pairs(["sae"], 1) == []
    assert ":" not in "".join(study.rows_asked(Config(methods="all")))


def read(cfg):
    return json.loads((Path(cfg.out) / "map.json").read_text())


def test_a_killed_run_goes_on_and_a_second_one_finds_all_and_says_the_same(cfg, capsys, monkeypatch):
    stop_at, done, find = 3, [], study.MEASURES["evidence"]

    def stop(*args):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(args)
        return find(*args)
    monkeypatch.setitem(study.MEASURES, "evidence", stop)
    with pytest.raises(KeyboardInterrupt):
        study.main(cfg)
    kept = read(cfg)
    assert [len(kept[name]) for name in ("maps", "groups", "evidence")] == [4, 4, 3] and len(done) == 3
    stop_at = None
    study.main(cfg)
    found, out = read(cfg), capsys.readouterr().out
    assert len(found["maps"]) == len(found["evidence"]) == len(done) == 13
    assert all(row in found["maps"] for row in kept["maps"]) and "left" in out
    degree = found["columns"]["spd"]["degree"]
    assert degree["values"] == [row["degree_a"] for row in found["maps"] if (row["one"], row["other"]) == ("spd", "transcoder")]
    assert found["columns"].keys() == {"spd", "transcoder"} and len(degree["values"]) == 2
    text = (Path(cfg.out) / "map.md").read_text()
    assert text in out and (Path(cfg.out) / "map.png").stat().st_size > 10_000
    for words in ("### One to one: spd and transcoder", "| another seed of it |", "| floor: random |", "spd clusters"):
        assert words in text
    for name in study.MEASURES:
        monkeypatch.setitem(study.MEASURES, name, None)
    monkeypatch.setattr(spd, "train", None)
    monkeypatch.setattr(study.curve, "save_picture", None)
    away = {path: path.rename(path.with_suffix(".away")) for path in [*Path(cfg.runs).rglob("*.safetensors")]}
    study.main(cfg)                                     # no model is needed any more
    for path, there in away.items():
        there.rename(path)
    assert {k: v for k, v in read(cfg).items() if k != "provenance"} == {k: v for k, v in found.items() if k != "provenance"}
    with pytest.raises(TypeError):                      # another size is another number
        study.main(dataclasses.replace(cfg, eval_tokens=1400))


@pytest.mark.parametrize("change, words", [
    (dict(methods="spd,x"), "--methods x"), (dict(cases="spd"), "--cases spd"), (dict(cases="spd,random"), "two of the rows"),
    (dict(pairs=0), "--pairs 0"), (dict(layer=9), "--layer 9"), (dict(seeds=11), "--seeds 11"), (dict(eval_tokens=1), "--eval_tokens 1"),
    (dict(keep=True, retrain=True), "--retrain --keep")])
def test_bad_input_is_one_line(cfg, capsys, change, words):
    fails(capsys, lambda: study.main(dataclasses.replace(cfg, **change)), words)
    assert not Path(cfg.out).exists() and not Path(cfg.runs).exists()


def test_models_of_other_code_and_units_that_are_hardly_on_are_one_line(cfg, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        study.main(dataclasses.replace(cfg, eval_tokens=24))
    assert stopped.value.code == 1 and "spd seed 0: 0 of its units are on" in capsys.readouterr().err
    monkeypatch.setattr(compare, "out_of_date", lambda run, module: ["spd.py"])
    fails(capsys, lambda: study.main(cfg), "trained by other code", "--retrain")


# -------------------------------------------------------------------------------------- the evidence
@pytest.fixture
def svd(cfg):
    """An SPD that is on at half of the tokens, and itself with components turned round: (-V, -U)."""
    arena = arena_of(cfg)
    m, turned = SVD(1, arena.gpt.mlp(1), 4), SVD(1, arena.gpt.mlp(1), 4)
    for tensors in (turned.V, turned.U):
        for tensor in tensors:
            tensor.data *= -1
    return units(m, arena), units(turned, arena)


def test_partners_that_are_one_component_agree_in_all_whatever_their_signs(svd, cfg):
    one, turned = svd
    for other in (one, turned):
        found = study.evidence(one, other, dataclasses.replace(cfg, pairs=16), common.generator(0, "x"))
        assert found["pairs"] > 5 and found["against"] == 0
        for key in ("r", "read", "write", "effect"):
            assert found[key] == pytest.approx(1, abs=1e-3), key
            assert found[f"null_{key}"] < 0.8 and found[f"next_{key}"] < 0.98, key


def test_the_next_partner_is_the_most_alike_of_the_others(svd):
    one, turned = svd
    i, best, following = study.matched_pairs(one, turned, 16, common.generator(0, "x"))
    r_FG, _ = study.graph(one.fit, turned.fit, one.row, common.generator(0, "x"))
    for p in range(len(i)):
        assert best[p] == i[p] and r_FG[i[p]].argsort(descending=True)[1] == following[p]


def test_cosines_are_turned_round_only_where_units_have_a_sign(svd, cfg, monkeypatch):
    """Two units that are never on together have r below 0; without a sign, that says nothing of their weights."""
    one, turned = svd
    i = torch.arange(one.fit.F)
    cfg = dataclasses.replace(cfg, pairs=16)
    monkeypatch.setattr(study, "matched_pairs", lambda one, other, most, gen: (i, i, i))
    monkeypatch.setattr(study, "correlation_of_pairs", lambda *_: -torch.ones(len(i)).double())
    signed = study.evidence(one, one, cfg, common.generator(0, "x"))
    assert (one.test.value_E < 0).any() and signed["r"] == 1 and signed["read"] == pytest.approx(-1, abs=1e-5)
    one.test.value_E = one.test.value_E.abs()
    unsigned = study.evidence(one, one, cfg, common.generator(0, "x"))
    assert unsigned["r"] == -1 and unsigned["read"] == pytest.approx(1, abs=1e-5) and unsigned["against_read"] == 0
    assert signed["against_read"] == signed["against"] == 1


def test_neurons_are_neurons_and_components_that_are_singular_vectors_are_not(svd, cfg):
    one, _ = svd
    neurons = units(Neurons(1, one.arena.gpt.mlp(1), 4), one.arena)
    found = study.neuron_numbers(neurons, neurons, common.generator(0, "x"))
    for key in ("write", "write_0.7", "write_0.9", "both_0.7", "both_0.9", "found_0.9"):
        assert found[key] == pytest.approx(1, abs=1e-5), key
    assert found["units"] == neurons.fit.F and found["null_write_0.9"] < 0.5 and found["null_both_0.9"] < 0.2
    other = study.neuron_numbers(one, neurons, common.generator(0, "x"))
    # only what W_in's components read can be compared
    best = study.matching.cosines(one.write_FD, neurons.write_FD).max(1)
    is_in = one.block_of(one.fit.origin_F) == 0
    read = study.read_cosines(one, neurons, torch.arange(one.fit.F), best.indices)
    assert torch.equal(read.isnan(), ~is_in) and other["write"] == pytest.approx(best.values.mean().item())
    turned = study.neuron_numbers(svd[1], neurons, common.generator(0, "x"))
    assert {k: v for k, v in turned.items() if "null" not in k} == pytest.approx({k: v for k, v in other.items() if "null" not in k})
    read = read * one.sign_F * neurons.sign_F[best.indices]
    assert other["both_0.7"] == ((best.values >= .7) & (read >= .7))[is_in].double().mean().item()
    assert other["found_0.7"] == len({j for j, c in zip(best.indices.tolist(), best.values) if c >= .7}) / neurons.fit.F


def test_what_is_not_known_is_no_evidence_against_or_for():
    assert study.share_below_0(torch.tensor([-1., 1., torch.nan, 2.])) == pytest.approx(1 / 3)


def test_what_only_another_run_asked_is_forgotten():
    rows = [dict(one="a", other="b", seed=0, other_seed=n, x=n) for n in range(3)]
    found = {name: list(rows) for name in (*study.MEASURES, "cases", "clusters")}
    study.keep_asked(found, [study.Pair("a", "b", 0, 2), study.Pair("a", "c", 0, 1)], study.Pair("a", "b", 0, 1))
    assert found == {"maps": rows[2:], "groups": rows[2:], "evidence": rows[2:], "cases": rows[1:2], "clusters": rows}


def test_an_spd_that_is_trained_for_longer_is_no_other_method():
    degrees = {("spd", "sae"): 1, ("spd-long", "sae"): 3, ("spd", "spd-long"): 50, ("sae", "sae"): 50, ("sae", "pca"): 50}
    found = {"maps": [dict(one=one, other=other, seed=0, degree_a=d, degree_b=2 * d, null_degree_a=0, null_degree_b=0)
                      for (one, other), d in degrees.items()]}
    assert {name: row["degree"]["mean"] for name, row in study.columns(found).items()} == {"spd": 1, "sae": 4, "spd-long": 3}


def test_weights_are_compared_where_they_can_be(svd, cfg):
    """Not of clusters, not across matrices, and what is read only with what reads the same thing."""
    one, _ = svd
    arena = one.arena
    where = one.block_of(one.fit.origin_F)
    i, j = (where == 0).nonzero()[:1, 0], (where == 1).nonzero()[:1, 0]
    assert study.write_cosines(one, one, i, j).isnan() and study.read_cosines(one, one, i, j).isnan()
    neurons = units(Neurons(1, arena.gpt.mlp(1), 4), arena)
    zero = torch.tensor([0])
    assert not study.write_cosines(one, neurons, i, zero).isnan() and not study.write_cosines(one, neurons, j, zero).isnan()
    assert study.read_cosines(one, neurons, j, zero).isnan()
    V_D, W_D = one.m.V[0][:, one.fit.origin_F[i[0]]], arena.gpt.mlp(1).c_fc.weight[:, neurons.fit.origin_F[0]]
    assert study.read_cosines(one, neurons, i, zero).item() == pytest.approx(torch.cosine_similarity(V_D, W_D, 0).item(), abs=1e-5)
    clusters = Units(one.m, arena, *one.recorded, torch.zeros(one.fit.F, dtype=torch.long))
    assert study.write_cosines(clusters, neurons, zero, zero).isnan() and clusters.similarities() == {}
    assert clusters.switched(zero).sum() == one.fit.F and one.switched(i).nonzero()[:, 1] == one.fit.origin_F[i]
    assert clusters.label(0).count(" + ") == one.fit.F - 1


def test_what_a_unit_writes_does_not_depend_on_which_units_take_part(svd):
    one, _ = svd
    whole = study.recording.write_directions(study.recording.contributions(one.m, one.recorded[0]))
    one.often = one.often[::2]
    assert torch.allclose(one.write_FD, whole[one.often])


def test_a_case_is_as_clear_as_its_weakest_link_on_test():
    r_FG, is_edge_FG = torch.tensor([[.9, .5, .1], [.2, .6, .8]]), torch.tensor([[True, True, False], [False, False, False]])
    cases = [mapping.Case([0], [0, 1], 1.), mapping.Case([1], [], 1.), mapping.Case([], [2], 1.)]
    assert [study.clearness(case, r_FG, is_edge_FG) for case in cases] == pytest.approx([.5, .8, .8])


# ------------------------------------------------------------------------------------ what it shows
def test_a_row_is_seen_from_both_sides():
    row = {"one": "x", "other": "y", "seed": 0, "cka": .5, "null_cka": .1, "degree_a": 1., "degree_b": 2., "null_orphan_b": .9,
           "one_to_many_a": .3, "one_to_many_b": .6, "subsumed_a": .7, "superset_b": .8, "r2_5_a": .4, "r2_5_b": .2,
           "orphan_a_0.3": .1}
    own, back = maps.views([row], "x", "y"), maps.views([row], "y", "x")
    assert own == [maps.seen_from(row, "a")] and back == [maps.seen_from(row, "b")] and maps.views([row], "x", "x") == []
    own, back = own[0], back[0]
    assert own["cka"] == back["cka"] == .5 and own["null_cka"] == .1
    assert (own["degree"], own["back_degree"], back["degree"]) == (1, 2, 2)
    assert own["orphan_0.3"] == .1 and own["null_back_orphan"] == back["null_orphan"] == .9
    # one of x and several of y is, to y, many to one; a part of y's is, to y, a unit that has parts
    assert own["one_to_many"] == .3 and back["many_to_one"] == .6
    assert own["subsumed"] == .7 and back["subsumed"] == .8
    assert (own["back_r2_5"], back["back_r2_5"]) == (.2, .4)


def test_cells_have_intervals_and_nulls():
    rows = [dict(z=value, null_z=0., same=1., less=-value) for value in (3., 4., 5.)]
    half = 4.303 / math.sqrt(3)
    assert maps.cell(rows, "z", 1) == f"4.0 ± {half:.1f} (0.0)" and maps.cell(rows[:1], "z", 0) == "3 (0)"
    assert maps.number([dict(z=-.001)], "z") == "0.00"
    assert maps.cell(rows, "none") == "n/a"


def test_answers_need_more_than_noise_beside_neurons():
    """Parts in wholes of "spd" are far above, far below and within the noise of those in neurons; one question has no
    answer of one seed, and alone it is no answer."""
    def group(whole, seed, z_write, z_read, z_f1, gain):
        asked = dict(z_write=z_write, z_read=z_read, z_f1=z_f1, gain=gain, groups=2)
        return dict(one="sae", other=whole, seed=seed) | {f"{key}_a": value for key, value in asked.items()}
    rows = [group("spd", seed, 5. + noise, -5. + noise, 1. + noise, noise if seed else None)
            for seed, noise in enumerate((0., .1, .2))]
    rows += [group("neurons", seed, noise, noise, 1.1 + noise, noise) for seed, noise in enumerate((0., .1, .2))]
    names = maps.Names(["spd", "sae", "neurons"], ("neurons",), ("spd",))
    *_, line, _ = maps.answers(dict(groups=rows), names)
    assert line == "| sae in spd | more: 5.1 / 0.1 | less: -4.9 / 0.1 | not shown: 1.1 / 1.2 | 0.15 / 0.10 |"
    few = [row for row in rows if row["seed"] == 0]
    assert maps.answers(dict(groups=few), names)[-2] == "| sae in spd | 5.0 / 0.0 | -5.0 / 0.0 | 1.0 / 1.1 | n/a / 0.00 |"
    assert maps.answers(dict(groups=[]), names) == []


def test_in_the_picture_what_hangs_together_stands_together():
    order_F, order_G = torch.randperm(6, generator=common.generator(0, "f")), torch.randperm(7, generator=common.generator(0, "g"))
    is_edge_FG = torch.zeros(6, 7, dtype=torch.bool)
    for i, j in ((0, 0), (1, 1), (2, 2), (2, 3), (3, 4), (4, 4)):           # 1:1 twice, 1:2, 2:1; a unit of A and two of B alone
        is_edge_FG[i, j] = True
    is_edge_FG = is_edge_FG[order_F][:, order_G]
    panel = maps.Panel("a", "b", is_edge_FG * 0.9, is_edge_FG)
    i, j = maps.in_order(panel)
    shown = is_edge_FG[i][:, j]
    assert shown[:2, :2].sum() == 2 and not shown[5].any() and not shown[:, 5:].any()
    rows, columns = shown.nonzero(as_tuple=True)
    assert (columns.diff() >= 0).all()                                       # a staircase
    assert maps.picture([panel, panel]).get_axes()
