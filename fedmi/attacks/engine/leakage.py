"""Deep leakage: what DLG and iDLG share, squared distance and L-BFGS on free pixels."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.descent import Objective, Schedule
from fedmi.attacks.engine.distances import Distance
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.parts import Progress
from fedmi.attacks.engine.unknowns import Pixels, PixelsAndLabels, Unknown

UNSOLVED, SEVERAL = "not_converged", "several_records"


class DeepLeakage(GradientMatching):
    """Records of which |g' - g|^2 / |g|^2 is least, over all parameters at once; see `DLG`.

    Confidence is minus the loss in units of a grey image's, which says more of the pixels: that of
    |g|^2 is 1e-6 for a grey image already where the last layer holds most of the gradient.
    """

    steps: int = Field(default=800, ge=1, le=1_000_000, description="evaluations of the loss")
    optimizer: Literal["lbfgs", "adam"] = Field(default="lbfgs", description="how it goes down")
    learning_rate: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="first length tried by L-BFGS; Adam's step, in pixels",
    )
    history: int = Field(
        default=800, ge=1, le=10_000, description="pairs that L-BFGS remembers, at most `steps`"
    )
    start_std: float = Field(
        default=0.25,
        ge=0,
        le=10,
        description='spread of the start about mid-grey, where init = "normal"; DLG: 1 about 0',
    )
    precision: Literal["float32", "float64"] = Field(default="float64", description="of the search")
    patience: int = Field(
        default=60,
        ge=0,
        description="steps without improvement that end a target; 0 = off",
    )
    stop_below: float = Field(
        default=1e-13, ge=0, description="loss at which a target is solved; 1e-15 is rounding"
    )
    solved: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description=f"final loss, in units of a grey image's, above which a target is {UNSOLVED}",
    )

    distance_kind: ClassVar[Distance] = "l2"

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign="none",
            decay="none",
            optimizer=self.optimizer,
            history=min(self.history, self.steps),
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def unit(self) -> Literal["grey", "absolute"]:
        return "absolute"

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Losses are in units of those of a grey image with the labels that were found."""
        points, losses = super().search(case, matching, problems, schedule, report)
        grey = _greyed(matching.unknown, points).flatten(0, 1)
        there = self.objective(case, matching, problems).losses(grey).view_as(losses)
        found = there.gather(1, losses.argmin(1, keepdim=True))
        return points, losses / found.clamp_min(torch.finfo(found.dtype).tiny)

    def objective(self, case: Case, matching: Matching, problems: Sequence[Problem]) -> Objective:
        """In units of the observed update's energy: the same threshold for every network."""
        found = matching.objective(problems)
        aimed = found.known[0]
        energy = torch.stack([p.flatten(1).square().sum(1) for p in aimed.values()]).sum(0)
        return replace(found, unit=energy.clamp_min(torch.finfo(energy.dtype).tiny))

    def unknown(self, case: Case, evidence: Evidence) -> Unknown:
        return Pixels(boxed=False)

    def image_start(self, case: Case, evidence: Evidence, number: int, records: int) -> Tensor:
        if self.init != "normal":
            return super().image_start(case, evidence, number, records)
        rng = case.seed.child(evidence.target.id, number).torch()
        drawn = torch.randn(records, *case.knowledge.input_shape, generator=rng)
        return 0.5 + self.start_std * drawn

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        found = super().answer(problem, points, losses, unknown)
        unsolved = {UNSOLVED} if not losses.min() <= self.solved else set()
        several = {SEVERAL} if problem.evidence.records > 1 else set()
        return replace(found, flags=found.flags | unsolved | several)

    def fitting(self, matching: Matching, problem: Problem) -> int:
        """Counts what L-BFGS remembers as well."""
        budget, wide = self.memory_mb * 2**20, torch.finfo(self.dtype).bits // 8
        plain = budget / super().fitting(matching, problem)
        history = min(self.history, self.steps) * (self.optimizer == "lbfgs")
        pairs = 2 * wide * history * (problem.starts.numel() + history * len(problem.starts))
        return max(1, int(budget / (plain + pairs)))


def _greyed(unknown: Unknown, points: Tensor) -> Tensor:
    """The same points with every pixel 0.5."""
    pixels = prod(unknown.shape) if isinstance(unknown, PixelsAndLabels) else None
    grey = points.clone()
    grey[..., :pixels] = 0.5
    return grey
