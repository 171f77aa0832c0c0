"""DAGER: whole sentences, exactly, from the row spaces of a transformer's first gradients."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine import embedding_rows
from fedmi.attacks.engine.adaptive import adapted
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.combinations import Combining, Puzzle
from fedmi.attacks.engine.confirmed import confirmed
from fedmi.attacks.engine.evidence import Evidence, blind
from fedmi.attacks.engine.first_block import MIXED, READ, FirstBlock, Pairs, two_blocks
from fedmi.attacks.engine.labels.steps import several_steps
from fedmi.attacks.engine.leftover import Leftover
from fedmi.attacks.engine.placed import placed
from fedmi.attacks.engine.prefixes import Found, grown
from fedmi.attacks.engine.sentence_answers import answered, bags
from fedmi.attacks.engine.spans import Span, span, whole_rows
from fedmi.exposure.schema import PADDING, START, UNKNOWN
from fedmi.models.text_transformer import TransformerNet

RANK, NO_PAIRS = "rank_too_high", "no_candidates"
STEPS, ROUNDED = "several_steps", "signal_below_rounding"
PRUNED = "rows_pruned"
FEWEST_ROWS = 1.0
"""Whole rows of a pruned gradient that a span needs, as a multiple of the width."""
SEEN = 0.9
"""Share of the rank of what attention reads that what comes out of it has to have."""
DECOYS = 64
LOOSE = 0.4
"""Distance, of the usual one, of tokens that are known to occur somewhere."""
MOST_PAIRS = 5000
"""Pairs of token and place with which an encoder's combinations can still be searched."""


