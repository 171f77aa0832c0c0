"""Reconstructions of sentences and rows of tables, in words, beside the truth."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fedmi.attacks.base import PICTURED
from fedmi.data.truth import Truth
from fedmi.deployments import saved
from fedmi.exposure.knowledge import Target
from fedmi.exposure.payload import StoredTensors
from fedmi.metrics.base import Matched
from fedmi.metrics.matching import match
from fedmi.report.data import Readings, ReadRow
from fedmi.report.readable import Reading, compared, readable
from fedmi.runs.directory import RunDirectory, read_marker
from fedmi.runs.training import split_of
from fedmi.scenario.cells import AttackCell, Plan

ROWS = 6


def readings(todo: Plan, directory: RunDirectory) -> Iterator[Readings]:
    """Of the first seed and every attack that returns samples of records that are no pictures."""
    first = todo.scenario.seeds[0]
    for cell in todo.attacks:
        shown = cell.attack.recovers in PICTURED and cell.training.seed == first
        if shown and directory.finished(cell.key) and (rows := tuple(read_rows(cell, directory))):
            attack = cell.attack
            place = cell.deployment_title, attack.position, attack.channel, cell.attack_title
            yield Readings(*place, first, rows)


def read_rows(cell: AttackCell, directory: RunDirectory) -> Iterator[ReadRow]:
    """The first targets, one record each; of a single target, its first records."""
    truth = Truth(split_of(cell.training), saved.load(directory.cell(cell.training.key)).used)
    for target, row, ours, theirs in shown_records(directory.cell(cell.key), truth):
        true = ours.references[row]
        words = readable(ours.schema, true)
        if not words or ours.of_class:
            return
        yield ReadRow(
            target.id,
            f"class {int(ours.labels[row])}",
            tuple((word, True) for word in words),
            _read(ours, row, true),
            _read(theirs, row, true),
        )


def shown_records(folder: Path, truth: Truth) -> Iterator[tuple[Target, int, Matched, Matched]]:
    """Targets, rows, and what the attack and its prior-only made of them; nothing where either
    has no samples. In the order of the truth, so no row is picked for looking good."""
    targets = read_targets(folder)
    each = max(1, ROWS // len(targets)) if targets else 0
    for number, target in enumerate(targets[:ROWS]):
        ours, theirs = (
            _matched(folder / f"{name}.safetensors", number, target, truth)
            for name in ("reconstructions", "prior_only")
        )
        if ours.samples is None or theirs.samples is None:
            return
        for row in range(min(each, len(ours.references))):
            yield target, row, ours, theirs


def read_targets(folder: Path) -> list[Target]:
    found = read_marker(folder)["targets"]
    return [Target(**{**target, "clients": tuple(target["clients"])}) for target in found]


def _matched(path: Path, number: int, target: Target, truth: Truth) -> Matched:
    tensors = StoredTensors(path)
    samples, labels = (tensors.get(f"{number}.{name}") for name in ("samples", "labels"))
    return match(samples, labels, target, truth)


def _read(matched: Matched, row: int, true: Tensor) -> Reading:
    assert matched.samples is not None
    sample = matched.samples[row]
    return compared(matched.schema, sample, true) if bool(sample.isfinite().all()) else ()
