"""The victim's update out of an aggregate in which a malicious server silenced everybody else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.coalition import told_in
from fedmi.attacks.engine.evidence import AttackError, Evidence, evidence_of
from fedmi.attacks.engine.inversion import Inversion
from fedmi.attacks.engine.labels import last_linear, probes
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.words import Channel, Position
from fedmi.models.base import features
from fedmi.training.local import fit, mean_gradient

PROBED = 2
"""Records of a probe: batch normalisation takes no fewer."""


class ModelInconsistency(Inversion):
    """Inverting Gradients on the one update that is left in the aggregate of a malicious server.

    Clients that were sent a suppressed model contribute nothing that depends on their data, but
    for the layers behind the dead one. What they do contribute (weight decay) is computed from the
    model they were sent, and the update of the victim, who was sent the honest one, is

        u_v = (W mean - sum_c w_c u_c) / w_v,    w = number of examples, W their sum

    in all parameters whose u_c does not depend on the data (both of two probes with other inputs
    and other labels give it bit for bit); the others are masked. Labels are read from the weight of
    the last layer, as its bias is not among them. Then as `inverting_gradients`, whose options
    these are. Targets are the victims, told from the models that the server sent.

    Threat model: a malicious server that runs the deployment's `malice` of the same kind, and sees
    no single update: only the sum that secure aggregation gives it. Colluders, if any, tell their
    own part. Flag "dead_layer": a client that looked would find a whole layer of ReLUs of the model
    it was sent to be zero on whatever it holds.
    Raises AttackError where weights are unknown, nobody was suppressed, or labels are out of view.
    """

    kind: Literal["model_inconsistency"] = "model_inconsistency"
    paper: ClassVar[str] = (
        "Pasquini, Francati, Ateniese: Eluding Secure Aggregation in Federated Learning via Model "
        "Inconsistency. CCS 2022"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER
    channel: Literal[Channel.AGGREGATE] = Channel.AGGREGATE

    channels: ClassVar = frozenset({Channel.AGGREGATE})
    exploits: ClassVar = frozenset({"model_inconsistency"})

    def own_targets(self, transcript: Transcript) -> tuple[Target, ...]:
        found = []
        for seen in transcript.on(Channel.AGGREGATE, self.rounds):
            silenced = suppressed(transcript, seen.round)
            left = tuple(client for client in seen.clients if client not in silenced)
            if silenced and left:
                who = f"client {left[0]}" if len(left) == 1 else f"{len(left)} clients"
                found.append(Target(f"round {seen.round}, {who}", None, seen.round, left))
        return tuple(found)

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        return self.invert(case, [victims_update(case, target) for target in case.targets])


def suppressed(transcript: Transcript, round: int) -> dict[int, Mapping[str, Tensor]]:
    """Client -> the model it was sent in place of the honest one, which stands first."""
    models = transcript.on(Channel.GLOBAL_MODEL, [round])
    return {
        seen.clients[0]: seen.payload
        for seen in models[1:]
        if len(seen.clients) == 1 and not _same(seen.payload, models[0].payload)
    }


def victims_update(case: Case, target: Target) -> Evidence:
    """What the target's clients contributed to the aggregate of its round; AttackError."""
    assert case.knowledge.build is not None
    seen = _aggregate(case.transcript, target)
    silenced = suppressed(case.transcript, seen.round)
    rest = [client for client in seen.clients if client not in target.clients]
    if not silenced or not silenced.keys() >= {*rest}:
        raise AttackError(f"target '{target.id}': other clients got the honest model too")
    base = case.transcript.global_model(seen.round)
    known = {client: _known(case, target, silenced[client], client, seen) for client in rest}
    visible = {
        name: all(name in part for part in known.values())
        for name, _ in case.knowledge.build().named_parameters()
    }
    if not any(visible.values()):
        raise AttackError(f"target '{target.id}': no parameter of the other clients is suppressed")
    alone = _alone(seen, target, base, known, visible)
    masks = {n: torch.full_like(base[n], shown, dtype=torch.bool) for n, shown in visible.items()}
    flags = _noticed(case, next(iter(silenced.values())))
    return _with_labels(case, evidence_of(case, target, alone, base, tuple(visible), masks, flags))


def _alone(
    seen: Observation,
    target: Target,
    base: Mapping[str, Tensor],
    known: Mapping[int, Mapping[str, Tensor]],
    visible: Mapping[str, bool],
) -> Observation:
    """The parameters as if the target's clients had been the only ones; no change if not visible.

    Buffers are left out: they are averages over clients that nothing separates.
    """
    weights = {client: _examples(seen, client) for client in seen.clients}
    left = sum(weights[client] for client in target.clients)
    payload: dict[str, Tensor] = {}
    for name, shown in visible.items():
        origin = torch.zeros_like(base[name]) if seen.is_gradient else base[name]
        total = sum(weights.values()) * (seen.payload[name].double() - origin.double())
        others = [weights[client] * part[name] for client, part in known.items() if shown]
        own = (total - sum(others, torch.zeros_like(total))) / left
        payload[name] = origin.double() + (own if shown else torch.zeros_like(own))
    clear = {f"num_examples/{client}": weights[client] for client in target.clients}
    return replace(seen, clients=target.clients, payload=payload, clear=clear)


