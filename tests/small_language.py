"""Cases for searches for sentences: a language with an order of its own, a small transformer."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.schema import END, SPECIAL, START, Text
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import mean_gradient

SERVER = Position.CURIOUS_SERVER
SMALL = {"position": SERVER, "channel": Channel.GRADIENT}
WORDS, LENGTH, CLASSES = 60, 12, 2
SCHEMA = Text(pieces=(*SPECIAL, *(f"w{word}" for word in range(WORDS))), length=LENGTH)
SHAPE = (1, 1, LENGTH)
MODEL = TextTransformer(vocabulary=64, positions=LENGTH, dim=32, depth=2, heads=2)
Batch = tuple[Tensor, Tensor]
FACTS = frozenset(
    {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING, Fact.LABELS, Fact.PUBLIC_DATA}
)


def sentence(words: Sequence[int]) -> Tensor:
    """[1, 1, length] of these words, counted from 0."""
    ids = torch.zeros(LENGTH)
    ids[: len(words) + 2] = torch.tensor([START, *(word + END + 1 for word in words), END]).float()
    return ids[None, None]


def sentences(count: int, seed: int, fewest: int = 4) -> Batch:
    """Every word is followed by one of two: the n-th by the (7 n + 1)-th or (7 n + 2)-th."""
    rng, found = torch.Generator().manual_seed(seed), list[Tensor]()
    for _ in range(count):
        number = int(torch.randint(fewest, LENGTH - 1, (), generator=rng))
        words = [int(torch.randint(WORDS, (), generator=rng))]
        while len(words) < number:
            step = 1 + int(torch.randint(2, (), generator=rng))
            words.append((7 * words[-1] + step) % WORDS)
        found.append(sentence(words))
    return torch.stack(found), torch.randint(CLASSES, (count,), generator=rng)


def model() -> nn.Module:
    return MODEL.build(SHAPE, CLASSES, Seed.root(3))


def gradients(clients: Sequence[Batch]) -> list[dict[str, Tensor]]:
    return [mean_gradient(model(), *batch) for batch in clients]


def case_of(
    payloads: Sequence[Mapping[str, Tensor]],
    clients: Sequence[Batch],
    *,
    channel: Channel = Channel.GRADIENT,
    work: LocalWork | None = None,
    labels: bool = True,
    only: int | None = None,
) -> Case:
    """One target a client; `only` keeps a single one of them."""
    start = dict(model().state_dict())
    counts = [len(each) for _, each in clients]
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), start, 0)]
    seen += [
        Observation(SERVER, channel, 1, (client,), payload, 0, {"num_examples": float(count)})
        for client, (payload, count) in enumerate(zip(payloads, counts, strict=True))
    ]
    targets = tuple(Target(f"client{c}", round=1, clients=(c,)) for c in range(len(counts)))
    truths = {t.id: each for t, (_, each) in zip(targets, clients, strict=True)}
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        schema=SCHEMA,
        facts=FACTS if labels else FACTS - {Fact.LABELS},
        build=lambda: MODEL.module(SHAPE, CLASSES),
        work=work or LocalWork(recipe=Recipe(batch_size=64)),
        labels=truths if labels else {},
        public=sentences(400, 77),
    )
    chosen = targets if only is None else (targets[only],)
    return Case(Transcript(SERVER, tuple(seen)), knowledge, chosen, Seed.root(5))


def right(found: Reconstruction, truth: Tensor) -> float:
    """Share of a batch's words in their place, each sentence beside the one it fits best."""
    assert found.samples is not None
    ids, true = found.samples.flatten(1), truth.flatten(1)
    words = true > END
    hits = ((ids[:, None] == true[None]) & words[None]).sum(2)
    return float(hits.max(0).values.sum()) / float(words.sum())


def pairs(found: Tensor, truth: Tensor) -> float:
    """Share of the pairs of neighbours of the truth that stand in the other; [length] each."""

    def all_of(ids: Tensor) -> set[tuple[int, int]]:
        return set(pairwise(int(token) for token in ids.flatten() if token > END))

    return len(all_of(found) & all_of(truth)) / len(all_of(truth))
