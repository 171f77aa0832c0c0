"""What travels on the lines to an aggregator: a fixed header, then so many bytes. No torch here."""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC, VERSION = b"FMSA", 1
HEADER = struct.Struct(">4sBBHIIQ")
"""magic, version, kind, 0, round, client, bytes of the body."""
CHUNK = 1 << 20


class Kind(IntEnum):
    """Clients send the first two, the server the next five, aggregators the rest."""

    SEED = 1
    SHARE = 2
    BEGIN = 3
    RECEIVED = 4
    OPEN = 5
    VIEW = 6
    PING = 7
    OK = 16
    REFUSED = 17
    HELD = 18
    SUM = 19


class FrameError(ValueError):
    """What arrived is no frame; says why."""


@dataclass(frozen=True)
class Head:
    kind: Kind
    round: int
    client: int
    length: int

    def packed(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, self.kind, 0, self.round, self.client, self.length)


@dataclass(frozen=True)
class Frame:
    """client: who sent it, or whom it is about; 0 where neither."""

    kind: Kind
    round: int
    client: int = 0
    body: bytes = b""

    @property
    def head(self) -> Head:
        return Head(self.kind, self.round, self.client, len(self.body))

    @property
    def wire_bytes(self) -> int:
        return HEADER.size + len(self.body)


def send(line: socket.socket, frame: Frame) -> None:
    line.sendall(frame.head.packed())
    line.sendall(frame.body)


def read_head(line: socket.socket) -> Head | None:
    """The next header, or None where the line was closed before it; FrameError."""
    data = _exactly(line, HEADER.size)
    if not data:
        return None
    if len(data) < HEADER.size:
        raise FrameError(f"the line was closed after {len(data)} of {HEADER.size} header bytes")
    magic, version, kind, zero, round, client, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError(f"begins with {magic!r}, expected {MAGIC!r}")
    if version != VERSION or zero:
        raise FrameError(f"is of version {version}.{zero}, expected {VERSION}.0")
    if kind not in set(Kind):
        raise FrameError(f"is of kind {kind}, expected one of {sorted(map(int, Kind))}")
    return Head(Kind(kind), round, client, length)


def read_body(line: socket.socket, head: Head) -> bytes:
    """The body announced; FrameError. Memory grows with what arrives, not with what is claimed."""
    body = _exactly(line, head.length)
    if len(body) < head.length:
        raise FrameError(f"the line was closed after {len(body)} of {head.length} body bytes")
    return body


def receive(line: socket.socket, limit: int) -> Frame:
    """The next frame, of a body up to `limit` bytes; FrameError."""
    head = read_head(line)
    if head is None:
        raise FrameError("the line was closed before an answer")
    if head.length > limit:
        raise FrameError(f"announces {head.length} bytes, expected at most {limit}")
    return Frame(head.kind, head.round, head.client, read_body(line, head))


def _exactly(line: socket.socket, wanted: int) -> bytes:
    """So many bytes, or fewer if the line was closed."""
    found = bytearray()
    while len(found) < wanted:
        part = line.recv(min(CHUNK, wanted - len(found)))
        if not part:
            break
        found += part
    return bytes(found)
