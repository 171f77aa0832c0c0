"""Gradient-space signal to noise: whether one record outshouts all others of a batch."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.deployments.federated.detectors.base import Detector, Received


class GradientSNR(Detector):
    """D-SNR, the disaggregation signal-to-noise ratio of the client's own first batch.

        D-SNR = max over layers l of  max_i |g_il| / (sum_i |g_il| - max_i |g_il|)

    with g_il the gradient of record i's loss in the weight of dense or convolutional layer l.
    Attacks that make one record's gradient survive the mean of a batch drive it up; so does an
    honest model that has learned all records of a batch but one. Infinite where only one record
    has a gradient in some layer; 0 where none has any, which is for others to notice. The paper
    leaves the first convolution out; here it counts.

    Beyond the paper, a client may look at part of its batch only (`records`).
    """

    kind: Literal["gradient_snr"] = "gradient_snr"
    paper: ClassVar[str] = (
        "Garov, Dimitrov, Jovanovic, Vechev: Hiding in Plain Sight: Disguising Data Stealing "
        "Attacks in Federated Learning. ICLR 2024"
    )
    records: int = Field(
        default=64, ge=2, le=4096, description="records of the first batch that are looked at"
    )

    fewest: ClassVar = 2

    def statistic(self, seen: Received) -> float:
        return signal_to_noise(seen.norms(self.records))


def signal_to_noise(norms: Tensor) -> float:
    """The largest ratio over layers of the largest norm to the sum of all others; [layers, n]."""
    if not norms.numel():
        return 0.0
    doubles = norms.double().sort(dim=1).values
    signal, noise = doubles[:, -1], doubles[:, :-1].sum(1)
    ratios = torch.where(signal == 0, torch.zeros_like(signal), signal / noise)
    return float(ratios.max())
