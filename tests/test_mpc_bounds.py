"""Bounds of what a query can do: whatever they let through stays in the ring, number by number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.mpc.bounds import GELU_RATE, Interval, check_queries, worst_case
from fedmi.mpc.errors import RangeError, UnsupportedError

Ring = np.ndarray
"""Exact integers, as Python's: dtype object."""


def encoded(values: torch.Tensor, bits: int) -> Ring:
    scaled = np.rint(values.detach().double().numpy() * 2.0**bits)
    return np.vectorize(int, otypes=[object])(scaled)


def patches(x: Ring, layer: nn.Conv2d | nn.AvgPool2d) -> Ring:
    """[C, H, W] -> [windows, C, k, k]; square windows."""
    k, s, p = (int(np.ravel(v)[0]) for v in (layer.kernel_size, layer.stride, layer.padding))
    padded = np.full((x.shape[0], x.shape[1] + 2 * p, x.shape[2] + 2 * p), 0, dtype=object)
    padded[:, p : p + x.shape[1], p : p + x.shape[2]] = x
    places = range(0, padded.shape[1] - k + 1, s)
    return np.stack([padded[:, i : i + k, j : j + k] for i in places for j in places])


def largest_sum(network: nn.Sequential, inputs: torch.Tensor, bits: int) -> int:
    """The largest |sum of products|, before its truncation, in exact fixed point."""
    held, most = encoded(inputs, bits), 0
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight, bias = encoded(layer.weight, bits), encoded(layer.bias, bits)
            taken = patches(held, layer) if isinstance(layer, nn.Conv2d) else held[None]
            sums = taken.reshape(len(taken), -1) @ weight.reshape(len(weight), -1).T
            most = max(most, *(abs(one) for one in sums.ravel()))
            held = (sums >> bits) + bias
            most = max(most, *(abs(one) << bits for one in held.ravel()))
            if isinstance(layer, nn.Conv2d):
                side = round(len(taken) ** 0.5)
                held = held.T.reshape(-1, side, side)
        elif isinstance(layer, nn.ReLU):
            held = np.where(held > 0, held, 0)
        elif isinstance(layer, nn.AvgPool2d):
            windows = patches(held, layer)
            share = round(2**bits / (windows.shape[2] * windows.shape[3]))
            sums = windows.sum((2, 3)) * share
            most = max(most, *(abs(one) for one in sums.ravel()))
            side = round(len(sums) ** 0.5)
            held = (sums >> bits).T.reshape(-1, side, side)
        elif isinstance(layer, nn.Flatten):
            held = held.reshape(-1)
    return most


def small(seed: int, scale: float, convolutional: bool, positive: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    between = nn.ReLU() if seed % 2 else nn.Identity()
    body: list[nn.Module] = [nn.Flatten(), nn.Linear(16, 5), between, nn.Linear(5, 3)]
    if convolutional:
        convolution = nn.Conv2d(1, 2, 3, padding=1)
        body = [convolution, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)]
    network = nn.Sequential(*body)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(scale * (weight.abs() if positive else weight))
    return network


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**31),
    st.floats(-2, 36),
    st.booleans(),
    st.booleans(),
    st.integers(8, 26),
    st.integers(0, 2**31),
)
def test_no_input_overflows_a_model_that_passes(
    seed: int, power: float, convolutional: bool, positive: bool, bits: int, inputs: int
) -> None:
    network = small(seed, 2.0**power, convolutional, positive)
    rng = np.random.default_rng(inputs)
    drawn = [rng.random((1, 4, 4)), rng.integers(0, 2, (1, 4, 4)), np.ones((1, 4, 4))]
    reached = max(largest_sum(network, torch.from_numpy(x).float(), bits) for x in drawn)
    try:
        worst_case(network, bits)
    except RangeError:
        return
    assert reached < 2**62


