"""Everything a report is made of; nothing here touches the disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmi.exposure.knowledge import View
from fedmi.leakage.files import rows_of
from fedmi.leakage.row import LeakageRow
from fedmi.leakage.trial import MetricInfo
from fedmi.mpc.cost import MPCCost
from fedmi.report.readable import Reading
from fedmi.scenario.reported import Reported

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Beside:
    """A scalar that crossed in clear beside an update, and the range of its values."""

    channel: str
    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Secured:
    """What MPC took in one deployment, a cost a seed; phase: training or serving."""

    deployment: str
    phase: str
    costs: tuple[MPCCost, ...]


@dataclass(frozen=True)
class Served:
    """What putting one deployment's model into service showed, a value a seed.

    regime: serving regime and guards. trained, served: held-out accuracy of the model and of the
    answers. figures: by name, which says the unit. secured: whether compute parties answer, and
    the costs stand with those of MPC.
    """

    deployment: str
    regime: str
    trained: tuple[float, ...]
    served: tuple[float, ...]
    figures: tuple[Mapping[str, float], ...] = ()
    secured: bool = False


@dataclass(frozen=True)
class PanelRow:
    """One target's images, [C, H, W] in [0, 1] with C 1 or 3, all of one shape.

    `label` is what the target shows, in words; for a class, `private` is the class mean.
    """

    target: str
    label: str
    private: Image
    reconstruction: Image
    prior_only: Image


@dataclass(frozen=True)
class Panel:
    """Reconstructions of one attack on one deployment at one seed."""

    deployment: str
    position: str
    channel: str
    attack: str
    seed: int
    rows: tuple[PanelRow, ...]

    @property
    def title(self) -> str:
        return f"{self.attack} on {self.deployment}, {self.position} through {self.channel}"


@dataclass(frozen=True)
class ReadRow:
    """One target's records in words; `label` is the class, in words."""

    target: str
    label: str
    private: Reading
    reconstruction: Reading
    prior_only: Reading


@dataclass(frozen=True)
class Readings:
    """What a `Panel` is for pictures: reconstructions of sentences or rows of a table."""

    deployment: str
    position: str
    channel: str
    attack: str
    seed: int
    rows: tuple[ReadRow, ...]


@dataclass(frozen=True)
class ReportData:
    """One run, as the report shows it.

    question: what the scenario asks, a sentence. dataset: what the data are, with source and
    licence. metrics: in order of importance; the first an attack has is its headline.
    judge_accuracy: the evaluator's held-out accuracy by seed. environment: names to values or to
    further names and values. beside: by deployment, what crossed in clear with updates. secured:
    what was computed under MPC. notes: sentences printed under the answer. held_out: records that
    accuracy was measured on, over all seeds, by deployment. tradeoff, equal_utility: as
    `leakage.tradeoff` and `leakage.equal_utility` make them. served: where a model does not simply
    answer as it was trained. reported: published figures. detection: what careful
    clients would have noticed, as `leakage.detection` makes it.
    """

    scenario: str
    question: str
    dataset: str
    seeds: tuple[int, ...]
    scenario_text: str
    environment: Mapping[str, object]
    leakage: pd.DataFrame
    scores: pd.DataFrame
    costs: pd.DataFrame
    metrics: tuple[MetricInfo, ...]
    views: Mapping[str, tuple[View, ...]]
    beside: Mapping[str, tuple[Beside, ...]] = field(default_factory=dict)
    secured: tuple[Secured, ...] = ()
    panels: tuple[Panel, ...] = ()
    readings: tuple[Readings, ...] = ()
    judge_accuracy: Mapping[int, float] | None = None
    notes: tuple[str, ...] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)
    tradeoff: pd.DataFrame = field(default_factory=pd.DataFrame)
    equal_utility: pd.DataFrame = field(default_factory=pd.DataFrame)
    served: tuple[Served, ...] = ()
    reported: tuple[Reported, ...] = ()
    detection: pd.DataFrame = field(default_factory=pd.DataFrame)

    @cached_property
    def rows(self) -> tuple[LeakageRow, ...]:
        return tuple(rows_of(self.leakage))

    def unit(self, metric: str) -> str:
        return next((info.unit for info in self.metrics if info.kind == metric), "")
