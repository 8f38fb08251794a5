"""The page of units: its numbers by brute force, its text, its size, and what it does in a real browser."""
import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import evals
import sae
import spd
from conftest import T, noisy_gpt
from metrics import matching, words
from model import GPT
from report import gallery
from test_common import fails

VOCAB = ["<|endoftext|>", "<unk>", "</script><script>document.title='evil'</script>", "<b>", "&amp;", "the", "cat", "dog",
         "he", "she", "and", ".", ",", "“", "”", "ran", "sat", "big", "red", "one", "two", *(f"w{i}" for i in range(8)), "w" * 400]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two SAEs and an SPD of a tiny target, trained for a moment, and its text."""
    folder = tmp_path_factory.mktemp("gallery")
    noisy_gpt(3, 8, 16, T, len(VOCAB)).save(folder / "target", VOCAB, {"layer": 1})
    gen = np.random.default_rng(0)
    ids = np.minimum(gen.geometric(0.12, 30_000) - 1, len(VOCAB) - 1)
    ids.astype(np.uint16).tofile(folder / "x.bin")
    flags = dict(model=str(folder / "target"), data=str(folder / "x.bin"), device="cpu", T=T, eval_tokens=1200)
    for seed in range(2):
        sae.main(sae.Config(**flags, F=24, k=3, N=44, steps=30, seed=seed, out=str(folder / f"sae{seed}"), page=seed == 0))
    spd.main(spd.Config(**flags, C=16, B=4, steps=10, ci_hidden=8, c_imp=1e-3, pgd_rows=2, eval_every=0, page=False,
                        out=str(folder / "spd")))
    return folder


def page(runs, *names, **flags):
    """The page of some runs as text, and its data."""
    out = runs / f"{'-'.join(names)}.html"
    flags = dict(model=runs / "target", data=runs / "x.bin", device="cpu", eval_tokens=1200, out=out) | flags
    typed = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    gallery.main(*(str(runs / name) for name in names), *typed)
    text = out.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def all_three(runs):
    return page(runs, "sae0", "sae1", "spd")


@pytest.fixture(scope="module")
def truth(runs):
    """What the units say at each token of test, and which concepts are true, by another way."""
    gpt = GPT.load(runs / "target")
    scene = gallery.scene_of(gpt, 1, str(runs / "x.bin"), T, 1200, 0)
    said = {}
    for name in ("sae0", "sae1", "spd"):
        path = next((runs / name).glob("*.safetensors"))
        m = gallery.load(path, gpt)
        x, f = evals.clean(m, gpt, scene.test[0], 1)
        said[name] = (m.strength(1, f, x) if name == "spd" else f)[:, 1:].flatten(0, 1).double().numpy()
    return gpt, scene, said


def test_the_numbers_are_those_of_brute_force(all_three, truth):
    _, found = all_three
    gpt, scene, said = truth
    labels = torch.as_tensor(scene.test[1])[:, 1:].flatten(0, 1).numpy()
    token = scene.token_N.numpy()
    h = gpt.mlp(1).act(gpt.mlp(1).c_fc(gpt.prefix(scene.test[0], 1)[0]))[:, 1:].flatten(0, 1).double().numpy()
    place = lambda context: context[0] // T * (T - 1) + context[0] % T - 1
    assert found["n"] == len(token) and [found["texts"][i] for i in found["rows"]] == [VOCAB[i] for i in scene.test[0].flatten()]
    for shown in found["methods"]:
        value = said[shown["name"]]
        assert shown["l0"] == pytest.approx((value != 0).sum(1).mean(), rel=5e-3) and len(shown["cards"]) > 10
        for card in shown["cards"]:
            a = value[:, card["u"]] * (1 if abs(value[:, card["u"]].min()) <= value[:, card["u"]].max() else -1)
            on = a != 0
            assert card["n"] == sum(card["bins"]) == on.sum()
            assert card["ends"] == pytest.approx([min(a.min(), 0), max(a.max(), 0)], rel=5e-3)
            peak = abs(a).max()
            at = [place(context) for context in card["strong"]]
            assert abs(a[at[0]]) == pytest.approx(peak) and len({i // (T - 1) for i in at}) == len(at)
            assert all(abs(a[i]) == abs(a[i // (T - 1) * (T - 1):][:T - 1]).max() for i in at)
            assert (np.diff(abs(a[at])) <= 0).all() and len({tuple(token[max(0, i - 3):i + 2]) for i in at}) == len(at)
            for context in card["strong"] + card["weak"] + card["missed"] + card["false"]:
                for offset, level in zip(context[1::2], context[2::2]):
                    assert level == pytest.approx(255 * a[place(context) + offset] / peak, abs=1)
            # the concept, and where it is wrong
            k, f1, precision, recall = card["said"]
            true, both = labels[:, k], (labels[:, k] & on).sum()
            assert precision == round(1000 * both / on.sum()) and recall == round(1000 * both / max(1, true.sum()))
            assert f1 == round(2000 * both / max(1, on.sum() + true.sum()))
            assert all(true[place(c)] and not on[place(c)] for c in card["missed"])
            assert all(on[place(c)] and not true[place(c)] for c in card["false"])
            assert len(card["missed"]) >= ((true & ~on).sum() > 0) and len(card["false"]) >= ((on & ~true).sum() > 0)
            counts = np.bincount(token[on], minlength=len(VOCAB))
            assert card["at"][0][1] == round(1000 * counts.max() / on.sum())
            # neurons
            r = np.corrcoef(a, h.T)[0, 1:]
            assert abs(card["like"][0][1]) == pytest.approx(1000 * np.nanmax(abs(r)), abs=3)


def test_mates_are_those_of_brute_force(all_three, truth):
    _, found = all_three
    said = truth[2]
    names = [shown["name"] for shown in found["methods"]]
    for shown in found["methods"]:
        assert shown["chance"][names.index(shown["name"])] is None
        for card in shown["cards"]:
            a = said[shown["name"]][:, card["u"]]
            for b, unit, r, relation in card["mates"]:
                other = said[names[b]][:, unit]
                want = np.corrcoef(a, other)[0, 1]
                assert r == pytest.approx(1000 * (abs(want) if "spd" in (names[b], shown["name"]) else want), abs=2)
                both = ((a != 0) & (other != 0)).sum()
                if found["relations"][relation] == "subsumed":
                    assert both >= 0.9 * (a != 0).sum() and both < 0.5 * (other != 0).sum()
            for b in {mate[0] for mate in card["mates"]}:
                rs = [np.corrcoef(a, said[names[b]][:, c["u"]])[0, 1] for c in found["methods"][b]["cards"]]
                best = max(map(abs, rs)) if "spd" in (names[b], shown["name"]) else max(rs)
                assert next(mate[2] for mate in card["mates"] if mate[0] == b) == pytest.approx(1000 * best, abs=2)


def test_the_best_units_of_a_concept_are_chosen_on_fit(all_three, truth, runs):
    _, found = all_three
    gpt, scene, said = truth
    m = gallery.load(runs / "sae0/sae.safetensors", gpt)
    fit, test = evals.counts(m, gpt, *scene.fit, (0,)), evals.counts(m, gpt, *scene.test, (0,))
    f1_fit, f1_test = evals.f1_of_counts(fit)[0], evals.f1_of_counts(test)[0]
    shown = found["methods"][0]
    there = (fit["on"][0] >= evals.ALIVE) & (test["on"][0] > 0)
    assert shown["best"] and shown["alive"] == (fit["on"][0] >= evals.ALIVE).sum()
    for k, best in shown["best"].items():
        want = f1_fit[:, int(k)].masked_fill(~there, -1).topk(len(best))
        assert sorted(f1_fit[[u for u, *_ in best], int(k)].tolist()) == pytest.approx(sorted(want.values.tolist()))
        assert [row[1] for row in best] == [round(1000 * f1_test[row[0], int(k)].item()) for row in best]
    matched = evals.match(fit, test)
    assert shown["named"] == round(1000 * (matched.f1_F[fit["on"][0] >= evals.ALIVE] >= 0.5).double().mean().item())


def test_what_a_unit_writes_pushes_tokens(all_three, truth, runs):
    """Of an SAE's unit that is a direction, whatever its contexts are."""
    _, found = all_three
    gpt = truth[0]
    m = gallery.load(runs / "sae0/sae.safetensors", gpt)
    for card in found["methods"][0]["cards"]:
        up, down = evals.pushed(gpt, m.W_dec[card["u"]].unsqueeze(0), 6)
        assert [found["texts"][i] for i in card["up"]] == [VOCAB[i] for i in up[0]]
        assert [found["texts"][i] for i in card["down"]] == [VOCAB[i] for i in down[0]]
        cosine = matching.cosines(m.W_dec[[card["u"]]], gpt.mlp(1).c_proj.weight)[0]
        assert [j for j, _ in card["writes"]] == cosine.abs().topk(3).indices.tolist()


