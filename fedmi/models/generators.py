"""Networks from latent vectors z ~ N(0, I) to images; nn.Modules and nothing else."""

import torch
from torch import Tensor, nn

from fedmi.models.base import Shape


class ResidualGenerator(nn.Module):
    """sigmoid(mean + z basis + r(z)): a linear model of the logits, and a convolutional rest.

    r: a linear layer to `width` maps of a quarter of the side, two 3x3 convolutions with GELU and
    a doubling between them, and a pixel shuffle; its last layer starts as zero, so that untrained
    it is the linear model. A side that 4 does not divide is cropped. No layer looks at more than
    one record, and all of it can be batched by vmap.

    mean: [C H W]; basis: [latent, C H W]; both are buffers, the weights of r are the parameters.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, shape: Shape, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self._shape = shape
        colours, height, side = shape
        high, wide = -(-height // 4), -(-side // 4)
        last = nn.Conv2d(4 * width, 4 * colours, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.rest = nn.Sequential(
            nn.Linear(len(basis), width * high * wide),
            nn.Unflatten(1, (width, high, wide)),
            nn.GELU(),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.GELU(),
            nn.Upsample(scale_factor=2),
            last,
            nn.PixelShuffle(2),
        )

    @property
    def latent(self) -> int:
        """The length of z."""
        return len(self.basis)

    def forward(self, latent: Tensor) -> Tensor:
        """[n, latent] -> [n, C, H, W] in [0, 1]."""
        colours, height, width = self._shape
        linear = (self.mean + latent @ self.basis).view(-1, colours, height, width)
        rest: Tensor = self.rest(latent)[..., :height, :width]
        return torch.sigmoid(linear + rest)
