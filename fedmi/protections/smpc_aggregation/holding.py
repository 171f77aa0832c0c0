"""What one aggregator holds of one round, and what it does with it. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmi.protections.smpc_aggregation.control import LEAST_OPENED, Beginning, Report
from fedmi.protections.smpc_aggregation.frames import Kind
from fedmi.protections.smpc_aggregation.sharing import (
    ELEMENT_BYTES,
    SEED_BYTES,
    Ring,
    added,
    expanded,
    from_bytes,
)

FIRST_FEW = 20


class RefusedError(ValueError):
    """The aggregator does not do it; says why."""


@dataclass(frozen=True)
class Held:
    """One client's share, or the seed of it. wire_bytes: of its message as received."""

    kind: Kind
    data: bytes
    wire_bytes: int

    def expanded(self, elements: int) -> Ring:
        return expanded(self.data, elements) if self.kind == Kind.SEED else from_bytes(self.data)


@dataclass
class Holding:
    """Of the round `number`; a client that sends twice, or the wrong size, is out of it."""

    number: int = 0
    beginning: Beginning = field(default_factory=lambda: Beginning(0, LEAST_OPENED, ()))
    held: dict[int, Held] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    opened: bool = False
    received_bytes: int = 0
    answered_bytes: int = 0
    malformed: int = 0
    first: list[str] = field(default_factory=list)

    def wanted_bytes(self, kind: Kind) -> int:
        """Of a share or seed of this round."""
        return SEED_BYTES if kind == Kind.SEED else ELEMENT_BYTES * self.beginning.elements

    def expects(self, round: int, client: int) -> None:
        """RefusedError if nothing is expected from this client now."""
        if round != self.number:
            raise RefusedError(f"round {round} is not open here, round {self.number} is")
        if client not in self.beginning.clients:
            raise RefusedError(f"client {client} was not asked in round {round}")
        if self.opened:
            raise RefusedError(f"round {round} is closed: its sum has been opened")

    def take(self, client: int, item: Held) -> None:
        """A client's share; RefusedError, and then the client is out of the round."""
        if client in self.refused:
            raise RefusedError(self.refused[client])
        if client in self.held:
            raise self.out(client, f"client {client} sent its share twice")
        wanted = self.wanted_bytes(item.kind)
        if len(item.data) != wanted:
            what = item.kind.name.lower()
            raise self.out(client, f"a {what} of {len(item.data)} bytes, expected {wanted}")
        self.held[client] = item

    def out(self, client: int, why: str) -> RefusedError:
        """The client's share does not count any more."""
        self.held.pop(client, None)
        self.refused.setdefault(client, why)
        return RefusedError(why)

    def note(self, why: str) -> None:
        """Something that was no share; the first few are kept in words."""
        self.malformed += 1
        if len(self.first) < FIRST_FEW:
            self.first.append(why)

    def sum(self, clients: Sequence[int]) -> Ring:
        """Of these clients' shares, once a round; RefusedError.

        Once, because two sums over different clients differ by what single clients sent.
        """
        least = max(LEAST_OPENED, self.beginning.least)
        if self.opened:
            raise RefusedError(f"round {self.number} was opened before")
        if len(set(clients)) < max(least, len(clients)):
            raise RefusedError(f"a sum of {len(set(clients))} clients, at least {least} needed")
        if missing := sorted(set(clients) - set(self.held)):
            raise RefusedError(f"no share of client {missing[0]} is here")
        self.opened = True
        elements = self.beginning.elements
        return added((self.held[client].expanded(elements) for client in clients), elements)

    def report(self) -> Report:
        sizes: Mapping[int, int] = {client: item.wire_bytes for client, item in self.held.items()}
        noted = (self.malformed, tuple(self.first))
        return Report(sizes, self.received_bytes, self.answered_bytes, self.refused, noted)
