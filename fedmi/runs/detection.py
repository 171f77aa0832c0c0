"""From finished trainings to the table of what careful clients would have noticed."""

import json
from collections.abc import Iterator

import pandas as pd

from fedmi.deployments import saved
from fedmi.deployments.federated.deployment import Federated
from fedmi.leakage.detection import Watched, detection_frame
from fedmi.runs.directory import RunDirectory
from fedmi.scenario.cells import Plan, TrainingCell


def detection_of(todo: Plan, directory: RunDirectory) -> pd.DataFrame:
    """Over all seeds that finished; without rows where no client measured or none was deceived."""
    return detection_frame(list(watched(todo, directory)))


def watched(todo: Plan, directory: RunDirectory) -> Iterator[Watched]:
    """Every training on the private records whose clients measured, under each of its titles."""
    titles: dict[str, dict[str, None]] = {}
    for attack in todo.attacks:
        titles.setdefault(attack.training.key, {})[attack.deployment_title] = None
    for cell in todo.trainings:
        deployment = cell.deployment
        if cell.twin != "none" or not isinstance(deployment, Federated) or not deployment.detectors:
            continue
        if not directory.finished(cell.key):
            continue
        noticed = saved.load(directory.cell(cell.key)).noticed
        for title in titles.get(cell.key, {deployment.name: None}):
            yield Watched(
                scenario=todo.scenario.name,
                deployment=title,
                training=deployment.training,
                malice=deployment.malice.kind if deployment.malice else "",
                seed=cell.seed,
                comparable=_comparable(cell, deployment),
                alike=frozenset(d.kind for d in deployment.detectors if d.of_model_alone),
                noticed=noticed,
            )


def _comparable(cell: TrainingCell, deployment: Federated) -> dict[str, str]:
    """Detector -> what must be the same elsewhere: data, model, local work, strategy, options."""
    work = deployment.work(deployment.recipe or cell.recipe)
    common = {
        "data": cell.data.model_dump(mode="json"),
        "model": cell.model.model_dump(mode="json"),
        "work": work.model_dump(mode="json"),
        "strategy": deployment.strategy.model_dump(mode="json"),
    }
    return {
        detector.kind: json.dumps({**common, "detector": detector.model_dump(mode="json")})
        for detector in deployment.detectors
    }
