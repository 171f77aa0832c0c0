"""How shares that compute parties hold are opened by those that collude, the dealer among them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.payload import in_memory
from fedmi.exposure.words import Position
from fedmi.mpc.dealer.collusion import records_multiplied
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import as_ring, combine, decode

RECORDED = 0
"""Rank of the party whose transcript is that of `compute_party`."""
MODEL, MESSAGE, REQUEST = "model/", "message/", "request/"
RECORDS = ("inputs", "labels")
Held = Mapping[int, Mapping[str, Tensor]]
"""By rank, what a party holds of an item, by name."""


def is_shared(name: str) -> bool:
    """Whether a tensor of this name holds ring elements [..., k] of a fixed-point number each."""
    return name in RECORDS or name.startswith(MODEL)


@dataclass(frozen=True)
class Opening:
    """Adds up what party 0 saw of an item and what colluding parties hold of the same one.

    An item is the same if its round and the clients it is about are. Opened are "inputs" and
    "labels" [n, classes] of an owner, or "model/NAME" of a model, as float64, exact up to
    2^-fraction_bits. Anything else (messages, another transport's shares) opens nothing.

    An item of the dealer, said to be about an owner, is opened with what parties tell: "inputs" of
    the records that were multiplied while one of them recorded, `support` says which; with all
    parties, everything.
    """

    scheme: Scheme

    def __call__(
        self, seen: Observation, transcript: Transcript, told: Sequence[Confided]
    ) -> Opened | None:
        """None if the parties together are below the threshold; ValueError, naming the tensor, if
        they hold different numbers as the same share."""
        held = {item.client: item.tensors for item in told if _same_item(item, seen)}
        if seen.position == Position.DEALER:
            return self._open(RECORDS, held) or self._with_dealer(seen, held, told)
        names = [name for name in seen.payload if is_shared(name)]
        if seen.position != Position.COMPUTE_PARTY:
            return None
        return self._open(names, {**held, RECORDED: seen.payload})

    def _open(self, names: Sequence[str], held: Held) -> Opened | None:
        found: dict[str, Tensor] = {}
        for name in names:
            opened = self._open_one(name, held)
            if opened is None:
                return None
            found[name] = opened
        return Opened(found) if found else None

    def _open_one(self, name: str, held: Held) -> Tensor | None:
        parts = {rank: tensors[name].numpy() for rank, tensors in held.items() if name in tensors}
        try:
            ring = combine(parts, self.scheme)
        except ValueError as error:
            raise ValueError(f"shares of '{name}': {error}") from None
        return None if ring is None else torch.from_numpy(decode(ring, self.scheme.fraction_bits))

    def _with_dealer(
        self, seen: Observation, held: Held, told: Sequence[Confided]
    ) -> Opened | None:
        """With the first party that holds shares of the records; more of them add nothing."""
        rank = next((rank for rank, tensors in held.items() if "inputs" in tensors), None)
        if rank is None:
            return None
        own = as_ring(held[rank]["inputs"].numpy())[..., 0]
        received = [
            heard for item in told if item.client == rank and not item.about for heard in _of(item)
        ]
        dealt = [
            json.loads(text.numpy().tobytes())
            for name, text in sorted(in_memory(seen.payload).items())
            if name.startswith(REQUEST)
        ]
        bits = self.scheme.fraction_bits
        ring, known = records_multiplied(dealt, received, own.reshape(len(own), -1), bits)
        inputs = torch.from_numpy(decode(ring.reshape(own.shape), bits))
        seen_of = torch.from_numpy(known).reshape(-1, *[1] * (own.ndim - 1))
        return Opened({"inputs": inputs}, {"inputs": seen_of.expand_as(inputs)})


@dataclass(frozen=True)
class _Heard:
    sender: int
    value: bytes


def _of(item: Confided) -> Iterator[_Heard]:
    """The messages among what a party tells, in order of arrival."""
    for name, value in sorted(in_memory(item.tensors).items()):
        if name.startswith(MESSAGE):
            yield _Heard(int(name.split("/")[2]), value.numpy().tobytes())


def _same_item(item: Confided, seen: Observation) -> bool:
    return (
        item.position == Position.COMPUTE_PARTY
        and item.round == seen.round
        and item.about == seen.clients
    )
