"""DLG and iDLG: near exact on smooth untrained networks, and said so where they are not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.leakage import SEVERAL, UNSOLVED
from fedmi.attacks.gradient.dlg import DLG
from fedmi.attacks.gradient.idlg import IDLG
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.convolutional import LeNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import (
    SERVER,
    Batch,
    base_model,
    gradient_case,
    make_case,
    psnr,
    sets,
    trained,
)

LENET = LeNet(channels=8)
UNIFORM = LeNet(channels=8, init="uniform")
CIFAR = Path(__file__).parents[1].parent / "shared/data/cifar10_subset.npz"


def dlg(channel: Channel = Channel.GRADIENT, **options: object) -> DLG:
    return DLG.model_validate({"position": SERVER, "channel": channel, "steps": 250, **options})


def idlg(channel: Channel = Channel.GRADIENT, **options: object) -> IDLG:
    return IDLG.model_validate({"position": SERVER, "channel": channel, "steps": 250, **options})


@pytest.mark.parametrize("spec", [LENET, UNIFORM])
@pytest.mark.parametrize("attack", [dlg(steps=400), idlg(steps=400)])
def test_one_record_is_nearly_exact(spec: LeNet, attack: DLG | IDLG) -> None:
    clients = sets([1] * 2, seed=0)
    found = attack.reconstruct(gradient_case(spec, clients))
    assert psnr(found, clients).min() > 30
    for answer, (_, labels) in zip(found, clients, strict=True):
        assert torch.equal(answer.labels, labels)
        assert UNSOLVED not in answer.flags


def test_labels_are_found_without_being_granted_and_records_of_a_batch_apart() -> None:
    clients = sets([2], seed=1)
    (found,) = dlg(steps=400).reconstruct(gradient_case(LENET, clients))
    inputs, labels = clients[0]
    assert found.samples is not None
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(labels.tolist())
    errors = [(found.samples[[*order]] - inputs).square().mean() for order in ([0, 1], [1, 0])]
    assert min(errors) < 1e-3
    assert SEVERAL in found.flags


def test_a_gradient_of_other_records_says_nothing_of_these() -> None:
    clients, others = sets([1] * 3, seed=0), sets([1] * 3, seed=77)
    own = psnr(idlg().reconstruct(gradient_case(LENET, clients)), clients)
    prior = psnr(idlg().reconstruct(gradient_case(LENET, others)), clients)
    assert (prior < 15).all()
    assert (own > prior + 15).all()


def test_a_uniformly_random_gradient_gives_nothing_and_is_flagged() -> None:
    clients = sets([1], seed=0)
    masked = {
        name: torch.rand(part.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        for name, part in base_model(LENET).named_parameters()
    }
    case = make_case(LENET, [masked], [1], Channel.GRADIENT, LocalWork())
    found = dlg(steps=100).reconstruct(case)
    assert psnr(found, clients)[0] < 15
    assert UNSOLVED in found[0].flags


def test_too_few_steps_are_flagged() -> None:
    (found,) = dlg(steps=3).reconstruct(gradient_case(LENET, sets([1], seed=0)))
    assert UNSOLVED in found.flags


def test_a_target_does_not_depend_on_the_others() -> None:
    clients = sets([1] * 3, seed=2)
    together = dlg(steps=60).reconstruct(gradient_case(LENET, clients))
    alone = dlg(steps=60).reconstruct(gradient_case(LENET, clients, only=1))
    assert together[1].samples is not None
    torch.testing.assert_close(alone[0].samples, together[1].samples, atol=1e-3, rtol=0)


def test_more_restarts_are_never_worse_by_the_loss() -> None:
    case = gradient_case(UNIFORM, sets([1] * 2, seed=3))
    one, four = (
        dlg(steps=60, start_std=1.0, restarts=count, memory_mb=16).reconstruct(case)
        for count in (1, 4)
    )
    for best, first in zip(four, one, strict=True):
        assert (best.confidence >= 1.5 * first.confidence).all()


def test_a_bad_update_is_answered_blindly_and_leaves_the_others_alone() -> None:
    clients = sets([1] * 3, seed=0)
    grads = [mean_gradient(base_model(LENET), *batch) for batch in clients]
    grads[0] = {name: torch.full_like(part, torch.nan) for name, part in grads[0].items()}
    grads[2] = {name: torch.zeros_like(part) for name, part in grads[2].items()}
    case = make_case(LENET, grads, [1] * 3, Channel.GRADIENT, LocalWork())
    for attack in (dlg(), idlg()):
        found = attack.reconstruct(case)
        assert found[0].flags == {"non_finite"}
        assert found[2].flags == {"zero_gradients"}
        assert psnr(found, clients)[1] > 30


def test_local_steps_are_simulated_and_labels_need_no_dealing() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=1), steps=2)
    clients = sets([1], seed=4)
    case = gradient_case(LENET, clients)
    state = trained(LENET, clients[0], work, case.seed)
    case = make_case(LENET, [state], [1], Channel.CLIENT_UPDATE, work)
    for attack in (dlg(Channel.CLIENT_UPDATE), idlg(Channel.CLIENT_UPDATE)):
        assert psnr(attack.reconstruct(case), clients)[0] > 25


def test_granted_labels_are_used_as_they_are() -> None:
    clients = sets([1], seed=5)
    wrong = (clients[0][1] + 1) % 10
    case = _granting(gradient_case(LENET, clients), wrong)
    for attack in (dlg(steps=30), idlg(steps=30)):
        (found,) = attack.reconstruct(case)
        assert torch.equal(found.labels, wrong)
        assert psnr([found], clients)[0] < 15


def test_granted_labels_that_do_not_fit_are_refused_by_name() -> None:
    case = _granting(gradient_case(LENET, sets([2], seed=5)), torch.tensor([1, 2, 3]))
    with pytest.raises(AttackError, match="3 labels granted, but the update holds 2"):
        dlg().reconstruct(case)


def test_idlg_names_the_attack_for_several_records() -> None:
    with pytest.raises(AttackError, match="use the attack 'dlg'"):
        idlg().reconstruct(gradient_case(LENET, sets([2], seed=0)))


def test_adam_goes_down_as_well() -> None:
    clients = sets([1], seed=0)
    case = gradient_case(UNIFORM, clients)
    few, many = (
        idlg(optimizer="adam", learning_rate=0.02, steps=steps).reconstruct(case)
        for steps in (5, 250)
    )
    assert psnr(many, clients)[0] > psnr(few, clients)[0] + 2


def _granting(case: Case, labels: torch.Tensor) -> Case:
    knowledge = replace(
        case.knowledge,
        facts=case.knowledge.facts | {Fact.LABELS},
        labels={"client0": labels},
    )
    return replace(case, knowledge=knowledge)


def _cifar(spec: LeNet, count: int) -> tuple[Case, list[Batch]]:
    """A client an image of CIFAR-10, on the untrained network."""
    with np.load(CIFAR) as file:
        inputs = torch.from_numpy(file["x_train"][:count]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["y_train"][:count]).long().flatten()
    clients = list(zip(inputs.split(1), labels.split(1), strict=True))
    shape, model = (3, 32, 32), spec.build((3, 32, 32), 10, Seed.root(3))
    start = Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), dict(model.state_dict()), 0)
    seen = [
        Observation(
            SERVER, Channel.GRADIENT, 1, (c,), mean_gradient(model, *batch), 0, {"num_examples": 1}
        )
        for c, batch in enumerate(clients)
    ]
    knowledge = Knowledge(
        input_shape=shape,
        classes=10,
        facts=DLG.needs,
        build=lambda: spec.module(shape, 10),
        work=LocalWork(),
    )
    targets = tuple(Target(f"client{c}", round=1, clients=(c,)) for c in range(count))
    return Case(Transcript(SERVER, (start, *seen)), knowledge, targets, Seed.root(5)), clients


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 subset is not here")
@pytest.mark.parametrize("init", ["default", "uniform"])
def test_cifar_images_on_the_papers_network(init: str) -> None:
    case, clients = _cifar(LeNet.model_validate({"init": init}), 2)
    assert (
        psnr(DLG(position=SERVER, channel=Channel.GRADIENT).reconstruct(case), clients).min() > 30
    )


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 subset is not here")
def test_a_relu_network_stops_it_and_the_answer_says_so() -> None:
    case, clients = _cifar(LeNet(activation="relu"), 1)
    found = dlg(steps=150).reconstruct(case)
    assert psnr(found, clients).max() < 20
    assert UNSOLVED in found[0].flags
