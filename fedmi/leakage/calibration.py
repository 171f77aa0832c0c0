"""Thresholds of a detector by stage of training, each from honest trainings that it is not used on.

Statistics drift while a model learns, so a threshold for one round comes from honest measurements
of the rounds next to it, and so does its rate of false alarms.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

ALLOWED = 0.01
"""Rate of false alarms that a threshold is set for."""
ENOUGH = 100
"""Fewer calibrating measurements than this support no rate of one per cent; a stage is as wide as
it must be to have so many."""


class Honest(NamedTuple):
    """One measurement of an honest model; client -1 where all clients measure alike."""

    seed: int
    round: int
    client: int
    value: float


@dataclass(frozen=True)
class Threshold:
    """Alarm where the statistic is larger; NaN where nothing honest was measured.

    first, last: rounds of the `count` measurements behind it, of which `alarms` lie above.
    """

    value: float
    first: int
    last: int
    count: int
    alarms: int


NONE = Threshold(math.nan, 0, 0, 0, 0)


class Calibration:
    """Honest measurements, split so that none is tested at a threshold that it had a part in.

    Of several seeds, each seed's thresholds come from the others. Of one seed, they come from the
    even clients (which share their models with the odd ones: not independent), or, where all
    clients measure alike, from every other round; the rest is tested.
    """

    def __init__(self, measured: Sequence[Honest]) -> None:
        self._measured = tuple(measured)
        self._known: dict[tuple[int, int], Threshold] = {}

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({one.seed for one in self._measured}))

    @property
    def crossed(self) -> bool:
        """Whether thresholds come from other seeds."""
        return len(self.seeds) > 1

    @property
    def source(self) -> str:
        """What thresholds come from, in words; empty where there is nothing."""
        if not self._measured or self.crossed:
            return "other seeds" if self._measured else ""
        alike = all(one.client < 0 for one in self._measured)
        return "every other round" if alike else "even clients"

    def threshold(self, seed: int, round: int) -> Threshold:
        """For measurements of one round of a training with this seed."""
        key = (seed if self.crossed else 0, round)
        if key not in self._known:
            self._known[key] = threshold_of(stage(self._pool(seed), round))
        return self._known[key]

    def tested(self, first: int, last: int) -> Iterator[tuple[Honest, Threshold]]:
        """Honest measurements of these rounds, each with its own round's threshold."""
        for one in self._measured:
            if first <= one.round <= last and (self.crossed or _held_back(one)):
                yield one, self.threshold(one.seed, one.round)

    def _pool(self, seed: int) -> tuple[Honest, ...]:
        if self.crossed:
            return tuple(one for one in self._measured if one.seed != seed)
        return tuple(one for one in self._measured if not _held_back(one))


def _held_back(one: Honest) -> bool:
    """With one seed: in the half that thresholds are tested on. Where all clients measure alike
    the first round calibrates, as a training's first rounds differ most."""
    return (one.client if one.client >= 0 else one.round + 1) % 2 == 1


def stage(pool: Sequence[Honest], round: int) -> tuple[Honest, ...]:
    """The measurements of the rounds next to this one, as many rounds as give ENOUGH.

    Next by the factor between the rounds, |log(r / round)|: a model changes about as much from
    round 1 to 2 as from 10 to 20. The round itself comes first, and of two as near the earlier.
    """
    by_round: dict[int, list[Honest]] = {}
    for one in pool:
        by_round.setdefault(one.round, []).append(one)
    found: list[Honest] = []
    for at in sorted(by_round, key=lambda r: (abs(math.log(r / round)), r)):
        if len(found) >= ENOUGH:
            break
        found += by_round[at]
    return tuple(found)


def threshold_of(measured: Sequence[Honest]) -> Threshold:
    """The k-th largest of n values, k = floor(ALLOWED (n + 1)) and at least 1.

    A further honest value like these then lies above with probability k / (n + 1), ALLOWED at most
    where n is 99 or more (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005).
    """
    if not measured:
        return NONE
    values = sorted((one.value for one in measured), reverse=True)
    chosen = values[max(1, math.floor(ALLOWED * (len(values) + 1))) - 1]
    rounds = [one.round for one in measured]
    alarms = sum(value > chosen for value in values)
    return Threshold(chosen, min(rounds), max(rounds), len(values), alarms)
