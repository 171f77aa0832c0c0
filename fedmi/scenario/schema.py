"""The scenario: composed of the components' own models; it knows none of them by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from fedmi.attacks.base import Attack
from fedmi.data.dataset import Dataset
from fedmi.deployments.base import Deployment
from fedmi.exposure.component import OneOf, components
from fedmi.exposure.recipe import Pretraining, Recipe
from fedmi.metrics.base import Metric
from fedmi.models.base import ModelSpec
from fedmi.scenario.errors import choice, listed
from fedmi.scenario.reported import Reported, misnamed

AnyDataset = Annotated[Dataset, OneOf("fedmi.datasets")]
AnyModel = Annotated[ModelSpec, OneOf("fedmi.models")]
AnyDeployment = Annotated[Deployment, OneOf("fedmi.deployments")]
AnyAttack = Annotated[Attack, OneOf("fedmi.attacks")]
AnyMetric = Annotated[Metric, OneOf("fedmi.metrics")]

SeedNumber = Annotated[int, Field(ge=0)]
T = TypeVar("T")

PRIMARY = ("psnr", "rouge_l", "token_accuracy", "attack_accuracy_top1", "label_recovery_rate")
"""Metrics that tables show first unless the scenario says otherwise."""


class Scenario(BaseModel):
    """The data, the model, the deployments to compare and the adversaries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64, description="names the run directory"
    )
    question: str = Field(default="", description="one sentence, shown in the report")
    seeds: tuple[SeedNumber, ...] = Field(
        min_length=1, description="everything is repeated for each, on a split of its own"
    )
    primary: tuple[str, ...] = Field(
        default=(),
        description="metrics shown first in tables, the first as headline; if not given, all of "
        "`metrics` in their order",
    )
    metrics: tuple[AnyMetric, ...] = Field(
        default=(), description="kinds or tables; empty = all that fedmi brings"
    )
    data: AnyDataset
    model: AnyModel
    training: Recipe = Recipe()
    pretraining: Pretraining = Pretraining()
    evaluator: AnyModel
    deployment: tuple[AnyDeployment, ...] = Field(min_length=1)
    attack: tuple[AnyAttack, ...] = Field(min_length=1)
    sweep: dict[str, tuple[JsonValue, ...]] = Field(
        default={}, description="dotted path -> values; the cross product is run"
    )
    reported: tuple[Reported, ...] = Field(
        default=(), description="published figures, shown beside ours"
    )

    @field_validator("metrics", mode="before")
    @classmethod
    def _kinds(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        return tuple({"kind": item} if isinstance(item, str) else item for item in given)

    @field_validator("sweep", mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        return dict(_leaves(given)) if isinstance(given, Mapping) else given

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if twice := _repeated(seeds):
            raise ValueError(f"seeds names {twice[0]} twice; each seed counts once")
        return seeds

    @field_validator("sweep")
    @classmethod
    def _values(cls, sweep: dict[str, tuple[JsonValue, ...]]) -> dict[str, tuple[JsonValue, ...]]:
        for path, values in sweep.items():
            if not values:
                raise ValueError(f"{path} has an empty list; give at least one value")
            if twice := _repeated([repr(value) for value in values]):
                raise ValueError(f"{path} has the value {twice[0]} twice")
            if "None" in map(repr, values):
                raise ValueError(f"{path} has a value None, which TOML cannot say")
        return sweep

    @model_validator(mode="after")
    def _names(self) -> Self:
        if twice := _repeated([item.name for item in self.deployment]):
            raise ValueError(
                f'[[deployment]] two deployments are called "{twice[0]}"; names must differ'
            )
        spots = [(item.title, item.position, item.channel) for item in self.attack]
        if same := _repeated(spots):
            raise ValueError(
                f'[[attack]] two attacks are called "{same[0][0]}" and stand in the same place; '
                "give one of them another `name`"
            )
        if twice := _repeated([item.kind for item in self.metrics]):
            raise ValueError(f'metrics names "{twice[0]}" twice')
        return self

    @model_validator(mode="after")
    def _other_architecture(self) -> Self:
        if self.evaluator.kind == self.model.kind:
            others = [kind for kind in components("fedmi.models") if kind != self.model.kind]
            raise ValueError(
                f'[evaluator] kind = "{self.evaluator.kind}" is the architecture of [model]; the '
                f"evaluator must be another one: {listed(others)}"
            )
        return self

    @model_validator(mode="after")
    def _known_primary(self) -> Self:
        known = [metric.kind for metric in self.scored]
        for name in self.primary:
            if name not in known:
                raise ValueError(f'primary: "{name}" is not among the metrics{choice(name, known)}')
        return self

    @model_validator(mode="after")
    def _known_in_reported(self) -> Self:
        names = [item.name for item in self.deployment], [item.title for item in self.attack]
        kinds = [metric.kind for metric in self.scored] if self.reported else []
        if found := list(misnamed(self.reported, *names, kinds)):
            raise ValueError("; ".join(found))
        return self

    @property
    def scored(self) -> tuple[Metric, ...]:
        """The metrics asked for, or all that fedmi brings and that need no options."""
        return self.metrics or _builtin_metrics()

    @property
    def shown_first(self) -> tuple[str, ...]:
        """Kinds of the primary metrics."""
        if self.primary or self.metrics:
            return self.primary or tuple(metric.kind for metric in self.metrics)
        known = {metric.kind for metric in self.scored}
        return tuple(kind for kind in PRIMARY if kind in known)


def _builtin_metrics() -> tuple[Metric, ...]:
    found: list[Metric] = []
    for cls in components("fedmi.metrics").values():
        ready = not any(field.is_required() for field in cls.model_fields.values())
        if issubclass(cls, Metric) and ready and cls.__module__.startswith("fedmi."):
            found.append(cls.model_validate({}))
    return tuple(found)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`[sweep] training.learning_rate = [...]` without quotes is nested tables: flatten them."""
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        path = f"{prefix}{name}"
        found += _leaves(value, path + ".") if isinstance(value, Mapping) else [(path, value)]
    return found


def _repeated(items: Sequence[T]) -> list[T]:
    return [item for item, count in Counter(items).items() if count > 1]
