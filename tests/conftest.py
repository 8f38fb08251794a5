"""The target that most methods are tested on, and a kill for their trainings."""
import multiprocessing
import os
import signal
import sys

if "PYTEST_XDIST_WORKER" in os.environ:             # -n: a core each, also for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

import common
import data
from model import GPT, GPTConfig

D, M, V, T = 8, 16, 30, 12


def noisy_gpt(n_layer, D, M, T, V):
    """A random GPT in which nothing is zero."""
    gpt = GPT(GPTConfig(V, n_layer=n_layer, n_embd=D, n_head=2, n_inner=M, n_positions=T), common.generator(0, "init"))
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=common.generator(p.numel(), "more"))
    return gpt.eval().requires_grad_(False)


# forks of a process that has imported these and done nothing yet: a fresh one needs two seconds for it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "safetensors.torch", "pytest"])


def kill(cfg, step=4):
    """Train as cfg says in a process of its own that is killed as soon as its first checkpoint from this step on is there."""
    victim = FORKS.Process(target=train_and_die, args=(cfg, step, data.ROWS))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL


def train_and_die(cfg, step, rows):
    save, data.ROWS = common.save, rows

    def stop(path, tensors, meta):
        save(path, tensors, meta)
        if meta["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)
    common.save = stop
    sys.modules[type(cfg).__module__].train(cfg)


@pytest.fixture(autouse=True)
def default_products():
    """Matrix products as a fresh process has them, after a test of a script that chose others (common.fast_matmul)."""
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(scope="module")
def n_layer():
    """Of `target`; a file of tests may have its own."""
    return 3


@pytest.fixture(scope="module")
def target(n_layer, tmp_path_factory):
    """Folder with a random GPT and a .bin of tokens."""
    folder, gen = tmp_path_factory.mktemp("target"), torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig(V, n_layer=n_layer, n_embd=D, n_head=2, n_inner=M, n_positions=T), gen)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=gen)
    gpt.save(folder, [f"w{i}" for i in range(V)], {"layer": 1})
    np.random.default_rng(0).integers(0, V, 20_000).astype(np.uint16).tofile(folder / "x.bin")
    return folder
