"""What every attack declares, what it is handed, and what it returns."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fedmi.exposure.component import Component
from fedmi.exposure.knowledge import Knowledge, Target, View
from fedmi.exposure.observation import Transcript
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import PER_ROUND, SERVED, Channel, Fact, Position, in_coalition

PICTURED = frozenset({"samples", "one_sample"})
"""What attacks recover that can be looked at."""


@dataclass(frozen=True)
class Case:
    """All that an attack may look at: one position's transcript and its declared knowledge.

    `seed.child(target.id)` seeds what is drawn for a target, so that a target's result does
    not depend on which others share its batch. `progress` takes the share done, 0 to 1.
    """

    transcript: Transcript
    knowledge: Knowledge
    targets: tuple[Target, ...]
    seed: Seed
    progress: Callable[[float], None] = lambda share: None


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns for one target.

    samples: [n, C, H, W] in [0, 1], or None; labels: [n] class indices, or None;
    confidence: [n], higher is surer, by the attack's own loss (never by the truth).
    flags: evidence flags the attack itself can tell ("zero_gradients", "non_finite").
    """

    target: Target
    samples: Tensor | None
    labels: Tensor | None
    confidence: Tensor
    flags: frozenset[str] = field(default_factory=frozenset)


class Attack(Component):
    """One attack as one adversary runs it: where it stands, what it sees, what it is granted."""

    name: str = Field(default="", description="its name in the table; the kind unless given")
    position: Position = Field(description="who attacks")
    channel: Channel = Field(description="what the attack reads")
    knowledge: frozenset[Fact] = Field(
        default=frozenset(), description="facts granted beyond what the position has by nature"
    )
    rounds: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="rounds attacked, on channels with one item a round"
    )
    max_targets: int = Field(
        default=0, ge=0, description="at most so many targets, spread over the rounds; 0 = all"
    )
    colluders: int = Field(
        default=0,
        ge=0,
        description="further clients, or compute parties, that tell the adversary their side",
    )
    deployments: tuple[str, ...] = Field(
        default=(),
        description="names of the deployments attacked; empty = all that have the channel",
    )
    models: tuple[str, ...] = Field(
        default=(), description="kinds of the models attacked, in a sweep of them; empty = all"
    )

    channels: ClassVar[frozenset[Channel]]
    """Channels the attack can read."""
    needs: ClassVar[frozenset[Fact]] = frozenset()
    """Facts without which it cannot run."""
    uses: ClassVar[frozenset[Fact]] = frozenset()
    """Further facts it makes use of when granted; any other grant is refused."""
    exploits: ClassVar[frozenset[str]] = frozenset()
    """Kinds of malice of which a deployment must have one; empty = it needs none."""
    replays: ClassVar[tuple[str, ...]] = ()
    """Options that must be None or those of the same name of the intruder that it exploits."""
    reads_schemas: ClassVar[frozenset[str]] = frozenset({"pixels", "table"})
    """Kinds of records that it knows how to recover."""
    with_dealer: ClassVar[bool] = False
    """Whether it takes off, with what compute parties tell, the masks that a dealer knows."""
    recovers: ClassVar[Literal["samples", "one_sample", "labels", "membership"]] = "samples"
    """one_sample: one record of each target, without saying which."""

    @property
    def title(self) -> str:
        """Its name in the table; says how many collude."""
        return in_coalition(self.name or self.kind, self.colluders)

    @property
    def required_facts(self) -> frozenset[Fact]:
        """Facts without which it cannot run under these options; `needs` unless they matter."""
        return self.needs

    @property
    def reads_answers(self) -> bool:
        """Whether it reads the answers that others got; its targets are then their queries."""
        return self.channel in SERVED and self.position == Position.EAVESDROPPER

    @property
    def inverts_classes(self) -> bool:
        """Whether its targets are the classes of a model, on whatever channel that comes."""
        return self.channel not in PER_ROUND and not self.reads_answers

    @property
    def reads(self) -> str:
        """What it needs shares of, on channel `share`: records, model or update; on channels of
        answers, `answers` where it needs those that others got."""
        if self.reads_answers:
            return "answers"
        return "model" if self.inverts_classes else "update"

    def unsuited(self, network: nn.Module) -> str:
        """Why the attack cannot read this architecture (parameters on the meta device), or ""."""
        return ""

    def can_read(self, view: View) -> bool:
        """Whether this is the attack's position and channel, and what crosses there is for it."""
        there = (view.position, view.channel) == (self.position, self.channel)
        return there and (not view.items or self.reads in view.items)

    def own_targets(self, transcript: Transcript) -> tuple[Target, ...] | None:
        """The targets, where they are not the items of the channel."""
        return None

    @abstractmethod
    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        """One reconstruction for each of `case.targets`, in that order."""
