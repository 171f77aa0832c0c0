"""Which tokens occur in a batch, whatever their order and sentence."""

import math
from typing import Literal

from fedmi.exposure.schema import Text
from fedmi.metrics.base import Matched, Metric
from fedmi.metrics.judge import Judge
from fedmi.metrics.sentences import f1, tokens


class TokenSetF1(Metric):
    """F1 of the set of tokens in all reconstructed sentences against that in all true ones.

    2 |found & true| / (|found| + |true|), in [0, 1], special tokens left out. What an attack
    reads off the embedding's gradient before it has put anything in order.
    """

    kind: Literal["token_set_f1"] = "token_set_f1"
    paper = (
        "Melis, Song, De Cristofaro, Shmatikov: Exploiting Unintended Feature Leakage in "
        "Collaborative Learning. IEEE S&P 2019 (the words of a batch, from the embedding's update)"
    )

    schemas = frozenset({"text"})
    higher_is_leakier = True

    def score(self, matched: Matched, judge: Judge) -> float:
        samples = matched.samples
        unreadable = samples is None or not bool(samples.isfinite().all())
        if unreadable or matched.of_class or not isinstance(matched.schema, Text):
            return math.nan
        assert samples is not None
        found, true = set(tokens(samples.flatten())), set(tokens(matched.references.flatten()))
        return f1(len(found & true), len(found), len(true))
