"""What the gradients of the two embedding tables tell by themselves: which tokens, how many.

A row of the token table's gradient is the sum of the slopes dL/dx over all places of the batch that
hold the token; a row of the place table's is that over all sentences that reach the place.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.embedded import PLACES, TABLE
from fedmi.exposure.schema import END, PADDING, START

DEVIATIONS = 5.0
"""A row stands out of noise by so many (robust) standard deviations of the rows' lengths."""
ROUNDING = 1e-7
"""Share of the longest row that is no more than what weight decay leaves when it is taken off."""
CLEAN = 1e-3
"""Share of a place's row that the tokens' rows may leave unexplained."""
SHORTEST = 2
"""A sentence of no tokens: [CLS] [SEP]."""


@dataclass(frozen=True)
class TokenRows:
    """The tokens seen in a batch, strongest row first.

    ids: [m], padding left out; strength: [m], the length of each one's row; floor: length above
    which a row stands out; noisy: no row of the table is zero.
    """

    ids: Tensor
    strength: Tensor
    floor: float
    noisy: bool

    @property
    def words(self) -> Tensor:
        """Without [CLS] and [SEP]."""
        return self.ids[(self.ids != START) & (self.ids != END)]


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sentence, longest first; certain: the rows left no choice."""

    counts: tuple[int, ...]
    certain: bool


def token_rows(gradient: Mapping[str, Tensor]) -> TokenRows:
    """Tokens whose row of the table's gradient is not zero or, under noise, stands out.

    Exact for a clear gradient. Noise leaves no row at zero: the floor is then the median length of
    all rows plus `DEVIATIONS` times 1.48 median absolute deviations, as a batch holds few of a
    vocabulary's tokens.
    """
    lengths = gradient[TABLE].double().norm(dim=1)
    others = lengths[PADDING + 1 :]
    floor, noisy = ROUNDING * float(others.max()), bool((others > 0).all())
    if noisy:
        middle = others.median()
        floor = float(middle + DEVIATIONS * 1.4826 * (others - middle).abs().median())
    found = torch.nonzero(others > floor).flatten() + PADDING + 1
    found = found[lengths[found].argsort(descending=True)]
    return TokenRows(found, lengths[found], floor, noisy)


def lengths(gradient: Mapping[str, Tensor], records: int, most: int) -> Lengths:
    """How many tokens each of the sentences has, at most `most`.

    The last place whose row is not zero ends the longest. Of several sentences, the rows of places
    are solved for as sums of those of tokens: where that succeeds, the coefficients sum to the
    number of sentences that reach the place; between such places, a sentence ends where [SEP] has
    the largest part. Without a gradient of places, or under noise, all are taken to be longest.
    """
    if PLACES not in gradient:
        return Lengths((most,) * records, False)
    seen, rows = token_rows(gradient), gradient[PLACES].double()[:most]
    reached = torch.nonzero(rows.norm(dim=1) > seen.floor).flatten()
    longest = max(SHORTEST, int(reached[-1]) + 1) if len(reached) else most
    if records == 1 or longest == SHORTEST:
        return Lengths((longest,) * records, bool(len(reached)) and not seen.noisy)
    counts, ends = _explained(gradient[TABLE].double(), rows[:longest], seen)
    if not counts:
        return Lengths((longest,) * records, False)
    return _ended(counts, ends, records, longest)


def _explained(table: Tensor, rows: Tensor, seen: TokenRows) -> tuple[dict[int, int], Tensor]:
    """(by place whose row is a sum of tokens' rows, of how many; the part of [SEP], [places])."""
    none: tuple[dict[int, int], Tensor] = ({}, rows.new_zeros(len(rows)))
    if seen.noisy or not 0 < len(seen.ids) < table.shape[1]:
        return none
    own = table[seen.ids]
    parts = torch.linalg.lstsq(own.T, rows.T, driver="gelsd").solution.T
    left = (rows - parts @ own).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-300)
    total = parts.sum(1)
    clean = (left < CLEAN) & ((total - total.round()).abs() < 0.05)
    found = {place: int(total[place].round()) for place in torch.nonzero(clean).flatten().tolist()}
    ends = parts[:, seen.ids == END].sum(1)
    return found, ends


def _ended(counts: Mapping[int, int], ends: Tensor, records: int, longest: int) -> Lengths:
    """Lengths that leave so many sentences at these places; place 0 is left out, as all sentences
    begin with the same [CLS], whose row it is."""
    known = {place: count for place, count in counts.items() if place and 1 <= count <= records}
    known = {0: records} | known | {longest - 1: 1}
    found, certain, before, there = [longest], True, 0, records
    for place in sorted(known)[1:]:
        left = min(there, known[place])
        between = sorted(range(max(before, 1), place), key=lambda p: -float(ends[p]))
        found += [between[row % len(between)] + 1 for row in range(there - left) if between]
        certain &= known[place] <= there and (there == left or len(between) == 1)
        before, there = place, left
    counted = sorted([*found, *[longest] * (records - len(found))], reverse=True)
    return Lengths(tuple(counted[:records]), certain and longest - 1 in counts)
