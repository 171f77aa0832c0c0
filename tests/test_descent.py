"""The search itself: the best point on the way is the answer, and what is compiled is so once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmi.attacks.engine.descent import Schedule, minimise
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.matching import Matching, MatchingObjective, Problem
from fedmi.attacks.engine.network import load
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.classifiers import MLP
from tests.gradient_cases import SHAPE, gradient_case, sets


class Recorded:
    """|point - goal|^2 of each row; keeps every point that was asked for, and its loss."""

    restarts = 1

    def __init__(self, goals: Tensor) -> None:
        self.goals = goals
        self.seen: list[Tensor] = []
        self.lost: list[Tensor] = []

    def losses(self, points: Tensor) -> Tensor:
        self.seen.append(points.clone())
        self.lost.append((points - self.goals).square().sum(1))
        return self.lost[-1]

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(points), 2 * (points - self.goals)

    def kept(self, problems: Tensor) -> "Recorded":
        raise AssertionError("no problem stops early here")


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_best_iterate_is_the_answer_where_the_search_goes_astray(steps: int) -> None:
    bowls = Recorded(torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.7, 0.2]]))
    start = torch.tensor([[0.45, 0.5], [0.9, 0.1], [0.7, 0.2]])
    found, lowest = minimise(bowls, start, Schedule(steps, 0.3, decay="none"))
    every, points = torch.stack(bowls.lost), torch.stack(bowls.seen)
    assert len(every) == steps + 1
    assert (every[-1] > every.min(0).values).any()
    assert lowest.equal(every.min(0).values)
    assert found.equal(points[every.argmin(0), torch.arange(3)])


def matching_of(records: int, restarts: int, **options: Any) -> tuple[Matching, list[Problem]]:
    clients = sets([records] * 2, seed=0)
    case = gradient_case(MLP(hidden=(16,)), clients)
    seen = read(case, Channel.GRADIENT)
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen[0].base, "train")
    starts = torch.rand(restarts, records, *SHAPE, generator=torch.Generator().manual_seed(1))
    problems = [
        Problem(item, batch[1].repeat(restarts, 1), starts, Seed.root(0))
        for item, batch in zip(seen, clients, strict=True)
    ]
    return Matching(network, None, **options), problems


@pytest.mark.parametrize("restarts", [1, 2])
def test_an_objective_is_compiled_once(restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Tensor]] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", counted)
    matching, problems = matching_of(1, restarts, compiled=True)
    objective = matching.objective(problems)
    points = objective.points_of(problems)
    minimise(objective, points, Schedule(5, 0.01))
    assert len(compiled) == 1
    plain, same = matching_of(1, restarts)
    assert torch.allclose(plain.objective(same).losses(points), objective.losses(points))


def test_what_cannot_be_compiled_is_told_and_not_searched_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    matching, problems = matching_of(1, 1, compiled=True)
    with pytest.raises(AttackError, match=r"compile = true.*\(no compiler\)$"):
        matching.objective(problems)


def test_only_what_vmap_refuses_is_searched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matching, problems = matching_of(1, 2)

    def failing(error: Exception) -> Callable[[MatchingObjective, Tensor], Tensor]:
        def losses(self: MatchingObjective, points: Tensor) -> Tensor:
            raise error

        return losses

    monkeypatch.setattr(MatchingObjective, "_batched", failing(RuntimeError("vmap: no")))
    assert matching.objective(problems).matching.network.plain
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(MatchingObjective, "_batched", failing(full))
    with pytest.raises(torch.OutOfMemoryError):
        matching.objective(problems)
