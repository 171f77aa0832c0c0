"""What a training on shares will send and hold, before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fedmi.data.dataset import Card
from fedmi.deployments.base import Estimate
from fedmi.deployments.memory import PROCESS_BYTES, records_bytes
from fedmi.models.base import ModelSpec, Shape
from fedmi.mpc.scheme import Scheme

ELEMENT_BYTES = 8
PARTY_BYTES = 150 * 2**20
"""A compute party that has loaded the engine."""
ENGINE_BYTES = 400 * 2**20
"""The compiler of programs, in this process."""


@dataclass(frozen=True)
class Rate:
    """Bytes that a party receives in a step: for each parameter, for each number that comes out of
    a layer or goes into the network, and at all; fitted to softmax and networks of one hidden layer
    with 650 to 50,890 parameters."""

    parameter: int
    output: int
    input: int
    step: int


RATES = {
    "aby3": Rate(32, 100, 0, 60_000),
    "semi2k": Rate(25, 110, 16, 100_000),
    "cheetah": Rate(60, 250, 0, 2_000_000),
}


def estimate(card: Card, model: ModelSpec, scheme: Scheme, sizes: Sequence[int]) -> Estimate:
    """sizes: records of each minibatch.

    Up, exactly but for headers (and momentum, whose zeros are shared too): each party's share of
    the records and of the initial weights.
    Down, a rough estimate, right within a factor of two or three: what the parties receive from
    each other and the dealer. It grows with the parameters (whose gradients are multiplied and
    truncated) and with what comes out of layers for each record (multiplied, truncated, compared,
    exponentiated); see `Rate`. The checks of the range after each epoch are left out.
    """
    parameters = model.parameters(card.shape, card.classes)
    numbers = card.private_records * (prod(card.shape) + card.classes) + parameters
    held = scheme.elements * ELEMENT_BYTES * numbers
    outputs = activations(model.blueprint(card.shape, card.classes), card.shape)
    rate = RATES[scheme.protocol]
    received = len(sizes) * (rate.step + rate.parameter * parameters)
    received += sum(sizes) * (rate.output * outputs + rate.input * prod(card.shape))
    return Estimate(
        parameters=parameters,
        wire_bytes_up=scheme.size * held,
        wire_bytes_down=scheme.size * received,
        memory_bytes=PROCESS_BYTES
        + ENGINE_BYTES
        + scheme.size * (PARTY_BYTES + 2 * held)
        + 2 * records_bytes(card),
    )


def activations(network: nn.Module, shape: Shape) -> int:
    """Numbers that come out of all layers for one record; `network` on the meta device."""
    sizes: list[int] = []
    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [
        module.register_forward_hook(lambda _m, _in, out: sizes.append(out.numel()))
        for module in leaves
        if not isinstance(module, nn.Flatten)
    ]
    network.eval()(torch.zeros(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return sum(sizes)
