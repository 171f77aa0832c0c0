"""GIAS: what a generator of public images adds to gradient matching, and what it cannot."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import interpolate

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.evidence import AttackError
from fedmi.attacks.engine.prior import Training, encode, fit, prior_of
from fedmi.attacks.engine.unknowns import Generated
from fedmi.attacks.gradient.gias import GIAS
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact
from fedmi.models.convolutional import ConvNet
from fedmi.models.generators import ResidualGenerator
from tests.generative_cases import PRIOR, noisy_case, ordered, public
from tests.gradient_cases import SERVER, base_model, images, make_case, psnr, sets, trained

SPEC = ConvNet(width=8, blocks=2)
TINY = Training.model_validate(PRIOR)


def gias(**options: object) -> GIAS:
    fixed = {"position": SERVER, "channel": Channel.GRADIENT, "prior": PRIOR, "restarts": 1}
    return GIAS.model_validate({**fixed, "steps": 60, "weight_steps": 30, **options})


def attack(case: Case, **options: object) -> tuple[Reconstruction, ...]:
    return gias(**options).reconstruct(case)


def finer(count: int, seed: int) -> Tensor:
    """Images [count, 1, 16, 16] with more detail than the public ones have."""
    coarse = torch.rand(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (16, 16), mode="bicubic", align_corners=True).clamp(0, 1)


def test_images_are_found_and_only_from_their_own_gradient() -> None:
    mine, others = ordered([1, 2], seed=0), ordered([1, 2], seed=1)
    found = attack(noisy_case(SPEC, mine))
    gain = psnr(found, mine) - psnr(found, others)
    assert (gain > 5).all()
    assert [len(answer.confidence) for answer in found] == [1, 2]


def test_under_noise_the_latent_space_holds_where_pixels_do_not() -> None:
    clients = sets([1, 1, 1, 1], seed=0)
    case = noisy_case(SPEC, clients, noise=1.0)
    pixels = InvertingGradients(position=SERVER, channel=Channel.GRADIENT, steps=60)
    gain = psnr(attack(case, stages="latent"), clients) - psnr(pixels.reconstruct(case), clients)
    assert gain.mean() > 1


def test_what_the_generator_cannot_make_is_found_by_its_weights() -> None:
    clients = [(finer(2, seed=3)[row : row + 1], torch.tensor([3 + row])) for row in range(2)]
    case = noisy_case(SPEC, clients)
    latent = attack(case, stages="latent", steps=100)
    both = attack(case, weight_rate=1e-2, weight_steps=100, tv_weight=0.0)
    assert all(b.confidence > a.confidence + 0.05 for a, b in zip(latent, both, strict=True))
    assert psnr(both, clients).mean() > psnr(latent, clients).mean() + 0.4


def test_a_gradient_that_says_nothing_of_the_image_gives_the_prior_only() -> None:
    mine, others = sets([1, 1, 1], seed=0), sets([1, 1, 1], seed=1)
    found = attack(noisy_case(SPEC, mine, noise=300.0), stages="latent")
    assert (psnr(found, mine) - psnr(found, others)).mean().abs() < 3


def test_a_target_does_not_depend_on_the_others() -> None:
    clients = sets([1, 1, 1], seed=0)
    together = attack(noisy_case(SPEC, clients), steps=30)[1]
    (alone,) = attack(noisy_case(SPEC, clients, only=1), steps=30)
    assert together.samples is not None
    assert alone.samples is not None
    assert torch.allclose(together.samples, alone.samples, atol=0.02)


def test_restarts_go_on_from_the_best_latent_vector() -> None:
    clients = sets([1, 1], seed=0)
    case = noisy_case(SPEC, clients)
    once, thrice = (attack(case, steps=20, weight_steps=5, restarts=r) for r in (1, 3))
    for one, three in zip(once, thrice, strict=True):
        assert three.confidence >= one.confidence - 0.02


def test_an_update_of_several_steps_is_simulated() -> None:
    (batch,) = sets([2], seed=0)
    work = LocalWork(epochs=2)
    work = work.model_copy(update={"recipe": work.recipe.model_copy(update={"batch_size": 1})})
    sent = trained(SPEC, batch, work, Seed.root(1))
    case = public(make_case(SPEC, [sent], [2], Channel.CLIENT_UPDATE, work))
    (found,) = attack(case, channel=Channel.CLIENT_UPDATE, label_orders=2)
    (other,) = sets([2], seed=1)
    orders = [(batch[0][rows], batch[1]) for rows in ([0, 1], [1, 0])]
    best = max(float(psnr([found], [order])) for order in orders)
    assert best > float(psnr([found], [other])) + 2


def test_a_silent_update_is_flagged_and_spares_the_others() -> None:
    clients = sets([1, 1], seed=0)
    case = noisy_case(SPEC, clients)
    seen = list(case.transcript.observations)
    seen[1] = replace(seen[1], payload={n: p * torch.nan for n, p in seen[1].payload.items()})
    case = replace(case, transcript=replace(case.transcript, observations=tuple(seen)))
    dead, alive = attack(case)
    assert dead.flags == {"non_finite"}
    assert psnr([alive], clients[1:]) > 15


def test_public_images_are_asked_for_by_name() -> None:
    assert Fact.PUBLIC_DATA in GIAS.needs
    case = noisy_case(SPEC, sets([1], seed=0))
    for shown, told in (
        (None, "public_data"),
        ((torch.rand(3, 1, 16, 16), torch.zeros(3)), "3 public images"),
        ((torch.rand(9, 1, 8, 8), torch.zeros(9)), r"\(1, 8, 8\)"),
    ):
        knowledge = replace(case.knowledge, public=shown)
        with pytest.raises(AttackError, match=told):
            attack(replace(case, knowledge=knowledge))


def test_a_generator_of_noise_is_told_to_be_poor() -> None:
    case = noisy_case(SPEC, sets([1], seed=0))
    rng = torch.Generator().manual_seed(0)
    shown = (torch.rand(40, 1, 16, 16, generator=rng), torch.zeros(40))
    case = replace(case, knowledge=replace(case.knowledge, public=shown))
    (found,) = attack(case, steps=2, weight_steps=2)
    assert [flag.partition(":")[0] for flag in found.flags] == ["poor_generator"]


class TestPrior:
    def test_the_same_images_are_learned_once(self) -> None:
        case = noisy_case(SPEC, sets([1], seed=0))
        copied = replace(
            case, knowledge=replace(case.knowledge, public=public(case).knowledge.public)
        )
        assert prior_of(case, TINY) is prior_of(copied, TINY)
        assert prior_of(case, TINY) is not prior_of(case, Training(**{**PRIOR, "steps": 2}))

    def test_training_beats_the_linear_model_where_images_are_not_linear(self) -> None:
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        centres = 3 + 10 * torch.rand(400, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        apart = (rows - centres[:, 0]).square() + (columns - centres[:, 1]).square()
        blobs = (apart < 9).float()[:, None]
        options = Training(latent=16, width=8, steps=150, images=400)
        card = fit(blobs, options, Seed.root(0)).card
        assert (card.records, card.held_out, card.steps) == (360, 40, 150)
        assert card.psnr > card.linear_psnr + 0.5
        assert f"{card.psnr:.1f} dB on 40 held out" in str(card)

    def test_it_follows_from_the_seed_and_leaves_the_global_generator_alone(self) -> None:
        shown = images(50, seed=3)
        before = torch.random.get_rng_state()
        first, second = (fit(shown, TINY, Seed.root(1)).generator for _ in range(2))
        other = fit(shown, TINY, Seed.root(2)).generator
        assert torch.random.get_rng_state().equal(before)
        z = torch.ones(1, TINY.latent)
        assert first(z).equal(second(z))
        assert not first(z).equal(other(z))

    def test_few_images_leave_the_other_coordinates_without_effect_on_the_linear_part(self) -> None:
        generator = fit(
            images(9, seed=3), Training(**{**PRIOR, "images": 1}), Seed.root(1)
        ).generator
        assert generator.latent == PRIOR["latent"]
        assert not generator.basis[-1].any()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 30, 26), (1, 64, 64)])
def test_a_generator_makes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    size = shape[0] * shape[1] * shape[2]
    generator = ResidualGenerator(torch.zeros(size), torch.randn(5, size), shape, 4)
    z = torch.randn(3, 5)
    made = generator(z)
    assert made.shape == (3, *shape)
    assert ((made >= 0) & (made <= 1)).all()
    linear = torch.sigmoid(z @ generator.basis).view(made.shape)
    assert torch.allclose(made, linear)
    assert torch.allclose(vmap(lambda one: generator(one[None])[0])(z), made, atol=1e-6)


def test_weights_of_ones_own_move_one_record_only() -> None:
    prior = fit(images(60, seed=3), TINY, Seed.root(1))
    unknown = Generated(prior.generator, TINY.latent)
    z = encode(prior.generator, images(2, seed=9))
    labels = torch.zeros(2, dtype=torch.long)
    plain, _ = unknown.decode(z, labels)
    points = unknown.weighted(z).requires_grad_()
    made, _ = unknown.decode(points, labels)
    assert torch.allclose(made, plain, atol=1e-6)
    (slope,) = torch.autograd.grad(made[0].sum(), [points])
    assert slope[0, TINY.latent :].any()
    assert not slope[:, : TINY.latent].any()
    assert not slope[1].any()


def test_the_model_is_not_changed() -> None:
    case = noisy_case(SPEC, sets([1], seed=0))
    attack(case, steps=3, weight_steps=3)
    again = base_model(SPEC).state_dict()
    base = case.transcript.observations[0].payload
    assert all(base[name].equal(value) for name, value in again.items())
