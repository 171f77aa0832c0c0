"""Labels that can be: the right number of them, each a class of the model."""

from dataclasses import replace

from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind


class RecordsDoNotFit(AttackError):  # noqa: N818
    """The attack, or the labels granted to it, takes another number of records than a target's."""


def unfit(case: Case, evidence: Evidence, *, samples: bool = True) -> Reconstruction:
    """The blind answer to a target that `RecordsDoNotFit`, flagged."""
    several = "" if evidence.records == 1 else "s"
    flag = f"records_do_not_fit: {evidence.records} record{several}"
    return blind(case, replace(evidence, flags=evidence.flags | {flag}), samples=samples)


def checked(case: Case, evidence: Evidence, labels: Tensor, source: str = "granted") -> Tensor:
    """The labels [records] as they are; AttackError, naming target and label, if they cannot be,
    and `RecordsDoNotFit` if there are more or fewer of them than records."""
    name, classes = evidence.target.id, case.knowledge.classes
    if labels.dim() != 1 or len(labels) != evidence.records:
        raise RecordsDoNotFit(
            f"target '{name}': {labels.numel()} labels {source}, but the update holds "
            f"{evidence.records} records"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise AttackError(f"target '{name}': labels {source} are {labels.dtype}, not integers")
    for label in labels.tolist():
        if not 0 <= label < classes:
            raise AttackError(
                f"target '{name}': label {label} {source}, but the classes are 0 to {classes - 1}"
            )
    return labels


def granted(case: Case, evidence: Evidence) -> Tensor | None:
    """The target's labels where they are granted, `checked`; else None."""
    labels = case.knowledge.labels.get(evidence.target.id)
    return None if labels is None else checked(case, evidence, labels)
