"""SPEAR: whole batches, exactly, from the gradient of a linear layer before a ReLU."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind
from fedmi.attacks.engine.low_rank import Mixture, mixture
from fedmi.attacks.engine.unmixing import Search, Unmixed, unmixed
from fedmi.models.chain import layers

FILLED = -1.0
"""Confidence of a record that is only the batch's mixture."""


class Spear(ClosedForm[str]):
    """All records of a batch, exactly, from a first linear layer with bias and ReLU.

    For z = W x + c, dL/dW = D X with D = dL/dZ [m, b], X [b, n], so it has rank b: by its SVD it is
    L R, D = L Q and X = Q^-1 R for one unknown Q [b, b]. ReLU makes D sparse. So draw b - 1 rows of
    L: if one record is silent in all of them, their null vector is that record's column q of Q, and
    L q has many zeros, where a random one has b - 1. Keep those with zeros in more than
    `threshold` of the live neurons; take the sparsest independent b, then swap while that raises
    lambda, the share of neurons where dL/dz is zero just where z <= 0. dL/db = D 1 gives the
    lengths of the q. Stop when every record has `agreement`.

    Beyond the paper, and each can be turned off: `guided` draws neurons the likelier the lower
    their z is at what other neurons show (dW_i / db_i), since records of one data set are silent
    together; `peel` first takes the records that two neurons show alike, and so for certain, out
    of the gradient, which leaves a smaller batch; and has each guess x, whose neurons
    with z < 0 give its q at once, mend the choice. As the paper has it, it takes about
    2^(b - 1) draws where neurons are silent half of the time, and more where less.

    Of several local steps of SGD the update is D X all the same, with D summed over the steps, but
    zeros are left only where a record was silent in all of them, and z is known at the first model
    alone. So it is no longer exact in general, though it often is while the model has moved little;
    lambda need reach `agreement_steps` only, flag "several_steps". Weight decay, noise and rounding
    count as noise; pixels are exact to the noise over the record's own part of the gradient.

    Threat model: honest-but-curious, sees one update, knows the architecture. Labels None.
    Confidence is lambda in [0, 1]; half of it, or 0, for what is only a guess. Further flags:
    "rank_below_records" (duplicates, dead or saturated records: only what remains is looked for),
    "rank_above_records" (more records than told, or noise), "too_narrow" (fewer than 2 b live
    neurons: nothing is drawn), "samples_exhausted" (not all records reach `agreement`; the others
    are guesses, or the mixture of all with confidence -1), "not_unique" (all reach it, but too few
    zeros tell one record from the others: another answer fits as well), "partial_gradient"
    (neurons that were not seen whole are left out), "zero_gradients_in_read_layer" (that layer has
    no gradient: answered blind). Raises AttackError unless the model starts with Flatten, Linear
    with bias, ReLU.
    """

    kind: Literal["spear"] = "spear"
    paper: ClassVar[str] = (
        "Dimitrov, Baader, Mueller, Vechev: SPEAR - Exact Gradient Inversion of Batches in "
        "Federated Learning, NeurIPS 2024"
    )
    submatrices: int = Field(
        default=200_000, ge=0, le=10**9, description="at most so many draws of b - 1 neurons"
    )
    batch: int = Field(default=2_000, ge=1, le=10**6, description="draws at a time")
    threshold: float = Field(
        default=0.1, ge=0, le=1, description="tau: least share of zeros, in the live neurons"
    )
    agreement: float = Field(
        default=0.995, gt=0, le=1, description="lambda from which a record counts as recovered"
    )
    agreement_steps: float = Field(
        default=0.85, gt=0, le=1, description="the same, for updates of several local steps"
    )
    guided: bool = Field(default=True, description="draw neurons that are likely silent")
    peel: bool = Field(default=True, description="take out records that neurons show alone")

    def readable(self, network: nn.Module) -> str:
        return rectified(network)

    def invert(self, case: Case, evidence: Evidence, source: str) -> Reconstruction:
        seen = _seen(evidence, source)
        slopes = [evidence.gradient[source + part][seen].double() for part in ("weight", "bias")]
        if not slopes[1].any():
            silent = evidence.flags | {"zero_gradients_in_read_layer"}
            return blind(case, replace(evidence, flags=silent))
        weight, bias = (evidence.base[source + part][seen].double() for part in ("weight", "bias"))
        mixed = mixture(weight, bias, (slopes[0], slopes[1]), evidence.records)
        rng = case.seed.child(evidence.target.id, self.kind).torch()
        found = unmixed(mixed, self._search(_several(evidence)), rng)
        filling = slopes[1] @ slopes[0] / slopes[1].square().sum()
        missing = evidence.records - len(found.inputs)
        images = torch.cat([found.inputs, filling.expand(missing, -1)]).clamp(0, 1).float()
        sure = torch.cat([found.matched, found.matched.new_full((missing,), FILLED)])
        return Reconstruction(
            evidence.target,
            images.view(-1, *case.knowledge.input_shape),
            None,
            sure.float(),
            evidence.flags | _flags(evidence, mixed, found, seen),
        )

    def _search(self, several: bool) -> Search:
        return Search(
            submatrices=self.submatrices,
            batch=self.batch,
            threshold=self.threshold,
            share=self.agreement_steps if several else self.agreement,
            peel=self.peel,
            guided=self.guided,
        )


def rectified(module: nn.Module) -> str:
    """Name prefix ("name.") of a first linear layer with bias, before a ReLU.

    Raises AttackError if the model does not start with that.
    """
    chain = [(name, layer) for name, layer in layers(module) if not isinstance(layer, nn.Identity)]
    head = [(name, layer) for name, layer in chain if not isinstance(layer, nn.Flatten)]
    name, first = head[0] if head else ("", module)
    after = head[1][1] if len(head) > 1 else None
    if isinstance(first, nn.Linear) and first.bias is not None and isinstance(after, nn.ReLU):
        return f"{name}."
    what = f"'{name}' is {type(first).__name__}"
    if isinstance(first, nn.Linear):
        follows = type(after).__name__ if after is not None else "nothing"
        what = f"'{name}' has no bias" if first.bias is None else f"'{name}' is before {follows}"
    raise AttackError(
        f"SPEAR needs a model that starts with Linear with bias, then ReLU; layer {what}: use "
        "'linear_inversion' for any first linear layer with bias, else 'inverting_gradients'"
    )


def _seen(evidence: Evidence, name: str) -> Tensor:
    """Neurons whose gradient was seen whole; of pruned or sealed updates few may be left. [m]"""
    support = evidence.support or {}
    weight = support.get(f"{name}weight", torch.ones_like(evidence.gradient[f"{name}weight"]))
    bias = support.get(f"{name}bias", torch.ones_like(evidence.gradient[f"{name}bias"]))
    return weight.bool().all(1) & bias.bool()


def _several(evidence: Evidence) -> bool:
    steps = any(len(steps) > 1 for steps in evidence.plan.parties)
    return steps and not evidence.of_gradient


def _flags(evidence: Evidence, mixed: Mixture, found: Unmixed, seen: Tensor) -> frozenset[str]:
    said = {
        "several_steps": _several(evidence),
        "rank_below_records": mixed.rank < evidence.records,
        "rank_above_records": mixed.rank > evidence.records,
        "too_narrow": mixed.narrow,
        "samples_exhausted": not found.complete,
        "not_unique": not found.unique,
        "partial_gradient": not bool(seen.all()),
    }
    return frozenset(flag for flag, holds in said.items() if holds)
