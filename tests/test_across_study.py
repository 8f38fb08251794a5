"""across.py: what it asks of whom, that it finds nothing twice, and how its tables are made."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import common
import compare
from conftest import D, M
from metrics import attribution, matching
from model import GPT
from studies import across
from studies.across import Config, Entry
from test_common import fails

SMALL = dict(F=24, N=60)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Rows of the table and SAEs that are trained in no time. In few dimensions all features are alike."""
    rows = {"spd": (dict(C=M, B=2, ci_hidden=8), 1e-4), "transcoder": (SMALL, 4)}
    with pytest.MonkeyPatch.context() as patch:
        for name, (change, value) in rows.items():
            patch.setitem(compare.METHODS, name, compare.METHODS[name]._replace(change=change, values=(value,)))
        for name, method in across.SAES.items():
            patch.setitem(across.SAES, name, method._replace(change=method.change | SMALL, values=(6,)))
        patch.setattr(attribution, "EQUAL", 0.95)
        yield


@pytest.fixture(scope="module")
def cfg(target, tmp_path_factory):
    """Of a target whose MLP writes more than all that is in the stream."""
    folder = tmp_path_factory.mktemp("across")
    gpt = GPT.load(target)
    gpt.mlp(1).c_proj.weight *= 5
    gpt.save(folder / "loud", gpt.vocab, {"layer": 1})
    return Config(model=str(folder / "loud"), data=str(target / "x.bin"), device="cpu", methods="spd,transcoder", seeds=2, tokens=60, eval_tokens=600, each=20,
                  out=str(folder / "results"), runs=str(folder / "runs"), table=str(folder / "table"))


@pytest.fixture(scope="module")
def found(cfg):
    across.main(cfg)
    return json.loads((Path(cfg.out) / "across.json").read_text())


def numbers(r2, r2_by_r=None, pearson=None):
    """What `ask` says of one entry, as far as entries are held against each other."""
    found = dict(r2_5=sum(r2) / len(r2), r2_5_each=r2, r2_5_each_by_spread=r2, r2_5_each_by_r=r2_by_r or r2)
    found |= dict(r2_5_forward=found["r2_5"], r2_5_each_forward=r2)
    return found | (dict(pre_pearson_each=pearson, pearson_each=pearson) if pearson else {})


def row(name, seed, masks="off", **matrices):
    return dict(name=name, seed=seed, masks=masks, matrices=matrices)


def test_everything_is_asked_once(found):
    asked = [(row["name"], row["masks"]) for row in found["rows"] if row["seed"] == 1]
    masked = [(name, mask) for name in ("spd", "spd:rotated") for mask in across.MASKS]
    alone = ("transcoder", "neurons", "svd", "svd:rotated", "earlier")
    assert sorted(asked) == sorted(masked + [(name, "off") for name in alone])
    assert [row["seed"] for row in found["features"]] == [0, 1] and len(found["chains"]) == 1


