"""What a metric is handed, and what it declares."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedmi.exposure.component import Component
from fedmi.exposure.schema import PIXELS, Schema
from fedmi.metrics.judge import Judge


@dataclass(frozen=True)
class Matched:
    """One target's reconstruction beside its truth, row by row after optimal matching.

    samples, references: [n, C, H, W] in [0, 1]; labels: [n] true labels. For a class target
    n = 1, `of_class` is true, and the reference is the mean of the class's private records.
    identities: [n], or -1 where a class shows more than one. recovered_labels: what the attack
    says the labels are, [m], unordered, or None. schema: what the numbers of a record mean.
    """

    samples: Tensor | None
    references: Tensor
    labels: Tensor
    identities: Tensor
    recovered_labels: Tensor | None
    of_class: bool = False
    schema: Schema = PIXELS


class Metric(Component):
    """A score per target; means over the target's records."""

    measures: ClassVar[Literal["samples", "one_sample", "labels", "membership"]] = "samples"
    higher_is_leakier: ClassVar[bool]
    unit: ClassVar[str] = ""
    schemas: ClassVar[frozenset[str]] = frozenset({"pixels", "table"})
    """Kinds of records that it is defined for."""

    def defined(self, shape: tuple[int, int, int], classes: int) -> bool:
        """Whether it means anything for records [C, H, W] of so many classes."""
        return True

    @abstractmethod
    def score(self, matched: Matched, judge: Judge) -> float:
        """The mean over the matched rows; NaN where it is not defined."""
