"""The first block of a transformer of sentences, token by token and in double precision."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from fedmi.attacks.engine.evidence import AttackError
from fedmi.models.attention import Block
from fedmi.models.text import TextClassifier
from fedmi.models.text_transformer import TransformerNet

READ = tuple(f"blocks.0.attention.{part}" for part in ("query", "key", "value"))
"""Layers that read a token at its place."""
MIXED = ("blocks.0.mlp.0",)
"""Layers that read a token after attention."""


@dataclass(frozen=True)
class Pairs:
    """Tokens at places. token, place: [c]; stream [c, dim]: what attention's output is added to;
    read [c, dim]: what attention reads; query, key, value: [c, heads, dim / heads]."""

    token: Tensor
    place: Tensor
    stream: Tensor
    read: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.token)

    def at(self, place: int) -> Tensor:
        """Indices of the pairs at one place."""
        return torch.nonzero(self.place == place).flatten()


class FirstBlock:
    """Embeddings and first block of a `TransformerNet` with the weights of a state dict."""

    def __init__(self, network: TransformerNet, state: Mapping[str, Tensor]) -> None:
        network = deepcopy(network)
        network.load_state_dict(dict(state))
        self.network = network.double().eval().requires_grad_(False)
        block = network.blocks[0]
        assert isinstance(block, Block)
        self.block, self.causal = block, network.causal
        self.final = block.first_norm if network.normed_first else block.second_norm

    @property
    def vocabulary(self) -> int:
        return self.network.tokens.num_embeddings

    def pairs(self, token: Tensor, place: Tensor) -> Pairs:
        stream, read = self._read(self.network.tokens.weight[token] + self.network.positions[place])
        attention = self.block.attention
        query, key, value = (
            layer(read).reshape(len(token), attention.heads, -1)
            for layer in (attention.query, attention.key, attention.value)
        )
        return Pairs(token, place, stream, read, query, key, value)

    def readings(self, place: int) -> Tensor:
        """What attention reads of each token of the vocabulary at a place. [vocabulary, dim]"""
        return self._read(self.network.tokens.weight + self.network.positions[place])[1]

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., heads, e] each -> [..., heads]: how much the one attends to the other."""
        return (query * key).sum(-1) / sqrt(key.shape[-1])

    def mixed(self, stream: Tensor, values: Tensor) -> Tensor:
        """What the MLP reads: [..., dim], [..., heads, e] attended values -> [..., dim]."""
        out: Tensor = self.final(stream + self.block.attention.output(values.flatten(-2)))
        return out

    def _read(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        if self.network.normed_first:
            normed = self.network.norm(embedded)
            return normed, normed
        return embedded, self.block.first_norm(embedded)


def transformer(network: nn.Module) -> TransformerNet:
    """The network, if its first block can be read; AttackError says why not."""
    if not isinstance(network, TextClassifier):
        raise AttackError(
            f"it reads the gradient of attention over tokens; {type(network).__name__} is no "
            "classifier of text: use a text_transformer"
        )
    if not isinstance(network, TransformerNet):
        raise AttackError(
            f"it reads the gradient of attention; {type(network).__name__} has none: use 'tag' or "
            "'lamp', or a text_transformer"
        )
    return network


def two_blocks(network: nn.Module) -> TransformerNet:
    """The same; AttackError too if there is one block only."""
    found = transformer(network)
    if len(found.blocks) < 2:
        raise AttackError(
            "'blocks.0' is the only block: nothing but the token that is classified reads on, so "
            "the other tokens have no rows of their own in the gradient of 'blocks.0.mlp.0'; "
            "depth = 2 at least"
        )
    return found
