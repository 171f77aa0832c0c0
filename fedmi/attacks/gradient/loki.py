"""Each client's records out of an aggregate, by the place that LOKI gave them."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.evidence import MUTE, Evidence, blind, observation_of, read
from fedmi.attacks.engine.imprinted import Found, answered, bins, block_of, edges, planted
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import Shape
from fedmi.models.imprint import Imprinted, interior, ring


class Loki(Attack):
    """Robbing the Fed client by client, in the columns of the sum that each client alone can fill.

    A client's records stand in the columns of its group of channels, as delta F (x + r) with the
    scaling factor F, and delta F r in the ring around the copy, for a record of gradient delta. So
    the ring is a bias gradient of each client's own and gives delta, where the bias gradient is a
    sum over all clients (the paper has the brightness of the bin in its place); averaged over many
    entries it suffers least from quantisation. Of each client as many bins are returned as it has
    records, ranked and flagged as by `robbing_the_fed`.

    Threat model: a malicious server that runs the deployment's malice of the same kind and needs to
    see no more than the sum of the clients' updates. Which columns are whose is read off the model
    that each was sent. Raises AttackError where nothing is planted, as where clients pin the
    architecture.
    """

    kind: Literal["loki"] = "loki"
    paper: ClassVar[str] = (
        "Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi: LOKI: Large-scale Data "
        "Reconstruction Attack against Federated Learning through Model Manipulation. IEEE S&P 2024"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER

    channels: ClassVar = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE})
    needs: ClassVar = frozenset(
        {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}
    )
    exploits: ClassVar = frozenset({"loki"})

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        network = block_of(case)
        answers: list[Reconstruction] = []
        for done, evidence in enumerate(read(case, self.channel), start=1):
            mute = bool(evidence.flags & MUTE)
            answers.append(
                blind(case, evidence) if mute else self._separated(case, network, evidence)
            )
            case.progress(done / len(case.targets))
        return tuple(answers)

    def _separated(self, case: Case, network: Imprinted, evidence: Evidence) -> Reconstruction:
        block = planted(case, evidence, evidence.target.clients[0])
        weight, _ = bins(case, network, evidence, block)
        parts = []
        counts = _counts(case, evidence, self.channel)
        for client, count in zip(evidence.target.clients, counts, strict=True):
            own = planted(case, evidence, client)
            parts.append((_held(weight, own, case.knowledge.input_shape), count))
        return answered(case, evidence, parts, frozenset())


def _held(weight: Tensor, block: Mapping[str, Tensor], shape: Shape) -> Found:
    """What the bins hold of the client that was sent this block; weight: [bins, inputs]."""
    kernels, biases = block["copies.weight"], block["copies.bias"]
    group = int(kernels.flatten(1).abs().sum(1).argmax()) // shape[0]
    factor = kernels[group * shape[0]].max()
    shown = biases[group * shape[0]] / factor
    around = ring(weight, shape)[:, group].mean(1)
    copies = interior(weight, shape)[:, group]
    samples = shown * (copies / around.where(around != 0, 1.0)[:, None, None, None] - 1)
    reach = factor * interior(block["first.weight"], shape)[:, group].flatten(1).sum(1)
    low, high = edges(reach, block["first.bias"] + shown * reach)
    return Found(samples, around, low, high, torch.zeros_like(low))


def _counts(case: Case, evidence: Evidence, channel: Channel) -> list[int]:
    """Records of each client of the target; equal shares where only the sum is known."""
    clients = evidence.target.clients
    told = observation_of(case, evidence.target, channel).clear
    each = [round(told.get(f"num_examples/{client}", 0)) for client in clients]
    if all(each):
        return each
    share, more = divmod(evidence.records, len(clients))
    return [share + (place < more) for place in range(len(clients))]
