"""What a deployment is trained with besides its protections, as names and values that compare."""

from collections.abc import Iterator, Mapping

from fedmi.leakage.settings import Settings
from fedmi.scenario.cells import AttackCell, Plan, TrainingCell
from fedmi.scenario.raw import plain

PROTECTING = frozenset({"protections", "serving", "tls", "protocol", "parties", "fraction_bits"})
"""What is compared, and so no reason not to compare; `serving` is told apart by its title."""
ASIDE = frozenset({"kind", "name", "recipe", "detectors", "engine", "opens", "recorded_steps"})
"""What changes neither the model nor what of it is seen, and what stands elsewhere."""
WITHIN = frozenset({"deployment", "recipe", "seed", "twin", "record", "confide"})
"""Of a training: what is taken apart, and what is another run of the same."""
LOST = frozenset({"min_clients", "failed_round", "dropout_stage"})
"""What counts only where clients fail, and is often asked for by a protection."""


def settings_of(cell: TrainingCell) -> Settings:
    """(name, value), sorted: data, model, recipe, local work, clients, partition, malice, ...

    A component is there by its kind under its own name (`partition`, none as "none") and by its
    options under `partition.labels_per_client`.
    """
    deployment = cell.deployment
    own = plain(deployment)
    kept = {name: own[name] for name in own if name not in PROTECTING | ASIDE | LOST}
    work = deployment.work(deployment.recipe or cell.recipe)
    kept |= plain(work.recipe)
    kept |= {name: item for name, item in plain(cell).items() if name not in WITHIN}
    if kept.get("local_steps"):
        del kept["local_epochs"]
    return tuple(sorted(_flat(kept)))


def settings_by_deployment(todo: Plan) -> dict[tuple[str, str], Settings]:
    """(scenario, deployment's title) -> its settings, of all that is attacked."""
    cells: dict[str, AttackCell] = {cell.deployment_title: cell for cell in todo.attacks}
    return {
        (todo.scenario.name, title): settings_of(cell.training) for title, cell in cells.items()
    }


def _flat(table: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield f"{above}{name}", str(value.get("kind", "table"))
            rest = {key: item for key, item in value.items() if key != "kind"}
            yield from _flat(rest, f"{above}{name}.")
        else:
            yield f"{above}{name}", "none" if value is None else str(value)
