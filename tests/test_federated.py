"""Federated training: what crosses, what it was computed from, and what happens when it fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fedmi.data.dataset import Card, DataError
from fedmi.deployments.base import DeploymentError, Outcome
from fedmi.deployments.centralized import Centralized
from fedmi.deployments.federated import client as client_module
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.strategies.base import StrategySpec
from fedmi.deployments.federated.strategies.fedadam import FedAdam
from fedmi.deployments.federated.strategies.fedavg import FedAvg
from fedmi.deployments.federated.strategies.fedprox import FedProx
from fedmi.deployments.federated.strategies.fedsgd import FedSGD
from fedmi.deployments.rows import first_use
from fedmi.exposure.observation import Observation
from fedmi.exposure.words import Channel, Position
from fedmi.training.local import batches, fit, mean_gradient
from tests.deployment_fixtures import CLASSES, SHAPE, WithBuffers, job, same, tensors

SERVER, CLIENT = Position.CURIOUS_SERVER, Position.CLIENT
Contribute = Callable[..., object]


def seen(outcome: Outcome, channel: Channel, *rounds: int) -> tuple[Observation, ...]:
    return outcome.transcripts[SERVER].on(channel, rounds or None)


def weighted_mean(items: tuple[Observation, ...], name: str) -> Tensor:
    total = sum(item.clear["num_examples"] for item in items)
    parts = [item.payload[name].double() * item.clear["num_examples"] for item in items]
    return torch.stack(parts).sum(0) / total


@pytest.mark.parametrize("steps", [0, 1])
def test_fedsgd_shows_the_gradient_of_exactly_the_rows_used(steps: int, tmp_path: Path) -> None:
    task = job(tmp_path, record=(1, 3))
    federated = Federated(name="f", clients=4, rounds=3, strategy=FedSGD(), local_steps=steps)
    outcome = federated.train(task)
    gradients = seen(outcome, Channel.GRADIENT)
    assert [(o.round, o.clients) for o in gradients] == [
        (r, (c,)) for r in (1, 3) for c in range(4)
    ]
    for item in gradients:
        rows = outcome.used[item.round, item.clients[0]]
        model = task.model.module(SHAPE, CLASSES)
        model.load_state_dict(dict(outcome.transcripts[SERVER].global_model(item.round)))
        truth = mean_gradient(model, *tensors(task.split.private.take(rows)))
        assert same(item.payload, truth)
        assert item.clear["num_examples"] == len(rows) == (5 if steps else 12)


def test_fedsgd_takes_the_step(tmp_path: Path) -> None:
    task = job(tmp_path, record=(1, 2), weight_decay=0.1)
    outcome = Federated(name="f", clients=5, rounds=2, strategy=FedSGD()).train(task)
    before, after = (outcome.transcripts[SERVER].global_model(round) for round in (1, 2))
    for name in before:
        mean = weighted_mean(seen(outcome, Channel.GRADIENT, 1), name)
        step = 0.2 * (mean + 0.1 * before[name])
        torch.testing.assert_close(after[name].double(), before[name] - step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(proximal_mu=0.5)])
@pytest.mark.parametrize("options", [{"local_epochs": 2}, {"local_steps": 3}])
def test_training_again_on_the_rows_used_gives_the_update(
    strategy: StrategySpec, options: dict[str, int], tmp_path: Path
) -> None:
    task = job(tmp_path, record=(2,), momentum=0.5)
    federated = Federated(name="f", clients=3, rounds=2, strategy=strategy, **options)
    outcome = federated.train(task)
    parts = federated.partition.assign(
        task.split.dealt, 3, task.seed.child("federated", "partition")
    )
    for item in seen(outcome, Channel.CLIENT_UPDATE):
        client = item.clients[0]
        seed = task.seed.child("federated", "round", 2, "client", client)
        work = federated.work(task.recipe)
        steps = batches(len(parts[client]), work, seed)
        model = task.model.module(SHAPE, CLASSES)
        model.load_state_dict(dict(outcome.transcripts[SERVER].global_model(2)))
        loss = fit(model, *tensors(task.split.private.take(parts[client])), steps, work)
        assert same(item.payload, model.state_dict())
        assert item.clear == {"num_examples": 16.0, "train_loss": loss}
        used = outcome.used[2, client]
        assert list(used) == list(parts[client][first_use(steps)])


def test_the_aggregate_is_the_weighted_mean_and_the_next_model(tmp_path: Path) -> None:
    task = job(tmp_path, record=(1, 2), private=46)
    outcome = Federated(name="f", clients=4, rounds=2).train(task)
    for round in (1, 2):
        updates = seen(outcome, Channel.CLIENT_UPDATE, round)
        assert sorted(item.clear["num_examples"] for item in updates) == [11, 11, 12, 12]
        (aggregate,) = seen(outcome, Channel.AGGREGATE, round)
        assert aggregate.clients == (0, 1, 2, 3)
        for name, tensor in aggregate.payload.items():
            close = weighted_mean(updates, name)
            torch.testing.assert_close(tensor.double(), close, rtol=0, atol=1e-6)
        following = outcome.transcripts[SERVER].global_model(round + 1)
        assert same(aggregate.payload, following)
    assert same(outcome.transcripts[SERVER].global_model(3), outcome.state)


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(), FedSGD()])
def test_clients_can_tell_the_aggregate_from_two_models(
    strategy: StrategySpec, tmp_path: Path
) -> None:
    task = job(tmp_path, WithBuffers(), record=(1, 3), weight_decay=0.01, batch_size=8)
    outcome = Federated(name="f", clients=3, rounds=3, strategy=strategy).train(task)
    implied = outcome.transcripts[CLIENT].on(Channel.AGGREGATE)
    assert [item.round for item in implied] == [1, 3]
    for guess, truth in zip(implied, seen(outcome, Channel.AGGREGATE), strict=True):
        assert guess.clients == truth.clients
        for name, tensor in truth.payload.items():
            wanted = tensor.round() if name.endswith("num_batches_tracked") else tensor
            torch.testing.assert_close(
                guess.payload[name].float(), wanted.float(), rtol=1e-3, atol=2e-5
            )


def test_fedadam_keeps_the_aggregate_from_clients_and_takes_adams_step(tmp_path: Path) -> None:
    task = job(tmp_path, record=(1, 2))
    strategy = FedAdam(server_learning_rate=0.05, betas=(0.8, 0.9), tau=1e-2)
    federated = Federated(name="f", clients=3, rounds=2, strategy=strategy)
    outcome = federated.train(task)
    assert (CLIENT, Channel.AGGREGATE) not in {(v.position, v.channel) for v in federated.views()}
    assert not outcome.transcripts[CLIENT].on(Channel.AGGREGATE)
    before, after = (outcome.transcripts[SERVER].global_model(round) for round in (1, 2))
    (aggregate,) = seen(outcome, Channel.AGGREGATE, 1)
    for name in before:
        delta = (aggregate.payload[name] - before[name]).double()
        eta = 0.05 * np.sqrt(1 - 0.9**2) / (1 - 0.8**2)
        step = eta * 0.2 * delta / (torch.sqrt(0.1 * delta**2) + 1e-2)
        assert after[name].dtype == torch.float32
        torch.testing.assert_close(after[name].double(), before[name] + step, rtol=0, atol=1e-6)


def test_proximal_term_of_zero_is_fedavg_and_a_large_one_holds_clients_back(
    tmp_path: Path,
) -> None:
    def drift(strategy: StrategySpec) -> tuple[Outcome, float]:
        federated = Federated(name="f", clients=3, rounds=1, local_epochs=5, strategy=strategy)
        outcome = federated.train(job(tmp_path, record=(1,)))
        start = outcome.transcripts[SERVER].global_model(1)
        return outcome, float(sum((outcome.state[n] - start[n]).square().sum() for n in start))

    plain, far = drift(FedAvg())
    zero, _ = drift(FedProx(proximal_mu=0))
    _, near = drift(FedProx(proximal_mu=4))
    assert same(plain.state, zero.state)
    assert near < far / 4


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD(), FedAdam()])
def test_buffers_are_averaged_and_keep_their_types(strategy: StrategySpec, tmp_path: Path) -> None:
    task = job(tmp_path, WithBuffers(), record=(2,))
    outcome = Federated(name="f", clients=3, rounds=2, strategy=strategy, local_steps=2).train(task)
    assert outcome.state["2.num_batches_tracked"].dtype == torch.int64
    assert outcome.state["2.num_batches_tracked"] == (2 if isinstance(strategy, FedSGD) else 4)
    replies = seen(outcome, strategy.sends)
    mean = weighted_mean(replies, "2.running_var")
    torch.testing.assert_close(outcome.state["2.running_var"].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD(), FedAdam()])
@pytest.mark.parametrize("tls", [True, False])
def test_every_view_is_recorded_and_nothing_else(
    strategy: StrategySpec, tls: bool, tmp_path: Path
) -> None:
    federated = Federated(name="f", clients=3, rounds=2, strategy=strategy, tls=tls)
    outcome = federated.train(job(tmp_path, record=(1, 2)))
    views = {(v.position, v.channel) for v in federated.views()}
    users = (Position.API_USER, Position.EAVESDROPPER)  # of answers: see the rehearsal of serving
    served = {(who, c) for who in users for c in (Channel.PREDICTIONS, Channel.LABELS)}
    recorded = {
        (o.position, o.channel) for t in outcome.transcripts.values() for o in t.observations
    }
    assert recorded == views - served
    assert (Position.EAVESDROPPER in outcome.transcripts) == (not tls)
    rounds = [o.round for o in outcome.transcripts[CLIENT].on(Channel.GLOBAL_MODEL)]
    assert rounds == [1, 2, 3]
    if not tls:
        tapped = outcome.transcripts[Position.EAVESDROPPER].on(strategy.sends)
        for ours, theirs in zip(tapped, seen(outcome, strategy.sends), strict=True):
            assert replace(ours, position=SERVER) == theirs


def test_only_recorded_rounds_are_kept(tmp_path: Path) -> None:
    outcome = Federated(name="f", clients=3, rounds=4).train(job(tmp_path, record=(3,)))
    assert {o.round for o in outcome.transcripts[SERVER].observations} == {3, 5}
    assert set(outcome.used) == {(3, 0), (3, 1), (3, 2)}


def test_the_first_model_is_the_one_centralized_training_starts_from(tmp_path: Path) -> None:
    task = job(tmp_path, record=(1,))
    start = task.model.build(SHAPE, CLASSES, task.seed.child("model")).state_dict()
    outcome = Federated(name="f", clients=3, rounds=1).train(task)
    assert same(outcome.transcripts[SERVER].global_model(1), start)
    frozen = replace(task, recipe=task.recipe.model_copy(update={"learning_rate": 1e-30}))
    assert same(Centralized(name="c", epochs=1).train(frozen).state, start)


def test_sampling_and_dropout_follow_from_the_seed(tmp_path: Path) -> None:
    every = tuple(range(1, 9))
    federated = Federated(name="f", clients=8, rounds=8, fraction=0.5, dropout=0.3)
    first, again = (federated.train(job(tmp_path / n, record=every)) for n in "ab")
    assert same(first.state, again.state)
    asked = {o.round: o.clients for o in seen(first, Channel.GLOBAL_MODEL, *every)}
    assert all(len(clients) == 4 for clients in asked.values())
    assert len(set(asked.values())) > 3
    replied = {o.round: o.clients for o in seen(first, Channel.AGGREGATE)}
    assert all(set(replied[round]) <= set(asked[round]) for round in every)
    lost = sum(len(asked[round]) - len(replied[round]) for round in every)
    assert 0 < lost < 24
    assert set(first.used) == {(r, c) for r in every for c in replied[r]}
    one_up = seen(first, Channel.CLIENT_UPDATE)[0].wire_bytes
    one_down = seen(first, Channel.GLOBAL_MODEL)[0].wire_bytes
    assert first.cost.wire_bytes_up == one_up * (32 - lost)
    assert first.cost.wire_bytes_down == one_down * 32
    assert not first.flags


def test_learns_what_centralized_training_learns(tmp_path: Path) -> None:
    outcome = Federated(name="f", clients=4, rounds=15, local_epochs=2).train(job(tmp_path))
    assert outcome.utility.accuracy > 0.9


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD(), FedProx()])
@pytest.mark.parametrize("model", [None, WithBuffers()])
def test_estimate_is_close(
    strategy: StrategySpec, model: WithBuffers | None, tmp_path: Path
) -> None:
    task = job(tmp_path, model)
    federated = Federated(name="f", clients=4, rounds=3, fraction=0.5, strategy=strategy)
    card = Card("t", "t", "t", SHAPE, CLASSES, private_records=48, identities=False)
    guess = federated.estimate(card, task.model, 0)
    cost = federated.train(task).cost
    assert guess.parameters == sum(
        p.numel() for p in task.model.module(SHAPE, CLASSES).parameters()
    )
    assert guess.wire_bytes_up == pytest.approx(cost.wire_bytes_up, rel=0.03)
    assert guess.wire_bytes_down == pytest.approx(cost.wire_bytes_down, rel=0.03)


def broken_in_round_three(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    """From round 3 on these clients raise."""
    working = client_module.contribute

    def contribute(plan: object, client: int, round: int, *given: object) -> object:
        if client in broken and round >= 3:
            raise OSError("disk is on fire")
        return working(plan, client, round, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "contribute", contribute)


def test_a_client_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_in_round_three(monkeypatch, 2)
    with pytest.raises(DeploymentError, match="'f', round 3, client 2: OSError: disk is on fire"):
        Federated(name="f", clients=4, rounds=5).train(job(tmp_path))


def test_a_client_that_raises_is_tolerated_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_in_round_three(monkeypatch, 2)
    federated = Federated(name="f", clients=4, rounds=4, min_clients=3)
    outcome = federated.train(job(tmp_path, record=(2, 3)))
    assert outcome.flags == {"clients_lost"}
    assert [o.clients for o in seen(outcome, Channel.AGGREGATE)] == [(0, 1, 2, 3), (0, 1, 3)]
    assert (3, 2) not in outcome.used


def test_fewer_replies_than_asked_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_in_round_three(monkeypatch, 0, 2)
    federated = Federated(name="f", clients=4, rounds=4, min_clients=3)
    with pytest.raises(DeploymentError, match=r"round 3: 2 of 4 clients replied .* 3 needed.*fire"):
        federated.train(job(tmp_path))


def test_a_round_nobody_answers_is_an_error(tmp_path: Path) -> None:
    federated = Federated(name="f", clients=2, rounds=50, dropout=0.9)
    with pytest.raises(DeploymentError, match=r"0 of 2 clients replied \(2 dropped out, 0 failed"):
        federated.train(job(tmp_path))


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()])
def test_a_diverged_client_is_named(strategy: StrategySpec, tmp_path: Path) -> None:
    task = job(tmp_path, learning_rate=1000.0, weight_decay=1.0)
    federated = Federated(name="f", clients=3, rounds=50, strategy=strategy, local_epochs=3)
    with pytest.raises(DeploymentError, match=r"round \d+, client \d.*: DivergedError: "):
        federated.train(task)


def test_more_clients_than_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="49 clients but 48 private records"):
        Federated(name="f", clients=49).train(job(tmp_path))


def test_a_round_to_record_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="record round 4, but has rounds 1 to 3"):
        Federated(name="f", rounds=3).train(job(tmp_path, record=(2, 4)))


def test_more_replies_needed_than_clients_asked() -> None:
    with pytest.raises(ValidationError, match="min_clients is 4, but a round asks 3 clients"):
        Federated(name="f", clients=6, fraction=0.5, min_clients=4)


def test_strategies_and_partitions_are_chosen_by_kind() -> None:
    federated = Federated.model_validate(
        {
            "name": "f",
            "strategy": {"kind": "fedadam", "betas": [0.5, 0.6]},
            "partition": {"kind": "dirichlet"},
        }
    )
    assert federated.strategy == FedAdam(betas=(0.5, 0.6))
    assert federated.partition.kind == "dirichlet"
    assert Federated.model_validate(federated.model_dump(mode="json")) == federated


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1))
def test_first_use_is_the_order_of_a_dict(steps: list[list[int]]) -> None:
    rows = first_use([np.array(step, dtype=np.int64) for step in steps])
    assert list(rows) == list(dict.fromkeys(row for step in steps for row in step))
