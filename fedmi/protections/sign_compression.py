"""Sign compression: one bit an entry, one magnitude a parameter."""

from dataclasses import replace
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmi.protections.base import ClientSide, Setting, Tensors, Update, UpdateProtection
from fedmi.protections.codec import (
    Bits,
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

SIGNS, SCALES, SUPPORT = "#sign/signs", "#sign/scales", "#sign/support"


class SignCompression(UpdateProtection):
    """Replaces every parameter x of n entries by (|x|_1 / n) sign(x); buffers pass.

    Entries of exactly zero (dead units, black pixels) have no sign: `kept`, they stay zero and
    cost a second bit; `random`, each takes a sign by a coin, which is unbiased noise.
    There is no error feedback: what the scale loses is lost.

    Threat model: an honest-but-curious server or eavesdropper that sees a client's update. No
    privacy is claimed: attacks that compare directions still see half of one. The coins are
    simulation noise from the scenario's seed.
    On the wire: one float32 a parameter; a bit an entry that is not zero; and, where some are, a
    bitmap of those that are not.
    """

    kind: Literal["sign_compression"] = "sign_compression"
    paper: ClassVar[str] = (
        "Bernstein et al.: signSGD. ICML 2018; the scale: Karimireddy et al.: Error Feedback Fixes "
        "SignSGD. ICML 2019"
    )
    zeros: Literal["kept", "random"] = Field(
        default="kept", description="entries of exactly zero stay so, or take a random sign"
    )

    def problems(self, setting: Setting) -> list[str]:
        pruned = any(before.kind == "gradient_pruning" for before in earlier(self, setting))
        if self.zeros == "random" and pruned:
            return [
                "sign_compression with zeros = 'random' would fill in what gradient_pruning "
                "before it set to zero; use zeros = 'kept'"
            ]
        return []

    def client(self, update: Update, side: ClientSide) -> Update:
        changed = {
            name: self.compressed(part, side.seed.child(name).torch())
            for name, part in update.tensors.items()
            if name in side.setting.parameters
        }
        return replace(update, tensors={**update.tensors, **changed})

    def compressed(self, part: Tensor, rng: torch.Generator) -> Tensor:
        """Sign times mean magnitude, in the tensor's own type."""
        signs, scale = part.sign(), part.double().abs().mean().to(part.dtype)
        if self.zeros == "random":
            coins = torch.randint(0, 2, part.shape, generator=rng) * 2 - 1
            signs = torch.where(part == 0, coins.to(part.dtype), signs)
        return signs * scale

    def encode(self, tensors: Tensors, setting: Setting) -> Tensors | None:
        flat = flattened(tensors, setting)
        if flat is None or not np.isfinite(flat).all():
            return None
        sizes = [prod(shape) for shape in shapes(setting).values()]
        scales, full = _spread(flat, sizes)
        # of a parameter that is all zero, the scale says so already
        present = (flat != 0) | (full == 0)
        if not np.array_equal(np.abs(flat), np.where(flat != 0, full, 0)):
            return None
        own: dict[str, Floats | Packed] = {
            SIGNS: np.packbits(flat[present] < 0),
            SCALES: scales,
        }
        if not present.all():
            own[SUPPORT] = np.packbits(present)
        if sum(part.nbytes for part in own.values()) >= flat.nbytes:
            return None
        packed = {name: torch.from_numpy(part) for name, part in own.items()}
        return {**passing(tensors, setting), **packed}

    def decode(self, encoded: Tensors, setting: Setting) -> dict[str, Tensor]:
        size, sizes = entries(setting), [prod(shape) for shape in shapes(setting).values()]
        scales: Floats = vector(encoded, SCALES, torch.float32)
        if len(scales) != len(sizes):
            raise ValueError(f"'{SCALES}' holds {len(scales)} scales for {len(sizes)} parameters")
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError(f"'{SCALES}' holds a scale that is negative or not finite")
        present = _present(encoded, size)
        packed: Packed = vector(encoded, SIGNS, torch.uint8)
        signs = np.zeros(size, np.float32)
        signs[present] = np.where(unpacked(packed, int(present.sum()), SIGNS), -1, 1)
        own = {SIGNS, SCALES, SUPPORT}
        return restored(signs * np.repeat(scales, sizes), encoded, own, setting)


def _spread(flat: Floats, sizes: list[int]) -> tuple[Floats, Floats]:
    """(the largest magnitude of each parameter, the same entry by entry)."""
    pieces = np.split(np.abs(flat), np.cumsum(sizes)[:-1])
    scales = np.array([piece.max(initial=0) for piece in pieces], np.float32)
    return scales, np.repeat(scales, sizes)


def _present(encoded: Tensors, size: int) -> Bits:
    """Which entries have a sign."""
    if SUPPORT not in encoded:
        return np.ones(size, np.bool_)
    return unpacked(vector(encoded, SUPPORT, torch.uint8), size, SUPPORT)
