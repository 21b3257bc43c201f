"""What an engine process does for the machine it runs on."""

import ctypes
import logging
import os
import platform
import socket
import sys
import threading

import pytest

from tenfold.engine import process, wire
from tenfold.engine.channel import Channel
from tenfold.engine.facts import Stats
from tenfold.engine.process import SCHED_ATTR, SLICE, Commands, Events, let_others_in

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


def test_a_parent_that_does_not_read_misses_heartbeats_then_the_log_and_then_its_engine(monkeypatch):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(process, "MOST", 1 << 20)
    monkeypatch.setattr(os, "_exit", end)
    ours, theirs = (Channel(end) for end in socket.socketpair())
    events = Events(ours, os.dup(ours.fd))
    beat = wire.Beat(Stats(*[0] * 15), False, 0, 0.0, "")
    events.send(beat)
    log = wire.Log("tenfold", logging.WARNING, "x" * 100_000)
    for _ in range(100):
        events.send(log)
    waiting = ours.waiting
    assert 300_000 < waiting <= 1 << 19
    events.send(beat)
    assert ours.waiting == waiting
    failed = wire.Failed("value", "x" * 100_000)
    with pytest.raises(SystemExit, match="4"):
        all(events.send(failed) is None for _ in range(100))
    assert waiting < ours.waiting <= 1 << 20
    kinds = [type(wire.decode_event(message)) for message in theirs.read()]
    assert kinds[:2] == [wire.Beat, wire.Log]
    theirs.close()
    events.close()
    os.close(events._begun.detach())


WAITING = "waits for commands"


@pytest.fixture
def commands(monkeypatch):
    """The way from a parent, the parent's end, and what was obeyed."""
    monkeypatch.setattr(os, "_exit", lambda code: None)
    ours, theirs = (Channel(end) for end in socket.socketpair())
    obeyed = []
    yield Commands(ours, obeyed.append), theirs, obeyed
    theirs.close()
    for thread in threading.enumerate():
        if thread.name == WAITING:
            thread.join()
    ours.close()


def begin(work):
    thread = threading.Thread(target=work, name=WAITING, daemon=True)
    thread.start()
    return thread


def test_a_command_that_another_thread_reads_before_the_engine_waits_wakes_it(commands):
    commands, parent, obeyed = commands
    commands.take()
    parent.send(wire.encode(wire.Abort("a")))
    commands.look()
    thread = begin(commands.wait)
    thread.join(10)
    assert not thread.is_alive()
    assert obeyed == [wire.Abort("a")]


@pytest.mark.parametrize("seen", ["take", "wait"])
def test_a_command_wakes_the_engine_once(commands, seen):
    commands, parent, obeyed = commands
    parent.send(wire.encode(wire.Abort("a")))
    commands.look()
    thread = begin(getattr(commands, seen))
    thread.join(10)
    assert not thread.is_alive()
    thread = begin(commands.wait)
    thread.join(0.1)
    assert thread.is_alive()
    parent.send(wire.encode(wire.Abort("b")))
    thread.join(10)
    assert not thread.is_alive()
    assert obeyed == [wire.Abort("a"), wire.Abort("b")]
