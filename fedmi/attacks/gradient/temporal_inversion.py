"""Temporal inversion: several rounds' updates of the same client, used together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.adaptive import adapted
from fedmi.attacks.engine.descent import Objective
from fedmi.attacks.engine.evidence import MUTE, UPDATES, Evidence, read
from fedmi.attacks.engine.inversion import Inversion
from fedmi.attacks.engine.joint import Combine, Joint
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation, Transcript


class TemporalInversion(Inversion):
    """Records whose updates at several global models are the observed ones, all rounds at once.

    Minimises the mean over `rounds` of what `inverting_gradients` minimises in one. Each further
    round is another set of equations on the same records, at other weights: rounds in which the
    gradient is weak, noisy or pruned are made up for by others. `combine = "trimmed"` takes the
    trimmed mean of losses and of slopes, coordinate by coordinate, which bears a round of other
    records.

    One target a client: the records it used in the last of the rounds. That they are the same in
    all rounds is an assumption, right where a round uses all of a client's records (updates by
    epochs, gradients over all records); a round with another number of records is left out (flag
    `rounds_left_out`), whatever number is believed. A granted order of batches is that of the last
    round; in the others it is not known, and is taken to be one and the same unless a client does a
    single step. Labels are recovered in the first round. Flags are those of all rounds used. Threat
    model: honest-but-curious, sees several updates and the models they started from.
    Samples [n, C, H, W]. Raises AttackError if an observation is missing.
    """

    kind: Literal["temporal_inversion"] = "temporal_inversion"
    rounds: tuple[int, ...] = Field(
        default=(1, 2, 3), min_length=2, description="rounds used together"
    )
    combine: Combine = Field(default="mean", description="how the rounds' slopes are combined")

    paper: ClassVar[str] = (
        "Li, Gu, Chen, Li, Yang: Temporal Gradient Inversion Attacks with Robust Optimization, "
        "IEEE TDSC 2025 (arXiv 2023)"
    )
    channels: ClassVar = UPDATES

    def own_targets(self, transcript: Transcript) -> tuple[Target, ...]:
        """Each client, or set of clients, that was heard of in any of the rounds."""
        last: dict[tuple[int, ...], int] = {}
        for seen in transcript.on(self.channel, self.rounds):
            last[seen.clients] = max(seen.round, last.get(seen.clients, 0))
        return tuple(
            Target(f"{_who(clients)} of {len(self.rounds)} rounds", None, at, clients)
            for clients, at in sorted(last.items())
        )

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        return super().reconstruct(self._counted(case) if self.assume.records else case)

    def read(self, case: Case) -> tuple[Evidence, ...]:
        return tuple(self._seen(case, target)[-1] for target in case.targets)

    def problem(self, case: Case, evidence: Evidence) -> Problem:
        earlier = self._seen(case, evidence.target)[:-1]
        if self.adaptive:
            earlier = tuple(adapted(case, item) for item in earlier)
        also = tuple(self.planned(case, item) for item in earlier)
        return replace(super().problem(case, evidence), also=also)

    def labels_of(self, case: Case, evidence: Evidence) -> Tensor:
        """As they are in the earliest round, whose model knows them least."""
        return super().labels_of(case, self._seen(case, evidence.target)[0])

    def objective(self, case: Case, matching: Matching, problems: Sequence[Problem]) -> Objective:
        earlier = tuple(self.matching(case, item) for item in problems[0].also)
        return Joint(earlier, self.combine).objective(matching, problems)

    def _seen(self, case: Case, target: Target) -> tuple[Evidence, ...]:
        """What was seen of one target, round by round, of as many records as in the last."""
        heard = self._heard(case, target)
        if not heard:
            return read(replace(case, targets=(target,)), self.channel)
        alike = [item for item in heard if item.records == heard[-1].records]
        out = len(self.rounds) - len(alike)
        flags = frozenset({f"rounds_left_out: {out} of {len(self.rounds)}"} if out else ())
        flags = flags.union(*(item.flags for item in alike))
        return tuple(replace(item, target=target, flags=flags) for item in alike)

    def _heard(self, case: Case, target: Target) -> list[Evidence]:
        """What was seen of one target, round by round, where it says anything.

        The granted order of batches is that of the target's own round, and of no other.
        """
        rounds = {
            seen.round
            for seen in case.transcript.on(self.channel, self.rounds)
            if seen.clients == target.clients
        }
        unordered = replace(case, knowledge=replace(case.knowledge, order={}))
        found = list[Evidence]()
        for number in sorted(rounds):
            known = case if number == target.round else unordered
            found += read(replace(known, targets=(replace(target, round=number),)), self.channel)
        return [item for item in found if not item.flags & MUTE]

    def _counted(self, case: Case) -> Case:
        """Without the rounds of other sizes than a target's last, by the counts as they are told:
        a belief that gives all rounds one size would keep them."""
        believed = self.assume.applied(case)[0]
        others = set[tuple[int, tuple[int, ...]]]()
        for target in case.targets:
            if heard := {item.round for item in self._heard(believed, target)}:
                seen = case.transcript.on(self.channel, heard)
                told = {item.round: _told(item) for item in seen if item.clients == target.clients}
                last = told[max(heard)]
                others |= {(at, target.clients) for at, count in told.items() if count != last}
        kept = tuple(
            seen
            for seen in case.transcript.observations
            if seen.channel != self.channel or (seen.round, seen.clients) not in others
        )
        return replace(case, transcript=replace(case.transcript, observations=kept))


def _told(seen: Observation) -> float:
    """How many records an item is said to hold; 0 where it does not say."""
    each = sum(count for name, count in seen.clear.items() if name.startswith("num_examples/"))
    return each or seen.clear.get("num_examples", 0)


def _who(clients: tuple[int, ...]) -> str:
    return f"client {clients[0]}" if len(clients) == 1 else f"{len(clients)} clients"
