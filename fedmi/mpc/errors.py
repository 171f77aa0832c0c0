"""What can go wrong among compute parties."""


class MPCError(RuntimeError):
    """The computation stopped; nothing was opened. `party`: whose fault it is, None if unknown."""

    def __init__(self, reason: str, party: int | None = None) -> None:
        super().__init__(reason)
        self.party = party


class RangeError(MPCError):
    """A value left the range of the fixed-point representation, so results would be wrong."""


class UnsupportedError(ValueError):
    """A layer, loss or option that cannot be computed under MPC; says what to use instead."""
