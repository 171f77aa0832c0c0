"""Matrix products in Z_2^64, exact, by floating-point hardware."""

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.uint64]

LIMB_BITS = 22
LIMBS = 3
INNER = 1 << (53 - 2 * LIMB_BITS)
"""So many products of two limbs add up to at most 2^53, exactly, in a float64."""


def matmul(left: Ring, right: Ring) -> Ring:
    """[m, k] @ [k, n] -> [m, n] mod 2^64.

    numpy multiplies integer matrices without BLAS; so numbers are split into limbs of 22 bits,
    whose products float64 holds exactly for up to 512 terms, and put together again.
    """
    total = np.zeros((left.shape[0], right.shape[1]), dtype=np.uint64)
    for start in range(0, left.shape[1], INNER):
        some = slice(start, start + INNER)
        tops, sides = _limbs(left[:, some]), _limbs(right[some])
        for i, top in enumerate(tops):
            for j, side in enumerate(sides[: LIMBS - i]):
                part = (top @ side).astype(np.uint64)
                total += part << np.uint64(LIMB_BITS * (i + j))
    return total


def _limbs(values: Ring) -> list[NDArray[np.float64]]:
    """Little end first."""
    mask = np.uint64((1 << LIMB_BITS) - 1)
    return [
        ((values >> np.uint64(LIMB_BITS * limb)) & mask).astype(np.float64) for limb in range(LIMBS)
    ]
