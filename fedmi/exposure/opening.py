"""How a sealed update is opened by whoever holds the keys, and what colluders tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.words import Position


@dataclass(frozen=True)
class Confided:
    """What one colluding client, or compute party, tells of one round.

    tensors: `update/NAME` the change or gradient it contributed, `weight` its weight in the mean,
    `model/NAME` the global model it was given, `secret/NAME` keys, seeds and shares it holds.
    Of a compute party, `client` is its rank, `about` the clients of the item that the party holds
    its own part of, and the tensors are named as in that item.
    """

    client: int
    round: int
    tensors: Mapping[str, Tensor]
    position: Position = Position.CLIENT
    about: tuple[int, ...] = ()

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix/`, by the rest of their name."""
        start = f"{prefix}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


@dataclass(frozen=True)
class Opened:
    """An update in clear: by name the change of the state (local - global), or the gradient.

    support: by name, a boolean mask of the entries that were seen; None = all of them.
    """

    tensors: Mapping[str, Tensor]
    support: Mapping[str, Tensor] | None = None


class Opener(Protocol):
    """The public algorithm by which sealed items are opened; all secrets come as arguments."""

    def __call__(
        self, seen: Observation, transcript: Transcript, told: Sequence[Confided]
    ) -> Opened | None:
        """The update of the client behind `seen`, or None if this does not suffice for it."""
        ...
