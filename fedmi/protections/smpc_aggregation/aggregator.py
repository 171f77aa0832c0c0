"""One aggregator, a process: `python -m fedmi...smpc_aggregation.aggregator PORT SECONDS`.

The token of the server that started it comes as a line on the standard input, which stays open:
once it is closed the process ends, so it dies with its parent. On the standard output it says in
one line of JSON where it listens, on loopback, and its public key; or why it cannot. No torch here.
"""

import hmac
import json
import os
import socket
import sys
import threading
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmi.protections.smpc_aggregation import frames
from fedmi.protections.smpc_aggregation.control import (
    TOKEN_BYTES,
    Beginning,
    ControlError,
    read_clients,
)
from fedmi.protections.smpc_aggregation.frames import Frame, FrameError, Head, Kind
from fedmi.protections.smpc_aggregation.holding import Held, Holding, RefusedError
from fedmi.protections.smpc_aggregation.sealing import (
    OVERHEAD_BYTES,
    SealError,
    public_of,
    unseal,
)
from fedmi.protections.smpc_aggregation.sharing import to_bytes

HOST = "127.0.0.1"
BACKLOG = 256
CONTROL_BYTES = 2**24
"""A request of the server is no longer."""
SLACK = 4
"""A share up to so many times too long is read, to say how long it is; beyond, the line is cut."""
FROM_CLIENTS = (Kind.SEED, Kind.SHARE)


@dataclass
class Aggregator:
    """Answers one frame with one frame, on any number of lines at once."""

    token: bytes
    seconds: float
    key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    holding: Holding = field(default_factory=Holding)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, listener: socket.socket) -> None:
        """For ever."""
        while True:
            line, address = listener.accept()
            name = f"{address[0]}:{address[1]}"
            threading.Thread(target=self.converse, args=(line, name), daemon=True).start()

    def converse(self, line: socket.socket, name: str) -> None:
        """Until the other side closes the line, is silent for too long or sends no frame."""
        with line:
            line.settimeout(self.seconds)
            try:
                while (head := frames.read_head(line)) is not None:
                    self._reply(line, head)
            except (FrameError, OSError) as error:
                with self.lock:
                    self.holding.note(f"from {name}: {error}")

    def _reply(self, line: socket.socket, head: Head) -> None:
        """Answers one frame; FrameError where the line cannot be used any further."""
        limit = self._limit(head)
        if head.length > limit:
            why = f"{head.kind.name} announces {head.length} bytes, expected at most {limit}"
            with self.lock:
                self._blame(head, why)
            frames.send(line, Frame(Kind.REFUSED, head.round, head.client, why.encode()))
            raise FrameError(why)
        try:
            body = frames.read_body(line, head)
        except FrameError as error:
            raise FrameError(f"{head.kind.name} of client {head.client}: {error}") from error
        with self.lock:
            answer = self.answer(Frame(head.kind, head.round, head.client, body))
        frames.send(line, answer)

    def _limit(self, head: Head) -> int:
        if head.kind not in FROM_CLIENTS:
            return CONTROL_BYTES
        with self.lock:
            return OVERHEAD_BYTES + SLACK * self.holding.wanted_bytes(Kind.SHARE) + CONTROL_BYTES

    def answer(self, frame: Frame) -> Frame:
        """What a frame gets; one that is refused is noted."""
        client = frame.kind in FROM_CLIENTS
        if client:
            self.holding.received_bytes += frame.wire_bytes
        try:
            kind, body = self._share(frame) if client else self._request(frame)
        except (RefusedError, SealError, ControlError) as error:
            if not isinstance(error, RefusedError) or frame.client not in self.holding.refused:
                self.holding.note(f"{frame.kind.name} of client {frame.client}: {error}")
            kind, body = Kind.REFUSED, str(error).encode()
        answer = Frame(kind, frame.round, frame.client, body)
        if client:
            self.holding.answered_bytes += answer.wire_bytes
        return answer

    def _share(self, frame: Frame) -> tuple[Kind, bytes]:
        self.holding.expects(frame.round, frame.client)
        data = unseal(frame.body, self.key, frame.head.packed())
        self.holding.take(frame.client, Held(frame.kind, data, frame.wire_bytes))
        return Kind.OK, b""

    def _blame(self, head: Head, why: str) -> None:
        """A client of the round that sends far too much is out of it."""
        try:
            self.holding.expects(head.round, head.client)
        except RefusedError:
            return
        if head.kind in FROM_CLIENTS:
            self.holding.out(head.client, why)

    def _request(self, frame: Frame) -> tuple[Kind, bytes]:
        token, body = frame.body[:TOKEN_BYTES], frame.body[TOKEN_BYTES:]
        if not hmac.compare_digest(token, self.token):
            raise ControlError("it does not come from the server that started this aggregator")
        if frame.kind == Kind.BEGIN:
            self.holding = Holding(frame.round, Beginning.read(body))
            return Kind.OK, b""
        if frame.kind == Kind.PING:
            return Kind.OK, b""
        if frame.round != self.holding.number:
            raise ControlError(f"round {frame.round} is not the latest, {self.holding.number} is")
        if frame.kind == Kind.RECEIVED:
            return Kind.HELD, self.holding.report().packed()
        if frame.kind == Kind.OPEN:
            return Kind.SUM, to_bytes(self.holding.sum(read_clients(body)))
        if frame.kind == Kind.VIEW and frame.client in self.holding.held:
            item = self.holding.held[frame.client]
            return item.kind, item.data
        raise ControlError(f"{frame.kind.name} of client {frame.client} asks for nothing there is")


def listening(port: int) -> socket.socket:
    """OSError where the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen(BACKLOG)
    return listener


def main(port: int, seconds: float) -> int:
    token = bytes.fromhex(sys.stdin.readline().strip())
    aggregator = Aggregator(token, seconds)
    try:
        listener = listening(port)
    except OSError as error:
        _say({"error": f"port {port} on {HOST} cannot be had: {error.strerror}"})
        return 1
    threading.Thread(target=aggregator.serve, args=(listener,), daemon=True).start()
    _say({"port": listener.getsockname()[1], "public": public_of(aggregator.key).hex()})
    sys.stdin.read()
    os._exit(0)


def _say(told: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
