"""GradInversion's labels: the classes of most negative gradient rows."""

from typing import ClassVar, Literal

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.labels.attack import LabelAttack, signed


class GradInversionLabels(LabelAttack):
    """The n labels of a batch as the n classes of smallest min_j G_kj, G [classes, features] being
    the last layer's weight gradient.

    Behind non-negative features (ReLU, sigmoid) only a class in the batch has a negative entry in
    its row, whatever the weights, so that this holds on trained models too. It assumes that no
    label repeats: where some do, the places left over go to classes that show no negative entry,
    with confidence 0 and the flag "labels_not_distinct"; with more records than classes the order
    starts over. It needs no bias. Confidence is 1 for a negative minimum and 0 else; behind
    features of either sign the flag "negative_features" says that it proves nothing. Threat model:
    honest-but-curious, sees one update. Raises AttackError if the last layer is not linear.
    """

    kind: Literal["gradinversion_labels"] = "gradinversion_labels"
    paper: ClassVar[str] = (
        "Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov: See through Gradients: Image Batch "
        "Recovery via GradInversion, CVPR 2021"
    )

    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return METHODS["gradinversion"](case, evidence)

    def noted(self, case: Case, evidence: Evidence, confidence: Tensor) -> frozenset[str]:
        distinct = bool((confidence > 0).all())
        repeats = frozenset[str]() if distinct else frozenset({"labels_not_distinct"})
        return repeats | signed(case, evidence)