def test_rules_are_scored_on_test(all_three, truth, runs):
    gpt, scene, said = truth
    card = next(card for card in all_three[1]["methods"][0]["cards"] if "rule" in card)
    literals = words.Literals(scene.fit[0], VOCAB)
    m = gallery.load(runs / "sae0/sae.safetensors", gpt)
    fit = gallery.record(m, gpt, *scene.fit)
    rules = words.find_rules(literals, literals(scene.fit[0]), words.dense(fit, torch.tensor([card["u"]])))
    claimed, on = (rules.guess(literals(scene.test[0])) > 0)[:, 0].numpy(), said["sae0"][:, card["u"]] > 0
    assert card["rule"] == [rules.text(0), round(2000 * (claimed & on).sum() / (claimed.sum() + on.sum()))]


def test_the_units_of_best_f1_have_a_rule(runs):
    _, found = page(runs, "sae0", rules=2)
    cards = found["methods"][0]["cards"]
    ruled = [card for card in cards if "rule" in card]
    often = [card for card in cards if card["n"] >= 2 * gallery.LEAST]
    assert len(ruled) == 2 and max(often, key=lambda card: card["said"][1]) in ruled


def test_tokens_cannot_end_the_data(all_three):
    text, found = all_three
    assert text.count("</script>") == 2 and "document.title='evil'" in " ".join(found["texts"])
    assert "http" not in re.sub(r'id="data">.*?</script>', "", text, flags=re.S).replace("http://www.w3.org/2000/svg", "")


