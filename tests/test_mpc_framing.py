"""The engine's protocol in a byte stream, the record of messages, the control line, the log."""

import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmi.mpc.counters import Counters, EngineLog, read_counters
from fedmi.mpc.framing import FramingError, Push, Stream
from fedmi.mpc.lines import Line, LineError
from fedmi.mpc.record import Recorder, read_record
from fedmi.mpc.relay import Incoming, Ledger
from fedmi.mpc.signature import input_shapes
from fedmi.mpc.tally import Tally

DETAILS = "Link details: total send bytes {}, recv bytes {}, send actions {}, recv actions {}\n"


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def frame(sender: int, key: str, value: bytes, chunk: tuple[int, int] | None = None) -> bytes:
    """As the protocol's text has it, written without the parser's help."""
    body = field(1, sender) + field(2, key.encode()) + field(3, value)
    if chunk is not None:
        body += field(4, 1) + field(5, field(1, chunk[1]) + field(2, chunk[0]))
    meta = field(1, field(1, b"ReceiverService") + field(2, b"Push"))
    return b"PRPC" + struct.pack(">II", len(meta) + len(body), len(meta)) + meta + body


KEYS = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=20)
MESSAGES = st.lists(st.tuples(st.integers(0, 7), KEYS, st.binary(max_size=400)), max_size=6)


@given(MESSAGES, st.integers(1, 97))
def test_a_stream_cut_anywhere_gives_the_messages_back(
    messages: list[tuple[int, str, bytes]], cut: int
) -> None:
    data = b"".join(
        frame(sender, f"{key}\x01\x02{number + 1}", value)
        for number, (sender, key, value) in enumerate(messages)
    )
    stream = Stream()
    got = [push for at in range(0, len(data), cut) for push in stream.feed(data[at : at + cut])]
    assert [(push.sender, push.key, push.value) for push in got] == messages
    assert not any(push.is_control for push in got)


@pytest.mark.parametrize("key", ["ACK\x01\x02", "FIN\x01\x02", "connect_1\x01\x020"])
def test_control_messages_count_as_framing_only(key: str) -> None:
    (push,) = Stream().feed(frame(1, key, b"12"))
    tally = Tally()
    tally.add(push)
    assert push.is_control
    assert (tally.messages, tally.received_bytes, tally.rounds) == (0, 0, 0)


@given(st.binary(min_size=1, max_size=60))
def test_bytes_that_do_not_begin_like_a_frame_are_refused_at_once(junk: bytes) -> None:
    if b"PRPC".startswith(junk[:4]):
        junk = b"\x00" + junk
    with pytest.raises(FramingError, match="begins with"):
        list(Stream().feed(junk))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PRPC" + struct.pack(">II", 1 << 30, 4), "announces 1073741824 bytes"),
        (b"PRPC" + struct.pack(">II", 4, 5) + b"1234", "meta part of 5"),
        (b"PRPC" + struct.pack(">II", 2, 0) + b"\x1a\x7f", "127 bytes where 0 are left"),
        (b"PRPC" + struct.pack(">II", 1, 0) + b"\x0b", "wire type 3"),
        (b"PRPC" + struct.pack(">II", 1, 0) + b"\x80", "does not end"),
        (b"PRPC" + struct.pack(">II", 2, 0) + b"\x08\x01", "without a sender's rank, a key"),
        (frame(1, "k\x01\x021", b"1234", (8, 10)), "4 bytes at 8 of a message of 10"),
    ],
)
def test_a_malformed_frame_says_what_is_wrong(data: bytes, what: str) -> None:
    with pytest.raises(FramingError, match=what):
        list(Stream().feed(data))


