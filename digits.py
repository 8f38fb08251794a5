"""Digits: does an MLP that reads digits have parts of its own, beside its neurons and its classes?

A small MLP learns to tell handwritten digits, and spd.py's own functions take all of its matrices
apart at once. The digits are drawn here, by writers who each have a hand of their own; those of the
test images wrote no training image. Whatever SPD finds stands beside three splits of the same
matrices that nobody has to learn: their rows, their singular vectors and the neurons' weights.

    h_0 = x                             an image: 784 pixels between 0 and 1
    h_i = relu(h_{i-1} W_i + b_i)       one hidden layer of 128 (shallow), or two (deep)
    logits = h W + b                    of the ten digits
    W_i = V_i U_i + rest                masks, importances and the loss are those of spd.py: KL of
                                        the predictions from the clean ones

    rows        component j is all that output j of a matrix reads: W[:, j] times the j-th unit
                vector, a row where matrices are (d_out, d_in). The last matrix has ten, one for
                each class, and any 10 rows are such a split, of random weights too: that a matrix
                falls into them says nothing
    neurons     hidden neuron k's own weights: W[:, k] that it reads by in the first matrix, W[k]
                that it writes by in the others
    svd         the singular vectors
    V and U of these are held. Their importances are trained as SPD's are: same loss, same steps.
    The test is the matrix between two hidden layers, which has no classes on either side.
    started     V and U learn, but from the neurons: what loss is reachable

The method: SPD, Bushnaq, Braun, Sharkey 2025 (arXiv:2506.20790). The splines of the pen: Catmull,
Rom 1974. MNIST, whose files --data reads: LeCun, Bottou, Bengio, Haffner 1998.

Differs from spd.py: its earlier recipe, spd.FORMER; every matrix of the network is taken apart, not
those of one MLP; drawn images instead of text; one position a row.

N images, B images of a batch, P pixels, C components of a matrix, S segments of a drawn figure,
K points that guide its pen, J classes

What the defaults are from (deep network, 8,000 images, seed 0; loss at the end of training):
    steps   600: .198 with c_imp 1e-3, from the neurons .118, neurons held .390. 1,800: .096, and
            KL under attack .11 instead of 1.10, but 84 components alive in W_1 for 66: more of them
            are on at few images each
    lr      .06: .345 after 600 steps, KL under attack 7.4
    c_imp   4e-3: L0 4.4 + 3.4 + 3.1 for 9.5 + 10.1 + 6.0 with 1e-3, rounded KL .049 for .043; under
            attack 2.2 for 1.1
With 1,000 steps and 2e-3 random starts end at .118 (shallow) and .221 (deep), a start at the
neurons at .082 and .154: they are not settled, and more steps change their counts.

Found: the hidden matrix of the deep network falls into 41 components, 4.5 on at an image. Most are
on for one class each, a few for two (F1 .95 on average); a class has 2 to 8. The matrix's rows need
97 and 11.0, its neurons 78 and 9.4.
With 0, 20, 100 % random labels memorised, 46, 136, 182 components are alive and 5, 15, 35 on at
an image where rounded masks cost .02 nats: more, but not a hundred times as many. Two seeds each,
and between the penalties around .02 nats the KL rises up to 600 times: rough figures.

    python digits.py        # 35 minutes on one core: results/digits.md and digits.png
"""
import functools
import gzip
import hashlib
import itertools
import json
import math
import statistics
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import evals
import spd
from metrics import masks
from report import curve
from report.table import markdown_table, mean_text
from studies.kept import apart


@dataclass
class Config:
    # what to take apart, where to write
    study: bool = True              # all networks, splits and noises; else the one named below
    data: str = "drawn"             # drawn, or a folder with MNIST's four idx files (.gz or not)
    out: str = "runs/digits"        # folder for checkpoints, logs and networks
    results: str = "results"        # folder for digits.md and digits.png; a part: results-part
    networks: str = "runs/digits/networks"  # folder for the networks that are taken apart
    resume: bool = False            # go on from the checkpoints in --out
    device: str = "auto"            # auto, cpu, cuda
    seed: int = 0                   # [0, 1e18] of the decomposition; the study's first of --seeds
    seeds: int = 5                  # [1, 100] decompositions of each network in the study
    # the network
    depth: Literal["shallow", "deep"] = "deep"  # one hidden layer or two
    images: int = 16_000            # [100, 1e6] training images
    memorised: int = 2000           # [100, 1e6] training images in the study of label noise
    noise: float = 0.               # [0, 1] share of training labels that are drawn at random
    net_steps: int = 3000           # [1, 1e8] training steps of the network
    # its decomposition
    parts: Literal["learned", "started", "rows", "neurons", "svd"] = "learned"  # of the matrices
    C: int = 160                    # [1, 1e6] components per matrix; V U = W takes 128
    ci_hidden: int = 128            # [1, 1e6] hidden width of the importance net
    steps: int = 1000               # [1, 1e8] training steps
    B: int = 128                    # [1, 1e6] images per step
    lr: float = 0.03                # (0, 100] of V and U, by Muon
    c_imp: float = 2e-3             # [0, 1e9] importance: THE knob
    # looking and saving
    judge: Literal["test", "fit"] = "test"  # test images, or training images, make up the summary
    log_every: int = 50             # [1, 1e9] steps between lines of log.jsonl
    save_every: int = 500           # [1, 1e9] steps between checkpoints


# flags that a resumed run may give other values (common.Run)
MAY_CHANGE_ON_RESUME = {"study", "data", "out", "results", "networks", "resume", "device", "seeds",
                        "memorised", "judge", "log_every", "save_every"}
