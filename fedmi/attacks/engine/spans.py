"""The row space of a linear layer's gradient, and which inputs of the layer can lie in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import Evidence

ROUNDING = 4e-8
"""Of the largest singular value: what float32 sums leave of a zero."""
FAINTEST = 1e-9
"""Of a row's length: less than rounding can leave of it in a direction."""
TAIL = 8
"""One in so many directions, those with the least in them, show the noise of each row."""
GAP = 10.0
"""Ratio of two neighbouring singular values from which the lower one is taken for noise."""
UNEVEN = 4.0
"""Noise in the strongest directions without signal, as a multiple of what the weakest show."""
WORST = 3.0
"""Multiple of the noise up to which a singular value may be noise."""
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

    Rows of which an entry was not seen are left out. float32 rounds each row by itself: where the
    noise is no more than rounding leaves, rows are divided by the noise that they have in the
    directions with the least in them, which shows inputs whose part of the whole is below it.
    """
    parts = [_seen_rows(evidence, layer) for layer in layers]
    joint = torch.cat([torch.cat([weight, bias[:, None]], 1) for weight, bias in parts]).double()
    scale = joint.norm().clamp_min(1e-300)
    joint = joint / scale
    values, rows = _svd(joint)
    rounding = _rounding(evidence, layers, len(joint)) / float(scale)
    floor = max(ROUNDING * float(values[0]), rounding)
    if len(values) < 3 or float(values[-2]) > WORST * floor:
        return _span(values, rows, _noise(values, floor))
    for _ in range(2):
        joint = joint / _row_noise(joint, rows)
        values, rows = _svd(joint)
    return _span(values, rows, sqrt(len(joint)) + sqrt(joint.shape[1]), UNEVEN)


def _row_noise(joint: Tensor, rows: Tensor) -> Tensor:
    """[m, 1]: standard deviation of the noise in the entries of each row."""
    least = rows[-1 - max(FEWEST_FREE, len(rows) // TAIL) : -1]
    seen = (joint @ least.T).square().mean(1, keepdim=True).sqrt()
    faintest = FAINTEST * joint.norm(dim=1, keepdim=True)
    return torch.maximum(seen, faintest).clamp_min(1e-300)


def _svd(joint: Tensor) -> tuple[Tensor, Tensor]:
    """(singular values, right singular vectors), as many as the width."""
    width = joint.shape[1]
    padded = torch.cat([joint, joint.new_zeros(max(0, width - len(joint)), width)])
    _, values, rows = torch.linalg.svd(padded, full_matrices=False)
    return values, rows


def _span(values: Tensor, rows: Tensor, noise: float, uneven: float = 1.0) -> Span:
    rank = int((values > WORST * uneven * noise).sum())
    kept = noise / (values.square() + noise**2).sqrt()
    # one dimension is never used where normalisation has no shift: its outputs sum to zero
    return Span(kept[:, None] * rows, rank, noise, len(values) - 1 - rank < FEWEST_FREE)


def _noise(values: Tensor, floor: float) -> float:
    """The largest singular value that is noise: what comes after the widest gap; the floor where
    there is no gap."""
    tail = values[:-1].clamp_min(floor / 100)
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


def whole_rows(evidence: Evidence, layers: Sequence[str]) -> int:
    """Rows of the layers' gradients that were seen whole."""
    return sum(len(_seen_rows(evidence, layer)[0]) for layer in layers)


def _seen_rows(evidence: Evidence, layer: str) -> tuple[Tensor, Tensor]:
    weight, bias = (evidence.gradient[f"{layer}.{part}"] for part in ("weight", "bias"))
    support = evidence.support or {}
    seen = support.get(f"{layer}.weight", torch.ones_like(weight)).bool().all(1)
    seen = seen & support.get(f"{layer}.bias", torch.ones_like(bias)).bool()
    return weight[seen], bias[seen]
