"""The one record whose gradient a malicious server fished out of a large batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import MUTE, AttackError, Evidence
from fedmi.attacks.engine.inversion import Inversion
from fedmi.attacks.engine.labels import last_linear
from fedmi.attacks.engine.plan import one_step
from fedmi.attacks.engine.planted import UNALTERED, planted
from fedmi.exposure.words import Channel, Fact, Position

NOTHING = "zero_gradients"
ALONE = 0.1
"""Relative error up to which one record explains how strongly the target class is pulled."""
FAINT = 1e-7
"""Share of a record from which something was fished."""


@dataclass(frozen=True)
class Bait:
    """What was planted in the last layer `name`: the class, the slope m of feature fishing with its
    feature and cut-off, or feature = None for class fishing."""

    name: str
    target: int
    feature: int | None
    slope: float
    cut: float
    classes: int

    def pull(self, value: float) -> float:
        """1 - p_t of a record of the class whose feature has this value."""
        others = self.classes - 1
        return others / (others + math.exp(min(700.0, self.slope * (value - self.cut))))


class Fishing(Inversion):
    """Inverting Gradients on the single record that a planted last layer lets through.

    What is below the last layer is that record's gradient, over N and times its pull 1 - p_t; of
    the last layer only the target class's row is, dW_t = (p_t - 1) h and db_t = p_t - 1, the rest
    is masked. For a single record the direction does not depend on how steep the plant was, so it
    is matched at another plant: biases of other classes so high that p_t is 0 whatever the image,
    and w_t, with all gradients below, scaled so that both parts weigh the same. The answer is one
    sample a target; the rest of the batch is unanswered. Options: those of `inverting_gradients`.

    Threat model: a malicious server that runs the deployment's `malice` of the same kind; it sees
    an update, or the aggregate of many clients. Flags: "zero_gradients" where no record bit;
    "several_fished: n" where n records of the class did (their mean gradient is inverted), or
    "several_fished" where the pull is not that of one record with the feature seen; "other_classes"
    where feature fishing met records of other classes; "steps_read_as_one"; "nothing_planted".
    Raises AttackError where the server altered no model, or planted something else.
    """

    kind: Literal["fishing"] = "fishing"
    paper: ClassVar[str] = (
        "Wen, Geiping, Fowl, Goldblum, Goldstein: Fishing for User Data in Large-Batch Federated "
        "Learning via Gradient Magnification. ICML 2022"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER

    channels: ClassVar = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE})
    needs: ClassVar = Inversion.needs | {Fact.PUBLIC_DATA}
    uses: ClassVar = frozenset[Fact]()
    exploits: ClassVar = frozenset({"fishing"})
    recovers: ClassVar = "one_sample"

    def unsuited(self, network: nn.Module) -> str:
        try:
            name, layer = last_linear(network)
        except AttackError as error:
            return str(error)
        return "" if layer.bias is not None else f"fishing needs a bias in the last layer, '{name}'"

    def read(self, case: Case) -> tuple[Evidence, ...]:
        assert case.knowledge.build is not None
        name, _ = last_linear(case.knowledge.build())
        return tuple(fished(evidence, name) for evidence in planted(case, self.channel))

    def labels_of(self, case: Case, evidence: Evidence) -> Tensor:
        assert case.knowledge.build is not None
        name, _ = last_linear(case.knowledge.build())
        return torch.tensor([bait_of(evidence.base, name).target])


def bait_of(model: Mapping[str, Tensor], name: str) -> Bait:
    """What was planted in the layer of this name; AttackError if it is not of this kind."""
    weight, bias = model[f"{name}.weight"], model[f"{name}.bias"]
    rows = torch.nonzero(weight.any(1)).flatten()
    if len(rows) != 1:
        raise AttackError(
            f"fishing leaves the weights of one class in layer '{name}'; the model that was sent "
            f"has {len(rows)}"
        )
    target = int(rows[0])
    others = torch.cat([bias[:target], bias[target + 1 :]])
    if others.any():
        return Bait(name, target, None, 1.0, 0.0, len(bias))
    feature = int(weight[target].abs().argmax())
    slope = float(weight[target, feature])
    return Bait(name, target, feature, slope, -float(bias[target]) / slope, len(bias))


def fished(evidence: Evidence, name: str) -> Evidence:
    """The evidence as that of one record of the target class, at a gentle plant."""
    if UNALTERED in evidence.flags or evidence.flags & MUTE:
        return replace(evidence, plan=one_step(1), flags=evidence.flags | {NOTHING})
    bait = bait_of(evidence.base, name)
    flags = evidence.flags | _caught(evidence, bait)
    if not evidence.of_gradient and max(map(len, evidence.plan.parties)) > 1:
        flags |= {"steps_read_as_one"}
    masks = {key: _kept(key, slope, bait) for key, slope in evidence.gradient.items()}
    gradient = {key: slope * masks[key] for key, slope in evidence.gradient.items()}
    scale = _scale(gradient, name)
    gradient = {
        key: slope if key.startswith(f"{name}.") else scale * slope
        for key, slope in gradient.items()
    }
    return replace(
        evidence,
        base=_gentle(evidence.base, bait, scale),
        descent=gradient,
        gradient=gradient,
        plan=one_step(1),
        of_gradient=True,
        support=masks,
        flags=flags,
    )


def _kept(key: str, slope: Tensor, bait: Bait) -> Tensor:
    """Which entries are the fished record's alone: all but the rows of other classes."""
    mask = torch.ones_like(slope, dtype=torch.bool)
    if key.startswith(f"{bait.name}."):
        mask[:] = False
        mask[bait.target] = True
    return mask


def _scale(gradient: Mapping[str, Tensor], name: str) -> float:
    """By how much to multiply w_t so that the layers below weigh as much as the last one."""
    parts = {True: 0.0, False: 0.0}
    for key, slope in gradient.items():
        parts[key.startswith(f"{name}.")] += float(slope.double().square().sum())
    return math.sqrt(parts[True] / parts[False]) if parts[False] else 1.0


def _gentle(model: Mapping[str, Tensor], bait: Bait, scale: float) -> dict[str, Tensor]:
    """The model at which directions are matched: p_t = 0 for any image, w_t by `scale`."""
    weight, bias = (model[f"{bait.name}.{part}"] for part in ("weight", "bias"))
    offsets = torch.full_like(bias, 1000.0)
    offsets[bait.target] = 0.0
    return {
        **model,
        f"{bait.name}.weight": scale * weight,
        f"{bait.name}.bias": offsets,
    }


def _caught(evidence: Evidence, bait: Bait) -> frozenset[str]:
    """Flags for what the target class's bias gradient says of how many records bit."""
    bias = evidence.gradient[f"{bait.name}.bias"].double() * evidence.records
    pull = -float(bias[bait.target])
    if abs(pull) < FAINT:
        return frozenset({NOTHING})
    if bait.feature is None:
        count = round(pull)
        return frozenset({f"several_fished: {count}"} if count > 1 else ())
    found = set[str]()
    others = torch.cat([bias[: bait.target], bias[bait.target + 1 :]])
    if float(others.min()) < -ALONE:
        found.add("other_classes")
    row = evidence.gradient[f"{bait.name}.weight"][bait.target].double() * evidence.records
    expected = bait.pull(float(row[bait.feature]) / -pull)
    if abs(expected - pull) > ALONE * pull:
        found.add("several_fished")
    return frozenset(found)
