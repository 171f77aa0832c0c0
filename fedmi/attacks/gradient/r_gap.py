"""R-GAP: one record in closed form, from the last layer back to the first."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind
from fedmi.attacks.engine.recursion import Walk, refusal


class RGAP(ClosedForm[None]):
    """One record, solved for layer by layer without any optimisation.

    dL/dlogits and the features come from the last linear layer (from its bias gradient; without
    a bias from the one scale at which softmax explains its weight gradient). Then, for each layer
    back to the first: invert the activation, and solve the linear system of what the layer says
    of its input x: W x = z by its weights, and dL/dW = dL/dz * x by its gradient. Exact to float
    tolerance where every system has full rank. Where one has not, the smallest solution is taken,
    the flag `rank_deficient: layer NAME` says so, and what lies before it is a guess: a layer
    with few maps, average pooling, dead ReLU units. A layer's output that a plain ReLU has set to
    zero is left out of W x = z.

    Threat model: honest-but-curious, sees one update. Chains of Conv2d, Linear, LeakyReLU, ReLU,
    tanh, sigmoid, average pooling and Flatten. Flags: `several_steps` (the update is read as one
    mean gradient), `several_records` (the answer is one mixture, repeated), `not_one_record`,
    `twin_data` (two scales of the image give the same gradient), `scale_not_found` (none does, as
    where float32 rounds the gradient of a sure network away), `saturated_activation`,
    `rank_unknown: layer NAME` (more than `largest` unknowns), and `gradient_mismatch`: the image
    found does not explain the gradient. Confidence: minus that relative mismatch. Raises
    AttackError, naming the layer, for any other model.
    """

    kind: Literal["r_gap"] = "r_gap"
    paper: ClassVar[str] = "Zhu, Blaschko: R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021"
    tolerance: float = Field(
        default=1e-7, gt=0, lt=1, description="relative singular value taken as zero"
    )
    largest: int = Field(
        default=8192, ge=1, description="unknowns a layer up to which its rank is computed"
    )
    emphasis: float = Field(
        default=1.0, gt=0, le=1e12, description="weight of gradient over weight constraints"
    )
    mismatch_above: float = Field(
        default=0.05, gt=0, description="relative gradient error that is flagged"
    )

    def readable(self, network: nn.Module) -> None:
        if why := refusal(network):
            raise AttackError(why)

    def evidence(self, case: Case) -> Sequence[Evidence]:
        return [replace(item, flags=item.flags | _unfit(item)) for item in super().evidence(case)]

    def invert(self, case: Case, evidence: Evidence, source: None) -> Reconstruction:
        flags = evidence.flags
        assert case.knowledge.build is not None
        network = case.knowledge.build().eval()
        network.load_state_dict(dict(evidence.base))
        walk = Walk(self.tolerance, self.largest, self.emphasis)
        here, head = walk.back(network, evidence.gradient, case.knowledge.input_shape)
        flags |= here.flags
        if not bool(torch.isfinite(here.values).all()):
            return blind(case, replace(evidence, flags=flags | {"recursion_diverged"}))
        image = here.values.clamp(0, 1)
        mismatch = _mismatch(network, image, head.label, evidence)
        if not mismatch <= self.mismatch_above:
            flags |= {"gradient_mismatch"}
        count = evidence.records
        return Reconstruction(
            evidence.target,
            image.float()[None].repeat(count, 1, 1, 1),
            torch.full((count,), head.label),
            torch.full((count,), -mismatch),
            flags,
        )


def _unfit(evidence: Evidence) -> frozenset[str]:
    """What of the evidence is not one record's one gradient."""
    steps = max(len(steps) for steps in evidence.plan.parties)
    named = {"several_steps": steps > 1, "several_records": evidence.records > 1}
    return frozenset(name for name, holds in named.items() if holds)


def _mismatch(network: nn.Module, image: Tensor, label: int, evidence: Evidence) -> float:
    """||gradient at the image - gradient seen|| / ||gradient seen||."""
    names, weights = zip(*network.named_parameters(), strict=True)
    loss = cross_entropy(network(image[None]), torch.tensor([label]))
    found = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
    seen = torch.cat([evidence.gradient[name].double().flatten() for name in names])
    return float((found - seen).norm() / seen.norm())
