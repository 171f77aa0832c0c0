"""One attack on one deployment at one seed, as the runner hands it over, and its JSON form."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedmi.exposure.words import Channel, Position
from fedmi.leakage.settings import Settings


@dataclass(frozen=True)
class MetricInfo:
    """What the table needs to know of a metric; `unit` is empty for a pure number."""

    kind: str
    higher_is_leakier: bool
    unit: str = ""


@dataclass(frozen=True)
class Score:
    """One metric on one target, and what the same attack scored without an informative observation.

    `round` is None for a class of the finished model. A value that is not finite stays as it is.
    """

    target: str
    metric: str
    value: float
    prior_only: float
    round: int | None = None


@dataclass(frozen=True)
class Trial:
    """One attack on one deployment at one seed.

    utility, chance: held-out accuracy of what is served, and that of guessing, in [0, 1];
    trained_utility: that of the finished model itself; minus infinity stands for `utility`.
    protections: as the deployment lists them; none = a positive control.
    targets_asked: how many targets the attack went for; 0 = as many as there were.
    claim: unit, neighbouring relation and accountant of epsilon and delta; empty without them.
    Costs that are not known, because something failed, are NaN, never 0.
    wire_bytes: both directions, the whole training. queries: to the served model, refused: those
    it did not answer, accounts: that asked them, alarmed: of these, by a monitor, wait_seconds:
    simulated, for a rate limit; readouts: of a device's memory.
    settings: what the deployment is trained with besides its protections, to choose its control by.
    flags: what the deployment noticed. target_flags: (round, flag), what the attack noticed of
    targets of that round (None for classes). failure: why there are no scores.
    """

    scenario: str
    deployment: str
    training: str
    serving: str
    protections: tuple[str, ...]
    position: Position
    channel: Channel
    attack: str
    seed: int
    knowledge: tuple[str, ...]
    targets_asked: int
    utility: float
    chance: float
    epsilon: float | None
    delta: float | None
    claim: str
    wire_bytes: float
    train_seconds: float
    attack_seconds: float
    queries: float
    peak_memory_bytes: float
    trained_utility: float = -math.inf
    refused: float = 0.0
    accounts: float = 0.0
    alarmed: float = 0.0
    wait_seconds: float = 0.0
    readouts: float = 0.0
    settings: Settings = ()
    flags: tuple[str, ...] = ()
    target_flags: tuple[tuple[int | None, str], ...] = ()
    scores: tuple[Score, ...] = ()
    failure: str | None = None

    def __post_init__(self) -> None:
        if self.failure is None and not self.scores:
            raise ValueError(
                f"trial of '{self.attack}' on '{self.deployment}', seed {self.seed}, has neither "
                "scores nor a failure; one of the two is right"
            )


def to_json(trial: Trial) -> str:
    """One JSON object; floats that are not finite become the strings NaN, Infinity, -Infinity."""
    return json.dumps(_plain(asdict(trial)), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Trial:
    """The trial `to_json` wrote; ValueError if fields are missing, unknown or of the wrong form."""
    data = json.loads(text)
    _check_fields(data, Trial)
    for score in data["scores"]:
        _check_fields(score, Score)
    return Trial(
        **{
            **data,
            "position": Position(data["position"]),
            "channel": Channel(data["channel"]),
            "protections": tuple(data["protections"]),
            "knowledge": tuple(data["knowledge"]),
            "settings": tuple((name, value) for name, value in data["settings"]),
            "flags": tuple(data["flags"]),
            "target_flags": tuple((at, flag) for at, flag in data["target_flags"]),
            "scores": tuple(_score(score) for score in data["scores"]),
            **{name: float(data[name]) for name in _FLOATS},
            **{name: _optional(data[name]) for name in ("epsilon", "delta")},
        }
    )


_FLOATS = (
    "utility", "chance", "train_seconds", "attack_seconds", "wire_bytes", "queries",
    "peak_memory_bytes", "trained_utility", "refused", "accounts", "alarmed", "wait_seconds",
    "readouts",
)  # fmt: skip


def _score(data: Mapping[str, Any]) -> Score:
    values = {name: float(data[name]) for name in ("value", "prior_only")}
    return Score(**{**data, **values})


def _optional(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _check_fields(data: object, cls: type) -> None:
    wanted = {field.name for field in fields(cls)}
    if not isinstance(data, dict):
        raise ValueError(f"a {cls.__name__} is a JSON object, not {type(data).__name__}")
    if wrong := wanted ^ set(data):
        raise ValueError(f"{cls.__name__}: missing or unknown fields: {', '.join(sorted(wrong))}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value
