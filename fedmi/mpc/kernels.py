"""Layers as array functions that stay accurate in fixed point; images are [n, C, H, W], float32.

Nothing here may be imported unless JAX is installed; `restate` and `compile` see to that. The
engine computes what is written here on shares, so a function is made of additions, multiplications,
a few comparisons and reciprocals of numbers that are not small, all well inside the range.
"""

from collections.abc import Callable
from math import frexp

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array], jax.Array]

# The best polynomial of degree 5 on [-1, 0] for exp(t) that is exact at 0; error below 5e-7.
EXP = (1.0, 0.99997834, 0.49968458, 0.1651643, 0.03849388, 0.00515682)
LOWEST_EXPONENT = -16.0

# Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: error below 1.5e-7.
ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
ERFC_RATE = 0.3275911


def _horner(coefficients: tuple[float, ...], at: jax.Array) -> jax.Array:
    total = jnp.full_like(at, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * at + coefficient
    return total


def exp_negative(x: jax.Array) -> jax.Array:
    """exp(x) for x <= 0, as P(x / 16)^16; below -16 it is exp(-16).

    The engine's own exponential, (1 + x / 256)^256, is off by up to 1.2e-3.
    """
    power = _horner(EXP, jnp.where(x > LOWEST_EXPONENT, x, LOWEST_EXPONENT) * 0.0625)
    for _ in range(4):
        power = power * power
    return power


def softmax(logits: jax.Array) -> jax.Array:
    """Rows of probabilities, [n, classes]; the largest logit of a row is taken off first."""
    powers = exp_negative(logits - jnp.max(logits, axis=1, keepdims=True))
    return powers * (1.0 / jnp.sum(powers, axis=1, keepdims=True))


def relu(x: jax.Array) -> jax.Array:
    """The comparison serves the gradient too."""
    return jnp.where(x > 0, x, 0.0)


def with_slope(both: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> Function:
    """A function of numbers, from one that gives it and its derivative together."""

    def backward(slope: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
        return (slope * cotangent,)

    function = jax.custom_vjp(lambda x: both(x)[0])
    function.defvjp(both, backward)
    typed: Function = function
    return typed


def _sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    positive = x > 0
    power = exp_negative(jnp.where(positive, -x, x))
    far = 1.0 / (1.0 + power)
    value = jnp.where(positive, far, 1.0 - far)
    return value, value * (1.0 - value)


def _tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    value = 2.0 * _sigmoid(2.0 * x)[0] - 1.0
    return value, 1.0 - value * value


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    positive = x > 0
    size = jnp.where(positive, x, -x)
    density = exp_negative(-0.5 * size * jnp.where(size < 8.0, size, 8.0))
    near = 1.0 / (1.0 + ERFC_RATE * 0.5**0.5 * size)
    tail = 0.5 * near * _horner(ERFC, near) * density
    below = jnp.where(positive, 1.0 - tail, tail)
    return x * below, below + x * density * 0.3989423


sigmoid = with_slope(_sigmoid)
tanh = with_slope(_tanh)
gelu = with_slope(_gelu)


def windows(
    images: jax.Array, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> list[jax.Array]:
    """For each offset in the window, row by row, what lies there: [n, C, out H, out W]."""
    rows, columns = padding
    padded = jnp.pad(images, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    down = (padded.shape[2] - size[0]) // stride[0] * stride[0] + 1
    right = (padded.shape[3] - size[1]) // stride[1] * stride[1] + 1
    return [
        padded[:, :, i : i + down : stride[0], j : j + right : stride[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]


def convolution(
    images: jax.Array, weight: jax.Array, stride: tuple[int, int], padding: tuple[int, int]
) -> jax.Array:
    """Weights [out, in, kernel H, kernel W]: the engine's own, with a gradient by matrix products.

    The engine's takes half the time of `product_of_windows` forwards, and its gradient twice.
    """

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        pads = [(side, side) for side in padding]
        return jax.lax.conv_general_dilated(x, w, stride, pads)

    def remember(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return forward(x, w), (x, w)

    def backward(kept: tuple[jax.Array, jax.Array], above: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(lambda x, w: product_of_windows(x, w, stride, padding), *kept)
        gradients: tuple[jax.Array, ...] = pull(above)
        return gradients

    function = jax.custom_vjp(forward)
    function.defvjp(remember, backward)
    maps: jax.Array = function(images, weight)
    return maps


def product_of_windows(
    images: jax.Array, weight: jax.Array, stride: tuple[int, int], padding: tuple[int, int]
) -> jax.Array:
    """The same convolution as one matrix product over all windows."""
    n = images.shape[0]
    size = weight.shape[2], weight.shape[3]
    patches = jnp.stack(windows(images, size, stride, padding), axis=2)
    out_shape = patches.shape[3:]
    rows = patches.transpose(0, 3, 4, 1, 2).reshape(-1, patches.shape[1] * patches.shape[2])
    maps = rows @ weight.reshape(weight.shape[0], -1).T
    return maps.reshape(n, *out_shape, -1).transpose(0, 3, 1, 2)


def max_pool(images: jax.Array, size: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """A tournament in each window; of equals the first wins and takes the gradient, as in torch."""
    players = windows(images, size, stride, (0, 0))
    while len(players) > 1:
        left, right = players[:-1:2], players[1::2]
        odd = players[len(left) * 2 :]
        players = [jnp.where(b > a, b, a) for a, b in zip(left, right, strict=True)] + odd
    return players[0]


def average_pool(
    images: jax.Array, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> jax.Array:
    """Zeros of the padding count, as by torch's default."""
    parts = windows(images, size, stride, padding)
    return sum(parts[1:], start=parts[0]) * (1.0 / len(parts))


def split_factor(factor: float) -> tuple[float, float]:
    """factor = m * 2^k, 1 <= m < 2; (factor, 1) from 1 upwards, where one rounding is good enough.

    The engine rounds public numbers to multiples of 2^-fraction_bits (at 18, 2.1e-5 becomes
    1.9e-5). m keeps fraction_bits of its own, and 2^k is exact, but the compiler multiplies the
    two together again unless something that is not a product by a public number lies between them.
    """
    mantissa, exponent = frexp(factor)
    return (factor, 1.0) if factor >= 1 else (2 * mantissa, 2.0 ** (exponent - 1))


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a positive public number that may be tiny: m by an addition, then 2^k."""
    mantissa, power = split_factor(factor)
    return x * factor if power == 1 else (x + x * (mantissa - 1.0)) * power


def largest(logits: jax.Array) -> jax.Array:
    """The class of the largest logit of each row, as a number: [n]."""
    return jnp.argmax(logits, axis=1).astype(jnp.float32)


ANSWERS: dict[str, Function] = {
    "logits": lambda logits: logits,
    "probabilities": softmax,
    "labels": largest,
}
