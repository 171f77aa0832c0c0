"""Sentences: cut out of running text, and made into records."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from fedmi.data.dataset import Dataset
from fedmi.data.errors import DataError
from fedmi.data.records import Ints
from fedmi.data.wordpiece import Tokenizer, WordPiece

# fmt: off
ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "st", "gen", "col", "capt", "lieut", "lt", "sen", "rep", "gov",
    "hon", "messrs", "no", "nos", "vol", "art", "sec", "jr", "sr", "co", "inc", "etc", "viz",
    "u.s", "jan", "feb", "mar", "apr", "aug", "sept", "oct", "nov", "dec",
))
# fmt: on
MARKS = re.compile(r"[\[(](applause|laughter|inaudible|see app note)\.?[\])]", re.IGNORECASE)
STOP = re.compile(r"[.!?]+[\"'”’)]*(?=\s+[\"'“‘(]?[A-Z0-9])")
WHOLE = re.compile(r"[\"'“‘(]?[A-Z0-9][^\[\]]*[.!?][\"'”’)]*")


def sentences_of(text: str) -> list[str]:
    """The whole sentences of a text whose paragraphs are lines, in order.

    Marks of applause go; headings, items of lists and whatever else has brackets, or does not
    begin like a sentence and end in a full stop, question or exclamation mark, is left out.
    """
    found: list[str] = []
    for line in text.splitlines():
        plain = " ".join(MARKS.sub(" ", line).split())
        found += [one for one in _cut(plain) if WHOLE.fullmatch(one) and not one.isupper()]
    return found


def _cut(line: str) -> list[str]:
    found, start = [], 0
    for stop in STOP.finditer(line):
        if not _abbreviated(line[start : stop.end()]):
            found.append(line[start : stop.end()].strip())
            start = stop.end()
    return [*found, line[start:].strip()]


def _abbreviated(text: str) -> bool:
    """Whether the full stop at the end belongs to the last word: "Mr.", "J.", "U.S."."""
    word = text.rsplit(maxsplit=1)[-1].lower()
    initial = re.fullmatch(r"\W?\w\.", word) is not None
    return initial or (word.endswith(".") and word[:-1] in ABBREVIATIONS)


class Sentences(Dataset):
    """Fields of every data set of sentences."""

    length: int = Field(
        default=24, ge=3, le=512, description="tokens of a record, [CLS] and [SEP] counted"
    )
    tokenizer: Tokenizer = Field(
        default="own", description="own: trained on this text; minilm: BERT's 30522 pieces"
    )
    vocabulary: int = Field(
        default=4096, ge=5, le=100_000, description="pieces of the own tokenizer at most"
    )


@dataclass(frozen=True)
class Fitting:
    """Sentences that fit, as ids; rows: their numbers among all; too_long: how many do not."""

    ids: list[list[int]]
    rows: Ints
    too_long: int


def fitting(
    sentences: Sequence[Sequence[str]], pieces: WordPiece, length: int, source: str
) -> Fitting:
    """Sentences, as words, that have a place in `length` tokens; the others are left out whole.

    DataError if none remains.
    """
    ids, rows = [], []
    for row, words in enumerate(sentences):
        if len(words) <= length - 2 and len(tokens := pieces.cut(words)) <= length - 2:
            ids.append(tokens)
            rows.append(row)
    if not rows:
        raise DataError(
            f"{source}: each of {len(sentences)} sentence(s) has more than length = {length} "
            "tokens, [CLS] and [SEP] counted; give a larger length"
        )
    return Fitting(ids, np.asarray(rows, dtype=np.int64), len(sentences) - len(rows))
