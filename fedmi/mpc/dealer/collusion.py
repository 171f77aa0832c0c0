"""What the dealer and one party know together: everything that is multiplied.

Before a product the parties open x - a and y - b, where a and b are masks of which each party drew
its part. The dealer knows all parts. So a party that shows the dealer what it received has no
secret left to learn: this is why the dealer counts towards the threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmi.mpc.dealer.prg import stream

Ring = NDArray[np.uint64]
WORD_BYTES = 8


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


def first_factors(
    dealt: Sequence[Mapping[str, object]], received: Sequence[Heard], own: Factors
) -> Factors:
    """Both sides of the first matrix product, unmasked.

    dealt: the dealer's log. received: what one party received, in order. own: its shares. Each
    other party's message holds its shares of x - a and of y - b, row by row, one after the other;
    with its parts of a and b added they are its shares of x and y, and all shares add up.
    ValueError where no matrix product was dealt, or the messages do not belong to it.
    """
    product = next((entry for entry in dealt if entry.get("operation") == "AdjustDot"), None)
    if product is None:
        raise ValueError("the dealer dealt no matrix product")
    shapes = _shapes(product)
    if (own.left.shape, own.right.shape) != shapes:
        raise ValueError(
            f"own shares {own.left.shape} @ {own.right.shape}; the first product is of {shapes}"
        )
    total = own
    for rank, masked in _opened(product, received, own).items():
        masks = Factors(*(_mask(product, side, rank, shapes[side]) for side in (0, 1)))
        total += masked + masks
    return total


def _opened(
    product: Mapping[str, object], received: Sequence[Heard], like: Factors
) -> dict[int, Factors]:
    """By sender, its shares of x - a and y - b: the first message of that size from each."""
    size = WORD_BYTES * (like.left.size + like.right.size)
    found: dict[int, Factors] = {}
    for message in received:
        if len(message.value) == size and message.sender not in found:
            left, right = np.split(np.frombuffer(message.value, np.uint64), [like.left.size])
            found[message.sender] = Factors(
                left.reshape(like.left.shape), right.reshape(like.right.shape)
            )
    others = len(_list(_input(product, 0), "seeds")) - 1
    if len(found) != others:
        raise ValueError(
            f"a message of {size} bytes is needed from each of {others} parties; "
            f"only {sorted(found)} sent one"
        )
    return found


def _shapes(product: Mapping[str, object]) -> tuple[tuple[int, int], tuple[int, int]]:
    m, n, k = _list(product, "shape")
    return (int(str(m)), int(str(k))), (int(str(k)), int(str(n)))


def _mask(product: Mapping[str, object], index: int, rank: int, shape: tuple[int, int]) -> Ring:
    """That party's part of a (0) or b (1)."""
    drawn = _input(product, index)
    seed = bytes.fromhex(str(_list(drawn, "seeds")[rank]))
    size = WORD_BYTES * shape[0] * shape[1]
    part = stream(seed, int(str(drawn["prg_count"])), size).view(np.uint64)
    return part.reshape(shape[::-1]).T if drawn["transposed"] else part.reshape(shape)


def _input(product: Mapping[str, object], index: int) -> Mapping[str, object]:
    content = _list(product, "inputs")[index]
    if not isinstance(content, Mapping):
        raise ValueError(f"inputs[{index}] of the dealer's log is no object: {content!r}")
    return content


def _list(content: Mapping[str, object], name: str) -> list[object]:
    value = content.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} of the dealer's log is no list: {value!r}")
    return value
