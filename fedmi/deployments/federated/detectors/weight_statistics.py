"""Weights that no honest training leaves: layers replaced, rows alike, rows of one weight."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmi.deployments.federated.detectors.base import Detector, Received

ALIKE = 0.999
"""Absolute cosine from which two rows count as one."""
ROWS, COLUMNS = 8, 4
"""Fewer rows tell nothing of what rows have in common; fewer columns nothing of what a row is."""
MOST_ROWS = 2048
"""Rows that are compared pair by pair."""


class WeightStatistics(Detector):
    """The worst, over layers, of five signs that honest weights show at less than about 1.

        change      |W - W'| / |W'|, against the model that came before; how much of a layer is new
        alike       share of rows with a (nearly) parallel twin, as in imprint blocks
        transmit    max over rows of max_j |w_j| / (sum_j |w_j| - max_j |w_j|), the transmission
                    signal-to-noise ratio of the paper: a row that hands one input on
        bias        max over rows of |b| / |w|: a row that does not listen to its input
        one-sided   |mean_r z_r| / std_r z_r with z_r = sum_j w_rj / |w_r|: rows whose sum is off in
                    the same way, as of trap weights, where honest rows differ

    Weights are those of dense and convolutional layers. The last three are infinite where the
    denominator is zero and the numerator is not. In a client's first round there is no change to
    look at. One sign at honest size hides nothing of the others, but the largest honest one sets
    the threshold.
    """

    kind: Literal["weight_statistics"] = "weight_statistics"
    paper: ClassVar[str] = (
        "Garov, Dimitrov, Jovanovic, Vechev: Hiding in Plain Sight: Disguising Data Stealing "
        "Attacks in Federated Learning. ICLR 2024"
    )
    of_model_alone: ClassVar = True

    def statistic(self, seen: Received) -> float:
        return max((value for _, _, value in signs(seen)), default=0.0)


def signs(seen: Received) -> Iterator[tuple[str, str, float]]:
    """(name of the weight, sign, value) of every layer."""
    for name, weight in seen.weights.items():
        rows = weight.double().flatten(1)
        if seen.before is not None and name in seen.before:
            yield name, "change", change(rows, seen.before[name].double().flatten(1))
        yield name, "bias", bias(rows, _bias(name, seen.sent, len(rows)))
        if rows.shape[1] >= COLUMNS:
            yield name, "alike", alike(rows)
            yield name, "transmit", transmit(rows)
        if rows.shape[1] >= COLUMNS and len(rows) >= ROWS:
            yield name, "one-sided", one_sided(rows)


def change(rows: Tensor, before: Tensor) -> float:
    """|W - W'| / |W'|."""
    if rows.shape != before.shape:
        return math.inf
    return _over((rows - before).norm(), before.norm())


def alike(rows: Tensor) -> float:
    """Share of rows with a parallel twin; rows of zeros are alike."""
    some = rows[:MOST_ROWS]
    lengths = some.norm(dim=1)
    units = some / torch.where(lengths > 0, lengths, 1.0)[:, None]
    near = (units @ units.T).abs() > ALIKE
    near |= (lengths == 0)[:, None] & (lengths == 0)[None]
    near.fill_diagonal_(False)
    return float(near.any(1).double().mean())


def transmit(rows: Tensor) -> float:
    """Largest ratio, over rows, of the largest weight to all others together."""
    sizes = rows.abs()
    largest = sizes.max(1).values
    return _largest(largest, sizes.sum(1) - largest)


def bias(rows: Tensor, biases: Tensor | None) -> float:
    """Largest ratio, over rows, of bias to norm of the weights; 0 without a bias."""
    return 0.0 if biases is None else _largest(biases.double().abs(), rows.norm(dim=1))


def one_sided(rows: Tensor) -> float:
    """How far the rows' normed sums are off zero together, in units of how much they differ."""
    lengths = rows.norm(dim=1)
    sums = rows.sum(1) / torch.where(lengths > 0, lengths, 1.0)
    return _over(sums.mean().abs(), sums.std())


def _bias(name: str, sent: Mapping[str, Tensor], rows: int) -> Tensor | None:
    """The bias beside a weight."""
    found = sent.get(name.removesuffix("weight") + "bias") if name.endswith("weight") else None
    return found if found is not None and found.shape == (rows,) else None


def _largest(above: Tensor, below: Tensor) -> float:
    """Largest of the ratios; 0 / 0 is 0."""
    ratios = torch.where(above == 0, torch.zeros_like(above), above / below)
    return float(ratios.max()) if len(ratios) else 0.0


def _over(above: Tensor, below: Tensor) -> float:
    return _largest(above[None], below[None])
