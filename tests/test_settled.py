"""A search that begins with sentences does not throw them away for worse ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.embedded import Vocabulary, WrittenText
from fedmi.attacks.engine.evidence import read
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.settled import settled
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from tests.small_language import case_of, gradients, sentences


@dataclass
class Distance:
    """Of the vectors to those of a sentence; of places 1 and 2 only."""

    wanted: Tensor
    restarts: int = 1

    def losses(self, points: Tensor) -> Tensor:
        return (points - self.wanted)[:, :, 1:3].square().sum((1, 2, 3))


def test_it_is_left_only_for_what_fits_clearly_better() -> None:
    words = Vocabulary(torch.eye(8), torch.zeros(4, 8))
    unknown, allowed = WrittenText(words, 0, 4), torch.arange(4, 8)
    truth, near, far = (words.tokens[torch.tensor([[2, *some, 3]])] for some in PAIRS)
    truth, near, far = (some / words.spread for some in (truth, near, far))
    batch = sentences(1, 1)
    (evidence,) = read(case_of(gradients([batch]), [batch]), Channel.GRADIENT)
    labels = torch.tensor([[[0, 4]]])
    objective = Distance(truth)
    for start, end, kept in ((near, far, True), (far, near, True), (near, truth, False)):
        problem = Problem(evidence, labels, start[None], Seed.root(0))
        found, loss = settled(objective, unknown, [problem], lambda _: allowed, end[None])
        assert found[0].equal(start if kept else end)
        assert loss.equal(objective.losses(found))


PAIRS = ((4, 5), (4, 6), (6, 7))
