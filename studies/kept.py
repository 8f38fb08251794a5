"""What a study has found so far, in one file, so that it goes on after a kill."""
import json

import common
import compare
from report import noise


class Found:
    """Tables of rows, in a JSON file that is written anew with each row.

    A row is not found again while everything that it depends on stays as it was."""

    def __init__(self, path, tables, order):
        """tables: their names. order: what rows are sorted by, a function of a row."""
        self.path = path
        self.order = order
        self.found = common.read_json(path, {name: [] for name in tables})

    def row(self, table, depends_on, names, find):
        """Add a row to a table, with what find() returns, unless it is there. Older ones go.
        Returns the row."""
        key = compare.digest(depends_on)
        rows = self.found.setdefault(table, [])
        for row in rows:
            if row["key"] == key:
                return row
        rows[:] = [row for row in rows if not names.items() <= row.items()]
        row = names | dict(key=key) | compare.finite(find())
        rows.append(row)
        rows.sort(key=self.order)
        self.write()
        return row

    def write(self, **more):
        """Write the tables, and whatever else is to be kept beside them."""
        self.found |= more
        common.write(self.path, json.dumps(self.found, indent=1).encode())


def column(key, values, nulls):
    """A column's number for a row of compare.py's table, and its null, from those of each seed."""
    metrics = {key: noise.over_seeds(values), f"null_{key}": noise.over_seeds(nulls)}
    return {key: metric for key, metric in metrics.items() if metric}
