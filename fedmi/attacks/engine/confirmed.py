"""Which of the sentences found a batch is really made of, by the gradients of the embeddings."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.prefixes import Found
from fedmi.exposure.schema import END, PADDING
from fedmi.models.text_transformer import TransformerNet

CLOSE = 0.25
"""Error of p - onehot(y), as a share of its length, up to which a sentence is in the batch."""
MISSED = 0.5
"""Share of what a word adds to its gradient that is found missing there if it is a wrong one."""
MOST = 4
"""Candidates that are weighed, as a multiple of the records."""


def confirmed(
    network: TransformerNet, evidence: Evidence, found: Sequence[Found], tolerance: float
) -> list[Found]:
    """Sentences that the batch is made of first; the others, and those whose doubt is not below
    the tolerance, become guesses.

    The batch's gradient is the sum over sentences and classes of (p - onehot(y)) / n times what
    a logit's gradient would be. Solved for, with the candidates' own gradients, one that is not
    there has the weight 0, and one that is, that of some label y (as often as it is repeated).
    `network`: in double precision.
    """
    whole = [one for one in found if one.whole][: MOST * evidence.records]
    if not whole:
        return list(found)
    inside = _present(network, evidence, whole)
    sure = [one for one, held in zip(whole, inside, strict=True) if held]
    others = [replace(one, whole=False) for one in found if one not in sure]
    proven = [one for one in sure if one.doubt < tolerance]
    likely = [replace(one, whole=False) for one in sure if one.doubt >= tolerance]
    return proven + likely + others


def _present(network: TransformerNet, evidence: Evidence, whole: Sequence[Found]) -> list[bool]:
    ids = torch.full((len(whole), evidence.input_shape[2]), PADDING)
    for row, one in zip(ids, whole, strict=True):
        row[: len(one.tokens)] = torch.tensor(one.tokens)
    slopes, posteriors = _slopes(network, ids)
    held = torch.unique(ids)
    seen = torch.cat(
        [evidence.gradient["positions"][: ids.shape[1]], evidence.gradient["tokens.weight"][held]]
    ).double()
    parts = [_rows(part, ids, held) for part in slopes]
    sizes = seen.norm(dim=1)
    used = sizes > 0
    level = sizes[used, None]
    columns = torch.stack([(row[used] / level).flatten() for part in parts for row in part], 1)
    length = columns.norm(dim=0).clamp_min(1e-300)
    wanted = (seen[used] / level).flatten()[:, None]
    weights = torch.linalg.lstsq(columns / length, wanted, driver="gelsd").solution[:, 0] / length
    apart = evidence.records * weights.view(len(parts), -1).T
    # weights of all classes but the first; those of one sentence sum to zero
    apart = torch.cat([-apart.sum(1, keepdim=True), apart], 1)
    labelled = posteriors[:, None] - torch.eye(posteriors.shape[1], dtype=posteriors.dtype)
    size = labelled.square().sum(2)
    times = ((apart[:, None] * labelled).sum(2) / size).round().clamp_min(1)
    error = (apart[:, None] - times[..., None] * labelled).norm(dim=2) / size.sqrt()
    left = torch.zeros_like(seen)
    left[used] = (wanted - columns @ weights[:, None]).view(-1, seen.shape[1]) * level
    wrong = _refuted(left[ids.shape[1] :], parts, weights.view(len(parts), -1), held > END)
    answer: list[bool] = ((error.amin(1) < CLOSE) & ~wrong).tolist()
    return answer


def _refuted(left: Tensor, parts: Sequence[Tensor], weights: Tensor, words: Tensor) -> Tensor:
    """[m]: of which sentences a word's part is missing in the gradient of that word."""
    own = sum((w[:, None, None] * p for w, p in zip(weights, parts, strict=True)), torch.zeros(1))
    own = own[:, -len(left) :][:, words]
    size = own.square().sum(2)
    against = -(own * left[words]).sum(2) > MISSED * size
    return (against & (size > 0)).any(1)


def _slopes(network: TransformerNet, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """(d(logit k - logit 0) / d embedded for k from 1, each [m, length, dim]; posteriors)."""
    with torch.enable_grad():
        embedded = network.embed(ids).detach().requires_grad_()
        logits = network.classify(embedded, ids != PADDING)
        found = [
            torch.autograd.grad((logits[:, k] - logits[:, 0]).sum(), embedded, retain_graph=True)[0]
            for k in range(1, logits.shape[1])
        ]
    return found, logits.detach().softmax(1)


def _rows(slopes: Tensor, ids: Tensor, held: Tensor) -> Tensor:
    """[m, length, dim] -> [m, length + held, dim]: rows of the places and of the tokens held."""
    tokens = slopes.new_zeros(len(slopes), len(held), slopes.shape[2])
    where = torch.searchsorted(held, ids)[:, :, None].expand_as(slopes)
    return torch.cat([slopes, tokens.scatter_add(1, where, slopes)], 1)