SIDE = 28                           # pixels of an image's side
CLASSES = 10
HELD = ("rows", "neurons", "svd")    # --parts whose V and U do not learn
WIDTH = 128                         # neurons of a hidden layer
TEST = 4000                         # drawn test images
PER_WRITER = 8                      # images of one writer
FEW = 1000                          # images on which the attack looks for its sources


# ----------------------------------------------------------------------------------- the digits
class Figure(NamedTuple):
    """One way to write a digit: strokes, each a smooth line near some points (x, y). x goes right,
    y down, and a digit is about 1 wide and 2 high, around (0, 0)."""
    digit: int
    strokes: tuple


FIGURES = (
    Figure(0, (((0, -.9), (-.5, -.5), (-.55, .2), (-.2, .85), (.3, .8), (.55, .2), (.45, -.5),
                (0, -.9)),)),
    Figure(1, (((0, -.9), (0, 0), (0, .9)),)),
    Figure(1, (((-.35, -.5), (.05, -.9)), ((.05, -.9), (.05, .9)))),
    Figure(2, (((-.5, -.5), (-.1, -.9), (.4, -.7), (.35, -.2), (-.1, .35), (-.55, .85)),
               ((-.55, .85), (.55, .85)))),
    Figure(3, (((-.45, -.75), (0, -.9), (.4, -.6), (.2, -.15), (-.1, -.05)),
               ((-.1, -.05), (.35, .1), (.5, .5), (.1, .9), (-.5, .7)))),
    Figure(4, (((-.2, -.9), (-.5, .2)), ((-.5, .2), (.55, .2)), ((.3, -.4), (.25, .9)))),
    Figure(4, (((.3, -.9), (-.5, .3)), ((-.5, .3), (.55, .3)), ((.3, -.9), (.3, .9)))),
    Figure(5, (((.45, -.85), (-.35, -.85)), ((-.35, -.85), (-.4, -.1)),
               ((-.4, -.1), (.1, -.25), (.5, .2), (.3, .75), (-.1, .9), (-.5, .7)))),
    Figure(6, (((.35, -.9), (-.2, -.5), (-.5, .1), (-.4, .7), (0, .9), (.45, .6), (.35, .15),
                (0, 0), (-.4, .3)),)),
    Figure(7, (((-.5, -.85), (.5, -.85)), ((.5, -.85), (.15, 0), (-.1, .9)))),
    Figure(7, (((-.5, -.85), (.5, -.85)), ((.5, -.85), (.15, 0), (-.1, .9)),
               ((-.25, 0), (.45, 0)))),
    Figure(8, (((0, -.05), (-.4, -.45), (-.05, -.9), (.4, -.5), (0, -.05), (-.5, .45), (0, .9),
                (.5, .45), (0, -.05)),)),
    Figure(9, (((.45, -.5), (.1, -.9), (-.4, -.6), (-.35, -.15), (0, -.05), (.4, -.4),
                (.45, -.5)), ((.45, -.5), (.4, .2), (.15, .9)))),
)
PIECES = 4                          # segments that the pen draws between two points
# 1, t, t^2, t^3 times this / 2: how much four points weigh at t between the second and the third
CATMULL_ROM = ((0., 2., 0., 0.), (-1., 0., 1., 0.), (2., -5., 4., -1.), (-1., 3., -3., 1.))


class Images(NamedTuple):
    """Images (N, 784) between 0 and 1, and what they show (N)."""
    x_NP: torch.Tensor
    label_N: torch.Tensor


def smooth(k):
    """Which points does a smooth line go through, as a matrix (PIECES (k - 1) + 1, k) times the k
    points that guide it? A Catmull-Rom spline: a cubic between each two points."""
    # the line's ends count twice
    guide = torch.eye(k)
    guide = torch.cat([guide[:1], guide, guide[-1:]])
    t = (torch.arange(PIECES) / PIECES).unsqueeze(1)
    weights = t ** torch.arange(4) @ torch.tensor(CATMULL_ROM) / 2
    spans = [weights @ guide[i:i + 4] for i in range(k - 1)]
    return torch.cat([*spans, guide[-1:]])


class Pens(NamedTuple):
    """All figures as tensors. Those with fewer points or segments than others repeat a segment."""
    points: torch.Tensor            # (figures, K, 2)
    starts: torch.Tensor            # (figures, S, K): where segments begin, times the points
    ends: torch.Tensor
    first_J: torch.Tensor           # each digit's first figure
    ways_J: torch.Tensor            # how many it has


@functools.cache
def pens():
    # a stroke of n points has n - 1 spans
    n_points = [sum(map(len, figure.strokes)) for figure in FIGURES]
    n_spans = [n - len(figure.strokes) for n, figure in zip(n_points, FIGURES)]
    K = max(n_points)
    S = PIECES * max(n_spans)
    points = torch.zeros(len(FIGURES), K, 2)
    starts = torch.zeros(len(FIGURES), S, K)
    ends = torch.zeros(len(FIGURES), S, K)
    for i, figure in enumerate(FIGURES):
        k = 0
        s = 0
        for stroke in figure.strokes:
            n = len(stroke)
            line = smooth(n)
            m = len(line) - 1
            points[i, k:k + n] = torch.tensor(stroke)
            starts[i, s:s + m, k:k + n] = line[:-1]
            ends[i, s:s + m, k:k + n] = line[1:]
            k += n
            s += m
        starts[i, s:] = starts[i, s - 1]
        ends[i, s:] = ends[i, s - 1]
    digit = torch.tensor([figure.digit for figure in FIGURES])
    ways_J = digit.bincount(minlength=CLASSES)
    return Pens(points, starts, ends, ways_J.cumsum(0) - ways_J, ways_J)


