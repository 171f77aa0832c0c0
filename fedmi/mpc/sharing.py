"""An owner's half and a receiver's half: splitting an array into shares, adding shares up."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmi.mpc.engine import Piece, Settings, Share, library
from fedmi.mpc.errors import MPCError, RangeError

Shares = NDArray[np.uint64]
"""One party's share of an array: [..., scheme.elements] ring elements."""


class Sharing:
    """For `parties` parties, by the engine's own splitting and adding."""

    def __init__(self, settings: Settings, parties: int) -> None:
        self._settings = settings
        self._parties = parties
        self._io = library().IoWrapper(parties, settings.owner_config())

    def split(self, name: str, values: NDArray[np.float32]) -> list[Share]:
        """One share a party; RangeError where a value leaves the range of `check_range`."""
        numbers = np.ascontiguousarray(values, dtype=np.float32)
        check_range(name, numbers, self._settings.fraction_bits)
        shares: list[Share] = self._io.MakeShares(numbers, library().Visibility.VIS_SECRET)
        return shares

    def combine(self, name: str, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """What they are shares of; MPCError where they do not fit together."""
        if len(pieces) != self._parties:
            raise MPCError(f"{name}: {len(pieces)} shares came from {self._parties} parties")
        _agree(name, pieces)
        if pieces[0].storage == self._settings.storage:
            pieces = [
                _whole(name, rank, piece, self._settings) for rank, piece in enumerate(pieces)
            ]
            if self._settings.elements > 1:
                _copies_agree(name, [piece.ring(self._settings.elements) for piece in pieces])
        opened = self._io.Reconstruct([piece.share() for piece in pieces])
        return np.asarray(opened, dtype=np.float32)


def check_range(name: str, values: NDArray[np.float32], fraction_bits: int) -> None:
    """RangeError, naming the variable and its largest value, unless every |x| < 2^(62 - 2 f)."""
    most = 2.0 ** (62 - 2 * fraction_bits)
    if not values.size:
        return
    finite = np.isfinite(values)
    if not finite.all():
        worst = float(values[~finite].flat[0])
        raise RangeError(f"{name}: {worst:g} is not finite, so it has no fixed-point form")
    largest = float(values.flat[np.abs(values).argmax()])
    if abs(largest) >= most:
        raise RangeError(
            f"{name}: {largest:.9g} leaves the fixed-point range: with fraction_bits = "
            f"{fraction_bits} values must stay below {most:.9g}; scale them down or take fewer bits"
        )


def _whole(name: str, rank: int, piece: Piece, settings: Settings) -> Piece:
    try:
        return piece.checked(name, settings)
    except ValueError as error:
        raise MPCError(f"party {rank}: {error}", rank) from error


def _agree(name: str, pieces: Sequence[Piece]) -> None:
    """Of one shape and kind; who differs from most of the others is named."""
    forms = [(piece.shape, piece.storage) for piece in pieces]
    usual = max(forms, key=forms.count)
    for rank, form in enumerate(forms):
        if form != usual:
            raise MPCError(
                f"{name}: party {rank} gave a share of shape {list(form[0])} ({form[1]}), "
                f"others of {list(usual[0])} ({usual[1]})",
                rank,
            )


def _copies_agree(name: str, shares: Sequence[Shares]) -> None:
    """Replicated elements: party i's second is party i + 1's first."""
    for rank, share in enumerate(shares):
        after = (rank + 1) % len(shares)
        if not np.array_equal(share[..., 1], shares[after][..., 0]):
            raise MPCError(
                f"{name}: parties {rank} and {after} hold different copies of the same element; "
                "one of them is wrong"
            )
