"""From the texts of a raw table to records of mixed columns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmi.data.errors import DataError
from fedmi.data.records import Floats, Ints
from fedmi.exposure.schema import Column, Table

Raw = Mapping[str, Sequence[str]]
"""Header -> texts, one a row, all of one length; "" where the table has nothing."""
NOT_TOLD = "not told"
"""The level of a category that is missing."""


@dataclass(frozen=True)
class Read:
    """A column, and how it is read: the header it has in the file, and the text in place of what
    the file writes, where that is another. open_ended: a number beyond the ends of its range counts
    as the end."""

    column: Column
    header: str
    written: Mapping[str, str] = field(default_factory=dict)
    open_ended: bool = False

    def text(self, raw: str) -> str:
        return self.written.get(raw, raw)


def number(name: str, low: float, high: float, deviation: float = 0.0) -> Column:
    """A number in [low, high]; see `Column`."""
    return Column(name=name, low=low, high=high, deviation=deviation)


def category(name: str, *levels: str) -> Column:
    """One of the levels; see `Column`."""
    return Column(name=name, levels=levels)


def table_of(reads: Iterable[Read]) -> Table:
    return Table(columns=tuple(read.column for read in reads))


def missing_headers(raw: Raw, headers: Iterable[str], source: str) -> None:
    """DataError for headers that the table does not have."""
    if gone := [header for header in headers if header not in raw]:
        raise DataError(f"{source}: no column {gone[0]!r}; it has {sorted(raw)[:12]} ...")


def rows_with(raw: Raw, reads: Iterable[Read], keep: Ints) -> Ints:
    """Those of the rows `keep` that have every number."""
    needed = [read for read in reads if not read.column.levels]
    there = [row for row in keep if all(read.text(raw[read.header][row]) for read in needed)]
    return np.asarray(there, dtype=np.int64)


def encoded(raw: Raw, reads: Sequence[Read], rows: Ints, source: str) -> Floats:
    """[rows, 1, 1, entries]: levels one-hot, numbers scaled to [0, 1].

    Raises DataError for a column that is not there, a level that is not among the column's, what
    is no number or not in its range, each with row, column and value, and for a column whose rows
    all say the same.
    """
    missing_headers(raw, (read.header for read in reads), source)
    parts = [_column(raw[read.header], read, rows, source) for read in reads]
    return np.concatenate(parts, axis=1)[:, None, None, :]


def _column(texts: Sequence[str], read: Read, rows: Ints, source: str) -> Floats:
    encode: Callable[[str, Read], Sequence[float]] = _level if read.column.levels else _scaled
    found = np.zeros((len(rows), read.column.width), dtype=np.float32)
    for at, row in enumerate(rows):
        try:
            found[at] = encode(read.text(texts[row]), read)
        except ValueError as error:
            raise DataError(
                f"{source}: row {row + 1}, column {read.header!r}: {texts[row]!r} {error}"
            ) from error
    if len(rows) and (found == found[0]).all():
        raise DataError(
            f"{source}: column {read.header!r} is {texts[rows[0]]!r} in every row; leave it out"
        )
    return found


def _level(text: str, read: Read) -> Sequence[float]:
    name, levels = text or NOT_TOLD, read.column.levels
    if name not in levels:
        raise ValueError(f"is none of the categories {list(levels)}")
    return [float(name == level) for level in levels]


def _scaled(text: str, read: Read) -> Sequence[float]:
    low, high = read.column.low, read.column.high
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError("is no number") from error
    if read.open_ended:
        value = min(max(value, low), high)
    if not low <= value <= high:
        raise ValueError(f"is outside [{low:g}, {high:g}]")
    return [(value - low) / (high - low)]
