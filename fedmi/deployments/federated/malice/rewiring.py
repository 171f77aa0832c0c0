"""The weights of a transformer of text that measures tokens instead of understanding them."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from fedmi.exposure.schema import PADDING
from fedmi.models.attention import Block
from fedmi.models.text_transformer import TransformerNet

MARK = 8.0
"""How far the entry that marks a place stands out, in standard deviations of an embedding."""
SKEW = 100.0
"""Scores of attention at a marked place are above the others by about MARK * SKEW."""
FLOW = 0.05
"""Size of what the MLP adds to one entry, of an embedding's standard deviation."""


@dataclass(frozen=True)
class Rewired:
    """Where things are in an embedding of `dim` entries: first the identities, `identity` entries
    a head, then one entry a head that marks a place; the last takes what the MLPs add."""

    heads: int
    identity: int
    dim: int

    @staticmethod
    def lost(heads: int, identity: int) -> int:
        """Entries that embeddings lose."""
        return heads * (identity + 1) + 1

    def marked(self, head: int) -> int:
        return self.heads * self.identity + head

    @property
    def kept(self) -> slice:
        return slice(self.heads * (self.identity + 1), self.dim - 1)


@torch.no_grad()
def rewired(
    network: TransformerNet,
    identity: int,
    sharpness: float,
    sentences: Tensor,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """The state dict; sentences [n, length] of ids set the bins. The network is changed."""
    first = network.blocks[0]
    assert isinstance(first, Block)
    heads, dim = first.attention.heads, network.tokens.embedding_dim
    layout = Rewired(heads, identity, dim)
    for part in network.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()
    spread = _embeddings(network, layout)
    stream = 1.0 if network.normed_first else spread
    for number, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        for layer in (block.attention.query, block.attention.key, block.attention.value):
            _clear(layer)
        _clear(block.attention.output)
        _clear(block.mlp[2])
        if number < len(network.blocks) - 1:
            gain = block.first_norm if network.normed_first else block.second_norm
            gain.weight.fill_(sharpness)
            _flow(block, stream if not network.normed_first else sharpness, sharpness)
    _identify(first, layout, stream, rng)
    last = network.blocks[-1]
    assert isinstance(last, Block)
    last.attention.value.weight.copy_(torch.eye(dim))
    last.attention.output.weight.copy_(torch.eye(dim))
    network.head.weight[:, dim - 1] = torch.linspace(-1, 1, len(network.head.weight))
    _bins(network, sentences, sharpness, rng)
    return {name: value.clone() for name, value in network.state_dict().items()}


def _clear(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.zero_()
    layer.bias.zero_()


def _embeddings(network: TransformerNet, layout: Rewired) -> float:
    """Takes entries from the embeddings and marks places; the spread of what is left."""
    tokens, positions = network.tokens.weight, network.positions
    for embedding in (tokens, positions):
        embedding[:, : layout.kept.start] = 0
        embedding[:, layout.kept.stop :] = 0
    spread = sqrt(float(tokens[:, layout.kept].var() + positions[:, layout.kept].var()))
    for head in range(min(layout.heads, len(positions) - 1)):
        positions[1 + head, layout.marked(head)] = MARK * spread
    return spread


def _identify(block: Block, layout: Rewired, stream: float, rng: torch.Generator) -> None:
    """Head h reads place h + 1 and writes `identity` random views of its token."""
    attention, each = block.attention, layout.dim // layout.heads
    kept = layout.kept.stop - layout.kept.start
    for head in range(layout.heads):
        start = head * each
        attention.query.bias[start] = sqrt(each)
        attention.key.weight[start, layout.marked(head)] = SKEW
        for entry in range(layout.identity):
            view = torch.randn(kept, generator=rng)
            attention.value.weight[start + entry, layout.kept] = view / view.norm()
            attention.output.weight[head * layout.identity + entry, start + entry] = stream


def _flow(block: Block, stream: float, sharpness: float) -> None:
    """The second layer of the MLP: rows with turns of sign into the last entry."""
    second = block.mlp[2]
    assert isinstance(second, nn.Linear)
    signs = 1.0 - 2.0 * (torch.arange(second.in_features) % 2)
    second.weight[-1] = signs * FLOW * stream / sharpness


def _bins(
    network: TransformerNet, sentences: Tensor, sharpness: float, rng: torch.Generator
) -> None:
    """The first layers of the MLPs: one measurement, and quantiles of it dealt to the blocks."""
    dim = network.tokens.embedding_dim
    measuring = [_first(block) for block in list(network.blocks)[:-1]]
    direction = torch.randn(dim, generator=rng)
    direction[-1] = 0
    direction = direction / direction.norm()
    hidden = measuring[0].out_features
    shares = torch.arange(hidden * len(measuring)) / (hidden * len(measuring))
    for number, layer in enumerate(measuring):
        layer.weight.copy_(direction.expand(hidden, -1))
        layer.bias.zero_()
        measured = _measured(network, layer, sentences)
        edges = torch.quantile(measured, shares[number * hidden : (number + 1) * hidden].double())
        if number == 0:
            edges[0] -= (measured.max() - measured.min()) / 2
        layer.bias.copy_(-edges.to(layer.bias))


def _first(block: nn.Module) -> nn.Linear:
    """The first layer of a block's MLP."""
    assert isinstance(block, Block)
    layer = block.mlp[0]
    assert isinstance(layer, nn.Linear)
    return layer


def _measured(network: TransformerNet, layer: nn.Module, sentences: Tensor) -> Tensor:
    """What the layer's first row says to every token of the sentences, [tokens], in double."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _layer, _given, out: seen.append(out[..., 0]))
    try:
        for part in torch.split(sentences, 64):
            network(part[:, None, None].float())
    finally:
        hook.remove()
    values = torch.cat(seen)[sentences != PADDING]
    return values.double()
