"""What the engine itself counts, read from its log.

With `enable_pphlo_profile` SPU logs after every execution how many bytes and messages its link sent
and received meanwhile. Bytes are those of the values, without keys and framing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_DETAILS = re.compile(
    rb"Link details: total send bytes (\d+), recv bytes (\d+), "
    rb"send actions (\d+), recv actions (\d+)"
)


@dataclass(frozen=True)
class Counters:
    """Sums over executions; bytes of values."""

    executions: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    sends: int = 0
    receives: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(
            self.executions + other.executions,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.sends + other.sends,
            self.receives + other.receives,
        )


def read_counters(log: bytes) -> Counters:
    """The sum of the executions that a piece of the log tells of."""
    found = [Counters(1, *map(int, match)) for match in _DETAILS.findall(log)]
    return sum(found, start=Counters())


class EngineLog:
    """A log that the engine goes on writing: each call reads what came since the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._total = Counters()

    def counters(self) -> Counters:
        """Since the log was opened. Whole lines only: what is half written is for the next call."""
        if not self._path.exists():
            return self._total
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._read:  # the engine began a new file
                self._read = 0
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        self._total += read_counters(whole)
        return self._total
