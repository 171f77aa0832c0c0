"""What an imprint block has kept of each record: rows of a gradient, bin by bin."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.models.imprint import BLOCK, Imprinted

FAINT = 1e-6
"""Of the largest; what a bin holds below it is rounding."""
NOISY = -0.1
"""Confidence below which what a bin holds is mostly noise."""
TIED = 2e-3
"""Confidences that differ by less are as good as each other."""
ROUNDING = 2.0**-23
"""Of a number, what is lost where an update is added to it and taken off again."""
SAME = 1e-2
"""Root mean square distance up to which two bins hold the same record."""


@dataclass(frozen=True)
class Found:
    """What some bins hold. samples: [m, C, H, W]; mass: [m], sum of the records' gradients; low,
    high: [m], the brightness of the bins' edges. floor: [m], what the mass is by rounding alone."""

    samples: Tensor
    mass: Tensor
    low: Tensor
    high: Tensor
    floor: Tensor

    def rescaled(self) -> "Found":
        """Made as bright as their bins are. A record alone in its bin is so already, up to the
        rounding of the bias."""
        bright = self.samples.flatten(1).mean(1)
        fitting = bright.clamp(self.low, self.high)
        factor = torch.where(bright > 0, fitting / bright.clamp_min(1e-12), 1.0)
        return replace(self, samples=self.samples * factor[:, None, None, None])

    def confidence(self) -> Tensor:
        """[m], at most 0: minus how far values lie outside [0, 1], and the brightness off the bin.

        0 for a record alone in its bin and for a mean of records.
        """
        samples = self.samples.flatten(1)
        outside = (samples - samples.clamp(0, 1)).square().mean(1).sqrt()
        bright = samples.mean(1)
        return -(outside + (bright - bright.clamp(self.low, self.high)).abs())

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """(samples [at most count, C, H, W], confidence), surest first; copies come last.

        Of equally sure ones those first that weigh more.
        """
        mass, score = self.mass.abs(), self.confidence()
        held = torch.nonzero(mass > (FAINT * mass.max()).clamp_min(self.floor)).flatten()
        held = held[mass[held].argsort(descending=True, stable=True)]
        rank = (score[held] / TIED).round()
        order = held[rank.argsort(descending=True, stable=True)].tolist()
        flat = self.samples.flatten(1)
        picked: list[int] = []
        for index in order:
            if len(picked) == count:
                break
            near = (flat[picked] - flat[index]).square().mean(1).sqrt()
            if not len(near) or float(near.min()) > SAME:
                picked.append(index)
        picked += [index for index in order if index not in picked][: count - len(picked)]
        return self.samples[picked], score[picked]


def block_of(case: Case) -> Imprinted:
    """The architecture that clients trained; AttackError if no imprint block is in it."""
    assert case.knowledge.build is not None
    network = case.knowledge.build()
    if not isinstance(network, Imprinted):
        raise AttackError(
            "nothing is planted: clients trained a model without an imprint block, as they do "
            "where they pin the architecture"
        )
    return network


def planted(case: Case, evidence: Evidence, client: int) -> dict[str, Tensor]:
    """The block that a client of the target was sent, by name in it; AttackError if honest."""
    sent = case.transcript.model_sent(evidence.round, client)
    if sent is case.transcript.global_model(evidence.round):
        raise AttackError(
            f"target '{evidence.target.id}': in round {evidence.round} the server sent client "
            f"{client} the honest model; name the rounds of the deployment's malice in `rounds`"
        )
    return {n.removeprefix(BLOCK): t.double() for n, t in sent.items() if n.startswith(BLOCK)}


def bins(
    case: Case, network: nn.Module, evidence: Evidence, block: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(weight gradient [bins, inputs], bias gradient [bins]) of the records in each bin alone.

    Units of the same sign have the same gradient at a record, so ReLU units, which answer to all
    bins above too, are told apart by differences. `hard` ones answer to their own bin alone.
    """
    assert isinstance(network, Imprinted)
    columns = block["second.weight"]
    signs = columns.T @ columns[:, 0] / columns[:, 0].square().sum().clamp_min(1e-300)
    weight = signs[:, None] * _slope(case, evidence, block, "first.weight")
    bias = signs * _slope(case, evidence, block, "first.bias")
    if isinstance(network.imprint.activation, nn.ReLU):
        weight = weight - torch.cat([weight[1:], torch.zeros_like(weight[:1])])
        bias = bias - torch.cat([bias[1:], torch.zeros_like(bias[:1])])
    return weight, bias


def rounding(case: Case, evidence: Evidence, planted: Tensor) -> Tensor:
    """[bins]: what a gradient that is nothing seems to be at parameters that were planted so.

    Without weight decay such a parameter does not move at all.
    """
    work = case.knowledge.work
    if evidence.of_gradient or work is None or not work.recipe.weight_decay:
        return torch.zeros_like(planted)
    return ROUNDING * planted.abs() / work.recipe.learning_rate


def edges(reach: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) [bins]: where units of so much slope in the brightness begin, and the next do."""
    low = -offset / reach
    return low, torch.cat([low[1:], torch.full_like(low[:1], 1.0)]).clamp_min(low)


def answered(
    case: Case, evidence: Evidence, parts: list[tuple[Found, int]], flags: frozenset[str]
) -> Reconstruction:
    """The best of each part, so many; what is missing is a guess at any record.

    Flags: "fewer_bins_than_records" if something is missing, "several_local_steps", and
    "noisy_bins" if most bins hold nothing like a record: noise or rounding is above the signal.
    """
    samples, confidence = [], []
    for found, count in parts:
        best, score = found.best(count)
        missing = count - len(best)
        samples += [best.float(), guess(case).expand(missing, *best.shape[1:])]
        confidence += [score.float(), torch.full((missing,), -torch.inf)]
        flags |= {"fewer_bins_than_records"} if missing else set()
    steps = max(len(party) for party in evidence.plan.parties)
    flags |= {"several_local_steps"} if steps > 1 else set()
    sure = torch.cat(confidence)
    held = sure[sure.isfinite()]
    flags |= {"noisy_bins"} if 2 * int((held < NOISY).sum()) > len(held) else set()
    order = sure.argsort(descending=True, stable=True)
    return Reconstruction(
        target=evidence.target,
        samples=torch.cat(samples)[order].clamp(0, 1),
        labels=None,
        confidence=sure[order],
        flags=evidence.flags | flags,
    )


def guess(case: Case) -> Tensor:
    """[1, C, H, W]: the best single guess, by public records where they are granted.

    Far from all records, as grey is from digits on black, it would be matched with the record that
    is least so, in place of the record's own exact reconstruction.
    """
    public, schema = case.knowledge.public, case.knowledge.schema
    typical = None if public is None else schema.typical(public[0])
    return schema.missing((1, *case.knowledge.input_shape)) if typical is None else typical


def _slope(case: Case, evidence: Evidence, block: Mapping[str, Tensor], name: str) -> Tensor:
    """The gradient at what the client was sent: its weight decay is not that of the honest one."""
    found = evidence.gradient[f"{BLOCK}{name}"].double()
    work = case.knowledge.work
    if evidence.of_gradient or work is None:
        return found
    honest = evidence.base[f"{BLOCK}{name}"].double()
    return found + work.recipe.weight_decay * (honest - block[name])
