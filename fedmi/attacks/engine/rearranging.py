"""Ways to rearrange the tokens of a batch's sentences."""

from collections.abc import Callable, Sequence

import torch

Draw = Callable[[int], int]
"""A whole number below the one given."""


def rearranged(
    lengths: Sequence[int],
    room: int,
    sentence: int,
    way: int,
    rng: torch.Generator,
    within: bool = True,
) -> list[int]:
    """For each of n x room places, from which of them its token comes.

    Sentences have these numbers of tokens; the first and the last of each, and places behind it,
    stay. way, in turn: two tokens of the sentence change places, one moves, a run moves, the first
    ones are put behind the others (Balunovic et al., 2022, section 4.3); and where there are other
    sentences: one token, or all from a place on, are exchanged with those of another. Without
    `within`, tokens keep their places, and only sentences exchange theirs.
    """

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=rng))

    batch = [list(range(row * room, (row + 1) * room)) for row in range(len(lengths))]
    inner = len(WITHIN) * within
    kinds = inner + len(ACROSS) * (len(lengths) > 1)
    kind = way % max(1, kinds)
    last = max(1, lengths[sentence] - 1)
    if kind < inner:
        own = batch[sentence]
        if last > 2:
            own[1:last] = WITHIN[kind](own[1:last], draw)
    elif kinds:
        other = (sentence + 1 + draw(len(lengths) - 1)) % len(lengths)
        last = min(last, max(1, lengths[other] - 1))
        if last > 1:
            ACROSS[kind - inner](batch[sentence], batch[other], last, draw)
    return [place for row in batch for place in row]


def _swap(tokens: list[int], draw: Draw) -> list[int]:
    found, one, other = list(tokens), draw(len(tokens)), draw(len(tokens))
    found[one], found[other] = found[other], found[one]
    return found


def _move(tokens: list[int], draw: Draw) -> list[int]:
    start = draw(len(tokens))
    return _moved(tokens, start, start + 1, draw)


def _move_run(tokens: list[int], draw: Draw) -> list[int]:
    start, end = sorted((draw(len(tokens) + 1), draw(len(tokens) + 1)))
    return _moved(tokens, start, end, draw)


def _move_prefix(tokens: list[int], draw: Draw) -> list[int]:
    after = 1 + draw(len(tokens) - 1)
    return tokens[after:] + tokens[:after]


def _moved(tokens: list[int], start: int, end: int, draw: Draw) -> list[int]:
    left = tokens[:start] + tokens[end:]
    place = draw(len(left) + 1)
    return left[:place] + tokens[start:end] + left[place:]


def _exchange_one(own: list[int], other: list[int], last: int, draw: Draw) -> None:
    place = 1 + draw(last - 1)
    own[place], other[place] = other[place], own[place]


def _exchange_rest(own: list[int], other: list[int], last: int, draw: Draw) -> None:
    place = 1 + draw(last - 1)
    own[place:last], other[place:last] = other[place:last], own[place:last]


WITHIN = (_swap, _move, _move_run, _move_prefix)
ACROSS = (_exchange_one, _exchange_rest)
