"""GradInversion's rule for the labels of a batch (Yin et al. 2021)."""

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.layer import fresh, head


def gradinversion(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(labels [records] in ascending order, confidence [records]).

    The n classes of smallest min_j G_kj, G the last layer's weight gradient [classes, features].
    Behind non-negative features only rows of classes in the batch have negative entries. No class
    is named twice before all have been; confidence is 1 where the minimum is negative, else 0.
    """
    lowest = head(evidence.gradient, fresh(case)).weight.min(1).values
    order = lowest.argsort(stable=True)
    rounds = -(-evidence.records // len(order))
    picked = order.repeat(rounds)[: evidence.records]
    sure = (lowest[picked] < 0).float()
    sure[len(order) :] = 0.0
    ranked = picked.argsort(stable=True)
    return picked[ranked], sure[ranked]
