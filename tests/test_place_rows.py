"""Sentences from sums of rows of the embedding tables' gradients, and searches that begin there."""

import pytest
import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.exchanges import EXACT, Exchanges
from fedmi.attacks.engine.placed import placed
from fedmi.attacks.engine.row_sums import balances
from fedmi.attacks.engine.standing import stood
from fedmi.attacks.gradient.lamp import LAMP
from fedmi.attacks.gradient.place_rows import PlaceRows
from fedmi.attacks.gradient.tag import TAG
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.schema import END, START
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.models.classifiers import MLP
from fedmi.training.local import batches, fit
from tests import gradient_cases
from tests.small_language import (
    LENGTH,
    SCHEMA,
    SMALL,
    Batch,
    case_of,
    gradients,
    model,
    right,
    sentence,
    sentences,
)

ATTACK = PlaceRows(**SMALL)


def pair() -> Batch:
    """Two sentences of other labels; 7 stands in both, at other places."""
    rows = [sentence([5, 17, 7, 30]), sentence([7, 9, 41, 3, 58, 22])]
    return torch.stack(rows), torch.tensor([0, 1])


def same(found: Tensor | None, truth: Tensor) -> bool:
    assert found is not None
    return sorted(found.flatten(1).tolist()) == sorted(truth.flatten(1).tolist())


def test_groups_of_rows_with_the_same_sum() -> None:
    rng = torch.Generator().manual_seed(1)
    parts = torch.randn(6, 20, generator=rng).double()
    left = torch.stack([parts[0], parts[1] + parts[2], parts[3], parts[4], parts[5]])
    right_ = torch.stack([parts[1], parts[0], parts[2] + parts[3], parts[4] + 1])
    found = {(one.left, one.right, one.exact) for one in balances(left, right_, 1e-12)}
    assert found == {((0,), (1,), True), ((1, 2), (0, 2), True), ((3, 4), (3,), False)}


def test_one_sentence_is_exact_with_repeated_words_and_without_a_search() -> None:
    attack = PlaceRows(trials=0, **SMALL)
    every = [sentences(1, seed) for seed in range(5)]
    clients = [*every, (sentence([4, 9, 4, 4, 12, 9])[None], torch.tensor([1]))]
    for answer, (truth, labels) in zip(
        attack.reconstruct(case_of(gradients(clients), clients, labels=False)), clients, strict=True
    ):
        assert answer.samples is not None
        assert answer.labels is not None
        assert answer.samples.equal(truth)
        assert answer.labels.equal(labels)
        assert answer.confidence[0] > 0.999
        assert not answer.flags


@pytest.mark.parametrize("fill", [1, LENGTH - 2])
def test_shortest_and_longest_sentences(fill: int) -> None:
    batch = (sentence(range(fill))[None], torch.tensor([0]))
    (answer,) = ATTACK.reconstruct(case_of(gradients([batch]), [batch]))
    assert same(answer.samples, batch[0])


def test_two_sentences_are_told_apart() -> None:
    clients = [pair()]
    (answer,) = ATTACK.reconstruct(case_of(gradients(clients), clients, labels=False))
    assert same(answer.samples, clients[0][0])
    assert answer.labels is not None
    assert sorted(answer.labels.tolist()) == [0, 1]
    assert not answer.flags


def test_what_stands_where_is_right_before_sentences_are_told_apart() -> None:
    clients = [sentences(2, seed) for seed in (11, 12, 13)]
    for evidence, (truth, _) in zip(
        read(case_of(gradients(clients), clients), Channel.GRADIENT), clients, strict=True
    ):
        ids = truth.flatten(1).long()
        true = {(int(word), place) for row in ids for place, word in enumerate(row) if word}
        sure = {(one.token, one.place) for one in stood(evidence).found if one.sure}
        assert len(sure) > len(true) / 3
        assert sure <= true


