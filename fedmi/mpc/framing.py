"""The engine's messages in the byte stream between two parties.

The engine speaks brpc's `baidu_std`: `"PRPC" | u32 size of the rest | u32 size of the meta | meta
| body`, both numbers big endian; a body is a protobuf `PushRequest` {1: sender_rank, 2: key,
3: value, 4: trans_type, 5: chunk_info {1: message_length, 2: chunk_offset}} (brpc,
`docs/cn/baidu_std.md`; SecretFlow's interconnection, `link/transport.proto`). Values over 1 MiB
come in chunks, one a push.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"PRPC"
MAX_FRAME_BYTES = 1 << 24
"""Far above the engine's own chunk of 1 MiB; a header that announces more is not the engine's."""

_HEAD = struct.Struct(">4sII")
_SEQUENCE = b"\x01\x02"
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}

Bytes = bytes | bytearray | memoryview


class FramingError(ValueError):
    """The stream is not the engine's protocol."""


class Push(NamedTuple):
    """One request: a message, or a chunk of one that is `total` bytes long, from `offset` on."""

    sender: int
    key: str
    value: bytes
    offset: int
    total: int
    is_control: bool

    @property
    def is_first(self) -> bool:
        return self.offset == 0


class Stream:
    """One connection's bytes, cut into pushes as they come in."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: Bytes) -> Iterator[Push]:
        """The pushes that `data` completes; FramingError where it is not the protocol."""
        self._rest += data
        start, rest = 0, self._rest
        while (size := _size(rest, start)) is not None and len(rest) >= start + size:
            meta = int.from_bytes(rest[start + 8 : start + 12], "big")
            yield _push(bytes(rest[start + _HEAD.size + meta : start + size]))
            start += size
        del rest[:start]


def _size(data: bytearray, start: int) -> int | None:
    """Of the frame that begins at `start`, header and all; None while too little is there."""
    if len(data) < start + _HEAD.size:
        begun = bytes(data[start : start + len(MAGIC)])
        if begun != MAGIC[: len(begun)]:
            raise FramingError(f"a frame begins with {begun!r}, not {MAGIC!r}")
        return None
    magic, size, meta = _HEAD.unpack_from(data, start)
    if magic != MAGIC:
        raise FramingError(f"a frame begins with {magic!r}, not {MAGIC!r}")
    if size > MAX_FRAME_BYTES or meta > size:
        raise FramingError(f"a frame announces {size} bytes with a meta part of {meta}")
    return _HEAD.size + int(size)


def _push(body: bytes) -> Push:
    fields = _fields(body)
    sender, key, value = fields.get(1, 0), fields.get(2), fields.get(3, b"")
    if not isinstance(sender, int) or not isinstance(key, bytes) or not isinstance(value, bytes):
        raise FramingError("a request without a sender's rank, a key and a value")
    chunk = fields.get(5)
    info = _fields(chunk) if isinstance(chunk, bytes) else {}
    offset, total = info.get(2, 0), info.get(1, len(value))
    if not isinstance(offset, int) or not isinstance(total, int) or offset + len(value) > total:
        raise FramingError(f"a chunk of {len(value)} bytes at {offset!r} of a message of {total!r}")
    name, _, number = key.partition(_SEQUENCE)
    # connections are tried with sequence number 0; ACK and FIN have none
    control = number in {b"", b"0"}
    return Push(sender, name.decode("ascii", "backslashreplace"), value, offset, total, control)


def _fields(data: bytes) -> dict[int, int | bytes]:
    """The fields of a protobuf message by number."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            found[tag >> 3], at = _varint(data, at)
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise FramingError(f"a field of wire type {kind}")
        if at + size > len(data):
            raise FramingError(f"a field of {size} bytes where {len(data) - at} are left")
        found[tag >> 3] = data[at : at + size]
        at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    number = 0
    for count, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return number, at + count + 1
    raise FramingError("a number that does not end")
