"""Labels from the last layer's gradient: exact on untrained networks, guarded elsewhere."""

from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.labels import (
    LabelMethod,
    batch_labels,
    granted,
    recover,
    single_label,
)
from fedmi.attacks.engine.labels.attack import LabelAttack
from fedmi.attacks.gradient.bias_labels import BiasLabels
from fedmi.attacks.gradient.gradinversion_labels import GradInversionLabels
from fedmi.attacks.gradient.idlg_labels import IDLGLabels
from fedmi.attacks.gradient.irlg import IRLG
from fedmi.attacks.gradient.llg import LLG
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.base import ModelSpec, Shape
from fedmi.models.classifiers import MLP, Softmax
from fedmi.models.convolutional import ConvNet, LeNet
from fedmi.training.local import batches, fit, mean_gradient
from tests.gradient_cases import (
    SERVER,
    base_model,
    gradient_case,
    images,
    make_case,
    sets,
    trained,
)

SPECS = [Softmax(), MLP(), LeNet(), ConvNet(width=8, blocks=2)]
Answer = tuple[Tensor, Tensor]


class NoBias(ModelSpec):
    """A multilayer perceptron whose last layer has no bias."""

    kind: Literal["no_bias"] = "no_bias"

    def module(self, shape: Shape, classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes, bias=False)
        )


def rate(found: tuple[Reconstruction, ...], clients: list[tuple[Tensor, Tensor]]) -> float:
    """Share of labels recovered, as multisets."""
    hits = total = 0
    for answer, (_, labels) in zip(found, clients, strict=True):
        assert answer.labels is not None
        assert len(answer.labels) == len(answer.confidence) == len(labels)
        counts = [torch.bincount(side, minlength=10) for side in (answer.labels, labels)]
        hits += int(torch.minimum(*counts).sum())
        total += len(labels)
    return hits / total


@pytest.mark.parametrize("spec", SPECS)
def test_idlg_is_exact_for_one_record(spec: ModelSpec) -> None:
    clients = sets([1] * 12, seed=0)
    attack = IDLGLabels(position=SERVER, channel=Channel.GRADIENT)
    assert rate(attack.reconstruct(gradient_case(spec, clients)), clients) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_bias_labels_of_batches_of_eight_on_untrained_networks(spec: ModelSpec) -> None:
    clients = sets([8] * 6 + [1], seed=0)
    attack = BiasLabels(position=SERVER, channel=Channel.GRADIENT)
    assert rate(attack.reconstruct(gradient_case(spec, clients)), clients) >= 0.9


def test_bias_labels_of_local_updates() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.01, batch_size=4), epochs=2)
    clients = sets([8] * 4, seed=0)
    payloads = [trained(MLP(), batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
    case = make_case(MLP(), payloads, [8] * 4, Channel.CLIENT_UPDATE, work)
    attack = BiasLabels(position=SERVER, channel=Channel.CLIENT_UPDATE)
    assert rate(attack.reconstruct(case), clients) >= 0.9


def test_labels_without_a_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10, bias=False)
    )
    for inputs, labels in sets([1] * 8, seed=0):
        gradient = mean_gradient(model, inputs, labels)
        assert single_label(gradient, model)[0].tolist() == labels.tolist()
    (batch,) = sets([8], seed=1)
    gradient = mean_gradient(model, *batch)
    probes = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found, _ = batch_labels(gradient, model, model.state_dict(), probes, 8)
    hits = torch.minimum(*(torch.bincount(side, minlength=10) for side in (found, batch[1]))).sum()
    assert hits >= 7


def test_noise_in_place_of_the_gradient_recovers_labels_no_better_than_guessing() -> None:
    clients = sets([1] * 60, seed=0)
    case = noise_case(gradient_case(Softmax(), clients))
    found = IDLGLabels(position=SERVER, channel=Channel.GRADIENT).reconstruct(case)
    assert rate(found, clients) < 0.25  # one in ten by chance


def noise_case(case: Case) -> Case:
    rng = torch.Generator().manual_seed(0)
    start, *seen = case.transcript.observations
    masked = [
        replace(
            one, payload={n: torch.rand(p.shape, generator=rng) for n, p in one.payload.items()}
        )
        for one in seen
    ]
    return replace(case, transcript=replace(case.transcript, observations=(start, *masked)))


def test_idlg_refuses_a_batch_and_names_the_attack_for_it() -> None:
    attack = IDLGLabels(position=SERVER, channel=Channel.GRADIENT)
    with pytest.raises(AttackError, match="this update holds 3; use the attack 'bias_labels'"):
        attack.reconstruct(gradient_case(MLP(), sets([3], seed=0)))


