"""LLG, LLG* and LLG+: labels from the sums of the last layer's rows (Wainakh et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.allot import allot, negative
from fedmi.attacks.engine.labels.layer import Stand, answers, fresh, head, public, sentences, stand
from fedmi.exposure.schema import Schema, Text

AUXILIARY, DUMMIES = 512, 10
OWN_CLASSES = 0.5
"""Accuracy of the model on public records from which their labels are taken to be its classes."""


@dataclass(frozen=True)
class Influence:
    """impact: what one record of a class adds to its sum g_k, negative; offset [classes]: what
    the other records of a batch add to it."""

    impact: float
    offset: Tensor


def llg(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """From the gradient alone: impact (1 + 1/K) / n times the sum of the negative g_k, offset 0."""
    module = fresh(case)
    sums = head(evidence.gradient, module).weight.sum(1)
    impact = float(sums.clamp_max(0).sum()) * (1 + 1 / len(sums)) / evidence.records
    influence = Influence(impact, torch.zeros_like(sums))
    return _extract(sums, influence, stand(case, evidence, module), evidence.records)


def llg_star(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Impact and offset from dummy inputs sent through the model: zeros, ones and noise, or
    sentences of random tokens."""
    module, shape = fresh(case), case.knowledge.input_shape
    rng = case.seed.child(evidence.target.id, "llg_star").torch()
    dummies = _dummies(case.knowledge.schema, shape, rng)
    seen = answers(module, evidence.base, dummies)
    influence = _influence([seen] * case.knowledge.classes, evidence.records)
    sums = head(evidence.gradient, module).weight.sum(1)
    return _extract(sums, influence, seen, evidence.records)


def _dummies(schema: Schema, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    if isinstance(schema, Text):
        return sentences(schema, DUMMIES, rng)
    noise = torch.rand(DUMMIES, *shape, generator=rng)
    return torch.cat([torch.zeros(1, *shape), torch.ones(1, *shape), noise])


def llg_plus(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Impact and offset from auxiliary records, of each class its own where they show it.

    Public labels count as the model's classes where it agrees with at least half of them; else
    every public input stands for every class. Raises AttackError without public data.
    """
    module, (inputs, labels) = fresh(case), public(case, evidence, AUXILIARY)
    seen = answers(module, evidence.base, inputs)
    own = bool((seen.posteriors.argmax(1) == labels).float().mean() >= OWN_CLASSES)
    influence = _influence(
        [_of_class(seen, labels, k) if own else seen for k in range(case.knowledge.classes)],
        evidence.records,
    )
    sums = head(evidence.gradient, module).weight.sum(1)
    return _extract(sums, influence, seen, evidence.records)


def _of_class(seen: Stand, labels: Tensor, label: int) -> Stand:
    """What the model says to the inputs of a class; to all of them, where it has none."""
    rows = labels == label
    return Stand(seen.posteriors[rows], seen.features[rows]) if rows.any() else seen


def _influence(by_class: Sequence[Stand], records: int) -> Influence:
    """From batches of one class each: a record of class c adds (p_k - [k = c]) sum_j h_j / n to
    g_k."""
    classes = len(by_class)
    added = torch.stack(
        [
            ((seen.posteriors - own) * seen.features.sum(1, keepdim=True)).mean(0)
            for seen, own in zip(by_class, torch.eye(classes), strict=True)
        ]
    )
    own = added.diagonal()
    impact = float(own.mean()) * (1 + 1 / classes) / records
    return Influence(impact, (added.sum(0) - own) / (classes - 1))


def _extract(
    sums: Tensor, influence: Influence, seen: Stand, records: int
) -> tuple[Tensor, Tensor]:
    """A label for each negative sum; then, until all are named, the class of least g_k, from which
    the impact is taken off at each naming."""
    impact = influence.impact or -float(sums.abs().mean().clamp_min(1e-12))
    counts = (sums - influence.offset) / impact
    return allot(counts, negative(sums), seen.spread(records), records, seen.doubt)
