"""Several epochs in unknown order: unknowns of their own, a prior no order changes, one answer."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import conv2d

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.epochs import OrderInvariance, Summary, merged, record_of, unrolled
from fedmi.attacks.engine.evidence import read
from fedmi.attacks.engine.network import load, simulate
from fedmi.attacks.engine.penalties import Trial
from fedmi.attacks.engine.plan import Plan, sequential
from fedmi.attacks.gradient.data_leakage_fedavg import NO_EPOCHS, DataLeakageFedAvg
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.knowledge import Target
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.classifiers import MLP
from fedmi.training.local import batches
from tests.gradient_cases import (
    SERVER,
    SHAPE,
    Batch,
    images,
    make_case,
    sets,
    trained,
)

SPEC = MLP(hidden=(48,), activation="sigmoid")
ORDER = Seed.root(11)


def epochs_of(epochs: int, batch: int, rate: float = 0.1, **more: object) -> LocalWork:
    recipe = Recipe(batch_size=batch, learning_rate=rate, mode="eval")
    return LocalWork.model_validate({"recipe": recipe, "epochs": epochs, **more})


def update_case(batch: Batch, work: LocalWork, *, facts: Sequence[Fact] = ()) -> Case:
    """One client's update, its labels granted in ascending order."""
    labels = {"client0": batch[1].sort().values}
    sent = [trained(SPEC, batch, work, ORDER)]
    counts = [len(batch[1])]
    more = (Fact.LABELS, *facts)
    return make_case(SPEC, sent, counts, Channel.CLIENT_UPDATE, work, labels=labels, facts=more)


def attack(**options: object) -> DataLeakageFedAvg:
    given: dict[str, object] = {"position": SERVER, "channel": Channel.CLIENT_UPDATE}
    given |= {"steps": 150, "label_orders": 1, **options}
    return DataLeakageFedAvg.model_validate(given)


def psnr_of(found: Reconstruction, truth: Tensor) -> float:
    """Of images paired with the truth by least error, in dB."""
    assert found.samples is not None
    assert len(found.samples) == len(truth)
    errors = (found.samples[:, None] - truth[None]).square().mean((2, 3, 4))
    paired = errors[linear_sum_assignment(errors.numpy())]
    return float(-10 * paired.clamp_min(1e-12).log10().mean())


@pytest.mark.parametrize(
    ("shares", "work"),
    [
        ((5,), epochs_of(3, 2)),
        ((4, 6), epochs_of(2, 3)),
        ((6,), epochs_of(1, 2)),
        ((6,), epochs_of(1, 2, steps=7)),
        ((4,), epochs_of(3, 4)),
        ((3, 8), epochs_of(1, 2, steps=5)),
    ],
)
def test_every_epoch_has_its_own_unknown_for_every_record(
    shares: tuple[int, ...], work: LocalWork
) -> None:
    plan = unrolled(sequential(shares, work))
    assert plan.held == shares
    assert plan.first.records >= max(shares)
    known = [row for epochs in plan.epochs for rows in epochs for row in rows]
    assert known == list(range(plan.records))
    for share, steps, epochs in zip(shares, plan.parties, plan.epochs, strict=True):
        sizes = work.batch_sizes(share)
        assert [len(rows) for rows in steps] == sizes
        copies = 1 if sizes[0] == share else -(-sum(sizes) // share)
        assert len(epochs) == copies
        used = [row for rows in steps for row in rows]
        assert len(set(used)) == (sum(sizes) if copies > 1 else share)


def test_copies_in_the_order_that_the_client_took_give_its_update() -> None:
    (batch,), work = sets([5], seed=0), epochs_of(3, 2)
    case = update_case(batch, work)
    (seen,) = read(case, Channel.CLIENT_UPDATE)
    plan = unrolled(seen.plan)
    taken = [row for rows in batches(5, work, ORDER) for row in rows.tolist()]
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen.base, "eval")
    found, _ = simulate(network, batch[0][taken], batch[1][taken], plan, work)
    for name, part in seen.descent.items():
        torch.testing.assert_close(found[name], part, atol=1e-6, rtol=1e-4)


