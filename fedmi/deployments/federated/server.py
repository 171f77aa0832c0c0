"""The Flower ServerApp: every round of the plan's strategy over whatever grid it is given."""

from collections.abc import Callable
from dataclasses import replace

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmi.deployments.federated.network import ScheduledGrid, roster
from fedmi.deployments.federated.noticing import ask
from fedmi.deployments.federated.plan import Plan, Trained
from fedmi.deployments.federated.protected import ProtectedGrid
from fedmi.deployments.federated.recorder import Recorder
from fedmi.deployments.federated.recording import RecordingGrid
from fedmi.deployments.federated.rounds import Rounds
from fedmi.exposure import wire

ROUND_SECONDS = 7 * 24 * 3600.0
"""How long a round may take before its missing clients count as failed."""


def server_app(
    load: Callable[[Context], Plan],
    done: Callable[[Plan, Trained], None] = lambda plan, trained: None,
    progress: Callable[[float], None] = lambda share: None,
) -> ServerApp:
    """The app of the server; `done` takes the result, as a ServerApp returns nothing."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        plan = load(context)
        done(plan, serve(plan, grid, progress))

    return app


def serve(plan: Plan, grid: Grid, progress: Callable[[float], None]) -> Trained:
    """Train over the grid; DeploymentError names the round and the client that failed."""
    schedule, clients = plan.schedule, roster(grid, plan.schedule.clients)
    recorder = Recorder(plan)
    recorded = RecordingGrid(ScheduledGrid(grid, clients, schedule), clients, recorder)
    network: Grid = recorded
    protected = None
    if plan.transport is not None:
        protected = ProtectedGrid(recorded, grid, plan, plan.transport, clients, recorder)
        network = protected
    strategy = plan.strategy.server(plan.work.recipe)
    rounds = Rounds(strategy, plan, clients, recorder, progress, protected)
    initial = plan.build().state_dict()
    try:
        result = rounds.start(
            network, wire.to_record(initial), num_rounds=schedule.rounds, timeout=ROUND_SECONDS
        )
    finally:
        if protected:
            protected.close()
    state = wire.like(wire.to_tensors(result.arrays), initial)
    flags = rounds.flags | (protected.flags() if protected else set())
    trained = recorder.finished(schedule.rounds + 1, state, flags)
    altered = protected.altered if protected else set()
    return replace(trained, noticed=ask(plan, grid, clients, altered))
