"""SPEAR: whole batches exactly where theory says so, named flags where it says nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.low_rank import determined, exchanged, mixture, sampled, selected
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.attacks.gradient.spear import Spear
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import LeNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import (
    CLASSES,
    SERVER,
    SHAPE,
    Batch,
    base_model,
    gradient_case,
    make_case,
    sets,
    trained,
)

WIDE = MLP(hidden=(200, 200))
ONE_STEP = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=64), steps=1)


def spear(channel: Channel = Channel.GRADIENT, **options: object) -> Spear:
    return Spear.model_validate(
        {"position": SERVER, "channel": channel, "submatrices": 20_000, **options}
    )


def recovered(answer: Reconstruction, truth: Batch, above: float = 60.0) -> int:
    """How many of the true records have a PSNR above so many dB in the answer."""
    assert answer.samples is not None
    assert answer.samples.shape == truth[0].shape
    error = (answer.samples[:, None] - truth[0][None]).square().flatten(2).mean(2).min(0).values
    return int((-10 * error.clamp_min(1e-20).log10() > above).sum())


def updates(clients: list[Batch], work: LocalWork, spec: ModelSpec = WIDE) -> Case:
    payloads = [trained(spec, batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
    counts = [len(labels) for _, labels in clients]
    return make_case(spec, payloads, counts, Channel.CLIENT_UPDATE, work)


@pytest.mark.parametrize("records", [1, 2, 4, 8, 16])
def test_a_whole_batch_is_recovered_exactly(records: int) -> None:
    clients = sets([records], seed=records)
    (found,) = spear().reconstruct(gradient_case(WIDE, clients))
    assert recovered(found, clients[0]) == records
    assert found.flags == frozenset()
    assert (found.confidence >= 0.995).all()
    assert found.labels is None


def test_the_papers_own_search_needs_no_guide() -> None:
    clients = sets([5], seed=2)
    plain = spear(guided=False, peel=False, submatrices=100_000)
    (found,) = plain.reconstruct(gradient_case(WIDE, clients))
    assert recovered(found, clients[0]) == 5


def test_it_recovers_more_of_a_batch_than_linear_inversion() -> None:
    clients = sets([16], seed=3)
    case = gradient_case(WIDE, clients)
    analytic = LinearInversion(position=SERVER, channel=Channel.GRADIENT)
    assert recovered(analytic.reconstruct(case)[0], clients[0]) < 12
    assert recovered(spear().reconstruct(case)[0], clients[0]) == 16


def test_an_update_of_one_step_works_as_a_gradient_does() -> None:
    clients = sets([4, 3], seed=4)
    found = spear(Channel.CLIENT_UPDATE).reconstruct(updates(clients, ONE_STEP))
    for answer, batch in zip(found, clients, strict=True):
        # the weights are float32, so that an update is their difference to 7 digits
        assert recovered(answer, batch, above=40) == len(batch[1])
        assert "several_steps" not in answer.flags


def test_several_small_local_steps_are_inverted_and_flagged() -> None:
    clients = sets([6], seed=5)
    work = LocalWork(recipe=Recipe(learning_rate=0.01, batch_size=2), epochs=2)
    (found,) = spear(Channel.CLIENT_UPDATE).reconstruct(updates(clients, work))
    assert "several_steps" in found.flags
    assert recovered(found, clients[0], above=40) == 6


def test_an_answer_that_is_not_the_only_one_is_flagged() -> None:
    # two inputs that no neuron tells apart by its silence: any mixture of the two fits
    ((inputs, labels),) = sets([3], seed=14)
    near = inputs[1] + 1e-3 * (inputs[2] - inputs[1])
    batch = torch.stack([inputs[0], inputs[1], near]), labels[[0, 1, 2]]
    (found,) = spear(submatrices=4_000).reconstruct(gradient_case(WIDE, [batch]))
    assert found.flags & {"not_unique", "samples_exhausted", "rank_below_records"}


def test_a_target_does_not_depend_on_the_others() -> None:
    clients = sets([5, 4], seed=6)
    both = spear().reconstruct(gradient_case(WIDE, clients))
    (alone,) = spear().reconstruct(gradient_case(WIDE, clients, only=1))
    assert alone.samples is not None
    assert both[1].samples is not None
    assert torch.equal(alone.samples, both[1].samples)


def test_a_duplicate_record_leaves_the_rest_and_a_flag() -> None:
    ((inputs, labels),) = sets([4], seed=7)
    batch = inputs[[0, 1, 2, 2]], labels[[0, 1, 2, 2]]
    (found,) = spear().reconstruct(gradient_case(WIDE, [batch]))
    assert "rank_below_records" in found.flags
    assert recovered(found, batch) == 4
    assert int((found.confidence == -1).sum()) == 1


def test_more_records_than_told_are_flagged() -> None:
    clients = sets([8], seed=8)
    payload = mean_gradient(base_model(WIDE), *clients[0])
    case = make_case(WIDE, [payload], [5], Channel.GRADIENT, ONE_STEP)
    (found,) = spear(submatrices=4_000).reconstruct(case)
    assert "rank_above_records" in found.flags
    assert found.samples is not None
    assert len(found.samples) == 5


def test_a_narrow_layer_gives_a_partial_answer() -> None:
    spec, clients = MLP(hidden=(12,)), sets([16], seed=9)
    (found,) = spear().reconstruct(gradient_case(spec, clients))
    assert found.flags >= {"too_narrow", "samples_exhausted"}
    assert recovered(found, clients[0]) < 8


def test_an_exhausted_budget_is_flagged_and_still_answers() -> None:
    clients = sets([12], seed=10)
    (found,) = spear(peel=False, submatrices=0).reconstruct(gradient_case(WIDE, clients))
    assert "samples_exhausted" in found.flags
    assert found.samples is not None
    assert found.samples.shape == (12, *SHAPE)
    assert (found.confidence <= 0).all()
    assert recovered(found, clients[0]) < 12


def test_noise_hides_the_records() -> None:
    clients = sets([8], seed=11)
    rng = torch.Generator().manual_seed(0)
    payload = {
        name: slope + 1e-2 * torch.randn(slope.shape, generator=rng)
        for name, slope in mean_gradient(base_model(WIDE), *clients[0]).items()
    }
    case = make_case(WIDE, [payload], [8], Channel.GRADIENT, ONE_STEP)
    (found,) = spear(submatrices=4_000).reconstruct(case)
    assert recovered(found, clients[0], above=30) == 0
    assert "rank_below_records" in found.flags
    assert "zero_gradients" not in found.flags


def test_a_dead_layer_and_a_bad_update_are_answered_blind() -> None:
    clients = sets([3], seed=12)
    whole = mean_gradient(base_model(WIDE), *clients[0])
    dead = {n: s * float(not n.startswith("1.")) for n, s in whole.items()}
    bad = {n: s * float("nan") for n, s in whole.items()}
    case = make_case(WIDE, [dead, bad, whole], [3, 3, 3], Channel.GRADIENT, ONE_STEP)
    silent, broken, fine = spear().reconstruct(case)
    assert silent.flags >= {"zero_gradients_in_read_layer"}
    assert "zero_gradients" not in silent.flags
    assert (silent.confidence == -torch.inf).all()
    assert "non_finite" in broken.flags
    assert recovered(fine, clients[0]) == 3


@pytest.mark.parametrize(
    ("spec", "word"),
    [(Softmax(), "nothing"), (MLP(activation="tanh"), "Tanh"), (LeNet(), "Conv2d")],
)
def test_it_names_the_layer_it_cannot_read(spec: ModelSpec, word: str) -> None:
    assert word in spear().unsuited(spec.blueprint(SHAPE, CLASSES))
    case = gradient_case(spec, sets([2], seed=0))
    with pytest.raises(AttackError, match=word):
        spear().reconstruct(case)


def test_a_layer_without_bias_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    assert "'1' has no bias" in spear().unsuited(network)
    assert spear().unsuited(WIDE.blueprint(SHAPE, CLASSES)) == ""


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def planted(records: int, neurons: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, c, D, X): a layer whose D has zeros just where z <= 0."""
    rng = torch.Generator().manual_seed(records)
    weight = torch.randn(neurons, 30, generator=rng, dtype=torch.float64)
    bias = torch.randn(neurons, generator=rng, dtype=torch.float64)
    inputs = torch.rand(records, 30, generator=rng, dtype=torch.float64)
    reach = inputs @ weight.T + bias
    slopes = torch.randn(reach.shape, generator=rng, dtype=torch.float64) * (reach > 0)
    return weight, bias, slopes.T, inputs


