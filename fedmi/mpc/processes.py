"""The parties' processes as their caller sees them: started, asked, blamed, stopped."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmi.mpc.errors import MPCError
from fedmi.mpc.lines import Frame, Line, LineError

GRACE_SECONDS = 0.3
"""Between the first sign of a fault and the verdict: consequences may come in before the cause."""
PING_SECONDS = 2.0
STOP_SECONDS = 2.0

Asked = Callable[[int], tuple[Mapping[str, object], Sequence[bytes]]]
"""Header and blobs for the party of a rank."""


@dataclass(frozen=True)
class Member:
    """One party's process and the line to it."""

    rank: int
    process: "subprocess.Popen[bytes]"
    line: Line


def start(rank: int, output: Path) -> Member:
    """A process in a session of its own; what it prints goes to the file."""
    ours, theirs = socket.socketpair()
    home = str(Path(__file__).resolve().parents[2])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = [str(theirs.fileno()), str(rank), str(os.getpid())]
    with theirs, output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmi.mpc.party", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
    return Member(rank, process, Line(ours))


@dataclass
class Signs:
    """What has gone wrong so far, by rank."""

    garbage: list[tuple[int | None, str]] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.garbage or self.gone or self.refused)


class Processes:
    """Asks all parties at once; on the first fault names whose it is and stops the others."""

    def __init__(self, seconds: float) -> None:
        self._members: list[Member] = []
        self._seconds = seconds
        self._number = 0
        self._stopped: str | None = None

    def start(self, rank: int, output: Path) -> None:
        """One more party, of the next rank."""
        self._members.append(start(rank, output))

    def ask(self, make: Asked) -> list[Frame]:
        """Each party's reply to what `make` says for its rank; MPCError where there is none."""
        if self._stopped is not None:
            raise MPCError(f"the computation was stopped before: {self._stopped}")
        self._number += 1
        deadline = time.monotonic() + self._seconds
        signs, replies = Signs(), dict[int, Frame]()
        for member in self._members:
            header, blobs = make(member.rank)
            try:
                left = max(0.1, deadline - time.monotonic())
                member.line.send({**header, "number": self._number}, blobs, left)
            except LineError as error:
                signs.gone[member.rank] = str(error)
        while not signs and len(replies) < len(self._members):
            if not self._hear(replies, signs, deadline):
                self._late(set(range(len(self._members))) - replies.keys())
        if signs:
            self._fail(signs, replies)
        return [replies[member.rank] for member in self._members]

    def _hear(self, replies: dict[int, Frame], signs: Signs, deadline: float) -> bool:
        """One round of listening; False where the deadline passed without a word."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                if member.rank not in signs.gone:
                    selector.register(member.line, selectors.EVENT_READ, member)
            if not selector.get_map():
                return False
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        for key, _ in ready:
            self._take(key.data, replies, signs, deadline)
        return bool(ready)

    def _take(
        self, member: Member, replies: dict[int, Frame], signs: Signs, deadline: float
    ) -> None:
        try:
            frame = member.line.receive(max(0.1, deadline - time.monotonic()))
        except LineError as error:
            signs.gone[member.rank] = str(error)
            return
        header = frame.header
        if header.get("event") == "garbage":
            sender = header.get("sender")
            told = f"party {member.rank} received garbage: {header.get('reason')}"
            signs.garbage.append((sender if isinstance(sender, int) else None, told))
        elif header.get("number") != self._number:
            signs.gone[member.rank] = f"sent garbage on its control line: {dict(header)}"
        elif "error" in header:
            signs.refused[member.rank] = str(header["error"])
        else:
            replies[member.rank] = frame

    def _fail(self, signs: Signs, replies: dict[int, Frame]) -> None:
        """Wait a moment for the cause, then name it."""
        deadline = time.monotonic() + GRACE_SECONDS
        while not signs.garbage and self._hear(replies, signs, deadline):
            pass
        reason, party = self._verdict(signs)
        self.abort(reason)
        raise MPCError(reason, party)

    def _verdict(self, signs: Signs) -> tuple[str, int | None]:
        for sender, told in signs.garbage:
            who = (
                "from a connection that named no party"
                if sender is None
                else f"from party {sender}"
            )
            return f"{told}, {who}", sender
        ends = {rank: self._members[rank].process.poll() for rank in signs.gone}
        killed = [rank for rank, code in ends.items() if code is not None and code < 0]
        for rank in [*killed, *signs.gone]:
            return f"party {rank} {_ending(ends[rank], signs.gone[rank])}", rank
        rank, reason = next(iter(signs.refused.items()))
        return f"party {rank} refused: {reason}", None

    def _late(self, silent: set[int]) -> None:
        """Nobody spoke in time: who does not even answer a ping hangs."""
        hanging = sorted(silent - self._alive(silent))
        who = f"party {hanging[0]} hangs" if hanging else "every party is still at work"
        reason = f"no answer within {self._seconds:.4g} s: {who}"
        self.abort(reason)
        raise MPCError(reason, hanging[0] if hanging else None)

    def _alive(self, ranks: set[int]) -> set[int]:
        """Who of these says anything within `PING_SECONDS` of being asked."""
        deadline, alive = time.monotonic() + PING_SECONDS, set[int]()
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                line = self._members[rank].line
                try:
                    line.send({"do": "ping", "number": 0}, (), PING_SECONDS)
                except LineError:
                    continue
                selector.register(line, selectors.EVENT_READ, rank)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    alive.add(key.data)
                    selector.unregister(key.fileobj)
        return alive

    def abort(self, reason: str) -> None:
        """Kill all that are left; nothing more will be asked."""
        self._stopped = self._stopped or reason
        for member in self._members:
            _kill(member)

    def stop(self) -> None:
        """Ask them to end, and see that they do."""
        deadline = time.monotonic() + STOP_SECONDS
        if self._stopped is None:
            self._stopped = "it is over"
            for member in self._members:
                try:
                    member.line.send({"do": "stop", "number": 0}, (), STOP_SECONDS)
                except LineError:  # it is gone, or hangs: killed below
                    continue
            for member in self._members:
                try:
                    member.process.wait(max(0.05, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for member in self._members:
            _kill(member)


def _ending(code: int | None, told: str) -> str:
    if code is None:
        return told
    if code < 0:
        return f"died: killed by {signal.Signals(-code).name}"
    return f"died: exit status {code}"


def _kill(member: Member) -> None:
    """The process and whatever it started; reaped, so that no zombie stays."""
    if member.process.poll() is None:
        os.killpg(member.process.pid, signal.SIGKILL)
    member.process.wait()
    member.line.close()
