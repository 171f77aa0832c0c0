"""Trap weights: neurons of the first fully connected layer that few records activate."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.deployments.federated.malice.passing import Passage, passage
from fedmi.protections.base import Setting


class TrapWeights(Malice):
    """Redraws the first fully connected layer so that about `active` records fire each neuron.

    Of every row of the weights a random half is -|n| and the other s |n|, with n ~ N(0, std^2) and
    s < 1; biases are 0. A record fires a neuron where s P > Q, with P and Q its products with the
    |n| of either half, so s is the quantile of Q / P, over neurons and public records, at
    active / records. A neuron that a single record fires has that record as its weight gradient
    over its bias gradient. Convolutions before the layer become kernels with a single 1, so that
    they hand every pixel on: one of stride t takes t^2 channels for each that carries pixels.

    Threat model: a malicious server with public records of about the same kind. The architecture
    stays as it is; all clients get the same model, whose first layer is as good as untrained.
    Refused for networks without a fully connected layer that a ReLU follows, and where a layer
    before it does not let the image pass unchanged.
    """

    kind: Literal["trap_weights"] = "trap_weights"
    paper: ClassVar[str] = (
        "Boenisch, Dziedzic, Schuster, Shahin Shamsabadi, Shumailov, Papernot: When the Curious "
        "Abandon Honesty: Federated Learning Is Not Private. EuroS&P 2023"
    )
    alters: ClassVar = "the first fully connected layer, and convolutions before it"
    reads_public: ClassVar = True
    keeps: Literal["all", "unaltered", "nothing"] = "unaltered"
    records: int = Field(
        default=50, ge=1, le=100_000, description="records behind a gradient that it counts on"
    )
    active: float = Field(
        default=2.0, gt=0, le=1000, description="of those, how many are to fire a neuron on average"
    )
    weight_std: float = Field(
        default=0.1, gt=0, le=100, description="standard deviation of the weights before scaling"
    )

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        try:
            passage(setting.network)
        except ValueError as error:
            found.append(str(error))
        return found

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        way = passage(occasion.network, occasion.shape)
        carried = way.sources >= 0
        inputs = torch.from_numpy(occasion.public.inputs[:PUBLIC]).flatten(1)
        rng = occasion.seed.child("traps").torch()
        halves = self._halves(len(model[way.bias]), int(carried.sum()), rng)
        weight = torch.zeros_like(model[way.weight])
        weight[:, carried] = self._scaled(*halves, inputs[:, way.sources[carried]])
        traps = {way.weight: weight, way.bias: torch.zeros_like(model[way.bias])}
        return {**model, **_kernels(way, model), **traps}

    def _halves(self, neurons: int, inputs: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(positive, negative) parts of the unscaled weights, [neurons, inputs], both >= 0."""
        half = inputs // 2
        order = torch.rand(neurons, inputs, generator=rng).argsort(1)
        drawn = self.weight_std * torch.randn(neurons, half, generator=rng).abs()
        nothing = torch.zeros(neurons, inputs)
        return (
            nothing.scatter(1, order[:, half : 2 * half], drawn),
            nothing.scatter(1, order[:, :half], drawn),
        )

    def _scaled(self, positive: Tensor, negative: Tensor, public: Tensor) -> Tensor:
        """The weights: s positive - negative, s by how public records fire the neurons."""
        gains, losses = public @ positive.T, public @ negative.T
        ratios = (losses / gains.clamp_min(1e-12)).flatten().sort().values
        share = min(1.0, self.active / self.records)
        scale = ratios[min(len(ratios) - 1, int(share * len(ratios)))]
        return scale * positive - negative


PUBLIC = 1000
"""Public records that the scale is fitted to, at most."""


def _kernels(way: Passage, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the convolutions that hand the image on, and their biases, 0."""
    made: dict[str, Tensor] = {}
    for name, taps in way.convolutions:
        made[f"{name}.weight"] = torch.zeros_like(model[f"{name}.weight"])
        for out, tap in enumerate(taps):
            made[f"{name}.weight"][(out, *tap)] = 1.0
        if f"{name}.bias" in model:
            made[f"{name}.bias"] = torch.zeros_like(model[f"{name}.bias"])
    return made
