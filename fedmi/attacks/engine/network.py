"""A model as a pure function of its parameters, and the local training of it as another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from fedmi.attacks.engine.plan import Plan, Steps
from fedmi.exposure.recipe import LocalWork

Weights = dict[str, Tensor]


class BatchStatistics(nn.Module):
    """Batch normalisation by the batch's own statistics; leaves them in `seen`, changes nothing."""

    def __init__(self, replaced: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = replaced.weight, replaced.bias
        self.epsilon = replaced.eps
        self.momentum = 0.1 if replaced.momentum is None else replaced.momentum
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        variance, mean = torch.var_mean(inputs, axes, correction=0, keepdim=True)
        count = inputs.numel() // inputs.shape[1]
        self.seen = (mean.flatten(), variance.flatten() * count / max(1, count - 1))
        normal = (inputs - mean) * torch.rsqrt(variance + self.epsilon)
        if self.weight is None or self.bias is None:
            return normal
        shape = mean.shape
        return normal * self.weight.view(shape) + self.bias.view(shape)


@dataclass(frozen=True)
class Network:
    """`module` holds no state that counts: parameters and buffers are handed in at each call.

    statistics: prefix of each batch normalisation layer that normalises by the batch.
    plain: slopes are taken by torch.autograd, which asks nothing of the module; else by torch.func,
    which can be batched by vmap.
    """

    module: nn.Module
    parameters: Weights
    buffers: Weights
    statistics: dict[str, BatchStatistics]
    plain: bool = False

    def loss(self, weights: Weights, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Weights]:
        """Mean cross-entropy, and the batch statistics by name of the running buffer."""
        state = {**weights, **self.buffers}
        logits = functional_call(self.module, state, (inputs,), strict=False)
        seen: Weights = {}
        for prefix, layer in self.statistics.items():
            if layer.seen is not None:
                seen[f"{prefix}.running_mean"], seen[f"{prefix}.running_var"] = layer.seen
                layer.seen = None
        return cross_entropy(logits, labels), seen

    def slopes(self, weights: Weights, inputs: Tensor, labels: Tensor) -> tuple[Weights, Weights]:
        """Gradient of `loss` in the weights, and the batch statistics; differentiable in both."""
        if not self.plain:
            slopes, seen = grad(self.loss, has_aux=True)(weights, inputs, labels)
            return slopes, seen
        loss, seen = self.loss(weights, inputs, labels)
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        return dict(zip(weights, found, strict=True)), seen

    def one_by_one(self) -> "Network":
        """The same, for modules that vmap refuses and for a single problem, where it is faster."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.parameters.items()}
        return replace(self, parameters=leaves, plain=True)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Network":
        """The same on a device, in a type of floating point."""

        def moved(tensors: Weights) -> Weights:
            return {
                name: t.to(device, dtype if t.is_floating_point() else t.dtype)
                for name, t in tensors.items()
            }

        module = self.module.to(device, dtype)
        return replace(
            self, module=module, parameters=moved(self.parameters), buffers=moved(self.buffers)
        )


def load(build: Callable[[], nn.Module], state: Mapping[str, Tensor], mode: str) -> Network:
    """The architecture with the weights of `state`, in the client's module mode.

    In train mode batch normalisation uses batch statistics; dropout is off in either mode, since
    its masks cannot be known.
    """
    module = build().eval()
    buffers = {name: state[name].clone() for name, _ in module.named_buffers() if name in state}
    parameters = {name: state[name].detach().clone() for name, _ in module.named_parameters()}
    layers: dict[str, BatchStatistics] = {}
    if mode == "train":
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                layers[name] = BatchStatistics(child)
                module.set_submodule(name, layers[name])
        kept = dict(module.named_buffers())
        buffers = {name: tensor for name, tensor in buffers.items() if name in kept}
    return Network(module, parameters, buffers, layers)


def simulate(
    network: Network, inputs: Tensor, labels: Tensor, plan: Plan, work: LocalWork
) -> tuple[Weights, Weights]:
    """What local training on these records would do: (base - trained weights, running statistics).

    Differentiable in `inputs` [n, C, H, W]; labels [n]. SGD exactly as `training.local.fit`: with
    momentum, weight decay and the FedProx term; parties are averaged by their share of records.
    Under Poisson sampling a step's gradient is, as in DP-SGD, the sum over its records divided by
    the expected batch size, of a party that holds as many records as `plan.examples` says.
    Running statistics start from zero: the part of the new ones that the old ones do not explain.
    """
    divisors = _divisors(plan, work)
    descents, statistics = zip(
        *(
            _train(network, inputs, labels, steps, work, divisor)
            for steps, divisor in zip(plan.parties, divisors, strict=True)
        ),
        strict=True,
    )
    return _average(descents, plan.shares), _average(statistics, plan.shares)


def one_gradient(network: Network, inputs: Tensor, labels: Tensor) -> tuple[Weights, Weights]:
    """Gradient of the mean loss at the network's own weights, and the batch statistics."""
    return network.slopes(network.parameters, inputs, labels)


def _divisors(plan: Plan, work: LocalWork) -> list[int]:
    """By party, what a step's sum of gradients is divided by; 0 = the size of its batch."""
    if work.sampling != "poisson" or not plan.examples:
        return [0] * len(plan.parties)
    return [work.batch_sizes(held)[0] for held in plan.examples]


def _train(
    network: Network,
    inputs: Tensor,
    labels: Tensor,
    steps: Steps,
    work: LocalWork,
    divisor: int = 0,
) -> tuple[Weights, Weights]:
    recipe, base = work.recipe, network.parameters
    weights, velocity, running = base, dict[str, Tensor](), dict[str, Tensor]()
    for rows in steps:
        slopes, seen = _slopes(network, weights, inputs, labels, rows)
        scale = len(rows) / divisor if divisor else 1.0
        for name, slope in slopes.items():
            full = scale * slope + recipe.weight_decay * weights[name]
            if work.proximal_mu:
                full = full + work.proximal_mu * (weights[name] - base[name])
            velocity[name] = recipe.momentum * velocity[name] + full if name in velocity else full
        weights = {n: w - recipe.learning_rate * velocity[n] for n, w in weights.items()}
        running = _running(network, running, seen)
    return {name: base[name] - weights[name] for name in weights}, running


def _slopes(
    network: Network, weights: Weights, inputs: Tensor, labels: Tensor, rows: Sequence[int]
) -> tuple[Weights, Weights]:
    """Gradient of the mean loss over these rows, zero over none, and the batch statistics."""
    if not rows:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}, {}
    index = list(rows)
    return network.slopes(weights, inputs[index], labels[index])


def _running(network: Network, running: Weights, seen: Weights) -> Weights:
    """Exponential averages of batch normalisation after one more batch."""
    momentum = {prefix: layer.momentum for prefix, layer in network.statistics.items()}
    return {
        name: (1 - rate) * running.get(name, torch.zeros_like(value)) + rate * value
        for name, value in seen.items()
        for rate in [momentum[name.rpartition(".")[0]]]
    }


def _average(parts: tuple[Weights, ...], shares: tuple[float, ...]) -> Weights:
    return {
        name: torch.stack(
            [share * part[name] for share, part in zip(shares, parts, strict=True)]
        ).sum(0)
        for name in parts[0]
    }
