"""What server and clients agree on before the first round."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from fedmi.data.records import Ints, Records
from fedmi.deployments.base import Noticed, Planted, loaded
from fedmi.deployments.federated.detectors.base import Detector
from fedmi.deployments.federated.intruders.base import Intruder
from fedmi.deployments.federated.malice.base import Malice
from fedmi.deployments.federated.schedule import Schedule
from fedmi.deployments.federated.strategies.base import StrategySpec
from fedmi.exposure import wire
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.observation import Transcript
from fedmi.exposure.opening import Confided
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.models.base import ModelSpec
from fedmi.protections.base import Setting, TrainingProtection
from fedmi.protections.clear import Clear
from fedmi.protections.transport import Transport
from fedmi.training.local import Learner, Plain


@dataclass(frozen=True)
class Plan:
    """One federated training.

    private: all private records; a client reads those of its part only. setting: what protections
    are told. record: the rounds whose items are kept, in files below `directory`. confide: whether
    clients are asked, aside, what they could tell as colluders in those rounds.
    min_clients: replies a round needs to go on without those that failed; 0 = any failure fails
    the round. skip_failed: a failed round leaves the model as it is; else it ends the training.
    planted: an audit's canaries. malice: what a malicious server does to the models it sends.
    server: who runs it. pinned: name -> shape of the only tensors clients take for a model; None =
    they take what they are sent. public: the adversary's own records. agreed: name -> shape of the
    architecture that all agreed on; detectors: what every client measures of what it is sent.
    intruder: what a malicious client does. start: the initial state
    of the agreed architecture; None = drawn from model_seed.
    encrypted: nobody but server and clients reads the messages.
    """

    name: str
    schedule: Schedule
    strategy: StrategySpec
    model: ModelSpec
    model_seed: Seed
    classes: int
    private: Records
    setting: Setting
    min_clients: int
    skip_failed: bool
    malice: Malice | None
    server: Position
    pinned: Mapping[str, tuple[int, ...]] | None
    public: Records
    encrypted: bool
    record: frozenset[int]
    confide: bool
    planted: Planted
    directory: Path
    agreed: Mapping[str, tuple[int, ...]]
    detectors: tuple[Detector, ...] = ()
    intruder: Intruder | None = None
    start: Mapping[str, Tensor] | None = None
    refusal: str = ""
    """Why clients refused what the server wanted at first."""

    @property
    def work(self) -> LocalWork:
        return self.schedule.work

    def build(self) -> nn.Module:
        """The initial global model, the caller's to train."""
        return deepcopy(self._initial)

    @cached_property
    def scratch(self) -> nn.Module:
        """A module to load a state into and train, over and over in one process."""
        return self.build()

    @property
    def intruder_seed(self) -> Seed:
        """The malicious client's own; a number that a float64 can hold, so that it can be told."""
        return Seed.root(self.schedule.seed.child("intruder").value >> 10)

    @property
    def intruder_labels(self) -> Ints:
        """Labels of the malicious client's own records."""
        assert self.intruder is not None
        return self.private.labels[self.schedule.parts[self.intruder.client]]

    @cached_property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters; every other entry of the state is a buffer."""
        return frozenset(name for name, _ in self._initial.named_parameters())

    @cached_property
    def transport(self) -> Transport | None:
        """How updates cross; None where nothing is done to them."""
        listed = [p for p in self.setting.protections if isinstance(p, Transport)]
        if listed:
            return listed[0]
        changed = self.setting.protections or self.server == Position.MALICIOUS_SERVER
        return Clear(kind="clear", setting=self.setting) if changed else None

    @property
    def one_step(self) -> bool:
        """Whether each client takes a single step in a round."""
        most = max(len(part) for part in self.schedule.parts)
        return self.strategy.sends == Channel.GRADIENT or len(self.work.batch_sizes(most)) == 1

    @property
    def server_knows(self) -> bool:
        """Whether the server sees aggregates and global models."""
        return self.transport is None or self.transport.server_sees_aggregate

    @property
    def coordinator(self) -> Position:
        """Who sees aggregates and global models beside the clients: the server, or key holders."""
        return self.server if self.server_knows else Position.KEY_HOLDER

    @property
    def update_channel(self) -> Channel:
        """Where the server sees what one client sends."""
        sealed = self.transport is not None and not isinstance(self.transport, Clear)
        return self.transport.channel if self.transport and sealed else self.strategy.sends

    @property
    def sealed(self) -> bool:
        """Whether no single update is seen in clear."""
        return self.update_channel != self.strategy.sends

    @property
    def claims(self) -> tuple[PrivacyClaim, ...]:
        """What the protections guarantee over the whole training, in their order."""
        return tuple(c for p in self.setting.protections for c in p.claims(self.setting))

    def learner(self, round: int, client: int) -> Learner:
        """The local training of one client in one round."""
        for protection in self.setting.protections:
            if isinstance(protection, TrainingProtection):
                seed = self.schedule.client_seed(round, client).child(protection.kind)
                return protection.learner(self.setting, client, seed)
        return Plain()

    def aggregate(
        self, model: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A mean update as the mean of what unprotected clients send: parameters, or gradients."""
        gradients = self.trainable if self.strategy.sends == Channel.GRADIENT else frozenset()
        return {
            name: mean[name] if name in gradients else tensor + mean[name]
            for name, tensor in model.items()
        }

    def advance(self, model: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(global model, mean update) -> the next global model, in the model's types."""
        aggregate = self.aggregate(model, mean)
        before = {name: model[name] for name in model if name in self.trainable}
        moved = self.strategy.advance(
            before, {name: aggregate[name] for name in before}, self.work.recipe
        )
        return wire.like({name: moved.get(name, aggregate[name]) for name in model}, model)

    @cached_property
    def _initial(self) -> nn.Module:
        module = self.model.build(self.private.shape, self.classes, self.model_seed)
        return module if self.start is None else loaded(module, self.start)


def server_position(malice: Malice | None) -> Position:
    return Position.CURIOUS_SERVER if malice is None else Position.MALICIOUS_SERVER


@dataclass(frozen=True)
class Trained:
    """What the server holds when the last round is over.

    replied: the (round, client) of each update that counted in the recorded rounds.
    """

    state: Mapping[str, Tensor]
    transcripts: Mapping[Position, Transcript]
    replied: frozenset[tuple[int, int]]
    wire_bytes_up: int
    wire_bytes_down: int
    flags: frozenset[str]
    confided: tuple[Confided, ...] = ()
    noticed: tuple[Noticed, ...] = ()
