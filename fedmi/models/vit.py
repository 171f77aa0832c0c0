"""A small vision transformer."""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from fedmi.models.attention import Attention, Block
from fedmi.models.base import ModelSpec, Shape

__all__ = ["Attention", "Block", "Patches", "Tokens", "ViT", "VisionTransformer"]


class Patches(nn.Module):
    """Images [n, C, H, W] to patches [n, rows x columns, C x size x size], and back.

    Where `size` does not divide the image, zeros are added below and at the right.
    """

    def __init__(self, shape: Shape, size: int) -> None:
        super().__init__()
        self.shape, self.size = shape, size
        self.grid = (math.ceil(shape[1] / size), math.ceil(shape[2] / size))
        self.count = self.grid[0] * self.grid[1]
        self.pixels = shape[0] * size * size

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1:] != self.shape:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: [n, {', '.join(map(str, self.shape))}] "
                "was expected"
            )
        (rows, columns), size = self.grid, self.size
        below, right = rows * size - self.shape[1], columns * size - self.shape[2]
        padded = pad(images, (0, right, 0, below))
        tiles = padded.reshape(-1, self.shape[0], rows, size, columns, size)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.count, self.pixels)

    def images(self, patches: Tensor) -> Tensor:
        """The inverse of `forward`; what lies in the added margin is dropped."""
        (rows, columns), size = self.grid, self.size
        channels, height, width = self.shape
        tiles = patches.reshape(-1, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        images = tiles.reshape(-1, channels, rows * size, columns * size)
        return images[:, :, :height, :width]


class Tokens(nn.Module):
    """A class token before the embedded patches [n, patches, dim], and a position added to each."""

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(dim))
        self.position = nn.Parameter(torch.empty(patches + 1, dim))

    def forward(self, embedded: Tensor) -> Tensor:
        first = self.class_token.expand(embedded.shape[0], 1, -1)
        return torch.cat([first, embedded], 1) + self.position


class VisionTransformer(nn.Module):
    """[n, C, H, W] -> logits [n, classes], read from the class token after the last block."""

    def __init__(self, spec: "ViT", shape: Shape, classes: int) -> None:
        super().__init__()
        hidden = round(spec.dim * spec.mlp_ratio)
        self.arrangement = spec.arrangement
        self.patches = Patches(shape, spec.patch)
        self.tokens = Tokens(self.patches.count, spec.dim)
        self.embedding = nn.Linear(self.patches.pixels, spec.dim)
        blocks = [Block(spec.dim, spec.heads, hidden, spec.arrangement) for _ in range(spec.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, classes)
        nn.init.normal_(self.tokens.class_token, std=spec.position_std)
        nn.init.normal_(self.tokens.position, std=spec.position_std)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.tokens(self.embedding(self.patches(images))))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


class ViT(ModelSpec):
    """A vision transformer with a class token and learnable positions, for small images.

    `pre_norm` is ViT's own arrangement (residuals, LayerNorm before attention and MLP). `plain`
    stacks attention, normalisation and MLP without residuals, so that the first attention reads
    the embedded patches themselves: architecture (A) of Lu et al. (APRIL, CVPR 2022).
    """

    kind: Literal["vit"] = "vit"
    paper: ClassVar[str] = (
        "Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at "
        "Scale, ICLR 2021"
    )
    patch: int = Field(default=4, ge=1, le=64, description="side of a patch, in pixels")
    dim: int = Field(default=96, ge=2, le=4096, description="width of a token")
    depth: int = Field(default=2, ge=1, le=48, description="blocks of attention and MLP")
    heads: int = Field(default=4, ge=1, le=64, description="attention heads; they divide dim")
    mlp_ratio: float = Field(default=2.0, gt=0, le=16, description="hidden width of an MLP / dim")
    arrangement: Literal["pre_norm", "plain"] = Field(
        default="pre_norm", description="of normalisation and residuals around attention and MLP"
    )
    position_std: float = Field(
        default=0.02, gt=0, le=1, description="of the initial positions and class token"
    )

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self

    def module(self, shape: Shape, classes: int) -> nn.Module:
        return VisionTransformer(self, shape, classes)
