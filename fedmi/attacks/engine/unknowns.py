"""What a search moves: pixels, pixels and labels, or codes of a generator."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Unknown(Protocol):
    """How one target's point, a tensor of any one shape, stands for its records.

    `decode` is called under vmap, on the point of a single target; `project` on all points.
    """

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs [n, C, H, W], labels: [n], or soft ones [n, classes])."""
        ...

    def project(self, points: Tensor) -> Tensor:
        """The nearest points that are allowed; [T, ...] -> [T, ...]."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, in [0, 1] where `boxed`."""

    boxed: bool = True

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return point, labels

    def project(self, points: Tensor) -> Tensor:
        return points.clamp(0, 1) if self.boxed else points


@dataclass(frozen=True)
class PixelsAndLabels:
    """Pixels and the logits of soft labels in one vector: [n C H W + n classes] (DLG)."""

    shape: tuple[int, int, int, int]
    classes: int

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = self.shape[0] * self.classes
        logits = point[-count:].view(self.shape[0], self.classes)
        return point[:-count].view(self.shape), logits.softmax(-1)

    def project(self, points: Tensor) -> Tensor:
        return points


@dataclass(frozen=True, eq=False)
class Generated:
    """Images of a generator; a point is [n, latent], or [n, latent + weights].

    With weights every record has a generator of its own, and only those move: z is held. flags:
    what is to be told of the generator.
    """

    generator: nn.Module
    latent: int
    flags: frozenset[str] = frozenset()

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        codes, weights = point[:, : self.latent], point[:, self.latent :]
        if not weights.shape[1]:
            return self.generator(codes), labels
        return vmap(self._one)(codes.detach(), weights), labels

    def project(self, points: Tensor) -> Tensor:
        return points

    def weighted(self, points: Tensor) -> Tensor:
        """Points [..., n, latent] with the generator's own weights, a copy for each record."""
        own = torch.cat([weight.flatten() for weight in self.generator.parameters()])
        return torch.cat([points, own.to(points).expand(*points.shape[:-1], -1)], -1)

    def _one(self, code: Tensor, weights: Tensor) -> Tensor:
        """[latent], [weights] -> [C, H, W]."""
        shapes = {name: weight.shape for name, weight in self.generator.named_parameters()}
        parts = torch.split(weights, [shape.numel() for shape in shapes.values()])
        state = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        image: Tensor = functional_call(self.generator, state, (code[None],))
        return image[0]
