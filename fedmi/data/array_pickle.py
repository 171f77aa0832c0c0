"""Reads a pickled dictionary of uint8 arrays and plain values without running anything in it.

A pickle is a program: it may name any function and have it called. Here every name it may use is
answered by an inert stand-in, any other is refused, and arrays are made from their bytes after
their type, shape and length were checked; NumPy's own unpickling is never entered.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmi.data.errors import DataError

Uint8s = NDArray[np.uint8]
MAX_BYTES = 1 << 28
"""A batch of CIFAR-10 has 31 MB."""
UINT8 = {"u1", "|u1", "uint8"}
BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""All that the machine raises on bytes that are no pickle, a part of one, or one made to harm."""


class PickledArray:
    """What the file says of an array, unread; `uint8_array` checks it."""

    state: object = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state


class PickledType:
    """The name of a dtype. The state that follows it (byte order, fields) is not needed: the one
    type understood has a byte a value."""

    name: object = None

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, _: object) -> None: ...


class PickledBytes:
    """Bytes that Python 3 wrote for Python 2: text, turned into bytes only where it is needed, so
    that a small file which repeats a long one stays small."""

    text: object = ""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text

    def __setstate__(self, _: object) -> None: ...


class _Reconstruct:
    """NumPy's function for an empty array, whose state comes after."""

    __slots__ = ()

    def __call__(self, *_: object) -> PickledArray:
        return PickledArray()

    def __setstate__(self, _: object) -> None: ...


STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): PickledBytes,
    ("builtins", "bytes"): PickledBytes,
    ("__builtin__", "bytes"): PickledBytes,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in STAND_INS:
            asked = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(
                f"it names {asked!r}, which no such file needs: refused, nothing was run"
            )
        return STAND_INS[module, name]


def read_dictionary(file: Path) -> dict[str, object]:
    """The dictionary in `file`; its arrays are PickledArray. DataError for anything else."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{file}: over {MAX_BYTES >> 20} MiB; a batch has 31 MB")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    try:
        _check_memo(content)
        found = _Restricted(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, not a dictionary")
        return {_text(key): value for key, value in found.items()}
    except BROKEN as error:
        raise DataError(f"{file}: truncated, or not a pickled batch of images ({error})") from error


def _check_memo(content: bytes) -> None:
    """ValueError where a value is stored at a far place: the machine would allocate up to it."""
    for code, argument, _ in pickletools.genops(content):
        if code.name.endswith("PUT") and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"it stores a value at place {argument}")


def _text(key: object) -> str:
    if isinstance(key, PickledBytes):
        key = key.text
    if isinstance(key, bytes):
        return key.decode("latin1")
    if not isinstance(key, str):
        raise TypeError(f"a key is a {type(key).__name__}, not a name")
    return key


def uint8_array(value: object, columns: int) -> Uint8s:
    """[n, columns]. ValueError for another type or shape, or bytes that do not fill it."""
    state = value.state if isinstance(value, PickledArray) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("is not an array")
    _, shape, dtype, by_column, raw = state
    if not isinstance(dtype, PickledType) or _name(dtype) not in UINT8:
        raise ValueError("is not of type uint8")
    content = _content(raw)
    rows = len(content) // columns
    if not rows or shape != (rows, columns) or len(content) != rows * columns:
        raise ValueError(f"has {len(content)} bytes and another shape than [n, {columns}]")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if by_column else "C")


def _name(dtype: PickledType) -> str:
    try:
        return _text(dtype.name)
    except TypeError:
        return ""


def _content(raw: object) -> bytes:
    """UnicodeEncodeError, a ValueError, for text beyond one byte a character."""
    if isinstance(raw, PickledBytes):
        raw = raw.text
    if isinstance(raw, str):
        return raw.encode("latin1")
    if not isinstance(raw, bytes):
        raise ValueError("has no bytes")
    return raw
