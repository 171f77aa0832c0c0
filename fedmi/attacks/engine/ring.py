"""Ring elements read as they are, by one who cannot open them."""

import numpy as np
from numpy.typing import NDArray

from fedmi.mpc.scheme import RING_BITS
from fedmi.mpc.shares import Held, Ring, as_ring, total

NARROW_BITS = RING_BITS - 2
Reading = tuple[NDArray[np.float64], NDArray[np.float64]]
"""places [rows, m] on the arc, in [0, 1]; length of each row's arc [rows], in ring units"""


def _bits(reading: Reading) -> float:
    """Length of the arcs in bits, mean over the rows."""
    return float(np.log2(np.maximum(reading[1], 1.0)).mean())


def plainest(held: Held) -> NDArray[np.float64]:
    """What shares would show if they were poor: [rows, m, h] -> [rows, m] in [0, 1].

    held: what a coalition below the threshold holds, h ring elements of each of m numbers in each
    row. A row's elements lie on a circle of 2^64; it is cut at the widest gap, and the arc that
    they fill is stretched to [0, 1]. So an element that is the secret plus a constant, or plus
    noise smaller than the secret, is read as the secret itself up to contrast. Looked at are each
    of the h elements alone and their sum; then, for several rows, the sum less its mean over the
    rows, from which a mask used again for every row falls out. The first of the two groups in which
    something fills less than a quarter of the circle gives the reading, by its longest such arc (a
    shorter one is that of a mask). Of uniform elements none does, and the sum is read: uniform
    numbers, nearly its top bits.
    """
    elements = list(np.moveaxis(as_ring(held), -1, 0))
    added = total(elements)
    plain = [_stretched(ring) for ring in (added, *elements)]
    narrow = [reading for reading in plain if _bits(reading) < NARROW_BITS]
    if not narrow and len(added) > 1:
        narrow = [r for r in [_stretched(_less_mean(added))] if _bits(r) < NARROW_BITS]
    return max(narrow, key=_bits, default=plain[0])[0]


def _less_mean(ring: Ring) -> Ring:
    """Each row less the mean over the rows, taken about the first one; [rows, m]."""
    apart = (ring - ring[:1]).view(np.int64)
    middle = np.rint((apart / len(apart)).sum(0)).clip(-(2.0**62), 2.0**62)
    less: Ring = apart.view(np.uint64) - middle.astype(np.int64).view(np.uint64)
    return less


def _stretched(ring: Ring) -> Reading:
    ordered = np.sort(ring, axis=1)
    gaps = ordered - np.roll(ordered, 1, axis=1)
    first = np.take_along_axis(ordered, gaps.argmax(1)[:, None], axis=1)
    along = (ring - first).astype(np.float64)
    arcs = along.max(1)
    return along / np.maximum(arcs, 1.0)[:, None], arcs
