"""Intervals of a share where cases come in clusters: clients of one round share one model."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from fedmi.leakage.intervals import CONFIDENCE, RESAMPLES
from fedmi.leakage.resampling import wilson

FEW = 5
"""Fewer clusters with a hit, or with a miss, than this are too few to draw clusters from."""


def clustered_share(
    hits: Sequence[bool], clusters: Sequence[Hashable], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of the share of hits; NaN of none.

    Clusters are drawn with replacement, each as a whole (percentiles; Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8). Where fewer than FEW clusters have
    a hit, or fewer than FEW a miss, that would be too short, or of no width: then Wilson's
    interval, as if each cluster were a single case, which is as wide as it can honestly be.
    """
    if not len(hits):
        return math.nan, math.nan
    known = {name: code for code, name in enumerate(dict.fromkeys(clusters))}
    codes = np.array([known[name] for name in clusters])
    sizes = np.bincount(codes).astype(np.float64)
    found = np.bincount(codes, np.asarray(hits, dtype=np.float64))
    if min((found > 0).sum(), (found < sizes).sum()) < FEW:
        return wilson(float(found.sum() / sizes.sum()), len(known))
    drawn = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), RESAMPLES)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile((drawn @ found) / (drawn @ sizes), [tail, 100 - tail])
    return float(low), float(high)
