"""/admin: what an operator does to a running server. Not part of the API's description: clients have no use for it.

Invariant: nothing here is done without the admin key. The guard lets nobody else through, and each route checks again.
"""

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.serve.errors import ApiError, logger
from tenfold.serve.keys import Keys
from tenfold.serve.limits import Limits
from tenfold.serve.protocol.admin import LogLevel, ModelChoice
from tenfold.serve.protocol.body import parse
from tenfold.serve.service import DEFAULT_NAME, Served, service_of


def only_admin(http: Request) -> None:
    """Raises ApiError (403) for anybody else."""
    if not http.scope["state"].get("admin"):
        raise ApiError(403, "Only the admin key opens /admin.", code="not_admin")


router = APIRouter(prefix="/admin", include_in_schema=False, dependencies=[Depends(only_admin)])


@router.post("/drain", response_model=None)
async def drain(http: Request) -> Response:
    """Take no new work until `resume`; what runs goes on."""
    service = service_of(http)
    service.draining = True
    return _done("drain", draining=True)


@router.post("/resume", response_model=None)
async def resume(http: Request) -> Response:
    """Take new work again."""
    service = service_of(http)
    if service.stopping:
        raise ApiError(409, "The server was told to stop; that cannot be taken back.", code="stopping")
    service.draining = False
    return _done("resume", draining=False)


@router.post("/restart", response_model=None)
async def restart(http: Request) -> Response:
    """End a model's engine and start it again, as after a failure of its own."""
    served = await _chosen(http)
    await asyncio.to_thread(served.llm.restart)
    return _done("restart", model=served.name)


@router.post("/dump", response_model=None)
async def dump(http: Request) -> Response:
    """Write the stacks and the scheduler's state of a model's engine into the log."""
    served = await _chosen(http)
    await asyncio.to_thread(served.llm.dump)
    return _done("dump", model=served.name)


@router.post("/log_level", response_model=None)
async def log_level(http: Request) -> Response:
    """Say more or less in this process's log from now on."""
    body = parse(LogLevel, await http.body())
    logging.getLogger("tenfold").setLevel(body.level.upper())
    return _done("log_level", level=body.level)


@router.get("/keys", response_model=None)
async def list_keys(http: Request) -> Response:
    """The names of the keys and what each uses."""
    keys: Keys = http.app.state.keys
    limits: Limits = http.app.state.limits
    names = keys.names() if keys.required else ["", *keys.names()]
    return JSONResponse({"data": [{"name": name} | limits.usage(name) for name in names]})


async def _chosen(http: Request) -> Served:
    body = parse(ModelChoice, await http.body() or b"{}")
    return service_of(http).served(body.model or DEFAULT_NAME)


def _done(what: str, **result: Any) -> Response:
    logger.warning("admin: %s %s", what, result)
    return JSONResponse(result)
