"""Many independent problems minimised as one tensor: the best iterate of each is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from fedmi.attacks.engine.lbfgs import LBFGS

CHECK_EVERY = 25
"""Steps after which problems that have stopped are taken out of the batch."""
IMPROVED = 1e-3
"""Share by which a loss must fall to count as an improvement."""


@dataclass(frozen=True)
class Schedule:
    """How the search goes down.

    steps: evaluations of the loss and its slope. sign: Adam follows the slope, its sign, or
    tanh(s slope) / s with s = 1 - share of the steps done. decay: the learning rate falls tenfold
    at 3/8, 5/8 and 7/8 of the steps, or along half a cosine. warmup: steps over which it rises.
    noise: Langevin's, standard deviation in learning rates. patience: steps without improvement
    after which a problem stops (0 = never); stop_below: loss at which it is solved. history: pairs
    that L-BFGS remembers.
    """

    steps: int
    learning_rate: float
    sign: Literal["none", "hard", "soft"] = "hard"
    decay: Literal["none", "step", "cosine"] = "step"
    warmup: int = 0
    noise: float = 0.0
    optimizer: Literal["adam", "lbfgs"] = "adam"
    history: int = 20
    patience: int = 0
    stop_below: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "cosine":
            return rate * (1 + cos(pi * step / self.steps)) / 2
        drops = sum(step >= self.steps * eighth // 8 for eighth in (3, 5, 7))
        return rate * 0.1**drops if self.decay == "step" else rate


class Objective(Protocol):
    """T losses, each a function of its own row of the points [T, ...]; `restarts` rows in turn
    belong to one problem, and stop together."""

    @property
    def restarts(self) -> int: ...

    def losses(self, points: Tensor) -> Tensor:
        """[T]; no slope is taken."""
        ...

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(losses [T], their slopes [T, ...]), detached."""
        ...

    def kept(self, problems: Tensor) -> "Objective":
        """Of these problems only (indices, in order)."""
        ...


class Adam:
    """Adam (Kingma & Ba, 2015) row by row; betas 0.9 and 0.999."""

    def __init__(self, schedule: Schedule, start: Tensor) -> None:
        self.schedule = schedule
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, points: Tensor, losses: Tensor, slopes: Tensor, number: int) -> Tensor:
        """The next points."""
        slopes = self._signed(torch.nan_to_num(slopes, nan=0.0, posinf=0.0, neginf=0.0), number)
        self.first.lerp_(slopes, 0.1)
        self.second.mul_(0.999).addcmul_(slopes, slopes, value=0.001)
        mean = self.first / (1 - 0.9 ** (number + 1))
        spread = (self.second / (1 - 0.999 ** (number + 1))).sqrt_().add_(1e-8)
        return points - self.schedule.rate(number) * mean / spread

    def _signed(self, slopes: Tensor, number: int) -> Tensor:
        if self.schedule.sign == "hard":
            return slopes.sign()
        if self.schedule.sign == "soft":
            scale = 1 - number / self.schedule.steps
            return torch.tanh(scale * slopes) / scale
        return slopes

    def keep(self, rows: Tensor) -> None:
        self.first, self.second = self.first[rows], self.second[rows]


@dataclass
class _Best:
    """The best iterate of every row so far, and when it was last clearly improved on."""

    points: Tensor
    losses: Tensor
    reference: Tensor
    since: Tensor

    @classmethod
    def of(cls, start: Tensor) -> Self:
        none = start.new_full((len(start),), torch.inf)
        return cls(start.clone(), none, none.clone(), none.new_zeros(len(start)).long())

    def update(self, rows: Tensor, points: Tensor, losses: Tensor) -> None:
        better = losses < self.losses[rows]
        won = rows[better]
        self.points[won], self.losses[won] = points[better], losses[better]
        clearly = losses < self.reference[rows] * (1 - IMPROVED)
        self.reference[rows[clearly]] = losses[clearly]
        self.since[rows] = torch.where(clearly, 0, self.since[rows] + 1)


def minimise(
    objective: Objective,
    start: Tensor,
    schedule: Schedule,
    project: Callable[[Tensor], Tensor] = lambda points: points,
    noise: Sequence[torch.Generator] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, Tensor]:
    """(best iterate [T, ...], its loss [T]) for each of the T rows of `start` [T, ...].

    Iterates are projected after each step. noise: a generator a row, where the schedule has noise.
    A row whose loss is not finite keeps its best iterate so far (loss inf if none) and does not
    touch the others. Problems stop by their own losses, and are then no longer computed.
    """
    points, best = project(start.clone()), _Best.of(start)
    rows, live = torch.arange(len(start), device=start.device), list(noise)
    stepper = _stepper(schedule, points)
    for number in range(schedule.steps):
        losses, slopes = objective.slope(points)
        best.update(rows, points, losses)
        points = stepper.step(points, losses, slopes, number)
        if schedule.noise:
            points = points + schedule.noise * schedule.rate(number) * _draw(points, live)
        points = project(points)
        progress((number + 1) / schedule.steps)
        if (number + 1) % CHECK_EVERY == 0 and (going := _going(best, rows, objective, schedule)):
            if not len(going.problems):
                return best.points, best.losses
            if len(going.rows) < len(rows):
                objective = objective.kept(going.problems)
                points, rows = points[going.rows], rows[going.rows]
                live = [live[int(row)] for row in going.rows] if live else []
                stepper.keep(going.rows)
    best.update(rows, points, objective.losses(points))
    return best.points, best.losses


@dataclass(frozen=True)
class _Going:
    """The problems that go on, and their rows, as they are numbered in the batch."""

    problems: Tensor
    rows: Tensor


def _going(best: _Best, rows: Tensor, objective: Objective, schedule: Schedule) -> _Going | None:
    """None where problems are not asked to stop."""
    if not schedule.patience and not schedule.stop_below:
        return None
    done = best.losses[rows] <= schedule.stop_below
    if schedule.patience:
        done = done | (best.since[rows] >= schedule.patience)
    solved = best.losses[rows] <= schedule.stop_below
    every = (-1, objective.restarts)
    stopped = done.view(every).all(1) | solved.view(every).any(1)
    problems = torch.nonzero(~stopped).flatten()
    own = torch.arange(objective.restarts, device=rows.device)
    return _Going(problems, (problems[:, None] * objective.restarts + own).flatten())


def _stepper(schedule: Schedule, start: Tensor) -> Adam | LBFGS:
    if schedule.optimizer == "lbfgs":
        return LBFGS(start, schedule.learning_rate, schedule.history)
    return Adam(schedule, start)


def _draw(points: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    drawn = [torch.randn(points.shape[1:], generator=rng) for rng in generators]
    return torch.stack(drawn).to(points)
