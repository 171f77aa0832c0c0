"""The base of active attacks by a client: it trains on other records than its own."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn

from fedmi.data.dataset import Card
from fedmi.data.records import Ints
from fedmi.exposure.component import Component
from fedmi.exposure.seeding import Seed


@dataclass(frozen=True)
class Visit:
    """One round as the malicious client meets it.

    model: what it was sent. inputs [n, C, H, W], labels [n]: its own records. memory: what it kept
    of the last round, by name; empty at first. seed: its own, the same in every round.
    """

    round: int
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    classes: int
    memory: Mapping[str, Tensor]
    seed: Seed


@dataclass(frozen=True)
class Ploy:
    """The records it trains on in this round, and what it keeps for the next."""

    inputs: Tensor
    labels: Tensor
    memory: Mapping[str, Tensor]


class Intruder(Component):
    """Chooses the records that one client trains on; all else of the round goes on as agreed."""

    client: int = Field(default=0, ge=0, description="which client is malicious")

    @property
    @abstractmethod
    def alters(self) -> str:
        """What it changes, in a few words, printed in the row; empty where it only watches."""

    @property
    def told(self) -> Mapping[str, float]:
        """What it writes down of itself beside the models it is sent, by name ("own/..."), for the
        attack that reads them."""
        return {}

    def problems(self, card: Card, clients: int) -> list[str]:
        """Why it cannot be done with these data and so many clients, in words."""
        late = self.client >= clients
        return [f"client = {self.client}, but clients are 0 to {clients - 1}"] if late else []

    def misplaced(self, labels: Ints, classes: int) -> str:
        """Why it cannot be done by a client with records of these labels, or ""."""
        return ""

    def flags(self, labels: Ints, classes: int) -> frozenset[str]:
        """Evidence flags that follow from the labels of the client's own records."""
        return frozenset()

    @abstractmethod
    def plot(self, visit: Visit) -> Ploy:
        """What to train on in this round."""
