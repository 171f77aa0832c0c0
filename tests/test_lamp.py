"""LAMP on a small transformer, its language model and its rearrangements."""

import math

import pytest
import torch

from fedmi.attacks.engine.distances import aim, distance_of
from fedmi.attacks.engine.embedded import PLACES
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.language_prior import LanguagePrior
from fedmi.attacks.engine.network import load
from fedmi.attacks.engine.penalties import Trial
from fedmi.attacks.engine.rearranging import ACROSS, WITHIN, rearranged
from fedmi.attacks.engine.text_penalties import PlaceRows
from fedmi.attacks.gradient.lamp import LAMP
from fedmi.exposure.schema import END, START
from fedmi.exposure.words import Channel, Fact
from fedmi.models.classifiers import MLP
from tests import gradient_cases
from tests.small_language import (
    SCHEMA,
    SMALL,
    Batch,
    case_of,
    gradients,
    model,
    pairs,
    right,
    sentence,
    sentences,
)

OPTIONS = {**SMALL, "steps": 45, "turns": 2, "rearrangements": 4, "start_candidates": 2}
QUICK = LAMP.model_validate(OPTIONS)


def test_sentences_are_recovered_where_disjoint_ones_tell_nothing() -> None:
    clients, others = ([sentences(1, seed) for seed in seeds] for seeds in ((1, 2), (4, 5)))
    found = QUICK.reconstruct(case_of(gradients(clients), clients))
    blind = QUICK.reconstruct(case_of(gradients(others), clients))
    exact = 0
    for answer, prior, (truth, labels) in zip(found, blind, clients, strict=True):
        assert answer.labels is not None
        assert answer.labels.equal(labels)
        assert right(answer, truth) > right(prior, truth) + 0.5
        exact += right(answer, truth) == 1
    assert exact >= 1


def test_a_batch_of_two_is_valid_and_better_than_prior_only() -> None:
    clients, others = [sentences(2, 11)], [sentences(2, 12)]
    attack = LAMP.model_validate({**OPTIONS, "use_token_set": True})
    (found,) = attack.reconstruct(case_of(gradients(clients), clients))
    (blind,) = attack.reconstruct(case_of(gradients(others), clients))
    assert found.samples is not None
    assert SCHEMA.flaw(found.samples) == ""
    assert ((found.samples == START).sum(3) == 1).all()
    assert found.confidence[0] >= found.confidence[1]
    assert right(found, clients[0][0]) > right(blind, clients[0][0]) + 0.2


def test_a_masked_update_tells_no_words() -> None:
    clients, rng = [sentences(1, seed) for seed in range(4)], torch.Generator().manual_seed(2)
    masked = [
        {name: torch.rand(part.shape, generator=rng) - 0.5 for name, part in payload.items()}
        for payload in gradients(clients)
    ]
    attack = LAMP.model_validate({**OPTIONS, "steps": 15})
    found = attack.reconstruct(case_of(masked, clients))
    hits = [right(answer, truth) for answer, (truth, _) in zip(found, clients, strict=True)]
    assert sum(hits) / len(hits) < 0.2


def test_turns_put_tokens_in_order() -> None:
    """With vectors that are right but for their order, rearranging alone mends it."""
    truth: Batch = sentences(1, 21, fewest=8)
    case = case_of(gradients([truth]), [truth])
    scores = []
    for turns in (0, 1):
        attack = Shuffled.model_validate({**OPTIONS, "turns": turns, "rearrangements": 240})
        (answer,) = attack.reconstruct(case)
        assert answer.samples is not None
        scores.append(pairs(answer.samples, truth[0]))
    assert scores[1] > scores[0]


class Shuffled(LAMP):
    """Starts from the sentence with two of its tokens in each other's place, and does not search
    further; what the draw is told is the truth, and no attack."""

    def _part(self, schedule, turn, parts):  # type: ignore[no-untyped-def]
        return super()._part(schedule, turn, parts).__class__(steps=1, learning_rate=0.0)

    def _chosen(self, objective, problems):  # type: ignore[no-untyped-def]
        (problem,) = problems
        truth, words = sentences(1, 21, fewest=8)[0], model().state_dict()["tokens.weight"]
        ids = truth.flatten(1).long()
        ids[:, [2, 5]] = ids[:, [5, 2]]
        return (words[ids] / words.std())[None, :, : problem.starts.shape[2]]


