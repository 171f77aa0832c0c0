"""Which unprotected deployment a row is held against, and what honest measurements compare."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmi.deployments.federated.deployment import Federated
from fedmi.exposure.words import Channel, Position
from fedmi.leakage.flags import EXPLANATIONS, name_of
from fedmi.leakage.row import LeakageRow, split
from fedmi.leakage.settings import Settings, differing
from fedmi.leakage.table import leakage_frame, leakage_rows, scores_frame
from fedmi.leakage.tradeoff import tradeoff_frame
from fedmi.leakage.trial import MetricInfo, Trial, from_json, to_json
from fedmi.runs.detection import comparable
from fedmi.runs.settings import settings_by_deployment, settings_of
from fedmi.scenario.cells import TrainingCell, plan
from fedmi.scenario.loading import load
from fedmi.scenario.schema import Scenario
from tests.scenarios import base
from tests.test_leakage import LEAKS, PSNR, trial

ROOT = Path(__file__).parent.parent

BIG, SMALL = {"batch_size": "32", "rounds": "12"}, {"batch_size": "1", "rounds": "12"}


def sets(values: Mapping[str, str]) -> Settings:
    return tuple(sorted(values.items()))


def one(name: str, values: Mapping[str, str], gain: float = 0.0, **changes: object) -> Trial:
    return trial([g + gain for g in LEAKS], deployment=name, settings=sets(values), **changes)


def closed(name: str, values: Mapping[str, str], **changes: object) -> Trial:
    return one(name, values, -2.0, protections=("dp",), **changes)


def row_of(deployment: str, *trials: Trial) -> LeakageRow:
    return next(row for row in leakage_rows(trials, [PSNR]) if row.deployment == deployment)


def mean(gain: float = 0.0) -> float:
    return sum(LEAKS) / len(LEAKS) + gain


@pytest.mark.parametrize("order", [1, -1])
def test_the_control_is_the_one_with_the_fewest_other_settings(order: int) -> None:
    """Its name begins quite otherwise, and that of another one just alike."""
    opens = [one("one record, long", BIG, 1.0), one("plain", SMALL, 2.0)][::order]
    row = row_of("one record, DP", *opens, closed("one record, DP", SMALL))
    assert row.positive_control == pytest.approx(mean(2.0))
    assert "control_differs" not in {name_of(flag) for flag in split(row.flags)}


def test_names_decide_only_between_equals() -> None:
    far = {**SMALL, "rounds": "220"}
    trials = [one("a", far, 3.0), one("c", SMALL, 1.0), one("b", SMALL, 2.0)]
    row = row_of("b, DP", *trials, closed("b, DP", SMALL))
    assert row.positive_control == pytest.approx(mean(2.0))


def test_a_control_of_other_local_work_is_not_silent() -> None:
    trials = [one("honest", {**BIG, "rounds": "220"}, 1.0), closed("DP", SMALL)]
    row = row_of("DP", *trials)
    assert row.positive_control == pytest.approx(mean(1.0))
    assert "control_differs: batch_size 32 (here 1), rounds 220 (here 12)" in split(row.flags)
    assert "control_differs" in EXPLANATIONS
    assert "control_differs" not in row_of("honest", *trials).flags


def test_another_malice_is_no_control() -> None:
    server = {"position": Position.MALICIOUS_SERVER, "channel": Channel.AGGREGATE}
    loki, few = {"malice": "loki", "malice.bins": "128"}, {"malice": "loki", "malice.bins": "64"}
    trap = {"malice": "trap_weights", "malice.records": "32"}
    shielded = closed("s", {**SMALL, **loki}, **server)
    row = row_of("s", one("t", {**SMALL, **trap}, **server), shielded)
    assert math.isnan(row.positive_control)
    assert "no_positive_control" in split(row.flags)
    both = [one("t", {**SMALL, **trap}, **server), one("l", {**BIG, **few}, 1.0, **server)]
    row = row_of("s", *both, shielded)
    assert row.positive_control == pytest.approx(mean(1.0))
    told = "control_differs: batch_size 32 (here 1), malice.bins 64 (here 128)"
    assert told in split(row.flags)


def test_what_a_curious_server_sees_stands_for_a_malicious_one_and_says_so() -> None:
    curious = one("honest", {**SMALL, "malice": "none"}, 1.0)
    active = closed("s", {**SMALL, "malice": "loki"}, position=Position.MALICIOUS_SERVER)
    row = row_of("s", curious, active)
    assert row.positive_control == pytest.approx(mean(1.0))
    assert "control_differs: malice none (here loki)" in split(row.flags)


def test_options_count_only_where_the_kind_is_the_same() -> None:
    mine = sets({"malice": "loki", "malice.rounds": "[1]", "rounds": "12", "local_steps": "1"})
    theirs = sets({"malice": "fishing", "malice.rounds": "[2]", "rounds": "9"})
    known = {("s", "a"): mine, ("s", "b"): theirs}
    rows = {row.deployment: row for row in leakage_rows([one("a", {}), one("b", {})], [PSNR])}
    assert differing(rows["a"], rows["b"], known) == ("malice", "rounds")


def test_the_trade_off_takes_the_control_of_the_leakage_table() -> None:
    trials = [
        one("one record, long", BIG, 1.0),
        one("plain", SMALL, 2.0),
        closed("one record, DP", SMALL),
    ]
    rows = leakage_rows(trials, [PSNR])
    frame = leakage_frame(trials, [PSNR])
    known = {("s", t.deployment): t.settings for t in trials}
    found = tradeoff_frame(scores_frame(trials), frame, [MetricInfo("psnr", True)], settings=known)
    assert set(found["control"]) == {"plain"}
    assert set(found["control_advantage"]) == {rows[2].positive_control}


def test_a_trial_keeps_its_settings() -> None:
    kept = one("a", SMALL)
    assert from_json(to_json(kept)) == kept


FEDERATED = {"kind": "federated", "clients": 8, "rounds": 4, "local_steps": 1}


def cells(*deployments: Mapping[str, object], **changes: object) -> tuple[TrainingCell, ...]:
    named = [{**FEDERATED, "name": f"d{i}", **table} for i, table in enumerate(deployments)]
    raw = base(
        seeds=[1],
        model={"kind": "mlp", "hidden": [16], "activation": "relu"},
        evaluator={"kind": "softmax"},
        training={"learning_rate": 0.2, "batch_size": 8},
        deployment=named,
        **changes,
    )
    raw.pop("attack", None)
    attack = {
        "kind": "linear_inversion",
        "position": "curious_server",
        "channel": "aggregate",
        "rounds": [1],
    }
    found = plan(Scenario.model_validate({**raw, "attack": [attack]}))
    by_name = {c.deployment.name: c for c in found.trainings if c.twin == "none"}
    return tuple(by_name[str(table["name"])] for table in named)


def test_settings_are_what_is_trained_and_not_how_it_is_protected() -> None:
    plain, shielded = cells(
        {}, {"batch_size": 8, "protections": [{"kind": "secagg_plus"}], "min_clients": 5}
    )
    found = dict(settings_of(plain))
    assert settings_of(plain) == settings_of(shielded)
    wanted = {"batch_size": "8", "clients": "8", "local_steps": "1", "malice": "none"}
    assert wanted.items() <= found.items()
    assert (found["partition"], found["learning_rate"]) == ("iid", "0.2")
    assert not {"name", "protections", "serving", "detectors", "seed", "local_epochs"} & set(found)
    epoch, _ = cells({"local_steps": 0, "malice": {"kind": "model_inconsistency"}}, {})
    assert dict(settings_of(epoch))["local_epochs"] == "1"
    assert dict(settings_of(epoch))["malice"] == "model_inconsistency"


DETECTORS = [{"kind": "architecture_diff"}, {"kind": "gradient_snr"}, {"kind": "weight_statistics"}]
NOISE = {"kind": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rounds": 40}, True),
        ({"protections": [{"kind": "secagg_plus"}]}, True),
        ({"malice": {"kind": "model_inconsistency", "rounds": [2]}}, True),
        ({"partition": {"kind": "by_label", "labels_per_client": 1}}, False),
        ({"clients": 10}, False),
        ({"fraction": 0.5}, False),
        ({"local_steps": 2}, False),
        ({"batch_size": 4}, False),
        ({"protections": [NOISE]}, False),
        ({"recipe": {"learning_rate": 0.1, "batch_size": 8}}, False),
    ],
)
def test_only_comparable_trainings_calibrate_a_detector(
    change: Mapping[str, object], same: bool
) -> None:
    """Another partition, number of clients or noise makes other models; sums and length do not."""
    here, there = cells({"detectors": DETECTORS}, {**change, "detectors": DETECTORS})
    found = [comparable(cell, as_federated(cell)) for cell in (here, there)]
    for kind in ("gradient_snr", "weight_statistics"):
        assert (found[0][kind] == found[1][kind]) == same
    assert found[0]["architecture_diff"] == found[1]["architecture_diff"]


def test_the_length_counts_where_noise_may_be_set_by_it() -> None:
    noisy = {"protections": [NOISE], "detectors": DETECTORS}
    here, there = cells(noisy, {**noisy, "rounds": 9})
    found = [comparable(cell, as_federated(cell)) for cell in (here, there)]
    assert found[0]["gradient_snr"] != found[1]["gradient_snr"]


def test_a_detector_of_other_options_calibrates_nothing() -> None:
    here, there = cells(
        {"detectors": DETECTORS}, {"detectors": [{"kind": "gradient_snr", "records": 3}]}
    )
    found = [comparable(cell, as_federated(cell))["gradient_snr"] for cell in (here, there)]
    assert found[0] != found[1]


def as_federated(cell: TrainingCell) -> Federated:
    assert isinstance(cell.deployment, Federated)
    return cell.deployment


def test_a_plan_tells_the_settings_of_what_is_attacked() -> None:
    raw = base(seeds=[1, 2])
    todo = plan(Scenario.model_validate(raw))
    found = settings_by_deployment(todo)
    assert {title for _, title in found} == {cell.deployment_title for cell in todo.attacks}
    for cell in todo.attacks:
        assert found[(todo.scenario.name, cell.deployment_title)] == settings_of(cell.training)


def test_the_shipped_scenario_has_a_control_for_every_server_behind_secagg() -> None:
    todo = plan(load(ROOT / "scenarios" / "malicious_server.toml"))
    known = settings_by_deployment(todo)
    behind = [title for _, title in known if title.endswith(", SecAgg+")]
    assert len(behind) == 4
    for title in behind:
        alone = (todo.scenario.name, title.removesuffix(", SecAgg+"))
        assert known[alone] == known[todo.scenario.name, title]
