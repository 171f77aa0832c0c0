"""Both ends of what careful clients notice: measured at the client, asked for aside in the end."""

from collections.abc import Collection, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedmi.deployments.base import DeploymentError, Noticed, Sent
from fedmi.deployments.determinism import drawn_from, one_thread
from fedmi.deployments.federated.detectors.base import Received
from fedmi.deployments.federated.plan import Plan
from fedmi.exposure import wire
from fedmi.protections.base import Tensors

NOTICED = "query.noticed"
"""The simulator asks what a client has measured; no party of the deployment can."""
BEFORE, MEASURED = "fedmi-before", "fedmi-measured"
"""In a client's own state: the model it was sent before, and its measurements so far."""


def notice(plan: Plan, client: int, round: int, sent: Tensors, context: Context) -> None:
    """Measure what was sent, before training on it; the training is the same bit for bit."""
    if not plan.detectors:
        return
    state = context.state
    before = state.array_records.get(BEFORE)
    seen = received(plan, client, round, sent, wire.to_tensors(before) if before else None)
    with one_thread(), drawn_from(plan.schedule.client_seed(round, client).child("detectors")):
        able = [d for d in plan.detectors if len(seen.labels) >= d.fewest]
        values = {f"{round}/{d.kind}": d.measure(seen) for d in able}
    known = state.config_records.get(MEASURED, ConfigRecord())
    state.config_records[MEASURED] = ConfigRecord({**known, **values})
    state.array_records[BEFORE] = wire.to_record(sent)


def received(
    plan: Plan, client: int, round: int, sent: Tensors, before: Tensors | None
) -> Received:
    """What the client has to go by; the module is the process's scratch, loaded anew to train."""
    model = plan.scratch
    model.load_state_dict(wire.like(sent, model.state_dict()))
    model.train(plan.work.recipe.mode == "train")
    first = plan.schedule.steps(round, client)[0]
    step = plan.private.take(plan.schedule.parts[client][first])
    return Received(
        network=model,
        sent=sent,
        before=before,
        inputs=torch.from_numpy(step.inputs),
        labels=torch.from_numpy(step.labels),
        agreed=plan.agreed,
    )


def answer(context: Context) -> RecordDict:
    """The reply to NOTICED: all that the client has measured."""
    measured = context.state.config_records.get(MEASURED, ConfigRecord())
    return RecordDict({wire.CONFIG: measured, wire.ARRAYS: ArrayRecord({})})


def ask(
    plan: Plan, aside: Grid, clients: Mapping[int, int], altered: Collection[tuple[int, int]]
) -> tuple[Noticed, ...]:
    """What all clients have measured, by round and client; `altered` are the (round, client) that
    were sent another model than the honest one. Nothing is asked where nobody measures."""
    if not plan.detectors:
        return ()
    questions = [Message(RecordDict(), node, NOTICED) for node in clients]
    found = []
    for reply in aside.send_and_receive(questions):
        client = clients[reply.metadata.src_node_id]
        if reply.has_error():
            raise DeploymentError(f"'{plan.name}', client {client}: {wire.failure(reply)}")
        for key, value in reply.content.config_records[wire.CONFIG].items():
            number, _, detector = key.partition("/")
            what = sent_in(plan, int(number), client, altered)
            found.append(Noticed(int(number), client, detector, float(str(value)), what))
    return tuple(sorted(found, key=lambda one: (one.round, one.client, one.detector)))


def sent_in(plan: Plan, round: int, client: int, altered: Collection[tuple[int, int]]) -> Sent:
    """What the client was sent: a model of another architecture than the one agreed on is no
    measure of honest ones, nor is one that comes after an altered one or is trained with a
    malicious client."""
    if (round, client) in altered:
        return "altered"
    other = dict(plan.setting.layout) != dict(plan.agreed)
    after = any(at < round for at, _ in altered)
    return "tainted" if other or after or plan.intruder else "honest"
