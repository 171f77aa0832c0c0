"""The grid as a strategy meets it behind protections: one reply a round, which holds the mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmi.deployments.federated.client import CONFIDE, protection_key
from fedmi.deployments.federated.malice.base import Occasion
from fedmi.deployments.federated.plan import Plan
from fedmi.deployments.federated.recorder import Recorder
from fedmi.deployments.federated.wrapper import GridWrapper
from fedmi.exposure import wire
from fedmi.protections.base import ServerHalf, UpdateProtection
from fedmi.protections.transport import Collected, RoundAbortedError, Transport

ROUNDING = 1e-6
"""Sums in float32 and float64 differ by less, for updates of ordinary size."""


@dataclass(frozen=True)
class Round:
    """What came of one round: `collected`, or why it was `aborted` and who failed."""

    collected: Collected | None
    aborted: str = ""
    failed: Mapping[int, str] | None = None


class ProtectedGrid(GridWrapper):
    """Runs the transport's protocol in place of one exchange, and the protections' server halves.

    behind: records what crosses. aside: the simulator's own line to the nodes.
    """

    def __init__(
        self,
        behind: Grid,
        aside: Grid,
        plan: Plan,
        transport: Transport,
        clients: Mapping[int, int],
        recorder: Recorder,
    ) -> None:
        super().__init__(behind)
        self._aside = aside
        self._plan = plan
        self._clients = clients
        self._recorder = recorder
        seed = plan.schedule.seed.child("server")
        self._transport = transport.server_half(plan.setting, seed.child("transport"))
        self._halves: dict[int, ServerHalf] = {
            index: protection.server_half(plan.setting, seed.child("protection", index))
            for index, protection in enumerate(plan.setting.protections)
            if isinstance(protection, UpdateProtection)
        }
        self._error, self._bound = 0.0, 0.0
        self._flags: set[str] = set()
        self._discarded: frozenset[str] = frozenset()
        self.altered: set[tuple[int, int]] = set()
        """(round, client) of each altered model that was sent."""
        self.last = Round(None, "no round yet")

    def close(self) -> None:
        """Training is over."""
        self._transport.close()

    def flags(self) -> frozenset[str]:
        """What the protections noticed over the whole training."""
        found = set(self._flags).union(*(half.flags() for half in self._halves.values()))
        if self._plan.sealed and self._plan.record:
            found.add(
                f"aggregation_error: mean off by {self._error:.1e} at most in the recorded "
                f"rounds, bound {self._bound:.1e}"
            )
        if self._plan.sealed and self._error > 1.01 * self._bound + ROUNDING:
            found.add(f"aggregate_wrong: off by {self._error:.1e}, bound {self._bound:.1e}")
        return frozenset(found)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked = list(messages)
        if not asked:  # Flower's evaluation, of which there is none
            return []
        round = wire.round_of(asked[0])
        model = wire.to_tensors(wire.arrays_of(asked[0]))
        who = sorted(self._clients[message.metadata.dst_node_id] for message in asked)
        if self._recorder.wants(round):
            self._recorder.model(round, who, model)
        self._configure(asked, round)
        self._alter(asked, round, model, who)
        try:
            collected = self._transport.exchange(asked, self.behind, self._clients, self._aside)
        except RoundAbortedError as error:
            self.last = Round(None, str(error), error.failed)
            return []
        self.last = Round(collected)
        self._flags |= collected.flags
        self._recorder.beside(*collected.side_bytes)
        self._inspect(round, collected)
        return [self._reply(asked, round, model, collected)]

    def _configure(self, messages: Sequence[Message], round: int) -> None:
        """Scalars of the server halves go down with the model."""
        scalars = {
            protection_key(index, name): float(value)
            for index, half in self._halves.items()
            for name, value in half.config(round).items()
        }
        if round in self._plan.record:
            scalars[wire.KEEP] = 1.0
        for content in {id(m.content): m.content for m in messages}.values():
            content.config_records[wire.CONFIG].update(scalars)

    def _alter(
        self, messages: Sequence[Message], round: int, model: Mapping[str, Tensor], who: list[int]
    ) -> None:
        """A malicious server gives some clients another model."""
        malice, self._discarded = self._plan.malice, frozenset()
        if malice is None or round not in malice.rounds:
            return
        seed = self._plan.schedule.seed.child("malice", round)
        occasion = Occasion(
            round=round,
            asked=tuple(who),
            network=self._plan.setting.network,
            seed=seed,
            shape=self._plan.private.shape,
            classes=self._plan.classes,
            public=self._plan.public,
            one_step=self._plan.one_step,
        )
        for message in messages:
            client = self._clients[message.metadata.dst_node_id]
            sent = wire.like(dict(malice.alter(model, client, occasion)), model)
            content = wire.copied(message.content)
            content[wire.ARRAYS] = wire.to_record(sent)
            message.content = content
            self._recorder.altered(round, client, sent)
            changed = {name for name in model if not torch.equal(sent[name], model[name])}
            if changed:
                self.altered.add((round, client))
            if malice.keeps == "unaltered":
                self._discarded |= changed
        if malice.keeps == "nothing":
            self._discarded = frozenset(model)

    def _inspect(self, round: int, collected: Collected) -> None:
        """Ask, aside, what clients could tell; compare the mean with that of the true updates."""
        self._recorder.counted(round, collected.clients)
        if round in self._plan.record:
            for seen in self._transport.party_views():
                self._recorder.party(round, seen)
        if round not in self._plan.record or not (self._plan.sealed or self._plan.confide):
            return
        nodes = {client: node for node, client in self._clients.items()}
        questions = [Message(RecordDict(), nodes[c], CONFIDE) for c in collected.clients]
        exact: dict[str, Tensor] = {}
        total = 0.0
        for reply in self._aside.send_and_receive(questions):
            told = wire.to_tensors(wire.arrays_of(reply))
            weight = float(told["weight"])
            total += weight
            for name in collected.mean:
                exact[name] = exact.get(name, 0.0) + weight * told[f"update/{name}"].double()
            if self._plan.confide:
                client = self._clients[reply.metadata.src_node_id]
                self._recorder.confided(round, client, told)
        errors = [
            (exact[name] / total - mean.double()).abs().max()
            for name, mean in collected.mean.items()
            if mean.numel()
        ]
        self._error = max([self._error, *(float(error) for error in errors)])
        self._bound = max(self._bound, collected.error_bound)

    def _reply(
        self,
        messages: Sequence[Message],
        round: int,
        model: Mapping[str, Tensor],
        collected: Collected,
    ) -> Message:
        """The mean as if one client had sent it: Flower's weighted mean of one is exact."""
        layout = self._plan.setting.layout
        seen = {name: collected.mean[name] for name in layout}
        combined = self._plan.aggregate(model, seen)
        self._recorder.aggregate(round, collected.clients, combined, collected.weight)
        mean: Mapping[str, Tensor] = collected.mean
        for half in reversed(self._halves.values()):
            mean = half.finish(round, mean, len(collected.clients))
        dropped = {name: torch.zeros_like(mean[name]) for name in self._discarded}
        mean = {**mean, **dropped}
        combined = self._plan.aggregate(model, {name: mean[name] for name in layout})
        content = RecordDict(
            {
                wire.ARRAYS: wire.to_record({n: torch.as_tensor(t) for n, t in combined.items()}),
                wire.METRICS: MetricRecord({wire.EXAMPLES: 1}),
            }
        )
        nodes = {client: node for node, client in self._clients.items()}
        first = nodes[collected.clients[0]]
        asked = next(m for m in messages if m.metadata.dst_node_id == first)
        return Message(content, reply_to=asked)
