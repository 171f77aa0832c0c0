"""iDLG, Improved Deep Leakage from Gradients: the label by its sign first, then the record."""

from typing import ClassVar, Literal

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.labels import METHODS, RecordsDoNotFit, guessed, silent
from fedmi.attacks.engine.leakage import DeepLeakage


class IDLG(DeepLeakage):
    """One record found by matching its gradient in the L2 norm, its label read off beforehand.

    The label is that of the one negative entry of the last layer's gradient, exact for one record
    and one step; the pixels minimise |grad(x', y) - g|^2 / |g|^2 by L-BFGS as in `DLG`, without
    labels to search for. A client's several steps on its one record are simulated.

    Threat model: honest-but-curious, sees the update of a single record and the model it started
    from. Labels that are granted are used instead. Flag `not_converged`: no restart's loss fell
    below `solved`. An update of several records (use `dlg` or `inverting_gradients`) is answered
    blindly (flag `records_do_not_fit`). Raises AttackError where there is no other, or for a model
    whose last layer is not linear (use `dlg`).
    """

    kind: Literal["idlg"] = "idlg"
    paper: ClassVar[str] = "Zhao, Mopuri, Bilen: iDLG: Improved Deep Leakage from Gradients, 2020"

    channels: ClassVar = UPDATES

    def labels_of(self, case: Case, evidence: Evidence) -> Tensor:
        if evidence.records != 1:
            raise RecordsDoNotFit(
                f"target '{evidence.target.id}': iDLG recovers a single record, this update holds "
                f"{evidence.records}; use the attack 'dlg' or 'inverting_gradients'"
            )
        if evidence.target.id in case.knowledge.labels:
            return super().labels_of(case, evidence)
        if silent(case, evidence):
            return guessed(case, evidence)
        return METHODS["idlg"](case, evidence)[0]
