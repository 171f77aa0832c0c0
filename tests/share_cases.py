"""Shares for tests: split by a naive oracle, and split badly on purpose.

A seeded generator stands in for the operating system's, so that tests can be repeated.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmi.exposure.words import Position
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import Ring

PARTY = Position.COMPUTE_PARTY
ABY3 = Scheme()
SEMI2K = Scheme(protocol="semi2k")
SCHEMES = [ABY3, SEMI2K, Scheme(protocol="cheetah")]


def ring(shape: tuple[int, ...], seed: int) -> Ring:
    return np.random.default_rng(seed).integers(2**64, size=shape, dtype=np.uint64)


def held_of(summands: Sequence[Ring], scheme: Scheme) -> list[Ring]:
    """What each party holds of these summands; [..., elements] by rank."""
    size = len(summands)
    return [
        np.stack([summands[(rank + e) % size] for e in range(scheme.elements)], axis=-1)
        for rank in range(size)
    ]


def split(secret: Ring, scheme: Scheme, seed: int) -> list[Ring]:
    """Uniform summands that add up to the secret."""
    masks = [ring(secret.shape, seed * 100 + party) for party in range(1, scheme.size)]
    return held_of([secret - sum(masks[1:], masks[0]), *masks], scheme)


def nearly_plain(secret: Ring, scheme: Scheme, seed: int) -> list[Ring]:
    """Masks of 12 bits: the first summand is the secret plus small noise."""
    small = [ring(secret.shape, seed + p) >> np.uint64(52) for p in range(1, scheme.size)]
    return held_of([secret - sum(small[1:], small[0]), *small], scheme)


def constant_mask(secret: Ring, scheme: Scheme, seed: int) -> list[Ring]:
    """One random number masks everything."""
    masks = [np.broadcast_to(ring((), seed + p), secret.shape) for p in range(1, scheme.size)]
    return held_of([secret - sum(masks[1:], masks[0]), *masks], scheme)


def reused_mask(secret: Ring, scheme: Scheme, seed: int) -> list[Ring]:
    """Every record has the same uniform masks."""
    masks = [
        np.broadcast_to(ring(secret.shape[1:], seed + p), secret.shape)
        for p in range(1, scheme.size)
    ]
    return held_of([secret - sum(masks[1:], masks[0]), *masks], scheme)


def tensors(parts: Mapping[str, Ring]) -> dict[str, Tensor]:
    """As recorded: int64, bit for bit."""
    return {n: torch.from_numpy(np.ascontiguousarray(p).view(np.int64)) for n, p in parts.items()}
