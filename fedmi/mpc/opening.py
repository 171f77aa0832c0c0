"""How shares that compute parties hold are opened by those of them that collude."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.words import Position
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import combine, decode

RECORDED = 0
"""Rank of the party whose transcript is that of `compute_party`."""
MODEL = "model/"
RECORDS = ("inputs", "labels")


def is_shared(name: str) -> bool:
    """Whether a tensor of this name holds ring elements [..., k] of a fixed-point number each."""
    return name in RECORDS or name.startswith(MODEL)


@dataclass(frozen=True)
class Opening:
    """Adds up what party 0 saw of an item and what colluding parties hold of the same one.

    An item is the same if its round and the clients it is about are. Opened are "inputs" and
    "labels" [n, classes] of an owner, or "model/NAME" of a model, as float64, exact up to
    2^-fraction_bits. Anything else (messages, another transport's shares) opens nothing.
    """

    scheme: Scheme

    def __call__(
        self, seen: Observation, transcript: Transcript, told: Sequence[Confided]
    ) -> Opened | None:
        """None if the parties together are below the threshold; ValueError, naming the tensor, if
        they hold different numbers as the same share."""
        names = [name for name in seen.payload if is_shared(name)]
        if seen.position != Position.COMPUTE_PARTY or not names:
            return None
        held = {item.client: item.tensors for item in told if _same_item(item, seen)}
        found: dict[str, Tensor] = {}
        for name in names:
            opened = self._open(name, {**held, RECORDED: seen.payload})
            if opened is None:
                return None
            found[name] = opened
        return Opened(found)

    def _open(self, name: str, held: Mapping[int, Mapping[str, Tensor]]) -> Tensor | None:
        parts = {rank: tensors[name].numpy() for rank, tensors in held.items() if name in tensors}
        try:
            ring = combine(parts, self.scheme)
        except ValueError as error:
            raise ValueError(f"shares of '{name}': {error}") from None
        return None if ring is None else torch.from_numpy(decode(ring, self.scheme.fraction_bits))


def _same_item(item: Confided, seen: Observation) -> bool:
    return (
        item.position == Position.COMPUTE_PARTY
        and item.round == seen.round
        and item.about == seen.clients
    )
