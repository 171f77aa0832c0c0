"""The strongest rule for what is known: a choice among the published ones, and their union."""

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.allot import allot
from fedmi.attacks.engine.labels.counts import mean_slope
from fedmi.attacks.engine.labels.irlg import solved
from fedmi.attacks.engine.labels.layer import Head, Stand, fresh, head, stand
from fedmi.attacks.engine.labels.single import rank_one
from fedmi.attacks.engine.labels.steps import several_steps, simulated

UNTRAINED = 0.05
"""Sharpness of the model's answers up to which its posteriors are known well enough to count by."""
ROUNDING = 1e-5
"""Share of the largest entry of a gradient that a sign must exceed to be believed."""


def auto(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(labels [records] in ascending order, confidence [records] in [0, 1]).

    One record: iDLG on the whole last layer (`rank_one`). More: each class that shows a negative
    sign is named once (in the bias gradient, as by iDLG; behind non-negative features in any entry
    of its row, as by GradInversion; either is proof). The rest are named by estimated counts. While
    the model's answers are all alike (sharpness at most 0.05), these are iLRG's, or
    n (mean p_k - b_k) without a bias; for an update of several steps, simulating them. Else they
    are in proportion to the negative part of the bias gradient (LLG's rule): a guess, since a hard
    record weighs as many easy ones, and confidence says so.
    """
    module = fresh(case)
    last, seen = head(evidence.gradient, module), stand(case, evidence, module)
    if evidence.records == 1:
        return rank_one(last, seen)
    counts = _counts(case, evidence, last, seen)
    certain = _present(mean_slope(last, seen), last.weight, seen.signed)
    return allot(counts, certain, seen.spread(evidence.records), evidence.records, seen.sharpness)


def _counts(case: Case, evidence: Evidence, last: Head, seen: Stand) -> Tensor:
    slope = mean_slope(last, seen)
    mass = -slope.clamp_max(0)
    shared = evidence.records * mass / mass.sum().clamp_min(1e-12)
    if seen.sharpness > UNTRAINED:
        return shared
    alike = evidence.records * (seen.posteriors.mean(0) - slope)
    if last.bias is not None:
        alike = solved(evidence, last)
    if several_steps(evidence):
        return simulated(case, evidence, (alike, shared), seen)
    return alike


def _present(slope: Tensor, weight: Tensor, signed: bool) -> Tensor:
    """Classes that show a negative sign, clearest first."""
    depth = slope / slope.abs().max().clamp_min(1e-30)
    if not signed:
        depth = torch.minimum(depth, weight.min(1).values / weight.abs().max().clamp_min(1e-30))
    order = depth.argsort(stable=True)
    return order[depth[order] < -ROUNDING]
