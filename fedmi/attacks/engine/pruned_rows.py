"""Which token stands at which place, where parts of the rows of places were pruned."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from fedmi.attacks.engine.embedded import PLACES, TABLE
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.token_rows import TokenRows

CLOSE = 1e-4
"""Of a place's row: what rounding leaves of the difference to the rows of its tokens."""
FEWEST = 3
"""Entries that have to be seen for two rows to be compared."""
MOST = 2
"""Tokens at one place that are looked for."""


def matched(evidence: Evidence, seen: TokenRows) -> Iterator[tuple[int, int, Tensor, bool]]:
    """(token, place, the token's row, whether that is whole) of what no other token explains.

    A place's row is the sum of those of its tokens, if they stand nowhere else, entry by entry: so
    also in the entries that were kept. Of each place, sets of up to `MOST` tokens are tried, and
    one is taken if no other fits.
    """
    table, places = (evidence.gradient[name].double() for name in (TABLE, PLACES))
    there = [(evidence.support or {})[name].bool() for name in (TABLE, PLACES)]
    rows, kept = table[seen.ids], there[0][seen.ids]
    sets = torch.tensor(_sets(len(seen.ids), min(MOST, evidence.records)))
    sums = torch.where(sets[..., None] >= 0, rows[sets.clamp_min(0)], 0.0).sum(1)
    both = torch.where(sets[..., None] >= 0, kept[sets.clamp_min(0)], True).all(1)
    for place in range(1, evidence.input_shape[2]):
        compared = both & there[1][place]
        gap = ((sums - places[place]) * compared).norm(dim=1)
        size = (places[place] * compared).norm(dim=1)
        fits = torch.nonzero((gap <= CLOSE * size) & (compared.sum(1) >= FEWEST)).flatten()
        if len(fits) == 1:
            for one in sets[fits[0]].tolist():
                if one >= 0:
                    yield int(seen.ids[one]), place, rows[one], bool(kept[one].all())


def _sets(count: int, most: int) -> list[tuple[int, ...]]:
    """All sets of 1 to `most` of so many things, filled up with -1."""
    return [
        (*some, *[-1] * (most - size))
        for size in range(1, most + 1)
        for some in combinations(range(count), size)
    ]
