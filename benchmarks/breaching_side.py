"""The peer's side of against_breaching.py: `breaching` through its public API, in its own venv.

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0 numpy hydra-core omegaconf scipy pandas tqdm pillow
    PEER/bin/pip install --no-deps breaching==0.1.2 torchvision==0.28.0

Started by the driver. Reads one request a line from stdin, writes one answer a line to stdout,
both JSON; tensors cross as .npz files. A request to reconstruct:

    problems       .npz: weight_i, gradient_i [targets, ...] in parameter order, labels and
                   starts [targets, 1, ...], record: the one behind target 0
    layers         the network, as constructor names of torch.nn with their arguments
    options        overrides of breaching's `invertinggradients` configuration
    targets        how many of the problems, from the first
    found          where to write the images, or null

The answer has wall and CPU seconds of the reconstructions alone, and how far the gradient of
`record`, computed here, is from the one handed over: the networks are the same or they are not.

PyPI's torchvision does not import beside the CPU build of torch, since its compiled operators do
not load: the two that its Python part asks for at import are declared here, without a kernel.
breaching uses torchvision for data sets and ready-made models only; nothing that is timed does.
"""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

if torch.version.cuda is None:
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import breaching

Problems = dict[str, Tensor]


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # breaching prints
    for line in sys.stdin:
        request = json.loads(line)
        reply = versions() if request.get("versions") else reconstruct(request)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("breaching", "torch", "torchvision", "numpy")}


def reconstruct(request: dict) -> dict[str, float]:
    """Each target by a call of its own, one after another: it takes one user at a time."""
    with np.load(request["problems"]) as stored:
        problems = {name: torch.from_numpy(stored[name]) for name in stored.files}
    model, loss = network(request["layers"], problems), nn.CrossEntropyLoss()
    config = breaching.get_attack_config("invertinggradients", overrides=request["options"])
    setup = {"dtype": torch.float, "device": torch.device("cpu")}
    attacker = breaching.attacks.prepare_attack(model, loss, config, setup)
    server = [served(model, problems)]
    users = [shared(problems, row) for row in range(request["targets"])]
    starts = problems["starts"]
    wall, cpu = time.perf_counter(), time.process_time()
    found = [
        attacker.reconstruct(server, [user], {}, initial_data=starts[row])[0]["data"]
        for row, user in enumerate(users)
    ]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if request["found"]:
        np.savez(request["found"], found=torch.cat(found).numpy())
    return {"seconds": wall, "cpu_seconds": cpu, "mismatch": mismatch(model, loss, problems)}


def network(layers: list, problems: Problems) -> nn.Module:
    model = nn.Sequential(*[getattr(nn, name)(**arguments) for name, arguments in layers])
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(problems[f"weight_{number}"])
    return model


def served(model: nn.Module, problems: Problems) -> dict:
    """The server's payload. No mean and deviation: the box of the search is that of the pixels."""
    metadata = SimpleNamespace(modality="vision", shape=tuple(problems["record"].shape[1:]))
    return {"parameters": list(model.parameters()), "buffers": [], "metadata": metadata}


def shared(problems: Problems, row: int) -> dict:
    """What one user shares: the gradient of one record, with the label."""
    count = sum(name.startswith("gradient_") for name in problems)
    labels = problems["labels"][row]
    known = {"num_data_points": len(labels), "labels": labels, "local_hyperparams": None}
    gradients = [problems[f"gradient_{number}"][row] for number in range(count)]
    return {"gradients": gradients, "buffers": None, "metadata": known}


def mismatch(model: nn.Module, loss: nn.Module, problems: Problems) -> float:
    """|own gradient of the record - gradient handed over| / |the latter|, of target 0."""
    value = loss(model(problems["record"]), problems["labels"][0])
    own = torch.cat([part.flatten() for part in torch.autograd.grad(value, model.parameters())])
    given = torch.cat([part.flatten() for part in shared(problems, 0)["gradients"]])
    return float((own - given).norm() / given.norm())


if __name__ == "__main__":
    main()
