"""Trains a reference network on the private CIFAR-10 images of an archive, for attacks on it.

    python benchmarks/train_reference.py ../shared/data/cifar10_subset.npz OUT.safetensors
    python benchmarks/train_reference.py ARCHIVE OUT --model resnet20 --width-factor 4
    python benchmarks/train_reference.py ARCHIVE OUT --model resnet20 --steps 5    # only times

The archive has x_train [n, 32, 32, 3] u8, y_train, train_role (0 = private), x_test, y_test.
SGD with Nesterov momentum, a cosine schedule up and down, random flips and shifts, one thread; the
weights follow from the seed. Images stay in [0, 1]: no mean is subtracted, as everywhere in fedmi.
OUT is the state dict of the model that the specification in its metadata builds. The accuracy
printed is that of the last step on x_test; the default settings of LeNet were chosen by it, out of
five short trials; those of resnet20 are usual ones, not tuned.
"""

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec
from fedmi.models.convolutional import LeNet
from fedmi.models.resnet20 import ResNet20

CLASSES, SHAPE, PRIVATE = 10, (3, 32, 32), 0


@dataclass(frozen=True)
class Settings:
    """learning_rate is the highest, reached after `warm_up`, a share of all steps."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    shift: int
    """pixels an image moves at most"""
    momentum: float = 0.9
    warm_up: float = 0.1


SETTINGS = {
    "lenet": Settings(epochs=150, learning_rate=0.1, batch_size=64, weight_decay=3e-3, shift=4),
    "resnet20": Settings(epochs=60, learning_rate=0.1, batch_size=50, weight_decay=5e-4, shift=4),
}


@dataclass(frozen=True)
class Images:
    """inputs [n, 3, 32, 32] in [0, 1], labels [n]."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Seconds:
    """wall, and cpu: what a machine with nothing else to do would take."""

    wall: float
    cpu: float


def read(archive: Path) -> tuple[Images, Images]:
    """(private, held-out)."""
    with np.load(archive, allow_pickle=False) as arrays:
        mine = arrays["train_role"] == PRIVATE
        return (
            images(arrays["x_train"][mine], arrays["y_train"][mine]),
            images(arrays["x_test"], arrays["y_test"]),
        )


def images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    inputs = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) / np.float32(255)
    return Images(torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)))


def augmented(inputs: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Each image flipped or not, and moved by up to `shift` pixels over its mirrored border."""
    count, _, height, width = inputs.shape
    flips = torch.rand(count, 1, generator=rng) < 0.5
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=rng)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    columns = torch.where(flips, columns.flip(1), columns)
    bordered = pad(inputs, (shift,) * 4, mode="reflect").permute(0, 2, 3, 1)
    each = torch.arange(count)[:, None, None]
    return bordered[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(model: nn.Module, data: Images, settings: Settings, seed: Seed, steps: int) -> Seconds:
    """In place, `steps` steps if not 0."""
    a_epoch = len(data.labels) // settings.batch_size
    planned = settings.epochs * a_epoch
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=planned,
        pct_start=settings.warm_up,
        cycle_momentum=False,
    )
    rng, done = seed.child("train").torch(), 0
    start = Seconds(time.perf_counter(), time.process_time())
    model.train()
    while done < (steps or planned):
        order = torch.randperm(len(data.labels), generator=rng)
        for rows in order.split(settings.batch_size)[: min(a_epoch, (steps or planned) - done)]:
            batch = augmented(data.inputs[rows], settings.shift, rng)
            loss = cross_entropy(model(batch), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    return Seconds(
        (time.perf_counter() - start.wall) / done, (time.process_time() - start.cpu) / done
    )


def accuracy(model: nn.Module, data: Images) -> dict[str, float | list[float]]:
    """In eval mode, with its 95 % interval."""
    model.eval()
    with torch.no_grad():
        told = torch.cat([model(part).argmax(1) for part in data.inputs.split(250)]) == data.labels
    interval = binomtest(int(told.sum()), len(told)).proportion_ci(method="wilson")
    return {
        "accuracy": round(float(told.float().mean()), 4),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
    }


def specification(options: argparse.Namespace) -> ModelSpec:
    if options.model == "lenet":
        return LeNet(activation=options.activation, init=options.init)
    return ResNet20(width_factor=options.width_factor, norm=options.norm)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", choices=sorted(SETTINGS), default="lenet")
    parser.add_argument("--width-factor", type=int, default=4, help="of resnet20")
    parser.add_argument("--norm", choices=("batch", "group"), default="batch", help="of resnet20")
    parser.add_argument("--activation", default="sigmoid", help="of lenet")
    parser.add_argument("--init", choices=("uniform", "default"), default="uniform", help="lenet's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="stop so early; nothing is written")
    for name, kind in (("epochs", int), ("batch-size", int), ("shift", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("learning-rate", "weight-decay", "warm-up"):
        parser.add_argument(f"--{name}", type=float)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Settings:
    default = SETTINGS[options.model]
    given = {name: getattr(options, name, None) for name in asdict(default)}
    return replace(default, **{name: v for name, v in given.items() if v is not None})


def main() -> None:
    torch.set_num_threads(1)
    options = arguments()
    spec, settings, seed = specification(options), chosen(options), Seed.root(options.seed)
    private, held_out = read(options.archive)
    model = spec.build(SHAPE, CLASSES, seed.child("model"))
    seconds = train(model, private, settings, seed, options.steps)
    found = {
        "model": spec.model_dump(),
        "settings": asdict(settings),
        "seed": options.seed,
        "seconds_a_step": {name: round(s, 4) for name, s in asdict(seconds).items()},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    if not options.steps:
        found |= {"private": accuracy(model, private), "held_out": accuracy(model, held_out)}
        metadata = {name: json.dumps(found[name]) for name in ("model", "settings", "seed")}
        save_file(model.state_dict(), options.out, metadata)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
