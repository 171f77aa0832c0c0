"""What images look like, learned from public ones: a generator, trained once a process."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import mse_loss, pad

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError
from fedmi.exposure.seeding import Seed
from fedmi.models.generators import ResidualGenerator

FEWEST = 8
"""Public images below which nothing is learned from them."""
ENOUGH = 4000
"""Images that tell the principal components; of more, so many are taken."""
MARGIN = 0.02
"""Logits are those of pixels moved so far away from 0 and 1."""
NEGLIGIBLE = 1e-6
"""Components that vary less than this share of the first one are rounding, not data."""
KEPT = 8
"""Priors a process remembers."""

Progress = Callable[[float], None]


class Training(BaseModel):
    """How the generator is fitted to the public images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent: int = Field(default=128, ge=1, le=4096, description="length of z")
    width: int = Field(default=16, ge=1, le=512, description="maps of the convolutional part")
    steps: int = Field(default=600, ge=0, le=10**6, description="of AdamW; 0: the linear part only")
    batch_size: int = Field(default=32, ge=1, description="images a step")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="highest; half a cosine")
    weight_decay: float = Field(default=1e-2, ge=0, le=10, description="AdamW's")
    noise: float = Field(default=0.1, ge=0, le=10, description="standard deviation added to z")
    images: int = Field(
        default=2000, ge=1, description="moved and mirrored copies are added up to so many"
    )
    shift: int = Field(default=1, ge=0, le=8, description="most pixels that a copy is moved")
    mirror: bool = Field(default=True, description="mirror half of the copies left to right")
    held_out: float = Field(
        default=0.1, ge=0, le=0.5, description="share of the public images that only measure it"
    )


@dataclass(frozen=True)
class Card:
    """What a generator was made of, and how well it fits images it has not seen.

    linear_psnr, psnr: of `held_out` images encoded and decoded, in dB, without and with the
    convolutional part; nan where none were held out.
    """

    records: int
    held_out: int
    latent: int
    steps: int
    linear_psnr: float
    psnr: float

    def __str__(self) -> str:
        return (
            f"{self.records} public images, latent {self.latent}, {self.steps} steps; "
            f"{self.psnr:.1f} dB on {self.held_out} held out (linear {self.linear_psnr:.1f})"
        )


@dataclass(frozen=True, eq=False)
class Prior:
    """A generator in eval mode whose weights ask for no slope, and its card."""

    generator: ResidualGenerator
    card: Card


_FITTED: OrderedDict[tuple[str, Training, Seed], Prior] = OrderedDict()


def prior_of(case: Case, options: Training, progress: Progress = lambda share: None) -> Prior:
    """The generator fitted to the case's public images; the same for the same images and seed.

    Raises AttackError as `public_images` does.
    """
    images = public_images(case)
    key = (_digest(images), options, case.seed.child("prior"))
    if key not in _FITTED:
        _FITTED[key] = fit(images, options, key[2], progress)
        while len(_FITTED) > KEPT:
            _FITTED.popitem(last=False)
    _FITTED.move_to_end(key)
    return _FITTED[key]


def public_images(case: Case) -> Tensor:
    """The public images [n, C, H, W]; AttackError where they are not fit to learn from."""
    if case.knowledge.public is None:
        raise AttackError('no public images to learn from: grant the fact "public_data"')
    images = case.knowledge.public[0].float()
    if len(images) < FEWEST:
        raise AttackError(f"{len(images)} public images; a generator wants at least {FEWEST}")
    if tuple(images.shape[1:]) != tuple(case.knowledge.input_shape):
        raise AttackError(
            f"public records have shape {tuple(images.shape[1:])}, private ones "
            f"{tuple(case.knowledge.input_shape)}"
        )
    if min(images.shape[2:]) < 8:
        raise AttackError(
            f"a generator makes images of at least 8 x 8, not {tuple(images.shape[1:])}; use "
            "inverting_gradients"
        )
    return images


