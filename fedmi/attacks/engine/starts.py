"""Where a search among images starts."""

from typing import Literal

import torch
from torch import Tensor

TILE = 4
Init = Literal["normal", "uniform", "grey", "patterned"]


def image_start(init: Init, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Images [n, C, H, W]: N(0.5, 0.25) clamped, U(0, 1), 0.5 everywhere, or a random tile
    repeated (Wei et al. 2020)."""
    if init == "normal":
        return (0.5 + 0.25 * torch.randn(shape, generator=rng)).clamp(0, 1)
    if init == "uniform":
        return torch.rand(shape, generator=rng)
    if init == "patterned":
        tile = torch.rand(*shape[:2], TILE, TILE, generator=rng)
        down, right = -(-shape[2] // TILE), -(-shape[3] // TILE)
        return tile.repeat(1, 1, down, right)[..., : shape[2], : shape[3]].contiguous()
    return torch.full(shape, 0.5)
