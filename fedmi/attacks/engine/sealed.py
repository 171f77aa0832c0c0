"""Items that crossed sealed: opened where the adversary can, read as if they were in clear else."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.words import Channel

SEALED = frozenset({Channel.MASKED_UPDATE, Channel.CIPHERTEXT, Channel.SHARE})
RAW = "sealed_read_raw"
Unsealed = tuple[Observation, Mapping[str, Tensor] | None, frozenset[str]]
"""the item as if it had crossed in clear, which of its entries were seen, flags"""


def unsealed(
    case: Case,
    seen: Observation,
    base: Mapping[str, Tensor],
    told: Sequence[Confided],
    names: tuple[str, ...],
) -> Unsealed:
    """What a sealed item shows to this adversary.

    Opened by the deployment's own algorithm where transcript and colluders suffice for it. Else
    its bytes are read as if they were an update (flag "sealed_read_raw"), so that an attack on a
    seal that holds runs like any other, and does no better than on random bytes.
    """
    opener = case.knowledge.opener
    opened = opener(seen, case.transcript, told) if opener else None
    if opened is not None:
        return in_clear(seen, base, opened), opened.support, frozenset()
    noise = Opened(raw(seen, {name: base[name] for name in names}))
    return in_clear(seen, base, noise), None, frozenset({RAW})


def in_clear(seen: Observation, base: Mapping[str, Tensor], opened: Opened) -> Observation:
    """The item with the opened update as its payload, in float64: a state dict or a gradient."""
    if seen.is_gradient:
        return replace(seen, payload=opened.tensors)
    payload = {
        name: base[name].double() + change.double()
        for name, change in opened.tensors.items()
        if name in base and base[name].is_floating_point()
    }
    return replace(seen, payload=payload)


def raw(seen: Observation, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sealed numbers or bytes, standardised, cut or repeated to the shapes of `shapes`."""
    parts = [part.detach().flatten().double() for part in seen.payload.values()]
    flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    flat = flat[torch.isfinite(flat)]
    flat = (flat - flat.mean()) / flat.std(correction=0).clamp_min(1e-12) if len(flat) else flat
    wanted = sum(like.numel() for like in shapes.values())
    if not len(flat):
        flat = torch.zeros(wanted, dtype=torch.float64)
    flat = flat.repeat(-(-wanted // len(flat)))[:wanted] if wanted else flat
    pieces = torch.split(flat, [like.numel() for like in shapes.values()])
    return {n: p.view(like.shape) for (n, like), p in zip(shapes.items(), pieces, strict=True)}
