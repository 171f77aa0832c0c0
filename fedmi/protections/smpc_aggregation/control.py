"""The bodies of what server and aggregator say to each other. No torch here."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOKEN_BYTES = 32
"""Before every body from the server; known to it and to the aggregators it started."""
LEAST_OPENED = 2
"""An aggregator never adds up fewer clients: the sum would be one's update."""

_BEGIN = struct.Struct(">QII")
_COUNT = struct.Struct(">QQI")
_HELD = struct.Struct(">IQ")
_CLIENT = struct.Struct(">I")


class ControlError(ValueError):
    """A body is not what its kind asks for; says why."""


@dataclass(frozen=True)
class Beginning:
    """A round opens. elements: of the vector shared. least: clients whose sum may be opened."""

    elements: int
    least: int
    clients: tuple[int, ...]

    def packed(self) -> bytes:
        head = _BEGIN.pack(self.elements, self.least, len(self.clients))
        return head + pack_clients(self.clients)

    @classmethod
    def read(cls, body: bytes) -> "Beginning":
        if len(body) < _BEGIN.size:
            raise ControlError(f"{len(body)} bytes do not begin a round")
        elements, least, count = _BEGIN.unpack_from(body)
        clients = read_clients(body[_BEGIN.size :])
        if len(clients) != count:
            raise ControlError(f"{len(clients)} clients follow, {count} were announced")
        return cls(elements, least, clients)


@dataclass(frozen=True)
class Report:
    """What an aggregator has of a round.

    held: client -> bytes of its message as received. received_bytes, answered_bytes: on its lines
    with clients, refused messages included. refused: client -> why its share does not count.
    malformed: what else came and was no share, (how many, the first few).
    """

    held: Mapping[int, int]
    received_bytes: int
    answered_bytes: int
    refused: Mapping[int, str]
    malformed: tuple[int, tuple[str, ...]]

    def packed(self) -> bytes:
        told = {
            "refused": {str(client): why for client, why in self.refused.items()},
            "malformed": self.malformed[0],
            "first": list(self.malformed[1]),
        }
        held = b"".join(_HELD.pack(client, size) for client, size in sorted(self.held.items()))
        head = _COUNT.pack(self.received_bytes, self.answered_bytes, len(self.held))
        return head + held + json.dumps(told).encode()

    @classmethod
    def read(cls, body: bytes) -> "Report":
        """ControlError."""
        try:
            received, answered, count = _COUNT.unpack_from(body)
            rest = body[_COUNT.size :]
            end = count * _HELD.size
            held = dict(_HELD.iter_unpack(rest[:end]))
            told = json.loads(rest[end:])
            refused = {int(client): str(why) for client, why in told["refused"].items()}
            malformed = (int(told["malformed"]), tuple(str(why) for why in told["first"]))
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ControlError(f"its report cannot be read: {error}") from error
        if len(held) != count:
            raise ControlError(f"its report lists {len(held)} of {count} clients")
        return cls(held, received, answered, refused, malformed)


def pack_clients(clients: Sequence[int]) -> bytes:
    return b"".join(_CLIENT.pack(client) for client in clients)


def read_clients(body: bytes) -> tuple[int, ...]:
    if len(body) % _CLIENT.size:
        raise ControlError(f"{len(body)} bytes are no list of clients")
    return tuple(client for (client,) in _CLIENT.iter_unpack(body))
