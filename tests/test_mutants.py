"""No damaged file is taken for a good one: each is refused in one line with exit code 2, or what comes out is right.

The mutants are drawn from a seed. NANODECOMP_MUTANTS=1000 python -m pytest tests/test_mutants.py tries more of each."""
import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import metrics.answers
import mutants
import sae
from conftest import T, V
from model import GPT

MANY = int(os.environ.get("NANODECOMP_MUTANTS", 60))       # of each kind of file
SECONDS, BYTES = 20, 2 << 30                                # what one of them may take


@pytest.fixture(scope="module")
def n_layer():
    return 2


class TooSlow(Exception):
    pass


@contextlib.contextmanager
def bounded():
    """Within the time and the memory that a damaged file may take."""
    def late(*_):
        raise TooSlow
    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(f):
    """(what f returns, None), or (None, its one line) where it refuses."""
    said = io.StringIO()
    with bounded(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return f(), None
        except SystemExit as e:
            lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
            assert e.code == 2 and len(lines) == 1 and said.getvalue().endswith(lines[0] + "\n"), (e.code, said.getvalue())
            return None, lines[0]


def campaign(good, damage, path, ask, is_right, many=MANY):
    """Put damaged copies in the place of a file, and ask: each is refused in one line, or what is answered is right.

    Returns how many were refused. A failure names the mutant's number and keeps its bytes beside the file."""
    refused = 0
    for i in range(many):
        rng = random.Random(f"{path.name} {damage.__name__} {i}")
        bad = damage(good, rng)
        bad = bad if isinstance(bad, bytes) else bad.encode("utf-8", "surrogatepass")
        path.write_bytes(bad)
        try:
            found, line = outcome(ask)
            assert line is None or len(line) < 2100, "a line for people is short"
            assert line is not None or is_right(found), "accepted, and wrong"
        except Exception as e:
            path.with_suffix(".mutant").write_bytes(bad)
            path.with_suffix(".good").write_bytes(good)
            raise AssertionError(f"mutant {i} of {path.name} by {damage.__name__}: {type(e).__name__}: {e}") from e
        refused += line is not None
    path.write_bytes(good)
    return refused


@pytest.fixture
def folder(target, tmp_path):
    """A copy of the target, to be damaged."""
    for path in target.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name, damage", [
    ("config.json", mutants.of_json), ("config.json", mutants.of_bytes), ("vocab.json", mutants.of_json),
    ("vocab.json", mutants.of_bytes), ("model.safetensors", mutants.of_safetensors), ("model.safetensors", mutants.of_bytes)])
def test_a_damaged_model_folder_is_refused_or_read_as_it_says(folder, name, damage):
    good = (folder / name).read_bytes()
    whole = GPT.load(folder)
    idx = torch.arange(T)[None] % V

    def is_right(gpt):
        """Numbers are numbers; and where the weights are untouched, the same predictions, but for another epsilon."""
        logits = gpt(idx)
        if not logits.isfinite().all() or len(gpt.vocab) != V or not all(isinstance(word, str) for word in gpt.vocab):
            return False
        is_another = name == "model.safetensors" or (gpt.cfg.n_head, gpt.cfg.layer_norm_epsilon) != (
            whole.cfg.n_head, whole.cfg.layer_norm_epsilon)
        return logits.shape == (1, T, V) if is_another else torch.equal(logits, whole(idx))
    refused = campaign(good, damage, folder / name, lambda: GPT.load(folder), is_right)
    assert refused > MANY / 4


@pytest.mark.parametrize("name", ["x.bin", "x.txt"])
def test_a_damaged_text_is_refused_or_read_as_it_stands(folder, name):
    """Nobody can tell a text from a slightly other one; but no token lies outside the vocabulary."""
    vocab = [data.EOT, data.UNK, *(f"w{chr(97 + i)}" for i in range(V - 2))]
    rng = random.Random(0)
    words = " ".join(rng.choice(vocab[2:]) for _ in range(5000)).encode()
    good = (folder / "x.bin").read_bytes() if name == "x.bin" else words
    path = folder / name
    is_right = lambda corpora: all(int(corpus.ids.max()) < V and len(corpus.ids) >= T for corpus in corpora.values())

    def load():
        data.encode_file.cache_clear()
        return data.load_all(str(path), vocab, T)
    campaign(good, mutants.of_bytes, path, load, is_right)


