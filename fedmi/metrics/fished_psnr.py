"""PSNR of the one record that was fished out of a batch."""

import math
from typing import Literal

import torch

from fedmi.metrics.base import Matched, Metric
from fedmi.metrics.judge import Judge
from fedmi.metrics.psnr import PSNR


class FishedPSNR(Metric):
    """PSNR, in dB, of the record of the batch that is nearest to the single sample returned.

    For attacks that go for one record a target and do not say which it is. The nearest of many
    favours guesses: a grey or mean image is near to some record of a large batch, so that only what
    is above prior-only, which is scored in the same way, is leakage. The leakage table has the mean
    over targets; a largest value alone says nothing. An answer without content counts as one grey
    sample.
    """

    kind: Literal["fished_psnr"] = "fished_psnr"
    paper = "Wen et al.: Fishing for User Data in Large-Batch Federated Learning. ICML 2022"

    measures = "one_sample"
    higher_is_leakier = True
    unit = "dB"

    def score(self, matched: Matched, judge: Judge) -> float:
        samples = matched.samples
        if samples is None or not bool(samples.isfinite().all()):
            return math.nan
        blank = matched.schema.missing(tuple(samples.shape))
        shown = (samples != blank).flatten(1).any(1)
        if not shown.any():
            shown = torch.ones_like(shown)
        every = samples[shown][:1].expand_as(matched.references)
        return float(PSNR().each(every, matched, judge).max())
