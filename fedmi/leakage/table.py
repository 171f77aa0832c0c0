"""The tidy frames: a row per target (scores), per row of evidence (leakage), per trial (costs)."""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import takewhile

import pandas as pd

from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position, alone, colluders_in
from fedmi.leakage.families import labels_of
from fedmi.leakage.flags import add, compare_boxes, control_flags, figure_flags, trial_flags
from fedmi.leakage.intervals import NOTHING, Interval, mean_interval, paired_interval
from fedmi.leakage.row import COLUMNS, LeakageRow, join
from fedmi.leakage.settings import (
    UNKNOWN,
    ByDeployment,
    control_differs,
    differing,
    same_party,
)
from fedmi.leakage.trial import MetricInfo, Score, Trial

SCORE_COLUMNS = (
    "scenario", "deployment", "seed", "position", "channel", "round", "attack", "target",
    "metric", "value", "prior_only",
)  # fmt: skip
COST_COLUMNS = (
    "scenario", "deployment", "training", "seed", "position", "channel", "attack", "utility",
    "wire_bytes", "train_seconds", "attack_seconds", "queries", "refused",
    "accounts", "alarmed", "wait_seconds", "readouts", "peak_memory_bytes",
)  # fmt: skip

Group = tuple[Trial, ...]
"""Trials of one attack on one deployment, one a seed, in order of seed."""


def scores_frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row per target, metric and seed, in the order of the trials; SCORE_COLUMNS."""
    rows = [
        {**asdict(score), **{name: getattr(trial, name) for name in SCORE_COLUMNS[:5]}}
        | {"round": score.round, "attack": trial.attack}
        for trial in trials
        for score in trial.scores
    ]
    return _frame(rows, SCORE_COLUMNS)


def costs_frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row per trial: what training and attack took; COST_COLUMNS."""
    rows = [{name: getattr(trial, name) for name in COST_COLUMNS} for trial in trials]
    return _frame(rows, COST_COLUMNS)


def leakage_frame(trials: Sequence[Trial], metrics: Sequence[MetricInfo]) -> pd.DataFrame:
    """The leakage table, with exactly the columns of `LeakageRow`."""
    return _frame([asdict(row) for row in leakage_rows(trials, metrics)], COLUMNS)


def leakage_rows(trials: Sequence[Trial], metrics: Sequence[MetricInfo]) -> list[LeakageRow]:
    """One row per deployment x position x channel x round x attack x metric.

    Rows keep the order in which the trials name deployments and attacks; metrics come in the
    order of `metrics`. A trial that failed makes its rows failed rows without figures; metrics and
    rounds of an attack that has no scores here are those it was scored by elsewhere in the run.
    ValueError if a metric is not among `metrics`, or a trial comes twice.
    """
    known = {metric.kind: metric for metric in metrics}
    groups = list(_groups(trials))
    _check(trials, groups, known)
    measured = {_attack(group[0]): set[tuple[int | None, str]]() for group in groups}
    for group in groups:
        measured[_attack(group[0])] |= _measured(group)
    rows = [
        _row(group, round, known[kind])
        for group in groups
        for round, kind in _in_order(measured[_attack(group[0])], known)
        if _concerns(group, round, kind)
    ]
    settings = {(trial.scenario, trial.deployment): trial.settings for trial in trials}
    return compare_boxes(_with_controls(rows, settings))


def _groups(trials: Sequence[Trial]) -> Iterator[Group]:
    found: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        found.setdefault(_identity(trial), []).append(trial)
    for group in found.values():
        yield tuple(sorted(group, key=lambda trial: trial.seed))


def _identity(trial: Trial) -> tuple[object, ...]:
    where = (trial.scenario, trial.deployment, trial.training, trial.serving, trial.protections)
    return (*where, trial.knowledge, *_attack(trial))


def _attack(trial: Trial) -> tuple[str, ...]:
    return (trial.position, trial.channel, trial.attack)


def _measured(group: Group) -> set[tuple[int | None, str]]:
    return {(score.round, score.metric) for trial in group for score in trial.scores}


def _concerns(group: Group, round: int | None, kind: str) -> bool:
    """Whether the group has such a row; one that failed has all its attack has elsewhere."""
    return any(trial.failure is not None for trial in group) or (round, kind) in _measured(group)


