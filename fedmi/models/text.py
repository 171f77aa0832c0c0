"""Classifiers of sentences: what attacks on text may ask of any of them."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fedmi.exposure.schema import PADDING, Schema, Text
from fedmi.models.base import ModelSpec, Shape


class TextClassifier(nn.Module):
    """[n, 1, 1, length] token ids -> logits [n, classes], by way of embeddings.

    tokens: one vector a token id, [vocabulary, dim]. positions: one a place, [positions, dim].
    """

    tokens: nn.Embedding
    positions: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        ids = token_ids(inputs)
        return self.classify(self.embed(ids), ids != PADDING)

    def embed(self, ids: Tensor) -> Tensor:
        """[n, length] ids -> [n, length, dim]: the token's vector and that of its place."""
        found: Tensor = self.tokens(ids) + self.positions[: ids.shape[1]]
        return found

    @abstractmethod
    def classify(self, embedded: Tensor, present: Tensor) -> Tensor:
        """[n, length, dim] as `embed` gives, [n, length] whether a place holds a token -> logits;
        differentiable in `embedded`."""


class TextSpec(ModelSpec):
    """The specification of a `TextClassifier`."""

    takes = frozenset({"text"})
    vocabulary: int
    positions: int

    def misfit(self, schema: Schema) -> str:
        if not isinstance(schema, Text):
            return super().misfit(schema)
        if len(schema.pieces) > self.vocabulary:
            return (
                f"vocabulary = {self.vocabulary}, but the data has {len(schema.pieces)} tokens; "
                f"vocabulary = {len(schema.pieces)} would be right"
            )
        if schema.length > self.positions:
            return (
                f"positions = {self.positions}, but sentences have {schema.length} tokens; give "
                "as many positions, or the data a smaller length"
            )
        return ""

    def check(self, shape: Shape) -> None:
        """ValueError unless records of this shape may be sentences that fit."""
        if shape[:2] != (1, 1) or shape[2] > self.positions:
            raise ValueError(
                f"sentences [1, 1, up to {self.positions}] were expected, records are {list(shape)}"
            )


def token_ids(inputs: Tensor) -> Tensor:
    """[n, 1, 1, length] numbers -> [n, length] ids."""
    return inputs.flatten(1).long()


def reset(module: nn.Module, std: float) -> None:
    """Weights of linear layers and embeddings from N(0, std), biases 0: the transformers' own."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    for name, weight in module.named_parameters():
        if name.rpartition(".")[2] == "positions":
            nn.init.normal_(weight, std=std)


def last_present(present: Tensor) -> Tensor:
    """[n, length] -> [n]: the place of each sentence's last token."""
    return (present.long().sum(1) - 1).clamp_min(0)


def pick(hidden: Tensor, places: Tensor) -> Tensor:
    """[n, length, dim], [n] -> [n, dim]: what stands at each sentence's place."""
    index = places[:, None, None].expand(-1, 1, hidden.shape[2])
    return torch.gather(hidden, 1, index)[:, 0]