def test_each_epoch_is_dealt_all_records_of_its_party_anew() -> None:
    plan = unrolled(sequential((4, 6), epochs_of(3, 2)))
    found = record_of(plan, Seed.root(0))
    for own, epochs in zip((range(4), range(4, 10)), plan.epochs, strict=True):
        orders = [found[list(rows)].tolist() for rows in epochs]
        assert all(sorted(order) == list(own) for order in orders)
        assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("summary", ["mean", "max", "conv_mean", "conv_max"])
def test_the_prior_is_the_naive_mean_over_pairs_and_blind_to_order(summary: Summary) -> None:
    plan = unrolled(sequential((4,), epochs_of(1, 2, steps=7)))
    penalty = OrderInvariance(1.0, plan, summary, Seed.root(0))
    (batch,) = sets([4], seed=0)
    case = update_case(batch, epochs_of(1, 2, steps=7))
    (seen,) = read(case, Channel.CLIENT_UPDATE)
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen.base, "eval")
    given = penalty.given(seen, batch[1], network)

    def value(inputs: Tensor) -> float:
        trial = Trial(inputs, torch.zeros(len(inputs)).long(), {}, {})
        return float(penalty.value(trial, given, network))

    def g(rows: tuple[int, ...]) -> Tensor:
        part = every[list(rows)]
        part = conv2d(part, given["filters"], padding=1) if given else part
        return part.amax(0) if summary.endswith("max") else part.mean(0)

    every = images(plan.records, seed=3)
    whole = plan.epochs[0][:3]
    assert [len(rows) for rows in plan.epochs[0]] == [4, 4, 4, 2]
    naive = [float((g(e) - g(f)).square().mean()) for e, f in product(whole, whole)]
    assert value(every) == pytest.approx(sum(naive) / len(naive), rel=1e-4)
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(e)) for e in range(4)]
    alike = torch.cat([batch[0][order] for order in orders])[: plan.records]
    assert value(alike) < 1e-10


def test_epochs_are_matched_label_by_label_and_averaged() -> None:
    plan = unrolled(sequential((6,), epochs_of(1, 3, steps=9)))
    truth, rng = images(6, seed=1), torch.Generator().manual_seed(2)
    truth[1] = truth[0] + 0.01
    labels = torch.tensor([0, 1, 2, 2, 3, 4])
    orders = [torch.arange(6), *(torch.randperm(6, generator=rng) for _ in range(3)), [3, 0, 5]]
    which = torch.cat([torch.as_tensor(order) for order in orders])
    noisy = truth[which] + 0.1 * torch.randn(plan.records, *SHAPE, generator=rng)
    found, own = merged(noisy, labels[which], plan)
    assert own.equal(labels)
    single = (noisy[:6] - truth).square().mean((1, 2, 3))
    assert ((found - truth).square().mean((1, 2, 3)) < single / 3).all()


def test_an_update_of_several_epochs_gives_its_records_and_another_does_not() -> None:
    (mine,), (others,) = sets([4], seed=0), sets([4], seed=1)
    work = epochs_of(3, 2)
    (found,) = attack().reconstruct(update_case(mine, work))
    (prior_only,) = attack().reconstruct(update_case(others, work))
    assert found.samples is not None
    assert found.labels is not None
    assert found.samples.shape == mine[0].shape
    assert found.labels.sort().values.equal(mine[1].sort().values)
    assert found.confidence.shape == (4,)
    assert psnr_of(found, mine[0]) > psnr_of(prior_only, mine[0]) + 4


def test_it_beats_one_order_for_all_epochs_and_one_gradient() -> None:
    (mine,) = sets([4], seed=0)
    case = update_case(mine, epochs_of(3, 2, rate=0.3))
    (found,) = attack().reconstruct(case)
    given = {"position": SERVER, "channel": Channel.CLIENT_UPDATE, "tv_weight": 0.01}
    for weaker in ({"steps": 150, "label_orders": 1}, {"steps": 300, "local_simulation": False}):
        (other,) = InvertingGradients.model_validate(given | weaker).reconstruct(case)
        assert psnr_of(found, mine[0]) > psnr_of(other, mine[0]) + 2


