"""A bag of tokens: the mean of their vectors, and one hidden layer."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.models.base import Shape
from fedmi.models.text import TextClassifier, TextSpec, reset


class BagNet(TextClassifier):
    """Mean over the tokens that are there, linear, ReLU, linear; places play no part."""

    def __init__(self, spec: "TextBag", classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocabulary, spec.dim)
        self.register_buffer("positions", torch.zeros(spec.positions, spec.dim), persistent=False)
        self.hidden = nn.Linear(spec.dim, spec.hidden)
        self.head = nn.Linear(spec.hidden, classes)
        reset(self, 0.1)

    def classify(self, embedded: Tensor, present: Tensor) -> Tensor:
        weight = present.to(embedded.dtype)[:, :, None]
        mean = (embedded * weight).sum(1) / weight.sum(1).clamp_min(1)
        logits: Tensor = self.head(torch.relu(self.hidden(mean)))
        return logits


class TextBag(TextSpec):
    """Classifier of sentences as bags of tokens: the evaluator beside a transformer."""

    kind: Literal["text_bag"] = "text_bag"
    paper: ClassVar[str] = (
        "Joulin, Grave, Bojanowski, Mikolov: Bag of Tricks for Efficient Text Classification, "
        "EACL 2017"
    )

    vocabulary: int = Field(default=4096, ge=5, le=200_000, description="token ids it knows")
    positions: int = Field(default=64, ge=3, le=8192, description="tokens of the longest sentence")
    dim: int = Field(default=64, ge=1, le=4096, description="width of a token")
    hidden: int = Field(default=64, ge=1, le=4096, description="units of the hidden layer")

    def module(self, shape: Shape, classes: int) -> nn.Module:
        self.check(shape)
        return BagNet(self, classes)
