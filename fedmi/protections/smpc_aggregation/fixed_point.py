"""Between an update and a vector over Z_2^64: fixed point, with a checksum at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmi.protections.base import Update
from fedmi.protections.smpc_aggregation.sharing import ELEMENT_BYTES, Ring

EXTRA = 2
"""Elements beside the entries: the weight before them, the checksum after."""
HIDDEN_BIT = 2**53
"""Doubles hold every whole number up to here."""


class OutOfRangeError(ValueError):
    """A value that does not fit the fixed-point range: the sum could wrap."""


class InconsistentSumError(ValueError):
    """What was opened cannot be the sum of such vectors."""


@dataclass(frozen=True)
class FixedPoint:
    """An update u of weight w is the vector (w, w u, checksum), each number times 2^f, rounded.

    f: fraction_bits. clients: at most so many are added up. The checksum is the sum of the other
    elements modulo 2^64, so it adds up as they do. Each |element| is at most
    min(2^53, (2^63 - 1) / clients), so sums do not wrap and doubles hold the elements exactly.
    """

    fraction_bits: int
    clients: int
    max_weight: float
    layout: Mapping[str, tuple[int, ...]]

    @property
    def limit(self) -> int:
        """Of an element."""
        return int(min(HIDDEN_BIT, (2**63 - 1) // self.clients))

    @property
    def reach(self) -> float:
        """Of a number."""
        return float(self.limit / 2**self.fraction_bits)

    @property
    def elements(self) -> int:
        """Of the vector."""
        return EXTRA + sum(prod(shape) for shape in self.layout.values())

    @property
    def share_bytes(self) -> int:
        return ELEMENT_BYTES * self.elements

    def encode(self, update: Update) -> Ring:
        """OutOfRangeError, ValueError: which tensor, what was given and what would be right."""
        self._check(update)
        scaled_weight = update.weight * 2.0**self.fraction_bits
        vector = np.empty(self.elements, dtype=np.int64)
        vector[0] = round(scaled_weight)
        start = 1
        for name, shape in self.layout.items():
            numbers = update.tensors[name].detach().double().numpy().reshape(-1)
            vector[start : start + prod(shape)] = self._rounded(name, numbers, scaled_weight)
            start += prod(shape)
        ring = vector.view(np.uint64)
        ring[-1] = ring[:-1].sum(dtype=np.uint64)
        return ring

    def decode(self, total: Ring, clients: int) -> tuple[float, dict[str, Tensor]]:
        """(sum of the weights, weighted mean in float64) of so many clients' vectors.

        InconsistentSumError where no such vectors add up to it.
        """
        if total[:-1].sum(dtype=np.uint64) != total[-1]:
            raise InconsistentSumError("the checksum is not that of the entries")
        signed = total.view(np.int64)
        scale = 2.0**self.fraction_bits
        weight = float(signed[0]) / scale
        if not 0 <= weight <= clients * self.max_weight * (1 + 1e-9):
            raise InconsistentSumError(
                f"the weights of {clients} clients add up to {weight:g}, expected 0 .. "
                f"{clients * self.max_weight:g}"
            )
        if signed[1:-1].size and max(int(signed[1:-1].max()), -int(signed[1:-1].min())) > (
            clients * self.limit
        ):
            raise InconsistentSumError(f"an entry is beyond what {clients} clients can add up to")
        if not signed[0]:
            return 0.0, {}
        mean = signed[1:-1].astype(np.float64) / float(signed[0])
        parts = torch.split(torch.from_numpy(mean), [prod(s) for s in self.layout.values()])
        named = zip(self.layout.items(), parts, strict=True)
        return weight, {name: part.reshape(shape) for (name, shape), part in named}

    def error_bound(self, weight: float, clients: int, furthest: float) -> float:
        """No entry of the mean, in single precision, is further than this from the exact one.

        n 2^-f (1 + m) / (W - n 2^-f) + m 2^-23 for n clients whose weights add up to W, m the
        largest entry of the mean: each element is off by one unit at most (half from the product
        in double precision, half from rounding), the sum of weights likewise.
        """
        off = clients * 2.0**-self.fraction_bits
        rest = weight - off
        return (off * (1 + furthest) / rest if rest > 0 else float("inf")) + furthest * 2.0**-23

    def _rounded(self, name: str, numbers: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
        scaled = numbers * scale
        furthest = int(np.abs(scaled).argmax()) if scaled.size else 0
        if scaled.size and abs(scaled[furthest]) > self.limit:
            weight = scale / 2.0**self.fraction_bits
            raise OutOfRangeError(
                f"'{name}' holds {numbers[furthest]:g}, which times the weight {weight:g} is "
                f"beyond +-{self.reach:g}, the fixed-point range for {self.clients} clients and "
                f"fraction_bits = {self.fraction_bits}; use fewer fraction_bits or clip the update"
            )
        return np.rint(scaled).astype(np.int64)

    def _check(self, update: Update) -> None:
        if set(update.tensors) != set(self.layout):
            odd = sorted(set(update.tensors) ^ set(self.layout))
            raise ValueError(f"the update's tensors are not the model's: {', '.join(odd)}")
        for name, shape in self.layout.items():
            if tuple(update.tensors[name].shape) != shape:
                given = tuple(update.tensors[name].shape)
                raise ValueError(f"'{name}' has shape {given}, expected {shape}")
            if not torch.isfinite(update.tensors[name]).all():
                raise ValueError(f"'{name}' is not finite")
        if not 0 <= update.weight <= self.max_weight:
            raise OutOfRangeError(
                f"weight {update.weight:g} is outside 0 .. max_weight {self.max_weight:g}"
            )
        if update.weight and not round(update.weight * 2.0**self.fraction_bits):
            raise OutOfRangeError(
                f"weight {update.weight:g} rounds to 0 under fraction_bits {self.fraction_bits}"
            )
