"""What careful clients would have noticed: rates of detection at few false alarms, with intervals.

For each deployment with altered rounds and each detector. The threshold comes from half of the
honest measurements that can be had in the run, the rate of false alarms from the other half.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import pandas as pd

from fedmi.deployments.base import Noticed
from fedmi.leakage.resampling import wilson

ALLOWED = 0.01
"""Share of the calibrating measurements that may lie above the threshold."""
ENOUGH = 100
"""Fewer calibrating measurements than this support no rate of one per cent."""
SAME = 1e-3
"""Relative difference up to which two values of one round and client are one measurement."""
OFTEN = 0.5
"""A detector that detects in more than this share of the cases has noticed the alteration."""

Honest = tuple[int, int, int, float]
"""(seed, round, client, value); client -1 where all clients measure alike."""


@dataclass(frozen=True)
class Watched:
    """One training and what its clients measured.

    malice: kind of what a malicious server does there; empty where it is honest. comparable:
    detector -> what else must be the same for a measurement to serve another training as honest
    (data, model, local work, options). alike: detectors that read the model alone, so that all
    clients that are sent the same measure the same.
    """

    scenario: str
    deployment: str
    training: str
    malice: str
    seed: int
    comparable: Mapping[str, str]
    alike: frozenset[str]
    noticed: tuple[Noticed, ...]


@dataclass(frozen=True)
class Detection:
    """One detector on one deployment, over all seeds.

    threshold: alarm where the statistic is larger; NaN where nothing honest was measured.
    calibrated_on, calibration_alarms: measurements behind it, and how many of these lie above.
    honest, false_alarms: of the other half, which had no part in the threshold. altered, detected:
    (client, altered round, seed). independent: of these, how many the interval counts: one a round
    and seed where the statistic is of the model alone. weak: too few to calibrate one per cent;
    the threshold is then the largest honest value, with no false alarm among `calibrated_on`.
    """

    scenario: str
    deployment: str
    training: str
    malice: str
    detector: str
    threshold: float
    calibrated_on: int
    calibration_alarms: int
    honest: int
    false_alarms: int
    false_alarm_rate: float
    false_alarm_ci_low: float
    false_alarm_ci_high: float
    altered: int
    independent: int
    detected: int
    rate: float
    ci_low: float
    ci_high: float
    weak: bool

    @property
    def at(self) -> str:
        """The operating point, in words."""
        if not self.calibrated_on:
            return "without any honest measurement"
        if self.weak:
            return f"at no false alarm in {self.calibrated_on}"
        return f"at {ALLOWED:.0%} false alarms".replace("%", " %")


COLUMNS = tuple(field.name for field in fields(Detection))


def detection_frame(watched: Sequence[Watched]) -> pd.DataFrame:
    """A row per deployment with altered rounds and detector; the columns of `Detection`."""
    rows = [asdict(one) for one in detections(watched)]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def detections_of(frame: pd.DataFrame) -> list[Detection]:
    """The typed rows of the frame."""
    return [Detection(**{str(k): v for k, v in row.items()}) for row in frame.to_dict("records")]


def detections(watched: Sequence[Watched]) -> Iterator[Detection]:
    """In the order of the deployments, then of the detectors' names."""
    groups: dict[tuple[str, str], list[Watched]] = {}
    for one in watched:
        for detector in sorted({seen.detector for seen in one.noticed if seen.what == "altered"}):
            groups.setdefault((one.deployment, detector), []).append(one)
    for (_, detector), group in groups.items():
        yield _detection(detector, group, watched)


def _detection(detector: str, group: Sequence[Watched], watched: Sequence[Watched]) -> Detection:
    first = group[0]
    calibrating, others = halves(honest(detector, first, watched))
    threshold = threshold_of(calibrating)
    alarms = sum(value > threshold for value in others)
    cases = [
        (one.seed, seen.round, seen.client, seen.value)
        for one in group
        for seen in one.noticed
        if seen.detector == detector and seen.what == "altered"
    ]
    detected = sum(case[3] > threshold for case in cases)
    alike = detector in first.alike
    independent = len({case[: 2 if alike else 3] for case in cases})
    rate = detected / len(cases) if calibrating else math.nan
    false_rate = alarms / len(others) if others else math.nan
    low, high = wilson(rate, independent)
    false_low, false_high = wilson(false_rate, len(others))
    return Detection(
        scenario=first.scenario,
        deployment=first.deployment,
        training=first.training,
        malice=first.malice,
        detector=detector,
        threshold=threshold,
        calibrated_on=len(calibrating),
        calibration_alarms=sum(value > threshold for value in calibrating),
        honest=len(others),
        false_alarms=alarms,
        false_alarm_rate=false_rate,
        false_alarm_ci_low=false_low,
        false_alarm_ci_high=false_high,
        altered=len(cases),
        independent=independent,
        detected=detected,
        rate=rate,
        ci_low=low,
        ci_high=high,
        weak=len(calibrating) < ENOUGH,
    )


def honest(detector: str, here: Watched, watched: Sequence[Watched]) -> list[Honest]:
    """Distinct honest measurements that are comparable with those of `here`.

    From honest deployments, and from the rounds before a malicious server's first alteration.
    Deployments that went alike up to then, with the same seed, measured once, not twice: they
    differ by the rounding of their means.
    """
    found: dict[tuple[int, int, int], list[float]] = {}
    for one in watched:
        same = one.training == here.training and detector in one.comparable
        if not same or one.comparable[detector] != here.comparable[detector]:
            continue
        for seen in one.noticed:
            if seen.detector == detector and seen.what == "honest":
                client = -1 if detector in one.alike else seen.client
                others = found.setdefault((one.seed, seen.round, client), [])
                if not any(math.isclose(seen.value, value, rel_tol=SAME) for value in others):
                    others.append(seen.value)
    return [(*place, value) for place, values in found.items() for value in values]


def halves(measured: Sequence[Honest]) -> tuple[list[float], list[float]]:
    """(values to calibrate on, values to test on): even and odd clients; where all clients measure
    alike, every other round, from another one on for every other seed."""
    seeds = {seed: place for place, seed in enumerate(sorted({one[0] for one in measured}))}
    sides: tuple[list[float], list[float]] = ([], [])
    for seed, round, client, value in measured:
        side = client if client >= 0 else round + 1 + seeds[seed]
        sides[side % 2].append(value)
    return sides


def threshold_of(values: Sequence[float]) -> float:
    """The smallest measured value above which at most ALLOWED of the values lie; NaN of none."""
    if not values:
        return math.nan
    return sorted(values, reverse=True)[math.floor(ALLOWED * len(values))]


def detection_flags(found: Sequence[Detection]) -> tuple[str, ...]:
    """What the attacks' rows say of the detectors of their deployment."""
    lines = sorted(found, key=lambda one: (-one.rate, one.detector))
    able = [one for one in lines if one.calibrated_on]
    good = [one for one in able if one.rate > OFTEN]
    flags = []
    if good:
        flags.append("noticed: " + ", ".join(map(_worded, good)))
    elif able:
        flags.append(f"unnoticed: {_worded(able[0])} at best")
    weak = [f"{one.detector} {one.calibrated_on}" for one in lines if one.weak]
    if weak:
        flags.append("few_honest_measurements: " + ", ".join(sorted(weak)))
    return tuple(flags)


def _worded(one: Detection) -> str:
    return f"{one.detector} {100 * one.rate:.0f} % {one.at}"
