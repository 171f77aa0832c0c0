"""The command line: options and help; each command's work is in a module of its own.

torch, Ray and Flower are imported inside the commands, so that `fedmi --help` is instant.
"""

from pathlib import Path
from typing import Annotated

import typer

from fedmi.cli.console import stop, told

app = typer.Typer(
    name="fedmi",
    help="What does a federated or centralized deployment leak to model inversion, to whom, "
    "through which channel?",
    epilog="Start with:  fedmi check scenarios/quickstart.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

File = Annotated[Path, typer.Argument(help="the scenario, a TOML file", show_default=False)]
Seeds = Annotated[
    str | None,
    typer.Option(help="in place of the file's seeds", metavar="1,2,3", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="in place of the file's value; may be given often. Paths: training.batch_size, "
        "deployment.NAME.rounds, attack.NAME.max_targets",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"fedmi {installed('fedmi')}")
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n"
    "  fedmi run scenarios/quickstart.toml\n\n"
    "  fedmi run scenarios/quickstart.toml --seeds 1,2,3 --set deployment.federated.rounds=5\n\n"
    "  fedmi run scenarios/quickstart.toml --jobs 2 --out runs/mine --json > leakage.json"
)
def run(
    file: File,
    seeds: Seeds = None,
    settings: Settings = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="processes at once; 0 = all in this one, without Ray. Default: all cores",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="the run directory. Default: runs/NAME-KEY", show_default=False),
    ] = None,
    as_json: Json = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="use a Ray cluster that is already up", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Train every deployment in FILE, attack it, print the leakage table, write the report.

    Run it again after an interruption: only what is missing is done.
    """
    from fedmi.cli.running import Request, run_scenario

    with told():
        run_scenario(
            Request(file, seeds, tuple(settings or ())), out, jobs, ray_address, as_json, quiet
        )


@app.command(
    epilog="Examples:\n\n"
    "  fedmi check scenarios/quickstart.toml\n\n"
    "  fedmi check scenarios/quickstart.toml --json | jq .counts"
)
def check(
    file: File, seeds: Seeds = None, settings: Settings = None, as_json: Json = False
) -> None:
    """Validate FILE and print what it will do: cells, threat model, sizes. Runs nothing."""
    from fedmi.cli.checking import check_scenario
    from fedmi.cli.running import Request

    with told():
        check_scenario(Request(file, seeds, tuple(settings or ())), as_json)


@app.command(name="list", epilog="Examples:\n\n  fedmi list\n\n  fedmi list attacks")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="attacks, datasets, deployments, metrics, models, ..., or flags",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a scenario can name, one line each: attacks, datasets, deployments, metrics, ..."""
    from fedmi.cli.catalogue import print_list

    with told():
        print_list(kind)


@app.command(epilog="Examples:\n\n  fedmi show attack mi_face\n\n  fedmi show dataset att_faces")
def show(
    kind: Annotated[str, typer.Argument(help="attack, dataset, ...", show_default=False)],
    name: Annotated[str, typer.Argument(help="its kind in TOML", show_default=False)],
) -> None:
    """Show what one component does, its options and its paper."""
    from fedmi.cli.catalogue import print_component

    with told():
        print_component(kind, name)


@app.command(epilog="Example:\n\n  fedmi report runs/quickstart-0123456789abcdef")
def report(
    directory: Annotated[Path, typer.Argument(help="a run directory", show_default=False)],
) -> None:
    """Write tables and report.html of a run DIRECTORY again, without running anything."""
    from fedmi.cli.running import rebuild_report

    if not directory.is_dir():
        raise stop(f"{directory} is not a directory; give the one that `fedmi run` wrote", 2)
    with told():
        rebuild_report(directory)


@app.command()
def doctor() -> None:
    """Say what fedmi finds here: versions, cores, memory, Ray, data packages."""
    from fedmi.cli.doctor import examine

    with told():
        examine()


def main() -> None:
    app()
