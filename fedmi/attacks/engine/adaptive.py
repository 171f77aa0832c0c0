"""What a known protection has destroyed in an update, and so is not worth matching."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.class_sums import completed
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.protected import PRUNING, names

SOTERIA, SIGNS = "soteria", "sign_compression"

SILENT = 1e-4
"""Of a layer's largest entry; below it, what is left of a zero after weight decay came off."""
TOO_MANY = 0.05
"""Share of a layer's columns that are zero without a dead feature to explain it."""


def adapted(case: Case, evidence: Evidence) -> Evidence:
    """The evidence with the support that is left behind the deployment's protections.

    Pruning: an entry that is zero was cut, and says nothing of its true value, but what the others
    of its column in the last layer tell (`class_sums`). Soteria: columns of
    the weight of one linear layer are cut, all else is not, so that matching the rest undoes it
    (Balunovic et al., Bayesian Framework for Gradient Leakage, ICLR 2022).
    """
    support = dict(evidence.support or {})
    if names(case, PRUNING):
        evidence = completed(case, evidence)
        for name, part in evidence.descent.items():
            support[name] = support.get(name, torch.ones_like(part).bool()) & (part != 0)
    if names(case, SOTERIA) and (layer := defended(case, evidence)):
        weight, left = _join(layer, "weight"), _left(evidence, layer)
        support[weight] = support.get(weight, torch.ones_like(left)) & left
    nothing_left = all(name in support and not support[name].any() for name in evidence.descent)
    return evidence if not support or nothing_left else replace(evidence, support=support)


def defended(case: Case, evidence: Evidence) -> str:
    """Name of the linear layer that Soteria defends, "" if none can be.

    The one with the most columns that are zero though the features they belong to are not; the
    last one where no layer has more than `TOO_MANY`, as behind a transport that rounds.
    """
    assert case.knowledge.build is not None
    shares = {name: float(cut.double().mean()) for name, cut in _cut(case, evidence)}
    if not shares:
        return ""
    most = max(shares, key=shares.__getitem__)
    return most if shares[most] > TOO_MANY else [*shares][-1]


def _cut(case: Case, evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Each linear layer but a first one, which Soteria refuses, and its cut columns [features].

    Of a feature that is zero in all records (a dead ReLU) the column is zero too, but then so is
    the feature's own row in the layer before. All columns may be cut: of one record, Soteria takes
    the features that are not zero first. A layer that learns nothing at all is not a case of it.
    """
    assert case.knowledge.build is not None
    layers = [
        (name, layer)
        for name, layer in case.knowledge.build().named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    for (before, previous), (name, layer) in pairwise(layers):
        if not isinstance(layer, nn.Linear):
            continue
        cut = _silent(evidence, name, 0)
        if cut.all() and layer.bias is not None:
            cut = cut & bool(evidence.gradient[_join(name, "bias")].any())
        if isinstance(previous, nn.Linear) and previous.out_features == len(cut):
            cut = cut & ~_silent(evidence, before, 1)
        yield name, cut


def _left(evidence: Evidence, layer: str) -> Tensor:
    """Which entries of the defended weight are as they were: boolean, in its shape.

    In one step of one client all but the columns cut; over several, another choice was made in
    each, and a column that is not zero may lack its part of some of them.
    """
    part = evidence.gradient[_join(layer, "weight")]
    steps = sum(len(steps) for steps in evidence.plan.parties)
    if steps > 1 or len(evidence.target.clients) > 1:
        return torch.zeros_like(part).bool()
    cut = _silent(evidence, layer, 0)
    return (~cut).expand_as(part) if cut.any() else torch.zeros_like(part).bool()


def _silent(evidence: Evidence, layer: str, axis: int) -> Tensor:
    """Which columns (axis 0) or rows (axis 1) of a linear layer's weight gradient are zero."""
    weight = evidence.gradient[_join(layer, "weight")].abs()
    bias = evidence.gradient.get(_join(layer, "bias"), weight).abs()
    return weight.amax(axis) <= SILENT * torch.maximum(weight.max(), bias.max())


def _join(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter
