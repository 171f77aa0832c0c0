"""Freed memory stays with the process during a search."""

import subprocess
import sys

import pytest

from fedmi.attacks.engine.allocation import freed_memory_kept

FAULTS = """
import os, resource, sys
import torch
from fedmi.attacks.engine.allocation import freed_memory_kept

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with freed_memory_kept():
    faults(5)
    print(faults(200))
    held = [torch.ones(2**18) for _ in range(200)]
    del held
    inside = resident()
print(faults(200), inside - resident())
"""


def asked(**environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_asked_for_once_and_given_back_at_the_end() -> None:
    inside, after, given_back = asked()
    assert max(inside, after) < 5000  # of 51,200 pages
    assert given_back > 150 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_who_has_set_the_allocator_is_left_alone() -> None:
    inside, after, _ = asked(MALLOC_MMAP_THRESHOLD_="131072")
    assert min(inside, after) > 10_000


def test_an_error_inside_passes() -> None:
    with pytest.raises(KeyError, match="x"), freed_memory_kept():
        raise KeyError("x")
