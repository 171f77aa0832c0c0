"""CNN6, the network on which R-GAP was shown."""

from typing import Literal

from pydantic import Field
from torch import nn

from fedmi.models.base import ModelSpec, Shape
from fedmi.models.convolutional import require_image


class CNN6(ModelSpec):
    """Six convolutions without bias, LeakyReLU after each, then one linear layer.

    Kernel 4 with padding 2 and stride 2, then five of kernel 3 with padding 1 and strides 2, 1,
    1, 2, 1; 12, 36, 36, 36, 64 and 128 feature maps. `second = 20` is the paper's CNN6-d, made
    narrower where the system that R-GAP solves for the input of the second layer has fewest rows
    to spare. `bias = "last"` is the variant with a bias in the linear layer.
    """

    kind: Literal["cnn6"] = "cnn6"
    negative_slope: float = Field(default=0.2, gt=0, le=1, description="LeakyReLU below zero")
    bias: Literal["none", "last", "all"] = Field(
        default="none", description="which layers have a bias: none, the linear one, or all"
    )
    second: int = Field(default=36, ge=1, le=512, description="maps of the second convolution")

    paper = "Zhu, Blaschko: R-GAP: Recursive Gradient Attack on Privacy. ICLR 2021"

    def module(self, shape: Shape, classes: int) -> nn.Module:
        require_image(self.kind, shape, 8)
        into, height, width = shape
        layers: list[nn.Module] = []
        maps = (12, self.second, 36, 36, 64, 128)
        for at, (out, stride) in enumerate(zip(maps, (2, 2, 1, 1, 2, 1), strict=True)):
            kernel, padding = (3, 1) if at else (4, 2)
            layers += [
                nn.Conv2d(into, out, kernel, stride, padding, bias=self.bias == "all"),
                nn.LeakyReLU(self.negative_slope),
            ]
            into = out
            height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        last = nn.Linear(into * height * width, classes, bias=self.bias != "none")
        return nn.Sequential(*layers, nn.Flatten(), last)
