"""From finished trainings to the table of what careful clients would have noticed."""

import json
from collections.abc import Iterator

import pandas as pd

from fedmi.deployments import saved
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.detectors.architecture_diff import ArchitectureDiff
from fedmi.deployments.federated.detectors.base import Detector
from fedmi.leakage.detection import Watched, detection_frame
from fedmi.protections.transport import Transport
from fedmi.runs.directory import RunDirectory
from fedmi.runs.settings import settings_of
from fedmi.scenario.cells import Plan, TrainingCell

SHAPING = frozenset({"data", "model"})
"""Settings that say which tensors a model has."""
LATER = frozenset({"rounds", "malice", "pin_architecture"})
"""Settings that an honest model of a round does not depend on."""


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
                comparable=comparable(cell, deployment),
                alike=frozenset(d.kind for d in deployment.detectors if d.of_model_alone),
                noticed=noticed,
            )


def comparable(cell: TrainingCell, deployment: Federated) -> dict[str, str]:
    """Detector -> what must be the same elsewhere for an honest measurement to serve there.

    The statistics depend on how the model got to where it is: all settings of the training but its
    length and what is altered later, and protections that change what the model learns from (not
    how sums of updates travel; length counts there, as noise may be set by it). What names and
    shapes of tensors say is settled by the model that was agreed on.
    """
    settings = dict(settings_of(cell))
    agreed = {name: settings[name] for name in settings if name.split(".")[0] in SHAPING}
    changing = [p for p in deployment.protections if not isinstance(p, Transport)]
    grown = {name: settings[name] for name in settings if name.split(".")[0] not in LATER}
    if changing:
        grown["rounds"] = settings["rounds"]
        grown["protections"] = json.dumps([p.model_dump(mode="json") for p in changing])
    return {
        detector.kind: json.dumps(
            [detector.model_dump(mode="json"), agreed if _of_shapes(detector) else grown]
        )
        for detector in deployment.detectors
    }


def _of_shapes(detector: Detector) -> bool:
    """Whether it looks at names and shapes of tensors alone."""
    return isinstance(detector, ArchitectureDiff)
