"""What a run says of a prior-only that was weaker than the attack it is held against."""

import torch

from fedmi.attacks.base import Reconstruction
from fedmi.exposure.knowledge import Target
from fedmi.runs.evidence import weak_prior


def answer(*flags: str) -> Reconstruction:
    target = Target("t", round=3, clients=(0,))
    return Reconstruction(target, None, None, torch.zeros(1), frozenset(flags))


def test_a_twin_with_nothing_to_read_is_blind() -> None:
    assert weak_prior([answer()], [answer("zero_gradients")]) == {(3, "prior_only_blind")}


def test_a_twin_that_noticed_a_weakness_of_its_own_is_weaker() -> None:
    found = weak_prior([answer()], [answer("not_converged", "rank_deficient: layer 2")])
    weaker = {"prior_only_weaker: not_converged", "prior_only_weaker: rank_deficient"}
    assert found == {(3, flag) for flag in weaker}


def test_the_same_weakness_on_both_sides_says_nothing() -> None:
    ours, theirs = answer("rank_deficient: layer 4"), answer("rank_deficient: layer 2")
    assert weak_prior([ours], [theirs]) == set()
    assert weak_prior([answer("non_finite")], [answer("non_finite")]) == set()
