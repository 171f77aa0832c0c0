"""Records that are no pictures, in words; and which words of a reconstruction are right."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from torch import Tensor

from fedmi.exposure.schema import Column, Schema, Table, Text
from fedmi.metrics.tables import recovered

Reading = tuple[tuple[str, bool], ...]
"""The words of a record in order, and whether each is right."""


def readable(schema: Schema, record: Tensor) -> list[str]:
    """A sentence's words, "column = value" of a table's columns; [] for pictures.

    record: of any shape, the numbers of one record.
    """
    if isinstance(schema, Text):
        return schema.words(record)
    if isinstance(schema, Table):
        row = record.flatten()
        pairs = zip(schema.columns, schema.places, strict=True)
        return [f"{column.name} = {_cell(column, row[place])}" for column, place in pairs]
    return []


def compared(schema: Schema, record: Tensor, true: Tensor) -> Reading:
    """The record's words; those of a sentence are right where they stand in the true one, in
    order (gaps allowed), those of a table where `feature_accuracy` counts the column as right."""
    found, wanted = readable(schema, record), readable(schema, true)
    if isinstance(schema, Text):
        right = _in_order(found, wanted)
        return tuple((word, place in right) for place, word in enumerate(found))
    if not isinstance(schema, Table):
        return ()
    rows = (part.reshape(1, 1, 1, -1) for part in (record, true))
    return tuple(zip(found, recovered(schema, *rows)[0].tolist(), strict=True))


def _in_order(found: Sequence[str], wanted: Sequence[str]) -> set[int]:
    matcher = SequenceMatcher(None, found, wanted, autojunk=False)
    blocks = matcher.get_matching_blocks()
    return {block.a + offset for block in blocks for offset in range(block.size)}


def _cell(column: Column, entries: Tensor) -> str:
    if column.levels:
        return column.levels[int(entries.argmax())]
    return f"{column.low + float(entries[0]) * (column.high - column.low):.4g}"
