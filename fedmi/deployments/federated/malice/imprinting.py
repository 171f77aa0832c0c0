"""What both imprint attacks plant: where the bins lie, and what makes them answer."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.deployments.federated.malice.base import Malice, Occasion
from fedmi.models.base import ModelSpec
from fedmi.models.imprint import BLOCK, Activation, ImprintedModel

CALIBRATED = 64
"""Public records that the columns are fitted to."""
NARROWEST = 0.1
"""No bin is narrower than so much of their mean width, however alike public records are."""
BEYOND = 1e-6
"""How far the outermost edges lie beyond any brightness."""


@dataclass(frozen=True)
class Planted:
    """What the first layer is to measure and the second to answer.

    slopes, offsets: [bins]; unit i is reached by slopes[i] brightness + offsets[i]. columns: [d,
    bins] of the second layer. shift: [d], its bias.
    """

    slopes: Tensor
    offsets: Tensor
    columns: Tensor
    shift: Tensor


class Imprinting(Malice):
    """Robbing the Fed's block in front of the model, with bins at quantiles of public brightness.

    No component: `kind` has no default.
    """

    kind: str
    reads_public = True
    keeps: Literal["all", "unaltered", "nothing"] = "unaltered"

    bins: int = Field(
        default=256, ge=2, le=65536, description="units of the imprint layer, a quantile each"
    )
    activation: Activation = Field(
        default="relu",
        description="relu: a unit answers to all records above its bin; hard: to those in it "
        "alone, which survives several local steps",
    )
    gain: float = Field(
        default=1.0, gt=0, le=1e6, description="slope of a ReLU unit in the brightness"
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="typical slope of a record's loss in the weights it reaches, over the record: "
        "larger ones survive quantisation, smaller ones leave bins in place, and training stable, "
        "over local steps; none = 1 for one local step, 0.01 for several",
    )

    def architecture(self, model: ModelSpec) -> ModelSpec:
        return ImprintedModel(
            kind=f"{model.kind} behind an imprint block",
            model=model,
            bins=self.bins,
            activation=self.activation,
            groups=self.copies,
        )

    @property
    def copies(self) -> int:
        """Copies of a record's channels that the block makes; 0 = it takes the record itself."""
        return 0

    @property
    def factor(self) -> float:
        """What the first layer sees of a record is so much larger."""
        return 1.0

    def planted(self, model: Mapping[str, Tensor], occasion: Occasion) -> Planted:
        """ValueError if there is no public record to measure."""
        if not len(occasion.public):
            raise ValueError("there are no public records to place the bins by")
        edges = quantiles(torch.from_numpy(occasion.public.inputs), self.bins)
        widths = edges.diff()
        hard = self.activation == "hard"
        slopes = 1 / widths if hard else torch.full_like(widths, self.gain)
        # Columns of alternating sign: what neighbouring units add to the record nearly cancels.
        signs = 1 - 2 * (torch.arange(self.bins) % 2).double()
        strength = self.strength or (1.0 if occasion.one_step else 0.01)
        column = strength / self.factor * answer(model, occasion)
        hidden = _hidden(slopes, -slopes * edges[:-1], occasion, self.activation)
        return Planted(
            slopes=slopes,
            offsets=-slopes * edges[:-1],
            columns=column[:, None] * signs,
            shift=-column * float((hidden @ signs).mean()),
        )


def quantiles(records: Tensor, bins: int) -> Tensor:
    """[n, C, H, W] -> [bins + 1] strictly ascending edges, as many records between any two.

    The outermost lie beyond any brightness of values in [0, 1].
    """
    brightness = records.double().flatten(1).mean(1)
    levels = torch.arange(1, bins, dtype=torch.float64) / bins
    inner = torch.from_numpy(np.quantile(brightness.numpy(), levels.numpy()))
    least = max(BEYOND, NARROWEST * float(inner[-1] - inner[0]) / bins)
    ramp = least * torch.arange(bins - 1)
    # Ties are pulled apart, and no edge is left on a value that records have.
    inner = (inner - ramp).cummax(0).values + ramp - least / 2
    low, high = min(0.0, float(inner[0])) - BEYOND, max(1.0, float(inner[-1])) + BEYOND
    ends = torch.tensor([low, high], dtype=torch.float64)
    return torch.cat([ends[:1], inner, ends[1:]])


def answer(model: Mapping[str, Tensor], occasion: Occasion) -> Tensor:
    """[d]: a direction in the record along which the loss of any record has a slope of about 1.

    The least one c with g_y . c = +1 or -1 for every label y, of alternating sign, where g_y is
    the mean slope of the loss over public records were y their label. (The slopes of all labels
    nearly add up to nothing, so that they cannot all have the same sign.)
    """
    network = deepcopy(occasion.network).to_empty(device="cpu")
    network.load_state_dict(dict(model))
    network.eval()
    assert isinstance(network.model, nn.Module)
    count = min(CALIBRATED, len(occasion.public))
    rows = occasion.seed.child("calibration").numpy().permutation(len(occasion.public))[:count]
    inputs = torch.from_numpy(occasion.public.inputs[np.sort(rows)]).requires_grad_()
    logits = network.model(inputs)
    slopes = torch.stack(
        [
            torch.autograd.grad(
                cross_entropy(logits, torch.full((count,), label), reduction="sum"),
                inputs,
                retain_graph=True,
            )[0].double()
            for label in range(occasion.classes)
        ]
    ).flatten(2)
    wanted = 1 - 2 * (torch.arange(occasion.classes) % 2).double()
    direction: Tensor = torch.linalg.pinv(slopes.mean(1), rtol=1e-3) @ wanted
    typical = (slopes @ direction).abs().median()
    found: Tensor = direction / typical.clamp_min(1e-12)
    return found


def _hidden(
    slopes: Tensor, offsets: Tensor, occasion: Occasion, activation: Literal["relu", "hard"]
) -> Tensor:
    """What the units answer to public records: [n, bins]."""
    brightness = torch.from_numpy(occasion.public.inputs).double().flatten(1).mean(1)
    reached = brightness[:, None] * slopes + offsets
    return reached.clamp(0, 1) if activation == "hard" else reached.clamp_min(0)


def block(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The block's tensors by their names in the state dict, in single precision."""
    return {f"{BLOCK}{name}": part.float() for name, part in parts.items()}
