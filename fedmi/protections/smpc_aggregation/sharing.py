"""Additive sharing in Z_2^64, all shares but one expanded from a seed. No torch here.

x = s_0 + ... + s_{n-1} mod 2^64. Of n shares, n - 1 are key streams of AES-256 in counter mode
under fresh 32-byte keys from the operating system's generator, so any n - 1 of them are
computationally indistinguishable from uniform ones and independent of x.
"""

import os
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Ring = NDArray[np.uint64]
"""Elements of Z_2^64: numpy's unsigned sums wrap."""

SEED_BYTES = 32
ELEMENT_BYTES = 8


def expanded(seed: bytes, elements: int) -> Ring:
    """The key stream of AES-256-CTR, counter from 0, 8 bytes an element, little endian."""
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return from_bytes(encryptor.update(bytes(ELEMENT_BYTES * elements)))


def split(vector: Ring, parties: int) -> tuple[list[bytes], Ring]:
    """(a seed for each party but one, the share of that one)."""
    seeds = [os.urandom(SEED_BYTES) for _ in range(parties - 1)]
    share = vector.copy()
    for seed in seeds:
        share -= expanded(seed, len(vector))
    return seeds, share


def added(shares: Iterable[Ring], elements: int) -> Ring:
    """The sum modulo 2^64."""
    total = np.zeros(elements, dtype=np.uint64)
    for share in shares:
        total += share
    return total


def to_bytes(vector: Ring) -> bytes:
    return vector.astype("<u8", copy=False).tobytes()


def from_bytes(data: bytes) -> Ring:
    return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)
