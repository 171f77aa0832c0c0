"""Attacks that search for sentences whose update is the observed one: what they share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.batching import bytes_per_problem
from fedmi.attacks.engine.descent import Objective, Schedule
from fedmi.attacks.engine.embedded import PLACES, TABLE, Vocabulary, WrittenText, load_text, no_text
from fedmi.attacks.engine.evidence import UPDATES, AttackError, Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.parts import Progress
from fedmi.attacks.engine.penalties import Penalty
from fedmi.attacks.engine.placed import LOST, Placed, placed
from fedmi.attacks.engine.settled import settled
from fedmi.attacks.engine.text_penalties import PlaceRows
from fedmi.attacks.engine.token_rows import SHORTEST, Lengths, lengths, token_rows
from fedmi.attacks.engine.unknowns import Unknown
from fedmi.exposure.schema import END, PADDING, START, UNKNOWN

WIDTH = 8
"""A search has room for a multiple of so many tokens a sentence, so that more are batched."""
FIRST_LOGIT = 2.0
"""Of the label that place rows give, where labels are searched for."""
FROM_PLACES, KEPT = "started_from_place_rows", "start_kept"
GUESSED, HELD, UNSEEN = "lengths_guessed", "token_table_held", "token_set_not_visible"


class TextMatching(GradientMatching):
    """Gradient matching over the tokens' vectors [n, length, dim] of a `TextClassifier`.

    Every parameter's gradient is compared but that of the tokens' vectors. How many tokens a
    sentence has is read off the rows of the embedding tables' gradients (`token_rows.lengths`;
    flag `lengths_guessed` where they leave a choice), [CLS] and [SEP] are held in their places, and
    in the end each vector becomes the token that explains it best (`Vocabulary.closeness`), the
    surest sentence first; confidence [n] is the mean of that over a sentence's tokens. Local steps
    are simulated with the tokens' vectors held still (flag `token_table_held`). A search from
    `init = "place_rows"` begins with sentences, lengths and labels of `placed` (flag
    `started_from_place_rows`; `place_rows_not_visible` where it has to be drawn after all), and
    answers them (flag `start_kept`) unless it found sentences that fit clearly better (`settled`).
    """

    init: Literal["normal", "place_rows"] = Field(  # type: ignore[assignment]
        default="normal",
        description="start: N(0, variance of the tokens' vectors), or the sentences that "
        "'place_rows' finds; papers draw at random",
    )
    trials: int = Field(
        default=2000,
        ge=0,
        le=10_000_000,
        description="of place_rows: sentences computed to tell those of a batch apart",
    )
    optimizer: Literal["adam", "lbfgs"] = Field(
        default="adam", description="Adam as in papers, or L-BFGS, whose step is 1"
    )
    learning_rate: float = Field(
        default=0.5, gt=0, le=100, description="Adam's step, in deviations of the tokens' vectors"
    )
    label_search: Literal["recovered", "joint"] = Field(
        default="recovered",
        description="labels not granted are recovered first, or searched for with the tokens",
    )
    use_token_set: bool = Field(
        default=False,
        description="only tokens whose row in the embedding table's gradient stands out; papers "
        "leave that out",
    )
    place_weight: float = Field(
        default=0.1,
        ge=0,
        le=1e3,
        description="weight of how the rows of the positions' gradient differ from one another; "
        "papers have 0",
    )

    channels: ClassVar = UPDATES
    reads_schemas: ClassVar = frozenset({"text"})

    def unsuited(self, network: nn.Module) -> str:
        return no_text(network)

    def schedule(self) -> Schedule:
        if self.optimizer == "lbfgs":
            found = Schedule(self.steps, 1.0, sign="none", decay="none", optimizer="lbfgs")
        else:
            found = Schedule(self.steps, self.learning_rate, sign="none", decay="cosine")
        return replace(found, patience=self.patience, stop_below=self.stop_below)

    def unit(self) -> Literal["grey", "absolute"]:
        return "absolute"

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        if case.knowledge.build and (why := no_text(case.knowledge.build())):
            raise AttackError(f"{self.kind} {why}")
        return super().reconstruct(case)

    def vocabulary(self, case: Case, evidence: Evidence) -> Vocabulary:
        assert case.knowledge.build is not None
        return load_text(case.knowledge.build, evidence.base, "eval")[1]

    def unknown(self, case: Case, evidence: Evidence) -> Unknown:
        words = self.vocabulary(case, evidence).to(self.torch_device, self.dtype)
        joint = case.knowledge.classes if self.joint(case, evidence) else 0
        return WrittenText(words, joint, case.knowledge.input_shape[2])

    def joint(self, case: Case, evidence: Evidence) -> bool:
        """Whether labels are searched for."""
        return self.label_search == "joint" and evidence.target.id not in case.knowledge.labels

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        shown = self.place_weight and PLACES in evidence.gradient
        return (PlaceRows(self.place_weight, self.simulates(evidence)),) if shown else ()

    def matching(self, case: Case, evidence: Evidence) -> Matching:
        assert case.knowledge.build is not None
        work = case.knowledge.work
        mode = work.recipe.mode if work else "eval"
        network = load_text(case.knowledge.build, evidence.base, mode)[0]
        found = super().matching(case, evidence)
        return replace(found, network=network.to(self.torch_device, self.dtype))

    def problem(self, case: Case, evidence: Evidence) -> Problem:
        """With labels [restarts, n, 2]: the class and the number of tokens of each sentence."""
        counted = self._lengths(case, evidence)
        flags = set() if counted.certain else {GUESSED}
        if self.simulates(evidence) and any(len(steps) > 1 for steps in evidence.plan.parties):
            flags.add(HELD)
        if self.use_token_set and not self._visible(evidence):
            flags.add(UNSEEN)
        found = super().problem(case, replace(evidence, flags=evidence.flags | flags))
        counts = torch.tensor(counted.counts).expand_as(found.labels)
        found = replace(found, labels=torch.stack([found.labels, counts], -1))
        if self.init == "normal":
            return found
        known = placed(case, evidence, self.trials)
        if known is None:
            return replace(found, evidence=_flagged(found.evidence, LOST))
        return self._from_places(case, found, known)

    def _from_places(self, case: Case, problem: Problem, known: Placed) -> Problem:
        """A search that starts from sentences, with their labels and lengths; what they lack stays
        drawn."""
        words = self.vocabulary(case, problem.evidence)
        starts = problem.starts.clone()
        room = starts.shape[2] - self.joint(case, problem.evidence)
        ids = known.ids[:, :room]
        vectors = (words.tokens[ids] / words.spread).to(starts)
        there = (ids > END)[..., None]
        starts[:, :, :room] = torch.where(there, vectors, starts[:, :, :room])
        labels = problem.labels.clone()
        labels[..., 1] = (ids != PADDING).sum(1).clamp_min(SHORTEST)
        told = labels[0, :, 0].sort().values.equal(known.labels.sort().values)
        if told or problem.evidence.target.id not in case.knowledge.labels:
            labels[..., 0] = known.labels
            if self.joint(case, problem.evidence):
                own = one_hot(known.labels, case.knowledge.classes)
                starts[:, :, -1, : own.shape[1]] = FIRST_LOGIT * own
        flagged = _flagged(problem.evidence, FROM_PLACES, *known.flags)
        return replace(problem, labels=labels, starts=starts, evidence=flagged)

    def start(self, case: Case, evidence: Evidence, number: int) -> Tensor:
        """[records, room, dim], and zeros for logits where labels are searched for."""
        counts = self._lengths(case, evidence).counts
        most = min(case.knowledge.input_shape[2], -(-max(counts) // WIDTH) * WIDTH)
        rng = case.seed.child(evidence.target.id, number).torch()
        shape = (evidence.plan.records, most, evidence.base[TABLE].shape[1])
        drawn = torch.randn(shape, generator=rng)
        if self.joint(case, evidence):
            drawn = torch.cat([drawn, torch.zeros_like(drawn[:, :1])], 1)
        return drawn

    def allowed(self, evidence: Evidence) -> Tensor:
        """Ids that a place may hold."""
        everything = torch.arange(len(evidence.base[TABLE]))
        if self.use_token_set and self._visible(evidence):
            everything = token_rows(evidence.gradient).ids.sort().values
        special = (everything == PADDING) | (everything == START) | (everything == END)
        kept = everything[~special]
        return kept if len(kept) else torch.tensor([UNKNOWN])

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        found = super().search(case, matching, problems, schedule, report)
        if self.init == "normal":
            return found
        return self.settled(self.objective(case, matching, problems), matching, problems, found[0])

    def settled(
        self, objective: Objective, matching: Matching, problems: Sequence[Problem], points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same as `search` returns: where sentences of place rows were bettered, or they."""
        assert isinstance(matching.unknown, WrittenText)
        flat = points.flatten(0, 1)
        found, losses = settled(
            objective, matching.unknown, problems, lambda one: self.allowed(one.evidence), flat
        )
        return found.view_as(points), losses.view(points.shape[:2])

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        assert isinstance(unknown, WrittenText)
        best = int(losses.argmin())
        labels = problem.labels[best].to(points.device)
        ids, sure = unknown.written(points[best], labels[:, 1], self.allowed(problem.evidence))
        _, classes = unknown.decode(points[best], labels)
        classes = classes.argmax(-1) if classes.dim() > 1 else classes
        order = sure.argsort(descending=True, stable=True)
        kept = FROM_PLACES in problem.evidence.flags and points[best].cpu().equal(
            problem.starts[best].to(points.dtype).cpu()
        )
        return Reconstruction(
            target=problem.evidence.target,
            samples=ids[order][:, None, None].float(),
            labels=classes[order],
            confidence=sure[order],
            flags=problem.evidence.flags | ({KEPT} if kept else set()),
        )

    def fitting(self, matching: Matching, problem: Problem) -> int:
        """How many targets, with all their restarts, fit the memory budget; at least one."""
        some = next(iter(matching.network.parameters.values()))
        sample, _ = matching.unknown.decode(
            problem.starts[0].to(some), problem.labels[0].to(some.device)
        )
        steps = sum(len(steps) for steps in problem.evidence.plan.parties)
        need = bytes_per_problem(matching.network, sample.detach(), steps)
        wide = torch.finfo(self.dtype).bits // 32
        return max(1, self.memory_mb * 2**20 // (need * wide * len(problem.starts)))

    def _lengths(self, case: Case, evidence: Evidence) -> Lengths:
        return lengths(evidence.gradient, evidence.plan.records, case.knowledge.input_shape[2])

    def _visible(self, evidence: Evidence) -> bool:
        """Whether some token's row stands out of the table's gradient."""
        return bool(len(token_rows(evidence.gradient).words))


def _flagged(evidence: Evidence, *flags: str) -> Evidence:
    return replace(evidence, flags=evidence.flags | {*flags})
