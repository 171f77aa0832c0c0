"""Sentences out of the update of a transformer that a malicious server has rewired."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine import embedding_rows
from fedmi.attacks.engine.bins import atoms, bins, layout, state, taken_apart
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import Evidence, blind
from fedmi.attacks.engine.first_block import two_blocks
from fedmi.attacks.engine.gathering import Sentence, gathered
from fedmi.attacks.engine.planted import UNALTERED, planted
from fedmi.exposure.schema import START
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.text_transformer import TransformerNet

NOTHING = "no_token_read"


class Decepticons(ClosedForm[None]):
    """Tokens, places and sentences from the bins of the deployment's `malice` of the same kind.

    Neighbouring rows of a measuring layer differ in gradient by the sum of the tokens in one bin,
    each as w (a (E_v + P_p + s) + b): a token at a place, up to scale and shift, and the sentence's
    identity s in entries of its own. A bin is explained by the fewest candidates (token, place)
    that leave less than 1 - `fit` of it, up to `together`, out of those tokens whose embedding
    has a gradient; the paper takes bins of one token and matches place and token in turn. A token
    alone in its bin shows s, which says which sentence it is from and how that begins; tokens that
    share a bin go where their place is free.

    Threat model: a malicious server; several clients with the same model are as one with more
    sentences. Confidence: share of a sentence's places that were read; the others are [UNK].
    Flags: "nothing_planted", "no_token_read" (noise, pruning: answered blind), "several_steps".
    Raises AttackError where the server altered no model, or the model is no text_transformer.
    """

    kind: Literal["decepticons"] = "decepticons"
    paper: ClassVar[str] = (
        "Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein: Decepticons - Corrupted "
        "Transformers Breach Privacy in Federated Learning for Language Models, ICLR 2023"
    )
    position: Literal[Position.MALICIOUS_SERVER] = Position.MALICIOUS_SERVER
    channels: ClassVar = frozenset({Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.AGGREGATE})
    needs: ClassVar = ClosedForm.needs | {Fact.PUBLIC_DATA}
    exploits: ClassVar = frozenset({"decepticons"})
    reads_schemas: ClassVar = frozenset({"text"})

    together: int = Field(default=3, ge=1, le=8, description="most tokens of a bin taken apart")
    fit: float = Field(
        default=0.95, gt=0, lt=1, description="share of a bin that its tokens must explain"
    )

    def readable(self, network: nn.Module) -> None:
        two_blocks(network)

    def evidence(self, case: Case) -> Sequence[Evidence]:
        return planted(case, self.channel)

    def invert(self, case: Case, evidence: Evidence, source: None) -> Reconstruction:
        if UNALTERED in evidence.flags:
            return blind(case, evidence)
        assert case.knowledge.build is not None
        network = case.knowledge.build()
        assert isinstance(network, TransformerNet)
        network = state(network, evidence.base)
        where = layout(network)
        known = atoms(network, where, *self._candidates(evidence, network))
        sums = bins(evidence, len(network.blocks) - 1)
        reads = taken_apart(sums, known, where, self.together, self.fit)
        if not reads:
            return blind(case, replace(evidence, flags=evidence.flags | {NOTHING}))
        found = gathered(reads, known, where, evidence.records, network.causal)
        return _answer(evidence, found)

    def _candidates(self, evidence: Evidence, network: TransformerNet) -> tuple[Tensor, int]:
        tokens = embedding_rows.occurring(evidence)
        if tokens is None:
            tokens = torch.arange(network.tokens.num_embeddings)
        return tokens[(tokens == 1) | (tokens > START)], embedding_rows.places(
            evidence, evidence.input_shape[2]
        )


def _answer(evidence: Evidence, found: Sequence[Sentence]) -> Reconstruction:
    length, records = evidence.input_shape[2], evidence.records
    blank = Sentence(torch.zeros(0))
    rows = [one.row(length) for one in [*found, *[blank] * (records - len(found))]]
    samples = torch.stack([ids for ids, _ in rows]).view(records, 1, 1, length)
    sure = torch.tensor([share for _, share in rows])
    return Reconstruction(evidence.target, samples, None, sure, evidence.flags)
