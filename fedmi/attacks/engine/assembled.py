"""Sentences put together from tokens at places."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from fedmi.attacks.engine.standing import Standing, Stood, by_place
from fedmi.exposure.schema import END, PADDING, START, UNKNOWN

ROUNDS = 5
"""Times that tokens are dealt to the sentences whose slopes are most like theirs."""


@dataclass(frozen=True, eq=False)
class Assembled:
    """Sentences, longest first, place by place: [n, length].

    sure: nothing else explains the rows; slopes [n, length, dim]: its dL/dx, for the mean loss of
    the batch; known: that slope is of this token alone.
    """

    ids: Tensor
    sure: Tensor
    slopes: Tensor
    known: Tensor

    def put(self, row: int, one: Standing) -> None:
        """A token in a sentence."""
        self.ids[row, one.place], self.sure[row, one.place] = one.token, one.sure
        self.slopes[row, one.place], self.known[row, one.place] = one.slope, one.likely

    def of(self, order: Tensor) -> "Assembled":
        """With sentences made of these places, [m, length] of n x length ones."""
        parts = (self.ids, self.sure, self.slopes, self.known)
        return Assembled(*(part.flatten(0, 1)[order] for part in parts))


def assembled(stood: Stood, records: int, length: int) -> Assembled:
    """Tokens dealt to sentences by the direction of their slopes.

    The slopes dL/dx of one sentence are alike, and those of another label opposite; sentences with
    one label differ little, so that which of them has a token is a guess (see `exchanges`). Where
    fewer tokens are known at a place than sentences reach it, one of them is taken twice.
    """
    inner = {p: some for p, some in by_place(stood.found).items() if p}
    counts = _counts(inner, stood.counts)
    slots = {
        place: [row for row, count in enumerate(counts) if place < count - 1]
        for place in range(1, max(counts) - 1)
    }
    words = {p: [one for one in inner.get(p, []) if one.token > START + 1] for p in slots}
    means = _first_means(words, records)
    dealt: dict[int, dict[int, Standing]] = {}
    for _ in range(ROUNDS if records > 1 else 1):
        dealt = {place: _dealt(words[place], rows, means) for place, rows in slots.items()}
        means = _means(dealt, records, means)
    found = _empty(counts, length, stood)
    for place, given in dealt.items():
        for row in slots[place]:
            found.sure[row, place] = False
        for row, one in given.items():
            found.put(row, one)
            found.known[row, place] &= sum(one is other for other in given.values()) == 1
    for row, count in enumerate(counts):
        ends = [one for one in inner.get(count - 1, []) if one.token == END]
        if len(ends) == 1 and counts.count(count) == 1:
            found.put(row, ends[0])
    return found


def _empty(counts: Sequence[int], length: int, stood: Stood) -> Assembled:
    """Unknown tokens between [CLS] and [SEP]."""
    shape = (len(counts), length)
    ids = torch.full(shape, PADDING)
    for row, count in enumerate(counts):
        ids[row, :count] = UNKNOWN
        ids[row, 0], ids[row, count - 1] = START, END
    wide = len(stood.found[0].slope) if stood.found else 1
    slopes = torch.zeros(*shape, wide, dtype=torch.float64)
    return Assembled(ids, torch.ones(shape).bool(), slopes, torch.zeros(shape).bool())


def _counts(inner: dict[int, list[Standing]], counts: Sequence[int]) -> list[int]:
    """Lengths of sentences: where [SEP] stands, if that accounts for all of them."""
    ends = [place + 1 for place, some in inner.items() for one in some if one.token == END]
    told = sorted(ends, reverse=True)
    return told if len(told) == len(counts) else [*counts]


def _first_means(words: dict[int, list[Standing]], records: int) -> Tensor | None:
    """Directions of the tokens of the place that tells most sentences apart."""
    full = [_directions(some) for some in words.values() if len(some) == records]
    if records == 1 or not full:
        return None
    return max(full, key=lambda found: float(_unlike(found, found).sum()))


def _directions(some: Sequence[Standing]) -> Tensor:
    """Directions, and behind them the logarithm of the lengths: a sentence that the model is sure
    of has short slopes."""
    slopes = torch.stack([one.slope for one in some])
    sizes = slopes.norm(dim=1).clamp_min(1e-300).log()[:, None]
    return torch.cat([normalize(slopes, dim=1), sizes], 1)


def _unlike(one: Tensor, other: Tensor) -> Tensor:
    """[m, dim + 1], [l, dim + 1] -> [m, l]: 1 - cosine, and by how many e-folds lengths differ."""
    return 1 - one[:, :-1] @ other[:, :-1].T + (one[:, None, -1] - other[None, :, -1]).abs()


def _dealt(some: Sequence[Standing], rows: list[int], means: Tensor | None) -> dict[int, Standing]:
    if not some or not rows:
        return {}
    if means is None:
        order = [(k, k % len(some)) for k in range(len(rows))]
    else:
        costs = _unlike(means[rows], _directions(some)).numpy()
        ours, theirs = linear_sum_assignment(costs)
        order = [(int(k), int(t)) for k, t in zip(ours, theirs, strict=True)]
        missing = {*range(len(rows))} - {k for k, _ in order}
        order += [(k, int(costs[k].argmin())) for k in missing]
    return {rows[k]: some[t] for k, t in order}


def _means(
    dealt: dict[int, dict[int, Standing]], records: int, before: Tensor | None
) -> Tensor | None:
    found = []
    for row in range(records):
        own = [given[row] for given in dealt.values() if row in given]
        if own:
            mean = _directions(own).mean(0)
            found.append(torch.cat([normalize(mean[:-1], dim=0), mean[-1:]]))
        elif before is not None:
            found.append(before[row])
        else:
            return None
    return torch.stack(found)
