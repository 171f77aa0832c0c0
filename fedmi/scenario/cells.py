"""Cells: the units of work of a run, each known by the content of all that it depends on.

A plan is sweep x seeds x deployments x attacks, each cell once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from fedmi.attacks.base import Attack
from fedmi.data.dataset import DataError
from fedmi.deployments.serving.exact import Exact
from fedmi.exposure.recipe import Pretraining, Recipe
from fedmi.exposure.words import PER_ROUND
from fedmi.scenario.errors import ScenarioError, choice
from fedmi.scenario.keys import content_key
from fedmi.scenario.reported import untitled
from fedmi.scenario.schema import (
    AnyAttack,
    AnyDataset,
    AnyDeployment,
    AnyMetric,
    AnyModel,
    Scenario,
)
from fedmi.scenario.sweep import Point, expand
from fedmi.scenario.threat import applies, inside, problems, reads_model

Twin = Literal["none", "disjoint", "relabelled", "recoined"]


class PretrainingCell(BaseModel):
    """One training of the model that everybody starts from, on the public records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: AnyDataset
    model: AnyModel
    pretraining: Pretraining
    seed: int
    needs: ClassVar[tuple[()]] = ()

    @property
    def key(self) -> str:
        return content_key("pretraining", [self, self.data.fingerprint()])


class TrainingCell(BaseModel):
    """One training of one deployment, on the private records or on a twin of them.

    recipe: the deployment's own, or the scenario's. record: the rounds whose items are kept;
    confide: and what the clients of those rounds could tell as colluders.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: AnyDataset
    model: AnyModel
    recipe: Recipe
    pretraining: Pretraining = Pretraining()
    deployment: AnyDeployment
    seed: int
    twin: Twin
    record: tuple[int, ...] = ()
    confide: bool = False

    @property
    def network(self) -> AnyModel:
        """The architecture that is trained."""
        return self.deployment.builds(self.model)

    @property
    def needs(self) -> tuple[PretrainingCell, ...]:
        """The cell it builds on: none where it starts from scratch. Twins start alike."""
        if not self.pretraining.epochs:
            return ()
        return (
            PretrainingCell(
                data=self.data, model=self.model, pretraining=self.pretraining, seed=self.seed
            ),
        )

    @property
    def key(self) -> str:
        """How the model is served has no part in its training, and what the deployment is called
        only if canaries are drawn by its name."""
        trained = self.deployment.model_copy(update={"serving": Exact()})
        if not trained.audits:
            trained = trained.model_copy(update={"name": "-"})
        alike = self.model_copy(update={"deployment": trained})
        return content_key("training", [alike, self.data.fingerprint()])


class ServedCell(BaseModel):
    """A trained model put into service as the training's deployment says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingCell

    @property
    def needs(self) -> tuple[TrainingCell]:
        return (self.training,)

    @property
    def key(self) -> str:
        return content_key("served", [self.training.key, self.training.deployment.serving])


class JudgeCell(BaseModel):
    """One training of the evaluator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: AnyDataset
    evaluator: AnyModel
    seed: int
    needs: ClassVar[tuple[()]] = ()

    @property
    def key(self) -> str:
        return content_key("judge", [self, self.data.fingerprint()])


class AttackCell(BaseModel):
    """One attack on one training, beside its prior-only: the same attack on the twin's training.

    served, served_twin: the same in service; None where the model simply answers as it was
    trained and nothing of that is recorded. The titles say what was swept; the key leaves them
    out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingCell
    twin: TrainingCell
    served: ServedCell | None
    served_twin: ServedCell | None
    judge: JudgeCell
    attack: AnyAttack
    metrics: tuple[AnyMetric, ...]
    deployment_title: str
    attack_title: str

    @property
    def key(self) -> str:
        keys = [cell.key for cell in self.needs]
        deployment = self.training.deployment
        where = [deployment.name, deployment.serving]
        return content_key("attack", [*keys, *where, self.attack, self.metrics])

    @property
    def needs(self) -> tuple[TrainingCell | ServedCell | JudgeCell, ...]:
        """The cells it builds on."""
        served = [cell for cell in (self.served, self.served_twin) if cell is not None]
        return (self.training, self.twin, *served, self.judge)