def test_each_run_ends_with_its_page(runs, capsys, all_three):
    text = (runs / "sae0/units.html").read_text()
    assert '"name":"sae"' in text and not (runs / "sae1/units.html").exists()
    m, _ = sae.main(dataclasses.replace(sae.Config(**common.read_meta(runs / "sae0/sae.safetensors")["config"]), resume=True))
    assert re.fullmatch(r"-> \S+/sae0/units.html: \d+ units to browse, 0.\d MB", capsys.readouterr().out.splitlines()[-1])
    m.layers = [0, 1]
    gallery.of_run(sae.Config(out=str(runs)), m, {})
    assert "stands in for 2" in capsys.readouterr().out and not (runs / "units.html").exists()


def test_a_page_of_other_units_is_not_left_beside_a_run(runs, capsys, tmp_path):
    out = tmp_path / "units.html"
    out.write_text("old")
    cfg = dict(common.read_meta(runs / "sae1/sae.safetensors")["config"]) | dict(out=str(tmp_path), steps=2, page=False)
    sae.main(sae.Config(**cfg))
    assert not out.exists()
    out.write_text("of these units")
    sae.main(sae.Config(**cfg | dict(resume=True)))
    assert out.exists()
    out.unlink()
    out.mkdir()
    fails(capsys, lambda: sae.main(sae.Config(**cfg)), "units.html")


