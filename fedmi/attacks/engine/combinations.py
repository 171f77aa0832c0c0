"""Sentences of an encoder: one token a place, such that the first token's row is in the span."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Self

import torch
from torch import Tensor

from fedmi.attacks.engine import embedding_rows
from fedmi.attacks.engine.annealing import Whitened
from fedmi.attacks.engine.embedding_rows import TRUSTS, Trust
from fedmi.attacks.engine.first_block import FirstBlock, Pairs
from fedmi.attacks.engine.leftover import Leftover
from fedmi.attacks.engine.prefixes import Found
from fedmi.attacks.engine.spans import Span
from fedmi.exposure.schema import END

LAST = 3
"""Sweeps at the end that take the best token of a place, of all that are possible there."""
SWAPPED = 10.0
"""Multiple of the tolerance up to which two tokens may be in each other's place."""
POLISHED = 24
"""Of the combinations annealed, those of least energy that go through them."""


@dataclass(frozen=True)
class Options:
    """Pairs of each place in turn: those to search among, and all that are possible."""

    likely: Sequence[Tensor]
    every: Sequence[Tensor]

    @classmethod
    def of(cls, pairs: Pairs, likely: Tensor, possible: Tensor) -> Self:
        """likely, possible: [c] booleans."""
        inner = possible & (pairs.token != END)
        every = [at[inner[at]] for at in map(pairs.at, range(1 + int(pairs.place.max())))]
        first = [at[likely[at]] if bool(likely[at].any()) else at for at in every]
        return cls(first, every)