class Plan(BaseModel):
    """All that a scenario asks for, each cell once, in a fixed order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenario: Scenario
    pretrainings: tuple[PretrainingCell, ...]
    trainings: tuple[TrainingCell, ...]
    served: tuple[ServedCell, ...]
    judges: tuple[JudgeCell, ...]
    attacks: tuple[AttackCell, ...]

    @property
    def key(self) -> str:
        """Names the run directory: the same for the same cells under the same titles."""
        titles = [[c.key, c.deployment_title, c.attack_title] for c in self.attacks]
        keys = [[c.key for c in group] for group in (self.trainings, self.served, self.judges)]
        return content_key("plan", [keys, titles])


def plan(scenario: Scenario) -> Plan:
    """The cells of a scenario; ScenarioError if it asks for what cannot be had."""
    points = expand(scenario)
    check(points)
    return Planner(scenario, points, recorded(points)).plan()


@dataclass(frozen=True)
class Planner:
    """Rounds to record are known only when all attacks of all points are: `record` holds them."""

    scenario: Scenario
    points: tuple[Point, ...]
    record: "dict[str, Recording]"
    """key of a training that records nothing -> what some attack asks of it"""

    def plan(self) -> Plan:
        trainings: dict[str, TrainingCell] = {}
        served: dict[str, ServedCell] = {}
        judges: dict[str, JudgeCell] = {}
        attacks: dict[str, AttackCell] = {}
        for point in self.points:
            for seed in point.scenario.seeds:
                for index in range(len(point.scenario.deployment)):
                    cell = self.training(point, index, seed, "none")
                    trainings.setdefault(cell.key, cell)
                    if not cell.deployment.serving.plain:
                        one = ServedCell(training=cell)
                        served.setdefault(one.key, one)
            for attack_cell in self.attacks(point):
                trainings.setdefault(attack_cell.twin.key, attack_cell.twin)
                for item in (attack_cell.served, attack_cell.served_twin):
                    if item is not None:
                        served.setdefault(item.key, item)
                judges.setdefault(attack_cell.judge.key, attack_cell.judge)
                attacks.setdefault(attack_cell.key, attack_cell)
        starts = {one.key: one for cell in trainings.values() for one in cell.needs}
        return Plan(
            scenario=self.scenario,
            pretrainings=tuple(starts.values()),
            trainings=tuple(trainings.values()),
            served=tuple(served.values()),
            judges=tuple(judges.values()),
            attacks=tuple(attacks.values()),
        )

    def training(self, point: Point, index: int, seed: int, twin: Twin) -> TrainingCell:
        bare = _bare(point, index, seed, twin)
        asked = self.record.get(bare.key)
        if asked is None or not asked.rounds:
            return bare
        kept = {"record": tuple(sorted(asked.rounds)), "confide": asked.confide}
        return bare.model_copy(update=kept)

    def attacks(self, point: Point) -> Iterator[AttackCell]:
        scenario, card = point.scenario, point.scenario.data.card()
        scored = [
            metric
            for metric in scenario.scored
            if card.schema.kind in metric.schemas and metric.defined(card.shape, card.classes)
        ]
        for index, number, seed in _aims(point):
            attack = scenario.attack[number]
            training = self.training(point, index, seed, "none")
            twin = self.training(point, index, seed, twin_of(attack))
            in_service = not training.deployment.serving.plain or attack.reads_answers
            yield AttackCell(
                training=training,
                twin=twin,
                served=ServedCell(training=training) if in_service else None,
                served_twin=ServedCell(training=twin) if in_service else None,
                judge=JudgeCell(data=scenario.data, evaluator=scenario.evaluator, seed=seed),
                attack=attack.model_copy(update={"deployments": (), "models": ()}),
                metrics=tuple(m for m in scored if m.measures == attack.recovers),
                deployment_title=point.deployment_title(index),
                attack_title=point.attack_title(number),
            )


@dataclass
class Recording:
    """Rounds whose items are kept, and whether what colluders could tell is kept as well."""

    rounds: set[int] = field(default_factory=set)
    confide: bool = False


def recorded(points: tuple[Point, ...]) -> dict[str, Recording]:
    """Key of a training that records nothing -> what some attack asks of it."""
    record: dict[str, Recording] = defaultdict(Recording)
    for point in points:
        for index, number, seed in _aims(point):
            attack = point.scenario.attack[number]
            for twin in ("none", twin_of(attack)):
                asked = record[_bare(point, index, seed, twin).key]
                asked.rounds |= rounds_of(attack)
                asked.confide |= attack.colluders > 0 or inside(attack)
    return record


def check(points: tuple[Point, ...]) -> None:
    """ScenarioError with all that is wrong with any of the points."""
    found: list[str] = []
    for point in points:
        try:
            found += problems(point.scenario, point.scenario.data.card())
        except DataError as error:
            found.append(f'[data] kind = "{point.scenario.data.kind}": {error}')
    found += _untitled(points)
    found += _unswept(points)
    if found:
        raise ScenarioError(found)


def _unswept(points: tuple[Point, ...]) -> Iterator[str]:
    """Models that an attack names and no point has."""
    kinds = sorted({point.scenario.model.kind for point in points})
    for attack in points[0].scenario.attack:
        for name in attack.models:
            if name not in kinds:
                yield (
                    f'[[attack]] "{attack.title}" models names "{name}", which is not there'
                    f"{choice(name, kinds)}"
                )


def _untitled(points: tuple[Point, ...]) -> Iterator[str]:
    """Published figures that stand beside what the run does not have."""
    titles = [
        (point.deployment_title(index), point.attack_title(number))
        for point in points
        for index in range(len(point.scenario.deployment))
        for number in range(len(point.scenario.attack))
    ]
    deployments, attacks = ({pair[side] for pair in titles} for side in (0, 1))
    return untitled(points[0].scenario.reported, sorted(deployments), sorted(attacks))


def twin_of(attack: Attack) -> Twin:
    """The training whose exposure carries nothing about what the attack recovers."""
    twins: dict[str, Twin] = {"labels": "relabelled", "membership": "recoined"}
    return twins.get(attack.recovers, "disjoint")


def rounds_of(attack: Attack) -> set[int]:
    return set(attack.rounds) if attack.channel in PER_ROUND else set()


def _aims(point: Point) -> Iterator[tuple[int, int, int]]:
    """(number of the deployment, number of the attack, seed) for all that apply."""
    for seed in point.scenario.seeds:
        for index, deployment in enumerate(point.scenario.deployment):
            for number, attack in enumerate(point.scenario.attack):
                if applies(attack, deployment) and reads_model(attack, point.scenario):
                    yield index, number, seed


def _bare(point: Point, index: int, seed: int, twin: Twin) -> TrainingCell:
    deployment = point.scenario.deployment[index]
    return TrainingCell(
        data=point.scenario.data,
        model=point.scenario.model,
        recipe=deployment.recipe or point.scenario.training,
        pretraining=point.scenario.pretraining,
        deployment=deployment if twin == "none" else deployment.unwatched(),
        seed=seed,
        twin=twin,
    )
