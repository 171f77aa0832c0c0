"""What server and clients say over Flower: where the aggregators are, and that all have a share."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedmi.exposure import wire
from fedmi.protections.smpc_aggregation.sealing import PUBLIC_BYTES

RECORD = "smpc-aggregation"
HOST, PORTS, KEYS = "host", "ports", "public-keys"
SHARED = "shared"


class MalformedMessageError(ValueError):
    """A message is not what the protocol asks for; says what is wrong with it."""


@dataclass(frozen=True)
class Whereabouts:
    """Of the aggregators, by rank."""

    host: str
    ports: tuple[int, ...]
    public_keys: tuple[bytes, ...]


def request(content: RecordDict, where: Whereabouts) -> RecordDict:
    """The round's own message, and where the shares go."""
    record = ConfigRecord(
        {HOST: where.host, PORTS: list(where.ports), KEYS: list(where.public_keys)}
    )
    return RecordDict({**dict(content.items()), RECORD: record})


def read_request(message: Message, aggregators: int) -> Whereabouts:
    """MalformedMessageError."""
    record = message.content.config_records.get(RECORD, ConfigRecord())
    host, ports, keys = record.get(HOST), record.get(PORTS), record.get(KEYS)
    if not isinstance(host, str) or not isinstance(ports, list) or not isinstance(keys, list):
        raise MalformedMessageError("the server does not say where the aggregators are")
    if not len(ports) == len(keys) == len(set(ports)) == len(set(keys)) == aggregators:
        raise MalformedMessageError(
            f"the server names {len(set(ports))} ports and {len(set(keys))} public keys, expected "
            f"{aggregators} different ones"
        )
    return Whereabouts(host, tuple(map(_port, ports)), tuple(map(_key, keys)))


def reply_content(round: int) -> RecordDict:
    """Nothing of the update: all aggregators have a share of it."""
    return RecordDict({RECORD: ConfigRecord({SHARED: round})})


def read_reply(replies: Sequence[Message], round: int) -> None:
    """MalformedMessageError says why this is no single acknowledgement of the round."""
    if not replies:
        raise MalformedMessageError("no reply")
    if len(replies) > 1:
        raise MalformedMessageError(f"replied {len(replies)} times")
    (reply,) = replies
    if reply.has_error():
        raise MalformedMessageError(wire.failure(reply))
    said = reply.content.config_records.get(RECORD, ConfigRecord()).get(SHARED)
    if said != round:
        raise MalformedMessageError(f"acknowledges round {said!r}, expected {round}")


def _port(value: object) -> int:
    if not isinstance(value, int) or not 0 < value < 65536:
        raise MalformedMessageError(f"{value!r} is no port")
    return value


def _key(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != PUBLIC_BYTES:
        raise MalformedMessageError(f"a public key is no {PUBLIC_BYTES} bytes")
    return value
