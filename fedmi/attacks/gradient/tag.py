"""TAG: sentences whose gradient is the observed one in L2 and L1."""

from typing import ClassVar, Literal

from pydantic import Field

from fedmi.attacks.base import Case
from fedmi.attacks.engine.distances import Distance
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.penalties import Penalty
from fedmi.attacks.engine.text_matching import TextMatching
from fedmi.attacks.engine.text_penalties import LayerAbsolute


class TAG(TextMatching):
    """Sentences found by matching the update in the L2 norm and, layer by layer, in the L1 norm.

    Minimises sum over tensors l of |found_l - wanted_l|_2^2 + alpha w_l |found_l - wanted_l|_1 over
    the tokens' vectors by Adam, w_l falling from the first layer to the last (`layer_weights`);
    each vector becomes the closest token in the end. See `TextMatching` for lengths, labels and
    what is returned: samples [n, 1, 1, length] of ids. The paper has no `place_weight` and no token
    set, takes lengths as known, and finds labels with the tokens (`label_search = "joint"`).

    Threat model: honest-but-curious, sees one update and the model it started from. Raises
    AttackError if the model is no text classifier.
    """

    kind: Literal["tag"] = "tag"
    paper: ClassVar[str] = (
        "Deng, Wang, Li, Wang, Shang, Liu, Rajasekaran, Ding: TAG: Gradient Attack on "
        "Transformer-based Language Models. Findings of EMNLP 2021"
    )

    steps: int = Field(default=1000, ge=1, le=1_000_000, description="evaluations of the loss")
    alpha: float = Field(default=0.1, ge=0, le=1e3, description="weight of the L1 norm")
    layer_weights: Literal["falling", "equal"] = Field(
        default="falling", description="of the L1 norms: from 1 down to 0 with depth, or 1"
    )

    distance_kind: ClassVar[Distance] = "l2"

    def penalties(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        falling = self.layer_weights == "falling"
        own = LayerAbsolute(self.alpha, falling, self.simulates(evidence))
        return (*super().penalties(case, evidence), *((own,) if self.alpha else ()))
