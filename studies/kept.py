"""What studies share: where one writes, and what it has found, so that it goes on after a kill."""
import json
from dataclasses import replace

import common
import compare
import metrics.answers
from report import noise


# flags of studies that change nothing of what is found
HOW = {"out", "results", "runs", "table", "networks", "resume", "device", "retrain", "keep"}
# rows of the table that are of components: SPD, and forks of it
SPD_ROWS = [name for name, method in compare.METHODS.items()
            if ":" not in name and hasattr(method.module.Config, "c_imp")]


def apart(cfg, folder="out"):
    """Give a study that is not the whole one, as flags are not at their defaults, a folder of its
    own, so that the whole one stays what it is. folder: the flag that names it, kept if given."""
    whole = type(cfg)
    flags = vars(cfg).keys() - HOW
    is_whole = all(getattr(cfg, name) == getattr(whole, name) for name in flags)
    if is_whole or getattr(cfg, folder) != getattr(whole, folder):
        return cfg
    return replace(cfg, **{folder: f"{getattr(cfg, folder)}-part"})


def numbers(cfg, flag, most):
    """Read a flag that holds whole numbers, separated by commas."""
    text = getattr(cfg, flag)
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not (word.isdecimal() and len(word) < 20 and 1 <= int(word) <= most):
            common.fail(f"--{flag} {text}: whole numbers from 1 to {most:,}, with commas")
    return [int(word) for word in words]


class Found:
    """Tables of rows, in a JSON file that is written anew with each row.

    A row is not found again while everything that it depends on stays as it was."""

    def __init__(self, path, tables, order):
        """tables: their names. order: what rows are sorted by, a function of a row."""
        self.path = path
        self.order = order
        self.asked = set()          # the keys of the rows that were asked for
        self.found = common.read_json(path, {name: [] for name in tables})

    def row(self, table, depends_on, names, find):
        """Add a row to a table, with what find() returns, unless it is there. Older ones go.
        Returns the row."""
        key = compare.digest(depends_on)
        self.asked.add(key)
        rows = self.found.setdefault(table, [])
        found = [row for row in rows if row["key"] == key][:1]
        rows[:] = [row for row in rows if row in found or not names.items() <= row.items()]
        if found:
            return found[0]
        row = names | dict(key=key) | metrics.answers.finite(find())
        rows.append(row)
        rows.sort(key=self.order)
        self.write()
        return row

    def keep_asked(self, *tables):
        """Drop the rows of some tables that were not asked for: an earlier run's."""
        for table in tables:
            rows = self.found.get(table, [])
            self.found[table] = [row for row in rows if row["key"] in self.asked]

    def write(self, **more):
        """Write the tables, and whatever else is to be kept beside them."""
        self.found |= more
        common.write(self.path, json.dumps(self.found, indent=1).encode())


def column(key, values, nulls):
    """A column's number for a row of compare.py's table, and its null, from those of each seed."""
    metrics = {key: noise.over_seeds(values), f"null_{key}": noise.over_seeds(nulls)}
    return {key: metric for key, metric in metrics.items() if metric}
