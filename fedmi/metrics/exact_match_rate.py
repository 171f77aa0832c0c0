"""Share of sentences recovered whole."""

from typing import Literal

from torch import Tensor

from fedmi.exposure.schema import Text
from fedmi.metrics.sentences import SentenceMetric, tokens


class ExactMatchRate(SentenceMetric):
    """1 where every token of the sentence is there, in order, and no other; special ones aside."""

    kind: Literal["exact_match_rate"] = "exact_match_rate"
    paper = "Petrov et al.: DAGER: Exact Gradient Inversion for Large Language Models. NeurIPS 2024"

    def compare(self, found: Tensor, true: Tensor, schema: Text) -> float:
        return float(tokens(found) == tokens(true))