def forced(
    case: Case, model: Mapping[str, Tensor], examples: int, *, of_gradient: bool
) -> dict[str, Tensor]:
    """By name, what a client sent `model` contributes where that is the same for any data."""
    first, second = (_contribution(case, model, examples, of_gradient, label) for label in (0, 1))
    return {name: part for name, part in first.items() if torch.equal(part, second[name])}


def dead_shares(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """ReLU module -> share of its units that are zero on every input: what a careful client sees.

    In eval mode; of an honest network, few units are, and never a whole layer.
    """
    shares: dict[str, float] = {}

    def note(name: str, out: Tensor) -> None:
        shares[name] = float((out == 0).all(0).double().mean())

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out, name=name: note(name, out))
        for name, module in network.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        with torch.no_grad():
            network.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shares


def _aggregate(transcript: Transcript, target: Target) -> Observation:
    for seen in transcript.on(Channel.AGGREGATE, [target.round or 0]):
        if {*target.clients} <= {*seen.clients}:
            return seen
    raise AttackError(f"target '{target.id}': no aggregate of its clients in this transcript")


def _examples(seen: Observation, client: int) -> float:
    """A client's number of examples, its weight in the mean."""
    told = seen.clear.get(f"num_examples/{client}", 0.0)
    if told <= 0:
        raise AttackError(
            f"aggregate of round {seen.round}: the number of examples of client {client} is not "
            "known, so its weight in the mean is not"
        )
    return told


def _known(
    case: Case, target: Target, model: Mapping[str, Tensor], client: int, seen: Observation
) -> dict[str, Tensor]:
    """By name, what is known of another client's contribution, in float64."""
    told = [item.part("update") for item in told_in(case, target) if item.client == client]
    examples = round(_examples(seen, client))
    found = told[0] if told else forced(case, model, examples, of_gradient=seen.is_gradient)
    return {name: part.double() for name, part in found.items()}


def _contribution(
    case: Case, model: Mapping[str, Tensor], examples: int, of_gradient: bool, label: int
) -> dict[str, Tensor]:
    """The local work of a client that holds noise, all of one class, from `model` on."""
    assert case.knowledge.build is not None
    assert case.knowledge.work is not None
    work, module = case.knowledge.work, case.knowledge.build()
    module.load_state_dict(dict(model))
    rng = case.seed.child("probe", label).torch()
    inputs = torch.rand((PROBED, *case.knowledge.input_shape), generator=rng)
    labels = torch.full((PROBED,), label)
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        if of_gradient:
            return mean_gradient(module, inputs, labels, work.recipe.mode)
        steps = [np.arange(PROBED)] * len(work.batch_sizes(examples))
        fit(module, inputs, labels, steps, work)
    return {name: part.detach() - model[name] for name, part in module.named_parameters()}


def _with_labels(case: Case, evidence: Evidence) -> Evidence:
    """The evidence with the last bias's gradient estimated from the last weight's.

    Row k of the weight's is mean (p_k - [y = k]) h; projected on the mean feature of the probes it
    is the bias's up to a factor, which is exact in sign for one record (LLG, Wainakh et al. 2022).
    """
    assert case.knowledge.build is not None
    assert evidence.support is not None
    module = case.knowledge.build()
    layer, linear = last_linear(module)
    weight, bias = (f"{layer}.{part}".removeprefix(".") for part in ("weight", "bias"))
    if evidence.target.id in case.knowledge.labels or linear.bias is None:
        return evidence
    if not evidence.support[weight].all():
        raise AttackError(
            f"target '{evidence.target.id}': the last layer is not suppressed in other clients, so "
            "labels cannot be read; grant the fact 'labels', or let the last ReLUs die"
        )
    if evidence.support[bias].all():
        return evidence
    module.load_state_dict(dict(evidence.base))
    with torch.no_grad():
        mean = features(module.eval(), probes(case, evidence)).mean(0)
    slope = evidence.gradient[weight] @ mean / mean.square().sum().clamp_min(1e-12)
    return replace(evidence, gradient={**evidence.gradient, bias: slope})


def _noticed(case: Case, model: Mapping[str, Tensor]) -> frozenset[str]:
    """Whether a careful client finds a layer of the model it was sent dead."""
    assert case.knowledge.build is not None
    module = case.knowledge.build()
    module.load_state_dict(dict(model))
    rng = case.seed.child("careful").torch()
    inputs = torch.rand((64, *case.knowledge.input_shape), generator=rng)
    dead = 1.0 in dead_shares(module, inputs).values()
    return frozenset({"dead_layer"}) if dead else frozenset()


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
