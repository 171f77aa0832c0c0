"""The dealer of Beaver triples: its arithmetic, its process, what it sees, what it could do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gmalg")

from gmalg import SM2

from fedmi.mpc.dealer import Dealer
from fedmi.mpc.dealer.collusion import Factors, openings, products
from fedmi.mpc.dealer.messages import SERVICE, RequestError, data, read_request
from fedmi.mpc.dealer.prg import permutation, stream
from fedmi.mpc.dealer.ring import matmul
from fedmi.mpc.dealer.sm2 import DecryptError, KeyPair
from fedmi.mpc.dealer.triples import RULES, Source, Task, adjust
from fedmi.mpc.errors import MPCError

SEEDS = (bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48)))
MODULUS = 1 << 64


def words(index: int, task: Task) -> list[int]:
    """What all parties together hold, added block by block with Python's integers."""
    source = task.sources[index]
    width = task.word
    drawn = [stream(seed, source.counter, source.size).tobytes() for seed in source.seeds]
    return [
        sum(int.from_bytes(one[at : at + width], "little") for one in drawn) % (1 << 8 * width)
        for at in range(0, source.size, width)
    ]


def task(count: int, size: int = 80, word: int = 8, parties: int = 3, **rest: object) -> Task:
    sources = tuple(Source(SEEDS[:parties], 10 * index, size) for index in range(count))
    return Task(sources, word, **rest)  # type: ignore[arg-type]


def corrections(operation: str, given: Task) -> list[list[int]]:
    width = given.word
    return [
        [int.from_bytes(part[at : at + width], "little") for at in range(0, len(part), width)]
        for part in map(bytes, adjust(operation, given))
    ]


def test_a_stream_is_aes_of_its_block_numbers() -> None:
    block = Cipher(algorithms.AES(SEEDS[0]), modes.ECB()).encryptor()
    expected = b"".join(block.update(number.to_bytes(16, "little")) for number in range(5, 9))
    assert stream(SEEDS[0], 5, 50).tobytes() == expected[:50]
    with pytest.raises(ValueError, match="16 bytes"):
        stream(b"short", 0, 8)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 300), counter=st.integers(0, 1 << 40))
