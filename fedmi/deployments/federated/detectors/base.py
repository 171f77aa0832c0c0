"""The base of what a client can check at the start of a round: a number, higher = suspicious."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedmi.exposure.component import Component


@dataclass(frozen=True)
class Received:
    """What one client has at the start of one round, before it trains.

    network: the module with the weights that were sent, in the mode in which the client trains.
    sent: the state dict as it came. before: the one that came before; None in the client's first
    round. inputs [n, C, H, W], labels [n]: of the round's first local step; n may be 0 under
    Poisson sampling. agreed: name -> shape of the tensors that all parties agreed on.
    """

    network: nn.Module
    sent: Mapping[str, Tensor]
    before: Mapping[str, Tensor] | None
    inputs: Tensor
    labels: Tensor
    agreed: Mapping[str, tuple[int, ...]]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weight tensors of dense and convolutional layers: all of two dimensions or more
        but the tables of embeddings."""
        tables = {
            f"{name}.weight"
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Embedding)
        }
        return {
            name: parameter.detach()
            for name, parameter in self.network.named_parameters()
            if parameter.dim() > 1 and name not in tables
        }

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of the mean loss of the first step, by name of the weight; zero without records."""
        if not len(self.labels):
            return {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        loss = cross_entropy(self.network(self.inputs), self.labels)
        return dict(zip(self.weights, self._gradients(loss), strict=True))

    def norms(self, records: int) -> Tensor:
        """[layers, n] norms of the gradients of the first n <= `records` records, each its own.

        Where batch statistics couple records, the gradient of one record's loss through them all.
        """
        inputs, labels = self.inputs[:records], self.labels[:records]
        if not len(labels):
            return torch.zeros(len(self.weights), 0)
        if self._coupled:
            losses = cross_entropy(self.network(inputs), labels, reduction="none")
            each = [self._norms(loss, keep=True) for loss in losses]
        else:
            pairs = [(inputs[[i]], labels[[i]]) for i in range(len(labels))]
            each = [self._norms(cross_entropy(self.network(x), y)) for x, y in pairs]
        return torch.stack(each, dim=1)

    @property
    def _coupled(self) -> bool:
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm)]
        return any(m.training or not m.track_running_stats for m in norms)

    def _norms(self, loss: Tensor, keep: bool = False) -> Tensor:
        return torch.stack([gradient.norm() for gradient in self._gradients(loss, keep)])

    def _gradients(self, loss: Tensor, keep: bool = False) -> list[Tensor]:
        parameters = dict(self.network.named_parameters())
        wanted = [parameters[name] for name in self.weights]
        found = torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
        return [
            torch.zeros_like(weight) if gradient is None else gradient
            for weight, gradient in zip(wanted, found, strict=True)
        ]


class Detector(Component):
    """One statistic that every client computes at the start of every round.

    It measures and does nothing: the client trains on whatever it was sent. What rate of alarms it
    would have had at a threshold with few false alarms is worked out from all the measurements.
    """

    of_model_alone: ClassVar[bool] = False
    """Whether it reads nothing of the client's own: all clients sent the same then agree."""

    fewest: ClassVar[int] = 1
    """Records of a first step below which it has nothing to measure."""

    @abstractmethod
    def statistic(self, seen: Received) -> float:
        """Higher is more suspicious; infinite where nothing honest can look so."""

    def measure(self, seen: Received) -> float:
        """The statistic; what cannot be computed is as suspicious as can be."""
        value = self.statistic(seen)
        return math.inf if math.isnan(value) else value
