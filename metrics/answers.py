"""Files of what models have answered, so that a killed run goes on and no model is asked twice.

The answers of one model to one group of metrics are a flat dict. They lie in a file beside the
model, and those of a whole table in one file of a line each. Beside them stands their digest: a
damaged file is noticed, and its model asked again. Their name is that of the model's folder and of
their own file. Both end in a hash of all that the answers depend on (compare.py, `evaluation_key`),
so that a name never stands for other answers.
"""
import hashlib
import json
import math
from pathlib import Path

import common


def digest(value):
    """A short name for whatever JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def finite(value):
    """Put None for a number that JSON can't say, NaN or infinity, in a dict of dicts."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sealed(answers) -> str:
    """Write answers as JSON, with their digest beside them."""
    return json.dumps(dict(answers=answers, digest=digest(answers)))


def unsealed(text):
    """Read what `sealed` wrote: None where it is damaged."""
    try:
        read = json.loads(text)
        is_whole = read["digest"] == digest(read["answers"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return read["answers"] if is_whole else None


def keep(path, answers) -> dict:
    """Write the answers to one group of metrics; returns them as `kept` will read them."""
    answers = json.loads(json.dumps(finite(answers)))
    common.write(path, sealed(answers).encode())
    return answers


def kept(path):
    """Read what `keep` wrote: None where there is nothing, or where it is damaged."""
    try:
        return unsealed(path.read_bytes())
    except OSError:
        return None


def name_of(path):
    """Name the answers that are kept in a file."""
    return f"{path.parent.name}/{path.stem}"


def write_all(path, answers):
    """Write {name: answers or None} into one file: a line for each that are there."""
    lines = []
    for name in sorted(answers):
        if answers[name] is not None:
            lines.append(f"{name} {sealed(answers[name])}\n")
    common.write(path, "".join(lines).encode())


def read_all(path) -> dict:
    """Read what `write_all` wrote: {name: answers}. Lines that are damaged are left out, and
    counted aloud. Fails where there are no answers."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        common.fail(f"{path}: cannot read: {e.strerror}")
    by_name = {}
    for line in lines:
        name, _, text = line.decode(errors="replace").partition(" ")
        answers = unsealed(text)
        if answers is not None:
            by_name[name] = answers
    if not by_name:
        common.fail(f"{path}: holds no answers of models")
    if len(by_name) < len(lines):
        n_damaged = len(lines) - len(by_name)
        print(f"{path}: {n_damaged} of {len(lines)} lines are damaged, and left out")
    return by_name
