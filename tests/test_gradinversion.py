"""GradInversion: batch statistics on every channel, seeds that agree, labels by its own rule."""

from dataclasses import replace
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.labels import METHODS
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.network import load, one_gradient
from fedmi.attacks.engine.penalties import GroupConsistency
from fedmi.attacks.engine.smooth_matching import statistics_penalty
from fedmi.attacks.engine.unknowns import Unknown
from fedmi.attacks.gradient.gradinversion import GradInversion
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.modern import Modern
from fedmi.attacks.gradient.temporal_inversion import TemporalInversion
from fedmi.exposure.observation import Observation
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.convolutional import ConvNet
from fedmi.training.local import mean_gradient
from tests.gradient_cases import (
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

NORMED = ConvNet(width=8, blocks=2, norm="batch")
PLAIN = ConvNet(width=8, blocks=2)
DISTINCT = torch.tensor([0, 4, 7, 9])


def attack(channel: Channel = Channel.GRADIENT, **options: object) -> GradInversion:
    return GradInversion.model_validate(
        {"position": SERVER, "channel": channel, "steps": 120, "restarts": 1, **options}
    )


class Watched(GradInversion):
    """Keeps where the seeds ended."""

    kind: Literal["watched"] = "watched"  # type: ignore[assignment]
    seen: ClassVar[list[Tensor]] = []
    losses: ClassVar[list[Tensor]] = []

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        self.seen.append(points)
        self.losses.append(losses)
        return super().answer(problem, points, losses, unknown)


def with_statistics(clients: list[Batch], *, granted: bool, known: bool = True) -> Case:
    """Gradients and new running statistics, as a client of fedsgd sends them."""
    payloads = []
    for batch in clients:
        model = base_model(NORMED)
        gradient = mean_gradient(model, *batch)
        payloads.append({**gradient, **dict(model.named_buffers())})
    facts = [Fact.BN_STATISTICS] if granted else []
    counts = [len(labels) for _, labels in clients]
    labels = {f"client{c}": batch[1] for c, batch in enumerate(clients)} if known else {}
    work = LocalWork(recipe=Recipe(batch_size=64))
    return make_case(NORMED, payloads, counts, Channel.GRADIENT, work, labels=labels, facts=facts)


def layer_statistics(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Mean and unbiased variance of what each normalisation is given, by hooks."""
    found: dict[str, Tensor] = {}

    def record(name: str, given: Tensor) -> None:
        found[f"{name}.running_mean"] = given.mean((0, 2, 3)).detach()
        found[f"{name}.running_var"] = given.transpose(0, 1).flatten(1).var(1).detach()

    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _m, args, name=name: record(name, args[0]))
    model.train()(inputs)
    return found


def test_beside_a_gradient_the_statistics_of_the_batch_are_told() -> None:
    batch = images(4, 0), DISTINCT
    case = with_statistics([batch], granted=True)
    seen = read(case, Channel.GRADIENT)[0]
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen.base, "train")
    (penalty,) = statistics_penalty(attack(), case, seen, 1.0)
    wanted = penalty.given(seen, batch[1], network)
    true = layer_statistics(base_model(NORMED), batch[0])
    assert wanted.keys() == true.keys()
    for name, value in true.items():
        assert torch.allclose(wanted[name], value, atol=1e-5), name
    ours = one_gradient(network, *batch)[1]
    for name, value in true.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_an_update_read_as_one_gradient_tells_them_too() -> None:
    work = LocalWork(recipe=Recipe(learning_rate=1e-4, batch_size=4), steps=3)
    batch = images(4, 0), DISTINCT
    payload = trained(NORMED, batch, work, Seed.root(1))
    facts = [Fact.BN_STATISTICS]
    case = make_case(NORMED, [payload], [4], Channel.CLIENT_UPDATE, work, facts=facts)
    naive = attack(Channel.CLIENT_UPDATE, local_simulation=False)
    seen = read(case, Channel.CLIENT_UPDATE)[0]
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen.base, "train")
    (penalty,) = statistics_penalty(naive, case, naive.planned(case, seen), 1.0)
    wanted = penalty.given(seen, batch[1], network)
    true = layer_statistics(base_model(NORMED), batch[0])
    for name, value in true.items():
        assert torch.allclose(wanted[name], value, atol=1e-2 * float(value.abs().max())), name


def test_statistics_count_only_where_granted() -> None:
    batch = images(4, 0), DISTINCT
    told = with_statistics([batch], granted=False)
    bare = gradient_case(NORMED, [batch])
    bare = replace(bare, knowledge=replace(bare.knowledge, labels=told.knowledge.labels))
    found, without = (attack(steps=5).reconstruct(case)[0].confidence for case in (told, bare))
    assert found.equal(without)
    granted = attack(steps=5).reconstruct(with_statistics([batch], granted=True))
    assert not granted[0].confidence.equal(found)


@pytest.mark.parametrize("kind", [GradInversion, InvertingGradients, Modern, TemporalInversion])
def test_granted_statistics_that_are_not_there_are_told(kind: type[GradientMatching]) -> None:
    batch = images(4, 0), DISTINCT
    options = {"rounds": (1, 2)} if kind is TemporalInversion else {}

    def told(case: Case, **more: object) -> bool:
        one = kind.model_validate(
            {"position": SERVER, "channel": Channel.GRADIENT, "steps": 1, **options, **more}
        )
        return "bn_statistics_absent" in one.reconstruct(case)[0].flags

    sent = with_statistics([batch], granted=True)
    assert not told(sent)
    assert not told(with_statistics([batch], granted=False))
    start, seen = sent.transcript.observations
    names = {name for name, _ in base_model(NORMED).named_parameters()}
    bare = replace(seen, payload={n: p for n, p in seen.payload.items() if n in names})
    without = replace(sent, transcript=replace(sent.transcript, observations=(start, bare)))
    assert told(without)
    assert not told(without, bn_weight=0)
    calm = LocalWork(recipe=Recipe(batch_size=64, mode="eval"))
    assert told(replace(sent, knowledge=replace(sent.knowledge, work=calm)))
    work = LocalWork(recipe=Recipe(batch_size=64))
    plain = make_case(
        PLAIN,
        [mean_gradient(base_model(PLAIN), *batch)],
        [4],
        Channel.GRADIENT,
        work,
        facts=[Fact.BN_STATISTICS],
    )
    assert told(plain)


@pytest.mark.parametrize("kind", [GradInversion, InvertingGradients])
def test_granted_statistics_tell_what_a_drowned_gradient_does_not(
    kind: type[GradInversion] | type[InvertingGradients],
) -> None:
    """Dark images, and noise in place of their gradient."""
    clients = [(0.3 * images(4, seed), DISTINCT) for seed in range(3)]
    one = kind.model_validate(
        {"position": SERVER, "channel": Channel.GRADIENT, "steps": 60, "restarts": 1}
    )
    with_them, without = (
        psnr(one.reconstruct(drowned(with_statistics(clients, granted=granted))), clients)
        for granted in (True, False)
    )
    assert (with_them > without + 2).all()


def drowned(case: Case) -> Case:
    """The case with noise in place of every gradient."""
    rng = torch.Generator().manual_seed(0)
    names = {name for name, _ in base_model(NORMED).named_parameters()}

    def noised(seen: Observation) -> Observation:
        payload = {
            name: torch.randn(part.shape, generator=rng) if name in names else part
            for name, part in seen.payload.items()
        }
        return replace(seen, payload=payload) if seen.clients else seen

    seen = tuple(map(noised, case.transcript.observations))
    return replace(case, transcript=replace(case.transcript, observations=seen))


def test_the_statistics_of_several_clients_are_not_those_of_one_batch() -> None:
    case = with_statistics([(images(4, 0), DISTINCT)], granted=True)
    seen = read(case, Channel.GRADIENT)[0]
    both = replace(seen, target=replace(seen.target, clients=(0, 1)))
    assert statistics_penalty(attack(), case, both, 1.0) == ()


def test_seeds_are_pulled_to_their_mean() -> None:
    points = torch.rand(2, 3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * (points - points.mean(1, keepdim=True)).square().mean((2, 3, 4, 5))
    assert torch.allclose(GroupConsistency(0.5)(points), expected)
    assert torch.allclose(GroupConsistency(1.0)(points[:, :1]), torch.zeros(2, 1), atol=1e-9)
    leaf = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(GroupConsistency(1.0)(leaf).sum(), [leaf])
    assert torch.allclose(slope, 2 * (points - points.mean(1, keepdim=True)) / 256, atol=1e-7)


def test_records_are_moved_to_where_they_fit() -> None:
    picture = images(1, 0)[None, None]
    seeds = torch.cat([picture, picture, picture, picture.roll((1, 1), (-2, -1))], 1)
    there = GroupConsistency(1.0, shift=1).consensus(seeds)
    assert torch.allclose(there, picture, atol=1e-6)
    assert not torch.allclose(GroupConsistency(1.0).consensus(seeds), picture, atol=1e-2)
    mixed = torch.rand(2, 3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    together = GroupConsistency(1.0, shift=2)(mixed)
    alone = GroupConsistency(1.0, shift=2)(mixed[1:])
    assert torch.allclose(together[1:], alone)


def test_seeds_come_closer_where_they_are_pulled() -> None:
    case = gradient_case(PLAIN, [(images(2, 0), torch.tensor([1, 6]))])
    ends = []
    for weight in (0.0, 10.0):
        tied = Watched.model_validate(
            {**attack(steps=60, restarts=3, group_weight=weight).model_dump(), "kind": "watched"}
        )
        tied.reconstruct(case)
        ends.append(tied.seen[-1])
    apart, close = (float(points.std(0).mean()) for points in ends)
    assert close < 0.8 * apart


def test_the_answer_is_the_seed_of_lowest_loss() -> None:
    case = gradient_case(PLAIN, [(images(2, 0), torch.tensor([1, 6]))])
    watched = Watched.model_validate(
        {**attack(steps=10, restarts=3).model_dump(), "kind": "watched"}
    )
    found = watched.reconstruct(case)[0]
    best = int(watched.losses[-1].argmin())
    assert found.samples is not None
    assert found.samples.equal(watched.seen[-1][best].clamp(0, 1))


@pytest.mark.parametrize("spec", [PLAIN, NORMED])
def test_it_beats_prior_only(spec: ConvNet) -> None:
    private, public = sets([1, 3], seed=0), sets([1, 3], seed=1)
    found = attack(label_recovery="auto").reconstruct(gradient_case(spec, private))
    prior_only = attack(label_recovery="auto").reconstruct(gradient_case(spec, public))
    assert (psnr(found, private) > psnr(prior_only, private) + 2).all()


def test_noise_in_place_of_the_update_gives_nothing_beyond_prior_only() -> None:
    private = sets([1] * 6, seed=0)
    rng = torch.Generator().manual_seed(0)
    parameters = dict(base_model(PLAIN).named_parameters())
    payloads = [
        {name: torch.randn(p.shape, generator=rng) for name, p in parameters.items()}
        for _ in private
    ]
    case = make_case(PLAIN, payloads, [1] * 6, Channel.GRADIENT, LocalWork())
    found = attack(steps=60).reconstruct(case)
    grey = [replace(answer, samples=torch.full((1, *SHAPE), 0.5)) for answer in found]
    assert psnr(found, private).mean() < psnr(grey, private).mean() + 1


@pytest.mark.parametrize("labels", [[3], [0, 4, 7, 9], [2, 2, 5]])
def test_labels_are_read_by_its_own_rule(labels: list[int]) -> None:
    case = gradient_case(PLAIN, [(images(len(labels), 0), torch.tensor(labels))])
    found = attack(steps=1).reconstruct(case)[0]
    ours = METHODS["gradinversion"](case, read(case, Channel.GRADIENT)[0])[0]
    assert found.labels is not None
    assert found.labels.equal(ours)
    distinct = len({*labels}) == len(labels)
    assert ("labels_not_distinct" in found.flags) != distinct
    if distinct:
        assert found.labels.tolist() == labels


def test_another_rule_reads_labels_that_repeat() -> None:
    case = gradient_case(PLAIN, [(images(3, 0), torch.tensor([2, 2, 5]))])
    found = attack(steps=1, label_recovery="auto").reconstruct(case)[0]
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [2, 2, 5]
    assert found.flags == set()


def test_langevin_noise_is_drawn_for_each_target_and_seed() -> None:
    clients = sets([2, 2], seed=0)
    noisy = attack(steps=10, restarts=2, noise=0.5)
    together = noisy.reconstruct(gradient_case(PLAIN, clients))
    alone = noisy.reconstruct(gradient_case(PLAIN, clients, only=1))
    calm = attack(steps=10, restarts=2).reconstruct(gradient_case(PLAIN, clients, only=1))
    assert alone[0].samples is not None
    assert torch.allclose(alone[0].samples, together[1].samples, atol=2e-2)
    assert (alone[0].samples - calm[0].samples).abs().max() > 0.01


def test_updates_that_say_nothing_are_flagged() -> None:
    zeros = {n: torch.zeros_like(p) for n, p in base_model(PLAIN).named_parameters()}
    good = mean_gradient(base_model(PLAIN), images(1, 0), torch.tensor([2]))
    case = make_case(PLAIN, [zeros, good], [1, 1], Channel.GRADIENT, LocalWork())
    found = attack(steps=5).reconstruct(case)
    assert found[0].flags == {"zero_gradients"}
    assert found[1].labels is not None
    assert found[1].labels.tolist() == [2]


def test_labels_that_do_not_fit_are_refused() -> None:
    case = gradient_case(PLAIN, sets([2], seed=0))
    case = replace(case, knowledge=replace(case.knowledge, labels={"client0": torch.tensor([1])}))
    with pytest.raises(AttackError, match="1 labels granted"):
        attack(steps=5).reconstruct(case)
