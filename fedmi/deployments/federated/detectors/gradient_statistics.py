"""Gradients that honest models rarely give: one loud layer, layers or rows that are silent."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fedmi.deployments.federated.detectors.base import Detector, Received


class GradientStatistics(Detector):
    """The worst of four signs of the mean gradient on the client's own first batch.

    With g_l and W_l the gradient and the weight of dense or convolutional layer l:

        size     max_l |g_l| / |W_l|: one step would change much of a layer
        spread   log10 of the largest over the smallest root mean square of the g_l: layers that
                 pass little or nothing back
        loud     -log10(1 - max_l |g_l|^2 / sum_l |g_l|^2): one layer has it all
        silent   -log10(1 - s), s the largest share, over layers, of rows without any gradient:
                 neurons dead on all own records, or logits that no record moves

    Honest models show each at about 0.1 to 2. A gradient that is zero everywhere is infinitely
    suspicious; without records (Poisson sampling) there is none, and the statistic is 0.
    """

    kind: Literal["gradient_statistics"] = "gradient_statistics"

    def statistic(self, seen: Received) -> float:
        if not len(seen.labels):
            return 0.0
        return max((value for _, value in signs(seen)), default=0.0)


def signs(seen: Received) -> Iterator[tuple[str, float]]:
    """(sign, value); of a single layer, what needs none beside it."""
    gradients = [gradient.double() for gradient in seen.gradients.values()]
    if not gradients:
        return
    norms = torch.stack([gradient.norm() for gradient in gradients])
    weights = torch.stack([seen.weights[name].double().norm() for name in seen.gradients])
    if not norms.any():
        yield "size", math.inf
        return
    yield "size", float(torch.where(norms == 0, 0.0, norms / weights).max())
    yield "silent", _nearness(max(map(silent_rows, gradients)))
    if len(gradients) > 1:
        entries = torch.tensor([gradient.numel() for gradient in gradients])
        sizes = norms / entries.sqrt()
        yield "spread", float((sizes.max() / sizes.min()).log10())
        energy = norms.square()
        yield "loud", _nearness(float(energy.max() / energy.sum()))


def silent_rows(gradient: Tensor) -> float:
    """Share of rows that are zero throughout."""
    return float((gradient.flatten(1) == 0).all(1).double().mean())


def _nearness(share: float) -> float:
    """How near a share is to one: 0.9 -> 1, 0.99 -> 2, 1 -> infinite."""
    return math.inf if share >= 1 else -math.log10(1 - share)
