"""Sentences of an encoder: one token a place, such that the first token's row is in the span."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmi.attacks.engine.first_block import FirstBlock, Pairs
from fedmi.attacks.engine.prefixes import Found
from fedmi.attacks.engine.spans import Span
from fedmi.exposure.schema import END

HOTTEST, COLDEST = 0.5, 1e-3
"""Temperatures of the search, of the energy that one wrong token makes."""
TURNS = 2
LAST = 4
"""Sweeps at the end that take the best token of a place, of all that are possible there."""


@dataclass(frozen=True)
class Puzzle:
    """Choices of one pair a place, pair 0 being the first token at place 0.

    What the MLP reads at place 0 is norm(s + sum_h sum_c e_ch o_ch / sum_c e_ch) over the pairs c
    of the sentence: e, its attention to each, and o, what each value adds, depend on c alone. So
    one sum over the pairs says whether a combination is in the span; the energy is the square of
    its distance.
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

        The scale of normalisation is that of the mean over all pairs, which is right to a share
        of the small part that attention has in it.
        """
        norm, width = self.block.final, len(self.origin)
        rows = self.span.outside[self.span.outside.norm(dim=1) > 1e-3]
        turned = rows[:, :width] * norm.weight
        turned = turned - turned.mean(1, keepdim=True)
        mean = self.origin + (self.added.mean(0) / self.weight.mean(0)[:, None]).sum(0)
        scale = (mean.var(correction=0) + norm.eps).sqrt()
        fixed = turned @ self.origin / scale + rows[:, :width] @ norm.bias + rows[:, width]
        return (self.added @ turned.T / scale).float(), fixed.float(), self.weight.float()

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
        self, length: int, likely: Tensor, tries: int, sweeps: int, rng: torch.Generator
    ) -> Tensor:
        """[tries, length] pairs: simulated annealing over combinations of the `likely` pairs."""
        ends = self._ends(length)
        inner = self.pairs.token != END
        here = [self.pairs.at(place) for place in range(length)]
        every = [at[inner[at]] for at in here]
        first = [at[likely[at]] if bool(likely[at].any()) else at for at in every]
        if not len(ends) or any(not len(at) for at in every[1:-1]):
            return torch.zeros(0, length, dtype=torch.long)
        middle = [at[torch.randint(len(at), (tries,), generator=rng)] for at in first[1:-1]]
        fixed = (torch.zeros(tries, dtype=torch.long), ends[:1].expand(tries))
        chosen = torch.stack([fixed[0], *middle, fixed[1]], 1)
        unit = self.unit(length)
        for sweep in range(sweeps):
            cooled = HOTTEST * (COLDEST / HOTTEST) ** (sweep / max(1, sweeps - LAST))
            last = sweep >= sweeps - LAST
            for place in (1 + torch.randperm(length - 2, generator=rng)).tolist():
                options = every[place] if last else first[place]
                energy = self._energies(chosen, place, options)
                draws = torch.rand(energy.shape, generator=rng).clamp(1e-9, 1 - 1e-6)
                noise = 0.0 if last else unit * cooled * -(-draws.log()).log()
                chosen[:, place] = options[(noise - energy).argmax(1)]
        return chosen

    def _ends(self, length: int) -> Tensor:
        return torch.nonzero((self.pairs.token == END) & (self.pairs.place == length - 1)).flatten()

    def _energies(self, chosen: Tensor, place: int, options: Tensor) -> Tensor:
        """[r, length], [o] -> [r, o]: with each of the options at the place."""
        parts, fixed, weights = self.outside
        others = torch.cat([chosen[:, :place], chosen[:, place + 1 :]], 1)
        sums = parts[others].sum(1)[:, None] + parts[options]
        total = weights[others].sum(1)[:, None] + weights[options]
        left: Tensor = (fixed + (sums / total[..., None]).sum(2)).square().sum(2)
        return left


def combined(
    puzzle: Puzzle,
    likely: Tensor,
    records: int,
    tolerance: float,
    tries: int,
    sweeps: int,
    rng: torch.Generator,
) -> list[Found]:
    """Sentences found, surest first, then best guesses for the lengths without any.

    Every length that may end a sentence is searched, and all once more, twice as long, where there
    are fewer than `records` sentences.
    """
    pairs = puzzle.pairs
    lengths = sorted({1 + int(p) for p in pairs.place[pairs.token == END]} - {1})
    whole: dict[tuple[int, ...], Found] = {}
    guesses: dict[tuple[int, ...], Found] = {}
    for turn in range(TURNS):
        for length in lengths:
            if len(whole) >= records and turn:
                break
            chosen = puzzle.searched(length, likely, tries << turn, sweeps << turn, rng)
            if not len(chosen):
                continue
            usual = (puzzle.unit(length) / (len(puzzle.origin) + 1)) ** 0.5
            share = puzzle.distance(chosen) / usual
            for row in share.argsort()[: 4 * records].tolist():
                tokens = tuple(pairs.token[chosen[row]].tolist())
                sure = bool(share[row] < tolerance)
                (whole if sure else guesses)[tokens] = Found(tokens, float(share[row]), sure)
    order = [*sorted(whole.values(), key=_doubt), *sorted(guesses.values(), key=_doubt)]
    return order


def _doubt(found: Found) -> float:
    return found.doubt
