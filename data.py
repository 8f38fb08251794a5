"""Tokens, labels, batches: TinyTales from a cache that builds itself, or a text of your own.

    python data.py            # three stories, statistics, the concept table, where the cache lies
    --data X.bin              # of any script: uint16 tokens as nanoGPT writes them
    --data X.bin:uint32       # tokens of another width, here of a vocabulary over 65,536
    --data X.txt              # text, in the words of the target's vocab.json

Rows of T tokens begin at a story's start wherever one is within reach: the target sees most stories
from their first word. A story of a file starts at the token <|endoftext|>. A .bin may have any
size: it is mapped, not read, and an epoch of a long one is CHUNK tokens.
"""
import functools
import hashlib
import math
import os
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common import cli, fail, generator
from model import check_rows, cross_entropy, split_rows
from report.curve import save_picture
from tinytales import cache, concepts, story
from tinytales.cache import SPLITS
from tinytales.prompts import prompts  # noqa: F401  (part of this module's interface)
from tinytales.story import EOT, UNK, VOCAB

# where the splits of a .bin or .txt begin and end
CUTS = {"train": (0, 0.9), "fit": (0.9, 0.94), "dev": (0.94, 0.96), "test": (0.96, 1)}
WIDTHS = ("uint64", "uint32", "uint16", "uint8", "int64", "int32", "int16")     # of a .bin's tokens
CHUNK = 1 << 24         # tokens that rows are looked for in at a time: half a second, 160 MB
WHOLE = 1 << 26         # bytes of a file up to which its fingerprint reads them all
WORSE = 1.              # nats by which an untrained target may be worse than a uniform guess


