"""CMA-ES on many problems at a time, each with a distribution of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

SMALLEST = 1e-20
"""Of a variance."""


@dataclass(frozen=True)
class Rates:
    """The constants of the strategy, for `size` coordinates and so many candidates.

    Diagonal: sep-CMA-ES (Ros & Hansen, 2008), whose rates are (size + 2) / 3 times higher.
    """

    weights: Tensor
    mass: float
    path: float
    shape_path: float
    damping: float
    rank_one: float
    rank_many: float
    expected: float
    """Of the norm of N(0, I)."""

    @classmethod
    def of(cls, size: int, population: int, diagonal: bool) -> "Rates":
        parents = population // 2
        raw = log((population + 1) / 2) - torch.arange(1, parents + 1).double().log()
        weights = raw / raw.sum()
        mass = float(1 / weights.square().sum())
        path = (mass + 2) / (size + mass + 5)
        faster = (size + 2) / 3 if diagonal else 1.0
        one = min(1.0, faster * 2 / ((size + 1.3) ** 2 + mass))
        many = faster * 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass)
        return cls(
            weights=weights,
            mass=mass,
            path=path,
            shape_path=(4 + mass / size) / (size + 4 + 2 * mass / size),
            damping=1 + 2 * max(0.0, ((mass - 1) / (size + 1)) ** 0.5 - 1) + path,
            rank_one=one,
            rank_many=min(1 - one, many),
            expected=size**0.5 * (1 - 1 / (4 * size) + 1 / (21 * size**2)),
        )


class Evolution:
    """Covariance matrix adaptation (Hansen, The CMA Evolution Strategy: A Tutorial, 2016).

    Row by row: means [T, size], step sizes [T], covariances [T, size, size] or, if diagonal,
    [T, size]. Candidates of a row are drawn by its own generator. All in float64.
    """

    def __init__(
        self,
        means: Tensor,
        sigma: float,
        population: int,
        generators: Sequence[torch.Generator],
        diagonal: bool = False,
    ) -> None:
        count, size = means.shape
        self.means, self.sigma = means.double(), means.new_full((count,), sigma).double()
        self.population, self.generators, self.diagonal = population, generators, diagonal
        self.rates = Rates.of(size, population, diagonal)
        self.path, self.shape_path = torch.zeros_like(self.means), torch.zeros_like(self.means)
        one = torch.ones(size) if diagonal else torch.eye(size)
        self.covariance = one.double().expand(count, *one.shape).clone()
        self.root, self.inverse = self.covariance, self.covariance
        self.steps, self.number = torch.empty(0), 0
        learned = self.rates.rank_one + self.rates.rank_many
        self.every = 1 if diagonal else max(1, int(1 / (10 * size * learned)))

    def ask(self) -> Tensor:
        """Candidates [T, population, size]."""
        size = self.means.shape[1]
        drawn = torch.stack(
            [torch.randn(self.population, size, generator=rng).double() for rng in self.generators]
        )
        self.steps = drawn * self.root[:, None] if self.diagonal else drawn @ self.root
        return self.means[:, None] + self.sigma[:, None, None] * self.steps

    def tell(self, losses: Tensor) -> None:
        """What the candidates last asked for are worth, [T, population]; nan is the worst."""
        rates = self.rates
        order = torch.nan_to_num(losses.double(), nan=torch.inf).argsort(dim=1, stable=True)
        best = order[:, : len(rates.weights), None].expand(-1, -1, self.means.shape[1])
        chosen = self.steps.gather(1, best)
        move = (rates.weights[:, None] * chosen).sum(1)
        self.means = self.means + self.sigma[:, None] * move
        self.number += 1
        rising = self._paths(move)
        self._adapt(chosen, rising)
        length = self.path.norm(dim=1) / rates.expected - 1
        self.sigma = self.sigma * (rates.path / rates.damping * length).clamp_max(1.0).exp()
        if self.number % self.every == 0:
            self._take_roots()

    def _paths(self, move: Tensor) -> Tensor:
        """Moves both evolution paths; [T], 1 where the step size is not rising too fast."""
        rates, size = self.rates, move.shape[1]
        kept = (rates.path * (2 - rates.path) * rates.mass) ** 0.5
        self.path = (1 - rates.path) * self.path + kept * self._white(move)
        started = 1 - (1 - rates.path) ** (2 * self.number)
        norm = self.path.norm(dim=1) / started**0.5 / rates.expected
        calm: Tensor = (norm < 1.4 + 2 / (size + 1)).double()[:, None]
        kept = (rates.shape_path * (2 - rates.shape_path) * rates.mass) ** 0.5
        self.shape_path = (1 - rates.shape_path) * self.shape_path + calm * kept * move
        return calm[:, 0]

    def _take_roots(self) -> None:
        """C^(1/2) and its inverse.

        The symmetric root: axes of equal length are any, and a rounding would choose others.
        """
        if self.diagonal:
            self.root = self.covariance.clamp_min(SMALLEST).sqrt()
            self.inverse = 1 / self.root
            return
        squares, axes = torch.linalg.eigh((self.covariance + self.covariance.mT) / 2)
        scales = squares.clamp_min(SMALLEST).sqrt()[:, None]
        self.root, self.inverse = (axes * scales) @ axes.mT, (axes / scales) @ axes.mT

    def _white(self, move: Tensor) -> Tensor:
        """C^(-1/2) move."""
        if self.diagonal:
            return self.inverse * move
        white: Tensor = (self.inverse * move[:, None]).sum(-1)
        return white

    def _adapt(self, chosen: Tensor, calm: Tensor) -> None:
        """The rank-one and rank-mu updates of the covariance; chosen [T, parents, size]."""
        rates, path = self.rates, self.shape_path
        weighted = rates.weights[:, None] * chosen
        if self.diagonal:
            one, many, lost = path.square(), (weighted * chosen).sum(1), calm[:, None]
        else:
            one = path[:, :, None] * path[:, None]
            many, lost = weighted.mT @ chosen, calm[:, None, None]
        missing = (1 - lost) * rates.shape_path * (2 - rates.shape_path)
        kept = 1 - rates.rank_one - rates.rank_many + rates.rank_one * missing
        self.covariance = kept * self.covariance + rates.rank_one * one + rates.rank_many * many


def evolve(
    value: Callable[[Tensor], Tensor],
    evolution: Evolution,
    generations: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, Tensor]:
    """(best point of each row [T, size], its loss [T]), of all candidates and means seen.

    value: candidates [T, population, size] -> losses [T, population].
    """
    points = evolution.means.clone()
    losses = points.new_full((len(points),), torch.inf)
    for number in range(generations):
        candidates = evolution.ask()
        last = number == generations - 1
        if last:
            candidates = candidates.index_copy(1, torch.tensor([0]), evolution.means[:, None])
        found = torch.nan_to_num(value(candidates).double().cpu(), nan=torch.inf)
        least, which = found.min(1)
        better = least < losses
        points[better] = candidates[better, which[better]]
        losses = torch.where(better, least, losses)
        if not last:
            evolution.tell(found)
        progress((number + 1) / generations)
    return points, losses
