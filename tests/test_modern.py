"""The modern recipe: the features that a gradient gives away, and what they are worth."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedmi.attacks.base import Case
from fedmi.attacks.engine.distances import relative
from fedmi.attacks.engine.evidence import AttackError, Evidence, read
from fedmi.attacks.engine.features import features_by_class, features_of, last_with_bias
from fedmi.attacks.engine.network import load
from fedmi.attacks.engine.penalties import FeaturePenalty, Trial
from fedmi.attacks.gradient.modern import Modern
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.base import ModelSpec, features
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import (
    CLASSES,
    SERVER,
    SHAPE,
    Batch,
    base_model,
    gradient_case,
    images,
    make_case,
    psnr,
    sets,
    trained,
)

CONVNET = ConvNet(width=8, blocks=2)


def modern(channel: Channel = Channel.GRADIENT, **options: object) -> Modern:
    return Modern.model_validate({"position": SERVER, "channel": channel, "steps": 120, **options})


class Headless(ModelSpec):
    """Its last layer has no bias, and so gives no features away."""

    kind: str = "headless"

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes, False)
        )


def given_away(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(features by class as they are solved for, as they are), of the classes present."""
    base = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = mean_gradient(model, *batch)
    model.load_state_dict(base)
    true = features(model.train(), batch[0]).detach()
    counts = batch[1].bincount(minlength=CLASSES).float()
    found = features_by_class(gradient, base, last_with_bias(model), counts)
    belongs = one_hot(batch[1], CLASSES).float()
    mean = belongs.T @ true / counts.clamp_min(1)[:, None]
    return found[counts > 0], mean[counts > 0]


def sharpened(spec: ModelSpec, by: float) -> nn.Module:
    """Of decided answers: the last layer's weights times `by`."""
    model = base_model(spec)
    with torch.no_grad():
        model.get_submodule(last_with_bias(model)).weight.mul_(by)
    return model


@pytest.mark.parametrize("by", [1.0, 8.0])
@pytest.mark.parametrize(
    "spec", [CONVNET, ConvNet(width=4, blocks=2, norm="batch"), LeNet(channels=4), MLP()]
)
@pytest.mark.parametrize("labels", [[3], [0, 4, 7, 9], list(range(8))])
def test_the_features_of_records_that_differ_in_label_are_exact(
    labels: list[int], spec: ModelSpec, by: float
) -> None:
    batch = images(len(labels), 0), torch.tensor(labels)
    found, true = given_away(sharpened(spec, by), batch)
    assert (found - true).norm() < 0.01 * true.norm()


def test_a_quotient_would_mix_the_features_of_a_batch() -> None:
    model, batch = base_model(CONVNET), (images(4, 0), torch.tensor([0, 4, 7, 9]))
    gradient = mean_gradient(model, *batch)
    name = last_with_bias(model)
    quotient = gradient[f"{name}.weight"] / gradient[f"{name}.bias"][:, None]
    found, true = given_away(model, batch)
    assert (found - true).norm() < 1e-2 * (quotient[batch[1]] - true).norm()


def test_the_mean_of_a_class_is_told_where_labels_repeat() -> None:
    batch = images(6, 0), torch.tensor([0, 0, 4, 4, 4, 9])
    found, true = given_away(base_model(CONVNET), batch)
    spread = true - true.mean(0)
    assert (found - true).norm() < 0.05 * spread.norm()


def penalty_and_trial(labels: list[int]) -> tuple[FeaturePenalty, Case, Evidence, Tensor]:
    batch = images(len(labels), 0), torch.tensor(labels)
    case = gradient_case(CONVNET, [batch])
    seen = read(case, Channel.GRADIENT)[0]
    penalty = FeaturePenalty(1.0, last_with_bias(base_model(CONVNET)))
    return penalty, case, seen, batch[0]


