"""`fedmi check`: the plan of a scenario, on the terminal or as JSON."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedmi.cli.console import results
from fedmi.cli.running import Request

if TYPE_CHECKING:
    from fedmi.exposure.schema import Schema
    from fedmi.scenario.overview import Overview

MOST_CELLS = 40
"""Cells listed on the terminal; --json lists all."""


def check_scenario(request: Request, as_json: bool) -> None:
    scenario = request.load()
    from fedmi.scenario.cells import plan
    from fedmi.scenario.overview import overview

    seen = overview(plan(scenario))
    if as_json:
        found = asdict(seen) | {"counts": seen.counts}
        typer.echo(json.dumps(found, indent=1, default=lambda part: part.model_dump(mode="json")))
        return
    console = results()
    _head(console, seen)
    for table in (_threats(seen), _trainings(seen), _attacks(seen), _cells(seen)):
        console.print(table)
    more = len(seen.cells) - MOST_CELLS
    if more > 0:
        console.print(f"... and {more} more cells (--json lists all)")
    console.print("valid; nothing was run or written")


def _of(schema: "Schema") -> str:
    """What a record is, where it is no picture."""
    if schema.kind == "text":
        return f" (sentences of up to {schema.length} tokens of {len(schema.pieces)})"
    return f" ({len(schema.columns)} columns)" if schema.kind == "table" else ""


def _head(console: Console, seen: "Overview") -> None:
    card, counts = seen.card, seen.counts
    metrics = dict.fromkeys(name for item in seen.attacks for name in item.metrics)
    shape = "x".join(str(side) for side in card.shape)
    lines = (
        f"{seen.name}: {seen.question}" if seen.question else seen.name,
        f"data        {card.title}: {card.private_records} private records, "
        f"{card.classes} classes, {shape}{_of(card.schema)}",
        f"            {card.source}; {card.licence}",
        f"model       {seen.model}, {seen.parameters:,} parameters",
        f"metrics     {', '.join(metrics)}",
        f"cells       {len(seen.cells)}: {counts['train']} trainings (twins for prior-only "
        f"included), {counts['serve']} put into service, {counts['evaluator']} evaluators, "
        f"{counts['attack']} attacks",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _threats(seen: "Overview") -> Table:
    table = _table("Threat model", "deployment", "position", "channel", "knows", "read by")
    for sight in seen.threat_model:
        readers = ", ".join(sight.read_by) or "nobody"
        facts = ", ".join(sight.facts) or "nothing more"
        table.add_row(sight.deployment, sight.position, sight.channel, facts, readers)
    return table


def _trainings(seen: "Overview") -> Table:
    columns = ("kind", "trainings", "recorded rounds", "protections", "up", "down", "memory")
    table = _table("Trainings (sizes are estimates of one)", "deployment", *columns)
    for item in seen.trainings:
        estimate = item.estimate
        shared = f"; {item.parties} compute parties" if item.parties else ""
        table.add_row(
            item.title,
            item.kind,
            str(item.trainings),
            ", ".join(str(number) for number in item.recorded_rounds) or "-",
            (", ".join(item.protections) or "none") + shared,
            size(estimate.wire_bytes_up),
            size(estimate.wire_bytes_down),
            size(estimate.memory_bytes),
        )
    return table


def _attacks(seen: "Overview") -> Table:
    columns = ("deployment", "position", "channel", "granted", "seeds")
    table = _table("Attacks", "attack", *columns)
    for item in seen.attacks:
        granted = ", ".join(item.granted) or "nothing"
        granted += f"; {item.coalition}" if item.coalition else ""
        spot = (item.attack, item.deployment, item.position, item.channel)
        table.add_row(*spot, granted, str(item.seeds))
    return table


def _cells(seen: "Overview") -> Table:
    table = _table("Cells", "key", "does", "what", "seed")
    for cell in seen.cells[:MOST_CELLS]:
        table.add_row(cell.key, cell.does, cell.title, str(cell.seed))
    return table


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
