"""What is minimised beside the distance of updates: what is known of images, or of the batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmi.attacks.engine.distances import relative
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.features import features_by_class, features_of
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

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        """What it knows of one target: tensors of the same shapes for all targets of a plan.

        labels: those that the target is searched with, in the order of its first restart.
        """
        ...

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        """Of one candidate of one target; a scalar."""
        ...


@dataclass(frozen=True)
class TotalVariation:
    """Mean absolute difference of vertical plus that of horizontal neighbours."""

    weight: float
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        return {}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return total_variation(trial.inputs)


@dataclass(frozen=True)
class PixelNorm:
    """Mean square of the pixels' distance from mid-grey."""

    weight: float
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        return {}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return (trial.inputs - 0.5).square().mean()


@dataclass(frozen=True)
class BatchStatisticsPenalty:
    """Relative distance of the batch's statistics to those that the update carries.

    Beside a client's new running statistics r = (1 - m)^s r_0 + ..., m the layer's momentum and s
    the local steps, stands what is known before, r_0. Where training is simulated, the part of r
    that its own batches explain, r - (1 - m)^s r_0, is compared with the simulated one; where one
    gradient is matched (`simulated` off), that part over 1 - (1 - m)^s with the statistics of all
    records as one batch: exact for one step, for several as good as reading them as one.
    """

    weight: float
    shares: tuple[float, ...]
    steps: tuple[int, ...]
    simulated: bool = True
    relative: bool = True

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        """The part of the observed running statistics that the update's own batches explain."""
        wanted: Given = {}
        for prefix, layer in network.statistics.items():
            kept = sum(
                share * (1 - layer.momentum) ** steps
                for share, steps in zip(self.shares, self.steps, strict=True)
            )
            whole = 1.0 if self.simulated else max(1 - kept, 1e-12)
            for name in (f"{prefix}.running_mean", f"{prefix}.running_var"):
                if name in evidence.buffers:
                    own = evidence.buffers[name] - kept * evidence.base[name]
                    wanted[name] = own / whole
        return wanted

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        return relative(trial.statistics, given)


@dataclass(frozen=True)
class FeaturePenalty:
    """|f(x) - f|^2 of the features that the gradient gives away, in units of a grey image's.

    f: mean input of the last linear layer over the records of each class, as `features_by_class`
    solves for it. It ties each class's records by themselves, where a gradient is of all at once.
    Features whose column was not seen in full (Soteria) are left out for one record; for several
    the system is then open, and the penalty zero.
    layer: the last linear layer, which has a bias.
    """

    weight: float
    layer: str
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        bias = evidence.base[f"{self.layer}.bias"]
        counts = labels.bincount(minlength=len(bias)).float()
        wanted = features_by_class(evidence.gradient, evidence.base, self.layer, counts)
        believed = (counts > 0)[:, None] & self._seen(evidence, wanted)
        some = network.parameters[f"{self.layer}.bias"]
        with torch.no_grad():
            grey = some.new_full((1, *evidence.input_shape), 0.5)
            start = features_of(network, self.layer, grey).to(wanted)
        away = ((start - wanted) * believed).square().sum()
        unit = away.clamp_min(1e-12)
        return {"features": wanted, "counts": counts, "believed": believed.float(), "unit": unit}

    def _seen(self, evidence: Evidence, features: Tensor) -> Tensor:
        """[features], boolean: whose columns of the weight were seen."""
        support = (evidence.support or {}).get(f"{self.layer}.weight")
        if support is None:
            return torch.ones(features.shape[1], dtype=torch.bool)
        seen = support.bool().all(0)
        return seen if evidence.records == 1 else seen & seen.all()

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        found = features_of(network, self.layer, trial.inputs)
        classes = torch.arange(len(given["counts"]), device=found.device)
        belongs = (trial.labels[:, None] == classes).to(found)
        mean = belongs.T @ found / given["counts"].clamp_min(1)[:, None]
        apart = (mean - given["features"]) * given["believed"]
        return apart.square().sum() / given["unit"]


@dataclass(frozen=True)
class GroupConsistency:
    """A coupling: each restart's mean square distance to what all restarts agree on (Yin et al.).

    The consensus is the mean of the restarts after each record was moved, by up to `shift` pixels
    either way, to where it best fits their plain mean; it is held fixed while slopes are taken.
    """

    weight: float
    shift: int = 0

    def __call__(self, points: Tensor) -> Tensor:
        """[problems, restarts, n, C, H, W] -> [problems, restarts]."""
        with torch.no_grad():
            consensus = self.consensus(points)
        return self.weight * (points - consensus).square().flatten(2).mean(2)

    def consensus(self, points: Tensor) -> Tensor:
        """[problems, 1, n, C, H, W]."""
        plain = points.mean(1, keepdim=True)
        if not self.shift:
            return plain
        reach = range(-self.shift, self.shift + 1)
        ways = sorted(((down, right) for down in reach for right in reach), key=_length)
        moved = torch.stack([points.roll(way, (-2, -1)) for way in ways])
        gaps = (moved - plain).square().sum((-3, -2, -1), keepdim=True)
        best = gaps.argmin(0, keepdim=True).expand(1, *points.shape)
        return moved.gather(0, best)[0].mean(1, keepdim=True)


def _length(way: tuple[int, int]) -> int:
    return abs(way[0]) + abs(way[1])


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours; [..., H, W]."""
    down = images[..., 1:, :] - images[..., :-1, :]
    right = images[..., :, 1:] - images[..., :, :-1]
    return down.abs().mean() + right.abs().mean()


def stacked(parts: list[Mapping[str, Tensor]]) -> Given:
    """By name, the tensors of all parts, one after another."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
