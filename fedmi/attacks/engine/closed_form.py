"""Attacks that solve for records instead of searching for them: what they share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from torch import nn

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.evidence import MUTE, UPDATES, AttackError, Evidence, blind, read
from fedmi.exposure.words import Fact

Source = TypeVar("Source")
"""What an attack reads of a model: the name of a layer, a part with its name, nothing."""


class ClosedForm(Attack, Generic[Source]):
    """One target after the other; a subclass says what of the model it reads (`readable`) and
    solves (`invert`). Evidence with a flag of `MUTE` says nothing and is answered blindly."""

    channels: ClassVar = UPDATES
    needs: ClassVar = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING})

    @abstractmethod
    def readable(self, network: nn.Module) -> Source:
        """What of the network it reads, as `invert` is given it. AttackError, naming the layer, if
        it cannot."""

    @abstractmethod
    def invert(self, case: Case, evidence: Evidence, source: Source) -> Reconstruction:
        """The answer to one target; source: what `readable` gave."""

    def evidence(self, case: Case) -> Sequence[Evidence]:
        """What is solved for, one a target of the case, in order."""
        return read(case, self.channel)

    def unsuited(self, network: nn.Module) -> str:
        try:
            self.readable(network)
        except AttackError as error:
            return str(error)
        return ""

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        assert case.knowledge.build is not None
        source = self.readable(case.knowledge.build())
        answers: list[Reconstruction] = []
        for done, item in enumerate(self.evidence(case), start=1):
            mute = bool(item.flags & MUTE)
            answers.append(blind(case, item) if mute else self.invert(case, item, source))
            case.progress(done / len(case.targets))
        return tuple(answers)