def fit(
    images: Tensor, options: Training, seed: Seed, progress: Progress = lambda share: None
) -> Prior:
    """A generator of images like these, [n, C, H, W] in [0, 1].

    z is the whitened principal component scores of the logits of the images and of moved and
    mirrored copies of them; the convolutional part is trained to make the image from its z:
    of a few hundred images that gives a better generator, in seconds, than an encoder or latent
    vectors that are learned along with it.
    """
    images = images[torch.randperm(len(images), generator=seed.child("rows").torch())]
    kept = min(int(options.held_out * len(images)), len(images) - 1)
    unseen, shown = images[:kept], images[kept:]
    varied = _varied(shown, options, seed.child("copies").torch())
    generator = _linear(varied, options, seed.child("weights"))
    before = _psnr(generator, unseen)
    _train(generator, varied, options, seed.child("batches").torch(), progress)
    generator.eval().requires_grad_(False)
    card = Card(len(shown), kept, generator.latent, options.steps, before, _psnr(generator, unseen))
    return Prior(generator, card)


def encode(generator: ResidualGenerator, images: Tensor) -> Tensor:
    """z [n, latent] of images [n, C, H, W] by the linear part."""
    found: Tensor = (_logits(images) - generator.mean) @ torch.linalg.pinv(generator.basis)
    return found


def _digest(images: Tensor) -> str:
    whole = hashlib.sha256(str(tuple(images.shape)).encode())
    whole.update(images.contiguous().numpy().tobytes())
    return whole.hexdigest()


def _logits(images: Tensor) -> Tensor:
    return torch.logit(images.flatten(1) * (1 - 2 * MARGIN) + MARGIN)


def _varied(images: Tensor, options: Training, rng: torch.Generator) -> Tensor:
    """The images, and moved and mirrored copies of them up to `options.images`."""
    copies = max(0, options.images // len(images) - 1)
    return torch.cat([images, *(_moved(images, options, rng) for _ in range(copies))])


def _moved(images: Tensor, options: Training, rng: torch.Generator) -> Tensor:
    if options.mirror:
        chosen = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
        images = torch.where(chosen, images.flip(3), images)
    height, width = images.shape[2:]
    bordered = pad(images, (options.shift,) * 4, mode="replicate")
    corners = torch.randint(2 * options.shift + 1, (len(images), 2), generator=rng).tolist()
    pairs = zip(bordered, corners, strict=True)
    return torch.stack([i[:, row : row + height, at : at + width] for i, (row, at) in pairs])


def _linear(images: Tensor, options: Training, seed: Seed) -> ResidualGenerator:
    """The leading principal components of the logits, each times its standard deviation.

    Where the images have fewer of them, zeros take the others' places.
    """
    rows = _logits(images[:ENOUGH])
    mean = rows.mean(0)
    _, spread, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    most = min(options.latent, int((spread > NEGLIGIBLE * spread[0].clamp_min(1e-12)).sum()))
    basis = rows.new_zeros(options.latent, rows.shape[1])
    basis[:most] = spread[:most, None] / max(1, len(rows) - 1) ** 0.5 * directions[:most]
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.value)
        return ResidualGenerator(mean, basis, (channels, height, width), options.width)


@torch.enable_grad()
def _train(
    generator: ResidualGenerator,
    images: Tensor,
    options: Training,
    rng: torch.Generator,
    progress: Progress,
) -> None:
    """Squared error of the images made from their z, in place; AdamW along half a cosine."""
    codes = encode(generator, images)
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    for step in range(options.steps):
        rate = options.learning_rate * min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * step / options.steps)) / 2
        rows = torch.randint(len(images), (options.batch_size,), generator=rng)
        blur = options.noise * torch.randn(len(rows), generator.latent, generator=rng)
        loss = mse_loss(generator(codes[rows] + blur), images[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress((step + 1) / options.steps)


@torch.no_grad()
def _psnr(generator: ResidualGenerator, images: Tensor) -> float:
    if not len(images):
        return float("nan")
    errors = (generator(encode(generator, images)) - images).square().flatten(1).mean(1)
    return float((-10 * errors.clamp_min(1e-12).log10()).mean())
