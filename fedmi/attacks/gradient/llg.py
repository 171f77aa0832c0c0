"""Label leakage from gradients: LLG, LLG* and LLG+."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.labels.attack import LabelAttack, signed
from fedmi.exposure.words import Fact


class LLG(LabelAttack):
    """The labels of a batch from g_k, the sum of row k of the last layer's weight gradient.

    Behind non-negative features g_k < 0 shows that class k is in the batch, and each of its
    records adds an impact m < 0 to g_k, the other records an offset s_k. Every class with g_k < 0
    is named once; the rest of the n labels go one by one to the least g_k - s_k, from which m is
    taken off at each naming. K is the number of classes.

    - `llg`: the gradient alone, m = (1 + 1/K) / n times the sum of the negative g_k, s = 0.
    - `llg_star`: white box, m and s by sending dummy inputs (zeros, ones, noise), each labelled as
      every class, through the model.
    - `llg_plus`: the same with the granted public records; each stands for its own class where the
      model agrees with at least half of the public labels, else (other classes, or a model that
      knows nothing yet) every record stands for every class.

    m is one number for all classes and records: right on untrained networks; on a trained one
    records differ in impact a hundredfold, and counts follow the hardest. Threat model:
    honest-but-curious, sees one update. An update of several steps is read as one gradient. Raises
    AttackError if the last layer is not linear; flags "negative_features" where the theory needs
    the last layer's inputs to be non-negative and they are not.
    """

    kind: Literal["llg"] = "llg"
    paper: ClassVar[str] = (
        "Wainakh, Ventola, Muessig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Muehlhaeuser: "
        "User-Level Label Leakage from Gradients in Federated Learning, PoPETs 2022"
    )

    variant: Literal["llg", "llg_star", "llg_plus"] = Field(
        default="llg", description="where impact and offset come from: gradient, dummies, public"
    )

    uses: ClassVar = frozenset({Fact.PUBLIC_DATA})

    @property
    def required_facts(self) -> frozenset[Fact]:
        return self.needs | self.uses if self.variant == "llg_plus" else self.needs

    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return METHODS[self.variant](case, evidence)

    def noted(self, case: Case, evidence: Evidence, confidence: Tensor) -> frozenset[str]:
        return signed(case, evidence)