def draw(n, gen):
    """Draw n images of random digits, by n / 8 new writers.

    A writer chooses the way to write each digit, bends its strokes, and has a slant, a width, a
    height and a pen. Each image bends, turns, stretches and moves what its writer does a little."""
    def normal(scale, *shape):
        return scale * torch.randn(*shape, generator=gen)
    table = pens()
    n_writers = -(-n // PER_WRITER)
    writer_N = torch.arange(n) // PER_WRITER
    label_N = torch.randint(CLASSES, (n,), generator=gen)

    # the writers' hands
    way = (torch.rand(n_writers, CLASSES, generator=gen) * table.ways_J).long()
    bend = normal(.08, n_writers, *table.points.shape)
    slant = normal(.25, n_writers)
    size = normal(.12, n_writers, 2).exp()
    pen = .09 + .12 * torch.rand(n_writers, generator=gen)

    # the strokes of each image
    figure_N = table.first_J[label_N] + way[writer_N, label_N]
    points = table.points[figure_N] + bend[writer_N, figure_N]
    points = points + normal(.03, *points.shape)
    x, y = points.unbind(-1)
    width, height = (size[writer_N] * normal(.06, n, 2).exp()).T.unsqueeze(-1)
    lean = slant[writer_N] + normal(.06, n)
    y = y * height
    x = x * width - lean.unsqueeze(1) * y
    turn = normal(.1, n, 1)
    points = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)
    points = points + normal(.06, n, 1, 2)

    # ink on paper, both of which vary
    radius_N = pen[writer_N] * normal(.1, n).exp()
    ink_N1 = .7 + .3 * torch.rand(n, 1, generator=gen)
    x_NP = torch.cat([trace(points[i], figure_N[i], radius_N[i])
                      for i in torch.arange(n).split(16)])
    x_NP = ink_N1 * x_NP + normal(.05, *x_NP.shape)
    return Images(x_NP.clamp(0, 1), label_N)


def trace(points_NK2, figure_N, radius_N):
    """How black does a pen make each pixel? (N, 784): 1 on the strokes, 0 off them, by the distance
    to the nearest segment."""
    table = pens()
    a_NS2 = table.starts[figure_N] @ points_NK2
    b_NS2 = table.ends[figure_N] @ points_NK2
    axis = torch.linspace(-1.35, 1.35, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixel_P2 = torch.stack([x, y], -1).flatten(0, 1)

    # (pixel - a) . (b - a), |b - a|^2 and |pixel - a|^2: nothing of shape (N, P, S, 2) is formed
    way = b_NS2 - a_NS2
    along = pixel_P2 @ way.mT - (a_NS2 * way).sum(-1).unsqueeze(1)          # (N, P, S)
    length2 = way.square().sum(-1).clamp(min=1e-8).unsqueeze(1)
    from_a2 = pixel_P2.square().sum(-1, keepdim=True) - 2 * pixel_P2 @ a_NS2.mT
    from_a2 = from_a2 + a_NS2.square().sum(-1).unsqueeze(1)
    # the nearest point of the segment is a + t (b - a)
    t = (along / length2).clamp(0, 1)
    distance2 = from_a2 + t * (t * length2 - 2 * along)
    distance_NP = distance2.amin(-1).clamp(min=0).sqrt()
    return ((radius_N.unsqueeze(1) - distance_NP) / .04).sigmoid()


def read_idx(folder, name, ndim):
    """Read one of MNIST's files, as it is or gzipped: a uint8 tensor of so many dimensions. Fails
    on a file that is missing, damaged or of another kind."""
    spellings = (name, f"{name}.gz", name.replace("-idx", ".idx"))
    paths = [Path(folder) / spelling for spelling in spellings]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        common.fail(f"--data {folder}: has no {name} or {name}.gz; drawn, or a folder with MNIST's "
                    "four idx files")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as e:
        common.fail(f"{path}: cannot read: {e}")
    # 0, 0, 8 for bytes, number of dimensions; their sizes in 4 bytes each; the bytes
    head = 4 + 4 * ndim
    sizes = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, head, 4)]
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) - head != math.prod(sizes):
        common.fail(f"{path}: damaged, or no idx file of bytes in {ndim} dimensions")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[head:].view(sizes)


def read_mnist(folder, split):
    x = read_idx(folder, f"{split}-images-idx3-ubyte", 3)
    label = read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
    is_right = x.shape[1:] == (SIDE, SIDE) and len(x) == len(label) and len(x)
    if not is_right or label.max() >= CLASSES:
        common.fail(f"--data {folder}: {split} must have 28 x 28 images with a label from 0 to 9 "
                    f"each, has images {list(x.shape)}, labels {list(label.shape)}")
    return Images(x.flatten(1) / 255, label.long())


@functools.cache
def load_images(data, n):
    """The first n training images and all test images, of which no writer is the same."""
    if data == "drawn":
        train = draw(n, common.generator(0, "training writers"))
        return train, draw(TEST, common.generator(0, "test writers"))
    train = read_mnist(data, "train")
    if n > len(train.x_NP):
        common.fail(f"--data {data}: has {len(train.x_NP)} training images, not {n}, which "
                    "--images or --memorised asks for")
    return Images(train.x_NP[:n], train.label_N[:n]), read_mnist(data, "t10k")


def fingerprint(images):
    """Are these the images that a run began with? A hash of their pixels and labels."""
    digest = hashlib.sha256()
    for tensor in images:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------ the network
