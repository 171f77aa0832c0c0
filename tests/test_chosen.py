"""Which targets are attacked where there are more than asked for."""

from collections import Counter

from fedmi.exposure.knowledge import Target
from fedmi.exposure.seeding import Seed
from fedmi.runs.aims import chosen


def targets(rounds: int, clients: int) -> tuple[Target, ...]:
    return tuple(
        Target(f"round {r}, client {c}", None, r, (c,))
        for r in range(1, rounds + 1)
        for c in range(clients)
    )


def test_every_round_has_as_many_targets() -> None:
    for seed in range(20):
        picked = chosen(targets(3, 10), 6, Seed.root(seed))
        assert Counter(target.round for target in picked) == {1: 2, 2: 2, 3: 2}
        assert list(picked) == sorted(picked, key=lambda t: (t.round, t.clients))


def test_a_rest_goes_to_some_of_the_rounds() -> None:
    counts = Counter(t.round for t in chosen(targets(3, 10), 4, Seed.root(1)))
    assert sorted(counts.values()) == [1, 1, 2]


def test_a_round_with_few_targets_leaves_room_to_the_others() -> None:
    some = (*targets(1, 1), *(Target(f"2, {c}", None, 2, (c,)) for c in range(9)))
    assert Counter(t.round for t in chosen(some, 6, Seed.root(0))) == {1: 1, 2: 5}


def test_which_ones_is_drawn_by_the_seed() -> None:
    every = targets(2, 20)
    assert chosen(every, 4, Seed.root(1)) == chosen(every, 4, Seed.root(1))
    assert len({chosen(every, 4, Seed.root(seed)) for seed in range(8)}) > 4
    assert chosen(every, 0, Seed.root(1)) == chosen(every, 99, Seed.root(1)) == every
