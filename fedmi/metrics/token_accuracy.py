"""Share of tokens in their place."""

from typing import Literal

from torch import Tensor

from fedmi.exposure.schema import END, UNKNOWN, Text
from fedmi.metrics.sentences import SentenceMetric


class TokenAccuracy(SentenceMetric):
    """Share of the reference's positions, special tokens left out, that hold the right token.

    In [0, 1]. A word found one place further on does not count; ROUGE says what it is worth.
    """

    kind: Literal["token_accuracy"] = "token_accuracy"
    paper = "Deng et al.: TAG: Gradient Attack on Transformer-based Language Models. EMNLP 2021"

    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        there = (true == UNKNOWN) | (true > END)
        return float((found == true)[there].double().mean()) if bool(there.any()) else 1.0
