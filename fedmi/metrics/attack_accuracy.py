"""Share of samples that the evaluator takes for the class they should show."""

from typing import Literal

import torch
from torch import Tensor

from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.samples import SampleMetric


class AttackAccuracyTop1(SampleMetric):
    """1 where the evaluator's first guess is the true label; chance is 1 / classes."""

    kind: Literal["attack_accuracy_top1"] = "attack_accuracy_top1"
    paper = "Zhang et al.: The Secret Revealer. CVPR 2020"

    schemas = frozenset({"pixels", "table", "text"})
    higher_is_leakier = True

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        return _among_first(1, samples, matched, judge)


class AttackAccuracyTop5(SampleMetric):
    """1 where the true label is among the evaluator's first five; chance is 5 / classes.

    NaN with five classes or fewer, where it could not fail.
    """

    kind: Literal["attack_accuracy_top5"] = "attack_accuracy_top5"
    paper = AttackAccuracyTop1.paper

    schemas = frozenset({"pixels", "table", "text"})
    higher_is_leakier = True

    def defined(self, shape: tuple[int, int, int], classes: int) -> bool:
        return classes > 5

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        if judge.classes <= 5:
            return torch.full((len(samples),), torch.nan)
        return _among_first(5, samples, matched, judge)


def _among_first(k: int, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
    guesses = judge.logits(samples).topk(k, dim=1).indices
    return (guesses == matched.labels[:, None]).any(1).double()
