"""What every request passes before any route sees it, and the last net under errors.

Invariant: deny by default. A path this module does not name needs a key where keys are set, whether or not there is a
route; every bound on what a client may send is checked before the thing it bounds is kept or parsed.

Plain ASGI: a middleware with a queue in between (Starlette's BaseHTTPMiddleware) would hide disconnects from the
routes.
"""

import asyncio
import base64
import binascii
import re
import uuid
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenfold.serve.errors import ApiError, internal_error, logger, overloaded
from tenfold.serve.keys import Key, Keys
from tenfold.serve.limits import Limits, Ticket
from tenfold.serve.nesting import Nesting, brackets
from tenfold.serve.origin import Hosts, Origins, is_preflight
from tenfold.serve.service import Service
from tenfold.serve.settings import ServeConfig

Head = dict[bytes, bytes]

OPEN_PATHS = frozenset({"/health", "/ready"})
ONCE = frozenset({b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"origin"})
CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
CANCEL = re.compile(r"/v1/responses/[^/]*/cancel")  # ends work instead of beginning it
DRAIN_RETRY = 5  # seconds; about what it takes another server to take over
# Where a response says nothing else. The page has a policy of its own.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Puts into the request's state: request_id; client_request_id, the client's own, for logs; key, the public name of
    its key; salt, of the prefix cache; admin; ticket, which counts against the key's limits."""

    def __init__(self, app: ASGIApp, settings: ServeConfig, service: Service, keys: Keys, limits: Limits) -> None:
        self.app = app
        self.settings = settings
        self.service = service
        self.keys = keys
        self.limits = limits
        self.hosts = Hosts(settings, keys.required)
        self.origins = Origins(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "client_request_id": "", "key": "", "salt": "", "admin": False}
        marks = [(b"x-request-id", request_id.encode())]
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = _marked(message["headers"], marks)
            await send(message)

        ticket = None
        try:
            head = self._head(scope)
            marks += self.origins.headers(head)
            if is_preflight(head, scope["method"]):
                marks += self.origins.preflight(head)
                await Response(status_code=204)(scope, receive, send_marked)
                return
            ticket = self._admit(scope, head, marks)
            state["ticket"] = ticket
            await self.app(scope, self._capped(head, receive), send_marked)
        except ApiError as error:
            await error.response()(scope, receive, send_marked)
        except Exception:
            logger.exception("request %s: %s %r failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, send_marked)
        finally:
            if ticket:
                ticket.close()

    def _head(self, scope: Scope) -> Head:
        """The headers by name. Raises ApiError for too much of them, one that must not be there twice, or a name that
        is not this server's."""
        headers = scope["headers"]
        head: Head = dict(reversed(headers))
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum([len(name) + len(value) for name, value in headers])
        if len(headers) > self.settings.max_headers or size > self.settings.max_head:
            limits = (
                f"{self.settings.max_headers} headers and {self.settings.max_head} bytes (--max-headers, --max-head)"
            )
            raise closing(431, f"The head of the request is larger than {limits}.", "head_too_large")
        if len(head) != len(headers):
            self._check_once([name for name, _ in headers])
        if b"host" in head:
            self.hosts.check(head[b"host"])
        if head.get(b"content-encoding", b"identity") != b"identity":
            raise closing(415, "The request body is compressed; send it as it is.", "unsupported_encoding")
        given = head.get(b"x-request-id") or head.get(b"x-client-request-id") or b""
        if CLIENT_ID.fullmatch(given):
            scope["state"]["client_request_id"] = given.decode()
        return head

    def _check_once(self, names: list[bytes]) -> None:
        for name in ONCE:
            if names.count(name) > 1:
                raise closing(400, f"The request has more than one {name.decode()} header.", "invalid_header")

    def _admit(self, scope: Scope, head: Head, marks: list[tuple[bytes, bytes]]) -> Ticket | None:
        """Counts a request in if its sender may make it and it is one that counts. Raises ApiError."""
        key = self._authorise(scope, head)
        if key:
            scope["state"] |= {"key": key.name, "salt": key.salt, "admin": key.admin}
        method, path = scope["method"], scope["path"]
        if method != "POST" or is_admin(path) or CANCEL.fullmatch(path):
            return None
        if self.service.draining and path.startswith("/v1/"):
            told = overloaded("This server is being stopped and takes no new work.", DRAIN_RETRY)
            raise closing(503, told.message, "draining", told.headers)
        name = scope["state"]["key"]
        try:
            return self.limits.admit(name, exempt=scope["state"]["admin"])
        finally:
            marks += self.limits.headers(name)

    def _authorise(self, scope: Scope, head: Head) -> Key | None:
        """Whose request it is; None where no key is needed. Raises ApiError: 401 without a right key, 403 with one that
        does not reach this far or for another site's page, 404 for /admin where there is none."""
        path = scope["path"]
        if path in OPEN_PATHS:
            return None
        secrets, credentials = given_secrets(head)
        key = next(filter(None, map(self.keys.find, secrets)), None)
        if key is None and (self.keys.required or (is_admin(path) and self.keys.has_admin)):
            raise unauthorised(scope, head)
        self.origins.check(head, scope["method"], credentials)
        if is_admin(path):
            if not self.keys.has_admin:
                raise ApiError(404, "There is no /admin here; start the server with --admin-key.", code="not_found")
            if not (key and key.admin):
                raise ApiError(403, "This API key does not open /admin; the admin key does.", code="not_admin")
        return key

    def _capped(self, head: Head, receive: Receive) -> Receive:
        """`receive` that raises ApiError instead of handing on a body that is too long, nested too deeply or too slow
        in coming."""
        length = head.get(b"content-length", b"0")
        if not length.isdigit():
            raise closing(400, "Content-Length is not a number.", "invalid_header")
        if len(length) > 18 or int(length) > self.settings.max_body:
            raise self._too_large()
        body = Body(self.settings.max_json_depth)
        limit = self.settings.read_timeout or None

        async def capped() -> Message:
            if body.whole:
                return await receive()
            try:
                async with asyncio.timeout(limit):
                    message = await receive()
            except TimeoutError:
                raise closing(408, f"No more of the request body came for {limit:g} s.", "request_timeout") from None
            if message["type"] == "http.request":
                body.add(message)
                if body.size > self.settings.max_body:
                    raise self._too_large()
            return message

        return capped

    def _too_large(self) -> ApiError:
        way = "Send less, or start the server with a larger --max-body."
        return closing(
            413, f"The request body is larger than {self.settings.max_body} bytes. {way}", "request_too_large"
        )


class Body:
    """What is known of a request body while it comes in."""

    __slots__ = ("_max_depth", "_nesting", "size", "whole")

    def __init__(self, max_depth: int) -> None:
        """max_depth: 0 for any."""
        self._max_depth = max_depth
        self._nesting: Nesting | None = None
        self.size = 0
        self.whole = False

    def add(self, message: Message) -> None:
        """Raises ApiError (400) for JSON that is nested too deeply."""
        chunk: Any = message.get("body", b"")
        self.whole = not message.get("more_body", False)
        self.size += len(chunk)
        if not self._max_depth or (self.whole and self._nesting is None and brackets(chunk) <= self._max_depth):
            return
        self._nesting = self._nesting or Nesting()
        if self._nesting.feed(chunk) > self._max_depth:
            levels = f"{self._max_depth} levels; send it flatter, or start the server with a larger --max-json-depth"
            raise closing(400, f"The request body is nested deeper than {levels}.", "json_too_deep")


def is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def given_secrets(head: Head) -> tuple[list[bytes], str]:
    """The keys a request carries, and how, in the words of `Origins.check`."""
    secrets = []
    credentials = "none"
    scheme, _, rest = head.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        secrets.append(rest.strip())
        credentials = "sent"
    elif scheme.lower() == b"basic":
        secrets.append(_password(rest))
        credentials = "added"
    if b"x-api-key" in head:
        secrets.append(head[b"x-api-key"])
        credentials = "sent"
    return secrets, credentials


def _password(encoded: bytes) -> bytes:
    """The password of HTTP Basic: a browser's way to send a key. Any user name will do."""
    try:
        return base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def unauthorised(scope: Scope, head: Head) -> ApiError:
    """A 401; a browser that opens the page is told so that it asks for the key."""
    page = scope["method"] == "GET" and scope["path"] == "/" and b"text/html" in head.get(b"accept", b"")
    scheme = 'Basic realm="Tenfold"' if page else "Bearer"
    message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": scheme})


def closing(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> ApiError:
    """An error after which the connection is closed: what follows on it is not worth reading."""
    return ApiError(status, message, code=code, headers={"connection": "close"} | (headers or {}))


def _marked(headers: Any, marks: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A response's headers with `marks`, and with the security headers it does not set itself."""
    own = {name for name, _ in headers}
    return [*headers, *marks, *(header for header in SECURITY_HEADERS if header[0] not in own)]
