"""A set of labelled records, and the split every experiment starts from."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmi.data import twins
from fedmi.exposure.schema import PIXELS, Schema
from fedmi.exposure.seeding import Seed

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """inputs [n, C, H, W] float32, in [0, 1] but for token ids; labels [n]; identities [n] (who or
    what is shown); ids [n], the row in the data set, unique over private, held-out and public
    together; schema: what the inputs mean."""

    inputs: Floats
    labels: Ints
    identities: Ints
    ids: Ints
    schema: Schema = PIXELS

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Ints) -> "Records":
        return Records(
            self.inputs[rows],
            self.labels[rows],
            self.identities[rows],
            self.ids[rows],
            self.schema,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.inputs.shape[1:]
        return int(channels), int(height), int(width)


@dataclass(frozen=True)
class Split:
    """private: trained on and attacked. held_out: the same classes, for utility. public: the
    attacker's, disjoint from both by record, and by identity where `identity_disjoint`.

    Labels of private and held_out are 0 .. classes - 1. Labels of public are its own classes,
    counted from 0, where the classes differ (faces); the same classes where `shared_classes`
    (digits). Data that is not identity_disjoint always shares its classes.
    """

    private: Records
    held_out: Records
    public: Records
    classes: int
    identity_disjoint: bool
    shared_classes: bool = False
    basis: Records | None = None
    """What a twin's partition reads; see `dealt`."""

    def __post_init__(self) -> None:
        if not self.identity_disjoint:
            object.__setattr__(self, "shared_classes", True)

    @property
    def dealt(self) -> Records:
        """What `Partition.assign` is given in place of `private`.

        A twin's labels or identities are not those of the rows it stands in for. Dealt by its
        basis, every client of the twin holds the very rows it holds in the real split.
        """
        return self.private if self.basis is None else self.basis

    def disjoint_twin(self, seed: Seed) -> "Split":
        """The same labels row by row, every private record replaced by a public one.

        What a deployment trained on it shows carries nothing about the private records: the
        prior-only observation of attacks that recover records. Where classes differ, each
        private label stands for fixed public classes. No public record serves twice before its
        class is used up. held_out is replaced alike, by records that private did not use while
        there are any. DataError if a class has no public record to stand in.
        """
        return self._twin(self.private.labels, seed.child("disjoint_twin"))

    def relabelled_twin(self, seed: Seed) -> "Split":
        """Public records whose labels are the private labels in random order.

        A row's label says nothing about the private row's. The prior-only observation of
        attacks that recover labels.
        """
        seed = seed.child("relabelled_twin")
        labels = seed.child("labels").numpy().permutation(self.private.labels)
        return self._twin(labels, seed)

    def _twin(self, labels: Ints, seed: Seed) -> "Split":
        groups = twins.groups(self.classes, self.public.labels, self.shared_classes)
        wanted = np.concatenate([labels, self.held_out.labels])
        rows = twins.stand_ins(wanted, self.public.labels, groups, seed.numpy())
        drawn = replace(self.public.take(rows), labels=wanted)
        private = drawn.take(np.arange(len(labels)))
        dealt = self.dealt
        return replace(
            self,
            private=private,
            held_out=drawn.take(np.arange(len(labels), len(wanted))),
            basis=replace(private, labels=dealt.labels, identities=dealt.identities),
        )
