"""Rearranging sentences in the middle of a search for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.descent import Objective
from fedmi.attacks.engine.embedded import WrittenText
from fedmi.attacks.engine.language_prior import LanguagePrior
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.rearranging import rearranged


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn: for every sentence of every row in turn, the best of `ways` rearrangements.

    Best is the least loss / loss before + weight x the language model's loss; staying is one.
    within: tokens may leave their places. allowed: ids that each problem's places may hold. Points
    are [rows, n, room (+ 1), dim], the restarts of a problem one after another.
    """

    objective: Objective
    prior: LanguagePrior
    unknown: WrittenText
    allowed: Sequence[Tensor]
    weight: float
    ways: int
    within: bool = True

    def better(
        self, points: Tensor, losses: Tensor, problems: Sequence[Problem], number: int
    ) -> Tensor:
        """The points, rearranged; losses [rows] are where they are."""
        lengths = torch.cat([problem.labels[..., 1] for problem in problems])
        room = self.unknown.vectors(points).shape[2]
        before = losses.clamp_min(1e-12)
        for sentence in range(points.shape[1]):
            ids = self._ids(points, lengths)
            best = torch.ones_like(losses) + self._unlikely(ids, losses)
            kept = points
            for way in range(self.ways):
                order = self._orders(problems, lengths, room, (number, sentence, way))
                moved, read = _moved(points, ids, order)
                found = self.objective.losses(moved) / before + self._unlikely(read, losses)
                won = (found < best).view(-1, *[1] * (points.dim() - 1))
                kept, best = torch.where(won, moved, kept), torch.minimum(found, best)
            points = kept
        return points

    def _ids(self, points: Tensor, lengths: Tensor) -> Tensor:
        """The tokens that the points read as now, [rows, n, length]."""
        restarts = len(points) // len(self.allowed)
        return torch.stack(
            [
                self.unknown.written(point, counts, self.allowed[row // restarts])[0]
                for row, (point, counts) in enumerate(
                    zip(points, lengths.to(points.device), strict=True)
                )
            ]
        )

    def _orders(
        self, problems: Sequence[Problem], lengths: Tensor, room: int, turn: tuple[int, int, int]
    ) -> Tensor:
        """[rows, n, room]: where each place's token comes from; each target draws by itself."""
        found, rows, (_, sentence, way) = list[list[int]](), iter(lengths.tolist()), turn
        for problem in problems:
            rng = problem.seed.child("turn", *turn).torch()
            for _ in problem.starts:
                found.append(rearranged(next(rows), room, sentence, way, rng, self.within))
        return torch.tensor(found).view(len(found), -1, room)

    def _unlikely(self, ids: Tensor, like: Tensor) -> Tensor:
        """Of all sentences of a row together; [rows]."""
        return self.weight * self.prior.loss(ids.cpu()).sum(1).to(like)


def _moved(points: Tensor, ids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """(points whose tokens come from where `order` says, their ids)."""
    room, order = order.shape[2], order.flatten(1).to(points.device)
    vectors, moved, read = points[:, :, :room].flatten(1, 2), points.clone(), ids.clone()
    taken = vectors.gather(1, order[:, :, None].expand_as(vectors))
    moved[:, :, :room] = taken.view_as(moved[:, :, :room])
    now = ids[:, :, :room]
    read[:, :, :room] = now.flatten(1).gather(1, order).view_as(now)
    return moved, read
