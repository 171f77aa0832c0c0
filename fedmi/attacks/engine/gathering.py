"""Tokens read one by one, gathered into sentences by the identity beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmi.attacks.engine.bins import Atoms, Layout, Read
from fedmi.exposure.schema import END, START, UNKNOWN

SAME = 0.1
"""Distance of two identities, of their usual size, up to which they are of one sentence."""


@dataclass
class Sentence:
    """identity: [heads, identity], as the first token of it told; tokens: by place; told: how many
    of them were read out of a bin, not filled in."""

    identity: Tensor
    tokens: dict[int, int] = field(default_factory=dict)
    told: int = 0

    def row(self, length: int) -> tuple[Tensor, float]:
        """([length] ids, share of its places that were read)."""
        ends = [place for place, token in self.tokens.items() if token == END]
        last = min(ends) if ends else min(length - 1, max(self.tokens, default=0) + 1)
        ids = torch.zeros(length)
        ids[:last] = UNKNOWN
        for place, token in self.tokens.items():
            if place < last:
                ids[place] = token
        ids[0], ids[last] = START, END
        return ids, min(1.0, self.told / max(1, last))


def gathered(
    reads: Sequence[Read], known: Atoms, where: Layout, records: int, causal: bool
) -> list[Sentence]:
    """At most `records` sentences, most tokens first.

    In a decoder, a token knows of the places before it only: identities are compared head by head,
    where both have one. Tokens that shared a bin have no identity and go where their place is
    still free, if that is one sentence only.
    """
    order = sorted(reads, key=lambda read: (-int(known.place[read.atom]), -read.weight))
    alone = [read for read in order if read.identity is not None]
    sizes = [read.identity.norm() for read in alone if read.identity is not None]
    usual = float(torch.stack(sizes).median()) if sizes else 1.0
    found: list[Sentence] = []
    for read in alone:
        _place(read, found, known, where, records, causal, usual)
    _begun(found, known, where)
    for read in order:
        if read.identity is None:
            _fill(read, found, known)
    return sorted(found, key=lambda sentence: -sentence.told)


def _place(
    read: Read,
    found: list[Sentence],
    known: Atoms,
    where: Layout,
    records: int,
    causal: bool,
    usual: float,
) -> None:
    assert read.identity is not None
    place, token = int(known.place[read.atom]), int(known.token[read.atom])
    heads = min(place, where.heads) if causal else where.heads
    own = read.identity.view(where.heads, -1)
    apart = [float((one.identity - own)[:heads].norm()) / usual for one in found]
    near = [k for k, distance in enumerate(apart) if distance < SAME]
    free = [k for k in near if found[k].tokens.get(place, token) == token]
    if free:
        chosen = found[min(free, key=lambda k: apart[k])]
    elif len(found) < records:
        chosen = Sentence(own)
        found.append(chosen)
    else:
        return
    chosen.told += place not in chosen.tokens
    chosen.tokens[place] = token


def _begun(found: Sequence[Sentence], known: Atoms, where: Layout) -> None:
    """What identities say of the first tokens, where no bin told them."""
    for head in range(where.heads):
        here = torch.nonzero(known.place == head + 1).flatten()
        for sentence in found:
            if head + 1 in sentence.tokens or not len(here):
                continue
            if max(sentence.tokens, default=0) <= head + 1:
                continue
            views = _views(known, where, here, head)
            scale = views.norm(dim=1).median()
            distance = (views - sentence.identity[head]).norm(dim=1) / scale
            best = int(distance.argmin())
            if distance[best] < SAME:
                sentence.tokens[head + 1] = int(known.token[here[best]])
                sentence.told += 1


def _views(known: Atoms, where: Layout, here: Tensor, head: int) -> Tensor:
    """What a head copies of each atom at its place, [c, identity], in the stream's units."""
    stream = known.stream[here]
    variance, mean = torch.var_mean(stream, 1, correction=0, keepdim=True)
    normed = (stream - mean) / (variance + 1e-5).sqrt()
    return (normed @ where.view[head].T) * where.scale


def _fill(read: Read, found: Sequence[Sentence], known: Atoms) -> None:
    place, token = int(known.place[read.atom]), int(known.token[read.atom])
    if any(sentence.tokens.get(place) == token for sentence in found):
        return
    ends = [
        min([at for at, id_ in one.tokens.items() if id_ == END], default=10**9) for one in found
    ]
    free = [
        one for one, end in zip(found, ends, strict=True) if place not in one.tokens and place < end
    ]
    if token == END:
        free = [one for one in free if END not in one.tokens.values()]
        free = [one for one in free if max(one.tokens, default=0) < place]
    if free:
        chosen = min(free, key=lambda one: abs(max(one.tokens, default=0) - place))
        chosen.tokens[place] = token
        chosen.told += 1
