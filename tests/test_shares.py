"""Shares and what they say: fixed point, the rule of each scheme, opening, uniformity."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Position
from fedmi.models.classifiers import MLP
from fedmi.mpc.errors import RangeError
from fedmi.mpc.opening import Opening
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import Ring, combine, decode, encode
from fedmi.mpc.uniformity import flags, p_value, p_value_of, untested
from tests.share_cases import (
    ABY3,
    PARTY,
    SCHEMES,
    SEMI2K,
    constant_mask,
    nearly_plain,
    reused_mask,
    ring,
    split,
    tensors,
)

THREE = Scheme(protocol="semi2k", parties=3)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(8, 26))
def test_fixed_point_is_exact_to_half_a_unit(values: list[float], bits: int) -> None:
    given_ = np.array(values)
    assert np.abs(decode(encode(given_, bits), bits) - given_).max() <= 2.0 ** -(bits + 1)


def test_sums_of_encodings_wrap_like_signed_numbers() -> None:
    left, right = np.array([3.5, -1.25]), np.array([-7.0, 1.25])
    assert np.array_equal(decode(encode(left, 18) + encode(right, 18), 18), left + right)


@pytest.mark.parametrize("value", [2.0**45, -(2.0**45), np.nan, np.inf])
def test_what_has_no_fixed_point_form_is_refused(value: float) -> None:
    with pytest.raises(RangeError, match=r"below 3\.51844e\+13"):
        encode([0.0, value], 18)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([*SCHEMES, THREE]), st.data())
def test_a_coalition_opens_exactly_from_the_threshold_on(
    seed: int, scheme: Scheme, data: st.DataObject
) -> None:
    secret = ring((2, 3), seed)
    held = split(secret, scheme, seed + 1)
    ranks = st.permutations(range(scheme.size))
    members = data.draw(ranks)[: data.draw(st.integers(0, scheme.size))]
    found = combine({rank: held[rank] for rank in members}, scheme)
    if len(members) >= scheme.threshold:
        assert found is not None
        assert np.array_equal(found, secret)
    else:
        assert found is None


def test_signed_and_unsigned_parts_are_the_same() -> None:
    secret = ring((4,), 0)
    first, second, _ = split(secret, ABY3, 1)
    found = combine({0: first.view(np.int64), 1: second}, ABY3)
    assert found is not None
    assert np.array_equal(found, secret)


def test_parts_that_cannot_be_are_refused() -> None:
    held = split(ring((4,), 0), ABY3, 1)
    with pytest.raises(ValueError, match="party 1 holds another element 1"):
        combine({0: held[0], 1: held[1] + np.uint64(1)}, ABY3)
    with pytest.raises(ValueError, match="party 2 holds another element 0"):
        combine({0: held[0], 2: held[2] ^ np.uint64(4)}, ABY3)
    with pytest.raises(ValueError, match="party 3 is none of aby3, 3 parties"):
        combine({3: held[0]}, ABY3)
    with pytest.raises(ValueError, match="different shapes"):
        combine({0: held[0], 1: held[1][:3]}, ABY3)
    with pytest.raises(ValueError, match="the last axis is 1 long"):
        combine({0: held[0]}, SEMI2K)
    with pytest.raises(TypeError, match="not float64"):
        combine({0: np.zeros((4, 1))}, SEMI2K)  # type: ignore[dict-item]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_engine_shares_by_the_same_rule(scheme: Scheme) -> None:
    pytest.importorskip("spu")
    import spu
    from spu import libspu

    kind = getattr(libspu.ProtocolKind, scheme.protocol.upper())
    config = libspu.RuntimeConfig(protocol=kind, field=libspu.FieldType.FM64)
    config.fxp_fraction_bits = scheme.fraction_bits
    values = np.array([[0.5, -1.25, 3.14159], [0, 1, -100.0]], np.float32)
    made = spu.Io(scheme.size, config).make_shares(values, libspu.Visibility.VIS_SECRET)
    last = 8 * values.size * scheme.elements
    held = [
        np.frombuffer(one.share_chunks[0][-last:], np.uint64).reshape(*values.shape, -1)
        for one in made
    ]
    found = combine(dict(enumerate(held)), scheme)
    assert found is not None
    assert np.abs(decode(found, scheme.fraction_bits) - values).max() <= 2.0**-scheme.fraction_bits


def items(
    scheme: Scheme, payload: dict[str, NDArray[np.float64]], clients: tuple[int, ...], round: int
) -> tuple[Observation, list[Confided]]:
    """Party 0's item, and the same as the other parties hold it."""
    by_name = {
        n: split(encode(v, scheme.fraction_bits), scheme, i)
        for i, (n, v) in enumerate(payload.items())
    }
    held = [tensors({n: parts[r] for n, parts in by_name.items()}) for r in range(scheme.size)]
    seen = Observation(PARTY, Channel.SHARE, round, clients, held[0], 0)
    return seen, [Confided(r, round, held[r], PARTY, clients) for r in range(1, scheme.size)]


