"""`flwr run .`: the same two apps under Flower's own runtime.

Run configuration: `scenario` (path of a scenario file), `deployment` (name of a federated one),
`seed`, and `out`, a folder for the finished model (empty = a temporary one).
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from flwr.app import Context

from fedmi.deployments.federated.client import client_app as make_client_app
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.plan import Plan, Trained
from fedmi.deployments.federated.server import server_app as make_server_app
from fedmi.exposure.payload import store
from fedmi.exposure.seeding import Seed
from fedmi.runs.directory import RunError

APP = Path(__file__).parent.parent
"""Where Flower unpacks the app: the scenarios lie beside the package."""


def load_plan(context: Context) -> Plan:
    """The plan that the run configuration names; RunError if the deployment is not federated."""
    config = context.run_config
    path = Path(str(config["scenario"]))
    here = path if path.is_file() else APP / path
    name, seed, out = (config[key] for key in ("deployment", "seed", "out"))
    return _plan(here, str(name), int(seed), str(out))


@cache
def _plan(path: Path, name: str, seed: int, out: str) -> Plan:
    from fedmi.deployments.base import Job
    from fedmi.runs.training import pretrained
    from fedmi.scenario.cells import PretrainingCell
    from fedmi.scenario.loading import load

    scenario = load(path)
    known = {item.name: item for item in scenario.deployment if isinstance(item, Federated)}
    if name not in known:
        raise RunError(f"{path} has no federated deployment '{name}'; it has {sorted(known)}")
    root, start = Seed.root(seed), None
    split = scenario.data.split(root.child("data"))
    if scenario.pretraining.epochs:
        cell = PretrainingCell(
            data=scenario.data,
            model=scenario.model,
            pretraining=scenario.pretraining,
            seed=seed,
        )
        start = pretrained(cell, split, lambda share: None).state_dict()
    job = Job(
        split=split,
        model=scenario.model,
        recipe=scenario.training,
        seed=root,
        directory=Path(out or mkdtemp(prefix="fedmi-flower-")),
        start=start,
    )
    return known[name].plan(job)


def finish(plan: Plan, trained: Trained) -> None:
    """Keep the finished model as `model.safetensors` in the folder of the run."""
    store(trained.state, plan.directory / "model.safetensors")


server_app = make_server_app(load_plan, finish)
client_app = make_client_app(load_plan)
