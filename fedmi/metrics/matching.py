"""Which reconstruction is of which private record: optimal assignment, by pixels."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmi.data.truth import Truth
from fedmi.exposure.knowledge import Target
from fedmi.exposure.schema import Schema
from fedmi.metrics.base import Matched

WORST = 1e12
"""Squared distance of a sample that is not finite: it takes what record is left."""


def match(
    samples: Tensor | None, recovered_labels: Tensor | None, target: Target, truth: Truth
) -> Matched:
    """The reconstruction of one target beside its private records.

    samples: [m, C, H, W] in [0, 1], the attack's most confident first. recovered_labels: [k].

    A class target keeps the first sample, beside the mean of the class's private records. A
    batch target of n records keeps the first n samples, paired with the records so that the
    summed cost by the records' schema (squared error of pixels, columns or tokens that differ) is
    least (Hungarian algorithm); a record that gets no sample is scored on one without content
    (mid-grey, padding), so that returning less is no better than returning a guess without content.
    A target of planted canaries has their coins as labels, in order, and no samples.
    Rows come in the order of the private records, whatever the order of the samples.

    Raises ValueError for samples of another shape or range, LookupError if the target has no
    record.
    """
    if target.id in truth.coins:
        return _coins(torch.from_numpy(truth.coins[target.id]), recovered_labels)
    records = truth.behind(target)
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.labels)
    identities = torch.from_numpy(records.identities)
    of_class = target.label is not None
    if of_class:
        same = bool((identities == identities[0]).all())
        inputs, labels = inputs.double().mean(0, keepdim=True).float(), labels[:1]
        identities = identities[:1] if same else torch.full((1,), -1)
    if samples is not None:
        _check(samples, inputs, target, records.schema)
        samples = _assign(samples.detach()[: len(inputs)].float(), inputs, records.schema)
    return Matched(samples, inputs, labels, identities, recovered_labels, of_class, records.schema)


def _coins(coins: Tensor, guesses: Tensor | None) -> Matched:
    nothing = torch.zeros(len(coins), 0)
    return Matched(None, nothing, coins, torch.full((len(coins),), -1), guesses)


def _check(samples: Tensor, references: Tensor, target: Target, schema: Schema) -> None:
    if samples.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"samples of target '{target.id}' have shape {tuple(samples.shape)}; "
            f"[m, *{tuple(references.shape[1:])}] would be right"
        )
    if flaw := schema.flaw(samples[samples.isfinite()]):
        raise ValueError(f"samples of target '{target.id}' {flaw}")


def _assign(samples: Tensor, references: Tensor, schema: Schema) -> Tensor:
    """[m <= n, C, H, W] -> [n, C, H, W], the samples in the order of their references."""
    cost = schema.cost(samples, references).nan_to_num(nan=WORST, posinf=WORST)
    rows, columns = linear_sum_assignment(cost.numpy())
    ordered = schema.missing(tuple(references.shape))
    ordered[torch.from_numpy(columns)] = samples[torch.from_numpy(rows)]
    return ordered
