"""Label counts from an update of several steps: the local training simulated on stand-ins."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.allot import allot
from fedmi.attacks.engine.labels.counts import mean_slope
from fedmi.attacks.engine.labels.layer import Stand, fresh, head, probes
from fedmi.attacks.engine.network import load, simulate
from fedmi.attacks.engine.plan import deal
from fedmi.exposure.recipe import LocalWork

ROUNDS = 6


def several_steps(evidence: Evidence) -> bool:
    """Whether the update is the work of more than one step of a party."""
    return not evidence.of_gradient and max(map(len, evidence.plan.parties)) > 1


def simulated(case: Case, evidence: Evidence, starts: Sequence[Tensor], seen: Stand) -> Tensor:
    """Counts [classes] under which stand-in records leave the last layer where the client left it.

    In n_k = n (mean p_k - b_k), p moves while the client trains. As Dimitrov et al. 2022 (who
    interpolate p between start and end), mean p is taken along the training: here it is simulated
    on `probes` labelled by the present counts, n_k <- n'_k + n (b'_k - b_k), primes simulated, from
    each of `starts`. Of all counts tried, those with the least |b' - b| are the answer.
    """
    assert case.knowledge.build is not None
    work, records = case.knowledge.work or LocalWork(), evidence.records
    network = load(case.knowledge.build, evidence.base, work.recipe.mode)
    inputs, module = _stand_ins(case, evidence), fresh(case)
    target = mean_slope(head(evidence.gradient, module), seen)
    tried: list[tuple[float, Tensor]] = []
    for start in starts:
        counts = start.double()
        for _ in range(ROUNDS):
            labels, whole = _whole(counts, records)
            dealt = deal(labels, evidence.plan)
            with torch.no_grad():
                descent, _ = simulate(network, inputs, dealt, evidence.plan, work)
            slope = mean_slope(head(_as_gradient(evidence, descent, work), module), seen)
            tried.append((float((slope - target).norm()), whole))
            counts = (counts + whole + records * (slope - target)) / 2
    return min(tried, key=lambda one: one[0])[1]


def _whole(counts: Tensor, records: int) -> tuple[Tensor, Tensor]:
    """(labels [records], whole counts [classes]) nearest to these counts."""
    nobody = torch.empty(0, dtype=torch.long)
    labels, _ = allot(counts, nobody, torch.ones_like(counts), records)
    return labels, torch.bincount(labels, minlength=len(counts)).double()


def _stand_ins(case: Case, evidence: Evidence) -> Tensor:
    inputs = probes(case, evidence)
    return inputs.repeat(-(-evidence.records // len(inputs)), 1, 1, 1)[: evidence.records]


def _as_gradient(
    evidence: Evidence, descent: dict[str, Tensor], work: LocalWork
) -> dict[str, Tensor]:
    """A simulated descent read as one mean gradient, by the scale at which the observed one was."""
    decay = work.recipe.weight_decay
    moved = torch.cat([part.flatten() for part in evidence.descent.values()]).norm()
    read = torch.cat(
        [(part + decay * evidence.base[k]).flatten() for k, part in evidence.gradient.items()]
    ).norm()
    return {k: part * (read / moved) - decay * evidence.base[k] for k, part in descent.items()}
