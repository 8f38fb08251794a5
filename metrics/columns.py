"""What is a column of the table?

Each module that measures has COLUMNS = {key: Column}, and beside it the function that fills them:

    measure(m, arena, gen) -> (numbers, details)

numbers has exactly the keys of COLUMNS, with None where a number would mean nothing. details is
what else is worth keeping: nulls (null_KEY), intervals over stories (KEY_within), and lists and
curves for the pictures.
"""
from typing import Any, NamedTuple


class Column(NamedTuple):
    """One number of a row of the table."""
    head: str                       # what stands above it
    better: str                     # "up", "down", or "" for neither
    beat: Any                       # what has to be beaten: a number, a floor's name, or None
    digits: int                     # after the point
    text: str                       # what it says, in words
    table: str                      # the heading that it stands under


def split(columns, found):
    """Sort a flat dict into (numbers, details): what has a column, and everything else."""
    numbers = {key: found.get(key) for key in columns}
    details = {key: value for key, value in found.items() if key not in columns}
    return numbers, details
