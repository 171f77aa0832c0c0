"""Share of the labels of a batch that were recovered."""

import math
from collections import Counter
from typing import Literal

from fedmi.metrics.base import Matched, Metric
from fedmi.metrics.judge import Judge


class LabelRecoveryRate(Metric):
    """Overlap of recovered and true labels as multisets, over the longer of the two; in [0, 1].

    sum_c min(recovered_c, true_c) / max(n, m). With as many labels returned as there are records
    (m = n) this is the share recovered; naming every class is no way to score.
    """

    kind: Literal["label_recovery_rate"] = "label_recovery_rate"
    paper = "Zhao, Mopuri, Bilen: iDLG. arXiv:2001.02610, 2020"

    measures = "labels"
    schemas = frozenset({"pixels", "table", "text"})
    higher_is_leakier = True

    def score(self, matched: Matched, judge: Judge) -> float:
        if matched.recovered_labels is None:
            return math.nan
        recovered = Counter(matched.recovered_labels.tolist())
        true = Counter(matched.labels.tolist())
        return (recovered & true).total() / max(recovered.total(), true.total())
