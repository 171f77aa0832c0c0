"""What the aggregators together can compute about one client."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.words import Channel, Position
from fedmi.protections.smpc_aggregation.fixed_point import FixedPoint, InconsistentSumError
from fedmi.protections.smpc_aggregation.sharing import Ring, added, expanded

SHARE, SEED = "share", "seed"


def opened(
    seen: Observation, told: Sequence[Confided], coder: FixedPoint, aggregators: int
) -> Opened | None:
    """The update whose share aggregator 0 saw, if all others tell theirs of it; else None."""
    if seen.position != Position.COMPUTE_PARTY or seen.channel != Channel.SHARE:
        return None
    parts = {0: seen.payload} | {
        item.client: item.tensors
        for item in told
        if item.position == Position.COMPUTE_PARTY
        and (item.round, item.about) == (seen.round, seen.clients)
    }
    if set(parts) != set(range(aggregators)):
        return None
    shares = [_expanded(part, coder.elements) for part in parts.values()]
    try:
        weight, update = coder.decode(added(shares, coder.elements), 1)
    except InconsistentSumError:  # not the shares of one vector
        return None
    return Opened({name: tensor.float() for name, tensor in update.items()}) if weight else None


def _expanded(part: Mapping[str, Tensor], elements: int) -> Ring:
    if SEED in part:
        return expanded(part[SEED].numpy().tobytes(), elements)
    return torch.as_tensor(part[SHARE]).numpy().view(np.uint64)