@pytest.mark.parametrize("scheme", [*SCHEMES, THREE], ids=str)
def test_an_opening_takes_the_threshold_and_the_same_item(scheme: Scheme) -> None:
    values = {"model/1.weight": np.array([[0.25, -2.0]]), "model/1.bias": np.array([1.5])}
    seen, told = items(scheme, values, (), 2)
    opening, transcript = Opening(scheme), Transcript(PARTY, (seen,))
    enough = told[: scheme.threshold - 1]
    assert opening(seen, transcript, enough[:-1]) is None
    for other in (
        [replace(item, round=1) for item in enough],
        [replace(item, about=(0,)) for item in enough],
        [replace(item, position=Position.CLIENT) for item in enough],
    ):
        assert opening(seen, transcript, other) is None
    opened = opening(seen, transcript, enough)
    assert opened is not None
    assert {n: t.numpy().tolist() for n, t in opened.tensors.items()} == {
        n: v.tolist() for n, v in values.items()
    }


def test_an_opening_leaves_other_items_alone_and_names_garbage() -> None:
    seen, told = items(ABY3, {"inputs": np.ones((2, 1, 2, 2)), "labels": np.eye(2)}, (4,), 1)
    opening, transcript = Opening(ABY3), Transcript(PARTY, ())
    assert opening(replace(seen, position=Position.CURIOUS_SERVER), transcript, told) is None
    share = {"share": torch.zeros(3, dtype=torch.int64)}
    told_share = [replace(item, tensors=share) for item in told]
    assert opening(replace(seen, payload=share), transcript, told_share) is None
    garbage = {**told[0].tensors, "labels": told[0].tensors["labels"] + 1}
    with pytest.raises(ValueError, match="shares of 'labels': party 1 holds another element"):
        opening(seen, transcript, [replace(told[0], tensors=garbage)])


def images(seed: int) -> Ring:
    """Twenty images with a dark border, as encoded; [20, 1, 12, 12]."""
    inside = np.random.default_rng(seed).random((20, 1, 8, 8))
    return encode(np.pad(inside, ((0, 0), (0, 0), (2, 2), (2, 2))), 18)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_true_shares_pass_for_every_party(scheme: Scheme) -> None:
    held = split(images(0), scheme, 1)
    found = [p_value(tensors({"inputs": part})) for part in held]
    assert min(found) > 1e-3
    assert flags(tensors({"inputs": part}) for part in held) == frozenset()


@pytest.mark.parametrize("weak", [nearly_plain, constant_mask, reused_mask])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weak_shares_are_caught(
    weak: Callable[[Ring, Scheme, int], Sequence[Ring]], scheme: Scheme
) -> None:
    held = tensors({"inputs": weak(images(0), scheme, 1)[0]})
    assert p_value(held) < 1e-9
    fine = tensors({"inputs": split(images(0), scheme, 2)[0]})
    (flag,) = flags([fine, held])
    assert flag.startswith("shares_not_uniform: p = ")


def test_elements_that_add_up_to_the_secret_are_caught() -> None:
    mask = ring((20, 1, 12, 12), 3)
    held = tensors({"inputs": np.stack([mask, images(0) - mask], axis=-1)})
    assert p_value(held) < 1e-9


