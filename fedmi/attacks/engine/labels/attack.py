"""What every attack on the labels of a batch does."""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.class_sums import completed
from fedmi.attacks.engine.evidence import MUTE, UPDATES, AttackError, Evidence, blind, read
from fedmi.attacks.engine.labels.checks import RecordsDoNotFit, checked, unfit
from fedmi.attacks.engine.labels.doubts import SILENT, doubts
from fedmi.attacks.engine.labels.layer import fresh, last_linear, stand
from fedmi.attacks.engine.labels.steps import several_steps
from fedmi.attacks.engine.protected import PRUNING, names
from fedmi.exposure.words import Fact

STEPS, SIGNED = "steps_read_as_one", "negative_features"


class LabelAttack(Attack):
    """Answers each target with labels; an update that says nothing with a flagged guess.

    So it does one whose number of records the rule cannot take (flag `records_do_not_fit`); where
    there is no other, `RecordsDoNotFit` is raised.
    """

    channels: ClassVar = UPDATES
    needs: ClassVar = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING})
    reads_schemas: ClassVar[frozenset[str]] = frozenset({"pixels", "table", "text"})
    recovers: ClassVar[Literal["samples", "labels"]] = "labels"

    @abstractmethod
    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """(labels [records], confidence [records])."""

    def noted(self, case: Case, evidence: Evidence, confidence: Tensor) -> frozenset[str]:
        """Flags for where the rule's theory does not apply to this evidence."""
        return frozenset()

    def unsuited(self, network: nn.Module) -> str:
        try:
            last_linear(network)
        except AttackError as error:
            return str(error)
        return ""

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        answers, misfits = list[Reconstruction](), list[RecordsDoNotFit]()
        for done, evidence in enumerate(read(case, self.channel), start=1):
            try:
                answers.append(self._answer(case, evidence))
            except RecordsDoNotFit as error:
                misfits.append(error)
                answers.append(unfit(case, evidence, samples=False))
            case.progress(done / len(case.targets))
        if misfits and len(misfits) == len(answers):
            raise misfits[0]
        return tuple(answers)

    def _answer(self, case: Case, evidence: Evidence) -> Reconstruction:
        if evidence.flags & MUTE:
            return blind(case, evidence, samples=False)
        if names(case, PRUNING):
            evidence = completed(case, evidence)
        flags = evidence.flags | doubts(case, evidence)
        if SILENT in flags:
            return blind(case, replace(evidence, flags=flags), samples=False)
        labels, confidence = self.recovered(case, evidence)
        checked(case, evidence, labels, "recovered")
        flags |= self.noted(case, evidence, confidence)
        if several_steps(evidence):
            flags |= {STEPS}
        return Reconstruction(evidence.target, None, labels, confidence, flags)


def signed(case: Case, evidence: Evidence) -> frozenset[str]:
    """The flag "negative_features", where a sign in the weight gradient proves nothing."""
    negative = stand(case, evidence, fresh(case)).signed
    return frozenset({SIGNED}) if negative else frozenset()
