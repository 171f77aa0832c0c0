"""Cells that train: a deployment on its split or on a twin of it, and the evaluator."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmi.data.records import Split
from fedmi.deployments import saved, saved_service
from fedmi.deployments.base import DeploymentError, Job, Outcome
from fedmi.deployments.determinism import drawn_from
from fedmi.deployments.serving.base import Rehearsal, Site, Trained
from fedmi.exposure.observation import Transcript
from fedmi.exposure.payload import StoredTensors, store
from fedmi.exposure.seeding import Seed
from fedmi.metrics.judge import Judge, train_judge
from fedmi.runs.directory import RunDirectory, writing
from fedmi.runs.provenance import marked
from fedmi.scenario.cells import JudgeCell, PretrainingCell, ServedCell, TrainingCell
from fedmi.training.local import DivergedError, batches, fit

START = "start.safetensors"


def split_of(cell: PretrainingCell | TrainingCell | JudgeCell) -> Split:
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


def pretrain(cell: PretrainingCell, directory: RunDirectory) -> None:
    """Train on the public records; DeploymentError where it diverges or classes differ."""
    torch.set_num_threads(1)
    marker = marked("pretraining", cell)
    with writing(directory, cell.key, marker) as scratch:
        start = time.monotonic()
        model = pretrained(cell, split_of(cell), told(scratch))
        store(model.state_dict(), scratch / START)
        marker["seconds"] = time.monotonic() - start


def pretrained(cell: PretrainingCell, split: Split, progress: Callable[[float], None]) -> nn.Module:
    """The model as drawn for this seed, then trained on the public records."""
    if not split.shared_classes:
        raise DeploymentError(
            "[pretraining] the public records are of other classes than the private ones, so that "
            "no classifier of these can be trained on them; leave pretraining out"
        )
    work, seed, public = cell.pretraining.work, Seed.root(cell.seed), split.public
    model = cell.model.build(public.shape, split.classes, seed.child("model"))
    inputs, labels = torch.from_numpy(public.inputs), torch.from_numpy(public.labels)
    seed = seed.child("pretraining")
    steps = batches(len(public), work, seed.child("batches"))
    with drawn_from(seed.child("module")):
        try:
            fit(model, inputs, labels, steps, work, progress)
        except DivergedError as error:
            raise DeploymentError(f"[pretraining] diverged: {error}") from error
    return model


def started(cell: TrainingCell, directory: RunDirectory) -> Mapping[str, Tensor] | None:
    """The state of the cell that the training builds on, if any."""
    found = [directory.cell(one.key) / START for one in cell.needs]
    return dict(StoredTensors(found[0])) if found else None


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
            start=started(cell, directory),
            workers=workers,
            progress=told(scratch),
        )
        outcome = cell.deployment.train(job)
        saved.save(outcome, scratch)
        marker["seconds"] = outcome.cost.seconds


def serve(cell: ServedCell, directory: RunDirectory) -> None:
    """Put the trained model into service once, and keep what that showed."""
    torch.set_num_threads(1)
    marker = marked("served", cell)
    with writing(directory, cell.key, marker) as scratch:
        start = time.monotonic()
        training = cell.training
        split = training_split(training)
        outcome = saved.load(directory.cell(training.key))
        site = site_of(training, scratch, Seed.root(training.seed).child("rehearsal"))
        found = training.deployment.serving.rehearse(
            trained_of(training, outcome, split), split, site, training.confide
        )
        saved_service.save(found, scratch)
        marker["seconds"] = time.monotonic() - start


def site_of(
    cell: TrainingCell, scratch: Path, draws: Seed, fitted: Mapping[str, Tensor] | None = None
) -> Site:
    """Where the cell's model is served: the same device for every door of a deployment."""
    device = Seed.root(cell.seed).child("device", cell.deployment.serving.regime)
    return Site(scratch, device, draws, fitted or {})


def trained_of(cell: TrainingCell, outcome: Outcome, split: Split) -> Trained:
    return Trained(outcome.state, cell.network, split.private.shape, split.classes)


def exposed(training: TrainingCell, served: ServedCell | None, directory: RunDirectory) -> Outcome:
    """The outcome of the training, with what putting it into service showed."""
    outcome = saved.load(directory.cell(training.key))
    if served is None:
        return outcome
    return with_service(outcome, saved_service.load(directory.cell(served.key)))


def with_service(outcome: Outcome, seen: Rehearsal) -> Outcome:
    """The outcome with what a rehearsal of serving it showed."""
    transcripts = dict(outcome.transcripts)
    for item in seen.observations:
        before = transcripts.get(item.position, Transcript(item.position))
        transcripts[item.position] = replace(before, observations=(*before.observations, item))
    return replace(
        outcome,
        transcripts=transcripts,
        confided=(*outcome.confided, *seen.confided),
        service=seen,
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
