"""Records out of shares: what compute parties of an SMPC training, or its dealer, can tell."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.coalition import told_in
from fedmi.attacks.engine.evidence import AttackError, observation_of
from fedmi.attacks.engine.ring import plainest
from fedmi.attacks.engine.sealed import RAW
from fedmi.attacks.engine.shared import held_together, open_with
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation
from fedmi.exposure.opening import Confided
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.mpc.opening import RECORDS


class ShareReconstruction(Attack):
    """The records that an owner shared among compute parties, from what some of them hold.

    Threat model: passive compute parties that follow the protocol and, with `colluders`, put what
    they hold together. From the threshold on (aby3: any two; additive sharing: all) they add up
    their shares and have every record and label, exact up to 2^-fraction_bits. Below it, what they
    hold is uniform and independent of the records, so no attack, however strong, does better than
    prior-only; this one then takes the reading of the ring elements that looks least like noise
    (`plainest`: each element, their sum, their sum less a mask that all records share), so that
    sharing with poor or reused masks is found out. How many records there are, and their shape,
    is public.

    Position `dealer`: a trusted third party that hands out Beaver triples and holds seeds and
    sizes, no share of anything; its bytes are read as pixels, byte / 255, over and over.

    One target an owner. samples [n, C, H, W]; labels by the largest of the one-hot entries;
    confidence 0 where opened, else -inf with the flag "sealed_read_raw". Raises AttackError for an
    item that holds no records, or records of another shape.
    """

    kind: Literal["share_reconstruction"] = "share_reconstruction"
    paper: ClassVar[str] = (
        "Araki, Furukawa, Lindell, Nof, Ohara: High-Throughput Semi-Honest Secure Three-Party "
        "Computation with an Honest Majority, CCS 2016 (what one party's view says: nothing); "
        "Mohassel, Rindal: ABY3, CCS 2018 (the sharing)"
    )
    channels: ClassVar[frozenset[Channel]] = frozenset({Channel.SHARE})
    uses: ClassVar[frozenset[Fact]] = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES})

    @field_validator("position")
    @classmethod
    def _holds_shares(cls, position: Position) -> Position:
        if position not in (Position.COMPUTE_PARTY, Position.DEALER):
            raise ValueError(
                f'"{position}" computes on no shares of records; give "compute_party" or "dealer"'
            )
        return position

    @property
    def required_facts(self) -> frozenset[Fact]:
        """A party knows the program it runs; a dealer sees no shapes, so it must be told sizes."""
        dealer = self.position == Position.DEALER
        return frozenset({Fact.NUM_EXAMPLES if dealer else Fact.ARCHITECTURE})

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        answers = []
        for done, target in enumerate(case.targets, start=1):
            dealer = self.position == Position.DEALER
            answers.append(_dealt(case, target) if dealer else _shared(case, target))
            case.progress(done / len(case.targets))
        return tuple(answers)


def _shared(case: Case, target: Target) -> Reconstruction:
    seen, told = observation_of(case, target, Channel.SHARE), told_in(case, target)
    _check(seen, case.knowledge.input_shape)
    opened = open_with(case, seen, told)
    if opened is None:
        inputs, labels = (_raw(seen, told, name) for name in RECORDS)
        return _answer(target, inputs, labels.argmax(1), frozenset({RAW}))
    inputs, labels = (opened.tensors[name] for name in RECORDS)
    return _answer(target, inputs, labels.argmax(1), frozenset())


def _answer(
    target: Target, inputs: Tensor, labels: Tensor, flags: frozenset[str]
) -> Reconstruction:
    sure = torch.full((len(inputs),), -torch.inf if flags else 0.0)
    return Reconstruction(target, inputs.clamp(0, 1).float(), labels, sure, flags)


def _raw(seen: Observation, told: Sequence[Confided], name: str) -> Tensor:
    """The shares of one tensor as numbers in [0, 1], of the tensor's own shape."""
    held = held_together(seen, told, name)
    values = plainest(held.reshape(len(held), -1, held.shape[-1]))
    return torch.from_numpy(values.reshape(held.shape[:-1]))


def _check(seen: Observation, shape: tuple[int, int, int]) -> None:
    lacking = [name for name in RECORDS if name not in seen.payload]
    if lacking:
        raise AttackError(
            f"round {seen.round}, clients {list(seen.clients)}: shares of {sorted(seen.payload)}, "
            f"not of records ('{lacking[0]}' is missing); for shares of an update use an attack on "
            "updates, as 'inverting_gradients'"
        )
    inputs, labels = (tuple(seen.payload[name].shape) for name in RECORDS)
    if inputs[1:-1] != shape or len(labels) != 3 or labels[0] != inputs[0]:
        raise AttackError(
            f"round {seen.round}, clients {list(seen.clients)}: shares of inputs {list(inputs)} "
            f"and labels {list(labels)}; expected [n, {', '.join(map(str, shape))}, k] and "
            "[n, classes, k]"
        )


def _dealt(case: Case, target: Target) -> Reconstruction:
    """The dealer's bytes of this owner, or all it has, as pixels in [0, 1]; labels are guessed."""
    records = case.knowledge.num_examples.get(target.id, 0)
    if records < 1:
        raise AttackError(f"target '{target.id}': a dealer must be granted 'num_examples'")
    rounds = None if target.round is None else [target.round]
    items = case.transcript.on(Channel.SHARE, rounds)
    items = tuple(seen for seen in items if seen.clients == target.clients) or items
    parts = [part.contiguous().numpy() for seen in items for part in seen.payload.values()]
    data = b"".join(part.tobytes() for part in parts)
    if not data:
        raise AttackError(f"target '{target.id}': the dealer has no bytes in this transcript")
    shape = (records, *case.knowledge.input_shape)
    pixels = np.resize(np.frombuffer(data, np.uint8), shape).astype(np.float64) / 255
    chance = case.seed.child(target.id, "labels").torch()
    labels = torch.randint(case.knowledge.classes, (records,), generator=chance)
    return _answer(target, torch.from_numpy(pixels), labels, frozenset({RAW}))
