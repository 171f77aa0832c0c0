"""What pruning cut from the last layer, where the others of its column tell.

By softmax and cross-entropy the slopes of the logits sum to zero over classes, of any records and
over any number of steps, and so do those of every column of the last linear layer: the only entry
that was cut of a column is minus the sum of the others.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.labels.layer import fresh, last_linear


def completed(case: Case, evidence: Evidence) -> Evidence:
    """The evidence with such entries put back; as it was where the last layer is not linear."""
    try:
        name, _ = last_linear(fresh(case))
    except AttackError:
        return evidence
    prefix = f"{name}." if name else ""
    return replace(
        evidence,
        gradient=_completed(evidence.gradient, prefix),
        descent=_completed(evidence.descent, prefix),
    )


def _completed(slopes: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    last = {name: slopes[name] for name in (f"{prefix}weight", f"{prefix}bias") if name in slopes}
    return {**slopes, **{name: _filled(part) for name, part in last.items()}}


def _filled(part: Tensor) -> Tensor:
    """part: [classes, ...]."""
    cut = part == 0
    alone = cut & (cut.sum(0) == 1)
    return torch.where(alone, -part.sum(0, keepdim=True).expand_as(part), part)
