"""Many searches for the same rows of a table, read as one answer and its uncertainty."""

from math import e, log, pi

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmi.attacks.engine.tables import as_rows, columns_of
from fedmi.exposure.schema import Table

STRANGER = 1e3
"""What it costs to take a row for one of another label."""
WITHIN = 0.319
"""Half the width of what counts as one value of a number, in standard deviations of its column."""


def aligned(schema: Table, members: Tensor, labels: Tensor) -> Tensor:
    """[m, n, ..., entries] with each member's rows in the order of the first one's.

    labels: [m, n], as each member had them. Rows are paired so that the summed cost by the schema
    is least (Hungarian algorithm), and only with rows of the same label where there are as many.
    """
    rows = as_rows(schema, members)
    ordered = []
    for member, own, own_labels in zip(members, rows, labels, strict=True):
        cost = schema.cost(own, rows[0])
        cost = cost + STRANGER * (own_labels[:, None] != labels[0][None])
        taken, place = linear_sum_assignment(cost.cpu().numpy())
        order = torch.empty(len(own), dtype=torch.long)
        order[torch.from_numpy(place)] = torch.from_numpy(taken)
        ordered.append(member[order.to(member.device)])
    return torch.stack(ordered)


def pooled(members: Tensor) -> Tensor:
    """[m, n, ..., entries] -> the median of every entry over the members."""
    return members.quantile(0.5, dim=0)


def entropies(schema: Table, members: Tensor) -> Tensor:
    """[m, n, ..., entries] of aligned members -> [n, columns] in [0, 1], 0 = all agree.

    Of a category: the entropy of the members' mean shares, over that of equal ones. Of a number:
    that of a Gaussian of the members' standard deviation, in steps of twice 0.319 standard
    deviations of the column, over that of a uniform one in the same steps.
    """
    found = []
    for column, place in columns_of(schema):
        entries = members[..., place].flatten(2)
        if column.levels:
            shares = entries.mean(0)
            found.append(torch.special.entr(shares).sum(-1) / max(log(column.width), 1e-12))
        else:
            step = min(2 * WITHIN * column.scaled_deviation, 0.5)
            spread = entries.std(0, correction=0).clamp_min(1e-12)[..., 0]
            gaussian = 0.5 * (2 * pi * e * spread.square()).log()
            found.append((gaussian - log(step)) / -log(step))
    return torch.stack(found, -1).clamp(0, 1)
