"""TinyTales: what is said of it is true. Known answers, and a second way to the same number."""
import errno
import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from model import GPT
from test_common import fails
from tinytales import cache, concepts, story
from tinytales import words as tt

T = 128
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    cache.CACHE = tmp_path_factory.mktemp("cache")
    data.tinytales_corpus.cache_clear()
    return data.load("tinytales", "test", data.VOCAB)


@pytest.fixture(scope="module")
def some_stories():
    return [story.tell(i) for i in range(3000)]


def test_size_of_the_language():
    assert len(data.VOCAB) == len(set(data.VOCAB)) >= 1500
    assert story.N_TEMPLATES == len({t for f in story.FAMILIES.values() for t, *_ in f}) >= 400
    assert len(story.FAMILIES) >= 15 and len(story.TOPICS) >= 14


def test_stories_are_deterministic_whole_and_never_leave_the_vocabulary(some_stories):
    size = len(data.VOCAB)
    again = [story.tell(i) for i in range(50)]
    assert [s.ids for s in again] == [s.ids for s in some_stories[:50]]
    assert [s.ids for s in some_stories[:50]] != [s.ids for s in some_stories[50:100]]
    assert len(data.VOCAB) == size
    for s in some_stories:
        assert 60 <= len(s.ids) - 1 <= 250 and s.ids[0] == 0 and 0 not in s.ids[1:] and 1 not in s.ids
        text = [data.VOCAB[i] for i in s.ids]
        assert text.count("“") == text.count("”") and text[-1] in ".!?”"


def test_a_and_an_agree_everywhere(some_stories):
    for s in some_stories:
        words = [data.VOCAB[i] for i in s.ids]
        for a, w in zip(words, words[1:]):
            if a in ("a", "A"):
                assert not re.match("[aeioAEIO]", w), (a, w)
            if a in ("an", "An"):
                assert re.match("[aeiouAEIOU]|hour$", w) and not w.startswith("uni"), (a, w)


def test_derivation_log_probability_is_the_log_of_a_frequency():
    """The charge for the plan's first choice that differs between two seeds is what counting says it is: over many
    stories, the mean of exp(-charge of the whole plan) per distinct plan can't be had, but each choice can."""
    d = story.DIST[0]["color"]
    rng = random.Random(0)
    counts = np.bincount([d.ids.index(d.pick(rng)[0]) for _ in range(100_000)], minlength=len(d.ids)) / 100_000
    assert np.abs(counts - np.exp(d.logp)).max() < 0.006
    left = story.given(0, "boy", (data.VOCAB.index("Tom"),))
    assert abs(sum(np.exp(left.logp)) - 1) < 1e-9 and len(left.ids) < len(story.DIST[0]["boy"].ids)


def test_every_choice_is_charged_once(some_stories, monkeypatch):
    """Brute force: record every probability that the generator asks its random numbers for, from outside."""
    seen = []
    pick, choose = story.Dist.pick, story.Story.choose

    def spy_pick(self, rng):
        i, lp = pick(self, rng)
        seen.append(lp)
        return i, lp

    def spy_choose(self, p):
        i = choose(self, p)
        seen.append(np.log(p[i]))
        return i
    monkeypatch.setattr(story.Dist, "pick", spy_pick)
    monkeypatch.setattr(story.Story, "choose", spy_choose)
    uniform = []
    plain_log = story.math.log
    monkeypatch.setattr(story.math, "log", lambda x: (uniform.append(-plain_log(x)) if isinstance(x, int) else None, plain_log(x))[1])
    for i in range(30):
        seen.clear(), uniform.clear()
        s = story.tell(i)
        assert sum(lp for _, lp in s.events) == pytest.approx(sum(seen) + sum(uniform), abs=1e-9)
        assert all(0 < at < len(s.ids) for at, _ in s.events)


def test_held_out_pairs_never_meet(some_stories):
    """Pairs of names and of agreement that the prompts use do not occur in the text."""
    tok = story.ID
    for s in some_stories:
        assert not story.held(s.reg["P"][-1], s.reg["C"][-1])
    pairs = set()
    singular = {i for t in story.DIST for n in ("thing", "obj", "animal", "place") for i in t[n].ids}
    for s in some_stories:
        words = [data.VOCAB[i] for i in s.ids]
        for i in range(len(words) - 5):
            if words[i] == "The" and words[i + 2] == "near" and words[i + 3] == "the" and tok[words[i + 1]] in singular:
                plural = {v[0]: k[1] for k, v in story.PROP.items() if k[0] == "s"}
                b = plural.get(s.ids[i + 4])
                if b is not None:
                    pairs.add((s.ids[i + 1], b))
    assert len(pairs) > 10 and not any(story.held(a, b) for a, b in pairs)


