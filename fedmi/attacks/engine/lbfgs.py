"""L-BFGS on many problems at a time, each with a history and a line search of its own."""

import torch
from torch import Tensor

from fedmi.attacks.engine.line_search import LineSearch


class Pairs:
    """The last pairs (s, y) of every row, in one ring; what a row leaves out stays zero there.

    A pair without positive curvature is left out. The two loops of L-BFGS are solved as two
    triangular systems in R = [s_i . y_j], i no newer than j: the same recursion, read from memory
    in blocks.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        rows = len(like)
        self.moves = like.new_zeros(rows, size, like.shape[1])
        self.turns = torch.zeros_like(self.moves)
        self.products = torch.eye(size).to(like).repeat(rows, 1, 1)
        self.scale = like.new_zeros(rows)
        self.added = 0

    def add(self, taken: Tensor, moves: Tensor, turns: Tensor) -> None:
        """A pair for each of the rows that are `taken` (a mask)."""
        product, square = (moves * turns).sum(1), turns.square().sum(1)
        least = torch.finfo(turns.dtype).eps * moves.norm(dim=1) * square.sqrt()
        good = taken & (product > least) & square.isfinite() & (square > 0)
        slot = self.added % self.moves.shape[1]
        self.moves[:, slot] = torch.where(good[:, None], moves, 0.0)
        self.turns[:, slot] = torch.where(good[:, None], turns, 0.0)
        self.products[:, slot] = 0.0
        self.products[:, :, slot] = _times(self.moves, self.turns[:, slot])
        self.products[:, slot, slot] = torch.where(good, product, 1.0)
        self.scale = torch.where(good, product / square, self.scale)
        self.added += 1

    def forget(self, rows: Tensor) -> None:
        """These rows (a mask) start anew."""
        if rows.any():
            self.moves[rows], self.turns[rows], self.scale[rows] = 0.0, 0.0, 0.0
            self.products[rows] = torch.eye(self.products.shape[1]).to(self.products)

    def keep(self, rows: Tensor) -> None:
        for name in ("moves", "turns", "products", "scale"):
            setattr(self, name, getattr(self, name)[rows])

    def applied(self, slopes: Tensor) -> Tensor:
        """H slope, [T, size]; the slope itself for a row without pairs."""
        size = self.moves.shape[1]
        some = min(size, self.added)
        if not some:
            return slopes.clone()
        order = torch.arange(self.added - some, self.added, device=slopes.device) % size
        upper = self.products[:, order[:, None], order]
        moves, turns = self.moves[:, :some], self.turns[:, :some]
        scale = torch.where(self.scale > 0, self.scale, 1.0)[:, None]
        first = _solved(upper, _times(moves, slopes)[:, order])
        left = scale * (slopes - _combined(turns, _placed(first, order)))
        rest = upper.diagonal(dim1=1, dim2=2) * first - _times(turns, left)[:, order]
        second = _solved(upper.mT, rest, upper=False)
        return left + _combined(moves, _placed(second, order))


class LBFGS:
    """Limited-memory BFGS (Nocedal & Wright, Numerical Optimization, algorithm 7.4), row by row.

    One evaluation a step for every row: while one still looks for its step length, others go on.
    `learning_rate` is the first length tried along a direction; without history that is the slope,
    scaled to a sum of absolute values of 1. A row whose line search fails forgets its history.
    Nothing here depends on the unit of the loss. Points may be projected between the steps.
    """

    def __init__(self, start: Tensor, learning_rate: float, history: int) -> None:
        self.learning_rate, self.shape = learning_rate, start.shape[1:]
        self.at = start.flatten(1).clone()
        self.loss = start.new_full((len(start),), torch.inf)
        self.slope, self.direction = torch.zeros_like(self.at), torch.zeros_like(self.at)
        self.search = LineSearch(start.new_ones(len(start)))
        self.pairs = Pairs(self.at, history)

    def step(self, points: Tensor, losses: Tensor, slopes: Tensor, number: int) -> Tensor:
        """The next points to try, [T, ...]; `losses` and `slopes` are at `points`, the last tried
        as projected."""
        tried, slopes = points.flatten(1), slopes.flatten(1)
        finite = losses.isfinite() & slopes.isfinite().all(1)
        losses = torch.where(finite, losses, torch.inf)
        moved, first = tried - self.at, self.loss.isinf()
        before, after = (self.slope * moved).sum(1), (slopes * moved).sum(1)
        taken, lost = self.search.judge(self.loss, losses, before, after)
        taken = (taken | first) & finite
        self.pairs.forget(lost)
        if number:
            self.pairs.add(taken & ~first, moved, slopes - self.slope)
        self.at = torch.where(taken[:, None], tried, self.at)
        self.slope = torch.where(taken[:, None], slopes, self.slope)
        self.loss = torch.where(taken, losses, self.loss)
        self._turn(taken | lost)
        return (self.at + self.search.length[:, None] * self.direction).view(-1, *self.shape)

    def keep(self, rows: Tensor) -> None:
        for name in ("at", "loss", "slope", "direction"):
            setattr(self, name, getattr(self, name)[rows])
        self.search.keep(rows)
        self.pairs.keep(rows)

    def _turn(self, rows: Tensor) -> None:
        """A new direction, and the first length to try along it, for these rows (a mask)."""
        direction = -self.pairs.applied(self.slope)
        self.direction = torch.where(rows[:, None], direction, self.direction)
        tiny = torch.finfo(self.slope.dtype).tiny
        short = 1 / self.slope.abs().sum(1).clamp_min(tiny)
        length = torch.where(self.pairs.scale > 0, 1.0, short)
        self.search.begin(rows, self.learning_rate * length)


def _times(vectors: Tensor, other: Tensor) -> Tensor:
    """[T, m, size], [T, size] -> products [T, m]."""
    return torch.bmm(vectors, other[:, :, None])[:, :, 0]


def _combined(vectors: Tensor, shares: Tensor) -> Tensor:
    """[T, m, size], [T, m] -> their sum in these shares [T, size]."""
    return torch.bmm(shares[:, None], vectors)[:, 0]


def _solved(matrix: Tensor, right: Tensor, upper: bool = True) -> Tensor:
    """x of matrix x = right, triangular."""
    found: Tensor = torch.linalg.solve_triangular(matrix, right[:, :, None], upper=upper)
    return found[:, :, 0]


def _placed(values: Tensor, order: Tensor) -> Tensor:
    """From the order of age to that of the ring."""
    return torch.zeros_like(values).index_copy_(1, order, values)
