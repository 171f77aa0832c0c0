"""The ResNets of CIFAR-10: ResNet-20 and its wider and deeper relatives."""

from typing import Literal

from pydantic import Field
from torch import nn

from fedmi.models.base import ModelSpec, Shape
from fedmi.models.convolutional import norm_layer, require_image
from fedmi.models.resnet import BasicBlock

STAGES, FIRST_WIDTH = 3, 16


class ResNet20(ModelSpec):
    """Three stages of `blocks` basic blocks of 16, 32, 64 feature maps times `width_factor`.

    Depth is 6 blocks + 2: 20 with 3 blocks. A 3x3 stem of stride 1, stages of stride 1, 2, 2,
    global average pooling, one linear layer; convolutions have no bias. ResNet20-4 of Geiping et
    al. (Inverting Gradients, NeurIPS 2020) is `width_factor = 4`, with every other default.

    The shortcut is He et al.'s option B: a 1x1 convolution with a norm where the shape changes
    (the first block of stages 2 and 3), the identity elsewhere. Their own networks for CIFAR-10
    pad with zeros there (option A), which saves 2752 of 272474 parameters; Geiping et al. have B.

    `norm = "batch"` is the original, and mixes the records of a batch in train mode; `"group"`
    keeps them apart: up to 32 groups, so one map a group up to 32 maps.
    """

    kind: Literal["resnet20"] = "resnet20"
    norm: Literal["batch", "group"] = Field(
        default="batch", description="normalisation after each convolution"
    )
    width_factor: int = Field(
        default=1, ge=1, le=16, description="feature maps, in multiples of 16, 32 and 64"
    )
    blocks: int = Field(default=3, ge=1, le=18, description="basic blocks a stage")
    init: Literal["he", "default"] = Field(
        default="he", description="convolutions: N(0, 2 / fan out), or PyTorch's"
    )

    paper = "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016"

    def module(self, shape: Shape, classes: int) -> nn.Module:
        require_image(self.kind, shape, 8)
        into = FIRST_WIDTH * self.width_factor
        layers: list[nn.Module] = [
            nn.Conv2d(shape[0], into, 3, padding=1, bias=False),
            norm_layer(self.norm, into, groups=32),
            nn.ReLU(),
        ]
        for stage in range(STAGES):
            out = FIRST_WIDTH * self.width_factor * 2**stage
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(into, out, stride, self.norm))
                into = out
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes)]
        model = nn.Sequential(*layers, *head)
        if self.init == "he":
            _he(model)
        return model


def _he(model: nn.Module) -> None:
    """He et al.'s initial weights (ICCV 2015), by the fan out, of every convolution."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
