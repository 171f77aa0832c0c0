"""What the runner itself can tell of the evidence: guessing models, and a prior-only gone blind."""

from collections.abc import Sequence

import numpy as np
import torch

from fedmi.attacks.base import Reconstruction
from fedmi.attacks.engine.evidence import MUTE
from fedmi.data.records import Records, Split
from fedmi.deployments.base import Outcome
from fedmi.exposure.knowledge import Target
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Position
from fedmi.scenario.cells import TrainingCell
from fedmi.training.local import evaluate

Found = set[tuple[int, str]]
"""(round, flag); round 0 stands for the finished model."""


def chance(records: Records) -> float:
    """Accuracy of always naming the commonest class."""
    return float(np.bincount(records.labels).max() / len(records))


def untrained(
    training: TrainingCell, outcome: Outcome, split: Split, targets: Sequence[Target]
) -> frozenset[int]:
    """Rounds of the targets whose global model is no better than guessing."""
    rounds = {target.round or 0 for target in targets}
    return frozenset(at for at in rounds if guesses(training, outcome, split, at))


def guesses(training: TrainingCell, outcome: Outcome, split: Split, round: int) -> bool:
    """Whether the model at the start of the round (0: the finished one) is no better than guessing.

    That is: as many held-out records right as the commonest class has, or up to two standard
    errors more. Where no party sees models on the way (training on shares), the finished one
    counts.
    """
    state = outcome.state
    if round and Position.CLIENT in outcome.transcripts:
        state = outcome.transcripts[Position.CLIENT].global_model(round)
    seed = Seed.root(0).child("evaluated")
    model = training.network.build(split.private.shape, split.classes, seed)
    model.load_state_dict(dict(state))
    held_out, most = split.held_out, chance(split.held_out)
    inputs, labels = torch.from_numpy(held_out.inputs), torch.from_numpy(held_out.labels)
    accuracy, _ = evaluate(model, inputs, labels)
    return bool(accuracy <= most + 2 * float(np.sqrt(most * (1 - most) / len(held_out))))


def noticed(reconstructions: Sequence[Reconstruction], untrained: frozenset[int]) -> Found:
    """What the attack noticed, and models that had learned nothing."""
    told = {(r.target.round or 0, flag) for r in reconstructions for flag in r.flags}
    return told | {(at, "untrained_model") for at in untrained}


def weak_prior(ours: Sequence[Reconstruction], theirs: Sequence[Reconstruction]) -> Found:
    """Targets whose prior-only attack found nothing to read, or was weaker by its own flags, while
    the real one was not."""
    found: Found = set()
    for real, prior in zip(ours, theirs, strict=True):
        at, names = real.target.round or 0, {flag.partition(":")[0] for flag in real.flags}
        alone = {flag.partition(":")[0] for flag in prior.flags} - names
        if alone & MUTE:
            found.add((at, "prior_only_blind"))
        found |= {(at, f"prior_only_weaker: {name}") for name in alone - MUTE}
    return found
