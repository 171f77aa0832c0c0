"""The recording relay in front of one party's engine: everything its peers send it passes here.

It runs as one thread of the party's own process (the engine works without Python's interpreter
lock), listens on the port that the peers know and forwards to the engine's own. So it sees what
this party receives and nothing else; the receipts that go back on the same connections are framing.

Messages go on at once: the next one depends on them. All else waits for a pause of `NAP_SECONDS`:
receipts, that no single message waits for, and the counting of what has passed.
"""

import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedmi.mpc.framing import FramingError, Push, Stream
from fedmi.mpc.record import Recorder
from fedmi.mpc.tally import Tally

READ_BYTES = 1 << 18
CONNECT_SECONDS = 10.0
NAP_SECONDS = 0.001
PUT_OFF_READS, PUT_OFF_BYTES = 32, 1 << 16
"""So much is forwarded, at most, before receipts and counting have their turn."""

Alarm = Callable[[int | None, str], None]
"""Called with who sent garbage (None: a connection that never said) and what was wrong with it."""


@dataclass(eq=False)
class Incoming:
    """A connection from a peer, and the engine's end of it.

    sender: its rank, once it said so. is_spoilt: garbage has come; nothing after it is looked at.
    """

    peer: socket.socket
    engine: socket.socket
    stream: Stream = field(default_factory=Stream)
    sender: int | None = None
    is_spoilt: bool = False


class Ledger:
    """Counts and keeps what has passed; put down in passing, looked at later."""

    def __init__(self, rank: int, world: int, alarm: Alarm) -> None:
        self._peers = frozenset(range(world)) - {rank}
        self._alarm = alarm
        self._lock = threading.Lock()
        self._passed: list[tuple[Incoming, bytes]] = []
        self._bytes = 0
        self._recorder: Recorder | None = None
        self._tally = Tally()

    def put(self, incoming: Incoming, data: bytes) -> None:
        with self._lock:
            self._passed.append((incoming, data))
            self._bytes += len(data)

    @property
    def is_due(self) -> bool:
        return len(self._passed) >= PUT_OFF_READS or self._bytes >= PUT_OFF_BYTES

    def settle(self) -> Tally:
        """Look at all that has passed; the counts."""
        with self._lock:
            return self._settled()

    def record(self, path: Path | None) -> None:
        """Append the messages that come from now on to the file; None: keep no more."""
        with self._lock:
            self._settled()
            if self._recorder is not None:
                self._recorder.close()
            self._recorder = None if path is None else Recorder(path)

    def _settled(self) -> Tally:
        passed, self._passed, self._bytes = self._passed, [], 0
        for incoming, data in passed:
            self._tally.wire_bytes += len(data)
            if incoming.is_spoilt:
                continue
            try:
                for push in incoming.stream.feed(data):
                    self._know(incoming, push)
                    self._tally.add(push)
                    if self._recorder is not None and not push.is_control:
                        self._recorder.add(push)
            except FramingError as error:
                incoming.is_spoilt = True
                self._alarm(incoming.sender, str(error))
        return self._tally

    def _know(self, incoming: Incoming, push: Push) -> None:
        """The sender must be a peer, and the one this connection began with."""
        if push.sender not in self._peers or incoming.sender not in {None, push.sender}:
            raise FramingError(f"a message says that it comes from party {push.sender}")
        incoming.sender = push.sender


class Relay:
    """Forwards what comes to the listener, and puts it down in the ledger."""

    def __init__(self, listener: socket.socket, ledger: Ledger) -> None:
        self._listener = listener
        self._target: int | None = None
        self._forth: dict[int, Incoming] = {}
        self._back: dict[int, Incoming] = {}
        self._messages, self._receipts, self._all = (select.epoll() for _ in range(3))
        self._buffer = memoryview(bytearray(READ_BYTES))
        self.ledger = ledger

    def forward_to(self, port: int) -> None:
        """The engine listens on this port of the machine, from now on."""
        begin, self._target = self._target is None, port
        if begin:
            self._all.register(self._listener, select.EPOLLIN)
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        """For ever: all that comes; in a burst, messages first and the rest in pauses."""
        while True:
            for descriptor, _ in self._all.poll():
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._forth:
                    self._message(descriptor)
                elif descriptor in self._back:
                    self._receipt(descriptor)
            while messages := self._messages.poll(NAP_SECONDS):
                for descriptor, _ in messages:
                    self._message(descriptor)
                if self.ledger.is_due:
                    break
            for descriptor, _ in self._receipts.poll(0):
                self._receipt(descriptor)
            self.ledger.settle()

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        try:
            engine = socket.create_connection(("127.0.0.1", self._target or 0), CONNECT_SECONDS)
        except OSError:  # not listening yet: the peer's engine tries again
            peer.close()
            return
        engine.settimeout(None)
        incoming = Incoming(peer, engine)
        self._forth[peer.fileno()] = self._back[engine.fileno()] = incoming
        for end, poll in ((peer, self._messages), (engine, self._receipts)):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            poll.register(end, select.EPOLLIN)
            self._all.register(end, select.EPOLLIN)

    def _message(self, descriptor: int) -> None:
        if (incoming := self._forth.get(descriptor)) is None:  # given up in the same turn
            return
        if (data := self._read(incoming.peer)) is None:
            return
        if data:
            self.ledger.put(incoming, bytes(data))
        if not data or not _sent(incoming.engine, data):
            self._give_up(incoming)

    def _receipt(self, descriptor: int) -> None:
        if (incoming := self._back.get(descriptor)) is None:
            return
        if (data := self._read(incoming.engine)) is None:
            return
        if not data or not _sent(incoming.peer, data):
            self._give_up(incoming)

    def _read(self, source: socket.socket) -> memoryview | None:
        """What is there, None if nothing yet; empty where the other end is gone (who, the caller
        sees)."""
        try:
            return self._buffer[: source.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return None
        except OSError:
            return self._buffer[:0]

    def _give_up(self, incoming: Incoming) -> None:
        for end, ways in ((incoming.peer, self._forth), (incoming.engine, self._back)):
            del ways[end.fileno()]
            end.close()


def _sent(sink: socket.socket, data: memoryview) -> bool:
    try:
        sink.sendall(data)
    except OSError:
        return False
    return True
