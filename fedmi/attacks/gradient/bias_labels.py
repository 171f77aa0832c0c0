"""Label counts of a batch from the last layer's bias gradient."""

from typing import ClassVar, Literal

from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.labels.attack import LabelAttack
from fedmi.exposure.words import Fact


class BiasLabels(LabelAttack):
    """The labels of a batch: counts n_k = n (mean p_k - b_k) from the last layer's bias gradient b.

    Counting by the model's mean answer to dummy inputs is Geng et al.'s, who read it from the
    weight gradient; here it is read from the bias where there is one, and the labels are named
    greedily, first those with b_k < 0 (the order of LLG, Wainakh et al. 2022). The mean answer p
    is estimated on smooth noise, or on public inputs where granted. On an untrained model p is
    nearly the same for every input and the counts are nearly exact; on a trained one they rest on
    that estimate, and confidence falls with how much p varies. An update of several steps is read
    as one gradient (update / (learning rate x steps)). One record falls back to iDLG. Threat
    model: honest-but-curious, sees one update. Raises AttackError if the last layer is not linear.
    """

    kind: Literal["bias_labels"] = "bias_labels"
    paper: ClassVar[str] = (
        "Geng, Mou, Li, Li, Beyan, Decker, Rong: Towards General Deep Leakage in Federated "
        "Learning, 2021"
    )

    uses: ClassVar = frozenset({Fact.PUBLIC_DATA})

    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return METHODS["idlg" if evidence.records == 1 else "bias"](case, evidence)
