"""What a scenario will do before it does it: cells, threat model, sizes, the data's card."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedmi.attacks.base import Attack
from fedmi.data.dataset import Card
from fedmi.deployments.base import Deployment, Estimate
from fedmi.exposure.words import Position
from fedmi.scenario.cells import AttackCell, Plan, TrainingCell
from fedmi.scenario.threat import view


@dataclass(frozen=True)
class Sight:
    """One position x channel of one deployment.

    facts: what the position knows by nature. read_by: titles of the attacks that read it.
    """

    deployment: str
    position: str
    channel: str
    facts: tuple[str, ...]
    read_by: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """One deployment as it will be trained: seeds and twins train the same and are counted.

    estimate: of one training. parties: how many compute on shares, training or serving; 0 where
    none do.
    """

    title: str
    kind: str
    trainings: int
    recorded_rounds: tuple[int, ...]
    protections: tuple[str, ...]
    estimate: Estimate
    parties: int = 0


@dataclass(frozen=True)
class Assault:
    """One attack on one deployment.

    granted: facts that the scenario gives it. coalition: who the adversary is together, in words;
    empty where it is alone.
    """

    attack: str
    deployment: str
    position: str
    channel: str
    granted: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: int
    coalition: str = ""


@dataclass(frozen=True)
class Cell:
    """One unit of work and its content key."""

    key: str
    does: str
    title: str
    seed: int


@dataclass(frozen=True)
class Overview:
    name: str
    question: str
    card: Card
    model: str
    parameters: int
    threat_model: tuple[Sight, ...]
    trainings: tuple[Training, ...]
    attacks: tuple[Assault, ...]
    cells: tuple[Cell, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells by what they do."""
        does = [cell.does for cell in self.cells]
        return {name: does.count(name) for name in ("train", "serve", "evaluator", "attack")}


def overview(plan: Plan) -> Overview:
    """Nothing is loaded or trained for it."""
    scenario = plan.scenario
    card = scenario.data.card()
    titles = deployment_titles(plan)
    return Overview(
        name=scenario.name,
        question=scenario.question,
        card=card,
        model=scenario.model.kind,
        parameters=scenario.model.parameters(card.shape, card.classes),
        threat_model=tuple(_sights(plan)),
        trainings=tuple(_trainings(plan)),
        attacks=tuple(_assaults(plan)),
        cells=tuple(_cells(plan, titles)),
    )


def deployment_titles(plan: Plan) -> dict[str, str]:
    """Title of the deployment by key of each training; its name where nothing attacks it."""
    titles = {cell.key: cell.deployment.name for cell in plan.trainings}
    for cell in reversed(plan.attacks):
        titles |= {cell.training.key: cell.deployment_title, cell.twin.key: cell.deployment_title}
    return titles


def _sights(plan: Plan) -> Iterator[Sight]:
    for deployment in plan.scenario.deployment:
        for seen in deployment.views():
            readers = [
                cell.attack_title
                for cell in plan.attacks
                if cell.training.deployment.name == deployment.name
                and view(cell.attack, deployment) == seen
            ]
            facts = tuple(sorted(seen.facts))
            spot = (str(seen.position), str(seen.channel))
            yield Sight(deployment.name, *spot, facts, tuple(dict.fromkeys(readers)))


def _trainings(plan: Plan) -> Iterator[Training]:
    """One entry a deployment; those that differ in serving alone share their trainings."""
    by_title: dict[str, dict[str, TrainingCell]] = {}
    attacked = {cell.training.key for cell in plan.attacks}
    for attack in plan.attacks:
        for cell in (attack.training, attack.twin):
            by_title.setdefault(attack.deployment_title, {}).setdefault(cell.key, cell)
    for cell in plan.trainings:
        if cell.twin == "none" and cell.key not in attacked:
            by_title.setdefault(cell.deployment.name, {}).setdefault(cell.key, cell)
    for title, cells in by_title.items():
        one = max(cells.values(), key=lambda cell: len(cell.record))
        yield Training(
            title=title,
            kind=one.deployment.kind,
            trainings=len(cells),
            recorded_rounds=one.record,
            protections=one.deployment.protections_in_all,
            estimate=one.deployment.estimate(one.data.card(), one.model, len(one.record)),
            parties=parties(one.deployment),
        )


def _assaults(plan: Plan) -> Iterator[Assault]:
    groups: dict[tuple[str, str, str, str], list[AttackCell]] = {}
    for cell in plan.attacks:
        place = (cell.attack.position, cell.attack.channel)
        groups.setdefault((cell.attack_title, cell.deployment_title, *place), []).append(cell)
    for (attack, deployment, _, _), cells in groups.items():
        one = cells[0]
        yield Assault(
            attack=attack,
            deployment=deployment,
            position=one.attack.position,
            channel=one.attack.channel,
            granted=tuple(sorted(one.attack.knowledge)),
            metrics=tuple(metric.kind for metric in one.metrics),
            seeds=len(cells),
            coalition=_coalition(one.attack, one.training.deployment),
        )


def parties(deployment: Deployment) -> int:
    """How many compute on shares, while it trains or while it serves; 0 where none do."""
    return max(deployment.compute_parties, deployment.serving.compute_parties)


def _coalition(attack: Attack, deployment: Deployment) -> str:
    """Compute parties that put together what they hold, or clients that tell what they know."""
    count = attack.colluders
    if attack.position == Position.DEALER:
        return f"with {count} of {deployment.compute_parties} compute parties" if count else ""
    if attack.position == Position.COMPUTE_PARTY:
        return f"{count + 1} of {parties(deployment)} compute parties"
    return f"with {count} client{'s' * (count > 1)}" if count else ""


def _cells(plan: Plan, titles: dict[str, str]) -> Iterator[Cell]:
    for start in plan.pretrainings:
        yield Cell(start.key, "pretrain", start.model.kind, start.seed)
    for cell in plan.trainings:
        twin = "" if cell.twin == "none" else f" ({cell.twin} twin)"
        yield Cell(cell.key, "train", titles[cell.key] + twin, cell.seed)
    for served in plan.served:
        twin = "" if served.training.twin == "none" else f" ({served.training.twin} twin)"
        name = served.training.deployment.name
        yield Cell(served.key, "serve", name + twin, served.training.seed)
    for judge in plan.judges:
        yield Cell(judge.key, "evaluator", judge.evaluator.kind, judge.seed)
    for attack in plan.attacks:
        title = f"{attack.attack_title} on {attack.deployment_title}"
        yield Cell(attack.key, "attack", title, attack.training.seed)