def test_an_update_that_says_nothing_is_a_flagged_guess() -> None:
    case = gradient_case(MLP(), sets([2], seed=0))
    start, seen = case.transcript.observations
    silent = replace(seen, payload={n: torch.zeros_like(p) for n, p in seen.payload.items()})
    case = replace(case, transcript=replace(case.transcript, observations=(start, silent)))
    (answer,) = BiasLabels(position=SERVER, channel=Channel.GRADIENT).reconstruct(case)
    assert answer.flags == {"zero_gradients"}
    assert answer.labels is not None
    assert answer.labels.shape == (2,)
    assert (answer.confidence == -torch.inf).all()


# -- every published rule ------------------------------------------------------------------------

RULES: list[LabelMethod] = ["auto", "gradinversion", "llg", "llg_star", "llg_plus", "irlg", "bias"]
COUNTING: list[LabelMethod] = ["auto", "irlg", "bias"]


def with_public(case: Case) -> Case:
    labels = torch.arange(40) % 10
    knowledge = replace(
        case.knowledge,
        facts=case.knowledge.facts | {Fact.PUBLIC_DATA},
        public=(images(40, seed=77), labels),
    )
    return replace(case, knowledge=knowledge)


def recovered(case: Case, method: LabelMethod, channel: Channel = Channel.GRADIENT) -> list[Answer]:
    return [recover(case, evidence, method) for evidence in read(case, channel)]


def hits(found: list[Answer], clients: list[tuple[Tensor, Tensor]]) -> float:
    """Share of labels recovered, as multisets; every answer must be whole and in order."""
    right = total = 0
    for (labels, confidence), (_, truth) in zip(found, clients, strict=True):
        assert labels.shape == confidence.shape == truth.shape
        assert labels.tolist() == sorted(labels.tolist())
        counts = [torch.bincount(side, minlength=10) for side in (labels, truth)]
        right += int(torch.minimum(*counts).sum())
        total += len(truth)
    return right / total


