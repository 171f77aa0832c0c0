"""The compute parties of one computation, each a process of its own, and the lines to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedmi.mpc.program import Program
from fedmi.mpc.scheme import Scheme

Shares = NDArray[np.uint64]
"""One party's share of an array: [..., scheme.elements] ring elements."""


@dataclass(frozen=True)
class Message:
    """What one party received from another: `value` as it came, `key` as the engine names it."""

    sender: int
    key: str
    value: bytes


@dataclass(frozen=True)
class Traffic:
    """Of one party since the start.

    input_bytes: shares from owners. received_bytes: payload of messages from other parties, as its
    relay counted. wire_bytes: the same with framing. engine_bytes: what the engine says the party
    received. messages: how many. rounds: how often it had to wait for another party's message.
    dealer_bytes: what it exchanged with the dealer.
    """

    input_bytes: int
    received_bytes: int
    wire_bytes: int
    engine_bytes: int
    messages: int
    rounds: int
    dealer_bytes: int = 0


class Cluster:
    """Starts the parties, gives them shares and programs, and gathers what is opened.

    Use as a context manager. The caller stands for owners (`share`), for whoever says which public
    program is next (`run`), and for the receiver of an output (`open`); and it has the simulator's own
    line to what each party holds (`held`, `received`), which no party of the deployment has.
    Every method raises MPCError, naming the party, when one has died, sent garbage or does not
    answer within `timeout_seconds`; the others are stopped then.
    """

    def __init__(
        self, scheme: Scheme, directory: Path, *, timeout_seconds: float = 120.0, record: bool = True
    ) -> None:
        """directory: for logs and recorded messages. record: whether messages can be kept."""
        raise NotImplementedError

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def share(self, name: str, values: NDArray[np.float32]) -> None:
        """An owner splits the array by a cryptographic generator and sends each party its share."""

    def select(self, name: str, parts: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Each party, on its own: `name` becomes these rows of these shared variables, one after
        another. Which rows is public."""

    def load(self, program: Program) -> None:
        """Give all parties the program, once."""

    def run(
        self,
        program: Program,
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        *,
        record: bool = False,
    ) -> float:
        """All parties run it on shared variables (default: by the program's own names); seconds.

        record: keep the messages of this run, for `received`.
        """

    def open(self, name: str) -> NDArray[np.float32]:
        """All parties send their shares to the receiver, who adds them up."""

    def delete(self, names: Sequence[str]) -> None:
        """Forget shared variables."""

    def held(self, name: str) -> list[Shares]:
        """Aside: each party's share of the variable, by rank."""

    def received(self) -> list[tuple[Message, ...]]:
        """Aside: the recorded messages of each party, by rank, in order of arrival."""

    def dealt(self) -> tuple[Mapping[str, object], ...]:
        """Aside: what the dealer saw, request by request; empty where there is none."""

    def traffic(self) -> list[Traffic]:
        """By rank."""
