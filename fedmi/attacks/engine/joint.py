"""Several updates of the same records matched at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedmi.attacks.engine.descent import Objective
from fedmi.attacks.engine.matching import Matching, Problem

Combine = Literal["mean", "trimmed"]


@dataclass(frozen=True)
class Joint:
    """The comparisons of several rounds; `Problem.also` holds what was seen in each but the last.

    trimmed: where there are three rounds or more, of each coordinate the largest and the smallest
    slope are left out, and of each point the largest and the smallest loss, so that a round whose
    update is not of these records, or is mostly noise, steers less and chooses less.
    """

    earlier: tuple[Matching, ...]
    combine: Combine

    def objective(self, last: Matching, problems: Sequence[Problem]) -> Objective:
        """Of problems with as many rounds each, with one plan a round."""
        parts = [
            matching.objective([replace(item, evidence=item.also[at]) for item in problems])
            for at, matching in enumerate(self.earlier)
        ]
        return JointObjective((*parts, last.objective(problems)), self.combine)


@dataclass(frozen=True)
class JointObjective:
    """The mean, or the trimmed mean, over rounds of losses, and of each coordinate of slopes."""

    parts: tuple[Objective, ...]
    combine: Combine

    @property
    def restarts(self) -> int:
        return self.parts[0].restarts

    def losses(self, points: Tensor) -> Tensor:
        return self._mean(torch.stack([part.losses(points) for part in self.parts]))

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        losses, slopes = zip(*(part.slope(points) for part in self.parts), strict=True)
        return self._mean(torch.stack(losses)), self._mean(torch.stack(slopes))

    def _mean(self, every: Tensor) -> Tensor:
        """Over rounds, [rounds, ...] -> [...]."""
        if self.combine == "trimmed" and len(every) > 2:
            every = every.sort(0).values[1:-1]
        return every.mean(0)

    def kept(self, problems: Tensor) -> "JointObjective":
        return replace(self, parts=tuple(part.kept(problems) for part in self.parts))
