"""LOKI: an aggregate of many clients that tells each of them apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.gradient.loki import Loki as Reading
from fedmi.attacks.gradient.robbing_the_fed import RobbingTheFed as Robbery
from fedmi.data.digits import Digits
from fedmi.data.records import Records
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.malice.loki import Loki
from fedmi.deployments.federated.malice.robbing_the_fed import RobbingTheFed
from fedmi.deployments.federated.strategies.fedavg import FedAvg
from fedmi.deployments.federated.strategies.fedsgd import FedSGD
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.words import Channel
from fedmi.models.classifiers import MLP
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from tests.imprint_cases import (
    BINS,
    SERVER,
    batch,
    behind,
    case_of,
    in_bins,
    job,
    nearest,
    reseeded,
)

CLIENTS = 4


def deployed(malice: Loki | RobbingTheFed | None = None, **options: object) -> Federated:
    malice = malice or Loki(bins=BINS, groups=CLIENTS)
    return Federated.model_validate(
        {"name": "f", "clients": CLIENTS, "rounds": 1, "malice": malice, **options}
    )


def crowded() -> Records:
    """Records of many bins, dealt out to the clients."""
    return in_bins([*range(2, 26)])


def reading(channel: str = "aggregate") -> Reading:
    return Reading.model_validate({"position": SERVER, "channel": channel})


@pytest.mark.parametrize("activation", ["relu", "hard"])
@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [(FedSGD(), {}), (FedAvg(), {"weight_decay": 0.1}), (FedAvg(), {"momentum": 0.5})],
)
def test_an_aggregate_gives_every_record(
    activation: str, strategy: object, recipe: dict[str, float], tmp_path: Path
) -> None:
    malice = Loki.model_validate(
        {"bins": BINS, "groups": CLIENTS, "activation": activation, "strength": 0.1}
    )
    federated = deployed(malice, strategy=strategy)
    task = job(tmp_path, crowded(), **recipe)
    outcome = federated.train(task)
    target = batch(*range(CLIENTS))
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    truth = behind(task, outcome, target)
    assert answer.samples is not None
    assert answer.samples.shape == truth.shape
    assert nearest(answer.samples, truth).min() > (80 if isinstance(strategy, FedSGD) else 50)
    assert answer.flags == set()


def test_it_separates_clients_whose_records_share_bins(tmp_path: Path) -> None:
    """A record a client, all in the same bin: the plain imprint sees one mixture."""
    task = job(tmp_path, in_bins([9] * CLIENTS))
    target = batch(*range(CLIENTS))
    federated = deployed(strategy=FedSGD())
    outcome = federated.train(task)
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    truth = behind(task, outcome, target)
    assert nearest(answer.samples, truth).min() > 80

    plain = deployed(RobbingTheFed(bins=BINS), strategy=FedSGD())
    task = job(tmp_path / "plain", in_bins([9] * CLIENTS))
    outcome = plain.train(task)
    attack = Robbery(position=SERVER, channel="aggregate")
    (mixture,) = attack.reconstruct(case_of(plain, task, outcome, target))
    assert nearest(mixture.samples, truth).max() < 30
    assert "fewer_bins_than_records" in mixture.flags


@pytest.mark.parametrize("strategy", [FedAvg(), FedSGD()])
def test_secure_aggregation_does_not_help(strategy: FedAvg | FedSGD, tmp_path: Path) -> None:
    malice = Loki(bins=BINS, groups=CLIENTS, strength=1.0)
    federated = deployed(malice, strategy=strategy, protections=(SecAggPlus(),))
    task = job(tmp_path, in_bins([9, 9, 9, 9, 15, 15, 15, 15]))
    outcome = federated.train(task)
    seen = outcome.transcripts[SERVER]
    assert not seen.on(Channel.CLIENT_UPDATE) + seen.on(Channel.GRADIENT)
    target = batch(*range(CLIENTS))
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    truth = behind(task, outcome, target)
    groups = [torch.from_numpy(task.split.private.inputs)[outcome.used[1, c]] for c in range(4)]
    alone = [len({float(x.mean().round(decimals=3)) for x in part}) == 2 for part in groups]
    recovered = nearest(answer.samples, truth).view(CLIENTS, 2).min(1).values > 40
    assert any(alone)
    assert recovered.tolist() == alone


def test_a_signal_below_the_quantisation_is_flagged(tmp_path: Path) -> None:
    malice = Loki(bins=BINS, groups=CLIENTS, strength=1e-5)
    federated = deployed(malice, protections=(SecAggPlus(),))
    task = job(tmp_path, crowded())
    outcome = federated.train(task)
    target = batch(*range(CLIENTS))
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    assert nearest(answer.samples, behind(task, outcome, target)).max() < 30
    assert "noisy_bins" in answer.flags


def test_a_single_update_is_read_too(tmp_path: Path) -> None:
    federated = deployed(strategy=FedSGD())
    task = job(tmp_path, crowded())
    outcome = federated.train(task)
    answers = reading("gradient").reconstruct(case_of(federated, task, outcome, batch(2), batch(0)))
    for answer in answers:
        assert nearest(answer.samples, behind(task, outcome, answer.target)).min() > 80


def test_several_local_steps(tmp_path: Path) -> None:
    malice = Loki(bins=BINS, groups=CLIENTS, strength=0.002)
    federated = deployed(malice, local_epochs=3)
    task = job(tmp_path, crowded(), batch_size=2)
    outcome = federated.train(task)
    target = batch(*range(CLIENTS))
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    assert "several_local_steps" in answer.flags
    assert (nearest(answer.samples, behind(task, outcome, target)) > 30).double().mean() > 0.9


def test_a_masked_aggregate_gives_nothing(tmp_path: Path) -> None:
    federated = deployed(strategy=FedSGD())
    task = job(tmp_path, crowded())
    outcome = federated.train(task)
    target = batch(*range(CLIENTS))
    case = reseeded(case_of(federated, task, outcome, target), "imprint", 1.0)
    (answer,) = reading().reconstruct(case)
    truth = behind(task, outcome, target)
    assert nearest(answer.samples, truth).max() < 25
    assert "noisy_bins" in answer.flags


def test_colours_are_kept_apart(tmp_path: Path) -> None:
    task = job(tmp_path, crowded(), MLP(hidden=(8,)))
    rng = np.random.default_rng(0)
    shape = (3, 4, 5)

    def coloured(part: Records) -> Records:
        inputs = rng.random((len(part), *shape)).astype(np.float32)
        inputs *= rng.uniform(0.4, 0.8, (len(part), 1, 1, 1)).astype(np.float32)
        return Records(inputs, part.labels, part.identities, part.ids)

    sides = {name: coloured(getattr(task.split, name)) for name in ("held_out", "public")}
    private = coloured(task.split.private.take(np.arange(8)))
    split = type(task.split)(private, **sides, classes=4, identity_disjoint=False)
    task = type(task)(**{**task.__dict__, "split": split})
    federated = deployed(Loki(bins=200, groups=CLIENTS), strategy=FedSGD())
    outcome = federated.train(task)
    target = batch(*range(CLIENTS))
    (answer,) = reading().reconstruct(case_of(federated, task, outcome, target))
    assert nearest(answer.samples, behind(task, outcome, target)).min() > 70


def test_clients_that_pin_the_architecture_keep_their_records(tmp_path: Path) -> None:
    federated = deployed(pin_architecture=True, protections=(SecAggPlus(),))
    task = job(tmp_path, crowded())
    outcome = federated.train(task)
    assert any(flag.startswith("architecture_refused") for flag in outcome.flags)
    with pytest.raises(AttackError, match="pin the architecture"):
        reading().reconstruct(case_of(federated, task, outcome, batch(*range(CLIENTS))))


def test_more_clients_than_groups_are_refused() -> None:
    problems = deployed(Loki(bins=BINS, groups=3)).problems(Digits().card(), MLP(), Recipe())
    assert problems == [
        "loki: groups = 3, but 4 clients are asked a round and each needs one of its own; "
        "groups = 4 would be right"
    ]
    large = deployed(Loki(bins=401, groups=4)).problems(Digits().card(), MLP(), Recipe())
    assert "larger than the model's input" in large[0]
    assert "at most 400 bins" in large[0]


def test_bad_options_are_refused() -> None:
    for options in ({"groups": 0}, {"scaling_factor": 0}, {"bins": 0}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            Loki.model_validate(options)
    with pytest.raises(ValidationError):
        Reading.model_validate({"position": "client", "channel": "aggregate"})
