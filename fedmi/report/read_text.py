"""The first sentence or row that every attack made, for the terminal."""

from rich.text import Text

from fedmi.report.data import ReadRow, ReportData
from fedmi.report.readable import Reading
from fedmi.report.words import spoken

SHOWN = 8
"""Attacks; the others are in report.html."""


def readings_text(report: ReportData) -> Text | None:
    """Private, reconstruction and prior-only of the first target; what is right in brackets."""
    if not report.readings:
        return None
    text = Text("Reconstructions, first target each (what counts as right in brackets and bold):")
    for found in report.readings[:SHOWN]:
        place = f"{spoken(found.position)} through {spoken(found.channel)}"
        text.append(f"\n  {found.attack} on {found.deployment}, {place}")
        _append(text, found.rows[0])
    if hidden := len(report.readings) - SHOWN:
        text.append(f"\n  {hidden} more in report.html" if hidden > 0 else "")
    return text


def _append(text: Text, row: ReadRow) -> None:
    text.append(f"\n    private        {' '.join(word for word, _ in row.private)}")
    for name, reading in (("reconstruction", row.reconstruction), ("prior-only", row.prior_only)):
        text.append(f"\n    {name:<14}")
        for word, right in reading or NOTHING:
            text.append(f" [{word}]" if right else f" {word}", style="bold" if right else "")


NOTHING: Reading = (("(nothing)", False),)
