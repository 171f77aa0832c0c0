"""Share of a batch that an imprint block gives away: alone, and through SecAgg+.

    python benchmarks/imprint.py [--clients 10 100] [--bins 256] [--seeds 1 2 3]

Robbing the Fed and LOKI on MNIST (5000 digits): 64 records a client and one local step of FedAvg,
alone (the mean of eight batches a seed) and through SecAgg+ with 10 clients; with 100 clients
digits are scaled to 8 x 8 and a client has 16 records, as there are too few for 64 each, with as
many bins a record. A record counts as recovered with a PSNR of at least 30 dB to what it is matched
with. `prior_only` is the same attack on a deployment of public digits with the same labels, scored
by the private ones, in the first trial of a row. `expected` is (1 - 1 / bins)^(n - 1), the chance
to be alone in a bin among n records. `reported` holds what papers say of larger settings. Writes
results/imprint.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import adaptive_avg_pool2d

from fedmi.attacks.base import Attack, Case
from fedmi.attacks.gradient.loki import Loki as LokiAttack
from fedmi.attacks.gradient.robbing_the_fed import RobbingTheFed as RobbingAttack
from fedmi.data.mnist_5k import MNIST5k
from fedmi.data.records import Records, Split
from fedmi.deployments.base import Job, Outcome
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.malice.imprinting import Imprinting
from fedmi.deployments.federated.malice.loki import Loki
from fedmi.deployments.federated.malice.robbing_the_fed import RobbingTheFed
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Fact, Position
from fedmi.models.classifiers import MLP
from fedmi.protections.secagg.secagg_plus import SecAggPlus

RESULTS = Path(__file__).parent / "results" / "imprint.json"
SERVER, RECOVERED, RATE, STRENGTH = Position.MALICIOUS_SERVER, 30.0, 0.1, 2.0
SMALL, ALONE = 8, 8
FACTS = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}
REPORTED = {
    "LOKI, records recovered through an aggregate of 100 clients": "76 % to 86 %",
    "Zhao et al., CVPR 2023 (sparse variant), 1000 clients, 4 units a record": "77 %",
    "Robbing the Fed, PSNR of one batch in breaching's stored notebook": "47.08 dB",
}


@dataclass(frozen=True)
class Row:
    """One measurement: so many clients of so many records, each side x side."""

    attack: str
    clients: int
    records: int
    bins: int
    side: int
    secagg: bool


def rows(clients: list[int], bins: int) -> list[Row]:
    found = []
    for attack in ("robbing_the_fed", "loki"):
        found.append(Row(attack, 1, 64, bins, 28, secagg=False))
        for count in clients:
            large = count * 64 > 900
            records, side, width = (16, SMALL, bins // 4) if large else (64, 28, bins)
            found.append(Row(attack, count, records, width, side, secagg=True))
    return found


def data(row: Row, seed: Seed) -> Split:
    """Private records for every client, all others public but a few."""
    every = MNIST5k(held_out=0.05, public=0.4).split(seed)
    order = seed.child("rows").numpy().permutation(len(every.private))
    chosen = every.private.take(order[: row.clients * row.records])
    return replace(
        every,
        private=scaled(chosen, row.side),
        held_out=scaled(every.held_out, row.side),
        public=scaled(every.public, row.side),
    )


def scaled(records: Records, side: int) -> Records:
    pooled = adaptive_avg_pool2d(torch.from_numpy(records.inputs), side)
    return replace(records, inputs=pooled.numpy())


def measured(row: Row, number: int, prior: bool) -> dict[str, object]:
    seed = Seed.root(number)
    shared = {"bins": row.bins, "strength": STRENGTH}
    malice: Imprinting = RobbingTheFed.model_validate(shared)
    attack: Attack = RobbingAttack.model_validate({"position": SERVER, "channel": "aggregate"})
    if row.attack == "loki":
        malice = Loki.model_validate({**shared, "groups": row.clients})
        attack = LokiAttack.model_validate({"position": SERVER, "channel": "aggregate"})
    federated = Federated(
        name="malicious",
        clients=row.clients,
        rounds=1,
        local_steps=1,
        malice=malice,
        protections=(SecAggPlus(mask_generator="aes_ctr"),) if row.secagg else (),
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        job = Job(
            split=data(row, seed),
            model=MLP(hidden=(64,)),
            recipe=Recipe(learning_rate=RATE, batch_size=row.records),
            seed=seed,
            directory=Path(directory),
            record=frozenset({1}),
        )
        outcome = federated.train(job)
        trained = time.perf_counter()
        quality, flags = scored(federated, job, outcome, attack)
        ended = time.perf_counter()
        guessed = {}
        if prior:
            twin = replace(job, split=job.split.disjoint_twin(seed))
            blind, _ = scored(federated, job, federated.train(twin), attack)
            guessed = {"prior_only": float((blind >= RECOVERED).mean())}
    return {
        "seed": number,
        "recovered": float((quality >= RECOVERED).mean()),
        "median_psnr": float(np.median(quality)),
        "flags": sorted(flags | {flag for flag in outcome.flags if "clip" in flag}),
        "seconds_training": round(trained - start, 1),
        "seconds_attack": round(ended - trained, 1),
        **guessed,
    }


def scored(
    federated: Federated, job: Job, outcome: Outcome, attack: Attack
) -> tuple[np.ndarray, frozenset[str]]:
    """(PSNR of every record and the sample it is matched with, flags)."""
    clients = tuple(range(federated.clients))
    shape, classes = job.split.private.shape, job.split.classes
    spec = federated.builds(job.model)
    public = (torch.from_numpy(job.split.public.inputs), torch.from_numpy(job.split.public.labels))
    knowledge = Knowledge(
        input_shape=shape,
        classes=classes,
        facts=frozenset(FACTS),
        build=lambda: spec.module(shape, classes),
        work=federated.work(job.recipe),
        public=public,
    )
    target = Target("all", None, 1, clients)
    case = Case(outcome.transcripts[SERVER], knowledge, (target,), Seed.root(5))
    (answer,) = attack.reconstruct(case)
    assert answer.samples is not None
    used = np.concatenate([outcome.used[1, client] for client in clients])
    truth = torch.from_numpy(job.split.private.inputs[used]).flatten(1).double()
    errors = torch.cdist(answer.samples.flatten(1).double(), truth).square().numpy()
    found = errors[linear_sum_assignment(errors)] / truth.shape[1]
    return -10 * np.log10(found.clip(1e-10)), answer.flags


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--bins", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = []
    for row in rows(options.clients, options.bins):
        seeds = options.seeds if row.secagg else [s for s in options.seeds for _ in range(ALONE)]
        trials = [measured(row, s + 1000 * place, not place) for place, s in enumerate(seeds)]
        among = row.records if row.attack == "loki" else row.records * row.clients
        shares = [float(str(trial["recovered"])) for trial in trials]
        entry = {
            **row.__dict__,
            "expected": (1 - 1 / row.bins) ** (among - 1),
            "recovered": float(np.mean(shares)),
            "prior_only": trials[0]["prior_only"],
            "trials": trials,
        }
        found.append(entry)
        print(json.dumps(entry), flush=True)
    report = {
        "command": "python benchmarks/imprint.py "
        f"--clients {' '.join(map(str, options.clients))} --bins {options.bins} "
        f"--seeds {' '.join(map(str, options.seeds))}",
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": version("torch"),
            "flwr": version("flwr"),
            "device": "cpu",
            "threads": 1,
        },
        "recovered_from_db": RECOVERED,
        "learning_rate": RATE,
        "strength": STRENGTH,
        "rows": found,
        "reported": REPORTED,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
