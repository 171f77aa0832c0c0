"""Batched L-BFGS against the two loops written out, and torch's on one problem at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedmi.attacks.engine.descent import Schedule, minimise
from fedmi.attacks.engine.lbfgs import LBFGS, Pairs
from fedmi.attacks.engine.line_search import ARMIJO, CURVATURE

Function = Callable[[Tensor], Tensor]
PLAN = Schedule(300, 1.0, sign="none", decay="none", optimizer="lbfgs", history=10)


def rosenbrock(points: Tensor) -> Tensor:
    after, before = points[:, 1:], points[:, :-1]
    return (100 * (after - before.square()).square() + (1 - before).square()).sum(1)


def quadratic(points: Tensor) -> Tensor:
    """Minimum 0 at (1, ..., 1); condition 1e4."""
    weights = torch.logspace(0, 4, points.shape[1], dtype=points.dtype)
    return (weights * (points - 1).square()).sum(1)


@dataclass(frozen=True)
class Plain:
    """An objective of any function of rows."""

    function: Function
    restarts: int = 1

    def losses(self, points: Tensor) -> Tensor:
        return self.function(points.detach())

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        at = points.detach().requires_grad_()
        losses = self.function(at)
        return losses.detach(), torch.autograd.grad(losses.sum(), [at])[0]

    def kept(self, problems: Tensor) -> "Plain":
        return self


def starts(rows: int, size: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=rng, dtype=torch.float64)


def torch_lbfgs(function: Function, start: Tensor, steps: int, history: int) -> tuple[Tensor, int]:
    """torch.optim.LBFGS with strong Wolfe on one row: (loss, evaluations)."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        max_eval=steps,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = function(point[None])[0]
        loss.backward()  # type: ignore[no-untyped-call]
        seen.append(loss.detach())
        return loss

    optimiser.step(closure)
    return torch.stack(seen).min(), len(seen)


def two_loops(pairs: list[tuple[Tensor, Tensor]], slope: Tensor) -> Tensor:
    """Nocedal & Wright, algorithm 7.4, for one row."""
    left, shares = slope.clone(), []
    for move, turn in reversed(pairs):
        shares.append((move @ left) / (move @ turn))
        left = left - shares[-1] * turn
    move, turn = pairs[-1]
    left = left * (move @ turn) / (turn @ turn)
    for (move, turn), share in zip(pairs, reversed(shares), strict=True):
        left = left + (share - (turn @ left) / (move @ turn)) * move
    return left


@pytest.mark.parametrize("added", [1, 3, 5, 13])
def test_pairs_apply_the_two_loops_also_where_the_ring_is_full(added: int) -> None:
    size, history = 7, 5
    pairs, kept = Pairs(starts(2, size), history), [list[tuple[Tensor, Tensor]]() for _ in range(2)]
    for number in range(added):
        moves = starts(2, size, 2 * number)
        turns = moves * torch.linspace(1, 3, size) + 0.1 * starts(2, size, 2 * number + 1)
        taken = torch.tensor([True, number % 3 != 1])
        pairs.add(taken, moves, turns)
        for row in range(2):
            kept[row].append(
                (moves[row], turns[row]) if taken[row] else (moves[row] * 0, turns[row])
            )
    slopes = starts(2, size, 99)
    found = pairs.applied(slopes)
    for row in range(2):
        real = [pair for pair in kept[row][-history:] if pair[0].any()]
        torch.testing.assert_close(found[row], two_loops(real, slopes[row]))


def test_pairs_of_no_positive_curvature_are_left_out() -> None:
    pairs, moves = Pairs(starts(3, 4), 2), starts(3, 4)
    signs = torch.tensor([1.0, -1.0, 0.0])[:, None]
    pairs.add(torch.ones(3, dtype=torch.bool), moves, signs * 2 * moves)
    slopes = starts(3, 4, 1)
    found = pairs.applied(slopes)
    torch.testing.assert_close(found[1:], slopes[1:])
    torch.testing.assert_close(found[0], slopes[0] / 2)


@pytest.mark.parametrize("function", [quadratic, rosenbrock])
def test_finds_the_minimum_in_about_as_many_evaluations_as_torch(function: Function) -> None:
    start = starts(4, 2, seed=1)
    for row in start:
        wanted, steps = torch_lbfgs(function, row, 60, PLAN.history)
        _, found = minimise(Plain(function), row[None], replace(PLAN, steps=2 * steps))
        assert wanted < 1e-10
        assert found[0] < 1e-10


