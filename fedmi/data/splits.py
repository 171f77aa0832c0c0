"""The two ways to split records into private, held-out and public: by class and by record."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmi.data.errors import DataError
from fedmi.data.records import Ints, Records, Split
from fedmi.exposure.seeding import Seed

Mask = NDArray[np.bool_]


def share(records: int, fraction: float) -> int:
    """How many of `records` a fraction is: rounded up, at least 1."""
    return max(1, math.ceil(records * fraction - 1e-9))


def private_count(records: int, held_out: float, public: float = 0.0) -> int:
    """Private records of a class of `records` records; 0 or less if the class is too small."""
    return records - share(records, held_out) - (share(records, public) if public else 0)


def by_class(
    records: Records, private_classes: tuple[int, ...], held_out: Mask, source: str
) -> Split:
    """Private classes and public classes are disjoint (Chen et al. 2021's protocol; faces).

    held_out: [n], true for the records of private classes that only measure utility; what it
    says of the other classes is not read. Labels are renumbered from 0 on either side, in the
    order of the classes. Raises DataError if somebody is shown on both sides.
    """
    mine = np.isin(records.labels, private_classes)
    private, kept, public = (
        _renumbered(records.take(np.flatnonzero(rows)))
        for rows in (mine & ~held_out, mine & held_out, ~mine)
    )
    split = Split(private, kept, public, len(private_classes), identity_disjoint=True)
    return validated(split, source)


def by_record(records: Records, held_out: float, public: float, seed: Seed, source: str) -> Split:
    """Every class on every side: stratified by class at random, fractions of its records."""
    rng = seed.child("split", "by_record").numpy()
    sides: tuple[list[Ints], list[Ints], list[Ints]] = ([], [], [])
    for label in np.unique(records.labels):
        rows = rng.permutation(np.flatnonzero(records.labels == label))
        if private_count(len(rows), held_out, public) < 1:
            raise DataError(
                f"{source}: class {label} has {len(rows)} record(s), too few for one private, "
                f"one held-out (held_out = {held_out}) and one public (public = {public})"
            )
        first, second = share(len(rows), held_out), share(len(rows), public)
        parts = np.split(rows, [first, first + second])
        for side, part in zip(sides, parts, strict=True):
            side.append(part)
    kept, shown, private = (records.take(np.sort(np.concatenate(side))) for side in sides)
    classes = int(records.labels.max()) + 1
    return validated(Split(private, kept, shown, classes, identity_disjoint=False), source)


def by_identity(records: Records, held_out: float, public: float, seed: Seed, source: str) -> Split:
    """Every class on every side, nobody both private and public: whole identities go public.

    `public` is a fraction of the identities, stratified by the class each shows most; `held_out`
    one of the records that remain, by class. Raises DataError if a class ends without a record
    on some side.
    """
    people = _dominant_class(records)
    chosen = stratified(people, public, seed.child("split", "by_identity"))
    return apart(records, np.unique(records.identities)[~chosen], held_out, seed, source)


def apart(records: Records, private: Ints, held_out: float, seed: Seed, source: str) -> Split:
    """Every class on every side; the records of these identities are private, all others public.

    `held_out` is a fraction of the private ones, by class. Raises DataError if a class ends
    without a record on some side.
    """
    mine = np.isin(records.identities, private)
    shown, rest = records.take(np.flatnonzero(~mine)), records.take(np.flatnonzero(mine))
    kept = stratified(rest.labels, held_out, seed.child("split", "held_out"))
    split = Split(
        rest.take(np.flatnonzero(~kept)),
        rest.take(np.flatnonzero(kept)),
        shown,
        int(records.labels.max()) + 1,
        identity_disjoint=True,
        shared_classes=True,
    )
    return validated(split, source)


def stratified(labels: Ints, fraction: float, seed: Seed) -> Mask:
    """[n], true for a random `share` of each class, never for the whole of it."""
    rng = seed.numpy()
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: min(share(len(rows), fraction), len(rows) - 1)]] = True
    return chosen


def validated(split: Split, source: str) -> Split:
    """The split; DataError if records or identities are on two sides, or a class is missing."""
    sides = {"private": split.private, "held_out": split.held_out, "public": split.public}
    ids, counts = np.unique(np.concatenate([s.ids for s in sides.values()]), return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{source}: record(s) {_some(ids[counts > 1])} are on two sides")
    if split.identity_disjoint:
        mine = np.concatenate([split.private.identities, split.held_out.identities])
        if len(both := np.intersect1d(mine, split.public.identities)):
            raise DataError(
                f"{source}: identities {_some(both)} are both private and public; "
                "choose private classes that nobody of the public classes shows"
            )
    needed = {"private", "held_out"} | ({"public"} if split.shared_classes else set())
    for name in sorted(needed):
        missing = np.setdiff1d(np.arange(split.classes), sides[name].labels)
        if len(missing):
            raise DataError(f"{source}: class {_some(missing)} has no {name} record")
    if not len(split.public):
        raise DataError(f"{source}: no public record is left to stand in for the private ones")
    return split


def _dominant_class(records: Records) -> Ints:
    """For each identity, in order, the class it shows most."""
    people, place = np.unique(records.identities, return_inverse=True)
    counts = np.zeros((len(people), int(records.labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (place, records.labels), 1)
    dominant: Ints = counts.argmax(1)
    return dominant


def _renumbered(records: Records) -> Records:
    labels = np.unique(records.labels, return_inverse=True)[1].astype(np.int64)
    return replace(records, labels=labels)


def _some(values: Ints) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"
