"""pretrain.py on a text of its own making."""
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import common
import data
import model
import pretrain
from model import GPT, GPTConfig
from pretrain import Config
from test_common import fails

ROOT = Path(__file__).parent.parent
SMALL = dict(n_layer=3, n_embd=16, n_head=2, n_inner=32, T=16, B=4, warmup=5, every=10, vocab=40, device="cpu")

@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text file in which each of 30 words has two possible successors; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    rng, words = random.Random(0), [chr(97 + i % 26) * (1 + i // 26) for i in range(30)]
    after = {w: [words[(i + 1) % 30], words[(7 * i + 3) % 30]] for i, w in enumerate(words)}
    story = ["a"]
    while len(story) < 4000:
        story.append(rng.choice(after[story[-1]]))
    (tmp_path / "x.txt").write_text(" ".join(story))
    return tmp_path / "x.txt"

def test_learning_rate():
    cfg = Config(lr=1.0, warmup=4, steps=12)
    got = [pretrain.lr_at(step, cfg) for step in (0, 1, 3, 4, 8)]
    assert got == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5])
    assert 0 < pretrain.lr_at(11, cfg) < 0.05
    assert pretrain.lr_at(3, Config(lr=1.0, warmup=4, steps=4)) == 1.0

def test_copying_rows_repeat_themselves():
    cfg, periods = Config(B=8, T=64), set()
    for step in range(20):
        rows = pretrain.copying(cfg, 50, step)
        assert rows.shape == (8, 65) and rows.min() >= 2 and rows.max() < 50 and len(set(map(tuple, rows.tolist()))) == 8
        period = next(p for p in range(1, 65) if torch.equal(rows[:, p:], rows[:, :-p]))
        assert 2 <= period < 21
        periods.add(period)
        assert torch.equal(rows, pretrain.copying(cfg, 50, step))
    assert len(periods) > 5

def test_a_fresh_target_says_again_what_followed_a_word():
    """Random words said again: right far above chance before any training, and only thanks to the start."""
    idx_BT = torch.randint(0, 500, (8, 20), generator=common.generator(0, "words")).repeat(1, 4)
    for started in (False, True):
        gpt = GPT(GPTConfig(500, n_positions=80), common.generator(0, "init"))
        if started:
            pretrain.start_induction(gpt, common.generator(0, "induction"))
        with torch.no_grad():
            right = (gpt(idx_BT[:, :-1]).argmax(-1) == idx_BT[:, 1:])[:, 20:].float().mean()
        assert right > 0.3 if started else right < 0.05