class Net(nn.Module):
    """The matrices (d_in, d_out) and biases of an MLP, from the pixels to the logits."""
    def __init__(self, depth, gen):
        super().__init__()
        sizes = [SIDE**2, *[WIDTH] * (1 if depth == "shallow" else 2), CLASSES]
        self.Ws = nn.ParameterList(torch.randn(n_in, n_out, generator=gen) * (2 / n_in)**0.5
                                   for n_in, n_out in zip(sizes, sizes[1:]))
        self.bs = nn.ParameterList(torch.zeros(n_out) for n_out in sizes[1:])

    def __call__(self, i, x):
        """What does matrix i make of x? An SPD's matrices under masks answer to the same call."""
        return x @ self.Ws[i] + self.bs[i]

    @property
    def hash(self):
        """Is this the network that a run began with?"""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return f"{common.checksum(tensors, {}):08x}"


def through(matrices, x_BP, n):
    """Run images through n matrices with a relu between: (logits, what each matrix read).

    matrices(i, x): a Net, or the matrices of an SPD under masks."""
    reads = [x_BP]
    for i in range(n - 1):
        reads.append(F.relu(matrices(i, reads[-1])))
    return matrices(n - 1, reads[-1]), reads


def with_noise(label_N, share, gen):
    """Replace a share of the labels by random ones. One in ten of these is right by chance."""
    is_drawn = torch.rand(len(label_N), generator=gen) < share
    random_N = torch.randint(CLASSES, label_N.shape, generator=gen)
    return torch.where(is_drawn, random_N, label_N)


def train_net(cfg, train):
    """Train a network on the images. The decay that keeps it from learning noise is left out where
    noise is what it has to learn."""
    net = Net(cfg.depth, common.generator(0, "net"))
    gen = common.generator(0, "net's batches")
    decay = 0. if cfg.noise else .1
    opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=decay, fused=True)
    for step in range(cfg.net_steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / cfg.net_steps)
        picked = torch.randint(len(train.x_NP), (256,), generator=gen)
        logits, _ = through(net, train.x_NP[picked], len(net.Ws))
        opt.zero_grad()
        F.cross_entropy(logits, train.label_N[picked]).backward()
        opt.step()
    return net


def load_net(cfg, train, text):
    """The frozen network that cfg names: as it was trained before, or trained now and kept."""
    made = dict(depth=cfg.depth, noise=cfg.noise, net_steps=cfg.net_steps, text=text)
    name = "-".join(str(value) for value in made.values())
    path = Path(cfg.networks) / f"{name}.safetensors"
    common.must_be_file(path)
    if path.exists():
        tensors, _ = common.load(path, **made)
        net = Net(cfg.depth, common.generator(0, "net"))
        common.unflat(tensors, net=net)
    else:
        net = train_net(cfg, train)
        common.save(path, common.flat(net=net), made)
    return net.requires_grad_(False)


# -------------------------------------------------------------------------------- its decomposition
class Clean:
    """One pass of images through the network as it is: what the matrices read, and the predictions
    to preserve. This is the batch that spd.loss_fn asks for."""
    def __init__(self, net, x_BP):
        self.x_BP = x_BP
        self.n = len(net.Ws)
        with torch.no_grad():
            self.logits, self.inputs = through(net, x_BP, self.n)
        self.logp_BJ = self.logits.log_softmax(-1)

    def kl(self, matrices):
        """KL(clean || matrices) in nats, mean over the images."""
        logits, _ = through(matrices, self.x_BP, self.n)
        return self.kl_to(logits)

    def kl_to(self, logits):
        """KL(clean || the predictions of these logits)."""
        return F.kl_div(logits.log_softmax(-1), self.logp_BJ, reduction="batchmean",
                        log_target=True)

    def divergence(self, *masked):
        """One KL for each of the masked matrices, as spd.loss_fn wants them."""
        return torch.stack([self.kl(matrices) for matrices in masked])


def spd_config(cfg):
    """The configuration of spd.py's functions: its earlier recipe, spd.FORMER, else its defaults.

    V and U that are held have a learning rate of 0: their importances are trained as others are."""
    how = spd.FORMER | dict(lr=0. if cfg.parts in HELD else cfg.lr)
    return spd.Config(C=cfg.C, ci_hidden=cfg.ci_hidden, steps=cfg.steps, B=cfg.B, T=1,
                      c_imp=cfg.c_imp, **how)


def split(W, parts, is_first):
    """Split a matrix without learning: V (d_in, n) and U (n, d_out), whose product it is."""
    if parts == "svd":
        left, sizes, right = torch.linalg.svd(W, full_matrices=False)
        return left * sizes, right
    # what a neuron reads by is a column of the first matrix, which the split "rows" has too; what
    # it writes by is a row of the others
    if parts == "rows" or is_first:
        return W, torch.eye(W.shape[1], device=W.device)
    return torch.eye(len(W), device=W.device), W


@torch.no_grad()
def begin(m, cfg):
    """Put V and U where training starts, with W as their product: at random, or at a split.

    Components are scaled so that |V[:, c]| = |U[c]|. Those that a split has no use for are 0, but
    small and random where V and U learn."""
    if cfg.parts == "learned":
        spd.project(m)
        return
    is_started = cfg.parts == "started"
    for i, W in enumerate(m.Ws):
        V, U = split(W, "neurons" if is_started else cfg.parts, i == 0)
        n = len(U)
        m.V[i].mul_(spd.SMALL if is_started else 0)
        m.U[i].mul_(spd.SMALL if is_started else 0)
        m.V[i][:, :n], m.U[i][:n] = spd.balanced(V, U)
    if is_started:
        spd.project(m)