@pytest.mark.parametrize("labels", [[3], [0, 4, 7, 9]])
def test_the_penalty_is_zero_for_the_truth_and_one_for_grey(labels: list[int]) -> None:
    penalty, case, seen, truth = penalty_and_trial(labels)
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen.base, "train")
    given = penalty.given(seen, torch.tensor(labels), network)

    def value(inputs: Tensor) -> float:
        return float(penalty.value(Trial(inputs, torch.tensor(labels), {}, {}), given, network))

    assert value(truth) < 1e-5
    assert value(torch.full_like(truth, 0.5)) == pytest.approx(1, rel=1e-3)
    if len(labels) > 1:
        assert value(truth.flip(0)) > 0.1


def test_columns_that_were_cut_are_left_out_of_the_penalty() -> None:
    penalty, case, seen, truth = penalty_and_trial([3])
    assert case.knowledge.build is not None
    name = f"{penalty.layer}.weight"
    cut = {**seen.gradient, name: seen.gradient[name].clone()}
    cut[name][:, :20] = 0
    support = torch.ones_like(cut[name]).bool()
    support[:, :20] = False
    network = load(case.knowledge.build, seen.base, "train")
    seen = replace(seen, gradient=cut)
    trial = Trial(truth, torch.tensor([3]), {}, {})
    naive, adapted = (
        float(penalty.value(trial, penalty.given(item, trial.labels, network), network))
        for item in (seen, replace(seen, support={name: support}))
    )
    assert naive > 1e-3
    assert adapted < 1e-5


def test_of_a_batch_with_columns_cut_nothing_is_believed() -> None:
    labels = [0, 4, 7, 9]
    penalty, case, seen, truth = penalty_and_trial(labels)
    assert case.knowledge.build is not None
    name = f"{penalty.layer}.weight"
    support = torch.ones_like(seen.gradient[name]).bool()
    support[:, :20] = False
    network = load(case.knowledge.build, seen.base, "train")
    own = torch.tensor(labels)
    given = penalty.given(replace(seen, support={name: support}), own, network)
    for inputs in (truth, truth.flip(0), torch.full_like(truth, 0.5)):
        assert float(penalty.value(Trial(inputs, own, {}, {}), given, network)) == 0


