"""What a careful client measures: each statistic against a naive oracle, honest and altered."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.deployments import saved
from fedmi.deployments.base import Noticed
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.detectors.architecture_diff import ArchitectureDiff
from fedmi.deployments.federated.detectors.base import Detector, Received
from fedmi.deployments.federated.detectors.gradient_snr import GradientSNR, signal_to_noise
from fedmi.deployments.federated.detectors.gradient_statistics import GradientStatistics
from fedmi.deployments.federated.detectors.weight_statistics import (
    WeightStatistics,
    alike,
    one_sided,
    signs,
    transmit,
)
from fedmi.deployments.federated.malice.model_inconsistency import ModelInconsistency
from fedmi.deployments.federated.strategies.fedsgd import FedSGD
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.protections.dp.dp_sgd import DPSGD
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from tests.deployment_fixtures import CLASSES, WithBuffers, job, same

SHAPE = (1, 8, 8)
ALL: tuple[Detector, ...] = (
    ArchitectureDiff(),
    GradientSNR(),
    GradientStatistics(),
    WeightStatistics(),
)
SECRET = (Channel.SHARE, Channel.MASKED_UPDATE)
State = dict[str, Tensor]


def batch(count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, *SHAPE, generator=rng)
    return inputs, torch.arange(count) % CLASSES


def received(
    state: Mapping[str, Tensor] | None = None,
    spec: ModelSpec | None = None,
    before: Mapping[str, Tensor] | None = None,
    count: int = 16,
    seed: int = 0,
) -> Received:
    """A client's view; without a state, of the initial model."""
    model = (spec or MLP(hidden=(32,))).build(SHAPE, CLASSES, Seed.root(1))
    agreed = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    model.load_state_dict(dict(state or model.state_dict()))
    inputs, labels = batch(count, seed)
    return Received(model.train(), model.state_dict(), before, inputs, labels, agreed)


def initial(spec: ModelSpec | None = None) -> State:
    return {name: t.clone() for name, t in received(None, spec).network.state_dict().items()}


def imprint(state: State) -> State:
    """All rows of the first layer alike, biases that cut the brightness into bins (Fowl 2022)."""
    weight = torch.full_like(state["1.weight"], 1 / state["1.weight"].shape[1])
    bias = -torch.linspace(0.4, 0.6, len(weight))
    return {**state, "1.weight": weight, "1.bias": bias}


def trap(state: State, scale: float = 0.95) -> State:
    """Half of each row negative, the other half the same values scaled (Boenisch 2021)."""
    rng = torch.Generator().manual_seed(3)
    rows = []
    for row in state["1.weight"]:
        negative = -torch.randn(len(row) // 2, generator=rng).abs()
        order = torch.randperm(len(row), generator=rng)
        rows.append(torch.cat([negative, -scale * negative])[order])
    return {**state, "1.weight": torch.stack(rows)}


def fishing(state: State, target: int = 0) -> State:
    """All logits but the target's are a large constant (Wen 2022)."""
    weight, bias = torch.zeros_like(state["3.weight"]), torch.full_like(state["3.bias"], 100.0)
    weight[target], bias[target] = state["3.weight"][target], state["3.bias"][target]
    return {**state, "3.weight": weight, "3.bias": bias}


def dead(state: State) -> State:
    """No unit of the hidden layer ever answers (Pasquini 2022)."""
    weight, bias = torch.zeros_like(state["1.weight"]), torch.full_like(state["1.bias"], -1.0)
    return {**state, "1.weight": weight, "1.bias": bias}


ALTERED = {"imprint": imprint, "trap": trap, "fishing": fishing, "dead": dead}


def trained(spec: ModelSpec, steps: int) -> State:
    """The model after some honest steps."""
    seen = received(None, spec)
    optimizer = torch.optim.SGD(seen.network.parameters(), lr=0.2)
    for step in range(steps):
        inputs, labels = batch(seed=step)
        optimizer.zero_grad()
        cross_entropy(seen.network(inputs), labels).backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in seen.network.state_dict().items()}


# --- gradient signal to noise


@pytest.mark.parametrize("spec", [MLP(hidden=(6,)), LeNet(channels=4), ConvNet(width=4, blocks=2)])
def test_the_signal_to_noise_ratio_is_that_of_gradients_taken_one_by_one(spec: ModelSpec) -> None:
    seen = received(None, spec, count=5)
    names = [name for name, p in seen.network.named_parameters() if p.dim() > 1]
    norms: dict[str, list[float]] = {name: [] for name in names}
    for record, label in zip(seen.inputs, seen.labels, strict=True):
        seen.network.zero_grad()
        cross_entropy(seen.network(record[None]), label[None]).backward()
        for name, parameter in seen.network.named_parameters():
            if name in norms:
                assert parameter.grad is not None
                norms[name].append(math.sqrt(float(parameter.grad.double().square().sum())))
    seen.network.zero_grad()
    wanted = max(max(each) / (sum(each) - max(each)) for each in norms.values())
    assert GradientSNR().measure(seen) == pytest.approx(wanted, rel=1e-5)


