"""What every serving regime declares: who sees what when the model answers, and the door itself."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fedmi.data.records import Split
from fedmi.exposure.component import Component
from fedmi.exposure.knowledge import View
from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided, Opener
from fedmi.exposure.seeding import Seed
from fedmi.exposure.service import Service
from fedmi.exposure.words import Channel, Position
from fedmi.models.base import ModelSpec, Shape
from fedmi.mpc.cost import MPCCost

ANSWERS = (
    View(Position.API_USER, Channel.PREDICTIONS),
    View(Position.API_USER, Channel.LABELS),
)
"""What whoever may ask sees."""


@dataclass(frozen=True)
class Trained:
    """A finished model: its state dict, and the architecture it belongs to."""

    state: Mapping[str, Tensor]
    spec: ModelSpec
    shape: Shape
    classes: int

    def module(self) -> nn.Module:
        """The model in eval mode."""
        module = self.spec.build(self.shape, self.classes, Seed.root(0))
        module.load_state_dict(dict(self.state))
        return module.eval()


@dataclass(frozen=True)
class Rehearsal:
    """What putting a model into service showed to others than its users."""

    observations: tuple[Observation, ...] = ()
    confided: tuple[Confided, ...] = ()
    cost: MPCCost | None = None
    flags: frozenset[str] = field(default_factory=frozenset)


class Serving(Component):
    """How a trained model answers its users."""

    @property
    def title(self) -> str:
        return self.kind

    @property
    def protected_by(self) -> tuple[str, ...]:
        """Names of what protects model and queries while it serves; empty where nothing does."""
        return ()

    @property
    def compute_parties(self) -> int:
        """How many parties compute the answers from shares; 0 where none do."""
        return 0

    def problems(self, network: nn.Module) -> list[str]:
        """Why this model (on the meta device) cannot be served so, in words."""
        return []

    def views(self) -> tuple[View, ...]:
        """Who sees which channel while it serves."""
        return ANSWERS

    def opener(self) -> Opener | None:
        """How sealed items of this regime are opened; None if nothing is sealed."""
        return None

    def rehearse(self, model: Trained, split: Split, directory: Path, confide: bool) -> Rehearsal:
        """Put the model into service once, right after training: what others than users saw.

        directory: for what it records. confide: keep what colluding parties could tell.
        """
        return Rehearsal()

    @abstractmethod
    def door(
        self, model: Trained, channel: Channel, directory: Path
    ) -> AbstractContextManager[Service]:
        """The served model, as long as the context is open; ValueError for another channel than
        `predictions` (probabilities [n, classes]) and `labels` (class indices [n])."""
