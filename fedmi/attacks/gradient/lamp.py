"""LAMP: gradient matching in turn with rearrangements that a language model likes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.descent import Objective, Schedule, minimise
from fedmi.attacks.engine.embedded import WrittenText
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.language_prior import LanguagePrior
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.parts import Progress, within
from fedmi.attacks.engine.penalties import Penalty
from fedmi.attacks.engine.text_matching import TextMatching
from fedmi.attacks.engine.text_penalties import LayerAbsolute, VectorLength
from fedmi.attacks.engine.turns import Turn
from fedmi.exposure.words import Fact


class LAMP(TextMatching):
    """Sentences found by matching the update layer by layer, and by what public sentences are like.

    Minimises the mean over tensors of 1 - cos(found, wanted) (`loss = "l2_l1"`: TAG's distance) and
    `length_weight` times how far the vectors' mean length is from the vocabulary's. It starts from
    the best of `start_candidates` draws. `turns` times on the way, evenly spread, each sentence is
    rearranged (two tokens swapped, one or a run moved, a prefix put last, tokens exchanged with
    another sentence) in `rearrangements` random ways, and the one of least

        loss / loss before + lm_weight x sum over sentences, mean of -log p(token | two before it)

    is gone on with. p are trigrams of the granted public sentences (`LanguagePrior`); the paper has
    a GPT-2, a loss that is not measured in what it was, no exchange between sentences, Adam, and
    500 draws and 2000 steps with 24 turns of 200 rearrangements. From `init = "place_rows"`, tokens
    keep their places and are only exchanged between sentences. See `TextMatching` for lengths,
    labels and what is returned: samples [n, 1, 1, length] of ids.

    Threat model: honest-but-curious, sees one update and the model it started from, and has
    sentences of its own. Raises AttackError if the model is no text classifier.
    """

    kind: Literal["lamp"] = "lamp"
    paper: ClassVar[str] = (
        "Balunovic, Dimitrov, Jovanovic, Vechev: LAMP: Extracting Text from Gradients with "
        "Language Model Priors. NeurIPS 2022"
    )

    steps: int = Field(default=400, ge=1, le=1_000_000, description="evaluations of the loss")
    optimizer: Literal["adam", "lbfgs"] = Field(
        default="lbfgs", description="L-BFGS, whose step is 1, or Adam as in the paper"
    )
    loss: Literal["cosine", "l2_l1"] = Field(default="cosine", description="distance of updates")
    alpha: float = Field(default=0.01, ge=0, le=1e3, description="weight of L1 in l2_l1")
    length_weight: float = Field(default=0.01, ge=0, le=1e3, description="of the vectors' length")
    lm_weight: float = Field(default=0.2, ge=0, le=1e3, description="of the language model")
    start_candidates: int = Field(default=8, ge=1, le=10_000, description="random starts to choose")
    turns: int = Field(default=4, ge=0, le=1000, description="times that sentences are rearranged")
    rearrangements: int = Field(default=32, ge=1, le=10_000, description="ways tried a sentence")

    needs: ClassVar = TextMatching.needs | {Fact.PUBLIC_DATA}
    uses: ClassVar = TextMatching.uses - {Fact.PUBLIC_DATA}

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        words = self.vocabulary(case, evidence)
        own: list[Penalty] = [VectorLength(self.length_weight, words.length)]
        if self.loss == "l2_l1":
            own.append(LayerAbsolute(self.alpha, False, self.simulates(evidence)))
        return (*super().penalties(case, evidence), *own)

    def matching(self, case: Case, evidence: Evidence) -> Matching:
        kind: Literal["l2", "layer_cosine"] = "l2" if self.loss == "l2_l1" else "layer_cosine"
        return replace(super().matching(case, evidence), distance=kind)

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        objective = self.objective(case, matching, problems)
        points = self._chosen(objective, problems)
        rearranging, losses = self._turn(case, matching, objective, problems), points.new_zeros(0)
        parts = self.turns + 1
        for turn in range(parts):
            part = self._part(schedule, turn, parts)
            inner = within(report, turn / parts, 1 / parts)
            points, losses = minimise(objective, points, part, progress=inner)
            if turn < self.turns:
                points = rearranging.better(points, losses, problems, turn)
        every = (len(problems), -1)
        found = points.view(*every, *points.shape[1:])
        if self.init == "place_rows":
            return self.settled(objective, matching, problems, found)
        return found, losses.view(*every)

    def _part(self, schedule: Schedule, turn: int, parts: int) -> Schedule:
        """A stretch between two turns; Adam's step falls along half a cosine over all of them."""
        steps = max(1, schedule.steps // parts)
        rate = schedule.learning_rate
        if schedule.optimizer == "adam":
            rate = schedule.rate(turn * steps)
        return replace(schedule, steps=steps, learning_rate=rate, decay="none")

    def _chosen(self, objective: Objective, problems: Sequence[Problem]) -> Tensor:
        """The best of the random starts, for each restart of each problem."""
        first = torch.cat([problem.starts for problem in problems]).to(self.torch_device)
        points = first.to(self.dtype)
        losses = objective.losses(points)
        for number in range(1, self.start_candidates):
            drawn = torch.cat([_drawn(problem, number) for problem in problems]).to(points)
            found = objective.losses(drawn)
            better = (found < losses).view(-1, *[1] * (points.dim() - 1))
            points, losses = torch.where(better, drawn, points), torch.minimum(found, losses)
        return points

    def _turn(
        self, case: Case, matching: Matching, objective: Objective, problems: Sequence[Problem]
    ) -> Turn:
        assert isinstance(matching.unknown, WrittenText)
        if case.knowledge.public is None:
            raise AttackError("lamp needs public sentences: grant the fact 'public_data'")
        prior = LanguagePrior.of(case.knowledge.public[0], len(matching.unknown.words.tokens))
        allowed = [self.allowed(problem.evidence) for problem in problems]
        options = (self.lm_weight, self.rearrangements, self.init == "normal")
        return Turn(objective, prior, matching.unknown, allowed, *options)


def _drawn(problem: Problem, number: int) -> Tensor:
    """Another random start for each restart."""
    rng = problem.seed.child("start", number).torch()
    return torch.randn(problem.starts.shape, generator=rng)
