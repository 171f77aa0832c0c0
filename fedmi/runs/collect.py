"""From finished cells to tables and report; nothing here that a cell could have kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import pandas as pd

from fedmi.attacks.base import Attack
from fedmi.deployments.base import Outcome
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.words import Position
from fedmi.leakage.detection import detection_flags, detections_of
from fedmi.leakage.files import write_frame
from fedmi.leakage.table import costs_frame, leakage_frame, scores_frame
from fedmi.leakage.trial import MetricInfo, Score, Trial
from fedmi.metrics.base import Metric
from fedmi.report.data import ReportData, Secured
from fedmi.runs.aims import claims_for
from fedmi.runs.detection import detection_of
from fedmi.runs.directory import RunDirectory, read_marker
from fedmi.runs.report import report_data, write_report
from fedmi.runs.settings import settings_of
from fedmi.runs.training import exposed
from fedmi.scenario.cells import AttackCell, Plan
from fedmi.scenario.threat import inside

NOT_RUN = "not run yet: the run was interrupted; the same command finishes it"


@dataclass(frozen=True)
class Results:
    """The run directory and its tables; `failures` has one line a failed cell, `refused` one for
    each attack that found nothing planted because the clients refused what the server sent.

    secured: what was computed under MPC, and what it took. report: all that the report shows.
    """

    directory: Path
    leakage: pd.DataFrame
    scores: pd.DataFrame
    metrics: tuple[MetricInfo, ...]
    failures: tuple[str, ...]
    interrupted: bool
    refused: tuple[str, ...] = ()
    secured: tuple[Secured, ...] = ()
    report: ReportData | None = None


def publish(
    todo: Plan,
    directory: RunDirectory,
    failures: Mapping[str, str] | None,
    interrupted: bool,
) -> Results:
    """Write scores, leakage table, figures and report from the finished cells of the plan."""
    reasons = _kept_failures(directory) if failures is None else failures
    detection = detection_of(todo, directory)
    trials = [
        _with_detection(trial_of(cell, todo.scenario.name, directory, reasons), detection)
        for cell in todo.attacks
    ]
    metrics = metric_infos(todo)
    scores, costs, leakage = (
        scores_frame(trials),
        costs_frame(trials),
        leakage_frame(trials, metrics),
    )
    for name, frame in (("scores", scores), ("leakage", leakage), ("costs", costs)):
        write_frame(frame, directory.path / f"{name}.parquet")
    write_frame(leakage, directory.path / "leakage.csv")
    data = replace(
        report_data(todo, directory, leakage, scores, costs, metrics), detection=detection
    )
    if any(cell.deployment.watched for cell in todo.trainings):
        for suffix in ("parquet", "csv"):
            write_frame(detection, directory.path / f"detection.{suffix}")
    for name, frame in (("tradeoff", data.tradeoff), ("equal_utility", data.equal_utility)):
        write_frame(frame, directory.path / f"{name}.parquet")
    write_report(data, directory)
    failed = {
        f"{t.attack} on {t.deployment}, seed {t.seed}: {t.failure}": _refused(t)
        for t in trials
        if t.failure
    }
    return Results(
        directory=directory.path,
        leakage=leakage,
        scores=scores,
        metrics=metrics,
        failures=tuple(line for line, refused in failed.items() if not refused),
        refused=tuple(line for line, refused in failed.items() if refused),
        interrupted=interrupted,
        secured=data.secured,
        report=data,
    )


def _refused(trial: Trial) -> bool:
    """Whether the attack failed because clients pin the architecture: as they meant it to."""
    refused = any(flag.startswith("architecture_refused") for flag in trial.flags)
    return refused and "nothing is planted" in (trial.failure or "")


def _kept_failures(directory: RunDirectory) -> dict[str, str]:
    path = directory.path / "failures.json"
    kept: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


def metric_infos(todo: Plan) -> tuple[MetricInfo, ...]:
    """The primary metrics first, then the others in the scenario's order."""
    first = todo.scenario.shown_first
    metrics: dict[str, Metric] = {m.kind: m for cell in todo.attacks for m in cell.metrics}
    ordered = [k for k in first if k in metrics] + [k for k in metrics if k not in first]
    return tuple(MetricInfo(k, metrics[k].higher_is_leakier, metrics[k].unit) for k in ordered)


