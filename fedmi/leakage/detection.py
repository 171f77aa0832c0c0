"""What careful clients would have noticed: rates of detection at few false alarms, with intervals.

For each deployment with altered rounds and each detector. An altered model is held against honest
ones of about the same round, of other seeds where there are several: see `calibration`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import pandas as pd

from fedmi.deployments.base import Noticed
from fedmi.exposure.seeding import Seed
from fedmi.leakage.calibration import ALLOWED, ENOUGH, Calibration, Honest, Threshold
from fedmi.leakage.clusters import clustered_share

SAME = 1e-3
"""Relative difference up to which two values of one round and client are one measurement."""
OFTEN = 0.5
"""A detector that detects in more than this share of the cases has noticed the alteration."""


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
    """One detector on one deployment, over all seeds and altered rounds.

    lowest_threshold, threshold: the smallest and the largest that an altered model was held
    against, one a stage and seed; NaN where nothing honest was measured. calibration: what they
    come from. calibrated_rounds: altered round: the honest rounds behind its thresholds.
    calibrated_on: measurements behind the threshold that has fewest, calibration_alarms: how many
    of them lie above. honest, false_alarms: of these rounds, each at its own round's threshold,
    in which it had no part. altered, detected: (client, altered round, seed). honest_clusters,
    altered_clusters: (round, seed), whose clients share a model; intervals count these. weak: too
    few to calibrate one per cent; the threshold is then the largest honest value, with no false
    alarm among `calibrated_on`.
    """

    scenario: str
    deployment: str
    training: str
    malice: str
    detector: str
    lowest_threshold: float
    threshold: float
    calibration: str
    calibrated_rounds: str
    calibrated_on: int
    calibration_alarms: int
    honest: int
    honest_clusters: int
    false_alarms: int
    false_alarm_rate: float
    false_alarm_ci_low: float
    false_alarm_ci_high: float
    altered: int
    altered_clusters: int
    detected: int
    rate: float
    ci_low: float
    ci_high: float
    weak: bool

    @property
    def at(self) -> str:
        """The operating point, in words: what it was set for, and what came of it if not that."""
        if not self.calibrated_on:
            return "without any honest measurement"
        if self.weak:
            said = f"at no false alarm in {self.calibrated_on}"
        else:
            said = f"at {ALLOWED:.0%} false alarms".replace("%", " %")
        more = f" (in fact {100 * self.false_alarm_rate:.0f} %)" if self.broken else ""
        return said + more

    @property
    def tells(self) -> bool:
        """Whether it alarms at most of the altered models; where it alarms at honest ones more
        often than was aimed at, clearly more often than at these."""
        apart = self.ci_low > self.false_alarm_ci_high
        return self.rate > OFTEN and (apart or not self.broken)

    @property
    def broken(self) -> bool:
        """Whether honest measurements cross the thresholds clearly more often than was aimed at,
        as where each seed's training goes a way of its own."""
        return self.false_alarm_ci_low > ALLOWED


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


@dataclass(frozen=True)
class Case:
    """One measurement beside the threshold of its round."""

    seed: int
    round: int
    value: float
    threshold: Threshold

    @property
    def alarm(self) -> bool:
        return self.value > self.threshold.value

    @property
    def cluster(self) -> tuple[int, int]:
        return self.seed, self.round


def _detection(detector: str, group: Sequence[Watched], watched: Sequence[Watched]) -> Detection:
    first = group[0]
    calibration = Calibration(honest(detector, first, watched))
    cases = [
        Case(one.seed, seen.round, seen.value, calibration.threshold(one.seed, seen.round))
        for one in group
        for seen in one.noticed
        if seen.detector == detector and seen.what == "altered"
    ]
    thresholds = [case.threshold for case in cases]
    fewest = min(thresholds, key=lambda one: one.count)
    rng = Seed.root(0).child("detection", first.scenario, first.deployment, detector)
    found = share(cases, rng.child("altered"))
    false = share(_tested(calibration, cases), rng.child("honest"))
    return Detection(
        scenario=first.scenario,
        deployment=first.deployment,
        training=first.training,
        malice=first.malice,
        detector=detector,
        lowest_threshold=min(one.value for one in thresholds),
        threshold=max(one.value for one in thresholds),
        calibration=calibration.source,
        calibrated_rounds=_rounds(cases) if fewest.count else "",
        calibrated_on=fewest.count,
        calibration_alarms=fewest.alarms,
        honest=false.cases,
        honest_clusters=false.clusters,
        false_alarms=false.alarms,
        false_alarm_rate=false.rate,
        false_alarm_ci_low=false.low,
        false_alarm_ci_high=false.high,
        altered=found.cases,
        altered_clusters=found.clusters,
        detected=found.alarms,
        rate=found.rate,
        ci_low=found.low,
        ci_high=found.high,
        weak=fewest.count < ENOUGH,
    )


@dataclass(frozen=True)
class Share:
    """How many of the cases alarm; NaN where there is none, or no threshold to alarm at."""

    cases: int
    clusters: int
    alarms: int
    rate: float
    low: float
    high: float


def share(cases: Sequence[Case], seed: Seed) -> Share:
    """With its 95 % interval, which counts rounds of a seed."""
    alarms, clusters = [case.alarm for case in cases], [case.cluster for case in cases]
    rate, low, high = math.nan, math.nan, math.nan
    if cases and not any(math.isnan(case.threshold.value) for case in cases):
        rate = sum(alarms) / len(cases)
        low, high = clustered_share(alarms, clusters, seed.numpy())
    return Share(len(cases), len(set(clusters)), sum(alarms), rate, low, high)


def _tested(calibration: Calibration, cases: Sequence[Case]) -> list[Case]:
    """Honest measurements of the rounds that the cases' thresholds come from, each once."""
    found: dict[Honest, Case] = {}
    for first, last in sorted({(c.threshold.first, c.threshold.last) for c in cases}):
        for one, threshold in calibration.tested(first, last):
            found[one] = Case(one.seed, one.round, one.value, threshold)
    return list(found.values())


def _rounds(cases: Sequence[Case]) -> str:
    """`1: 1-5, 10: 8-12`, over all seeds."""
    spans: dict[int, tuple[int, int]] = {}
    for case in cases:
        low, high = spans.get(case.round, (case.threshold.first, case.threshold.last))
        spans[case.round] = (min(low, case.threshold.first), max(high, case.threshold.last))
    return ", ".join(f"{at}: {low}-{high}" for at, (low, high) in sorted(spans.items()))


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
    return [Honest(*place, value) for place, values in found.items() for value in values]


def detection_flags(found: Sequence[Detection]) -> tuple[str, ...]:
    """What the attacks' rows say of the detectors of their deployment."""
    lines = sorted(found, key=lambda one: (-one.rate, one.detector))
    able = [one for one in lines if one.calibrated_on]
    good = [one for one in able if one.tells]
    flags = []
    if good:
        flags.append("noticed: " + ", ".join(map(_worded, good)))
    elif able:
        flags.append(f"unnoticed: {_worded(able[0])} at best")
    weak = [f"{one.detector} {one.calibrated_on}" for one in lines if one.weak]
    if weak:
        flags.append("few_honest_measurements: " + ", ".join(sorted(weak)))
    broken = [f"{one.detector} {100 * one.false_alarm_rate:.0f} %" for one in lines if one.broken]
    if broken:
        flags.append("false_alarms_above_aim: " + ", ".join(sorted(broken)))
    return tuple(flags)


def _worded(one: Detection) -> str:
    return f"{one.detector} {100 * one.rate:.0f} % {one.at}"
