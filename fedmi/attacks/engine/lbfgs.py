"""L-BFGS on many problems at a time, each with a history and a step length of its own."""

import torch
from torch import Tensor

ARMIJO = 1e-4
"""Share of the decrease promised by the slope that a step must bring."""
SHRINK = 0.5
HALVINGS = 20
"""Step lengths tried before the history is thrown away."""


class LBFGS:
    """Limited-memory BFGS (Nocedal & Wright, Numerical Optimization, algorithm 7.4), row by row.

    One evaluation a step: a row whose candidate does not fulfil Armijo's condition tries half the
    step next time, while others go on. A pair (s, y) without positive curvature is left out; after
    `HALVINGS` failures a row starts again along its slope.
    """

    def __init__(self, start: Tensor, learning_rate: float, history: int) -> None:
        rows, size = len(start), start[0].numel()
        self.learning_rate = learning_rate
        self.shape = start.shape[1:]
        self.at = start.reshape(rows, size).clone()
        self.loss = start.new_full((rows,), torch.inf)
        self.slope = torch.zeros_like(self.at)
        self.direction = torch.zeros_like(self.at)
        self.length = start.new_ones(rows)
        self.halvings = torch.zeros(rows, dtype=torch.long, device=start.device)
        self.moves = start.new_zeros(history, rows, size)
        self.turns = start.new_zeros(history, rows, size)
        self.curvature = start.new_zeros(history, rows)
        self.scale = start.new_zeros(rows)

    def step(self, points: Tensor, losses: Tensor, slopes: Tensor, number: int) -> Tensor:
        """The next points to try, [T, ...]."""
        tried, slopes = points.reshape(self.at.shape), slopes.reshape(self.at.shape)
        finite = losses.isfinite() & slopes.isfinite().all(1)
        promised = ARMIJO * self.length * (self.slope * self.direction).sum(1)
        taken = finite & ((losses <= self.loss + promised) | self.loss.isinf())
        self._remember(taken & ~self.loss.isinf(), tried, slopes, number)
        self.at = torch.where(taken[:, None], tried, self.at)
        self.slope = torch.where(taken[:, None], slopes, self.slope)
        self.loss = torch.where(taken, losses, self.loss)
        self.halvings = torch.where(taken, 0, self.halvings + 1)
        lost = self.halvings > HALVINGS
        self.curvature[:, lost] = 0.0
        self.scale[lost] = 0.0
        renewed = taken | lost
        direction = self._directed(number)
        self.direction = torch.where(renewed[:, None], direction, self.direction)
        fresh = torch.where(self.scale > 0, self.learning_rate, self._first_length())
        self.length = torch.where(renewed, fresh, self.length * SHRINK)
        self.halvings = torch.where(lost, 0, self.halvings)
        return (self.at + self.length[:, None] * self.direction).view(-1, *self.shape)

    def keep(self, rows: Tensor) -> None:
        for name in ("at", "loss", "slope", "direction", "length", "halvings", "scale"):
            setattr(self, name, getattr(self, name)[rows])
        for name in ("moves", "turns", "curvature"):
            setattr(self, name, getattr(self, name)[:, rows])

    def _remember(self, taken: Tensor, tried: Tensor, slopes: Tensor, number: int) -> None:
        slot = number % len(self.moves)
        move, turn = tried - self.at, slopes - self.slope
        product = (move * turn).sum(1)
        good = taken & (product > 1e-10 * turn.square().sum(1)) & (product > 0)
        self.moves[slot], self.turns[slot] = move, turn
        self.curvature[slot] = torch.where(good, 1 / product.where(good, 1.0), 0.0)
        scale = product / turn.square().sum(1).clamp_min(torch.finfo(turn.dtype).tiny)
        self.scale = torch.where(good, scale, self.scale)

    def _directed(self, number: int) -> Tensor:
        """-H slope by the two loops; a pair of curvature 0 changes nothing."""
        size = len(self.moves)
        order = [(number - back) % size for back in range(min(size, number + 1))]
        left, shares = self.slope.clone(), list[Tensor]()
        for slot in order:
            share = self.curvature[slot] * (self.moves[slot] * left).sum(1)
            shares.append(share)
            left = left - share[:, None] * self.turns[slot]
        left = left * torch.where(self.scale > 0, self.scale, 1.0)[:, None]
        for slot, share in zip(reversed(order), reversed(shares), strict=True):
            back = self.curvature[slot] * (self.turns[slot] * left).sum(1)
            left = left + (share - back)[:, None] * self.moves[slot]
        return -left

    def _first_length(self) -> Tensor:
        return self.learning_rate * (1 / self.slope.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0)
