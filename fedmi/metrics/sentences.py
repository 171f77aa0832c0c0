"""The base of metrics that compare sentences, row by row."""

from abc import abstractmethod

import torch
from torch import Tensor

from fedmi.exposure.schema import END, UNKNOWN, Text
from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.samples import SampleMetric


class SentenceMetric(SampleMetric):
    """The mean over the sentences of `compare`; NaN for class targets, which are no sentence."""

    schemas = frozenset({"text"})
    higher_is_leakier = True

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        schema = matched.schema
        if matched.of_class or not isinstance(schema, Text):
            return torch.full((len(samples),), torch.nan)
        pairs = zip(samples.flatten(1), matched.references.flatten(1), strict=True)
        return torch.tensor([self.compare(found, true, schema) for found, true in pairs])

    @abstractmethod
    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        """[length] ids of a sample, [length] ids of its reference -> a score."""


def tokens(ids: Tensor) -> list[int]:
    """Ids of a sentence in order, without padding, [CLS] and [SEP]."""
    kept = (ids == UNKNOWN) | (ids > END)
    return [int(token) for token in ids[kept]]


def spoken(ids: Tensor, schema: Text) -> list[str]:
    """The sentence's words in order; punctuation marks are none."""
    return [word for word in schema.words(ids) if any(c.isalnum() for c in word)]


def f1(common: float, found: int, true: int) -> float:
    """2 PR / (P + R) = 2 common / (found + true); 1 where there is nothing on either side."""
    return 2 * common / (found + true) if found + true else 1.0
