"""The handle by which against_breaching.py asks breaching, in a process and a venv of its own."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

SCRIPT = Path(__file__).parent / "breaching_side.py"
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    nn.AvgPool2d: ("kernel_size",),
    nn.Linear: ("in_features", "out_features"),
}
"""Constructor arguments by which a layer is told to the other side; the others have none."""


class Peer:
    """breaching, asked line by line; breaching_side.py says what it understands."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [python, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "peer.log").open("w"),
            env=os.environ | one_thread,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        """The answer; SystemExit with the peer's log if it ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise SystemExit("breaching's side ended:\n" + (self.folder / "peer.log").read_text())
        return dict(json.loads(reply))

    def give(
        self,
        model: nn.Module,
        gradients: Sequence[Mapping[str, Tensor]],
        labels: Tensor,
        starts: Tensor,
        record: Tensor,
    ) -> str:
        """Writes weights and gradients by parameter order, and says where, for requests to name.

        gradients: one mapping a target; labels [targets, n]; starts [targets, n, C, H, W]; record
        [n, C, H, W]: what is behind target 0, by which the other side checks its network.
        """
        stored = {}
        for number, (name, weight) in enumerate(model.named_parameters()):
            stored[f"weight_{number}"] = weight.detach().numpy()
            stored[f"gradient_{number}"] = np.stack([item[name].numpy() for item in gradients])
        beside = {"labels": labels, "starts": starts, "record": record}
        stored |= {name: tensor.numpy() for name, tensor in beside.items()}
        path = self.folder / "problems.npz"
        np.savez(path, **stored)  # type: ignore[arg-type]
        return str(path)


def layers(model: nn.Module) -> list[tuple[str, dict[str, object]]]:
    """A chain of layers as the other side builds it from torch.nn."""
    return [
        (type(layer).__name__, {name: getattr(layer, name) for name in arguments_of(layer)})
        for layer in model.children()
    ]


def arguments_of(layer: nn.Module) -> tuple[str, ...]:
    return ARGUMENTS.get(type(layer), ())