def test_batch_statistics_couple_records_and_each_loss_has_its_own_gradient() -> None:
    """In training mode all records change each other's normalisation."""

    class Normed(ModelSpec):
        kind: str = "normed"

        def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
            layers = (nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, classes))
            return nn.Sequential(*layers)

    seen = received(None, Normed(), count=6)
    weights = [p for p in seen.network.parameters() if p.dim() > 1]
    each = []
    for number in range(6):
        loss = cross_entropy(seen.network(seen.inputs)[[number]], seen.labels[[number]])
        each.append([g.norm() for g in torch.autograd.grad(loss, weights)])
    wanted = torch.tensor(each).T
    assert torch.allclose(seen.norms(6), wanted, rtol=1e-4)
    assert GradientSNR().measure(seen) == pytest.approx(signal_to_noise(wanted), rel=1e-4)


def test_the_signal_to_noise_ratio_of_norms_given() -> None:
    assert signal_to_noise(torch.tensor([[1.0, 1, 1, 1], [3.0, 1, 1, 0]])) == pytest.approx(1.5)
    assert signal_to_noise(torch.zeros(2, 4)) == 0
    assert signal_to_noise(torch.tensor([[0.0, 2.0, 0.0]])) == math.inf
    assert signal_to_noise(torch.zeros(2, 0)) == 0


def test_a_record_alone_in_its_class_is_fished_out() -> None:
    """All but one record of class 0 leave no gradient behind the last layer."""
    seen = received(fishing(initial()))
    alone = replace(seen, labels=torch.tensor([0, *[1] * 15]))
    assert GradientSNR().measure(alone) == math.inf
    honest = replace(received(), labels=alone.labels)
    assert GradientSNR().measure(honest) < 1


# --- weights


def test_the_signs_of_weights_against_loops() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[3] = -2 * rows[7]
    assert alike(rows) == pytest.approx(2 / 9)
    ratios = [max(map(abs, row)) / (sum(map(abs, row)) - max(map(abs, row))) for row in rows]
    assert transmit(rows) == pytest.approx(float(max(ratios)))
    sums = [float(sum(row) / math.sqrt(sum(v * v for v in row))) for row in rows]
    mean = sum(sums) / 9
    spread = math.sqrt(sum((s - mean) ** 2 for s in sums) / 8)
    assert one_sided(rows) == pytest.approx(abs(mean) / spread)


def test_a_change_is_in_units_of_the_weights_before() -> None:
    start = initial()
    moved = {**start, "3.weight": 1.5 * start["3.weight"]}
    found = {(name, sign): v for name, sign, v in signs(received(moved, before=start))}
    assert found["3.weight", "change"] == pytest.approx(0.5)
    assert found["1.weight", "change"] == 0
    assert not [sign for _, sign, _ in signs(received(moved)) if sign == "change"]


@pytest.mark.parametrize("spec", [MLP(hidden=(32,)), LeNet(channels=6), ConvNet(width=8, blocks=2)])
@pytest.mark.parametrize("steps", [0, 40])
def test_honest_weights_stay_at_about_one(spec: ModelSpec, steps: int) -> None:
    assert WeightStatistics().measure(received(trained(spec, steps), spec)) < 1.5


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("steps", [0, 40])
def test_altered_weights_stand_out_in_a_first_round(name: str, steps: int) -> None:
    altered = ALTERED[name](trained(MLP(hidden=(32,)), steps))
    assert WeightStatistics().measure(received(altered)) > 10


# --- gradients


def test_the_size_and_the_spread_of_gradients_against_loops() -> None:
    seen = received(MLP(hidden=(32,)).build(SHAPE, CLASSES, Seed.root(2)).state_dict())
    loss = cross_entropy(seen.network(seen.inputs), seen.labels)
    weights = [p for p in seen.network.parameters() if p.dim() > 1]
    pairs = list(zip(weights, torch.autograd.grad(loss, weights), strict=True))
    rms = [float(g.double().square().mean().sqrt()) for _, g in pairs]
    energy = [float(g.double().square().sum()) for _, g in pairs]
    silent = max(float((g == 0).all(1).double().mean()) for _, g in pairs)
    wanted = (
        max(float(g.double().norm() / w.detach().double().norm()) for w, g in pairs),
        math.log10(max(rms) / min(rms)),
        -math.log10(1 - max(energy) / sum(energy)),
        -math.log10(1 - silent),
    )
    assert GradientStatistics().measure(seen) == pytest.approx(max(wanted), rel=1e-5)


