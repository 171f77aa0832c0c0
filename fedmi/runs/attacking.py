"""Cells that attack: one attack on one deployment, beside its prior-only, scored."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedmi.attacks.base import PICTURED, Attack, Case, Reconstruction
from fedmi.attacks.membership.canary_audit import CanaryAudit
from fedmi.attacks.membership.one_run_audit import OneRunAudit
from fedmi.data.records import Split
from fedmi.data.truth import Truth, sealed
from fedmi.deployments import saved
from fedmi.deployments.base import Outcome
from fedmi.deployments.serving.base import Trained
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Transcript
from fedmi.exposure.payload import store
from fedmi.exposure.seeding import Seed
from fedmi.exposure.service import Ledger
from fedmi.exposure.words import SERVED, Channel, Fact
from fedmi.leakage.trial import Score
from fedmi.metrics.base import Metric
from fedmi.metrics.epsilon_lower_bound import EpsilonLowerBound
from fedmi.metrics.judge import Judge
from fedmi.metrics.matching import match
from fedmi.protections.audit.bounds import SHARE
from fedmi.protections.audit.families import Counts, largest_epsilon, pooled_epsilon
from fedmi.runs.aims import Coalition, chosen, claims_for, coins_of, knowledge_of, targets_of
from fedmi.runs.directory import RunDirectory, write_json, writing
from fedmi.runs.evidence import Found, chance, noticed, untrained, weak_prior
from fedmi.runs.provenance import marked
from fedmi.runs.training import (
    exposed,
    load_judge,
    site_of,
    split_of,
    told,
    trained_of,
    training_split,
)
from fedmi.scenario.cells import AttackCell, TrainingCell
from fedmi.scenario.threat import inside


@dataclass(frozen=True)
class Assault:
    """What came of running the attack on one training.

    asking: what was asked of a service or a device, by the names that `Trial` has for it.
    asked: how many targets the scenario asks for.
    """

    reconstructions: tuple[Reconstruction, ...]
    seconds: float
    asking: Mapping[str, float]
    asked: int
    untrained: frozenset[int]
    coalition: Found


def attack(cell: AttackCell, directory: RunDirectory) -> None:
    torch.set_num_threads(1)
    marker = marked("attack", cell)
    with writing(directory, cell.key, marker) as scratch:
        tell = told(scratch)
        real = assault(cell, False, directory, lambda share: tell(share / 2))
        prior = assault(cell, True, directory, lambda share: tell(0.5 + share / 2))
        outcome = saved.load(directory.cell(cell.training.key))
        truth = Truth(split_of(cell.training), outcome.used, coins_of(outcome.planted))
        judge = load_judge(cell.judge, directory)
        blind = blind_guess(cell, split_of(cell.training))
        scores, unseen = score(cell, real, prior, truth, judge, blind)
        save_reconstructions(real.reconstructions, scratch / "reconstructions.safetensors")
        save_reconstructions(prior.reconstructions, scratch / "prior_only.safetensors")
        write_json(scratch / "scores.json", {"scores": [vars(item) for item in scores]})
        marker |= {
            "seconds": real.seconds,
            **real.asking,
            "targets": [vars(item.target) for item in real.reconstructions],
            "targets_asked": real.asked,
            "flags": sorted(flags(real, prior) | audit_flags(cell, outcome, real) | unseen),
            "chance": chance(truth.split.held_out),
        }


def assault(
    cell: AttackCell,
    twin: bool,
    directory: RunDirectory,
    progress: Callable[[float], None],
) -> Assault:
    """Run the attack on what the training, or its twin, exposed; the ground truth stays closed
    meanwhile."""
    training, served = (cell.twin, cell.served_twin) if twin else (cell.training, cell.served)
    outcome = exposed(training, served, directory)
    split = training_split(training)
    recorded = outcome.transcripts.get(cell.attack.position, Transcript(cell.attack.position))
    drawn = Seed.root(training.seed)
    available, told = targets_of(cell.attack, recorded, outcome, split.classes, drawn)
    targets = chosen(available, cell.attack.max_targets, drawn)
    knowledge = knowledge_of(cell, training, outcome, split, targets, told)
    guessing = untrained(training, outcome, split, targets)
    short = short_of(cell.attack, targets, told)
    trained = trained_of(training, outcome, split)
    fitted = outcome.service.fitted if outcome.service else {}
    del outcome, split
    own = Seed.root(training.seed).child("attack", cell.attack.title).sealed
    if not targets:
        raise ValueError(
            f"{cell.attack.kind} finds nothing to attack on {cell.attack.channel} of rounds "
            f"{list(cell.attack.rounds)}: no client's update counted there, or none was planted "
            "or altered"
        )
    with seen_by(cell, training, trained, recorded, fitted) as transcript:
        case = Case(transcript, knowledge, targets, own, progress)
        start = time.monotonic()
        with sealed():
            reconstructions = cell.attack.reconstruct(case)
        seconds = time.monotonic() - start
    if [item.target for item in reconstructions] != list(targets):
        raise ValueError(f"{cell.attack.kind} did not answer for each of its targets in order")
    asked = cell.attack.max_targets or len(available)
    short |= {(0, flag) for flag in alarms(transcript)}
    return Assault(reconstructions, seconds, asking(transcript), asked, guessing, short)


def asking(transcript: Transcript) -> dict[str, float]:
    """What the attack asked of the service or the device, by the names that `Trial` has for it."""
    found: dict[str, float] = {"queries": 0}
    if transcript.device:
        found["readouts"] = transcript.device.reads
    if transcript.service:
        ledger = transcript.service.ledger
        found |= {
            "queries": ledger.queries,
            "refused": ledger.refused,
            "accounts": len(ledger.by_account),
            "alarmed": len(ledger.alarms),
            "wait_seconds": ledger.wait_seconds,
        }
    return found


def alarms(transcript: Transcript) -> Iterator[str]:
    """Flags of a monitor that noticed the attack, and of queries that were not answered."""
    ledger = transcript.service.ledger if transcript.service else Ledger()
    if ledger.refused:
        yield f"queries_refused: {ledger.refused} of {ledger.queries}"
    if ledger.alarms:
        first = min(ledger.alarms.values())
        yield (
            f"alarm_raised: {len(ledger.alarms)} of {len(ledger.by_account)} accounts, the "
            f"soonest at its query {first}"
        )


def flags(real: Assault, prior: Assault) -> Found:
    """(round or 0, flag) of the evidence, of the twin's too."""
    found = noticed(real.reconstructions, real.untrained)
    found |= real.coalition
    found |= weak_prior(real.reconstructions, prior.reconstructions)
    return found | {(at, "prior_only_untrained") for at in prior.untrained - real.untrained}


