"""Memory that is freed is kept for the next step, while a search runs."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
DEFAULT = 128 * 2**10
"""Bytes; glibc's own value of both."""
LARGEST = 2**30


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """glibc hands tensors above 128 KiB back to the system, and every step of a search asks for
    the same ones anew: a third of the time of a small network is zeroed pages. Within this, freed
    memory stays with the process; after it, it goes back. Elsewhere than on glibc nothing changes.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "malloc_trim"):  # musl has none
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST)
    library.mallopt(TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, DEFAULT)
        library.mallopt(TRIM_THRESHOLD, DEFAULT)
        library.malloc_trim(0)
