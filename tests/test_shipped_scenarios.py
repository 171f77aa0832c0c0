"""Every shipped scenario can be run as it is, or says which data the user is to bring."""

from pathlib import Path

import pytest

from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.loading import load

FILES = sorted((Path(__file__).parent.parent / "scenarios").glob("*.toml"))
BRINGS = {"update_channel_full.toml": "cifar10"}
"""Scenarios on data that no package ships."""


def test_there_are_scenarios() -> None:
    assert {"quickstart.toml", "update_channel.toml", "closed_form.toml"} <= {f.name for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_scenario_is_valid(file: Path) -> None:
    if file.name not in BRINGS:
        load(file)
        return
    with pytest.raises(ScenarioError) as refused:
        load(file)
    assert [text.count(BRINGS[file.name]) > 0 for text in refused.value.problems] == [True]
