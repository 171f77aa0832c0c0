"""Which protections the adversary knows of, and those that its attack has no answer to."""

from fedmi.attacks.base import Case

NOT_ADAPTIVE = "not_adaptive"
PRUNING = "gradient_pruning"
FRESH_NOISE = ("dp_sgd", "user_level_dp", "additive_noise", "quantization")
"""Kinds that perturb every update anew. Averaging over rounds would undo it; but where a client's
next update is of another minibatch at another model, there is nothing to average."""


def names(case: Case, kind: str) -> bool:
    """Whether the deployment is known to use this kind of protection."""
    return any(kind in title for title in case.knowledge.protections)


def unanswered(case: Case) -> frozenset[str]:
    """The flag "not_adaptive" where the deployment is known to add noise, whatever the attack."""
    known = any(names(case, kind) for kind in FRESH_NOISE)
    return frozenset({NOT_ADAPTIVE}) if known else frozenset()