@dataclass
class Corpus:
    """A stream of tokens, and what is known about each."""
    ids: np.ndarray                     # (n,) integers
    vocab: list                         # the words that ids stand for
    names: list                         # of the concepts
    bits: np.ndarray | None = None      # (n, bytes): which concepts are true, packed; None: unknown
    logp: np.ndarray | None = None      # (n,): log-probability in the generator; None: unknown

    @property
    def n_chunks(self):
        """How many chunks is the stream cut into? CHUNK tokens each, the last with the rest."""
        return max(1, len(self.ids) // CHUNK)

    @functools.lru_cache(maxsize=4)
    def starts(self, T, chunk=0):
        """Where do rows of T tokens begin in a chunk of the stream? Each at the last story start
        that the row before it reaches, if there is one, else where that row ends."""
        offset = chunk * CHUNK
        is_last = chunk == self.n_chunks - 1
        ids = self.ids[offset:] if is_last else self.ids[offset:offset + CHUNK]
        n = len(ids)
        if n < T:
            fail(f"a part of the data holds {n} tokens, fewer than one row of {T}: take a longer "
                 "text, or a smaller --T")
        eot = self.vocab.index(EOT) if EOT in self.vocab else -1
        stories = np.flatnonzero(ids == eot)
        starts = []
        start = 0
        while start + T <= n:
            starts.append(start)
            # a story that starts at start + T follows without a gap
            last = np.searchsorted(stories, start + T, "right") - 1
            is_reached = last >= 0 and stories[last] > start
            start = int(stories[last]) if is_reached else start + T
        return offset + np.array(starts)

    def at(self, positions):
        """Look up the tokens at some positions, int64. Fails on one outside the vocabulary: a long
        stream was not read through when it was loaded."""
        ids = self.ids[positions].astype(np.int64)
        check_ids(ids, self.vocab, "--data")
        return torch.from_numpy(ids)

    def positions(self, T, n_rows=None):
        """Where in the stream do the tokens of the evaluation rows lie? (n_rows, T)."""
        return self.starts(T)[:n_rows, None] + np.arange(T)

    def rows(self, T, n_rows=None):
        """The evaluation rows, (n_rows, T) int64."""
        return self.at(self.positions(T, n_rows))

    def labels(self, T, n_rows=None):
        """Which concepts are true at each token of `rows`? (n_rows, T, concepts), bool."""
        bits = self.bits[self.positions(T, n_rows)]
        return np.unpackbits(bits, axis=-1, count=len(self.names)).astype(bool)

    def labelled(self, T, n_rows, device):
        """The pair (rows, labels) that evals.py and metrics/ ask for."""
        return self.rows(T, n_rows).to(device), self.labels(T, n_rows)

    def fresh(self, T, n_rows=None):
        """Which positions of `rows` are to be predicted, such that each token counts once? Mask
        (n_rows, T). Left out are those that the next row, which knows their story from its start,
        predicts again."""
        next_start = np.append(self.starts(T)[1:], len(self.ids))
        mask = self.positions(T) <= next_start[:, None]
        mask[:, 0] = False
        return torch.from_numpy(mask[:n_rows])

    def entropy(self, T, n_rows=None):
        """How well can the text be predicted at best? Derivation entropy in nats per token over
        the `fresh` positions, an upper bound on their entropy rate. None where it is unknown."""
        if self.logp is None:
            return None
        logp = self.logp[self.positions(T, n_rows)]
        return float(-logp[self.fresh(T, n_rows).numpy()].mean())

    @functools.lru_cache(maxsize=2)
    def order(self, T, seed, epoch):
        """The starts of the rows, shuffled anew in each epoch. Epochs of a stream of several chunks
        take them in turn."""
        starts = self.starts(T, epoch % self.n_chunks)
        return starts[np.random.default_rng([seed, epoch]).permutation(len(starts))]

    def batch(self, step, B, T, seed):
        """Draw the training batch of one step, (B, T) int64: it depends on the arguments alone."""
        # rows an epoch; of several chunks, which differ in that, as many as each has at least
        n = len(self.starts(T)) if self.n_chunks == 1 else CHUNK // T
        first = step * B
        starts = np.array([self.order(T, seed, i // n)[i % n] for i in range(first, first + B)])
        return self.at(starts[:, None] + np.arange(T))

    __hash__ = object.__hash__


# ------------------------------------------------------------------------- what --data names
@functools.lru_cache(maxsize=8)
def tinytales_corpus(split, n_tokens):
    """Read TinyTales from its cache."""
    names, maps = cache.arrays(split, n_tokens)
    return Corpus(vocab=VOCAB, names=names, **maps)


def load_for(gpt, spec, T, splits=("train", "fit", "test")) -> dict[str, Corpus]:
    """Load several splits of the text that a target is to read: `load_all`, and a check that the
    tokens of a .bin are this target's.

    Numbers of another width or another tokenizer are valid tokens more often than not. The target
    itself tells: on rows spread over each split, a thousand tokens of it, it must not be worse than
    a uniform guess, log V nats per token, by more than WORSE."""
    check_rows(gpt, T)
    corpora = load_all(spec, gpt.vocab, T, splits)
    if spec != "tinytales":
        print(f"{spec}: concepts are lexical and structural, what its tokens alone determine")
    if Path(spec).suffix.startswith(".bin"):
        uniform = math.log(len(gpt.vocab))
        for split, corpus in corpora.items():
            starts = corpus.starts(T)
            some = np.linspace(0, len(starts) - 1, max(2, 1024 // T)).astype(int)
            loss = cross_entropy(gpt, corpus.at(starts[some, None] + np.arange(T)))
            if not loss <= uniform + WORSE:
                fail(f"--data {spec}: these are not this target's tokens: it predicts the {split} "
                     f"part at {loss:.1f} nats, a uniform guess at {uniform:.1f}; they must be of "
                     "its own tokenizer, and of the width that is named (X.bin:uint32)")
    return corpora


def load_all(spec, vocab, T, splits=("train", "fit", "test")) -> dict[str, Corpus]:
    """Load several splits, {split: corpus}. Fails where one has no row of T tokens."""
    corpora = {split: load(spec, split, vocab) for split in splits}
    for split, corpus in corpora.items():
        if len(corpus.ids) < T:
            fail(f"--data {spec}: too short for a row of {T} tokens, "
                 f"its {split} part has {len(corpus.ids)}")
    return corpora


@functools.lru_cache
def fingerprint(spec) -> str:
    """Is this the text that a run began with? A hash of what --data names.

    Of TinyTales it covers the sources; of a file the name, the size and the content, whole up to 64
    MB. A larger file's content is sampled at 64 places, so that it takes milliseconds whatever the
    size, and its date counts: a copy has to keep that (cp -p). The sources of the concepts are part
    of it, and for a .txt how words are told."""
    digest = hashlib.sha256(cache.version().encode())
    if spec != "tinytales":
        path, _ = file_of(spec)
        stat = path.stat()
        size = stat.st_size
        width = spec.removeprefix(str(path))
        digest.update(f"{path.name}{width} {size}".encode())
        if path.suffix == ".txt":
            # how it is cut into words
            digest.update(f"{WORD.pattern} {DOCUMENT.pattern} {INVISIBLE.pattern}".encode())
        piece = 1 << 14
        n_pieces = 64
        if size > WHOLE:
            digest.update(str(stat.st_mtime_ns).encode())
        else:
            n_pieces = max(n_pieces, -(-size // piece))
        with open(path, "rb") as file:
            for i in range(n_pieces):
                file.seek(i * max(0, size - piece) // (n_pieces - 1))
                digest.update(file.read(piece))
    return digest.hexdigest()[:12]


def load(spec, split, vocab, n_tokens=None) -> Corpus:
    """Load one split of what --data names: "tinytales", or a .bin or .txt cut into train 90 %, fit
    4 %, dev 2 %, test 4 %.

    Fails on a missing, empty or truncated file, a token outside the vocabulary, tokens of another
    width, a text in another vocabulary."""
    most = n_tokens or SPLITS[split][1]
    if spec == "tinytales":
        if list(vocab) != VOCAB:
            fail("--data tinytales needs a target with TinyTales' vocabulary; "
                 "give --data a .bin or .txt for this one")
        return tinytales_corpus(split, most)

    # the part of the file that is this split; all but training take no more than they need
    ids = read_ids(spec, vocab)
    begin, end = [int(len(ids) * share) for share in CUTS[split]]
    if split != "train":
        end = min(end, begin + most)
    ids = ids[begin:end]
    if not len(ids):
        fail(f"--data {spec}: too short, its {split} part is empty")
    check_ids(sample(ids), vocab, f"--data {spec}")

    # concepts that the words alone decide; the generator's state is not known here
    corpus = Corpus(ids, list(vocab), concepts.concept_names(with_state=False))
    if split != "train":
        words, table = lexicon(tuple(vocab))
        labels = concepts.labels(np.asarray(ids), words, table)
        corpus.bits = np.packbits(labels, axis=1)
    return corpus


def file_of(spec):
    """Which file does --data name, and which integers are its tokens? X.bin:uint32 -> X.bin,
    "uint32"; None where the width is not said. Fails where there is no such file."""
    name, _, width = spec.rpartition(":")
    if not (name.endswith(".bin") and width in WIDTHS):
        name = spec
        width = None
    if not name.endswith((".bin", ".txt")):
        fail(f"--data {spec}: allowed are tinytales, a .bin of uint16 token ids, a .bin with its "
             f"width (X.bin:uint32; {', '.join(WIDTHS)}), or a .txt")
    if not os.path.isfile(name):
        fail(f"--data {spec}: no such file")
    return Path(name), width


def read_ids(spec, vocab):
    """Read all tokens of a .bin or .txt, (n,) integers; of a .bin only what is asked for leaves the
    disk."""
    path, width = file_of(spec)
    if path.suffix == ".txt":
        return encode_file(path, tuple(vocab))
    if not width and len(vocab) > 1 << 16:
        fail(f"--data {spec}: uint16 tokens can't name the target's vocabulary of "
             f"{len(vocab):,}; write uint32, and name --data {path}:uint32")
    width = width or "uint16"
    ids = mapped(path, width)
    hint = other_width(path, vocab, ids.itemsize) or other_kind(path, vocab, ids)
    if hint:
        fail(f"--data {spec}: not {width} tokens; {hint}")
    return ids


def mapped(path, width):
    """The numbers of a .bin as an array that stays on the disk."""
    size = path.stat().st_size
    n_bytes = np.dtype(width).itemsize
    if size % n_bytes or not size:
        fail(f"--data {path}: {size} bytes are no whole, positive number of {width} tokens")
    try:
        return np.memmap(path, width, "r")
    except (OSError, ValueError, MemoryError) as e:
        fail(f"--data {path}: cannot be read: {e}")


def other_width(path, vocab, n_bytes):
    """Does a file hold wider numbers than n_bytes each? A sentence that says which, or "".

    Tokens that are read at half of their width alternate with zeros, or would be none of the
    vocabulary's at their full width. A header may stand before them, and -100 between them."""
    size = path.stat().st_size
    for width in ("uint64", "uint32"):
        if np.dtype(width).itemsize > n_bytes and size % np.dtype(width).itemsize == 0:
            numbers = sample(mapped(path, width))
            numbers = numbers[numbers > 0]
            if np.sum(numbers < len(vocab)) > 0.9 * len(numbers):
                return f"its numbers look like {width}: name it --data {path}:{width}"
    return ""


def other_kind(path, vocab, ids):
    """Does a file hold what no width names? A sentence that says what to do, or "": a .npy, whose
    header would be tokens; where ids are none of the vocabulary's, another header, numbers of
    another byte order, or floats."""
    if ids[:16].tobytes().startswith(b"\x93NUMPY"):
        return (f"it is a .npy file: write np.load('{path}').astype('uint32').tofile('X.bin'), "
                "and name --data X.bin:uint32")
    some = sample(ids)
    if some.max() < len(vocab):
        return ""
    rest = some[1024 // ids.itemsize:]
    if len(rest) and rest.max() < len(vocab):
        return (f"it begins with something else: cut that off, llm.c's header of 1,024 bytes with "
                f"tail -c +1025 {path} > X.bin")
    for kind in (">u8", ">u4", ">u2", "float64", "float32"):
        if path.stat().st_size % np.dtype(kind).itemsize == 0:
            numbers = sample(mapped(path, kind))
            with np.errstate(invalid="ignore"):
                is_id = (numbers >= 0) & (numbers < len(vocab)) & (numbers == np.floor(numbers))
            if is_id.all():
                return (f"its numbers look like {kind}: write np.fromfile('{path}', '{kind}')"
                        ".astype('uint32').tofile('X.bin'), and name --data X.bin:uint32")
    return ""


def sample(ids):
    """Take a stream's tokens, or of a long one 64 pieces spread over it."""
    if len(ids) <= CHUNK:
        return ids
    piece = 1 << 14
    starts = np.linspace(0, len(ids) - piece, 64, dtype=np.int64)
    return np.concatenate([ids[start:start + piece] for start in starts])


def check_ids(ids, vocab, source):
    """Fail on a token outside the vocabulary."""
    for i in (ids.max(initial=0), ids.min(initial=0)):
        if not 0 <= i < len(vocab):
            fail(f"{source}: token id {i} is outside the target's vocabulary of {len(vocab)}")


# --------------------------------------------------------------------------------- tokenizer
# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese; Khmer; Tai; Japanese; Chinese.
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
UNSPACED += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# Control characters, and the sign for a character that was lost.
NO_TEXT = "\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufffd"
# Marks that belong to the letter before them, which Python's re has no class for: accents, vowel
# signs, and the invisible joiners of Mongolian, Persian and Hindi.
ACCENTS = "".join(c for c in map(chr, range(1 << 17)) if unicodedata.category(c)[0] == "M")
ACCENTS += "\u180e\u200c\u200d"
LETTERS = rf"(?:[^\W\d_{UNSPACED}][{ACCENTS}]*)+"
WORD = re.compile("|".join((
    f"{re.escape(EOT)}|{re.escape(UNK)}",
    rf"{LETTERS}(?:(?!'[sS]\b)['·՛-՞׳״-]{LETTERS})*",    # don't, hide-and-seek, col·lega
    r"'[sS]\b",
    r"\d+",
    rf"[^\s{UNSPACED}{NO_TEXT}][{ACCENTS}]*")))
DOCUMENT = re.compile(          # one, or one that ends and one that begins
    r"(?:<[|｜]?/?(?:(?:begin|start|end)[_▁]?of[_▁]?\w+|[be]o[dpst](?:_id)?|s)[|｜]?>\s*)+", re.I)
# Other kinds of files, by how they begin, in small letters.
KINDS = {
    rb"\x1f\x8b|bzh\d1ay|\xfd7zxz|7z\xbc\xaf|\x28\xb5\x2f\xfd": "packed",
    rb"pk\x03\x04|\xd0\xcf\x11\xe0": "packed, or of an office program",
    rb"%pdf": "a PDF",
    rb"\{\\rtf": "RTF",
    rb"<(!doctype|html|\?xml)": "HTML or XML",
    rb'(\[\s*)?\{\s*"': "JSON",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32 (iconv -f utf-32 -t utf-8)",
    rb"\xff\xfe|\xfe\xff": "UTF-16 (iconv -f utf-16 -t utf-8)",
}
INVISIBLE = re.compile("[\xad\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


def plain(text):
    """Write a text such that a word is spelled in one way: accents as one character with their
    letter, an apostrophe within a word as ', a hyphen as -, a document's mark as EOT, nothing
    invisible.

    A straight quote becomes “ or ”, for the spaces that tell them apart are no tokens. Counting
    them does not tell: a speech of several paragraphs opens more often than it closes."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text)).replace("\u200b", " ")
    text = re.sub(r"(?<=\w)[’‘ʼ＇`´](?=\w)", "'", text)
    text = re.sub("[‐‑]", "-", text)
    text = DOCUMENT.sub(f"{EOT} ", text)
    text = re.sub('(?<=[א-ת])"(?=[א-ת])', "״", text)         # of Hebrew abbreviations
    text = re.sub(r'(?<![^\s([{—–-])"(?=[^\s,;:!?)\]}])', "“", text)
    return text.replace('"', "”")


@functools.lru_cache(maxsize=2)
def tokenize(text):
    """Cut a text into words of any script that puts spaces between them, numbers, marks, the 's of
    Tom's, and marks between documents. Nothing else is left but spaces and what `read_text`
    counts."""
    return WORD.findall(plain(text))


def encode(text, vocab):
    """Turn words into ids; a word that the vocabulary lacks becomes <unk>, “ and ” its straight
    quote if it has that."""
    index = {word: i for i, word in enumerate(vocab)}
    unknown = index.get(UNK, 0)
    for quote in "“”":
        index.setdefault(quote, index.get('"', unknown))
    return [index.get(word, unknown) for word in tokenize(text)]


def coverage(text):
    """What share of a text's characters, spaces left out, belongs to words and marks?"""
    n = sum(map(len, plain(text).split()))
    return sum(map(len, tokenize(text))) / n if n else 1.


def read_text(path):
    """Read a .txt. Fails where it is another kind of file, or words and marks cover under 95 % of
    it."""
    try:
        content = path.read_bytes()
        start = content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        for pattern, kind in KINDS.items():
            if re.match(pattern, start):
                fail(f"--data {path}: is {kind}, must be plain text in UTF-8: convert it first")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"--data {path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")
    except OSError as e:
        fail(f"--data {path}: cannot be read: {e.strerror}")
    covered = coverage(text)
    if covered < .95:
        reason = "control characters are left: is it text, in UTF-8?"
        if len(re.findall(f"[{UNSPACED}]", text)) > .025 * len(text):
            reason = ("a script without spaces between words does not suit tokens that are words; "
                      "take a target with a tokenizer of its own, and its tokens as X.bin")
        fail(f"--data {path}: words and marks cover {covered:.0%} of its characters, less than "
             f"95%: {reason}")
    return text


@functools.lru_cache(maxsize=2)
def encode_file(path, vocab):
    """Read a .txt as ids, one stream. Prints how well the tokens cover it, and fails where most of
    its words are not in the vocabulary."""
    width = "uint16" if len(vocab) <= 1 << 16 else "uint32"
    if UNK not in vocab or has_spaces(vocab):
        fail(f"--data {path}: this target's vocabulary is not word-level; tokenise the text with "
             f"the target's own tokenizer, write np.array(ids, np.{width}).tofile('X.bin'), and "
             f"name --data X.bin:{width}")
    text = read_text(path)
    ids = np.array(encode(text, vocab), width)
    unknown = (ids == vocab.index(UNK)).mean() if len(ids) else 0
    if unknown > .5:
        fail(f"--data {path}: {unknown:.0%} of its words are not in the target's vocab.json; "
             f"make a target for it with python pretrain.py --data {path} --out DIR, with a larger "
             f"--vocab if this is one")
    n_marks = np.sum(ids == vocab.index(EOT)) if EOT in vocab else 0
    print(f"{path}: {len(ids):,} tokens cover {coverage(text):.1%} of its characters, "
          f"{unknown:.1%} of them are {UNK}, {n_marks:,} are marks of documents")
    return ids


def build_vocab(text, size):
    """Make the word-level vocabulary of a text: end of text, unknown word, then its most frequent
    words."""
    counts = Counter(tokenize(text))
    by_count = sorted((-n, word) for word, n in counts.items() if word not in (EOT, UNK))
    return [EOT, UNK, *(word for _, word in by_count[:size - 2])]


# how byte-level BPE spells bytes, {character: byte}, as published with GPT-2: printable characters
# of Latin-1 stand for their own byte, and U+0100 and on for the other 68. Ġ is a space, Ċ a newline
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def is_byte_level(vocab) -> bool:
    """Are the tokens spelled in bytes, as byte-level BPE has them, or in letters?

    Ġ and Ċ, which stand for a space and a newline, are letters of Maltese too. But a vocabulary of
    words has an unknown word, and only one of bytes has a token for each byte, or Ġ before every
    fifth token."""
    if not any("Ġ" in token or "Ċ" in token for token in vocab):
        return False
    n_spaced = sum(token.startswith("Ġ") for token in vocab)
    return UNK not in vocab or BYTES.keys() <= set(vocab) or 5 * n_spaced > len(vocab)


def has_spaces(vocab) -> bool:
    """Do the tokens carry the spaces between words, as Ġcat of byte-level BPE and SentencePiece's
    ▁cat do? As a word, ▁ stands alone."""
    return is_byte_level(vocab) or any(re.match("▁.", token) for token in vocab)


def token_bytes(token):
    """Which bytes does a token of byte-level BPE stand for? One that was added later, and has
    other characters than the alphabet of bytes, stands for itself."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode("utf-8", "backslashreplace")


def join_bytes(tokens):
    """Turn tokens of byte-level BPE into text; bytes that make no character are written \\xe2."""
    return b"".join(map(token_bytes, tokens)).decode("utf-8", "backslashreplace")


def printable(text):
    """Write text on one line: newlines, and what else has no glyph, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spell(ids, vocab) -> list[str]:
    """What does each token read as, by itself and on one line?

    A token of byte-level BPE is the text of its bytes, with its space in front: Ġcat is " cat", as
    is SentencePiece's ▁cat. One that holds a part of a character keeps that part as bytes,
    \\xe2\\x80; `decode` joins it to the rest."""
    tokens = [vocab[i] for i in ids]
    if is_byte_level(vocab):
        tokens = [join_bytes([token]) for token in tokens]
    elif has_spaces(vocab):
        tokens = [token.replace("▁", " ") for token in tokens]
    return [printable(token) for token in tokens]


@functools.lru_cache(maxsize=2)
def lexicon(vocab: tuple):
    """What do all tokens read as, and which concepts of the token itself has each? (words, table).

    Once for a vocabulary: of GPT-2's it takes seconds."""
    words = spell(range(len(vocab)), vocab)
    return words, concepts.lexical(words)


def decode(ids, vocab):
    """Turn ids into readable text. Words get no space before punctuation or after an opening quote;
    tokens of byte-level BPE have spaces of their own."""
    tokens = [vocab[i] for i in ids]
    if is_byte_level(vocab):
        return join_bytes(tokens)
    if has_spaces(vocab):
        return "".join(tokens).replace("▁", " ")
    text = re.sub(r" ([.,!?;:”]|'s|')(?= |$)", r"\1", " ".join(tokens))
    return re.sub(r"“ ", "“", text)


# ------------------------------------------------------------------------------- activations
# The target's activations at its MLPs, as the activation-space methods train on them: one token,
# one example.
#     x = the MLP's input after LayerNorm, y = its output, at every token but the first of a row
#     stream: y is the residual stream that the output is added to, after the addition
# B sequences, T positions, R rows, N tokens of a batch, L layers, D residual width, V vocabulary
ROWS = 512      # sequences whose tokens are shuffled together: 67 MB a layer in the bundled target


@torch.no_grad()
def at_mlps(gpt, idx_BT, layers, stream=False):
    """What do the MLPs of `layers` (ascending) read and write? Two of shape (L, B (T - 1), D).

    One clean pass without the unembedding."""
    xs = []
    ys = []
    x_BTD, r_BTD = gpt.prefix(idx_BT, layers[0])
    for layer in range(layers[0], layers[-1] + 1):
        y_BTD = gpt.mlp(layer)(x_BTD)
        if layer in layers:
            written_BTD = r_BTD + y_BTD if stream else y_BTD
            xs.append(x_BTD[:, 1:].flatten(0, 1))
            ys.append(written_BTD[:, 1:].flatten(0, 1))
        if layer < layers[-1]:
            x_BTD, r_BTD = gpt.next_mlp(r_BTD, y_BTD, layer)
    return torch.stack(xs), torch.stack(ys)


def over_rows(gpt, idx_RT, layers, stream=False):
    """at_mlps of many rows, 16 at a time: two of shape (L, R (T - 1), D)."""
    parts = [at_mlps(gpt, idx_BT, layers, stream) for idx_BT in split_rows(idx_RT, 16)]
    xs, ys = zip(*parts)
    return torch.cat(xs, 1), torch.cat(ys, 1)


@torch.no_grad()
def clean_pass(gpt, layer, idx_BT):
    """What does one MLP read and write, and what would it cost to write something else?

    Returns x_BTD and y_BTD, the stream r_BTD that y is added to, and kl(y_hat_BTD), with gradients:
    KL(clean || spliced) at each position (B, T) when y_hat stands in for y. The model below the
    MLP runs once."""
    x_BTD, r_BTD = gpt.prefix(idx_BT, layer)
    y_BTD = gpt.mlp(layer)(x_BTD)
    return x_BTD, y_BTD, r_BTD, gpt.distance_from(r_BTD, y_BTD, layer)


def batches(gpt, corpus, layers, T, N, seed, start=0, stream=False):
    """Yield training batches (x_LND, y_LND) from step `start` on, without end.

    The tokens of ROWS sequences at a time come in random order, each once an epoch but for less
    than N at the end of each shuffle. What step s gets depends on the arguments and s alone: a
    resumed run sees what the killed one would have. Memory: 2 L ROWS T D floats. Fails if N is over
    ROWS (T - 1)."""
    steps_a_shuffle = ROWS * (T - 1) // N
    if not steps_a_shuffle:
        fail(f"--N {N}: must be from 1 to {ROWS * (T - 1)}")
    step = start
    while True:
        # run the target on the next ROWS sequences, and shuffle their tokens
        shuffle = step // steps_a_shuffle
        idx_RT = corpus.batch(shuffle, ROWS, T, seed).to(gpt.device)
        x_LND, y_LND = over_rows(gpt, idx_RT, layers, stream)
        gen = generator(seed, f"shuffle {shuffle}")
        order = torch.randperm(x_LND.shape[1], generator=gen).to(gpt.device)
        # hand them out, N at a time
        while step // steps_a_shuffle == shuffle:
            first = step % steps_a_shuffle * N
            tokens = order[first:first + N]
            yield x_LND[:, tokens], y_LND[:, tokens]
            step += 1


# -------------------------------------------------------------------- what python data.py says
@dataclass
class Config:
    stories: int = 3            # [0, 1e6] stories to print
    seed: int = 0               # [0, 1e18] which ones
    split: Literal["fit", "dev", "test"] = "test"  # the split that the statistics are about
    plot: str = ""              # file.png for the rank-frequency picture; empty: none


def statistics(corpus, counts):
    """Print how large the text is, how well it can be predicted and how fast it is generated.

    counts: how often each word occurs, most frequent first."""
    # how fast stories come, and how long they are
    began = time.perf_counter()
    n_tokens = 200_000
    lengths = [len(s.ids) - 1 for s in cache.stories("dev", n_tokens)]
    rate = n_tokens / (time.perf_counter() - began)

    # Zipf's law: log frequency against log rank is a line of slope -1
    top = counts[:1000].clip(1)
    ranks = np.arange(1, 1001)
    slope = -np.polyfit(np.log(ranks), np.log(top / top.sum()), 1)[0]

    print(f"\n{len(VOCAB)} word types, {story.N_TEMPLATES} templates in {len(story.FAMILIES)} "
          f"families, {len(story.TOPICS)} topics")
    print(f"stories of {min(lengths)} to {max(lengths)} tokens, mean {np.mean(lengths):.0f}")
    print(f"derivation entropy {corpus.entropy(128):.4f} nats/token")
    print(f"rank-frequency exponent over the 1,000 commonest words {slope:.2f} (Zipf: 1), "
          f"{(counts > 0).sum()} types seen")
    print(f"generated at {rate:,.0f} tokens/s on one core")
    print(f"cache: {cache.CACHE}")


def concept_table(corpus):
    """Print how often each concept is true, and which concepts are part of which."""
    shares = corpus.labels(128)[:, 1:].mean((0, 1))
    print(f"\n{len(shares)} concepts and the share of the tokens where each is true (%)")
    cells = [f"{name[:24]:<25}{100 * share:5.2f}  " for name, share in zip(corpus.names, shares)]
    for i in range(0, len(cells), 4):
        print("".join(cells[i:i + 4]))
    pairs = [f"{parent} > {child}" for parent, child in concepts.HIERARCHY]
    print(f"\n{len(pairs)} parents and children: {', '.join(pairs)}")


def plot(path, split, counts):
    """Draw the frequency of each word against its rank."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    plt.loglog(np.arange(1, len(counts) + 1), counts / counts.sum(), "k.", ms=3)
    plt.xlabel("rank of the word")
    plt.ylabel("share of the tokens")
    plt.title(f"TinyTales, {split} split")
    save_picture(plt.gcf(), path)


def main(cfg):
    """Show what TinyTales is: some stories, its statistics, its concepts."""
    if cfg.plot and not cfg.plot.endswith(".png"):
        fail(f"--plot {cfg.plot}: must end in .png")
    for i in range(cfg.seed, cfg.seed + cfg.stories):
        print(f"\n{decode(story.tell(i).ids[1:], VOCAB)}")
    corpus = load("tinytales", cfg.split, VOCAB)
    counts = np.sort(np.bincount(corpus.ids, minlength=len(VOCAB)))[::-1]
    statistics(corpus, counts)
    concept_table(corpus)
    if cfg.plot:
        plot(cfg.plot, cfg.split, counts)


if __name__ == "__main__":
    main(cli(Config))
