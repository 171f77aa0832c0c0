"""The Adult (Census Income) table of UCI, from the user's own copy."""

import csv
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.digest import digest
from fedmi.data.errors import DataError
from fedmi.data.protocol import SplitByRecord
from fedmi.data.records import Ints, Records
from fedmi.data.tabular import Raw, Read, category, encoded, number, table_of

UNKNOWN = "?"
INCOME = "income"
INCOMES = ("<=50K", ">50K")
LEVELS = {
    "workclass": (
        "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay "
        "Never-worked"
    ),
    "education": (
        "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th "
        "Masters 1st-4th 10th Doctorate 5th-6th Preschool"
    ),
    "marital-status": (
        "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent "
        "Married-AF-spouse"
    ),
    "occupation": (
        "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty "
        "Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing Transport-moving "
        "Priv-house-serv Protective-serv Armed-Forces"
    ),
    "relationship": ("Wife Own-child Husband Not-in-family Other-relative Unmarried"),
    "race": ("White Asian-Pac-Islander Amer-Indian-Eskimo Other Black"),
    "sex": ("Female Male"),
    "native-country": (
        "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) "
        "India Japan Greece South China Cuba Iran Honduras Philippines Italy Poland Jamaica "
        "Vietnam Mexico Portugal Ireland France Dominican-Republic Laos Ecuador Taiwan Haiti "
        "Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador "
        "Trinadad&Tobago Peru Hong Holand-Netherlands"
    ),
}
"""The levels of each category, with blanks between."""
NUMBERS = {
    "age": (17, 90, 13.6),
    "fnlwgt": (12285, 1490400, 105_550),
    "education-num": (1, 16, 2.57),
    "capital-gain": (0, 99999, 7385),
    "capital-loss": (0, 4356, 403),
    "hours-per-week": (1, 99, 12.3),
}
"""Range (of both of UCI's files) and standard deviation of each number."""
ORDER = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week"),
    "native-country",
)
READS = tuple(
    Read(
        number(name, *NUMBERS[name]) if name in NUMBERS else category(name, *LEVELS[name].split()),
        name,
    )
    for name in ORDER
)


class Adult(SplitByRecord):
    """People of the 1994 census in 8 categories and 6 numbers; income above 50 000 dollars (1) or
    not (0).

    inputs [n, 1, 1, 105]. `path` is UCI's `adult.data`, or `adult.test`: 15 values a row, separated
    by commas, no header. Rows with a "?" are left out, as is usual. A category that UCI does not
    have is a DataError that names row, column and value.
    """

    kind: Literal["adult"] = "adult"
    paper: ClassVar[str] = (
        "R. Kohavi: Scaling Up the Accuracy of Naive-Bayes Classifiers: a Decision-Tree Hybrid. "
        "KDD, 1996"
    )

    path: Path = Field(description="the file adult.data of UCI; it is never downloaded")

    @property
    def source(self) -> str:
        return str(self.path)

    def card(self) -> Card:
        records = self.load()
        return Card(
            title="Adult, Census Income (rows with an unknown value are left out)",
            source=f"UCI Machine Learning Repository; {self.path.name} is the user's own copy",
            licence="CC BY 4.0",
            shape=records.shape,
            classes=len(INCOMES),
            private_records=self.private_records(np.bincount(records.labels)),
            identities=False,
            schema=records.schema,
        )

    def load(self) -> Records:
        file = self.path.expanduser()
        if not file.is_file():
            raise DataError(
                f"path = {self.path}: no such file; it is UCI's adult.data, which is not downloaded"
            )
        return _load(file, file.stat().st_mtime_ns)

    def fingerprint(self) -> str:
        return digest([self.path.expanduser()])


@lru_cache(maxsize=2)
def _load(file: Path, changed: int) -> Records:
    """`changed`, the time of last change, is there for the cache."""
    raw = _read(file)
    whole = [UNKNOWN not in values for values in zip(*raw.values(), strict=True)]
    rows = np.flatnonzero(whole)
    if not len(rows):
        raise DataError(f"{file}: no row without an unknown value")
    labels = _incomes(raw, rows, str(file))
    return checked(encoded(raw, READS, rows, str(file)), labels, str(file), schema=table_of(READS))


def _read(file: Path) -> Raw:
    """DataError for a row that has not 15 values. Blank lines count as rows, and as unknown."""
    headers = (*ORDER, INCOME)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    rows = []
    for at, read in enumerate(csv.reader(lines, skipinitialspace=True), 1):
        nothing = not read or read[0].startswith("|")
        values = [UNKNOWN] * len(headers) if nothing else [value.strip() for value in read]
        if len(values) != len(headers):
            raise DataError(f"{file}: row {at} has {len(values)} values; {len(headers)} are right")
        rows.append(values)
    return {name: [row[place] for row in rows] for place, name in enumerate(headers)}


def _incomes(raw: Raw, rows: Ints, source: str) -> Ints:
    found = []
    for row in rows:
        text = raw[INCOME][row].rstrip(".")
        if text not in INCOMES:
            raise DataError(
                f"{source}: row {row + 1}, column {INCOME!r}: {raw[INCOME][row]!r} is none of "
                f"{list(INCOMES)}"
            )
        found.append(INCOMES.index(text))
    return np.asarray(found, dtype=np.int64)
