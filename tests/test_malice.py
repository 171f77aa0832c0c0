"""What every malicious server has in common: what it keeps of a malicious round."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmi.deployments.base import Outcome
from fedmi.deployments.federated.deployment import Federated
from fedmi.exposure.words import Channel, Position
from tests.imprint_cases import in_bins, job


def trained(directory: Path, keeps: str, **options: object) -> Outcome:
    settings: dict[str, object] = {
        "name": "f",
        "clients": 2,
        "rounds": 1,
        "malice": {"kind": "trap_weights", "records": 8, "keeps": keeps},
    }
    federated = Federated.model_validate(settings | options)
    return federated.train(job(directory, in_bins(range(4, 20))))


def changed(outcome: Outcome) -> frozenset[str]:
    """Names of what the round changed in the honest model."""
    server = outcome.transcripts[Position.MALICIOUS_SERVER]
    before = server.global_model(1)
    return frozenset(n for n, t in outcome.state.items() if not torch.equal(t, before[n]))


def altered(outcome: Outcome) -> frozenset[str]:
    server = outcome.transcripts[Position.MALICIOUS_SERVER]
    honest, sent = server.global_model(1), server.model_sent(1, 0)
    return frozenset(n for n, t in sent.items() if not torch.equal(t, honest[n]))


def test_a_server_keeps_all_of_a_malicious_round_or_a_part_or_nothing(tmp_path: Path) -> None:
    kept = {k: trained(tmp_path / k, k) for k in ("all", "unaltered", "nothing")}
    every = frozenset(kept["all"].state)
    hidden = altered(kept["all"])
    assert hidden
    assert hidden < every
    assert changed(kept["all"]) == every
    assert changed(kept["unaltered"]) == every - hidden
    assert not changed(kept["nothing"])


@pytest.mark.parametrize("keeps", ["unaltered", "nothing"])
def test_what_the_server_saw_does_not_depend_on_what_it_keeps(tmp_path: Path, keeps: str) -> None:
    def seen(choice: str) -> dict[str, Tensor]:
        server = trained(tmp_path / choice, choice).transcripts[Position.MALICIOUS_SERVER]
        (mean,) = server.on(Channel.AGGREGATE, [1])
        return dict(mean.payload)

    both = seen("all"), seen(keeps)
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_honest_rounds_keep_all(tmp_path: Path) -> None:
    outcome = trained(tmp_path, "nothing", rounds=2)
    assert changed(outcome) == frozenset(outcome.state)