def test_a_permutation_holds_everything_once(size: int, counter: int) -> None:
    assert sorted(permutation(SEEDS[0], counter, size)) == list(range(size))


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 4), k=st.sampled_from([1, 7, 511, 512, 513, 1030]), n=st.integers(1, 4))
def test_matrix_products_are_exact_in_the_ring(m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(m * k + n)
    left = rng.integers(0, MODULUS - 1, (m, k), dtype=np.uint64, endpoint=True)
    right = rng.integers(0, MODULUS - 1, (k, n), dtype=np.uint64, endpoint=True)
    exact = left.astype(object) @ right.astype(object) % MODULUS
    assert np.array_equal(matmul(left, right), exact.astype(np.uint64))
    full = np.full((2, 512), MODULUS - 1, dtype=np.uint64)
    assert np.all(matmul(full, full.T) == 512)


@pytest.mark.parametrize("word", [4, 8])
def test_products_truncations_and_bits_come_out_right(word: int) -> None:
    bits, modulus = 8 * word, 1 << 8 * word
    given_ = task(3, word=word)
    a, b, c = (words(index, given_) for index in range(3))
    (adjusted,) = corrections("AdjustMul", given_)
    assert [(x + y) % modulus for x, y in zip(adjusted, c, strict=True)] == [
        x * y % modulus for x, y in zip(a, b, strict=True)
    ]
    (adjusted,) = corrections("AdjustSquare", task(2, word=word))
    assert [(x + y) % modulus for x, y in zip(adjusted, b, strict=True)] == [
        x * x % modulus for x in a
    ]
    (adjusted,) = corrections("AdjustTrunc", task(2, word=word, shift=5))
    signed = [x - modulus if x >> bits - 1 else x for x in a]
    assert [(x + y) % modulus for x, y in zip(adjusted, b, strict=True)] == [
        (x >> 5) % modulus for x in signed
    ]
    below, top = corrections("AdjustTruncPr", task(3, word=word, shift=5))
    assert [(x + y) % modulus for x, y in zip(below, b, strict=True)] == [
        x % (modulus >> 1) >> 5 for x in a
    ]
    assert [(x + y) % modulus for x, y in zip(top, c, strict=True)] == [x >> bits - 1 for x in a]
    drawn = corrections("AdjustRandBit", task(1, 8 * 1024, word=word))[0]
    bit = [(x + y) % modulus for x, y in zip(drawn, words(0, task(1, 8 * 1024, word)), strict=True)]
    assert set(bit) == {0, 1}
    assert 0.4 < np.mean(bit) < 0.6


def test_bits_are_shared_by_exclusive_or() -> None:
    three = task(3, 37)
    parts = [stream(seed, source.counter, 37) for source in three.sources for seed in SEEDS]
    a, b, c = (parts[i] ^ parts[i + 1] ^ parts[i + 2] for i in (0, 3, 6))
    (adjusted,) = adjust("AdjustAnd", three)
    assert np.array_equal(np.frombuffer(adjusted, np.uint8) ^ c, a & b)
    two = task(2)
    (adjusted,) = adjust("AdjustEqz", two)
    parts = [stream(seed, 10, 80) for seed in SEEDS]
    other = np.frombuffer(adjusted, np.uint8) ^ parts[0] ^ parts[1] ^ parts[2]
    assert other.view(np.uint64).tolist() == words(0, two)


def test_matrices_and_permutations_come_out_right() -> None:
    m, n, k = 2, 3, 4
    sides = ((m, k), (k, n), (m, n))
    sources = tuple(
        Source(SEEDS, 100 * i, 8 * rows * columns, transposed=i == 0)
        for i, (rows, columns) in enumerate(sides)
    )
    product = Task(sources, 8, (m, n, k))
    a, b, c = (np.array(words(i, product), dtype=object) for i in range(3))
    (adjusted,) = corrections("AdjustDot", product)
    left = a.reshape(k, m).T
    assert np.array_equal(
        (np.array(adjusted, dtype=object).reshape(m, n) + c.reshape(m, n)) % MODULUS,
        left @ b.reshape(k, n) % MODULUS,
    )
    moved = task(2, order=Source(SEEDS[:1], 7, 10))
    places = permutation(SEEDS[0], 7, 10)
    (adjusted,) = corrections("AdjustPerm", moved)
    total = [(x + y) % MODULUS for x, y in zip(adjusted, words(1, moved), strict=True)]
    assert [total[place] for place in places] == words(0, moved)


def test_a_private_product_takes_one_factor_from_each_of_two() -> None:
    two = task(2, parties=2)
    a, b = (stream(seed, 0, 80).view(np.uint64) for seed in SEEDS[:2])
    (adjusted,) = adjust("AdjustMulPriv", two)
    c = np.array(words(1, two), dtype=np.uint64)
    assert np.array_equal(np.frombuffer(adjusted, np.uint64) + c, a * b)
    with pytest.raises(RequestError, match="2 parties, not 3"):
        adjust("AdjustMulPriv", task(2))


@pytest.mark.parametrize(
    ("operation", "wrong", "told"),
    [
        ("AdjustNothing", task(3), "AdjustNothing is not dealt"),
        ("AdjustMul", task(2), "3 prg_inputs are needed, 2 given"),
        ("AdjustMul", task(3, word=16), "field_size 16"),
        ("AdjustMul", task(3, 77), "multiple of 8"),
        ("AdjustMul", task(3, 0), "buffer_len"),
        ("AdjustTrunc", task(2, shift=64), "bits = 64"),
        ("AdjustDot", task(3, shape=(2, 2, 2)), "10 elements"),
        ("AdjustPerm", task(2), "permutation of 10"),
    ],
)
def test_a_request_that_does_not_add_up_is_refused(operation: str, wrong: Task, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        adjust(operation, wrong)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/else/AdjustMul", b"{}", "was expected"),
        (f"/{SERVICE}/AdjustMul", b"\x08\x01", "no JSON"),
        (f"/{SERVICE}/AdjustMul", b'{"element_type": "GFMP"}', "GFMP"),
        (f"/{SERVICE}/AdjustMul", b'{"prg_inputs": [{"prg_count": 1}]}', "encrypted_seeds"),
        (f"/{SERVICE}/AdjustTrunc", b'{"bits": -1}', "bits: -1"),
        (f"/{SERVICE}/AdjustMul", b'{"prg_inputs": [{"encrypted_seeds": ["*"]}]}', "base64"),
        (f"/{SERVICE}/AdjustMul", b'{"field_size": "x"}', "field_size"),
    ],
)
def test_a_malformed_request_is_named(path: str, body: bytes, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        read_request(path, body)


def test_answers_are_flag_length_and_content() -> None:
    assert b"".join(data([b"ab", b"c"])) == b"\0\2" + bytes(7) + b"ab\0\1" + bytes(7) + b"c"


def der(raw: bytes) -> bytes:
    """C1 | C3 | C2 of the library as the engine writes it."""
    parts = [
        (2, raw[1:33].lstrip(b"\0")),
        (2, raw[33:65].lstrip(b"\0")),
        (4, raw[65:97]),
        (4, raw[97:]),
    ]
    body = b""
    for tag, part in parts:
        padded = b"\0" + part if tag == 2 and part[0] & 0x80 else part
        body += bytes([tag, len(padded)]) + padded
    return bytes([0x30, len(body)]) + body


def test_seeds_are_decrypted_and_nothing_else_is_taken_for_one() -> None:
    keys, others = KeyPair.generate(), KeyPair.generate()
    sealed = der(SM2(pk=keys.public).encrypt(SEEDS[0]))
    assert keys.decrypt(sealed) == SEEDS[0]
    assert keys.secret.hex() not in repr(keys)
    spoilt = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for wrong in (b"", b"0", sealed[:-1], sealed + b"x", spoilt, b"\x04" + sealed[1:]):
        with pytest.raises(DecryptError):
            keys.decrypt(wrong)
    with pytest.raises(DecryptError, match="this dealer's key"):
        others.decrypt(sealed)


def ask(dealer: Dealer, operation: str, body: bytes) -> bytes:
    """The body of the answer to a raw request."""
    host, port = dealer.config().server_host.split(":")
    with socket.create_connection((host, int(port)), 10) as line:
        head = f"POST /{SERVICE}/{operation} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n"
        line.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: line.recv(1 << 16), b""))
    return answer.partition(b"\r\n\r\n")[2]


