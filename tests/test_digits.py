"""digits.py: drawn digits against brute force, the network under masks against itself, splits that add up, MNIST's files,
runs that go on bit for bit, and what a bad input says."""
import dataclasses
import gzip
import json

import pytest
import torch
import torch.nn.functional as F

import common
import digits
import evals
import spd
from digits import Config, Images
from metrics import masks

TINY = dict(images=200, net_steps=5, steps=4, B=16, C=128, ci_hidden=4, save_every=2, device="cpu")


@pytest.fixture(scope="module")
def drawn():
    """Training and test images, fewer than a run has."""
    return digits.draw(3000, common.generator(0, "training writers")), digits.draw(600, common.generator(0, "test writers"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A run of seconds, in a folder of its own."""
    monkeypatch.setattr(digits, "TEST", 120)
    digits.load_images.cache_clear()
    yield Config(**TINY, study=False, out=str(tmp_path / "run"), networks=str(tmp_path / "networks"),
                 results=str(tmp_path / "results"))
    digits.load_images.cache_clear()


def some_net(depth, biased=True):
    net = digits.Net(depth, common.generator(0, "net")).requires_grad_(False)
    for b in net.bs:
        b += 0.1 * torch.randn(b.shape, generator=common.generator(0, "biases")) if biased else 0
    return net


# ------------------------------------------------------------------------------------------------------ drawing
def test_a_smooth_line_goes_through_its_points():
    points = torch.randn(5, 2, generator=common.generator(0, "points"))
    line = digits.smooth(5) @ points
    assert torch.allclose(line[::digits.PIECES], points, atol=1e-6)
    assert torch.allclose(digits.smooth(5).sum(1), torch.ones(len(line)), atol=1e-6)        # moves with its points
    inner = digits.smooth(5) @ torch.arange(5.)                     # evenly spaced points: an even, straight line
    steps = inner[digits.PIECES:-digits.PIECES].diff()
    assert torch.allclose(steps, torch.full_like(steps, 1 / digits.PIECES), atol=1e-6)


def test_every_figure_is_drawn_whole():
    table = digits.pens()
    for i, figure in enumerate(digits.FIGURES):
        ends = torch.cat([table.starts[i] @ table.points[i], table.ends[i] @ table.points[i]])
        wanted = torch.tensor([point for stroke in figure.strokes for point in stroke])
        assert torch.cdist(wanted, ends).amin(1).max() < 1e-6
    assert table.ways_J.sum() == len(digits.FIGURES) and (table.ways_J > 0).all()
    assert all(digits.FIGURES[first].digit == j for j, first in enumerate(table.first_J.tolist()))


def test_ink_is_by_the_distance_to_the_nearest_segment():
    table, figure_N = digits.pens(), torch.tensor([3, 7])
    points = table.points[figure_N] + 0.1 * torch.randn(2, *table.points.shape[1:], generator=common.generator(0, "bend"))
    radius = torch.tensor([0.1, 0.2])
    share = torch.linspace(0, 1, 400).view(-1, 1, 1)
    axis = torch.linspace(-1.35, 1.35, 28)
    pixels = torch.stack([axis.repeat(28), axis.repeat_interleave(28)], 1)
    for i, got in enumerate(digits.trace(points, figure_N, radius)):
        start, end = (part[figure_N[i]] @ points[i] for part in (table.starts, table.ends))
        dense = (start + share * (end - start)).flatten(0, 1)
        wanted = ((radius[i] - torch.cdist(pixels, dense).amin(1)) / .04).sigmoid()
        assert (got - wanted).abs().max() < 0.01


def test_drawn_digits_are_told_apart_and_test_images_are_new(drawn):
    train, test = drawn
    assert 0 <= train.x_NP.min() and train.x_NP.max() <= 1 and train.x_NP.std(0).min() > 0
    assert train.label_N.bincount(minlength=10).min() > 200
    # a linear probe: ridge regression on the classes
    X, Y = F.pad(train.x_NP, (0, 1), value=1.), F.one_hot(train.label_N, 10).float()
    W = torch.linalg.solve(X.T @ X + 30 * torch.eye(785), X.T @ Y)
    assert ((F.pad(test.x_NP, (0, 1), value=1.) @ W).argmax(1) == test.label_N).float().mean() > 0.85
    # no test image is a training image, nor nearly: the nearest two are further apart than the paper's noise moves one
    assert torch.cdist(test.x_NP, train.x_NP).min() > 0.05 * 28
    assert torch.equal(digits.draw(80, common.generator(1, "a")).x_NP, digits.draw(80, common.generator(1, "a")).x_NP)


def test_label_noise_is_the_share_that_was_asked_for():
    label = torch.arange(20_000) % 10
    for share in (0., 0.2, 1.):
        noisy = digits.with_noise(label, share, common.generator(0, "noise"))
        assert (noisy != label).float().mean().item() == pytest.approx(0.9 * share, abs=0.01)


# ------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("depth", digits.DEPTHS)
@pytest.mark.parametrize("parts", ["learned", "started", *digits.HELD])
def test_components_add_up_to_the_network(depth, parts, drawn):
    net, x = some_net(depth), drawn[1].x_NP[:50]
    cfg = Config(depth=depth, parts=parts, C=160)
    m = digits.build(cfg, net)
    digits.begin(m, cfg)
    logits, reads = digits.through(net, x, len(net.Ws))
    for W, V, U in zip(m.Ws, m.V, m.U):
        assert evals.relative_error(V @ U, W) < 1e-4
    # all masks 1, of the rest too: the network itself
    ones = [torch.ones(50, 160)] * len(net.Ws)
    same, same_reads = digits.through(m.site(ones, [torch.ones(1)] * len(ones)), x, len(ones))
    assert torch.allclose(same, logits, atol=1e-4) and torch.allclose(same_reads[-1], reads[-1], atol=1e-4)
    without, _ = digits.through(m.site(*masks.all_on(ones)), x, len(ones))
    assert torch.allclose(without, logits, atol=2e-3)
    assert digits.Clean(net, x).kl(m.site(*masks.all_on(ones))).item() < 1e-5


def test_splits_are_rows_columns_and_singular_vectors():
    gen = common.generator(0, "W")
    W = torch.randn(20, 7, generator=gen)
    V, U = digits.split(W, "rows", False)
    assert torch.equal(V[:, 3, None] * U[3], W * (torch.arange(7) == 3))
    V, U = digits.split(W, "neurons", False)
    assert torch.equal(V[:, 3, None] * U[3], W * (torch.arange(20) == 3).unsqueeze(1))
    assert all(map(torch.equal, digits.split(W, "neurons", True), digits.split(W, "rows", False)))
    V, U = digits.split(W, "svd", False)
    assert torch.allclose(V @ U, W, atol=1e-5) and torch.allclose(U @ U.T, torch.eye(7), atol=1e-5)


def test_held_components_stay_and_learned_ones_move(tiny):
    for parts in ("svd", "learned"):
        cfg = dataclasses.replace(tiny, parts=parts, out=tiny.out + parts)
        m, _, net = digits.train(cfg)
        start = digits.build(cfg, net)
        digits.begin(start, cfg)
        assert all(map(torch.equal, [*m.V, *m.U], [*start.V, *start.U])) == (parts == "svd")


def test_the_attack_is_worse_than_chance_and_keeps_its_bounds(drawn):
    net, x = some_net("deep"), drawn[1].x_NP[:50]
    m = digits.build(Config(C=128), net)
    digits.begin(m, Config(C=128))
    clean, gen = digits.Clean(net, x), common.generator(0, "attack")
    importance = [g.fill_(.5) for g in digits.importances(m, net, x)]
    met = digits.attack(m, clean, importance, gen)
    assert all(0 <= source.min() and source.max() <= 1 for source in met)
    random = spd.stochastic(importance, gen)
    assert clean.kl(m.masked(importance, met)) > 2 * clean.kl(m.masked(importance, random))


def test_class_f1_by_hand():
    g = torch.tensor([[1., 0, .05], [1, 0, 0], [0, 0, 1], [1, 0, 1]])
    f1 = digits.class_f1(g, torch.tensor([0, 0, 1, 2]))
    assert f1.shape == (3, 10)
    assert torch.allclose(f1[0, :3], torch.tensor([4 / 5, 0, 2 / 4])) and (f1[1] == 0).all()
    assert torch.allclose(f1[2, :3], torch.tensor([0, 2 / 3, 2 / 3]))


def test_a_components_class_is_chosen_on_other_images(monkeypatch):
    monkeypatch.setattr(evals, "ALIVE", 1)
    m = digits.build(Config(C=128), some_net("shallow"))
    fit, test = (torch.zeros(4, 128) for _ in range(2))
    fit[2:, 0] = 1                      # on at class 5 alone
    test[:2, 0] = 1                     # on at class 3, and at one image of class 5
    images = [Images(torch.zeros(4, 784), torch.tensor(label)) for label in ([3, 3, 5, 5], [3, 5, 5, 5])]
    found = digits.of_one_matrix(m, 1, fit, test, *images)
    assert found["each"] == [(5, pytest.approx(2 / 5, abs=1e-6))] and found["alive"] == 1 and found["l0"] == 0.5
    assert found["f1"] == pytest.approx(2 / 5) and found["classes"] == pytest.approx((2 / 3 + 2 / 5) / 10)


# -------------------------------------------------------------------------------------------------------- files
def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.numpy().tobytes()


def mnist(folder, n=150):
    folder.mkdir()
    images = {}
    for split, suffix in (("train", ""), ("t10k", ".gz")):
        gen = common.generator(0, split)
        x, label = torch.randint(256, (n, 28, 28), generator=gen).byte(), torch.randint(10, (n,), generator=gen).byte()
        for name, array in (("images-idx3-ubyte", x), ("labels-idx1-ubyte", label)):
            raw = idx(array)
            (folder / f"{split}-{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
        images[split] = x, label
    return images


def test_mnist_is_read_plain_and_gzipped(tmp_path):
    made = mnist(tmp_path / "mnist")
    train, test = digits.load_images(str(tmp_path / "mnist"), 100)
    for got, split, n in ((train, "train", 100), (test, "t10k", 150)):
        x, label = made[split]
        assert torch.equal(got.x_NP.view(-1, 28, 28) * 255, x[:n].float()) and torch.equal(got.label_N, label[:n].long())


def garble(path, where):
    """Change some bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[where] = bytes(byte ^ 255 for byte in raw[where])
    path.write_bytes(raw)


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "train-images-idx3-ubyte").unlink(), "has no train-images-idx3-ubyte"),
    (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03"), "damaged"),
    (lambda f: (f / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip"), "cannot read"),
    (lambda f: garble(f / "t10k-labels-idx1-ubyte.gz", slice(10, 14)), "cannot read"),
    (lambda f: garble(f / "t10k-labels-idx1-ubyte.gz", slice(-6, -5)), "cannot read"),
    (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(idx(torch.full((150,), 10).byte())), "label from 0 to 9"),
    (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(idx(torch.zeros(149).byte())), "28 x 28 images"),
    (lambda f: (f / "train-images-idx3-ubyte").write_bytes(idx(torch.zeros(150, 28, 27).byte())), "28 x 28 images"),
])
def test_bad_mnist_ends_in_one_line(tmp_path, capsys, damage, says):
    mnist(tmp_path / "mnist")
    damage(tmp_path / "mnist")
    with pytest.raises(SystemExit) as e:
        digits.load_images(str(tmp_path / "mnist"), 100)
    error = capsys.readouterr().err
    assert e.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize("change, says", [
    (dict(data="nowhere"), "--data nowhere"), (dict(C=127), "--C 127: must be at least 128"),
    (dict(C=10**6, B=10**6), "--C 1000000"),
    (dict(resume=True), "to --resume")])
def test_bad_flags_end_in_one_line(tiny, capsys, change, says):
    with pytest.raises(SystemExit) as e:
        digits.main(dataclasses.replace(tiny, **change))
    error = capsys.readouterr().err
    assert e.value.code == 2 and says in error and error.count("\n") == 1


def test_fewer_images_than_asked_for(tmp_path, capsys):
    mnist(tmp_path / "mnist")
    with pytest.raises(SystemExit):
        digits.load_images(str(tmp_path / "mnist"), 151)
    assert "has 150 training images, not 151" in capsys.readouterr().err


@pytest.mark.parametrize("change, says", [
    (dict(memorised=151), "has 150 training images, not 151"), (dict(depth="shallow"), "--depth: goes with --no-study"),
    (dict(parts="rows"), "--parts"), (dict(noise=0.5), "--noise"), (dict(judge="fit"), "--judge")])
def test_the_study_refuses_what_it_cannot_use_before_it_trains(tiny, tmp_path, capsys, change, says):
    mnist(tmp_path / "mnist")
    cfg = dataclasses.replace(tiny, study=True, data=str(tmp_path / "mnist"), images=100, memorised=100)
    with pytest.raises(SystemExit) as e:
        digits.main(dataclasses.replace(cfg, **change))
    error = capsys.readouterr().err
    assert e.value.code == 2 and says in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------- runs
def test_a_killed_run_goes_on_bit_for_bit(tiny, monkeypatch, capsys):
    whole, found, net = digits.train(tiny)
    broken = dataclasses.replace(tiny, out=tiny.out + "-broken")
    save = common.Run.save

    def stop(run):
        save(run)
        raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.train(broken)
    common.let_go(broken.out)
    monkeypatch.setattr(common.Run, "save", save)
    rest, again, _ = digits.train(dataclasses.replace(broken, resume=True))
    assert all(map(torch.equal, whole.state_dict().values(), rest.state_dict().values()))
    assert found["masks"] == again["masks"] and found["matrices"] == again["matrices"]
    # the network was read the second time, and another seed is another decomposition
    assert digits.load_net(tiny, *given(tiny)).hash == net.hash
    other, _, _ = digits.train(dataclasses.replace(tiny, seed=1, out=tiny.out + "-1"))
    assert not torch.equal(other.V[0], whole.V[0])
    # other flags: another run
    capsys.readouterr()
    with pytest.raises(SystemExit):
        digits.train(dataclasses.replace(broken, resume=True, c_imp=1.))
    assert "does not fit this run" in capsys.readouterr().err


def given(cfg):
    train, test = digits.load_images(cfg.data, cfg.images)
    return train, digits.fingerprint([*train, *test])


def test_the_study_writes_its_tables_and_pictures(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "summarise", quick)
    monkeypatch.setattr(digits, "NOISES", (0., 1.))
    monkeypatch.setattr(digits, "TIMES_C_IMP", (0.5, 1.))
    cfg = dataclasses.replace(tiny, study=True, seeds=2, images=120, memorised=100, steps=1, net_steps=1)
    assert len(digits.jobs(cfg)) == 2 * (2 + 4) + 2 * 2 * 2
    cfg.seeds = 1
    models, found = digits.main(cfg)
    assert len(models) == len(found) == 2 * (1 + 4) + 2 * 2
    text = (tmp_path / "results/digits.md").read_text()
    assert (tmp_path / "results/digits.png").stat().st_size > 10_000
    for head in ("## The shallow network", "## The deep network", "## Label noise", "| 100% |", "| **100%** |", "| W_3 | svd |"):
        assert head in text
    assert "/ -0.0000" not in text
    # with --resume nothing is trained anew
    began = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    digits.main(dataclasses.replace(cfg, resume=True))
    assert began == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_counts_are_read_off_at_one_kl():
    """Of a power law they are exact: alive = 2 KL^-1, L0 = KL^-0.5."""
    law = [(kl, 2 / kl, kl**-0.5) for kl in (1e-3, 1e-2, 1.)]
    assert digits.at_kl(law, 0.04) == ("**50**", "**5.0**")
    assert digits.at_kl(law, 2.) == digits.at_kl(law, 1e-4) == ("n/a", "n/a")
    # a weaker penalty with more components at a larger KL does not stand in for a stronger one that costs less
    assert digits.at_kl([(5e-3, 364, 97), *law], 0.04) == ("**50**", "**5.0**")
    # without a component there is no logarithm; a KL of 0 may be rounded below it
    assert digits.at_kl([*law[:2], (1., 0, 0.)], 0.04) == ("n/a", "n/a")
    assert digits.at_kl([(-1e-8, 50, 5.), (1., 50, 5.)], 0.04) == ("**50**", "**5.0**")


def quick(cfg, net, m, fit, test, seconds):
    """A summary of few images."""
    few = Images(*(tensor[:40] for tensor in test))
    found = dict(masks=digits.under_masks(m, net, few, common.generator(0, "few")), fit_accuracy=0.5,
                 loss=digits.loss_on(cfg, net, m, few, common.generator(0, "loss")))
    g = digits.importances(m, net, few.x_NP)
    return found | dict(matrices=[digits.of_one_matrix(m, i, h, h, few, few) for i, h in enumerate(g)])


def test_summary_is_written_and_judges_noise_where_it_was_learned(tiny, capsys):
    _, found, net = digits.train(dataclasses.replace(tiny, noise=1., judge="fit", images=110))
    saved = json.loads((digits.Path(tiny.out) / "summary.json").read_text())
    assert saved["target"] == net.hash and saved["matrices"] == json.loads(json.dumps(found["matrices"]))
    assert saved["masks"]["clean"][0] == pytest.approx(found["fit_accuracy"])       # so few that all are judged
