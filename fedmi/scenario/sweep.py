"""A sweep: the cross product of its values, each point a scenario of its own."""

from dataclasses import dataclass
from itertools import product

from pydantic import JsonValue, ValidationError

from fedmi.scenario.errors import ScenarioError, choice
from fedmi.scenario.explain import explain
from fedmi.scenario.fields import shown
from fedmi.scenario.paths import NAMED, PathError, Raw, put, steps
from fedmi.scenario.raw import brief
from fedmi.scenario.schema import Scenario

ROOTS = ("data", "model", "training", "pretraining", "evaluator", *NAMED)


@dataclass(frozen=True)
class Label:
    """`local_epochs=5`, and whose title it belongs to: one deployment, one attack, or all."""

    text: str
    root: str
    index: int | None


@dataclass(frozen=True)
class Point:
    """One combination of swept values; `scenario` itself sweeps nothing."""

    scenario: Scenario
    labels: tuple[Label, ...] = ()

    def deployment_title(self, index: int) -> str:
        """A deployment with a recipe of its own does not feel a sweep of [training]."""
        deployment = self.scenario.deployment[index]
        felt = {"data", "model", "pretraining", "evaluator"} | (
            {"training"} if not deployment.recipe else set()
        )
        mine = [
            label.text
            for label in self.labels
            if label.root in felt or (label.root, label.index) == ("deployment", index)
        ]
        return " ".join([deployment.name, *mine])

    def attack_title(self, index: int) -> str:
        mine = [
            label.text for label in self.labels if (label.root, label.index) == ("attack", index)
        ]
        return " ".join([self.scenario.attack[index].title, *mine])


def expand(scenario: Scenario) -> tuple[Point, ...]:
    """All points in order; ScenarioError if a path or a value is not right."""
    raw = brief(scenario) | {"sweep": {}}
    problems = [text for path in scenario.sweep for text in _bad_path(raw, path)]
    if problems:
        raise ScenarioError(problems)
    points: list[Point] = []
    for values in product(*scenario.sweep.values()):
        chosen = dict(zip(scenario.sweep, values, strict=True))
        try:
            points.append(_point(raw, chosen))
        except ScenarioError as error:
            problems += error.problems
    if problems:
        raise ScenarioError(problems)
    return tuple(points)


def _bad_path(raw: Raw, path: str) -> list[str]:
    root = path.partition(".")[0]
    if root not in ROOTS:
        return [f'[sweep] "{path}" cannot be swept{choice(root, ROOTS)}']
    try:
        way = steps(raw, path)
    except PathError as error:
        return [f"[sweep] {error}"]
    if root in NAMED and way[-1] == "name":
        return [f'[sweep] "{path}" is a name; names cannot be swept']
    return []


def _point(raw: Raw, chosen: dict[str, JsonValue]) -> Point:
    changed = raw
    try:
        for path, value in chosen.items():
            changed = put(changed, path, value)
        scenario = Scenario.model_validate(changed)
    except PathError as error:
        raise ScenarioError([f"[sweep] {error}"]) from error
    except ValidationError as error:
        where = "[sweep] " + ", ".join(f"{path} = {shown(v)}" for path, v in chosen.items())
        raise ScenarioError([f"{where}: {text}" for text in explain(error, changed)]) from error
    return Point(scenario, tuple(_label(raw, path, chosen) for path in chosen))


def _label(raw: Raw, path: str, chosen: dict[str, JsonValue]) -> Label:
    way = steps(raw, path)
    index = way[1] if len(way) > 1 and isinstance(way[1], int) else None
    last = str(way[-1])
    alone = sum(other.split(".")[-1] == last for other in chosen) == 1
    name = last if alone and way[0] != "pretraining" else path
    return Label(f"{name}={_short(chosen[path])}", str(way[0]), index)


def _short(value: JsonValue) -> str:
    """A value in a title; a table goes by its kind and its other fields."""
    if isinstance(value, dict):
        rest = [f"{name}={_short(item)}" for name, item in value.items() if name != "kind"]
        kind = str(value.get("kind", ""))
        return f"{kind}({','.join(rest)})" if rest else kind
    if isinstance(value, list):
        return "x".join(_short(item) for item in value)
    return shown(value).strip('"')
