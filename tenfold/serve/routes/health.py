"""GET /health, /ready and /version: whether this process answers, whether to send it work, and what it is.

Invariant: /ready tells the truth at every moment, from the first model that loads to the end of the drain; neither it
nor /health waits for an engine.
"""

from collections.abc import Mapping

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import tenfold
from tenfold.serve.engines import state_of
from tenfold.serve.errors import ApiError, engine_dead, overloaded
from tenfold.serve.reply import ERROR_RESPONSES
from tenfold.serve.service import service_of

router = APIRouter()

RETRY = 2  # seconds after which an engine that loads or restarts may be there
LOADING = "The server is loading its models. Try again in a moment."


@router.get("/health", response_model=None, responses={200: {}, 503: ERROR_RESPONSES[503]})
async def health(http: Request) -> Response:
    """200 while this process can do its work or is on the way to it; 503 once an engine has failed for good, which
    only a new start heals.
    """
    service = service_of(http)
    engines = [served.llm for served in service.models.values()]
    if not all(getattr(engine, "alive", True) for engine in (*engines, *service.classifiers.values())):
        raise engine_dead()
    return healthy()


@router.get("/ready", response_model=None, responses={200: {}, 503: ERROR_RESPONSES[503]})
async def ready(http: Request) -> Response:
    """200 where new work is welcome: every model is ready and the server was not told to stop."""
    service = service_of(http)
    states = {name: state_of(served.llm) for name, served in service.models.items()}
    if service.draining:
        return not_ready("The server takes no new work.", states)
    if waiting := [f"{name} is {state}" for name, state in states.items() if state != "ready"]:
        return not_ready(f"Not every model is ready: {', '.join(waiting)}.", states)
    return JSONResponse({"status": "ready", "models": states})


@router.get("/version", response_model=None, responses={200: {}, 401: ERROR_RESPONSES[401]})
async def version() -> Response:
    """The version of the server."""
    return JSONResponse({"version": tenfold.__version__})


def healthy() -> Response:
    return JSONResponse({"status": "ok"})


def not_ready(why: str, states: Mapping[str, str]) -> Response:
    """A 503 with the state of each model."""
    error = ApiError(503, why, code="not_ready")
    return JSONResponse(error.payload() | {"models": dict(states)}, 503, headers={"retry-after": str(RETRY)})


class WhileLoading:
    """The ASGI application of a server whose models are not there yet. Knows nothing, so nobody needs a key."""

    def __init__(self, names: list[str]) -> None:
        self.states = dict.fromkeys(names, "loading")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope["path"])(scope, receive, send)

    def _answer(self, path: str) -> Response:
        if path == "/health":
            return healthy()
        if path == "/ready":
            return not_ready(LOADING, self.states)
        return overloaded(LOADING, RETRY).response()
