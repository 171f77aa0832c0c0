"""Gradient matching: what is minimised, for many targets at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from fedmi.attacks.engine.distances import Distance, aim, distance_of, softened
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.network import Network, one_gradient, simulate
from fedmi.attacks.engine.penalties import Given, Penalty, Trial, stacked
from fedmi.attacks.engine.plan import Plan
from fedmi.attacks.engine.unknowns import Pixels, Unknown
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed

Known = tuple[Given, Given, list[Given]]
"""The update as `aim` gives it, its support, and what each penalty knows: of one problem, or
stacked of many."""
Coupling = Callable[[Tensor], Tensor]
"""Points of all restarts [problems, restarts, ...] -> what is added to their losses, [problems,
restarts]."""


@dataclass(frozen=True)
class Problem:
    """One target's search: what to match, and by restart the labels and where to start.

    labels: [restarts, n]; starts: [restarts, ...], points of the `Unknown`, such as pixels
    [restarts, n, C, H, W]. seed: of what is drawn on the way. also: what was seen of the same
    records at other times, see `Joint`.
    """

    evidence: Evidence
    labels: Tensor
    starts: Tensor
    seed: Seed
    also: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Matching:
    """(distance + relative penalties) / unit + other penalties.

    unit "grey": the same distance for a grey image, per problem. Distances differ by five orders of
    magnitude between architectures (a sigmoid LeNet 1e-6, a ReLU MLP 1e-1); in this unit one
    weight of the total variation serves them all. "absolute": 1, as papers have it.
    work: the local training to simulate, or None to compare with one gradient. Only entries in the
    evidence's support are compared. signs: the update is a sign times a scale a tensor, and is
    compared with `softened` signs. compiled: by torch.compile, for thousands of steps.
    """

    network: Network
    work: LocalWork | None
    distance: Distance = "cosine"
    penalties: tuple[Penalty, ...] = ()
    unit: Literal["grey", "absolute"] = "grey"
    unknown: Unknown = field(default_factory=Pixels)
    coupling: Coupling | None = None
    signs: bool = False
    compiled: bool = False

    def objective(self, problems: Sequence[Problem]) -> "MatchingObjective":
        """Of problems with one plan and as many restarts each.

        One batched function, or problem by problem where there is but one, or where vmap refuses
        the module. Raises AttackError where it is to be compiled and cannot be.
        """
        if len(problems) * len(problems[0].starts) == 1 and not self.compiled:
            return self._one_by_one(problems)
        try:
            found = self._objective(problems)
            found.tried(problems)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.compiled:
                raise AttackError(_NOT_COMPILED.format(error=_first_line(error))) from error
            return self._one_by_one(problems)
        return found

    def _one_by_one(self, problems: Sequence[Problem]) -> "MatchingObjective":
        slow = replace(self, network=self.network.one_by_one(), compiled=False)
        return slow._objective(problems)

    def _objective(self, problems: Sequence[Problem]) -> "MatchingObjective":
        evidence = [problem.evidence for problem in problems]
        some = next(iter(self.network.parameters.values()))
        wanted = _like(stacked([dict(self._wanted(item)) for item in evidence]), some)
        support = _like(_supports(evidence), some)
        known: Known = (
            vmap(partial(aim, self.distance))(wanted, support),
            support,
            [
                _like(stacked([self._given(penalty, item) for item in problems]), some)
                for penalty in self.penalties
            ],
        )
        labels = torch.stack([problem.labels for problem in problems]).to(some.device)
        found = MatchingObjective(self, evidence[0].plan, labels, known, some.new_ones(len(labels)))
        return replace(found, unit=self._units(found, problems))

    def _given(self, penalty: Penalty, problem: Problem) -> Given:
        return penalty.given(problem.evidence, problem.labels[0], self.network)

    def _wanted(self, evidence: Evidence) -> Given:
        seen = evidence.gradient if self.work is None else evidence.descent
        return {name: seen[name] for name in self.network.parameters}

    def _units(self, objective: "MatchingObjective", problems: Sequence[Problem]) -> Tensor:
        """The distance of a grey image, of each problem."""
        if self.unit == "absolute":
            return objective.unit
        size = (problems[0].labels.shape[1], *problems[0].evidence.input_shape)
        grey = objective.unit.new_full((len(problems), *size), 0.5)
        plain = replace(self, penalties=tuple(p for p in self.penalties if p.relative))
        plain = replace(plain, unknown=Pixels(), coupling=None, compiled=False)
        which = [index for index, p in enumerate(self.penalties) if p.relative]
        known = (*objective.known[:2], [objective.known[2][index] for index in which])
        alone = replace(objective, matching=plain, labels=objective.labels[:, :1], known=known)
        return alone.losses(grey).clamp_min(1e-12)

    def loss(self, point: Tensor, labels: Tensor, known: Known, unit: Tensor, plan: Plan) -> Tensor:
        """Of one point of one problem."""
        aimed, support, given = known
        inputs, labels = self.unknown.decode(point, labels)
        if self.work is None:
            found, seen = one_gradient(self.network, inputs, labels)
        else:
            found, seen = simulate(self.network, inputs, labels, plan, self.work)
        trial = Trial(inputs, labels, found, seen)
        compared = softened(found) if self.signs else found
        total = distance_of(self.distance, compared, aimed, support) / unit
        for penalty, item in zip(self.penalties, given, strict=True):
            value = penalty.weight * penalty.value(trial, item, self.network)
            total = total + (value / unit if penalty.relative else value)
        return total


@dataclass(frozen=True)
class MatchingObjective:
    """The losses of many problems; see `descent.Objective`.

    labels: [problems, restarts, n]; known: stacked over problems; unit: [problems].
    """

    matching: Matching
    plan: Plan
    labels: Tensor
    known: Known
    unit: Tensor

    @property
    def restarts(self) -> int:
        return self.labels.shape[1]

    def points_of(self, problems: Sequence[Problem]) -> Tensor:
        """Where the searches start, [problems x restarts, ...]."""
        return torch.cat([problem.starts for problem in problems]).to(self.unit)

    def tried(self, problems: Sequence[Problem]) -> None:
        """RuntimeError if vmap refuses the module. Two problems tell, but of compiled ones all."""
        if self.matching.compiled:
            self.losses(self.points_of(problems))
        else:
            two = self.kept(torch.arange(min(2, len(problems)), device=self.unit.device))
            two.losses(two.points_of(problems[:2]))

    def losses(self, points: Tensor) -> Tensor:
        if self.matching.network.plain:
            return torch.stack([self._one(row, point).detach() for row, point in enumerate(points)])
        with torch.no_grad():
            return self._batched(points)

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        if self.matching.network.plain:
            return self._slopes_one_by_one(points)
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            losses = self._batched(at)
            (slopes,) = torch.autograd.grad(losses.sum(), [at])
        return losses.detach(), slopes

    def kept(self, problems: Tensor) -> "MatchingObjective":
        aimed, support, given = self.known
        known: Known = (
            _rows(aimed, problems),
            _rows(support, problems),
            [_rows(item, problems) for item in given],
        )
        return replace(self, labels=self.labels[problems], known=known, unit=self.unit[problems])

    def _batched(self, points: Tensor) -> Tensor:
        every = points.view(len(self.unit), self.restarts, *points.shape[1:])
        one = self.restarts == 1
        at, labels = (every[:, 0], self.labels[:, 0]) if one else (every, self.labels)
        return self._function(at, labels, self.known, self.unit).flatten() + self._coupled(every)

    @cached_property
    def _function(self) -> Callable[..., Tensor]:
        """One vmap over problems, and one over restarts where there are several."""

        def loss(point: Tensor, labels: Tensor, known: Known, unit: Tensor) -> Tensor:
            return self.matching.loss(point, labels, known, unit, self.plan)

        inner = loss if self.restarts == 1 else vmap(loss, in_dims=(0, 0, None, None))
        return torch.compile(vmap(inner)) if self.matching.compiled else vmap(inner)

    def _coupled(self, every: Tensor) -> Tensor:
        coupling = self.matching.coupling
        return coupling(every).flatten() if coupling else every.new_zeros(())

    def _slopes_one_by_one(self, points: Tensor) -> tuple[Tensor, Tensor]:
        losses, slopes = list[Tensor](), list[Tensor]()
        for row, point in enumerate(points):
            at = point.detach().requires_grad_()
            loss = self._one(row, at)
            slopes += torch.autograd.grad(loss, [at])
            losses.append(loss.detach())
        found, slope = torch.stack(losses), torch.stack(slopes)
        if self.matching.coupling is None:
            return found, slope
        with torch.enable_grad():
            every = points.detach().requires_grad_()
            added = self._coupled(every.view(len(self.unit), self.restarts, *points.shape[1:]))
            (more,) = torch.autograd.grad(added.sum(), [every])
        return found + added.detach(), slope + more

    @torch.enable_grad()
    def _one(self, row: int, point: Tensor) -> Tensor:
        """The loss of one row, with its graph."""
        problem, restart = divmod(row, self.restarts)
        aimed, support, given = self.known
        known = (
            _row(aimed, problem),
            _row(support, problem),
            [_row(item, problem) for item in given],
        )
        labels, unit = self.labels[problem, restart], self.unit[problem]
        found: Tensor = self.matching.loss(point, labels, known, unit, self.plan)
        return found


_NOT_COMPILED = (
    "compile = true, but the search cannot be compiled for this model: leave it out ({error})"
)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _row(parts: Given, row: int) -> Given:
    return {name: part[row] for name, part in parts.items()}


def _rows(parts: Given, rows: Tensor) -> Given:
    return {name: part[rows] for name, part in parts.items()}


def _like(parts: Given, other: Tensor) -> Given:
    return {
        name: part.to(other) if part.is_floating_point() else part.to(other.device)
        for name, part in parts.items()
    }


def _supports(items: Sequence[Evidence]) -> Given:
    """0 or 1 for every entry, stacked; nothing where every entry of every item was seen."""
    if all(item.support is None for item in items):
        return {}
    return stacked(
        [
            {
                name: (item.support or {}).get(name, torch.ones_like(part)).to(part.dtype)
                for name, part in item.descent.items()
            }
            for item in items
        ]
    )
