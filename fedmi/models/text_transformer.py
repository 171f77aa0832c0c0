"""A small transformer that classifies sentences, as an encoder (BERT) or a decoder (GPT-2)."""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedmi.models.attention import Arrangement, Block
from fedmi.models.base import Shape
from fedmi.models.text import TextClassifier, TextSpec, last_present, pick, reset


class TransformerNet(TextClassifier):
    """An encoder reads the logits off the first token, a decoder off the last.

    post_norm (BERT): the embeddings are normalised, and every block after its sums. pre_norm
    (GPT-2): every block before attention and MLP, and once at the end.
    """

    def __init__(self, spec: "TextTransformer", classes: int) -> None:
        super().__init__()
        self.causal, dim = spec.causal, spec.dim
        arrangement: Arrangement = spec.arrangement
        self.tokens = nn.Embedding(spec.vocabulary, dim)
        self.positions = nn.Parameter(torch.empty(spec.positions, dim))
        self.norm = nn.LayerNorm(dim)
        self.normed_first = arrangement == "post_norm"
        hidden = round(dim * spec.mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(dim, spec.heads, hidden, arrangement) for _ in range(spec.depth)
        )
        self.head = nn.Linear(dim, classes)
        reset(self, spec.initial_std)

    def classify(self, embedded: Tensor, present: Tensor) -> Tensor:
        hidden = self.norm(embedded) if self.normed_first else embedded
        mask = self.mask(present)
        for block in self.blocks:
            hidden = block(hidden, mask)
        places = last_present(present) if self.causal else torch.zeros_like(present[:, 0]).long()
        read = pick(hidden, places)
        logits: Tensor = self.head(read if self.normed_first else self.norm(read))
        return logits

    def mask(self, present: Tensor) -> Tensor:
        """[n, length] -> [n, 1, 1 or length, length]: which token may read which."""
        seen = present[:, None, None, :]
        if not self.causal:
            return seen
        length = present.shape[1]
        order = torch.ones(length, length, dtype=torch.bool, device=present.device).tril()
        return seen & order


class TextTransformer(TextSpec):
    """Transformer classifier of sentences, trained from scratch.

    `causal = false` with `post_norm` is BERT's arrangement, `causal = true` with `pre_norm` that
    of GPT-2.
    """

    kind: Literal["text_transformer"] = "text_transformer"
    paper: ClassVar[str] = "Vaswani et al.: Attention Is All You Need, NeurIPS 2017"

    vocabulary: int = Field(default=4096, ge=5, le=200_000, description="token ids it knows")
    positions: int = Field(default=64, ge=3, le=8192, description="tokens of the longest sentence")
    dim: int = Field(default=128, ge=2, le=4096, description="width of a token")
    depth: int = Field(default=2, ge=1, le=48, description="blocks of attention and MLP")
    heads: int = Field(default=4, ge=1, le=64, description="attention heads; they divide dim")
    mlp_ratio: float = Field(default=4.0, gt=0, le=16, description="hidden width of an MLP / dim")
    causal: bool = Field(default=False, description="a token reads those before it only (decoder)")
    arrangement: Literal["pre_norm", "post_norm"] = Field(
        default="post_norm", description="of normalisation around attention and MLP"
    )
    initial_std: float = Field(default=0.02, gt=0, le=1, description="of the initial weights")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self

    def module(self, shape: Shape, classes: int) -> nn.Module:
        self.check(shape)
        return TransformerNet(self, classes)
