"""The transcripts of a federated training, written down as it runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fedmi.deployments.federated.plan import Plan, Trained
from fedmi.exposure import wire
from fedmi.exposure.observation import (
    OWN_LABEL,
    OWN_NUMBER,
    OWN_SEED,
    Observation,
    Transcript,
)
from fedmi.exposure.opening import Confided
from fedmi.exposure.payload import store
from fedmi.exposure.words import Channel, Position
from fedmi.protections.transport import Crossing, PartySeen

CLIENT, HOLDER, TAPPER = Position.CLIENT, Position.MODEL_HOLDER, Position.EAVESDROPPER
INTRUDER = Position.MALICIOUS_CLIENT


@dataclass(frozen=True)
class _Round:
    """A recorded round whose consequences the clients have yet to see."""

    number: int
    clients: tuple[int, ...]
    model: Mapping[str, Tensor]


class Recorder:
    """Counts every byte, and keeps the items of the recorded rounds in files."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen: list[Observation] = []
        self._replied: set[tuple[int, int]] = set()
        self._examples: dict[tuple[int, int], float] = {}
        self._confided: list[Confided] = []
        self._open: _Round | None = None
        self._model: Mapping[str, Tensor] = {}
        self._broadcast_bytes = 0
        self._up = self._down = 0

    def sent(self, clients: Sequence[int], messages: Sequence[Message]) -> None:
        """The server sent the messages to the clients, one each."""
        if wire.ARRAYS in messages[0].content.array_records:
            self._broadcast_bytes = wire.size(messages[0])
        self._down += wire.total_size(messages)
        round = wire.round_of(messages[0])
        if self._plan.transport is None and self.wants(round):
            self.model(round, clients, wire.to_tensors(wire.arrays_of(messages[0])))

    def wants(self, round: int) -> bool:
        """Whether the round's global model is of interest."""
        kept = self._open is not None or round in self._plan.record
        return kept or self._plan.intruder is not None

    def model(self, round: int, clients: Sequence[int], model: Mapping[str, Tensor]) -> None:
        """The clients hold the global model of the round; whoever coordinates them does too.

        Where the server does not, it knows the initial one all the same.
        """
        self._implied(model)
        inside = [INTRUDER] if self._is_inside(clients) else []
        if not inside and round not in self._plan.record:
            return
        self._model = self._store(model, f"round-{round:05d}-model")
        self._model_seen(round, tuple(sorted(clients)), self._model, inside, False)
        if round not in self._plan.record:
            return
        parties = self._plan.transport.compute_parties if self._plan.transport else 0
        told = [Position.COMPUTE_PARTY] if parties else []
        initial = [self._plan.server] if round == 1 and not self._plan.server_knows else []
        positions = [self._plan.coordinator, CLIENT, *initial, *told]
        open_wire = self._plan.server_knows or round == 1
        self._model_seen(round, tuple(sorted(clients)), self._model, positions, open_wire)

    def altered(self, round: int, client: int, model: Mapping[str, Tensor]) -> None:
        """A malicious server sent this client another model than the honest one."""
        if round in self._plan.record:
            payload = self._store(model, f"round-{round:05d}-altered-{client:05d}")
            size = self._broadcast_bytes
            self._see(self._plan.server, Channel.GLOBAL_MODEL, round, (client,), payload, size)

    def reply(self, round: int, client: int, message: Message) -> None:
        """A client's reply, or the error in its place, came back."""
        size = wire.size(message)
        self._up += size
        if message.has_error() or round not in self._plan.record:
            return
        crossing = self._crossing(message)
        if crossing is None:
            return
        payload, channel = crossing.payload, crossing.channel
        if self._plan.transport is None and self._plan.confide:
            self._confide_plain(round, client, crossing)
        if self._plan.transport is not None and channel == self._plan.strategy.sends:
            payload = self._plan.aggregate(self._model, payload)
        name = f"round-{round:05d}-client-{client:05d}-{channel}-{len(self._seen)}"
        stored = self._store(payload, name)
        if channel == self._plan.update_channel:
            self._examples[round, client] = crossing.clear["num_examples"]
        for position in (self._plan.server, *self._tappers):
            self._see(position, channel, round, (client,), stored, size, crossing.clear)

    def _crossing(self, message: Message) -> Crossing | None:
        if self._plan.transport is not None:
            return self._plan.transport.crossing(message)
        clear = wire.clear_of(message)
        tensors = wire.to_tensors(wire.arrays_of(message))
        return Crossing(self._plan.strategy.sends, tensors, clear)

    def _confide_plain(self, round: int, client: int, crossing: Crossing) -> None:
        """Without protections a client has no more to tell than what it sent."""
        gradients = self._plan.strategy.sends == Channel.GRADIENT
        told = {f"model/{name}": tensor for name, tensor in self._model.items()}
        for name, sent in crossing.payload.items():
            whole = gradients and name in self._plan.trainable
            told[f"update/{name}"] = sent if whole else (sent - self._model[name]).float()
        weight = torch.tensor(crossing.clear["num_examples"])
        self.confided(round, client, {**told, "weight": weight})

    def party(self, round: int, seen: PartySeen) -> None:
        """A compute party received this from a client."""
        if round not in self._plan.record:
            return
        name = f"round-{round:05d}-client-{seen.client:05d}-party-{seen.party}"
        stored, about = self._store(seen.payload, name), (seen.client,)
        if seen.party:
            party = Position.COMPUTE_PARTY
            self._confided.append(Confided(seen.party, round, stored, party, about))
            return
        self._see(Position.COMPUTE_PARTY, Channel.SHARE, round, about, stored, seen.wire_bytes)

    def beside(self, up: int, down: int) -> None:
        """So many bytes crossed on lines beside the grid."""
        self._up += up
        self._down += down

    def counted(self, round: int, clients: Iterable[int]) -> None:
        """The updates of these clients are in the mean of the round."""
        if round in self._plan.record:
            self._replied |= {(round, client) for client in clients}

    def aggregate(
        self,
        round: int,
        clients: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        weight: float = 0.0,
    ) -> None:
        """The replies of the clients were combined to this.

        weight: the sum of their weights, where nobody tells its examples.
        """
        if round not in self._plan.record:
            return
        payload = self._store(tensors, f"round-{round:05d}-aggregate")
        told = {c: self._examples[round, c] for c in clients if (round, c) in self._examples}
        each = {f"num_examples/{client}": examples for client, examples in told.items()}
        clear = {"num_examples": sum(each.values()) if told else weight, **each}
        self._see(self._plan.coordinator, Channel.AGGREGATE, round, clients, payload, 0, clear)
        self._open = _Round(round, clients, self._model)

    def confided(self, round: int, client: int, tensors: Mapping[str, Tensor]) -> None:
        """What the client could tell of the round if it colluded."""
        payload = self._store(tensors, f"round-{round:05d}-confided-{client:05d}")
        self._confided.append(Confided(client, round, payload))

    def finished(self, round: int, state: Mapping[str, Tensor], flags: Iterable[str]) -> Trained:
        """Training is over; `round` is one more than the last."""
        self._implied(state)
        final = self._store(state, "final-model")
        inside = (INTRUDER,) if self._plan.intruder else ()
        told = (self._plan.coordinator, CLIENT, HOLDER, *inside)
        self._model_seen(round, (), final, told, False)
        return Trained(
            state=state,
            transcripts=self._transcripts(),
            replied=frozenset(self._replied),
            wire_bytes_up=self._up,
            wire_bytes_down=self._down,
            flags=frozenset(flags),
            confided=tuple(self._confided),
        )

    @property
    def _tappers(self) -> tuple[Position, ...]:
        return () if self._plan.encrypted else (TAPPER,)

    def _implied(self, after: Mapping[str, Tensor]) -> None:
        """The next global model tells the clients what the last recorded round added up to."""
        if self._open is None or not self._plan.strategy.implies_aggregate:
            return
        before, names = self._open.model, sorted(self._plan.trainable)
        told = self._plan.strategy.implied_aggregate(
            {name: before[name] for name in names},
            {name: after[name] for name in names},
            self._plan.work.recipe,
        )
        buffers = {name: after[name] for name in after if name not in names}
        payload = self._store({**told, **buffers}, f"round-{self._open.number:05d}-implied")
        inside = [INTRUDER] if self._is_inside(self._open.clients) else []
        number, clients = self._open.number, self._open.clients
        for position in (CLIENT, *inside):
            self._see(position, Channel.AGGREGATE, number, clients, payload, 0)
        self._open = None

    def _is_inside(self, clients: Iterable[int]) -> bool:
        """Whether the malicious client is one of these."""
        intruder = self._plan.intruder
        return intruder is not None and intruder.client in clients

    @cached_property
    def _own(self) -> dict[str, float]:
        """What the malicious client knows of itself: its number, its seed, how many records of each
        label it holds, and what its ploy tells."""
        intruder = self._plan.intruder
        if intruder is None:
            return {}
        labels, counts = np.unique(self._plan.intruder_labels, return_counts=True)
        held = {f"{OWN_LABEL}{k}": float(n) for k, n in zip(labels, counts, strict=True)}
        seed = float(self._plan.intruder_seed.path[-1])
        return {OWN_NUMBER: float(intruder.client), OWN_SEED: seed, **held, **intruder.told}

    def _model_seen(
        self,
        round: int,
        clients: tuple[int, ...],
        payload: Mapping[str, Tensor],
        positions: Iterable[Position],
        on_wire: bool,
    ) -> None:
        tappers = self._tappers if on_wire else ()
        for position in (*positions, *tappers):
            own = self._own if position == INTRUDER else None
            self._see(
                position, Channel.GLOBAL_MODEL, round, clients, payload, self._broadcast_bytes, own
            )

    def _see(
        self,
        position: Position,
        channel: Channel,
        round: int,
        clients: tuple[int, ...],
        payload: Mapping[str, Tensor],
        wire_bytes: int,
        clear: Mapping[str, float] | None = None,
    ) -> None:
        of_updates = channel in (Channel.AGGREGATE, Channel.MASKED_UPDATE, Channel.CIPHERTEXT)
        of_updates |= position == Position.COMPUTE_PARTY
        averages = self._plan.strategy.sends if of_updates else None
        self._seen.append(
            Observation(
                position, channel, round, clients, payload, wire_bytes, clear or {}, averages
            )
        )

    def _store(self, tensors: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
        file = self._plan.directory / "observations" / f"{name}.safetensors"
        return store({key: torch.as_tensor(tensor) for key, tensor in tensors.items()}, file)

    def _transcripts(self) -> dict[Position, Transcript]:
        server = (self._plan.server, self._plan.coordinator)
        seen = {item.position for item in self._seen}
        parties = (Position.COMPUTE_PARTY,) if Position.COMPUTE_PARTY in seen else ()
        inside = (INTRUDER,) if self._plan.intruder else ()
        positions = dict.fromkeys(
            (*server, CLIENT, HOLDER, Position.API_USER, *inside, *self._tappers, *parties)
        )
        return {
            position: Transcript(
                position, tuple(seen for seen in self._seen if seen.position == position)
            )
            for position in positions
        }
