"""Gradient inversion: exact where theory says so, no better than prior-only where it cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmi.attacks.base import Attack, Case
from fedmi.attacks.engine.descent import Schedule, minimise
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.network import load, simulate
from fedmi.attacks.engine.plan import Plan, deal, sampled, sequential
from fedmi.attacks.engine.unknowns import Pixels
from fedmi.attacks.gradient.bias_labels import BiasLabels
from fedmi.attacks.gradient.idlg_labels import IDLGLabels
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.protections.dp.opacus_learner import OpacusLearner
from fedmi.protections.pruning import largest
from fedmi.training.local import batches, mean_gradient
from tests.gradient_cases import (
    CLASSES,
    SERVER,
    SHAPE,
    base_model,
    gradient_case,
    images,
    make_case,
    psnr,
    sets,
    trained,
)

LENET = LeNet(channels=8)


def inverting(channel: Channel = Channel.GRADIENT, **options: object) -> InvertingGradients:
    return InvertingGradients.model_validate(
        {"position": SERVER, "channel": channel, "steps": 120, **options}
    )


def analytic(channel: Channel = Channel.GRADIENT) -> LinearInversion:
    return LinearInversion(position=SERVER, channel=channel)


@pytest.mark.parametrize("spec", [Softmax(), MLP(), MLP(activation="sigmoid")])
def test_linear_inversion_is_exact_for_one_record(spec: ModelSpec) -> None:
    clients = sets([1] * 4, seed=0)
    found = analytic().reconstruct(gradient_case(spec, clients))
    assert psnr(found, clients).min() > 80  # mean squared error below 1e-8


def test_linear_inversion_is_exact_through_local_steps_on_one_record() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=1), epochs=4)
    clients = sets([1] * 3, seed=0)
    payloads = [trained(MLP(), batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
    case = make_case(MLP(), payloads, [1] * 3, Channel.CLIENT_UPDATE, work)
    assert psnr(analytic(Channel.CLIENT_UPDATE).reconstruct(case), clients).min() > 60


def test_linear_inversion_picks_the_records_of_a_relu_batch_apart() -> None:
    clients = sets([4], seed=1)
    (found,) = analytic().reconstruct(gradient_case(MLP(hidden=(512,)), clients))
    assert found.samples is not None
    assert found.samples.shape == (4, *SHAPE)
    nearest = torch.cdist(clients[0][0].flatten(1), found.samples.flatten(1)).min(1).values
    assert (nearest.square() / 256 < 1e-4).all()


def test_linear_inversion_names_the_layer_it_cannot_invert() -> None:
    with pytest.raises(AttackError, match="layer '0' is Conv2d"):
        analytic().reconstruct(gradient_case(LENET, sets([1], seed=0)))


@pytest.mark.parametrize("spec", [LENET, ConvNet(width=8, blocks=2), MLP(activation="sigmoid")])
def test_inverting_gradients_beats_prior_only(spec: ModelSpec) -> None:
    private, public = sets([1] * 6, seed=0), sets([1] * 6, seed=1)
    found = inverting().reconstruct(gradient_case(spec, private))
    prior_only = inverting().reconstruct(gradient_case(spec, public))
    advantage = psnr(found, private).mean() - psnr(prior_only, private).mean()
    assert advantage > 8


def test_noise_in_place_of_the_update_gives_nothing_beyond_prior_only() -> None:
    private, public = sets([1] * 12, seed=0), sets([1] * 12, seed=1)
    found = inverting().reconstruct(_masked(gradient_case(LENET, private), seed=0))
    prior_only = inverting().reconstruct(_masked(gradient_case(LENET, public), seed=1))
    advantage = psnr(found, private).mean() - psnr(prior_only, private).mean()
    assert abs(advantage) < 1
    strangers = psnr(found, private[1:] + private[:1])
    assert abs(psnr(found, private).mean() - strangers.mean()) < 1


def _masked(case: Case, seed: int) -> Case:
    """Every gradient replaced by uniform noise of the same norm, tensor by tensor."""
    rng = torch.Generator().manual_seed(seed)
    start, *seen = case.transcript.observations
    masked = []
    for one in seen:
        draws = {n: torch.rand(p.shape, generator=rng) - 0.5 for n, p in one.payload.items()}
        scaled = {n: draw * one.payload[n].norm() / draw.norm() for n, draw in draws.items()}
        masked.append(replace(one, payload=scaled))
    return replace(case, transcript=replace(case.transcript, observations=(start, *masked)))


def test_a_client_update_of_several_steps_is_inverted_by_simulating_them() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.02, batch_size=2), epochs=3)
    private, public = sets([2, 2], seed=0), sets([2, 2], seed=1)
    scores = []
    for clients in (private, public):
        payloads = [trained(LENET, batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
        labels = {f"client{c}": batch[1] for c, batch in enumerate(clients)}
        case = make_case(
            LENET, payloads, [2, 2], Channel.CLIENT_UPDATE, work, labels=labels, facts=[Fact.LABELS]
        )
        found = inverting(Channel.CLIENT_UPDATE).reconstruct(case)
        scores.append(
            sum(_matched(a.samples, batch[0]) for a, batch in zip(found, private, strict=True)) / 2
        )
    assert scores[0] > scores[1] + 8


def _matched(found: Tensor | None, truth: Tensor) -> float:
    """PSNR of a pair of records in the better of the two orders."""
    assert found is not None
    errors = [(found[order] - truth).square().mean() for order in ([0, 1], [1, 0])]
    return float(-10 * torch.stack(errors).min().log10())


@pytest.mark.parametrize(
    "work",
    [
        LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=4), epochs=2),
        LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=3, momentum=0.9), steps=5),
        LocalWork(recipe=Recipe(weight_decay=0.01, batch_size=8), epochs=3, proximal_mu=0.5),
    ],
)
def test_simulated_training_equals_real_training_given_the_truth(work: LocalWork) -> None:
    _assert_simulation_is_training(ConvNet(width=4, blocks=2), work)


def test_simulated_training_follows_batch_normalisation() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=5), epochs=2)
    spec = ConvNet(width=4, blocks=2, norm="batch")
    state, running = _assert_simulation_is_training(spec, work)
    assert running
    kept = 0.9 ** len(work.batch_sizes(10))
    base = base_model(spec).state_dict()
    for name, value in running.items():
        assert torch.allclose(state[name], value + kept * base[name], atol=1e-5)


def _assert_simulation_is_training(
    spec: ModelSpec, work: LocalWork
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (batch,) = sets([10], seed=2)
    state = trained(spec, batch, work, Seed.root(8))
    order = tuple(tuple(rows.tolist()) for rows in batches(10, work, Seed.root(8)))
    base = base_model(spec).state_dict()
    network = load(lambda: spec.module(SHAPE, CLASSES), base, work.recipe.mode)
    descent, running = simulate(network, *batch, Plan((order,)), work)
    for name, change in descent.items():
        assert torch.allclose(base[name] - change, state[name], atol=1e-6), name
    return state, running


def test_an_aggregate_is_simulated_as_the_average_of_its_clients() -> None:
    work = LocalWork(recipe=Recipe(batch_size=2))
    clients = sets([4, 4], seed=3)
    states = [trained(LENET, batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
    orders = [batches(4, work, Seed.root(c)) for c in range(2)]
    parties = tuple(
        tuple(tuple((rows + 4 * c).tolist()) for rows in steps) for c, steps in enumerate(orders)
    )
    base = base_model(LENET).state_dict()
    network = load(lambda: LENET.module(SHAPE, CLASSES), base, "train")
    inputs, labels = (torch.cat(parts) for parts in zip(*clients, strict=True))
    descent, _ = simulate(network, inputs, labels, Plan(parties), work)
    for name, change in descent.items():
        mean = (states[0][name] + states[1][name]) / 2
        assert torch.allclose(base[name] - change, mean, atol=1e-6), name


def test_a_target_alone_gives_what_it_gives_in_a_batch_of_mixed_sizes() -> None:
    clients = sets([1, 2, 1, 3], seed=4)
    attack = inverting(steps=40, restarts=2)
    together = attack.reconstruct(gradient_case(LENET, clients))
    assert [answer.target.id for answer in together] == [f"client{c}" for c in range(4)]
    for client, answer in enumerate(together):
        assert answer.samples is not None
        assert len(answer.samples) == len(answer.confidence) == len(clients[client][1])
        (alone,) = attack.reconstruct(gradient_case(LENET, clients, only=client))
        assert alone.samples is not None
        assert (alone.samples - answer.samples).abs().mean() < 1e-3
        assert torch.allclose(alone.confidence, answer.confidence, rtol=1e-2)


def test_memory_budget_changes_the_chunks_and_not_the_result() -> None:
    case = gradient_case(MLP(), sets([1] * 5, seed=0))
    shares: list[float] = []
    small = inverting(steps=20, restarts=4, memory_mb=16)
    found = small.reconstruct(replace(case, progress=shares.append))
    wide = inverting(steps=20, restarts=4).reconstruct(case)
    assert len(shares) > 21
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for one, other in zip(found, wide, strict=True):
        assert torch.allclose(one.confidence, other.confidence, rtol=1e-2)


def test_updates_that_say_nothing_are_flagged_and_harm_no_other() -> None:
    clients = sets([1, 1, 2], seed=0)
    case = gradient_case(MLP(), clients)
    start, first, second, third = case.transcript.observations
    broken = {n: torch.full_like(part, torch.nan) for n, part in first.payload.items()}
    silent = {n: torch.zeros_like(part) for n, part in third.payload.items()}
    seen = (start, replace(first, payload=broken), second, replace(third, payload=silent))
    case = replace(case, transcript=replace(case.transcript, observations=seen))
    for attack in (inverting(), analytic()):
        bad, good, none = attack.reconstruct(case)
        assert (bad.flags, good.flags, none.flags) == ({"non_finite"}, set(), {"zero_gradients"})
        for answer, count in ((bad, 1), (none, 2)):
            assert answer.samples is not None
            assert (answer.samples == 0.5).all()
            assert (answer.confidence == -torch.inf).all()
            assert answer.samples.shape == (count, *SHAPE)
        assert psnr([good], [clients[1]]).min() > 20


def test_labels_that_do_not_fit_the_update_are_refused() -> None:
    case = gradient_case(LENET, sets([2], seed=0))
    knowledge = replace(case.knowledge, labels={"client0": torch.tensor([1, 2, 3])})
    with pytest.raises(AttackError, match="3 labels granted, but the update holds 2 records"):
        inverting().reconstruct(replace(case, knowledge=knowledge))


def test_the_batch_order_counts_only_where_granted() -> None:
    work = LocalWork(recipe=Recipe(batch_size=2), epochs=2)
    (batch,) = sets([4], seed=0)
    payload = trained(LENET, batch, work, Seed.root(0))
    order = {"client0": (((0, 1), (2, 3), (3, 0), (1, 2)),)}
    plans = []
    for facts in ([], [Fact.BATCH_ORDER]):
        case = make_case(LENET, [payload], [4], Channel.CLIENT_UPDATE, work, facts=facts)
        case = replace(case, knowledge=replace(case.knowledge, order=order))
        plans.append(read(case, Channel.CLIENT_UPDATE)[0].plan)
    assert plans[0] == sequential([4], work) == Plan((((0, 1), (2, 3), (0, 1), (2, 3)),), (4,))
    assert plans[1] == Plan(order["client0"], (4,))


def test_a_missing_observation_is_named() -> None:
    case = gradient_case(LENET, sets([1], seed=0))
    case = replace(case, targets=(replace(case.targets[0], clients=(7,)),))
    with pytest.raises(AttackError, match=r"no gradient of clients \[7\] in round 1"):
        read(case, Channel.GRADIENT)


def test_without_the_batch_order_labels_carry_no_order() -> None:
    plan = sequential([6], LocalWork(recipe=Recipe(batch_size=2)))
    one = deal(torch.tensor([3, 3, 1, 1, 2, 2]), plan)
    other = deal(torch.tensor([1, 2, 3, 1, 2, 3]), plan)
    assert one.equal(other)
    assert one.sort().values.tolist() == [1, 1, 2, 2, 3, 3]


def test_minimise_returns_the_best_iterate_and_survives_a_row_that_is_not_finite() -> None:
    goal = torch.tensor([[0.25, 0.75], [0.5, 0.5]])

    class Quadratic:
        restarts = 1

        def losses(self, points: Tensor) -> Tensor:
            return (points - goal).square().sum(1) * torch.tensor([1.0, torch.nan])

        def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
            return self.losses(points), 2 * (points - goal) * torch.tensor([[1.0], [torch.nan]])

        def kept(self, problems: Tensor) -> "Quadratic":
            raise AssertionError("no problem was to stop")

    clamp = Pixels().project
    found, lowest = minimise(Quadratic(), torch.zeros(2, 2), Schedule(200, 0.05), clamp)
    assert torch.allclose(found[0], goal[0], atol=1e-3)
    assert found[1].tolist() == [0, 0]
    assert lowest[1] == torch.inf


def test_batch_normalisation_statistics_help_only_where_granted() -> None:
    spec = ConvNet(width=4, blocks=2, norm="batch")
    work = LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=4))
    payload = trained(spec, (images(4, 0), torch.arange(4)), work, Seed.root(1))
    case = make_case(spec, [payload], [4], Channel.CLIENT_UPDATE, work)
    attack = inverting(Channel.CLIENT_UPDATE, steps=5)
    moved = {n: v + 1 if "running" in n else v for n, v in payload.items()}
    other = make_case(spec, [moved], [4], Channel.CLIENT_UPDATE, work)
    assert attack.reconstruct(case)[0].confidence.equal(attack.reconstruct(other)[0].confidence)
    granted = [Fact.BN_STATISTICS]
    with_facts = [
        make_case(spec, [sent], [4], Channel.CLIENT_UPDATE, work, facts=granted)
        for sent in (payload, moved)
    ]
    true, false = (attack.reconstruct(one)[0].confidence[0] for one in with_facts)
    assert true != false


def test_a_model_that_ends_in_a_convolution_has_no_labels_to_read() -> None:
    class Odd(ModelSpec):
        kind: str = "odd"

        def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
            head = nn.Conv2d(4, classes, 1)
            return nn.Sequential(nn.Conv2d(1, 4, 3), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    with pytest.raises(AttackError, match="'1', a Conv2d"):
        inverting().reconstruct(gradient_case(Odd(), sets([1], seed=0)))


@pytest.mark.slow
def test_an_unknown_order_of_labels_over_the_steps_is_found() -> None:
    """Four people in two steps of a large learning rate: a wrong deal does not fit the update."""
    work = LocalWork(recipe=Recipe(learning_rate=0.3, batch_size=2), epochs=1)
    (batch,) = sets([4], seed=0)
    spec = MLP(hidden=(64,), activation="tanh")
    payload = trained(spec, batch, work, Seed.root(0))
    case = make_case(spec, [payload], [4], Channel.CLIENT_UPDATE, work)
    errors = {}
    for orders in (1, 24):
        attack = inverting(Channel.CLIENT_UPDATE, steps=300, label_orders=orders)
        (answer,) = attack.reconstruct(case)
        assert answer.samples is not None
        pairs = (answer.samples[:, None] - batch[0][None]).square().mean((2, 3, 4))
        errors[orders] = (float(pairs.min(0).values.mean()), -float(answer.confidence[0]))
    assert errors[24][1] < errors[1][1] / 2
    assert errors[24][0] < errors[1][0] / 2


POISSON = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=4), steps=1, sampling="poisson")
WITHOUT_NOISE = OpacusLearner(0.0, 1e6, "hooks", Seed.root(0))


def poisson_case(
    spec: ModelSpec, batch: tuple[Tensor, Tensor], rows: list[int], labels: Tensor | None = None
) -> Case:
    """The update of a client of DP-SGD, of which no noise and no clipping is left, that drew
    `rows`; what it tells is how many records it holds."""
    model = base_model(spec)
    WITHOUT_NOISE.fit(model, *batch, [np.array(rows)], POISSON)
    payload = {name: part.clone() for name, part in model.state_dict().items()}
    granted = {} if labels is None else {"client0": labels}
    held = [len(batch[1])]
    return make_case(spec, [payload], held, Channel.CLIENT_UPDATE, POISSON, labels=granted)


@given(
    held=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 12),
    steps=st.integers(0, 5),
    records=st.integers(0, 60),
)
def test_a_plan_of_poisson_batches_uses_every_record(
    held: list[int], batch: int, steps: int, records: int
) -> None:
    work = LocalWork(recipe=Recipe(batch_size=batch), steps=steps, sampling="poisson")
    plan = sampled(held, work, records)
    used = [{row for rows in turns for row in rows} for turns in plan.parties]
    assert sorted(row for rows in used for row in rows) == list(range(plan.records))
    assert all(len(rows) <= most for rows, most in zip(used, held, strict=True))
    assert [len(turns) for turns in plan.parties] == [len(work.batch_sizes(n)) for n in held]
    assert all(len(set(rows)) == len(rows) for turns in plan.parties for rows in turns)
    if records:
        assert plan.records == min(records, sum(held))
    elif steps == 1:
        assert plan.records == sum(min(batch, n) for n in held)


@pytest.mark.parametrize("rows", [[3], [0, 5, 9], [1, 2, 3, 5, 8, 13]])
def test_without_labels_a_poisson_batch_is_read_as_one_of_expected_size(rows: list[int]) -> None:
    (batch,) = sets([14], seed=0)
    case = poisson_case(MLP(), batch, rows)
    channel = Channel.CLIENT_UPDATE
    (evidence,) = read(case, channel)
    drawn = mean_gradient(base_model(MLP()), batch[0][rows], batch[1][rows])
    for name, part in drawn.items():
        assert torch.allclose(evidence.gradient[name], part * len(rows) / 4, atol=1e-5)
    (labels,) = BiasLabels(position=SERVER, channel=channel).reconstruct(case)
    assert labels.labels is not None
    assert len(labels.labels) == 4
    for attack in (analytic(channel), inverting(channel, steps=2)):
        (found,) = attack.reconstruct(case)
        assert found.samples is not None
        assert len(found.samples) == 4


def test_idlg_reads_a_poisson_batch_of_one_expected_record() -> None:
    (batch,) = sets([14], seed=0)
    case = poisson_case(MLP(), batch, [6])
    one = POISSON.model_copy(update={"recipe": Recipe(learning_rate=0.1, batch_size=1)})
    case = replace(case, knowledge=replace(case.knowledge, work=one))
    (found,) = IDLGLabels(position=SERVER, channel=Channel.CLIENT_UPDATE).reconstruct(case)
    assert found.labels is not None
    assert found.labels.tolist() == [batch[1][6]]


@pytest.mark.parametrize("rows", [[6], [2, 9], [1, 4, 6, 8, 11, 12]])
def test_granted_labels_tell_how_many_records_a_poisson_batch_drew(rows: list[int]) -> None:
    private, public = (sets([14], seed=seed)[0] for seed in (0, 1))
    labels = private[1][rows].sort().values
    scores = []
    for batch in (private, (public[0], private[1])):
        case = poisson_case(MLP(), batch, rows, labels)
        (found,) = inverting(Channel.CLIENT_UPDATE).reconstruct(case)
        assert found.samples is not None
        assert len(found.samples) == len(rows)
        errors = (found.samples[:, None] - private[0][rows][None]).square().mean((2, 3, 4))
        scores.append(float(-10 * errors.min(0).values.mean().log10()))
    assert scores[0] > scores[1] + 2


def test_more_labels_than_a_client_holds_are_refused_under_poisson_sampling_too() -> None:
    (batch,) = sets([5], seed=0)
    case = poisson_case(MLP(), batch, [1, 2], labels=torch.zeros(6).long())
    with pytest.raises(AttackError, match="6 labels granted, but the update holds 5 records"):
        inverting(Channel.CLIENT_UPDATE).reconstruct(case)


def test_simulated_training_divides_by_the_expected_batch_under_poisson_sampling() -> None:
    recipe = Recipe(learning_rate=0.3, batch_size=4, momentum=0.5, weight_decay=0.01)
    work = LocalWork(recipe=recipe, steps=4, sampling="poisson")
    spec, order = MLP(activation="tanh"), ((0, 4), (), (1, 2, 3, 5, 7, 9), (8,))
    (batch,) = sets([10], seed=2)
    model = base_model(spec)
    WITHOUT_NOISE.fit(model, *batch, [np.array(rows, dtype=int) for rows in order], work)
    base = base_model(spec).state_dict()
    network = load(lambda: spec.module(SHAPE, CLASSES), base, "train")
    descent, _ = simulate(network, *batch, Plan((order,), (10,)), work)
    for name, change in descent.items():
        assert torch.allclose(base[name] - change, model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("spec", "records", "gain"),
    [(MLP(activation="sigmoid"), 1, 4.0), (Softmax(), 1, 6.0), (MLP(hidden=(512,)), 4, 4.0)],
)
def test_linear_inversion_reads_around_what_pruning_took(
    spec: ModelSpec, records: int, gain: float
) -> None:
    clients = sets([records] * 4, seed=0)
    case = gradient_case(spec, clients)
    start, *seen = case.transcript.observations
    pruned = [
        replace(item, payload={n: largest(p, 0.5) for n, p in item.payload.items()})
        for item in seen
    ]
    case = replace(
        case,
        transcript=replace(case.transcript, observations=(start, *pruned)),
        knowledge=replace(case.knowledge, protections=("gradient_pruning",)),
    )
    knowing, naive = (
        torch.stack(
            [
                torch.cdist(truth.flatten(1), found.samples.flatten(1)).square().min(1).values / 256
                for (truth, _), found in zip(clients, attack.reconstruct(case), strict=True)
                if found.samples is not None
            ]
        )
        for attack in (analytic(), analytic().model_copy(update={"adaptive": False}))
    )
    assert len(knowing) == len(naive) == 4
    assert (naive.clamp_min(1e-12).log10() - knowing.clamp_min(1e-12).log10()).mean() * 10 > gain


@pytest.mark.parametrize(
    ("protections", "flags"),
    [
        ((), set()),
        (("gradient_pruning", "soteria"), set()),
        (("dp_sgd",), {"not_adaptive"}),
        (("user_level_dp",), {"not_adaptive"}),
        (("gradient_pruning", "additive_noise"), {"not_adaptive"}),
        (("quantization", "secagg_plus"), {"not_adaptive"}),
    ],
)
def test_attacks_say_that_they_have_no_answer_to_noise(
    protections: tuple[str, ...], flags: set[str]
) -> None:
    case = gradient_case(MLP(), sets([1], seed=0))
    case = replace(case, knowledge=replace(case.knowledge, protections=protections))
    where = {"position": SERVER, "channel": Channel.GRADIENT}
    attacks: list[Attack] = [analytic(), inverting(steps=1)]
    attacks += [kind.model_validate(where) for kind in (BiasLabels, IDLGLabels)]
    for attack in attacks:
        assert attack.reconstruct(case)[0].flags == flags
