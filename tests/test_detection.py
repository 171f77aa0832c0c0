"""Rates of detection and of false alarms: exact on numbers made up, and at the end of a run."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmi.deployments.base import Noticed, Sent
from fedmi.exposure.words import Channel, Position
from fedmi.leakage.detection import (
    ALLOWED,
    COLUMNS,
    Detection,
    Watched,
    detection_flags,
    detection_frame,
    detections,
    detections_of,
    halves,
    threshold_of,
)
from fedmi.leakage.flags import EXPLANATIONS, name_of
from fedmi.leakage.resampling import wilson
from fedmi.leakage.row import split
from fedmi.report.data import ReportData
from fedmi.report.detection import detection_text, lines
from fedmi.report.html import render
from fedmi.runs.execute import run
from fedmi.scenario.schema import Scenario
from tests.scenarios import base
from tests.test_report import made_up, report_of

OWN, MODEL = "of_own", "of_model"
Values = Mapping[tuple[int, int], float]
"""(round, client) -> measurement."""


def watched(
    values: Values,
    what: Mapping[int, Sent] | None = None,
    detector: str = OWN,
    seed: int = 1,
    deployment: str = "fl",
    **changes: object,
) -> Watched:
    """what: round -> what was sent there; honest where nothing is said."""
    noticed = tuple(
        Noticed(round, client, detector, value, (what or {}).get(round, "honest"))
        for (round, client), value in values.items()
    )
    malice = "trap_weights" if "altered" in (what or {}).values() else ""
    found = Watched(
        scenario="s",
        deployment=deployment,
        training="federated",
        malice=malice,
        seed=seed,
        comparable={OWN: "a", MODEL: "b"},
        alike=frozenset({MODEL}),
        noticed=noticed,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def grid(rounds: int, clients: int, start: float = 0.0, step: float = 1.0) -> dict:  # type: ignore[type-arg]
    places = [(r + 1, c) for r in range(rounds) for c in range(clients)]
    return {place: start + step * number for number, place in enumerate(places)}


def only(found: list[Watched]) -> Detection:
    (one,) = detections(found)
    return one


@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=400))
def test_the_threshold_is_the_smallest_with_one_per_cent_of_alarms(values: list[float]) -> None:
    threshold = threshold_of(values)
    allowed = math.floor(ALLOWED * len(values))
    assert sum(v > threshold for v in values) <= allowed
    smaller = [v for v in values if v < threshold]
    assert not smaller or sum(v > max(smaller) for v in values) > allowed


def test_infinite_honest_values_leave_no_alarm() -> None:
    assert threshold_of([math.inf, 1.0]) == math.inf
    assert math.isnan(threshold_of([]))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 12))
def test_rates_are_counted_on_the_right_halves(seed: int, rounds: int, clients: int) -> None:
    rng = np.random.default_rng(seed)
    honest = {place: float(rng.random()) for place in grid(rounds, clients)}
    altered = {(100, c): float(2 * rng.random()) for c in range(clients)}
    found = only([watched(honest), watched(altered, {100: "altered"}, deployment="bad")])
    even = sorted((v for (_, c), v in honest.items() if c % 2 == 0), reverse=True)
    odd = [v for (_, c), v in honest.items() if c % 2 == 1]
    assert found.calibrated_on == len(even)
    assert found.threshold == even[len(even) // 100]
    assert found.honest == len(odd)
    assert found.false_alarms == sum(v > found.threshold for v in odd)
    assert found.detected == sum(v > found.threshold for v in altered.values())
    assert found.rate == found.detected / clients
    assert (found.ci_low, found.ci_high) == wilson(found.rate, clients)
    assert found.weak == (len(even) < 100)
    bounds = (found.false_alarm_ci_low, found.false_alarm_ci_high)
    assert bounds == wilson(found.false_alarm_rate, len(odd))


def test_what_all_clients_measure_alike_counts_once() -> None:
    same = {(r, c): float(r) for r in range(1, 9) for c in range(10)}
    bad = {(20, c): 99.0 for c in range(10)}
    pair = [watched(same, detector=MODEL), watched(bad, {20: "altered"}, MODEL, deployment="bad")]
    found = only(pair)
    assert (found.calibrated_on, found.honest) == (4, 4)
    assert (found.altered, found.independent, found.detected) == (10, 1, 10)
    assert (found.ci_low, found.ci_high) == wilson(1.0, 1)
    assert only(_as_own(pair)).calibrated_on == 40


def _as_own(found: list[Watched]) -> list[Watched]:
    return [replace(one, alike=frozenset()) for one in found]


def test_every_other_round_calibrates_and_the_first_one_not_always() -> None:
    calibrating, others = halves([(s, r, -1, 10.0 * s + r) for s in (1, 2) for r in (1, 2, 3, 4)])
    assert calibrating == [11, 13, 22, 24]
    assert others == [12, 14, 21, 23]


def test_rounds_before_the_alteration_serve_once_beside_the_honest_deployment() -> None:
    """Up to it both go alike, so that the same measurement comes twice."""
    honest = watched(grid(4, 4))
    what: dict[int, Sent] = {3: "altered", 4: "tainted"}
    bad = watched(grid(4, 4), what, deployment="bad")
    assert only([honest, bad]).calibrated_on == 8
    assert only([bad]).calibrated_on == 4
    other_seed = replace(bad, seed=2)
    assert only([honest, other_seed]).calibrated_on == 12


def test_what_cannot_be_compared_does_not_calibrate() -> None:
    bad = watched({(9, 0): 5.0, (9, 1): 5.0}, {9: "altered"}, deployment="bad")
    for changes in (
        {"comparable": {OWN: "another model"}},
        {"comparable": {}},
        {"training": "another"},
    ):
        found = only([watched(grid(4, 4), **changes), bad])  # type: ignore[arg-type]
        assert (found.calibrated_on, found.honest, found.detected) == (0, 0, 0)
        assert math.isnan(found.rate)
        assert math.isnan(found.threshold)


def test_without_an_altered_round_there_is_no_row() -> None:
    frame = detection_frame([watched(grid(3, 3))])
    assert frame.empty
    assert tuple(frame.columns) == COLUMNS


def test_a_frame_gives_its_rows_back() -> None:
    found = [watched(grid(30, 8)), watched({(40, 0): 1e9}, {40: "altered"}, deployment="bad")]
    assert detections_of(detection_frame(found)) == list(detections(found))


def test_flags_name_what_detects_and_at_which_false_alarms() -> None:
    honest = watched(grid(60, 8))
    loud = watched({(99, c): 1e9 for c in range(4)}, {99: "altered"}, deployment="bad")
    quiet = watched({(99, c): 5.0 for c in range(4)}, {99: "altered"}, deployment="bad")
    (flag,) = detection_flags(list(detections([honest, loud])))
    assert flag == "noticed: of_own 100 % at 1 % false alarms"
    (flag,) = detection_flags(list(detections([honest, quiet])))
    assert flag == "unnoticed: of_own 0 % at 1 % false alarms at best"
    flags = detection_flags(list(detections([watched(grid(4, 8)), loud])))
    assert flags == (
        "noticed: of_own 100 % at no false alarm in 16",
        "few_honest_measurements: of_own 16",
    )
    assert detection_flags(list(detections([loud]))) == ("few_honest_measurements: of_own 0",)
    assert detection_flags([]) == ()
    assert {name_of(f) for f in flags} | {"unnoticed"} <= set(EXPLANATIONS)


def plain_report() -> ReportData:
    place = (Position.CURIOUS_SERVER, Channel.CLIENT_UPDATE)
    return report_of([made_up("fl", 1, "dlg", place, {"psnr": 1.0})])


def test_the_report_and_the_terminal_say_what_was_found() -> None:
    loud = watched({(99, c): 1e9 for c in range(4)}, {99: "altered"}, deployment="bad <b>")
    frame = detection_frame([watched(grid(60, 8)), loud])
    report = replace(plain_report(), detection=frame)
    page, text = render(report), detection_text(report)
    assert "What careful clients would have noticed" in page
    assert "bad &lt;b&gt;" in page
    assert text is not None
    assert "of own: detects 100.0% [51.0%, 100.0%] of 4 at 1 % false alarms" in text.plain
    assert [line.honest for line in lines(report)] == ["240"]
    assert detection_text(plain_report()) is None
    assert 'id="detection"' not in render(plain_report())


DETECTORS = [
    {"kind": kind}
    for kind in ("architecture_diff", "gradient_snr", "gradient_statistics", "weight_statistics")
]


@pytest.mark.slow
def test_a_run_ends_with_rates_and_flags(tmp_path: Path) -> None:
    federated = {"kind": "federated", "clients": 8, "rounds": 26, "local_steps": 1}
    malice = {"kind": "model_inconsistency", "rounds": [26], "victim": 1}
    raw = base(
        seeds=[1],
        model={"kind": "mlp", "hidden": [16], "activation": "relu"},
        evaluator={"kind": "softmax"},
        training={"learning_rate": 0.2, "batch_size": 8},
        deployment=[
            {**federated, "name": "honest", "detectors": DETECTORS},
            {**federated, "name": "bad", "detectors": DETECTORS, "malice": malice},
        ],
        attack=[
            {
                "kind": "model_inconsistency",
                "position": "malicious_server",
                "channel": "aggregate",
                "rounds": [26],
                "steps": 5,
            }
        ],
    )
    results = run(Scenario.model_validate(raw), tmp_path, quiet=True)
    frame = pd.read_csv(tmp_path / "detection.csv").set_index("detector")
    assert list(frame["deployment"]) == ["bad"] * 4
    assert (frame["altered"] == 7).all()
    rates = frame["rate"].to_dict()
    assert rates["weight_statistics"] == rates["gradient_statistics"] == 1
    assert rates["architecture_diff"] == rates["gradient_snr"] == 0
    # 26 rounds of 8 clients, the victim's round 26 once in each of the two deployments.
    assert frame.loc["gradient_snr", "calibrated_on"] == 104
    assert frame.loc["weight_statistics", "calibrated_on"] == 13
    assert list(frame["weak"]) == [True, False, False, True]
    rows = results.leakage[results.leakage["position"] == "malicious_server"]
    flags = split(rows["flags"].iloc[0])
    assert any(f.startswith("noticed: gradient_statistics 100 % at 1 %") for f in flags)
    assert any(f.startswith("few_honest_measurements: architecture_diff 13") for f in flags)
    assert (tmp_path / "detection.parquet").is_file()
