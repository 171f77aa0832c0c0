"""R-GAP: exact where every layer's system has full rank, flagged where one has not."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.recursion import Walk, refusal
from fedmi.attacks.engine.scale import top
from fedmi.attacks.engine.windows import Convolution, conjugate_gradients, solve
from fedmi.attacks.gradient.r_gap import RGAP
from fedmi.exposure.observation import Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.base import ModelSpec, Shape
from fedmi.models.classifiers import MLP
from fedmi.models.cnn6 import CNN6
from fedmi.models.convolutional import ConvNet, LeNet
from tests.gradient_cases import (
    SERVER,
    SHAPE,
    base_model,
    gradient_case,
    make_case,
    psnr,
    sets,
    trained,
)

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_subset.npz"
torch.set_num_threads(1)

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "leaky": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Chain(ModelSpec):
    """Convolutions of stride 1 and one or two linear layers."""

    kind: Literal["chain"] = "chain"
    maps: tuple[int, ...] = (4, 8)
    activation: str = "leaky"
    bias: bool = False
    pool: bool = False
    hidden: bool = False
    last_bias: bool = False

    def module(self, shape: Shape, classes: int) -> nn.Module:
        colours, height, width = shape
        layers: list[nn.Module] = []
        for into, out in pairwise((colours, *self.maps)):
            layers += [nn.Conv2d(into, out, 3, padding=1, bias=self.bias)]
            layers += [ACTIVATIONS[self.activation]()]
        side = 2 if self.pool else 1
        layers += [nn.AvgPool2d(2)] if self.pool else []
        flat = (self.maps[-1] if self.maps else colours) * (height // side) * (width // side)
        layers += [nn.Flatten()]
        if self.hidden:
            layers += [nn.Linear(flat, 40, bias=self.bias), ACTIVATIONS[self.activation]()]
            flat = 40
        return nn.Sequential(*layers, nn.Linear(flat, classes, bias=self.last_bias))


def attack(case: Case, **options: object) -> tuple[Reconstruction, ...]:
    given = {"position": SERVER, "channel": case.transcript.observations[-1].channel, **options}
    return RGAP.model_validate(given).reconstruct(case)


@pytest.mark.parametrize(
    "spec",
    [
        Chain(),
        Chain(bias=True, last_bias=True),
        Chain(activation="tanh"),
        Chain(activation="sigmoid", last_bias=True),
        Chain(hidden=True),
        Chain(hidden=True, bias=True),
        Chain(activation="relu", maps=(16,)),
        Chain(maps=()),
    ],
    ids=str,
)
def test_exact_on_chains_of_full_rank(spec: Chain) -> None:
    clients = sets([1, 1], seed=4)
    answers = attack(gradient_case(spec, clients))
    assert bool((psnr(answers, clients) > 60).all())
    for answer, (_, labels) in zip(answers, clients, strict=True):
        assert answer.flags == frozenset()
        assert torch.equal(answer.labels, labels)
        assert float(answer.confidence) > -1e-3


def test_float64_gradient_is_inverted_to_float64() -> None:
    spec, (inputs, labels) = Chain(), sets([1], seed=7)[0]
    network = base_model(spec).double()
    names, weights = zip(*network.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(network(inputs.double()), labels)
    gradient = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    here, head = Walk(1e-7, 8192).back(network, gradient, SHAPE)
    assert head.label == int(labels)
    assert float((here.values - inputs[0].double()).abs().max()) < 1e-5


def test_too_few_maps_are_flagged_by_layer_and_not_exact() -> None:
    clients = sets([1], seed=4)
    (answer,) = attack(gradient_case(CNN6(second=4), clients))
    # layer 2 is the second convolution, whose input the narrow one does not determine
    assert "rank_deficient: layer 2" in answer.flags
    assert float(psnr([answer], clients)) < 25


def test_average_pooling_is_walked_through_and_flagged() -> None:
    (answer,) = attack(gradient_case(Chain(pool=True), sets([1], seed=4)))
    assert "rank_deficient: layer 4" in answer.flags


def test_cnn6_on_small_images_is_exact() -> None:
    clients = sets([1], seed=4)
    (answer,) = attack(gradient_case(CNN6(), clients))
    assert float(psnr([answer], clients)) > 60
    assert not answer.flags


def test_one_plain_step_is_read_as_its_gradient() -> None:
    spec, clients = Chain(), sets([1], seed=4)
    work = LocalWork(steps=1, recipe=Recipe(batch_size=1, learning_rate=0.1))
    state = trained(spec, clients[0], work, Seed.root(1))
    (answer,) = attack(make_case(spec, [state], [1], Channel.CLIENT_UPDATE, work))
    assert float(psnr([answer], clients)) > 30
    assert "several_steps" not in answer.flags


def test_several_steps_and_several_records_are_flagged() -> None:
    spec, clients = Chain(), sets([1, 4], seed=4)
    work = LocalWork(steps=5, recipe=Recipe(batch_size=4, learning_rate=0.1))
    states = [trained(spec, batch, work, Seed.root(1)) for batch in clients]
    one, four = attack(make_case(spec, states, [1, 4], Channel.CLIENT_UPDATE, work))
    assert "several_steps" in one.flags
    assert {"several_records", "gradient_mismatch"} <= four.flags
    assert four.samples is not None
    assert four.samples.shape == (4, *SHAPE)


def test_a_gradient_of_noise_is_no_better_than_grey_and_is_flagged() -> None:
    spec, clients = Chain(), sets([1], seed=4)
    case = gradient_case(spec, clients)
    start, seen = case.transcript.observations
    rng = torch.Generator().manual_seed(2)
    noise = {name: torch.randn(part.shape, generator=rng) for name, part in seen.payload.items()}
    blinded = replace(seen, payload=noise)
    (answer,) = attack(replace(case, transcript=Transcript(SERVER, (start, blinded))))
    grey = -10 * (clients[0][0] - 0.5).square().mean().log10()
    assert float(psnr([answer], clients)) < float(grey) + 1
    assert {"not_one_record", "gradient_mismatch"} <= answer.flags


def test_a_bad_target_gets_a_blind_answer_and_spoils_no_other() -> None:
    spec, clients = Chain(), sets([1, 1, 1], seed=4)
    case = gradient_case(spec, clients)
    start, first, second, third = case.transcript.observations
    zeros = {name: torch.zeros_like(part) for name, part in first.payload.items()}
    broken = {name: part.fill_(float("nan")) for name, part in zeros.items()}
    empty = {name: torch.zeros_like(part) for name, part in first.payload.items()}
    shown = (start, replace(first, payload=broken), replace(second, payload=empty), third)
    nan, zero, good = attack(replace(case, transcript=Transcript(SERVER, shown)))
    assert "non_finite" in nan.flags
    assert "zero_gradients" in zero.flags
    assert float(nan.confidence) == float(zero.confidence) == -torch.inf
    (alone,) = attack(gradient_case(spec, clients, only=2))
    assert good.samples is not None
    assert alone.samples is not None
    assert torch.equal(good.samples, alone.samples)


@pytest.mark.parametrize(
    "spec", [ConvNet(), ConvNet(norm="batch"), MLP(activation="gelu")], ids=str
)
def test_what_cannot_be_walked_is_refused_by_name(spec: ModelSpec) -> None:
    attacker = RGAP(position=SERVER, channel=Channel.GRADIENT)
    blueprint = spec.blueprint(SHAPE, 10)
    refused = attacker.unsuited(blueprint)
    if isinstance(spec, ConvNet) and spec.norm == "none":
        assert refused == ""
        return
    assert "layer '" in refused
    assert "use '" in refused
    with pytest.raises(AttackError, match="layer '"):
        attack(gradient_case(spec, sets([1], seed=4)))


def test_refusals_say_what_is_wrong() -> None:
    assert "Sequential" in refusal(nn.Linear(3, 2))
    assert "twice" in refusal(nn.Sequential(shared := nn.Linear(3, 3), shared, nn.Linear(3, 2)))
    assert "last linear" in refusal(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    assert "groups" in refusal(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Linear(3, 2)))
    assert "MaxPool2d" in refusal(nn.Sequential(nn.MaxPool2d(2), nn.Linear(3, 2)))
    assert refusal(LeNet().blueprint(SHAPE, 10)) == ""


def test_scale_of_a_head_without_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=rng).double()
    features = torch.randn(12, generator=rng).double()
    slope = (weight @ features).softmax(0)
    slope[3] -= 1
    found = top(weight, None, torch.outer(slope, features), None)
    assert found.label == 3
    assert not found.flags
    torch.testing.assert_close(found.features, features, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.slope, slope, rtol=1e-9, atol=1e-9)


def test_label_of_a_sure_network_is_told_from_its_runner_up() -> None:
    """Two entries of dL/dlogits alike in size: only the fit says which is the label's."""
    weight = torch.eye(4).double()
    features = torch.tensor([8.0, 1.0, -9.0, -9.0]).double()
    for label in (0, 1):
        slope = (weight @ features).softmax(0)
        slope[label] -= 1
        rounded = torch.outer(slope, features).float().double()
        found = top(weight, None, rounded, None)
        assert found.label == label
        torch.testing.assert_close(found.features, features, rtol=1e-3, atol=1e-3)


