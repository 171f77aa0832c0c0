"""The judge: an evaluator trained on the private records, and a gallery of everyone's features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from fedmi.data.records import Records, Split
from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec, Shape, features
from fedmi.training.local import evaluate

STEPS = 200
BATCH = 32
LEARNING_RATE = 3e-3
SMALLEST_SHIFTED = 16
"""Images with a shorter side are not shifted: two pixels would be a large part of them."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Who is on this picture, by a model that the adversary never had.

    evaluator: module in eval mode, [n, C, H, W] in [0, 1] -> logits [n, classes].
    centroids: [classes, d], mean evaluator feature of each private class.
    gallery: [g, d], mean evaluator feature of each identity, private and public together.
    identities: [g], the identity of each gallery row, ascending.
    accuracy: of the evaluator on held-out records, in [0, 1].
    """

    evaluator: nn.Module
    centroids: Tensor
    gallery: Tensor
    identities: Tensor
    accuracy: float

    @property
    def classes(self) -> int:
        return len(self.centroids)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """[n, C, H, W] -> [n, classes]."""
        return torch.cat([self.evaluator(part) for part in torch.split(inputs, 256)])

    def features(self, inputs: Tensor) -> Tensor:
        """[n, C, H, W] -> [n, d], the input of the evaluator's last linear layer."""
        return _features(self.evaluator, inputs)

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors, for a safetensors file; `restore` is the inverse."""
        weights = {
            f"evaluator.{name}": value for name, value in self.evaluator.state_dict().items()
        }
        return weights | {
            "centroids": self.centroids,
            "gallery": self.gallery,
            "identities": self.identities,
            "accuracy": torch.tensor(self.accuracy, dtype=torch.float64),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Tensor], spec: ModelSpec, shape: Shape) -> "Judge":
        """The judge whose `state()` this is; RuntimeError if `spec` is not its architecture."""
        evaluator = spec.build(shape, len(state["centroids"]), Seed.root(0))
        prefix = "evaluator."
        names = [name for name in state if name.startswith(prefix)]
        evaluator.load_state_dict({name.removeprefix(prefix): state[name] for name in names})
        return cls(
            evaluator=evaluator.eval(),
            centroids=state["centroids"],
            gallery=state["gallery"],
            identities=state["identities"],
            accuracy=float(state["accuracy"]),
        )


def train_judge(
    split: Split,
    spec: ModelSpec,
    seed: Seed,
    progress: Callable[[float], None] = lambda share: None,
) -> Judge:
    """Train an evaluator of architecture `spec` on the private records, and fill its gallery.

    Adam with a one-cycle rate over random shifts, brightness, contrast and noise; over sentences
    as they are. The held-out records only measure it. Raises ValueError when a private class has
    no record.
    """
    private = split.private
    inputs, labels = torch.from_numpy(private.inputs), torch.from_numpy(private.labels)
    missing = sorted(set(range(split.classes)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"the judge needs private records of every class; none of {missing}")
    evaluator = spec.build(private.shape, split.classes, seed.child("weights"))
    augment = _as_is if private.schema.kind == "text" else _augment
    _train(evaluator, inputs, labels, augment, seed.child("training").torch(), progress)
    evaluator.eval()
    gallery, identities = _gallery(evaluator, private, split.public)
    held_out = torch.from_numpy(split.held_out.inputs), torch.from_numpy(split.held_out.labels)
    return Judge(
        evaluator=evaluator,
        centroids=_means(_features(evaluator, inputs), labels)[0],
        gallery=gallery,
        identities=identities,
        accuracy=evaluate(evaluator, *held_out)[0],
    )


def _train(
    evaluator: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> None:
    optimizer = torch.optim.Adam(evaluator.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    size, rows = min(BATCH, len(labels)), torch.empty(0, dtype=torch.int64)
    evaluator.train()
    for step in range(STEPS):
        if len(rows) < size:
            rows = torch.randperm(len(labels), generator=generator)
        index, rows = rows[:size], rows[size:]
        loss = cross_entropy(
            evaluator(augment(inputs[index], generator)), labels[index], label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress((step + 1) / STEPS)


def _as_is(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs


def _augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 2 pixels, its contrast and brightness changed, noise added.

    Tabular and tiny inputs only get the noise.
    """
    if min(inputs.shape[2:]) >= SMALLEST_SHIFTED:
        inputs = _shift(inputs, 2, generator)
        soft = avg_pool2d(inputs, 3, stride=1, padding=1, count_include_pad=False)
        softened = torch.rand(len(inputs), 1, 1, 1, generator=generator) < 0.3
        inputs = torch.where(softened, soft, inputs)
        contrast = torch.rand(len(inputs), 1, 1, 1, generator=generator) * 0.4 + 0.8
        brightness = torch.rand(len(inputs), 1, 1, 1, generator=generator) * 0.2 - 0.1
        inputs = inputs * contrast + brightness
    return inputs + 0.03 * torch.randn(inputs.shape, generator=generator)


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own whole number of pixels; the border is repeated."""
    height, width = images.shape[2:]
    padded = pad(images, (most,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator)
    rows = corners[:, :1] + torch.arange(height)
    columns = corners[:, 1:] + torch.arange(width)
    image = torch.arange(len(images))[:, None, None]
    return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@torch.no_grad()
def _features(evaluator: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([features(evaluator, part) for part in torch.split(inputs, 256)])


def _means(rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(mean row of each group [g, d], the groups [g] ascending)."""
    names, index = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(len(names), rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, index, rows.double())
    return (sums / index.bincount()[:, None]).float(), names


def _gallery(evaluator: nn.Module, private: Records, public: Records) -> tuple[Tensor, Tensor]:
    """Centroids by identity; an identity that is private counts with its private records only."""
    known = set(private.identities.tolist())
    rest = [row for row, who in enumerate(public.identities.tolist()) if who not in known]
    inputs = [torch.from_numpy(private.inputs), torch.from_numpy(public.inputs)[rest]]
    groups = [torch.from_numpy(private.identities), torch.from_numpy(public.identities)[rest]]
    return _means(_features(evaluator, torch.cat(inputs)), torch.cat(groups))
