"""What the gradient of the embeddings holds beside the sentences found so far."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmi.attacks.engine.evidence import Evidence
from fedmi.exposure.schema import END
from fedmi.models.text_transformer import TransformerNet

GONE = 1e-4
"""Of a token's row; what is less than that is rounding."""


@dataclass
class Leftover:
    """rows [vocabulary, dim]: the gradient of the tokens' embeddings; network: in double."""

    network: TransformerNet
    rows: Tensor
    whole: Tensor
    records: int

    @classmethod
    def of(cls, network: TransformerNet, evidence: Evidence) -> "Leftover":
        rows = evidence.gradient["tokens.weight"].double()
        return cls(network, rows, rows.norm(dim=1), evidence.records)

    def left(self) -> Tensor:
        """[vocabulary]: of which tokens something is left; [CLS] and [SEP] count as such."""
        found: Tensor = self.rows.norm(dim=1) > GONE * self.whole
        found[: END + 1] = True
        return found

    def take(self, tokens: tuple[int, ...]) -> None:
        """Takes a sentence off, with the label that leaves nothing of most of its tokens; with none
        of them gone it is left alone, as it may be no sentence of the batch."""
        held, slopes = self._slopes(torch.tensor(tokens))
        rest = self.rows[held] - slopes
        gone = (rest.norm(dim=2) <= GONE * self.whole[held]) & (held > END)
        label = int(gone.sum(1).argmax())
        if gone[label].any():
            self.rows = self.rows.index_copy(0, held, rest[label])

    @torch.enable_grad()
    def _slopes(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(its distinct tokens [m], for each label the gradient of their rows [labels, m, dim])."""
        held, where = torch.unique(ids, return_inverse=True)
        embedded = self.network.embed(ids[None]).detach().requires_grad_()
        logits = self.network.classify(embedded, torch.ones(1, len(ids), dtype=torch.bool))
        found = []
        for label in range(logits.shape[1]):
            loss = cross_entropy(logits, torch.tensor([label])) / self.records
            (slope,) = torch.autograd.grad(loss, [embedded], retain_graph=True)
            rows = slope.new_zeros(len(held), slope.shape[2])
            found.append(rows.index_add(0, where, slope[0]))
        return held, torch.stack(found)