def test_a_run_that_has_not_ended_is_named(runs, capsys):
    path = runs / "sae1/sae.safetensors"
    (runs / "half").mkdir()
    meta = common.read_meta(path) | dict(step=10)
    common.save(runs / "half/sae.safetensors", load_file(path), {key: meta[key] for key in meta if key != "checksum"})
    page(runs, "half", "sae0")
    assert re.findall(r"(\S+): has not ended: (.*)", capsys.readouterr().out) == [(str(runs / "half/sae.safetensors"), "step 10 of 30")]


def test_cards_that_do_not_fit_are_left_out_and_the_page_says_so(runs, monkeypatch):
    cards = [[dict(x="a" * n)] * 100 for n in (10, 100, 1000)]
    sizes = [len(gallery.as_json(found[0])) for found in cards]
    kept = gallery.kept(cards, room=60_000)
    assert len(kept[0]) == len(kept[1]) == 100 and len(kept[2]) == (60_000 - 100 * (sizes[0] + sizes[1])) // sizes[2]
    monkeypatch.setattr(gallery, "CARDS", 8_000)
    text, found = page(runs, "sae0", "sae1")
    assert all(0 < len(shown["cards"]) < shown["alive"] for shown in found["methods"]) and len(text) < 60_000
    assert all(card["said"][1] for card in found["methods"][0]["cards"][:2])


