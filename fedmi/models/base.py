"""The base of model specifications."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from fedmi.exposure.component import Component
from fedmi.exposure.schema import Schema
from fedmi.exposure.seeding import Seed

Shape = tuple[int, int, int]


class ModelSpec(Component):
    """A classifier [n, C, H, W] in [0, 1], or token ids -> logits [n, classes]."""

    takes: ClassVar[frozenset[str]] = frozenset({"pixels", "table"})
    """Kinds of records that it is for."""

    def misfit(self, schema: Schema) -> str:
        """Why it cannot be trained on such records, or ""."""
        if schema.kind in self.takes:
            return ""
        return f"takes {' or '.join(sorted(self.takes))}, but the records are {schema.kind}"

    @abstractmethod
    def module(self, shape: Shape, classes: int) -> nn.Module:
        """A module with whatever weights the global generator gives."""

    def build(self, shape: Shape, classes: int, seed: Seed) -> nn.Module:
        """A module whose initial weights follow from `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.value)
            return self.module(shape, classes)

    def blueprint(self, shape: Shape, classes: int) -> nn.Module:
        """The module on the meta device: its layers and shapes; nothing is allocated."""
        with torch.device("meta"):
            return self.module(shape, classes)

    def parameters(self, shape: Shape, classes: int) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.blueprint(shape, classes).parameters())


def features(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Input of the last linear layer, flattened to [n, features]."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _m, args, _out: seen.append(args[0].flatten(1)))
    try:
        model(inputs)
    finally:
        hook.remove()
    return seen[0]
