"""How the tensors that were sent differ from those agreed on."""

from typing import ClassVar, Literal

from fedmi.deployments.federated.detectors.base import Detector, Received


class ArchitectureDiff(Detector):
    """Counts the tensors that are not those of the architecture agreed on.

        statistic = |{names whose shapes differ, or that only one of the two has}|

    Zero for every honest model, so that it has no false alarms; blind to altered values. What it
    measures is what `pin_architecture` refuses.
    """

    kind: Literal["architecture_diff"] = "architecture_diff"
    of_model_alone: ClassVar = True

    def statistic(self, seen: Received) -> float:
        sent = {name: tuple(tensor.shape) for name, tensor in seen.sent.items()}
        names = sent.keys() | seen.agreed.keys()
        return float(sum(sent.get(name) != seen.agreed.get(name) for name in names))
