"""How labels come to lie over a client's local steps, and what is odd about them."""

from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import doubts
from fedmi.attacks.engine.plan import deal
from fedmi.exposure.words import Fact

UNLABELLED = "batch_order_without_labels"


def ordered(case: Case, evidence: Evidence) -> bool:
    """Whether the labels came in the granted batch order; recovered ones come in none."""
    known = Fact.BATCH_ORDER in case.knowledge.facts
    return known and evidence.target.id in case.knowledge.labels


def dealt(case: Case, evidence: Evidence, labels: Tensor, number: int) -> Tensor:
    """Labels [n] in the granted order, or dealt over the steps: evenly for number 0, at random for
    every other."""
    if ordered(case, evidence):
        return labels
    if not number or not evidence.plan.order_matters:
        return deal(labels, evidence.plan)
    rng = case.seed.child(evidence.target.id, "order", number).torch()
    return labels.sort().values[torch.randperm(len(labels), generator=rng)]


def doubted(case: Case, evidence: Evidence) -> Evidence:
    """With flags for what is odd about the labels, where they are not granted."""
    if evidence.target.id in case.knowledge.labels:
        return evidence
    flags = evidence.flags | doubts(case, evidence)
    if Fact.BATCH_ORDER in case.knowledge.facts and evidence.plan.order_matters:
        flags |= {UNLABELLED}
    return replace(evidence, flags=flags)
