"""Quantisation of updates to a few bits an entry."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedmi.protections.base import ClientSide, Setting, Tensors, Update, UpdateProtection
from fedmi.protections.codec import (
    Floats,
    Packed,
    earlier,
    entries,
    flattened,
    passing,
    restored,
    shapes,
    unpacked,
    vector,
)

Codes = NDArray[np.int64]
CODES, SCALES = "#quantization/codes", "#quantization/scales"


class Quantization(UpdateProtection):
    """Rounds every entry of an update to an even grid on [-s, s], s the largest of its bucket.

    A bucket is `bucket_size` successive entries of one parameter. The grid has 2^bits - 1 points,
    zero among them, with 1 bit the two points -s and s. Stochastic rounding goes up with the
    probability of the way already gone, so the expectation is the entry itself; a bucket's grid
    step is 2 s / (2^bits - 2). Buffers pass.

    Threat model: an honest-but-curious server or eavesdropper that sees a client's update. No
    privacy is claimed: with 8 bits and more, gradient inversion hardly notices. The coins are
    simulation noise from the scenario's seed.
    On the wire: one float32 a bucket, and the codes packed to `bits` bits an entry.
    """

    kind: Literal["quantization"] = "quantization"
    paper: ClassVar[str] = (
        "Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD. NeurIPS 2017 (section 4: buckets, scaled "
        "by the largest entry)"
    )
    bits: int = Field(default=4, ge=1, le=16, description="bits an entry, sign included")
    rounding: Literal["stochastic", "nearest"] = Field(
        default="stochastic", description="unbiased by coins, or to the nearest grid point"
    )
    bucket_size: int = Field(
        default=512, ge=0, le=2**24, description="entries that share a scale; 0 = a whole parameter"
    )

    def problems(self, setting: Setting) -> list[str]:
        if self.bits == 1 and any(p.kind == "gradient_pruning" for p in earlier(self, setting)):
            return [
                "quantization with bits = 1 has no zero and would fill in what gradient_pruning "
                "before it set to zero; use 2 bits or more, or sign_compression"
            ]
        return []

    @property
    def steps(self) -> int:
        """Grid steps from -s to s; codes run from 0 to this."""
        return max(1, (1 << self.bits) - 2)

    def client(self, update: Update, side: ClientSide) -> Update:
        changed = {
            name: self.rounded(part, side.seed.child(name).numpy())
            for name, part in update.tensors.items()
            if name in side.setting.parameters
        }
        return replace(update, tensors={**update.tensors, **changed})

    def rounded(self, part: Tensor, rng: np.random.Generator) -> Tensor:
        """The tensor on its grid."""
        flat: Floats = part.detach().flatten().float().numpy()
        sizes = self._sizes([flat.size])
        scales = _scales(flat, sizes)
        place = self._place(flat, scales, sizes)
        coins = 0.5 if self.rounding == "nearest" else rng.random(flat.size)
        codes = np.floor(place + coins).astype(np.int64)
        return torch.from_numpy(self._values(codes, scales, sizes)).view(part.shape).to(part.dtype)

    def encode(self, tensors: Tensors, setting: Setting) -> Tensors | None:
        flat = flattened(tensors, setting)
        if flat is None or not np.isfinite(flat).all():
            return None
        sizes = self._sizes([prod(shape) for shape in shapes(setting).values()])
        scales = _scales(flat, sizes)
        codes = np.rint(self._place(flat, scales, sizes)).astype(np.int64)
        packed = packed_codes(codes, self.bits)
        # another protection may have moved entries off the grid: those go in full
        exact = np.array_equal(self._values(codes, scales, sizes), flat)
        if not exact or packed.nbytes + scales.nbytes >= flat.nbytes:
            return None
        own = {CODES: torch.from_numpy(packed), SCALES: torch.from_numpy(scales)}
        return {**passing(tensors, setting), **own}

    def decode(self, encoded: Tensors, setting: Setting) -> dict[str, Tensor]:
        sizes = self._sizes([prod(shape) for shape in shapes(setting).values()])
        scales: Floats = vector(encoded, SCALES, torch.float32)
        if len(scales) != len(sizes):
            raise ValueError(f"'{SCALES}' holds {len(scales)} scales for {len(sizes)} buckets")
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError(f"'{SCALES}' holds a scale that is negative or not finite")
        packed: Packed = vector(encoded, CODES, torch.uint8)
        codes = unpacked_codes(packed, self.bits, entries(setting))
        if (codes > self.steps).any():
            raise ValueError(f"'{CODES}' holds code {codes.max()}, the largest is {self.steps}")
        return restored(self._values(codes, scales, sizes), encoded, {CODES, SCALES}, setting)

    def _sizes(self, lengths: Sequence[int]) -> list[int]:
        """Entries of each bucket, parameter by parameter."""
        wide = self.bucket_size
        if not wide:
            return [length for length in lengths if length]
        return [min(wide, length - start) for length in lengths for start in range(0, length, wide)]

    def _place(self, flat: Floats, scales: Floats, sizes: Sequence[int]) -> NDArray[np.float64]:
        """Where the entries lie between the codes; 0 at -s. In float64, as 16 bits ask for."""
        unit = np.repeat(np.where(scales > 0, scales, np.float32(1)), sizes).astype(np.float64)
        place: NDArray[np.float64] = (flat / unit + 1) / 2 * self.steps
        return place

    def _values(self, codes: Codes, scales: Floats, sizes: Sequence[int]) -> Floats:
        share = (2 * codes - self.steps) / self.steps
        return (share * np.repeat(scales, sizes)).astype(np.float32)


def packed_codes(codes: Codes, bits: int) -> Packed:
    """Codes below 2^bits, each in `bits` bits, highest first; the last byte is filled with 0."""
    table = np.unpackbits(codes.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    return np.packbits(table[:, 16 - bits :])


def unpacked_codes(packed: Packed, bits: int, count: int) -> Codes:
    """The codes that `packed_codes` packed; ValueError if it is not so many."""
    table = unpacked(packed, count * bits, CODES).reshape(count, bits)
    filled = np.zeros((count, 16), np.bool_)
    filled[:, 16 - bits :] = table
    return np.packbits(filled, axis=1).view(">u2").flatten().astype(np.int64)


def _scales(flat: Floats, sizes: Sequence[int]) -> Floats:
    """The largest magnitude of each bucket."""
    if not sizes:
        return np.zeros(0, np.float32)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    scales: Floats = np.maximum.reduceat(np.abs(flat), starts)
    return scales
