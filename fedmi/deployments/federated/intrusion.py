"""What the malicious client does in a round, and what it is told of itself."""

import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor, nn

from fedmi.data.records import Ints
from fedmi.deployments.federated.intruders.base import Visit
from fedmi.deployments.federated.plan import Plan
from fedmi.exposure import wire
from fedmi.training.local import batches

REMEMBERED = "fedmi-intruder"


def trained_on(
    plan: Plan, client: int, round: int, model: nn.Module, context: Context | None
) -> tuple[Tensor, Tensor, list[Ints]]:
    """(inputs, labels, minibatches of a client in a round), which an intruder chooses for itself.

    context: of its node, where it keeps its memory.
    """
    records = plan.private.take(plan.schedule.parts[client])
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.labels)
    intruder = plan.intruder
    if intruder is None or intruder.client != client or context is None:
        return inputs, labels, plan.schedule.steps(round, client)
    stored = context.state.array_records.get(REMEMBERED, ArrayRecord())
    memory, seed = wire.to_tensors(stored), plan.intruder_seed
    ploy = intruder.plot(Visit(round, model, inputs, labels, plan.classes, memory, seed))
    context.state.array_records[REMEMBERED] = wire.to_record(ploy.memory)
    steps = batches(len(ploy.labels), plan.work, plan.schedule.client_seed(round, client))
    return ploy.inputs, ploy.labels, steps
