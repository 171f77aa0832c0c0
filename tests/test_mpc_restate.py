"""Torch models restated for the MPC engine: same function, same training, and limits."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from fedmi.data.digits import Digits
from fedmi.exposure.recipe import Recipe
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.models.resnet import ResNet18
from fedmi.mpc import restate
from fedmi.mpc.errors import RangeError, UnsupportedError
from fedmi.mpc.restate import unsupported

Array = NDArray[np.float32]

IMAGE = (2, 8, 8)
CHAINS: dict[str, list[nn.Module]] = {
    "linear without bias": [nn.Flatten(), nn.Linear(128, 5, bias=False)],
    "convolution, stride and padding": [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten()],
    "convolution of unequal sides": [nn.Conv2d(2, 3, (3, 2), padding=(0, 1)), nn.Flatten()],
    "relu": [nn.ReLU(), nn.Flatten()],
    "sigmoid": [nn.Sigmoid(), nn.Flatten()],
    "tanh": [nn.Tanh(), nn.Flatten()],
    "gelu": [nn.GELU(), nn.Flatten()],
    "max pooling": [nn.MaxPool2d(2), nn.Flatten()],
    "overlapping max pooling": [nn.MaxPool2d(3, stride=2), nn.Flatten()],
    "average pooling": [nn.AvgPool2d(2), nn.Flatten()],
    "padded average pooling": [nn.AvgPool2d(3, stride=2, padding=1), nn.Flatten()],
    "nested": [nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU())), nn.Flatten()],
    "identity": [nn.Identity(), nn.Flatten()],
}
MODELS: dict[str, tuple[ModelSpec, tuple[int, int, int]]] = {
    "softmax": (Softmax(), (1, 8, 8)),
    "mlp relu": (MLP(hidden=(32, 16)), (1, 8, 8)),
    "mlp sigmoid": (MLP(hidden=(32,), activation="sigmoid"), (1, 8, 8)),
    "mlp tanh": (MLP(hidden=(32,), activation="tanh"), (1, 8, 8)),
    "mlp gelu": (MLP(hidden=(32,), activation="gelu"), (1, 8, 8)),
    "lenet": (LeNet(channels=6), (1, 10, 9)),
    "lenet uniform": (LeNet(channels=6, init="uniform"), (1, 8, 8)),
    "convnet average": (ConvNet(width=4, blocks=2), (3, 8, 8)),
    "convnet max": (ConvNet(width=4, blocks=2, pooling="max"), (3, 8, 9)),
}


@cache
def engine(protocol: str = "ABY3") -> object:
    """All parties in this process: results are the engine's, addresses and files are not needed."""
    pytest.importorskip("spu")
    import spu
    from spu.utils.simulation import Simulator

    config = spu.RuntimeConfig(
        protocol=getattr(spu.ProtocolKind, protocol),
        field=spu.FieldType.FM64,
        fxp_fraction_bits=18,
    )
    return Simulator(3 if protocol == "ABY3" else 2, config)


def compute(program, *arrays: Array, protocol: str = "ABY3") -> list[Array]:
    import spu

    executable = spu.Executable(
        name=program.name,
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        code=program.code,
    )
    return engine(protocol)(executable, *arrays)


def built(spec: ModelSpec, shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    torch.manual_seed(1)
    return spec.module(shape, classes)


def weights_of(network: nn.Module) -> list[Array]:
    return [weight.detach().numpy().copy() for weight in network.parameters()]


def torch_logits(network: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return network(torch.from_numpy(x)).numpy()


def images(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def infer(network: nn.Module, x: Array, answer: str = "logits", protocol: str = "ABY3") -> Array:
    from fedmi.mpc.compile import inference_program

    program = inference_program(network, len(x), x.shape[1:], answer)
    assert program.outputs == (answer,)
    return compute(program, x, *weights_of(network), protocol=protocol)[0]


# ---- what cannot be restated


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.BatchNorm2d(3)), ("layer 0", "BatchNorm2d", 'norm = "none"')),
        (nn.Sequential(nn.Identity(), nn.GroupNorm(1, 3)), ("layer 1", "GroupNorm", "norm")),
        (nn.Sequential(nn.Sequential(nn.Dropout(0.5))), ("layer 0.0", "Dropout", "weight_decay")),
        (nn.Sequential(nn.LeakyReLU()), ("LeakyReLU", "relu")),
        (nn.Sequential(nn.GELU(approximate="tanh")), ("GELU", "use GELU()")),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ("Conv2d", "groups = 2", "groups = 1")),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding="same")), ('padding = "same"', "a number")),
        (nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), ("dilation",)),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="reflect")), ("reflect", "zeros")),
        (nn.Sequential(nn.MaxPool2d(2, padding=1)), ("MaxPool2d", "padding")),
        (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), ("AvgPool2d", "ceil_mode")),
        (nn.Sequential(nn.Flatten(2)), ("Flatten",)),
        (nn.LSTM(3, 3), ("the network", "LSTM", "plain chain")),
    ],
)
def test_unsupported_layers_are_named_with_what_to_use(
    network: nn.Module, words: Sequence[str]
) -> None:
    reason = unsupported(network)
    assert all(word in reason for word in words), reason


