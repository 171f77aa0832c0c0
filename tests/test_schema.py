"""What records mean: tables and texts beside pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmi.data.checks import checked
from fedmi.data.dataset import DataError
from fedmi.data.records import Ints, Records, Split
from fedmi.data.truth import Truth
from fedmi.exposure.knowledge import Target
from fedmi.exposure.schema import PADDING, SPECIAL, Column, Pixels, Schema, Table, Text
from fedmi.metrics.matching import match

COLUMNS = (
    Column(name="age", low=18, high=90),
    Column(name="colour", levels=("red", "green", "blue")),
    Column(name="income"),
)
TABLE = Table(columns=COLUMNS)
TEXT = Text(pieces=(*SPECIAL, "the", "state", "un", "##ion", "of"), length=8)


def rows(*values: tuple[float, int, float]) -> Tensor:
    found = [[age, *(float(level == k) for k in range(3)), income] for age, level, income in values]
    return torch.tensor(found).reshape(len(values), 1, 1, 5)


def sentences(*ids: list[int]) -> Tensor:
    padded = [[*line, *[PADDING] * (8 - len(line))] for line in ids]
    return torch.tensor(padded, dtype=torch.float32).reshape(len(ids), 1, 1, 8)


def truth_of(records: Records, used: dict[tuple[int, int], Ints]) -> Truth:
    return Truth(Split(records, records, records, 2, identity_disjoint=False), used)


def test_a_table_knows_the_places_of_its_columns() -> None:
    assert TABLE.places == (slice(0, 1), slice(1, 4), slice(4, 5))
    assert TABLE.entries == 5


def test_the_typical_row_has_the_commonest_level_and_the_median() -> None:
    typical = TABLE.typical(rows((0.2, 1, 0.0), (0.4, 1, 1.0), (0.9, 2, 0.5)))
    assert torch.allclose(typical, rows((0.4, 1, 0.5)))


def test_rows_cost_their_columns_evenly() -> None:
    cost = TABLE.cost(rows((0.5, 0, 0.5)), rows((0.5, 0, 0.5), (0.5, 2, 0.5), (0.2, 0, 0.5)))
    assert torch.allclose(cost, torch.tensor([[0, 1 / 3, 0.1]]))


def test_sentences_cost_the_words_that_are_wrong() -> None:
    true = sentences([2, 4, 5, 3], [2, 8, 4, 6, 7, 3])
    cost = TEXT.cost(sentences([2, 4, 5, 3], [2, 8, 5, 6, 7, 3]), true)
    assert cost.tolist() == [[0, 4], [1, 1]]


def test_the_typical_sentence_has_the_commonest_tokens_and_padding_says_nothing() -> None:
    typical = TEXT.typical(sentences([2, 4, 5, 3], [2, 4, 6, 3], [2, 8, 6, 7]))
    assert torch.equal(typical, sentences([2, 4, 6, 3]))
    assert not TEXT.missing((2, 1, 1, 8)).any()


def test_pieces_are_joined_to_words_without_special_tokens() -> None:
    assert TEXT.words(sentences([2, 5, 8, 4, 6, 7, 3])[0]) == ["state", "of", "the", "union"]
    assert TEXT.words(sentences([2, 1, 7, 3])[0]) == ["[UNK]ion"]


@pytest.mark.parametrize(
    ("schema", "records", "why"),
    [
        (Pixels(), torch.full((1, 1, 1, 2), 1.5), "values in [0, 1]"),
        (TEXT, sentences([2, 9, 3]), "ids 0 to 8"),
        (TEXT, sentences([2, 4, 3]) + 0.5, "whole numbers"),
    ],
)
def test_what_is_no_record_is_named(schema: Schema, records: Tensor, why: str) -> None:
    assert why in schema.flaw(records)


def test_ids_beyond_the_vocabulary_are_no_data() -> None:
    with pytest.raises(DataError, match="ids 0 to 8 are right"):
        checked(sentences([2, 9, 3], [2, 4, 3]).numpy(), np.array([0, 1]), "here", schema=TEXT)


@given(st.permutations(range(4)))
def test_shuffled_sentences_find_their_own(order: list[int]) -> None:
    true = sentences([2, 4, 5, 3], [2, 8, 4, 6, 7, 3], [2, 6, 3], [2, 5, 5, 5, 3])
    labels = np.array([0, 1, 0, 1])
    records = Records(true.numpy(), labels, labels, np.arange(4), TEXT)
    truth = truth_of(records, {(1, 0): np.arange(4)})
    target = Target("t", round=1, clients=(0,))
    found = match(true[list(order)], None, target, truth)
    assert found.samples is not None
    assert torch.equal(found.samples, true)
    assert found.schema == TEXT


def test_a_sentence_that_is_not_returned_counts_as_nothing() -> None:
    true = sentences([2, 4, 5, 3], [2, 8, 4, 6, 7, 3])
    labels = np.array([0, 1])
    records = Records(true.numpy(), labels, labels, np.arange(2), TEXT)
    truth = truth_of(records, {(1, 0): np.arange(2)})
    found = match(true[1:], None, Target("t", round=1, clients=(0,)), truth)
    assert found.samples is not None
    assert torch.equal(found.samples[1], true[1])
    assert not found.samples[0].any()
