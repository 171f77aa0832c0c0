"""Both apps on fedmi's own grid, and what a finished training leaves behind."""

from collections.abc import Callable

from flwr.app import Context, RecordDict

from fedmi.deployments.base import Cost, Job, Outcome
from fedmi.deployments.federated.client import client_app
from fedmi.deployments.federated.cohort import RUN
from fedmi.deployments.federated.grid import open_grid
from fedmi.deployments.federated.plan import Plan, Trained
from fedmi.deployments.federated.server import server_app
from fedmi.deployments.utility import utility
from fedmi.exposure.claim import PrivacyClaim


def simulate(plan: Plan, workers: int, progress: Callable[[float], None]) -> tuple[Trained, int]:
    """Run both apps on fedmi's grid: (the result, peak bytes of the worker processes)."""
    found: list[Trained] = []
    server = server_app(lambda _: plan, lambda _, trained: found.append(trained), progress)
    clients = plan.schedule.clients
    with open_grid(lambda: client_app(lambda _: plan), clients, workers) as grid:
        server(grid, Context(RUN, 0, {}, RecordDict(), {}))
        return found[0], grid.peak_bytes()


def outcome(
    plan: Plan, trained: Trained, job: Job, seconds: float, peak_memory_bytes: int
) -> Outcome:
    """The result with its utility, its cost, and the records behind each recorded reply."""
    model = plan.build()
    model.load_state_dict(dict(trained.state))
    return Outcome(
        state=trained.state,
        transcripts=trained.transcripts,
        used={at: plan.schedule.used(*at) for at in sorted(trained.replied)},
        order={at: plan.schedule.order(*at) for at in sorted(trained.replied)},
        utility=utility(model, job.split),
        cost=Cost(seconds, trained.wire_bytes_up, trained.wire_bytes_down, peak_memory_bytes),
        claims=kept_claims(plan, trained.flags),
        flags=trained.flags | _told(plan),
        confided=trained.confided,
        planted=plan.planted,
        noticed=trained.noticed,
    )


def _told(plan: Plan) -> frozenset[str]:
    """Flags that follow from the plan."""
    found = {"eval_mode_client"} if plan.work.recipe.mode == "eval" else set()
    if plan.intruder:
        found |= plan.intruder.flags(plan.intruder_labels, plan.classes)
    return frozenset(found | ({f"architecture_refused: {plan.refusal}"} if plan.refusal else set()))


def kept_claims(plan: Plan, flags: frozenset[str]) -> tuple[PrivacyClaim, ...]:
    """The claims of the plan that the training kept to: none of clients where noise was missing."""
    short = any(flag.partition(":")[0] == "noise_below_claim" for flag in flags)
    return tuple(claim for claim in plan.claims if not (short and claim.unit == "client"))