def test_answers_are_those_of_the_metrics(cfg, found):
    """Of one seed, from the checkpoints, by the functions of attribution.py alone."""
    gpt = GPT.load(cfg.model)
    arena = compare.prepared(across.table_of(cfg), gpt, 1, torch.device("cpu"))
    trained = {Path(path.parent).name.split("-")[0]: path for folder in (cfg.runs, cfg.table)
               for path in Path(folder).glob("*seed1*/*.safetensors")}
    later, earlier = (across.sae.load(trained[name], gpt) for name in ("later", "earlier"))
    assert (later.cfg.site, earlier.cfg.site, later.cfg.seed) == ("resid", "mlp_in", 1)
    fit, test = (attribution.read_later(later, gpt, 1, split[0]) for split in (arena.fit, arena.test))
    units = attribution.frequent(fit, test, cfg.each)
    cosine_U = attribution.largest_cosine(attribution.stream_directions(later, gpt), earlier, gpt)[units]
    units = units[attribution.is_computed(attribution.computed_share(fit, units, cfg.each), cosine_U)]
    counted, = (row for row in found["features"] if row["seed"] == 1)
    assert counted["computed"] == len(units) > 0

    # and of random directions at the same tokens: other answers, by the same rules
    drawn = [dataclasses.replace(reading, w_FD=matching.redraw(
        fit.w_FD, common.generator(1, "directions in the place of features"))) for reading in (fit, test)]
    m = across.spd.load(trained["spd"], gpt).raw
    of_spd, = (row["matrices"] for row in found["rows"] if (row["name"], row["seed"], row["masks"]) == ("spd", 1, "off"))
    drawn_units = units[attribution.computed_share(drawn[0], units, cfg.each) > 0.5]
    assert len(drawn_units)
    for by, end in across.BY.items():
        of_drawn, of_features = (attribution.attribute(m, gpt, *readings, some, counts=(5,), each=cfg.each, by=(by,))
                                 for readings, some in ((drawn, drawn_units), ((fit, test), units)))
        for matrix, answer in of_spd.items():
            mean = lambda value_U: pytest.approx(value_U.clamp(min=0).mean().item(), abs=1e-5)
            assert answer[f"drawn_r2_5{end}"] == mean(of_drawn[matrix][f"r2_5{end}"])
            assert answer[f"r2_5{end}"] == mean(of_features[matrix][f"r2_5{end}"])
            assert answer[f"sum_5{end}"] == mean(of_features[matrix][f"sum_5{end}"])
            assert answer[f"r2_5{end}"] != answer[f"drawn_r2_5{end}"] and answer["pieces"] == M
    by_masks = {row["masks"]: row["matrices"] for row in found["rows"] if (row["name"], row["seed"]) == ("spd", 1)}
    for mask, choose_masks in across.MASKS.items():
        few = attribution.attribute(m, gpt, fit, test, units, choose_masks, counts=(1, 5), each=cfg.each)
        by_r = attribution.attribute(m, gpt, fit, test, units, choose_masks, counts=(5,), each=cfg.each, by=("correlation",))
        checked = attribution.causal(m, gpt, test, units, common.generator(1, "pairs"), choose_masks, each=cfg.each)
        complete_U = attribution.path_completeness(m, gpt, earlier, test, units, choose_masks, each=cfg.each)
        for matrix, answer in by_masks[mask].items():
            expected = dict(r2_1=few[matrix]["r2_1"].clamp(min=0), r2_5=few[matrix]["r2_5"].clamp(min=0),
                            r2_5_by_r=by_r[matrix]["r2_5_by_r"].clamp(min=0), active_share=few[matrix]["active_share"],
                            rest_share=few[matrix]["rest_share"], n90=few[matrix]["n90"].float(), r2_all=few[matrix]["r2_all"],
                            still_on=few[matrix]["still_on"], still_f=few[matrix]["still_f"], **checked[matrix])
            for key, value_U in expected.items():
                assert answer[key] == pytest.approx(value_U.mean().item(), abs=1e-5), key
            assert answer["r2_5_each"] == pytest.approx(few[matrix]["r2_5"].clamp(min=0).tolist(), abs=1e-4)
            assert answer["params"] == 5 * (D + M) and ("path_completeness" in answer) == (matrix == "in")
        assert by_masks[mask]["in"]["path_completeness"] == pytest.approx(complete_U.mean().item(), abs=1e-5)
    assert by_masks["off"]["in"]["r2_5"] != by_masks["rounded"]["in"]["r2_5"] != by_masks["importances"]["in"]["r2_5"]


