"""TinyTales' tokens and labels, generated once and kept in files that rebuild themselves.

Splits never share a story: story i of a split is story number (first of the split + i) of the generator.
"""
import contextlib
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import write
from tinytales import concepts, story, words
from tinytales.story import VOCAB

CACHE = Path(os.environ.get("NANODECOMP_CACHE", Path(__file__).parent.parent / "cache"))
SPLITS = dict(train=(0, 4_000_000), fit=(1 << 40, 200_000),         # split: (first story, tokens)
              dev=(2 << 40, 50_000), test=(3 << 40, 200_000))
CHUNK = 200_000                 # tokens generated, labelled and written at a time: about 100 MB of memory


def version():
    """Hash of everything that a cached token depends on: these sources."""
    sources = [Path(m.__file__).read_bytes() for m in (words, story, concepts)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def stories(split, n_tokens):
    """Stories of a split, in order, until n_tokens are reached."""
    first, total = SPLITS[split][0], 0
    while total < n_tokens:
        s = story.tell(first)
        first, total = first + 1, total + len(s.ids)
        yield s


def arrays(split, n_tokens):
    """(concept names, cached tokens, packed labels and log-probabilities); built where missing, damaged or of another
    version.
    The train split carries tokens alone: nothing is trained on labels."""
    names = concepts.concept_names(with_state=True)
    stem = CACHE / f"tinytales-{split}-{n_tokens}"
    kinds = dict(ids=np.uint16) if split == "train" else dict(ids=np.uint16, bits=np.uint8, logp=np.float32)
    meta, parts = Path(f"{stem}.json"), {k: Path(f"{stem}.{k}") for k in kinds}
    try:
        old = json.loads(meta.read_text())
        good = old["version"] == version() and all(checksum(p) == old["crc"][k] for k, p in parts.items())
    except (OSError, ValueError, KeyError):
        good = False
    if not good:
        build(split, n_tokens, parts, meta)
    maps = {k: np.memmap(parts[k], kind, "r") for k, kind in kinds.items()}
    if "bits" in maps:
        maps["bits"] = maps["bits"].reshape(-1, (len(names) + 7) // 8)
    return names, maps


def checksum(path):
    return zlib.crc32(path.read_bytes())


def build(split, n_tokens, parts, meta):
    """Writes the parts of a split under other names, then renames them; the meta file, last, makes them valid."""
    CACHE.mkdir(parents=True, exist_ok=True)
    temps = {k: Path(f"{p}.tmp{os.getpid()}") for k, p in parts.items()}
    table = concepts.lexical(VOCAB)
    with contextlib.ExitStack() as stack, tqdm(total=n_tokens, unit="tok", desc=f"writing TinyTales {split}") as bar:
        files = {k: stack.enter_context(open(p, "wb")) for k, p in temps.items()}
        chunk, size = [], 0
        for s in stories(split, n_tokens):
            chunk.append(s)
            size += len(s.ids)
            if size >= CHUNK:
                write_chunk(chunk, files, table)
                bar.update(size)
                chunk, size = [], 0
        if chunk:
            write_chunk(chunk, files, table)
            bar.update(size)
    for k, temp in temps.items():
        os.replace(temp, parts[k])
    write(meta, json.dumps(dict(version=version(), crc={k: checksum(p) for k, p in parts.items()})).encode())


def write_chunk(chunk, files, table):
    """Appends the ids and, where a file waits for them, the labels and log-probabilities of some stories."""
    ids = np.concatenate([np.array(s.ids, np.uint16) for s in chunk])
    files["ids"].write(ids.tobytes())
    if "bits" not in files:
        return
    at = np.cumsum([0] + [len(s.ids) for s in chunk])
    logp, state, edges = np.zeros(len(ids)), [], []
    for a, s in zip(at, chunk):
        for position, lp in s.events:
            logp[a + position] += lp
        edges += [a, *(a + p for p, _ in s.spans)]
        state += [s.plan, *(bits for _, bits in s.spans)]
    state = np.repeat(np.array(state, np.uint64), np.diff([*edges, len(ids)]))
    files["bits"].write(np.packbits(concepts.labels(ids, VOCAB, table, state), axis=1).tobytes())
    files["logp"].write(logp.astype(np.float32).tobytes())
