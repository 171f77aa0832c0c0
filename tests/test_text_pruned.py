"""Place rows and DAGER on pruned gradients, told of the pruning and not."""

from dataclasses import replace

import pytest
from torch import Tensor

from fedmi.attacks.base import Attack
from fedmi.attacks.gradient.dager import Dager
from fedmi.attacks.gradient.place_rows import PlaceRows
from fedmi.models.text_transformer import TextTransformer
from fedmi.protections.pruning import largest
from fedmi.training.local import mean_gradient
from tests.text_cases import DECODER, ENCODER, built, sentences, text_case, tokens_right

DAGER = Dager(position="curious_server", channel="gradient")
PLACES = PlaceRows(position="curious_server", channel="gradient")


def attacked(
    attack: Attack, spec: TextTransformer, told: bool, seed: int, truth: Tensor
) -> tuple[float, frozenset[str]]:
    batch = sentences(1, seed)
    gradient = mean_gradient(built(spec), *batch)
    case = text_case(spec, [{name: largest(part, 0.5) for name, part in gradient.items()}], [1])
    if told:
        case = replace(case, knowledge=replace(case.knowledge, protections=("gradient_pruning",)))
    (answer,) = attack.reconstruct(case)
    return tokens_right(answer, truth), answer.flags


@pytest.mark.parametrize("spec", [DECODER, ENCODER])
@pytest.mark.parametrize("attack", [DAGER, PLACES])
def test_told_of_pruning_it_reads_more(attack: Attack, spec: TextTransformer) -> None:
    truth = sentences(1, 22)[0]
    untold, _ = attacked(attack, spec, False, 22, truth)
    told, flags = attacked(attack, spec, True, 22, truth)
    blind, _ = attacked(attack, spec, True, 77, truth)
    assert told >= untold
    assert told > blind + 0.5
    assert ("rows_pruned" in flags) == (attack is DAGER)
