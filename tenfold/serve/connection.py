"""One client's connection, below HTTP: uvicorn's protocol with bounds on what comes before a request is known.

Invariant: what a client makes the server keep before the guard sees a request is bounded in bytes, in number and in
time; uvicorn by itself bounds none of them.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tenfold.serve.errors import ApiError
from tenfold.serve.settings import ServeConfig

MAX_PIPELINED = (
    16  # requests that wait on a connection for the answer to the one before; browsers and clients send none
)


def bounded(settings: ServeConfig) -> Any:
    """For uvicorn's `http` setting, which asks for a class but only calls it."""
    return partial(Connection, settings.max_head, settings.read_timeout, settings.stall_timeout)


class ChunkedLine:
    """`lane.Line` of a response that uvicorn sends in chunks: writes one as uvicorn does, but for waiting."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def free(self) -> bool:
        cycle = self._cycle
        started = cycle.response_started and not cycle.response_complete and cycle.chunked_encoding
        return bool(started) and not (cycle.disconnected or cycle.flow.write_paused)

    def write(self, data: bytes) -> None:
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    @contextmanager
    def together(self) -> Iterator[None]:
        transport, held = self._cycle.transport, _Held()
        self._cycle.transport = cast(asyncio.Transport, held)
        try:
            yield
        finally:
            self._cycle.transport = transport
            transport.write(b"".join(held.parts))


class _Held:
    """Stands in for a transport while the head and the first piece of a response are written."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.parts.append(data)


class Connection(HttpToolsProtocol):
    """max_head: bytes of a request's first line and headers. head_timeout: seconds until they must be there, from the
    connection's beginning or their first byte on. stall_timeout: seconds in which a client whose buffers are full must
    take something. 0: no limit."""

    def __init__(self, max_head: int, head_timeout: float, stall_timeout: float = 0.0, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._max_head = max_head
        self._head_timeout = head_timeout
        self._head_size = 0  # of a head that is not whole yet
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timeout = stall_timeout
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timeout:
            self._watch_stall()

    def resume_writing(self) -> None:
        self._stop_stall()
        super().resume_writing()

    def _watch_stall(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self._stall_timeout, self._stalled, left)

    def _stalled(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_stall()
        else:
            self.transport.abort()  # what is not taken is never sent; the request ends as it does when a client leaves

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            # More than one read of a socket may bring is not kept; a head that fits one is measured by the guard.
            self._head_size += len(data)
            if self._head_size > self._max_head and self._head_size > len(data):
                self._refuse(431, f"The head of the request is larger than {self._max_head} bytes (--max-head).")
                return
            if self._timer is None:
                self._start_timer()
        super().data_received(data)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests wait on this connection")  # uvicorn answers 400 and closes
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_size = 0
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.cycle.scope["state"]["line"] = ChunkedLine(self.cycle)

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _start_timer(self) -> None:
        if self._head_timeout:
            self._timer = self.loop.call_later(self._head_timeout, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._head_size:
            self._refuse(408, f"The head of the request did not come within {self._head_timeout:g} s.")
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer as every error is answered, and close."""
        self._stop_timer()
        body = json.dumps(ApiError(status, message, code="invalid_http").payload()).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
