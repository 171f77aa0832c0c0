"""ROUGE: words, pairs of words, and the longest common subsequence."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fedmi.exposure.schema import Text
from fedmi.metrics.sentences import SentenceMetric, f1, spoken

ROUGE = "Lin: ROUGE: A Package for Automatic Evaluation of Summaries. ACL 2004 workshop"


class Rouge1(SentenceMetric):
    """F1 of the words, as multisets, of a sentence against its reference; in [0, 1].

    Pieces are joined into words first; punctuation marks are no words.
    """

    kind: Literal["rouge_1"] = "rouge_1"
    paper = ROUGE

    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        return overlap(spoken(found, schema), spoken(true, schema), 1)


class Rouge2(SentenceMetric):
    """F1 of the pairs of neighbouring words, as multisets; in [0, 1].

    Where neither sentence has two words, they are compared word by word.
    """

    kind: Literal["rouge_2"] = "rouge_2"
    paper = ROUGE

    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        ours, theirs = spoken(found, schema), spoken(true, schema)
        return overlap(ours, theirs, 2 if max(len(ours), len(theirs)) > 1 else 1)


class RougeL(SentenceMetric):
    """F1 of the longest common subsequence of words: 2 LCS / (words found + true); in [0, 1]."""

    kind: Literal["rouge_l"] = "rouge_l"
    paper = ROUGE

    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        ours, theirs = spoken(found, schema), spoken(true, schema)
        return f1(longest_common(ours, theirs), len(ours), len(theirs))


def overlap(found: Sequence[str], true: Sequence[str], n: int) -> float:
    """F1 of the n-grams, as multisets."""
    ours, theirs = _grams(found, n), _grams(true, n)
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of words that stands in both, in order, gaps allowed."""
    best = [0] * (len(second) + 1)
    for word in first:
        before = list(best)
        for place, other in enumerate(second, start=1):
            best[place] = (
                before[place - 1] + 1 if word == other else max(before[place], best[place - 1])
            )
    return best[-1]
