"""What the parties of an MPC training received, as observations; the other parties' as confided.

The transcript of position `compute_party` is that of the party of rank 0. An owner's records are
of round 1, and so are the initial model, the messages by which the parties were connected, those of
the recorded steps and what the dealer sent meanwhile; the finished model is of round 2. With every
step recorded this is all that the party received. Left out is framing, and the guard's number after
each epoch: the parties send it to the receiver of the output, who learns from it that nothing
overflowed and is not given it again as an observation.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided
from fedmi.exposure.payload import store, total_bytes
from fedmi.exposure.words import Channel, Position
from fedmi.mpc.cluster import Message, Shares
from fedmi.mpc.uniformity import p_value

PARTY, DEALER, HOLDER = Position.COMPUTE_PARTY, Position.DEALER, Position.MODEL_HOLDER
TRAINING, FINISHED = 1, 2
"""Rounds: the only one of the training, and the one after it."""
MESSAGE, HANDSHAKE, ANSWER = "message", "handshake", "answer"
"""What the names of received bytes begin with."""

Payload = Mapping[str, Tensor]


class Recorder:
    """Collects what each party got; the tensors lie in files below `directory`."""

    def __init__(self, directory: Path, confide: bool, masked: bool = True) -> None:
        """confide: whether to keep what the parties of rank 1 and above hold. masked: whether their
        messages are uniform like shares; those of lattice encryption and oblivious transfer hide
        what they carry by a computational assumption, and have headers and padding."""
        self._directory = directory
        self._confide = confide
        self._masked = masked
        self._seen: list[Observation] = []
        self._confided: list[Confided] = []
        self._p_values: list[float] = []

    def shares(
        self,
        round: int,
        owners: tuple[int, ...],
        held: Mapping[str, Sequence[Shares]],
        *,
        crossed: bool = True,
    ) -> None:
        """Each party's share of one item: name -> by rank [..., elements].

        owners: whose item it is; empty for what belongs to nobody, such as the model. crossed:
        whether it was sent to the parties, not computed by them.
        """
        ranks = range(len(next(iter(held.values()))))
        payloads = [{name: signed(by_rank[r]) for name, by_rank in held.items()} for r in ranks]
        self._parties(round, owners, payloads, uniform=True, crossed=crossed)

    def messages(self, received: Sequence[Sequence[Message]]) -> None:
        """The recorded messages of each party, by rank, in order of arrival."""
        self._received(MESSAGE, received, uniform=self._masked)

    def handshakes(self, received: Sequence[Sequence[Message]]) -> None:
        """What the parties told each other when they were connected."""
        self._received(HANDSHAKE, received, uniform=False)

    def answered(self, received: Sequence[Sequence[Message]]) -> None:
        """What the dealer sent each party, with framing."""
        self._received(ANSWER, received, uniform=False)

    def dealt(self, requests: Sequence[Mapping[str, object]]) -> None:
        """What the dealer saw; request by request, as JSON."""
        if not requests:
            return
        payload = {
            f"request/{number:06d}": raw(json.dumps(one, sort_keys=True, default=_text).encode())
            for number, one in enumerate(requests)
        }
        self._see(DEALER, Channel.SHARE, TRAINING, (), payload, "dealer")

    def opened(self, state: Mapping[str, Tensor]) -> None:
        """The receiver of the output got the model."""
        self._see(HOLDER, Channel.GLOBAL_MODEL, FINISHED, (), state, "final-model")

    def transcripts(self, positions: Iterable[Position]) -> dict[Position, Transcript]:
        """All that each position saw, in order; empty for one that saw nothing."""
        return {
            position: Transcript(
                position, tuple(seen for seen in self._seen if seen.position == position)
            )
            for position in positions
        }

    @property
    def confided(self) -> tuple[Confided, ...]:
        return tuple(self._confided)

    @property
    def uniformity(self) -> float:
        """p-value of all that must be uniform being so (Bonferroni over items and parties)."""
        return min(1.0, len(self._p_values) * min(self._p_values, default=1.0))

    def _received(self, kind: str, received: Sequence[Sequence[Message]], *, uniform: bool) -> None:
        if any(received):
            payloads = [named_messages(kind, of_party) for of_party in received]
            self._parties(TRAINING, (), payloads, uniform=uniform)

    def _parties(
        self,
        round: int,
        owners: tuple[int, ...],
        by_rank: Sequence[Payload],
        *,
        uniform: bool,
        crossed: bool = True,
    ) -> None:
        """uniform: whether all of it must be, which is then tested."""
        self._p_values += map(p_value, by_rank if uniform else ())
        item = f"{len(self._seen):04d}"
        name = f"{item}-party-0"
        self._see(PARTY, Channel.SHARE, round, owners, by_rank[0], name, crossed=crossed)
        if not self._confide:
            return
        for rank, payload in enumerate(by_rank[1:], start=1):
            stored = self._store(payload, f"{item}-party-{rank}")
            self._confided.append(Confided(rank, round, stored, PARTY, owners))

    def _see(
        self,
        position: Position,
        channel: Channel,
        round: int,
        owners: tuple[int, ...],
        payload: Payload,
        name: str,
        *,
        crossed: bool = True,
    ) -> None:
        stored, size = self._store(payload, name), total_bytes(payload) if crossed else 0
        self._seen.append(Observation(position, channel, round, owners, stored, size))

    def _store(self, payload: Payload, name: str) -> Payload:
        return store(payload, self._directory / "observations" / f"{name}.safetensors")


def signed(shares: Shares) -> Tensor:
    """Ring elements of Z_2^64 as int64, bit for bit."""
    return torch.from_numpy(np.ascontiguousarray(shares).view(np.int64).copy())


def raw(value: bytes) -> Tensor:
    """Bytes as uint8 [m]."""
    return torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy())


def named_messages(kind: str, received: Sequence[Message]) -> dict[str, Tensor]:
    """KIND/NUMBER/SENDER/KEY -> uint8 [m], numbered in order of arrival."""
    return {
        f"{kind}/{number:06d}/{message.sender}/{message.key}": raw(message.value)
        for number, message in enumerate(received)
    }


def _text(value: object) -> str:
    """JSON has no bytes; anything else that it does not know is an error."""
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a request to the dealer holds {type(value).__name__}; bytes, text or numbers")
