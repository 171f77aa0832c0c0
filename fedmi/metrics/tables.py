"""Which columns of a table's rows were recovered."""

import torch
from torch import Tensor

from fedmi.exposure.schema import Table

TOLERANCE = 0.319
"""Standard deviations of a number's column, either way (Vero et al. 2023)."""


def recovered(schema: Table, samples: Tensor, references: Tensor) -> Tensor:
    """[n, 1, 1, entries] twice, row by row -> [n, columns], 1 where the column is right.

    A category: its largest entry is the true level. A number: within 0.319 standard deviations of
    its column, as the schema tells them (published ones, not those of the private records), or of
    a uniform number where it does not tell.
    """
    ours, theirs = samples.flatten(1), references.flatten(1)
    found = []
    for column, place in zip(schema.columns, schema.places, strict=True):
        first, second = ours[:, place], theirs[:, place]
        if column.levels:
            found.append(first.argmax(1) == second.argmax(1))
        else:
            allowed = TOLERANCE * column.scaled_deviation + 1e-6
            found.append(((first - second).abs() <= allowed)[:, 0])
    return torch.stack(found, 1)


def categorical(schema: Table) -> Tensor:
    """[columns], true for a category."""
    return torch.tensor([bool(column.levels) for column in schema.columns])
