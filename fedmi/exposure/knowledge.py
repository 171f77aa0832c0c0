"""What the adversary is given besides its channel, and the targets it goes for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedmi.exposure.device import Faults
from fedmi.exposure.opening import Confided, Opener
from fedmi.exposure.recipe import LocalWork
from fedmi.exposure.schema import PIXELS, Schema
from fedmi.exposure.words import Channel, Fact, Position


@dataclass(frozen=True)
class View:
    """Position P sees channel C; `facts` are what P knows by nature.

    items: on channel `share`, what the shares are of: records, model, update; on `predictions`
    and `labels`, `answers` where P reads the answers that others got. Empty = not told.
    """

    position: Position
    channel: Channel
    facts: frozenset[Fact] = frozenset()
    items: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """What one reconstruction is of: a class of the model, or the batch behind one observation.

    `label` is set for a class. `round` and `clients` are set for a batch. `query` is set for a
    record that a user sent to the served model, counted from 0.
    """

    id: str
    label: int | None = None
    round: int | None = None
    clients: tuple[int, ...] = ()
    query: int | None = None


@dataclass(frozen=True)
class Knowledge:
    """Each field is None unless its fact is in `facts` (shape, classes and what the numbers of a
    record mean are always known).

    build: a fresh module of the target's architecture (weights arbitrary).
    work: the local training the server configured.
    labels: true labels by target id, [records].
    num_examples: by target id, where granted; what travelled in clear is in the observation.
    order: by target id: client -> local step -> rows of the target's records (BATCH_ORDER).
    public: (inputs [n, C, H, W], labels [n]) disjoint from everything private.
    canaries: by target id, where an auditor planted gradients: parameter name -> flat indices.
    canary_records: (inputs [m, C, H, W], labels [m]) of the records an auditor planted.
    colluders: by target id, what the other members of the coalition tell of their own side.
    opener: how sealed items are opened (the algorithm is public, the keys are not).
    protections: what the deployment is known to do to updates, in order, as in the table.
    faults: what the served device's memory does to any weights (FAULT_MODEL).
    exact_model: the state dict as it was trained, before any fault or noise (EXACT_MODEL).
    """

    input_shape: tuple[int, int, int]
    classes: int
    schema: Schema = PIXELS
    facts: frozenset[Fact] = frozenset()
    build: Callable[[], nn.Module] | None = None
    work: LocalWork | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    order: Mapping[str, tuple[tuple[tuple[int, ...], ...], ...]] = field(default_factory=dict)
    num_examples: Mapping[str, int] = field(default_factory=dict)
    public: tuple[Tensor, Tensor] | None = None
    canaries: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    canary_records: tuple[Tensor, Tensor] | None = None
    colluders: Mapping[str, tuple[Confided, ...]] = field(default_factory=dict)
    opener: Opener | None = None
    protections: tuple[str, ...] = ()
    faults: Faults | None = None
    exact_model: Mapping[str, Tensor] | None = None
