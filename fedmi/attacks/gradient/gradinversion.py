"""GradInversion (See through Gradients): a group of seeds that match a gradient and agree."""

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fedmi.attacks.base import Case
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.distances import Distance
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.labels import LabelMethod, recover
from fedmi.attacks.engine.matching import Coupling, Problem
from fedmi.attacks.engine.penalties import GroupConsistency, Penalty, PixelNorm
from fedmi.attacks.engine.smooth_matching import SmoothMatching


class GradInversion(SmoothMatching):
    """Records found by several seeds that match the gradient in L2 and are pulled together.

    Minimises, over all seeds x_g of a target at once,
    |grad(x_g) - g|^2 / unit + tv_weight TV(x_g) + l2_weight |x_g - 0.5|^2
    + bn_weight R_BN(x_g) + group_weight |x_g - E|^2, norms as means over pixels, by Adam with
    warmup and half a cosine, x kept in [0, 1]; `noise` adds Langevin's after each step. E, the
    consensus, is the mean of the seeds, each record first moved by up to `shift` pixels to where it
    fits that mean best: whole shifts, in place of the paper's learned flow. R_BN compares the
    batch's normalisation statistics with those that the client sent, and is there only where the
    fact `bn_statistics` is granted and the client was in train mode. The seed of lowest loss is the
    answer. A group of four is better than the best of four on their own, but of equal work a single
    seed with four times the steps was as good, so that one is what is done unless told otherwise.

    Labels that are not granted are read by `label_recovery`, the paper's own by default; it
    takes a batch to hold each label once, and the flag `labels_not_distinct` says where it shows
    that it does not; `bn_statistics_absent`, that granted statistics have nothing to match. An
    update is simulated or read as one gradient as in `inverting_gradients`.
    `unit` is the distance of a grey image, so that the weights serve networks of any scale.
    Threat model: honest-but-curious, sees one update and the model it started from; the statistics
    of the batch are declared knowledge. Samples [n, C, H, W] in [0, 1]. Raises AttackError if an
    observation is missing, granted labels do not fit it, or the last layer is not linear.
    """

    kind: Literal["gradinversion"] = "gradinversion"
    restarts: int = Field(
        default=1, ge=1, le=1024, description="seeds a target; several are a group, as in the paper"
    )
    sign: Literal["none", "hard", "soft"] = Field(
        default="hard", description="Adam follows the slope (as in the paper), or its sign"
    )
    warmup: int = Field(default=50, ge=0, description="steps over which the step size rises")
    noise: float = Field(
        default=0.0, ge=0, le=10, description="Langevin noise, in step sizes (the paper's is 0.2)"
    )
    tv_weight: float = Field(default=0.3, ge=0, description="weight of TV, in units of `tv_unit`")
    l2_weight: float = Field(
        default=0.0, ge=0, description="weight of the mean square distance from mid-grey"
    )
    group_weight: float = Field(
        default=1.0, ge=0, description="weight of the distance to the consensus of the seeds"
    )
    shift: int = Field(
        default=0, ge=0, le=8, description="pixels by which records are moved to fit the consensus"
    )
    label_recovery: LabelMethod = Field(
        default="gradinversion", description="how labels that are not granted are read first"
    )

    paper: ClassVar[str] = (
        "Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov: See through Gradients: Image Batch "
        "Recovery via GradInversion, CVPR 2021"
    )
    channels: ClassVar = UPDATES
    distance_kind: ClassVar[Distance] = "l2"
    bn_relative: ClassVar[bool] = False

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign=self.sign,
            decay="cosine",
            warmup=self.warmup,
            noise=self.noise,
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def further(self, case: Case, evidence: Evidence) -> tuple[Penalty, ...]:
        return (PixelNorm(self.l2_weight),) if self.l2_weight else ()

    def coupling(self, case: Case, evidence: Evidence) -> Coupling | None:
        if self.restarts == 1 or not self.group_weight:
            return None
        return GroupConsistency(self.group_weight, self.shift)

    def problem(self, case: Case, evidence: Evidence) -> Problem:
        if (
            self.label_recovery == "gradinversion"
            and evidence.target.id not in case.knowledge.labels
        ):
            sure = recover(case, evidence, self.label_recovery)[1]
            told = frozenset[str]() if bool((sure > 0).all()) else {"labels_not_distinct"}
            evidence = replace(evidence, flags=evidence.flags | told)
        return super().problem(case, evidence)
