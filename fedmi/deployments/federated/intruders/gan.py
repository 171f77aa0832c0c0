"""A client that trains a generator against the global model, and has the model learn its images."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmi.data.dataset import Card
from fedmi.data.records import Ints
from fedmi.deployments.federated.intruders.base import Intruder, Ploy, Visit
from fedmi.training.generator_game import SMALLEST, Game, Player


class GAN(Intruder):
    """Generated images of the victims' classes, handed in under a class of its own.

    In each round it is asked, from `game.start` on, a generator a victim class plays `game` against
    the global model; `fakes` of its images join the client's records under the label that most of
    them have. Whoever holds the victim class then has to show what tells it from these images. The
    client owns up to no more records than it really has, so that neither its weight nor SecAgg+
    gives it away.
    `fakes = 0`: it follows the protocol and only watches.

    Threat model: a malicious client that holds no record of the victim class. The attack of the
    same kind reads out the generators; `told` is how it knows the game. ValueError for images
    below 8 pixels a side.
    """

    kind: Literal["gan"] = "gan"
    paper: ClassVar[str] = (
        "Hitaj, Ateniese, Perez-Cruz: Deep Models Under the GAN - Information Leakage from "
        "Collaborative Deep Learning, CCS 2017"
    )
    victims: tuple[int, ...] = Field(
        default=(), description="classes it goes for; empty = all that it has no record of"
    )
    fakes: int = Field(
        default=50, ge=0, le=10**5, description="generated records a victim class and round"
    )
    own_records: bool = Field(default=True, description="whether it trains on its own records too")
    game: Game = Field(default=Game(), description="how its generators play")

    @property
    def alters(self) -> str:
        return "a client adds generated records under a false label" if self.fakes else ""

    @property
    def told(self) -> dict[str, float]:
        """How it plays, in numbers, for its own transcript."""
        return self.game.told()

    def problems(self, card: Card, clients: int) -> list[str]:
        found = super().problems(card, clients)
        if card.schema.kind != "pixels" or min(card.shape[1:]) < SMALLEST:
            found.append(
                f"generates images of at least {SMALLEST} pixels a side, but the records are "
                f"{card.schema.kind} of shape {tuple(card.shape)}"
            )
        missing = [label for label in self.victims if not 0 <= label < card.classes]
        if missing:
            found.append(
                f"victims names class {missing[0]}, but classes are 0 to {card.classes - 1}"
            )
        if not self.fakes and not self.own_records:
            found.append("fakes = 0 without own_records leaves nothing to train on")
        return found

    def misplaced(self, labels: Ints, classes: int) -> str:
        fake = disguise(labels)
        if fake in self.victims:
            return (
                f"victims names class {fake}, which most records of client {self.client} have and "
                "which is its false label; name another class or another client"
            )
        if not self.hunted(labels, classes):
            return (
                f"client {self.client} holds records of all {classes} classes, so there is none to "
                'go for; deal classes apart (partition = { kind = "by_label" }) or name victims'
            )
        return ""

    def flags(self, labels: Ints, classes: int) -> frozenset[str]:
        held = sorted(set(self.hunted(labels, classes)) & set(labels.tolist()))
        return frozenset({f"intruder_holds_victim_class: {held[0]}"} if held else ())

    def hunted(self, labels: Ints, classes: int) -> tuple[int, ...]:
        """The victim classes of a client with records of these labels."""
        return self.victims or tuple(sorted(set(range(classes)) - set(labels.tolist())))

    def plot(self, visit: Visit) -> Ploy:
        if not self.fakes or visit.round < self.game.start:
            return Ploy(visit.inputs, visit.labels, visit.memory)
        held = visit.labels.numpy()
        false = torch.full((self.fakes,), disguise(held), dtype=visit.labels.dtype)
        parts = [(visit.inputs, visit.labels)] if self.own_records else []
        memory: dict[str, Tensor] = {}
        colours, height, width = visit.inputs.shape[1:]
        for label in self.hunted(held, visit.classes):
            player = Player(self.game, (colours, height, width), label, visit.seed)
            if before := _part(visit.memory, label):
                player.resume(before)
            player.play(visit.model, visit.round)
            parts.append((player.draw(self.fakes, "fakes", visit.round), false))
            memory |= {f"{label}/{name}": value for name, value in player.state().items()}
        inputs, labels = (torch.cat(side) for side in zip(*parts, strict=True))
        return Ploy(inputs, labels, memory)


def disguise(labels: Ints) -> int:
    """The label that most of the client's own records have; the lowest of equals."""
    return int(np.bincount(labels).argmax())


def _part(memory: Mapping[str, Tensor], label: int) -> dict[str, Tensor]:
    start = f"{label}/"
    return {n.removeprefix(start): t for n, t in memory.items() if n.startswith(start)}