def test_the_page_has_all_tables_chains_and_a_picture(cfg, found):
    text = (Path(cfg.out) / "across.md").read_text()
    table, masked, falls = (part.split("\n\n")[0].splitlines() for part in text.split("| pieces |")[1:])
    labels = ["spd in", "spd out", "transcoder", "earlier", "svd in", "svd out", "neurons", "spd:rotated in",
              "spd:rotated out", "svd:rotated in", "svd:rotated out"]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == labels
    assert [line.split(" | ")[1] for line in masked[2:]] == [*across.MASKS] * 2
    assert [line.split(" | ")[0].strip("| ") for line in falls[2:]] == ["spd in"] * 2 + ["spd out"] * 2
    for head in across.LESS.values():
        less = text.split(f"| {head}, less |")[1].split("\n\n")[0].splitlines()
        assert [line.split(" | ")[0].strip("| ") for line in less[2:]] == labels[2:] and less[0] == " spd in | spd out |"
    # what earlier features are not asked, since they have no shares
    earlier = [line for line in table if line.startswith("| earlier")][0].split(" | ")
    assert [earlier[i] == "n/a" for i in range(1, 9)] == [False] * 3 + [True, True, False, True, True]
    assert text.count("path of") == across.PATHS * text.count("\nlater feature #")
    for word in ("component of W_in #", "<- earlier feature #", "[["):
        assert word in text
    assert (Path(cfg.out) / "across.png").stat().st_size > 10_000


def test_a_second_run_finds_all_and_says_the_same(cfg, found, capsys, monkeypatch):
    before = (Path(cfg.out) / "across.md").read_text()
    for name in ("label_features", "ask", "ask_earlier", "chains"):
        monkeypatch.setattr(across, name, None)
    for module in (across.sae, across.spd):
        monkeypatch.setattr(module, "train", None)
    monkeypatch.setattr(across, "code", lambda code=across.code(): code)
    monkeypatch.setattr(across.curve, "save_picture", lambda figure, path: None)
    across.main(cfg)
    again = json.loads((Path(cfg.out) / "across.json").read_text())
    assert all(again[table] == found[table] for table in across.TABLES)
    of_spd = {name: [row["matrices"]["in"]["r2_5_forward"] for row in found["rows"] if (row["name"], row["masks"]) == (name, "off")]
              for name in ("spd", "spd:rotated")}
    assert [again["columns"]["spd"][key]["values"] for key in ("r2_5_forward", "null_r2_5_forward")] == [*of_spd.values()]
    assert (Path(cfg.out) / "across.md").read_text() == before and before in capsys.readouterr().out
    # fewer seeds: the page is of these alone
    across.main(dataclasses.replace(cfg, seeds=1))
    assert "one seed can't tell" in (Path(cfg.out) / "across.md").read_text()
    with pytest.raises(TypeError):              # other sizes are other questions
        across.main(dataclasses.replace(cfg, each=30))


