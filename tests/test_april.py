"""APRIL on vision transformers: exact where the linear system is, flagged where it is not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, interpolate

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.gradient.april import April, _of_attention, _of_embedding, _solve
from fedmi.data.att_faces import ATTFaces
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.base import ModelSpec, features
from fedmi.models.convolutional import LeNet
from fedmi.models.vit import Attention, Block, Patches, VisionTransformer, ViT
from fedmi.protections.dp.dp_sgd import unsupported
from fedmi.training.local import mean_gradient
from tests.gradient_cases import (
    CLASSES,
    SERVER,
    Batch,
    base_model,
    gradient_case,
    images,
    make_case,
    psnr,
    sets,
    trained,
)

CIFAR = Path(__file__).parents[1].parent / "shared/data/cifar10_subset.npz"
PLAIN = ViT(arrangement="plain", dim=32, position_std=0.5)
STANDARD = ViT(dim=32)
EACH: list[tuple[Literal["attention", "embedding"], ViT]] = [
    ("attention", PLAIN),
    ("embedding", PLAIN),
    ("embedding", STANDARD),
]
by_system = pytest.mark.parametrize(
    ("system", "spec"), EACH, ids=lambda part: part if isinstance(part, str) else part.arrangement
)


def april(
    system: Literal["attention", "embedding"] = "attention",
    channel: Channel = Channel.GRADIENT,
) -> April:
    return April(position=SERVER, channel=channel, system=system)


def flags(answers: Sequence[Reconstruction]) -> set[str]:
    return {flag for answer in answers for flag in answer.flags}


def reshaped(case: Case, spec: ModelSpec, records: Tensor) -> Case:
    """The case for images of another shape: same clients, gradients of `records`, one each."""
    shape = (int(records.shape[1]), int(records.shape[2]), int(records.shape[3]))
    model = spec.build(shape, CLASSES, Seed.root(3))
    first, *seen = case.transcript.observations
    observations = [replace(first, payload=dict(model.state_dict()))]
    for number, (record, item) in enumerate(zip(records, seen, strict=True)):
        payload = mean_gradient(model, record[None], torch.tensor([number % CLASSES]))
        observations.append(replace(item, payload=payload))
    knowledge = replace(
        case.knowledge, input_shape=shape, build=lambda: spec.module(shape, CLASSES)
    )
    transcript = replace(case.transcript, observations=tuple(observations))
    return replace(case, transcript=transcript, knowledge=knowledge)


def of_images(spec: ModelSpec, records: Tensor) -> Case:
    return reshaped(gradient_case(spec, sets([1] * len(records), 1)), spec, records)


def quality(found: Sequence[Reconstruction], records: Tensor) -> Tensor:
    return psnr(found, [(record[None], torch.zeros(1)) for record in records])


@by_system
def test_one_record_is_recovered_to_rounding(
    system: Literal["attention", "embedding"], spec: ViT
) -> None:
    truth = sets([1] * 6, seed=2)
    found = april(system).reconstruct(gradient_case(spec, truth))
    assert psnr(found, truth).min() > 60
    assert not flags(found)
    assert all(answer.confidence.item() > 0.99 for answer in found)


@by_system
def test_faces_and_photographs_are_recovered(
    system: Literal["attention", "embedding"], spec: ViT
) -> None:
    wide = spec.model_copy(update={"dim": 96, "position_std": 1.0})
    faces = torch.tensor(ATTFaces().split(Seed.root(0)).private.inputs[:21:7])
    found = april(system).reconstruct(of_images(wide, faces))
    assert quality(found, faces).min() > 60
    assert not flags(found)
    if CIFAR.exists():
        photos = torch.tensor(np.load(CIFAR)["x_train"][:4]).permute(0, 3, 1, 2) / 255
        found = april(system).reconstruct(of_images(wide, photos))
        assert quality(found, photos).min() > 60
        assert not flags(found)


@by_system
def test_in_float64_the_equations_hold_and_their_solution_is_the_image(
    system: Literal["attention", "embedding"], spec: ViT
) -> None:
    model = base_model(spec).double()
    assert isinstance(model, VisionTransformer)
    record = images(1, 5).double()
    gradient = mean_gradient(model, record, torch.tensor([3]))
    weights = {name: value.double() for name, value in model.state_dict().items()}
    of = _of_embedding(gradient) if system == "embedding" else _of_attention(gradient, weights)
    truth = model.patches(record)[0] - 0.5
    assert torch.allclose(of.slopes.T @ truth, of.right, rtol=1e-9, atol=1e-13)
    assert (_solve(of)[0] - truth).square().mean() < 1e-9


def test_an_image_whose_side_no_patch_divides_is_recovered() -> None:
    records = interpolate(images(2, 4), (15, 13))
    found = april("embedding").reconstruct(of_images(STANDARD, records))
    assert quality(found, records).min() > 60


def test_another_target_in_the_batch_changes_nothing() -> None:
    truth = sets([1, 1, 2], seed=3)
    together = april().reconstruct(gradient_case(PLAIN, truth))[1]
    alone = april().reconstruct(gradient_case(PLAIN, truth, only=1))[0]
    assert together.samples is not None
    assert alone.samples is not None
    assert torch.equal(together.samples, alone.samples)


def update_case(spec: ViT, truth: list[Batch], work: LocalWork) -> Case:
    payloads = [trained(spec, batch, work, Seed.root(c)) for c, batch in enumerate(truth)]
    counts = [len(labels) for _, labels in truth]
    return make_case(spec, payloads, counts, Channel.CLIENT_UPDATE, work)


def test_the_embedding_survives_local_steps_on_the_same_record() -> None:
    truth = sets([1] * 3, seed=4)
    work = LocalWork(recipe=Recipe(learning_rate=0.1, momentum=0.9), steps=5)
    found = april("embedding", Channel.CLIENT_UPDATE).reconstruct(
        update_case(STANDARD, truth, work)
    )
    assert psnr(found, truth).min() > 45  # rounding of the weights sent
    assert not flags(found)


def test_the_attention_of_several_steps_is_flagged() -> None:
    truth = sets([1], seed=4)
    case = update_case(PLAIN, truth, LocalWork(recipe=Recipe(learning_rate=0.1), steps=5))
    assert "several_steps" in flags(april("attention", Channel.CLIENT_UPDATE).reconstruct(case))


@by_system
def test_several_records_are_a_flagged_mixture(
    system: Literal["attention", "embedding"], spec: ViT
) -> None:
    truth = sets([4], seed=6)
    found = april(system).reconstruct(gradient_case(spec, truth))
    assert "several_records" in flags(found)
    assert found[0].samples is not None
    assert found[0].samples.shape == truth[0][0].shape
    assert psnr(found, truth).max() < 25
    assert found[0].confidence.max() < 0.9


def test_copies_of_one_record_are_that_record() -> None:
    record, label = sets([1], seed=7)[0]
    truth = [(record.expand(3, -1, -1, -1), label.expand(3))]
    found = april().reconstruct(gradient_case(PLAIN, truth))
    assert psnr(found, truth).min() > 50
    assert "several_records" in flags(found)


@pytest.mark.parametrize(
    "change",
    [{"dim": 12}, {"depth": 1, "heads": 2}],
    ids=["more patches than dim", "one plain block"],
)
def test_too_few_equations_are_flagged(change: dict[str, Any]) -> None:
    spec = PLAIN.model_copy(update=change)
    truth = sets([1] * 2, seed=8)
    found = april().reconstruct(gradient_case(spec, truth))
    assert all("rank_deficient" in answer.flags for answer in found)
    assert psnr(found, truth).max() < 45
    assert all(answer.confidence.item() < 0.9 for answer in found)


@pytest.mark.parametrize("system", ["attention", "embedding"])
def test_attention_that_is_the_same_for_all_tokens_is_flagged(
    system: Literal["attention", "embedding"],
) -> None:
    model = base_model(PLAIN)
    assert isinstance(model, VisionTransformer)
    first_block = next(iter(model.blocks))
    assert isinstance(first_block, Block)
    for layer in (first_block.attention.query, first_block.attention.key):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    truth = sets([1], seed=8)
    case = gradient_case(PLAIN, truth)
    start, seen = case.transcript.observations
    start = replace(start, payload=dict(model.state_dict()))
    seen = replace(seen, payload=mean_gradient(model, *truth[0]))
    case = replace(case, transcript=replace(case.transcript, observations=(start, seen)))
    found = april(system).reconstruct(case)
    assert "rank_deficient" in flags(found)
    assert found[0].confidence.item() < 0.2


def test_one_plain_block_spans_two_directions_a_head() -> None:
    spec = PLAIN.model_copy(update={"depth": 1, "heads": 2})
    model = base_model(spec).double()
    slopes = mean_gradient(model, images(1, 5).double(), torch.tensor([3]))["tokens.position"]
    assert int(torch.linalg.matrix_rank(slopes[1:], rtol=1e-10)) == 4


def test_patches_of_more_pixels_than_the_width_are_flagged_but_not_for_the_embedding() -> None:
    spec = ViT(arrangement="plain", dim=32, patch=8, position_std=0.5)
    truth = sets([1], seed=9)
    case = gradient_case(spec, truth)
    assert "rank_deficient" in flags(april("attention").reconstruct(case))
    exact = april("embedding").reconstruct(case)
    assert psnr(exact, truth).min() > 60
    assert not flags(exact)


def test_noise_on_the_update_leaves_the_image_grey() -> None:
    truth = sets([1], seed=10)
    case = gradient_case(STANDARD, truth)
    first, seen = case.transcript.observations
    rng = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(g.shape, generator=rng) for n, g in seen.payload.items()}
    noisy = replace(seen, payload={n: g + noise[n] for n, g in seen.payload.items()})
    case = replace(case, transcript=replace(case.transcript, observations=(first, noisy)))
    found = april("embedding").reconstruct(case)
    grey = -10 * (truth[0][0] - 0.5).square().mean().log10()
    assert "rank_deficient" in flags(found)
    assert abs(float(psnr(found, truth)[0] - grey)) < 2
    assert found[0].confidence.item() < 0.4


def test_pruned_updates_are_flagged() -> None:
    case = gradient_case(STANDARD, sets([1], seed=11))
    case = replace(case, knowledge=replace(case.knowledge, protections=("gradient_pruning 0.5",)))
    assert "not_adaptive" in flags(april("embedding").reconstruct(case))


@pytest.mark.parametrize(
    ("value", "flag"), [(0.0, "zero_gradients"), (float("nan"), "non_finite")], ids=str
)
def test_a_bad_update_is_flagged_and_harms_no_other(value: float, flag: str) -> None:
    truth = sets([1, 1], seed=12)
    case = gradient_case(PLAIN, truth)
    first, bad, good = case.transcript.observations
    bad = replace(bad, payload={n: torch.full_like(g, value) for n, g in bad.payload.items()})
    case = replace(case, transcript=replace(case.transcript, observations=(first, bad, good)))
    found = april().reconstruct(case)
    assert flag in found[0].flags
    assert found[0].confidence.item() == -torch.inf
    assert psnr(found, truth)[1] > 60


def test_frozen_positions_say_nothing() -> None:
    case = gradient_case(PLAIN, sets([1], seed=12))
    first, seen = case.transcript.observations
    payload = {**seen.payload, "tokens.position": torch.zeros(17, 32)}
    case = replace(
        case,
        transcript=replace(case.transcript, observations=(first, replace(seen, payload=payload))),
    )
    (found,) = april().reconstruct(case)
    assert found.flags >= {"zero_gradients_in_read_layer"}
    assert "zero_gradients" not in found.flags
    assert found.confidence.item() == -torch.inf


def test_models_it_cannot_read_are_named_with_what_to_use() -> None:
    standard = STANDARD.blueprint((1, 16, 16), CLASSES)
    reason = april("attention").unsuited(standard)
    assert "LayerNorm" in reason
    assert "residual" in reason
    assert 'system = "embedding"' in reason
    assert "inverting_gradients" in reason
    assert not april("embedding").unsuited(standard)
    assert not april("attention").unsuited(PLAIN.blueprint((1, 16, 16), CLASSES))
    assert "inverting_gradients" in april().unsuited(LeNet().blueprint((1, 16, 16), CLASSES))
    with pytest.raises(AttackError, match="Conv2d"):
        april("embedding").reconstruct(gradient_case(LeNet(), sets([1], seed=1)))


def test_a_transformer_inside_another_module_is_found() -> None:
    truth = sets([1], seed=13)
    case = gradient_case(PLAIN, truth)
    first, seen = case.transcript.observations
    inner = [
        replace(item, payload={f"0.{n}": part for n, part in item.payload.items()})
        for item in (first, seen)
    ]
    build = case.knowledge.build
    assert build is not None
    case = replace(
        case,
        transcript=replace(case.transcript, observations=tuple(inner)),
        knowledge=replace(case.knowledge, build=lambda: nn.Sequential(build())),
    )
    assert psnr(april().reconstruct(case), truth).min() > 60


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 9, 14)], ids=str)
def test_patches_are_tiles_of_the_image_and_go_back(shape: tuple[int, int, int]) -> None:
    patches = Patches(shape, 4)
    inputs = torch.rand(2, *shape)
    tiles = patches(inputs)
    assert tiles.shape == (2, patches.count, patches.pixels)
    assert torch.equal(tiles[1, 1].view(shape[0], 4, 4), inputs[1, :, :4, 4:8])
    assert torch.equal(patches.images(tiles), inputs)


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    tokens = torch.randn(2, 5, 24)
    expected = theirs(tokens, tokens, tokens)[0]
    assert torch.allclose(ours(tokens), expected, atol=1e-6)


@pytest.mark.parametrize("spec", [PLAIN, STANDARD], ids=lambda spec: spec.arrangement)
def test_the_model_is_a_model_like_any_other(spec: ViT) -> None:
    model = base_model(spec)
    inputs = images(3, 1)
    assert model(inputs).shape == (3, CLASSES)
    assert features(model, inputs).shape == (3, 32)
    assert isinstance([*model.modules()][-1], nn.Linear)
    assert unsupported(model) == []
    again = spec.build((1, 16, 16), CLASSES, Seed.root(3))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="was expected"):
        model(torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("spec", [PLAIN, STANDARD], ids=lambda spec: spec.arrangement)
def test_gradients_under_vmap_are_those_of_a_loop(spec: ViT) -> None:
    model = base_model(spec)
    weights = {name: part.detach() for name, part in model.named_parameters()}
    inputs, labels = images(3, 1)[:, None], torch.tensor([[1], [2], [3]])

    def loss(state: dict[str, Tensor], record: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, state, (record,)), label)

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(weights, inputs, labels)
    for row in range(3):
        single = mean_gradient(model, inputs[row], labels[row])
        for name, part in single.items():
            assert torch.allclose(batched[name][row], part, atol=1e-6), name


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValidationError, match="heads = 5 does not divide dim = 32"):
        ViT(dim=32, heads=5)
