"""The engine under gradient matching: slow paths, early stops, false beliefs, precision."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.descent import Schedule, minimise
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.gradient_matching import Progress
from fedmi.attacks.engine.matching import Matching, Problem
from fedmi.attacks.engine.network import load
from fedmi.attacks.engine.penalties import TotalVariation
from fedmi.attacks.engine.unknowns import Pixels
from fedmi.attacks.gradient.gradinversion import GradInversion
from fedmi.attacks.gradient.idlg import IDLG
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet, LeNet
from tests.gradient_cases import (
    CLASSES,
    SERVER,
    SHAPE,
    gradient_case,
    make_case,
    psnr,
    sets,
    trained,
)


def inverting(channel: Channel = Channel.GRADIENT, **options: object) -> InvertingGradients:
    return InvertingGradients.model_validate(
        {"position": SERVER, "channel": channel, "steps": 100, **options}
    )


class Branching(nn.Module):
    """Its way depends on the data, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.head = nn.Flatten(), nn.Linear(256, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.sum().item() > 1e6:
            return torch.zeros(len(inputs), CLASSES)
        found: Tensor = self.head(torch.sigmoid(self.flat(inputs) * 3))
        return found


class Viewing(nn.Module):
    """Views that strides of one problem allow, and those of two, as vmap lays them, do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 256, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.conv(inputs))
        maps = hidden.view(len(hidden) * 4, 256)
        scaled = maps / (1 + maps.mean(1, keepdim=True))
        found: Tensor = self.head(scaled.view(len(hidden), 4 * 256))
        return found


class Viewed(ModelSpec):
    kind: str = "viewed"

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return Viewing()


class Odd(ModelSpec):
    kind: str = "odd"

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return Branching()


class Dropping(ModelSpec):
    kind: str = "dropping"
    rate: float = 0.5

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(self.rate), nn.Linear(256, classes))


def objectives(spec: ModelSpec, records: int) -> tuple[Any, Any, Tensor]:
    """The objective as it is chosen, the one by one, and points."""
    clients = sets([records] * 3, seed=0)
    case = gradient_case(spec, clients)
    seen = read(case, Channel.GRADIENT)
    assert case.knowledge.build is not None
    network = load(case.knowledge.build, seen[0].base, "train")
    matching = Matching(network, None, penalties=(TotalVariation(0.1),))
    starts = torch.rand(2, records, *SHAPE, generator=torch.Generator().manual_seed(1))
    problems = [
        Problem(item, batch[1].repeat(2, 1), starts, Seed.root(0))
        for item, batch in zip(seen, clients, strict=True)
    ]
    slow = matching._one_by_one(problems)
    return matching.objective(problems), slow, starts.repeat(3, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "spec", [LeNet(channels=4), ConvNet(width=4, blocks=2, norm="batch"), MLP(hidden=(16,))]
)
def test_the_batched_objective_and_the_one_by_one_are_the_same(spec: ModelSpec) -> None:
    batched, slow, points = objectives(spec, 2)
    assert not batched.matching.network.plain
    assert slow.matching.network.plain
    for ours, theirs in zip(batched.slope(points), slow.slope(points), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert torch.allclose(batched.losses(points), slow.losses(points), rtol=1e-4)
    some = torch.tensor([0, 2])
    rows = torch.tensor([0, 1, 4, 5])
    assert torch.allclose(
        batched.kept(some).losses(points[rows]), batched.losses(points)[rows], rtol=1e-4
    )


def test_what_vmap_refuses_takes_the_slow_path_and_works() -> None:
    chosen, _, _ = objectives(Odd(), 1)
    assert chosen.matching.network.plain
    private, public = sets([1] * 3, seed=0), sets([1] * 3, seed=1)
    found = inverting().reconstruct(gradient_case(Odd(), private))
    prior_only = inverting().reconstruct(gradient_case(Odd(), public))
    assert psnr(found, private).mean() > psnr(prior_only, private).mean() + 8


@pytest.mark.parametrize("orders", [1, 2])
def test_what_vmap_refuses_of_several_problems_takes_the_slow_path_too(orders: int) -> None:
    private, work = sets([4] * 3, seed=0), LocalWork(steps=2, recipe=Recipe(batch_size=2))
    sent = [trained(Viewed(), batch, work, Seed.root(c)) for c, batch in enumerate(private)]
    case = make_case(Viewed(), sent, [4] * 3, Channel.CLIENT_UPDATE, work)
    attack = inverting(Channel.CLIENT_UPDATE, steps=2, tv_unit="absolute", label_orders=orders)
    seen = attack.read(case)
    problems = [attack.problem(case, item) for item in seen]
    assert attack.matching(case, seen[0]).objective(problems).matching.network.plain
    assert all(bool(found.confidence.isfinite().all()) for found in attack.reconstruct(case))


@pytest.mark.parametrize(("rate", "flags"), [(0.5, {"dropout_masks_unknown"}), (0.0, set())])
def test_masks_of_dropout_in_train_mode_are_told_to_be_unknown(
    rate: float, flags: set[str]
) -> None:
    case = gradient_case(Dropping(rate=rate), sets([1], seed=0))
    assert inverting(steps=1).reconstruct(case)[0].flags == flags
    work = LocalWork(recipe=Recipe(mode="eval"))
    calm = replace(case, knowledge=replace(case.knowledge, work=work))
    assert inverting(steps=1).reconstruct(calm)[0].flags == set()


class Bowls:
    """|point - goal|^2 of each row, and how many rows were computed."""

    restarts = 1

    def __init__(self, goals: Tensor, computed: list[int]) -> None:
        self.goals, self.computed = goals, computed

    def losses(self, points: Tensor) -> Tensor:
        return (points - self.goals).square().sum(1)

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        self.computed.append(len(points))
        return self.losses(points), 2 * (points - self.goals)

    def kept(self, problems: Tensor) -> "Bowls":
        return Bowls(self.goals[problems], self.computed)


def test_a_solved_target_is_no_longer_computed_and_the_others_go_on() -> None:
    goals, computed = torch.tensor([[0.51, 0.5], [0.0, 1.0]]), list[int]()
    schedule = Schedule(400, 0.01, decay="none", stop_below=1e-3)
    found, losses = minimise(Bowls(goals, computed), torch.full((2, 2), 0.5), schedule)
    assert computed[0] == 2
    assert computed[-1] == 1
    assert len(computed) < 400
    assert (losses <= 1e-3).all()
    assert torch.allclose(found, goals, atol=0.04)


def test_a_target_without_improvement_stops() -> None:
    computed = list[int]()
    schedule = Schedule(400, 0.01, decay="none", patience=30)
    start, goal = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.7]])
    bowls = Bowls(goal, computed)
    bowls.losses = lambda points: (points[:, 0] - goal[:, 0]).square() + 1  # type: ignore[method-assign]
    minimise(bowls, start, schedule)
    assert len(computed) == 50


def test_noise_is_drawn_row_by_row() -> None:
    goals = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(30, 0.05, noise=0.5)

    def run(rows: list[int]) -> Tensor:
        noise = [torch.Generator().manual_seed(row) for row in rows]
        start = torch.full((len(rows), 4), 0.5)
        return minimise(Bowls(goals[rows], []), start, schedule, noise=noise)[0]

    assert torch.allclose(run([0, 1, 2])[2], run([2])[0])
    quiet = minimise(Bowls(goals, []), torch.full((3, 4), 0.5), replace(schedule, noise=0.0))[0]
    assert not torch.allclose(run([0, 1, 2]), quiet)


def test_rates_fall_as_they_are_asked_to() -> None:
    rates = [Schedule(80, 1.0, decay="step").rate(step) for step in (0, 29, 30, 50, 79)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert Schedule(80, 1.0, decay="cosine").rate(40) == pytest.approx(0.5)
    assert Schedule(80, 1.0, decay="none", warmup=3).rate(0) == pytest.approx(0.25)


def test_float64_finds_the_same_and_is_handed_back_in_float32() -> None:
    clients = sets([1] * 2, seed=0)
    case = gradient_case(LeNet(channels=4), clients)
    found = inverting(precision="float64").reconstruct(case)
    assert all(item.samples is not None and item.samples.dtype == torch.float32 for item in found)
    assert psnr(found, clients).mean() > 15


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(AttackError, match='device = "cuda", but torch sees no GPU'):
        inverting(device="cuda").reconstruct(gradient_case(MLP(), sets([1], seed=0)))


def update_case(records: int = 4) -> tuple[Case, tuple[Tensor, Tensor]]:
    work = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=2), steps=2)
    (batch,) = sets([records], seed=0)
    payload = trained(MLP(hidden=(32,)), batch, work, Seed.root(0))
    spec = MLP(hidden=(32,))
    return make_case(spec, [payload], [records], Channel.CLIENT_UPDATE, work), batch


@pytest.mark.parametrize(
    ("belief", "flag"),
    [
        ({"batch_size": 4}, "false_knowledge: batch_size 4 for 2"),
        ({"steps": 7}, "false_knowledge: steps 7 for 2"),
        ({"learning_rate": 0.5}, "false_knowledge: learning_rate 0.5 for 0.1"),
        ({"records": 3}, "false_knowledge: records 3 for 4"),
    ],
)
def test_a_false_belief_is_told_and_answered(belief: dict[str, float], flag: str) -> None:
    case, _ = update_case()
    (found,) = inverting(Channel.CLIENT_UPDATE, steps=5, assume=belief).reconstruct(case)
    assert found.flags == {flag}
    assert found.samples is not None
    assert len(found.samples) == belief.get("records", 4)


def test_a_true_belief_changes_nothing() -> None:
    case, _ = update_case()

    def run(**belief: float) -> Reconstruction:
        attack = inverting(Channel.CLIENT_UPDATE, steps=5, assume=belief)
        return attack.reconstruct(case)[0]

    true = run(batch_size=2, steps=2, records=4)
    assert true.flags == set()
    assert true.confidence.equal(run().confidence)


def test_wrong_steps_fit_worse_than_the_right_ones() -> None:
    case, _ = update_case()
    known = replace(case.knowledge, facts=case.knowledge.facts | {Fact.LABELS})
    case = replace(case, knowledge=known)
    right, wrong = (
        inverting(Channel.CLIENT_UPDATE, steps=100, assume=belief).reconstruct(case)[0]
        for belief in ({}, {"learning_rate": 2.0})
    )
    assert right.confidence[0] > wrong.confidence[0]


def test_a_first_layer_that_is_silent_is_flagged() -> None:
    case = gradient_case(MLP(hidden=(32,)), sets([1], seed=0))
    start, seen = case.transcript.observations
    dead = {n: torch.zeros_like(p) if n.startswith("1.") else p for n, p in seen.payload.items()}
    transcript = replace(case.transcript, observations=(start, replace(seen, payload=dead)))
    (found,) = inverting(steps=2).reconstruct(replace(case, transcript=transcript))
    assert "zero_gradients_in_first_layer" in found.flags


@pytest.mark.slow
def test_compiled_and_plain_searches_end_alike() -> None:
    clients = sets([1] * 4, seed=0)
    case = gradient_case(LeNet(channels=4), clients)
    plain, compiled = (inverting(steps=60, compile=on).reconstruct(case) for on in (False, True))
    assert abs(psnr(plain, clients).mean() - psnr(compiled, clients).mean()) < 1.5


def test_a_compiled_search_does_not_stop_early() -> None:
    with pytest.raises(ValueError, match="leave out patience"):
        inverting(compile=True, patience=10)


def test_the_box_is_kept() -> None:
    assert Pixels().project(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 0.5, 1]
    assert Pixels(boxed=False).project(torch.tensor([2.0])).tolist() == [2]


class Watching(InvertingGradients):
    """Notes the labels, the schedule and the number of restarts of every search."""

    kind: Literal["watching"] = "watching"  # type: ignore[assignment]
    seen: ClassVar[list[tuple[Tensor, Schedule]]] = []

    def search(
        self,
        case: Case,
        matching: Matching,
        problems: Sequence[Problem],
        schedule: Schedule,
        report: Progress,
    ) -> tuple[Tensor, Tensor]:
        self.seen.append((problems[0].labels, schedule))
        return super().search(case, matching, problems, schedule, report)


def watched(case: Case, **options: object) -> tuple[Reconstruction, list[tuple[Tensor, Schedule]]]:
    Watching.seen.clear()
    attack = Watching.model_validate({"position": SERVER, "steps": 10, **options})
    (found,) = attack.reconstruct(case)
    return found, list(Watching.seen)


def ordered_case(labels: dict[str, Tensor]) -> tuple[Case, Tensor]:
    case, (_, truth) = update_case()
    facts = case.knowledge.facts | {Fact.BATCH_ORDER}
    order = {"client0": (((2, 0), (3, 1)),)}
    return replace(
        case, knowledge=replace(case.knowledge, facts=facts, order=order, labels=labels)
    ), truth


def test_recovered_labels_are_dealt_over_a_granted_order_and_its_deals_searched() -> None:
    case, truth = ordered_case({})
    assert len(truth.unique()) > 2
    found, searches = watched(case, channel=Channel.CLIENT_UPDATE, label_orders=8)
    assert found.flags == {"batch_order_without_labels"}
    assert [len(labels) for labels, _ in searches] == [8, 1]
    assert len(searches[0][0].unique(dim=0)) > 1


def test_granted_labels_are_taken_in_the_granted_order() -> None:
    _, (_, truth) = update_case()
    case, _ = ordered_case({"client0": truth})
    found, searches = watched(case, channel=Channel.CLIENT_UPDATE, label_orders=8)
    assert found.flags == set()
    assert [labels.tolist() for labels, _ in searches] == [[truth.tolist()]]


@pytest.mark.parametrize("records", [1, 2])
def test_a_search_that_is_nowhere_finite_is_answered_in_grey(records: int) -> None:
    case = gradient_case(MLP(hidden=(8,)), sets([records] * 2, seed=0))
    start, wild, tame = case.transcript.observations
    wild = replace(wild, payload={n: part * 1e20 for n, part in wild.payload.items()})
    case = replace(case, transcript=replace(case.transcript, observations=(start, wild, tame)))
    attack = GradInversion.model_validate(
        {"position": SERVER, "channel": Channel.GRADIENT, "steps": 5}
    )
    lost, found = attack.reconstruct(case)
    assert "search_diverged" in lost.flags
    assert lost.samples is not None
    assert (lost.samples == 0.5).all()
    assert (lost.confidence == -torch.inf).all()
    assert "search_diverged" not in found.flags
    assert found.samples is not None
    assert (found.samples != 0.5).any()
    assert found.confidence.isfinite().all()


def test_a_short_search_has_a_short_warmup() -> None:
    case, _ = update_case()
    schedules = list[Schedule]()

    class Warming(GradInversion):
        def search(self, *args: Any) -> tuple[Tensor, Tensor]:
            schedules.append(args[3])
            return super().search(*args)

    options = {"position": SERVER, "channel": Channel.CLIENT_UPDATE, "label_orders": 2}
    Warming.model_validate({**options, "steps": 40, "warmup": 10}).reconstruct(case)
    Warming.model_validate({**options, "steps": 40, "warmup": 50}).reconstruct(case)
    assert [(one.steps, one.warmup) for one in schedules] == [(8, 2), (40, 10), (8, 4), (40, 20)]


def headless(case: Case) -> Case:
    """With the first client's last layer left as it was."""
    start, seen, *others = case.transcript.observations
    payload = dict(seen.payload)
    for name in list(payload)[-2:]:
        payload[name] = torch.zeros_like(payload[name])
    items = (start, replace(seen, payload=payload), *others)
    return replace(case, transcript=replace(case.transcript, observations=items))


def test_a_silent_last_layer_is_told_and_its_labels_guessed() -> None:
    case = headless(gradient_case(MLP(hidden=(32,)), sets([8, 2], seed=0)))
    silent, plain = inverting(steps=2).reconstruct(case)
    assert silent.flags == {"zero_gradients_in_last_layer"}
    assert plain.flags == set()
    assert silent.labels is not None
    assert len(silent.labels.unique()) > 2
    again, _ = inverting(steps=2).reconstruct(case)
    assert torch.equal(silent.labels, again.labels)


def test_more_classes_than_records_are_told() -> None:
    images, labels = sets([4], seed=0)[0][0], torch.tensor([1, 3, 5, 7])
    case = gradient_case(MLP(hidden=(32,)), [(images, labels)])
    (found,) = inverting(steps=2, assume={"records": 2}).reconstruct(case)
    assert found.flags == {
        "false_knowledge: records 2 for 4",
        "more_classes_than_records: 4 for 2",
    }
    granted = replace(case, knowledge=replace(case.knowledge, labels={"client0": labels}))
    assert inverting(steps=2).reconstruct(granted)[0].flags == set()


def test_one_target_that_does_not_fit_leaves_the_others_alone() -> None:
    case = gradient_case(MLP(hidden=(32,)), sets([2, 2], seed=0))
    labels = {"client0": torch.tensor([1, 2, 3]), "client1": torch.tensor([4, 5])}
    case = replace(case, knowledge=replace(case.knowledge, labels=labels))
    odd, fine = inverting(steps=5).reconstruct(case)
    assert odd.flags == {"records_do_not_fit: 2 records"}
    assert (odd.confidence == -torch.inf).all()
    assert odd.samples is not None
    assert odd.samples.shape == (2, *SHAPE)
    assert fine.flags == set()
    assert fine.labels is not None
    assert fine.labels.tolist() == [4, 5]


def test_idlg_answers_what_is_of_one_record_and_tells_the_rest() -> None:
    case = gradient_case(LeNet(channels=4), sets([2, 1], seed=0))
    options = {"position": SERVER, "channel": Channel.GRADIENT, "steps": 5}
    several, single = IDLG.model_validate(options).reconstruct(case)
    assert several.flags == {"records_do_not_fit: 2 records"}
    assert single.confidence.isfinite().all()


def test_restarts_beyond_the_memory_are_searched_in_turn_and_end_alike() -> None:
    (clients,) = sets([2], seed=0)
    case = gradient_case(MLP(hidden=(3000,)), [clients])
    options = {"channel": Channel.GRADIENT, "restarts": 5, "init": "uniform"}
    whole, once = watched(case, memory_mb=4096, **options)
    split, turns = watched(case, memory_mb=32, **options)
    sizes = [len(labels) for labels, _ in turns]
    assert [len(labels) for labels, _ in once] == [5]
    assert sum(sizes) == 5
    assert len(sizes) > 1
    torch.testing.assert_close(split.confidence, whole.confidence, rtol=1e-3, atol=1e-5)
    _, wide = watched(case, memory_mb=64, precision="float64", **options)
    _, narrow = watched(case, memory_mb=64, **options)
    assert len(wide) > len(narrow)
