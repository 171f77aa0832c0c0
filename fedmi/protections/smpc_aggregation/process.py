"""An aggregator as the server that started it meets it."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, cast

from fedmi.protections.smpc_aggregation import frames
from fedmi.protections.smpc_aggregation.aggregator import HOST
from fedmi.protections.smpc_aggregation.control import TOKEN_BYTES
from fedmi.protections.smpc_aggregation.frames import Frame, FrameError, Kind

START_SECONDS = 60.0
STOP_SECONDS = 5.0
SLACK_BYTES = 2**16


class AggregatorError(RuntimeError):
    """An aggregator died, does not answer or answers what it should not; `rank` says which."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"aggregator {rank} {why}")
        self.rank = rank


@dataclass
class Aggregator:
    """A line to one aggregator. sent_bytes, received_bytes: on it since they were last taken."""

    rank: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    token: bytes
    seconds: float
    port: int = 0
    public_key: bytes = b""
    sent_bytes: int = field(default=0)
    received_bytes: int = field(default=0)

    @classmethod
    def started(cls, rank: int, port: int, seconds: float) -> "Aggregator":
        """Not yet known to listen: see `greet`."""
        log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        token = os.urandom(TOKEN_BYTES)
        command = [
            sys.executable, "-m", "fedmi.protections.smpc_aggregation.aggregator",
            str(port), str(seconds),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `greet` says why
            process.stdin.write(token.hex().encode() + b"\n")
            process.stdin.flush()
        return cls(rank, process, log, token, seconds)

    def greet(self) -> None:
        """Wait until it says where it listens; AggregatorError."""
        said = self._first_line()
        try:
            told = cast(Mapping[str, object], json.loads(said))
            if "error" in told:
                raise AggregatorError(self.rank, f"did not start: {told['error']}")
            self.port = int(str(told["port"]))
            self.public_key = bytes.fromhex(str(told["public"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self.died(f"did not start: it said {said!r}") from error

    def ask(
        self,
        kind: Kind,
        wanted: Kind | tuple[Kind, ...],
        round: int,
        body: bytes = b"",
        *,
        client: int = 0,
        limit: int = SLACK_BYTES,
        counted: bool = True,
    ) -> Frame:
        """One request and its answer, of a kind wanted; AggregatorError."""
        question = Frame(kind, round, client, self.token + body)
        try:
            with socket.create_connection((HOST, self.port), timeout=self.seconds) as line:
                frames.send(line, question)
                answer = frames.receive(line, limit)
        except TimeoutError as error:
            raise self.died(f"did not answer for {self.seconds:g} s") from error
        except OSError as error:
            raise self.died(f"cannot be reached: {error}") from error
        except FrameError as error:
            raise self.died(f"sent garbage: its answer to {kind.name} {error}") from error
        if counted:
            self.sent_bytes += question.wire_bytes
            self.received_bytes += answer.wire_bytes
        if answer.kind == Kind.REFUSED:
            why = answer.body.decode(errors="replace")
            raise AggregatorError(self.rank, f"refuses to {kind.name}: {why}")
        if answer.kind not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise AggregatorError(
                self.rank, f"sent garbage: answered {kind.name} with {answer.kind.name}"
            )
        if (answer.round, answer.client) != (round, client):
            raise AggregatorError(self.rank, f"answered for round {answer.round}, not {round}")
        return answer

    def take_counts(self) -> tuple[int, int]:
        """(received, sent) bytes since the last time."""
        counts = self.received_bytes, self.sent_bytes
        self.received_bytes = self.sent_bytes = 0
        return counts

    def died(self, otherwise: str) -> AggregatorError:
        """What to say of a process that is gone, with its last words; else `otherwise`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0.2)
        status = self.process.poll()
        if status is None:
            return AggregatorError(self.rank, otherwise)
        self.log.seek(0)
        last = self.log.read()[-500:].decode(errors="replace").strip().splitlines()[-1:]
        words = f": {last[0]}" if last else ""
        return AggregatorError(self.rank, f"died (status {status}){words}")

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.wait(timeout=STOP_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written is lost with it
                    pipe.close()

    def _first_line(self) -> bytes:
        """What it says first; AggregatorError where it says nothing."""
        assert self.process.stdout is not None
        deadline, said = time.monotonic() + START_SECONDS, b""
        descriptor = self.process.stdout.fileno()
        while not said.endswith(b"\n"):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([descriptor], [], [], max(0.0, left))
            if not ready:
                raise AggregatorError(self.rank, f"did not start within {START_SECONDS:g} s")
            part = os.read(descriptor, 4096)
            if not part:
                raise self.died("did not start: it said nothing")
            said += part
        return said