@dataclass(frozen=True)
class Puzzle:
    """Choices of one pair a place, pair 0 being the first token at place 0.

    What the MLP reads at place 0 is norm(s + sum_h sum_c e_ch o_ch / sum_c e_ch) over the pairs c
    of the sentence: e, its attention to each, and o, what each value adds, depend on c alone. So
    one sum over the pairs says whether a combination is in the span; the energy is the square of
    its distance, less what of it the scale of the normalisation makes.
    """

    block: FirstBlock
    pairs: Pairs
    span: Span

    @cached_property
    def weight(self) -> Tensor:
        """e [c, heads], up to a factor a head."""
        scores = self.block.scores(self.pairs.query[:1], self.pairs.key)
        return (scores - scores.amax(0)).exp()

    @cached_property
    def added(self) -> Tensor:
        """e o [c, heads, dim]."""
        output = self.block.block.attention.output.weight.view(-1, *self.pairs.value.shape[1:])
        out = torch.einsum("che,dhe->chd", self.pairs.value, output)
        return out * self.weight[:, :, None]

    @cached_property
    def origin(self) -> Tensor:
        """s [dim]: the first token and the bias of attention's output."""
        return self.pairs.stream[0] + self.block.block.attention.output.bias

    @cached_property
    def outside(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sums' parts [c, heads, k], origin's part [k], weights): outside the span, in float32.

        Of norm(x) = w c(x) / s(x) + b, with c(x) the centred x, R [norm(x) | 1] = R w c(x) / s(x) +
        f. Without the direction of f, R w c(x) is zero whatever the scale s(x).
        """
        norm, width = self.block.final, len(self.origin)
        rows = self.span.outside[self.span.outside.norm(dim=1) > 1e-3]
        fixed = rows[:, :width] @ norm.bias + rows[:, width]
        fixed = fixed / fixed.norm().clamp_min(1e-300)
        turned = (rows - fixed[:, None] * (fixed @ rows))[:, :width] * norm.weight
        turned = turned - turned.mean(1, keepdim=True)
        mean = self.origin + (self.added.mean(0) / self.weight.mean(0)[:, None]).sum(0)
        turned = turned / (mean.var(correction=0) + norm.eps).sqrt()
        added = self.added @ turned.T
        return added.float(), (turned @ self.origin).float(), self.weight.float()

    def linear(self, length: int) -> tuple[Tensor, Tensor]:
        """(vectors [c, k], fixed [k]) of which a sentence's sum is outside the span, about.

        sum_c e_c a_c / sum_c e_c = m + sum_c e_c (a_c - m) / sum_c e_c of a head's parts e a, with
        m their mean over all pairs; of that, the sum of e below is taken for the usual one.
        """
        parts, fixed, weights = self.outside
        usual = weights.mean(0)
        mean = parts.mean(0) / usual[:, None]
        vectors = (parts - weights[..., None] * mean) / (length * usual)[:, None]
        return vectors.sum(1), fixed + mean.sum(0)

    def unit(self, length: int) -> float:
        """The energy that one wrong token makes in a sentence of so many tokens."""
        parts, _, weights = self.outside
        spread = parts[1:].sum(1) / parts.shape[1]
        each = (spread - spread.mean(0)).square().sum(1).mean() * parts.shape[1] ** 2
        return float(each) / float(weights.mean() * length) ** 2

    def distance(self, chosen: Tensor) -> Tensor:
        """[r, length] pairs -> [r]: exactly, of what the MLP reads at place 0."""
        sums = self.added[chosen].sum(1) / self.weight[chosen].sum(1)[:, :, None]
        return self.span.distance(self.block.final(self.origin + sums.sum(1)))

    def searched(
        self, length: int, options: Options, tries: int, sweeps: int, rng: torch.Generator
    ) -> Tensor:
        """[m, length] pairs, of the least energy found; none if no sentence is so long."""
        ends = self._ends(length)
        likely, every = (some[1 : length - 1] for some in (options.likely, options.every))
        if not len(ends) or any(not len(at) for at in likely):
            return torch.zeros(0, length, dtype=torch.long)
        if not likely:
            return torch.cat([ends.new_zeros(1), ends[:1]])[None]
        vectors, fixed = self.linear(length)
        around = fixed + vectors[0] + vectors[ends[0]]
        whitened = Whitened.of(vectors, around, likely)
        inner = whitened.annealed(tries, sweeps, rng)
        both = (torch.zeros(len(inner), 1, dtype=torch.long), ends[:1].expand(len(inner), 1))
        chosen = torch.unique(torch.cat([both[0], inner, both[1]], 1), dim=0)
        turned = whitened.turned.float()
        parts, fixed, weights = self.outside
        seen = (parts @ turned, fixed @ turned, weights)
        best = _energy(seen, chosen).argsort()[:POLISHED]
        return _polished(seen, chosen[best], every, rng)

    def swapped(self, chosen: Tensor) -> Tensor:
        """[length] pairs -> the same tokens, with two in each other's place while that is closer.

        While attention is spread evenly, exchanging two tokens moves its sum very little.
        """
        at = {
            pair: row
            for row, pair in enumerate(
                zip(self.pairs.token.tolist(), self.pairs.place.tolist(), strict=True)
            )
        }
        best = float(self.distance(chosen[None]))
        for _ in range(len(chosen)):
            tokens = self.pairs.token[chosen].tolist()
            moves = [
                _exchanged(chosen, (i, j), (at[tokens[j], i], at[tokens[i], j]))
                for i, j in combinations(range(1, len(tokens) - 1), 2)
                if tokens[i] != tokens[j] and {(tokens[j], i), (tokens[i], j)} <= at.keys()
            ]
            found = self.distance(torch.stack([chosen, *moves]))
            if float(found.min()) >= best:
                break
            best, chosen = float(found.min()), [chosen, *moves][int(found.argmin())]
        return chosen

    def _ends(self, length: int) -> Tensor:
        return torch.nonzero((self.pairs.token == END) & (self.pairs.place == length - 1)).flatten()


def _exchanged(chosen: Tensor, places: tuple[int, int], pairs: tuple[int, int]) -> Tensor:
    found = chosen.clone()
    found[[*places]] = torch.tensor(pairs)
    return found


Seen = tuple[Tensor, Tensor, Tensor]
"""(parts [c, heads, k], fixed [k], weights [c, heads]) of the energy."""


def _energy(seen: Seen, chosen: Tensor) -> Tensor:
    """[r, length] -> [r]."""
    parts, fixed, weights = seen
    shares = parts[chosen].sum(1) / weights[chosen].sum(1)[..., None]
    left: Tensor = (fixed + shares.sum(1)).square().sum(1)
    return left


def _polished(
    seen: Seen, chosen: Tensor, options: Sequence[Tensor], rng: torch.Generator
) -> Tensor:
    """Each place in turn with the best of its options."""
    parts, fixed, weights = seen
    for _ in range(LAST):
        for place in torch.randperm(len(options), generator=rng).tolist():
            here = options[place]
            others = torch.cat([chosen[:, : place + 1], chosen[:, place + 2 :]], 1)
            sums = parts[others].sum(1)[:, None] + parts[here]
            total = weights[others].sum(1)[:, None] + weights[here]
            energy = (fixed + (sums / total[..., None]).sum(2)).square().sum(2)
            chosen[:, place + 1] = here[energy.argmin(1)]
    return chosen


@dataclass
class Combining:
    """Sentences searched for, length by length; those found are taken off the rows.

    A token of which nothing is left in the rows of the embeddings is no longer tried, and one that
    two sentences share shows its place in the other when one of them is found. `leftover` = None
    leaves that out.
    """

    puzzle: Puzzle
    leftover: Leftover | None
    records: int
    tolerance: float
    tries: int
    sweeps: int
    rng: torch.Generator
    whole: dict[tuple[int, ...], Found] = field(default_factory=dict)
    guesses: dict[tuple[int, ...], Found] = field(default_factory=dict)

    def sentences(self) -> list[Found]:
        """Surest first, then best guesses.

        Every length that may end a sentence is searched, among ever more pairs of token and place
        until nothing more is found, or as many sentences as there are records.
        """
        pairs = self.puzzle.pairs
        ends = torch.unique(pairs.place[pairs.token == END]).tolist()
        lengths = sorted((1 + place for place in ends if place), reverse=True)
        for trust in TRUSTS if self.leftover else TRUSTS[-1:]:
            before = -1
            while before < len(self.whole) < self.records:
                before = len(self.whole)
                for length in lengths:
                    self._search(length, trust)
        found = [sorted(some.values(), key=_doubt) for some in (self.whole, self.guesses)]
        return found[0] + found[1]

    def _search(self, length: int, trust: Trust) -> None:
        if len(self.whole) >= self.records:
            return
        puzzle, pairs = self.puzzle, self.puzzle.pairs
        options = self._options(trust)
        chosen = puzzle.searched(length, options, self.tries, self.sweeps, self.rng)
        if not len(chosen):
            return
        usual = (puzzle.unit(length) / (len(puzzle.origin) + 1)) ** 0.5
        share = puzzle.distance(chosen) / usual
        for row in share.argsort()[: self.records].tolist():
            if self.tolerance * 1e-2 < share[row] < SWAPPED * self.tolerance:
                chosen[row] = puzzle.swapped(chosen[row])
        share = puzzle.distance(chosen) / usual
        for row in share.argsort()[: 4 * self.records].tolist():
            tokens = tuple(pairs.token[chosen[row]].tolist())
            found = Found(tokens, float(share[row]), bool(share[row] < self.tolerance))
            if found.whole and tokens not in self.whole and self.leftover:
                self.leftover.take(tokens)
            (self.whole if found.whole else self.guesses)[tokens] = found

    def _options(self, trust: Trust) -> Options:
        pairs = self.puzzle.pairs
        if not self.leftover:
            every = torch.ones(len(pairs), dtype=torch.bool)
            return Options.of(pairs, every, every)
        left = self.leftover.left()[pairs.token]
        likely = embedding_rows.likely(self.leftover.rows, self.puzzle.block, pairs, trust)
        return Options.of(pairs, likely & left, left)


def _doubt(found: Found) -> float:
    return found.doubt
