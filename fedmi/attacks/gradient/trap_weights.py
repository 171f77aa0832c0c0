"""Records out of the gradient of a layer in which a malicious server has set traps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind
from fedmi.attacks.engine.planted import UNALTERED, planted
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.chain import layers

AGREE = 0.01
"""Relative distance up to which two neurons show the same record."""
GRID, ON_GRID = 255, 0.06
"""Levels of an 8-bit pixel, and the mean distance from them up to which an image is one; noise has
0.25."""
FAINT = 1e-6
"""Bias gradients below this share of the largest are rounding."""


@dataclass(frozen=True)
class _Shown:
    """What neurons show: images [m, pixels], strength [m] in [0, 1], single [m]: whether proven to
    be of one record, score [m]."""

    images: Tensor
    single: Tensor
    score: Tensor


class TrapWeights(ClosedForm[str]):
    """Weight gradient over bias gradient of each neuron of the first fully connected layer.

    A neuron that one record fires shows it exactly, dW_i / db_i = x; one that several fire shows a
    mixture. Which is which the server tells by what it sees: a quotient with pixels outside [0, 1],
    or that would not fire its own neuron, is a mixture; one whose pixels lie on the 256 levels of
    8 bits is a record, or, where none do, one that another neuron shows as well. Of the others,
    those of most contrast come first, as mixing takes it; mixtures of proven records and near
    copies are left out. At most as many as there are records are returned, proven ones first, with
    confidence above 2. Where convolutions pass the image on, two probes of the model that was sent
    tell which pixel each of the layer's inputs is.

    Threat model: a malicious server that runs the deployment's `malice` of the same kind; several
    clients with the same traps are as one with more records. Flags: "no_single_record" where all
    neurons are mixtures (their common quotient is the answer), "nothing_planted".
    Raises AttackError where the server altered no model, or its model does not pass pixels on.
    """

    kind: Literal["trap_weights"] = "trap_weights"
    paper: ClassVar[str] = (
        "Boenisch, Dziedzic, Schuster, Shahin Shamsabadi, Shumailov, Papernot: When the Curious "
        "Abandon Honesty: Federated Learning Is Not Private. EuroS&P 2023"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER
    box_slack: float = Field(
        default=0.01, ge=0, le=1, description="how far outside [0, 1] a record's pixel may lie"
    )
    same_above: float = Field(
        default=0.95, gt=0, le=1, description="correlation from which an unproven one is a copy"
    )

    channels: ClassVar = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE})
    needs: ClassVar = ClosedForm.needs | {Fact.PUBLIC_DATA}
    exploits: ClassVar = frozenset({"trap_weights"})

    def readable(self, network: nn.Module) -> str:
        return trapped(network)

    def evidence(self, case: Case) -> Sequence[Evidence]:
        return planted(case, self.channel)

    def invert(self, case: Case, evidence: Evidence, source: str) -> Reconstruction:
        weight, bias = (evidence.gradient[f"{source}.{part}"].double() for part in _PARTS)
        if UNALTERED in evidence.flags:
            return blind(case, evidence)
        if not bias.any():
            return blind(
                case, replace(evidence, flags=evidence.flags | {"zero_gradients_in_read_layer"})
            )
        carried, pixels = sources(case, evidence, source)
        rows = torch.nonzero(bias.abs() > FAINT * bias.abs().max()).flatten()
        quotients = weight[rows][:, carried] / bias[rows, None]
        fired = self._fired(evidence, source, quotients, rows, carried)
        shown = self._shown(quotients, bias[rows].abs() / bias.abs().max(), fired)
        picked = self._picked(shown, evidence.records)
        flags, found, score = evidence.flags, shown.images[picked], shown.score[picked]
        if not picked:
            flags |= {"no_single_record"}
            mixture = bias[rows] @ weight[rows][:, carried] / bias[rows].square().sum()
            found, score = mixture[None], torch.zeros(1)
        images = torch.full((len(found), len(pixels)), 0.5)
        images[:, pixels] = found.clamp(0, 1).float()
        shape = (len(found), *case.knowledge.input_shape)
        return Reconstruction(evidence.target, images.view(shape), None, score.float(), flags)

    def _fired(
        self, evidence: Evidence, name: str, quotients: Tensor, rows: Tensor, carried: Tensor
    ) -> Tensor:
        """Whether a quotient, as a record, fires the neuron that shows it. [m]"""
        weight, bias = (evidence.base[f"{name}.{part}"].double() for part in _PARTS)
        inside = (weight[rows][:, carried] * quotients).sum(1) + bias[rows]
        return inside > 0

    def _shown(self, quotients: Tensor, strength: Tensor, fired: Tensor) -> _Shown:
        """Only quotients that can be records; strongest first among equals."""
        inside = (quotients > -self.box_slack) & (quotients < 1 + self.box_slack)
        fits = torch.nonzero(inside.all(1) & fired).flatten()
        images, strength = quotients[fits], strength[fits]
        size = images.norm(dim=1).clamp_min(1e-12)
        single = off_grid(images) < ON_GRID
        if not single.any():  # pixels of these records are not of 8 bits
            single = (torch.cdist(images, images) < AGREE * size[:, None]).sum(1) > 1
        contrast = (images - images.mean(1, keepdim=True)).square().mean(1).sqrt()
        score = torch.where(single, 2 + strength, 1 + contrast)
        return _Shown(images, single, score)

    def _picked(self, shown: _Shown, records: int) -> list[int]:
        """Distinct ones, best first, at most `records`."""
        centred = shown.images - shown.images.mean(1, keepdim=True)
        centred = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        picked: list[int] = []
        for index in shown.score.argsort(descending=True).tolist():
            if len(picked) == records:
                break
            if not picked:
                picked.append(index)
                continue
            others = shown.images[picked]
            nearest = (others - shown.images[index]).norm(dim=1).min()
            if nearest < AGREE * shown.images[index].norm():
                continue
            proven = bool(shown.single[index])
            alike = float((centred[picked] @ centred[index]).max())
            if proven or (alike < self.same_above and not _mixed(shown, picked, index)):
                picked.append(index)
        return picked


_PARTS = ("weight", "bias")


def off_grid(images: Tensor) -> Tensor:
    """Mean distance of pixels from the nearest of 256 levels, in levels; of those that are neither
    black nor white. 0.5 where there are none. [m, pixels] -> [m]"""
    inside = (images > 1 / GRID) & (images < 1 - 1 / GRID)
    distance = (images * GRID - (images * GRID).round()).abs() * inside
    count = inside.sum(1)
    return torch.where(count > 0, distance.sum(1) / count.clamp_min(1), 0.5)


def _mixed(shown: _Shown, picked: Sequence[int], index: int) -> bool:
    """Whether it is a combination of records that are proven."""
    proven = [other for other in picked if shown.single[other]]
    if not proven or len(proven) >= shown.images.shape[1]:
        return False
    basis, wanted = shown.images[proven].T, shown.images[index]
    weights = torch.linalg.lstsq(basis, wanted[:, None]).solution
    residual = (basis @ weights).flatten() - wanted
    return bool(residual.norm() < AGREE * wanted.norm())


def trapped(network: nn.Module) -> str:
    """Name of the first fully connected layer of a chain, which a ReLU must follow; AttackError."""
    chain = list(layers(network))
    for number, (name, layer) in enumerate(chain):
        if isinstance(layer, nn.Linear):
            follows = chain[number + 1 : number + 2]
            if layer.bias is not None and follows and isinstance(follows[0][1], nn.ReLU):
                return name
            raise AttackError(
                f"trap weights are read from a fully connected layer with bias and ReLU; layer "
                f"'{name}' has no {'bias' if layer.bias is None else 'ReLU behind it'}: use "
                "'linear_inversion' or 'inverting_gradients'"
            )
    raise AttackError(
        f"trap weights are read from a fully connected layer in a chain; the model is "
        f"{type(network).__name__}: use 'inverting_gradients'"
    )


def sources(case: Case, evidence: Evidence, name: str) -> tuple[Tensor, Tensor]:
    """(inputs of the layer that carry a pixel, that pixel of each), by two probes of the model that
    was sent; AttackError if the layer does not get pixels as they are."""
    assert case.knowledge.build is not None
    module = case.knowledge.build().eval()
    module.load_state_dict(dict(evidence.base))
    count = torch.Size(case.knowledge.input_shape).numel()
    ramp = torch.arange(1, count + 1) / (count + 1)
    second = torch.rand(count, generator=case.seed.child("probe").torch())
    given: list[Tensor] = []
    layer = module.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _layer, args: given.append(args[0].flatten(1)))
    try:
        with torch.no_grad():
            module(torch.stack([ramp, second]).view(2, *case.knowledge.input_shape))
    finally:
        hook.remove()
    carried = torch.nonzero(given[0].any(0)).flatten()
    first, check = given[0][:, carried]
    pixels = (first * (count + 1)).round().long().clamp(1, count) - 1
    if not torch.allclose(ramp[pixels], first) or not torch.allclose(second[pixels], check):
        raise AttackError(
            f"the model that was sent does not pass the image on to layer '{name}' unchanged"
        )
    return carried, pixels
