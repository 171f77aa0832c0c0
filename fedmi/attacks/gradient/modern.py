"""The modern recipe: the update's direction, smooth images, and features that it gives away."""

from typing import ClassVar, Literal

from pydantic import Field

from fedmi.attacks.base import Case
from fedmi.attacks.engine import adaptive
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.features import last_with_bias
from fedmi.attacks.engine.penalties import FeaturePenalty, Penalty
from fedmi.attacks.engine.protected import PRUNING, names
from fedmi.attacks.engine.smooth_matching import SmoothMatching


class Modern(SmoothMatching):
    """Records found by matching the direction of their gradient and their last features.

    Minimises (1 - cos(simulated, observed)) / unit + tv_weight TV(x)
    + feature_weight |f(x) - f|^2 / |f(grey) - f|^2, f the input of the last linear layer that the
    gradient gives away: of one record (dL/dW_k) / (dL/db_k); of several, the mean of each class,
    solved for as `features_by_class` says, exact where fewer records than classes all differ in
    label. Gradient matching sees the records only summed; this term holds each to its own. It is
    left out where the last layer is not linear or has no bias, and where the update was pruned or
    sent as signs. Adam, x kept in [0, 1]; step sizes rise over `warmup` steps and fall along half a
    cosine. The rest is as in `inverting_gradients`.

    Two parts of the published recipe are not the defaults. Its soft sign, tanh(s slope) / s with s
    from 1 to 0, is no sign at all for slopes as small as these, and the sign is what works; its
    start from a tile repeated over the image (`init = "patterned"`) gained 0.1 dB or cost one.
    Threat model: honest-but-curious, sees one update and the model it started from. Samples
    [n, C, H, W] in [0, 1]. Raises AttackError if an observation is missing, or granted labels do
    not fit it. Flag `bn_statistics_absent`: they are granted, and the update has none to match.
    """

    kind: Literal["modern"] = "modern"
    sign: Literal["none", "hard", "soft"] = Field(
        default="hard", description="Adam follows the slope, its sign, or a soft sign of it"
    )
    decay: Literal["none", "step", "cosine"] = Field(
        default="cosine", description="how the step size falls"
    )
    warmup: int = Field(default=50, ge=0, description="steps over which the step size rises")
    tv_weight: float = Field(default=0.5, ge=0, description="weight of TV, in units of `tv_unit`")
    feature_weight: float = Field(
        default=1.0, ge=0, description="weight of the features' distance, 1 for a grey image"
    )

    paper: ClassVar[str] = (
        "Geiping et al.: breaching, a framework for attacks against privacy in federated learning "
        "(its attack 'modern'), 2022"
    )
    channels: ClassVar = UPDATES

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign=self.sign,
            decay=self.decay,
            warmup=self.warmup,
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def further(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        layer = self._read_layer(case) if self.feature_weight else ""
        return (FeaturePenalty(self.feature_weight, layer),) if layer else ()

    def _read_layer(self, case: Case) -> str:
        """The layer whose inputs the update gives away, "" if it does not."""
        build = case.knowledge.build
        cut = names(case, adaptive.SIGNS) or names(case, PRUNING)
        return "" if build is None or (cut and self.adaptive) else last_with_bias(build())