def test_a_granted_order_or_one_step_an_epoch_needs_no_copies() -> None:
    (batch,), work = sets([4], seed=0), epochs_of(3, 2)
    order = {"client0": (tuple(tuple(r.tolist()) for r in batches(4, work, ORDER)),)}
    case = update_case(batch, work, facts=[Fact.BATCH_ORDER])
    case = replace(case, knowledge=replace(case.knowledge, order=order))
    (seen,) = read(case, Channel.CLIENT_UPDATE)
    assert attack().problem(case, seen).evidence.plan == Plan(order["client0"], (4,))
    case = update_case(batch, epochs_of(3, 4))
    (seen,) = read(case, Channel.CLIENT_UPDATE)
    assert len(attack().problem(case, seen).starts[0]) == 4


def test_poisson_sampling_has_no_epochs_and_says_so() -> None:
    (batch,) = sets([4], seed=0)
    case = update_case(batch, epochs_of(2, 2, sampling="poisson"))
    (found,) = attack(steps=2).reconstruct(case)
    assert NO_EPOCHS in found.flags
    assert found.samples is not None
    assert len(found.samples) == 4


def average_case(clients: Sequence[Batch], work: LocalWork) -> Case:
    """One target: the average of two clients' updates, labels not granted."""
    counts = [len(labels) for _, labels in clients]
    shares = [count / sum(counts) for count in counts]
    one, two = (trained(SPEC, batch, work, ORDER) for batch in clients)
    mean = {name: shares[0] * one[name] + shares[1] * two[name] for name in one}
    case = make_case(SPEC, [mean], [sum(counts)], Channel.AGGREGATE, work)
    start, seen = case.transcript.observations
    each = {f"num_examples/{client}": float(count) for client, count in enumerate(counts)}
    seen = replace(seen, clients=(0, 1), clear=seen.clear | each)
    transcript = replace(case.transcript, observations=(start, seen))
    return replace(case, transcript=transcript, targets=(Target("mean", None, 1, (0, 1)),))


def test_an_average_of_clients_is_one_answer_of_all_their_records() -> None:
    mine, others, work = sets([2, 4], seed=0), sets([2, 4], seed=1), epochs_of(2, 2)
    truth = torch.cat([inputs for inputs, _ in mine])
    options = {"channel": Channel.AGGREGATE, "steps": 100, "label_orders": 4}
    (found,) = attack(**options).reconstruct(average_case(mine, work))
    (prior_only,) = attack(**options).reconstruct(average_case(others, work))
    assert psnr_of(found, truth) > psnr_of(prior_only, truth) + 2


def test_a_bad_update_is_told_and_leaves_the_others_as_they_are() -> None:
    clients, work = sets([4, 4], seed=0), epochs_of(2, 2)
    sent = [trained(SPEC, batch, work, ORDER) for batch in clients]
    broken = [sent[0], {name: part * torch.nan for name, part in sent[1].items()}]
    case = make_case(SPEC, broken, [4, 4], Channel.CLIENT_UPDATE, work)
    whole = make_case(SPEC, sent, [4, 4], Channel.CLIENT_UPDATE, work)
    good, bad = attack(steps=20).reconstruct(case)
    assert "non_finite" in bad.flags
    assert bad.samples is not None
    assert (bad.samples == 0.5).all()
    alone = attack(steps=20).reconstruct(whole)[0]
    assert good.samples is not None
    assert alone.samples is not None
    torch.testing.assert_close(good.samples, alone.samples, atol=0.02, rtol=0)


def test_a_false_belief_of_the_epochs_is_told() -> None:
    (batch,) = sets([4], seed=0)
    case = update_case(batch, epochs_of(3, 2))
    (found,) = attack(steps=2, assume={"epochs": 2}).reconstruct(case)
    assert found.flags == {"false_knowledge: epochs 2 for 3"}