def message(data: bytes) -> dict[str, Tensor]:
    return {
        "message/000000/1/root:1:ALLGATHER": torch.frombuffer(bytearray(data), dtype=torch.uint8)
    }


@pytest.mark.parametrize("bits", [64, 36, 17, 1])
def test_messages_may_leave_high_bits_of_their_words_unused(bits: int) -> None:
    words = ring((4096,), bits) >> np.uint64(64 - bits)
    assert p_value(message(words.tobytes())) > 1e-3
    biased = words & ring((4096,), 9)
    assert p_value(message(biased.tobytes())) < 1e-9


def test_a_plain_value_in_a_message_is_caught() -> None:
    assert p_value(message(images(0).tobytes())) < 1e-9
    assert p_value(message(np.full(64, 7, np.uint64).tobytes())) < 1e-9


def test_what_cannot_be_tested_is_said() -> None:
    ciphertext = message(b"\x5e\xa1\x10\x04\x01\x02\x00\x00" + bytes(range(200)))
    transfer = {"message/000001/1/root:P2P-2:1->0": torch.zeros(99, dtype=torch.uint8) + 7}
    assert p_value(transfer) < 1e-9
    assert p_value({**ciphertext, **transfer}) == 1.0
    assert untested({**ciphertext, **transfer}) == (*ciphertext, *transfer)
    weak = tensors({"inputs": constant_mask(images(0), SEMI2K, 1)[0]})
    assert p_value({**ciphertext, **weak}) < 1e-9
    handshake = message(b"\x02\x00\x00\x00")
    assert untested(handshake) == tuple(handshake)
    assert untested(message(ring((8,), 0).tobytes())) == ()
    assert p_value({}) == 1.0


def test_a_seed_is_tested_by_its_bits() -> None:
    assert p_value({"seed": torch.zeros(32, dtype=torch.uint8)}) < 1e-9
    fine = np.random.default_rng(0).integers(256, size=32, dtype=np.uint8)
    assert p_value({"seed": torch.from_numpy(fine)}) > 1e-3


def messages(*contents: Ring) -> dict[str, Tensor]:
    """As a party records them, in order of arrival."""
    return {
        f"message/{i:06d}/1/root:{i}:P2P": torch.frombuffer(
            bytearray(np.ascontiguousarray(content).tobytes()), dtype=torch.uint8
        )
        for i, content in enumerate(contents)
    }


X, Y = images(0), images(1)
MASK = ring(X.shape, 7)


@pytest.mark.parametrize(
    ("masked", "lone"),
    [
        (messages(X + MASK, ring(X.shape, 8), Y + MASK), messages(X + MASK, ring(X.shape, 8))),
        (messages(MASK, MASK), messages(MASK)),
        (messages(X ^ MASK, Y ^ MASK), messages(X ^ MASK)),
        (messages(X - MASK) | tensors({"inputs": MASK[..., None]}), messages(X - MASK)),
        (
            messages(X - MASK) | tensors({"inputs": np.stack([ring(X.shape, 9), MASK], axis=-1)}),
            messages(X - MASK),
        ),
        (
            messages(X - MASK - ring(X.shape, 9))
            | tensors({"inputs": np.stack([ring(X.shape, 9), MASK], axis=-1)}),
            messages(X - MASK - ring(X.shape, 9)),
        ),
        (
            tensors({"model/a": (X + MASK)[..., None], "model/b": (Y + MASK)[..., None]}),
            tensors({"model/a": (X + MASK)[..., None]}),
        ),
    ],
    ids=["twice", "same", "xor", "own share", "second element", "both elements", "two own"],
)
def test_a_mask_used_twice_is_caught_though_each_tensor_is_uniform(
    masked: dict[str, Tensor], lone: dict[str, Tensor]
) -> None:
    assert p_value(lone) > 1e-3
    assert p_value(masked) < 1e-9
    (flag,) = flags([lone, masked])
    assert flag.startswith("shares_not_uniform: p = ")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_true_shares_beside_true_messages_pass(scheme: Scheme, seed: int) -> None:
    held = split(images(seed), scheme, seed + 20)
    drawn = [ring(X.shape, 1000 * seed + i) for i in range(5)]
    narrow = [one >> np.uint64(28) for one in drawn[:2]]
    parties = [messages(*drawn, *narrow) | tensors({"inputs": part}) for part in held]
    assert p_value_of(parties) > 1e-3
    assert flags(parties) == frozenset()


