"""What an adversary takes to be so of the local training, right or wrong."""

from collections.abc import Iterator
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from fedmi.attacks.base import Case
from fedmi.exposure.observation import Observation
from fedmi.exposure.recipe import LocalWork


class Assumed(BaseModel):
    """Local training as the adversary believes it to be; 0 = as it was told.

    Each belief that differs from what the position knows is a flag of the answer, such as
    `false_knowledge: batch_size 8 for 4`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: int = Field(default=0, ge=0, description="records behind each client's item")
    batch_size: int = Field(default=0, ge=0, description="records a local step")
    epochs: int = Field(default=0, ge=0, description="passes over a client's records")
    steps: int = Field(default=0, ge=0, description="local steps; wins over epochs")
    learning_rate: float = Field(default=0.0, ge=0, description="SGD step size of clients")

    def applied(self, case: Case) -> tuple[Case, frozenset[str]]:
        """The case as the adversary sees it, and a flag for every false belief."""
        told = set(self._false_work(case.knowledge.work))
        work = self._work(case.knowledge.work)
        transcript = case.transcript
        if self.records:
            told |= set(self._false_counts(case))
            seen = tuple(map(self._recounted, transcript.observations))
            transcript = replace(transcript, observations=seen)
        knowledge = replace(case.knowledge, work=work)
        return replace(case, knowledge=knowledge, transcript=transcript), frozenset(told)

    def _work(self, work: LocalWork | None) -> LocalWork | None:
        if work is None:
            return None
        recipe = {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        chosen = {name: value for name, value in recipe.items() if value}
        turns: dict[str, object] = {"recipe": work.recipe.model_copy(update=chosen)}
        if self.epochs:
            turns |= {"epochs": self.epochs, "steps": 0}
        return work.model_copy(update=turns | ({"steps": self.steps} if self.steps else {}))

    def _false_work(self, work: LocalWork | None) -> Iterator[str]:
        if work is None:
            return
        true = {
            "batch_size": work.recipe.batch_size,
            "learning_rate": work.recipe.learning_rate,
            "epochs": work.epochs if not work.steps else 0,
            "steps": work.steps,
        }
        for name, value in true.items():
            believed = getattr(self, name)
            if believed and believed != value:
                yield f"false_knowledge: {name} {believed:g} for {value:g}"

    def _false_counts(self, case: Case) -> Iterator[str]:
        for seen in case.transcript.observations:
            told = seen.clear.get("num_examples", 0)
            if len(seen.clients) == 1 and told and told != self.records:
                yield f"false_knowledge: records {self.records} for {told:g}"

    def _recounted(self, seen: Observation) -> Observation:
        if not seen.clients:
            return seen
        each = {f"num_examples/{client}": float(self.records) for client in seen.clients}
        own = each if len(seen.clients) > 1 else {}
        total = {"num_examples": float(self.records * len(seen.clients))}
        return replace(seen, clear={**seen.clear, **own, **total})
