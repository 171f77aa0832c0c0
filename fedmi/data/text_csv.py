"""Sentences of the user's own, from a .csv or .tsv file."""

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.digest import digest
from fedmi.data.errors import DataError
from fedmi.data.protocol import SplitByRecord
from fedmi.data.records import Records, Split
from fedmi.data.sentences import Sentences, fitting
from fedmi.data.splits import by_identity
from fedmi.data.wordpiece import Tokenizer, minilm, padded, train, words_of
from fedmi.exposure.seeding import Seed

Rows = list[tuple[str, ...]]


class TextCSV(Sentences, SplitByRecord):
    """A row a sentence: its text, its label and, if named, whose it is; a header names columns.

    inputs [n, 1, 1, length] token ids. Labels are the column's values in alphabetical order.
    Sentences longer than `length` tokens are left out; the card says how many. With an identity
    column nobody is both private and public. The vocabulary of the own tokenizer is trained on
    the whole file: it says which pieces of words occur in it, and is known to everybody.
    """

    kind: Literal["text_csv"] = "text_csv"

    path: Path = Field(description="the .csv or .tsv file, UTF-8, with a header")
    delimiter: str = Field(
        default="",
        max_length=1,
        description='between columns; empty = tab (quotes are then text) for .tsv, else ","',
    )
    text: str = Field(default="text", min_length=1, description="column of the sentences")
    label: str = Field(default="label", min_length=1, description="column of the classes")
    identity: str = Field(default="", description="column of whose sentence it is; empty = none")

    @property
    def source(self) -> str:
        return str(self.path)

    def card(self) -> Card:
        """Reads the file. Where people are dealt out, private_records is that of seed 0."""
        records, left_out = self._loaded()
        return Card(
            title=self.path.name,
            source=f"{self.source}; {left_out} sentence(s) with more than {self.length - 2} "
            "tokens are left out",
            licence="the user's own",
            shape=records.shape,
            classes=int(records.labels.max()) + 1,
            private_records=len(self.split(Seed.root(0)).private),
            identities=False,
            schema=records.schema,
        )

    def load(self) -> Records:
        return self._loaded()[0]

    def split(self, seed: Seed) -> Split:
        if not self.identity:
            return super().split(seed)
        return by_identity(self.load(), self.held_out, self.public, seed, self.source)

    def fingerprint(self) -> str:
        return digest([self.path.expanduser()])

    def _loaded(self) -> tuple[Records, int]:
        file = self.path.expanduser()
        if not file.is_file():
            raise DataError(f"path = {self.path}: no such file")
        columns = (self.text, self.label, *([self.identity] if self.identity else []))
        delimiter = self.delimiter or ("\t" if file.suffix == ".tsv" else ",")
        options = (self.length, self.tokenizer, self.vocabulary)
        return _load(file, file.stat().st_mtime_ns, columns, delimiter, *options)


@lru_cache(maxsize=4)
def _load(
    file: Path,
    _mtime_ns: int,
    columns: tuple[str, ...],
    delimiter: str,
    length: int,
    tokenizer: Tokenizer,
    vocabulary: int,
) -> tuple[Records, int]:
    rows = _read(file, columns, delimiter)
    sentences = [words_of(row[0]) for row in rows]
    own = (word for words in sentences for word in words)
    pieces = minilm() if tokenizer == "minilm" else train(own, vocabulary, str(file))
    found = fitting(sentences, pieces, length, str(file))
    kept = [rows[row] for row in found.rows]
    records = checked(
        padded(found.ids, length),
        _numbered([row[1] for row in kept]),
        str(file),
        _numbered([row[2] for row in kept]) if len(columns) > 2 else None,
        pieces.schema(length),
    )
    return records, found.too_long


def _numbered(values: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)


def _read(file: Path, columns: tuple[str, ...], delimiter: str) -> Rows:
    """The columns of every row, stripped; DataError names the file and the line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            reader = csv.reader(opened, delimiter=delimiter, quoting=quoting, strict=True)
            header: list[str] = next(reader, [])
            places = [_place(column, header, file) for column in columns]
            return [_row(cells, places, columns, f"{file}:{reader.line_num}") for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a readable table ({error})") from error


def _place(column: str, header: Sequence[str], file: Path) -> int:
    if column not in header:
        there = ", ".join(header) or "no columns at all"
        raise DataError(f"{file}: there is no column '{column}'; the header has {there}")
    return header.index(column)


def _row(
    cells: Sequence[str], places: Sequence[int], columns: Sequence[str], where: str
) -> tuple[str, ...]:
    if len(cells) <= max(places):
        raise DataError(f"{where}: {len(cells)} cell(s); {max(places) + 1} would be right")
    found = tuple(cells[place].strip() for place in places)
    for column, value in zip(columns, found, strict=True):
        if not value:
            raise DataError(f"{where}: '{column}' is empty; drop the row, or fill it in")
    if not words_of(found[0]):
        raise DataError(f"{where}: the sentence has no word")
    return found
