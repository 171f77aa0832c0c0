"""A malicious client that plays a generator against the global model, and poisons its training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.model.gan_client import GANClient
from fedmi.data.records import Records, Split
from fedmi.deployments.base import DeploymentError, Job, Outcome
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.intruders.gan import GAN
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import OWN_LABEL, OWN_NUMBER, OWN_SEED, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.base import ModelSpec
from fedmi.models.classifiers import MLP
from fedmi.models.convolutional import ConvNet
from fedmi.models.decoders import ConvolutionalDecoder
from fedmi.protections.secagg.secagg_plus import SecAggPlus
from fedmi.runs.aims import targets_of
from fedmi.scenario.errors import ScenarioError
from fedmi.scenario.loading import load
from fedmi.training.generator_game import Game, Player
from fedmi.training.local import batches, fit
from tests.deployment_fixtures import same

INTRUDER, SERVER = Position.MALICIOUS_CLIENT, Position.CURIOUS_SERVER
SHAPE, CLASSES = (1, 12, 12), 4
SMALL = Game(latent=6, width=2, steps=3, batch_size=4, learning_rate=0.01)
MODEL = MLP(hidden=(16,), activation="tanh")


def pictures(seed: int) -> Tensor:
    """What each class looks like: bright blobs on black. [classes, 1, 12, 12]"""
    coarse = torch.rand(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = interpolate(coarse, SHAPE[1:], mode="bicubic", align_corners=True)
    return (3 * smooth - 1).clamp(0, 1)


def records(count: int, seed: int, first_id: int) -> Records:
    rng = np.random.default_rng(first_id)
    labels = np.arange(count) % CLASSES
    clean = pictures(seed).numpy()[labels]
    inputs = (clean + 0.1 * rng.standard_normal(clean.shape)).clip(0, 1)
    ids = np.arange(first_id, first_id + count)
    return Records(inputs.astype(np.float32), labels.astype(np.int64), labels.copy(), ids)


def task(tmp_path: Path, *, pattern: int = 1, model: ModelSpec = MODEL, **changes: Any) -> Job:
    private, held_out, public = (records(40, pattern, first) for first in (0, 10_000, 20_000))
    split = Split(private, held_out, public, CLASSES, identity_disjoint=False)
    recipe = Recipe(learning_rate=0.1, batch_size=5)
    made = Job(split=split, model=model, recipe=recipe, seed=Seed.root(3), directory=tmp_path)
    return replace(made, **changes)


def federated(rounds: int = 3, **options: Any) -> Federated:
    return Federated.model_validate(
        {
            "name": "f",
            "clients": CLASSES,
            "rounds": rounds,
            "partition": {"kind": "by_label", "labels_per_client": 1},
            "intruder": {"kind": "gan", "fakes": 6, "game": SMALL},
            **options,
        }
    )


def attack(**options: Any) -> GANClient:
    return GANClient.model_validate({"game": SMALL, "samples": 5, **options})


def case_of(work: Job, outcome: Outcome, asked: GANClient) -> Case:
    transcript = outcome.transcripts[INTRUDER]
    targets, _ = targets_of(asked, transcript, outcome, CLASSES, Seed.root(1))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE}),
        build=lambda: work.model.build(SHAPE, CLASSES, Seed.root(9)),
    )
    return Case(transcript, knowledge, targets, Seed.root(5))


def found_by(work: Job, outcome: Outcome, asked: GANClient) -> tuple[Reconstruction, ...]:
    return asked.reconstruct(case_of(work, outcome, asked))


def part(work: Job, made: Federated, client: int) -> tuple[Tensor, Tensor]:
    rows = made.plan(work).schedule.parts[client]
    own = work.split.private.take(rows)
    return torch.from_numpy(own.inputs), torch.from_numpy(own.labels)


def test_the_game_is_descent_on_the_cross_entropy_of_the_class() -> None:
    seed, label = Seed.root(8), 2
    player = Player(SMALL, SHAPE, label, seed)
    models = [MODEL.build(SHAPE, CLASSES, Seed.root(number)) for number in (0, 1)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    naive = ConvolutionalDecoder(6, SHAPE, 2)
    naive.load_state_dict(player.state())
    for round, model in enumerate(models):
        assert player.play(model, round)
        rng = seed.child("class", label, "round", round).torch()
        optimizer = torch.optim.Adam(naive.parameters(), lr=0.01, betas=(0.5, 0.999))
        naive.train()
        for _ in range(3):
            optimizer.zero_grad()
            images = naive(torch.randn(4, 6, generator=rng))
            (-model(images).log_softmax(1)[:, label]).mean().backward()
            optimizer.step()
    for name, tensor in player.state().items():
        torch.testing.assert_close(tensor, naive.state_dict()[name], rtol=1e-4, atol=1e-6)
    for model, state in zip(models, before, strict=True):
        assert same(model.state_dict(), state)


def test_playing_makes_the_model_see_the_class_in_it() -> None:
    model = MODEL.build(SHAPE, CLASSES, Seed.root(0))
    player = Player(SMALL.model_copy(update={"steps": 60}), SHAPE, 1, Seed.root(1))
    sure = []
    for round in range(2):
        with torch.no_grad():
            sure.append(model(player.draw(20)).softmax(1)[:, 1].mean())
        player.play(model, round)
    assert sure[1] > sure[0] + 0.1


def test_a_player_resumes_where_it_stopped() -> None:
    model = MODEL.build(SHAPE, CLASSES, Seed.root(0))
    first, second = (Player(SMALL, SHAPE, 1, Seed.root(1)) for _ in range(2))
    first.play(model, 1)
    second.resume(first.state())
    for player in (first, second):
        player.play(model, 2)
    assert torch.equal(first.draw(3, "x"), second.draw(3, "x"))
    assert not torch.equal(first.draw(3, "x"), first.draw(3, "y"))


def test_a_model_that_is_not_finite_leaves_the_generator_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES))
    nn.init.constant_(model[1].weight, torch.nan)  # type: ignore[arg-type]
    player = Player(SMALL, SHAPE, 1, Seed.root(1))
    assert not player.play(model, 1)
    assert player.draw(3).isfinite().all()


def test_the_client_trains_on_its_records_and_its_fakes(tmp_path: Path) -> None:
    """Its first update is that of plain training on both, the fakes under its own label."""
    made = federated(local_epochs=2)
    work = task(tmp_path, record=frozenset({1}))
    outcome = made.train(work)
    plan, seen = made.plan(work), outcome.transcripts[SERVER]
    (item,) = [o for o in seen.on(Channel.CLIENT_UPDATE, [1]) if o.clients == (0,)]
    inputs, labels = part(work, made, 0)
    own = int(labels[0])
    parts = [inputs]
    model = plan.build()
    for label in sorted({0, 1, 2, 3} - {own}):
        player = Player(SMALL, SHAPE, label, plan.intruder_seed)
        player.play(model, 1)
        parts.append(player.draw(6, "fakes", 1))
    mixed = torch.cat(parts)
    assert (item.clear["num_examples"], len(mixed)) == (10, 10 + 3 * 6)
    local = LocalWork(recipe=work.recipe, epochs=2)
    steps = batches(len(mixed), local, plan.schedule.client_seed(1, 0))
    fit(model, mixed, torch.full((len(mixed),), own), steps, local)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(item.payload[name], tensor, rtol=0, atol=1e-6)


def test_in_place_of_its_own_records(tmp_path: Path) -> None:
    intruder = {"kind": "gan", "fakes": 6, "game": SMALL, "own_records": False}
    outcome = federated(intruder=intruder).train(task(tmp_path, record=frozenset({1})))
    seen = outcome.transcripts[SERVER].on(Channel.CLIENT_UPDATE, [1])
    assert next(o for o in seen if o.clients == (0,)).clear["num_examples"] == 10
    base = outcome.transcripts[SERVER].global_model(1)
    honest = federated().train(task(tmp_path / "both", record=frozenset({1})))
    assert same(base, honest.transcripts[SERVER].global_model(1))
    assert not same(outcome.state, honest.state)


def test_watching_changes_nothing_and_poisoning_does(tmp_path: Path) -> None:
    honest = federated(intruder=None).train(task(tmp_path / "honest"))
    watching = federated(intruder={"kind": "gan", "fakes": 0}).train(task(tmp_path / "watching"))
    active = federated().train(task(tmp_path / "active"))
    assert same(honest.state, watching.state)
    assert not same(honest.state, active.state)
    assert federated(intruder={"kind": "gan", "fakes": 0}).alters == ""
    assert "false label" in federated().alters


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_the_same_whatever_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    one = federated().train(task(tmp_path / "one"))
    other = federated().train(task(tmp_path / "other", workers=workers))
    assert same(one.state, other.state)
    first, second = (found_by(task(tmp_path), o, attack()) for o in (one, other))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.samples is not None
        assert theirs.samples is not None
        assert torch.equal(ours.samples, theirs.samples)


def test_it_sees_the_model_of_every_round_and_itself(tmp_path: Path) -> None:
    work, made = task(tmp_path, record=frozenset({2})), federated(4)
    outcome = made.train(work)
    seen = outcome.transcripts[INTRUDER]
    assert [item.round for item in seen.on(Channel.GLOBAL_MODEL)] == [1, 2, 3, 4, 5]
    assert [item.round for item in seen.on(Channel.AGGREGATE)] == [2]
    assert same(seen.final_model(), outcome.state)
    _, labels = part(work, made, 0)
    assert seen.own[f"{OWN_LABEL}{int(labels[0])}"] == len(labels)
    assert seen.own[OWN_NUMBER] == 0
    assert INTRUDER not in federated(intruder=None).train(work).transcripts


def test_it_sees_only_the_rounds_in_which_it_is_asked(tmp_path: Path) -> None:
    made = federated(6, fraction=0.5)
    work = task(tmp_path)
    asked = [r for r in range(1, 7) if 0 in made.plan(work).schedule.participants(r)]
    assert 0 < len(asked) < 6
    seen = made.train(work).transcripts[INTRUDER]
    assert [item.round for item in seen.on(Channel.GLOBAL_MODEL)] == [*asked, 7]


def test_the_attack_draws_from_the_generator_that_the_client_used(tmp_path: Path) -> None:
    work, made = task(tmp_path), federated(2)
    outcome = made.train(work)
    seen = outcome.transcripts[INTRUDER]
    assert Seed.root(int(seen.own[OWN_SEED])) == made.plan(work).intruder_seed
    target = case_of(work, outcome, attack()).targets[0]
    player = Player(SMALL, SHAPE, target.label or 0, made.plan(work).intruder_seed)
    for item in seen.on(Channel.GLOBAL_MODEL):
        model = made.plan(work).build()
        model.load_state_dict(dict(item.payload))
        player.play(model, item.round)
    images = player.draw(5, "samples")
    (found, *_) = found_by(work, outcome, attack())
    assert found.samples is not None
    order = model(images).softmax(1)[:, target.label].argsort(descending=True)
    assert torch.equal(found.samples, images[order])
    assert (found.confidence.diff() <= 0).all()


def test_its_own_class_is_no_target_and_others_do_not_change_an_answer(tmp_path: Path) -> None:
    work, made = task(tmp_path), federated()
    outcome = made.train(work)
    own = int(part(work, made, 0)[1][0])
    case = case_of(work, outcome, attack())
    assert {target.label for target in case.targets} == {0, 1, 2, 3} - {own}
    every = attack().reconstruct(case)
    (alone,) = attack().reconstruct(replace(case, targets=case.targets[1:2]))
    assert alone.samples is not None
    assert every[1].samples is not None
    assert torch.equal(alone.samples, every[1].samples)
    (named,) = case_of(work, outcome, attack(victims=(own,))).targets
    assert named.label == own


def test_behind_secure_aggregation_it_plays_the_same_game(tmp_path: Path) -> None:
    clear = federated().train(task(tmp_path / "clear"))
    sealed = federated(protections=(SecAggPlus(),)).train(task(tmp_path / "sealed"))
    for name, tensor in clear.state.items():
        torch.testing.assert_close(tensor, sealed.state[name], rtol=0, atol=2e-3)
    rounds = [item.round for item in sealed.transcripts[INTRUDER].on(Channel.GLOBAL_MODEL)]
    assert rounds == [1, 2, 3, 4]


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    card = replace(small_card(), shape=(1, 6, 6))
    assert "8 pixels" in " ".join(GAN().problems(card, 4))
    assert GAN(client=3).problems(small_card(), 4) == []
    assert GAN(client=4).problems(small_card(), 4) == ["client = 4, but clients are 0 to 3"]
    (why,) = GAN(victims=(1, 10)).problems(small_card(), 4)
    assert why == "victims names class 10, but classes are 0 to 9"
    assert "nothing to train on" in GAN(fakes=0, own_records=False).problems(small_card(), 4)[0]
    with pytest.raises(DeploymentError, match="records of all 4 classes"):
        federated(partition={"kind": "iid"}).plan(task(tmp_path))
    own = int(part(task(tmp_path), federated(), 0)[1][0])
    with pytest.raises(DeploymentError, match="false label"):
        federated(intruder={"kind": "gan", "victims": (own,)}).plan(task(tmp_path))


def small_card() -> Any:
    from fedmi.data.digits import Digits

    return Digits().card()


def test_holding_the_victims_class_itself_is_flagged(tmp_path: Path) -> None:
    intruder = {"kind": "gan", "fakes": 0, "victims": (2,)}
    outcome = federated(1, partition={"kind": "iid"}, intruder=intruder).train(task(tmp_path))
    assert "intruder_holds_victim_class: 2" in outcome.flags
    assert not federated(1).train(task(tmp_path)).flags


def test_bad_cases(tmp_path: Path) -> None:
    work = task(tmp_path)
    case = case_of(work, federated().train(work), attack())
    with pytest.raises(ValueError, match=r"class 0 \.\. 3; target 'class 4' has label 4"):
        attack().reconstruct(replace(case, targets=(Target("class 4", label=4),)))
    with pytest.raises(LookupError, match="no global model"):
        attack().reconstruct(replace(case, transcript=Transcript(INTRUDER)))
    for wrong in ({"position": "client"}, {"channel": "aggregate"}):
        with pytest.raises(ValidationError):
            attack(**wrong)
    with pytest.raises(ValueError, match="8 pixels"):
        Player(SMALL, (1, 6, 6), 0, Seed.root(0))


SCENARIO = """
name = "gan"
seeds = [1]
[data]
kind = "digits"
[model]
kind = "softmax"
[evaluator]
kind = "mlp"
[[deployment]]
kind = "federated"
name = "f"
clients = 10
INTRUDER
[[attack]]
kind = "gan"
"""


@pytest.mark.parametrize(
    ("intruder", "why"),
    [
        ("", "does not see channel"),
        ('intruder = { kind = "gan", client = 10 }', "clients are 0 to 9"),
        ('intruder = { kind = "gan", victims = [10] }', "classes are 0 to 9"),
    ],
)
def test_a_scenario_without_its_intruder_is_refused(
    tmp_path: Path, intruder: str, why: str
) -> None:
    path = tmp_path / "gan.toml"
    path.write_text(SCENARIO.replace("INTRUDER", intruder))
    with pytest.raises(ScenarioError, match=why):
        load(path)
    path.write_text(SCENARIO.replace("INTRUDER", 'intruder = { kind = "gan" }'))
    load(path)


def likeness(found: tuple[Reconstruction, ...], pattern: int) -> float:
    """Mean Pearson correlation of the best sample of each class with the class's picture."""
    scores = []
    for answer in found:
        assert answer.samples is not None
        pair = torch.stack(
            [answer.samples[0].flatten(), pictures(pattern)[answer.target.label or 0].flatten()]
        )
        scores.append(torch.corrcoef(pair)[0, 1])
    return float(torch.stack(scores).mean())


@pytest.mark.slow
def test_the_generator_comes_nearer_to_the_class_than_prior_only(tmp_path: Path) -> None:
    """Prior-only: the same attack where the classes look otherwise."""
    game = Game(latent=20, width=8, steps=10, batch_size=16, learning_rate=3e-3)
    model = ConvNet(width=8, blocks=2, activation="tanh")
    scores = {}
    for name, pattern in (("real", 1), ("prior", 2)):
        intruder = {"kind": "gan", "fakes": 6, "game": game}
        work = task(tmp_path / name, pattern=pattern, model=model)
        outcome = federated(20, intruder=intruder, local_epochs=2).train(work)
        scores[name] = likeness(found_by(work, outcome, attack(game=game)), 1)
    assert scores["real"] > 0.4
    assert scores["real"] > scores["prior"] + 0.3
