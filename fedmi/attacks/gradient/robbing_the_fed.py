"""Records out of the bins of a planted imprint block."""

from typing import ClassVar, Literal

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.evidence import MUTE, Evidence, blind, read
from fedmi.attacks.engine.imprinted import (
    Found,
    answered,
    bins,
    block_of,
    edges,
    planted,
    rounding,
)
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.imprint import Imprinted


class RobbingTheFed(Attack):
    """Divides what each bin of an imprint block learnt from the records in it by its bias.

    The quotient is the record that is alone in its bin, exactly for one local step, and else the
    mean of the bin's records weighted by their gradients. As many bins as the target has records
    are returned: those first whose quotient has values in [0, 1] and the brightness of its bin,
    which what is left of rounding, noise or pruning has not. After several local steps (flag
    "several_local_steps") ReLU bins mix; `hard` ones hold as long as updates are smaller than a
    bin. Flag "fewer_bins_than_records": some records surely share a bin.

    Threat model: a malicious server that runs the deployment's malice of the same kind. The target
    of an aggregate is the batch of all its clients, which need about as many bins as the records
    of them all. Bins are read off the model that was sent. Raises AttackError where nothing is
    planted, as where clients pin the architecture.
    """

    kind: Literal["robbing_the_fed"] = "robbing_the_fed"
    paper: ClassVar[str] = (
        "Fowl, Geiping, Czaja, Goldblum, Goldstein: Robbing the Fed: Directly Obtaining Private "
        "Data in Federated Learning with Modified Models. ICLR 2022"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER

    channels: ClassVar = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE})
    needs: ClassVar = frozenset(
        {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}
    )
    exploits: ClassVar = frozenset({"robbing_the_fed"})

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        network = block_of(case)
        answers: list[Reconstruction] = []
        for done, evidence in enumerate(read(case, self.channel), start=1):
            mute = bool(evidence.flags & MUTE)
            answers.append(
                blind(case, evidence) if mute else self._emptied(case, network, evidence)
            )
            case.progress(done / len(case.targets))
        return tuple(answers)

    def _emptied(self, case: Case, network: Imprinted, evidence: Evidence) -> Reconstruction:
        block = planted(case, evidence, evidence.target.clients[0])
        weight, bias = bins(case, network, evidence, block)
        low, high = edges(block["first.weight"].sum(1), block["first.bias"])
        quotients = weight / bias.where(bias != 0, 1.0)[:, None]
        samples = quotients.view(-1, *evidence.input_shape)
        floor = rounding(case, evidence, block["first.bias"])
        found = Found(samples, bias, low, high, floor)
        return answered(case, evidence, [(found.rescaled(), evidence.records)], frozenset())
