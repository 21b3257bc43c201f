"""What every request passes before any route sees it: request id, API key, size of the body; and the last net under
errors.

Plain ASGI: a middleware with a queue in between (Starlette's BaseHTTPMiddleware) would hide disconnects from the
routes.
"""

import hashlib
import hmac
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenfold.serve.errors import ApiError, internal_error, logger

OPEN_PATHS = frozenset({"/health"})


def digest(key: str) -> bytes:
    """What is kept of a key in memory; digests have one length, so comparing them tells nothing about the key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """`keys`: digests of the API keys; empty means that none is needed. `max_body`: bytes."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...], max_body: int) -> None:
        self.app = app
        self.keys = keys
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        try:
            headers = Headers(scope=scope)
            scope["state"] |= self._authorise(scope["path"], headers)
            await self.app(scope, self._capped(headers, receive), send_marked)
        except ApiError as error:
            await error.response()(scope, receive, send_marked)
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, send_marked)

    def _authorise(self, path: str, headers: Headers) -> dict[str, str]:
        """The name of the key, and a salt for the prefix cache made of it. Raises ApiError (401) for a wrong key."""
        if not self.keys or path in OPEN_PATHS:
            return {"key": "", "salt": ""}
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        # Every key is compared, so that the time does not tell which one was close.
        if not sum(hmac.compare_digest(given, known) for known in self.keys):
            message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return {"key": given.hex()[:8], "salt": hashlib.sha256(b"salt" + given).hexdigest()}

    def _capped(self, headers: Headers, receive: Receive) -> Receive:
        """`receive` that raises ApiError (413) instead of handing on more than the cap."""
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(400, "Content-Length is not a number.")
        if int(length) > self.max_body:
            raise self._too_large()
        total = 0

        async def capped() -> Message:
            nonlocal total
            message: Any = await receive()
            total += len(message.get("body", b""))
            if total > self.max_body:
                raise self._too_large()
            return message

        return capped

    def _too_large(self) -> ApiError:
        way = "Send less, or start the server with a larger --max-body."
        message = f"The request body is larger than {self.max_body} bytes. {way}"
        return ApiError(413, message, code="request_too_large", headers={"connection": "close"})
