"""Which game a malicious client's generators play, from which round, and what is made of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedmi.attacks.base import Case
from fedmi.attacks.model.gan_client import GANClient
from fedmi.deployments.federated.intruders.gan import GAN
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import OWN_NUMBER, OWN_SEED, Observation, Transcript
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.training.generator_game import Game, Player
from tests.deployment_fixtures import same
from tests.test_gan_client import (
    MODEL,
    SERVER,
    SHAPE,
    SMALL,
    attack,
    case_of,
    federated,
    found_by,
    likeness,
    task,
)

UNTOLD = GANClient(samples=5)


def telling(case: Case, game: Game | None) -> Case:
    """The same case with an intruder that wrote down, or did not write down, how it plays."""
    own = {n: v for n, v in case.transcript.own.items() if not n.startswith("own/game/")}
    own |= game.told() if game else {}
    seen = tuple(
        replace(item, clear=own if OWN_NUMBER in item.clear else item.clear)
        for item in case.transcript.observations
    )
    return replace(case, transcript=replace(case.transcript, observations=seen))


def played(tmp_path: Path, game: Game = SMALL, rounds: int = 2) -> Case:
    work = task(tmp_path)
    intruder = {"kind": "gan", "fakes": 6, "game": game}
    return case_of(work, federated(rounds, intruder=intruder).train(work), attack())


def test_a_game_can_be_told_in_numbers() -> None:
    game = Game(latent=7, width=3, steps=2, batch_size=5, learning_rate=0.013, start=4)
    told = game.told()
    assert all(isinstance(value, float) and name.startswith("own/") for name, value in told.items())
    assert Game.told_in({**told, "own/client": 3.0, "own/records/1": 9.0}) == game
    assert Game.told_in({"own/client": 3.0}) is None
    assert GAN(game=game).told == told
    with pytest.raises(ValidationError):
        Game.told_in({**told, "own/game/steps": 0.0})


def test_the_attack_plays_what_the_intruder_played(tmp_path: Path) -> None:
    case = played(tmp_path)
    expected = attack(game=SMALL).reconstruct(telling(case, None))
    for theirs, ours in zip(expected, UNTOLD.reconstruct(telling(case, SMALL)), strict=True):
        assert ours.samples is not None
        assert theirs.samples is not None
        assert torch.equal(ours.samples, theirs.samples)


def test_another_game_than_the_intruders_is_refused(tmp_path: Path) -> None:
    case = telling(played(tmp_path), SMALL)
    other = SMALL.model_copy(update={"steps": 4})
    with pytest.raises(ValueError, match=r"steps=4.*but the intruder played.*steps=3"):
        attack(game=other).reconstruct(case)
    attack(game=SMALL).reconstruct(case)
    with pytest.raises(LookupError, match="name it: game ="):
        UNTOLD.reconstruct(telling(case, None))


def test_it_behaves_until_the_game_starts(tmp_path: Path) -> None:
    late = SMALL.model_copy(update={"start": 2})
    work = task(tmp_path / "late", record=frozenset({1, 2}))
    intruder = {"kind": "gan", "fakes": 6, "game": late}
    outcome = federated(3, intruder=intruder).train(work)
    honest = federated(3, intruder=None).train(
        task(tmp_path / "honest", record=frozenset({1, 2, 3}))
    )
    ours, theirs = (o.transcripts[SERVER] for o in (outcome, honest))
    assert same(ours.global_model(2), theirs.global_model(2))
    assert not same(outcome.state, honest.state)


def test_the_attack_starts_where_the_intruder_does(tmp_path: Path) -> None:
    late = SMALL.model_copy(update={"start": 2})
    work = task(tmp_path)
    made = federated(3, intruder={"kind": "gan", "fakes": 6, "game": late})
    outcome = made.train(work)
    asked = attack(game=late)
    target = case_of(work, outcome, asked).targets[0]
    player = Player(late, SHAPE, target.label or 0, made.plan(work).intruder_seed)
    model = made.plan(work).build()
    for item in outcome.transcripts[Position.MALICIOUS_CLIENT].on(Channel.GLOBAL_MODEL):
        if item.round >= 2:
            model.load_state_dict(dict(item.payload))
            player.play(model, item.round)
    (found, *_) = found_by(work, outcome, asked)
    assert found.samples is not None
    pairs = torch.cdist(found.samples.flatten(1), player.draw(5, "samples").flatten(1))
    assert (pairs.min(1).values == 0).all()


def test_a_start_after_the_last_model_is_no_silent_failure(tmp_path: Path) -> None:
    case = telling(played(tmp_path), None)
    late = SMALL.model_copy(update={"start": 9})
    with pytest.raises(LookupError, match=r"starts in round 9.*is of round 3"):
        attack(game=late).reconstruct(case)


def test_an_image_is_the_mean_of_so_many_draws(tmp_path: Path) -> None:
    case = telling(played(tmp_path), SMALL)
    many = attack(samples=12).reconstruct(case)[0]
    few = attack(samples=3, averaged=4).reconstruct(case)[0]
    one = attack(samples=1, averaged=12).reconstruct(case)[0]
    assert many.samples is not None
    assert few.samples is not None
    assert one.samples is not None
    assert few.samples.shape == (3, *SHAPE)
    torch.testing.assert_close(few.samples.mean(0), many.samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.samples[0], many.samples.mean(0), rtol=1e-5, atol=1e-6)


def test_without_a_word_from_the_intruder_the_cases_seed_is_used() -> None:
    """Nothing of the intruder is known: the generator is the attack's own, and so is its seed."""
    model = MODEL.build(SHAPE, 4, Seed.root(0))
    position, channel = Position.MALICIOUS_CLIENT, Channel.GLOBAL_MODEL
    seen = Observation(position, channel, 1, (), model.state_dict(), 0)
    transcript = Transcript(position, (seen,))
    assert OWN_SEED not in transcript.own
    player = Player(SMALL, SHAPE, 1, Seed.root(5))
    player.play(model, 1)
    knowledge = Knowledge(SHAPE, 4, build=lambda: MODEL.build(SHAPE, 4, Seed.root(9)))
    case = Case(transcript, knowledge, (Target("class 1", label=1),), Seed.root(5))
    (found,) = attack(samples=1).reconstruct(case)
    assert found.samples is not None
    assert torch.equal(found.samples, player.draw(1, "samples"))


@pytest.mark.slow
def test_playing_gets_more_than_watching(tmp_path: Path) -> None:
    """The paper's claim: what the model has to unlearn brings the generator nearer to the class."""
    game = Game(latent=20, width=8, steps=10, batch_size=16, learning_rate=3e-3, start=5)
    scores = {}
    for name, fakes in (("plays", 6), ("watches", 0)):
        work = task(tmp_path / name)
        intruder = {"kind": "gan", "fakes": fakes, "game": game}
        outcome = federated(30, intruder=intruder, local_epochs=2).train(work)
        asked = attack(game=game, samples=2, averaged=16)
        scores[name] = likeness(found_by(work, outcome, asked), 1)
    assert scores["plays"] > scores["watches"] + 0.1, scores
