"""The imprint block that a malicious server plants, and what it keeps of the records."""

from pathlib import Path
from typing import cast

import pytest
import torch
from pydantic import ValidationError

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.gradient.robbing_the_fed import RobbingTheFed as Robbery
from fedmi.data.digits import Digits
from fedmi.deployments.base import Job
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.malice.imprinting import quantiles
from fedmi.deployments.federated.malice.loki import Loki
from fedmi.deployments.federated.malice.robbing_the_fed import RobbingTheFed
from fedmi.deployments.federated.strategies.fedavg import FedAvg
from fedmi.deployments.federated.strategies.fedsgd import FedSGD
from fedmi.exposure.component import components
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.recovered_share import RecoveredExactly
from fedmi.models.classifiers import MLP
from fedmi.models.imprint import Imprint, ImprintedModel
from tests.imprint_cases import (
    BINS,
    CLASSES,
    PUBLIC,
    SERVER,
    SHAPE,
    batch,
    behind,
    case_of,
    in_bins,
    job,
    nearest,
    records,
    reseeded,
)

APART = [*range(2, 26, 2)]


def deployed(malice: RobbingTheFed | None = None, **options: object) -> Federated:
    malice = malice or RobbingTheFed(bins=BINS)
    return Federated.model_validate(
        {"name": "f", "clients": 3, "rounds": 1, "malice": malice, **options}
    )


@pytest.mark.parametrize("activation", ["relu", "hard"])
@pytest.mark.parametrize(
    ("strategy", "channel", "recipe"),
    [
        (FedSGD(), "gradient", {}),
        (FedSGD(), "aggregate", {"weight_decay": 0.1}),
        (FedAvg(), "client_update", {"weight_decay": 0.1, "momentum": 0.9}),
        (FedAvg(), "aggregate", {}),
    ],
)
def test_records_alone_in_their_bins_come_out_exactly(
    activation: str, strategy: object, channel: str, recipe: dict[str, float], tmp_path: Path
) -> None:
    malice = RobbingTheFed.model_validate({"bins": BINS, "activation": activation, "strength": 0.1})
    federated = deployed(malice, strategy=strategy)
    task = job(tmp_path, in_bins(APART), **recipe)
    outcome = federated.train(task)
    target = batch(0, 1, 2) if channel == "aggregate" else batch(1)
    attack = Robbery.model_validate({"position": SERVER, "channel": channel})
    (answer,) = attack.reconstruct(case_of(federated, task, outcome, target))
    truth = behind(task, outcome, target)
    assert answer.samples is not None
    assert answer.samples.shape == truth.shape
    assert nearest(answer.samples, truth).min() > (90 if isinstance(strategy, FedSGD) else 60)
    assert answer.flags == set()
    assert answer.confidence.min() > -1e-2


@pytest.mark.parametrize("activation", ["relu", "hard"])
def test_records_that_share_a_bin_come_out_as_a_mixture(activation: str, tmp_path: Path) -> None:
    malice = RobbingTheFed.model_validate({"bins": BINS, "activation": activation})
    federated = deployed(malice, strategy=FedSGD(), clients=1)
    task = job(tmp_path, in_bins([4, 9, 9, 15]))
    outcome = federated.train(task)
    attack = Robbery(position=SERVER, channel="gradient")
    (answer,) = attack.reconstruct(case_of(federated, task, outcome, batch(0)))
    first, second, third, fourth = torch.from_numpy(task.split.private.inputs).flatten(1).double()
    assert answer.samples is not None
    assert nearest(answer.samples, torch.stack([first, fourth]).view(2, *SHAPE)).min() > 90
    assert nearest(answer.samples, torch.stack([second, third]).view(2, *SHAPE)).max() < 100
    assert "fewer_bins_than_records" in answer.flags
    assert answer.confidence[-1] == -torch.inf
    assert torch.equal(answer.samples[-1], torch.from_numpy(PUBLIC.inputs).mean(0))


