"""The control line: length-prefixed frames between the caller and one party, over a socket pair.

A frame is `u32 size of the header | header, a JSON object | the blobs whose sizes it lists`. No
pickle, and nothing of it shares a descriptor with what the engine prints.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_HEADER_BYTES = 1 << 24
_SIZE = struct.Struct("<I")


class LineError(OSError):
    """The other end sent what is not a frame, closed the line, or did not take or give in time."""


@dataclass(frozen=True)
class Frame:
    """A JSON object and bytes beside it."""

    header: Mapping[str, object]
    blobs: tuple[bytes, ...] = field(default=())


class Line:
    """One end. Sending is safe from several threads; receiving is for one."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def send(
        self,
        header: Mapping[str, object],
        blobs: Sequence[bytes] = (),
        seconds: float | None = None,
    ) -> None:
        """LineError where the other end is gone or has not taken it within `seconds`."""
        text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
        with self._sending:
            self._end.settimeout(seconds)
            try:
                self._end.sendall(_SIZE.pack(len(text)) + text)
                for blob in blobs:
                    self._end.sendall(blob)
            except TimeoutError:
                raise LineError(f"took no data for {seconds:.3g} s") from None
            except OSError as error:
                raise LineError(f"closed its control line ({error})") from error

    def receive(self, seconds: float | None = None) -> Frame:
        """The next frame; LineError where it is none, the line closes or `seconds` pass."""
        deadline = None if seconds is None else time.monotonic() + seconds
        (size,) = _SIZE.unpack(self._exactly(_SIZE.size, deadline))
        if size > MAX_HEADER_BYTES:
            raise LineError(f"sent garbage on its control line: a header of {size} bytes")
        header = _parsed(self._exactly(size, deadline))
        sizes = header.pop("blobs", None)
        if not isinstance(sizes, list) or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise LineError("sent garbage on its control line: no list of blob sizes")
        return Frame(header, tuple(self._exactly(n, deadline) for n in sizes))

    def _exactly(self, size: int, deadline: float | None) -> bytes:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            left = None if deadline is None else max(1e-3, deadline - time.monotonic())
            try:
                self._end.settimeout(left)
                got = self._end.recv_into(view[filled:])
            except TimeoutError:
                raise LineError("did not answer in time") from None
            except OSError as error:
                raise LineError(f"closed its control line ({error})") from error
            if not got:
                raise LineError("closed its control line")
            filled += got
        return bytes(data)


def _parsed(text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise LineError(f"sent garbage on its control line: {error}") from error
    if not isinstance(header, dict):
        raise LineError(f"sent garbage on its control line: {type(header).__name__}, not an object")
    return header
