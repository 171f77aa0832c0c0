"""The row space of a linear layer's gradient, and which inputs of the layer can lie in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import Evidence

ROUNDING = 4e-8
"""Of the largest singular value: what float32 sums leave of a zero."""
PLATEAU = 8.0
"""Multiple of it up to which what such sums leave may rise."""
GAP = 10.0
"""Ratio of two neighbouring singular values from which the lower one is taken for noise."""
FEWEST_FREE = 3
"""Dimensions outside the span from which being in it is no accident."""


@dataclass(frozen=True)
class Span:
    """Row space of [dL/dW | dL/db] = D^T [x | 1], of a layer of `width` inputs x.

    outside [width + 1, width + 1]: what of [x | 1] the rows do not explain; of singular vector v
    with value s it keeps noise / sqrt(s^2 + noise^2). rank: singular values above the noise.
    full: the span leaves fewer than `FEWEST_FREE` dimensions, or noise fills them.
    """

    outside: Tensor
    rank: int
    noise: float
    full: bool

    def distance(self, inputs: Tensor) -> Tensor:
        """[..., width] -> [...]: how far outside, as a share of the length; 0 = in the span."""
        extended = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
        left: Tensor = (extended @ self.outside.T).norm(dim=-1)
        share: Tensor = left / extended.norm(dim=-1)
        return share


def span(evidence: Evidence, layers: Sequence[str]) -> Span:
    """The span of these linear layers, which all have the same inputs.

    Rows of which an entry was not seen are left out.
    """
    parts = [_seen_rows(evidence, layer) for layer in layers]
    joint = torch.cat([torch.cat([weight, bias[:, None]], 1) for weight, bias in parts]).double()
    scale = joint.norm().clamp_min(1e-300)
    rounding = max(_rounding(evidence, layers, len(joint)) / float(scale), 0.0)
    return _span(joint / scale, rounding)


def _span(joint: Tensor, rounding: float) -> Span:
    width = joint.shape[1]
    padded = torch.cat([joint, joint.new_zeros(max(0, width - len(joint)), width)])
    _, values, rows = torch.linalg.svd(padded, full_matrices=False)
    noise = _noise(values, max(ROUNDING * float(values[0]), rounding))
    rank = int((values > 3 * noise).sum())
    kept = noise / (values.square() + noise**2).sqrt()
    # one dimension is never used where normalisation has no shift: its outputs sum to zero
    return Span(kept[:, None] * rows, rank, noise, width - 1 - rank < FEWEST_FREE)


def _noise(values: Tensor, floor: float) -> float:
    """The largest singular value that is noise: the known floor where the spectrum reaches it,
    else what comes after the widest gap; the floor where there is no gap at all."""
    tail = values[:-1].clamp_min(floor / 100)
    if len(tail) < 2 or float(tail[-1]) <= 3 * floor:
        plateau = tail[tail <= PLATEAU * ROUNDING * float(values[0])]
        return max(floor, float(plateau.max())) if len(plateau) else floor
    drops = tail[:-1] / tail[1:]
    widest = int(drops[1:].argmax()) + 1 if len(drops) > 1 else 0
    return float(tail[widest + 1]) if float(drops[widest]) > GAP else floor


def _rounding(evidence: Evidence, layers: Sequence[str], rows: int) -> float:
    """Spectral norm of what rounding leaves in an update, which is a difference of parameters."""
    if evidence.of_gradient:
        return 0.0
    found = 0.0
    for layer in layers:
        base = evidence.base[f"{layer}.weight"]
        ulp = torch.finfo(torch.float32).eps * float(base.square().mean().sqrt())
        scale = _ratio(evidence.descent, evidence.gradient, f"{layer}.weight")
        found = max(found, ulp / sqrt(12) * (sqrt(rows) + sqrt(base.shape[1])) / scale)
    return found


def _ratio(descent: Mapping[str, Tensor], gradient: Mapping[str, Tensor], name: str) -> float:
    whole = float(gradient[name].norm())
    return float(descent[name].norm()) / whole if whole > 0 else 1.0


def _seen_rows(evidence: Evidence, layer: str) -> tuple[Tensor, Tensor]:
    weight, bias = (evidence.gradient[f"{layer}.{part}"] for part in ("weight", "bias"))
    support = evidence.support or {}
    seen = support.get(f"{layer}.weight", torch.ones_like(weight)).bool().all(1)
    seen = seen & support.get(f"{layer}.bias", torch.ones_like(bias)).bool()
    return weight[seen], bias[seen]
