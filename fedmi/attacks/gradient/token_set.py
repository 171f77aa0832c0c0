"""The tokens of a batch, from the rows of the embedding table's gradient."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.embedded import no_text
from fedmi.attacks.engine.evidence import MUTE, UPDATES, AttackError, Evidence, blind, read
from fedmi.attacks.engine.text_matching import UNSEEN
from fedmi.attacks.engine.token_rows import TokenRows, token_rows
from fedmi.exposure.schema import END, PADDING, START
from fedmi.exposure.words import Fact

TOO_MANY = "more_tokens_than_places"


class TokenSet(Attack):
    """Which tokens occur in a batch: those whose row in the embedding table's gradient is not zero.

    Exact for a clear gradient or update, as a token that is not there leaves its vector as it was.
    Where most rows are not zero, as under noise, a token counts if its row is longer than the
    median by five robust standard deviations of all rows (flag `token_set_not_visible` where none
    is); of more tokens than the sentences have places, the longest rows are kept (flag
    `more_tokens_than_places`). Order and sentence are not recovered: the samples [n, 1, 1, length]
    hold the tokens once each, longest row first, dealt evenly over the sentences; confidence [n]
    is the mean length of a sentence's rows, the longest being 1.

    Threat model: honest-but-curious, sees one update and the model it started from. Raises
    AttackError if the model is no text classifier.
    """

    kind: Literal["token_set"] = "token_set"
    paper: ClassVar[str] = (
        "Melis, Song, De Cristofaro, Shmatikov: Exploiting Unintended Feature Leakage in "
        "Collaborative Learning. IEEE S&P 2019"
    )

    channels: ClassVar = UPDATES
    needs: ClassVar = frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING})
    reads_schemas: ClassVar = frozenset({"text"})

    def unsuited(self, network: nn.Module) -> str:
        return no_text(network)

    def reconstruct(self, case: Case) -> tuple[Reconstruction, ...]:
        if case.knowledge.build and (why := no_text(case.knowledge.build())):
            raise AttackError(f"{self.kind} {why}")
        return tuple(self._answer(case, item) for item in read(case, self.channel))

    def _answer(self, case: Case, evidence: Evidence) -> Reconstruction:
        if evidence.flags & MUTE:
            return blind(case, evidence)
        seen, count = token_rows(evidence.gradient), evidence.records
        length = case.knowledge.input_shape[2]
        words, strength = _words(seen)
        flags, room = evidence.flags, count * (length - 2)
        if not len(words):
            flags |= {UNSEEN}
        if len(words) > room:
            flags |= {TOO_MANY}
        words, strength = words[:room], strength[:room]
        samples = torch.stack([_sentence(words[row::count], length) for row in range(count)])
        means = [strength[row::count].mean() for row in range(count) if row < len(words)]
        none = [torch.tensor(-torch.inf, dtype=strength.dtype)] * (count - len(means))
        return Reconstruction(
            evidence.target, samples, None, torch.stack([*means, *none]).float(), flags
        )


def _words(seen: TokenRows) -> tuple[Tensor, Tensor]:
    """(tokens but [CLS] and [SEP], length of each one's row over the longest), longest first."""
    kept = (seen.ids != START) & (seen.ids != END)
    strength = seen.strength[kept]
    return seen.ids[kept], strength / strength[:1].clamp_min(1e-300)


def _sentence(words: Tensor, length: int) -> Tensor:
    """[1, 1, length]: [CLS], the tokens, [SEP], padding."""
    ids = torch.full((length,), float(PADDING))
    ids[0], ids[1 : len(words) + 1], ids[len(words) + 1] = START, words.float(), END
    return ids[None, None]
