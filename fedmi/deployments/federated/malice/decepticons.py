"""Decepticons: a transformer rewired so that its update holds every token by itself."""

from collections.abc import Mapping
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.deployments.federated.malice.rewiring import Rewired, rewired
from fedmi.models.attention import Block
from fedmi.models.text import token_ids
from fedmi.models.text_transformer import TransformerNet
from fedmi.protections.base import Setting

SHARE = 2
"""An embedding keeps at least 1 - 1 / SHARE of its entries."""


class Decepticons(Malice):
    """Rewires a transformer of text so that tokens, places and sentences can be told apart.

    - Embeddings lose `identity` entries a head, one a head that marks a place, and one more.
    - Attention of block 0 copies into the lost entries, by head h, a random view of the token at
      place h + 1 (place 0 is [CLS]): what a sentence begins with is its identity. The attention of
      other blocks is off, but for the last one's, which hands the mean over all places on to where
      the model reads its answer: without that only one token would have a gradient.
    - The first layer of the MLP of every block but the last measures m x, with the same random m
      in each row, against a bias that is a quantile of m x over public sentences. Behind a gain of
      `sharpness`, GELU is a step, so that two neighbouring rows' gradients differ by the tokens
      in one bin. The second layer sums rows up into the last lost entry with turns of sign, to
      pass gradients on and hardly change x.

    The paper's models answer at every token, so theirs needs no last step; it keeps the second
    layer's signs equal, and gives place and identity to BERT and GPT-2. Threat model: a malicious
    server with public sentences; the architecture stays as it is. All clients get the same model,
    which is as good as untrained. Refused for anything but a text_transformer of two blocks or
    more whose dim is at least twice the entries that are lost.
    """

    kind: Literal["decepticons"] = "decepticons"
    paper: ClassVar[str] = (
        "Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein: Decepticons - Corrupted "
        "Transformers Breach Privacy in Federated Learning for Language Models, ICLR 2023"
    )
    alters: ClassVar = "embeddings, attention, normalisation, MLPs and head: most of the model"
    reads_public: ClassVar = True

    identity: int = Field(
        default=4, ge=1, le=64, description="entries a head for the sentence's identity"
    )
    sharpness: float = Field(
        default=1000.0, ge=10, le=1e5, description="gain before the steps of GELU"
    )
    sentences: int = Field(
        default=512, ge=2, le=10**6, description="public sentences that the bins are measured on"
    )

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting)
        reason = self.misfit(setting.network)
        return [*found, reason] if reason else found

    def misfit(self, network: nn.Module) -> str:
        """Why it cannot rewire this network, or ""."""
        if not isinstance(network, TransformerNet):
            return (
                f"decepticons rewires a text_transformer; {type(network).__name__} is something "
                "else"
            )
        first, dim = network.blocks[0], network.tokens.embedding_dim
        assert isinstance(first, Block)
        if len(network.blocks) < 2:
            return "decepticons needs a block that measures and one that mixes: depth = 2 at least"
        lost = Rewired.lost(first.attention.heads, self.identity)
        if SHARE * lost > dim:
            return (
                f"decepticons takes {lost} entries of an embedding of dim = {dim}; "
                f"dim = {SHARE * lost} at least, or a smaller identity"
            )
        return ""

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        network = deepcopy(occasion.network).to_empty(device="cpu")
        assert isinstance(network, TransformerNet)
        network.load_state_dict(dict(model))
        rng = occasion.seed.child("decepticons").torch()
        rows = torch.randperm(len(occasion.public), generator=rng)[: self.sentences]
        sentences = token_ids(torch.as_tensor(occasion.public.inputs)[rows])
        return rewired(network.eval(), self.identity, self.sharpness, sentences, rng)
