"""Numbers of the table in a text: results/README.md says what they are of, and this what they are.

    narrative.fill(text, results) -> the text with today's numbers     # what results.json holds

A text names a **column** and a `row`, in either order; what follows is of the two named last, at
the middle one of the row's sparsities: "0.955 ± 0.013", the mean over seeds and half of its 95 %
interval, and "null 0.000". Each number keeps its digits after the point. What a number means,
higher, a tie, is the writer's to read again.
"""
import re
from pathlib import Path

import common

TOKEN = re.compile(r"""
    \*\* (?P<column> [^*]+) \*\*
    | ` (?P<row> [^`]+) `
    | (?P<mean> -?[\d.]*\d) (?P<between> \s+±\s+) (?P<half> [\d.]*\d)
    | null (?P<space> \s+) (?P<null> -?[\d.]*\d)
""", re.VERBOSE)


class Reader:
    """Reads a text's tokens in turn, and says what each should be."""

    def __init__(self, results):
        self.keys = {column["head"]: key for key, column in results["columns"].items()}
        self.rows = {row["name"]: row["metrics"] for row in results["rows"] if row["middle"]}
        self.column = self.row = None           # those that were named last

    def current(self, token):
        """A number as it is today; a name as it is, and kept in mind."""
        if token["mean"]:
            mean, half = [self.number(part, token[part]) for part in ("mean", "half")]
            return mean + token["between"] + half
        if token["null"]:
            return "null" + token["space"] + self.number("null", token["null"])

        # other bold words, and other names in backticks, are left alone
        name = " ".join(token[0].strip("*`").split())
        if token["column"] and name in self.keys:
            self.column = name
        if token["row"] and name in self.rows:
            self.row = name
        return token[0]

    def number(self, part, like):
        """mean, half or null of the row and column, with as many digits as `like` has."""
        metric = self.rows.get(self.row, {}).get(self.keys.get(self.column), {})
        if metric.get(part) is None:
            common.fail(f"no {part} of **{self.column}** of `{self.row}`, where {like} is said")
        return f"{metric[part]:.{len(like.partition('.')[2])}f}"


def fill(text, results) -> str:
    """Put the numbers of results in place of those in a text. Fails where there is none."""
    return TOKEN.sub(Reader(results).current, text)


def update(path, results):
    """Fill the text in a file."""
    text = fill(Path(path).read_text(encoding="utf-8"), results)
    common.write(path, text.encode())
