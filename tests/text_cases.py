"""Cases for attacks on text: sentences of random tokens, real gradients, a curious server."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.schema import END, SPECIAL, START, Text
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import ModelSpec
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import batches, fit

VOCABULARY, LENGTH, CLASSES = 300, 10, 2
SHAPE = (1, 1, LENGTH)
SCHEMA = Text(pieces=(*SPECIAL, *(f"w{k}" for k in range(VOCABULARY - 4))), length=LENGTH)
SERVER = Position.CURIOUS_SERVER
WORK = LocalWork(recipe=Recipe(batch_size=64))
Batch = tuple[Tensor, Tensor]

DECODER = TextTransformer(
    vocabulary=VOCABULARY, positions=12, dim=64, causal=True, arrangement="pre_norm"
)
ENCODER = TextTransformer(vocabulary=VOCABULARY, positions=12, dim=64)


def sentences(count: int, seed: int, shortest: int = 6) -> Batch:
    """Sentences [count, 1, 1, 10] of common and rare tokens, and labels."""
    rng = torch.Generator().manual_seed(seed)
    common = 1 / torch.arange(1, VOCABULARY - 3).double()
    inputs = torch.zeros(count, *SHAPE)
    for row in inputs[:, 0, 0]:
        length = int(torch.randint(shortest, LENGTH + 1, (1,), generator=rng))
        words = torch.multinomial(common, length - 2, True, generator=rng) + END + 1
        row[:length] = torch.tensor([START, *words.tolist(), END]).float()
    return inputs, torch.randint(CLASSES, (count,), generator=rng)


def built(spec: ModelSpec) -> nn.Module:
    return spec.build(SHAPE, CLASSES, Seed.root(3))


def local_model(model: nn.Module, batch: Batch, work: LocalWork) -> dict[str, Tensor]:
    """State dict after local training that starts from the model, which is changed."""
    fit(model, *batch, batches(len(batch[1]), work, Seed.root(2)), work)
    return {name: value.clone() for name, value in model.state_dict().items()}


def text_case(
    spec: ModelSpec,
    payloads: Sequence[Mapping[str, Tensor]],
    counts: Sequence[int],
    channel: Channel = Channel.GRADIENT,
    work: LocalWork = WORK,
    *,
    averaged: bool = False,
    sent: Mapping[str, Tensor] | None = None,
    position: Position = SERVER,
) -> Case:
    """One target a payload; averaged: one payload is the mean gradient of two clients. sent: what
    a malicious server gave each client in place of the honest model."""
    honest = dict(built(spec).state_dict())
    seen = [Observation(position, Channel.GLOBAL_MODEL, 1, (), honest, 0)]
    targets = []
    for number, (payload, count) in enumerate(zip(payloads, counts, strict=True)):
        clients = (0, 1) if averaged else (number,)
        if sent is not None:
            seen += [Observation(position, Channel.GLOBAL_MODEL, 1, (c,), sent, 0) for c in clients]
        seen.append(
            Observation(
                position,
                channel,
                1,
                clients,
                payload,
                0,
                {"num_examples": float(count)},
                Channel.GRADIENT if averaged else None,
            )
        )
        targets.append(Target(f"t{number}", round=1, clients=clients))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        schema=SCHEMA,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: spec.module(SHAPE, CLASSES),
        work=work,
    )
    return Case(Transcript(position, tuple(seen)), knowledge, tuple(targets), Seed.root(5))


def exact(answer: Reconstruction, truth: Tensor) -> float:
    """Share of the true sentences that are among the samples, token by token."""
    assert answer.samples is not None
    told = [tuple(row.flatten().tolist()) for row in answer.samples]
    return sum(tuple(row.flatten().tolist()) in told for row in truth) / len(truth)


def tokens_right(answer: Reconstruction, truth: Tensor) -> float:
    """Share of the truth's tokens, special ones left out, in the sample at its best match."""
    assert answer.samples is not None
    told, true = answer.samples.flatten(1), truth.flatten(1)
    right = ((told[:, None] == true[None]) & (true[None] > END)).sum(2)
    return float(right.amax(0).sum() / (true > END).sum())
