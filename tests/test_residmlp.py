"""Ground truth for spd.py where mechanisms are not neurons: toys.ResidMLP, whose 50 neurons compute 100 functions.

Bushnaq, Braun, Sharkey 2025 (arXiv:2506.20790) find 100 components in W_in, one per feature, and 50 in W_out. What the
true mechanisms of W_out are is less clear, as many neurons are in use at a time: it is printed, not tested.

    python -m pytest -q -s -m slow tests/test_residmlp.py       # 4 minutes on one core
"""
import time

import pytest
import torch
import torch.nn.functional as F

import evals
import spd
import toys

CFG = toys.SPD["resid"]


def compare_rows(toy, reads_NP, writes_PM):
    """How well rank-one pieces contain the row of each feature, the vector that W_in writes for it.

    Piece p computes reads[i, p] writes[p] of feature i. The piece with the largest cosine with the feature's row is its
    own. MMCS: mean of these cosines, 1 is best. ML2R: mean ratio of the norms, 1 is best. reads: mean cosine between
    what the own pieces read of all features and the feature alone, 1 is best."""
    cos_N, own_N, ratio_N = toys.matched(reads_NP[:, :, None] * writes_PM, toy.rows_of_W())
    read_N = reads_NP[torch.arange(toy.N), own_N].abs() / reads_NP[:, own_N].norm(dim=0)
    return dict(mmcs=cos_N.mean().item(), worst=cos_N.min().item(), ml2r=ratio_N.mean().item(),
                reads=read_N.mean().item())


def nulls(toy, gen):
    """The measures of three decompositions of W_in that sum to it exactly and were not trained."""
    W_in = toy.Ws[0]
    m = spd.SPD([W_in], [torch.zeros(toy.M)], CFG, gen)
    spd.begin(m, CFG)
    U, S, Vh = torch.linalg.svd(W_in, full_matrices=False)
    pieces = {"random start": (m.V[0], m.U[0]), "svd": (U * S, Vh), "neurons": (W_in, torch.eye(toy.M))}
    return {name: compare_rows(toy, toy.E_ND @ reads, writes) for name, (reads, writes) in pieces.items()}


@torch.no_grad()
def judge(m, toy, gen):
    """The measures of the alive components of W_in; importance errors on the inputs 0.75 e_i; alive components in W_in
    and W_out (at a threshold of 0.1, on 50,000 rows); how many of W_out's are on when one feature is; how near to a
    single neuron W_out's alive components read (mean largest cosine)."""
    single, random = (toys.importances(m, toy, x) for x in (toys.one_by_one(toy), toy.rows(50_000, gen)))
    alive = [(g > 0.1).sum(0) >= evals.ALIVE for g in random]
    row = compare_rows(toy, toy.E_ND @ m.V[0][:, alive[0]], m.U[0][alive[0]])
    return row | dict(error=toys.errors(single[0]), alive_in=alive[0].sum().item(),
                      alive_out=alive[1].sum().item(), on_out=(single[1] > 0.1).sum(1).float().mean().item(),
                      neuron=F.normalize(m.V[1][:, alive[1]], dim=0).abs().amax(0).mean().item())


def show(name, row):
    print(f"  {name:14}" + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_component_of_W_in_per_feature(seed, capsys):
    torch.set_num_threads(1)                                    # the toy is tiny
    toy = toys.make("resid", seed)
    gen = toy.generator()
    rows_NM = toy.rows_of_W()
    neurons = (rows_NM.square().sum(1).square() / rows_NM.pow(4).sum(1)).mean().item()
    start = time.time()
    row, null = judge(toys.decompose(toy, CFG, gen), toy, gen), nulls(toy, gen)
    with capsys.disabled():
        print(f"\nResidMLP seed {seed}: target loss {toy.loss:.5f} ({toy.without:.5f} without its MLP), {neurons:.1f} "
              f"neurons a feature; {time.time() - start:.0f} s")
        show("paper", dict(alive_in=100, alive_out=50))
        show("spd", row)
        for name, floor in null.items():
            show(name, floor)
    assert toy.loss < 0.6 * toy.without and neurons > 5
    assert row["error"] == 0 and row["alive_in"] == toy.N
    assert row["mmcs"] >= 0.98 and abs(row["ml2r"] - 1) <= 0.05 and row["reads"] >= 0.98
    assert all(floor["mmcs"] < 0.9 for floor in null.values())
