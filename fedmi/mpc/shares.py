"""Between numbers and ring elements, and from parties' shares back to what they are shares of."""

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmi.mpc.errors import RangeError
from fedmi.mpc.scheme import RING_BITS, Scheme

Ring = NDArray[np.uint64]
"""Elements of Z_2^64; sums and differences wrap."""
Held = NDArray[np.uint64] | NDArray[np.int64]


def encode(values: ArrayLike, fraction_bits: int) -> Ring:
    """round(x * 2^fraction_bits) mod 2^64, of the values' shape.

    Raises RangeError for values that are not finite, or of 2^(63 - fraction_bits) and more.
    """
    given = np.asarray(values, dtype=np.float64)
    most = 2.0 ** (RING_BITS - 1 - fraction_bits)
    if given.size and not bool((np.abs(given) < most).all()):
        worst = given.flat[int(np.abs(given).argmax())]
        raise RangeError(
            f"{worst:g} has no fixed-point form with {fraction_bits} bits after the binary point "
            f"in a ring of {RING_BITS} bits: values must be finite and below {most:g}"
        )
    return np.rint(given * 2.0**fraction_bits).astype(np.int64).view(np.uint64)


def decode(ring: Held, fraction_bits: int) -> NDArray[np.float64]:
    """The numbers behind ring elements, in (-2^(63 - fraction_bits), 2^(63 - fraction_bits))."""
    return as_ring(ring).view(np.int64) / 2.0**fraction_bits


def as_ring(held: Held) -> Ring:
    """The same 64 bits as unsigned numbers; TypeError for anything that has no 64 bits."""
    if held.dtype.kind not in "iu" or held.dtype.itemsize * 8 != RING_BITS:
        raise TypeError(f"ring elements are int64 or uint64, not {held.dtype}")
    return np.ascontiguousarray(held).view(np.uint64)


def combine(parts: Mapping[int, Held], scheme: Scheme) -> Ring | None:
    """The shared ring elements [...], or None if these parties do not suffice.

    parts: by rank, what the party holds [..., scheme.elements]. aby3: x0 + x1 + x2, where party i
    holds (x_i, x_{i+1 mod 3}), from any two parties; else the sum over all parties.
    Raises ValueError for ranks or shapes that the scheme does not have, and where two parties
    hold different numbers as the same element.
    """
    held = {rank: as_ring(part) for rank, part in parts.items()}
    _check(held, scheme)
    pieces = _pieces(held, scheme)
    wanted = 3 if scheme.protocol == "aby3" else scheme.size
    return total(list(pieces.values())) if len(pieces) == wanted else None


def total(elements: Sequence[Ring]) -> Ring:
    """Their sum mod 2^64; at least one."""
    return reduce(np.add, elements)


def _check(held: Mapping[int, Ring], scheme: Scheme) -> None:
    shapes = {part.shape for part in held.values()}
    if strange := sorted(set(held) - set(range(scheme.size))):
        raise ValueError(f"party {strange[0]} is none of {scheme.title}: 0 .. {scheme.size - 1}")
    if len(shapes) > 1:
        raise ValueError(f"parties hold parts of different shapes: {sorted(shapes)}")
    for shape in shapes:
        if not shape or shape[-1] != scheme.elements:
            raise ValueError(
                f"a share of shape {shape}: of {scheme.title} the last axis is "
                f"{scheme.elements} long, the elements that a party holds of one number"
            )


def _pieces(held: Mapping[int, Ring], scheme: Scheme) -> dict[int, Ring]:
    """The summands that these parties know, by index."""
    pieces: dict[int, Ring] = {}
    for rank, part in sorted(held.items()):
        for place in range(scheme.elements):
            index = (rank + place) % scheme.size
            mine = part[..., place]
            if not np.array_equal(pieces.setdefault(index, mine), mine):
                raise ValueError(
                    f"party {rank} holds another element {index} of {scheme.title} than a party "
                    "before it: one of them was sent, or tells, garbage"
                )
    return pieces