def test_prompts_are_many_held_out_and_answerable():
    prompts = data.prompts(200)
    assert set(prompts) >= {"agreement", "pronoun", "article", "tense", "quotes", "indirect object", "induction", "counting",
                            "facts", "negation", "topic"}
    for name, ps in prompts.items():
        assert len({tuple(p.ids) for p in ps}) == 200
        for p in ps:
            assert p.ids[0] == 0 and len(p.ids) < T and p.right and p.wrong and not set(p.right) & set(p.wrong)
    v = data.VOCAB
    for p in prompts["counting"]:
        numbers = "one two three four five six seven eight nine ten eleven twelve".split()
        a, b = (numbers.index(v[p.ids[i]].lower()) for i in (-4, -2))
        assert v[p.right[0]] == numbers[2 * b - a]
    for p in prompts["indirect object"]:
        assert v[p.ids[-1]] == "to" and {p.right[0], p.wrong[0]} <= set(p.ids) and v[p.right[0]] in tt.GIRLS + tt.BOYS + tt.CREATURES
    for p in prompts["induction"]:
        i = len(p.ids) - 1 - p.ids[:-1][::-1].index(p.ids[-1])
        assert p.right[0] in p.ids
    facts = {a[0]: a for a in story.ANIMALS}
    for p in prompts["facts"]:
        animals = [facts[v[i]] for i in p.ids if v[i] in facts]
        assert any(v[p.right[0]].lower() in a for a in animals)
    assert data.prompts(20) == data.prompts(20) != data.prompts(20, seed=1)


def test_concepts(corpus):
    assert len(corpus.names) == len(set(corpus.names)) >= 120
    labels = corpus.labels(T)
    share = labels[:, 1:].mean((0, 1))
    rare = {n: round(float(f), 4) for n, f in zip(corpus.names, share) if not .002 <= f <= .30}
    assert not rare
    latent = [n for n in corpus.names if n in story.STATE]
    assert len(story.STATE) <= story.FAMILY_SHIFT and len(latent) >= 30 and len(concepts.HIERARCHY) >= 25
    for parent, child in concepts.HIERARCHY:
        p, c = (labels[..., corpus.names.index(n)] for n in (parent, child))
        assert c.any() and not (c & ~p).any() and p.sum() > c.sum(), (parent, child)


def test_latent_concepts_are_not_determined_by_the_token(corpus):
    """At least 30 concepts whose truth the current token leaves open: the best guess from the token errs often."""
    labels, ids = corpus.labels(T)[:, 1:].reshape(-1, len(corpus.names)), corpus.rows(T)[:, 1:].flatten().numpy()
    open_ = 0
    for j in range(len(corpus.names)):
        true = np.bincount(ids, labels[:, j], len(data.VOCAB)) / np.bincount(ids, minlength=len(data.VOCAB)).clip(1)
        error = np.minimum(true, 1 - true)[ids].mean() / min(labels[:, j].mean(), 1 - labels[:, j].mean())
        open_ += error > .5
    assert open_ >= 30


def test_labels_by_hand(corpus):
    ids = [data.VOCAB.index(w) for w in [data.EOT, *"The cow said , “ Oh no , the boat is old . ” Then she saw the cow said".split()]]
    all_names = concepts.concept_names(with_state=False)
    truth = concepts.labels(np.array(ids), data.VOCAB, concepts.lexical(data.VOCAB))
    at = lambda name: np.flatnonzero(truth[:, all_names.index(name)]).tolist()
    assert at("cow") == [2, 19] and at("comma") == [4, 8] and at("feminine pronoun") == [16]
    assert at("sentence: first word") == [1, 15]
    assert at("inside quotes") == list(range(6, 14)) and at("after an article") == [2, 10, 19]
    assert at("next: comma") == [3, 7] and at("repeated bigram") == [20]


def test_rows_cover_and_align(corpus):
    starts, n = corpus.starts(T), len(corpus.ids)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and (np.diff(starts) <= T).all()
    aligned = corpus.ids[starts] == 0
    assert aligned.mean() > .5, "most rows begin with a story"
    fresh = corpus.fresh(T)
    at = (starts[:, None] + np.arange(T))[fresh.numpy()]
    assert len(np.unique(at)) == len(at), "each predicted token is counted once"
    assert corpus.rows(T).shape == (len(starts), T) and corpus.labels(T, 3).shape == (3, T, len(corpus.names))
    assert torch.equal(corpus.rows(T)[:5], corpus.rows(T, 5)) and corpus.rows(T, 0).shape == (0, T)


