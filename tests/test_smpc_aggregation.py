"""Aggregators: the exact mean, nothing to any n - 1 of them, and faults that are named."""

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from fedmi.deployments import saved
from fedmi.deployments.base import DeploymentError
from fedmi.deployments.federated.deployment import Federated
from fedmi.exposure import wire
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.payload import store
from fedmi.exposure.words import Channel, Position
from fedmi.protections.base import Update
from fedmi.protections.dp.user_level import UserLevelDP
from fedmi.protections.smpc_aggregation import client as client_half
from fedmi.protections.smpc_aggregation import frames, messages
from fedmi.protections.smpc_aggregation.aggregator import HOST
from fedmi.protections.smpc_aggregation.client import deliver, sealed
from fedmi.protections.smpc_aggregation.control import Beginning, Report, pack_clients
from fedmi.protections.smpc_aggregation.fixed_point import (
    FixedPoint,
    InconsistentSumError,
    OutOfRangeError,
)
from fedmi.protections.smpc_aggregation.frames import Frame, Head, Kind
from fedmi.protections.smpc_aggregation.holding import Held, Holding, RefusedError
from fedmi.protections.smpc_aggregation.messages import Whereabouts
from fedmi.protections.smpc_aggregation.process import Aggregator, AggregatorError
from fedmi.protections.smpc_aggregation.sealing import SealError, public_of, seal, unseal
from fedmi.protections.smpc_aggregation.server import SMPCServer
from fedmi.protections.smpc_aggregation.sharing import (
    added,
    expanded,
    from_bytes,
    split,
    to_bytes,
)
from fedmi.protections.smpc_aggregation.smpc_aggregation import SMPCAggregation
from fedmi.protections.transport import Collected, PartySeen, RoundAbortedError
from tests.deployment_fixtures import WithBuffers, job, same
from tests.protection_fixtures import Bench, Tamper, mean_of, setting, updates
from tests.ray_fixture import two_cpus

__all__ = ["two_cpus"]

SMPC = {"kind": "smpc_aggregation"}
SERVER, PARTY = Position.CURIOUS_SERVER, Position.COMPUTE_PARTY


@contextmanager
def bench(
    clients: int = 5,
    tamper: Tamper | None = None,
    *,
    parts: Mapping[int, Update] | None = None,
    network: nn.Module | None = None,
    min_clients: int = 0,
    **options: object,
) -> Iterator[Bench]:
    transport = SMPCAggregation.model_validate(options)
    wanted = setting(transport, clients, network=network, min_clients=min_clients)
    tamper = tamper or (lambda client, reply: reply)
    run = Bench(transport, wanted, parts or updates(wanted), tamper)
    try:
        yield run
    finally:
        run.server.close()


def members(run: Bench) -> list[Aggregator]:
    assert isinstance(run.server, SMPCServer)
    return run.server.members


def distance(mean: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert list(mean) == list(wanted)
    assert all(mean[name].shape == wanted[name].shape for name in wanted)
    gaps = [(mean[n].double() - t.double()).abs().max() for n, t in wanted.items() if t.numel()]
    return float(max(gaps))


def check_exact(collected: Collected, run: Bench, clients: Iterable[int]) -> None:
    """The mean is that of these clients, within the bound, and the bound is worth something."""
    clients = tuple(clients)
    assert collected.clients == clients
    gap = distance(collected.mean, mean_of(run.updates, clients))
    assert gap <= collected.error_bound < 1e-6
    assert collected.weight == sum(run.updates[c].weight for c in clients)


# --- sharing ------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(0, 2**64 - 1), max_size=40),
    parties=st.integers(2, 7),
)
def test_shares_add_up(values: list[int], parties: int) -> None:
    vector = np.array(values, dtype=np.uint64)
    seeds, share = split(vector, parties)
    assert len(set(seeds)) == len(seeds) == parties - 1
    parts = [*(expanded(seed, len(vector)) for seed in seeds), share]
    assert np.array_equal(added(parts, len(vector)), vector)
    assert np.array_equal(from_bytes(to_bytes(share)), share)