def build(cfg, net):
    """A fresh decomposition of the network, after checking that its components are enough and that
    there is memory for them."""
    if cfg.C < WIDTH:
        common.fail(f"--C {cfg.C}: must be at least {WIDTH}, the ranks of the matrices")
    # V and U; the importance net; per image as many activations as spd.check_memory counts
    n_sizes = sum(sum(W.shape) for W in net.Ws)
    n_weights = cfg.C * n_sizes + cfg.ci_hidden * (n_sizes + len(net.Ws) * cfg.C)
    common.need_for_training(n_weights, cfg.B * 20 * len(net.Ws) * cfg.C,
                             f"--C {cfg.C} --ci_hidden {cfg.ci_hidden} --B {cfg.B}",
                             net.Ws[0].device)
    gen = common.generator(cfg.seed, "init")
    return spd.SPD([*net.Ws], [*net.bs], spd_config(cfg), gen)


def train(cfg):
    """Decompose the network that cfg names: (decomposition, what is found, network)."""
    device = common.device(cfg.device)
    fit, test = load_images(cfg.data, cfg.images)
    learned = with_noise(fit.label_N, cfg.noise, common.generator(0, "label noise"))
    fit = Images(fit.x_NP, learned)
    text = fingerprint([*fit, *test])
    net = load_net(cfg, fit, text).to(device)
    fit, test = (Images(x.to(device), label.to(device)) for x, label in (fit, test))
    m = build(cfg, net)
    how = spd_config(cfg)
    opts = spd.optimizers(m, how)
    gen = common.generator(cfg.seed, "masks", device)
    picks = common.generator(cfg.seed, "batches")
    run = common.Run(cfg, net, text, spd=m, gen=gen, picks=picks, **opts)
    if run.is_fresh:
        begin(m, cfg)

    for step in run.steps():
        progress = step / cfg.steps
        picked = torch.randint(len(fit.x_NP), (cfg.B,), generator=picks).to(device)
        batch = Clean(net, fit.x_NP[picked])
        loss, terms, importance = spd.loss_fn(m, batch, how, progress, gen)
        norm = spd.update(m, opts, loss, how, progress)
        if run.is_logged:
            l0 = {f"l0_{i}": (g > spd.ON_ABOVE).sum(-1).float().mean()
                  for i, g in enumerate(importance)}
            run.record(terms, norm, **l0)
        # before run.steps() saves the last checkpoint
        if run.is_last and cfg.parts not in HELD:
            spd.project(m)
    common.let_go(cfg.out)
    return m, summarise(cfg, net, m, fit, test, run.seconds), net


# ---------------------------------------------------------------------------------------- summary
COLUMNS = {                         # numbers of one matrix: (head, decimals)
    "alive": ("alive", 0),
    "l0": ("L0", 1),
    "f1": ("F1", 2),
    "classes": ("by class", 2),
    "one_output": ("one output", 2),
}


@torch.no_grad()
def importances(m, net, x_NP):
    """How important is each component at each image? (N, C) for each matrix, between 0 and 1."""
    inputs = Clean(net, x_NP).inputs
    return [z.clamp(0, 1) for z in m.importance_net(inputs, m.V)]


def choices(importance, gen):
    """The masks that a decomposition is judged by: {name: (masks, rest_masks)}, as
    metrics/masks.py has them."""
    return {"unmasked": masks.all_on(importance),
            "soft": masks.without_rest(importance),
            "rounded": masks.rounded(importance, spd.ON_ABOVE),
            "stochastic": masks.stochastic(importance, gen),
            "random": masks.at_random(importance, gen)}


def attack(m, clean, importance, gen):
    """Which sources put the predictions furthest off? One for each component and rest, shared by
    all images: from a random start, 20 steps of 0.1 along the sign of the KL's gradient. Returns
    the worst that were met."""
    device = importance[0].device
    sources = [torch.rand(n, generator=gen, device=device) for n in spd.source_sizes(m)]
    worst = -math.inf
    for _ in range(masks.STEPS + 1):
        sources = [source.detach().requires_grad_() for source in sources]
        kl = clean.kl(m.masked(importance, sources, detach=True))
        if kl.item() > worst:
            worst = kl.item()
            met = [source.detach() for source in sources]
        grads = torch.autograd.grad(kl, sources)
        sources = [(source.detach() + masks.SIZE * grad.sign()).clamp(0, 1)
                   for source, grad in zip(sources, grads)]
    return met


def under_masks(m, net, images, gen):
    """What do the predictions become? {mask: (accuracy, KL)} on some images; "clean": without."""
    clean = Clean(net, images.x_NP)
    importance = importances(m, net, images.x_NP)
    table = choices(importance, gen)
    few = Clean(net, images.x_NP[:FEW])
    worst = attack(m, few, [g[:FEW] for g in importance], gen)
    table["attack"] = masks.masks_from(importance, worst)
    found = {"clean": (accuracy(clean.logits, images), 0.)}
    with torch.no_grad():
        for name, chosen in table.items():
            logits, _ = through(m.site(*chosen), images.x_NP, clean.n)
            found[name] = (accuracy(logits, images), clean.kl_to(logits).item())
    return found


def accuracy(logits, images):
    """On what share of images is the label's logit the largest?"""
    return (logits.argmax(-1) == images.label_N).float().mean().item()


def loss_on(cfg, net, m, images, gen):
    """How large is SPD's loss at the end of its schedules, on images? Without faithfulness, which
    the last projection makes exact. Lower is better; it is the one number that all splits share."""
    how = replace(spd_config(cfg), c_faith=0.)
    loss, _, _ = spd.loss_fn(m, Clean(net, images.x_NP[:FEW]), how, 1., gen)
    return loss.item()


def class_counts(g_NC, label_N):
    """On how many images is each component on, of all (C, 1) and of each class (C, J)? And how many
    images has each class (1, J)?"""
    on_NC = (g_NC > spd.ON_ABOVE).float()
    is_class_NJ = F.one_hot(label_N, CLASSES).float()
    return on_NC.sum(0).unsqueeze(1), on_NC.T @ is_class_NJ, is_class_NJ.sum(0, keepdim=True)


