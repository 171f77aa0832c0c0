"""Scores of sentences against naive oracles, and how reports show them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmi.exposure.component import components
from fedmi.exposure.schema import PIXELS, SPECIAL, Column, Table, Text
from fedmi.metrics.base import Matched, Metric
from fedmi.metrics.exact_match_rate import ExactMatchRate
from fedmi.metrics.judge import Judge
from fedmi.metrics.rouge import Rouge1, Rouge2, RougeL, longest_common
from fedmi.metrics.sentences import SentenceMetric
from fedmi.metrics.token_accuracy import TokenAccuracy
from fedmi.metrics.token_set_f1 import TokenSetF1
from fedmi.report.data import Readings, ReadRow
from fedmi.report.html import render
from fedmi.report.read_text import readings_text
from fedmi.report.readable import compared, readable
from fedmi.scenario.schema import PRIMARY
from tests.test_report import realistic

LENGTH = 8
TEXT = Text(pieces=(*SPECIAL, "the", "state", "un", "##ion", "of", ".", "is"), length=LENGTH)
THE, STATE, UN, ION, OF, STOP, IS = range(4, 11)
JUDGE = Judge(torch.nn.Identity(), torch.zeros(2, 1), torch.zeros(1, 1), torch.zeros(1), 1.0)
METRICS: list[Metric] = [
    TokenAccuracy(), Rouge1(), Rouge2(), RougeL(), ExactMatchRate(), TokenSetF1(),
]  # fmt: skip
Ids = Sequence[int]
sentence = st.lists(st.integers(THE, IS), min_size=1, max_size=LENGTH - 2)


def row(ids: Ids) -> list[float]:
    return [2, *ids, 3, *[0] * (LENGTH - 2 - len(ids))]


def rows(*sentences: Ids) -> Tensor:
    return torch.tensor([row(ids) for ids in sentences]).float().reshape(-1, 1, 1, LENGTH)


def pair(found: Tensor, true: Tensor, *, of_class: bool = False) -> Matched:
    nobody = torch.full((len(true),), -1)
    return Matched(found, true, torch.zeros(len(true)), nobody, None, of_class, TEXT)


def score(metric: Metric, found: Ids, true: Ids) -> float:
    return metric.score(pair(rows(found), rows(true)), JUDGE)


def naive_words(ids: Ids) -> list[str]:
    text = " ".join(TEXT.pieces[i] for i in ids).replace(" ##", "").replace("##", "")
    return [word for word in text.split() if word != "."]


def naive_f1(found: list[object], true: list[object]) -> float:
    left, common = list(true), 0
    for item in found:
        if item in left:
            left.remove(item)
            common += 1
    if not found and not true:
        return 1.0
    precision = common / len(found) if found else 0.0
    recall = common / len(true) if true else 0.0
    return 2 * precision * recall / (precision + recall) if common else 0.0


def naive_lcs(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + naive_lcs(first[1:], second[1:])
    return max(naive_lcs(first[1:], second), naive_lcs(first, second[1:]))


@settings(max_examples=150, deadline=None)
@given(sentence, sentence)
def test_rouge_is_what_its_definition_says(found: Ids, true: Ids) -> None:
    ours, theirs = naive_words(found), naive_words(true)
    assert score(Rouge1(), found, true) == pytest.approx(naive_f1([*ours], [*theirs]))
    if max(len(ours), len(theirs)) > 1:
        pairs = [list(pairwise(w)) for w in (ours, theirs)]
        assert score(Rouge2(), found, true) == pytest.approx(naive_f1([*pairs[0]], [*pairs[1]]))
    common = naive_lcs(ours, theirs)
    assert longest_common(ours, theirs) == common
    wanted = 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0
    assert score(RougeL(), found, true) == pytest.approx(wanted)


@settings(max_examples=100, deadline=None)
@given(sentence, sentence)
def test_token_scores_are_what_their_definitions_say(found: Ids, true: Ids) -> None:
    right = sum(a == b for a, b in zip(row(found)[1:], true, strict=False))
    assert score(TokenAccuracy(), found, true) == pytest.approx(right / len(true))
    assert score(ExactMatchRate(), found, true) == float(list(found) == list(true))
    wanted = naive_f1([*set(found)], [*set(true)])
    assert score(TokenSetF1(), found, true) == pytest.approx(wanted)


def test_a_worked_example() -> None:
    """Lin 2004's ROUGE-L, beta = 1: LCS "the union is" of four and four words."""
    found, true = [THE, UN, ION, IS, STATE], [THE, STATE, UN, ION, IS, STOP]
    assert score(RougeL(), found, true) == pytest.approx(3 / 4)
    assert score(Rouge1(), found, true) == 1
    assert score(Rouge2(), found, true) == pytest.approx(1 / 3)
    assert score(TokenAccuracy(), found, true) == pytest.approx(1 / 6)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.kind)
