"""What MPC hid in this run, and what it cannot hide: the rows that tell, and plain words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmi.exposure.words import Channel, Position, alone
from fedmi.leakage.flags import name_of
from fedmi.leakage.row import LeakageRow, split
from fedmi.mpc.cost import MPCCost
from fedmi.report import words
from fedmi.report.best import headlines, strongest
from fedmi.report.data import ReportData, Secured
from fedmi.report.mpc_costs import CostLine, line

OPENED = (
    (Position.MODEL_HOLDER, Channel.GLOBAL_MODEL),
    (Position.API_USER, Channel.PREDICTIONS),
    (Position.API_USER, Channel.LABELS),
)
"""Where what was computed under MPC stands open."""

IN_THE_CLEAR = (
    (Position.MODEL_HOLDER, Channel.GLOBAL_MODEL),
    (Position.CURIOUS_SERVER, Channel.CLIENT_UPDATE),
)
"""Where an unprotected deployment shows what compute parties hold as shares."""


@dataclass(frozen=True)
class Quoted:
    """The strongest attack from one place on a deployment under MPC, and the same on a plain one.

    who: in words. kind: "below", "threshold" (parties) or "opened" (model, answers). plain: None
    where the run has no such row.
    """

    who: str
    kind: str
    row: LeakageRow
    plain: LeakageRow | None

    @property
    def conclusion(self) -> str:
        """What the two intervals allow to say, and no more."""
        said = words.verdict(self.row)
        if said == "failed":
            return "failed; nothing is claimed"
        if said == "no claim":
            return "no interval, no claim"
        if self.kind == "below":
            return {
                "leak": "clear of zero: on shares that carry nothing this is chance, or a fault",
                "below prior": "worse than guessing; no leak shown",
            }.get(said, "cannot be told from guessing")
        return _beside(self.row, self.plain)


@dataclass(frozen=True)
class Section:
    """costs: a line a deployment and phase. quotes: by deployment. points: heading and text."""

    costs: tuple[CostLine, ...]
    quotes: tuple[tuple[str, tuple[Quoted, ...]], ...]
    points: tuple[tuple[str, str], ...]


def section(report: ReportData) -> Section | None:
    """None where nothing was computed under MPC."""
    if not report.secured:
        return None
    names = dict.fromkeys(item.deployment for item in report.secured)
    names |= dict.fromkeys(row.deployment for row in report.rows if row.channel == Channel.SHARE)
    return Section(
        costs=tuple(map(line, report.secured)),
        quotes=tuple((name, tuple(quotes(report, name))) for name in names),
        points=tuple(points(report.secured)),
    )


def quotes(report: ReportData, deployment: str) -> Iterable[Quoted]:
    """The strongest attack of each coalition, and from each place of OPENED, by headline metric."""
    here = [item for item in report.secured if item.deployment == deployment]
    costs = [cost for item in here for cost in item.costs]
    shown = headlines(report.rows, [info.kind for info in report.metrics])
    groups: dict[tuple[str, str, str], list[LeakageRow]] = {}
    for row in shown:
        if row.deployment == deployment and (place := _place(row, costs)):
            groups.setdefault((*place, row.metric), []).append(row)
    order = ("below", "threshold", "opened")
    for (kind, who, _), rows in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        if best := strongest(rows):
            yield Quoted(who, kind, best, _plain(best, report.rows))


def colluders(row: LeakageRow) -> int:
    """How many others the adversary of the row colludes with."""
    found = [word for word in split(row.knowledge) if word.startswith("colluders = ")]
    return int(found[0].rpartition(" ")[2]) if found else 0


def _place(row: LeakageRow, costs: Sequence[MPCCost]) -> tuple[str, str] | None:
    """Kind and name of the adversary of the row; None where MPC has no part in what it sees.

    costs: of the deployment; none where aggregators only add, and then the row's flag tells
    whether the coalition was enough.
    """
    if (row.position, row.channel) in OPENED:
        return "opened", f"{words.spoken(row.position)}, {words.spoken(row.channel)}"
    if row.position == Position.DEALER:
        return _with_dealer(colluders(row), costs)
    if row.position != Position.COMPUTE_PARTY:
        return None
    together = colluders(row) + 1
    who = "one party alone" if together == 1 else f"{together} compute parties"
    if not costs:
        sealed = "sealed_read_raw" in map(name_of, split(row.flags))
        return ("below" if sealed or together == 1 else "threshold"), who
    kind = "threshold" if together >= min(cost.threshold for cost in costs) else "below"
    parties = max(len(cost.parties) for cost in costs)
    return kind, who if together == 1 else f"{together} of {parties} compute parties"


def _with_dealer(others: int, costs: Sequence[MPCCost]) -> tuple[str, str]:
    """With any compute party it is at the threshold."""
    if not others:
        return "below", "dealer alone"
    parties = max((len(cost.parties) for cost in costs if cost.has_dealer), default=others)
    return "threshold", f"dealer and {others} of {parties} compute parties"


def _plain(row: LeakageRow, rows: Sequence[LeakageRow]) -> LeakageRow | None:
    """The same attack where nothing is protected; the same training regime first."""
    place = (row.position, row.channel)
    places = (place,) if place in OPENED else IN_THE_CLEAR
    found = [
        other
        for other in rows
        if not other.protections
        and other.deployment != row.deployment
        and (other.metric, other.round) == (row.metric, row.round)
        and alone(other.attack) == alone(row.attack)
        and (other.position, other.channel) in places
    ]
    return min(found, key=lambda other: other.training != row.training, default=None)


def _beside(row: LeakageRow, plain: LeakageRow | None) -> str:
    if plain is None or not plain.has_interval:
        leaks = words.verdict(row) == "leak"
        return ("leaks" if leaks else "no leak shown") + "; no plain counterpart in this run"
    apart = (
        row.advantage_ci_low > plain.advantage_ci_high
        or plain.advantage_ci_low > row.advantage_ci_high
    )
    if apart:
        more = "more" if row.advantage > plain.advantage else "less"
        return f"leaks {more} than plain: the intervals do not overlap"
    if words.verdict(row) == "leak":
        return "leaks as plain does: the intervals overlap"
    return "no leak shown here; the interval overlaps that of plain"


def points(secured: Sequence[Secured]) -> list[tuple[str, str]]:
    """What MPC hides and what it cannot, each with its heading."""
    return [
        (
            "What it hides",
            "Fewer parties than the threshold hold numbers and exchange messages that look the "
            "same whatever the records are, as far as the random generators behind them hold. They "
            "learn no record, no label, no gradient and no weight.",
        ),
        (
            "Who opens it all the same",
            "At the threshold everything is open, records included, and nothing has to be broken "
            f"for it: shares are put together. It takes {opening(secured)}. That they do not is a "
            "promise between organisations, not a property of the mathematics.",
        ),
        (
            "What it cannot hide",
            "What is opened is as open as without MPC: the finished model to whoever gets it, the "
            "answers to whoever asks. MPC changes who sees the computation, not what its result "
            "tells; for that, the result itself must be protected.",
        ),
        (
            "Passive parties only",
            "The protocols hold against parties that do as they are told and look. A party that "
            "lies changes the result, and is not noticed. One that dies or sends what cannot be "
            "read stops the computation.",
        ),
        (
            "Public in any case",
            "The program, the shapes, how many records each owner has, the initial weights and the "
            "order of batches are known to all parties.",
        ),
    ]


def opening(secured: Sequence[Secured]) -> str:
    """Who opens everything, by scheme."""
    schemes = {cost.scheme: cost for item in secured for cost in item.costs}
    return "; ".join(f"{_opens(cost)} ({name})" for name, cost in schemes.items())


def _opens(cost: MPCCost) -> str:
    number = len(cost.parties)
    least = f"all {number}" if cost.threshold == number else f"any {cost.threshold} of {number}"
    dealer = ", or the dealer with any one party (it knows the triples)" if cost.has_dealer else ""
    return f"{least} parties together{dealer}"