def test_the_process_refuses_in_the_protocols_words_and_logs_it(tmp_path: Path) -> None:
    dealer = Dealer(tmp_path)
    with pytest.raises(MPCError, match="not been started"):
        dealer.config()
    with dealer:
        assert dict(dealer.config())["asym_crypto_schema"] == "sm2"
        assert ask(dealer, "AdjustMul", b"nonsense")[0] == 1
        seeds = {"encrypted_seeds": ["MAA="], "buffer_len": 8}
        assert ask(dealer, "AdjustSquare", json.dumps({"prg_inputs": [seeds]}).encode())[0] == 2
        (_, port) = dealer.config().server_host.split(":")
        with pytest.raises(MPCError, match=rf"port {port}: .*in use"), Dealer(port=int(port)):
            pass
    assert [entry["bytes_in"] for entry in dealer.log()] == [
        8,
        len(json.dumps({"prg_inputs": [seeds]})),
    ]
    with pytest.raises(OSError, match="refused"):
        ask(dealer, "AdjustMul", b"")
    with pytest.raises(ValueError, match="port = 65536"):
        Dealer(port=65536)


def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fedmi.mpc.dealer import Dealer\n"
        "with Dealer(Path(sys.argv[1])) as dealer:\n"
        "    sys.stdout.write(dealer.config().server_host + '\\n'); sys.stdout.flush()\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        host, port = parent.stdout.readline().strip().split(":")
        socket.create_connection((host, int(port)), 5).close()
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), 5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the dealer outlived its parent")


Function = Callable[..., object]


def engine_config(dealer: Dealer) -> object:
    from spu import libspu

    config = libspu.RuntimeConfig()
    options = {
        "protocol": "SEMI2K",
        "field": "FM64",
        "fxp_fraction_bits": 18,
        "beaver_type": "TrustedThirdParty",
        "ttp_beaver_config": dict(dealer.config()),
    }
    assert config.ParseFromJsonString(json.dumps(options))
    return config


def compute(dealer: Dealer, parties: int, function: Function, *inputs: object) -> list[object]:
    """By the engine's own parties, in threads; only the dealer is a process."""
    from spu.utils import simulation

    simulator = simulation.Simulator(parties, engine_config(dealer))
    return list(simulation.sim_jax(simulator, function)(*inputs))


