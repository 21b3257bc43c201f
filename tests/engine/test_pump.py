"""The pump alone, with a child made of a pipe and a list."""

import asyncio
import os
from contextlib import suppress

import msgspec
import pytest

from tenfold.engine import pump as module
from tenfold.engine.pump import Pump
from tenfold.engine.request import FinishReason, Output


class Pipe:
    """What the pump needs of a Child. A byte in the pipe tells of each message."""

    def __init__(self):
        self.fd, self.write = os.pipe()
        os.set_blocking(self.fd, False)
        self.messages = []
        self.reads = 0
        self.silent = False

    def put(self, *messages):
        self.messages += messages
        os.write(self.write, b"x")

    def read(self):
        self.reads += 1
        with suppress(BlockingIOError):
            self.silent = not os.read(self.fd, 100)
        found, self.messages = self.messages, []
        if "broken" in found:
            raise msgspec.DecodeError("no message")
        return found

    def end(self):
        """As a process that ends: readable from now on, and nothing there."""
        os.close(self.write)
        self.write = -1

    def close(self):
        os.close(self.fd)
        if self.write != -1:
            os.close(self.write)


@pytest.fixture
def child():
    pipe = Pipe()
    yield pipe
    pipe.close()


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def test_messages_come_in_order_and_what_was_there_before_too(child):
    async def main():
        taken = []
        child.put(1, 2)
        pump = Pump(asyncio.get_running_loop(), child, taken.append, taken.append)
        await until(lambda: taken == [1, 2])
        child.put(3)
        await until(lambda: taken == [1, 2, 3])
        pump.stop()

    asyncio.run(main())


def test_messages_that_follow_closely_are_taken_together(child, monkeypatch):
    monkeypatch.setattr(module, "GATHER", 0.2)

    async def main():
        taken = []
        pump = Pump(asyncio.get_running_loop(), child, taken.append, taken.append)
        await until(lambda: pump.turns)
        child.put(1)
        await until(lambda: taken == [1])
        turns = pump.turns
        child.put(2)
        await until(lambda: taken == [1, 2])
        for i in range(3, 6):
            child.put(i)
            await asyncio.sleep(0.001)
        await until(lambda: taken == [1, 2, 3, 4, 5])
        assert pump.turns == turns + 2
        pump.stop()


def test_messages_that_come_slowly_are_each_taken_at_once(child, monkeypatch):
    """No timer is set between them."""
    monkeypatch.setattr(module, "GATHER", 0.001)

    async def main():
        loop = asyncio.get_running_loop()
        taken, timers = [], []
        pump = Pump(loop, child, taken.append, taken.append)
        await until(lambda: pump.turns)
        later = loop.call_later
        for i in range(5):
            await asyncio.sleep(0.005)
            loop.call_later = lambda seconds, *rest: timers.append(seconds) or later(seconds, *rest)
            child.put(i)
            while len(taken) <= i:
                await asyncio.sleep(0)
            loop.call_later = later
        assert taken == [0, 1, 2, 3, 4]
        assert not timers
        pump.stop()

    asyncio.run(main())


def test_after_stop_nothing_is_taken_and_nothing_left(child):
    async def main():
        taken = []
        pump = Pump(asyncio.get_running_loop(), child, taken.append, taken.append)
        await until(lambda: pump.turns)
        pump.stop()
        pump.stop()
        child.put(1)
        await asyncio.sleep(0.05)
        assert not taken
        assert not pump.nudge()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(pump._fd)

    asyncio.run(main())


@pytest.mark.parametrize("messages", [[], [1], [1, 2]])
def test_the_end_of_a_child_does_not_keep_the_loop_busy(child, messages):
    async def main():
        taken = []
        pump = Pump(asyncio.get_running_loop(), child, taken.append, taken.append)
        await until(lambda: pump.turns)
        for i, message in enumerate(messages):
            child.put(message)
            while len(taken) <= i:
                await asyncio.sleep(0.001)
        child.end()
        await until(lambda: child.silent)
        turns = pump.turns
        await asyncio.sleep(0.05)
        assert pump.turns <= turns + 1
        pump.stop()

    asyncio.run(main())


def test_a_nudge_finds_what_nobody_told_of(child):
    async def main():
        taken = []
        pump = Pump(asyncio.get_running_loop(), child, taken.append, taken.append)
        await until(lambda: pump.turns)
        child.messages.append(1)
        assert pump.nudge()
        await until(lambda: taken == [1])
        pump.stop()

    asyncio.run(main())


def test_a_loop_that_does_not_run_is_nudged_once(child):
    loop = asyncio.new_event_loop()
    taken = []
    pump = Pump(loop, child, taken.append, taken.append)
    for _ in range(100):
        assert pump.nudge()
    child.messages.append(1)
    loop.run_until_complete(until(lambda: taken == [1]))
    assert pump.turns <= 3
    pump.stop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_what_is_no_message_is_told(child):
    async def main():
        failed = []
        pump = Pump(asyncio.get_running_loop(), child, print, failed.append)
        child.put("broken")
        await until(lambda: failed)
        assert isinstance(failed[0], msgspec.MsgspecError)
        pump.stop()

    asyncio.run(main())


def test_a_closed_loop_pumps_nothing(child):
    loop = asyncio.new_event_loop()
    loop.close()
    pump = Pump(loop, child, print, print)
    assert not pump.nudge()
    pump.stop()


def test_outputs_join_until_one_ends_an_answer():
    first = Output("r", 0, (1,), "a", queue_seconds=0.5, cached_tokens=16)
    second = Output("r", 0, (2,), "b")
    last = Output("r", 0, (3,), "c", finish=FinishReason.STOP, stop=3)
    assert first.joins(second)
    assert not first.joins(Output("r", 1, (2,), "b"))
    assert not first.joins(Output("s", 0, (2,), "b"))
    whole = first.joined(second).joined(last)
    assert (whole.tokens, whole.text, whole.finish, whole.stop) == ((1, 2, 3), "abc", FinishReason.STOP, 3)
    assert (whole.queue_seconds, whole.cached_tokens) == (0.5, 16)
    assert not whole.joins(second)
