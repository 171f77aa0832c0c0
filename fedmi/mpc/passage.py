"""A passage from one party out to the dealer, or in tests to a peer: it counts and records."""

import secrets
import socket
import threading
from pathlib import Path

from fedmi.mpc.framing import Push
from fedmi.mpc.record import DEALER, Recorder

READ_BYTES = 1 << 18
CONNECT_SECONDS = 10.0


class Passage:
    """Listens on a free port of this machine and forwards to `target`, HOST:PORT, both ways.

    bytes: how many went either way. garbage_after: a fault to inject: once so many bytes have gone
    out on a connection, random bytes go in place of the rest.
    """

    def __init__(self, target: str, garbage_after: int | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._garbage_after = garbage_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._kept = 0
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def record(self, path: Path | None) -> None:
        """Append what comes back from now on to the file, piece by piece as it comes, with its
        framing, from sender DEALER; None: keep no more."""
        with self._lock:
            if self._recorder is not None:
                self._recorder.close()
            self._recorder = None if path is None else Recorder(path)

    def _accept(self) -> None:
        while True:
            incoming, _ = self._listener.accept()
            try:
                outgoing = socket.create_connection(self._target, CONNECT_SECONDS)
            except OSError:  # not listening yet: whoever asked tries again
                incoming.close()
                continue
            outgoing.settimeout(None)
            for end in (incoming, outgoing):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            out = (incoming, outgoing, self._garbage_after, False)
            back = (outgoing, incoming, None, True)
            for way in (out, back):
                threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, garbage_after: int | None, is_back: bool
    ) -> None:
        gone = 0
        try:
            while data := source.recv(READ_BYTES):
                gone += len(data)
                with self._lock:
                    self.bytes += len(data)
                    if is_back and self._recorder is not None:
                        self._keep(self._recorder, data)
                spoilt = garbage_after is not None and gone > garbage_after
                sink.sendall(secrets.token_bytes(len(data)) if spoilt else data)
        except OSError:  # closed under way
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                continue

    def _keep(self, recorder: Recorder, data: bytes) -> None:
        key = f"dealer/{self._kept:06d}"
        recorder.add(Push(DEALER, key, data, 0, len(data), is_control=False))
        self._kept += 1
