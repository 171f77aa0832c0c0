"""What protecting costs: how much accuracy a protected deployment keeps, and how much leakage."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType

import numpy as np
import pandas as pd

from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, colluders_in
from fedmi.leakage.files import rows_of
from fedmi.leakage.flags import SMALL_SAMPLE, name_of
from fedmi.leakage.intervals import NOTHING, Floats, Interval
from fedmi.leakage.resampling import draws, paired_shares, ratio, ratio_of_shares, wilson
from fedmi.leakage.row import LeakageRow, split
from fedmi.leakage.settings import UNKNOWN, ByDeployment
from fedmi.leakage.table import nearest, open_counterpart, open_rows, same_place
from fedmi.leakage.trial import MetricInfo

TRADEOFF_COLUMNS = (
    "scenario", "deployment", "position", "company", "channel", "round", "attack", "metric",
    "worst_case", "control", "control_attack", "n", "utility", "control_utility", "utility_points",
    "utility_kept", "utility_kept_ci_low", "utility_kept_ci_high", "advantage",
    "control_advantage", "leakage_kept", "leakage_kept_ci_low", "leakage_kept_ci_high", "verdict",
)  # fmt: skip

LEAKAGE_FIRST = "leakage fell before accuracy did"
ACCURACY_FIRST = "accuracy fell first"
LEAKAGE_ROSE = "leakage rose, accuracy did not fall"
ACCURACY_ROSE = "accuracy rose more than leakage did"
APART = "cannot be told apart"
FAILED = "no verdict: the attack failed, here or where nothing protects"
CONTROL_FAILED = "no verdict: nothing clear of zero where nothing protects"
NO_INTERVAL = "no verdict: no interval"
GUESSING = "no verdict: what is served is no better than guessing"
ALIKE = "no verdict: every target scored the same"
FEW = f"no verdict: fewer than {SMALL_SAMPLE} targets"

DIRECTIONS = (LEAKAGE_FIRST, ACCURACY_FIRST, LEAKAGE_ROSE, ACCURACY_ROSE)
USELESS = frozenset({"untrained_model", "service_guesses"})
"""Flags of what keeps a share of its accuracy by guessing, and so the less the more classes."""

FAMILIES: Mapping[str, frozenset[Channel]] = {
    "answers": frozenset({Channel.PREDICTIONS, Channel.LABELS}),
    "updates": frozenset(
        {Channel.GRADIENT, Channel.CLIENT_UPDATE, Channel.MASKED_UPDATE, Channel.CIPHERTEXT}
    ),
}
"""Channels through which one adversary goes for the same thing. The model as it was trained and
what faulty memory holds of it are not: whoever has the first has lost nothing."""


@dataclass(frozen=True)
class Trade:
    """A row of a protected deployment and the row of an unprotected one that it is held against;
    worst: both are of the strongest attack of their place."""

    row: LeakageRow
    control: LeakageRow
    worst: bool


def tradeoff_frame(
    scores: pd.DataFrame,
    leakage: pd.DataFrame,
    metrics: Sequence[MetricInfo],
    held_out: Mapping[str, int] | None = None,
    right: Mapping[str, Floats] | None = None,
    settings: ByDeployment = UNKNOWN,
) -> pd.DataFrame:
    """For each protected deployment with an unprotected counterpart: accuracy and leakage kept.

    Both are shares of what the counterpart has; leakage is the advantage over prior-only, its
    interval the paired bootstrap of a ratio of means over the targets and seeds they share, and
    absent where the counterpart's own interval is not above zero. A row an attack, and one for
    each adversary's strongest attack here over its strongest there (`worst_case`). held_out: how
    many records accuracy was measured on, over all seeds, by deployment; where it is missing
    accuracy counts as exact. right: by deployment, which of them the answers had right (1 or 0),
    in one order for all: accuracies of two such deployments are compared record by record.
    settings: by which the counterpart is chosen, as for the leakage table.
    """
    gains, known, marks = Gains(scores, metrics), held_out or {}, right or {}
    lines = [_line(trade, gains, known, marks) for trade in trades(rows_of(leakage), settings)]
    frame = pd.DataFrame(lines, columns=pd.Index(TRADEOFF_COLUMNS))
    frame["round"] = frame["round"].astype("Int64")
    return frame


def trades(rows: Sequence[LeakageRow], settings: ByDeployment = UNKNOWN) -> list[Trade]:
    """Every attack on a protected deployment beside its control, then the strongest ones.

    An attack that nothing but this protection calls for, and that was therefore not run without
    it, is held against the strongest one there.
    """
    found = [
        Trade(row, there, False)
        for row in rows
        if (
            there := open_counterpart(row, rows, settings)
            or _strongest_facing(row, [row], rows, settings)
        )
    ]
    groups: dict[tuple[object, ...], list[LeakageRow]] = {}
    for row in rows:
        if row.protections:
            groups.setdefault(adversary(row), []).append(row)
    return found + [trade for group in groups.values() for trade in _worst(group, rows, settings)]


def adversary(row: LeakageRow) -> tuple[object, ...]:
    """Rows of which the strongest counts: one place, whatever the attack or the exact channel."""
    place = (row.position, company(row), family(row.channel), row.round)
    return (row.scenario, row.deployment, *place, row.metric)


def company(row: LeakageRow) -> str:
    """What sets an adversary apart from others of its position: who colludes, and whether it has
    the weights from before any fault."""
    others = colluders_in(row.attack)
    words = [f"{others} colluder{'s' * (others > 1)}"] if others else []
    if Fact.EXACT_MODEL in split(row.knowledge):
        words.append("the exact weights")
    return " and ".join(words)


def family(channel: str) -> str:
    """What a channel shows, in a word; the channel itself where it stands alone."""
    return next((name for name, members in FAMILIES.items() if channel in members), channel)


def verdict(leakage: Interval, utility: Interval) -> str:
    """What the two intervals allow to say: one of the constants above."""
    if not (isfinite(leakage.mean) and isfinite(utility.mean)) or np.isnan(leakage.low):
        return NO_INTERVAL
    if leakage.high < utility.low:
        return LEAKAGE_FIRST if leakage.high < 1 else ACCURACY_ROSE
    if leakage.low > utility.high:
        return ACCURACY_FIRST if utility.high < 1 else LEAKAGE_ROSE
    return APART


class Gains:
    """How much better than prior-only each target came out, signed so that positive leaks."""

    def __init__(self, scores: pd.DataFrame, metrics: Sequence[MetricInfo]) -> None:
        signs = {info.kind: 1.0 if info.higher_is_leakier else -1.0 for info in metrics}
        names = ["scenario", "deployment", "position", "channel", "round", "attack", "metric"]
        self._found: dict[tuple[object, ...], dict[tuple[int, str], float]] = {}
        for item in scores.to_dict("records"):
            place = tuple(_plain(item[name]) for name in names)
            gain = signs[item["metric"]] * (item["value"] - item["prior_only"])
            self._found.setdefault(place, {})[int(item["seed"]), str(item["target"])] = gain
        self._weights: dict[tuple[object, ...], Floats] = {}

    def of(self, row: LeakageRow) -> Mapping[tuple[int, str], float]:
        """By seed and target."""
        place = (row.deployment, row.position, row.channel, row.round, row.attack, row.metric)
        return self._found.get((row.scenario, *place), {})

    def together(self, rows: Sequence[LeakageRow]) -> tuple[Floats, Floats, int]:
        """Gains [rows, n] on the n pairs of seed and target that all rows have, bootstrap weights
        for them, and how many different targets that is."""
        each = [self.of(row) for row in rows]
        shared = [key for key in each[0] if all(key in other for other in each[1:])]
        if not shared:
            return np.zeros((len(rows), 0)), np.zeros((0, 0)), 0
        values = np.array([[found[key] for key in shared] for found in each])
        # A class is the same target under every seed; a batch of a round is another one.
        whole = rows[0].round is None
        targets: list[Hashable] = [target if whole else (s, target) for s, target in shared]
        key = (tuple(shared), whole)
        if key not in self._weights:
            rng = Seed.root(0).child("tradeoff").numpy()
            self._weights[key] = draws([seed for seed, _ in shared], targets, rng)
        return values, self._weights[key], len(set(targets))


def utility_kept(
    trade: Trade, held_out: Mapping[str, int], right: Mapping[str, Floats] = MappingProxyType({})
) -> Interval:
    """Accuracy here over accuracy there."""
    marks = [right.get(item.deployment) for item in (trade.row, trade.control)]
    if marks[0] is not None and marks[1] is not None and len(marks[0]) == len(marks[1]) > 1:
        return paired_shares(marks[0], marks[1])
    shares = [(item.utility, held_out.get(item.deployment)) for item in (trade.row, trade.control)]
    bounds = [wilson(share, count) for share, count in shares]
    return ratio_of_shares(shares[0][0], shares[1][0], bounds[0], bounds[1])


def _line(
    trade: Trade, gains: Gains, held_out: Mapping[str, int], right: Mapping[str, Floats]
) -> dict[str, object]:
    row, there = trade.row, trade.control
    utility, leakage = utility_kept(trade, held_out, right), NOTHING
    said = FAILED if row.failed or there.failed else CONTROL_FAILED
    if not row.failed and there.clear_of_zero:
        (ours, theirs), weights, n = gains.together([row, there])
        leakage = ratio(ours, theirs, weights, n)
        said = verdict(leakage, utility) if n >= SMALL_SAMPLE else FEW
    if said in DIRECTIONS and "zero_width_interval" in split(row.flags):
        said = ALIKE
    if said in DIRECTIONS and USELESS & set(map(name_of, split(row.flags))):
        said = GUESSING
    taken = ("scenario", "deployment", "position", "channel", "round", "attack", "metric")
    return {name: getattr(row, name) for name in taken} | {
        "company": company(row),
        "worst_case": trade.worst,
        "control": there.deployment,
        "control_attack": there.attack,
        "n": leakage.n,
        "utility": row.utility,
        "control_utility": there.utility,
        "utility_points": 100 * (row.utility - there.utility),
        "utility_kept": utility.mean,
        "utility_kept_ci_low": utility.low,
        "utility_kept_ci_high": utility.high,
        "advantage": row.advantage,
        "control_advantage": there.advantage,
        "leakage_kept": leakage.mean,
        "leakage_kept_ci_low": leakage.low,
        "leakage_kept_ci_high": leakage.high,
        "verdict": said,
    }


def _worst(
    group: Sequence[LeakageRow], rows: Sequence[LeakageRow], settings: ByDeployment
) -> Iterator[Trade]:
    """The strongest here over the strongest there, which need not be the same attack."""
    best = strongest(group)
    there = _strongest_facing(best, group, rows, settings)
    if there is not None:
        yield Trade(best, there, True)


def _strongest_facing(
    best: LeakageRow,
    group: Sequence[LeakageRow],
    rows: Sequence[LeakageRow],
    settings: ByDeployment,
) -> LeakageRow | None:
    """On one unprotected deployment, of all that stand where some of the group would."""
    places = [other for row in group for other in open_rows(row, rows) if _facing(row, other)]
    found = nearest(best, places, settings)
    if found is None:
        return None
    return strongest([other for other in places if other.deployment == found.deployment])


def strongest(rows: Sequence[LeakageRow]) -> LeakageRow:
    """The largest advantage; a row without one only if no other is there."""
    return max(rows, key=lambda r: r.advantage if isfinite(r.advantage) else -np.inf)


def _facing(row: LeakageRow, other: LeakageRow) -> bool:
    """Whether an attack there stands where this one would without the protection."""
    here = row.position == other.position and family(row.channel) == family(other.channel)
    return here or same_place(row, other)


def _plain(value: object) -> object:
    if value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    return int(value) if isinstance(value, np.integer) else value
