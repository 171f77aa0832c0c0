"""Observations and transcripts: exactly what one position saw, in order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedmi.exposure.device import Device
from fedmi.exposure.service import Service
from fedmi.exposure.words import Channel, Position

OWN_NUMBER, OWN_SEED, OWN_LABEL = "own/client", "own/seed", "own/records/"
"""Beside the global models of a malicious client: which client it is, its own seed, and, with a
label behind, how many records of that label it holds."""


@dataclass(frozen=True)
class Observation:
    """One recorded item on one channel.

    `round` counts from 1. For `global_model`, round r is the model broadcast at the start of
    round r; the finished model has round R + 1. `payload` holds named tensors: the parameters
    that crossed (a state dict), or the gradient by parameter name on channel `gradient`.
    `clear` holds the scalars that travelled in clear beside it (num_examples, metrics); for an
    aggregate, num_examples is the sum and num_examples/CLIENT a client's own, where known. With
    own/ before its name it never travelled: what the observer knows of itself.
    `averages`: for an aggregate, the channel of the items it is the mean of.
    """

    position: Position
    channel: Channel
    round: int
    clients: tuple[int, ...]
    payload: Mapping[str, Tensor]
    wire_bytes: int
    clear: Mapping[str, float] = field(default_factory=dict)
    averages: Channel | None = None

    @property
    def is_gradient(self) -> bool:
        """Whether the payload is a gradient, of one client or averaged; else parameters."""
        return Channel.GRADIENT in (self.channel, self.averages)


@dataclass(frozen=True)
class Transcript:
    """All that one position saw. `service` is the door of an answering model, and `device` one
    that holds the model, where it has them."""

    position: Position
    observations: tuple[Observation, ...] = ()
    service: Service | None = None
    device: Device | None = None

    @property
    def own(self) -> Mapping[str, float]:
        """What the observer knows of itself, by the names above; empty where it told nothing."""
        told = (seen.clear for seen in self.observations if OWN_NUMBER in seen.clear)
        return next(told, {})

    def on(self, channel: Channel, rounds: Iterable[int] | None = None) -> tuple[Observation, ...]:
        """The observations on one channel, in order; of the given rounds only, if given."""
        wanted = None if rounds is None else set(rounds)
        return tuple(
            seen
            for seen in self.observations
            if seen.channel == channel and (wanted is None or seen.round in wanted)
        )

    def global_model(self, round: int) -> Mapping[str, Tensor]:
        """The model broadcast at the start of `round`; LookupError if this position missed it."""
        for seen in self.on(Channel.GLOBAL_MODEL, [round]):
            return seen.payload
        raise LookupError(f"{self.position} did not see the global model of round {round}")

    def model_sent(self, round: int, client: int) -> Mapping[str, Tensor]:
        """What `client` was sent at the start of `round`: another model than the honest one, if a
        malicious server gave it one. LookupError if this position missed it."""
        honest = self.global_model(round)
        own = [
            seen.payload
            for seen in self.on(Channel.GLOBAL_MODEL, [round])
            if seen.clients == (client,) and seen.payload is not honest
        ]
        return own[-1] if own else honest

    def final_model(self) -> Mapping[str, Tensor]:
        """The latest global model this position saw."""
        seen = self.on(Channel.GLOBAL_MODEL)
        if not seen:
            raise LookupError(f"{self.position} saw no global model")
        return max(seen, key=lambda item: item.round).payload

    def update(self, seen: Observation) -> dict[str, Tensor]:
        """What `seen` adds to the global model of its round: local - global, by parameter name."""
        base = self.global_model(seen.round)
        return {name: seen.payload[name] - base[name] for name in seen.payload}