def short_of(attack: Attack, targets: tuple[Target, ...], told: Coalition) -> Found:
    """Rounds in which fewer clients could collude than the scenario asks for."""
    members = attack.colluders + inside(attack)
    return {
        (target.round or 0, "fewer_colluders_than_asked")
        for target in targets
        if len({item.client for item in told.get(target.id, ())}) < members
    }


def audit_flags(cell: AttackCell, outcome: Outcome, real: Assault) -> Found:
    """What an audit's guesses say of the claim, and how much they could say."""
    if cell.attack.recovers != "membership" or not real.reconstructions:
        return set()
    coins = coins_of(outcome.planted)
    audits = [
        Counts.of(found.labels, torch.from_numpy(coins[found.target.id]))
        for found in real.reconstructions
        if found.labels is not None
    ]
    unit = "client" if outcome.planted.users is not None else "example"
    claims = [c for c in claims_for(cell.attack, outcome) if c.unit == unit]
    bounds = [m for m in cell.metrics if isinstance(m, EpsilonLowerBound)]
    if not claims or not audits:
        return set()
    told = (_told(metric, claims[0], audits, _share(cell.attack)) for metric in bounds)
    return {(0, flag) for flags in told for flag in flags}


def _share(attack: Attack) -> float:
    return attack.share if isinstance(attack, CanaryAudit | OneRunAudit) else SHARE


def _told(
    metric: EpsilonLowerBound, claim: PrivacyClaim, audits: list[Counts], share: float
) -> Iterator[str]:
    """Flags of one bound beside the claim."""
    if metric.delta != claim.delta:
        yield f"audit_at_other_delta: {metric.delta:g}, claim {claim.delta:g}"
        return
    half = 1 - (1 - metric.confidence) / 2  # two tests share the error
    if max(f(audits, claim.delta, half) for f in (largest_epsilon, pooled_epsilon)) > claim.epsilon:
        yield "claim_violated"
    fewest, guesses, _ = min(audits)
    ceiling = metric.ceiling(fewest, guesses)
    if ceiling < claim.epsilon:
        yield f"audit_cannot_refute: it can show {ceiling:.2g} at most"
    elif metric.power(claim.epsilon, fewest, share, noise_off_by=4) <= claim.epsilon:
        sound = metric.power(claim.epsilon, fewest, share)
        yield f"audit_weak: a sound mechanism at the claim would show about {sound:.2g}"


