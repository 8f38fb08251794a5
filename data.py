"""Tokens, labels and batches: TinyTales from a cache that builds itself, or a token file of your own.

    python data.py            # three stories, the statistics, the concept table, where the cache lies
    --data X.bin              # of any script: uint16 tokens as nanoGPT writes them
    --data X.txt              # text, in the words of the target's vocab.json

A row begins at a story's start wherever one is within reach: the target sees most stories from their first word.
"""
import functools
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import fused
from common import cli, fail, generator
from report.curve import save_picture
from tinytales import cache, concepts, story
from tinytales.cache import SPLITS
from tinytales.prompts import prompts  # noqa: F401  (part of this module's interface)
from tinytales.story import EOT, UNK, VOCAB

WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*|'s|\d+|[^\w\s]")


@dataclass
class Corpus:
    """A stream of tokens. ids (n,) uint16; concept names; packed labels bits (n, bytes), logp (n,), or None."""
    ids: np.ndarray
    vocab: list
    names: list
    bits: np.ndarray | None = None
    logp: np.ndarray | None = None

    @functools.lru_cache(maxsize=4)
    def starts(self, T):
        """First positions of the rows of T: each begins at the last story start that the row before reaches, if any."""
        n = len(self.ids)
        if n < T:
            fail(f"the data hold {n} tokens, fewer than one row of {T}")
        docs = np.flatnonzero(self.ids == (self.vocab.index(EOT) if EOT in self.vocab else -1))
        starts, s = [], 0
        while s + T <= n:
            starts.append(s)
            i = np.searchsorted(docs, s + T, "right") - 1           # a story starting at s + T follows without a gap
            s = int(docs[i]) if i >= 0 and docs[i] > s else s + T
        return np.array(starts)

    def positions(self, T, n_rows=None):
        """Where in the stream the tokens of the evaluation rows lie, (n_rows, T)."""
        return self.starts(T)[:n_rows, None] + np.arange(T)

    def rows(self, T, n_rows=None):
        """Evaluation rows (n_rows, T), int64."""
        return torch.from_numpy(self.ids[self.positions(T, n_rows)].astype(np.int64))

    def labels(self, T, n_rows=None):
        """Truth (n_rows, T, concepts), bool, of the same rows."""
        return np.unpackbits(self.bits[self.positions(T, n_rows)], axis=-1, count=len(self.names)).astype(bool)

    def labelled(self, T, n_rows, device):
        """The pair (rows, labels) that evals.py and metrics/ ask for."""
        return self.rows(T, n_rows).to(device), self.labels(T, n_rows)

    def fresh(self, T, n_rows=None):
        """Mask (n_rows, T) of the positions to predict such that each token counts once: those that the next row, which
        knows their story from its start, predicts again are left out."""
        mask = self.positions(T) <= np.append(self.starts(T)[1:], len(self.ids))[:, None]
        mask[:, 0] = False
        return torch.from_numpy(mask[:n_rows])

    def entropy(self, T, n_rows=None):
        """Derivation entropy in nats per token over the `fresh` positions: an upper bound on their entropy rate."""
        if self.logp is None:
            return None
        return float(-self.logp[self.positions(T, n_rows)][self.fresh(T, n_rows).numpy()].mean())

    @functools.lru_cache(maxsize=2)
    def order(self, T, seed, epoch):
        return self.starts(T)[np.random.default_rng([seed, epoch]).permutation(len(self.starts(T)))]

    def batch(self, step, B, T, seed):
        """Training batch (B, T), int64: rows shuffled anew in each epoch; depends on the arguments alone."""
        n, first = len(self.starts(T)), step * B
        at = np.array([self.order(T, seed, i // n)[i % n] for i in range(first, first + B)])
        return torch.from_numpy(self.ids[at[:, None] + np.arange(T)].astype(np.int64))

    __hash__ = object.__hash__


@functools.lru_cache(maxsize=8)
def tinytales_corpus(split, n_tokens):
    """TinyTales from its cache."""
    names, maps = cache.arrays(split, n_tokens)
    return Corpus(vocab=VOCAB, names=names, **maps)


def load_all(spec, vocab, T, splits=("train", "fit", "test")) -> dict[str, Corpus]:
    """{split: corpus}. Fails where one has no row of T tokens."""
    corpora = {split: load(spec, split, vocab) for split in splits}
    if short := [f"its {split} part has {len(c.ids)}" for split, c in corpora.items() if len(c.ids) < T]:
        fail(f"--data {spec}: too short for a row of {T} tokens, {short[0]}")
    return corpora


@functools.lru_cache
def fingerprint(spec) -> str:
    """Is this the text that a run began with? A hash of what --data names: of TinyTales its sources; of a file its
    name, its size and its content, whole up to a megabyte, else sampled at 64 places, so that it takes milliseconds
    whatever the size. The sources of the concepts are part of it."""
    found = hashlib.sha256(cache.version().encode())
    if spec != "tinytales":
        path = Path(spec)
        size, piece = path.stat().st_size, 1 << 14
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * max(0, size - piece) // 63)
                found.update(file.read(piece))
    return found.hexdigest()[:12]


def load(spec, split, vocab, n_tokens=None) -> Corpus:
    """The corpus of a split: "tinytales", or a .bin or .txt cut into train 90 %, fit 4 %, dev 2 %, test 4 %.
    Fails on a missing, empty or truncated file, a token outside the vocabulary, a text in another vocabulary."""
    if spec == "tinytales":
        if list(vocab) != VOCAB:
            fail("--data tinytales needs a target with TinyTales' vocabulary; give --data a .bin or .txt for this one")
        return tinytales_corpus(split, n_tokens or SPLITS[split][1])
    path = Path(spec)
    if path.suffix not in (".bin", ".txt"):
        fail(f"--data {spec}: allowed are tinytales, a .bin of uint16 token ids, or a .txt")
    if not path.is_file():
        fail(f"--data {spec}: no such file")
    if path.suffix == ".bin":
        if path.stat().st_size % 2 or not path.stat().st_size:
            fail(f"--data {spec}: {path.stat().st_size} bytes are no whole, positive number of uint16 tokens")
        ids = np.memmap(path, np.uint16, "r")
    else:
        ids = encode_file(path, tuple(vocab))
    a, b = (int(len(ids) * f) for f in dict(train=(0, .9), fit=(.9, .94), dev=(.94, .96), test=(.96, 1))[split])
    ids = ids[a:b] if split == "train" else ids[a:min(b, a + (n_tokens or SPLITS[split][1]))]
    if not len(ids):
        fail(f"--data {spec}: too short, its {split} part is empty")
    if int(ids.max()) >= len(vocab):
        fail(f"--data {spec}: token id {int(ids.max())} is outside the target's vocabulary of {len(vocab)}")
    corpus = Corpus(ids, list(vocab), concepts.concept_names(with_state=False))
    if split != "train":
        corpus.bits = np.packbits(concepts.labels(np.asarray(ids), vocab, concepts.lexical(vocab)), axis=1)
    return corpus


# ----------------------------------------------------------------------------------------------- tokenizer
def tokenize(text):
    return WORD.findall(text)


def encode(text, vocab):
    """Words to ids; a word that the vocabulary lacks becomes <unk>."""
    index = {w: i for i, w in enumerate(vocab)}
    return [index.get(w, index.get(UNK, 0)) for w in tokenize(text)]


@functools.lru_cache(maxsize=2)
def encode_file(path, vocab):
    """A .txt as uint16 ids, one stream without document marks."""
    if UNK not in vocab or any("Ġ" in w for w in vocab):
        fail(f"--data {path}: this target's vocabulary is not word-level; tokenise the text with the target's own "
             "tokenizer and write np.array(ids, np.uint16).tofile('X.bin')")
    try:
        ids = np.array(encode(path.read_text(encoding="utf-8"), vocab), np.uint16)
    except UnicodeDecodeError as e:
        fail(f"--data {path}: not UTF-8 text ({e.reason} at byte {e.start})")
    if len(ids) and (ids == vocab.index(UNK)).mean() > .5:
        fail(f"--data {path}: {(ids == vocab.index(UNK)).mean():.0%} of its words are not in the target's vocab.json; "
             f"make a target for it with python pretrain.py --data {path} --out DIR")
    return ids


def build_vocab(text, size):
    """The word-level vocabulary of a text: end of text, unknown word, then its most frequent words."""
    words, counts = np.unique(tokenize(text), return_counts=True)
    by_count = sorted(zip(-counts, words))
    return [EOT, UNK, *(str(w) for _, w in by_count[:size - 2])]


def decode(ids, vocab):
    """Readable text: no space before punctuation or after an opening quote."""
    text = " ".join(vocab[i] for i in ids).replace("Ġ", "")
    return re.sub(r"“ ", "“", re.sub(r" ([.,!?;:”]|'s|')(?= |$)", r"\1", text))


# --------------------------------------------------------------------------------------------- activations
# The target's activations at its MLPs, as the activation-space methods train on them: one token, one example.
#     x = the MLP's input after LayerNorm, y = its output, at every token but the first of a row; stream: y is the
#     residual stream that the output is added to, after the addition
# B sequences, T positions, N tokens of a batch, L layers, D residual width
ROWS = 512          # sequences whose tokens are shuffled together; 127 tokens each, 67 MB a layer in the bundled target


@torch.no_grad()
def at_mlps(gpt, idx_BT, layers, stream=False):
    """Input x and output y of the MLPs of `layers` (ascending) at every token but the first of a row, one clean pass
    without the unembedding: two of shape (L, B (T - 1), D)."""
    (x_BTD, r_BTD), xs, ys = gpt.prefix(idx_BT, layers[0]), [], []
    for layer in range(layers[0], layers[-1] + 1):
        y_BTD = gpt.h[layer].mlp(x_BTD)
        if layer in layers:
            out_BTD = r_BTD + y_BTD if stream else y_BTD
            xs.append(x_BTD[:, 1:].flatten(0, 1)), ys.append(out_BTD[:, 1:].flatten(0, 1))
        if layer < layers[-1]:
            x_BTD, r_BTD = gpt.h[layer + 1].to_mlp(r_BTD + y_BTD)
    return torch.stack(xs), torch.stack(ys)


def over_rows(gpt, idx_RT, layers, stream=False):
    """at_mlps of many rows, 16 at a time."""
    return [torch.cat(part, 1) for part in zip(*(at_mlps(gpt, idx, layers, stream) for idx in idx_RT.split(16)))]


@torch.no_grad()
def clean_pass(gpt, layer, idx_BT):
    """Input x and output y of one MLP and the stream r that y is added to, in one clean pass; and kl(y_hat_BTD), with
    gradients: KL(clean || spliced) at each position (B, T) when y_hat stands in for y, through the suffix alone."""
    W_VD, (x_BTD, r_BTD) = gpt.wte.weight, gpt.prefix(idx_BT, layer)
    y_BTD = gpt.h[layer].mlp(x_BTD)
    final_BTD = gpt.hidden(r_BTD, y_BTD, layer)
    clean = final_BTD, *fused.log_partition(final_BTD, W_VD)
    kl = lambda y_hat_BTD: fused.kl_unembed(clean, gpt.hidden(r_BTD, y_hat_BTD, layer), W_VD)
    return x_BTD, y_BTD, r_BTD, kl


def batches(gpt, corpus, layers, T, N, seed, start=0, stream=False):
    """Endless training batches (x_LND, y_LND) from step `start` on: tokens of ROWS sequences of the corpus at a time,
    in random order, each token once an epoch but for less than N at the end of each shuffle. What step s gets depends
    on the arguments and s alone: a resumed run sees what the killed one would have. Memory: 2 L ROWS T D floats.
    Fails if N is over ROWS (T - 1)."""
    steps = ROWS * (T - 1) // N             # from one shuffle to the next
    if not steps:
        fail(f"--N {N}: must be from 1 to {ROWS * (T - 1)}")
    step, device = start, gpt.wte.weight.device
    while True:
        turn = step // steps
        idx_RT = corpus.batch(turn, ROWS, T, seed).to(device)
        x_LND, y_LND = over_rows(gpt, idx_RT, layers, stream)
        order = torch.randperm(x_LND.shape[1], generator=generator(seed, f"shuffle {turn}")).to(device)
        for step in range(step, (turn + 1) * steps):
            some = order[step % steps * N:][:N]
            yield x_LND[:, some], y_LND[:, some]
        step += 1


@dataclass
class Config:
    stories: int = 3            # stories to print
    seed: int = 0               # which ones
    split: Literal["fit", "dev", "test"] = "test"  # the split that the statistics are about
    plot: str = ""              # file.png for the rank-frequency picture (needs matplotlib); empty: none


def main(cfg):
    if cfg.plot and not cfg.plot.endswith(".png"):
        fail(f"--plot {cfg.plot}: must end in .png")
    for i in range(cfg.seed, cfg.seed + cfg.stories):
        print(f"\n{decode(story.tell(i).ids[1:], VOCAB)}")
    began, n = time.perf_counter(), 200_000
    lengths = [len(s.ids) - 1 for s in cache.stories("dev", n)]
    rate = n / (time.perf_counter() - began)
    corpus = load("tinytales", cfg.split, VOCAB)
    counts = np.sort(np.bincount(corpus.ids, minlength=len(VOCAB)))[::-1]
    top = counts[:1000].clip(1)
    slope = -np.polyfit(np.log(np.arange(1, 1001)), np.log(top / top.sum()), 1)[0]
    print(f"""
{len(VOCAB)} word types, {story.N_TEMPLATES} templates in {len(story.FAMILIES)} families, {len(story.TOPICS)} topics
stories of {min(lengths)} to {max(lengths)} tokens, mean {np.mean(lengths):.0f}
derivation entropy {corpus.entropy(128):.4f} nats/token
rank-frequency exponent over the 1,000 commonest words {slope:.2f} (Zipf: 1), {(counts > 0).sum()} types seen
generated at {rate:,.0f} tokens/s on one core
cache: {cache.CACHE}""")
    share = corpus.labels(128)[:, 1:].mean((0, 1))
    print(f"\n{len(share)} concepts and the share of the tokens where each is true (%)")
    for i in range(0, len(share), 4):
        print("".join(f"{corpus.names[j][:24]:<25}{100 * share[j]:5.2f}  " for j in range(i, min(i + 4, len(share)))))
    pairs = [f"{a} > {b}" for a, b in concepts.HIERARCHY]
    print(f"\n{len(pairs)} parents and children: {', '.join(pairs)}")
    if cfg.plot:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            fail("--plot needs matplotlib: pip install matplotlib")
        plt.loglog(np.arange(1, len(counts) + 1), counts / counts.sum(), "k.", ms=3)
        plt.xlabel("rank of the word"), plt.ylabel("share of the tokens"), plt.title(f"TinyTales, {cfg.split} split")
        save_picture(plt.gcf(), cfg.plot)


if __name__ == "__main__":
    main(cli(Config))