def test_batches_beat_disjoint_sentences() -> None:
    clients, others = ([sentences(2, seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    found = ATTACK.reconstruct(case_of(gradients(clients), clients))
    blind = ATTACK.reconstruct(case_of(gradients(others), clients))
    for answer, prior, (truth, _) in zip(found, blind, clients, strict=True):
        assert answer.samples is not None
        assert SCHEMA.flaw(answer.samples) == ""
        assert answer.confidence[0] >= answer.confidence[1]
        assert right(answer, truth) > right(prior, truth) + 0.3


def test_the_misfit_of_the_truth_is_zero() -> None:
    batch = pair()
    (evidence,) = read(case_of(gradients([batch]), [batch]), Channel.GRADIENT)
    found = placed(case_of(gradients([batch]), [batch]), evidence, 500)
    assert found is not None
    assert found.exact
    assert float(found.misfits.max()) < EXACT


def test_answers_do_not_depend_on_the_other_targets() -> None:
    clients = [sentences(1, 1), sentences(2, 2), sentences(3, 3)]
    attack, payloads = PlaceRows(trials=300, **SMALL), gradients(clients)
    together = attack.reconstruct(case_of(payloads, clients))
    for index, answer in enumerate(together):
        (alone,) = attack.reconstruct(case_of(payloads, clients, only=index))
        assert answer.samples is not None
        assert alone.samples is not None
        assert alone.samples.equal(answer.samples)


def updated(steps: int) -> tuple[Batch, dict[str, Tensor], LocalWork]:
    batch: Batch = sentences(1, 3)
    work = LocalWork(recipe=Recipe(batch_size=1, learning_rate=0.05), steps=steps)
    net = model()
    fit(net, *batch, batches(1, work, Seed.root(1)), work)
    return batch, {name: part.detach().clone() for name, part in net.state_dict().items()}, work


@pytest.mark.parametrize("steps", [1, 3])
def test_row_sums_hold_for_local_steps(steps: int) -> None:
    batch, update, work = updated(steps)
    attack = PlaceRows(position=SMALL["position"], channel=Channel.CLIENT_UPDATE)
    (answer,) = attack.reconstruct(
        case_of([update], [batch], channel=Channel.CLIENT_UPDATE, work=work)
    )
    assert same(answer.samples, batch[0])
    assert ("several_steps" in answer.flags) == (steps > 1)


def test_masked_noisy_pruned_and_empty_updates_are_answered() -> None:
    clients, rng = [sentences(2, 1)] * 4, torch.Generator().manual_seed(3)
    pruned, noisy, masked, empty = gradients(clients)
    pruned = {n: p * (p.abs() > p.abs().flatten().quantile(0.9)) for n, p in pruned.items()}
    noisy = {n: p + 0.1 * torch.randn(p.shape, generator=rng) for n, p in noisy.items()}
    masked = {n: torch.rand(p.shape, generator=rng) - 0.5 for n, p in masked.items()}
    empty = {n: torch.zeros_like(p) for n, p in empty.items()}
    attack = PlaceRows(trials=200, **SMALL)
    found = attack.reconstruct(case_of([pruned, noisy, masked, empty], clients))
    for answer in found:
        assert answer.samples is not None
        assert SCHEMA.flaw(answer.samples) == ""
        assert answer.flags
    assert "place_rows_not_visible" in found[1].flags & found[2].flags
    assert "zero_gradients" in found[3].flags
    assert right(found[2], clients[2][0]) < 0.15


def test_searches_begin_where_it_ends() -> None:
    clients = [sentences(1, 1)]
    case = case_of(gradients(clients), clients, labels=False)
    options = {**SMALL, "steps": 3, "init": "place_rows"}
    lamp = {"turns": 1, "rearrangements": 2, "start_candidates": 1}
    for attack in (TAG.model_validate(options), LAMP.model_validate({**options, **lamp})):
        (answer,) = attack.reconstruct(case)
        assert same(answer.samples, clients[0][0])
        assert "started_from_place_rows" in answer.flags
    noisy = {n: p + torch.randn(p.shape) for n, p in gradients(clients)[0].items()}
    (lost,) = TAG.model_validate(options).reconstruct(case_of([noisy], clients))
    assert "place_rows_not_visible" in lost.flags
    assert "started_from_place_rows" not in lost.flags


def test_trials_bound_the_search() -> None:
    clients = [sentences(4, 9)]
    (evidence,) = read(case_of(gradients(clients), clients), Channel.GRADIENT)
    case, start = case_of(gradients(clients), clients), evidence
    search = Exchanges.of(case, start, torch.arange(END + 1, 20), 50, Seed.root(1))
    assert search.trials == 50
    (answer,) = PlaceRows(trials=0, **SMALL).reconstruct(case)
    assert answer.samples is not None
    assert (answer.samples[..., 0] == START).all()
    assert ((answer.samples == END).sum(3) == 1).all()


def test_other_models_are_refused_by_name() -> None:
    attack = PlaceRows(position=Position.CURIOUS_SERVER, channel=Channel.GRADIENT)
    assert "text_transformer" in attack.unsuited(MLP().module((1, 16, 16), 10))
    assert attack.unsuited(model()) == ""
    images = gradient_cases.gradient_case(MLP(), gradient_cases.sets((1,), 1))
    with pytest.raises(AttackError, match="place_rows reads classifiers of text"):
        attack.reconstruct(images)
    assert PlaceRows.reads_schemas == {"text"}
