"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with a fitting HTTP status;
under /v1/messages as Anthropic's do.

Invariant: every response of the server with a status of 400 or more has this shape, and none tells a client more about
the server's insides than the request id under which the log has the details.
"""

import logging
import re
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

logger = logging.getLogger("tenfold.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
CODES = {404: "not_found", 405: "method_not_allowed"}
PYDANTIC_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
UNION_BRANCH = re.compile(r"^(str|int|float|bool|dict|none|list|tuple|is-instance)$|[^A-Za-z0-9_]")


class ApiError(Exception):
    """A response with an error in it. Not a ValueError, so that pydantic lets it pass through a validator."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def payload(self) -> dict[str, Any]:
        """The JSON body."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> "ErrorResponse":
        return ErrorResponse(self)


class ErrorResponse(JSONResponse):
    """An error in the shape of the API that was asked, which the path of the request tells when it is sent."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.payload(), error.status, headers=error.headers)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_anthropic(scope["path"]):
            request_id = scope.get("state", {}).get("request_id", "")  # none while the models load
            headers = (self.error.headers or {}) | {"request-id": request_id}
            response = JSONResponse(anthropic_payload(self.error, request_id), self.error.status, headers=headers)
            await response(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_payload(error: ApiError, request_id: str) -> dict[str, Any]:
    """The JSON body as Anthropic's clients expect it."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def engine_dead() -> ApiError:
    """A 503 that time does not heal."""
    return ApiError(503, "The engine has stopped; restart the server. Its log says why.", code="engine_dead")


def overloaded(message: str, retry_after: int = 1) -> ApiError:
    """A 503 that tells the client when to come back."""
    return ApiError(503, message, code="overloaded", headers={"retry-after": str(retry_after)})


def internal_error(request_id: str) -> ApiError:
    """A 500 that tells where to look."""
    return ApiError(
        500, f"Something went wrong in the server. Its log has the details under {request_id}.", code="internal_error"
    )


def from_value_error(error: ValueError, fields: Collection[str], renamed: dict[str, str] | None = None) -> ApiError:
    """A 400 from a sentence of the engine. Such sentences begin with the name of the field where one field is wrong;
    `renamed` maps the engine's names to the request's."""
    name, _, rest = str(error).partition(" ")
    param = (renamed or {}).get(name, name)
    if param not in fields:
        return invalid(str(error))
    return invalid(f"{param} {rest}", param)


def from_validation(error: ValidationError) -> ApiError:
    """A 400 that names the first field that is wrong and what is allowed there."""
    details = error.errors(include_url=False, include_input=False)
    # Of the branches of a union the one that understood most tells best what is wrong.
    first = max((d for d in details if d["loc"][:1] == details[0]["loc"][:1]), key=lambda d: len(_path(d["loc"])))
    param = _path(first["loc"])
    code = PYDANTIC_CODES.get(first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value")
    if first["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {first['ctx']['error']}.", code=code)
    if not param:
        return invalid("The request body must be a JSON object.", code=code)
    if first["type"] == "missing":
        return invalid(f"{param} is required.", param, code)
    if first["type"] == "extra_forbidden":
        return invalid(
            f"{param} is not a field this endpoint knows; remove it, or see docs/api.md for the list.", param, code
        )
    return invalid(f"{param}: {_allowed(details, param)}.", param, code)


def _allowed(details: list[Any], param: str) -> str:
    """What would have been right: of a union, each branch."""
    said = dict.fromkeys(
        d["msg"].removeprefix("Value error, ").rstrip(".") for d in details if _path(d["loc"]) == param
    )
    return ", or ".join(text if i == 0 else text[0].lower() + text[1:] for i, text in enumerate(said))


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location, without the names it gives to the branches of a union."""
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif i == 0:
            path = part if len(part) <= 64 else part[:61] + "..."
        elif not UNION_BRANCH.search(part):
            path += f".{part}"
    return path


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    messages = {
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    headers = dict(error.headers) if error.headers else None
    if status == 405:
        headers = {"allow": ", ".join(sorted(_methods(request)))}
    message = messages.get(status, str(error.detail))
    return ApiError(status, message, code=CODES.get(status), headers=headers).response()


def _methods(request: Request) -> set[str]:
    """What a path takes; the router itself names only the methods of the first route that has it."""
    routes = [r for r in request.app.state.routes if r.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes if route.path == routes[0].path for method in route.methods}
