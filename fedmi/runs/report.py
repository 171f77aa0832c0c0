"""From the plan and its finished cells to the report: threat model, pictures, environment."""

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmi.attacks.base import PICTURED
from fedmi.data.truth import Truth
from fedmi.deployments import saved, saved_service
from fedmi.deployments.serving.base import Rehearsal, Trained
from fedmi.exposure.observation import Transcript
from fedmi.exposure.words import Position
from fedmi.leakage.equal_utility import equal_utility_frame
from fedmi.leakage.tradeoff import tradeoff_frame
from fedmi.leakage.trial import MetricInfo
from fedmi.mpc.cost import MPCCost
from fedmi.report.data import Beside, Image, Panel, PanelRow, ReportData, Secured, Served
from fedmi.report.figures import figures
from fedmi.report.html import render
from fedmi.runs.directory import RunDirectory, read_marker, replace_text
from fedmi.runs.readings import readings, shown_records
from fedmi.runs.settings import settings_by_deployment
from fedmi.runs.training import split_of
from fedmi.scenario.cells import AttackCell, Plan

SERVERS = (Position.CURIOUS_SERVER, Position.MALICIOUS_SERVER)


def write_report(data: ReportData, directory: RunDirectory) -> None:
    """report.html and figures/ in the run directory."""
    figures(data, directory.path / "figures")
    replace_text(directory.path / "report.html", render(data))


def report_data(
    todo: Plan,
    directory: RunDirectory,
    leakage: pd.DataFrame,
    scores: pd.DataFrame,
    costs: pd.DataFrame,
    metrics: tuple[MetricInfo, ...],
) -> ReportData:
    """What the report shows, from what the run directory holds."""
    path, scenario = directory.path, todo.scenario
    card, behind = scenario.data.card(), held_out(todo, directory)
    return ReportData(
        scenario=scenario.name,
        question=scenario.question,
        dataset=f"{card.title}. Source: {card.source}. Terms: {card.licence}.",
        seeds=scenario.seeds,
        scenario_text=(path / "scenario.toml").read_text(encoding="utf-8"),
        environment=json.loads((path / "environment.json").read_text(encoding="utf-8")),
        leakage=leakage,
        scores=scores,
        costs=costs,
        metrics=metrics,
        views={c.deployment_title: c.training.deployment.views() for c in todo.attacks},
        beside=beside(todo, directory),
        secured=secured(todo, directory),
        held_out=behind,
        tradeoff=tradeoff_frame(
            scores,
            leakage,
            metrics,
            behind,
            right(todo, directory),
            settings_by_deployment(todo),
        ),
        equal_utility=equal_utility_frame(scores, leakage, metrics),
        served=served(todo, directory),
        reported=scenario.reported,
        panels=tuple(panels(todo, directory)),
        readings=tuple(readings(todo, directory)),
        judge_accuracy={
            judge.seed: read_marker(directory.cell(judge.key))["accuracy"]
            for judge in todo.judges
            if directory.finished(judge.key)
        },
    )


def beside(todo: Plan, directory: RunDirectory) -> dict[str, tuple[Beside, ...]]:
    """Of each deployment, the scalars that crossed in clear with the updates, over all seeds."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for cell in one_a_training(todo):
        key, values = cell.training.key, found.setdefault(cell.deployment_title, {})
        if not directory.finished(key):
            continue
        for position, transcript in saved.load(directory.cell(key)).transcripts.items():
            if position in SERVERS:
                _collect(transcript, values)
    return {
        title: tuple(
            Beside(channel, name, min(seen), max(seen))
            for (channel, name), seen in sorted(values.items())
        )
        for title, values in found.items()
    }


def one_a_training(todo: Plan) -> tuple[AttackCell, ...]:
    """One attack of each training of each deployment; deployments may share a training."""
    cells = {(cell.deployment_title, cell.training.key): cell for cell in todo.attacks}
    return tuple(cells.values())


def _collect(transcript: Transcript, values: dict[tuple[str, str], list[float]]) -> None:
    for seen in transcript.observations:
        if len(seen.clients) == 1:
            for name, value in seen.clear.items():
                values.setdefault((seen.channel, name), []).append(value)


def secured(todo: Plan, directory: RunDirectory) -> tuple[Secured, ...]:
    """What training and serving under MPC took, by deployment, over all seeds that finished."""
    found: dict[tuple[str, str], list[MPCCost]] = {}
    for cell in one_a_training(todo):
        if not directory.finished(cell.training.key):
            continue
        outcome = saved.load(directory.cell(cell.training.key))
        if outcome.mpc is not None:
            found.setdefault((cell.deployment_title, "training"), []).append(outcome.mpc)
        if cell.served and directory.finished(cell.served.key):
            served = saved_service.load(directory.cell(cell.served.key)).mpc
            if served is not None:
                found.setdefault((cell.deployment_title, "serving"), []).append(served)
    return tuple(Secured(title, phase, tuple(costs)) for (title, phase), costs in found.items())


def held_out(todo: Plan, directory: RunDirectory) -> dict[str, int]:
    """How many held-out records each deployment's accuracy was measured on, over all seeds."""
    sizes: dict[tuple[str, int], int] = {}
    found: dict[str, int] = {}
    for cell in one_a_training(todo):
        training = cell.training
        if directory.finished(training.key):
            key = (training.data.model_dump_json(), training.seed)
            if key not in sizes:
                sizes[key] = len(split_of(training).held_out)
            found[cell.deployment_title] = found.get(cell.deployment_title, 0) + sizes[key]
    return found


