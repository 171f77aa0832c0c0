"""Rows of a table as a search sees them: shares of the levels, and numbers, that can be moved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError
from fedmi.exposure.schema import Column, Table


@dataclass(frozen=True)
class RelaxedRows:
    """A point [n, 1, 1, entries] that stands for rows of a table.

    softmax: a category's entries are logits of its levels, a number's entry is a logit; else all
    entries are those of the row, boxed into [0, 1]. fed: what the model is fed for the entries.
    """

    schema: Table
    softmax: bool = True
    fed: Callable[[Tensor], Tensor] | None = None

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        entries = self.shares(point) if self.softmax else point
        return self.fed(entries) if self.fed else entries, labels

    def shares(self, points: Tensor) -> Tensor:
        """[..., entries] of logits -> softmax of each category, sigmoid of each number."""
        parts = [
            points[..., place].softmax(-1) if column.levels else points[..., place].sigmoid()
            for column, place in columns_of(self.schema)
        ]
        return torch.cat(parts, -1)

    def project(self, points: Tensor) -> Tensor:
        return points if self.softmax else points.clamp(0, 1)


def columns_of(schema: Table) -> Sequence[tuple[Column, slice]]:
    return list(zip(schema.columns, schema.places, strict=True))


def as_rows(schema: Table, relaxed: Tensor) -> Tensor:
    """[..., entries] -> the nearest rows: the largest level of a category, a number in [0, 1]."""
    parts = [
        one_hot(relaxed[..., place].argmax(-1), column.width).to(relaxed)
        if column.levels
        else relaxed[..., place].clamp(0, 1)
        for column, place in columns_of(schema)
    ]
    return torch.cat(parts, -1)


def as_shares(schema: Table, relaxed: Tensor) -> Tensor:
    """[..., entries] in [0, 1] -> shares of the levels that sum to 1; equal ones where none is
    above 0. Numbers stay."""
    parts = []
    for column, place in columns_of(schema):
        entries = relaxed[..., place].clamp(0, 1)
        whole = entries.sum(-1, keepdim=True)
        equal = torch.full_like(entries, 1 / column.width)
        shares = torch.where(whole > 0, entries / whole.clamp_min(1e-12), equal)
        parts.append(shares if column.levels else entries)
    return torch.cat(parts, -1)


def table_of(case: Case) -> Table:
    """The columns of the case's records; AttackError if they are no table."""
    schema = case.knowledge.schema
    if not isinstance(schema, Table):
        raise AttackError(
            f"the records are {schema.kind}, not rows of a table: use 'inverting_gradients'"
        )
    return schema
