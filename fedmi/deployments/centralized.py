"""Centralized training: one party holds all the records."""

import time
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedmi.data.dataset import Card
from fedmi.deployments.base import Cost, Deployment, DeploymentError, Estimate, Job, Outcome
from fedmi.deployments.determinism import drawn_from, one_thread
from fedmi.deployments.memory import PROCESS_BYTES, records_bytes, watched
from fedmi.deployments.rows import first_use
from fedmi.deployments.utility import utility
from fedmi.exposure.component import OneOf
from fedmi.exposure.knowledge import View
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.payload import store
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import ModelSpec
from fedmi.protections.base import (
    Protection,
    Setting,
    TrainingProtection,
    out_of_order,
    sampling_of,
)
from fedmi.training.local import DivergedError, Learner, Plain, batches


class Centralized(Deployment):
    """Minibatch SGD on all private records in one place; only the finished model gets out.

    Ground truth (`Outcome.used`) is one entry, round 1 and client 0.
    """

    kind: Literal["centralized"] = "centralized"
    epochs: int = Field(default=20, ge=1, le=100_000, description="passes over the records")

    protections: tuple[Annotated[Protection, OneOf("fedmi.protections")], ...] = Field(
        default=(), description="what protects training; only such as replace it (dp_sgd)"
    )

    training: ClassVar[str] = "centralized"

    @model_validator(mode="after")
    def _nothing_on_the_way(self) -> Self:
        if wrong := out_of_order(self.protections):
            raise ValueError(wrong)
        for protection in self.protections:
            if not isinstance(protection, TrainingProtection):
                raise ValueError(
                    f"protections: {protection.title} acts on updates, but centralized training "
                    "sends none; only protections of the training itself apply, such as dp_sgd"
                )
        return self

    @property
    def protected_by(self) -> tuple[str, ...]:
        return tuple(protection.title for protection in self.protections)

    @property
    def protection_kinds(self) -> tuple[str, ...]:
        return tuple(protection.kind for protection in self.protections)

    def views(self) -> tuple[View, ...]:
        return (
            View(Position.MODEL_HOLDER, Channel.GLOBAL_MODEL, frozenset({Fact.ARCHITECTURE})),
            *self.serving.views(),
        )

    def work(self, recipe: Recipe) -> LocalWork:
        return LocalWork(recipe=recipe, epochs=self.epochs, sampling=sampling_of(self.protections))

    def setting(self, network: nn.Module, recipe: Recipe, records: tuple[int, ...] = ()) -> Setting:
        """What the protections are told: one party, one round, nothing sent."""
        return Setting(
            clients=1,
            asked=1,
            rounds=1,
            min_clients=1,
            dropout=0.0,
            work=self.work(recipe),
            sends=Channel.CLIENT_UPDATE,
            strategy=self.kind,
            tells_aggregate=True,
            network=network,
            layout={name: tuple(t.shape) for name, t in network.state_dict().items()},
            protections=self.protections,
            records=records,
            participations=(1,) if records else (),
        )

    def problems(self, card: Card, model: ModelSpec, recipe: Recipe) -> list[str]:
        network = model.blueprint(card.shape, card.classes)
        setting = self.setting(network, recipe)
        return self.serving.problems(network, card) + [
            f"{p.title}: {why}" for p in self.protections for why in p.problems(setting)
        ]

    def estimate(self, card: Card, model: ModelSpec, recorded_rounds: int) -> Estimate:
        """Nothing crosses a wire; weights, gradients and momentum beside the records."""
        parameters = model.parameters(card.shape, card.classes)
        memory = PROCESS_BYTES + 5 * 4 * parameters + 2 * records_bytes(card)
        return Estimate(parameters, 0, 0, memory)

    def train(self, job: Job) -> Outcome:
        """DeploymentError if training diverges."""
        private, started = job.split.private, time.perf_counter()
        work = self.work(self.recipe or job.recipe)
        seed = job.seed.child(self.kind)
        steps = batches(len(private), work, seed.child("batches"))
        model = job.initial()
        inputs, labels = torch.from_numpy(private.inputs), torch.from_numpy(private.labels)
        setting = self.setting(
            job.model.blueprint(private.shape, job.split.classes),
            self.recipe or job.recipe,
            (len(private),),
        )
        learner = self._learner(setting, seed, job.progress)
        with watched() as memory, one_thread(), drawn_from(seed.child("module")):
            try:
                learner.fit(model, inputs, labels, steps, work)
            except DivergedError as error:
                raise DeploymentError(f"'{self.name}' diverged: {error}") from error
        seconds = time.perf_counter() - started
        return Outcome(
            state=model.state_dict(),
            transcripts=_transcripts(model.state_dict(), job),
            used={(1, 0): first_use(steps)},
            utility=utility(model, job.split),
            cost=Cost(seconds, 0, 0, memory.peak_bytes),
            claims=tuple(c for p in self.protections for c in p.claims(setting)),
        )

    def _learner(self, setting: Setting, seed: Seed, progress: Callable[[float], None]) -> Learner:
        for protection in self.protections:
            if isinstance(protection, TrainingProtection):
                return protection.learner(setting, 0, seed.child(protection.kind))
        return Plain(progress)


def _transcripts(state: Mapping[str, Tensor], job: Job) -> dict[Position, Transcript]:
    """Whoever holds the model holds the finished one; its users see answers only."""
    payload = store(state, job.directory / "observations" / "final-model.safetensors")
    final = Observation(Position.MODEL_HOLDER, Channel.GLOBAL_MODEL, 1, (), payload, 0)
    return {
        Position.MODEL_HOLDER: Transcript(Position.MODEL_HOLDER, (final,)),
        Position.API_USER: Transcript(Position.API_USER),
    }
