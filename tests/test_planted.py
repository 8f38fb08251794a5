"""The planted MLP: its neurons are sparse detectors of known directions, so what units should be is known. All methods are
trained on it at three sparsities; the table's metrics are held against the mean F1 of the best unit for each detector.

    python -m pytest -q -m slow tests/test_planted.py       # a minute on one core, prints the table
"""
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import baselines
import clt
import common
import compare
import data
import evals
import molt
import sae
import spd
import transcoder
import units
from model import GPT, GPTConfig

D, K, V, T = 32, 48, 60, 24         # K detectors, three on per token
ACT = dict(F=96, N=512)
RUNS = {"sae": (sae, "k", (2, 4, 8), ACT | dict(steps=1000)),
        "transcoder": (transcoder, "k", (2, 4, 8), ACT | dict(steps=1000)),
        "clt": (clt, "k", (2, 4, 8), ACT | dict(steps=1500)),
        "molt": (molt, "lam", (3e-2, 1e-2, 3e-3), dict(groups="64@1", N=512, steps=1500)),
        "spd": (spd, "c_imp", (3e-3, 1e-3, 3e-4), dict(C=K, B=16, steps=800))}
METRICS = "fve", "board", "units_atomic", "concept_matched_fraction", "probe_auroc_1"


def plant(folder):
    gen = common.generator(0, "planted")
    gpt = GPT(GPTConfig(V, n_layer=1, n_embd=D, n_head=2, n_inner=K, n_positions=T), gen).requires_grad_(False)
    read, write = (normalize(torch.randn(K, D, generator=gen), dim=1) for _ in range(2))
    mlp = gpt.h[0].mlp
    mlp.c_fc.weight.copy_(4 * read.T), mlp.c_fc.bias.fill_(-6), mlp.c_proj.weight.copy_(3 * write)
    gpt.wte.weight.mul_(10)
    gpt.save(folder, [f"w{i}" for i in range(V)], {"layer": 0})
    np.random.default_rng(0).integers(0, V, 400_000).astype(np.uint16).tofile(folder / "x.bin")
    return GPT.load(folder)


def spearman(a, b):
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


@pytest.mark.slow
def test_trained_units_are_the_planted_detectors_more_than_any_floor(tmp_path, capsys):
    gpt = plant(tmp_path)
    corpus = data.load_all(str(tmp_path / "x.bin"), gpt.vocab, T)
    truth = lambda rows: gpt.h[0].mlp.c_fc(gpt.prefix(rows, 0)[0]) > 0
    fit, test = [(rows, truth(rows)) for rows in (corpus[split].rows(T, 200) for split in ("fit", "test"))]
    names, found = [f"detector {k}" for k in range(K)], {}

    def judge(name, m):
        out = units.summary(m, gpt, fit, test, torch.arange(0), common.generator(0, "summary"), n=300)
        found[name] = out | evals.replacement(m, gpt, 0, fit, test, names)[1]

    for name, m in baselines.baselines(gpt, 0, fit[0], k=4, F=96, seed=0).items():
        judge(name, m)
    for name, (module, knob, values, change) in RUNS.items():
        for value in values:
            cfg = module.Config(model=str(tmp_path), data=str(tmp_path / "x.bin"), out=str(tmp_path / f"{name}{value}"),
                                device="cpu", T=T, eval_tokens=2400, **change, **{knob: value})
            m = module.train(cfg)[0]
            judge(f"{name} {value}", compare.Rounded(m, 0.1) if module is spd else m.requires_grad_(False))
    rho = {key: spearman(*([row[k] for row in found.values()] for k in (key, "coverage"))) for key in METRICS}
    with capsys.disabled():
        print(f"\n{'':16}" + "".join(f"{key[:12]:>14}" for key in ("coverage", "l0", *METRICS)))
        for name, row in found.items():
            print(f"{name:16}" + "".join(f"{row[key]:14.3f}" for key in ("coverage", "l0", *METRICS)))
        print(f"{'rank correlation with coverage':44}" + "".join(f"{v:14.2f}" for v in rho.values()))

    floor = max(found[name]["coverage"] for name in ("pca", "random", "svd"))
    assert found["neurons"]["coverage"] > 0.85
    for name, (*_, values, _) in RUNS.items():
        assert max(found[f"{name} {value}"]["coverage"] for value in values) > floor + 0.04, name
    assert all(v > 0.3 for v in rho.values())
