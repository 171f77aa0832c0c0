"""The same apps on Flower's stock simulation, in a process of their own.

Flower ends the Ray of the process it runs in, so it gets one; the job and its outcome travel as
files. Run as `python -m fedmi.deployments.federated.stock DIRECTORY`.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedmi.deployments import saved
from fedmi.deployments.base import DeploymentError, Job, Outcome
from fedmi.deployments.federated.client import client_app
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.jobfile import load_plan, read_job, remove_job, write_job
from fedmi.deployments.federated.plan import Plan, Trained
from fedmi.deployments.federated.server import server_app
from fedmi.deployments.federated.simulation import outcome
from fedmi.deployments.memory import watched

REFUSED = 3
ERROR, PROGRESS, LOG = "error.txt", "progress.txt", "flower.log"
POLL_SECONDS = 0.2


def train_on_stock_flower(deployment: Federated, job: Job) -> Outcome:
    """Errors as on fedmi's grid; DeploymentError if the process itself breaks."""
    deployment.plan(job)
    directory = (job.directory / "flower").resolve()
    write_job(deployment, job, directory)
    command = [sys.executable, "-m", "fedmi.deployments.federated.stock", str(directory)]
    with (directory / LOG).open("wb") as log:
        process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log)
    try:
        with watched(process.pid, children=True) as memory:
            while process.poll() is None:
                job.progress(_share(directory))
                time.sleep(POLL_SECONDS)
    finally:
        process.terminate()
        process.wait()
        remove_job(directory)
    if process.returncode:
        raise DeploymentError(_why(deployment, process.returncode, directory))
    found = saved.load(directory)
    return replace(found, cost=replace(found.cost, peak_memory_bytes=memory.peak_bytes))


def _environment() -> dict[str, str]:
    """This process's, without the Ray cluster it may belong to."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def _share(directory: Path) -> float:
    path = directory / PROGRESS
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def _why(deployment: Federated, status: int, directory: Path) -> str:
    if status == REFUSED:
        return (directory / ERROR).read_text(encoding="utf-8")
    tail = (directory / LOG).read_text(encoding="utf-8", errors="replace")[-2000:]
    return f"'{deployment.name}': Flower's simulation ended with status {status}:\n{tail}"


def main(directory: Path) -> int:
    """Train the job in `directory` and save its outcome there."""
    deployment, job = read_job(directory)
    started = time.perf_counter()
    try:
        plan, trained = deployment.run(job, lambda plan: simulate(plan, job.workers))
    except DeploymentError as error:
        (directory / ERROR).write_text(str(error), encoding="utf-8")
        return REFUSED
    seconds = time.perf_counter() - started
    saved.save(outcome(plan, trained, job, seconds, peak_memory_bytes=0), directory)
    return 0


def simulate(plan: Plan, workers: int) -> Trained:
    """Run both apps on Flower's simulation, one CPU a client at a time."""
    from flwr.simulation import run_simulation

    found: list[Trained] = []

    def tell(share: float) -> None:
        scratch = plan.directory / f"{PROGRESS}.new"
        scratch.write_text(f"{share:.4f}", encoding="utf-8")
        scratch.replace(plan.directory / PROGRESS)

    run_simulation(
        server_app(lambda _: plan, lambda _, trained: found.append(trained), tell),
        client_app(partial(load_plan, str(plan.directory))),
        num_supernodes=plan.schedule.clients,
        backend_config={
            "init_args": {"num_cpus": max(1, workers), "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return found[0]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
