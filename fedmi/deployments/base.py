"""What every deployment declares, what it is handed, and what it returns."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from fedmi.data.dataset import Card
from fedmi.data.records import Ints, Split
from fedmi.deployments.serving.base import Rehearsal, Serving
from fedmi.deployments.serving.exact import Exact
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.component import Component, OneOf
from fedmi.exposure.knowledge import View
from fedmi.exposure.observation import Transcript
from fedmi.exposure.opening import Confided, Opener
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Position
from fedmi.models.base import ModelSpec
from fedmi.mpc.cost import MPCCost
from fedmi.protections.audit.canaries import CANARY_CLIENTS, GradientCanaries

Steps = tuple[tuple[int, ...], ...]
"""The records of each local step, as numbers among the records a client used."""


class DeploymentError(RuntimeError):
    """Training failed; the message names the round and the client."""


@dataclass(frozen=True)
class Job:
    """One training of one deployment.

    `directory` is for transcripts that spill and working files. `record` names the rounds whose
    per-client items are wanted (the global model of those rounds and the finished one always
    are); `confide`, whether to keep what clients of those rounds could tell as colluders.
    `audit_seed` draws an audit's canaries (the job's own seed, if none). `start` is the state that
    training starts from; None draws one from the seed. `workers` is how many
    processes may train at once; it never changes the result.
    `progress` takes the share done, 0 to 1.
    """

    split: Split
    model: ModelSpec
    recipe: Recipe
    seed: Seed
    directory: Path
    record: frozenset[int] = frozenset()
    confide: bool = False
    audit_seed: Seed | None = None
    start: Mapping[str, Tensor] | None = None
    workers: int = 1
    progress: Callable[[float], None] = lambda share: None

    def initial(self) -> nn.Module:
        """What training starts from, the caller's to train; DeploymentError where `start` is of
        another architecture."""
        private = self.split.private
        module = self.model.build(private.shape, self.split.classes, self.seed.child("model"))
        return module if self.start is None else loaded(module, self.start)


def loaded(module: nn.Module, start: Mapping[str, Tensor]) -> nn.Module:
    """The module with this state, in place; of what a server built around the model, the model.

    Raises DeploymentError where the state is that of no part of the module.
    """
    parts = {"": module, **dict(module.named_modules())}
    for part in parts.values():
        if {name: t.shape for name, t in part.state_dict().items()} == {
            name: t.shape for name, t in start.items()
        }:
            part.load_state_dict(dict(start))
            return module
    raise DeploymentError("the initial model is of another architecture than the one trained")


@dataclass(frozen=True)
class Utility:
    """Of the finished model: accuracy [0, 1] and mean cross-entropy on held-out and on private."""

    accuracy: float
    loss: float
    private_accuracy: float
    private_loss: float


@dataclass(frozen=True)
class Cost:
    """seconds: wall time of training; up: clients to server; memory: of all processes together."""

    seconds: float
    wire_bytes_up: int
    wire_bytes_down: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Planted:
    """The canaries of an audit; the coins are ground truth, for metrics only.

    gradients: by client. users: updates of clients added to the real ones. rows: of
    `split.private`, trained on with the wrong `labels` [m] where `coins` [m] say so, and left out
    of the training otherwise.
    """

    gradients: Mapping[int, GradientCanaries] = field(default_factory=dict)
    users: GradientCanaries | None = None
    rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    labels: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    coins: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def by_target(self) -> dict[str, GradientCanaries]:
        """Gradients and updates by the id of the target that an audit of them has."""
        found = {f"client-{client}": canaries for client, canaries in self.gradients.items()}
        return found | ({CANARY_CLIENTS: self.users} if self.users is not None else {})


Sent = Literal["honest", "altered", "tainted"]
"""A model as an honest server sends it; another one; one that follows honestly from altered ones
or has a dictated architecture, and so is neither."""


@dataclass(frozen=True)
class Noticed:
    """What one client measured of the model it was sent in one round, and told no party.

    detector: its kind. what: what was sent; ground truth. value: higher = more suspicious.
    """

    round: int
    client: int
    detector: str
    value: float
    what: Sent


@dataclass(frozen=True)
class Outcome:
    """What one training leaves behind.

    state: the finished model's state dict. used: ground truth for metrics only, (round, client)
    -> rows of `split.private` in order of first use. order: (round, client) -> for each local
    step, which of these records it used, counted from 0. confided: what each client could tell of
    a recorded round if it colluded; an attack gets what its coalition tells. planted: an audit's
    canaries. mpc: what computing under MPC took, if the training did. service: what putting the
    model into service showed, where it does not simply answer as it was trained. noticed: what
    careful clients measured of the models they were sent.
    """

    state: Mapping[str, Tensor]
    transcripts: Mapping[Position, Transcript]
    used: Mapping[tuple[int, int], Ints]
    utility: Utility
    cost: Cost
    order: Mapping[tuple[int, int], Steps] = field(default_factory=dict)
    claims: tuple[PrivacyClaim, ...] = ()
    flags: frozenset[str] = field(default_factory=frozenset)
    confided: tuple[Confided, ...] = ()
    planted: Planted = field(default_factory=Planted)
    mpc: MPCCost | None = None
    service: Rehearsal | None = None
    noticed: tuple[Noticed, ...] = ()

    @property
    def accuracy(self) -> float:
        """Held-out accuracy of the model as it is served."""
        return self.service.accuracy if self.service else self.utility.accuracy


@dataclass(frozen=True)
class Estimate:
    """Before anything runs: wire bytes over the whole training, and memory at its peak."""

    parameters: int
    wire_bytes_up: int
    wire_bytes_down: int
    memory_bytes: int


class Deployment(Component):
    """A training regime, a serving regime and its protections, under one name."""

    name: str = Field(min_length=1, description="its name in the table")
    recipe: Recipe | None = Field(default=None, description="overrides the scenario's [training]")
    serving: Annotated[Serving, OneOf("fedmi.serving")] = Field(
        default=Exact(), description="how the trained model answers"
    )

    training: ClassVar[str]

    @property
    def protected_by(self) -> tuple[str, ...]:
        """Names of the protections, outermost last; empty for a positive control."""
        return ()

    @property
    def protections_in_all(self) -> tuple[str, ...]:
        """Those of the training, then those of the serving."""
        return (*self.protected_by, *self.serving.protected_by)

    def problems(self, card: Card, model: ModelSpec, recipe: Recipe) -> list[str]:
        """Why it cannot be trained as asked, in words; nothing has run yet."""
        return []

    def builds(self, model: ModelSpec) -> ModelSpec:
        """The architecture that is trained: the scenario's, unless somebody here alters it."""
        return model

    def unwatched(self) -> Self:
        """The same training without what only takes notes of it: that of a twin."""
        return self

    @property
    def malice_kind(self) -> str:
        """Kind of what a malicious party does here; empty where all follow the protocol."""
        return ""

    @property
    def malice_kinds(self) -> frozenset[str]:
        """Kinds of what all malicious parties do here."""
        return frozenset({self.malice_kind} if self.malice_kind else ())

    @property
    def alters(self) -> str:
        """What a malicious party changes, in a few words."""
        return ""

    @property
    def watched(self) -> bool:
        """Whether clients measure what they are sent; `Outcome.noticed` then has it."""
        return False

    @property
    def audits(self) -> frozenset[str]:
        """Kinds of the audits that find canaries in this training."""
        return frozenset()

    @property
    def protection_kinds(self) -> tuple[str, ...]:
        """Kinds of the protections, in the order in which they act."""
        return ()

    def opener(self, network: nn.Module, recipe: Recipe) -> Opener | None:
        """How sealed items are opened by whoever holds the keys; None if nothing is sealed."""
        return None

    @property
    def compute_parties(self) -> int:
        """How many parties compute on shares while it trains; 0 where none do."""
        return 0

    @property
    def parallelism(self) -> int:
        """How many processes one training can keep busy."""
        return 1

    @abstractmethod
    def views(self) -> tuple[View, ...]:
        """Who sees which channel here, and what they know by nature."""

    @abstractmethod
    def work(self, recipe: Recipe) -> LocalWork:
        """The local work of one party in one round."""

    @abstractmethod
    def estimate(self, card: Card, model: ModelSpec, recorded_rounds: int) -> Estimate:
        """What the training will send and hold."""

    @abstractmethod
    def train(self, job: Job) -> Outcome:
        """Train for real; DeploymentError or DataError if it cannot be done."""
