"""From the last linear layer back to the input, layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.scale import Top, top
from fedmi.attacks.engine.windows import Convolution, solve, transposed
from fedmi.models.chain import layers

EDGE = 1e-12
"""How near to its bounds the value of a bounded activation is inverted."""
DEAD = 1e-6
"""Share of the largest value up to which a ReLU's output counts as zero."""

Shape = tuple[int, ...]
WEIGHTED = (nn.Linear, nn.Conv2d)
POOLING = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
PASSED = (nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class Back:
    """Where the walk is: the values at this point of the network, and the loss's slope in them.

    known: 1, or 0 where the value was lost in a ReLU.
    """

    values: Tensor
    slope: Tensor
    known: Tensor
    flags: frozenset[str] = frozenset()

    def shaped(self, shape: Shape) -> "Back":
        values, slope = self.values.reshape(shape), self.slope.reshape(shape)
        return Back(values, slope, self.known.reshape(shape), self.flags)


@dataclass(frozen=True)
class Walk:
    """tolerance: relative singular value below which a direction is unknown; largest: unknowns
    a layer that are solved with a matrix; emphasis: of gradient over weight constraints."""

    tolerance: float
    largest: int
    emphasis: float = 1.0

    def back(
        self, network: nn.Module, gradient: Mapping[str, Tensor], shape: Shape
    ) -> tuple[Back, Top]:
        """The input [C, H, W] that gave `gradient`, in float64; network: a chain that `refusal`
        passes, with the weights of the round."""
        chain = list(layers(network.double()))
        shapes = _shapes(chain, shape)
        slopes = {name: part.double() for name, part in gradient.items()}
        name, last = chain[-1]
        assert isinstance(last, nn.Linear)
        bias = None if last.bias is None else last.bias.detach()
        weight = last.weight.detach()
        head = top(weight, bias, slopes[f"{name}.weight"], slopes.get(f"{name}.bias"))
        here = Back(head.features, weight.T @ head.slope, torch.ones_like(head.features))
        here = replace(here, flags=head.flags)
        for (name, layer), before in reversed(list(zip(chain[:-1], shapes, strict=False))):
            here = self._through(name, layer, here, slopes, before)
        return here, head

    def _through(
        self, name: str, layer: nn.Module, here: Back, slopes: Mapping[str, Tensor], shape: Shape
    ) -> Back:
        if isinstance(layer, nn.Conv2d):
            return self._convolution(name, layer, here, slopes, shape)
        if isinstance(layer, nn.Linear):
            return _linear(name, layer, here, slopes)
        if isinstance(layer, POOLING):
            return _pooled(name, layer, here, shape)
        if isinstance(layer, PASSED):
            return here.shaped(shape)
        return INVERSES[type(layer)](layer, here)

    def _convolution(
        self, name: str, layer: nn.Conv2d, here: Back, slopes: Mapping[str, Tensor], shape: Shape
    ) -> Back:
        here = here.shaped(_output(layer, shape))
        output = here.values if layer.bias is None else here.values - layer.bias[:, None, None]
        weight = layer.weight.detach()
        space = (_pair(layer.stride), _pair(layer.padding), _pair(layer.dilation))
        size = (shape[0], shape[1], shape[2])
        system = Convolution(
            weight, slopes[f"{name}.weight"], output.detach(), here.slope, here.known, size,
            *space, self.emphasis,
        )  # fmt: skip
        found = solve(system, self.tolerance, self.largest)
        slope = transposed(weight, here.slope, size, *space)
        flags = {f"rank_deficient: layer {name}"} if found.deficient else set()
        flags |= {f"rank_unknown: layer {name}"} if found.rank is None else set()
        return Back(found.inputs, slope, torch.ones(shape).double(), here.flags | flags)


def refusal(network: nn.Module) -> str:
    """Why the network cannot be walked back, or ""."""
    chain = list(layers(network))
    if len(chain) == 1 and not isinstance(network, nn.Sequential):
        return (
            f"recursion walks a chain of layers, and {type(network).__name__} is not a Sequential "
            "one: use 'inverting_gradients'"
        )
    for name, layer in chain:
        why = _refused(layer)
        if why:
            return (
                f"recursion needs layers that can be walked back; layer '{name}' {why}: use "
                "'inverting_gradients', or the model 'cnn6'"
            )
    if not isinstance(chain[-1][1], nn.Linear):
        return f"recursion starts at a last linear layer; '{chain[-1][0]}' is not one"
    weighted = [id(layer) for _, layer in chain if isinstance(layer, WEIGHTED)]
    return "" if len({*weighted}) == len(weighted) else "a layer with weights is used twice"


def _refused(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return "is a convolution in groups, or padded by other than so many zeros"
        return ""
    if isinstance(layer, nn.LeakyReLU) and layer.negative_slope <= 0:
        return "is a LeakyReLU that cannot be inverted"
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
        return "flattens other than one record at a time"
    if isinstance(layer, (nn.Linear, *POOLING, *PASSED)) or type(layer) in INVERSES:
        return ""
    return f"is {type(layer).__name__}"


def _linear(name: str, layer: nn.Linear, here: Back, slopes: Mapping[str, Tensor]) -> Back:
    """From the gradient constraints alone, which are of full rank: dL/dW = slope x^T."""
    slope = here.slope if layer.bias is None else slopes[f"{name}.bias"]
    values = slopes[f"{name}.weight"].T @ slope / slope.square().sum()
    return Back(values, layer.weight.detach().T @ slope, torch.ones_like(values), here.flags)


def _pooled(name: str, layer: nn.Module, here: Back, shape: Shape) -> Back:
    """From the weight constraints alone, as there is no weight gradient: never of full rank
    unless nothing is averaged."""
    pixels = shape[1] * shape[2]
    matrix = layer(torch.eye(pixels).double().view(pixels, 1, *shape[1:])).flatten(1).T
    values = here.values.reshape(shape[0], -1) @ torch.linalg.pinv(matrix).T
    slope = here.slope.reshape(shape[0], -1) @ matrix
    short = int(torch.linalg.matrix_rank(matrix)) < pixels
    flags = here.flags | ({f"rank_deficient: layer {name}"} if short else set())
    return Back(values, slope, torch.ones_like(values), flags).shaped(shape)


def _leaky(layer: nn.Module, here: Back) -> Back:
    assert isinstance(layer, nn.LeakyReLU)
    steep = torch.where(here.values >= 0, 1.0, layer.negative_slope)
    return replace(here, values=here.values / steep, slope=here.slope * steep)


def _relu(layer: nn.Module, here: Back) -> Back:
    """Where it is zero the output before is lost, and no slope passes."""
    alive = (here.values > DEAD * here.values.abs().max()).double()
    return replace(here, values=here.values * alive, slope=here.slope * alive, known=alive)


def _tanh(layer: nn.Module, here: Back) -> Back:
    held, flags = _held(here, -1.0)
    return replace(here, values=held.atanh(), slope=here.slope * (1 - held.square()), flags=flags)


def _sigmoid(layer: nn.Module, here: Back) -> Back:
    held, flags = _held(here, 0.0)
    return replace(here, values=held.logit(), slope=here.slope * held * (1 - held), flags=flags)


def _held(here: Back, low: float) -> tuple[Tensor, frozenset[str]]:
    """Values kept inside (low, 1); a flag where one lay outside, where there is no inverse."""
    held = here.values.clamp(low + EDGE, 1 - EDGE)
    outside = bool((held != here.values).any())
    return held, here.flags | ({"saturated_activation"} if outside else set())


INVERSES: dict[type[nn.Module], Callable[[nn.Module, Back], Back]] = {
    nn.LeakyReLU: _leaky,
    nn.ReLU: _relu,
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
}


def _shapes(chain: list[tuple[str, nn.Module]], shape: Shape) -> list[Shape]:
    """Shape of one record before each layer of the chain."""
    found, here = list[Shape](), torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        for name, layer in chain:
            found.append(tuple(here.shape[1:]))
            try:
                here = layer(here)
            except RuntimeError as error:
                raise AttackError(f"layer '{name}' does not take its input: {error}") from None
    return found


def _output(layer: nn.Conv2d, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])


def _pair(value: object) -> tuple[int, int]:
    assert isinstance(value, tuple)
    return int(value[0]), int(value[1])
