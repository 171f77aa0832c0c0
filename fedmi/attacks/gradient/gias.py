"""GIAS: gradient inversion in the latent space of a generator, and then in its weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.descent import Schedule, minimise
from fedmi.attacks.engine.evidence import UPDATES
from fedmi.attacks.engine.generative import GenerativeMatching, alone
from fedmi.attacks.engine.gradient_matching import Progress
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.unknowns import Generated

COPIES = 8
"""Tensors of the size of the weights that are moved: themselves, Adam's, slopes, the best."""


class GIAS(GenerativeMatching):
    """Records found as images of a generator G: first its input, then its weights are searched.

    Stage 1: z <- argmin (1 - cos(update(G(z)), observed)) / unit + tv_weight TV(G(z))
    + latent_weight mean z^2 / 2 by Adam, the step size falling tenfold at 3/8, 5/8 and 7/8.
    Stage 2, from the best z: the weights of G, a copy for each record, by the same loss and
    schedule, z being held. G is trained on the public images alone, see `prior`. Labels, batch
    order and local steps as in `inverting_gradients`.

    `stages = "latent"` stops after the first, whose images cannot leave what G makes: blurred, but
    what is left where updates are noisy or the network is trained, and pixel search gives noise.
    The second leaves that range; it sharpens where the update says enough, and there a search of
    pixels with total variation is about as good. The paper's G is a GAN that is searched for
    thousands of steps; ours fits a few hundred images in seconds.

    Threat model: honest-but-curious, sees one update and the model it started from, and has images
    of the same kind as the private ones. Raises AttackError as `GenerativeMatching` does, if an
    observation is missing, or if granted labels do not fit it.
    """

    kind: Literal["gias"] = "gias"
    stages: Literal["latent", "both"] = Field(
        default="both", description="search of z alone, or of z and then of the weights"
    )
    steps: int = Field(default=200, ge=1, le=1_000_000, description="evaluations, searching z")
    restarts: int = Field(default=4, ge=1, le=1024, description="random starts of z a target")
    weight_steps: int = Field(
        default=200, ge=1, le=1_000_000, description="evaluations, searching the weights"
    )
    learning_rate: float = Field(default=0.15, gt=0, le=10, description="Adam's step in z")
    weight_rate: float = Field(default=1e-3, gt=0, le=10, description="Adam's step in the weights")

    paper: ClassVar[str] = (
        "Jeon, Kim, Lee, Oh, Ok: Gradient Inversion with Generative Image Prior, NeurIPS 2021"
    )
    channels: ClassVar = UPDATES

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign="none",
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Stage 1, and of each problem's best restart stage 2."""
        if self.stages == "latent" or schedule != self.schedule():  # shorter: it looks for an order
            return super().search(case, matching, problems, schedule, report)
        share = self.steps / (self.steps + self.weight_steps)
        points, losses = super().search(
            case, matching, problems, schedule, lambda done: report(share * done)
        )
        assert isinstance(matching.unknown, Generated)
        points = matching.unknown.weighted(points)
        every, best = torch.arange(len(problems), device=points.device), losses.argmin(1)
        follow = alone(problems, best.tolist(), points[every, best])
        points[every, best], losses[every, best] = minimise(
            self.objective(case, replace(matching, coupling=None), follow),
            points[every, best],
            replace(schedule, steps=self.weight_steps, learning_rate=self.weight_rate),
            progress=lambda done: report(share + (1 - share) * done),
        )
        return points, losses

    def fitting(self, matching: Matching, problem: Problem) -> int:
        assert isinstance(matching.unknown, Generated)
        own = sum(weight.numel() for weight in matching.unknown.generator.parameters())
        need = 4 * COPIES * own * problem.evidence.plan.records * len(problem.starts)
        room = self.memory_mb * 2**20
        return max(1, int(room / (room / super().fitting(matching, problem) + need)))
