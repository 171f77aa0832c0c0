"""What an attack goes for, and what its position, its grants and its coalition know."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Attack
from fedmi.data.records import Ints, Split
from fedmi.data.truth import Truth
from fedmi.deployments.base import Deployment, Outcome, Planted, Steps
from fedmi.deployments.serving.base import ANSWERS
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.knowledge import Knowledge, Target, View
from fedmi.exposure.observation import OWN_LABEL, OWN_NUMBER, Observation, Transcript
from fedmi.exposure.opening import Confided, Opened, Opener
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.mpc.opening import RECORDED
from fedmi.runs.training import split_of, trained_of
from fedmi.scenario.cells import AttackCell, TrainingCell
from fedmi.scenario.threat import inside

PLANTED_RECORDS = "planted records"

Coalition = Mapping[str, tuple[Confided, ...]]
"""By target id, what the other members of the coalition tell."""


def view_of(cell: AttackCell, training: TrainingCell) -> View:
    return next(v for v in training.deployment.views() if cell.attack.can_read(v))


def targets_of(
    attack: Attack, transcript: Transcript, outcome: Outcome, classes: int, seed: Seed
) -> tuple[tuple[Target, ...], Coalition]:
    """One target for each observation asked for, or for each class of the model.

    A batch in which no record was drawn is no target. A coalition on an aggregate goes for the
    clients that are not in it; on a client's own item, for that client. A client never goes for
    its own records: in an average that it is part of it is one of the coalition, and a malicious
    one leaves out the classes of its own records unless the attack names them.
    """
    found = attack.own_targets(transcript)
    if attack.reads_answers:
        return tuple(queries_of(attack, transcript)), {}
    if attack.recovers == "membership":
        return tuple(t for t in found or () if t.id in coins_of(outcome.planted)), {}
    if attack.inverts_classes:
        own = transcript.own
        names = [label for label in range(classes) if f"{OWN_LABEL}{label}" not in own]
        found = found or tuple(Target(f"class {label}", label=label) for label in names)
        parties = _parties(attack, outcome, seed)
        return found, {target.id: parties for target in found} if attack.colluders else {}
    if found is None and attack.position == Position.DEALER:
        found = tuple(batch(at, (who,)) for at, who in sorted(outcome.used) if at in attack.rounds)
    if found is None:
        found = tuple(
            batch(seen.round, seen.clients) for seen in transcript.on(attack.channel, attack.rounds)
        )
    told: dict[str, tuple[Confided, ...]] = {}
    if attack.colluders or inside(attack):
        pairs = [_coalition(attack, t, transcript, outcome, seed) for t in found]
        found = tuple(target for target, _ in pairs)
        told = {target.id: members for target, members in pairs}
    return tuple(t for t in found if t.clients and _records(t, outcome)), told


def queries_of(attack: Attack, transcript: Transcript) -> Iterator[Target]:
    """One target for each record whose answer was overheard."""
    for seen in transcript.on(attack.channel):
        for number in range(len(seen.payload[ANSWERS])):
            yield Target(f"query {number}", query=number)


def coins_of(planted: Planted) -> dict[str, Ints]:
    """By target id, the coins of an audit: each client's gradients, and the records."""
    found = {name: c.coins.long().numpy() for name, c in planted.by_target.items()}
    return found | ({PLANTED_RECORDS: planted.coins} if len(planted.rows) else {})


SAMPLING_TOLD = frozenset({Fact.BATCH_ORDER, Fact.LABELS})
"""Grants that tell which examples a step drew, or how many: amplification takes that as secret."""


def claims_for(attack: Attack, outcome: Outcome) -> tuple[PrivacyClaim, ...]:
    """The claims that hold against the attack's position, its colluders and its grants; of an
    audit, those it is about."""
    told = bool(attack.knowledge & SAMPLING_TOLD)
    audited = None
    if attack.recovers == "membership":
        audited = "client" if outcome.planted.users is not None else "example"
    return tuple(
        claim
        for claim in outcome.claims
        if attack.position in claim.against
        and (claim.with_colluders or not attack.colluders)
        and not (told and claim.unit == "example")
        and audited in (None, claim.unit)
    )


def batch(round: int, clients: tuple[int, ...]) -> Target:
    """The batch behind what these clients sent in a round."""
    who = f"client {clients[0]}" if len(clients) == 1 else f"{len(clients)} clients"
    return Target(f"round {round}, {who}", None, round, clients)


