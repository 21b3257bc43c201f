"""What is seen of every HTTP request from outside, before the guard: when it came, when its client left, how it ended.

Invariant: nothing is changed on the way through. Plain ASGI, for the reason given in `guard`.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:  # metrics know what is seen of a request; only their type looks back
    from tenfold.serve.metrics import Metrics

REFUSED = frozenset({401, 403, 413, 421, 429, 503})  # statuses of requests that were turned away, right or not
LONGEST_ERROR = 16 << 10  # bytes of a body in which an error code is looked for


class Seen:
    """Of one request, in `scope["state"]["seen"]`. Times are `time.monotonic()` seconds; 0.0: not yet. model: the
    name of the one it asked for, once known.
    """

    __slots__ = ("arrival", "disconnected", "headers", "model")

    def __init__(self, headers: Any = ()) -> None:
        self.arrival = time.monotonic()
        self.disconnected = 0.0
        self.headers = headers
        self.model = ""

    def header(self, name: str) -> str:
        """The value of a header, by its name in lower case; empty where there is none."""
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for key, value in self.headers if key == wanted), "")


class Observer:
    """Stands before all other middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.metrics)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            exchange.close()


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics) -> None:
        self.scope, self._receive, self._send, self.metrics = scope, receive, send, metrics
        self.seen = Seen(scope["headers"])
        self.status = 0
        self.streams = False
        self.code = ""
        scope.setdefault("state", {}).update(seen=self.seen, wire=send)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.seen.disconnected:
            self.seen.disconnected = time.monotonic()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started(message)
        elif self.status in REFUSED and not self.code:
            self.code = error_code(message.get("body", b""))
        await self._send(message)

    def _started(self, message: Message) -> None:
        self.status = message["status"]
        kind = dict(message["headers"]).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            self.streams = True
            self.metrics.streams.inc()

    def close(self) -> None:
        if self.streams:
            self.metrics.streams.dec()
        self.metrics.responded(endpoint_of(self.scope), self.status, self.code, self.seen.model)


def endpoint_of(scope: Scope) -> str:
    """The path as routes spell it, so that clients cannot make up label values; "other" where no route took it."""
    return str(getattr(scope.get("route"), "path", "") or "other")


def error_code(body: bytes) -> str:
    """The code of an error in OpenAI's or Anthropic's shape."""
    if len(body) > LONGEST_ERROR:
        return "other"
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error["type"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "other"
