"""A language model of public sentences: how likely a sequence of tokens is."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedmi.exposure.schema import PADDING

DISCOUNT = 0.75
"""Taken off every count, and given to what was not seen (Kneser & Ney's usual value)."""


@dataclass(frozen=True, eq=False)
class _Table:
    """Sorted keys and a number for each; 0 for any other key."""

    keys: Tensor
    values: Tensor

    @classmethod
    def counted(cls, keys: Tensor) -> Self:
        found, counts = np.unique(keys.numpy(), return_counts=True)
        return cls(torch.from_numpy(found), torch.from_numpy(counts).double())

    def __call__(self, keys: Tensor) -> Tensor:
        if not len(self.keys):
            return torch.zeros_like(keys, dtype=torch.float64)
        at = torch.searchsorted(self.keys, keys.contiguous()).clamp_max(len(self.keys) - 1)
        return torch.where(self.keys[at] == keys, self.values[at], 0.0)


def _kinds(keys: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(keys.numpy()))


@dataclass(frozen=True, eq=False)
class LanguagePrior:
    """Interpolated Kneser-Ney trigrams of token ids (Kneser & Ney, ICASSP 1995).

    p(w | u v) = max(c(uvw) - D, 0) / c(uv) + D N(uv.) / c(uv) p(w | v), and so on down to how many
    different tokens come before w, with one more for each token of the vocabulary. A small model
    of the attacker's own public sentences stands where LAMP has GPT-2.
    """

    vocabulary: int
    triples: _Table
    pairs: _Table
    after_pair: _Table
    before_pair: _Table
    around: _Table
    after: _Table
    before: Tensor

    @classmethod
    def of(cls, sentences: Tensor, vocabulary: int) -> Self:
        """Of sentences [n, ..., length] of ids, each [CLS] ... [SEP] and padding."""
        ids = sentences.flatten(1).long()
        first, second, third = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]
        full = third != PADDING
        triples = ((first * vocabulary + second) * vocabulary + third)[full]
        left, right = ids[:, :-1], ids[:, 1:]
        pairs = (left * vocabulary + right)[right != PADDING]
        kinds, twos = _kinds(triples), _kinds(pairs)
        return cls(
            vocabulary,
            _Table.counted(triples),
            _Table.counted(triples // vocabulary),
            _Table.counted(kinds // vocabulary),
            _Table.counted(kinds % vocabulary**2),
            _Table.counted(kinds % vocabulary**2 // vocabulary),
            _Table.counted(_kinds(kinds % vocabulary**2) // vocabulary),
            (twos % vocabulary).bincount(minlength=vocabulary).double(),
        )

    def loss(self, ids: Tensor) -> Tensor:
        """[..., length] ids -> [...]: mean of -log p over a sentence's tokens but the first."""
        left, right = ids[..., :-1], ids[..., 1:]
        seen = right != PADDING
        likely = self._second(left, right)
        longer = self._third(ids[..., :-2], ids[..., 1:-1], ids[..., 2:], likely[..., 1:])
        likely = torch.cat([likely[..., :1], longer], -1)
        total = -(likely.log() * seen).sum(-1) / seen.sum(-1).clamp_min(1)
        return total.float()

    def _first(self, token: Tensor) -> Tensor:
        return (self.before[token] + 1) / (self.before.sum() + self.vocabulary)

    def _second(self, left: Tensor, right: Tensor) -> Tensor:
        """By how many tokens come before a pair and, where none is known, by pairs seen."""
        total = self.around(left)
        kinds = self.after(left)
        some = (self.before_pair(left * self.vocabulary + right) - DISCOUNT).clamp_min(0)
        known = total > 0
        total = total.clamp_min(1)
        rest = torch.where(known, (DISCOUNT * kinds / total).clamp_max(1), 1.0)
        return torch.where(known, some / total, 0.0) + rest * self._first(right)

    def _third(self, first: Tensor, second: Tensor, third: Tensor, lower: Tensor) -> Tensor:
        pair = first * self.vocabulary + second
        total, kinds = self.pairs(pair), self.after_pair(pair)
        known = total > 0
        some = (self.triples(pair * self.vocabulary + third) - DISCOUNT).clamp_min(0)
        rest = torch.where(known, DISCOUNT * kinds / total.clamp_min(1), 1.0)
        return torch.where(known, some / total.clamp_min(1), 0.0) + rest * lower
