"""What an engine process does for the machine it runs on."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from tenfold.engine.process import give_back

BLOCK = 64 << 10
COUNT = 1000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_is_free_but_held_is_given_back():
    """Blocks below others that stay are what a heap cannot return by getting shorter."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("the C library is not glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident()
    give_back()
    given = before - resident()
    libc.free(blocks[-1])
    assert given > BLOCK * COUNT // 2
