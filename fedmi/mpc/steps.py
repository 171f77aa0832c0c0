"""One step of SGD in fixed point."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedmi.exposure.recipe import Recipe

if TYPE_CHECKING:
    import jax

    from fedmi.mpc.restate import Forward, Parameters


def sgd_step(
    forward: "Forward", names: Sequence[str], recipe: Recipe
) -> "Callable[..., list[jax.Array]]":
    """step(x, y, parameters..., buffers...) -> [parameters..., buffers...], as torch.optim.SGD.

    g = (1/n) sum of gradients + weight_decay p; v = momentum v + g; p = p - learning_rate v.
    Without momentum there are no buffers, and the two factors of each term are multiplied first.
    """

    def step(x: "jax.Array", y: "jax.Array", *state: "jax.Array") -> "list[jax.Array]":
        from fedmi.mpc.kernels import scaled

        parameters = dict(zip(names, state, strict=False))
        if not recipe.momentum:
            moves = gradients(forward, parameters, x, y, recipe.learning_rate / len(x))
            decay = recipe.learning_rate * recipe.weight_decay
            return [p - _decayed(moves[name], p, decay) for name, p in parameters.items()]
        means = gradients(forward, parameters, x, y, 1.0 / len(x))
        buffers = [
            recipe.momentum * buffer + _decayed(means[name], p, recipe.weight_decay)
            for (name, p), buffer in zip(parameters.items(), state[len(names) :], strict=True)
        ]
        moved = zip(parameters.values(), buffers, strict=True)
        return [p - scaled(v, recipe.learning_rate) for p, v in moved] + buffers

    return step


def gradients(
    forward: "Forward", parameters: "Parameters", x: "jax.Array", y: "jax.Array", factor: float
) -> "Mapping[str, jax.Array]":
    """`factor` times the gradient of the cross-entropy summed over the records, by name.

    At the logits it is softmax - y: no logarithm, no division. Of factor = m 2^k, m goes on there
    and 2^k on the sums, so that no gradient of a record is made small and then rounded.
    """
    import jax

    from fedmi.mpc.kernels import softmax, split_factor

    mantissa, power = split_factor(factor)
    logits, backward = jax.vjp(lambda weights: forward(weights, x), parameters)
    (sums,) = backward((softmax(logits) - y) * mantissa)
    return {name: total * power for name, total in sums.items()}


def _decayed(gradient: "jax.Array", weight: "jax.Array", decay: float) -> "jax.Array":
    from fedmi.mpc.kernels import scaled

    return gradient + scaled(weight, decay) if decay else gradient