def trial_of(
    cell: AttackCell, scenario: str, directory: RunDirectory, failures: Mapping[str, str]
) -> Trial:
    """The cell's trial: scored, or failed with its reason."""
    folder, training = directory.cell(cell.key), cell.training
    outcome = _outcome(cell, directory)
    finished = directory.finished(cell.key)
    marker = read_marker(folder) if finished else {}
    granted = cell.attack.knowledge
    claims = claims_for(cell.attack, outcome) if outcome else ()
    claim = claims[0] if claims else None
    return Trial(
        scenario=scenario,
        deployment=cell.deployment_title,
        training=training.deployment.training,
        serving=training.deployment.serving.title,
        protections=training.deployment.protections_in_all,
        position=cell.attack.position,
        channel=cell.attack.channel,
        attack=cell.attack_title,
        seed=training.seed,
        knowledge=(*sorted(granted), *_coalition(cell.attack), *_altered(cell)),
        targets_asked=marker.get("targets_asked", 0),
        utility=outcome.accuracy if outcome else nan,
        trained_utility=outcome.utility.accuracy if outcome else nan,
        chance=marker.get("chance", 1 / training.data.card().classes),
        epsilon=claim.epsilon if claim else None,
        delta=claim.delta if claim else None,
        claim=_worded(claims),
        wire_bytes=wire_bytes(outcome) if outcome else nan,
        train_seconds=seconds(outcome) if outcome else nan,
        attack_seconds=marker.get("seconds", nan),
        queries=marker.get("queries", nan),
        refused=marker.get("refused", 0.0 if finished else nan),
        accounts=marker.get("accounts", 0.0 if finished else nan),
        alarmed=marker.get("alarmed", 0.0 if finished else nan),
        wait_seconds=marker.get("wait_seconds", 0.0 if finished else nan),
        readouts=marker.get("readouts", 0.0 if finished else nan),
        peak_memory_bytes=outcome.cost.peak_memory_bytes if outcome else nan,
        settings=settings_of(training),
        flags=tuple(sorted(outcome.flags)) if outcome else (),
        target_flags=tuple((at or None, flag) for at, flag in marker.get("flags", ())),
        scores=read_scores(folder) if finished else (),
        failure=None if finished else failures.get(cell.key, NOT_RUN),
    )


def _with_detection(trial: Trial, detection: pd.DataFrame) -> Trial:
    """Says on the rows of a malicious server whether clients would have noticed."""
    if trial.position != Position.MALICIOUS_SERVER:
        return trial
    here = [one for one in detections_of(detection) if one.deployment == trial.deployment]
    return replace(trial, flags=(*trial.flags, *detection_flags(here)))


def wire_bytes(outcome: Outcome) -> int:
    """Of the whole training, both directions, and of putting it into service under MPC: all that
    crossed the parties' links, framing included."""
    trained = outcome.cost.wire_bytes_up + outcome.cost.wire_bytes_down
    served = outcome.service.mpc if outcome.service else None
    return trained + (sum(party.link_bytes for party in served.parties) if served else 0)


def seconds(outcome: Outcome) -> float:
    """Of the whole training, and of putting the model into service under MPC."""
    served = outcome.service.mpc if outcome.service else None
    return outcome.cost.seconds + (served.seconds if served else 0.0)


def _worded(claims: Sequence[PrivacyClaim]) -> str:
    """Unit, relation and accountant of the first claim, and the further ones in full."""
    if not claims:
        return ""
    first, *others = claims
    text = f"{first.unit}, {first.relation}, {first.accountant}"
    return text + "".join(
        f"; also epsilon {other.epsilon:.3g} at delta {other.delta:g} "
        f"({other.unit}, {other.relation}, {other.accountant})"
        for other in others
    )


def _altered(cell: AttackCell) -> tuple[str, ...]:
    """What the adversary itself changes, where it does not follow the protocol."""
    alters = cell.training.deployment.alters
    active = cell.attack.position in (Position.MALICIOUS_SERVER, Position.MALICIOUS_CLIENT)
    return (f"alters: {alters}",) if alters and active else ()


def _coalition(attack: Attack) -> tuple[str, ...]:
    """Whose part of an average is known: the adversary's own, and its colluders'."""
    count = attack.colluders
    others = (f"colluders = {count}",) if count else ()
    return (*others, "own update") if inside(attack) else others


def _outcome(cell: AttackCell, directory: RunDirectory) -> Outcome | None:
    """With what serving showed; None until training and serving have finished."""
    needed = [cell.training.key, *([cell.served.key] if cell.served else [])]
    if not all(directory.finished(key) for key in needed):
        return None
    return exposed(cell.training, cell.served, directory)


def read_scores(folder: Path) -> tuple[Score, ...]:
    content = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return tuple(Score(**item) for item in content["scores"])
