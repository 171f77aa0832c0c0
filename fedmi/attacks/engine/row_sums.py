"""Which rows of one table add up to which rows of another."""

from dataclasses import dataclass

import torch
from torch import Tensor

TIED = 0.5
"""Correlation of two rows over all relations, from which they are in one of them."""
LOOSE = 3.0
"""Residuals may be so many times what rounding is expected to leave."""


@dataclass(frozen=True)
class Balance:
    """Rows of two tables with the same sum; exact: to rounding."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    exact: bool


def balances(left: Tensor, right: Tensor, rounding: float) -> list[Balance]:
    """The smallest groups of rows of left [m, d] and right [l, d] with the same sum.

    Where every row is a sum of linearly independent vectors, each in one row of either table, the
    relations among all rows are spanned by one a group, with 1 for its rows on the left and -1 on
    the right; the projection on them is then +-1 / size within a group and 0 between groups. Rows
    that are in no relation, or in one that does not hold to `rounding` (of a row, absolute), make
    up one last group.
    """
    rows = torch.cat([left, -right])
    basis, sizes, _ = torch.linalg.svd(rows, full_matrices=True)
    least = LOOSE * rounding * len(rows) ** 0.5
    free = torch.ones(len(rows), dtype=torch.bool)
    free[: len(sizes)] = sizes <= least
    shares = basis[:, free]
    ties = shares @ shares.T
    own = ties.diagonal().clamp_min(1e-12).sqrt()
    tied = (ties / own / own[:, None]).abs() > TIED
    found, rest = list[Balance](), set(range(len(rows)))
    for group in _connected(tied & (ties.diagonal() > 1e-3)[:, None]):
        gap = float(rows[group].sum(0).norm())
        if len(group) > 1 and gap <= LOOSE * rounding * len(group) ** 0.5:
            found.append(_split(group, len(left), True))
            rest -= {*group}
    return [*found, *([_split(sorted(rest), len(left), False)] if rest else [])]


def _split(group: list[int], border: int, exact: bool) -> Balance:
    return Balance(
        tuple(row for row in group if row < border),
        tuple(row - border for row in group if row >= border),
        exact,
    )


def _connected(tied: Tensor) -> list[list[int]]:
    """Groups of rows that are tied, directly or through others."""
    found, left = list[list[int]](), set(range(len(tied)))
    while left:
        group, new = set[int](), {min(left)}
        while new:
            group |= new
            near = tied[sorted(new)].any(0) | tied[:, sorted(new)].any(1)
            new = {*torch.nonzero(near).flatten().tolist()} - group
        found.append(sorted(group))
        left -= group
    return found
