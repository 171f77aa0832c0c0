"""What the guesses of an auditor prove about epsilon."""

import math
from typing import Literal

from pydantic import Field

from fedmi.metrics.base import Matched, Metric
from fedmi.metrics.judge import Judge
from fedmi.protections.audit.bounds import SHARE, count_correct, one_run_epsilon
from fedmi.protections.audit.power import Gaussian, expected_bound


class EpsilonLowerBound(Metric):
    """Lower bound on the epsilon of the whole training, from one run; at least 0.

    With the given confidence the training is not (e, delta)-DP for any e below the bound, so a
    bound above a claim at the same delta refutes the claim. It holds for each target by itself:
    of k targets about (1 - confidence) k may be too high (`largest_epsilon` holds for all at
    once). `recovered_labels` are the guesses (1 included, 0 left out, -1 no guess), `labels` the
    coins, canary by canary. m guesses, all of them right, give about log(m / 3). Raises ValueError
    if there is not one guess a coin.
    """

    kind: Literal["epsilon_lower_bound"] = "epsilon_lower_bound"
    paper = (
        "Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023, "
        "Theorem 5.2"
    )

    delta: float = Field(
        default=1e-5, ge=0, lt=1, description="that of the claim it is held against"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="that the bound holds")

    measures = "membership"
    schemas = frozenset({"pixels", "table", "text"})
    higher_is_leakier = True

    def ceiling(self, canaries: int, guesses: int) -> float:
        """The bound if an audit of so many canaries made so many guesses, all right."""
        return one_run_epsilon(canaries, guesses, guesses, self.delta, self.confidence)

    def power(
        self, epsilon: float, canaries: int, share: float = SHARE, noise_off_by: float = 1.0
    ) -> float:
        """The median bound of an audit of so many canaries, of which it guesses this share, if the
        claim of this epsilon > 0 is exact, or its noise too small by a factor.

        Of one Gaussian mechanism without sampling, the easiest to audit at a claim.
        """
        exact = Gaussian.claiming(epsilon, self.delta)
        actual = Gaussian(exact.noise_multiplier / noise_off_by)
        return expected_bound(actual, canaries, self.delta, share, self.confidence)

    def score(self, matched: Matched, judge: Judge) -> float:
        if matched.recovered_labels is None:
            return math.nan
        made, correct = count_correct(matched.recovered_labels, matched.labels)
        return one_run_epsilon(len(matched.labels), made, correct, self.delta, self.confidence)
