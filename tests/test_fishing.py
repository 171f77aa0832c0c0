"""Fishing: one record's gradient out of a large batch, and what is made of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.labels import last_linear
from fedmi.attacks.gradient.fishing import Fishing as Attack
from fedmi.attacks.gradient.fishing import bait_of
from fedmi.data.mnist_5k import MNIST5k
from fedmi.deployments.federated.malice.fishing import Fishing, features
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.metrics.base import Matched
from fedmi.metrics.fished_psnr import FishedPSNR
from fedmi.metrics.judge import Judge
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP
from fedmi.models.cnn6 import CNN6
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from fedmi.training.local import mean_gradient
from tests.active_cases import Batch, active_case, masked, psnrs, public_of, sent_by
from tests.deployment_fixtures import tensors
from tests.protection_fixtures import setting

SPEC, RELU = LeNet(channels=6), ConvNet(width=8, blocks=2)
TARGET = 3


@pytest.fixture(scope="module")
def digits() -> tuple[Batch, Batch]:
    """(public, private) digits."""
    inputs, labels = tensors(MNIST5k(max_records=2000).load())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = order[:800], order[800:]
    return (inputs[rows[0]], labels[rows[0]]), (inputs[rows[1]], labels[rows[1]])


def attack(channel: Channel = Channel.GRADIENT, steps: int = 200) -> Attack:
    return Attack(channel=channel, steps=steps, device="cpu")


def lone(private: Batch, count: int) -> Batch:
    """So many records, the first of them the only one of the target class."""
    inputs, labels = private
    own, rest = (torch.nonzero(labels == TARGET)[0], torch.nonzero(labels != TARGET).flatten())
    rows = torch.cat([own, rest[: count - 1]])
    return inputs[rows], labels[rows]


def of_class(private: Batch, label: int, count: int) -> Batch:
    rows = torch.nonzero(private[1] == label).flatten()[:count]
    return private[0][rows], private[1][rows]


def cosine(evidence: Evidence, spec: ModelSpec, record: Batch) -> float:
    """Between the evidence and the true gradient of one record at the model it is matched at."""
    module = spec.build(evidence.input_shape, 10, Seed.root(1))
    module.load_state_dict(dict(evidence.base))
    true = mean_gradient(module, *record)
    assert evidence.support is not None
    seen = [(evidence.gradient[n] * evidence.support[n]).double().flatten() for n in true]
    wanted = [(true[n] * evidence.support[n]).double().flatten() for n in true]
    return float(torch.cosine_similarity(torch.cat(seen), torch.cat(wanted), dim=0))


def seen_in(case: Case, channel: Channel = Channel.GRADIENT) -> Evidence:
    return attack(channel).read(case)[0]


@pytest.mark.parametrize("spec", [SPEC, RELU, MLP(hidden=(32,))])
def test_class_fishing_leaves_the_gradient_of_the_one_record(
    spec: ModelSpec, digits: tuple[Batch, Batch]
) -> None:
    public, private = digits
    models = sent_by(Fishing(target_class=TARGET), spec, public_of(*public))
    batch = lone(private, 100)
    evidence = seen_in(active_case(spec, models, [batch]))
    own, other = (cosine(evidence, spec, (batch[0][k : k + 1], batch[1][:1])) for k in (0, 1))
    assert own > 0.9999
    assert 1 - own < 0.02 * (1 - other)
    assert not evidence.flags


@pytest.mark.parametrize("channel", [Channel.CLIENT_UPDATE, Channel.AGGREGATE])
def test_it_stands_out_of_the_aggregate_of_many_clients(
    channel: Channel, digits: tuple[Batch, Batch]
) -> None:
    public, private = digits
    models = sent_by(Fishing(target_class=TARGET), RELU, public_of(*public))
    batch = lone(private, 100)
    clients = [(batch[0][k : k + 10], batch[1][k : k + 10]) for k in range(0, 100, 10)]
    case = active_case(RELU, models, clients, channel, weight_decay=0.01)
    found = attack(channel).read(case)
    assert cosine(found[0], RELU, (batch[0][:1], batch[1][:1])) > 0.99
    assert cosine(found[0], RELU, (batch[0][1:2], batch[1][:1])) < 0.9
    assert all("zero_gradients" in other.flags for other in found[1:])


def test_feature_fishing_leaves_the_highest_record_of_a_class(digits: tuple[Batch, Batch]) -> None:
    """For most classes; where none bites, the flag says so."""
    public, private = digits
    alone = 0
    for label in range(10):
        malice = Fishing(strategy="feature", target_class=label, records=24)
        models = sent_by(malice, RELU, public_of(*public))
        batch = of_class(private, label, 24)
        evidence = seen_in(active_case(RELU, models, [batch]))
        network = RELU.module((1, 28, 28), 10)
        bait = bait_of(models[1], last_linear(network)[0])
        highest = int(features(network, models[1], batch[0])[:, bait.feature].argmax())
        near = [cosine(evidence, RELU, (one[None], batch[1][:1])) for one in batch[0]]
        dominated = near[highest] > 0.99
        alone += dominated
        assert not dominated or max(near) == near[highest]
        assert dominated or evidence.flags & {"zero_gradients", "several_fished"}
    assert alone >= 6


def test_the_plain_gradient_of_such_a_batch_is_nobodys(digits: tuple[Batch, Batch]) -> None:
    """Without fishing no record of the batch explains the mean gradient."""
    _, private = digits
    batch = lone(private, 100)
    module = SPEC.build((1, 28, 28), 10, Seed.root(1))
    mean = mean_gradient(module, *batch)
    one = mean_gradient(module, batch[0][:1], batch[1][:1])
    flat = [torch.cat([part.flatten() for part in g.values()]) for g in (mean, one)]
    assert torch.cosine_similarity(*flat, dim=0) < 0.7


def test_the_fished_record_is_recovered_and_another_record_is_not(
    digits: tuple[Batch, Batch],
) -> None:
    public, private = digits
    models = sent_by(Fishing(target_class=TARGET), SPEC, public_of(*public))
    batch = lone(private, 64)
    (found,) = attack().reconstruct(active_case(SPEC, models, [batch]))
    assert found.samples is not None
    assert found.samples.shape == (1, 1, 28, 28)
    assert found.labels is not None
    assert found.labels.tolist() == [TARGET]
    (prior,) = attack().reconstruct(active_case(SPEC, models, [lone(public, 64)]))
    assert prior.samples is not None
    one = batch[0][:1]
    assert psnrs(found.samples, one) > psnrs(prior.samples, one) + 8
    assert psnrs(found.samples, one) > 22


def test_noise_and_an_empty_net_show_nothing(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    models = sent_by(Fishing(target_class=TARGET), SPEC, public_of(*public))
    batch = lone(private, 32)
    (found,) = attack(steps=50).reconstruct(masked(active_case(SPEC, models, [batch])))
    assert found.samples is not None
    assert psnrs(found.samples, batch[0][:1]) < 12
    nobody = (batch[0][1:], batch[1][1:])
    (empty,) = attack(steps=5).reconstruct(active_case(SPEC, models, [nobody]))
    assert "zero_gradients" in empty.flags
    assert empty.samples is not None
    assert bool((empty.samples == 0.5).all())


def test_flags_say_when_more_than_one_bit(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    models = sent_by(Fishing(target_class=TARGET), SPEC, public_of(*public))
    case = active_case(SPEC, models, [of_class(private, TARGET, 5)])
    assert seen_in(case).flags == {"several_fished: 5"}
    malice = Fishing(strategy="feature", target_class=TARGET, records=24, expected=12.0)
    models = sent_by(malice, SPEC, public_of(*public))
    case = active_case(SPEC, models, [of_class(private, TARGET, 24)])
    assert "several_fished" in seen_in(case).flags
    case = active_case(SPEC, models, [(private[0][:50], private[1][:50])])
    assert "other_classes" in seen_in(case).flags


def test_an_honest_deployment_is_refused(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    honest, _ = sent_by(Fishing(), SPEC, public_of(*public))
    case = active_case(SPEC, (honest, honest), [lone(private, 5)])
    with pytest.raises(AttackError, match="altered no model"):
        attack().reconstruct(case)
    assert Attack.exploits == {"fishing"}


def test_bad_inputs_are_refused() -> None:
    network = SPEC.blueprint((1, 28, 28), 10)
    assert not problems(Fishing(), network)
    assert "target_class = 10" in problems(Fishing(target_class=10), network)[0]
    assert "is a Conv2d" in problems(Fishing(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))[0]
    bare = CNN6().blueprint((3, 32, 32), 10)
    assert "without one" in problems(Fishing(), bare)[0]
    assert "needs a bias" in attack().unsuited(bare)
    assert "no parameters" in problems(Fishing(), nn.Sequential(nn.ReLU()))[0]
    assert "rounds names 9" in problems(Fishing(rounds=(9,)), network)[0]


def problems(malice: Fishing, network: nn.Module) -> list[str]:
    return malice.problems(setting(SecAggPlus(), network=network))


def test_each_round_fishes_another_class() -> None:
    malice = Fishing(rounds=(2, 5, 6))
    assert [malice._target(round, 10) for round in (2, 5, 6)] == [0, 1, 2]


def scored(samples: Tensor, references: Tensor) -> float:
    count = len(references)
    labels = torch.zeros(count, dtype=torch.long)
    nobody = nn.Identity()
    judge = Judge(nobody, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), 0.0)
    return FishedPSNR().score(Matched(samples, references, labels, labels, None), judge)


def test_the_score_is_that_of_the_nearest_record_to_the_one_sample() -> None:
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand(6, 1, 8, 8, generator=rng)
    grey = torch.full_like(truth, 0.5)
    one = grey.clone()
    one[4] = (truth[4] + 0.1).clamp(0, 1)
    wanted = -10 * math.log10(float((one[4] - truth[4]).square().mean()))
    assert scored(one, truth) == pytest.approx(wanted, abs=1e-3)
    nearest = max(-10 * math.log10(float((0.5 - row).square().mean())) for row in truth)
    assert scored(grey, truth) == pytest.approx(nearest, abs=1e-3)
