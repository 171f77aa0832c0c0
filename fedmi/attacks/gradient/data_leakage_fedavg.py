"""Data Leakage in Federated Averaging: several epochs, the order of the records unknown."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.epochs import (
    OrderInvariance,
    Summary,
    Unrolled,
    merged,
    record_of,
    unrolled,
)
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.penalties import Penalty, TotalVariation
from fedmi.attacks.engine.unknowns import Unknown
from fedmi.exposure.words import Fact

NO_EPOCHS = "no_epochs_under_poisson_sampling"


class DataLeakageFedAvg(GradientMatching):
    """Records found by simulating all epochs of a client, each on unknowns of its own.

    Which records shared a batch is not known and differs from epoch to epoch. So each of the E
    epochs gets its own copy X_e of all n records, its labels dealt at random over its batches, and

        distance(simulated, observed) / unit + tv_weight TV(x)
            + prior_weight mean_ef |g(X_e) - g(X_f)|^2

    is minimised by Adam, g a summary that no order changes (`prior`). In the end the images of
    every epoch are matched to the first's, label by label, by an assignment of least squared
    distance, and averaged. A client's single step an epoch leaves no order to find, and a granted
    batch order tells it: then there is one unknown a record, as in `inverting_gradients`. So it is
    under Poisson sampling, which has no epochs (flag `no_epochs_under_poisson_sampling`). In an
    average of several clients each has its own epochs. Label counts are recovered where they are
    not granted.

    Threat model: honest-but-curious, sees one update and the model it started from, and knows the
    numbers of epochs and records, the batch size and the learning rate. Samples [n, C, H, W].
    `unit` is the distance of a grey image, so that weights serve all networks. Other than in the
    paper's runs, layers weigh alike (theirs fall by e a layer: `layer_decay = 1`) and x is kept in
    [0, 1] (theirs: by a penalty).
    Raises AttackError if an observation is missing, or granted labels do not fit it.
    """

    kind: Literal["data_leakage_fedavg"] = "data_leakage_fedavg"
    steps: int = Field(default=400, ge=1, le=1_000_000, description="evaluations of the loss")
    learning_rate: float = Field(default=0.06, gt=0, le=10, description="Adam's step, in pixels")
    distance: Literal["l2", "l1", "cosine"] = Field(default="l2", description="of updates")
    layer_decay: float = Field(
        default=0.0, ge=0, le=20, description="squares of layer l, from 0, weigh exp(-decay l)"
    )
    tv_weight: float = Field(default=0.01, ge=0, description="weight of the total variation")
    prior: Summary = Field(
        default="mean",
        description="what epochs agree in: the mean or maximum of their images, or of a random "
        "convolution of them",
    )
    prior_weight: float = Field(default=1.0, ge=0, description="weight of that agreement; 0 = off")
    label_orders: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="ways to deal the labels that a short search tries; 1 in the paper, more pays "
        "for averages of clients",
    )

    paper: ClassVar[str] = (
        "Dimitrov, Balunovic, Konstantinov, Vechev: Data Leakage in Federated Averaging, TMLR 2022"
    )
    channels: ClassVar = UPDATES

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign="none",
            decay="cosine",
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        found: list[Penalty] = []
        if self.tv_weight:
            found.append(TotalVariation(self.tv_weight))
        plan = evidence.plan
        if self.prior_weight and isinstance(plan, Unrolled) and plan.copied:
            seed = case.seed.child("order_invariance")
            found.append(OrderInvariance(self.prior_weight, plan, self.prior, seed))
        return tuple(found)

    def matching(self, case: Case, evidence: Evidence) -> Matching:
        return replace(super().matching(case, evidence), distance=self.distance)

    def planned(self, case: Case, evidence: Evidence) -> Evidence:
        """With a plan that gives each epoch its own unknowns, and layers weighed."""
        evidence = super().planned(case, self._weighed(evidence))
        if Fact.BATCH_ORDER in case.knowledge.facts or not self.simulates(evidence):
            return evidence
        if case.knowledge.work is not None and case.knowledge.work.sampling == "poisson":
            return replace(evidence, flags=evidence.flags | {NO_EPOCHS})
        return replace(evidence, plan=unrolled(evidence.plan))

    def dealt(self, case: Case, evidence: Evidence, labels: Tensor, number: int) -> Tensor:
        """The labels [unknowns]: those of the first epochs dealt anew in each later one."""
        plan = evidence.plan
        if not isinstance(plan, Unrolled):
            return super().dealt(case, evidence, labels, number)
        first = super().dealt(case, replace(evidence, plan=plan.first), labels, number)
        return first[record_of(plan, case.seed.child(evidence.target.id, "epochs", number))]

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        found, plan = super().answer(problem, points, losses, unknown), problem.evidence.plan
        if not isinstance(plan, Unrolled):
            return found
        assert found.samples is not None
        assert found.labels is not None
        samples, labels = merged(found.samples, found.labels, plan)
        sure = found.confidence[: len(samples)]
        return replace(found, samples=samples, labels=labels, confidence=sure)

    def _weighed(self, evidence: Evidence) -> Evidence:
        """The weight of a layer's squares, as the scale of its entries in the support."""
        if not self.layer_decay:
            return evidence
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in evidence.descent))
        seen, scaled = evidence.support or {}, dict[str, Tensor]()
        for name, part in evidence.descent.items():
            depth = layers.index(name.rpartition(".")[0])
            whole = seen.get(name, torch.ones_like(part)).to(part.dtype)
            scaled[name] = whole * math.exp(-self.layer_decay * depth / 2)
        return replace(evidence, support=scaled)
