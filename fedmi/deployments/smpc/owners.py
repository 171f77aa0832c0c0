"""Who owns which records, and how a minibatch is picked out of what the owners shared."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedmi.data.records import Floats, Ints, Records
from fedmi.deployments.base import Steps

INPUTS, LABELS = "x", "y"


@dataclass(frozen=True)
class Owners:
    """rows: for each owner its rows among the private records, in the order in which it shares
    them; together every row once."""

    rows: tuple[Ints, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, variable: str, batch: Ints) -> list[tuple[str, list[int]]]:
        """The batch (rows of the private records) as (variable of an owner, its rows), by owner.

        Owners with nothing in the batch are left out. The order within a batch changes only how
        sums round.
        """
        return [
            (of_owner(variable, owner), self._of(owner, batch))
            for owner in np.unique(self._owner[batch]).tolist()
        ]

    def order(self, owner: int, batches: tuple[Ints, ...]) -> Steps:
        """For each minibatch, which records of the owner are in it, counted from 0."""
        return tuple(tuple(self._of(owner, batch)) for batch in batches)

    def _of(self, owner: int, batch: Ints) -> list[int]:
        found: list[int] = self._position[batch[self._owner[batch] == owner]].tolist()
        return found

    @cached_property
    def _owner(self) -> Ints:
        """Of each private record, who owns it."""
        counts = [len(rows) for rows in self.rows]
        return self._scattered(np.repeat(np.arange(len(counts)), counts))

    @cached_property
    def _position(self) -> Ints:
        """Of each private record, where its owner shares it."""
        return self._scattered(np.concatenate([np.arange(len(rows)) for rows in self.rows]))

    def _scattered(self, values: Ints) -> Ints:
        """Values given owner by owner, in the order of the private records."""
        found = np.empty(len(values), dtype=np.int64)
        found[np.concatenate(self.rows)] = values
        return found


def of_owner(variable: str, owner: int) -> str:
    """The name of the shared variable that holds what one owner shared."""
    return f"{variable}/{owner}"


def one_hot(records: Records, classes: int) -> Floats:
    """Labels as rows of the unit matrix [n, classes], float32."""
    return np.eye(classes, dtype=np.float32)[records.labels]
