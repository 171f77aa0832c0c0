"""Multi-head self-attention, and blocks of it: what the transformers share."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Arrangement = Literal["pre_norm", "post_norm", "plain"]


class Attention(nn.Module):
    """Multi-head self-attention [n, tokens, dim] -> the same, of four linear layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.output = nn.Linear(dim, dim)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: boolean, [n, 1, tokens or 1, tokens], whether a token (row) may read another."""
        query, key, value = (
            layer(inputs).reshape(*inputs.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        mixed: Tensor = self.output((scores.softmax(3) @ value).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and MLP; for both, `pre_norm`: x + f(norm(x)), `post_norm`: norm(x + f(x)), and
    `plain`: norm(f(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, arrangement: Arrangement) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.arrangement == "plain":
            mixed = self.first_norm(self.attention(inputs, mask))
            plain: Tensor = self.second_norm(self.mlp(mixed))
            return plain
        if self.arrangement == "post_norm":
            mixed = self.first_norm(inputs + self.attention(inputs, mask))
            normed: Tensor = self.second_norm(mixed + self.mlp(mixed))
            return normed
        mixed = inputs + self.attention(self.first_norm(inputs), mask)
        skipped: Tensor = mixed + self.mlp(self.second_norm(mixed))
        return skipped
