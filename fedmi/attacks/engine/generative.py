"""What attacks that search in a generator's latent space share."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Coupling, Problem
from fedmi.attacks.engine.penalties import Penalty, TotalVariation
from fedmi.attacks.engine.prior import Training, prior_of, public_images
from fedmi.attacks.engine.unknowns import Generated, Unknown
from fedmi.exposure.words import Fact

POOR = 15.0
"""dB on held-out public images below which a generator is told to be poor."""


@dataclass(frozen=True)
class LatentNorm:
    """weight times the mean of z^2 / 2: -log p(z) a coordinate, for z ~ N(0, I)."""

    weight: float
    latent: int

    def __call__(self, points: Tensor) -> Tensor:
        """[problems, restarts, n, latent + ...] -> [problems, restarts]."""
        return self.weight / 2 * points[..., : self.latent].square().mean((-1, -2))


class GenerativeMatching(GradientMatching):
    """Matching updates by the images of a generator that has seen public ones only.

    Flag `poor_generator` with its PSNR on held-out public images, where that is below 15 dB.
    Raises AttackError where public images are missing, too few, or of another shape.
    """

    prior: Training = Field(default=Training(), description="the generator and its training")
    latent_weight: float = Field(
        default=0.02, ge=0, description="of the mean of z^2 / 2, in units of the distance"
    )
    tv_weight: float = Field(default=0.03, ge=0, description="of TV, in units of the distance")
    start_std: float = Field(default=0.3, ge=0, le=10, description="z starts from N(0, its square)")

    needs: ClassVar = GradientMatching.needs | {Fact.PUBLIC_DATA}

    def unknown(self, case: Case, evidence: Evidence) -> Unknown:
        prior = prior_of(case, self.prior)
        poor = prior.card.psnr < POOR
        flags = {f"poor_generator: {prior.card.psnr:.1f} dB"} if poor else set[str]()
        generator = deepcopy(prior.generator).to(self.torch_device, self.dtype)
        return Generated(generator, self.prior.latent, frozenset(flags))

    def coupling(self, case: Case, evidence: Evidence) -> Coupling | None:
        return LatentNorm(self.latent_weight, self.prior.latent) if self.latent_weight else None

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        return (TotalVariation(self.tv_weight),) if self.tv_weight else ()

    def start(self, case: Case, evidence: Evidence, number: int) -> Tensor:
        """[n, latent], drawn for this target and restart."""
        rng = case.seed.child(evidence.target.id, number).torch()
        shape = (evidence.plan.records, self.prior.latent)
        return self.start_std * torch.randn(shape, generator=rng)

    def invert(self, case: Case, seen: Sequence[Evidence]) -> tuple[Reconstruction, ...]:
        public_images(case)
        return super().invert(case, seen)

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        found = super().answer(problem, points, losses, unknown)
        assert isinstance(unknown, Generated)
        return replace(found, flags=found.flags | unknown.flags)


def alone(problems: Sequence[Problem], chosen: Sequence[int], starts: Tensor) -> list[Problem]:
    """Each problem with the labels of one of its restarts only, and a start [n, ...] of its own."""
    return [
        replace(problem, labels=problem.labels[one : one + 1], starts=start[None].cpu())
        for problem, one, start in zip(problems, chosen, starts, strict=True)
    ]
