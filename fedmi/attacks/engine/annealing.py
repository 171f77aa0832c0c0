"""One vector a place, such that all of them add up to nothing: simulated annealing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

HOTTEST, COLDEST = 0.3, 0.02
"""Temperatures of the search, of the energy that one wrong vector makes."""
RIDGE = 0.01
"""Of the mean variance over directions: directions with less of it are not stretched further."""


@dataclass(frozen=True, eq=False)
class Whitened:
    """min |fixed + sum_p vectors[choice p]|^2 in coordinates in which the vectors that can be
    chosen vary alike in all directions, without which few directions make most of the energy.

    turned [k, k]: from a row in old coordinates to one in new. vectors [c, k]; fixed [k]; options:
    for each place, which of the vectors it may have. unit: the energy that one wrong one makes.
    """

    turned: Tensor
    vectors: Tensor
    fixed: Tensor
    options: Sequence[Tensor]
    unit: float

    @classmethod
    def of(cls, vectors: Tensor, fixed: Tensor, options: Sequence[Tensor]) -> Self:
        own = torch.cat([vectors[some] - vectors[some].mean(0) for some in options])
        sizes, axes = torch.linalg.eigh((own.T @ own / len(own)).double())
        sizes = sizes.clamp_min(0)
        turned = axes / (sizes + RIDGE * sizes.mean()).clamp_min(1e-18).sqrt()
        unit = float((own.double() @ turned).square().sum(1).mean())
        new = (vectors.double() @ turned).float(), (fixed.double() @ turned).float()
        return cls(turned, *new, options, unit)

    def annealed(self, tries: int, sweeps: int, rng: torch.Generator) -> Tensor:
        """[tries, places] choices; a sweep draws each place anew (Gibbs), ever colder."""
        products = self.vectors @ self.vectors.T
        own = products.diagonal()
        starts = [some[torch.randint(len(some), (tries,), generator=rng)] for some in self.options]
        chosen = torch.stack(starts, 1)
        # of each try, the product of its sum with every vector
        sums = self.vectors @ self.fixed + products[chosen].sum(1)
        for sweep in range(sweeps):
            cooled = HOTTEST * (COLDEST / HOTTEST) ** (sweep / max(1, sweeps - 1)) * self.unit
            for place in torch.randperm(len(self.options), generator=rng).tolist():
                some, before = self.options[place], chosen[:, place]
                energy = 2 * (sums[:, some] - products[before][:, some]) + own[some]
                draws = torch.rand(energy.shape, generator=rng).clamp(1e-9, 1 - 1e-6)
                now = some[(cooled * -(-draws.log()).log() - energy).argmax(1)]
                sums += products[now] - products[before]
                chosen[:, place] = now
        return chosen
