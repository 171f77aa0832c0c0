"""A malicious client's generators, played against every global model it was sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.exposure.knowledge import Target
from fedmi.exposure.observation import OWN_SEED, Transcript
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.training.generator_game import Game, Player

Models = list[tuple[int, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Match:
    """Which class is gone for, how, and by whose dice."""

    target: Target
    game: Game
    seed: Seed


class GANClient(Attack):
    """Images of a class from a generator that learns, round after round, to pass for it.

    The discriminator is the global model: in each round from `start` on G takes `steps` steps of
    Adam on -log f_round(G(z))_class, and once more on the finished model. The intruder of the
    deployment (kind "gan") plays the same game with the same seed, and has the model learn what G
    makes as something else, so that G must come nearer to the class; with `fakes = 0` there it only
    watches, and G finds what the model takes for the class, less what the class looks like.

    Threat model: a malicious client that was sent the model of every round. It needs no record of
    the class, and no prior but that of the generator's layers. The game is the one that the
    intruder wrote down in its transcript; `game` is for a transcript that says nothing.

    Returns [samples, C, H, W] a class, the model's favourite first; confidence: its probability of
    the class. Each is the mean of `averaged` draws: the paper shows single ones, but what a class
    looks like is their mean. Flag "non_finite": a model on the way was no use, and G stayed as it
    was. LookupError where no model was seen that is played against, or the game is not known;
    ValueError for another `game` than the intruder's, a class that the model lacks, or images below
    8 pixels a side.
    """

    kind: Literal["gan"] = "gan"
    paper: ClassVar[str] = (
        "Hitaj, Ateniese, Perez-Cruz: Deep Models Under the GAN - Information Leakage from "
        "Collaborative Deep Learning, CCS 2017"
    )
    position: Literal[Position.MALICIOUS_CLIENT] = Position.MALICIOUS_CLIENT
    channel: Literal[Channel.GLOBAL_MODEL] = Channel.GLOBAL_MODEL
    victims: tuple[int, ...] = Field(
        default=(), description="classes it goes for; empty = all that it has no record of"
    )
    samples: int = Field(default=16, ge=1, le=10**4, description="images returned a class")
    averaged: int = Field(default=1, ge=1, le=1024, description="draws whose mean an image is")
    game: Game | None = Field(
        default=None, description="how the generators play; unset = as the intruder says"
    )

    channels: ClassVar = frozenset({Channel.GLOBAL_MODEL})
    needs: ClassVar = frozenset({Fact.ARCHITECTURE})
    uses: ClassVar = frozenset({Fact.PUBLIC_DATA})
    """For the blind guess alone: the mean of public records is near to any class's."""
    exploits: ClassVar = frozenset({"gan"})
    replays: ClassVar = ("game",)
    reads_schemas: ClassVar = frozenset({"pixels"})

    def own_targets(self, transcript: Transcript) -> tuple[Target, ...] | None:
        return tuple(Target(f"class {label}", label=label) for label in self.victims) or None

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        if case.knowledge.build is None:
            raise LookupError('gan needs the fact "architecture"')
        model = case.knowledge.build()
        own = case.transcript.own
        game = self._played(own)
        models = _models(case.transcript, game)
        seed = Seed.root(int(own[OWN_SEED])) if OWN_SEED in own else case.seed
        return tuple(
            self._against(model, models, Match(target, game, seed), case) for target in case.targets
        )

    def _played(self, own: Mapping[str, float]) -> Game:
        """The intruder's game."""
        told = Game.told_in(own)
        game = told or self.game
        if game is None:
            raise LookupError("gan is not told the intruder's game; name it: game = { ... }")
        if self.game not in (None, game):
            raise ValueError(f"gan plays game {self.game}, but the intruder played {game}")
        return game

    def _against(
        self, model: nn.Module, models: Models, match: Match, case: Case
    ) -> Reconstruction:
        target = match.target
        label = target.label
        if label is None or not 0 <= label < case.knowledge.classes:
            raise ValueError(
                f"gan goes for a class 0 .. {case.knowledge.classes - 1}; target '{target.id}' "
                f"has label {label}"
            )
        shape = case.knowledge.input_shape
        player = Player(match.game, shape, label, match.seed)
        played = True
        for round, state in models:
            model.load_state_dict(dict(state))
            played &= player.play(model, round)
        drawn = player.draw(self.samples * self.averaged, "samples")
        images = drawn.view(self.samples, self.averaged, *shape).mean(1)
        with torch.no_grad():
            sure = model(images).softmax(1)[:, label]
        order = sure.argsort(descending=True, stable=True)
        case.progress((case.targets.index(target) + 1) / len(case.targets))
        return Reconstruction(
            target=target,
            samples=images[order],
            labels=torch.full((self.samples,), label),
            confidence=sure[order],
            flags=frozenset() if played else frozenset({"non_finite"}),
        )


def _models(transcript: Transcript, game: Game) -> Models:
    """The models that the game is played against, in order."""
    seen = [(item.round, item.payload) for item in transcript.on(Channel.GLOBAL_MODEL)]
    if not seen:
        raise LookupError(f"{transcript.position} saw no global model")
    played = [item for item in seen if item[0] >= game.start]
    if not played:
        raise LookupError(
            f"gan starts in round {game.start}, but the last model {transcript.position} saw is of "
            f"round {seen[-1][0]}"
        )
    return played
