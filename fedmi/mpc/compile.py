"""Programs for the engine from torch modules: answering queries, and one step of training."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from fedmi.exposure.recipe import Recipe
from fedmi.mpc.program import Program
from fedmi.mpc.restate import forward, require_engine

if TYPE_CHECKING:
    import jax

Answer = Literal["logits", "probabilities", "labels"]
Shape = tuple[int, int, int]
Shapes = Mapping[str, tuple[int, ...]]


def compiled(
    name: str,
    function: "Callable[..., Sequence[jax.Array]]",
    inputs: Shapes,
    outputs: Sequence[str],
) -> Program:
    """`function` of float32 arrays of these shapes, all of them secret, for the engine.

    outputs: a name for each array that it returns.
    """
    require_engine()
    from spu import Visibility
    from spu.utils import frontend

    arguments = [np.broadcast_to(np.float32(0), shape) for shape in inputs.values()]
    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        function,
        arguments,
        {},
        list(inputs),
        [Visibility.VIS_SECRET] * len(arguments),
        lambda _: list(outputs),
    )
    return Program(name, executable.code, tuple(inputs), tuple(outputs))


def parameter_shapes(network: nn.Module, prefix: str = "p/") -> dict[str, tuple[int, ...]]:
    """Shapes of the shared variables that hold the parameters."""
    return {prefix + name: tuple(weight.shape) for name, weight in network.named_parameters()}


def inference_program(
    network: nn.Module, batch: int, shape: Shape, answer: Answer = "logits"
) -> Program:
    """`x` [batch, C, H, W] and `p/NAME` -> the answer alone, under the answer's name.

    logits, probabilities: [batch, classes]; labels: [batch], the number of the largest logit.
    """
    restated = forward(network)
    from fedmi.mpc import kernels

    names = [name for name, _ in network.named_parameters()]

    def infer(x: "jax.Array", *weights: "jax.Array") -> "tuple[jax.Array]":
        logits = restated(dict(zip(names, weights, strict=True)), x)
        return (kernels.ANSWERS[answer](logits),)

    inputs = {"x": (batch, *shape), **parameter_shapes(network)}
    return compiled(f"infer-{answer}-{batch}", infer, inputs, [answer])


def training_program(
    network: nn.Module, batch: int, shape: Shape, classes: int, recipe: Recipe
) -> Program:
    """`x`, `y` (one-hot [batch, classes]), `p/NAME`, and `m/NAME` if there is momentum -> the new
    `p/NAME` and `m/NAME` after one step of torch.optim.SGD on the mean cross-entropy.

    Momentum buffers start as zeros. recipe.batch_size is not looked at: `batch` counts.
    """
    from fedmi.mpc.steps import sgd_step

    names = [name for name, _ in network.named_parameters()]
    step = sgd_step(forward(network), names, recipe)
    state = parameter_shapes(network)
    if recipe.momentum:
        state |= parameter_shapes(network, "m/")
    inputs = {"x": (batch, *shape), "y": (batch, classes), **state}
    return compiled(f"train-{batch}", step, inputs, list(state))
