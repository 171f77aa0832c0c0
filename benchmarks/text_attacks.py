"""How much of a batch of sentences attacks on text recover from one gradient.

    python benchmarks/text_attacks.py [--attacks tag lamp] [--sizes 1 2 4] [--seconds 390]

State of the Union sentences of at most 24 tokens, a vocabulary of 4096, a BERT-like transformer
(dim 128, 2 blocks), untrained and trained on public ones; batches of 1, 2 and 4. Labels are not
granted, public sentences are. Beside each figure stands the same attack on the gradient of disjoint
sentences with the same labels. Papers' own forms are "as published", but for lengths, which are
read off the gradient. Two processes of one thread each. Writes results/text_attacks.json anew; rows
that no time is left for are named in `left_out`, and no interval is given for so few targets.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.gradient.lamp import LAMP
from fedmi.attacks.gradient.place_rows import PlaceRows
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
from fedmi.metrics.sentences import SentenceMetric, f1, tokens
from fedmi.metrics.token_accuracy import TokenAccuracy
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results" / "text_attacks.json"
SERVER = Position.CURIOUS_SERVER
WHERE = {"position": SERVER, "channel": Channel.GRADIENT}
SHAPE, CLASSES, LENGTH = (1, 1, 24), 2, 24
MODEL = TextTransformer(vocabulary=4096, positions=LENGTH, dim=128, depth=2)
TARGETS = {1: 8, 2: 3, 4: 2}
"""Batches attacked, by their size."""
STATES = ("untrained", "trained")
TRAINED = 150
"""Steps of Adam on 64 public sentences each."""
METRICS: tuple[SentenceMetric, ...] = (TokenAccuracy(), Rouge1(), Rouge2(), RougeL())
LAMPS = {"turns": 3, "rearrangements": 12}
BEGUN = {"init": "place_rows", "use_token_set": True}
ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "token_set": lambda: TokenSet(**WHERE),
    "place_rows": lambda: PlaceRows(**WHERE),
    "place_rows, no exchanges": lambda: PlaceRows(trials=0, **WHERE),
    "lamp from place_rows": lambda: lamp(steps=60, **BEGUN),
    "lamp": lambda: lamp(steps=160),
    "tag from place_rows": lambda: TAG.model_validate({"steps": 30, **BEGUN, **WHERE}),
    "tag": lambda: TAG(steps=100, **WHERE),
    "lamp as published": lambda: lamp(steps=160, place_weight=0),
    "tag as published": lambda: TAG(steps=100, place_weight=0, label_search="joint", **WHERE),
}
PAPERS = {
    "lamp": "CoLA, ROUGE-1 of batch 1: 89.6 on BERT base, 94.5 on TinyBERT (Balunovic et al. 2022)",
    "tag": "CoLA, tokens recovered of batch 1: up to 88.9 % (Deng et al. 2021)",
}
Batch = tuple[Tensor, Tensor]


def lamp(**options: object) -> LAMP:
    return LAMP.model_validate({**LAMPS, **options, **WHERE})


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
        sets = [set(tokens(ids.flatten())) for ids in (answer.samples, inputs)]
        found.setdefault("token_set_f1", []).append(f1(len(sets[0] & sets[1]), *map(len, sets)))
    return {name: round(sum(each) / len(each), 4) for name, each in found.items()}


@cache
def prepared() -> tuple[Split, dict[str, nn.Module]]:
    torch.set_num_threads(1)
    split = StateOfTheUnion(length=LENGTH).split(Seed.root(0))
    untrained = MODEL.build(SHAPE, CLASSES, Seed.root(0)).eval()
    return split, {"untrained": untrained, "trained": trained(split)}


Asked = tuple[str, str, int]


def row(asked: Asked, until: float) -> dict[str, object] | None:
    """One row; None where no time is left."""
    (name, state, size), (split, models) = asked, prepared()
    if time.time() > until:
        return None
    model = models[state]
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
    parser.add_argument("--seconds", type=float, default=390, help="no row begins after that")
    asked = parser.parse_args()
    until = time.time() + asked.seconds
    every = [(n, state, k) for n in asked.attacks for k in asked.sizes for state in STATES]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = [*pool.map(row, every, repeat(until))]
    left = [
        f"{n}, {state}, batch of {k}"
        for (n, state, k), one in zip(every, found, strict=True)
        if one is None
    ]
    write([one for one in found if one is not None], left)


def write(rows: Sequence[object], left: Sequence[str]) -> None:
    report = {
        "command": " ".join(["python", "benchmarks/text_attacks.py", *sys.argv[1:]]),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": version("torch"),
            "threads": 1,
            "cores": os.cpu_count(),
        },
        "papers": PAPERS,
        "rows": rows,
        "left_out": left,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