def test_a_killed_run_goes_on_at_the_question_where_it_was(cfg, found, tmp_path, monkeypatch):
    """And ends with the same answers."""
    cfg, asked, ask, kept = dataclasses.replace(cfg, out=str(tmp_path)), [], across.ask, across.code()
    monkeypatch.setattr(across, "code", lambda: kept)
    monkeypatch.setattr(across.curve, "save_picture", lambda figure, path: None)

    def stop(seed, name, mask):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append((seed.number, name, mask))
        return ask(seed, name, mask)
    monkeypatch.setattr(across, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        across.main(cfg)
    common.let_go(cfg.out)
    asked.append(None)
    across.main(cfg)
    asked.remove(None)
    again = json.loads((tmp_path / "across.json").read_text())
    assert len(asked) == len({*asked}) == len(again["rows"]) - cfg.seeds        # those of earlier features aside
    assert all(again[table] == found[table] for table in across.TABLES)


def test_random_directions_count_where_they_are_the_mlps_as_features_are(monkeypatch):
    seed = across.Seed(0, {}, {}, None, 20)
    seed.computed, seed.drawn = torch.tensor([3, 5, 8]), ["fit", "test"]
    monkeypatch.setattr(attribution, "computed_share", lambda reading, units, each: torch.tensor([.4, .6, .5]))
    assert seed.drawn_units.tolist() == [5]


def test_what_entries_are_held_against():
    """The best of other decompositions of the same seed, without masks; in means, not feature by feature."""
    rows = [row("spd", 0, **{"in": numbers([.9, .7], [.2, .2], [.9, .2]), "out": numbers([1., 1.], None, [1., 1.])}),
            row("spd", 0, "rounded", **{"in": numbers([.6, .6], None, [.5, .5])}),
            row("other", 0, all=numbers([.1, .8], [.3, .9])), row("third", 0, all=numbers([.5, .2], None, [1., 1.]))]
    found = {(entry.label, entry.masks): by_seed[0] for entry, by_seed in across.collect(rows).items()}
    entries = across.collect(rows)
    less = across.difference(entries, Entry("spd", "in", "off"), Entry("other", "all", "off"), "r2_5")
    assert less["mean"] == pytest.approx(.8 - .45)
    assert across.difference(entries, Entry("spd", "in", "off"), Entry("other", "all", "off"), "none") is None
    own = found["spd in", "off"]
    assert own["best"] == "other" and own["delta"] == pytest.approx(.8 - .45) and own["wins"] == .5
    assert own["delta_by_r"] == pytest.approx(.2 - .6) and own["explained_pre_pearson"] == .5
    assert found["spd in", "rounded"]["delta"] == pytest.approx(.6 - .45)
    assert found["other", "off"]["best"] == "spd out" and "explained_pearson" not in found["other", "off"]


@pytest.mark.parametrize("falls, words", [([.4, .41, .39], "| 0.400±.025: a cliff |"),
                                          ([.01, .02, .03], "no cliff"), ([.1, .5, .9], "too noisy"), ([.5], "can't tell")])
def test_a_cliff_is_more_than_noise_and_more_than_a_little(falls, words):
    rows = []
    for name in ("spd", "spd:rotated"):
        for seed, fall in enumerate(falls):
            for masks in across.MASKS:
                r2 = .9 + .01 * seed - fall * (masks == "importances")
                rows.append(row(name, seed, masks, **{"in": numbers([r2, r2])}))
    lines = across.cliffs(across.collect(rows))[2:]
    assert len(lines) == 2 and words in lines[0] and lines[0].split(" | ")[2::2] == ["n/a", "n/a", "n/a |"]
    assert "no cliff" in lines[1] or len(falls) == 1


def test_a_cell_has_its_interval_and_its_null():
    by_seed = {0: dict(a=1., b=.25), 1: dict(a=2., b=.35), 2: dict(a=3., b=.3)}
    assert across.cell(by_seed, "a", 1, by_seed, "b") == "2.0±2.5 (0.3)"
    assert across.cell({0: dict(a=.5)}, "a", 2, by_seed, None) == "0.50" and across.cell(by_seed, "c", 2, by_seed, "b")


@pytest.mark.parametrize("change, words", [
    (dict(methods="spd,clt"), "--methods clt: allowed are spd, spd-former, spd-long,"), (dict(methods="spd,svd"), "--methods svd"),
    (dict(methods="spd,spd"), "names a row twice"), (dict(methods="spd,sae:untrained"), "--methods sae:untrained"),
    (dict(methods="transcoder,spd"), "the first has to be of components"), (dict(each=601), "--each 601"),
    (dict(layer=9), "--layer 9"), (dict(eval_tokens=1), "--eval_tokens 1"), (dict(keep=True, retrain=True), "--retrain --keep")])
def test_bad_input_is_one_line(cfg, tmp_path, capsys, change, words):
    other = dataclasses.replace(cfg, out=str(tmp_path / "o"), runs=str(tmp_path / "r"), table=str(tmp_path / "t"), **change)
    fails(capsys, lambda: across.main(other), words)
    assert not [*tmp_path.iterdir()]


def test_what_has_no_components_or_no_features_is_refused(cfg, found, tmp_path, capsys):
    cfg = dataclasses.replace(cfg, out=str(tmp_path))
    fails(capsys, lambda: across.main(dataclasses.replace(cfg, each=500)), "seed 0: of 0 later features", "--eval_tokens")


def test_models_of_other_code_stop_it_before_anything_is_done(cfg, found, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "training_code", lambda file: {"sae.py": "other"})
    fails(capsys, lambda: across.main(dataclasses.replace(cfg, out=str(tmp_path / "o"))), "--retrain", "--keep")


def test_damaged_results_are_one_line(cfg, tmp_path, capsys):
    common.write(tmp_path / "across.json", b"{")
    fails(capsys, lambda: across.main(dataclasses.replace(cfg, out=str(tmp_path))), "across.json", "damaged")
