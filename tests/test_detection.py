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
from fedmi.leakage.calibration import (
    ALLOWED,
    ENOUGH,
    Calibration,
    Honest,
    stage,
    threshold_of,
)
from fedmi.leakage.clusters import clustered_share
from fedmi.leakage.detection import (
    COLUMNS,
    Detection,
    Watched,
    detection_flags,
    detection_frame,
    detections,
    detections_of,
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


def one_seed(values: list[float]) -> list[Honest]:
    return [Honest(1, 1, 0, value) for value in values]


def alarms(measured: list[Honest], threshold: float) -> int:
    return sum(one.value > threshold for one in measured)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=400))
def test_the_threshold_is_the_smallest_that_keeps_its_promise(values: list[float]) -> None:
    """A fresh value lies above the k-th largest of n with probability k / (n + 1)."""
    threshold = threshold_of(one_seed(values))
    allowed = max(1, math.floor(ALLOWED * (len(values) + 1)))
    assert sum(v > threshold.value for v in values) == threshold.alarms < allowed
    smaller = [v for v in values if v < threshold.value]
    assert not smaller or sum(v > max(smaller) for v in values) >= allowed


@pytest.mark.parametrize("count", [100, 150, 400])
def test_fresh_honest_values_alarm_in_one_per_cent_at_most(count: int) -> None:
    rng = np.random.default_rng(count)
    found = [
        np.mean(rng.random(2000) > threshold_of(one_seed(rng.random(count).tolist())).value)
        for _ in range(400)
    ]
    assert 0.3 * ALLOWED < np.mean(found) < 1.1 * ALLOWED


def test_infinite_honest_values_leave_no_alarm() -> None:
    assert threshold_of(one_seed([math.inf, 1.0])).value == math.inf
    assert math.isnan(threshold_of([]).value)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 12), st.integers(1, 40))
