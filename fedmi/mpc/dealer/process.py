"""The dealer as its caller sees it: a process that is started, asked for its log, and stopped."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedmi.mpc.errors import MPCError

START_SECONDS = 20.0
STOP_SECONDS = 2.0


@dataclass(frozen=True)
class DealerConfig:
    """The engine's options for it, by the engine's names; dict(config) gives them by name.

    server_host: HOST:PORT. server_public_key: PEM. adjust_rank: which party asks, and adds what it
    is told to its shares.
    """

    server_host: str
    server_public_key: str
    asym_crypto_schema: str = "sm2"
    transport_protocol: str = "http"
    adjust_rank: int = 0

    def __iter__(self) -> Iterator[tuple[str, object]]:
        return iter(asdict(self).items())


class Dealer:
    """Starts the dealer; use as a context manager."""

    def __init__(self, directory: Path | None = None, port: int = 0) -> None:
        """directory: for its log; a temporary one by default. port: on loopback; 0 = a free one."""
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port = {port}: must be 0 (a free one) to 65535")
        self._directory = directory
        self._port = port
        self._stack = ExitStack()
        self._config: DealerConfig | None = None
        self._log: Path | None = None
        self._seen: tuple[Mapping[str, object], ...] = ()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = self._directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            directory.mkdir(parents=True, exist_ok=True)
            self._log = directory / "dealer.jsonl"
            self._log.unlink(missing_ok=True)
            complaints = directory / "dealer.out"
            process = _start(self._port, self._log, complaints)
            stack.callback(_stop, process)
            self._config = _greeted(process, self._port, complaints)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seen, self._log = self.log(), None
        self._stack.close()

    def config(self) -> DealerConfig:
        """MPCError before it has been started."""
        if self._config is None:
            raise MPCError("the dealer has not been started; use `with Dealer(...) as dealer`")
        return self._config

    def log(self) -> tuple[Mapping[str, object], ...]:
        """Aside: request by request what it saw; nothing else reaches it.

        operation, field_size (bytes of an element), shape ((m, n, k) of a matrix product), bits (of
        a truncation), inputs (each with prg_count, buffer_len, transposed, and the seeds of all
        parties as hex), bytes_in and bytes_out (of the bodies); or error and bytes_in of a request
        that it refused.
        """
        if self._log is None or not self._log.exists():
            return self._seen
        with self._log.open(encoding="utf-8") as lines:
            return tuple(json.loads(line) for line in lines if line.endswith("\n"))


def _start(port: int, log: Path, complaints: Path) -> "subprocess.Popen[bytes]":
    home = str(Path(__file__).resolve().parents[3])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    with complaints.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmi.mpc.dealer.server", str(port), str(log.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )


def _greeted(process: "subprocess.Popen[bytes]", port: int, complaints: Path) -> DealerConfig:
    """Where it listens and its key; MPCError with its last words where it does not start."""
    stdout = process.stdout
    if stdout is None or not select.select([stdout], [], [], START_SECONDS)[0]:
        raise MPCError(f"the dealer did not start within {START_SECONDS:.0f} s")
    line = stdout.readline()
    if not line:
        process.wait(STOP_SECONDS)
        told = complaints.read_text(errors="replace").strip().splitlines() or ["no reason given"]
        raise MPCError(f"the dealer did not start on port {port or 'any'}: {told[-1]}")
    greeting = json.loads(line)
    return DealerConfig(f"127.0.0.1:{greeting['port']}", greeting["public_key"])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close its standard input, and see that it ends."""
    for end in (process.stdin, process.stdout):
        if end is not None:
            end.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
