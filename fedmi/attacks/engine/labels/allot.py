"""From how much speaks for each class to one label a record."""

import torch
from torch import Tensor


def allot(
    counts: Tensor, certain: Tensor, spread: Tensor, records: int, doubt: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(labels [records] in ascending order, confidence [records] in [0, 1]).

    counts: estimated records of each class, [classes]; certain: classes by descending certainty
    that are known to be there, each gets one record first; the rest go one by one to the class
    whose estimate is furthest from being met. spread: standard error of the counts. Confidence is
    1 for the certain; else that of a guess, 1 / classes, with probability `doubt`, and otherwise
    the probability that the class has one more record, Phi((left - 1/2) / spread).
    """
    left, found = counts.double().clone(), list[tuple[int, float]]()
    noise = spread.double().clamp_min(1e-3)
    for label in certain.tolist()[:records]:
        found.append((label, 1.0))
        left[label] -= 1
    while len(found) < records:
        label = int(left.argmax())
        odds = float(torch.special.ndtr((left[label] - 0.5) / noise[label]))
        found.append((label, (1 - doubt) * odds + doubt / len(counts)))
        left[label] -= 1
    found.sort()
    return torch.tensor([label for label, _ in found]), torch.tensor([sure for _, sure in found])


def negative(slope: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Classes whose slope is below zero by more than rounding, most negative first."""
    below = slope < -tolerance * slope.abs().max()
    order = slope.argsort(stable=True)
    return order[below[order]]


def listed(counts: Tensor, records: int, doubt: float = 0.0) -> tuple[Tensor, Tensor]:
    """As `allot`, from counts that should be whole: rounded, then mended where rounding was most
    wrong, until they sum to `records`. Their standard error is their distance from the result."""
    whole = counts.clamp(0, records).round()
    while int(whole.sum()) != records:
        short = whole.sum() < records
        error = torch.where((whole > 0) | short, whole - counts, -torch.inf)
        whole[error.argmin() if short else error.argmax()] += 1 if short else -1
    spread = (whole - counts).square().mean().sqrt().clamp_min(1e-3)
    found = [
        (label, (1 - doubt) * float(odds) + doubt / len(counts))
        for label, count in enumerate(whole.long().tolist())
        for number in range(1, count + 1)
        for odds in [torch.special.ndtr((counts[label] - number + 0.5) / spread)]
    ]
    return torch.tensor([label for label, _ in found]), torch.tensor([sure for _, sure in found])
