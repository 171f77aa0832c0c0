"""CIFAR-10 from both layouts of its authors, and pickles that would do harm."""

import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedmi.data.array_pickle import read_dictionary
from fedmi.data.cifar10 import CIFAR10, FILES
from fedmi.data.errors import DataError
from fedmi.data.npz import Npz
from fedmi.exposure.component import components
from fedmi.exposure.seeding import Seed

SEED = Seed.root(3)
EACH = 20
RNG = np.random.default_rng(5)
PIXELS = [RNG.integers(0, 256, (EACH, 3072), dtype=np.uint8) for _ in FILES]
LABELS = [[(3 * row + number) % 10 for row in range(EACH)] for number in range(len(FILES))]
SUBSET = Path(__file__).parents[1].parent / "shared/data/cifar10_subset.npz"


def text(value: str | bytes) -> bytes:
    """The opcode that Python 2 wrote for a str."""
    raw = value.encode() if isinstance(value, str) else value
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + long(len(raw)) + raw


def long(value: int) -> bytes:
    return struct.pack("<I", value)


def python_2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Protocol 2 as Python 2 and an old NumPy wrote it: byte strings, numpy.core.multiarray."""
    rows = b"".join(b"K" + bytes([label]) for label in labels)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
        b"(K\x01(J" + long(len(pixels)) + b"M\x00\x0ct"
        b"cnumpy\ndtype\n(" + text("u1") + b"K\x00K\x01tR"
        b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + text(pixels.tobytes()) + b"tb"
    )
    label = text("batch_label") + text("training batch 1 of 5")
    return (
        b"\x80\x02}(" + label + text("labels") + b"](" + rows + b"e" + text("data") + array + b"u."
    )


def python_3_batch(protocol: int, key: Callable[[str], object]) -> Callable[..., bytes]:
    return lambda pixels, labels: pickle.dumps(
        {key("batch_label"): b"", key("labels"): labels, key("data"): pixels}, protocol
    )


def binary_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.column_stack([np.asarray(labels, np.uint8), pixels]).tobytes()


WRITERS: dict[str, Callable[[np.ndarray, list[int]], bytes]] = {
    "python 2": python_2_batch,
    "protocol 2, text keys": python_3_batch(2, str),
    "protocol 2, bytes keys": python_3_batch(2, str.encode),
    "protocol 4": python_3_batch(4, str),
    "binary": binary_batch,
}


def written(root: Path, version: str = "python 2") -> Path:
    """The folder of batches in `root`."""
    binary = version == "binary"
    folder = root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    folder.mkdir()
    for name, pixels, labels in zip(FILES, PIXELS, LABELS, strict=True):
        content = WRITERS[version](pixels, labels)
        (folder / (name + (".bin" if binary else ""))).write_bytes(content)
    return folder


def test_the_fixture_is_the_program_of_the_original_files(tmp_path: Path) -> None:
    content = python_2_batch(PIXELS[0], LABELS[0])
    names = {op.name for op, _, _ in pickletools.genops(content)}
    assert {"SHORT_BINSTRING", "BINSTRING", "GLOBAL", "REDUCE", "BUILD"} <= names
    plain = pickle.loads(content, encoding="bytes")  # noqa: S301  (ours; the naive oracle)
    np.testing.assert_array_equal(plain[b"data"], PIXELS[0])
    assert plain[b"labels"] == LABELS[0]


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("inside", [False, True])
def test_every_layout_holds_the_same_records(tmp_path: Path, version: str, inside: bool) -> None:
    folder = written(tmp_path, version)
    data = CIFAR10(path=folder if inside else tmp_path)
    records = data.load()
    whole = np.concatenate(PIXELS).reshape(-1, 3, 32, 32) / np.float32(255)
    np.testing.assert_array_equal(records.inputs, whole)
    np.testing.assert_array_equal(records.labels, np.concatenate(LABELS))
    assert records.inputs.dtype == np.float32
    card = data.card()
    assert (card.shape, card.classes, card.identities) == ((3, 32, 32), 10, False)
    assert card.private_records == len(data.split(SEED).private)


def test_an_array_stored_by_column_is_not_transposed(tmp_path: Path) -> None:
    folder = written(tmp_path)
    for name, pixels, labels in zip(FILES, PIXELS, LABELS, strict=True):
        content = {"data": np.asfortranarray(pixels), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    np.testing.assert_array_equal(
        CIFAR10(path=folder).load().inputs.reshape(-1, 3072) * 255, np.concatenate(PIXELS)
    )


def test_the_first_of_every_class(tmp_path: Path) -> None:
    data = CIFAR10(path=written(tmp_path), max_per_class=4)
    small, whole = data.load(), CIFAR10(path=data.path).load()
    assert list(np.bincount(small.labels)) == [4] * 10
    for label in range(10):
        rows = np.flatnonzero(whole.labels == label)[:4]
        np.testing.assert_array_equal(small.inputs[small.labels == label], whole.inputs[rows])
    assert data.card().private_records == len(data.split(SEED).private) == 10


def test_private_classes_as_for_other_data(tmp_path: Path) -> None:
    data = CIFAR10(path=written(tmp_path), private_classes=(0, 2, 4))
    split = data.split(SEED)
    assert set(split.public.identities) == {1, 3, 5, 6, 7, 8, 9}
    assert split.identity_disjoint
    assert (data.card().classes, data.card().private_records) == (3, len(split.private))
    with pytest.raises(DataError, match=r"names \[10\]"):
        CIFAR10(path=data.path, private_classes=(0, 10)).card()


def test_it_is_found_by_the_door() -> None:
    assert components("fedmi.datasets")["cifar10"] is CIFAR10


def test_a_changed_file_is_read_anew_and_has_another_fingerprint(tmp_path: Path) -> None:
    folder = written(tmp_path, "binary")
    data = CIFAR10(path=tmp_path)
    before, first = data.fingerprint(), data.load().inputs[0]
    assert before == CIFAR10(path=folder).fingerprint() != ""
    (folder / "data_batch_1.bin").write_bytes(binary_batch(255 - PIXELS[0], LABELS[0]))
    os.utime(folder / "data_batch_1.bin", ns=(1, 1))
    assert data.fingerprint() != before
    np.testing.assert_allclose(data.load().inputs[0], 1 - first, atol=1e-6)


class Harm:
    """Whose pickle runs a command that leaves a file."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir, np.save, io.open])