def test_batches_depend_on_their_arguments_alone(corpus):
    a = corpus.batch(7, 4, T, 0)
    corpus.batch(3, 4, T, 1), corpus.order.__wrapped__
    assert torch.equal(a, corpus.batch(7, 4, T, 0)) and not torch.equal(a, corpus.batch(7, 4, T, 1))
    n = len(corpus.starts(T))
    epoch = torch.cat([corpus.batch(s, 1, T, 0) for s in range(n)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, corpus.rows(T).tolist()))


def test_splits_share_no_story(corpus):
    first = {split: {tuple(s.ids) for _, s in zip(range(2000), cache.stories(split, 10**9))} for split in cache.SPLITS}
    names = list(first)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            assert not first[a] & first[b]


def test_cache_is_rebuilt_when_damaged_or_old(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    data.tinytales_corpus.cache_clear()
    good = data.load("tinytales", "dev", data.VOCAB, 3000).ids.tobytes()
    path = tmp_path / "tinytales-dev-3000.ids"
    for damage in (lambda: path.write_bytes(good[:-8]), lambda: path.write_bytes(b"\0" * len(good)), path.unlink,
                   lambda: monkeypatch.setattr(cache, "version", lambda: "another")):
        damage()
        data.tinytales_corpus.cache_clear()
        assert data.load("tinytales", "dev", data.VOCAB, 3000).ids.tobytes() == good
    assert not list(tmp_path.glob("*.tmp*"))
    data.tinytales_corpus.cache_clear()


def test_labels_do_not_depend_on_the_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    data.tinytales_corpus.cache_clear()
    a = data.load("tinytales", "dev", data.VOCAB, 5000)
    whole, logp = np.array(a.bits), np.array(a.logp)
    monkeypatch.setattr(cache, "CHUNK", 1000)
    monkeypatch.setattr(cache, "version", lambda: "small chunks")
    data.tinytales_corpus.cache_clear()
    b = data.load("tinytales", "dev", data.VOCAB, 5000)
    assert np.array_equal(whole, b.bits) and np.array_equal(logp, b.logp)
    data.tinytales_corpus.cache_clear()


def test_your_own_bin(tmp_path, capsys):
    ids = np.arange(10_000, dtype=np.uint16) % 50
    ids.tofile(tmp_path / "x.bin")
    vocab = [f"w{i}" for i in range(50)]
    train, test = (data.load(str(tmp_path / "x.bin"), s, vocab) for s in ("train", "test"))
    assert len(train.ids) == 9000 and len(test.ids) == 400 and train.batch(0, 2, 64, 0).shape == (2, 64)
    assert test.labels(64).shape[-1] == len(test.names) and test.entropy(64) is None
    fails(capsys, lambda: data.load(str(tmp_path / "x.bin"), "train", vocab[:40]), "outside")
    (tmp_path / "y.bin").write_bytes(b"abc")
    fails(capsys, lambda: data.load(str(tmp_path / "y.bin"), "train", vocab), "3 bytes")
    fails(capsys, lambda: data.load(str(tmp_path / "z.bin"), "train", vocab), "no such file")
    fails(capsys, lambda: data.load("x.csv", "train", vocab), "allowed")
    fails(capsys, lambda: data.load("tinytales", "train", vocab), "vocabulary")
    assert [len(c.ids) for c in data.load_all(str(tmp_path / "x.bin"), vocab, 400).values()] == [9000, 400, 400]
    fails(capsys, lambda: data.load_all(str(tmp_path / "x.bin"), vocab, 401), "x.bin", "fit part has 400")


def test_your_own_text(tmp_path, capsys):
    text = 'The cat sat. "Was it red?" he said; the cat was not.\n' * 200
    (tmp_path / "x.txt").write_text(text)
    vocab = data.build_vocab(text, 100)
    assert vocab[:2] == [data.EOT, data.UNK] and data.decode(data.encode("The cat sat.", vocab), vocab) == "The cat sat."
    corpus = data.load(str(tmp_path / "x.txt"), "fit", vocab)
    assert corpus.ids.max() < len(vocab) and "masculine pronoun" in corpus.names and "topic: farm" not in corpus.names
    assert len(data.build_vocab(text, 8)) == 8 and data.encode("zebra", vocab) == [1]
    fails(capsys, lambda: data.load(str(tmp_path / "x.txt"), "fit", ["Ġthe", "Ġcat"]), "word-level")
    fails(capsys, lambda: data.load(str(tmp_path / "x.txt"), "fit", [data.EOT, data.UNK, "▁the", "cat"]), "word-level")
    fails(capsys, lambda: data.load(str(tmp_path / "x.txt"), "fit", [data.EOT, data.UNK, "zebra"]), "pretrain.py")
    (tmp_path / "short.txt").write_text("The cat.")
    fails(capsys, lambda: data.load(str(tmp_path / "short.txt"), "dev", vocab), "empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00x")
    fails(capsys, lambda: data.load(str(tmp_path / "bad.txt"), "fit", vocab), "UTF-8")
    assert data.encode('"No"', vocab) == [vocab.index("“"), 1, vocab.index("”")]
    assert data.encode('"No"', [data.EOT, data.UNK, '"']) == [2, 1, 2]           # a vocabulary of straight ones


def test_the_fingerprint_sees_content_size_and_name_and_reads_little_of_a_large_file(tmp_path, monkeypatch):
    def of(name, content):
        (tmp_path / name).write_bytes(content)
        data.fingerprint.cache_clear()
        return data.fingerprint(str(tmp_path / name))
    small = bytes(range(256)) * 2000                            # half a megabyte: every byte counts
    base = of("a.bin", small)
    assert of("a.bin", small) == base != of("b.bin", small)
    assert all(of("a.bin", small[:i] + b"x" + small[i + 1:]) != base for i in (0, 7, 250_001, len(small) - 1))
    assert of("a.bin", small[:-2]) != base

    read, sha256 = [], hashlib.sha256

    class Counting:
        def __init__(self, start=b""):
            self.hash = sha256(start)

        def update(self, piece):
            read.append(len(piece))
            self.hash.update(piece)

        def hexdigest(self):
            return self.hash.hexdigest()

    with open(tmp_path / "large.bin", "wb") as file:            # sparse: 20 GB that no one has to read
        file.truncate(20 * 10**9)
    monkeypatch.setattr(data.hashlib, "sha256", Counting)
    first = data.fingerprint(str(tmp_path / "large.bin"))
    assert 1 << 20 <= sum(read) < 1.1 * (1 << 20)
    with open(tmp_path / "large.bin", "r+b") as file:
        file.write(b"another beginning")
    data.fingerprint.cache_clear()
    assert data.fingerprint(str(tmp_path / "large.bin")) != first


@pytest.mark.parametrize("text, words", [
    ("The café was naïve; Zoë said déjà vu to Łukasz.", "The café was naïve ; Zoë said déjà vu to Łukasz ."),
    ("cafe\u0301 nai\u0308ve", "café naïve"),                                       # accents of their own
    ("Don’t say ‘no’ to Tom’s don't", "Don't say ‘ no ’ to Tom 's don't"),
    ("TOM’S 's 'said", "TOM 'S 's ' said"),
    ("Ещё не всё: съешь, объём", "Ещё не всё : съешь , объём"),
    ("Πού πας; Αὐτὸς δ’ οὐκ", "Πού πας ; Αὐτὸς δ ’ οὐκ"),
    ("मैं स्कूल गया।", "मैं स्कूल गया ।"),                                                      # vowel signs
    ("قُرْآن שָׁלוֹם", "قُرْآن שָׁלוֹם"),
    ("나는 학교에", "나는 학교에"),
    ("п’ять пʼять l’eau col·lega", "п'ять п'ять l'eau col·lega"),
    ("\ufeffhide‐and‐seek soft\xadly zero\u200bwidth", "hide-and-seek softly zero width"),
    ("_very_—old… 3rd 1,000", "_ very _ — old … 3 rd 1 , 000"),
    ("a<|endoftext|>b </s> c <eos> <unk>", f"a {data.EOT} b {data.EOT} c {data.EOT} {data.UNK}"),
    ("a</s><s>b <|endoftext|>\n<|startoftext|> c <EOS><BOS>", f"a {data.EOT} b {data.EOT} c {data.EOT}"),
    ("a <|ENDOFTEXT|> b <｜end▁of▁sentence｜> c <|eot_id|> d <|eod|> e", f"a {data.EOT} b {data.EOT} c {data.EOT} d {data.EOT} e"),
    ('"One," he said; "two--"\n("three") —"four"', "“ One , ” he said ; “ two - - ” ( “ three ” ) — “ four ”"),
    ('"A speech.\n\n"Its end," <|endoftext|>"No."', f"“ A speech . “ Its end , ” {data.EOT} “ No . ”"),
    ("don´t don`t Hawai‘i", "don't don't Hawai'i"),
    ('צה"ל ז׳בוטינסקי', "צה״ל ז׳בוטינסקי"),
    ("𑄌𑄋𑄴𑄟𑄳𑄦 𞤆𞤵𞤤𞤢𞥄𞤪", "𑄌𑄋𑄴𑄟𑄳𑄦 𞤆𞤵𞤤𞤢𞥄𞤪"),                                         # marks beyond U+FFFF
])
def test_words_of_any_alphabet_are_whole(text, words):
    assert data.tokenize(text) == words.split()


def text_file(tmp_path, content, name="t.txt"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


@pytest.mark.parametrize("content, word", [
    ("我喜欢猫。今天天气很好，我们去公园吧！" * 9, "without spaces"),
    ("吾輩は猫である。名前はまだ無い。" * 9, "without spaces"),
    ("วันนี้อากาศดีมาก " * 9, "without spaces"),
    ("A text with 我喜欢猫 in it. " * 9, "without spaces"),
    ("T\0h\0e\0 \0c\0a\0t\0 " * 9, "is it text"),
    ("caf\ufffd na\ufffdve " * 9, "is it text"),
    ("The cat".encode("utf-16"), "iconv -f utf-16"),
    ("The cat".encode("utf-32"), "iconv -f utf-32"),
    ("\ufeff" + '{"text": "The cat"}\n' * 9, "JSON"),
    ('[\n {"text": "The cat"}]', "JSON"),
    ("\n<!DOCTYPE html><p>The cat</p>", "HTML"),
    (r"{\rtf1\ansi The cat\par}", "RTF"),
    ("%PDF-1.4 The cat", "PDF"),
    (gzip.compress(b"The cat", mtime=0), "packed"),
    (b"PK\3\4word/document.xml", "office"),
    ("Le café".encode("latin-1"), "UTF-8"),
])
def test_a_text_that_words_do_not_cover_is_refused(tmp_path, capsys, content, word):
    path = text_file(tmp_path, content)
    with pytest.raises(SystemExit) as e:
        data.read_text(path)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err and "t.txt" in err


def test_the_share_of_covered_characters_is_printed(tmp_path, capsys):
    path = text_file(tmp_path, "abcd " * 97 + "我喜欢 ")              # 3 of 391 characters are of no word
    data.encode_file(path, (data.EOT, data.UNK, "abcd"))
    assert "97 tokens cover 99.2% of its characters, 0.0%" in capsys.readouterr().out


def test_documents_of_a_text_begin_rows(tmp_path):
    story = "One day a cat sat . It was red .\n"
    text = f"{story}<|endoftext|>\n" * 300
    path = text_file(tmp_path, text)
    vocab = data.build_vocab(text, 50)
    assert vocab[:2] == [data.EOT, data.UNK] and len(vocab) == len(set(vocab)) == 11
    corpus = data.load(str(path), "train", vocab)
    ids = data.encode_file(path, tuple(vocab))
    assert (ids == 0).sum() == 300 and (ids == 1).sum() == 0 and len(ids) == 300 * 11
    starts = corpus.starts(15)
    assert starts[0] == 0 and (corpus.ids[starts[1:]] == 0).all()
    test = data.load(str(path), "test", vocab)
    assert test.labels(15)[..., test.names.index("story: first 16 tokens")].any()


@pytest.fixture(scope="module")
def bundled():
    return GPT.load(ROOT / "target")


def test_token_files_of_another_width_are_read_where_they_say_so(tmp_path, capsys, corpus, bundled):
    ids = np.array(corpus.ids[:60_000])
    expected = data.load_all(save(tmp_path / "x.bin", ids), data.VOCAB, T)["test"].rows(T)
    for width in ("uint32", "uint64", "int32", "int64"):
        path = save(tmp_path / f"{width}.bin", ids.astype(width))
        fails(capsys, lambda: data.load_all(path, data.VOCAB, T), f"{path}:{width.replace('int', 'uint').replace('uu', 'u')}")
        read = data.load_for(bundled, f"{path}:{width}", T)["test"]
        assert torch.equal(read.rows(T), expected) and read.rows(T).dtype == torch.int64
        assert data.fingerprint(f"{path}:{width}") != data.fingerprint(path)
    fails(capsys, lambda: data.load(f"{tmp_path}/x.bin:uint32", "train", data.VOCAB), "outside")
    fails(capsys, lambda: data.load(f"{tmp_path}/x.bin:float32", "train", data.VOCAB), "X.bin:uint32", "allowed")
    fails(capsys, lambda: data.load(save(tmp_path / "odd.bin", ids[:-1]) + ":uint32", "train", data.VOCAB), "whole")
    padded = np.where(np.arange(len(ids)) == 7, -100, ids.astype(np.int32))
    fails(capsys, lambda: data.load(save(tmp_path / "neg.bin", padded) + ":int32", "train", data.VOCAB), "-100")


@pytest.mark.parametrize("bytes_of, width, words", [
    (lambda ids: b"\x93NUMPY\1\0" + b" " * 120 + ids.tobytes(), "uint16", [".npy", "np.load"]),
    (lambda ids: b"\x93NUMPY\1\0" + b" " * 120 + ids.astype("u8").tobytes(), "uint16", ["uint64"]),
    (lambda ids: np.array([20240520, 1, 9, *[0] * 253], "i4").tobytes() + ids.tobytes(), "uint16", ["header", "tail -c +1025"]),
    (lambda ids: np.array([len(ids)], "i8").tobytes() + ids.astype("i8").tobytes(), "uint16", ["uint64"]),
    (lambda ids: ids.astype("u4").tobytes(), "uint16", ["uint32"]),
    (lambda ids: ids.astype("i8").tobytes(), "int32", ["uint64"]),
    (lambda ids: ids.astype(">u2").tobytes(), "uint16", [">u2", "np.fromfile"]),
    (lambda ids: ids.astype(">u4").tobytes(), "uint32", [">u4", "np.fromfile"]),
    (lambda ids: ids.astype("f4").tobytes(), "uint16", ["float32", "np.fromfile"]),
    (lambda ids: ids.astype("f8").tobytes(), "uint64", ["float64", "np.fromfile"]),
])
def test_other_kinds_of_files_with_numbers_are_named(tmp_path, capsys, bytes_of, width, words):
    """At GPT-2's vocabulary most pairs of bytes are tokens: .npy files, wider numbers behind a header were read as they came."""
    vocab = [str(i) for i in range(50_257)]
    ids = (np.random.default_rng(0).zipf(1.2, 20_000) % 50_257).astype(np.uint16)
    (tmp_path / "x.bin").write_bytes(bytes_of(ids))
    for spec in (f"{tmp_path}/x.bin:{width}", f"{tmp_path}/x.bin")[:1 + (width == "uint16")]:
        fails(capsys, lambda: data.load(spec, "train", vocab), spec, *words)
    ids.tofile(tmp_path / "y.bin")
    assert np.array_equal(data.load(f"{tmp_path}/y.bin", "train", vocab).ids, ids[:18_000])


def save(path, ids):
    ids.tofile(path)
    return str(path)


def test_a_vocabulary_beyond_uint16_needs_uint32(tmp_path, capsys):
    vocab = [str(i) for i in range(70_000)]
    path = save(tmp_path / "x.bin", np.arange(65_000, 70_000, dtype=np.uint32))
    fails(capsys, lambda: data.load(path, "train", vocab), "uint32", "70,000")
    assert data.load(f"{path}:uint32", "test", vocab).rows(100)[0, 0] == 69_800
    vocab[:2] = data.EOT, data.UNK
    text = text_file(tmp_path, "69999 65535 " * 50)
    assert set(data.encode_file(text, tuple(vocab)).tolist()) == {69_999, 65_535}


def test_the_target_tells_tokens_that_are_not_its_own(tmp_path, capsys, corpus, bundled):
    ids = np.array(corpus.ids[:60_000])
    assert data.load_for(bundled, save(tmp_path / "x.bin", ids), T)["fit"].rows(T).shape[1] == T
    assert "lexical and structural" in capsys.readouterr().out
    renamed = np.random.default_rng(0).permutation(len(data.VOCAB)).astype(np.uint16)
    one_part = np.concatenate([renamed[ids[:-3000]], ids[-3000:]])            # all but the test part
    for wrong in (renamed[ids], (ids + 1).clip(max=len(data.VOCAB) - 1), ids[::-1], one_part):
        path = save(tmp_path / "wrong.bin", wrong)
        fails(capsys, lambda: data.load_for(bundled, path, T), path, "uniform guess at 7.7")


def test_long_streams_cost_what_a_chunk_costs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, 40_000).astype(np.uint16)
    ids[rng.integers(0, 40_000, 400)] = 0
    vocab = [data.EOT, *map(str, range(1, 50))]
    short = data.Corpus(ids, vocab, [])
    batches = [short.batch(step, 4, 64, 0) for step in range(300)]
    monkeypatch.setattr(data, "CHUNK", 10_000)
    long = data.Corpus(ids, vocab, [])
    assert (short.n_chunks, len(batches)) == (4, 300)
    n = 10_000 // 64
    for epoch in range(5):                                      # each epoch one chunk, each row once, from its stories
        rows = torch.cat([long.batch(step, 1, 64, 0) for step in range(epoch * n, (epoch + 1) * n)])
        chunk = ids[epoch % 4 * 10_000:(epoch % 4 + 1) * 10_000].astype(int)
        starts = data.Corpus(chunk, vocab, []).starts(64)
        assert set(map(tuple, rows.tolist())) <= {tuple(chunk[s:s + 64].tolist()) for s in starts}
        assert len(set(map(tuple, rows.tolist()))) == n
    monkeypatch.setattr(data, "CHUNK", 20_001)                  # one chunk: as if there were none
    whole = data.Corpus(ids, vocab, [])
    assert all(torch.equal(whole.batch(step, 4, 64, 0), batch) for step, batch in enumerate(batches))


def test_a_token_file_of_17_gb_is_mapped_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CHUNK", 1 << 20)
    path, ids = tmp_path / "x.bin", np.arange(1, 50, dtype=np.uint16)
    with open(path, "wb") as file:
        for share in (0, .9, .94, .96):
            file.seek(int(17e9 / 2 * share) * 2)
            file.write(np.resize(ids, 100_000).tobytes())
        file.truncate(17 * 10**9)
    vocab = [str(i) for i in range(50)]
    tracemalloc.start()
    corpora = data.load_all(str(path), vocab, 64)
    assert len(corpora["train"].ids) == 17e9 / 2 * .9 and corpora["train"].batch(0, 4, 64, 0).shape == (4, 64)
    assert corpora["test"].labels(64, 4).shape[:2] == (4, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6
    with open(path, "r+b") as file:                             # between the places that loading looks at
        file.seek(2 * (1 << 14) + 200_000)
        file.write(b"\xff\xff" * (1 << 20))
    train = data.load(str(path), "train", vocab)
    fails(capsys, lambda: [train.batch(step, 64, 64, 0) for step in range(100)], "65535", "outside")


def test_a_changed_file_has_another_fingerprint(tmp_path, monkeypatch):
    def of(path):
        data.fingerprint.cache_clear()
        return data.fingerprint(str(path))
    path = tmp_path / "x.bin"
    ids = np.arange(1_500_000, dtype=np.uint16)
    before = of(save(path, ids))
    assert of(save(path, ids)) == before
    assert of(save(path, np.where(np.arange(len(ids)) == 1_000_001, 7, ids).astype(np.uint16))) != before
    assert of(save(path, np.random.default_rng(0).permutation(ids))) != before
    monkeypatch.setattr(data, "WHOLE", 1 << 20)                 # a file that is sampled: its date counts too
    save(path, ids), os.utime(path, (10, 10))
    before = of(path)
    save(path, np.where(np.arange(len(ids)) == 1_000_001, 7, ids).astype(np.uint16)), os.utime(path, (10, 11))
    assert of(path) != before
    save(path, ids), os.utime(path, (10, 10))
    assert of(path) == before


def garbage(text):
    return lambda path: path.write_bytes(text)


def replaced_by(make):
    def damage(path):
        path.unlink()
        make(path)
    return damage


@pytest.mark.parametrize("damage", [garbage(b"[]"), garbage(b"null"), garbage(b'"a"'), garbage(b"[" * 100_000), garbage(b"\xff"),
                                    garbage(b'{"version": 1}'), replaced_by(os.mkfifo)])
@pytest.mark.parametrize("part", ["json", "ids"])
def test_whatever_lies_in_the_cache_is_rebuilt(tmp_path, monkeypatch, damage, part):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    good = np.array(cache.arrays("dev", 500)[1]["ids"])
    damage(tmp_path / f"tinytales-dev-500.{part}")
    assert np.array_equal(cache.arrays("dev", 500)[1]["ids"], good)
    assert not list(tmp_path.glob("*.tmp*")) and (tmp_path / f"tinytales-dev-500.{part}").is_file()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "good").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", tmp_path / "pipe", tmp_path / ("x" * 300)):
        monkeypatch.setattr(cache, "CACHE", folder)
        with pytest.raises(SystemExit) as e:
            cache.arrays("dev", 500)
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert e.value.code == 2 and len(err) == 1 and "NANODECOMP_CACHE" in err[0] and str(folder) in err[0]
    for part in ("json", "ids", "bits"):                            # a folder in the place of a file
        place = tmp_path / part / f"tinytales-dev-500.{part}"
        place.mkdir(parents=True)
        monkeypatch.setattr(cache, "CACHE", tmp_path / part)
        with pytest.raises(SystemExit):
            cache.arrays("dev", 500)
        assert f"error: {place}: cannot" in capsys.readouterr().err and not list((tmp_path / part).glob("*tmp*"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(cache, "CACHE", tmp_path / "good")
    monkeypatch.setattr(cache, "write_chunk", full)
    with pytest.raises(SystemExit) as e:
        cache.arrays("dev", 500)
    assert e.value.code == 2 and "No space left" in capsys.readouterr().err and not list((tmp_path / "good").iterdir())


def test_the_cache_is_where_the_environment_says():
    code = ("import importlib, os; from tinytales import cache; print(cache.CACHE); os.environ['NANODECOMP_CACHE'] = ''\n"
            "importlib.reload(cache); print(cache.CACHE)")
    env = dict(os.environ, NANODECOMP_CACHE="/tmp/there")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    assert out.split() == ["/tmp/there", str(ROOT / "cache")]


@pytest.mark.parametrize("word, true", [
    ("Иван", ["capitalised"]), ("аллея", ["double letter"]), ("Éléonore", ["capitalised", "long word (8 letters)"]),
    ("ελληνικά", ["long word (8 letters)", "double letter"]), ("x12345678", []), ("__", [])])
def test_concepts_of_letters_hold_in_every_script(word, true):
    held = concepts.lexical([word])[0, len(concepts.WORDS):]
    assert [name for name, is_true in zip(concepts.PATTERNS, held) if is_true and not name.startswith(("starts", "ends"))] == true


def test_byte_level_tokens_have_the_concepts_of_what_they_read_as(tmp_path):
    """A story in words and one in tokens that carry their spaces, byte by byte: what holds of the words holds of the tokens."""
    symbols = {byte: symbol for symbol, byte in data.BYTES.items()}
    ids = [i for n in range(3) for i in story.tell(n).ids]
    tokens = [data.VOCAB[i] for i in ids]
    spaced = [token if token == data.EOT or i % 3 == 0 else "".join(symbols[byte] for byte in f" {token}".encode())
              for i, token in enumerate(tokens)]
    vocab = sorted({*spaced, *symbols.values()})
    np.array([vocab.index(token) for token in spaced] * 30, np.uint16).tofile(tmp_path / "bytes.bin")
    np.array(ids * 30, np.uint16).tofile(tmp_path / "words.bin")
    in_bytes, in_words = (data.load(str(tmp_path / name), "test", some) for name, some in
                          (("bytes.bin", vocab), ("words.bin", data.VOCAB)))
    names = [name for name in in_words.names if "bigram" not in name]       # one word is two tokens here
    columns = [in_words.names.index(name) for name in names]
    truth, found = (corpus.labels(64)[..., columns] for corpus in (in_words, in_bytes))
    assert truth.any((0, 1)).sum() > 60 and data.is_byte_level(vocab)
    assert [name for k, name in enumerate(names) if (truth[..., k] != found[..., k]).any()] == []


def test_marks_that_share_a_token_are_each_of_them():
    vocab = [data.EOT, ' "', "Hi", '."', " he", " said", ",", ' "?!', "."]
    ids = np.array([0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4])
    found = concepts.structural(ids, vocab, concepts.lexical(vocab))
    inside, first, comma = (found[:, concepts.STRUCTURE.index(name)] for name in
                            ("inside quotes", "sentence: first word", "after a comma"))
    assert inside.tolist() == [False, True, True, False, False, False, False, True, True, False, False]
    assert first.nonzero()[0].tolist() == [1, 4, 10] and comma.nonzero()[0].tolist() == [7]
    names = [*concepts.WORDS]
    of = lambda word: {name for name in names if concepts.lexical([word])[0, names.index(name)]}
    assert of('."') >= of(".") and "sentence end mark" in of(' "?!') and of("o.") <= of("o")
