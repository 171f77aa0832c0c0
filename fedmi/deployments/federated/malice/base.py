"""The base of active attacks by the server: it sends clients other models than the honest one."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn

from fedmi.exposure.component import Component
from fedmi.exposure.seeding import Seed
from fedmi.protections.base import Setting


@dataclass(frozen=True)
class Occasion:
    """One round as the malicious server meets it.

    asked: the clients of the round, ascending. network: the architecture (parameters on the meta
    device). seed: of the round, for the server's own choices.
    """

    round: int
    asked: tuple[int, ...]
    network: nn.Module
    seed: Seed


class Malice(Component):
    """Alters the model that one client is sent; training goes on with what comes back."""

    rounds: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="rounds in which the server alters models"
    )

    def problems(self, setting: Setting) -> list[str]:
        """Why it cannot be done in this deployment, in words."""
        late = [round for round in self.rounds if not 1 <= round <= setting.rounds]
        return [f"rounds names {round}, but there are {setting.rounds}" for round in late[:1]]

    @abstractmethod
    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        """The state dict that `client` is sent in place of `model`."""