def everything(x: object, y: object, w1: object, w2: object) -> tuple[object, ...]:
    import jax.numpy as jnp

    hidden = jnp.maximum(x @ w1, 0)  # type: ignore[operator]
    return (
        x * y,  # type: ignore[operator]
        x * x,  # type: ignore[operator]
        x.T @ y,  # type: ignore[attr-defined]
        (x > y).astype(jnp.float32),  # type: ignore[operator]
        (jnp.round(x) == jnp.round(y)).astype(jnp.float32),
        x / (1 + y * y),  # type: ignore[operator]
        hidden @ w2,
        jnp.argmax(hidden @ w2, axis=1),
        x.T @ (hidden * (hidden > 0)),  # type: ignore[attr-defined]
    )


def arrays(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((6, 20), (6, 20), (20, 8), (8, 3))
    return tuple(rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("parties", [2, 3])
def test_the_engine_computes_with_its_triples(parties: int, tmp_path: Path) -> None:
    pytest.importorskip("spu")
    with Dealer(tmp_path) as dealer:
        found = compute(dealer, parties, everything, *arrays(0))
    for got, expected in zip(found, everything(*arrays(0)), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-3)
    log = dealer.log()
    dealt = {entry["operation"] for entry in log}
    truncation = {"AdjustMulPriv"} if parties == 2 else {"AdjustTruncPr"}
    assert {
        "AdjustMul",
        "AdjustSquare",
        "AdjustDot",
        "AdjustAnd",
        "AdjustEqz",
    } | truncation <= dealt
    assert dealt <= RULES.keys()
    seeds = {tuple(each["seeds"]) for entry in log for each in entry["inputs"]}  # type: ignore[attr-defined]
    assert len(seeds) == 1
    assert len(set(seeds.pop())) == parties


def test_the_engine_sorts_by_dealt_permutations(tmp_path: Path) -> None:
    pytest.importorskip("spu")
    import jax.numpy as jnp

    values = arrays(3)[0][:, 0]
    with Dealer(tmp_path) as dealer:
        found = compute(dealer, 2, lambda x: (jnp.sort(x),), values)
    np.testing.assert_allclose(np.asarray(found[0]), np.sort(values), atol=1e-3)
    assert "AdjustPerm" in {entry["operation"] for entry in dealer.log()}


def test_what_it_sees_does_not_depend_on_data(tmp_path: Path) -> None:
    pytest.importorskip("spu")
    seen = []
    for seed in (1, 2):
        with Dealer(tmp_path / str(seed)) as dealer:
            compute(dealer, 2, everything, *arrays(seed))
        seen.append([])
        for entry in dealer.log():
            inputs = [{**each, "seeds": len(each["seeds"])} for each in entry["inputs"]]  # type: ignore[attr-defined]
            seen[-1].append({**entry, "inputs": inputs, "bytes_in": 0})
    assert seen[0] == seen[1]
    assert len(seen[0]) > 20


@pytest.mark.parametrize("parties", [2, 3])
def test_with_one_party_it_opens_the_others_inputs(parties: int, tmp_path: Path) -> None:
    pytest.importorskip("spu")
    from fedmi.mpc.cluster import Cluster
    from fedmi.mpc.compile import compiled
    from fedmi.mpc.scheme import Scheme

    x, _, w, _ = arrays(4)
    shapes = {"x": x.shape, "w": w.shape}
    program = compiled("product", lambda x, w: [(x @ w) ** 2], shapes, ["y"])
    with Cluster(Scheme(protocol="semi2k", parties=parties), tmp_path) as cluster:
        cluster.share("x", x)
        cluster.share("w", w)
        cluster.run(program, record=True)
        held = [(cluster.held("x")[rank], cluster.held("w")[rank]) for rank in range(parties)]
        heard, dealt = cluster.received(), cluster.dealt()
    (product,) = products(dealt, x.shape[1])
    assert not products(dealt, x.shape[1] + 1)
    assert not list(openings(product, heard[0][:0]))
    for rank, (left, right) in enumerate(held):
        own = Factors(left[..., 0], right[..., 0])
        opened = own + product.of_others(next(openings(product, heard[rank])))
        assert np.array_equal(opened.left, sum(each[..., 0] for each, _ in held))
        assert np.abs(opened.left.view(np.int64) / 2**18 - x).max() <= 2.0**-18
        assert np.abs(opened.right.view(np.int64) / 2**18 - w).max() <= 2.0**-18
        assert np.abs(own.left.view(np.int64) / 2**18 - x).max() > 1e6
