"""The tables of docs/smpc.md from a finished run; `make_figures.py` puts them there.

fedmi run scenarios/smpc.toml --out runs/smpc
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from make_readme import spread

from fedmi.leakage.files import rows_of
from fedmi.leakage.row import LeakageRow, split
from fedmi.mpc.profiles import PROFILES
from fedmi.report.best import headlines
from fedmi.report.data import Secured
from fedmi.report.mpc_costs import COMPUTED, line
from fedmi.runs.collect import metric_infos
from fedmi.runs.directory import RunDirectory
from fedmi.runs.report import secured
from fedmi.scenario.cells import plan
from fedmi.scenario.loading import load


def tables(run: Path) -> str:
    """Costs, then who learns what; Markdown."""
    todo = plan(load(run / "scenario.toml"))
    kinds = [metric.kind for metric in metric_infos(todo)]
    rows = headlines(rows_of(pd.read_parquet(run / "leakage.parquet")), kinds)
    found = secured(todo, RunDirectory(run))
    seeds = len(todo.scenario.seeds)
    networks = " and ".join(profile.title for profile in PROFILES)
    note = (
        f"{seeds} seed{'s' * (seeds > 1)}. Bytes: what one party received from others, least to "
        "most; in brackets the engine's own count. Seconds here: all parties on one machine, over "
        "loopback, starting and opening included unless of programs alone. "
        f"Seconds over {networks} are {COMPUTED}."
    )
    return "\n\n".join(["\n".join(costs(found)), note, "\n".join(leakage(rows))])


def costs(found: tuple[Secured, ...]) -> Iterator[str]:
    yield (
        "| deployment | scheme | bytes to a party | rounds | seconds here (programs) "
        "| LAN, computed | WAN, computed | logit error | accuracy to plaintext | uniformity p |"
    )
    yield "|---|---|---|---:|---|---:|---:|---:|---:|---:|"
    for item in found:
        one = line(item)
        took = f"{one.measured} ({one.programs}{f'; {one.each}' if one.each else ''})"
        networks = " | ".join(seconds for _, seconds in one.networks)
        yield (
            f"| {one.deployment}, {one.phase} | {one.scheme} | {one.received} ({one.engine}) | "
            f"{one.rounds} | {took} | {networks} | {one.logits} | {one.accuracy or '-'} | "
            f"{one.uniformity} |"
        )


def leakage(rows: list[LeakageRow]) -> Iterator[str]:
    """The headline metric of each attack; of several rounds the first."""
    yield "| deployment (accuracy) | who | attack: metric | value | prior-only | advantage |"
    yield "|---|---|---|---:|---:|---|"
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        place = (row.deployment, row.position, row.channel, row.attack)
        if place in seen:
            continue
        seen.add(place)
        bounds = [row.advantage, row.advantage_ci_low, row.advantage_ci_high]
        gain = next((f for f in split(row.flags) if f.startswith("failed")), spread(bounds))
        yield (
            f"| {row.deployment} ({row.utility:.0%}) | {row.position}, {row.channel} | "
            f"{row.attack}: {row.metric} | {row.value:.3g} | {row.prior_only:.3g} | {gain} |"
        )
