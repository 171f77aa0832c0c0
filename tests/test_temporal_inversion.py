"""Several rounds of one client: more is recovered than from one, where one says little."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.features import last_with_bias
from fedmi.attacks.engine.joint import JointObjective
from fedmi.attacks.engine.labels import recover
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.temporal_inversion import TemporalInversion
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.convolutional import ConvNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import SERVER, Batch, base_model, images, make_case, sets, trained

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


def changed(
    case: Case, number: int, change: Callable[[Observation], Observation]
) -> tuple[Case, TemporalInversion]:
    """The case with the gradient of one round changed, and the attack, on rounds 1 to 3."""
    seen = tuple(
        change(item) if item.channel == Channel.GRADIENT and item.round == number else item
        for item in case.transcript.observations
    )
    case = replace(case, transcript=Transcript(SERVER, seen))
    attack = TemporalInversion(position=SERVER, channel=Channel.GRADIENT, rounds=(1, 2, 3), steps=1)
    return replace(case, targets=attack.own_targets(case.transcript)), attack


def test_flags_of_all_rounds_used_are_told() -> None:
    (batch,) = sets([1], seed=0)

    def silent(seen: Observation) -> Observation:
        first = next(iter(seen.payload))
        return replace(seen, payload={**seen.payload, first: 0 * seen.payload[first]})

    case, attack = changed(rounds_of(batch, 3), 1, silent)
    assert attack.reconstruct(case)[0].flags == {"zero_gradients_in_first_layer"}
    without = attack.model_copy(update={"rounds": (2, 3)})
    assert without.reconstruct(case)[0].flags == set()


@pytest.mark.parametrize("belief", [{}, {"records": 3}, {"records": 2}])
def test_rounds_of_another_size_are_left_out_whatever_is_believed(belief: dict[str, int]) -> None:
    (batch,) = sets([2], seed=0)
    more = {"num_examples": 5.0}
    case, attack = changed(rounds_of(batch, 3), 2, lambda seen: replace(seen, clear=more))
    attack = TemporalInversion.model_validate({**attack.model_dump(), "assume": belief})
    (found,) = attack.reconstruct(case)
    false = {"false_knowledge: records 3 for 2"} if belief.get("records") == 3 else set()
    assert found.flags == {"rounds_left_out: 1 of 3"} | false
    assert found.samples is not None
    assert len(found.samples) == belief.get("records", 2)


def test_a_belief_leaves_no_round_of_the_same_size_out() -> None:
    (batch,) = sets([2], seed=0)
    case, attack = changed(rounds_of(batch, 3), 2, lambda seen: seen)
    attack = TemporalInversion.model_validate({**attack.model_dump(), "assume": {"records": 4}})
    assert attack.reconstruct(case)[0].flags == {"false_knowledge: records 4 for 2"}


def test_a_granted_order_is_that_of_the_last_round_alone() -> None:
    (batch,) = sets([4], seed=0)
    work = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=2), epochs=1)
    seen = []
    for number in (1, 2):
        state = dict(base_model(SPEC).state_dict())
        seen.append(Observation(SERVER, Channel.GLOBAL_MODEL, number, (), state, 0))
        sent, clear = trained(SPEC, batch, work, Seed.root(number)), {"num_examples": 4.0}
        seen.append(Observation(SERVER, Channel.CLIENT_UPDATE, number, (0,), sent, 0, clear))
    case = make_case(SPEC, [sent], [4], Channel.CLIENT_UPDATE, work, facts=[Fact.BATCH_ORDER])
    attack = TemporalInversion(position=SERVER, channel=Channel.CLIENT_UPDATE, rounds=(1, 2))
    transcript = Transcript(SERVER, tuple(seen))
    (target,) = attack.own_targets(transcript)
    told = (((2, 0), (3, 1)),)
    known = replace(case.knowledge, order={target.id: told})
    case = replace(case, transcript=transcript, targets=(target,), knowledge=known)
    problem = attack.problem(case, attack.read(case)[0])
    assert problem.evidence.plan.parties == told
    assert [item.plan.parties for item in problem.also] == [(((0, 1), (2, 3)),)]


def test_labels_are_read_from_the_first_round_as_a_sharp_model_hides_them() -> None:
    batch = images(8, 0), torch.tensor([2, 2, 2, 2, 3, 7, 7, 8])
    model = base_model(SPEC)
    with torch.no_grad():
        model.get_submodule(last_with_bias(model)).weight.mul_(30)
    sharp = {name: value.clone() for name, value in model.state_dict().items()}
    sent = mean_gradient(model, *batch)
    case, attack = changed(rounds_of(batch, 3), 3, lambda seen: replace(seen, payload=sent))
    seen = tuple(
        replace(item, payload=sharp)
        if item.channel == Channel.GLOBAL_MODEL and item.round == 3
        else item
        for item in case.transcript.observations
    )
    case = replace(case, transcript=Transcript(SERVER, seen))
    (evidence,) = attack.read(case)
    of_last = recover(case, evidence, attack.label_recovery)[0]
    assert of_last.sort().values.tolist() != batch[1].tolist()
    found = attack.labels_of(case, evidence)
    assert found.sort().values.tolist() == batch[1].tolist()
    (answer,) = attack.reconstruct(case)
    assert answer.labels is not None
    assert answer.labels.sort().values.tolist() == batch[1].tolist()


def test_the_trimmed_mean_bears_a_round_of_other_records() -> None:
    (mine,), (others,) = sets([2], seed=0), sets([2], seed=7)
    wrong = next(item for item in rounds_of(others, 3).transcript.on(Channel.GRADIENT, [3]))
    case, _ = changed(rounds_of(mine, 5), 3, lambda seen: replace(seen, payload=wrong.payload))
    mean, trimmed = (
        psnr_of(together(case, (1, 2, 3, 4, 5), combine=combine, steps=80), mine)
        for combine in ("mean", "trimmed")
    )
    assert trimmed > mean + 2


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


@pytest.mark.parametrize(("combine", "middle"), [("mean", 26.5), ("trimmed", 2.5)])
def test_the_trimmed_mean_leaves_out_the_extremes(combine: str, middle: float) -> None:
    parts = tuple(Slope(value) for value in (1.0, 2.0, 3.0, 100.0))
    joint = JointObjective(parts, "mean" if combine == "mean" else "trimmed")
    points = torch.ones(2, 3)
    losses, slopes = joint.slope(points)
    assert losses.equal(joint.losses(points))
    assert losses.tolist() == [3 * middle, 3 * middle]
    assert (slopes == middle).all()