def test_the_prior_is_a_distribution_and_prefers_what_it_saw() -> None:
    inputs, _ = sentences(300, 1)
    prior = LanguagePrior.of(inputs, 64)
    every = torch.arange(64)
    first, second = inputs[0, 0, 0, 1:3].long()
    lower = prior._second(second.expand(64), every)
    longer = prior._third(first.expand(64), second.expand(64), every, lower)
    assert math.isclose(float(lower.sum()), 1, abs_tol=1e-6)
    assert math.isclose(float(longer.sum()), 1, abs_tol=1e-6)
    fresh = sentences(20, 2, fewest=8)[0].flatten(1).long()
    mixed = fresh.clone()
    mixed[:, 1:7] = fresh[:, [6, 3, 1, 5, 2, 4]]
    assert (prior.loss(fresh) < prior.loss(mixed)).double().mean() > 0.9


def test_the_rows_of_places_count_alike_however_sure_the_model_is() -> None:
    """Slopes of a sentence that it is sure of are shorter by orders of magnitude."""
    (seen,) = gradients([sentences(1, 1)])
    case = case_of([seen], [sentences(1, 1)])
    (evidence,) = read(case, Channel.GRADIENT)
    network = load(case.knowledge.build, evidence.base, "eval") if case.knowledge.build else None
    assert network is not None
    penalty, labels = PlaceRows(0.1, False), torch.tensor([0])
    given = penalty.given(evidence, labels, network)
    (other,) = gradients([sentences(1, 2)])
    values = [
        float(penalty.value(Trial(labels, labels, {PLACES: scale * part}, {}), given, network))
        for part in (seen[PLACES], other[PLACES])
        for scale in (1e-4, 1.0, 1e4)
    ]
    assert max(values[:3]) < 1e-6
    assert min(values[3:]) > 0.1
    assert max(values[3:]) < min(values[3:]) + 1e-4


def test_exchanges_keep_places() -> None:
    rng = torch.Generator().manual_seed(1)
    for way in range(8):
        order = rearranged((6, 4), 8, 0, way, rng, within=False)
        assert [place % 8 for place in order] == [*range(8), *range(8)]
        assert rearranged((6,), 8, 0, way, rng, within=False) == [*range(8)]


@pytest.mark.parametrize("way", range(len(WITHIN) + len(ACROSS)))
def test_rearranging_keeps_tokens_and_ends(way: int) -> None:
    rng, seen = torch.Generator().manual_seed(way), set[tuple[int, ...]]()
    for _ in range(40):
        order = rearranged((6, 4), 8, 0, way, rng)
        assert sorted(order) == list(range(16))
        assert [order[k] for k in (0, 5, 6, 7, 8, 11, 12)] == [0, 5, 6, 7, 8, 11, 12]
        seen.add(tuple(order))
    assert len(seen) > 1
    for short in (2, 3):
        assert rearranged((short,), 4, 0, way, rng) == [0, 1, 2, 3]


def test_the_distance_by_layer_leaves_out_what_is_rounding() -> None:
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-9, 0.0])}
    aimed = aim("layer_cosine", wanted, {})
    for noise in ([1e-9, 0.0], [0.0, -5.0]):
        found = {"a": torch.tensor([6.0, 8.0]), "b": torch.tensor(noise)}
        assert float(distance_of("layer_cosine", found, aimed, {})) < 1e-6
    turned = {"a": torch.tensor([-4.0, 3.0]), "b": wanted["b"]}
    assert math.isclose(float(distance_of("layer_cosine", turned, aimed, {})), 1, abs_tol=1e-6)


def test_it_needs_public_sentences_and_a_text_classifier() -> None:
    assert Fact.PUBLIC_DATA in LAMP.needs
    assert "text_transformer" in QUICK.unsuited(MLP().module((1, 16, 16), 10))
    images = gradient_cases.gradient_case(MLP(), gradient_cases.sets((1,), 1))
    with pytest.raises(AttackError, match="lamp reads classifiers of text"):
        QUICK.reconstruct(images)


def test_a_sentence_of_one_token() -> None:
    batch = (sentence([12])[None], torch.tensor([1]))
    (answer,) = QUICK.reconstruct(case_of(gradients([batch]), [batch]))
    assert answer.samples is not None
    assert answer.samples.equal(batch[0])
    assert int((answer.samples > END).sum()) == 1
