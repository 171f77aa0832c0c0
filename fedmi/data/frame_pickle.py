"""Reads a pickled table (pandas before 1.0) of a known digest without running anything in it.

The digest alone would do, were it not for the one that is written here being wrong some day: so
every name the pickle uses is answered by an inert stand-in, and any other is refused.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedmi.data.array_pickle import BROKEN, PickledArray, PickledType
from fedmi.data.errors import DataError

Values = list[object]
NUMBERS = {"f8": np.float64, "i8": np.int64}


class _Inert:
    """An object of the file: what it was made from, and its state."""

    state: object = None

    def __init__(self, *made_from: object) -> None:
        self.made_from = made_from

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Array(PickledArray):
    def __setstate__(self, state: object) -> None:
        self.state = state


class _Reconstruct:
    """NumPy's function for an empty array, whose state comes after."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()

    def __setstate__(self, _: object) -> None: ...


STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("pandas.core.frame", "DataFrame"): _Inert,
    ("pandas.core.internals.managers", "BlockManager"): _Inert,
    ("pandas.core.indexes.base", "_new_Index"): _Inert,
    ("pandas.core.indexes.base", "Index"): _Inert,
    ("pandas.core.indexes.range", "RangeIndex"): _Inert,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): PickledType,
    ("builtins", "slice"): slice,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in STAND_INS:
            asked = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(f"it names {asked!r}: refused, nothing was run")
        return STAND_INS[module, name]


def read_frame(file: Path, sha256: str) -> dict[str, Values]:
    """The columns by name, in order: numbers (NaN where missing) and texts (NaN likewise).

    Raises DataError for a file of another digest, or one that holds no such table.
    """
    content = file.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{file}: sha256 {found[:16]}..., not {sha256[:16]}...: another file")
    try:
        return _columns(content)
    except BROKEN as error:
        raise DataError(f"{file}: not a pickled table ({error})") from error


def _columns(content: bytes) -> dict[str, Values]:
    frame = _Restricted(io.BytesIO(content)).load()
    held = _dictionary(_dictionary(_state(_dictionary(_state(frame))["_data"])[3])["0.14.1"])
    names = _numbers(held["axes"][0].made_from[1]["data"])
    found: dict[str, Values] = {}
    for block in held["blocks"]:
        rows = _rows(block["values"])
        for place, row in zip(_places(block["mgr_locs"]), rows, strict=True):
            found[str(names[place])] = row
    return {str(name): found[str(name)] for name in names}


def _places(where: object) -> list[int]:
    if isinstance(where, slice):
        return list(range(where.start, where.stop, where.step or 1))
    return [int(str(place)) for place in _numbers(where)]


def _rows(block: object) -> list[Values]:
    """[k, n] -> k lists."""
    (count, length), values = _shape(block, 2), _numbers(block)
    if count * length != len(values):
        raise ValueError(f"{len(values)} values are not [{count}, {length}]")
    if _state(block)[3]:
        return [values[row::count] for row in range(count)]
    return [values[row * length : (row + 1) * length] for row in range(count)]


def _numbers(array: object) -> Values:
    """All values of an array, in the order they lie in."""
    _, _, dtype, _, raw = _state(array)
    if isinstance(raw, list):
        return raw
    kind = NUMBERS.get(str(getattr(dtype, "name", "")).lstrip("<"))
    if kind is None or not isinstance(raw, bytes):
        raise ValueError("an array is neither of numbers nor of objects")
    return list(np.frombuffer(raw, dtype=kind).tolist())


def _shape(array: object, axes: int) -> tuple[int, ...]:
    shape = _state(array)[1]
    if not isinstance(shape, tuple) or len(shape) != axes:
        raise ValueError(f"an array of shape {shape!r} where {axes} axes belong")
    return tuple(int(size) for size in shape)


def _state(item: object) -> Sequence:  # type: ignore[type-arg]
    state = getattr(item, "state", None)
    if state is None:
        raise ValueError(f"a {type(item).__name__} without content")
    return state  # type: ignore[no-any-return]


def _dictionary(item: object) -> dict:  # type: ignore[type-arg]
    if not isinstance(item, dict):
        raise ValueError(f"a {type(item).__name__} where a dictionary belongs")
    return item
