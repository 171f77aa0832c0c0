"""Cells that train: a deployment on its split or on a twin of it, and the evaluator."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedmi.data.records import Split
from fedmi.deployments import saved
from fedmi.deployments.base import Job, Outcome
from fedmi.deployments.serving.base import Trained
from fedmi.exposure.observation import Transcript
from fedmi.exposure.payload import StoredTensors, store
from fedmi.exposure.seeding import Seed
from fedmi.metrics.judge import Judge, train_judge
from fedmi.runs.directory import RunDirectory, writing
from fedmi.runs.provenance import marked
from fedmi.scenario.cells import JudgeCell, TrainingCell


def split_of(cell: TrainingCell | JudgeCell) -> Split:
    """The private side of things; the same for every deployment of a seed."""
    return cell.data.split(Seed.root(cell.seed).child("data"))


def training_split(cell: TrainingCell) -> Split:
    """What the cell's deployment trains on: the private records, or a twin of them."""
    split, seed = split_of(cell), Seed.root(cell.seed).child("twin")
    if cell.twin == "disjoint":
        return split.disjoint_twin(seed)
    if cell.twin == "relabelled":
        return split.relabelled_twin(seed)
    return split


def train(cell: TrainingCell, directory: RunDirectory, workers: int) -> None:
    torch.set_num_threads(1)
    marker = marked("training", cell)
    with writing(directory, cell.key, marker) as scratch:
        job = Job(
            split=training_split(cell),
            model=cell.model,
            recipe=cell.deployment.recipe or cell.recipe,
            seed=Seed.root(cell.seed),
            directory=scratch,
            record=frozenset(cell.record),
            confide=cell.confide,
            audit_seed=audit_seed(cell),
            workers=workers,
            progress=told(scratch),
        )
        outcome = in_service(cell, cell.deployment.train(job), job)
        saved.save(outcome, scratch)
        marker["seconds"] = outcome.cost.seconds


def in_service(cell: TrainingCell, outcome: Outcome, job: Job) -> Outcome:
    """The outcome with what putting the model into service showed."""
    shape, classes = job.split.private.shape, job.split.classes
    trained = Trained(outcome.state, job.model, shape, classes)
    seen = cell.deployment.serving.rehearse(
        trained, job.split, job.directory / "served", job.confide
    )
    transcripts = dict(outcome.transcripts)
    for item in seen.observations:
        before = transcripts.get(item.position, Transcript(item.position))
        transcripts[item.position] = replace(before, observations=(*before.observations, item))
    return replace(
        outcome,
        transcripts=transcripts,
        confided=(*outcome.confided, *seen.confided),
        served=seen.cost,
        flags=outcome.flags | seen.flags,
    )


def audit_seed(cell: TrainingCell) -> Seed:
    """Draws the canaries of an audit; a twin of the coins draws others."""
    root = Seed.root(cell.seed)
    return (root.child("twin") if cell.twin == "recoined" else root).child("audit")


def judge(cell: JudgeCell, directory: RunDirectory) -> None:
    torch.set_num_threads(1)
    marker = marked("judge", cell)
    with writing(directory, cell.key, marker) as scratch:
        start = time.monotonic()
        seed = Seed.root(cell.seed).child("evaluator")
        trained = train_judge(split_of(cell), cell.evaluator, seed, told(scratch))
        store(trained.state(), scratch / "judge.safetensors")
        marker["accuracy"] = trained.accuracy
        marker["seconds"] = time.monotonic() - start


def load_judge(cell: JudgeCell, directory: RunDirectory) -> Judge:
    state = dict(StoredTensors(directory.cell(cell.key) / "judge.safetensors"))
    split = split_of(cell)
    return Judge.restore(state, cell.evaluator, split.private.shape)


def told(scratch: Path, every_seconds: float = 0.3) -> Callable[[float], None]:
    """A progress callback that writes the share done into the scratch folder now and then."""
    last = 0.0

    def tell(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            (scratch / "progress").write_text(f"{share:.4f}", encoding="utf-8")

    return tell