def _records(target: Target, outcome: Outcome) -> int:
    """How many records are behind a target; 0 where an update did not count."""
    used = [outcome.used.get((target.round or 0, client)) for client in target.clients]
    return 0 if any(rows is None for rows in used) else sum(len(r) for r in used if r is not None)


def _coalition(
    attack: Attack, target: Target, transcript: Transcript, outcome: Outcome, seed: Seed
) -> tuple[Target, tuple[Confided, ...]]:
    """The target left by so many colluders, drawn at random, and what they tell."""
    if attack.position in (Position.COMPUTE_PARTY, Position.DEALER):
        return target, _parties(attack, outcome, seed)
    clients = [c for c in outcome.confided if c.position == Position.CLIENT]
    here = {c.client: c for c in clients if c.round == target.round}
    own = _itself(attack, target, transcript)
    if len(target.clients) == 1 and not (own and attack.own_targets(transcript) is None):
        others = sorted(set(here) - {*target.clients, *own})
        members = _drawn(others, min(attack.colluders, len(others)), seed.child(target.id))
        left = replace(target, clients=tuple(c for c in target.clients if c not in own))
        return left, tuple(here[client] for client in (*own, *members))
    others = [client for client in target.clients if client not in own]
    most = min(attack.colluders, len(others) - 1)
    members = (*own, *_drawn(others, max(0, most), seed.child(target.id)))
    rest = tuple(client for client in target.clients if client not in members)
    return batch(target.round or 0, rest), tuple(here[client] for client in members)


def _itself(attack: Attack, target: Target, transcript: Transcript) -> tuple[int, ...]:
    """Which client of the average the adversary is, where it is one."""
    if not inside(attack):
        return ()
    if OWN_NUMBER in transcript.own:
        return (int(transcript.own[OWN_NUMBER]),)
    (seen,) = transcript.on(attack.channel, [target.round or 0])
    return (min(seen.clients),)


def _parties(attack: Attack, outcome: Outcome, seed: Seed) -> tuple[Confided, ...]:
    """All that so many other compute parties, drawn at random, hold their part of."""
    held = [c for c in outcome.confided if c.position == Position.COMPUTE_PARTY]
    if attack.position == Position.DEALER:
        held = _who_trained(held, outcome)
    ranks = sorted({c.client for c in held})
    members = _drawn(ranks, min(attack.colluders, len(ranks)), seed.child("compute parties"))
    return tuple(c for c in held if c.client in members)


def _who_trained(held: Sequence[Confided], outcome: Outcome) -> list[Confided]:
    """What each party that the dealer dealt to could tell it, that of rank 0 included."""
    party = Position.COMPUTE_PARTY
    transcript = outcome.transcripts.get(party, Transcript(party))
    first = [
        Confided(RECORDED, seen.round, seen.payload, party, seen.clients)
        for seen in transcript.on(Channel.SHARE)
    ]
    ranks = {item.client for item in (*first, *held) if item.about}
    return [item for item in (*first, *held) if item.client in ranks]


def _drawn(clients: Sequence[int], count: int, seed: Seed) -> tuple[int, ...]:
    picked = seed.child("coalition").numpy().choice(len(clients), size=count, replace=False)
    return tuple(sorted(clients[index] for index in picked))


def chosen(targets: tuple[Target, ...], most: int, seed: Seed) -> tuple[Target, ...]:
    """All targets, or a random choice of `most` of them in their old order: as many of each round,
    as far as that goes."""
    if not most or most >= len(targets):
        return targets
    rng = seed.child("targets").numpy()
    if len({target.round for target in targets}) == 1:
        picked = rng.choice(len(targets), size=most, replace=False)
        return tuple(targets[i] for i in sorted(picked))
    drawn = rng.permutation(len(targets)).tolist()
    ranks: dict[int, int] = {}
    taken: dict[int | None, int] = {}
    for index in drawn:
        round = targets[index].round
        ranks[index] = taken[round] = taken.get(round, 0) + 1
    fairly = sorted(drawn, key=ranks.__getitem__)[:most]
    return tuple(targets[i] for i in sorted(fairly))


