"""The federated deployment: what a scenario can say of it, who sees what, and how it is trained."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import nn

from fedmi.data.dataset import Card, Partition
from fedmi.data.partitions.iid import IID
from fedmi.deployments.audit import kept, plant, with_gradients
from fedmi.deployments.base import Deployment, DeploymentError, Estimate, Job, Outcome
from fedmi.deployments.federated import estimates
from fedmi.deployments.federated.client import ArchitectureRefusedError
from fedmi.deployments.federated.detectors.base import Detector
from fedmi.deployments.federated.intruders.base import Intruder
from fedmi.deployments.federated.malice.base import Malice
from fedmi.deployments.federated.plan import Plan, server_position
from fedmi.deployments.federated.schedule import Schedule, sample_size
from fedmi.deployments.federated.sights import sights
from fedmi.deployments.federated.simulation import outcome, simulate
from fedmi.deployments.federated.strategies.base import StrategySpec
from fedmi.deployments.federated.strategies.fedavg import FedAvg
from fedmi.deployments.memory import watched
from fedmi.exposure.component import OneOf
from fedmi.exposure.knowledge import View
from fedmi.exposure.opening import Opener
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec
from fedmi.protections.base import Protection, Setting, out_of_order, sampling_of
from fedmi.protections.clear import Clear
from fedmi.protections.transport import Transport

T = TypeVar("T")


class Federated(Deployment):
    """Clients train on their own records; a server combines what they send, round by round.

    A real Flower ServerApp and ClientApp. The server is curious: it follows the protocol and
    reads all that reaches it. Position `client` is a client that is asked in every round: it
    sees each global model, and the aggregate where two global models tell it. With `tls = false`
    an eavesdropper reads the messages too: names and shapes of tensors and the number of
    examples, which travel in clear, but not the architecture. Position `malicious_client` is the
    `intruder`: it sees what a client sees, in every round in which it is asked, recorded or not.
    Of a round in which it is both, `used` names the records it holds, not those it made up.

    Ground truth (`Outcome.used`) is kept for the recorded rounds.
    """

    kind: Literal["federated"] = "federated"
    clients: int = Field(default=10, ge=1, le=100_000, description="parties that hold records")
    rounds: int = Field(default=10, ge=1, le=100_000, description="rounds of training")
    local_epochs: int = Field(default=1, ge=1, description="passes over a client's records a round")
    local_steps: int = Field(default=0, ge=0, description="minibatches a round; 0 = by epochs")
    batch_size: int = Field(
        default=0, ge=0, description="records a local step; 0 = as [training] says"
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of clients asked a round")
    partition: Annotated[Partition, OneOf("fedmi.partitions")] = Field(
        default=IID(), description="how the private records spread over clients"
    )
    strategy: Annotated[StrategySpec, OneOf("fedmi.strategies")] = Field(
        default=FedAvg(), description="what clients send and how the server combines it"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="probability that an asked client never replies"
    )
    dropout_stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="messages of a round that a client which drops out still answers; with SecAgg+ "
        "1 = lost after setup, 2 = after sharing keys, 3 = after sending its update",
    )
    min_clients: int = Field(
        default=0,
        ge=0,
        description="updates a round needs; 0 = any failed client fails the round",
    )
    failed_round: Literal["stop", "skip"] = Field(
        default="stop", description="a failed round ends the training, or changes nothing"
    )
    protections: tuple[Annotated[Protection, OneOf("fedmi.protections")], ...] = Field(
        default=(), description="what protects updates, in the order in which it acts"
    )
    audit_records: int = Field(
        default=0,
        ge=0,
        description="private records that get a wrong label and are left out by a coin each, for "
        "one_run_audit; 0 = no audit",
    )
    malice: Annotated[Malice, OneOf("fedmi.malice")] | None = Field(
        default=None, description="what the server, if malicious, does to the models it sends"
    )
    intruder: Annotated[Intruder, OneOf("fedmi.intruders")] | None = Field(
        default=None, description="what one client, if malicious, trains on"
    )
    pin_architecture: bool = Field(
        default=False,
        description="clients refuse a model whose tensors are not those of [model]; a server so "
        "refused goes on with the honest one",
    )
    detectors: tuple[Annotated[Detector, OneOf("fedmi.detectors")], ...] = Field(
        default=(), description="what every client measures of the models it is sent"
    )
    engine: Literal["fedmi", "flower"] = Field(
        default="fedmi", description="fedmi's own grid, or Flower's stock simulation"
    )
    tls: bool = Field(default=True, description="messages are encrypted on the wire")

    training: ClassVar[str] = "federated"

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        asked = sample_size(self.clients, self.fraction)
        if self.min_clients > asked:
            raise ValueError(
                f"min_clients is {self.min_clients}, but a round asks {asked} clients "
                f"(clients = {self.clients}, fraction = {self.fraction})"
            )
        return self

    @model_validator(mode="after")
    def _one_a_kind(self) -> Self:
        kinds = [detector.kind for detector in self.detectors]
        twice = [kind for kind in kinds if kinds.count(kind) > 1]
        if twice:
            raise ValueError(f"detectors lists '{twice[0]}' twice; once is right")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if wrong := out_of_order(self.protections):
            raise ValueError(wrong)
        return self

    @property
    def protected_by(self) -> tuple[str, ...]:
        return tuple(protection.title for protection in self.protections)

    @property
    def audits(self) -> frozenset[str]:
        found = {"canary_audit"} if any(p.audited for p in self.protections) else set()
        return frozenset(found | ({"one_run_audit"} if self.audit_records else set()))

    @property
    def protection_kinds(self) -> tuple[str, ...]:
        return tuple(protection.kind for protection in self.protections)

    def unwatched(self) -> Self:
        return self.model_copy(update={"detectors": ()})

    @property
    def malice_kind(self) -> str:
        return self.malice.kind if self.malice else ""

    @property
    def malice_kinds(self) -> frozenset[str]:
        return frozenset(party.kind for party in (self.malice, self.intruder) if party)

    @property
    def alters(self) -> str:
        told = [party.alters for party in (self.malice, self.intruder) if party]
        return "; ".join(text for text in told if text)

    @property
    def watched(self) -> bool:
        return bool(self.detectors)

    def builds(self, model: ModelSpec) -> ModelSpec:
        """What is trained; a client that pins the architecture has it honest."""
        return model if self.malice is None or self.pin_architecture else self.dictated(model)

    def dictated(self, model: ModelSpec) -> ModelSpec:
        """What the server asks clients to train."""
        return model if self.malice is None else self.malice.architecture(model)

    def opener(self, network: nn.Module, recipe: Recipe) -> Opener | None:
        transport = self.transport
        if transport is None:
            return None
        return partial(transport.opened, setting=self.setting(network, recipe))

    @property
    def transport(self) -> Transport | None:
        """The transport protection listed, if any."""
        return next((p for p in self.protections if isinstance(p, Transport)), None)

    def views(self) -> tuple[View, ...]:
        seen = sights(
            server_position(self.malice),
            self.strategy,
            self.transport,
            intruded=self.intruder is not None,
            open_wire=not self.tls,
        )
        return (*seen, *self.serving.views())

    @property
    def compute_parties(self) -> int:
        return self.transport.compute_parties if self.transport else 0

    @property
    def parallelism(self) -> int:
        return self.clients if self.engine == "fedmi" else 1

    def work(self, recipe: Recipe) -> LocalWork:
        own = {"batch_size": self.batch_size} if self.batch_size else {}
        return LocalWork(
            recipe=recipe.model_copy(update=own),
            epochs=self.local_epochs,
            steps=self.local_steps,
            proximal_mu=self.strategy.proximal_weight,
            sampling=sampling_of(self.protections),
        )

    def setting(
        self,
        network: nn.Module,
        recipe: Recipe,
        records: tuple[int, ...] = (),
        participations: tuple[int, ...] = (),
        audit_seed: Seed | None = None,
    ) -> Setting:
        """What the protections are told; `network` on the meta device."""
        return Setting(
            clients=self.clients,
            asked=sample_size(self.clients, self.fraction),
            rounds=self.rounds,
            min_clients=self.min_clients,
            dropout=self.dropout,
            work=self.work(recipe),
            sends=self.strategy.sends,
            strategy=self.strategy.kind,
            tells_aggregate=self.strategy.implies_aggregate,
            network=network,
            layout={name: tuple(t.shape) for name, t in network.state_dict().items()},
            protections=self.protections,
            records=records,
            participations=participations,
            audit_seed=audit_seed,
        )

    def problems(self, card: Card, model: ModelSpec, recipe: Recipe) -> list[str]:
        try:
            network = self.dictated(model).blueprint(card.shape, card.classes)
        except ValueError as error:
            return [f"{self.malice_kind}: {error}"]
        setting = self.setting(network, recipe)
        found = self.serving.problems(network, card) + [
            f"{protection.title}: {why}"
            for protection in self.protections
            for why in protection.problems(setting)
        ]
        transport = self.transport
        if transport and not transport.server_sees_aggregate and not setting.tells_aggregate:
            found.append(
                f"{transport.title}: the server never sees a mean, so it cannot take a step of "
                f"{self.strategy.kind}; use fedavg, fedprox or fedsgd"
            )
        if self.dropout_stage and not self.dropout:
            found.append(f"dropout_stage = {self.dropout_stage} has no effect: dropout is 0")
        if self.audit_records > card.private_records // 2:
            found.append(
                f"audit_records = {self.audit_records} of {card.private_records} private records; "
                f"at most {card.private_records // 2} would be right"
            )
        if self.malice is not None:
            found += [f"{self.malice.kind}: {why}" for why in self.malice.problems(setting)]
        if self.intruder is not None:
            wrong = self.intruder.problems(card, self.clients)
            found += [f"intruder {self.intruder.kind}: {why}" for why in wrong]
        return found

    def estimate(self, card: Card, model: ModelSpec, recorded_rounds: int) -> Estimate:
        asked = sample_size(self.clients, self.fraction)
        model = self.builds(model)
        found = estimates.estimate(card, model, asked * self.rounds, asked, self.dropout)
        if not self.protections:
            return found
        network = model.blueprint(card.shape, card.classes)
        setting = self.setting(network, self.recipe or Recipe())
        transport = self.transport or Clear(kind="clear", setting=setting)
        return estimates.protected(found, setting, transport)

    def plan(self, job: Job, honest: bool = False) -> Plan:
        """What server and clients agree on; DataError where some client would have no record.

        honest: a malicious server that was refused follows the protocol.
        """
        beyond = sorted(round for round in job.record if not 1 <= round <= self.rounds)
        if beyond:
            raise DeploymentError(
                f"'{self.name}' is to record round {beyond[0]}, but has rounds 1 to {self.rounds}"
            )
        seed = job.seed.child(self.kind)
        recipe = self.recipe or job.recipe
        audit = (job.audit_seed or job.seed.child("audit")).child(self.name)
        private, planted = plant(job.split, self.audit_records, audit.child("records"))
        parts = self.partition.assign(job.split.dealt, self.clients, seed.child("partition"))
        schedule = Schedule(
            seed=seed,
            rounds=self.rounds,
            fraction=self.fraction,
            dropout=self.dropout,
            dropout_stage=self.dropout_stage,
            work=self.work(recipe),
            parts=tuple(kept(part, planted) for part in parts),
        )
        malice = None if honest else self.malice
        model = job.model if honest else self.dictated(job.model)
        honest_state = job.model.blueprint(private.shape, job.split.classes).state_dict()
        agreed = {name: tuple(t.shape) for name, t in honest_state.items()}
        network = model.blueprint(private.shape, job.split.classes)
        records = tuple(len(part) for part in schedule.parts)
        setting = self.setting(network, recipe, records, schedule.participations, audit)
        if wrong := [w for p in self.protections for w in p.problems(setting)]:
            raise DeploymentError(f"'{self.name}': " + "; ".join(wrong))
        plan = Plan(
            name=self.name,
            schedule=schedule,
            strategy=self.strategy,
            model=model,
            model_seed=job.seed.child("model"),
            classes=job.split.classes,
            private=private,
            setting=setting,
            min_clients=self.min_clients,
            skip_failed=self.failed_round == "skip",
            malice=malice,
            server=server_position(self.malice),
            pinned=agreed if self.pin_architecture else None,
            public=job.split.public,
            encrypted=self.tls,
            record=job.record,
            confide=job.confide,
            planted=with_gradients(planted, setting),
            directory=job.directory,
            agreed=agreed,
            detectors=self.detectors,
            intruder=self.intruder,
            start=job.start,
        )
        if self.intruder and (why := self.intruder.misplaced(plan.intruder_labels, plan.classes)):
            raise DeploymentError(f"'{self.name}': intruder {self.intruder.kind}: {why}")
        return plan

    def train(self, job: Job) -> Outcome:
        if self.engine == "flower":
            from fedmi.deployments.federated.stock import train_on_stock_flower

            return train_on_stock_flower(self, job)
        started = time.perf_counter()
        with watched() as memory:
            plan, (trained, workers_bytes) = self.run(
                job, lambda plan: simulate(plan, job.workers, job.progress)
            )
        seconds = time.perf_counter() - started
        return outcome(plan, trained, job, seconds, memory.peak_bytes + workers_bytes)

    def run(self, job: Job, simulated: Callable[[Plan], T]) -> tuple[Plan, T]:
        """The plan that was followed in the end, and what it gave."""
        plan = self.plan(job)
        try:
            return plan, simulated(plan)
        except DeploymentError as error:
            if plan.pinned is None or ArchitectureRefusedError.__name__ not in str(error):
                raise
            # all clients say the same; the first one's words will do
            refusal = str(error).partition(f"{ArchitectureRefusedError.__name__}: ")[2]
            refusal = refusal.partition(";")[0]
        honest = replace(self.plan(job, honest=True), refusal=refusal)
        return honest, simulated(honest)
