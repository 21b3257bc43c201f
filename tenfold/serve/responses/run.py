"""An answer that is made whether or not anybody waits for it.

Invariant: its events are told to any number of followers, from any of them on, while it runs and after.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from tenfold.serve.errors import internal_error, logger
from tenfold.serve.responses.answer import Answer
from tenfold.serve.stream import named_event


class Run:
    """replayable: keep the events. ended: called once, when nothing more comes."""

    def __init__(self, answer: Answer, replayable: bool, ended: Callable[[], None]) -> None:
        self.answer = answer
        self.replayable = replayable
        self.events: list[bytes] = []  # place = sequence number
        self._ended = ended
        self._more = asyncio.Event()
        self._task = asyncio.ensure_future(self._work())
        self._task.add_done_callback(self._end)

    async def cancel(self) -> None:
        """End it now; the engine has let go of it when this returns."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def follow(self, after: int = -1) -> AsyncGenerator[bytes, None]:
        """The events whose sequence number is above `after`."""
        at = after + 1
        while True:
            while at < len(self.events):
                yield self.events[at]
                at += 1
            if self._task.done():
                return
            await self._more.wait()

    async def _work(self) -> None:
        async with aclosing(self.answer.events(refusable=False)) as events:
            async for event in events:
                if self.replayable:
                    self.events.append(named_event(event))
                    self._wake()

    def _end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.answer.end("cancelled")
        elif (error := task.exception()) is not None:
            logger.error("response %s failed", self.answer.id, exc_info=error)
            self.answer.fail(internal_error(self.answer.id))
        self._ended()
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
