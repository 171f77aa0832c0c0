"""`fedmi list` and `fedmi show`: the components a scenario can name, third parties' included."""

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmi.cli.console import USAGE, results, stop
from fedmi.scenario.errors import choice

if TYPE_CHECKING:
    from fedmi.exposure.component import Component

GROUPS = (
    "attacks", "datasets", "deployments", "detectors", "error_models", "guards", "intruders",
    "malice", "metrics", "models", "partitions", "protections", "serving", "strategies",
)  # fmt: skip


def print_list(kind: str | None) -> None:
    from fedmi.exposure.component import components

    console = results()
    if kind in ("flag", "flags"):
        _print_flags(console)
        return
    for group in [_group(kind)] if kind else GROUPS:
        table = Table(box=box.SIMPLE_HEAD, title=group, title_justify="left", pad_edge=False)
        table.add_column("kind", no_wrap=True)
        table.add_column("what it does")
        table.add_column("from", no_wrap=True)
        for name, cls in components(f"fedmi.{group}").items():
            table.add_row(name, escape(first_line(cls)), cls.__module__.split(".")[0])
        console.print(table)


def _print_flags(console: Console) -> None:
    from fedmi.leakage.flags import EXPLANATIONS

    table = Table(box=box.SIMPLE_HEAD, title="flags", title_justify="left", pad_edge=False)
    table.add_column("flag", no_wrap=True)
    table.add_column("what it says of a row")
    for name, text in sorted(EXPLANATIONS.items()):
        table.add_row(name, escape(text))
    console.print(table)


def print_component(kind: str, name: str) -> None:
    from fedmi.exposure.component import components

    group = _group(kind)
    found = components(f"fedmi.{group}")
    if name not in found:
        raise stop(
            f'there is no {_singular(group)} "{name}"{choice(name, found)}',
            USAGE,
        )
    cls, console = found[name], results()
    console.print(f"{name}  ({group}, {cls.__module__})", style="bold", markup=False)
    console.print(inspect.getdoc(cls) or "", markup=False)
    for label, text in _facts(cls):
        console.print(f"{label}: {text}", markup=False)
    _options(console, cls)
    if cls.paper:
        console.print(f"Paper: {cls.paper}", markup=False)


def first_line(cls: "type[Component]") -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _group(kind: str) -> str:
    """'attack' or 'attacks'; ends the command for anything else."""
    for group in GROUPS:
        if kind in (group, _singular(group)):
            return group
    raise stop(
        f'there is no kind of component "{kind}"{choice(kind, GROUPS)}',
        USAGE,
    )


def _singular(group: str) -> str:
    return "strategy" if group == "strategies" else group.removesuffix("s")


def _facts(cls: "type[Component]") -> list[tuple[str, str]]:
    """What the class declares beside its options, as far as it does."""
    found: list[tuple[str, str]] = []
    for label, name in (
        ("Reads", "channels"),
        ("Needs", "needs"),
        ("Can use", "uses"),
        ("Recovers", "recovers"),
        ("Measures", "measures"),
        ("Unit", "unit"),
        ("Higher means more leakage", "higher_is_leakier"),
        ("Training", "training"),
        ("Serving", "serving"),
        ("Data package", "package"),
    ):
        value = getattr(cls, name, None)
        if value not in (None, "") and not callable(value) and not isinstance(value, property):
            found.append((label, _text(value)))
    return found


def _text(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(sorted(str(item) for item in value)) or "nothing"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _options(console: Console, cls: "type[Component]") -> None:
    from fedmi.scenario.fields import default_text, limits, type_name

    table = Table(box=box.SIMPLE_HEAD, title="Options", title_justify="left", pad_edge=False)
    table.add_column("option", no_wrap=True)
    for column in ("type", "range", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for name, field in cls.model_fields.items():
        if name != "kind":
            kind = type_name(field.annotation, field.metadata)
            cells = (name, kind, limits(field), default_text(field), field.description or "")
            table.add_row(*(escape(cell) for cell in cells))
    if table.row_count:
        console.print(table)
