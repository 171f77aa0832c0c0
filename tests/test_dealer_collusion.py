"""The dealer with a compute party: exact records of recorded batches, nothing without the party."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.share.share_reconstruction import ShareReconstruction
from fedmi.deployments.base import Job, Outcome
from fedmi.deployments.smpc.deployment import SMPC
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.leakage.row import LeakageRow, split
from fedmi.leakage.table import leakage_rows
from fedmi.leakage.trial import MetricInfo
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import LeNet
from fedmi.mpc.dealer.collusion import Product, records_multiplied
from fedmi.mpc.dealer.prg import stream
from fedmi.mpc.opening import Opening
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import encode
from fedmi.report.mpc import quotes
from fedmi.runs.aims import Coalition, targets_of
from fedmi.runs.execute import run
from fedmi.scenario.cells import plan
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.overview import overview
from tests.deployment_fixtures import CLASSES, SHAPE, job
from tests.share_cases import ring
from tests.small import small
from tests.test_report_mpc import cost, report, trial

DEALER, PARTY = Position.DEALER, Position.COMPUTE_PARTY
BITS, BATCH, OWNERS = 18, 20, 3
UNIT = 2.0**-BITS


def attack(colluders: int) -> ShareReconstruction:
    return ShareReconstruction(position=DEALER, channel=Channel.SHARE, colluders=colluders)


# A dealer by a naive oracle


@dataclass(frozen=True)
class Message:
    sender: int
    value: bytes


def dealt_product(
    shares: Sequence[tuple[np.ndarray, np.ndarray]], at: int, transposed: bool = False
) -> tuple[dict[str, object], list[Message]]:
    """The log of one product of shared factors, and what each party sends to open them masked."""
    (m, k), n = shares[0][0].shape, shares[0][1].shape[1]
    seeds = [bytes([rank + 1]) * 16 for rank in range(len(shares))]
    inputs: list[dict[str, object]] = [
        {"prg_count": at, "transposed": transposed, "seeds": [seed.hex() for seed in seeds]},
        {"prg_count": at + 999, "transposed": False, "seeds": [seed.hex() for seed in seeds]},
    ]
    sent = []
    for rank, (left, right) in enumerate(shares):
        a = stream(seeds[rank], at, 8 * m * k).view(np.uint64)
        a = a.reshape(k, m).T if transposed else a.reshape(m, k)
        b = stream(seeds[rank], at + 999, 8 * k * n).view(np.uint64).reshape(k, n)
        sent.append(Message(rank, (left - a).tobytes() + (right - b).tobytes()))
    return {"operation": "AdjustDot", "shape": [m, n, k], "inputs": inputs}, sent


def additive(secret: np.ndarray, parties: int, seed: int) -> list[np.ndarray]:
    others = [ring(secret.shape, seed + party) for party in range(1, parties)]
    return [secret - sum(others[1:], others[0]), *others]


@pytest.mark.parametrize(("parties", "transposed"), [(2, False), (3, True)])
def test_rows_find_their_records_among_messages_and_products(
    parties: int, transposed: bool
) -> None:
    """Two batches of one owner's records among rows of others, and messages that mean nothing."""
    records = encode(np.random.default_rng(0).random((7, 12)), BITS)
    records[0], records[1] = 0, 1 << BITS
    weights = encode(np.random.default_rng(1).normal(size=(12, 3)), BITS)
    strangers = encode(np.random.default_rng(2).random((4, 12)), BITS)
    held, foreign = additive(records, parties, 10), additive(strangers, parties, 20)
    shared_weights = additive(weights, parties, 30)
    log: list[dict[str, object]] = [{"operation": "AdjustMul"}]
    heard: list[Message] = []
    for number, rows in enumerate([[1, 4, 0], [6, 2, 1]]):
        left = [np.concatenate([f[:2], h[rows]]) for h, f in zip(held, foreign, strict=True)]
        skipped, _ = dealt_product(list(zip(left, shared_weights, strict=True)), 10_000 + number)
        entry, sent = dealt_product(
            list(zip(left, shared_weights, strict=True)), 5000 * number, transposed
        )
        log += [skipped, entry]
        noise = ring((12, 8), 40 + number).tobytes()
        heard += [Message(rank, noise) for rank in range(1, parties)] + sent[1:]
    heard.append(Message(1, b"short"))
    found, known = records_multiplied(log, heard, held[0], BITS)
    assert known.tolist() == [True, True, True, False, True, False, True]
    assert np.array_equal(found[known], records[known])
    assert not found[~known].any()
    assert not records_multiplied(log, [], held[0], BITS)[1].any()
    assert not records_multiplied(log[:1], heard, held[0], BITS)[1].any()
    assert not records_multiplied(log, heard, ring(held[0].shape, 99), BITS)[1].any()
    with pytest.raises(ValueError, match="no list"):
        Product.of({"operation": "AdjustDot", "shape": "3"})


# Real trainings


