"""iDLG: the label of a single record."""

from typing import ClassVar, Literal

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.labels.attack import LabelAttack


class IDLGLabels(LabelAttack):
    """The label of the one record behind an update, from the sign of the last layer's gradient.

    Exact for one step on one record, whatever the weights. An update of several steps is read as
    one gradient (update / (learning rate x steps)); the sign survives as long as the record is
    not yet learnt past certainty. Threat model: honest-but-curious, sees one update.
    An update of more than one record (use `bias_labels` or `irlg`) is answered with a guess (flag
    `records_do_not_fit`). Raises AttackError where there is no other, or for a model whose last
    layer is not linear.
    """

    kind: Literal["idlg_labels"] = "idlg_labels"
    paper: ClassVar[str] = "Zhao, Mopuri, Bilen: iDLG: Improved Deep Leakage from Gradients, 2020"

    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return METHODS["idlg"](case, evidence)
