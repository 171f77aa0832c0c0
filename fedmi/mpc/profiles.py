"""What a computation would take over a real network: computed from counts, never measured."""

from dataclasses import dataclass

from fedmi.mpc.cost import MPCCost


@dataclass(frozen=True)
class Profile:
    """A network between the parties, all of whose lines are alike."""

    name: str
    round_trip_seconds: float
    bits_per_second: float
    source: str

    @property
    def title(self) -> str:
        """In words: LAN (0.3 ms, 3 Gbit/s)."""
        rate = f"{self.bits_per_second / 1e9:g} Gbit/s"
        if self.bits_per_second < 1e9:
            rate = f"{self.bits_per_second / 1e6:g} Mbit/s"
        return f"{self.name} ({1e3 * self.round_trip_seconds:g} ms, {rate})"


CHEETAH = (
    "the two networks on which Huang et al., Cheetah, USENIX Security 2022, report, as set by the "
    "script throttle.sh of their code"
)
LAN = Profile("LAN", 0.3e-3, 3e9, CHEETAH)
WAN = Profile("WAN", 40e-3, 400e6, CHEETAH)
PROFILES = (LAN, WAN)


def seconds(cost: MPCCost, profile: Profile) -> float:
    """Measured compute + rounds * round trip + bytes of the busiest line / bandwidth.

    Computed, not measured, and to be printed as such. Every wait is taken for a whole round trip,
    which it is where the other party must answer first; where both send at once it is half of one.
    The compute was measured over loopback, so its small delay counts again. Congestion, slow start
    and lost packets are left out.
    """
    transfer = 8 * cost.busiest_bytes / profile.bits_per_second
    return cost.compute_seconds + cost.rounds * profile.round_trip_seconds + transfer