def test_the_factors_are_those_of_the_definition() -> None:
    weight, bias, columns, inputs = planted(4, 60)
    mixed = mixture(weight, bias, (columns @ inputs, columns.sum(1)), 4)
    assert mixed.rank == 4
    torch.testing.assert_close(mixed.left @ mixed.right[:, :-1], columns @ inputs)
    torch.testing.assert_close(mixed.left @ mixed.right[:, -1], columns.sum(1))
    true = unit(torch.linalg.lstsq(mixed.left, columns).solution.T)
    assert torch.equal(mixed.zeros(true), (columns.T == 0) & mixed.live)
    torch.testing.assert_close(mixed.inputs(torch.linalg.inv(true.T)), inputs)


def test_draws_hit_a_column_as_often_as_pairs_of_rows_do() -> None:
    weight, bias, columns, inputs = planted(3, 80)
    mixed = mixture(weight, bias, (columns @ inputs, columns.sum(1)), 3)
    true = unit(torch.linalg.lstsq(mixed.left, columns).solution.T)
    drawn = sampled(mixed, torch.zeros(1, 80).double(), 4_000, False, torch.Generator())
    hit = ((drawn @ true.T).abs() > 1 - 1e-9).any(1)
    pairs = mixed.left[mixed.live][torch.combinations(torch.arange(int(mixed.live.sum())))]
    normals = unit(torch.linalg.cross(pairs[:, 0], pairs[:, 1]))
    share = ((normals @ true.T).abs() > 1 - 1e-9).any(1).double().mean()
    assert abs(float(hit.double().mean() - share)) < 0.04  # five standard errors


