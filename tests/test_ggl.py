"""GGL: a generator's input found without a slope, behind noise, clipping and pruning too."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.gradient.ggl import GGL
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.words import Channel, Fact
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet
from tests.generative_cases import PRIOR, noisy_case, ordered
from tests.gradient_cases import SERVER, psnr, sets

SPEC = ConvNet(width=8, blocks=2)


def ggl(**options: object) -> GGL:
    fixed = {"position": SERVER, "channel": Channel.GRADIENT, "prior": PRIOR, "steps": 40}
    return GGL.model_validate({**fixed, "population": 20, **options})


def attack(case: Case, **options: object) -> tuple[Reconstruction, ...]:
    return ggl(**options).reconstruct(case)


@pytest.mark.parametrize("options", [{"distance": "l2"}, {"covariance": "diagonal"}, {}])
def test_images_are_found_and_only_from_their_own_gradient(options: dict[str, str]) -> None:
    mine, others = ordered([1, 2], seed=0), ordered([1, 2], seed=1)
    found = attack(noisy_case(SPEC, mine), **options)
    assert (psnr(found, mine) - psnr(found, others) > 4).all()
    for answer, (_, labels) in zip(found, mine, strict=True):
        assert answer.labels is not None
        assert answer.labels.sort().values.equal(labels.sort().values)


def test_it_sees_through_noise_that_blinds_the_search_of_pixels() -> None:
    mine, others = sets([1, 1, 1, 1], seed=0), sets([1, 1, 1, 1], seed=1)
    case = noisy_case(SPEC, mine, noise=2.0)
    pixels = InvertingGradients(position=SERVER, channel=Channel.GRADIENT, steps=100)
    found = attack(case)
    assert (psnr(found, mine) - psnr(pixels.reconstruct(case), mine)).mean() > 1
    assert (psnr(found, mine) - psnr(found, others)).mean() > 2


def test_clipping_changes_nothing_and_pruning_little() -> None:
    mine, others = sets([1, 1], seed=0), sets([1, 1], seed=1)
    case = noisy_case(SPEC, mine)
    seen = [
        replace(item, payload={n: 0.01 * p for n, p in item.payload.items()})
        if item.channel == Channel.GRADIENT
        else item
        for item in case.transcript.observations
    ]
    clipped = replace(case, transcript=replace(case.transcript, observations=tuple(seen)))
    whole, small = attack(case), attack(clipped)
    assert torch.allclose(psnr(whole, mine), psnr(small, mine), atol=1)
    pruned = attack(noisy_case(SPEC, mine, kept=0.1))
    assert (psnr(pruned, mine) - psnr(pruned, others) > 4).all()


def test_a_network_without_second_derivatives_will_do() -> None:
    mine, others = sets([1, 1], seed=0), sets([1, 1], seed=1)
    found = attack(noisy_case(MLP(hidden=(32,)), mine))
    assert (psnr(found, mine) - psnr(found, others) > 4).all()


def test_a_target_does_not_depend_on_the_others() -> None:
    clients = sets([1, 1, 1], seed=0)
    together = attack(noisy_case(SPEC, clients))[1]
    (alone,) = attack(noisy_case(SPEC, clients, only=1))
    assert together.samples is not None
    assert alone.samples is not None
    assert torch.allclose(together.samples, alone.samples, atol=0.02)
    chunked = attack(noisy_case(SPEC, clients), memory_mb=16)[1]
    assert chunked.samples is not None
    assert torch.allclose(together.samples, chunked.samples, atol=0.02)


def test_more_generations_and_restarts_do_not_make_it_worse() -> None:
    clients = sets([1, 1], seed=0)
    case = noisy_case(SPEC, clients)
    short, long, many = attack(case, steps=5), attack(case), attack(case, steps=5, restarts=3)
    for less, more, best in zip(short, long, many, strict=True):
        assert more.confidence > less.confidence
        assert best.confidence >= less.confidence


def test_what_it_would_not_do_is_refused() -> None:
    assert Fact.PUBLIC_DATA in GGL.needs
    for option in ({"patience": 5}, {"stop_below": 0.1}, {"population": 2}):
        with pytest.raises(ValidationError):
            ggl(**option)