@dataclass(frozen=True)
class Trained:
    task: Job
    deployment: SMPC
    outcome: Outcome

    def attacked(self, colluders: int) -> tuple[tuple[Reconstruction, ...], Coalition]:
        transcript = self.outcome.transcripts[DEALER]
        targets, told = targets_of(
            attack(colluders), transcript, self.outcome, CLASSES, Seed.root(1)
        )
        network = self.task.model.blueprint(SHAPE, CLASSES)
        knowledge = Knowledge(
            input_shape=SHAPE,
            classes=CLASSES,
            num_examples={target.id: len(self.rows(target)) for target in targets},
            opener=self.deployment.opener(network, self.task.recipe),
            colluders=told,
        )
        case = Case(transcript, knowledge, targets, Seed.root(0))
        return attack(colluders).reconstruct(case), told

    def rows(self, target: Target) -> NDArray[np.int64]:
        return self.outcome.used[1, target.clients[0]]

    def records(self, target: Target) -> NDArray[np.float32]:
        return self.task.split.private.take(self.rows(target)).inputs

    def recorded(self, target: Target) -> list[int]:
        """Which records of the target are in a batch whose messages were kept: those of the first
        steps, and that of the first range check, at the end of this training of under an epoch."""
        steps = self.outcome.order[1, target.clients[0]]
        kept = [*steps[: self.deployment.recorded_steps], steps[-1]]
        return sorted({row for step in kept for row in step})


def trained(directory: Path, model: ModelSpec, parties: int, recorded_steps: int) -> Trained:
    pytest.importorskip("spu")
    task = replace(job(directory, model, batch_size=BATCH), confide=True)
    deployment = SMPC(
        name="s", protocol="semi2k", owners=OWNERS, steps=2, parties=parties,
        recorded_steps=recorded_steps,
    )  # fmt: skip
    return Trained(task, deployment, deployment.train(task))


@pytest.mark.parametrize(
    ("model", "parties", "recorded_steps"),
    [(Softmax(), 2, 1), pytest.param(MLP(hidden=(8,)), 3, 2, marks=pytest.mark.slow)],
    ids=["softmax", "mlp"],
)
def test_with_one_party_every_record_of_a_recorded_batch_is_exact(
    model: ModelSpec, parties: int, recorded_steps: int, tmp_path: Path
) -> None:
    found = trained(tmp_path, model, parties, recorded_steps)
    answers, told = found.attacked(1)
    assert len(answers) == OWNERS
    opened = 0
    for answer in answers:
        assert answer.samples is not None
        assert len({member.client for member in told[answer.target.id]}) == 1
        truth, rows = found.records(answer.target), found.recorded(answer.target)
        assert len(answer.samples) == len(truth) > len(rows) > 0
        ours, rest = answer.samples[: len(rows)].numpy(), answer.samples[len(rows) :]
        assert np.abs(ours - truth[rows]).max() <= UNIT + 1e-7
        assert bool((rest == 0.5).all())
        assert answer.confidence.isneginf().tolist() == [False] * len(rows) + [True] * len(rest)
        assert answer.flags == {"partly_opened"}
        opened += len(rows)
    assert opened >= BATCH
    everything, _ = found.attacked(parties)
    for answer in everything:
        assert answer.samples is not None
        assert answer.labels is not None
        assert np.abs(answer.samples.numpy() - found.records(answer.target)).max() <= UNIT + 1e-7
        labels = found.task.split.private.take(found.rows(answer.target)).labels
        assert answer.labels.tolist() == labels.tolist()
        assert not answer.flags
    alone, nobody = found.attacked(0)
    assert not nobody
    assert all(answer.flags == {"sealed_read_raw"} for answer in alone)


@pytest.mark.parametrize("party", [0, 1])
def test_any_party_will_do(party: int) -> None:
    answer = one_answer(in_memory(party))
    assert answer.samples is not None
    assert torch.allclose(
        answer.samples, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, *SHAPE)
    )
    assert not answer.flags


def one_answer(case: Case) -> Reconstruction:
    (answer,) = attack(1).reconstruct(case)
    return answer


def in_memory(party: int, messages: bool = True, owner: int = 0) -> Case:
    """A coalition put together by hand: an owner with two records, both in the one batch."""
    records = encode(np.full((2, 36), [[0.25], [0.75]]), BITS)
    held = additive(records, 2, 1)
    weights = additive(ring((36, 4), 5), 2, 6)
    entry, sent = dealt_product(list(zip(held, weights, strict=True)), 0)
    other = 1 - party
    heard = np.frombuffer(sent[other].value, np.uint8).copy()
    text = np.frombuffer(json.dumps(entry).encode(), np.uint8).copy()
    share = torch.from_numpy(held[party].view(np.int64).copy()).view(2, *SHAPE, 1)
    told = [Confided(party, 1, {"inputs": share}, PARTY, (owner,))]
    if messages:
        payload = {f"message/000000/{other}/root": torch.from_numpy(heard)}
        told.append(Confided(party, 1, payload, PARTY, ()))
    requests = {"request/000000": torch.from_numpy(text)}
    seen = Observation(DEALER, Channel.SHARE, 1, (), requests, 0)
    target = Target("owner 0", round=1, clients=(0,))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        opener=Opening(Scheme(protocol="semi2k")),
        colluders={target.id: tuple(told)},
    )
    return Case(Transcript(DEALER, (seen,)), knowledge, (target,), Seed.root(0))