def test_a_factor_that_no_softmax_gives_is_flagged() -> None:
    weight = torch.eye(4).double()
    factor = torch.outer(torch.tensor([-1.0, -1, 1, 1]), torch.tensor([1.0, 2, 3, 4])).double()
    assert "scale_not_found" in top(weight, None, factor, None).flags


def test_twin_data_are_flagged() -> None:
    """Two classes, record on the right side: two scales of it give one gradient."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    features = torch.tensor([0.5, 0.1]).double()
    slope = (weight @ features).softmax(0) - torch.tensor([1.0, 0.0]).double()
    found = top(weight, None, torch.outer(slope, features), None)
    assert found.flags == {"twin_data"}
    torch.testing.assert_close(found.features, features, rtol=1e-9, atol=1e-9)


def _system(maps: int, known: bool = True) -> tuple[Tensor, Convolution]:
    rng = torch.Generator().manual_seed(maps)
    inputs = torch.randn(2, 7, 6, generator=rng).double()
    weight = torch.randn(maps, 2, 3, 3, generator=rng).double()
    output = nn.functional.conv2d(inputs[None], weight, None, (2, 1), (1, 0), (1, 2))[0]
    slope = torch.randn(output.shape, generator=rng).double()
    seen = nn.functional.unfold(inputs[None], (3, 3), (1, 2), (1, 0), (2, 1))[0]
    gradient = (slope.flatten(1) @ seen.T).view_as(weight)
    mask = torch.ones_like(output) if known else torch.rand(output.shape, generator=rng) > 0.5
    space = ((2, 1), (1, 0), (1, 2))
    shape = (2, 7, 6)
    return inputs, Convolution(weight, gradient, output, slope, mask.double(), shape, *space)


@pytest.mark.parametrize("maps", [1, 3, 12])
@pytest.mark.parametrize("known", [True, False])
def test_gram_matrix_rank_and_solution_against_dense_algebra(maps: int, known: bool) -> None:
    inputs, system = _system(maps, known)
    basis = torch.eye(system.unknowns).double().view(-1, *system.shape)
    dense = torch.stack([system.curved(column).flatten() for column in basis], 1)
    torch.testing.assert_close(system.gram(), dense)
    found = solve(system, 1e-7, 4096)
    assert found.rank == int(torch.linalg.matrix_rank(dense, hermitian=True))
    if found.deficient:
        least = torch.linalg.pinv(dense, hermitian=True, rtol=1e-12) @ dense @ inputs.flatten()
        torch.testing.assert_close(found.inputs.flatten(), least, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(found.inputs, inputs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(conjugate_gradients(system)[0], inputs, rtol=1e-6, atol=1e-6)


def test_rank_is_said_to_be_unknown_above_the_limit() -> None:
    clients = sets([1], seed=4)
    (answer,) = attack(gradient_case(Chain(), clients), largest=100)
    assert any(flag.startswith("rank_unknown: layer") for flag in answer.flags)


@pytest.mark.slow
@pytest.mark.parametrize("second", [36, 20])
def test_cifar_images_on_cnn6_and_its_narrow_form(second: int) -> None:
    """breaching's stored output with CNN6 (bias in the last layer): 49.0 dB."""
    if not CIFAR.exists():
        pytest.skip("no CIFAR-10 images")
    with np.load(CIFAR) as stored:
        image = torch.from_numpy(stored["x_train"][:1]).permute(0, 3, 1, 2).float() / 255
        label = torch.from_numpy(stored["y_train"][:1].reshape(-1)).long()
    spec, shape = CNN6(second=second), (3, 32, 32)
    network = spec.build(shape, 10, Seed.root(0))
    names, weights = zip(*network.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(network(image), label)
    gradient = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    here, head = Walk(1e-7, 8192).back(network, gradient, shape)
    found = -10 * (here.values.clamp(0, 1) - image[0]).square().mean().log10()
    assert head.label == int(label)
    if second == 36:
        assert not here.flags
        assert float(found) > 49
    else:
        assert here.flags == {"rank_deficient: layer 2"}
        assert float(found) < 20
