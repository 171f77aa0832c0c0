"""Malicious servers that alter weights: trap weights and fishing, beside their papers.

    python benchmarks/active_servers.py [--pictures FILE.png]

Trap weights: share of a batch recovered at 40 dB or more, of MNIST digits and CIFAR-10 images, by
1000 trapped neurons, and passively off the honest weights. Fishing: mean and largest PSNR over
targets of the record fished out of a batch of CIFAR-10 images, beside prior-only (the same attack
on a batch of public images). Writes results/active_servers.json. CIFAR-10 is read from
../shared/data/cifar10_subset.npz; without it only the digits are measured.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.gradient.fishing import Fishing as FishingAttack
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.attacks.gradient.trap_weights import TrapWeights as TrapAttack
from fedmi.data.mnist_5k import MNIST5k
from fedmi.data.records import Records
from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.deployments.federated.malice.fishing import Fishing
from fedmi.deployments.federated.malice.trap_weights import TrapWeights
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.leakage.intervals import mean_interval
from fedmi.models.base import ModelSpec, Shape
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results"
CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_subset.npz"
SERVER, CLASSES = Position.MALICIOUS_SERVER, 10
PUBLIC, EXACT = 1000, 40.0
BATCHES, REPEATS = (20, 50, 100), 5
FISHED_FROM, STEPS = 100, 250
Batch = tuple[Tensor, Tensor]
PAPERS = {
    "trap_weights": "Boenisch et al., abstract as recalled: over 50 % of 100 ImageNet images",
    "fishing": "breaching's stored run on ImageNet: mean about 13 dB, max 20.8 dB",
}


@dataclass(frozen=True)
class Data:
    name: str
    public: Batch
    private: Batch

    @property
    def shape(self) -> Shape:
        channels, height, width = self.public[0].shape[1:]
        return channels, height, width


def data_sets() -> list[Data]:
    digits = MNIST5k().load()
    found = [_split("MNIST", torch.tensor(digits.inputs), torch.tensor(digits.labels))]
    if CIFAR.exists():
        with np.load(CIFAR) as file:
            pixels = torch.tensor(file["x_train"]).permute(0, 3, 1, 2).float() / 255
            found.append(_split("CIFAR-10", pixels, torch.tensor(file["y_train"]).long()))
    return found


def _split(name: str, inputs: Tensor, labels: Tensor) -> Data:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    public, private = order[:PUBLIC], order[PUBLIC:]
    return Data(name, (inputs[public], labels[public]), (inputs[private], labels[private]))


def case_of(spec: ModelSpec, data: Data, malice: Malice | None, batch: Batch, draw: int) -> Case:
    """One gradient of the batch, at what the server sent (the honest model without malice)."""
    module = spec.build(data.shape, CLASSES, Seed.root(draw))
    honest = {name: value.clone() for name, value in module.state_dict().items()}
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (0,), honest, 0)]
    if malice is not None:
        rows = data.public[1].numpy()
        public = Records(data.public[0].numpy(), rows, rows, np.arange(len(rows)))
        network, seed = spec.blueprint(data.shape, CLASSES), Seed.root(draw).child("malice")
        at = Occasion(1, (0,), network, seed, data.shape, CLASSES, public)
        sent = malice.alter(honest, 0, at)
        module.load_state_dict(dict(sent))
        seen.append(Observation(SERVER, Channel.GLOBAL_MODEL, 1, (0,), sent, 0))
    clear = {"num_examples": float(len(batch[1]))}
    gradient = mean_gradient(module, *batch)
    seen.append(Observation(SERVER, Channel.GRADIENT, 1, (0,), gradient, 0, clear))
    knowledge = Knowledge(
        input_shape=data.shape,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: spec.module(data.shape, CLASSES),
        work=LocalWork(),
    )
    target = Target(f"batch {draw}", None, 1, (0,))
    return Case(Transcript(SERVER, tuple(seen)), knowledge, (target,), Seed.root(2))


def psnrs(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each record's nearest sample, dB."""
    errors = (truth[:, None] - found[None]).square().flatten(2).mean(2).min(1).values
    return -10 * errors.clamp_min(1e-10).log10()


def interval(values: list[float]) -> list[float]:
    found = mean_interval(values, [0] * len(values), np.random.default_rng(0))
    return [round(one, 3) for one in (found.mean, found.low, found.high)]


