"""Model inconsistency: every client but the victim is sent a model whose gradient is zero."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.protections.base import Setting

AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
"""Layers that answer a constant once their weight is zero: that of their bias."""
PASSIVE = (nn.Identity, nn.Dropout, nn.Flatten)
"""Layers that hand a constant on."""


class ModelInconsistency(Malice):
    """Gradient suppression: all clients but the victim get a model with one dead layer of ReLUs.

    The layer that feeds the chosen ReLUs gets weight 0 and bias -margin, so that every ReLU
    answers 0 to every input and passes no gradient back: whatever the data, the gradient is
    exactly zero in that layer, in all before it, and in the weight of the layer after it. It stays
    so through local steps with momentum, weight decay (which moves the parameters in a known way)
    and FedProx. The victim gets the honest model, so that the aggregate is its update alone, scaled
    by its share of the weights, whatever secure aggregation does; what is left of the others are
    the layers behind the dead one: with the last ReLUs dead, the last bias and nothing else.

    Threat model: a malicious server that sends different models to different clients, no colluder
    and no Sybil; a client does not compare models with others. One that looks at its activations
    sees a layer that is dead on all its records. A `victim` that is not asked in a round leaves
    that round honest. Refused for networks without an exactly suppressible layer.
    """

    kind: Literal["model_inconsistency"] = "model_inconsistency"
    paper: ClassVar[str] = (
        "Pasquini, Francati, Ateniese: Eluding Secure Aggregation in Federated Learning via Model "
        "Inconsistency. CCS 2022"
    )
    alters: ClassVar = "one layer of ReLUs dead for all clients but the victim"
    victim: Annotated[int, Field(ge=0)] | Literal["each"] = Field(
        default="each",
        description="client that gets the honest model; each = one of those asked, drawn anew from "
        "the seed in every malicious round",
    )
    layer: str = Field(
        default="last", description="name of the ReLU module that dies, or `last` = the last one"
    )
    margin: float = Field(
        default=1.0, gt=0, le=1e6, description="how far below zero the dead ReLUs' inputs lie"
    )

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        if self.victim != "each" and self.victim >= setting.clients:
            found.append(f"victim = {self.victim}, but clients are 0 to {setting.clients - 1}")
        try:
            self._feeding(setting.network)
        except ValueError as error:
            found.append(str(error))
        return found

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        victim = self._victim(occasion)
        if client == victim or victim not in occasion.asked:
            return model
        weight, bias = (f"{self._feeding(occasion.network)}.{part}" for part in ("weight", "bias"))
        dead = {
            weight: torch.zeros_like(model[weight]),
            bias: torch.full_like(model[bias], -self.margin),
        }
        return {**model, **dead}

    def _victim(self, occasion: Occasion) -> int:
        if self.victim != "each":
            return self.victim
        return int(occasion.seed.child("victim").numpy().choice(occasion.asked))

    def _feeding(self, network: nn.Module) -> str:
        """Name of the layer that feeds the chosen ReLUs; ValueError says why none can be killed."""
        fed_by = _fed_by(network)
        if not fed_by:
            raise ValueError(
                "no layer can be suppressed: the network has no ReLU module, and an activation "
                "that is never exactly flat at zero (sigmoid, tanh, gelu) passes gradients on"
            )
        chosen = list(fed_by)[-1] if self.layer == "last" else self.layer
        if chosen not in fed_by:
            known = ", ".join(f"'{name}'" for name in fed_by)
            raise ValueError(f"layer '{self.layer}' is no ReLU of the network; its ReLUs: {known}")
        name, layer = fed_by[chosen]
        if not isinstance(layer, AFFINE) or layer.weight is None or layer.bias is None:
            raise ValueError(
                f"ReLU '{chosen}' cannot be suppressed: it is fed by '{name}', a "
                f"{type(layer).__name__}, not by a layer with weight and bias"
            )
        return name


def _fed_by(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """ReLU -> (name, layer) that feeds it, in order; ValueError if the network is no plain chain.

    Past a dead ReLU, only a chain leaves the layers behind it without any input of the client's.
    """
    chain: list[tuple[str, nn.Module]] = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.Sequential) and any(True for _ in module.children()):
            raise ValueError(
                f"no layer can be suppressed: '{name or 'network'}', a {type(module).__name__}, is "
                "no plain chain of layers, so gradients may pass by a dead ReLU"
            )
        if not isinstance(module, (nn.Sequential, *PASSIVE)):
            chain.append((name, module))
    return {name: before for before, (name, after) in pairwise(chain) if isinstance(after, nn.ReLU)}
