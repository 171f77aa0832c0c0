"""Sentences of a causal transformer: prefixes that grow by one token while they stay in a span."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.first_block import FirstBlock, Pairs
from fedmi.attacks.engine.spans import Span
from fedmi.exposure.schema import END


@dataclass(frozen=True)
class Found:
    """tokens: a sentence or a prefix of one; doubt: its worst distance to the span, as a share of
    what tokens that are not there have. whole: it has an end."""

    tokens: tuple[int, ...]
    doubt: float
    whole: bool = True


@dataclass(frozen=True)
class _Grown:
    rows: Tensor  # [prefixes, places]: indices of pairs
    doubt: Tensor  # [prefixes]


def grown(
    block: FirstBlock,
    pairs: Pairs,
    span: Span,
    decoys: Tensor,
    tolerance: float,
    most: int,
) -> list[Found]:
    """All sentences whose every prefix is in the span, surest first, then unfinished prefixes.

    decoys: tokens of the vocabulary that show how far a token is that is not there. A token is
    added where its distance is below `tolerance` times the decoys' median. At each place no more
    than `most` prefixes are kept, the surest.
    """
    prefixes, whole, open_ends = _start(block, pairs, span), list[Found](), list[Found]()
    for place in range(1, 1 + int(pairs.place.max())):
        if not len(prefixes.rows):
            break
        here = pairs.at(place)
        distance = span.distance(_next(block, pairs, prefixes.rows, pairs, here))
        false = block.pairs(decoys, torch.full_like(decoys, place))
        everyone = torch.arange(len(decoys))
        usual = span.distance(_next(block, pairs, prefixes.rows, false, everyone)).median()
        share = distance / usual.clamp_min(1e-300)
        taken = share < tolerance
        stuck = ~taken.any(1)
        open_ends += _told(pairs, prefixes, stuck, False)
        prefixes = _extended(prefixes, here, share, taken, most)
        ended = pairs.token[prefixes.rows[:, -1]] == END
        whole += _told(pairs, prefixes, ended, True)
        prefixes = _Grown(prefixes.rows[~ended], prefixes.doubt[~ended])
    open_ends += _told(pairs, prefixes, torch.ones(len(prefixes.rows)).bool(), False)
    surest = sorted(whole, key=lambda found: found.doubt)
    return surest + sorted(open_ends, key=lambda found: (-len(found.tokens), found.doubt))


def _start(block: FirstBlock, pairs: Pairs, span: Span) -> _Grown:
    first = pairs.at(0)[:1]
    return _Grown(first[:, None], torch.zeros(len(first), dtype=torch.float64))


def _next(block: FirstBlock, pairs: Pairs, rows: Tensor, added: Pairs, chosen: Tensor) -> Tensor:
    """What the MLP reads of each added pair after each prefix; [prefixes, places] -> [p, c, dim]"""
    query, key = added.query[chosen], added.key[chosen]
    before = block.scores(query[None, :, None], pairs.key[rows][:, None])
    own = block.scores(query, key).expand(len(rows), -1, -1)
    weights = torch.cat([before, own[:, :, None]], 2).softmax(2)
    values = torch.einsum("pcth,pthe->pche", weights[:, :, :-1], pairs.value[rows])
    values = values + weights[:, :, -1, :, None] * added.value[chosen]
    return block.mixed(added.stream[chosen], values)


def _extended(prefixes: _Grown, here: Tensor, share: Tensor, taken: Tensor, most: int) -> _Grown:
    which, added = torch.nonzero(taken, as_tuple=True)
    doubt = torch.maximum(prefixes.doubt[which], share[which, added])
    kept = doubt.argsort(stable=True)[:most]
    rows = torch.cat([prefixes.rows[which[kept]], here[added[kept]][:, None]], 1)
    return _Grown(rows, doubt[kept])


def _told(pairs: Pairs, prefixes: _Grown, chosen: Tensor, whole: bool) -> list[Found]:
    return [
        Found(tuple(pairs.token[row].tolist()), float(doubt), whole)
        for row, doubt in zip(prefixes.rows[chosen], prefixes.doubt[chosen], strict=True)
    ]
