"""Decepticons: what is read out of a rewired transformer, and where nothing is."""

import pytest
import torch
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.gradient.decepticons import Decepticons
from fedmi.data.records import Records
from fedmi.deployments.federated.malice.base import Occasion
from fedmi.deployments.federated.malice.decepticons import Decepticons as Malice
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.models.cnn6 import CNN6
from fedmi.models.text_transformer import TextTransformer
from fedmi.training.local import mean_gradient
from tests.text_cases import (
    CLASSES,
    DECODER,
    ENCODER,
    SCHEMA,
    SHAPE,
    WORK,
    Batch,
    built,
    exact,
    local_model,
    sentences,
    text_case,
    tokens_right,
)

SERVER = Position.MALICIOUS_SERVER
ATTACK = Decepticons(channel="gradient")


def sent_model(spec: TextTransformer) -> dict[str, Tensor]:
    inputs, labels = sentences(256, 77)
    rows = torch.arange(len(labels)).numpy()
    public = Records(inputs.numpy(), labels.numpy(), rows, rows, SCHEMA)
    blueprint = spec.blueprint(SHAPE, CLASSES)
    occasion = Occasion(1, (0,), blueprint, Seed.root(4), SHAPE, CLASSES, public)
    return dict(Malice().alter(dict(built(spec).state_dict()), 0, occasion))


def gradient_at(spec: TextTransformer, sent: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    model = built(spec)
    model.load_state_dict(sent)
    return mean_gradient(model, *batch)


def attacked(spec: TextTransformer, batch: Batch) -> Case:
    sent = sent_model(spec)
    gradient = gradient_at(spec, sent, batch)
    return text_case(spec, [gradient], [len(batch[1])], sent=sent, position=SERVER)


@pytest.mark.parametrize(
    "spec",
    [
        DECODER,
        ENCODER,
        DECODER.model_copy(update={"arrangement": "post_norm"}),
        ENCODER.model_copy(update={"arrangement": "pre_norm"}),
    ],
)
def test_few_sentences_are_read_whole(spec: TextTransformer) -> None:
    for seed in (1, 2):
        batch = sentences(2, seed)
        (answer,) = ATTACK.reconstruct(attacked(spec, batch))
        assert tokens_right(answer, batch[0]) > 0.9
        assert answer.samples is not None
        assert answer.samples.shape == batch[0].shape
    single = sentences(1, 3)
    (answer,) = ATTACK.reconstruct(attacked(spec, single))
    assert exact(answer, single[0]) == 1


def test_an_update_and_more_blocks() -> None:
    spec, batch = ENCODER.model_copy(update={"depth": 3}), sentences(2, 5)
    sent = sent_model(spec)
    model, honest = built(spec), built(spec).state_dict()
    model.load_state_dict(sent)
    local = local_model(model, batch, WORK)
    update = {name: honest[name] + (local[name] - sent[name]) for name in local}
    case = text_case(spec, [update], [2], Channel.CLIENT_UPDATE, sent=sent, position=SERVER)
    (answer,) = Decepticons(channel="client_update").reconstruct(case)
    assert tokens_right(answer, batch[0]) > 0.9


def test_the_aggregate_of_two_clients() -> None:
    sent, first, second = sent_model(ENCODER), sentences(1, 6), sentences(1, 7)
    parts = [gradient_at(ENCODER, sent, batch) for batch in (first, second)]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    case = text_case(
        ENCODER, [mean], [2], Channel.AGGREGATE, averaged=True, sent=sent, position=SERVER
    )
    (answer,) = Decepticons(channel="aggregate").reconstruct(case)
    assert tokens_right(answer, torch.cat([first[0], second[0]])) > 0.9


def test_noise_closes_it() -> None:
    sent, batch = sent_model(ENCODER), sentences(2, 8)
    rng = torch.Generator().manual_seed(0)
    noisy = {
        name: torch.rand(part.shape, generator=rng) - 0.5
        for name, part in gradient_at(ENCODER, sent, batch).items()
    }
    (answer,) = ATTACK.reconstruct(text_case(ENCODER, [noisy], [2], sent=sent, position=SERVER))
    assert "no_token_read" in answer.flags
    assert tokens_right(answer, batch[0]) < 0.2


def test_an_honest_server_has_planted_nothing() -> None:
    batch = sentences(1, 9)
    gradient = mean_gradient(built(ENCODER), *batch)
    with pytest.raises(AttackError, match="altered no model"):
        ATTACK.reconstruct(text_case(ENCODER, [gradient], [1], position=SERVER))


def test_what_cannot_be_rewired_is_refused() -> None:
    malice = Malice()
    assert malice.misfit(ENCODER.blueprint(SHAPE, 2)) == ""
    shallow = ENCODER.model_copy(update={"depth": 1})
    assert "depth = 2" in malice.misfit(shallow.blueprint(SHAPE, 2))
    narrow = ENCODER.model_copy(update={"dim": 40})
    assert "dim = 42" in malice.misfit(narrow.blueprint(SHAPE, 2))
    assert "text_transformer" in malice.misfit(CNN6().blueprint((3, 32, 32), 10))
    assert "only block" in ATTACK.unsuited(shallow.blueprint(SHAPE, 2))