def test_chunks_are_one_message_and_are_put_together(tmp_path: Path) -> None:
    value = bytes(range(200))
    parts = [(100, value[100:]), (0, value[:100])]
    data = b"".join(frame(2, "r:1:X\x01\x021", part, (at, 200)) for at, part in parts)
    data += frame(1, "r:1:X\x01\x021", b"other")
    recorder, tally = Recorder(tmp_path / "f"), Tally()
    for push in Stream().feed(data):
        tally.add(push)
        recorder.add(push)
    recorder.close()
    assert read_record(tmp_path / "f") == [(2, "r:1:X", value), (1, "r:1:X", b"other")]
    assert (tally.messages, tally.received_bytes) == (2, 205)
    assert tally.rounds == 1, "one collective operation"


def test_a_record_that_ends_within_a_message_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.add(Push(1, "k", b"12", 0, 4, is_control=False))
    recorder.close()
    with pytest.raises(ValueError, match="2 of 4 bytes"):
        read_record(tmp_path / "f")


@pytest.mark.parametrize(
    ("frames", "blamed"),
    [
        ([b"junk that is no frame"], None),
        ([frame(2, "a\x01\x021", b"1"), b"junk that is no frame"], 2),
        ([frame(2, "a\x01\x021", b"1"), frame(1, "b\x01\x021", b"1")], 2),
        ([frame(0, "a\x01\x021", b"1")], None),
        ([frame(5, "a\x01\x021", b"1")], None),
    ],
)
def test_garbage_is_laid_to_who_spoke_on_the_connection(
    frames: list[bytes], blamed: int | None
) -> None:
    told: list[tuple[int | None, str]] = []
    ledger = Ledger(0, 3, lambda sender, reason: told.append((sender, reason)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        incoming = Incoming(ours, theirs)
        for data in [*frames, b"and more"]:
            ledger.put(incoming, data)
        ledger.settle()
    assert [sender for sender, _ in told] == [blamed], "once"


HEADERS = st.dictionaries(
    KEYS.filter(lambda key: key != "blobs"), st.integers() | KEYS | st.none(), max_size=4
)


@given(HEADERS, st.lists(st.binary(max_size=300), max_size=3))
def test_a_control_line_carries_what_was_sent(
    header: dict[str, object], blobs: list[bytes]
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Line(ours).send(header, blobs)
        got = Line(theirs).receive(1.0)
    assert (got.header, got.blobs) == (header, tuple(blobs))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (b"\x02\x00\x00\x00[]", "list, not an object"),
        (b"\x02\x00\x00\x00{}", "no list of blob sizes"),
        (b"\x03\x00\x00\x00\xff{}", "garbage"),
        (b"\x10\x00\x00\x00{", "closed"),
    ],
)
def test_garbage_on_a_control_line_is_named(data: bytes, what: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        with pytest.raises(LineError, match=what):
            Line(theirs).receive(1.0)


def test_a_silent_control_line_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(LineError, match="in time"):
        Line(theirs).receive(0.01)


def test_counters_are_summed_over_executions_and_read_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EngineLog(path)
    assert log.counters() == Counters()
    first, second = DETAILS.format(10, 20, 3, 4), DETAILS.format(1, 2, 3, 4)
    path.write_text("noise\n" + first + second[:30])
    assert log.counters() == Counters(1, 10, 20, 3, 4)
    path.write_text("noise\n" + first + second)
    assert log.counters() == Counters(2, 11, 22, 6, 8)
    path.write_text(second)
    assert log.counters() == Counters(3, 12, 24, 9, 12), "the engine began a new file"
    assert read_counters(b"Link details: total send bytes x") == Counters()


def test_the_shapes_that_a_program_takes_are_read_from_it() -> None:
    code = (
        b"module @m {\n  func.func @main(%arg0: tensor<4x5x!pphlo.secret<f32>>, "
        b"%arg1: tensor<!pphlo.secret<f32>>, %arg2: tensor<7x!pphlo.secret<f32>>) -> "
        b"(tensor<3x!pphlo.secret<f32>>) {\n"
    )
    assert input_shapes(code) == ((4, 5), (), (7,))
    with pytest.raises(ValueError, match="no function main"):
        input_shapes(b"\x00\x01")
