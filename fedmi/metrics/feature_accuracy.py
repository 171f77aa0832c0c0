"""Share of the columns of a table that were recovered: all, categories alone, numbers alone."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmi.exposure.schema import Table
from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.samples import SampleMetric
from fedmi.metrics.tables import categorical, recovered


class ColumnAccuracy(SampleMetric):
    """Mean over rows, and columns that are `counted`, of whether the column is right.

    A category is right if its largest entry is the true level, a number if it is within 0.319
    standard deviations, as published (see `tables.recovered`). Blind guesses score far above 0:
    what public records alone give is beside it as prior-only.
    """

    paper: ClassVar[str] = (
        "Vero, Balunovic, Dimitrov, Vechev: TabLeak - Tabular Data Leakage in Federated Learning. "
        "ICML 2023"
    )

    higher_is_leakier = True
    schemas: ClassVar[frozenset[str]] = frozenset({"table"})

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        """NaN for records that are no table, or have no column of the kind."""
        schema = matched.schema
        if not isinstance(schema, Table):
            return torch.full((len(samples),), torch.nan)
        right = recovered(schema, samples, matched.references)
        return right[:, self.counted(categorical(schema))].double().mean(1)

    @abstractmethod
    def counted(self, categories: Tensor) -> Tensor:
        """[columns] boolean, true for a category -> [columns] boolean, which are counted."""


class FeatureAccuracy(ColumnAccuracy):
    """Share of all columns that are right; see `ColumnAccuracy`."""

    kind: Literal["feature_accuracy"] = "feature_accuracy"

    def counted(self, categories: Tensor) -> Tensor:
        return torch.ones_like(categories)


class CategoricalAccuracy(ColumnAccuracy):
    """Share of the categories that are right; see `ColumnAccuracy`."""

    kind: Literal["categorical_accuracy"] = "categorical_accuracy"

    def counted(self, categories: Tensor) -> Tensor:
        return categories


class NumericAccuracy(ColumnAccuracy):
    """Share of the numbers that are within the tolerance; see `ColumnAccuracy`."""

    kind: Literal["numeric_accuracy"] = "numeric_accuracy"

    def counted(self, categories: Tensor) -> Tensor:
        return ~categories
