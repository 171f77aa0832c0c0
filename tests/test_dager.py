"""DAGER: exact where the tokens are fewer than the width, flagged where they are not."""

import pytest
import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.first_block import MIXED, READ, FirstBlock
from fedmi.attacks.engine.spans import span
from fedmi.attacks.gradient.bias_labels import BiasLabels
from fedmi.attacks.gradient.dager import Dager
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.words import Channel
from fedmi.models.cnn6 import CNN6
from fedmi.models.text_transformer import TextTransformer, TransformerNet
from fedmi.training.local import mean_gradient
from tests.text_cases import (
    DECODER,
    ENCODER,
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

ATTACK = Dager(position="curious_server", channel="gradient")


def gradient(spec: TextTransformer, batch: Batch) -> dict[str, Tensor]:
    return mean_gradient(built(spec), *batch)


@pytest.mark.parametrize(
    ("spec", "count"), [(DECODER, 1), (DECODER, 4), (ENCODER, 1), (ENCODER, 2), (ENCODER, 4)]
)
def test_sentences_and_labels_are_exact(spec: TextTransformer, count: int) -> None:
    batch = sentences(count, 1)
    (answer,) = ATTACK.reconstruct(text_case(spec, [gradient(spec, batch)], [count]))
    assert exact(answer, batch[0]) == 1
    assert not answer.flags
    assert float(answer.confidence.min()) > 1
    assert answer.samples is not None
    assert answer.labels is not None
    truth = {tuple(row.flatten().tolist()): int(label) for row, label in zip(*batch, strict=True)}
    told = {
        tuple(row.flatten().tolist()): int(label)
        for row, label in zip(answer.samples, answer.labels, strict=True)
    }
    assert told == truth


def test_without_embedding_rows_the_decoder_is_exact_too() -> None:
    batch = sentences(2, 1)
    attack = ATTACK.model_copy(update={"embedding_rows": False})
    (answer,) = attack.reconstruct(text_case(DECODER, [gradient(DECODER, batch)], [2]))
    assert exact(answer, batch[0]) == 1


@pytest.mark.parametrize("spec", [DECODER, ENCODER])
def test_the_span_is_that_of_the_true_inputs(spec: TextTransformer) -> None:
    """Against the inputs that the layers really had: those are in, random vectors are not."""
    batch = sentences(2, 3)
    case = text_case(spec, [gradient(spec, batch)], [2])
    (evidence,) = read(case, Channel.GRADIENT)
    network = built(spec).double()
    assert isinstance(network, TransformerNet)
    seen: dict[str, Tensor] = {}
    for name in (READ[0], MIXED[0]):
        network.get_submodule(name).register_forward_hook(
            lambda _layer, given, _out, name=name: seen.update({name: given[0].detach()})
        )
    network(batch[0].double())
    present = batch[0].flatten(1) != 0
    rng = torch.Generator().manual_seed(0)
    for layers in (READ, MIXED):
        inputs = seen[layers[0]][present]
        distance = span(evidence, layers).distance
        rank = int(torch.linalg.matrix_rank(torch.cat([inputs, torch.ones(len(inputs), 1)], 1)))
        # the slopes of keys sum to zero: rounding leaves more there than the rows' lengths say
        assert rank - 1 <= span(evidence, layers).rank <= rank + 2
        false = torch.randn(inputs.shape, generator=rng, dtype=torch.float64)
        assert float(distance(inputs).max()) < 0.05 * float(distance(false).min())


def test_pairs_are_read_as_the_network_reads_them() -> None:
    for spec in (DECODER, ENCODER):
        network = built(spec)
        assert isinstance(network, TransformerNet)
        block = FirstBlock(network, network.state_dict())
        seen: list[Tensor] = []
        network = network.double()
        network.blocks[0].attention.query.register_forward_hook(
            lambda _layer, given, _out, seen=seen: seen.append(given[0].detach())
        )
        network(sentences(1, 0)[0].double())
        ids = sentences(1, 0)[0].flatten().long()
        pairs = block.pairs(ids, torch.arange(len(ids)))
        assert torch.allclose(pairs.read, seen[0][0])


def test_an_update_is_exact_too() -> None:
    batch = sentences(2, 4)
    update = local_model(built(DECODER), batch, WORK)
    attack = Dager(position="curious_server", channel="client_update")
    (answer,) = attack.reconstruct(text_case(DECODER, [update], [2], Channel.CLIENT_UPDATE))
    assert exact(answer, batch[0]) == 1


def test_several_steps_are_flagged() -> None:
    batch = sentences(2, 4)
    work = LocalWork(recipe=Recipe(batch_size=64, learning_rate=0.001), steps=3)
    update = local_model(built(DECODER), batch, work)
    attack = Dager(position="curious_server", channel="client_update")
    (answer,) = attack.reconstruct(text_case(DECODER, [update], [2], Channel.CLIENT_UPDATE, work))
    assert "several_steps" in answer.flags


def test_the_aggregate_of_two_clients_is_one_batch() -> None:
    first, second = sentences(2, 5), sentences(2, 6)
    parts = [gradient(DECODER, batch) for batch in (first, second)]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    attack = Dager(position="curious_server", channel="aggregate")
    case = text_case(DECODER, [mean], [4], Channel.AGGREGATE, averaged=True)
    (answer,) = attack.reconstruct(case)
    assert exact(answer, torch.cat([first[0], second[0]])) == 1


def test_more_tokens_than_the_width_are_flagged() -> None:
    batch = sentences(24, 7)
    (answer,) = ATTACK.reconstruct(text_case(DECODER, [gradient(DECODER, batch)], [24]))
    assert "rank_too_high" in answer.flags
    assert exact(answer, batch[0]) == 0
    assert float(answer.confidence.max()) < 0
    assert answer.samples is not None
    seen = {int(token) for token in batch[0].unique()}
    assert {int(token) for token in answer.samples.unique()} <= seen | {0, 2, 3}


@pytest.mark.parametrize("spec", [DECODER, ENCODER])
def test_noise_closes_it(spec: TextTransformer) -> None:
    batch = sentences(2, 8)
    rng = torch.Generator().manual_seed(0)
    noisy = {
        name: part + 0.01 * torch.randn(part.shape, generator=rng)
        for name, part in gradient(spec, batch).items()
    }
    (answer,) = ATTACK.reconstruct(text_case(spec, [noisy], [2]))
    assert "rank_too_high" in answer.flags
    assert tokens_right(answer, batch[0]) < 0.2


def test_a_uniformly_masked_update_says_nothing() -> None:
    """What it answers does not depend on the sentences behind the mask."""
    answers = []
    for seed in (9, 10):
        batch = sentences(2, seed)
        rng = torch.Generator().manual_seed(seed)
        masked = {
            name: 2 * torch.rand(part.shape, generator=rng) - 1
            for name, part in gradient(DECODER, batch).items()
        }
        (answer,) = ATTACK.reconstruct(text_case(DECODER, [masked], [2]))
        assert "rank_too_high" in answer.flags
        answers.append(tokens_right(answer, batch[0]))
    assert max(answers) < 0.2


def test_one_bad_target_leaves_the_others_alone() -> None:
    batch = sentences(1, 1)
    good = gradient(DECODER, batch)
    silent = {name: torch.zeros_like(part) for name, part in good.items()}
    first, second = ATTACK.reconstruct(text_case(DECODER, [silent, good], [1, 1]))
    assert "zero_gradients" in first.flags
    assert exact(second, batch[0]) == 1


def test_an_empty_sentence_is_a_sentence() -> None:
    inputs, labels = sentences(2, 11)
    inputs[1] = 0
    inputs[1, 0, 0, :2] = torch.tensor([2.0, 3.0])
    (answer,) = ATTACK.reconstruct(text_case(DECODER, [gradient(DECODER, (inputs, labels))], [2]))
    assert exact(answer, inputs) == 1


def test_repeated_sentences_are_flagged() -> None:
    inputs, labels = sentences(1, 12)
    batch = (inputs.repeat(2, 1, 1, 1), labels.repeat(2))
    (answer,) = ATTACK.reconstruct(text_case(DECODER, [gradient(DECODER, batch)], [2]))
    assert answer.flags == {"sentences_not_found"}
    assert exact(answer, inputs) == 1


def test_what_it_cannot_read_it_refuses() -> None:
    shallow = DECODER.model_copy(update={"depth": 1})
    assert "depth = 2" in ATTACK.unsuited(shallow.blueprint(SHAPE, 2))
    assert "text_transformer" in ATTACK.unsuited(CNN6().blueprint((3, 32, 32), 10))
    with pytest.raises(AttackError, match="only block"):
        ATTACK.reconstruct(text_case(shallow, [gradient(shallow, sentences(1, 0))], [1]))


@pytest.mark.parametrize("spec", [DECODER, ENCODER])
def test_label_counts_are_told_apart_on_text(spec: TextTransformer) -> None:
    inputs, _ = sentences(6, 13)
    attack = BiasLabels(position="curious_server", channel="gradient")
    for ones in (1, 4):
        labels = (torch.arange(6) < ones).long()
        case = text_case(spec, [gradient(spec, (inputs, labels))], [6])
        (answer,) = attack.reconstruct(case)
        assert answer.labels is not None
        assert int(answer.labels.sum()) == ones
