"""An update in the coordinates of standardised columns, where it can be matched column by column.

With x' = (x - mean) / scale, a first layer W x + b is W' x' + b' of W' = W scale, b' = b + W mean,
and its gradient G_W' = (G_W - G_b mean^T) / scale: what all rows have in common, which makes most
of a cosine, is gone, and every column weighs the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.tables import columns_of
from fedmi.exposure.schema import Table

SMALLEST = 0.05
"""Standard deviation of entries that hardly vary."""


@dataclass(frozen=True)
class Whitening:
    """mean, scale: [entries]; layer: name of the linear layer that the entries go into."""

    layer: str
    mean: Tensor
    scale: Tensor

    def inputs(self, entries: Tensor) -> Tensor:
        return (entries - self.mean.to(entries)) / self.scale.to(entries)

    def evidence(self, seen: Evidence) -> Evidence:
        weight, bias = f"{self.layer}.weight", f"{self.layer}.bias"
        base = dict(seen.base)
        base[bias] = base[bias] + base[weight] @ self.mean.to(base[weight])
        base[weight] = base[weight] * self.scale.to(base[weight])
        return replace(
            seen,
            base=base,
            gradient=self._turned(seen.gradient),
            descent=self._turned(seen.descent),
            support=self._supported(seen.support),
        )

    def _supported(self, support: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """A turned entry needs its own and its row's entry of the bias."""
        weight, bias = f"{self.layer}.weight", f"{self.layer}.bias"
        if support is None or bias not in support:
            return support
        return {**support, weight: support[weight] & support[bias][:, None]}

    def _turned(self, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = f"{self.layer}.weight", f"{self.layer}.bias"
        common = slopes[bias][:, None] * self.mean.to(slopes[bias])
        turned = (slopes[weight] - common) / self.scale.to(slopes[bias])
        return {**slopes, weight: turned}


def whitening(case: Case, schema: Table) -> Whitening | None:
    """By the public rows where they are granted, else by the schema: levels alike, numbers about
    the middle. None where the entries do not go straight into a linear layer with a bias."""
    layer = _first_layer(case, schema)
    if layer is None:
        return None
    if case.knowledge.public is not None:
        rows = case.knowledge.public[0].flatten(1)
        return Whitening(layer, rows.mean(0), rows.std(0, correction=0).clamp_min(SMALLEST))
    mean, scale = torch.full((schema.entries,), 0.5), torch.empty(schema.entries)
    for column, place in columns_of(schema):
        share = 1 / column.width
        if column.levels:
            mean[place] = share
        scale[place] = (share * (1 - share)) ** 0.5 if column.levels else column.scaled_deviation
    return Whitening(layer, mean, scale.clamp_min(SMALLEST))


def _first_layer(case: Case, schema: Table) -> str | None:
    network = case.knowledge.build() if case.knowledge.build else None
    if not isinstance(network, nn.Sequential):
        return None
    for name, module in network.named_children():
        if isinstance(module, nn.Linear):
            fits = module.in_features == schema.entries and module.bias is not None
            return name if fits else None
        if not isinstance(module, nn.Flatten):
            return None
    return None