@contextmanager
def seen_by(
    cell: AttackCell,
    training: TrainingCell,
    trained: Trained,
    recorded: Transcript,
    fitted: Mapping[str, Tensor],
) -> Iterator[Transcript]:
    """The transcript of the attack's position, with the door of the service where it asks one, or
    the device whose memory it reads."""
    attack, serving = cell.attack, training.deployment.serving
    if attack.channel not in SERVED | {Channel.FAULTY_READOUT}:
        yield recorded
        return
    draws = Seed.root(training.seed).child("door", attack.position, attack.channel, attack.title)
    with TemporaryDirectory(prefix="fedmi-served-") as scratch:
        site = site_of(training, Path(scratch), draws, fitted)
        if attack.channel == Channel.FAULTY_READOUT:
            yield Transcript(attack.position, device=serving.device(trained, site))
            return
        overheard = recorded.on(attack.channel) if attack.reads_answers else ()
        with serving.door(trained, attack.channel, site) as service:
            yield Transcript(attack.position, overheard, service)


def blind_guess(cell: AttackCell, split: Split) -> Tensor | None:
    """The best single guess from the public records [1, C, H, W], where the adversary has them:
    what it can say of any target without having seen anything of it. None where it has none."""
    if Fact.PUBLIC_DATA not in cell.attack.knowledge or cell.attack.recovers not in PICTURED:
        return None
    return split.public.schema.typical(torch.from_numpy(split.public.inputs))


def score(
    cell: AttackCell,
    real: Assault,
    prior: Assault,
    truth: Truth,
    judge: Judge,
    blind: Tensor | None = None,
) -> tuple[list[Score], Found]:
    """Both reconstructions of every target against the same private records, and flags.

    An attack on the twin may be sure of other people's pictures and so guess worse than one that
    hedges: where the blind guess scores better by a metric, it is the prior-only of that metric.
    """
    metrics = [m for m in cell.metrics if m.measures == cell.attack.recovers]
    pairs, guesses = [], []
    for ours, theirs in zip(real.reconstructions, prior.reconstructions, strict=True):
        if ours.target.id != theirs.target.id:
            raise ValueError(f"prior-only has {theirs.target.id} where {ours.target.id} belongs")
        pairs.append([match(r.samples, r.labels, ours.target, truth) for r in (ours, theirs)])
        if blind is not None:
            many = blind.expand(len(truth.behind(ours.target)), -1, -1, -1)
            guesses.append(match(many, None, ours.target, truth))
    found: list[Score] = []
    better = []
    for metric in metrics:
        values, baseline = ([metric.score(pair[side], judge) for pair in pairs] for side in (0, 1))
        hedged = [metric.score(guess, judge) for guess in guesses]
        if hedged and _better(hedged, baseline, metric):
            baseline = hedged
            better.append(metric.kind)
        found += [
            Score(ours.target.id, metric.kind, value, base, ours.target.round)
            for ours, value, base in zip(real.reconstructions, values, baseline, strict=True)
        ]
    rounds = {item.target.round or 0 for item in real.reconstructions} if better else set()
    return found, {(at, f"blind_prior: {', '.join(better)}") for at in rounds}


def _better(first: list[float], second: list[float], metric: Metric) -> bool:
    """Whether the mean of the first scores shows more than that of the second; NaN never does."""
    sign = 1 if metric.higher_is_leakier else -1
    return sign * fmean(first) > sign * fmean(second)


def save_reconstructions(items: tuple[Reconstruction, ...], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for number, item in enumerate(items):
        tensors[f"{number}.confidence"] = item.confidence.contiguous()
        if item.samples is not None:
            tensors[f"{number}.samples"] = item.samples.contiguous()
        if item.labels is not None:
            tensors[f"{number}.labels"] = item.labels.contiguous()
    store(tensors, path)
