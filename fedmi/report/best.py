"""Which row stands for a cell: an attack's headline metric, and the strongest attack of a cell."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmi.exposure.words import colluders_in
from fedmi.leakage.row import LeakageRow


@dataclass(frozen=True)
class Spot:
    """A place to attack from: one position on one channel."""

    position: str
    channel: str


def spot(row: LeakageRow) -> Spot:
    return Spot(row.position, row.channel)


PIXELS = frozenset({"mse", "psnr", "ssim"})
"""Metrics of closeness pixel by pixel. A class has no one true picture, only a mean."""


def headlines(rows: Iterable[LeakageRow], metrics: Sequence[str]) -> list[LeakageRow]:
    """Of each deployment x position x channel x round x attack, the row of its first metric.

    For a class of the model (no round) pixel metrics come after all others.
    """
    found: dict[tuple[object, ...], LeakageRow] = {}
    for row in rows:
        key = (row.scenario, row.deployment, row.position, row.channel, row.round, row.attack)
        best = found.get(key)
        if best is None or _place(row, metrics) < _place(best, metrics):
            found[key] = row
    return list(found.values())


def _place(row: LeakageRow, metrics: Sequence[str]) -> tuple[bool, int]:
    return row.round is None and row.metric in PIXELS, metrics.index(row.metric)


def strongest(rows: Iterable[LeakageRow]) -> LeakageRow | None:
    """The row of the largest advantage; one without figures only if there is no other."""
    return max(rows, key=_advantage, default=None)


def cells(rows: Iterable[LeakageRow], *, apart: bool = False) -> list[LeakageRow]:
    """The strongest row of each deployment x position x channel x metric, in order.

    apart: of those who attack alone and of coalitions, the strongest each.
    """
    found: dict[tuple[object, ...], list[LeakageRow]] = {}
    for row in rows:
        together = apart and colluders_in(row.attack) > 0
        key = (row.scenario, row.deployment, spot(row), row.metric, together)
        found.setdefault(key, []).append(row)
    return [best for group in found.values() if (best := strongest(group))]


def _advantage(row: LeakageRow) -> float:
    return -math.inf if math.isnan(row.advantage) else row.advantage