def class_f1(g_NC, label_N):
    """How well does "component c is on" tell class j? F1 (C, J): 1 = on exactly there."""
    on, both, label = class_counts(g_NC, label_N)
    return evals.f1_scores(on, label, both)


def of_one_matrix(m, i, g_fit, g_test, fit, test):
    """What are one matrix's components? Numbers over those that are alive on test.

    each: (class, F1 on test) of these, where the class is the one that a component tells best on
    fit."""
    f1 = class_f1(g_test, test.label_N)
    class_C = class_f1(g_fit, fit.label_N).argmax(1)
    f1_C = f1.gather(1, class_C.unsqueeze(1)).squeeze(1)
    on_NC = g_test > spd.ON_ABOVE
    is_alive = on_NC.sum(0) >= evals.ALIVE
    # share of what a component writes that goes to its largest output: 1 in rows
    U2 = m.U[i].detach().square()
    share_C = U2.amax(1) / U2.sum(1).clamp(min=1e-30)
    each = sorted(zip(class_C[is_alive].tolist(), f1_C[is_alive].tolist()))
    found = dict(alive=len(each), l0=on_NC.sum(1).float().mean().item(), f1=0., one_output=0.,
                 each=each)
    if each:
        found["f1"] = f1_C[is_alive].mean().item()
        found["one_output"] = share_C[is_alive].mean().item()
    # each class by the component that tells it best
    found["classes"] = f1.amax(0).mean().item()
    return found


def summarise(cfg, net, m, fit, test, seconds):
    """Print what was found, write summary.json.

    Memorised labels are known on training images alone: there --judge is fit. The class of a
    component is always chosen on training images."""
    few = Images(*(tensor[:TEST] for tensor in fit))
    judged = few if cfg.judge == "fit" else test
    gen = common.generator(cfg.seed, "summary", fit.x_NP.device)
    found = dict(masks=under_masks(m, net, judged, gen), seconds=seconds,
                 loss=loss_on(cfg, net, m, judged, gen))
    found["fit_accuracy"] = accuracy(Clean(net, fit.x_NP).logits, fit)
    g_fit = importances(m, net, few.x_NP)
    g_judged = importances(m, net, judged.x_NP)
    found["matrices"] = [of_one_matrix(m, i, *pair, few, judged)
                         for i, pair in enumerate(zip(g_fit, g_judged))]

    print(f"\n{cfg.depth} network, noise {cfg.noise:g}, {cfg.parts} components, seed {cfg.seed}, "
          f"{seconds:.0f} s; right on training images: {found['fit_accuracy']:.1%}; "
          f"loss {found['loss']:.4f}")
    for name, (right, kl) in found["masks"].items():
        print(f"  {name:<12} accuracy {right:.1%}, KL {kl:.4f}")
    for i, row in enumerate(found["matrices"]):
        shape = " x ".join(map(str, m.Ws[i].shape))
        print(f"  {shape:<12}", *(f"{key} {row[key]:.3g}" for key in COLUMNS))
    saved = found | common.provenance(cfg, net)
    common.write(Path(cfg.out) / "summary.json", json.dumps(saved, indent=1).encode())
    return found


# ------------------------------------------------------------------------------------------ study
class Job(NamedTuple):
    """One decomposition of the study."""
    depth: str
    noise: float
    parts: str
    seed: int
    images: int
    c_imp: float
    judge: str = "test"

    def configured(self, cfg):
        """Its own configuration, in a folder of its own; resumed where it has begun."""
        name = f"{self.depth}-{self.images}-noise{self.noise:g}-{self.parts}-seed{self.seed}"
        if self.c_imp != cfg.c_imp:
            name += f"-c_imp{self.c_imp:g}"
        out = Path(cfg.out) / name
        is_begun = any(out.glob("*.safetensors"))
        return replace(cfg, **self._asdict(), out=str(out), study=False,
                       resume=cfg.resume and is_begun)


CHOSEN_BY_JOBS = ("depth", "noise", "parts", "judge")   # flags that mean nothing to the study
DEPTHS = ("shallow", "deep")
NOISES = (0., 0.2, 1.)
LISTED = 6                          # components of a class in the table of F1s
NOISY_SEEDS = 2                     # decompositions of each network in the study of noise, at most
TIMES_C_IMP = (0.25, 0.5, 1., 2., 8.)   # .. at each of these times --c_imp, to compare at one KL
AT_KL = 0.02                        # that KL, in nats


def jobs(cfg):
    """List the decompositions: of both networks, and of deep ones that memorised label noise."""
    todo = []
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    for depth in DEPTHS:
        todo += [Job(depth, 0., "learned", seed, cfg.images, cfg.c_imp) for seed in seeds]
        todo += [Job(depth, 0., parts, cfg.seed, cfg.images, cfg.c_imp)
                 for parts in ("started", *HELD)]
    noisy = itertools.product(NOISES, TIMES_C_IMP, seeds[:NOISY_SEEDS])
    for share, times, seed in noisy:
        c_imp = times * cfg.c_imp
        todo.append(Job("deep", share, "learned", seed, cfg.memorised, c_imp, "fit"))
    return todo


