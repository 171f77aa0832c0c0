"""Several rounds of one client: more is recovered than from one, where one says little."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.joint import JointObjective
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.temporal_inversion import TemporalInversion
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.words import Channel
from fedmi.models.convolutional import ConvNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import SERVER, Batch, base_model, make_case, sets

SPEC = ConvNet(width=8, blocks=2)


def rounds_of(batch: Batch, count: int, noise: float = 0.0, seed: int = 0) -> Case:
    """Gradients of the same records on the way of a training, each with fresh Gaussian noise."""
    model, rng = base_model(SPEC), torch.Generator().manual_seed(seed)
    seen = []
    for number in range(1, count + 1):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append(Observation(SERVER, Channel.GLOBAL_MODEL, number, (), state, 0))
        sent = mean_gradient(model, *batch)
        sent = {n: p + noise * torch.randn(p.shape, generator=rng) for n, p in sent.items()}
        clear = {"num_examples": float(len(batch[1]))}
        seen.append(Observation(SERVER, Channel.GRADIENT, number, (0,), sent, 0, clear))
        model.load_state_dict(
            {n: w - 0.3 * mean_gradient(model, *batch)[n] for n, w in state.items()}
        )
    case = make_case(SPEC, [sent], [len(batch[1])], Channel.GRADIENT, LocalWork())
    return replace(case, transcript=Transcript(SERVER, tuple(seen)))


def psnr_of(found: Reconstruction, batch: Batch) -> float:
    assert found.samples is not None
    errors = (found.samples[:, None] - batch[0][None]).square().mean((2, 3, 4))
    return float(-10 * errors.min(0).values.mean().log10())


def together(case: Case, rounds: tuple[int, ...], **options: object) -> Reconstruction:
    attack = TemporalInversion.model_validate(
        {"position": SERVER, "channel": Channel.GRADIENT, "rounds": rounds, "steps": 150, **options}
    )
    (found,) = attack.reconstruct(replace(case, targets=attack.own_targets(case.transcript)))
    return found


def alone(case: Case, number: int) -> Reconstruction:
    attack = InvertingGradients(position=SERVER, channel=Channel.GRADIENT, steps=150)
    target = Target("alone", round=number, clients=(0,))
    return attack.reconstruct(replace(case, targets=(target,)))[0]


def test_rounds_together_see_through_noise_that_hides_each_alone() -> None:
    (batch,) = sets([2], seed=0)
    case = rounds_of(batch, 6, noise=0.02)
    singles = [psnr_of(alone(case, number), batch) for number in range(1, 7)]
    assert psnr_of(together(case, tuple(range(1, 7))), batch) > sum(singles) / 6 + 1


def test_rounds_of_other_records_give_nothing_of_these() -> None:
    (mine,), (others,) = sets([2], seed=0), sets([2], seed=1)
    found = together(rounds_of(mine, 3), (1, 2, 3))
    prior_only = together(rounds_of(others, 3), (1, 2, 3))
    assert psnr_of(found, mine) > psnr_of(prior_only, mine) + 5


def test_one_target_a_client_and_rounds_that_were_not_heard_are_told() -> None:
    (batch,) = sets([1], seed=0)
    case = rounds_of(batch, 3)
    found = together(case, (1, 2, 3, 9))
    assert found.target == Target("client 0 of 4 rounds", None, 3, (0,))
    assert found.flags == {"rounds_left_out: 1 of 4"}
    silent = tuple(
        replace(seen, payload={n: torch.zeros_like(p) for n, p in seen.payload.items()})
        if seen.channel == Channel.GRADIENT and seen.round == 2
        else seen
        for seen in case.transcript.observations
    )
    dull = replace(case, transcript=Transcript(SERVER, silent))
    assert together(dull, (1, 2, 3)).flags == {"rounds_left_out: 1 of 3"}
    nothing = replace(
        case,
        transcript=Transcript(
            SERVER,
            tuple(
                replace(s, payload={n: p * torch.nan for n, p in s.payload.items()})
                if s.channel == Channel.GRADIENT
                else s
                for s in case.transcript.observations
            ),
        ),
    )
    assert together(nothing, (1, 2, 3)).flags == {"non_finite"}


class Slope:
    restarts = 1

    def __init__(self, value: float) -> None:
        self.value = value

    def losses(self, points: Tensor) -> Tensor:
        return self.value * points.sum(1)

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(points), torch.full_like(points, self.value)

    def kept(self, problems: Tensor) -> "Slope":
        return self


@pytest.mark.parametrize(("combine", "slope"), [("mean", 26.5), ("trimmed", 2.5)])
def test_the_trimmed_mean_leaves_out_the_extremes(combine: str, slope: float) -> None:
    parts = tuple(Slope(value) for value in (1.0, 2.0, 3.0, 100.0))
    joint = JointObjective(parts, "mean" if combine == "mean" else "trimmed")
    points = torch.ones(2, 3)
    losses, slopes = joint.slope(points)
    assert losses.equal(joint.losses(points))
    assert losses.tolist() == [79.5, 79.5]
    assert (slopes == slope).all()
