"""Several epochs in unknown order: every epoch gets unknowns of its own for all records."""

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import conv2d

from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.network import Network
from fedmi.attacks.engine.penalties import Given, Trial
from fedmi.attacks.engine.plan import Plan, Steps
from fedmi.exposure.seeding import Seed

Summary = Literal["mean", "max", "conv_mean", "conv_max"]
Epochs = tuple[tuple[int, ...], ...]
"""epoch -> its unknowns, one for each record that it used."""

FILTERS = 96
"""3x3 filters of the random convolution that images are summarised by."""
OTHER_LABEL = 1e6
"""What it costs to take two images of different labels for the same record."""


@dataclass(frozen=True)
class Unrolled(Plan):
    """A plan no two epochs of which share rows; party -> epoch -> rows.

    A party's records are numbered as the unknowns of its first epoch; a last epoch that was broken
    off is shorter. A party whose order cannot matter (one step an epoch) keeps a single epoch.
    """

    epochs: tuple[Epochs, ...] = ()

    @property
    def copied(self) -> bool:
        return any(len(epochs) > 1 for epochs in self.epochs)

    @property
    def held(self) -> tuple[int, ...]:
        """Records of each party."""
        return tuple(len(epochs[0]) for epochs in self.epochs)

    @property
    def first(self) -> Plan:
        """The steps of the first epochs."""
        parties = zip(self.parties, self.epochs, strict=True)
        return Plan(
            tuple(tuple(r for r in steps if {*r} <= {*epochs[0]}) for steps, epochs in parties),
            self.examples,
        )


def unrolled(plan: Plan) -> Unrolled:
    """The plan with fresh rows for every epoch; an epoch ends where a record would come again."""
    parties, epochs, start = list[Steps](), list[Epochs](), 0
    for steps in plan.parties:
        fresh, copies = _fresh(steps, start)
        parties.append(fresh)
        epochs.append(copies)
        start = 1 + max(row for rows in copies for row in rows)
    return Unrolled(tuple(parties), plan.examples, tuple(epochs))


def _fresh(steps: Steps, start: int) -> tuple[Steps, Epochs]:
    """One party's steps and epochs, its unknowns numbered from `start`."""
    alike = len({frozenset(rows) for rows in steps}) == 1
    found, epochs, seen = list[tuple[int, ...]](), list[dict[int, int]]([{}]), start
    for rows in steps:
        if not alike and any(row in epochs[-1] for row in rows):
            epochs.append({})
        for row in rows:
            if row not in epochs[-1]:
                epochs[-1][row], seen = seen, seen + 1
        found.append(tuple(epochs[-1][row] for row in rows))
    return tuple(found), tuple(tuple(epoch.values()) for epoch in epochs)


def record_of(plan: Unrolled, seed: Seed) -> Tensor:
    """A guess, for each unknown, which record it is: [unknowns], of the party's records.

    In the first epoch in order; in each later one in an order of its own, drawn at random.
    """
    found, start = torch.empty(plan.records, dtype=torch.long), 0
    for party, (held, epochs) in enumerate(zip(plan.held, plan.epochs, strict=True)):
        rng = seed.child(party).torch()
        found[list(epochs[0])] = start + torch.arange(held)
        for rows in epochs[1:]:
            found[list(rows)] = start + torch.randperm(held, generator=rng)[: len(rows)]
        start += held
    return found


@dataclass(frozen=True)
class OrderInvariance:
    """Mean over pairs of whole epochs of the mean square of g(X_e) - g(X_f).

    g: the mean or the maximum over an epoch's images, pixel by pixel, or of what a random 3x3
    convolution makes of them; whatever the order, it is the same for all epochs of a party.
    """

    weight: float
    plan: Unrolled
    summary: Summary
    seed: Seed
    relative: bool = False

    def given(self, evidence: Evidence, labels: Tensor, network: Network) -> Given:
        if not self.summary.startswith("conv"):
            return {}
        channels, rng = evidence.input_shape[0], self.seed.torch()
        filters = torch.randn(FILTERS, channels, 3, 3, generator=rng)
        return {"filters": filters / (9 * channels) ** 0.5}

    def value(self, trial: Trial, given: Given, network: Network) -> Tensor:
        images = trial.inputs
        if "filters" in given:
            images = conv2d(images, given["filters"], padding=1)
        every = [self._apart(images, epochs) for epochs in self.plan.epochs if len(epochs) > 1]
        return torch.stack(every).mean() if every else images.new_zeros(())

    def _apart(self, images: Tensor, epochs: Epochs) -> Tensor:
        """Of one party: E^-2 sum_ef |s_e - s_f|^2 = 2 mean_e |s_e - mean s|^2."""
        whole = [list(rows) for rows in epochs if len(rows) == len(epochs[0])]
        parts = images[torch.tensor(whole)]
        summed = parts.amax(1) if self.summary.endswith("max") else parts.mean(1)
        return 2 * (summed - summed.mean(0)).square().mean()


def merged(samples: Tensor, labels: Tensor, plan: Unrolled) -> tuple[Tensor, Tensor]:
    """(images [records, C, H, W], labels [records]) from those of all epochs.

    Each epoch's images are matched to the first's, those of one label with one another, by the
    least sum of squares; then to the mean of all, and averaged.
    """
    every = [_merged(samples, labels, epochs) for epochs in plan.epochs]
    return torch.cat([images for images, _ in every]), torch.cat([own for _, own in every])


def _merged(samples: Tensor, labels: Tensor, epochs: Epochs) -> tuple[Tensor, Tensor]:
    first = list(epochs[0])
    images, own = samples[first], labels[first]
    for _ in range(2 if len(epochs) > 1 else 0):
        total, count = torch.zeros_like(images), images.new_zeros(len(images))
        for rows in epochs:
            index = list(rows)
            here = matched(samples[index], labels[index], images, own)
            total[here] += samples[index]
            count[here] += 1
        images = total / count.view(-1, 1, 1, 1)
    return images, own


def matched(images: Tensor, labels: Tensor, wanted: Tensor, own: Tensor) -> Tensor:
    """For each image the record it is taken for: rows of `wanted`, each at most once."""
    apart = torch.cdist(images.flatten(1).double(), wanted.flatten(1).double()).square()
    cost = apart + OTHER_LABEL * (labels[:, None] != own[None])
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
