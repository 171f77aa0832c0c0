"""Sentences from sums of rows of the two embedding tables' gradients, without a search."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.adaptive import adapted
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.embedded import no_text
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.attacks.engine.labels import granted, guessed, recover, silent
from fedmi.attacks.engine.labels.steps import several_steps
from fedmi.attacks.engine.placed import LOST, Placed, placed, visible
from fedmi.attacks.engine.sentence_answers import bags

STEPS = "several_steps"


class PlaceRows(ClosedForm[None]):
    """Which token stands where, as rows of tokens and rows of places have the same sums.

    A token's row of dL/dE is the sum of the slopes dL/dx over the places it stands at, a place's
    row of dL/dP that over the sentences that reach it. So the rows of a group of tokens and of the
    places that they, and no others, stand at have the same sum; the null space of all rows names
    the smallest such groups (`row_sums`). One sentence: every token with its places, exactly. In a
    batch, a group of several tokens and places is taken apart by right angles: behind a layer
    normalisation of the embeddings a slope is orthogonal to token + place (`standing`). Tokens are
    dealt to sentences by their slopes (`assembled`), and then exchanged between them until each
    sentence's own slopes are those seen (`exchanges`; `trials` = 0 leaves that out). More distinct
    tokens and places than the width, or slopes shorter than the rounding of others, leave guesses.
    Of rows that are known to be pruned, the entries kept are compared token by token
    (`pruned_rows`); noise has no such answer.

    Samples [n, 1, 1, length] of ids, surest first; confidence [n] 1 - misfit / 2, 1 if the slopes
    are those seen. Flags: "place_rows_not_visible" (noise, or no table of places: the tokens that
    stand out are dealt to the sentences in no order), "tokens_not_placed",
    "sentences_not_separated", "several_steps" (row sums hold for plain SGD, the slopes of exchanges
    only about).

    Threat model: honest-but-curious, sees one update and the model it started from. Raises
    AttackError if the model is no text classifier.
    """

    kind: Literal["place_rows"] = "place_rows"
    paper: ClassVar[str] = (
        "Melis, Song, De Cristofaro, Shmatikov: Exploiting Unintended Feature Leakage in "
        "Collaborative Learning. IEEE S&P 2019 (rows of the embedding); Lu, Zhang, Chen, Duan: "
        "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers. CVPR 2022 (the "
        "gradient of positions); their row sums are an addition of this project"
    )

    trials: int = Field(
        default=4000,
        ge=0,
        le=10_000_000,
        description="sentences whose slopes are computed to tell those of a batch apart",
    )

    reads_schemas: ClassVar = frozenset({"text"})

    def readable(self, network: nn.Module) -> None:
        if why := no_text(network):
            raise AttackError(f"{self.kind} {why}")

    def invert(self, case: Case, evidence: Evidence, source: None) -> Reconstruction:
        evidence = adapted(case, evidence)
        flags = evidence.flags
        if several_steps(evidence):
            flags |= {STEPS}
        found = placed(case, evidence, self.trials)
        if found is None:
            return self._unplaced(case, evidence, flags | {LOST})
        order = found.misfits.argsort(stable=True)
        return Reconstruction(
            evidence.target,
            found.ids[order][:, None, None].float(),
            _labels(case, evidence, found)[order],
            1 - found.misfits[order].float() / 2,
            flags | found.flags,
        )

    def _unplaced(self, case: Case, evidence: Evidence, flags: frozenset[str]) -> Reconstruction:
        records, length = evidence.records, evidence.input_shape[2]
        samples = torch.zeros(records, 1, 1, length)
        for row, one in enumerate(bags(visible(evidence), records, length)):
            samples[row, 0, 0, : len(one.tokens)] = torch.tensor(one.tokens).float()
        confidence = torch.zeros(records)
        return Reconstruction(
            evidence.target, samples, _recovered(case, evidence), confidence, flags
        )


def _labels(case: Case, evidence: Evidence, found: Placed) -> Tensor:
    """Granted ones where they are not those found; else those that suit the sentences."""
    told = granted(case, evidence)
    if told is not None and not told.sort().values.equal(found.labels.sort().values):
        return told
    return found.labels


def _recovered(case: Case, evidence: Evidence) -> Tensor:
    told = granted(case, evidence)
    if told is not None:
        return told
    return guessed(case, evidence) if silent(case, evidence) else recover(case, evidence)[0]
