"""The game of a generator against a model that others train: it learns to look like one class."""

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmi.exposure.seeding import Seed
from fedmi.models.base import Shape
from fedmi.models.decoders import ConvolutionalDecoder

SMALLEST = 8
"""Pixels a side that the generator needs."""
TOLD = "own/game/"
"""Before the names of a game's options, where a client writes down how it plays."""


class Game(BaseModel):
    """How the generator G plays against each model f it meets: Adam on -log softmax f(G(z))_label.

    z ~ N(0, I). Adam starts anew with each model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent: int = Field(default=100, ge=1, le=4096, description="numbers in z")
    width: int = Field(default=16, ge=1, le=512, description="feature maps before the last layer")
    steps: int = Field(default=20, ge=1, le=10**5, description="steps against each model")
    batch_size: int = Field(default=32, ge=2, le=4096, description="generated images a step")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's")
    start: int = Field(default=1, ge=1, description="first round played; later = a better model")

    def told(self) -> dict[str, float]:
        """Its options as numbers, by name; `told_in` is the inverse."""
        return {f"{TOLD}{name}": float(value) for name, value in self.model_dump().items()}

    @classmethod
    def told_in(cls, own: Mapping[str, float]) -> "Game | None":
        """The game that a client wrote down, if it did."""
        found = {n.removeprefix(TOLD): value for n, value in own.items() if n.startswith(TOLD)}
        return cls.model_validate(found) if found else None


class Player:
    """The generator of one class, and all that it draws; the same seed plays the same game.

    shape: (C, H, W) of the images, which are in [0, 1]. ValueError for images too small.
    """

    def __init__(self, game: Game, shape: Shape, label: int, seed: Seed) -> None:
        if min(shape[1:]) < SMALLEST:
            raise ValueError(
                f"the generator needs images [C, H, W] of at least {SMALLEST} pixels a side, but "
                f"the records have shape {tuple(shape)}"
            )
        self.label = label
        self._game = game
        self._seed = seed.child("class", label)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed.child("weights").value)
            self._generator = ConvolutionalDecoder(game.latent, shape, game.width)

    def state(self) -> dict[str, Tensor]:
        """What there is to remember between rounds."""
        return dict(self._generator.state_dict())

    def resume(self, state: Mapping[str, Tensor]) -> None:
        self._generator.load_state_dict(dict(state))

    def play(self, model: nn.Module, round: int) -> bool:
        """Train the generator against the model of a round, which stays as it is (in eval mode).

        False, with the generator as before the step, as soon as the loss is not finite.
        """
        model.eval()
        rng = self._seed.child("round", round).torch()
        weights = list(self._generator.parameters())
        optimizer = torch.optim.Adam(weights, lr=self._game.learning_rate, betas=(0.5, 0.999))
        wanted = torch.full((self._game.batch_size,), self.label)
        self._generator.train()
        for _ in range(self._game.steps):
            latent = torch.randn(self._game.batch_size, self._game.latent, generator=rng)
            loss = cross_entropy(model(self._generator(latent)), wanted)
            if not torch.isfinite(loss):
                return False
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            optimizer.step()
        return True

    @torch.no_grad()
    def draw(self, count: int, *names: object) -> Tensor:
        """[count, C, H, W]; `names` tell one draw from another."""
        rng = self._seed.child("draw", *names).torch()
        self._generator.eval()
        images: Tensor = self._generator(torch.randn(count, self._game.latent, generator=rng))
        return images
