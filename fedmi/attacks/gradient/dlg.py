"""DLG, Deep Leakage from Gradients: records and labels whose gradient is the observed one."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.leakage import DeepLeakage
from fedmi.attacks.engine.unknowns import PixelsAndLabels, Unknown
from fedmi.exposure.words import Fact


class DLG(DeepLeakage):
    """Records and labels found together by matching the observed gradient in the L2 norm.

    Minimises |grad(x', softmax(z')) - g|^2 / |g|^2 over pixels x' (not held in [0, 1] on the way)
    and logits z' of soft labels by L-BFGS: one evaluation a step, Wolfe's conditions, every target
    with a history and a step length of its own. The best of `restarts` by that loss is returned,
    the label being the largest of z'. Labels that are granted are used, and not searched for. A
    client update or an aggregate is matched by the local training it came from, simulated, or read
    as one gradient where `local_simulation` is off; as labels are searched for, how they were dealt
    over the steps need not be known.

    Threat model: honest-but-curious, sees one update and the model it started from; labels are not
    needed. Smooth activations: second derivatives of ReLU networks are zero almost everywhere, and
    the search stalls on them. Flags: `not_converged`, no restart's loss fell below `solved`;
    `several_records`, where a low loss does not vouch for the images: mixtures of four CIFAR-10
    images match their gradient on a LeNet to 1e-5 of a grey image's loss.
    The paper starts from N(0, 1) pixels (`init = "normal"`, `start_std = 1`), which costs L-BFGS
    far more steps than a start near mid-grey. Raises AttackError if an observation is missing, or
    granted labels do not fit it.
    """

    kind: Literal["dlg"] = "dlg"
    paper: ClassVar[str] = "Zhu, Liu, Han: Deep Leakage from Gradients. NeurIPS 2019"

    channels: ClassVar = UPDATES

    def labels_of(self, case: Case, evidence: Evidence) -> Tensor:
        """Those granted; else none are known, and zeros stand in for them."""
        if _granted(case, evidence):
            return super().labels_of(case, evidence)
        return torch.zeros(evidence.records, dtype=torch.long)

    def unknown(self, case: Case, evidence: Evidence) -> Unknown:
        if _granted(case, evidence):
            return super().unknown(case, evidence)
        shape = (evidence.plan.records, *evidence.input_shape)
        return PixelsAndLabels(shape, case.knowledge.classes)

    def start(self, case: Case, evidence: Evidence, number: int) -> Tensor:
        """Images as `init` says, and logits from N(0, 1)."""
        images = super().start(case, evidence, number)
        if _granted(case, evidence):
            return images
        rng = case.seed.child(evidence.target.id, "labels", number).torch()
        logits = torch.randn(len(images) * case.knowledge.classes, generator=rng)
        return torch.cat([images.flatten(), logits])

    def tries(self, case: Case, evidence: Evidence) -> int:
        return super().tries(case, evidence) if _granted(case, evidence) else self.restarts


def _granted(case: Case, evidence: Evidence) -> bool:
    return Fact.LABELS in case.knowledge.facts and evidence.target.id in case.knowledge.labels
