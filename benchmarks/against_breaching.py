"""Inverting Gradients here and in `breaching`: seconds a target, and PSNR of the same search.

    python benchmarks/against_breaching.py --peer PEER/bin/python --images cifar10.npz

PEER is a virtual environment with breaching in it; breaching_side.py says how to make one. Both
get the same images, weights, gradients (one record each), labels, starts, steps, loss (cosine
distance + total variation in absolute units), optimiser (Adam on the sign, step size falling
tenfold at 3/8, 5/8, 7/8), box and best iterate; one process and one thread each, in turns: one
waits while the other works, and who begins alternates. breaching runs in float32 without early
output; its JIT options are timed beside it. Its total variation also counts the edge of the image,
as a step to 0, and its mean is over all pixels: ours gets the weight times (side-1)/side, and PSNR
is reported without the outermost pixels as well. Times are of whole reconstructions after a
warm-up; CPU time is the steadier one on a machine that does other work. Beside it: `workers` such
cells of fedmi at a time, each in a process of its own with one thread, as `fedmi run` does on as
many cores, against one process of breaching, which has no such thing. Writes
results/against_breaching.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from breaching_peer import Peer, layers
from scipy.stats import bootstrap
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import read
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import ModelSpec
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.training.local import mean_gradient

RESULTS = Path(__file__).parent / "results"
SERVER = Position.CURIOUS_SERVER
CLASSES, EDGE, SAME = 10, 2, 1e-4
JIT = ("null", "script", "trace")


@dataclass(frozen=True)
class Setting:
    """One network and the search on it.

    tv: in breaching's units, chosen by its PSNR on other images. steps: of a timed run, and of
    one to the end, on `images` images.
    """

    spec: ModelSpec
    learning_rate: float
    tv: float
    timed_steps: int
    steps: int
    images: int


SETTINGS = {
    "lenet": Setting(LeNet(), 0.05, 1e-8, 200, 500, 16),
    "convnet": Setting(ConvNet(width=32), 0.1, 1e-2, 60, 200, 8),
}


@dataclass(frozen=True)
class Run:
    """What one side did: wall and CPU seconds, images [targets, C, H, W]."""

    seconds: float
    cpu_seconds: float
    found: Tensor


def pose(spec: ModelSpec, images: Tensor, labels: Tensor) -> tuple[Case, nn.Module]:
    """One client an image on one untrained model; its gradient and its label are known."""
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    model = spec.build(shape, CLASSES, Seed.root(1))
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), dict(model.state_dict()), 0)]
    targets = tuple(Target(f"client {c}", round=1, clients=(c,)) for c in range(len(images)))
    for client, image in enumerate(images):
        gradient = mean_gradient(model, image[None], labels[client : client + 1])
        clear = {"num_examples": 1.0}
        seen.append(Observation(SERVER, Channel.GRADIENT, 1, (client,), gradient, 0, clear))
    facts = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.LABELS}
    knowledge = Knowledge(
        input_shape=shape,
        classes=CLASSES,
        facts=frozenset(facts),
        build=lambda: spec.module(shape, CLASSES),
        work=LocalWork(),
        labels={target.id: labels[c : c + 1] for c, target in enumerate(targets)},
    )
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(2)), model


def attack_of(setting: Setting, side: int, steps: int) -> InvertingGradients:
    """Mean over the side - 1 differences of a row here, over side pixels in breaching."""
    return InvertingGradients(
        position=SERVER,
        channel=Channel.GRADIENT,
        steps=steps,
        learning_rate=setting.learning_rate,
        tv_weight=setting.tv * (side - 1) / side,
        tv_unit="absolute",
    )


def cell(setting: Setting, images: Tensor, labels: Tensor, steps: int) -> tuple[float, float]:
    """When, on the clock of all processes, a reconstruction of all images began and ended."""
    case, _ = pose(setting.spec, images, labels)
    attack = attack_of(setting, images.shape[-1], steps)
    start = time.monotonic()
    attack.reconstruct(case)
    return start, time.monotonic()


class Match:
    """One network's problem, put to both sides."""

    def __init__(self, peer: Peer, setting: Setting, images: Tensor, labels: Tensor) -> None:
        self.peer, self.setting, self.truth, self.labels = peer, setting, images, labels
        self.case, model = pose(setting.spec, images, labels)
        self.layers = layers(model)
        evidence = read(self.case, Channel.GRADIENT)
        attack = attack_of(setting, images.shape[-1], 1)
        starts = torch.stack([attack.start(self.case, item, 0) for item in evidence])
        gradients = [item.descent for item in evidence]
        self.path = peer.give(model, gradients, labels[:, None], starts, images[:1])

    def ours(self, targets: int, steps: int) -> Run:
        whole = self.case
        case = Case(whole.transcript, whole.knowledge, whole.targets[:targets], whole.seed)
        attack = attack_of(self.setting, self.truth.shape[-1], steps)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = attack.reconstruct(case)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found = [answer.samples for answer in answers if answer.samples is not None]
        return Run(wall, cpu, torch.cat(found))

    def theirs(self, targets: int, steps: int, jit: str = "null") -> Run:
        path = str(self.peer.folder / "found.npz")
        options = [
            f"optim.max_iterations={steps}",
            f"optim.step_size={self.setting.learning_rate}",
            f"optim.callback={10 * steps}",
            f"regularization.total_variation.scale={self.setting.tv}",
            f"impl.JIT={jit}",
        ]
        request = {"problems": self.path, "layers": self.layers, "options": options}
        reply = self.peer.ask(request | {"targets": targets, "found": path})
        if not reply["mismatch"] < SAME:
            raise SystemExit(f"the two networks differ: gradients by {reply['mismatch']:.1e}")
        with np.load(path) as stored:
            return Run(reply["seconds"], reply["cpu_seconds"], torch.from_numpy(stored["found"]))


