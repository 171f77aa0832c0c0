"""The last linear layer of a model, its gradient, and inputs to ask the model about."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.exposure.schema import END, PADDING, START, Text
from fedmi.exposure.words import Fact

PROBES = 64


@dataclass(frozen=True)
class Head:
    """The last layer and its gradient: weight [classes, features], bias [classes] or None."""

    name: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Stand:
    """What a model says to inputs: posteriors [m, classes], the last layer's features [m, d]."""

    posteriors: Tensor
    features: Tensor

    @property
    def sharpness(self) -> float:
        return sharpness(self.posteriors)

    @property
    def doubt(self) -> float:
        """Chance that a count resting on these answers is a guess: sqrt(sharpness)."""
        return math.sqrt(self.sharpness)

    @property
    def signed(self) -> bool:
        """Whether features are negative somewhere, so that an entry's sign proves nothing."""
        return bool((self.features < 0).any())

    def spread(self, records: int) -> Tensor:
        """Standard error, in records, of the sum of p over so many of such inputs. [classes]"""
        return math.sqrt(records) * self.posteriors.std(0, correction=0)


def sharpness(posteriors: Tensor) -> float:
    """How decided answers [m, classes] are: (mean sum_k p_k^2 - 1/K) / (1 - 1/K); 1 = one-hot."""
    chance = 1 / posteriors.shape[1]
    purity = float(posteriors.square().sum(1).mean())
    return min(1.0, max(0.0, (purity - chance) / (1 - chance)))


def last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
    """The last layer with parameters; AttackError if it is not linear."""
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    name, layer = layers[-1] if layers else ("", module)
    if not isinstance(layer, nn.Linear):
        raise AttackError(
            f"labels are read from a last linear layer; the last layer with parameters is "
            f"'{name}', a {type(layer).__name__}"
        )
    return name, layer


def head_with_bias(module: nn.Module) -> None:
    """AttackError unless the last layer is linear and has a bias."""
    name, layer = last_linear(module)
    if layer.bias is None:
        raise AttackError(
            f"iLRG divides the last layer's weight gradient by that of its bias; layer '{name}' "
            "has no bias: use 'llg', 'gradinversion_labels' or 'bias_labels'"
        )


def head(gradient: Mapping[str, Tensor], module: nn.Module) -> Head:
    """The last layer's gradient; AttackError if that layer is not linear."""
    name, layer = last_linear(module)
    prefix = f"{name}." if name else ""
    bias = None if layer.bias is None else gradient[f"{prefix}bias"]
    return Head(prefix, gradient[f"{prefix}weight"], bias)


def fresh(case: Case) -> nn.Module:
    """A module of the architecture, weights arbitrary; AttackError where it is not known."""
    if case.knowledge.build is None:
        raise AttackError("the architecture is not known: grant the fact 'architecture'")
    return case.knowledge.build()


@torch.no_grad()
def answers(module: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> Stand:
    """What the model with the weights `state` says to inputs [m, C, H, W], in eval mode."""
    module.eval().load_state_dict(dict(state))
    seen: list[Tensor] = []
    hook = last_linear(module)[1].register_forward_hook(
        lambda _layer, given, _answer: seen.append(given[0].flatten(1))
    )
    try:
        return Stand(module(inputs).softmax(1), seen[0])
    finally:
        hook.remove()


def stand(case: Case, evidence: Evidence, module: nn.Module) -> Stand:
    """What the model behind an update says to the `probes`."""
    return answers(module, evidence.base, probes(case, evidence))


def public(case: Case, evidence: Evidence, count: int) -> tuple[Tensor, Tensor]:
    """At most so many public (inputs, labels), at random; AttackError where none are granted."""
    if case.knowledge.public is None or Fact.PUBLIC_DATA not in case.knowledge.facts:
        raise AttackError("public records are not known: grant the fact 'public_data'")
    rng = case.seed.child(evidence.target.id, "probes").torch()
    inputs, labels = case.knowledge.public
    rows = torch.randperm(len(inputs), generator=rng)[:count]
    return inputs[rows], labels[rows]


def probes(case: Case, evidence: Evidence, count: int = PROBES) -> Tensor:
    """Inputs to estimate the model's mean answer on: public ones if granted, else smooth noise, or
    sentences of random tokens."""
    if Fact.PUBLIC_DATA in case.knowledge.facts and case.knowledge.public is not None:
        return public(case, evidence, count)[0]
    rng = case.seed.child(evidence.target.id, "probes").torch()
    channels, height, width = case.knowledge.input_shape
    if isinstance(case.knowledge.schema, Text):
        return sentences(case.knowledge.schema, count, rng)
    coarse = torch.rand(count, channels, 4, 4, generator=rng)
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def sentences(schema: Text, count: int, rng: torch.Generator) -> Tensor:
    """Of random tokens and lengths, [count, 1, 1, length]."""
    ids = torch.randint(END + 1, len(schema.pieces), (count, schema.length), generator=rng)
    after = torch.randint(3, schema.length + 1, (count, 1), generator=rng)
    place = torch.arange(schema.length)
    ids = torch.where(place == 0, START, torch.where(place == after - 1, END, ids))
    return torch.where(place < after, ids, PADDING)[:, None, None].float()
