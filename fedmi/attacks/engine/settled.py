"""Whether a search for sentences has bettered the sentences that it began with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmi.attacks.engine.descent import Objective
from fedmi.attacks.engine.embedded import WrittenText
from fedmi.attacks.engine.matching import Problem

CLEARLY = 0.1
"""Share of the loss of the sentences it began with to which those of a search must fall.

Far from a solution the loss says little of how many tokens are right: of four sentences of a
trained model, a search has halved it while the tokens right fell from six in ten to one in ten.
True sentences have a loss of 1e-4 of the start's and less."""


def settled(
    objective: Objective,
    unknown: WrittenText,
    problems: Sequence[Problem],
    allowed: Callable[[Problem], Tensor],
    points: Tensor,
) -> tuple[Tensor, Tensor]:
    """(points, losses [rows]): where each search ended or, unless that is clearly better, began.

    Both are judged as they would be answered, by the loss with the vectors of the closest tokens,
    which is the one returned. points: [rows, ...], the restarts of a problem one after another.
    """
    starts = torch.cat([problem.starts for problem in problems]).to(points)
    before, after = (
        objective.losses(_spelt(unknown, problems, allowed, some)) for some in (starts, points)
    )
    kept = ~(after < CLEARLY * before)
    rows = kept.view(-1, *[1] * (points.dim() - 1))
    return torch.where(rows, starts, points), torch.where(kept, before, after)


def _spelt(
    unknown: WrittenText,
    problems: Sequence[Problem],
    allowed: Callable[[Problem], Tensor],
    points: Tensor,
) -> Tensor:
    found, rows = list[Tensor](), iter(points)
    for problem in problems:
        words = allowed(problem)
        for labels in problem.labels.to(points.device):
            point = next(rows)
            ids, _ = unknown.written(point, labels[:, 1], words)
            found.append(unknown.spelt(point, ids))
    return torch.stack(found)
