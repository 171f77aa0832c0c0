"""What a search moves: pixels, pixels and labels, or codes of a generator."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
