"""iLRG: how many records of each class, from class-wise embeddings (Ma et al. 2023)."""

import math

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.allot import listed
from fedmi.attacks.engine.labels.layer import Head, fresh, head, head_with_bias, sharpness, stand

LARGEST = 1e10
"""An embedding is cut off here, where a class's bias gradient vanishes."""


def irlg(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(labels [records] in ascending order, confidence [records] in [0, 1]).

    Row k of the last layer's gradient over its bias, h_k = G_k / b_k, is about the mean feature of
    class k's records, and p_k = softmax(W h_k + b) their posterior. The counts then solve
    n b_i = sum_k n_k (p_ki - [i = k]) and sum_k n_k = n by the pseudo-inverse, are rounded, and
    mended to sum to n. Confidence falls with how decided the model is, here or on the probes.
    Raises AttackError where the last layer has no bias.
    """
    module = fresh(case)
    head_with_bias(module)
    last = head(evidence.gradient, module)
    counts = solved(evidence, last)
    named = class_posteriors(evidence, last)[counts > 0.5]
    doubts = [stand(case, evidence, module).sharpness, *([sharpness(named)] if len(named) else [])]
    return listed(counts, evidence.records, math.sqrt(max(doubts)))


def solved(evidence: Evidence, last: Head) -> Tensor:
    """The counts that solve iLRG's system, not yet whole. [classes]"""
    assert last.bias is not None
    posteriors, one = class_posteriors(evidence, last), torch.ones(1)
    apart = posteriors.T - torch.eye(len(posteriors))
    system = torch.cat([one.expand(1, len(posteriors)), apart]).double()
    sides = evidence.records * torch.cat([one, last.bias]).double()
    return torch.mv(torch.linalg.pinv(system), sides)


def class_posteriors(evidence: Evidence, last: Head) -> Tensor:
    """Row k: the model's posterior at the embedding of class k. [classes, classes]"""
    assert last.bias is not None
    embedding = last.weight / torch.where(last.bias == 0, 1e-30, last.bias)[:, None]
    embedding = embedding.clamp(-LARGEST, LARGEST)
    weight, offset = evidence.base[f"{last.name}weight"], evidence.base[f"{last.name}bias"]
    logits = embedding.double() @ weight.double().T + offset.double()
    return logits.softmax(1).float()
