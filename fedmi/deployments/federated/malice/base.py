"""The base of active attacks by the server: it sends clients other models than the honest one."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fedmi.data.records import Records
from fedmi.exposure.component import Component
from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec, Shape
from fedmi.protections.base import Setting


@dataclass(frozen=True)
class Occasion:
    """One round as the malicious server meets it.

    asked: the clients of the round, ascending. network: the architecture as it is trained
    (parameters on the meta device). seed: of the round, for the server's own choices. shape: of a
    record, (C, H, W). public: the records that the adversary has of its own; a malice that reads
    them says so in `reads_public`. one_step: whether each client takes one step in a round.
    """

    round: int
    asked: tuple[int, ...]
    network: nn.Module
    seed: Seed
    shape: Shape
    classes: int
    public: Records
    one_step: bool = True


class Malice(Component):
    """Alters the model that one client is sent; training goes on with what comes back.

    It may alter the architecture too, from the first round on (`architecture`); in the rounds that
    `rounds` does not name, all parameters are then trained like any others.
    """

    alters: ClassVar[str]
    """What the server changes, in a few words: printed beside the attack's knowledge."""
    reads_public: ClassVar[bool] = False
    """Whether it makes use of public records; the attack of the same kind then needs that fact."""

    rounds: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="rounds in which the server alters models"
    )
    keeps: Literal["all", "unaltered", "nothing"] = Field(
        default="all",
        description="which tensors of the mean update the server puts into the model after such a "
        "round; what comes back for an altered one may do harm to the model",
    )

    def architecture(self, model: ModelSpec) -> ModelSpec:
        """What the server has clients train in place of `model`."""
        return model

    def problems(self, setting: Setting) -> list[str]:
        """Why it cannot be done in this deployment, in words; the setting's network is that of
        `architecture`. ValueError from building that network is told too."""
        late = [round for round in self.rounds if not 1 <= round <= setting.rounds]
        return [f"rounds names {round}, but there are {setting.rounds}" for round in late[:1]]

    @abstractmethod
    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        """The state dict that `client` is sent in place of `model`."""
