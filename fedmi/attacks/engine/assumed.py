"""What an adversary takes to be so of the local training, right or wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.exposure.observation import Observation
from fedmi.exposure.recipe import LocalWork

Reader = Callable[[Case], Sequence[Evidence]]
"""Case -> the evidence for each of its targets, in order."""
Simulates = Callable[[Evidence], bool]
"""Whether the attack simulates local steps, rather than reading the update as one gradient."""


class Assumed(BaseModel):
    """Local training as the adversary believes it to be; 0 = as it was told.

    Each belief that differs from what is so of a target is a flag of its answer, such as
    `false_knowledge: batch_size 8 for 4`; `belief_without_effect: batch_size` where the attack
    would have done the very same without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: int = Field(default=0, ge=0, description="records behind each client's item")
    batch_size: int = Field(default=0, ge=0, description="records a local step")
    epochs: int = Field(default=0, ge=0, description="passes over a client's records")
    steps: int = Field(default=0, ge=0, description="local steps; wins over epochs")
    learning_rate: float = Field(default=0.0, ge=0, description="SGD step size of clients")

    def applied(self, case: Case) -> tuple[Case, frozenset[str]]:
        """The case as the adversary sees it, and the names of its beliefs."""
        transcript = case.transcript
        if self.records:
            seen = tuple(map(self._recounted, transcript.observations))
            transcript = replace(transcript, observations=seen)
        knowledge = replace(case.knowledge, work=self._work(case.knowledge.work))
        believed = replace(case, knowledge=knowledge, transcript=transcript)
        return believed, frozenset(self.held)

    def flags(self, case: Case, reader: Reader, simulates: Simulates) -> list[frozenset[str]]:
        """What is wrong with the beliefs, target by target of the case as it was told."""
        if not self.held:
            return [frozenset()] * len(case.targets)
        true, believed = _views(case, reader), _views(self.applied(case)[0], reader)
        found = [set[str]() for _ in case.targets]
        for name in self.held:
            other = self.model_copy(update={name: type(getattr(self, name))(0)})
            without = _views(other.applied(case)[0], reader)
            rows = zip(found, true, believed, without, strict=True)
            for flags, told, taken, left in rows:
                if said := self._false(name, told, taken):
                    idle = taken and left and not taken.differs(left, simulates)
                    flags.add(f"belief_without_effect: {name}" if idle else said)
        return [frozenset(flags) for flags in found]

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the beliefs."""
        return tuple(name for name in type(self).model_fields if getattr(self, name))

    def _false(self, name: str, told: "_View | None", taken: "_View | None") -> str:
        """The flag of a belief that is not so; "" where it is, or where that is not known."""
        if told is None or taken is None:
            return ""
        if name == "records":
            right, wrong = told.examples, taken.examples
            if sum(right) == sum(wrong) and (right == wrong or 1 in {len(right), len(wrong)}):
                return ""
            return f"false_knowledge: records {_text(wrong, right)} for {_text(right, wrong)}"
        value, believed = told.value(name), getattr(self, name)
        if value is None or value == believed:
            return ""
        return f"false_knowledge: {name} {believed:g} for {value:g}"

    def _work(self, work: LocalWork | None) -> LocalWork | None:
        if work is None:
            return None
        recipe = {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        chosen = {name: value for name, value in recipe.items() if value}
        turns: dict[str, object] = {"recipe": work.recipe.model_copy(update=chosen)}
        if self.epochs:
            turns |= {"epochs": self.epochs, "steps": 0}
        return work.model_copy(update=turns | ({"steps": self.steps} if self.steps else {}))

    def _recounted(self, seen: Observation) -> Observation:
        if not seen.clients:
            return seen
        each = {f"num_examples/{client}": float(self.records) for client in seen.clients}
        own = each if len(seen.clients) > 1 else {}
        total = {"num_examples": float(self.records * len(seen.clients))}
        return replace(seen, clear={**seen.clear, **own, **total})


@dataclass(frozen=True)
class _View:
    """One target's evidence under some beliefs, and the work it was read with."""

    evidence: Evidence
    work: LocalWork | None
    labelled: bool

    @property
    def examples(self) -> tuple[int, ...]:
        """Records of each party; of all together where nothing says whose they are."""
        return self.evidence.plan.examples or (self.evidence.records,)

    def value(self, name: str) -> float | None:
        """What is so of a belief; epochs of a client that counts steps, or steps of one that
        counts epochs, are those that its work amounts to. None where work is not known."""
        if self.work is None:
            return None
        if name == "steps":
            return max(map(len, self.evidence.plan.parties), default=0)
        if name == "epochs":
            once = self.work.model_copy(update={"epochs": 1, "steps": 0})
            steps = len(once.batch_sizes(max(self.examples)))
            return self.work.steps / steps if self.work.steps else self.work.epochs
        return float(getattr(self.work.recipe, name))

    def differs(self, other: "_View", simulates: Simulates) -> bool:
        """Whether anything that an attack goes by is not the same."""
        ours, theirs = self.evidence, other.evidence
        simulated = simulates(ours)
        if ours.records != theirs.records:
            return True
        if simulated and (
            ours.plan.parties != theirs.plan.parties
            or ours.plan.shares != theirs.plan.shares
            or self.value("learning_rate") != other.value("learning_rate")
        ):
            return True
        if simulated and self.labelled:
            return False
        return any(
            not torch.equal(part, theirs.gradient[key]) for key, part in ours.gradient.items()
        )


def _views(case: Case, reader: Reader) -> list[_View | None]:
    """Of each target; None where the number of its records is not known."""
    return [_view(replace(case, targets=(target,)), reader) for target in case.targets]


def _view(case: Case, reader: Reader) -> _View | None:
    try:
        (evidence,) = reader(case)
    except AttackError:
        return None
    return _View(evidence, case.knowledge.work, evidence.target.id in case.knowledge.labels)


def _text(counts: tuple[int, ...], others: tuple[int, ...]) -> str:
    """The sum; where sums are alike, what each party holds."""
    return str(sum(counts)) if sum(counts) != sum(others) else "+".join(map(str, counts))