def _in_order(
    measured: set[tuple[int | None, str]], known: dict[str, MetricInfo]
) -> list[tuple[int | None, str]]:
    """By round, then as `known` lists the metrics; every metric if nothing was ever measured."""
    kinds = list(known)
    pairs = measured or {(None, kind) for kind in kinds}
    return sorted(pairs, key=lambda pair: (pair[0] or 0, kinds.index(pair[1])))


def _row(group: Group, round: int | None, metric: MetricInfo) -> LeakageRow:
    """One row; its positive control and the flags that need other rows come later."""
    first = group[0]
    failed = any(trial.failure is not None for trial in group)
    value, advantage, prior = (NOTHING, NOTHING, math.nan)
    if not failed:
        value, advantage, prior = _figures(group, round, metric)
    row = LeakageRow(
        scenario=first.scenario,
        deployment=first.deployment,
        training=first.training,
        serving=first.serving,
        protections=join(first.protections),
        position=str(first.position),
        channel=str(first.channel),
        round=round,
        attack=first.attack,
        metric=metric.kind,
        value=value.mean,
        ci_low=value.low,
        ci_high=value.high,
        n=value.n,
        prior_only=prior,
        advantage=advantage.mean,
        advantage_ci_low=advantage.low,
        advantage_ci_high=advantage.high,
        positive_control=math.nan,
        utility=_mean([trial.utility for trial in group]),
        epsilon=_largest([trial.epsilon for trial in group]),
        delta=_largest([trial.delta for trial in group]),
        claim=first.claim,
        wire_bytes=_mean([trial.wire_bytes for trial in group]),
        seconds=_mean([trial.train_seconds + trial.attack_seconds for trial in group]),
        knowledge=join(first.knowledge),
        flags=join(trial_flags(group, round, metric.kind)),
    )
    return row if failed else add(row, *figure_flags(row))


def _figures(
    group: Group, round: int | None, metric: MetricInfo
) -> tuple[Interval, Interval, float]:
    """Value, advantage and mean prior-only over the same targets and seeds.

    A class is the same target under every seed; a batch is another one.
    """
    pairs = [(trial.seed, score) for trial in group for score in _of(trial, round, metric)]
    seeds = [seed for seed, _ in pairs]
    targets = [score.target if round is None else (seed, score.target) for seed, score in pairs]
    values = [score.value for _, score in pairs]
    priors = [score.prior_only for _, score in pairs]
    first = group[0]
    where = (first.scenario, first.deployment, *_attack(first), round, metric.kind)
    seed = Seed.root(0).child("bootstrap", *where)
    value = mean_interval(values, seeds, seed.child("value").numpy(), targets)
    rng = seed.child("advantage").numpy()
    advantage = paired_interval(values, priors, seeds, metric.higher_is_leakier, rng, targets)
    return value, advantage, _mean(priors)


def _of(trial: Trial, round: int | None, metric: MetricInfo) -> list[Score]:
    return [s for s in trial.scores if s.round == round and s.metric == metric.kind]


def _with_controls(rows: Sequence[LeakageRow], settings: ByDeployment) -> list[LeakageRow]:
    found = []
    for row in rows:
        control = _control(row, rows, settings)
        flags = () if row.failed or control is row else control_flags(row, control)
        if control is not None:
            row = replace(row, positive_control=control.advantage)  # noqa: PLW2901
            if flag := "" if row.failed else control_differs(row, control, settings):
                flags = (*flags, flag)
        found.append(add(row, *flags))
    return found


def _control(
    row: LeakageRow, rows: Sequence[LeakageRow], settings: ByDeployment
) -> LeakageRow | None:
    """The row itself if unprotected; else its unprotected counterpart, the `nearest` of several.

    What has no counterpart there because it exists as shares alone is held against the same attack
    by a coalition that opens them; such a coalition, like an unprotected row, is its own control.
    """
    if not row.protections:
        return row
    return open_counterpart(row, rows, settings) or _opened(row, rows)


def open_counterpart(
    row: LeakageRow, rows: Sequence[LeakageRow], settings: ByDeployment = UNKNOWN
) -> LeakageRow | None:
    """The same attack where nothing protects; None for an unprotected row, or without one."""
    same = [other for other in open_rows(row, rows) if alone(other.attack) == alone(row.attack)]
    return nearest(row, [other for other in same if same_place(row, other)], settings)


