"""Small parts of a search: some of its restarts, part of its progress, answers as they go out."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.matching import Problem
from fedmi.exposure.schema import Schema

Progress = Callable[[float], None]
DIVERGED = "search_diverged"


def at_home(found: Reconstruction) -> Reconstruction:
    """On the CPU, in float32."""
    assert found.samples is not None
    assert found.labels is not None
    return replace(
        found,
        samples=found.samples.detach().float().cpu(),
        labels=found.labels.cpu(),
        confidence=found.confidence.float().cpu(),
    )


def risen(schedule: Schedule) -> Schedule:
    """With a warmup of at most half the steps."""
    return replace(schedule, warmup=min(schedule.warmup, schedule.steps // 2))


def few(problem: Problem, at: int, size: int) -> Problem:
    """Some of a problem's restarts."""
    rows = slice(at, at + size)
    seed = problem.seed.child("restarts", at) if at else problem.seed
    return replace(problem, labels=problem.labels[rows], starts=problem.starts[rows], seed=seed)


def diverged(found: Reconstruction, schema: Schema) -> Reconstruction:
    """What stands in for missing records, in place of where a search began that nowhere had a
    finite loss."""
    assert found.samples is not None
    return replace(
        found,
        samples=schema.missing(tuple(found.samples.shape)),
        confidence=torch.full_like(found.confidence, -torch.inf),
        flags=found.flags | {DIVERGED},
    )


def within(report: Progress, start: float, size: float) -> Progress:
    """Progress of a part, as that of the whole."""
    return lambda share: report(start + share * size)


def unknowable(case: Case) -> frozenset[str]:
    """Dropout masks of a client in train mode are drawn by it, and simulated as off."""
    work, build = case.knowledge.work, case.knowledge.build
    if build is None or work is None or work.recipe.mode != "train":
        return frozenset()
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    drops = any(isinstance(module, kinds) and module.p > 0 for module in build().modules())
    return frozenset({"dropout_masks_unknown"}) if drops else frozenset()
