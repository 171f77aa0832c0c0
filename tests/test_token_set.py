"""The token set of a batch, and how long its sentences are, from rows of gradients."""

import pytest
import torch

from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.token_rows import lengths, token_rows
from fedmi.attacks.gradient.token_set import TokenSet
from fedmi.exposure.schema import END, START
from fedmi.exposure.words import Channel, Position
from fedmi.models.classifiers import MLP
from tests import gradient_cases
from tests.small_language import (
    LENGTH,
    SCHEMA,
    SHAPE,
    SMALL,
    Batch,
    case_of,
    gradients,
    model,
    sentence,
    sentences,
)


def words_of(batch: Batch) -> set[int]:
    return {int(token) for token in batch[0].unique() if token > END}


def found_by(clients: list[Batch], payloads: list[dict[str, torch.Tensor]]) -> list[set[int]]:
    answers = TokenSet(**SMALL).reconstruct(case_of(payloads, clients))
    sets = []
    for answer in answers:
        assert answer.samples is not None
        assert SCHEMA.flaw(answer.samples) == ""
        sets.append({int(token) for token in answer.samples.unique() if token > END})
    return sets


def test_the_set_is_exact() -> None:
    clients = [sentences(count, seed) for count, seed in ((1, 1), (2, 2), (6, 3))]
    assert found_by(clients, gradients(clients)) == [words_of(batch) for batch in clients]


def test_samples_are_sentences_longest_row_first() -> None:
    batch = sentences(2, 4)
    (answer,) = TokenSet(**SMALL).reconstruct(case_of(gradients([batch]), [batch]))
    assert answer.samples is not None
    assert answer.samples.shape == (2, *SHAPE)
    assert answer.samples[:, 0, 0, 0].tolist() == [START, START]
    assert ((answer.samples == END).sum(3) == 1).all()
    assert answer.confidence[0] > answer.confidence[1]


def test_a_row_must_stand_out_of_noise() -> None:
    batch, rng = sentences(1, 5), torch.Generator().manual_seed(1)
    (clear,) = gradients([batch])
    for share, flagged in ((1e-4, False), (1e3, True)):
        noise = share * clear["tokens.weight"].abs().max()
        noisy = {
            name: part + noise * torch.randn(part.shape, generator=rng)
            for name, part in clear.items()
        }
        (answer,) = TokenSet(**SMALL).reconstruct(case_of([noisy], [batch]))
        assert answer.samples is not None
        found = {int(token) for token in answer.samples.unique() if token > END}
        assert ("token_set_not_visible" in answer.flags) == flagged
        assert found == (set() if flagged else words_of(batch))


def test_a_masked_update_tells_no_tokens() -> None:
    clients = [sentences(2, seed) for seed in range(6)]
    rng = torch.Generator().manual_seed(2)
    masked = [
        {name: torch.rand(part.shape, generator=rng) - 0.5 for name, part in payload.items()}
        for payload in gradients(clients)
    ]
    found = found_by(clients, masked)
    assert sum(len(some & words_of(batch)) for some, batch in zip(found, clients, strict=True)) <= 3


@pytest.mark.parametrize("payload", ["zero", "nan"])
def test_an_update_that_says_nothing_is_answered_blindly(payload: str) -> None:
    batch = sentences(1, 6)
    value = 0.0 if payload == "zero" else torch.nan
    empty = {name: torch.full_like(part, value) for name, part in gradients([batch])[0].items()}
    (answer,) = TokenSet(**SMALL).reconstruct(case_of([empty], [batch]))
    assert answer.samples is not None
    assert not answer.samples.any()
    assert answer.flags


def test_one_sentence_has_exactly_as_many_tokens_as_places_show() -> None:
    for number in range(1, LENGTH - 1):
        batch = (sentence(range(number)), torch.tensor([1]))
        found = lengths(gradients([(batch[0][None], batch[1])])[0], 1, LENGTH)
        assert (found.counts, found.certain) == ((number + 2,), True)


def test_lengths_of_two_sentences_come_from_both_tables() -> None:
    batch = torch.stack([sentence([1, 2, 3]), sentence([4, 5, 6, 7, 8, 9, 10])])
    (seen,) = gradients([(batch, torch.tensor([0, 1]))])
    assert lengths(seen, 2, LENGTH).counts == (9, 5)
    assert lengths({"tokens.weight": seen["tokens.weight"]}, 2, LENGTH).counts == (LENGTH,) * 2


def test_padding_never_counts() -> None:
    (seen,) = gradients([sentences(1, 7)])
    seen["tokens.weight"][0] = 1.0
    assert 0 not in token_rows(seen).ids


def test_other_models_are_refused_by_name() -> None:
    attack = TokenSet(position=Position.CURIOUS_SERVER, channel=Channel.GRADIENT)
    assert "text_transformer" in attack.unsuited(MLP().module((1, 16, 16), 10))
    assert attack.unsuited(model()) == ""
    images = gradient_cases.gradient_case(MLP(), gradient_cases.sets((1,), 1))
    with pytest.raises(AttackError, match="reads classifiers of text"):
        attack.reconstruct(images)
    assert TokenSet.reads_schemas == {"text"}
