"""A model held in shares by compute parties: opened where the coalition suffices, else read raw."""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.ring import plainest
from fedmi.attacks.engine.sealed import RAW, raw
from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.words import Channel, Position
from fedmi.mpc.opening import MODEL

State = dict[str, Tensor]


def model_state(case: Case, channel: Channel) -> tuple[State, frozenset[str]]:
    """(state dict of the model that an attack on classes inverts, evidence flags).

    Channel `global_model`: the latest one in clear. Channel `share`: the latest one held in
    shares, opened with what the coalition of the case's first target holds (it is the same for
    every class). Below the threshold the shares are read as if they were weights, each weight
    tensor scaled to the standard deviation of He's initialisation, sqrt(2 / fan_in), so that an
    attack on it runs like any other; biases, normalisation and counters stay as built (flag
    "sealed_read_raw"). A dealer holds no share of a model: its own bytes are read so.
    Raises LookupError where the position saw no model, or does not know the architecture.
    """
    if channel != Channel.SHARE:
        return dict(case.transcript.final_model()), frozenset()
    if case.knowledge.build is None:
        raise LookupError(f'a model on channel "{channel}" needs the fact "architecture"')
    fresh = dict(case.knowledge.build().state_dict())
    if case.transcript.position == Position.DEALER:
        return _scaled(_bytes_as_weights(case, fresh), fresh), frozenset({RAW})
    seen = _shared_model(case)
    told = case.knowledge.colluders.get(case.targets[0].id, ()) if case.targets else ()
    opened = open_with(case, seen, told)
    if opened is None:
        return _scaled(_shares_as_weights(seen, told, fresh), fresh), frozenset({RAW})
    found = {name.removeprefix(MODEL): tensor for name, tensor in opened.tensors.items()}
    return {name: _like(found, name, tensor) for name, tensor in fresh.items()}, frozenset()


def open_with(case: Case, seen: Observation, told: Sequence[Confided]) -> Opened | None:
    """The item in clear, if the deployment's own algorithm opens it with what these tell."""
    opener = case.knowledge.opener
    return opener(seen, case.transcript, told) if opener else None


def held_together(seen: Observation, told: Sequence[Confided], name: str) -> NDArray[np.int64]:
    """All ring elements that the coalition holds of one tensor of an item: int64 [..., h]."""
    parts = [seen.payload[name]]
    for item in told:
        if (item.round, item.about) == (seen.round, seen.clients) and name in item.tensors:
            parts.append(item.tensors[name])
    held: NDArray[np.int64] = torch.cat(parts, dim=-1).numpy()
    return held


def _shared_model(case: Case) -> Observation:
    models = [
        seen
        for seen in case.transcript.on(Channel.SHARE)
        if any(name.startswith(MODEL) for name in seen.payload)
    ]
    if not models:
        raise LookupError(
            f"{case.transcript.position} holds no share of a model in this deployment; attack "
            "the model where it is opened (channel 'global_model'), or shares of updates by an "
            "attack on updates"
        )
    return max(models, key=lambda seen: seen.round)


def _like(found: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The opened tensor in the type and shape of the model; counters are not shared."""
    if name not in found and not tensor.is_floating_point():
        return tensor
    if name not in found or found[name].shape != tensor.shape:
        given = list(found[name].shape) if name in found else "nothing"
        raise LookupError(f"opened model: '{name}' is {given}, expected {list(tensor.shape)}")
    return found[name].to(tensor.dtype)


def _shares_as_weights(
    seen: Observation, told: Sequence[Confided], fresh: Mapping[str, Tensor]
) -> State:
    found = {}
    for name, tensor in fresh.items():
        if tensor.dim() < 2 or f"{MODEL}{name}" not in seen.payload:
            continue
        held = held_together(seen, told, f"{MODEL}{name}")
        values = plainest(held.reshape(1, -1, held.shape[-1]))
        found[name] = torch.from_numpy(values).view(tensor.shape)
    return found


def _bytes_as_weights(case: Case, fresh: Mapping[str, Tensor]) -> State:
    seen = case.transcript.on(Channel.SHARE)
    if not seen:
        raise LookupError(f"{case.transcript.position} saw nothing on channel 'share'")
    parts = {f"{i}/{n}": t for i, item in enumerate(seen) for n, t in item.payload.items()}
    whole = Observation(seen[0].position, Channel.SHARE, seen[0].round, (), parts, 0)
    return raw(whole, {name: tensor for name, tensor in fresh.items() if tensor.dim() > 1})


def _scaled(found: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> State:
    """`fresh` with the weight tensors found, centred and scaled to sqrt(2 / fan_in)."""
    state = dict(fresh)
    for name, values in found.items():
        spread = values.std(correction=0).clamp_min(1e-12)
        scale = sqrt(2 / prod(fresh[name].shape[1:]))
        state[name] = ((values - values.mean()) / spread * scale).to(fresh[name].dtype)
    return state
