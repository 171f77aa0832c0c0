"""Between tensors and what Flower sends: records, their sizes, and copies of them."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

ALIGNED, C_ORDER = 64, b"'fortran_order': False"
"""Of a .npy file: where its numbers may start, and what its header says of most of them."""
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
ROUND = "server-round"
EXAMPLES = "num-examples"
PARTITION = "partition-id"
KEEP = "keep"
"""In a message's configuration: the client is to remember its update, for the simulator."""
CAUSE = re.compile(r"^[\w.]+(Error|Exception)\b: .+", re.MULTILINE)
"""The line of a traceback that names the exception."""


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
    )


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(to_array(array)) for name, array in record.items()}


def to_array(array: Array) -> NDArray[Any]:
    """What `array.numpy()` gives, without NumPy's parsing of the header, which for small models
    takes longer than all else in a round. Arrays that do not say their type, as those of Flower's
    older records, are parsed."""
    if array.stype == "numpy.ndarray" and array.dtype:
        kind, size = np.dtype(array.dtype), math.prod(array.shape)
        start = len(array.data) - size * kind.itemsize
        if start % ALIGNED == 0 and C_ORDER in array.data[:start]:
            return np.frombuffer(array.data, kind, size, start).reshape(array.shape).copy()
    found: NDArray[Any] = array.numpy()
    return found


def like(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the types the model holds them in; averaged counters are rounded."""
    return {name: _cast(tensor, model[name].dtype) for name, tensor in tensors.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype.is_floating_point and not dtype.is_floating_point:
        tensor = tensor.round()
    return tensor.to(dtype)


def arrays_of(message: Message) -> ArrayRecord:
    """The one array record of a message's content."""
    record: ArrayRecord = next(iter(message.content.array_records.values()))
    return record


def metrics_of(message: Message) -> dict[str, float]:
    """Every scalar metric of a message, by key as sent."""
    return {
        key: float(value)
        for record in message.content.metric_records.values()
        for key, value in record.items()
        if not isinstance(value, list)
    }


def clear_of(message: Message) -> dict[str, float]:
    """The scalar metrics by the names they have beside an observation (num_examples, ...)."""
    return {key.replace("-", "_"): value for key, value in metrics_of(message).items()}


def failure(reply: Message | None) -> str:
    """What went wrong; of a traceback, the exception it began with."""
    if reply is None:
        return "no reply"
    reason = reply.error.reason or "failed without a reason"
    cause = CAUSE.search(reason)
    return cause.group() if cause else reason


def round_of(message: Message) -> int:
    """The round a server's message says it belongs to."""
    return whole(message.content.config_records[CONFIG], ROUND)


def whole(record: ConfigRecord, key: str) -> int:
    """A whole number from a config record; TypeError if it is anything else."""
    value = record[key]
    if not isinstance(value, int):
        raise TypeError(f"config '{key}' is {value!r}, expected a whole number")
    return value


def size(message: Message) -> int:
    """Bytes of a message's content (arrays with their headers, keys, scalars) or of its error."""
    if message.has_error():
        return len((message.error.reason or "").encode())
    return content_size(message.content)


def _some(value: Sequence[object] | str | bytes) -> bool:
    """Whether there is something to count, in a list in each of its entries."""
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(not isinstance(e, str | bytes) or len(e) > 0 for e in entries)


def total_size(messages: Sequence[Message]) -> int:
    """Bytes of all the messages; a content that several of them share is measured once."""
    shared = Counter(id(message.content) for message in messages)
    contents = {id(message.content): message.content for message in messages}
    return sum(content_size(contents[key]) * times for key, times in shared.items())


def content_size(content: RecordDict) -> int:
    return sum(len(key) + _record_size(record) for key, record in content.items())


def _record_size(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    """Flower's own count, which cannot take a configuration with an empty list or text."""
    if not isinstance(record, ConfigRecord):
        return int(record.count_bytes())
    empty = [key for key, v in record.items() if isinstance(v, list | str | bytes) and not _some(v)]
    filled = ConfigRecord({key: value for key, value in record.items() if key not in empty})
    return int(filled.count_bytes()) + sum(map(len, empty))


def copied(content: RecordDict) -> RecordDict:
    """A copy its owner may change; the bytes of the arrays are shared, as they cannot change.

    Strategies put one RecordDict into every message, so a mod that edits what it received
    would otherwise edit what every other client receives.
    """
    return RecordDict(
        {
            key: _arrays(record) if isinstance(record, ArrayRecord) else deepcopy(record)
            for key, record in content.items()
        }
    )


def _arrays(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()}
    )


def metric_record(examples: int, metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({EXAMPLES: examples, **metrics})