def test_gradients_of_altered_models_stand_out() -> None:
    states = [trained(MLP(hidden=(32,)), steps) for steps in (0, 10, 40)]
    honest = [
        GradientStatistics().measure(received(s, seed=i)) for s in states for i in range(5, 15)
    ]
    for alter in (imprint, dead):
        for state in states:
            assert GradientStatistics().measure(received(alter(state), seed=7)) > max(honest)


def test_a_gradient_of_nothing_is_suspicious_and_none_is_not() -> None:
    state = initial()
    state["3.weight"], state["3.bias"] = torch.zeros(CLASSES, 32), torch.zeros(CLASSES)
    silent = {**dead(state)}
    assert GradientStatistics().measure(received(silent)) == math.inf
    empty = received(count=0)
    assert [detector.measure(empty) for detector in ALL[:3]] == [0, 0, 0]


# --- architecture


def test_the_architecture_is_compared_by_name_and_shape() -> None:
    seen = received()
    assert ArchitectureDiff().measure(seen) == 0
    sent = {**seen.sent, "more.weight": torch.zeros(2), "3.bias": torch.zeros(CLASSES + 1)}
    del sent["1.bias"]
    assert ArchitectureDiff().measure(replace(seen, sent=sent)) == 3
    assert ArchitectureDiff().measure(received(imprint(initial()))) == 0


def test_what_cannot_be_computed_is_suspicious() -> None:
    broken = {**initial(), "1.weight": torch.full((32, 64), math.nan)}
    seen = received(broken)
    assert [detector.measure(seen) for detector in ALL[1:]] == [math.inf] * 3


# --- in a training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": FedSGD()},
        {"protections": (SecAggPlus(),)},
        {"protections": (DPSGD(noise_multiplier=1.0),)},
        {"malice": ModelInconsistency(rounds=(2,), victim=1), "fraction": 0.75},
    ],
)
def test_measuring_changes_nothing_of_the_training(
    options: dict[str, object], tmp_path: Path
) -> None:
    plain, watched = (
        Federated(name="fl", clients=4, rounds=2, detectors=each, **options).train(  # type: ignore[arg-type]
            job(tmp_path / str(len(each)), record=(2,))
        )
        for each in ((), ALL)
    )
    assert same(plain.state, watched.state)
    assert plain.cost.wire_bytes_up == watched.cost.wire_bytes_up
    assert plain.cost.wire_bytes_down == watched.cost.wire_bytes_down
    for position, transcript in plain.transcripts.items():
        pairs = zip(
            transcript.observations, watched.transcripts[position].observations, strict=True
        )
        for ours, theirs in pairs:  # keys and masks are never drawn twice alike
            assert ours.channel in SECRET or same(ours.payload, theirs.payload)
    assert plain.noticed == ()
    asked = 3 if "fraction" in options else 4
    assert len(watched.noticed) == 2 * asked * len(ALL)


def test_modules_with_buffers_are_left_as_they_were(tmp_path: Path) -> None:
    plain, watched = (
        Federated(name="fl", clients=4, rounds=2, detectors=each).train(
            job(tmp_path / str(len(each)), model=WithBuffers())
        )
        for each in ((), ALL)
    )
    assert same(plain.state, watched.state)


def test_who_was_sent_what_is_told_apart_and_kept(tmp_path: Path) -> None:
    malice = ModelInconsistency(rounds=(2,), victim=1)
    federated = Federated(name="fl", clients=4, rounds=3, malice=malice, detectors=ALL)
    outcome = federated.train(job(tmp_path))
    sent = {(one.round, one.client): one.what for one in outcome.noticed}
    assert {sent[1, client] for client in range(4)} == {"honest"}
    assert [sent[2, client] for client in range(4)] == ["altered", "honest", "altered", "altered"]
    assert {sent[3, client] for client in range(4)} == {"tainted"}
    alarmed = {o.client for o in _of(outcome.noticed, 2, "weight_statistics") if o.value > 10}
    assert alarmed == {0, 2, 3}
    saved.save(outcome, tmp_path / "outcome")
    assert saved.load(tmp_path / "outcome").noticed == outcome.noticed


def _of(noticed: tuple[Noticed, ...], round: int, detector: str) -> list[Noticed]:
    return [one for one in noticed if (one.round, one.detector) == (round, detector)]


def test_a_detector_listed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="'gradient_snr' twice"):
        Federated(name="fl", detectors=(GradientSNR(records=8), GradientSNR()))
