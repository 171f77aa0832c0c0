"""GGL: a generator's input found by evolution, without a slope."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.cma_es import Evolution, evolve
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.generative import GenerativeMatching
from fedmi.attacks.engine.gradient_matching import Progress
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.prior import Training

MOST_FULL = 32
"""Coordinates up to which "auto" adapts the whole covariance."""


class GGL(GenerativeMatching):
    """Records found as images G(z) of a generator, z by CMA-ES.

    Minimises D(T(update(G(z))), observed) + latent_weight mean z^2 / 2 over z of all records of a
    target together. D: 1 - cos, which clipping does not change, or the squared distance; both in
    units of a grey image's. T: what the deployment is known to do to updates: only what pruning and
    Soteria left is compared, and signs with signs. One distribution a target, whose
    candidates are evaluated as one batch. G is trained on the public images alone, see `prior`.
    Labels are granted, or recovered first (iDLG, of one record).

    No slope is taken, so that `steps` x `population` first-order evaluations do, and networks
    whose second derivatives vanish are as good as others; images cannot leave what G can make.
    The paper's G is a class-conditional GAN; its loss D is the squared distance, its candidates 50
    of 500 to 1,000 generations.

    Threat model: honest-but-curious, sees one update and the model it started from, and has images
    of the same kind as the private ones. Raises AttackError as `GenerativeMatching` does, if an
    observation is missing, or if granted labels do not fit it.
    """

    kind: Literal["ggl"] = "ggl"
    prior: Training = Field(
        default=Training(latent=64), description="the generator and its training"
    )
    latent_weight: float = Field(
        default=0.05, ge=0, description="of the mean of z^2 / 2, in units of the distance"
    )
    steps: int = Field(default=200, ge=2, le=1_000_000, description="generations")
    population: int = Field(default=50, ge=4, le=4096, description="candidates a generation")
    sigma: float = Field(default=0.3, gt=0, le=10, description="first step size, in z")
    covariance: Literal["auto", "full", "diagonal"] = Field(
        default="auto", description="what CMA-ES adapts; auto: full up to 32 coordinates"
    )
    distance: Literal["cosine", "l2"] = Field(default="cosine", description="D")

    paper: ClassVar[str] = (
        "Li, Zhang, Liu, Liu: Auditing Privacy Defenses in Federated Learning via Generative "
        "Gradient Leakage, CVPR 2022"
    )
    channels: ClassVar = UPDATES

    @model_validator(mode="after")
    def _runs_to_its_end(self) -> "GGL":
        if self.patience or self.stop_below:
            raise ValueError("ggl runs all its generations; leave out patience and stop_below")
        return self

    def schedule(self) -> Schedule:
        """Of which only the number of steps counts."""
        return Schedule(self.steps, self.sigma)

    def matching(self, case: Case, evidence: Evidence) -> Matching:
        return replace(super().matching(case, evidence), distance=self.distance)

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        """A distribution for every restart, whose candidates are one batch.

        Each is evaluated apart from the others: in a larger batch losses round otherwise, two
        candidates change places, and from there on the search goes elsewhere.
        """
        tries, shape = len(problems[0].starts), problems[0].starts.shape[1:]
        crowds = [self._crowd(problem, one) for problem in problems for one in range(tries)]
        objectives = [self.objective(case, matching, [crowd]) for crowd in crowds]

        def value(candidates: Tensor) -> Tensor:
            points = candidates.view(*candidates.shape[:2], *shape)
            points = points.to(self.torch_device, self.dtype)
            pairs = zip(objectives, points, strict=True)
            return torch.stack([objective.losses(own) for objective, own in pairs])

        found, losses = evolve(value, self._evolution(problems), schedule.steps, report)
        points = found.view(len(problems), tries, *shape).to(self.torch_device, self.dtype)
        return points, losses.view(len(problems), tries)

    def _crowd(self, problem: Problem, one: int) -> Problem:
        """A problem whose restarts are the candidates of one of the problem's own."""
        labels, start = problem.labels[one], problem.starts[one]
        many = (self.population, *[-1] * labels.dim()), (self.population, *[-1] * start.dim())
        return replace(problem, labels=labels.expand(many[0]), starts=start.expand(many[1]))

    def _evolution(self, problems: Sequence[Problem]) -> Evolution:
        means = torch.cat([problem.starts for problem in problems]).flatten(1)
        draws = [
            problem.seed.child("candidates", one).torch()
            for problem in problems
            for one in range(len(problem.starts))
        ]
        small = means.shape[1] <= MOST_FULL
        diagonal = self.covariance == "diagonal" or (self.covariance == "auto" and not small)
        return Evolution(means, self.sigma, self.population, draws, diagonal)

    def fitting(self, matching: Matching, problem: Problem) -> int:
        return max(1, super().fitting(matching, problem) // self.population)
