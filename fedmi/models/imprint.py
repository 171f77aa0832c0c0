"""The imprint block that a malicious server puts in front of a model, and the model behind it."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from fedmi.exposure.schema import Schema
from fedmi.models.base import ModelSpec, Shape

BLOCK = "imprint."
"""What the names of the block's tensors begin with."""
MARGIN = 1
"""Entries that the convolution's output is wider than a record on each side: see `Imprint`."""

Activation = Literal["relu", "hard"]


class Imprint(nn.Module):
    """x + second(act(first(copies(x)))), with the shape of x; as built, x itself.

    first: [bins, entries of the copies], second: [entries of x, bins]. act: ReLU, or max(0,
    min(1, .)), which passes a gradient on in (0, 1) alone. copies: x itself or, for `groups` > 0,
    a convolution with 3 x 3 kernels from C to groups x C channels. It pads by two entries, so that
    its outermost ring sees no entry of x through the centre of a kernel, but only the bias.
    All weights start from zero, so the block changes nothing until something is planted in it.
    """

    def __init__(self, shape: Shape, bins: int, activation: Activation, groups: int = 0) -> None:
        super().__init__()
        colours, height, width = shape
        entries = wide = colours * height * width
        self.copies: nn.Module = nn.Identity()
        if groups:
            self.copies = nn.Conv2d(colours, groups * colours, 3, padding=1 + MARGIN)
            wide = groups * colours * (height + 2 * MARGIN) * (width + 2 * MARGIN)
        self.first = nn.Linear(wide, bins)
        self.second = nn.Linear(bins, entries)
        self.activation = nn.Hardtanh(0.0, 1.0) if activation == "hard" else nn.ReLU()
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.first(self.copies(inputs).flatten(1)))
        moved: Tensor = self.second(hidden)
        return inputs + moved.view_as(inputs)


class Imprinted(nn.Module):
    """An imprint block, and a model that takes what comes out of it."""

    def __init__(self, imprint: Imprint, model: nn.Module) -> None:
        super().__init__()
        self.imprint = imprint
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(self.imprint(inputs))
        return logits


class ImprintedModel(ModelSpec):
    """Some other model behind an imprint block: what a malicious server has clients train.

    No model of a scenario: `kind` has no default, so that it is not among the components.
    Raises ValueError for a block with more bins than its input has entries.
    """

    kind: str
    model: SerializeAsAny[ModelSpec] = Field(description="the scenario's own model")
    bins: int = Field(ge=2, le=65536, description="units of the first layer")
    activation: Activation = "relu"
    groups: int = Field(default=0, ge=0, description="copies of the channels; 0 = none is made")

    paper: ClassVar[str] = (
        "Fowl, Geiping, Czaja, Goldblum, Goldstein: Robbing the Fed: Directly Obtaining Private "
        "Data in Federated Learning with Modified Models. ICLR 2022"
    )

    def misfit(self, schema: Schema) -> str:
        return super().misfit(schema) or self.model.misfit(schema)

    def module(self, shape: Shape, classes: int) -> nn.Module:
        channels, height, width = shape
        entries = channels * height * width
        if self.groups:
            entries = self.groups * channels * (height + 2 * MARGIN) * (width + 2 * MARGIN)
        if self.bins > entries:
            raise ValueError(
                f"the imprint block is larger than the model's input: bins = {self.bins}, but its "
                f"first layer takes {entries} numbers; at most {entries} bins would be right"
            )
        # The model first: the same seed then gives it the weights that it has without the block.
        model = self.model.module(shape, classes)
        return Imprinted(Imprint(shape, self.bins, self.activation, self.groups), model)


def interior(wide: Tensor, shape: Shape) -> Tensor:
    """[..., groups x C x (H + 2) x (W + 2)] of the first layer -> [..., groups, C, H, W], without
    the ring around each copy."""
    return framed(wide, shape)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def ring(wide: Tensor, shape: Shape) -> Tensor:
    """[..., groups x C x (H + 2) x (W + 2)] -> [..., groups, entries of the rings of C copies]."""
    _, height, width = shape
    mask = torch.ones(height + 2 * MARGIN, width + 2 * MARGIN, dtype=torch.bool)
    mask[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    return framed(wide, shape)[..., mask].flatten(-2)


def framed(wide: Tensor, shape: Shape) -> Tensor:
    """[..., groups x C x (H + 2) x (W + 2)] -> [..., groups, C, H + 2, W + 2]."""
    channels, height, width = shape
    return wide.view(*wide.shape[:-1], -1, channels, height + 2 * MARGIN, width + 2 * MARGIN)
