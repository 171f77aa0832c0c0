"""Trap weights: what is planted, and the records that a malicious server then reads off."""

from typing import Literal

import pytest
import torch
from torch import nn

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.attacks.gradient.trap_weights import TrapWeights as Attack
from fedmi.data.mnist_5k import MNIST5k
from fedmi.deployments.federated.malice.passing import passage
from fedmi.deployments.federated.malice.trap_weights import TrapWeights
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.models.base import ModelSpec, Shape
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.models.resnet import ResNet18
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from tests.active_cases import SERVER, Batch, active_case, masked, psnrs, public_of, sent_by
from tests.deployment_fixtures import tensors
from tests.protection_fixtures import setting

SPEC = MLP(hidden=(400,))
EXACT = 40.0


class Convolutional(ModelSpec):
    """Two convolutions, one of stride 2, before the fully connected layers."""

    kind: Literal["convolutional"] = "convolutional"

    def module(self, shape: Shape, classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(shape[0], 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 14 * 14, 400),
            nn.ReLU(),
            nn.Linear(400, classes),
        )


@pytest.fixture(scope="module")
def digits() -> tuple[Batch, Batch]:
    """(public, private) digits."""
    inputs, labels = tensors(MNIST5k(max_records=2000).load())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = order[:600], order[600:]
    return (inputs[rows[0]], labels[rows[0]]), (inputs[rows[1]], labels[rows[1]])


def attack(channel: Channel = Channel.GRADIENT) -> Attack:
    return Attack(channel=channel)


def first(batch: Batch, count: int, start: int = 0) -> Batch:
    return batch[0][start : start + count], batch[1][start : start + count]


@pytest.mark.parametrize("spec", [SPEC, Convolutional()])
def test_every_record_alone_on_a_neuron_is_recovered_and_no_mixture_is_believed(
    spec: ModelSpec, digits: tuple[Batch, Batch]
) -> None:
    public, private = digits
    models = sent_by(TrapWeights(records=40), spec, public_of(*public))
    batch = first(private, 40)
    layer = "1" if spec is SPEC else "5"
    module = spec.build((1, 28, 28), 10, Seed.root(0))
    module.load_state_dict(dict(models[1]))
    head = module[: int(layer) + 1]  # type: ignore[index]
    fires = head(batch[0]) > 0
    alone = {int(fires[:, n].nonzero()) for n in torch.nonzero(fires.sum(0) == 1).flatten()}
    assert len(alone) > 15
    (found,) = attack().reconstruct(active_case(spec, models, [batch]))
    assert found.samples is not None
    reached = psnrs(found.samples, batch[0]) > EXACT
    assert all(reached[row] for row in alone)
    believed = found.samples[found.confidence > 2]
    assert len(believed) >= len(alone)
    assert psnrs(batch[0], believed).min() > EXACT


