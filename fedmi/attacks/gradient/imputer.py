"""The imputer: what public records say of anybody with a label, and nothing of the update."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.evidence import (
    MUTE,
    UPDATES,
    AttackError,
    Evidence,
    blind,
    read,
)
from fedmi.attacks.engine.labels import granted, guessed, recover, silent
from fedmi.attacks.engine.tables import columns_of, table_of
from fedmi.exposure.schema import Table
from fedmi.exposure.words import Fact


class Imputer(Attack):
    """Rows guessed from public rows alone: the baseline of every attack on a table.

    `typical`: of the public rows with the record's label the commonest level of each category and
    the median of each number, the same for every record of a label; right by chance alone.
    `marginal`: every column drawn by itself from all public rows, whatever the label (TabLeak's
    random baseline). Labels are granted, or recovered from the update, which is all that is read of
    it; an update that says nothing is answered with random ones. Confidence is 0.

    Threat model: honest-but-curious, sees one update, and has public rows of the same kind. Samples
    [n, 1, 1, entries]. Raises AttackError for records that are no table, and without public rows.
    """

    kind: Literal["imputer"] = "imputer"
    paper: ClassVar[str] = (
        "Vero, Balunovic, Dimitrov, Vechev: TabLeak - Tabular Data Leakage in Federated Learning. "
        "ICML 2023 (its random baseline); Jayaraman, Evans: Are Attribute Inference Attacks Just "
        "Imputation? CCS 2022"
    )

    guess: Literal["typical", "marginal"] = Field(
        default="typical", description="best single guess a label, or columns drawn at random"
    )

    channels: ClassVar = UPDATES
    needs: ClassVar = frozenset(
        {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.PUBLIC_DATA}
    )
    uses: ClassVar = frozenset({Fact.LABELS})
    reads_schemas: ClassVar = frozenset({"table"})

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        schema, public = table_of(case), case.knowledge.public
        if public is None or not len(public[0]):
            raise AttackError("there are no public records: grant the fact 'public_data'")
        draw = self._typical if self.guess == "typical" else self._drawn
        return tuple(
            self._answer(case, evidence, draw(case, schema, *public))
            for evidence in read(case, self.channel)
        )

    def _answer(
        self, case: Case, evidence: Evidence, guess: Callable[[Evidence, Tensor], Tensor]
    ) -> Reconstruction:
        labels = _labels(case, evidence)
        return Reconstruction(
            target=evidence.target,
            samples=guess(evidence, labels),
            labels=labels,
            confidence=torch.zeros(len(labels)),
            flags=evidence.flags,
        )

    def _typical(
        self, case: Case, schema: Table, inputs: Tensor, known: Tensor
    ) -> Callable[[Evidence, Tensor], Tensor]:
        """By label, of all public rows where a label has none."""

        def guess(evidence: Evidence, labels: Tensor) -> Tensor:
            found = []
            for label in labels.tolist():
                same = known == label
                found.append(median_row(schema, inputs[same] if same.any() else inputs))
            return torch.cat(found)

        return guess

    def _drawn(
        self, case: Case, schema: Table, inputs: Tensor, known: Tensor
    ) -> Callable[[Evidence, Tensor], Tensor]:
        def guess(evidence: Evidence, labels: Tensor) -> Tensor:
            rng = case.seed.child(evidence.target.id, "marginal").torch()
            parts = []
            for _, place in columns_of(schema):
                rows = torch.randint(len(inputs), (len(labels),), generator=rng)
                parts.append(inputs[rows][..., place])
            return torch.cat(parts, -1)

        return guess


def median_row(schema: Table, inputs: Tensor) -> Tensor:
    """[n, 1, 1, entries] -> [1, 1, 1, entries]: commonest levels, medians of the numbers, which
    are within a tolerance of more rows than the mean of a skewed column."""
    found = schema.typical(inputs)
    assert found is not None
    for column, place in columns_of(schema):
        if not column.levels:
            found[..., place] = inputs[..., place].quantile(0.5, dim=0, keepdim=True)
    return found


def _labels(case: Case, evidence: Evidence) -> Tensor:
    told = granted(case, evidence)
    if told is not None:
        return told
    if evidence.flags & MUTE:
        drawn = blind(case, evidence, samples=False).labels
        assert drawn is not None
        return drawn
    return guessed(case, evidence) if silent(case, evidence) else recover(case, evidence)[0]
