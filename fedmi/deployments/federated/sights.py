"""Who sees which channel of a federated training, and what they know by nature."""

from fedmi.deployments.federated.strategies.base import StrategySpec
from fedmi.exposure.knowledge import View
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.protections.transport import Transport

TOLD = frozenset({Fact.ARCHITECTURE, Fact.LOCAL_TRAINING, Fact.NUM_EXAMPLES})
"""What a server knows, as it configured the training."""
MEMBER = frozenset({Fact.ARCHITECTURE, Fact.LOCAL_TRAINING})
"""What whoever takes part knows."""


def sights(
    server: Position,
    strategy: StrategySpec,
    transport: Transport | None,
    *,
    intruded: bool,
    open_wire: bool,
) -> tuple[View, ...]:
    """All views but those of the finished model in service.

    intruded: one of the clients is malicious. open_wire: an eavesdropper reads the messages.
    """
    update = transport.channel if transport else strategy.sends
    open_server = transport is None or transport.server_sees_aggregate
    coordinator = server if open_server else Position.KEY_HOLDER
    parties = bool(transport and transport.compute_parties)
    seen = [
        *([] if parties else [View(server, update, TOLD)]),
        *([View(server, Channel.SHARE, TOLD)] if transport and not parties else []),
        *(_parties() if parties else ()),
        View(coordinator, Channel.AGGREGATE, TOLD),
        View(coordinator, Channel.GLOBAL_MODEL, TOLD),
        View(Position.CLIENT, Channel.GLOBAL_MODEL, MEMBER),
        View(Position.MODEL_HOLDER, Channel.GLOBAL_MODEL, frozenset({Fact.ARCHITECTURE})),
    ]
    members = [Position.CLIENT]
    if intruded:
        members.append(Position.MALICIOUS_CLIENT)
        seen.append(View(Position.MALICIOUS_CLIENT, Channel.GLOBAL_MODEL, MEMBER))
    if strategy.implies_aggregate:
        seen += [View(member, Channel.AGGREGATE, MEMBER) for member in members]
    if open_wire:
        update_seen = () if parties else (update,)
        crossing = (*update_seen, *((Channel.GLOBAL_MODEL,) if open_server else ()))
        tapper = frozenset({Fact.NUM_EXAMPLES})
        seen += [View(Position.EAVESDROPPER, channel, tapper) for channel in crossing]
    return tuple(seen)


def _parties() -> tuple[View, ...]:
    """Parties that add up shares; the global model is no secret to them."""
    party, items = Position.COMPUTE_PARTY, frozenset({"update"})
    return (
        View(party, Channel.SHARE, MEMBER, items),
        View(party, Channel.GLOBAL_MODEL, MEMBER),
    )
