"""The distances of updates, and their slopes where they are written by hand."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fedmi.attacks.engine.distances import Distance, aim, cosine, distance_of

SHAPES = {"weight": (3, 4), "bias": (3,)}


def drawn(seed: int, *many: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*many, *shape, generator=rng, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def plain(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """1 - cos, as it is defined."""
    one, other = (torch.cat([part.flatten() for part in p.values()]) for p in (found, wanted))
    return 1 - torch.cosine_similarity(one, other, dim=0)


def slopes(value: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), [*found.values()]))


def test_the_cosine_and_its_slope_are_those_of_the_definition() -> None:
    found, wanted = drawn(1), drawn(2)
    for part in found.values():
        part.requires_grad_()
    ours, theirs = cosine(found, aim("cosine", wanted, {})), plain(found, wanted)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(slopes(ours, found), slopes(theirs, found))


@pytest.mark.parametrize("nested", [False, True])
def test_many_at_a_time_are_as_one_by_one(nested: bool) -> None:
    found, wanted = drawn(3, 5, 2) if nested else drawn(3, 5), drawn(4, 5)
    for part in found.values():
        part.requires_grad_()
    aimed = vmap(partial(aim, "cosine"))(wanted, {})
    inner = vmap(cosine, in_dims=(0, None)) if nested else cosine
    ours = vmap(inner)(found, aimed)
    theirs = torch.stack(
        [
            plain({n: p[at] for n, p in found.items()}, {n: p[at[0]] for n, p in wanted.items()})
            for at in (
                [(i, j) for i in range(5) for j in range(2)] if nested else [(i,) for i in range(5)]
            )
        ]
    )
    torch.testing.assert_close(ours.flatten(), theirs)
    torch.testing.assert_close(slopes(ours, found), slopes(theirs, found))


def test_a_cosine_near_zero_keeps_its_digits_in_float32() -> None:
    wanted = {name: part.float() for name, part in drawn(5).items()}
    close = {name: part * (1 + 1e-4 * torch.rand_like(part)) for name, part in wanted.items()}
    exact = plain(*({n: p.double() for n, p in parts.items()} for parts in (close, wanted)))
    assert float(exact) < 1e-8  # below what 1 - cos resolves in float32
    ours = cosine(close, aim("cosine", wanted, {}))
    assert float(ours) == pytest.approx(float(exact), rel=0.01)


def test_a_cosine_of_a_million_entries_is_as_right_as_a_short_one() -> None:
    rng = torch.Generator().manual_seed(0)
    wanted = torch.randn(10**6, generator=rng)
    found = (wanted + 0.01 * torch.randn(10**6, generator=rng)).requires_grad_()
    ours = cosine({"w": found}, aim("cosine", {"w": wanted}, {}))
    (slope,) = torch.autograd.grad(ours, [found])
    double = found.detach().double().requires_grad_()
    exact = plain({"w": double}, {"w": wanted.double()})
    (right,) = torch.autograd.grad(exact, [double])
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    assert float((slope - right).norm() / right.norm()) < 1e-4


@pytest.mark.parametrize("kind", ["cosine", "l2", "l1"])
def test_entries_that_were_not_seen_do_not_count(kind: Distance) -> None:
    found, wanted = drawn(6), drawn(7)
    seen = {name: part > 0 for name, part in drawn(8).items()}
    support = {name: part.double() for name, part in seen.items()}
    ours = distance_of(kind, found, aim(kind, wanted, support), support)
    left = [{name: part[seen[name]] for name, part in parts.items()} for parts in (found, wanted)]
    torch.testing.assert_close(ours, distance_of(kind, left[0], aim(kind, left[1], {}), {}))
    whole = distance_of(kind, found, aim(kind, wanted, {}), {})
    assert not torch.isclose(ours, whole)


@pytest.mark.parametrize("unit", [1.0, 1e-12])
def test_a_gradient_of_zero_has_a_distance_and_a_slope(unit: float) -> None:
    found = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    wanted = {name: part.float() for name, part in drawn(9).items()}
    value = cosine(found, aim("cosine", wanted, {}))
    assert float(value.detach()) == pytest.approx(0.5)
    assert all(bool(slope.isfinite().all()) for slope in slopes(value / unit, found))
