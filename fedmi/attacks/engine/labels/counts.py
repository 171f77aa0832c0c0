"""Label counts of a batch from the model's mean answer (Geng et al. 2021)."""

from collections.abc import Mapping

from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.allot import allot, negative
from fedmi.attacks.engine.labels.layer import Head, Stand, answers, fresh, head, probes


def batch_labels(
    gradient: Mapping[str, Tensor],
    module: nn.Module,
    base: Mapping[str, Tensor],
    probes: Tensor,
    records: int,
) -> tuple[Tensor, Tensor]:
    """(labels [records] in ascending order, confidence [records] in [0, 1]) of a batch.

    The last layer's bias gradient is b_k = mean p_k - n_k / n, so n_k = n (mean p_k - b_k), with
    mean p estimated on `probes` [m, C, H, W] under the model `base`. Without a bias, b_k is the
    weight gradient's row k projected on the mean feature of the probes. Every class with b_k < 0
    holds at least one record. The counts' standard error is that of a mean p of n records which
    vary as the probes do; the more decided its answers to them, the lower the confidence.
    """
    last, seen = head(gradient, module), answers(module, base, probes)
    slope = mean_slope(last, seen)
    counts = records * (seen.posteriors.mean(0) - slope)
    return allot(counts, negative(slope), seen.spread(records), records, seen.doubt)


def mean_slope(last: Head, seen: Stand) -> Tensor:
    """The bias gradient [classes], or the weight's rows along the mean feature of the probes."""
    if last.bias is not None:
        return last.bias
    mean = seen.features.mean(0)
    return last.weight @ mean / mean.square().sum().clamp_min(1e-12)


def bias(case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """`batch_labels` on public inputs where granted, else on smooth noise."""
    seen = probes(case, evidence)
    return batch_labels(evidence.gradient, fresh(case), evidence.base, seen, evidence.records)
