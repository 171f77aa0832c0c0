"""CIFAR-10 from the files of its authors, as torchvision leaves them on disk."""

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmi.data.array_pickle import Uint8s, read_dictionary, uint8_array
from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.digest import digest
from fedmi.data.errors import DataError
from fedmi.data.protocol import SplitByClass
from fedmi.data.records import Records

CLASSES, SHAPE, PIXELS = 10, (3, 32, 32), 3072
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
FILES = (*BATCHES, "test_batch")
FOLDERS = {"cifar-10-batches-py": "", "cifar-10-batches-bin": ".bin"}
"""Folder of each version and the ending of its files."""
EXPECTED = (
    "it must be the folder that holds cifar-10-batches-py (where torchvision leaves it) or "
    "cifar-10-batches-bin, or one of these two, with data_batch_1 .. data_batch_5 and test_batch"
)
Listing = tuple[tuple[Path, int], ...]
"""(file, time of last change in ns) of the six batches"""


class CIFAR10(SplitByClass):
    """60000 colour images 32 x 32 in 10 classes: the training and the test batches together.

    `path` holds the Python version (pickles, read without running anything in them) or the binary
    one (records of a label byte and 3072 pixels); the Python version where it holds both. Ids
    count through data_batch_1 .. 5, then test_batch. All 60000 images take 0.7 GB as float32.
    """

    kind: Literal["cifar10"] = "cifar10"
    paper: ClassVar[str] = (
        "A. Krizhevsky: Learning multiple layers of features from tiny images. "
        "Technical report, University of Toronto, 2009"
    )

    path: Path = Field(
        description="the folder that holds cifar-10-batches-py or cifar-10-batches-bin, or it"
    )
    max_per_class: int = Field(
        default=0, ge=0, description="the first so many images of every class; 0 = all 6000"
    )

    @property
    def source(self) -> str:
        return str(self.path)

    def card(self) -> Card:
        """Loads the files."""
        per_class = np.bincount(self.load().labels, minlength=CLASSES)
        return Card(
            title="CIFAR-10",
            source=f"Krizhevsky 2009; {self.source}",
            licence="no formal licence; research use, with credit to Krizhevsky 2009",
            shape=SHAPE,
            classes=self.private_class_count(CLASSES),
            private_records=self.private_records(per_class),
            identities=False,
        )

    def load(self) -> Records:
        return _load(self._listing(), self.max_per_class, self.source)

    def fingerprint(self) -> str:
        return digest(file for file, _ in self._listing())

    def _listing(self) -> Listing:
        """The six files; DataError if one is missing."""
        folder, ending = self._found()
        files = [folder / (name + ending) for name in FILES]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{folder}: no file {', '.join(missing)}; {EXPECTED}")
        return tuple((file, file.stat().st_mtime_ns) for file in files)

    def _found(self) -> tuple[Path, str]:
        root = self.path.expanduser()
        if root.is_file():
            raise DataError(f"path = {self.path}: a file; unpack an archive first: {EXPECTED}")
        if not root.is_dir():
            raise DataError(f"path = {self.path}: no such folder; {EXPECTED}")
        for name, ending in FOLDERS.items():
            for folder in (root / name, root):
                if any((folder / (file + ending)).is_file() for file in FILES):
                    return folder, ending
        raise DataError(f"path = {self.path}: no batch of CIFAR-10 in it; {EXPECTED}")


@lru_cache(maxsize=2)
def _load(listing: Listing, max_per_class: int, source: str) -> Records:
    batches = [_batch(file) for file, _ in listing]
    for (file, _), (_, labels) in zip(listing, batches, strict=True):
        if len(labels) != len(batches[0][1]):
            raise DataError(
                f"{file}: {len(labels)} images, but {listing[0][0].name} has "
                f"{len(batches[0][1])}; every batch of CIFAR-10 has as many (10000)"
            )
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    if missing := sorted(set(range(CLASSES)) - set(labels.tolist())):
        raise DataError(f"{source}: class {missing[0]} has no image; CIFAR-10 has classes 0 .. 9")
    pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, *SHAPE)
    if max_per_class:
        firsts = [np.flatnonzero(labels == c)[:max_per_class] for c in range(CLASSES)]
        rows = np.sort(np.concatenate(firsts))
        pixels, labels = pixels[rows], labels[rows]
    return checked(pixels / np.float32(255), labels, source)


def _batch(file: Path) -> tuple[Uint8s, Uint8s]:
    """(pixels [n, 3072], all red, then green, then blue; labels [n]); DataError."""
    pixels, labels = _binary(file) if file.suffix == ".bin" else _pickled(file)
    if labels.max() >= CLASSES:
        raise DataError(f"{file}: label {labels.max()}; CIFAR-10 has labels 0 .. 9")
    return pixels, labels


def _binary(file: Path) -> tuple[Uint8s, Uint8s]:
    try:
        content = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    if not len(content) or len(content) % (PIXELS + 1):
        raise DataError(
            f"{file}: {len(content)} bytes; truncated, or not a batch of CIFAR-10, which has "
            f"records of {PIXELS + 1} bytes (10000 of them: 30730000 bytes)"
        )
    table = content.reshape(-1, PIXELS + 1)
    return table[:, 1:], table[:, 0]


def _pickled(file: Path) -> tuple[Uint8s, Uint8s]:
    found = read_dictionary(file)
    if missing := [key for key in ("data", "labels") if key not in found]:
        raise DataError(
            f"{file}: no '{missing[0]}' in it, but {', '.join(sorted(found)):.80}; "
            "a batch of CIFAR-10 has 'data' and 'labels'"
        )
    try:
        pixels = uint8_array(found["data"], PIXELS)
    except ValueError as error:
        raise DataError(f"{file}: 'data' {error}; it must be uint8 [n, {PIXELS}]") from error
    return pixels, _labels(found["labels"], len(pixels), file)


def _labels(given: object, count: int, file: Path) -> Uint8s:
    if not isinstance(given, list) or len(given) != count:
        size = f"{len(given)} of them" if isinstance(given, list) else type(given).__name__
        raise DataError(f"{file}: 'labels' is not a list of {count} integers ({size})")
    for row, label in enumerate(given):
        if type(label) is not int or not 0 <= label < CLASSES:
            raise DataError(f"{file}: the label of image {row} is not an integer 0 .. 9")
    return np.asarray(given, dtype=np.uint8)
