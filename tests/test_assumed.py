"""Beliefs about the local training: what they change, and what is said where they are not so."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.assumed import Assumed
from fedmi.attacks.engine.evidence import read
from fedmi.attacks.engine.plan import Plan
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.classifiers import MLP
from tests.gradient_cases import SERVER, base_model, gradient_case, make_case, sets, trained

SPEC = MLP(hidden=(8,))
RECIPE = Recipe(learning_rate=0.1, batch_size=2)
BY_STEPS, BY_EPOCHS = LocalWork(recipe=RECIPE, steps=2), LocalWork(recipe=RECIPE, epochs=2)


def updates(sizes: list[int], work: LocalWork = BY_STEPS) -> Case:
    """A client update of each size."""
    sent = [trained(SPEC, batch, work, Seed.root(0)) for batch in sets(sizes, seed=0)]
    return make_case(SPEC, sent, sizes, Channel.CLIENT_UPDATE, work)


def average(clear: Mapping[str, float], told: Mapping[str, int] | None = None) -> Case:
    """One average of two clients."""
    case = updates([4, 4], BY_EPOCHS)
    start, one, two = case.transcript.observations
    mean = {name: (value + two.payload[name]) / 2 for name, value in one.payload.items()}
    seen = Observation(SERVER, Channel.AGGREGATE, 1, (0, 1), mean, 0, dict(clear))
    knowledge = replace(case.knowledge, num_examples=dict(told or {}))
    target = Target("average", round=1, clients=(0, 1))
    return replace(
        case,
        transcript=Transcript(SERVER, (start, seen)),
        knowledge=knowledge,
        targets=(target,),
    )


def answers(
    case: Case, channel: Channel = Channel.CLIENT_UPDATE, local: bool = True, **belief: float
) -> tuple[Reconstruction, ...]:
    attack = InvertingGradients.model_validate(
        {
            "position": SERVER,
            "channel": channel,
            "steps": 1,
            "label_orders": 1,
            "local_simulation": local,
            "assume": belief,
        }
    )
    return attack.reconstruct(case)


def plan(case: Case, channel: Channel = Channel.CLIENT_UPDATE, **belief: int) -> Plan:
    believed, held = Assumed.model_validate(belief).applied(case)
    assert held == set(belief)
    return read(believed, channel)[0].plan


@pytest.mark.parametrize(
    ("work", "belief", "steps", "flag"),
    [
        (BY_STEPS, {"steps": 3}, [2, 2, 2], "steps 3 for 2"),
        (BY_STEPS, {"batch_size": 3}, [3, 1], "batch_size 3 for 2"),
        (BY_STEPS, {"epochs": 3}, [2] * 6, "epochs 3 for 1"),
        (BY_EPOCHS, {"epochs": 1}, [2, 2], "epochs 1 for 2"),
        (BY_EPOCHS, {"steps": 3}, [2, 2, 2], "steps 3 for 4"),
        (BY_EPOCHS, {"records": 5}, [2, 2, 1, 2, 2, 1], "records 5 for 4"),
    ],
)
def test_a_belief_changes_the_plan_and_is_told(
    work: LocalWork, belief: dict[str, int], steps: list[int], flag: str
) -> None:
    case = updates([4], work)
    (party,) = plan(case, **belief).parties
    assert [len(rows) for rows in party] == steps
    assert answers(case, **belief)[0].flags == {f"false_knowledge: {flag}"}


@pytest.mark.parametrize(
    ("work", "belief"),
    [
        (BY_STEPS, {"epochs": 1}),
        (BY_EPOCHS, {"steps": 4}),
        (BY_EPOCHS, {"epochs": 2, "batch_size": 2, "records": 4, "learning_rate": 0.1}),
    ],
)
def test_what_comes_to_the_same_is_true(work: LocalWork, belief: dict[str, float]) -> None:
    assert answers(updates([4], work), **belief)[0].flags == set()


def test_records_are_judged_target_by_target() -> None:
    found = answers(updates([4, 5, 6], BY_EPOCHS), records=5)
    assert [set(one.flags) for one in found] == [
        {"false_knowledge: records 5 for 4"},
        set(),
        {"false_knowledge: records 5 for 6"},
    ]


@pytest.mark.parametrize(
    ("clear", "told"),
    [
        ({"num_examples": 8.0}, None),
        ({"num_examples/0": 4.0, "num_examples/1": 4.0}, None),
        ({}, {"average": 8}),
    ],
)
def test_records_of_an_average_are_judged_too(
    clear: dict[str, float], told: dict[str, int] | None
) -> None:
    case = average(clear, told)
    (false,) = answers(case, Channel.AGGREGATE, records=5)
    (true,) = answers(case, Channel.AGGREGATE, records=4)
    assert false.flags == {"false_knowledge: records 10 for 8"}
    assert true.flags == set()


def test_who_holds_how_many_of_an_average_is_judged_where_the_sum_is_right() -> None:
    case = average({"num_examples/0": 3.0, "num_examples/1": 5.0})
    (found,) = answers(case, Channel.AGGREGATE, records=4)
    assert found.flags == {"false_knowledge: records 4+4 for 3+5"}


def test_counts_granted_beside_the_transcript_are_compared() -> None:
    case = updates([4])
    start, seen = case.transcript.observations
    transcript = replace(case.transcript, observations=(start, replace(seen, clear={})))
    knowledge = replace(case.knowledge, num_examples={"client0": 4})
    case = replace(case, transcript=transcript, knowledge=knowledge)
    assert answers(case, records=3)[0].flags == {"false_knowledge: records 3 for 4"}
    assert answers(case, records=4)[0].flags == set()


@pytest.mark.parametrize(
    "belief", [{"batch_size": 3}, {"learning_rate": 0.5}, {"epochs": 3}, {"steps": 3}]
)
def test_beliefs_about_training_change_nothing_of_a_gradient(belief: dict[str, float]) -> None:
    case = gradient_case(SPEC, sets([4], seed=0))
    (name,) = belief
    (found,) = answers(case, Channel.GRADIENT, **belief)
    assert found.flags == {f"belief_without_effect: {name}"}
    (plain,) = answers(case, Channel.GRADIENT)
    assert found.confidence.equal(plain.confidence)


def test_a_batch_beyond_the_records_changes_nothing() -> None:
    case = updates([4], LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=8), steps=2))
    assert answers(case, batch_size=16)[0].flags == {"belief_without_effect: batch_size"}


def test_records_that_the_steps_do_not_reach_change_nothing() -> None:
    assert answers(updates([4]), records=5)[0].flags == {"belief_without_effect: records"}


def test_steps_win_over_epochs() -> None:
    found = answers(updates([4]), epochs=3, steps=3)[0].flags
    assert found == {"belief_without_effect: epochs", "false_knowledge: steps 3 for 2"}


def test_a_granted_order_leaves_a_batch_size_nothing_to_say() -> None:
    case = updates([4])
    (_, labels), *_ = sets([4], seed=0)
    knowledge = replace(
        case.knowledge,
        facts=case.knowledge.facts | {Fact.BATCH_ORDER, Fact.LABELS},
        order={"client0": (((0, 1), (2, 3)),)},
        labels={"client0": labels},
    )
    case = replace(case, knowledge=knowledge)
    assert answers(case, batch_size=3)[0].flags == {"belief_without_effect: batch_size"}
    (rate,) = answers(case, learning_rate=0.5)
    assert rate.flags == {"false_knowledge: learning_rate 0.5 for 0.1"}


def test_an_update_read_as_one_gradient_is_scaled_by_what_is_believed() -> None:
    (found,) = answers(updates([4]), local=False, learning_rate=0.5)
    assert found.flags == {"false_knowledge: learning_rate 0.5 for 0.1"}


def test_where_the_true_number_is_not_known_nothing_is_called_false() -> None:
    case = updates([4])
    start, seen = case.transcript.observations
    bare = replace(case.transcript, observations=(start, replace(seen, clear={})))
    (found,) = answers(replace(case, transcript=bare), records=3)
    assert found.flags == set()
    assert found.samples is not None
    assert len(found.samples) == 3


def test_the_base_of_the_belief_is_the_case_itself() -> None:
    case = updates([4])
    believed, held = Assumed().applied(case)
    assert held == set()
    assert believed.knowledge.work == case.knowledge.work
    assert torch.equal(
        next(base_model(SPEC).parameters()),
        next(iter(believed.transcript.observations[0].payload.values())),
    )
