"""What the dealer and one party know together: everything that is multiplied.

Before a product the parties open x - a and y - b, where a and b are masks of which each party drew
its part. The dealer knows all parts. So a party that shows the dealer what it received has no
secret left to learn: this is why the dealer counts towards the threshold. Of records, it is what
went into a first layer that multiplies whole records by weights: each batch whose messages were
kept.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedmi.mpc.dealer.prg import stream

Ring = NDArray[np.uint64]
WORD_BYTES = 8
WITNESSES = 4
"""So many numbers of a sum are looked at first: by chance all lie in [0, 1] with probability
2^-(4 * (64 - fraction_bits)), 2^-152 at most."""


class Heard(Protocol):
    """A message that the party received (`fedmi.mpc.cluster.Message`)."""

    @property
    def sender(self) -> int: ...
    @property
    def value(self) -> bytes: ...


@dataclass(frozen=True)
class Factors:
    """Both sides of a matrix product, or one party's shares of them: ring elements of Z_2^64.

    left: [m, k]; right: [k, n].
    """

    left: Ring
    right: Ring

    def __add__(self, other: "Factors") -> "Factors":
        return Factors(self.left + other.left, self.right + other.right)


@dataclass(frozen=True)
class Product:
    """One matrix product [m, k] @ [k, n] that the dealer dealt a triple for.

    seeds: of both masks, by rank. counters: their first blocks. transposed: whether they were drawn
    with their sides exchanged.
    """

    m: int
    n: int
    k: int
    seeds: tuple[tuple[bytes, ...], tuple[bytes, ...]]
    counters: tuple[int, int]
    transposed: tuple[bool, bool]

    @classmethod
    def of(cls, entry: Mapping[str, object]) -> Self:
        """From an entry of the dealer's log; ValueError where that is no entry of a product."""
        m, n, k = (int(str(side)) for side in _list(entry, "shape"))
        a, b = (_input(entry, index) for index in (0, 1))
        return cls(
            *(m, n, k),
            seeds=(_seeds(a), _seeds(b)),
            counters=(int(str(a["prg_count"])), int(str(b["prg_count"]))),
            transposed=(bool(a["transposed"]), bool(b["transposed"])),
        )

    @property
    def message_bytes(self) -> int:
        """Of what each party sends to open its shares of x - a and of y - b."""
        return WORD_BYTES * self.k * (self.m + self.n)

    def share_of(self, rank: int, opened: bytes) -> Factors:
        """That party's shares of x and y: of x - a and y - b, which it sent row by row, one after
        the other, with its parts of a and b added."""
        left, right = np.split(np.frombuffer(opened, "<u8"), [self.m * self.k])
        masked = Factors(left.reshape(self.m, self.k), right.reshape(self.k, self.n))
        return masked + Factors(
            self._mask(0, rank, (self.m, self.k)), self._mask(1, rank, (self.k, self.n))
        )

    def of_others(self, opened: Mapping[int, bytes]) -> Factors:
        """The sum of the shares of all who sent this; with the own shares added, x and y."""
        shares = [self.share_of(rank, value) for rank, value in opened.items()]
        return sum(shares[1:], start=shares[0])

    def _mask(self, index: int, rank: int, shape: tuple[int, int]) -> Ring:
        """That party's part of a (0) or b (1)."""
        size = WORD_BYTES * shape[0] * shape[1]
        part = stream(self.seeds[index][rank], self.counters[index], size).view(np.uint64)
        return part.reshape(shape[::-1]).T if self.transposed[index] else part.reshape(shape)


def products(dealt: Sequence[Mapping[str, object]], columns: int) -> tuple[Product, ...]:
    """The matrix products in the dealer's log whose left side has so many columns, in order."""
    dots = (Product.of(entry) for entry in dealt if entry.get("operation") == "AdjustDot")
    return tuple(product for product in dots if product.k == columns)


def openings(product: Product, received: Sequence[Heard]) -> Iterator[dict[int, bytes]]:
    """What may have opened its factors, by sender: messages of the right size, one of each other
    party, in order of arrival."""
    by_sender: defaultdict[int, list[bytes]] = defaultdict(list)
    for message in received:
        if len(message.value) == product.message_bytes:
            by_sender[message.sender].append(message.value)
    if len(by_sender) == len(product.seeds[0]) - 1:
        for values in zip(*by_sender.values(), strict=False):
            yield dict(zip(by_sender, values, strict=True))


def records_multiplied(
    dealt: Sequence[Mapping[str, object]],
    received: Sequence[Heard],
    own: Ring,
    fraction_bits: int,
) -> tuple[Ring, NDArray[np.bool_]]:
    """(ring elements [n, k] of an owner's records, which of them were opened [n]); others are 0.

    dealt: the dealer's log. received: what one party received, in order. own: its shares [n, k].
    Which message belongs to which product, and which of its rows to which record, the numbers tell
    themselves: those of a record lie in [0, 1], sums that do not belong together are uniform.
    """
    found, known = np.zeros_like(own), np.zeros(len(own), dtype=bool)
    dots = products(dealt, own.shape[1])
    for size in sorted({(product.m, product.n) for product in dots}):
        left = [product for product in dots if (product.m, product.n) == size]
        for opened in openings(left[0], received):
            for number, product in enumerate(left):
                others = product.of_others(opened).left
                mine, theirs = _together(own, others, fraction_bits)
                if len(mine):
                    found[mine], known[mine] = own[mine] + others[theirs], True
                    del left[: number + 1]
                    break
    return found, known


def _together(
    own: Ring, others: Ring, fraction_bits: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which rows of both add up to numbers in [0, 1]: two lists of rows, pair by pair."""
    most = np.uint64(1 << fraction_bits)
    near = own[:, None, :WITNESSES] + others[None, :, :WITNESSES] <= most
    mine, theirs = np.nonzero(near.all(axis=2))
    whole = (own[mine] + others[theirs] <= most).all(axis=1)
    return mine[whole], theirs[whole]


def _seeds(drawn: Mapping[str, object]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(str(seed)) for seed in _list(drawn, "seeds"))


def _input(entry: Mapping[str, object], index: int) -> Mapping[str, object]:
    content = _list(entry, "inputs")[index]
    if not isinstance(content, Mapping):
        raise ValueError(f"inputs[{index}] of the dealer's log is no object: {content!r}")
    return content


def _list(content: Mapping[str, object], name: str) -> list[object]:
    value = content.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} of the dealer's log is no list: {value!r}")
    return value
