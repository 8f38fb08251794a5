"""TinyTales: what is said of it is true. Known answers, and a second way to the same number."""
import hashlib
import random
import re

import numpy as np
import pytest
import torch

import data
from test_common import fails
from tinytales import cache, concepts, story
from tinytales import words as tt

T = 128


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
    assert torch.equal(corpus.rows(T)[:5], corpus.rows(T, 5))


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
    fails(capsys, lambda: data.load(str(tmp_path / "x.txt"), "fit", [data.EOT, data.UNK, "zebra"]), "pretrain.py")
    (tmp_path / "short.txt").write_text("The cat.")
    fails(capsys, lambda: data.load(str(tmp_path / "short.txt"), "dev", vocab), "empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00x")
    fails(capsys, lambda: data.load(str(tmp_path / "bad.txt"), "fit", vocab), "UTF-8")


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