def distinct(count: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of smooth images, no label twice in a batch."""
    rng = torch.Generator().manual_seed(4)
    return [
        (images(count, seed=b), torch.randperm(10, generator=rng)[:count]) for b in range(batches)
    ]


@cache
def learnt(batches: int) -> dict[str, Tensor]:
    """An MLP that knows `sets([16] * batches, seed=0)` by heart."""
    return fitted(MLP(), sets([16] * batches, seed=0), steps=600)


def fitted(
    spec: ModelSpec, seen: list[tuple[Tensor, Tensor]], steps: int = 250
) -> dict[str, Tensor]:
    """The weights after learning these batches by heart."""
    joined = tuple(torch.cat(parts) for parts in zip(*seen, strict=True))
    work = LocalWork(recipe=Recipe(learning_rate=0.2, batch_size=16), steps=steps)
    return trained(spec, (joined[0], joined[1]), work, Seed.root(1))


def case_at(
    spec: ModelSpec, state: dict[str, Tensor], clients: list[tuple[Tensor, Tensor]]
) -> Case:
    """`gradient_case` at a model with these weights."""
    model = base_model(spec)
    model.load_state_dict(state)
    case = gradient_case(spec, clients)
    start, *seen = case.transcript.observations
    payloads = [mean_gradient(model, *batch) for batch in clients]
    items = [replace(one, payload=part) for one, part in zip(seen, payloads, strict=True)]
    transcript = replace(case.transcript, observations=(replace(start, payload=state), *items))
    return replace(case, transcript=transcript)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_is_near_exact_on_distinct_labels_at_an_untrained_network(
    spec: ModelSpec, method: LabelMethod
) -> None:
    clients = distinct(5, batches=6)
    assert hits(recovered(with_public(gradient_case(spec, clients)), method), clients) >= 0.9


@pytest.mark.parametrize("method", COUNTING)
@pytest.mark.parametrize("spec", SPECS[1:])
def test_counts_of_repeated_labels_are_exact_at_an_untrained_network(
    spec: ModelSpec, method: LabelMethod
) -> None:
    clients = [(images(12, seed=s), torch.tensor([s] * 6 + [7] * 3 + [9] * 3)) for s in range(5)]
    found = recovered(gradient_case(spec, clients), method)
    assert hits(found, clients) == 1
    assert min(float(confidence.min()) for _, confidence in found) > 0.9


def test_irlg_is_exact_for_softmax_regression_on_distinct_labels() -> None:
    clients = distinct(1, batches=3) + distinct(3, batches=5) + distinct(5, batches=5)
    assert hits(recovered(gradient_case(Softmax(), clients), "irlg"), clients) == 1


def test_irlg_solves_its_system_as_least_squares_does() -> None:
    clients = sets([6], seed=3)
    case = gradient_case(MLP(), clients)
    (evidence,) = read(case, Channel.GRADIENT)
    model = base_model(MLP())
    weight, bias = (list(model.parameters())[row].detach().double() for row in (-2, -1))
    rows, slope = (
        evidence.gradient[name].double() for name in list(dict(model.named_parameters()))[-2:]
    )
    answers = torch.stack(
        [(weight @ (rows[k] / slope[k]) + bias).softmax(0) for k in range(10)], dim=1
    )
    system = torch.cat([answers - torch.eye(10), torch.ones(1, 10)])
    sides = torch.cat([6 * slope, torch.full((1,), 6.0).double()])
    expected = torch.linalg.lstsq(system, sides[:, None], driver="gelsd").solution.flatten()
    found = torch.bincount(recover(case, evidence, "irlg")[0], minlength=10)
    assert torch.equal(found, expected.round().long())


def test_llg_does_what_its_paper_says_step_by_step() -> None:
    clients = sets([8] * 4, seed=5)
    case = gradient_case(LeNet(), clients)
    for evidence, (labels, _) in zip(
        read(case, Channel.GRADIENT), recovered(case, "llg"), strict=True
    ):
        sums = list(evidence.gradient.values())[-2].sum(1).tolist()
        impact = sum(g for g in sums if g < 0) / 8 * (1 + 1 / 10)
        named = [k for k in range(10) if sums[k] < 0]
        for k in named:
            sums[k] -= impact
        while len(named) < 8:
            least = sums.index(min(sums))
            named.append(least)
            sums[least] -= impact
        assert labels.tolist() == sorted(named)


def test_llg_plus_learns_impacts_from_public_records_of_the_classes() -> None:
    seen = distinct(10, batches=6)
    state = fitted(MLP(), seen)
    clients = [
        (torch.cat([one, two]), torch.cat([a, b]))
        for (one, a), (two, b) in zip(seen[:3], seen[3:], strict=True)
    ]
    case = case_at(MLP(), state, clients)
    public = tuple(torch.cat(parts) for parts in zip(*seen, strict=True))
    knowledge = replace(
        case.knowledge,
        facts=case.knowledge.facts | {Fact.PUBLIC_DATA},
        public=(public[0], public[1]),
    )
    knowing = replace(case, knowledge=knowledge)
    assert hits(recovered(knowing, "llg_plus"), clients) >= hits(recovered(case, "llg"), clients)


def test_llg_plus_asks_for_public_data() -> None:
    where = {"position": SERVER, "channel": Channel.GRADIENT}
    assert Fact.PUBLIC_DATA in LLG.model_validate({**where, "variant": "llg_plus"}).required_facts
    assert Fact.PUBLIC_DATA not in LLG.model_validate(where).required_facts
    case = gradient_case(MLP(), sets([2], seed=0))
    with pytest.raises(AttackError, match="grant the fact 'public_data'"):
        LLG.model_validate({**where, "variant": "llg_plus"}).reconstruct(case)


def test_signs_name_distinct_labels_on_a_network_that_knows_the_records_by_heart() -> None:
    clients = distinct(6, batches=5)
    state = fitted(MLP(), clients)
    case = case_at(MLP(), state, clients)
    assert hits(recovered(case, "gradinversion"), clients) >= 0.9
    assert hits(recovered(case, "auto"), clients) >= 0.9


def test_gradinversion_says_so_where_labels_repeat() -> None:
    batch = (images(6, seed=0), torch.tensor([2, 2, 2, 7, 7, 7]))
    attack = GradInversionLabels(position=SERVER, channel=Channel.GRADIENT)
    (found,) = attack.reconstruct(gradient_case(MLP(), [batch]))
    assert found.labels is not None
    assert found.flags == {"labels_not_distinct"}
    assert len(found.labels.unique()) == 6
    sure = dict(zip(found.labels.tolist(), found.confidence.tolist(), strict=True))
    assert {label for label, confidence in sure.items() if confidence > 0} == {2, 7}


def test_gradinversion_starts_over_beyond_the_number_of_classes() -> None:
    (batch,) = sets([23], seed=0)
    ((labels, confidence),) = recovered(gradient_case(MLP(), [batch]), "gradinversion")
    assert torch.bincount(labels, minlength=10).tolist().count(2) == 7
    assert confidence.sum() <= 10


@pytest.mark.parametrize("method", RULES)
def test_noise_in_place_of_the_gradient_tells_no_rule_the_labels(method: LabelMethod) -> None:
    clients = distinct(3, batches=40)
    case = with_public(gradient_case(MLP(), clients))
    start, *seen = case.transcript.observations
    rng = torch.Generator().manual_seed(0)
    masked = [
        replace(
            one, payload={n: torch.randn(p.shape, generator=rng) for n, p in one.payload.items()}
        )
        for one in seen
    ]
    case = replace(case, transcript=replace(case.transcript, observations=(start, *masked)))
    assert hits(recovered(case, method), clients) < 0.42  # 0.3 for distinct guesses


@pytest.mark.parametrize("method", RULES)
def test_a_last_layer_without_a_bias(method: LabelMethod) -> None:
    clients = distinct(5, batches=6)
    case = with_public(gradient_case(NoBias(), clients))
    if method == "irlg":
        with pytest.raises(AttackError, match="layer '3' has no bias: use 'llg'"):
            recovered(case, method)
    else:
        assert hits(recovered(case, method), clients) >= 0.9


def test_attacks_name_the_last_layer_they_cannot_read_beforehand() -> None:
    where = {"position": SERVER, "channel": Channel.GRADIENT}
    convolution = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for kind in (BiasLabels, GradInversionLabels, IDLGLabels, IRLG, LLG):
        attack = kind.model_validate(where)
        assert "'0', a Conv2d" in attack.unsuited(convolution)
        assert attack.unsuited(MLP().blueprint((1, 16, 16), 10)) == ""
    bare = NoBias().blueprint((1, 16, 16), 10)
    assert "has no bias" in IRLG.model_validate(where).unsuited(bare)
    assert LLG.model_validate(where).unsuited(bare) == ""


@pytest.mark.parametrize("method", ["auto", "bias", "irlg", "llg", "llg_star"])
def test_confidence_says_that_a_trained_network_is_guesswork(method: LabelMethod) -> None:
    seen = sets([16] * 6, seed=0)
    fresh_case = gradient_case(MLP(), seen)
    known_case = case_at(MLP(), learnt(6), seen)
    before, after = (recovered(case, method) for case in (fresh_case, known_case))
    sure = [
        float(torch.cat([confidence for _, confidence in found]).mean())
        for found in (before, after)
    ]
    assert sure[0] > sure[1] + 0.1
    assert sure[1] < hits(after, seen) + 0.2


def test_simulating_several_steps_counts_better_than_reading_them_as_one() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=0.05, batch_size=4), epochs=2)
    clients = [(images(8, seed=s), torch.tensor([s] * 5 + [8, 8, 9])) for s in range(3)]
    spec = LeNet()
    payloads = [trained(spec, batch, work, Seed.root(c)) for c, batch in enumerate(clients)]
    case = make_case(spec, payloads, [8] * 3, Channel.CLIENT_UPDATE, work)
    simulated, as_one = (
        hits(recovered(case, method, Channel.CLIENT_UPDATE), clients) for method in ("auto", "bias")
    )
    assert simulated > as_one + 0.05
    attack = BiasLabels(position=SERVER, channel=Channel.CLIENT_UPDATE)
    assert attack.reconstruct(case)[0].flags == {"steps_read_as_one"}


@pytest.mark.parametrize("method", RULES)
def test_a_target_is_answered_the_same_alone(method: LabelMethod) -> None:
    clients = sets([4, 4, 4], seed=0)
    together = recovered(with_public(gradient_case(MLP(), clients)), method)
    (alone,) = recovered(with_public(gradient_case(MLP(), clients, only=2)), method)
    assert torch.equal(together[2][0], alone[0])
    assert torch.equal(together[2][1], alone[1])


def test_features_of_either_sign_are_flagged() -> None:
    case = gradient_case(MLP(activation="tanh"), sets([3], seed=0))
    where = {"position": SERVER, "channel": Channel.GRADIENT}
    for attack in (LLG.model_validate(where), GradInversionLabels.model_validate(where)):
        assert "negative_features" in attack.reconstruct(case)[0].flags


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (torch.tensor([3, 10]), "target 'client0': label 10 granted, but the classes are 0 to 9"),
        (torch.tensor([-1, 2]), "target 'client0': label -1 granted"),
        (torch.tensor([1, 2, 3]), "3 labels granted, but the update holds 2 records"),
        (torch.tensor([1.5, 2.0]), "labels granted are torch.float32, not integers"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels: Tensor, fault: str) -> None:
    case = gradient_case(MLP(), sets([2], seed=0))
    case = replace(case, knowledge=replace(case.knowledge, labels={"client0": labels}))
    (evidence,) = read(case, Channel.GRADIENT)
    with pytest.raises(AttackError, match=fault):
        granted(case, evidence)


def test_a_recovered_class_beyond_the_data_set_is_refused() -> None:
    batch = (images(1, seed=0), torch.tensor([9]))
    case = gradient_case(MLP(), [batch])
    case = replace(case, knowledge=replace(case.knowledge, classes=5))
    with pytest.raises(AttackError, match="target 'client0': label 9 recovered"):
        recovered(case, "auto")


@pytest.mark.parametrize("spec", SPECS)
def test_one_record_is_read_from_the_whole_layer_where_rounding_took_the_bias(
    spec: ModelSpec,
) -> None:
    clients = sets([1] * 12, seed=0)
    case = gradient_case(spec, clients)
    start, *seen = case.transcript.observations
    rounded = [
        replace(one, payload={**one.payload, last: torch.zeros_like(one.payload[last])})
        for one in seen
        for last in [list(one.payload)[-1]]
    ]
    case = replace(case, transcript=replace(case.transcript, observations=(start, *rounded)))
    found = recovered(case, "auto")
    assert hits(found, clients) == 1
    assert min(float(confidence) for _, confidence in found) > 0.999
    assert hits(recovered(case, "idlg"), clients) < 0.5


def flagged(attack: LabelAttack, case: Case) -> list[set[str]]:
    return [set(found.flags) for found in attack.reconstruct(case)]


def of_classes(*labels: int) -> tuple[Tensor, Tensor]:
    return images(len(labels), seed=3), torch.tensor(labels)


def counting(case: Case, records: int) -> Case:
    """With the first item said to hold so many records."""
    start, seen, *others = case.transcript.observations
    items = (start, replace(seen, clear={"num_examples": float(records)}), *others)
    return replace(case, transcript=replace(case.transcript, observations=items))


@pytest.mark.parametrize("spec", SPECS)
def test_more_classes_than_records_are_flagged(spec: ModelSpec) -> None:
    case = counting(gradient_case(spec, [of_classes(1, 3, 5, 7), of_classes(1, 3)]), 2)
    attack = BiasLabels(position=SERVER, channel=Channel.GRADIENT)
    assert flagged(attack, case) == [{"more_classes_than_records: 4 for 2"}, set()]


@pytest.mark.parametrize("rate", [1e-4, 0.1])
def test_rounding_of_an_update_is_not_a_class(rate: float) -> None:
    clients = distinct(6, batches=4)
    state = fitted(MLP(), clients, steps=600)
    work = LocalWork(recipe=Recipe(learning_rate=rate, batch_size=3), epochs=2)
    payloads = list[dict[str, Tensor]]()
    for batch in clients:
        model = base_model(MLP())
        model.load_state_dict(state)
        fit(model, *batch, batches(6, work, Seed.root(0)), work)
        payloads.append(model.state_dict())
    case = make_case(MLP(), payloads, [6] * 4, Channel.CLIENT_UPDATE, work)
    start, *seen = case.transcript.observations
    items = (replace(start, payload=state), *seen)
    case = replace(case, transcript=replace(case.transcript, observations=items))
    attack = BiasLabels(position=SERVER, channel=Channel.CLIENT_UPDATE)
    assert flagged(attack, case) == [{"steps_read_as_one"}] * 4


def test_a_silent_last_layer_is_answered_with_a_flagged_guess() -> None:
    case = gradient_case(MLP(), sets([3, 3], seed=0))
    start, seen, other = case.transcript.observations
    payload = dict(seen.payload)
    for name in list(payload)[-2:]:
        payload[name] = torch.zeros_like(payload[name])
    items = (start, replace(seen, payload=payload), other)
    case = replace(case, transcript=replace(case.transcript, observations=items))
    for kind in (BiasLabels, IRLG, LLG):
        attack = kind.model_validate({"position": SERVER, "channel": Channel.GRADIENT})
        silent, plain = attack.reconstruct(case)
        assert silent.flags == {"zero_gradients_in_last_layer"}
        assert silent.samples is None
        assert (silent.confidence == -torch.inf).all()
        assert plain.flags == set()


def test_idlg_answers_the_single_records_and_tells_the_batches() -> None:
    clients = sets([1, 3, 1], seed=0)
    attack = IDLGLabels(position=SERVER, channel=Channel.GRADIENT)
    found = attack.reconstruct(gradient_case(MLP(), clients))
    assert [set(one.flags) for one in found] == [set(), {"records_do_not_fit: 3 records"}, set()]
    assert rate((found[0], found[2]), [clients[0], clients[2]]) == 1
    assert found[1].samples is None
    assert found[1].labels is not None
    assert found[1].labels.shape == (3,)
