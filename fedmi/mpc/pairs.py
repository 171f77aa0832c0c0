"""What two tensors that one party has must not say together: a mask used twice shows there."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

Words = tuple[NDArray[np.uint64], int]
"""words [n] and how many of their bits, from the lowest, are in use"""

PAIRS = 200
"""So many pairs of a kind are tested, in the order of `pairs`; the others are not."""
PAIR_WORDS = 4096
"""So many words of a pair, from the first, are tested."""


def pairs(own: Sequence[Words], messages: Sequence[Words]) -> Iterator[Words]:
    """Difference, sum and exclusive or of pairs of equally many words, [n] each.

    own: what the party holds; messages: what it received, both in order. Where x and y are masked
    by one mask a: (x + a) - (y + a), (x - a) + a, and (x ^ a) ^ (y ^ a) are not uniform; of two
    uniform and independent words all three are, in the bits that both use. Taken are, of each kind
    the first `PAIRS`,

    - each message with each of the party's own elements, message by message;
    - any two, of own elements and messages in order, the nearest neighbours of a size first.
    """
    crossed = ((held, heard) for heard in messages for held in own if _alike(held, heard))
    beside = _near([*own, *messages])
    for left, right in chain(islice(crossed, PAIRS), islice(beside, PAIRS)):
        yield from _combined(left, right)


def _alike(left: Words, right: Words) -> bool:
    return len(left[0]) == len(right[0])


def _near(words: Sequence[Words]) -> Iterator[tuple[Words, Words]]:
    """Pairs of one size: next to each other, then with one of the size between them, ..."""
    groups: dict[int, list[Words]] = {}
    for one in words:
        groups.setdefault(len(one[0]), []).append(one)
    for gap in range(1, max(map(len, groups.values()), default=0)):
        for group in groups.values():
            yield from zip(group, group[gap:], strict=False)


def _combined(left: Words, right: Words) -> Iterator[Words]:
    (a, of_a), (b, of_b) = left, right
    a, b, bits = a[:PAIR_WORDS], b[:PAIR_WORDS], min(of_a, of_b)
    if not bits:
        return
    used = np.uint64(2**bits - 1)
    for both in (a - b, a + b, a ^ b):
        yield both & used, bits
