"""Where the last layer's gradient contradicts what is known of the update, or says nothing."""

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind
from fedmi.attacks.engine.labels.best import ROUNDING
from fedmi.attacks.engine.labels.layer import fresh, head, last_linear, stand

EPSILON: float = 2.0**-23
"""Relative rounding of float32."""
SILENT = "zero_gradients_in_last_layer"


def doubts(case: Case, evidence: Evidence) -> frozenset[str]:
    """Flags: a last layer without a gradient, or more classes in it than there are records.

    None where the last layer is not linear.
    """
    try:
        last_linear(fresh(case))
    except AttackError:
        return frozenset()
    if silent(case, evidence):
        return frozenset({SILENT})
    shown = len(present(case, evidence))
    if shown <= evidence.records:
        return frozenset()
    return frozenset({f"more_classes_than_records: {shown} for {evidence.records}"})


def silent(case: Case, evidence: Evidence) -> bool:
    """Whether the update left the last layer, if it is linear, exactly as it was."""
    try:
        last = head(evidence.descent, fresh(case))
    except AttackError:
        return False
    return not last.weight.any() and (last.bias is None or not last.bias.any())


def guessed(case: Case, evidence: Evidence) -> Tensor:
    """Random labels [records]."""
    labels = blind(case, evidence, samples=False).labels
    assert labels is not None
    return labels


def present(case: Case, evidence: Evidence) -> Tensor:
    """Classes with a sign that no record of another class can cause, beyond rounding.

    That is a negative entry of the bias gradient or, behind non-negative features, of the class's
    row of the weight gradient.
    """
    module = fresh(case)
    last = head(evidence.gradient, module)
    shown = torch.zeros(len(last.weight), dtype=torch.bool)
    if last.bias is not None:
        shown |= last.bias < -_rounding(evidence, f"{last.name}bias")
    if not stand(case, evidence, module).signed:
        shown |= (last.weight < -_rounding(evidence, f"{last.name}weight")).any(1)
    return shown.nonzero().flatten()


def _rounding(evidence: Evidence, name: str) -> Tensor:
    """What the entries of a gradient may be off by; an update carries the weights' own rounding."""
    gradient, descent = evidence.gradient[name], evidence.descent[name]
    known: Tensor = ROUNDING * gradient.abs().max()
    if evidence.of_gradient:
        return known
    steps = 1 + max(map(len, evidence.plan.parties))
    scale: Tensor = gradient.norm() / descent.norm().clamp_min(1e-30)
    return known + steps * EPSILON * scale * evidence.base[name].abs()
