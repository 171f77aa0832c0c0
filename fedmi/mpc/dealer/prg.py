"""The engine's pseudo-random generator, replayed.

A stream is AES-128 under the party's seed, of the blocks counter, counter + 1, ... (128 bits each,
little endian); the last block is cut to size, and the next array begins at the next whole block.
Fact of the engine (yacl `FillPRand` under SPU `ring_rand`), checked against it by the tests.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

SEED_BYTES = 16
BLOCK_BYTES = 16

Bytes = NDArray[np.uint8]
Ring = NDArray[np.unsignedinteger]
Word = np.dtype[np.unsignedinteger]
"""A ring element, of Z_2^32 or Z_2^64."""


def stream(seed: bytes, counter: int, size: int) -> Bytes:
    """`size` pseudo-random bytes [size] of one party, from block number `counter` on."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed of {SEED_BYTES} bytes is needed, {len(seed)} given")
    if counter < 0 or size < 0:
        raise ValueError(f"counter and size cannot be negative: {counter}, {size}")
    blocks = np.zeros(((size + BLOCK_BYTES - 1) // BLOCK_BYTES, 2), dtype="<u8")
    blocks[:, 0] = np.arange(counter, counter + len(blocks), dtype=np.uint64)
    encryptor = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    return np.frombuffer(encryptor.update(blocks.data.cast("B")), dtype=np.uint8)[:size]


def added(seeds: Sequence[bytes], counter: int, size: int, word: Word) -> Ring:
    """Sum over the parties of their streams of `size` bytes, as ring elements."""
    total = stream(seeds[0], counter, size).view(word).copy()
    for seed in seeds[1:]:
        total += stream(seed, counter, size).view(word)
    return total


def xored(seeds: Sequence[bytes], counter: int, size: int) -> Bytes:
    """Exclusive or over the parties of their streams, [size]."""
    total = stream(seeds[0], counter, size).copy()
    for seed in seeds[1:]:
        total ^= stream(seed, counter, size)
    return total


def permutation(seed: bytes, counter: int, size: int) -> NDArray[np.int64]:
    """The random order [size] that a party draws: swaps from the end, by 128 bits each.

    Fact of the engine (yacl `ReplayShuffle`): the numbers are AES-128 in counter mode, which begins
    at the same counter but increments it from its other end; the i-th number, modulo i + 2, is the
    partner of place i + 1. `size` must be below 2^32.
    """
    if not 0 < size < 1 << 32:
        raise ValueError(f"an order of {size} things, must be 1 to 2^32 - 1")
    start = counter.to_bytes(BLOCK_BYTES, "little")
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(start)).encryptor()
    numbers = encryptor.update(bytes(BLOCK_BYTES * (size - 1)))
    drawn = np.frombuffer(numbers, dtype="<u8").reshape(-1, 2)
    modulus = np.arange(2, size + 1, dtype=np.uint64)
    wrap = (np.uint64(2**64 - 1) % modulus + np.uint64(1)) % modulus
    partners = (drawn[:, 1] % modulus * wrap % modulus + drawn[:, 0] % modulus) % modulus
    order = list(range(size))
    for place, partner in zip(range(size - 1, 0, -1), partners[::-1].tolist(), strict=True):
        order[place], order[partner] = order[partner], order[place]
    return np.array(order, dtype=np.int64)
