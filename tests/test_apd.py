"""Oracles of apd.py and toys.py: a second way to each number, known answers, and that the table goes on after a kill."""
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jacrev, vmap

import apd
import common
import toys
from apd import APD, Config, Job
from conftest import FORKS
from test_common import fails

SMALL = dict(C=7, R=2, k=0.5, alpha=0.3, beta=2., p=0.9, c_hidden=0.5, steps=6, B=16, lr=0.01, hold=0.7)


def small(name):
    """A toy that has hardly trained, with biases."""
    toy = toys.ResidMLP(0, steps=2) if name == "resid" else toys.TMS(5, 2, 0, steps=2)
    gen = torch.Generator().manual_seed(1)
    toy.bs = [0.1 * torch.randn(b.shape, generator=gen) for b in toy.bs]
    return toy


@pytest.fixture(params=["5-2", "resid"])
def toy(request):
    return small(request.param)


@pytest.fixture
def cfg():
    return Config(**SMALL)


def rand(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def outputs(toy, Ws, x_BN):
    return toy.out(lambda i, x: x @ Ws[i] + toy.bs[i], x_BN)


def dense(m, c):
    """Both matrices of one component."""
    return [V[:, c] @ U[c] for V, U in m.components()]


# ------------------------------------------------------------------------------------- the equations
def test_attributions_are_gradients_times_components(toy, cfg):
    """The plain equation: the gradient of each output at each weight, times the component's weights, summed, squared."""
    m = APD(toy, cfg, torch.Generator().manual_seed(0))
    x_BN = toy.busy_rows(4, torch.Generator().manual_seed(2))
    A_BC = apd.attributions(m, x_BN)
    one = lambda Ws, x_N: outputs(toy, Ws, x_N[None])[0]
    grads = vmap(jacrev(one), (None, 0))(toy.Ws, x_BN)              # per matrix (B, N, d_in, d_out)
    for c in range(m.C):
        moved = sum((g * P).sum((-1, -2)) for g, P in zip(grads, dense(m, c)))
        assert torch.allclose(A_BC[:, c], moved.square().mean(1), rtol=1e-3, atol=1e-7)


def test_attributions_are_finite_differences(toy, cfg):
    m = APD(toy, cfg, torch.Generator().manual_seed(0)).double()
    toy.Ws, toy.bs = ([t.double() for t in ts] for ts in (toy.Ws, toy.bs))
    if toy.E_ND is not None:
        toy.E_ND = toy.E_ND.double()
    x_BN = toy.busy_rows(4, torch.Generator().manual_seed(2)).double()
    A_BC = apd.attributions(m, x_BN)
    for c in range(m.C):
        ends = [outputs(toy, [W + e * P for W, P in zip(toy.Ws, dense(m, c))], x_BN) for e in (1e-6, -1e-6)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert torch.allclose(A_BC[:, c], slope.square().mean(1), rtol=1e-4, atol=1e-9)


def test_batch_top_k_has_the_largest_of_the_batch():
    A_BC = rand(6, 5).square()
    for n in (1, 7, 30):
        mask = apd.batch_top_k(A_BC, n)
        assert mask.sum() == n and A_BC[mask == 1].sum() == pytest.approx(A_BC.flatten().sort().values[-n:].sum().item())


@pytest.mark.parametrize("p", [0.5, 0.9, 1, 2])
def test_complexity_is_the_schatten_norm_of_orthogonal_pieces(p, cfg):
    toy = small("resid")
    m = APD(toy, dataclasses.replace(cfg, R=3), torch.Generator().manual_seed(0))
    want = torch.zeros(m.C)
    with torch.no_grad():
        for V, U in m.components():
            for c in range(m.C):
                V[:, c] = torch.linalg.qr(V[:, c]).Q * torch.tensor([2., 1, 0.5])
                U[c] = torch.linalg.qr(U[c].T).Q.T
                want[c] += torch.linalg.svdvals(V[:, c] @ U[c])[:3].pow(p).sum()
    assert torch.allclose(apd.complexities(m, p), want, rtol=1e-4)


def test_the_sum_of_the_pieces_is_the_mask(toy, cfg):
    m = APD(toy, cfg, torch.Generator().manual_seed(0))
    mask_BC = (rand(4, m.C) > 0).float()
    site = m.site(mask_BC)
    for i, W in enumerate(toy.Ws):
        x = rand(4, len(W), seed=i)
        want = torch.stack([sum(mask_BC[b, c] * x[b] @ dense(m, c)[i] for c in range(m.C)) for b in range(4)])
        assert torch.allclose(site(i, x), want + toy.bs[i], atol=1e-5)


def at_the_truth(toy, cfg):
    """An APD of TMS whose component c is feature c's row of the weights, and nothing else."""
    m = APD(toy, dataclasses.replace(cfg, C=toy.N), torch.Generator().manual_seed(0))
    V, U = m.components()[0]
    with torch.no_grad():
        V.zero_(), U.zero_()
        for c in range(toy.N):
            V[c, c, 0] = 1
            U[c, 0] = toy.Ws[0][c]
    return m


def test_at_the_truth_only_simplicity_costs_and_everything_is_found(cfg):
    toy = toys.TMS(5, 2, 0, steps=1500)
    m = at_the_truth(toy, cfg)
    x_BN = toy.busy_rows(64, torch.Generator().manual_seed(0))
    assert apd.faithfulness(m) == 0
    everything = torch.ones(64, toy.N)
    assert all(error < 1e-10 for error in apd.minimality(m, everything, x_BN))
    # on is what is in the input: the one feature
    A_BC = apd.attributions(m, toys.one_by_one(toy))
    assert (A_BC.argmax(1) == torch.arange(toy.N)).all()
    own = dataclasses.replace(cfg, C=5, k=0.2)
    verdicts = apd.judge(m, toy, own, torch.Generator().manual_seed(3))
    assert toys.solved(toy, verdicts) and len(verdicts) == 2
    # norms of W_in and of W_out, its transpose
    want = 2 * toy.Ws[0].norm(dim=1)
    assert torch.allclose(apd.complexities(m, 1.), want, rtol=1e-3)


def test_the_loss_is_its_equation(toy, cfg):
    m = APD(toy, cfg, torch.Generator().manual_seed(0))
    x_BN = toy.busy_rows(16, torch.Generator().manual_seed(2))
    total, terms = apd.loss_fn(m, x_BN, cfg)
    n = sum(W.numel() for W in toy.Ws)
    faith = sum((W - sum(dense(m, c)[i] for c in range(m.C))).square().sum() for i, W in enumerate(toy.Ws)) / n
    mask = apd.batch_top_k(apd.attributions(m, x_BN), round(0.5 * 16 / toy.busy))
    site = m.site(mask)
    minimal = (toy.out(site, x_BN) - outputs(toy, toy.Ws, x_BN)).square().mean()
    simple = sum((V.norm(dim=0) * U.norm(dim=2)).pow(0.9).sum(1) for V, U in m.components()) @ mask.sum(0) / 16 / n
    hidden = (toy.act(site(0, toy.embed(x_BN))) - toy.inputs(x_BN)[1]).square().mean()
    want = faith + toy.busy * (2 * minimal + 0.3 * simple + 0.5 * hidden)
    assert terms["faith"].item() == pytest.approx(faith.item(), rel=1e-4)
    assert total.item() == pytest.approx(want.item(), rel=1e-4)
    total.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_training_lowers_the_loss_and_a_seed_says_the_same(toy, cfg):
    cfg = dataclasses.replace(cfg, steps=60)
    ms = [apd.train(toy, cfg, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(ms[0].parameters(), ms[1].parameters()))
    assert not torch.equal(ms[0].V[0], ms[2].V[0])
    x_BN = toy.busy_rows(200, torch.Generator().manual_seed(5))
    fresh = APD(toy, cfg, torch.Generator().manual_seed(0))
    assert apd.loss_fn(ms[0], x_BN, cfg)[0] < apd.loss_fn(fresh, x_BN, cfg)[0]


def test_the_rate_rises_holds_and_falls():
    cfg = Config(steps=1000, hold=0.7)
    rates = [apd.rate(cfg, step) for step in range(1000)]
    assert rates[0] == 0 and rates[25] == pytest.approx(0.5) and rates[50:701] == [1] * 651
    assert rates[850] == pytest.approx(0.5) and rates[999] < 1e-3


# ------------------------------------------------------------------------------------------ the toys
def test_errors_count_what_is_wrongly_on_or_off():
    right = torch.eye(4, 6)[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert toys.errors(right) == 0
    extra = right.clone()
    extra[0][right[0] == 0] = 0.5
    assert toys.errors(extra) == 5
    shared = right.clone()
    shared[1] = right[0]
    assert toys.errors(shared) == 2                     # the second feature has none, and is on in the first's
    assert toys.errors(0 * right) == 4


def test_matched_finds_each_rows_component_and_its_size():
    rows_NM = rand(3, 4)
    pieces_NCM = torch.stack([torch.zeros(3, 4), rand(3, 4, seed=1), 0.5 * rows_NM], 1)
    cos_N, own_N, ratio_N = toys.matched(pieces_NCM, rows_NM)
    assert torch.allclose(cos_N, torch.ones(3)) and own_N.tolist() == [2, 2, 2] and torch.allclose(ratio_N, 0 * cos_N + 0.5)
    assert toys.matched(pieces_NCM[:, :0], rows_NM)[0].tolist() == [0, 0, 0]


def test_pieces_add_up_to_the_rows_of_the_weights(toy):
    for i in toy.judged:
        W = toy.Ws[i]
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        pieces = toy.pieces(i, (U * S).unsqueeze(-1), Vh.unsqueeze(1))
        assert torch.allclose(pieces.sum(1), toy.rows_of_W(), atol=1e-5)


def test_busy_rows_have_a_feature_on_and_their_share_is_known(toy):
    gen = torch.Generator().manual_seed(0)
    x_BN = toy.busy_rows(300, gen)
    assert len(x_BN) == 300 and x_BN.any(1).all()
    assert toy.rows(20_000, gen).any(1).float().mean().item() == pytest.approx(toy.busy, abs=0.02)


def test_the_random_stream_goes_on_where_training_ended(toy):
    assert torch.equal(torch.rand(3, generator=toy.generator()), torch.rand(3, generator=toy.generator()))


# ----------------------------------------------------------------------------------------- the table
def stub(monkeypatch):
    """Toys that have hardly trained, and short decompositions."""
    made = {seed: toys.TMS(5, 2, seed, steps=2) for seed in range(2)}
    monkeypatch.setattr(toys, "make", lambda name, seed: made[seed])
    monkeypatch.setattr(toys, "SPD", {"5-2": dataclasses.replace(toys.SPD["5-2"], steps=3, B=16)})
    monkeypatch.setattr(toys, "ROWS", 500)
    monkeypatch.setattr(apd, "step_cost", lambda cfg: dict(model="tiny", C=2, tokens=3, attribution=4., step=8.))


@pytest.fixture
def run(monkeypatch, tmp_path):
    stub(monkeypatch)
    return Config(toys="5-2", seeds=2, around=1, steps=3, B=16, out=str(tmp_path))


def test_jobs_are_seeds_and_more_around():
    todo = apd.jobs(Config(toys="5-2,40-10", seeds=3, around=1))
    assert len(todo) == len(set(todo)) == 2 * (3 * 2 + 5 + 3)
    assert todo[0] == Job("5-2", "apd", apd.OWN, 0)


def test_a_knob_is_moved_and_nothing_else():
    own, moved = (Job("5-2", "apd", setting, 0).config(Config()) for setting in (apd.OWN, "alpha x 2"))
    assert (own.alpha, own.k, own.C) == (0.7, 0.211, 5)
    assert moved == dataclasses.replace(own, alpha=1.4)
    spd_moved = Job("40-10", "spd", "c_imp x 0.5", 0).config(Config())
    assert spd_moved == dataclasses.replace(toys.SPD["40-10"], c_imp=2e-5)
    assert Job("resid", "apd", apd.UNTRAINED, 0).config(Config()).steps == 0


def test_flags_replace_a_toys_own_values():
    assert apd.suited(Config(alpha=0., C=9), "5-2").alpha == 0
    assert apd.suited(Config(alpha=0., C=9), "5-2").C == 9


def test_the_table_and_that_a_second_run_finds_all(run, capsys, monkeypatch):
    apd.main(run)
    page = Path(run.out, "apd.md").read_text()
    assert page in capsys.readouterr().out
    assert f"`{common.command(run)}` makes this page" in page and "--steps 3 --B 16" in page
    for text in ("| 5-2 | APD | its own |", "| 5-2 | APD | the paper's |  |  | 0.998 | 0.893 |", "k x 0.5", "| 5-2 | SPD |",
                 "c_imp x 2", "0 of 2", "4.00 s for 3 tokens"):
        assert text in page, text
    rows = json.loads(Path(run.out, "apd.json").read_text())["rows"]
    assert len(rows) == len(apd.jobs(run))
    monkeypatch.setattr(Job, "measure", None)
    apd.main(run)
    assert Path(run.out, "apd.md").read_text() == page


def test_other_code_is_another_row(monkeypatch):
    job = Job("5-2", "apd", apd.OWN, 0)
    keys = {str(job.depends_on(Config())), str(job._replace(method="spd").depends_on(Config()))}
    monkeypatch.setattr(apd, "CODE", apd.CODE[1:])
    assert len(keys | {str(job.depends_on(Config()))}) == 3
    assert job.depends_on(Config()) == job.depends_on(Config(out="elsewhere", seeds=2, around=0))


def test_other_flags_are_other_rows_and_are_not_mixed(run):
    apd.main(dataclasses.replace(run, around=0))
    apd.main(dataclasses.replace(run, around=0, seeds=1, alpha=0.3))
    assert "| 5-2 | APD | its own | 0 of 1 |" in Path(run.out, "apd.md").read_text()
    rows = json.loads(Path(run.out, "apd.json").read_text())["rows"]
    assert len(rows) == 4                               # the other seeds are kept, of those only seed 0 of APD is another


def test_k_is_per_row_of_all_rows():
    cfg = Config(k=0.25, C=5)
    assert apd.how_many_on(cfg, 1000) == 250 and apd.how_many_on(cfg, 200, share=0.2) == 250
    assert apd.how_many_on(cfg, 1) == 1 and apd.how_many_on(dataclasses.replace(cfg, k=50.), 3) == 15


def without_seconds(out):
    rows = json.loads(Path(out, "apd.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def run_and_die(cfg, n):
    """The table in a process that is killed after n rows."""
    patch = pytest.MonkeyPatch()
    stub(patch)
    write, seen = common.write, []

    def stop(path, data):
        write(path, data)
        seen.append(path)
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)
    common.write = stop
    apd.main(cfg)


def test_a_killed_table_goes_on_and_ends_the_same(run, tmp_path):
    run = dataclasses.replace(run, around=0)
    killed = dataclasses.replace(run, out=str(tmp_path / "killed"))
    victim = FORKS.Process(target=run_and_die, args=(killed, 4))        # what a step costs, a row, the page, a row
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL and len(without_seconds(killed.out)) == 2
    apd.main(killed)
    whole = dataclasses.replace(run, out=str(tmp_path / "whole"))
    apd.main(whole)
    assert without_seconds(killed.out) == without_seconds(whole.out)


def test_what_diverged_stays_in_the_table(run, capsys, monkeypatch):
    loss_fn = apd.loss_fn
    monkeypatch.setattr(apd, "loss_fn", lambda *args: (loss_fn(*args)[0] * float("nan"), None))
    apd.main(dataclasses.replace(run, around=0))
    rows = json.loads(Path(run.out, "apd.json").read_text())["rows"]
    assert [row["mmcs"] for row in rows if row["method"] == "apd"] == [None, None]
    assert "| 5-2 | APD | its own | 0 of 2 | 0 of 2 | FAILED | FAILED |" in Path(run.out, "apd.md").read_text()


@pytest.mark.parametrize("change, words", [
    (dict(toys="5-3"), ["--toys 5-3", "5-2, 40-10, resid"]),
    (dict(toys=""), ["--toys"]),
    (dict(k=9.), ["--k 9.0", "(0, 5]"]),
    (dict(k=0.), ["--k 0.0"]),
    (dict(C=0), ["--C 0"]),
    (dict(alpha=-0.5), ["--alpha -0.5", "[0, inf]"]),
    (dict(lr=0.), ["--lr 0.0"]),
    (dict(out="/proc/no"), ["/proc/no"]),
    (dict(model="nowhere"), ["nowhere"])])
def test_bad_input_ends_in_one_line(run, capsys, change, words, monkeypatch):
    if "model" in change:
        monkeypatch.undo()
    cfg = dataclasses.replace(run, **change)
    fails(capsys, lambda: apd.main(cfg), *words)
    assert not Path(cfg.out, "apd.json").exists()


def test_a_step_on_a_language_model_is_timed(target):
    cost = apd.step_cost(Config(model=str(target)), C=10, B=2, T=12)
    assert cost["tokens"] == 24 and cost["step"] == pytest.approx(10 * cost["attribution"]) and cost["attribution"] > 0


@pytest.mark.slow
def test_apd_finds_the_features_of_tms(capsys):
    """What the paper reports: MMCS .998 and ML2R .893; components that are chosen by k hold less than the whole norm."""
    torch.set_num_threads(1)
    rows = [Job("5-2", "apd", apd.OWN, seed).measure(Config()) for seed in range(3)]
    with capsys.disabled():
        print(*rows, sep="\n")
    assert sum(row["found"] for row in rows) >= 2
    assert all(row["mmcs"] >= 0.99 and 0.85 <= row["ml2r"] <= 0.95 for row in rows if row["found"])