def test_features_are_matched_for_the_labels_of_the_search() -> None:
    """Read as one gradient the update is of another plan, whose labels would be other ones."""
    work = LocalWork(recipe=Recipe(learning_rate=1.0, batch_size=2), epochs=3)
    (batch,) = sets([6], seed=0)
    payload = trained(CONVNET, batch, work, Seed.root(0))
    case = make_case(CONVNET, [payload], [6], Channel.CLIENT_UPDATE, work)
    attack = modern(Channel.CLIENT_UPDATE, local_simulation=False)
    (seen,) = read(case, Channel.CLIENT_UPDATE)
    problem = attack.problem(case, seen)
    anew = attack.labels_of(case, problem.evidence)
    assert anew.sort().values.tolist() != problem.labels[0].sort().values.tolist()
    objective = attack.matching(case, problem.evidence).objective([problem])
    counts = objective.known[2][1]["counts"][0]
    assert counts.equal(problem.labels[0].bincount(minlength=CLASSES).float())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_labels_are_recovered_once(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    own = Modern.labels_of

    def counted(self: Modern, case: Case, evidence: Evidence) -> Tensor:
        asked.append(evidence.target.id)
        return own(self, case, evidence)

    monkeypatch.setattr(Modern, "labels_of", counted)
    modern(steps=1, feature_weight=weight).reconstruct(gradient_case(CONVNET, sets([2, 2], 0)))
    assert sorted(asked) == ["client0", "client1"]


def test_features_are_those_of_the_model() -> None:
    model, inputs = base_model(CONVNET), images(3, 0)
    network = load(lambda: CONVNET.module(SHAPE, CLASSES), dict(model.state_dict()), "eval")
    ours = features_of(network, last_with_bias(model), inputs)
    assert torch.allclose(ours, features(model.eval(), inputs), atol=1e-6)
    assert relative({"f": ours}, {"f": features(model, inputs)}) < 1e-10


@pytest.mark.parametrize("spec", [CONVNET, ConvNet(width=4, blocks=2, norm="batch")])
def test_it_beats_prior_only(spec: ModelSpec) -> None:
    private, public = sets([1, 3], seed=0), sets([1, 3], seed=1)
    found = modern().reconstruct(gradient_case(spec, private))
    prior_only = modern().reconstruct(gradient_case(spec, public))
    assert (psnr(found, private) > psnr(prior_only, private) + 2).all()


def test_noise_in_place_of_the_update_gives_nothing_beyond_prior_only() -> None:
    private = sets([1] * 6, seed=0)
    rng = torch.Generator().manual_seed(0)
    payloads = [
        {n: torch.randn(p.shape, generator=rng) for n, p in base_model(CONVNET).named_parameters()}
        for _ in private
    ]
    case = make_case(CONVNET, payloads, [1] * 6, Channel.GRADIENT, LocalWork())
    found = modern(steps=60).reconstruct(case)
    grey = [replace(answer, samples=torch.full((1, *SHAPE), 0.5)) for answer in found]
    assert psnr(found, private).mean() < psnr(grey, private).mean() + 1


def test_features_help_on_a_batch() -> None:
    clients = [(images(4, seed), torch.tensor([0, 4, 7, 9])) for seed in range(3)]
    case = gradient_case(CONVNET, clients)
    with_them, without = (
        psnr(modern(feature_weight=weight).reconstruct(case), clients) for weight in (1.0, 0.0)
    )
    assert with_them.mean() > without.mean()


def test_a_last_layer_without_bias_leaves_the_term_out() -> None:
    private = sets([1], seed=0)
    case = gradient_case(Headless(), private)
    found = modern(steps=20).reconstruct(case)
    without = modern(steps=20, feature_weight=0).reconstruct(case)
    assert found[0].samples is not None
    assert found[0].samples.equal(without[0].samples)


@pytest.mark.parametrize("known", ["sign_compression", "gradient_pruning (keeps 30 %)"])
def test_updates_that_lost_their_values_leave_the_term_out(known: str) -> None:
    case = gradient_case(CONVNET, sets([1], seed=0))
    case = replace(case, knowledge=replace(case.knowledge, protections=(known,)))
    found = modern(steps=5).reconstruct(case)
    without = modern(steps=5, feature_weight=0).reconstruct(case)
    assert found[0].confidence.equal(without[0].confidence)
    naive = modern(steps=5, adaptive=False).reconstruct(case)
    assert not naive[0].confidence.equal(found[0].confidence)


def test_a_target_alone_gives_what_it_gives_in_a_batch() -> None:
    clients = sets([2, 2, 1], seed=0)
    together = modern(steps=15).reconstruct(gradient_case(CONVNET, clients))
    alone = modern(steps=15).reconstruct(gradient_case(CONVNET, clients, only=1))
    assert alone[0].samples is not None
    assert torch.allclose(alone[0].samples, together[1].samples, atol=2e-2)


def test_a_client_update_of_several_steps_is_read_too() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=2), steps=2)
    batch = images(2, 0), torch.tensor([1, 6])
    payload = trained(CONVNET, batch, work, Seed.root(1))
    case = make_case(CONVNET, [payload], [2], Channel.CLIENT_UPDATE, work, facts=[Fact.LABELS])
    case = replace(case, knowledge=replace(case.knowledge, labels={"client0": batch[1]}))
    found = modern(Channel.CLIENT_UPDATE).reconstruct(case)
    assert float(psnr(found, [batch])) > 15


def test_updates_that_say_nothing_are_flagged() -> None:
    zeros = {n: torch.zeros_like(p) for n, p in base_model(CONVNET).named_parameters()}
    good = mean_gradient(base_model(CONVNET), images(1, 0), torch.tensor([2]))
    case = make_case(CONVNET, [zeros, good], [1, 1], Channel.GRADIENT, LocalWork())
    found = modern(steps=5).reconstruct(case)
    assert found[0].flags == {"zero_gradients"}
    assert found[1].labels is not None
    assert found[1].labels.tolist() == [2]


def test_labels_that_do_not_fit_are_refused() -> None:
    case = gradient_case(CONVNET, sets([2], seed=0))
    case = replace(case, knowledge=replace(case.knowledge, labels={"client0": torch.tensor([1])}))
    with pytest.raises(AttackError, match="1 labels granted"):
        modern(steps=5).reconstruct(case)