def throughput(match: Match, targets: int, repeats: int) -> dict[str, object]:
    """Milliseconds a target and step on both sides, and their ratio, repeat by repeat."""
    steps, sides = match.setting.timed_steps, (match.ours, match.theirs)
    for run, count in zip(sides, (targets, min(targets, 3)), strict=True):
        run(count, 3)
    wall, cpu = np.zeros((2, repeats)), np.zeros((2, repeats))
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 else (1, 0):
            done = sides[side](targets, steps)
            wall[side, repeat], cpu[side, repeat] = done.seconds, done.cpu_seconds
    each = 1000 / (targets * steps)
    return {
        "targets": targets,
        "steps": steps,
        "repeats": repeats,
        "fedmi_cpu_ms_per_target_step": round(float(np.median(cpu[0])) * each, 4),
        "breaching_cpu_ms_per_target_step": round(float(np.median(cpu[1])) * each, 4),
        "speedup": spread(wall[1] / wall[0]),
        "speedup_in_cpu_time": spread(cpu[1] / cpu[0]),
    }


def side_by_side(match: Match, workers: int, repeats: int) -> dict[str, object]:
    """As many cells of all images at a time as there are workers, against one process of breaching:
    targets a second, and their ratio."""
    steps, count = match.setting.timed_steps, len(match.truth)
    given = (match.setting, match.truth, match.labels)
    ours, theirs = np.zeros(repeats), np.zeros(repeats)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        for repeat in range(-1, repeats):
            began = [pool.submit(cell, *given, steps if repeat >= 0 else 3) for _ in range(workers)]
            starts, ends = zip(*(cell.result() for cell in began), strict=True)
            if repeat >= 0:
                ours[repeat] = workers * count / (max(ends) - min(starts))
                theirs[repeat] = count / match.theirs(count, steps).seconds
    return {
        "workers": workers,
        "targets": workers * count,
        "fedmi_targets_per_second": round(float(np.median(ours)), 3),
        "breaching_targets_per_second": round(float(np.median(theirs)), 3),
        "speedup": spread(ours / theirs),
    }


def spread(ratios: np.ndarray) -> dict[str, float]:
    found = {"median": np.median(ratios), "low": ratios.min(), "high": ratios.max()}
    return {name: round(float(value), 2) for name, value in found.items()}


def compiled(match: Match, repeats: int) -> dict[str, float]:
    """CPU ms of one more step of breaching, in each of its ways to run the network."""
    steps, found = match.setting.timed_steps, {}
    for jit in JIT:
        match.theirs(2, 5, jit)
        runs = [[match.theirs(1, n, jit) for n in (steps, 3 * steps)] for _ in range(repeats)]
        times = [long.cpu_seconds - short.cpu_seconds for short, long in runs]
        found[jit] = round(float(np.median(times)) * 1000 / (2 * steps), 3)
    return found


