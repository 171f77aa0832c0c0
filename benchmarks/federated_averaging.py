"""Federated averaging over several epochs in unknown order: three readings of the same updates.

    python benchmarks/federated_averaging.py [--epochs 2 5 10] [--clients 4] [--steps 300]

The setting of Dimitrov et al. (TMLR 2022), smaller: digits for FEMNIST, a network like
theirs with a quarter of the maps, 10 records a client in batches of 5, learning rate 0.05, labels
granted, their order not. PSNR in dB of optimally assigned images, share above 19 dB, which is where
the paper counts an image as reconstructed. Writes results/federated_averaging.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.gradient.data_leakage_fedavg import DataLeakageFedAvg
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.data.mnist_5k import MNIST5k
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.leakage.intervals import mean_interval
from fedmi.models.convolutional import ConvNet
from fedmi.training.local import batches, fit

RESULTS = Path(__file__).parent / "results" / "federated_averaging.json"
SERVER, RECORDS, BATCH, RATE, CLASSES, SHAPE = Position.CURIOUS_SERVER, 10, 5, 0.05, 10, (1, 28, 28)
SPEC = ConvNet(width=8, blocks=2)
COUNTS = 19.0
Batch = tuple[Tensor, Tensor]
FACTS = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.LABELS}


def updates(epochs: int, clients: int) -> tuple[Case, list[Batch]]:
    """Clients' updates after so many epochs, and their records."""
    records = MNIST5k(max_records=500).split(Seed.root(0)).private
    rows = np.random.default_rng(0).permutation(len(records))[: clients * RECORDS]
    inputs = torch.from_numpy(records.inputs[rows]).split(RECORDS)
    labels = torch.from_numpy(records.labels[rows]).split(RECORDS)
    work = LocalWork(
        recipe=Recipe(learning_rate=RATE, batch_size=BATCH, mode="eval"), epochs=epochs
    )
    start = SPEC.build(SHAPE, CLASSES, Seed.root(3)).state_dict()
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), dict(start), 0)]
    for client, batch in enumerate(zip(inputs, labels, strict=True)):
        model = SPEC.module(SHAPE, CLASSES)
        model.load_state_dict(start)
        fit(model, *batch, batches(RECORDS, work, Seed.root(100 + client)), work)
        sent = {name: value.clone() for name, value in model.state_dict().items()}
        clear = {"num_examples": float(RECORDS)}
        seen.append(Observation(SERVER, Channel.CLIENT_UPDATE, 1, (client,), sent, 0, clear))
    targets = tuple(Target(f"{c}", round=1, clients=(c,)) for c in range(clients))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        facts=frozenset(FACTS),
        build=lambda: SPEC.module(SHAPE, CLASSES),
        work=work,
        labels={t.id: labels[c].sort().values for c, t in enumerate(targets)},
    )
    case = Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(5))
    return case, list(zip(inputs, labels, strict=True))


def scores(found: tuple[Reconstruction, ...], truth: list[Batch]) -> list[float]:
    """PSNR of every record, dB."""
    every = list[float]()
    for answer, (inputs, _) in zip(found, truth, strict=True):
        assert answer.samples is not None
        errors = (answer.samples[:, None] - inputs[None]).square().mean((2, 3, 4)).numpy()
        chosen = errors[linear_sum_assignment(errors)]
        every += [float(value) for value in -10 * np.log10(np.maximum(chosen, 1e-12))]
    return every


def readings(steps: int) -> dict[str, Attack]:
    where: dict[str, Any] = {"position": SERVER, "channel": Channel.CLIENT_UPDATE}
    deals: dict[str, Any] = {"label_orders": 8, "tv_weight": 0.01, "steps": steps}
    return {
        "data_leakage_fedavg": DataLeakageFedAvg(**where, steps=steps, label_orders=8),
        "inverting_gradients, one order for all epochs": InvertingGradients(**where, **deals),
        "inverting_gradients, one gradient": InvertingGradients(
            **where, **(deals | {"steps": 2 * steps}), local_simulation=False
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    rows = list[dict[str, Any]]()
    for epochs in asked.epochs:
        case, truth = updates(epochs, asked.clients)
        for name, attack in readings(asked.steps).items():
            start = time.process_time()
            psnr = scores(attack.reconstruct(case), truth)
            interval = mean_interval(psnr, [0] * len(psnr), np.random.default_rng(0))
            rows.append(
                {
                    "epochs": epochs,
                    "attack": name,
                    "psnr_db": [round(v, 2) for v in (interval.mean, interval.low, interval.high)],
                    "share_above_19_db": round(float(np.mean(np.array(psnr) > COUNTS)), 3),
                    "images": len(psnr),
                    "cpu_seconds": round(time.process_time() - start, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    told = {"command": "python benchmarks/federated_averaging.py", "steps": asked.steps}
    RESULTS.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
