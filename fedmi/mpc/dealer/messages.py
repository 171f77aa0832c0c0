"""What a party asks of the dealer, and what it answers.

A request is an HTTP POST to /spu.mpc.semi2k.beaver.ttp_server.BeaverService/OPERATION; its body is
the engine's protobuf message of that operation in JSON form: bytes in base64, fields of value zero
left out. An answer's body is a sequence of parts: a flag byte (0 = data, otherwise an error code),
the length as 8 bytes, little endian, and so many bytes; a part never spans two arrays. Source: SPU
`ttp_server/service.proto` and the reader in `beaver_ttp.cc`; the message definitions are those that
the engine's library carries.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SERVICE = "spu.mpc.semi2k.beaver.ttp_server.BeaverService"
DATA, OPERATION_ERROR, DECRYPT_ERROR = 0, 1, 2
BITS_FIELD_SIZE = 16
"""Requests for AND triples do not name a word size: they are bits, packed into words of 128."""


class RequestError(ValueError):
    """A request that is malformed or asks for what this dealer does not deal."""


@dataclass(frozen=True)
class Input:
    """One array that is known by its generator.

    ciphertexts: the parties' seeds, encrypted. counter: the block where each one's stream begins.
    size: in bytes; of a permutation, in elements.
    """

    ciphertexts: tuple[bytes, ...]
    counter: int
    size: int
    transposed: bool = False


@dataclass(frozen=True)
class Request:
    """operation: the engine's name, such as AdjustMul. word: bytes of a ring element.

    shape: (m, n, k) of a matrix product, else empty. shift: how far to truncate, in bits.
    order: the permutation that one party draws, None unless one is asked for.
    """

    operation: str
    inputs: tuple[Input, ...]
    word: int
    shape: tuple[int, ...] = ()
    shift: int = 0
    order: Input | None = None


def read_request(path: str, body: bytes) -> Request:
    """Raises RequestError, naming the field."""
    service, _, operation = path.strip("/").rpartition("/")
    if service != SERVICE:
        raise RequestError(f"path {path}: /{SERVICE}/OPERATION was expected")
    try:
        content = json.loads(body)
    except ValueError as error:
        raise RequestError(f"{operation}: the body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{operation}: the body is no JSON object")
    if content.get("element_type") in ("GFMP", 2):
        raise RequestError(f"{operation}: element_type GFMP is not dealt, only the ring Z_2^k")
    turned = _list(content, "transpose_inputs")
    inputs = tuple(
        _input(each, index < len(turned) and turned[index] is True)
        for index, each in enumerate(_list(content, "prg_inputs"))
    )
    dot = operation == "AdjustDot"
    word = BITS_FIELD_SIZE if operation == "AdjustAnd" else _number(content, "field_size")
    shape = tuple(_number(content, name) for name in "MNK") if dot else ()
    order = _order(content["perm"]) if "perm" in content else None
    return Request(operation, inputs, word, shape, _number(content, "bits"), order)


def data(buffers: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """The body of an answer: a part for each buffer, as pieces to be sent in order."""
    return [piece for buffer in buffers for piece in (_head(DATA, len(buffer)), buffer)]


def failure(code: int, reason: str) -> list[bytes | memoryview]:
    """The body of an answer that says what is wrong."""
    told = reason.encode()
    return [_head(code, len(told)), told]


def _head(flag: int, size: int) -> bytes:
    return bytes([flag]) + size.to_bytes(8, "little")


def _input(content: object, turned: bool) -> Input:
    if not isinstance(content, Mapping):
        raise RequestError("prg_inputs: an object was expected")
    ciphertexts = tuple(_bytes(text) for text in _list(content, "encrypted_seeds"))
    if not ciphertexts:
        raise RequestError("encrypted_seeds: none are given")
    transposed = turned or content.get("transpose") is True
    counter, size = _number(content, "prg_count"), _number(content, "buffer_len")
    return Input(ciphertexts, counter, size, transposed)


def _order(content: object) -> Input:
    if not isinstance(content, Mapping):
        raise RequestError("perm: an object was expected")
    counter, size = _number(content, "prg_count"), _number(content, "size")
    return Input((_bytes(content.get("encrypted_seeds", "")),), counter, size)


def _bytes(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except binascii.Error as error:
        raise RequestError(f"encrypted_seeds: no base64: {error}") from error


def _number(content: Mapping[str, object], name: str) -> int:
    """An unsigned integer, which JSON may give as text too; 0 where it is left out."""
    value = content.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RequestError(f"{name}: {value!r} is no integer")
    try:
        number = int(value)
    except ValueError as error:
        raise RequestError(f"{name}: {value!r} is no integer") from error
    if not 0 <= number < 1 << 64:
        raise RequestError(f"{name}: {number} is no unsigned integer of 64 bits")
    return number


def _list(content: Mapping[str, object], name: str) -> list[object]:
    value = content.get(name, [])
    if not isinstance(value, list):
        raise RequestError(f"{name}: a list was expected")
    return value
