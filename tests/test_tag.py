"""TAG on a small transformer."""

import pytest
import torch

from fedmi.attacks.engine.embedded import load_text
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.labels import recover
from fedmi.attacks.gradient.tag import TAG
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.schema import END, START
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.classifiers import MLP
from fedmi.models.text import TextClassifier
from fedmi.training.local import batches, fit
from tests import gradient_cases
from tests.small_language import (
    MODEL,
    SCHEMA,
    SHAPE,
    SMALL,
    Batch,
    case_of,
    gradients,
    model,
    right,
    sentence,
    sentences,
)

QUICK = TAG(steps=70, **SMALL)


def one(words: list[int], label: int = 1) -> Batch:
    return sentence(words)[None], torch.tensor([label])


def test_vectors_stand_for_their_tokens() -> None:
    net, (inputs, _) = model(), sentences(3, 1)
    assert isinstance(net, TextClassifier)
    _, words = load_text(lambda: MODEL.module(SHAPE, 2), net.state_dict(), "eval")
    ids = inputs.flatten(1).long()
    close = words.closeness(words.tokens[ids] * 1.0, torch.arange(64))
    assert close.argmax(2).equal(ids)


def test_a_sentence_is_recovered_exactly() -> None:
    clients = [one([5, 17, 30]), one([9, 3, 58], 0)]
    found = QUICK.reconstruct(case_of(gradients(clients), clients))
    for answer, (truth, labels) in zip(found, clients, strict=True):
        assert answer.samples is not None
        assert answer.labels is not None
        assert answer.samples.equal(truth)
        assert answer.labels.equal(labels)
        assert not answer.flags


def test_recovers_what_disjoint_records_do_not_tell() -> None:
    clients, others = ([sentences(1, seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    truths = [truth for truth, _ in clients]
    found = QUICK.reconstruct(case_of(gradients(clients), clients))
    blind = QUICK.reconstruct(case_of(gradients(others), clients))
    advantage = [
        right(answer, truth) - right(prior, truth)
        for answer, prior, truth in zip(found, blind, truths, strict=True)
    ]
    assert sum(advantage) / len(advantage) > 0.4


def test_a_target_s_answer_does_not_depend_on_the_others() -> None:
    clients = [sentences(1, 1), sentences(1, 2), sentences(2, 3)]
    attack, payloads = TAG(steps=10, **SMALL), gradients(clients)
    together = attack.reconstruct(case_of(payloads, clients))
    for index, answer in enumerate(together):
        (alone,) = attack.reconstruct(case_of(payloads, clients, only=index))
        assert answer.samples is not None
        assert alone.samples is not None
        assert alone.samples.equal(answer.samples)


def test_samples_are_valid_sentences_surest_first() -> None:
    batch = sentences(3, 8)
    (answer,) = TAG(steps=10, use_token_set=True, **SMALL).reconstruct(
        case_of(gradients([batch]), [batch])
    )
    assert answer.samples is not None
    assert answer.samples.shape == (3, *SHAPE)
    assert SCHEMA.flaw(answer.samples) == ""
    assert (answer.samples[..., 0] == START).all()
    assert ((answer.samples == END).sum(3) == 1).all()
    assert answer.confidence.equal(answer.confidence.sort(descending=True).values)
    assert set(answer.samples.unique().tolist()) <= set(batch[0].unique().tolist())


def test_a_sentence_of_one_token() -> None:
    batch = one([12])
    (answer,) = TAG(steps=60, **SMALL).reconstruct(case_of(gradients([batch]), [batch]))
    assert answer.samples is not None
    assert answer.samples.equal(batch[0])


def test_labels_are_recovered_or_searched_for() -> None:
    batch = one([5, 17, 30], 0)
    case = case_of(gradients([batch]), [batch], labels=False)
    assert recover(case, read(case, Channel.GRADIENT)[0])[0].tolist() == [0]
    for how in ("recovered", "joint"):
        attack = TAG.model_validate({**SMALL, "steps": 80, "label_search": how})
        (answer,) = attack.reconstruct(case)
        assert answer.labels is not None
        assert answer.labels.tolist() == [0]
        assert right(answer, batch[0]) == 1


def test_a_masked_update_tells_no_words() -> None:
    clients, rng = [sentences(1, seed) for seed in range(4)], torch.Generator().manual_seed(2)
    masked = [
        {name: torch.rand(part.shape, generator=rng) - 0.5 for name, part in payload.items()}
        for payload in gradients(clients)
    ]
    found = TAG(steps=30, **SMALL).reconstruct(case_of(masked, clients))
    hits = [right(answer, truth) for answer, (truth, _) in zip(found, clients, strict=True)]
    assert sum(hits) / len(hits) < 0.15


def test_pruned_noisy_and_empty_updates_are_answered() -> None:
    clients, rng = [sentences(2, 1)] * 4, torch.Generator().manual_seed(3)
    pruned, noisy, empty, broken = gradients(clients)
    pruned = {n: p * (p.abs() > p.abs().flatten().quantile(0.9)) for n, p in pruned.items()}
    noisy = {n: p + 0.1 * torch.randn(p.shape, generator=rng) for n, p in noisy.items()}
    empty = {n: torch.zeros_like(p) for n, p in empty.items()}
    broken = {n: torch.full_like(p, torch.inf) for n, p in broken.items()}
    found = TAG(steps=10, use_token_set=True, **SMALL).reconstruct(
        case_of([pruned, noisy, empty, broken], clients)
    )
    for answer in found:
        assert answer.samples is not None
        assert SCHEMA.flaw(answer.samples) == ""
    assert "lengths_guessed" in found[1].flags
    assert "zero_gradients" in found[2].flags
    assert "non_finite" in found[3].flags


def test_local_steps_are_simulated_with_the_table_held() -> None:
    batch = one([5, 17, 30])
    work = LocalWork(recipe=Recipe(batch_size=1, learning_rate=0.05), steps=2)
    net = model()
    fit(net, *batch, batches(1, work, Seed.root(1)), work)
    update = {name: part.detach().clone() for name, part in net.state_dict().items()}
    attack = TAG(steps=60, position=SMALL["position"], channel=Channel.CLIENT_UPDATE)
    (answer,) = attack.reconstruct(
        case_of([update], [batch], channel=Channel.CLIENT_UPDATE, work=work)
    )
    assert "token_table_held" in answer.flags
    assert right(answer, batch[0]) > 0.5


def test_other_models_are_refused_by_name() -> None:
    assert "text_transformer" in QUICK.unsuited(MLP().module((1, 16, 16), 10))
    assert QUICK.unsuited(model()) == ""
    images = gradient_cases.gradient_case(MLP(), gradient_cases.sets((1,), 1))
    with pytest.raises(AttackError, match="tag reads classifiers of text"):
        QUICK.reconstruct(images)
    assert TAG.reads_schemas == {"text"}
