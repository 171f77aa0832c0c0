"""Which token stands at which place, from the rows of the two embedding tables' gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmi.attacks.engine.embedded import PLACES, TABLE
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.pruned_rows import matched
from fedmi.attacks.engine.row_sums import Balance, balances
from fedmi.attacks.engine.token_rows import TokenRows, lengths, token_rows

UPRIGHT = 2e-3
"""Cosine to its embedding below which a slope has passed a normalisation of it."""


@dataclass(frozen=True, eq=False)
class Standing:
    """A token at a place in one of the sentences; slope: its dL/dx [dim].

    doubt: 0 if nothing else explains the rows; else how far from right angles the slope is to the
    token at its place, from 0 to 1.
    """

    token: int
    place: int
    slope: Tensor
    doubt: float

    @property
    def sure(self) -> bool:
        return self.doubt == 0

    @property
    def likely(self) -> bool:
        return self.doubt < UPRIGHT


@dataclass(frozen=True)
class Stood:
    """What the rows say. counts: tokens of each sentence, longest first."""

    found: tuple[Standing, ...]
    counts: tuple[int, ...]
    noisy: bool


def stood(evidence: Evidence) -> Stood:
    """What stands where; nothing where the rows are lost in noise, or places have none."""
    records, most = evidence.records, evidence.input_shape[2]
    counts = lengths(evidence.gradient, records, most).counts
    seen = token_rows(evidence.gradient)
    if seen.noisy or not len(seen.ids) or PLACES not in evidence.gradient:
        return Stood((), counts, seen.noisy)
    table, rows = _read(evidence, seen)
    reached = torch.nonzero(rows.norm(dim=1) > seen.floor).flatten()
    words = evidence.base[TABLE].double()[seen.ids]
    spots = evidence.base[PLACES].double()[reached]
    found = list[Standing]()
    for balance in balances(table, rows[reached], _rounding(evidence, table, rows)):
        upright = Upright(words[[*balance.left]], spots[[*balance.right]])
        room = [sum(count > int(reached[p]) for count in counts) for p in balance.right]
        part = _Part(table[[*balance.left]], rows[reached[[*balance.right]]], room, upright)
        for token, place, slope, doubt in part.solved(balance):
            ids = int(seen.ids[balance.left[token]]), int(reached[balance.right[place]])
            found.append(Standing(*ids, slope, doubt))
    if evidence.support and PLACES in evidence.support:
        found = _mended(evidence, seen, found)
    return Stood(tuple(sorted(found, key=lambda one: one.place)), counts, False)


def _mended(evidence: Evidence, seen: TokenRows, found: list[Standing]) -> list[Standing]:
    """Where rows are pruned: what the entries kept prove; elsewhere, what the rows say as if they
    were whole, which is a guess."""
    proven = [
        Standing(token, place, row, float(not whole))
        for token, place, row, whole in matched(evidence, seen)
    ]
    told = {one.place for one in proven}
    return proven + [replace(one, doubt=1.0) for one in found if one.place not in told]


def _read(evidence: Evidence, seen: TokenRows) -> tuple[Tensor, Tensor]:
    gradient = evidence.gradient
    return gradient[TABLE].double()[seen.ids], gradient[PLACES].double()[: evidence.input_shape[2]]


def _rounding(evidence: Evidence, table: Tensor, rows: Tensor) -> float:
    """Of a row: float32's share of the longest and, in an update, of the parameters it is the
    change of."""
    unit = torch.finfo(torch.float32).eps
    longest = max(float(table.norm(dim=1).max()), float(rows.norm(dim=1).max()))
    if evidence.of_gradient:
        return unit * longest
    descent = float(evidence.descent[PLACES].double().norm())
    scale = float(evidence.gradient[PLACES].double().norm()) / max(descent, 1e-300)
    held = [float(evidence.base[name].double().norm(dim=1).max()) for name in (TABLE, PLACES)]
    return unit * (longest + scale * max(held))


@dataclass(frozen=True)
class Upright:
    """How far slopes [dim] are from right angles to token + place, 0 to 1.

    Behind a normalisation of the embeddings, a slope at one place is at right angles to the
    centred sum of token and place, up to the epsilon of the normalisation.
    """

    words: Tensor
    spots: Tensor

    def of_token(self, token: int, slope: Tensor) -> Tensor:
        """At every place."""
        return _cosine(self.words[token] + self.spots, slope)

    def of_place(self, place: int, slope: Tensor) -> Tensor:
        """For every token."""
        return _cosine(self.words + self.spots[place], slope)


def _cosine(sums: Tensor, slope: Tensor) -> Tensor:
    sums = sums - sums.mean(1, keepdim=True)
    found: Tensor = (sums @ slope).abs() / (sums.norm(dim=1) * slope.norm()).clamp_min(1e-300)
    return found


Pair = tuple[int, int, Tensor, float]


@dataclass
class _Part:
    """Tokens' rows [m, dim] and places' rows [l, dim] that have the same sum, taken apart.

    room: sentences that reach each place.
    """

    tokens: Tensor
    places: Tensor
    room: list[int]
    upright: Upright
    found: list[Pair] = field(default_factory=list)

    def solved(self, balance: Balance) -> list[Pair]:
        if not len(self.tokens) or not len(self.places):
            return []
        if len(self.places) == 1:
            return [(t, 0, row, float(not balance.exact)) for t, row in enumerate(self.tokens)]
        if len(self.tokens) == 1:
            return [(0, p, row, float(not balance.exact)) for p, row in enumerate(self.places)]
        return self._peeled()

    def _peeled(self) -> list[Pair]:
        """In turn, what is most upright: a token that stands at one place only, or what is left of
        a place that lacks one token; it is taken off the other table's row."""
        tokens, places = self.tokens.clone(), self.places.clone()
        open_tokens, open_places = {*range(len(tokens))}, {*range(len(places))}
        while open_tokens and open_places:
            score, by_place, token, place = min(
                self._moves(tokens, places, open_tokens, open_places)
            )
            slope = places[place] if by_place else tokens[token]
            self.found.append((token, place, slope.clone(), max(score, 1e-12)))
            taken = slope.clone()
            tokens[token] -= taken
            places[place] -= taken
            self.room[place] -= 1
            if not by_place or self._gone(tokens[token], self.tokens[token]):
                open_tokens.discard(token)
            if by_place or self.room[place] <= 0 or self._gone(places[place], self.places[place]):
                open_places.discard(place)
        return self.found

    def _moves(
        self, tokens: Tensor, places: Tensor, some: set[int], spots: set[int]
    ) -> list[tuple[float, bool, int, int]]:
        found = list[tuple[float, bool, int, int]]()
        for token in some:
            scores = self.upright.of_token(token, tokens[token])
            found += [(float(scores[place]), False, token, place) for place in spots]
        for place in spots:
            if self.room[place] == 1:
                scores = self.upright.of_place(place, places[place])
                found += [(float(scores[token]), True, token, place) for token in some]
        return found

    def _gone(self, left: Tensor, whole: Tensor) -> bool:
        return float(left.norm()) < 1e-4 * float(whole.norm())


def by_place(found: Sequence[Standing]) -> Mapping[int, list[Standing]]:
    """What stands at each place."""
    places: dict[int, list[Standing]] = {}
    for one in found:
        places.setdefault(one.place, []).append(one)
    return places