class Dager(ClosedForm[None]):
    """Sentences whose tokens lie in the row space of the first block's gradients.

    A linear layer's dL/dW = D^T X has its inputs X as row space while there are fewer of them than
    X is wide. So (1) each token v at each place p is a candidate if what attention reads of it,
    norm(E_v + P_p), is in the span of the gradients of query, key and value. Sums E_v + P_p in it
    bring others with them, so that this leaves a set of tokens rather than a token a place. And
    (2) what comes out of attention depends on the sentence, and is in the span of the next layer
    that reads it, the first of block 0's MLP. (The paper takes the second block's query: the same
    up to an MLP; but where one token is classified and there are two blocks, the last block's
    gradients have the rank of its heads only; with three blocks it shows less above rounding.)

    Decoder: prefixes grow greedily, a token being added if (2) holds. Exact while the distinct
    prefixes of a batch are fewer than the width.
    Encoder: every place depends on all tokens. (2) is asked of the first token, the same in all
    sentences: simulated annealing over one candidate a place, of every possible length, in
    whitened coordinates (`annealing`; the paper tries combinations in turn). Sentences found are
    taken off the rows of the embeddings, which leaves fewer candidates for the others. Exact if
    found; what is found depends on how many candidates there are (see `tries`).

    Beyond the paper, `embedding_rows` takes the gradient of the embeddings into account: tokens
    and places that have none did not occur, and a token that occurs once shows its place by right
    angles (post_norm); and only sentences of which the batch's gradient of the embeddings is a sum
    count as found. Without it embeddings might as well be frozen.

    Threat model: honest-but-curious, sees one update, knows the architecture. Works on a sum over
    clients as on one batch. Samples: surest first; confidence -log10 of the worst distance over
    that of tokens that are not there, from 1 up if exact; 0 or less for what is a guess. Flags:
    "rank_too_high" (as many tokens as the width, or noise, leave no direction outside the span:
    the answer is the tokens that occurred, in no order), "several_steps" (the model moved between
    the steps: exact for small learning rates only), "sentences_not_found" (fewer exact sentences
    than records: repeated ones, or a search that failed; the rest are guesses), "no_candidates",
    "rows_pruned" (known pruning left too few whole rows: the answer is what `place_rows` tells),
    "signal_below_rounding" (fewer inputs show in what comes out of attention than were read: the
    others' slopes are smaller than float32 rounding of the rest, as in a collapsed model).
    Raises AttackError for a model that is no transformer of text with two blocks or more.
    """

    kind: Literal["dager"] = "dager"
    paper: ClassVar[str] = (
        "Petrov, Dimitrov, Baader, Mueller, Vechev: DAGER - Exact Gradient Inversion for Large "
        "Language Models, NeurIPS 2024"
    )
    reads_schemas: ClassVar = frozenset({"text"})

    tolerance: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="distance to the span of a token that is taken, of "
        "that of tokens that are not there",
    )
    prefixes: int = Field(
        default=256, ge=1, le=100_000, description="prefixes kept at a place, in a decoder"
    )
    tries: int = Field(
        default=64, ge=1, le=10_000, description="combinations annealed a length, in an encoder"
    )
    sweeps: int = Field(
        default=200, ge=5, le=10_000, description="times each place is drawn anew, in an encoder"
    )
    embedding_rows: bool = Field(
        default=True, description="read the gradient of the embeddings as well"
    )

    def readable(self, network: nn.Module) -> None:
        two_blocks(network)

    def invert(self, case: Case, evidence: Evidence, source: None) -> Reconstruction:
        evidence = adapted(case, evidence)
        if several_steps(evidence):
            evidence = replace(evidence, flags=evidence.flags | {STEPS})
        assert case.knowledge.build is not None
        network = case.knowledge.build()
        assert isinstance(network, TransformerNet)
        if whole_rows(evidence, MIXED) < FEWEST_ROWS * evidence.base[f"{MIXED[0]}.weight"].shape[1]:
            return self._by_places(case, evidence)
        block = FirstBlock(network, evidence.base)
        read, mixed = span(evidence, READ), span(evidence, MIXED)
        tokens = embedding_rows.occurring(evidence) if self.embedding_rows else None
        if mixed.full or (read.full and tokens is None):
            return self._unordered(case, evidence, tokens)
        pairs = self._pairs(case, evidence, block, read, tokens)
        if pairs is None:
            return self._unordered(case, evidence, tokens, NO_PAIRS)
        found = self._searched(case, evidence, block, pairs, mixed)
        if self.embedding_rows:
            found = confirmed(block.network, evidence, found, self.tolerance)
        if mixed.rank < SEEN * read.rank and sum(one.whole for one in found) < evidence.records:
            evidence = replace(evidence, flags=evidence.flags | {ROUNDED})
        return answered(case, evidence, found)

    def _by_places(self, case: Case, evidence: Evidence) -> Reconstruction:
        """Sentences that the rows of tokens and places tell, as guesses."""
        flagged = replace(evidence, flags=evidence.flags | {PRUNED})
        known = placed(case, evidence, 0) if self.embedding_rows else None
        if known is None:
            return self._flagged(case, evidence, PRUNED)
        sentences = [tuple(row[row != PADDING].tolist()) for row in known.ids]
        return answered(case, flagged, [Found(one, 1.0, False) for one in sentences])

    def _pairs(
        self, case: Case, evidence: Evidence, block: FirstBlock, read: Span, tokens: Tensor | None
    ) -> Pairs | None:
        """[CLS] at place 0 and every candidate after it; None where there is none."""
        length = evidence.input_shape[2]
        if self.embedding_rows:
            length = embedding_rows.places(evidence, length)
        allowed = torch.arange(block.vocabulary) if tokens is None else tokens
        allowed = allowed[(allowed == UNKNOWN) | (allowed > START)]
        # few tokens are left where the embeddings tell them: rather one too many than a true one
        within = self.tolerance if tokens is None else max(self.tolerance, LOOSE)
        token, place = [torch.tensor([START])], [torch.tensor([0])]
        for at in range(1, length):
            distance = read.distance(block.readings(at))
            near = distance[allowed] < within * distance.median()
            chosen = allowed if read.full else allowed[near]
            token.append(chosen)
            place.append(torch.full_like(chosen, at))
        found = torch.cat(token)
        return block.pairs(found, torch.cat(place)) if len(found) > 1 else None

    def _searched(
        self, case: Case, evidence: Evidence, block: FirstBlock, pairs: Pairs, mixed: Span
    ) -> list[Found]:
        rng = case.seed.child(evidence.target.id, self.kind).torch()
        if block.causal:
            decoys = torch.randint(START + 2, block.vocabulary, (DECOYS,), generator=rng)
            loose = 2 * self.tolerance if self.embedding_rows else self.tolerance
            return grown(block, pairs, mixed, decoys, loose, self.prefixes)
        if len(pairs) > MOST_PAIRS:
            return bags(torch.unique(pairs.token), evidence.records, evidence.input_shape[2])
        leftover = Leftover.of(block.network, evidence) if self.embedding_rows else None
        parts = (Puzzle(block, pairs, mixed), leftover, evidence.records, self.tolerance)
        return Combining(*parts, self.tries, self.sweeps, rng).sentences()

    def _unordered(
        self, case: Case, evidence: Evidence, tokens: Tensor | None, why: str = RANK
    ) -> Reconstruction:
        """The tokens that occurred, dealt to the sentences in no order; blind where unknown."""
        if tokens is None or not len(tokens):
            return self._flagged(case, evidence, why)
        flagged = replace(evidence, flags=evidence.flags | {why})
        return answered(case, flagged, bags(tokens, evidence.records, evidence.input_shape[2]))

    def _flagged(self, case: Case, evidence: Evidence, flag: str) -> Reconstruction:
        return blind(case, replace(evidence, flags=evidence.flags | {flag}))
