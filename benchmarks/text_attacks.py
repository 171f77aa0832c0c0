"""How much of a batch of sentences attacks on text recover from one gradient.

    python benchmarks/text_attacks.py [--attacks tag lamp] [--sizes 1 2 4] [--seconds 500]

State of the Union sentences of at most 24 tokens, a vocabulary of 4096, a BERT-like transformer
(dim 128, 2 blocks), untrained and trained on public ones; batches of 1, 2 and 4. Labels are not
granted, public sentences are. Beside each figure stands the same attack on the gradient of disjoint
sentences with the same labels. Writes results/text_attacks.json; rows of attacks not asked for stay
as they are there.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.gradient.lamp import LAMP
from fedmi.attacks.gradient.tag import TAG
from fedmi.attacks.gradient.token_set import TokenSet
from fedmi.data.records import Split
from fedmi.data.state_of_the_union import StateOfTheUnion
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.schema import Text
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.metrics.rouge import Rouge1, Rouge2, RougeL
from fedmi.metrics.sentences import SentenceMetric
from fedmi.metrics.token_accuracy import TokenAccuracy
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results" / "text_attacks.json"
SERVER = Position.CURIOUS_SERVER
WHERE = {"position": SERVER, "channel": Channel.GRADIENT}
SHAPE, CLASSES, LENGTH = (1, 1, 24), 2, 24
MODEL = TextTransformer(vocabulary=4096, positions=LENGTH, dim=128, depth=2)
TARGETS = {1: 4, 2: 3, 4: 2}
"""Batches attacked, by their size."""
TRAINED = 150
"""Steps of Adam on 64 public sentences each."""
METRICS: tuple[SentenceMetric, ...] = (TokenAccuracy(), Rouge1(), Rouge2(), RougeL())
ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "token_set": lambda: TokenSet(**WHERE),
    "tag": lambda: TAG(steps=200, **WHERE),
    "tag, token set": lambda: TAG(steps=200, use_token_set=True, **WHERE),
    "tag as published": lambda: TAG(steps=200, place_weight=0, **WHERE),
    "lamp": lambda: LAMP(steps=120, turns=3, rearrangements=12, **WHERE),
    "lamp, token set": lambda: LAMP(
        steps=120, turns=3, rearrangements=12, use_token_set=True, **WHERE
    ),
}
PAPERS = {
    "lamp": "CoLA, ROUGE-1 of batch 1: 89.6 on BERT base, 94.5 on TinyBERT (Balunovic et al. 2022)",
    "tag": "CoLA, tokens recovered of batch 1: up to 88.9 % (Deng et al. 2021)",
}
Batch = tuple[Tensor, Tensor]


def trained(split: Split) -> nn.Module:
    """The model after a little training on public sentences."""
    model, rng = MODEL.build(SHAPE, CLASSES, Seed.root(0)), Seed.root(0).child("train").torch()
    inputs, labels = tensors(split.public.inputs), tensors(split.public.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(TRAINED):
        rows = torch.randint(len(inputs), (64,), generator=rng)
        optimizer.zero_grad()
        cross_entropy(model(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def tensors(array: object) -> Tensor:
    return torch.as_tensor(array)


def batches(split: Split, size: int) -> tuple[list[Batch], list[Batch]]:
    """(targets, disjoint public sentences with the same labels)."""
    inputs, labels = tensors(split.private.inputs), tensors(split.private.labels)
    public, kinds = tensors(split.public.inputs), tensors(split.public.labels)
    order = torch.randperm(len(inputs), generator=Seed.root(1).torch())
    found, twins = list[Batch](), list[Batch]()
    stock = {k: torch.nonzero(kinds == k).flatten().tolist() for k in range(CLASSES)}
    for target in range(TARGETS[size]):
        rows = order[target * size : (target + 1) * size]
        found.append((inputs[rows], labels[rows]))
        others = [stock[int(label)].pop() for label in labels[rows]]
        twins.append((public[others], kinds[others]))
    return found, twins


def case_of(model: nn.Module, schema: Text, split: Split, clients: Sequence[Batch]) -> Case:
    base = {name: part.detach().clone() for name, part in model.state_dict().items()}
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), base, 0)]
    for client, (inputs, labels) in enumerate(clients):
        payload, count = mean_gradient(model, inputs, labels), {"num_examples": float(len(labels))}
        seen.append(Observation(SERVER, Channel.GRADIENT, 1, (client,), payload, 0, count))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        schema=schema,
        facts=frozenset(
            {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}
        ),
        build=lambda: MODEL.module(SHAPE, CLASSES),
        work=LocalWork(),
        public=(tensors(split.public.inputs), tensors(split.public.labels)),
    )
    targets = tuple(Target(f"client{c}", round=1, clients=(c,)) for c in range(len(clients)))
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(5))


def scores(
    answers: Sequence[Reconstruction], truth: Sequence[Batch], schema: Text
) -> dict[str, float]:
    """Means over all sentences, each beside the one that it fits best."""
    found: dict[str, list[float]] = {metric.kind: [] for metric in METRICS}
    for answer, (inputs, _) in zip(answers, truth, strict=True):
        assert answer.samples is not None
        ours, theirs = linear_sum_assignment(schema.cost(answer.samples, inputs).numpy())
        for one, other in zip(ours, theirs, strict=True):
            for metric in METRICS:
                pair = answer.samples[one].flatten(), inputs[other].flatten()
                found[metric.kind].append(metric.compare(*pair, schema))
    return {name: round(sum(each) / len(each), 4) for name, each in found.items()}


def row(name: str, state: str, size: int, model: nn.Module, split: Split) -> dict[str, object]:
    schema = split.private.schema
    assert isinstance(schema, Text)
    truth, twins = batches(split, size)
    attack, start = ATTACKS[name](), time.perf_counter()
    answers = attack.reconstruct(case_of(model, schema, split, truth))
    seconds = (time.perf_counter() - start) / len(truth)
    blind = attack.reconstruct(case_of(model, schema, split, twins))
    return {
        "attack": name,
        "model": state,
        "batch_size": size,
        "targets": len(truth),
        "scores": scores(answers, truth, schema),
        "prior_only": scores(blind, truth, schema),
        "flags": sorted(set().union(*(answer.flags for answer in answers))),
        "seconds_a_target": round(seconds, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "options": attack.model_dump(mode="json", exclude_defaults=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attacks", nargs="+", choices=[*ATTACKS], default=[*ATTACKS])
    parser.add_argument("--sizes", nargs="+", type=int, default=[*TARGETS])
    parser.add_argument("--seconds", type=float, default=500, help="no row begins after that")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = StateOfTheUnion(length=LENGTH).split(Seed.root(0))
    models = {"untrained": MODEL.build(SHAPE, CLASSES, Seed.root(0)).eval()}
    models["trained"] = trained(split)
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = {(r["attack"], r["model"], r["batch_size"]): r for r in kept}
    begun = time.perf_counter()
    for size in asked.sizes:
        for state, model in models.items():
            for name in asked.attacks:
                if time.perf_counter() - begun < asked.seconds:
                    rows[name, state, size] = row(name, state, size, model, split)
                    print(json.dumps(rows[name, state, size]), flush=True)
                    write([*rows.values()])


def write(rows: Sequence[object]) -> None:
    report = {
        "command": "python benchmarks/text_attacks.py",
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": version("torch"),
            "threads": 1,
            "cores": os.cpu_count(),
        },
        "papers": PAPERS,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
