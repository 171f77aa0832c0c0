"""How far a simulated update is from the observed one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

LEAST = 1e-15
"""Length below which a vector has no direction."""
Parts = Mapping[str, Tensor]
SILENT = 1e-6
"""Share of the whole length below which a tensor's direction is rounding."""
Distance = Literal["cosine", "l2", "l1", "layer_cosine"]


def aim(kind: Distance, wanted: Parts, support: Parts) -> dict[str, Tensor]:
    """What `distance_of` compares with: the wanted entries whose support is 1 (empty = all), as a
    unit vector for the cosine, each tensor a unit vector for that by layer."""
    seen = {name: part * support[name] if support else part for name, part in wanted.items()}
    if kind == "layer_cosine":
        return _units(seen)
    if kind != "cosine":
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
    if torch.compiler.is_compiling():  # which fuses the steps below by itself
        length = norm(found)
        gaps = [(found[name] / length - part).square().sum() for name, part in aimed.items()]
        return torch.stack(gaps).sum() / 2
    tensors = (*(found[name] for name in aimed), *aimed.values())
    distance: Tensor = _Cosine.apply(*tensors)[0]  # type: ignore[no-untyped-call]
    return distance


def layer_cosine(found: Parts, aimed: Parts) -> Tensor:
    """Mean over tensors of 1 - cos(found, aimed) (Balunovic et al., 2022, eq. 6); aimed: unit
    vectors, zero for those left out."""
    gaps, counted = list[Tensor](), list[Tensor]()
    for name, unit in aimed.items():
        there = unit.square().sum()
        length = _length([found[name]]).clamp_min(LEAST**0.5)
        gaps.append(there * (found[name] / length - unit).square().sum() / 2)
        counted.append(there)
    return torch.stack(gaps).sum() / torch.stack(counted).sum().clamp_min(1)


def _units(parts: Parts) -> dict[str, Tensor]:
    """Each tensor as a unit vector, and zero where it is nothing beside the others: what a softmax
    is blind to, such as a bias of attention's keys, has a gradient of rounding."""
    whole = norm(parts)
    found = {}
    for name, part in parts.items():
        length = _length([part])
        found[name] = part / length * (length > SILENT * whole)
    return found


class _Cosine(torch.autograd.Function):
    """The distance of directions and the length of the first, from two lists of tensors.

    Its slope in found f is ((1 - distance) f / |f| - aimed) / |f|, which takes two passes over the
    tensors instead of eight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        found, aimed = _halves(tensors)
        length = _length(found)
        scale = 1 / length
        gaps = [
            (ours * scale).sub_(theirs).square().sum()
            for ours, theirs in zip(found, aimed, strict=True)
        ]
        return torch.stack(gaps).sum() / 2, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, distance, length = ctx.saved_tensors
        found, aimed = _halves(tensors)
        most = torch.finfo(length.dtype).max  # keeps 0 times it from being none
        ours = (slope * (1 - distance) / length.square()).clamp(-most, most)
        theirs = slope / length
        slopes = [(f * ours).sub_(a * theirs) for f, a in zip(found, aimed, strict=True)]
        return (*slopes, *[None] * len(aimed))


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


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
    return _length([*parts.values()])


def _length(parts: Sequence[Tensor]) -> Tensor:
    """By sums of squares, which PyTorch adds pairwise; its vector_norm does not, and of 10^7
    entries in float32 is wrong by 4e-4."""
    squares = torch.stack([part.square().sum() for part in parts])
    return squares.sum().clamp_min(LEAST**2).sqrt()


KINDS: dict[Distance, Callable[[Parts, Parts], Tensor]] = {
    "cosine": cosine,
    "l2": squared,
    "l1": absolute,
    "layer_cosine": layer_cosine,
}
