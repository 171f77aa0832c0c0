"""A file of what one party received: `sender, offset, total, sizes | key | value`."""

import struct
from collections.abc import Iterator
from pathlib import Path

from fedmi.mpc.framing import Push

_HEAD = struct.Struct("<iQQII")
DEALER = -1
"""Sender of what comes from the dealer, who has no rank."""


class Recorder:
    """Appends to the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def add(self, push: Push) -> None:
        key = push.key.encode()
        self._file.write(
            _HEAD.pack(push.sender, push.offset, push.total, len(key), len(push.value))
        )
        self._file.write(key)
        self._file.write(push.value)

    def close(self) -> None:
        self._file.close()


def read_record(path: Path) -> list[tuple[int, str, bytes]]:
    """Sender, key and value of each message, in order of (first) arrival, its chunks put together.

    ValueError where the file ends within a message.
    """
    found: dict[tuple[int, str], bytearray] = {}
    filled: dict[tuple[int, str], int] = {}
    for push in _pushes(path.read_bytes() if path.exists() else b""):
        name = push.sender, push.key
        found.setdefault(name, bytearray(push.total))[
            push.offset : push.offset + len(push.value)
        ] = push.value
        filled[name] = filled.get(name, 0) + len(push.value)
    for (sender, key), value in found.items():
        if filled[sender, key] != len(value):
            raise ValueError(
                f"{path}: {key} from {sender}: {filled[sender, key]} of {len(value)} bytes"
            )
    return [(sender, key, bytes(value)) for (sender, key), value in found.items()]


def _pushes(data: bytes) -> Iterator[Push]:
    at = 0
    while at < len(data):
        sender, offset, total, key, value = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Push(
            sender,
            data[at : at + key].decode(),
            data[at + key : at + key + value],
            offset,
            total,
            is_control=False,
        )
        at += key + value