def test_one_seed_is_split_by_clients(seed: int, rounds: int, clients: int, at: int) -> None:
    rng = np.random.default_rng(seed)
    honest = {place: float(rng.random()) for place in grid(rounds, clients)}
    altered = {(at, c): float(2 * rng.random()) for c in range(clients)}
    found = only([watched(honest), watched(altered, {at: "altered"}, deployment="bad")])
    near = sorted(range(1, rounds + 1), key=lambda r: (abs(math.log(r / at)), r))
    each = (clients + 1) // 2
    used = near[: math.ceil(ENOUGH / each)]
    even = sorted((v for (r, c), v in honest.items() if c % 2 == 0 and r in used), reverse=True)
    assert found.calibration == "even clients"
    assert found.calibrated_rounds == f"{at}: {min(used)}-{max(used)}"
    assert found.calibrated_on == len(even)
    assert found.threshold == found.lowest_threshold == even[max(1, (len(even) + 1) // 100) - 1]
    assert found.honest == (clients // 2) * len(used)
    assert found.honest_clusters == len(used)
    assert found.detected == sum(v > found.threshold for v in altered.values())
    assert found.rate == found.detected / clients
    assert (found.ci_low, found.ci_high) == wilson(found.rate, 1)
    assert found.weak == (len(even) < ENOUGH)


def drifting(seed: int, rounds: int, clients: int = 10) -> dict[tuple[int, int], float]:
    """An honest statistic that grows with training, as D-SNR does."""
    rng = np.random.default_rng(seed)
    return {(r, c): r + float(rng.random()) for r, c in grid(rounds, clients)}


def test_an_early_alteration_is_not_hidden_by_late_honest_rounds() -> None:
    """A value no honest client measures before round 30 is noticed in round 2, not in 60."""
    honest = [watched(drifting(s, 80), seed=s) for s in (1, 2, 3)]
    for at, rate in ((2, 1.0), (60, 0.0)):
        case = watched({(at, c): 30.0 for c in range(10)}, {at: "altered"}, deployment="bad")
        found = only([*honest, case])
        assert (found.rate, found.weak) == (rate, False)
        assert found.calibrated_rounds == {2: "2: 1-5", 60: "60: 58-62"}[at]
    # A threshold over all rounds would have hidden it.
    every = [Honest(s, r, c, v) for s in (1, 2) for (r, c), v in drifting(s, 80).items()]
    assert threshold_of(every).value > 30


def test_a_stage_is_what_is_nearest_by_factor_and_no_wider_than_needed() -> None:
    pool = [Honest(1, r, c, 0.0) for r in range(1, 101) for c in range(30)]
    assert sorted({one.round for one in stage(pool, 1)}) == [1, 2, 3, 4]
    assert sorted({one.round for one in stage(pool, 40)}) == [39, 40, 41, 42]
    assert len(stage(pool[:50], 40)) == 50
    wide = [Honest(1, r, 0, 0.0) for r in (1, 2, 4, 8)]
    assert stage(wide, 3) == stage(wide[::-1], 3)[:4]


def test_of_several_seeds_each_is_held_against_the_others() -> None:
    """One seed whose honest values lie above: its thresholds are low, and it alarms itself."""
    high = {place: 5.0 + v / 100 for place, v in grid(20, 10).items()}
    low = {place: 1.0 + v / 1000 for place, v in grid(20, 10).items()}
    bad = {(2, c): 4.0 for c in range(10)}
    all_seeds = [watched(high, seed=1), watched(low, seed=2), watched(low, seed=3)]
    cases = [watched(bad, {2: "altered"}, deployment="bad", seed=s) for s in (1, 2, 3)]
    found = only([*all_seeds, *cases])
    assert found.calibration == "other seeds"
    assert (found.altered, found.detected) == (30, 10)
    assert found.lowest_threshold < 2
    assert found.threshold > 5
    # The tested rounds of seed 1 all lie above the thresholds from seeds 2 and 3.
    assert found.false_alarms == found.honest / 3 == 10 * (found.honest_clusters / 3)
    calibration = Calibration([Honest(s, 1, 0, float(s)) for s in (1, 2, 3)])
    thresholds = {one.seed: threshold.value for one, threshold in calibration.tested(1, 1)}
    assert thresholds == {1: 3.0, 2: 3.0, 3: 2.0}


def test_what_all_clients_measure_alike_counts_once() -> None:
    same = {(r, c): float(r) for r in range(1, 9) for c in range(10)}
    bad = {(20, c): 99.0 for c in range(10)}
    pair = [watched(same, detector=MODEL), watched(bad, {20: "altered"}, MODEL, deployment="bad")]
    found = only(pair)
    assert (found.calibrated_on, found.honest) == (4, 3)  # rounds 1, 3, 5, 7; 2, 4, 6 between
    assert (found.altered, found.altered_clusters, found.detected) == (10, 1, 10)
    assert (found.ci_low, found.ci_high) == wilson(1.0, 1)
    assert only(_as_own(pair)).calibrated_on == 40
    several = [replace(one, seed=s) for one in pair for s in (1, 2, 3)]
    assert only(several).calibrated_on == 16


def _as_own(found: list[Watched]) -> list[Watched]:
    return [replace(one, alike=frozenset()) for one in found]


def test_intervals_count_rounds_and_not_clients() -> None:
    rng = np.random.default_rng(0)
    all_alike = clustered_share([True] * 60, [i // 10 for i in range(60)], rng)
    assert all_alike == wilson(1.0, 6)
    assert clustered_share([False] * 60, [i // 10 for i in range(60)], rng) == wilson(0.0, 6)
    # Ten of twenty rounds all hits, ten none: as wide as twenty cases, not two hundred.
    hits = [i // 10 < 10 for i in range(200)]
    low, high = clustered_share(hits, [i // 10 for i in range(200)], rng)
    naive = wilson(0.5, 20)
    assert (low, high) == pytest.approx(naive, abs=0.04)
    loose = clustered_share(hits, list(range(200)), rng)
    assert loose[1] - loose[0] < 0.4 * (high - low)
    assert all(math.isnan(bound) for bound in clustered_share([], [], rng))


def test_clustered_intervals_cover_where_independent_ones_do_not() -> None:
    """Forty rounds, each with a rate of its own around 0.3, ten clients a round."""
    rng, ours, naive = np.random.default_rng(5), 0, 0
    for _ in range(150):
        rates = rng.beta(0.6, 1.4, 40)
        hits = (rng.random((40, 10)) < rates[:, None]).ravel().tolist()
        low, high = clustered_share(hits, [i // 10 for i in range(400)], rng)
        ours += low <= 0.3 <= high
        low, high = wilson(float(np.mean(hits)), 400)
        naive += low <= 0.3 <= high
    assert ours >= 0.88 * 150 > 0.8 * 150 > naive


def test_rounds_before_the_alteration_serve_once_beside_the_honest_deployment() -> None:
    """Up to it both go alike, so that the same measurement comes twice."""
    honest = watched(grid(4, 4))
    what: dict[int, Sent] = {3: "altered", 4: "tainted"}
    bad = watched(grid(4, 4), what, deployment="bad")
    assert only([honest, bad]).calibrated_on == 8
    assert only([bad]).calibrated_on == 4
    other_seed = replace(bad, seed=2)
    assert only([honest, other_seed]).calibrated_on == 16  # seed 2 is held against seed 1


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


def test_a_threshold_that_honest_seeds_cross_too_often_says_so() -> None:
    """Each seed goes its own way: two of them do not tell what a third one does."""
    seeds = [watched(grid(40, 10, 100.0 * s, 0.01), seed=s) for s in (1, 2, 3)]
    bad = {(9, c): 1e9 for c in range(10)}
    cases = [watched(bad, {9: "altered"}, deployment="bad", seed=s) for s in (1, 2, 3)]
    found = only([*seeds, *cases])
    assert found.false_alarm_rate == pytest.approx(1 / 3)
    assert found.broken
    assert found.at == "at 1 % false alarms (in fact 33 %)"
    flags = detection_flags([found])
    assert "false_alarms_above_aim: of_own 33 %" in flags
    assert name_of(flags[-1]) in EXPLANATIONS
    same = [watched(drifting(s, 40), seed=s) for s in (1, 2, 3)]
    kept = only([*same, *cases])
    assert not kept.broken
    assert kept.at == "at 1 % false alarms"


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
    told = "of own: detects 100.0% [20.7%, 100.0%] of 4 (rounds: 1) at 1 % false alarms"
    assert told in text.plain
    assert "even clients, round 99: 36-60" in text.plain
    assert [line.honest for line in lines(report)] == ["100 (rounds: 25)"]
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
    # 26 rounds of 4 even clients: the last 25 are enough.
    assert frame.loc["gradient_snr", "calibrated_on"] == 100
    assert frame.loc["gradient_snr", "calibrated_rounds"] == "26: 2-26"
    assert frame.loc["weight_statistics", "calibrated_on"] == 13
    assert list(frame["weak"]) == [True, False, False, True]
    rows = results.leakage[results.leakage["position"] == "malicious_server"]
    flags = split(rows["flags"].iloc[0])
    assert any(f.startswith("noticed: gradient_statistics 100 % at 1 %") for f in flags)
    assert any(f.startswith("few_honest_measurements: architecture_diff 13") for f in flags)
    assert (tmp_path / "detection.parquet").is_file()


def test_what_alarms_at_honest_models_as_often_has_not_noticed() -> None:
    found = Detection(
        scenario="s", deployment="bad", training="federated", malice="loki", detector="d",
        lowest_threshold=1.0, threshold=1.0, calibration="other seeds", calibrated_rounds="1",
        calibrated_on=12, calibration_alarms=0, honest=12, honest_clusters=12, false_alarms=6,
        false_alarm_rate=0.5, false_alarm_ci_low=0.25, false_alarm_ci_high=0.75, altered=2,
        altered_clusters=2, detected=2, rate=1.0, ci_low=0.34, ci_high=1.0, weak=True,
    )  # fmt: skip
    assert detection_flags([found])[0].startswith("unnoticed")
    apart = replace(found, ci_low=0.8)
    assert detection_flags([apart])[0].startswith("noticed")