def open_rows(row: LeakageRow, rows: Sequence[LeakageRow]) -> list[LeakageRow]:
    """Unprotected rows of the same training regime, round and metric; none for an unprotected
    row."""
    if not row.protections:
        return []
    same = ("scenario", "round", "metric")
    return [
        other
        for other in rows
        if not other.protections
        and (other.position != Position.MALICIOUS_SERVER or row.position == other.position)
        and all(getattr(other, k) == getattr(row, k) for k in same)
        and same_training(row, other)
    ]


def nearest(
    row: LeakageRow, candidates: Sequence[LeakageRow], settings: ByDeployment = UNKNOWN
) -> LeakageRow | None:
    """The one under the same swept values, then that differs in the fewest settings, then in the
    same serving regime, then whose name begins most like the row's ("gradient of 8" for "gradient
    of 8, DP-SGD"), then the first. None that lives on another malice."""
    mine = labels_of(row.deployment)

    def far(other: LeakageRow) -> tuple[int, int, bool, int]:
        alike = sum(
            1 for _ in takewhile(_same, zip(other.deployment, row.deployment, strict=False))
        )
        apart = len(differing(row, other, settings))
        return len(labels_of(other.deployment) ^ mine), apart, other.serving != row.serving, -alike

    able = [other for other in candidates if same_party(row, other, settings)]
    return min(able, key=far, default=None)


def _same(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


def _opened(row: LeakageRow, rows: Sequence[LeakageRow]) -> LeakageRow | None:
    """The row of the largest coalition on the same shares: for a dealer one that it is in, else
    one of compute parties."""
    if row.position not in SHARED_AMONG:
        return None
    same = ("scenario", "deployment", "channel", "round", "metric")
    coalitions = [
        other
        for other in rows
        if other.position in (row.position, Position.COMPUTE_PARTY)
        and alone(other.attack) == alone(row.attack) != other.attack
        and all(getattr(other, k) == getattr(row, k) for k in same)
    ]

    def size(other: LeakageRow) -> tuple[bool, int]:
        return other.position == row.position, colluders_in(other.attack)

    return max(coalitions, key=size, default=None)


def same_training(row: LeakageRow, open_row: LeakageRow) -> bool:
    """Training under MPC computes what centralized training does."""
    return open_row.training == row.training or (row.training, open_row.training) == (
        "smpc",
        "centralized",
    )


SEALED = (Channel.MASKED_UPDATE, Channel.CIPHERTEXT)
SHARED_AMONG = (Position.COMPUTE_PARTY, Position.DEALER)
IN_CLEAR = (Channel.CLIENT_UPDATE, Channel.GRADIENT)


def same_place(row: LeakageRow, open_row: LeakageRow) -> bool:
    """Where the unprotected deployment shows what this one protects.

    A sealed update has its counterpart in the update in clear; what only key holders see here, and
    what a malicious server sees, the curious server sees there. Shares of an update stand for the
    update, shares of a model for the model, and so does what faulty memory holds of it.
    """
    if row.position in SHARED_AMONG:
        model = (Position.MODEL_HOLDER, Channel.GLOBAL_MODEL)
        update = open_row.position == Position.CURIOUS_SERVER and open_row.channel in IN_CLEAR
        return update or (open_row.position, open_row.channel) == model
    if row.channel == Channel.FAULTY_READOUT:
        return open_row.channel == Channel.GLOBAL_MODEL and open_row.position == row.position
    channels = IN_CLEAR if row.channel in SEALED else (row.channel,)
    servers = (Position.CURIOUS_SERVER, Position.MALICIOUS_SERVER, Position.KEY_HOLDER)
    positions = servers if row.position in servers else (row.position,)
    return open_row.channel in channels and open_row.position in positions


def _check(trials: Sequence[Trial], groups: Sequence[Group], known: dict[str, MetricInfo]) -> None:
    for group in groups:
        seeds = [trial.seed for trial in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"'{group[0].attack}' on '{group[0].deployment}' has a seed twice: {seeds}"
            )
    for kind in {score.metric: None for trial in trials for score in trial.scores}:
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"score of metric '{kind}', but metrics are {', '.join(known)}{hint}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _largest(values: Sequence[float | None]) -> float:
    """The largest; NaN unless every one is there."""
    given = [value for value in values if value is not None]
    return max(given) if given and len(given) == len(values) else math.nan


def _frame(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    if "round" in columns:
        frame["round"] = frame["round"].astype("Int64")
    return frame
