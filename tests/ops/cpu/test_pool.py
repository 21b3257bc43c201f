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


@pytest.fixture(autouse=True)
def restore_threads():
    yield
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


def test_a_stuck_worker_holds_up_one_tile_only():
    """While one thread is inside a tile, the other runs all that is left, including the rest of its share."""
    lib.set_threads(2)
    others_done, ran = threading.Event(), []

    def tile_function(tile, thread):
        if tile == 4:  # the first of the second thread's share
            assert others_done.wait(20)
        ran.append(tile)
        if len(ran) == 7:
            others_done.set()

    parallel(8, tile_function)
    assert sorted(ran) == list(range(8))
    assert ran[-1] == 4


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