def test_trains_a_target_from_text(text, capsys):
    cfg = Config(data="x.txt", out="mine", steps=200, lr=1e-2, mlp0=3, copy=0, **SMALL)
    gpt = pretrain.train(cfg)
    out = capsys.readouterr().out
    got = model.GPT.load("mine")
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), got.parameters()))
    assert len(got.vocab) == got.cfg.vocab_size == 32 and {"<|endoftext|>", "<unk>", "a", "dd"} <= set(got.vocab)
    assert math.log(2) - 0.1 < got.meta["validation"] < math.log(2) + 0.5        # ln 30 = 3.4 before training
    assert f"{got.meta['validation']:.4f}" in out and got.meta["data"] == "x.txt"
    costs = got.meta["mean_ablation"]
    assert len(costs) == 3 and got.meta["layer"] == model.default_layer(got) == 1     # the only one between two others
    assert got.meta["derivation_entropy"] is None and got.meta["made"]["config"]["steps"] == 200
    mlp = got.h[0].mlp                              # mlp0: dead units are exactly zero, the others are not
    for w in (mlp.c_fc.weight.T, mlp.c_fc.bias, mlp.c_proj.weight):
        assert (w[3:] == 0).all() and (w[:3] != 0).all()
    rows = [json.loads(line) for line in Path("runs/pretrain-mine/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(9, 200, 10))
    assert rows[-1]["validation"] < rows[0]["validation"] < 4

def test_default_layer_is_the_most_costly_inner_one(text, monkeypatch):
    costs = {5: [[9, 0], [1, 0], [3, 0], [2, 0], [8, 0]], 2: [[1, 0], [2, 0]], 1: [[1, 0]]}
    for n_layer, best in ((5, 2), (2, 0), (1, 0)):
        monkeypatch.setattr(pretrain, "ablation_costs", lambda *_: costs[n_layer])
        pretrain.train(Config(data="x.txt", out="m", steps=1, **{**SMALL, "n_layer": n_layer}))
        assert model.GPT.load("m").meta["layer"] == best

def command(*flags):
    small = [w for k, v in SMALL.items() for w in (f"--{k}", str(v))]
    return [sys.executable, str(ROOT / "pretrain.py"), "--data", "x.txt", "--steps", "200", *small, *flags]

def test_killed_and_resumed_run_is_bit_identical(text):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run(command("--out", "a/t"), check=True, env=env, capture_output=True)
    ckpt = Path("runs/pretrain-a-t/checkpoint.safetensors")
    whole = {name: Path("a/t", name).read_bytes() for name in os.listdir("a/t")}, ckpt.read_bytes()
    log = [json.loads(s) for s in Path("runs/pretrain-a-t/log.jsonl").read_text().splitlines()]
    for path in (ckpt, *Path("a/t").iterdir()):
        path.unlink()
    victim = subprocess.Popen(command("--out", "a/t"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ckpt.exists():
        assert victim.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)                                                             # somewhere after a checkpoint
    assert victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 0 < common.load(ckpt)[1]["step"] < 200 and not list(Path("a/t").iterdir())
    subprocess.run(command("--out", "a/t", "--resume"), check=True, env=env, capture_output=True)
    assert ({name: Path("a/t", name).read_bytes() for name in os.listdir("a/t")}, ckpt.read_bytes()) == whole
    again = [json.loads(s) for s in Path("runs/pretrain-a-t/log.jsonl").read_text().splitlines()]
    assert [{**r, "speed": 0} for r in again] == [{**r, "speed": 0} for r in log]

def test_bad_input_is_one_line_and_overwrites_nothing(text, capsys):
    cfg = Config(data="x.txt", out="t", steps=10, **SMALL)
    pretrain.train(cfg)
    before = {p: p.read_bytes() for folder in ("t", "runs/pretrain-t") for p in Path(folder).iterdir()}
    Path("latin.txt").write_bytes(b"\xe9t\xe9 " * 100)
    Path("short.txt").write_text("a b c " * 50)
    def bad(*words, **changes):
        fails(capsys, lambda: pretrain.train(dataclasses.replace(cfg, **changes)), *words)
    bad("--data", "no.txt", data="no.txt")
    bad("--data", "latin.txt", data="latin.txt")
    bad("tokens, fewer than one row of 16", data="short.txt")
    bad("--data", "x.bin", "tinytales", ".txt", data="x.bin")
    low = dict(steps=0, B=0, T=1, lr=-1.0, beta2=1.0, mlp0=-1, vocab=2, seed=-1, every=0, clip=0.0, wd=-1.0)
    for flag, value in low.items():
        bad(f"--{flag} {value}", "must be in", **{flag: value})
    bad("--out x.txt", "folder", out="x.txt")
    bad("--out of its own", out=Config.out)                 # the bundled target is not made of anybody's text
    bad("--vocab 70000", "65536", vocab=70000)
    bad("n_embd 15", "n_head 2", n_embd=15)
    bad("--n_layer 0", n_layer=0)
    bad("steps=10, not 20", resume=True, steps=20)
    bad("no such file", resume=True, out="other")
    ckpt = Path("runs/pretrain-t/checkpoint.safetensors")
    ckpt.write_bytes(before[ckpt][:-1])
    bad("truncated", resume=True)
    ckpt.write_bytes(before[ckpt])
    bad("larger --vocab", vocab=3)
    os.mkfifo("pipe.txt")
    bad("--data", "pipe.txt", data="pipe.txt")
    bad("--data", "x" * 300, data="x" * 300 + ".txt")
    Path("chinese.txt").write_text("我喜欢猫。今天天气很好" * 100)
    bad("--data", "chinese.txt", "without spaces", data="chinese.txt")
    words = text.read_text()
    text.write_text(words.replace("a", "z", 1))                      # another text under the same name
    data.fingerprint.cache_clear()
    bad("another text", "checkpoint.safetensors", resume=True)
    assert before == {p: p.read_bytes() for folder in ("t", "runs/pretrain-t") for p in Path(folder).iterdir()}

def test_divergence_keeps_the_last_checkpoint(text, capsys, monkeypatch):
    cfg = Config(data="x.txt", out="t", steps=40, **SMALL)
    real = torch.nn.utils.clip_grad_norm_
    calls = []
    def explode(*a):
        calls.append(0)
        return real(*a) if len(calls) < 15 else torch.tensor(float("nan"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)
    with pytest.raises(SystemExit) as e:
        pretrain.train(cfg)
    err = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 1 and "step 19" in err and "runs/pretrain-t/checkpoint.safetensors" in err
    assert common.load("runs/pretrain-t/checkpoint.safetensors")[1]["step"] == 10 and not any(Path("t").iterdir())


BOOKS = {       # sentences and a word of each that must be in the vocabulary
    "en": ("“I can’t see the naïve café,” said Zoë, “but it’s there—somewhere.”|The captain’s sister was _very_ old; he said: “Oh!”|"
           "When Łukasz saw the river, the small garden was gone.|Was she here? No -- not at all.", "naïve can't Łukasz 's _ —"),
    "ru": ("— Я не вижу сада, — сказал Пётр. — Но он там…|Анна помнила тихий дом, а потом сад.|"
           "«Князь открыл окно», — подумал он!|Был ли дом? Нет, не был.", "Пётр помнила « …"),
    "el": ("«Δεν βλέπω το παλιό σπίτι», είπε η Ελένη· «μα είναι εκεί…»|Ο Γιάννης άνοιξε το γράμμα, και μετά τον κήπο.|"
           "Πού είναι το λιμάνι; Δεν είναι μακριά.|Τι ήσυχο πρωί!", "σπίτι Γιάννης · ;"),
}


def book(language):
    """A text as Project Gutenberg writes it: byte-order mark, CRLF, a header, chapters, verse, lines of 60 characters."""
    rng, sentences = random.Random(0), BOOKS[language][0].split("|")
    lines = ["The Project Gutenberg eBook of A Book", "", "*** START OF THE PROJECT GUTENBERG EBOOK ***"]
    for chapter in range(1, 120):
        lines += ["", f"CHAPTER {chapter}. {rng.choice(sentences).upper()}", ""]
        lines += textwrap.wrap(" ".join(rng.choices(sentences, k=25)), 60)
        lines += ["", f"    {rng.choice(sentences)}", "       *       *       *"]
    return b"\xef\xbb\xbf" + "\r\n".join(lines).encode()


@pytest.mark.parametrize("language", BOOKS)
def test_a_book_of_any_alphabet_becomes_a_target(tmp_path, monkeypatch, capsys, language):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(book(language))
    pretrain.train(Config(data="book.txt", out="mine", steps=10, **SMALL | dict(vocab=200)))
    vocab = model.GPT.load("mine").vocab
    assert set(BOOKS[language][1].split()) <= set(vocab) and len(vocab) <= 200
    assert "cover 100.0% of its characters, " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("language", BOOKS)
def test_a_book_end_to_end(tmp_path, monkeypatch, language):
    """As the README has it: a target, two methods, the table; concepts are lexical, and no name of TinyTales is told."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(book(language))
    env = dict(os.environ, OMP_NUM_THREADS="1")

    def run(script, flags):
        argv = [sys.executable, str(ROOT / script), "--data", "book.txt", *flags.split()]
        return subprocess.run(argv, check=True, env=env, capture_output=True, text=True).stdout
    run("pretrain.py", "--out runs/book --n_layer 3 --n_embd 32 --n_head 2 --n_inner 64 --T 32 --steps 300 --every 100 --warmup 20")
    small = "--model runs/book --eval_tokens 1600 "
    said = [run("spd.py", small + "--out runs/spd --C 64 --B 8 --T 32 --steps 30"),
            run("sae.py", small + "--out runs/sae --F 64 --k 8 --N 496 --T 32 --steps 60"),
            run("compare.py", small + "--quick --methods sae,neurons --tokens 20000 --explained 10 --out table")]
    said.append(Path("table-quick/table.md").read_text())
    for out in said:
        assert "oncepts are lexical and structural" in out
        told = re.sub(r"^\$.*", "", out, flags=re.M)
        assert not re.search(r"TinyTales|stories|topic:|mood|sentence: [a-z]+ family", told)
    assert re.search(r"\d+ of \d+ alive units match a concept", said[0]) and "FAILED" not in said[2]
