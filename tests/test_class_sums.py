"""Entries of the last layer that pruning cut, from those it left."""

import pytest
import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.class_sums import completed
from fedmi.attacks.engine.evidence import read
from fedmi.attacks.gradient.bias_labels import BiasLabels
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.classifiers import MLP
from fedmi.training.local import mean_gradient

SERVER, SHAPE, MODEL = Position.CURIOUS_SERVER, (1, 4, 4), MLP(hidden=(12,))
FACTS = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}


def batch(classes: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (8,), generator=rng)
    return torch.rand(8, *SHAPE, generator=rng), labels


def case_of(slopes: dict[str, Tensor], classes: int, protections: tuple[str, ...]) -> Case:
    state = dict(MODEL.build(SHAPE, classes, Seed.root(3)).state_dict())
    sent = Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), state, 0)
    back = Observation(SERVER, Channel.GRADIENT, 1, (0,), slopes, 0, {"num_examples": 8.0})
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=classes,
        facts=frozenset(FACTS),
        build=lambda: MODEL.module(SHAPE, classes),
        work=LocalWork(),
        protections=protections,
    )
    target = Target("client0", round=1, clients=(0,))
    return Case(Transcript(SERVER, (sent, back)), knowledge, (target,), Seed.root(2))


def pruned(slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The smaller half of each tensor cut, as `gradient_pruning` does tensor by tensor."""
    found = {}
    for name, part in slopes.items():
        kept = torch.zeros(part.numel())
        kept[part.abs().flatten().topk(part.numel() // 2).indices] = 1
        found[name] = part * kept.reshape(part.shape)
    return found


def slopes_of(classes: int, seed: int = 1) -> dict[str, Tensor]:
    model = MODEL.build(SHAPE, classes, Seed.root(3))
    return mean_gradient(model, *batch(classes, seed))


def test_of_two_classes_the_one_that_is_left_tells_the_other() -> None:
    whole = slopes_of(2)
    cut = {name: part.clone() for name, part in whole.items()}
    cut["3.bias"][0] = 0
    cut["3.weight"][1, ::2] = 0
    case = case_of(cut, 2, ("gradient_pruning",))
    (seen,) = read(case, Channel.GRADIENT)
    for name in ("3.bias", "3.weight"):
        torch.testing.assert_close(completed(case, seen).gradient[name], whole[name])
    assert completed(case, seen).gradient["1.weight"].equal(cut["1.weight"])


def test_of_more_classes_two_that_are_cut_stay_cut() -> None:
    cut = {name: part.clone() for name, part in slopes_of(5).items()}
    cut["3.bias"][:2] = 0
    case = case_of(cut, 5, ("gradient_pruning",))
    (seen,) = read(case, Channel.GRADIENT)
    assert completed(case, seen).gradient["3.bias"][:2].tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_labels_of_a_pruned_update_are_read_as_those_of_a_whole_one(seed: int) -> None:
    attack = BiasLabels(position=SERVER, channel=Channel.GRADIENT)
    whole = slopes_of(2, seed)
    (clear,) = attack.reconstruct(case_of(whole, 2, ()))
    (told,) = attack.reconstruct(case_of(pruned(whole), 2, ("gradient_pruning",)))
    assert told.labels is not None
    assert clear.labels is not None
    assert sorted(told.labels.tolist()) == sorted(clear.labels.tolist())


def test_untold_of_it_labels_are_read_wrong_somewhere() -> None:
    attack = BiasLabels(position=SERVER, channel=Channel.GRADIENT)
    wrong = 0
    for seed in range(6):
        whole = slopes_of(2, seed)
        (clear,) = attack.reconstruct(case_of(whole, 2, ()))
        (untold,) = attack.reconstruct(case_of(pruned(whole), 2, ()))
        assert untold.labels is not None
        assert clear.labels is not None
        wrong += sorted(untold.labels.tolist()) != sorted(clear.labels.tolist())
    assert wrong
