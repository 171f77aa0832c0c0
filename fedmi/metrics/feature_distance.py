"""Distance in the evaluator's features."""

from typing import Literal

import torch
from torch import Tensor

from fedmi.metrics.base import Matched
from fedmi.metrics.judge import Judge
from fedmi.metrics.samples import SampleMetric


class FeatureDistance(SampleMetric):
    """Euclidean distance between evaluator features of a sample and of what it should show.

    That is the class's feature centroid for a class target, the private record's own feature
    for a record. From 0; its scale is the evaluator's, so compare it within one seed only.
    """

    kind: Literal["feature_distance"] = "feature_distance"
    paper = "Zhang et al.: The Secret Revealer. CVPR 2020"

    schemas = frozenset({"pixels", "table", "text"})
    higher_is_leakier = False

    def each(self, samples: Tensor, matched: Matched, judge: Judge) -> Tensor:
        if matched.of_class:
            wanted = judge.centroids[matched.labels]
        else:
            wanted = judge.features(matched.references)
        distance: Tensor = torch.linalg.vector_norm(judge.features(samples) - wanted, dim=1)
        return distance