def test_an_average_neuron_is_fired_by_as_many_as_asked(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    for active in (1.0, 4.0):
        _, sent = sent_by(TrapWeights(records=50, active=active), SPEC, public_of(*public))
        fires = private[0].flatten(1) @ sent["1.weight"].T > 0
        assert fires.double().mean() * 50 == pytest.approx(active, rel=0.2)
        assert (sent["1.weight"] < 0).sum(1).unique().tolist() == [392]


def test_traps_show_far_more_than_the_honest_weights(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    models = sent_by(TrapWeights(records=60), SPEC, public_of(*public))
    batch = first(private, 60, 100)
    (active,) = attack().reconstruct(active_case(SPEC, models, [batch]))
    passive = LinearInversion(position=Position.CURIOUS_SERVER, channel=Channel.GRADIENT)
    (honest,) = passive.reconstruct(active_case(SPEC, (models[0], models[0]), [batch]))
    shares = [
        float((psnrs(found.samples, batch[0]) > EXACT).double().mean())
        for found in (active, honest)
        if found.samples is not None
    ]
    assert shares[0] > 0.35
    assert shares[0] > 3 * shares[1]


@pytest.mark.parametrize("channel", [Channel.CLIENT_UPDATE, Channel.AGGREGATE])
def test_updates_and_the_aggregate_of_clients_show_the_same_records(
    channel: Channel, digits: tuple[Batch, Batch]
) -> None:
    public, private = digits
    models = sent_by(TrapWeights(records=30), SPEC, public_of(*public))
    clients = [first(private, 10, 10 * client) for client in range(3)]
    case = active_case(SPEC, models, clients, channel, learning_rate=1.0, weight_decay=0.01)
    found = attack(channel).reconstruct(case)
    assert len(found) == (1 if channel == Channel.AGGREGATE else 3)
    samples = torch.cat([one.samples for one in found if one.samples is not None])
    truth = torch.cat([inputs for inputs, _ in clients])
    assert (psnrs(samples, truth) > 30).double().mean() > 0.6


def test_noise_in_place_of_the_gradient_shows_nothing(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    models = sent_by(TrapWeights(records=20), SPEC, public_of(*public))
    batch = first(private, 20)
    case = active_case(SPEC, models, [batch])
    (found,), (prior,) = (attack().reconstruct(masked(case, seed)) for seed in (0, 1))
    assert found.samples is not None
    assert prior.samples is not None
    assert "no_single_record" in found.flags
    assert not (found.confidence > 2).any()
    gap = psnrs(found.samples, batch[0]).mean() - psnrs(prior.samples, batch[0]).mean()
    assert abs(float(gap)) < 1


def test_other_records_show_no_more_than_themselves(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    models = sent_by(TrapWeights(records=20), SPEC, public_of(*public))
    (prior,) = attack().reconstruct(active_case(SPEC, models, [first(public, 20)]))
    assert prior.samples is not None
    assert psnrs(prior.samples, first(private, 20)[0]).max() < 25


def test_an_honest_deployment_is_refused(digits: tuple[Batch, Batch]) -> None:
    public, private = digits
    honest, _ = sent_by(TrapWeights(), SPEC, public_of(*public))
    case = active_case(SPEC, (honest, honest), [first(private, 5)])
    with pytest.raises(AttackError, match="altered no model"):
        attack().reconstruct(case)
    assert Attack.exploits == {"trap_weights"}


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Softmax().blueprint((1, 8, 8), 10), "behind '1' is nothing"),
        (MLP(activation="tanh").blueprint((1, 8, 8), 10), "behind '1' is a Tanh"),
        (ConvNet(width=4, blocks=1).blueprint((1, 8, 8), 10), "does not pass '3', a AvgPool2d"),
        (LeNet().blueprint((1, 8, 8), 10), "does not pass '1', a Sigmoid"),
        (LeNet(activation="relu").blueprint((1, 28, 28), 10), "'2' has 12 output channels; 16"),
        (ResNet18(width=8).blueprint((1, 8, 8), 10), "a ResNet|does not pass|stride"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "'0' leaves pixels out"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), "no fully connected layer"),
        (nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()), "'0' has none"),
    ],
)
def test_networks_that_do_not_pass_the_image_are_refused(network: nn.Module, why: str) -> None:
    (found,) = TrapWeights().problems(setting(SecAggPlus(), network=network))
    assert any(part in found for part in why.split("|"))


def test_the_attack_names_the_layer_that_it_cannot_read() -> None:
    assert "layer '1' has no ReLU" in attack().unsuited(Softmax().blueprint((1, 8, 8), 10))
    assert "in a chain" in attack().unsuited(ConvNet(blocks=1).blueprint((1, 8, 8), 10)[:2])
    assert not attack().unsuited(SPEC.blueprint((1, 8, 8), 10))
    assert SERVER == Position.MALICIOUS_SERVER


def test_kernels_hand_on_every_pixel() -> None:
    way = passage(Convolutional().blueprint((1, 28, 28), 10), (1, 28, 28))
    carried = way.sources[way.sources >= 0]
    assert carried.sort().values.tolist() == list(range(784))
