"""iDLG: the label of a single record (Zhao, Mopuri, Bilen 2020)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.checks import RecordsDoNotFit
from fedmi.attacks.engine.labels.layer import Head, Stand, fresh, head


def single_label(gradient: Mapping[str, Tensor], module: nn.Module) -> tuple[Tensor, Tensor]:
    """(label [1], margin [1]) of the one record behind a gradient.

    With cross-entropy the last layer's bias gradient is p - onehot(y): the label is its one
    negative entry. Without a bias, row k of the weight gradient is (p_k - [k = y]) h, so the
    label's row is the one that points against the others.
    """
    last = head(gradient, module)
    slope = last.bias
    if slope is None:
        slope = last.weight @ last.weight.sum(0) - last.weight.square().sum(1)
    lowest = slope.topk(2, largest=False)
    return lowest.indices[:1], (lowest.values[1:] - lowest.values[:1])


def idlg(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(label [1], margin [1]); `RecordsDoNotFit` for an update of several records."""
    if evidence.records != 1:
        raise RecordsDoNotFit(
            f"target '{evidence.target.id}': iDLG recovers the label of one record, this "
            f"update holds {evidence.records}; use the attack 'bias_labels' or 'irlg'"
        )
    return single_label(evidence.gradient, fresh(case))


def rank_one(last: Head, seen: Stand) -> tuple[Tensor, Tensor]:
    """(label [1], confidence [1]) of one record, from all of the last layer's gradient.

    That of one step is (p - onehot(y)) (h, 1): the label is the least entry of the leading left
    singular vector, turned so that its right one goes along the model's mean features. Unlike the
    bias alone it outlasts the rounding of a small update. Confidence is the share of the gradient
    that the leading singular value explains: 1 for one step on one record.
    """
    whole, along = last.weight.double(), seen.features.mean(0).double()
    if last.bias is not None:
        whole = torch.cat([whole, last.bias.double()[:, None]], 1)
        along = torch.cat([along, torch.ones(1).double()])
    energies, vectors = torch.linalg.eigh(whole @ whole.T)
    leading = vectors[:, -1]
    leading = leading * torch.where((leading @ whole) @ along < 0, -1.0, 1.0)
    share = energies[-1] / energies.clamp_min(0).sum().clamp_min(1e-300)
    return leading.argmin()[None], share.float()[None]
