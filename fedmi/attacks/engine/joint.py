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

    trimmed: of each coordinate the largest and the smallest slope are left out where there are
    three rounds or more, so that a round whose update is not of these records, or is mostly noise,
    steers less.
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
    """The mean loss over rounds, and the mean or the trimmed mean of its slopes."""

    parts: tuple[Objective, ...]
    combine: Combine

    @property
    def restarts(self) -> int:
        return self.parts[0].restarts

    def losses(self, points: Tensor) -> Tensor:
        return torch.stack([part.losses(points) for part in self.parts]).mean(0)

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        losses, slopes = zip(*(part.slope(points) for part in self.parts), strict=True)
        every = torch.stack(slopes)
        if self.combine == "trimmed" and len(every) > 2:
            every = every.sort(0).values[1:-1]
        return torch.stack(losses).mean(0), every.mean(0)

    def kept(self, problems: Tensor) -> "JointObjective":
        return replace(self, parts=tuple(part.kept(problems) for part in self.parts))