def test_a_pickle_that_calls_a_function_is_refused_by_name_and_does_not_run(
    tmp_path: Path, protocol: int, function: Callable[..., object]
) -> None:
    folder, mark = written(tmp_path), tmp_path / "mark"
    arguments: dict[object, tuple[object, ...]] = {
        os.system: (f"touch {mark}",),
        eval: (f"open({str(mark)!r}, 'w')",),
        os.mkdir: (str(mark),),
        np.save: (str(mark), 0),
        io.open: (str(mark), "w"),
    }
    given = {"data": PIXELS[0], "labels": LABELS[0], "x": Harm(function, *arguments[function])}
    content = pickle.dumps(given, protocol)
    (folder / "data_batch_1").write_bytes(content)
    named = rf"data_batch_1: .*names '\w+\.{function.__name__}', which no such file needs: refused"
    with pytest.raises(DataError, match=named):
        CIFAR10(path=folder).load()
    assert not list(tmp_path.glob("mark*"))
    pickle.loads(content)  # noqa: S301  (ours; it does run where it is let)
    assert list(tmp_path.glob("mark*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or not a pickled batch"),
        (b"no pickle at all", "truncated, or not a pickled batch"),
        (b"\x80\x02](K\x01e.", "holds a list, not a dictionary"),
        (b"\x80\x02}K\x01K\x02s.", "a key is a int"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "stores a value at place 2147483647"),
        (b"\x80\x02cnumpy\nndarray\n}b.", "truncated, or not a pickled batch"),
        (b"\x80\x02cnumpy\nnothing\n.", "names 'numpy.nothing'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0c_globals._os\x93.", r"names 'numpy._globals._os'"),
        (b"\x80\x02" + b"(" * 9 + b"\x82\x01.", "truncated, or not a pickled batch"),
        (b"\x80\x02X\x04\x00\x00\x00evilQ.", "truncated, or not a pickled batch"),
        (b"\x80\x02}.", "no 'data' in it"),
        (b"\x80\x02}(" + text("data") + b"K\x01" + text("labels") + b"]u.", "'data' is not an arr"),
        (b"\x80\x02}(U\x04datacnumpy\nndarray\n)\x81U\x06labels]u.", "'data' is not an array"),
    ],
)
def test_files_that_are_no_batch(tmp_path: Path, content: bytes, message: str) -> None:
    folder = written(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        CIFAR10(path=folder).load()
    assert str(folder / "data_batch_3") in str(error.value)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (PIXELS[0][:, :3071], LABELS[0], r"it must be uint8 \[n, 3072\]"),
        (PIXELS[0].astype(np.int8), LABELS[0], "is not of type uint8"),
        (PIXELS[0].astype(np.float64), LABELS[0], "is not of type uint8"),
        (PIXELS[0].astype(object), LABELS[0], "is not of type uint8"),
        (PIXELS[0].ravel(), LABELS[0], "another shape"),
        (PIXELS[0][:0], [], "0 bytes"),
        (PIXELS[0], LABELS[0][:-1], r"not a list of 20 integers \(19 of them\)"),
        (PIXELS[0], "labels", r"integers \(str\)|integers \(bytes\)"),
        (PIXELS[0], [10, *LABELS[0][1:]], "label of image 0 is not an integer 0 .. 9"),
        (PIXELS[0], [0, -1, *LABELS[0][2:]], "label of image 1 is not"),
        (PIXELS[0], [True, *LABELS[0][1:]], "label of image 0 is not"),
        (PIXELS[0], [10**5000, *LABELS[0][1:]], "label of image 0 is not"),
        (PIXELS[0][:10], LABELS[0][:10], "data_batch_1 has 10; every batch"),
    ],
)
def test_no_type_or_shape_or_label_is_trusted(
    tmp_path: Path, data: np.ndarray, labels: object, message: str
) -> None:
    folder = written(tmp_path)
    content = pickle.dumps({"data": data, "labels": labels}, 2)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=message):
        CIFAR10(path=folder).load()


