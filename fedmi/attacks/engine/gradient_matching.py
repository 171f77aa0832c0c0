"""Attacks that search for records whose update is the observed one: what they all share."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine import adaptive
from fedmi.attacks.engine.allocation import freed_memory_kept
from fedmi.attacks.engine.assumed import Assumed
from fedmi.attacks.engine.batching import bytes_per_problem, chunks
from fedmi.attacks.engine.dealing import dealt, doubted, ordered
from fedmi.attacks.engine.descent import Objective, Schedule, minimise
from fedmi.attacks.engine.distances import Distance
from fedmi.attacks.engine.evidence import MUTE, AttackError, Evidence, blind, read
from fedmi.attacks.engine.labels import (
    LabelMethod,
    RecordsDoNotFit,
    granted,
    guessed,
    recover,
    silent,
    unfit,
)
from fedmi.attacks.engine.matching import Coupling, Matching, Problem
from fedmi.attacks.engine.network import load
from fedmi.attacks.engine.parts import Progress, at_home, diverged, few, risen, unknowable, within
from fedmi.attacks.engine.penalties import Penalty
from fedmi.attacks.engine.plan import Plan, one_step
from fedmi.attacks.engine.protected import names
from fedmi.attacks.engine.starts import Init, image_start
from fedmi.attacks.engine.unknowns import Pixels, Unknown
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.words import Fact

__all__ = ["GradientMatching", "Progress"]

SCOUTING = 5
"""A search among label orders takes a fifth of the steps."""

Alike = tuple[torch.Size, tuple[tuple[int, Plan], ...]]
"""Shape of the starts, and round and plan of all that a problem is matched to; problems that share
them are one batch."""


class GradientMatching(Attack):
    """What every attack that matches updates can be asked.

    A subclass says how it goes down (`schedule`), what it compares by (`distance`), what else it
    minimises (`penalties`), what it moves (`unknown`, `start`) and how that is read in the end
    (`answer`). All targets and restarts of one round and plan are one batch, chunked to
    `memory_mb`; the best iterate of the best restart is chosen by the attack's own loss.
    """

    steps: int = Field(default=600, ge=1, le=1_000_000, description="evaluations of the loss")
    restarts: int = Field(default=1, ge=1, le=1024, description="random starts a target")
    init: Init = Field(
        default="normal",
        description="start: N(0.5, 0.25) clamped, U(0, 1), 0.5 everywhere, or a random 4x4 tile "
        "repeated",
    )
    local_simulation: bool = Field(
        default=True, description="simulate local steps; off: read the update as one gradient"
    )
    label_recovery: LabelMethod = Field(
        default="auto", description="how labels that are not granted are recovered first"
    )
    label_orders: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="ways to deal the labels over the local steps that a short search tries, where "
        "the order is not known",
    )
    adaptive: bool = Field(
        default=True, description="leave out of matching what a known protection has destroyed"
    )
    assume: Assumed = Field(default=Assumed(), description="what it takes the training to be")
    patience: int = Field(
        default=0, ge=0, description="steps without improvement after which a target stops; 0 = off"
    )
    stop_below: float = Field(default=0.0, ge=0, description="loss at which a target is solved")
    precision: Literal["float32", "float64"] = Field(default="float32", description="of the search")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where it runs; auto = a GPU if there is one"
    )
    compile: bool = Field(
        default=False, description="torch.compile: pays from some thousands of steps"
    )
    memory_mb: int = Field(default=1024, ge=16, description="memory one batch of targets may take")

    needs: ClassVar = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING})
    uses: ClassVar = frozenset({Fact.LABELS, Fact.BATCH_ORDER, Fact.PUBLIC_DATA})

    distance_kind: ClassVar[Distance] = "cosine"

    @model_validator(mode="after")
    def _compiled_runs_to_its_end(self) -> "GradientMatching":
        if self.compile and (self.patience or self.stop_below):
            raise ValueError(
                "compile = true runs every step for all targets; leave out patience and stop_below"
            )
        return self

    @abstractmethod
    def schedule(self) -> Schedule:
        """How the search goes down."""

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        """What is minimised beside the distance, for a group of alike targets."""
        return ()

    def unknown(self, case: Case, evidence: Evidence) -> Unknown:
        """What is moved, for a group of alike targets."""
        return Pixels()

    def coupling(self, case: Case, evidence: Evidence) -> Coupling | None:
        """What restarts of a target have to do with one another."""
        return None

    def unit(self) -> Literal["grey", "absolute"]:
        """What the distance is measured in."""
        return "grey"

    def labels_of(self, case: Case, evidence: Evidence) -> Tensor:
        """The labels it searches with, [n]: granted, recovered first, or guessed where the last
        layer says nothing."""
        told = granted(case, evidence)
        if told is not None:
            return told
        if silent(case, evidence):
            return guessed(case, evidence)
        return recover(case, evidence, self.label_recovery)[0]

    def planned(self, case: Case, evidence: Evidence) -> Evidence:
        """The evidence with the plan that is simulated."""
        if self.simulates(evidence):
            return evidence
        return replace(evidence, plan=one_step(evidence.records))

    def start(self, case: Case, evidence: Evidence, number: int) -> Tensor:
        """Where a restart starts: a point of the unknown."""
        return self.image_start(case, evidence, number, evidence.plan.records)

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        """The target's answer from where its restarts ended; points [restarts, ...]."""
        winner = int(losses.argmin())
        samples, labels = unknown.decode(points[winner], problem.labels[winner])
        return Reconstruction(
            target=problem.evidence.target,
            samples=samples.clamp(0, 1),
            labels=labels.argmax(-1) if labels.dim() > 1 else labels,
            confidence=-losses[winner].repeat(len(samples)),
            flags=problem.evidence.flags,
        )

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        """(points [problems, restarts, ...], losses [problems, restarts])."""
        objective = self.objective(case, matching, problems)
        starts = torch.cat([problem.starts for problem in problems]).to(self.torch_device)
        noise = [rng for problem in problems for rng in self._noise(problem)]
        project = matching.unknown.project
        found, losses = minimise(objective, starts.to(self.dtype), schedule, project, noise, report)
        every = (len(problems), -1)
        return found.view(*every, *found.shape[1:]), losses.view(*every)

    def objective(self, case: Case, matching: Matching, problems: Sequence[Problem]) -> Objective:
        """What is minimised for these problems."""
        return matching.objective(problems)

    def read(self, case: Case) -> tuple[Evidence, ...]:
        """The evidence for each target of the case, in order."""
        return read(case, self.channel)

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        believed, _ = self.assume.applied(case)
        wrong = self.assume.flags(case, self.read, self.simulates)
        unknown = unknowable(believed)
        seen = [
            replace(item, flags=item.flags | flags | unknown)
            for item, flags in zip(self.read(believed), wrong, strict=True)
        ]
        return self.invert(believed, seen)

    def invert(self, case: Case, seen: Sequence[Evidence]) -> tuple[Reconstruction, ...]:
        """The answers to the case's targets, whatever way their evidence was come by.

        Evidence with a flag of `MUTE` says nothing and is answered blindly; so is that of a number
        of records which the attack or the granted labels do not fit, but if there is no other,
        `RecordsDoNotFit` is raised.
        """
        groups, answers = self._groups(case, seen)
        done, total = 0, sum(map(len, groups.values()))
        for problems in groups.values():
            matching = self.matching(case, problems[0].evidence)
            for part in chunks(problems, self.fitting(matching, problems[0])):
                report = within(case.progress, done / total, len(part) / total)
                with freed_memory_kept():
                    solved = self._solve(case, matching, part, report)
                answers |= {answer.target.id: answer for answer in solved}
                done += len(part)
        case.progress(1.0)
        return tuple(answers[target.id] for target in case.targets)

    def _groups(
        self, case: Case, seen: Sequence[Evidence]
    ) -> tuple[dict[Alike, list[Problem]], dict[str, Reconstruction]]:
        """(what is to be searched for, answers to that which cannot be)."""
        groups: dict[Alike, list[Problem]] = {}
        answers: dict[str, Reconstruction] = {}
        misfits: list[RecordsDoNotFit] = []
        for item in seen:
            if item.flags & MUTE:
                answers[item.target.id] = blind(case, item)
                continue
            try:
                problem = self.problem(case, item)
            except RecordsDoNotFit as error:
                misfits.append(error)
                answers[item.target.id] = unfit(case, item)
            else:
                groups.setdefault(_alike(problem), []).append(problem)
        if misfits and len(misfits) == len(seen):
            raise misfits[0]
        return groups, answers

    def simulates(self, evidence: Evidence) -> bool:
        return self.local_simulation and not evidence.of_gradient

    def matching(self, case: Case, evidence: Evidence) -> Matching:
        """What is compared, for a group of alike targets."""
        assert case.knowledge.build is not None
        work = case.knowledge.work or LocalWork()
        network = load(case.knowledge.build, evidence.base, work.recipe.mode)
        return Matching(
            network=network.to(self.torch_device, self.dtype),
            work=work if self.simulates(evidence) else None,
            distance=self.distance_kind,
            penalties=self.penalties(case, evidence),
            unit=self.unit(),
            unknown=self.unknown(case, evidence),
            coupling=self.coupling(case, evidence),
            signs=self.adaptive and names(case, adaptive.SIGNS),
            compiled=self.compile,
        )

    def image_start(self, case: Case, evidence: Evidence, number: int, records: int) -> Tensor:
        """Images [records, C, H, W] as `init` says, drawn for this target and restart."""
        rng = case.seed.child(evidence.target.id, number).torch()
        return image_start(self.init, (records, *case.knowledge.input_shape), rng)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def torch_device(self) -> torch.device:
        """The device asked for; AttackError for a GPU that is not there."""
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise AttackError('device = "cuda", but torch sees no GPU here: use "auto" or "cpu"')
        return torch.device("cuda" if there and self.device != "cpu" else "cpu")

    def problem(self, case: Case, evidence: Evidence) -> Problem:
        """Labels, starts and the plan for one target."""
        if self.adaptive:
            evidence = adaptive.adapted(case, evidence)
        guesses = self._guesses(case, evidence)
        evidence = self.planned(case, doubted(case, evidence))
        tries = self.tries(case, evidence)
        starts = [self.start(case, evidence, number) for number in range(tries)]
        turns = [
            (guesses[number % len(guesses)], number // len(guesses)) for number in range(tries)
        ]
        hands = [self.dealt(case, evidence, labels, turn) for labels, turn in turns]
        return Problem(
            evidence, torch.stack(hands), torch.stack(starts), case.seed.child(evidence.target.id)
        )

    def _guesses(self, case: Case, evidence: Evidence) -> list[Tensor]:
        """The labels, and where several are tried by their loss, those by counts as well: after
        large local steps either rule may be right."""
        first = self.labels_of(case, evidence)
        recovered = (
            self.label_recovery == "auto" and evidence.target.id not in case.knowledge.labels
        )
        if not recovered or evidence.records == 1 or self.tries(case, evidence) == self.restarts:
            return [first]
        second = recover(case, evidence, "bias")[0]
        return [first] if second.sort().values.equal(first.sort().values) else [first, second]

    def tries(self, case: Case, evidence: Evidence) -> int:
        """Starts a target: more than the restarts where the labels' order has to be found."""
        known = ordered(case, evidence) or not evidence.plan.order_matters
        return self.restarts if known else max(self.restarts, self.label_orders)

    def dealt(self, case: Case, evidence: Evidence, labels: Tensor, number: int) -> Tensor:
        """The labels over the local steps, as the restart of this number takes them."""
        return dealt(case, evidence, labels, number)

    def _noise(self, problem: Problem) -> list[torch.Generator]:
        seeds = (problem.seed.child("noise", n) for n in range(len(problem.starts)))
        return [seed.torch() for seed in seeds] if self.schedule().noise else []

    def fitting(self, matching: Matching, problem: Problem) -> int:
        """How many targets, with all their restarts, fit the memory budget; at least one."""
        plan = problem.evidence.plan
        steps = sum(len(steps) for steps in plan.parties)
        shape = (plan.records, *problem.evidence.input_shape)
        some = next(iter(matching.network.parameters.values()))
        need = bytes_per_problem(matching.network, some.new_full(shape, 0.5), steps)
        wide = torch.finfo(self.dtype).bits // 32
        return max(1, self.memory_mb * 2**20 // (need * wide * len(problem.starts)))

    def _solve(
        self, case: Case, matching: Matching, problems: Sequence[Problem], report: Progress
    ) -> list[Reconstruction]:
        schedule = risen(self.schedule())
        if len(problems[0].starts) > self.restarts:
            problems = self._scouted(case, matching, problems, lambda share: report(share / 2))
        points, losses = self._searched(case, matching, problems, schedule, report)
        answers: list[Reconstruction] = []
        for row, problem in enumerate(problems):
            found = self.answer(problem, points[row], losses[row], matching.unknown)
            finite = bool(losses[row].isfinite().any())
            answers.append(at_home(found if finite else diverged(found, case.knowledge.schema)))
        return answers

    def _scouted(
        self, case: Case, matching: Matching, problems: Sequence[Problem], report: Progress
    ) -> list[Problem]:
        """Each problem with the starts, as far as a short search took them, of lowest loss."""
        schedule = risen(self.schedule())
        steps, warmup = max(1, schedule.steps // SCOUTING), schedule.warmup // SCOUTING
        short = replace(schedule, steps=steps, warmup=warmup)
        reached, losses = self._searched(case, matching, problems, short, report)
        best = losses.argsort(1)[:, : self.restarts].cpu()
        return [
            replace(problem, labels=problem.labels[chosen], starts=reached[row, chosen])
            for row, (problem, chosen) in enumerate(zip(problems, best, strict=True))
        ]

    def _searched(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        """`search`, inf for a loss that is not a number.

        Restarts of one target that are too many for the memory budget, and have nothing to do with
        one another, are searched in turn.
        """
        size = tries = len(problems[0].starts)
        if matching.coupling is None and len(problems) == 1:
            size = min(tries, self.fitting(matching, few(problems[0], 0, 1)))
        found: list[tuple[Tensor, Tensor]] = []
        for at in range(0, tries, size):
            some = [few(problem, at, size) for problem in problems]
            inner = within(report, at / tries, min(size, tries - at) / tries)
            found.append(self.search(case, matching, some, schedule, inner))
        points, losses = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return points, losses.nan_to_num(torch.inf, torch.inf)


def _alike(problem: Problem) -> Alike:
    seen = (problem.evidence, *problem.also)
    return problem.starts.shape, tuple((item.round, item.plan) for item in seen)