def test_the_bound_is_met_by_the_worst_input() -> None:
    """With one layer of positive weights all ones are the worst: refused is what overflows then,
    and what stays 2 % below passes."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    ones = torch.ones(1, 4, 4)
    for scale, passes in ((0.98, True), (1.0001, False)):
        with torch.no_grad():
            network[1].bias.zero_()
            network[1].weight.copy_(torch.tensor([[1.0], [0.1]]).expand(2, 16) * scale * 2**26 / 16)
        assert (largest_sum(network, ones, 18) < 2**62) == passes
        if passes:
            worst_case(network, 18)
        else:
            with pytest.raises(RangeError, match=r"layer 1: .* below 6.71e\+07.* at most 17 frac"):
                worst_case(network, 18)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (Softmax(), (1, 28, 28)),
        (MLP(hidden=(256, 64)), (1, 28, 28)),
        (LeNet(), (1, 28, 28)),
        (ConvNet(norm="none"), (3, 32, 32)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_ordinary_models_pass_by_far(spec: ModelSpec, shape: tuple[int, int, int]) -> None:
    network = spec.build(shape, 10, Seed.root(0))
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(3)
    worst_case(network, 18)
    worst_case(network, 22)


def test_negative_numbers_and_biases_count() -> None:
    """-2^13 out of the first layer, times -2^13 in the second; or a bias of 2^26 alone."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1))
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(-(2.0**13))
        network[1].bias.zero_()
    for bias in (0.0, 2.0**26):
        with torch.no_grad():
            network[3].bias.fill_(bias)
        assert largest_sum(network, torch.ones(1, 1, 1), 18) >= 2**62
        with pytest.raises(RangeError, match="layer 3"):
            worst_case(network, 18)
        with torch.no_grad():
            network[3].weight.fill_(-1.0)
    with torch.no_grad():
        network[3].bias.fill_(-(2.0**26))
    with pytest.raises(RangeError, match="layer 3"):
        worst_case(network, 18)


def test_inputs_beyond_one_are_another_question() -> None:
    network = small(0, 2.0**8, convolutional=False, positive=True)
    worst_case(network, 18)
    with pytest.raises(RangeError, match=r"layer 1: an input within \[0, 1e\+07\]"):
        worst_case(network, 18, inputs=1e7)
    with pytest.raises(ValueError, match="inputs = nan"):
        worst_case(network, 18, inputs=float("nan"))


@pytest.mark.parametrize(
    ("activation", "scale", "words"),
    [
        (nn.GELU(), 3e6, "layer 2: .* GELU a number"),
        (nn.Tanh(), 2.2e6, "layer 2: .* a sum of products"),
        (nn.ReLU(), 5e6, "layer 1: "),
    ],
    ids=["gelu", "tanh", "relu"],
)
def test_activations_have_ranges_of_their_own(
    activation: nn.Module, scale: float, words: str
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), activation, nn.Linear(2, 2))
    with torch.no_grad():
        network[1].weight.fill_(scale)
        network[1].bias.zero_()
    with pytest.raises(RangeError, match=words):
        worst_case(network, 18)
    with torch.no_grad():
        network[1].weight.fill_(1.0)
    worst_case(network, 18)


def test_what_has_no_fixed_point_form_or_no_restatement_is_refused() -> None:
    network = small(0, 1.0, convolutional=False, positive=False)
    with torch.no_grad():
        network[1].weight[0, 0] = torch.nan
    with pytest.raises(RangeError, match="layer 1 has a weight that is not finite"):
        worst_case(network, 18)
    with pytest.raises(UnsupportedError, match="BatchNorm1d"):
        worst_case(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), 18)


def test_the_rate_is_that_of_the_kernel() -> None:
    pytest.importorskip("jax")
    from fedmi.mpc.kernels import ERFC_RATE

    assert ERFC_RATE * 0.5**0.5 <= GELU_RATE < ERFC_RATE * 0.5**0.5 + 1e-4


def test_zero_is_always_within() -> None:
    assert Interval(3.0, 4.0).widened(0.5).low == 0
    assert Interval(-1.0, 4.0).widened(0.5).size > 4.5 - 1e-6


@pytest.mark.parametrize("bad", [1.001, -0.001, float("nan"), float("inf"), 7e4])
def test_queries_outside_what_a_model_takes_are_refused(bad: float) -> None:
    inputs = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32)
    inputs[0, 0, 0] = [0, 1]
    check_queries(inputs)
    check_queries(inputs[:0])
    inputs[2, 0, 1, 0] = bad
    with pytest.raises(
        ValueError, match=rf"query 2 holds {np.float32(bad):.9g} at .0, 1, 0.; .*\[0, 1\]"
    ):
        check_queries(inputs)
