"""A text classifier from the vectors of its tokens on, so that they can be searched for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize, pad

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.network import Network, Weights, load
from fedmi.exposure.schema import END, PADDING, START
from fedmi.models.text import TextClassifier

TABLE, PLACES = "tokens.weight", "positions"
"""Names of the tokens' vectors and of those of the places, in every `TextClassifier`."""
_INNER = "inner."


class FromVectors(nn.Module):
    """[n, length, dim + 1] -> logits: the token's vector, and whether there is a token at all."""

    def __init__(self, inner: TextClassifier) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        vectors, present = inputs[..., :-1], inputs[..., -1] > 0.5
        return self.inner.classify(vectors + self.inner.positions[: inputs.shape[1]], present)


@dataclass(frozen=True)
class TextNetwork(Network):
    """A `Network` of `FromVectors`; the tokens' own vectors are no parameter of it, as their
    gradient depends on which tokens there are and not on where a search is among vectors."""

    def loss(self, weights: Weights, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Weights]:
        state = {_INNER + name: value for name, value in {**weights, **self.buffers}.items()}
        logits = functional_call(self.module, state, (inputs,), strict=False)
        return cross_entropy(logits, labels), {}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vectors of tokens [vocabulary, dim] and places [positions, dim] of one model."""

    tokens: Tensor
    places: Tensor

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the entries of the tokens' vectors."""
        return max(float(self.tokens.std()), 1e-12)

    @cached_property
    def length(self) -> float:
        """Mean length of the tokens' vectors."""
        return max(float(self.tokens.norm(dim=1).mean()), 1e-12)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Vocabulary":
        """The same on a device, in a type of floating point."""
        return Vocabulary(self.tokens.to(device, dtype), self.places.to(device, dtype))

    def closeness(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """[n, room, dim], [m] -> [n, room, m]: how well a token explains the vector, in [-1, 1].

        Pearson's correlation of vector + place and token + place: a layer normalisation, with which
        transformers begin, sees neither the length nor the mean of their sum.
        """
        places = self.places[: vectors.shape[1]]
        there = _direction(self.tokens[ids] + places[:, None])
        return torch.einsum("nld,lmd->nlm", _direction(vectors + places), there)


def _direction(vectors: Tensor) -> Tensor:
    return normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)


@dataclass(frozen=True, eq=False)
class WrittenText:
    """The unknown of a search for sentences: a vector for every place of every sentence.

    points [n, room, dim], in standard deviations of the vocabulary's vectors; one row more, [n,
    room + 1, dim], where `classes` is not 0: logits of soft labels in its first entries. labels
    [n, 2]: the class and the number of tokens of each sentence. First and last token are [CLS] and
    [SEP]. length: of a record.
    """

    words: Vocabulary
    classes: int
    length: int

    def decode(self, point: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors and whether a token is there [n, room, dim + 1], labels)."""
        classes, after = labels[:, 0], labels[:, 1, None, None]
        if self.classes:
            classes = point[:, -1, : self.classes].softmax(-1)
        point = self.vectors(point)
        place = torch.arange(point.shape[1], device=point.device)[None, :, None]
        vectors = torch.where(place == 0, self.words.tokens[START], point)
        vectors = torch.where(place == after - 1, self.words.tokens[END], vectors)
        return torch.cat([vectors, (place < after).to(vectors)], -1), classes

    def vectors(self, points: Tensor) -> Tensor:
        """[..., room, dim] of points [..., room (+ 1), dim]."""
        every = points[..., :-1, :] if self.classes else points
        return every * self.words.spread

    def project(self, points: Tensor) -> Tensor:
        return points

    def spelt(self, point: Tensor, ids: Tensor) -> Tensor:
        """The point with the vectors of the ids [n, length] in place of its own."""
        room, found = point.shape[1] - bool(self.classes), point.clone()
        found[:, :room] = (self.words.tokens[ids[:, :room]] / self.words.spread).to(point)
        return found

    def written(self, point: Tensor, lengths: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """(ids [n, length] of the closest of the `allowed` tokens, mean closeness [n])."""
        point, allowed = self.vectors(point), allowed.to(point.device)
        close, found = self.words.closeness(point, allowed).max(-1)
        place = torch.arange(point.shape[1], device=point.device)
        after = lengths[:, None]
        inner = (place > 0) & (place < after - 1)
        ids = torch.where(inner, allowed[found], PADDING)
        ids = torch.where(place == 0, START, torch.where(place == after - 1, END, ids))
        sure = (close * inner).sum(1) / inner.sum(1).clamp_min(1)
        return pad(ids, (0, self.length - ids.shape[1]), value=PADDING), sure


LOGITS = 20.0
"""Logits move so much faster than entries of vectors."""


def load_text(
    build: Callable[[], nn.Module], state: Mapping[str, Tensor], mode: str
) -> tuple[TextNetwork, Vocabulary]:
    """The classifier from vectors on, and its vectors; AttackError if it is none of text."""
    network = load(build, state, mode)
    module = network.module
    if not isinstance(module, TextClassifier):
        raise AttackError(no_text(module))
    parameters = {name: part for name, part in network.parameters.items() if name != TABLE}
    places = state.get(PLACES, module.positions)
    vocabulary = Vocabulary(state[TABLE].detach(), places.detach())
    return TextNetwork(FromVectors(module), parameters, network.buffers, {}), vocabulary


def no_text(module: nn.Module) -> str:
    """Why the attack cannot read this module, or ""."""
    if isinstance(module, TextClassifier):
        return ""
    return (
        f"reads classifiers of text, but the model is {type(module).__name__}: use a model such as "
        "'text_transformer', or another attack"
    )
