"""What every set of records must satisfy before anything is trained on it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmi.data.errors import DataError
from fedmi.data.records import Records
from fedmi.exposure.schema import PIXELS, Schema


def checked(
    inputs: NDArray[Any],
    labels: NDArray[Any],
    source: str,
    identities: NDArray[Any] | None = None,
    schema: Schema | None = None,
) -> Records:
    """Records with ids 0 .. n-1, read-only; identities are the labels unless given.

    inputs: [n, C, H, W], any real dtype, in [0, 1] or what the schema asks for. labels: [n]
    integers 0 .. classes - 1, each with a record. Raises DataError, which starts with `source`, for
    everything else.
    """
    schema = PIXELS if schema is None else schema
    if len(inputs) != len(labels):
        raise DataError(f"{source}: {len(inputs)} inputs but {len(labels)} labels")
    if identities is not None and identities.shape != labels.shape:
        raise DataError(f"{source}: {len(labels)} labels but identities {identities.shape}")
    _check_labels(labels, source)
    _check_inputs(inputs, source, schema)
    whole = np.asarray(labels, dtype=np.int64)
    shown = whole if identities is None else np.unique(identities, return_inverse=True)[1]
    arrays = (
        np.ascontiguousarray(inputs, dtype=np.float32),
        whole,
        np.asarray(shown, dtype=np.int64),
        np.arange(len(whole), dtype=np.int64),
    )
    for array in arrays:
        array.setflags(write=False)
    return Records(*arrays, schema=schema)


def _check_labels(labels: NDArray[Any], source: str) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{source}: labels are {labels.dtype} {labels.shape}; they must be integers [n]"
        )
    classes = np.unique(labels)
    if len(classes) < 2:
        raise DataError(f"{source}: {len(classes)} class(es); a classifier needs 2 or more")
    if classes[0] < 0:
        raise DataError(f"{source}: label {classes[0]} is negative; classes count from 0")
    gap = int(np.argmax(np.append(classes, -1) != np.arange(len(classes) + 1)))
    if gap < len(classes):
        raise DataError(
            f"{source}: class {gap} has no record; labels go up to {classes[-1]} and must be "
            f"0 .. {len(classes) - 1} for {len(classes)} classes"
        )


def _check_inputs(inputs: NDArray[Any], source: str, schema: Schema) -> None:
    if inputs.ndim != 4 or inputs.dtype.kind not in "fiub" or 0 in inputs.shape:
        raise DataError(
            f"{source}: inputs are {inputs.dtype} {inputs.shape}; "
            "they must be numbers [n, channels, height, width]"
        )
    if not np.isfinite(inputs).all():
        bad = np.flatnonzero(~np.isfinite(inputs).all(axis=(1, 2, 3)))
        raise DataError(f"{source}: NaN or infinity in {len(bad)} record(s), first in row {bad[0]}")
    low, high = float(inputs.min()), float(inputs.max())
    if schema.kind != "text" and (low < 0 or high > 1):
        raise DataError(f"{source}: values from {low:g} to {high:g}; they must lie in [0, 1]")
    if schema.kind == "text" and (flaw := schema.flaw(torch.from_numpy(np.asarray(inputs)))):
        raise DataError(f"{source}: inputs {flaw}")


def check_private_classes(wanted: tuple[int, ...], classes: int, field: str, source: str) -> None:
    """DataError unless two or more classes are wanted, each exists, and another remains."""
    there = set(range(classes))
    if len(set(wanted)) < len(wanted):
        raise DataError(f"{field} = {list(wanted)} names a class twice")
    if unknown := sorted(set(wanted) - there):
        raise DataError(f"{field} names {unknown}; {source} has classes 0 .. {classes - 1}")
    if len(wanted) < 2:
        raise DataError(f"{field} = {list(wanted)}: a classifier needs 2 private classes or more")
    if not there - set(wanted):
        raise DataError(
            f"{field} takes all {classes} classes of {source}: no public class is left to "
            "stand in for the private ones"
        )
