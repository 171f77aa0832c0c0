"""Sentences found, as the answer to a target."""

from collections.abc import Sequence
from math import log10

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import recover
from fedmi.attacks.engine.labels.layer import answers, fresh, head
from fedmi.attacks.engine.prefixes import Found
from fedmi.exposure.schema import END, START

MISSING = "sentences_not_found"
SURE = 0.3
"""Error of p - onehot(y) up to which labels are told apart."""
GUESS, REPEATED = -1.0, -2.0
"""Confidence of a sentence that is not proven, and of one that only fills a place."""


def answered(case: Case, evidence: Evidence, found: Sequence[Found]) -> Reconstruction:
    """As many sentences as records: those proven first, then guesses, then copies of the surest."""
    records, length = evidence.records, evidence.input_shape[2]
    told = list(found[:records])
    flags = evidence.flags
    if sum(one.whole for one in told) < records:
        flags |= {MISSING}
    samples = torch.zeros(records, 1, 1, length)
    confidence = torch.full((records,), REPEATED)
    for row in range(records):
        one = told[row] if row < len(told) else (told[0] if told else Found((START, END), 1, False))
        samples[row, 0, 0, : len(one.tokens)] = torch.tensor(one.tokens[:length]).float()
        if row < len(told):
            confidence[row] = -log10(max(one.doubt, 1e-12)) if one.whole else GUESS - one.doubt / 2
    labels = _labels(case, evidence, samples) if MISSING not in flags else None
    if labels is None:
        labels = recover(case, evidence)[0]
    return Reconstruction(evidence.target, samples, labels, confidence, flags)


def bags(tokens: Tensor, records: int, length: int) -> list[Found]:
    """Tokens dealt in turn to sentences of at most `length` tokens."""
    inner = [token for token in tokens.tolist() if token > END]
    dealt = [inner[row::records][: length - 2] for row in range(records)]
    return [Found((START, *part, END), 1.0, False) for part in dealt]


@torch.no_grad()
def _labels(case: Case, evidence: Evidence, samples: Tensor) -> Tensor | None:
    """Labels [records] of the sentences that the batch is made of; None if they cannot be told.

    The last layer's gradient is D^T [h | 1] / n with D = p - onehot(y): known features h and
    answers p leave one D.
    """
    module = fresh(case)
    seen = answers(module.double(), evidence.base, samples.double())
    last = head(evidence.gradient, module)
    inputs, slopes = seen.features, last.weight.double()
    if last.bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        slopes = torch.cat([slopes, last.bias.double()[:, None]], 1)
    apart = (evidence.records * slopes @ torch.linalg.pinv(inputs, rtol=1e-6)).T
    labels = (apart - seen.posteriors).argmin(1)
    wanted = seen.posteriors - one_hot(labels, seen.posteriors.shape[1])
    return labels if float((apart - wanted).abs().max()) < SURE else None
