"""In what two deployments differ besides their protections; which of several differs in least."""

from collections.abc import Mapping
from types import MappingProxyType

from fedmi.exposure.words import Position
from fedmi.leakage.row import LeakageRow

Settings = tuple[tuple[str, str], ...]
"""(name, value), such as ("batch_size", "2"), sorted; what belongs to a component has the
component's name before it, such as ("malice", "loki") and ("malice.bins", "128")."""
ByDeployment = Mapping[tuple[str, str], Settings]
"""(scenario, deployment) -> its settings."""
UNKNOWN: ByDeployment = MappingProxyType({})

PARTY = {Position.MALICIOUS_SERVER: "malice", Position.MALICIOUS_CLIENT: "intruder"}
"""The setting that says what an active adversary does."""


def differing(row: LeakageRow, other: LeakageRow, known: ByDeployment) -> tuple[str, ...]:
    """Names of the settings that both deployments have and that differ, a component's options
    only where its kind is the same."""
    mine, theirs = _of(row, known), _of(other, known)
    found: list[str] = []
    for name in mine:
        above = name.rpartition(".")[0]
        if mine[name] != theirs.get(name, mine[name]) and above not in found:
            found.append(name)
    return tuple(found)


def same_party(row: LeakageRow, other: LeakageRow, known: ByDeployment) -> bool:
    """Whether active adversaries of the same position do the same: without what an attack lives
    on there is no telling what protects from it."""
    name = PARTY.get(Position(row.position))
    return (
        name is None or row.position != other.position or name not in differing(row, other, known)
    )


def control_differs(row: LeakageRow, control: LeakageRow, known: ByDeployment) -> str:
    """A flag that names the settings and what they are there and here; empty where none differs."""
    mine, theirs = _of(row, known), _of(control, known)
    said = [f"{n} {theirs[n]} (here {mine[n]})" for n in differing(row, control, known)]
    return f"control_differs: {', '.join(said)}" if said else ""


def _of(row: LeakageRow, known: ByDeployment) -> dict[str, str]:
    return dict(known.get((row.scenario, row.deployment), ()))
