"""What one update says: the observation behind a target, read as a change of the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine import coalition, sealed
from fedmi.attacks.engine.plan import Plan, one_step, sampled, sequential
from fedmi.attacks.engine.protected import unanswered
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.mpc.opening import RECORDS

UPDATES = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE}) | sealed.SEALED

MASKED = "masks_not_recovered"
MUTE = frozenset({"non_finite", "zero_gradients", MASKED})
"""Flags of evidence that says nothing."""


class AttackError(ValueError):
    """The attack does not apply to this model or observation; the message says why."""


@dataclass(frozen=True)
class Evidence:
    """One target's observation.

    base: the global model the update started from (state dict). descent: by parameter name, the
    mean gradient (channel `gradient`), or base - observed model (an update). gradient: `descent`
    read as one mean gradient at `base`: divided by learning rate x steps, weight decay taken off
    (an approximation for several steps or momentum; exact for one plain step). plan: who used
    which of the target's records in which step; under Poisson sampling as many records as labels
    are granted, else as are expected. of_gradient: what crossed was a gradient.
    support: by name, a boolean mask of the entries that were seen; None = all of them.
    input_shape: of one record, (C, H, W). round: in which it was seen.
    """

    target: Target
    base: Mapping[str, Tensor]
    descent: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    plan: Plan
    input_shape: tuple[int, int, int]
    round: int
    of_gradient: bool = False
    support: Mapping[str, Tensor] | None = None
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def records(self) -> int:
        return self.plan.records


def read(case: Case, channel: Channel) -> tuple[Evidence, ...]:
    """The evidence for each target of the case, in order.

    Raises AttackError when an observation is missing or does not say how many records it holds.
    """
    build = case.knowledge.build
    if build is None:
        raise AttackError("the architecture is not known: grant the fact 'architecture'")
    names = tuple(name for name, _ in build().named_parameters())
    return tuple(_evidence(case, target, channel, names) for target in case.targets)


def blind(case: Case, evidence: Evidence, *, samples: bool = True) -> Reconstruction:
    """The answer to an update that says nothing: grey images, guessed labels, confidence -inf."""
    count, rng = evidence.records, case.seed.child(evidence.target.id, "guess").torch()
    return Reconstruction(
        target=evidence.target,
        samples=case.knowledge.schema.missing((count, *case.knowledge.input_shape))
        if samples
        else None,
        labels=torch.randint(case.knowledge.classes, (count,), generator=rng),
        confidence=torch.full((count,), -torch.inf),
        flags=evidence.flags,
    )


def evidence_of(
    case: Case,
    target: Target,
    seen: Observation,
    base: Mapping[str, Tensor],
    names: tuple[str, ...],
    support: Mapping[str, Tensor] | None = None,
    flags: frozenset[str] = frozenset(),
) -> Evidence:
    """The evidence in one item in clear; `names` are those of the parameters."""
    work = case.knowledge.work
    shares = _shares(case, target, seen)
    if seen.is_gradient:
        descent = {name: seen.payload[name].float() for name in names}
        gradient = descent
    else:
        if work is None:
            raise AttackError("local training is not known: grant the fact 'local_training'")
        descent = {name: (base[name] - seen.payload[name]).float() for name in names}
        gradient = _as_gradient(descent, base, work, shares[0])
    return Evidence(
        target=target,
        base=base,
        descent=descent,
        gradient=gradient,
        buffers={
            name: seen.payload[name]
            for name in seen.payload
            if name not in descent and name in base and seen.payload[name].is_floating_point()
        },
        plan=_plan(case, target, seen, shares),
        input_shape=case.knowledge.input_shape,
        round=seen.round,
        of_gradient=seen.is_gradient,
        support=support,
        flags=flags | _flags(descent) | unanswered(case),
    )


def _evidence(case: Case, target: Target, channel: Channel, names: tuple[str, ...]) -> Evidence:
    seen = observation_of(case, target, channel)
    if channel == Channel.SHARE:
        _check_shares(seen)
    told = coalition.told_in(case, target)
    try:
        base, flags = coalition.starting_model(case.transcript, seen, told)
        if told and channel == Channel.AGGREGATE:
            granted = case.knowledge.num_examples.get(target.id, 0)
            seen = coalition.rest(seen, base, told, target.clients, granted)
    except LookupError as error:
        raise AttackError(f"target '{target.id}': {error.args[0]}") from None
    support = None
    if channel in sealed.SEALED:
        seen, support, found = sealed.unsealed(case, seen, base, told, names)
        flags |= found
    return evidence_of(case, target, seen, base, names, support, flags)


def _check_shares(seen: Observation) -> None:
    """AttackError unless these are one compute party's shares of an update."""
    if seen.position != Position.COMPUTE_PARTY:
        raise AttackError(
            f"what {seen.position} sees on channel 'share' are shares of keys; shares of updates "
            'are seen by position = "compute_party"'
        )
    if RECORDS[0] in seen.payload:
        raise AttackError(
            f"clients {list(seen.clients)} shared their records, not an update: use "
            "'share_reconstruction'"
        )


