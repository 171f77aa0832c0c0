"""Robbing the Fed: an imprint block that tells records apart by their brightness."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from fedmi.deployments.federated.malice.base import Occasion
from fedmi.deployments.federated.malice.imprinting import Imprinting, block


class RobbingTheFed(Imprinting):
    """Every client trains the model behind an imprint block, the same for all.

    Unit i of the block's first layer is relu(gain (h(x) - q_i)) with the brightness h(x) (the mean
    of the record) and q_i its quantile i / bins among the adversary's public records. Columns of
    the second layer are the same for all units but for a known sign, so a record has the same
    gradient delta at all units it reaches, and

        dW_i - dW_{i+1} = sum delta x,    db_i - db_{i+1} = sum delta    over q_i <= h(x) < q_{i+1}

    whose quotient is the record, if it is alone between the two: of n records a share (1 - 1 /
    bins)^(n - 1), where the public records are like the private ones. `hard` units (the paper's
    sparse variant) answer to the records between the two alone, so no difference is taken.

    The block adds its output to the record. Its columns are the smallest that make every label's
    loss answer with `strength`, so the model behind it hardly notices; in rounds that are not
    named the block starts from nothing. Threat model: a malicious server that dictates the
    architecture; it sees the aggregate or single updates. A client that compares the model with
    the one agreed on sees two more layers. Refused for more bins than a record has numbers.
    """

    kind: Literal["robbing_the_fed"] = "robbing_the_fed"
    paper: ClassVar[str] = (
        "Fowl, Geiping, Czaja, Goldblum, Goldstein: Robbing the Fed: Directly Obtaining Private "
        "Data in Federated Learning with Modified Models. ICLR 2022"
    )
    alters: ClassVar = "an imprint block of two linear layers in front of the model"

    def alter(
        self, model: Mapping[str, Tensor], client: int, occasion: Occasion
    ) -> Mapping[str, Tensor]:
        planted = self.planted(model, occasion)
        entries = len(planted.columns)
        first = (planted.slopes[:, None] / entries).expand(-1, entries)
        parts = {
            "first.weight": first,
            "first.bias": planted.offsets,
            "second.weight": planted.columns,
            "second.bias": planted.shift,
        }
        return {**model, **block(parts)}