def test_a_high_dimension_is_as_good_as_torch() -> None:
    start = starts(1, 60, seed=2)
    wanted, steps = torch_lbfgs(quadratic, start[0], 120, 20)
    _, found = minimise(Plain(quadratic), start, replace(PLAN, steps=steps + 20, history=20))
    assert found[0] < 10 * wanted + 1e-9


def test_rows_do_not_depend_on_one_another() -> None:
    start = starts(5, 6, seed=3) * torch.tensor([1.0, 0.1, 2.0, 1.0, 5.0])[:, None]
    plan = replace(PLAN, steps=40)
    points, losses = minimise(Plain(rosenbrock), start, plan)
    for row in range(5):
        point, loss = minimise(Plain(rosenbrock), start[row : row + 1], plan)
        torch.testing.assert_close(point[0], points[row], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(loss[0], losses[row], rtol=1e-6, atol=1e-12)


def test_rows_that_are_kept_go_on_unchanged() -> None:
    rows, plain = torch.tensor([0, 3]), Plain(rosenbrock)
    whole = LBFGS(starts(4, 6), 1.0, 5)
    cut = LBFGS(starts(4, 6), 1.0, 5)
    every, some = starts(4, 6), starts(4, 6)
    for number in range(40):
        if number == 12:
            cut.keep(rows)
            some = some[rows]
        every = whole.step(every, *plain.slope(every), number)
        some = cut.step(some, *plain.slope(some), number)
    torch.testing.assert_close(every[rows], some, rtol=1e-6, atol=1e-9)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    def tiny(points: Tensor) -> Tensor:
        return 2.0**-60 * rosenbrock(points)

    start, plan = starts(3, 4, seed=5), replace(PLAN, steps=50)
    points, _ = minimise(Plain(rosenbrock), start, plan)
    same, _ = minimise(Plain(tiny), start, plan)
    torch.testing.assert_close(points, same, rtol=1e-9, atol=1e-12)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    def broken(points: Tensor) -> Tensor:
        return rosenbrock(points) + torch.where(points[:, 0] > 1e6, torch.nan, 0.0)

    start = starts(3, 4, seed=6)
    wanted, _ = minimise(Plain(broken), start, replace(PLAN, steps=40))
    start[1, 0] = 1e7
    points, losses = minimise(Plain(broken), start, replace(PLAN, steps=40))
    torch.testing.assert_close(points[[0, 2]], wanted[[0, 2]])
    assert losses[1].isinf()


def test_a_step_into_nan_is_shortened() -> None:
    def walled(points: Tensor) -> Tensor:
        """Minimum 2.7 at 1, not defined below 0."""
        return (points - points.log()).sum(1)

    start = torch.full((1, 1), 20.0, dtype=torch.float64)
    point, _ = minimise(Plain(walled), start, replace(PLAN, steps=60))
    torch.testing.assert_close(point, torch.ones_like(point), rtol=1e-5, atol=1e-6)


def test_projected_points_reach_the_minimum_of_the_box() -> None:
    def bowl(points: Tensor) -> Tensor:
        centre = torch.tensor([2.0, -1.0, 0.3], dtype=points.dtype)
        return (torch.tensor([1.0, 10.0, 100.0]) * (points - centre).square()).sum(1)

    found, _ = minimise(
        Plain(bowl),
        starts(3, 3, seed=7),
        replace(PLAN, steps=80),
        lambda points: points.clamp(0, 1),
    )
    wanted = torch.tensor([1.0, 0.0, 0.3], dtype=found.dtype).expand_as(found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_every_step_taken_fulfils_the_weak_wolfe_conditions() -> None:
    plain, points = Plain(rosenbrock), starts(6, 5, seed=8)
    stepper = LBFGS(points, 1.0, 5)
    taken = 0
    for number in range(60):
        at, loss, slope = stepper.at.clone(), stepper.loss.clone(), stepper.slope.clone()
        points = stepper.step(points, *plain.slope(points), number)
        moved = stepper.at - at
        rows = moved.any(1) & loss.isfinite()
        fall = (slope * moved).sum(1)[rows]
        assert (stepper.loss[rows] <= loss[rows] + ARMIJO * fall).all()
        assert ((stepper.slope * moved).sum(1)[rows] >= CURVATURE * fall).all()
        taken += int(rows.sum())
    assert taken > 200
