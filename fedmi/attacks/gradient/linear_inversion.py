"""Analytic inversion of a first linear layer with bias."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.adaptive import adapted
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind

EXACT = 1 - 1e-6
"""Correlation from which two neurons show the very same record."""
FEWEST_COMMON = 8
"""Pixels that two neurons must share to be compared."""


@dataclass(frozen=True)
class _Seen:
    """The first layer's gradient, zero where it was not seen.

    weight: [neurons, pixels]; bias: [neurons]; seen: of the weight, with the bias of its neuron.
    """

    weight: Tensor
    bias: Tensor
    seen: Tensor

    def common(self, neurons: Tensor) -> Tensor:
        """Least squares quotient of these neurons (boolean), pixel by pixel over those that show
        it; 0 where none does. [pixels]"""
        bias = self.bias * neurons
        strength = bias.square() @ self.seen.double()
        return bias @ self.weight / strength.clamp_min(1e-300)


class LinearInversion(ClosedForm[str]):
    """The input of a first linear layer, as the quotient of its weight and its bias gradient.

    For y = W x + b, dL/dW_i = (dL/db_i) x: every neuron's quotient dW_i / db_i is the record
    itself if one record passed, and a mixture of the records that reach neuron i if several did;
    a ReLU neuron that fires for one record alone gives that record exactly. One record: the least
    squares quotient of all neurons. Several: quotients inside the pixel range [0, 1], most often
    repeated first, then by |db_i|, without near copies. Local SGD updates work as gradients do,
    since the same quotient holds for sums over steps.

    Behind a known gradient pruning (`adaptive`) only entries that were seen count: a pixel comes
    from the neurons whose weight entry was kept, a neuron whose bias entry was pruned is left out,
    and what one neuron misses of a record is filled in from the others that show the same one. A
    pixel that no neuron shows is black, as small products are what pruning takes.

    Threat model: honest-but-curious, sees one update. Raises AttackError if the first layer with
    parameters is not linear with bias.
    """

    kind: Literal["linear_inversion"] = "linear_inversion"
    paper: ClassVar[str] = (
        "Phong et al.: Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, "
        "TIFS 2018; Geiping et al., NeurIPS 2020, proposition 3.1"
    )
    box_slack: float = Field(
        default=0.05, ge=0, le=1, description="how far outside [0, 1] a plausible pixel may lie"
    )
    same_above: float = Field(
        default=0.95, gt=0, le=1, description="correlation from which two candidates are one record"
    )

    adaptive: bool = Field(
        default=True, description="leave out entries that a known pruning has set to zero"
    )

    def readable(self, network: nn.Module) -> str:
        return first_linear(network)

    def invert(self, case: Case, evidence: Evidence, source: str) -> Reconstruction:
        if self.adaptive:
            evidence = adapted(case, evidence)
        layer = _seen(evidence, source)
        bias = layer.bias
        if not bias.any():
            return blind(
                case, replace(evidence, flags=evidence.flags | {"zero_gradients_in_read_layer"})
            )
        mixture = layer.common(torch.ones_like(bias).bool())[None]
        if evidence.records == 1:
            found, score = mixture, bias.abs().max()[None]
        else:
            found, score = self._candidates(layer, evidence.records)
            missing = evidence.records - len(found)
            found = torch.cat([found, mixture.expand(missing, -1)])
            score = torch.cat([score, score.new_full((missing,), -1.0)])
        images = found.clamp(0, 1).float().view(-1, *case.knowledge.input_shape)
        return Reconstruction(evidence.target, images, None, score.float(), evidence.flags)

    def _candidates(self, layer: _Seen, records: int) -> tuple[Tensor, Tensor]:
        """(at most `records` distinct quotients [m, pixels], score [m]), best first."""
        strength = layer.bias.abs() / layer.bias.abs().max()
        rows = torch.nonzero(strength > 1e-6).flatten()
        layer = _Seen(layer.weight[rows], layer.bias[rows], layer.seen[rows])
        quotients = layer.weight / layer.bias[:, None]
        plausible = 1 - excess(quotients, self.box_slack, layer.seen)
        alike = correlation(quotients, layer.seen)
        copies = alike > EXACT
        score = plausible * 100 + (copies.sum(1).clamp_max(10) - 1) + strength[rows]
        picked: list[int] = []
        for index in score.argsort(descending=True).tolist():
            if len(picked) == records:
                break
            if not picked or alike[index, picked].max() < self.same_above:
                picked.append(index)
        whole = [torch.where(layer.seen[k], quotients[k], layer.common(copies[k])) for k in picked]
        return torch.stack(whole), score[picked]


def _seen(evidence: Evidence, name: str) -> _Seen:
    weight, bias = (evidence.gradient[f"{name}{part}"].double() for part in ("weight", "bias"))
    support = evidence.support or {}
    seen = support.get(f"{name}weight", torch.ones_like(weight)).bool()
    shown = support.get(f"{name}bias", torch.ones_like(bias)).bool()
    return _Seen(weight * seen, bias * shown, seen & shown[:, None])


def excess(quotients: Tensor, slack: float, seen: Tensor) -> Tensor:
    """Share of the pixels seen that lie outside [-slack, 1 + slack]; [m, pixels] -> [m]."""
    outside = ((quotients < -slack) | (quotients > 1 + slack)) & seen
    return outside.double().sum(1) / seen.double().sum(1).clamp_min(1)


def correlation(quotients: Tensor, seen: Tensor) -> Tensor:
    """Pearson's, of each two rows over the pixels seen in both; 0 for too few. [m, p] -> [m, m]."""
    shown = seen.double()
    both = (shown @ shown.T).clamp_min(1)
    means = (quotients * shown).sum(1) / shown.sum(1).clamp_min(1)
    # centred beforehand, for the sake of the differences of products below
    values = (quotients - means[:, None]) * shown
    sums, squares = values @ shown.T, values.square() @ shown.T
    spread = (squares - sums.square() / both).clamp_min(0)
    covariance = values @ values.T - sums * sums.T / both
    found = covariance / (spread * spread.T).sqrt().clamp_min(1e-12)
    return torch.where(both >= FEWEST_COMMON, found, 0.0)


def first_linear(module: nn.Module) -> str:
    """Name prefix ("" or "name.") of the first layer with parameters.

    Raises AttackError if that layer is not nn.Linear with a bias.
    """
    for name, layer in module.named_modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            return f"{name}." if name else ""
        what = "has no bias" if isinstance(layer, nn.Linear) else f"is {type(layer).__name__}"
        raise AttackError(
            f"linear inversion needs a first layer that is Linear with bias; "
            f"layer '{name}' {what}: use 'inverting_gradients', or a softmax or mlp model"
        )
    raise AttackError("linear inversion needs a first linear layer; the model has no parameters")