def study(cfg):
    """Run all jobs; write the tables and the pictures."""
    cfg = apart(cfg, "results")
    # what is missing or makes no sense is to be known before the work
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        common.fail("the pictures need matplotlib: pip install matplotlib")
    if cfg.resume and not Path(cfg.out).exists():
        common.fail(f"--resume: no run of the study in {cfg.out}")
    common.must_be_writable(cfg.out, cfg.results)
    for name in ("digits.md", "digits.png"):
        common.must_be_file(Path(cfg.results) / name)
    for name in CHOSEN_BY_JOBS:
        if getattr(cfg, name) != getattr(Config, name):
            common.fail(f"--{name}: goes with --no-study alone, the study chooses for itself")
    for n in (cfg.images, cfg.memorised):
        load_images(cfg.data, n)
    models = {}
    found = {}
    for job in jobs(cfg):
        m, found[job], net = train(job.configured(cfg))
        models[job] = m, net
    text = report(cfg, found)
    print(f"\n{text}")
    common.write(Path(cfg.results) / "digits.md", text.encode())
    curve.save_picture(picture(cfg, models), Path(cfg.results) / "digits.png")
    print(f"-> {cfg.results}/digits.md, digits.png")
    return models, found


def select(found, **wanted):
    """The results of the jobs that have these values."""
    return [result for job, result in found.items()
            if wanted.items() <= job._asdict().items()]


def report(cfg, found):
    """Write the tables as Markdown."""
    lines = [PREFACE.format(command=common.command(cfg), data=cfg.data, images=cfg.images,
                            tau=spd.ON_ABOVE, least=evals.ALIVE, few=FEW), ""]
    for depth in DEPTHS:
        its = {parts: select(found, depth=depth, judge="test", parts=parts)
               for parts in ("learned", "started", *HELD)}
        lines += [f"## The {depth} network", "", *mask_table(its), "", *part_table(its), "",
                  "F1 of each component of the last matrix, by the class that it tells best:", "",
                  *class_table(its), ""]
    noisy = {job: result for job, result in found.items() if job.judge == "fit"}
    lines += ["## Label noise", "", NOISE_TEXT.format(images=cfg.memorised, kl=AT_KL), "",
              *noise_table(noisy), ""]
    return "\n".join(lines)


PREFACE = """# Digits taken apart
`{command}` wrote this, and digits.png.
Images: {data}, {images:,} to learn from; writers of the test images wrote none of those. Means over
seeds, ± half of the 95 % interval; one seed where there is none.

*learned*: SPD's components from random starts (spd.FORMER). *started*: learned too, but from the
neurons: what a good start reaches. *rows*, *neurons*, *svd*: splits that nobody learns, whose
importances alone are trained, in as many steps: what has to be beaten.

Of each: *loss*, SPD's own, without faithfulness. Accuracy / KL from the clean predictions in nats:
*unmasked* all components on; *soft* importances as masks; *rounded* at {tau}; *stochastic* what is
unimportant ablated at random; *random* any mask, the floor; *attack* what is unimportant ablated
by the amounts, one for all images, that 20 sign steps of 0.1 find the most harmful to {few:,} of
them. All on test images.

Of each matrix: *alive*, components on at {least} test images or more; *L0*, on at an image; *F1*,
how well "on" tells the class that it tells best, mean over alive ones (always on: 0.18); *by
class*, F1 of each class's best component; *one output*, share of a component's writing that goes to
one output: 1 for rows."""
NOISE_TEXT = """The deep network on {images:,} images, a share of whose labels is random, judged on
these images, where it memorised them. Does it need more components? A harder penalty leaves fewer,
and more of the predictions out, so the penalty is varied. The last line of each share lies where
the KL of rounded masks is {kl}: between the strongest penalty that costs no more and the next one
(linear in the logarithms; n/a: not reached).
The importance net reads the last hidden layer too, where labels lie apart, so it can tell
memorised classes as well as true ones. A second difference: only the network without random labels
was trained with weight decay, which keeps others from memorising."""


def mask_table(its):
    """Accuracy and KL under each of the masks, a line for each kind of components."""
    names = [*its["learned"][0]["masks"]]
    lines = []
    for parts, results in its.items():
        cells = [parts, mean_text([result["loss"] for result in results], 3)]
        for name in names:
            right, kl = zip(*(result["masks"][name] for result in results))
            # rounding may bring a KL of 0 below it
            nats = max(0., statistics.mean(kl))
            cells.append(f"{100 * statistics.mean(right):.1f} % / {nats:.4f}")
        lines.append(cells)
    return markdown_table(["", "loss", *names], lines)


def part_table(its):
    """What the components of each matrix are, a line for each kind of components."""
    lines = []
    for i in range(len(its["learned"][0]["matrices"])):
        for parts, results in its.items():
            cells = [f"W_{i + 1}", parts]
            for key, (_, digits) in COLUMNS.items():
                values = [result["matrices"][i][key] for result in results]
                cells.append(mean_text(values, digits))
            lines.append(cells)
    return markdown_table(["", "", *(head for head, _ in COLUMNS.values())], lines)


def class_table(its):
    """The F1 of each component of the last matrix with its class, a line for each kind. Of several
    seeds, the first."""
    lines = []
    for parts, results in its.items():
        cells = [parts]
        for j in range(CLASSES):
            f1s = [f1 for best, f1 in results[0]["matrices"][-1]["each"] if best == j]
            shown = [f"{100 * f1:.0f}" for f1 in sorted(f1s, reverse=True)[:LISTED]]
            cells.append(" ".join(shown) + (" .." if len(f1s) > LISTED else ""))
        lines.append(cells)
    return markdown_table(["F1, %", *map(str, range(CLASSES))], lines)


