"""Memory for the CPU kernels: weights on huge pages, and results that do not go back to the system between steps.

Decoding reads every weight once a token. On 4 KiB pages a tenth of that time goes into address translation (measured
on an EPYC 9005, SmolLM2-135M, 2026-11), so packed weights share large blocks that the system may back with 2 MiB pages.
"""

import ctypes
import sys
import threading
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
BLOCK = 32 << 20  # bytes; smaller tensors share blocks of this size
ALIGN = 64
_MADV_HUGEPAGE = 14
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most that glibc accepts
_KEPT = 256 << 20  # bytes of free memory that the process may keep


class Weights:
    """Hands out parts of large blocks, 64-byte aligned. A block lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: Tensor | None = None
        self._used = 0

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], contents undefined."""
        size = -(-nbytes // ALIGN) * ALIGN
        if size > BLOCK // 2:
            return huge_empty(size)[:nbytes]
        with self._lock:
            if self._block is None or self._used + size > BLOCK:
                self._block, self._used = huge_empty(BLOCK), 0
            part = self._block[self._used : self._used + nbytes]
            self._used += size
            if self._used + ALIGN > BLOCK:
                self._block = None
        return part


weights = Weights()


def huge_empty(nbytes: int) -> Tensor:
    """uint8 [nbytes] at a multiple of the huge page size, with the advice to use huge pages."""
    with torch.inference_mode(False):  # parts of a block outlive the mode in which the first of them is asked for
        memory = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    part = memory[start : start + nbytes]
    libc = _libc()
    if libc is not None and hasattr(libc, "madvise"):
        # Advice: where it is refused, pages stay small.
        libc.madvise(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(nbytes // HUGE_PAGE * HUGE_PAGE), _MADV_HUGEPAGE)
    return part


@cache
def keep_memory() -> None:
    """Have the C library keep freed memory, for the whole process.

    The results of a prefill step are megabytes each; giving them back and getting them anew costs page faults, up to a
    tenth of the step. Only glibc needs to be told.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
