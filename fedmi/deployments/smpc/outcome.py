"""A whole training on shares, from the check on plaintext to what it leaves behind."""

import copy
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmi.data.records import Split
from fedmi.deployments.base import Cost, DeploymentError, Job, Outcome, Utility
from fedmi.deployments.determinism import one_thread
from fedmi.deployments.memory import watched
from fedmi.deployments.smpc.plan import Plan
from fedmi.deployments.smpc.recording import FINISHED, TRAINING, Recorder
from fedmi.deployments.smpc.train import Computation, named
from fedmi.deployments.utility import utility
from fedmi.exposure.words import Position
from fedmi.mpc.cluster import Cluster, Shares
from fedmi.mpc.cost import MPCCost, Traffic
from fedmi.mpc.errors import UnsupportedError
from fedmi.mpc.restate import compare
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import combine, decode
from fedmi.mpc.uniformity import ALARM
from fedmi.training.local import DivergedError, Plain

RESTATED_ERROR = 1e-4
"""Largest difference between the logits of the restated model and torch's, on plaintext."""
COMPARED_RECORDS = 64
TIMEOUT_SECONDS = 300.0
"""The longest that one step may take; a party that dies is noticed at once."""
ACCURACY_GAP = 0.01
"""Fixed point may cost so much accuracy, or one record, before it is flagged."""


@dataclass(frozen=True)
class Computed:
    """What came out: the parameters, opened to the receiver or put together aside; seconds of it
    all, and of running programs."""

    state: Mapping[str, Tensor]
    traffic: Sequence[Traffic]
    seconds: float
    compute_seconds: float


def train(plan: Plan, job: Job, positions: Iterable[Position]) -> Outcome:
    """Train under MPC; the same minibatches in the clear first, to hold the result against.

    positions: who has a transcript. Raises DeploymentError.
    """
    model = job.initial()
    check_restated(plan, model, job.split)
    plain = in_clear(plan, model, job.split)
    masked = plan.scheme.protocol != "cheetah"
    recorder = Recorder(job.directory, job.confide, masked)
    with watched(children=True) as memory:
        computed = under_mpc(plan, job, model.state_dict(), recorder)
    model.load_state_dict({**model.state_dict(), **computed.state})
    found = utility(model, job.split)
    return Outcome(
        state=model.state_dict(),
        transcripts=recorder.transcripts(dict.fromkeys((*positions, Position.API_USER))),
        used={(TRAINING, owner): rows for owner, rows in enumerate(plan.owners.rows)},
        order={
            (TRAINING, owner): plan.owners.order(owner, plan.batches)
            for owner in range(len(plan.owners))
        },
        utility=found,
        cost=Cost(
            computed.seconds,
            sum(party.input_bytes for party in computed.traffic),
            sum(party.wire_bytes + party.dealer_bytes for party in computed.traffic),
            memory.peak_bytes,
        ),
        flags=flags(found, plain, len(job.split.held_out), recorder.uniformity),
        confided=recorder.confided,
        mpc=MPCCost.of(
            plan.scheme,
            computed.traffic,
            computed.seconds,
            compute_seconds=computed.compute_seconds,
            accuracy_gap=found.accuracy - plain.accuracy,
            uniformity=recorder.uniformity,
        ),
    )


def check_restated(plan: Plan, model: nn.Module, split: Split) -> None:
    """DeploymentError if the model restated for the engine is another than torch's."""
    try:
        error = compare(model, model.state_dict(), split.private.inputs[:COMPARED_RECORDS])
    except UnsupportedError as refused:
        raise DeploymentError(f"'{plan.name}': {refused}") from refused
    if not error <= RESTATED_ERROR:
        raise DeploymentError(
            f"'{plan.name}': the model restated for the MPC engine differs from torch's by "
            f"{error:.1e} in a logit on plaintext; at most {RESTATED_ERROR:.0e} would be right"
        )


def in_clear(plan: Plan, model: nn.Module, split: Split) -> Utility:
    """How good the same training is in floating point; DeploymentError if it diverges.

    For comparison only: no position of the deployment sees any of it.
    """
    twin = copy.deepcopy(model)
    inputs, labels = torch.from_numpy(split.private.inputs), torch.from_numpy(split.private.labels)
    with one_thread():
        try:
            Plain().fit(twin, inputs, labels, plan.batches, plan.work)
        except DivergedError as error:
            raise DeploymentError(
                f"'{plan.name}' diverged in the clear already: {error}"
            ) from error
    return utility(twin, split)


def under_mpc(plan: Plan, job: Job, initial: Mapping[str, Tensor], recorder: Recorder) -> Computed:
    """The training itself, and what each party held and received of it."""
    started, directory = time.perf_counter(), job.directory / "parties"
    with ExitStack() as stack:
        with named(plan.name, "starting the compute parties"):
            cluster = stack.enter_context(
                Cluster(
                    plan.scheme,
                    directory,
                    timeout_seconds=TIMEOUT_SECONDS,
                    record=plan.recorded_steps > 0,
                )
            )
        computation = Computation(plan, cluster)
        computation.share_records(job.split.private)
        computation.share_model(initial)
        computation.run(job.progress)
        opened = computation.opened() if plan.opens_model else None
        seconds = time.perf_counter() - started
        model = computation.model()
        with named(plan.name, "reading what the parties received"):
            traffic, dealt = cluster.traffic(), cluster.dealt()
            handshakes, messages = cluster.handshakes(), cluster.received()
            answered = cluster.answered()
        recorder.handshakes(handshakes)
        for owner in range(len(plan.owners)):
            recorder.shares(TRAINING, (owner,), computation.records(owner))
        recorder.shares(TRAINING, (), computation.initial)
        recorder.messages(messages)
        recorder.answered(answered)
        recorder.dealt(dealt)
        finished = {f"model/{name}": by_rank for name, by_rank in model.items()}
        recorder.shares(FINISHED, (), finished, crossed=False)
    if opened is not None:
        recorder.opened(opened)
    shutil.rmtree(directory, ignore_errors=True)
    state = put_together(plan.scheme, model) if opened is None else opened
    return Computed(state, traffic, seconds, computation.seconds)


def put_together(scheme: Scheme, shares: Mapping[str, Sequence[Shares]]) -> dict[str, Tensor]:
    """Aside: the numbers behind the shares that all parties hold.

    DeploymentError where two parties hold different copies of an element.
    """
    found = {}
    for name, by_rank in shares.items():
        try:
            ring = combine(dict(enumerate(by_rank)), scheme)
        except ValueError as error:
            raise DeploymentError(f"shares of '{name}' do not fit together: {error}") from error
        assert ring is not None
        numbers = decode(ring, scheme.fraction_bits).astype(np.float32)
        found[name] = torch.from_numpy(numbers)
    return found


def flags(trained: Utility, plain: Utility, held_out: int, uniformity: float) -> frozenset[str]:
    """What a reader must know before believing the training's rows."""
    found = set()
    gap = trained.accuracy - plain.accuracy
    if math.isnan(gap) or abs(gap) > max(ACCURACY_GAP, 1.5 / held_out):
        found.add(
            f"fixed_point_gap: accuracy {trained.accuracy:.4f}, in the clear {plain.accuracy:.4f}"
        )
    if uniformity < ALARM:
        found.add(f"shares_not_uniform: p = {uniformity:.1e}")
    return frozenset(found)