def test_what_a_bin_holds_is_the_sum_over_its_records(tmp_path: Path) -> None:
    """Naive oracle: each record's own gradient, added up over the bin."""
    federated = deployed(strategy=FedSGD(), clients=1)
    outcomes = []
    for number, chosen in enumerate(([9], [9, 9])):
        task = job(tmp_path / str(number), in_bins(chosen))
        outcomes.append((task, federated.train(task)))
    parts = []
    for task, outcome in outcomes:
        (seen,) = outcome.transcripts[SERVER].on("gradient", [1])
        grad = seen.payload["imprint.first.weight"].double()
        parts.append(len(task.split.private) * (grad[9] + grad[10]))
    task, _ = outcomes[1]
    pair = torch.from_numpy(task.split.private.inputs).flatten(1).double()
    scales = torch.linalg.lstsq(pair.T, parts[1]).solution
    torch.testing.assert_close(scales @ pair, parts[1], rtol=1e-4, atol=1e-8)
    assert (scales.abs() > 1e-6).all()


def test_several_local_steps_are_flagged_and_hard_bins_withstand_them(tmp_path: Path) -> None:
    malice = RobbingTheFed(bins=BINS, activation="hard", strength=0.003)
    federated = deployed(malice, clients=1, local_epochs=3)
    task = job(tmp_path, in_bins(APART), batch_size=4)
    outcome = federated.train(task)
    attack = Robbery(position=SERVER, channel="client_update")
    (answer,) = attack.reconstruct(case_of(federated, task, outcome, batch(0)))
    assert "several_local_steps" in answer.flags
    assert nearest(answer.samples, behind(task, outcome, batch(0))).min() > 30


def test_a_masked_update_gives_nothing(tmp_path: Path) -> None:
    federated = deployed(strategy=FedSGD())
    task = job(tmp_path, in_bins(APART))
    outcome = federated.train(task)
    attack = Robbery(position=SERVER, channel="gradient")
    case = reseeded(case_of(federated, task, outcome, batch(0)), "imprint", 1.0)
    (answer,) = attack.reconstruct(case)
    truth = behind(task, outcome, batch(0))
    assert (
        nearest(answer.samples, truth).mean() < nearest(torch.full((1, *SHAPE), 0.3), truth).mean()
    )
    assert "noisy_bins" in answer.flags


def test_an_update_of_nothing_is_answered_blindly(tmp_path: Path) -> None:
    federated = deployed(strategy=FedSGD())
    task = job(tmp_path, in_bins(APART))
    outcome = federated.train(task)
    case = reseeded(case_of(federated, task, outcome, batch(0), batch(1)), "", 0.0)
    for answer in Robbery(position=SERVER, channel="gradient").reconstruct(case):
        assert "zero_gradients" in answer.flags
        assert (answer.confidence == -torch.inf).all()


def test_clients_that_pin_the_architecture_keep_their_records(tmp_path: Path) -> None:
    federated = deployed(pin_architecture=True)
    task = job(tmp_path, in_bins(APART))
    outcome = federated.train(task)
    assert any(flag.startswith("architecture_refused") for flag in outcome.flags)
    attack = Robbery(position=SERVER, channel="client_update")
    assert attack.unsuited(federated.builds(task.model).blueprint(SHAPE, CLASSES)) == ""
    with pytest.raises(AttackError, match="pin the architecture"):
        attack.reconstruct(case_of(federated, task, outcome, batch(0)))


def test_an_honest_round_has_nothing_planted(tmp_path: Path) -> None:
    federated = deployed(rounds=2)
    task = job(tmp_path, in_bins(APART), record=(1, 2))
    outcome = federated.train(task)
    attack = Robbery(position=SERVER, channel="client_update", rounds=(2,))
    with pytest.raises(AttackError, match="the honest model"):
        attack.reconstruct(case_of(federated, task, outcome, batch(0, round=2)))


def test_a_target_does_not_depend_on_the_others(tmp_path: Path) -> None:
    federated = deployed()
    task = job(tmp_path, in_bins(APART))
    outcome = federated.train(task)
    attack = Robbery(position=SERVER, channel="client_update")
    both = attack.reconstruct(case_of(federated, task, outcome, batch(0), batch(1)))
    (alone,) = attack.reconstruct(case_of(federated, task, outcome, batch(1)))
    assert both[1].samples is not None
    assert alone.samples is not None
    assert torch.equal(both[1].samples, alone.samples)


