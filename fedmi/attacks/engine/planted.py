"""What an update says where a malicious server had clients start from a model it altered."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence, read
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Transcript
from fedmi.exposure.words import Channel

UNALTERED = "nothing_planted"
SEVERAL_MODELS = "clients_sent_different_models"


def altered(transcript: Transcript, target: Target) -> Mapping[str, Tensor] | None:
    """The model that the target's clients were sent in place of the honest one; None if that was
    the honest one."""
    if target.round is None:
        return None
    honest, sent = transcript.global_model(target.round), _sent(transcript, target)
    if all(torch.equal(sent[0][name], honest[name]) for name in honest if name in sent[0]):
        return None
    return sent[0]


def planted(case: Case, channel: Channel) -> tuple[Evidence, ...]:
    """The evidence for each target, in order, with the altered model as the one it started from.

    Observed updates are honest model + (local - sent), so the descent is sent - local all the
    same; the known weight decay is taken off at the weights where it acted. Flag
    "nothing_planted": the target's clients got the honest model. AttackError if all did.
    """
    assert case.knowledge.work is not None
    decay = case.knowledge.work.recipe.weight_decay
    found = [_planted(case, evidence, decay) for evidence in read(case, channel)]
    if found and all(UNALTERED in evidence.flags for evidence in found):
        raise AttackError(
            "the server altered no model in these rounds, or clients refused what it sent: give "
            "the deployment a malice, and attack a round that it names"
        )
    return tuple(found)


def _planted(case: Case, evidence: Evidence, decay: float) -> Evidence:
    sent = altered(case.transcript, evidence.target)
    if sent is None:
        return replace(evidence, flags=evidence.flags | {UNALTERED})
    gradient = evidence.gradient
    if not evidence.of_gradient and decay:
        gradient = {
            name: slope + decay * (evidence.base[name] - sent[name])
            for name, slope in gradient.items()
        }
    alike = _alike(_sent(case.transcript, evidence.target))
    flags = evidence.flags | (frozenset() if alike else {SEVERAL_MODELS})
    return replace(evidence, base=sent, gradient=gradient, flags=flags)


def _sent(transcript: Transcript, target: Target) -> list[Mapping[str, Tensor]]:
    assert target.round is not None
    return [transcript.model_sent(target.round, client) for client in target.clients]


def _alike(models: Sequence[Mapping[str, Tensor]]) -> bool:
    first = models[0]
    return all(torch.equal(first[name], other[name]) for other in models[1:] for name in first)
