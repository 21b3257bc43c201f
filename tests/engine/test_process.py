"""What an engine process does for the machine it runs on."""

import ctypes
import os
import platform
import sys
import threading

import pytest

from tenfold.engine.process import SCHED_ATTR, SLICE, let_others_in

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def attributes() -> tuple[int, ...]:
    """sched_getattr(2) of this thread."""
    found = ctypes.create_string_buffer(SCHED_ATTR.size)
    number = SCHED_GETATTR[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, found, SCHED_ATTR.size, 0) == 0
    return SCHED_ATTR.unpack(found.raw)


def on_a_thread(*steps):
    """Their results, on a thread that ends with what it was given."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(step() for step in steps))
    thread.start()
    thread.join()
    return found


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in SCHED_GETATTR, reason="asks Linux for its slices"
)
def test_an_engines_threads_have_long_slices_and_else_what_they_had():
    before, _, after, child = on_a_thread(attributes, let_others_in, attributes, lambda: on_a_thread(attributes)[0])
    if before[1] != os.SCHED_OTHER or not after[5]:
        pytest.skip("this system lets nobody choose slices")
    assert after == (*before[:5], SLICE, *before[6:])
    assert child == after
    assert attributes()[5] != SLICE