def right(todo: Plan, directory: RunDirectory) -> dict[str, NDArray[np.float64]]:
    """By deployment: which held-out records its answers had right (1 or 0), seed by seed in the
    order of the scenario; only where every seed has finished."""
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for cell in one_a_training(todo):
        needed = [cell.training.key, *([cell.served.key] if cell.served else [])]
        if all(directory.finished(key) for key in needed):
            of_seed = found.setdefault(cell.deployment_title, {})
            of_seed[cell.training.seed] = _right(cell, directory)
    seeds = todo.scenario.seeds
    return {
        title: np.concatenate([marks[seed] for seed in seeds])
        for title, marks in found.items()
        if set(marks) == set(seeds)
    }


def _right(cell: AttackCell, directory: RunDirectory) -> NDArray[np.float64]:
    if cell.served:
        marks = saved_service.load(directory.cell(cell.served.key)).right
        return np.array(marks, dtype=np.float64)
    training, split = cell.training, split_of(cell.training)
    state = saved.load(directory.cell(training.key)).state
    model = Trained(state, training.network, split.private.shape, split.classes).module()
    with torch.no_grad():
        inputs = torch.from_numpy(np.ascontiguousarray(split.held_out.inputs))
        named = torch.cat([model(part).argmax(1) for part in torch.split(inputs, 256)])
    return np.asarray(named.numpy() == split.held_out.labels, dtype=np.float64)


def served(todo: Plan, directory: RunDirectory) -> tuple[Served, ...]:
    """What putting into service showed, where a model does not simply answer as it was trained."""
    found: dict[str, list[tuple[float, Rehearsal]]] = {}
    regimes: dict[str, str] = {}
    for cell in one_a_training(todo):
        serving = cell.training.deployment.serving
        if serving.plain or not cell.served or not directory.finished(cell.served.key):
            continue
        trained = saved.load(directory.cell(cell.training.key)).utility.accuracy
        seen = saved_service.load(directory.cell(cell.served.key))
        found.setdefault(cell.deployment_title, []).append((trained, seen))
        regimes[cell.deployment_title] = serving.title
    return tuple(
        Served(
            title,
            regimes[title],
            tuple(trained for trained, _ in seeds),
            tuple(seen.accuracy for _, seen in seeds),
            tuple(seen.figures for _, seen in seeds),
            any(seen.mpc is not None for _, seen in seeds),
        )
        for title, seeds in found.items()
    )


def panels(todo: Plan, directory: RunDirectory) -> Iterator[Panel]:
    """Pictures of the first seed's reconstructions of every attack that returns samples."""
    first = todo.scenario.seeds[0]
    for cell in todo.attacks:
        pictured = cell.attack.recovers in PICTURED and cell.training.seed == first
        if pictured and directory.finished(cell.key):
            rows = tuple(panel_rows(cell, directory))
            if rows:
                yield Panel(
                    cell.deployment_title,
                    cell.attack.position,
                    cell.attack.channel,
                    cell.attack_title,
                    first,
                    rows,
                )


def panel_rows(cell: AttackCell, directory: RunDirectory) -> Iterator[PanelRow]:
    """The first targets, one record each; of a single target, its first records."""
    truth = Truth(split_of(cell.training), saved.load(directory.cell(cell.training.key)).used)
    for target, row, ours, theirs in shown_records(directory.cell(cell.key), truth):
        if ours.schema.kind != "pixels" or min(ours.references.shape[2:]) < 2:
            return
        assert ours.samples is not None
        assert theirs.samples is not None
        yield PanelRow(
            target.id,
            f"class {int(ours.labels[row])}",
            _image(ours.references[row]),
            _image(ours.samples[row]),
            _image(theirs.samples[row]),
        )


def _image(tensor: Tensor) -> Image:
    return np.asarray(torch.nan_to_num(tensor, nan=0.5).clamp(0, 1).numpy(), dtype=np.float32)