def test_a_guided_draw_hits_more_often() -> None:
    weight, bias, columns, inputs = planted(8, 120)
    mixed = mixture(weight, bias, (columns @ inputs, columns.sum(1)), 8)
    true = unit(torch.linalg.lstsq(mixed.left, columns).solution.T)
    centres = inputs @ weight.T + bias
    hits = []
    for guided in (False, True):
        drawn = sampled(mixed, centres, 2_000, guided, torch.Generator())
        hits.append(int(((drawn @ true.T).abs() > 1 - 1e-9).any(1).sum()))
    assert hits[1] > 3 * hits[0]


def test_a_swap_mends_a_wrong_choice() -> None:
    weight, bias, columns, inputs = planted(4, 60)
    mixed = mixture(weight, bias, (columns @ inputs, columns.sum(1)), 4)
    true = unit(torch.linalg.lstsq(mixed.left, columns).solution.T)
    wrong = true.clone()
    wrong[2] = unit(true[1:2] + true[2:3])[0]
    mended = exchanged(mixed, selected(mixed, wrong), true)
    assert ((mended @ true.T).abs().max(1).values > 1 - 1e-9).all()


@pytest.mark.parametrize("alike", [True, False])
def test_zeros_tell_a_direction_only_where_they_leave_it_no_freedom(alike: bool) -> None:
    """Ten neurons silent for a record of three; all alike, they say no more than one."""
    weight, bias, columns, inputs = planted(3, 60)
    mixed = mixture(weight, bias, (columns @ inputs, columns.sum(1)), 3)
    left = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    left[:10] = torch.tensor([1.0, 2.0, 0.0])
    if not alike:
        left[9] = torch.tensor([2.0, 1.0, 0.0])
    mixed = replace(mixed, left=left, live=torch.ones(60, dtype=torch.bool))
    direction = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    assert int(mixed.zeros(direction).sum()) == 10
    assert determined(mixed, direction) is not alike


def test_no_targets_no_answers() -> None:
    case = gradient_case(WIDE, sets([3], seed=13))
    assert spear().reconstruct(replace(case, targets=())) == ()