def traps(data: Data, size: int) -> dict[str, object]:
    """Share of batches of this size recovered, trapped and passively."""
    spec, shares, passive, wrong = MLP(hidden=(1000,)), list[float](), list[float](), 0
    attack = TrapAttack(channel=Channel.GRADIENT)
    honest = LinearInversion(position=Position.CURIOUS_SERVER, channel=Channel.GRADIENT)
    seconds = 0.0
    for draw in range(REPEATS):
        rows = slice(draw * size, (draw + 1) * size)
        batch = data.private[0][rows], data.private[1][rows]
        case = case_of(spec, data, TrapWeights(records=size), batch, draw)
        start = time.perf_counter()
        (found,) = attack.reconstruct(case)
        seconds += time.perf_counter() - start
        (plain,) = honest.reconstruct(case_of(spec, data, None, batch, draw))
        assert found.samples is not None
        assert plain.samples is not None
        believed = found.samples[found.confidence > 2]
        wrong += int((psnrs(batch[0], believed) < EXACT).sum())
        for samples, kept in ((found.samples, shares), (plain.samples, passive)):
            kept.append(float((psnrs(samples, batch[0]) >= EXACT).double().mean()))
    return {
        "data": data.name,
        "batch": size,
        "share_recovered": interval(shares),
        "share_passive": interval(passive),
        "believed_but_wrong": wrong,
        "seconds_an_attack": round(seconds / REPEATS, 2),
    }


def netful(batch: Batch, strategy: str, target: int) -> tuple[Batch, int | None]:
    """(a batch with one record of the class, or of the class alone, where that record is)."""
    inputs, labels = batch
    own, rest = torch.nonzero(labels == target).flatten(), torch.nonzero(labels != target).flatten()
    if strategy == "feature":
        rows = own[: FISHED_FROM // 2]
        return (inputs[rows], labels[rows]), None
    rows = torch.cat([own[target : target + 1], rest[: FISHED_FROM - 1]])
    return (inputs[rows], labels[rows]), 0


def fishing(data: Data, spec: ModelSpec, strategy: str) -> tuple[dict[str, object], Tensor]:
    """One target a class; the row, and [3, classes, C, H, W]: true, fished, prior-only."""
    ours, theirs, empty, pictures = list[float](), list[float](), 0, list[Tensor]()
    attack = FishingAttack(channel=Channel.GRADIENT, steps=STEPS, device="cpu")
    seconds = 0.0
    for target in range(CLASSES):
        batch, where = netful(data.private, strategy, target)
        other, _ = netful(data.public, strategy, target)
        malice = Fishing.model_validate(
            {"strategy": strategy, "target_class": target, "records": len(batch[1])}
        )
        start = time.perf_counter()
        (found,) = attack.reconstruct(case_of(spec, data, malice, batch, target))
        seconds += time.perf_counter() - start
        (prior,) = attack.reconstruct(case_of(spec, data, malice, other, target))
        assert found.samples is not None
        assert prior.samples is not None
        empty += "zero_gradients" in found.flags
        near, blind = (psnrs(batch[0], one.samples).max() for one in (found, prior))  # type: ignore[arg-type]
        ours.append(float(near))
        theirs.append(float(blind))
        errors = (batch[0] - found.samples).square().flatten(1).mean(1)
        true = batch[0][int(errors.argmin()) if where is None else where]
        pictures.append(torch.stack([true, found.samples[0], prior.samples[0]]))
    row = {
        "data": data.name,
        "model": spec.model_dump(),
        "strategy": strategy,
        "records": FISHED_FROM if strategy == "class" else FISHED_FROM // 2,
        "targets": CLASSES,
        "nothing_fished": empty,
        "fished_psnr_db": interval(ours),
        "fished_psnr_max_db": round(max(ours), 2),
        "prior_only_db": interval(theirs),
        "prior_only_max_db": round(max(theirs), 2),
        "seconds_a_target": round(seconds / CLASSES, 2),
    }
    return row, torch.stack(pictures, 1)


def draw(figures: list[Tensor], path: Path) -> None:
    """Rows of images, three a figure: true, fished, prior-only."""
    rows = [torch.cat(list(row), dim=2) for figure in figures for row in figure]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--pictures", type=Path, help="where to draw what was fished")
    pictures = options.parse_args().pictures
    torch.set_num_threads(1)
    sets = data_sets()
    trapped = [traps(data, size) for data in sets for size in BATCHES]
    found = [
        fishing(sets[-1], spec, strategy)
        for spec in (LeNet(), ConvNet())
        for strategy in ("class", "feature")
    ]
    result = {
        "command": "python benchmarks/active_servers.py",
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "intervals": "95 % bootstrap over batches or targets; [mean, low, high]",
        "papers": PAPERS,
        "trap_weights": trapped,
        "fishing": [row for row, _ in found],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "active_servers.json").write_text(text, encoding="utf-8")
    print(text)
    if pictures:
        draw([figure for _, figure in found], pictures)


if __name__ == "__main__":
    main()
