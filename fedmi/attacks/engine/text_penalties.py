"""What searches for sentences minimise beside, or as, the distance of updates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.embedded import PLACES
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.network import Network
from fedmi.attacks.engine.penalties import Given, Trial


@dataclass(frozen=True)
class PlaceRows:
    """How the rows of the positions' gradient differ from their mean, place by place.

    While attention is spread evenly, all places have nearly the same slope; what is its own is what
    the layer normalisation takes off along the token, a part in `dim`, and lost in distances of
    whole gradients. 1 - the cosine of found and wanted, of rows less the mean row, each over the
    length of the wanted one; place 0 ([CLS]) and places that no sentence reaches are left out. A
    cosine, as a model's slopes differ by orders of magnitude with how sure it is of the sentence.
    """

    weight: float
    simulated: bool
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        rows = (evidence.descent if self.simulated else evidence.gradient)[PLACES].float()
        rows = rows[: evidence.input_shape[2]]
        used = (rows.norm(dim=1) > 0).to(rows)
        used[0] = 0.0
        seen = (evidence.support or {}).get(PLACES)
        if seen is not None and not seen.all():
            used = torch.zeros_like(used)  # rows with gaps have no mean
        own = _own(rows, used)
        lengths = own.square().sum(1)
        used = used * (lengths > 0)
        return {"rows": own, "used": used, "lengths": lengths.clamp_min(1e-30)}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        found = _own(trial.update[PLACES][: len(given["used"])], given["used"])
        share = (given["used"] / given["lengths"]).sqrt()[:, None]
        found, wanted = found * share, given["rows"] * share
        units = [part / part.square().sum().clamp_min(1e-30).sqrt() for part in (found, wanted)]
        return (units[0] - units[1]).square().sum() / 2


def _own(rows: Tensor, used: Tensor) -> Tensor:
    """Rows less the mean of those used; zero for the others."""
    mean = (rows * used[:, None]).sum(0) / used.sum().clamp_min(1)
    return (rows - mean) * used[:, None]


@dataclass(frozen=True)
class LayerAbsolute:
    """sum over tensors l of w_l |found_l - wanted_l|_1 (Deng et al., 2021, eq. 3).

    w_l falls in equal steps from 1 for the first tensor to 0 behind the last where `falling`.
    simulated: what is matched is the change of the parameters, not one gradient.
    """

    weight: float
    falling: bool
    simulated: bool
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        wanted = evidence.descent if self.simulated else evidence.gradient
        support = evidence.support or {}
        seen: Given = {}
        for name in network.parameters:
            seen[name] = wanted[name].float()
            seen[f"{name}/seen"] = support.get(name, torch.ones_like(wanted[name])).float()
        return seen

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        names = [*network.parameters]
        gaps = [
            weight * ((trial.update[name] - given[name]) * given[f"{name}/seen"]).abs().sum()
            for name, weight in zip(names, self._weights(names), strict=True)
        ]
        return torch.stack(gaps).sum()

    def _weights(self, names: Sequence[str]) -> list[float]:
        every = len(names)
        return [1 - row / every if self.falling else 1.0 for row in range(every)]


@dataclass(frozen=True)
class VectorLength:
    """(mean |x| / mean |e| - 1)^2 over the vectors x of tokens, and those e of the vocabulary
    (Balunovic et al., 2022, eq. 5, whose lengths are BERT's)."""

    weight: float
    typical: float
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        return {}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        vectors, there = trial.inputs[..., :-1], trial.inputs[..., -1]
        squares = vectors.square().sum(-1).clamp_min(1e-12)
        mean = (squares.sqrt() * there).sum() / there.sum()
        return (mean / self.typical - 1).square()
