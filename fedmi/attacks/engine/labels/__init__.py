"""The labels behind a gradient, from the last linear layer: one function a published rule."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels.best import auto
from fedmi.attacks.engine.labels.checks import RecordsDoNotFit, checked, granted, unfit
from fedmi.attacks.engine.labels.counts import batch_labels, bias
from fedmi.attacks.engine.labels.doubts import doubts, guessed, silent
from fedmi.attacks.engine.labels.gradinversion import gradinversion
from fedmi.attacks.engine.labels.irlg import irlg
from fedmi.attacks.engine.labels.layer import last_linear, probes
from fedmi.attacks.engine.labels.llg import llg, llg_plus, llg_star
from fedmi.attacks.engine.labels.single import idlg, single_label

__all__ = [
    "METHODS",
    "LabelMethod",
    "RecordsDoNotFit",
    "batch_labels",
    "checked",
    "doubts",
    "granted",
    "guessed",
    "last_linear",
    "probes",
    "recover",
    "silent",
    "single_label",
    "unfit",
]

LabelMethod = Literal[
    "auto", "idlg", "gradinversion", "llg", "llg_star", "llg_plus", "irlg", "bias"
]
METHODS: Mapping[LabelMethod, Callable[[Case, Evidence], tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        "auto": auto,
        "idlg": idlg,
        "gradinversion": gradinversion,
        "llg": llg,
        "llg_star": llg_star,
        "llg_plus": llg_plus,
        "irlg": irlg,
        "bias": bias,
    }
)
"""Each gives (labels [records], confidence [records]) of one target's evidence."""


def recover(case: Case, evidence: Evidence, method: LabelMethod = "auto") -> tuple[Tensor, Tensor]:
    """(labels, confidence), each [records], by one of `METHODS`.

    Raises AttackError where the method does not apply, or names a class that there is not.
    """
    labels, confidence = METHODS[method](case, evidence)
    return checked(case, evidence, labels, "recovered"), confidence
