"""Deployments that start from a model trained on the public records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmi.data.att_faces import ATTFaces
from fedmi.deployments import saved
from fedmi.deployments.base import DeploymentError, Job
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.jobfile import read_job, remove_job, write_job
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Position
from fedmi.flower import _plan
from fedmi.runs.directory import RunDirectory
from fedmi.runs.execute import run
from fedmi.runs.training import pretrained, split_of
from fedmi.scenario.cells import Plan, TrainingCell, plan
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.loading import from_raw, to_toml
from fedmi.training.local import evaluate
from tests.scenarios import base


def scenario(**changes: Any) -> dict[str, Any]:
    raw = base(seeds=[1], pretraining={"epochs": 8, "learning_rate": 0.2})
    raw["attack"] = [raw["attack"][1] | {"rounds": [1]}]
    return raw | changes


def planned(**changes: Any) -> Plan:
    return plan(from_raw(scenario(**changes)))


def initial(cell: TrainingCell, out: Path) -> dict[str, Tensor]:
    outcome = saved.load(RunDirectory(out).cell(cell.key))
    return dict(outcome.transcripts[Position.CLIENT].global_model(1))


def test_all_deployments_and_their_twins_start_from_one_model(tmp_path: Path) -> None:
    todo = planned()
    (start,) = todo.pretrainings
    assert {cell.needs for cell in todo.trainings} == {(start,)}
    assert {cell.twin for cell in todo.trainings} == {"none", "relabelled"}
    run(todo.scenario, out=tmp_path, jobs=0, quiet=True)
    split = split_of(start)
    expected = pretrained(start, split, lambda share: None).state_dict()
    for cell in todo.trainings:
        if isinstance(cell.deployment, Federated):
            seen = initial(cell, tmp_path)
            assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_it_has_learnt_from_the_public_records_alone() -> None:
    (start,) = planned().pretrainings
    split = split_of(start)
    model = pretrained(start, split, lambda share: None)
    held_out = split.held_out
    inputs, labels = torch.from_numpy(held_out.inputs), torch.from_numpy(held_out.labels)
    assert evaluate(model, inputs, labels)[0] > 0.8
    other = replace(split, private=replace(split.private, inputs=1 - split.private.inputs))
    again = pretrained(start, other, lambda share: None).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    fewer = replace(split, public=split.public.take(np.arange(20)))
    changed = pretrained(start, fewer, lambda share: None).state_dict()
    assert not all(torch.equal(changed[name], model.state_dict()[name]) for name in changed)


def test_without_epochs_nothing_is_pretrained() -> None:
    todo = planned(pretraining={"epochs": 0})
    assert not todo.pretrainings
    assert {cell.needs for cell in todo.trainings} == {()}


def test_it_can_be_swept() -> None:
    todo = planned(sweep={"pretraining.epochs": [0, 2]})
    assert [cell.pretraining.epochs for cell in todo.pretrainings] == [2]
    titles = {cell.deployment_title for cell in todo.attacks}
    assert titles == {"fl pretraining.epochs=0", "fl pretraining.epochs=2"}


def test_public_records_of_other_people_are_refused_before_anything_runs() -> None:
    with pytest.raises(ScenarioError, match=r"pretraining.*other classes"):
        planned(data={"kind": "att_faces"})


def test_public_records_of_other_classes_are_refused() -> None:
    (start,) = planned().pretrainings
    faces = ATTFaces().split(Seed.root(0))
    with pytest.raises(DeploymentError, match="other classes"):
        pretrained(start, faces, lambda share: None)


def test_what_diverges_is_a_failed_row_with_the_reason(tmp_path: Path) -> None:
    todo = planned(
        pretraining={"epochs": 3, "learning_rate": 1000.0, "momentum": 0.99},
        model={"kind": "cnn6"},
    )
    results = run(todo.scenario, out=tmp_path, jobs=0, quiet=True)
    assert results.leakage["flags"].str.contains("diverged").all()


def test_a_job_file_keeps_the_start(tmp_path: Path) -> None:
    todo = planned()
    cell = next(c for c in todo.trainings if isinstance(c.deployment, Federated))
    (start,) = cell.needs
    split = split_of(cell)
    state = pretrained(start, split, lambda share: None).state_dict()
    assert isinstance(cell.deployment, Federated)
    job = Job(split, cell.model, cell.recipe, Seed.root(1), tmp_path, start=state)
    write_job(cell.deployment, job, tmp_path)
    kept = read_job(tmp_path)[1].start
    assert kept is not None
    assert all(torch.equal(kept[name], state[name]) for name in state)
    remove_job(tmp_path)
    assert not list(tmp_path.iterdir())


def test_flowers_own_runtime_starts_from_the_same_model(tmp_path: Path) -> None:
    todo = planned()
    (start,) = todo.pretrainings
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(todo.scenario), encoding="utf-8")
    seen = _plan(file, "fl", 1, str(tmp_path)).build().state_dict()
    expected = pretrained(start, split_of(start), lambda share: None).state_dict()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


@pytest.mark.parametrize("malice", [{"kind": "robbing_the_fed", "bins": 16}, {"kind": "loki"}])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_a_server_builds_around_the_model_has_it_pretrained(
    malice: dict[str, Any], pinned: bool, tmp_path: Path
) -> None:
    deployment = {
        "kind": "federated", "name": "fl", "clients": 3, "rounds": 1, "local_steps": 1,
        "malice": malice | {"bins": 16}, "pin_architecture": pinned,
    }  # fmt: skip
    attack = {
        "kind": malice["kind"], "position": "malicious_server", "channel": "aggregate",
        "knowledge": ["public_data"], "rounds": [1],
    }  # fmt: skip
    todo = planned(deployment=[deployment], attack=[attack])
    (start,) = todo.pretrainings
    results = run(todo.scenario, out=str(tmp_path), jobs=0, quiet=True)
    cell = next(cell for cell in todo.trainings if cell.twin == "none")
    expected = pretrained(start, split_of(start), lambda share: None).state_dict()
    transcripts = saved.load(RunDirectory(tmp_path).cell(cell.key)).transcripts
    seen = transcripts[Position.CLIENT].global_model(1)
    prefix = "" if pinned else "model."
    assert all(torch.equal(seen[prefix + name], expected[name]) for name in expected)
    assert bool(results.refused) == pinned
    assert not results.failures