@pytest.fixture(scope="module")
def odd_pages(truth, runs):
    """Two pages of two SAEs: without concepts, and without units."""
    gpt, scene, _ = truth
    m = gallery.load(runs / "sae0/sae.safetensors", gpt)
    none = [(rows, labels[..., :0]) for rows, labels in (scene.fit, scene.test)]
    gallery.write(runs / "bare.html", [("a", m, None), ("b", m, None)], gallery.Scene(gpt, 1, *none, [], 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "ALIVE", 10**9)
        assert ": 0 units" in gallery.write(runs / "empty.html", [("a", m, None), ("b", m, None)], scene)
    return runs / "bare.html", runs / "empty.html"


def test_without_concepts_units_have_the_rest(odd_pages):
    found = json.loads(re.search(r'id="data">(.*?)</script>', odd_pages[0].read_text(), re.S)[1])
    assert found["concepts"] == [] and "said" not in found["methods"][0]["cards"][0] and found["methods"][0]["named"] is None
    assert all(card["mates"][0][1:3] == [card["u"], 1000] for card in found["methods"][0]["cards"])


def test_bytes_are_decoded(truth, runs, monkeypatch):
    gpt, scene, _ = truth
    monkeypatch.setattr(gpt, "vocab", ["Ġ", "Ċ", *(f"Ġ{word}" for word in VOCAB[2:])])
    m = gallery.load(runs / "sae0/sae.safetensors", gpt)
    found = gallery.page_data([gallery.look_at("a", m, None, scene)], scene)
    assert found["spaced"] and {"\\n", " the", " cat"} <= {*found["texts"]} and "Ġcat" not in found["texts"]


@pytest.mark.parametrize("names, flags, said", [
    (["nowhere"], {}, "must be the folder of a run"), (["target"], {}, "no checkpoint of a method"),
    (["sae0"], dict(out="units.txt"), "--out"), (["sae0"], dict(eval_tokens=0), "--eval_tokens"), ([], {}, "name the folders"),
    (["sae0"], dict(model="nowhere"), "nowhere")])
def test_bad_input_is_one_line_and_exit_code_2(runs, capsys, names, flags, said):
    fails(capsys, lambda: page(runs, *names, **flags), said)


def test_the_picture_of_the_readme_is_small():
    picture = gallery.TEMPLATE.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200_000


def test_names_tell_runs_apart(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a/sae.x", "b/sae.x", "c/spd.x", "d/concept.x")]
    assert gallery.names_of(paths) == ["a", "b", "spd", "concept-2"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert gallery.names_of([Path("sae.x"), tmp_path / "b/sae.x"]) == ["here", "b"]


def luminance(color):
    parts = [int(color[1:][i * len(color[1:]) // 3:(i + 1) * len(color[1:]) // 3] * (2 if len(color) == 4 else 1), 16)
             for i in range(3)] if color[0] == "#" else [int(part) for part in color.split()]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_text_stands_out_in_both_schemes():
    for block in re.findall(r":root \{(.*?)\}", gallery.TEMPLATE.read_text(), re.S):
        colors = dict(re.findall(r"--(\w+): ([^;]+);", block))
        for text in ("text", "soft", "link"):
            for back in ("back", "panel", "chosen") + ("plus", "minus") * (text == "text"):
                low, high = sorted(luminance(colors[name]) for name in (text, back))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)


# ---------------------------------------------------------------------------------------- in a browser
STEPS = """<script>
const out = {shift: 0, wide: 0, tall: 0}, main = document.getElementById("main");
const wait = async () => {
  await new Promise(done => setTimeout(done, 50));
  out.wide = Math.max(out.wide, document.documentElement.scrollWidth - innerWidth, main.scrollWidth - main.clientWidth);
  out.tall = Math.max(out.tall, innerWidth > 760 ? document.documentElement.scrollHeight - innerHeight : 0);
};
const names = () => [...document.querySelectorAll("#list a b")].map(b => b.textContent);
const head = () => document.querySelector("main h2").textContent;
(async () => {
  const shifts = new PerformanceObserver(list => out.shift += list.getEntries().length);
  shifts.observe({type: "layout-shift", buffered: true});
  out.scripts = document.scripts.length;
  out.all = names().length;
  await wait();
  shifts.disconnect();            // what follows moves on purpose
  // search
  q.value = "sae1 #"; q.dispatchEvent(new Event("input")); await wait();
  out.searched = [...new Set(names().map(name => name.split(" ")[0]))];
  out.address = location.hash;
  q.value = "no such thing"; q.dispatchEvent(new Event("input")); await wait();
  out.none = [names().length, document.getElementById("count").textContent];
  q.value = ""; q.dispatchEvent(new Event("input"));
  method.value = "spd"; method.dispatchEvent(new Event("input")); await wait();
  out.method = [...new Set(names().map(name => name.split(" ")[0]))];
  method.value = ""; method.dispatchEvent(new Event("input"));
  sort.value = "often"; sort.dispatchEvent(new Event("input")); await wait();
  out.often = [...document.querySelectorAll("#list a span:last-child")].map(span => parseFloat(span.textContent));
  // arrow keys
  document.querySelector("#list a").focus();
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true})); await wait();
  out.arrow = [names()[1], document.activeElement.querySelector("b").textContent, head().split(" · ")[0],
               document.querySelectorAll("#list [aria-current]").length];
  // a mate
  location.hash = "#sae0/UNIT"; await wait();
  const mate = document.querySelector("main table a");
  out.mate = mate.textContent; mate.click(); await wait();
  out.arrived = head().split(" · ")[0];
  out.focus = document.activeElement.tagName;
  // the link that skips the list leaves the address as it is
  q.focus(); const before = location.hash;
  document.querySelector(".skip").click(); await wait();
  out.skipped = [document.activeElement.tagName, location.hash === before];
  // from the list to a unit: a phone, which shows no list now, starts at its top
  location.hash = "#"; await wait();
  scrollTo(0, 100);
  const first = document.querySelector("#list a");
  first.focus(); first.click(); await wait();
  out.chosen = [scrollY, document.activeElement.tagName];
  // a concept, what is not there, and what is shown of a token with tags in it
  location.hash = "#concept/" + encodeURIComponent(CONCEPT); await wait();
  out.concept = [...document.querySelectorAll(".best section")].map(section => section.querySelector("h3").textContent);
  location.hash = "#nobody/3"; await wait();
  out.alert = document.querySelector("[role=alert]").textContent;
  location.hash = "#sae0/UNIT"; await wait();
  out.about = [...document.querySelectorAll(".contexts b")].map(b => [b.previousSibling, b, b.nextSibling].map(part => part.textContent).join(""));
  out.marks = [...document.querySelectorAll(".contexts b mark")].every(mark => mark.title);
  out.evil = document.querySelector("main").textContent.includes("evil");
  out.title = document.title;
  console.error("seen");
  document.body.dataset.found = JSON.stringify(out);
})();
</script></body>"""


def chromium(path, tmp_path, *flags):
    """What a browser prints of a page, and what it says on its console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
         "--enable-logging=stderr", "--v=0", *flags, path], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(all_three, tmp_path, width):
    text, found = all_three
    card = next(card for card in found["methods"][0]["cards"] if card["mates"])
    k, best = next(iter(found["methods"][0]["best"].items()))
    name = found["concepts"][int(k)][0]
    steps = STEPS.replace("UNIT", str(card["u"])).replace("CONCEPT", json.dumps(name))
    (tmp_path / "page.html").write_text(text.replace("</body>", steps), encoding="utf-8")
    dom, console = chromium(f"file://{tmp_path}/page.html", tmp_path, f"--window-size={width},800", "--virtual-time-budget=8000", "--dump-dom")
    assert len(console) == 1 and "seen" in console[0]           # no other error, and an error would be seen
    out = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert out["all"] == min(200, sum(len(shown["cards"]) for shown in found["methods"])) and out["scripts"] == 3
    assert out["searched"] == ["sae1"] and out["address"] == "#?q=sae1+%23" and out["none"][0] == 0 and out["none"][1].startswith("0 of")
    assert out["method"] == ["spd"] and out["often"] == sorted(out["often"], reverse=True) and len(out["often"]) > 20
    second, focused, shown, n_current = out["arrow"]
    assert second == focused and (shown == second, n_current) == (width > 760, width > 760)     # a phone shows one or the other
    b, unit = card["mates"][0][:2]
    assert out["mate"] == out["arrived"] == f"{found['methods'][b]['name']} #{unit}" and out["focus"] == "H2"
    wanted = {f"{shown['name']}: #{shown['best'][k][0][0]} F1 {shown['best'][k][0][1] / 1000:.2f}" for shown in found["methods"]}
    assert {*out["concept"]} == wanted and "nobody/3" in out["alert"]
    assert out["marks"] and "evil" not in out["title"] and out["shift"] == 0 and out["wide"] <= 0 and out["tall"] <= 0
    assert out["skipped"] == ["H2", True] and out["chosen"] == [0, "A" if width > 760 else "H2"]
    assert out["about"] and all(text.startswith("[") and text.endswith("]") for text in out["about"])


@browser
def test_every_address_opens(all_three, tmp_path, odd_pages):
    """Each in a frame of one page, light and dark alike: a heading, and no error."""
    text, found = all_three
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    unit = found["methods"][2]["cards"][0]["u"]
    frames = "".join(f'<iframe src="page.html{place}"></iframe>' for place in ("", f"#spd/{unit}", "#concepts", "#main", "#?q=w1&amp;sort=name", "#%"))
    for path in odd_pages:
        shutil.copy(path, tmp_path)
        frames += f'<iframe src="{path.name}"></iframe>'
    (tmp_path / "all.html").write_text(f"<body>{frames}", encoding="utf-8")
    _, console = chromium(f"file://{tmp_path}/all.html", tmp_path, "--virtual-time-budget=3000", "--dump-dom",
                          "--blink-settings=preferredColorScheme=0")
    assert console == []


@browser
def test_links_go_to_units_that_have_a_card(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "CARDS", 4_000)
    text, found = page(runs, "sae0", "spd")
    there = {f"#{shown['name']}/{card['u']}" for shown in found["methods"] for card in shown["cards"]}
    best = {f"#{shown['name']}/{rows[0][0]}" for shown in found["methods"] for rows in shown["best"].values()}
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    dom, _ = chromium(f"file://{tmp_path}/page.html#concepts", tmp_path, "--virtual-time-budget=3000", "--dump-dom")
    links = {*re.findall(r'href="(#(?:sae|spd)/\d+)"', dom)}
    assert links == there and best - there and "(no card)" in dom
