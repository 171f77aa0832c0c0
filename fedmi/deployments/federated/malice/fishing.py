"""Fishing: a last layer that lets the gradient of one record of a large batch through."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.protections.base import Setting


class Fishing(Malice):
    """Alters the last linear layer so that one class, or one record of it, makes the gradient.

    class: rows of other classes are zero and their biases `margin`, so that the target class t has
    probability about 0: a record of another class passes nothing back through the last layer,
    (p_t - 0) w_t = 0, one of class t passes -w_t. With one record of class t in the batch, or in
    the aggregate of many clients, every gradient below the last layer is that record's over N.

    feature: where class t has several, w_t = -m e_j, b_t = m c, all else zero. A record of class t
    passes -(p_t - 1) m e_j with 1 - p_t = (K - 1) / (K - 1 + exp(m (c - h_j))): 1 above the cut-off
    c, falling exponentially below it, so that the record with the highest feature h_j stands out
    (the highest, as a ReLU that answers 0 passes nothing back).
    Feature j is the one whose public values are nearest to normal (Kolmogorov-Smirnov), c their
    normal quantile at 1 - expected / records, m = sharpness / standard deviation. Records of other
    classes with h_j < c pass m e_j as well and drown it: it is for clients of one class.

    Threat model: a malicious server, with public records for feature fishing; all clients get the
    same model, whose classifier is useless for the round. Refused for networks whose last layer
    with parameters is not linear with bias.
    """

    kind: Literal["fishing"] = "fishing"
    paper: ClassVar[str] = (
        "Wen, Geiping, Fowl, Goldblum, Goldstein: Fishing for User Data in Large-Batch Federated "
        "Learning via Gradient Magnification. ICML 2022"
    )
    alters: ClassVar = "the last linear layer, for one class or one feature of it"
    reads_public: ClassVar = True
    keeps: Literal["all", "unaltered", "nothing"] = "unaltered"
    strategy: Literal["class", "feature"] = Field(
        default="class", description="fish all of a class, or the one highest in a feature"
    )
    target_class: Annotated[int, Field(ge=0)] | Literal["each"] = Field(
        default="each", description="class fished; each = another one in every malicious round"
    )
    margin: float = Field(
        default=1000.0, gt=0, le=1e6, description="bias of other classes, in class fishing"
    )
    records: int = Field(
        default=50, ge=1, le=100_000, description="records of the class that it counts on"
    )
    expected: float = Field(
        default=0.3, gt=0, lt=100, description="of those, how many are to lie above the cut-off"
    )
    sharpness: float = Field(
        default=16.0, gt=0, le=1e4, description="how steep the cut-off is, per standard deviation"
    )
    population: Literal["class", "all"] = Field(
        default="class", description="public records whose features the cut-off is taken from"
    )

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        try:
            name, layer = last_layer(setting.network)
        except ValueError as error:
            return [*found, str(error)]
        if self.target_class != "each" and self.target_class >= layer.out_features:
            found.append(
                f"target_class = {self.target_class}, but layer '{name}' has classes 0 to "
                f"{layer.out_features - 1}"
            )
        return found

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        name, _ = last_layer(occasion.network)
        weight, bias = (model[f"{name}.{part}"] for part in ("weight", "bias"))
        target = self._target(occasion.round, len(bias))
        rows = torch.zeros_like(weight)
        if self.strategy == "class":
            rows[target] = weight[target]
            offsets = torch.full_like(bias, self.margin)
            offsets[target] = 0.0
        else:
            feature, cut, slope = self._cut(model, target, occasion)
            rows[target, feature] = slope
            offsets = torch.zeros_like(bias)
            offsets[target] = -slope * cut
        return {**model, f"{name}.weight": rows, f"{name}.bias": offsets}

    def _target(self, round: int, classes: int) -> int:
        if self.target_class != "each":
            return self.target_class
        return self.rounds.index(round) % classes

    def _cut(
        self, model: Mapping[str, Tensor], target: int, occasion: Occasion
    ) -> tuple[int, float, float]:
        """(feature, cut-off, slope) from the public records of the class, or from all."""
        inputs = torch.from_numpy(occasion.public.inputs)
        if self.population == "class":
            own = torch.from_numpy(occasion.public.labels) == target
            inputs = inputs[own] if int(own.sum()) >= FEWEST else inputs
        values = features(occasion.network, model, inputs[:MOST]).double()
        spread = values.std(0)
        able = torch.nonzero(spread > 1e-3 * spread.max()).flatten()
        normal = ((values - values.mean(0)) / spread.clamp_min(1e-12))[:, able]
        chosen = int(able[_distances_from_normal(normal).argmin()])
        quantile = float(stats.norm.isf(min(0.5, self.expected / self.records)))
        cut = float(values[:, chosen].mean() + quantile * spread[chosen])
        return chosen, cut, -self.sharpness / float(spread[chosen])


FEWEST, MOST = 8, 1000
"""Public records of a class below which all are taken, and records that are looked at."""


def last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last layer with parameters; ValueError unless linear with bias."""
    named = [
        (name, module)
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    if not named:
        raise ValueError("fishing needs a last linear layer; the network has no parameters")
    name, layer = named[-1]
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise ValueError(
            f"fishing needs a last layer that is linear with bias; '{name}' is a "
            f"{type(layer).__name__}{' without one' if isinstance(layer, nn.Linear) else ''}"
        )
    return name, layer


@torch.no_grad()
def features(network: nn.Module, model: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """What the last layer is given for inputs [n, C, H, W] under the state dict, in eval mode."""
    seen: list[Tensor] = []
    hook = last_layer(network)[1].register_forward_pre_hook(
        lambda _layer, given: seen.append(given[0].flatten(1))
    )
    mode = network.training
    try:
        network.eval()
        for part in torch.split(inputs, 250):
            functional_call(network, dict(model), (part,))
    finally:
        hook.remove()
        network.train(mode)
    return torch.cat(seen)


def _distances_from_normal(values: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of each standardised column [n, d] from N(0, 1), [d]."""
    count = len(values)
    below = torch.special.ndtr(values.sort(0).values)
    steps = torch.arange(1, count + 1, dtype=values.dtype)[:, None] / count
    return torch.maximum((steps - below).abs(), (below - steps + 1 / count).abs()).amax(0)
