"""Memory that is freed is kept for the next step, while a search runs."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
LARGEST = 2**30
"""Bytes."""
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which users say what the allocator does; then it is left alone."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """glibc hands large tensors back to the system when they are freed, and every step of a search
    asks for the same ones anew: a third of the time of a small network is zeroed pages.

    The first call has the process keep what is freed, from then on and for good, since the
    thresholds that glibc moves by itself cannot be had back; at the end of each call what is free
    by then goes to the system. Elsewhere than on glibc nothing changes.
    """
    library = _keeping()
    try:
        yield
    finally:
        if library is not None:
            library.malloc_trim(0)


@cache
def _keeping() -> ctypes.CDLL | None:
    """The C library, told once; None where it is not glibc, or does as the user says."""
    if sys.platform != "linux" or any(name in os.environ for name in OWN):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return None
    told = [library.mallopt(name, LARGEST) for name in (MMAP_THRESHOLD, TRIM_THRESHOLD)]
    return library if all(told) else None