def test_what_the_coalition_lacks_is_named() -> None:
    with pytest.raises(AttackError, match="recorded_steps = 1 or more"):
        one_answer(in_memory(1, messages=False))
    with pytest.raises(AttackError, match="no colluder tells its shares"):
        one_answer(in_memory(1, owner=3))
    case = replace(in_memory(1), transcript=Transcript(DEALER, ()))
    with pytest.raises(AttackError, match="no bytes"):
        attack(1).reconstruct(case)


# Scenarios

SCENARIO = """
name = "dealt"
seeds = [1]
metrics = [{ kind = "psnr" }]
[data]
kind = "digits"
[model]
kind = "softmax"
[training]
learning_rate = 0.5
batch_size = 256
[evaluator]
kind = "mlp"
[[deployment]]
kind = "smpc"
name = "dealt"
protocol = "semi2k"
owners = 10
steps = 1
[[attack]]
kind = "share_reconstruction"
position = "dealer"
channel = "share"
knowledge = ["num_examples"]
[[attack]]
kind = "share_reconstruction"
position = "dealer"
channel = "share"
colluders = 1
"""


@pytest.fixture(scope="module")
def leakage(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    pytest.importorskip("spu")
    folder = tmp_path_factory.mktemp("dealt")
    done = run(small(folder, SCENARIO), out=folder / "run", jobs=0, quiet=True)
    assert not done.failures
    return done.leakage.set_index(["metric", "attack"])


@pytest.mark.slow
def test_alone_the_dealer_has_nothing_and_with_a_party_the_first_batch(
    leakage: pd.DataFrame,
) -> None:
    alone = leakage.loc[("psnr", "share_reconstruction")]
    together = leakage.loc[("psnr", "share_reconstruction, 1 colluder")]
    assert abs(alone["advantage"]) < 0.5
    assert alone["advantage_ci_low"] <= 0.1
    assert together["advantage_ci_low"] > 5
    assert alone["positive_control"] == together["advantage"]
    assert "sealed_read_raw" in split(alone["flags"])
    assert "partly_opened" in split(together["flags"])
    assert together["n"] == alone["n"] == 10


def refused(tmp_path: Path, colluders: int, kind: str = "share_reconstruction") -> str:
    text = SCENARIO.replace("colluders = 1", f"colluders = {colluders}")
    last = text.rindex('kind = "share_reconstruction"')
    text = text[:last] + text[last:].replace("share_reconstruction", kind)
    with pytest.raises(ScenarioError) as error:
        plan(small(tmp_path, text))
    return re.sub(r"\s+", " ", str(error.value))


def test_coalitions_with_a_dealer_that_cannot_be_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("spu")
    too_many = refused(tmp_path, 3)
    assert 'colluders = 3, but in "dealt" the dealer deals to 2 compute parties' in too_many
    assert '"share_reconstruction" does' in refused(tmp_path, 1, "mi_face")
    seen = overview(plan(small(tmp_path, SCENARIO)))
    assert [one.coalition for one in seen.attacks] == ["", "with 1 of 2 compute parties"]
    assert attack(1).required_facts == {Fact.ARCHITECTURE}


def test_a_first_layer_that_multiplies_no_whole_records_is_refused() -> None:
    network = LeNet().blueprint((1, 32, 32), CLASSES)
    assert "begins with Conv2d" in attack(1).unsuited(network)
    assert not attack(0).unsuited(network)
    for model in (Softmax(), MLP(hidden=(8,))):
        assert not attack(1).unsuited(model.blueprint(SHAPE, CLASSES))


# Tables


def rows_of(*coalitions: tuple[Position, int]) -> list[LeakageRow]:
    trials = [trial("smpc", (p, Channel.SHARE), 5.0 * n, n) for p, n in coalitions]
    return leakage_rows(trials, [MetricInfo("psnr", higher_is_leakier=True, unit="dB")])


def test_a_dealer_alone_is_held_against_a_coalition_with_it() -> None:
    first, *_, both = rows_of((DEALER, 0), (PARTY, 0), (PARTY, 2), (DEALER, 1))
    assert first.positive_control == both.advantage
    assert both.positive_control == both.advantage
    first, party, both = rows_of((DEALER, 0), (PARTY, 0), (PARTY, 1))
    assert first.positive_control == party.positive_control == both.advantage
    first, party, _ = rows_of((DEALER, 0), (PARTY, 0), (DEALER, 1))
    assert np.isnan(party.positive_control)


def test_a_report_calls_a_dealer_with_a_party_a_coalition_at_the_threshold() -> None:
    told = [trial("smpc", (DEALER, Channel.SHARE), gain, n) for gain, n in ((0.0, 0), (5.0, 1))]
    found = report(told)
    dealt = replace(found.secured[0], costs=(cost(Scheme(protocol="semi2k")),))
    seen = {q.who: q.kind for q in quotes(replace(found, secured=(dealt,)), "smpc")}
    assert seen == {"dealer alone": "below", "dealer and 1 of 2 compute parties": "threshold"}