@pytest.fixture
def half(target, tmp_path, monkeypatch):
    """A run of sae.py with a checkpoint half-way, its folder, and the tensors of its end."""
    monkeypatch.setattr(data, "ROWS", 8)
    cfg = sae.Config(model=str(target), data=str(target / "x.bin"), out=str(tmp_path / "run"), device="cpu", F=24, k=3, N=40,
                     T=T, steps=4, lr=1e-2, dead=72, log_every=1, save_every=2, eval_tokens=48)
    kept, save = {}, common.save

    def keep(path, tensors, meta):
        save(path, tensors, meta)
        kept[meta["step"]] = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir() if p.suffix in (".safetensors", ".jsonl")}
    monkeypatch.setattr(common, "save", keep)
    monkeypatch.setattr(sae, "summarise", lambda *_: {})
    sae.train(cfg)
    end = common.load(Path(cfg.out) / "sae.safetensors")[0]
    for name, content in kept[2].items():
        (Path(cfg.out) / name).write_bytes(content)
    return dataclasses.replace(cfg, resume=True), kept[2], kept[4]["log.jsonl"], end


def rows_of(log):
    return [json.loads(line) for line in log.decode().splitlines()]


@pytest.mark.parametrize("damage", [mutants.of_safetensors, mutants.of_bytes])
def test_a_damaged_checkpoint_is_refused_or_ends_where_the_whole_one_does(half, damage):
    cfg, files, _, end = half
    path = Path(cfg.out) / "sae.safetensors"

    def resume():
        (path.parent / "log.jsonl").write_bytes(files["log.jsonl"])
        sae.train(cfg)
        return common.load(path)[0]
    is_right = lambda tensors: tensors.keys() == end.keys() and all(torch.equal(tensors[name], end[name]) for name in end)
    assert campaign(files[path.name], damage, path, resume, is_right) > MANY / 4


@pytest.mark.parametrize("damage", [mutants.of_bytes])
def test_a_damaged_log_loses_its_damaged_rows_alone(half, damage):
    cfg, files, whole, _ = half
    path = Path(cfg.out) / "log.jsonl"
    last = rows_of(whole)[2:]

    def resume():
        (path.parent / "sae.safetensors").write_bytes(files["sae.safetensors"])
        sae.train(cfg)
        return rows_of(path.read_bytes())
    is_right = lambda rows: all(isinstance(row, dict) for row in rows) and rows[-len(last):] == last
    assert campaign(files[path.name], damage, path, resume, is_right) == 0


@pytest.mark.parametrize("part", ["json", "ids", "bits", "logp"])
def test_a_damaged_cache_of_the_text_is_built_anew(tmp_path, monkeypatch, part):
    monkeypatch.setattr(data.cache, "CACHE", tmp_path)
    ask = lambda: {name: np.array(found) for name, found in data.cache.arrays("dev", 100)[1].items()}
    whole, path = ask(), tmp_path / f"tinytales-dev-100.{part}"
    is_right = lambda found: all(np.array_equal(found[name], whole[name]) for name in whole)
    assert campaign(path.read_bytes(), mutants.of_bytes, path, ask, is_right, max(10, MANY // 6)) == 0


@pytest.mark.parametrize("damage", [mutants.of_json, mutants.of_bytes])
def test_damaged_answers_are_no_answers(tmp_path, damage):
    path = tmp_path / "parts.json"
    answers = metrics.answers.keep(path, dict(coverage=0.25, none=None, attack={0: 0.5, 20: 1.5}, spectrum=[0.1, 0.2]))
    campaign(path.read_bytes(), damage, path, lambda: metrics.answers.kept(path), lambda found: found in (None, answers))
