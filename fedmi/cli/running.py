"""`fedmi run` and `fedmi report`."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedmi.cli.console import FAILED, INTERRUPTED, USAGE, progress, results, stop

if TYPE_CHECKING:
    from fedmi.runs.collect import Results
    from fedmi.scenario.schema import Scenario

AGAIN = "interrupted: run the same command again to finish"


@dataclass(frozen=True)
class Request:
    """The scenario as the command line asks for it."""

    file: Path
    seeds: str | None
    settings: tuple[str, ...]

    def load(self) -> "Scenario":
        """The checked scenario; ends the command if --seeds or --set cannot be read."""
        from fedmi.scenario.loading import load, parse_setting

        try:
            settings = dict(parse_setting(text) for text in self.settings)
        except ValueError as error:
            raise stop(f"--set {error}", USAGE) from error
        return load(self.file, self._seeds(), settings)

    def _seeds(self) -> list[int] | None:
        if self.seeds is None:
            return None
        try:
            return [int(part) for part in self.seeds.split(",")]
        except ValueError as error:
            raise stop(
                f'--seeds "{self.seeds}" is not a list of whole numbers; write 1,2,3', USAGE
            ) from error


def run_scenario(
    request: Request,
    out: Path | None,
    jobs: int | None,
    ray_address: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    if not quiet:
        progress().print(f"fedmi: reading {request.file}", markup=False)
    scenario = request.load()
    if not quiet:
        said = scenario.question or f"scenario {scenario.name}"
        progress().print(f"fedmi: {said}", markup=False)
    with _run_errors():
        from fedmi.runs.execute import run

        found = run(scenario, out=out, jobs=jobs, ray_address=ray_address, quiet=quiet)
    if found.interrupted:
        raise stop(AGAIN, INTERRUPTED)
    _print_json(scenario.name, found) if as_json else _print_table(found)
    if found.failures:
        raise stop(_failures(found), FAILED)


def rebuild_report(directory: Path) -> None:
    with _run_errors():
        from fedmi.runs.execute import rebuild

        found = rebuild(directory)
    _print_table(found)


@contextmanager
def _run_errors() -> Iterator[None]:
    from fedmi.runs.directory import RunError

    try:
        yield
    except RunError as error:
        raise stop(str(error), FAILED) from error
    except KeyboardInterrupt as error:
        raise stop(AGAIN, INTERRUPTED) from error


def _print_table(found: "Results") -> None:
    from fedmi.report.terminal import leakage_table, under_the_table

    console = results()
    console.print(leakage_table(found.leakage, found.metrics))
    for text in under_the_table(found.report) if found.report else ():
        console.print(text)
    for line in found.refused:
        console.print(f"refused by the clients: {line}", markup=False, soft_wrap=True)
    console.print(f"tables and report: {found.directory}/report.html", markup=False, soft_wrap=True)


def _print_json(name: str, found: "Results") -> None:
    rows = found.leakage.to_dict(orient="records")
    document = {
        "scenario": name,
        "directory": str(found.directory),
        "interrupted": found.interrupted,
        "failures": list(found.failures),
        "refused": list(found.refused),
        "leakage": [{str(k): _json_value(v) for k, v in row.items()} for row in rows],
    }
    typer.echo(json.dumps(document, indent=1))


def _json_value(value: Any) -> Any:
    """Not known is null; JSON has no infinity, so it is told by name."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    import pandas as pd

    return None if pd.isna(value) else value


def _failures(found: "Results") -> str:
    lines = "".join(f"\n  - {reason}" for reason in found.failures)
    return f"{len(found.failures)} failed; the rest is kept in {found.directory}:{lines}"
