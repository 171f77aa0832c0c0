"""Cases of a malicious server: what it was to send, what it sent, and what came back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.data.records import Records
from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import ModelSpec, Shape
from fedmi.training.local import fit, mean_gradient

SERVER = Position.MALICIOUS_SERVER
CLASSES = 10
Batch = tuple[Tensor, Tensor]
State = Mapping[str, Tensor]


def public_of(inputs: Tensor, labels: Tensor) -> Records:
    rows = labels.numpy().astype(np.int64)
    return Records(inputs.numpy(), rows, rows, np.arange(len(rows)))


def occasion(network: nn.Module, public: Records, round: int = 1) -> Occasion:
    seed = Seed.root(4).child(round)
    return Occasion(round, (0,), network, seed, public.shape, CLASSES, public)


def sent_by(malice: Malice, spec: ModelSpec, public: Records) -> tuple[State, State]:
    """(the honest model, what the malicious server sends in its place)."""
    honest = spec.build(public.shape, CLASSES, Seed.root(1)).state_dict()
    at = occasion(spec.blueprint(public.shape, CLASSES), public)
    return honest, malice.alter(honest, 0, at)


def active_case(
    spec: ModelSpec,
    models: tuple[State, State],
    clients: Sequence[Batch],
    channel: Channel = Channel.GRADIENT,
    learning_rate: float = 0.1,
    weight_decay: float = 0.0,
) -> Case:
    """One target of all clients on channel `aggregate`, else one a client; one step each."""
    honest, sent = models
    shape: Shape = (*clients[0][0].shape[1:],)  # type: ignore[assignment]
    recipe = Recipe(learning_rate=learning_rate, weight_decay=weight_decay, batch_size=10_000)
    work = LocalWork(recipe=recipe)
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, tuple(range(len(clients))), honest, 0)]
    payloads = []
    for client, batch in enumerate(clients):
        if sent is not honest:
            seen.append(Observation(SERVER, Channel.GLOBAL_MODEL, 1, (client,), sent, 0))
        payloads.append(_payload(spec, shape, honest, sent, batch, channel, work))
    counts = [len(labels) for _, labels in clients]
    clear = {f"num_examples/{client}": float(count) for client, count in enumerate(counts)}
    if channel == Channel.AGGREGATE:
        mean = {
            name: sum(n * p[name] for n, p in zip(counts, payloads, strict=True)) / sum(counts)
            for name in payloads[0]
        }
        clear["num_examples"] = float(sum(counts))
        everybody = tuple(range(len(clients)))
        averages = Channel.CLIENT_UPDATE
        seen.append(Observation(SERVER, channel, 1, everybody, mean, 0, clear, averages))
        targets = (Target("all", None, 1, everybody),)
    else:
        for client, payload in enumerate(payloads):
            told = {"num_examples": float(counts[client])}
            seen.append(Observation(SERVER, channel, 1, (client,), payload, 0, told))
        targets = tuple(Target(f"client {c}", None, 1, (c,)) for c in range(len(clients)))
    knowledge = Knowledge(
        input_shape=shape,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: spec.module(shape, CLASSES),
        work=work,
    )
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(2))


def _payload(
    spec: ModelSpec,
    shape: Shape,
    honest: State,
    sent: State,
    batch: Batch,
    channel: Channel,
    work: LocalWork,
) -> dict[str, Tensor]:
    module = spec.build(shape, CLASSES, Seed.root(1))
    module.load_state_dict(dict(sent))
    if channel == Channel.GRADIENT:
        return mean_gradient(module, *batch)
    fit(module, *batch, [np.arange(len(batch[1]))], work)
    trained = {name: value.detach() for name, value in module.state_dict().items()}
    return {name: honest[name] + (trained[name] - sent[name]) for name in honest}


def masked(case: Case, seed: int = 0) -> Case:
    """The same case where noise took the place of what clients sent."""
    rng = torch.Generator().manual_seed(seed)
    seen = tuple(
        item
        if item.channel == Channel.GLOBAL_MODEL
        else replace(
            item,
            payload={n: torch.randn(t.shape, generator=rng) for n, t in item.payload.items()},
        )
        for item in case.transcript.observations
    )
    return replace(case, transcript=Transcript(SERVER, seen))


def psnrs(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR of the nearest reconstruction to each record, dB."""
    errors = (truth[:, None] - found[None]).square().flatten(2).mean(2).min(1).values
    return -10 * errors.clamp_min(1e-12).log10()
