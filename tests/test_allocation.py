"""Freed memory stays with the process during a search, and goes back after it."""

import ctypes
import resource
import sys

import pytest
import torch

from fedmi.attacks.engine.allocation import freed_memory_kept

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
PAGE = 4096


def faults(size: int, times: int) -> int:
    """Pages zeroed anew while tensors of `size` bytes come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(size // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_pages_are_asked_for_once() -> None:
    size, times = 64 * 2**20, 10
    outside = faults(size, times)
    with freed_memory_kept():
        faults(size, 1)
        inside = faults(size, times)
    assert outside > (times - 1) * size // PAGE // 600  # huge pages count as one
    assert inside < outside / 3
    assert faults(size, times) > 3 * inside


def test_an_error_inside_passes() -> None:
    with pytest.raises(KeyError, match="x"), freed_memory_kept():
        raise KeyError("x")