def noise_table(noisy):
    """Components alive and on at each share of random labels and each strength of the penalty, and
    both where the KL of rounded masks is AT_KL."""
    lines = []
    for share in NOISES:
        points = []
        for c_imp in sorted({job.c_imp for job in noisy}):
            results = select(noisy, noise=share, c_imp=c_imp)
            kls = [result["masks"]["rounded"][1] for result in results]
            alive = [of_all_matrices(result, "alive") for result in results]
            l0 = [of_all_matrices(result, "l0") for result in results]
            attack = [result["masks"]["attack"][1] for result in results]
            right = statistics.mean(result["fit_accuracy"] for result in results)
            lines.append([f"{share:.0%}", f"{right:.1%}", f"{c_imp:g}", mean_text(kls, 3),
                          mean_text(attack, 2), mean_text(alive, 0), mean_text(l0, 1)])
            points.append([statistics.mean(numbers) for numbers in (kls, alive, l0)])
        alive, l0 = at_kl(points, AT_KL)
        lines.append([f"**{share:.0%}**", "", "", f"**{AT_KL}**", "", alive, l0])
    heads = ["random labels", "labels learned", "c_imp", "KL rounded", "attack",
             "alive, all matrices", "L0, all matrices"]
    return markdown_table(heads, lines)


def of_all_matrices(result, key):
    """The sum of one number over a network's matrices."""
    return sum(part[key] for part in result["matrices"])


def at_kl(points, kl):
    """Read two numbers off a curve at one KL, as texts. n/a where it does not get there.

    points: (KL, number, number) of weaker, then stronger penalties. The curve may cross this KL
    more than once: of the penalties that cost no more, the strongest and the next one count, and
    not what is nearest in KL, which a weaker penalty that costs as much may be."""
    cheap = [i for i, point in enumerate(points) if point[0] <= kl]
    ends = points[cheap[-1]:][:2] if cheap else []
    if len(ends) < 2 or not min(min(end[1:]) for end in ends):
        return "n/a", "n/a"
    # rounding may bring a KL of 0 below it
    kls = [math.log(max(1e-9, end[0])) for end in ends]
    alive, l0 = (math.exp(np.interp(math.log(kl), kls, np.log(column)))
                 for column in list(zip(*ends))[1:])
    return f"**{alive:.0f}**", f"**{l0:.1f}**"


# ----------------------------------------------------------------------------------------- pictures
SHOWN = 48                          # first-layer components in the picture


def picture(cfg, models):
    """Draw some digits, what first-layer components read beside what neurons read, and at which
    classes the components of the later matrices are on."""
    from matplotlib.figure import Figure
    _, test = load_images(cfg.data, cfg.images)
    figure = Figure((14, 9.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))

    # images, and what reads them
    panels = above.subplots(1, 3, width_ratios=(1, 1.4, 1.4))
    panels[0].imshow(sheet(samples(test), 10), cmap="gray_r")
    panels[0].set_title("test images")
    for ax, parts in zip(panels[1:], ("learned", "neurons")):
        m, net = models[Job("shallow", 0., parts, cfg.seed, cfg.images, cfg.c_imp)]
        read = reading_vectors(m, net, test)
        ax.imshow(sheet(read, 8), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(f"shallow, W_1, {parts}: what {len(read)} components read")
    for ax in panels:
        ax.axis("off")

    # components x classes
    panels = below.subplots(1, 8)
    for ax, (i, parts) in zip(panels, itertools.product((1, 2), ("learned", *HELD))):
        m, net = models[Job("deep", 0., parts, cfg.seed, cfg.images, cfg.c_imp)]
        shares = class_shares(m, net, i, test)
        ax.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="none")
        ax.set_title(f"deep, W_{i + 1}\n{parts}: {len(shares)} alive", fontsize=10)
        ax.set_xticks(range(CLASSES))
        ax.set_xlabel("class")
    panels[0].set_ylabel("components; brightness: share of a class's images at which one is on")
    return figure


def samples(images, n=10):
    """The first n images of each class, (10 n, 784)."""
    picked = [(images.label_N == j).nonzero()[:n, 0] for j in range(CLASSES)]
    return images.x_NP[torch.cat(picked)].cpu()


def sheet(x_NP, columns):
    """Lay images out in rows, with a white line between two: one large image."""
    missing = -len(x_NP) % columns
    padded = F.pad(x_NP, (0, 0, 0, missing)).view(-1, columns, SIDE, SIDE)
    padded = F.pad(padded, (1, 1, 1, 1))
    return padded.transpose(1, 2).flatten(0, 1).flatten(1).numpy()


@torch.no_grad()
def reading_vectors(m, net, images):
    """What do first-layer components read? (n, 784) between -1 and 1, the most important first.

    V[:, c] times the spread of each pixel, or pixels that never change would be seen most. V and U
    may both change signs: a component is drawn such that it is positive where it is on."""
    x = images.x_NP.to(m.bs[0].device)
    g_NC = importances(m, net, x)[0]
    first = g_NC.mean(0).argsort(descending=True)[:SHOWN]
    first = first[(g_NC > spd.ON_ABOVE).sum(0)[first] >= evals.ALIVE]
    read = (m.V[0].T * x.std(0))[first]
    on = (x - x.mean(0)) @ m.V[0][:, first]
    sign = (g_NC[:, first] * on).sum(0).sign().unsqueeze(1)
    return (read * sign / read.abs().amax(1, keepdim=True)).cpu()


@torch.no_grad()
def class_shares(m, net, i, images):
    """On which share of each class's images is each alive component of matrix i on? (alive, J),
    sorted by the class where it is on most."""
    device = m.bs[0].device
    g_NC = importances(m, net, images.x_NP.to(device))[i]
    on, both, label = class_counts(g_NC, images.label_N.to(device))
    shares = (both / label)[on.squeeze(1) >= evals.ALIVE].cpu()
    order = sorted(range(len(shares)), key=lambda c: (shares[c].argmax().item(),
                                                      -shares[c].amax().item()))
    return shares[order].numpy()


def main(cfg):
    if cfg.study:
        return study(cfg)
    return train(cfg)


if __name__ == "__main__":
    main(common.cli(Config))
