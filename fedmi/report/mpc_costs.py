"""What MPC took, in words: bytes, rounds, seconds measured and computed, errors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmi.mpc.cost import MPCCost
from fedmi.mpc.profiles import PROFILES, Profile, seconds
from fedmi.report import words
from fedmi.report.data import Secured

COMPUTED = (
    "computed, not measured: the measured seconds of the programs, a round trip for every wait, "
    "and the bytes of the busiest line over the bandwidth"
)


@dataclass(frozen=True)
class CostLine:
    """One deployment and phase. Bytes: least to most of a party, over seeds. Seconds: means over
    seeds. Errors and uniformity: the worst seed.

    measured: what was timed. programs: how much of it was running programs, in words.
    networks: name of each profile, and the seconds computed for it.
    """

    deployment: str
    phase: str
    scheme: str
    inputs: str
    received: str
    wire: str
    engine: str
    dealer: str
    rounds: str
    measured: str
    programs: str
    each: str
    networks: tuple[tuple[str, str], ...]
    logits: str
    accuracy: str
    uniformity: str


def line(item: Secured) -> CostLine:
    costs, parties = item.costs, [party for cost in item.costs for party in cost.parties]
    dealt = max(cost.dealer_bytes for cost in costs)
    gap = max((cost.accuracy_gap for cost in costs), key=_worst)
    return CostLine(
        deployment=item.deployment,
        phase=item.phase,
        scheme=costs[0].scheme,
        inputs=spread([party.input_bytes for party in parties]),
        received=spread([party.received_bytes for party in parties]),
        wire=spread([party.wire_bytes for party in parties]),
        engine=spread([party.engine_bytes for party in parties]),
        dealer=words.size(dealt) if any(cost.has_dealer for cost in costs) else "none",
        rounds=f"{_mean([cost.rounds for cost in costs]):,.0f}",
        measured=words.duration(_mean([cost.seconds for cost in costs])),
        programs=_programs(costs),
        each=_each(costs),
        networks=tuple((profile.name, estimate(costs, profile)) for profile in PROFILES),
        logits=small(max((cost.logit_error for cost in costs), key=_worst)),
        accuracy=_points(gap, costs),
        uniformity=small(min((cost.uniformity for cost in costs), key=_least)),
    )


def estimate(costs: Sequence[MPCCost], profile: Profile) -> str:
    """Seconds over that network, computed; mean over seeds."""
    return words.duration(_mean([seconds(cost, profile) for cost in costs]))


def spread(counts: Sequence[int]) -> str:
    """Bytes from least to most: 1.2 MB, or 1.2 MB to 1.4 MB."""
    low, high = words.size(min(counts)), words.size(max(counts))
    return low if low == high else f"{low} to {high}"


def small(value: float) -> str:
    """A figure that may be tiny: 0.021, 9.1e-04; a dash for what was not measured."""
    if not math.isfinite(value):
        return words.MISSING
    return words.number(value) if value >= 0.01 or value == 0 else f"{value:.1e}"


def said(item: Secured) -> str:
    """One deployment and phase in a sentence."""
    one = line(item)
    networks = ", ".join(f"{took} on a {name}" for name, took in one.networks)
    each = f" ({one.each})" if one.each else ""
    parts = [
        f"{one.received} to each party (engine: {one.engine}) in {one.rounds} rounds",
        f"{one.measured} here, {one.programs}{each}; computed {networks}",
        *([f"logits off by at most {one.logits}"] if one.logits != words.MISSING else []),
        *([f"accuracy {one.accuracy}"] if one.accuracy else []),
        *([f"uniformity p {one.uniformity}"] if one.uniformity != words.MISSING else []),
    ]
    return f"{item.deployment}, {item.phase} ({one.scheme}): {'; '.join(parts)}"


def _programs(costs: Sequence[MPCCost]) -> str:
    """Serving is timed by its programs alone; training with starting, sharing and opening."""
    if all(cost.seconds == cost.compute_seconds for cost in costs):
        return "programs alone"
    return f"programs {words.duration(_mean([cost.compute_seconds for cost in costs]))}"


def _each(costs: Sequence[MPCCost]) -> str:
    """Milliseconds of programs a record, where records were answered."""
    if not all(cost.queries for cost in costs):
        return ""
    took = _mean([cost.compute_seconds / cost.queries for cost in costs])
    return f"{1e3 * took:.1f} ms a record over {costs[0].queries:,}"


def _points(gap: float, costs: Sequence[MPCCost]) -> str:
    """In points of accuracy; of how many records, where serving counted them."""
    if not math.isfinite(gap):
        return ""
    behind = costs[0].queries
    points = f"{words.number(100 * gap, signed=True)} points"
    return f"{points} of {behind:,} records" if behind else points


def _worst(value: float) -> float:
    return abs(value) if math.isfinite(value) else -1.0


def _least(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