def test_several_parties_are_one_test() -> None:
    assert p_value(tensors({"share": ring((4096,), 1) & ring((4096,), 2)})) > 0
    nearly = tensors({"share": np.where(np.arange(4096) < 60, 0, ring((4096,), 3))})
    alone = p_value(nearly)
    assert 0 < alone < 0.05
    fine = [tensors({"share": ring((4096,), seed)}) for seed in range(4, 13)]
    assert p_value_of([nearly, *fine]) == pytest.approx(min(1.0, 10 * alone))
    assert p_value_of([]) == 1.0
    assert p_value_of([{}, message(b"\x02\x00\x00\x00")]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [ABY3, SEMI2K], ids=str)
def test_what_the_engine_sends_is_not_related_by_design(scheme: Scheme, tmp_path: Path) -> None:
    """Inference and a training step of an MLP: all shares and messages of every party."""
    pytest.importorskip("spu")
    from fedmi.mpc.cluster import Cluster
    from fedmi.mpc.compile import inference_program, training_program

    network, shape = MLP(hidden=(16,)).build((1, 8, 8), 10, Seed.root(1)), (1, 8, 8)
    step = training_program(network, 16, shape, 10, Recipe(learning_rate=0.1))
    found = []
    with Cluster(scheme, tmp_path, timeout_seconds=60) as cluster:
        cluster.share("x", np.random.default_rng(0).random((16, *shape), np.float32))
        cluster.share("y", np.eye(16, 10, dtype=np.float32))
        for name, weight in network.named_parameters():
            cluster.share(f"p/{name}", weight.detach().numpy())
        for program in (inference_program(network, 16, shape), step):
            held = {f"model/{name}": cluster.held(name) for name in program.inputs}
            cluster.run(program, record=True)
            for rank, received in enumerate(cluster.received()):
                heard = [np.frombuffer(one.value, np.uint8) for one in received if one.value]
                own = tensors({name: parts[rank] for name, parts in held.items()})
                found.append(messages(*heard) | own)  # type: ignore[arg-type]
    assert all(_heard(max(party.values(), key=_heard)) > 1000 for party in found)
    assert p_value_of(found) > 1e-4
    again = {**found[0], "message/999999/1/again": max(found[0].values(), key=_heard)}
    assert p_value_of([again, *found[1:]]) < 1e-9


def _heard(tensor: Tensor) -> int:
    return len(tensor) if tensor.dtype == torch.uint8 else 0


@pytest.mark.parametrize("words", [4, 20, 40, 300, 5000])
def test_p_values_of_uniform_words_are_uniform(words: int) -> None:
    drawn = [tensors({"share": ring((words,), seed)}) for seed in range(400)]
    found = np.array([p_value(held) for held in drawn])
    for level in (0.05, 0.5):
        spread = (level * (1 - level) / 400) ** 0.5
        assert abs((found < level).mean() - level) < 4 * spread + 0.02


def test_boolean_shares_of_one_bit_a_byte_are_no_alarm_and_biased_ones_are() -> None:
    rng = np.random.default_rng(4)
    fair = {
        f"message/{n:06d}/1/ALLGATHER": torch.from_numpy(rng.integers(0, 2, size, dtype=np.uint8))
        for n, size in enumerate([40, 120, 240, 640, 1024] * 20)
    }
    assert p_value(fair) > 1e-3
    biased = torch.from_numpy((rng.random(640) < 0.8).astype(np.uint8))
    assert p_value({**fair, "message/000099/1/ALLGATHER": biased}) < 1e-6
    assert p_value({"message/000000/1/ALLGATHER": torch.ones(640, dtype=torch.uint8)}) < 1e-6
