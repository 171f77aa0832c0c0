"""Share of a target's records that were recovered."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.samples import SampleMetric


class RecoveredExactly(SampleMetric):
    """Share of the records whose reconstruction has a PSNR of at least `threshold`; in [0, 1].

    The mean of [-10 log10(MSE) >= threshold] over records, for a data range of 1.
    """

    kind: Literal["recovered_exactly"] = "recovered_exactly"
    threshold: float = Field(
        default=30.0, gt=0, le=100, description="dB from which a record counts as recovered"
    )

    higher_is_leakier = True

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        error = (samples.double() - matched.references.double()).flatten(1).square().mean(1)
        return (error <= math.pow(10, -self.threshold / 10)).to(torch.float64)
