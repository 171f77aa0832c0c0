"""A small split, jobs on it and models for it, for the tests of the deployments."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from fedmi.data.records import Records, Split
from fedmi.deployments.base import Job
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec, Shape
from fedmi.models.classifiers import MLP

SHAPE, CLASSES = (1, 6, 6), 4


class WithBuffers(ModelSpec):
    """Batch statistics (float buffers) and a counter of batches (an integer buffer)."""

    kind: Literal["with_buffers"] = "with_buffers"

    def module(self, shape: Shape, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def records(count: int, first_id: int) -> Records:
    """Noisy class means: a task that a small model learns in a few epochs."""
    means = np.random.default_rng(99).random((CLASSES, *SHAPE))
    rng = np.random.default_rng(first_id)
    labels = np.arange(count) % CLASSES
    inputs = 0.7 * means[labels] + 0.3 * rng.random((count, *SHAPE))
    ids = np.arange(first_id, first_id + count)
    return Records(inputs.astype(np.float32), labels.astype(np.int64), labels.copy(), ids)


def split(private: int = 48) -> Split:
    return Split(
        private=records(private, 0),
        held_out=records(40, 10_000),
        public=records(40, 20_000),
        classes=CLASSES,
        identity_disjoint=False,
    )


def job(
    directory: Path,
    model: ModelSpec | None = None,
    record: tuple[int, ...] = (),
    private: int = 48,
    workers: int = 1,
    **recipe: object,
) -> Job:
    return Job(
        split=split(private),
        model=model or MLP(hidden=(8,)),
        recipe=Recipe.model_validate({"learning_rate": 0.2, "batch_size": 5, **recipe}),
        seed=Seed.root(3),
        directory=directory,
        record=frozenset(record),
        workers=workers,
    )


def tensors(part: Records) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(part.inputs), torch.tensor(part.labels)


def same(ours: object, theirs: object) -> bool:
    """Two mappings hold the same tensors bit for bit."""
    first, second = dict(ours), dict(theirs)  # type: ignore[call-overload]
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )
