"""A client that takes its own update off the average that two global models tell it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmi.attacks.base import Attack, Case
from fedmi.attacks.engine.evidence import Evidence, read
from fedmi.attacks.gradient.disaggregation import GradientDisaggregation
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.deployments.base import Job, Outcome
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.intruders.gan import GAN
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.classifiers import MLP
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from fedmi.runs.aims import granted_examples, targets_of
from fedmi.runs.execute import run
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.loading import load
from tests.deployment_fixtures import CLASSES, SHAPE, job

CLIENT, INTRUDER, SERVER = Position.CLIENT, Position.MALICIOUS_CLIENT, Position.CURIOUS_SERVER
AGGREGATE = Channel.AGGREGATE


def attack(kind: type[Attack] = LinearInversion, **options: object) -> Attack:
    given = {"position": CLIENT, "channel": AGGREGATE, "knowledge": {Fact.NUM_EXAMPLES}}
    return kind.model_validate({**given, **options})


def task(tmp_path: Path, record: tuple[int, ...] = (1,), **changes: object) -> Job:
    made = job(
        tmp_path, MLP(hidden=(16,), activation="tanh"), record=record, private=12, batch_size=1
    )
    return replace(made, confide=True, **changes)  # type: ignore[arg-type]


def federated(clients: int, **options: object) -> Federated:
    given = {"name": "f", "clients": clients, "rounds": 2, "local_steps": 1}
    return Federated.model_validate({**given, "strategy": {"kind": "fedsgd"}, **options})


def case_of(made: Federated, work: Job, outcome: Outcome, asked: Attack) -> Case:
    """What the position knows, its own update among it."""
    transcript = outcome.transcripts[asked.position]
    targets, told = targets_of(asked, transcript, outcome, CLASSES, Seed.root(1))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE, Fact.LOCAL_TRAINING, Fact.NUM_EXAMPLES}),
        build=lambda: work.model.build(SHAPE, CLASSES, Seed.root(9)),
        work=made.work(work.recipe),
        num_examples=granted_examples(outcome, targets),
        colluders=told,
    )
    return Case(transcript, knowledge, targets, Seed.root(5))


def of_others(made: Federated, work: Job, asked: Attack) -> tuple[Outcome, Case, Evidence]:
    outcome = made.train(work)
    case = case_of(made, work, outcome, asked)
    return outcome, case, read(case, AGGREGATE)[0]


def sent_by(outcome: Outcome, client: int) -> dict[str, Tensor]:
    """One client's gradient or descent, as the server of an unprotected deployment sees it."""
    seen = outcome.transcripts[SERVER]
    base = seen.global_model(1)
    for channel in (Channel.GRADIENT, Channel.CLIENT_UPDATE):
        for item in seen.on(channel, [1]):
            if item.clients == (client,):
                gradient = channel == Channel.GRADIENT
                return {n: t if gradient else base[n] - t for n, t in item.payload.items()}
    raise AssertionError("the client sent nothing")


def error(case: Case, work: Job, outcome: Outcome) -> float:
    """Of the reconstruction of the last client's record."""
    (found,) = attack().reconstruct(case)
    assert found.samples is not None
    (row,) = outcome.used[1, case.targets[0].clients[-1]]
    truth = torch.from_numpy(work.split.private.inputs[row])
    return float((found.samples - truth).abs().flatten(1).max(1).values.min())


@pytest.mark.parametrize("strategy", ["fedsgd", "fedavg"])
def test_of_two_clients_the_other_ones_record_is_exact(tmp_path: Path, strategy: str) -> None:
    work, made = task(tmp_path), federated(2, strategy={"kind": strategy})
    outcome, case, seen = of_others(made, work, attack())
    assert [target.id for target in case.targets] == ["round 1, client 1"]
    for name, truth in sent_by(outcome, 1).items():
        torch.testing.assert_close(seen.descent[name], truth, rtol=0, atol=1e-5)
        assert not torch.allclose(truth, sent_by(outcome, 0)[name], atol=1e-3)
    assert error(case, work, outcome) < 2e-3


def test_of_three_clients_a_mixture_of_the_others_is_left(tmp_path: Path) -> None:
    work, made = task(tmp_path), federated(3)
    outcome, case, seen = of_others(made, work, attack())
    assert [target.clients for target in case.targets] == [(1, 2)]
    first, second = sent_by(outcome, 1), sent_by(outcome, 2)
    for name, truth in first.items():
        mean = (truth + second[name]) / 2
        torch.testing.assert_close(seen.descent[name], mean, rtol=0, atol=1e-5)
    assert error(case, work, outcome) > 0.05


def test_a_colluder_of_three_leaves_the_third_alone(tmp_path: Path) -> None:
    work, made = task(tmp_path), federated(3)
    outcome, case, seen = of_others(made, work, attack(colluders=1))
    (target,) = case.targets
    assert len(target.clients) == 1
    assert target.clients != (0,)
    for name, truth in sent_by(outcome, target.clients[0]).items():
        torch.testing.assert_close(seen.descent[name], truth, rtol=0, atol=2e-5)
    assert error(case, work, outcome) < 5e-3


def test_unequal_clients_are_weighed_by_what_they_hold(tmp_path: Path) -> None:
    partition = {"kind": "quantity_skew", "dirichlet_alpha": 0.5}
    made = federated(3, partition=partition, local_steps=0, strategy={"kind": "fedavg"})
    work = task(tmp_path)
    outcome, _, seen = of_others(made, work, attack())
    counts = [len(outcome.used[1, client]) for client in (1, 2)]
    assert counts[0] != counts[1]
    first, second = sent_by(outcome, 1), sent_by(outcome, 2)
    for name in first:
        mean = (counts[0] * first[name] + counts[1] * second[name]) / sum(counts)
        torch.testing.assert_close(seen.descent[name], mean, rtol=0, atol=1e-5)


def test_behind_secure_aggregation_two_clients_hide_nothing_from_each_other(
    tmp_path: Path,
) -> None:
    clear = federated(3).train(task(tmp_path / "clear"))
    sealed = federated(3, protections=(SecAggPlus(),))
    work = task(tmp_path / "sealed")
    _, case, seen = of_others(sealed, work, attack(colluders=1))
    (client,) = case.targets[0].clients
    for name, truth in sent_by(clear, client).items():
        torch.testing.assert_close(seen.descent[name], truth, rtol=0, atol=1e-2)


@pytest.mark.parametrize("rounds", [(1,), (1, 2)])
def test_its_own_records_are_never_a_target(tmp_path: Path, rounds: tuple[int, ...]) -> None:
    made = federated(4, fraction=0.75, rounds=3)
    outcome = made.train(task(tmp_path, rounds))
    transcript = outcome.transcripts[CLIENT]
    for kind in (LinearInversion, GradientDisaggregation):
        asked = attack(kind, rounds=rounds, knowledge=())
        targets, told = targets_of(asked, transcript, outcome, CLASSES, Seed.root(1))
        assert targets
        for target in targets:
            (seen,) = transcript.on(AGGREGATE, [target.round or 0])
            assert min(seen.clients) not in target.clients
            assert min(seen.clients) in {item.client for item in told[target.id]}


def test_the_server_still_goes_for_everybody(tmp_path: Path) -> None:
    outcome = federated(3).train(task(tmp_path))
    asked = attack(position=SERVER)
    targets, told = targets_of(asked, outcome.transcripts[SERVER], outcome, CLASSES, Seed.root(1))
    assert targets == (Target("round 1, 3 clients", None, 1, (0, 1, 2)),)
    assert told == {}


def test_a_malicious_client_is_the_one_that_the_deployment_names(tmp_path: Path) -> None:
    by_label = {"kind": "by_label", "labels_per_client": 1}
    made = federated(3, intruder=GAN(client=2, fakes=0, victims=(0,)), partition=by_label)
    outcome = made.train(task(tmp_path))
    asked = attack(position=INTRUDER)
    targets, told = targets_of(asked, outcome.transcripts[INTRUDER], outcome, 4, Seed.root(1))
    assert [target.clients for target in targets] == [(0, 1)]
    assert {item.client for item in told[targets[0].id]} == {2}


TEXT = """
name = "curious"
seeds = [1]
metrics = [{ kind = "psnr" }]
[data]
kind = "digits"
[model]
kind = "mlp"
hidden = [32]
[training]
learning_rate = 0.1
batch_size = 1
[evaluator]
kind = "softmax"
[[deployment]]
kind = "federated"
name = "two"
clients = CLIENTS
rounds = 1
local_steps = 1
strategy = { kind = "fedsgd" }
[[attack]]
kind = "linear_inversion"
position = "client"
channel = "aggregate"
knowledge = ["num_examples"]
"""


def scenario(tmp_path: Path, clients: int, more: str = "") -> Path:
    path = tmp_path / "curious.toml"
    path.write_text(TEXT.replace("CLIENTS", str(clients)) + more)
    return path


@pytest.mark.parametrize(("clients", "more"), [(1, ""), (2, "colluders = 1\n")])
def test_a_client_in_an_average_of_nobody_else_is_refused(
    tmp_path: Path, clients: int, more: str
) -> None:
    with pytest.raises(ScenarioError, match="holds nobody else"):
        load(scenario(tmp_path, clients, more))


def test_the_row_says_that_its_own_update_is_known(tmp_path: Path) -> None:
    done = run(load(scenario(tmp_path, 2)), out=tmp_path / "run", jobs=0, quiet=True)
    assert not done.failures
    (row,) = done.leakage.to_dict("records")
    assert "own update" in row["knowledge"]
    assert "fewer_colluders_than_asked" not in row["flags"]
    assert row["value"] > 40
    assert row["n"] == 1
    assert row["advantage"] > 20
