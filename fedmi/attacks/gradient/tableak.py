"""TabLeak: rows of a table from an update, by an ensemble of relaxed searches."""

from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.ensemble import aligned, entropies, pooled
from fedmi.attacks.engine.evidence import UPDATES, Evidence
from fedmi.attacks.engine.gradient_matching import GradientMatching
from fedmi.attacks.engine.matching import Problem
from fedmi.attacks.engine.protected import PRUNING
from fedmi.attacks.engine.tables import RelaxedRows, as_rows, as_shares, table_of
from fedmi.attacks.engine.unknowns import Unknown
from fedmi.attacks.engine.whitened import Whitening, whitening


class TabLeak(GradientMatching):
    """Rows found by matching the direction of their gradient, categories relaxed, many at a time.

    Minimises 1 - cos(simulated, observed) by Adam on the sign of its gradient over logits z: a
    category is softmax(z), a number sigmoid(z) (`softmax`; off: the entries themselves, boxed into
    [0, 1]). `restarts` searches start at U(-1, 1); with `pooled` their rows are aligned with those
    of the search of least loss (Hungarian algorithm, within labels), every entry is the median over
    those of about least loss, and a record's confidence is 1 less the mean entropy of its columns
    over all of them (`ensemble.entropies`). Else the search of least loss is the answer, and its
    loss the confidence. The answer is valid rows: the largest level, a number in [0, 1].

    A single clean or pruned gradient of a model whose first layer is linear is matched in
    standardised columns (`whiten`, see `engine.whitened`): the paper's models are fed such columns,
    which ours need not be. An update of several steps is simulated, and matched as it is.

    Threat model: honest-but-curious, sees one update and the model it started from; the meaning of
    the columns is known. Labels and batch order are used where granted, recovered or tried if not
    (see `InvertingGradients`). Samples [n, 1, 1, entries]. Raises AttackError for records that are
    no table.
    """

    kind: Literal["tableak"] = "tableak"
    paper: ClassVar[str] = (
        "Vero, Balunovic, Dimitrov, Vechev: TabLeak - Tabular Data Leakage in Federated Learning. "
        "ICML 2023"
    )

    steps: int = Field(default=1500, ge=1, le=1_000_000, description="evaluations of the loss")
    restarts: int = Field(default=30, ge=1, le=1024, description="searches of the ensemble")
    learning_rate: float = Field(default=0.06, gt=0, le=10, description="Adam's step, in logits")
    signed: bool = Field(default=True, description="descend along the sign of the gradient")
    decay: Literal["none", "step", "cosine"] = Field(
        default="none", description="of the step: as in the paper, tenfold three times, or a cosine"
    )
    softmax: bool = Field(default=True, description="relax categories; off: search the entries")
    whiten: bool = Field(
        default=True,
        description="match in standardised columns, by public rows or the schema; the paper's "
        "models are fed such columns",
    )
    pooled: bool = Field(
        default=True, description="the median of the searches; off: the one of least loss"
    )
    pooled_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the searches, those of least loss, that are pooled; the paper's is 1",
    )
    pooled_within: float = Field(
        default=2.0,
        ge=1,
        description="searches are pooled whose loss is at most so many times the least: one that "
        "has found the rows is not outvoted (the paper pools all)",
    )

    channels: ClassVar = UPDATES
    reads_schemas: ClassVar = frozenset({"table"})

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign="hard" if self.signed else "none",
            decay=self.decay,
            patience=self.patience,
            stop_below=self.stop_below,
        )

    def unit(self) -> Literal["grey", "absolute"]:
        return "absolute"

    def simulates(self, evidence: Evidence) -> bool:
        """One step is read as the gradient that it is."""
        several = any(len(steps) > 1 for steps in evidence.plan.parties)
        return several and super().simulates(evidence)

    def unknown(self, case: Case, evidence: Evidence) -> RelaxedRows:
        turn = self._turn(case, evidence)
        return RelaxedRows(table_of(case), self.softmax, turn.inputs if turn else None)

    def planned(self, case: Case, evidence: Evidence) -> Evidence:
        turn = self._turn(case, evidence)
        planned = super().planned(case, evidence)
        return turn.evidence(planned) if turn else planned

    def _turn(self, case: Case, evidence: Evidence) -> Whitening | None:
        """Not of several steps, whose path it would change, nor of what more than pruning changed:
        noise would grow with the entries that hardly vary."""
        changed = any(PRUNING not in title for title in case.knowledge.protections)
        if not self.whiten or changed or self.simulates(evidence):
            return None
        return whitening(case, table_of(case))

    def start(self, case: Case, evidence: Evidence, number: int) -> Tensor:
        """U(-1, 1) logits, or U(0, 1) entries."""
        rng = case.seed.child(evidence.target.id, number).torch()
        drawn = torch.rand((evidence.plan.records, *case.knowledge.input_shape), generator=rng)
        return 2 * drawn - 1 if self.softmax else drawn

    def answer(
        self, problem: Problem, points: Tensor, losses: Tensor, unknown: Unknown
    ) -> Reconstruction:
        assert isinstance(unknown, RelaxedRows)
        schema, best = unknown.schema, int(losses.argmin())
        labels = problem.labels.to(points.device)
        shares = unknown.shares(points) if self.softmax else as_shares(schema, points)
        found, confidence = shares[best], -losses[best].repeat(shares.shape[1])
        order = losses.argsort()[: int(losses.isfinite().sum())]
        if self.pooled and len(order) > 1:
            members = aligned(schema, shares[order], labels[order])
            found = pooled(members[: self._agreeing(losses[order])])
            confidence = 1 - entropies(schema, members).mean(1)
        return Reconstruction(
            target=problem.evidence.target,
            samples=as_rows(schema, found),
            labels=labels[best],
            confidence=confidence,
            flags=problem.evidence.flags,
        )

    def _agreeing(self, losses: Tensor) -> int:
        """How many of the searches, least loss first, are pooled."""
        near = int((losses <= self.pooled_within * losses[0]).sum())
        return min(near, ceil(self.pooled_share * len(losses)))
