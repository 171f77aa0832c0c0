"""The tables of docs/gradients.md from finished runs; `make_figures.py` puts them there.

fedmi run scenarios/update_channel.toml --out runs/update_channel
fedmi run scenarios/closed_form.toml --out runs/closed_form
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from make_readme import Report

from fedmi.leakage.files import rows_of
from fedmi.leakage.row import LeakageRow, split

DATA = re.compile(r" data=(\w+)(?:\([^)]*\))?")


def channel(run: Path) -> str:
    """PSNR and labels over prior-only, a message and an attack a row, a model a column."""
    rows = rows_of(pd.read_parquet(run / "leakage.parquet"))
    data = dict.fromkeys(found[1] for row in rows if (found := DATA.search(row.deployment)))
    parts = []
    for name in data:
        own = [row for row in rows if f" data={name}" in row.deployment]
        for metric, title in (("psnr", "PSNR, dB"), ("label_recovery_rate", "share of labels")):
            parts.append(
                "\n".join([f"**{name}: {title} over prior-only**", "", *_table(own, metric)])
            )
    return "\n\n".join(parts)


def closed_form(run: Path) -> str:
    """PSNR and its advantage by model, message and attack."""
    rows = rows_of(pd.read_parquet(run / "leakage.parquet"))
    return "\n".join(_table([row for row in rows if row.metric == "psnr"], "psnr", value=True))


def _table(rows: list[LeakageRow], metric: str, value: bool = False) -> Iterator[str]:
    chosen = [row for row in rows if row.metric == metric]
    rounds = sorted({row.round or 0 for row in chosen})
    yield "| what crosses | attack | " + " | ".join(f"round {at}" for at in rounds) + " |"
    yield "|---|---|" + "---|" * len(rounds)
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in chosen:
        place = (DATA.sub("", row.deployment), row.attack)
        cells.setdefault(place, {})[row.round or 0] = _cell(row, value)
    for (deployment, attack), found in cells.items():
        shown = " | ".join(found.get(at, "") for at in rounds)
        yield f"| {deployment} | {attack} | {shown} |"


def _cell(row: LeakageRow, value: bool) -> str:
    """Advantage, its interval, and whether the model had learnt anything."""
    if failed := next((f for f in split(row.flags) if f.startswith("failed")), ""):
        return failed.partition(":")[0]
    gain = f"{row.advantage:+.3g}"
    if row.advantage_ci_low is not None and row.advantage_ci_low == row.advantage_ci_low:
        gain += f" [{row.advantage_ci_low:.2g}, {row.advantage_ci_high:.2g}]"
    untrained = " (guesses)" if "untrained_model" in row.flags else ""
    return (f"{row.value:.1f}: " if value else "") + gain + untrained


def papers(results: Report) -> Iterator[tuple[str, ...]]:
    """Setting, ours, the paper's, and why they differ."""
    yield ("setting", "PSNR, dB", "images", "reported", "why they may differ")
    for row in results["rows"]:
        mean, low, high = row["psnr_db"]
        told = "" if row["reported_db"] is None else str(row["reported_db"])
        yield (row["setting"], f"{mean} [{low}, {high}]", str(row["images"]), told, row["note"])


def averaging(results: Report) -> Iterator[tuple[str, ...]]:
    """Epochs, attack, PSNR, share of images above 19 dB."""
    yield ("epochs", "attack", "PSNR, dB", "above 19 dB")
    for row in results["rows"]:
        mean, low, high = row["psnr_db"]
        share = f"{row['share_above_19_db']:.0%}"
        yield (str(row["epochs"]), row["attack"], f"{mean} [{low}, {high}]", share)


def speed(results: Report) -> Iterator[tuple[str, ...]]:
    """Network, what is compared, times as fast as breaching, and PSNR against it."""
    yield ("network", "what", "fedmi against breaching")
    for row in results["rows"]:
        name, quality = row["network"]["kind"], row["quality"]
        for part in row["throughput"]:
            many = part["targets"]
            what = "one target" if many == 1 else f"{many} targets"
            yield (name, f"{what}: times as fast", _ratio(part["speedup"]))
        both = row["cells_side_by_side"]
        each = both["targets"] // both["workers"]
        what = f"{both['workers']} processes with {each} targets each, against one process"
        yield (name, f"{what}: times as fast", _ratio(both["speedup"]))
        for place, title in (("whole_image", "PSNR"), ("without_edge", "PSNR without the edge")):
            mean, low, high = quality[place]["difference_db"]
            over = f"{quality['images']} images, {quality['steps']} steps"
            yield (name, f"{title}, {over}", f"{mean:+} [{low}, {high}] dB")


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']} [{found['low']}, {found['high']}]"


def markdown(lines: Iterator[tuple[str, ...]]) -> str:
    """A table whose first line is the head."""
    head, *rest = lines
    rule = "|" + "---|" * len(head)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(r) + " |" for r in rest)]
    )