def test_unsupported_finds_all_layers_at_once_and_blocks_of_other_shape_by_name() -> None:
    reason = unsupported(ResNet18(width=8).blueprint((3, 32, 32), 10))
    assert "layer 1: GroupNorm" in reason
    assert "BasicBlock" in reason
    assert "convnet" in reason
    batch = unsupported(ConvNet(norm="batch", blocks=2).blueprint((3, 8, 8), 10))
    assert batch.startswith("layers 1, 5: BatchNorm2d")
    assert batch.count("BatchNorm2d") == 1


@pytest.mark.parametrize("name", MODELS)
def test_supported_models_are_not_refused_on_the_meta_device(name: str) -> None:
    spec, shape = MODELS[name]
    assert unsupported(spec.blueprint(shape, 10)) == ""


def test_refused_networks_raise_and_a_missing_engine_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnsupportedError, match="layer 0: Dropout"):
        restate.forward(nn.Sequential(nn.Dropout()))
    monkeypatch.setattr(restate, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fedmi\[smpc\]'"):
        restate.forward(nn.Sequential(nn.ReLU()))


# ---- the same function


@pytest.mark.parametrize("name", CHAINS)
def test_layer_equals_torch(name: str) -> None:
    pytest.importorskip("spu")
    torch.manual_seed(0)
    network = nn.Sequential(*CHAINS[name])
    x = images(3, *IMAGE, low=-3, high=3)
    assert restate.compare(network, network.state_dict(), x) < 1e-4
    assert np.abs(infer(network, x) - torch_logits(network, x)).max() < 5e-4


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_torch(name: str) -> None:
    pytest.importorskip("spu")
    spec, shape = MODELS[name]
    network, x = built(spec, shape), images(4, *shape)
    assert restate.compare(network, network.state_dict(), x) < 1e-4
    assert np.abs(infer(network, x) - torch_logits(network, x)).max() < 1e-3


@pytest.mark.parametrize("protocol", ["SEMI2K", "CHEETAH"])
def test_inference_by_two_parties(protocol: str) -> None:
    pytest.importorskip("spu")
    network, x = built(MLP(hidden=(16,)), (1, 4, 4)), images(4, 1, 4, 4)
    found = infer(network, x, protocol=protocol)
    assert np.abs(found - torch_logits(network, x)).max() < 1e-3


def test_compare_finds_weights_that_are_not_the_networks() -> None:
    pytest.importorskip("spu")
    network, x = built(Softmax(), (1, 8, 8)), images(4, 1, 8, 8)
    swapped = restate.trace
    try:
        restate.trace = lambda net: (  # a restatement that forgets the bias
            lambda weights, x: [x.reshape(len(x), -1) @ weights["1.weight"].T]
        )
        wrong = restate.compare(network, network.state_dict(), x)
    finally:
        restate.trace = swapped
    bias = network.get_parameter("1.bias").detach().abs().max().item()
    assert wrong == pytest.approx(bias, rel=1e-3)


def test_shared_modules_and_shared_weights_keep_torchs_names() -> None:
    pytest.importorskip("spu")
    square = nn.Linear(6, 6)
    network = nn.Sequential(nn.Flatten(), square, nn.ReLU(), square)
    assert restate.compare(network, dict(network.named_parameters()), images(2, 1, 2, 3)) < 1e-5


@settings(max_examples=6, deadline=None)
@given(
    side=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
)
def test_windows_of_any_shape_equal_torch(
    side: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int
) -> None:
    pytest.importorskip("spu")
    x = images(2, 2, *side, low=-1)
    pool = min(padding, min(kernel) // 2)
    for layer in (
        nn.Conv2d(2, 3, kernel, stride=stride, padding=padding),
        nn.MaxPool2d(kernel, stride=stride),
        nn.AvgPool2d(kernel, stride=stride, padding=pool),
    ):
        network = nn.Sequential(layer, nn.Flatten())
        assert restate.compare(network, network.state_dict(), x) < 1e-5


def test_activations_far_out_stay_accurate() -> None:
    pytest.importorskip("spu")
    x = np.linspace(-60, 60, 481, dtype=np.float32).reshape(-1, 1, 1, 1)
    for layer in (nn.Sigmoid(), nn.Tanh(), nn.GELU()):
        network = nn.Sequential(layer, nn.Flatten())
        assert np.abs(infer(network, x) - torch_logits(network, x)).max() < 2e-3, layer


# ---- answers


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_only_the_answer_asked_for_is_an_output(scale: float) -> None:
    pytest.importorskip("spu")
    network, x = built(Softmax(), (1, 8, 8)), images(16, 1, 8, 8)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(scale)
    logits = torch_logits(network, x)
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    assert np.abs(infer(network, x, "probabilities") - probabilities).max() < 2e-3
    labels = infer(network, x, "labels")
    assert labels.shape == (16,)
    assert (labels == logits.argmax(1)).all()


# ---- training


def digits(count: int) -> tuple[Array, NDArray[np.int64]]:
    records = Digits().load()
    return np.asarray(records.inputs[:count], np.float32), np.asarray(records.labels[:count])


def trained(
    spec: ModelSpec,
    recipe: Recipe,
    batches: Sequence[tuple[Array, NDArray[np.int64]]],
    protocol: str = "ABY3",
) -> tuple[nn.Module, list[Array], list[Array]]:
    """The network as torch trains it, and as the engine does: parameters, momentum buffers."""
    from fedmi.mpc.compile import training_program

    shape = batches[0][0].shape[1:]
    network = built(spec, shape)
    start = weights_of(network)
    buffers = [np.zeros_like(w) for w in start] if recipe.momentum else []
    state = start + buffers
    program = training_program(network, len(batches[0][0]), shape, 10, recipe)
    optimizer = torch.optim.SGD(
        network.parameters(),
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    for x, y in batches:
        state = compute(program, x, np.eye(10, dtype=np.float32)[y], *state, protocol=protocol)
        optimizer.zero_grad()
        cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    return network, state[: len(start)], state[len(start) :]


def distance(found: Sequence[Array], network: nn.Module) -> float:
    expected = weights_of(network)
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name", ["softmax", "mlp relu", "mlp gelu", "lenet", "convnet average", "convnet max"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_equals_torch(name: str, momentum: float) -> None:
    pytest.importorskip("spu")
    spec, shape = MODELS[name]
    y = np.arange(6) % 10
    recipe = Recipe(learning_rate=0.5, momentum=momentum, weight_decay=0.01)
    network, found, buffers = trained(spec, recipe, [(images(6, *shape), y)])
    assert distance(found, network) < 1e-3
    assert len(buffers) == (len(found) if momentum else 0)
    start = weights_of(built(spec, shape))
    for buffer, before, after in zip(buffers, start, weights_of(network), strict=False):
        assert np.abs(buffer - (before - after) / 0.5).max() < 1e-3


def epochs(steps: int, size: int) -> list[tuple[Array, NDArray[np.int64]]]:
    x, y = digits(1200)
    rng = np.random.default_rng(0)
    rows = [rng.choice(len(x), size, replace=False) for _ in range(steps)]
    return [(x[row], y[row]) for row in rows]


def accuracy(network: nn.Module, weights: Sequence[Array] | None = None) -> float:
    x, y = digits(1797)
    state: Mapping[str, torch.Tensor] = dict(network.named_parameters())
    if weights is not None:
        state = dict(zip(state, map(torch.tensor, weights), strict=True))
    with torch.no_grad():
        logits = torch.func.functional_call(network, state, torch.tensor(x[1200:]))
    return float((logits.argmax(1).numpy() == y[1200:]).mean())


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [
        (Softmax(), Recipe(learning_rate=0.5)),
        (MLP(hidden=(32,)), Recipe(learning_rate=0.2, momentum=0.9, weight_decay=1e-3)),
    ],
)
def test_thirty_steps_learn_what_torch_learns(spec: ModelSpec, recipe: Recipe) -> None:
    pytest.importorskip("spu")
    network, found, _ = trained(spec, recipe, epochs(30, 48))
    assert accuracy(network) > 0.8
    assert abs(accuracy(network, found) - accuracy(network)) <= 0.01
    assert distance(found, network) < 5e-3


def test_two_parties_train_the_same_model() -> None:
    pytest.importorskip("spu")
    network, found, _ = trained(Softmax(), Recipe(), epochs(5, 32), protocol="SEMI2K")
    assert distance(found, network) < 1e-4


def test_steps_too_small_for_the_fraction_bits_do_not_shrink_the_path() -> None:
    """0.001 / 48 is 5.46 units of 2^-18; rounded to 5 it would lose 8 % of every step."""
    pytest.importorskip("spu")
    network, found, _ = trained(Softmax(), Recipe(learning_rate=0.001), epochs(20, 48))
    start = weights_of(built(Softmax(), (1, 8, 8)))
    path = np.concatenate(
        [(a - b).ravel() for a, b in zip(weights_of(network), start, strict=True)]
    )
    walked = np.concatenate([(a - b).ravel() for a, b in zip(found, start, strict=True)])
    assert walked @ path / (path @ path) == pytest.approx(1, abs=0.01)


@given(factor=st.floats(1e-9, 1e3))
def test_a_factor_is_split_exactly(factor: float) -> None:
    pytest.importorskip("spu")
    from fedmi.mpc.kernels import split_factor

    mantissa, power = split_factor(factor)
    assert mantissa * power == factor
    assert mantissa >= 1
    assert power == 1 or (mantissa < 2 and float(np.log2(power)).is_integer())


# ---- overflow


def guarded(network: nn.Module, x: Array, weights: Sequence[Array]) -> None:
    from fedmi.mpc.guard import Guard

    guard = Guard(network, len(x), x.shape[1:], 18)
    (opened,) = compute(guard.program, x, *weights)
    assert opened.size == 1
    guard.verify(opened)


@pytest.mark.parametrize("name", ["softmax", "mlp relu", "lenet uniform", "convnet max"])
def test_guard_lets_ordinary_weights_pass(name: str) -> None:
    pytest.importorskip("spu")
    spec, shape = MODELS[name]
    network = built(spec, shape)
    guarded(network, images(4, *shape), weights_of(network))


@pytest.mark.parametrize("size", [1100.0, -1100.0, 1e6, 1e10, -(2.0**44)])
def test_guard_names_the_parameter_that_left_the_range(size: float) -> None:
    pytest.importorskip("spu")
    network = built(MLP(hidden=(16,)), (1, 8, 8))
    weights = weights_of(network)
    weights[2][3, 5] = size
    with pytest.raises(RangeError, match=r"parameter 3\.weight is beyond"):
        guarded(network, images(4, 1, 8, 8), weights)


def test_guard_names_the_layer_whose_output_left_the_range() -> None:
    pytest.importorskip("spu")
    network = built(MLP(hidden=(16,)), (1, 8, 8))
    weights = weights_of(network)
    weights[0][...] = 100.0
    with pytest.raises(RangeError, match=r"output of layer 1 is beyond"):
        guarded(network, images(4, 1, 8, 8), weights)


def test_what_the_guard_lets_pass_is_computed_rightly() -> None:
    """Parameters and inputs at the limit itself: the widest sum does not wrap."""
    pytest.importorskip("spu")
    from fedmi.mpc.guard import Guard

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    limit = Guard(network, 1, (1, 8, 8), 18).limit
    assert limit == 2**10
    with torch.no_grad():
        network[1].weight.fill_(limit)
    x = np.full((1, 1, 8, 8), limit, np.float32)
    assert np.abs(infer(network, x) / (64 * limit**2) - 1).max() < 1e-6
    with torch.no_grad():
        network[1].weight.fill_(4 * limit)
    assert np.abs(infer(network, x) / (256 * limit**2) - 1).max() > 0.1


def test_diverged_training_is_found_by_the_guard() -> None:
    pytest.importorskip("spu")
    batches = epochs(6, 16)
    network, found, _ = trained(MLP(hidden=(16,)), Recipe(learning_rate=300.0), batches)
    with pytest.raises(RangeError, match="fixed point overflowed"):
        guarded(network, batches[0][0], found)


def test_guard_that_opened_nonsense_and_a_range_without_room_are_errors() -> None:
    pytest.importorskip("spu")
    from fedmi.mpc.guard import Guard

    guard = Guard(built(Softmax(), (1, 8, 8)), 1, (1, 8, 8), 18)
    guard.verify(np.zeros(1, np.float32))
    for nonsense in (0.5, -1.0, 1e9, np.nan):
        with pytest.raises(RangeError, match="the guard itself"):
            guard.verify(np.asarray([nonsense], np.float32))
    wide = Softmax().blueprint((3, 64, 64), 10)
    with pytest.raises(ValueError, match="use 24 or fewer"):
        Guard(wide, 1, (3, 64, 64), 26).limit  # noqa: B018
