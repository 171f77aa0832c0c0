"""Deployments with a planted imprint block, and records whose brightness is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.data.records import Records, Split
from fedmi.deployments.base import Job, Outcome
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.malice.imprinting import quantiles
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Fact, Position
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP

SHAPE, CLASSES, BINS = (1, 8, 8), 4, 32
SERVER = Position.MALICIOUS_SERVER
KNOWN = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}


def records(brightness: Sequence[float], first_id: int) -> Records:
    """Noise, each record with its own mean."""
    rng, count = np.random.default_rng(first_id), len(brightness)
    noise = rng.random((count, *SHAPE))
    noise *= np.asarray(brightness)[:, None, None, None] / noise.mean((1, 2, 3), keepdims=True)
    labels = np.arange(count) % CLASSES
    ids = np.arange(first_id, first_id + count)
    return Records(noise.astype(np.float32), labels, labels.copy(), ids)


PUBLIC = records(np.random.default_rng(1).uniform(0.2, 0.45, 400).tolist(), 20_000)


def in_bins(chosen: Sequence[int], bins: int = BINS) -> Records:
    """One record in the middle of each of these bins; those at the ends are too wide to fill."""
    edges = quantiles(torch.from_numpy(PUBLIC.inputs), bins)
    return records([float(edges[i : i + 2].mean()) for i in chosen], 0)


def job(
    directory: Path,
    private: Records,
    model: ModelSpec | None = None,
    record: tuple[int, ...] = (1,),
    **recipe: object,
) -> Job:
    split = Split(
        private=private,
        held_out=records([0.3] * 40, 10_000),
        public=PUBLIC,
        classes=CLASSES,
        identity_disjoint=False,
    )
    return Job(
        split=split,
        model=model or MLP(hidden=(8,)),
        recipe=Recipe.model_validate({"learning_rate": 0.1, "batch_size": 64, **recipe}),
        seed=Seed.root(3),
        directory=directory,
        record=frozenset(record),
    )


def case_of(federated: Federated, task: Job, outcome: Outcome, *targets: Target) -> Case:
    """What the server knows, and all that it saw."""
    shape, classes = task.split.private.shape, task.split.classes
    spec = federated.builds(task.model)
    knowledge = Knowledge(
        input_shape=shape,
        classes=classes,
        facts=frozenset(KNOWN),
        build=lambda: spec.build(shape, classes, Seed.root(9)),
        work=federated.work(task.recipe),
        public=(
            torch.from_numpy(task.split.public.inputs),
            torch.from_numpy(task.split.public.labels),
        ),
    )
    return Case(outcome.transcripts[SERVER], knowledge, targets, Seed.root(5))


def batch(*clients: int, round: int = 1) -> Target:
    return Target(f"round {round}, clients {clients}", None, round, clients)


def behind(task: Job, outcome: Outcome, target: Target) -> Tensor:
    rows = [outcome.used[target.round or 0, client] for client in target.clients]
    return torch.from_numpy(task.split.private.inputs[np.concatenate(rows)])


def nearest(found: Tensor | None, truth: Tensor) -> Tensor:
    """PSNR of the nearest reconstruction to each record, dB."""
    assert found is not None
    errors = (truth[:, None] - found[None]).double().square().flatten(2).mean(2)
    return -10 * errors.min(1).values.clamp_min(1e-14).log10()


def reseeded(case: Case, name: str, noise: float, seed: int = 0) -> Case:
    """The same with uniform noise in place of whatever the updates say of this tensor."""
    rng = torch.Generator().manual_seed(seed)
    seen = tuple(
        replace(
            item,
            payload={
                n: noise * (2 * torch.rand(t.shape, generator=rng) - 1) if name in n else t
                for n, t in item.payload.items()
            },
        )
        if item.channel != "global_model"
        else item
        for item in case.transcript.observations
    )
    return replace(case, transcript=replace(case.transcript, observations=seen))
