"""Inputs of the last linear layer: those of a candidate, and those that a gradient gives away."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmi.attacks.engine.network import Network

TURNS = 30
"""Turns of the fixed point between features and posteriors."""
POLISHING = 100
"""Steps of L-BFGS after them."""
SOLVED = 1e-10
"""Residual under which they are not needed."""
FLOOR = 1e-4
"""Share of the largest singular value under which a direction is not believed."""


def last_with_bias(module: nn.Module) -> str:
    """The name of the last layer with parameters if it is linear with a bias, else ""."""
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    name, layer = layers[-1] if layers else ("", module)
    return name if isinstance(layer, nn.Linear) and layer.bias is not None else ""


def features_of(network: Network, name: str, inputs: Tensor) -> Tensor:
    """[n, features]: what layer `name` is given; differentiable, and can be batched by vmap."""
    seen: list[Tensor] = []
    layer = network.module.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(1)))
    try:
        state = {**network.parameters, **network.buffers}
        functional_call(network.module, state, (inputs,), strict=False)
    finally:
        hook.remove()
    for layer_of_batch in network.statistics.values():
        layer_of_batch.seen = None
    return seen[0]


@dataclass(frozen=True)
class _Heads:
    """A gradient of the last layer as equations for the mean features of the classes present.

    slopes: dL/dW beside dL/db, [classes, features + 1]; weight and offset: of the layer; shares: of
    the records, by class present; truth: their one-hot labels.
    """

    slopes: Tensor
    weight: Tensor
    offset: Tensor
    shares: Tensor
    truth: Tensor

    def pull(self, posteriors: Tensor) -> Tensor:
        """[classes, present]: what a feature of each class present adds to the slopes."""
        return (self.shares[:, None] * (posteriors - self.truth)).T

    def posteriors(self, features: Tensor) -> Tensor:
        return (features @ self.weight.T + self.offset).softmax(1)

    def residual(self, features: Tensor) -> Tensor:
        """|told by these features - slopes|^2 / |slopes|^2."""
        whole = torch.cat([features, features.new_ones(len(features), 1)], 1)
        apart = self.pull(self.posteriors(features)) @ whole - self.slopes
        return apart.square().sum() / self.slopes.square().sum().clamp_min(1e-300)

    def by_turns(self, start: Tensor, mean: Tensor) -> Tensor:
        """Features and posteriors, each from the other; the turn of least residual."""
        posteriors, best, least = mean.expand(len(start), -1), start, self.residual(start)
        for _ in range(TURNS):
            pull = self.pull(posteriors)
            rest = self.slopes[:, :-1] - pull @ start
            found = start + torch.linalg.pinv(pull, rtol=FLOOR) @ rest
            if (off := self.residual(found)) < least:
                best, least = found, off
            posteriors = (posteriors + self.posteriors(found)) / 2
        return best

    def polished(self, start: Tensor) -> Tensor:
        """The residual brought down from there by L-BFGS."""
        point = start.clone().requires_grad_()
        descent = torch.optim.LBFGS(
            [point],
            max_iter=POLISHING,
            history_size=20,
            tolerance_grad=1e-14,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            descent.zero_grad()
            loss = self.residual(point)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        descent.step(closure)  # type: ignore[no-untyped-call]
        done = point.detach()
        return done if self.residual(done) < self.residual(start) else start


def features_by_class(
    gradient: Mapping[str, Tensor], base: Mapping[str, Tensor], name: str, counts: Tensor
) -> Tensor:
    """Mean features of the records of each class, [classes, features]; zero where there are none.

    counts: records by class, [classes]. Of n records, posteriors p_i and labels y_i,

        n dL/db = sum_i (p_i - y_i),    n dL/dW = sum_i (p_i - y_i) f_i^T,

    so that for one record f = (dL/dW_k) / (dL/db_k) with any k. For several the quotient of a class
    mixes in the others' features. There p_i = softmax(W f_i + b) makes this a system for the f_i
    alone, solved by turns from the mean posterior, which dL/db tells, and then by L-BFGS. Exact for
    fewer records than classes that all differ in label; records of a class are taken as one with
    its posterior, and directions that the classes present leave open stay as in the quotient.
    """
    slopes, bias = gradient[f"{name}.weight"].double(), gradient[f"{name}.bias"].double()
    present = torch.nonzero(counts).flatten()
    shares = counts[present].double() / counts.sum()
    heads = _Heads(
        torch.cat([slopes, bias[:, None]], 1),
        base[f"{name}.weight"].double(),
        base[f"{name}.bias"].double(),
        shares,
        torch.eye(len(counts), dtype=torch.double)[present],
    )
    found = slopes[present] / torch.where(bias == 0, 1e-12, bias)[present, None]
    if counts.sum() > 1:
        found = heads.by_turns(found, bias + counts.double() / counts.sum())
        if heads.residual(found) > SOLVED:
            found = heads.polished(found)
    every = slopes.new_zeros(slopes.shape)
    every[present] = found
    return every.float()
