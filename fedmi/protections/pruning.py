"""Gradient pruning: only the largest entries of an update are sent."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedmi.protections.base import ClientSide, Setting, Tensors, Update, UpdateProtection
from fedmi.protections.codec import (
    earlier,
    entries,
    flattened,
    passing,
    restored,
    unpacked,
    vector,
)

SUPPORT, VALUES = "#pruning/support", "#pruning/values"


class GradientPruning(UpdateProtection):
    """Sends the entries of an update that are largest in magnitude; the others become zero.

    keeps = max(1, round(keep_share n)) of n entries, of each parameter or of all as one vector;
    buffers pass. There is no error feedback: what is pruned is lost, not sent later, so that the
    0.1 % of Deep Gradient Compression (which adds it up in the client) learns slowly here.

    Threat model: an honest-but-curious server or eavesdropper that sees a client's update. No
    privacy is claimed: which entries are large depends on the records, and the kept values are
    exact. An attack that matches the kept entries alone is not hindered by the zeros.
    On the wire: the kept values (float32) and where they are, as uint32 indices or as a bitmap,
    whichever is shorter; in full where that is no shorter.
    """

    kind: Literal["gradient_pruning"] = "gradient_pruning"
    paper: ClassVar[str] = (
        "Zhu, Liu, Han: Deep Leakage from Gradients. NeurIPS 2019, section 5 (1-70 % pruned); "
        "Lin et al.: Deep Gradient Compression. ICLR 2018 (0.1 % kept)"
    )
    keep_share: float = Field(default=0.3, gt=0, le=1, description="share of the entries kept")
    per_layer: bool = Field(
        default=True, description="keep this share of each parameter; off: of all entries together"
    )

    def problems(self, setting: Setting) -> list[str]:
        if any(before.kind == "sign_compression" for before in earlier(self, setting)):
            return [
                "gradient_pruning after sign_compression: all entries of a parameter have one "
                "magnitude by then, none is larger; list gradient_pruning first"
            ]
        return []

    def client(self, update: Update, side: ClientSide) -> Update:
        names = side.setting.parameters
        parts = {name: part for name, part in update.tensors.items() if name in names}
        limited = self._each(parts) if self.per_layer else self._together(parts)
        return replace(update, tensors={**update.tensors, **limited})

    def _each(self, parts: Tensors) -> dict[str, Tensor]:
        return {name: largest(part, self.keep_share) for name, part in parts.items()}

    def _together(self, parts: Tensors) -> dict[str, Tensor]:
        flat = largest(torch.cat([part.flatten() for part in parts.values()]), self.keep_share)
        pieces = torch.split(flat, [part.numel() for part in parts.values()])
        return {
            name: piece.view(part.shape)
            for (name, part), piece in zip(parts.items(), pieces, strict=True)
        }

    def encode(self, tensors: Tensors, setting: Setting) -> Tensors | None:
        flat = flattened(tensors, setting)
        if flat is None:
            return None
        kept = np.flatnonzero(flat)
        bitmap, indices = np.packbits(flat != 0), kept.astype(np.uint32)
        support = bitmap if bitmap.nbytes < indices.nbytes else indices
        values = flat[kept]
        if support.nbytes + values.nbytes >= flat.nbytes:
            return None
        own = {SUPPORT: torch.from_numpy(support), VALUES: torch.from_numpy(values)}
        return {**passing(tensors, setting), **own}

    def decode(self, encoded: Tensors, setting: Setting) -> dict[str, Tensor]:
        size = entries(setting)
        support = vector(encoded, SUPPORT, torch.uint8, torch.uint32)
        values = vector(encoded, VALUES, torch.float32)
        if support.dtype == np.uint8:
            where = np.flatnonzero(unpacked(support, size, SUPPORT))
        else:
            where = _ascending(support, size)
        if len(values) != len(where):
            raise ValueError(f"'{VALUES}' holds {len(values)} values for {len(where)} places")
        flat = np.zeros(size, np.float32)
        flat[where] = values
        return restored(flat, encoded, {SUPPORT, VALUES}, setting)


def largest(part: Tensor, share: float) -> Tensor:
    """The tensor with all but its max(1, round(share n)) largest entries in magnitude zeroed."""
    flat = part.flatten()
    count = min(len(flat), max(1, round(share * len(flat))))
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(part.shape)


def _ascending(indices: NDArray[np.uint32], size: int) -> NDArray[np.int64]:
    where = indices.astype(np.int64)
    if (np.diff(where) <= 0).any() or (where >= size).any():
        raise ValueError(f"'{SUPPORT}' is no ascending list of indices below {size}")
    return where
