"""Server-sent events written by hand, and the watch for clients that leave.

Invariant: whatever runs for a request is cancelled as soon as its client is gone, and has ended before the response
does.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, nullcontext
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tenfold.serve.lane import Lane, Line

T = TypeVar("T")

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


def event(payload: dict[str, Any]) -> bytes:
    """One event. JSON is kept to ASCII: some clients split lines at U+2028, which SSE does not."""
    data = encode(payload)
    if not data.isascii():
        data = json.dumps(payload, separators=(",", ":")).encode("ascii")
    return b"data: " + data + b"\n\n"


def named_event(payload: dict[str, Any]) -> bytes:
    """One event of an API whose clients tell events apart by their SSE name, which is the payload's type."""
    return b"event: " + payload["type"].encode("ascii") + b"\n" + event(payload)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first: then raises ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.add_done_callback(_noted)
        watch.cancel()  # it has nothing to clean up: nobody need wait until it has ended
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        _noted(task)


def _noted(task: "asyncio.Future[Any]") -> None:
    """Take note of an exception: it was raised already, or nobody is there to read it."""
    if not task.cancelled():
        task.exception()


class EventStream(Response):
    """A response whose body is `first` and then what `rest` yields, one network write an event. lane: opened while
    nothing is under way from `rest`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        headers: dict[str, str] | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.first = first
        self.rest = rest
        self.lane = lane or Lane()
        self.init_headers(HEADERS | (headers or {}))
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        try:
            # Pieces go past the middleware, which has seen all it acts on when it saw the beginning.
            await until_disconnect(receive, self._write(send, state.get("wire", send), state.get("line")))
        except (ClientGone, OSError):
            await self.rest.aclose()
        finally:
            self.lane.open(None)

    async def _write(self, send: Send, wire: Send, line: Line | None) -> None:
        with line.together() if line else nullcontext():
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.first, "more_body": True})
        self.lane.open(line)
        async with aclosing(self.rest) as events:
            async for chunk in events:
                await wire({"type": "http.response.body", "body": chunk, "more_body": True})
        self.lane.open(None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