def test_exact_is_best_and_nothing_is_worst(metric: Metric) -> None:
    true = rows([THE, STATE, OF], [UN, ION, IS, STOP])
    assert metric.score(pair(true.clone(), true), JUDGE) == 1
    assert metric.score(pair(torch.zeros_like(true), true), JUDGE) == 0
    assert metric.higher_is_leakier


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.kind)
def test_what_cannot_be_scored_is_nan(metric: Metric) -> None:
    true = rows([THE, STATE])
    assert math.isnan(metric.score(pair(true.clone(), true, of_class=True), JUDGE))
    assert math.isnan(metric.score(pair(true * torch.nan, true), JUDGE))
    none = Matched(None, true, torch.zeros(1), torch.zeros(1), None, False, TEXT)
    assert math.isnan(metric.score(none, JUDGE))


def test_the_token_set_of_a_batch_knows_no_order_and_no_sentence() -> None:
    true = rows([THE, STATE, OF], [UN, ION, IS, STOP])
    dealt = rows([STOP, UN, THE, IS], [ION, OF, STATE])
    assert TokenSetF1().score(pair(dealt, true), JUDGE) == 1
    assert ExactMatchRate().score(pair(dealt, true), JUDGE) == 0


def test_metrics_of_text_are_for_text_alone() -> None:
    kinds = components("fedmi.metrics")
    for metric in METRICS:
        assert metric.schemas == {"text"}
        assert kinds[metric.kind] is type(metric)
    assert "text" not in kinds["psnr"].schemas  # type: ignore[attr-defined]
    assert "text" in kinds["attack_accuracy_top1"].schemas  # type: ignore[attr-defined]
    assert {"rouge_l", "token_accuracy"} <= {*PRIMARY} <= {*kinds}
    assert issubclass(RougeL, SentenceMetric)


# --- in words


def test_sentences_read_with_what_is_right_in_order() -> None:
    found, true = rows([THE, UN, ION, IS, STATE])[0], rows([THE, STATE, UN, ION, IS])[0]
    assert readable(TEXT, true) == ["the", "state", "union", "is"]
    reading = compared(TEXT, found, true)
    assert reading == (("the", True), ("union", True), ("is", True), ("state", False))
    assert compared(TEXT, torch.zeros(LENGTH), true) == ()


def test_rows_of_a_table_read_column_by_column() -> None:
    table = Table(
        columns=(Column(name="age", low=20, high=70), Column(name="x", levels=("a", "b")))
    )
    found, true = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0.5, 0.0, 1.0])
    assert readable(table, true) == ["age = 45", "x = b"]
    assert compared(table, found, true) == (("age = 45", True), ("x = a", False))
    assert readable(PIXELS, found) == []


def reading(said: str, right: bool = True) -> ReadRow:
    words = tuple((word, True) for word in said.split())
    return ReadRow("r1-c0", "class 1", words, ((said, right),), ())


def test_reports_show_sentences_escaped_and_what_is_right() -> None:
    nasty = "<script>alert(1)</script>"
    shown = Readings(nasty, "curious_server", "gradient", "dager", 1, (reading(nasty),))
    report = replace(realistic(), panels=(), readings=(shown,))
    html = render(report)
    assert nasty not in html
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in html
    assert "<em>nothing</em>" in html
    assert "returned images or sentences" not in html
    wrong = replace(shown, rows=(reading("peace", right=False),))
    assert "<mark>" not in render(replace(report, readings=(wrong,)))
    assert "returned images or sentences" in render(replace(report, readings=()))


def test_terminals_show_the_first_sentence_of_each_attack() -> None:
    shown = Readings("plain", "curious_server", "gradient", "dager", 1, (reading("we [b]stand"),))
    said = readings_text(replace(realistic(), readings=(shown,) * 10))
    assert said is not None
    assert "dager on plain, curious server through gradient" in said.plain
    assert "[we [b]stand]" in said.plain
    assert "(nothing)" in said.plain
    assert "2 more in report.html" in said.plain
    assert readings_text(realistic()) is None
