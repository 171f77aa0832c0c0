"""How an image gets unchanged through convolutions to the first fully connected layer."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from fedmi.models.base import Shape
from fedmi.models.chain import layers

TRANSPARENT = (nn.Identity, nn.ReLU, nn.LeakyReLU)
"""Layers that leave numbers in [0, 1] as they are."""
Tap = tuple[int, int, int]


@dataclass(frozen=True)
class Passage:
    """convolutions: (name, input channel, row and column of the single 1 in the kernel of output
    channel 0, 1, ...); the other output channels are 0. weight, bias: names of the parameters of
    the fully connected layer. sources: pixel that each of its inputs is, or -1 for none, [inputs].
    """

    convolutions: tuple[tuple[str, tuple[Tap, ...]], ...]
    weight: str
    bias: str
    sources: Tensor


def passage(network: nn.Module, shape: Shape | None = None) -> Passage:
    """The way of an image [C, H, W] through a chain of layers.

    Without `shape`, it is worked out up to sizes. ValueError, naming the layer, if there is none.
    """
    chain = list(layers(network))
    convolutions: list[tuple[str, tuple[Tap, ...]]] = []
    at = _image(chain, shape)
    for number, (name, layer) in enumerate(chain):
        if isinstance(layer, nn.Linear):
            _check_linear(name, layer, chain[number + 1 :])
            sources = torch.full((layer.in_features,), -1)
            flat = at.flatten()
            sources[: len(flat)] = flat[: layer.in_features]
            return Passage(tuple(convolutions), f"{name}.weight", f"{name}.bias", sources)
        if isinstance(layer, nn.Conv2d):
            taps, at = _through(name, layer, at)
            convolutions.append((name, taps))
        elif not isinstance(layer, (*TRANSPARENT, nn.Flatten)) and not _window_of_one(layer):
            raise ValueError(
                f"the image does not pass '{name}', a {type(layer).__name__}: trap weights need a "
                "chain of convolutions and ReLUs before the first fully connected layer"
            )
    raise ValueError("the network has no fully connected layer for trap weights")


def _image(chain: list[tuple[str, nn.Module]], shape: Shape | None) -> Tensor:
    """The number of each pixel, [C, H, W]; of a stand-in where the shape is not told."""
    if shape is None:
        first = next((m for _, m in chain if isinstance(m, nn.Conv2d | nn.Linear)), None)
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 1
        shape = (channels, 32, 32)
    return torch.arange(shape[0] * shape[1] * shape[2]).view(shape)


def _check_linear(name: str, layer: nn.Linear, after: list[tuple[str, nn.Module]]) -> None:
    if layer.bias is None:
        raise ValueError(f"trap weights need a bias: layer '{name}' has none")
    follower = next((m for _, m in after if not isinstance(m, nn.Identity)), None)
    if not isinstance(follower, nn.ReLU):
        what = "nothing" if follower is None else f"a {type(follower).__name__}"
        raise ValueError(
            f"trap weights need a ReLU behind the first fully connected layer; behind '{name}' is "
            f"{what}"
        )


def _window_of_one(layer: nn.Module) -> bool:
    pools = (nn.AvgPool2d, nn.MaxPool2d)
    return isinstance(layer, pools) and layer.kernel_size in (1, (1, 1))


def _through(name: str, layer: nn.Conv2d, at: Tensor) -> tuple[tuple[Tap, ...], Tensor]:
    """(the 1 in each kernel, what the outputs [C', H', W'] then are); ValueError if pixels stay
    behind."""
    (down, right), padding = layer.stride, layer.padding
    if isinstance(padding, str) or layer.dilation != (1, 1) or layer.groups != 1:
        raise ValueError(f"'{name}' has groups, dilation or padding = 'same': no kernel of one tap")
    carried = int((at >= 0).flatten(1).any(1).sum())
    taps = tuple(
        (channel, padding[0] + row, padding[1] + column)
        for channel, row, column in product(range(carried), range(down), range(right))
    )
    if len(taps) > layer.out_channels:
        raise ValueError(
            f"'{name}' has {layer.out_channels} output channels; {len(taps)} are needed to pass "
            f"{carried} on at stride {down} x {right}"
        )
    height, width = _fits(name, layer, at)
    wide = torch.full((carried, height * down, width * right), -1)
    wide[:, : at.shape[1], : at.shape[2]] = at[:carried]
    outputs = torch.full((layer.out_channels, height, width), -1)
    for out, (channel, row, column) in enumerate(taps):
        outputs[out] = wide[channel, row - padding[0] :: down, column - padding[1] :: right]
    return taps, outputs


def _fits(name: str, layer: nn.Conv2d, at: Tensor) -> tuple[int, int]:
    """Height and width of the outputs; ValueError if the kernels do not reach every pixel."""
    sizes: list[int] = []
    for axis in (0, 1):
        kernel, stride, pad = layer.kernel_size[axis], layer.stride[axis], int(layer.padding[axis])
        sizes.append((at.shape[1 + axis] + 2 * pad - kernel) // stride + 1)
        if kernel - pad < stride or sizes[axis] * stride < at.shape[1 + axis]:
            raise ValueError(
                f"'{name}' leaves pixels out: kernel {kernel}, stride {stride} and padding {pad} "
                f"do not reach all of {at.shape[1 + axis]}"
            )
    return sizes[0], sizes[1]
