"""The sentences that the rows of the two embedding tables' gradients tell."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.assembled import assembled
from fedmi.attacks.engine.embedded import PLACES
from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.exchanges import EXACT, Exchanges
from fedmi.attacks.engine.standing import stood
from fedmi.attacks.engine.token_rows import token_rows
from fedmi.exposure.schema import END, UNKNOWN

LOST, UNPLACED, MIXED = "place_rows_not_visible", "tokens_not_placed", "sentences_not_separated"

PROVEN = 0.75
"""Share of the tokens whose slopes must be known of pruned rows before others are searched for."""


@dataclass(frozen=True, eq=False)
class Placed:
    """Sentences ids [n, length] with the labels [n] that suit them best; [UNK] where no token is
    known. misfits: of each, [n], 0 = its gradient is what the rows show; see `Exchanges`."""

    ids: Tensor
    labels: Tensor
    misfits: Tensor
    flags: frozenset[str]

    @property
    def exact(self) -> bool:
        return bool((self.misfits <= EXACT).all())


def placed(case: Case, evidence: Evidence, trials: int) -> Placed | None:
    """None where rows are lost in noise, or there are none of places."""
    told = stood(evidence)
    if not told.found:
        return None
    start = assembled(told, evidence.records, evidence.input_shape[2])
    pruned = evidence.support is not None and PLACES in evidence.support
    if pruned and float(start.known.sum()) < PROVEN * float((start.ids > END).sum()):
        trials = 0  # too few slopes to judge a sentence by
    words = token_rows(evidence.gradient).words
    seed = case.seed.child(evidence.target.id, "exchanges")
    search = Exchanges.of(case, evidence, words, trials, seed)
    found = search.searched(start)
    placed = Placed(found.ids, search.labels, search.misfits, frozenset())
    flags = set()
    if (pruned or not placed.exact) and bool((~found.sure | (found.ids == UNKNOWN)).any()):
        flags.add(UNPLACED)
    if not placed.exact and evidence.records > 1:
        flags.add(MIXED)
    return Placed(found.ids, search.labels, search.misfits, frozenset(flags))


def visible(evidence: Evidence) -> Tensor:
    """Tokens whose row stands out, [CLS] and [SEP] left out, longest row first."""
    words: Tensor = token_rows(evidence.gradient).words
    return words if len(words) else torch.tensor([UNKNOWN])
