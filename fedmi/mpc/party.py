"""One compute party: `python -m fedmi.mpc.party FD RANK CALLER`.

FD: the descriptor of its control line. CALLER: the process that started it. It holds this party's
shares and nothing of another's. A reader thread takes the line: it answers `ping` at once, hands
everything else to the main thread, and ends the process when the line closes or the caller is gone;
so a party never outlives who started it.
"""

import os
import queue
import socket
import sys
import threading
from collections.abc import Mapping

from fedmi.mpc import engine
from fedmi.mpc.joining import join
from fedmi.mpc.lines import Frame, Line, LineError
from fedmi.mpc.relay import Ledger, Relay
from fedmi.mpc.workshop import Workshop

REFUSALS = (RuntimeError, ValueError, OSError, LookupError, TypeError)
"""What the engine raises through its bindings, and what this package raises on bad input."""


class Party:
    """Carries out the caller's commands, one after another."""

    def __init__(self, line: Line, rank: int) -> None:
        self.rank = rank
        self._line = line
        self._listener: socket.socket | None = None
        self._workshop: Workshop | None = None

    def answer(self, frame: Frame) -> None:
        """Do what the frame says and reply under its number."""
        number = frame.header.get("number")
        try:
            header, blobs = self._do(frame)
        except REFUSALS as error:
            reason = str(error).split("\nStacktrace", maxsplit=1)[0].strip()
            self._line.send({"number": number, "error": f"{type(error).__name__}: {reason}"})
        else:
            self._line.send({"number": number, **header}, blobs)

    def _do(self, frame: Frame) -> tuple[dict[str, object], list[bytes]]:
        command = frame.header.get("do")
        if command == "listen":
            return self._listen(int(str(frame.header["port"]))), []
        if command == "connect":
            self._connect(frame.header)
            return {}, []
        if self._workshop is None:
            raise ValueError(f"{command} before the parties are connected")
        return self._workshop.do(frame)

    def _listen(self, port: int) -> dict[str, object]:
        try:
            self._listener = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise OSError(
                f"cannot listen on port {port}: {os.strerror(error.errno or 0)}"
            ) from error
        return {"port": self._listener.getsockname()[1]}

    def _connect(self, header: Mapping[str, object]) -> None:
        if self._listener is None:
            raise ValueError("connect before listen")
        hosts = [str(host) for host in _list(header["hosts"])]
        relay = Relay(self._listener, Ledger(self.rank, len(hosts), self._alarm))
        self._workshop = join(header, self.rank, hosts, relay)

    def _alarm(self, sender: int | None, reason: str) -> None:
        self._line.send({"event": "garbage", "sender": sender, "reason": reason})


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"a list, not {value!r}")
    return value


def read(line: Line, frames: "queue.SimpleQueue[Frame]", caller: int) -> None:
    """Until the line closes, or the process that started this one is another's."""
    threading.Thread(target=_watch, args=(caller,), daemon=True).start()
    try:
        while True:
            frame = line.receive()
            if frame.header.get("do") == "ping":
                line.send({"number": frame.header.get("number")})
            else:
                frames.put(frame)
    except LineError:
        os._exit(0)


def _watch(caller: int) -> None:
    while os.getppid() == caller:
        threading.Event().wait(1.0)
    os._exit(0)


def main() -> None:
    """Serve until told to stop."""
    descriptor, rank, caller = map(int, sys.argv[1:4])
    line = Line(socket.socket(fileno=descriptor))
    engine.load_alone()
    party = Party(line, rank)
    frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=read, args=(line, frames, caller), daemon=True).start()
    while True:
        party.answer(frames.get())


if __name__ == "__main__":
    main()
