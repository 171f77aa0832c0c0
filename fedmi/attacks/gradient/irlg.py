"""iLRG: how many records of each class, from class-wise embeddings."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.labels.attack import LabelAttack
from fedmi.attacks.engine.labels.layer import head_with_bias


class IRLG(LabelAttack):
    """The labels of a batch by solving for the number of records of each class.

    Row k of the last layer's weight gradient over entry k of its bias gradient, h_k = G_k / b_k,
    is about the mean feature of the records of class k; one pass through that layer gives their
    posterior p_k. The counts solve n b_i = sum_k n_k (p_ki - [i = k]), sum_k n_k = n by the
    pseudo-inverse, are rounded, and mended to sum to n.

    Near exact, repeats and all, on untrained networks, but for classes whose share of the batch is
    about their mean posterior: there b_k vanishes and h_k is noise. On a trained one p_kk is near
    1, the system near singular, and h_k leans to the hardest records. Threat model:
    honest-but-curious, sees one update; several steps are read as one gradient. Raises AttackError
    if the last layer is not linear or has no bias.
    """

    kind: Literal["irlg"] = "irlg"
    paper: ClassVar[str] = (
        "Ma, Sun, Cui, Li, Guan, Liu: Instance-wise Batch Label Restoration via Gradients in "
        "Federated Learning, ICLR 2023"
    )

    def unsuited(self, network: nn.Module) -> str:
        try:
            head_with_bias(network)
        except AttackError as error:
            return str(error)
        return ""

    def recovered(self, case: Case, evidence: Evidence) -> tuple[Tensor, Tensor]:
        return METHODS["irlg"](case, evidence)
