"""DAGER on trained models and behind protections."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.gradient.dager import Dager
from fedmi.data.records import Records, Split
from fedmi.deployments.base import Job
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.strategies.fedsgd import FedSGD
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Fact
from fedmi.models.text_transformer import TextTransformer
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from fedmi.training.local import mean_gradient
from tests.text_cases import (
    CLASSES,
    DECODER,
    SCHEMA,
    SERVER,
    SHAPE,
    Batch,
    built,
    exact,
    sentences,
    text_case,
)

ATTACK = Dager(position="curious_server", channel="gradient")
FACTS = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING})


@cache
def trained(depth: int, rate: float, momentum: float) -> tuple[TextTransformer, dict[str, Tensor]]:
    """Whether a token of the commoner half comes second, learnt in 60 steps."""
    spec = DECODER.model_copy(update={"depth": depth})
    model, (inputs, _) = built(spec), sentences(512, 99)
    labels = (inputs[:, 0, 0, 1] > 20).long()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum)
    for step in range(60):
        rows = torch.arange(16) + 16 * (step % 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return spec, {name: value.clone() for name, value in model.state_dict().items()}


def case_at(spec: TextTransformer, state: dict[str, Tensor], batch: Batch) -> Case:
    model = built(spec)
    model.load_state_dict(state)
    case = text_case(spec, [mean_gradient(model, *batch)], [len(batch[1])])
    for name, value in case.transcript.observations[0].payload.items():
        value.copy_(state[name])
    return case


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_a_trained_decoder_is_exact(depth: int, count: int) -> None:
    batch = sentences(count, 20)
    (answer,) = ATTACK.reconstruct(case_at(*trained(depth, 0.05, 0.0), batch))
    assert exact(answer, batch[0]) == 1
    assert not answer.flags


def test_what_a_collapsed_decoder_hides_is_flagged() -> None:
    """Momentum that diverges leaves all gradient in the last token's direction."""
    batch = sentences(4, 20)
    (answer,) = ATTACK.reconstruct(case_at(*trained(2, 0.3, 0.95), batch))
    assert answer.flags == {"sentences_not_found", "signal_below_rounding"}
    assert float(answer.confidence.max()) < 0


@pytest.mark.parametrize(("noise", "flags"), [(1e-5, set()), (1e-3, {"rank_too_high"})])
def test_little_noise_does_not_help_and_much_is_flagged(noise: float, flags: set[str]) -> None:
    batch, rng = sentences(2, 21), torch.Generator().manual_seed(0)
    noisy = {
        name: part + noise * torch.randn(part.shape, generator=rng)
        for name, part in mean_gradient(built(DECODER), *batch).items()
    }
    (answer,) = ATTACK.reconstruct(text_case(DECODER, [noisy], [2]))
    assert answer.flags == flags
    assert exact(answer, batch[0]) == (not flags)


@pytest.mark.parametrize(("kept", "flag"), [(0.1, "sentences_not_found"), (0.9, "rank_too_high")])
def test_pruning_is_flagged(kept: float, flag: str) -> None:
    """The smallest entries of each tensor are zero; the span is no longer that of the inputs."""
    batch = sentences(2, 22)
    pruned = {}
    for name, part in mean_gradient(built(DECODER), *batch).items():
        least = part.abs().flatten().quantile(1 - kept)
        pruned[name] = part * (part.abs() >= least)
    (answer,) = ATTACK.reconstruct(text_case(DECODER, [pruned], [2]))
    assert flag in answer.flags
    assert exact(answer, batch[0]) == 0


def records(count: int, seed: int, first: int) -> Records:
    inputs, labels = sentences(count, seed)
    ids = np.arange(first, first + count)
    return Records(inputs.numpy(), labels.numpy(), np.zeros(count, dtype=np.int64), ids, SCHEMA)


@pytest.mark.parametrize("per_client", [1, 2])
def test_the_aggregate_behind_secagg_plus(per_client: int, tmp_path: Path) -> None:
    split = Split(
        private=records(3 * per_client, 30, 0),
        held_out=records(6, 31, 1000),
        public=records(6, 32, 2000),
        classes=CLASSES,
        identity_disjoint=False,
    )
    task = Job(
        split=split,
        model=DECODER,
        recipe=Recipe(learning_rate=0.1, batch_size=64),
        seed=Seed.root(3),
        directory=tmp_path,
        record=frozenset({1}),
    )
    federated = Federated.model_validate(
        {
            "name": "f",
            "clients": 3,
            "rounds": 1,
            "strategy": FedSGD(),
            "protections": (SecAggPlus(),),
        }
    )
    outcome = federated.train(task)
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        schema=SCHEMA,
        facts=FACTS,
        build=lambda: DECODER.module(SHAPE, CLASSES),
        work=federated.work(task.recipe),
    )
    target = Target("all", round=1, clients=(0, 1, 2))
    attack = Dager(position="curious_server", channel="aggregate")
    case = Case(outcome.transcripts[SERVER], knowledge, (target,), Seed.root(5))
    (answer,) = attack.reconstruct(case)
    truth = torch.as_tensor(split.private.inputs)
    assert exact(answer, truth) == 1