def psnr(found: Tensor, truth: Tensor) -> np.ndarray:
    """PSNR of each image, dB."""
    return np.asarray(-10 * (found - truth).square().flatten(1).mean(1).clamp_min(1e-12).log10())


def compared(ours: Tensor, theirs: Tensor, truth: Tensor) -> dict[str, object]:
    """Mean PSNR of both, and the paired 95 % interval of the difference over images."""
    here, there = psnr(ours, truth), psnr(theirs, truth)
    interval = bootstrap((here - there,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    gap = (float((here - there).mean()), float(interval.low), float(interval.high))
    return {
        "fedmi_psnr_db": round(float(here.mean()), 2),
        "breaching_psnr_db": round(float(there.mean()), 2),
        "difference_db": [round(value, 2) for value in gap],
    }


def quality(match: Match) -> dict[str, object]:
    """The same search to its end on both sides."""
    count, steps = min(match.setting.images, len(match.truth)), match.setting.steps
    truth = match.truth[:count]
    ours, theirs = match.ours(count, steps).found, match.theirs(count, steps).found
    inner = (..., slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    return {
        "images": count,
        "steps": steps,
        "whole_image": compared(ours, theirs, truth),
        "without_edge": compared(ours[inner], theirs[inner], truth[inner]),
    }


def measured(match: Match, repeats: int, workers: int) -> dict[str, object]:
    setting = match.setting
    row = {
        "network": setting.spec.model_dump(),
        "image": list(match.truth.shape[1:]),
        "learning_rate": setting.learning_rate,
        "breaching_tv_scale": setting.tv,
        "throughput": [throughput(match, count, repeats) for count in (len(match.truth), 1)],
        "cells_side_by_side": side_by_side(match, workers, repeats),
        "breaching_jit_cpu_ms_per_step": compiled(match, repeats),
        "quality": quality(match),
    }
    print(json.dumps(row, indent=1), flush=True)
    return row


def load(path: Path, array: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images [n, C, H, W] in [0, 1] of array x_NAME (uint8, NHWC), labels of y_NAME."""
    with np.load(path, allow_pickle=False) as stored:
        pixels, labels = stored[array][:count], stored["y" + array[1:]][:count]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return images.contiguous(), torch.from_numpy(labels).long()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fedmi against breaching")
    parser.add_argument("--peer", required=True, help="python of the venv with breaching")
    parser.add_argument("--images", required=True, type=Path, help=".npz with x_test and y_test")
    parser.add_argument("--array", default="x_test")
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="cells at a time; the cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps: a smoke run")
    parser.add_argument("--out", type=Path, default=RESULTS / "against_breaching.json")
    return parser.parse_args()


def setting_of(name: str, quick: bool) -> Setting:
    full = SETTINGS[name]
    if not quick:
        return full
    return replace(full, timed_steps=full.timed_steps // 5, steps=full.steps // 5)


def main() -> None:
    torch.set_num_threads(1)
    asked = arguments()
    images, labels = load(asked.images, asked.array, asked.targets)
    settings = [setting_of(name, asked.quick) for name in asked.networks]
    with tempfile.TemporaryDirectory() as folder, Peer(asked.peer, Path(folder)) as peer:
        theirs = peer.ask({"versions": True})
        matches = (Match(peer, one, images, labels) for one in settings)
        rows = [measured(match, asked.repeats, asked.workers) for match in matches]
    result = {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[1], 1),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {
            "fedmi": {name: version(name) for name in ("fedmi", "torch", "numpy")},
            "breaching": theirs,
        },
        "command": "python benchmarks/against_breaching.py --peer PEER/bin/python --images NPZ",
        "quick": asked.quick,
        "images": f"{asked.array} of {asked.images.name}, the first {len(images)}",
        "ratios": "time of breaching / time of fedmi, a repeat at a time: median and range",
        "intervals": "95 % paired BCa bootstrap over images, fedmi - breaching: [mean, low, high]",
        "rows": rows,
    }
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
