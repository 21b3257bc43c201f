"""`Pump`: reads an engine process's messages on the event loop that waits for them.

Between the arrival of a token and the task that writes it on there is then no other thread, and tokens that follow
each other within GATHER are looked at together: on a machine whose cores the engine wants, waking up costs more than
all the rest of a token's way, for the engine's weights have taken every cache since the last time (0.3 ms of processor
time against 0.05 ms, 2-core EPYC, SmolLM2-135M at 4 ms a token, November 2026).

Invariant: while a pump runs nobody else reads from its child, and messages are taken in their order, also across its
beginning and its end.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from tenfold.engine import wire
from tenfold.engine.child import Child

GATHER = 0.01  # seconds from one look to the next while messages come faster than that; else each is taken at once


class Pump:
    """Calls `take` for each message of `child`, on `loop`; `failed` once with what is wrong with a message."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        child: Child,
        take: Callable[[wire.Event], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._child = child
        self._take = take
        self._failed = failed
        self._lock = threading.RLock()  # held while messages are taken
        self._stopped = False
        self._resting = True  # looks when GATHER is over, not when it is woken
        self._looked = -GATHER  # when there was something, in the loop's time
        self._nudged = False
        # A descriptor of its own: the child's may be closed, and its number used anew, while the loop still has it.
        self._fd = os.dup(child.fd)
        self.turns = 0  # times it has looked
        try:
            loop.call_soon_threadsafe(self._begin)
        except RuntimeError:  # the loop is closed
            self._stopped = True
            os.close(self._fd)

    def nudge(self) -> bool:
        """Have it look, even where nothing told it to; False when it never will again."""
        if self._stopped or self._loop.is_closed():
            return False
        if not self._nudged:  # a loop that does not run just now should not find hundreds of them
            self._nudged = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._nudge)
        return True

    def stop(self) -> None:
        """When this returns no message is being taken, and none will be. From any thread; idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            os.close(self._fd)

    def _begin(self) -> None:
        """Look, and again after GATHER while there is something; then be woken by messages."""
        if self._take_all():
            self._looked = self._loop.time()
            self._loop.call_later(GATHER, self._begin)
        elif not (self._stopped or self._child.silent):
            self._resting = False
            self._loop.add_reader(self._fd, self._look)

    def _nudge(self) -> None:
        self._nudged = False
        self._look()

    def _look(self) -> None:
        if not self._take_all():
            if self._child.silent and not self._stopped:  # its end would wake the loop again and again
                self._loop.remove_reader(self._fd)
            return
        before, self._looked = self._looked, self._loop.time()
        if self._looked - before < GATHER and not (self._stopped or self._resting):
            self._loop.remove_reader(self._fd)
            self._resting = True
            self._loop.call_later(GATHER, self._begin)

    def _take_all(self) -> bool:
        """Whether there was anything."""
        with self._lock:
            if self._stopped:
                return False
            self.turns += 1
            try:
                events = self._child.read()
                for event in events:
                    self._take(event)
            except msgspec.MsgspecError as error:
                self._failed(error)
                return False
            return bool(events)

    def _end(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
