"""Batches of activations: the right tokens, each once, the same after a resume."""
import itertools
from collections import Counter

import pytest
import torch

import common
import data
from model import GPT, GPTConfig
from test_common import fails


@pytest.fixture(scope="module")
def target():
    gpt = GPT(GPTConfig(len(data.VOCAB), 3, 16, 2, 32, 24), common.generator(0, "init")).eval().requires_grad_(False)
    return gpt, data.load("tinytales", "dev", data.VOCAB)


def take(target, n, start=0, N=50, **kw):
    steps = data.batches(*target, [0, 2], T=24, N=N, seed=0, start=start)
    return list(itertools.islice(steps, n))


def test_x_and_y_are_what_each_mlp_reads_and_writes(target):
    gpt, corpus = target
    idx_BT, seen = corpus.rows(24)[:5], {}

    def spy(layer, x, mlp):
        seen[layer] = x[:, 1:].flatten(0, 1), mlp(x)[:, 1:].flatten(0, 1)
        return mlp(x)
    gpt(idx_BT, spy)
    for layers in ([1], [0, 2], [0, 1, 2]):
        x, y = data.at_mlps(gpt, idx_BT, layers)
        assert torch.equal(x, torch.stack([seen[l][0] for l in layers]))
        assert torch.equal(y, torch.stack([seen[l][1] for l in layers]))


def test_each_token_once_and_the_same_after_a_resume(target, monkeypatch):
    monkeypatch.setattr(data, "ROWS", 8)                     # 184 tokens a shuffle, 3 batches of 50
    xs = take(target, 7)
    whole = data.at_mlps(target[0], target[1].batch(0, 8, 24, 0), [0, 2])[0][1]
    first, tokens = torch.cat([x[1] for x, _ in xs[:3]]), lambda x_ND: Counter(map(tuple, x_ND.tolist()))
    assert len(first) == 150 and not tokens(first) - tokens(whole)      # two stories that begin alike share some
    assert not torch.equal(first, whole[:150]) and not torch.equal(xs[0][0], xs[3][0])
    for start in (1, 3, 5):
        for (x, y), (x2, y2) in zip(xs[start:], take(target, 7 - start, start)):
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_a_batch_larger_than_a_shuffle_is_refused(target, capsys):
    fails(capsys, lambda: take(target, 1, N=512 * 23 + 1), "--N")
