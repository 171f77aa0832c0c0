"""Gradient matching with smooth images and, where they are granted, batch statistics."""

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.penalties import BatchStatisticsPenalty, Penalty, TotalVariation
from fedmi.exposure.words import Fact


class SmoothMatching(GradientMatching):
    """The total variation, and R_BN, the distance of the batch's normalisation statistics from
    those that the client sent, beside what a subclass adds (`further`).

    Flag `bn_statistics_absent`: they are granted, and the update has none to match.
    """

    learning_rate: float = Field(default=0.05, gt=0, le=10, description="Adam's step, in pixels")
    tv_weight: float = Field(default=0.1, ge=0, description="weight of TV, in units of `tv_unit`")
    tv_unit: Literal["grey", "absolute"] = Field(
        default="grey", description="the distance of a grey image, or 1 as in papers"
    )
    bn_weight: float = Field(
        default=1.0, ge=0, description="weight of granted batch-normalisation statistics"
    )

    uses: ClassVar = GradientMatching.uses | {Fact.BN_STATISTICS}
    bn_relative: ClassVar[bool] = True
    """Whether R_BN is in the unit of the distance; see `Penalty`."""

    def further(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        """What else is minimised."""
        return ()

    def unit(self) -> Literal["grey", "absolute"]:
        return self.tv_unit

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        smooth = (TotalVariation(self.tv_weight),) if self.tv_weight else ()
        told = statistics_penalty(self, case, evidence, self.bn_weight, relative=self.bn_relative)
        return (*smooth, *self.further(case, evidence), *told)

    def problem(self, case: Case, evidence: Evidence) -> Problem:
        return super().problem(case, statistics_told(self, case, evidence, self.bn_weight))


def statistics_penalty(
    attack: GradientMatching,
    case: Case,
    evidence: Evidence,
    weight: float,
    *,
    relative: bool = True,
) -> tuple[Penalty, ...]:
    """That of batch statistics, where they are granted and the update carries them.

    Of one client, or of an aggregate that is simulated: the average of several clients' statistics
    is not that of their records in one batch. relative: see `Penalty`; its own unit is the square
    of the statistics, so that a grey image's is about 1.
    """
    work, plan = case.knowledge.work, evidence.plan
    if Fact.BN_STATISTICS not in case.knowledge.facts or not weight or work is None:
        return ()
    if attack.simulates(evidence):
        steps = tuple(len(steps) for steps in plan.parties)
        return (BatchStatisticsPenalty(weight, plan.shares, steps, True, relative),)
    if len(evidence.target.clients) > 1:
        return ()
    steps = (1 if evidence.of_gradient else len(work.batch_sizes(evidence.records)),)
    return (BatchStatisticsPenalty(weight, (1.0,), steps, False, relative),)


def statistics_told(
    attack: GradientMatching, case: Case, evidence: Evidence, weight: float
) -> Evidence:
    """With the flag `bn_statistics_absent` where they are granted and there is nothing to match.

    That is where a client normalised by running statistics (eval mode), or the model does not
    normalise at all, the update carries none, or they are an average of several clients'.
    """
    if Fact.BN_STATISTICS not in case.knowledge.facts or not weight:
        return evidence
    if statistics_penalty(attack, case, evidence, weight) and _sent(case, evidence):
        return evidence
    return replace(evidence, flags=evidence.flags | {"bn_statistics_absent"})


def _sent(case: Case, evidence: Evidence) -> bool:
    """Whether the update carries statistics of batches that its gradients were taken with."""
    build, work = case.knowledge.build, case.knowledge.work
    if build is None or work is None or work.recipe.mode != "train":
        return False
    return any(
        f"{name}.running_mean" in evidence.buffers
        for name, layer in build().named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    )