def observation_of(case: Case, target: Target, channel: Channel) -> Observation:
    """The item behind a target: of its clients, or of them and their coalition in an average."""
    if target.round is None:
        raise AttackError(f"target '{target.id}' is a class; this attack reads updates of a round")
    told = coalition.told_in(case, target) if channel == Channel.AGGREGATE else ()
    behind = {*target.clients, *(item.client for item in told)}
    for seen in case.transcript.on(channel, [target.round]):
        if seen.clients == target.clients or (told and behind == {*seen.clients}):
            return seen
    raise AttackError(
        f"target '{target.id}': no {channel} of clients {list(target.clients)} "
        f"in round {target.round} of this transcript"
    )


def _shares(case: Case, target: Target, seen: Observation) -> tuple[int, ...]:
    """Records of each party behind the observation; equal shares where only the sum is known."""
    each = [round(seen.clear.get(f"num_examples/{client}", 0)) for client in target.clients]
    if all(each):
        return tuple(each)
    total = round(seen.clear.get("num_examples", case.knowledge.num_examples.get(target.id, 0)))
    parties = len(target.clients) if seen.channel == Channel.AGGREGATE else 1
    if total < parties:
        raise AttackError(
            f"{seen.channel} of round {seen.round}, clients {list(seen.clients)}: num_examples is "
            f"{total}; the number of records must be known and at least one a client: grant the "
            "fact 'num_examples'"
        )
    return tuple(total // parties + (party < total % parties) for party in range(parties))


def _as_gradient(
    descent: Mapping[str, Tensor], base: Mapping[str, Tensor], work: LocalWork, examples: int
) -> dict[str, Tensor]:
    """An update as one mean gradient; the steps are those of a client with so many examples."""
    momentum, steps = work.recipe.momentum, len(work.batch_sizes(examples))
    moved = sum((1 - momentum**step) / (1 - momentum) for step in range(1, steps + 1))
    scale = work.recipe.learning_rate * moved
    decay = work.recipe.weight_decay
    return {name: change / scale - decay * base[name] for name, change in descent.items()}


def _plan(case: Case, target: Target, seen: Observation, shares: tuple[int, ...]) -> Plan:
    work = case.knowledge.work
    poisson = work is not None and work.sampling == "poisson"
    granted = len(case.knowledge.labels.get(target.id, ())) if poisson else 0
    if seen.is_gradient:
        return one_step(granted or sum(shares))
    if Fact.BATCH_ORDER in case.knowledge.facts and target.id in case.knowledge.order:
        return Plan(case.knowledge.order[target.id], shares)
    if work is None:
        return one_step(sum(shares))
    return sampled(shares, work, granted) if poisson else sequential(shares, work)


def _flags(descent: Mapping[str, Tensor]) -> frozenset[str]:
    if not all(bool(torch.isfinite(part).all()) for part in descent.values()):
        return frozenset({"non_finite"})
    if not any(bool(part.any()) for part in descent.values()):
        return frozenset({"zero_gradients"})
    first = next(iter(descent.values()))
    return frozenset() if first.any() else frozenset({"zero_gradients_in_first_layer"})
