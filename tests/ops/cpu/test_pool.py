"""The thread pool: every tile once, whoever calls, in forks and at the end of the process."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from tenfold.ops.cpu import lib
from tenfold.ops.kernels import Norm

if not lib.available():
    pytest.skip(lib.status().reason, allow_module_level=True)

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


CROWDED, STALLED = 1, 2  # TF_BENCH_*


@pytest.fixture(autouse=True)
def no_benching():
    """Tests that need workers to take part should not depend on what else this machine does."""
    lib.load().tf_pool_bench(0)
    yield
    lib.load().tf_pool_bench(CROWDED | STALLED)
    lib.set_threads()


def parallel(tiles, function):
    task = TASK(lambda ctx, tile, thread: function(tile, thread))
    lib.load().tf_parallel(tiles, ctypes.cast(task, ctypes.c_void_p), None)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 7, 64, 1000])
def test_every_tile_runs_once(threads, tiles):
    lib.set_threads(threads)
    for _ in range(3):
        seen: list[tuple[int, int]] = []
        parallel(tiles, lambda tile, thread, seen=seen: seen.append((tile, thread)))
        assert sorted(tile for tile, _ in seen) == list(range(tiles))
        assert all(0 <= thread < threads for _, thread in seen)


def test_one_tile_runs_in_the_caller():
    lib.set_threads(4)
    where = []
    parallel(1, lambda tile, thread: where.append((thread, threading.get_ident())))
    assert where == [(0, threading.get_ident())]


def slow_worker_job(seconds):
    """Two tiles, of which the one a worker gets takes `seconds`; returns the threads that ran."""
    seen = []

    def tile_function(tile, thread):
        seen.append(thread)
        time.sleep(seconds if thread else 0.0002)  # the caller is slow, so that an awake worker gets a tile

    parallel(2, tile_function)
    return set(seen)


def test_a_stuck_worker_holds_up_one_tile_only():
    """While one thread is inside a tile, the other runs all that is left, including the rest of its share."""
    lib.set_threads(2)
    others_done, ran = threading.Event(), []

    def tile_function(tile, thread):
        if thread == 1 and not others_done.is_set():
            assert others_done.wait(20)
        ran.append((tile, thread))
        if len(ran) == 7:
            others_done.set()
        time.sleep(0.001)

    parallel(8, tile_function)
    assert sorted(tile for tile, _ in ran) == list(range(8))
    assert [thread for _, thread in ran] in ([0] * 7 + [1], [0] * 8)


def test_a_worker_that_stalls_is_benched_and_comes_back():
    lib.set_threads(2)
    lib.load().tf_pool_bench(STALLED)
    deadline = time.monotonic() + 20
    while slow_worker_job(0) == {0}:
        assert time.monotonic() < deadline
    while slow_worker_job(0.004) != {0}:  # one late tile is borne, several in a row are not
        assert time.monotonic() < deadline
    while slow_worker_job(0) == {0}:
        assert time.monotonic() < deadline


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to put threads on one processor here")
def test_workers_step_aside_on_a_single_processor():
    """With one processor for all threads, the workers must not take time from the caller."""
    allowed = os.sched_getaffinity(0)
    lib.set_threads(1)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        lib.set_threads(4)
        lib.load().tf_pool_bench(CROWDED)
        ran = [0, 0, 0, 0]

        def tile_function(tile, thread):
            ran[thread] += 1

        for _ in range(300):
            parallel(50, tile_function)
    finally:
        lib.set_threads(1)
        os.sched_setaffinity(0, allowed)
    assert sum(ran) == 15000
    assert ran[0] > 14900


def test_nested_jobs_run_inline():
    lib.set_threads(3)
    inner = []

    def outer(tile, thread):
        parallel(5, lambda t, inner_thread: inner.append((tile, t, inner_thread == thread)))

    parallel(4, outer)
    assert sorted((a, b) for a, b, _ in inner) == [(a, b) for a in range(4) for b in range(5)]
    assert all(same for _, _, same in inner)


def test_many_python_threads(native):
    """Concurrent callers share one pool; each gets its own result."""
    lib.set_threads(3)
    norm = Norm(torch.ones(256), 1e-5)
    errors = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        x, logits = torch.randn(200, 256, generator=g), torch.randn(2, 40000, generator=g)
        want, best = native.norm(x, norm), logits.argmax(-1)
        for _ in range(60):
            if not torch.equal(native.norm(x, norm), want) or not torch.equal(native.argmax(logits), best):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []


def test_the_size_may_change_while_others_compute(native):
    norm, x, stop = Norm(torch.ones(64), 1e-5), torch.randn(2000, 64), threading.Event()
    want, wrong = native.norm(x, norm), []

    def work():
        while not stop.is_set():
            if not torch.equal(native.norm(x, norm), want):
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    for i in range(60):
        lib.set_threads(1 + i % 5)
    lib.load().tf_pool_stop()
    stop.set()
    thread.join()
    assert not wrong


def test_thread_counts_are_bounded():
    assert lib.set_threads(100000) == 256
    assert lib.set_threads(-3) == 1


def test_an_idle_pool_uses_no_processor():
    lib.set_threads(4)
    parallel(100, lambda tile, thread: None)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


def run_script(text):
    code = textwrap.dedent(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=environment)


SCRIPT = """
import ctypes, os, sys, threading, time
from ctypes import c_int, c_void_p
from tenfold.ops.cpu import lib
lib.set_threads(3)
TASK = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_int)
def job():
    seen = []
    task = TASK(lambda ctx, tile, thread: seen.append(tile))
    lib.load().tf_parallel(50, ctypes.cast(task, c_void_p), None)
    return sorted(seen) == list(range(50))
assert job()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own():
    """Also when the fork happens while another thread is inside a job."""
    result = run_script(
        SCRIPT
        + """
stop = threading.Event()
def busy():
    while not stop.is_set():
        assert job()
thread = threading.Thread(target=busy)
thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if job() and job() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert job()
"""
    )
    assert result.returncode == 0, result.stderr.decode()


def test_the_process_ends_while_workers_are_awake():
    result = run_script(SCRIPT + "assert job()")
    assert result.returncode == 0, result.stderr.decode()


def test_the_process_ends_while_a_daemon_thread_computes():
    result = run_script(
        SCRIPT
        + """
from array import array
import struct
floats = array("f", range(200000)); out = array("q", [0])
args = struct.pack("@2P2q", floats.buffer_info()[0], out.buffer_info()[0], 1, len(floats))
argmax = lib.prototype("tf_argmax", None, ctypes.c_char_p)
def busy():
    while True:
        argmax(args)
threading.Thread(target=busy, daemon=True).start()
time.sleep(0.05)
assert out[0] == 199999
"""
    )
    assert result.returncode == 0, result.stderr.decode()
