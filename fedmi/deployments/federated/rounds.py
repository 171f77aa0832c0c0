"""What fedmi adds to any Flower strategy: no failure is silent, types and buffers are kept."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedmi.deployments.base import DeploymentError
from fedmi.deployments.federated.plan import Plan
from fedmi.deployments.federated.protected import ProtectedGrid
from fedmi.deployments.federated.recorder import Recorder
from fedmi.exposure import wire

CLIENT_NAMED = re.compile(r"\bclient \d")


class RoundFailedError(RuntimeError):
    """The round gives no new model; the scenario says whether training goes on."""


class Rounds(Strategy):
    """A Flower strategy run by the plan.

    Flower averages whoever replied and says nothing of the rest; here a failure ends the
    round, or is tolerated where `min_clients` says so. A failed round ends the training, or
    leaves the model as it is where the plan says `skip_failed`. Server optimisers act on
    parameters; buffers (batch statistics) are averaged. Arrays keep the types of the model.
    """

    def __init__(
        self,
        inner: Strategy,
        plan: Plan,
        clients: Mapping[int, int],
        recorder: Recorder,
        progress: Callable[[float], None],
        protected: ProtectedGrid | None = None,
    ) -> None:
        self._inner = inner
        self._plan = plan
        self._clients = clients
        self._recorder = recorder
        self._progress = progress
        self._protected = protected
        self._current = ArrayRecord()
        self._lost_some = False
        self._skipped: list[str] = []

    @property
    def flags(self) -> frozenset[str]:
        """Evidence flags of the training so far."""
        found = {"clients_lost"} if self._lost_some else set()
        if self._skipped:
            count, rounds = len(self._skipped), self._plan.schedule.rounds
            found.add(f"rounds_skipped: {count} of {rounds}: {self._skipped[0]}")
        return frozenset(found)

    @property
    def _may_skip(self) -> bool:
        """Clients who add up the rounds themselves have gone on with a mean that was sent."""
        sent = self._protected is not None and self._protected.last.collected is not None
        return self._plan.skip_failed and (self._plan.server_knows or not sent)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._current = arrays
        return self._inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._progress(server_round / self._plan.schedule.rounds)
        try:
            accepted = self._accept(server_round, list(replies))
        except RoundFailedError as error:
            if not self._may_skip:
                raise DeploymentError(str(error)) from error
            self._skipped.append(str(error))
            return self._current, None
        contents = [message.content for message in accepted]
        arrays, metrics = self._inner.aggregate_train(server_round, accepted)
        assert arrays is not None  # at least one reply was accepted
        return self._as_model(arrays, contents), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        self._inner.summary()

    def _accept(self, round: int, replies: list[Message]) -> list[Message]:
        """What to combine: the replies that carry an update, or the protected round's mean."""
        if self._protected is None:
            return self._plain(round, replies)
        last = self._protected.last
        if last.collected is None:
            why = last.aborted.removeprefix(f"round {round}: ")
            who = "" if CLIENT_NAMED.search(why) else self._blame(last.failed or {})
            raise RoundFailedError(f"'{self._plan.name}', round {round}: {why}{who}")
        self._check(round, last.collected.clients, last.collected.failed)
        return replies

    def _plain(self, round: int, replies: list[Message]) -> list[Message]:
        """The replies that carry an update, by client."""
        by_client = {self._clients[m.metadata.src_node_id]: m for m in replies}
        asked = self._plan.schedule.participants(round)
        failed = {
            client: wire.failure(by_client.get(client))
            for client in asked
            if client not in by_client or by_client[client].has_error()
        }
        clients = tuple(client for client in sorted(by_client) if client not in failed)
        self._check(round, clients, failed)
        accepted = [by_client[client] for client in clients]
        if round in self._plan.record:
            mean = aggregate_arrayrecords([m.content for m in accepted], wire.EXAMPLES)
            self._recorder.counted(round, clients)
            self._recorder.aggregate(round, clients, wire.to_tensors(mean))
        return accepted

    def _check(self, round: int, clients: tuple[int, ...], failed: Mapping[int, str]) -> None:
        """RoundFailedError where too few updates arrived, or one failed that may not."""
        lost = self._plan.schedule.lost(round)
        broken = {client: why for client, why in failed.items() if client not in lost}
        if broken and not self._plan.min_clients:
            client, why = next(iter(broken.items()))
            others = f" (and {len(broken) - 1} more clients)" if len(broken) > 1 else ""
            raise RoundFailedError(
                f"'{self._plan.name}', round {round}, client {client}{others}: {why}"
            )
        if broken:
            self._lost_some = True
        needed = max(1, self._plan.min_clients)
        if len(clients) < needed:
            asked = self._plan.schedule.participants(round)
            raise RoundFailedError(
                f"'{self._plan.name}', round {round}: {len(clients)} of {len(asked)} clients "
                f"replied ({len(lost)} dropped out, {len(broken)} failed), {needed} needed"
                + self._blame(broken)
            )

    def _blame(self, failed: Mapping[int, str]) -> str:
        return "".join(f"; client {client}: {why}" for client, why in sorted(failed.items()))

    def _as_model(self, arrays: ArrayRecord, contents: list[RecordDict]) -> ArrayRecord:
        """The new global model: averaged buffers, the types of the current model."""
        buffers = [name for name in self._current if name not in self._plan.trainable]
        if buffers:
            arrays = arrays.copy()
            arrays.update(aggregate_arrayrecords(_only(contents, buffers), wire.EXAMPLES))
        return ArrayRecord(
            {name: _typed(arrays[name], current) for name, current in self._current.items()}
        )


def _only(contents: list[RecordDict], names: list[str]) -> list[RecordDict]:
    """The contents with these arrays only."""
    return [
        RecordDict(
            {
                wire.ARRAYS: ArrayRecord(
                    {name: c.array_records[wire.ARRAYS][name] for name in names}
                ),
                wire.METRICS: c.metric_records[wire.METRICS],
            }
        )
        for c in contents
    ]


def _typed(array: Array, current: Array) -> Array:
    if array.dtype == current.dtype:
        return array
    values, kind = array.numpy(), np.dtype(current.dtype)
    rounded = np.rint(values) if np.issubdtype(kind, np.integer) else values
    return Array(np.asarray(rounded, dtype=kind))
