"""From a TOML file to a checked scenario, and back."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedmi.scenario.cells import plan
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.explain import explain
from fedmi.scenario.paths import PathError, Raw, put
from fedmi.scenario.raw import plain, without_none
from fedmi.scenario.schema import Scenario


def load(
    path: str | Path,
    seeds: Sequence[int] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Scenario:
    """The scenario in a TOML file, checked down to its last cell.

    seeds: in place of the file's. settings: dotted path -> value, in place of the file's; a
    setting of a swept path ends that sweep. ScenarioError lists everything that is wrong.
    """
    raw = read(Path(path))
    try:
        for name, value in (settings or {}).items():
            raw = _set(raw, name, value)
    except PathError as error:
        raise ScenarioError([f"--set {error}"], str(path)) from error
    if seeds is not None:
        raw["seeds"] = list(seeds)
    return from_raw(_beside(raw, Path(path)), str(path))


def _beside(raw: Raw, file: Path) -> Raw:
    """Relative paths of data, swept ones too, are relative to the scenario's own file."""
    changed = {**raw, "data": _placed(raw.get("data"), file)} if "data" in raw else dict(raw)
    sweep = raw.get("sweep")
    if isinstance(sweep, dict) and isinstance(sweep.get("data"), list):
        changed["sweep"] = {**sweep, "data": [_placed(item, file) for item in sweep["data"]]}
    return changed


def _placed(data: object, file: Path) -> object:
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return data
    there = (file.resolve().parent / Path(data["path"]).expanduser()).resolve()
    return {**data, "path": str(there)}


def read(path: Path) -> Raw:
    """The tables of a TOML file; ScenarioError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError([f"cannot be read: {error.strerror}"], str(path)) from error
    except UnicodeDecodeError as error:
        raise ScenarioError(["is not UTF-8 text"], str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError([f"is not valid TOML: {error}"], str(path)) from error


def from_raw(raw: Mapping[str, Any], source: str = "scenario") -> Scenario:
    """The scenario that these tables say; ScenarioError with all that is wrong with them."""
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(explain(error, raw), source) from error
    try:
        plan(scenario)
    except ScenarioError as error:
        raise ScenarioError(error.problems, source) from error
    return scenario


def to_toml(scenario: Scenario) -> str:
    """The resolved scenario, every option written out; loads back to an equal scenario."""
    return tomli_w.dumps(without_none(plain(scenario)))


def parse_setting(text: str) -> tuple[str, object]:
    """'a.b=c' as a path and a TOML value; what is not TOML is a string. ValueError without '='."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ValueError(f'"{text}" is not a setting; write for example training.batch_size=8')
    return path.strip(), _toml_value(value.strip())


def _toml_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if list(table) == ["value"] else text


def _set(raw: Raw, path: str, value: object) -> Raw:
    root, _, rest = path.partition(".")
    if root == "sweep" and rest:
        return raw | {"sweep": raw.get("sweep", {}) | {rest: value}}
    changed = put(raw, path, value)
    sweep = raw.get("sweep")
    if isinstance(sweep, dict):
        changed["sweep"] = _without(sweep, path)
    return changed


def _without(sweep: Mapping[str, Any], path: str) -> Raw:
    """The sweep without a path, written flat or as nested tables."""
    root, _, rest = path.partition(".")
    kept = {name: value for name, value in sweep.items() if name != path}
    if isinstance(kept.get(root), dict) and rest:
        kept[root] = _without(kept[root], rest)
    return kept
