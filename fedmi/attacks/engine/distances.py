"""How far a simulated update is from the observed one."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
Distance = Literal["cosine", "cosine_by_dots", "l2", "l1"]


def aim(kind: Distance, wanted: Parts, support: Parts) -> dict[str, Tensor]:
    """What `distance_of` compares with: the wanted entries whose support is 1 (empty = all), as a
    unit vector for cosines."""
    seen = {name: part * support[name] if support else part for name, part in wanted.items()}
    if kind not in DIRECTIONS:
        return seen
    length = norm(seen)
    return {name: part / length for name, part in seen.items()}


def distance_of(kind: Distance, found: Parts, aimed: Parts, support: Parts) -> Tensor:
    """The distance of this kind over the entries whose support is 1; aimed: what `aim` gave."""
    if support:
        found = {name: part * support[name] for name, part in found.items()}
    return KINDS[kind](found, aimed)


def cosine(found: Parts, aimed: Parts) -> Tensor:
    """1 - cos(found, aimed), all parameters as one vector (Geiping et al., 2020, eq. 4).

    Computed as half the squared distance of the unit vectors: 1 - cos in float32 would stop at
    1e-7, which on a sigmoid LeNet is already in sight from a grey image.
    """
    length = norm(found)
    parts = [(found[name] / length - part).square().sum() for name, part in aimed.items()]
    return torch.stack(parts).sum() / 2


def by_dots(found: Parts, aimed: Parts) -> Tensor:
    """1 - cos(found, aimed) from dot products: in float32 right to 1e-6, and a third faster."""
    dots = [(found[name] * part).sum() for name, part in aimed.items()]
    return 1 - torch.stack(dots).sum() / norm(found)


def squared(found: Parts, wanted: Parts) -> Tensor:
    """|found - wanted|^2 over all parameters (Zhu et al., 2019, eq. 4)."""
    parts = [(found[name] - part).square().sum() for name, part in wanted.items()]
    return torch.stack(parts).sum()


def absolute(found: Parts, wanted: Parts) -> Tensor:
    """|found - wanted|_1 over all parameters."""
    return torch.stack([(found[name] - part).abs().sum() for name, part in wanted.items()]).sum()


def relative(found: Parts, wanted: Parts) -> Tensor:
    """Mean over names of |found - wanted|^2 / |wanted|^2; zero for no names."""
    parts = [
        (found[name] - target).square().sum() / target.square().sum().clamp_min(1e-12)
        for name, target in wanted.items()
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def softened(found: Parts) -> dict[str, Tensor]:
    """tanh(g / mean |g|) times that mean, a tensor: sign compression with a slope."""
    means = {name: part.abs().mean().clamp_min(1e-30) for name, part in found.items()}
    return {name: means[name] * torch.tanh(part / means[name]) for name, part in found.items()}


def norm(parts: Parts) -> Tensor:
    """Euclidean norm of all parts as one vector."""
    squares = torch.stack([part.square().sum() for part in parts.values()])
    return squares.sum().clamp_min(1e-30).sqrt()


DIRECTIONS = frozenset({"cosine", "cosine_by_dots"})
KINDS: dict[Distance, Callable[[Parts, Parts], Tensor]] = {
    "cosine": cosine,
    "cosine_by_dots": by_dots,
    "l2": squared,
    "l1": absolute,
}