@pytest.mark.parametrize(
    "malice",
    [
        RobbingTheFed(bins=64, rounds=(1, 2)),
        RobbingTheFed(bins=64, rounds=(1, 2), activation="hard"),
        Loki(bins=64, groups=5, rounds=(1, 2)),
    ],
)
def test_training_goes_on(malice: RobbingTheFed | Loki, tmp_path: Path) -> None:
    found = []
    for name, planted in (("honest", None), ("altered", malice)):
        task = Job(
            split=Digits().split(Seed.root(0)),
            model=MLP(hidden=(32,)),
            recipe=Recipe(learning_rate=0.2, batch_size=16),
            seed=Seed.root(3),
            directory=tmp_path / name,
        )
        federated = Federated(name="f", clients=5, rounds=4, local_epochs=2, malice=planted)
        found.append(federated.train(task).utility.accuracy)
    honest, altered = found
    assert honest > 0.5
    assert altered > honest - 0.06


def test_a_block_larger_than_the_models_input_is_refused() -> None:
    federated = deployed(RobbingTheFed(bins=65))
    found = federated.problems(Digits().card(), MLP(), Recipe())
    assert found == [
        "robbing_the_fed: the imprint block is larger than the model's input: bins = 65, but its "
        "first layer takes 64 numbers; at most 64 bins would be right"
    ]
    assert deployed(RobbingTheFed(bins=64)).problems(Digits().card(), MLP(), Recipe()) == []


def test_bad_options_are_refused() -> None:
    for options in ({"bins": 1}, {"gain": 0}, {"strength": -1}, {"activation": "tanh"}):
        with pytest.raises(ValidationError):
            RobbingTheFed.model_validate(options)
    with pytest.raises(ValidationError):
        Robbery.model_validate({"position": "curious_server", "channel": "gradient"})
    with pytest.raises(ValidationError):
        ImprintedModel.model_validate({"model": MLP(), "bins": 8})


def test_the_wrapped_model_is_no_component_and_changes_nothing() -> None:
    assert not any("imprint" in kind for kind in components("fedmi.models"))
    assert not any("imprint" in kind for kind in components("fedmi.malice"))
    plain, wrapped = (
        spec.build(SHAPE, CLASSES, Seed.root(1))
        for spec in (MLP(), RobbingTheFed(bins=BINS).architecture(MLP()))
    )
    inputs = torch.from_numpy(records([0.2, 0.3], 0).inputs)
    assert torch.equal(plain(inputs), wrapped(inputs))
    spec = RobbingTheFed(bins=BINS).architecture(MLP(hidden=(3,)))
    assert spec.model_dump()["model"]["hidden"] == (3,)


@pytest.mark.parametrize("groups", [0, 2])
def test_the_block_keeps_the_shape(groups: int) -> None:
    inputs = torch.rand(2, 3, 5, 4)
    assert torch.equal(Imprint((3, 5, 4), 7, "hard", groups)(inputs), inputs)


def test_bins_are_quantiles_and_never_empty() -> None:
    brightness = torch.rand(1000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    edges = quantiles(brightness, 10)
    counts = torch.histogram(brightness.flatten().double(), edges).hist
    assert (counts - 100).abs().max() < 10
    tied = quantiles(torch.full((50, 1, 2, 2), 0.5), 8)
    assert (tied.diff() > 0).all()
    assert tied[0] < 0
    assert tied[-1] > 1


def test_the_share_that_is_recovered() -> None:
    references = torch.zeros(4, 1, 2, 2)
    errors = torch.tensor([0.0, 0.0316, 0.0317, 0.5])
    samples = references + errors[:, None, None, None]
    labels = torch.zeros(4, dtype=torch.long)
    matched = Matched(samples, references, labels, labels, None)
    judge = cast(Judge, None)
    assert RecoveredExactly().score(matched, judge) == 0.5
    assert RecoveredExactly(threshold=6).score(matched, judge) == 1.0
    assert RecoveredExactly(threshold=60).score(matched, judge) == 0.25
    with pytest.raises(ValidationError):
        RecoveredExactly(threshold=0)
