"""What the numbers of a record mean: pixels, columns of a table, or tokens of a text."""

from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

MISSING = 0.5
"""Mid-grey, and the middle of a range: what stands in where nothing is known."""
PADDING, UNKNOWN, START, END = 0, 1, 2, 3
"""Ids of the special tokens of every vocabulary, in this order."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class SchemaBase(BaseModel):
    """How records [n, C, H, W] are read, compared and guessed at; everybody knows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def flaw(self, records: Tensor) -> str:
        """What keeps [n, C, H, W] finite values from being records, or ""."""
        low, high = (float(records.min()), float(records.max())) if records.numel() else (0.0, 0.0)
        if low < -1e-4 or high > 1 + 1e-4:
            return f"range over [{low:.4g}, {high:.4g}]; values in [0, 1] would be right"
        return ""

    def missing(self, shape: tuple[int, ...]) -> Tensor:
        """What stands in for records of this shape of which nothing is known."""
        return torch.full(shape, MISSING)

    def cost(self, samples: Tensor, references: Tensor) -> Tensor:
        """[m, C, H, W], [n, C, H, W] -> [m, n]: what it costs to take a sample for a record."""
        distance = torch.cdist(
            samples.flatten(1), references.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distance.square()

    @abstractmethod
    def typical(self, records: Tensor) -> Tensor:
        """[n, C, H, W] -> [1, C, H, W]: the best single guess at any record of their kind."""


class Pixels(SchemaBase):
    """Values in [0, 1], all of one kind."""

    kind: Literal["pixels"] = "pixels"

    def typical(self, records: Tensor) -> Tensor:
        return records.mean(0, keepdim=True)


PIXELS = Pixels()


class Column(BaseModel):
    """One column of a table.

    levels: the names of a categorical column, which takes one entry each (one-hot); none = a
    number, one entry, scaled from [low, high] to [0, 1]. deviation: the published standard
    deviation of a number, in its own units; 0 = not told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    levels: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    deviation: float = Field(default=0.0, ge=0)

    @property
    def width(self) -> int:
        return max(1, len(self.levels))

    @property
    def scaled_deviation(self) -> float:
        """Standard deviation of a number scaled to [0, 1]; that of a uniform one if not told."""
        return self.deviation / (self.high - self.low) if self.deviation else 12**-0.5


class Table(SchemaBase):
    """Rows [n, 1, 1, entries] of columns side by side."""

    kind: Literal["table"] = "table"
    columns: tuple[Column, ...] = Field(min_length=1)

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """The entries of each column."""
        found, start = [], 0
        for column in self.columns:
            found.append(slice(start, start + column.width))
            start += column.width
        return tuple(found)

    @property
    def entries(self) -> int:
        return sum(column.width for column in self.columns)

    def cost(self, samples: Tensor, references: Tensor) -> Tensor:
        """Mean over the columns: whether the level differs, or by how much the number does."""
        ours, theirs = samples.flatten(1), references.flatten(1)
        parts = []
        for column, place in zip(self.columns, self.places, strict=True):
            first, second = ours[:, place], theirs[:, place]
            if column.levels:
                differs = first.argmax(1)[:, None] != second.argmax(1)[None]
                parts.append(differs.to(samples.dtype))
            else:
                parts.append((first - second.T).abs())
        return torch.stack(parts).mean(0)

    def typical(self, records: Tensor) -> Tensor:
        """The commonest level of a categorical column, the median of a number."""
        rows, found = records.flatten(1), []
        for column, place in zip(self.columns, self.places, strict=True):
            own = rows[:, place]
            if column.levels:
                commonest = own.sum(0).argmax()
                found.append(torch.nn.functional.one_hot(commonest, column.width).to(own))
            else:
                found.append(own.median(0).values)
        return torch.cat(found).reshape(1, *records.shape[1:])


class Text(SchemaBase):
    """Sentences [n, 1, 1, length] of token ids (whole numbers, exact in float32 up to 2^24).

    pieces: the token of each id; the first four are `SPECIAL`. A piece that begins with "##" goes
    on the word before it. A sentence is [CLS], its tokens, [SEP], and [PAD] up to `length`.
    """

    kind: Literal["text"] = "text"
    pieces: tuple[str, ...] = Field(min_length=len(SPECIAL) + 1)
    length: int = Field(ge=3)

    def flaw(self, records: Tensor) -> str:
        if not torch.equal(records, records.round()):
            return "are no whole numbers; ids of tokens would be right"
        low, high = (float(records.min()), float(records.max())) if records.numel() else (0.0, 0.0)
        if low < 0 or high >= len(self.pieces):
            return f"range over [{low:.0f}, {high:.0f}]; ids 0 to {len(self.pieces) - 1} are right"
        return ""

    def missing(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, float(PADDING))

    def cost(self, samples: Tensor, references: Tensor) -> Tensor:
        """Tokens of the record, special ones left out, that the sample does not have there."""
        ours, theirs = samples.flatten(1), references.flatten(1)
        wrong = (ours[:, None] != theirs[None]) & (theirs[None] > END)
        return wrong.sum(2).to(torch.float32)

    def typical(self, records: Tensor) -> Tensor:
        """The commonest token at each place."""
        return records.flatten(1).mode(0).values.reshape(1, *records.shape[1:])

    def words(self, record: Tensor) -> list[str]:
        """One record, of any shape, as words; special tokens are left out."""
        found: list[str] = []
        for token in record.flatten().tolist():
            piece = self.pieces[int(token)]
            if piece in (SPECIAL[PADDING], SPECIAL[START], SPECIAL[END]):
                continue
            if piece.startswith("##") and found:
                found[-1] += piece[2:]
            else:
                found.append(piece.removeprefix("##"))
        return found


Schema = Annotated[Pixels | Table | Text, Field(discriminator="kind")]
"""Any of them; told by `kind` in JSON."""