@given(seed=st.binary(min_size=32, max_size=32), elements=st.integers(0, 20))
def test_a_seed_expands_as_counter_mode_says(seed: bytes, elements: int) -> None:
    block = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    counters = b"".join(n.to_bytes(16, "big") for n in range((elements + 1) // 2))
    stream = block.update(counters)[: 8 * elements]
    assert expanded(seed, elements).tolist() == list(struct.unpack(f"<{elements}Q", stream))


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_any_two_of_three_shares_look_uniform(left_out: int) -> None:
    """Of a vector of one number, far from uniform, the bytes and the sum of two shares are."""
    elements = 40_000
    vector = np.full(elements, 12345, dtype=np.uint64)
    seeds, share = split(vector, 3)
    parts = [*(expanded(seed, elements) for seed in seeds), share]
    del parts[left_out]
    for seen in (*parts, added(parts, elements)):
        counts = np.bincount(np.frombuffer(seen.tobytes(), dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    unhidden = np.bincount(np.frombuffer(vector.tobytes(), dtype=np.uint8), minlength=256)
    assert stats.chisquare(unhidden).pvalue < 1e-12


@given(data=st.binary(max_size=60), flipped=st.integers(0, 10**6))
def test_only_the_receiver_unseals_and_only_what_was_sealed(data: bytes, flipped: int) -> None:
    own, header = X25519PrivateKey.generate(), b"header"
    box = seal(data, public_of(own), header)
    assert unseal(box, own, header) == data
    changed = bytearray(box)
    changed[flipped % len(box)] ^= 1
    for wrong in ((bytes(changed), own, header), (box, own, b"other"), (box[:40], own, header)):
        with pytest.raises(SealError):
            unseal(*wrong)
    with pytest.raises(SealError):
        unseal(box, X25519PrivateKey.generate(), header)
    with pytest.raises(SealError):
        unseal(bytes(len(box)), own, header)  # a public key of low order


# --- fixed point --------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.floats(0.01, 1000) | st.integers(1, 10**4),
            st.lists(st.floats(-500, 500, width=32), min_size=3, max_size=3),
        ),
        min_size=2,
        max_size=6,
    ),
    bits=st.integers(12, 30),
)
def test_no_entry_is_further_off_than_the_bound(
    rows: list[tuple[float, list[float]]], bits: int
) -> None:
    coder = FixedPoint(bits, len(rows), 2.0**20, {"w": (3,)})
    total = added(
        (coder.encode(Update({"w": torch.tensor(row)}, weight, 1)) for weight, row in rows), 5
    )
    weight, mean = coder.decode(total, len(rows))
    furthest = float(mean["w"].abs().max())
    bound = coder.error_bound(weight, len(rows), furthest)
    whole = sum(Fraction(weight) for weight, _ in rows)
    for place in range(3):
        exact = sum(Fraction(weight) * Fraction(row[place]) for weight, row in rows) / whole
        assert abs(Fraction(float(mean["w"].float()[place])) - exact) <= Fraction(bound)


@given(clients=st.integers(1, 10**5), bits=st.integers(8, 40))
def test_no_number_of_clients_wraps(clients: int, bits: int) -> None:
    coder = FixedPoint(bits, clients, 1.0, {"w": (1,)})
    assert clients * coder.limit < 2**63
    assert coder.limit <= 2**53
    furthest = torch.tensor([-coder.reach], dtype=torch.float64)
    vector = coder.encode(Update({"w": furthest}, 1.0, 1))
    assert vector.view(np.int64)[1] == -coder.limit
    with pytest.raises(OutOfRangeError):
        coder.encode(Update({"w": 1.001 * furthest}, 1.0, 1))


def test_what_is_out_of_range_is_named() -> None:
    coder = FixedPoint(24, 10, 100.0, {"a.bias": (2,), "w": (1, 2)})
    good = Update({"a.bias": torch.zeros(2), "w": torch.zeros(1, 2)}, 10.0, 10)
    coder.encode(good)
    far = {**good.tensors, "w": torch.tensor([[1.0, -6e8]])}
    with pytest.raises(OutOfRangeError, match=r"'w' holds -6e\+08, which times the weight 10 is"):
        coder.encode(replace(good, tensors=far))
    for weight, words in ((101.0, "max_weight 100"), (-1.0, r"outside 0"), (1e-9, "rounds to 0")):
        with pytest.raises(OutOfRangeError, match=words):
            coder.encode(replace(good, weight=weight))
    broken = {**good.tensors, "a.bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(ValueError, match=r"'a.bias' is not finite"):
        coder.encode(replace(good, tensors=broken))
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\), expected \(1, 2\)"):
        coder.encode(replace(good, tensors={**good.tensors, "w": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"not the model's: odd"):
        coder.encode(replace(good, tensors={**good.tensors, "odd": torch.zeros(2)}))


@given(place=st.integers(0, 5), change=st.integers(1, 2**64 - 1))
def test_the_checksum_finds_a_changed_element(place: int, change: int) -> None:
    coder = FixedPoint(24, 3, 100.0, {"w": (4,)})
    total = coder.encode(Update({"w": torch.arange(4.0)}, 2.0, 2))
    weight, mean = coder.decode(total, 1)
    assert (weight, mean["w"].tolist()) == (2.0, [0.0, 1.0, 2.0, 3.0])
    total[place : place + 1] += np.uint64(change)
    with pytest.raises(InconsistentSumError, match="checksum"):
        coder.decode(total, 1)


# --- the mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregators", [2, 3, 5])
def test_the_mean_is_the_plain_one(aggregators: int) -> None:
    with bench(7, aggregators=aggregators) as run:
        for number in (1, 2):
            collected = run.round(number)
            check_exact(collected, run, range(7))
            assert not collected.failed
            assert not collected.flags
            assert collected.examples == {}
        assert all(tensor.dtype == torch.float32 for tensor in collected.mean.values())


class Odd(nn.Module):
    """A scalar, an empty tensor and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))
        self.scalar = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0))


def test_odd_shapes_and_weights_that_are_not_whole() -> None:
    wanted = setting(SMPCAggregation(), 4, network=Odd())
    weights = [0.3, 17.0, 1e-3, 1234.567]
    parts = {c: replace(u, weight=weights[c]) for c, u in updates(wanted, scale=3).items()}
    with bench(4, network=Odd(), parts=parts) as run:
        collected = run.round()
        gap = distance(collected.mean, mean_of(parts, range(4)))
        assert gap <= collected.error_bound < 1e-5


def test_a_subset_is_asked_and_a_client_of_weight_zero_adds_nothing() -> None:
    wanted = setting(SMPCAggregation(), 6)
    parts = updates(wanted)
    parts[4] = replace(parts[4], weight=0.0)
    with bench(6, parts=parts) as run:
        collected = run.round(asked=[1, 4, 5])
        check_exact(collected, run, (1, 4, 5))
        gone = {c: replace(u, weight=0.0) for c, u in parts.items()}
    with bench(6, parts=gone) as run, pytest.raises(RoundAbortedError, match="weight 0"):
        run.round()


def test_replies_show_nothing_and_shares_go_round() -> None:
    with bench(6) as run:
        run.round()
        assert all(run.transport.crossing(reply) is None for _, reply in run.replies)
        sizes = {wire.size(reply) for _, reply in run.replies}
        assert sizes == {wire.content_size(messages.reply_content(1))}
        full = {(v.party, v.client) for v in run.server.party_views() if "share" in v.payload}
        assert full == {(c % 3, c) for c in range(6)}


@pytest.mark.parametrize(("clients", "aggregators"), [(4, 2), (5, 3)])
def test_traffic_is_predicted_to_the_byte(clients: int, aggregators: int) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2))
    with bench(clients, network=network, aggregators=aggregators) as run:
        down, beside = 0, [0, 0]
        inner = run.inner.send_and_receive

        def counted(sent: Iterable[Message], **rest: object) -> Iterable[Message]:
            nonlocal down
            listed = list(sent)
            down += wire.total_size(listed)
            return inner(listed)

        run.inner.send_and_receive = counted  # type: ignore[method-assign, assignment]
        for number in range(1, run.setting.rounds + 1):
            collected = run.round(number)
            beside = [a + b for a, b in zip(beside, collected.side_bytes, strict=True)]
        up = sum(wire.size(reply) for _, reply in run.replies)
        predicted, each = run.transport.traffic(run.setting), clients * run.setting.rounds
        assert up + beside[0] == each * predicted.up + predicted.setup_up
        assert down + beside[1] == each * predicted.down + predicted.setup_down
        received = sum(view.wire_bytes for view in run.server.party_views())
        shares = client_half.sent_bytes(run.transport._coder(run.setting), aggregators)  # type: ignore[attr-defined]
        assert received == clients * shares


# --- clients that fail --------------------------------------------------------------------------


def test_a_client_whose_reply_is_lost_is_left_out() -> None:
    with bench(6, lambda client, reply: None if client in (0, 3) else reply) as run:
        collected = run.round()
        check_exact(collected, run, (1, 2, 4, 5))
        assert collected.failed == {0: "no reply", 3: "no reply"}
        assert collected.flags == {"clients_lost"}


def delivering(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Frame, int, Whereabouts], bool]
) -> None:
    """Before each delivery; it takes place where `act` says so."""

    def tampered(frame: Frame, rank: int, where: Whereabouts, seconds: float) -> None:
        if act(frame, rank, where):
            deliver(frame, rank, where, seconds)

    monkeypatch.setattr(client_half, "deliver", tampered)


def test_a_client_lost_in_the_middle_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(frame: Frame, rank: int, where: Whereabouts) -> bool:
        if frame.client == 2 and rank == 1:
            with socket.create_connection((where.host, where.ports[1])) as line:
                line.sendall(frame.head.packed() + frame.body[:20])
            raise ConnectionAbortedError("the client died")
        return True

    delivering(monkeypatch, die)
    with bench(5) as run:
        collected = run.round()
        check_exact(collected, run, (0, 1, 3, 4))
        assert "the client died" in collected.failed[2]
        assert any("SE" in f or "SHARE of client 2" in f for f in collected.flags)


def test_a_client_that_says_done_without_being_done_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delivering(monkeypatch, lambda frame, rank, where: (frame.client, rank) != (1, 2))
    with bench(4) as run:
        collected = run.round()
        check_exact(collected, run, (0, 2, 3))
        assert collected.failed == {1: "aggregator 2 has no share of it"}


def test_a_repeated_share_puts_its_client_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(frame: Frame, rank: int, where: Whereabouts) -> bool:
        if (frame.client, rank) == (3, 1):
            deliver(frame, rank, where, 5.0)
        return True

    delivering(monkeypatch, twice)
    with bench(5) as run:
        collected = run.round()
        check_exact(collected, run, (0, 1, 2, 4))
        assert collected.failed == {3: "aggregator 1 refuses it: client 3 sent its share twice"}


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (Kind.SHARE, bytes(16), r"a share of 16 bytes, expected 208"),
        (Kind.SHARE, bytes(216), r"a share of 216 bytes, expected 208"),
        (Kind.SEED, bytes(31), r"a seed of 31 bytes, expected 32"),
        (Kind.SHARE, bytes(2**24 + 10_000), r"announces 16787264 bytes, expected at most"),
    ],
)
def test_a_share_of_the_wrong_size_puts_its_client_out_by_name(
    kind: Kind, data: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(frame: Frame, rank: int, where: Whereabouts) -> bool:
        if (frame.client, rank) == (0, 1):
            other = sealed(kind, data, frame.round, 0, where.public_keys[1])
            with contextlib.suppress(client_half.SharingError):
                deliver(other, rank, where, 5.0)
            return False
        return True

    delivering(monkeypatch, wrong)
    with bench(4) as run:
        collected = run.round()
        check_exact(collected, run, (1, 2, 3))
        assert collected.failed.keys() == {0}
        assert words in collected.failed[0]


def test_an_overflow_is_named_at_the_client() -> None:
    wanted = setting(SMPCAggregation(), 4)
    parts = updates(wanted)
    parts[1] = replace(
        parts[1], tensors={**parts[1].tensors, "bias": torch.tensor([0.0, 1e9, 0.0])}
    )
    with bench(4, parts=parts) as run:
        collected = run.round()
        check_exact(collected, run, (0, 2, 3))
        assert "OutOfRangeError: 'bias' holds 1e+09" in collected.failed[1]


def test_too_few_clients_open_nothing() -> None:
    with bench(4, lambda client, reply: reply if client == 2 else None) as run:
        with pytest.raises(RoundAbortedError, match=r"1 of 4 clients sent an update, 2 needed"):
            run.round()
        assert run.server.party_views()  # they hold shares, and opened nothing
    enough = bench(4, lambda c, reply: reply if c < 2 else None, min_clients=3)
    with enough as run, pytest.raises(RoundAbortedError, match=r"2 of 4 .* 3 needed") as error:
        run.round()
    assert error.value.failed == {2: "no reply", 3: "no reply"}


def test_a_reply_of_another_round_or_twice_does_not_count() -> None:
    def tamper(client: int, reply: Message) -> Message:
        if client == 1:
            reply.content.config_records[messages.RECORD] = ConfigRecord({messages.SHARED: 9})
        return reply

    with bench(4, tamper) as run:
        collected = run.round()
        assert collected.failed == {1: "acknowledges round 9, expected 1"}
        check_exact(collected, run, (0, 2, 3))
        reply = run.replies[0][1]
    messages.read_reply([reply], 1)
    with pytest.raises(messages.MalformedMessageError, match="replied 2 times"):
        messages.read_reply([reply, reply], 1)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {messages.HOST: HOST, messages.PORTS: [1, 2], messages.KEYS: [bytes(32), b"x" * 32]},
        {messages.HOST: HOST, messages.PORTS: [1, 1, 2], messages.KEYS: [bytes(32)] * 3},
        {messages.HOST: HOST, messages.PORTS: [1, 2, 70000],
         messages.KEYS: [bytes(32), b"x" * 32, b"y" * 32]},
        {messages.HOST: HOST, messages.PORTS: [1, 2, 3], messages.KEYS: [b"x", b"y", b"z"]},
    ],
)  # fmt: skip
def test_a_client_is_not_told_fewer_aggregators_than_agreed(record: dict[str, object]) -> None:
    with bench(3) as run:
        run.round()
        message = Message(run.replies[0][1].content, 1000, "train")
    message.content[messages.RECORD] = ConfigRecord(record)  # type: ignore[arg-type]
    with pytest.raises(messages.MalformedMessageError):
        messages.read_request(message, 3)


# --- aggregators that fail ----------------------------------------------------------------------


def test_an_aggregator_that_dies_before_or_in_a_round_is_named() -> None:
    def kill(client: int, reply: Message) -> Message:
        if run.server is not None and len(run.replies) == stop_at:
            members(run)[1].process.kill()
        return reply

    stop_at = 6
    with bench(4, kill) as run:
        check_exact(run.round(1), run, range(4))
        with pytest.raises(RoundAbortedError, match=r"round 2: aggregator 1 died \(status -9\)"):
            run.round(2)
        assert not members(run)
        stop_at = -1
        check_exact(run.round(3), run, range(4))  # with new ones
        members(run)[2].process.kill()
        with pytest.raises(RoundAbortedError, match=r"round 4: aggregator 2 died"):
            run.round(4)


def test_an_aggregator_that_hangs_is_named() -> None:
    def stop(client: int, reply: Message) -> Message:
        if len(run.replies) == 6 + 3:  # the third client of the second round
            members(run)[0].process.send_signal(signal.SIGSTOP)
        return reply

    with bench(6, stop, aggregators=2, timeout_seconds=1.5) as run:
        run.round(1)
        with pytest.raises(RoundAbortedError, match=r"aggregator 0 did not answer for 1.5 s"):
            run.round(2)
        run.round(3)
        members(run)[1].process.send_signal(signal.SIGSTOP)
        with pytest.raises(RoundAbortedError, match=r"aggregator 1 did not answer for 1.5 s"):
            run.round(4)


def test_clients_do_not_wait_for_a_hanging_aggregator_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is ended after the first of them has waited, and all others are turned away."""
    waited = []

    def hang(frame: Frame, rank: int, where: Whereabouts) -> bool:
        if rank == 1:
            if not waited:
                members(run)[1].process.send_signal(signal.SIGSTOP)
            waited.append(frame.client)
            deliver(frame, rank, where, 60.0)
        return rank != 1

    delivering(monkeypatch, hang)
    words = r"aggregator 1 did not answer for 1.5 s"
    with (
        bench(8, aggregators=2, timeout_seconds=1.5) as run,
        pytest.raises(RoundAbortedError, match=words),
    ):
        run.round()
    assert waited == list(range(8))


@contextmanager
def liar(real: Aggregator, lie: Callable[[Frame], bytes]) -> Iterator[int]:
    """Its port: passes on what the real aggregator answers, but for what `lie` makes of it."""
    listener = socket.create_server((HOST, 0))
    port = real.port

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                line, _ = listener.accept()
                with line, socket.create_connection((HOST, port)) as behind:
                    frames.send(behind, frames.receive(line, 2**30))
                    line.sendall(lie(frames.receive(behind, 2**30)))

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def packed(frame: Frame) -> bytes:
    return frame.head.packed() + frame.body


@pytest.mark.parametrize(
    ("kind", "lie", "words"),
    [
        (Kind.SUM, lambda f: packed(replace(f, body=f.body[:-8])),
         r"aggregator 1 sent a sum of 200 bytes, expected 208"),
        (Kind.SUM, lambda f: b"HTTP/1.1 200 OK\r\n\r\nhello there",
         r"aggregator 1 sent garbage: .*begins with b'HTTP'"),
        (Kind.SUM, lambda f: packed(f)[:100],
         r"aggregator 1 sent garbage: .*closed after 76 of 208"),
        (Kind.SUM, lambda f: b"", r"aggregator 1 sent garbage: .*closed before an answer"),
        (Kind.SUM, lambda f: packed(replace(f, round=7)), r"aggregator 1 answered for round 7"),
        (Kind.SUM, lambda f: packed(replace(f, kind=Kind.OK)), r"answered OPEN with OK"),
        (Kind.SUM, lambda f: packed(replace(f, body=bytes(2**20))), r"announces 1048576 bytes"),
        (Kind.SUM, lambda f: packed(replace(f, body=os.urandom(len(f.body)))),
         r"sums do not fit together, the checksum"),
        (Kind.HELD, lambda f: packed(replace(f, body=f.body[:30])),
         r"aggregator 1 sent garbage: its report"),
    ],
)  # fmt: skip
def test_what_an_aggregator_makes_up_is_noticed(
    kind: Kind, lie: Callable[[Frame], bytes], words: str
) -> None:
    with bench(3, aggregators=2) as run:
        assert isinstance(run.server, SMPCServer)
        run.server.start()
        chosen = members(run)[1]
        altered = lambda frame: lie(frame) if frame.kind == kind else packed(frame)  # noqa: E731
        with liar(chosen, altered) as port:
            chosen.port = port
            with pytest.raises(RoundAbortedError, match=words):
                run.round(1)


def taken_after_a_free_one() -> socket.socket:
    """A server whose port is taken while the port below is free."""
    while True:
        taken = socket.create_server((HOST, 0))
        try:
            socket.create_server((HOST, taken.getsockname()[1] - 1)).close()
        except OSError:
            taken.close()
        else:
            return taken


def test_a_taken_port_is_refused_by_name() -> None:
    with taken_after_a_free_one() as taken:
        port = taken.getsockname()[1]
        first = port - 1
        with bench(3, port=first, aggregators=2) as run:
            with pytest.raises(RoundAbortedError, match=rf"port {port} .*cannot be had.*in use"):
                run.round()
            assert not members(run)


def neighbours() -> int:
    """A free port before another one, below those that systems hand out by chance."""
    for port in range(20_000, 30_000, 2):
        try:
            with socket.create_server((HOST, port)), socket.create_server((HOST, port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no two free ports in a row")


def test_fixed_ports_are_used() -> None:
    port = neighbours()
    with bench(3, port=port, aggregators=2) as run:
        run.round()
        assert [member.port for member in members(run)] == [port, port + 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregators": 1}, "aggregators is 1, expected at least 2: one aggregator alone"),
        ({"aggregators": 0}, "expected at least 2"),
        ({"aggregators": 99}, "less than or equal to 16"),
        ({"port": 65534}, "beyond 65535"),
        ({"fraction_bits": 4}, "greater than or equal to 8"),
        ({"thresold": 2}, "Extra inputs"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SMPCAggregation.model_validate(options)


def test_problems_are_told_before_anything_runs() -> None:
    transport = SMPCAggregation(max_weight=50, fraction_bits=24)
    assert not transport.problems(setting(transport, 4))
    assert "needs 3 clients" in transport.problems(setting(transport, 2))[0]
    (heavy,) = transport.problems(setting(transport, 3, records=(4, 60, 5)))
    assert "max_weight 50 is below 60" in heavy
    fine = SMPCAggregation(max_weight=2.0**30, fraction_bits=40)
    (far,) = fine.problems(setting(fine, 3))
    assert "use fewer fraction_bits than 40" in far


# --- one aggregator -----------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[Aggregator]:
    aggregator = Aggregator.started(0, 0, 5.0)
    aggregator.greet()
    yield aggregator
    aggregator.stop()


def begin(aggregator: Aggregator, clients: Iterable[int] = (0, 1, 2), round: int = 1) -> None:
    body = Beginning(3, 2, tuple(clients)).packed()
    aggregator.ask(Kind.BEGIN, Kind.OK, round, body)


def give(aggregator: Aggregator, client: int, data: bytes = bytes(32), round: int = 1) -> None:
    frame = sealed(Kind.SEED, data, round, client, aggregator.public_key)
    deliver(frame, 0, Whereabouts(HOST, (aggregator.port,), (aggregator.public_key,)), 5.0)


def report(aggregator: Aggregator, round: int = 1) -> Report:
    return Report.read(aggregator.ask(Kind.RECEIVED, Kind.HELD, round).body)


def test_a_sum_is_opened_once_and_of_two_clients_at_least(alone: Aggregator) -> None:
    begin(alone)
    for client in (0, 1, 2):
        give(alone, client, bytes([client]) * 32)
    for clients, words in (
        ((0,), "1 clients, at least 2"),
        ((0, 0), "1 clients, at least 2"),
        ((0, 5), "client 5"),
    ):
        with pytest.raises(AggregatorError, match=words):
            alone.ask(Kind.OPEN, Kind.SUM, 1, pack_clients(clients))
    total = alone.ask(Kind.OPEN, Kind.SUM, 1, pack_clients((0, 2)))
    wanted = added((expanded(bytes([c]) * 32, 3) for c in (0, 2)), 3)
    assert np.array_equal(from_bytes(total.body), wanted)
    with pytest.raises(AggregatorError, match="was opened before"):
        alone.ask(Kind.OPEN, Kind.SUM, 1, pack_clients((0, 1)))
    with pytest.raises(client_half.SharingError, match="closed"):
        give(alone, 1)


def test_only_the_server_that_started_it_is_obeyed(alone: Aggregator) -> None:
    begin(alone)
    give(alone, 0)
    give(alone, 1)
    stranger = replace(alone, token=bytes(32))
    for kind in (Kind.BEGIN, Kind.RECEIVED, Kind.OPEN, Kind.VIEW):
        with pytest.raises(AggregatorError, match="does not come from the server"):
            stranger.ask(kind, Kind.OK, 1, pack_clients((0, 1)))
    assert sorted(report(alone).held) == [0, 1]


def test_shares_that_nobody_expects_are_refused(alone: Aggregator) -> None:
    begin(alone)
    for client, round, words in ((7, 1, "client 7 was not asked"), (0, 2, "round 2 is not open")):
        with pytest.raises(client_half.SharingError, match=words):
            give(alone, client, round=round)
    begin(alone, round=2)
    assert report(alone, 2).malformed == (0, ())  # a new round forgets the one before
    with pytest.raises(AggregatorError, match="round 1 is not the latest"):
        report(alone, 1)


def test_a_client_that_is_out_stays_out() -> None:
    holding = Holding(1, Beginning(3, 2, (0, 1)))
    seed = Held(Kind.SEED, bytes(32), 104)
    holding.take(0, seed)
    for _ in range(2):
        with pytest.raises(RefusedError, match="twice"):
            holding.take(0, seed)
    assert 0 not in holding.held
    holding.take(1, seed)
    with pytest.raises(RefusedError, match="no share of client 0"):
        holding.sum((0, 1))


def mutated(rng: random.Random, public_key: bytes) -> bytes:
    """Something that is no valid share of a client in the round."""
    kind = rng.choice(list(Kind))
    frame = sealed(Kind.SEED, rng.randbytes(32), rng.choice([0, 1, 2**32 - 1]), 77, public_key)
    honest = packed(frame)
    how = rng.randrange(6)
    if how == 0:
        return rng.randbytes(rng.randrange(1, 200))
    if how == 1:
        return honest[: rng.randrange(1, len(honest))]
    if how == 2:
        place = rng.randrange(len(honest))
        return (
            honest[:place] + bytes([honest[place] ^ (1 << rng.randrange(8))]) + honest[place + 1 :]
        )
    if how == 3:
        length = rng.choice([0, 1, 31, 2**24, 2**40, 2**64 - 1])
        return Head(kind, 1, rng.choice([0, 77]) if kind > Kind.SHARE else 77, length).packed()
    if how == 4:
        return packed(Frame(kind, 1, 77, rng.randbytes(rng.randrange(100))))
    return packed(Frame(kind, 1, 77)) * rng.randrange(2, 5)


def test_malformed_frames_are_survived_and_named(alone: Aggregator) -> None:
    begin(alone)
    rng, sent = random.Random(5), 2000
    for _ in range(sent):
        with socket.create_connection((HOST, alone.port)) as line, contextlib.suppress(OSError):
            line.sendall(mutated(rng, alone.public_key))
            line.shutdown(socket.SHUT_WR)
            while line.recv(65536):
                pass
    assert alone.process.poll() is None
    for client in (0, 1, 2):
        give(alone, client, bytes([client]) * 32)
    deadline = time.monotonic() + 20
    while (found := report(alone)).malformed[0] < sent and time.monotonic() < deadline:
        time.sleep(0.05)
    count, first = found.malformed
    assert count >= sent
    assert sorted(found.held) == [0, 1, 2]
    assert not found.refused
    assert all(words.startswith(f"from {HOST}:") or "client" in words for words in first)
    total = alone.ask(Kind.OPEN, Kind.SUM, 1, pack_clients((0, 1, 2)))
    assert np.array_equal(
        from_bytes(total.body), added((expanded(bytes([c]) * 32, 3) for c in range(3)), 3)
    )


def test_an_aggregator_dies_with_its_parent_and_knows_no_torch() -> None:
    code = (
        "import time\n"
        "from fedmi.protections.smpc_aggregation.process import Aggregator\n"
        "a = Aggregator.started(0, 0, 5.0)\n"
        "a.greet()\n"
        "print(a.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/maps").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
        if "Z (zombie)" in status_of(pid):
            break
    assert not status_of(pid) or "Z (zombie)" in status_of(pid)


def status_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return ""


def test_closing_ends_the_processes() -> None:
    with bench(3) as run:
        run.round()
        processes = [member.process for member in members(run)]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


# --- what is seen, and what it takes to open it ---------------------------------------------------


def as_seen(view: PartySeen, round: int = 1, to: Path | None = None) -> Observation | Confided:
    payload = store(view.payload, to / f"{view.party}-{view.client}.st") if to else view.payload
    if view.party == 0:
        about = (view.client,)
        return Observation(PARTY, Channel.SHARE, round, about, payload, view.wire_bytes)
    return Confided(view.party, round, payload, PARTY, (view.client,))


def test_all_aggregators_together_open_an_update_and_fewer_do_not(tmp_path: Path) -> None:
    with bench(4, aggregators=4) as run:
        run.round()
        items = [as_seen(view, to=tmp_path) for view in run.server.party_views()]
    seen = [item for item in items if isinstance(item, Observation)]
    told = [item for item in items if isinstance(item, Confided)]
    assert (len(seen), len(told)) == (4, 12)

    def opened(item: Observation, tellers: Iterable[Confided]) -> Opened | None:
        return run.transport.opened(item, Transcript(PARTY, (item,)), list(tellers), run.setting)

    for item in seen:
        (client,) = item.clients
        found = opened(item, told)
        assert found is not None
        assert distance(found.tensors, run.updates[client].tensors) < 1e-6
        for silent in (1, 2, 3):
            assert opened(item, [t for t in told if t.client != silent]) is None
        assert opened(item, []) is None
        others = [t if t.about != item.clients else replace(t, about=(9,)) for t in told]
        assert opened(item, others) is None
        assert opened(item, [replace(t, round=2) for t in told]) is None
        assert opened(item, [replace(t, position=Position.CLIENT) for t in told]) is None
        mixed = [replace(t, about=item.clients) for t in told if t.about != item.clients]
        assert opened(item, mixed) is None
        assert opened(replace(item, position=SERVER), told) is None


def test_a_view_is_what_the_aggregator_received() -> None:
    with bench(3, lambda client, reply: None if client == 1 else reply) as run:
        run.round()
        views = {(v.party, v.client): v for v in run.server.party_views()}
        assert set(views) == {(p, c) for p in range(3) for c in range(3)}
        coder = run.transport._coder(run.setting)  # type: ignore[attr-defined]
        for client in range(3):
            parts = []
            for party in range(3):
                (name, tensor) = next(iter(views[party, client].payload.items()))
                kind = torch.int64 if name == "share" else torch.uint8
                assert (tensor.dtype, len(tensor)) == (kind, 26 if name == "share" else 32)
                raw = tensor.numpy()
                parts.append(
                    raw.view(np.uint64) if name == "share" else expanded(raw.tobytes(), 26)
                )
            assert np.array_equal(added(parts, 26), coder.encode(run.updates[client]))


# --- a whole training ---------------------------------------------------------------------------


def federated(*protections: dict[str, object], **changes: object) -> Federated:
    given = {"name": "f", "clients": 4, "rounds": 3, "protections": protections, **changes}
    return Federated.model_validate(given)


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_a_training_gives_the_plain_model(strategy: str, tmp_path: Path) -> None:
    options: dict[str, object] = {"strategy": {"kind": strategy}, "fraction": 0.75}
    task = job(tmp_path / "a", WithBuffers(), record=(1, 2), batch_size=8)
    plain = federated(**options).train(task)
    task = replace(job(tmp_path / "b", WithBuffers(), record=(1, 2), batch_size=8), confide=True)
    shared = federated(SMPC, **options).train(task)
    for name, tensor in plain.state.items():
        torch.testing.assert_close(shared.state[name].float(), tensor.float(), rtol=0, atol=3e-5)
    assert any(flag.startswith("aggregation_error") for flag in shared.flags)
    assert not any(flag.startswith(("aggregate_wrong", "malformed")) for flag in shared.flags)
    saved.save(shared, tmp_path / "b")
    shared = saved.load(tmp_path / "b")
    server = {seen.channel for seen in shared.transcripts[SERVER].observations}
    assert server == {Channel.AGGREGATE, Channel.GLOBAL_MODEL}
    held = shared.transcripts[PARTY].on(Channel.SHARE)
    assert {(item.round, item.clients) for item in held} == {
        (round, (client,)) for round, client in shared.used
    }
    assert all(set(item.payload) <= {"share", "seed"} and not item.clear for item in held)


def test_what_a_recorded_training_lets_aggregators_open(tmp_path: Path) -> None:
    plain = federated().train(job(tmp_path / "a", record=(1,)))
    task = replace(job(tmp_path / "b", record=(1,)), confide=True)
    deployment = federated(SMPC)
    outcome = deployment.train(task)
    network = task.model.blueprint(task.split.private.shape, task.split.classes)
    opener = deployment.opener(network, task.recipe)
    assert opener is not None
    base = plain.transcripts[SERVER].global_model(1)
    sent = {i.clients: i for i in plain.transcripts[SERVER].on(Channel.CLIENT_UPDATE, [1])}
    told = [t for t in outcome.confided if t.position == PARTY]
    for item in outcome.transcripts[PARTY].on(Channel.SHARE, [1]):
        found = opener(item, outcome.transcripts[PARTY], told)
        assert found is not None
        fewer = [t for t in told if t.client == 1]
        assert opener(item, outcome.transcripts[PARTY], fewer) is None
        for name, change in found.tensors.items():
            wanted = sent[item.clients].payload[name] - base[name]
            torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)
    (aggregate,) = outcome.transcripts[SERVER].on(Channel.AGGREGATE)
    assert aggregate.clear == {"num_examples": 48.0}


def test_bytes_of_a_training_are_those_predicted(tmp_path: Path) -> None:
    task = job(tmp_path)
    deployment = federated(SMPC)
    outcome = deployment.train(task)
    network = task.model.blueprint(task.split.private.shape, task.split.classes)
    predicted = SMPCAggregation().traffic(deployment.setting(network, task.recipe))
    assert outcome.cost.wire_bytes_up == 12 * predicted.up + predicted.setup_up
    assert outcome.cost.wire_bytes_down == 12 * predicted.down + predicted.setup_down


def test_dropouts_and_failures_in_a_training(tmp_path: Path) -> None:
    lossy: dict[str, object] = {"dropout": 0.6, "clients": 5, "rounds": 6}
    with pytest.raises(DeploymentError, match=r"'f', round \d: . of 5 clients sent an update"):
        federated(SMPC, **lossy).train(job(tmp_path / "a"))
    outcome = federated(SMPC, failed_round="skip", **lossy).train(job(tmp_path / "b"))
    assert any(flag.startswith("rounds_skipped") for flag in outcome.flags)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeploymentError, match=rf"aggregator 0 did not start: port {port}"):
            federated({**SMPC, "port": port}).train(job(tmp_path / "c"))


def test_behind_user_level_privacy_no_weight_is_told() -> None:
    private = UserLevelDP(noise_multiplier=1.0)
    transport = SMPCAggregation()
    wanted = setting(transport, 4, protections=(private,))
    parts = {c: replace(u, weight=1.0) for c, u in updates(wanted).items()}
    run = Bench(transport, wanted, parts)
    try:
        collected = run.round()
    finally:
        run.server.close()
    assert collected.weight == 0.0
    assert distance(collected.mean, mean_of(parts, range(4))) <= collected.error_bound


@pytest.mark.slow
def test_ray_and_this_process_train_the_same_model(tmp_path: Path, two_cpus: None) -> None:
    here = federated(SMPC).train(job(tmp_path / "a"))
    there = federated(SMPC).train(job(tmp_path / "b", workers=2))
    assert same(here.state, there.state)
    assert here.cost.wire_bytes_up == there.cost.wire_bytes_up


@pytest.mark.slow
def test_flower_trains_the_same_model(tmp_path: Path) -> None:
    here = federated(SMPC).train(job(tmp_path / "a", record=(1,)))
    there = federated(SMPC, engine="flower").train(job(tmp_path / "b", record=(1,)))
    assert same(here.state, there.state)
    held = [outcome.transcripts[PARTY].on(Channel.SHARE) for outcome in (here, there)]
    assert [i.clients for i in held[0]] == [i.clients for i in held[1]]
