"""What is minimised beside the distance of updates: what is known of images, or of the batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmi.attacks.engine.distances import relative
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.network import Network, Weights

Given = dict[str, Tensor]
"""What one penalty knows of one target."""


@dataclass(frozen=True)
class Trial:
    """One candidate: inputs [n, C, H, W], labels ([n], or [n, classes] where they are soft), the
    update that it gives, and the batch statistics on the way."""

    inputs: Tensor
    labels: Tensor
    update: Weights
    statistics: Weights


class Penalty(Protocol):
    """weight x value is added to the loss; `relative` ones are in units of the distance, as that is
    (see `Matching.unit`)."""

    @property
    def weight(self) -> float: ...

    @property
    def relative(self) -> bool: ...

    def given(self, evidence: Evidence, network: Network) -> Given:
        """What it knows of one target: tensors of the same shapes for all targets of a plan."""
        ...

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        """Of one candidate of one target; a scalar."""
        ...


@dataclass(frozen=True)
class TotalVariation:
    """Mean absolute difference of vertical plus that of horizontal neighbours."""

    weight: float
    relative: bool = False

    def given(self, evidence: Evidence, network: Network) -> Given:
        return {}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return total_variation(trial.inputs)


@dataclass(frozen=True)
class PixelNorm:
    """Mean square of the pixels' distance from mid-grey."""

    weight: float
    relative: bool = False

    def given(self, evidence: Evidence, network: Network) -> Given:
        return {}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return (trial.inputs - 0.5).square().mean()


@dataclass(frozen=True)
class BatchStatisticsPenalty:
    """Relative distance of the batch's statistics to those that the update carries."""

    weight: float
    shares: tuple[float, ...]
    steps: tuple[int, ...]
    relative: bool = True

    def given(self, evidence: Evidence, network: Network) -> Given:
        """The part of the observed running statistics that the update's own batches explain."""
        wanted: Given = {}
        for prefix, layer in network.statistics.items():
            kept = sum(
                share * (1 - layer.momentum) ** steps
                for share, steps in zip(self.shares, self.steps, strict=True)
            )
            for name in (f"{prefix}.running_mean", f"{prefix}.running_var"):
                if name in evidence.buffers:
                    wanted[name] = evidence.buffers[name] - kept * evidence.base[name]
        return wanted

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return relative(trial.statistics, given)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours; [..., H, W]."""
    down = images[..., 1:, :] - images[..., :-1, :]
    right = images[..., :, 1:] - images[..., :, :-1]
    return down.abs().mean() + right.abs().mean()


def stacked(parts: list[Mapping[str, Tensor]]) -> Given:
    """By name, the tensors of all parts, one after another."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
