"""The leakage table on a terminal of 100 columns or more."""

from collections.abc import Sequence
from string import ascii_lowercase
from textwrap import wrap

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from fedmi.leakage.files import rows_of
from fedmi.leakage.flags import name_of
from fedmi.leakage.row import LeakageRow, split
from fedmi.leakage.trial import MetricInfo
from fedmi.report.best import headlines
from fedmi.report.data import ReportData, Secured
from fedmi.report.detection import detection_text
from fedmi.report.mpc import opening
from fedmi.report.mpc_costs import said
from fedmi.report.read_text import readings_text
from fedmi.report.reported import reported_text
from fedmi.report.serving import served_text
from fedmi.report.tradeoff import tradeoff_text
from fedmi.report.words import by, claim, duration, interval, number, reason, size, verdict

WIDE = 56
"""Characters of a deployment's lines; longer ones are wrapped, so that figures keep their room."""
STYLES = {"leak": "bold red", "failed": "magenta", "below prior": "dim", "not shown": "dim"}


def leakage_table(frame: pd.DataFrame, metrics: Sequence[MetricInfo]) -> Table:
    """One entry per deployment x position x channel x round x attack, with its headline metric.

    `metrics` in order of importance: the first that an attack has is its headline.
    """
    rows = headlines(rows_of(frame), [metric.kind for metric in metrics])
    units = {metric.kind: metric.unit for metric in metrics}
    everywhere = _shared_flags(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(rows, everywhere))
    table.caption_justify = "left"
    table.add_column("position \N{MIDDLE DOT} channel\nattack", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("value\nprior-only", justify="right", no_wrap=True)
    table.add_column("advantage\n95 % interval", justify="right", no_wrap=True)
    table.add_column("flags", overflow="fold", min_width=5)
    codes = _codes(rows, everywhere)
    previous = ""
    for row in rows:
        if row.deployment != previous:
            table.add_section()
            table.add_row(_deployment([r for r in rows if r.deployment == row.deployment]))
        table.add_row(*_cells(row, units.get(row.metric, ""), codes))
        previous = row.deployment
    return table


def under_the_table(report: ReportData) -> list[Text]:
    """What goes under the table: nothing of what the run does not have."""
    found = (
        tradeoff_text(report),
        readings_text(report),
        detection_text(report),
        reported_text(report),
        served_text(report.served),
        secured_text(report.secured) if report.secured else None,
    )
    return [text for text in found if text is not None]


def secured_text(secured: Sequence[Secured]) -> Text:
    """What MPC took and who can open it, to go under the table."""
    lines = ["MPC: seconds are of this machine, all parties on it; LAN and WAN are computed."]
    lines += [f"  {said(item)}." for item in secured]
    lines.append(
        f"  Everything is opened by {opening(secured)}. What is opened on purpose, model and "
        "answers, tells what it would tell without MPC. A party that lies is not noticed."
    )
    return Text("\n".join(lines))


def _deployment(rows: Sequence[LeakageRow]) -> Text:
    first, longest = rows[0], max(row.seconds for row in rows)
    protections = ", ".join(split(first.protections)) or "unprotected"
    title = wrap(f"{first.deployment}, {protections}", WIDE)
    name = Text("\n".join(title))
    name.stylize("bold", 0, len("\n".join(wrap(first.deployment, WIDE))))
    costs = f"{size(first.wire_bytes)}, {duration(longest)}"
    against: dict[str, list[str]] = {}
    for row in rows:
        if text := claim(row):
            against.setdefault(text, []).append(row.position)
    claims = [
        line
        for text, who in against.items()
        for line in wrap(f"{text}: holds against {', '.join(dict.fromkeys(who))}", WIDE)
    ]
    name.append(f"\naccuracy {number(first.utility)}, {costs}")
    return name.append("".join(f"\n{text}" for text in claims))


def _cells(row: LeakageRow, unit: str, codes: dict[str, str]) -> list[Text]:
    where = f"{row.position} \N{MIDDLE DOT} {row.channel}"
    notes = " ".join(codes[name] for name in map(name_of, split(row.flags)) if name in codes)
    gain = f"{number(row.advantage, signed=True)}\n"
    gain += interval(row.advantage_ci_low, row.advantage_ci_high)
    attack = by(row)
    if row.failed:
        attack += "".join(f"\n    {line}" for line in wrap(reason(row), 36))
    return [
        Text(f"  {where}\n  {attack}"),
        Text(f"{row.metric}\n{unit}"),
        Text(f"{number(row.value)}\n{number(row.prior_only)}"),
        Text(gain, style=STYLES.get(verdict(row), "")),
        Text(notes, style="yellow"),
    ]


def _shared_flags(rows: Sequence[LeakageRow]) -> set[str]:
    sets = [set(split(row.flags)) for row in rows]
    return set.intersection(*sets) if len(sets) > 1 else set()


def _codes(rows: Sequence[LeakageRow], everywhere: set[str]) -> dict[str, str]:
    """Flag -> a letter or two, in order of first use; not those that every row carries."""
    shared = {name_of(flag) for flag in everywhere}
    names = [name_of(flag) for row in rows for flag in split(row.flags)]
    letters = [*ascii_lowercase, *(f"a{letter}" for letter in ascii_lowercase)]
    fresh = dict.fromkeys(name for name in names if name not in shared)
    return dict(zip(fresh, letters, strict=False))


def _caption(rows: Sequence[LeakageRow], everywhere: set[str]) -> Text:
    said = "Advantage: how much better than the same attack without an informative observation; "
    said += "positive = more leakage. Red: interval clear of zero. Beside accuracy: bytes sent in "
    said += "training, and the time of training with the longest attack."
    codes = _codes(rows, everywhere)
    if codes:
        said += f" Flags: {', '.join(f'{code} {name}' for name, code in codes.items())}."
    if everywhere:
        said += f" Every row: {', '.join(sorted(everywhere))}."
    return Text(said)
