"""The National Health and Nutrition Examination Survey, 2017-2018."""

import csv
from functools import cache
from typing import ClassVar, Literal

import numpy as np

from fedmi.data.checks import checked
from fedmi.data.dataset import Card
from fedmi.data.files import package_file
from fedmi.data.protocol import SplitByRecord
from fedmi.data.records import Records
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

FILE = "combined_data/2017-2018/NHANES_data_2017-2018.tsv"
CADMIUM, AGE = "BloodCadmiumUgl", "AgeInYearsAtScreening"
ADULT = 20
NO_YES = {"0": "no", "1": "yes", "0.0": "no", "1.0": "yes", "Borderline": "borderline"}
MANY = {"7 or more people in the Household": "7"}
UNSURE = {"Don't Know": NOT_TOLD, "Fair or": "Fair", "Poor?": "Poor"}
READS = (
    Read(category("sex", "Female", "Male"), "Gender"),
    Read(number("age", 20, 80, 17.5), AGE),
    Read(
        category(
            "origin",
            "Mexican American",
            "Other Hispanic",
            "Non-Hispanic White",
            "Non-Hispanic Black",
            "Non-Hispanic Asian",
            "Other Race - Including Multi-Racial",
        ),
        "RacehispanicOriginWNhAsian",
    ),
    Read(
        category(
            "education",
            "Less than 9th grade",
            "9-11th grade (Includes 12th grade with no diploma)",
            "High school graduate/GED or equivalent",
            "Some college or AA degree",
            "College graduate or above",
            NOT_TOLD,
        ),
        "EducationLevelAdults20",
        UNSURE,
    ),
    Read(
        category(
            "marital status",
            "Married",
            "Widowed",
            "Divorced",
            "Separated",
            "Never married",
            "Living with partner",
            NOT_TOLD,
        ),
        "MaritalStatus",
        UNSURE,
    ),
    Read(number("people at home", 1, 7, 1.6), "TotalNumberOfPeopleInTheHousehold", MANY),
    Read(number("income to poverty", 0, 5, 1.6), "RatioOfFamilyIncomeToPoverty"),
    Read(
        category("general health", "Excellent", "Very good", "Good", "Fair", "Poor", NOT_TOLD),
        "GeneralHealthCondition",
        UNSURE,
    ),
    Read(category("ever smoker", "no", "yes"), "SmokedAtLeast100CigarettesInLife", NO_YES),
    Read(category("insured", "no", "yes", NOT_TOLD), "CoveredByHealthInsurance", NO_YES),
    Read(
        category("diabetes", "no", "yes", "borderline", NOT_TOLD),
        "DoctorToldYouHaveDiabetes",
        NO_YES,
    ),
    Read(category("arthritis", "no", "yes", NOT_TOLD), "DoctorEverSaidYouHadArthritis", NO_YES),
    Read(number("body mass index", 15, 55, 7.1), "BodyMassIndexKgm2", open_ended=True),
    Read(
        number("systolic pressure", 90, 190, 19.5), "SystolicBloodPres2NdRdgMmHg", open_ended=True
    ),
    Read(number("glycohemoglobin", 4, 10, 1.0), "Glycohemoglobin", open_ended=True),
)
WANTED = (CADMIUM, *(read.header for read in READS))


class NHANES(SplitByRecord):
    """Adults of the survey in 9 categories and 6 numbers; blood cadmium above the median (1) or
    not (0), a mark of smoking.

    inputs [n, 1, 1, 45]. People of 20 years and more whose cadmium and six numbers were measured;
    a category that was not told is a level of its own where anybody did not tell. Numbers count
    as the ends of their range beyond it: age 80 and income 5 in the survey itself, body mass 55,
    pressure 190, glycohemoglobin 10 here. The median is that of the people kept.
    """

    kind: Literal["nhanes"] = "nhanes"
    package: ClassVar[str] = "nhanes"
    paper: ClassVar[str] = (
        "Centers for Disease Control and Prevention, National Center for Health Statistics: "
        "National Health and Nutrition Examination Survey Data, 2017-2018"
    )

    @property
    def source(self) -> str:
        return self.kind

    def card(self) -> Card:
        records = self.load()
        return Card(
            title="NHANES 2017-2018, adults (rows without one of the numbers are left out; "
            "a category not told is a level)",
            source="CDC/NCHS; the files come with the package nhanes",
            licence="public domain",
            shape=records.shape,
            classes=2,
            private_records=self.private_records(np.bincount(records.labels)),
            identities=False,
            schema=records.schema,
        )

    def load(self) -> Records:
        return _load()


@cache
def _load() -> Records:
    file = package_file(NHANES.package, FILE)
    raw, source = _read(file.read_text(encoding="utf-8")), file.name
    missing_headers(raw, WANTED, source)
    pairs = zip(raw[CADMIUM], raw[AGE], strict=True)
    told = [bool(level) and float(age) >= ADULT for level, age in pairs]
    rows = rows_with(raw, READS, np.flatnonzero(told))
    cadmium = np.asarray([float(raw[CADMIUM][row]) for row in rows])
    inputs = encoded(raw, READS, rows, source)
    labels = (cadmium > np.median(cadmium)).astype(np.int64)
    return checked(inputs, labels, source, schema=table_of(READS))


def _read(content: str) -> Raw:
    """The columns that are wanted of a table of tabulated texts."""
    header, *rows = csv.reader(content.splitlines(), delimiter="\t")
    places = {name: place for place, name in enumerate(header) if name in WANTED}
    return {name: [row[place] for row in rows] for name, place in places.items()}
