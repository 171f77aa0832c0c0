"""Gradient disaggregation: exact where updates stand still, honest where rounds do not suffice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmi.attacks.base import Case
from fedmi.attacks.engine.participation import annihilator, column, parts
from fedmi.attacks.gradient.disaggregation import GradientDisaggregation
from fedmi.exposure.observation import Observation
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.models.classifiers import MLP
from fedmi.training.local import mean_gradient
from tests.gradient_cases import SERVER, Batch, base_model, make_case, psnr, sets, trained

SPEC = MLP(hidden=(32,), activation="sigmoid")
WORK = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=8), steps=1)
SIZES = [1, 1, 2, 1]
ROUNDS = ((0, 1), (1, 2), (0, 2, 3), (2, 3), (0, 1, 3))


def attack(rounds: int = len(ROUNDS), **options: object) -> GradientDisaggregation:
    fields = {"position": SERVER, "channel": Channel.AGGREGATE, "steps": 150}
    return GradientDisaggregation.model_validate(
        {**fields, "rounds": tuple(range(1, rounds + 1)), **options}
    )


def history(
    batches: list[Batch], rounds: tuple[tuple[int, ...], ...], *, gradients: bool = True
) -> Case:
    """The same model in every round, so that every client's update is the same each time."""
    case = make_case(SPEC, [], [], Channel.AGGREGATE, WORK)
    if gradients:
        own = [mean_gradient(base_model(SPEC), *batch) for batch in batches]
    else:
        own = [trained(SPEC, batch, WORK, Seed.root(0)) for batch in batches]
    seen: list[Observation] = []
    for number, clients in enumerate(rounds, start=1):
        sizes = {c: len(batches[c][1]) for c in clients}
        total = sum(sizes.values())
        mean = {
            n: torch.stack([own[c][n] * (sizes[c] / total) for c in clients]).sum(0) for n in own[0]
        }
        clear = {"num_examples": float(total)} | {
            f"num_examples/{c}": float(s) for c, s in sizes.items()
        }
        averages = Channel.GRADIENT if gradients else Channel.CLIENT_UPDATE
        seen.append(replace(case.transcript.observations[0], round=number))
        seen.append(
            Observation(SERVER, Channel.AGGREGATE, number, clients, mean, 0, clear, averages)
        )
    transcript = replace(case.transcript, observations=tuple(seen))
    targets = attack(len(rounds)).own_targets(transcript)
    return replace(case, transcript=transcript, targets=targets)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 6))
def test_parts_are_exact_where_determined(seed: int, clients: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.integers(0, 2, (clients + more, clients)) * rng.uniform(0.1, 1, clients)
    truth = rng.normal(size=(clients, 7))
    found, determined = parts(shares, shares @ truth)
    assert np.allclose(found[determined], truth[determined], atol=1e-6)
    rank = np.linalg.matrix_rank(shares)
    assert determined.all() == (rank == clients)


def test_a_client_that_is_alone_is_determined_whatever_the_others_do() -> None:
    _, determined = parts(np.array([[1.0, 0, 0], [0, 0.5, 0.5]]), np.zeros((2, 4)))
    assert determined.tolist() == [True, False, False]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_participation_is_recovered_from_counts(noise: float) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (24, 6)).astype(float)
    sums = truth @ rng.normal(size=(6, 300)) + noise * rng.normal(size=(24, 300))
    blocks = [range(start, start + 6) for start in (0, 6, 12, 18)]
    directions = annihilator(sums, 6)
    for client in range(6):
        counts = [int(truth[list(block), client].sum()) for block in blocks]
        found = column(directions, blocks, counts, 30.0)
        assert found is not None
        assert (found == truth[:, client]).all()


@pytest.mark.parametrize("gradients", [True, False])
def test_single_clients_are_told_apart_and_inverted(gradients: bool) -> None:
    batches = sets(SIZES, seed=0)
    case = history(batches, ROUNDS, gradients=gradients)
    assert [(t.id, t.round) for t in case.targets] == [
        ("client 0", 1), ("client 1", 1), ("client 2", 2), ("client 3", 3),
    ]  # fmt: skip
    found = attack().reconstruct(case)
    assert not any(answer.flags for answer in found)
    alone = [row for row, size in enumerate(SIZES) if size == 1]
    scores = psnr([found[row] for row in alone], [batches[row] for row in alone])
    assert scores.min() > 22


def test_other_peoples_history_does_not_help() -> None:
    private, public = sets(SIZES, seed=0), sets(SIZES, seed=1)
    ours, theirs = (attack().reconstruct(history(b, ROUNDS)) for b in (private, public))
    rows = [0, 1, 3]
    better = psnr([ours[r] for r in rows], [private[r] for r in rows]) - psnr(
        [theirs[r] for r in rows], [private[r] for r in rows]
    )
    assert better.min() > 8


def test_counts_alone_give_the_same_answers() -> None:
    rng = np.random.default_rng(1)
    rounds = tuple(tuple(np.flatnonzero(row)) for row in rng.integers(0, 2, (16, 4)) if row.any())
    rounds = tuple(tuple(int(c) for c in clients) for clients in rounds)
    case = history(sets(SIZES, seed=0), rounds)
    options = {"rounds": len(rounds), "steps": 40}
    known = attack(**options).reconstruct(case)
    counted = attack(**options, participation="counts", block_rounds=6).reconstruct(case)
    for ours, theirs in zip(counted, known, strict=True):
        assert not ours.flags
        assert ours.samples is not None
        assert theirs.samples is not None
        assert torch.allclose(ours.samples, theirs.samples, atol=0.2)


def test_too_few_rounds_are_flagged_and_answered() -> None:
    found = attack(1).reconstruct(history(sets(SIZES, seed=0), ((0, 1, 2, 3),)))
    assert all("underdetermined" in answer.flags for answer in found)
    assert all(answer.samples is not None for answer in found)
