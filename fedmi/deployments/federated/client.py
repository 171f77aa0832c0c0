"""The Flower ClientApp: says which client a node is, and trains on that client's records."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedmi.deployments.determinism import drawn_from, one_thread
from fedmi.deployments.federated.intrusion import trained_on
from fedmi.deployments.federated.noticing import answer, notice
from fedmi.deployments.federated.plan import Plan
from fedmi.deployments.federated.strategies.base import Contribution
from fedmi.exposure import wire
from fedmi.exposure.words import Channel
from fedmi.protections.base import ClientSide, Tensors, Update, UpdateProtection
from fedmi.protections.transport import TransportSide
from fedmi.training.local import DivergedError

QUERY = "query.partition"
"""The message by which the server asks a node which client it is."""
CONFIDE = "query.confide"
"""The simulator asks what the client could tell as a colluder; no party of the deployment can."""
DECRYPT = "query.decrypt"
"""The simulator has a key holder decrypt; see `Transport.query`."""
KEPT = "fedmi-kept"


class ArchitectureRefusedError(RuntimeError):
    """A client that pins the architecture was sent another one."""


def client_app(load: Callable[[Context], Plan]) -> ClientApp:
    """The app of every client; `load` finds the plan and should cache what it reads."""
    app = ClientApp()

    @app.query("partition")
    def partition(message: Message, context: Context) -> Message:
        answer = ConfigRecord({wire.PARTITION: client_of(context)})
        return Message(RecordDict({wire.CONFIG: answer}), reply_to=message)

    @app.query("confide")
    def confide(message: Message, context: Context) -> Message:
        transport = load(context).transport
        secrets = transport.confide(context) if transport else {}
        told = context.state.array_records.get(KEPT, ArrayRecord()).copy()
        told.update(wire.to_record({f"secret/{name}": t for name, t in secrets.items()}))
        return Message(RecordDict({wire.ARRAYS: told}), reply_to=message)

    @app.query("noticed")
    def noticed(message: Message, context: Context) -> Message:
        return Message(answer(context), reply_to=message)

    @app.query("decrypt")
    def decrypt(message: Message, context: Context) -> Message:
        transport = load(context).transport
        assert transport is not None
        return transport.query(message, context, "decrypt")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        plan, client = load(context), client_of(context)
        if plan.transport is not None:
            side = transport_side(plan, client, message, context)
            return plan.transport.respond(message, context, side)
        model = wire.to_tensors(wire.arrays_of(message))
        notice(plan, client, wire.round_of(message), model, context)
        sent = contribute(plan, client, wire.round_of(message), model, context)
        metrics = wire.metric_record(sent.examples, finite(sent.metrics))
        content = RecordDict({wire.ARRAYS: wire.to_record(sent.tensors), wire.METRICS: metrics})
        return Message(content, reply_to=message)

    return app


def client_of(context: Context) -> int:
    return int(context.node_config[wire.PARTITION])


def transport_side(plan: Plan, client: int, message: Message, context: Context) -> TransportSide:
    """What the transport's client half may ask of the client."""
    config = message.content.config_records[wire.CONFIG]
    round = wire.round_of(message)

    def compute(model: Tensors) -> Update:
        notice(plan, client, round, model, context)
        scalars = {key: float(v) for key, v in config.items() if isinstance(v, int | float)}
        update = protected_update(plan, client, round, model, scalars, context)
        if wire.KEEP in config:
            context.state.array_records[KEPT] = _kept(update, model)
        return update

    return TransportSide(
        round=round,
        client=client,
        seed=plan.schedule.client_seed(round, client).child("transport"),
        setting=plan.setting,
        compute=compute,
        advance=plan.advance,
    )


def protected_update(
    plan: Plan,
    client: int,
    round: int,
    model: Tensors,
    config: Mapping[str, float],
    context: Context | None = None,
) -> Update:
    """The client's update as it leaves the update protections."""
    sent = contribute(plan, client, round, model, context)
    update = Update(
        tensors=_change(plan, model, sent.tensors),
        weight=float(sent.examples),
        examples=sent.examples,
        metrics=finite(sent.metrics),
    )
    for index, protection in enumerate(plan.setting.protections):
        if isinstance(protection, UpdateProtection):
            seed = plan.schedule.client_seed(round, client).child("protection", index)
            start = protection_key(index, "")
            told = {k.removeprefix(start): v for k, v in config.items() if k.startswith(start)}
            side = ClientSide(round, client, seed, plan.setting, told)
            update = protection.client(update, side)
    return update


def protection_key(index: int, name: str) -> str:
    """The key of a scalar that the server half of protection number `index` sends down."""
    return f"protection-{index}-{name}"


def contribute(
    plan: Plan, client: int, round: int, state: Tensors, context: Context | None = None
) -> Contribution:
    """One client's work in one round, from the global model it was given; DivergedError, or
    ArchitectureRefusedError where it pins another architecture.

    context: where a malicious client keeps its memory; without one, it is honest.
    """
    _check_pinned(plan, state)
    model = plan.scratch
    model.load_state_dict(wire.like(state, model.state_dict()))
    learner = plan.learner(round, client)
    with one_thread(), drawn_from(plan.schedule.client_seed(round, client).child("module")):
        inputs, labels, steps = trained_on(plan, client, round, model, context)
        sent = plan.strategy.contribute(model, inputs, labels, steps, plan.work, learner)
    own = len(plan.schedule.parts[client])
    sent = replace(sent, examples=min(sent.examples, own))  # fakes are not owned up to
    for name, tensor in sent.tensors.items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(f"'{name}' is no longer finite")
    return sent


def _check_pinned(plan: Plan, state: Tensors) -> None:
    if plan.pinned is None:
        return
    sent = {name: tuple(tensor.shape) for name, tensor in state.items()}
    strange = sorted(name for name in sent if sent[name] != plan.pinned.get(name))
    missing = sorted(set(plan.pinned) - set(sent))
    if strange or missing:
        what = f"unknown '{strange[0]}' {list(sent[strange[0]])}" if strange else ""
        what = what or f"no '{missing[0]}'"
        raise ArchitectureRefusedError(
            f"the model sent is not the architecture agreed on: {what} "
            f"({len(strange)} tensors differ, {len(missing)} are missing)"
        )


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics a client may tell: a private learner gives no loss."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _change(plan: Plan, model: Tensors, sent: Tensors) -> dict[str, Tensor]:
    """What was sent as an update: gradients as they are, all else relative to the global model."""
    gradients = plan.trainable if plan.strategy.sends == Channel.GRADIENT else frozenset()
    return {
        name: (sent[name] if name in gradients else sent[name] - model[name]).float()
        for name in plan.setting.layout
    }


def _kept(update: Update, model: Tensors) -> ArrayRecord:
    tensors = {f"update/{name}": tensor for name, tensor in update.tensors.items()}
    tensors |= {f"model/{name}": tensor for name, tensor in model.items()}
    return wire.to_record({**tensors, "weight": torch.tensor(update.weight)})
