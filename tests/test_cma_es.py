"""CMA-ES: it finds minima, row by row, and does as the tutorial's equations say."""

from math import inf

import pytest
import torch
from torch import Tensor

from fedmi.attacks.engine.cma_es import Evolution, evolve


def draws(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(count)]


def rosenbrock(points: Tensor) -> Tensor:
    first, second = points[..., :-1], points[..., 1:]
    return (100 * (second - first**2) ** 2 + (1 - first) ** 2).sum(-1)


def ellipsoid(points: Tensor) -> Tensor:
    scales = 10 ** torch.linspace(0, 3, points.shape[-1]).double()
    return (scales * (points - 1).square()).sum(-1)


def test_a_full_covariance_solves_a_bent_valley_of_every_row() -> None:
    evolution = Evolution(torch.zeros(2, 4), 0.5, 12, draws(2))
    points, losses = evolve(rosenbrock, evolution, 400)
    assert (losses < 1e-6).all()
    assert torch.allclose(points, torch.ones(2, 4).double(), atol=1e-2)


@pytest.mark.parametrize("diagonal", [True, False])
def test_it_learns_the_scales_of_coordinates(diagonal: bool) -> None:
    evolution = Evolution(torch.zeros(1, 10), 0.5, 12, draws(1), diagonal)
    _, losses = evolve(ellipsoid, evolution, 300)
    assert losses.item() < 1e-4


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_row_does_not_depend_on_the_others(diagonal: bool) -> None:
    starts = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    together, _ = evolve(ellipsoid, Evolution(starts, 0.5, 10, draws(3), diagonal), 40)
    own = Evolution(starts[1:2], 0.5, 10, draws(3)[1:2], diagonal)
    assert torch.allclose(evolve(ellipsoid, own, 40)[0], together[1:2], atol=1e-9)


def test_the_mean_moves_by_the_weighted_best_half() -> None:
    evolution = Evolution(torch.zeros(1, 3), 0.5, 8, draws(1))
    candidates = evolution.ask()
    losses = candidates[..., 0]
    evolution.tell(losses)
    order = losses[0].argsort()[:4]
    weights = torch.log(torch.tensor(4.5)) - torch.arange(1.0, 5).log()
    mean = (weights / weights.sum()).double() @ candidates[0, order]
    assert torch.allclose(evolution.means[0], mean, atol=1e-6)
    assert evolution.means[0, 0] < 0


def test_losses_that_are_not_finite_are_the_worst() -> None:
    def value(points: Tensor) -> Tensor:
        return torch.where(points[..., 0] > 0.2, torch.nan, points.square().sum(-1))

    points, losses = evolve(value, Evolution(torch.zeros(1, 4), 0.5, 10, draws(1)), 60)
    assert losses.item() < 1e-3
    nothing, worst = evolve(
        lambda p: torch.full(p.shape[:2], torch.nan),
        Evolution(torch.zeros(1, 4), 0.5, 10, draws(1)),
        3,
    )
    assert worst.item() == inf
    assert nothing.isfinite().all()
    assert points.isfinite().all()
