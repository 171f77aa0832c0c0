"""Training on shares: the model is that of centralized training, and nobody alone sees a record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

pytest.importorskip("spu")

from fedmi.data.dataset import Card
from fedmi.deployments.base import DeploymentError, Job, Outcome
from fedmi.deployments.centralized import Centralized
from fedmi.deployments.serving.base import Serving
from fedmi.deployments.serving.exact import Exact
from fedmi.deployments.serving.smpc import SMPCServing
from fedmi.deployments.smpc.deployment import SMPC
from fedmi.deployments.smpc.owners import Owners
from fedmi.deployments.smpc.recording import Recorder
from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.words import Channel, Position
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.mpc.cluster import Cluster
from fedmi.mpc.guard import Guard
from tests.deployment_fixtures import CLASSES, SHAPE, WithBuffers, job

EPOCHS, BATCH, OWNERS = 5, 20, 3
"""48 records: batches of 20, 20 and 8."""


@dataclass(frozen=True)
class Trained:
    task: Job
    outcome: Outcome
    central: Outcome


def under(directory: Path, model: ModelSpec, deployment: SMPC, **recipe: object) -> Trained:
    """Trained on shares and centrally, with the same seed and recipe."""
    task = replace(job(directory, model, batch_size=BATCH, **recipe), confide=True)
    outcome = deployment.train(task)
    apart = replace(task, directory=directory / "c")
    central = Centralized(name="c", epochs=deployment.epochs).train(apart)
    return Trained(task, outcome, central)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    deployment = SMPC(name="s", owners=OWNERS, epochs=EPOCHS)
    return under(tmp_path_factory.mktemp("mlp"), MLP(hidden=(8,)), deployment)


def shares(outcome: Outcome, round: int, owners: tuple[int, ...]) -> Observation:
    """The one item of this round and these owners that the party of rank 0 holds."""
    seen = outcome.transcripts[Position.COMPUTE_PARTY].on(Channel.SHARE, [round])
    (found,) = [item for item in seen if item.clients == owners and not _bytes(item)]
    return found


def told(outcome: Outcome, seen: Observation, rank: int) -> Confided:
    """What the party of this rank holds of the same item."""
    return next(
        item
        for item in outcome.confided
        if (item.client, item.round, item.about) == (rank, seen.round, seen.clients)
        and set(item.tensors) == set(seen.payload)
    )


def added(parts: Sequence[Tensor], bits: int = 18) -> np.ndarray:
    """The parts of a sum in Z_2^64, as the fixed-point numbers they stand for."""
    total = sum(part.numpy().view(np.uint64) for part in parts)
    return np.asarray(total).view(np.int64) / 2.0**bits


def _messages(seen: Observation) -> bool:
    return any(name.startswith("message/") for name in seen.payload)


def _bytes(seen: Observation) -> bool:
    """Whether these are messages of whatever kind, no shares."""
    return all(part.dtype == torch.uint8 for part in seen.payload.values())


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], atol: float = 1e-2) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0)


def test_mlp_is_that_of_centralized_training(mlp: Trained) -> None:
    close(mlp.outcome.state, mlp.central.state)
    assert abs(mlp.outcome.utility.accuracy - mlp.central.utility.accuracy) <= 0.01
    assert mlp.outcome.utility.accuracy > 0.5
    assert mlp.outcome.flags == frozenset()


@pytest.mark.parametrize(
    ("deployment", "recipe"),
    [
        (
            SMPC(name="s", epochs=EPOCHS, owners=1, opens="predictions", serving=SMPCServing()),
            {"momentum": 0.5, "weight_decay": 1e-3},
        ),
        (SMPC(name="s", epochs=EPOCHS, protocol="semi2k"), {}),
        (SMPC(name="s", epochs=1, protocol="semi2k", parties=3), {}),
        pytest.param(SMPC(name="s", epochs=1, protocol="cheetah"), {}, marks=pytest.mark.slow),
    ],
    ids=["aby3 momentum", "semi2k", "semi2k of three", "cheetah"],
)
def test_softmax_is_that_of_centralized_training(
    deployment: SMPC, recipe: dict[str, object], tmp_path: Path
) -> None:
    found = under(tmp_path, Softmax(), deployment, **recipe)
    close(found.outcome.state, found.central.state)
    assert abs(found.outcome.utility.accuracy - found.central.utility.accuracy) <= 0.01
    assert found.outcome.flags == frozenset()
    seen = shares(found.outcome, 1, (0,))
    ranks = range(1, deployment.scheme.size)
    parts = [
        seen.payload["inputs"],
        *(told(found.outcome, seen, r).tensors["inputs"] for r in ranks),
    ]
    real = found.task.split.private.inputs[found.outcome.used[1, 0]]
    np.testing.assert_allclose(added([part[..., 0] for part in parts]), real, atol=2**-17)
    dealt = found.outcome.transcripts.get(Position.DEALER)
    assert bool(dealt and dealt.observations) == deployment.scheme.has_dealer
    opened = Position.MODEL_HOLDER in found.outcome.transcripts
    assert opened == (deployment.opens == "model")
    recorded = any(map(_messages, found.outcome.transcripts[Position.COMPUTE_PARTY].observations))
    assert recorded == (deployment.recorded_steps > 0)


def test_a_party_holds_shares_of_records_and_of_the_model(mlp: Trained) -> None:
    for owner in range(OWNERS):
        n = len(mlp.outcome.used[1, owner])
        payload = shares(mlp.outcome, 1, (owner,)).payload
        assert {name: tuple(part.shape) for name, part in payload.items()} == {
            "inputs": (n, *SHAPE, 2),
            "labels": (n, CLASSES, 2),
        }
        assert all(part.dtype == torch.int64 for part in payload.values())
    model = shares(mlp.outcome, 2, ()).payload
    assert {
        name.removeprefix("model/"): tuple(part.shape[:-1]) for name, part in model.items()
    } == {name: tuple(weight.shape) for name, weight in mlp.outcome.state.items()}
    assert {part.shape[-1] for part in model.values()} == {2}


def test_recorded_messages_come_from_the_other_parties(mlp: Trained) -> None:
    seen = mlp.outcome.transcripts[Position.COMPUTE_PARTY].on(Channel.SHARE, [1])
    (recorded,) = [item for item in seen if _messages(item)]
    fields = [name.split("/", 3) for name in recorded.payload]
    assert sorted(int(number) for _, number, _, _ in fields) == list(range(len(fields)))
    assert {sender for _, _, sender, _ in fields} == {"1", "2"}
    assert all(part.dtype == torch.uint8 for part in recorded.payload.values())
    assert recorded.wire_bytes == sum(part.numel() for part in recorded.payload.values()) > 10_000


@pytest.mark.parametrize("protocol", ["aby3", "semi2k"])
def test_with_every_step_recorded_a_party_s_view_is_all_it_received(
    protocol: str, tmp_path: Path
) -> None:
    task = replace(job(tmp_path, Softmax(), batch_size=BATCH, momentum=0.5), confide=True)
    deployment = SMPC(name="s", owners=2, epochs=2, protocol=protocol, recorded_steps=6)
    outcome = deployment.train(task)
    assert outcome.mpc is not None
    ours = outcome.mpc.parties[0]
    seen = outcome.transcripts[Position.COMPUTE_PARTY].on(Channel.SHARE)
    assert next(item for item in seen if item.round == 2).wire_bytes == 0, "computed"
    crossed = {
        kind: sum(item.wire_bytes for item in seen if item.round == 1 and _kind(item) == kind)
        for kind in ("share", "handshake", "message", "answer")
    }
    assert crossed["share"] == ours.input_bytes
    assert crossed["message"] + crossed["handshake"] == ours.received_bytes
    assert crossed["message"] > 100 * crossed["handshake"] > 0
    assert (0 < crossed["answer"] < ours.dealer_bytes) == deployment.scheme.has_dealer
    initial = shares(outcome, 1, ())
    ranks = range(1, deployment.scheme.size)
    others = [told(outcome, initial, rank).tensors for rank in ranks]
    start = task.model.build(SHAPE, CLASSES, task.seed.child("model")).state_dict()
    for name, weights in start.items():
        for kind, right in (("initial", weights), ("momentum", torch.zeros_like(weights))):
            parts = [item[f"{kind}/{name}"][..., 0] for item in (initial.payload, *others)]
            np.testing.assert_allclose(added(parts), right, atol=2**-17)


def _kind(seen: Observation) -> str:
    return next(iter(seen.payload)).split("/")[0] if _bytes(seen) else "share"


def test_two_of_three_parties_open_records_labels_and_model_and_one_does_not(mlp: Trained) -> None:
    private = mlp.task.split.private
    for owner in range(OWNERS):
        seen, rows = shares(mlp.outcome, 1, (owner,)), mlp.outcome.used[1, owner]
        inputs, labels = (
            [seen.payload[name], told(mlp.outcome, seen, 1).tensors[name]]
            for name in ("inputs", "labels")
        )
        opened = added([inputs[0][..., 0], inputs[0][..., 1], inputs[1][..., 1]])
        np.testing.assert_allclose(opened, private.inputs[rows], atol=2**-17)
        hot = added([labels[0][..., 0], labels[0][..., 1], labels[1][..., 1]])
        np.testing.assert_allclose(hot, np.eye(CLASSES)[private.labels[rows]], atol=2**-17)
        alone = added([inputs[0][..., 0], inputs[0][..., 1]])
        assert abs(np.corrcoef(alone.ravel(), private.inputs[rows].ravel())[0, 1]) < 0.25
        assert np.abs(alone - private.inputs[rows]).min() > 1e3
    seen = shares(mlp.outcome, 2, ())
    other = told(mlp.outcome, seen, 2).tensors
    for name, weight in mlp.outcome.state.items():
        mine, theirs = seen.payload[f"model/{name}"], other[f"model/{name}"]
        both = added([mine[..., 0], mine[..., 1], theirs[..., 0]])
        np.testing.assert_allclose(both, weight, atol=2**-17)


def test_owners_share_every_private_record_once_and_batches_are_of_them(mlp: Trained) -> None:
    used = [mlp.outcome.used[1, owner] for owner in range(OWNERS)]
    assert sorted(np.concatenate(used)) == list(range(48))
    orders = [mlp.outcome.order[1, owner] for owner in range(OWNERS)]
    sizes = [sum(map(len, step)) for step in zip(*orders, strict=True)]
    assert sizes == [20, 20, 8] * EPOCHS
    first = [
        rows[list(order[step])]
        for rows, order in zip(used, orders, strict=True)
        for step in range(3)
    ]
    assert sorted(np.concatenate(first)) == list(range(48))


@given(st.permutations(range(12)), st.integers(1, 12), st.data())
def test_parts_of_a_batch_are_its_records_by_owner(
    rows: list[int], owners: int, data: st.DataObject
) -> None:
    hands = Owners(tuple(np.array_split(np.array(rows), owners)))
    batch = np.array(data.draw(st.lists(st.integers(0, 11), min_size=1, unique=True)))
    parts = hands.parts("x", batch)
    found = [hands.rows[int(name.split("/")[1])][places] for name, places in parts]
    assert sorted(np.concatenate(found)) == sorted(batch)
    for owner in range(owners):
        (step,) = hands.order(owner, (batch,))
        assert dict(parts).get(f"x/{owner}", []) == list(step)


def test_what_the_dealer_saw_is_kept_request_by_request(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, confide=False)
    recorder.dealt([{"kind": "dot", "shape": [2, 3], "seed": b"\x01\xff"}, {"kind": "and"}])
    (seen,) = recorder.transcripts([Position.DEALER])[Position.DEALER].observations
    first, second = (json.loads(bytes(part.numpy())) for part in seen.payload.values())
    assert first == {"kind": "dot", "shape": [2, 3], "seed": "01ff"}
    assert (second, seen.channel, seen.clients) == ({"kind": "and"}, Channel.SHARE, ())


def test_the_receiver_gets_the_model_and_users_nothing_yet(mlp: Trained) -> None:
    (final,) = mlp.outcome.transcripts[Position.MODEL_HOLDER].observations
    assert final.channel == Channel.GLOBAL_MODEL
    close(dict(final.payload), mlp.outcome.state, atol=0)
    assert not mlp.outcome.transcripts[Position.API_USER].observations
    assert {confided.client for confided in mlp.outcome.confided} == {1, 2}


def test_costs_are_those_of_the_parties(mlp: Trained) -> None:
    numbers = 48 * (36 + CLASSES) + sum(w.numel() for w in mlp.outcome.state.values())
    cost, mpc = mlp.outcome.cost, mlp.outcome.mpc
    assert numbers * 3 * 2 * 8 <= cost.wire_bytes_up <= 1.5 * numbers * 3 * 2 * 8
    assert mpc is not None
    assert cost.wire_bytes_down == sum(party.wire_bytes for party in mpc.parties)
    assert 0 < mpc.compute_seconds < mpc.seconds == cost.seconds
    assert mpc.uniformity > 1e-6
    assert cost.peak_memory_bytes > 100 * 2**20


def test_estimate_is_of_the_right_size(mlp: Trained) -> None:
    deployment = SMPC(name="s", owners=OWNERS, epochs=EPOCHS, recipe=mlp.task.recipe)
    found = deployment.estimate(card(), mlp.task.model, 1)
    assert found.wire_bytes_up <= mlp.outcome.cost.wire_bytes_up
    ratio = found.wire_bytes_down / mlp.outcome.cost.wire_bytes_down
    assert 1 / 4 < ratio < 4


def card(records: int = 48) -> Card:
    return Card("t", "s", "l", SHAPE, CLASSES, records, identities=False)


@pytest.mark.parametrize(
    ("deployment", "model", "recipe", "words"),
    [
        (SMPC(name="s", owners=49), MLP(), Recipe(), "at most 48"),
        (SMPC(name="s", parties=2), MLP(), Recipe(), '"semi2k" (with a dealer) or "cheetah"'),
        (SMPC(name="s"), WithBuffers(), Recipe(), "BatchNorm1d"),
        (SMPC(name="s", fraction_bits=8), MLP(), Recipe(learning_rate=0.01), "learning_rate"),
        (SMPC(name="s"), MLP(), Recipe(weight_decay=1e-6), "weight_decay = 1.0e-06 is less"),
    ],
)
def test_problems_are_named_before_anything_runs(
    deployment: SMPC, model: ModelSpec, recipe: Recipe, words: str
) -> None:
    (problem,) = deployment.problems(card(), model, recipe)
    assert words in problem


def test_what_cannot_be_computed_is_refused_in_training_too(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="'s': layer 2: BatchNorm1d"):
        SMPC(name="s").train(job(tmp_path, WithBuffers()))


def test_nothing_is_wrong_with_the_defaults() -> None:
    assert SMPC(name="s").problems(card(), MLP(), Recipe()) == []


def test_a_party_that_dies_is_named_and_nothing_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children(recursive=True))
    started: list[psutil.Process] = []
    select = Cluster.select

    def kill(cluster: Cluster, name: str, parts: Sequence[tuple[str, Sequence[int]]]) -> None:
        select(cluster, name, parts)
        started.extend(set(psutil.Process().children(recursive=True)) - before)
        (victim,) = (process for process in started if _rank(process) == 1)
        victim.kill()
        victim.wait()

    monkeypatch.setattr(Cluster, "select", kill)
    with pytest.raises(DeploymentError, match=r"'s': step 1 of 3: party 1 died"):
        SMPC(name="s", owners=2, epochs=1).train(job(tmp_path, Softmax(), batch_size=BATCH))
    assert len(started) >= 3
    assert not any(process.is_running() for process in started)


def _rank(process: psutil.Process) -> int:
    """Of a compute party, which is told descriptor and rank; -1 of any other process."""
    command = process.cmdline()
    return int(command[4]) if "fedmi.mpc.party" in command else -1


def test_numbers_beyond_the_fixed_point_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "limit", 2.0**-6)
    with pytest.raises(DeploymentError, match=r"'s': step 3 of 6: fixed point overflowed: .* 1"):
        SMPC(name="s", owners=2, epochs=2).train(job(tmp_path, Softmax(), batch_size=BATCH))


def test_divergence_is_an_error_with_the_name(tmp_path: Path) -> None:
    task = job(tmp_path, learning_rate=1000.0, weight_decay=1.0)
    with pytest.raises(DeploymentError, match="'s' diverged in the clear already: loss is"):
        SMPC(name="s", epochs=50).train(task)


@pytest.mark.parametrize(
    "serving", [Exact(), SMPCServing(protocol="semi2k"), SMPCServing(fraction_bits=20)]
)
def test_a_model_that_nobody_holds_is_served_by_its_own_parties(serving: Serving) -> None:
    with pytest.raises(ValidationError, match=r'opens = "predictions"|same protocol'):
        SMPC(name="s", opens="predictions", serving=serving)


def test_training_and_serving_parties_are_the_same() -> None:
    with pytest.raises(ValidationError, match="same protocol"):
        SMPC(name="s", protocol="semi2k", parties=3, serving=SMPCServing(protocol="semi2k"))


def test_serving_takes_over_the_scheme_of_the_training() -> None:
    given = {"name": "s", "protocol": "semi2k", "opens": "predictions", "serving": {"kind": "smpc"}}
    served = SMPC.model_validate(given).serving
    assert isinstance(served, SMPCServing)
    assert served.scheme == SMPC(name="s", protocol="semi2k").scheme
