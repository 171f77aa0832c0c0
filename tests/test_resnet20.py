"""The ResNets of CIFAR-10: depth, width, parameters, shortcuts, initial weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, group_norm, linear

from fedmi.exposure.component import components
from fedmi.exposure.seeding import Seed
from fedmi.models.base import Shape, features
from fedmi.models.convolutional import LeNet
from fedmi.models.resnet import BasicBlock
from fedmi.models.resnet20 import ResNet20

CIFAR: Shape = (3, 32, 32)
SEED = Seed.root(0)


def paper_parameters(width: int, blocks: int, classes: int) -> int:
    """Convolutions, batch norms, the linear layer; and option B's projections with their norms."""
    total = 3 * width * 9 + 2 * width
    into = width
    for out in (width, 2 * width, 4 * width):
        total += (into * out + (2 * blocks - 1) * out * out) * 9 + 2 * blocks * 2 * out
        total += into * out + 2 * out if into != out else 0
        into = out
    return total + into * classes + classes


def test_the_number_of_parameters_is_that_of_the_papers() -> None:
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert ResNet20().parameters(CIFAR, 10) == 272_474 == 269_722 + projections
    for spec in (ResNet20(width_factor=4), ResNet20(blocks=5), ResNet20(width_factor=2, blocks=1)):
        expected = paper_parameters(16 * spec.width_factor, spec.blocks, 10)
        assert spec.parameters(CIFAR, 10) == expected
    assert ResNet20(width_factor=4).parameters(CIFAR, 10) == 4_327_754


@pytest.mark.parametrize(("blocks", "depth"), [(3, 20), (5, 32), (9, 56)])
def test_depth_counts_weighted_layers(blocks: int, depth: int) -> None:
    model = ResNet20(blocks=blocks).blueprint(CIFAR, 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) + 1 == depth
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 2
    assert all(c.bias is None for c in convolutions)


def test_stages_halve_the_side_and_double_the_width() -> None:
    model = ResNet20(width_factor=2, blocks=2).build(CIFAR, 10, SEED).eval()
    sizes: list[tuple[int, ...]] = []
    for block in model:
        if isinstance(block, BasicBlock):
            block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    model(torch.rand(1, *CIFAR))
    assert sizes == [(32, 32, 32)] * 2 + [(64, 16, 16)] * 2 + [(128, 8, 8)] * 2


def naive(weights: dict[str, Tensor], images: Tensor, blocks: int) -> Tensor:
    """The paper's network, layer by layer, group norm with one map a group."""
    names = iter(weights.values())

    def normed(inputs: Tensor, stride: int, padding: int) -> Tensor:
        hidden = conv2d(inputs, next(names), stride=stride, padding=padding)
        return group_norm(hidden, hidden.shape[1], next(names), next(names))

    hidden = normed(images, 1, 1).relu()
    for stage in range(3):
        for block in range(blocks):
            shrinks = stage > 0 and block == 0
            inner = normed(hidden, 2 if shrinks else 1, 1).relu()
            inner = normed(inner, 1, 1)
            hidden = (inner + (normed(hidden, 2, 0) if shrinks else hidden)).relu()
    pooled = avg_pool2d(hidden, tuple(hidden.shape[2:])).flatten(1)
    return linear(pooled, next(names), next(names))


def test_logits_are_those_of_the_paper_written_out() -> None:
    # a width of 16 has stages of 16, 32 and 64 maps: 64 has two maps a group
    spec = ResNet20(norm="group", blocks=2)
    model = spec.build(CIFAR, 7, SEED).double()
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_channels
    images = torch.rand(3, *CIFAR, generator=SEED.torch()).double()
    weights = dict(model.named_parameters())
    assert torch.allclose(model(images), naive(weights, images, 2), atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 33, 47)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_maps_images_to_logits(shape: Shape, norm: str) -> None:
    spec = ResNet20.model_validate({"norm": norm, "blocks": 1})
    model = spec.build(shape, 7, SEED)
    inputs = torch.rand(2, *shape)
    for mode in (True, False):
        model.train(mode)
        assert model(inputs).shape == (2, 7)
        assert model(inputs[:1]).isfinite().all()
    assert features(model, inputs).shape == (2, 64)
    assert spec.parameters(shape, 7) == sum(p.numel() for p in model.parameters())


def test_group_norm_keeps_records_apart_and_batch_norm_does_not() -> None:
    inputs = torch.rand(4, *CIFAR, generator=SEED.torch())

    def shift(spec: ResNet20) -> float:
        model = spec.build(CIFAR, 3, SEED).train()
        return (model(inputs)[:1] - model(inputs[:2])[:1]).abs().max().item()

    assert shift(ResNet20(blocks=1, norm="group")) < 1e-4
    assert shift(ResNet20(blocks=1)) > 1e-3


def test_initial_weights_follow_he_and_the_seed_alone() -> None:
    he = ResNet20(width_factor=2).build(CIFAR, 10, SEED)
    for layer in he.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5000:
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    again = ResNet20(width_factor=2).build(CIFAR, 10, SEED).state_dict()
    other = ResNet20(width_factor=2).build(CIFAR, 10, Seed.root(1)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in he.state_dict().items())
    assert not torch.equal(again["0.weight"], other["0.weight"])
    plain = ResNet20(init="default").build(CIFAR, 10, SEED)[0].weight
    assert plain.abs().max() <= (1 / 27) ** 0.5


def test_tabular_input_is_refused_and_the_door_finds_it() -> None:
    with pytest.raises(ValueError, match=r"'resnet20' needs images.*\(1, 1, 30\)"):
        ResNet20().parameters((1, 1, 30), 2)
    assert components("fedmi.models")["resnet20"] is ResNet20


@pytest.mark.parametrize("train", [True, False])
def test_gradient_matching_has_the_derivative_of_finite_differences(train: bool) -> None:
    model = ResNet20(blocks=1).build((3, 8, 8), 3, SEED).double().train(train)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = list(model.parameters())
    label = torch.tensor([1])

    def distance(image: Tensor) -> Tensor:
        copied = {
            name: value if value.requires_grad else value.clone() for name, value in state.items()
        }
        loss = cross_entropy(functional_call(model, copied, (image,)), label)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    rng = Seed.root(1).torch()
    image = torch.rand(1, 3, 8, 8, generator=rng).double().requires_grad_()
    (slope,) = torch.autograd.grad(distance(image), image)
    direction = torch.randn(image.shape, generator=rng).double()
    step = 1e-7
    ahead, behind = ((image + sign * step * direction).detach() for sign in (1, -1))
    measured = (distance(ahead) - distance(behind)).item() / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-4)


def test_lenet_is_that_of_deep_leakage_from_gradients() -> None:
    """12 maps, 5x5, padding 2, strides 2, 2, 1, sigmoid after each, 768 features on 32x32x3."""
    model = LeNet(init="uniform").build(CIFAR, 10, SEED)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Conv2d, nn.Sigmoid] * 3 + [nn.Flatten, nn.Linear]
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert [c.stride for c in convolutions] == [(2, 2), (2, 2), (1, 1)]
    for into, layer in zip((3, 12, 12), convolutions, strict=True):
        assert (layer.in_channels, layer.out_channels) == (into, 12)
        assert (layer.kernel_size, layer.padding) == ((5, 5), (2, 2))
        assert layer.bias is not None
    assert (model[-1].in_features, model[-1].out_features) == (768, 10)
