"""The loop of a training on shares: owners share, parties step, the receiver opens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fedmi.data.records import Floats, Ints, Records
from fedmi.deployments.base import DeploymentError
from fedmi.deployments.smpc.owners import INPUTS, LABELS, of_owner, one_hot
from fedmi.deployments.smpc.plan import Plan
from fedmi.mpc.cluster import Cluster, Shares
from fedmi.mpc.compile import training_program
from fedmi.mpc.errors import MPCError
from fedmi.mpc.guard import Guard
from fedmi.mpc.program import Program

PARAMETER, MOMENTUM = "p", "m"


class Computation:
    """One training on a running cluster; every failure is a DeploymentError that says where."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self._plan = plan
        self._cluster = cluster
        self._network = plan.model.blueprint(plan.shape, plan.classes)
        self._names = tuple(name for name, _ in self._network.named_parameters())
        self._programs: dict[int, Program] = {}
        self._guards: dict[int, Guard] = {}
        self.seconds = 0.0
        """spent in running programs"""
        self.initial: dict[str, list[Shares]] = {}
        """Aside: what the parties were given of the model, "initial/NAME" and "momentum/NAME" ->
        by rank."""

    def share_records(self, private: Records) -> None:
        """Every owner shares its records and the one-hot rows of their labels, once."""
        labels = one_hot(private, self._plan.classes)
        for owner, rows in enumerate(self._plan.owners.rows):
            with named(self._plan.name, f"owner {owner} sharing its records"):
                self._cluster.share(of_owner(INPUTS, owner), private.inputs[rows])
                self._cluster.share(of_owner(LABELS, owner), labels[rows])

    def share_model(self, state: Mapping[str, Tensor]) -> None:
        """The initial weights, which are public, become shares so that they can be trained;
        zeros do, where there is momentum."""
        with named(self._plan.name, "sharing the initial weights"):
            for name in self._names:
                weights = _floats(state[name])
                self._give(f"{PARAMETER}/{name}", weights, f"initial/{name}")
                if self._plan.work.recipe.momentum:
                    self._give(f"{MOMENTUM}/{name}", np.zeros_like(weights), f"momentum/{name}")

    def run(self, progress: Callable[[float], None]) -> None:
        """All steps; the range of the numbers is checked after every epoch."""
        for step, batch in enumerate(self._plan.batches, start=1):
            with named(self._plan.name, self._plan.at(step)):
                self._step(step, batch)
                if self._plan.checked_after(step):
                    self._check_range(step, len(batch))
            progress(step / len(self._plan.batches))

    def records(self, owner: int) -> dict[str, list[Shares]]:
        """Aside: what the parties hold of an owner's records, by rank."""
        with named(self._plan.name, f"reading the shares of owner {owner}"):
            return {
                "inputs": self._cluster.held(of_owner(INPUTS, owner)),
                "labels": self._cluster.held(of_owner(LABELS, owner)),
            }

    def model(self) -> dict[str, list[Shares]]:
        """Aside: what the parties hold of the model, by parameter name and rank."""
        with named(self._plan.name, "reading the shares of the model"):
            return {name: self._cluster.held(f"{PARAMETER}/{name}") for name in self._names}

    def opened(self) -> dict[str, Tensor]:
        """The parties send their shares of the model to its receiver."""
        with named(self._plan.name, "opening the model"):
            found = {name: self._cluster.open(f"{PARAMETER}/{name}") for name in self._names}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _give(self, variable: str, values: Floats, name: str) -> None:
        self._cluster.share(variable, values)
        self.initial[name] = self._cluster.held(variable)

    def _step(self, step: int, batch: Ints) -> None:
        for variable in (INPUTS, LABELS):
            self._cluster.select(variable, self._plan.owners.parts(variable, batch))
        record = step <= self._plan.recorded_steps
        self.seconds += self._cluster.run(self._program(len(batch)), record=record)

    def _program(self, size: int) -> Program:
        """The step for batches of this size, compiled and loaded when first needed."""
        if size not in self._programs:
            plan = self._plan
            program = training_program(
                self._network, size, plan.shape, plan.classes, plan.work.recipe
            )
            self._cluster.load(program)
            self._programs[size] = program
        return self._programs[size]

    def _check_range(self, step: int, size: int) -> None:
        """One number is opened, of the batch that was just trained on: RangeError unless 0.

        The messages are kept of the first time, and after every recorded step.
        """
        recorded = self._plan.recorded_steps
        record = step <= recorded or (recorded > 0 and not self._guards)
        if size not in self._guards:
            bits = self._plan.scheme.fraction_bits
            self._guards[size] = Guard(self._network, size, self._plan.shape, bits)
        guard = self._guards[size]
        self.seconds += self._cluster.run(guard.program, record=record)
        guard.verify(self._cluster.open(guard.program.outputs[0]))


@contextmanager
def named(deployment: str, doing: str) -> Iterator[None]:
    """An MPCError inside, which names the party at fault, is a DeploymentError that says where."""
    try:
        yield
    except MPCError as error:
        raise DeploymentError(f"'{deployment}': {doing}: {error}") from error


def _floats(tensor: Tensor) -> Floats:
    return tensor.detach().numpy().astype(np.float32)
