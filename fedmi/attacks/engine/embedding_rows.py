"""What the gradient of the embeddings tells by itself: which tokens occurred, and where."""

from typing import Literal

import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import Evidence
from fedmi.attacks.engine.first_block import FirstBlock, Pairs

Trust = Literal["angles", "lengths", "none"]
TRUSTS: tuple[Trust, ...] = ("angles", "lengths", "none")
"""From the fewest candidates to all."""

UNTOUCHED = 1e-6
"""Of the largest row of a gradient; below it, a token or a place did not occur."""
COMMON = 0.5
"""Share of the vocabulary from which rows are noise and not occurrences."""
UPRIGHT = 2e-3
"""Cosine to its embedding below which a gradient has passed the normalisation of it."""
OFTEN = 1.6
"""Of the median norm of the tokens' gradients, from which one is taken to occur repeatedly."""


def occurring(evidence: Evidence) -> Tensor | None:
    """Ids of the tokens whose embedding has a gradient; None where it has noise everywhere."""
    rows = _touched(evidence.gradient["tokens.weight"])
    return torch.nonzero(rows).flatten() if 0 < float(rows.float().mean()) < COMMON else None


def places(evidence: Evidence, most: int) -> int:
    """Places up to the last one that occurred; `most` where the gradient does not tell."""
    rows = _touched(evidence.gradient["positions"])[:most]
    return 1 + int(torch.nonzero(rows).max()) if rows.any() else most


def likely(slopes: Tensor, block: FirstBlock, pairs: Pairs, trust: Trust) -> Tensor:
    """Which pairs can be true if a token occurs at one place only. [c] booleans

    slopes [vocabulary, dim]: the gradient of the embeddings. Behind a normalisation of the
    embeddings, that of a token at one place is at right angles to the (centred) sum of token and
    place, up to the epsilon of the normalisation. All places are likely for a token that fits none.
    trust "angles" goes by that alone, though one that occurs repeatedly fits some place by
    accident; "lengths" takes all places of tokens that seem to occur repeatedly; "none": of all.
    """
    if not block.network.normed_first or trust == "none":
        return torch.ones(len(pairs), dtype=torch.bool)
    network = block.network
    summed = network.tokens.weight[pairs.token] + network.positions[pairs.place]
    centred = summed - summed.mean(1, keepdim=True)
    norms = slopes.norm(dim=1)
    sizes = centred.norm(dim=1) * norms[pairs.token]
    cosine = (centred * slopes[pairs.token]).sum(1).abs() / sizes.clamp_min(1e-300)
    least = torch.full_like(norms, torch.inf)
    least.scatter_reduce_(0, pairs.token, cosine, "amin")
    found: Tensor = (cosine < UPRIGHT) | (least > UPRIGHT)[pairs.token]
    if trust == "lengths":
        found |= (norms > OFTEN * norms[torch.unique(pairs.token)].median())[pairs.token]
    return found


def _touched(slopes: Tensor) -> Tensor:
    norms = slopes.norm(dim=1)
    exact = norms > 0
    found: Tensor = (
        exact if float(exact.float().mean()) < COMMON else norms > UNTOUCHED * norms.max()
    )
    return found