def test_a_shape_that_its_bytes_do_not_fill_is_refused(tmp_path: Path) -> None:
    folder, content = written(tmp_path), python_2_batch(PIXELS[0], LABELS[0])
    assert content.count(b"(J" + long(EACH)) == 1
    for rows in (EACH - 1, EACH + 1, 0, 2**31 - 1, 2**32 - 1):
        lie = content.replace(b"(J" + long(EACH), b"(J" + long(rows))
        (folder / "test_batch").write_bytes(lie)
        with pytest.raises(DataError, match=r"test_batch: 'data' has 61440 bytes and another"):
            CIFAR10(path=folder).load()


@pytest.mark.parametrize("version", ["python 2", "protocol 4", "binary"])
def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path, version: str) -> None:
    folder = written(tmp_path, version)
    file = folder / ("data_batch_2.bin" if version == "binary" else "data_batch_2")
    whole = file.read_bytes()
    for kept in [*range(0, 300, 7), *range(300, len(whole), 6007), len(whole) - 1]:
        file.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"data_batch_2.*: .*truncated"):
            CIFAR10(path=folder).load()


def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), bytearray(python_2_batch(PIXELS[0][:1], [0]))
    places = [place for place in range(len(whole)) if place < 60 or place > 3100 or place % 97 == 0]
    file, refused = tmp_path / "batch", 0
    for place in places:
        damaged = whole.copy()
        damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            read_dictionary(file)
        except DataError:
            refused += 1
    assert 0 < refused < len(places)


def test_binary_batches_that_lost_whole_records_or_hold_other_labels(tmp_path: Path) -> None:
    folder = written(tmp_path, "binary")
    file = folder / "data_batch_4.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3073])
    with pytest.raises(DataError, match=r"_4\.bin: 19 images, but data_batch_1\.bin has 20"):
        CIFAR10(path=folder).load()
    file.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_4.bin: label 10; .* 0 \.\. 9"):
        CIFAR10(path=folder).load()


def test_missing_folders_and_files_say_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; .*cifar-10-batches-py"):
        CIFAR10(path=tmp_path / "nowhere").card()
    with pytest.raises(DataError, match="no batch of CIFAR-10 in it; it must be"):
        CIFAR10(path=tmp_path).fingerprint()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="a file; unpack an archive first"):
        CIFAR10(path=tmp_path / "cifar-10-python.tar.gz").card()
    folder = written(tmp_path)
    (folder / "data_batch_5").unlink()
    with pytest.raises(DataError, match="no file data_batch_5; it must be"):
        CIFAR10(path=tmp_path).load()


def test_a_class_without_an_image_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, "binary")
    for name, pixels in zip(FILES, PIXELS, strict=True):
        labels = [row % 9 for row in range(EACH)]
        (folder / f"{name}.bin").write_bytes(binary_batch(pixels, labels))
    with pytest.raises(DataError, match="class 9 has no image"):
        CIFAR10(path=folder).card()


@pytest.mark.skipif(not SUBSET.is_file(), reason="the CIFAR-10 images are not on this machine")
def test_real_images_from_an_archive() -> None:
    data = Npz(path=SUBSET, inputs_key="x_train", labels_key="y_train")
    records = data.load()
    assert records.shape == (3, 32, 32) == data.card().shape
    assert list(np.bincount(records.labels)) == [200] * 10
    assert records.inputs.max() == 1
    red, _, blue = (float(plane.mean()) for plane in records.inputs.transpose(1, 0, 2, 3))
    assert 0.4 < blue < red < 0.55, "of natural images red is the brightest channel, blue the least"
    assert len(data.split(SEED).private) == data.card().private_records
