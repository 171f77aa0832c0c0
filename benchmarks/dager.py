"""DAGER and Decepticons on State of the Union sentences: exact recovery by batch and model.

Writes benchmarks/results/dager.json. For 2 batches each of 1, 2, 4, 8 and 16 sentences (DAGER on
an encoder: to 8) of at most 24 tokens, on gradients of decoders and encoders (dim = 256):
untrained, trained (Adam, 3e-4), and, decoders and 4 sentences only, collapsed (SGD, 0.05, momentum
0.9: the residual stream grows to hundreds of times its size and the answer is the commoner class).
"""

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.gradient.dager import Dager
from fedmi.attacks.gradient.decepticons import Decepticons
from fedmi.data.records import Records
from fedmi.data.state_of_the_union import StateOfTheUnion
from fedmi.deployments.federated.malice.base import Occasion
from fedmi.deployments.federated.malice.decepticons import Decepticons as Malice
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results" / "dager.json"
SHAPE, CLASSES, DIM, BATCHES = (1, 1, 24), 2, 256, 2
STEPS, TRAINING_BATCH = {"trained": 300, "collapsed": 150}, 16
LARGEST = {"decoder": 16, "encoder": 8}
"""Sentences a batch; of more, an encoder finds few."""
MODELS = {
    f"{name} of {depth} blocks": TextTransformer(
        dim=DIM, depth=depth, causal=name == "decoder", arrangement=arrangement
    )
    for name, depth, arrangement in (
        ("decoder", 2, "pre_norm"),
        ("decoder", 3, "pre_norm"),
        ("encoder", 2, "post_norm"),
    )
}


def trained(model: nn.Module, public: Records, weights: str) -> nn.Module:
    """The model after some steps on public sentences."""
    model, rng = deepcopy(model), torch.Generator().manual_seed(0)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    if weights == "collapsed":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    inputs, labels = torch.as_tensor(public.inputs), torch.as_tensor(public.labels)
    for _ in range(STEPS[weights]):
        rows = torch.randint(len(labels), (TRAINING_BATCH,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, records: Records) -> float:
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:500]
    inputs, labels = torch.as_tensor(records.inputs)[rows], torch.as_tensor(records.labels)[rows]
    return round(float((model(inputs).argmax(1) == labels).float().mean()), 3)


def case(
    spec: TextTransformer,
    models: list[dict[str, Tensor]],
    gradient: dict[str, Tensor],
    records: Records,
    position: Position,
) -> Case:
    """models: the honest one and, if it is another, the one that the client was sent."""
    seen = [Observation(position, Channel.GLOBAL_MODEL, 1, (), models[0], 0)]
    seen += [Observation(position, Channel.GLOBAL_MODEL, 1, (0,), sent, 0) for sent in models[1:]]
    count = {"num_examples": float(len(records))}
    seen.append(Observation(position, Channel.GRADIENT, 1, (0,), gradient, 0, count))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        schema=records.schema,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: spec.module(SHAPE, CLASSES),
        work=LocalWork(),
    )
    target = (Target("client 0", round=1, clients=(0,)),)
    return Case(Transcript(position, tuple(seen)), knowledge, target, Seed.root(0))


def scored(answer: Reconstruction, truth: Tensor) -> dict[str, float | list[str]]:
    """exact: share of sentences told whole; tokens: share of tokens right, at the best match."""
    assert answer.samples is not None
    told, true = answer.samples.flatten(1), truth.flatten(1)
    whole = (told[:, None] == true[None]).all(2).any(0).double().mean()
    right = ((told[:, None] == true[None]) & (true[None] > 3)).sum(2).amax(0).sum()
    return {
        "exact": round(float(whole), 4),
        "tokens": round(float(right / (true > 3).sum()), 4),
        "flags": sorted(answer.flags),
    }


def timed(attack: Attack, one: Case, records: Records) -> dict[str, object]:
    start = time.perf_counter()
    (answer,) = attack.reconstruct(one)
    seconds = round(time.perf_counter() - start, 1)
    truth = torch.as_tensor(records.inputs)
    return {**scored(answer, truth), "in_batch": int((truth != 0).sum()), "seconds": seconds}


def batches(private: Records, size: int) -> Iterator[Records]:
    order = Seed.root(0).child("batches", size).numpy().permutation(len(private))
    for number in range(BATCHES):
        yield private.take(order[number * size : (number + 1) * size])


def dager_rows(private: Records, public: Records) -> Iterator[dict[str, object]]:
    attack = Dager(position="curious_server", channel="gradient")
    for name, spec in MODELS.items():
        untrained = spec.build(SHAPE, CLASSES, Seed.root(0))
        for weights in ("untrained", "trained", "collapsed"):
            if weights == "collapsed" and not spec.causal:
                continue
            model = untrained if weights == "untrained" else trained(untrained, public, weights)
            right = accuracy(model, private)
            for size in (4,) if weights == "collapsed" else (1, 2, 4, 8, 16):
                if size > LARGEST[name.split()[0]]:
                    continue
                for records in batches(private, size):
                    inputs, labels = (torch.as_tensor(v) for v in (records.inputs, records.labels))
                    gradient = mean_gradient(model, inputs, labels)
                    one = case(spec, [dict(model.state_dict())], gradient, records, attack.position)
                    head = {"attack": "dager", "model": name, "weights": weights}
                    head |= {"accuracy": right, "sentences": size}
                    yield {**head, **timed(attack, one, records)}


def decepticons_rows(private: Records, public: Records) -> Iterator[dict[str, object]]:
    attack = Decepticons(channel="gradient")
    for name, spec in MODELS.items():
        if spec.depth > 2:
            continue
        model = spec.build(SHAPE, CLASSES, Seed.root(0))
        blueprint = spec.blueprint(SHAPE, CLASSES)
        honest = {name: value.clone() for name, value in model.state_dict().items()}
        occasion = Occasion(1, (0,), blueprint, Seed.root(0), SHAPE, CLASSES, public)
        sent = dict(Malice().alter(honest, 0, occasion))
        model.load_state_dict(sent)
        for size in (1, 2, 4, 8, 16):
            for records in batches(private, size):
                inputs, labels = (torch.as_tensor(v) for v in (records.inputs, records.labels))
                gradient = mean_gradient(model, inputs, labels)
                one = case(spec, [honest, sent], gradient, records, attack.position)
                head = {"attack": "decepticons", "model": name, "sentences": size}
                yield {**head, **timed(attack, one, records)}


def main() -> None:
    torch.set_num_threads(1)
    split = StateOfTheUnion().split(Seed.root(0))
    rows = [
        *decepticons_rows(split.private, split.public),
        *dager_rows(split.private, split.public),
    ]
    RESULTS.write_text(
        json.dumps({"command": "python benchmarks/dager.py", "dim": DIM, "rows": rows}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
