"""A malicious client's generators, played against every global model it was sent."""

from collections.abc import Mapping
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


class GANClient(Attack):
    """Images of a class from a generator that learns, round after round, to pass for it.

    The discriminator is the global model: in each round G takes `game.steps` steps of Adam on
    -log f_round(G(z))_class, and once more on the finished model. The intruder of the deployment
    (kind "gan") plays the same game with the same seed, and has the model learn what G makes as
    something else, so that G must come nearer to the class; with `fakes = 0` there it only
    watches, and G mostly finds what the model takes for the class, not what the class looks like.

    Threat model: a malicious client that was sent the model of every round. It needs no record of
    the class, and no prior but that of the generator's layers. `game` must be the intruder's, or
    the model learned to tell another generator's images.

    Returns [samples, C, H, W] a class, the model's favourite first; confidence: its probability of
    the class. Flag "non_finite": a model on the way was no use, and G stayed as it was. LookupError
    where no model was seen, ValueError for a class that the model lacks or images below 8 pixels a
    side.
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
    samples: int = Field(default=16, ge=1, le=10**4, description="images drawn a class")
    game: Game = Field(default=Game(), description="how the generators play")

    channels: ClassVar = frozenset({Channel.GLOBAL_MODEL})
    needs: ClassVar = frozenset({Fact.ARCHITECTURE})
    uses: ClassVar = frozenset({Fact.PUBLIC_DATA})
    """For the blind guess alone: the mean of public records is near to any class's."""
    exploits: ClassVar = frozenset({"gan"})
    reads_schemas: ClassVar = frozenset({"pixels"})

    def own_targets(self, transcript: Transcript) -> tuple[Target, ...] | None:
        return tuple(Target(f"class {label}", label=label) for label in self.victims) or None

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        if case.knowledge.build is None:
            raise LookupError('gan needs the fact "architecture"')
        model = case.knowledge.build()
        models = [(seen.round, seen.payload) for seen in case.transcript.on(Channel.GLOBAL_MODEL)]
        if not models:
            raise LookupError(f"{case.transcript.position} saw no global model")
        own = case.transcript.own.get(OWN_SEED)
        seed = case.seed if own is None else Seed.root(int(own))
        return tuple(self._against(model, models, target, seed, case) for target in case.targets)

    def _against(
        self, model: nn.Module, models: Models, target: Target, seed: Seed, case: Case
    ) -> Reconstruction:
        label = target.label
        if label is None or not 0 <= label < case.knowledge.classes:
            raise ValueError(
                f"gan goes for a class 0 .. {case.knowledge.classes - 1}; target '{target.id}' "
                f"has label {label}"
            )
        player = Player(self.game, case.knowledge.input_shape, label, seed)
        played = True
        for round, state in models:
            model.load_state_dict(dict(state))
            played &= player.play(model, round)
        images = player.draw(self.samples, "samples")
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
