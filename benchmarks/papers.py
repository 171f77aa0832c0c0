"""Attacks on gradients beside their papers' figures, on CIFAR-10 images and the papers' networks.

    python benchmarks/train_reference.py cifar10.npz lenet.safetensors
    python benchmarks/train_reference.py cifar10.npz resnet.safetensors --model resnet20 \
        --width-factor 4 --epochs 25
    python benchmarks/papers.py cifar10.npz --lenet lenet.safetensors --resnet resnet.safetensors

cifar10.npz: arrays x_test (n, 32, 32, 3) uint8 and y_test. One record behind each gradient, labels
recovered from it, model mode as said. PSNR in dB, mean and 95 % bootstrap interval over images.
`--only WORD ...` runs the rows whose name holds a word. Rows are merged into
results/papers.json, which names the images and steps of each.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmi.attacks.base import Attack, Case
from fedmi.attacks.gradient.dlg import DLG
from fedmi.attacks.gradient.idlg import IDLG
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.attacks.gradient.r_gap import RGAP
from fedmi.attacks.gradient.spear import Spear
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.leakage.intervals import mean_interval
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP
from fedmi.models.cnn6 import CNN6
from fedmi.models.convolutional import LeNet
from fedmi.models.resnet20 import ResNet20
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results" / "papers.json"
SERVER, CLASSES, SHAPE = Position.CURIOUS_SERVER, 10, (3, 32, 32)
WHERE: dict[str, Any] = {"position": SERVER, "channel": Channel.GRADIENT}
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One row: `batch` records a gradient, `targets` gradients, what the paper says."""

    name: str
    spec: ModelSpec
    attack: Attack
    targets: int
    reported: float | None
    why: str
    batch: int = 1
    weights: str = ""
    mode: Literal["train", "eval"] = "eval"


def settings() -> Iterator[Setting]:
    lenet, resnet = LeNet(init="uniform"), ResNet20(width_factor=4)
    scale = "images in [0, 1] without the paper's standardisation"
    for state, weights, dlg, ig in (
        ("untrained", "", 46.3, 18.0),
        ("trained", "lenet", 13.2, 18.1),
    ):
        yield Setting(
            f"iDLG (L-BFGS, L2), LeNet {state}",
            lenet,
            IDLG(**WHERE),
            16,
            dlg,
            "Geiping 2020 table 1 (as remembered): L-BFGS without restarts; " + scale,
            weights=weights,
        )
        yield Setting(
            f"DLG (labels unknown), LeNet {state}",
            lenet,
            DLG(**WHERE),
            8,
            None,
            "the paper shows single pictures",
            weights=weights,
        )
        yield Setting(
            f"Inverting Gradients, LeNet {state}",
            lenet,
            InvertingGradients(**WHERE, steps=2000, learning_rate=0.025, tv_weight=1.0),
            16,
            ig,
            "24,000 steps in the paper, 2,000 here; " + scale,
            weights=weights,
        )
    for state, weights, paper in (("untrained", "", 19.8), ("trained", "resnet", 14.0)):
        yield Setting(
            f"Inverting Gradients, ResNet20-4 {state}",
            resnet,
            InvertingGradients(**WHERE, steps=600, tv_weight=0.3),
            4,
            paper,
            "24,000 steps in the paper, 600 here; " + scale,
            weights=weights,
        )
    yield Setting(
        "R-GAP, CNN6 untrained",
        CNN6(),
        RGAP(**WHERE),
        6,
        49.0,
        "breaching's stored notebook output; here systems are solved in float64",
    )
    yield Setting(
        "first linear layer, one record",
        MLP(),
        LinearInversion(**WHERE),
        16,
        None,
        "exact in theory",
    )
    yield Setting(
        "SPEAR, batches of 16, MLP 200-200",
        MLP(hidden=(200, 200)),
        Spear(**WHERE),
        4,
        None,
        "exact in theory",
        batch=16,
    )


def case_of(setting: Setting, images: Images, weights: dict[str, Path]) -> Case:
    """One client a gradient, all of the same model."""
    model = setting.spec.build(SHAPE, CLASSES, Seed.root(1))
    if setting.weights:
        model.load_state_dict(load_file(weights[setting.weights]))
    model.train(setting.mode == "train")
    work = LocalWork(recipe=Recipe(mode=setting.mode, batch_size=setting.batch))
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), dict(model.state_dict()), 0)]
    for client in range(setting.targets):
        rows = slice(client * setting.batch, (client + 1) * setting.batch)
        sent = mean_gradient(model, images[0][rows], images[1][rows], setting.mode)
        clear = {"num_examples": float(setting.batch)}
        seen.append(Observation(SERVER, Channel.GRADIENT, 1, (client,), sent, 0, clear))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: setting.spec.module(SHAPE, CLASSES),
        work=work,
    )
    targets = tuple(Target(f"{c}", round=1, clients=(c,)) for c in range(setting.targets))
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(2))


def measured(setting: Setting, images: Images, weights: dict[str, Path]) -> dict[str, Any]:
    start = time.process_time()
    found = setting.attack.reconstruct(case_of(setting, images, weights))
    seconds = time.process_time() - start
    scores, flags = list[float](), set[str]()
    for number, answer in enumerate(found):
        assert answer.samples is not None
        truth = images[0][number * setting.batch : (number + 1) * setting.batch]
        errors = (truth[:, None] - answer.samples[None]).square().mean((2, 3, 4)).min(1).values
        scores += [float(value) for value in -10 * errors.clamp_min(1e-12).log10()]
        flags |= answer.flags
    interval = mean_interval(scores, [0] * len(scores), np.random.default_rng(0))
    return {
        "setting": setting.name,
        "psnr_db": [round(v, 2) for v in (interval.mean, interval.low, interval.high)],
        "median_db": round(float(np.median(scores)), 2),
        "share_above_30_db": round(float(np.mean(np.array(scores) > 30)), 2),
        "images": len(scores),
        "reported_db": setting.reported,
        "note": setting.why,
        "flags": sorted(flags),
        "cpu_seconds": round(seconds, 1),
        "attack": setting.attack.model_dump(mode="json", exclude_defaults=True),
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--lenet", type=Path)
    parser.add_argument("--resnet", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    with np.load(asked.images, allow_pickle=False) as archive:
        pixels = torch.from_numpy(archive["x_test"]).permute(0, 3, 1, 2).float() / 255
        order = np.random.default_rng(0).permutation(len(pixels))
        images = (
            pixels[order].contiguous(),
            torch.from_numpy(archive["y_test"].astype("int64"))[order],
        )
    weights = {"lenet": asked.lenet, "resnet": asked.resnet}
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {row["setting"]: row for row in old}
    for setting in settings():
        wanted = not asked.only or any(word in setting.name for word in asked.only)
        if not wanted or (setting.weights and weights[setting.weights] is None):
            continue
        rows[setting.name] = measured(setting, images, weights)
        print(json.dumps(rows[setting.name]), flush=True)
        told = {"torch": torch.__version__, "cores": os.cpu_count(), "threads": 1}
        result = {
            "command": "python benchmarks/papers.py",
            "machine": told,
            "rows": [*rows.values()],
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
