"""TinyTales' tokens and labels, generated once and kept in files that rebuild themselves, in cache/
or in the folder that the environment names: NANODECOMP_CACHE.

Splits never share a story: story i of a split is story number (first of the split + i) of the
generator.
"""
import contextlib
import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import fail, read_source, write
from tinytales import concepts, story, words
from tinytales.story import VOCAB

CACHE = Path(os.environ.get("NANODECOMP_CACHE") or Path(__file__).parent.parent / "cache")
# split: (first story, tokens)
SPLITS = dict(train=(0, 4_000_000), fit=(1 << 40, 200_000), dev=(2 << 40, 50_000),
              test=(3 << 40, 200_000))
CHUNK = 200_000                 # tokens that are written at a time: about 100 MB of memory


def version():
    """Hash everything that a cached token depends on: what these sources do."""
    texts = [Path(module.__file__).read_text("utf-8") for module in (words, story, concepts)]
    hashes = "".join(read_source(text).hash for text in texts)
    return hashlib.sha256(hashes.encode()).hexdigest()[:12]


def stories(split, n_tokens):
    """Tell the stories of a split, in order, until n_tokens are reached."""
    number, _ = SPLITS[split]
    total = 0
    while total < n_tokens:
        told = story.tell(number)
        yield told
        number += 1
        total += len(told.ids)


def arrays(split, n_tokens):
    """Read a split from the cache: (concept names, {"ids", "bits", "logp"}).

    ids: tokens; bits: packed labels; logp: log-probability of the choices charged to each token.
    The train split has tokens alone: nothing is trained on labels. Files that are missing, damaged
    or of another version are built first.
    """
    names = concepts.concept_names(with_state=True)
    kinds = dict(ids=np.uint16)
    if split != "train":
        kinds |= dict(bits=np.uint8, logp=np.float32)
    stem = CACHE / f"tinytales-{split}-{n_tokens}"
    meta = Path(f"{stem}.json")
    parts = {part: Path(f"{stem}.{part}") for part in kinds}
    if not is_valid(meta, parts):
        try:
            build(split, n_tokens, parts, meta)
        except OSError as e:
            path = e.filename2 or e.filename or CACHE
            fail(f"{path}: cannot be written, for the cache of TinyTales: {e.strerror}; "
                 "NANODECOMP_CACHE may name another folder")

    maps = {part: np.memmap(parts[part], kind, "r") for part, kind in kinds.items()}
    if "bits" in maps:
        n_bytes = (len(names) + 7) // 8
        maps["bits"] = maps["bits"].reshape(-1, n_bytes)
    return names, maps


def is_valid(meta, parts):
    """Are the files of a split there, whole and of this version?"""
    try:
        # to read what is no file, such as a pipe, might never end
        if not all(path.is_file() for path in (meta, *parts.values())):
            return False
        recorded = json.loads(meta.read_text(encoding="utf-8"))
        if recorded["version"] != version():
            return False
        return all(checksum(path) == recorded["crc"][part] for part, path in parts.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def checksum(path):
    return zlib.crc32(path.read_bytes())


def build(split, n_tokens, parts, meta):
    """Write the files of a split.

    Under other names first, then they are renamed; the meta file, which comes last, makes them
    valid. A build that is cut off leaves nothing that could be taken for a split, and only one that
    is killed leaves its temporary files.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    mine = secrets.token_hex(8)
    temporary = {part: Path(f"{path}.tmp{mine}") for part, path in parts.items()}
    table = concepts.lexical(VOCAB)
    with contextlib.ExitStack() as stack:
        for path in temporary.values():
            stack.callback(path.unlink, missing_ok=True)
        bar = tqdm(total=n_tokens, unit="tok", desc=f"writing TinyTales {split}")
        stack.enter_context(bar)
        files = {part: stack.enter_context(open(path, "wb")) for part, path in temporary.items()}
        for chunk in chunks(stories(split, n_tokens)):
            bar.update(write_chunk(chunk, files, table))
        for part, file in files.items():
            file.close()
            os.replace(temporary[part], parts[part])
    crc = {part: checksum(path) for part, path in parts.items()}
    write(meta, json.dumps(dict(version=version(), crc=crc)).encode())


def chunks(all_stories):
    """Collect stories to lists of CHUNK tokens or a little more, the last with what remains."""
    chunk = []
    size = 0
    for told in all_stories:
        chunk.append(told)
        size += len(told.ids)
        if size >= CHUNK:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def write_chunk(chunk, files, table):
    """Append some stories to the files; returns how many tokens these are."""
    ids = np.concatenate([np.array(told.ids, np.uint16) for told in chunk])
    files["ids"].write(ids.tobytes())
    if "bits" not in files:
        return len(ids)

    # Choices are charged to tokens; a span is a run of tokens over which the state stays as it is.
    logp = np.zeros(len(ids))
    state = []
    span_starts = []
    start = 0
    for told in chunk:
        for position, charge in told.events:
            logp[start + position] += charge
        for position, bits in [(0, told.plan), *told.spans]:
            span_starts.append(start + position)
            state.append(bits)
        start += len(told.ids)

    # A state for each token.
    span_lengths = np.diff([*span_starts, len(ids)])
    state = np.repeat(np.array(state, np.uint64), span_lengths)
    bits = np.packbits(concepts.labels(ids, VOCAB, table, state), axis=1)
    files["bits"].write(bits.tobytes())
    files["logp"].write(logp.astype(np.float32).tobytes())
    return len(ids)
