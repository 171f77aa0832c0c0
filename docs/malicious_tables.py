"""The tables of docs/malicious.md and docs/text.md from finished runs and benchmarks;
`make_figures.py` puts them there.

fedmi run scenarios/malicious_server.toml --out runs/malicious_server
fedmi run scenarios/malicious_client.toml --out runs/malicious_client
fedmi run scenarios/text.toml --out runs/text
fedmi run scenarios/tabular_gradients.toml --out runs/tabular_gradients
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from make_readme import Report

from fedmi.leakage.files import rows_of
from fedmi.leakage.row import LeakageRow, split


def servers(run: Path) -> str:
    return _table(run, ("recovered_exactly", "fished_psnr", "psnr"))


def clients(run: Path) -> str:
    kinds = ("attack_accuracy_top1", "identity_rank", "pearson_correlation", "psnr")
    return _table(run, kinds)


def sentences(run: Path) -> str:
    kinds = ("token_accuracy", "rouge_l", "exact_match_rate", "token_set_f1")
    return _table(run, (*kinds, "label_recovery_rate"))


def answers(run: Path) -> str:
    return _table(run, ("categorical_accuracy", "numeric_accuracy"))


def noticed(run: Path) -> str:
    """Share of the altered models that each statistic gives away, a deployment a row."""
    found = pd.read_csv(run / "detection.csv")
    kinds = list(dict.fromkeys(found["detector"]))
    lines = ["| deployment | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, rows in found.groupby("deployment", sort=False):
        by_kind = {row["detector"]: row for _, row in rows.iterrows()}
        cells = " | ".join(_rate(by_kind[kind]) if kind in by_kind else "" for kind in kinds)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def false_alarms(run: Path) -> str:
    """Of each deployment, what the thresholds were set on, and how often honest models alarm."""
    found = pd.read_csv(run / "detection.csv")
    lines = ["| deployment | statistic | rounds | set on | false alarms |", "|---|---|---|---|---|"]
    for _, row in found.iterrows():
        if not row["calibrated_on"] or not row["honest"]:
            continue
        rate = f"{row['false_alarms']} of {row['honest']}: {row['false_alarm_rate']:.1%} "
        rate += f"[{row['false_alarm_ci_low']:.1%}, {row['false_alarm_ci_high']:.1%}]"
        where = (row["deployment"], row["detector"], row["calibrated_rounds"])
        lines.append(f"| {' | '.join(where)} | {row['calibrated_on']} | {rate} |")
    return "\n".join(lines)


def imprints(results: Report) -> Iterator[tuple[str, ...]]:
    where = ("attack", "clients x records", "pixels", "bins", "SecAgg+")
    yield (*where, "recovered exactly", "least to most", "trials", "prior-only", "expected")
    for row in results["rows"]:
        shares = [trial["recovered"] for trial in row["trials"]]
        yield (
            row["attack"],
            f"{row['clients']} x {row['records']}",
            f"{row['side']} x {row['side']}",
            str(row["bins"]),
            "yes" if row["secagg"] else "no",
            f"{row['recovered']:.1%}",
            f"{min(shares):.1%} to {max(shares):.1%}",
            str(len(shares)),
            f"{row['prior_only']:.1%}",
            f"{row['expected']:.1%}",
        )


def traps(results: Report) -> Iterator[tuple[str, ...]]:
    yield ("data", "batch", "trap weights: recovered", "honest weights, read passively")
    for row in results["trap_weights"]:
        ours, passive = ("{} [{}, {}]".format(*row[f"share_{s}"]) for s in ("recovered", "passive"))
        yield (row["data"], str(row["batch"]), ours, passive)


def fishing(results: Report) -> Iterator[tuple[str, ...]]:
    yield ("network", "fished by", "records", "PSNR, dB", "largest", "prior-only", "its largest")
    for row in results["fishing"]:
        yield (
            row["model"]["kind"],
            row["strategy"],
            str(row["records"]),
            "{} [{}, {}]".format(*row["fished_psnr_db"]),
            str(row["fished_psnr_max_db"]),
            "{} [{}, {}]".format(*row["prior_only_db"]),
            str(row["prior_only_max_db"]),
        )


def _table(run: Path, metrics: Sequence[str]) -> str:
    rows = rows_of(pd.read_parquet(run / "leakage.parquet"))
    shown = [metric for metric in metrics if any(row.metric == metric for row in rows)]
    head = "| deployment (accuracy) | channel | attack | round | " + " | ".join(shown) + " |"
    lines = [head, "|---|---|---|---|" + "---|" * len(shown)]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row.metric in shown:
            at = str(row.round) if row.round else ""
            name = f"{row.deployment} ({row.utility:.0%})"
            place = (name, row.channel, row.attack, at)
            cells.setdefault(place, {})[row.metric] = _cell(row)
    for place, found in cells.items():
        told = " | ".join(found.get(metric, "") for metric in shown)
        lines.append(f"| {' | '.join(place)} | {told} |")
    return "\n".join(lines)


def _cell(row: LeakageRow) -> str:
    """Value, prior-only, and the advantage's interval where there is one."""
    if failed := next((flag for flag in split(row.flags) if flag.startswith("failed")), ""):
        return failed.partition(":")[0]
    if not math.isfinite(row.value):
        return ""
    told = f"{row.value:.3g} ({row.prior_only:.2g})"
    low, high = row.advantage_ci_low, row.advantage_ci_high
    if low is None or high is None or not math.isfinite(low):
        return told
    return f"{told}: {row.advantage:+.2g} [{low:.2g}, {high:.2g}]"


def _rate(row: "pd.Series[float]") -> str:
    if not row["altered"] or not math.isfinite(row["rate"]):
        return ""
    told = f"{row['rate']:.0%} [{row['ci_low']:.0%}, {row['ci_high']:.0%}]"
    return told + (" (few honest rounds)" if row["weak"] else "")
