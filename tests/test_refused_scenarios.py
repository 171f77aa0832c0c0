"""What users of malicious servers, sentences and tables get wrong is refused before the run."""

from typing import Any

import pytest
import torch

from fedmi.exposure.schema import Column, Table
from fedmi.report.readable import compared
from fedmi.scenario.cells import plan
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.loading import from_raw
from tests.scenarios import base

SERVED = {
    "kind": "federated",
    "name": "fl",
    "clients": 3,
    "rounds": 3,
    "local_steps": 1,
    "malice": {"kind": "loki", "bins": 16, "groups": 3, "rounds": [1, 2]},
}
LOKI = {
    "kind": "loki",
    "position": "malicious_server",
    "channel": "aggregate",
    "knowledge": ["public_data"],
    "rounds": [1],
}
SMALL = {"width": 2, "steps": 1, "batch_size": 2}
PLAYED = {
    "kind": "federated",
    "name": "fl",
    "clients": 3,
    "rounds": 2,
    "intruder": {"kind": "gan", "fakes": 1, "game": SMALL},
}
GAN = {"kind": "gan", "knowledge": ["public_data"]}


def checked(**changes: Any) -> None:
    plan(from_raw(base(**{"seeds": [1], **changes})))


def test_a_round_in_which_the_server_is_honest() -> None:
    checked(deployment=[SERVED], attack=[LOKI | {"rounds": [1, 2]}])
    with pytest.raises(ScenarioError, match=r"rounds names 3.*malice has rounds = \[1, 2\]"):
        checked(deployment=[SERVED], attack=[LOKI | {"rounds": [1, 3]}])


def test_a_game_that_the_intruder_does_not_play() -> None:
    checked(deployment=[PLAYED], attack=[GAN])
    checked(deployment=[PLAYED], attack=[GAN | {"game": SMALL}])
    with pytest.raises(ScenarioError, match="game is another one than that of the intruder"):
        checked(deployment=[PLAYED], attack=[GAN | {"game": SMALL | {"steps": 9}}])


def test_a_metric_of_other_records() -> None:
    labels = base()["attack"][1]
    checked(attack=[labels], metrics=["label_recovery_rate", "psnr"])
    with pytest.raises(ScenarioError, match=r'"rouge_l", which is for text.*records are pixels'):
        checked(attack=[labels], metrics=["label_recovery_rate", "rouge_l"])


def test_metrics_are_shown_in_the_order_in_which_they_are_listed() -> None:
    inverted = base(metrics=["ssim", "psnr"], attack=base()["attack"][:1])
    assert from_raw(inverted).shown_first == ("ssim", "psnr")
    assert from_raw(inverted | {"primary": ["psnr"]}).shown_first == ("psnr",)
    assert from_raw(base()).shown_first[0] == "psnr"


def test_numbers_of_a_table_are_marked_right_as_they_are_counted() -> None:
    schema = Table(
        columns=(
            Column(name="age", low=0, high=100, deviation=20),
            Column(name="likes it", levels=("no", "yes")),
        )
    )
    true, near, far = (torch.tensor([age, 0.0, 1.0]) for age in (0.71, 0.71 + 0.06, 0.71 + 0.07))
    assert compared(schema, near, true) == (("age = 77", True), ("likes it = yes", True))
    assert compared(schema, far, true) == (("age = 78", False), ("likes it = yes", True))
