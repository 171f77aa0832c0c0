"""How update protections lay an update's parameters out as one vector on the wire, and read it."""

from collections.abc import Mapping
from itertools import takewhile
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmi.protections.base import Protection, Setting, Tensors

Floats = NDArray[np.float32]
Bits = NDArray[np.bool_]
Packed = NDArray[np.uint8]


def earlier(protection: Protection, setting: Setting) -> list[Protection]:
    """The protections listed before this one."""
    return list(takewhile(lambda other: other != protection, setting.protections))


def shapes(setting: Setting) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter, in the order of the layout."""
    names = setting.parameters
    return {name: shape for name, shape in setting.full_layout.items() if name in names}


def entries(setting: Setting) -> int:
    """Numbers in all parameters."""
    return sum(prod(shape) for shape in shapes(setting).values())


def flattened(tensors: Tensors, setting: Setting) -> Floats | None:
    """All parameters as one vector; None if they are not all float32."""
    parts = [tensors[name] for name in shapes(setting)]
    if not parts or any(part.dtype != torch.float32 for part in parts):
        return None
    flat: Floats = torch.cat([part.detach().flatten() for part in parts]).numpy()
    return flat


def passing(tensors: Tensors, setting: Setting) -> dict[str, Tensor]:
    """What goes as it is: buffers, and what other protections added."""
    names = setting.parameters
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def restored(flat: Floats, encoded: Tensors, own: set[str], setting: Setting) -> dict[str, Tensor]:
    """The update of these parameters and of what passed, in the order of the layout.

    own: the names the codec itself put into `encoded`. ValueError for any name or shape that is
    not of the layout.
    """
    trained, layout = shapes(setting), setting.full_layout
    pieces = torch.split(torch.from_numpy(flat), [prod(shape) for shape in trained.values()])
    parts: dict[str, Tensor] = {
        name: piece.view(shape).clone()
        for (name, shape), piece in zip(trained.items(), pieces, strict=True)
    }
    for name in encoded.keys() - own:
        if name not in layout or name in trained:
            raise ValueError(f"'{name}' does not belong into an encoded update")
        if tuple(encoded[name].shape) != tuple(layout[name]):
            given = tuple(encoded[name].shape)
            raise ValueError(f"'{name}' has shape {given}, expected {tuple(layout[name])}")
        parts[name] = encoded[name]
    return {name: parts[name] for name in layout if name in parts}


def vector(encoded: Mapping[str, Tensor], name: str, *dtypes: torch.dtype) -> NDArray[Any]:
    """One part of an encoded update; ValueError unless it is a vector of one of these types."""
    if name not in encoded:
        raise ValueError(f"'{name}' is missing")
    part = encoded[name]
    if part.dtype not in dtypes or part.dim() != 1:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"'{name}' is {part.dtype} of shape {tuple(part.shape)}, expected a vector of {wanted}"
        )
    found: NDArray[Any] = part.detach().cpu().numpy()
    return found


def unpacked(packed: Packed, count: int, name: str) -> Bits:
    """The first `count` bits; ValueError unless the rest only fills the last byte, with zeros."""
    if len(packed) != -(-count // 8):
        raise ValueError(f"'{name}' has {len(packed)} bytes, expected {-(-count // 8)}")
    bits = np.unpackbits(packed)
    if bits[count:].any():
        raise ValueError(f"'{name}' has bits set beyond its {count} entries")
    return bits[:count].astype(np.bool_)