def knowledge_of(
    cell: AttackCell,
    training: TrainingCell,
    outcome: Outcome,
    split: Split,
    targets: tuple[Target, ...],
    coalition: Coalition,
) -> Knowledge:
    """What the position knows by nature, what the scenario grants and what colluders tell."""
    facts = view_of(cell, training).facts | cell.attack.knowledge
    shared = cell.attack.position in (Position.COMPUTE_PARTY, Position.DEALER)
    shape, classes = split.private.shape, split.classes
    deployment = training.deployment
    recipe = deployment.recipe or training.recipe
    public = split_of(training).public
    network = training.network.blueprint(shape, classes)
    return Knowledge(
        input_shape=shape,
        classes=classes,
        schema=split.private.schema,
        facts=facts,
        build=partial(training.network.build, shape, classes, Seed.root(0).child("attacker"))
        if Fact.ARCHITECTURE in facts
        else None,
        work=deployment.work(recipe) if Fact.LOCAL_TRAINING in facts else None,
        labels=_labels(Truth(split, outcome.used), targets, facts) if Fact.LABELS in facts else {},
        num_examples=granted_examples(outcome, targets)
        if Fact.NUM_EXAMPLES in (facts if shared else cell.attack.knowledge)
        else {},
        order={t.id: batch_order(outcome, t) for t in targets if t.clients}
        if Fact.BATCH_ORDER in facts
        else {},
        public=(torch.from_numpy(public.inputs), torch.from_numpy(public.labels))
        if Fact.PUBLIC_DATA in facts
        else None,
        canaries={name: c.places for name, c in outcome.planted.by_target.items()}
        if Fact.CANARIES in facts
        else {},
        canary_records=_planted_records(split, outcome.planted) if Fact.CANARIES in facts else None,
        colluders={t.id: coalition[t.id] for t in targets if t.id in coalition},
        opener=_opener(deployment, network, recipe) if Fact.ARCHITECTURE in facts else None,
        protections=deployment.protection_kinds if Fact.LOCAL_TRAINING in facts else (),
        faults=deployment.serving.faults(trained_of(training, outcome, split))
        if Fact.FAULT_MODEL in facts
        else None,
        exact_model=dict(outcome.state) if Fact.EXACT_MODEL in facts else None,
    )


def _opener(deployment: Deployment, network: nn.Module, recipe: Recipe) -> Opener | None:
    """Of what crosses while it trains, or else of what it is served from."""
    ways = [w for w in (deployment.opener(network, recipe), deployment.serving.opener()) if w]

    def first(seen: Observation, transcript: Transcript, told: Sequence[Confided]) -> Opened | None:
        opened = (way(seen, transcript, told) for way in ways)
        return next((found for found in opened if found is not None), None)

    return first if ways else None


def _labels(truth: Truth, targets: tuple[Target, ...], facts: frozenset[Fact]) -> dict[str, Tensor]:
    """Granted labels; their order says nothing unless the batch order is granted too."""
    labels = {t.id: torch.from_numpy(truth.behind(t).labels.copy()) for t in targets}
    if Fact.BATCH_ORDER in facts:
        return labels
    return {name: given.sort().values for name, given in labels.items()}


def _planted_records(split: Split, planted: Planted) -> tuple[Tensor, Tensor] | None:
    if not len(planted.rows):
        return None
    inputs = split.private.take(planted.rows).inputs
    return torch.from_numpy(inputs), torch.from_numpy(planted.labels.copy())


def granted_examples(outcome: Outcome, targets: tuple[Target, ...]) -> dict[str, int]:
    """How many records each target holds, as its clients told the server."""
    told: dict[tuple[int, int], float] = {}
    for transcript in outcome.transcripts.values():
        for seen in transcript.observations:
            if len(seen.clients) == 1 and "num_examples" in seen.clear:
                told[seen.round, seen.clients[0]] = seen.clear["num_examples"]
    used = {at: float(len(rows)) for at, rows in outcome.used.items()}
    told = used | told
    return {t.id: round(sum(told[t.round or 0, c] for c in t.clients)) for t in targets}


def batch_order(outcome: Outcome, target: Target) -> tuple[Steps, ...]:
    """Client -> local step -> records, numbered through all clients of the target."""
    found: list[Steps] = []
    first = 0
    for client in target.clients:
        at = (target.round or 0, client)
        found.append(tuple(tuple(first + row for row in step) for step in outcome.order[at]))
        first += len(outcome.used[at])
    return tuple(found)
