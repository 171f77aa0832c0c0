"""Step lengths that fulfil Wolfe's conditions, found for many rows at a time."""

import torch
from torch import Tensor

ARMIJO = 1e-4
"""Share of the decrease promised by the slope that a step must bring."""
CURVATURE = 0.9
"""Share of the slope along the step that may be left at its end."""
TRIES = 25
"""Lengths tried along one direction."""
MARGIN = 0.1
"""How near an end of the bracket a length may be tried, in widths of the bracket."""


class LineSearch:
    """Bracketing for the weak Wolfe conditions (Lewis & Overton, Nonsmooth optimization via
    quasi-Newton methods, Math. Programming 2013, algorithm 2.6), row by row.

    A length too long (no sufficient decrease, or not finite) is the bracket's upper end, one too
    short (the slope still falls as steeply) its lower; the length doubles until there is an upper
    end. Inside, the next length is the minimum of the parabola through the start and the upper
    end, kept off both ends, or the middle.
    """

    def __init__(self, length: Tensor) -> None:
        self.length = length
        self.low, self.high = torch.zeros_like(length), torch.full_like(length, torch.inf)
        self.tries = torch.zeros(len(length), dtype=torch.long, device=length.device)

    def begin(self, rows: Tensor, length: Tensor) -> None:
        """These rows (a mask) have a new direction, and first try this length along it."""
        self.length = torch.where(rows, length, self.length)
        self.low = torch.where(rows, 0.0, self.low)
        self.high = torch.where(rows, torch.inf, self.high)
        self.tries = torch.where(rows, 0, self.tries)

    def judge(
        self, start: Tensor, losses: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(length is taken, search has failed), masks; other rows have another length to try.

        start, losses: at the start of the direction, and where the length has led.
        before, after: the slope there times the way between.
        """
        self.tries += 1
        falls = losses <= start + ARMIJO * before.clamp_max(0.0)
        flat = after >= CURVATURE * before
        late = self.tries >= TRIES
        taken = falls & (flat | late)
        failed = ~falls & late & (self.low == 0)
        going = ~taken & ~failed
        self.high = torch.where(going & ~falls, self.length, self.high)
        self.low = torch.where(going & falls, self.length, self.low)
        length = self._inside(losses - start, before)
        length = torch.where(self.high.isinf(), 2 * self.length, length)
        length = torch.where(late & ~falls, self.low, length)
        self.length = torch.where(going, length, self.length)
        return taken, failed

    def keep(self, rows: Tensor) -> None:
        for name in ("length", "low", "high", "tries"):
            setattr(self, name, getattr(self, name)[rows])

    def _inside(self, rise: Tensor, before: Tensor) -> Tensor:
        """A length inside the bracket; `rise` and `before` belong to the present length."""
        width = self.high - self.low
        parabola = self.length * -before / (2 * (rise - before))
        usable = (self.length == self.high) & (self.low == 0) & (rise > before) & rise.isfinite()
        guess = torch.where(usable, parabola, self.low + width / 2)
        return guess.maximum(self.low + MARGIN * width).minimum(self.high - MARGIN * width)
