"""LOKI: an imprint block whose input is another place for every client."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.deployments.federated.malice.base import Occasion
from fedmi.deployments.federated.malice.imprinting import Imprinting, block
from fedmi.models.imprint import Activation, interior
from fedmi.protections.base import Setting

RING = 0.1
"""The convolution's bias, in units of its kernels: what the ring around a copy shows."""


class Loki(Imprinting):
    """Robbing the Fed's block behind a convolution that is customised for each client.

    The convolution copies the record to one group of channels (kernels with the convolutional
    scaling factor F in their centre), another one for every client asked; all other kernels are
    zero. The imprint layer is the same for all: it measures the brightness of whatever copy there
    is. So the gradient of its weight holds each client's records in columns of their own, and the
    sum over any number of clients, as secure aggregation gives it, tells them apart; the bins need
    to separate the records of one client only. The bias gradient does add up over clients. In its
    place stands the ring around each copy, which sees no more than the convolution's bias.

    F makes the kernels large and the imprint layer's weights small in turn, so that what a local
    step adds to the kernels, or loses to rounding, moves no bin. Threat model: a malicious server
    that dictates the architecture and sends different models to different clients; no client
    compares. Size: bins x groups x the numbers of a record. Refused for more clients a round than
    groups.
    """

    kind: Literal["loki"] = "loki"
    paper: ClassVar[str] = (
        "Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi: LOKI: Large-scale Data "
        "Reconstruction Attack against Federated Learning through Model Manipulation. IEEE S&P 2024"
    )
    alters: ClassVar = "an imprint block behind a convolution of its own for every client"

    groups: int = Field(
        default=10, ge=1, le=10_000, description="groups of channels: clients told apart a round"
    )
    activation: Activation = Field(
        default="hard",
        description="relu: a unit answers to all records above its bin; hard: to those in it "
        "alone, which survives several local steps",
    )
    scaling_factor: float = Field(
        default=10.0, gt=0, le=1e6, description="the convolutional scaling factor F"
    )

    @property
    def copies(self) -> int:
        return self.groups

    @property
    def factor(self) -> float:
        return self.scaling_factor

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        if setting.asked > self.groups:
            found.append(
                f"groups = {self.groups}, but {setting.asked} clients are asked a round and each "
                f"needs one of its own; groups = {setting.asked} would be right"
            )
        return found

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        planted, shape = self.planted(model, occasion), occasion.shape
        entries, factor = len(planted.columns), self.scaling_factor
        first = torch.zeros_like(model["imprint.first.weight"], dtype=torch.float64)
        slopes = planted.slopes[:, None, None, None, None] / (entries * factor)
        interior(first, shape).copy_(slopes.expand_as(interior(first, shape)))
        parts = {
            **self._copying(model, occasion.asked.index(client), shape[0]),
            "first.weight": first,
            "first.bias": planted.offsets - planted.slopes * RING,
            "second.weight": planted.columns,
            "second.bias": planted.shift,
        }
        return {**model, **block(parts)}

    def _copying(self, model: Mapping[str, Tensor], group: int, channels: int) -> dict[str, Tensor]:
        """A convolution that copies the record to one group of channels."""
        weight = torch.zeros_like(model["imprint.copies.weight"], dtype=torch.float64)
        bias = torch.zeros_like(model["imprint.copies.bias"], dtype=torch.float64)
        for channel in range(channels):
            weight[group * channels + channel, channel, 1, 1] = self.scaling_factor
            bias[group * channels + channel] = RING * self.scaling_factor
        return {"copies.weight": weight, "copies.bias": bias}
