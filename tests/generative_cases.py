"""Cases with public images, for attacks that learn a generator from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.words import Channel, Fact
from fedmi.models.base import ModelSpec
from fedmi.training.local import mean_gradient
from tests.gradient_cases import Batch, base_model, images, make_case, sets

PRIOR = {"latent": 25, "width": 4, "steps": 40, "images": 200}


def public(case: Case, count: int = 200) -> Case:
    """The case with public images of the kind of the private ones, and none of those."""
    shown = (images(count, seed=77), torch.zeros(count, dtype=torch.long))
    facts = case.knowledge.facts | {Fact.PUBLIC_DATA}
    return replace(case, knowledge=replace(case.knowledge, public=shown, facts=facts))


def ordered(sizes: Sequence[int], seed: int) -> list[Batch]:
    """Batches whose labels rise, which is the order that attacks answer in."""
    every = [(inputs, labels, labels.argsort()) for inputs, labels in sets(sizes, seed)]
    return [(inputs[order], labels[order]) for inputs, labels, order in every]


def noisy_case(
    spec: ModelSpec,
    clients: Sequence[Batch],
    noise: float = 0.0,
    kept: float = 1.0,
    only: int | None = None,
) -> Case:
    """Gradients with noise of so many root mean squares, or with their largest entries only."""
    rng = torch.Generator().manual_seed(1)
    sent = [_damaged(mean_gradient(base_model(spec), *b), noise, kept, rng) for b in clients]
    counts = [len(labels) for _, labels in clients]
    case = make_case(spec, sent, counts, Channel.GRADIENT, LocalWork(), only=only)
    if kept < 1:
        case = replace(case, knowledge=replace(case.knowledge, protections=("gradient_pruning",)))
    return public(case)


def _damaged(
    parts: Mapping[str, Tensor], noise: float, kept: float, rng: torch.Generator
) -> dict[str, Tensor]:
    found = {}
    for name, part in parts.items():
        scale = noise * part.square().mean().sqrt()
        least = part.abs().flatten().quantile(1 - kept)
        cut = torch.where(part.abs() >= least, part, 0.0)
        found[name] = cut + scale * torch.randn(part.shape, generator=rng)
    return found
