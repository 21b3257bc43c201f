"""What the log says of requests: the id and model on every line written for one, and on request a line for each.

Invariant: no text of a prompt or an answer, no key and no query string reaches the log.
"""

import logging
import time
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

access = logging.getLogger("tenfold.access")

LONGEST_PATH = 200  # characters
FIRST = ("method", "path", "status", "ms")  # fields with which a line begins
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")
_current: ContextVar[Scope | None] = ContextVar("current", default=None)


def request_fields() -> dict[str, Any]:
    """What is known of the request this task works for; for `base.log.configure`."""
    scope = _current.get()
    state = scope.get("state", {}) if scope else {}
    seen = state.get("seen")
    known = {"request_id": state.get("request_id", ""), "model": seen.model if seen else ""}
    return {name: value for name, value in known.items() if value}


class RequestLog:
    """ASGI middleware. each: write a line for each request, at level info of a logger of its own, so that it is there
    whatever `log_level` says.
    """

    def __init__(self, app: ASGIApp, each: bool) -> None:
        self.app = app
        self.each = each
        if each:
            access.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _current.set(scope)
        if self.each:
            await self._logged(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _logged(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0
        begun = time.perf_counter()

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_seen)
        finally:
            write_line(scope, status, time.perf_counter() - begun)


def write_line(scope: Scope, status: int, seconds: float) -> None:
    """One request that has ended; status 0: its client left before there was one."""
    state = scope.get("state", {})
    client = scope.get("client")
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"][:LONGEST_PATH],
        "status": status,
        "ms": round(seconds * 1000, 1),
        "client": client[0] if client else "",
        "key": state.get("key", ""),
        "client_request_id": state.get("client_request_id", ""),
        **request_fields(),
        **state.get("tokens", {}),
    }
    fields = {name: value for name, value in fields.items() if value != ""}
    more = " ".join(f"{name}={value}" for name, value in fields.items() if name not in FIRST)
    access.info("%(method)s %(path)s %(status)d %(ms).1f ms", fields, extra={"fields": fields, "more": more})


def note_tokens(prompt: int, completion: int, cached: int) -> None:
    """What the request of this task has used, further to what was noted before."""
    scope = _current.get()
    if scope is not None:
        noted = scope.setdefault("state", {}).setdefault("tokens", dict.fromkeys(TOKENS, 0))
        for name, count in zip(TOKENS, (prompt, completion, cached)):
            noted[name] += count
